"""The released residual quantizer: the same codes as ours, and each of its faults shown beside ours without it."""

from __future__ import annotations

import pytest
import torch

from mmtok.quantizers import LegacyResidualVectorQuantizer, ResidualVectorQuantizer, build_quantizer


def pair(**numbers: object) -> tuple[LegacyResidualVectorQuantizer, ResidualVectorQuantizer]:
    torch.manual_seed(0)
    legacy = LegacyResidualVectorQuantizer(8, 3, 16, quantizer_dropout=False, **numbers)  # type: ignore[arg-type]
    ours = ResidualVectorQuantizer(8, 3, 16, commitment_weight=1.0)
    ours.load_state_dict(legacy.state_dict())
    return legacy, ours


def test_weights_codes_and_decode_are_those_of_the_fixed_one():
    legacy, ours = pair()
    z = torch.randn(2, 5, 8)
    codes = legacy.eval().encode(z)
    assert torch.equal(codes, ours.eval().encode(z))
    assert torch.equal(legacy.decode(codes), ours.decode(codes))
    assert torch.allclose(legacy(z).z_q, ours(z).z_q, atol=1e-6)
    rebuilt = build_quantizer(legacy.config())
    assert isinstance(rebuilt, LegacyResidualVectorQuantizer) and rebuilt.config() == legacy.config()


def commitment_gradient(quantizer: ResidualVectorQuantizer, level: int) -> float:
    """Size of the gradient that the commitment of one level sends to z."""
    z = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    valid = torch.ones(2, 40, dtype=torch.bool)
    run = quantizer.eval().run(z, valid, torch.full((2,), 3), 3)
    run.terms[level][0].backward()
    return float(z.grad.abs().max()) if z.grad is not None else 0.0


@pytest.mark.parametrize("level", [0, 1, 2])
def test_commitment_of_later_levels_reaches_the_encoder_only_when_fixed(level: int):
    legacy, ours = pair()
    assert commitment_gradient(ours, level) > 1e-4
    assert (commitment_gradient(legacy, level) > 1e-4) == (level == 0)


def steps(quantizer: ResidualVectorQuantizer, count: int, vectors: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        quantizer.train()(torch.randn(1, vectors, 8, generator=generator) * torch.linspace(0.2, 2, 8))


def test_a_revived_code_is_erased_by_the_next_update():
    legacy, ours = pair(kmeans_init=False, updates_per_step=1)
    for quantizer in (legacy, ours):
        book = quantizer._book(0)
        book.codebook[0] = 100.0  # wins nothing, ever
        book.cluster_size.fill_(4.0)
        book.cluster_size[0] = 0.001
        book.codebook_sum.copy_(book.codebook * book.cluster_size[:, None])
        steps(quantizer, 1, 64)
        assert float(book.codebook[0].abs().max()) < 50  # replaced by a vector of the batch
    legacy.dead_code_count = 0.0
    legacy._book(0).dead_code_count = 0.0  # type: ignore[attr-defined]
    steps(legacy, 1, 4)
    steps(ours, 1, 4)
    assert float(legacy._book(0).codebook[0].abs().max()) > 50  # back again
    assert float(ours._book(0).codebook[0].abs().max()) < 50


def test_an_absolute_threshold_calls_a_small_batch_dead():
    legacy, ours = pair(kmeans_init=False)
    for vectors, all_dead in ((8, True), (4096, False)):
        for quantizer in (legacy, ours):
            for q in range(3):
                quantizer._book(q).cluster_size.fill_(vectors / 16)
        assert bool(legacy._book(0).dead().all()) is all_dead
        assert not bool(ours._book(0).dead().any())


def test_two_updates_a_step_forget_twice():
    legacy, _ = pair(kmeans_init=False, dead_code_count=0.0)
    once, _ = pair(kmeans_init=False, dead_code_count=0.0, updates_per_step=1)
    z = torch.randn(1, 64, 8)
    before = float(once._book(0).cluster_size.sum())
    assert before == 0
    once.train()(z)
    legacy.train()(z)
    assert float(once._book(0).cluster_size.sum()) == pytest.approx(64 * 0.01, rel=1e-4)
    assert float(legacy._book(0).cluster_size.sum()) == pytest.approx(64 * (1 - 0.99**2), rel=1e-4)


def test_dropout_draws_one_number_of_levels_for_the_whole_batch():
    torch.manual_seed(0)
    quantizer = LegacyResidualVectorQuantizer(8, 8, 16, kmeans_init=False, dead_code_count=0.0)
    seen = set()
    for _ in range(60):
        codes = quantizer.train()(torch.randn(4, 30, 8)).codes
        used = {int((codes[b].amax(1) > 0).sum()) for b in range(4)}
        assert len(used) == 1
        seen |= used
    assert seen == {1, 2, 3, 4, 8}


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="dead_code_count: expected 0 or more"):
        LegacyResidualVectorQuantizer(8, 2, 16, dead_code_count=-1)
