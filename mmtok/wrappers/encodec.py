"""EnCodec (arXiv 2210.13438) as transformers runs it: the mono models, and the stereo model that works in chunks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.catalogue import Family, Taxonomy
from mmtok.data import audio as audio_io
from mmtok.tokenizer import AudioTokenizer, evaluation, integers, stack
from mmtok.tokens import Tokens, TokensError, TokenSpec, side_value
from mmtok.wrappers.wrapped import Wrapped, WrappedAudio, transformers_model

# What the codes mean beside the weights. The rates (target_bandwidths) only choose how many levels come.
INPUT_FACTS = ("sampling_rate", "audio_channels", "normalize", "chunk_length_s", "overlap", "codebook_size")
CONVOLUTION_FACTS = ("upsampling_ratios", "dilation_growth_rate", "use_causal_conv", "pad_mode", "trim_right_ratio")
FACTS = (*INPUT_FACTS, *CONVOLUTION_FACTS, "norm_type")


def open_encodec(source: str) -> Encodec | EncodecChunks:
    """The tokenizer of a folder or hub repository; its config says which of the two classes it needs.

    Raises:
        ValueError: no such folder, no EnCodec, damaged weights, or a config that upstream could not run.
        ImportError: transformers is not installed.
    """
    network, folder = transformers_model(FAMILY, "EncodecModel", source)
    c = network.config
    whole = c.audio_channels == 1 and c.chunk_length_s is None and not c.normalize
    return Encodec(network, folder) if whole else EncodecChunks(network, folder)


FAMILY = Family(
    name="encodec",
    title="EnCodec: SEANet with an LSTM, residual quantizer; 24 kHz, 32 kHz (MusicGen), 48 kHz stereo",
    modality="audio",
    source="folder or hub repository",
    example="encodec:facebook/encodec_24khz",
    package="transformers",
    install="pip install 'mmtok[codecs]'",
    code_licence="Apache-2.0",
    weights_licence="CC-BY-NC-4.0 per audiocraft, questioned for encodec_24khz; check the card",
    # The survey's row, but for the decoder, which it calls a CNN: in all three models it has an LSTM too.
    taxonomy=Taxonomy(
        architecture="CNN+RNN/CNN+RNN",
        input="T",
        quantization="RVQ",
        bitrate="F",
        objective=("GAN", "Feat", "Rec", "VQ"),
        auxiliary=(),
        joint=True,
        domain="SMA",
        rate="75 (24 kHz), 50 (32 kHz), 150 (48 kHz)",
        streamable=True,  # the 24 kHz model; the other two look ahead
    ),
    open=open_encodec,
)


class Encodec(WrappedAudio):
    """The mono models, 24 kHz (causal) and 32 kHz (MusicGen's), and any other without chunks and loudness.

    A clip is padded with zeros to whole frames, as everywhere in mmtok; upstream reflects the end instead, layer by
    layer, so the two agree in every code of a clip of whole frames, or of one that upstream gets padded like that.

    Args:
        network: transformers' EncodecModel.
        source: the folder that it came from: its name, and the licence on its model card.

    Raises:
        ValueError: a network with chunks, loudness or several channels, which `EncodecChunks` takes.
    """

    family = FAMILY
    network: Any
    # Encoder and decoder each have an LSTM, which remembers everything before a frame, so no number of frames of
    # context makes a piece of the sound give the codes (or the samples) of the whole.
    encode_margin = None
    decode_margin = None

    def __init__(self, network: Any, source: str | Path):
        c = network.config
        if c.audio_channels != 1 or c.chunk_length_s is not None or c.normalize:
            found = f"{c.audio_channels} channels, chunk_length_s {c.chunk_length_s}, normalize {c.normalize}"
            raise ValueError(f"expected a mono EnCodec without chunks and loudness, got {found}; use EncodecChunks")
        super().__init__(network, facts_of(network), source)
        self.sample_rate, self.hop_length = c.sampling_rate, c.hop_length
        self.codebook_sizes = (c.codebook_size,) * most_levels(network)

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        mask = torch.arange(x.shape[-1], device=x.device) < lengths[:, None, None]  # (B, 1, L)
        rate = rate_for(self.network, num_codebooks)
        given = self.network.encode(x.to(self.network.dtype), mask, rate, return_dict=True)
        return given.audio_codes[0, :, :num_codebooks]  # of (1, B, Q, T): the whole clip is the only chunk

    def network_decode(self, codes: Tensor) -> Tensor:
        return self.network.decode(codes[None], [None], return_dict=True).audio_values


class EncodecChunks(Wrapped, AudioTokenizer):
    """The stereo model, 48 kHz: chunks of a second that overlap by a hundredth, each with a loudness of its own.

    * A clip is cut as upstream cuts it: a chunk starts every ``chunk_stride`` samples while there is sound, and the
      last ones end where the sound ends, unpadded. Nothing else is cut: the network is not causal and has a norm over
      the time of a chunk, so a code depends on its whole chunk.
    * Positions are the frames of the chunks one after the other. 150 frames describe a chunk, which starts 0.99 s after
      the one before: ``frame_rate`` counts them, 151.5 Hz. Where chunks part follows from ``num_samples``; without it
      every chunk is taken as whole.
    * ``side["scale"]`` (B, chunks), padded with 1, is the loudness that a chunk is divided by before the network and
      multiplied by after it. Its bits are not counted. Codes without it, from a language model, come at the loudness
      of the network, which is a root mean square of about 1.
    * A position describes both channels. Mono sound is given to both, and their outputs are averaged. More channels
      go in pairs, the last paired with itself where they are odd, and the frames of the pairs are interleaved.
    * Upstream measures the loudness of a chunk on the mean of its channels, so stereo of opposite phase is silence to
      it and comes back as such. That is left as it is: the codes would not be upstream's otherwise.

    Mitigations: clips of different lengths never share a padded batch (upstream's loudness and norm count the padding);
    all levels unless asked; lengths just past a stride, at which upstream's own encode or decode raises, work; the
    sound has exactly the length that went in.

    Args:
        network: transformers' EncodecModel, of one or two channels, with or without chunks and loudness.
        source: the folder that it came from: its name, and the licence on its model card.

    Raises:
        ValueError: chunks without an overlap or with gaps between them, or more than two channels.
    """

    family = FAMILY
    batch_limit: int = 1  # as `WrappedAudio`
    network: Any

    def __init__(self, network: Any, source: str | Path):
        c = network.config
        if c.audio_channels not in (1, 2):
            raise ValueError(f"audio_channels: expected 1 or 2, got {c.audio_channels}; upstream runs no others")
        if c.chunk_length_s is not None and not 0 < (c.chunk_stride or 0) <= c.chunk_length:
            raise ValueError(
                f"expected chunk_length_s with an overlap of 0 up to 1, got {c.chunk_length_s} s and {c.overlap}; "
                "correct config.json"
            )
        super().__init__(network, facts_of(network), source)
        self.sample_rate, self.hop_length = c.sampling_rate, c.hop_length
        self.codebook_sizes = (c.codebook_size,) * most_levels(network)
        self.model_channels: int = c.audio_channels
        # Without chunks the clip is the first chunk, and there is no second one.
        self.chunk_length: int = c.chunk_length or sys.maxsize
        self.chunk_stride: int = c.chunk_stride or sys.maxsize

    def base_spec(self) -> TokenSpec:
        rate = self.sample_rate / self.hop_length
        if self.chunk_stride != sys.maxsize:
            rate = -(-self.chunk_length // self.hop_length) * self.sample_rate / self.chunk_stride
        return TokenSpec(self.name, "audio", self.codebook_sizes, frame_rate=rate)

    @torch.no_grad()
    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        """As `AudioTokenizer.encode`, but for what the class says of channels and of ``side["scale"]``."""
        self._check_conditions(text)
        self._check_counts(num_codebooks, num_tokens)
        sounds, _ = audio_io.to_sounds(x, sample_rate)
        groups = [-(-s.samples.shape[0] // self.model_channels) for s in sounds]
        rows: list[Tensor] = []
        for s in sounds:
            samples = audio_io.resample(s.samples, s.sample_rate, self.sample_rate)
            rows.extend(self._grouped(samples).to(self.device))
        with evaluation(self):
            found = self._encode_rows(rows, num_codebooks) if self.mitigated else self._encode_raw(rows, num_codebooks)
        codes, scales, row = [], [], 0
        for G in groups:
            part = found[row : row + G]
            codes.append(torch.stack([c for c, _ in part], -1).flatten(1).T)  # (T * G, Q)
            scales.append(torch.stack([s for _, s in part], -1).flatten())  # (chunks * G)
            row += G
        padded = torch.nn.utils.rnn.pad_sequence(codes, batch_first=True).transpose(1, 2).contiguous()
        side = {
            "num_samples": integers([s.samples.shape[1] for s in sounds]),
            "sample_rate": integers([s.sample_rate for s in sounds]),
            "channels": integers([s.samples.shape[0] for s in sounds]),
            "scale": torch.nn.utils.rnn.pad_sequence(scales, batch_first=True, padding_value=1.0),
        }
        side = {k: v.to(padded.device) for k, v in side.items()}
        lengths = integers([len(c) for c in codes]).to(padded.device)
        tokens = Tokens(padded, lengths, self.spec.keep(padded.shape[1]), side)
        return tokens if num_tokens is None else tokens.keep(num_tokens=num_tokens)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        """As `AudioTokenizer.decode`. Raises TokensError for more positions than ``num_samples`` has, or bad scales."""
        self._check_conditions(text)
        tokens.check(self.spec)
        if size is not None:
            raise ValueError("size: for images only; audio comes back with its own length")
        out: list[Tensor] = []
        with evaluation(self):
            for i in range(len(tokens)):
                item = tokens[i].to(self.device)
                C = side_value(item, "channels", 1, range(1, audio_io.MAX_CHANNELS + 1))
                rate = side_value(item, "sample_rate", self.sample_rate, audio_io.SAMPLE_RATES)
                wanted = side_value(item, "num_samples", -1, range(2**63))
                G = -(-C // self.model_channels)
                T = item.codes.shape[2] // G  # whole frames of all groups of channels
                n = -(-wanted * self.sample_rate // rate) if wanted >= 0 else None
                if not T:
                    out.append(torch.zeros(C, 0))
                    continue
                parts = self.parted(T, n)
                codes = item.codes[0, :, : T * G].unflatten(1, (T, G)).permute(2, 0, 1)  # (G, Q, T)
                run = self._decode_row if self.mitigated else self._decode_raw
                sound = self._apart(run(codes, parts, self._scales(item, len(parts), G)), C)
                told = sound.shape[-1] if n is None else min(n, sound.shape[-1])  # less than n of a prefix
                length = -(-told * rate // self.sample_rate)
                sound = audio_io.resample(sound, self.sample_rate, rate)
                out.append(self.exact(sound, length if n is None else min(wanted, length)).cpu())
        return stack(out) if out else torch.zeros(0, 1, 0)

    def frames_of_chunks(self, num_samples: int | None) -> Iterator[int]:
        """Frames of each chunk of a clip of ``num_samples`` at the model's rate; None: of endless sound."""
        start = 0
        while num_samples is None or start < num_samples:
            samples = self.chunk_length if num_samples is None else min(self.chunk_length, num_samples - start)
            yield -(-samples // self.hop_length)
            start += self.chunk_stride

    def num_frames(self, num_samples: int) -> int:
        """Positions, for each group of channels, of a clip of ``num_samples`` at the model's rate."""
        return sum(self.frames_of_chunks(num_samples))

    def parted(self, frames: int, num_samples: int | None) -> list[int]:
        """How many of the first ``frames`` of a clip belong to each chunk. Raises TokensError when it has fewer."""
        parts: list[int] = []
        left = frames
        for size in self.frames_of_chunks(num_samples):
            parts.append(min(size, left))
            left -= parts[-1]
            if not left:
                return parts
        raise TokensError(
            f"expected at most {frames - left} frames for {num_samples} samples at {self.sample_rate} Hz, got "
            f"{frames}; they belong to a clip of another length"
        )

    def exact(self, sound: Tensor, length: int) -> Tensor:
        return super().exact(sound, length) if self.mitigated else sound

    def timing(self) -> dict[str, Any]:
        """As `AudioTokenizer.timing`, with the chunks."""
        chunks = {"chunk_samples": self.chunk_length, "chunk_stride_samples": self.chunk_stride}
        return super().timing() | ({} if self.chunk_stride == sys.maxsize else chunks)

    def _grouped(self, samples: Tensor) -> Tensor:
        """(C, L) -> (G, model channels, L), the last channel repeated where the last group lacks one."""
        C, M = samples.shape[0], self.model_channels
        index = torch.arange(-(-C // M) * M).clamp(max=C - 1)
        return samples[index].unflatten(0, (-1, M))

    def _apart(self, sound: Tensor, channels: int) -> Tensor:
        """(G, model channels, L) -> (C, L), what comes of the repeated channel averaged."""
        rows = sound.flatten(0, 1)
        return torch.cat([rows[: channels - 1], rows[channels - 1 :].mean(0, keepdim=True)])

    def _encode_rows(self, rows: list[Tensor], num_codebooks: int | None) -> list[tuple[Tensor, Tensor]]:
        """Each (M, L) -> codes (Q, T) and scales (chunks,); only ``batch_limit`` rows of one length run together."""
        Q = num_codebooks or len(self.codebook_sizes)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        alike: dict[int, list[int]] = {}
        for i, r in enumerate(rows):
            alike.setdefault(r.shape[-1], []).append(i)
        limit = self.batch_limit
        for n, members in ((n, all_[k : k + limit]) for n, all_ in alike.items() for k in range(0, len(all_), limit)):
            x = torch.stack([rows[i] for i in members])
            starts = range(0, n, self.chunk_stride)
            chunks = [self._encode_chunk(x[..., start : start + self.chunk_length], Q) for start in starts]
            codes, scales = torch.cat([c for c, _ in chunks], 2), torch.stack([s for _, s in chunks], 1)
            found.update({i: (codes[k], scales[k]) for k, i in enumerate(members)})
        return [found[i] for i in range(len(rows))]

    def _encode_chunk(self, x: Tensor, num_codebooks: int) -> tuple[Tensor, Tensor]:
        """(B, M, L), no longer than a chunk -> codes (B, Q, T), scales (B,)."""
        network, scale = self.network, x.new_ones(len(x))
        if network.config.normalize:
            scale = x.mean(1).square().mean(-1).sqrt() + 1e-8
        z = network.encoder((x / scale[:, None, None]).to(network.dtype))
        codes = network.quantizer.encode(z, rate_for(network, num_codebooks)).transpose(0, 1)
        return codes[:, :num_codebooks], scale

    def _encode_raw(self, rows: list[Tensor], num_codebooks: int | None) -> list[tuple[Tensor, Tensor]]:
        """As `_encode_rows`, but all rows in one batch of upstream's, padded with zeros to the longest and masked."""
        counts = [r.shape[-1] for r in rows]
        x = torch.stack([audio_io.fit_length(r, max(counts)) for r in rows])
        mask = torch.arange(max(counts), device=x.device) < integers(counts).to(x.device)[:, None, None]
        rate = rate_for(self.network, num_codebooks)
        given = self.network.encode(x.to(self.network.dtype), mask, rate, return_dict=True)
        chunks = len(given.audio_codes)
        scales = torch.cat(given.audio_scales, 1) if self.network.config.normalize else x.new_ones(len(x), chunks)
        found = []
        for i, n in enumerate(counts):  # what stands past the end of a shorter clip is not the clip's
            frames = list(self.frames_of_chunks(n))
            codes = [given.audio_codes[c, i, :num_codebooks, :f] for c, f in enumerate(frames)]
            found.append((torch.cat(codes, 1), scales[i, : len(frames)].float()))
        return found

    def _decode_row(self, codes: Tensor, parts: list[int], scales: Tensor) -> Tensor:
        """Codes (G, Q, T) of chunks of ``parts`` frames, scales (chunks, G) -> (G, M, L) as long as it comes."""
        sounds = []
        for part, scale in zip(codes.split(parts, 2), scales, strict=True):
            y = self.network.decoder(self.network.quantizer.decode(part.transpose(0, 1)))
            sounds.append(y.float() * scale[:, None, None])
        return overlap_add(sounds, self.chunk_stride)

    def _decode_raw(self, codes: Tensor, parts: list[int], scales: Tensor) -> Tensor:
        """As `_decode_row`, by upstream's decode."""
        missing = parts[0] - parts[-1]
        split = torch.nn.functional.pad(codes, (0, missing)).split([*parts[:-1], parts[0]], 2)
        return self.network.decode(
            torch.stack(split), list(scales[:, :, None]), return_dict=True, last_frame_pad_length=missing
        ).audio_values

    def _scales(self, item: Tokens, chunks: int, groups: int) -> Tensor:
        """(chunks, G) of the only item."""
        scale = item.side.get("scale")
        if scale is None:
            return torch.ones(chunks, groups, device=item.codes.device)
        count = chunks * groups
        if scale.ndim != 2 or not scale.is_floating_point() or scale.shape[1] < count:
            found = f"{scale.dtype} {tuple(scale.shape)}"
            raise TokensError(f"side['scale']: expected floats (B, {count} or more), one a chunk, got {found}")
        used = scale[0, :count].float()
        if not bool((used.isfinite() & (used >= 0)).all()):
            raise TokensError(f"side['scale']: expected finite values of at least 0, got {used.tolist()[:8]}")
        return used.unflatten(0, (chunks, groups))


def overlap_add(parts: list[Tensor], stride: int) -> Tensor:
    """Join (..., L_i), of which each starts ``stride`` after the one before, cross-fading linearly where they overlap.

    The weight of a sample rises from the ends of a whole part to its middle; the first part is the longest.
    """
    whole = parts[0].shape[-1]
    ramp = torch.linspace(0, 1, whole + 2, device=parts[0].device)[1:-1]
    weight = 0.5 - (ramp - 0.5).abs()
    # A last part shorter than the overlap ends before its neighbour does.
    total = max(i * stride + p.shape[-1] for i, p in enumerate(parts))
    joined, weights = parts[0].new_zeros(*parts[0].shape[:-1], total), weight.new_zeros(total)
    for i, part in enumerate(parts):
        n = part.shape[-1]
        joined[..., i * stride : i * stride + n] += part * weight[:n]
        weights[i * stride : i * stride + n] += weight[:n]
    return joined / weights


def facts_of(network: Any) -> dict[str, Any]:
    """The config of the tokenizer: `FACTS` as plain values."""
    found = {name: getattr(network.config, name) for name in FACTS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def levels_by_rate(network: Any) -> dict[float, int]:
    """Levels that upstream gives for each rate (kbit/s) of its config."""
    quantizer = network.quantizer
    there = len(quantizer.layers)
    rates = network.config.target_bandwidths
    return {rate: min(there, quantizer.get_num_quantizers_for_bandwidth(rate)) for rate in rates}


def most_levels(network: Any) -> int:
    """Raises ValueError when the config's rates are too low for a single level."""
    most = max(levels_by_rate(network).values(), default=0)
    if not most:
        rates = list(network.config.target_bandwidths)
        raise ValueError(f"target_bandwidths: expected rates with room for a level, got {rates}; correct config.json")
    return most


def rate_for(network: Any, num_codebooks: int | None) -> float | None:
    """The lowest rate (kbit/s) with at least so many levels, of which the first ones are taken; None for None."""
    if num_codebooks is None:
        return None
    levels = levels_by_rate(network)
    return min((rate for rate in levels if levels[rate] >= num_codebooks), key=lambda rate: (levels[rate], rate))
