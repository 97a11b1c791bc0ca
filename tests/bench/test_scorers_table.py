"""The table of judges: what stands in it exists, says what it is, and opens or says what to do."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

from mmtok.bench.scorers import SCORERS, SUMMARIES, NotRunError, Scorer, SetScorer, open_scorer

HELPERS = Path(__file__).parents[2] / "data" / "helpers"
REMEDY = re.compile(r"pip install|python recipes/\w+\.py|reinstall mmtok")
# What the issue asks for, by the names that its other parts use.
NAMES = {
    "image": {"image_signal", "lpips", "image_semantic", "fd_inception", "fd_efficientnet"},
    "audio": {
        "audio_signal",
        "pesq",
        "stoi",
        "dnsmos",
        "distillmos",
        "words_whisper",
        "words_sphinx",
        "speaker",
        "fad_musicnn",
        "fad_whisper",
    },
}


@pytest.fixture(scope="module")
def opened() -> dict[str, Scorer | SetScorer | NotRunError]:
    """Every scorer, opened once with the networks that lie here; where there are none, with what is installed."""
    found: dict[str, Scorer | SetScorer | NotRunError] = {}
    for name in SCORERS:
        try:
            found[name] = open_scorer(name, HELPERS if HELPERS.is_dir() else None)
        except NotRunError as e:
            found[name] = e
    return found


def test_the_table_is_whole_and_its_functions_exist():
    assert set(SCORERS) == NAMES["image"] | NAMES["audio"]
    for name, place in SCORERS.items():
        module, _, function = place.partition(":")
        entry = getattr(importlib.import_module(module), function)
        assert [p.name for p in inspect.signature(entry).parameters.values()][:1] == ["helpers"], name
        assert entry.__doc__, f"{place}: no word on what it judges"


def test_what_is_not_opened_says_what_to_do(opened: dict[str, Scorer | SetScorer | NotRunError]):
    for name, found in opened.items():
        assert isinstance(found, Scorer | SetScorer) or REMEDY.search(str(found)), f"{name}: {found}"
    assert isinstance(opened["image_signal"], Scorer)  # needs nothing but the core install
    assert isinstance(opened["fd_efficientnet"], SetScorer)


@pytest.mark.parametrize("name", sorted(NAMES["image"] | NAMES["audio"]))
def test_every_scorer_states_itself(name: str, opened: dict[str, Scorer | SetScorer | NotRunError]):
    scorer = opened[name]
    if isinstance(scorer, NotRunError):
        pytest.skip(str(scorer))
    assert scorer.name == name and name in NAMES[scorer.modality]
    assert scorer.backend and re.search(r"\d", scorer.version), (scorer.backend, scorer.version)
    assert scorer.settings and all(isinstance(v, str | int | float | bool) for v in _leaves(scorer.settings))
    assert scorer.measures
    for m in scorer.measures:
        assert m.name and m.unit and len(m.about) > 15 and "\n" not in m.about, m
        assert m.direction in ("higher", "lower", "neither") and m.summary in SUMMARIES, m
        assert not (m.absolute and isinstance(scorer, SetScorer)), f"{m.name} is about two sets"


def test_no_two_measures_of_a_modality_share_a_name(opened: dict[str, Scorer | SetScorer | NotRunError]):
    for modality, names in NAMES.items():
        scorers = [s for n in sorted(names) if not isinstance(s := opened[n], NotRunError)]
        assert all(s.modality == modality for s in scorers)
        found = [m.name for s in scorers for m in s.measures]
        assert len(found) == len(set(found)), sorted(found)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"expected one of \['image_signal'.*got 'psnr'"):
        open_scorer("psnr")


@pytest.mark.parametrize("error", [ImportError("pip install 'mmtok[asr]'"), FileNotFoundError("fetch\nit")])
def test_missing_packages_and_files_are_not_run(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def missing(helpers: Path | None) -> Scorer:
        raise error

    monkeypatch.setattr("mmtok.bench.image_scorers.lpips", missing)
    with pytest.raises(NotRunError) as e:
        open_scorer("lpips")
    assert str(e.value) == " ".join(str(error).split())


def _leaves(value: object) -> list[object]:
    """Plain values inside of mappings and lists; None counts as plain."""
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    if isinstance(value, list | tuple):
        return [leaf for v in value for leaf in _leaves(v)]
    return [] if value is None else [value]
