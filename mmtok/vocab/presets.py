"""Published id conventions: a codec's Tokens as the very ids that a released language model reads, and back.

`Vocab` lays ids out anew; a preset writes those that a system was trained with, so that its prompts and outputs can be
read, checked position by position, and decoded. `PRESETS` maps the names to the classes::

    orpheus = PRESETS["orpheus"](snac.spec)
    ids = orpheus.pack(tokens)              # 128257, seven ids a frame, 128258
    tokens = orpheus.unpack(ids)

Codes come back with the spec that the preset was given; sizes, rates and channel counts are no part of any of these
conventions, so there are no side entries, and sound must be mono. The ids are parameters with the published defaults;
`special` has those that are no codes, by name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mmtok.tokens import Tokens, TokensError, TokenSpec
from mmtok.vocab.frames import Cell, FlatPreset, Preset, check_partial
from mmtok.vocab.tables import code_mask, from_tables, to_tables, valid_steps

# YuE's mm-v0.2 vocabulary of 83 734 ids: first id, levels and codebook size of each block of codes.
YUE_BLOCKS = {
    "dac_16k": (32_022, 4, 1024),
    "dac_44k": (36_118, 9, 1024),
    "xcodec": (45_334, 12, 1024),
    "mert": (57_622, 1, 1024),
    "hubert": (58_646, 1, 512),
    "semanticodec": (59_158, 1, 16_384),
    "semanticodec_acoustic": (75_542, 1, 8192),
}
YUE_SPECIAL = {
    "eod": 32_000,
    "soa": 32_001,
    "eoa": 32_002,
    "stage_1": 32_013,
    "dac_16k": 32_014,
    "dac_44k": 32_015,
    "xcodec": 32_016,
    "stage_2": 32_017,
}


class SeedLlama(FlatPreset):
    """SEED-LLaMA (arXiv 2310.01218; AILab-CVC/SEED): ``<img>``, 32 codes, ``</img>``; code k is id 32000 + k.

    The codes' offset is the repository's; the ids of the two marks follow from the order in which the tokens were added
    and are looked up through its tokenizer there, so give ``begin`` and ``end`` where yours says otherwise.
    """

    def __init__(
        self,
        spec: TokenSpec,
        image_id_shift: int = 32_000,
        begin: int = 40_192,
        end: int = 40_193,
        codebook_size: int = 8192,
        num_tokens: int = 32,
    ) -> None:
        special = {"<img>": begin, "</img>": end}
        cells = [Cell("an image code", 0, 0, range(image_id_shift, image_id_shift + codebook_size))]
        counts = range(num_tokens, num_tokens + 1)
        super().__init__(spec, special, cells, "image", (codebook_size,), begin=("<img>",), end="</img>", counts=counts)
        _check_num_tokens(spec, num_tokens)


class LaVIT(FlatPreset):
    """LaVIT (arXiv 2309.04669; jy0205/LaVIT): 32000 [IMG], code k -> 32002 + k, 32001 [/IMG]; 0 to 256 codes."""

    def __init__(
        self,
        spec: TokenSpec,
        begin: int = 32_000,
        end: int = 32_001,
        first: int = 32_002,
        codebook_size: int = 16_384,
        num_tokens: int = 256,
    ) -> None:
        special = {"[IMG]": begin, "[/IMG]": end}
        cells = [Cell("an image code", 0, 0, range(first, first + codebook_size))]
        counts = range(num_tokens + 1)
        super().__init__(spec, special, cells, "image", (codebook_size,), begin=("[IMG]",), end="[/IMG]", counts=counts)
        _check_num_tokens(spec, num_tokens)


def _check_num_tokens(spec: TokenSpec, num_tokens: int) -> None:
    if spec.num_tokens != num_tokens:
        raise ValueError(f"expected the spec of a tokenizer with num_tokens = {num_tokens}, got {spec.num_tokens}")


class Orpheus(FlatPreset):
    """Orpheus (canopyai/Orpheus-TTS): SNAC at 24 kHz, seven ids for each four positions, 128266 + place * 4096 + code.

    The order is c0, c1a, c2a, c2b, c1b, c2c, c2d. A prompt is start_of_human, text, end_of_text, end_of_human,
    start_of_ai, start_of_speech; `pack` begins with the last of them, which a model's own ids lack: join it, or read
    them without markers once end_of_speech is cut off.

    Its own decoder takes a code 0 for no code, which shifts all after it by one place (issues 81 and 230), accepts code
    4096, which does not exist, and decodes an incomplete last frame to noise (issue 200). Here 0 is a code, 4096 is
    refused, and the rest of a frame is refused or dropped, see ``partial``.
    """

    def __init__(
        self, spec: TokenSpec, text_size: int = 128_256, end_of_text: int = 128_009, codebook_size: int = 4096
    ) -> None:
        names = ("start_of_speech", "end_of_speech", "start_of_human", "end_of_human", "start_of_ai")
        special = {name: text_size + 1 + n for n, name in enumerate(names)} | {"end_of_text": end_of_text}
        order = ((0, 0), (1, 0), (2, 0), (2, 1), (1, 2), (2, 2), (2, 3))  # level, position in the frame
        first = [text_size + 10 + n * codebook_size for n in range(len(order))]
        cells = [
            Cell(f"a code of level {q} at place {n}", q, t, range(first[n], first[n] + codebook_size))
            for n, (q, t) in enumerate(order)
        ]
        begin, end = ("start_of_speech",), "end_of_speech"
        super().__init__(spec, special, cells, "audio", (codebook_size,) * 3, (4, 2, 1), begin, end)


class Llasa(FlatPreset):
    """Llasa (arXiv 2502.04128; zhenye234/LLaSA_training): Llama 3's text, 8 marks, X-Codec-2's 65536 codes.

    ``text_size`` is the length of the tokenizer before the marks, so code k is id text_size + 8 + k.
    """

    def __init__(self, spec: TokenSpec, text_size: int = 128_256, codebook_size: int = 65_536) -> None:
        kinds = ("TEXT_GENERATION", "TEXT_UNDERSTANDING", "SPEECH_GENERATION", "SPEECH_UNDERSTANDING")
        names = [f"<|{kind}_{edge}|>" for kind in kinds for edge in ("START", "END")]
        special = {name: text_size + n for n, name in enumerate(names)}
        cells = [Cell("a speech code", 0, 0, range(text_size + 8, text_size + 8 + codebook_size))]
        super().__init__(spec, special, cells, "audio", (codebook_size,), begin=(names[4],), end=names[5])


class YuEStage1(FlatPreset):
    """YuE's first model (arXiv 2503.08638; multimodal-art-projection/YuE): level 0 of X-Codec, two tracks in one.

    SOA <xcodec> v0 i0 v1 i1 ... EOA: vocals and instruments take turns frame by frame, both as 45334 + code. `pack`
    takes Tokens of two items, vocals first, of one length and of level 0 only (``tokens.keep(num_codebooks=1)``), and
    `unpack` gives such; ``tracks=1`` is the reference of a finished mix. The system drops a last vocal code without
    its instrumental one: ``partial="drop"``.
    """

    def __init__(
        self,
        spec: TokenSpec,
        tracks: int = 2,
        first: int = YUE_BLOCKS["xcodec"][0],
        codebook_sizes: Sequence[int] = (1024,) * 8,
    ) -> None:
        if tracks not in (1, 2):
            raise ValueError(f"tracks: expected 1 (a mix) or 2 (vocals and instruments), got {tracks}")
        of = ("",) if tracks == 1 else (" of the vocals", " of the instruments")
        cells = [
            Cell(f"a code of level 0{of[n]}", n, 0, range(first, first + codebook_sizes[0])) for n in range(tracks)
        ]
        begin, end = ("soa", "xcodec"), "eoa"
        super().__init__(spec, dict(YUE_SPECIAL), cells, "audio", codebook_sizes, begin=begin, end=end, items=tracks)
        self.written = spec.keep(1)

    def _rows(self, codes: np.ndarray, lengths: list[int]) -> np.ndarray:
        if len(set(lengths)) != 1:
            raise TokensError(f"expected tracks of one length, got {lengths} positions; cut both clips alike")
        return codes[:, 0, : lengths[0]]

    def _codes(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, None]


class YuEStage2(FlatPreset):
    """YuE's second model (arXiv 2503.08638; multimodal-art-projection/YuE): levels 1 to 7 added to level 0.

    SOA <stage_1>, level 0 of all frames, <stage_2>, then frame by frame all 8 levels, 45334 + level * 1024 + code. The
    model writes the 7 upper ones, ids 46358 to 53525 (`generated`). Its decoder replaces a code of the wrong level by
    the most frequent one; here it is refused. ``markers=False`` has the frames alone.
    """

    def __init__(
        self, spec: TokenSpec, first: int = YUE_BLOCKS["xcodec"][0], codebook_sizes: Sequence[int] = (1024,) * 8
    ) -> None:
        stops = np.cumsum([first, *codebook_sizes]).tolist()
        cells = [Cell(f"a code of level {q}", q, 0, range(stops[q], stops[q + 1])) for q in range(len(codebook_sizes))]
        super().__init__(spec, dict(YUE_SPECIAL), cells, "audio", codebook_sizes, begin=("soa", "stage_1"))
        self.generated = range(stops[1], stops[-1])

    def _opening(self, rows: np.ndarray) -> list[int]:
        base = (self.cells[0].ids.start + rows[0]).tolist()
        return [*super()._opening(rows), *base, self.special["stage_2"]]

    def _read_opening(self, array: np.ndarray) -> int:
        super()._read_opening(array)
        ids, mark = self.cells[0].ids, self.special["stage_2"]
        other = np.flatnonzero((array[2:] < ids.start) | (array[2:] >= ids.stop))[:1].tolist()
        stop = 2 + other[0] if other else len(array)
        if stop == len(array) or array[stop] != mark:
            self.refuse(array, stop, f"{self.cell_words(0)} or stage_2 ({mark})")
        return stop + 1

    def _check_rows(self, array: np.ndarray, start: int, rows: np.ndarray, partial: str) -> None:
        base, F, C = array[2 : start - 1] - self.cells[0].ids.start, rows.shape[1], len(self.cells)
        if len(array) - start > len(base) * C:
            self.refuse(array, start + len(base) * C, f"the end of the sequence after {len(base)} frames")
        differ = np.flatnonzero(rows[0] != base[:F])
        if len(differ):
            at = int(differ[0])
            self.refuse(array, start + at * C, f"{array[2 + at]}, level 0 of frame {at} as at position {2 + at}")
        if len(base) > F and partial == "refuse":
            self.refuse(array, start + F * C, f"{self.cell_words(0)} of frame {F} of {len(base)}")


class TablePreset(Preset):
    """Ids (B, Q, S) without offsets, one row a level: see `mmtok.vocab.tables`."""

    def __init__(self, spec: TokenSpec, codebook_sizes: Sequence[int], special: dict[str, int]) -> None:
        if len(set(codebook_sizes)) != 1:
            sizes = tuple(codebook_sizes)
            raise ValueError(f"codebook_sizes: expected one size, as all levels share one empty id, got {sizes}")
        super().__init__(spec, "audio", codebook_sizes, (1,) * len(codebook_sizes), special)

    def _read(
        self, ids: Tensor, spec: TokenSpec, delays: Sequence[int], special: int, initial: int, partial: str, extra: int
    ) -> Tokens:
        """Tokens from a table whose cells are codes, ``special``, ``initial`` or ids from ``extra`` up to the codes."""
        check_partial(partial)
        if partial == "refuse":
            return from_tables(ids, spec, delays, special, initial=initial)
        lengths = valid_steps(ids, spec, delays, initial=initial)
        tokens = from_tables(ids, spec, delays, special, lengths, initial)
        sizes = torch.tensor(spec.codebook_sizes, device=ids.device)[:, None]  # (Q, 1)
        foreign = ((ids < extra) | (ids > sizes)).transpose(1, 2).nonzero()
        if len(foreign):
            b, s, q = (int(v) for v in foreign[0])
            expected = f"a code in 0..{spec.codebook_sizes[q] - 1} or an empty cell"
            raise TokensError(f"item {b}, level {q}, step {s}: expected {expected}, got {int(ids[b, q, s])}")
        codes = ((ids >= 0) & (ids < sizes)).sum((1, 2))
        tokens.side["dropped_ids"] = codes - lengths * spec.num_codebooks
        return tokens


class MusicGen(TablePreset):
    """MusicGen (arXiv 2306.05284; facebookresearch/audiocraft): four tables, delays 0 to 3, 2048 where no code is.

    The ids (B, 4, S) begin with a column of 2048, S = 1 + T + 3. Each table of the model has 2049 rows.
    """

    def __init__(
        self, spec: TokenSpec, codebook_sizes: Sequence[int] = (2048,) * 4, delays: Sequence[int] | None = None
    ) -> None:
        super().__init__(spec, codebook_sizes, {"special": codebook_sizes[0]})
        self.delays = tuple(range(len(codebook_sizes)) if delays is None else delays)

    def pack(self, tokens: Tokens) -> Tensor:
        """(B, 4, 1 + T + 3) int64, on the device of the codes."""
        self.checked(tokens, self.spec, None)
        return to_tables(tokens, self.delays, self.special["special"], self.special["special"])

    def unpack(self, ids: Tensor, partial: str = "refuse") -> Tokens:
        """The Tokens of a table (B, 4, S), on its device.

        ``partial="drop"`` reads the positions that are complete in a table that stops anywhere, and counts the codes
        of the others in ``side["dropped_ids"]``. TokensError names a cell that has something else than it must have.
        """
        empty = self.special["special"]
        return self._read(ids, self.spec, self.delays, empty, empty, partial, extra=0)


class Moshi(TablePreset):
    """Moshi (arXiv 2410.00037; kyutai-labs/moshi): 17 streams, text, 8 levels of its own voice, 8 of the user's.

    Delays 0, then twice 0 and seven times 1. The first column is 32000 for text and 2048 for sound, which also fill the
    cells before a level's first code. Text is 0..31999: ids of words, 3 between them (``text_pad``), 0 before the next
    (``text_end_pad``). -1 is a cell without embedding and loss (``zero``: all after an item's end), -2 one that the
    model shall fill (``ungenerated``). S = 1 + T + 1; the system itself cuts the last column, ``ids[..., :-1]``, and
    then reads one position less.
    """

    def __init__(self, spec: TokenSpec, codebook_sizes: Sequence[int] = (2048,) * 8, text_size: int = 32_000) -> None:
        special = {"audio_initial": codebook_sizes[0], "text_initial": text_size, "text_pad": 3, "text_end_pad": 0}
        super().__init__(spec, codebook_sizes, special | {"zero": -1, "ungenerated": -2})
        self.text_size, self.level_delays = text_size, (0, *(1,) * (len(codebook_sizes) - 1))
        self.delays = (0, *self.level_delays, *self.level_delays)

    def pack(
        self, tokens: Tokens, user: Tokens | None = None, text: Tensor | None = None, missing: str = "zero"
    ) -> Tensor:
        """(B, 17, 1 + T + 1) int64, on the device of the codes.

        Args:
            tokens: its own voice. user: the other voice, of the same lengths. text: (B, T) ids, one a position.
            missing: what stands in the streams that are not given, ``zero`` or ``ungenerated``.
        """
        if missing not in ("zero", "ungenerated"):
            raise ValueError(f"missing: expected 'zero' or 'ungenerated', got {missing!r}")
        own = self.checked(tokens, self.spec, None)
        zero, first = self.special["zero"], self.special["audio_initial"]
        B, Q, T = own.shape
        voices = [to_tables(tokens, self.level_delays, zero, first)]
        filled = torch.where(tokens.mask, self.special[missing], zero)  # (B, T)
        if user is None:
            absent = Tokens(torch.zeros_like(own), tokens.lengths, self.spec)
            table = to_tables(absent, self.level_delays, zero, first)
            voices.append(torch.where(code_mask(absent, self.level_delays, first), self.special[missing], table))
        else:
            self.checked(user, self.spec, None)
            if user.codes.shape != own.shape or not torch.equal(user.lengths, tokens.lengths):
                found = f"{tuple(user.codes.shape)} with lengths {user.lengths.tolist()}"
                raise TokensError(
                    f"user: expected codes {(B, Q, T)} with lengths {tokens.lengths.tolist()}, got {found}"
                )
            voices.append(to_tables(user, self.level_delays, zero, first))
        if text is not None:
            if text.shape != (B, T) or text.is_floating_point() or text.dtype == torch.bool:
                raise TokensError(f"text: expected integers {(B, T)}, got {text.dtype} {tuple(text.shape)}")
            bad = (((text < 0) | (text >= self.text_size)) & tokens.mask.to(text.device)).nonzero()
            if len(bad):
                b, t = (int(v) for v in bad[0])
                raise TokensError(
                    f"text: item {b}, position {t}: expected 0..{self.text_size - 1}, got {int(text[b, t])}"
                )
            filled = torch.where(tokens.mask, text.to(own), zero)
        words = torch.nn.functional.pad(filled, (1, 0), value=self.special["text_initial"])
        words = torch.nn.functional.pad(words, (0, voices[0].shape[2] - 1 - T), value=zero)
        return torch.cat([words[:, None], *voices], 1)

    def unpack(self, ids: Tensor, stream: str = "own", partial: str = "refuse") -> Tokens:
        """One voice, ``own`` or ``user``, of ids (B, 17, S); ``partial`` as in `MusicGen.unpack`."""
        Q = self.spec.num_codebooks
        if stream not in ("own", "user"):
            raise ValueError(f"stream: expected 'own' or 'user', got {stream!r}")
        self._check_streams(ids)
        rows = ids[:, 1 : 1 + Q] if stream == "own" else ids[:, 1 + Q :]
        zero, first = self.special["zero"], self.special["audio_initial"]
        return self._read(rows, self.spec, self.level_delays, zero, first, partial, extra=self.special["ungenerated"])

    def text(self, ids: Tensor) -> Tensor:
        """(B, S - 2) text ids of ids (B, 17, S), pads among them; -1 and -2 stay where there are none."""
        self._check_streams(ids)
        words, first = ids[:, 0, 1 : ids.shape[2] - 1], self.special["text_initial"]
        bad = ((words < self.special["ungenerated"]) | (words >= self.text_size)).nonzero()
        if len(bad) or (ids[:, 0, :1] != first).any():
            b, s = (int(bad[0][0]), int(bad[0][1]) + 1) if len(bad) else (int((ids[:, 0, 0] != first).nonzero()[0]), 0)
            expected = first if s == 0 else f"text in 0..{self.text_size - 1}"
            raise TokensError(f"item {b}, stream 0, step {s}: expected {expected}, got {int(ids[b, 0, s])}")
        return words

    def _check_streams(self, ids: Tensor) -> None:
        streams = 1 + 2 * self.spec.num_codebooks
        if not isinstance(ids, Tensor) or ids.ndim != 3 or ids.shape[1] != streams:
            found = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise TokensError(f"ids: expected (B, {streams}, S), got {found}")


PRESETS: dict[str, type[FlatPreset] | type[MusicGen] | type[Moshi]] = {
    "seed-llama": SeedLlama,
    "lavit": LaVIT,
    "orpheus": Orpheus,
    "llasa": Llasa,
    "yue-stage-1": YuEStage1,
    "yue-stage-2": YuEStage2,
    "musicgen": MusicGen,
    "moshi": Moshi,
}
