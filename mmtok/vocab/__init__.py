"""Language-model ids: ranges, markers and layouts (`Vocab`), and which id may follow which (`Grammar`)."""

from mmtok.vocab.grammar import Grammar
from mmtok.vocab.header import FIELDS
from mmtok.vocab.layouts import LAYOUTS
from mmtok.vocab.vocab import Vocab

__all__ = ["FIELDS", "LAYOUTS", "Grammar", "Vocab"]
