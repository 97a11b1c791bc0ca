"""Phone ABX: is a phone nearer to another token of itself than to a token of another phone?

The task of Schatz (PhD thesis, 2016; fastabx, arXiv 2505.02692): A and X are tokens of one phone, B of another; the
answer is wrong where d(A, X) > d(B, X), and half wrong where they are equal. Contexts are ignored: a phone's neighbours
may differ between A, B and X, which is harder than the classical triphone task.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.bench.parts import Context
from mmtok.bench.probe_material import Family, Sizes, Task, int16_of, rank_of, read_rows
from mmtok.bench.probe_tasks import SPEECH_RATE
from mmtok.bench.scorers import NotRunError
from mmtok.bench.word_alignment import aligned
from mmtok.data.sources import MANIFESTS

PAIRS_AT_ONCE = 20_000
SHORTEST, LONGEST = 0.04, 0.4  # seconds of a phone token
CLIP_SECONDS = (1.0, 6.0)  # of a sentence


@dataclasses.dataclass(frozen=True)
class Segment:
    """A phone token: its frames are those of clip ``clip`` whose centre lies in [start, stop) seconds."""

    clip: int
    phone: str
    speaker: str
    start: float
    stop: float

    def frames(self, frame_rate: float, length: int) -> slice:
        """The frames of it among ``length``; the nearest one where no centre falls inside."""
        first = math.ceil(self.start * frame_rate - 0.5)
        last = math.ceil(self.stop * frame_rate - 0.5)
        if last <= first:
            first = math.floor((self.start + self.stop) / 2 * frame_rate)
            last = first + 1
        first = min(max(first, 0), length - 1)
        return slice(first, max(first + 1, min(last, length)))


def angular(a: Tensor, b: Tensor) -> Tensor:
    """Angle between frames over pi: (P, I, D), (P, J, D) -> (P, I, J) in [0, 1]; a frame of zeros is at 0.5."""
    a, b = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
    return (a @ b.transpose(1, 2)).clamp(-1, 1).arccos() / math.pi


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Share of the S slots in which frames differ: codes (P, I, S), (P, J, S) -> (P, I, J) in [0, 1]."""
    different = torch.zeros(a.shape[0], a.shape[1], b.shape[1])
    for s in range(a.shape[2]):  # slot by slot: (P, I, J, S) would be large
        different += a[:, :, None, s] != b[:, None, :, s]
    return different / a.shape[2]


def dtw(cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Mean cost along the best path of dynamic time warping, for P pairs at once.

    The path from (0, 0) to the last cell takes steps (1, 1), (1, 0) and (0, 1) and has the least sum; among equal sums
    the diagonal step comes first, then (1, 0). What is returned is that sum over the number of cells on the path.

    Args:
        cost: (P, I, J), 0 or more. rows: (P,) true I of each pair. columns: (P,) true J.
    """
    P, rows_padded, columns_padded = cost.shape
    infinity = torch.full((P,), torch.inf)
    none = torch.zeros(P)
    above: list[tuple[Tensor, Tensor]] = [(infinity, none)] * (columns_padded + 1)
    total, count = torch.empty_like(cost), torch.empty_like(cost)
    for i in range(rows_padded):
        line = [(infinity, none)]
        for j in range(columns_padded):
            best, length = above[j]  # the diagonal
            if i == j == 0:
                best, length = none, none
            for sums, lengths in (above[j + 1], line[j]):
                nearer = sums < best
                best, length = torch.where(nearer, sums, best), torch.where(nearer, lengths, length)
            line.append((best + cost[:, i, j], length + 1))
            total[:, i, j], count[:, i, j] = line[-1]
        above = line
    last = torch.arange(P), rows - 1, columns - 1
    return total[last] / count[last]


def distances(tokens: Sequence[Tensor], codes: bool) -> Tensor:
    """(S, S) distance of every two tokens, each frames (T, D) or, with ``codes``, (T, slots): `dtw` of their frames."""
    lengths = torch.tensor([len(t) for t in tokens])
    order = torch.argsort(lengths, stable=True)  # pairs of like length together: little padding
    padded = torch.nn.utils.rnn.pad_sequence([tokens[int(i)] for i in order], batch_first=True)
    lengths = lengths[order]
    first, second = torch.triu_indices(len(tokens), len(tokens), 1)
    by_size = torch.argsort(lengths[first] * 1000 + lengths[second], stable=True)
    first, second = first[by_size], second[by_size]
    found = torch.zeros(len(tokens), len(tokens))
    frame_distance = hamming if codes else angular
    for part in torch.arange(len(first)).split(PAIRS_AT_ONCE):
        a, b = first[part], second[part]
        longest_a, longest_b = int(lengths[a].max()), int(lengths[b].max())
        cost = frame_distance(padded[a, :longest_a], padded[b, :longest_b])
        found[order[a], order[b]] = dtw(cost, lengths[a], lengths[b])
    return found + found.T


def abx_errors(distance: Tensor, phones: Sequence[str], speakers: Sequence[str]) -> dict[str, Tensor]:
    """Error of every two phones, 0 to 1: ``within`` (A, B, X of one speaker), ``across`` (A, B of one, X of another).

    Of a pair {p, q} both orders (X of p, X of q) and all speakers, or ordered pairs of speakers, are averaged with the
    same weight, and then all triplets of tokens. A pair that a speaker has no token of is left out there.

    Args:
        distance: (S, S) of tokens; phones, speakers: of each token.

    Returns:
        name -> (pairs,) float64; empty where no triplet exists (across with one speaker).
    """
    groups: dict[tuple[str, str], Tensor] = {}
    for key in sorted(set(zip(phones, speakers, strict=True))):
        groups[key] = torch.tensor([i for i, k in enumerate(zip(phones, speakers, strict=True)) if k == key])
    names, voices = sorted(set(phones)), sorted(set(speakers))
    found: dict[str, list[float]] = {"within": [], "across": []}
    for i, p in enumerate(names):
        for q in names[i + 1 :]:
            errors: dict[str, list[float]] = {"within": [], "across": []}
            for own, other in ((p, q), (q, p)):
                for v in voices:
                    a, b = groups.get((own, v)), groups.get((other, v))
                    if a is None or b is None:
                        continue
                    for w in voices:
                        x = groups.get((own, w))
                        if x is not None and (v != w or len(a) > 1):
                            errors["within" if v == w else "across"].append(_error(distance, a, b, x))
            for kind, values in errors.items():
                if values:
                    found[kind].append(sum(values) / len(values))
    return {kind: torch.tensor(values, dtype=torch.float64) for kind, values in found.items()}


def _error(distance: Tensor, a: Tensor, b: Tensor, x: Tensor) -> float:
    """Mean over x, a and b, with a another token than x."""
    near, far = distance[x][:, a, None], distance[x][:, None, b]  # (X, A, 1), (X, 1, B)
    wrong = (near > far).double() + 0.5 * (near == far).double()
    return float(wrong[x[:, None] != a].mean())


def pair_interval(errors: Tensor, seed: int = 0, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean of errors (pairs,), the pairs of phones drawn anew with replacement."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(errors), (draws, len(errors)), generator=generator)
    low, high = errors[chosen].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def build_phones(context: Context, sizes: Sizes) -> Task:
    """English sentences of the voices with texts, and where their phones are: at most ``sizes.test`` tokens of each
    phone and voice, of at most ``sizes.train`` sentences a voice; phones with fewer than ``sizes.least`` are left out.
    """
    low, high = CLIP_SECONDS
    rows = [r for r in read_rows(context, MANIFESTS["audio"]) if r.get("language") == "en" and r.get("text")]
    rows = [r for r in rows if low <= r["seconds"] <= high]
    voices = collections.Counter(r["speaker"] for r in rows)
    clips: list[tuple[str, Tensor]] = []
    segments: list[Segment] = []
    used = [v for v, _ in voices.most_common(2)]
    for voice in used:
        own = iter(sorted((r for r in rows if r["speaker"] == voice), key=lambda r: rank_of(r["path"])))
        counts: collections.Counter[str] = collections.Counter()
        for _, sentence in zip(range(sizes.train), aligned(context, own), strict=False):
            fresh = []
            for p in sentence.phones:
                if SHORTEST <= p.stop - p.start <= LONGEST and counts[p.text] < sizes.test:
                    counts[p.text] += 1
                    fresh.append(Segment(len(clips), p.text, voice, p.start, p.stop))
            if fresh:
                clips.append((sentence.path, int16_of(sentence.x)))
                segments += fresh
    enough = {s.phone for s in segments}
    for voice in used:
        counts = collections.Counter(s.phone for s in segments if s.speaker == voice)
        enough &= {phone for phone, n in counts.items() if n >= sizes.least}
    segments = [s for s in segments if s.phone in enough]
    if len(used) < 2 or len(enough) < 2:
        raise NotRunError(
            f"phones: expected English sentences with texts of two voices, got {len(clips)} of {used}; run "
            f"`python recipes/fetch_data.py --out {context.data} --only speech`"
        )
    protocol = {
        "source": f"speech.jsonl: sentences of {' and '.join(used)}, {SPEECH_RATE} Hz, mono",
        "phones": sorted(enough),
        "segments": len(segments),
        "alignment": f"pocketsphinx, forced; tokens of {SHORTEST} to {LONGEST} s",
        "context": "ignored: neighbours of A, B and X may differ",
        "frames": "of the whole sentence's codes, those whose centre lies in the phone; delays are not made up for",
        "warning": "tokenizers may have been trained on some of these sentences, never on the phones",
        "chance_percent": 50.0,
    }
    count = len(clips)
    return Task(
        "phones", "audio", [], [path for path, _ in clips], [0] * count, ["clip"] * count, [None] * count,
        [x for _, x in clips], SPEECH_RATE, protocol, {"segments": [dataclasses.astuple(s) for s in segments]},
    )  # fmt: skip


PHONES_TASK = Family("audio", "phone ABX", build_phones, ("speech.jsonl",), Sizes(60, 10, 4), Sizes(8, 4, 2))


def phone_errors(task: Task, rows: Sequence[Tensor], kept: Tensor, frame_rate: float, codes: bool) -> dict[str, Tensor]:
    """`abx_errors` of a task's phones in the frames (T, D) or codes (T, S) of its clips ``kept``."""
    place = {int(i): n for n, i in enumerate(kept)}
    segments = [s for s in (Segment(*s) for s in task.extra["segments"]) if s.clip in place]
    tokens = []
    for s in segments:
        clip = rows[place[s.clip]]
        tokens.append(clip[s.frames(frame_rate, len(clip))])
    return abx_errors(distances(tokens, codes), [s.phone for s in segments], [s.speaker for s in segments])
