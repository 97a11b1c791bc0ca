"""SNAC (arXiv 2410.14411) through its authors' package: levels of different rates, ``snac:<folder or repository>``."""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmtok.catalogue import Family, Taxonomy
from mmtok.data.hub import folder_of
from mmtok.tokens import Tokens
from mmtok.wrappers.dac import inputs_read
from mmtok.wrappers.speechtokenizer import read_state
from mmtok.wrappers.wrapped import WrappedAudio, require

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there
# What says, with the weights, which codes a sound has; by the names of the package's constructor.
FACTS = (
    "sampling_rate",
    "encoder_rates",
    "decoder_rates",
    "attn_window_size",
    "codebook_size",
    "codebook_dim",
    "vq_strides",
)
HEAD_WIDTH = 64  # of the package's attention; its widths must be multiples
NOISE_SEED = 0


def open_snac(source: str) -> SNACWrapper:
    """Load a folder with config.json and the weights (model.safetensors or pytorch_model.bin), or a hub repository.

    Raises:
        ValueError: no such folder, a file that is missing or damaged, another model's config, weights that do not fit.
        ImportError: the package is not installed.
    """
    folder = folder_of(source, ("config.json", *WEIGHTS))
    package = require("snac", FAMILY)
    config = _read_config(folder / "config.json", tuple(inspect.signature(package.SNAC).parameters))
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} has no weights; expected {' or '.join(WEIGHTS)} beside config.json")
    state = read_state(found[0])
    try:
        network = package.SNAC(**config)
        network.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError, IndexError) as e:
        reason = " ".join(str(e).split())[:300]
        raise ValueError(f"{folder}: config.json and {found[0].name} make no SNAC ({reason}); restore both") from e
    return SNACWrapper(network, folder)


FAMILY = Family(
    name="snac",
    title="SNAC: residual codes at several rates, the first the slowest",
    modality="audio",
    source="folder with config.json and pytorch_model.bin, or hub repository",
    example="snac:hubertsiuzdak/snac_24khz",
    package="snac",
    install="pip install 'mmtok[codecs]'",
    code_licence="MIT",
    weights_licence="MIT",
    # The survey's row, but for the architecture: it says CNN+RNN/CNN, and the released networks have no recurrence.
    # Those at 32 and 44.1 kHz have local attention in encoder and decoder, the one at 24 kHz convolutions alone.
    taxonomy=Taxonomy(
        architecture="CNN+T/CNN+T",
        input="T",
        quantization="MSRVQ",
        bitrate="F",
        objective=("GAN", "Feat", "Rec", "VQ"),
        auxiliary=(),
        joint=True,
        domain="SMA",
        rate="47, 83, 115 (fastest level)",
        streamable=False,
    ),
    open=open_snac,
)


class SNACWrapper(WrappedAudio):
    """The package's ``SNAC`` network.

    Upstream's codes are a list of (B, T_q), slower levels shorter. Here they are (B, Q, T) at the rate of the fastest
    level, every code of a slower one standing ``level_strides[q]`` times. Clips are padded with zeros to groups of
    ``frame_group`` frames, as the package does, but come back at their own length.

    The decoder adds noise that it draws anew each time. Mitigated, `decode` draws the same for every item, so that the
    same codes give the same sound, alone and in a batch. ``generator`` makes other draws, repeatably: one for each
    item, in their order. The channels of an item share theirs. Torch's own random state stays as it is. Raw, the noise
    comes from it, and ``generator`` is not used.

    Args:
        network: ``snac.SNAC``.
        source: where it came from, for the name and the model card.

    Raises:
        ValueError: sizes that the package can build but not run.
    """

    family = FAMILY
    # The decoder is bounded too, but its noise is drawn for the whole sound: pieces would get noise of their own.
    decode_margin = None
    generator: torch.Generator | None = None  # of the decode call under way

    def __init__(self, network: nn.Module, source: str | Path):
        super().__init__(network, _facts(network), source)
        c: dict[str, Any] = self.config
        net: Any = network
        window = c["attn_window_size"]
        width = net.encoder_dim * 2 ** len(c["encoder_rates"])
        narrow = bool(width % HEAD_WIDTH or net.decoder_dim % HEAD_WIDTH)
        problems = {
            "rates of at least 2": min(c["encoder_rates"] + c["decoder_rates"], default=0) < 2,
            "encoder and decoder rates of one product": math.prod(c["encoder_rates"]) != math.prod(c["decoder_rates"]),
            "vq_strides of at least 1": min(c["vq_strides"], default=0) < 1,
            f"latent_dim {width}, the width of the encoder": net.latent_dim != width,
            "an attention window of at least 1": window is not None and window < 1,
            f"widths that are multiples of {HEAD_WIDTH} where there is attention": window is not None and narrow,
        }
        for expected in (name for name, wrong in problems.items() if wrong):
            raise ValueError(f"{self.name}: expected {expected}, got {c}; restore the folder's config.json")
        self.sample_rate, self.hop_length = c["sampling_rate"], math.prod(c["encoder_rates"])
        self.level_strides = tuple(c["vq_strides"])
        self.codebook_sizes = (c["codebook_size"],) * len(self.level_strides)
        self.frame_group = math.lcm(*self.level_strides, window or 1)
        self.encode_margin = _frames_read(net.encoder, self.hop_length, self.frame_group)

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        del lengths  # the package takes no mask
        network: Any = self.network
        levels = zip(network.encode(x)[:num_codebooks], self.level_strides, strict=False)
        return torch.stack([codes.repeat_interleave(stride, dim=1) for codes, stride in levels], 1)

    def network_decode(self, codes: Tensor) -> Tensor:
        if not self.mitigated:
            return self._sound(codes)
        seed = NOISE_SEED
        if self.generator is not None:
            seed = int(torch.randint(2**62, (), generator=self.generator, device=self.generator.device))
        rows = []
        for row in codes:  # one by one: noise for several at once is other noise
            with _seeded(seed, codes.device):
                rows.append(self._sound(row[None]))
        return torch.cat(rows)

    def _sound(self, codes: Tensor) -> Tensor:
        """Codes (B, Q, T) of the first Q levels -> (B, 1, T * hop). The package's own decode takes all levels only."""
        network: Any = self.network
        z: Any = 0.0
        for q, level in enumerate(network.quantizer.quantizers[: codes.shape[1]]):
            part = level.out_proj(level.decode_code(codes[:, q, :: level.stride]))
            z = z + part.repeat_interleave(level.stride, dim=-1)
        return network.decoder(z)

    @torch.no_grad()
    def decode(
        self,
        tokens: Tokens,
        text: Any = None,
        size: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor | list[Tensor]:
        """As `AudioTokenizer.decode`; ``generator`` draws other noise than the usual, see the class."""
        if generator is None:
            return super().decode(tokens, text, size)
        tokens.check(self.spec)  # so that the fingerprint is remembered here, not in the copy
        call = copy.copy(self)  # so that two calls at once do not see each other's generator
        call.generator = generator
        return super(SNACWrapper, call).decode(tokens, text, size)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's default generator of ``device`` starts from ``seed`` inside the block and is as before after it."""
    others = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=others, device_type=device.type if others else "cuda"):
        if device.type == "cpu":  # torch.manual_seed would change those of all other devices too
            torch.default_generator.manual_seed(seed)
        elif device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        else:
            torch.get_device_module(device).manual_seed(seed)
        yield


def _facts(network: Any) -> dict[str, Any]:
    """What of the network shapes its codes, as plain JSON values."""
    facts = {name: getattr(network, name) for name in FACTS}
    facts = {k: [int(v) for v in value] if isinstance(value, (list, tuple)) else value for k, value in facts.items()}
    return facts | {"sampling_rate": int(facts["sampling_rate"])}


def _frames_read(encoder: nn.Module, hop: int, group: int) -> int:
    """Frames before or after a group of ``group`` that its codes depend on at most.

    Attention stays within windows of ``window_size`` frames that are counted from the start of the sound, and rotates
    by the place in the window. A group has whole windows, so pieces that begin with one see the same windows.
    """
    layers = list(encoder.modules())
    first, last = 0, group - 1
    while layers:
        at = max((i for i, m in enumerate(layers) if hasattr(m, "window_size")), default=0)
        first, last = inputs_read(layers[at:], first, last)
        if window := getattr(layers[at], "window_size", None):
            first, last = first // window * window, last // window * window + window - 1
        layers = layers[:at]
    return max(-(first // hop), last // hop - (group - 1))


def _read_config(path: Path, known: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no config.json; expected a folder with the files of a SNAC repository")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged ({e}); restore the file") from e
    if not isinstance(config, dict) or not set(config) <= set(known):
        foreign = sorted(set(config) - set(known)) if isinstance(config, dict) else config
        raise ValueError(f"{path} is no config of SNAC: expected an object with some of {known}, got also {foreign}")
    return config
