"""TokenBridge (arXiv 2503.16430): a continuous autoencoder whose latents become codes after training, number by number.

The autoencoder is that of latent diffusion with a KL term (arXiv 2112.10752; the published one is MAR's KL-16). It
trains without any quantizer; then each of the D numbers of a latent is rounded to one of 2^bits values
(`mmtok.quantizers.per_dimension`), and the number of cells can be changed at any time, without training. A language
model predicts the D codes of a position by a small head of its own: `dimension_head`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.catalogue import Taxonomy
from mmtok.image.raster2d import LatentGrid
from mmtok.layers.conv2d import ConvDecoder, ConvEncoder, ConvShape, edge_pad
from mmtok.quantizers.base import Quantized, masked_mean
from mmtok.quantizers.frozen import RowSample
from mmtok.quantizers.per_dimension import PerDimensionQuantizer
from mmtok.quantizers.sync import gather_rows
from mmtok.tokenizer import Reconstruction, evaluation
from mmtok.tokens import TokenSpec

POSTERIORS = ("mode", "sample")
CALIBRATIONS = ("scale", "standardise", "fit")
LOG_VARIANCE = (-30.0, 20.0)

PUBLISHED = {  # MAR's KL-16 and the 64 cells of TokenBridge, about 66.1 M parameters
    "width": 128,
    "multipliers": (1, 1, 2, 2, 4),
    "blocks": 2,
    "attention": (4,),
    "patch": 1,
    "latent_dim": 16,
    "scale": 0.2325,
    "bits": 6,
    "ranges": (5.0, 3.0),
    "image_size": 256,
}


class Bridge(LatentGrid):
    """KL autoencoder and per-dimension codes; ``Bridge(**PUBLISHED)`` is the published one.

    Codes are (B, D, T): level q is number q of the latents, the positions are the cells of the grid in raster order.

    Args:
        width, multipliers, blocks, attention, decoder_attention, middle_attention, patch: see
            `mmtok.layers.conv2d.ConvShape`; a cell has patch * 2 ** (len(multipliers) - 1) pixels of a side.
        latent_dim: D, numbers of a latent and levels of the codes.
        scale: latents are multiplied by it before they are quantized, divided after; `calibrate` sets it from data.
        bits: of each code; see `set_cells`.
        ranges: (value_range, gaussian_range) of `PerDimensionQuantizer`.
        posterior: what encode quantizes: the ``mode`` of the posterior, or a ``sample`` of it as the original does. The
            noise then depends on ``noise_seed`` and the grid alone, so that encode stays a function of the picture.
        noise_seed: see ``posterior``.
        image_size: longer side above which pictures are reduced before encoding; also sets ``spec.num_tokens``.
    """

    type_name = "bridge"
    scale: Tensor
    quantizer: PerDimensionQuantizer

    def __init__(
        self,
        width: int = 48,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        attention: Sequence[int] = (),
        decoder_attention: Sequence[int] = (),
        middle_attention: bool = True,
        patch: int = 2,
        latent_dim: int = 16,
        scale: float = 1.0,
        bits: int = 6,
        ranges: Sequence[float] = (5.0, 3.0),
        posterior: str = "mode",
        noise_seed: int = 0,
        image_size: int = 256,
    ):
        levels = (tuple(multipliers), blocks, tuple(attention), tuple(decoder_attention))
        shape = ConvShape(width, *levels, middle_attention, patch)
        sizes = {k: v for k, v in shape.to_dict().items() if k != "style"}
        super().__init__(
            sizes
            | {
                "latent_dim": latent_dim,
                "scale": scale,
                "bits": bits,
                "ranges": list(ranges),
                "posterior": posterior,
                "noise_seed": noise_seed,
                "image_size": image_size,
            }
        )
        if posterior not in POSTERIORS:
            raise ValueError(f"posterior: expected one of {POSTERIORS}, got {posterior!r}")
        if latent_dim < 1 or not 0 < scale < float("inf") or len(ranges) != 2:
            raise ValueError(
                f"expected latent_dim >= 1, a finite scale > 0 and two ranges, got {latent_dim}, {scale} and {ranges}"
            )
        self.posterior, self.noise_seed = posterior, noise_seed
        self.set_sizes(shape.factor, image_size)
        self.encoder = ConvEncoder(shape, 2 * latent_dim)
        self.to_moments = nn.Linear(2 * latent_dim, 2 * latent_dim)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.quantizer = PerDimensionQuantizer(latent_dim, bits, *ranges)
        self.from_latent = nn.Linear(latent_dim, latent_dim)
        self.decoder = ConvDecoder(shape, latent_dim)

    @classmethod
    def taxonomy(cls, config: Mapping[str, Any], spec: TokenSpec) -> Taxonomy:
        """Trained as KL-16 was, unless a checkpoint says otherwise; the quantizer comes after the training."""
        del config
        return Taxonomy(
            architecture="CNN/CNN",
            input="P",
            quantization="PDQ",
            bitrate="F",
            objective=("GAN", "Rec", "Perc", "KL"),
            auxiliary=(),
            joint=False,
            domain="N",
            rate=f"up to {spec.num_tokens}",
            order="2D",
        )

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [0, 1], whole cells -> mean and log-variance of the posterior, each (B, T, D), not scaled."""
        mean, log_variance = self.to_moments(self.encoder(x * 2 - 1)).float().chunk(2, -1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def latent(self, x: Tensor) -> Tensor:
        mean, log_variance = self.moments(x)
        if self.posterior == "sample":
            generator = torch.Generator().manual_seed(self.noise_seed)
            noise = torch.randn(mean.shape[1:], generator=generator).to(mean.device)  # (T, D), for every picture alike
            mean = mean + (0.5 * log_variance).exp() * noise
        return mean * self.scale

    def pixels(self, z_q: Tensor, height: int, width: int) -> Tensor:
        h, w = height // self.factor, width // self.factor
        return self.decoder(self.from_latent(z_q / self.scale), h, w).float() * 0.5 + 0.5

    def forward(self, x: Tensor, mask: Tensor | None = None, quantize: bool = False) -> Reconstruction:
        """(B, 3, H, W) in [0, 1] -> reconstruction of the same size; ``mask`` (B, T) keeps some cells' latents.

        In training mode the latents are a sample of the posterior, else its mode. With ``quantize`` false, as the
        autoencoder trains, they pass unrounded: ``quantized.z_q`` is z itself, the codes are for statistics only.
        ``aux["kl"]`` is the divergence from N(0, 1) in nats, the mean over batch, cells and dimensions.
        """
        padded = edge_pad(x, self.factor)
        mean, log_variance = self.moments(padded)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean) if self.training else mean
        z = z * self.scale
        quantized = self.quantizer(z, mask)
        if not quantize:
            kept = z if mask is None else torch.where(mask[..., None], z, 0.0)
            quantized = Quantized(kept, quantized.codes, quantized.loss, quantized.stats)
        x_hat = self.pixels(quantized.z_q, *padded.shape[-2:])
        kl = 0.5 * masked_mean(mean.square() + log_variance.exp() - 1 - log_variance, mask)  # to N(0, 1)
        return Reconstruction(x_hat[..., : x.shape[2], : x.shape[3]], quantized, {"kl": kl})

    def set_cells(self, bits: int) -> None:
        """Round to 2^bits cells from now on; scale, means and deviations stay, nothing is trained.

        The table is the Gaussian one again; one that `calibrate` had fitted to other cells must be fitted anew.
        """
        old = self.quantizer
        new = PerDimensionQuantizer(old.dim, bits, old.value_range, old.gaussian_range).to(old.mean.device)
        new.set_statistics(old.mean, old.std)
        self.quantizer = new.train(old.training)
        self.config["bits"] = bits
        self._hash = None

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], method: str = "scale", max_rows: int = 65536) -> None:
        """Set scale, means, deviations or tables from the latents that encode would quantize. Nothing trains.

        Args:
            batches: pictures (B, 3, H, W) in [0, 1], of any sizes; read once. Under several ranks each hands over its
                part and all get the same numbers.
            method: ``scale`` divides by the deviation of all numbers together (latent diffusion's rule, which gave
                0.2325); ``standardise`` also takes each dimension's own mean and deviation; ``fit`` cuts each
                dimension's own values into cells of equal mass instead of the Gaussian's.
            max_rows: latents kept, a uniform sample of those seen.

        Raises:
            ValueError: an unknown method, no pictures, or latents that are all alike.
        """
        if method not in CALIBRATIONS:
            raise ValueError(f"method: expected one of {CALIBRATIONS}, got {method!r}")
        D = self.quantizer.dim
        sample = RowSample(max_rows, D, self.device)
        with evaluation(self):
            for x in batches:
                sample.add((self.latent(edge_pad(x.to(self.device), self.factor)) / self.scale).reshape(-1, D))
        rows = gather_rows(sample.rows).double()
        if len(rows) < 2 or not bool(rows.std() > 0):
            raise ValueError(f"batches: expected pictures with different latents, got {len(rows)} latents; pass more")
        self.scale.copy_(1 / rows.std(correction=0))
        scaled = rows * self.scale
        self.set_cells(self.quantizer.bits)
        self.quantizer.set_statistics(torch.zeros(D), torch.ones(D))
        if method == "standardise":
            self.quantizer.set_statistics(scaled.mean(0), scaled.std(0, correction=0).clamp_min(1e-6))
        elif method == "fit":
            self.quantizer.fit(scaled.float(), max_rows=len(scaled))
