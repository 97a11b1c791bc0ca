"""Two gloo processes with half the data each fit the same tables, and where no draw decides, those of one process."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from mmtok.quantizers import PerDimensionQuantizer, ProductQuantizer, build_quantizer

STARTED = {
    "random_projection": {"type": "random_projection", "dim": 4, "codebook_size": 16, "codebook_dim": 2},
    "length": {"type": "pq", "dim": 4, "codebook_size": 6, "normalize": "length"},
    "whiten": {"type": "pq", "dim": 4, "codebook_size": 6, "num_codebooks": 2, "normalize": "whiten"},
}


def learn(batch: slice, seed: int) -> dict[str, torch.Tensor]:
    quantizers = {name: build_quantizer(config) for name, config in STARTED.items()}
    torch.manual_seed(seed)  # the ranks draw differently: what decides must come from rank 0
    for quantizer in quantizers.values():
        for step, lengths in enumerate(([25, 20, 0, 0], [9, 25, 3, 17])):  # the second rank starts with no vector
            z = torch.randn(4, 25, 4, generator=torch.Generator().manual_seed(step))
            quantizer(z[batch], (torch.arange(25) < torch.tensor(lengths)[:, None])[batch])
    data = torch.randn(4, 40, 4, generator=torch.Generator().manual_seed(9)) + 3
    product, table = ProductQuantizer(4, 6, 2, "whiten"), PerDimensionQuantizer(4, 3)
    product.fit(list(data[batch]), passes=2, progress=False)
    table.fit(data[batch].flatten(0, 1))
    quantizers |= {"fitted": product, "table": table}
    state = {name: quantizer.state_dict() for name, quantizer in quantizers.items()}
    return {f"{name}.{key}": value.clone() for name, part in state.items() for key, value in part.items()}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=120)  # ranks that wait for each other for ever should fail instead
    dist.init_process_group("gloo", timeout=patience, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        save_file(learn(slice(2 * rank, 2 * rank + 2), seed=5 + rank), f"{folder}/{rank}.safetensors")
        dist.barrier()  # gloo may abort where one rank takes the group down while the other still uses it
    finally:
        dist.destroy_process_group()


def test_two_ranks_fit_the_same(tmp_path: Path):
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    first, second = load_file(tmp_path / "0.safetensors"), load_file(tmp_path / "1.safetensors")
    joined = learn(slice(0, 4), seed=5)
    assert joined.keys() == first.keys() == second.keys()
    for key, value in joined.items():
        assert torch.equal(first[key], second[key]), key
        if key != "fitted.codebooks":  # its start is drawn after other draws than in one process
            torch.testing.assert_close(first[key], value, atol=1e-5, rtol=1e-5, msg=key)
    assert bool(joined["fitted.fitted"]) and bool(joined["whiten.fitted"])
