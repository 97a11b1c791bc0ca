"""What every tokenizer that reads text promises: text is optional, features or strings; bad text is one clear error."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_models import IMAGES, TEXT, TINY, build, image
from torch import Tensor

from mmtok.layers.text import TextFeatures
from mmtok.tokenizer import Tokenizer

READERS = [name for name in TINY if "text" in TINY[name]().spec.conditions]


@pytest.fixture(scope="module", params=READERS)
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    return build(request.param)


def features(count: int, length: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, length, TEXT["dim"], generator=torch.Generator().manual_seed(seed))


class Words:
    """A text encoder of hand: a word's vector comes from its letters."""

    dim, max_tokens = TEXT["dim"], TEXT["max_tokens"]

    def to(self, device: torch.device | str) -> Words:
        return self

    def __call__(self, texts: Sequence[str]) -> TextFeatures:
        states = torch.zeros(len(texts), self.max_tokens, self.dim)
        mask = torch.zeros(len(texts), self.max_tokens, dtype=torch.bool)
        for i, text in enumerate(texts):
            for j, word in enumerate(text.split() or [""]):
                seed = sum(ord(c) * 31**k for k, c in enumerate(word)) % 2**31
                states[i, j] = torch.randn(self.dim, generator=torch.Generator().manual_seed(seed))
                mask[i, j] = True
        return TextFeatures(states, mask)


def test_there_are_readers():
    assert len(READERS) >= 2


def test_text_matters_and_may_be_left_out(tok: Tokenizer):
    x = image(2, 3, 24, 20)
    tokens = tok.encode(x, text=features(2))
    plain = tok.decode(tokens)
    read, other = tok.decode(tokens, text=features(2)), tok.decode(tokens, text=features(2, seed=1))
    assert isinstance(plain, Tensor) and isinstance(read, Tensor) and isinstance(other, Tensor)
    assert plain.shape == read.shape == x.shape
    assert not torch.allclose(plain, read, atol=1e-4) and not torch.allclose(read, other, atol=1e-4)


def test_a_batch_with_texts_is_what_its_items_are_alone(tok: Tokenizer):
    xs = [x for x, _ in IMAGES.values()]
    text = TextFeatures(features(len(xs)), torch.arange(5) < torch.arange(len(xs))[:, None] % 5 + 1)
    batch = tok.encode(xs, text=text)
    decoded = tok.decode(batch, text=text)
    for i, x in enumerate(xs):
        single = tok.encode(x, text=text[[i]])
        assert torch.equal(single.codes, batch[i].codes)
        short = TextFeatures(
            text.states[[i]][:, : int(text.mask[i].sum())], text.mask[[i]][:, : int(text.mask[i].sum())]
        )
        assert torch.allclose(tok.decode(single, text=short)[0], decoded[i], atol=1e-5), "padding of the text"


def test_strings_go_through_the_named_encoder(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tok, "_text_encoder", Words())
    x = image(2, 3, 24, 24)
    one, each = tok.encode(x, text="red heart"), tok.encode(x, text=["red heart", "red heart"])
    assert torch.equal(one.codes, each.codes)
    same = tok.encode(x, text=Words()(["red heart", "red heart"]))
    assert torch.equal(one.codes, same.codes)
    a, b = tok.decode(one, text="red heart"), tok.decode(one, text="blue bird")
    assert isinstance(a, Tensor) and isinstance(b, Tensor) and not torch.allclose(a, b, atol=1e-4)
    with pytest.raises(ValueError, match=r"text: expected one string, or 2 .*got 3"):
        tok.encode(x, text=["a", "b", "c"])


def there_and_back(tok: Tokenizer, x: Tensor, text: object) -> None:
    """Some read the text only in the decoder."""
    tok.decode(tok.encode(x, text=text), text=text)


def test_bad_features_are_refused(tok: Tokenizer):
    x = image(2, 3, 24, 24)
    broken = features(2)
    broken[0, 0, 0] = torch.nan
    for text, message in (
        (features(3), "expected features of 2 items, got 3"),
        (torch.randn(2, 5, 7), "expected features of width 8 .*got 7"),
        (broken, "expected finite features"),
        (17, "expected strings, TextFeatures or a tensor"),
        (features(2, length=9), "expected features of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            there_and_back(tok, x, text)


def test_the_encoder_can_be_read_from_elsewhere(tok: Tokenizer, tmp_path):
    tok.use_text_encoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="expected a transformers folder"):
        tok.encode(image(1, 3, 24, 24), text="a")
    tok._text_encoder = None
    with pytest.raises(ValueError, match="names no text encoder"):
        build("binary1d").use_text_encoder(tmp_path)
