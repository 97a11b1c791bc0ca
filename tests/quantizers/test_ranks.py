"""Two gloo processes with half a batch each learn what one process learns from the joined batch."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mmtok.quantizers import build_quantizer

CONFIGS = [
    {"type": "vq", "dim": 4, "codebook_size": 24, "dead_code_threshold": 0.5, "decay": 0.5},
    {"type": "rvq", "dim": 4, "num_codebooks": 2, "codebook_size": 24, "codebook": "gradient", "decay": 0.5},
]


def learn(batch: slice, seed: int) -> dict[str, torch.Tensor]:
    """The weights of every quantizer after three steps on items ``batch`` of each step's global batch."""
    torch.manual_seed(0)
    quantizers = [build_quantizer(config) for config in CONFIGS]
    torch.manual_seed(seed)  # the ranks draw differently: what k-means and revival draw must come from rank 0
    state = {}
    for i, quantizer in enumerate(quantizers):
        for step in range(3):
            z = torch.randn(4, 25, 4, generator=torch.Generator().manual_seed(step))
            lengths = torch.tensor([25, 20, 11, 0])  # the ranks hold different numbers of valid vectors
            mask = torch.arange(25) < lengths[:, None]
            quantizer(z[batch], mask[batch])
        state |= {f"{i}.{key}": value.clone() for key, value in quantizer.state_dict().items()}
    return state


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Ranks that disagree on what is dead would wait for each other for ever: fail instead.
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", timeout=patience, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        save_file(learn(slice(2 * rank, 2 * rank + 2), seed=5 + rank), f"{folder}/{rank}.safetensors")
    finally:
        dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path: Path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    first, second = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    joined = learn(slice(0, 4), seed=5)
    assert joined.keys() == first.keys() == second.keys()
    for key, value in joined.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, atol=1e-5, rtol=1e-5, msg=key)
    assert bool(joined["0.book.initialized"])
