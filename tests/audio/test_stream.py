"""Streams: any pieces give the codes and the samples of the whole, in a state that does not grow."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtok.audio.codec import AudioCodec
from mmtok.audio.resampling import StreamResampler
from mmtok.audio.stream import DecodeStreamer, EncodeStreamer
from mmtok.data.audio import resample
from mmtok.layers.conv1d import Past
from mmtok.layers.spectrum import Spectrum
from mmtok.tokenizer import AudioTokenizer
from mmtok.tokens import Tokens, TokensError

FRONTS = ("samples", "stft", "stft-one-hop")
HOP = 32
RATE = 16000


@functools.cache
def codec(front: str, causal: bool = True) -> AudioCodec:
    torch.manual_seed(len(front))
    strides = {"samples": (4, 4, 2), "stft": (8, 2, 2), "stft-one-hop": (32,)}[front]
    tok = AudioCodec(
        strides=strides,
        encoder_width=4,
        decoder_width=16,
        latent_dim=6,
        num_codebooks=3,
        codebook_size=16,
        dilations=(1, 3),
        kernel_size=3,
        causal=causal,
        front=front.partition("-")[0],
    )
    with torch.no_grad():
        for q in range(3):
            tok.quantizer._book(q).codebook.mul_(0.3)
    return tok.eval()


def sound(channels: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(channels, length, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3) * 0.2


def cut(x: Tensor, sizes: list[int]) -> list[Tensor]:
    """x (C, L) in pieces of these sizes, over and over; a 0 gives an empty piece."""
    parts, start, i = [], 0, 0
    while start < x.shape[1]:
        size = sizes[i % len(sizes)]
        parts.append(x[:, start : start + size])
        start, i = start + size, i + 1
    return parts


def streamed(
    tok: AudioCodec, parts: list[Tensor], rate: int = RATE, levels: int | None = None
) -> tuple[Tokens, Tensor]:
    """Pieces of sound through both streamers: all Tokens joined, and the sound."""
    encoder, decoder = tok.streamer(levels), tok.decode_streamer()
    tokens = [t for t in (*(encoder.push(p, rate) for p in parts), encoder.flush()) if t is not None]
    samples = [*(decoder.push(t) for t in tokens), decoder.flush()]
    return Tokens.join(tokens), torch.cat(samples, 1)


def assert_same(tokens: Tokens, y: Tensor, tok: AudioCodec, x: Tensor, rate: int = RATE, levels: int | None = None):
    whole = tok.encode(x, rate, num_codebooks=levels)
    assert torch.equal(tokens.codes, whole.codes) and torch.equal(tokens.lengths, whole.lengths)
    assert tokens.spec == whole.spec
    assert {k: v.tolist() for k, v in tokens.side.items()} == {k: v.tolist() for k, v in whole.side.items()}
    offline = tok.decode(whole)[0]
    assert y.shape == offline.shape == x.shape
    assert torch.allclose(y, offline, atol=1e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(
    front=st.sampled_from(FRONTS),
    length=st.integers(1, 9 * HOP),
    channels=st.integers(1, 3),
    sizes=st.lists(st.integers(0, 3 * HOP), min_size=1, max_size=6).filter(any),
    levels=st.sampled_from([None, 1, 2]),
)
def test_any_pieces_equal_the_whole(front: str, length: int, channels: int, sizes: list[int], levels: int | None):
    x = sound(channels, length, seed=length)
    tokens, y = streamed(codec(front), cut(x, sizes), levels=levels)
    assert_same(tokens, y, codec(front), x, levels=levels)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("length", [1, HOP - 1, HOP, HOP + 1, 3 * HOP])
def test_sample_by_sample(front: str, length: int):
    tok, x = codec(front), sound(1, length)
    assert len(tok.encode(sound(1, 999), RATE).codes.unique()) > 4, "else equal codes would say nothing"
    assert_same(*streamed(tok, cut(x, [1])), tok, x)


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_other_rates_are_resampled_in_the_stream(rate: int):
    tok, x = codec("stft"), sound(2, rate // 20 + 7, seed=rate)
    tokens, y = streamed(tok, cut(x, [5, rate // 100, 0, 1, 333]), rate)
    assert_same(tokens, y, tok, x, rate)
    alone, y = streamed(tok, [x], rate)
    assert_same(alone, y, tok, x, rate)


@pytest.mark.parametrize(
    ("rates", "length"),
    [((44100, 16000), 3001), ((16000, 44100), 1500), ((8000, 16000), 1), ((48000, 16000), 601), ((1013, 1009), 2500)],
)
def test_resampled_pieces_equal_the_whole(rates: tuple[int, int], length: int):
    x = sound(2, length)
    resampler = StreamResampler(*rates)
    ready: list[int] = []
    parts = []
    for piece in cut(x, [1, 160, 3, 441]):
        parts.append(resampler.push(piece))
        ready.append(resampler.received - resampler.given * rates[0] // rates[1])
        assert resampler._window.shape[1] <= 2 * (resampler.period + resampler.reach) + 500 + resampler.wait
    y = torch.cat([*parts, resampler.flush()], 1)
    whole = resample(x, *rates)
    assert y.shape == whole.shape and torch.allclose(y, whole, atol=1e-6, rtol=0)
    assert max(ready) <= resampler.latency_seconds * rates[0] + 441 + 1


def test_rates_without_a_table_of_filters_go_a_second_at_a_time():
    resampler = StreamResampler(4099, 4093)
    assert resampler.wait == 4099 and 1 < resampler.latency_seconds < 1.02
    x = sound(1, 4500)
    y = torch.cat([resampler.push(x[:, :300]), resampler.push(x[:, 300:4098])], 1)
    assert y.shape == (1, 0)
    y = torch.cat([resampler.push(x[:, 4098:4300]), resampler.push(x[:, 4300:]), resampler.flush()], 1)
    assert torch.allclose(y, resample(x, 4099, 4093), atol=1e-6, rtol=0)


@pytest.mark.parametrize("front", FRONTS)
def test_the_state_does_not_grow(front: str):
    tok, encoder, decoder = codec(front), codec(front).streamer(), codec(front).decode_streamer()

    def size() -> int:
        waiting = sum(t.untyped_storage().nbytes() for t in (encoder._waiting, decoder._waiting, decoder._codes))
        kept = [t for past in (encoder.past, decoder.past) for t in past.kept.values()]
        return waiting + sum(t.untyped_storage().nbytes() for t in kept)  # storage: a view would keep more alive

    x, sizes = sound(1, 11), []
    for i in range(1000):
        tokens = encoder.push(x)
        if tokens is not None:
            decoder.push(tokens)
        if i >= 30:
            sizes.append(size())
    assert max(sizes) <= min(sizes) + 4 * (HOP + tok.encode_lookahead)
    assert encoder.samples_in == 11000 and encoder.frames > 340


def test_a_long_piece_is_worked_on_in_bounded_parts():
    tok = codec("stft")
    seen: list[int] = []
    hook = tok.encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[-1]))
    tok.stream_frames, before = 7, tok.stream_frames
    try:
        x = sound(1, 40 * HOP)
        result = streamed(tok, [x])
        assert max(seen) == 7 * 4 and len(seen) >= 5
    finally:
        hook.remove()
        tok.stream_frames = before
    assert_same(*result, tok, x)


def test_frames_come_as_soon_as_the_latency_says():
    for front, ahead in (("samples", 0), ("stft", 12), ("stft-one-hop", 48)):
        tok = codec(front)
        encoder, decoder = tok.streamer(), tok.decode_streamer()
        assert (encoder.latency_samples, decoder.latency_samples) == (HOP + ahead, ahead)
        assert encoder.latency_seconds == (HOP + ahead) / RATE
        assert encoder.push(sound(1, encoder.latency_samples - 1)) is None
        tokens = encoder.push(sound(1, 1))
        assert tokens is not None and tokens.lengths.tolist() == [1]
        assert decoder.push(tokens).shape[1] == max(0, HOP - ahead)
        assert tok.timing()["latency_samples"] == {"encoder": HOP + ahead, "decoder": ahead}
    slow = codec("samples").streamer()
    slow.push(sound(1, 1), 8000)
    assert slow.latency_samples == HOP + 2 * 68 and slow.latency_seconds > slow.network_latency / RATE


def test_time_is_measured():
    encoder, decoder = codec("samples").streamer(), codec("samples").decode_streamer()
    assert math.isnan(encoder.real_time_factor) and encoder.seconds_in == 0
    tokens = encoder.push(sound(1, 100 * HOP))
    assert tokens is not None
    decoder.push(tokens)
    for stream in (encoder, decoder):
        assert stream.seconds_in == 100 * HOP / RATE and 0 < stream.seconds_of_compute < 60
        assert stream.real_time_factor == stream.seconds_of_compute / stream.seconds_in


def test_tokens_one_position_at_a_time_as_a_language_model_writes_them():
    tok = codec("stft")
    for side in (True, False):
        x = sound(2 if side else 1, 9 * HOP)
        whole = tok.encode(x, RATE)
        whole = whole if side else Tokens(whole.codes, whole.lengths, whole.spec)
        decoder, out = tok.decode_streamer(), []
        for t in range(whole.codes.shape[2]):
            extra = whole.side | {"num_samples": torch.tensor([HOP // 2])} if side else {}
            out.append(decoder.push(Tokens(whole.codes[..., t : t + 1], torch.tensor([1]), whole.spec, extra)))
        out.append(decoder.flush())
        assert torch.allclose(torch.cat(out, 1), tok.decode(whole)[0], atol=1e-5)


def test_a_prefix_of_the_tokens_gives_the_beginning():
    tok, x = codec("stft"), sound(1, 9 * HOP + 3)
    prefix = tok.encode(x, RATE).keep(num_tokens=4)
    decoder = tok.decode_streamer()
    y = torch.cat([decoder.push(prefix), decoder.flush()], 1)
    assert torch.allclose(y, tok.decode(prefix)[0], atol=1e-5) and y.shape[1] == 4 * HOP


def test_input_as_array_as_int16_and_without_channels():
    tok = codec("samples")
    x = (sound(1, 3 * HOP) * 20000).round().clamp(-32768, 32767).to(torch.int16)
    whole = tok.encode(x, RATE).codes
    for form in (x, x[0], x.numpy(), x.numpy().astype(np.float32) / 32768):
        tokens = tok.streamer().push(form)
        assert tokens is not None and torch.equal(tokens.codes, whole)


def test_two_streams_of_one_tokenizer_do_not_meet():
    tok, xs = codec("stft"), [sound(1, 5 * HOP, seed=s) for s in (1, 2)]
    streams = [tok.streamer() for _ in xs]
    pieces: list[list[Tokens]] = [[], []]
    for start in range(0, 5 * HOP, 20):
        for i, (stream, x) in enumerate(zip(streams, xs, strict=True)):
            pieces[i] += [t for t in [stream.push(x[:, start : start + 20])] if t is not None]
    for i, (stream, x) in enumerate(zip(streams, xs, strict=True)):
        pieces[i] += [t for t in [stream.flush()] if t is not None]
        assert torch.equal(Tokens.join(pieces[i]).codes, tok.encode(x, RATE).codes)


def test_a_stream_leaves_the_mode_as_it_was():
    tok = codec("samples")
    tok.train()
    try:
        tokens = tok.streamer().push(sound(1, 4 * HOP))
        assert tok.training and tok.encoder.training and tokens is not None and not tokens.codes.requires_grad
    finally:
        tok.eval()


def test_nothing_gives_nothing():
    tok = codec("stft")
    encoder, decoder = tok.streamer(), tok.decode_streamer()
    assert encoder.push(torch.zeros(1, 0)) is None and encoder.flush() is None
    assert decoder.flush().shape == (1, 0)


def test_after_the_flush_a_push_is_an_error():
    tok = codec("samples")
    encoder, decoder = tok.streamer(), tok.decode_streamer()
    tokens = encoder.push(sound(1, 2 * HOP))
    assert tokens is not None
    decoder.push(tokens)
    encoder.flush()
    decoder.flush()
    for call in (lambda: encoder.push(sound(1, 5)), encoder.flush, lambda: decoder.push(tokens), decoder.flush):
        with pytest.raises(ValueError, match="this stream has ended"):
            call()


@pytest.mark.parametrize(
    ("x", "rate", "message"),
    [
        ([0.0], None, "expected an array or a tensor of samples"),
        (torch.zeros(2, 3, 4), None, r"expected \(n,\) or \(C, n\) with C in 1..32, got shape \(2, 3, 4\)"),
        (torch.zeros(40, 3), None, "transpose it"),
        (torch.zeros(1, 3, dtype=torch.int32), None, "expected int16 or float"),
        (torch.tensor([float("nan")]), None, "expected finite samples"),
        (torch.tensor([300.0]), None, "got a peak of 300"),
        (torch.zeros(2, 3), None, "channels: expected 1 as in the pieces before, got 2"),
        (torch.zeros(1, 3), 8000, "sample_rate: expected 16000 as in the pieces before, got 8000"),
        (torch.zeros(1, 3), 1.5, "expected whole Hz"),
    ],
)
def test_bad_sound_is_refused_and_the_stream_goes_on(x: object, rate: int | None, message: str):
    tok = codec("samples")
    encoder, good = tok.streamer(), sound(1, 2 * HOP)
    encoder.push(good[:, :10])
    with pytest.raises(ValueError, match=message):
        encoder.push(x, rate)
    tokens = encoder.push(good[:, 10:])
    assert tokens is not None and torch.equal(tokens.codes, tok.encode(good, RATE).codes)


def test_bad_tokens_are_refused():
    tok = codec("samples")
    tokens = tok.encode(sound(1, 3 * HOP), RATE)

    def begun() -> DecodeStreamer:
        decoder = tok.decode_streamer()
        decoder.push(tokens)
        return decoder

    stereo = Tokens(tokens.codes, tokens.lengths, tokens.spec, tokens.side | {"channels": torch.tensor([3])})
    for bad, message in (
        (Tokens.concat([tokens, tokens]), "Tokens of one item, got 2"),
        (codec("stft").encode(sound(1, 99), RATE), "decode them with the tokenizer that made them"),
        (tokens.keep(num_codebooks=1), "expected 3 levels as in the pieces before, got 1"),
        (Tokens(tokens.codes, tokens.lengths, tokens.spec), "num_samples in every piece of a stream or in none"),
        (stereo, "channels: expected 1 as in the pieces before, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            begun().push(bad)
    ended = tok.decode_streamer()
    ended.push(tok.encode(sound(1, 3 * HOP - 5), RATE))
    with pytest.raises(TokensError, match="end their sound after 91 of 96 samples"):
        ended.push(tokens)
    with pytest.raises(ValueError, match=r"num_codebooks: expected 1\.\.3"):
        tok.streamer(4)


def test_what_looks_ahead_cannot_stream():
    for front in FRONTS:
        tok = codec(front, causal=False)
        assert not tok.timing()["streams"] and "latency_samples" not in tok.timing()
        for make in (tok.streamer, tok.decode_streamer):
            with pytest.raises(ValueError, match=r"not causal.*cannot stream; use (en|de)code, which already works"):
                make()
        with pytest.raises(ValueError, match="looks ahead"):
            tok.latent(torch.zeros(1, 1, 40 * HOP + tok.encode_lookahead), past=Past())
    plain = AudioTokenizer({})
    plain.name = "plain"
    for make in (plain.streamer, plain.decode_streamer):
        with pytest.raises(ValueError, match="plain is not causal"):
            make()
    assert isinstance(codec("samples").streamer(), EncodeStreamer)


def test_pieces_of_a_batch_join_item_by_item():
    tok = codec("samples")
    first, second = ([sound(1, n * HOP, seed=n + s) for n in sizes] for s, sizes in enumerate([(3, 1), (1, 2)]))
    a, b = tok.encode(first, RATE), tok.encode(second, RATE)
    joined = Tokens.join([a, b])
    assert joined.lengths.tolist() == [4, 3] and joined.side["num_samples"].tolist() == [4 * HOP, 3 * HOP]
    for i, (m, n) in enumerate([(3, 1), (1, 2)]):
        assert torch.equal(joined.codes[i, :, : m + n], torch.cat([a.codes[i, :, :m], b.codes[i, :, :n]], 1))
    assert int(joined.codes[1, :, 3:].sum()) == 0 and torch.equal(Tokens.join([a]).codes, a.codes)


def test_pieces_of_different_streams_do_not_join():
    tok = codec("samples")
    piece = tok.encode(sound(1, 2 * HOP), RATE)
    for other, message in (
        (tok.encode(sound(1, 99), 8000), r"pieces whose side differs in \['sample_rate'\]"),
        (piece.keep(1), "pieces of one stream"),
        (Tokens.concat([piece, piece]), "got 'codec', 2 items"),
        (Tokens(piece.codes, piece.lengths, piece.spec), r"side \[\]; Tokens.concat joins clips"),
    ):
        with pytest.raises(TokensError, match=message):
            Tokens.join([piece, other])
    with pytest.raises(TokensError, match="at least one Tokens"):
        Tokens.join([])


@pytest.mark.parametrize("hop", [2, 8])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 11])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_the_spectrum_in_pieces_is_the_whole(hop: int, frames: int, step: int):
    spectrum, x = Spectrum(hop), sound(2, hop * frames)[:, None]
    whole, edge = spectrum.analyse(x), spectrum.edge
    padded, past, parts = torch.nn.functional.pad(x, (0, edge)), Past(), []
    for start in range(0, frames, step):
        stop = min(start + step, frames)
        parts.append(spectrum.analyse(padded[..., start * hop + (edge if start else 0) : stop * hop + edge], past))
    torch.testing.assert_close(torch.cat(parts, -1), whole)  # roots are rounded by where they lie in memory
    past, out = Past(), []
    for start in range(0, frames, step):
        out.append(spectrum.synthesise(whole[..., start : start + step], past=past))
    rest = spectrum.synthesise_rest(past)
    assert 0 < rest.shape[-1] <= edge
    torch.testing.assert_close(torch.cat([*out, rest], -1), spectrum.synthesise(whole))
    with pytest.raises(ValueError, match=f"expected a multiple of {hop} samples, and {edge} more in the first piece"):
        spectrum.analyse(x[..., : hop // 2], Past())
