from __future__ import annotations

import pytest
import torch

from mmtok.quantizers import SplitResidualVectorQuantizer

D = 5


def trained(**options: object) -> SplitResidualVectorQuantizer:
    torch.manual_seed(0)
    config: dict = {"num_codebooks": 4, "codebook_size": 16, "inner_dim": 3} | options
    quantizer = SplitResidualVectorQuantizer(D, **config)
    for _ in range(3):
        quantizer(torch.randn(8, 40, D), num_codebooks=4)
    return quantizer.eval()


@pytest.mark.parametrize("bias", [False, True])
def test_both_branches_quantize_the_same_z(bias):
    quantizer = trained(bias=bias)
    z = torch.randn(3, 9, D)
    out = quantizer(z)
    semantic = quantizer.semantic(quantizer.semantic_in(z))
    acoustic = quantizer.acoustic(quantizer.acoustic_in(z))  # of z, not of what the semantic code left
    assert torch.equal(out.codes, torch.cat([semantic.codes, acoustic.codes], 1))
    torch.testing.assert_close(out.z_q_first, quantizer.semantic_out(semantic.z_q))
    torch.testing.assert_close(out.z_q, out.z_q_first + quantizer.acoustic_out(acoustic.z_q))
    torch.testing.assert_close(out.loss, (semantic.loss + 3 * acoustic.loss) / 4)
    assert (quantizer.semantic_in.bias is not None) == bias
    assert torch.equal(quantizer(z, num_codebooks=1).z_q, out.z_q_first)


def test_a_distillation_loss_trains_the_semantic_branch_alone():
    quantizer = trained(bias=True)
    z = torch.randn(2, 6, D, requires_grad=True)
    quantizer(z).z_q_first.square().sum().backward()
    assert z.grad is not None and float(z.grad.abs().sum()) > 0
    for key, parameter in quantizer.named_parameters():
        reached = parameter.grad is not None and float(parameter.grad.abs().sum()) > 0
        assert reached == key.startswith("semantic"), key


@pytest.mark.parametrize("bias", [False, True])
def test_dropout_never_drops_the_semantic_level(bias):
    quantizer = trained(bias=bias, quantizer_dropout=1.0)
    z = torch.randn(40, 4, D)
    codes = quantizer.encode(z)
    decoded = [quantizer.decode(codes[:, :k]) for k in range(1, 5)]
    torch.manual_seed(2)
    torch.rand(40)
    levels = torch.randint(1, 5, (40,))
    torch.manual_seed(2)
    out = quantizer.train()(z)
    assert sorted(levels.unique().tolist()) == [1, 2, 3, 4]
    for b, n in enumerate(levels.tolist()):
        assert torch.equal(out.codes[b, :n], codes[b, :n]) and bool((out.codes[b, n:] == 0).all())
        torch.testing.assert_close(out.z_q[b], decoded[n - 1][b])


def test_the_gradient_is_that_of_the_linears():
    quantizer = trained()
    z = torch.randn(2, 3, D, requires_grad=True)
    weight = torch.randn(2, 3, D)
    (grad,) = torch.autograd.grad((quantizer(z).z_q * weight).sum(), z)
    through = quantizer.semantic_out.weight @ quantizer.semantic_in.weight
    through = through + quantizer.acoustic_out.weight @ quantizer.acoustic_in.weight
    torch.testing.assert_close(grad, weight @ through)


def test_defaults_and_constructor():
    config = SplitResidualVectorQuantizer(32).config()
    assert (config["codebook_size"], config["inner_dim"], config["bias"]) == (2048, 256, False)
    with pytest.raises(ValueError, match=r"num_codebooks: expected at least 2 \(one semantic.*got 1"):
        SplitResidualVectorQuantizer(D, 1)
