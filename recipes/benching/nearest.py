"""Contests of nearest code: speed at the shapes of real codebooks, and exactness on the data that breaks formulas."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benching.exact import Answer, answer, judge_codes
from benching.protocol import Contest, Contestant, Inputs, Run, Setting, UnavailableError, Verdict, explain, need
from mmtok.kernels import dispatch
from mmtok.kernels.nearest_code import nearest_code
from mmtok.quantizers import VectorQuantizer

SHAPES_CPU = (
    (12800, 8, 1024),
    (12800, 128, 1024),
    (12800, 256, 1024),
    (65536, 8, 1024),
    (8192, 16, 8192),
    (4096, 8, 16384),
    (2048, 256, 16384),
    (1024, 16, 65536),
    (256, 16, 262144),
)
SHAPES_CUDA = (
    (102400, 8, 1024),
    (102400, 128, 1024),
    (102400, 256, 1024),
    (65536, 8, 8192),
    (65536, 256, 16384),
    (65536, 16, 65536),
    (65536, 16, 262144),
)
SHAPES_SMOKE = ((70, 8, 64), (40, 20, 33))
OURS = "mmtok"


def implementations(call: Callable[[], object]) -> list[str]:
    """Names under which `dispatch.force` runs ``call`` here; not the reference, which loops over rows in Python."""
    found = []
    for name in dispatch.IMPLEMENTATIONS:
        if name == "reference":
            continue
        with contextlib.suppress(ValueError, ImportError), dispatch.force(name):
            call()
            found.append(name)
    return found


def forced(name: str, run: Run) -> Run:
    def under_force(*inputs: Tensor) -> Any:
        with dispatch.force(name):
            return run(*inputs)

    return under_force


def every_implementation(run: Run, inputs: Inputs, judge: Callable[[Inputs, Any], Verdict]) -> list[Contestant]:
    """Ours as a user calls it, then each implementation by force; ``inputs`` only serve to see which there are."""
    names = implementations(lambda: run(*inputs))
    ours = [Contestant(OURS, lambda: run, judge, ours=True)]
    return ours + [Contestant(f"{OURS} ({n})", lambda n=n: forced(n, run), judge, ours=True) for n in names]


# ---- the competitors' ways


def addmm_argmin(codebook: Tensor) -> Run:
    """|c|^2 / 2 - x.c written out whole, then argmin: what one writes by hand."""
    transposed, norms = codebook.T.contiguous(), 0.5 * codebook.square().sum(1)
    return lambda z: torch.addmm(norms, z, transposed, alpha=-1).argmin(1)


def cdist_argmin(codebook: Tensor) -> Run:
    return lambda z: torch.cdist(z, codebook).argmin(1)


def compiled_argmin(codebook: Tensor) -> Run:
    if codebook.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise UnavailableError("torch.compile needs a C++ compiler, and there is no g++ here")
    torch._dynamo.reset()  # else the ninth shape exceeds the recompile limit and runs uncompiled
    run = torch.compile(addmm_argmin(codebook), dynamic=False)

    def explained(z: Tensor) -> Tensor:
        try:
            return run(z)
        except Exception as e:
            raise UnavailableError(f"torch.compile does not work here: {explain(e)}") from e

    return explained


def vector_quantize(codebook: Tensor, training: bool, cosine: bool = False) -> Run:
    """vector-quantize-pytorch, whole forward with its defaults (it has no call that gives codes only)."""
    module = need("vector_quantize_pytorch")
    K, D = codebook.shape
    vq = module.VectorQuantize(dim=D, codebook_size=K, decay=0.99, use_cosine_sim=cosine).to(codebook.device)
    vq.codebook = F.normalize(codebook, dim=1) if cosine else codebook
    vq.train(training)
    return lambda z: vq(z[None])[1]


def encodec_codes(codebook: Tensor) -> Run:
    """transformers' EncodecEuclideanCodebook."""
    module = need("transformers.models.encodec.modeling_encodec")
    K, D = codebook.shape
    book = module.EncodecEuclideanCodebook(SimpleNamespace(codebook_size=K, codebook_dim=D)).to(codebook.device)
    book.embed.copy_(codebook)
    return book.quantize


def dac_codes(codebook: Tensor) -> Run:
    """transformers' DacVectorQuantize without its projections; its choice is by cosine."""
    module = need("transformers.models.dac.modeling_dac")
    K, D = codebook.shape
    vq = module.DacVectorQuantize(SimpleNamespace(hidden_size=1, codebook_dim=D, codebook_size=K))
    vq = vq.to(codebook.device).eval()
    vq.codebook.weight.copy_(codebook)
    return lambda z: vq.decode_latents(z.T[None])[1]


def faiss_codes(codebook: Tensor) -> Run:
    """faiss IndexFlatL2, the codebook added once; on CUDA tensors it is not run: faiss-cpu is what the extra has."""
    if codebook.device.type != "cpu":
        raise UnavailableError("faiss-cpu runs on the CPU only")
    faiss = need("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    return lambda z: torch.from_numpy(index.search(z.numpy(), 1)[1])


def our_module(codebook: Tensor, metric: str = "euclidean") -> nn.Module:
    K, D = codebook.shape
    vq = VectorQuantizer(D, K, metric=metric, kmeans_init=False, dead_code_threshold=0.0).to(codebook.device)
    vq.book.codebook.copy_(codebook)
    return vq


def our_forward(codebook: Tensor, training: bool, metric: str = "euclidean") -> Run:
    """Our whole module, the counterpart of a competitor's forward: codes, z_q, losses, usage; EMA when training."""
    vq = our_module(codebook, metric).train(training)
    return lambda z: vq(z[None]).codes


# ---- contests


def nearest_contest(shape: tuple[int, int, int], metric: str, setting: Setting) -> Contest:
    N, D, K = shape
    codebook = setting.randn(K, D, stream=11)
    answers: dict[str, Answer] = {}

    def judge_as(kind: str) -> Callable[[Inputs, Any], Verdict]:
        def judge(inputs: Inputs, codes: Tensor) -> Verdict:
            if kind not in answers:  # all contestants of a contest are checked on the same inputs
                answers[kind] = answer(inputs[0], codebook, kind)
            return judge_codes(answers[kind], codes)

        return judge

    judge, by_cosine = judge_as(metric), judge_as("cosine")
    few = (setting.randn(2, D),)
    contestants = every_implementation(lambda z: nearest_code(z, codebook, metric), few, judge)
    contestants += [
        Contestant("mmtok module, eval", lambda: our_forward(codebook, False, metric), judge, ours=True),
        Contestant("mmtok module, train", lambda: our_forward(codebook, True, metric), judge, ours=True, stateful=True),
    ]
    if metric == "cosine":
        theirs = [
            ("normalize+mm+argmax", lambda: _unit_argmax(codebook), by_cosine, False),
            ("vector-quantize-pytorch, eval", lambda: vector_quantize(codebook, False, True), judge, False),
            ("vector-quantize-pytorch, train", lambda: vector_quantize(codebook, True, True), judge, True),
            ("transformers DAC", lambda: dac_codes(codebook), by_cosine, False),
        ]
    else:
        theirs = [
            ("addmm+argmin", lambda: addmm_argmin(codebook), judge, False),
            ("cdist+argmin", lambda: cdist_argmin(codebook), judge, False),
            ("torch.compile", lambda: compiled_argmin(codebook), judge, False),
            ("vector-quantize-pytorch, eval", lambda: vector_quantize(codebook, False), judge, False),
            ("vector-quantize-pytorch, train", lambda: vector_quantize(codebook, True), judge, True),
            ("transformers EnCodec", lambda: encodec_codes(codebook), judge, False),
            ("transformers DAC (cosine)", lambda: dac_codes(codebook), by_cosine, False),
            ("faiss IndexFlatL2", lambda: faiss_codes(codebook), judge, False),
        ]
        if setting.smoke:
            theirs = [t for t in theirs if t[0] != "torch.compile"]  # compiling takes longer than all the rest
    contestants += [Contestant(name, build, how, stateful=changes) for name, build, how, changes in theirs]
    return Contest(
        "nearest" if metric == "euclidean" else "cosine",
        f"{N}x{D}x{K}",
        lambda g: (torch.randn(N, D, generator=g, device=setting.device),),
        contestants,
        flops=2.0 * N * D * K,
        moved=4.0 * (N * D + K * D) + 8.0 * N,
        scanned=float(N * K),
    )


def _unit_argmax(codebook: Tensor) -> Run:
    transposed = F.normalize(codebook, dim=1).T.contiguous()
    return lambda z: (F.normalize(z, dim=1) @ transposed).argmax(1)


def threads_contest(shape: tuple[int, int, int], setting: Setting) -> Contest:
    """Ours on one and on two threads, by the wall clock."""
    N, D, K = shape
    codebook = setting.randn(K, D, stream=11)

    def with_threads(count: int) -> Run:
        def run(z: Tensor) -> Tensor:
            before = torch.get_num_threads()
            torch.set_num_threads(count)
            try:
                return nearest_code(z, codebook)
            finally:
                torch.set_num_threads(before)

        return run

    def judge(inputs: Inputs, codes: Tensor) -> Verdict:
        return judge_codes(answer(inputs[0], codebook), codes)

    return Contest(
        "threads",
        f"{N}x{D}x{K}",
        lambda g: (torch.randn(N, D, generator=g, device=setting.device),),
        [
            Contestant(f"mmtok, {n} thread{'s' * (n > 1)}", lambda n=n: with_threads(n), judge, ours=True)
            for n in (1, 2)
        ],
        flops=2.0 * N * D * K,
        clock="wall",
        note="Wall clock. On a machine with a busy neighbour the second thread may not get its core.",
    )


def contests(setting: Setting) -> Iterator[tuple[str, Callable[[], Contest]]]:
    on_cuda = setting.device.type == "cuda"
    shapes = SHAPES_SMOKE if setting.smoke else SHAPES_CUDA if on_cuda else SHAPES_CPU
    for N, D, K in shapes:
        yield f"nearest/{N}x{D}x{K}", lambda s=(N, D, K): nearest_contest(s, "euclidean", setting)
    N, D, K = shapes[0]
    yield f"cosine/{N}x{D}x{K}", lambda: nearest_contest(shapes[0], "cosine", setting)
    if not on_cuda:
        yield f"threads/{N}x{D}x{K}", lambda: threads_contest(shapes[0], setting)


# ---- exactness


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Rows and codebook alike: mean + spread * gauss."""

    name: str
    D: int
    K: int
    mean: float = 0.0
    spread: float = 1.0
    metric: str = "euclidean"


DATA_SETS = (
    DataSet("gauss D8 K1024", 8, 1024),
    DataSet("gauss D16 K8192", 16, 8192),
    DataSet("gauss D128 K1024", 128, 1024),
    DataSet("gauss D256 K8192", 256, 8192),
    DataSet("cosine D8 K1024", 8, 1024, metric="cosine"),
    DataSet("mean 10, sd 1, D128 K1024", 128, 1024, 10.0, 1.0),
    DataSet("mean 10, sd 0.1, D128 K1024", 128, 1024, 10.0, 0.1),
    DataSet("mean 100, sd 0.1, D16 K1024", 16, 1024, 100.0, 0.1),
    DataSet("scale 1e-5, D8 K1024", 8, 1024, 0.0, 1e-5),
)


def exactness(setting: Setting) -> list[dict[str, Any]]:
    """Codes that differ from fp64 on data that breaks one formula or another; one record a data set, no times.

    Each record: ``name``, ``rows``, ``near_ties``, and ``wrong``: contestant -> count, or a string why there is none.
    Ours is also run under bf16 autocast and under a global matmul precision that permits bf16 or TF32.
    """
    records = []
    for number, data in enumerate(DATA_SETS[:: 4 if setting.smoke else 1]):
        K = min(data.K, 64) if setting.smoke else data.K
        N = 100 if setting.smoke else 8192
        z = data.mean + data.spread * setting.randn(N, data.D, stream=20 + 2 * number)
        codebook = data.mean + data.spread * setting.randn(K, data.D, stream=21 + 2 * number)
        truth, wrong = answer(z, codebook, data.metric), {}
        for name, build in _exactness_contestants(codebook, data.metric):
            try:
                with torch.no_grad():
                    wrong[name] = judge_codes(truth, build()(z)).wrong
            except Exception as e:
                wrong[name] = explain(e)
        records.append({"name": data.name, "rows": N, "near_ties": int(truth.near_ties.sum()), "wrong": wrong})
    return records


def _exactness_contestants(codebook: Tensor, metric: str) -> list[tuple[str, Callable[[], Run]]]:
    def ours(z: Tensor) -> Tensor:
        return nearest_code(z, codebook, metric)

    def under_autocast(z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, dtype=torch.bfloat16):
            return nearest_code(z, codebook, metric)

    def under_low_precision(z: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            return nearest_code(z, codebook, metric)
        finally:
            torch.set_float32_matmul_precision(before)

    rows: list[tuple[str, Callable[[], Run]]] = [(OURS, lambda: ours)]
    for name in implementations(lambda: ours(codebook[:2])):
        rows.append((f"{OURS} ({name})", lambda n=name: forced(n, ours)))
    rows += [
        (f"{OURS}, bf16 autocast", lambda: under_autocast),
        (f"{OURS}, matmul precision medium", lambda: under_low_precision),
    ]
    if metric == "cosine":
        rows.append(("normalize+mm+argmax", lambda: _unit_argmax(codebook)))
        rows.append(("vector-quantize-pytorch", lambda: vector_quantize(codebook, False, True)))
        rows.append(("transformers DAC", lambda: dac_codes(codebook)))
    else:
        rows.append(("addmm+argmin", lambda: addmm_argmin(codebook)))
        rows.append(("cdist+argmin", lambda: cdist_argmin(codebook)))
        rows.append(("vector-quantize-pytorch", lambda: vector_quantize(codebook, False)))
        rows.append(("transformers EnCodec", lambda: encodec_codes(codebook)))
        rows.append(("faiss IndexFlatL2", lambda: faiss_codes(codebook)))
    return rows
