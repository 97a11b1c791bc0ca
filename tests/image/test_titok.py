"""TiTok and TA-TiTok: two stages over a frozen teacher, text in the decoder, any size, any prefix, published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published_autoencoders import maskgit_shapes
from torch import Tensor
from torch.nn import functional as F

from mmtok.image import titok
from mmtok.image.raster2d import Raster2D
from mmtok.image.titok import TiTok
from mmtok.layers.text import TextFeatures

TEACHER: dict[str, Any] = {
    "width": 8,
    "multipliers": [1, 1, 2],
    "blocks": 1,
    "middle_attention": False,
    "patch": 1,
    "style": "maskgit",
    "pixels": "unit",
    "quantizer": {"type": "vq", "dim": 6, "codebook_size": 10, "kmeans_init": False},
    "image_size": 16,
}
TINY: dict[str, Any] = {
    "num_tokens": 5,
    "token_size": 4,
    "patch_size": 4,
    "encoder": (16, 2, 2),
    "decoder": (24, 2, 3),
    "image_size": 16,
    "quantizer": {"type": "vq", "codebook_size": 32, "metric": "cosine", "codebook": "gradient", "kmeans_init": False},
}
TEXT = {"type": "clip", "source": "a-folder", "dim": 6, "max_tokens": 5}
KINDS: dict[str, dict[str, Any]] = {
    "rgb": {},
    "text": {"text_encoder": TEXT, "unit_latents": False},
    "stage 1": {"teacher": TEACHER},
    "stage 2": {"teacher": TEACHER, "stage": 2, "legacy_reshape": True},
}


def build(seed: int = 0, **changes: Any) -> TiTok:
    torch.manual_seed(seed)
    return TiTok(**{**TINY, **changes}).eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def captions(batch: int, length: int = 5, seed: int = 2) -> TextFeatures:
    states = torch.randn(batch, length, 6, generator=torch.Generator().manual_seed(seed))
    return TextFeatures(states, torch.arange(length).expand(batch, -1) < 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (1, 1), (7, 16), (40, 9)])
def test_any_size_comes_back_exactly(kind: str, size: tuple[int, int]):
    tok, x = build(**KINDS[kind]), noise(2, 3, *size)
    tokens = tok.encode(x)
    y = tok.decode(tokens)
    assert tokens.codes.shape == (2, 1, 5) and not isinstance(y, list) and y.shape == x.shape
    assert size == (1, 1) or float(y.std()) > 1e-4
    assert tok.train()(x).x_hat.shape == x.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_decodes_as_with_the_other_tokens_masked(kind: str):
    tok, x = build(**KINDS[kind]), noise(2, 3, 16, 16)
    tokens = tok.encode(x)
    for k in range(1, 6):
        y = tok.decode(tokens.keep(num_tokens=k))
        mask = (torch.arange(5) < k).expand(2, -1)
        assert isinstance(y, Tensor) and torch.allclose(y, tok(x, mask).x_hat.clamp(0, 1), atol=1e-5)


def test_latents_have_length_one_where_asked_for():
    x = noise(2, 3, 16, 16)
    assert torch.allclose(build().latent(x).norm(dim=-1), torch.ones(2, 5))
    free = build(unit_latents=False).latent(x).detach()
    assert torch.allclose(F.normalize(free, dim=-1), build().latent(x), atol=1e-6)
    assert float(free.norm(dim=-1).std()) > 0


def test_the_legacy_reshape_reads_rows_as_columns():
    """By hand from the encoder's own last layer: (N, width) is read as (width, N) without transposing."""
    plain, legacy, x = build(), build(legacy_reshape=True), noise(2, 3, 16, 16)
    seen: list[Tensor] = []
    hook = plain.encoder.vit.register_forward_hook(lambda m, i, y: seen.append(y))
    right, wrong = plain.encoder(x), legacy.encoder(x)
    hook.remove()
    y = seen[0]  # (2, 5, 16)
    numbers = y.reshape(2, -1)  # a latent after the other
    for n in range(5):
        column = torch.stack([numbers[:, c * 5 + n] for c in range(16)], 1)
        assert torch.allclose(wrong[:, n], plain.encoder.out(column), atol=1e-6)
        assert torch.allclose(right[:, n], plain.encoder.out(y[:, n]), atol=1e-6)
    assert not torch.allclose(right, wrong, atol=1e-2)


def test_the_text_is_read_by_the_decoder_only():
    tok, x = build(**KINDS["text"]), noise(2, 3, 16, 16)
    one, other = captions(2), captions(2, seed=9)
    tokens = tok.encode(x, text=one)
    assert tok.spec.conditions == ("text",) and torch.equal(tokens.codes, tok.encode(x, text=other).codes)
    a, b, bare = tok.decode(tokens, text=one), tok.decode(tokens, text=other), tok.decode(tokens)
    assert isinstance(a, Tensor) and isinstance(b, Tensor) and isinstance(bare, Tensor)
    assert not torch.allclose(a, b, atol=1e-4) and not torch.allclose(a, bare, atol=1e-4)
    out = tok(x, text=one.states, text_mask=one.mask)
    assert torch.allclose(out.x_hat.clamp(0, 1), a, atol=1e-5)
    with pytest.raises(ValueError, match="takes no text"):
        build().encode(x, text=one)


def test_padding_of_the_text_changes_nothing():
    tok, x, long = build(**KINDS["text"]), noise(2, 3, 16, 16), captions(2)
    want = tok(x, text=long.states, text_mask=long.mask).x_hat
    short = tok(x, text=long.states[:, :3]).x_hat
    dirty = tok(x, text=torch.where(long.mask[..., None], long.states, 1e4), text_mask=long.mask).x_hat
    assert torch.allclose(short, want, atol=1e-5) and torch.allclose(dirty, want, atol=1e-5)
    assert not torch.allclose(tok(x, text=long.states).x_hat, want, atol=1e-4)  # as the released ones read padding


def test_captions_are_dropped_in_training_only():
    tok, x, given = build(**KINDS["text"], text_drop=1.0), noise(2, 3, 16, 16), captions(2)
    with_text, without = tok(x, text=given.states).x_hat, tok(x).x_hat
    assert not torch.allclose(with_text, without, atol=1e-4)
    assert torch.allclose(tok.train()(x, text=given.states).x_hat, without, atol=1e-5)


def test_stage_1_predicts_the_teachers_codes():
    tok, x = build(teacher=TEACHER).train(), noise(2, 3, 13, 16)
    teacher = Raster2D(**TEACHER)
    torch.manual_seed(7)
    for p in teacher.parameters():
        p.data.normal_(std=0.3)
    with torch.no_grad():
        rows = teacher.latent(noise(1, 3, 16, 16, seed=4))[0]
        book = teacher.quantizer.state_dict()["book.codebook"]  # shares its memory
        book.copy_(rows[:10])
    assert tok.teacher is not None
    tok.teacher.adopt(teacher)
    codes = teacher.eval().encode(x).codes[:, 0]  # (2, 16)
    assert len(codes.unique()) > 3
    logits: list[Tensor] = []
    hook = tok.head.register_forward_hook(lambda m, i, y: logits.append(y))
    out = tok(x)
    hook.remove()
    by_hand = -logits[0].log_softmax(-1).gather(2, codes[..., None]).mean()
    assert torch.allclose(out.aux["proxy_loss"], by_hand, atol=1e-6)
    assert not out.x_hat.requires_grad and out.x_hat.shape == x.shape
    (out.aux["proxy_loss"] + out.quantized.loss).backward()
    learning = {n for n, p in tok.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
    assert learning == {n for n, _ in tok.named_parameters() if not n.startswith("teacher.")}
    assert not any(m.training for m in tok.teacher.modules())
    certain = F.one_hot(codes, 10) * 1e4  # a sure prediction decodes as the teacher itself
    decoded = teacher.decode(teacher.encode(x))
    assert isinstance(decoded, Tensor)
    assert torch.allclose(tok.pixels(certain, 16, 16)[:, :, :13].clamp(0, 1), decoded, atol=1e-5)


def test_stage_2_tunes_the_decoders_on_pixels():
    tok, x = build(teacher=TEACHER, quantizer={"type": "vq", "codebook_size": 8}).train(), noise(2, 3, 16, 16)
    tok(x)  # a codebook of moving averages has started
    codes, before_stage = tok.eval().encode(x).codes, len(tok.state_dict())
    tok.train().start_stage2()
    assert tok.stage == 2 and len(tok.state_dict()) < before_stage and not tok.encoder.training
    before = {k: v.clone() for k, v in tok.state_dict().items()}
    learning = {n for n, p in tok.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in tok.named_parameters() if n.startswith(("decoder.", "head.", "teacher."))}
    optimizer = torch.optim.AdamW([p for p in tok.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(20):
        out = tok.train()(x)
        assert out.aux == {} and float(out.quantized.loss) == 0
        loss = (out.x_hat - x).square().mean() + out.quantized.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    after = tok.state_dict()
    assert {k for k in before if not torch.equal(before[k], after[k])} == learning
    assert losses[-1] < 0.9 * losses[0] and torch.equal(tok.encode(x).codes, codes)


def test_the_second_stage_is_what_a_checkpoint_of_it_rebuilds(tmp_path: Any):
    from mmtok import auto

    tok, x = build(teacher=TEACHER), noise(2, 3, 16, 16)
    first = dict(tok.config)
    tok.start_stage2()
    tok.save(tmp_path)
    again = auto.load(tmp_path)
    assert isinstance(again, TiTok) and again.stage == 2 and again.config == {**first, "stage": 2}
    a, b = tok.decode(tok.encode(x)), again.decode(again.encode(x))
    assert isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def test_wrong_stages_and_teachers_are_refused():
    tok = build(teacher=TEACHER)
    assert tok.teacher is not None
    with pytest.raises(ValueError, match="teacher: expected a Raster2D of config"):
        tok.teacher.adopt(Raster2D(**{**TEACHER, "blocks": 2}))
    tok.start_stage2()
    for call in (lambda: tok.teacher.adopt(Raster2D(**TEACHER)), lambda: tok.teacher.codes(noise(1, 3, 16, 16))):  # pyright: ignore[reportOptionalMemberAccess]
        with pytest.raises(ValueError, match="expected stage 1, got stage 2"):
            call()
    for other in (tok, build()):
        with pytest.raises(ValueError, match="start_stage2: expected a teacher and stage 1"):
            other.start_stage2()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 2}, "stage: expected 1, or 2 with a teacher, got 2"),
        ({"patch_size": 8, "teacher": TEACHER}, r"expected cells of 8 px \(patch_size\), got 4"),
        (
            {"teacher": {**TEACHER, "quantizer": {"type": "rvq", "dim": 6, "num_codebooks": 2, "codebook_size": 8}}},
            "one",
        ),
        ({"image_size": 18}, "expected a multiple of patch_size 4, got 18"),
        ({"text_drop": -1.0}, r"text_drop: expected a share in 0\.\.1"),
        ({"tail_drop": "half"}, "tail_drop: expected one of"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("kind", ["rgb", "text"])
def test_the_gradient_reaches_every_parameter(kind: str):
    tok, x = build(**KINDS[kind], text_drop=0.0).train(), noise(3, 3, 16, 16)
    lengths = torch.tensor([5, 3, 0])  # every text position is used, and the null token by the last item
    mask = torch.arange(5) < lengths[:, None]
    out = tok(x, text=captions(3).states, text_mask=mask)
    ((out.x_hat - x).square().mean() + out.quantized.loss).backward()
    silent = [n for n, p in tok.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert silent == []


def test_it_learns():
    tok = build().train()
    x = torch.stack([F.interpolate(noise(1, 3, 2, 2, seed=i), 16)[0] for i in range(8)])
    optimizer = torch.optim.AdamW(tok.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        out = tok(x)
        loss = (out.x_hat - x).square().mean() + out.quantized.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_tail_drop_masks_tokens_in_training_only():
    tok, x = build(tail_drop="powers"), noise(64, 3, 16, 16)
    assert bool((tok(x).quantized.z_q != 0).any(-1).all())
    torch.manual_seed(0)
    kept = (tok.train()(x).quantized.z_q != 0).any(-1)  # (B, T)
    assert bool((kept[:, :-1] | ~kept[:, 1:]).all()) and {int(n) for n in kept.sum(1)} == {1, 2, 4, 5}


def stack_size(width: int, depth: int) -> int:
    """Blocks of 12 w^2 + 13 w, class token, 257 positions, two LayerNorms."""
    return depth * (12 * width**2 + 13 * width) + width + 257 * width + 4 * width


@pytest.mark.parametrize(
    "name", ["TITOK_S128", "TITOK_B64", "TITOK_L32", "TATITOK_BL32", "TATITOK_BL64", "TATITOK_BL128"]
)
def test_the_published_sizes(name: str):
    config = getattr(titok, name)
    with torch.device("meta"):
        tok = TiTok(**config)
    (we, de, _), (wd, dd, _), N = config["encoder"], config["decoder"], config["num_tokens"]
    K, t = config["quantizer"]["codebook_size"], config["token_size"]
    want = stack_size(we, de) + 768 * we + we + 2 * N * we + we * t + t
    want += stack_size(wd, dd) + t * wd + wd + wd + N * wd + K * t
    if "text_encoder" in config:
        want += 768 * wd + wd + 77 * wd + wd  # Linear, positions, and our null token
        want += wd * 768 + 768 + 84
    else:
        want += wd * 2 * wd + 2 * wd + 2 * wd * 1024 + 1024 + 1024 * 256
        want += sum(torch.Size(s).numel() for n, s in maskgit_shapes().items() if n.startswith("decoder."))
    found = sum(p.numel() for p in tok.parameters())
    assert found == want
    if name == "TITOK_L32":
        assert round(found / 1e6) == 641  # the count of the facts, with MaskGIT's decoder
    assert tok.base_spec().num_tokens == N and tok.base_spec().codebook_sizes == (K,)
