"""Documents of text and tokens, a small Llama or a local pretrained model, and the training loop over accelerate."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mmtok.tokens import write_atomic
from mmtok.training.loop import start_accelerator
from mmtok.vocab import Vocab
from speaking.pairs import Pairs

END = "<|end|>"
TASKS = {"draw": "image", "say": "audio"}  # what a text begins with that is to become a picture, or speech
SHARD = "state"


@dataclass(frozen=True)
class Settings:
    """One training: ``length`` ids a row, ``batch_size`` rows a step."""

    steps: int
    batch_size: int = 8
    length: int = 512
    lr: float = 2e-3
    warmup: int = 50
    seed: int = 0
    save_every: int = 200


def text_tokenizer(texts: Sequence[str], size: int, folder: Path | None = None) -> Any:
    """A byte-level BPE of ``size`` ids trained on ``texts``, as a Hugging Face fast tokenizer; kept in ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if folder is not None and (folder / "tokenizer.json").is_file():
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    if folder is not None:
        tokenizer.save_pretrained(str(folder))
    return tokenizer


def small_llama(vocab_size: int, width: int, depth: int, seed: int) -> Any:
    """An untrained Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def prompt(task: str, text: str) -> str:
    return f"{task}: {text}"


def documents(vocab: Vocab, eos: int, pairs: dict[str, Pairs], split: str) -> list[list[int]]:
    """Each pair twice: its text, then what it tells of; and the other way round."""
    found = []
    for task, modality in TASKS.items():
        own = pairs[modality]
        for i in own.rows(split):
            item, text = own.tokens[i], own.texts[i]
            found.append([*vocab.pack([prompt(task, text), item], header=False), eos])
            found.append([*vocab.pack([item, text], header=False), eos])
    return found


def packed_rows(found: Sequence[Sequence[int]], length: int, pad: int) -> dict[str, Tensor]:
    """Rows of ``length`` ids as `mmtok.lm.documents.PackedDocuments` gives them, all (N, length); longer documents are
    left out, and said."""
    from mmtok.lm.documents import PackedDocuments, pack_documents

    packing = pack_documents(found, length, pad_id=pad, too_long="drop")
    print(packing.report())
    dataset = PackedDocuments(packing)
    rows = [dataset[i] for i in range(len(dataset))]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy in nats of the ids of (B, S) rows; documents of one row do not see each other."""
    from mmtok.lm.documents import model_inputs

    inputs = model_inputs(batch)
    labels = inputs.pop("labels")
    logits = model(**inputs).logits[:, :-1].flatten(0, 1).float()
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def batch_at(rows: dict[str, Tensor], step: int, settings: Settings, rank: int = 0) -> dict[str, Tensor]:
    """The rows of a step, a function of (seed, step, rank): a run that was killed goes on with the same ones."""
    rng = np.random.default_rng([settings.seed, step, *([rank] if rank else [])])
    chosen = torch.from_numpy(rng.integers(len(rows["input_ids"]), size=settings.batch_size))
    return {k: v[chosen] for k, v in rows.items()}


def rate_at(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


def train(
    model: Any,
    rows: dict[str, Tensor],
    settings: Settings,
    out: Path,
    resume: bool = True,
    validate: Callable[[Any], dict[str, float]] | None = None,
    at: Sequence[int] = (),
) -> list[dict[str, float]]:
    """Train ``model`` in place and return the log. A run that was killed continues with the same numbers on CPU.

    Args:
        rows: see `packed_rows`.
        out: folder of the state and of ``log.jsonl``.
        validate: called with the model at the steps ``at`` and at the end; what it returns is logged.
    """
    accelerator = start_accelerator()
    bf16 = accelerates_bf16()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    log: list[dict[str, float]] = []
    start = 0
    former = out / f"{SHARD}.former"
    if resume and former.is_dir() and not (out / SHARD).is_dir():  # killed between two renames
        os.replace(former, out / SHARD)
    if resume and (out / SHARD / "about.json").is_file():
        about = json.loads((out / SHARD / "about.json").read_text())
        if about["settings"] != asdict(settings):
            raise ValueError(
                f"{out} holds a run with {about['settings']}, expected {asdict(settings)}; take another --out"
            )
        accelerator.load_state(str(out / SHARD))
        start, log = about["step"], about["log"]
    model.train()
    began = time.perf_counter()
    bar = tqdm(range(start, settings.steps), desc=out.name, initial=start, total=settings.steps, mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        batch = {
            k: v.to(accelerator.device) for k, v in batch_at(rows, step, settings, accelerator.process_index).items()
        }
        if validate is not None and step in at:
            log.append({"step": step, **validated(model, validate)})
        with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step + 1 == settings.steps:
            seconds = time.perf_counter() - began
            speed = (step + 1 - start) * batch["input_ids"].numel() / seconds
            log.append({"step": step, "loss": float(loss.detach()), "ids_per_second": round(speed, 1)})
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            save_state(accelerator, out, {"step": step + 1, "settings": asdict(settings), "log": log})
    if validate is not None and not (log and log[-1].get("step") == settings.steps):
        log.append({"step": settings.steps, **validated(model, validate)})
    if accelerator.is_main_process:
        write_atomic(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log).encode())
    return log


def validated(model: Any, validate: Callable[[Any], dict[str, float]]) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        found = validate(model)
    model.train()
    return found


def save_state(accelerator: Any, out: Path, about: dict[str, Any]) -> None:
    """Written aside and renamed, by the first process: a kill leaves the former state or this one."""
    aside, former = out / f".{SHARD}", out / f"{SHARD}.former"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside), safe_serialization=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_atomic(aside / "about.json", json.dumps(about).encode())
        shutil.rmtree(former, ignore_errors=True)
        if (out / SHARD).is_dir():
            os.replace(out / SHARD, former)
        os.replace(aside, out / SHARD)
        shutil.rmtree(former, ignore_errors=True)
    accelerator.wait_for_everyone()


def accelerates_bf16() -> bool:
    """Whether bf16 products are worth it here: on CUDA, or on a CPU with matrix units."""
    return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
