"""Contenders: one spelling for what is compared, the resolved rate in its protocol, bytes that are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mmtok
from mmtok.audio.codec import AudioCodec
from mmtok.bench.classical import fit_image
from mmtok.bench.contenders import Contender, FittedImage, open_contenders
from mmtok.bench.records import Item
from mmtok.layers.text import TextFeatures
from mmtok.tokens import Tokens
from mmtok.wrappers.classical_images import IMAGE_CODECS, decode_image, encode_image, image_codec

TINY: dict[str, Any] = {
    "sample_rate": 8000,
    "strides": (2, 4),
    "encoder_width": 4,
    "decoder_width": 16,
    "latent_dim": 8,
    "codebook_size": 16,
    "dilations": (1,),
}


def picture(height: int = 64, width: int = 48) -> torch.Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = 0.5 + 0.4 * torch.sin(25 * x * y + 9 * x)
    return (torch.stack([x, waves, ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1).float()]) * 255).round() / 255


def codec(folder: Path) -> str:
    torch.manual_seed(0)
    AudioCodec(**TINY, num_codebooks=4).save(folder)
    return str(folder)


class TextSpy(mmtok.Tokenizer):
    """Takes texts and remembers them; its code is the length of the text."""

    def __init__(self) -> None:
        super().__init__({})
        self.name, self.seen = "spy", []

    def base_spec(self) -> mmtok.TokenSpec:
        return mmtok.TokenSpec("spy", "image", (64,), num_tokens=1, conditions=("text",))

    def encode(self, x, sample_rate=None, text=None, num_codebooks=None, num_tokens=None) -> Tokens:
        self.seen.append(text)
        code = 0 if text is None else len(text[0])
        return Tokens(torch.tensor([[[code]]]), torch.tensor([1]), self.spec)

    def decode(self, tokens, text=None, size=None, generator=None) -> torch.Tensor:
        self.seen.append(text)
        return torch.full((1, 3, *(size or (4, 4))), 0.3001)


@pytest.mark.parametrize("codec_name", IMAGE_CODECS)
def test_bytes_takes_the_best_setting_within_them_for_each_item(codec_name: str):
    one, two = open_contenders([f"{codec_name}#bytes=380,500"])
    assert (one.label, two.label) == (f"{codec_name}#bytes=380", f"{codec_name}#bytes=500")
    item = Item("a", picture(32, 24))
    settings = []
    for contender, target in ((one, 380), (two, 500)):
        trial = contender.run(item)
        setting, data = fit_image(item.x, codec_name, target)
        assert trial.bits == 8 * len(data) <= 8 * target and contender.target_bytes == target
        assert data == encode_image(item.x, codec_name, setting)
        assert torch.equal(trial.x_hat, decode_image(data, codec_name))
        settings.append(int(trial.tokens.side["setting"]))
        assert settings[-1] == setting
        # Nothing that fits is larger by much: a few settings stand for all.
        scale = image_codec(codec_name).settings
        sizes = [len(encode_image(item.x, codec_name, s)) for s in scale[:: max(1, len(scale) // 12)]]
        assert len(data) >= 0.95 * max((n for n in sizes if n <= target), default=0)
    # JPEG 2000's setting is a ratio of compression, the others' a quality.
    assert settings[0] > settings[1] if codec_name == "jpeg2000" else settings[0] < settings[1]
    assert one.tokenizer.fingerprint != two.tokenizer.fingerprint
    assert one.run(item).tokens.spec == one.run(Item("b", picture(32, 32))).tokens.spec  # whatever the setting


def test_a_target_out_of_reach_gives_the_smallest_file():
    contender = open_contenders(["jpeg#bytes=20"])[0]
    trial = contender.run(Item("a", picture()))
    assert trial.bits == 8 * len(encode_image(picture(), "jpeg", 1)) > 8 * 20


def test_levels_tokens_and_rates_are_resolved(tmp_path: Path):
    name = codec(tmp_path / "codec")
    found = open_contenders([f"{name}#levels=1,3", name])
    assert [c.label for c in found] == [f"{name}#levels=1", f"{name}#levels=3", name]
    assert found[0].tokenizer is found[1].tokenizer  # loaded once
    item = Item("a", 0.1 * torch.randn(1, 2000, generator=torch.Generator().manual_seed(0)), 8000)
    for contender, levels in zip(found, (1, 3, 4), strict=True):
        trial = contender.run(item)
        assert trial.tokens.codes.shape[1] == levels and trial.x_hat.shape == (1, 2000)
        assert trial.bits == 4 * levels * 250 and trial.encode_seconds > 0 and trial.decode_seconds > 0
        protocol = contender.protocol()
        assert protocol["num_codebooks"] == levels and protocol["bitrate_bps"] == 4 * levels * 1000
        assert protocol["fingerprint"] == contender.tokenizer.fingerprint
        assert (protocol["package"], protocol["package_version"]) == ("mmtok", mmtok.__version__)
        assert (protocol["device"], protocol["dtype"]) == ("cpu", "float32")
        assert protocol["torch"] == str(torch.__version__) and protocol["mitigated"] is True


def test_classical_codecs_say_what_computes_them():
    one, two = (c.protocol() for c in open_contenders(["jpeg:50", "webp#bytes=512"]))
    assert one["package"] == two["package"] == "pillow" and one["dtype"] == "uint8"
    assert one["setting"] == "50" and "target_bytes" not in one and two["target_bytes"] == 512
    assert one["library"].startswith("libjpeg-turbo ") and two["library"].startswith("libwebp ")
    assert "num_tokens" not in one and "bits_per_image" not in one  # the length of a file is its own
    opus = open_contenders(["opus:6000"])[0].protocol()
    assert opus["package"] == "av" and opus["bitrate_bps"] == 6000


def test_texts_reach_encode_and_decode_and_pictures_have_eight_bits():
    spy = TextSpy()
    item = Item("a", picture(), text="red", target=picture(5, 6))
    trial = Contender("spy#text", spy, with_text=True).run(item)
    assert spy.seen == [["red"], ["red"]] and int(trial.tokens.codes) == 3
    assert trial.x_hat.shape == (3, 5, 6) and float(trial.x_hat[0, 0, 0]) == pytest.approx(77 / 255, abs=1e-7)
    spy.seen.clear()
    Contender("spy", spy).run(item)
    assert spy.seen == [None, None]
    with pytest.raises(ValueError, match="expected items with a text, b has none; leave #text out"):
        Contender("spy#text", spy, with_text=True).run(Item("b", picture()))


def test_a_text_contender_of_ours_hears_the_caption():
    contender = open_contenders(["image-textok-64px-16x10#tokens=8&text"])[0]
    assert contender.label == "image-textok-64px-16x10#tokens=8&text"
    assert contender.with_text and contender.protocol()["text"] is True
    assert contender.protocol()["num_tokens"] == 8 and contender.protocol()["bits_per_image"] == 80
    features: dict[str, Any] = {}

    def encoder(texts: list[str]) -> TextFeatures:
        features["texts"] = texts
        states = torch.full((len(texts), 3, 384), float(len(texts[0])) / 10)
        return TextFeatures(states, torch.ones(len(texts), 3, dtype=torch.bool))

    encoder.to = lambda device: encoder  # type: ignore[attr-defined]
    contender.tokenizer._text_encoder = encoder  # type: ignore[assignment]
    one, two = (contender.run(Item("a", picture(), text=t)) for t in ("cat", "a long caption"))
    assert features["texts"] == ["a long caption"] and one.bits == two.bits == 80
    assert not torch.equal(one.x_hat, two.x_hat)


class Early(AudioCodec):
    """Raw, it gives two samples too few; mitigated, it is exact."""

    mitigated = False

    def exact(self, sound: torch.Tensor, length: int) -> torch.Tensor:
        return sound[:, :-2] if not self.mitigated else super().exact(sound, length)


def test_raw_sound_of_another_length_is_cut_to_the_items_and_said():
    torch.manual_seed(0)
    tok = Early(**TINY, num_codebooks=2).eval()
    contender = Contender("early#raw", tok)
    item = Item("a", 0.1 * torch.randn(1, 801), 8000)
    assert contender.run(item).x_hat.shape == (1, 801)
    assert contender.protocol()["length"] == "cut or padded with zeros to the item's"
    tok.mitigated = True
    assert contender.run(item).x_hat.shape == (1, 801) and "length" not in contender.protocol()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "expected at least one contender"),
        (["jpeg"], r"jpeg: expected a setting \(jpeg:50\) or bytes an item \(jpeg#bytes=512\)"),
        (["opus#bytes=100"], "bytes= is for jpeg, webp, avif, jpeg2000 without a setting"),
        (["jpeg:50#bytes=100"], "bytes= is for jpeg"),
        (["jpeg#bytes=100&levels=1"], r"bytes= stands alone, got \['levels'\] too"),
        (["jpeg#bytes=0"], "expected bytes of 1 or more, got '0'"),
        (["jpeg#bytes=x"], "expected whole numbers behind bytes=, got 'x'"),
        (["jpeg#bytes"], "expected options like"),
        (["jpeg:50#"], "expected options like .* got none"),
        (["jpeg:50#text=1"], "expected options like"),
        (["jpeg:50#speed=1"], "expected options like .* got 'speed=1'"),
        (["jpeg:50#text"], "it takes no text"),
        (["jpeg:50#raw"], "it has no mitigations to leave out"),
        (["jpeg:50#levels=2"], r"expected 1\.\.1 levels, got 2"),
        (["opus:6000#tokens=5"], "tokens= would cut the sound short"),
        (["image-textok-64px-16x10#tokens=17"], r"expected 1\.\.16 tokens, got 17"),
        (["jpeg:50", "jpeg:50"], r"expected each once, got \['jpeg:50'\]"),
        (["jpg:50"], "unknown tokenizer"),
    ],
)
def test_bad_spellings_are_named(names: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        open_contenders(names)


def test_the_untouched_items_keep_their_label():
    with pytest.raises(ValueError, match="label: expected a name that is not 'original'"):
        Contender("original", FittedImage("jpeg", 100))
    with pytest.raises(ValueError, match="jpeg#bytes: expected at least 1, got 0"):
        FittedImage("jpeg", 0)
