"""The judges of pictures: values against formulas written out here, their order on a photograph, their refusals."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mmtok.bench.image_scorers import (
    EfficientNetDistance,
    FeatureDistance,
    ImageSignal,
    SemanticSimilarity,
    ShiftTolerantLpips,
    kernel_distance,
    weights_digest,
)
from mmtok.bench.records import Item
from mmtok.bench.scorers import NotRunError, Scorer, SetScorer, UnscoredError, open_scorer
from mmtok.layers import shipped
from mmtok.losses.perceptual import PerceptualLoss

ROOT = Path(__file__).parents[2]
HELPERS = ROOT / "data" / "helpers"
FD = ["fd[efficientnet-lite0]", "kid[efficientnet-lite0]", "fd_floor[efficientnet-lite0]"]
needs_stlpips = pytest.mark.skipif(not (HELPERS / "stlpips").is_dir(), reason="no data/helpers/stlpips")
needs_nsfwjs = pytest.mark.skipif(not (HELPERS / "nsfwjs").is_dir(), reason="no data/helpers/nsfwjs")


def random_picture(seed: int, height: int = 180, width: int = 190) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, height, width))).float() / 255


@pytest.fixture(scope="module")
def cat() -> Tensor:
    pixels = np.asarray(Image.open(ROOT / "mmtok/assets/chelsea.jpg").convert("RGB"))[20:212, 100:292]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255  # (3, 192, 192)


def gaussian(sigma: float, radius: int) -> Tensor:
    line = torch.exp(-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
    return line / line.sum()


def filtered(x: Tensor, line: Tensor) -> Tensor:
    """(1,C,H,W) with a separable filter, where it lies inside."""
    C, taps = x.shape[1], line.to(x.dtype)
    x = F.conv2d(x, taps.view(1, 1, -1, 1).expand(C, 1, -1, 1), groups=C)
    return F.conv2d(x, taps.view(1, 1, 1, -1).expand(C, 1, 1, -1), groups=C)


def blurred(x: Tensor, sigma: float) -> Tensor:
    radius = round(3 * sigma)
    return filtered(F.pad(x[None], (radius,) * 4, mode="reflect"), gaussian(sigma, radius))[0].clamp(0, 1)


def noisy(x: Tensor, sigma: float) -> Tensor:
    return (x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def jpeg(x: Tensor, quality: int) -> Tensor:
    out = io.BytesIO()
    Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(out, "JPEG", quality=quality)
    return torch.from_numpy(np.asarray(Image.open(out)).copy()).permute(2, 0, 1).float() / 255


WORSE = {
    "blur": [lambda x, s=s: blurred(x, s) for s in (1, 2, 4, 8)],
    "noise": [lambda x, s=s: noisy(x, s) for s in (0.02, 0.1, 0.3, 0.8)],
    "jpeg": [lambda x, q=q: jpeg(x, q) for q in (90, 50, 10, 1)],
}


def falls(scorer: Scorer, measure: str, x: Tensor, kind: str) -> list[float]:
    """The values of the picture itself and of four versions, each worse than the one before."""
    versions = [x, *(damage(x) for damage in WORSE[kind])]
    values = [scorer.scores(Item("cat", x), v)[measure] for v in versions]
    assert all(isinstance(v, float) for v in values)
    return values  # type: ignore[return-value]


# ---- signal ----


def ssim_terms(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(SSIM, contrast-structure) of Wang et al. 2004 on (1,3,H,W) float64.

    Means over windows with reflected edges, and over those inside the picture: that is what torchmetrics takes.
    """
    line = gaussian(1.5, 5)
    a, b = (F.pad(x, (5, 5, 5, 5), mode="reflect") for x in (a, b))
    ma, mb = filtered(a, line), filtered(b, line)
    va, vb = filtered(a * a, line) - ma**2, filtered(b * b, line) - mb**2
    cov = filtered(a * b, line) - ma * mb
    structure = (2 * cov + 0.03**2) / (va + vb + 0.03**2)
    light = (2 * ma * mb + 0.01**2) / (ma**2 + mb**2 + 0.01**2)
    return float((light * structure).mean()), float(structure[..., 5:-5, 5:-5].mean())


def test_signal_equals_the_formulas(cat: Tensor):
    cat, x_hat = cat[:, :180], jpeg(cat, 20)[:, :180]
    found = ImageSignal().scores(Item("a", cat), x_hat)
    a, b = cat[None].double(), x_hat[None].double()
    assert found["psnr"] == pytest.approx(-10 * math.log10(float((a - b).square().mean())), abs=1e-4)
    assert found["ssim"] == pytest.approx(ssim_terms(a, b)[0], abs=1e-4)
    expected = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):  # Wang et al. 2003
        whole, structure = ssim_terms(a, b)
        expected *= (whole if scale == 4 else structure) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    assert found["ms_ssim"] == pytest.approx(expected, abs=1e-4)


def test_signal_equals_other_entry_points_of_torchmetrics(cat: Tensor):
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    x_hat = noisy(cat, 0.1)
    found = ImageSignal().scores(Item("a", cat), x_hat)
    for name, other in (
        ("psnr", PeakSignalNoiseRatio(data_range=1.0)),
        ("ssim", StructuralSimilarityIndexMeasure(data_range=1.0)),
    ):
        assert found[name] == pytest.approx(float(other(x_hat[None], cat[None])), rel=1e-5)


def test_equal_pictures(cat: Tensor):
    assert ImageSignal().scores(Item("a", cat), cat) == {"psnr": math.inf, "ssim": 1.0, "ms_ssim": 1.0}


@pytest.mark.parametrize(
    ("height", "width", "missing"),
    [(176, 176, []), (175, 300, ["ms_ssim"]), (11, 11, ["ms_ssim"]), (300, 10, ["ssim", "ms_ssim"])],
)
def test_small_pictures_are_counted_and_never_defaulted(height: int, width: int, missing: list[str]):
    x = random_picture(0, height, width)
    found = ImageSignal().scores(Item("a", x), x.flip(1))
    assert [name for name, v in found.items() if isinstance(v, UnscoredError)] == missing
    for name in missing:
        assert f"{height} x {width}" in str(found[name]) and ("176" if name == "ms_ssim" else "11") in str(found[name])


def test_the_target_is_what_is_compared(cat: Tensor):
    item = Item("a", random_picture(1, 30, 30), target=cat)
    assert ImageSignal().scores(item, cat)["psnr"] == math.inf


# ---- networks ----


class Maps(nn.Module):
    """Two feature maps that a test can compute too."""

    def forward(self, x: Tensor) -> list[Tensor]:
        if min(x.shape[-2:]) < 8:
            raise ValueError(f"x: expected at least 8 x 8 pixels, got {x.shape[-2]} x {x.shape[-1]}")
        return [x, F.avg_pool2d(x, 2)[:, :2]]


def test_lpips_is_the_weighted_distance_of_unit_features():
    weights = [torch.tensor([0.2, 0.5, 1.0]), torch.tensor([2.0, 0.1])]
    loss = PerceptualLoss(Maps(), weights)
    scorer = ShiftTolerantLpips({"d": (loss.distance, "Maps")}, "1")
    a, b = random_picture(0, 12, 14), random_picture(1, 12, 14)
    expected = 0.0
    for f, g, w in zip(Maps()(a[None]), Maps()(b[None]), weights, strict=True):
        f, g = f / f.norm(dim=1, keepdim=True), g / g.norm(dim=1, keepdim=True)
        expected += float(((f - g) ** 2 * w[:, None, None]).sum(1).mean())
    assert scorer.scores(Item("a", a), b)["d"] == pytest.approx(expected, rel=1e-5)
    assert scorer.scores(Item("a", a), a)["d"] == 0.0
    small = scorer.scores(Item("a", a[:, :7]), b[:, :7])["d"]
    assert isinstance(small, UnscoredError) and "7 x 14" in str(small)


@needs_stlpips
def test_st_lpips_grows_with_what_is_lost_and_forgives_a_shift(cat: Tensor):
    scorer = open_scorer("lpips", HELPERS)
    assert isinstance(scorer, Scorer)
    x = cat[:, :64, :64]
    assert all("no LPIPS of other papers" in m.about for m in scorer.measures)
    for kind in ("blur", "jpeg"):
        values = falls(scorer, "st_lpips_alex", x, kind)
        assert values[0] == 0.0 and values == sorted(values) and len(set(values)) == 5
    shifted = scorer.scores(Item("a", cat[:, 2:66, 2:66]), x)
    blurry = scorer.scores(Item("a", x), blurred(x, 1))
    for name in ("st_lpips_alex", "st_lpips_vgg"):
        assert 0 < float(shifted[name]) < 0.25 * float(blurry[name])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def semantic() -> SemanticSimilarity:
    scorer = open_scorer("image_semantic")
    assert isinstance(scorer, SemanticSimilarity)
    return scorer


@pytest.mark.parametrize("kind", sorted(WORSE))
def test_semantic_similarity_is_1_and_falls_with_what_is_lost(semantic: SemanticSimilarity, cat: Tensor, kind: str):
    values = falls(semantic, "semantic_similarity", cat, kind)
    assert values[0] == pytest.approx(1.0, abs=1e-6)
    assert all(b < a - 1e-3 for a, b in itertools.pairwise(values)), values
    assert values[-1] < 0.7


def test_semantic_similarity_sees_the_subject_and_is_a_cosine(semantic: SemanticSimilarity, cat: Tensor):
    from mmtok.layers.vision import build_vision

    found = semantic.scores(Item("a", cat), cat.flip(2))
    assert found == semantic.scores(Item("b", cat), cat.flip(2))  # the same again, to the last bit
    embed = build_vision({"type": "efficientnet_lite0"}).embed
    expected = F.cosine_similarity(embed(cat[None]), embed(cat.flip(2)[None]))
    assert found["semantic_similarity"] == pytest.approx(float(expected), abs=1e-6)
    assert float(expected) > 0.95  # a mirrored cat
    assert float(semantic.scores(Item("a", cat), random_picture(0, 192, 192))["semantic_similarity"]) < 0.5  # type: ignore[arg-type]


def test_features_without_direction_have_no_similarity(cat: Tensor):
    scorer = SemanticSimilarity(lambda x: torch.zeros(1, 4), "zeros", "1", {})
    assert isinstance(scorer.scores(Item("a", cat), cat)["semantic_similarity"], UnscoredError)


# ---- sets ----


def naive_kernel_distance(a: np.ndarray, b: np.ndarray, paired: bool) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    own = [mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    across = [k(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i != j or not paired]
    return own[0] + own[1] - 2 * mean(across)


@pytest.mark.parametrize("items", [7, 11])
def test_kernel_distance_equals_a_double_loop(items: int):
    rng = np.random.default_rng(items)
    a, b = rng.normal(size=(7, 5)), rng.normal(0.4, 1.3, size=(items, 5))
    found = kernel_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(naive_kernel_distance(a, b, paired=items == 7), abs=1e-10)


def test_kernel_distance_and_the_library_differ_by_the_pairs_alone():
    from torchmetrics.image.kid import poly_mmd

    rng = np.random.default_rng(0)
    a, b = torch.from_numpy(rng.normal(size=(20, 6))), torch.from_numpy(rng.normal(0.5, 1, size=(20, 6)))
    k = (a @ b.T / 6 + 1) ** 3
    strangers = float((k.sum() - k.trace()) / (20 * 19))
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)) + 2 * (float(k.mean()) - strangers), abs=1e-10)
    assert kernel_distance(a, a) == pytest.approx(0.0, abs=1e-10)
    assert float(poly_mmd(a, a)) < -0.1  # why pairs are left out: a perfect copy would look better than perfect


def test_kernel_distance_has_no_bias():
    """Its mean over many small draws is the distance in the limit; that of Frechet distances is far above 0."""
    rng = np.random.default_rng(0)
    draws = [[torch.from_numpy(rng.normal(size=(n, 3))) for n in (5, 5, 8)] for _ in range(300)]
    for other in (1, 2):
        values = np.array([kernel_distance(d[0], d[other]) for d in draws])
        assert abs(values.mean()) < 4 * values.std() / len(values) ** 0.5


@pytest.mark.parametrize(
    ("a", "b", "match"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), "at least 2 items"),
        (torch.zeros(4, 3), torch.zeros(4, 2), "one width"),
        (torch.zeros(4, 3), torch.full((4, 3), math.nan), "finite"),
        (torch.zeros(4), torch.zeros(4, 3), r"\(N,D\)"),
    ],
)
def test_kernel_distance_refuses_other_features(a: Tensor, b: Tensor, match: str):
    with pytest.raises(ValueError, match=match):
        kernel_distance(a, b)


def tiny_distance() -> FeatureDistance:
    """Features are six pixels."""
    return EfficientNetDistance(lambda x: x[:, :, 0, :2].reshape(1, -1), "efficientnet-lite0", "1", {})


def test_frechet_distance_of_a_set_equals_the_matrix_root():
    import scipy.linalg

    scorer = tiny_distance()
    assert [m.name for m in scorer.measures] == FD
    sets = [
        torch.cat([scorer.features(random_picture(s, 4, 4) * scale, None) for s in range(start, start + 30)])
        for start, scale in ((0, 1.0), (100, 0.7))
    ]
    found = scorer.distance(*sets)
    (ma, sa), (mb, sb) = ((x.mean(0), np.cov(x.T)) for x in (s.double().numpy() for s in sets))
    root = scipy.linalg.sqrtm(sa @ sb).real
    expected = float(((ma - mb) ** 2).sum() + np.trace(sa + sb - 2 * root))
    assert found[FD[0]] == pytest.approx(expected, rel=1e-5)
    assert found[FD[1]] == pytest.approx(kernel_distance(*sets))
    assert 0 < found[FD[2]] < found[FD[0]]
    assert scorer.distance(sets[0], sets[0])[FD[0]] == pytest.approx(0.0, abs=1e-6)


def test_few_items_have_no_distance():
    with pytest.raises(UnscoredError, match="at least 4 items, got 3"):
        tiny_distance().distance(torch.rand(4, 6), torch.rand(3, 6))


def test_shipped_features_rank_what_is_lost(cat: Tensor):
    scorer = open_scorer("fd_efficientnet")
    assert isinstance(scorer, SetScorer)
    crops = [cat[:, y : y + 64, x : x + 64] for y in range(0, 129, 64) for x in range(0, 129, 64)]
    reference = torch.cat([scorer.features(c, None) for c in crops])
    assert reference.shape == (9, 320) and reference.dtype == torch.float32
    assert torch.equal(reference, torch.cat([scorer.features(c, None) for c in crops]))
    worse = []
    for sigma in (1, 4):
        features = torch.cat([scorer.features(blurred(c, sigma), None) for c in crops])
        worse.append(scorer.distance(reference, features))
    for name in FD[:2]:
        assert 0 < worse[0][name] < worse[1][name]


@needs_nsfwjs
def test_inception_features_are_those_of_its_own_module(cat: Tensor):
    from mmtok.bench.inception import load_inception

    scorer = open_scorer("fd_inception", HELPERS)
    assert isinstance(scorer, SetScorer)
    assert [m.name for m in scorer.measures] == [f"{n}[nsfwjs-inceptionv3]" for n in ("fd", "kid", "fd_floor")]
    network = load_inception(HELPERS / "nsfwjs")
    assert scorer.version == f"weights {weights_digest(network)}"
    found = scorer.features(cat, None)
    assert found.shape == (1, 2048) and torch.equal(found, network(cat[None]))
    nearer, farther = ((scorer.features(v, None) - found).norm() for v in (jpeg(cat, 50), jpeg(cat, 5)))
    assert 0 < nearer < farther


# ---- refusals ----


@pytest.mark.parametrize("name", ["image_signal", "image_semantic"])
@pytest.mark.parametrize(
    ("x_hat", "match"),
    [
        (torch.zeros(3, 20, 21), r"expected the reference's shape \(3, 20, 20\)"),
        (torch.zeros(1, 20, 20), "repeat a grey channel"),
        (torch.zeros(3, 20, 20, dtype=torch.uint8), "divide uint8 by 255"),
        (torch.full((3, 20, 20), 1.5), "clamp"),
        (torch.full((3, 20, 20), math.nan), "finite"),
        (torch.zeros(2, 16000), "float picture"),
    ],
)
def test_wrong_pictures_are_one_clear_error(name: str, x_hat: Tensor, match: str, semantic: SemanticSimilarity):
    scorer = semantic if name == "image_semantic" else ImageSignal()
    with pytest.raises(ValueError, match=match) as e:
        scorer.scores(Item("pictures/a.png", torch.zeros(3, 20, 20)), x_hat)
    assert "pictures/a.png" in str(e.value) and not isinstance(e.value, UnscoredError)


def test_wrong_pictures_have_no_features():
    with pytest.raises(ValueError, match="float picture"):
        tiny_distance().features(torch.zeros(1, 100), 16000)


@pytest.mark.parametrize("place", ["none", "empty", "damaged"])
def test_missing_networks_say_what_fetches_them(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as where stlpips-pytorch is not installed
    if place == "damaged":
        for file in ("stlpips/weights/vST0.0/alex_shift_tolerant.pth", "nsfwjs/model.min.js"):
            (tmp_path / file).parent.mkdir(parents=True)
            (tmp_path / file).write_text("no network")
    for name, package in (("lpips", "stlpips-pytorch"), ("fd_inception", "nsfwjs")):
        with pytest.raises(NotRunError, match=r"python recipes/fetch_data\.py --out data --helpers") as e:
            open_scorer(name, None if place == "none" else tmp_path)
        assert package in str(e.value)


@pytest.mark.parametrize("name", ["image_semantic", "fd_efficientnet"])
def test_missing_shipped_weights_are_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shipped, "shipped_file", lambda file: tmp_path / file)
    with pytest.raises(NotRunError, match="reinstall mmtok"):
        open_scorer(name)


def test_the_digest_names_the_weights():
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    b.load_state_dict(a.state_dict())
    assert weights_digest(a) == weights_digest(b)
    with torch.no_grad():
        b.bias[0] += 1
    assert weights_digest(a) != weights_digest(b) and weights_digest(a).startswith("sha256:")
