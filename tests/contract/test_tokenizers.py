"""The laws that every tokenizer obeys (design.md, section 6), on the tiny untrained ones of `tiny_models`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_models import SOUNDS, TINY, build, image, inputs, noise, one, same_state, several, size_of, state_of
from torch import Tensor

from mmtok import auto
from mmtok.audio.codec import AudioCodec
from mmtok.image.binary1d import Binary1D
from mmtok.tokenizer import Tokenizer
from mmtok.tokens import Tokens, TokensError
from mmtok.vocab import Vocab


@pytest.fixture(scope="module", params=TINY)
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    return build(request.param)


@pytest.fixture(params=TINY)
def fresh(request: pytest.FixtureRequest) -> Tokenizer:
    """One that a test may change."""
    return build(request.param)


def test_codes_depend_on_the_input_and_lie_in_range(tok: Tokenizer):
    """Without this, the laws below would hold for codes that are all 0."""
    codes = []
    for x, rate in inputs(tok).values():
        tokens = tok.encode(x, rate)
        tokens.check(tok.spec)
        assert tokens.spec == tok.spec and len(tokens) == 1 and tokens.codes.shape[1] == tok.spec.num_codebooks
        sizes = torch.tensor(tok.spec.codebook_sizes)[:, None]
        assert bool((tokens.codes >= 0).all()) and bool((tokens.codes < sizes).all())
        codes.append(tokens.codes[0])
    if tok.modality == "image":
        assert len({tuple(c.flatten().tolist()) for c in codes}) >= len(codes) - 1
    for q in range(tok.spec.num_codebooks):
        assert len(torch.cat([c[q] for c in codes], -1).unique()) >= 4


def test_decode_gives_back_the_exact_size(tok: Tokenizer):
    for name, (x, rate) in inputs(tok).items():
        y = one(tok.decode(tok.encode(x, rate)))
        assert tuple(y.shape) == size_of(tok, x), name
        assert y.dtype == torch.float32 and bool(y.isfinite().all()), name
        if tok.modality == "image":
            assert 0 <= float(y.min()) <= float(y.max()) <= 1, name


def test_the_decode_depends_on_the_codes(tok: Tokenizer):
    x, rate = next(iter(inputs(tok).values())) if tok.modality == "image" else SOUNDS["5000"]
    tokens = tok.encode(x, rate)
    other = dataclasses.replace(tokens, codes=(tokens.codes + 1) % torch.tensor(tok.spec.codebook_sizes)[:, None])
    assert not torch.allclose(one(tok.decode(tokens)), one(tok.decode(other)), atol=1e-4)


def test_deterministic(tok: Tokenizer):
    for x, rate in inputs(tok).values():
        tokens = tok.encode(x, rate)
        torch.manual_seed(77)
        assert torch.equal(tok.encode(x, rate).codes, tokens.codes)
        assert torch.equal(one(tok.decode(tokens)), one(tok.decode(tokens)))


def test_a_batch_of_n_equals_n_singles_and_padding_changes_nothing(tok: Tokenizer):
    xs, rate = several(tok)
    batch = tok.encode(xs, rate)
    decoded = tok.decode(batch)
    assert isinstance(decoded, list) and len(batch) == len(decoded) == len(xs)
    for i, x in enumerate(xs):
        single = tok.encode(x, rate)
        assert torch.equal(batch[i].codes, single.codes) and {k: v.tolist() for k, v in batch[i].side.items()} == {
            k: v.tolist() for k, v in single.side.items()
        }
        assert int(batch.codes[i, :, int(batch.lengths[i]) :].abs().sum()) == 0
        assert torch.allclose(decoded[i], one(tok.decode(single)), atol=1e-6)
    order = list(reversed(range(len(xs))))
    backwards = tok.encode([xs[i] for i in order], rate)
    assert all(torch.equal(backwards[j].codes, batch[i].codes) for j, i in enumerate(order))


def test_one_size_comes_back_as_one_tensor(tok: Tokenizer):
    x: Tensor = image(3, 3, 17, 9) if tok.modality == "image" else noise(3, 2, 1000)
    rate = None if tok.modality == "image" else 16000
    tokens = tok.encode(x, rate)
    y = tok.decode(tokens)
    assert not isinstance(y, list)
    assert y.shape == x.shape
    singles = [tok.encode(item, rate) for item in x]
    assert torch.equal(tokens.codes, Tokens.concat(singles).codes)
    empty = tok.decode(tokens[3:])
    assert isinstance(empty, Tensor) and len(empty) == 0


def test_the_first_k_levels_are_those_of_all(tok: Tokenizer):
    xs, rate = several(tok)
    full = tok.encode(xs, rate)
    for k in range(1, tok.spec.num_codebooks + 1):
        some = tok.encode(xs, rate, num_codebooks=k)
        assert torch.equal(some.codes, full.codes[:, :k]) and some.spec == full.keep(k).spec == tok.spec.keep(k)
        for a, b in zip(tok.decode(some), tok.decode(full.keep(k)), strict=True):
            assert torch.equal(a, b)
    for k in (0, tok.spec.num_codebooks + 1):
        with pytest.raises(ValueError, match=rf"num_codebooks: expected 1\.\.{tok.spec.num_codebooks}.*got {k}"):
            tok.encode(xs, rate, num_codebooks=k)


def test_every_prefix_of_the_levels_decodes(tok: Tokenizer):
    for x, rate in inputs(tok).values():
        tokens = tok.encode(x, rate)
        for k in range(1, tok.spec.num_codebooks + 1):
            y = one(tok.decode(tokens.keep(k)))
            assert tuple(y.shape) == size_of(tok, x) and bool(y.isfinite().all())


def test_every_prefix_of_the_tokens_decodes(tok: Tokenizer):
    chosen = ("odd", "grey") if tok.modality == "image" else ("5000", "44.1 kHz stereo", "8 kHz")
    for x, rate in (inputs(tok)[c] for c in chosen):
        tokens, size = tok.encode(x, rate), size_of(tok, x)
        for t in {*range(1, 8), *range(9, int(tokens.lengths[0]) + 1, 5), int(tokens.lengths[0])}:
            cut = tokens.keep(num_tokens=t)
            assert torch.equal(tok.encode(x, rate, num_tokens=t).codes, cut.codes)
            y = one(tok.decode(cut))
            assert bool(y.isfinite().all())
            if tok.modality == "image":
                assert tuple(y.shape) == size
                continue
            frames = t // size[0]
            assert y.shape[0] == size[0] and y.shape[1] == min(size[1], -(-frames * 320 * (rate or 1) // 16000))
        assert tuple(one(tok.decode(tokens.keep(num_tokens=10**6))).shape) == size
    with pytest.raises(ValueError, match="num_tokens: expected at least 1, got 0"):
        tok.encode(x, rate, num_tokens=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_saved_and_loaded_it_gives_the_same_codes(fresh: Tokenizer, tmp_path: Path, dtype: torch.dtype):
    xs, rate = several(fresh)
    fresh.name = "some-name"
    before = fresh.encode(xs, rate)
    fresh.save(tmp_path / "a" / "b", dtype)
    loaded = auto.load(tmp_path / "a" / "b")
    assert loaded.fingerprint == fresh.fingerprint and loaded.spec == fresh.spec and loaded.name == "some-name"
    assert (fresh.fingerprint == before.spec.fingerprint) == (dtype == torch.float32)
    tokens = fresh.encode(xs, rate)
    again = loaded.encode(xs, rate)
    assert torch.equal(tokens.codes, again.codes) and not loaded.training
    for a, b in zip(fresh.decode(tokens), loaded.decode(tokens), strict=True):
        assert torch.equal(a, b)
    data = (tmp_path / "a" / "b" / "model.safetensors").read_bytes()
    payload = sum(v.numel() * (dtype if v.is_floating_point() else v.dtype).itemsize for v in fresh.weights().values())
    assert len(data) - 8 - int.from_bytes(data[:8], "little") == payload
    fresh.save(tmp_path / "again", dtype)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "a" / "b" / file).read_bytes()


def test_saved_tokens_decode_the_same(tok: Tokenizer, tmp_path: Path):
    xs, rate = several(tok)
    tokens = tok.encode(xs, rate)
    tokens.save(tmp_path / "t.safetensors")
    loaded = Tokens.load(tmp_path / "t.safetensors")
    assert loaded.spec == tok.spec
    for a, b in zip(tok.decode(tokens), tok.decode(loaded), strict=True):
        assert torch.equal(a, b)


def test_ids_of_a_language_model_come_back_exactly(tok: Tokenizer):
    for layout in ("flatten", "delay", "coarse_first"):
        vocab = Vocab(100, **{tok.modality: tok.spec}, layout=layout)
        xs, rate = several(tok)
        tokens = tok.encode(xs, rate)
        parts = vocab.unpack(vocab.pack([[1, 2], *(tokens[i] for i in range(len(tokens))), [3]]))
        assert parts[0] == [1, 2] and parts[-1] == [3] and len(parts) == len(tokens) + 2
        for i, part in enumerate(parts[1:-1]):
            assert isinstance(part, Tokens) and torch.equal(part.codes, tokens[i].codes)
            assert torch.equal(one(tok.decode(part)), one(tok.decode(tokens[i])))
        bare = vocab.unpack(vocab.pack([tokens[0]], header=False))[0]  # as a model without headers writes it
        assert isinstance(bare, Tokens) and bool(one(tok.decode(bare)).isfinite().all())


def test_encode_and_decode_neither_see_nor_change_the_mode_or_the_state(fresh: Binary1D | AudioCodec):
    xs, rate = several(fresh)
    tokens, before = fresh.encode(xs, rate), state_of(fresh)
    want = fresh.decode(tokens)
    fresh.train()
    next(m for m in fresh.children() if m.training).eval()  # a frozen part of a model in training
    modes = [m.training for m in fresh.modules()]
    assert True in modes and False in modes
    seen: list[bool] = []
    hooks = [m.register_forward_pre_hook(lambda m, x: seen.append(m.training)) for m in fresh.modules()]
    again = fresh.encode(xs, rate)
    assert torch.equal(again.codes, tokens.codes) and again.spec == tokens.spec
    for a, b in zip(want, fresh.decode(again), strict=True):
        assert torch.equal(a, b)
    assert seen and True not in seen
    for hook in hooks:
        hook.remove()
    assert modes == [m.training for m in fresh.modules()]
    fresh.eval()
    fresh.quantizer.train()
    assert torch.equal(fresh.encode(xs, rate).codes, tokens.codes)
    assert fresh.quantizer.training and not fresh.training
    assert same_state(before, state_of(fresh))
    with pytest.raises(ValueError, match="num_codebooks"):
        fresh.train().encode(xs, rate, num_codebooks=99)
    assert fresh.training


def test_no_graph_is_kept(tok: Tokenizer):
    xs, rate = several(tok)
    tokens = tok.encode(xs, rate)
    assert not any(y.requires_grad for y in tok.decode(tokens)) and torch.is_grad_enabled()


def test_training_forward_has_the_size_and_a_gradient(fresh: Tokenizer):
    x = image(2, 3, 17, 23) if fresh.modality == "image" else noise(2, 1, 1600)
    out = fresh.train()(x)
    assert out.x_hat.shape == x.shape
    ((out.x_hat - x).square().mean() + out.quantized.loss).backward()
    trained = {n: p for n, p in fresh.named_parameters() if p.requires_grad}
    reached = [n for n, p in trained.items() if p.grad is not None and float(p.grad.abs().max()) > 0]
    assert len(reached) > len(trained) / 2
    if all(p.requires_grad for p in fresh.quantizer.parameters()):  # the encoder is not frozen
        assert next(iter(trained)) in reached


def test_ids_of_another_tokenizer_are_refused(fresh: Tokenizer, request: pytest.FixtureRequest):
    other = build(request.node.callspec.params["fresh"], seed=5)
    x, rate = next(iter(inputs(fresh).values()))
    with pytest.raises(TokensError, match=r"these are ids of .* decode them with the tokenizer that made them"):
        fresh.decode(other.encode(x, rate))
    for name in TINY:
        if TINY[name]().modality != fresh.modality:
            with pytest.raises(TokensError, match="decode them with the tokenizer that made them"):
                fresh.decode(build(name).encode(*next(iter(inputs(build(name)).values()))))
            break


def test_ids_out_of_range_are_refused(tok: Tokenizer):
    x, rate = next(iter(inputs(tok).values()))
    for q, K in enumerate(tok.spec.codebook_sizes):
        for code in (K, -1):
            tokens = tok.encode(x, rate)
            tokens.codes[0, q, -1] = code
            position = tokens.codes.shape[2] - 1
            with pytest.raises(TokensError, match=f"item 0, level {q}, position {position}: expected .*got {code}"):
                tok.decode(tokens)
