"""The benchmark's part `systems`: size, speed, memory, latency, receptive field and arithmetic of a contender.

Figures of time and memory belong to the machine that stands in their protocol and come out a little different every
time: they are marked ``"timing": True`` there. Speeds of two contenders compare where both ran on one machine, one
after the other. What does not depend on a set stands under the set's name `ANY`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtok import auto
from mmtok.bench.contenders import Contender
from mmtok.bench.parts import Context, Job
from mmtok.bench.receptive_field import Reach, SoundField, picture_field, sound_probe
from mmtok.bench.records import Item, Result, TestSet
from mmtok.bench.system_probes import (
    MemoryNotMeasuredError,
    given_back,
    machine,
    peak_memory,
    sounds_or_pictures,
    stream_once,
    wait,
    weights,
    work_of,
)
from mmtok.bench.token_part import codes_are_bytes
from mmtok.data import audio as audio_io
from mmtok.tokens import Tokens

PART = "systems"
ANY = "any"  # the set's name of what depends on no set
BATCHES = (1, 8)
CHUNKS_MS = (20, 80)
REPEATS, SECONDS = 9, 20.0  # of one timing, at most; three repeats at least
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".th", ".onnx", ".npz")
NO_NETWORK = "it has no network: a classical codec, whose arithmetic torch does not see"
_FAILURES = (ValueError, RuntimeError)  # what a tokenizer raises that cannot do what is asked


def jobs(contender: Contender, context: Context) -> list[Job]:
    """The jobs of one contender: ``size``, ``latency`` and ``field`` once, ``speed`` and ``memory`` of each set."""
    runs: list[tuple[str, Callable[[], Sequence[Result]]]] = [
        ("size", functools.partial(size_results, contender, context))
    ]
    if context.sets:
        first = context.sets[0]
        runs.append(("work", functools.partial(work_results, contender, first, context)))
        runs.append(("field", functools.partial(field_results, contender, first, context)))
        if contender.modality == "audio":
            runs.append(("latency", functools.partial(latency_results, contender, first, context)))
    for test_set in context.sets:
        runs.append((f"speed/{test_set.name}", functools.partial(speed_results, contender, test_set, context)))
        runs.append((f"memory/{test_set.name}", functools.partial(memory_results, contender, test_set, context)))
    return [Job(f"{PART}/{name}/{contender.label}", run) for name, run in runs]


@dataclasses.dataclass(frozen=True)
class _Bench:
    """What the results of one job share."""

    contender: Contender
    context: Context
    test_set: TestSet | None = None

    def protocol(self, **more: Any) -> dict[str, Any]:
        own = {} if self.test_set is None else {"set": dict(self.test_set.protocol)}
        smoke = {"smoke": True} if self.context.smoke else {}
        return {**own, "contender": self.contender.protocol(), **smoke, **more}

    def result(self, metric: str, value: float, unit: str, direction: str, count: int = 1, **more: Any) -> Result:
        low, high, interval = (more.pop(name, None) for name in ("low", "high", "interval"))
        return Result(
            *self._names(metric), float(value), unit, direction, low, high, count, interval, None, self.protocol(**more)
        )

    def not_run(self, metric: str, unit: str, direction: str, why: object) -> Result:
        reason = " ".join(str(why).split())
        return Result(*self._names(metric), None, unit, direction, not_run=reason, protocol=self.protocol())

    def timed(self, metric: str, values: Sequence[float], unit: str, direction: str, **more: Any) -> Result:
        """The median of repeats with its quartiles."""
        low, value, high = (float(v) for v in np.percentile(np.asarray(values, dtype=np.float64), (25, 50, 75)))
        interval = f"quartiles of {len(values)} repeats, the value is their median"
        about = {"timing": True, **machine(), **more}
        return self.result(metric, value, unit, direction, len(values), low=low, high=high, interval=interval, **about)

    def _names(self, metric: str) -> tuple[str, str, str, str]:
        return PART, self.contender.label, ANY if self.test_set is None else self.test_set.name, metric

    def option(self, name: str, smoke: float, full: float) -> float:
        return float(self.context.options.get(name, smoke if self.context.smoke else full))


def size_results(contender: Contender, context: Context) -> list[Result]:
    """Numbers in the weights, and bytes of their files."""
    bench, found = _Bench(contender, context), weights(contender)
    about = (
        "numbers that inference reads: parameters and codebooks; frozen networks from outside are parameters_external"
    )
    return [
        bench.result("parameters", found.total, "1", "lower", counted=about),
        bench.result("parameters_external", found.external, "1", "lower", counted=about),
        _bytes_on_disk(bench),
    ]


def _bytes_on_disk(bench: _Bench) -> Result:
    contender = bench.contender
    if codes_are_bytes(contender.tokenizer):
        return bench.result("weights_bytes", 0, "byte", "lower", files="none: a classical codec")
    name = (contender.source or contender.label).partition("#")[0]
    prefix, _, source = name.partition(":")
    folders = [Path(source), Path(name)]
    if prefix not in auto.families():
        try:
            folders.append(Path(auto.card(name)["folder"]))
        except (*_FAILURES, KeyError, OSError):
            pass  # not one of mmtok's: a path, or a tokenizer that only a program knows
    for path in folders:
        files = [path] if path.is_file() else sorted(path.rglob("*")) if str(path) != "." and path.is_dir() else []
        # golden.safetensors holds an example, no weights
        files = [f for f in files if f.suffix in WEIGHT_FILES and f.is_file() and f.name != "golden.safetensors"]
        if files:
            size = sum(f.stat().st_size for f in files)
            names = sorted(f.name for f in files)
            return bench.result("weights_bytes", size, "byte", "lower", files=names[:8])
    why = f"{name} names no folder with weights ({', '.join(WEIGHT_FILES)}); open it from one"
    return bench.not_run("weights_bytes", "byte", "lower", why)


def work_results(contender: Contender, test_set: TestSet, context: Context) -> list[Result]:
    """Arithmetic of encode and decode, and which weights each of them reads."""
    bench = _Bench(contender, context, test_set)
    names = [f"{side}_{what}" for side in ("encode", "decode") for what in ("gmac", "gflop", "parameters")]
    units = {"gmac": "GMAC", "gflop": "GFLOP", "parameters": "1"}
    if codes_are_bytes(contender.tokenizer):
        return [bench.not_run(n, units[n.partition("_")[2]], "lower", NO_NETWORK) for n in names]
    item, standard = _standard(contender, test_set.items[0])
    tokens = contender.encode(item)
    calls: dict[str, Callable[[], object]] = {"encode": lambda: contender.encode(item)}
    if not contender.tokenizer.encode_only:
        contender.decode(tokens, item)
        calls["decode"] = lambda: contender.decode(tokens, item)
    about = {
        "standard_item": standard,
        "backend": "torch.utils.flop_counter",
        "version": torch.__version__,
        "counted": "matrix products, convolutions, attention, LSTMs, distances, code search as a product with the "
        "codebook; 1 MAC = 2 FLOP; not: element-wise, small searches, norms, Fourier transforms, what is not torch's",
    }
    found = []
    for side in ("encode", "decode"):
        if side not in calls:
            own = [n for n in names if n.startswith(side)]
            found += [bench.not_run(n, units[n.partition("_")[2]], "lower", "it only encodes") for n in own]
            continue
        work = work_of(contender, calls[side])
        found += [
            bench.result(f"{side}_gmac", work.flops / 2e9, "GMAC", "lower", **about),
            bench.result(f"{side}_gflop", work.flops / 1e9, "GFLOP", "lower", **about),
            bench.result(
                f"{side}_parameters", work.weights, "1", "lower", counted="what the call reads, external ones too"
            ),
        ]
    return found


def _standard(contender: Contender, item: Item) -> tuple[Item, str]:
    """One second of sound at the model's rate, or a picture of the set."""
    item = dataclasses.replace(item, target=None)
    if contender.modality == "image":
        return item, f"picture of {item.x.shape[-2]} x {item.x.shape[-1]} px"
    rate = int(getattr(contender.tokenizer, "sample_rate", item.sample_rate or 0))
    x = audio_io.resample(item.x[:1], int(item.sample_rate or rate), rate).clamp(-1, 1)
    x = x.repeat(1, -(-rate // x.shape[1]))[:, :rate]
    return dataclasses.replace(item, x=x, sample_rate=rate), f"1 s of mono sound at {rate} Hz"


def speed_results(contender: Contender, test_set: TestSet, context: Context) -> list[Result]:
    """Items, and megapixels or seconds of sound, a second; one item a call and eight."""
    bench, found = _Bench(contender, context, test_set), []
    for batch in BATCHES:
        items = [test_set.items[i % len(test_set.items)] for i in range(max(BATCHES))]
        items = [dataclasses.replace(item, target=None) for item in items if item.sample_rate == items[0].sample_rate]
        groups = [items[i : i + batch] for i in range(0, len(items), batch)]
        about = {"batch": batch, "batch_limit": getattr(contender.tokenizer, "batch_limit", None)}
        about |= {"items_timed": min(len(test_set.items), len(items))}
        tokens: list[Tokens] = []
        try:
            tokens = [sounds_or_pictures(contender, group) for group in groups]
            seconds = _seconds(bench, [functools.partial(sounds_or_pictures, contender, g) for g in groups])
            found += _speeds(bench, "encode", groups, seconds, about)
        except _FAILURES as e:
            found += _no_speeds(bench, "encode", batch, e)
        if contender.tokenizer.encode_only or not tokens:
            found += _no_speeds(bench, "decode", batch, "it only encodes" if tokens else "nothing was encoded")
            continue
        try:
            calls = [functools.partial(given_back, contender, t, g) for t, g in zip(tokens, groups, strict=True)]
            found += _speeds(bench, "decode", groups, _seconds(bench, calls), about)
        except _FAILURES as e:
            found += _no_speeds(bench, "decode", batch, e)
    return found


def _seconds(bench: _Bench, calls: Sequence[Callable[[], object]]) -> list[float]:
    """Wall time of repeats, each of the next of ``calls``, after one warm-up of each shape that comes."""
    repeats, budget = int(bench.option("repeats", 2, REPEATS)), bench.option("seconds", 1.0, SECONDS)
    calls[0]()
    found: list[float] = []
    while len(found) < repeats and (len(found) < min(3, repeats) or sum(found) < budget):
        call = calls[len(found) % len(calls)]
        wait(bench.contender)
        started = time.perf_counter()
        call()
        wait(bench.contender)
        found.append(time.perf_counter() - started)
    return found


def _extent(item: Item) -> float:
    """Seconds of sound or megapixels."""
    if item.sample_rate is not None:
        return item.x.shape[-1] / item.sample_rate
    return item.x.shape[-2] * item.x.shape[-1] / 1e6


def _rate_names(bench: _Bench, side: str, batch: int) -> list[tuple[str, str, str]]:
    audio = bench.contender.modality == "audio"
    each, unit = ("seconds", "s/s") if audio else ("megapixels", "Mpx/s")
    names = [("items_per_second", "item/s", "higher"), (f"{each}_per_second", unit, "higher")]
    names += [("real_time_factor", "s/s", "lower")] if audio else []
    return [(f"{side}_{name}[batch={batch}]", unit, direction) for name, unit, direction in names]


def _speeds(
    bench: _Bench, side: str, groups: Sequence[Sequence[Item]], seconds: Sequence[float], about: dict[str, Any]
) -> list[Result]:
    chosen = [groups[i % len(groups)] for i in range(len(seconds))]
    extents = [sum(map(_extent, group)) for group in chosen]
    values = [
        [len(group) / s for group, s in zip(chosen, seconds, strict=True)],
        [extent / s for extent, s in zip(extents, seconds, strict=True)],
        [s / extent for extent, s in zip(extents, seconds, strict=True)],
    ]
    names = _rate_names(bench, side, about["batch"])
    return [bench.timed(name, v, u, direction, **about) for (name, u, direction), v in zip(names, values, strict=False)]


def _no_speeds(bench: _Bench, side: str, batch: int, why: object) -> list[Result]:
    return [bench.not_run(*name, why) for name in _rate_names(bench, side, batch)]


def memory_results(contender: Contender, test_set: TestSet, context: Context) -> list[Result]:
    """Peak memory above the loaded tokenizer, and of loading it."""
    bench = _Bench(contender, context, test_set)
    item = dataclasses.replace(test_set.items[0], target=None)
    names = {side: f"{side}_peak_memory" for side in ("encode", "decode")} | {"load": "load_memory"}
    try:
        found = peak_memory(contender, item, context.helpers)
    except MemoryNotMeasuredError as e:
        return [bench.not_run(name, "MB", "lower", e) for name in names.values()]
    cuda = contender.tokenizer.device.type == "cuda"
    about = {
        "timing": True,
        **machine(),
        "backend": "torch.cuda allocator" if cuda else "resident set of a fresh process (/proc), after one warm-up",
        "item": list(item.x.shape),
        "MB": "10^6 bytes",
    }
    return [
        bench.result(name, found[side] / 1e6, "MB", "lower", **about)
        if side in found
        else bench.not_run(name, "MB", "lower", "it only encodes")
        for side, name in names.items()
    ]


def field_results(contender: Contender, test_set: TestSet, context: Context) -> list[Result]:
    """The measured receptive field, infinite where it is the whole probe."""
    bench = _Bench(contender, context, test_set)
    seeds = range(1 if context.smoke else 2)
    item = test_set.items[0]
    audio = contender.modality == "audio"
    kinds = {"codes": "encode_field", "sound": "round_trip_field"} if audio else {"": "round_trip_field"}
    sides = ("left", "right") if audio else ("left", "right", "above", "below")
    unit = "samples" if audio else "pixels"
    names = [f"{kind}_{side}" for kind in kinds.values() for side in sides]
    if codes_are_bytes(contender.tokenizer) and audio:
        why = "its codes are the bytes of one file, which belong to no place of the sound"
        return [bench.not_run(name, unit, "neither", why) for name in names]
    if audio and not hasattr(contender.tokenizer, "hop_length"):
        why = "the tokenizer does not say its hop_length, so its codes have no place in the sound"
        return [bench.not_run(name, unit, "neither", why) for name in names]
    try:
        if audio:
            return _sound_field(bench, item, list(seeds), kinds)
        return _picture_field(bench, item, list(seeds))
    except _FAILURES as e:
        return [bench.not_run(name, unit, "neither", e) for name in names]


def _sound_field(bench: _Bench, item: Item, seeds: list[int], kinds: dict[str, str]) -> list[Result]:
    x = sound_probe(bench.contender, item, bench.option("field_seconds", 0.5, 2.0))
    field = SoundField(bench.contender, x, seeds)
    found = []
    for what, kind in kinds.items():
        for side in ("left", "right"):
            name = f"{kind}_{side}"
            if what == "sound" and field.sound is None:
                found.append(bench.not_run(name, "samples", "neither", "it only encodes"))
                continue
            reach = field.measure(what, side)
            about = {"model_rate": field.rate, "hop_length": field.hop, "trials": field.trials}
            found.append(_reach(bench, name, reach, "samples", f"{x.shape[1]} samples", about))
    return found


def _picture_field(bench: _Bench, item: Item, seeds: list[int]) -> list[Result]:
    field = picture_field(bench.contender, item, seeds)
    size, low, high = f"{field.size[0]} x {field.size[1]} px", 100 * min(field.shares), 100 * max(field.shares)
    about = {"patch": f"{field.patch} x {field.patch} px", "picture": size}
    interval = f"least and most of {len(field.shares)} patches"
    metric, found = "codes_changed_by_patch", []
    if codes_are_bytes(bench.contender.tokenizer):
        why = "its codes are the bytes of one file: after one that changes, all others may"
        found.append(bench.not_run(metric, "%", "neither", why))
    else:
        mean, ends = 100 * sum(field.shares) / len(field.shares), {"low": low, "high": high, "interval": interval}
        found.append(bench.result(metric, mean, "%", "neither", len(field.shares), **about, **ends))
    for side, reach in field.reaches.items():
        name = f"round_trip_field_{side}"
        if bench.contender.tokenizer.encode_only:
            found.append(bench.not_run(name, "pixels", "neither", "it only encodes"))
        else:
            found.append(_reach(bench, name, reach, "pixels", size, about))
    return found


def _reach(bench: _Bench, name: str, reach: Reach, unit: str, probe: str, about: dict[str, Any]) -> Result:
    words = "from a position to the furthest one that changes it; a lower bound, as seen"
    return bench.result(name, reach.distance, unit, "neither", whole=reach.whole, probe=probe, measures=words, **about)


def latency_results(contender: Contender, test_set: TestSet, context: Context) -> list[Result]:
    """Algorithmic latency, time to the first packet and to the first sound, and the computing of each push."""
    bench = _Bench(contender, context, test_set)
    exact = [f"{side}_latency" for side in ("encode", "decode")] + ["algorithmic_latency"]
    pushes = [f"push_{side}[{ms}ms]" for ms in CHUNKS_MS for side in ("encode", "decode")]
    firsts = [f"first_{what}[{ms}ms]" for ms in CHUNKS_MS for what in ("packet", "sound")]
    factors = [f"stream_real_time_factor[{ms}ms]" for ms in CHUNKS_MS]
    tokenizer: Any = contender.tokenizer
    try:
        streams = tokenizer.streamer(contender.num_codebooks), tokenizer.decode_streamer()
    except (*_FAILURES, AttributeError) as e:
        why = str(e) if isinstance(e, _FAILURES) else "its codes are the bytes of one file, written when the sound ends"
        timed = [bench.not_run(name, "ms", "lower", why) for name in (*exact, *firsts, *pushes)]
        return timed + [bench.not_run(name, "s/s", "lower", why) for name in factors]
    values = [1000 * float(s.latency_seconds) for s in streams]
    about = "how long a sample's result waits for later input, at most; no computing"
    found = [
        bench.result(n, v, "ms", "lower", counted=about) for n, v in zip(exact, (*values, sum(values)), strict=True)
    ]
    item, _ = _standard(contender, test_set.items[0])
    x = item.x.repeat(1, 1 if context.smoke else 4)
    for ms in CHUNKS_MS:
        stream_once(contender, x, ms)  # warms up
        runs = [stream_once(contender, x, ms) for _ in range(int(bench.option("stream_repeats", 1, 3)))]
        more = {"chunk_ms": ms, "sound_seconds": x.shape[1] / tokenizer.sample_rate}
        for side in ("encode", "decode"):
            spent = [1000 * s for run in runs for s in getattr(run, side)]
            found.append(bench.timed(f"push_{side}[{ms}ms]", spent, "ms", "lower", **more))
        for what in ("packet", "sound"):
            first = [1000 * at for run in runs if (at := getattr(run, what)) is not None]
            words = "from the first sample to the first result: sound waited for, and computing"
            if not first:
                found.append(bench.not_run(f"first_{what}[{ms}ms]", "ms", "lower", "none came before the sound's end"))
                continue
            found.append(bench.timed(f"first_{what}[{ms}ms]", first, "ms", "lower", counted=words, **more))
        factor = [(sum(run.encode) + sum(run.decode)) / more["sound_seconds"] for run in runs]
        found.append(bench.timed(f"stream_real_time_factor[{ms}ms]", factor, "s/s", "lower", **more))
    return found
