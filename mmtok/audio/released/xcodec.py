"""X-Codec's published weights: ``hf-audio/xcodec-*`` (transformers' XcodecModel), ``ZhenYe234/xcodec`` (the authors').

Both hold the teacher's weights, so `load_xcodec` needs nothing else. transformers folded the weight norm of the
acoustic convolutions; here it is split again, which changes no weight by more than the last bit.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmtok.audio.released.renaming import WEIGHT_NORMS, fill, fit, fold_weight_norm, read_config, rename
from mmtok.audio.xcodec import XCodec, quantizer_preset
from mmtok.layers.speech import weight_files
from mmtok.layers.vision import read_state
from mmtok.quantizers.rvq_legacy import LegacyCodebook

FAMILY = "X-Codec"
DILATIONS = (1, 3, 9)  # of every released model: the key names have exactly three residual units a block
_BOOK = {"codebook": "embed", "cluster_size": "cluster_size", "codebook_sum": "embed_avg", "initialized": "inited"}
_TEACHER, _THEIR_TEACHER = "teacher.network.", "semantic_model."
_UNREAD = (".cluster_size", ".embed_avg", ".inited", "masked_spec_embed")  # statistics and masks of training


def load_xcodec(folder: str | Path, preset: str = "fixed") -> XCodec:
    """The X-Codec in a folder that transformers' ``XcodecModel.save_pretrained`` wrote, or a download of one.

    The same codes as there for sound whose length is a multiple of the hop, which the released feature extractor pads
    to, and so do we; of other lengths the released class makes other frames at the end.

    Args:
        folder: with config.json and the weights (.safetensors or .bin).
        preset: how the quantizer learns in further training, ``fixed`` or ``faithful``; codes do not depend on it.

    Raises:
        ValueError: a missing or damaged file, another kind of model, or sizes that transformers can save but not run.
        ImportError: transformers is not installed.
    """
    folder = Path(folder)
    tokenizer = XCodec(**xcodec_config(folder, preset))
    state: dict[str, Tensor] = {}
    for path in weight_files(folder):
        state |= read_state(path)
    return _filled(tokenizer, convert_xcodec(state, tokenizer))


def load_xcodec_original(source: str | Path | Mapping[str, Tensor], tokenizer: XCodec) -> XCodec:
    """A file of ``ZhenYe234/xcodec`` (.pth), or its tensors, into ``tokenizer``, which it returns in eval mode.

    Args:
        source: the file does not say its sizes.
        tokenizer: of those sizes; the published ones are `XCodec`'s defaults with ``semantic`` = {"type": "hf_config",
            "config": the config.json of the teacher}, see `mmtok.layers.speech.PUBLISHED`.

    Raises:
        ValueError: a missing or damaged file, names or shapes that do not fit.
    """
    state = _read_original(Path(source)) if isinstance(source, (str, Path)) else source
    return _filled(tokenizer, convert_xcodec_original(state, tokenizer))


def xcodec_config(folder: str | Path, preset: str = "fixed") -> dict[str, Any]:
    """The arguments of `XCodec` for the config.json of transformers' ``XcodecModel`` in ``folder``.

    Raises as `load_xcodec`.
    """
    path = Path(folder) / "config.json"
    read_config(folder, "xcodec")
    try:
        import transformers
    except ImportError as e:
        raise ImportError("X-Codec's published weights need transformers: pip install 'mmtok[text]'") from e
    try:
        config: Any = transformers.XcodecConfig.from_pretrained(str(folder), local_files_only=True)
        acoustic, semantic = config.acoustic_model_config, config.semantic_model_config
        numbers = json.loads(semantic.to_json_string(use_diff=False))
    except Exception as e:  # huggingface_hub's checks and transformers have errors of their own
        raise ValueError(f"{path}: no config of an X-Codec ({' '.join(str(e).split())[:200]}); restore it") from e
    dim, Q, K = config.hidden_size, config.num_quantizers, config.codebook_size
    widths = [int(ratio * semantic.hidden_size) for ratio in config.channel_ratios]
    problem = ""
    if config.codebook_dim != dim:
        problem = f"a codebook_dim of {dim} (the latent's width), got {config.codebook_dim}"
    elif widths and widths[-1] != semantic.hidden_size:
        problem = f"a last channel ratio of 1, got {config.channel_ratios[-1]}"
    elif 1 in (*acoustic.downsampling_ratios, *acoustic.upsampling_ratios):
        problem = "strides of 2 or more in the acoustic model, got 1"
    if problem:
        raise ValueError(f"{path}: expected {problem}; transformers cannot run such a model either")
    learning: dict[str, Any] = {}
    if preset == "faithful":  # trained at one of its bitrates, drawn for each batch
        level = math.log2(K) * config.frame_rate / 1000  # kbit/s
        learning["dropout_levels"] = [min(Q, max(1, math.floor(r / level))) for r in config.target_bandwidths]
    same = list(acoustic.upsampling_ratios) == list(acoustic.downsampling_ratios)
    return {
        "sample_rate": config.sample_rate,
        "strides": list(acoustic.downsampling_ratios),
        "decoder_strides": None if same else list(acoustic.upsampling_ratios),
        "encoder_width": acoustic.encoder_hidden_size,
        "decoder_width": acoustic.decoder_hidden_size,
        "acoustic_dim": acoustic.hidden_size,
        "dilations": list(DILATIONS),
        "kernel_size": 7,
        "semantic": {
            "type": "hf_config",
            "config": numbers,
            "padding": config.hop_length // 2,
            "sample_rate": config.sample_rate,
        },
        "semantic_conv": {
            "kernel_size": config.kernel_size,
            "unit_kernel_size": config.unit_kernel_size,
            "channel_ratios": list(config.channel_ratios),
            "strides": list(config.strides),
            "dilations": list(config.block_dilations),
        },
        "quantizer": quantizer_preset(preset, {"num_codebooks": Q, "codebook_size": K, **learning}),
    }


def convert_xcodec(state: Mapping[str, Tensor], tokenizer: XCodec) -> dict[str, Tensor]:
    """Tensors under transformers' names -> the state of ``tokenizer``, which says what layers there are.

    Args:
        state: with or without weight norm in the acoustic convolutions. tokenizer: may be on the meta device.

    Raises:
        ValueError: names that are missing or unexpected.
    """
    return _convert(state, tokenizer, _layers(tokenizer, original=False))


def convert_xcodec_original(state: Mapping[str, Tensor], tokenizer: XCodec) -> dict[str, Tensor]:
    """As `convert_xcodec`, for the names of the authors' files (``encoder.block.0.weight_g``, ``fc_prior.weight``)."""
    return _convert(state, tokenizer, _layers(tokenizer, original=True))


def _layers(tokenizer: XCodec, original: bool) -> dict[str, str]:
    """Our layers -> the published ones."""
    teacher, number = tokenizer.teacher, len(tokenizer.config["dilations"])
    if teacher is None or teacher.external_weights or number != len(DILATIONS):
        raise ValueError(
            f"{FAMILY}: expected a tokenizer with {len(DILATIONS)} dilations and a teacher of its own, which the "
            'published weights fill (semantic={"type": "hf_config", ...}), got semantic='
            f"{None if teacher is None else tokenizer.config['semantic']['type']!r} and {number} dilations"
        )
    names = _acoustic_layers(tokenizer, original)
    conv, deconv = (".conv", ".deconv") if original else ("", "")
    ends = {"encoder": {"first": "conv"}, "decoder": {"first": "conv1", "last": "conv2"}}
    decoder = tokenizer.semantic_decoder
    if decoder is None:
        raise ValueError(f"{FAMILY}: expected a tokenizer with semantic_decoder=True, which the published weights fill")
    for part, module in (("encoder", tokenizer.semantic_encoder), ("decoder", decoder)):
        ours, theirs = f"semantic_{part}", f"{part}_semantic"
        names |= {f"{ours}.{a}": f"{theirs}.{b}{conv}" for a, b in ends[part].items()}
        for i, stride in enumerate(module.strides):
            block, published = f"{ours}.blocks.{i}", f"{theirs}.conv_blocks.{i}"
            transposed = part == "decoder" and stride > 1
            names[f"{block}.conv"] = f"{published}.conv{deconv if transposed else conv}"
            for j in range(len(module.blocks[i].units)):  # pyright: ignore[reportArgumentType]
                names[f"{block}.units.{j}.conv1"] = f"{published}.res_units.{j}.conv1{conv}"
                names[f"{block}.units.{j}.conv2"] = f"{published}.res_units.{j}.conv2"
    linears = ("fc_prior", "fc_post1", "fc_post2") if original else ("fc", "fc1", "fc2")
    names |= dict(zip(("join", "to_semantic", "to_acoustic"), linears, strict=True))
    book = "quantizer.vq.layers.{}._codebook" if original else "quantizer.quantizers.{}.codebook"
    return names | {f"quantizer.books.{q}": book.format(q) for q in range(tokenizer.quantizer.num_codebooks)}


def _acoustic_layers(tokenizer: XCodec, original: bool) -> dict[str, str]:
    """The layers of the acoustic encoder and decoder; the authors number all layers of a part in one list."""
    unit = ("snake1", "conv1.conv", "snake2", "conv2.conv")
    unit_names = [f"block.{i}" for i in range(4)] if original else ["snake1", "conv1", "snake2", "conv2"]
    number = len(DILATIONS)
    names = {}
    for part, first_unit in (("encoder", 0), ("decoder", 2)):  # the decoder's units follow its stride
        depth = len(tokenizer.encoder.blocks if part == "encoder" else tokenizer.decoder.blocks)
        if original:
            root = "encoder.block" if part == "encoder" else "decoder_2.model"
            blocks = [f"{root}.{i + 1}.block" for i in range(depth)]
            ends = [f"{root}.{i}" for i in (0, depth + 1, depth + 2)]
            units = [str(first_unit + j) for j in range(number)]
            snake, stride = ("0", "1") if part == "decoder" else (str(number), str(number + 1))
        else:
            blocks = [f"acoustic_{part}.block.{i}" for i in range(depth)]
            ends = [f"acoustic_{part}.{x}" for x in ("conv1", "snake1", "conv2")]
            units = [f"res_unit{j + 1}" for j in range(number)]
            snake, stride = "snake1", "conv_t1" if part == "decoder" else "conv1"
        names |= dict(zip([f"{part}.{x}" for x in ("first.conv", "snake", "last.conv")], ends, strict=True))
        for i, block in enumerate(blocks):
            ours = f"{part}.blocks.{i}"
            names[f"{ours}.snake"] = f"{block}.{snake}"
            names[f"{ours}.{'up' if part == 'decoder' else 'down'}.conv"] = f"{block}.{stride}"
            for j, name in enumerate(units):
                pairs = zip(unit, unit_names, strict=True)
                names |= {f"{ours}.units.{j}.{a}": f"{block}.{name}.{b}" for a, b in pairs}
    return names


def _convert(state: Mapping[str, Tensor], tokenizer: XCodec, layers: Mapping[str, str]) -> dict[str, Tensor]:
    own = tokenizer.state_dict()
    teacher = {_respelled(k): v for k, v in state.items() if k.startswith(_THEIR_TEACHER)}
    published = fold_weight_norm({k: v for k, v in state.items() if not k.startswith(_THEIR_TEACHER)}) | teacher
    names = {}
    for key in own:
        if key.startswith(_TEACHER):
            ours, theirs = key, _THEIR_TEACHER + key.removeprefix(_TEACHER)
        else:
            ours = key.replace("parametrizations.weight.original0", "weight").replace(".original1", "")
            ours = ours.replace("parametrizations.weight", "weight")
            layer, _, leaf = ours.rpartition(".")
            theirs = f"{layers[layer]}.{_BOOK.get(leaf, leaf)}"
        if theirs in published or not theirs.endswith(_UNREAD):
            names[ours] = theirs
    found = rename(published, names, FAMILY, _UNREAD)
    for key, value in own.items():
        if key.endswith(".initialized"):
            found[key] = torch.tensor(True)
        elif key.endswith(_UNREAD) and key.startswith(_TEACHER) and key not in found:
            found[key] = torch.zeros(value.shape)
    return fit(found, own, FAMILY)


def _respelled(key: str) -> str:
    """A teacher's weight norm under torch's present names."""
    for old, new in zip(*WEIGHT_NORMS, strict=True):
        if key.endswith("." + old):
            return key.removesuffix(old) + new
    return key


@torch.no_grad()
def _filled(tokenizer: XCodec, state: Mapping[str, Tensor]) -> XCodec:
    """`_convert`'s result loaded, the codebooks fit for further training, in evaluation mode."""
    fill(tokenizer, state)
    for name, book in tokenizer.named_modules():
        if not isinstance(book, LegacyCodebook):  # the released averages do not fit their codes, see rvq_legacy.py
            continue
        size, total = state.get(f"{name}.cluster_size"), state.get(f"{name}.codebook_sum")
        if size is not None and total is not None and bool(size.any()):
            book.cluster_size.copy_(size)
            book.codebook_sum.copy_(total)
        else:  # below this count every code would be replaced in the first step
            book.cluster_size.fill_(max(1.0, book.dead_code_count))
            book.codebook_sum.copy_(book.codebook * book.cluster_size[:, None])
    return tokenizer.eval()


def _read_original(path: Path) -> dict[str, Tensor]:
    """The tensors of the authors' file, which also holds byte streams."""
    if path.suffix == ".safetensors" or not path.is_file():
        return read_state(path)
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # pickle and zip have errors of their own
        raise ValueError(f"{FAMILY}: cannot read {path} ({' '.join(str(e).split())[:200]}); restore the file") from e
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise ValueError(f"{FAMILY}: {path} is no state dict; expected a mapping of names to tensors")
    return tensors
