"""JPEG, WebP, AVIF and JPEG 2000 as tokenizers: exact size, prefixes, damage, and few bytes that ask for gigabytes."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features

from mmtok.metrics.image import psnr
from mmtok.tokens import Tokens, TokensError
from mmtok.vocab import Vocab
from mmtok.wrappers.classical_images import FAMILIES, IMAGE_CODECS, ClassicalImage, decode_image, encode_image

NAMES = {"jpeg": "jpeg:50", "webp": "webp:50", "avif": "avif:50", "jpeg2000": "jpeg2000:20"}
pytestmark = pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")


def picture(height: int = 64, width: int = 48) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = 0.5 + 0.4 * torch.sin(25 * x * y + 9 * x)
    return torch.stack([x, waves, ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()])


def tokenizer(codec: str) -> ClassicalImage:
    name, _, source = NAMES[codec].partition(":")
    return FAMILIES[name].open(source)


def bare(tokens: Tokens) -> Tokens:
    return Tokens(tokens.codes, tokens.lengths, tokens.spec)


def changed(tokens: Tokens, data: bytes) -> Tokens:
    codes = torch.tensor(list(data), dtype=torch.int64)[None, None]
    return Tokens(codes, torch.tensor([len(data)]), tokens.spec, tokens.side)


@pytest.fixture(params=NAMES)
def codec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("size", [(64, 48), (33, 17), (1, 1), (1, 37), (37, 2)])
def test_files_come_back_with_their_size(codec, size):
    x = picture(*size)
    y = decode_image(encode_image(x, codec, 2 if codec == "jpeg2000" else 90), codec, size)
    assert y.shape == x.shape and y.dtype == torch.float32
    assert float(y.min()) >= 0 and float(y.max()) <= 1
    if min(size) > 2:  # chroma is halved; a turned or mirrored picture has under 14
        assert float(psnr(x[None], y[None])) > 15


def test_the_codes_are_the_files_bytes(codec):
    tok, x = tokenizer(codec), picture()
    tokens = tok.encode(x)
    data = encode_image(x, codec, tok.setting)
    assert tokens.codes.shape == (1, 1, len(data)) and bytes(tokens.codes[0, 0].tolist()) == data
    assert tokens.lengths.tolist() == [len(data)] and float(tokens.bits) == 8 * len(data)
    assert tok.spec.codebook_sizes == (256,) and tok.spec.num_tokens == 2**24 and tok.name == NAMES[codec]
    assert Image.open(io.BytesIO(data)).size == (48, 64)  # any reader of the format decodes it
    out = tok.decode(tokens)[0]
    assert torch.equal(out, decode_image(data, codec)) and float(psnr(x[None], out[None])) > 15
    assert tok.encode(x).codes.equal(tokens.codes) and tok.decode(tokens)[0].equal(out)


def test_more_bits_are_better():
    for codec, few, many in (("jpeg", 10, 90), ("webp", 10, 90), ("avif", 20, 90), ("jpeg2000", 40, 5)):
        coarse, fine = (FAMILIES[codec].open(str(s)) for s in (few, many))
        x = picture()
        a, b = coarse.encode(x), fine.encode(x)
        assert float(a.bits) < float(b.bits), codec
        assert float(psnr(x[None], coarse.decode(a))) < float(psnr(x[None], fine.decode(b))), codec
        assert a.spec.fingerprint != b.spec.fingerprint
        with pytest.raises(TokensError, match="these are ids of"):
            coarse.decode(b)


def test_the_ratio_of_jpeg2000_is_kept():
    x = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    for ratio in (5, 20, 40):
        assert 0.75 < float(FAMILIES["jpeg2000"].open(str(ratio)).encode(x).lengths) * ratio / 49152 < 1.01


def test_a_batch_is_its_items_alone(codec, tmp_path):
    tok = tokenizer(codec)
    grey, rgba = picture(20, 31)[1:2], torch.cat([picture(17, 9), torch.full((1, 17, 9), 0.5)])
    (tmp_path / "a.png").write_bytes(b"")
    Image.fromarray((picture(21, 22).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(tmp_path / "a.png")
    items = [picture(), grey, rgba, (picture(40, 8) * 255).byte().permute(1, 2, 0).numpy(), tmp_path / "a.png"]
    tokens = tok.encode(items)
    out = tok.decode(tokens)
    assert [tuple(y.shape) for y in out] == [(3, 64, 48), (1, 20, 31), (4, 17, 9), (3, 40, 8), (3, 21, 22)]
    for i, item in enumerate(items):
        alone = tok.encode(item)
        assert torch.equal(alone.codes, tokens[i].codes) and torch.equal(tok.decode(alone)[0], out[i])
        assert all(torch.equal(alone.side[k], tokens[i].side[k]) for k in tokens.side)
    assert bool((out[2][3] == 1).all())
    assert torch.equal(tokens[1].codes, tok.encode(grey.expand(3, -1, -1)).codes)
    assert torch.equal(tokens[2].codes, tok.encode(rgba[:3] * 0.5 + 0.5).codes)
    assert tok.decode(tokens[:2], size=(9, 70))[0].shape == (3, 9, 70)


def test_tokens_survive_a_file_and_the_ids_of_a_language_model(codec, tmp_path):
    tok = tokenizer(codec)
    tokens = tok.encode(picture())
    tokens.save(tmp_path / "t.safetensors")
    assert torch.equal(tok.decode(Tokens.load(tmp_path / "t.safetensors")), tok.decode(tokens))
    vocab = Vocab(100, image=tok.spec)
    (part,) = vocab.unpack(vocab.pack([tokens]))
    assert isinstance(part, Tokens) and torch.equal(tok.decode(part), tok.decode(tokens))
    assert torch.equal(tok.decode(bare(tokens)), tok.decode(tokens))  # the file knows its size


def test_every_prefix_decodes_or_says_why(codec):
    tok, x = tokenizer(codec), picture()
    whole = tok.encode(x)
    T, before = whole.codes.shape[2], ImageFile.LOAD_TRUNCATED_IMAGES
    scores = []
    for t in range(1, T):
        cut = whole.keep(num_tokens=t)
        if codec == "avif":
            with pytest.raises(TokensError, match="an AVIF file decodes whole only, and its end is missing"):
                tok.decode(cut)
            continue
        y = tok.decode(cut)
        assert y.shape == (1, 3, 64, 48) and float(y.min()) >= 0 and float(y.max()) <= 1
        scores.append(float(psnr(x[None], y)))
    assert before == ImageFile.LOAD_TRUNCATED_IMAGES
    if codec != "avif":
        full, quarter = float(psnr(x[None], tok.decode(whole))), len(scores) // 4
        first, last = (sum(part) / quarter for part in (scores[:quarter], scores[-quarter:]))
        assert first < last and scores[0] < full - 3  # what is added helps, and without it there is less
        grey = tok.decode(whole.keep(num_tokens=1))
        assert bool((grey == 128 / 255).all())
        with pytest.raises(TokensError, match="the size of the picture is not among its first 9 bytes"):
            tok.decode(bare(whole.keep(num_tokens=9)))
    assert torch.equal(tok.encode(x, num_tokens=30).codes, whole.keep(num_tokens=30).codes)


def test_a_cut_jpeg_is_right_above_the_cut_and_grey_below():
    tok, x = tokenizer("jpeg"), picture()
    whole = tok.encode(x)
    y, z = tok.decode(whole)[0], tok.decode(whole.keep(num_tokens=int(0.75 * whole.codes.shape[2])))[0]
    assert torch.equal(y[:, :8], z[:, :8]) and bool((z[:, -8:] == 128 / 255).all())


def test_damage_gives_a_picture_or_one_clear_error(codec):
    tok = tokenizer(codec)
    whole = tok.encode(picture())
    data, rng = bytes(whole.codes[0, 0].tolist()), np.random.default_rng(0)
    fine, errors = 0, []
    for trial in range(150):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data) if trial % 2 else 60, 1 + trial % 7):
            damaged[at] = rng.integers(256)
        if trial % 5 == 0:
            damaged[len(data) // 2 :] = rng.bytes(len(data) - len(data) // 2)
        tokens = changed(whole, bytes(damaged))
        for candidate in (tokens, bare(tokens)):
            try:
                y = tok.decode(candidate)[0]
            except TokensError as e:
                errors.append(str(e))
                continue
            assert bool(y.isfinite().all()) and (candidate is not tokens or y.shape == (3, 64, 48))
            fine += 1
    assert fine > 10 and len(errors) > 10
    assert all(e.startswith(f"{NAMES[codec]}: ") and "changed since" in e and "\n" not in e for e in errors)
    for nonsense in (b"\0" * 200, b"no picture at all" * 9, rng.bytes(500)):
        with pytest.raises(TokensError, match=f"{NAMES[codec]}: no .* file"):
            tok.decode(changed(whole, nonsense))
    other = tokenizer("webp" if codec == "jpeg" else "jpeg").encode(picture())
    with pytest.raises(TokensError, match=f"{NAMES[codec]}: no .* file"):
        tok.decode(changed(whole, bytes(other.codes[0, 0].tolist())))


def enlarged(codec: str, data: bytes, height: int, width: int) -> bytes:
    """The same file, declaring another size."""
    old = {"webp": struct.pack("<HH", 48, 64), "jpeg": struct.pack(">HH", 64, 48)}
    new = {"webp": struct.pack("<HH", width, height), "jpeg": struct.pack(">HH", height, width)}
    if codec in old:
        return data.replace(old[codec], new[codec], 1)
    count = 2 if codec == "jpeg2000" else 1  # picture and tile
    return data.replace(struct.pack(">II", 48, 64), struct.pack(">II", width, height), count)


def test_a_few_bytes_cannot_ask_for_gigabytes(codec):
    tok = tokenizer(codec)
    tokens = tok.encode(picture())
    large = enlarged(codec, bytes(tokens.codes[0, 0].tolist()), 12000, 14000)
    if codec == "jpeg2000":
        large = large.replace(struct.pack(">II", 48, 64), struct.pack(">II", 14000, 12000))
    with pytest.raises(TokensError, match="expected a picture of 64 x 48 px, the file says"):
        tok.decode(changed(tokens, large))
    with pytest.raises(TokensError, match=r"expected 1\.\.16777216 px where the size does not stand beside the file"):
        tok.decode(bare(changed(tokens, large)))
    tokens.side["height"] = tokens.side["width"] = torch.tensor([20000])
    with pytest.raises(TokensError, match=r"at most 178000000 px, got 20000 x 20000"):
        tok.decode(tokens)


@pytest.mark.parametrize("value", [0, -3, 2**62])
def test_nonsense_beside_the_codes_is_refused(value):
    tok = tokenizer("jpeg")
    for key in ("height", "width", "channels"):
        tokens = tok.encode(picture())
        tokens.side[key] = torch.tensor([value])
        with pytest.raises(TokensError, match=rf"side\['{key}'\]: expected an integer in .*got {value}"):
            tok.decode(tokens)


def test_arguments_of_sound_and_other_ids_are_refused(codec):
    tok, x = tokenizer(codec), picture(9, 8)
    tokens = tok.encode(x)
    with pytest.raises(ValueError, match="sample_rate is for audio"):
        tok.encode(x, 16000)
    with pytest.raises(ValueError, match="text was given"):
        tok.decode(tokens, text="a cat")
    with pytest.raises(ValueError, match=r"size: expected \(height, width\)"):
        tok.decode(tokens, size=(0, 3))
    with pytest.raises(ValueError, match=r"num_codebooks: expected 1\.\.1"):
        tok.encode(x, num_codebooks=2)
    with pytest.raises(ValueError, match="at least one image"):
        tok.encode([])
    tokens.codes[0, 0, -1] = 256
    with pytest.raises(TokensError, match=r"expected 0\.\.255, got 256"):
        tok.decode(tokens)
    with pytest.raises(ValueError, match=r"no weights to save; load it anywhere by mmtok\.load"):
        tok.save("x")
    assert tok.train().to("cpu").encode(x).codes.equal(tok.eval().encode(x).codes) and tok.device.type == "cpu"


@pytest.mark.parametrize("source", ["", "x", "-3", "1001", "50.5", "5 0"])
def test_a_missing_or_wrong_setting_names_the_legal_ones(codec, source):
    legal = {"jpeg": r"quality 1\.\.95", "jpeg2000": r"compression ratio against 24 bits a pixel 1\.\.1000"}
    pattern = rf"{codec}: expected {legal.get(codec, r'quality 0..100')} after the colon, e.g. '{codec}:\d+', got"
    with pytest.raises(ValueError, match=pattern):
        FAMILIES[codec].open(source)


def test_the_family_says_what_it_is(codec):
    family = FAMILIES[codec]
    assert family.modality == "image" and family.taxonomy.order == "file" and family.package == "pillow"
    assert "apt install" in family.install and family.weights_licence == "none: no weights"
    assert family.open(family.example.partition(":")[2]).name == family.example
    assert tokenizer(codec).licences == {"code": "MIT-CMU", "weights": "none: no weights"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_image(picture()[:1], "jpeg", 50), r"expected float \(3,H,W\)"),
        (lambda: encode_image((picture() * 255).byte(), "webp", 50), "divide uint8 by 255"),
        (lambda: encode_image(picture() * 255, "avif", 50), r"finite values in \[0,1\]"),
        (lambda: encode_image(picture() * torch.nan, "jpeg", 50), r"finite values in \[0,1\]"),
        (lambda: encode_image(picture(), "png", 50), "codec: expected one of"),
        (lambda: decode_image(b"", "png"), "codec: expected one of"),
        (lambda: encode_image(picture(), "jpeg", 0), "quality: expected 1..95"),
        (lambda: encode_image(picture(), "jpeg2000", 0), "compression ratio against 24 bits a pixel: expected 1..1000"),
        (lambda: encode_image(torch.zeros(3, 1, 16384), "webp", 50), "sides of at most 16383 px for webp"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_pillow_without_a_codec_is_named(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    for call in (lambda: encode_image(picture(), "avif", 50), lambda: tokenizer("avif")):
        with pytest.raises(ImportError, match="built without avif"):
            call()
    assert set(IMAGE_CODECS) == set(FAMILIES)
