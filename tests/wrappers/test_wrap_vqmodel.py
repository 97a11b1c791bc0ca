"""diffusers' VQModel through our door: the codes that its quantizer picks, its own decode, and any size of picture."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmtok.bench.laws import OK, check
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers.diffusers_vq import FAMILY, WEIGHTS, VQModelWrapper, open_vqmodel

pytest.importorskip("diffusers")

LAWS = ("padding", "batch size", "batch shape", "levels", "prefix", "round trip", "range", "foreign ids")
LAWS += ("determinism", "exact size", "odd sizes", "extreme inputs")
FACTOR, CODES = 4, 20
VARIANTS: dict[str, dict[str, Any]] = {
    "vectors": {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "vq_embed_dim": 3},
    "lookup": {
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "lookup_from_codebook": True,
        "mid_block_add_attention": False,
    },
    "movq": {"block_out_channels": (32, 32, 32), "norm_num_groups": 32, "norm_type": "spatial", "vq_embed_dim": 4},
}


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def made(variant: str, seed: int = 0) -> Any:
    """A random VQModel whose codes are latents of a picture, so that many of them are in use."""
    from diffusers import VQModel

    torch.manual_seed(seed)
    options = VARIANTS[variant]
    depth = len(options["block_out_channels"])
    network = VQModel(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        latent_channels=4,
        num_vq_embeddings=CODES,
        sample_size=32,
        **options,
    ).eval()
    z = network.encode(picture(1, 3, 40, 40, seed=9) * 2 - 1).latents[0].flatten(1).T  # (100, D)
    network.quantize.embedding.weight.copy_(z[:: len(z) // CODES][:CODES])
    return network


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: tmp_path_factory.mktemp("vqmodel") / name for name in VARIANTS}
    for name, folder in found.items():
        made(name).save_pretrained(folder)
    return found


@torch.no_grad()
def theirs(network: Any, x: Tensor, unit: bool) -> tuple[Tensor, Tensor]:
    """Codes (B, T) and pictures of diffusers' own calls on (B, 3, H, W) in [0, 1]."""
    z = network.encode(x if unit else x * 2 - 1).latents
    codes = network.quantize(z)[2][2].view(len(x), -1)
    y = network.decode(z).sample  # quantizes by itself
    return codes, (y if unit else (y + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_and_decode_are_those_of_diffusers(variant: str, folders: dict[str, Path]):
    tok, network = open_vqmodel(str(folders[variant])), made(variant)
    x = picture(3, 3, 24, 32)
    codes, y = theirs(network, x, unit=variant == "lookup")
    tokens = tok.encode(x)
    assert tokens.codes.shape == (3, 1, 48) and tokens.spec.codebook_sizes == (CODES,)
    assert torch.equal(tokens.codes[:, 0], codes) and len(codes.unique()) >= 4
    assert torch.allclose(tok.decode(tokens), y, atol=1e-5) and float(y.std()) > 1e-3
    assert torch.equal(tok.encode(x[1:2]).codes[:, 0], theirs(network, x[1:2], variant == "lookup")[0])
    raw = tok.raw()
    assert torch.equal(raw.encode(x).codes, tokens.codes) and torch.equal(raw.decode(tokens), tok.decode(tokens))


@pytest.mark.parametrize("variant", ["vectors", "lookup"])
def test_laws_hold(variant: str, folders: dict[str, Path]):
    report = check(open_vqmodel(str(folders[variant])), only=LAWS)
    assert all(row.status == OK for row in report.rows), report.table()


def test_pictures_of_any_size_and_channels(folders: dict[str, Path]):
    tok = open_vqmodel(str(folders["vectors"]))
    sizes = [(3, 13, 11), (1, 8, 8), (4, 21, 5), (3, 1, 1), (3, 13, 11)]
    pictures = [picture(*s, seed=i) for i, s in enumerate(sizes)]
    tokens = tok.encode(pictures)
    assert [tuple(y.shape) for y in tok.decode(tokens)] == sizes
    assert tokens.lengths.tolist() == [-(-h // FACTOR) * -(-w // FACTOR) for _, h, w in sizes]
    for i, p in enumerate(pictures):
        assert torch.equal(tokens[i].codes, tok.encode(p).codes)


def test_diffusers_itself_loses_the_pixels_past_the_last_cell(folders: dict[str, Path]):
    tok, x = open_vqmodel(str(folders["vectors"])), picture(1, 3, 15, 22)
    raw = tok.raw()
    codes, y = theirs(made("vectors"), x, unit=False)
    tokens = raw.encode(x)
    assert torch.equal(tokens.codes[:, 0], codes) and tuple(y.shape[2:]) == (12, 20)
    assert torch.allclose(raw.decode(tokens), y, atol=1e-5)
    assert tok.decode(tok.encode(x)).shape == x.shape
    laws = ("exact size", "odd sizes")
    broken, whole = check(raw, only=laws), check(tok, only=laws)
    assert [row.miss_rate for row in whole.rows] == [0.0, 0.0]
    assert broken["exact size"].miss_rate == pytest.approx(1 / 6) and broken["odd sizes"].miss_rate == 1.0


def test_a_prefix_decodes_and_foreign_or_impossible_codes_do_not(folders: dict[str, Path], tmp_path: Path):
    tok = open_vqmodel(str(folders["vectors"]))
    tokens = tok.encode(picture(1, 3, 16, 16))
    assert torch.equal(tok.encode(picture(1, 3, 16, 16), num_tokens=5).codes, tokens.codes[..., :5])
    assert tok.decode(tokens.keep(num_tokens=5)).shape == (1, 3, 16, 16)
    tokens.save(tmp_path / "t.safetensors")
    assert torch.equal(tok.decode(Tokens.load(tmp_path / "t.safetensors")), tok.decode(tokens))
    bad = tokens.codes.clone()
    bad[0, 0, 3] = CODES
    with pytest.raises(TokensError, match=r"expected 0\.\.19, got 20"):
        tok.decode(Tokens(bad, tokens.lengths, tokens.spec, tokens.side))
    with pytest.raises(TokensError, match="decode them with the tokenizer that made them"):
        open_vqmodel(str(folders["lookup"])).decode(tokens)
    with pytest.raises(ValueError, match=r"expected 1\.\.1 for vqmodel"):
        tok.encode(picture(3, 8, 8), num_codebooks=2)


def test_training_mode_the_folder_and_the_range_of_pixels(folders: dict[str, Path], tmp_path: Path):
    tok, x = open_vqmodel(str(folders["vectors"])), picture(2, 3, 16, 16)
    codes = tok.encode(x).codes
    assert torch.equal(tok.train().encode(x).codes, codes)
    shutil.copytree(folders["vectors"], tmp_path / "other")
    (tmp_path / "other" / "README.md").write_text("---\nlicense: mit\n---\n")
    other = open_vqmodel(str(tmp_path / "other"))
    assert other.fingerprint == tok.eval().fingerprint
    assert other.licences == {"code": "Apache-2.0", "weights": "mit (model card)"}
    assert "check the card" in tok.licences["weights"]
    unit = VQModelWrapper(made("vectors"), "unit", pixels="unit")
    assert unit.fingerprint != tok.fingerprint and not torch.equal(unit.encode(x).codes, codes)
    assert torch.equal(unit.encode(x / 2).codes[:, 0], theirs(made("vectors"), x / 2, unit=True)[0])
    with pytest.raises(ValueError, match="pixels: expected one of"):
        VQModelWrapper(made("vectors"), "unit", pixels="bytes")


def test_large_pictures_are_reduced_to_512(folders: dict[str, Path]):
    tok = open_vqmodel(str(folders["lookup"]))
    tokens = tok.encode(picture(3, 16, 1024))
    assert tokens.codes.shape == (1, 1, 2 * 128) and tok.decode(tokens).shape == (1, 3, 16, 1024)


def test_a_pipeline_with_a_vqmodel_inside(folders: dict[str, Path], tmp_path: Path):
    shutil.copytree(folders["vectors"], tmp_path / "vqvae")
    parts = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(parts))
    found = open_vqmodel(str(tmp_path))
    assert found.fingerprint == open_vqmodel(str(folders["vectors"])).fingerprint
    (tmp_path / "model_index.json").write_text(json.dumps(parts | {"vqvae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match=r"a pipeline with one VQModel, got \[\]"):
        open_vqmodel(str(tmp_path))


def test_wrong_folders_are_refused(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no folder at"):
        open_vqmodel(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        open_vqmodel(str(tmp_path))
    folder = tmp_path / "vq"
    shutil.copytree(folders["vectors"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKL"}))
    with pytest.raises(ValueError, match="expected a config of VQModel, got 'AutoencoderKL'"):
        open_vqmodel(str(folder))
    (folder / "config.json").write_text(json.dumps(config | {"num_vq_embeddings": CODES + 1}))
    with pytest.raises(ValueError, match="no readable folder of diffusers' VQModel"):
        open_vqmodel(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        open_vqmodel(str(folder))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="no readable folder of diffusers' VQModel"):
        open_vqmodel(str(folder))
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}"):
        open_vqmodel(str(folder))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'mmtok\[codecs\]'"):
        open_vqmodel(str(folders["vectors"]))


def test_the_family_is_described():
    assert FAMILY.name == "vqmodel" and FAMILY.modality == "image" and FAMILY.open is open_vqmodel
    assert FAMILY.taxonomy.cells()["order"] == "2D" and VQModelWrapper.type_name == "wrapper:vqmodel"
