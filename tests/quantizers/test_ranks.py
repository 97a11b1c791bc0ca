"""Two gloo processes with half a batch each learn what one process learns from the joined batch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mmtok.quantizers import Quantizer, build_quantizer
from mmtok.quantizers.sync import sum_over_ranks, world_size

DIM = 4
FAMILY = {
    "vq": {"type": "vq"},
    "rvq": {"type": "rvq", "num_codebooks": 2},
    "grouped": {"type": "grouped_rvq", "num_codebooks": 4, "num_groups": 2},
    "split": {"type": "split_rvq", "num_codebooks": 3, "inner_dim": 3},
    "strided": {"type": "strided_rvq", "level_strides": [4, 1], "codebook_dim": 2, "metric": "cosine"},
}
# Averages take the vectors of all ranks whatever each has: the second rank starts with none. A loss is a mean over its
# rank's vectors, so the mean of the ranks' gradients is that of the joined batch where the ranks have equally many.
LENGTHS = {"ema": ([25, 20, 0, 0], [25, 20, 11, 0], [9, 25, 3, 17]), "gradient": ([25, 12, 17, 20],) * 3}
STEPS = 3


def learn(batch: slice, seed: int) -> dict[str, torch.Tensor]:
    """The weights of every quantizer after three steps on items ``batch`` of each step's global batch."""
    state = {}
    for learning, lengths in LENGTHS.items():
        for name, config in FAMILY.items():
            torch.manual_seed(0)
            options = {"dim": DIM, "codebook_size": 24, "codebook": learning, "decay": 0.5, "dead_code_threshold": 0.5}
            quantizer = build_quantizer(options | config)
            torch.manual_seed(seed)  # the ranks draw differently: what k-means and revival draw must come from rank 0
            train(quantizer, batch, lengths, learning == "gradient")
            state |= {f"{learning}.{name}.{key}": value.clone() for key, value in quantizer.state_dict().items()}
    return state


def train(quantizer: Quantizer, batch: slice, lengths: tuple[list[int], ...], by_gradient: bool) -> None:
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1) if by_gradient else None
    for step in range(STEPS):
        z = torch.randn(4, 25, DIM, generator=torch.Generator().manual_seed(step))
        mask = torch.arange(25) < torch.tensor(lengths[step])[:, None]
        out = quantizer(z[batch], mask[batch])
        if optimizer is not None:
            optimizer.zero_grad()
            error = torch.where(mask[batch][..., None], out.z_q - z[batch], 0.0).square().sum() / mask[batch].sum()
            (out.loss + error).backward()
            for parameter in quantizer.parameters():  # what DistributedDataParallel does
                assert parameter.grad is not None
                parameter.grad.copy_(sum_over_ranks(parameter.grad.clone()) / world_size())
            optimizer.step()


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Ranks that disagree on what is dead would wait for each other for ever: fail instead.
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", timeout=patience, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        save_file(learn(slice(2 * rank, 2 * rank + 2), seed=5 + rank), f"{folder}/{rank}.safetensors")
        dist.barrier()  # gloo may abort where one rank takes the group down while the other still uses it
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    first, second = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    joined = learn(slice(0, 4), seed=5)
    assert joined.keys() == first.keys() == second.keys()
    assert {key.split(".")[1] for key in joined} == set(FAMILY)
    for key, value in joined.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, atol=2e-5, rtol=2e-5, msg=key)
        if key.endswith(".initialized"):
            assert bool(value), key
    start = build_quantizer({"dim": DIM, "codebook_size": 24, **FAMILY["split"], "codebook": "gradient"}).state_dict()
    assert not torch.equal(joined["gradient.split.semantic_in.weight"], start["semantic_in.weight"])
