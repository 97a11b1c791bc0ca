"""Raw mode that keeps clips at their own lengths, for packages whose faults show only in a last frame that is cut."""

from __future__ import annotations

import abc
import copy
from typing import Any

import torch
from torch import Tensor

from mmtok.data import audio as audio_io
from mmtok.tokenizer import integers
from mmtok.tokens import Tokens
from mmtok.wrappers.wrapped import WrappedAudio


class RawLengths(WrappedAudio, abc.ABC):
    """A codec whose raw `encode` hands the package clips as long as they are, padded with zeros to the longest only.

    Mitigated, clips are padded to whole frames before the network sees them (as every codec here does), which hides
    what the package itself makes of a clip that ends within a frame. A subclass says how many frames that is.
    """

    rows: list[Tensor] | None = None  # of the raw call under way: one (L,) a channel, at the codec's rate

    @abc.abstractmethod
    def network_frames(self, num_samples: int) -> int:
        """Frames that the package makes of a clip of ``num_samples``, whole frames or not."""

    @torch.no_grad()
    def encode(
        self,
        x: Any,
        sample_rate: int | None = None,
        text: Any = None,
        num_codebooks: int | None = None,
        num_tokens: int | None = None,
    ) -> Tokens:
        """As `AudioTokenizer.encode`; raw, without its padding to whole frames."""
        if self.mitigated:
            return super().encode(x, sample_rate, text, num_codebooks, num_tokens)
        sounds, _ = audio_io.to_sounds(x, sample_rate)
        call = copy.copy(self)  # so that two calls at once do not see each other's rows
        call.rows = [r for s in sounds for r in audio_io.resample(s.samples, s.sample_rate, self.sample_rate)]
        tokens = super(RawLengths, call).encode(x, sample_rate, text, num_codebooks, num_tokens)
        self._hash = call._hash  # of the weights, for the next call
        return tokens

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip: whole hops when mitigated, the package's own number when raw."""
        return super().num_frames(num_samples) if self.mitigated else self.network_frames(num_samples)

    def encode_samples(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        if self.rows is None:
            return super().encode_samples(x, lengths, num_codebooks)
        lengths = integers([len(r) for r in self.rows]).to(x.device)
        batch = torch.nn.utils.rnn.pad_sequence(self.rows, batch_first=True)[:, None]
        return self.network_encode(batch.to(x.device), lengths, num_codebooks)

    def check_runs(self) -> None:
        """Raises ValueError where the package can save such a model but not run it, or makes other lengths."""
        hop, Q = self.hop_length, len(self.codebook_sizes)
        with torch.no_grad():
            try:
                codes = self.network_encode(torch.zeros(1, 1, 2 * hop), integers([2 * hop]), Q)
                found = tuple(codes.shape), tuple(self.network_decode(codes).shape)
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as e:
                reason = " ".join(str(e).split())[:200]
                raise ValueError(
                    f"{self.name}: its package cannot run this network ({reason}); restore its config.json"
                ) from e
        if found != ((1, Q, 2), (1, 1, 2 * hop)):
            raise ValueError(
                f"{self.name}: expected codes (1, {Q}, 2) and sound (1, 1, {2 * hop}) of two frames, got {found}; "
                "restore the folder's config.json"
            )
