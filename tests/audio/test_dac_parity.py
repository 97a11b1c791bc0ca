"""DAC against transformers' DacModel: the same codes and the same sound, from weights that either side saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmtok.audio.dac import DAC, DAC_16KHZ, DAC_24KHZ, DAC_44KHZ
from mmtok.audio.released.dac import (
    convert_dac,
    convert_dac_original,
    load_dac,
    load_dac_original,
    module_names,
    published_names,
)
from mmtok.tokens import Tokens

transformers: Any = pytest.importorskip("transformers")

STRIDES = ((2, 4, 5), (2, 3), (3, 5), (2, 4))
MISSING = {(2, 4, 5): 8, (2, 3): 2, (3, 5): 4, (2, 4): 0}  # for the decoder: 1 sample an odd stride, times the rest


def released(folder: Path, strides: tuple[int, ...] = STRIDES[0]) -> Any:
    """A random model, saved, whose latents and codebooks have spread, so that no code wins by rounding."""
    torch.manual_seed(len(strides) + sum(strides))
    sizes = {"encoder_hidden_size": 4, "decoder_hidden_size": 16, "codebook_dim": 4}
    config = transformers.DacConfig(downsampling_ratios=strides, n_codebooks=5, codebook_size=32, **sizes)
    model = transformers.DacModel(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("alpha"):
                p.uniform_(0.5, 2)
            elif name.endswith("bias"):
                p.normal_(std=0.1)
            elif p.ndim > 2:  # quiet branches: a loud stack of sines is chaotic, and blows up the last bits
                p.normal_(std=(0.1 if "res_unit" in name and "conv2" in name else 1) * p[0].numel() ** -0.5)
            else:
                p.normal_()
    model.save_pretrained(folder)
    return model


def noise(*shape: int) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3).clamp(-1, 1)


def decoded(tokenizer: DAC, tokens: Tokens) -> Tensor:
    y = tokenizer.decode(tokens)
    assert isinstance(y, Tensor)
    return y


@pytest.mark.parametrize("strides", STRIDES)
@torch.no_grad()
def test_codes_and_sound_are_those_of_transformers(tmp_path: Path, strides: tuple[int, ...]):
    theirs = released(tmp_path, strides)
    ours, early = load_dac(tmp_path), load_dac(tmp_path, align=False)
    hop, gap = ours.hop_length, MISSING[strides]
    extractor = transformers.DacFeatureExtractor(hop_length=hop, sampling_rate=16000)
    used = set()
    for L in (1, hop - 1, hop, hop + 1, 17 * hop + 3):
        x = noise(L)
        values = torch.as_tensor(extractor(x.numpy(), sampling_rate=16000, return_tensors="pt").input_values)
        assert values.shape[-1] == -(-L // hop) * hop
        for levels in range(1, 6):
            expected = theirs.encode(values, n_quantizers=levels).audio_codes
            tokens = ours.encode(x[None], sample_rate=16000, num_codebooks=levels)
            assert torch.equal(tokens.codes, expected)
            sound = theirs.decode(audio_codes=expected).audio_values  # (1, T * hop - gap)
            T = expected.shape[2]
            assert sound.shape[-1] == T * hop - gap and sound.abs().max() > 0.01
            aligned = ours.decode_samples(expected, torch.tensor([T]))[0]
            raw = early.decode_samples(expected, torch.tensor([T]))[0]
            assert aligned.shape == raw.shape == (1, T * hop)
            assert torch.equal(aligned[:, :gap], torch.zeros(1, gap)) and torch.equal(
                raw[:, T * hop - gap :], aligned[:, :gap]
            )
            torch.testing.assert_close(aligned[:, gap:], sound, atol=1e-4, rtol=0)
            torch.testing.assert_close(raw[:, : T * hop - gap], sound, atol=1e-4, rtol=0)
            assert decoded(ours, tokens).shape == (1, 1, L)
        used |= set(expected.flatten().tolist())
    assert len(used) > 16  # of 32: the codes are no constant


def test_the_delay_is_named_as_facts_measure_it():
    with torch.device("meta"):
        delays = {
            name: DAC(**sizes, align=False).delay_samples for name, sizes in (("16", DAC_16KHZ), ("44", DAC_44KHZ))
        }
        assert delays == {"16": -8, "44": 0} and DAC(**DAC_16KHZ).delay_samples == 0


@torch.no_grad()
def test_batches_and_pieces_equal_single_whole_clips(tmp_path: Path):
    theirs = released(tmp_path)
    ours = load_dac(tmp_path)
    hop, T = ours.hop_length, 3 * ours.margin
    clips = [noise(1, n) for n in (T * hop, 7 * hop, 7 * hop - 5, 1)]
    tokens = ours.encode(clips, sample_rate=16000)
    batch = torch.stack([c[:, : 7 * hop] for c in clips[:1]] + [torch.nn.functional.pad(clips[2], (0, 5))])
    assert torch.equal(ours.encode_samples(batch, torch.tensor([7, 7]) * hop, None), theirs.encode(batch).audio_codes)
    together = ours.decode(tokens)
    ours.chunk_frames = 5
    assert torch.equal(ours.encode(clips, sample_rate=16000).codes, tokens.codes)
    for i, clip in enumerate(clips):
        alone = ours.encode(clip, sample_rate=16000)
        assert torch.equal(tokens[i].codes, alone.codes)
        torch.testing.assert_close(decoded(ours, alone)[0], together[i], atol=1e-5, rtol=0)


def originals(state: dict[str, Tensor], tokenizer: DAC) -> dict[str, Tensor]:
    """The same weights as the original's file has them: its names, and weight norm as lengths and directions."""
    to_original = published_names(tokenizer, original=True)
    found = {}
    for ours, theirs in published_names(tokenizer, original=False).items():
        value, name = state[theirs], to_original[ours]
        if name.endswith(".weight") and "codebook" not in name:
            stem = name.removesuffix("weight")
            found[stem + "weight_v"] = 3 * value  # only the direction counts
            found[stem + "weight_g"] = value.flatten(1).norm(dim=1).view(-1, 1, 1)
        else:
            found[name] = value
    return found


@torch.no_grad()
def test_the_original_names_and_file_convert_to_the_same_model(tmp_path: Path):
    theirs = released(tmp_path)
    ours = load_dac(tmp_path)
    state = originals(theirs.state_dict(), ours)
    # places of descript-audio-codec 1.0.0, written out by hand
    for key in (
        "encoder.block.0.weight_g",
        "encoder.block.1.block.0.block.0.alpha",
        "encoder.block.1.block.2.block.3.weight_v",
        "encoder.block.3.block.3.alpha",
        "encoder.block.3.block.4.bias",
        "encoder.block.4.alpha",
        "encoder.block.5.weight_v",
        "decoder.model.1.block.0.alpha",
        "decoder.model.1.block.1.weight_g",
        "decoder.model.3.block.4.block.1.weight_v",
        "decoder.model.4.alpha",
        "decoder.model.5.bias",
        "quantizer.quantizers.4.out_proj.weight_g",
        "quantizer.quantizers.0.codebook.weight",
    ):
        assert key in state
    kwargs = {"encoder_dim": 4, "encoder_rates": [2, 4, 5], "decoder_dim": 16, "decoder_rates": [5, 4, 2]}
    kwargs |= {"n_codebooks": 5, "codebook_size": 32, "codebook_dim": 4, "sample_rate": 16000, "latent_dim": None}
    torch.save({"state_dict": state, "metadata": {"kwargs": kwargs}}, tmp_path / "weights.pth")
    again = load_dac_original(tmp_path / "weights.pth")
    x = noise(1, 2000)
    tokens = again.encode(x, sample_rate=16000)
    assert torch.equal(tokens.codes, theirs.encode(x[None]).audio_codes)
    torch.testing.assert_close(
        decoded(again, tokens), decoded(ours, ours.encode(x, sample_rate=16000)), atol=1e-5, rtol=0
    )
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"expected a file with state_dict and metadata.kwargs"):
        load_dac_original(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("sizes", "millions"), [(DAC_16KHZ, 74.14), (DAC_24KHZ, 74.65), (DAC_44KHZ, 76.62)], ids=["16k", "24k", "44k"]
)
def test_published_sizes_have_the_published_parameters(sizes: dict, millions: float):
    config = {"downsampling_ratios": sizes["strides"], "n_codebooks": sizes["num_codebooks"]}
    with torch.device("meta"):
        ours, theirs = DAC(**sizes), transformers.DacModel(transformers.DacConfig(**config))
    assert round(sum(p.numel() for p in theirs.parameters()) / 1e6, 2) == millions
    folded = sum(p.numel() for name, p in ours.named_parameters() if not name.endswith("original0"))
    assert folded == sum(p.numel() for p in theirs.parameters())
    assert set(convert_dac(theirs.state_dict(), ours)) == {
        k for k in ours.state_dict() if not k.endswith("cluster_size")
    }


def test_wrong_files_are_refused_with_names(tmp_path: Path):
    state = dict(released(tmp_path).state_dict())
    ours = load_dac(tmp_path)
    lost = state.pop("decoder.block.0.conv_t1.weight")
    with pytest.raises(
        ValueError, match=r"missing \['decoder.block.0.conv_t1.weight'\] \(1\), unexpected \['odd'\] \(1\)"
    ):
        convert_dac(state | {"odd": lost}, ours)
    state["decoder.block.0.conv_t1.weight"] = lost[:, :, :-1]
    with pytest.raises(ValueError, match=r"do not fit the config"):
        convert_dac(state, ours)
    with pytest.raises(ValueError, match=r"missing \['decoder.model"):
        convert_dac_original(state, ours)
    with pytest.raises(ValueError, match=r"weight norm: expected both"):
        convert_dac_original({"encoder.block.0.weight_g": lost}, ours)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"model_type": "encodec"}, "expected model_type 'dac', got 'encodec'"),
        ({"upsampling_ratios": [2, 4, 5]}, "mirror"),
        ({"codebook_dim": 3}, "do not fit the config"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_dac(tmp_path)
    del config["sampling_rate"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"lacks 'sampling_rate'"):
        load_dac(tmp_path)
    with pytest.raises(ValueError, match=r"pass its folder"):
        load_dac(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"each at least 2"):
        DAC(strides=(2, 1))
    with pytest.raises(ValueError, match=r"cannot stream"):
        ours.streamer()


def test_a_training_step_moves_everything_and_a_copy_gives_the_same_codes(tmp_path: Path):
    ours = DAC(16000, (2, 3), 4, 8, num_codebooks=3, codebook_size=8, codebook_dim=2, quantizer_dropout=0.0)
    x = noise(2, 1, 60 * 6)
    mask = torch.arange(60) < torch.tensor([[60], [40]])
    with torch.no_grad():
        for p in ours.quantizer.parameters():
            p.normal_()
    out = ours.train()(x, mask)
    assert out.x_hat.shape == x.shape and not out.x_hat[1, :, 40 * 6 + 2 :].any()
    ((out.x_hat - x).square().mean() + out.quantized.loss).backward()
    still = [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not still
    with torch.no_grad():
        before = {n: p.clone() for n, p in ours.named_parameters()}
        torch.optim.Adam(ours.parameters(), 1e-2).step()
        assert all(not torch.equal(p, before[n]) for n, p in ours.named_parameters())
    tokens = ours.encode(x[0], sample_rate=16000)
    ours.save(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    copy = DAC(**stored["config"])
    copy.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    again = copy.encode(x[0], sample_rate=16000)
    assert stored["type"] == "dac" and copy.fingerprint == ours.fingerprint and torch.equal(again.codes, tokens.codes)
    assert torch.equal(decoded(copy, again), decoded(ours, tokens))


def test_every_module_has_one_published_name():
    for original in (False, True):
        names = module_names(4, 9, original)
        assert len(set(names.values())) == len(names) == 2 * (3 + 4 * 14) + 27
