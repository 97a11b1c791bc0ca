"""X-Codec's own parts: a teacher that is given, the copy without a semantic decoder, its presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mmtok
from mmtok.audio.xcodec import PRESETS, XCodec, quantizer_preset
from mmtok.quantizers import LegacyResidualVectorQuantizer, ResidualVectorQuantizer

SHAPE = {"front": "stft", "strides": (80, 2, 2), "encoder_width": 4, "decoder_width": 16, "acoustic_dim": 8}
WHISPER = {"type": "whisper", "dim": 8, "num_layers": 1, "num_heads": 1}
NUMBERS = {"num_codebooks": 2, "codebook_size": 8, "kmeans_init": False}


class Loudness(nn.Module):
    """A teacher that is easy to predict: the level of each frame, and its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        level = x[:, 0].unfold(-1, 320, 320).square().mean(-1, keepdim=True).sqrt()
        return self.drop(torch.cat([level, -level], 2) * self.scale)


def codec(semantic: dict | None = None, preset: str = "fixed", semantic_decoder: bool = True) -> XCodec:
    torch.manual_seed(0)
    quantizer = quantizer_preset(preset, NUMBERS)
    return XCodec(**SHAPE, semantic=semantic, semantic_decoder=semantic_decoder, quantizer=quantizer)


def sound(batch: int = 1, frames: int = 6) -> Tensor:
    return torch.rand(batch, 1, frames * 320, generator=torch.Generator().manual_seed(1)) - 0.5


def test_a_given_teacher_is_frozen_and_asked_for_again_after_loading(tmp_path: Path):
    tok, teacher = codec({"type": "given", "dim": 2}), Loudness()
    with pytest.raises(ValueError, match=r"expected codec.use_teacher\(module\) first"):
        tok(sound())
    tok.use_teacher(teacher)
    output = tok.train()(sound(2))
    output.aux["semantic"].backward()
    assert not teacher.training and teacher.scale.grad is None and not teacher.scale.requires_grad
    assert tok.join.weight.grad is not None and float(tok.join.weight.grad.abs().max()) > 0
    tok.eval()
    codes = tok.encode(sound()[0], 16000).codes
    tok.save(tmp_path)
    loaded = mmtok.load(tmp_path)
    assert isinstance(loaded, XCodec) and loaded.fingerprint == tok.fingerprint
    with pytest.raises(ValueError, match="use_teacher"):
        loaded.encode(sound()[0], 16000)
    loaded.use_teacher(Loudness())
    assert torch.equal(loaded.encode(sound()[0], 16000).codes, codes)


def test_a_teacher_of_another_shape_is_refused():
    tok = codec({"type": "given", "dim": 3})
    tok.use_teacher(Loudness())
    with pytest.raises(ValueError, match=r"teacher: expected features \(B, T, D\) = \(1, 6, 3\)"):
        tok(sound())
    with pytest.raises(ValueError, match="expected a codec with semantic"):
        codec(WHISPER).use_teacher(Loudness())
    for wrong in ({"type": "given"}, {"type": "given", "dim": 2, "width": 3}):
        with pytest.raises(ValueError, match="expected dim, and keys out of"):
            codec(wrong)
    with pytest.raises(ValueError, match="expected positive dim"):
        codec({"type": "given", "dim": 0})


def test_features_that_were_computed_before_are_the_same():
    tok = codec(WHISPER).eval()
    assert tok.teacher is not None
    features = tok.teacher(sound(2))
    assert torch.equal(tok(sound(2), features=features).x_hat, tok(sound(2)).x_hat)


def test_the_copy_without_semantic_decoder_has_the_same_codes_and_sound(tmp_path: Path):
    tok = codec(WHISPER).eval()
    tok.name = "mine"
    lean = tok.without_semantic_decoder()
    x = sound()[0]
    tokens = lean.encode(x, 16000)
    assert torch.equal(tokens.codes, tok.encode(x, 16000).codes) and lean.name == "mine"
    assert torch.equal(lean.sound(lean.quantizer.decode(tokens.codes)), tok.sound(tok.quantizer.decode(tokens.codes)))
    gone = {k.split(".")[0] for k in tok.state_dict()} - {k.split(".")[0] for k in lean.state_dict()}
    assert gone == {"semantic_decoder", "to_semantic"}
    assert lean(sound()).aux == {} and set(tok(sound()).aux) == {"semantic"}
    with pytest.raises(ValueError, match="built without a semantic decoder"):
        lean.semantic_features(torch.zeros(1, 2, lean.quantizer.dim))
    lean.save(tmp_path)
    assert torch.equal(mmtok.load(tmp_path).encode(x, 16000).codes, tokens.codes)


def test_presets_build_what_they_name():
    kinds = {name: type(codec(preset=name).quantizer) for name in PRESETS}
    assert kinds == {"faithful": LegacyResidualVectorQuantizer, "fixed": ResidualVectorQuantizer}
    assert codec().quantizer.codebook_sizes == (8, 8)
    with pytest.raises(ValueError, match="preset: expected one of"):
        quantizer_preset("fix")


def test_a_teacher_of_another_hop_is_refused():
    with pytest.raises(ValueError, match="expected a teacher of 16000 Hz with a hop of 640"):
        XCodec(**{**SHAPE, "strides": (80, 2, 4)}, semantic=WHISPER)
    with pytest.raises(ValueError, match="decoder_strides: expected a product of 320"):
        XCodec(**SHAPE, decoder_strides=(2, 2))
    with pytest.raises(ValueError, match="front: expected"):
        XCodec(**{**SHAPE, "front": "mel"})
