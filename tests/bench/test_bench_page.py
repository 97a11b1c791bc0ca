"""The benchmark's page, opened in a browser: it sorts, filters, compares, plays, and neither runs nor loads a text."""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.util
import io
import json
import os
import re
import subprocess
import wave
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from mmtok.bench import page, records, report
from mmtok.bench.records import Result
from mmtok.tokens import Tokens, TokenSpec

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "mmtok" / "assets"
NASTY = "<script>document.title='run'</script>&\"'|$_"
IMAGES = ("pic-tok#levels=1", "pic-tok#levels=2", "pic-tok#levels=4", "jpeg:40")
SOUNDS = ("codec-16k#levels=1", "codec-16k#levels=2", "codec-16k#levels=4", f"opus:6000#{NASTY}")
RATE = 16000


def browser() -> ModuleType:
    """tests/recipes/browser.py, which is no package."""
    spec = importlib.util.spec_from_file_location("browser", ROOT / "tests" / "recipes" / "browser.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BROWSER = browser()
needs_chromium = pytest.mark.skipif(BROWSER.chromium() is None, reason="needs Chromium, to open the page as people do")


def tokens(name: str, levels: int, length: int, seed: int) -> Tokens:
    """Codes whose levels have 64 codes each; a walk, so that a map of it has runs."""
    rng = np.random.default_rng(seed)
    codes = np.abs(np.cumsum(rng.integers(-2, 3, (1, levels, length)), axis=2) + 20) % 64
    spec = TokenSpec(name, "audio", (64,) * levels, frame_rate=50.0)
    return Tokens(torch.from_numpy(codes), torch.tensor([length]), spec)


def photo(index: int, side: int = 64) -> np.ndarray:
    """A cut out of the picture that mmtok ships, (side, side, 3) uint8."""
    whole = np.asarray(Image.open(ASSETS / "chelsea.jpg").convert("RGB").resize((225, 150)))
    top, left = 7 * index % (150 - side), 29 * index % (225 - side)
    return whole[top : top + side, left : left + side]


def speech(index: int, seconds: float) -> np.ndarray:
    from mmtok.data.audio import read_audio

    x, rate = read_audio(ASSETS / "speech.flac")
    assert rate == RATE
    start = 4000 * index
    return x[:1, start : start + int(seconds * RATE)].numpy()


class Run:
    """A run's folder made by hand in the formats of `mmtok.bench.records`: 2 sets of 12 items, 4 contenders each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rng = np.random.default_rng(0)
        self.items: list[dict] = []
        self.results: list[Result] = []
        self.gallery: list[dict] = []
        (root / "gallery").mkdir(parents=True)

    def add(
        self,
        part: str,
        contender: str,
        test_set: str,
        metric: str,
        value: float | None,
        unit: str,
        direction: str,
        width: float = 0.0,
        not_run: str | None = None,
    ) -> None:
        protocol = {
            "set": {"set": test_set, "source": "https://example.invalid/data", "count": 12, "selection": NASTY},
            "contender": {"tokenizer": contender.split("#")[0], "device": "cpu"},
            "scorer": {"backend": f"lib-{metric}", "version": "1.2", "settings": {"window": 11}},
            **({"unscored": {"silent": 1}} if metric == "pesq_wb" else {}),
        }
        low, high = (None, None) if value is None or not width else (value - width, value + width)
        how = "bootstrap over items" if width else None
        self.results.append(
            Result(part, contender, test_set, metric, value, unit, direction, low, high, 12, how, not_run, protocol)
        )

    def item(self, contender: str, test_set: str, index: int, bits: float, values: dict, **extent: float) -> None:
        key = f"{test_set}/{index:02d}.x" + (NASTY if index == 3 else "")
        line = {"contender": contender, "set": test_set, "item": key, "index": index, "bits": bits, **extent}
        self.items.append({**line, "encode_seconds": 0.1, "decode_seconds": 0.1, "values": values, "unscored": {}})

    def images(self) -> None:
        for i, c in enumerate(IMAGES):
            bits, psnr = (512.0, 1024.0, 2048.0, 1600.0)[i], (21.0, 24.5, 28.25, 25.0)[i]
            self.add("reconstruction", c, "photos", "bits_per_item", bits, "bit", "lower")
            self.add("reconstruction", c, "photos", "bpp", bits / 4096, "bit/pixel", "lower")
            self.add("reconstruction", c, "photos", "psnr", psnr, "dB", "higher", 0.8)
            self.add("reconstruction", c, "photos", "ssim", psnr / 35, "1", "higher", 0.02)
            self.add("reconstruction", c, "photos", "st_lpips_alex", 5 / psnr, "1", "lower", 0.01)
            reason = "torch-fidelity is not installed; pip install 'mmtok[judges]'" if i == 1 else None
            distance = None if i == 1 else 900 / psnr
            self.add("reconstruction", c, "photos", "fd_inception", distance, "1", "lower", not_run=reason)
            self.add("systems", c, "photos", "encode_ms", 3.0 + i, "ms", "lower", 0.1)
            self.add("probes", c, "colour-names", "accuracy", 0.5 + 0.1 * i, "1", "higher", 0.05)
            for level in range(4 if i < 3 else 0):
                self.add("tokens", c, "photos", f"usage[{level}]", 0.9 - 0.1 * level, "1", "higher")
            for k in range(12):
                value = psnr + 6 * np.sin(k + i)
                self.item(c, "photos", k, bits, {"psnr": value, "ssim": value / 35}, pixels=4096)
        for k in (3, 0, 7, 5):
            self.entry("photos", "image", k, IMAGES)

    def sounds(self) -> None:
        for i, c in enumerate(SOUNDS):
            bps, pesq = (1000.0, 2000.0, 4000.0, 6000.0)[i], (1.4, 2.1, 2.9, 2.4)[i]
            self.add("reconstruction", c, "speech", "bitrate_bps", bps, "bit/s", "lower")
            self.add("reconstruction", c, "speech", "pesq_wb", pesq, "MOS", "higher", 0.15)
            self.add("reconstruction", c, "speech", "wer", (0.31, 0.12, 0.05, 0.07)[i], "1", "lower", 0.03)
            self.add("reconstruction", c, "speech", "delay", (0.0, 0.0, 8.0, 312.0)[i], "sample", "neither")
            self.add("reconstruction", c, "speech", "dnsmos_ovrl", 2.2 + 0.3 * i, "MOS", "higher", 0.1)
            for k in range(12):
                values = {"pesq_wb": pesq + 0.5 * np.cos(2 * k + i), "wer": [float(k % 3), 10.0]}
                self.item(c, "speech", k, 2 * bps, values, seconds_of_sound=2.0)
        self.add("reconstruction", "original", "speech", "dnsmos_ovrl", 3.25, "MOS", "higher", 0.1)
        self.add("reconstruction", "original", "speech", "wer", 0.03, "1", "lower", 0.01)
        for k in (3, 1):
            self.entry("speech", "audio", k, SOUNDS)

    def entry(self, test_set: str, modality: str, index: int, contenders: tuple[str, ...]) -> None:
        folder, kind = self.root / "gallery" / test_set / str(index), "png" if modality == "image" else "wav"
        folder.mkdir(parents=True)
        original = photo(index) if modality == "image" else speech(index, 2.0)
        self.write(folder / f"original.{kind}", original)
        lines = {line["contender"]: line for line in self.items if (line["set"], line["index"]) == (test_set, index)}
        versions = []
        for i, c in enumerate(contenders):
            noise = self.rng.standard_normal(original.shape) * (5 - i)
            made = np.clip(original + 6 * noise, 0, 255) if modality == "image" else original + 0.01 * noise
            self.write(folder / f"c{i}.{kind}", made)
            at = f"{test_set}/{index}/c{i}"
            if i < 3:
                tokens(c, 2**i, 100, index).save(self.root / "gallery" / f"{at}.codes.safetensors")
            codes = f"{at}.codes.safetensors" if i < 3 else None
            own = {"bits": lines[c]["bits"], "values": lines[c]["values"]}
            versions.append({"contender": c, "path": f"{at}.{kind}", "codes": codes, **own})
        key, rate = lines[contenders[0]]["item"], RATE if kind == "wav" else None
        about = {"set": test_set, "modality": modality, "item": key, "index": index, "sample_rate": rate}
        about |= {"text": f"what {NASTY} says", "why": f"worst of {contenders[0]} by psnr"}
        self.gallery.append({**about, "original": f"{test_set}/{index}/original.{kind}", "versions": versions})

    @staticmethod
    def write(path: Path, x: np.ndarray) -> None:
        path.write_bytes(report.png(x.astype(np.uint8)) if path.suffix == ".png" else report.wav(x, RATE))

    def samples(self) -> None:
        for name, kind in (("speech-lm", "wav"), ("photos-lm", "png")):
            folder = self.root / "language" / name
            folder.mkdir(parents=True)
            self.write(folder / f"0.{kind}", photo(9) if kind == "png" else speech(9, 1.0))
            one = {"contender": SOUNDS[0] if kind == "wav" else IMAGES[0], "path": f"0.{kind}", "prompt": NASTY}
            (folder / "index.json").write_text(json.dumps([one]))

    def finish(self) -> Path:
        sets = {n: {"modality": m, "crop": f"{n} {NASTY}"} for n, m in (("photos", "image"), ("speech", "audio"))}
        machine = {"cpu": "a processor", "cores": 2}
        run = {"title": "mmtok benchmark", "started": "2026-11-22T10:00:00+00:00", "sets": sets, "machines": [machine]}
        run |= {"commands": [f"mmtok bench {NASTY}"], "versions": {"torch": "2.11.0"}, "failures": [f"a job {NASTY}"]}
        run |= {"refused": {IMAGES[0]: {"photos": [{"item": "k", "reason": "too small"}]}}, "bad_files": {}}
        (self.root / records.RUN).write_text(json.dumps(run))
        for line in self.items:
            with (self.root / records.ITEMS).open("a") as f:
                f.write(json.dumps(line) + "\n")
        for result in self.results:
            with (self.root / records.RESULTS).open("a") as f:
                f.write(json.dumps(records.result_line(result)) + "\n")
        (self.root / "gallery" / "index.json").write_text(json.dumps(self.gallery))
        return self.root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run(tmp_path_factory.mktemp("bench") / "run")
    run.images()
    run.sounds()
    run.samples()
    return run.finish()


@pytest.fixture(scope="module")
def written(folder: Path) -> str:
    page.write_page(folder, folder.parent / "page.html")
    return (folder.parent / "page.html").read_text(encoding="utf-8")


PROLOGUE = """<script>window.faults = [];
addEventListener('error', e => faults.push(String(e.message || e)), true);
addEventListener('unhandledrejection', e => faults.push(String(e.reason)));
addEventListener('securitypolicyviolation', e => faults.push(e.violatedDirective + ' ' + e.blockedURI));
console.error = (...x) => faults.push(x.join(' '));</script>"""

SCRIPT = (Path(__file__).parent / "bench_page_script.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def seen(written: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the script saw in the page; its policy is widened by this test's own script and answer, and by no more."""
    content = re.sub(r"script-src 'sha256-[^']*'", "connect-src 'self'; script-src 'unsafe-inline'", written, count=1)
    content = content.replace("</title>", f"</title>{PROLOGUE}", 1)
    answer = BROWSER.ask(content, SCRIPT, tmp_path_factory.mktemp("profile"))
    assert answer.startswith("{"), answer
    return json.loads(answer)


@needs_chromium
def test_nothing_fails_nothing_is_loaded_and_no_text_runs(seen: dict):
    assert seen["faults"] == []
    assert seen["loaded"] == [] and seen["title"] == "mmtok benchmark"
    assert seen["scripts"] == 3  # the page's, and this test's two
    assert seen["unnamed"] == []


@needs_chromium
def test_a_heading_sorts_both_ways_and_what_was_not_run_stays_last(seen: dict):
    one, two, four, jpeg = IMAGES
    assert seen["sets"] == ["photos", "speech", "Tasks (image)"]
    assert seen["first"] == [one, two, jpeg, four]  # by bits, as the command's tables
    assert seen["psnr"] == [["descending", four, jpeg, two, one], ["ascending", one, two, jpeg, four]]
    assert seen["fd"] == [["ascending", four, jpeg, one, two], ["descending", one, jpeg, four, two]]
    assert seen["byName"] == ["ascending", jpeg, one, two, four]
    assert seen["lost"] == [["not run", "torch-fidelity is not installed; pip install 'mmtok[judges]'"]]
    assert seen["best"] >= 4


@needs_chromium
def test_contenders_and_measures_are_filtered_and_chosen(seen: dict):
    assert seen["filtered"] == [[IMAGES[3], IMAGES[1]], []]  # still sorted by name
    assert seen["measures"] == ["contender", *(f"usage[{i}]" for i in range(4))]
    assert seen["ticked"] - seen["unticked"] == 4


@needs_chromium
def test_a_number_opens_its_whole_protocol(seen: dict):
    opened, text = seen["protocol"]
    assert opened and seen["closed"]
    for part in ("PESQ", SOUNDS[1], "1.9500 to 2.2500 MOS", "bootstrap over items", "lib-pesq_wb", "higher",
                 "set.selection", NASTY, "unscored.silent", "set.source"):  # fmt: skip
        assert part in text, part
    assert f"photos {NASTY}" in seen["ofSet"]
    for part in ("8 contenders, 2 sets", "10:00:00 UTC", "a processor", "torch 2.11.0", f"mmtok bench {NASTY}"):
        assert part in seen["header"], part
    assert seen["stops"] == 1 and seen["moved"] == SOUNDS[1]


@needs_chromium
def test_the_table_is_copied_as_markdown_latex_and_csv(seen: dict):
    lines = seen["text"]["markdown"].splitlines()
    cells = [c.strip() for c in re.split(r"(?<!\\)\|", lines[2])[1:-1]]
    assert len(lines) == 2 + 5 and cells[:3] == [SOUNDS[0], "1000", "1.40 [1.25, 1.55]"]
    assert "**2.90** [2.75, 3.05]" in lines[4] and "PESQ-wb (MOS) ↑" in lines[0]
    assert "\\<script\\>" in lines[5] and "\\|$" in lines[5]
    latex = seen["text"]["latex"]
    assert "\\begin{tabular}{lrrrrr}" in latex and "\\textbf{2.90}" in latex and "$\\uparrow$" in latex
    assert "codec-16k\\#levels=1 & 1000" in latex and "\\&\"'|\\$\\_" in latex
    table = list(csv.DictReader(io.StringIO(seen["text"]["csv"])))
    assert [row["contender"] for row in table] == [*SOUNDS, "original"]
    assert float(table[1]["reconstruction PESQ-wb (MOS) low"]) == pytest.approx(1.95)
    assert seen["copied"] == "speech as Markdown copied"


@needs_chromium
def test_the_plot_is_drawn_for_another_measure_and_another_axis(seen: dict):
    assert len(seen["points"]) == len(seen["other"]) == 4
    by_name = {label.split(",")[0]: label for label in seen["other"]}
    assert by_name[IMAGES[2]] == f"{IMAGES[2]}, SSIM 0.807 (0.787 to 0.827), 0.500 bit/pixel, 12 counted"
    assert "PSNR 28.25 dB" in next(label for label in seen["points"] if label.startswith(IMAGES[2]))
    assert seen["drawn"] == {"lines": 1, "bands": 1, "names": ["pic-tok", "jpeg"]}
    x = {how: [float(v) for v in re.findall(r"[ML]([\d.]+) ", seen[how])] for how in ("log", "linear")}
    assert x["log"][1] - x["log"][0] == pytest.approx(x["log"][2] - x["log"][1])  # 1 : 2 : 4
    assert 2 * (x["linear"][1] - x["linear"][0]) == pytest.approx(x["linear"][2] - x["linear"][1])
    assert seen["pointed"]


@needs_chromium
def test_pictures_zoom_pan_together_and_show_their_difference(seen: dict, folder: Path):
    at = folder / "gallery" / "photos" / "3"
    a, b = (np.asarray(Image.open(at / name)).astype(int).reshape(-1) for name in ("original.png", "c1.png"))
    assert seen["item"].endswith("03.x" + NASTY)
    np.testing.assert_array_equal(seen["plain"], [a, b])
    np.testing.assert_array_equal(seen["absolute"], np.clip(4 * np.abs(b - a), 0, 255))
    np.testing.assert_array_equal(seen["signed"], np.clip(128 + 2 * (b - a), 0, 255))
    left = np.arange(64)[None, :, None] < 32
    both = np.where(left, a.reshape(64, 64, 3), b.reshape(64, 64, 3))
    np.testing.assert_array_equal(seen["wiped"], both.reshape(-1))
    np.testing.assert_array_equal(seen["held"], a)
    np.testing.assert_array_equal(seen["released"], b)
    assert seen["zoom"] == [512, "pixelated"]
    assert seen["panned"] == [77] * 5


@needs_chromium
def test_token_maps_have_the_colours_of_the_reports(seen: dict, folder: Path):
    codes = Tokens.load(folder / "gallery" / "photos" / "3" / "c1.codes.safetensors").codes[0].numpy()
    assert seen["map"]["size"] == [100, 2]
    rgb = np.array(seen["map"]["rgba"]).reshape(2, 100, 4)[..., :3]
    assert np.abs(rgb - report.code_colours(codes)).max() <= 1  # halves round to even in one, up in the other
    assert seen["code"] == f"level 0, position 1: code {codes[0, 1]} of 64"


@needs_chromium
def test_the_gallery_sorts_by_the_worst_of_any_or_one_contender(seen: dict, folder: Path):
    lines = [line for line in records.read_lines(folder / records.ITEMS) if line["set"] == "photos"]
    shown = set(seen["asChosen"])

    def worst(keep: Callable[[str], bool]) -> list[str]:
        kept = [(v["item"], v["values"]["psnr"]) for v in lines if keep(v["contender"])]
        return sorted(shown, key=lambda key: min(value for k, value in kept if k == key))

    assert seen["worst"] == worst(lambda c: True)
    assert seen["worstOf"] == worst(lambda c: c == IMAGES[1])
    assert seen["worst"] != seen["worstOf"] and seen["asChosen"] not in (seen["worst"], seen["worstOf"])


@needs_chromium
def test_two_contenders_are_compared_item_by_item(seen: dict, folder: Path):
    lines = records.read_lines(folder / records.ITEMS)
    value = {(line["contender"], line["index"]): line["values"].get("psnr") for line in lines}
    gaps = [value[IMAGES[0], k] - value[IMAGES[1], k] for k in range(12)]
    mean, median = (f"{x:.2f}".replace("-", "−") for x in (np.mean(gaps), np.median(gaps)))
    wins = sum(g > 0 for g in gaps)
    assert seen["paired"] == f"A is better on {wins} of 12 items; A − B: mean {mean}, median {median} dB."
    assert seen["dots"] == 12


@needs_chromium
def test_sounds_play_one_at_a_time_and_switching_keeps_the_position(seen: dict, folder: Path):
    ab = seen["ab"]
    assert ab["first"] and ab["current"] == SOUNDS[1] == seen["speech"]
    assert 0 < ab["after"] - ab["before"] < 1.0 and ab["head"] > 100 * ab["before"] / 2.0
    assert seen["playing"] == [False, True, False, False, False]
    with wave.open(str(folder / "gallery" / "speech" / "3" / "original.wav")) as f:
        x = np.frombuffer(f.readframes(f.getnframes()), "<i2") / 32767
    expected = report.log_spectrogram(x[None])
    drawn = seen["spectrogram"]
    found = np.array(drawn["values"]).reshape(drawn["columns"], drawn["rows"]).T
    assert found.shape == expected.shape
    audible = expected > expected.max() - 80
    np.testing.assert_allclose(found[audible], expected[audible], atol=0.05)


@needs_chromium
def test_samples_and_reasons_are_shown(seen: dict):
    assert seen["samples"] == [1, 1]
    assert "pip install 'mmtok[judges]'" in seen["missing"] and IMAGES[1] in seen["missing"]
    assert f"a job {NASTY}" in seen["missing"] and f"{IMAGES[0]} refused 1 items of photos" in seen["missing"]


@needs_chromium
def test_the_page_as_written_runs_from_disk_under_its_own_policy(folder: Path, written: str, tmp_path: Path):
    flags = [
        "--headless=new",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [BROWSER.chromium(), *flags, (folder.parent / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert 'data-ready="yes"' in dom and dom.count("<article") == 3


# --- without a browser -----------------------------------------------------------------------------------------------


def embedded(text: str) -> dict:
    return json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[0])


def test_the_page_holds_one_script_and_names_no_address_to_load(written: str):
    scripts = re.findall(r"<script>(.*?)</script>", written, re.DOTALL)
    assert len(scripts) == 1 and NASTY not in written
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', written)[0]
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert not re.findall(r"\b(?:src|href|action|srcset)\s*=\s*[\"']?(?:\w+:)?//", written)
    kept = written.replace("https://example.invalid/data", "")  # a text of the run
    assert "://" not in kept and "@import" not in kept and "url(" not in kept


def test_every_number_of_the_run_is_in_the_page_with_its_protocol(folder: Path, written: str):
    data = embedded(written)
    found = {}
    for table in data["tables"]:
        for column in table["columns"]:
            for row, value, low, high, count, interval, reason, protocol, _ in column["cells"]:
                told = data["protocols"][protocol]
                found[column["part"], table["rows"][row], column["task"] or table["name"], column["metric"]] = (
                    value, low, high, count, *(None if t is None else data["pool"][t] for t in (interval, reason)),
                    {data["pool"][k]: data["pool"][v] for k, v in zip(told[::2], told[1::2], strict=True)},
                )  # fmt: skip
    results = records.read_results(folder)
    assert len(found) == len(results)
    for r in results:
        assert found[r.key] == (r.value, r.low, r.high, r.count, r.interval, r.not_run, r.protocol)
    assert len(data["pool"]) < 200  # equal values once


def test_item_values_are_ratios_and_lost_ones_are_empty(tmp_path: Path):
    run = Run(tmp_path / "run")
    run.add("reconstruction", "a", "s", "wer", 0.1, "1", "lower")
    run.item("a", "s", 0, 8.0, {"wer": [1.0, 3.0], "psnr": "inf"}, seconds_of_sound=1.0)
    run.item("a", "s", 1, 8.0, {"wer": [0.0, 0.0]}, seconds_of_sound=1.0)
    data = embedded(page.render(run.finish()))
    assert data["items"]["s"]["values"]["a"] == {"wer": [0.33333, None], "psnr": ["inf", None]}
    assert data["gallery"] == [] and data["samples"] == [] and data["remarks"] == []


def test_what_is_cut_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "MAX_SECONDS", 0.5)
    monkeypatch.setattr(page, "MAX_SIDE", 48)
    monkeypatch.setattr(page, "MAX_POSITIONS", 40)
    monkeypatch.setattr(page, "MAX_VALUES", 60)
    data = embedded(page.render(folder))
    pictures, sounds = ([e for e in data["gallery"] if e["modality"] == m] for m in ("image", "audio"))
    assert {e["original"]["seconds"] for e in sounds} == {0.5} and {e["original"]["whole"] for e in sounds} == {2.0}
    assert {(e["original"]["width"], e["original"]["height"]) for e in pictures} == {(48, 48)}
    assert len(pictures[0]["versions"][0]["codes"]["levels"][0]) == 40
    remarks = " ".join(data["remarks"])
    for part in ("first 0.5 s: 11", "middle 48 x 48 px are shown: 21", "first 40 positions: 18", "one item in 2 of 12"):
        assert part in remarks, remarks
    monkeypatch.setattr(page, "MAX_MEDIA", 60_000)
    text = page.render(folder)
    assert "MiB in one page" in " ".join(embedded(text)["remarks"])
    assert sum(len(b) for b in re.findall(r'id="media-\d+">([^<]*)<', text)) <= 80_000


def test_a_missing_file_is_counted_and_a_path_outside_is_refused(tmp_path: Path):
    run = Run(tmp_path / "run")
    run.add("reconstruction", "a", "s", "psnr", 20.0, "dB", "higher")
    Run.write(run.root / "gallery" / "original.png", photo(0))
    one = {
        "set": "s",
        "modality": "image",
        "item": "k",
        "index": 0,
        "text": None,
        "why": "",
        "original": "original.png",
    }
    run.gallery = [{**one, "versions": [{"contender": "a", "path": "gone.png", "bits": 8.0, "values": {}}]}]
    data = embedded(page.render(run.finish()))
    assert data["gallery"][0]["versions"][0]["file"] is None
    assert data["remarks"] == ["Pictures or sounds that the run's folder lacks: 1."]
    (run.root / "gallery" / "index.json").write_text(
        json.dumps([{**one, "original": "../../secret.png", "versions": []}])
    )
    with pytest.raises(ValueError, match="expected paths inside the run's folder"):
        page.render(run.root)


def test_a_run_without_results_and_a_damaged_file_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"results\.jsonl"):
        page.write_page(tmp_path, tmp_path / "page.html")
    run = Run(tmp_path / "run")
    run.add("reconstruction", "a", "s", "psnr", 20.0, "dB", "higher")
    run.finish()
    (run.root / records.RUN).write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: expected JSON"):
        page.write_page(run.root, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
