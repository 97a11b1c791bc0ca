"""What ships must load, reproduce its goldens, stay small, and hold the floors that the project promises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import mmtok
from mmtok.bench.records import Result

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import ship  # noqa: E402 - after the path
from comparing.runs import RUNS, run_of, spelled_name, stored  # noqa: E402
from comparing.tables import BLOCKS, block_text  # noqa: E402

NAMES = mmtok.available()
RESULTS = {name: stored(ROOT / "recipes" / "results", name) for name in RUNS}


def value(name: str, metric: str, part: str = "reconstruction") -> float:
    """A stored number of a shipped tokenizer at its full rate, on the first set of its run."""
    found: Result | None = ship.value_of(RESULTS[run_of(name)], name, part, metric)
    assert found is not None and found.value is not None, f"no {metric}; python recipes/bench_readme.py measures it"
    return found.value


def test_both_modalities_ship():
    assert mmtok.available("image-*") and mmtok.available("audio-*")


@pytest.mark.parametrize("name", NAMES)
def test_golden_codes_and_decode(name):
    from safetensors.torch import load_file

    golden = load_file(ROOT / "checkpoints" / name / "golden.safetensors")
    tokenizer = mmtok.load(name)
    rate = {"sample_rate": int(golden["sample_rate"])} if "sample_rate" in golden else {}
    tokens = tokenizer.encode(golden["x"], **rate)
    # Another processor sums in another order; a code flips only where two are equally near.
    if "lengths" in golden:
        assert torch.equal(tokens.lengths, golden["lengths"])
    differ = (tokens.codes != golden["codes"].long()).float().mean()
    assert differ <= 0.01, f"{float(differ):.2%} of the codes differ from the golden"
    tokens.codes.copy_(golden["codes"])
    x_hat = tokenizer.decode(tokens)
    assert isinstance(x_hat, torch.Tensor) and x_hat.shape == golden["x_hat"].shape
    torch.testing.assert_close(x_hat, golden["x_hat"].float(), atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_size_and_card(name):
    folder = ROOT / "checkpoints" / name
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 10e6
    text = (folder / "README.md").read_text()
    assert mmtok.card(name)["fingerprint"] in text
    for part in ("## Scores", "## Data", "## Limits", "licence"):
        assert part in text, f"the model card lacks {part!r}"
    assert not list(folder.glob("*.pt")) and not list(folder.glob("*.pkl"))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_of_these_weights(name):
    """Stored scores belong to the weights in the tree, not to an earlier run."""
    own = [r for r in RESULTS[run_of(name)] if r.part == "reconstruction" and spelled_name(r.contender) == name]
    assert {r.protocol["contender"]["fingerprint"] for r in own} == {mmtok.card(name)["fingerprint"]}
    assert not any("smoke" in r.protocol for r in RESULTS[run_of(name)])


def test_image_floor():
    assert value("image-binary1d-64x64", "bits_per_item") <= 8 * 512
    assert value("image-binary1d-64x64", "psnr") >= 21.0


def test_speech_floor():
    name = "audio-codec-16k-4kbps"
    assert value(name, "bitrate_bps") <= 4050  # the last frame of a clip is whole
    assert value(name, "stoi") >= 0.85 and value(name, "pesq_wb") >= 1.6


@pytest.mark.parametrize("name", mmtok.available("audio-*"))
def test_delay_is_measured_and_in_the_card(name):
    delay = value(name, "delay")
    text = (ROOT / "checkpoints" / name / "README.md").read_text()
    assert f"Reconstructions are {delay:g} samples late" in text
    assert abs(delay) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_the_benchmark_measured(name):
    card = (ROOT / "checkpoints" / name / "README.md").read_text()
    assert ship.with_scores(card, name, RESULTS[run_of(name)]) == card, "python recipes/ship.py --cards"


def test_the_causal_codec_streams_as_it_works_offline():
    from mmtok.audio.stream import StreamingTokenizer
    from mmtok.data.audio import read_audio
    from mmtok.tokens import Tokens

    codec = mmtok.load("audio-causal-16k-4kbps")
    assert isinstance(codec, StreamingTokenizer)
    x, rate = read_audio(ROOT / "mmtok" / "assets" / "speech.flac")
    offline = codec.encode(x, sample_rate=rate)
    sender, receiver = codec.streamer(), codec.decode_streamer()
    sizes = torch.randint(1, 3000, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens, sound, start = [], [], 0
    for size in sizes:
        tokens.append(sender.push(x[:, start : start + size], sample_rate=rate))
        start += size
        if start >= x.shape[1]:
            break
    tokens.append(sender.flush())
    found = [t for t in tokens if t is not None]
    assert len(found) > 10 and torch.equal(Tokens.join(found).codes, offline.codes)
    sound = torch.cat([receiver.push(t) for t in found] + [receiver.flush()], 1)
    whole = codec.decode(offline)
    assert isinstance(whole, torch.Tensor)
    torch.testing.assert_close(sound, whole[0], atol=1e-5, rtol=0)
    assert sender.latency_seconds + receiver.latency_seconds == pytest.approx(0.035)


@pytest.mark.parametrize("mark", BLOCKS)
def test_readme_tables_come_from_the_stored_results(mark):
    text = (ROOT / "README.md").read_text()
    table = block_text(BLOCKS[mark], RESULTS)
    if not table:  # a part that has not been measured has no place in README; the reconstructions always have one
        assert not mark.endswith((":image", ":images-more", ":small", ":audio")), "python recipes/bench_readme.py"
        assert f"<!-- {mark} -->" not in text
        return
    assert f"<!-- {mark} -->\n{table}\n<!-- /{mark} -->" in text, "python recipes/bench_readme.py --tables"


def test_all_checkpoints_fit():
    assert sum(f.stat().st_size for f in (ROOT / "checkpoints").rglob("*") if f.is_file()) <= 60e6
