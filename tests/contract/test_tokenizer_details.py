"""Tokenizers beyond the laws: bad input, fingerprints, pieces of long sound, channels, and the published sizes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import SOUNDS, TINY, build, image, inputs, noise, one, same_state, state_of
from torch import Tensor

from mmtok import auto
from mmtok.audio.codec import AudioCodec
from mmtok.image.binary1d import PUBLISHED, Binary1D
from mmtok.quantizers.codebook import Codebook
from mmtok.tokenizer import ImageTokenizer, Tokenizer
from mmtok.tokens import Tokens, TokensError


@pytest.fixture(scope="module", params=TINY)
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    return build(request.param)


@pytest.fixture(params=TINY)
def fresh(request: pytest.FixtureRequest) -> Tokenizer:
    """One that a test may change."""
    return build(request.param)


def test_a_causal_prefix_is_the_beginning_of_the_whole():
    codec = build("codec-causal")
    tokens = codec.encode(*SOUNDS["5000"])
    whole = one(codec.decode(tokens))
    cut = one(codec.decode(tokens.keep(num_tokens=7)))
    assert cut.shape == (1, 7 * 320) and torch.allclose(cut, whole[:, : 7 * 320], atol=1e-6)


def test_masked_latents_are_those_that_keep_cuts_off():
    tok = build("binary1d")
    assert isinstance(tok, Binary1D)
    x = image(2, 3, 16, 24)
    mask = (torch.arange(6) < 4).expand(2, -1)
    with torch.no_grad():
        want = tok(x, mask).x_hat.clamp(0, 1)
    got = tok.decode(tok.encode(x, num_tokens=4))
    assert isinstance(got, Tensor) and torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("value", [0, -3, 2**62])
def test_nonsense_beside_the_codes_is_refused_or_harmless(tok: Tokenizer, value: int):
    """A language model may write any header."""
    x, rate = next(iter(inputs(tok).values()))
    for key in tok.encode(x, rate).side:
        if key == "bit_depth" or (key == "num_samples" and value >= 0):
            continue  # for the writer of files; a length above what the codes tell is cut to it
        tokens = tok.encode(x, rate)
        tokens.side[key] = torch.tensor([value])
        with pytest.raises(TokensError, match=rf"side\['{key}'\]: expected an integer in .*got {value}"):
            tok.decode(tokens)
        tokens.side[key] = torch.tensor([1.5])
        with pytest.raises(TokensError, match=rf"side\['{key}'\]"):
            tok.decode(tokens)
        tokens.side[key] = torch.zeros(1, 2)
        with pytest.raises(TokensError, match=rf"side\['{key}'\]: .*shape \(1, 2\)"):
            tok.decode(tokens)


def test_bare_codes_decode_at_the_models_own_size(tok: Tokenizer):
    x, rate = next(iter(inputs(tok).values())) if tok.modality == "image" else SOUNDS["5000"]
    tokens = tok.encode(x, rate)
    bare = Tokens(tokens.codes, tokens.lengths, tokens.spec)
    picture = (3, *tok.size_without_side(tokens.codes.shape[2])) if isinstance(tok, ImageTokenizer) else ()
    assert tuple(one(tok.decode(bare)).shape) == (picture or (1, 16 * 320))
    nothing = Tokens(tokens.codes[..., :0], torch.tensor([0]), tokens.spec)
    if isinstance(tok, ImageTokenizer):
        picture = (3, *tok.size_without_side(0))
    assert tuple(one(tok.decode(nothing)).shape) == (picture or (1, 0))


def test_the_fingerprint_follows_the_weights(fresh: Tokenizer, tmp_path: Path):
    first = fresh.fingerprint
    assert fresh.fingerprint == first and len(first) == 16
    parameter = next(iter(fresh.parameters()))
    original = parameter.detach().clone()
    with torch.no_grad():
        parameter.flatten()[0] += 1
    assert fresh.fingerprint != first
    with torch.no_grad():
        parameter.copy_(original)
    assert fresh.fingerprint == first
    copied = copy.deepcopy(fresh)
    with torch.no_grad():
        for _ in range(parameter._version - next(iter(copied.parameters()))._version):
            next(iter(copied.parameters())).add_(1)  # until it saw as many changes as the original
    assert copied.fingerprint != fresh.fingerprint
    fresh.save(tmp_path)
    assert auto.load(tmp_path).fingerprint == fresh.fingerprint
    before, version = fresh.fingerprint, parameter._version
    fresh.train()
    parameter.data.add_(1)  # like a fused optimizer, this leaves no trace in the version counter
    in_training = fresh.fingerprint
    assert parameter._version == version and in_training != before
    parameter.data.add_(1)
    assert fresh.eval().fingerprint not in (before, in_training)
    last = fresh.fingerprint
    parameter.data = parameter.data + 1
    assert fresh.fingerprint != last


def test_training_statistics_are_no_part_of_the_fingerprint(fresh: Tokenizer):
    first = fresh.fingerprint
    buffers = [b for n, b in fresh.named_buffers() if n.endswith(("cluster_size", "codebook_sum"))]
    for b in buffers:
        b.add_(1)
    books = [m for m in fresh.modules() if isinstance(m, Codebook) and m.learning == "ema"]
    assert fresh.fingerprint == first and len(buffers) >= len(books)
    fresh.half()
    assert next(iter(fresh.parameters())).dtype == torch.float16 and fresh.fingerprint != first


def test_a_dtype_that_cannot_hold_the_weights_is_refused(fresh: Tokenizer, tmp_path: Path):
    with torch.no_grad():
        next(iter(fresh.parameters())).flatten()[0] = 1e5
    before = state_of(fresh)
    with pytest.raises(ValueError, match=r"holds 1e\+05, too large for torch.float16; save as torch.float32"):
        fresh.save(tmp_path / "x", torch.float16)
    with pytest.raises(ValueError, match="expected a floating type"):
        fresh.save(tmp_path / "x", torch.int16)
    assert same_state(before, state_of(fresh)) and not (tmp_path / "x").exists()


def test_eight_bit_weights_come_back_as_they_stand_in_memory(fresh: Tokenizer, tmp_path: Path):
    before = state_of(fresh)
    fresh.save(tmp_path / "x", torch.int8)
    loaded = auto.load(tmp_path / "x")
    assert loaded.fingerprint == fresh.fingerprint
    x, rate = next(iter(inputs(fresh).values()))
    assert torch.equal(loaded.encode(x, rate).codes, fresh.encode(x, rate).codes)
    for name, value in fresh.weights().items():
        if value.is_floating_point() and value.numel():  # within half a step of 127 a row, or float16's rounding
            allowed = value.abs().max() / 250 + 1e-6
            assert float((value - before[name]).abs().max()) <= allowed, name
    fresh.save(tmp_path / "y", torch.int8)
    assert auto.load(tmp_path / "y").fingerprint == fresh.fingerprint


def test_arguments_of_the_other_modality_are_refused(tok: Tokenizer):
    x, rate = next(iter(inputs(tok).values()))
    tokens = tok.encode(x, rate)
    if "text" not in tok.spec.conditions:
        with pytest.raises(ValueError, match="text was given, but this tokenizer takes no text"):
            tok.encode(x, rate, text="a cat")
        with pytest.raises(ValueError, match="text was given"):
            tok.decode(tokens, text="a cat")
    if tok.modality == "image":
        with pytest.raises(ValueError, match="sample_rate is for audio"):
            tok.encode(x, 16000)
        assert tuple(one(tok.decode(tokens, size=(9, 70))).shape) == (3, 9, 70)
        for size in ((0, 4), (4,), (1, 2, 3)):
            with pytest.raises(ValueError, match=r"size: expected \(height, width\)"):
                tok.decode(tokens, size=size)  # pyright: ignore[reportArgumentType]
        with pytest.raises(ValueError, match="px"):
            tok.decode(tokens, size=(10**5, 10**5))
        times = 1 + int(tok.spec.num_tokens or 0) // int(tokens.lengths[0])
        longer = Tokens(tokens.codes.repeat(1, 1, times), tokens.lengths * times, tokens.spec, tokens.side)
        with pytest.raises(TokensError, match=rf"at most \d+ tokens.*got {int(longer.lengths[0])}"):
            tok.decode(longer)
    else:
        with pytest.raises(ValueError, match="sample_rate: mandatory"):
            tok.encode(x)
        with pytest.raises(ValueError, match="size: for images only"):
            tok.decode(tokens, size=(4, 4))


def test_empty_batches_are_refused(tok: Tokenizer):
    rate = 16000 if tok.modality == "audio" else None
    for nothing in ([], torch.zeros(0, 3, 4, 4) if tok.modality == "image" else torch.zeros(0, 1, 9)):
        with pytest.raises(ValueError, match="at least one"):
            tok.encode(nothing, rate)


@pytest.mark.parametrize("name", ["codec-centred", "codec-causal"])
@pytest.mark.parametrize("chunk_frames", [7, 40])
def test_long_sound_in_pieces_equals_the_whole(name: str, chunk_frames: int):
    whole, chunked = build(name), build(name)
    assert isinstance(chunked, AudioCodec) and isinstance(whole, AudioCodec) and 7 < chunked.margin < 40
    chunked.chunk_frames = chunk_frames
    x = [noise(1, 60 * 320), noise(2, 7000, seed=2), noise(1, 60 * 320 - 200, seed=3)]
    tokens, pieces = whole.encode(x, 16000), chunked.encode(x, 16000)
    assert torch.equal(tokens.codes, pieces.codes)
    for a, b in zip(whole.decode(tokens), chunked.decode(pieces), strict=True):
        assert a.abs().max() > 1e-4 and torch.allclose(a, b, atol=1e-5)


def test_chunk_seconds_sets_the_pieces():
    assert AudioCodec(encoder_width=2, decoder_width=16, latent_dim=4, chunk_seconds=2.0).chunk_frames == 100
    assert AudioCodec(encoder_width=2, decoder_width=16, latent_dim=4, chunk_seconds=0.0).chunk_frames == 1


def test_channels_are_frames_in_turn():
    """Position = frame * channels + channel: each channel's codes are those of the channel alone."""
    codec = build("codec-centred")
    x = noise(2, 2000)
    both = codec.encode(x, 16000)
    assert both.lengths.tolist() == [14] and both.side["channels"].tolist() == [2]
    for c in range(2):
        assert torch.equal(both.codes[..., c::2], codec.encode(x[c], 16000).codes)
    assert float(both.bits) == 14 * 3 * 4


def test_large_pictures_are_reduced_and_come_back_large():
    tok = build("binary1d")
    assert isinstance(tok, Binary1D)
    assert tok.working_size(96, 192) == (24, 48) and tok.working_size(48, 7) == (48, 7)
    assert tok.working_size(1, 5000) == (1, 48) and tok.working_size(49, 49) == (48, 48)
    x = image(1, 3, 96, 192)
    small = torch.nn.functional.interpolate(x, (24, 48), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(tok.encode(x).codes, tok.encode(small).codes)
    assert one(tok.decode(tok.encode(x))).shape == (3, 96, 192)


def test_grey_is_its_rgb_and_rgba_is_laid_over_white():
    tok = build("binary1d")
    grey, rgba = image(1, 16, 16), image(4, 16, 16)
    assert torch.equal(tok.encode(grey).codes, tok.encode(grey.repeat(3, 1, 1)).codes)
    flat = rgba[:3] * rgba[3:] + 1 - rgba[3:]
    assert torch.equal(tok.encode(rgba).codes, tok.encode(flat).codes)
    assert bool((one(tok.decode(tok.encode(rgba)))[3] == 1).all())


def test_the_published_sizes():
    """Instella-T2I (arXiv 2506.21022, released code): about 120 M parameters in the encoder, 307 M in the decoder."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initialising meta tensors does nothing, and says so
        tok = Binary1D(**PUBLISHED)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in tok.named_children()}
    encoder = sum(counts[n] for n in ("patch", "encoder", "encoder_norm", "encoder_out")) + tok.latents.numel()
    decoder = sum(counts[n] for n in ("decoder_in", "decoder", "decoder_norm", "to_pixel")) + tok.mask_token.numel()
    assert encoder == pytest.approx(120e6, rel=0.005) and decoder == pytest.approx(307e6, rel=0.005)
    assert sum(p.numel() for p in tok.parameters()) == pytest.approx(428e6, rel=0.002)
    assert (tok.config["resize"], tok.config["rope"]) == ("dc", "mixed")
    spec = tok.base_spec()
    assert spec.bits_per_position * 128 == 8192 and spec.num_tokens == 128
    assert tuple(tok.to_pixel.weight.shape) == (768, 1024) and tuple(tok.quantizer.embed.shape) == (64, 768)
