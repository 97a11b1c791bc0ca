"""How each law of `mmtok.bench.laws` is measured: one function a law, `Subject` -> `Finding`."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmtok.bench.law_probes import Subject
from mmtok.metrics.audio import delay_samples, si_sdr, si_sdr_aligned
from mmtok.tokens import Tokens
from mmtok.vocab import Vocab
from mmtok.vocab.layouts import LAYOUTS

SOUND_TOLERANCE = 1e-4  # of full scale: sums in another order, not another sound
REFUSALS = (ValueError, TypeError)
SOME = 3  # items that the costly laws look at


@dataclasses.dataclass
class Finding:
    """A tally: ``missed`` of ``compared``; with nothing compared the law does not apply, and a note says why."""

    missed: int = 0
    compared: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def count(self, missed: int, compared: int, note: str = "") -> None:
        self.missed += missed
        self.compared += compared
        if missed and note:
            self.notes.append(note)

    def case(self, good: bool, note: str) -> None:
        """One yes or no; ``note`` is kept when it is no."""
        self.count(int(not good), 1, note)

    def codes(self, found: Tokens, wanted: Tokens, note: str = "") -> None:
        """Codes of one item against those that it should have; positions that only one of them has are misses."""
        a, b = found.codes[0], wanted.codes[0]
        Q, T = min(len(a), len(b)), min(a.shape[1], b.shape[1])
        total = max(len(a), len(b)) * max(a.shape[1], b.shape[1])
        same = int((a[:Q, :T].cpu() == b[:Q, :T].cpu()).sum())
        self.count(total - same, total, note)

    def output(self, found: Any, wanted: Any, tolerance: float, note: str = "") -> None:
        """Two decoded items, sample by sample."""
        a, b = first(found), first(wanted)
        if a.shape != b.shape:
            self.count(b.numel(), b.numel(), note or f"shape {tuple(a.shape)}, not {tuple(b.shape)}")
            return
        self.count(int(((a - b).abs() > tolerance).sum()), b.numel(), note)

    def skip(self, why: str) -> Finding:
        self.notes.append(why)
        return self


def first(decoded: Any) -> Tensor:
    """The only item of a decoded batch."""
    return decoded[0]


def variety(s: Subject) -> Finding:
    finding, Q = Finding(), s.tokenizer.spec.num_codebooks
    codes = torch.cat([s.alone(i).codes[0].cpu() for i in range(len(s.clips))], 1)
    dull = sum(len(level.unique()) == 1 for level in codes)
    finding.count(Q if dull == len(codes) else 0, Q, "every code of a level is the same, on every input")
    if 0 < dull < len(codes):
        finding.notes.append(f"{dull} of {len(codes)} levels have one code only")
    return finding


def padding(s: Subject) -> Finding:
    finding = Finding()
    for order in (range(len(s.clips)), reversed(range(len(s.clips)))):
        members = list(order)
        batch = s.encode([s.clips[i] for i in members])
        for place, i in enumerate(members):
            finding.codes(batch[place], s.alone(i))
    return finding


def batch_size(s: Subject) -> Finding:
    finding, batch = Finding(), s.encode(s.alike)
    for i, clip in enumerate(s.alike):
        finding.codes(batch[i], s.encode(clip))
    return finding


def batch_shape(s: Subject) -> Finding:
    finding = Finding()
    target, *others = s.alike
    wanted = s.encode(target)
    for batch in ([target], [others[0], target], [*others, target], [target, *others, *others], [target] * 4):
        tokens = s.encode(batch)
        for place, clip in enumerate(batch):
            if clip is target:
                finding.codes(tokens[place], wanted, f"in a batch of {len(batch)}")
    return finding


def chunking(s: Subject) -> Finding:
    finding, tok = Finding(), s.tokenizer
    if not s.audio:
        return finding.skip("pictures are not cut")
    if not getattr(tok, "mitigated", True):
        return naive_cut(s)
    whole = s.alone(0)
    if getattr(tok, "streams", False):
        streamed(s, finding, whole)
        return finding
    encodes, decodes = (getattr(tok, name, 0) is not None for name in ("encode_margin", "decode_margin"))
    if not hasattr(tok, "chunk_frames") or not (encodes or decodes):
        return finding.skip("encodes and decodes the whole at once: what a code depends on is unbounded")
    wanted = tok.decode(whole) if decodes else None
    with attribute(tok, "chunk_frames", max(1, whole.codes.shape[2] // 5)):
        finding.codes(s.encode(s.clips[0]), whole, "encoding in pieces")
        if wanted is not None:
            finding.output(tok.decode(whole), wanted, SOUND_TOLERANCE, "decoding in pieces")
    return finding


def streamed(s: Subject, finding: Finding, whole: Tokens) -> None:
    """The streamers of a causal tokenizer, pieces of random length."""
    rng = np.random.default_rng(s.seed)
    tok: Any = s.tokenizer
    encoder, parts, clip, at = tok.streamer(), [], s.clips[0], 0
    while at < clip.shape[1]:
        size = int(rng.integers(1, 4 * s.hop))
        parts.append(encoder.push(clip[:, at : at + size], s.rate))
        at += size
    parts.append(encoder.flush())
    finding.codes(Tokens.join([p for p in parts if p is not None]), whole, "streamed encoding")
    decoder, sound, at = tok.decode_streamer(), [], 0
    T = whole.codes.shape[2]
    channels = int(whole.side["channels"][0])
    while at < T:
        size = channels * int(rng.integers(1, 7))
        codes = whole.codes[..., at : at + size]
        length = torch.tensor([codes.shape[2]])
        side = {k: v for k, v in whole.side.items() if k != "num_samples"}
        sound.append(decoder.push(Tokens(codes, length, whole.spec, side)))
        at += size
    sound.append(decoder.flush())
    joined = torch.cat([y if y.ndim == 2 else y[0] for y in sound if y is not None and y.numel()], -1)
    wanted = first(tok.decode(whole))
    finding.output([joined[:, : wanted.shape[1]]], [wanted], SOUND_TOLERANCE, "streamed decoding")


def naive_cut(s: Subject) -> Finding:
    finding = Finding()
    if not s.audio:
        return finding.skip("pictures are not cut")
    if not hasattr(s.tokenizer, "hop_length"):
        return finding.skip("no frames to cut between")
    whole, clip = s.alone(0), s.clips[0]
    step = s.hop * int(getattr(s.tokenizer, "frame_group", 1))
    cut = clip.shape[1] // 2 // step * step
    if not cut:
        return finding.skip(f"the sound has less than two frames of {step} samples")
    parts = [s.encode(part) for part in (clip[:, :cut], clip[:, cut:])]
    finding.codes(Tokens.join([dataclasses.replace(p, side={}) for p in parts]), whole, "cut in two, encoded apart")
    return finding


def levels(s: Subject) -> Finding:
    finding = Finding()
    Q, given = s.tokenizer.spec.num_codebooks, s.alone(0).codes.shape[1]
    finding.count(Q - given, Q, f"encode() without a rate gives {given} of {Q} levels")
    return finding


def prefix(s: Subject) -> Finding:
    finding, tok = Finding(), s.tokenizer
    Q = tok.spec.num_codebooks
    full = s.encode(s.clips[2], num_codebooks=Q)
    for k in sorted({1, -(-Q // 2), Q}):
        asked = s.encode(s.clips[2], num_codebooks=k)
        finding.codes(asked, full.keep(k), f"{k} of {Q} levels")
        if tok.encode_only:
            continue
        y = first(tok.decode(full.keep(k)))
        finding.case(bool(y.isfinite().all()), f"{k} of {Q} levels decode to what is not finite")
    T = int(full.lengths[0])
    for t in sorted({1, max(1, T // 2), T}):
        finding.codes(
            s.encode(s.clips[2], num_codebooks=Q, num_tokens=t), full.keep(num_tokens=t), f"{t} of {T} tokens"
        )
        try:
            good = bool(first(tok.decode(full.keep(num_tokens=t))).isfinite().all())
        except ValueError as e:  # a file format may need its end; it must say so
            finding.case(True, "")
            finding.notes.append(f"{t} of {T} tokens are refused: {one_line(e)}")
            continue
        finding.case(good, f"{t} of {T} tokens decode to what is not finite")
    return finding


def round_trip(s: Subject) -> Finding:
    finding, tok = Finding(), s.tokenizer
    for i in range(min(SOME, len(s.clips))):
        tokens = s.alone(i)
        with tempfile.TemporaryDirectory() as folder:
            tokens.save(Path(folder) / "t.safetensors")
            finding.codes(Tokens.load(Path(folder) / "t.safetensors"), tokens, "through a file")
        spec = tokens.spec
        for layout in LAYOUTS:
            try:
                vocab = Vocab(1000, **{tok.modality: spec}, layout=layout)
            except ValueError as e:
                finding.notes.append(one_line(e))
                continue
            part = vocab.unpack(vocab.pack([tokens]))[0]
            if not isinstance(part, Tokens):
                finding.case(False, f"{layout}: ids do not come back as tokens")
                continue
            finding.codes(part, tokens, f"through ids, {layout}")
            if i == 0 and layout == "flatten" and not tok.encode_only:
                with same_noise(s):
                    wanted = tok.decode(tokens)
                with same_noise(s):
                    finding.output(tok.decode(part), wanted, SOUND_TOLERANCE, "decoded from ids")
    return finding


def in_range(s: Subject) -> Finding:
    finding = Finding()
    for i in range(len(s.clips)):
        tokens = s.alone(i)
        sizes = torch.tensor(tokens.spec.codebook_sizes)[:, None]
        codes = tokens.codes[0].cpu()
        finding.count(int(((codes < 0) | (codes >= sizes)).sum()), codes.numel(), "codes outside 0..K-1")
    return finding


def foreign_ids(s: Subject) -> Finding:
    finding, tokens = Finding(), s.alone(0)
    spec = dataclasses.replace(tokens.spec, fingerprint="another")
    other = Tokens(tokens.codes, tokens.lengths, spec, tokens.side)
    finding.case(refused(lambda: s.tokenizer.decode(other)), "decodes ids of another tokenizer")
    for code in (-1, max(tokens.spec.codebook_sizes)):
        codes = tokens.codes.clone()
        codes[0, 0, 0] = code
        wrong = Tokens(codes, tokens.lengths, tokens.spec, tokens.side)
        finding.case(refused(lambda wrong=wrong: s.tokenizer.decode(wrong)), f"decodes the code {code}")
    return finding


def determinism(s: Subject) -> Finding:
    finding, tok = Finding(), s.tokenizer
    for i in range(min(SOME, len(s.clips))):
        tokens = s.encode(s.clips[i])  # not `alone`: that may have drawn the very noise that a second try draws here
        finding.codes(s.encode(s.clips[i]), tokens, "encode twice")
        if tok.encode_only:
            continue
        one, two = tok.decode(tokens), tok.decode(tokens)
        if not torch.equal(first(one), first(two)):
            one, two = (tok.decode(tokens, generator=torch.Generator().manual_seed(5)) for _ in range(2))
            if torch.equal(first(one), first(two)):
                finding.notes.append("decode draws noise; generator= makes it repeatable")
        finding.output(two, one, 0.0, "decode twice")
    return finding


def input_types(s: Subject) -> Finding:
    finding, clip = Finding(), s.clips[2]
    if s.audio:
        integers = (clip * 32767).round().to(torch.int16)
        same = integers.float() / 32768
    else:
        integers = (clip * 255).round().to(torch.uint8)
        same = integers.float() / 255
    wanted = s.encode(same)
    arrays = integers.numpy() if s.audio else integers.permute(1, 2, 0).numpy()
    for name, x in (("integers", integers), ("array", arrays), ("float64", same.double()), ("list", [same])):
        finding.codes(s.encode(x), wanted, name)
    return finding


def dtype(s: Subject) -> Finding:
    finding = Finding()
    for i in range(min(SOME, len(s.clips))):
        with torch.autocast(s.tokenizer.device.type, torch.bfloat16):
            finding.codes(s.encode(s.clips[i]), s.alone(i))
    return finding


def device(s: Subject) -> Finding:
    finding = Finding()
    if not torch.cuda.is_available():
        return finding.skip("no CUDA device here")
    there = "cpu" if s.tokenizer.device.type == "cuda" else "cuda"
    other = copy.deepcopy(s.tokenizer).to(there)
    for i in range(min(SOME, len(s.clips))):
        finding.codes(other.encode(s.clips[i], s.rate), s.alone(i), f"on {there}")
    return finding


def idempotence(s: Subject) -> Finding:
    finding = Finding()
    for i in range(min(SOME, len(s.clips))):
        finding.codes(s.encode(first(s.tokenizer.decode(s.alone(i))).clamp(-1 if s.audio else 0, 1)), s.alone(i))
    return finding


def exact_size(s: Subject) -> Finding:
    finding, tok = Finding(), s.tokenizer
    for i, clip in enumerate(s.clips):
        finding.case(*sized(first(tok.decode(s.alone(i))), clip))
    if s.audio:
        for rate, channels in ((8000, 1), (44100, 2)):
            clip = s.noise(channels, rate // 4 + 3)
            finding.case(*sized(first(tok.decode(tok.encode(clip, rate))), clip, f" at {rate} Hz"))
    else:
        for channels in (1, 4):
            clip = torch.rand(channels, 40, 52, generator=s.generator)
            finding.case(*sized(first(tok.decode(tok.encode(clip))), clip))
    return finding


def odd_sizes(s: Subject) -> Finding:
    hop = s.hop
    shapes = [(1, n) for n in (1, hop - 1, hop, hop + 1, 7 * hop + 13)]
    shapes = shapes if s.audio else [(3, *hw) for hw in ((1, 1), (1, 37), (37, 2), (15, 16), (65, 33))]
    finding = Finding()
    for shape in shapes:
        clip = s.noise(*shape) if s.audio else torch.rand(shape, generator=s.generator)
        try:
            tokens = s.encode(clip)
            y = clip if s.tokenizer.encode_only else first(s.tokenizer.decode(tokens))
        except (ValueError, RuntimeError, IndexError, TypeError, AssertionError) as e:
            finding.case(False, f"{shape}: {one_line(e)}")
            continue
        finding.case(*sized(y, clip))
    return finding


def extreme_inputs(s: Subject) -> Finding:
    finding = Finding()
    n = max(3 * s.hop, 3000)
    if s.audio:
        square = torch.ones(1, n).where(torch.arange(n) // 25 % 2 == 0, torch.tensor(-1.0))
        impulse = torch.zeros(1, n).index_fill_(1, torch.tensor([n // 2]), 1.0)
        inputs = {"silence": torch.zeros(1, n), "full scale": square, "constant": torch.ones(1, n)}
        inputs |= {"impulse": impulse, "tiny": s.noise(1, n) * 1e-30}
        bad: dict[str, Any] = {"NaN": torch.full((1, n), torch.nan), "infinity": torch.full((1, n), torch.inf)}
        bad |= {"no samples": torch.zeros(1, 0), "nothing": []}
    else:
        board = ((torch.arange(40)[:, None] + torch.arange(48)) % 2).float().expand(3, -1, -1)
        inputs = {"black": torch.zeros(3, 40, 48), "white": torch.ones(3, 40, 48), "checkerboard": board}
        bad = {"NaN": torch.full((3, 40, 48), torch.nan), "infinity": torch.full((3, 40, 48), torch.inf)}
        bad |= {"no pixels": torch.zeros(3, 0, 5), "two channels": torch.zeros(2, 9, 9), "nothing": []}
    for name, x in inputs.items():
        try:
            tokens = s.encode(x)
            good = s.tokenizer.encode_only or bool(first(s.tokenizer.decode(tokens)).isfinite().all())
        except (ValueError, RuntimeError, IndexError, TypeError, AssertionError) as e:
            finding.case(False, f"{name}: {one_line(e)}")
            continue
        finding.case(good, f"{name}: the output is not finite")
    for name, x in bad.items():
        finding.case(refused(lambda x=x: s.encode(x)), f"{name} is not refused by a ValueError")
    if s.audio:
        finding.case(refused(lambda: s.tokenizer.encode(torch.zeros(1, n))), "an array without its rate is not refused")
    return finding


def delay(s: Subject) -> Finding:
    finding, tok = Finding(), s.tokenizer
    if not s.audio:
        return finding.skip("pictures have no delay")
    clip, rate = s.clips[0][None, :1], int(s.rate or 0)
    y = first(tok.decode(s.encode(clip[0])))[None]
    y = torch.nn.functional.pad(y, (0, clip.shape[-1] - y.shape[-1]))  # raw output may have another length
    try:
        raw, aligned = float(si_sdr(clip, y, rate)), float(si_sdr_aligned(clip, y, rate))
        samples = int(delay_samples(clip, y, rate))
    except ValueError as e:
        return finding.skip(one_line(e))
    if aligned >= 0:
        costs = f"{samples} samples late: SI-SDR {raw:.1f}, aligned {aligned:.1f} dB"
        finding.case(samples == 0 or aligned - raw < 0.5, costs)
        finding.notes.append(f"{samples} samples")
        return finding
    declared = int(getattr(tok, "delay_samples", 0))
    if declared and not getattr(tok, "mitigated", True):
        words = f"{abs(declared)} samples {'late' if declared > 0 else 'early'}"
        finding.case(False, f"the published networks are {words}, says the wrapper (not measurable on this one)")
        return finding
    undone = f"; the wrapper undoes {declared} samples" if declared else ""
    return finding.skip(f"the output is too unlike the input to tell (SI-SDR {aligned:.1f} dB at best){undone}")


MEASURES: dict[str, Callable[[Subject], Finding]] = {
    "variety": variety,
    "padding": padding,
    "batch size": batch_size,
    "batch shape": batch_shape,
    "chunking": chunking,
    "naive cut": naive_cut,
    "levels": levels,
    "prefix": prefix,
    "round trip": round_trip,
    "range": in_range,
    "foreign ids": foreign_ids,
    "determinism": determinism,
    "input types": input_types,
    "dtype": dtype,
    "device": device,
    "idempotence": idempotence,
    "exact size": exact_size,
    "odd sizes": odd_sizes,
    "extreme inputs": extreme_inputs,
    "delay": delay,
}


def sized(y: Tensor, x: Tensor, where: str = "") -> tuple[bool, str]:
    """Whether ``y`` has the shape of ``x`` and is finite, and what to say if not."""
    if y.shape != x.shape:
        return False, f"{tuple(x.shape)}{where} comes back as {tuple(y.shape)}"
    return bool(y.isfinite().all()), f"{tuple(x.shape)}{where} comes back with values that are not finite"


def refused(attempt: Callable[[], Any]) -> bool:
    """Whether it raises the error of bad input, and no other."""
    try:
        attempt()
    except REFUSALS:
        return True
    except Exception:
        return False
    return False


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


@contextlib.contextmanager
def attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` set to ``value`` inside the block."""
    former = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, former)


@contextlib.contextmanager
def same_noise(s: Subject) -> Iterator[None]:
    """Decoders that draw from the global generator draw the same inside two such blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        yield
