"""Contests of residual chains: plain RVQ, its decode, streaming latency, and DAC's factorised chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benching.exact import Answer, chain_answer, factorised_answer, judge_codes, judge_values
from benching.nearest import every_implementation
from benching.protocol import Contest, Contestant, Inputs, Run, Setting, Verdict, need
from mmtok.kernels.residual_codes import residual_codes, residual_decode
from mmtok.quantizers import ResidualVectorQuantizer

# N, D, K, Q
SHAPES_CPU = ((4096, 128, 1024, 8), (4096, 128, 1024, 32), (4096, 8, 1024, 12))
SHAPES_CUDA = ((102400, 128, 1024, 8), (102400, 128, 1024, 32), (102400, 8, 1024, 12))
SHAPES_SMOKE = ((30, 8, 32, 3),)
STREAMING = ((1, 8, 1024, 8), (1, 128, 1024, 8), (13, 8, 1024, 8), (13, 128, 1024, 8))
STREAMING_SMOKE = ((1, 8, 32, 3),)
# N, D, d, K, Q
DAC_CPU = ((4096, 1024, 8, 1024, 9), (1024, 1024, 8, 1024, 32))
DAC_SMOKE = ((20, 48, 8, 32, 3),)


def make_codebooks(setting: Setting, Q: int, K: int, D: int) -> Tensor:
    """(Q, K, D), each level finer than the one before, as trained chains are."""
    scale = 0.85 ** torch.arange(Q, device=setting.device)
    return setting.randn(Q, K, D, stream=12) * scale[:, None, None]


def naive_chain(codebooks: Tensor) -> Run:
    """addmm + argmin, lookup and subtraction at every level, on all rows at once."""
    transposed, norms = codebooks.mT.contiguous(), 0.5 * codebooks.square().sum(2)

    def run(z: Tensor) -> Tensor:
        residual, codes = z, []
        for q in range(len(codebooks)):
            codes.append(torch.addmm(norms[q], residual, transposed[q], alpha=-1).argmin(1))
            residual = residual - codebooks[q][codes[-1]]
        return torch.stack(codes, 1)

    return run


def our_chain(codebooks: Tensor) -> ResidualVectorQuantizer:
    Q, K, D = codebooks.shape
    rvq = ResidualVectorQuantizer(D, Q, K, kmeans_init=False, dead_code_threshold=0.0)
    with torch.no_grad():
        for book, codebook in zip(rvq.books, codebooks, strict=True):
            book.get_buffer("codebook").copy_(codebook)
    return rvq.to(codebooks.device).eval()


def their_chain(codebooks: Tensor) -> nn.Module:
    """vector-quantize-pytorch's ResidualVQ with its defaults."""
    module = need("vector_quantize_pytorch")
    Q, K, D = codebooks.shape
    rvq = module.ResidualVQ(dim=D, num_quantizers=Q, codebook_size=K, decay=0.99)
    for layer, codebook in zip(rvq.layers, codebooks, strict=True):
        layer.codebook = codebook.cpu()
    return rvq.to(codebooks.device).eval()


def encodec_chain(codebooks: Tensor) -> Any:
    """transformers' EncodecResidualVectorQuantizer."""
    module = need("transformers.models.encodec.modeling_encodec")
    Q, K, D = codebooks.shape
    config = SimpleNamespace(codebook_size=K, codebook_dim=D, frame_rate=75, num_quantizers=Q)
    rvq = module.EncodecResidualVectorQuantizer(config).to(codebooks.device).eval()
    for layer, codebook in zip(rvq.layers, codebooks, strict=True):
        layer.codebook.embed.copy_(codebook)
    return rvq


def encode_contest(shape: tuple[int, int, int, int], group: str, setting: Setting) -> Contest:
    """Inputs: the rows (N, D), and the same as (1, D, N), which is what EnCodec's quantizer takes."""
    N, D, K, Q = shape
    codebooks = make_codebooks(setting, Q, K, D)
    answers: list[Answer] = []

    def judge(inputs: Inputs, codes: Tensor) -> Verdict:
        if not answers:
            answers.append(chain_answer(inputs[0], codebooks))
        return judge_codes(answers[0], codes)

    def judge_levels_first(inputs: Inputs, codes: Tensor) -> Verdict:
        return judge(inputs, codes.reshape(Q, N).T)  # (1, Q, N) or (Q, 1, N)

    def inputs(g: torch.Generator) -> Inputs:
        z = torch.randn(N, D, generator=g, device=setting.device)
        return z, z.T[None].contiguous()

    def ours(z: Tensor, _: Tensor) -> Tensor:
        return residual_codes(z, codebooks)

    def module() -> Run:
        rvq = our_chain(codebooks)
        return lambda z, _: rvq.encode(z[None])

    def naive() -> Run:
        run = naive_chain(codebooks)
        return lambda z, _: run(z)

    def theirs() -> Run:
        rvq = their_chain(codebooks)
        return lambda z, _: rvq(z[None])[1]  # (1, N, Q)

    def encodec() -> Run:
        rvq = encodec_chain(codebooks)
        return lambda _, x: rvq.encode(x)

    few = inputs(setting.generator())
    contestants = every_implementation(ours, (few[0][:2], few[1]), judge)
    contestants += [
        Contestant("mmtok module, encode", module, judge_levels_first, ours=True),
        Contestant("addmm+argmin a level", naive, judge),
        Contestant("vector-quantize-pytorch, eval", theirs, judge),
        Contestant("transformers EnCodec", encodec, judge_levels_first),
    ]
    return Contest(
        group,
        f"{N}x{D}x{K} Q{Q}",
        inputs,
        contestants,
        flops=2.0 * N * D * K * Q,
        moved=4.0 * (N * D + Q * K * D) + 8.0 * N * Q,
        scanned=float(N * K * Q),
        items="rows",
    )


def decode_contest(shape: tuple[int, int, int, int], setting: Setting) -> Contest:
    """Inputs: codes (N, Q), and the same as (1, Q, N) and (Q, 1, N) for those who keep levels first."""
    N, D, K, Q = shape
    codebooks = make_codebooks(setting, Q, K, D)

    def judge(inputs: Inputs, out: Tensor) -> Verdict:
        expected = sum(c[k] for c, k in zip(codebooks.double(), inputs[0].T, strict=True))
        assert isinstance(expected, Tensor)
        return judge_values([expected], [out.reshape(N, D)], 1e-5)

    def judge_columns(inputs: Inputs, out: Tensor) -> Verdict:
        return judge(inputs, out.reshape(D, N).T)

    def inputs(g: torch.Generator) -> Inputs:
        codes = torch.randint(K, (N, Q), generator=g, device=setting.device)
        return codes, codes.T[None].contiguous(), codes.T[:, None].contiguous()

    def ours(codes: Tensor, _: Tensor, __: Tensor) -> Tensor:
        return residual_decode(codes, codebooks)

    def stacked(codes: Tensor, _: Tensor, __: Tensor) -> Tensor:
        return torch.stack([c[k] for c, k in zip(codebooks, codes.T, strict=True)]).sum(0)

    def loop(codes: Tensor, _: Tensor, __: Tensor) -> Tensor:
        out = codebooks[0][codes[:, 0]]
        for q in range(1, Q):
            out += codebooks[q][codes[:, q]]
        return out

    def module() -> Run:
        rvq = our_chain(codebooks)
        return lambda _, codes, __: rvq.decode(codes)

    def theirs() -> Run:
        rvq: Any = their_chain(codebooks)
        return lambda codes, _, __: rvq.get_output_from_indices(codes[None])

    def encodec() -> Run:
        rvq = encodec_chain(codebooks)
        return lambda _, __, codes: rvq.decode(codes)  # (1, D, N)

    contestants = every_implementation(ours, inputs(setting.generator()), judge)
    contestants += [
        Contestant("mmtok module, decode", module, judge, ours=True),
        Contestant("stack+sum", lambda: stacked, judge),
        Contestant("loop of additions", lambda: loop, judge),
        Contestant("vector-quantize-pytorch", theirs, judge),
        Contestant("transformers EnCodec", encodec, judge_columns),
    ]
    moved = 4.0 * N * D * (Q + 1) + 8.0 * N * Q
    return Contest("rvq-decode", f"{N}x{D}x{K} Q{Q}", inputs, contestants, moved=moved, items="rows")


class DacPair:
    """transformers' DacResidualVectorQuantizer with random weights, and ours with the same ones."""

    def __init__(self, shape: tuple[int, int, int, int, int], setting: Setting) -> None:
        self.N, self.D, self.d, self.K, self.Q = shape
        module = need("transformers.models.dac.modeling_dac")
        config = SimpleNamespace(
            hidden_size=self.D, codebook_dim=self.d, codebook_size=self.K, n_codebooks=self.Q, quantizer_dropout=0.0
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            self.theirs = module.DacResidualVectorQuantizer(config).to(setting.device).eval()
        self.ours = ResidualVectorQuantizer(
            self.D, self.Q, self.K, self.d, "cosine", "gradient", kmeans_init=False, dead_code_threshold=0.0
        )
        levels = self.theirs.quantizers
        weights = {}
        for q, level in enumerate(levels):
            weights[f"books.{q}.codebook"] = level.codebook.weight
            for mine, conv in (("project_in", level.in_proj), ("project_out", level.out_proj)):
                weights |= {f"{mine}.{q}.weight": conv.weight[:, :, 0], f"{mine}.{q}.bias": conv.bias}
        missing = self.ours.load_state_dict(weights, strict=False)
        assert not missing.unexpected_keys, missing.unexpected_keys
        self.ours = self.ours.to(setting.device).eval()
        self.into = [(p.in_proj.weight[:, :, 0], p.in_proj.bias) for p in levels]
        self.out = [(p.out_proj.weight[:, :, 0], p.out_proj.bias) for p in levels]
        self.codebooks = torch.stack([p.codebook.weight for p in levels])


def dac_encode_contest(shape: tuple[int, int, int, int, int], setting: Setting) -> Contest:
    """Inputs: z (1, N, D), and the same as (1, D, N), which is what DAC's quantizer takes."""
    pair = DacPair(shape, setting)
    N, D, d, K, Q = shape
    answers: list[Answer] = []
    their_codes: list[Tensor] = []

    def inputs(g: torch.Generator) -> Inputs:
        z = torch.randn(1, N, D, generator=g, device=setting.device)
        return z, z.mT.contiguous()

    def judge(inputs: Inputs, codes: Tensor) -> Verdict:
        if not answers:
            answers.append(factorised_answer(inputs[0][0], pair.into, pair.codebooks, pair.out))
            their_codes.append(pair.theirs(inputs[1])[1])
        verdict = judge_codes(answers[0], codes[0].T)
        other = int((codes != their_codes[0]).any(1).sum())
        note = verdict.note or f"{other} of {N} frames have other codes than transformers'"
        return dataclasses.replace(verdict, note=note)

    def judge_theirs(inputs: Inputs, codes: Tensor) -> Verdict:
        return dataclasses.replace(judge(inputs, codes), note="")

    contestants = [
        Contestant("mmtok module, encode", lambda: lambda z, _: pair.ours.encode(z), judge, ours=True),
        Contestant("mmtok module, forward", lambda: lambda z, _: pair.ours(z).codes, judge, ours=True),
        Contestant("transformers DAC, forward", lambda: lambda _, x: pair.theirs(x)[1], judge_theirs),
    ]
    return Contest(
        "dac",
        f"N{N} {D}-{d}-{D} K{K} Q{Q}",
        inputs,
        contestants,
        flops=2.0 * N * d * Q * (D + K),
        moved=4.0 * N * D + 8.0 * N * Q,
        scanned=float(N * K * Q),
        items="frames",
        note="transformers has no call for codes alone: its forward also decodes and computes losses.",
    )


def dac_decode_contest(shape: tuple[int, int, int, int, int], setting: Setting) -> Contest:
    pair = DacPair(shape, setting)
    N, D, d, K, Q = shape

    def inputs(g: torch.Generator) -> Inputs:
        return (torch.randint(K, (1, Q, N), generator=g, device=setting.device),)

    def judge(inputs: Inputs, out: Tensor) -> Verdict:
        expected = torch.zeros(N, D, dtype=torch.float64, device=setting.device)
        for codebook, (weight, bias), k in zip(pair.codebooks, pair.out, inputs[0][0], strict=True):
            expected += codebook.double()[k] @ weight.double().T + bias.double()
        return judge_values([expected], [out], 1e-5)

    def judge_columns(inputs: Inputs, out: Tensor) -> Verdict:
        return judge(inputs, out[0].T)

    contestants = [
        Contestant("mmtok module, decode", lambda: pair.ours.decode, lambda i, out: judge(i, out[0]), ours=True),
        Contestant("transformers DAC, from_codes", lambda: lambda c: pair.theirs.from_codes(c)[0], judge_columns),
    ]
    moved = 4.0 * N * D + 8.0 * N * Q
    return Contest("dac-decode", f"N{N} {D}-{d}-{D} K{K} Q{Q}", inputs, contestants, moved=moved, items="rows")


def contests(setting: Setting) -> Iterator[tuple[str, Callable[[], Contest]]]:
    shapes = SHAPES_SMOKE if setting.smoke else SHAPES_CUDA if setting.device.type == "cuda" else SHAPES_CPU
    for group, chosen in (("rvq", shapes), ("streaming", STREAMING_SMOKE if setting.smoke else STREAMING)):
        for s in chosen:
            name = f"{group}/{s[0]}x{s[1]}x{s[2]} Q{s[3]}"
            yield name, lambda s=s, group=group: encode_contest(s, group, setting)
    for s in shapes:
        yield f"rvq-decode/{s[0]}x{s[1]}x{s[2]} Q{s[3]}", lambda s=s: decode_contest(s, setting)
    for s in DAC_SMOKE if setting.smoke else DAC_CPU:
        shape = f"N{s[0]} {s[1]}-{s[2]}-{s[1]} K{s[3]} Q{s[4]}"
        yield f"dac/{shape}", lambda s=s: dac_encode_contest(s, setting)
        yield f"dac-decode/{shape}", lambda s=s: dac_decode_contest(s, setting)
