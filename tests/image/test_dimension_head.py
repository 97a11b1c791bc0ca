"""The heads over dimensions: causality in their order, the loss, sampling, published sizes and names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.image.dimension_head import (
    PUBLISHED,
    PUBLISHED_ORDER,
    CodesHead,
    DimensionHead,
    ParallelHead,
    draw,
    energy_order,
)
from mmtok.image.released.dimension_head import load_dimension_head, published_names

ORDER = (2, 0, 4, 1, 3)


def tiny(**changes: Any) -> DimensionHead:
    """Alive: the gates and the last modulation start at 0, which would hide the blocks."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_dimensions": 5, "codebook_size": 7, "dim": 16, "depth": 2, "num_heads": 2}
    settings |= {"order": ORDER}
    settings |= changes
    head = DimensionHead(6, **settings)
    with torch.no_grad():
        for name, p in head.named_parameters():
            if "modulation" in name:
                p.normal_(std=0.3)
    return head.eval()


def rows(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), torch.randint(7, (n, 5), generator=g)


def test_a_dimension_sees_those_before_it_in_the_order_and_no_other():
    head, (condition, codes) = tiny(), rows(3)
    logits = head(condition, codes)
    assert logits.shape == (3, 5, 7)
    for s, d in enumerate(ORDER):
        other = codes.clone()
        other[:, d] = (other[:, d] + 1) % 7
        changed = (head(condition, other) - logits).abs().amax((0, 2)) > 1e-5
        assert changed.tolist() == [ORDER.index(e) > s for e in range(5)]
    moved = (head(condition + 1, codes) - logits).abs().amax((0, 2))
    assert bool((moved > 1e-3).all())


def test_the_loss_is_the_mean_surprise_of_the_codes():
    condition, codes = rows(4)
    for head in (tiny(), ParallelHead(6, 5, 7)):
        shares = head(condition, codes).softmax(-1)
        total = 0.0
        for n in range(4):
            for d in range(5):
                total -= float(shares[n, d, codes[n, d]].log().detach())
        assert head.loss(condition, codes).item() == pytest.approx(total / 20, rel=1e-5)


def test_at_the_start_the_blocks_add_nothing_and_learn():
    torch.manual_seed(0)
    head, (condition, codes) = DimensionHead(6, 5, 7, 16, 2, 2), rows(4)
    head.loss(condition, codes).backward()
    assert all(not bool(p.any()) for n, p in head.named_parameters() if "modulation" in n)
    gradients = {n: float(p.grad.abs().max()) for n, p in head.named_parameters() if p.grad is not None}
    assert gradients["blocks.0.modulation.weight"] > 0 and gradients["heads.4.weight"] > 0


def test_sampling_step_by_step_is_the_whole_forward_pass():
    """The likeliest code of each step, given those drawn before, with the cache as without."""
    head, (condition, _) = tiny(), rows(6)
    drawn = head.sample(condition, temperature=0)
    assert torch.equal(head(condition, drawn).argmax(-1), drawn) and len(drawn.unique()) > 2


@torch.no_grad()
def test_samples_follow_the_distribution():
    head, (condition, _) = tiny(), rows(1)
    many = condition.expand(4000, -1)
    for chosen in (head, ParallelHead(6, 5, 7)):
        drawn = chosen.sample(many, generator=torch.Generator().manual_seed(0))
        first = chosen(many, drawn).softmax(-1)[0, ORDER[0]]  # of the first step, the same for all
        found = torch.bincount(drawn[:, ORDER[0]], minlength=7) / 4000
        assert float((found - first).abs().max()) < 0.04
        # the mean surprise of samples is the entropy that the head itself expects
        shares = chosen(many, drawn).softmax(-1).clamp_min(1e-9)
        expected = -(shares * shares.log()).sum(-1).mean()
        assert chosen.loss(many, drawn).item() == pytest.approx(expected.item(), abs=0.05)


def test_a_generator_makes_sampling_repeatable():
    condition, _ = rows(50)
    for head in (tiny(), ParallelHead(6, 5, 7)):
        first = head.sample(condition, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(99)
        assert torch.equal(first, head.sample(condition, generator=torch.Generator().manual_seed(1)))
        assert not torch.equal(first, head.sample(condition, generator=torch.Generator().manual_seed(2)))
        assert first.dtype == torch.int64 and first.shape == (50, 5) and not first.requires_grad


def test_trained_on_a_constant_it_says_the_constant():
    condition, codes = torch.zeros(16, 6), torch.tensor([[6, 0, 3, 1, 5]]).repeat(16, 1)
    torch.manual_seed(0)
    heads: list[CodesHead] = [DimensionHead(6, 5, 7, 16, 1, 2, order=ORDER), ParallelHead(6, 5, 7)]
    for head in heads:
        optimizer = torch.optim.Adam(head.parameters(), 0.02 if isinstance(head, DimensionHead) else 0.5)
        for _ in range(50):
            loss = head.loss(condition, codes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert torch.equal(head.sample(condition, generator=torch.Generator().manual_seed(0)), codes)


def test_only_the_chain_learns_how_dimensions_hang_together():
    """Two equal fair bits: the chain needs ln 2 for both, independent heads need it for each."""
    torch.manual_seed(0)
    condition, bit = torch.zeros(64, 6), torch.arange(64) % 2
    codes = torch.stack([bit, bit], 1)
    chain, parallel = DimensionHead(6, 2, 2, 16, 1, 2), ParallelHead(6, 2, 2)
    for head in (chain, parallel):
        optimizer = torch.optim.Adam(head.parameters(), 0.02)
        for _ in range(60):
            loss = head.loss(condition, codes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert chain.loss(condition, codes).item() == pytest.approx(0.3466, abs=0.03)
    assert parallel.loss(condition, codes).item() == pytest.approx(0.6931, abs=0.01)


def test_the_released_first_step_differs_in_sampling_only():
    plain, released, (condition, codes) = tiny(), tiny(first_step_embedding=True), rows(20)
    with torch.no_grad():
        for head in (plain, released):
            head.steps[0] = torch.linspace(3, -3, 16)
    assert torch.equal(plain(condition, codes), released(condition, codes))
    drawn = released.sample(condition, 0)
    assert not torch.equal(plain.sample(condition, 0), drawn)
    with torch.no_grad():  # what sampling reads is what forward would read from this condition
        c = released.condition(condition)[:, None]
        h, _ = released._run(c + released.steps[:1], c, slice(0, 1), None)
        assert torch.equal(released.heads[0](h[:, 0]).argmax(-1), drawn[:, ORDER[0]])


def test_the_order_travels_with_the_weights():
    head, other = tiny(), tiny(order=None)
    assert head.order.tolist() == list(ORDER) and other.order.tolist() == [0, 1, 2, 3, 4]
    condition, codes = rows(3)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(condition, codes), head(condition, codes))


def test_dropout_is_for_training_only():
    head, (condition, codes) = tiny(dropout=0.5), rows(3)
    assert torch.equal(head(condition, codes), tiny()(condition, codes))
    assert not torch.equal(head.train()(condition, codes), head(condition, codes))


def test_energy_order_takes_what_explains_most_of_the_rest():
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(5000, generator=g) for _ in range(3))
    # 1 and 3 are nearly one signal, the strongest; 0 is second; 2 is small but not explained by any other
    latents = torch.stack([2.0 * b, 3.0 * a, 0.5 * c, 3.1 * a + 0.001 * b], 1)
    assert energy_order(latents) == [3, 0, 2, 1]
    assert energy_order(torch.cat([latents, torch.ones(5000, 1)], 1)) == [3, 0, 2, 1, 4]  # a constant comes last
    assert energy_order(latents[:, :1]) == [0]
    with pytest.raises(ValueError, match=r"expected \(N, D\) with N >= 2, got \(1, 4\)"):
        energy_order(latents[:1])


def test_temperature_sharpens():
    logits = torch.tensor([[0.0, 1.0, 0.5]]).expand(3000, -1)
    assert draw(logits, 0, None).unique().tolist() == [1]
    g = torch.Generator().manual_seed(0)
    share = [float((draw(logits, t, g) == 1).float().mean()) for t in (0.2, 1.0, 50.0)]
    assert share == pytest.approx(
        [float((torch.tensor([0.0, 1.0, 0.5]) / t).softmax(0)[1]) for t in (0.2, 1, 50)], abs=0.03
    )
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="temperature: expected a finite number >= 0"):
            draw(logits, wrong, None)


def test_bad_arguments_are_refused():
    head, (condition, codes) = tiny(), rows(3)
    with pytest.raises(ValueError, match=r"condition: expected \(N, 6\), got \(3, 5\)"):
        head(condition[:, :5], codes)
    with pytest.raises(ValueError, match=r"codes: expected int64 of shape \(3, 5\), got torch.int64 of shape \(3, 4\)"):
        head.loss(condition, codes[:, :4])
    with pytest.raises(ValueError, match=r"order: expected each of 0\.\.4 once"):
        tiny(order=(0, 1, 2, 3, 3))
    with pytest.raises(ValueError, match="multiple of num_heads 3"):
        tiny(num_heads=3)
    with pytest.raises(ValueError, match="codebook_size >= 2"):
        ParallelHead(6, 5, 1)


def published_shapes(D: int, K: int, C: int, dim: int, depth: int, heads: int) -> dict[str, tuple[int, ...]]:
    """As models/tokenbridge.py of YuqingWang1029/TokenBridge has them."""

    def linear(name: str, i: int, o: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (o, i), f"{name}.bias": (o,)}

    def norm(name: str, c: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (c,), f"{name}.bias": (c,)}

    out = linear("condition_proj", C, dim) | norm("channel_norm", dim)
    out |= linear("channel_final.adaLN_modulation.1", dim, 2 * dim)
    out |= {"channel_embed": (1, D, dim), "timesteps_embeddings": (1, D, dim)}
    out |= {f"token_embeddings.{i}.weight": (K, dim) for i in range(D - 1)}
    for i in range(D):
        out |= linear(f"channel_heads.{i}", dim, K)
    for i in range(depth):
        b = f"channel_blocks.{i}"
        out |= norm(f"{b}.norm1", dim) | norm(f"{b}.norm2", dim) | linear(f"{b}.attn.qkv", dim, 3 * dim)
        out |= norm(f"{b}.attn.q_norm", dim // heads) | norm(f"{b}.attn.k_norm", dim // heads)
        out |= linear(f"{b}.attn.proj", dim, dim) | linear(f"{b}.mlp.fc1", dim, 4 * dim)
        out |= linear(f"{b}.mlp.fc2", 4 * dim, dim) | linear(f"{b}.adaLN_modulation.1", dim, 6 * dim)
    return out


def test_the_published_sizes():
    with torch.device("meta"):
        head = DimensionHead(**PUBLISHED)
    d, K, D = 1024, 64, 16
    block = 4 * d + 4 * (d // 8) + 3 * d * d + 3 * d + d * d + d + 8 * d * d + 5 * d + 6 * d * d + 6 * d
    around = d * d + d + 2 * D * d + (D - 1) * K * d + D * (K * d + K) + 2 * d + 2 * d * d + 2 * d
    assert sum(p.numel() for p in head.parameters()) == 4 * block + around
    shapes = published_shapes(16, 64, 1024, 1024, 4, 8)
    assert sum(torch.Size(s).numel() for s in shapes.values()) == 4 * block + around
    names = published_names(16, 4)
    assert set(names) == {n for n, _ in head.named_parameters()}
    for ours, sources in names.items():
        assert tuple(head.state_dict()[ours].shape) == shapes[sources[0]][-2 if "embed" in sources[0] else 0 :]
    assert sorted(PUBLISHED_ORDER) == list(range(16))


def test_published_weights_give_the_published_forward_pass():
    D, K, C, dim = 5, 7, 6, 16
    g = torch.Generator().manual_seed(0)
    state = {k: torch.randn(s, generator=g) * 0.3 for k, s in published_shapes(D, K, C, dim, 2, 2).items()}
    config = {
        **{"condition_dim": C, "num_dimensions": D, "codebook_size": K, "dim": dim, "depth": 2, "num_heads": 2},
        **{"order": ORDER, "dropout": 0.1, "first_step_embedding": True},
    }
    head = load_dimension_head(state | {"class_emb.weight": torch.zeros(3, 4), "boundaries": torch.zeros(8)}, config)
    condition, codes = rows(3)
    assert torch.allclose(head(condition, codes), published_logits(state, condition, codes), atol=1e-4)
    with pytest.raises(ValueError, match=r"TokenBridge head: .*unexpected \['channel_blocks.2.norm1.bias'\]"):
        load_dimension_head(state | {"channel_blocks.2.norm1.bias": torch.zeros(16)}, config)
    with pytest.raises(ValueError, match=r"wrong \['condition.weight: expected \(16, 4\), got \(16, 6\)'"):
        load_dimension_head(state, config | {"condition_dim": 4})


def published_logits(s: dict[str, Tensor], condition: Tensor, codes: Tensor) -> Tensor:
    """Teacher-forced logits by the released equations, in the order of `ORDER`, put back."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], s[f"{name}.weight"], s[f"{name}.bias"], 1e-6)

    c = linear("condition_proj", condition)
    sequence = [c] + [s[f"token_embeddings.{i}.weight"][codes[:, d]] for i, d in enumerate(ORDER[:-1])]
    x = torch.stack(sequence, 1) + s["channel_embed"]
    c = c[:, None] + s["timesteps_embeddings"]
    for i in range(2):
        b = f"channel_blocks.{i}"
        sh1, sc1, g1, sh2, sc2, g2 = linear(f"{b}.adaLN_modulation.1", F.silu(c)).chunk(6, -1)
        h = norm(f"{b}.norm1", x) * (1 + sc1) + sh1
        q, k, v = linear(f"{b}.attn.qkv", h).view(3, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
        q, k = norm(f"{b}.attn.q_norm", q), norm(f"{b}.attn.k_norm", k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(3, 5, 16)
        x = x + g1 * linear(f"{b}.attn.proj", y)
        h = norm(f"{b}.norm2", x) * (1 + sc2) + sh2
        x = x + g2 * linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", h)))
    scale, shift = linear("channel_final.adaLN_modulation.1", F.silu(c)).chunk(2, -1)
    x = F.layer_norm(norm("channel_norm", x), (16,), eps=1e-6) * (1 + scale) + shift
    logits = torch.zeros(3, 5, 7)
    for i, d in enumerate(ORDER):
        logits[:, d] = linear(f"channel_heads.{i}", x[:, i])
    return logits
