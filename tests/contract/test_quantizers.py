"""The laws that every entry of QUANTIZERS keeps (design.md section 6)."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from mmtok.quantizers import QUANTIZERS, Quantizer, build_quantizer

# Kept with the faults of a published training, to be measured: see tests/quantizers/test_rvq_legacy.py.
LAWLESS = {"rvq_legacy"}
CASES: dict[str, dict] = {
    "vq": {"type": "vq", "dim": 5, "codebook_size": 12},
    "vq-gradient": {"type": "vq", "dim": 5, "codebook_size": 12, "codebook": "gradient"},
    "vq-cosine-narrow": {"type": "vq", "dim": 5, "codebook_size": 12, "codebook_dim": 3, "metric": "cosine"},
    "rvq": {"type": "rvq", "dim": 5, "num_codebooks": 3, "codebook_size": 12},
    "rvq-gradient": {"type": "rvq", "dim": 5, "num_codebooks": 3, "codebook_size": 12, "codebook": "gradient"},
    "rvq-cosine": {"type": "rvq", "dim": 5, "num_codebooks": 3, "codebook_size": 12, "metric": "cosine"},
    "rvq-narrow": {
        "type": "rvq",
        "dim": 5,
        "num_codebooks": 2,
        "codebook_size": 12,
        "codebook_dim": 3,
        "codebook": "gradient",
    },
    "vq-rotation": {"type": "vq", "dim": 5, "codebook_size": 12, "gradient": "rotation"},
    "rvq-rotation": {"type": "rvq", "dim": 5, "num_codebooks": 3, "codebook_size": 12, "gradient": "rotation"},
    "grouped": {"type": "grouped_rvq", "dim": 6, "num_codebooks": 4, "codebook_size": 12},
    "grouped-narrow": {
        "type": "grouped_rvq",
        "dim": 6,
        "num_codebooks": 6,
        "codebook_size": 12,
        "num_groups": 3,
        "codebook_dim": 2,
        "codebook": "gradient",
        "gradient": "rotation",
    },
    "split": {"type": "split_rvq", "dim": 5, "num_codebooks": 3, "codebook_size": 12, "inner_dim": 4},
    "split-gradient": {
        "type": "split_rvq",
        "dim": 5,
        "num_codebooks": 3,
        "codebook_size": 12,
        "inner_dim": 4,
        "bias": True,
        "codebook": "gradient",
        "gradient": "rotation",
    },
    "strided": {
        "type": "strided_rvq",
        "dim": 5,
        "level_strides": [4, 3, 1],
        "codebook_size": 12,
        "codebook_dim": None,
        "metric": "euclidean",
        "codebook": "ema",
    },
    "strided-narrow": {
        "type": "strided_rvq",
        "dim": 5,
        "level_strides": [4, 2, 1],
        "codebook_size": 12,
        "codebook_dim": 3,
    },
    "fsq": {"type": "fsq", "dim": 5, "levels": [4, 3, 2]},
    "fsq-unprojected": {"type": "fsq", "dim": 3, "levels": [8, 5, 5]},
    "binary-bernoulli": {"type": "binary", "dim": 5, "num_bits": 12, "bits_per_code": 4},
    "binary-sign": {"type": "binary", "dim": 5, "num_bits": 12, "bits_per_code": 4, "kind": "sign"},
    "binary-spherical": {
        "type": "binary",
        "dim": 5,
        "num_bits": 24,
        "bits_per_code": 8,
        "kind": "spherical",
        "entropy": "grouped",
    },
    "lfq": {"type": "lfq", "dim": 5, "num_bits": 6},
    "bsq": {"type": "bsq", "dim": 5, "num_bits": 32, "bits_per_code": 16, "entropy": "grouped"},
    "rfsq": {"type": "rfsq", "dim": 5, "num_codebooks": 3, "levels": [4, 3]},
    "rfsq-unprojected": {"type": "rfsq", "dim": 2, "num_codebooks": 2, "levels": [5, 2]},
    "simvq": {"type": "simvq", "dim": 5, "codebook_size": 12},
    "simvq-rotation": {"type": "simvq", "dim": 5, "codebook_size": 12, "gradient": "rotation"},
    "random_projection": {
        "type": "random_projection",
        "dim": 5,
        "num_codebooks": 2,
        "codebook_size": 12,
        "codebook_dim": 3,
    },
    "pq": {"type": "pq", "dim": 6, "num_codebooks": 3, "codebook_size": 12},
    "pq-length": {"type": "pq", "dim": 6, "codebook_size": 12, "normalize": "length"},
    "pq-whiten": {"type": "pq", "dim": 6, "num_codebooks": 2, "codebook_size": 12, "normalize": "whiten"},
    "per_dimension": {"type": "per_dimension", "dim": 4, "bits": 3},
}
# Rounding covers the whole bounded range, and frozen codes do not learn: nothing to commit to, so no loss.
NO_LOSS = ("fsq", "rfsq", "random_projection", "pq", "per_dimension")
EXACTLY_ONE = ["vq", "vq-gradient", "rvq", "rvq-gradient", "rvq-cosine", "grouped", "strided"]
EXACTLY_ONE += ["simvq", "random_projection", "pq", "pq-length", "pq-whiten", "per_dimension"]
every_case = pytest.mark.parametrize("name", CASES)


def make(name: str, steps: int = 2) -> Quantizer:
    """A quantizer after ``steps`` forward passes in training mode, so that learned codebooks fit the data."""
    torch.manual_seed(0)
    quantizer = build_quantizer(CASES[name])
    for _ in range(steps):
        quantizer(latents(quantizer, seed=7))
    return quantizer


def latents(quantizer: Quantizer, B: int = 4, T: int = 17, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, T, quantizer.dim, generator=torch.Generator().manual_seed(seed))


def prefix_mask(B: int, T: int) -> torch.Tensor:
    return torch.arange(T) < torch.tensor([T, T - 5, 3, 0])[:B, None]


def test_every_entry_of_the_table_is_covered():
    assert {config["type"] for config in CASES.values()} == set(QUANTIZERS) - LAWLESS


@every_case
def test_forward_encode_and_decode_agree(name):
    quantizer = make(name).eval()
    z = latents(quantizer)
    out = quantizer(z)
    Q = quantizer.num_codebooks
    assert out.codes.shape == (4, Q, 17) and out.codes.dtype == torch.int64
    assert torch.equal(out.codes, quantizer.encode(z))
    torch.testing.assert_close(out.z_q, quantizer.decode(out.codes))
    assert out.z_q.shape == z.shape and out.z_q.dtype == torch.float32
    sizes = torch.tensor(quantizer.codebook_sizes)[:, None]
    assert bool(((out.codes >= 0) & (out.codes < sizes)).all())
    assert len(out.codes.unique()) > 2
    assert out.loss.shape == () and bool(torch.isfinite(out.loss))
    for key in ("usage", "perplexity", "dead_share"):
        assert out.stats[key].shape == (Q,)
    for q in range(Q):
        used = len(out.codes[:, q].unique())
        assert float(out.stats["usage"][q]) == pytest.approx(used / quantizer.codebook_sizes[q])
        assert 1 <= float(out.stats["perplexity"][q]) <= used + 1e-3
    assert not any(value.requires_grad for value in out.stats.values())


@every_case
def test_first_levels_do_not_depend_on_how_many_are_asked_for(name):
    quantizer = make(name).eval()
    z = latents(quantizer)
    codes = quantizer.encode(z)
    for k in range(1, quantizer.num_codebooks + 1):
        assert torch.equal(quantizer.encode(z, num_codebooks=k), codes[:, :k])
        out = quantizer(z, num_codebooks=k)
        assert torch.equal(out.codes, codes[:, :k])
        torch.testing.assert_close(out.z_q, quantizer.decode(codes[:, :k]))
        assert out.stats["usage"].shape == (k,)


@every_case
@pytest.mark.parametrize("training", [True, False])
def test_what_the_first_level_alone_decodes_to(name, training):
    quantizer = make(name).train(training)
    z, mask = latents(quantizer).requires_grad_(), prefix_mask(4, 17)
    before = copy.deepcopy(quantizer).eval()
    out = quantizer(z, mask)
    if quantizer.num_codebooks == 1:
        assert out.z_q_first is out.z_q
        assert quantizer(z).z_q_first.shape == z.shape
    if name != "binary-bernoulli" or not training:  # which draws its bits, of all levels together
        first = before(z.detach(), mask, num_codebooks=1)
        torch.testing.assert_close(out.z_q_first, first.z_q)
        valid = mask[..., None]
        torch.testing.assert_close(out.z_q_first * valid, before.decode(out.codes[:, :1]) * valid)
        assert first.z_q_first is first.z_q
    assert bool((out.z_q_first[~mask] == 0).all())
    (grad,) = torch.autograd.grad((out.z_q_first - 1).square().sum(), z)
    assert float(grad[mask].abs().sum()) > 0 and bool((grad[~mask] == 0).all())


@every_case
def test_level_strides_say_where_codes_are_new(name):
    quantizer = make(name).eval()
    strides = quantizer.level_strides
    assert len(strides) == quantizer.num_codebooks
    codes = quantizer.encode(latents(quantizer))
    for q, stride in enumerate(strides):
        first = torch.arange(17) // stride * stride
        assert torch.equal(codes[:, q], codes[:, q, first])
        assert stride == 1 or bool((codes[:, q, 1:] != codes[:, q, :-1]).any())


@every_case
def test_what_masked_positions_hold_changes_nothing_in_training(name):
    first = make(name)
    second = copy.deepcopy(first)
    z = latents(first)
    mask = prefix_mask(4, 17)
    results = []
    for quantizer, fill in ((first, 0.0), (second, float("nan"))):
        torch.manual_seed(3)
        x = z.clone()
        x[~mask] = fill
        x.requires_grad_()
        out = quantizer(x, mask)
        (out.loss + out.z_q.square().sum()).backward()
        assert bool((out.z_q[~mask] == 0).all()) and bool((out.codes.transpose(1, 2)[~mask] == 0).all())
        assert x.grad is not None and bool((x.grad[~mask] == 0).all())
        results.append((out, x.grad))
    (out1, grad1), (out2, grad2) = results
    assert torch.equal(out1.codes, out2.codes) and torch.equal(out1.z_q, out2.z_q)
    assert torch.equal(out1.loss, out2.loss) and torch.equal(grad1, grad2)
    assert all(torch.equal(out1.stats[key], out2.stats[key]) for key in out1.stats)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


@every_case
def test_padding_changes_nothing(name):
    """A batch padded to twice its length against the same batch, in loss, statistics and codebook update."""
    short = make(name)
    if name == "binary-bernoulli":
        short.eval()  # in training its bits are drawn, and a longer tensor draws others
    long = copy.deepcopy(short)
    z = latents(short)
    padded = torch.cat([z, 50 + latents(short, seed=9)], 1)
    mask = torch.arange(34).expand(4, 34) < 17
    torch.manual_seed(3)
    a = short(z)
    torch.manual_seed(3)
    b = long(padded, mask)
    assert torch.equal(a.codes, b.codes[:, :, :17])
    torch.testing.assert_close(a.z_q, b.z_q[:, :17])
    torch.testing.assert_close(a.loss, b.loss)
    for key in a.stats:
        torch.testing.assert_close(a.stats[key], b.stats[key])
    for key, value in short.state_dict().items():
        torch.testing.assert_close(value, long.state_dict()[key])


@every_case
def test_padding_changes_no_code_of_encode(name):
    quantizer = make(name).eval()
    z = latents(quantizer)
    mask = prefix_mask(4, 17)
    padded = torch.where(mask[..., None], z, 50.0)
    codes = quantizer.encode(padded, mask=mask)
    assert torch.equal(codes, quantizer.eval()(padded, mask).codes)
    for item, keep, alone in zip(codes, mask, z, strict=True):
        n = int(keep.sum())
        assert bool((item[:, n:] == 0).all())
        if n:
            assert torch.equal(item[:, :n], quantizer.encode(alone[None, :n])[0])
    with pytest.raises(ValueError, match=r"mask: expected bool of shape \(4, 17\)"):
        quantizer.encode(z, mask=mask[:, :5])


@every_case
def test_batch_equals_singles(name):
    quantizer = make(name).eval()
    z = latents(quantizer)
    singles = torch.cat([quantizer.encode(item[None]) for item in z])
    assert torch.equal(quantizer.encode(z), singles)


@every_case
def test_codes_do_not_depend_on_autocast_or_module_type(name):
    quantizer = make(name).eval()
    z = latents(quantizer)
    expected = quantizer(z)
    decoded = quantizer.decode(expected.codes)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            out = quantizer(z)
            assert torch.equal(quantizer.encode(z), expected.codes)
            assert torch.equal(quantizer.decode(expected.codes), decoded)
        assert torch.equal(out.codes, expected.codes) and torch.equal(out.z_q, expected.z_q)
    moved = nn.Sequential(copy.deepcopy(quantizer)).bfloat16()[0]
    assert torch.equal(moved.encode(z), expected.codes)
    assert all(t.dtype != torch.bfloat16 for t in moved.state_dict().values())
    low = z.bfloat16()
    assert torch.equal(quantizer.encode(low), quantizer.encode(low.float()))


@pytest.mark.parametrize("name", EXACTLY_ONE)
@pytest.mark.parametrize("training", [True, False])
def test_straight_through_gradient_is_one(name, training):
    quantizer = make(name).train(training)
    z = latents(quantizer).requires_grad_()
    weight = latents(quantizer, seed=5)
    (grad,) = torch.autograd.grad((quantizer(z).z_q * weight).sum(), z)
    assert torch.equal(grad, weight)


@every_case
def test_the_reconstruction_reaches_z_and_every_weight(name):
    """No parameter is left without a gradient: DistributedDataParallel would stop there."""
    quantizer = make(name)
    z = latents(quantizer).requires_grad_()
    out = quantizer(z)
    (out.loss + (out.z_q - 1).square().mean()).backward()
    assert z.grad is not None and float(z.grad.abs().sum()) > 0
    for key, parameter in quantizer.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, key


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith(NO_LOSS)])
def test_each_level_commits(name):
    """k * loss(k levels) - (k-1) * loss(k-1 levels) is level k's own loss; each pulls at z."""
    quantizer = make(name).eval()
    if hasattr(quantizer, "entropy_weight"):
        quantizer.entropy_weight = 0.0  # type: ignore[assignment]
    z = latents(quantizer).requires_grad_()
    before = torch.zeros_like(z)
    for k in range(1, quantizer.num_codebooks + 1):
        (grad,) = torch.autograd.grad(k * quantizer(z, num_codebooks=k).loss, z)
        assert float((grad - before).norm()) > 1e-3 * float(grad.norm()) > 0
        before = grad


@every_case
def test_saved_and_rebuilt_gives_the_same_codes(name):
    quantizer = make(name).eval()
    config = json.loads(json.dumps(quantizer.config()))
    torch.manual_seed(99)
    again = build_quantizer(config).eval()
    assert again.config() == quantizer.config()
    again.load_state_dict(load(save(quantizer.state_dict())))
    z = latents(quantizer)
    codes = quantizer.encode(z)
    assert torch.equal(again.encode(z), codes) and torch.equal(again.decode(codes), quantizer.decode(codes))
    torch.manual_seed(3)
    first = quantizer.train()(z)
    torch.manual_seed(3)
    assert torch.equal(again.train()(z).loss, first.loss)  # and k-means does not start again
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


class Method(nn.Module):
    """One method of a quantizer as a forward, which is what torch.export takes."""

    def __init__(self, quantizer: Quantizer, method: str) -> None:
        super().__init__()
        self.quantizer, self.method = quantizer, method

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.quantizer, self.method)(x)


@every_case
def test_one_graph_with_free_batch_and_length(name):
    quantizer = make(name).eval()
    z, other = latents(quantizer), latents(quantizer, B=3, T=40, seed=2)
    codes = quantizer.encode(z)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(quantizer.encode, fullgraph=True, backend="eager")(z), codes)
    decoded = torch.compile(quantizer.decode, fullgraph=True, backend="eager")(codes)
    torch.testing.assert_close(decoded, quantizer.decode(codes))
    B, T = torch.export.Dim("B", min=1, max=64), torch.export.Dim("T", min=2, max=4096)
    encode = torch.export.export(Method(quantizer, "encode"), (z,), dynamic_shapes=({0: B, 1: T},))
    decode = torch.export.export(Method(quantizer, "decode"), (codes,), dynamic_shapes=({0: B, 2: T},))
    assert torch.equal(encode.module()(other), quantizer.encode(other))
    torch.testing.assert_close(decode.module()(quantizer.encode(other)), quantizer.decode(quantizer.encode(other)))


@every_case
def test_bad_input_is_named(name):
    quantizer = make(name)
    z = latents(quantizer)
    before = copy.deepcopy(quantizer.state_dict())
    broken = z.clone()
    broken[1, 2, 0] = float("nan")
    Q, K, D = quantizer.num_codebooks, quantizer.codebook_sizes[0], quantizer.dim
    codes = quantizer.encode(z)
    wrong = codes.clone()
    wrong[1, Q - 1, 3] = K
    for call in (quantizer, quantizer.encode):
        with pytest.raises(ValueError, match="z: expected finite values, got 1 NaN"):
            call(broken)
        with pytest.raises(ValueError, match=rf"expected .* of shape \(B, T, {D}\).*channels-last"):
            call(z.transpose(1, 2))
        for k in (0, Q + 1):
            with pytest.raises(ValueError, match=rf"num_codebooks: expected 1\.\.{Q}, got {k}"):
                call(z, num_codebooks=k)
    for mask in (torch.ones(4, 16, dtype=torch.bool), torch.ones(4, 17)):
        with pytest.raises(ValueError, match=r"mask: expected bool of shape \(4, 17\)"):
            quantizer(z, mask)
    with pytest.raises(ValueError, match=rf"expected 0\.\.{K - 1} at level {Q - 1}, got {K} at item 1, position 3"):
        quantizer.decode(wrong)
    with pytest.raises(ValueError, match=r"got -1 at"):
        quantizer.decode(codes - codes - 1)
    with pytest.raises(ValueError, match=rf"codes: expected int64 of shape \(B, 1\.\.{Q}, T\)"):
        quantizer.decode(torch.cat([codes, codes[:, :1]], 1))
    with pytest.raises(ValueError, match="codes: expected int64"):
        quantizer.decode(codes.int())
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} moved though the input was refused"


@pytest.mark.parametrize("name", ["vq-cosine-narrow", "rvq-narrow", "binary-sign", "simvq"])
def test_weights_that_are_not_finite_are_an_error(name):
    quantizer = make(name)
    with torch.no_grad():
        next(quantizer.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="expected a finite loss for finite z, got nan"):
        quantizer(latents(quantizer))


def test_unknown_type_and_arguments_are_named():
    with pytest.raises(ValueError, match=r"type: expected one of vq, rvq, .*, got 'unheard'"):
        build_quantizer({"type": "unheard"})
    with pytest.raises(ValueError, match=r"cannot build quantizer 'vq'.*n_q"):
        build_quantizer({"type": "vq", "dim": 4, "codebook_size": 4, "n_q": 2})
