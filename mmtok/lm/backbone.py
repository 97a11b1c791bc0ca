"""Causal transformers that read embeddings: a small one of ours, and any of the package transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmtok.layers.conv1d import Past
from mmtok.layers.stream_transformer import StreamTransformer


class Memory(Past):
    """What a backbone keeps of one sequence while it is written step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = None  # a transformers model's own


class Backbone(nn.Module):
    """The causal transformer of `mmtok.layers.stream_transformer` with a last norm.

    Args:
        dim: D. depth: layers. num_heads: they share D. context: positions that a layer sees, at least the longest
            sequence for full attention. mlp_ratio: hidden width of the MLP over D.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, context: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.dim, self.depth = dim, depth
        # A learnt scale of 0.01 on every branch is for deep stacks beside a codec; a small one starts from plain sums.
        self.layers = StreamTransformer(dim, depth, num_heads, int(dim * mlp_ratio), context, layer_scale=1.0)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, past: Memory | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D); with ``past`` the S positions follow those of the calls before."""
        return self.norm(self.layers(x, past))


class TransformersBackbone(nn.Module):
    """Any decoder of transformers that takes ``inputs_embeds``, e.g. a LlamaModel.

    Args:
        model: the bare decoder, or a causal LM, whose decoder is taken and whose embeddings and head are not used.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = getattr(model, "base_model", model)
        if not hasattr(self.model, "config"):
            raise ValueError(f"model: expected a transformers model, got {type(model).__name__}; `Backbone` is ours")
        self.dim: int = self.model.config.get_text_config().hidden_size

    def forward(self, x: Tensor, past: Memory | None = None) -> Tensor:
        """x (B, S, D) -> (B, S, D), as in `Backbone`."""
        cache = None if past is None else past.cache
        found = self.model(inputs_embeds=x, past_key_values=cache, use_cache=past is not None)
        if past is not None:
            past.cache = found.past_key_values
        return found.last_hidden_state
