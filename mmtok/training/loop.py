"""The training loop of every tokenizer here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
    both networks. Sampling is seeded by (seed, step, rank), so 6 steps == 3 + resume + 3, bitwise on CPU.

    Processes of ``accelerate launch`` average their gradients by one explicit all-reduce instead of a DDP wrapper:
    quantizer dropout leaves parameters unused and the discriminator runs several times a step, which DDP handles badly.
    Codebooks that learn by averages synchronise themselves (see `mmtok.quantizers.sync`).
    """
    accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no")
    device, rank = accelerator.device, accelerator.process_index
    config.out.mkdir(parents=True, exist_ok=True)
    tokenizer.to(device)
    modules: dict[str, nn.Module] = {"tokenizer": tokenizer}
    optimizers = {"tokenizer": adamw(tokenizer, config.lr, config)}
    if objective.discriminator is not None:
        modules["discriminator"] = objective.discriminator.to(device)
        optimizers["discriminator"] = adamw(objective.discriminator, config.discriminator_lr or config.lr, config)
    for module in objective.frozen_modules():
        module.to(device)
    for module in modules.values():
        same_start(accelerator, module)
    average = WeightAverage(tokenizer, config.ema)
    identity = {"type": tokenizer.type_name, "config": tokenizer.config, "seed": config.seed, "steps": config.steps}
    state_file = config.out / "state.safetensors"
    start = 0
    if config.resume and state_file.is_file():
        start = load_state(state_file, modules, optimizers, average.average, identity)
        accelerator.print(f"resumed {config.out} at step {start} of {config.steps}")
    log = RunLog(config.out, config.steps, start, accelerator.is_main_process)

    for step in range(start, config.steps):
        torch.manual_seed((config.seed * 1_000_003 + step) * 1009 + rank)
        tokenizer.train()
        for group_name, optimizer in optimizers.items():
            base = config.lr if group_name == "tokenizer" else config.discriminator_lr or config.lr
            optimizer.param_groups[0]["lr"] = base * config.lr_share(step)
            optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Tensor | float] = {}
        for micro in range(config.accumulate):
            batch = {k: v.to(device) for k, v in batches(step * config.accumulate + micro, rank).items()}
            terms = one_batch(accelerator, tokenizer, objective, batch, step, 1 / config.accumulate)
            log.items += next(iter(batch.values())).shape[0] * accelerator.num_processes
        for name, module in modules.items():
            parameters = [p for p in module.parameters() if p.requires_grad]
            average_gradients(accelerator, parameters)
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            terms[f"{name}_grad_norm"] = norm
            if bool(torch.isfinite(norm)):
                optimizers[name].step()
            else:  # one bad batch must not ruin the weights; it shows in the log
                terms[f"{name}_skipped"] = 1.0
        average.update(tokenizer, step)
        done = step + 1
        log.bar.update(1)
        if done % config.log_every == 0 or done == config.steps:
            log.write(done, terms | {"lr": optimizers["tokenizer"].param_groups[0]["lr"]})
        last = done == config.steps
        if validate is not None and accelerator.is_main_process and (done % config.validate_every == 0 or last):
            with average.applied(tokenizer), torch.random.fork_rng(devices=[]):
                log.write(done, validate(tokenizer.eval()), "validate")
        if accelerator.is_main_process and (done % config.save_every == 0 or last):
            save_state(state_file, done, modules, optimizers, average.average, identity)
            with average.applied(tokenizer):
                tokenizer.eval().save(config.out / "tokenizer")
            write_atomic(config.out / "progress.json", json.dumps({"step": done, "steps": config.steps}).encode())
        accelerator.wait_for_everyone()
    log.close()
    with torch.no_grad():
        for name, parameter in tokenizer.named_parameters():
            parameter.copy_(average.average[name])
    return tokenizer.eval()


def one_batch(
    accelerator: Accelerator,
    tokenizer: Tokenizer,
    objective: Objective,
    batch: dict[str, Tensor],
    step: int,
    share: float,
) -> dict[str, Any]:
    """Forward once and add ``share`` of both networks' gradients; returns the loss terms and quantizer statistics."""
    with accelerator.autocast():
        output = tokenizer(**batch)
    if objective.discriminator is not None:
        objective.discriminator.requires_grad_(False)
    with accelerator.autocast():
        loss, terms = objective.generator_loss(output, batch, step)
    (loss * share).backward()
    if objective.discriminator is not None:
        objective.discriminator.requires_grad_(True)
        with accelerator.autocast():
            d_loss, d_terms = objective.discriminator_loss(output, batch, step)
        if d_loss.requires_grad:  # before the discriminator's start there is nothing to learn
            (d_loss * share).backward()
        terms |= d_terms
    return {"loss": loss.detach()} | terms | output.quantized.stats


def adamw(module: nn.Module, lr: float, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, betas=config.betas, weight_decay=config.weight_decay)


def average_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter]) -> None:
    """Mean of the gradients over all processes, one flat all-reduce; a missing gradient counts as zero."""
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= accelerator.num_processes
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).clone()


def same_start(accelerator: Accelerator, module: nn.Module) -> None:
    """Give every process the first one's weights and buffers."""
    if accelerator.num_processes > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            torch.distributed.broadcast(tensor.data, 0)
