"""Three ways to model (B, Q, T) codes: exact distributions, causal in their own order, the same step by step."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mmtok.lm.backbone import Backbone, TransformersBackbone
from mmtok.lm.heads import HEADS, CodesLM, DelayHeads, DepthTransformer, FlatHead, bits

ROOT = Path(__file__).resolve().parents[2]
SIZES = (5, 4, 6)
NAMES = ("flatten", "delay", "delay 0 1 1", "delay 2 0 1", "parallel", "depth")
DELAYS = {"delay 0 1 1": (0, 1, 1), "delay 2 0 1": (2, 0, 1), "parallel": (0, 0, 0)}


def build(name: str, sizes: tuple[int, ...] = SIZES, backbone: torch.nn.Module | None = None, seed: int = 0) -> CodesLM:
    """A tiny model with weights large enough that every input moves every output."""
    torch.manual_seed(seed)
    backbone = backbone or Backbone(16, 2, 2, context=64)
    if name == "flatten":
        model: CodesLM = FlatHead(backbone, sizes)
    elif name == "depth":
        model = DepthTransformer(backbone, sizes, depth_dim=8, depth_layers=1, depth_heads=2)
    else:
        model = DelayHeads(backbone, sizes, DELAYS[name][: len(sizes)] if name in DELAYS else None)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def batch(lengths: tuple[int, ...], sizes: tuple[int, ...] = SIZES, seed: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    codes = torch.stack([torch.randint(k, (len(lengths), max(lengths))) for k in sizes], 1)
    return codes, torch.tensor(lengths)


def by_steps(model: CodesLM, codes: Tensor, lengths: Tensor, condition: Tensor | None = None) -> Tensor:
    """(B,) nats of each item from the walk that `sample` takes, made to choose these codes."""
    nats = torch.zeros(len(lengths))
    padded = torch.nn.functional.pad(codes, (0, 1))

    def choose(level: int, frame: int, logits: Tensor) -> Tensor:
        ends = lengths <= frame
        wanted = padded[:, level, frame]
        if level == model.end_level:
            wanted = torch.where(ends, model.codebook_sizes[level], wanted)
            counts = frame <= lengths
        else:
            counts = ~ends
        wanted = torch.where(counts, wanted, 0)
        nll = -logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        nats.add_(torch.where(counts, nll, 0.0))
        return torch.where(ends & (level == model.end_level), model.codebook_sizes[level], wanted)

    with torch.no_grad():
        found, found_lengths = model._walk(choose, len(lengths), int(lengths.max()) + 1, condition)
    real = torch.arange(codes.shape[2]) < lengths[:, None]
    assert torch.equal(found_lengths, lengths)
    assert torch.equal(found[:, :, :-1], torch.where(real[:, None], codes, 0))
    return nats


def every_code(sizes: tuple[int, ...], T: int) -> Tensor:
    """(n, Q, T): all there are."""
    cells = [range(k) for _ in range(T) for k in sizes]
    found = list(itertools.product(*cells))
    return torch.tensor(found, dtype=torch.int64).view(len(found), T, len(sizes)).transpose(1, 2)


@pytest.mark.parametrize("name", [*NAMES[:3], "parallel", "depth"])
def test_probabilities_sum_to_one(name: str):
    """Over the codes of a fixed length, and, with what goes on after it, over all lengths."""
    model = build(name, (3, 3))
    ended = 0.0
    for T in range(3):
        codes = every_code((3, 3), T)
        assert len(codes) == 9**T
        with torch.no_grad():
            _, stats = model.loss(codes, torch.full((len(codes),), T))
            all_nats = stats["item_nats"].double()
            each = [model.loss(c[None], torch.tensor([T]))[1] for c in codes]
        code_nats = torch.stack([s["level_nats"].sum() for s in each]).double()
        assert float((-code_nats).exp().sum()) == pytest.approx(1, abs=1e-5)
        ended += float((-all_nats).exp().sum())
    with torch.no_grad():  # the mass of what is longer than T = 2: its two frames, and that it does not end there
        logits = model.logits(codes, torch.full((len(codes),), 2))
    end = logits[model.end_level][:, 2].log_softmax(-1)[:, -1].double()
    longer = (-all_nats - end).exp() * (1 - end.exp())
    assert ended + float(longer.sum()) == pytest.approx(1, abs=1e-5)
    assert 0.01 < ended < 0.99


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_what_the_steps_of_sampling_say(name: str):
    model = build(name)
    codes, lengths = batch((4, 0, 1, 6))
    condition = torch.randn(4, 3, 16)
    for given in (None, condition):
        loss, stats = model.loss(codes, lengths, given)
        torch.testing.assert_close(stats["item_nats"], by_steps(model, codes, lengths, given), rtol=1e-4, atol=1e-4)
        assert loss.item() == pytest.approx(float(stats["item_nats"].sum()) / 11, rel=1e-5)
        whole = stats["level_nats"].sum() + stats["end_nats"]
        torch.testing.assert_close(whole, stats["item_nats"].sum(), rtol=1e-5, atol=1e-4)
        assert (int(stats["frames"]), int(stats["cells"])) == (11, 33)
    assert not torch.allclose(model.loss(codes, lengths)[1]["item_nats"], stats["item_nats"], atol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_items_alone_and_padding_means_nothing(name: str):
    model = build(name)
    codes, lengths = batch((4, 0, 1, 6))
    real = torch.arange(6) < lengths[:, None]
    dirty = torch.where(real[:, None], codes, -7)  # a code that no table has
    loss, stats = model.loss(dirty, lengths)
    alone = [model.loss(codes[i : i + 1, :, :n], lengths[i : i + 1]) for i, n in enumerate(lengths.tolist())]
    torch.testing.assert_close(stats["item_nats"], torch.cat([s["item_nats"] for _, s in alone]), rtol=1e-4, atol=1e-4)
    for key in ("level_nats", "end_nats"):
        together = torch.stack([s[key] for _, s in alone]).sum(0)
        torch.testing.assert_close(stats[key], together, rtol=1e-4, atol=1e-4)
    (one,) = torch.autograd.grad(loss, model.backbone.norm.weight)  # type: ignore[union-attr]
    parts = sum(value * max(1, int(n)) for (value, _), n in zip(alone, lengths, strict=True)) / 11
    (two,) = torch.autograd.grad(parts, model.backbone.norm.weight)  # type: ignore[union-attr]
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flatten", "delay", "depth"])
def test_one_level_is_enough(name: str):
    model = build(name, (7,))
    codes, lengths = batch((2, 4), (7,))
    _, stats = model.loss(codes, lengths)
    torch.testing.assert_close(stats["item_nats"], by_steps(model, codes, lengths), rtol=1e-4, atol=1e-4)


def written_at(name: str, level: int, frame: int) -> tuple[int, int]:
    """(step, place within a step where choices see each other) of a cell in the order of its scheme."""
    if name in ("flatten", "depth"):
        return frame, level
    return frame + (DELAYS[name][level] if name in DELAYS else level), 0


@pytest.mark.parametrize("name", NAMES)
def test_logits_see_what_is_written_before_them_and_nothing_else(name: str):
    model, T = build(name), 5
    codes, lengths = batch((T,))
    with torch.no_grad():
        before = model.logits(codes, lengths)
        for level, frame in itertools.product(range(3), range(T)):
            changed = codes.clone()
            changed[0, level, frame] = (changed[0, level, frame] + 1) % SIZES[level]
            after = model.logits(changed, lengths)
            for q, t in itertools.product(range(3), range(T + 1)):
                if q != model.end_level and t == T:
                    assert after[q][0, t].isnan().all()
                    continue
                moved = not torch.allclose(before[q][0, t], after[q][0, t], atol=1e-5)
                sees = written_at(name, level, frame) < written_at(name, q, t)
                assert moved == sees, (level, frame, q, t)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_lengths_asked_for_and_repeat_under_a_generator(name: str):
    model = build(name)
    wanted = torch.tensor([3, 0, 5])
    draws = [model.sample(wanted, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    codes, lengths = draws[0]
    assert codes.shape == (3, 3, 5)
    assert torch.equal(lengths, wanted)
    assert torch.equal(codes, draws[1][0])
    assert not torch.equal(codes, draws[2][0])
    assert all(int(codes[:, q].max()) < k for q, k in enumerate(SIZES))
    assert not codes[:, :, :][(torch.arange(5) >= wanted[:, None])[:, None].expand(-1, 3, -1)].any()
    free, ends = model.sample(max_frames=4, num_items=64, generator=torch.Generator().manual_seed(0))
    assert free.shape == (64, 3, int(ends.max()))
    assert len(set(ends.tolist())) > 2
    assert int(ends.max()) <= 4
    greedy = [model.sample(max_frames=4, num_items=2, temperature=0)[0] for _ in range(2)]
    assert torch.equal(*greedy)
    assert torch.equal(model.sample(max_frames=4, num_items=2, top_k=1)[0], greedy[0])
    assert model.sample(max_frames=0, num_items=2)[0].shape == (2, 3, 0)
    assert model.sample(torch.zeros(0, dtype=torch.int64))[0].shape == (0, 3, 0)
    loss, _ = model.loss(*(x[:0] for x in batch((2, 1))))
    assert loss.item() == 0


def test_samples_follow_the_probabilities():
    """Frequencies of the 9 frames of length-1 items against their probabilities, for each way."""
    for name in HEADS:
        model = build(name, (3, 3), seed=3)
        codes = every_code((3, 3), 1)
        with torch.no_grad():
            shares = torch.cat([-model.loss(c[None], torch.tensor([1]))[1]["level_nats"].sum()[None] for c in codes])
        drawn, _ = model.sample(torch.ones(4000, dtype=torch.int64), generator=torch.Generator().manual_seed(0))
        counts = torch.bincount(drawn[:, 0, 0] * 3 + drawn[:, 1, 0], minlength=9) / 4000
        torch.testing.assert_close(counts, shares.exp(), rtol=0, atol=0.03)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers.*")
@pytest.mark.parametrize("name", ["flatten", "delay", "depth"])
def test_a_model_of_transformers_is_a_backbone(name: str):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    causal = transformers.LlamaForCausalLM(config)
    model = build(name, backbone=TransformersBackbone(causal))
    assert not any("lm_head" in n for n, _ in model.named_parameters())
    codes, lengths = batch((3, 1, 5))
    condition = torch.randn(3, 2, 16)
    _, stats = model.loss(codes, lengths, condition)
    torch.testing.assert_close(stats["item_nats"], by_steps(model, codes, lengths, condition), rtol=1e-4, atol=1e-4)
    loss, _ = model.loss(codes, lengths)
    loss.backward()
    assert all(p.grad is not None for p in causal.model.layers.parameters())


def test_bits_are_nats_over_ln_2():
    stats = {"item_nats": torch.tensor([2.0, 4.0]) * math.log(2), "frames": torch.tensor(3), "cells": torch.tensor(6)}
    found = bits(stats, frame_rate=50)
    assert found == pytest.approx({"bits_per_frame": 2, "bits_per_cell": 1, "bits_per_second": 100})


def test_all_three_learn_a_rule():
    """Level 1 repeats level 0, and every frame counts on from the one before: 1 bit an item is left, and the length."""
    for name in HEADS:
        model = build(name, (8, 8), seed=5).train()
        start = torch.randint(2, (32, 1), generator=torch.Generator().manual_seed(0))
        codes = (start + torch.arange(5))[:, None].expand(-1, 2, -1)
        lengths = torch.full((32,), 5)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(60):
            loss, stats = model.loss(codes, lengths)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        # The parallel choice of a step cannot agree with itself; a delay of one lets level 1 see level 0.
        assert bits(stats)["bits_per_frame"] < 0.4, name


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("codebook_sizes", lambda: FlatHead(Backbone(16, 1, 2, 8), ())),
        ("smallest 0", lambda: DelayHeads(Backbone(16, 1, 2, 8), (4, 4), (1, 2))),
        ("transformers model", lambda: TransformersBackbone(torch.nn.Linear(2, 2))),
        ("int64", lambda: build("flatten").loss(torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([3]))),
        ("lengths", lambda: build("delay").loss(torch.zeros(1, 3, 3, dtype=torch.int64), torch.tensor([4]))),
        ("code out of range", lambda: build("depth").loss(torch.full((1, 3, 3), 4), torch.tensor([3]))),
        ("condition", lambda: build("depth").sample(max_frames=2, condition=torch.zeros(1, 2, 5))),
        ("either lengths", lambda: build("depth").sample()),
        ("top_k", lambda: build("depth").sample(max_frames=2, top_k=0)),
        ("frames", lambda: build("depth").sample(torch.tensor([3, -1]))),
    ],
)
def test_refusals_say_what_was_expected(message: str, make):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_lm_heads", ROOT / "recipes" / "lm_heads.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", ["flat", "delay", "parallel", "depth"])
def test_the_recipe_counts_the_operations_that_torch_counts(recipe: ModuleType, variant: str):
    """All products of matrices of a forward pass, but for the half of every attention that causality leaves out."""
    from torch.utils.flop_counter import FlopCounterMode

    tokens = recipe.random_codes(6, 0)
    model = recipe.build(variant, (16,) * 4, 0, smoke=True)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.loss(tokens.codes[:, :, : int(tokens.lengths.max())], tokens.lengths)
    T, frames = int(tokens.lengths.max()), int(tokens.lengths.sum())
    S = {"flat": 4 * T + 1, "delay": T + 3, "parallel": T + 1, "depth": T + 1}[variant]
    upper = 6 * 2 * 16 * S * (S - 1)
    if variant == "depth":
        upper += (frames + 6) * 2 * 8 * 4 * 3
    assert counter.get_total_flops() == recipe.forward_flops(model, tokens.lengths) + upper


def test_the_recipe_gives_every_way_the_same_operations(recipe: ModuleType):
    tokens = recipe.random_codes(200, 0)
    batches = recipe.Batches(tokens.lengths, 4, seed=0)
    assert sorted(torch.cat([batches(i) for i in range(50)]).tolist()) == list(range(200))
    flat = recipe.build("flat", (16,) * 4, 0, smoke=True)
    steps, budget, frames = recipe.equal_steps(flat, batches, None, 120)
    assert steps == 120
    for variant in ("delay", "parallel", "depth"):
        found = recipe.equal_steps(recipe.build(variant, (16,) * 4, 0, smoke=True), batches, budget, 120)
        assert found[1] == pytest.approx(budget, rel=0.01)
        assert found[0] > steps and found[2] > frames


def test_the_recipe_resumes_to_the_same_bits(recipe: ModuleType, tmp_path: Path):
    tokens = recipe.random_codes(12, 0)
    batches = recipe.Batches(tokens.lengths, 4, seed=0)
    models = {}
    for name, stops in {"whole": (6,), "resumed": (3, 6)}.items():
        for stop in stops:
            models[name] = recipe.build("depth", (16,) * 4, 0, smoke=True)
            config = recipe.TrainConfig(out=tmp_path / name, steps=6, warmup=2, log_every=1)
            recipe.train(models[name], tokens, batches, config, until=stop)
    start = recipe.build("depth", (16,) * 4, 0, smoke=True).state_dict()
    for key, value in models["whole"].state_dict().items():
        assert torch.equal(value, models["resumed"].state_dict()[key]), key
        assert not torch.equal(value, start[key])
    logs = [[json.loads(row) for row in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in models]
    assert [row["step"] for row in logs[1]] == [1, 2, 3, 4, 5, 6]
    assert [row["bits_per_frame"] for row in logs[0]] == [row["bits_per_frame"] for row in logs[1]]
