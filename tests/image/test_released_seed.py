"""SEED's published names: a state dict of the stated keys and shapes loads, and computes what the original computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmtok.image.causal1d import PUBLISHED, Causal1D
from mmtok.image.released.seed import convert_seed, load_seed

Shapes = dict[str, tuple[int, ...]]


def layer(name: str, o: int, *i: int) -> Shapes:
    return {f"{name}.weight": (o, *i), f"{name}.bias": (o,)}


def bert(name: str, D: int, depth: int, source: int, text: int = 0) -> Shapes:
    shapes = layer(f"{name}.embeddings.LayerNorm", D)
    if text:
        shapes |= {
            f"{name}.embeddings.{kind}_embeddings.weight": (n, D) for kind, n in (("word", text), ("position", 9))
        }
        shapes[f"{name}.embeddings.position_ids"] = (1, 9)
    for n in range(depth):
        at = f"{name}.encoder.layer.{n}"
        for kind, width in (("attention", D), ("crossattention", source))[: 2 - n % 2]:
            shapes |= layer(f"{at}.{kind}.self.query", D, D)
            shapes |= layer(f"{at}.{kind}.self.key", D, width) | layer(f"{at}.{kind}.self.value", D, width)
            shapes |= layer(f"{at}.{kind}.output.dense", D, D) | layer(f"{at}.{kind}.output.LayerNorm", D)
        for which in ("_query", "") if text else ("_query",):
            shapes |= layer(f"{at}.intermediate{which}.dense", 4 * D, D)
            shapes |= layer(f"{at}.output{which}.dense", D, 4 * D) | layer(f"{at}.output{which}.LayerNorm", D)
    return shapes


def vit(name: str, D: int, hidden: int, depth: int, eva: bool) -> Shapes:
    shapes: Shapes = {}
    for n in range(depth):
        at = f"{name}.{n}"
        shapes |= layer(f"{at}.norm1", D) | layer(f"{at}.norm2", D) | layer(f"{at}.attn.proj", D, D)
        shapes |= layer(f"{at}.mlp.fc1", hidden, D) | layer(f"{at}.mlp.fc2", D, hidden)
        if eva:
            shapes |= {f"{at}.attn.qkv.weight": (3 * D, D), f"{at}.attn.q_bias": (D,), f"{at}.attn.v_bias": (D,)}
        else:
            shapes |= layer(f"{at}.attn.qkv", 3 * D, D)
    return shapes


def published(config: dict[str, Any], V: int, hidden: int, text: int = 0) -> Shapes:
    """Names and shapes of ``seed_quantizer.pt`` as facts 1.6 states them, at the sizes of ``config``."""
    D, T, depth = config["qformer"]["dim"], config["num_tokens"], config["blocks"][0]
    d, K = config["quantizer"]["dim"], config["quantizer"]["codebook_size"]
    grid = config["vision"]["image_size"] // 14
    shapes: Shapes = {"visual_encoder.cls_token": (1, 1, V), "visual_encoder.pos_embed": (1, 1 + grid**2, V)}
    shapes |= layer("visual_encoder.patch_embed.proj", V, 3, 14, 14)
    shapes |= vit("visual_encoder.blocks", V, hidden, config["vision"]["depth"], eva=True) | layer("ln_vision", V)
    shapes |= {"query_tokens": (1, T, D), "quantize.embedding.weight": (K, d)}
    shapes |= bert("Qformer.bert", D, config["qformer"]["depth"], V, text)
    shapes |= layer("encode_task_layer.0", D, D) | layer("encode_task_layer.2", d, D)
    shapes |= layer("decode_task_layer.0", d, d) | layer("decode_task_layer.2", D, d)
    for suffix in ("", "_image"):
        shapes |= {f"pos_embed{suffix}": (1, T, D)} | vit(f"blocks{suffix}", D, 4 * D, depth, eva=False)
    if config["head"]["type"] == "A":
        shapes |= {"reverse_tokens": (1, 1, D)} | bert("Reverse_Qformer.bert", D, config["head"]["depth"], D)
        return shapes | layer("distill_image_proj", config["embedding_dim"], D)
    widths = [D, *config["head"]["widths"]]
    shapes |= {f"image_down.{2 * n}.weight": (widths[n + 1], widths[n]) for n in range(3)}
    return shapes | layer("distill_image_proj", config["embedding_dim"], T * widths[-1])


SMALL: dict[str, Any] = {
    **PUBLISHED,
    "num_tokens": 5,
    "vision": {
        **PUBLISHED["vision"],  # type: ignore[dict-item]
        "image_size": 28,
        "depth": 2,
        "arguments": {"embed_dim": 16, "num_heads": 2, "depth": 3, "mlp_ratio": 2.0},
    },
    "qformer": {"dim": 8, "depth": 3, "num_heads": 2},
    "quantizer": {**PUBLISHED["quantizer"], "dim": 4, "codebook_size": 20},  # type: ignore[dict-item]
    "blocks": (2, 2, 4.0),
    "head": {"type": "B", "widths": [6, 5, 3]},
    "embedding_dim": 7,
}
HEAD_A = {**SMALL, "head": {"type": "A", "depth": 2}}


def random_state(config: dict[str, Any], text: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = published(config, 16, 32, text)
    state = {k: torch.randn(shape, generator=generator) * 0.4 for k, shape in shapes.items()}
    return {k: v + ("norm" in k.lower() and k.endswith("weight")) for k, v in state.items()}


def pictures() -> Tensor:
    return torch.rand(6, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def vit_block(state: dict[str, Tensor], at: str, x: Tensor) -> Tensor:
    bias = state.get(f"{at}.attn.qkv.bias")
    if bias is None:
        q, v = state[f"{at}.attn.q_bias"], state[f"{at}.attn.v_bias"]
        bias = torch.cat([q, torch.zeros_like(q), v])
    qkv = F.linear(norm(state, f"{at}.norm1", x, 1e-6), state[f"{at}.attn.qkv.weight"], bias)
    x = x + linear(state, f"{at}.attn.proj", attend(*qkv.chunk(3, -1)))
    y = F.gelu(linear(state, f"{at}.mlp.fc1", norm(state, f"{at}.norm2", x, 1e-6)))
    return x + linear(state, f"{at}.mlp.fc2", y)


def run_bert(state: dict[str, Tensor], name: str, x: Tensor, source: Tensor, depth: int, causal: bool) -> Tensor:
    x = norm(state, f"{name}.embeddings.LayerNorm", x, 1e-12)
    mask = torch.ones(x.shape[1], x.shape[1]).tril().bool() if causal else None
    for n in range(depth):
        at = f"{name}.encoder.layer.{n}"
        for kind in ("attention", "crossattention")[: 2 - n % 2]:
            read = x if kind == "attention" else source
            q, k, v = (
                linear(state, f"{at}.{kind}.self.{part}", x if part == "query" else read)
                for part in ("query", "key", "value")
            )
            y = linear(state, f"{at}.{kind}.output.dense", attend(q, k, v, mask if kind == "attention" else None))
            x = norm(state, f"{at}.{kind}.output.LayerNorm", x + y, 1e-12)
        y = F.gelu(linear(state, f"{at}.intermediate_query.dense", x))
        x = norm(state, f"{at}.output_query.LayerNorm", x + linear(state, f"{at}.output_query.dense", y), 1e-12)
    return x


def latents(state: dict[str, Tensor], config: dict[str, Any], x: Tensor) -> Tensor:
    """z (B, T, d), from the equations of facts 1.1 on the published names."""
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    x = (x - mean[:, None, None]) / std[:, None, None]
    patch = "visual_encoder.patch_embed.proj"
    x = F.conv2d(x, state[f"{patch}.weight"], state[f"{patch}.bias"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual_encoder.cls_token"].expand(len(x), -1, -1), x], 1) + state["visual_encoder.pos_embed"]
    for n in range(config["vision"]["depth"]):
        x = vit_block(state, f"visual_encoder.blocks.{n}", x)
    x = norm(state, "ln_vision", x, 1e-5)
    queries = state["query_tokens"].expand(len(x), -1, -1)
    h = run_bert(state, "Qformer.bert", queries, x, config["qformer"]["depth"], causal=True)
    return linear(state, "encode_task_layer.2", linear(state, "encode_task_layer.0", h).tanh())


def original(state: dict[str, Tensor], config: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (B, T) and the semantic embedding, from the equations of facts 1.2 and 1.3 on the published names."""
    z = latents(state, config, x)
    book = state["quantize.embedding.weight"]
    codes = (z[:, :, None] - book).square().sum(-1).argmin(-1)
    up = linear(state, "decode_task_layer.2", linear(state, "decode_task_layer.0", book[codes]).tanh())
    up = up + state["pos_embed_image"]
    for n in range(config["blocks"][0]):
        up = vit_block(state, f"blocks_image.{n}", up)
    if config["head"]["type"] == "A":
        query = state["reverse_tokens"].expand(len(up), -1, -1)
        out = run_bert(state, "Reverse_Qformer.bert", query, up, config["head"]["depth"], causal=False)[:, 0]
    else:
        out = linear(state, "image_down.0", up).relu()
        out = linear(state, "image_down.4", linear(state, "image_down.2", out).relu()).flatten(1)
    return codes, linear(state, "distill_image_proj", out)


@pytest.mark.parametrize("config", [SMALL, HEAD_A], ids=["head B", "head A"])
def test_loaded_weights_compute_what_the_original_computes(config: dict[str, Any]):
    state = random_state(config)
    with torch.no_grad():  # a codebook among the latents of other pictures
        others = latents(state, config, torch.rand(4, 3, 28, 28, generator=torch.Generator().manual_seed(2)))
    state["quantize.embedding.weight"] = others.flatten(0, 1)
    tok = load_seed(state, config)
    tokens = tok.encode(pictures())
    with torch.no_grad():
        codes, embedding = original(state, config, pictures())
        assert torch.equal(tokens.codes[:, 0], codes)
        assert codes.unique().numel() > 4 and not torch.equal(codes[0], codes[1])
        torch.testing.assert_close(tok.image_embedding(tokens.codes), embedding, atol=2e-4, rtol=1e-3)


def test_a_half_precision_file_loads(tmp_path: Path):
    state = {k: v.half() for k, v in random_state(SMALL).items()}
    torch.save(state, tmp_path / "seed_quantizer.pt")
    tok = load_seed(tmp_path / "seed_quantizer.pt", SMALL)
    assert tok.queries.dtype == torch.float32 and not tok.training
    assert torch.equal(tok.queries, state["query_tokens"][0].float())


def test_text_parts_may_be_there_or_not():
    state = random_state(SMALL, text=11) | {"Qformer.cls.predictions.bias": torch.zeros(11)}
    plain, with_text = (
        load_seed(state, SMALL),
        load_seed(state, {**SMALL, "qformer": {**SMALL["qformer"], "text_vocab": 11, "max_text": 9}}),
    )
    assert plain.qformer.words is None
    assert with_text.qformer.words is not None
    assert torch.equal(with_text.qformer.words.weight, state["Qformer.bert.embeddings.word_embeddings.weight"])
    mlp = with_text.qformer.layers[2].get_submodule("text_mlp.up")
    assert torch.equal(mlp.get_parameter("weight"), state["Qformer.bert.encoder.layer.2.intermediate.dense.weight"])
    assert torch.equal(plain.encode(pictures()).codes, with_text.encode(pictures()).codes)


def test_projections_of_a_stage_one_file_and_parts_of_our_own():
    config = {
        **SMALL,
        "contrastive": {"dim": 3, "text_dim": 8},
        "pixel_decoder": {"dim": 8, "depth": 1, "num_heads": 2, "patch_size": 8},
        "image_size": 16,
    }
    state = random_state(SMALL)
    assert load_seed(state, config).embed(pictures()).shape == (6, 3)  # random projections, released rest
    extra = {k: torch.ones(shape) for k, shape in (layer("vision_proj", 3, 8) | layer("text_proj", 3, 8)).items()}
    extra["temp"] = torch.tensor(0.02)
    tok = load_seed(state | extra, config)
    assert float(tok.temperature.detach()) == pytest.approx(0.02)
    assert tok.vision_proj is not None and bool((tok.vision_proj.weight == 1).all())
    assert load_seed(state | extra, SMALL).vision_proj is None


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("Qformer.bert.encoder.layer.1.output_query.dense.bias", None, "missing.*layer.1.output_query.dense.bias"),
        ("image_down.2.weight", None, "missing.*image_down.2"),
        (None, "visual_encoder.norm.weight", "unexpected.*visual_encoder.norm"),
    ],
)
def test_missing_and_unexpected_names_are_named(drop: str | None, add: str | None, message: str):
    state = random_state(SMALL)
    if drop is not None:
        del state[drop]
    if add is not None:
        state[add] = torch.zeros(16)
    with pytest.raises(ValueError, match=message):
        convert_seed(state)


def test_another_depth_or_width_is_named():
    with pytest.raises(ValueError, match="do not fit Causal1D"):
        load_seed(random_state(SMALL), {**SMALL, "blocks": (3, 2, 4.0)})
    with pytest.raises(ValueError, match="do not fit Causal1D"):
        load_seed(random_state(SMALL), {**SMALL, "embedding_dim": 8})


@pytest.mark.parametrize("head", [PUBLISHED["head"], {"type": "A", "depth": 12}], ids=["B", "A"])
def test_every_name_of_the_published_size_has_its_place(head: dict[str, Any]):
    config: dict[str, Any] = {**PUBLISHED, "head": head}
    with torch.device("meta"):
        tok = Causal1D(**config)
        state = {k: torch.empty(shape) for k, shape in published(config, 1408, 6144).items()}
        ours = convert_seed(state)
    own = {k: tuple(v.shape) for k, v in tok.state_dict().items() if not k.endswith(".cluster_size")}
    assert {k: tuple(v.shape) for k, v in ours.items()} == own
