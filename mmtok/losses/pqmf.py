"""Near-perfect-reconstruction filter bank (pseudo-QMF), and the STFT distance of its sub-bands."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtok.losses.spectral import MultiScaleSTFTLoss, prepare_sounds


class PQMF(nn.Module):
    """Cosine-modulated filter bank of M bands (Nguyen 1994, doi 10.1109/78.258122), prototype by a Kaiser window (Lin
    and Vaidyanathan 1998, doi 10.1109/97.681427).

    With m = n - taps / 2 for n = 0 .. taps, the prototype is p[n] = cutoff * sinc(cutoff * m) * kaiser[n], and band k
    is filtered by

        h_k[n] = 2 p[n] cos((2k + 1) pi / (2M) m + (-1)^k pi / 4)

    and decimated by M. The synthesis filters are the same ones reversed in time: synthesis is M times the transpose of
    analysis. Zeros surround the sound, and no delay remains. Band k holds k / M to (k + 1) / M of the spectrum, odd
    bands upside down.

    ``cutoff`` belongs to M, taps and ``kaiser``. With 62 taps and kaiser 9 white noise comes back at these signal to
    error ratios (measured away from the ends): 62 dB for X-Codec's 6 bands (0.10032791), 50 dB for its 8 (0.07949452),
    64 dB for Parallel WaveGAN's 4 (0.142). X-Codec's values for 4 (0.13) and 2 (0.25) bands reach 16 dB only. The
    first and last taps / 2 samples, next to the zeros, come back at 32 dB.

    Args:
        subbands: M.
        taps: even; the filters have one more.
        cutoff: of the prototype, 1 = half the sample rate.
        kaiser: shape of the window; larger trades a wider transition for less leakage.

    Raises:
        ValueError: fewer than 2 bands, an odd number of taps, or a cutoff outside (0, 1).
    """

    filters: Tensor

    def __init__(self, subbands: int = 6, taps: int = 62, cutoff: float = 0.10032791, kaiser: float = 9.0) -> None:
        super().__init__()
        if subbands < 2 or taps < 2 or taps % 2 or not 0 < cutoff < 1:
            raise ValueError(
                f"expected subbands >= 2, an even number of taps and 0 < cutoff < 1, got {subbands}, {taps}, {cutoff}"
            )
        self.subbands = subbands
        self.edge = taps // 2
        m = torch.arange(taps + 1, dtype=torch.float64) - taps / 2
        window = torch.special.i0(kaiser * (1 - (2 * m / taps).square()).clamp(min=0).sqrt())
        prototype = cutoff * torch.sinc(cutoff * m) * window / torch.special.i0(m.new_tensor(kaiser))
        k = torch.arange(subbands, dtype=torch.float64)[:, None]
        phase = math.pi / 4 * (1 - 2 * (k % 2))
        filters = 2 * prototype * torch.cos((2 * k + 1) * (math.pi / (2 * subbands)) * m + phase)
        self.register_buffer("filters", filters.float()[:, None], persistent=False)  # (M, 1, taps + 1)

    def analyse(self, x: Tensor) -> Tensor:
        """Sound (B,1,L) -> sub-bands (B,M,ceil(L / M)) float32; zeros fill the last M samples up.

        Raises:
            ValueError: not one channel.
        """
        if x.ndim != 3 or x.shape[1] != 1:
            raise ValueError(f"x: expected sound (B,1,L), got shape {tuple(x.shape)}; move channels into the batch")
        with torch.autocast(device_type=x.device.type, enabled=False):
            return F.conv1d(x.float(), self.filters, stride=self.subbands, padding=self.edge)

    def synthesise(self, bands: Tensor) -> Tensor:
        """Sub-bands (B,M,T) -> sound (B,1,T*M) float32.

        Raises:
            ValueError: another number of bands.
        """
        if bands.ndim != 3 or bands.shape[1] != self.subbands:
            raise ValueError(f"bands: expected (B,{self.subbands},T), got shape {tuple(bands.shape)}")
        M = self.subbands
        with torch.autocast(device_type=bands.device.type, enabled=False):
            y = F.conv_transpose1d(bands.float(), M * self.filters, stride=M, padding=self.edge, output_padding=M - 1)
        return y


class SubbandSTFTLoss(nn.Module):
    """`MultiScaleSTFTLoss` of the sub-bands of both sounds; the defaults are X-Codec's, whose weight for it is 1.

    Args:
        n_ffts, win_lengths, hop_lengths: of each resolution, in samples of a sub-band.
        pqmf: the filter bank; None: six bands.
        floor: smallest power that counts.

    Raises:
        ValueError: as `MultiScaleSTFTLoss`.
    """

    def __init__(
        self,
        n_ffts: Sequence[int] = (128, 256, 256),
        win_lengths: Sequence[int] = (80, 120, 200),
        hop_lengths: Sequence[int] = (20, 40, 50),
        pqmf: PQMF | None = None,
        floor: float = 1e-7,
    ) -> None:
        super().__init__()
        self.pqmf = PQMF() if pqmf is None else pqmf
        self.distance = MultiScaleSTFTLoss(n_ffts, win_lengths, hop_lengths, floor=floor)
        self.longest = self.pqmf.subbands * max(n_ffts)  # samples of the sound under the longest FFT

    def forward(self, x_hat: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Distance of two sounds.

        Args:
            x_hat: reconstruction (B,C,L) in [-1,1].
            x: real sound, same shape.
            mask: (B,L) bool, True = valid sample; both sounds are silenced outside, and a frame of the bands counts
                when its centre is valid.

        Returns:
            Scalar float32.

        Raises:
            ValueError: shapes that differ, or L not above half of the longest FFT times the number of bands.
        """
        x_hat, x = prepare_sounds(x_hat, x, mask, self.longest)
        fake, real = self._bands(x_hat), self._bands(x)
        if mask is not None:  # of every band's first sample, once for each channel
            mask = mask[:, :: self.pqmf.subbands].repeat_interleave(x.shape[1], dim=0)
        return self.distance(fake, real, mask)

    def _bands(self, x: Tensor) -> Tensor:
        """(B,C,L) -> (B*C, M, ceil(L / M))."""
        return self.pqmf.analyse(x.reshape(-1, 1, x.shape[-1]))
