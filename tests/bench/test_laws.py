"""`mmtok check`: every law is kept by a sound codec and by what ships, and broken by a codec that has that fault."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmtok
from mmtok.bench.law_measures import MEASURES
from mmtok.bench.laws import ABOUT, BROKEN, NOT_APPLICABLE, OK, ONLY_REPORTED, REPORTED, check
from mmtok.cli import main
from mmtok.tokens import Tokens, TokenSpec
from mmtok.wrappers.wrapped import WrappedAudio

SECONDS = 0.25
HOP = 4


class Plain(WrappedAudio):
    """Four samples of 8 bits a frame, one a level: as good a codec as the laws can ask for."""

    sample_rate, hop_length, codebook_sizes = 16000, HOP, (256,) * HOP
    encode_margin = decode_margin = 1
    chunk_frames = 100

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), {}, "plain")

    def heard(self, x: Tensor) -> Tensor:
        return x

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        codes = ((self.heard(x)[:, 0] + 2) * 64).long().clamp(0, 255)
        return codes.unflatten(1, (-1, HOP)).transpose(1, 2)[:, :num_codebooks]

    def network_decode(self, codes: Tensor) -> Tensor:
        y = torch.full((len(codes), codes.shape[2], HOP), 128.0)
        y[..., : codes.shape[1]] = codes.transpose(1, 2).float()
        return (y.flatten(1)[:, None] + 0.5) / 64 - 2


class Context(Plain):
    """Each sample takes in its neighbours of five frames around, and beyond the ends something else than 0."""

    encode_margin = 6
    reach = 5 * HOP

    def heard(self, x: Tensor) -> Tensor:
        inner = torch.nn.functional.avg_pool1d(torch.nn.functional.pad(x, (self.reach, self.reach), value=0.7), 9, 1, 4)
        mean = torch.nn.functional.avg_pool1d(inner, 2 * self.reach - 7, 1, self.reach - 4)
        return x * 0.5 + mean[..., self.reach : -self.reach]


class Constant(Plain):
    def heard(self, x: Tensor) -> Tensor:
        return x * 0


class PadSeen(Context):
    """Upstream as it is: a clip is padded to the longest of its batch."""

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        return self.network_encode(x, lengths, num_codebooks)


class BatchSeen(Plain):
    batch_limit = 9

    def heard(self, x: Tensor) -> Tensor:
        return x + 0.05 * len(x)


class WrongMargin(Context):
    encode_margin = 0


class LowestRate(Plain):
    def encode(self, x: Any, sample_rate=None, text=None, num_codebooks=None, num_tokens=None) -> Tokens:
        return super().encode(x, sample_rate, text, num_codebooks or 1, num_tokens)


class DepthSeen(Plain):
    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        return super().network_encode(x + 0.1 * (num_codebooks == 1), lengths, num_codebooks)


class WrongStrides(Plain):
    """Says that its last level changes only at every other frame, which is not so."""

    def base_spec(self) -> TokenSpec:
        return dataclasses.replace(super().base_spec(), level_strides=(1, 1, 1, 2))


class OutOfRange(Plain):
    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        return super().encode_samples(x, lengths, num_codebooks) + 128


class Trusting(Plain):
    def decode(self, tokens: Tokens, text=None, size=None, generator=None) -> Any:
        spec = self.spec.keep(tokens.codes.shape[1])
        return super().decode(Tokens(tokens.codes.clamp(0, 255), tokens.lengths, spec, tokens.side))


class Noisy(Plain):
    def network_decode(self, codes: Tensor) -> Tensor:
        y = super().network_decode(codes)
        return y + 0.01 * torch.randn_like(y)


class Seedable(Noisy):
    decode_margin = None

    def decode(self, tokens: Tokens, text=None, size=None, generator=None) -> Any:
        if generator is None:
            return super().decode(tokens)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            return super().decode(tokens)


class IntegersUnscaled(Plain):
    def encode(self, x: Any, sample_rate=None, text=None, num_codebooks=None, num_tokens=None) -> Tokens:
        if isinstance(x, Tensor) and not x.is_floating_point():
            x = (x.float() / 32767).clamp(-1, 1) * 0.5
        return super().encode(x, sample_rate, text, num_codebooks, num_tokens)


class TooLong(Plain):
    def exact(self, sound: Tensor, length: int) -> Tensor:
        return torch.nn.functional.pad(sound, (0, 7))


class NeedsTwoFrames(Plain):
    def heard(self, x: Tensor) -> Tensor:
        if x.shape[-1] < 2 * HOP:
            raise RuntimeError("padding size should be less than the input dimension")
        return x


class NormalisesSilence(Plain):
    def network_decode(self, codes: Tensor) -> Tensor:
        y = super().network_decode(codes)
        return y / y.std(-1, keepdim=True)


class Early(Plain):
    def network_decode(self, codes: Tensor) -> Tensor:
        return torch.nn.functional.pad(super().network_decode(codes), (-8, 8))


class EarlyAndShort(Plain):
    """As the released DAC at 16 kHz: 8 samples early, and 8 missing at the end; the wrapper knows."""

    delay_samples = -8

    def network_decode(self, codes: Tensor) -> Tensor:
        return super().network_decode(codes)[..., 8:]


FAULTS = {
    "variety": Constant,
    "padding": PadSeen,
    "batch size": BatchSeen,
    "batch shape": BatchSeen,
    "chunking": WrongMargin,
    "levels": LowestRate,
    "prefix": DepthSeen,
    "round trip": WrongStrides,
    "range": OutOfRange,
    "foreign ids": Trusting,
    "determinism": Noisy,
    "input types": IntegersUnscaled,
    "exact size": TooLong,
    "odd sizes": NeedsTwoFrames,
    "extreme inputs": NormalisesSilence,
    "delay": Early,
}


def test_every_law_has_its_words_its_measure_and_a_codec_that_breaks_it():
    assert list(ABOUT) == list(MEASURES)
    assert FAULTS.keys() == ABOUT.keys() - set(ONLY_REPORTED)


@pytest.mark.parametrize("codec", [Plain, Context, Seedable])
def test_a_sound_codec_keeps_every_law(codec):
    report = check(codec(), seconds=SECONDS)
    assert report.ok, report.table()
    kept = [row for row in report.rows if row.law not in ONLY_REPORTED]
    assert all(row.status == OK and row.miss_rate == 0 and row.compared > 0 for row in kept)
    assert {row.law for row in report.rows if row.status == REPORTED} >= {"dtype", "idempotence", "naive cut"}


@pytest.mark.parametrize("law", FAULTS)
def test_each_law_is_seen_broken(law):
    report = check(FAULTS[law](), only=(law,), seconds=SECONDS)
    row = report[law]
    assert row.status == BROKEN and row.miss_rate is not None and row.miss_rate > 0 and not report.ok
    assert row.note or law in ("padding", "batch size")


def test_miss_rates_are_what_they_say():
    row = check(LowestRate(), only=("levels",))["levels"]
    assert row.miss_rate == 0.75 and row.compared == 4 and row.note == "encode() without a rate gives 1 of 4 levels"
    for codec in (Early(), EarlyAndShort().raw()):
        row = check(codec, only=("delay",), seconds=1.0)["delay"]
        assert row.status == BROKEN and "-8 samples late" in row.note
    mitigated = check(EarlyAndShort(), only=("delay", "exact size"), seconds=1.0)
    assert mitigated.ok and mitigated["delay"].note == "0 samples"
    raw = check(EarlyAndShort().raw(), only=("exact size",), seconds=1.0)["exact size"]
    assert raw.miss_rate == 1 and "comes back as" in raw.note


def test_raw_gives_the_networks_own_behaviour():
    mitigated = Context()
    raw = mitigated.raw()
    for law in ("padding", "chunking"):
        assert check(mitigated, only=(law,), seconds=SECONDS)[law].miss_rate == 0
        assert check(raw, only=(law,), seconds=SECONDS)[law].miss_rate > 0
    assert mitigated.mitigated and not raw.mitigated and raw.network is mitigated.network


def test_tolerance_own_items_and_images():
    row = check(PadSeen(), only=("padding",), seconds=SECONDS)["padding"]
    assert row.status == BROKEN and row.miss_rate is not None and 0 < row.miss_rate < 0.1
    assert check(PadSeen(), only=("padding",), seconds=SECONDS, tolerance=row.miss_rate).ok
    sounds = [torch.sin(torch.arange(900) * f)[None] * 0.5 for f in (0.1, 0.2, 0.3)]
    report = check(Plain(), ("padding", "delay"), items=sounds, sample_rate=16000, seconds=0.05)
    assert report.ok and report.settings["items"] == 3 and report["padding"].compared == 2 * 3 * 800
    pictures = check("image-textok-64px-16x10", ("padding", "chunking"))
    assert pictures["padding"].status == OK and pictures["chunking"].status == NOT_APPLICABLE
    with pytest.raises(ValueError, match="items: expected at least three"):
        check(Plain(), items=sounds[:2], sample_rate=16000)
    with pytest.raises(ValueError, match=r"laws: expected names of .* got \['pading'\]"):
        check(Plain(), only=("pading",))
    with pytest.raises(ValueError, match="tolerance"):
        check(Plain(), tolerance=1.5)
    with pytest.raises(KeyError, match="was not measured"):
        report["dtype"]


@pytest.mark.parametrize("name", mmtok.available())
def test_what_ships_keeps_every_law(name, capsys):
    assert main(["check", name]) == 0, capsys.readouterr().out
    assert f"{name}: all laws hold" in capsys.readouterr().out


def test_command(capsys, tmp_path, monkeypatch):
    name = "audio-causal-16k-4kbps"
    assert main(["check", name, "--only", "padding, levels", "--json", "--out", str(tmp_path / "r.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "r.json").read_text())
    assert found["ok"] and [row["law"] for row in found["rows"]] == ["padding", "levels"]
    assert found["fingerprint"] == mmtok.load(name).fingerprint and found["settings"]["seed"] == 0
    assert main(["check", "--laws"]) == 0 and all(law in capsys.readouterr().out for law in ("padding",))
    for wrong, words in (
        (["check"], "expected a tokenizer to check"),
        (["check", name, "--raw"], "has no mitigations"),
        (["check", "no-such-name"], "unknown tokenizer"),
        (["check", name, "--only", "x"], "laws: expected names of"),
        (["check", name, "--items", "a.wav"], "items: expected at least three"),
    ):
        assert main(wrong) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr("mmtok.auto.load", lambda name, device: Early())
    assert main(["check", "early", "--only", "delay"]) == 1
    assert "early" not in capsys.readouterr().err
    assert main(["check", "context", "--raw", "--only", "levels"]) == 0
