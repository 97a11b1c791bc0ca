"""TiTok's and TA-TiTok's published names and shapes -> TiTok, against their forward written out in plain torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from published_autoencoders import Reference, maskgit_shapes, random_state
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from mmtok.image import titok
from mmtok.image.released import titok as released
from mmtok.image.released.titok import TITOK, load_titok, open_titok, published_names, titok_config
from mmtok.image.titok import TiTok
from mmtok.layers.text import TextFeatures

DEPTH, WIDTH, HEADS, N, SIZE, K, GRID = 2, 16, 2, 5, 4, 20, 4  # of the small models here; 16 px in patches of 4
TEXT = {"type": "clip", "source": "a-folder", "dim": 6, "max_tokens": 7}
TEACHER: dict[str, Any] = {
    "width": 8,
    "multipliers": [1, 1, 2],
    "blocks": 2,
    "middle_attention": False,
    "patch": 1,
    "style": "maskgit",
    "pixels": "unit",
    "quantizer": {"type": "vq", "dim": 6, "codebook_size": 10, "codebook": "gradient", "kmeans_init": False},
}
SMALL: dict[str, Any] = {
    "num_tokens": N,
    "token_size": SIZE,
    "patch_size": 4,
    "encoder": (WIDTH, DEPTH, HEADS),
    "decoder": (WIDTH, DEPTH, HEADS),
    "image_size": 16,
    "quantizer": {"type": "vq", "codebook_size": K, "metric": "cosine", "codebook": "gradient", "kmeans_init": False},
    "unit_latents": True,
    "legacy_reshape": True,
    "teacher": TEACHER,
    "stage": 2,
}
SMALL_TEXT: dict[str, Any] = {
    **SMALL,
    "quantizer": {"type": "vq", "codebook_size": K, "codebook": "gradient"},
    "unit_latents": False,
    "legacy_reshape": False,
    "teacher": None,
    "stage": 1,
    "text_encoder": TEXT,
}


def linear(name: str, i: int, o: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (o, i), f"{name}.bias": (o,)}


def conv(name: str, i: int, o: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (o, i, kernel, kernel), f"{name}.bias": (o,)}


def published_state(text: bool, w: int = WIDTH, depth: int = DEPTH, p: int = 4, grid: int = GRID) -> dict[str, Tensor]:
    """Random tensors under the names that modeling/modules/blocks.py of bytedance/1d-tokenizer gives."""
    shapes: dict[str, tuple[int, ...]] = {"latent_tokens": (N, w), "quantize.embedding.weight": (K, SIZE)}
    for part in ("encoder", "decoder"):
        shapes |= {f"{part}.class_embedding": (1, w), f"{part}.positional_embedding": (grid**2 + 1, w)}
        shapes |= {f"{part}.latent_token_positional_embedding": (N, w)}
        norms = [f"{part}.{n}" for n in ("ln_pre", "ln_post")]
        for i in range(depth):
            block = f"{part}.transformer.{i}"
            norms += [f"{block}.ln_1", f"{block}.ln_2"]
            shapes |= {f"{block}.attn.in_proj_weight": (3 * w, w), f"{block}.attn.in_proj_bias": (3 * w,)}
            shapes |= linear(f"{block}.attn.out_proj", w, w)
            shapes |= linear(f"{block}.mlp.c_fc", w, 4 * w) | linear(f"{block}.mlp.c_proj", 4 * w, w)
        shapes |= {f"{n}.{x}": (w,) for n in norms for x in ("weight", "bias")}
    shapes |= conv("encoder.patch_embed", 3, w, p) | conv("encoder.conv_out", w, SIZE, 1)
    shapes |= linear("decoder.decoder_embed", SIZE, w) | {"decoder.mask_token": (1, 1, w)}
    if text:
        shapes |= conv("decoder.ffn.0", w, 3 * p * p, 1) | conv("decoder.conv_out", 3, 3, 3)
        shapes |= linear("decoder.text_guidance_proj", 6, w) | {"decoder.text_guidance_positional_embedding": (7, w)}
    else:
        shapes |= conv("decoder.ffn.0", w, 2 * w, 1) | conv("decoder.ffn.2", 2 * w, 10, 1)
        teacher = maskgit_shapes(8, (1, 1, 2), 6, 10)
        shapes |= {f"pixel_{n}": s for n, s in teacher.items() if n.startswith("decoder.")}
        shapes |= {"pixel_quantize.embedding.weight": (10, 6)}
    state = random_state(shapes)
    return {k: v + 1 if ".ln_" in k and k.endswith("weight") else v for k, v in state.items()}


def run_stack(s: dict[str, Tensor], part: str, x: Tensor) -> Tensor:
    """Pre-norm blocks between ln_pre and ln_post, eps 1e-5."""

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), s[f"{part}.{name}.weight"], s[f"{part}.{name}.bias"])

    def dense(name: str, x: Tensor) -> Tensor:
        return x @ s[f"{part}.{name}.weight"].T + s[f"{part}.{name}.bias"]

    x = norm("ln_pre", x)
    for i in range(DEPTH):
        block = f"transformer.{i}"
        h = norm(f"{block}.ln_1", x)
        joint = h @ s[f"{part}.{block}.attn.in_proj_weight"].T + s[f"{part}.{block}.attn.in_proj_bias"]
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in joint.chunk(3, -1))
        weights = (q @ k.transpose(2, 3) / (WIDTH / HEADS) ** 0.5).softmax(-1)
        x = x + dense(f"{block}.attn.out_proj", (weights @ v).transpose(1, 2).flatten(2))
        x = x + dense(f"{block}.mlp.c_proj", F.gelu(dense(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))))
    return norm("ln_post", x)


def run_encoder(s: dict[str, Tensor], x: Tensor, legacy: bool) -> Tensor:
    patches = F.conv2d(x, s["encoder.patch_embed.weight"], s["encoder.patch_embed.bias"], stride=4)
    tokens = torch.cat([s["encoder.class_embedding"].expand(len(x), 1, -1), patches.flatten(2).transpose(1, 2)], 1)
    tokens = tokens + s["encoder.positional_embedding"]
    latents = s["latent_tokens"] + s["encoder.latent_token_positional_embedding"]
    y = run_stack(s, "encoder", torch.cat([tokens, latents.expand(len(x), -1, -1)], 1))[:, -N:]
    y = y.reshape(len(x), WIDTH, N) if legacy else y.transpose(1, 2)
    return F.conv1d(y, s["encoder.conv_out.weight"][..., 0], s["encoder.conv_out.bias"]).transpose(1, 2)


def run_decoder(s: dict[str, Tensor], z_q: Tensor, text: Tensor | None) -> Tensor:
    B = len(z_q)
    masks = torch.cat([s["decoder.class_embedding"], s["decoder.mask_token"][0].expand(GRID**2, -1)])
    row = [(masks + s["decoder.positional_embedding"]).expand(B, -1, -1)]
    row.append(F.linear(z_q, s["decoder.decoder_embed.weight"], s["decoder.decoder_embed.bias"]))
    row[1] = row[1] + s["decoder.latent_token_positional_embedding"]
    if text is not None:
        guide = F.linear(text, s["decoder.text_guidance_proj.weight"], s["decoder.text_guidance_proj.bias"])
        row.append(guide + s["decoder.text_guidance_positional_embedding"])
    y = run_stack(s, "decoder", torch.cat(row, 1))[:, 1 : 1 + GRID**2]
    y = F.conv2d(y.transpose(1, 2).unflatten(2, (GRID, GRID)), s["decoder.ffn.0.weight"], s["decoder.ffn.0.bias"])
    if text is not None:
        p1_p2_c = y.unflatten(1, (4, 4, 3)).permute(0, 3, 4, 1, 5, 2)  # (B, c, h, p1, w, p2)
        x = p1_p2_c.reshape(B, 3, 16, 16)
        return F.conv2d(x, s["decoder.conv_out.weight"], s["decoder.conv_out.bias"], padding=1)
    logits = F.conv2d(y.tanh(), s["decoder.ffn.2.weight"], s["decoder.ffn.2.bias"])
    soft = torch.einsum("nchw,cd->ndhw", logits.softmax(1), s["pixel_quantize.embedding.weight"])
    below = {k.removeprefix("pixel_"): v for k, v in s.items() if k.startswith("pixel_decoder.")}
    return Reference(below, 3, True).decode(soft)


@pytest.mark.parametrize("text", [True, False])
def test_it_computes_what_the_original_computes(text: bool):
    s, x = published_state(text), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    tok = load_titok(s, SMALL_TEXT if text else SMALL)
    with torch.no_grad():
        z, book = run_encoder(s, x, legacy=not text), s["quantize.embedding.weight"]
        if not text:
            z, book = F.normalize(z, dim=-1), F.normalize(book, dim=-1)
        codes = torch.cdist(z, book[None]).argmin(-1)
        guide = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(6)) if text else None
        want = run_decoder(s, book[codes], guide)
        found, _ = tok.encode_pixels(x, None, None, None)
        features = None if guide is None else TextFeatures(guide, torch.ones(2, 7, dtype=torch.bool))
        x_hat = tok.decode_pixels(found, 16, 16, features, None)
    assert torch.equal(found[:, 0], codes) and len(codes.unique()) > 3
    assert torch.allclose(x_hat, want, atol=1e-4) and float(want.std()) > 1e-3


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_files_load(suffix: str, tmp_path: Path):
    s = published_state(False)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".bin":
        torch.save(s, path)
    else:
        save_file(s, path)
    assert load_titok(path, SMALL).fingerprint == load_titok(s, SMALL).fingerprint


def test_names_that_do_not_fit_are_refused():
    s = published_state(True)
    load_titok(s | {"quantize.embed_prob": torch.zeros(K)}, SMALL_TEXT)  # a statistic of TA-TiTok's training
    with pytest.raises(ValueError, match=r"TiTok: expected .*missing \['latent_tokens'\]"):
        load_titok({k: v for k, v in s.items() if k != "latent_tokens"}, SMALL_TEXT)
    with pytest.raises(ValueError, match=r"unexpected \['decoder.more'\]"):
        load_titok(s | {"decoder.more": torch.zeros(1)}, SMALL_TEXT)
    with pytest.raises(ValueError, match="do not fit TiTok as configured"):
        load_titok(s, {**SMALL_TEXT, "token_size": 3})
    with pytest.raises(ValueError, match="of stage 2; pass a config with stage=2"):
        load_titok(published_state(False), {**SMALL, "stage": 1})


@pytest.mark.parametrize("name", ["TITOK_L32", "TATITOK_BL32"])
def test_every_tensor_of_the_published_size_has_its_place(name: str):
    config = getattr(titok, name)
    with torch.device("meta"):
        tok = TiTok(**config)
    names = published_names(tok)
    state = tok.state_dict()
    own = {k for k in state if not k.startswith("quantizer.book.") and k != "decoder.text.null"}
    assert set(names) == own | {"quantizer.book.codebook"}
    depth = config["decoder"][1] + config["encoder"][1]
    assert sum(".attn.in_proj_weight" in v[0] for v in names.values()) == depth


def meta_state(config: dict[str, Any]) -> dict[str, Tensor]:
    """Published names and shapes of a whole-size tokenizer, without memory."""
    with torch.device("meta"):
        tok = TiTok(**config)
    own, p = tok.state_dict(), config["patch_size"]
    state = {v[0]: own[k] for k, v in published_names(tok).items() if len(v) == 1}
    return state | {"encoder.patch_embed.weight": own["encoder.patch.weight"].unflatten(1, (3, p, p))}


@pytest.mark.parametrize("name", ["TITOK_L32", "TITOK_B64", "TITOK_S128", "TATITOK_BL32", "TATITOK_BL128"])
def test_the_shapes_of_published_weights_name_their_config(name: str):
    config = getattr(titok, name)
    state = meta_state(config)
    assert titok_config(state) == config
    legacy = name.startswith("TITOK")
    assert titok_config(state, {"use_l2_norm": legacy, "is_legacy": legacy, "codebook_size": 1}) == config
    assert titok_config(state, {"use_l2_norm": True})["unit_latents"]


def write(folder: Path, state: dict[str, Tensor], vq_model: dict[str, Any] | None) -> str:
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    if vq_model is not None:
        (folder / "config.json").write_text(json.dumps({"experiment": {}, "model": {"vq_model": vq_model}}))
    return str(folder)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("said", [None, {"quantize_mode": "vq", "num_latent_tokens": N}])
def test_a_folder_opens_as_a_tokenizer_of_mmtok(
    text: bool, said: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(released, "MASKGIT_VQ", TEACHER)
    s, shape = published_state(text), (WIDTH, DEPTH, 1)  # of width 64 a head, or one
    tok = open_titok(write(tmp_path / "small", s, said))
    encoder = {"type": "clip", "source": "clip-vit-large-patch14-336", "dim": 6, "max_tokens": 7}
    same = load_titok(
        s,
        {**(SMALL_TEXT if text else SMALL), "encoder": shape, "decoder": shape}
        | ({"text_encoder": encoder} if text else {}),
    )
    x = torch.rand(3, 3, 13, 16, generator=torch.Generator().manual_seed(2))
    found = tok.encode(x)
    assert torch.equal(found.codes, same.encode(x).codes) and found.codes.shape == (3, 1, N)
    assert len(found.codes.unique()) > 3 and tok.decode(found).shape == x.shape
    assert torch.equal(tok.decode(found), same.decode(same.encode(x)))
    assert type(tok) is TiTok and tok.name == "titok:small" == found.spec.name
    assert (
        tok.licences
        == {"code": "Apache-2.0", "weights": "Apache-2.0 (as published; the folder has no card that says so)"}
        and TITOK.open is open_titok
    )


def test_folders_that_hold_no_such_tokenizer_are_refused(tmp_path: Path):
    s, legacy = published_state(True), published_state(False)
    with pytest.raises(ValueError, match="no folder at"):
        open_titok(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="expected a file"):
        open_titok(str(tmp_path))
    with pytest.raises(ValueError, match=r"expected weights with a codebook .*got vae"):
        open_titok(write(tmp_path / "a", s, {"quantize_mode": "vae"}))
    with pytest.raises(ValueError, match="expected weights with a codebook"):
        titok_config({k: v for k, v in s.items() if not k.startswith("quantize.")})
    with pytest.raises(ValueError, match=r"missing \['latent_tokens'\]"):
        titok_config({k: v for k, v in s.items() if k != "latent_tokens"})
    with pytest.raises(ValueError, match=r"missing \['decoder\.text_guidance_positional_embedding'\]"):
        titok_config({k: v for k, v in s.items() if "guidance_pos" not in k})
    with pytest.raises(ValueError, match="of stage 1, without a decoder to pixels"):
        titok_config({k: v for k, v in legacy.items() if not k.startswith("pixel_")})
    with pytest.raises(ValueError, match=r"config\.json says is_legacy False, the weights' decoder says True"):
        titok_config(legacy, {"is_legacy": False})
    for text, message in (
        ("{", "damaged"),
        ("[]", "expected model.vq_model"),
        ('{"model": 1}', "expected model.vq_model"),
    ):
        (tmp_path / "a" / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            open_titok(str(tmp_path / "a"))
    load_titok(s, SMALL_TEXT).save(tmp_path / "own")
    with pytest.raises(ValueError, match="is a checkpoint of mmtok; load it by its path"):
        open_titok(str(tmp_path / "own"))
