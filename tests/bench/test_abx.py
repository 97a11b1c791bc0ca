"""Phone ABX: dynamic time warping against a plain loop, error rates with a closed form, frames of a phone."""

from __future__ import annotations

import math

import pytest
import torch

from mmtok.bench.abx import Segment, abx_errors, angular, distances, dtw, hamming, pair_interval, phone_errors
from mmtok.bench.probe_material import Task


def plain_dtw(cost: list[list[float]]) -> float:
    """Mean cost on the best path, cell by cell; ties: diagonal, then up, then left."""
    rows, columns = len(cost), len(cost[0])
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for i in range(rows):
        for j in range(columns):
            before = [best[p] for p in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if p in best]
            total, length = min(before, key=lambda b: b[0]) if before else (0.0, 0)
            best[i, j] = (total + cost[i][j], length + 1)
    total, length = best[rows - 1, columns - 1]
    return total / length


def test_dtw_is_that_of_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(40, 7, 9, generator=generator)
    rows = torch.randint(1, 8, (40,), generator=generator)
    columns = torch.randint(1, 10, (40,), generator=generator)
    got = dtw(cost, rows, columns)
    for p in range(40):
        want = plain_dtw(cost[p, : rows[p], : columns[p]].tolist())
        assert float(got[p]) == pytest.approx(want, abs=1e-6)


def test_dtw_in_closed_form():
    same = 1 - torch.eye(5)[None]
    assert float(dtw(same, torch.tensor([5]), torch.tensor([5]))) == 0  # along the diagonal
    flat = torch.full((1, 4, 9), 0.3)
    assert float(dtw(flat, torch.tensor([4]), torch.tensor([9]))) == pytest.approx(0.3)
    line = torch.rand(1, 1, 6)
    assert float(dtw(line, torch.tensor([1]), torch.tensor([6]))) == pytest.approx(float(line.mean()))  # the only path


def test_frame_distances():
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    b = torch.tensor([[[3.0, 0.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    want = torch.tensor([[[0, 1, 0.25, 0.5], [0.5, 0.5, 0.25, 0.5]]])
    assert torch.allclose(angular(a, b), want, atol=1e-3)
    codes = torch.tensor([[[1, 2, 3, 4]]]), torch.tensor([[[1, 2, 3, 4], [1, 0, 3, 0], [0, 0, 0, 0]]])
    assert hamming(*codes).flatten().tolist() == [0, 0.5, 1]


def test_distances_do_not_depend_on_what_is_beside():
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randn(n, 6, generator=generator) for n in (3, 9, 1, 5, 5, 2)]
    got = distances(tokens, codes=False)
    assert torch.equal(got, got.T) and bool((got.diagonal() == 0).all())
    for i in range(6):
        for j in range(i):
            pair = distances([tokens[i], tokens[j]], codes=False)
            assert float(got[i, j]) == pytest.approx(float(pair[0, 1]), abs=1e-5)
            cost = angular(tokens[i][None], tokens[j][None])[0]
            assert float(got[i, j]) == pytest.approx(plain_dtw(cost.tolist()), abs=2e-3)


def labels(phones: int, voices: int, count: int) -> tuple[list[str], list[str]]:
    every = [(f"p{p}", f"v{v}") for p in range(phones) for v in range(voices) for _ in range(count)]
    return [p for p, _ in every], [v for _, v in every]


def test_identical_tokens_of_a_phone_have_no_errors():
    phones, speakers = labels(4, 2, 3)
    generator = torch.Generator().manual_seed(2)
    of_phone = {p: torch.randn(4, 8, generator=generator) for p in set(phones)}
    errors = abx_errors(distances([of_phone[p] for p in phones], codes=False), phones, speakers)
    assert len(errors["within"]) == len(errors["across"]) == 6  # pairs of four phones
    assert float(errors["within"].max()) == float(errors["across"].max()) == 0


def test_random_tokens_are_at_chance_and_equal_ones_exactly():
    phones, speakers = labels(8, 2, 8)
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 9, (4, 3), generator=generator) for _ in phones]
    errors = abx_errors(distances(tokens, codes=True), phones, speakers)
    for values in errors.values():
        assert float(values.mean()) == pytest.approx(0.5, abs=0.03)
        low, high = pair_interval(values)
        assert low < float(values.mean()) < high and (low, high) == pair_interval(values)
    constant = abx_errors(distances([torch.zeros(2, 3, dtype=torch.int64)] * len(phones), True), phones, speakers)
    assert all(bool((v == 0.5).all()) for v in constant.values())  # ties are half wrong


def test_errors_by_hand():
    """One phone's tokens at 0, 1 and 5 on a line, the other's at 2 and 9: each triplet counted by hand."""
    at = torch.tensor([0.0, 1.0, 5.0, 2.0, 9.0])
    phones = ["p", "p", "p", "q", "q"]
    errors = abx_errors((at[:, None] - at).abs(), phones, ["v"] * 5)
    # X of p, (X; A; B): 0: A 1 right twice; A 5 wrong against 2, right against 9. 1: A 0 ties with 2 (half), right;
    # A 5 wrong, right. 5: A 0 wrong, wrong; A 1 wrong, and 4 against 4 half. X of q: 2: A 9 wrong against 0, 1, 5;
    # 9: A 2 wrong against 5, right against 0 and 1.
    of_p = (1 + 0.5 + 1 + 2 + 1 + 0.5) / 12
    of_q = (3 + 1) / 6
    assert float(errors["within"]) == pytest.approx((of_p + of_q) / 2)
    assert len(errors["across"]) == 0  # one speaker


def test_across_speakers_asks_for_a_phone_in_another_voice():
    """Frames of voice and phone are never wrong, however much louder the voice is; those of the voice alone guess."""
    phones, speakers = labels(3, 2, 4)
    voice = {"v0": torch.tensor([[1.0, 0.0]]), "v1": torch.tensor([[0.0, 1.0]])}
    phone = {f"p{i}": torch.eye(3)[i][None] for i in range(3)}
    tokens = [torch.cat([9 * voice[s], phone[p]], 1) for p, s in zip(phones, speakers, strict=True)]
    errors = abx_errors(distances(tokens, codes=False), phones, speakers)
    assert float(errors["within"].max()) == 0 and float(errors["across"].max()) == 0
    only = [voice[s] for s in speakers]
    blind = abx_errors(distances(only, codes=False), phones, speakers)
    assert float(blind["across"].mean()) == 0.5


@pytest.mark.parametrize(
    ("start", "stop", "want"),
    [(0.0, 0.1, (0, 5)), (0.03, 0.05, (1, 2)), (0.031, 0.048, (1, 2)), (0.9, 2.0, (45, 50)), (3.0, 3.1, (49, 50))],
)
def test_frames_of_a_phone_are_those_whose_centre_it_holds(start: float, stop: float, want: tuple[int, int]):
    frames = Segment(0, "AA", "v", start, stop).frames(50.0, 50)
    assert (frames.start, frames.stop) == want
    inside = [t for t in range(50) if start <= (t + 0.5) / 50 < stop]
    if inside:
        assert (inside[0], inside[-1] + 1) == want


def test_phone_errors_reads_the_right_frames_of_the_clips_that_are_left():
    segments = [
        (clip, phone, speaker, t / 10, t / 10 + 0.1)
        for clip, speaker in ((0, "v"), (2, "w"))
        for t, phone in enumerate(["AA", "B", "AA", "B"])
    ]
    segments.append((1, "AA", "v", 0.0, 0.1))
    task = Task(
        "phones", "audio", [], ["a", "b", "c"], [0] * 3, ["clip"] * 3, [None] * 3, [], 16000, {}, {"segments": segments}
    )
    rows = [torch.tensor([[7], [8], [7], [8]]), torch.tensor([[7], [8], [7], [8]])]
    errors = phone_errors(task, rows, torch.tensor([0, 2]), 10.0, codes=True)  # clip 1 was refused
    assert errors["within"].tolist() == [0.0] and errors["across"].tolist() == [0.0]
    swapped = phone_errors(task, [rows[0], 15 - rows[1]], torch.tensor([0, 2]), 10.0, codes=True)
    assert swapped["within"].tolist() == [0.0] and swapped["across"].tolist() == [1.0]
    assert math.isclose(float(swapped["across"].mean()), 1)
