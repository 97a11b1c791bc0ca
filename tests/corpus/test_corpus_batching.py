"""Batches of like lengths: every item once, limits kept, little padding."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.corpus.batching import batches

LENGTHS = st.lists(st.integers(1, 2000), max_size=120)


def padded(lengths: list[int], batch: list[int]) -> int:
    return len(batch) * max(lengths[i] for i in batch)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(1, 5000), st.floats(0, 0.5), st.none() | st.integers(1, 9))
def test_every_item_once_within_all_limits(lengths, limit, padding, most):
    found = batches(lengths, limit, padding, most)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert found == batches(list(lengths), limit, padding, most)
    for batch in found:
        size = padded(lengths, batch)
        assert batch == sorted(batch)
        assert size <= limit or len(batch) == 1
        assert most is None or len(batch) <= most
        assert size - sum(lengths[i] for i in batch) <= padding * size


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 5000), st.randoms())
def test_the_order_of_the_items_does_not_matter_to_the_lengths_of_the_batches(lengths, limit, rng):
    shuffled = list(lengths)
    rng.shuffle(shuffled)
    found = [[sorted(items[i] for i in b) for b in batches(items, limit)] for items in (lengths, shuffled)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "draw",
    [
        lambda r: int(16000 * r.lognormvariate(1.0, 0.8)) + 1,  # speech: a median of 2.7 s
        lambda r: int(16000 * r.uniform(0.5, 30)),
        lambda r: int(16000 * (0.3 + r.expovariate(0.4))),
        lambda r: 16000 * r.choice([10, 10, 10, 3]),  # clips cut to 10 s, and their ends
    ],
)
def test_ordinary_lengths_share_batches_with_little_padding(draw):
    rng = random.Random(0)
    lengths = [draw(rng) for _ in range(256)]
    found = batches(lengths, 60 * 16000)
    size = sum(padded(lengths, b) for b in found)
    assert 1 - sum(lengths) / size < 0.1
    # Not by giving up on batches: a minute of sound a batch is what the limit allows.
    assert len(found) < 1.5 * (sum(lengths) / (60 * 16000)) + 12
    assert len(found) < len(lengths) / 2


def test_equal_lengths_fill_batches_without_padding():
    assert [len(b) for b in batches([64 * 64] * 100, limit=64 * 64 * 32, padding=0.0)] == [32, 32, 32, 4]
    assert [len(b) for b in batches([7] * 5, limit=10**6, most=2)] == [2, 2, 1]


def test_what_is_longer_than_the_limit_goes_alone_and_first():
    assert batches([5, 400, 5, 5], limit=20) == [[1], [0, 2, 3]]
    assert batches([], limit=20) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0, 3], 10), "expected at least 1 each, got 0"),
        (([3], 0), "padded batch of at least 1, got 0"),
        (([3], 10, 1.0), "share in 0 <= padding < 1, got 1.0"),
        (([3], 10, -0.1), "got -0.1"),
        (([3], 10, 0.1, 0), "at least 1 item a batch"),
    ],
)
def test_senseless_limits_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        batches(*arguments)
