"""`extend`: ids, rows, names, records and templates, on tiny models and a tiny byte-level BPE."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lm import build, llama, text_tokenizer

pytest.importorskip("transformers")
from mmtok.lm.chat import media_template
from mmtok.lm.extend import check_tokenizer, donor_of, extend, load, saved_vocab, token_names
from mmtok.lm.initialise import INITS, OMP, Projected, Start
from mmtok.tokens import TokensError, TokenSpec
from mmtok.vocab import Vocab

AUDIO = TokenSpec("audio-x", "audio", (16, 12), frame_rate=50.0, fingerprint="a")
IMAGE = TokenSpec("image-x", "image", (32,), num_tokens=4, fingerprint="i")


def vocab_on(text: Any) -> Vocab:
    return Vocab(text, image=IMAGE, audio=AUDIO, layout={"audio": "delay"})


def rows_of(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


@pytest.mark.parametrize("lowercase", [False, True])
def test_tokens_get_the_ids_of_the_vocab_and_nothing_around_breaks_them(lowercase: bool):
    tokenizer = text_tokenizer(lowercase)
    vocab = vocab_on(tokenizer)
    extend(llama(len(tokenizer)), tokenizer, vocab)
    assert len(tokenizer) == vocab.size
    strings = vocab.token_strings()
    assert tokenizer.convert_tokens_to_ids(strings) == list(range(vocab.text_size, vocab.size))
    assert tokenizer("".join(strings), add_special_tokens=False)["input_ids"] == list(
        range(vocab.text_size, vocab.size)
    )
    plain = text_tokenizer(lowercase)
    for before, after in [("", ""), ("A cat", "sat"), (" The ", " mat "), ("x\n\t", "\n"), ("<|", "|>"), ("<", ">")]:
        for n in (0, 3, 256, 257, 259, len(strings) - 1):
            ids = tokenizer.encode(f"{before}{strings[n]}{after}", add_special_tokens=False)
            want = [plain.encode(x, add_special_tokens=False) if x else [] for x in (before, after)]
            assert ids == [*want[0], vocab.text_size + n, *want[1]]
            assert strings[n] in tokenizer.decode(ids) and strings[n] in tokenizer.decode(ids, skip_special_tokens=True)
    for inside in ("<|image_0_5|>", "<|IMAGE_0_00005|>", "<|image_0_00005 |>"):  # no name, and none that is near it
        assert max(tokenizer.encode(inside, add_special_tokens=False)) < vocab.text_size
    assert vocab.text_size == len(plain) and vocab.pack(["a cat"]) == plain.encode("a cat", add_special_tokens=False)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding", [0, 5, 1000])
def test_rows_of_text_stay_and_all_others_are_new(tied: bool, padding: int):
    tokenizer = text_tokenizer()
    vocab, V = vocab_on(tokenizer), len(tokenizer)
    model = llama(V + padding, tied)
    with torch.no_grad():
        for weight in rows_of(model):
            weight[V:] = 1e6  # what stands in rows that only pad is neither read nor kept
    before = [w[:V].clone() for w in rows_of(model)]
    seen = []

    def rule(start: Start) -> torch.Tensor:
        assert torch.equal(start.old, before[int(start.head)]) and start.std == 0.02
        seen.append(start.head)
        return torch.arange(start.count).float()[:, None].expand(-1, 16) + 1000 * start.head

    extend(model, tokenizer, vocab, init=rule)
    assert seen == ([False] if tied else [False, True])
    embeddings, head = rows_of(model)
    assert (embeddings.data_ptr() == head.data_ptr()) == tied
    for n, weight in enumerate((embeddings, head)):
        assert weight.shape == (vocab.size, 16) and torch.equal(weight[:V], before[n])
        first = 0 if tied else 1000 * n
        assert weight[V:, 0].tolist() == list(range(first, first + vocab.size - V))
    assert model.config.vocab_size == vocab.size == model.get_output_embeddings().out_features
    model.get_input_embeddings().weight.data[V:] = 0.01
    assert model(torch.tensor([[0, V, vocab.size - 1]])).logits.shape == (1, 3, vocab.size)


def test_a_bias_of_the_head_and_half_precision():
    model, vocab = llama(30).bfloat16(), vocab_on(30)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(30.0).bfloat16())
    extend(model, None, vocab)
    assert model.lm_head.bias.shape == (vocab.size,) and set(model.lm_head.bias[30:].tolist()) == {14.5}
    assert model.lm_head.bias[:30].tolist() == list(range(30))
    assert rows_of(model)[0].dtype == torch.bfloat16 and bool(rows_of(model)[0].isfinite().all())


@pytest.mark.parametrize("init", sorted(INITS))
def test_every_rule_by_name(init: str):
    picture, codec = build("titok"), build("codec-causal")
    vocab = Vocab(40, image=picture.spec, audio=codec.spec)
    model = llama(40)
    sources = {"image": picture, "audio": codec}
    if init == "omp":
        with pytest.raises(ValueError, match="omp needs exactly one of"):
            extend(model, None, vocab, init, sources)
        assert rows_of(model)[0].shape[0] == 40 and not hasattr(model.config, "mmtok")  # nothing has changed
        return
    extend(model, None, vocab, init, sources, torch.Generator().manual_seed(3))
    again = llama(40)
    extend(again, None, vocab, init, sources, torch.Generator().manual_seed(3))
    for mine, other in zip(rows_of(model), rows_of(again), strict=True):
        assert torch.equal(mine, other) and bool(mine.isfinite().all())
    if init != "mean":
        assert not torch.equal(rows_of(model)[0][40:], rows_of(model)[1][40:])


def test_several_models_share_one_tokenizer():
    tokenizer = text_tokenizer()
    vocab = vocab_on(tokenizer)
    for model in (llama(len(tokenizer)), llama(vocab.text_size, tied=True)):
        extend(model, tokenizer, vocab)
        assert len(tokenizer) == vocab.size == len(rows_of(model)[0])
    check_tokenizer(tokenizer, vocab)
    other = Vocab(vocab.text_size, audio=AUDIO)
    with pytest.raises(ValueError, match="extended with another vocab"):
        extend(llama(vocab.text_size), tokenizer, other)
    with pytest.raises(ValueError, match=r"it was extended before; rebuild its vocab by saved_vocab"):
        extend(llama(len(tokenizer)), tokenizer, vocab_on(tokenizer))
    with pytest.raises(ValueError, match=r"expected '<\|byte_000\|>' to be id"):
        check_tokenizer(text_tokenizer(), vocab)


def test_a_model_is_not_extended_twice():
    """Rows that were trained would be drawn anew without a word."""
    tokenizer = text_tokenizer()
    vocab, model = vocab_on(tokenizer), llama(len(tokenizer))
    extend(model, tokenizer, vocab)
    before = rows_of(model)[0].clone()
    with pytest.raises(ValueError, match=r"expected one without this vocab.*saved_vocab\(model\)"):
        extend(model, tokenizer, vocab)
    assert torch.equal(rows_of(model)[0], before)
    del model.config.mmtok
    extend(model, tokenizer, vocab)
    assert not torch.equal(rows_of(model)[0], before)


def test_markers_that_text_has_already_get_another_name():
    tokenizer = text_tokenizer(words=("<image>", "<|image_pad|>", "<|audio_0_00003"))  # the last is a mere prefix
    vocab, model = vocab_on(tokenizer), llama(len(tokenizer))
    extend(model, tokenizer, vocab)
    names = token_names(vocab, tokenizer.get_vocab())
    changed = {a: b for a, b in zip(vocab.token_strings(), names, strict=True) if a != b}
    assert changed == {"<image>": "<mm_image>", "<|image_pad|>": "<|mm_image_pad|>"}
    assert tokenizer.convert_tokens_to_ids(names) == list(range(vocab.text_size, vocab.size))
    assert tokenizer.convert_tokens_to_ids("<image>") < vocab.text_size
    assert tokenizer.convert_tokens_to_ids("<mm_image>") == vocab.blocks["image"].begin
    assert saved_vocab(model, tokenizer).ranges == vocab.ranges


def test_text_ids_beyond_the_tokenizer():
    tokenizer = text_tokenizer()
    V = len(tokenizer)
    vocab = vocab_on(V + 7)  # e.g. the rows of a model whose matrix is padded, all of them text
    extend(llama(V + 7), tokenizer, vocab)
    assert tokenizer.convert_tokens_to_ids(vocab.token_strings()) == list(range(V + 7, vocab.size))
    assert tokenizer.convert_ids_to_tokens(V) == "<|unused_00000|>"
    tokenizer = text_tokenizer()
    with pytest.raises(ValueError, match=rf"its ids go up to {V - 1}, .* its own at {V - 1}; build it with Vocab"):
        extend(llama(V), tokenizer, vocab_on(V - 1))
    assert len(tokenizer) == V


def test_what_cannot_be_extended_is_refused_before_anything_changes():
    tokenizer = text_tokenizer()
    V = len(tokenizer)
    cases: list[tuple[Any, Any, Vocab, Any, str]] = [
        (llama(V - 1), tokenizer, vocab_on(tokenizer), "mean", f"a row for each of the {V} text ids, got {V - 1}"),
        (llama(V), None, vocab_on(tokenizer), "mean", "the one that the vocab reads text with, got None"),
        (llama(V), tokenizer, Vocab(tokenizer), "mean", "got text alone"),
        (llama(V), tokenizer, vocab_on(tokenizer), "xavier", "expected one of .'mean', .* got 'xavier'"),
        (llama(V).model, tokenizer, vocab_on(tokenizer), "mean", "expected a causal LM .* got LlamaModel"),
        (llama(V).to("meta"), tokenizer, vocab_on(tokenizer), "mean", "on meta; load it unquantised"),
        (
            llama(V),
            tokenizer,
            vocab_on(tokenizer),
            lambda s: torch.zeros(3, 16),
            r"finite rows \(\d+, 16\), got \(3, 16",
        ),
        (llama(V), tokenizer, vocab_on(tokenizer), Projected(), r"expected sources=\{'image': tokenizer\}"),
    ]
    for model, text, vocab, init, message in cases:
        with pytest.raises(ValueError, match=message):
            extend(model, text, vocab, init)
        assert len(tokenizer) == V and len(model.get_input_embeddings().weight) in (V, V - 1)


def test_the_vocab_travels_with_the_model(tmp_path: Path):
    codec = build("codec-causal")
    tokenizer = text_tokenizer()
    vocab = Vocab(tokenizer, image=IMAGE, audio=codec.spec.keep(2), layout={"audio": "coarse_first"})
    model = llama(len(tokenizer), tied=True)
    extend(model, tokenizer, vocab)
    assert json.loads(json.dumps(model.config.mmtok)) == model.config.mmtok
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = load(tmp_path, IMAGE, codec)
    assert found.vocab.ranges == vocab.ranges and found.vocab.layouts == vocab.layouts
    assert found.vocab.text_size == vocab.text_size and found.vocab.blocks["audio"].spec == codec.spec.keep(2)
    for mine, other in zip(rows_of(model), rows_of(found.model), strict=True):
        assert torch.equal(mine, other)
    tokens = codec.encode(torch.zeros(1, 700), sample_rate=16000).keep(num_codebooks=2)
    ids = vocab.pack(["the dog ", tokens, " says woof"])
    assert found.vocab.pack(["the dog ", tokens, " says woof"]) == ids
    parts = found.vocab.unpack(ids)
    assert parts[0] == "the dog " and parts[2] == " says woof" and torch.equal(parts[1].codes, tokens.codes)
    with pytest.raises(TokensError, match=r"got '<\|image_0_00001\|>', which is a token of a picture"):
        found.vocab.pack(["a <|image_0_00001|>"])
    with pytest.raises(TokensError, match=r"audio: expected the tokenizer that the vocab was built with"):
        load(tmp_path, audio=AUDIO)
    with pytest.raises(TokensError, match=r"image: expected .* 'image-x' \(fingerprint i"):
        saved_vocab(found.model.config, image=TokenSpec("image-x", "image", (32,), num_tokens=4, fingerprint="j"))
    with pytest.raises(ValueError, match="use the tokenizer that was extended with this vocab"):
        saved_vocab(model, text_tokenizer())
    with pytest.raises(ValueError, match="expected a record of format 'mmtok-vocab-1', got None"):
        saved_vocab(llama(30))
    model.config.mmtok["ranges"]["byte"][0] += 1
    with pytest.raises(ValueError, match="use the version that wrote it"):
        saved_vocab(model)


def test_rows_are_transplanted_from_a_model_that_knows_the_codes():
    here, there = text_tokenizer(), text_tokenizer(size=290)  # fewer merges: other ids, fewer tokens
    donor_vocab, vocab = vocab_on(there), vocab_on(here)
    donor = llama(len(there), width=24, seed=1)
    extend(donor, there, donor_vocab, init=lambda s: 2 * s.old[[40 + n % 200 for n in range(s.count)]])
    model = llama(len(here))
    found = donor_of(donor, there, vocab)
    strings = [here.convert_ids_to_tokens(i) == there.convert_ids_to_tokens(j) for i, j in found.shared.tolist()]
    assert len(strings) == donor_vocab.text_size and all(strings)  # its text tokens are all known here, at other ids
    extend(model, here, vocab, init=OMP(found, k=4))
    names = [there.convert_ids_to_tokens(40 + n % 200) for n in range(vocab.size - vocab.text_size)]
    twice = here.convert_tokens_to_ids(names)
    for weight in rows_of(model):
        assert torch.allclose(weight[vocab.text_size :], 2 * weight[twice], atol=1e-4)
    with pytest.raises(ValueError, match="expected a model extended with the same tokenizers"):
        donor_of(donor, there, Vocab(here, audio=AUDIO))


MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "audio"}]},
    {"role": "assistant", "content": "A cat that says meow."},
]
OWN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"


def test_media_template():
    tokenizer = text_tokenizer()
    tokenizer.chat_template = media_template(OWN)
    told = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert told == "<s>[user]What is <image><audio>[assistant]A cat that says meow."
    assert MESSAGES[0]["content"][1] == {"type": "image"}
    assert media_template(tokenizer.chat_template) == tokenizer.chat_template
    tokenizer.chat_template = media_template()
    told = tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert told == "user:\nWhat is <image><audio>\nassistant:\n"
    bad = [{"role": "user", "content": [{"type": "video"}]}]
    with pytest.raises(Exception, match="expected type text, image or audio, got video"):
        tokenizer.apply_chat_template(bad, tokenize=False)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'mmtok\[lm\]'"):
        load("nowhere")
