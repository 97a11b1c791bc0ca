"""A run of the benchmark: killed and resumed with identical numbers, refused where its protocol changed, honest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import mmtok
from mmtok.bench import run as bench_run
from mmtok.bench.audio_scorers import AudioSignal
from mmtok.bench.contenders import Contender
from mmtok.bench.parts import Context, Job
from mmtok.bench.records import Item, Result, TestSet, read_lines, read_results
from mmtok.bench.run import failures, run_bench
from mmtok.bench.run_folder import RunFolder, file_name, read_run
from mmtok.bench.scorers import Measure, NotRunError, Scorer, SetScorer, UnscoredError
from mmtok.metrics.frechet import frechet_distance
from mmtok.tokens import Tokens, TokenSpec
from mmtok.wrappers.classical_images import encode_image

RATE = 16000


class Steps(mmtok.Tokenizer):
    """Pictures as the mean of blocks of 4 px in ``levels`` steps, with noise from torch's generator in decode."""

    modality = "image"

    def __init__(self, levels: int = 8, noise: float = 0.0, pause: float = 0.0, refuses: str = ""):
        super().__init__({"levels": levels, "noise": noise})
        self.name, self.levels, self.noise, self.pause, self.refuses = f"steps-{levels}", levels, noise, pause, refuses

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "image", (self.levels,), num_tokens=4096)

    def encode(self, x, sample_rate=None, text=None, num_codebooks=None, num_tokens=None) -> Tokens:
        time.sleep(self.pause)
        if self.refuses and abs(float(x[0, 0, 0]) - float(self.refuses)) < 0.01:
            raise ValueError(f"x: expected another corner than {self.refuses}")
        small = torch.nn.functional.avg_pool2d(x[None], 4)
        codes = (small * (self.levels - 1)).round().long().reshape(1, 1, -1)
        side = {"height": torch.tensor([x.shape[1]]), "width": torch.tensor([x.shape[2]])}
        return Tokens(codes, torch.tensor([codes.shape[2]]), self.spec, side)

    def decode(self, tokens, text=None, size=None, generator=None) -> torch.Tensor:
        h, w = (int(tokens.side[k]) // 4 for k in ("height", "width"))
        small = tokens.codes.reshape(1, 3, h, w).float() / (self.levels - 1)
        x = torch.nn.functional.interpolate(small, scale_factor=4)
        return (x + self.noise * torch.randn(x.shape)).clamp(0, 1)  # of the global generator: seeded for each item


class EightEarly(mmtok.Tokenizer):
    """Sound in 16 bits, nearly lossless, given back 8 samples early: the known fault of DAC at 16 and 24 kHz."""

    modality = "audio"

    def __init__(self) -> None:
        super().__init__({"early": 8})
        self.name = "eight-early"

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "audio", (65536,), frame_rate=float(RATE))

    def encode(self, x, sample_rate=None, text=None, num_codebooks=None, num_tokens=None) -> Tokens:
        codes = (x * 32767).round().long().clamp(-32768, 32767)[None] + 32768
        return Tokens(codes, torch.tensor([codes.shape[2]]), self.spec)

    def decode(self, tokens, text=None, size=None, generator=None) -> torch.Tensor:
        x = (tokens.codes.float() - 32768) / 32767
        return torch.nn.functional.pad(x[..., 8:], (0, 8))


class Error(Scorer):
    """Mean squared error; items with a dark corner have none."""

    name: ClassVar[str] = "error"
    modality: ClassVar[str] = "image"
    measures = (
        Measure("psnr", "dB", "higher", "of the mean squared error"),
        Measure("brightness", "1", "neither", "mean", absolute=True),
        Measure("bright_share", "1", "neither", "pixels above a half", "ratio", absolute=True),
    )
    backend, version, settings = "test", "1", {"peak": 1}

    def scores(self, item: Item, x_hat: torch.Tensor):
        error = float((item.reference - x_hat).square().mean())
        psnr = -10 * torch.tensor(error).log10().item() if error else float("inf")
        dark = float(item.reference[0, 0, 0]) < 0.1
        return {
            "psnr": UnscoredError("a dark corner") if dark else psnr,
            "brightness": float(x_hat.mean()),
            "bright_share": (float((x_hat > 0.5).sum()), float(x_hat.numel())),
        }


class Moments(SetScorer):
    """Frechet distance of the mean colours of quarters."""

    name: ClassVar[str] = "moments"
    modality: ClassVar[str] = "image"
    measures = (Measure("fd[moments]", "1", "lower", "of mean colours"),)
    backend, version = "test", "1"

    def features(self, x: torch.Tensor, sample_rate: int | None) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).reshape(1, -1)

    def distance(self, reference: torch.Tensor, estimate: torch.Tensor) -> dict[str, float]:
        return {"fd[moments]": frechet_distance(reference, estimate)}


def pictures(count: int = 6, name: str = "noise") -> TestSet:
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(count):
        x = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator), (16, 16), mode="bilinear")[0]
        x[0, 0, 0] = i / 10
        items.append(Item(f"{i}.png", (x * 255).round() / 255, text=f"picture {i}"))
    protocol = {"set": name, "count": count, "fingerprint": f"{name}{count}"}
    return TestSet(name, "image", items, protocol)


def contenders(pause: float = 0.0) -> list[Contender]:
    return [Contender("fine", Steps(16, 0.01, pause).eval()), Contender("coarse#x", Steps(3, 0.05, pause).eval())]


def scorers() -> list[Any]:
    return [Error(), Moments()]


def once(out: Path, names: list[Contender] | None = None, sets: list[TestSet] | None = None, **more: Any) -> Path:
    more = {"scorers": scorers(), "progress": False, "command": "test"} | more
    return run_bench(names or contenders(), sets or [pictures()], out, **more)


def untimed(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.endswith("_seconds")} for line in read_lines(path)]


def results(out: Path) -> dict[tuple[str, str], Result]:
    return {(r.contender, r.metric): r for r in read_results(out)}


def main(out: str, pause: str) -> None:
    """What the killed process runs."""
    once(Path(out), contenders(float(pause)))


if __name__ == "__main__":
    main(*sys.argv[1:])


def test_a_run_keeps_every_number_with_its_protocol(tmp_path: Path):
    out = once(tmp_path / "run")
    found = results(out)
    lines = [x for x in read_lines(out / "items.jsonl") if x["contender"] == "fine"]
    assert [x["item"] for x in lines] == [f"{i}.png" for i in range(6)]
    assert set(lines[1]) == {
        *("contender", "set", "item", "index", "bits", "pixels", "encode_seconds", "decode_seconds", "values"),
        "unscored",
    }
    assert lines[1]["bits"] == 4 * 48 and lines[1]["pixels"] == 256 and lines[1]["encode_seconds"] >= 0
    assert lines[0]["unscored"] == {"psnr": "a dark corner"} and len(lines[1]["values"]["bright_share"]) == 2
    psnr = found["fine", "psnr"]
    mean = sum(x["values"]["psnr"] for x in lines[1:]) / 5
    assert psnr.value == pytest.approx(mean) and psnr.count == 5 and psnr.low < psnr.value < psnr.high
    protocol = psnr.protocol
    assert protocol["set"]["fingerprint"] == "noise6" and protocol["unscored"] == {"a dark corner": 1}
    assert protocol["contender"]["tokenizer"] == "steps-16" and protocol["contender"]["bits_per_position"] == 4
    assert protocol["scorer"] == {"name": "error", "backend": "test", "version": "1", "settings": {"peak": 1}}
    assert found["fine", "bits_per_item"].value == 192 and found["fine", "bpp"].value == 0.75
    # What needs no reference, the untouched items have too; the rest they have not.
    assert found["original", "brightness"].count == 6 and ("original", "psnr") not in found
    # A distance of sets stands beside that of two halves of the originals.
    items = [pictures().items[i] for i in range(6)]
    floor = found["original", "fd[moments]"]
    assert floor.count == 3 and floor.value > 0 and "3 items against 3 others" in floor.protocol["halves"]
    distance = found["coarse#x", "fd[moments]"]
    assert distance.protocol["floor"] == {"fd[moments]": floor.value, "items_a_half": 3}
    reference = torch.cat([Moments().features(i.x, None) for i in items])
    kept = [Tokens.load(p) for p in sorted((out / "codes/noise" / file_name("coarse#x")).iterdir())]
    assert len(kept) == 6 and all(t.spec.fingerprint == kept[0].spec.fingerprint for t in kept)
    with RunFolder(out) as folder:
        made = [folder.load_features("moments", "coarse#x", "noise", i) for i in range(6)]
    assert distance.value == pytest.approx(frechet_distance(reference, torch.cat(made)))  # type: ignore[arg-type]
    record = read_run(out)
    assert record["commands"] == ["test"] and record["machines"][0]["threads"] == torch.get_num_threads()
    assert (
        record["versions"]["torch"]
        and record["contenders"]["fine"]["fingerprint"] == protocol["contender"]["fingerprint"]
    )
    assert failures(out) == [] and record["refused"] == {}


def test_a_killed_run_goes_on_with_identical_numbers(tmp_path: Path):
    whole = once(tmp_path / "whole")
    out = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, __file__, str(out), "0.4"], env=environment)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if sum(x["contender"] == "fine" for x in read_lines(out / "items.jsonl")) >= 2:
                break
            time.sleep(0.02)
        with pytest.raises(ValueError, match=rf"another run \(process {process.pid}\) is at work there"):
            once(out)
        assert process.poll() is None, "it was to be killed in the middle"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    begun = [x for x in read_lines(out / "items.jsonl") if x["contender"] != "original"]
    assert 2 <= len(begun) < 12
    with (out / "items.jsonl").open("ab") as f:  # a line that was cut short is no line
        f.write(b'{"contender": "fine", "set": "no')
    once(out)
    assert untimed(out / "results.jsonl") == untimed(whole / "results.jsonl")
    assert untimed(out / "items.jsonl") == untimed(whole / "items.jsonl")
    assert {p.relative_to(out) for p in (out / "gallery").rglob("*.png")} == {
        p.relative_to(whole) for p in (whole / "gallery").rglob("*.png")
    }
    # Nothing is done twice.
    lines = (out / "items.jsonl").read_bytes()
    once(out, [Contender(c.label, _Untouchable(c.tokenizer)) for c in contenders()], scorers=[Error(), _NoFeatures()])
    assert (out / "items.jsonl").read_bytes() == lines


class _NoFeatures(Moments):
    def features(self, x: torch.Tensor, sample_rate: int | None) -> torch.Tensor:
        raise AssertionError("the features are kept")


class _Untouchable(Steps):
    """Of another's config, and its encode must not run."""

    def __init__(self, like: Any):
        super().__init__(like.levels, like.noise)
        self.eval()

    def encode(self, *given: Any, **more: Any) -> Tokens:
        raise AssertionError("the codes are kept")


def test_another_protocol_is_refused_and_named(tmp_path: Path):
    out = once(tmp_path / "run")
    results_before = (out / "results.jsonl").read_bytes()
    changed = [Contender("fine", Steps(15, 0.01).eval())]
    with pytest.raises(
        ValueError, match=r"holds a run of another protocol: contenders\.fine\.tokenizer is \"steps-16\""
    ):
        once(out, changed)
    with pytest.raises(ValueError, match=r"seed is 0 there and 1 now"):
        once(out, seed=1)
    with pytest.raises(ValueError, match=r"sets\.noise\.count is 6 there and 5 now"):
        once(out, sets=[pictures(5)])
    scorer = Error()
    scorer.version = "2"
    with pytest.raises(ValueError, match=r"scorers\.error\.version is \"1\" there and \"2\" now"):
        once(out, scorers=[scorer])
    assert (out / "results.jsonl").read_bytes() == results_before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(ValueError, match=r"holds other files and no run\.json"):
        once(tmp_path / "other")


def test_contenders_sets_and_scorers_are_added(tmp_path: Path):
    fine, coarse = contenders()
    out = once(tmp_path / "parts", [fine], scorers=[Error()])
    lines = [x for x in read_lines(out / "items.jsonl") if x["contender"] == "fine"]
    once(out, [coarse], [pictures(), pictures(4, "few")], scorers=scorers())
    once(out, [fine], [pictures(), pictures(4, "few")], scorers=scorers())
    whole = once(tmp_path / "whole", [fine, coarse], [pictures(), pictures(4, "few")])
    added, at_once = ({r.key: r for r in read_results(o)} for o in (out, whole))
    assert added == at_once
    after = [x for x in read_lines(out / "items.jsonl") if x["contender"] == "fine" and x["set"] == "noise"]
    # For a new scorer the kept codes are decoded; the time that was measured stays.
    assert [x["encode_seconds"] for x in after[6:]] == [x["encode_seconds"] for x in lines]
    index = json.loads((out / "gallery/index.json").read_text())
    assert {e["set"] for e in index} == {"noise", "few"}
    assert all({v["contender"] for v in e["versions"]} == {"fine", "coarse#x"} for e in index)


def test_items_that_are_refused_are_listed_and_the_rest_counts(tmp_path: Path):
    picky = Contender("picky", Steps(8, refuses="0.3").eval())
    out = once(tmp_path / "run", [picky, contenders()[0]])
    record = read_run(out)
    assert record["refused"] == {
        "picky": {"noise": [{"item": "3.png", "reason": "x: expected another corner than 0.3"}]}
    }
    found = results(out)["picky", "brightness"]
    assert found.count == 5 and found.protocol["unscored"] == {"refused: x: expected another corner than 0.3": 1}
    assert results(out)["picky", "bits_per_item"].count == 5
    assert results(out)["picky", "fd[moments]"].protocol["unscored"] == {"no features": 1}
    assert failures(out) == []

    class Never(Steps):
        def encode(self, *given: Any, **more: Any) -> Tokens:
            raise RuntimeError("out of\nmemory")

    never = Contender("never", Never().eval())
    both = once(tmp_path / "both", [never, picky])
    assert failures(both) == ["never refused all 6 items of noise, the first: 0.png: RuntimeError: out of memory"]
    assert results(both)["never", "psnr"].value is None and results(both)["picky", "psnr"].value
    with pytest.raises(ValueError, match="no contender took a single item: never refused all 6 items"):
        once(tmp_path / "none", [never])


def test_a_scorer_that_is_missing_says_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("image_judges")

    def missing(helpers: Path | None) -> Scorer:
        raise NotRunError("its network is missing; run fetch_data.py --helpers")

    module.judge = missing  # type: ignore[attr-defined]
    module.error = lambda helpers: Error()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "image_judges", module)
    table = {"judge": "image_judges:judge", "error": "image_judges:error"}
    for home in ("mmtok.bench.scorers", "mmtok.bench.run"):  # another table, so that the real one keeps its order
        monkeypatch.setattr(f"{home}.SCORERS", table)
    out = once(tmp_path / "run", scorers=None)
    found = results(out)["fine", "judge"]
    assert found.value is None and found.not_run == "its network is missing; run fetch_data.py --helpers"
    assert results(out)["fine", "psnr"].value and failures(out) == []

    # It comes: the same folder goes on, and what was said of its absence goes.
    class Judge(Moments):
        name: ClassVar[str] = "judge"

    module.judge = lambda helpers: Judge()  # type: ignore[attr-defined]
    once(out, scorers=None)
    assert ("fine", "judge") not in results(out) and results(out)["fine", "fd[moments]"].value
    # It goes again: its numbers stay, and so does what made them.
    module.judge = missing  # type: ignore[attr-defined]
    once(out, scorers=None)
    assert results(out)["fine", "fd[moments]"].value and read_run(out)["scorers"]["judge"]["version"] == "1"
    with pytest.raises(ValueError, match="scorer: expected one of"):
        once(tmp_path / "unknown", scorers=["nobody"])


def test_a_scorer_that_breaks_costs_its_items_only(tmp_path: Path):
    class Fragile(Error):  # noqa: N818
        name: ClassVar[str] = "fragile"
        measures = (Measure("odd", "1", "lower", "fails on every other item"), Measure("nan", "1", "lower", "never"))

        def scores(self, item: Item, x_hat: torch.Tensor):
            if int(item.key[0]) % 2:
                raise IndexError("no face\nfound")
            return {"odd": 1.0, "nan": float("nan")}

    out = once(tmp_path / "run", scorers=[Fragile()])
    found = results(out)
    assert found["fine", "odd"].count == 3 and found["fine", "odd"].protocol["unscored"] == {
        "IndexError: no face found": 3
    }
    assert found["fine", "nan"].value is None and "not a number (3 items)" in (found["fine", "nan"].not_run or "")


def test_a_codec_that_is_eight_samples_early_is_late_by_minus_eight_and_not_bad(tmp_path: Path):
    """DAC's known fault: 8 samples cost it 13 to 19 dB of SI-SDR (`codecscope`) although nobody hears them."""
    t = torch.arange(RATE) / RATE
    items = []
    for i, pitch in enumerate((110.0, 170.0)):
        noise = torch.randn(len(t), generator=torch.Generator().manual_seed(i))
        voice = sum(torch.sin(2 * torch.pi * pitch * k * t + 3 * torch.sin(5 * t)) / k for k in range(1, 20))
        items.append(Item(f"{i}.wav", (0.1 * voice * (1 + torch.sin(9 * t)) + 0.01 * noise)[None], RATE))
    test_set = TestSet("voices", "audio", items, {"set": "voices", "fingerprint": "v"})
    out = once(tmp_path / "run", [Contender("eight-early", EightEarly().eval())], [test_set], scorers=[AudioSignal()])
    found = results(out)
    assert found["eight-early", "delay"].value == -8
    assert found["eight-early", "si_sdr_aligned"].value > 60
    assert found["eight-early", "si_sdr"].value < 5
    assert found["eight-early", "bitrate_bps"].value == 16 * RATE
    entry = json.loads((out / "gallery/index.json").read_text())[0]
    assert entry["sample_rate"] == RATE and entry["original"].endswith("original.wav")
    assert (out / "gallery" / entry["versions"][0]["path"]).is_file()


def test_bytes_that_cannot_be_met_are_counted(tmp_path: Path):
    smallest = [len(encode_image(item.x, "jpeg", 1)) for item in pictures().items]
    target = sorted(smallest)[2]
    low, high = f"jpeg#bytes={target}", "jpeg#bytes=2000"
    out = run_bench([f"jpeg#bytes={target},2000"], [pictures()], tmp_path / "run", scorers=[Error()], progress=False)
    lines = [x for x in read_lines(out / "items.jsonl") if x["contender"] == low]
    above = sum(size > target for size in smallest)
    assert above and [x["above_target"] for x in lines] == [size > target for size in smallest]
    found = results(out)
    assert found[low, "psnr"].protocol["contender"]["above_target"] == above
    assert found[high, "psnr"].protocol["contender"]["above_target"] == 0
    assert found[high, "psnr"].value > found[low, "psnr"].value


def test_a_contender_that_is_given_texts(tmp_path: Path):
    class Reader(Steps):
        texts: ClassVar[list[Any]] = []

        def base_spec(self) -> TokenSpec:
            return TokenSpec(self.name, "image", (self.levels,), num_tokens=4096, conditions=("text",))

        def encode(self, x, sample_rate=None, text=None, num_codebooks=None, num_tokens=None) -> Tokens:
            self.texts.append(text)
            return super().encode(x)

    out = once(tmp_path / "run", [Contender("reader#text", Reader().eval(), with_text=True)])
    assert Reader.texts == [[f"picture {i}"] for i in range(6)]
    assert results(out)["reader#text", "psnr"].protocol["contender"]["text"] is True


def test_a_tokenizer_that_only_encodes_keeps_codes_and_has_rates(tmp_path: Path):
    class Ear(Steps):
        encode_only = True

        def decode(self, *given: Any, **more: Any) -> torch.Tensor:
            raise ValueError("it only encodes")

    out = once(tmp_path / "run", [Contender("ear", Ear().eval())])
    found = results(out)
    assert found["ear", "bits_per_item"].value == 48 * 3 and found["ear", "psnr"].value is None
    assert "it only encodes" in (found["ear", "psnr"].not_run or "") and failures(out) == []
    assert len(list((out / "codes/noise/ear").iterdir())) == 6


def test_jobs_are_done_once_and_failing_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module, done, broken = types.ModuleType("part_of_tests"), [], [True]

    def jobs(contender: Contender, context: Context) -> list[Job]:
        def good() -> list[Result]:
            done.append(contender.label)
            codes = context.codes(context.sets[0])
            value = float(sum(int(t.lengths[0]) for t in codes)) + context.options["plus"] + float(torch.rand(()))
            return [Result("tokens", contender.label, "noise", "codes", value, "codes", "neither", count=len(codes))]

        def bad() -> list[Result]:
            if broken[0]:
                raise KeyError("a\nkey")
            return [Result("tokens", contender.label, "noise", "late", 1.0, "1", "neither")]

        return [Job(f"tokens/good/{contender.label}", good), Job(f"tokens/bad/{contender.label}", bad)]

    module.jobs = jobs  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "part_of_tests", module)
    monkeypatch.setitem(bench_run.PARTS, "tokens", "part_of_tests:jobs")
    monkeypatch.setitem(bench_run.PARTS, "probes", "a_module_that_is_not:jobs")
    more: dict[str, Any] = {"parts": ("reconstruction", "tokens", "probes"), "options": {"tokens": {"plus": 1000}}}
    out = once(tmp_path / "run", **more)
    found = results(out)
    assert 1288 <= found["fine", "codes"].value < 1289 and done == ["fine", "coarse#x"]
    assert failures(out) == [f"{c}, tokens/bad/{c}: KeyError: 'a\\nkey'" for c in ("fine", "coarse#x")]
    why = found["fine", "tokens/bad/fine"]
    assert why.not_run == "KeyError: 'a\\nkey'" and why.part == "tokens"
    assert "a_module_that_is_not" in (found["fine", "probes"].not_run or "")  # not installed: no failure
    broken[0] = False
    once(out, **more)
    assert done == ["fine", "coarse#x"] and results(out)["fine", "late"].value == 1 and failures(out) == []
    assert ("fine", "tokens/bad/fine") not in results(out)
    assert results(out)["fine", "codes"] == found["fine", "codes"]
    alone = once(tmp_path / "alone", parts=("tokens",), options=more["options"])  # codes are made where there are none
    assert results(alone)["fine", "codes"].value == found["fine", "codes"].value
    with pytest.raises(ValueError, match=r"options\.tokens\.plus is 1000 there and 2 now"):
        once(out, parts=("tokens",), options={"tokens": {"plus": 2}})
    with pytest.raises(ValueError, match=r"parts: expected some of .* got \['token'\]"):
        once(out, parts=("token",))


def test_the_gallery_shows_the_worst_and_two_ordinary_items(tmp_path: Path):
    out = once(tmp_path / "run", sets=[pictures(9)])
    index = json.loads((out / "gallery/index.json").read_text())
    lines = {(x["contender"], x["index"]): x for x in read_lines(out / "items.jsonl") if "psnr" in x["values"]}
    for label in ("fine", "coarse#x"):
        worst = min((x["values"]["psnr"], i) for (c, i), x in lines.items() if c == label)[1]
        why = next(e["why"] for e in index if e["index"] == worst)
        assert f"worst of {label} by psnr" in why
    assert sum("median by psnr" in e["why"] for e in index) == 2
    assert [e["index"] for e in index] == sorted(e["index"] for e in index)
    entry = index[0]
    assert entry["set"] == "noise" and entry["modality"] == "image" and entry["text"] == f"picture {entry['index']}"
    from mmtok.data.images import read_image

    root = out / "gallery"
    assert torch.equal(read_image(root / entry["original"]), pictures(9).items[entry["index"]].x)
    version = next(v for v in entry["versions"] if v["contender"] == "coarse#x")
    line = lines["coarse#x", entry["index"]]
    assert version["values"] == line["values"] and version["bits"] == line["bits"]
    codes = Tokens.load(root / version["codes"])
    assert torch.equal(codes.codes, contenders()[1].encode(pictures(9).items[entry["index"]]).codes)
    # The picture is the one that was judged.
    error = (read_image(root / version["path"]) - pictures(9).items[entry["index"]].x).square().mean()
    assert -10 * float(error.log10()) == pytest.approx(line["values"]["psnr"], abs=1e-3)


def test_sets_and_contenders_must_belong_together(tmp_path: Path):
    sound = Contender("eight-early", EightEarly().eval())
    with pytest.raises(ValueError, match="noise is a set of image items and no contender takes those"):
        once(tmp_path / "a", [sound])
    with pytest.raises(
        ValueError, match=r"eight-early takes audio items, got sets \['noise'\]; add one, e\.g\. builtin-audio"
    ):
        once(tmp_path / "b", [*contenders(), sound])
    with pytest.raises(ValueError, match=r"contenders: expected each once, got \['fine'\]"):
        once(tmp_path / "c", [*contenders(), *contenders()[:1]])
    with pytest.raises(ValueError, match=r"sets: expected names that differ, got \['noise'\]"):
        once(tmp_path / "d", sets=[pictures(), pictures(4)])
    out = run_bench(["jpeg:30"], [], tmp_path / "e", scorers=[Error()], smoke=True, progress=False)
    assert read_run(out)["sets"]["builtin-image"]["count"] == 4


def test_names_of_files_are_safe_and_differ():
    names = [file_name(x) for x in ("a/b", "a:b", "a#b", "../x", "plain-1.2=3", "x" * 300, "é")]
    assert len(set(names)) == 7 and names[4] == "plain-1.2=3"
    assert all("/" not in n and not n.startswith(".") and len(n) < 100 for n in names)
