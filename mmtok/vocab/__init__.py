"""Language-model ids: ranges, markers and layouts (`Vocab`), and which id may follow which (`Grammar`)."""

from mmtok.vocab.bits import BitSplit, from_bits, to_bits
from mmtok.vocab.grammar import Grammar
from mmtok.vocab.header import FIELDS
from mmtok.vocab.layouts import LAYOUTS
from mmtok.vocab.presets import PRESETS
from mmtok.vocab.salvage import Damage, Salvaged, SalvageReport
from mmtok.vocab.tables import code_mask, from_tables, to_tables, valid_steps
from mmtok.vocab.vocab import Vocab

__all__ = [
    "FIELDS",
    "LAYOUTS",
    "PRESETS",
    "BitSplit",
    "Damage",
    "Grammar",
    "SalvageReport",
    "Salvaged",
    "Vocab",
    "code_mask",
    "from_bits",
    "from_tables",
    "to_bits",
    "to_tables",
    "valid_steps",
]
