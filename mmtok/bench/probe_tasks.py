"""What probes are asked: who speaks, which language, which word, what sounds, what is in a picture."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmtok.bench.parts import Context
from mmtok.bench.probe_material import (
    OTHER,
    TEST,
    TRAIN,
    Family,
    Found,
    Sizes,
    Task,
    divided,
    int16_of,
    levelled,
    rank_of,
    read_rows,
    sound_of,
    square_picture,
    task_of,
)
from mmtok.bench.scorers import NotRunError
from mmtok.bench.word_alignment import aligned
from mmtok.data.sources import MANIFESTS

SPEECH_RATE, SOUND_RATE, PICTURE = 16000, 44100, 128
SPEAKER_SECONDS, SOUND_SECONDS, WORD_MARGIN = 1.5, 1.0, 0.05
KEYWORDS, SMOKE_KEYWORDS, SHORTEST_WORD = 20, 4, 4
SUBJECTS = ("animals", "food", "people", "plants", "vehicles", "buildings", "tools", "instrument")
SYNONYMS = {"transportation": "vehicles"}


def speakers_of(rows: Sequence[Mapping[str, Any]], least: int) -> dict[str, list[str]]:
    """Language -> its two speakers with the most clips, where two have ``least`` clips of `SPEAKER_SECONDS`.

    A label that begins another one (``fillets-cs``, ``fillets-cs-big``) stands for several people and is left out.
    """
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for r in rows:
        if r.get("speaker") and r["seconds"] >= SPEAKER_SECONDS:
            counts[str(r["language"])][r["speaker"]] += 1
    found = {}
    for language, voices in sorted(counts.items()):
        single = [v for v in voices if not any(o != v and o.startswith(v + "-") for o in voices)]
        enough = sorted((v for v in single if voices[v] >= least), key=lambda v: (-voices[v], v))
        if len(enough) >= 2:
            found[language] = enough[:2]
    return found


def _clips(context: Context, rows: Sequence[Mapping[str, Any]], speaker: str, label: str, count: int) -> list[Found]:
    """Middles of the clips of a speaker."""
    assert context.data is not None
    own = [r for r in rows if r["speaker"] == speaker and r["seconds"] >= SPEAKER_SECONDS]
    own = sorted(own, key=lambda r: rank_of(r["path"]))[:count]

    def middle(path: Path) -> Tensor:
        x = sound_of(path, SPEECH_RATE)
        length = int(SPEAKER_SECONDS * SPEECH_RATE)
        start = max(0, (len(x) - length) // 2)
        return int16_of(levelled(x[start : start + length]))

    folder = context.data
    return [Found(r["path"], label, r["path"], lambda p=folder / r["path"]: middle(p), r.get("text")) for r in own]


def build_speaker(context: Context, sizes: Sizes) -> Task:
    """Who speaks: two voices of each language, so that the language alone gets half of them right at best."""
    rows = read_rows(context, MANIFESTS["audio"])
    need = sizes.train + sizes.test
    pairs = speakers_of(rows, need)
    items = [f for pair in pairs.values() for v in pair for f in _clips(context, rows, v, v, need)]
    protocol = {
        "source": "speech.jsonl: two voices of each language",
        "split": "by file",
        "clip": f"the middle {SPEAKER_SECONDS} s, {SPEECH_RATE} Hz, mono, one level",
        "warning": "voices also differ in their recording; two voices of one language may share it or not",
    }
    return task_of("speaker", "audio", divided(items, sizes, TEST), SPEECH_RATE, protocol)


def build_language(context: Context, sizes: Sizes) -> Task:
    """Which language is spoken, tested on voices that were not trained on."""
    rows = read_rows(context, MANIFESTS["audio"])
    need = sizes.train + sizes.test
    items = []
    for language, (first, second) in speakers_of(rows, need).items():
        for voice, split, count in ((first, TRAIN, sizes.train), (second, TEST, sizes.test)):
            clips = _clips(context, rows, voice, language, count)
            items += [dataclasses.replace(c, split=split) for c in clips]
    protocol = {
        "source": "speech.jsonl: two voices of each language",
        "split": "by voice: one is trained on, the other tested",
        "clip": f"the middle {SPEAKER_SECONDS} s, {SPEECH_RATE} Hz, mono, one level",
        "warning": "one voice a language in training: what the probe learns may be the voice or its recording",
    }
    return task_of("language", "audio", divided(items, sizes, TEST), SPEECH_RATE, protocol)


def build_keyword(context: Context, sizes: Sizes) -> Task:
    """Which word is said: words cut out of English sentences by forced alignment."""
    rows = [r for r in read_rows(context, MANIFESTS["audio"]) if r.get("language") == "en" and r.get("text")]
    voices = [v for v, n in collections.Counter(r["speaker"] for r in rows).most_common() if n >= sizes.least][:2]
    if len(voices) < 2:
        raise NotRunError(f"keyword: expected two English voices with texts in speech.jsonl, got {voices}")
    spoken = {v: _words_of([r for r in rows if r["speaker"] == v]) for v in voices}
    first, second = voices
    common = [w for w in spoken[first] if len(spoken[first][w]) >= sizes.least and len(spoken[second].get(w, ())) >= 4]
    common = sorted(common, key=lambda w: (-len(spoken[first][w]), w))[: SMOKE_KEYWORDS if context.smoke else KEYWORDS]
    clips: list[Found] = []
    share = sizes.test / (sizes.train + sizes.test)
    for voice, enough in ((first, sizes.train + 2 * sizes.test), (second, sizes.test)):
        for clip in _word_clips(context, {w: spoken[voice][w] for w in common}, enough):
            # The sentence decides, so that all of its words are on one side; sentences came in the order of rank_of.
            held_out = int(rank_of(f"side of {clip.group}")[:8], 16) / 2**32 < share
            clip.split = OTHER if voice == second else TEST if held_out else TRAIN
            clips.append(clip)
    protocol = {
        "source": f"speech.jsonl: words of {first}, and as {OTHER!r} of {second}",
        "split": "by sentence; the other voice is tested only",
        "clip": f"one word with {WORD_MARGIN} s before and after it, {SPEECH_RATE} Hz, mono, one level",
        "alignment": "pocketsphinx, forced",
        "warning": "tokenizers may have been trained on some of these sentences, never on the words",
    }
    return task_of("keyword", "audio", divided(clips, sizes, TEST), SPEECH_RATE, protocol)


def _word_clips(context: Context, spoken: Mapping[str, Sequence[dict[str, Any]]], enough: int) -> list[Found]:
    """About ``enough`` clips of each word of one voice; sentences are aligned until there are so many."""
    rows = {r["path"]: r for own in spoken.values() for r in own}
    has: dict[str, list[str]] = collections.defaultdict(list)
    for word, own in spoken.items():
        for r in own:
            has[r["path"]].append(word)
    counts: collections.Counter[str] = collections.Counter()
    wanted = (rows[p] for p in sorted(rows, key=rank_of) if any(counts[w] < enough for w in has[p]))
    clips = []
    for sentence in aligned(context, wanted):
        said = {p.text: p for p in reversed(sentence.words)}  # the first of each
        for w in sorted(said.keys() & spoken.keys()):
            counts[w] += 1
            cut = int16_of(levelled(sentence.cut(said[w], WORD_MARGIN)))
            key = f"{sentence.path}#{said[w].start:.2f}"
            clips.append(Found(key, w, sentence.path, lambda c=cut: c))
    return clips


def _words_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Word -> the rows whose text has it."""
    found: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for r in rows:
        for w in set(re.findall(r"[a-z']+", r["text"].lower().replace("’", "'"))):
            if len(w) >= SHORTEST_WORD and r["seconds"] <= 8:
                found[w].append(r)
    return found


def build_sound(context: Context, sizes: Sizes) -> Task:
    """What sounds: drums, bells, animals, cries, weapons; instruments of one kit are on one side of the split."""
    rows = [r for r in read_rows(context, "sounds.jsonl") if r.get("kind")]
    folder = context.data
    assert folder is not None

    def beginning(path: Path) -> Tensor:
        x = sound_of(path, SOUND_RATE)[: int(SOUND_SECONDS * SOUND_RATE)]
        return int16_of(x * (0.5 / float(x.abs().max().clamp_min(1e-4))))

    items = [
        Found(r["path"], r["kind"], r["group"], lambda p=folder / r["path"]: beginning(p), r.get("text")) for r in rows
    ]
    protocol = {
        "source": "sounds.jsonl: class by the file's name",
        "split": "by instrument of a kit, creature or file",
        "clip": f"the first {SOUND_SECONDS} s, {SOUND_RATE} Hz, mono, one peak",
    }
    return task_of("sound", "audio", divided(items, sizes, TEST), SOUND_RATE, protocol)


def build_subject(context: Context, sizes: Sizes) -> Task:
    """What is in a picture: the folder that its package keeps it in."""
    folder = context.data
    items = []
    for r in read_rows(context, MANIFESTS["image"]):
        parts = [SYNONYMS.get(p.lower(), p.lower()) for p in r["path"].split("/")[2:-1]]
        subject = next((p for p in parts if p in SUBJECTS), None)
        if subject is None or not r.get("text"):
            continue
        assert folder is not None
        stem = re.sub(r"(_mirror|_flip|[_\d]+)+$", "", r["path"].rpartition(".")[0])
        array = lambda p=folder / r["path"]: square_picture(p, PICTURE)  # noqa: E731 - read when it is chosen
        items.append(Found(r["path"], subject, stem, array, r["text"]))
    protocol = {
        "source": "images.jsonl: class by the package's folder",
        "split": "by file, versions of one picture together",
        "picture": f"{PICTURE} px square on white, antialiased bicubic",
        "warning": "tokenizers may have been trained on some of these pictures, never on the classes",
    }
    return task_of("subject", "image", divided(items, sizes, TEST), None, protocol)


TASKS: dict[str, Family] = {
    "speaker": Family("audio", "who speaks", build_speaker, ("speech.jsonl",), Sizes(40, 20, 40)),
    "language": Family(
        "audio", "which language a new voice speaks", build_language, ("speech.jsonl",), Sizes(60, 30, 40)
    ),
    "keyword": Family("audio", "which word is said", build_keyword, ("speech.jsonl",), Sizes(20, 10, 8)),
    "sound": Family("audio", "what sounds", build_sound, ("sounds.jsonl",), Sizes(45, 20, 15)),
    "subject": Family("image", "what is in a picture", build_subject, ("images.jsonl",), Sizes(60, 25, 30)),
}
