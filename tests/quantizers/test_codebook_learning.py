from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmtok.kernels.dispatch import force
from mmtok.kernels.nearest_code import nearest_code
from mmtok.quantizers import VectorQuantizer
from mmtok.quantizers.codebook import Codebook, draw_rows, kmeans

K, D = 64, 8


def mixture(generator: torch.Generator, n: int = 256) -> torch.Tensor:
    """n vectors around 100 far-apart centres, centre i chosen with probability ~ 1 / (i + 1), all offset by 10."""
    centres = 10 + 3 * torch.randn(100, D, generator=torch.Generator().manual_seed(0))
    choice = torch.multinomial(1 / torch.arange(1.0, 101), n, replacement=True, generator=generator)
    return centres[choice] + 0.3 * torch.randn(n, D, generator=generator)


def train(threshold: float, learning: str, steps: int = 150) -> tuple[VectorQuantizer, int, torch.Tensor]:
    """The quantizer, how many codes the last 50 steps revived, and its mean squared error on fresh data."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(
        D, K, codebook=learning, kmeans_init=False, dead_code_threshold=threshold, decay=0.95, commitment_weight=0.0
    )
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=20.0) if learning == "gradient" else None
    g, revived = torch.Generator().manual_seed(1), 0
    for step in range(steps):
        z = mixture(g)[None]
        loss = quantizer(z).loss
        if step >= steps - 50:
            same = (quantizer.book.codebook[:, None] == z).all(2).any(1)  # rows that are a vector of this very batch
            revived += int(same.sum())
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    quantizer.eval()
    z = mixture(g, 4000)[None]
    return quantizer, revived, (quantizer.decode(quantizer.encode(z)) - z).square().mean().detach()


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_dead_codes_revive_and_stay_alive(learning):
    alive, revived, error = train(0.1, learning)
    dead, none, error_without = train(0.0, learning)
    z = mixture(torch.Generator().manual_seed(5), 4000)[None]
    healthy, sick = alive(z).stats, dead(z).stats
    assert float(healthy["usage"]) > 0.9
    assert float(sick["usage"]) < 0.3  # a random start far from the data: few codes ever win
    assert (
        float(healthy["perplexity"]) > 0.4 * K
    )  # of at most K; the mixture is skewed, a few centres have most vectors
    assert float(sick["perplexity"]) < 0.2 * K
    assert float(healthy["dead_share"]) < 0.2 < 0.7 < float(sick["dead_share"])
    assert none == 0
    assert revived < 0.02 * 50 * K  # they stay: under 2 % of the codes are replaced in a step
    assert float(error) < 0.5 * float(error_without)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_a_revived_code_survives_updates_in_which_it_wins_nothing(learning):
    """Replacing the codebook row but not the moving averages would bring the dead code back in the next update."""
    torch.manual_seed(0)
    book = Codebook(4, 2, learning=learning, kmeans_init=False, decay=0.9)
    with torch.no_grad():
        book.codebook.copy_(torch.tensor([[0.0, 0], [1, 0], [0, 1], [500, 500]]))
    z = torch.cat([torch.randn(30, 2) * 0.1 + centre for centre in book.codebook[:3]])
    for _ in range(60):
        book.update(z, book.nearest(z), torch.ones(90, dtype=torch.bool))
    revived = book.codebook[3].detach().clone()
    assert float(revived.norm()) < 3 and float(book.cluster_size[3]) > 0.1 * float(book.cluster_size.mean())
    elsewhere = torch.full((90,), 0)  # a batch in which code 3 wins nothing
    book.update(z, elsewhere, torch.ones(90, dtype=torch.bool))
    torch.testing.assert_close(book.codebook[3].detach(), revived)


@pytest.mark.parametrize("repeat", [1, 8])
def test_threshold_is_relative_to_frames_per_step(repeat):
    """The same vectors given once or eight times: the same codes are dead, and restart at the mean use."""
    torch.manual_seed(0)
    z = torch.randn(40, D).repeat(repeat, 1)
    book = Codebook(K, D, kmeans_init=False, dead_code_threshold=0.3, decay=0.99)
    before, codes = book.codebook.clone(), book.nearest(z)
    book.update(z, codes, torch.ones(len(z), dtype=torch.bool))
    counts = torch.bincount(codes, minlength=K).float()
    dead = counts < 0.3 * len(z) / K
    assert 10 < int(dead.sum()) < K - 10
    torch.testing.assert_close(book.cluster_size, 0.01 * torch.where(dead, len(z) / K, counts))
    assert bool((book.codebook[dead] != before[dead]).all())
    distance = torch.cdist(book.codebook[dead], z).min(1).values
    assert float(distance.max()) < 0.1  # each is a vector of the batch, or a repeat with a small jitter


def test_moving_averages_follow_the_equation():
    torch.manual_seed(0)
    book = Codebook(3, 2, kmeans_init=False, decay=0.8, dead_code_threshold=0.0)
    start = book.codebook.clone()
    size, total = torch.zeros(3), torch.zeros(3, 2)
    for _ in range(4):
        z, codes = torch.randn(20, 2), torch.randint(0, 2, (20,))  # code 2 never wins
        valid = torch.rand(20) < 0.8
        book.update(z, codes, valid)
        for k in range(3):
            rows = z[(codes == k) & valid]
            size[k] = 0.8 * size[k] + 0.2 * len(rows)
            total[k] = 0.8 * total[k] + 0.2 * rows.sum(0)
    torch.testing.assert_close(book.cluster_size, size)
    torch.testing.assert_close(book.codebook[:2], total[:2] / size[:2, None])
    assert torch.equal(book.codebook[2], start[2])  # an unused code keeps its value


def test_an_update_without_a_valid_vector_changes_nothing():
    quantizer = VectorQuantizer(D, K)
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    out = quantizer(torch.randn(2, 5, D), torch.zeros(2, 5, dtype=torch.bool))
    assert float(out.loss) == 0 and float(out.stats["perplexity"]) == 0
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
    assert not bool(quantizer.book.initialized)
    quantizer(torch.randn(2, 5, D))  # the next batch starts the codebook
    assert bool(quantizer.book.initialized)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_a_step_without_a_valid_vector_leaves_a_trained_codebook_bitwise(learning):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(D, K, codebook=learning, kmeans_init=False)
    z = 10 + torch.randn(2, 47, D)
    quantizer(z)  # far from the start: most codes are revived, and their sum over their size is not quite their value
    assert int((quantizer.book.codebook[:, None] == z.flatten(0, 1)).all(2).any(1).sum()) > K / 2
    quantizer.book.cluster_size[3] = 0.0  # dead, but there is nothing to revive it with
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer(torch.randn(2, 50, D), torch.zeros(2, 50, dtype=torch.bool))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def test_loading_untrained_weights_starts_the_codebook_again():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(D, K)
    fresh = {key: value.clone() for key, value in quantizer.state_dict().items()}
    z = 1000 + torch.randn(2, 200, D)  # far from any random start
    quantizer(z)
    quantizer.load_state_dict(fresh)
    assert float(quantizer(z).stats["commitment_loss"]) < 2
    assert bool(quantizer.book.initialized)


def test_evaluation_never_updates():
    quantizer = VectorQuantizer(D, K).eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer(torch.randn(2, 50, D))
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())


def error_of(rows: torch.Tensor, centroids: torch.Tensor) -> float:
    return float((rows - centroids[nearest_code(rows, centroids)]).square().sum(1).mean())


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_beats_random_rows(metric):
    torch.manual_seed(0)
    rows = mixture(torch.Generator().manual_seed(2), 1500) - 10
    centroids, counts = kmeans(rows, 32, metric)
    assert error_of(rows, centroids) < 0.8 * error_of(rows, draw_rows(rows, 32))
    assert float(counts.sum()) == pytest.approx(1500)
    assert len(nearest_code(rows, centroids, metric).unique()) >= 30


class Sizes(TorchDispatchMode):
    """Notes the largest tensor that any operator makes, and which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.names = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_never_holds_a_distance_for_each_pair(metric):
    torch.manual_seed(0)
    N, size = 16000, 512
    with Sizes() as sizes, force("torch"):
        kmeans(torch.randn(N, 2), size, metric)
    assert sizes.largest < N * size / 10


@pytest.mark.parametrize("learning", ["ema", "gradient"])
def test_a_healthy_update_waits_for_no_value(learning):
    """On an accelerator each of these operators stops the host until the device is done."""
    torch.manual_seed(0)
    book = Codebook(4, 2, learning=learning, kmeans_init=False)
    with torch.no_grad():
        book.codebook.copy_(torch.tensor([[0.0, 0], [1, 0], [0, 1], [5, 5]]))
    z = torch.cat([torch.randn(30, 2) * 0.1 + centre for centre in book.codebook])
    codes, valid = book.nearest(z), torch.ones(120, dtype=torch.bool)
    waiting = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "index", "index_put_"}
    with Sizes() as sizes:
        book.update(z, codes, valid)
    assert not sizes.names & waiting and "lerp_" in sizes.names
    book.cluster_size[3] = 0.0
    with Sizes() as sizes:
        book.update(z, torch.zeros_like(codes), valid)  # code 3 is dead: only then rows are drawn
    assert sizes.names & waiting


def test_kmeans_takes_few_and_many_vectors():
    torch.manual_seed(0)
    rows = torch.randn(3, 2)
    centroids, counts = kmeans(rows, 10, "euclidean")
    assert error_of(rows, centroids) < 1e-3 and bool(torch.isfinite(centroids).all())
    _, counts = kmeans(torch.randn(1000, 2), 2, "euclidean")  # more than 64 a code: sampled, and scaled back
    assert float(counts.sum()) == pytest.approx(1000)


def test_constructor_names_what_is_wrong():
    with pytest.raises(ValueError, match="codebook_size >= 2"):
        VectorQuantizer(4, 1)
    with pytest.raises(ValueError, match="expected metric in"):
        VectorQuantizer(4, 8, metric="dot")
    with pytest.raises(ValueError, match="share of the mean use of a code, not a count"):
        VectorQuantizer(4, 8, dead_code_threshold=2.0)
