"""Choosing patches and merging the rest into them: selector and merger of LaVIT (arXiv 2309.04669, section 3.1).

A selector gives each patch feature a probability to be kept. The merger then runs over the kept patches only: each
attends to the kept ones before it and reads the dropped ones, so that little is lost with them.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.layers.transformer import attend

NORM_EPS = 1e-5


class TokenPredictor(nn.Module):
    """Log-probabilities of keeping and of dropping each patch, from its own feature and the picture's mean.

    Half of the channels stay those of the patch, the other half is averaged over the picture. Always float32.

    Args:
        dim: D, a multiple of 4.
    """

    def __init__(self, dim: int):
        super().__init__()
        if dim % 4:
            raise ValueError(f"dim: expected a multiple of 4, got {dim}")
        self.first = nn.Sequential(nn.LayerNorm(dim, NORM_EPS), nn.Linear(dim, dim), nn.GELU())
        self.last = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )
        self.apply(small_start)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, 2) float32 log-probabilities: index 0 keeps the patch, index 1 drops it."""
        with torch.autocast(x.device.type, enabled=False):
            local, overall = self.first(x.float()).chunk(2, -1)
            overall = overall.mean(1, keepdim=True).expand_as(local)
            return self.last(torch.cat([local, overall], -1)).log_softmax(-1)


def small_start(module: nn.Module) -> None:
    """Start of every Linear: normal of deviation .02 cut at 2, bias 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@dataclasses.dataclass
class Policy:
    """Which keys count for which queries; weights are 0 or 1 in value, and may carry a gradient.

    Args:
        weight: (B, 1, R or 1, K) float, 0 where a key must not be read.
        exists: (B, 1, 1, K) bool, false at padding.
        eps, total: of `policy_softmax`.
    """

    weight: Tensor
    exists: Tensor
    eps: float = 0.0
    total: int = 1


def policy_softmax(scores: Tensor, policy: Policy) -> Tensor:
    """Softmax of (B, heads, R, K) over the keys that the policy lets through, float32; differentiable in its weights.

    With ``eps = 0`` a masked softmax, in which a query without any key reads nothing. Where its weight is 0 but has a
    gradient, a key counts there at most as much as the strongest key let through. With ``eps > 0`` the form that
    LaVIT's weights were trained with: p = (e w + eps / N) / (sum of e w + eps), N = ``total``, e = exp(score - the
    highest score of all keys that exist, read or not); a query without any key reads the mean of all.
    """
    scores = scores.float()
    compared = policy.exists if policy.eps else policy.weight > 0
    highest = scores.detach().masked_fill(~compared, -torch.inf).amax(-1, keepdim=True)
    highest = torch.where(highest.isfinite(), highest, 0.0)
    mass = (scores - highest).clamp(max=0).exp() * policy.weight
    total = mass.sum(-1, keepdim=True)
    if policy.eps:
        return (mass + policy.exists * (policy.eps / policy.total)) / (total + policy.eps)
    return mass / total.clamp_min(1.0)  # the highest contributes 1, unless no key is read


def key_bias(weight: Tensor) -> Tensor:
    """To add to scores for a softmax over the keys whose weight is 1; the cheap form of `policy_softmax` for eps = 0.

    Exact in value and in the gradient to weights of value 1: the softmax of e w has the same slope in w = 1 as in
    log w = 0. Weights of value 0 get no gradient, so it is for keys that are padding or later in the sequence.
    """
    return torch.where(weight > 0, weight - weight.detach(), -1e4)


class PolicyAttention(nn.Module):
    """Multi-head attention with biases; from x to itself, or to a context.

    Args:
        dim: D. num_heads: of width dim / num_heads.
        cross: whether keys and values come from a context.
    """

    def __init__(self, dim: int, num_heads: int, cross: bool = False):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads {num_heads}, got {dim}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim) if cross else None
        self.key_value = nn.Linear(dim, 2 * dim) if cross else None
        self.qkv = None if cross else nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, policy: Policy | Tensor | None = None) -> Tensor:
        """x (B, R, D), context (B, K, D) -> (B, R, D); a policy or a `key_bias` says what is read, None = all keys."""
        B, R, D = x.shape
        if self.query is not None and self.key_value is not None and context is not None:
            parts = (self.query(x), *self.key_value(context).chunk(2, -1))
        elif self.qkv is not None:
            parts = self.qkv(x).chunk(3, -1)
        else:
            raise ValueError("context: expected (B, K, D) features for cross-attention, got None; pass the context")
        q, k, v = (p.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for p in parts)  # (B, heads, ., D / heads)
        if policy is None:
            y = attend(q, k, v)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            if isinstance(policy, Policy):
                shares = policy_softmax(scores, policy).to(v.dtype)
            else:
                shares = (scores + policy.to(scores.dtype)).softmax(-1)
            y = shares @ v
        return self.proj(y.transpose(1, 2).reshape(B, R, D))


class FuserBlock(nn.Module):
    """Pre-norm: x + self-attention, x + cross-attention to a context, x + GELU MLP.

    With a causal self-policy it is LaVIT's merger block, without one the block of its feature decoder.

    Args:
        dim: D. num_heads: of both attentions. mlp_ratio: hidden width over D.
        cross: whether there is a cross-attention at all.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, cross: bool = True):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm0 = nn.LayerNorm(dim, NORM_EPS)
        self.self_attn = PolicyAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim, NORM_EPS) if cross else None
        self.cross_attn = PolicyAttention(dim, num_heads, cross=True) if cross else None
        self.norm2 = nn.LayerNorm(dim, NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        own: Policy | Tensor | None = None,
        other: Policy | Tensor | None = None,
    ) -> Tensor:
        """x (B, R, D), context (B, K, D); ``own`` rules the self-attention, ``other`` that to the context."""
        x = x + self.self_attn(self.norm0(x), policy=own)
        if self.norm1 is not None and self.cross_attn is not None:
            x = x + self.cross_attn(self.norm1(x), context, other)
        return x + self.mlp(self.norm2(x))


class TokenMerger(nn.Module):
    """Kept patches, each enriched by the kept ones before it and by all dropped ones (a stack of `FuserBlock`).

    The original runs all N patches and throws the dropped rows away. As kept rows never read dropped rows, only the raw
    features there, running the kept rows alone gives the same up to ``policy_eps``, in about ``kept / N`` of the time.

    Args:
        dim: D. num_heads, depth, mlp_ratio: of the blocks.
        policy_eps: see `policy_softmax`; 1e-6 for the released weights.
        cross: whether dropped patches are read; useless where nothing is dropped.
    """

    def __init__(
        self, dim: int, num_heads: int, depth: int, mlp_ratio: float, policy_eps: float = 0.0, cross: bool = True
    ):
        super().__init__()
        self.policy_eps, self.cross = policy_eps, cross
        self.blocks = nn.ModuleList(FuserBlock(dim, num_heads, mlp_ratio, cross) for _ in range(depth))
        self.context_norm = nn.LayerNorm(dim, NORM_EPS) if cross else None
        self.norm = nn.LayerNorm(dim, NORM_EPS)
        self.apply(small_start)

    def forward(self, x: Tensor, keep: Tensor, full_length: bool = False) -> tuple[Tensor, Tensor]:
        """Merge.

        Args:
            x: (B, N, D) features of all patches in raster order.
            keep: (B, N) bool, or float of value 0 or 1 whose gradient says what keeping a patch would change; at
                least one patch an item.
            full_length: run all N rows as the original does; dearer, and with a gradient that also sees what dropped
                patches would have told as kept ones.

        Returns:
            merged (B, R, D), R the largest number of kept patches, in raster order; and present (B, R) float, of value
            1 at kept patches and 0 at padding, with the gradient of ``keep``.
        """
        N = x.shape[1]
        order, present = kept_order(keep)
        context = None if self.context_norm is None else self.context_norm(x)
        dropped = 1 - keep.float()
        everything = torch.ones_like(dropped, dtype=torch.bool)[:, None, None]
        other = Policy(dropped[:, None, None], everything, self.policy_eps, N)
        rows = torch.arange(N, device=x.device).expand(len(x), N) if full_length else order
        weight = causal_weight(keep.float() if full_length else present)
        if full_length or self.policy_eps:
            exists = everything if full_length else present[:, None, None] > 0
            own = Policy(weight, exists, self.policy_eps, N)
        else:
            own = key_bias(weight)
        h = pick(x, rows)
        for block in self.blocks:
            h = block(h, context, own, other)
        h = self.norm(h)
        return (pick(h, order) if full_length else h), present


def kept_order(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Where the kept patches of (B, N) stand: (B, R) int64 in raster order, and `keep` there; 0 at padding."""
    hard = keep > 0.5
    counts = hard.sum(1)
    if bool((counts == 0).any()):
        item = int((counts == 0).nonzero()[0])
        raise ValueError(f"keep: expected at least one kept patch an item, got none at item {item}; keep the likeliest")
    R = int(counts.max())
    order = (~hard).to(torch.int8).argsort(dim=1, stable=True)[:, :R]
    inside = torch.arange(R, device=keep.device) < counts[:, None]
    return order, torch.where(inside, keep.float().gather(1, order), 0.0)


def causal_weight(weight: Tensor) -> Tensor:
    """(B, R) -> (B, 1, R, R): query i reads keys j < i as far as ``weight`` lets them through, and always itself."""
    R = weight.shape[1]
    before = torch.ones(R, R, dtype=torch.bool, device=weight.device).tril(-1)
    itself = torch.eye(R, dtype=weight.dtype, device=weight.device)
    return weight[:, None, None] * before + itself


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, R) of x (B, N, D) -> (B, R, D)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


def hard_keep(log_probs: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Draw which patches to keep by the Gumbel-max rule, with the straight-through gradient of its softmax.

    Hard Gumbel-softmax over two classes (arXiv 1611.01144): a patch is kept with its predicted probability, whatever
    the temperature, which only shapes the gradient.

    Args:
        log_probs: (B, N, 2), index 0 = keep.
        temperature: of the softmax, > 0.
        uniform: (B or 1, N, 2) numbers drawn from [0, 1).

    Returns:
        (B, N) float of value 0 or 1.
    """
    gumbel = -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()
    soft = F.softmax((log_probs + gumbel) / temperature, -1)[..., 0]
    return (soft > 0.5).float() + (soft - soft.detach())
