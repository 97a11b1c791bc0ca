from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from mmtok.losses.perceptual import AntialiasedFeatures, PerceptualLoss, load_stlpips

VGG = {
    "slice1": (0, 2), "slice2": (6, 8), "slice3": (12, 14, 16), "slice4": (20, 22, 24), "slice5": (28, 30, 32),
}  # fmt: skip
VGG_BLURS = ("slice2.5", "slice3.11", "slice4.19", "slice5.27")
ALEX = {"slice1": (0, 11), "slice2": (5, 5), "slice3": (9, 3), "slice4": (11, 3), "slice5": (13, 3)}
ALEX_BLURS = {"slice1.1": "slice1", "slice2.4": "slice1", "slice3.8": "slice2"}


def blur(channels):
    line = torch.tensor([1.0, 2.0, 1.0])
    return (torch.outer(line, line) / 16).expand(channels, 1, 3, 3).clone()


def tiny_state(net, seed=0):
    """The names and kernel sizes of the published files at a width of a few channels."""
    g = torch.Generator().manual_seed(seed)
    state = {
        "scaling_layer.shift": torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1),
        "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1),
    }
    before, widths = 3, {}
    for stage, (name, value) in enumerate((VGG if net == "vgg" else ALEX).items()):
        width = widths[name] = 4 + stage
        numbers, side = (value, 3) if net == "vgg" else (value[:1], value[1])
        if net == "vgg" and stage:
            state[f"net.{VGG_BLURS[stage - 1]}.filt"] = blur(before)
        for number in numbers:
            state[f"net.{name}.{number}.weight"] = torch.randn(width, before, side, side, generator=g) * 0.3
            state[f"net.{name}.{number}.bias"] = torch.randn(width, generator=g) * 0.1
            before = width
        state[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=g)
    if net == "alex":
        state |= {f"net.{key}.filt": blur(widths[stage]) for key, stage in ALEX_BLURS.items()}
    return state


class Identity(nn.Module):
    def forward(self, x):
        return [x, x[:, :2] * 2]


def images(seed=0, shape=(2, 3, 24, 26)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_equation_1_by_hand():
    # One position, features (3,4,0) against (0,0,5): unit vectors (.6,.8,0) and (0,0,1).
    x_hat, x = torch.tensor([3.0, 4.0, 0.0]).reshape(1, 3, 1, 1), torch.tensor([0.0, 0.0, 5.0]).reshape(1, 3, 1, 1)

    class One(nn.Module):
        def forward(self, x):
            return [x]

    assert PerceptualLoss(One())(x_hat, x).item() == pytest.approx(2.0)
    weighted = PerceptualLoss(One(), [torch.tensor([1.0, 10.0, 100.0])])
    assert weighted(x_hat, x).item() == pytest.approx(0.36 + 6.4 + 100)
    assert weighted.distance(x_hat, 7 * x_hat).item() == pytest.approx(0, abs=1e-6)  # direction only


def test_batch_is_its_items_and_equal_images_give_zero():
    loss = PerceptualLoss(Identity())
    x, x_hat = images(1), images(2)
    singles = [loss.distance(x_hat[i : i + 1], x[i : i + 1])[0] for i in range(2)]
    torch.testing.assert_close(loss.distance(x_hat, x), torch.stack(singles))
    torch.testing.assert_close(loss(x_hat, x), torch.stack(singles).mean())
    assert (loss.distance(x, x) == 0).all()


def test_the_network_is_frozen_and_stays_in_eval_mode():
    loss = PerceptualLoss(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5)))
    assert not loss.train().network.training and not any(p.requires_grad for p in loss.parameters())


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_autocast_changes_nothing_and_gradients_are_finite(net):
    state = tiny_state(net)
    loss = PerceptualLoss(AntialiasedFeatures(state, net), [state[f"lin{i}.model.1.weight"] for i in range(5)])
    x, x_hat = images(1), torch.zeros(2, 3, 24, 26, requires_grad=True)
    plain = loss(x_hat, x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss(x_hat, x)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)
    plain.backward()
    assert x_hat.grad.isfinite().all() and x_hat.grad.abs().max() > 0


def test_dead_features_have_a_finite_gradient():
    x_hat = torch.zeros(1, 3, 4, 4, requires_grad=True)
    PerceptualLoss(nn.Sequential(nn.ReLU(), Pack()))(x_hat, torch.zeros(1, 3, 4, 4)).backward()
    assert x_hat.grad.isfinite().all()


class Pack(nn.Module):
    def forward(self, x):
        return [x]


@pytest.mark.parametrize("net", ["vgg", "alex"])
@pytest.mark.parametrize("inside", ["f.pth", "weights/vST0.0/{}_shift_tolerant.pth", "stlpips_pytorch/weights/vST0.0/{}_shift_tolerant.pth"])  # fmt: skip  # noqa: E501
def test_load_reads_file_and_folders(tmp_path, net, inside):
    state = tiny_state(net)
    file = tmp_path / inside.format(net)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    loss = load_stlpips(file if inside == "f.pth" else tmp_path, net)
    x, x_hat = images(1), images(2)
    assert [f.shape[1] for f in loss.network(x)] == [4, 5, 6, 7, 8]
    assert loss.distance(x_hat, x).shape == (2,) and (loss.distance(x_hat, x) > 0).all()
    torch.testing.assert_close(loss.get_buffer("layer_weight_4"), state["lin4.model.1.weight"].flatten())


def test_features_equal_a_plain_walk_through_the_first_two_stages():
    f, x = torch.nn.functional, images(3)
    state = tiny_state("vgg")
    h = (2 * x - 1 - state["scaling_layer.shift"]) / state["scaling_layer.scale"]
    for key in ("slice1.0", "slice1.2"):
        h = f.conv2d(h, state[f"net.{key}.weight"], state[f"net.{key}.bias"], padding=1).relu()
    first = h
    h = f.pad(f.max_pool2d(h, 2, 1), (2, 2, 2, 2), mode="reflect")
    rows = (h[:, :, :-2] + 2 * h[:, :, 1:-1] + h[:, :, 2:])[:, :, ::2] / 4
    h = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:])[..., ::2] / 4
    for key in ("slice2.6", "slice2.8"):
        h = f.conv2d(h, state[f"net.{key}.weight"], state[f"net.{key}.bias"], padding=1).relu()
    features = AntialiasedFeatures(state, "vgg")(x)
    torch.testing.assert_close(features[0], first)
    torch.testing.assert_close(features[1], h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("net", "smallest"), [("vgg", 18), ("alex", 21)])
def test_smallest_image(net, smallest):
    network = AntialiasedFeatures(tiny_state(net), net)
    assert len(network(torch.rand(1, 3, smallest, smallest + 9))) == 5
    with pytest.raises(ValueError, match=f"at least {smallest}"):
        network(torch.rand(1, 3, smallest + 9, smallest - 1))


def test_bad_input_is_refused(tmp_path, monkeypatch):
    loss = PerceptualLoss(Identity(), [torch.ones(3), torch.ones(2)])
    with pytest.raises(ValueError, match="shape of x"):
        loss(images(shape=(2, 3, 8, 8)), images(shape=(2, 3, 8, 9)))
    with pytest.raises(ValueError, match="grey"):
        loss(images(shape=(2, 1, 8, 8)), images(shape=(2, 1, 8, 8)))
    with pytest.raises(ValueError, match="expected 1 feature maps"):
        PerceptualLoss(Identity(), [torch.ones(3)])(images(), images())
    with pytest.raises(ValueError, match="layer 1 has 2 channels"):
        PerceptualLoss(Identity(), [torch.ones(3), torch.ones(3)])(images(), images())
    with pytest.raises(ValueError, match="'alex', 'vgg'"):
        load_stlpips(tmp_path, "squeeze")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps stlpips-pytorch"):
        load_stlpips(tmp_path, "vgg")
    torch.save(tiny_state("alex"), tmp_path / "alex.pth")
    with pytest.raises(ValueError, match="another net"):
        load_stlpips(tmp_path / "alex.pth", "vgg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps stlpips-pytorch"):
        load_stlpips()
