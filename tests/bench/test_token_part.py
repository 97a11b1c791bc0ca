"""The part `tokens`: code lengths against closed forms, and each measure on tokenizers that have a known fault."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok.bench.contenders import Contender, open_contenders
from mmtok.bench.entropy_coding import Counts, adaptive_bits, level_bits
from mmtok.bench.parts import Context
from mmtok.bench.records import Item, Result, TestSet, result_line, result_of
from mmtok.bench.token_part import ABOUT_CODERS, LAWS, jobs
from mmtok.layers.text import TextFeatures
from mmtok.tokenizer import AudioTokenizer, ImageTokenizer
from mmtok.tokens import Tokens, TokenSpec


def test_predictions_are_probabilities_at_every_step():
    draw, size = random.Random(0), 5
    codes = [draw.randrange(size) for _ in range(300)]
    alone, contexts, previous, spent = Counts(), {}, -1, [0.0, 0.0]
    for code in codes:
        context = contexts.setdefault(previous, Counts())
        order0 = [alone.probability(k, 1 / size) for k in range(size)]
        order1 = [context.probability(k, p) for k, p in enumerate(order0)]
        for probabilities in (order0, order1):
            assert sum(probabilities) == pytest.approx(1, abs=1e-12) and min(probabilities) > 0
        spent[0] -= math.log2(order0[code])
        spent[1] -= math.log2(order1[code])
        alone.learn(code)
        context.learn(code)
        previous = code
    assert adaptive_bits(codes, size, [-1, *codes[:-1]]) == pytest.approx(spent)


@pytest.mark.parametrize("size", [4, 64])
def test_uniform_codes_cost_a_little_more_than_log2_k_and_less_with_time(size: int):
    draw = random.Random(1)
    codes = [draw.randrange(size) for _ in range(20000)]
    excess = [adaptive_bits(codes[:n], size)[0] / n - math.log2(size) for n in (1000, 20000)]
    assert 0 < excess[1] < excess[0] / 4 and excess[1] < 0.02


def test_a_constant_costs_its_first_code_and_little_else_even_of_2_64():
    (bits,) = adaptive_bits([2**63 - 7] * 10000, 2**64)
    assert 64 < bits < 68


def test_codes_that_never_repeat_cost_about_log2_k():
    (bits,) = adaptive_bits(list(range(500)), 2**40)
    assert 40 * 500 < bits < 40.1 * 500


def test_order_1_finds_the_entropy_rate_of_a_markov_chain():
    draw, size, stay = random.Random(2), 4, 0.85
    codes = [0]
    for _ in range(20000):
        codes.append(codes[-1] if draw.random() < stay else draw.choice([k for k in range(size) if k != codes[-1]]))
    rate = -stay * math.log2(stay) - (1 - stay) * math.log2((1 - stay) / (size - 1))
    order0, order1 = (b / len(codes) for b in adaptive_bits(codes, size, [-1, *codes[:-1]]))
    assert order0 == pytest.approx(2, abs=0.02)  # all codes are equally likely
    stays = sum(a == b for a, b in itertools.pairwise(codes)) / (len(codes) - 1)
    known = -stays * math.log2(stay) - (1 - stays) * math.log2((1 - stay) / (size - 1))  # by who knows the chain
    assert known == pytest.approx(rate, rel=0.03)
    assert known - 0.001 < order1 < known + 0.01


def test_contexts_must_be_one_a_code():
    with pytest.raises(ValueError, match="expected 3, one a code"):
        adaptive_bits([1, 2, 3], 4, [1])


def tokens(levels: Sequence[Sequence[int]], spec: TokenSpec, **side: int) -> Tokens:
    codes = torch.tensor([list(level) for level in levels])[None]
    return Tokens(codes, torch.tensor([codes.shape[2]]), spec, {k: torch.tensor([v]) for k, v in side.items()})


def test_a_level_that_repeats_the_one_before_costs_nothing_behind_it():
    draw, spec = random.Random(3), TokenSpec("t", "audio", (16, 16), frame_rate=50.0)
    items = []
    for _ in range(4):
        codes = [draw.randrange(16) for _ in range(500)]
        items.append(tokens([codes, [(c * 5 + 3) % 16 for c in codes]], spec))
    first, second = level_bits(items)
    assert first.order1_level is None and first.samples == second.samples == 2000
    assert first.nominal == second.nominal == 8000
    assert second.order0 > 7900 and second.order1_level is not None and second.order1_level < 200
    three = (second.order0, second.order1_previous, second.order1_level)
    assert second.mixture == pytest.approx(min(three) + math.log2(3))
    assert min(first.order0, first.order1_previous) <= first.mixture <= min(first.order0, first.order1_previous) + 1


def test_strided_levels_and_padding_count_once():
    spec = TokenSpec("t", "audio", (4, 4), level_strides=(2, 1), frame_rate=50.0)
    item = tokens([[1, 1, 2, 2, 0], [3, 2, 1, 0, 0]], spec)
    item = Tokens(item.codes, torch.tensor([4]), spec)
    assert [level.samples for level in level_bits([item])] == [2, 4]


class Cells(ImageTokenizer):
    """16 cells of mean brightness, a byte in two levels of 16 codes; decode gives ``darker`` less of it."""

    type_name = "cells"
    darker = 0
    crowded = 0.0  # brightness that every other picture of a batch adds

    def __init__(self) -> None:
        super().__init__({})
        self.one = torch.nn.Parameter(torch.ones(1))

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "image", (16, 16), num_tokens=16)

    def encode_pixels(
        self, x: Tensor, num_codebooks: int | None, num_tokens: int | None, text: TextFeatures | None
    ) -> tuple[Tensor, Tensor]:
        cells = torch.nn.functional.adaptive_avg_pool2d(x.mean(1), 4).flatten(1) + self.crowded * (len(x) - 1)
        byte = (cells * 255).round().long().clamp(0, 255)
        codes = torch.stack([byte // 16, byte % 16], dim=1)[:, :num_codebooks, :num_tokens]
        return codes, torch.full((len(x),), codes.shape[2])

    def decode_pixels(
        self,
        codes: Tensor,
        height: int,
        width: int,
        text: TextFeatures | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        byte = codes[:, 0] * 16 + (codes[:, 1] if codes.shape[1] > 1 else 8) - self.darker
        cells = (byte / 255 * self.one).reshape(-1, 1, 4, 4).expand(-1, 3, -1, -1)
        return torch.nn.functional.interpolate(cells, (height, width))


class Late(AudioTokenizer):
    """Two samples of 16 bits a frame, given back ``late`` samples late."""

    type_name = "late"
    sample_rate, hop_length, late = 8000, 2, 3

    def __init__(self) -> None:
        super().__init__({})
        self.one = torch.nn.Parameter(torch.ones(1))

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "audio", (2**16, 2**16), frame_rate=4000.0)

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        codes = ((x[:, 0] + 1) * 32767).round().long().clamp(0, 65535)
        return codes.unflatten(1, (-1, 2)).transpose(1, 2)[:, :num_codebooks]

    def decode_samples(self, codes: Tensor, lengths: Tensor) -> Tensor:
        y = codes.transpose(1, 2).flatten(1)[:, None].float() / 32767 * self.one - 1
        return torch.nn.functional.pad(y, (self.late, -self.late))


def pictures(count: int = 4) -> TestSet:
    generator = torch.Generator().manual_seed(0)
    items = [Item(f"p{i}", torch.randint(30, 226, (3, 32, 32), generator=generator) / 255) for i in range(count)]
    return TestSet("noise-32", "image", items, {"set": "noise-32", "count": count})


def sounds(rate: int = 8000) -> TestSet:
    generator = torch.Generator().manual_seed(0)
    items = [Item(f"s{i}", torch.randn(1, rate, generator=generator).mul(0.1).clamp(-1, 1), rate) for i in range(3)]
    return TestSet("noise-1s", "audio", items, {"set": "noise-1s", "sample_rate": rate})


def results(
    contender: Contender, test_set: TestSet, kind: str, codes: Sequence[Tokens] | None = None, **options: Any
) -> dict[str, Result]:
    made = [contender.encode(item) for item in test_set.items] if codes is None else codes
    context = Context(Path("unused"), None, None, [test_set], lambda _: made, smoke=True, options=options)
    (job,) = (j for j in jobs(contender, context) if j.key == f"tokens/{kind}/{test_set.name}/{contender.label}")
    found = list(job.run())
    if kind != "laws":  # which take their time
        assert found == list(job.run())  # whatever ran before
    for r in found:
        assert (r.part, r.contender, r.test_set) == ("tokens", contender.label, test_set.name)
        assert result_of(json.loads(json.dumps(result_line(r), allow_nan=False))) == r  # a line of a file holds it
        assert r.protocol["contender"]["tokenizer"] == contender.tokenizer.name and r.protocol["smoke"]
    assert len({r.metric for r in found}) == len(found)
    return {r.metric: r for r in found}


def test_codes_are_counted_and_priced():
    found = results(Contender("cells", Cells().eval()), pictures(), "codes")
    bits = found["bits_per_item"]
    assert (bits.value, bits.low, bits.high, bits.count) == (128, 128, 128, 4)
    assert found["bpp"].value == 128 / 1024 and found["tokens_per_item"].value == 32
    assert found["positions_p05"].value == found["positions_p95"].value == found["positions_per_item"].value == 16
    assert "length_bits_per_item" not in found  # all have one
    assert found["usage[0]"].value == 100 * len(set(_level(0))) / 16
    assert found["usage[1]"].value + (found["dead_share[1]"].value or 0) == 100
    assert found["perplexity[1]"].value == pytest.approx(2 ** (found["entropy[1]"].value or 0))
    assert found["perplexity[1]"].count == found["perplexity[1]"].protocol["samples"] == 64
    shared = [found[f"{name}[0]"].value for name in ("shared_bits", "shared_bits_chance", "redundancy")]
    assert shared[2] == pytest.approx((shared[0] or 0) - (shared[1] or 0))
    plug_in = found["plug_in_bits_per_item"].value
    assert plug_in == pytest.approx(16 * sum(found[f"entropy[{q}]"].value or 0 for q in (0, 1)))
    for coder in ABOUT_CODERS:
        own = found[f"{coder}_bits_per_item"]
        assert own.value and plug_in and own.value > plug_in  # what can be decoded costs more than hindsight
        assert found[f"{coder}_bpp"].value == pytest.approx(own.value / 1024)
        assert "1305.3671" in own.protocol["estimator"] and own.protocol["share_of_nominal"] == own.value / 128
    per_code = [found[f"order0_bits_per_code[{q}]"].value or 0 for q in (0, 1)]
    assert found["order0_bits_per_item"].value == pytest.approx(16 * sum(per_code))


def _level(level: int) -> list[int]:
    return [int(c) for item in pictures().items for c in Cells().eval().encode(item.x).codes[0, level]]


def test_refused_items_do_not_shift_the_sizes_of_the_others():
    tok, test_set = Cells().eval(), pictures()
    codes = [tok.encode(item.x) for item in test_set.items[1:]]
    found = results(Contender("cells", tok), test_set, "codes", codes)
    assert found["bits_per_item"].count == 3 and found["bpp"].value == 128 / 1024


def test_a_refused_item_has_no_generations_and_is_counted():
    test_set = sounds()
    items = [Item("empty", torch.zeros(1, 0), 8000), *test_set.items]
    found = results(Contender("late", Late().eval()), TestSet("x", "audio", items, {}), "generations", [])
    assert found["idempotence"].count == 1 and sum(found["idempotence"].protocol["unscored"].values()) == 1


def test_sound_is_priced_by_the_second():
    contender = Contender("late#levels=1", Late().eval(), num_codebooks=1)
    found = results(contender, sounds(), "codes")
    assert found["bitrate_bps"].value == 16 * 4000 and found["positions_per_second"].value == 4000
    assert found["tokens_per_second"].value == 4000 and found["bitrate_bps"].unit == "bit/s"
    why = found["order1_level_bits_per_item"].not_run
    assert why and "one level" in why and found["redundancy[0]"].not_run


def test_lengths_that_follow_the_picture_have_a_distribution_and_a_price():
    spec = TokenSpec("d", "image", (16, 16), num_tokens=16)
    codes = [tokens([[1] * n, [2] * n], spec) for n in (2, 4, 6, 8, 16)]
    found = results(Contender("cells", Cells().eval()), pictures(5), "codes", codes)
    assert found["positions_per_item"].value == 7.2 and found["positions_per_item"].low != 7.2
    assert found["positions_p05"].value == pytest.approx(2.4) and found["positions_p95"].value == pytest.approx(14.4)
    assert 4 < (found["length_bits_per_item"].value or 0) < 5  # five lengths of sixteen, none of them twice


def test_an_idempotent_tokenizer_is_exact_and_a_darkening_one_loses_what_it_must():
    found = results(Contender("cells", Cells().eval()), pictures(), "generations")
    assert (found["idempotence"].value, found["idempotence[1]"].value) == (100, 100)
    assert found["generation5_psnr"].value == math.inf and found["generation5_psnr"].protocol["exact"] == 2
    assert found["generation_loss_psnr"].value == 0 and found["idempotence"].count == 2
    tok = Cells().eval()
    tok.darker = 1
    found = results(Contender("cells", tok), pictures(), "generations", generation_items=4)
    assert (found["idempotence"].value or 0) < 60 and found["idempotence[1]"].value == 0
    for generation in range(2, 6):
        wanted = 20 * math.log10(255 / (generation - 1))  # as much darker than the first, everywhere
        assert found[f"generation{generation}_psnr"].value == pytest.approx(wanted, abs=1e-3)
    assert (found["generation_loss_psnr"].value or 0) > 0


def test_a_late_codec_is_late_again_each_generation_and_not_distorted():
    found = results(Contender("late", Late().eval()), sounds(), "generations")
    assert found["generation5_delay"].value == 4 * Late.late
    assert (found["generation5_si_sdr_aligned"].value or 0) > 60 > 0 > (found["generation5_si_sdr"].value or 0)
    assert (found["idempotence"].value or 100) < 5


def test_what_only_encodes_has_no_generations():
    tok = Cells().eval()
    tok.encode_only = True  # type: ignore[misc]
    found = results(Contender("cells", tok), pictures(), "generations", [])
    assert all(r.not_run and "only encodes" in r.not_run for r in found.values())


def test_miss_rates_are_percents_at_the_contenders_own_rate():
    found = results(Contender("cells#levels=1", Cells().eval(), num_codebooks=1), pictures(), "laws")
    assert set(found) == {f"{law.replace(' ', '_')}_miss_rate" for law in LAWS}
    assert [found[f"batch_{x}_miss_rate"].value for x in ("size", "shape")] == [0, 0]
    assert found["batch_size_miss_rate"].count == 3 * 16  # of one level, three pictures
    assert found["chunking_miss_rate"].not_run == "pictures are not cut"
    tok = Cells().eval()
    tok.crowded = 0.1
    found = results(Contender("cells", tok), pictures(), "laws")
    assert found["batch_size_miss_rate"].value == pytest.approx(100, abs=15)
    assert found["determinism_miss_rate"].value == 0 and found["dtype_miss_rate"].protocol["autocast"] == "bfloat16"
    found = results(Contender("cells", tok), pictures(2), "laws")
    assert all(r.not_run and "three items" in r.not_run for r in found.values())


def test_a_file_codec_has_what_makes_sense_and_says_why_not():
    (contender,) = open_contenders(["jpeg:50"])
    test_set = pictures(3)
    found = results(contender, test_set, "codes")
    sizes = [8 * int(contender.encode(item).lengths[0]) for item in test_set.items]
    assert found["bits_per_item"].value == pytest.approx(sum(sizes) / 3)
    assert (found["entropy_coded_bits_per_item"].value or 0) > 0
    for name in ("usage[0]", "perplexity[0]", "redundancy[0]"):
        why = found[name].not_run
        assert why and "bytes of a file" in why
    found = results(contender, test_set, "generations")
    assert found["idempotence"].not_run and (found["generation2_psnr"].value or 0) > 20
    found = results(contender, test_set, "laws")
    assert found["padding_miss_rate"].value == 0 and found["dtype_miss_rate"].not_run


def test_a_streaming_codec_is_measured_at_its_levels():
    from mmtok.audio.codec import AudioCodec

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"strides": (8, 5), "encoder_width": 2, "decoder_width": 8, "latent_dim": 4}
    tok = AudioCodec(8000, **sizes, num_codebooks=2, codebook_size=16, dilations=(1,), kernel_size=3, causal=True)
    contender = Contender("codec#levels=1", tok.eval(), num_codebooks=1)
    found = results(contender, sounds(), "laws", law_seconds=0.1)
    assert found["chunking_miss_rate"].value == 0 and found["padding_miss_rate"].value == 0
    assert found["padding_miss_rate"].protocol["contender"]["num_codebooks"] == 1
