"""The part `systems`: fields, arithmetic and weights of networks that can be worked out by hand, time by a clock of
our own, memory of a real process."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.audio.codec import AudioCodec
from mmtok.bench import system_probes, systems
from mmtok.bench.contenders import Contender, open_contenders
from mmtok.bench.parts import Context
from mmtok.bench.records import Item, Result, TestSet, result_line, result_of
from mmtok.bench.system_probes import work_of
from mmtok.bench.systems import ANY, jobs
from mmtok.layers.text import TextFeatures
from mmtok.tokenizer import AudioTokenizer, ImageTokenizer
from mmtok.tokens import TokenSpec

RATE, FINE = 8000, 2.0**24


class Stack(AudioTokenizer):
    """Two convolutions to one fine code every 4 samples, and a convolution back; everything in double precision.

    Frame t reads the first layer at 2t - 2 .. 2t + 3, and so the samples 4t - 5 .. 4t + 7: 13 = 1 + (3 - 1) + (6 - 1) 2
    of them, 5 before and 4 past its own. A decoded sample reads 3 on either side of itself, which reaches into
    the frame beside: 6 + 5 samples before it, 6 + 4 past it.
    """

    type_name = "stack"
    sample_rate, hop_length = RATE, 4

    def __init__(self) -> None:
        super().__init__({})
        generator = torch.Generator().manual_seed(0)
        one, two, back = (torch.rand(n, generator=generator).double() + 0.5 for n in (3, 6, 7))
        self.one, self.two, self.back = (nn.Parameter(w[None, None] / w.sum()) for w in (one, two, back))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))  # no weight

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "audio", (2**30,), frame_rate=RATE / 4)

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        z = F.conv1d(F.pad(x.double(), (1, 0)), self.one, stride=2)
        z = F.conv1d(F.pad(z, (2, 2)), self.two, stride=2)
        return (z * FINE).round().long() + 2**29

    def decode_samples(self, codes: Tensor, lengths: Tensor) -> Tensor:
        z = (codes - 2**29).double() / FINE
        return F.conv1d(z.repeat_interleave(4, 2), self.back, padding=3)


class Strided(Stack):
    """Levels of two strides: sums of 8 samples and of 4, each code of its own samples alone."""

    type_name = "strided"
    frame_group = 2

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "audio", (2**30, 2**30), (2, 1), frame_rate=RATE / 4)

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        slow, fast = (x.double().unflatten(2, (-1, n)).mean(3) for n in (8, 4))
        both = torch.cat([slow.repeat_interleave(2, 2), fast], 1)
        return (both * FINE).round().long() + 2**29

    def decode_samples(self, codes: Tensor, lengths: Tensor) -> Tensor:
        return ((codes[:, -1:] - 2**29).double() / FINE).repeat_interleave(4, 2)


class Everywhere(Stack):
    """Each code depends on the whole sound."""

    type_name = "everywhere"

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        return super().encode_samples(x + x.mean(2, keepdim=True) * 10, lengths, num_codebooks)


class Blurred(ImageTokenizer):
    """Cells of 4 x 4 pixels in one fine code each, given back with a blur of 2 pixels on either side."""

    type_name = "blurred"

    def __init__(self) -> None:
        super().__init__({})
        self.back = nn.Parameter(torch.full((1, 1, 5, 5), 1 / 25))

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "image", (2**30,), num_tokens=4096)

    def encode_pixels(
        self, x: Tensor, num_codebooks: int | None, num_tokens: int | None, text: TextFeatures | None
    ) -> tuple[Tensor, Tensor]:
        codes = (F.avg_pool2d(x.mean(1), 4).flatten(1) * FINE).round().long()[:, None]
        return codes, torch.full((len(x),), codes.shape[2])

    def decode_pixels(
        self,
        codes: Tensor,
        height: int,
        width: int,
        text: TextFeatures | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        cells = (codes / FINE).reshape(-1, 1, height // 4, width // 4).float()
        pixels = cells.repeat_interleave(4, 2).repeat_interleave(4, 3)
        return F.conv2d(pixels, self.back, padding=2).expand(-1, 3, -1, -1)


def sounds(seconds: float = 1.0, count: int = 2) -> TestSet:
    generator = torch.Generator().manual_seed(0)
    shape = 1, int(RATE * seconds)
    items = [Item(f"s{i}", torch.randn(shape, generator=generator).mul(0.1).clamp(-1, 1), RATE) for i in range(count)]
    return TestSet("noise", "audio", items, {"set": "noise", "sample_rate": RATE})


def pictures() -> TestSet:
    generator = torch.Generator().manual_seed(0)
    items = [Item(f"p{i}", torch.randint(0, 256, (3, 64, 48), generator=generator) / 255) for i in range(2)]
    return TestSet("noise", "image", items, {"set": "noise"})


def results(contender: Contender, test_set: TestSet, kind: str, **options: Any) -> dict[str, Result]:
    context = Context(Path("unused"), None, None, [test_set], lambda _: (), smoke=True, options=options)
    named = {job.key: job for job in jobs(contender, context)}
    key = f"systems/{kind}/{contender.label}"
    found = list((named.get(key) or named[f"systems/{kind}/{test_set.name}/{contender.label}"]).run())
    for r in found:
        assert (r.part, r.contender) == ("systems", contender.label) and r.test_set in (ANY, test_set.name)
        assert result_of(json.loads(json.dumps(result_line(r), allow_nan=False))) == r
    return {r.metric: r for r in found}


def contender(tokenizer: Any) -> Contender:
    return Contender(tokenizer.type_name, tokenizer.eval())


def values(found: dict[str, Result]) -> dict[str, float | None]:
    return {name: r.value for name, r in found.items()}


def test_the_field_of_a_stack_of_convolutions_is_that_of_the_formula():
    found = results(contender(Stack()), sounds(), "field", field_seconds=0.1)
    assert values(found) == {
        "encode_field_left": 5,
        "encode_field_right": 4,
        "round_trip_field_left": 6 + 5,
        "round_trip_field_right": 6 + 4,
    }
    left = found["encode_field_left"].protocol
    assert left["probe"] == "800 samples" and not left["whole"] and left["trials"] < 20


def test_a_slow_level_owns_all_samples_of_its_stride():
    found = values(results(contender(Strided()), sounds(), "field", field_seconds=0.1))
    assert found["encode_field_left"] == found["encode_field_right"] == 0
    assert found["round_trip_field_left"] == found["round_trip_field_right"] == 3


def test_a_code_that_depends_on_everything_has_the_whole_field():
    found = results(contender(Everywhere()), sounds(), "field", field_seconds=0.1)
    assert all(r.value == math.inf and r.protocol["whole"] for r in found.values())


def test_a_real_codec_reads_no_further_than_it_states():
    tok = tiny_codec(causal=True)
    found = values(results(Contender("codec", tok), sounds(), "field", field_seconds=0.2))
    left, right = found["encode_field_left"] or 0, found["encode_field_right"]
    assert 0 < left <= tok.encoder_field[0] and right == tok.encoder_field[1] == 0  # causal
    assert found["round_trip_field_right"] is not None and found["round_trip_field_right"] < tok.hop_length


def test_a_patch_of_a_picture_changes_its_cells_and_their_surroundings():
    found = results(contender(Blurred()), pictures(), "field")
    assert {found[f"round_trip_field_{side}"].value for side in ("left", "right")} == {2.0}
    assert {found[f"round_trip_field_{side}"].value for side in ("above", "below")} == {2.0}
    share = found["codes_changed_by_patch"]
    # 8 px on an edge and on whole cells: 2 x 2 of 16 x 12; in the middle of 64 and 48 they are whole cells too.
    assert share.value == pytest.approx(100 * 4 / 192) and (share.low, share.count) == (share.value, 5)


def test_arithmetic_and_weights_are_those_of_the_layers():
    found = results(contender(Stack()), sounds(), "work")
    macs = {"encode": RATE / 2 * 3 + RATE / 4 * 6, "decode": RATE * 7}  # of one second
    for side, count in macs.items():
        assert found[f"{side}_gmac"].value == pytest.approx(count / 1e9)
        assert found[f"{side}_gflop"].value == pytest.approx(2 * count / 1e9)
    assert (found["encode_parameters"].value, found["decode_parameters"].value) == (9, 7)
    assert found["encode_gmac"].protocol["standard_item"] == f"1 s of mono sound at {RATE} Hz"
    size = results(contender(Stack()), sounds(), "size")
    assert (size["parameters"].value, size["parameters_external"].value) == (16, 0)
    assert size["parameters"].test_set == ANY and "no folder" in (size["weights_bytes"].not_run or "")


def test_layers_that_the_counter_of_torch_leaves_out_are_counted():
    from mmtok.kernels.nearest_code import nearest_code

    c, x, q = contender(Stack()), torch.randn(1, 10, 8), torch.randn(1, 2, 10, 8)
    lstm = nn.LSTM(8, 16, batch_first=True)
    with torch.no_grad():
        assert work_of(c, lambda: lstm(x)).flops == 2 * 10 * (8 + 16) * 4 * 16
        assert work_of(c, lambda: F.scaled_dot_product_attention(q, q, q)).flops == 2 * 2 * (2 * 10 * 10 * 8)
        assert work_of(c, lambda: torch.cdist(x[0], x[0, :5])).flops == 2 * 10 * 5 * 8
        # Centred codes have their norm as one column more.
        assert work_of(c, lambda: nearest_code(torch.randn(4096, 8), torch.randn(512, 8))).flops == 2 * 4096 * 512 * 9
    assert work_of(c, lambda: c.tokenizer.one * 2).weights == 3  # type: ignore[operator]
    assert all(p.requires_grad for p in c.tokenizer.parameters())


def test_speed_is_amount_over_time(monkeypatch: pytest.MonkeyPatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(systems.time, "perf_counter", lambda: next(ticks) / 2)  # each call takes half a second
    found = results(contender(Stack()), sounds(0.5), "speed", repeats=4)
    for batch in (1, 8):
        for side in ("encode", "decode"):
            items, seconds, factor = (
                found[f"{side}_{name}[batch={batch}]"]
                for name in ("items_per_second", "seconds_per_second", "real_time_factor")
            )
            assert (items.value, seconds.value, factor.value) == (2 * batch, batch, 1 / batch)
            assert (items.low, items.high) == (2 * batch, 2 * batch) and "quartiles of" in (items.interval or "")
            assert items.protocol["timing"] is True and items.protocol["machine"] and items.protocol["threads"]
    found = results(contender(Blurred()), pictures(), "speed")
    speed = found["encode_megapixels_per_second[batch=8]"]
    assert speed.value == pytest.approx(16 * 64 * 48 / 1e6) and speed.unit == "Mpx/s"


def tiny_codec(causal: bool) -> AudioCodec:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"strides": (8, 5, 4), "encoder_width": 2, "decoder_width": 16, "latent_dim": 4}
    tok = AudioCodec(RATE, **sizes, num_codebooks=2, codebook_size=16, dilations=(1,), kernel_size=3, causal=causal)
    tok.train()(torch.randn(4, 1, 3200) * 0.1)  # k-means puts the codebooks among the latents
    return tok.eval()


def test_a_causal_codec_waits_for_a_frame_and_no_longer():
    found = results(Contender("codec", tiny_codec(True)), sounds(), "latency")
    hop_ms = 1000 * 160 / RATE
    assert (found["encode_latency"].value, found["decode_latency"].value) == (hop_ms, 0)
    assert found["algorithmic_latency"].value == hop_ms and "timing" not in found["algorithmic_latency"].protocol
    for ms in (20, 80):
        packet, sound = (found[f"first_{what}[{ms}ms]"].value or 0 for what in ("packet", "sound"))
        assert max(ms, hop_ms) < packet < sound
        assert found[f"push_encode[{ms}ms]"].count == math.ceil(1000 / ms)
        assert (found[f"push_encode[{ms}ms]"].value or 0) > 0 < (found[f"stream_real_time_factor[{ms}ms]"].value or 0)
        assert found[f"push_decode[{ms}ms]"].protocol["timing"] is True


def test_a_codec_that_looks_ahead_says_that_it_cannot_stream():
    found = results(Contender("codec", tiny_codec(False)), sounds(), "latency")
    assert len(found) == 13 and all("not causal" in (r.not_run or "") for r in found.values())


def test_size_and_memory_of_a_saved_tokenizer(tmp_path: Path):
    folder = tmp_path / "codec"
    tiny_codec(True).save(folder)
    (c,) = open_contenders([f"{folder}#levels=1"])
    size = results(c, sounds(), "size")
    assert size["weights_bytes"].value == (folder / "model.safetensors").stat().st_size
    state = {k: v for k, v in c.tokenizer.weights().items() if v.is_floating_point()}
    assert size["parameters"].value == sum(v.numel() for v in state.values())
    # 100 s of sound, 3.2 MB: at the least it is held once more than the process had before, whatever the network does
    found = results(c, sounds(100.0, 1), "memory")
    assert 3.2 < (found["encode_peak_memory"].value or 0) < 2000 and (found["decode_peak_memory"].value or 0) > 3.2
    assert found["encode_peak_memory"].unit == "MB" and found["load_memory"].protocol["timing"] is True
    # one that a program opened, under a name of its own: another process opens it by its source
    named = Contender("mine", c.tokenizer, num_codebooks=1, source=f"{folder}#levels=1")
    assert results(named, sounds(), "size")["weights_bytes"].value == size["weights_bytes"].value
    assert (results(named, sounds(100.0, 1), "memory")["encode_peak_memory"].value or 0) > 3.2


def test_what_a_fresh_process_cannot_open_is_not_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(system_probes.sys, "executable", "/bin/false")
    found = results(dataclasses.replace(contender(Stack()), label="no-such-tokenizer"), sounds(), "memory")
    assert all("no-such-tokenizer" in (r.not_run or "") for r in found.values())


def test_a_file_codec_says_what_does_not_apply():
    (c,) = open_contenders(["jpeg:50"])
    assert list(values(results(c, pictures(), "size")).values()) == [0, 0, 0]
    assert all("no network" in (r.not_run or "") for r in results(c, pictures(), "work").values())
    field = results(c, pictures(), "field")
    assert field["codes_changed_by_patch"].not_run and 0 < (field["round_trip_field_left"].value or 0) < 32
    assert (results(c, pictures(), "speed")["encode_items_per_second[batch=8]"].value or 0) > 0
    context = Context(Path("unused"), None, None, [pictures()], lambda _: ())
    assert not any("latency" in job.key for job in jobs(c, context))  # pictures do not stream
