"""Means, medians and ratios of items with their bootstrap intervals, against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from synthetic_runs import DELAY, PSNR, WER, line, psnr_lines, spread

from mmtok.bench.scorers import Measure
from mmtok.bench.summary import bootstrap, mean_interval, paired_difference, rate_results, summarise

ABOUT = {"contender": "a", "test_set": "photos", "protocol": {"crop": "center"}}


def test_interval_of_normal_items_is_196_standard_errors():
    x = np.random.default_rng(3).normal(5, 2, 400)
    value, low, high = bootstrap(x[:, None], "mean")
    error = 1.96 * x.std() / math.sqrt(len(x))
    assert value == pytest.approx(x.mean())
    assert low == pytest.approx(value - error, abs=0.06 * error)
    assert high == pytest.approx(value + error, abs=0.06 * error)


def test_intervals_cover_the_truth_about_95_times_in_100():
    hits = 0
    for seed in range(200):
        _, low, high = bootstrap(np.random.default_rng(seed).normal(1, 1, (40, 1)), "mean", seed)
        assert low is not None and high is not None
        hits += low <= 1 <= high
    # Binomial: 4 standard deviations about 0.95, and the percentile interval's known lack of some 2 % at 40 items.
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_of_a_median_is_that_of_order_statistics():
    x = np.sort(np.random.default_rng(5).normal(0, 1, 401))
    value, low, high = bootstrap(x[:, None], "median")
    assert value == x[200]
    # The exact sign-test interval: ranks (n + 1) / 2 -+ 1.96 sqrt(n) / 2; the bootstrap may be a few ranks away.
    ranks = np.searchsorted(x, [low, high])
    assert abs(ranks[0] - (200 - 19.6)) <= 4 and abs(ranks[1] - (200 + 19.6)) <= 4


def test_chunks_of_draws_change_nothing_but_the_draws(monkeypatch):
    x = np.random.default_rng(0).normal(0, 1, (500, 1))
    whole = bootstrap(x, "mean")
    monkeypatch.setattr("mmtok.bench.summary._CELLS", 7 * 500)
    parts = bootstrap(x, "mean")
    assert whole[0] == parts[0] and whole[1:] == pytest.approx(parts[1:], abs=0.01)
    assert parts == bootstrap(x, "mean")


def test_mean_of_items_with_its_protocol():
    found = summarise(psnr_lines([20, 22, 24, 30]), [PSNR], **ABOUT)[0]
    assert (found.value, found.count, found.unit, found.direction) == (24.0, 4, "dB", "higher")
    assert found.low is not None and found.high is not None and 20 <= found.low < 24 < found.high <= 30
    assert found.protocol == {"crop": "center", "summary": "mean"}
    assert found.interval == "95 % percentile bootstrap over items, 2,000 draws, seed 0"


def test_order_and_repetition_of_lines_change_nothing():
    lines = psnr_lines(spread(25))
    shuffled = [lines[i] for i in np.random.default_rng(1).permutation(len(lines))]
    outdated = [line(3, values={"psnr": -100.0}), *shuffled, line(0, "b", values={"psnr": 1.0})]
    assert summarise(outdated, [PSNR], **ABOUT) == summarise(lines, [PSNR], **ABOUT)


def test_ratio_is_the_sum_of_errors_over_the_sum_of_words():
    lines = [line(0, values={"wer": [1, 2]}), line(1, values={"wer": [0, 8]}), line(2, values={"wer": [3, 10]})]
    found = summarise(lines, [WER], **ABOUT)[0]
    assert found.value == pytest.approx(4 / 20)  # and not (1/2 + 0 + 3/10) / 3
    assert found.low == 0 and found.high == pytest.approx(0.5)
    assert found.protocol["counted_on"] == 20


def test_ratio_interval_is_that_of_the_delta_method():
    rng = np.random.default_rng(2)
    words = rng.integers(5, 30, 500)
    errors = rng.binomial(words, 0.1)
    lines = [line(i, values={"wer": [int(e), int(w)]}) for i, (e, w) in enumerate(zip(errors, words, strict=True))]
    found = summarise(lines, [WER], **ABOUT)[0]
    rest = errors - found.value * words
    half = 1.96 * rest.std() / words.mean() / math.sqrt(len(words))
    assert found.low is not None and found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)


def test_ratio_of_nothing_is_not_run():
    found = summarise([line(0, values={"wer": [0, 0]}), line(1, values={"wer": [2, 0]})], [WER], **ABOUT)[0]
    assert found.value is None and "nothing to divide by" in str(found.not_run)


def test_median_does_not_move_with_one_outlier():
    lines = [line(i, values={"delay": v}) for i, v in enumerate([8, 8, 8, 8, 8, 8, 8, 8, 8, 4000])]
    found = summarise(lines, [DELAY], **ABOUT)[0]
    assert (found.value, found.low, found.high) == (8, 8, 8)


def test_exact_items_are_counted_and_in_no_mean():
    lines = [*psnr_lines([20, 22]), line(2, values={"psnr": "inf"}), line(3, values={"psnr": "inf"})]
    found = summarise(lines, [PSNR], **ABOUT)[0]
    assert (found.value, found.count, found.protocol["exact"]) == (21, 2, 2)
    all_exact = summarise(lines[2:], [PSNR], **ABOUT)[0]
    assert (all_exact.value, all_exact.low, all_exact.count) == (math.inf, None, 2)


def test_infinitely_bad_items_are_named_not_dropped():
    lines = [*psnr_lines([20, 22]), line(2, values={"psnr": "-inf"})]
    found = summarise(lines, [PSNR], **ABOUT)[0]
    assert found.value == 21 and found.protocol["unscored"] == {"-inf, which has no place in a mean": 1}
    lower = Measure("psnr", "dB", "lower", "where minus infinity is best")
    assert summarise(lines, [lower], **ABOUT)[0].protocol["exact"] == 1


def test_items_without_a_value_are_counted_by_reason():
    lines = [*psnr_lines([20, 22]), *(line(i, unscored={"psnr": "silent"}) for i in (2, 3)), line(4)]
    found = summarise(lines, [PSNR], **ABOUT)[0]
    assert found.count == 2 and found.protocol["unscored"] == {"silent": 2, "not in the run's lines": 1}
    nothing = summarise(lines[2:4], [PSNR], **ABOUT)[0]
    assert nothing.value is None and nothing.not_run == "no item has a value: silent (2 items)"
    nobody = summarise([], [PSNR], **ABOUT)[0]
    assert nobody.value is None and "run the same command again" in str(nobody.not_run)


def test_one_item_has_no_interval():
    found = summarise(psnr_lines([20]), [PSNR], **ABOUT)[0]
    assert (found.value, found.low, found.high, found.interval) == (20, None, None, None)


def test_values_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"psnr of i0: expected one number, got \[1.0, 2.0\]"):
        summarise([line(0, values={"psnr": [1, 2]})], [PSNR], **ABOUT)
    with pytest.raises(ValueError, match="expected a pair"):
        summarise([line(0, values={"wer": 0.5})], [WER], **ABOUT)
    with pytest.raises(ValueError, match="expected a summary of"):
        summarise([], [Measure("x", "1", "higher", "x", "mode")], **ABOUT)


def test_rates_of_pictures_and_of_sounds():
    pictures = [line(0, bits=100.0, pixels=1000), line(1, bits=300.0, pixels=1000)]
    found = {r.metric: r for r in rate_results(pictures, **ABOUT)}
    assert set(found) == {"bits_per_item", "bpp"}
    assert found["bits_per_item"].value == 200 and found["bpp"].value == pytest.approx(0.2)
    sounds = [
        line(0, bits=100.0, pixels=None, seconds_of_sound=1.0),
        line(1, bits=500.0, pixels=None, seconds_of_sound=3.0),
    ]
    found = {r.metric: r for r in rate_results(sounds, **ABOUT)}
    assert set(found) == {"bits_per_item", "bitrate_bps"}
    assert found["bitrate_bps"].value == pytest.approx(150)  # of the sums, not the mean of 100 and 167
    originals = [{k: v for k, v in x.items() if k != "bits"} for x in pictures]
    assert rate_results(originals, **ABOUT) == []


def test_paired_difference_cancels_what_items_share():
    items = np.random.default_rng(0).normal(25, 5, 100)
    noise = np.random.default_rng(1).normal(0.2, 0.3, 100)
    found = paired_difference(psnr_lines(items), psnr_lines(items + noise, "b"), "psnr")
    assert found is not None and found.count == 100 and found.left_out == 0
    half = 1.96 * noise.std() / 10
    assert found.value == pytest.approx(noise.mean())
    assert found.low == pytest.approx(found.value - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.1 * half)
    assert found.certain


def test_paired_difference_takes_common_finite_items_only():
    a = [*psnr_lines([20, 22, 24]), line(3, values={"psnr": "inf"}), line(4)]
    b = [line(i, "b", values={"psnr": v}) for i, v in ((0, 21.0), (2, 25.0), (3, 30.0), (9, 9.0))]
    found = paired_difference(a, b, "psnr")
    assert found is not None
    assert (found.value, found.count, found.left_out) == (1.0, 2, 4)
    assert paired_difference(a, b[3:], "psnr") is None and paired_difference(a, b, "ssim") is None


def test_paired_difference_of_ratios_and_rates():
    a = [line(i, values={"wer": [1, 10]}) for i in range(5)]
    b = [line(i, "b", bits=1024.0, values={"wer": [3, 10]}) for i in range(5)]
    found = paired_difference(a, b, "wer", "ratio")
    assert found is not None and (found.value, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    assert paired_difference(a, b, "wer", "mean") is None  # pairs have no mean
    rate = paired_difference(a, b, "bpp", "ratio")
    assert rate is not None and rate.value == pytest.approx(512 / 4096)
    with pytest.raises(ValueError, match="expected one of"):
        paired_difference(a, b, "wer", "mode")


def test_mean_interval_is_the_one_of_the_shipped_tables():
    x = list(np.random.default_rng(7).normal(0, 1, 60))
    means = np.random.default_rng(0).choice(x, (2000, 60)).mean(1)
    found = mean_interval(x)
    assert (found["low"], found["high"]) == tuple(np.percentile(means, [2.5, 97.5]))
    assert mean_interval([3.0]) == {"mean": 3.0, "low": 3.0, "high": 3.0, "count": 1}
