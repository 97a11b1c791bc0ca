from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "contract"))
from tiny_models import build

from mmtok.bench import language, language_data, language_samples, language_study
from mmtok.bench.contenders import Contender
from mmtok.bench.language_data import UnfitError, find_material, picture_couples, speaker_couples
from mmtok.bench.language_model import Corpus, Recipe, frequency_bits, middle, summed, train_lm
from mmtok.bench.language_rows import Rows, digits_of
from mmtok.bench.parts import Context
from mmtok.bench.records import Item, Result, TestSet
from mmtok.bench.scorers import Measure, Scorer, SetScorer
from mmtok.data.audio import write_audio
from mmtok.data.images import write_image
from mmtok.metrics.frechet import frechet_distance
from mmtok.tokens import Tokens, TokenSpec
from mmtok.vocab.bits import BitSplit

TINY = {"width": 32, "depth": 1, "batch": 16, "bf16": False}


def chain(count: int, length: int, seed: int, K: int = 4, stay: float = 0.85) -> Tensor:
    """(count, 1, length) of a Markov chain that goes on to the next code with probability ``stay``."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(K, (count, length), generator=generator)
    follow = torch.rand(count, length, generator=generator) < stay
    jump = torch.randint(2, K + 1, (count, length), generator=generator)  # to any code but the next one
    for t in range(1, length):
        codes[:, t] = (codes[:, t - 1] + torch.where(follow[:, t], 1, jump[:, t])) % K
    return codes[:, None]


def corpus(codes: Tensor) -> Corpus:
    return Corpus.of(list(codes))


def test_a_chain_costs_its_entropy_and_not_less() -> None:
    K, stay, T = 4, 0.85, 24
    train, val, test = (corpus(chain(n, T, seed)) for n, seed in ((256, 0), (32, 1), (256, 2)))
    lm = train_lm(train, val, (K,), Recipe("flat", steps=120, **TINY), 0)
    rate = -stay * math.log2(stay) - (1 - stay) * math.log2((1 - stay) / (K - 1))
    entropy = math.log2(K) + (T - 1) * rate
    bits = lm.item_bits(test)
    # What this very sample costs under the true chain: the model may not be below it by more than rounding.
    follows = (test.codes[:, 0, 1:] == (test.codes[:, 0, :-1] + 1) % K).double()
    true = math.log2(K) - (follows * math.log2(stay) + (1 - follows) * math.log2((1 - stay) / (K - 1))).sum(1)
    assert float(true.mean()) == pytest.approx(entropy, rel=0.05)
    assert 0.999 * float(true.mean()) < float(bits.mean()) < 1.04 * float(true.mean())
    assert float(frequency_bits(train, test, (K,)).sum(1).mean()) == pytest.approx(T * math.log2(K), rel=0.01)
    # Two halves of one item add up to the whole.
    first = middle(test.lengths)
    whole = lm.step_bits(test)
    assert torch.allclose(summed(whole, first) + summed(whole[:, : T // 2]), bits)


@pytest.mark.parametrize("head", ["flat", "delay"])
def test_uniform_codes_cost_nominal_bits_and_drawn_codes_are_legal(head: str) -> None:
    sizes, T = (5, 3), 10
    generator = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(k, (300, T), generator=generator) for k in sizes], 1)
    train, val, test = (corpus(c) for c in codes.split((200, 50, 50)))
    lm = train_lm(train, val, sizes, Recipe(head, steps=20, **TINY), 0)
    nominal = T * math.log2(15)
    assert 0.99 * nominal < float(lm.item_bits(test).mean()) < 1.03 * nominal
    begun = test.codes[:8, :, :4]
    drawn = lm.go_on(begun, T, 3)
    assert drawn.shape == (8, 2, T) and torch.equal(drawn[:, :, :4], begun)
    assert all(int(drawn[:, q].min()) >= 0 and int(drawn[:, q].max()) < k for q, k in enumerate(sizes))
    assert torch.equal(drawn, lm.go_on(begun, T, 3)) and not torch.equal(drawn, lm.go_on(begun, T, 4))


def test_flat_and_delay_agree_on_what_follows_with_certainty() -> None:
    """Level 1 repeats level 0, which counts up from a random code: the start is all there is to tell."""
    K, T = 4, 8
    start = torch.arange(96) % K
    row = (start[:, None] + torch.arange(T)) % K
    codes = torch.stack([row, row], 1)
    for head in ("flat", "delay"):
        lm = train_lm(corpus(codes), corpus(codes[:16]), (K, K), Recipe(head, steps=150, **TINY), 0)
        bits = lm.item_bits(corpus(codes)).mean().item()  # of 16 codes, 32 bits nominal
        assert math.log2(K) - 0.01 < bits < math.log2(K) + 0.6, head


def test_before_training_bits_are_those_of_the_frequencies() -> None:
    codes = chain(64, 12, 0, stay=0.2) ** 2 % 4  # skewed
    lm = train_lm(corpus(codes), corpus(codes[:8]), (4,), Recipe("flat", steps=1, **TINY), 0)
    expected = frequency_bits(corpus(codes), corpus(codes), (4,))
    # One step at a tenth of the rate moves them by little.
    assert torch.allclose(lm.step_bits(corpus(codes)).mean(), expected.mean(), rtol=0.05)
    counts = torch.bincount(codes.flatten(), minlength=4).double() + 0.5
    by_hand = -(counts / counts.sum()).log2()[codes[:, 0]]
    assert torch.allclose(expected, by_hand)


def test_training_gives_the_same_numbers_twice_and_leaves_the_global_generator_alone() -> None:
    train, val = corpus(chain(40, 9, 0)), corpus(chain(8, 9, 1))
    recipe = Recipe("flat", width=32, depth=1, steps=4, batch=8)  # bf16 as in a run
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = train_lm(train, val, (4,), recipe, 1).item_bits(val)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(train_lm(train, val, (4,), recipe, 1).item_bits(val), first)
    assert not torch.equal(train_lm(train, val, (4,), recipe, 2).item_bits(val), first)


def test_bits_do_not_depend_on_what_else_is_in_a_batch() -> None:
    rows = [chain(1, T, T)[0] for T in (3, 11, 7)]
    lm = train_lm(Corpus.of(rows), Corpus.of(rows), (4,), Recipe("flat", steps=2, positions=True, **TINY), 0)
    together = lm.item_bits(Corpus.of(rows))
    alone = torch.cat([lm.item_bits(Corpus.of([r])) for r in rows])
    assert torch.allclose(together, alone, rtol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        TokenSpec("plain", "audio", (16, 8), frame_rate=50.0),
        TokenSpec("ragged", "audio", (16, 16, 16), (4, 2, 1), frame_rate=50.0),
        TokenSpec("binary", "image", (2**36, 2**16), num_tokens=4),
        TokenSpec("fsq", "audio", (64000,), frame_rate=50.0),
        TokenSpec("prime", "audio", (10007,), frame_rate=50.0),
    ],
)
def test_rows_are_one_to_one(spec: TokenSpec) -> None:
    rows, generator = Rows(spec), torch.Generator().manual_seed(0)
    assert all(2 <= k <= 2**13 for k in rows.sizes)
    for T in (8, 5, 1):
        codes = torch.stack(
            [
                torch.randint(k, (-(-T // s),), generator=generator).repeat_interleave(s)[:T]
                for k, s in zip(spec.codebook_sizes, spec.level_strides, strict=True)
            ]
        )
        found = rows.split(codes)
        assert found.shape == (len(rows.sizes), -(-T // rows.group))
        assert all(int(r.max()) < k for r, k in zip(found, rows.sizes, strict=True))
        assert torch.equal(rows.join(found, T), codes)
    nominal = rows.group * spec.bits_per_position
    assert sum(map(math.log2, rows.sizes)) == pytest.approx(nominal, rel=0.01)
    highest = torch.tensor(rows.sizes)[:, None] - 1
    assert all(int(c) < k for c, k in zip(rows.join(highest, 1)[:, 0], spec.codebook_sizes, strict=True))


def test_digits_of_binary_codes_are_those_of_bit_split() -> None:
    spec = TokenSpec("binary", "image", (2**40,), num_tokens=3, fingerprint="x")
    codes = torch.randint(2**40, (1, 1, 3), generator=torch.Generator().manual_seed(0))
    split = BitSplit(spec, 10).split(Tokens(codes, torch.tensor([3]), spec))
    assert digits_of(2**40) == [2**10] * 4
    assert torch.equal(Rows(spec).split(codes[0]), split.codes[0])
    assert digits_of(8192) == [8192] and max(digits_of(2**64)) <= 1024 and math.prod(digits_of(2**64)) == 2**64
    assert math.prod(digits_of(64000)) == 64000


class Loudness(Scorer):
    name, modality, backend, version = "dnsmos", "audio", "test", "1"
    measures = (Measure("loudness", "1", "higher", "", absolute=True), Measure("other", "1", "higher", ""))

    def scores(self, item: Item, x_hat: Tensor) -> dict[str, Any]:
        assert x_hat.shape == item.reference.shape
        return {"loudness": float(x_hat.square().mean()), "other": 0.0}


class Moments(SetScorer):
    name, modality, backend, version = "fd_efficientnet", "image", "test", "1"
    measures = (Measure("fd", "1", "lower", ""), Measure("fd_floor", "1", "neither", ""))

    def features(self, x: Tensor, sample_rate: int | None) -> Tensor:
        return torch.stack([x.mean(), x.std()])[None]

    def distance(self, reference: Tensor, estimate: Tensor) -> dict[str, float]:
        return {"fd": frechet_distance(reference, estimate), "fd_floor": 0.0}


def opened(name: str, helpers: Path | None) -> Scorer | SetScorer:
    """In place of the networks, some of which are missing."""
    known = {"dnsmos": Loudness(), "fd_efficientnet": Moments()}
    if name not in known:
        raise language_samples.NotRunError(f"{name} is not there; install it")
    return known[name]


@pytest.fixture(autouse=True)
def tiny_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_samples, "open_scorer", opened)


def sounds(count: int = 4, seconds: float = 1.0) -> TestSet:
    generator = torch.Generator().manual_seed(7)
    items = [
        Item(f"clip{i}", torch.randn(1, round(16000 * seconds), generator=generator) * 0.1, 16000, text=f"words {i}")
        for i in range(count)
    ]
    return TestSet("clips", "audio", items, {"set": "clips", "sample_rate": 16000, "channels": 1})


def pictures(count: int = 6, size: int = 24) -> TestSet:
    generator = torch.Generator().manual_seed(8)
    items = [Item(f"p{i}", (torch.rand(3, size, size, generator=generator) * 255).round() / 255) for i in range(count)]
    return TestSet("squares", "image", items, {"set": "squares", "size": f"{size} x {size}", "crop": "none"})


def contender(name: str) -> Contender:
    return Contender(f"tiny#{name}", build(name))


def context(out: Path, test_set: TestSet, one: Contender, **more: Any) -> Context:
    def codes(of: TestSet) -> Sequence[Tokens]:
        return [one.encode(item) for item in of.items]

    settings: dict[str, Any] = {"data": None, "smoke": True, "progress": False} | more
    return Context(out, helpers=None, sets=[test_set], codes=codes, **settings)


def run(one: Contender, here: Context) -> dict[str, Result]:
    (job,) = language.jobs(one, here)
    results = job.run()
    assert len({r.key for r in results}) == len(results)
    assert all(r.part == "language" and r.contender == one.label for r in results)
    return {r.metric: r for r in results}


@pytest.fixture(scope="module")
def smoked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Result], Path]]:
    """Both modalities once, with the scorers above."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_samples, "open_scorer", opened)
        for modality, name, test_set in (("audio", "codec-centred", sounds()), ("image", "binary1d", pictures())):
            out = tmp_path_factory.mktemp(modality)
            one = contender(name)
            found[modality] = run(one, context(out, test_set, one)), out
    return found


def test_smoke_of_sound_gives_every_number(smoked: dict[str, tuple[dict[str, Result], Path]]) -> None:
    results, out = smoked["audio"]
    values = {m: r.value for m, r in results.items() if r.value is not None}
    assert {m.name for m in language.BITS_OF_SOUND} <= set(values)
    assert {"lm_speaker_consistency", "lm_speaker_consistency_of_couples", "lm_splice_of_same_speaker"} <= set(values)
    assert {f"lm_{v}_loudness" for v in ("reconstructed", "continued", "unprompted")} <= set(values)
    assert "lm_continued_other" not in results
    bits, nominal = results["lm_bits_per_second"], results["lm_nominal_bits_per_second"]
    assert nominal.value == pytest.approx(3 * 4 * 50)  # 3 levels of 16 codes at 50 Hz
    assert results["lm_share_of_nominal"].value == pytest.approx(values["lm_bits_per_second"] / 600)
    gain = values["lm_second_half_alone_bits_per_second"] - values["lm_second_half_bits_per_second"]
    assert values["lm_context_gain_bits_per_second"] == pytest.approx(gain)
    assert bits.count == 4 and bits.low is not None and bits.low <= bits.value <= (bits.high or 0)
    wanted = {"smoke": True, "head": "delay", "steps": 3, "seeds": [0]}
    assert wanted.items() <= bits.protocol.items()
    assert bits.protocol["contender"]["fingerprint"] == build("codec-centred").fingerprint
    assert bits.protocol["parameters"] > 0 and bits.protocol["training_seconds_of_sound"] == pytest.approx(2.0)
    missing = results["lm_continued_distillmos"]
    assert missing.value is None and missing.not_run == "distillmos is not there; install it"
    (index,) = (out / "language").glob("*/index.json")
    entries = json.loads(index.read_text())
    assert {e["prompt_seconds"] for e in entries} == {0.0, 0.25}
    assert all((index.parent / e["path"]).is_file() and e["text"] for e in entries)


def test_smoke_of_pictures_gives_every_number(smoked: dict[str, tuple[dict[str, Result], Path]]) -> None:
    results, out = smoked["image"]
    values = {m: r.value for m, r in results.items() if r.value is not None}
    assert {m.name for m in language.BITS_OF_PICTURES} <= set(values)
    assert values["lm_nominal_bits_per_image"] == pytest.approx(6 * 12)  # 6 positions of 12 bits
    wanted = {"lm_original_fd", "lm_reconstructed_fd", "lm_drawn_fd", "lm_drawn_to_reconstructed_fd"}
    assert wanted <= set(values) and "lm_drawn_fd_floor" not in results
    assert values["lm_original_fd"] == pytest.approx(0, abs=1e-9)  # a smoke run compares the pictures with themselves
    assert {"lm_picture_consistency", "lm_picture_consistency_of_couples"} <= set(values)
    assert 0 <= values["lm_picture_consistency"] <= 100
    (index,) = (out / "language").glob("*/index.json")
    assert all((index.parent / e["path"]).is_file() for e in json.loads(index.read_text()))


def test_the_same_job_twice_gives_the_same_numbers(
    smoked: dict[str, tuple[dict[str, Result], Path]], tmp_path: Path
) -> None:
    one = contender("binary1d")
    torch.rand(3)  # whatever ran before
    again = run(one, context(tmp_path, pictures(), one))
    assert again == smoked["image"][0]
    assert run(one, context(tmp_path, pictures(), one)) == again  # codes from the folder


def folder_of_pictures(data: Path, count: int) -> Path:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        write_image(data / f"{i:02d}.png", torch.rand(3, 26, 30, generator=generator))
    return data


def test_a_folder_without_splits_is_split_by_hash(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    folder_of_pictures(data, 40)
    material = find_material(data, "image", [], 100, 10)
    trained = {e.key for e in (*material.train, *material.val)}
    tested = {f"{i:02d}.png" for i in range(40) if material.may_test(f"{i:02d}.png#0")}
    assert (
        len(material.train) >= 20
        and tested
        and not trained & tested
        and trained | tested == {f"{i:02d}.png" for i in range(40)}
    )
    assert "by the hash" in material.about["training_source"]
    one = contender("binary1d")
    items = [Item(f"{i:02d}.png", torch.rand(3, 24, 24)) for i in range(40)]
    test_set = TestSet("data", "image", items, {"set": "data", "size": "24 x 24", "crop": "none"})
    options = {"steps": 2, "width": 32, "depth": 1, "samples": 4, "seeds": 2}
    found = run(one, context(tmp_path / "out", test_set, one, smoke=False, data=data, options=options))
    bits = found["lm_bits_per_image"]
    assert bits.count == len(tested) and bits.protocol["training_items"] == len(material.train)
    assert bits.protocol["seeds"] == [0, 1] and len(bits.protocol["total_bits_by_seed"]) == 2
    assert sum(bits.protocol["total_bits_by_seed"]) / 2 == pytest.approx(bits.value * bits.count, rel=1e-4)


def test_why_it_does_not_run(tmp_path: Path) -> None:
    one = contender("binary1d")
    here = context(tmp_path, pictures(), one, smoke=False)
    found = run(one, here)
    assert {"lm_share_of_nominal", "lm_samples", "lm_picture_consistency"} < set(found)
    assert all(r.value is None and "no data folder" in (r.not_run or "") for r in found.values())
    sound = contender("codec-centred")
    found = run(sound, context(tmp_path, sounds(), sound, smoke=False))
    assert {"lm_bits_per_second", "lm_samples", "lm_speaker_consistency"} < set(found)
    few = tmp_path / "few"
    few.mkdir()
    folder_of_pictures(few, 8)
    reason = run(one, context(tmp_path, pictures(), one, smoke=False, data=few))["lm_bits_per_image"].not_run
    assert reason is not None and "too few files" in reason and "at least 20" in reason
    for options, word in (({"head": "flat"}, "options"), ({"heads": "deep"}, "heads"), ({"steps": "0"}, None)):
        here = context(tmp_path, pictures(), one, options=options)
        with pytest.raises(ValueError, match=word or "steps"):
            [job.run() for job in language.jobs(one, here)]


def test_rows_that_are_too_long_are_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_study, "LONGEST_ROW", 5)
    one = contender("binary1d")
    reason = run(one, context(tmp_path, pictures(), one))["lm_bits_per_image"].not_run
    assert reason is not None and "positions on average" in reason


def test_a_list_of_splits_is_followed_and_tested_files_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"path": f"{i}.png", "split": "val" if i % 10 == 0 else "train", "text": "red heart" if i == 3 else None}
        for i in range(50)
    ]
    (tmp_path / "images.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    material = find_material(tmp_path, "image", ["7.png#2"], 100, 10)
    keys = {e.key for e in material.train}
    assert (
        "7.png" not in keys
        and "0.png" not in keys
        and {e.key for e in material.val} == {f"{i}.png" for i in range(0, 50, 10)}
    )
    held = {r["path"] for r in rows if r["text"] and language_data.caption_split(r["text"]) == "test"}
    assert keys == {r["path"] for r in rows if r["split"] == "train"} - {"7.png"} - held
    assert material.may_test("7.png#2")


def test_couples_exchange_second_halves(tmp_path: Path) -> None:
    for i in range(6):
        tone = torch.sin(torch.arange(16000) * 0.05 * (i + 1))[None] * 0.2
        write_audio(tmp_path / f"{i}.wav", tone, 16000)
    rows = [{"path": f"{i}.wav", "split": "val", "speaker": "ab"[i % 2]} for i in range(6)]
    rows += [{"path": f"t{i}.wav", "split": "train", "speaker": "a"} for i in range(20)]
    (tmp_path / "speech.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    material = find_material(tmp_path, "audio", [], 100, 1)
    assert len(material.spare) == 5 and not {e.key for e in material.spare} & {e.key for e in material.val}
    shape = language_data.Shape(sample_rate=16000)
    for same in (False, True):
        couples = speaker_couples(material.spare, shape, 1.0, 9, same)
        assert len(couples) == 2
        speaker = {e.key: e.speaker for e in material.spare}
        for couple in couples:
            a, b, ab, ba = couple.items
            assert (speaker[a.key] == speaker[b.key]) == same
            half, fade = a.x.shape[1] // 2, 60
            assert torch.equal(ab.x[:, : half - fade], a.x[:, : half - fade])
            assert torch.equal(ab.x[:, half + fade :], b.x[:, half + fade :])
            assert torch.allclose(ab.x + ba.x, a.x + b.x, atol=1e-6)
            assert float(a.x.square().mean().sqrt()) == pytest.approx(0.05, rel=0.05)
    with pytest.raises(UnfitError, match="no speakers"):
        speaker_couples([], shape, 1.0, 2, False)
    couple = picture_couples(pictures(4, 10).items, 9)[0]
    a, b, ab, ba = (i.x for i in couple.items)
    assert torch.equal(ab[:, :5], a[:, :5]) and torch.equal(ab[:, 5:], b[:, 5:]) and torch.equal(ba[:, 5:], a[:, 5:])
    with pytest.raises(UnfitError, match="couples"):
        picture_couples(pictures(2, 10).items, 9)


def test_a_model_that_knows_both_halves_prefers_the_real_item() -> None:
    """Items stay with the code that they begin with: exchanged halves are dear; without memory it is one of two."""
    K, T = 6, 8
    start = torch.arange(120) % K
    codes = start[:, None, None].expand(-1, 1, T).contiguous()
    lm = train_lm(corpus(codes), corpus(codes[:12]), (K,), Recipe("flat", steps=60, **TINY), 0)
    other = torch.cat([codes[:12, :, : T // 2], codes[1:13, :, T // 2 :]], 2)
    assert bool((lm.item_bits(corpus(codes[:12])) < lm.item_bits(corpus(other))).all())
    real, spliced = torch.tensor([3.0, 2.0]), torch.tensor([2.0, 2.0])
    assert language._wins(real, spliced).tolist() == [0.0, 0.5]
    assert language._wins(spliced, real).tolist() == [1.0, 0.5]


def test_sound_of_several_channels_is_refused() -> None:
    spec = TokenSpec("stereo", "audio", (4,), frame_rate=50.0)
    tokens = Tokens(torch.zeros(1, 1, 4, dtype=torch.int64), torch.tensor([4]), spec, {"channels": torch.tensor([2])})
    with pytest.raises(UnfitError, match="mono"):
        language_data.plain_tokens(tokens)
