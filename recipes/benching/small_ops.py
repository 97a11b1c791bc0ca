"""Contests of the ops around the search: codebook statistics, k-means, entropy, packing, per-dimension codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benching.exact import judge_integers, judge_values
from benching.nearest import OURS, every_implementation
from benching.protocol import Contest, Contestant, Inputs, Run, Setting, Verdict, need
from mmtok.kernels import binary_codes
from mmtok.kernels.binary_codes import binary_entropy, pack_bits, unpack_bits
from mmtok.kernels.codebook_stats import codebook_stats
from mmtok.quantizers import FiniteScalarQuantizer, build_quantizer
from mmtok.quantizers.codebook import KMEANS_STEPS, kmeans

# ---- statistics of a codebook


def statistics_contest(shape: tuple[int, int, int], setting: Setting) -> Contest:
    N, D, K = shape

    def inputs(g: torch.Generator) -> Inputs:
        z = torch.randn(N, D, generator=g, device=setting.device)
        return z, torch.randint(K, (N,), generator=g, device=setting.device)

    def judge(inputs: Inputs, out: Sequence[Tensor]) -> Verdict:
        z, codes = inputs
        sums = torch.zeros(K, D, dtype=torch.float64, device=z.device).index_add_(0, codes, z.double())
        return judge_values([torch.bincount(codes, minlength=K), sums], list(out), 1e-5)

    def ours(z: Tensor, codes: Tensor) -> Any:
        return codebook_stats(z, codes, K)

    def one_hot(z: Tensor, codes: Tensor) -> Any:
        assigned = F.one_hot(codes, K).to(z.dtype)  # (N, K)
        return assigned.sum(0), assigned.T @ z

    def index_add(z: Tensor, codes: Tensor) -> Any:
        return torch.bincount(codes, minlength=K), z.new_zeros(K, D).index_add_(0, codes, z)

    contestants = every_implementation(ours, inputs(setting.generator()), judge)
    contestants += [
        Contestant("one-hot matmul", lambda: one_hot, judge),
        Contestant("bincount+index_add", lambda: index_add, judge),
    ]
    moved = 4.0 * (N * D + K * D + K) + 8.0 * N
    return Contest("statistics", f"{N}x{D}x{K}", inputs, contestants, moved=moved, items="")


def kmeans_contest(N: int, D: int, K: int, setting: Setting) -> Contest:
    """Checked by the mean squared error of the result, which depends on the random start by a percent or so."""
    reached: list[float] = []

    def error(rows: Tensor, centroids: Tensor) -> float:
        parts = [torch.cdist(part, centroids.double()).amin(1).square() for part in rows.double().split(1024)]
        return float(torch.cat(parts).mean())

    def judge(inputs: Inputs, centroids: Tensor) -> Verdict:
        rows = inputs[0]
        if not reached:
            start = rows[torch.randperm(N, generator=setting.generator(6), device=rows.device)[:K]]
            for _ in range(KMEANS_STEPS):  # Lloyd's steps as they are written in books
                codes = torch.cdist(rows, start).argmin(1)
                sums = torch.zeros_like(start).index_add_(0, codes, rows)
                counts = torch.bincount(codes, minlength=K)[:, None]
                start = torch.where(counts > 0, sums / counts.clamp_min(1), start)
            reached.append(error(rows, start))
        found = error(rows, centroids.reshape(K, D))
        ok = found <= 1.05 * reached[0]
        return Verdict(ok, f"error {found:.4f}, plain Lloyd's {reached[0]:.4f}")

    def theirs() -> Run:
        function = need("vector_quantize_pytorch.vector_quantize_pytorch").kmeans
        return lambda rows: function(rows[None], K, KMEANS_STEPS)[0]

    return Contest(
        "kmeans",
        f"{N}x{D}x{K} {KMEANS_STEPS} steps",
        lambda g: (torch.randn(N, D, generator=g, device=setting.device),),
        [
            Contestant(OURS, lambda: lambda rows: kmeans(rows, K, "euclidean")[0], judge, ours=True),
            Contestant("vector-quantize-pytorch", theirs, judge),
        ],
        flops=2.0 * N * D * K * KMEANS_STEPS,
        items="",
    )


# ---- entropy over all codes of D bits


def all_signs(D: int, device: torch.device) -> Tensor:
    """(2^D, D) of 0 and 1."""
    return (torch.arange(2**D, device=device)[:, None] >> torch.arange(D, device=device) & 1).float()


def naive_entropy(D: int, device: torch.device) -> Run:
    """Softmax over all 2^D codes for every row, then both entropies."""
    table = all_signs(D, device).T.contiguous()

    def run(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (logits @ table).log_softmax(1)  # (N, 2^D)
        p = log_p.exp()
        mean = p.mean(0)
        return -(p * log_p).sum(1).mean(), -(mean * mean.clamp_min(1e-37).log()).sum()

    return run


def entropy64(logits: Tensor, gradient: bool = False) -> list[Tensor]:
    """Both entropies in fp64, and if asked the gradient of (first - second); the codes go by in blocks."""
    x, D = logits.detach().double().requires_grad_(gradient), logits.shape[1]
    table = all_signs(D, x.device).double()
    total = x.new_zeros(())
    with torch.set_grad_enabled(gradient):
        sample = (F.softplus(-x.abs()) + x.abs() * torch.sigmoid(-x.abs())).sum(1).mean()
        if gradient:
            sample.backward()
        for block in table.split(max(64, (1 << 24) // len(x))):
            log_p = F.logsigmoid(x) @ block.T + F.logsigmoid(-x) @ (1 - block).T
            part = torch.special.entr(log_p.exp().mean(0)).sum()
            if gradient:
                (-part).backward()  # now, so that only one block is held
            total += part.detach()
    return [sample.detach(), total, *([] if x.grad is None else [x.grad])]


def entropy_contest(N: int, D: int, backward: bool, setting: Setting) -> Contest:
    def with_gradient(run: Run) -> Run:
        def both(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            leaf = logits.detach().requires_grad_()
            sample, codebook = run(leaf)
            (gradient,) = torch.autograd.grad(sample - codebook, leaf)
            return sample.detach(), codebook.detach(), gradient

        return both

    def judge(inputs: Inputs, out: Sequence[Tensor]) -> Verdict:
        return judge_values(entropy64(inputs[0], backward), list(out), 1e-3 if backward else 1e-4)

    def theirs() -> Run:
        lfq = need("vector_quantize_pytorch").LFQ(dim=D, codebook_size=2**D).to(setting.device).train()

        def run(logits: Tensor) -> tuple[Tensor, Tensor]:
            # Its log-odds of a bit are 4 x inv_temperature; its bits run from the highest, which no entropy sees.
            parts = lfq(logits[None] / 4, inv_temperature=1.0, return_loss_breakdown=True)[1]
            return parts.per_sample_entropy, parts.batch_entropy

        return run

    wrap = with_gradient if backward else lambda run: run
    few = (setting.randn(2, D),)
    contestants = every_implementation(wrap(binary_entropy), few, judge)
    contestants += [
        Contestant("softmax over 2^D", lambda: wrap(naive_entropy(D, setting.device)), judge),
        Contestant("vector-quantize-pytorch LFQ", lambda: wrap(theirs()), judge),
    ]
    return Contest(
        "entropy-backward" if backward else "entropy",
        f"N{N} D{D}",
        lambda g: (2 * torch.randn(N, D, generator=g, device=setting.device),),
        contestants,
        flops=2.0 * N * 2**D * (3 if backward else 1),
        gradient=backward,
        items="",
    )


# ---- packing


def binary_pack_contest(N: int, D: int, setting: Setting) -> Contest:
    """Numbers (1, N, D) to codes: bit k is [x_k > 0]. vector-quantize-pytorch puts the first bit highest."""

    def judge_order(highest_first: bool) -> Callable[[Inputs, Any], Verdict]:
        def judge(inputs: Inputs, codes: Tensor) -> Verdict:
            weights = 2 ** torch.arange(D, device=codes.device)
            weights = weights.flip(0) if highest_first else weights
            return judge_integers(((inputs[0][0] > 0).long() * weights).sum(1), codes)

        return judge

    def ours(x: Tensor) -> Tensor:
        return pack_bits(x > 0)

    def weighted(x: Tensor) -> Tensor:
        return torch.where(x > 0, weights, zero).sum(-1)

    def theirs() -> Run:
        lfq = need("vector_quantize_pytorch").LFQ(dim=D, codebook_size=2**D).to(setting.device).eval()
        return lambda x: lfq(x).indices

    weights, zero = 2 ** torch.arange(D, device=setting.device), torch.zeros((), dtype=torch.int64).to(setting.device)
    judge = judge_order(False)
    contestants = every_implementation(ours, (setting.randn(1, 2, D),), judge)
    fused = getattr(binary_codes, "sign_pack", None)  # comparison and packing in one call, where this version has it
    if fused is not None:
        contestants.insert(0, Contestant("mmtok sign_pack", lambda: lambda x: fused(x[0], D), judge, ours=True))
    contestants += [
        Contestant("where+sum", lambda: weighted, judge),
        Contestant("vector-quantize-pytorch LFQ, eval", theirs, judge_order(True)),
    ]
    return Contest(
        "binary-pack",
        f"N{N} D{D}",
        lambda g: (torch.randn(1, N, D, generator=g, device=setting.device),),
        contestants,
        moved=4.0 * N * D + 8.0 * N,
    )


def binary_unpack_contest(N: int, D: int, setting: Setting) -> Contest:
    """Codes (1, N) to values -1 and 1 (1, N, D)."""

    def judge_order(highest_first: bool) -> Callable[[Inputs, Any], Verdict]:
        def judge(inputs: Inputs, out: Tensor) -> Verdict:
            bits = inputs[0][0, :, None] >> torch.arange(D, device=out.device) & 1
            bits = bits.flip(1) if highest_first else bits
            return judge_values([2.0 * bits - 1], [out.reshape(N, D)], 0.0)

        return judge

    def ours(codes: Tensor) -> Tensor:
        return 2.0 * unpack_bits(codes, D) - 1.0

    def theirs() -> Run:
        lfq = need("vector_quantize_pytorch").LFQ(dim=D, codebook_size=2**D).to(setting.device).eval()
        return lfq.indices_to_codes

    judge = judge_order(False)
    codes = torch.zeros(1, 2, dtype=torch.int64, device=setting.device)
    contestants = every_implementation(ours, (codes,), judge)
    contestants += [Contestant("vector-quantize-pytorch LFQ", theirs, judge_order(True))]
    return Contest(
        "binary-unpack",
        f"N{N} D{D}",
        lambda g: (torch.randint(2**D, (1, N), generator=g, device=setting.device),),
        contestants,
        moved=4.0 * N * D + 8.0 * N,
        items="",
    )


LEVELS = (8, 5, 5, 5)


def fsq_digits(x: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """x (N, d) fp32 -> codes (N,) by the equation in fp64, and which rows lie within rounding of a decision."""
    n = torch.tensor(LEVELS, dtype=torch.float64, device=x.device)
    half, offset = (n - 1) * (1 + margin) / 2, torch.where(n % 2 == 0, 0.5, 0.0)
    bounded = torch.tanh(x.double() + torch.atanh(offset / half)) * half - offset
    digits = bounded.round().long() + (n // 2).long()
    weights = torch.tensor([math.prod(LEVELS[:i]) for i in range(len(LEVELS))], device=x.device)
    doubtful = ((bounded - bounded.floor() - 0.5).abs() < 1e-5).any(1)
    return (digits * weights).sum(1), doubtful


def fsq_contest(N: int, setting: Setting) -> Contest:
    """The two libraries bound their numbers by margins of opposite sign; each is checked by its own equation."""

    def judge_margin(margin: float) -> Callable[[Inputs, Any], Verdict]:
        return lambda inputs, codes: judge_integers(*_swap(fsq_digits(inputs[0][0], margin), codes))

    def theirs() -> Run:
        fsq = need("vector_quantize_pytorch").FSQ(levels=list(LEVELS)).to(setting.device).eval()
        return lambda x: fsq(x)[1]

    ours = FiniteScalarQuantizer(len(LEVELS), LEVELS).to(setting.device).eval()
    contestants = [
        Contestant("mmtok module, encode", lambda: ours.encode, judge_margin(-1e-3), ours=True),
        Contestant("mmtok module, eval forward", lambda: lambda x: ours(x).codes, judge_margin(-1e-3), ours=True),
        Contestant("vector-quantize-pytorch FSQ, eval", theirs, judge_margin(1e-3)),
    ]
    return Contest(
        "fsq-pack",
        f"N{N} levels {','.join(map(str, LEVELS))}",
        lambda g: (torch.randn(1, N, len(LEVELS), generator=g, device=setting.device),),
        contestants,
        moved=4.0 * N * len(LEVELS) + 8.0 * N,
    )


def _swap(expected: tuple[Tensor, Tensor], codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return expected[0], codes, expected[1]


def fsq_decode_contest(N: int, setting: Setting) -> Contest:
    """Inputs: codes (1, 1, N), and the same as (1, N)."""

    def inputs(g: torch.Generator) -> Inputs:
        codes = torch.randint(math.prod(LEVELS), (1, 1, N), generator=g, device=setting.device)
        return codes, codes[:, 0].clone()

    def judge(inputs: Inputs, out: Tensor) -> Verdict:
        rest, columns = inputs[1][0], []
        for size in LEVELS:
            columns.append((rest % size - size // 2).double() / (size // 2))
            rest = rest // size
        return judge_values([torch.stack(columns, 1)], [out.reshape(N, len(LEVELS))], 1e-6)

    def theirs() -> Run:
        fsq = need("vector_quantize_pytorch").FSQ(levels=list(LEVELS)).to(setting.device).eval()
        return lambda _, codes: fsq.indices_to_codes(codes)

    ours = FiniteScalarQuantizer(len(LEVELS), LEVELS).to(setting.device).eval()
    contestants = [
        Contestant("mmtok module, decode", lambda: lambda codes, _: ours.decode(codes), judge, ours=True),
        Contestant("vector-quantize-pytorch FSQ", theirs, judge),
    ]
    moved = 4.0 * N * len(LEVELS) + 8.0 * N
    shape = f"N{N} levels {','.join(map(str, LEVELS))}"
    return Contest("fsq-decode", shape, inputs, contestants, moved=moved, items="")


def per_dimension_contest(N: int, D: int, bits: int, setting: Setting) -> Contest | None:
    """Each of D numbers to the nearest of 2^bits levels; None where this version has no such quantizer."""
    try:
        ours = build_quantizer({"type": "per_dimension", "dim": D, "bits": bits}).to(setting.device).eval()
    except ValueError:
        return None
    K = 2**bits
    every = torch.arange(K, device=setting.device).expand(1, D, K)  # (B, Q = D, T = K)
    levels = ours.decode(every)[0, :, 0]  # (K,): without statistics all dimensions have the same levels

    def judge(inputs: Inputs, codes: Tensor) -> Verdict:
        distance = (inputs[0][0, :, :, None].double() - levels.double()).abs()  # (N, D, K)
        two = distance.topk(2, largest=False).values
        return judge_integers(distance.min(2).indices, codes, two[..., 1] - two[..., 0] < 1e-6)

    middles = (levels[1:] + levels[:-1]) / 2
    contestants = [
        Contestant("mmtok module, encode", lambda: ours.encode, lambda i, c: judge(i, c[0].T), ours=True),
        Contestant("bucketize of midpoints", lambda: lambda x: torch.bucketize(x[0], middles), judge),
        Contestant("|x - level| argmin", lambda: lambda x: (x[0, ..., None] - levels).abs().argmin(-1), judge),
    ]
    return Contest(
        "per-dimension",
        f"{N}x{D} {K} levels",
        lambda g: (torch.randn(1, N, D, generator=g, device=setting.device),),
        contestants,
        moved=12.0 * N * D,
    )


def contests(setting: Setting) -> Iterator[tuple[str, Callable[[], Contest | None]]]:
    """Names and builders; a builder gives None where this version lacks the op."""
    on_cuda, smoke = setting.device.type == "cuda", setting.smoke
    shapes = ((12800, 128, 1024), (4096, 16, 8192), (4096, 256, 16384))
    shapes = ((40, 4, 16),) if smoke else (*shapes, (65536, 256, 16384)) if on_cuda else shapes
    for s in shapes:
        yield "statistics/{}x{}x{}".format(*s), lambda s=s: statistics_contest(s, setting)
    N, D, K = (200, 4, 16) if smoke else (12800, 128, 1024)
    yield f"kmeans/{N}x{D}x{K} {KMEANS_STEPS} steps", lambda: kmeans_contest(N, D, K, setting)
    for n, d in ((9, 6),) if smoke else ((256, 18), (65536, 18)) if on_cuda else ((256, 18),):
        yield f"entropy/N{n} D{d}", lambda n=n, d=d: entropy_contest(n, d, False, setting)
        yield f"entropy-backward/N{n} D{d}", lambda n=n, d=d: entropy_contest(n, d, True, setting)
    n, bits = (50, 6) if smoke else (65536, 18)
    yield f"binary-pack/N{n} D{bits}", lambda: binary_pack_contest(n, bits, setting)
    yield f"binary-unpack/N{n} D{bits}", lambda: binary_unpack_contest(n, bits, setting)
    shape = f"N{n} levels {','.join(map(str, LEVELS))}"
    yield f"fsq-pack/{shape}", lambda: fsq_contest(n, setting)
    yield f"fsq-decode/{shape}", lambda: fsq_decode_contest(n, setting)
    yield f"per-dimension/{n}x16 16 levels", lambda: per_dimension_contest(n, 16, 4, setting)
