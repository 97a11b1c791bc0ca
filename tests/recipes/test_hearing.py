"""What the audio recipes share: small codecs, scores of speech, and the page with players, opened in a browser."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

from browser import ask, chromium  # noqa: E402 - after the path
from hearing import models, page, scores  # noqa: E402

from mmtok.data.audio import read_audio  # noqa: E402

PLAY = """
const found = [];
for (const player of document.querySelectorAll('audio')) {
  if (player.readyState < 1) await new Promise(done => { player.onloadedmetadata = player.onerror = done; });
  await player.play();
  await new Promise(done => { player.ontimeupdate = () => { if (player.currentTime > 0.05) done(); }; });
  player.pause();
  found.push({name: player.getAttribute('aria-label'), seconds: player.duration, at: player.currentTime,
              error: player.error && player.error.message, width: player.getBoundingClientRect().width});
}
const pictures = [...document.images].map(i => i.complete && i.naturalWidth > 0);
return JSON.stringify({found, pictures, cells: [...document.querySelectorAll('td')].map(c => c.innerText)});
"""


@pytest.fixture(scope="module")
def spoken() -> scores.Spoken:
    x, rate = read_audio(ROOT / "mmtok" / "assets" / "speech.flac")
    assert rate == scores.RATE
    return scores.Spoken([x[:1, :16000], x[:1, 16000:30000]], ["the first second", "what <came> after it"])


@pytest.fixture(scope="module")
def codecs() -> dict:
    torch.manual_seed(0)
    built = {"with": models.small_xcodec(True, smoke=True), "without": models.small_xcodec(False, smoke=True)}
    for codec in built.values():
        codec.train()(torch.randn(2, 1, 6400) * 0.1)  # k-means start
        codec.eval()
    return built


@pytest.mark.skipif(chromium() is None, reason="needs Chromium, to open the page as people do")
def test_every_player_of_the_page_plays_in_a_browser(codecs: dict, spoken: scores.Spoken, tmp_path: Path):
    rows = {"with": [{"stoi": [0.5, 0.7]}], "without": [{"stoi": [0.4, 0.4]}]}
    page.write_page(tmp_path / "page.html", codecs, spoken, rows, few=1)
    answer = ask((tmp_path / "page.html").read_text(), PLAY, tmp_path / "profile")
    assert answer.startswith("{"), answer
    result = json.loads(answer)
    names = [p["name"] for p in result["found"]]
    one = ["original", *(f"{c}, {r} kbit/s" for c in ("with", "without") for r in ("0.4", "0.2"))]
    assert names == 2 * one
    for player, seconds in zip(result["found"], [1.0] * 5 + [0.875] * 5, strict=True):
        assert player["error"] is None and player["seconds"] == pytest.approx(seconds, abs=1e-3)
        assert player["at"] > 0 and player["width"] > 100
    assert all(result["pictures"]) and len(result["pictures"]) == 10
    assert result["cells"] == ["with", "0.6", "without", "0.4"]


@pytest.mark.skipif(chromium() is None, reason="needs Chromium, to open the page as people do")
def test_the_page_that_is_kept_plays_too(tmp_path: Path):
    kept = ROOT / "recipes" / "results" / "claim-xcodec.html"
    result = json.loads(ask(kept.read_text(), PLAY, tmp_path / "profile"))
    assert {p["name"].split(",")[0] for p in result["found"]} == {"original", "semantic", "acoustic"}
    assert all(p["error"] is None and p["at"] > 0 for p in result["found"]) and all(result["pictures"])


def test_the_twin_has_the_same_bits_and_no_teacher(codecs: dict):
    both = [c.spec for c in codecs.values()]
    assert both[0].codebook_sizes == both[1].codebook_sizes and both[0].bitrate_bps == both[1].bitrate_bps
    assert codecs["without"].teacher is None
    output = codecs["with"](torch.randn(1, 1, 3200))
    assert set(output.aux) == {"semantic"} and not codecs["without"](torch.randn(1, 1, 3200)).aux


def test_probe_reads_what_the_codes_hold(codecs: dict):
    codec, hop = codecs["without"], 320
    generator = torch.Generator().manual_seed(0)
    loud, quiet = 0.5, 0.001
    clips, labels = [], []
    for _ in range(12):
        louds = torch.rand(10, generator=generator) < 0.5
        gains = torch.where(louds, loud, quiet).repeat_interleave(4 * hop)
        clips.append(((2 * torch.rand(gains.shape[0], generator=generator) - 1) * gains)[None])
        labels.append(louds.long().repeat_interleave(4))
    spoken = scores.Spoken(clips, ["-"] * 12)
    found = scores.probe_scores(codec, spoken, scores.Phones(labels, ["quiet", "loud"]), (1, 2))
    assert np.mean(found[1]) > 70 and np.mean(found[2]) > 70 and len(found[1]) == 3
    mixed = [torch.randint(2, (40,), generator=generator) for _ in range(12)]
    chance = scores.probe_scores(codec, spoken, scores.Phones(mixed, ["a", "b"]), (2,))
    assert np.mean(chance[2]) < 70
    unaligned = [torch.full((40,), -1) if i % 2 else v for i, v in enumerate(labels)]
    some = scores.probe_scores(codec, spoken, scores.Phones(unaligned, ["quiet", "loud"]), (2,))
    assert len(some[2]) == 2


def test_word_scores_mean_the_error_rate_of_all_words(spoken: scores.Spoken):
    pytest.importorskip("jiwer")

    class Deaf:
        name = "deaf"

        def __call__(self, x: torch.Tensor) -> str:
            return "the first second" if x.shape[1] == 16000 else "nothing at all was heard"

    found = scores.word_scores(None, spoken, 0, [Deaf()])["deaf"]
    # The normaliser leaves out what stands in angle brackets; three words of six, and no clip counts beyond its own.
    assert found[0] == 0 and np.mean(found) == pytest.approx(50)


def test_phones_are_kept_and_numbered(spoken: scores.Spoken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def align(x: torch.Tensor, text: str, hop: int) -> list[str] | None:
        return None if "<" in text else ["B", "A"] * (-(-x.shape[1] // hop) // 2)

    monkeypatch.setattr(scores, "PhoneAligner", lambda: align)
    first = scores.phones_of(spoken, 320, tmp_path)
    assert first.names == ["A", "B"] and first.labels[0][:3].tolist() == [1, 0, 1]
    assert first.labels[1].tolist() == [-1] * 44
    monkeypatch.setattr(scores, "PhoneAligner", None)
    again = scores.phones_of(spoken, 320, tmp_path)
    assert again.names == first.names and all(map(torch.equal, again.labels, first.labels))
