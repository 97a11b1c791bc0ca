"""Q-Former: a BERT-like transformer whose learnt queries read image features (BLIP-2, arXiv 2301.12597, section 3.1).

SEED (arXiv 2307.08041) lets query i attend to queries up to i only. Its code does so if there are exactly 32 queries,
and is silently bidirectional for any other number; here ``causal`` is an argument and the number is free.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.layers.vit import attend_where

EPS = 1e-12  # of every LayerNorm, as in BERT


def attend_dropped(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """`attend_where`, with dropout on the attention weights. q, k, v (B, heads, T, d); not both masks at once."""
    if dropout == 0:
        return attend_where(q, k, v, key_mask, causal)
    seen = None if key_mask is None else key_mask[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=causal)


class PostNormAttention(nn.Module):
    """norm(x + attention(x, source)) with biases; ``source`` is x itself or features of another width."""

    def __init__(self, dim: int, num_heads: int, source_dim: int, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(source_dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor, source: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        B, T, D = x.shape
        q = self.q(x).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, heads, T, d)
        k, v = self.kv(source).view(B, source.shape[1], 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        y = attend_dropped(q, k, v, key_mask, causal, self.dropout if self.training else 0.0)
        y = self.out(y.transpose(1, 2).reshape(B, T, D))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


class PostNormFeedForward(nn.Module):
    """norm(x + out(gelu(up(x))))."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(dim, hidden)
        self.out = nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(F.gelu(self.up(x)))
        return self.norm(x + F.dropout(y, self.dropout, self.training))


class QFormerLayer(nn.Module):
    """Self-attention, then cross-attention where ``feature_dim`` is given, then the feed-forward of queries or text."""

    def __init__(self, dim: int, num_heads: int, hidden: int, feature_dim: int | None, text: bool, dropout: float):
        super().__init__()
        self.attention = PostNormAttention(dim, num_heads, dim, dropout)
        self.cross = None if feature_dim is None else PostNormAttention(dim, num_heads, feature_dim, dropout)
        self.query_mlp = PostNormFeedForward(dim, hidden, dropout)
        self.text_mlp = PostNormFeedForward(dim, hidden, dropout) if text else None

    def forward(self, x: Tensor, features: Tensor, causal: bool) -> Tensor:
        x = self.attention(x, x, causal=causal)
        if self.cross is not None:
            x = self.cross(x, features)
        return self.query_mlp(x)

    def text(self, x: Tensor, key_mask: Tensor) -> Tensor:
        assert self.text_mlp is not None
        return self.text_mlp(self.attention(x, x, key_mask))


class QFormer(nn.Module):
    """Queries (B, T, D) and features (B, N, F) -> (B, T, D); and, with ``text_vocab``, word ids -> (B, S, D).

    Args:
        dim: D. depth: layers. num_heads: of every attention.
        feature_dim: F of the features; layers 0, n, 2n ... attend to all of them, n = ``cross_attention_freq``.
        causal: query i attends to queries 0..i; False = to all. Cross-attention is to all features in both cases.
        mlp_ratio: hidden width of the feed-forwards over D.
        dropout: of embeddings, attention weights and branches, in training.
        text_vocab: words of the text branch, which shares embedding norm and self-attention with the queries and has
            feed-forwards of its own; 0 = no text branch. Words attend to words only, in both directions.
        max_text: longest text in words.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        feature_dim: int,
        causal: bool,
        cross_attention_freq: int = 2,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        text_vocab: int = 0,
        max_text: int = 512,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads {num_heads}, got {dim}")
        if cross_attention_freq < 1 or depth < 1:
            raise ValueError(
                f"expected depth and cross_attention_freq of at least 1, got {depth} and {cross_attention_freq}"
            )
        self.dim, self.feature_dim, self.causal, self.dropout, self.text_vocab = (
            dim,
            feature_dim,
            causal,
            dropout,
            text_vocab,
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.layers = nn.ModuleList(
            QFormerLayer(
                dim,
                num_heads,
                int(dim * mlp_ratio),
                None if i % cross_attention_freq else feature_dim,
                text_vocab > 0,
                dropout,
            )
            for i in range(depth)
        )
        self.words = nn.Embedding(text_vocab, dim) if text_vocab else None
        self.word_positions = nn.Parameter(torch.randn(max_text, dim) * 0.02) if text_vocab else None
        self.apply(_start)

    def forward(self, queries: Tensor, features: Tensor) -> Tensor:
        """queries (B, T, D), features (B, N, F) -> (B, T, D).

        Raises:
            ValueError: another width of the queries or the features.
        """
        if queries.ndim != 3 or queries.shape[2] != self.dim:
            raise ValueError(f"queries: expected (B, T, {self.dim}), got {tuple(queries.shape)}")
        if features.ndim != 3 or features.shape[2] != self.feature_dim:
            raise ValueError(
                f"features: expected (B, N, {self.feature_dim}), got {tuple(features.shape)}; "
                f"they must come from the vision encoder of this model's config"
            )
        x = F.dropout(self.norm(queries), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, features, self.causal)
        return x

    def text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Word ids (B, S) int64 and mask (B, S) bool, true at real words -> (B, S, D); padding changes nothing.

        Raises:
            ValueError: no text branch, a longer text, another shape, an id outside the vocabulary, an empty text.
        """
        if self.words is None or self.word_positions is None:
            raise ValueError("text: this Q-Former has no text branch; build it with text_vocab > 0")
        longest = len(self.word_positions)
        if ids.ndim != 2 or ids.shape[1] > longest or mask.shape != ids.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"text: expected ids (B, 1..{longest}) with a bool mask of their shape (true = a real word), got "
                f"{tuple(ids.shape)} and {mask.dtype} of {tuple(mask.shape)}"
            )
        if not bool(mask.any(1).all()) or not bool(((ids >= 0) & (ids < self.text_vocab)).all()):
            raise ValueError(f"text: expected ids in 0..{self.text_vocab - 1} and at least one real word in each text")
        x = self.norm(self.words(ids) + self.word_positions[: ids.shape[1]])
        x = F.dropout(x, self.dropout, self.training)
        for layer in self.layers:
            assert isinstance(layer, QFormerLayer)
            x = layer.text(x, mask)
        return x


def _start(module: nn.Module) -> None:
    """Xavier's uniform for Linears, biases 0, words N(0, .02).

    BERT's N(0, .02) everywhere is meant for width 768; at 192 it lets almost nothing of the features through.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
