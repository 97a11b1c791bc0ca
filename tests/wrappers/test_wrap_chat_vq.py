"""The VQ networks of transformers' chat models through our door, alone and inside the chat model's folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from mmtok.bench.laws import OK, check
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers import chat_vq
from mmtok.wrappers.chat_vq import (
    CHAMELEON,
    EMU3,
    JANUS,
    SIGNED,
    JanusWrapper,
    PixelRange,
    open_chameleon,
    open_emu3,
    open_janus,
)

transformers = pytest.importorskip("transformers")

LAWS = ("variety", "padding", "batch size", "batch shape", "levels", "range", "input types", "determinism", "prefix")
LAWS += ("round trip", "foreign ids", "exact size", "odd sizes", "extreme inputs")
CODES, FACTOR = 20, 4
SHARED: dict[str, Any] = {"embed_dim": 4, "latent_channels": 4, "base_channels": 32, "num_res_blocks": 1}
SHARED["channel_multiplier"] = [1, 2, 2]  # 32 groups of one channel and one cell are none to normalise
CONFIGS: dict[str, dict[str, Any]] = {
    "emu3": {"codebook_size": CODES, "attn_resolutions": [2], "hidden_size": 64},
    "chameleon": {"num_embeddings": CODES, "resolution": 64},
    "janus": {"num_embeddings": CODES, "num_patches": 20},
}
CLASSES = {"emu3": "Emu3VQVAE", "chameleon": "ChameleonVQVAE", "janus": "JanusVQVAE"}
OPEN: dict[str, Any] = {"emu3": open_emu3, "chameleon": open_chameleon, "janus": open_janus}
SCALES = {"emu3": (2.0, 1.0), "chameleon": (255 * 0.0078, 1.0), "janus": (2.0, 1.0)}  # pixels * scale - shift


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


PROBES = [picture(3, 24, 24, seed=1), picture(3, 13, 18, seed=2), picture(3, 20, 12, seed=3)]


@torch.no_grad()
def latents(name: str, network: Any, x: Tensor) -> Tensor:
    """What the quantizer sees of (1, 3, H, W) in [0, 1], as rows."""
    scale, shift = SCALES[name]
    x = x * scale - shift
    if name == "emu3":
        z = network.encoder(x[:, None].repeat(1, 4, 1, 1, 1)).permute(0, 2, 1, 3, 4)
        return network.quant_conv(z)[0].flatten(1).T
    return network.quant_conv(network.encoder(x))[0].flatten(1).T


@torch.no_grad()
def made(name: str) -> Any:
    """A random network whose codes are latents of a picture, of several lengths, so that many of them are in use."""
    torch.manual_seed(0)
    cls = getattr(transformers, CLASSES[name])
    network = cls(getattr(transformers, f"{CLASSES[name]}Config")(**SHARED, **CONFIGS[name]))
    z = latents(name, network, picture(1, 3, 40, 40, seed=9))
    chosen = z[:: len(z) // CODES][:CODES]
    network.quantize.embedding.weight.copy_(chosen * torch.linspace(0.6, 1.4, CODES)[:, None])
    return network


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the VQ network alone."""
    found = {name: tmp_path_factory.mktemp("chat") / name for name in CONFIGS}
    for name, folder in found.items():
        made(name).save_pretrained(folder)
    return found


@torch.no_grad()
def theirs(name: str, network: Any, x: Tensor) -> Tensor:
    """Codes (B, h * w) of transformers' own call on (B, 3, H, W) in [0, 1]."""
    scale, shift = SCALES[name]
    x = x * scale - shift
    if name == "emu3":
        return torch.stack(network.encode(x, torch.tensor([list(x.shape[2:])] * len(x))).image_tokens).flatten(1)
    return network.encode(x).image_tokens.view(len(x), -1)


@torch.no_grad()
def their_pictures(name: str, network: Any, codes: Tensor, rows: int) -> Tensor:
    y = network.decode(codes.unflatten(1, (rows, -1)) if name == "emu3" else codes)
    return ((y + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_decode_are_those_of_transformers(name: str, folders: dict[str, Path]):
    tok, network = OPEN[name](str(folders[name])), made(name)
    x = picture(3, 3, 80, 80) if name == "janus" else picture(3, 3, 32, 24)  # Janus: 20 x 20 cells, no others
    x = x[:, :, : tok.max_size, : tok.max_size]
    tokens, codes = tok.encode(x), theirs(name, network, x)
    assert tokens.codes.shape == (3, 1, codes.shape[1]) and tokens.spec.codebook_sizes == (CODES,)
    assert torch.equal(tokens.codes[:, 0], codes) and len(codes.unique()) >= 4
    assert torch.equal(tok.encode(x[1]).codes[:, 0], theirs(name, network, x[1:2]))
    raw = tok.raw()
    assert torch.equal(raw.encode(x).codes, tokens.codes)
    if name != "chameleon":
        y = their_pictures(name, network, codes, x.shape[2] // FACTOR)
        assert torch.allclose(tok.decode(tokens), y, atol=1e-5) and float(y.std()) > 1e-3
        assert torch.allclose(raw.decode(tokens), y, atol=1e-5)
        assert torch.allclose(tok.decode(tokens[1]), y[1:2], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_laws_hold(name: str, folders: dict[str, Path]):
    report = check(OPEN[name](str(folders[name])), only=LAWS, items=PROBES)
    decoding = {"exact size", "foreign ids"} if name == "chameleon" else set()  # which it does not
    assert {row.law for row in report.rows if row.status != OK} == decoding, report.table()
    assert report.ok


@pytest.mark.parametrize("name", CONFIGS)
def test_pictures_of_any_size_and_channels(name: str, folders: dict[str, Path]):
    tok = OPEN[name](str(folders[name]))
    sizes = [(3, 13, 11), (1, 8, 8), (4, 21, 5), (3, 1, 1), (3, 13, 11)]
    pictures = [picture(*s, seed=i) for i, s in enumerate(sizes)]
    tokens = tok.encode(pictures)
    assert tokens.lengths.tolist() == [-(-h // FACTOR) * -(-w // FACTOR) for _, h, w in sizes]
    for i, p in enumerate(pictures):
        assert torch.equal(tokens[i].codes, tok.train().encode(p).codes)
    if name != "chameleon":
        assert [tuple(y.shape) for y in tok.decode(tokens)] == sizes
        assert tok.decode(tokens.keep(num_tokens=2))[0].shape == (3, 13, 11)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_itself_loses_the_pixels_past_the_last_cell(name: str, folders: dict[str, Path]):
    tok, x = OPEN[name](str(folders[name])), picture(1, 3, 15, 22)
    raw = tok.raw()
    tokens = raw.encode(x)
    assert tokens.codes.shape[2] == 3 * 5 and torch.equal(tokens.codes[:, 0], theirs(name, made(name), x))
    assert tok.encode(x).codes.shape[2] == 4 * 6
    if name == "emu3":
        assert raw.decode(tokens).shape == (1, 3, 12, 20) and tok.decode(tok.encode(x)).shape == x.shape
        laws = ("exact size", "odd sizes")
        assert [row.miss_rate for row in check(tok, only=laws, items=PROBES).rows] == [0.0, 0.0]
        assert all(row.miss_rate > 0.1 for row in check(raw, only=laws, items=PROBES).rows)


def test_chameleon_only_encodes(folders: dict[str, Path]):
    tok = open_chameleon(str(folders["chameleon"]))
    assert tok.max_size == 64
    for some in (tok, tok.raw()):
        with pytest.raises(ValueError, match=r"only encodes: .* no decoder.*janus:FOLDER or emu3:FOLDER"):
            some.decode(some.encode(picture(3, 16, 16)))


def test_janus_decodes_one_grid_only_without_us(folders: dict[str, Path]):
    tok = open_janus(str(folders["janus"]))
    assert tok.max_size == tok.default_size == 80
    wide = tok.encode(picture(3, 32, 24))
    assert tok.decode(wide).shape == (1, 3, 32, 24)
    with pytest.raises(ValueError, match=r"Expected `image_tokens` to have shape"):
        tok.raw().decode(wide)
    report = check(tok.raw(), only=("exact size",))
    assert report["exact size"].miss_rate == 1.0 and check(tok, only=("exact size",))["exact size"].miss_rate == 0.0


def test_janus_encodes_by_another_distance_than_it_was_trained_with(folders: dict[str, Path]):
    """DeepSeek's quantizer compares directions, and so does transformers' decode; its encode compares positions."""
    tok, x = open_janus(str(folders["janus"])), picture(1, 3, 40, 40, seed=4)
    directions = JanusWrapper(tok.network, folders["janus"], cosine=True)
    z, book = latents("janus", made("janus"), x), made("janus").quantize.embedding.weight
    wanted = torch.cdist(F.normalize(z, dim=-1), F.normalize(book, dim=-1)).argmin(-1)
    found = directions.encode(x).codes[0, 0]
    assert torch.equal(found, wanted) and len(wanted.unique()) >= 4
    differing = (tok.encode(x).codes[0, 0] != wanted).float().mean()
    assert differing > 0.1  # 0.44 here: it depends on how unlike the lengths of the codes are
    assert directions.fingerprint != tok.fingerprint and directions.raw().config["cosine"]


def test_emu3s_own_batches_of_different_sizes_change_the_codes(folders: dict[str, Path]):
    tok, network = open_emu3(str(folders["emu3"])), made("emu3")
    pictures = [
        (p[:, : h - h % 4, : w - w % 4] * 255).round().to(torch.uint8) for p in PROBES for h, w in [p.shape[1:]]
    ]
    processor = transformers.Emu3ImageProcessor(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    batch = processor([p.permute(1, 2, 0).numpy() for p in pictures], return_tensors="pt")
    with torch.no_grad():
        found = network.encode(batch["pixel_values"].reshape(3, 3, 24, 24), batch["image_sizes"]).image_tokens
    missed = 0
    for i, p in enumerate(pictures):
        alone = tok.encode(p).codes[0, 0]
        assert torch.equal(tok.encode(pictures)[i].codes[0, 0], alone) and found[i].numel() == len(alone)
        missed += int((found[i].flatten() != alone).sum())
    assert missed > 3  # of 63; the largest picture, which is not padded, keeps its 36
    assert torch.equal(found[0].flatten(), tok.encode(pictures[0]).codes[0, 0])


def test_impossible_and_foreign_codes_are_refused(folders: dict[str, Path], tmp_path: Path):
    tok = open_emu3(str(folders["emu3"]))
    tokens = tok.encode(picture(2, 3, 16, 16))
    tokens.save(tmp_path / "t.safetensors")
    assert torch.equal(tok.decode(Tokens.load(tmp_path / "t.safetensors")), tok.decode(tokens))
    bad = tokens.codes.clone()
    bad[1, 0, 3] = CODES
    with pytest.raises(TokensError, match=r"item 1, level 0, position 3: expected 0\.\.19, got 20"):
        tok.decode(Tokens(bad, tokens.lengths, tokens.spec, tokens.side))
    with pytest.raises(TokensError, match="decode them with the tokenizer that made them"):
        open_janus(str(folders["janus"])).decode(tokens)


def chat_folder(name: str, alone: Path, folder: Path, prefix: str, shards: bool) -> Path:
    """The folder of a chat model around the network, whose other tensors nobody could load."""
    folder.mkdir()
    vq = json.loads((alone / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": name, "vq_config": vq, "text_config": {}}))
    state = {f"{prefix}{k}": v.half() for k, v in load_file(alone / "model.safetensors").items()}
    if not shards:
        save_file(state | {"lm_head.weight": torch.zeros(3)}, folder / "model.safetensors")
        return folder
    keys = sorted(state)
    parts = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for file, some in parts.items():
        save_file({k: state[k] for k in some} | {f"model.{file}.layer": torch.zeros(2)}, folder / file)
    places = {k: file for file, some in parts.items() for k in some} | {"lm_head.weight": "model-3.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder  # without model-3: it must not be opened


@pytest.mark.parametrize(
    ("name", "prefix"), [("emu3", "vqmodel."), ("chameleon", "model.vqmodel."), ("janus", "model.vqmodel.")]
)
@pytest.mark.parametrize("shards", [False, True])
def test_only_the_vq_network_of_a_chat_model_is_read(
    name: str, prefix: str, shards: bool, folders: dict[str, Path], tmp_path: Path
):
    alone, x = folders[name], picture(2, 3, 24, 24)
    tok = OPEN[name](str(chat_folder(name, alone, tmp_path / "chat", prefix, shards)))
    network = made(name).half().float()  # as the folder's weights are rounded
    assert torch.equal(tok.encode(x).codes[:, 0], theirs(name, network, x))
    assert tok.name == f"{name}:chat" and not any(p.requires_grad or p.is_meta for p in tok.parameters())


def test_no_other_shard_of_a_chat_model_is_downloaded(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = chat_folder("janus", folders["janus"], tmp_path / "chat", "model.vqmodel.", shards=True)
    asked: list[Sequence[str]] = []

    def hub(source: str, files: Sequence[str]) -> Path:
        assert source == "org/janus"
        asked.append(files)
        return folder

    monkeypatch.setattr(chat_vq, "folder_of", hub)
    open_janus("org/janus")
    assert asked[0][:2] == ("config.json", "model.safetensors.index.json")
    assert asked[1:] == [["model-1.safetensors", "model-2.safetensors"]]  # and not model-3


def test_the_image_processor_of_the_folder_says_what_the_network_sees(folders: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "janus"
    shutil.copytree(folders["janus"], folder)
    plain = open_janus(str(folder))
    assert plain.pixels == SIGNED
    processor = transformers.JanusImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    processor.save_pretrained(folder)
    tok = open_janus(str(folder))
    assert tok.pixels == PixelRange(1.0, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)) and tok.fingerprint != plain.fingerprint
    pixels = (picture(3, 24, 24) * 255).round().to(torch.uint8)
    seen = processor(pixels, return_tensors="pt", do_resize=False, do_pad=False)["pixel_values"]
    with torch.no_grad():
        codes = made("janus").encode(seen).image_tokens
    assert torch.allclose(tok.seen(pixels[None] / 255), seen, atol=1e-5) and torch.equal(
        tok.encode(pixels).codes[0, 0], codes
    )
    assert torch.allclose(tok.pixels.back(seen), pixels[None] / 255, atol=1e-6)
    nested = {"image_processor": {"rescale_factor": 0.0078, "image_mean": 1.0, "image_std": 1.0}}
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert open_janus(str(folder)).pixels == open_chameleon(str(folders["chameleon"])).pixels
    (folder / "processor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5], "image_std": 0.5}))
    with pytest.raises(ValueError, match=r"damaged \(expected a value for each of 3 channels, got 2"):
        open_janus(str(folder))
    (folder / "processor_config.json").write_text(
        json.dumps({"do_rescale": False, "do_normalize": False, "image_mean": 1})
    )
    assert open_janus(str(folder)).pixels == PixelRange(255.0, (0.0,) * 3, (1.0,) * 3)


def test_wrong_folders_are_refused(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="no folder at"):
        open_emu3(str(tmp_path / "none"))
    with pytest.raises(
        ValueError, match=r"has no config\.json; expected a folder of transformers' Emu3VQVAE or of emu3"
    ):
        open_emu3(str(tmp_path))
    with pytest.raises(ValueError, match="expected a model of type 'emu3_vqgan' or 'emu3', got 'janus_vqgan'"):
        open_emu3(str(folders["janus"]))
    chat = chat_folder("emu3", folders["emu3"], tmp_path / "chat", "vqmodel.", shards=True)
    with pytest.raises(ValueError, match="expected a model of type 'janus_vqgan' or 'janus', got 'emu3'"):
        open_janus(str(chat))
    (chat / "model-2.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="weights cannot be read"):
        open_emu3(str(chat))
    (chat / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"weights cannot be read .*restore model-1\.safetensors, model-2"):
        open_emu3(str(chat))
    (chat / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "model-1"}}))
    with pytest.raises(ValueError, match=r"tensors vqmodel\.\* of Emu3VQVAE are missing"):
        open_emu3(str(chat))
    config = json.loads((chat / "config.json").read_text())
    (chat / "config.json").write_text(json.dumps(config | {"vq_config": {"codebook_size": "many"}}))
    with pytest.raises(ValueError, match="vq_config does not fit Emu3VQVAE"):
        open_emu3(str(chat))
    with pytest.raises(ValueError, match="expected a network of 3 channels"):
        JanusWrapper(transformers.JanusVQVAE(transformers.JanusVQVAEConfig(in_channels=1, **SHARED)), "grey")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'mmtok\[codecs\]'"):
        open_emu3(str(folders["emu3"]))


def test_the_families_are_described(folders: dict[str, Path]):
    for family, name in ((EMU3, "emu3"), (CHAMELEON, "chameleon"), (JANUS, "janus")):
        tok = OPEN[name](str(folders[name]))
        assert family.name == name and family.open is OPEN[name] and tok.family is family
        assert tok.type_name == f"wrapper:{name}" and family.taxonomy.order == "2D"
        assert tok.licences["weights"].startswith(family.weights_licence)
