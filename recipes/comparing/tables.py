"""README's and the model cards' tables, from results of the benchmark: chosen columns, short, nothing typed by hand."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

from comparing.runs import RUNS, labels_of, spelled_name
from mmtok.bench.records import Result
from mmtok.bench.tables import ORIGINAL, cell_text, markdown_table

TOKENS, SYSTEMS, PROBES, LANGUAGE = "tokens", "systems", "probes", "language"
CONTINUOUS = "continuous["  # labels of the probes of features that no tokenizer made
ANY = ("any",)  # the set of figures that depend on none
CODECS = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "jpeg2000": "JPEG 2000"}
STREAMS = {"opus": "Opus", "mp3": "MP3", "codec2": "Codec 2"}
SETS = {
    "photos": "128 px of photographs",
    "photos-reduced": "128 px of reduced photographs",
    "crops-64": "64 px of photographs",
    "captioned": "captioned pictures, 64 px",
    "speech": "speech, held-out voices",
}


@dataclasses.dataclass(frozen=True)
class Column:
    """One measure of a table.

    Args:
        title: its head. metric: of the results. digits: behind the point.
        part: of the results. sets: where to look, in this order; none: in the table's.
        scale: what the number is multiplied with, e.g. 1e-3 for kbit/s.
        brackets: whether its interval is shown.
        original: whether the untouched items have one that may stand beside the others.
    """

    title: str
    metric: str
    digits: int
    part: str = "reconstruction"
    sets: tuple[str, ...] = ()
    scale: float = 1.0
    brackets: bool = True
    original: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of README: rows are contenders of ``runs``, of ``labels`` only where there are any.

    Args:
        head: of the first column. sets: of the columns that name none. continuous: rows of the continuous features.
        say_set: the row says the pictures that it was measured on.
    """

    head: str
    runs: tuple[str, ...]
    sets: tuple[str, ...]
    columns: tuple[Column, ...]
    labels: tuple[str, ...] = ()
    continuous: bool = False
    say_set: bool = False


BYTES = (
    Column("bytes", "bits_per_item", 0, scale=1 / 8, brackets=False),
    Column("entropy-coded", "entropy_coded_bits_per_item", 0, TOKENS, scale=1 / 8, brackets=False),
)
PSNR, SSIM = Column("PSNR dB", "psnr", 2), Column("SSIM", "ssim", 3)
REDUCED = ("photos-reduced",)
PHOTOS = (
    *BYTES,
    Column("PSNR dB, as taken", "psnr", 2),
    SSIM,
    Column("PSNR dB, reduced", "psnr", 2, sets=REDUCED),
    Column("SSIM", "ssim", 3, sets=REDUCED),
)
CROPS = (*BYTES, PSNR, SSIM)
POSITIONS = Column("positions", "positions_per_item", 1, TOKENS, brackets=False)
CAPTIONED = (POSITIONS, *BYTES, PSNR, SSIM)
LIKENESS = (
    Column("ST-LPIPS, AlexNet", "st_lpips_alex", 3),
    Column("ST-LPIPS, VGG", "st_lpips_vgg", 3),
    Column("semantic similarity", "semantic_similarity", 3),
    Column("FD, EfficientNet-Lite0", "fd[efficientnet-lite0]", 1, original=True),
    Column("FD, nsfwjs InceptionV3", "fd[nsfwjs-inceptionv3]", 1, original=True),
)
KBPS = Column("kbit/s", "bitrate_bps", 1, scale=1e-3, brackets=False)
SIGNAL = (
    Column("PESQ-wb", "pesq_wb", 2),
    Column("STOI", "stoi", 3),
    Column("SI-SDR dB", "si_sdr", 1),
    Column("aligned", "si_sdr_aligned", 1),
    Column("delay, samples", "delay", 0, brackets=False),
)
SPEECH = (
    KBPS,
    Column("entropy-coded", "entropy_coded_bitrate_bps", 2, TOKENS, scale=1e-3, brackets=False),
    *SIGNAL,
    Column("mel distance", "mel_distance", 2),
    Column("DNSMOS", "dnsmos_ovrl", 2, original=True),
    Column("DistillMOS", "distillmos", 2, original=True),
    Column("WER %", "wer", 1, scale=100, original=True),
    Column("speaker similarity", "speaker_similarity", 2),
)
SPEECH_SYSTEMS = (
    Column("parameters, M", "parameters", 2, SYSTEMS, ANY, 1e-6, False),
    Column("encode, of real time", "encode_real_time_factor[batch=1]", 3, SYSTEMS, brackets=False),
    Column("decode", "decode_real_time_factor[batch=1]", 3, SYSTEMS, brackets=False),
    Column("latency ms", "algorithmic_latency", 1, SYSTEMS, (*ANY, "speech"), brackets=False),
    Column("field before, samples", "round_trip_field_left", 0, SYSTEMS, (*ANY, "speech"), brackets=False),
    Column("behind", "round_trip_field_right", 0, SYSTEMS, (*ANY, "speech"), brackets=False),
    Column("peak memory MB, decode", "decode_peak_memory", 0, SYSTEMS, brackets=False),
)
SPEECH_PROBES = (
    Column("speaker %, linear", "accuracy[linear]", 1, PROBES, ("speaker",)),
    Column("conv", "accuracy[conv]", 1, PROBES, ("speaker",)),
    Column("language %, conv", "accuracy[conv]", 1, PROBES, ("language",)),
    Column("word %, conv", "accuracy[conv]", 1, PROBES, ("keyword",)),
    Column("word, other voice", "accuracy_other_voice[conv]", 1, PROBES, ("keyword",)),
    Column("sound %, conv", "accuracy[conv]", 1, PROBES, ("sound",)),
    Column("phone ABX errors %, within", "abx_within[latents]", 1, PROBES, ("phones",)),
    Column("across speakers", "abx_across[latents]", 1, PROBES, ("phones",)),
)
PICTURE_PROBES = (
    Column("subject %, linear", "accuracy[linear]", 1, PROBES, ("subject",)),
    Column("conv", "accuracy[conv]", 1, PROBES, ("subject",)),
    Column("recall@1 % of a crop, codes", "recall@1[crop, codes]", 1, PROBES, ("views",)),
    Column("latents", "recall@1[crop, latents]", 1, PROBES, ("views",)),
    Column("of a JPEG, codes", "recall@1[jpeg, codes]", 1, PROBES, ("views",)),
    Column("recall@5 % by caption, codes", "recall@5[caption, codes]", 1, PROBES, ("captions",)),
    Column("latents", "recall@5[caption, latents]", 1, PROBES, ("captions",)),
)
SPLICES = ("held-out splices",)
SPEECH_MODELS = (
    Column("nominal bit/s", "lm_nominal_bits_per_second", 0, LANGUAGE, brackets=False),
    Column("by frequencies", "lm_order0_bits_per_second", 0, LANGUAGE, brackets=False),
    Column("by the model", "lm_bits_per_second", 0, LANGUAGE),
    Column("speaker kept % of splices", "lm_speaker_consistency", 1, LANGUAGE, SPLICES),
    Column("DNSMOS, reconstructed", "lm_reconstructed_dnsmos_ovrl", 2, LANGUAGE),
    Column("continued", "lm_continued_dnsmos_ovrl", 2, LANGUAGE),
    Column("FAD of other clips", "lm_original_fad[musicnn-mtt]", 1, LANGUAGE),
    Column("reconstructed", "lm_reconstructed_fad[musicnn-mtt]", 1, LANGUAGE),
    Column("continued", "lm_continued_fad[musicnn-mtt]", 1, LANGUAGE),
    Column("unprompted", "lm_unprompted_fad[musicnn-mtt]", 1, LANGUAGE),
)
PICTURE_MODELS = (
    Column("nominal bits", "lm_nominal_bits_per_image", 0, LANGUAGE, brackets=False),
    Column("by frequencies", "lm_order0_bits_per_image", 0, LANGUAGE, brackets=False),
    Column("by the model", "lm_bits_per_image", 0, LANGUAGE),
    Column("halves matched %", "lm_picture_consistency", 1, LANGUAGE),
    Column("FD of other pictures", "lm_original_fd[efficientnet-lite0]", 1, LANGUAGE),
    Column("reconstructed", "lm_reconstructed_fd[efficientnet-lite0]", 1, LANGUAGE),
    Column("drawn", "lm_drawn_fd[efficientnet-lite0]", 1, LANGUAGE),
)
FASTEST = ("audio-codec-16k-4kbps#levels=8", "audio-causal-16k-4kbps#levels=8", "audio-xcodec-16k-4kbps#levels=8")
PICTURES = ("photos", "crops", "captioned")


def studied(*runs: str) -> tuple[str, ...]:
    return tuple(label for name in runs for label in RUNS[name].studied)


# Mark in README -> its tables.
BLOCKS: dict[str, tuple[Table, ...]] = {
    "results:image": (Table(SETS["photos"], ("photos",), ("photos",), PHOTOS),),
    "results:small": (
        Table(SETS["crops-64"], ("crops",), ("crops-64",), CROPS),
        Table(SETS["captioned"], ("captioned",), ("captioned",), CAPTIONED),
    ),
    "results:images-more": tuple(
        Table(SETS[RUNS[name].sets[0]], (name,), RUNS[name].sets[:1], LIKENESS) for name in PICTURES
    ),
    "results:audio": (Table(SETS["speech"], ("speech",), ("speech",), SPEECH),),
    "results:speech-systems": (
        Table(
            "speech, one item a call",
            ("speech",),
            ("speech",),
            SPEECH_SYSTEMS,
            (*FASTEST, *RUNS["speech"].baselines, *RUNS["speech"].classical),
        ),
    ),
    "results:probes": (
        Table("speech and sound, held out", ("speech",), ("speech",), SPEECH_PROBES, studied("speech"), True),
        Table("pictures, held out", PICTURES, (), PICTURE_PROBES, studied(*PICTURES), True),
    ),
    "results:language": (
        Table("language models of speech", ("speech",), ("speech",), SPEECH_MODELS, studied("speech")),
        Table(
            "language models of pictures",
            PICTURES,
            tuple(RUNS[name].sets[0] for name in PICTURES),
            PICTURE_MODELS,
            studied(*PICTURES),
            say_set=True,
        ),
    ),
}


def block_text(tables: Sequence[Table], found: Mapping[str, Sequence[Result]]) -> str:
    """The tables below each other; "" where none has a number. ``found``: the results of each run."""
    return "\n\n".join(text for table in tables if (text := table_text(table, found)))


def table_text(table: Table, found: Mapping[str, Sequence[Result]]) -> str:
    """A table with its notes; rows and columns without a single number are left out, and "" without any."""
    cells = cells_of(table, found)
    there = [j for j in range(len(table.columns)) if any(_has_value(row[j]) for row in cells.values())]
    if not there:
        return ""
    rows = []
    for label, row in cells.items():
        name = row_name(label)
        if label == ORIGINAL and any(table.columns[j].metric.startswith("fd[") for j in there):
            name += " (FD: one half against the other)"
        if table.say_set:
            name += f", {SETS.get(test_set := _set_of(row), test_set)}"
        rows.append([name, *(_text(row[j], table.columns[j]) for j in there)])
    text = markdown_table([table.head, *(table.columns[j].title for j in there)], rows)
    return "\n\n".join([text, *notes({k: row for k, row in cells.items() if k != ORIGINAL}, table.columns)])


def cells_of(table: Table, found: Mapping[str, Sequence[Result]]) -> dict[str, list[Result | None]]:
    """The rows that have a number, by label; each has a place for every column."""
    results = {r.key: r for run in table.runs for r in found.get(run, ())}
    labels = list(table.labels) or [label for run in table.runs for label in labels_of(RUNS[run])]
    if table.continuous:
        labels += dict.fromkeys(key[1] for key in results if key[0] == PROBES and key[1].startswith(CONTINUOUS))
    cells = {label: [_cell(results, table, c, label) for c in table.columns] for label in (*labels, ORIGINAL)}
    return {label: row for label, row in cells.items() if any(map(_has_value, row))}


def unmeasured(table: Table, found: Mapping[str, Sequence[Result]]) -> list[str]:
    """Titles of the columns that a table with numbers lacks because nothing was measured, nor said why not."""
    rows = cells_of(table, found).values()
    return [c.title for j, c in enumerate(table.columns) if rows and all(row[j] is None for row in rows)]


def _has_value(result: Result | None) -> bool:
    return result is not None and result.value is not None


def row_name(label: str) -> str:
    """A contender in words; names that ship are bold."""
    if label == ORIGINAL:
        return "the untouched items"
    name, _, options = label.partition("#")
    key, _, value = options.partition("=")
    if label.startswith(CONTINUOUS):
        return f"{label[len(CONTINUOUS) : -1]}, no tokenizer"
    if key == "bytes":
        return f"{CODECS[name]}, at most {value} bytes"
    family, _, rate = name.partition(":")
    if family in STREAMS:
        return f"{STREAMS[family]} asked for {int(rate) / 1000:g} kbit/s"
    if any(name in run.baselines for run in RUNS.values()):
        return f"plain VQ trained here, {name}"
    more = {"levels": f", {value} levels", "text": ", caption given"}.get(key, "")
    return f"**{name}**{more}"


def _cell(
    results: Mapping[tuple[str, str, str, str], Result], table: Table, column: Column, label: str
) -> Result | None:
    if label == ORIGINAL and not column.original:
        return None
    keys = [(column.part, label, test_set, column.metric) for test_set in column.sets or table.sets]
    there = [results[key] for key in keys if key in results]
    return next((r for r in there if r.value is not None), there[0] if there else None)


def _set_of(row: Sequence[Result | None]) -> str:
    return next(r.test_set for r in row if r is not None)


def _text(result: Result | None, column: Column) -> str:
    if result is None or result.value is None:
        return cell_text(result, 0)
    if result.unit in ("samples", "pixels") and math.isinf(result.value):
        return "whole"  # a field without end
    ends = [v * column.scale if column.brackets and v is not None else None for v in (result.low, result.high)]
    scaled = dataclasses.replace(result, value=result.value * column.scale, low=ends[0], high=ends[1])
    return cell_text(scaled, column.digits)


def notes(cells: Mapping[str, Sequence[Result | None]], columns: Sequence[Column]) -> list[str]:
    """What a reader must know: files above their bytes, items without a value, and why something was not run.

    ``cells``: rows by label. One note a reason, naming its columns and, where it is not all of them, its rows.
    """
    found: dict[str, dict[str, list[str]]] = {}  # reason -> column -> rows
    for label, row in cells.items():
        name = row_name(label).replace("**", "")
        for r, column in zip(row, columns, strict=True):
            for reason, count in _remarks(r):
                found.setdefault(reason, {}).setdefault(column.title, []).append(f"{count}{name}")
    everyone = tuple(row_name(label).replace("**", "") for label in cells)
    lines = []
    for reason, titles in found.items():
        by_rows: dict[tuple[str, ...], list[str]] = {}
        for title, rows in titles.items():
            by_rows.setdefault(tuple(rows), []).append(title)
        parts = [
            ", ".join(titles) + ("" if rows == everyone else f" of {', '.join(rows)}")
            for rows, titles in by_rows.items()
        ]
        lines.append(f"{reason}: {'; '.join(parts)}.")
    return lines


def _brief(r: Result) -> str:
    """The reason without its remedy and its subject, so that contenders can share it; all of it is in the results."""
    reason = re.split(r"[:;](?:\s|$)", r.not_run or "", maxsplit=1)[0]
    return reason.replace(r.contender.partition("#")[0], "it")


def _remarks(r: Result | None) -> Iterator[tuple[str, str]]:
    """Reasons that a reader must know of a cell, each with a count of items ("" where it is the whole cell)."""
    if r is None:
        return
    if r.value is None:
        yield f"Not run ({_brief(r)})", ""
        return
    for reason, count in r.protocol.get("unscored", {}).items():
        yield f"Items without a value, in no mean ({reason})", f"{count} items of "
    if (exact := r.protocol.get("exact", 0)) and math.isfinite(r.value):
        yield "Items that are exact, in no mean", f"{exact} items of "
    above = r.protocol.get("contender", {}).get("above_target") if r.part == "reconstruction" else None
    if above and r.metric == "bits_per_item":
        yield "Pictures whose smallest file is larger", f"{above} of {r.count} of "


# ---- model cards ----

CARD_COLUMNS = {
    "photos": PHOTOS,
    "crops": CROPS,
    "captioned": CAPTIONED,
    "speech": (KBPS, *SIGNAL),
}


def card_table(checkpoint: str, run: str, results: Sequence[Result]) -> str:
    """The scores of one checkpoint at its rates, beside the run's baselines and classical codecs."""
    own = [label for label in labels_of(RUNS[run]) if spelled_name(label) == checkpoint]
    others = [*RUNS[run].baselines, *RUNS[run].classical]
    table = Table(SETS[RUNS[run].sets[0]], (run,), RUNS[run].sets[:1], CARD_COLUMNS[run], (*own, *others))
    return table_text(table, {run: [r for r in results if r.contender != ORIGINAL]})
