"""`MultimodalProcessor`: what it gives is what `Vocab.pack` gives, and everything comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_lm import build, llama, text_tokenizer, tiny

pytest.importorskip("transformers")
from mmtok.data.audio import Sound, write_audio
from mmtok.data.images import Picture
from mmtok.lm.extend import extend
from mmtok.lm.processor import IGNORED, MultimodalProcessor
from mmtok.tokens import Tokens, TokensError
from mmtok.vocab import Vocab

TOKENIZER = text_tokenizer()
IMAGE, AUDIO = build("titok"), build("codec-causal")
VOCAB = Vocab(TOKENIZER, image=IMAGE.spec, audio=AUDIO.spec.keep(2), layout={"audio": "delay"})
extend(llama(len(TOKENIZER)), TOKENIZER, VOCAB)
PROCESSOR = MultimodalProcessor(TOKENIZER, VOCAB, IMAGE, AUDIO)
PIXELS = tiny.image(3, 17, 23)
SOUND = tiny.noise(1, 700)
TOKENS_I = IMAGE.encode(PIXELS)
TOKENS_A = AUDIO.encode(SOUND, sample_rate=16000, num_codebooks=2)


def ids_of(**result: torch.Tensor) -> list[list[int]]:
    """The rows of a batch without their padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(result["input_ids"], result["attention_mask"], strict=True)]


@pytest.mark.parametrize("header", [True, False])
def test_a_text_is_packed_with_what_stands_at_its_placeholders(header: bool, tmp_path: Path):
    write_audio(tmp_path / "a.wav", SOUND, 16000)
    Image.fromarray(np.zeros((5, 9), np.uint8)).save(tmp_path / "i.png")
    pictures = [PIXELS, tmp_path / "i.png", Image.new("RGB", (8, 8)), TOKENS_I]
    text = "<image> a cat<image> that says <audio><audio>\n<image><image>."
    out = PROCESSOR(text, pictures, [str(tmp_path / "a.wav"), SOUND.numpy()], 16000, header=header)
    coded = [TOKENS_I, IMAGE.encode(pictures[1]), IMAGE.encode(pictures[2])]
    from_file = AUDIO.encode(tmp_path / "a.wav", num_codebooks=2)
    parts = [coded[0], " a cat", coded[1], " that says ", from_file, TOKENS_A, "\n", coded[2], TOKENS_I, "."]
    assert ids_of(**out) == [VOCAB.pack(parts, header)]
    assert out["input_ids"].dtype == torch.int64 and sorted(out) == ["attention_mask", "input_ids"]
    batch = Tokens.concat([coded[0], coded[2]])  # a batch of Tokens is several pictures
    again = PROCESSOR("<image><image>", batch, header=header)
    assert ids_of(**again) == [VOCAB.pack([batch[0], batch[1]], header)]


def test_batches_are_padded_on_the_tokenizers_side():
    texts = ["a cat", "the dog says <audio>", "<image><image>"]
    flat = PROCESSOR(texts, [TOKENS_I, TOKENS_I], TOKENS_A)
    nested = PROCESSOR(texts, [None, [], [TOKENS_I, TOKENS_I]], [[], [TOKENS_A], None])
    rows = [VOCAB.pack(p) for p in (["a cat"], ["the dog says ", TOKENS_A], [TOKENS_I, TOKENS_I])]
    assert ids_of(**flat) == ids_of(**nested) == rows
    S = max(map(len, rows))
    assert flat["input_ids"].shape == (3, S) and flat["input_ids"][0, -1] == TOKENIZER.eos_token_id
    assert flat["attention_mask"][0].tolist() == [1] * len(rows[0]) + [0] * (S - len(rows[0]))
    TOKENIZER.padding_side = "left"
    try:
        left = PROCESSOR(texts, [TOKENS_I, TOKENS_I], TOKENS_A, labels="all")
    finally:
        TOKENIZER.padding_side = "right"
    assert left["attention_mask"][0].tolist() == [0] * (S - len(rows[0])) + [1] * len(rows[0])
    assert left["labels"][0].tolist() == [IGNORED] * (S - len(rows[0])) + rows[0]
    lists = PROCESSOR(texts, [TOKENS_I, TOKENS_I], TOKENS_A, padding=False, return_tensors=None)
    assert lists["input_ids"] == rows
    with pytest.raises(ValueError, match=r"expected texts of one length, got several; use padding=True"):
        PROCESSOR(texts, [TOKENS_I, TOKENS_I], TOKENS_A, padding=False)


def test_wrong_counts_are_one_clear_error():
    for arguments, message in [
        (("<image> and <image>", [PIXELS]), "image: expected one for each place <image> of the text, 2, got 1"),
        (("no picture", PIXELS), "image: expected .*, 0, got 1"),
        ((["<image>", "x"], [[], [PIXELS]]), r"image: expected .*, \[1, 0\], got \[0, 1\]"),
        (("<audio>",), "audio: expected .*, 1, got 0"),
        (([],), "expected a string or a list of at least one"),
        (("<image>", torch.zeros(2, 3, 8, 8)), "image: expected single ones, got 1 that hold 2"),
        (("<audio>", None, SOUND), "sample_rate: mandatory"),
    ]:
        with pytest.raises(ValueError, match=message):
            PROCESSOR(*arguments)
    with pytest.raises(ValueError, match=r"expected Tokens, since this processor has no image tokenizer, got Tensor"):
        MultimodalProcessor(TOKENIZER, VOCAB)("<image>", PIXELS)
    with pytest.raises(ValueError, match="return_tensors: expected 'pt' or None, got 'tf'"):
        PROCESSOR("a", return_tensors="tf")
    with pytest.raises(TokensError, match="which is a token of a picture or a sound; take it out of"):
        PROCESSOR("say <|audio_0_00003|>")
    with pytest.raises(TokensError, match="audio: expected the tokenizer that the vocab was built with"):
        MultimodalProcessor(TOKENIZER, VOCAB, audio=build("codec-centred"))
    with pytest.raises(ValueError, match="expected one with new ids, got text alone"):
        MultimodalProcessor(TOKENIZER, Vocab(VOCAB.text_size))


def test_labels_mask_all_but_the_spans():
    text = "What is this? <image> It says <audio>. Woof"
    plain = PROCESSOR(text, TOKENS_I, TOKENS_A)
    assert torch.equal(PROCESSOR(text, TOKENS_I, TOKENS_A, labels="all")["labels"], plain["input_ids"])
    picture, sound = text.index("<image>"), text.index("<audio>")
    spans = [(picture, picture + 7), (sound + 8, len(text))]  # the picture, and what follows the sound and its dot
    out = PROCESSOR(text, TOKENS_I, TOKENS_A, labels=spans)
    assert torch.equal(out["input_ids"], plain["input_ids"])
    labels, ids = out["labels"][0], out["input_ids"][0]
    assert bool(((labels == ids) | (labels == IGNORED)).all())
    learned = labels[labels != IGNORED].tolist()
    assert learned == VOCAB.pack([TOKENS_I, " Woof"])
    for bad, message in [
        ([(0, 99)], "within the text's 0..43"),
        ([(5, 2)], "within the text's"),
        ("prompt", "expected 'all' or spans"),
        ([(picture + 2, len(text))], r"the span \(16, 43\) cuts the placeholder at 14..21"),
    ]:
        with pytest.raises(ValueError, match=message):
            PROCESSOR(text, TOKENS_I, TOKENS_A, labels=bad)
    with pytest.raises(ValueError, match="expected spans for each of 2 texts, got 1"):
        PROCESSOR(["a", "b"], labels=[[(0, 1)]])
    both = PROCESSOR(["a cat", "the dog"], labels=[[(1, 5)], []])["labels"]
    assert both[0][both[0] != IGNORED].tolist() == VOCAB.pack([" cat"]) and set(both[1].tolist()) == {IGNORED}


def test_a_text_token_is_learned_where_its_last_character_is():
    ids = VOCAB.pack(["a cat"])
    assert TOKENIZER.convert_ids_to_tokens(ids) == ["a", "\u0120cat"]
    for span, learned in [((2, 5), ids[1:]), ((4, 5), ids[1:]), ((0, 4), ids[:1]), ((1, 4), []), ((0, 5), ids)]:
        labels = PROCESSOR("a cat", labels=[span])["labels"][0]
        assert labels[labels != IGNORED].tolist() == learned, span


def test_special_tokens_stand_around_a_text():
    text = "a cat <image>"
    out = PROCESSOR(text, TOKENS_I, add_special_tokens=True, labels=[(6, 13)])
    assert ids_of(**out) == [[0, *VOCAB.pack(["a cat ", TOKENS_I]), 1]]
    labels = out["labels"][0]
    assert labels[labels != IGNORED].tolist() == [*VOCAB.pack([TOKENS_I]), 1]  # the end is learned with the last part
    assert PROCESSOR(text, TOKENS_I, add_special_tokens=True, labels=[(0, 5)])["labels"][0, -1] == IGNORED
    found = PROCESSOR.decode(out["input_ids"][0], decode=False)
    assert found.parts[0] == "a cat " and len(found.parts) == 2 and found.report.ok
    assert PROCESSOR.decode(out["input_ids"][0], decode=False, skip_special_tokens=False).parts[0] == "<s>a cat "


CHAT = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}],
    },
    {"role": "assistant", "content": [{"type": "text", "text": "A dog: "}, {"type": "audio", "audio": SOUND}]},
    {"role": "user", "content": "No <image> here."},
    {"role": "assistant", "content": "Is that so?"},
]


def test_chats():
    plain = text_tokenizer()  # not extended: the same ids
    vocab = Vocab(plain, image=IMAGE.spec, audio=AUDIO.spec.keep(2), layout={"audio": "delay"})
    processor = MultimodalProcessor(plain, vocab, IMAGE, AUDIO)
    out = processor.apply_chat_template(CHAT, images=PIXELS, sampling_rate=16000, labels="assistant")
    first, last = "?\nassistant:\nA dog: ", "\nuser:\nNo <image> here.\nassistant:\nIs that so?\n"
    assert ids_of(**out) == [vocab.pack(["user:\nWhat is ", TOKENS_I, first, TOKENS_A, last])]
    labels = out["labels"][0]
    said = processor.decode(labels[labels != IGNORED].tolist(), decode=False).parts
    assert said[0] == "A dog: " and torch.equal(said[1].codes, TOKENS_A.codes) and said[2] == "\nIs that so?\n"
    prompt = processor.apply_chat_template([CHAT[:1], CHAT[2:3]], images=[[TOKENS_I], []], add_generation_prompt=True)
    assert ids_of(**prompt) == [
        vocab.pack(["user:\nWhat is ", TOKENS_I, "?\nassistant:\n"]),
        vocab.pack(["user:\nNo <image> here.\nassistant:\n"]),
    ]
    plain.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ eos_token }}"
    out = processor.apply_chat_template(CHAT[:1], images=TOKENS_I, labels="all")
    assert ids_of(**out) == [vocab.pack(["<user>What is ", TOKENS_I, "?</s>"])]
    with pytest.raises(ValueError, match="writes earlier messages differently"):
        processor.apply_chat_template(CHAT, images=TOKENS_I, sampling_rate=16000, labels="assistant")
    plain.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="expected each of 2 pictures and sounds once, got 0: the template drops"):
        processor.apply_chat_template(CHAT, images=TOKENS_I, sampling_rate=16000)
    for bad, message in [
        ([{"role": "user", "content": [{"type": "video"}]}], "expected parts of type text, image or audio"),
        ([], "got an empty one"),
        (CHAT[:1], "image: expected one for each place <image> of the text, 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(bad)
    with pytest.raises(ValueError, match="expected None, 'all' or 'assistant', got 'user'"):
        processor.apply_chat_template(CHAT, labels="user")
    with pytest.raises(TokensError, match="got '<image>', which is a token of a picture"):  # text is text in a chat
        PROCESSOR.apply_chat_template(CHAT, images=TOKENS_I, sampling_rate=16000)


def test_everything_comes_back():
    grey = torch.rand(1, 6, 8)
    out = PROCESSOR("<image> a cat <audio>", grey, tiny.noise(2, 500), 8000)
    found = PROCESSOR.decode(out["input_ids"][0])
    picture, text, sound = found.parts
    assert isinstance(picture, Picture) and isinstance(sound, Sound) and text == " a cat "
    assert picture.pixels.shape == (1, 6, 8) and torch.equal(picture.pixels, IMAGE.decode(IMAGE.encode(grey))[0])
    assert sound.samples.shape == (2, 500) and sound.sample_rate == 8000
    assert found.report.ok and found.failed == {}
    spaced = "a cat , and 's dog . n't ?"
    assert PROCESSOR.decode(VOCAB.pack([spaced])).parts == [spaced]
    bare = PROCESSOR("<audio><image>", TOKENS_I, TOKENS_A, header=False)["input_ids"]
    sound, picture = PROCESSOR.batch_decode(bare)[0].parts
    assert sound.sample_rate == 16000 and picture.pixels.shape == (3, IMAGE.default_size, IMAGE.default_size)
    without = MultimodalProcessor(TOKENIZER, VOCAB, image=IMAGE).decode(out["input_ids"][0])
    assert isinstance(without.parts[2], Tokens) and without.failed == {2: "no audio tokenizer was given"}


def test_a_model_reads_what_the_processor_gives():
    model = llama(VOCAB.text_size)
    extend(model, TOKENIZER, VOCAB)
    text = "a cat <image> says"
    out = PROCESSOR(text, TOKENS_I, labels=[(6, 13)])
    logits = model(input_ids=out["input_ids"], attention_mask=out["attention_mask"]).logits
    by_hand = torch.nn.functional.cross_entropy(logits[0, :-1], out["labels"][0, 1:], ignore_index=IGNORED)
    loss = model(**out).loss
    assert float(loss.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)
    torch.manual_seed(0)
    made = model.generate(**PROCESSOR("a cat <image>", TOKENS_I), do_sample=True, max_new_tokens=40)
    found = PROCESSOR.batch_decode(made)[0]  # an untrained model: nothing but the prompt needs to make sense
    assert found.parts[0] == "a cat " and isinstance(found.parts[1], Picture)


def test_damage_is_dropped_and_reported():
    ids = VOCAB.pack(["a cat ", TOKENS_I, " says ", TOKENS_A], header=False)
    cut = PROCESSOR.decode([*ids[:-4], 1, 1])
    assert cut.parts[0] == "a cat " and isinstance(cut.parts[1], Picture) and cut.parts[2] == " says "
    assert not cut.report.ok and cut.failed == {}
    torn = ids.copy()
    torn[len(VOCAB.pack(["a cat "])) + 1] = VOCAB.blocks["audio"].levels[0].start
    found = PROCESSOR.decode(torn)
    assert not found.report.ok and found.parts[0].startswith("a cat ")
    wild = Tokens(TOKENS_I.codes, TOKENS_I.lengths, TOKENS_I.spec, {"height": torch.tensor([0])})
    found = PROCESSOR.decode(VOCAB.pack([wild]))
    assert isinstance(found.parts[0], Tokens) and "side['height']" in found.failed[0] and found.report.ok


@settings(deadline=None, max_examples=30)
@given(
    words=st.lists(st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda t: "<" not in t), max_size=4),
    header=st.booleans(),
    learn=st.booleans(),
)
def test_round_trip(words: list[str], header: bool, learn: bool):
    text = "<image>".join(words)
    count = max(0, len(words) - 1)
    out = PROCESSOR(text, [TOKENS_I] * count, header=header, labels="all" if learn else None)
    assert ids_of(**out) == [VOCAB.pack([p for w in words for p in (w, TOKENS_I)][: 2 * count + 1], header)]
    found = PROCESSOR.decode(out["input_ids"][0].tolist(), decode=False)
    assert "".join(p if isinstance(p, str) else "<image>" for p in found.parts) == text and found.report.ok
    if learn:
        assert torch.equal(out["labels"], out["input_ids"])


def test_saved_and_loaded(tmp_path: Path):
    PROCESSOR.save_pretrained(tmp_path)
    again = MultimodalProcessor.from_pretrained(tmp_path)
    text = "a cat <image> says <audio>"
    assert again.vocab.ranges == VOCAB.ranges
    arguments: tuple[Any, ...] = (text, PIXELS, SOUND, 16000)
    assert ids_of(**again(*arguments)) == ids_of(**PROCESSOR(*arguments))
    assert again.names == PROCESSOR.names == {"image": "titok", "audio": "codec"}
    given_one = MultimodalProcessor.from_pretrained(tmp_path, image=IMAGE)
    assert given_one.tokenizers["image"] is IMAGE
    with pytest.raises(TokensError, match="expected the tokenizer that the vocab was built with"):
        MultimodalProcessor.from_pretrained(tmp_path, audio=build("codec-centred"))
    (tmp_path / "audio" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"the audio tokenizer 'codec' is not here .*; pass audio=mmtok.load"):
        MultimodalProcessor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="save_pretrained writes one"):
        MultimodalProcessor.from_pretrained(tmp_path / "image")
