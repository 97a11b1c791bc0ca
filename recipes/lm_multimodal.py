"""A small Llama that draws captions, captions pictures, speaks sentences and writes them down, on codes of what ships.

Command:   python recipes/lm_multimodal.py --data data --out runs/lm --results recipes/results
           accelerate launch --num_processes 2 recipes/lm_multimodal.py ...            # or GPUs
           python recipes/lm_multimodal.py --lm /models/some-llama --lora 16 ...       # a local pretrained model
Data:      `python recipes/fetch_data.py --out data`: captioned pictures (emoji, stamps, clip art) as 16 codes of
           image-causal1d-16x8, sentences of one voice as two levels of audio-xcodec-16k-4kbps (100 codes a second); a
           tenth of all texts is held out for testing, a tenth for validation.
Steps:     the Llama first reads the texts alone (--text-steps), then its vocabulary is extended (--init; --compare
           tries all rules for --compare-steps each from the same start), then it trains on documents of both orders.
Result:    lm-multimodal.json, lm-multimodal.md and lm-multimodal.html below --results, README and recipes/LOG.md.
           `--smoke`: a model of a few thousand weights on pieces of the packaged files, in seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from speaking.learning import Settings, documents, packed_rows, small_llama, text_tokenizer, train
from speaking.pairs import Pairs, picture_pairs, smoke_pairs, speech_pairs, write_text
from speaking.scoring import summary, validation
from speaking.writing import Writer, validity, write_page

import mmtok
from mmtok.bench.tables import interval_text, markdown_table, replace_block
from mmtok.lm.extend import extend
from mmtok.vocab import Vocab

ROOT = Path(__file__).resolve().parents[1]
IMAGE, AUDIO, LEVELS = "image-causal1d-16x8", "audio-xcodec-16k-4kbps", 2
INITS = ("mean_covariance", "projected", "mean", "normal")


def start(args: argparse.Namespace, pairs: dict[str, Pairs]) -> tuple[Any, Any]:
    """The model and its text tokenizer before any code: a local pretrained one, or a Llama that has read the texts."""
    texts = [own.texts[i] for own in pairs.values() for i in own.rows("train")]
    if args.lm:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.lm, local_files_only=True)
        return AutoModelForCausalLM.from_pretrained(args.lm, local_files_only=True), tokenizer
    tokenizer = text_tokenizer(texts, args.text_vocab, args.out / "tokenizer" if args.resume else None)
    model = small_llama(len(tokenizer), args.width, args.depth, args.seed)
    eos = tokenizer.eos_token_id
    rows = packed_rows([[*tokenizer.encode(t), eos] for t in texts], args.length // 2, eos)
    settings = Settings(args.text_steps, args.batch_size, args.length // 2, args.lr, seed=args.seed)
    train(model, rows, settings, args.out / "text", args.resume)
    return model, tokenizer


def extended(args: argparse.Namespace, model: Any, tokenizer: Any, vocab: Vocab, sources: dict, init: str) -> Any:
    """A copy of ``model`` that has rows for every id of ``vocab``, filled by ``init``."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(args.seed)
    extend(model, copy.deepcopy(tokenizer), vocab, init=init, sources=sources, generator=generator)
    if args.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=args.lora, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
        )
    return model


def compared(args: argparse.Namespace, grown: Callable[[str], Any], rows: dict, held: dict) -> dict[str, Any]:
    """Held-out nats an id after 0, a quarter, half and all of ``--compare-steps`` for each rule of new embeddings.

    ``grown`` gives the extended model of a rule.
    """
    found: dict[str, Any] = {}
    at = (0, args.compare_steps // 4, args.compare_steps // 2)
    for init in INITS:
        model = grown(init)
        settings = Settings(args.compare_steps, args.batch_size, args.length, args.lr, warmup=10, seed=args.seed)
        log = train(model, rows, settings, args.out / f"init-{init}", args.resume, lambda m: validation(m, held), at)
        found[init] = {int(r["step"]): r["validation"] for r in log if "validation" in r}
    return found


def tables(scores: dict[str, Any]) -> tuple[list[list[str]], str, str]:
    """Rows for the page, and the README's two tables."""
    cells = [["", "pictures", "speech"]]
    for ours, theirs in zip(scores["test"]["image"], scores["test"]["audio"], strict=True):
        pair = [scores["test"][m][k] for m, k in (("image", ours), ("audio", theirs))]
        text = [interval_text(p, 2) if isinstance(p, dict) else f"{p:.2f}" for p in pair]
        cells.append([ours if ours == theirs else f"{ours} / {theirs}", *text])
    for way in ("free", "constrained"):
        cells.append([f"valid documents, {way}", *(f"{scores['valid'][f'{m} {way}']:.2f}" for m in ("image", "audio"))])
    main = markdown_table(cells[0], cells[1:])
    if "inits" not in scores:
        return cells, main, ""
    steps = sorted(next(iter(scores["inits"].values())))
    header = ["new embeddings", *(f"nats an id after {s} steps" for s in steps)]
    return (
        cells,
        main,
        markdown_table(header, [[k, *(f"{v[s]:.3f}" for s in steps)] for k, v in scores["inits"].items()]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="what fetch_data.py made, or your own manifest")
    parser.add_argument("--out", type=Path, default=Path("runs/lm"), help="states and cached codes")
    parser.add_argument("--results", type=Path, help="where tables and page go (default: --out)")
    parser.add_argument("--steps", type=int, default=600, help="steps on all documents (default %(default)s)")
    parser.add_argument("--text-steps", type=int, default=300, help="steps on texts alone before (default %(default)s)")
    parser.add_argument("--compare", action="store_true", help="also compare the rules for new embeddings")
    parser.add_argument("--compare-steps", type=int, default=80, help="steps of each (default %(default)s)")
    parser.add_argument("--init", choices=INITS, default="projected", help="new embeddings (default %(default)s)")
    parser.add_argument("--lm", metavar="DIR", help="a local pretrained causal LM and its tokenizer")
    parser.add_argument("--lora", type=int, metavar="R", help="LoRA of rank R by peft; embeddings and head still train")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--text-vocab", type=int, default=1500, help="ids of the new text tokenizer")
    parser.add_argument("--length", type=int, default=512, help="ids a row")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--items", type=int, default=100, help="held-out pairs that are scored (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="go on with the run in --out"
    )
    parser.add_argument("--smoke", action="store_true", help="everything once, tiny, in seconds")
    args = parser.parse_args()
    if args.smoke:
        small = {
            "steps": 4,
            "text_steps": 3,
            "compare": True,
            "compare_steps": 4,
            "width": 32,
            "depth": 1,
            "text_vocab": 300,
        }
        vars(args).update(small | {"length": 128, "batch_size": 2, "items": 3})
    results = args.results or args.out
    image, audio = mmtok.load(IMAGE), mmtok.load(AUDIO)
    if args.smoke:
        pairs = dict(zip(("image", "audio"), smoke_pairs(image, audio, LEVELS), strict=True))
    else:
        cache = args.out / "cache"
        pairs = {
            "image": picture_pairs(args.data, cache, image),
            "audio": speech_pairs(args.data, cache, audio, LEVELS),
        }
    base, tokenizer = start(args, pairs)
    vocab = Vocab(text=tokenizer, image=pairs["image"].tokens.spec, audio=pairs["audio"].tokens.spec)
    eos = tokenizer.eos_token_id
    rows = packed_rows(documents(vocab, eos, pairs, "train"), args.length, eos)
    held = packed_rows(documents(vocab, eos, pairs, "val"), args.length, eos)
    sources = {"image": image, "audio": audio}

    def grown(init: str) -> Any:
        return extended(args, base, tokenizer, vocab, sources, init)

    scores: dict[str, Any] = {"settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}}
    scores["documents"] = {"rows": len(rows["input_ids"]), "held out rows": len(held["input_ids"]), "ids": vocab.size}
    if args.compare:
        scores["inits"] = compared(args, grown, rows, held)
    model = grown(args.init)
    scores["parameters"] = sum(p.numel() for p in model.parameters())
    settings = Settings(args.steps, args.batch_size, args.length, args.lr, seed=args.seed)
    at = tuple(range(0, args.steps, max(1, args.steps // 8)))
    scores["log"] = train(model, rows, settings, args.out / "main", args.resume, lambda m: validation(m, held), at)
    if not PartialState().is_main_process:
        return
    model.eval()
    frame_rate = float(audio.spec.frame_rate or 0)
    scores["test"] = summary(model, vocab, eos, pairs, "test", args.items, frame_rate)
    writer = Writer(model, vocab, eos, {"image": pairs["image"].tokens.spec.num_codebooks, "audio": LEVELS})
    limits = {"image": 40, "audio": 60 if args.smoke else 400}
    scores["valid"] = validity(writer, pairs, "test", max(3, args.items // 5), limits)
    cells, main_table, init_table = tables(scores)
    results.mkdir(parents=True, exist_ok=True)
    count = 2 if args.smoke else 5
    scores["written"] = write_page(results / "lm-multimodal.html", writer, pairs, image, audio, cells, count)
    write_text(results / "lm-multimodal.json", json.dumps(scores, indent=1) + "\n")
    write_text(results / "lm-multimodal.md", f"{main_table}\n\n{init_table}\n")
    if results.resolve() == ROOT / "recipes" / "results":
        text = (ROOT / "README.md").read_text()
        text = replace_block(text, "results:lm", main_table)
        write_text(ROOT / "README.md", replace_block(text, "results:lm-inits", init_table) if init_table else text)
    print(main_table, init_table, sep="\n\n")


if __name__ == "__main__":
    main()
