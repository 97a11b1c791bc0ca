"""Frozen vision encoders: what is shipped, what timm and transformers bring, and what cannot change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mmtok.layers import shipped, vision
from mmtok.layers.vision import VisionEncoder, build_vision, read_state

TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2}


def tiny_config(**changes: object) -> dict:
    name = {"type": "timm", "name": "vit_tiny_patch16_224", "image_size": 32, "arguments": dict(TINY)}
    return name | changes


@pytest.fixture(scope="module")
def efficientnet() -> VisionEncoder:
    return build_vision({"type": "efficientnet_lite0", "image_size": 64})


@pytest.fixture(scope="module")
def cat() -> torch.Tensor:
    from PIL import Image

    path = Path(vision.__file__).parents[1] / "assets" / "chelsea.jpg"
    picture = Image.open(path).convert("RGB").resize((128, 128))
    return (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, 128, 128, 3).permute(0, 3, 1, 2) / 255
    )


def test_shipped_features_have_the_stated_form(efficientnet: VisionEncoder, cat: torch.Tensor):
    assert (efficientnet.dim, efficientnet.grid, efficientnet.num_patches) == (320, (2, 2), 4)
    assert efficientnet.external_weights and not efficientnet.class_token
    y = efficientnet(torch.cat([cat, cat.flip(3)]))
    assert y.shape == (2, 4, 320) and y.dtype == torch.float32 and y.isfinite().all()
    torch.testing.assert_close(efficientnet(cat), y[:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(efficientnet.embed(cat), y[:1].mean(1), atol=1e-4, rtol=1e-4)


def test_shipped_weights_equal_timm_s_unfolded_network(efficientnet: VisionEncoder, cat: torch.Tensor):
    import timm

    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    state = read_state(shipped.shipped_file(vision.SHIPPED))
    missing, unexpected = plain.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    assert not unexpected
    assert {k for k in missing if "num_batches" not in k} == {
        "conv_head.weight",
        *(f"bn2.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")),
    }
    x = nn.functional.interpolate(cat, (64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        want = plain.blocks(plain.bn1(plain.conv_stem((x * 255 - 127) / 128)))  # (1, 320, 2, 2)
    torch.testing.assert_close(efficientnet(cat), want.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_shipped_features_see_what_is_in_the_picture(efficientnet: VisionEncoder, cat: torch.Tensor):
    """A mirrored cat is nearer to the cat than its own shuffled pixels: random weights would not tell."""
    order = torch.randperm(128 * 128, generator=torch.Generator().manual_seed(0))
    shuffled = cat.flatten(2)[..., order].view_as(cat)
    a, mirrored, noise = (nn.functional.normalize(efficientnet.embed(x)) for x in (cat, cat.flip(3), shuffled))
    assert float((a * mirrored).sum()) > 0.8 > 0.5 > float((a * noise).sum())


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damaged_shipped_weights_are_one_clear_error(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "model.safetensors"
    if damage == "changed":
        data = bytearray(shipped.shipped_file(vision.SHIPPED).read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    monkeypatch.setattr(shipped, "shipped_file", lambda name: path)
    with pytest.raises(ValueError, match=r"recipes/convert_vision\.py"):
        build_vision({"type": "efficientnet_lite0"})


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("final_norm", [False, True])
def test_timm_depth_token_and_norm_are_those_asked_for(class_token: bool, final_norm: bool):
    torch.manual_seed(0)
    config = tiny_config(depth=2, class_token=class_token, final_norm=final_norm)
    encoder = build_vision(json.loads(json.dumps(config)))
    model = encoder.network.model
    with torch.no_grad():
        model.norm.weight.fill_(3.0) if final_norm else None
        x = torch.rand(2, 3, 32, 32)
        h = model.patch_embed((x - encoder.mean) / encoder.std)
        h = torch.cat([model.cls_token.expand(2, -1, -1), h], 1) + model.pos_embed
        for block in model.blocks:
            h = block(h)
        h = 3 * nn.functional.layer_norm(h, (24,), eps=model.norm.eps) if final_norm else h
    assert len(model.blocks) == 2 and encoder.grid == (2, 2) and encoder.num_patches == 4
    torch.testing.assert_close(encoder(x), h if class_token else h[:, 1:])
    torch.testing.assert_close(encoder.embed(x), h[:, 1:].mean(1))


def test_stays_frozen_in_eval_mode_and_in_float32():
    torch.manual_seed(0)
    config = tiny_config(arguments=TINY | {"proj_drop_rate": 0.5})
    owner = nn.Sequential(build_vision(config)).train()
    encoder = owner[0]
    assert not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    x = torch.rand(1, 3, 40, 20, requires_grad=True)
    y = owner(x)
    assert not y.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(owner(x), y, rtol=0, atol=0)
    assert owner.bfloat16()(x).dtype == torch.float32


def test_random_weights_belong_to_the_checkpoint_and_files_do_not(tmp_path: Path):
    torch.manual_seed(0)
    encoder = build_vision(tiny_config())
    assert not encoder.external_weights
    assert len(encoder.state_dict()) == len(encoder.network.state_dict()) > 0
    whole = encoder.network.model.state_dict()
    published = whole | {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    torch.save({"model": published}, tmp_path / "vit.pth")
    x = torch.rand(1, 3, 32, 32)
    full = build_vision(tiny_config(weights=str(tmp_path / "vit.pth")))
    assert full.external_weights
    torch.testing.assert_close(full(x), encoder(x), rtol=0, atol=0)
    cut = build_vision(tiny_config(weights=str(tmp_path / "vit.pth"), depth=1, final_norm=False))
    torch.testing.assert_close(cut.network.model.blocks[0].mlp.fc1.weight, whole["blocks.0.mlp.fc1.weight"])
    assert len(cut.network.model.blocks) == 1
    larger = build_vision(tiny_config(weights=str(tmp_path / "vit.pth"), image_size=64))
    assert larger.grid == (4, 4) and larger(x).shape == (1, 16, 24), "positions are resized"


def test_weights_of_another_model_are_refused(tmp_path: Path):
    from safetensors.torch import save_file

    state = build_vision(tiny_config()).network.model.state_dict()
    path = tmp_path / "vit.safetensors"
    for wrong in (
        {k: v for k, v in state.items() if k != "blocks.1.attn.qkv.weight"},
        state | {"blocks.0.attn.extra": torch.zeros(1)},
        state | {"blocks.0.mlp.fc1.bias": torch.zeros(3)},
    ):
        save_file({k: v.contiguous() for k, v in wrong.items()}, path)
        with pytest.raises(ValueError, match="do not fit"):
            build_vision(tiny_config(weights=str(path)))
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot read"):
        build_vision(tiny_config(weights=str(path)))


def test_published_sizes_build_without_storage():
    with torch.device("meta"):
        eva = build_vision(
            {
                "type": "timm",
                "name": "eva_giant_patch14_clip_224",
                "depth": 39,
                "class_token": True,
                "final_norm": False,
            }
        )
        assert eva(torch.zeros(1, 3, 300, 200)).shape == (1, 257, 1408)
        lite = build_vision({"type": "efficientnet_lite0"})
        assert lite(torch.zeros(2, 3, 32, 32)).shape == (2, 49, 320)
    assert round(sum(p.numel() for p in eva.parameters()) / 1e6) == 986  # SEED's frozen tower


@pytest.mark.parametrize("family", ["clip", "vit", "dinov2_with_registers"])
def test_transformers_folder(family: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if family == "clip":
        config = transformers.CLIPVisionConfig(intermediate_size=32, **sizes)
        model, extra = transformers.CLIPVisionModel(config), 1
    elif family == "vit":
        config = transformers.ViTConfig(intermediate_size=32, **sizes)
        model, extra = transformers.ViTModel(config, add_pooling_layer=False), 1
    else:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=3, **sizes)
        model, extra = transformers.Dinov2WithRegistersModel(config), 4
    model.eval().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.7] * 3}))
    x = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        out = model(pixel_values=(x - 0.1) / 0.7, output_hidden_states=True)
    last = build_vision({"type": "hf", "folder": str(tmp_path)})
    torch.testing.assert_close(last(x), out.last_hidden_state[:, extra:])
    first = build_vision({"type": "hf", "folder": str(tmp_path), "layer": 1, "class_token": True})
    want = torch.cat([out.hidden_states[1][:, :1], out.hidden_states[1][:, extra:]], 1)
    torch.testing.assert_close(first(x), want)
    assert last.external_weights and last.grid == (2, 2)
    with torch.device("meta"):
        assert build_vision({"type": "hf", "folder": str(tmp_path)}).dim == 16
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot load"):
        build_vision({"type": "hf", "folder": str(tmp_path)})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"type": "resnet"}, "expected a type"),
        ({"type": "efficientnet_lite0", "size": 3}, "expected keys"),
        ({"type": "efficientnet_lite0", "image_size": 8}, "image_size"),
        ({"type": "timm", "name": "vit_tny"}, "name of a timm ViT"),
        ({"type": "timm", "name": "resnet18", "arguments": {}}, "timm ViT"),
        (tiny_config(depth=4), r"expected 1\.\.3"),
        (tiny_config(weights="nowhere.pth"), "no file"),
        ({"type": "hf", "folder": "nowhere"}, "transformers folder"),
    ],
)
def test_bad_configs_are_refused(config: dict, words: str):
    with pytest.raises(ValueError, match=words):
        build_vision(config)


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)]
)
def test_bad_pictures_are_refused(efficientnet: VisionEncoder, x: torch.Tensor):
    with pytest.raises(ValueError, match="expected float pictures"):
        efficientnet(x)
