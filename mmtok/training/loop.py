"""The training loop of every tokenizer here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmtok.tokenizer import Tokenizer
from mmtok.tokens import write_atomic
from mmtok.training.config import TrainConfig
from mmtok.training.ema import WeightAverage
from mmtok.training.log import RunLog
from mmtok.training.objective import Objective
from mmtok.training.state import load_state, save_state

Batches = Callable[[int, int], dict[str, Tensor]]  # (index, rank) -> batch, the same for the same arguments


def train(
    tokenizer: Tokenizer,
    objective: Objective,
    batches: Batches,
    config: TrainConfig,
    validate: Callable[[Tokenizer], dict[str, float]] | None = None,
) -> Tokenizer:
    """Train ``tokenizer`` in place and return it with its averaged weights; they also stand in ``out/tokenizer``.

    Each step: one forward; the generator's loss with the discriminator frozen; the discriminator's loss on the same
    reconstruction, detached; both optimizers; the average. Gradients of ``accumulate`` batches are averaged first, for
    both networks (codebooks that learn by averages move at every batch). Sampling is seeded by (seed, step, rank), so
    6 steps == 3 + resume + 3, bitwise on CPU. A step whose gradient is not finite changes no weights of that network
    and always has its row in the log, as ``tokenizer_skipped`` or ``discriminator_skipped``.

    Processes of ``accelerate launch`` average their gradients by one explicit all-reduce instead of a DDP wrapper:
    quantizer dropout leaves parameters unused and the discriminator runs several times a step, which DDP handles badly.
    Codebooks that learn by averages synchronise themselves (see `mmtok.quantizers.sync`). The log is the first
    process's: its loss terms and statistics are those of its own batches.
    """
    accelerator = start_accelerator()
    device, rank = accelerator.device, accelerator.process_index
    config.out.mkdir(parents=True, exist_ok=True)
    tokenizer.to(device)
    modules: dict[str, nn.Module] = {"tokenizer": tokenizer}
    optimizers = {"tokenizer": adamw(tokenizer, config.lr, config)}
    if objective.discriminator is not None:
        modules["discriminator"] = objective.discriminator.to(device)
        optimizers["discriminator"] = adamw(objective.discriminator, config.peak_lr("discriminator"), config)
    for module in objective.frozen_modules():
        module.to(device).eval().requires_grad_(False)
    kept = modules | {name: module.to(device) for name, module in objective.kept_modules().items()}
    for module in kept.values():
        same_start(accelerator, module)
    average = WeightAverage(tokenizer, config.ema)
    identity = {"type": tokenizer.type_name, "config": tokenizer.config, "seed": config.seed, "steps": config.steps}
    state_file = config.out / "state.safetensors"
    start = 0
    if config.resume and state_file.is_file():
        start = load_state(state_file, kept, optimizers, average.average, identity)
        accelerator.print(f"resumed {config.out} at step {start} of {config.steps}")
    if start == 0 and config.codebook_batches:
        start_codebooks(tokenizer, batches, config, rank)
    log = RunLog(config.out, config.steps, start, accelerator.is_main_process)

    for step in range(start, config.steps):
        torch.manual_seed((config.seed * 1_000_003 + step) * 1009 + rank)
        tokenizer.train()
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = config.peak_lr(name) * config.lr_share(step)
            optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Any] = {}
        share, skipped = 1 / config.accumulate, False
        for micro in range(config.accumulate):
            batch = {k: v.to(device) for k, v in batches(step * config.accumulate + micro, rank).items()}
            for key, value in one_batch(tokenizer, objective, batch, step, share, config.bf16).items():
                terms[key] = terms.get(key, 0) + share * value.float()
            log.items += next(iter(batch.values())).shape[0] * accelerator.num_processes
        for name, module in modules.items():
            parameters = [p for p in module.parameters() if p.requires_grad]
            average_gradients(accelerator, parameters)
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            terms[f"{name}_grad_norm"] = norm
            if bool(torch.isfinite(norm)):
                optimizers[name].step()
            else:  # one bad batch must not ruin the weights; it shows in the log
                terms[f"{name}_skipped"], skipped = 1.0, True
        average.update(tokenizer, step)
        done = step + 1
        log.bar.update(1)
        last = done == config.steps
        if done % config.log_every == 0 or last or skipped:
            log.write(done, terms | {"lr": optimizers["tokenizer"].param_groups[0]["lr"]})
        if validate is not None and accelerator.is_main_process and (done % config.validate_every == 0 or last):
            with average.applied(tokenizer), torch.random.fork_rng(devices=[]), torch.no_grad():
                log.write(done, validate(tokenizer.eval()), "validate")
        if accelerator.is_main_process and (done % config.save_every == 0 or last):
            with average.applied(tokenizer):
                tokenizer.eval().save(config.out / "tokenizer")
            # After the weights: a run killed between the two repeats the steps and writes the weights again.
            save_state(state_file, done, kept, optimizers, average.average, identity)
            write_atomic(config.out / "progress.json", json.dumps({"step": done, "steps": config.steps}).encode())
        accelerator.wait_for_everyone()
    log.close()
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            parameter.copy_(average.average[name])
    return tokenizer.eval()


@torch.no_grad()
def start_codebooks(tokenizer: Tokenizer, batches: Batches, config: TrainConfig, rank: int) -> None:
    """One forward over many batches in training mode, from which codebooks with a k-means start take it."""
    torch.manual_seed(config.seed)
    beyond = config.steps * config.accumulate  # batches that no step reads
    parts = [batches(beyond + i, rank) for i in range(config.codebook_batches)]
    tokenizer.train()
    tokenizer(**{k: torch.cat([p[k] for p in parts]).to(tokenizer.device) for k in parts[0]})


def start_accelerator() -> Accelerator:
    """The accelerator of this process; its precision is left open, since accelerate refuses a second one later on.

    Raises ValueError when a launcher started several processes that do not know of each other: they would train alone,
    each over the other's files. Without an accelerator device, accelerate joins processes only when asked for the CPU.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(cpu=launched > 1 and not torch.accelerator.is_available())
    if accelerator.num_processes == 1 and launched > 1:
        raise ValueError(
            f"expected {launched} processes (WORLD_SIZE), got 1: accelerate was set up before train() without them; "
            "set ACCELERATE_USE_CPU=true for processes on the CPU, or unset WORLD_SIZE for a single one"
        )
    return accelerator


def one_batch(
    tokenizer: Tokenizer,
    objective: Objective,
    batch: dict[str, Tensor],
    step: int,
    share: float = 1.0,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """Forward once and add ``share`` of both networks' gradients; returns the loss terms and quantizer statistics."""
    device_type = tokenizer.device.type
    with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
        output = tokenizer(**batch)
    with frozen(objective.discriminator):
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
            loss, terms = objective.generator_loss(output, batch, step)
        (loss * share).backward()
    if objective.discriminator is not None:
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
            d_loss, d_terms = objective.discriminator_loss(output, batch, step)
        if d_loss.requires_grad:  # before the discriminator's start there is nothing to learn
            (d_loss * share).backward()
        terms |= d_terms
    return {"loss": loss.detach()} | terms | output.quantized.stats


@contextmanager
def frozen(module: nn.Module | None) -> Iterator[None]:
    """Inside the block the module's parameters take no gradients; those that took none before take none after it."""
    parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def adamw(module: nn.Module, lr: float, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, betas=config.betas, weight_decay=config.weight_decay)


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Mean of the gradients over all processes, one flat all-reduce.

    A gradient that only some processes have counts as zero on the others. One that none has stays missing, so that the
    optimizer passes over its parameter (no weight decay, no momentum), as it does in a single process.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=accelerator.device)
    flat = torch.cat([*gradients, present])
    torch.distributed.all_reduce(flat)
    *means, present = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for p, total, count in zip(parameters, means, present.tolist(), strict=True):
        p.grad = (total / accelerator.num_processes).view_as(p) if count else None


def same_start(accelerator: Accelerator, module: nn.Module) -> None:
    """Give every process the first one's weights and buffers."""
    if accelerator.num_processes > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            torch.distributed.broadcast(tensor.data, 0)
