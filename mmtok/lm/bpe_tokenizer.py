"""`BPETokenizer`: a tokenizer and a `CodeBPE` as one tokenizer, for all that takes one (the processor, the bench)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtok.lm.bpe import CodeBPE
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens, TokensError, TokenSpec


class BPETokenizer(Tokenizer):
    """``encode`` gives the ids of ``bpe`` as Tokens of one level, ``decode`` reads them; sizes come back exactly.

    Args:
        tokenizer: whose codes ``bpe`` was trained on; with more levels it encodes those of the BPE only.
        bpe: `CodeBPE.train` or `load`.

    Raises:
        TokensError: a BPE of another tokenizer's codes.
    """

    def __init__(self, tokenizer: Tokenizer, bpe: CodeBPE) -> None:
        super().__init__({})
        Q, spec = bpe.base.num_codebooks, tokenizer.spec
        if spec.num_codebooks < Q or bpe.base != spec.keep(Q):
            raise TokensError(
                f"expected a BPE of the codes of {spec}, got one of {bpe.base}; train it on this tokenizer's"
            )
        self.tokenizer, self.bpe = tokenizer, bpe
        self.name = bpe.spec.name
        self.sample_rate: int | None = getattr(tokenizer, "sample_rate", None)  # Hz; None for pictures

    def base_spec(self) -> TokenSpec:
        return self.bpe.spec

    @property
    def fingerprint(self) -> str:
        """That of the BPE, which follows from the tokenizer's and the merges."""
        return self.bpe.spec.fingerprint

    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        """As the tokenizer's; ``num_tokens`` counts its positions, ``num_codebooks`` is 1 (a BPE has one level)."""
        if num_codebooks not in (None, 1):
            raise TokensError(f"num_codebooks: expected 1 or None, got {num_codebooks}; train a BPE on so many levels")
        Q = self.bpe.base.num_codebooks
        levels = Q if self.tokenizer.spec.num_codebooks > Q else None
        found = self.tokenizer.encode(x, sample_rate, text=text, num_codebooks=levels, num_tokens=num_tokens)
        return self.bpe.as_tokens(found)

    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        """As the tokenizer's. TokensError for ids that no codes give: ``bpe.salvage`` takes what a model broke off."""
        codes = self.bpe.from_tokens(tokens).to(self.tokenizer.device)
        return self.tokenizer.decode(codes, text=text, size=size, generator=generator)
