"""Sound while ids arrive: the pieces are the decode of the whole, as early as can be, and damage is told."""

from __future__ import annotations

import functools
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtok.lm import streaming
from mmtok.lm.decoding import generate
from mmtok.lm.sounds import fields_of
from mmtok.lm.streaming import AudioFromIds, Event, PlayIds
from mmtok.tokenizer import AudioTokenizer
from mmtok.tokens import Tokens, TokenSpec
from mmtok.vocab import Vocab

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from tiny_models import build, noise

QUICK = settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.too_slow])
NAMES = ["codec-causal", "codec-centred", "codec-spectral"]
IMAGE = TokenSpec("image-x", "image", (3, 5), num_tokens=4, fingerprint="image")


@functools.cache
def tiny(name: str) -> AudioTokenizer:
    tok = build(name)
    assert isinstance(tok, AudioTokenizer)
    return tok


@functools.cache
def clip(name: str, samples: int, channels: int = 1, rate: int = 16000) -> Tokens:
    return tiny(name).encode(noise(channels, samples), sample_rate=rate)


class Letters:
    """A text tokenizer of UTF-8 bytes."""

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode("utf-8", "replace")


def vocab_of(name: str, layout: str = "flatten", text: object = 4) -> Vocab:
    return Vocab(text, image=IMAGE, audio=tiny(name).spec, layout={"audio": layout})  # type: ignore[arg-type]


def hear(reader: AudioFromIds, ids: list[int], rng: random.Random | None = None) -> Tensor:
    """All sound of the ids, pushed one by one or in pieces."""
    out, at = [torch.zeros(1, 0)], 0
    while at < len(ids):
        n = 1 if rng is None else rng.randint(1, 60)
        out.append(reader.push(ids[at] if n == 1 else ids[at : at + n]))
        at += n
    out.append(reader.flush())
    return torch.cat([s for s in out if s is not None and s.numel()] or [torch.zeros(1, 0)], 1)


def decoded(name: str, tokens: Tokens) -> Tensor:
    return tiny(name).decode(tokens)[0]


# ------------------------------------------------------------------------------------------------- the sound is exact


@pytest.mark.parametrize("name", NAMES)
@QUICK
@given(st.sampled_from(["flatten", "delay", "partial_delay", "coarse_first"]), st.booleans(), st.integers(0, 2**32))
def test_what_sounds_is_the_decode_of_the_whole(name, layout, header, seed):
    rng = random.Random(seed)
    tokens = clip(name, rng.choice([1, 900, 12801, 16000]))
    tokens = tokens.keep(num_codebooks=rng.choice([1, 2, 3]))
    vocab = vocab_of(name, layout)
    ids = vocab.pack([[1, 2], tokens, [3]], header=header)
    reader = AudioFromIds(vocab, tiny(name), window=rng.choice([None, 1, 5]))
    if rng.random() < 0.3 and not header:
        reader = AudioFromIds(vocab, tiny(name), num_codebooks=tokens.spec.num_codebooks)
    got = hear(reader, ids, rng if rng.random() < 0.7 else None)
    want = decoded(name, vocab.unpack(ids)[1])
    assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5)
    assert reader.report.ok


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "rate"), [(2, 16000), (1, 8000), (2, 24000)])
def test_a_header_of_several_channels_and_another_rate_is_obeyed(name, channels, rate):
    tokens = clip(name, 5001, channels, rate)
    vocab = vocab_of(name, "delay")
    got = hear(AudioFromIds(vocab, tiny(name)), vocab.pack([tokens]))
    want = decoded(name, tokens)
    assert got.shape == want.shape == (channels, 5001) and torch.allclose(got, want, atol=1e-5)


def test_several_sounds_and_pictures_follow_each_other():
    name, events = "codec-causal", []
    vocab = vocab_of(name, "delay", Letters())
    first, second = clip(name, 1300), clip(name, 700)
    picture = Tokens(torch.tensor([[[0, 2], [4, 1]]]), torch.tensor([2]), IMAGE)
    ids = vocab.pack(["a é", first, second, picture, "b"])
    reader = AudioFromIds(vocab, tiny(name), on_event=events.append)
    got = hear(reader, ids)
    assert torch.allclose(got, torch.cat([decoded(name, first), decoded(name, second)], 1), atol=1e-5)
    assert "".join(e.text for e in events if e.kind == "text") == "a éb"
    assert [e.ids for e in events if e.kind == "text"] == [(97,), (32,), (0xC3, 0xA9), (98,)]
    kinds = [e.kind for n, e in enumerate(events) if n == 0 or e.kind != events[n - 1].kind]
    assert kinds == ["text", "sound", "tokens", "sound", "tokens", "text"]
    segments = [e for e in events if e.kind == "tokens"]
    assert [torch.equal(e.tokens.codes, t.codes) for e, t in zip(segments, [first, second, picture], strict=True)]
    assert [ids[e.position] for e in segments] == [vocab.blocks[m].begin for m in ("audio", "audio", "image")]


def test_a_push_of_sounds_with_different_channels_is_refused_but_events_have_them():
    name, events = "codec-causal", []
    vocab = vocab_of(name)
    ids = vocab.pack([clip(name, 700), clip(name, 700, 2)])
    with pytest.raises(ValueError, match=r"one number of channels in one push, got \[1, 2\]"):
        AudioFromIds(vocab, tiny(name), on_event=events.append).push(ids)
    assert [len(e.sound) for e in events if e.kind == "sound"] == [1, 2]


# ---------------------------------------------------------------------------------------------------------- how soon


@pytest.mark.parametrize(
    ("layout", "late"),
    [("flatten", 0), ("delay", 2), ("delay:0,3,1", 3), ("coarse_first", math.inf)],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_frame_sounds_as_soon_as_the_latency_says(name, layout, late):
    frames = 12 if name == "codec-causal" else 40
    tok, tokens = tiny(name), clip(name, 320 * frames)
    vocab = vocab_of(name, layout)
    reader = AudioFromIds(vocab, tok, num_codebooks=3, window=None if name == "codec-causal" else 2)
    if name == "codec-causal":
        assert reader.latency_frames == late and reader.streams
    else:
        fields = fields_of(tok)
        assert fields and reader.latency_frames == late + fields[1] + 1 and not reader.streams
    level, at = vocab.blocks["audio"].layout.order((1, 1, 1), frames)
    heard, worst = 0, 0
    for n, i in enumerate(vocab.pack([tokens], header=False)[:-1]):
        sound = reader.push(i)
        begun = int(at[:n][level[:n] >= 0].max(initial=0))
        if sound is not None:
            worst = max(worst, begun - heard)
            heard += sound.shape[1] // tok.hop_length
    if late == math.inf:
        assert worst == frames - 1  # the last frame is the first that is whole, so all wait for it
    else:
        assert worst == reader.latency_frames
    assert heard >= frames - (0 if name == "codec-causal" else reader.latency_frames + 1)


def test_a_decoder_that_sees_everything_is_heard_at_the_end(monkeypatch):
    name = "codec-centred"
    monkeypatch.setattr(streaming, "fields_of", lambda tok: None)
    vocab, tokens = vocab_of(name), clip(name, 900)
    reader = AudioFromIds(vocab, tiny(name))
    assert reader.latency_frames == math.inf
    ids = vocab.pack([tokens])
    assert all(reader.push(i) is None for i in ids[:-1])
    assert torch.equal(reader.push(ids[-1]), decoded(name, tokens)) and reader.flush() is None


# ------------------------------------------------------------------------------------------------------------ damage


@QUICK
@given(st.sampled_from(["flatten", "delay", "coarse_first"]), st.booleans(), st.integers(0, 2**32))
def test_damage_follows_the_policy_of_salvage(layout, header, seed):
    """What sounds is the decode of what salvage keeps, where it keeps the levels and the header that had sounded."""
    name, rng, events = "codec-causal", random.Random(seed), []
    vocab, tokens = vocab_of(name, layout), clip(name, 900)
    ids = vocab.pack([[1], tokens, [2], tokens, [3]], header=header)
    for _ in range(rng.randint(1, 3)):
        if len(ids) < 2:
            break
        n = rng.randrange(len(ids))
        kind = rng.choice(["drop", "put", "cut", "swap"])
        if kind == "drop":
            del ids[n]
        elif kind == "put":
            ids.insert(n, rng.randrange(vocab.size + 3))
        elif kind == "swap":
            ids[n], ids[n // 2] = ids[n // 2], ids[n]
        else:
            ids = ids[: n + 1]
    reader = AudioFromIds(vocab, tiny(name), on_event=events.append)
    got = hear(reader, ids) if not any(i in vocab.ranges["byte"] for i in ids) else None
    if got is None:  # a damaged header may say channels of every number: only the events hold such sound apart
        for i in ids:
            reader.push(i)
        reader.flush()
    saved = vocab.salvage(ids)
    kept = [p for p in saved.parts if isinstance(p, Tokens)]
    told = [e.tokens for e in events if e.kind == "tokens"]
    assert len(told) == len(kept)
    assert all(torch.equal(a.codes, b.codes) and a.spec == b.spec for a, b in zip(told, kept, strict=True))
    assert reader.report.items == tuple(sorted(saved.report.items, key=lambda item: item.position))
    sounds: dict[int, list[Tensor]] = {}
    for event in events:
        if event.kind == "sound":
            sounds.setdefault(event.position, []).append(event.sound)
    refused = {e.position for e in events if e.kind == "refused"}
    for event in events:
        if event.kind == "tokens" and event.tokens.spec.modality == "audio" and event.position not in refused:
            want = decoded(name, event.tokens)
            heard = torch.cat(sounds.get(event.position, [want[:, :0]]), 1)
            plain = event.tokens.spec.num_codebooks == 3 and not any(i in vocab.ranges["byte"] for i in ids)
            if plain or not saved.report.items:
                assert heard.shape == want.shape and torch.allclose(heard, want, atol=1e-5)


def test_damage_of_a_kind_each_is_told_with_its_position():
    name = "codec-causal"
    vocab, tokens = vocab_of(name), clip(name, 1300)
    audio = vocab.pack([tokens], header=False)
    level2 = vocab.ranges["audio_2"][0]
    for ids, kind, position, frames in [
        ([1, *audio[:9]], "cut", 10, 2),
        ([1, *audio[:9], 2, *audio], "unended", 10, 2 + 5),
        ([1, *audio[:9], audio[-1], 2], "incomplete", 10, 2),
        ([1, *audio[:4], level2, *audio[5:], 2], "misplaced", 5, 1),
        ([1, level2, 2, *audio], "stray", 1, 5),
        ([1, vocab.size + 1, *audio], "unknown", 1, 5),
    ]:
        reader = AudioFromIds(vocab, tiny(name))
        assert hear(reader, ids).shape[1] == frames * 320
        (item,) = reader.report.items
        assert (item.kind, item.position) == (kind, position)


def test_a_header_that_no_sound_can_have_is_told_and_the_stream_goes_on():
    name, events = "codec-causal", []
    vocab, tokens = vocab_of(name), clip(name, 700)
    silly = Tokens(tokens.codes, tokens.lengths, tokens.spec, {"channels": torch.tensor([0])})
    reader = AudioFromIds(vocab, tiny(name), on_event=events.append)
    got = hear(reader, vocab.pack([silly, [1], tokens]))
    assert torch.allclose(got, decoded(name, tokens), atol=1e-5)
    (refused,) = [e for e in events if e.kind == "refused"]
    assert "channels" in refused.text and refused.position == 0


def test_misuse_is_refused():
    name = "codec-causal"
    vocab, tok = vocab_of(name), tiny(name)
    other = Vocab(4, audio=tiny("codec-centred").spec)
    for kwargs, want in [
        ({"vocab": other}, "vocab: expected one with audio="),
        ({"vocab": Vocab(4, image=IMAGE)}, "got one with no audio"),
        ({"num_codebooks": 4}, r"num_codebooks: expected 1..3, got 4"),
        ({"window": 0}, "window: expected at least 1 frame"),
    ]:
        with pytest.raises(ValueError, match=want):
            AudioFromIds(**({"vocab": vocab, "tokenizer": tok} | kwargs))
    reader = AudioFromIds(vocab, tok)
    assert reader.push([]) is None and reader.flush() is None
    with pytest.raises(ValueError, match="expected no more ids"):
        reader.push(1)
    with pytest.raises(ValueError, match="already ended"):
        reader.flush()
    with pytest.raises(ValueError, match="streamer: expected one sequence, got 2"):
        PlayIds(AudioFromIds(vocab, tok), print).put(torch.zeros(2, 3, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------------ transformers


@pytest.mark.parametrize("layout", ["flatten", "delay"])
@pytest.mark.parametrize("inside", [False, True])
def test_generate_plays_while_it_writes(layout, inside):
    transformers = pytest.importorskip("transformers")
    name = "codec-causal"
    vocab, tokens = vocab_of(name, layout), clip(name, 900)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=vocab.size, **sizes, bos_token_id=None, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = vocab.pack([[1], tokens], header=False)
    prompt = prompt[:7] if inside else prompt
    pieces: list[Tensor] = []
    events: list[Event] = []
    reader = AudioFromIds(vocab, tiny(name), num_codebooks=3, on_event=events.append)
    (got,) = generate(
        model,
        vocab,
        [prompt],
        60,
        modality="audio",
        num_codebooks={"audio": 3},
        lengths={"audio": (6, 9)},
        one_segment=True,
        do_sample=True,
        streamer=PlayIds(reader, pieces.append),
    )
    (said,) = got.parts
    assert isinstance(said, Tokens) and 6 <= int(said.lengths[0]) <= 9 and reader.report.ok
    assert len(pieces) >= 5 and torch.allclose(torch.cat(pieces, 1), decoded(name, said), atol=1e-5)
    assert torch.equal(next(e for e in events if e.kind == "tokens").tokens.codes, said.codes)
