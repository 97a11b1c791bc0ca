"""Opus, MP3 and Codec 2 as tokenizers whose codes are the bytes of their files and streams."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from mmtok.catalogue import Family, Taxonomy
from mmtok.data import audio as audio_io
from mmtok.tokenizer import stack
from mmtok.tokens import Tokens, TokensError, TokenSpec, side_value
from mmtok.wrappers import classical_streams as streams
from mmtok.wrappers.bytes_tokenizer import BYTE, NO_WEIGHTS, BytesTokenizer, file_of, setting_of

OPUS_VOIP_BELOW = 16000  # bits a second and channel up to which the mode made for speech is the better one


class ClassicalAudio(BytesTokenizer, abc.ABC):
    """Sound of any length, rate and channel count as the bytes of a codec's stream.

    Sound is resampled to a rate that the codec takes and back; length, rate and channels stand in ``side``. Codes cut
    by ``keep(num_tokens=)`` give the beginning that they describe.

    Attributes:
        sample_rate: Hz of what the decoder gives, before it is resampled to the rate that went in.
    """

    modality = "audio"
    sample_rate: int

    @abc.abstractmethod
    def write(self, clip: Tensor, sample_rate: int) -> bytes:
        """(C, L) in [-1, 1] at `coding_rate` -> the bytes."""

    @abc.abstractmethod
    def read(self, data: bytes, channels: int | None, most: int | None) -> Tensor:
        """Any beginning of the bytes -> (C, L) at ``sample_rate``, without delay; (0 or C, 0) where nothing is whole.

        ``most`` samples are enough. Raises ValueError for anything else.
        """

    def coding_rate(self, sample_rate: int) -> int:
        """Hz at which sound of another rate is coded."""
        del sample_rate
        return self.sample_rate

    def base_spec(self) -> TokenSpec:
        return TokenSpec(self.name, "audio", (BYTE,), frame_rate=self.setting / 8)

    @torch.no_grad()
    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        """Encode a path, array (C, L) with ``sample_rate`` in Hz, or a list of clips of different lengths.

        Raises ValueError naming expected and got for a missing rate, wrong shape, NaN, unscaled integers or silence
        of zero length.
        """
        self._check_conditions(text)
        self._check_counts(num_codebooks, num_tokens)
        sounds, _ = audio_io.to_sounds(x, sample_rate)
        files = []
        with torch.autocast("cpu", enabled=False):  # bytes do not come a little less exact
            for s in sounds:
                rate = self.coding_rate(s.sample_rate)
                files.append(self.write(audio_io.resample(s.samples, s.sample_rate, rate).clamp(-1, 1), rate))
        side = {
            "num_samples": [s.samples.shape[1] for s in sounds],
            "sample_rate": [s.sample_rate for s in sounds],
            "channels": [s.samples.shape[0] for s in sounds],
        }
        return self.tokens_of(files, side, num_tokens)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        """Sound with the input's length, rate and channels: (B, C, L), or a list of (C, L) when they differ.

        Without ``side`` it is what the stream holds, at the decoder's rate. Raises TokensError for bytes that are no
        such stream; ``generator`` is unused: nothing is drawn.
        """
        del generator
        tokens = self.checked(tokens, text)
        if size is not None:
            raise ValueError("size: for images only; audio comes back with its own length")
        out = [self._sound(tokens[i]) for i in range(len(tokens))]
        return stack(out) if out else torch.zeros(0, 1, 0)

    def _sound(self, item: Tokens) -> Tensor:
        channels = side_value(item, "channels", 0, range(1, audio_io.MAX_CHANNELS + 1)) or None
        rate = side_value(item, "sample_rate", self.sample_rate, audio_io.SAMPLE_RATES)
        wanted = side_value(item, "num_samples", -1, range(2**63))
        needed = None if wanted < 0 else -(-wanted * self.sample_rate // rate)  # at the decoder's rate
        try:
            sound = self.read(file_of(item), channels, needed)
        except ValueError as e:
            raise TokensError(f"{self.name}: {e}; the codes were changed since they were encoded") from e
        if not sound.shape[1] or wanted == 0:
            return torch.zeros(channels or 1, 0)
        if len(sound) != (channels or len(sound)):
            raise TokensError(f"{self.name}: expected {channels} channels, the stream has {len(sound)}")
        have = sound.shape[1]
        length = -(-have * rate // self.sample_rate)
        if needed is not None:  # cut codes describe the beginning, all of them the exact length
            length = min(wanted, length) if have < needed else wanted
        with torch.autocast("cpu", enabled=False):
            sound = audio_io.resample(sound[:, :needed], self.sample_rate, rate)
        return audio_io.fit_length(sound, length)

    def timing(self) -> dict[str, Any]:
        """What codes mean in time, for `mmtok info`."""
        return {"samples_a_byte": self.sample_rate * 8 / self.setting, "streams": False}


class Opus(ClassicalAudio):
    """Ogg Opus files: variable bitrate, packets of 60 ms, so that few bits go into headers.

    ``setting`` is the encoder's target for the packets of one channel; the Ogg file costs about a tenth more at
    6 kbit/s. Sound is coded at its own rate where Opus has it, else at the next higher one, and decoded at 48 kHz. Two
    channels are coded as stereo, more of them one by one. A cut file gives the packets that are whole.
    """

    sample_rate = 48000

    def __init__(self, setting: int):
        super().__init__(OPUS, setting)
        streams.require_pyav("libopus")

    def coding_rate(self, sample_rate: int) -> int:
        return next((r for r in streams.OPUS_RATES if r >= sample_rate), streams.OPUS_RATES[-1])

    def write(self, clip: Tensor, sample_rate: int) -> bytes:
        application = "voip" if self.setting < OPUS_VOIP_BELOW else "audio"
        return streams.encode_opus(clip, sample_rate, self.setting, 60, application).data

    def read(self, data: bytes, channels: int | None, most: int | None) -> Tensor:
        return streams.opus_sound(data, most)


class MP3(ClassicalAudio):
    """MP3 streams at a constant bitrate, bare frames; the rate in Hz follows from the bitrate.

    Two channels are joint stereo at twice the bits; more are mono streams whose frames come in turn. The delay of
    encoder and decoder is a constant that decode takes away; a player that does not know it begins 1105 samples late.
    The level is LAME's own: it codes sound 5 % softer, against clipping.
    """

    def __init__(self, setting: int):
        super().__init__(MP3_FAMILY, setting)
        streams.require_pyav("libmp3lame")
        self.sample_rate = streams.MP3_SETTINGS[setting]

    def write(self, clip: Tensor, sample_rate: int) -> bytes:
        return streams.encode_mp3(clip, self.setting)

    def read(self, data: bytes, channels: int | None, most: int | None) -> Tensor:
        return streams.mp3_sound(data, self.sample_rate, channels)


class Codec2(ClassicalAudio):
    """Codec 2, a vocoder for speech at 8 kHz: pitch, voicing and the envelope of the spectrum, no waveform.

    Frames of 20 ms (modes 3200 and 2400) or 40 ms, back to back; those of several channels come in turn. What is given
    back is in step by its loudness over time; a waveform to be in step with is not kept.
    """

    sample_rate = streams.CODEC2_RATE

    def __init__(self, setting: int):
        super().__init__(CODEC2, setting)
        streams.require_codec2(setting)

    def write(self, clip: Tensor, sample_rate: int) -> bytes:
        return streams.encode_codec2(clip, self.setting)

    def read(self, data: bytes, channels: int | None, most: int | None) -> Tensor:
        return streams.codec2_sound(data, self.setting, channels or 1)


def open_opus(source: str) -> Opus:
    return Opus(setting_of(OPUS, source, streams.OPUS_BITRATES))


def open_mp3(source: str) -> MP3:
    return MP3(setting_of(MP3_FAMILY, source, streams.MP3_SETTINGS))


def open_codec2(source: str) -> Codec2:
    return Codec2(setting_of(CODEC2, source, streams.CODEC2_MODES))


OPUS = Family(
    name="opus",
    title="Opus: linear prediction and MDCT, in Ogg files (libopus)",
    modality="audio",
    source="bits a second and channel 500..256000",
    example="opus:6000",
    package="av",
    install="pip install 'mmtok[data]'; programs of the same codec: apt install opus-tools",
    code_licence="BSD-3-Clause (PyAV), its FFmpeg LGPL-2.1-or-later, libopus BSD-3-Clause",
    weights_licence=NO_WEIGHTS,
    taxonomy=Taxonomy(
        architecture="MDCT+LP/MDCT+LP",
        input="T-F",
        quantization="SQ",
        bitrate="A",
        objective=(),
        auxiliary=(),
        joint=False,
        domain="SMA",
        rate="bit/s / 8",
        streamable=True,
    ),
    open=open_opus,
)

MP3_FAMILY = Family(
    name="mp3",
    title="MP3 at a constant bitrate, bare frames (LAME)",
    modality="audio",
    source=f"bits a second and channel, one of {', '.join(map(str, streams.MP3_SETTINGS))}",
    example="mp3:32000",
    package="av",
    install="pip install 'mmtok[data]'; a program of the same codec: apt install lame",
    code_licence="BSD-3-Clause (PyAV), its FFmpeg LGPL-2.1-or-later, LAME LGPL-2.0-or-later",
    weights_licence=NO_WEIGHTS,
    taxonomy=Taxonomy(
        architecture="MDCT/MDCT",
        input="T-F",
        quantization="SQ",
        bitrate="F",
        objective=(),
        auxiliary=(),
        joint=False,
        domain="SMA",
        rate="bit/s / 8",
        streamable=True,
    ),
    open=open_mp3,
)

CODEC2 = Family(
    name="codec2",
    title="Codec 2: a vocoder for speech below 3.2 kbit/s",
    modality="audio",
    source=f"mode, one of {', '.join(map(str, streams.CODEC2_MODES))} (700 is 700C)",
    example="codec2:1200",
    package="pycodec2",
    install="pip install 'mmtok[codecs]'; a program of the same codec: apt install codec2",
    code_licence="BSD-3-Clause (pycodec2), Codec 2 LGPL-2.1",
    weights_licence=NO_WEIGHTS,
    taxonomy=Taxonomy(
        architecture="LP/LP",
        input="T",
        quantization="SQ",
        bitrate="F",
        objective=(),
        auxiliary=(),
        joint=False,
        domain="S",
        rate="bit/s / 8",
        streamable=True,
    ),
    open=open_codec2,
)
