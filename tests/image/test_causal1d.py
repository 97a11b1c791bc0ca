"""SEED's tokenizer: causality of the codes, the losses of both stages, retrieval, the heads, the diffusion door."""

from __future__ import annotations

import importlib.util
import json
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from mmtok.image.causal1d import LEGACY, PUBLISHED, TEXTBOOK, Causal1D, contrastive_loss
from mmtok.image.unclip import unclip_pictures
from mmtok.quantizers.sync import sum_over_ranks, world_size
from mmtok.training.objective import ImageObjective

TINY: dict[str, Any] = {
    "num_tokens": 6,
    "vision": {
        "type": "timm",
        "name": "eva_giant_patch14_clip_224",
        "image_size": 28,
        "class_token": True,
        "final_norm": False,
        "arguments": {"embed_dim": 16, "num_heads": 2, "depth": 2},
    },
    "qformer": {"dim": 16, "depth": 2, "num_heads": 2, "dropout": 0.1},
    "quantizer": {"type": "vq", "dim": 4, "codebook_size": 32},
    "blocks": [1, 2, 2.0],
    "head": {"type": "B", "widths": [8, 4]},
    "pixel_decoder": {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
    "image_size": 16,
    "contrastive": {"dim": 8, "text_dim": 12},
}


def tiny(**changes: Any) -> Causal1D:
    """With weights that let the picture through, and codes among its latents."""
    torch.manual_seed(0)
    tok = Causal1D(**{**TINY, **changes})
    with torch.no_grad():
        for p in tok.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        tok.temperature.fill_(0.07) if tok.vision_proj is not None else None
    tok.train()(pictures(16, seed=5))
    return tok.eval()


def pictures(count: int, size: int = 16, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_a_code_never_depends_on_later_queries(causal: bool, kept: int):
    tok, x = tiny(causal=causal), pictures(24)
    before = tok.encode(x).codes[..., :kept]
    with torch.no_grad():
        tok.queries[kept:] = rand(6 - kept, 16, seed=9)
    after = tok.encode(x).codes[..., :kept]
    assert torch.equal(before, after) == causal


@pytest.mark.parametrize("causal", [True, False])
def test_fewer_queries_give_the_same_first_tokens_only_when_causal(causal: bool):
    tok, x = tiny(causal=causal), pictures(4)
    features = tok.vision(x)
    with torch.no_grad():
        whole = tok.query(None, features)
        tok.queries = torch.nn.Parameter(tok.queries[:2])
        assert torch.allclose(tok.query(x), whole[:, :2], atol=1e-4) == causal


def test_encode_and_decode_of_prefixes_and_sizes():
    tok = tiny()
    x = [pictures(1, 40)[0], pictures(1, 7)[0], torch.rand(3, 5, 30)]
    tokens = tok.encode(x)
    assert tokens.codes.shape == (3, 1, 6)
    assert tokens.codes.unique().numel() > 4  # the pictures matter
    assert [tuple(p.shape) for p in tok.decode(tokens)] == [(3, 40, 40), (3, 7, 7), (3, 5, 30)]
    for k in range(1, 7):
        assert torch.equal(tok.encode(x, num_tokens=k).codes, tokens.codes[..., :k])
        assert len(tok.decode(tokens.keep(num_tokens=k))) == 3


@pytest.mark.parametrize("kept", [1, 4])
def test_decoding_a_prefix_is_what_the_masked_forward_shows(kept: int):
    tok, x = tiny(), pictures(2)
    mask = (torch.arange(6) < kept).expand(2, -1)
    with torch.no_grad():
        shown = tok(x, mask=mask)
        decoded = tok.decode_pixels(shown.quantized.codes[..., :kept], 16, 16, None, None)
    torch.testing.assert_close(decoded, shown.x_hat, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(decoded, tok(x).x_hat, atol=1e-3)


def test_tail_drop_masks_the_tails_in_training_only():
    tok, x = tiny(tail_drop="uniform"), pictures(32)
    assert bool(tok(x).quantized.z_q.any(-1).all())
    kept = tok.train()(x).quantized.z_q.detach().abs().sum(-1) > 0  # (B, T)
    lengths = kept.sum(1)
    assert lengths.min() >= 1 and len(lengths.unique()) > 2
    assert torch.equal(kept, torch.arange(6) < lengths[:, None])


def test_vision_sees_the_picture_larger_than_the_decoder_makes_it():
    tok = tiny()
    assert tok.encode_size(99, 50) == (28, 28) and tok.working_size(99, 50) == (16, 16)
    fine = torch.zeros(3, 28, 28)
    fine[:, ::2] = 1.0  # a grating that no 16 x 16 picture has
    assert not torch.equal(tok.encode(fine).codes, tok.encode(torch.full((3, 28, 28), 0.5)).codes)


def test_every_part_learns_from_its_loss():
    tok = tiny().train()
    objective = ImageObjective(aux_weights={"feature_loss": 1.0, "embedding_loss": 1.0, "contrastive_loss": 1.0})
    x = pictures(8)
    loss, terms = objective.generator_loss(tok(x, text_embedding=rand(8, 12)), {"x": x}, 0)
    loss.backward()
    assert {"feature_loss", "embedding_loss", "contrastive_loss"} < set(terms)
    silent = [n for n, p in tok.named_parameters() if p.requires_grad and (p.grad is None or not bool(p.grad.any()))]
    assert silent == []
    assert all(not p.requires_grad for p in tok.vision.parameters())


def test_a_short_training_learns():
    tok = tiny(qformer={**TINY["qformer"], "dropout": 0.0}).train()
    optimizer = torch.optim.AdamW([p for p in tok.parameters() if p.requires_grad], lr=3e-3)
    x, text = F.interpolate(torch.rand(16, 3, 1, 1), (16, 16)), rand(16, 12)
    weights = {"feature_loss": 1.0, "embedding_loss": 0.5, "contrastive_loss": 0.3}
    objective, seen = ImageObjective(aux_weights=weights), []
    for step in range(40):
        optimizer.zero_grad()
        loss, terms = objective.generator_loss(tok(x, text_embedding=text), {"x": x}, step)
        loss.backward()
        optimizer.step()
        seen.append({k: float(v) for k, v in terms.items()})
    assert seen[-1]["l2"] < 0.7 * seen[0]["l2"]
    assert all(seen[-1][name] < 0.95 * seen[0][name] for name in weights)


def test_feature_loss_does_not_move_its_target():
    tok, x = tiny(), pictures(2)
    h = tok.query(x)
    up = tok.decoded(tok.quantizer(tok.encode_task(h)).z_q)
    out = tok(x).aux["feature_loss"]
    branch = up + tok.feature_positions
    for block in tok.get_submodule("feature_blocks").children():
        branch = block(branch)
    torch.testing.assert_close(out, 1 - F.cosine_similarity(branch, h, dim=-1).mean())
    tok.quantizer.requires_grad_(False)
    (grad,) = torch.autograd.grad(out, tok.decode_task[0].weight, retain_graph=True)
    assert bool(grad.any())
    with_target = 1 - F.cosine_similarity(branch, h, dim=-1).mean()
    ours, theirs = (torch.autograd.grad(loss, tok.queries)[0] for loss in (out, with_target))
    assert not torch.allclose(ours, theirs)


def test_embedding_loss_and_its_targets():
    tok, x = tiny(), pictures(2)
    features = tok.vision(x)
    predicted = tok.image_embedding(tok.encode(x).codes)
    mean = features[:, 1:].mean(1)  # without the class token
    target = (mean - mean.mean(1, keepdim=True)) / (mean.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(tok(x).aux["embedding_loss"], (predicted - target).square().mean(), atol=1e-5, rtol=1e-4)
    given = rand(2, 16)
    out = tok(x, features=features, embedding=given)
    torch.testing.assert_close(out.aux["embedding_loss"], (predicted - given).square().mean(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"expected \(2, 16\), got \(2, 5\)"):
        tok(x, embedding=rand(2, 5))


def test_cached_features_are_what_forward_computes():
    tok, x = tiny(), pictures(3)
    plain, cached = tok(x), tok(x, features=tok.vision(x))
    assert torch.equal(plain.x_hat, cached.x_hat) and torch.equal(plain.quantized.codes, cached.quantized.codes)


@pytest.mark.parametrize(("weights", "commitment", "codebook"), [(LEGACY, 1.0, 0.25), (TEXTBOOK, 0.25, 1.0)])
def test_the_two_balances_of_the_codebook_loss(weights: dict[str, Any], commitment: float, codebook: float):
    tok = tiny(quantizer={"type": "vq", "dim": 4, "codebook_size": 32, **weights})
    x = pictures(3)
    z = tok.encode_task(tok.query(x)).detach().requires_grad_()
    out = tok.quantizer(z)
    e = tok.quantizer.decode(out.codes).detach()
    torch.testing.assert_close(out.loss, (commitment + codebook) * (z - e).square().mean())
    (grad,) = torch.autograd.grad(out.loss, z)
    torch.testing.assert_close(grad, commitment * 2 * (z - e).detach() / z.numel())


def test_contrastive_loss_is_smoothed_cross_entropy_both_ways():
    image, text = (F.normalize(rand(5, 4, seed=s), dim=-1) for s in (1, 2))
    similarity = image @ text.T / 0.1
    wanted = 0.9 * torch.eye(5) + 0.1 / 5
    terms = [-(wanted * s.log_softmax(1)).sum(1).mean() for s in (similarity, similarity.T)]
    torch.testing.assert_close(contrastive_loss(image, text, torch.tensor(0.1)), sum(terms) / 2)
    assert bool(contrastive_loss(image, text, torch.tensor(-1.0)).isfinite())


def contrast(part: slice) -> dict[str, Tensor]:
    """Loss and averaged gradients of two projections and the temperature on rows ``part`` of a batch of 6."""
    torch.manual_seed(0)
    image, text, temperature = torch.nn.Linear(5, 4), torch.nn.Linear(3, 4), torch.nn.Parameter(torch.tensor(0.2))
    x, y = rand(6, 5)[part], rand(6, 3, seed=2)[part]
    loss = contrastive_loss(F.normalize(image(x), dim=-1), F.normalize(text(y), dim=-1), temperature)
    loss.backward()
    result = {"loss": loss.detach().reshape(1)}
    for i, p in enumerate([*image.parameters(), *text.parameters(), temperature]):
        assert p.grad is not None
        result[str(i)] = sum_over_ranks(p.grad.clone()) / world_size()
    return result


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/ranks", timedelta(60), world_size=2, rank=rank)
    torch.save(contrast(slice(0, 2) if rank == 0 else slice(2, 6)), f"{folder}/{rank}.pt")
    dist.barrier()  # gloo may abort where one rank takes the group down while the other still uses it
    dist.destroy_process_group()


def test_two_ranks_contrast_as_one_process_does(tmp_path: Path):
    """Also with batches of different sizes: every rank's loss is that of all pairs."""
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    alone = contrast(slice(0, 6))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, msg=lambda m, key=key: f"{key}: {m}")


def test_stage_two_leaves_stage_one_alone():
    tok = tiny()
    tok.start_stage2()
    tok.train()
    assert not tok.qformer.training and tok.encode_task.training and not tok.vision.training
    x = pictures(8)
    before = {k: v.clone() for k, v in tok.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in tok.parameters() if p.requires_grad], lr=0.01)
    out = tok(x, text_embedding=rand(8, 12))
    (out.x_hat.mean() + out.quantized.loss + out.aux["feature_loss"] + out.aux["embedding_loss"]).backward()
    optimizer.step()
    changed = {k.split(".")[0] for k, v in tok.state_dict().items() if not torch.equal(v, before[k])}
    parts = {"quantizer", "encode_task", "decode_task", "pixel_decoder", "head"}
    assert changed == parts | {f"{n}_{p}" for n in ("feature", "image") for p in ("blocks", "positions")}
    assert not out.aux["contrastive_loss"].requires_grad
    assert torch.equal(tok.query(x), tok.query(x))  # no dropout


def test_stage_two_starts_the_codebook_among_the_new_latents():
    tok = tiny()
    with torch.no_grad():
        tok.encode_task[2].bias.add_(50.0)
    tok.train()
    far = float(tok(pictures(16)).quantized.stats["commitment_loss"])
    tok.start_stage2()
    near = float(tok(pictures(16)).quantized.stats["commitment_loss"])
    assert near < 1 < far


def test_retrieval_by_embedding_by_codes_and_by_text():
    tok, x = tiny(), pictures(4)
    codes = tok.encode(x).codes
    for v in (tok.embed(x), tok.embed_codes(codes), tok.embed_codes(codes[..., :2]), tok.embed_text(rand(4, 12))):
        assert v.shape == (4, 8)
        torch.testing.assert_close(v.norm(dim=1), torch.ones(4))
    h = tok.query(x)[:, -1]
    torch.testing.assert_close(tok.embed(features=tok.vision(x)), F.normalize(tok.vision_proj(h), dim=1))  # type: ignore[misc]
    other = codes.clone()
    other[..., 0] = (other[..., 0] + 1) % 32
    assert not torch.allclose(tok.embed_codes(codes), tok.embed_codes(other), atol=1e-4)


def test_strings_pass_through_the_named_text_encoder(monkeypatch: pytest.MonkeyPatch):
    config = {"type": "minilm", "source": "package", "dim": 12, "max_tokens": 8}
    tok = tiny(text_encoder=config)
    asked: list[Any] = []

    def encoder(given: Any) -> Any:
        asked.append(given)
        return SimpleNamespace(embed=lambda texts: rand(len(texts), 12))

    monkeypatch.setattr("mmtok.image.causal1d.build_text_encoder", encoder)
    assert torch.equal(tok.embed_text(["a", "b"]), tok.embed_text(rand(2, 12)))
    tok.embed_text(["c"])
    assert asked == [config]  # once


def test_the_text_branch_of_the_qformer():
    tok = tiny(qformer={**TINY["qformer"], "text_vocab": 20, "max_text": 8}, contrastive={"dim": 8})
    ids, mask = torch.tensor([[3, 7, 0], [5, 1, 2]]), torch.tensor([[True, True, False], [True] * 3])
    v = tok.embed_text(text_ids=ids, text_mask=mask)
    torch.testing.assert_close(v[:1], tok.embed_text(text_ids=ids[:1, :2]), atol=1e-5, rtol=1e-4)
    first = tok.qformer.text(ids, mask)[:, 0]
    torch.testing.assert_close(v, F.normalize(tok.text_proj(first), dim=1))
    out = tok(pictures(2), text_ids=ids, text_mask=mask)
    torch.testing.assert_close(
        out.aux["contrastive_loss"], contrastive_loss(tok.embed(pictures(2)), v, tok.temperature)
    )
    with pytest.raises(ValueError, match="expected text_ids"):
        tok.embed_text(rand(2, 12))


@pytest.mark.parametrize(
    ("changes", "call", "message"),
    [
        ({}, lambda t: t.embed_text(["a"]), "names no text encoder"),
        ({}, lambda t: t.embed_text(rand(2, 5)), r"\(B, 12\), got \(2, 5\)"),
        ({}, lambda t: t.embed_text(text_ids=torch.zeros(1, 2, dtype=torch.int64)), "no text branch"),
        ({"contrastive": None}, lambda t: t.embed(pictures(1)), "no common space"),
        ({"contrastive": None}, lambda t: t.embed_text(rand(1, 12)), "no common space"),
        ({}, lambda t: t.query(None), "got neither"),
        ({}, lambda t: t.encode(pictures(1), text="a"), "takes no text"),
    ],
)
def test_wrong_calls_are_named(changes: dict[str, Any], call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call(tiny(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"head": {"type": "C"}},
        {"head": {"type": "A", "widths": [4]}},
        {"tail_drop": "some"},
        {"image_size": 20},
        {"qformer": {"dim": 15, "depth": 1, "num_heads": 2}},
    ],
)
def test_wrong_configs_are_named(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="expected"):
        Causal1D(**{**TINY, **changes})


def test_head_b_is_an_mlp_on_each_token_and_one_linear():
    tok = tiny()
    x = rand(2, 6, 16)
    weights = dict(tok.head.named_parameters())
    hidden = (x @ weights["down.0.weight"].T).clamp_min(0) @ weights["down.2.weight"].T
    expected = hidden.reshape(2, -1) @ weights["proj.weight"].T + weights["proj.bias"]
    torch.testing.assert_close(tok.head(x), expected)
    assert set(weights) == {"down.0.weight", "down.2.weight", "proj.weight", "proj.bias"}


def test_head_a_reads_all_tokens_with_one_query():
    tok = tiny(head={"type": "A", "depth": 2}, embedding_dim=9)
    x = rand(2, 6, 16)
    assert tok.head(x).shape == (2, 9)
    torch.testing.assert_close(tok.head(x.flip(1)), tok.head(x), atol=1e-5, rtol=1e-4)  # a set: cross-attention alone
    assert not torch.allclose(tok.head(x + rand(6, 16, seed=3)), tok.head(x), atol=1e-3)
    assert "embedding_loss" not in tok(pictures(2)).aux  # the vision encoder's 16 numbers are no target for 9
    assert "embedding_loss" in tok(pictures(2), embedding=rand(2, 9)).aux


def test_without_a_pixel_decoder_there_are_no_pixels_but_codes():
    tok = tiny(pixel_decoder=None)
    tokens = tok.encode(pictures(2))
    assert tok.image_embedding(tokens.codes).shape == (2, 16)
    out = tok(pictures(2))
    assert out.x_hat.shape == (2, 3, 0, 0) and set(out.aux) == {"feature_loss", "embedding_loss"}
    with pytest.raises(ValueError, match=r"unclip_pictures.*pixel_decoder"):
        tok.decode(tokens)


def test_the_config_rebuilds_it():
    tok, x = tiny(tail_drop="powers", causal=False), pictures(4, 20)
    again = Causal1D(**json.loads(json.dumps(tok.config)))
    again.load_state_dict(tok.state_dict())
    assert again.spec == tok.spec
    assert torch.equal(again.eval().encode(x).codes, tok.encode(x).codes)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("head", ["A", "B"])
def test_published_sizes(head: str):
    options = {"type": "A", "depth": 12} if head == "A" else PUBLISHED["head"]
    with torch.device("meta"):
        tok = Causal1D(**{**PUBLISHED, "head": options})  # type: ignore[arg-type]
    D, V = 768, 1408
    linear = lambda i, o: i * o + o  # noqa: E731
    vit_block = 4 * V + 3 * V * V + 2 * V + linear(V, V) + linear(V, 6144) + linear(6144, V)
    assert count(tok.vision) == linear(3 * 14 * 14, V) + V + 257 * V + 39 * vit_block
    assert round(count(tok.vision) / 1e6) == 986
    attention = lambda source: 2 * linear(D, D) + 2 * linear(source, D) + 2 * D  # noqa: E731
    mlp = linear(D, 4 * D) + linear(4 * D, D)
    assert count(tok.qformer) == 2 * D + 12 * (attention(D) + mlp + 2 * D) + 6 * attention(V)
    assert round(count(tok.qformer) / 1e6) == 105
    assert count(tok.quantizer) == 8192 * 32
    assert count(tok.get_submodule("image_blocks")) == 4 * (4 * D + linear(D, 3 * D) + linear(D, D) + mlp)
    if head == "B":
        assert count(tok.head) == D * 256 + 256 * 128 + 128 * 32 + linear(1024, 1024)
    else:
        reverse = 2 * D + 12 * (attention(D) + mlp + 2 * D) + 6 * attention(D)
        assert count(tok.head) == D + reverse + linear(D, 1024)
    assert tok.base_spec().codebook_sizes == (8192,) and tok.base_spec().num_tokens == 32


class RecordingPipeline:
    """What `unclip_pictures` needs of a pipeline, and what it was asked for."""

    def __init__(self, embedding_dim: int):
        self.unet = SimpleNamespace(
            config=SimpleNamespace(in_channels=4, sample_size=8), device=torch.device("cpu"), dtype=torch.float32
        )
        self.image_normalizer = SimpleNamespace(config=SimpleNamespace(embedding_dim=embedding_dim))
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **arguments: Any) -> Any:
        self.calls.append(arguments)
        return SimpleNamespace(images=arguments["latents"][:, :3].sigmoid())


def test_each_item_goes_through_the_diffusion_model_with_noise_of_its_own():
    tok, pipeline = tiny(), RecordingPipeline(16)
    tokens = tok.encode(pictures(3))
    out = unclip_pictures(tok, tokens, pipeline, torch.Generator().manual_seed(4), steps=7, guidance=2.0)
    assert out.shape == (3, 3, 8, 8)
    given = torch.cat([c["image_embeds"] for c in pipeline.calls])
    torch.testing.assert_close(given, tok.image_embedding(tokens.codes).detach(), atol=1e-5, rtol=1e-4)
    assert {(c["num_inference_steps"], c["guidance_scale"], c["noise_level"]) for c in pipeline.calls} == {(7, 2.0, 0)}
    assert not torch.equal(out[0], out[1])
    assert torch.equal(unclip_pictures(tok, tokens, pipeline, torch.Generator().manual_seed(4)), out)
    with pytest.raises(ValueError, match="width 16, got 1024"):
        unclip_pictures(tok, tokens, RecordingPipeline(1024))
    with pytest.raises(ValueError, match=r"fingerprint|tokenizer"):
        unclip_pictures(tiny(num_tokens=5), tokens, pipeline)


def test_a_folder_without_diffusers_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    tok = tiny()
    with pytest.raises(ImportError, match=r"mmtok\[generative\]"):
        unclip_pictures(tok, tok.encode(pictures(1)), tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_a_real_pipeline_of_random_weights(tmp_path: Path):
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    text = transformers.CLIPTextConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=16, image_size=32
    )
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "!": 2, "a</w>": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision).eval(),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=16),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=transformers.CLIPTokenizer(
            str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=9
        ),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            class_embed_type="projection",
            projection_class_embeddings_input_dim=32,
        ).eval(),
        scheduler=diffusers.DDIMScheduler(),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "pipeline")
    tok = tiny()
    tokens = tok.encode(pictures(2))
    first, again = (
        unclip_pictures(tok, tokens, p, torch.Generator().manual_seed(3), steps=2)
        for p in (pipeline, tmp_path / "pipeline")
    )
    assert first.shape == (2, 3, 16, 16) and 0 <= float(first.min()) <= float(first.max()) <= 1
    torch.testing.assert_close(first, again)
    other = tok.encode(1 - pictures(2))
    assert not torch.allclose(unclip_pictures(tok, other, pipeline, torch.Generator().manual_seed(3), steps=2), first)
