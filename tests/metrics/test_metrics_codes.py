"""Code statistics against closed forms, and the metric table itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtok.metrics import METRICS
from mmtok.metrics.codes import code_statistics, entropy, mutual_information, perplexity, token_statistics, usage
from mmtok.tokens import Tokens, TokensError, TokenSpec


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 64), st.integers(1, 5))
def test_uniform_codes(used, repeats):
    codes = torch.arange(used).repeat(repeats)[None, None]  # every one of `used` codes equally often
    assert float(entropy(codes, [64])) == pytest.approx(math.log2(used))
    assert float(perplexity(codes, [64])) == pytest.approx(used)
    assert float(usage(codes, [64])) == used / 64


def test_entropy_of_unequal_counts():
    codes = torch.tensor([[[0, 0, 1, 2], [3, 3, 3, 3]]])  # 1/2, 1/4, 1/4: 1.5 bits; one code: 0 bits
    found = code_statistics(codes, [4, 4])
    assert found.entropy_bits.tolist() == [1.5, 0.0]
    assert found.perplexity.tolist() == pytest.approx([2**1.5, 1.0])
    assert found.usage.tolist() == [0.75, 0.25]
    assert found.samples.tolist() == [4, 4]


def test_huge_codebooks_need_no_table():
    codes = torch.tensor([[[0, 2**61, 5, 2**61]]])
    assert float(entropy(codes, [2**62])) == 1.5
    assert float(usage(codes, [2**62])) == 3 / 2**62


def test_masked_positions_do_not_count():
    spec = TokenSpec("t", "audio", (8, 8), frame_rate=50.0)
    codes = torch.tensor([[[1, 2, 0, 0], [3, 3, 0, 0]], [[1, 2, 1, 2], [3, 3, 3, 3]]])
    found = token_statistics(Tokens(codes, torch.tensor([2, 4]), spec))
    assert found.samples.tolist() == [6, 6]
    assert found.entropy_bits.tolist() == [1.0, 0.0]  # the zeros of the padding would be a third code


def test_a_strided_level_counts_each_code_once():
    spec = TokenSpec("t", "audio", (8, 8), level_strides=(2, 1), frame_rate=50.0)
    codes = torch.tensor([[[0, 0, 1, 1, 2, 2, 3], [0, 1, 2, 3, 4, 5, 6]]])
    found = token_statistics(Tokens(codes, torch.tensor([7]), spec))
    assert found.samples.tolist() == [4, 7]
    assert found.entropy_bits.tolist() == pytest.approx([2.0, math.log2(7)])


def test_mutual_information_of_copies_and_of_a_full_product():
    a = torch.arange(8).repeat(8)  # all 64 pairs once: independent
    b = torch.arange(8).repeat_interleave(8)
    assert float(mutual_information(a, b)) == pytest.approx(0.0, abs=1e-12)
    assert float(mutual_information(a, (a * 3 + 1) % 8)) == pytest.approx(3.0)  # a permutation tells everything
    assert float(mutual_information(a, a // 2)) == pytest.approx(2.0)


def test_redundancy_stands_out_from_chance():
    g = torch.Generator().manual_seed(0)
    first = torch.randint(0, 16, (4, 1, 500), generator=g)
    third = torch.randint(0, 16, (4, 1, 500), generator=g)
    found = code_statistics(torch.cat([first, (first + 3) % 16, third], dim=1), [16, 16, 16])
    assert found.shared_bits.shape == found.shared_bits_chance.shape == (2,)
    assert found.shared_bits[0] == pytest.approx(4.0, abs=0.02) and found.shared_bits_chance[0] < 0.15
    assert abs(found.shared_bits[1] - found.shared_bits_chance[1]) < 0.05
    again = code_statistics(torch.cat([first, (first + 3) % 16, third], dim=1), [16, 16, 16])
    assert torch.equal(found.shared_bits_chance, again.shared_bits_chance)


def test_one_level_has_no_redundancy():
    assert code_statistics(torch.zeros(1, 1, 3, dtype=torch.int64), [2]).shared_bits.shape == (0,)


CODES = torch.tensor([[[0, 1], [2, 3]]])


@pytest.mark.parametrize(
    ("codes", "sizes", "mask", "message"),
    [
        (CODES[0], [4, 4], None, r"int64 \(B,Q,T\)"),
        (CODES.float(), [4, 4], None, r"int64 \(B,Q,T\)"),
        (CODES, [4], None, "codebook_sizes: expected 2 values"),
        (CODES, [4, 4], torch.ones(1, 3, dtype=torch.bool), r"mask: expected bool of shape \(1, 2\)"),
        (CODES, [4, 4], torch.ones(1, 2), "mask: expected bool"),
        (CODES, [4, 4], torch.zeros(1, 2, dtype=torch.bool), "at least one valid code"),
        (CODES[..., :0], [4, 4], None, "at least one valid code"),
    ],
)
@pytest.mark.parametrize("function", [usage, entropy, perplexity, code_statistics])
def test_bad_codes_are_named(function, codes, sizes, mask, message):
    with pytest.raises(ValueError, match=message):
        function(codes, sizes, mask)


def test_codes_out_of_range_name_the_place():
    with pytest.raises(TokensError, match="item 0, level 1, position 1"):
        usage(CODES, [4, 3])


def test_mutual_information_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="second: expected int64"):
        mutual_information(torch.arange(3), torch.arange(4))


def test_the_table_is_complete_and_its_functions_run():
    for name, metric in METRICS.items():
        assert name == metric.name and metric.direction in ("higher", "lower") and metric.unit
        assert metric.needs in (None, "audio-metrics")
        if metric.modality == "codes":
            assert metric.function(CODES, [4, 4], None).shape == (2,)
        elif metric.modality == "audio":
            t = torch.arange(16000) / 16000
            x = (torch.sin(2 * math.pi * 200 * t) * torch.sin(2 * math.pi * 3 * t))[None, None] * 0.3
            y = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            equal, worse = metric.function(x, x, 16000), metric.function(x, y, 16000)
            assert equal.shape == (1,) and (equal >= worse if metric.direction == "higher" else equal <= worse)
        else:
            x = torch.rand(1, 3, 176, 176, generator=torch.Generator().manual_seed(0))
            assert float(metric.function(x, x)) > float(metric.function(x, x.flip(-1)))
            assert metric.modality == "image" and metric.direction == "higher"
