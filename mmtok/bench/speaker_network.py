"""Who speaks: the d-vector network of generalized end-to-end loss (arXiv 1710.10467) with resemblyzer's weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATE, N_FFT, HOP, BANDS = 16000, 400, 160, 40  # 25 ms windows every 10 ms
WIDTH, LAYERS = 256, 3
WINDOW, STEP = 160, 77  # frames of a window, and from one to the next: 1.3 windows a second
COVERED = 0.75  # of the last window must be sound, unless it is the only one
LOUDNESS = -30.0  # dB of full scale; what is quieter is raised to it


class SpeakerEncoder(nn.Module):
    """``embed``: speech (1, L) of 16 kHz -> (256,) of length 1; equal voices point the same way.

    Three LSTM layers read 40 mel powers a frame (slaney bands, no logarithm); the last hidden state of a window of
    1.6 s goes through a linear layer and a ReLU and is divided by its length; a sound is the mean of its windows,
    divided by its length again. Silences stay in, where resemblyzer cuts long ones by a voice detector: a cut that
    depends on the sound would compare other stretches of a reconstruction than of its original.
    """

    bank: Tensor
    window: Tensor

    def __init__(self, bands: int = BANDS, width: int = WIDTH, num_layers: int = LAYERS):
        super().__init__()
        self.lstm = nn.LSTM(bands, width, num_layers, batch_first=True)
        self.linear = nn.Linear(width, width)
        from torchaudio.functional import melscale_fbanks

        bank = melscale_fbanks(N_FFT // 2 + 1, 0.0, RATE / 2, bands, RATE, norm="slaney", mel_scale="slaney")
        self.register_buffer("bank", bank, persistent=False)  # (201, bands)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, mel: Tensor) -> Tensor:
        """(B, T, bands) mel powers -> (B, width), each of length 1."""
        hidden = self.lstm(mel)[1][0][-1]  # the last layer's state behind the last frame
        return F.normalize(F.relu(self.linear(hidden)), dim=1)

    def mel(self, x: Tensor) -> Tensor:
        """(L,) -> (1 + L / 160, bands), zeros beyond the ends."""
        spectrum = torch.stft(x, N_FFT, HOP, window=self.window, pad_mode="constant", return_complex=True)
        return spectrum.abs().square().T @ self.bank

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """See the class.

        Raises:
            ValueError: not (1, L), or no sound in it.
        """
        if x.ndim != 2 or x.shape[0] != 1 or not float(x.abs().amax()) > 0:
            raise ValueError(f"x: expected mono speech (1, L) that is not silent, got shape {tuple(x.shape)}")
        x = x[0].float()
        level = 10 * math.log10(float(x.double().square().mean()))
        x = x * 10 ** (max(LOUDNESS - level, 0.0) / 20)
        starts = window_starts(len(x))
        x = F.pad(x, (0, max(0, (starts[-1] + WINDOW) * HOP - len(x))))
        mel = self.mel(x)
        windows = self(torch.stack([mel[s : s + WINDOW] for s in starts]))  # (n, width)
        return F.normalize(windows.mean(0), dim=0)


def window_starts(length: int) -> list[int]:
    """First frames of the windows of a sound of ``length`` samples."""
    frames = -(-(length + 1) // HOP)
    starts = list(range(0, max(1, frames - WINDOW + STEP + 1), STEP))
    if len(starts) > 1 and length - starts[-1] * HOP < COVERED * WINDOW * HOP:
        starts.pop()
    return starts


def load_speaker_encoder(folder: str | Path) -> SpeakerEncoder:
    """The network with the weights of ``pretrained.pt`` from the package resemblyzer 0.1.4.

    Raises:
        FileNotFoundError: no such file in ``folder``. ValueError: another file.
    """
    path = Path(folder) / "pretrained.pt"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing (weights of the PyPI package resemblyzer 0.1.4); run "
            "`python recipes/fetch_data.py --out data --helpers`"
        )
    network = SpeakerEncoder()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        # The other two tensors belong to the training loss: its scale and offset of similarities.
        network.load_state_dict({k: v for k, v in state.items() if not k.startswith("similarity_")})
    except Exception as e:  # torch.load raises whatever a damaged archive leads to
        raise ValueError(f"{path}: damaged or another network ({str(e)[:120]}); fetch it again") from e
    return network
