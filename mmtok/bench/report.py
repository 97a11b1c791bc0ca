"""Self-contained HTML reports: pictures, sound players, token maps and tables in one file that opens from disk.

`write_report(path, title, sections)` takes plain arrays, so that anything with an original and a reconstruction
can use it. Every picture is a PNG and every sound a 16-bit WAV inside the page: nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import html
import io
import math
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmtok.tokens import write_atomic

MAX_SIDE = 1024  # px; larger pictures are shown smaller, with a remark
MAX_SECONDS = 60.0  # longer sounds are shown by their beginning, with a remark
FLOOR_DB = -80.0
# Anchors of the spectrogram's colours, dark to light, evenly spaced between FLOOR_DB and 0 dB.
HEAT = ((6, 6, 18), (38, 22, 84), (96, 30, 120), (164, 46, 110), (222, 84, 72), (248, 150, 52), (252, 232, 150))


@dataclass(frozen=True)
class TableSection:
    """A table: ``header`` may be empty; every row has as many cells as the header, if there is one."""

    title: str
    rows: Sequence[Sequence[str]]
    header: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True)
class ImageSection:
    """Original beside reconstruction beside their difference; both (C, H, W) float in [0, 1], C = 1, 3 or 4."""

    title: str
    original: np.ndarray
    reconstruction: np.ndarray
    note: str = ""
    gain: float = 4.0


@dataclass(frozen=True)
class AudioSection:
    """Players and log spectrograms of two sounds (C, L) float in [-1, 1] at ``sample_rate`` Hz."""

    title: str
    original: np.ndarray
    reconstruction: np.ndarray
    sample_rate: int
    note: str = ""


@dataclass(frozen=True)
class SoundsSection:
    """Players and log spectrograms of versions of one sound: ``sounds`` are (name, (C, L)), the original first."""

    title: str
    sounds: Sequence[tuple[str, np.ndarray]]
    sample_rate: int
    note: str = ""


@dataclass(frozen=True)
class CodesSection:
    """Token map and codebook usage of the codes (Q, T) of one item, whose level q has ``codebook_sizes[q]`` codes."""

    title: str
    codes: np.ndarray
    codebook_sizes: Sequence[int]
    note: str = ""


@dataclass(frozen=True)
class IdSegment:
    """A run of LLM ids of one ``kind``: text, image, audio or marker."""

    kind: str
    label: str
    ids: Sequence[int]


@dataclass(frozen=True)
class IdsSection:
    """What a language model reads: the first ``head`` ids of each segment, coloured by kind."""

    title: str
    segments: Sequence[IdSegment]
    note: str = ""
    head: int = 40


Section = TableSection | ImageSection | AudioSection | SoundsSection | CodesSection | IdsSection


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> None:
    """Write ``sections`` in order as one HTML file; written aside, then renamed.

    Raises:
        ValueError: a section holds arrays of the wrong shape.
        FileNotFoundError: the folder of ``path`` does not exist.
    """
    write_atomic(path, render(title, sections).encode("utf-8"))


def render(title: str, sections: Sequence[Section]) -> str:
    """The page as text; see `write_report`."""
    parts = []
    for number, section in enumerate(sections):
        note = f"<p class=note>{html.escape(section.note)}</p>" if section.note else ""
        body = RENDERERS[type(section)](section, number)
        parts.append(f"<section><h2>{html.escape(section.title)}</h2>{note}{body}</section>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{CSS}</style></head>'
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def _table(section: TableSection, number: int) -> str:
    widths = {len(row) for row in section.rows} | ({len(section.header)} if section.header else set())
    if len(widths) > 1:
        raise ValueError(f"{section.title}: expected rows of one width, got widths {sorted(widths)}")
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in section.header)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in section.rows)
    return f"<div class=scroll><table>{f'<tr>{header}</tr>' if header else ''}{rows}</table></div>"


def _image(section: ImageSection, number: int) -> str:
    original, reconstruction = pixels(section.original), pixels(section.reconstruction)
    if original.shape != reconstruction.shape:
        raise ValueError(
            f"{section.title}: expected two pictures of one shape, got {original.shape} and {reconstruction.shape}"
        )
    difference = np.abs(original[..., :3].astype(np.float32) - reconstruction[..., :3]) * section.gain
    pictures = (
        ("original", original),
        ("reconstruction", reconstruction),
        (f"difference x {section.gain:g}", np.clip(np.rint(difference), 0, 255).astype(np.uint8)),
    )
    height, width = original.shape[:2]
    shown = min(1.0, MAX_SIDE / max(height, width))
    figures = "".join(_figure(f"{name}, {width} x {height} px", _shrink(array, shown)) for name, array in pictures)
    remark = f"<p class=note>Shown at {shown:.0%} of its size.</p>" if shown < 1 else ""
    # Radio buttons and a check box drive the zoom through CSS alone: the page needs no script.
    controls = "".join(
        f"<input type=radio name=z{number} id=z{number}-{z} class=z{z}{' checked' if z == 1 else ''}>"
        f"<label for=z{number}-{z}>{z} x</label>"
        for z in (1, 2, 4)
    )
    controls += f"<input type=checkbox id=p{number} class=pix><label for=p{number}>pixelated</label>"
    return f"{remark}<div class=viewer>{controls}<div class=pics>{figures}</div></div>"


def _audio(section: AudioSection, number: int) -> str:
    pair = (("original", section.original), ("reconstruction", section.reconstruction))
    return _sounds(SoundsSection(section.title, pair, section.sample_rate), number)


def _sounds(section: SoundsSection, number: int) -> str:
    sounds = [(name, np.asarray(x, dtype=np.float32)) for name, x in section.sounds]
    for _, x in sounds:
        if x.ndim != 2 or x.shape[1] < 1:
            raise ValueError(f"{section.title}: expected sound (C, L) with L >= 1, got {x.shape}")
    shapes = {x.shape for _, x in sounds}
    if len(shapes) != 1:
        raise ValueError(f"{section.title}: expected sounds of one shape, got {sorted(shapes)}")
    length = sounds[0][1].shape[1]
    cut = min(length, math.ceil(MAX_SECONDS * section.sample_rate))
    seconds = length / section.sample_rate
    remark = f"<p class=note>The first {MAX_SECONDS:g} of {seconds:.1f} s.</p>" if cut < length else ""
    spectra = [log_spectrogram(x[:, :cut]) for _, x in sounds]
    top = float(spectra[0].max())  # all are coloured on the original's scale
    figures = []
    for (name, x), spectrum in zip(sounds, spectra, strict=True):
        sound, label = _data_url(wav(x[:, :cut], section.sample_rate), "audio/wav"), html.escape(name)
        player = f'<audio controls preload="metadata" aria-label="{label}" src="{sound}"></audio>'
        image = heat((spectrum - top - FLOOR_DB) / -FLOOR_DB)
        tag = f'<img class=wide alt="spectrogram of the {label}" src="{_data_url(png(image), "image/png")}">'
        height = section.sample_rate / 2
        caption = f"{name}, {cut / section.sample_rate:.2f} s, 0 to {height:g} Hz upwards, {-FLOOR_DB:g} dB range"
        figures.append(f"<figure>{player}{tag}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return remark + "".join(figures)


def _codes(section: CodesSection, number: int) -> str:
    codes = np.asarray(section.codes)
    if codes.ndim != 2 or codes.shape[0] != len(section.codebook_sizes) or codes.shape[1] < 1:
        raise ValueError(f"{section.title}: expected codes ({len(section.codebook_sizes)}, T >= 1), got {codes.shape}")
    Q, T = codes.shape
    cell = max(1, min(16, 160 // Q))  # px of a row, so that the map is about as tall for 1 level as for 32
    picture = np.repeat(code_colours(codes), cell, axis=0)
    source = _data_url(png(picture), "image/png")
    tag = f'<img class="wide map" style="height:{cell * Q}px" alt="token map" src="{source}">'
    rows = []
    for level, (row, size) in enumerate(zip(codes, section.codebook_sizes, strict=True)):
        used, perplexity = usage(row)
        most = min(int(size), T)
        bar = f'<div class=bar style="width:{100 * used / most:.1f}%"></div>'
        text = f"{used} of {size} codes (at most {most} in {T} positions), perplexity {perplexity:.1f}"
        rows.append(f"<tr><td>level {level}</td><td class=track>{bar}</td><td>{text}</td></tr>")
    caption = f"a colour per code; {Q} rows = levels, {T} columns = positions"
    return f"<figure>{tag}<figcaption>{caption}</figcaption></figure><table>{''.join(rows)}</table>"


def _ids(section: IdsSection, number: int) -> str:
    parts = []
    for segment in section.segments:
        kind = segment.kind if segment.kind in ("text", "image", "audio") else "marker"
        shown = " ".join(str(int(i)) for i in segment.ids[: section.head])
        more = len(segment.ids) - section.head
        rest = f" <i>and {more} more</i>" if more > 0 else ""
        parts.append(f'<span class="ids {kind}"><b>{html.escape(segment.label)}</b> {shown}{rest}</span> ')
    return f"<p class=stream>{''.join(parts)}</p>"


RENDERERS = {
    TableSection: _table,
    ImageSection: _image,
    AudioSection: _audio,
    SoundsSection: _sounds,
    CodesSection: _codes,
    IdsSection: _ids,
}


def pixels(x: np.ndarray) -> np.ndarray:
    """(C, H, W) float in [0, 1] to (H, W, C) uint8 with C = 3 or 4; grey becomes three equal channels."""
    x = np.asarray(x, dtype=np.float32)
    if x.ndim != 3 or x.shape[0] not in (1, 3, 4):
        raise ValueError(f"expected a picture (C, H, W) with C = 1, 3 or 4, got shape {x.shape}")
    y = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    return np.repeat(y, 3, axis=2) if y.shape[2] == 1 else y


def png(array: np.ndarray) -> bytes:
    """PNG file of an (H, W, C) uint8 array."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(out, "PNG", optimize=True)
    return out.getvalue()


def wav(x: np.ndarray, sample_rate: int) -> bytes:
    """16-bit WAV file of sound (C, L) float in [-1, 1]; louder samples are clipped."""
    out = io.BytesIO()
    with wave.open(out, "wb") as f:
        f.setnchannels(x.shape[0])
        f.setsampwidth(2)
        f.setframerate(int(sample_rate))
        f.writeframes(np.rint(np.clip(x.T, -1, 1) * 32767).astype("<i2").tobytes())
    return out.getvalue()


def log_spectrogram(x: np.ndarray, n_fft: int = 512, max_columns: int = 1600) -> np.ndarray:
    """(n_fft / 2 + 1, frames) in dB of sound (C, L), channels averaged, Hann window, lowest frequency first."""
    mono = np.asarray(x, dtype=np.float32).mean(axis=0)
    hop = max(n_fft // 4, math.ceil(len(mono) / max_columns))
    mono = np.pad(mono, (n_fft // 2, n_fft // 2 + hop))
    frames = np.lib.stride_tricks.sliding_window_view(mono, n_fft)[::hop]
    magnitude = np.abs(np.fft.rfft(frames * np.hanning(n_fft).astype(np.float32), axis=1))
    return 20 * np.log10(np.maximum(magnitude.T, 1e-7))


def heat(x: np.ndarray) -> np.ndarray:
    """(F, T) in 0..1, lowest frequency first, to an (F, T, 3) uint8 picture, lowest frequency at the bottom."""
    at = np.clip(x[::-1], 0, 1) * (len(HEAT) - 1)
    anchors = np.asarray(HEAT, dtype=np.float32)
    channels = [np.interp(at, np.arange(len(HEAT)), anchors[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def code_colours(codes: np.ndarray) -> np.ndarray:
    """(Q, T) codes to (Q, T, 3) uint8: equal codes share a colour, near codes have hues far apart (golden ratio)."""
    code = np.asarray(codes, dtype=np.float64)
    hue = np.mod(code * 0.6180339887498949, 1.0) * 6
    value = 0.55 + 0.45 * np.mod(code * 0.7548776662466927, 1.0)
    # The three channels of a fully saturated hue are clipped triangles, 120 degrees apart.
    distance = np.stack([np.abs(hue - 3) - 1, 2 - np.abs(hue - 2), 2 - np.abs(hue - 4)], axis=-1)
    return np.rint(255 * value[..., None] * (0.15 + 0.85 * np.clip(distance, 0, 1))).astype(np.uint8)


def usage(row: np.ndarray) -> tuple[int, float]:
    """Distinct codes of one level (T,), and the perplexity exp(-sum p ln p) of their frequencies."""
    counts = np.unique(row, return_counts=True)[1]
    p = counts / counts.sum()
    return len(counts), float(np.exp(-(p * np.log(p)).sum()))


def _shrink(array: np.ndarray, factor: float) -> np.ndarray:
    if factor >= 1:
        return array
    from PIL import Image

    size = (max(1, round(array.shape[1] * factor)), max(1, round(array.shape[0] * factor)))
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))


def _figure(caption: str, array: np.ndarray) -> str:
    height, width = array.shape[:2]
    tag = (
        f'<img alt="{html.escape(caption)}" width={width} height={height} style="--w:{width}px" '
        f'src="{_data_url(png(array), "image/png")}">'
    )
    return f"<figure>{tag}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


CSS = """
:root{color-scheme:light dark;--ink:#1b1d22;--paper:#fff;--soft:#f1f2f5;--line:#c9ccd4;--bar:#3b6fd4;--dim:#5a5f6b}
@media (prefers-color-scheme:dark){:root{
--ink:#e6e7ea;--paper:#16181d;--soft:#23262d;--line:#444954;--bar:#7ba4f4;--dim:#a0a6b3}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);
max-width:76rem;margin:1.5rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid var(--line)}
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.2rem .7rem .2rem 0;text-align:left;vertical-align:top}
tr+tr{border-top:1px solid var(--line)}.scroll{overflow-x:auto}
.note,figcaption{color:var(--dim);font-size:.85rem;margin:.2rem 0}
figure{margin:0 0 1rem}img{display:block;max-width:none}.wide{width:100%;height:auto;border-radius:3px}
.map{image-rendering:pixelated}audio{width:100%;margin-bottom:.3rem}
.viewer>label{margin:0 .8rem 0 .25rem;font-size:.85rem}.pics{--z:1;display:flex;gap:1rem;overflow:auto;margin-top:.5rem}
.pics figure{flex:none}.pics img{width:calc(var(--w)*var(--z));height:auto}
.z2:checked~.pics{--z:2}.z4:checked~.pics{--z:4}.pix:checked~.pics img{image-rendering:pixelated}
.track{width:16rem}.bar{background:var(--bar);height:.8rem;border-radius:2px;margin-top:.35rem;min-width:1px}
.stream{font:13px/1.9 ui-monospace,monospace;overflow-wrap:anywhere}
.ids{padding:.1rem .3rem;border-radius:3px;background:var(--soft);color:var(--ink)}
.text{background:#2f8f4e33}.image{background:#3b6fd433}.audio{background:#d4762f38}.marker{background:#8a8f9b40}
"""
