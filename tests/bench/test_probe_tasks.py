"""Tasks of probes from a tiny data folder: what is chosen, on which side it is, and that it is prepared once."""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtok.bench import abx, probe_material, probe_tasks, word_alignment
from mmtok.bench.contenders import Contender
from mmtok.bench.parts import Context
from mmtok.bench.probe_material import OTHER, TEST, TRAIN, Found, Sizes, Task, divided, prepared
from mmtok.bench.probe_retrieval import CAPTIONS_TASK, VIEWS_TASK, caption_embeddings
from mmtok.bench.probe_tasks import TASKS, speakers_of
from mmtok.bench.probes import jobs
from mmtok.bench.scorers import NotRunError
from mmtok.bench.word_alignment import Place, Sentence, aligned
from mmtok.data.audio import write_audio
from mmtok.data.images import write_image

RATE = 16000
TRANSCRIPT = "unless to be rather cold hearted and rather selfish is to be ill disposed"
VOICES = {"en": ("ann", "bob"), "fr": ("june", "luc"), "it": ("carlo",), "cs": ("cs", "cs-big")}
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "recipes"))


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    speech, sounds, images = [], [], []
    for language, voices in VOICES.items():
        for voice in voices:
            for i in range(30 if language == "en" else 11):
                path = folder / "speech" / f"{voice}-{i}.wav"
                path.parent.mkdir(exist_ok=True)
                write_audio(path, torch.randn(1, int(1.6 * RATE), generator=generator) * 0.1, RATE)
                text = "this again other" if i % 2 else "this only"
                row = {"path": f"speech/{path.name}", "language": language, "speaker": voice, "seconds": 1.6}
                speech.append({**row, "text": text, "split": "train", "package": "p", "licence": "l"})
    for kind in ("kick", "bell"):
        for group in range(6):
            for take in range(3):
                path = folder / "sounds" / f"{kind}{group}{take}.wav"
                path.parent.mkdir(exist_ok=True)
                write_audio(path, torch.randn(1, 3000, generator=generator) * 0.1, RATE)
                row = {"path": f"sounds/{path.name}", "kind": kind, "group": f"{kind}{group}", "seconds": 0.2}
                sounds.append({**row, "split": "train", "text": kind, "package": "p", "licence": "l"})
    for subject in ("animals", "food"):
        for i in range(12):
            path = folder / "images" / "set" / subject / f"{'cat' if subject == 'animals' else 'pie'}{chr(97 + i)}.png"
            path.parent.mkdir(exist_ok=True, parents=True)
            write_image(path, torch.rand(3, 20, 30, generator=generator))
            row = {"path": str(path.relative_to(folder)), "kind": "art", "text": f"{subject} {i}", "package": "p"}
            images.append({**row, "licence": "l", "split": "test_toon" if i < 3 else "train"})
    write_lines(folder / "speech.jsonl", speech)
    write_lines(folder / "sounds.jsonl", [*sounds, {**sounds[0], "kind": None}])
    write_lines(folder / "images.jsonl", images)
    return folder


@pytest.fixture
def context(data: Path, tmp_path: Path) -> Context:
    return Context(tmp_path, data, None, [], lambda _: [], smoke=True, progress=False)


def counts(task: Task) -> collections.Counter[tuple[str, str]]:
    return collections.Counter((task.classes[n], s) for n, s in zip(task.labels, task.splits, strict=True))


def test_speaker_takes_two_voices_of_each_language_and_splits_by_file(context: Context):
    task = prepared("speaker", TASKS["speaker"], context)
    assert task.classes == ["ann", "bob", "june", "luc"]  # it has one voice, "cs" stands for several
    assert counts(task) == {(v, s): n for v in task.classes for s, n in ((TRAIN, 6), (TEST, 3))}
    assert len(set(task.keys)) == len(task) == 36
    item = task[0]
    assert item.x.shape == (1, 24000) and item.sample_rate == RATE and item.labels["class"] == "ann"
    assert float(item.x.square().mean().sqrt()) == pytest.approx(0.05, rel=0.01)  # one level
    told = task.protocol
    assert (told["chance_percent"], told["majority_percent"]) == (25, 25)
    assert (told["train_items"], told["test_items"]) == (24, 12)


def test_language_is_tested_on_voices_that_were_not_trained_on(context: Context):
    task = prepared("language", TASKS["language"], context)
    assert task.classes == ["en", "fr"]
    for split, voices in ((TRAIN, {"ann", "june"}), (TEST, {"bob", "luc"})):
        rows = task.rows(split)
        assert {task.keys[int(i)].split("/")[1].split("-")[0] for i in rows} == voices


def test_groups_stay_on_one_side_and_small_classes_are_left_out():
    items = [
        Found(f"{c}{g}{t}", c, f"{c}{g}", lambda: torch.zeros(1)) for c in "ab" for g in range(12) for t in range(4)
    ]
    items += [Found(f"c{i}", "c", "only one", lambda: torch.zeros(1)) for i in range(40)]
    found = divided(items, Sizes(30, 12, 9), TEST)
    assert set(found) == {"a", "b"}  # all of c is one group: nothing to test
    for members in found.values():
        sides = collections.defaultdict(set)
        for m in members:
            sides[m.group].add(m.split)
        assert all(len(s) == 1 for s in sides.values())
        split = collections.Counter(m.split for m in members)
        assert 9 <= split[TEST] <= 12 and 20 <= split[TRAIN] <= 30
    again = divided([Found(i.key, i.label, i.group, i.array) for i in reversed(items)], Sizes(30, 12, 9), TEST)
    assert {c: [(m.key, m.split) for m in ms] for c, ms in again.items()} == {
        c: [(m.key, m.split) for m in ms] for c, ms in found.items()
    }


def test_sounds_and_subjects_come_from_their_manifests(context: Context):
    task = prepared("sound", TASKS["sound"], context)
    assert task.classes == ["bell", "kick"] and task.sample_rate == 44100
    in_test = {task.keys[int(i)][7:12] for i in task.rows(TEST)}
    assert in_test.isdisjoint(task.keys[int(i)][7:12] for i in task.rows(TRAIN))  # kick0 ...: groups
    assert float(task[0].x.abs().max()) == pytest.approx(0.5, abs=1e-3)
    subject = prepared("subject", TASKS["subject"], context)
    assert subject.classes == ["animals", "food"] and subject[0].x.shape == (3, 128, 128)
    assert subject[0].sample_rate is None and subject[0].text and counts(subject)["food", TEST] == 3


def said(context: Context, rows: Any) -> Iterator[Sentence]:
    """Stands in for the alignment: each word and its first letter's phone takes 0.2 s."""
    for row in rows:
        x = probe_material.sound_of(Path(context.data or ".") / row["path"], RATE)
        words = [Place(w, 0.2 * n, 0.2 * n + 0.2) for n, w in enumerate(row["text"].split())]
        phones = [Place(w.text[0].upper(), w.start, w.stop) for w in words]
        yield Sentence(row["path"], row["speaker"], x, words, phones)


def test_keywords_are_cut_out_of_sentences(context: Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe_tasks, "aligned", said)
    task = prepared("keyword", TASKS["keyword"], context)
    assert task.classes == ["again", "only", "other", "this"]
    first, second = task.protocol["source"].split(" of ")[1].split(",")[0], task.protocol["source"].split()[-1]
    for split, voice in ((TRAIN, first), (TEST, first), (OTHER, second)):
        keys = [task.keys[int(i)] for i in task.rows(split)]
        assert keys
        assert all(f"/{voice}-" in k for k in keys)
    sides = [{task.keys[int(i)].split("#")[0] for i in task.rows(s)} for s in (TRAIN, TEST)]
    assert sides[0].isdisjoint(sides[1])  # a sentence is on one side, whatever words it has
    this = next(i for i in range(len(task)) if task.keys[i].endswith("#0.00"))
    assert task[this].x.shape == (1, 4000) and task.texts[this] is None  # 0.2 s and 0.05 s behind it


def test_phones_of_two_voices(context: Context, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(abx, "aligned", said)
    task = prepared("phones", abx.PHONES_TASK, context)
    segments = [abx.Segment(*s) for s in task.extra["segments"]]
    assert {s.phone for s in segments} == {"T", "A", "O"} and {s.speaker for s in segments} == {"ann", "bob"}
    per = collections.Counter((s.phone, s.speaker) for s in segments)
    assert max(per.values()) <= 4 and min(per.values()) >= 2
    assert all(task.keys[s.clip].startswith(f"speech/{s.speaker}-") for s in segments)


def test_a_task_is_prepared_once_and_is_what_was_prepared(context: Context, monkeypatch: pytest.MonkeyPatch):
    first = prepared("sound", TASKS["sound"], context)
    probe_material._OPEN.clear()

    def never(*_: Any) -> Task:
        raise AssertionError("built again")

    from dataclasses import replace

    again = prepared("sound", replace(TASKS["sound"], build=never), context)
    assert again.keys == first.keys and again.splits == first.splits and again.protocol == first.protocol
    assert all(torch.equal(a, b) for a, b in zip(again.arrays, first.arrays, strict=True))
    with pytest.raises(AssertionError, match="built again"):
        prepared("sound", replace(TASKS["sound"], build=never, revision=2), context)


def test_what_is_missing_is_said(context: Context, tmp_path: Path):
    from dataclasses import replace

    with pytest.raises(NotRunError, match=r"no data folder was given; run .*--only images"):
        prepared("subject", TASKS["subject"], replace(context, data=None))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotRunError, match=r"sounds.jsonl is missing; run .*--out .*empty --only sounds"):
        prepared("sound", TASKS["sound"], replace(context, data=tmp_path / "empty"))
    with pytest.raises(NotRunError, match="at least two classes"):
        prepared("speaker", TASKS["speaker"], replace(context, smoke=False))
    task = prepared("captions", CAPTIONS_TASK, replace(context, smoke=False))
    with pytest.raises(NotRunError, match=r"no folder of helpers was given; run .*--helpers"):
        caption_embeddings(task, context)


def test_views_are_of_test_pictures_and_captions_of_different_words(context: Context):
    views = prepared("views", VIEWS_TASK, context)
    assert len(views) == 3 * 4 and views.protocol["gallery"] == 3
    original, crop, flip, jpeg = (views[i].x for i in range(4))
    assert torch.equal(flip, original.flip(-1))
    for other in (crop, jpeg):
        assert 0 < float((other - original).abs().mean()) < 0.35
    captions = prepared("captions", CAPTIONS_TASK, context)
    assert len(set(captions.texts)) == len(captions) == 9
    assert len(captions.rows(TEST)) == 3 and len(captions.rows(TRAIN)) == 6


def test_a_whole_part_runs_on_pictures(context: Context):
    from mmtok.image.binary1d import Binary1D

    torch.manual_seed(0)
    tokenizer = tiny_picture_tokenizer(Binary1D)
    results = [r for job in jobs(Contender("tiny", tokenizer), context) for r in job.run()]
    values = {(r.contender, r.test_set, r.metric): r for r in results}
    assert values["tiny", "subject", "accuracy[conv]"].value is not None
    recall = values["tiny", "views", "recall@1[jpeg, codes]"]
    assert recall.value is not None and recall.count == 3 and recall.low is not None
    assert values["tiny", "views", "recall@1[flip, latents]"].value is not None
    assert "--helpers" in str(values["tiny", "captions", "recall@1[caption, codes]"].not_run)
    assert values["continuous[pixels 8x8]", "subject", "accuracy[linear]"].value is not None
    assert values["continuous[pixels 8x8]", "views", "recall@1[jpeg, latents]"].value == 100


def tiny_picture_tokenizer(kind: Any) -> Any:
    return kind(
        num_tokens=6,
        num_bits=12,
        patch_size=4,
        encoder=(16, 2, 1),
        decoder=(16, 2, 1),
        head_dim=16,
        axes_dims=(4, 6, 6),
        rope="rotary",
        resize="linear",
        absolute_positions=True,
        image_size=48,
        quantizer={"bits_per_code": 4},
    ).eval()


def test_alignment_finds_words_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("pocketsphinx")
    asset = Path(word_alignment.__file__).resolve().parents[1] / "assets"
    text = TRANSCRIPT
    context = Context(tmp_path, asset, None, [], lambda _: [])
    rows = [{"path": "speech.flac", "text": t, "speaker": "s"} for t in (text, "xqzzt vrrk")]
    (sentence,) = list(aligned(context, rows))  # the other text has no pronunciation
    assert [w.text for w in sentence.words] == text.split()
    ends = [0.0, *(w.stop for w in sentence.words)]
    assert all(a <= w.start < w.stop for a, w in zip(ends, sentence.words, strict=False))
    assert ends[-1] <= len(sentence.x) / RATE + 0.02 and len(sentence.phones) > len(sentence.words)
    first = sentence.words[0]
    assert len(sentence.cut(first, 0.0)) == pytest.approx((first.stop - first.start) * RATE, abs=2)

    def gone() -> None:
        raise AssertionError("aligned again")

    monkeypatch.setattr(word_alignment, "PhoneAligner", gone)
    (again,) = list(aligned(context, rows))
    assert again.words == sentence.words


def test_speakers_of_counts_long_clips_only():
    rows = [
        {"speaker": v, "language": "en", "seconds": s} for v, s in (("a", 2), ("a", 2), ("b", 2), ("b", 1), ("c", 2))
    ]
    assert speakers_of(rows, 1) == {"en": ["a", "b"]}
    assert speakers_of(rows, 2) == {}


# ---- the data ----


@pytest.mark.parametrize(
    ("stem", "kind"),
    [
        ("EE_Kick_Hard_1", "kick"),
        ("bd_haus", "kick"),
        ("drum_bass_soft", "kick"),
        ("SnareOffRim-3", "snare"),
        ("elec_hi_snare", "snare"),
        ("HiHatSemiopen-2", "hat"),
        ("drum_cymbal_closed", "hat"),
        ("hhpedal_01", "hat"),
        ("hatchet", "weapon"),
        ("CrashRide18Bell-0", "cymbal"),
        ("drum_cymbal_open", "hat"),
        ("drum_cymbal_soft", "cymbal"),
        ("PearlTomFloor-Med", "tom"),
        ("29800__stomachache__3", ""),
        ("drum_cowbell", "bell"),
        ("WaterglassHi-Soft", "bell"),
        ("tabla_ghe4", "hand drum"),
        ("loop_tabla", ""),
        ("WoodBlock-Soft", "stick"),
        ("dragonstick", ""),
        ("magic-holy-miss-3", "magic"),
        ("throwing-knife-miss", "weapon"),
        ("orc-small-hit-2", "cry"),
        ("skeleton-hit-2", ""),
        ("bass_hit_c", ""),
    ],
)
def test_class_of_a_sound_by_its_name(stem: str, kind: str):
    from fetching.sources import sound_kind

    assert sound_kind(stem) == kind


def test_takes_of_one_instrument_are_one_group(tmp_path: Path):
    from fetching.sources import pick_sounds
    from fetching.table import SOURCES

    sources = {s.name: s for s in SOURCES if s.modality == "sounds"}
    assert len(sources) == 5 and all(s.optional for s in sources.values())
    for name, files in {
        "drumkits": [
            "usr/share/hydrogen/data/drumkits/Kit 1.0/Kick-0.wav",
            "usr/share/hydrogen/data/drumkits/Kit 1.0/Kick-1.wav",
        ],
        "sonic-pi": ["usr/share/sonic-pi/samples/bd_haus.flac", "usr/share/sonic-pi/samples/tabla_ke2.flac"],
        "wesnoth-sounds": ["usr/x/data/core/sounds/orc-die-1.ogg", "usr/x/data/core/sounds/orc-small-hit-2.ogg"],
    }.items():
        root = tmp_path / sources[name].archives[0].folder
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
    found = {
        name: list(sources[name].pick(sources[name], tmp_path)) for name in ("drumkits", "sonic-pi", "wesnoth-sounds")
    }
    assert sources["drumkits"].pick is pick_sounds
    assert [i.group for i in found["drumkits"]] == ["drumkits/Kit 1.0/kick"] * 2
    assert {i.split for i in found["drumkits"]} <= {"train", "val"} and len({i.split for i in found["drumkits"]}) == 1
    assert {i.split for i in found["sonic-pi"]} == {"test"}  # as a whole, for reconstruction
    assert [i.group for i in found["wesnoth-sounds"]] == ["wesnoth-sounds/orc"] * 2
    assert [i.kind for i in found["wesnoth-sounds"]] == ["cry"] * 2
