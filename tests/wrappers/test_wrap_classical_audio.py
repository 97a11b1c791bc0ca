"""Opus, MP3 and Codec 2 as tokenizers: exact length, no delay, channels, prefixes, damage, the same bytes each time."""

from __future__ import annotations

import importlib.util
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import mmtok
from mmtok.data.audio import read_audio, resample
from mmtok.metrics.audio import align
from mmtok.tokens import Tokens, TokensError
from mmtok.vocab import Vocab
from mmtok.wrappers import classical_streams as streams
from mmtok.wrappers import ogg
from mmtok.wrappers.classical_audio import CODEC2, MP3_FAMILY, OPUS, ClassicalAudio
from mmtok.wrappers.classical_streams import OPUS_RATES, decode_opus, encode_opus

FAMILIES = {"opus": OPUS, "mp3": MP3_FAMILY, "codec2": CODEC2}
NAMES = ("opus:6000", "mp3:32000", "codec2:1200")
RATE = 16000
SPEECH = Path(mmtok.__file__).parent / "assets" / "speech.flac"
has_av, has_codec2 = (bool(importlib.util.find_spec(p)) for p in ("av", "pycodec2"))
pytestmark = pytest.mark.skipif(not (has_av and has_codec2), reason="needs the extras 'data' and 'codecs'")


def voice(samples: int = 24000, rate: int = RATE) -> Tensor:
    t = torch.arange(samples, dtype=torch.float64) / rate
    phase = 2 * math.pi * (120 * t + 3 * torch.sin(2 * math.pi * 1.5 * t))
    buzz = torch.stack([torch.sin(k * phase) / k for k in range(1, 12)]).sum(0)
    return (0.2 * buzz * (0.1 + torch.sin(2 * math.pi * 2 * t).abs())).float()[None]


def noise(channels: int, samples: int, seed: int = 0) -> Tensor:
    return torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed)).mul(0.1).clamp(-1, 1)


def opened(name: str) -> ClassicalAudio:
    family, _, source = name.partition(":")
    return FAMILIES[family].open(source)


def changed(tokens: Tokens, data: bytes) -> Tokens:
    codes = torch.tensor(list(data), dtype=torch.int64)[None, None]
    return Tokens(codes, torch.tensor([len(data)]), tokens.spec, tokens.side)


def data_of(tokens: Tokens) -> bytes:
    return bytes(tokens.codes[0, 0].tolist())


@pytest.fixture(params=NAMES)
def tok(request: pytest.FixtureRequest) -> ClassicalAudio:
    return opened(request.param)


def test_the_codes_are_bytes_at_the_nominal_rate(tok: ClassicalAudio):
    x = voice(2 * RATE)
    tokens = tok.encode(x, RATE)
    assert tok.spec.codebook_sizes == (256,) and tok.spec.frame_rate == tok.setting / 8
    assert tok.spec.bitrate_bps == tok.setting and tokens.codes.shape[:2] == (1, 1)
    assert float(tokens.bits) / 2 == pytest.approx(tok.setting, rel=0.3)  # Ogg's pages, or frames at the ends
    assert tok.encode(x, RATE).codes.equal(tokens.codes) and tok.decode(tokens)[0].equal(tok.decode(tokens)[0])
    assert tok.train().to("cpu").encode(x, RATE).codes.equal(tokens.codes) and tok.device.type == "cpu"
    with torch.autocast("cpu", torch.bfloat16):
        assert tok.encode(x, RATE).codes.equal(tokens.codes)


def test_the_opus_bytes_are_the_file_and_any_reader_plays_it():
    tok, x = opened("opus:6000"), voice()
    data = data_of(tok.encode(x, RATE))
    assert data == encode_opus(x, RATE, 6000).data and data[:4] == b"OggS"
    import av

    with av.open(io.BytesIO(data), format="ogg") as container:
        played = sum(frame.samples for frame in container.decode(audio=0))
    assert abs(played - 3 * x.shape[1]) < 10
    assert streams.opus_sound(data, most=100).shape == (1, 100)  # no more is decoded than is asked for


@pytest.mark.parametrize(("samples", "rate"), [(1, 96000), (161, 44100), (3000, 11025)])
def test_length_rate_and_channels_come_back(samples: int, rate: int):
    for name in ("opus:6000", "mp3:8000", "mp3:64000"):
        tok = opened(name)
        clips = [noise(1, samples), noise(2, samples + 3), noise(5, samples // 2 + 1)]
        for x, y in zip(clips, tok.decode(tok.encode(clips, rate)), strict=True):
            assert y.shape == x.shape and bool(y.isfinite().all()), name
    tok = opened("codec2:3200" if samples < 5000 else "codec2:700")
    x = noise(2, samples)
    assert tok.decode(tok.encode(x, rate))[0].shape == x.shape


def test_a_batch_is_its_items_alone(tok: ClassicalAudio):
    items = [voice(5000), noise(2, 3001), voice(800)]
    tokens = tok.encode(items, RATE)
    out = tok.decode(tokens)
    for i, item in enumerate(items):
        alone = tok.encode(item, RATE)
        assert torch.equal(alone.codes, tokens[i].codes) and torch.equal(tok.decode(alone)[0], out[i])
        assert all(torch.equal(alone.side[k], tokens[i].side[k]) for k in tokens.side)


def test_files_and_ids_of_a_language_model(tok: ClassicalAudio, tmp_path: Path):
    tokens = tok.encode(voice(6000), RATE)
    tokens.save(tmp_path / "t.safetensors")
    assert torch.equal(tok.decode(Tokens.load(tmp_path / "t.safetensors")), tok.decode(tokens))
    vocab = Vocab(100, audio=tok.spec)
    (part,) = vocab.unpack(vocab.pack([tokens]))
    assert isinstance(part, Tokens) and torch.equal(tok.decode(part), tok.decode(tokens))
    bare = tok.decode(Tokens(tokens.codes, tokens.lengths, tokens.spec))[0]  # at the decoder's own rate
    wanted = resample(tok.decode(tokens)[0], RATE, tok.sample_rate)
    length = 6000 * tok.sample_rate // RATE
    assert bare.shape[0] == 1 and 0 <= bare.shape[1] - length < 0.09 * tok.sample_rate
    assert float((bare[:, 500 : length - 500] - wanted[:, 500 : length - 500]).square().mean()) < 1e-4
    speech = tok.encode(SPEECH)
    assert speech.side["sample_rate"].tolist() == [read_audio(SPEECH)[1]]


@pytest.mark.parametrize("name", ["opus:24000", "mp3:8000", "mp3:32000", "mp3:64000"])
@pytest.mark.parametrize("rate", [8000, 22050])
def test_what_keeps_the_waveform_is_in_step(name: str, rate: int):
    tok, x = opened(name), voice(rate, rate)
    y = tok.decode(tok.encode(x, rate))[0]
    shift, _ = align(x[None], y[None], rate // 20)
    assert abs(int(shift)) <= max(1, 0.0005 * rate)  # what is left is the phase of Opus' high-pass filter
    chirp = 0.4 * torch.sin(2 * torch.pi * (200 * torch.arange(rate) / rate + 400 * (torch.arange(rate) / rate) ** 2))
    y = tok.decode(tok.encode(chirp[None], rate))[0][0]
    if name.startswith("mp3"):
        lags = np.correlate(y.numpy(), chirp.numpy()[50:-50], "valid")  # for shifts of -50 .. 50 samples
        assert int(lags.argmax()) - 50 == 0


@pytest.mark.parametrize("mode", streams.CODEC2_MODES)
def test_codec2_is_in_step_by_its_loudness(mode: int):
    """A vocoder keeps no waveform; the windows' positions give the delay, and loudness follows within 5 ms."""
    x = resample(*read_audio(SPEECH), 8000)[:1, :24000]
    tok = opened(f"codec2:{mode}")
    tokens = tok.encode(x, 8000)
    y = tok.decode(tokens)[0]
    kernel = torch.hann_window(401, periodic=False)[None, None]
    loud = [torch.nn.functional.conv1d(s.abs()[None], kernel / kernel.sum(), padding=200)[0, 0] for s in (x, y)]
    a, b = (v - v.mean() for v in loud)
    scores = [float((a[400:-400] * b[400 + lag : len(b) - 400 + lag]).sum()) for lag in range(-400, 400)]
    assert abs(int(np.argmax(scores)) - 400) <= 40
    best = max(scores) / float(a[400:-400].norm() * b[400:-400].norm())
    assert best > 0.85
    frame = 20 if mode >= 2400 else 40  # ms
    delay = streams.codec2_delay(mode)
    assert tokens.lengths.tolist() == [math.ceil(math.ceil((24000 + delay) / 8 / frame) * mode * frame / 8000)]


def test_channels_keep_their_places():
    rate = 24000
    for name, counts in (("opus:32000", range(2, 10)), ("mp3:64000", (2, 3, 4))):
        tok = opened(name)
        for C in counts:
            t = torch.arange(rate // 4) / rate
            x = torch.stack([0.3 * torch.sin(2 * torch.pi * (200 + 100 * c) * t) for c in range(C)])
            y = tok.decode(tok.encode(x, rate))[0]
            found = [round(4 * int(s.numpy().argmax())) for s in torch.fft.rfft(y).abs()]
            assert found == [200 + 100 * c for c in range(C)], (name, C)
            assert float((y.std(1) / x.std(1) - 1).abs().max()) < 0.15
    tok, x = opened("codec2:3200"), torch.cat([voice(4000, 8000), noise(1, 4000)])
    both, first = tok.encode(x, 8000), tok.encode(x[:1], 8000)
    turns = np.frombuffer(data_of(both), np.uint8).reshape(-1, 2, 8)
    assert turns[:, 0].tobytes() == data_of(first) and turns[:, 1].tobytes() == data_of(tok.encode(x[1:], 8000))
    assert torch.equal(tok.decode(both)[0][0], tok.decode(first)[0][0])


def test_every_prefix_is_the_beginning(tok: ClassicalAudio):
    x = voice(9000)
    tokens = tok.encode(x, RATE)
    whole, T, lengths = tok.decode(tokens)[0], tokens.codes.shape[2], []
    assert tok.encode(x, RATE, num_tokens=9).codes.equal(tokens.keep(num_tokens=9).codes)
    for t in range(1, T, max(1, T // 9)):
        part = tok.decode(tokens.keep(num_tokens=t))[0]
        lengths.append(part.shape[1])
        sure = max(0, part.shape[1] - 300)  # the last packet lacks what overlaps with the next, and resampling has ends
        if sure:
            assert float((part[:, :sure] - whole[:, :sure]).abs().max()) < 2e-3
    assert lengths == sorted(lengths) and lengths[0] == 0 and len(set(lengths)) > 3 and lengths[-1] <= 9000
    half = tok.decode(tokens.keep(num_tokens=T // 2))[0].shape[1]
    assert 2000 < half < 7000 and tok.decode(tokens).shape == (1, 1, 9000)
    empty = Tokens(tokens.codes[..., :0], torch.tensor([0]), tokens.spec, tokens.side)
    assert tok.decode(empty).shape == (1, 1, 0)


def test_more_bits_are_better():
    x = resample(*read_audio(SPEECH), RATE)[:1, :RATE]
    for few, many in (("opus:6000", "opus:48000"), ("mp3:16000", "mp3:128000")):
        errors = []
        for name in (few, many):
            tok = opened(name)
            y = tok.decode(tok.encode(x, RATE))[0]
            errors.append(float((x - y * (x * y).sum() / y.square().sum()).square().mean()))
        assert errors[1] < 0.3 * errors[0], few
    assert len({opened(n).fingerprint for n in (*NAMES, "opus:48000", "mp3:16000")}) == 5


def test_damage_gives_sound_or_one_clear_error():
    for name in ("opus:6000", "mp3:32000"):
        tok = opened(name)
        tokens = tok.encode(voice(9000), RATE)
        data, rng = data_of(tokens), np.random.default_rng(0)
        errors = 0
        for trial in range(60):
            damaged = bytearray(data)
            for at in rng.integers(0, len(data) if trial % 2 else 60, 1 + trial % 7):
                damaged[at] = rng.integers(256)
            if trial % 5 == 0:
                damaged[len(data) // 2 :] = rng.bytes(len(data) - len(data) // 2)
            with_side = changed(tokens, bytes(damaged))
            for candidate in (with_side, Tokens(with_side.codes, with_side.lengths, tokens.spec)):
                try:
                    y = tok.decode(candidate)[0]
                except TokensError:
                    errors += 1
                else:
                    assert bool(y.isfinite().all()) and y.shape[1] <= 9000 * 48000 // RATE + 5760
        assert errors > 20
        for nonsense in (b"no sound at all" * 20, b"\0" * 300, rng.bytes(400)):
            with pytest.raises(TokensError, match=rf"{name}: .*changed since they were encoded"):
                tok.decode(changed(tokens, nonsense))
    tok = opened("codec2:1200")
    tokens = tok.encode(voice(9000), RATE)
    y = tok.decode(changed(tokens, np.random.default_rng(0).bytes(tokens.codes.shape[2])))
    assert y.shape == (1, 1, 9000) and bool(y.isfinite().all())  # every bit pattern is speech of some kind


def test_a_decoder_that_dies_is_an_error_not_a_crash(monkeypatch: pytest.MonkeyPatch):
    tok = opened("codec2:1200")
    tokens = tok.encode(voice(3000), RATE)
    monkeypatch.setattr(streams, "CODEC2_DECODER", "import os; os.abort()")
    with pytest.raises(TokensError, match=r"codec2:1200: Codec 2 does not decode these \d+ bytes \(exit code -6\)"):
        tok.decode(tokens)


@pytest.mark.parametrize("value", [0, -3, 2**62])
def test_nonsense_beside_the_codes_is_refused_or_harmless(tok: ClassicalAudio, value: int):
    for key in ("num_samples", "sample_rate", "channels"):
        tokens = tok.encode(voice(3000), RATE)
        tokens.side[key] = torch.tensor([value])
        if key == "num_samples" and value >= 0:  # a length above what the stream tells is cut to it
            assert tok.decode(tokens)[0].shape[1] <= 3000 + 0.13 * RATE
            continue
        with pytest.raises(TokensError, match=rf"side\['{key}'\]: expected an integer in .*got {value}"):
            tok.decode(tokens)
    if not tok.name.startswith("codec2"):
        tokens = tok.encode(voice(3000), RATE)
        tokens.side["channels"] = torch.tensor([2])
        with pytest.raises(TokensError, match=r"expected .*2 channels"):
            tok.decode(tokens)


def test_arguments_of_pictures_and_other_ids_are_refused(tok: ClassicalAudio):
    tokens = tok.encode(voice(2000), RATE)
    with pytest.raises(ValueError, match="sample_rate: mandatory"):
        tok.encode(voice(2000))
    with pytest.raises(ValueError, match="size: for images only"):
        tok.decode(tokens, size=(4, 4))
    with pytest.raises(ValueError, match="text was given"):
        tok.encode(voice(2000), RATE, text="hello")
    with pytest.raises(ValueError, match="at least one"):
        tok.encode([], RATE)
    with pytest.raises(ValueError, match=r"num_codebooks: expected 1\.\.1"):
        tok.encode(voice(2000), RATE, num_codebooks=2)
    other = opened("opus:8000" if tok.name != "opus:8000" else "mp3:8000").encode(voice(2000), RATE)
    with pytest.raises(TokensError, match="these are ids of"):
        tok.decode(other)
    with pytest.raises(ValueError, match="no weights to save"):
        tok.save("x")
    assert tok.timing() == {"samples_a_byte": tok.sample_rate * 8 / tok.setting, "streams": False}
    assert tok.encode(2 * voice(2000), RATE).codes.shape[2] > 0  # a peak above 1 is clipped, not refused


@pytest.mark.parametrize("source", ["", "x", "-3", "7", "6000.5", "999999"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_missing_or_wrong_setting_names_the_legal_ones(family, source: str):
    with pytest.raises(ValueError, match=rf"{family.name}: expected .*\d+.* after the colon, e.g. '{family.example}'"):
        family.open(source)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_family_says_what_it_is(family):
    assert family.modality == "audio" and family.taxonomy.streamable and "LGPL" in family.code_licence
    assert "pip install" in family.install and "apt install" in family.install
    tok = family.open(family.example.partition(":")[2])
    assert tok.name == family.example
    assert tok.licences == {"code": family.code_licence, "weights": "none: no weights"}


@pytest.mark.parametrize("setting", streams.MP3_SETTINGS)
def test_every_bitrate_of_mp3_holds_mono_and_stereo(setting: int):
    rate = streams.MP3_SETTINGS[setting]
    for C in (1, 2):
        frames, channels = streams.mp3_frames(streams.encode_mp3(noise(C, rate // 2), setting), rate)
        assert channels == C
        seconds = len(frames) * (1152 if rate >= 32000 else 576) / rate
        assert 8 * sum(map(len, frames)) / seconds == pytest.approx(setting * C, rel=0.01)


@pytest.mark.parametrize("frame_ms", [20, 60])
@pytest.mark.parametrize("samples", [1, 100, 321, 7999, 16000, 24001])
def test_opus_gives_back_exactly_the_samples(samples: int, frame_ms: int):
    x = voice(samples)
    encoded = encode_opus(x, RATE, 6000, frame_ms)
    y = decode_opus(encoded.data, RATE, samples)
    assert y.shape == x.shape and y.dtype == torch.float32
    assert 0 < encoded.payload_bytes < len(encoded.data) and encoded.data[:4] == b"OggS"
    assert encoded.packets >= samples / RATE / (frame_ms / 1000)
    assert encode_opus(x, RATE, 6000, frame_ms).data == encoded.data  # the serial number is not drawn


@pytest.mark.parametrize("rate", OPUS_RATES)
def test_opus_is_in_step(rate: int):
    x = voice(rate, rate)
    y = decode_opus(encode_opus(x, rate, 24000, 20).data, rate, rate)
    shift, _ = align(x[None], y[None], rate // 50)  # the encoder's 6.5 ms of lookahead are 104 samples at 16 kHz
    assert abs(int(shift)) < 0.0005 * rate  # what is left is the phase of its high-pass filter


def test_the_pages_of_ogg():
    data = encode_opus(voice(48000), RATE, 24000, 20).data
    found = list(ogg.pages(data))
    assert len(found) > 4 and all(p.whole and p.serial == ogg.SERIAL for p in found)
    packets, end = ogg.packets(data)
    assert packets[0][:8] == b"OpusHead" and packets[1][:8] == b"OpusTags" and len(packets) == 2 + 151
    assert end is not None and end - 312 == 3 * 48000
    assert ogg.with_serial(data, 7) != data and ogg.with_serial(ogg.with_serial(data, 7)) == data
    some, end = ogg.packets(data[: found[3].end + 40])  # cut in a page: what is whole of it counts
    assert end is None and packets[: len(some)] == some and len(some) > 52
    with pytest.raises(ValueError, match="page at byte 0 was changed"):
        ogg.packets(data[:30] + b"?" + data[31:])
    with pytest.raises(ValueError, match="one stream, got several"):
        ogg.packets(data + ogg.with_serial(data, 2))
    with pytest.raises(ValueError, match="no Ogg page at byte"):
        ogg.packets(data + b"what is this")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_opus(voice(), 44100, 6000), "sample_rate: expected one of"),
        (lambda: encode_opus(voice(), RATE, 6000, 30), "frame_ms: expected one of"),
        (lambda: encode_opus(voice(), RATE, 6), r"bitrate_bps: expected 500\.\.256000"),
        (lambda: encode_opus(voice(), RATE, 6000, 60, "music"), "application: expected voip or audio"),
        (lambda: encode_opus(voice()[0], RATE, 6000), r"expected float \(C,L\) with C up to 32"),
        (lambda: encode_opus(voice() * 100, RATE, 6000), r"finite samples in \[-1,1\]"),
        (lambda: encode_opus(voice() * torch.nan, RATE, 6000), r"finite samples in \[-1,1\]"),
        (lambda: decode_opus(b"no sound at all" * 20, RATE, 100), "expected an Ogg Opus file"),
        (lambda: decode_opus(b"", RATE, 100), "got one without a frame"),
        (lambda: decode_opus(encode_opus(voice(8000), RATE, 6000).data, RATE, 7000), "mono file of 7000 samples"),
        (lambda: streams.encode_mp3(voice(), 31000), "bitrate_bps: expected one of"),
        (lambda: streams.mp3_sound(streams.encode_mp3(voice(), 32000), 16000), "expected MP3 frames of 16000 Hz"),
        (lambda: streams.encode_codec2(voice(), 450), r"mode: expected one of .*700 is 700C"),
    ],
)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "pycodec2", None)
    for name in ("opus:6000", "mp3:32000"):
        with pytest.raises(ImportError, match=r"pip install 'mmtok\[data\]'"):
            opened(name)
    with pytest.raises(ImportError, match=r"pip install 'mmtok\[codecs\]'"):
        opened("codec2:1200")
