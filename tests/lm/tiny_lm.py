"""A tiny text tokenizer, tiny Llamas and tiny mmtok tokenizers, for the tests beside it."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtok.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contract"))
tiny = importlib.import_module("tiny_models")

TEXTS = ["a cat sat on the mat", "the dog says woof, and the cat says meow", "Two dogs. Is that so?"] * 3


@functools.cache
def build(name: str) -> Tokenizer:
    return tiny.build(name)


def text_tokenizer(lowercase: bool = False, words: tuple[str, ...] = (), size: int = 300) -> Any:
    """A byte-level BPE trained on a few sentences, with ``<s>``, ``</s>`` and further special tokens."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.Lowercase() if lowercase else None
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", *words],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def llama(rows: int, tied: bool = False, width: int = 16, seed: int = 0) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).eval()
