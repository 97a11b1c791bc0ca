"""Constrained decoding: whatever the scores, what comes out is a document, of the lengths that were asked for."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmtok.lm.decoding import DocumentLogits, allowed_mask, generate
from mmtok.lm.lengths import Bounded
from mmtok.lm.rows import Row, Rules
from mmtok.tokens import Tokens, TokensError, TokenSpec
from mmtok.vocab import LAYOUTS, Vocab
from mmtok.vocab.layouts import read_layout

QUICK = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
LAYOUT_CASES = [
    *[(name, (1, 1, 1)) for name in sorted(LAYOUTS)],
    ("delay", (1,)),
    ("delay:1,0,2", (1, 1, 1)),
    ("delay:2,0,0", (1, 1, 1)),
    ("delay:0,0,0", (1, 1, 1)),
    ("flatten", (4, 2, 1)),
    ("flatten", (2, 3)),
    ("coarse_first", (4, 2, 1)),
    ("coarse_first", (2, 3)),
    ("frame:0,1,2,2,1,2,2", (4, 2, 1)),
    ("frame:1,0,1", (2, 1)),
]


def spec_of(modality: str, Q: int = 3, strides: tuple[int, ...] = (), count: int = 6) -> TokenSpec:
    rate, count_ = (50.0, None) if modality == "audio" else (None, count)
    return TokenSpec(f"{modality}-x", modality, (3, 5, 2)[:Q], strides[:Q], rate, count_, fingerprint=modality)


def tokens_of(spec: TokenSpec, T: int) -> Tokens:
    generator = torch.Generator().manual_seed(T)
    codes = [
        torch.randint(k, (-(-T // s),), generator=generator).repeat_interleave(s)[:T]
        for k, s in zip(spec.codebook_sizes, spec.level_strides, strict=True)
    ]
    return Tokens(torch.stack(codes)[None], torch.tensor([T]), spec)


def say(
    processor: DocumentLogits, prompts: list[list[int]], steps: int, seed: int, eos: int, V: int
) -> list[list[int]]:
    """Sample from random scores as transformers does: finished rows get padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(prompts, dtype=torch.int64)
    done = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(steps):
        scores = processor(ids, torch.randn(len(ids), V, generator=generator) * 3)
        picked = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
        picked = torch.where(done, eos, picked)
        done |= picked == eos
        ids = torch.cat([ids, picked[:, None]], 1)
        if done.all():
            break
    return ids.tolist()


@st.composite
def asks(draw: st.DrawFn) -> tuple[Vocab, dict, int]:
    """A vocab, options of `DocumentLogits`, and the text ids."""
    name, strides = draw(st.sampled_from(LAYOUT_CASES))
    audio = spec_of("audio", len(strides), strides)
    image = draw(st.sampled_from([None, spec_of("image", 2)]))
    vocab = Vocab(draw(st.sampled_from([0, 4])), image=image, audio=audio, layout={"audio": name})
    least = draw(st.sampled_from([None, 0, 1, 4]))
    lengths = {"audio": (least, draw(st.sampled_from([None, 4, 5, 8, 12])))}
    if image is not None and draw(st.booleans()):
        lengths["image"] = draw(st.sampled_from([(1, None), (2, 3), (None, None)]))
    options = {
        "header": draw(st.sampled_from([False, False, True, None])),
        "num_codebooks": draw(st.sampled_from([None, {"audio": 1}, {"audio": len(strides)}])),
        "modality": draw(st.sampled_from([None, "audio"])),
        "lengths": draw(st.sampled_from([None, lengths])),
    }
    return vocab, options, draw(st.integers(0, 2**32))


# ------------------------------------------------------------------------------------------------------ the one law


@QUICK
@given(asks(), st.integers(60, 90))
def test_whatever_the_scores_are_the_generation_is_a_document_of_the_lengths_asked_for(ask, steps):
    vocab, options, seed = ask
    eos = vocab.size if vocab.text_size == 0 else 1
    prompts = [[], []] if vocab.text_size == 0 else [[2, 3], [0, 2]]
    limit = len(prompts[0]) + steps
    processor = DocumentLogits(vocab, eos_id=eos, max_length=limit, **options)
    for row in say(processor, prompts, steps, seed, eos, vocab.size + 3):
        ids = row[len(prompts[0]) :]
        end = ids.index(eos) if eos in ids else len(ids)
        parts = vocab.unpack(ids[:end])
        grammar = vocab.grammar(options["header"], options["num_codebooks"])
        for i in ids[:end]:
            grammar.push(i)
        assert grammar.complete
        if options["modality"]:
            assert isinstance(parts[0], Tokens) and parts[0].spec.modality == "audio"
        for part in parts:
            if not isinstance(part, Tokens):
                continue
            T, modality = int(part.lengths[0]), part.spec.modality
            least, most = (options["lengths"] or {}).get(modality, (6, 6) if modality == "image" else (None, None))
            assert (least or 0) <= T <= (most or (6 if modality == "image" else 10**6))
            pin = (options["num_codebooks"] or {}).get(modality)
            assert pin is None or options["header"] is not False or T == 0 or part.spec.num_codebooks == pin


@pytest.mark.parametrize(("name", "strides"), LAYOUT_CASES)
def test_bounds_allow_exactly_what_leads_to_a_length_within_them(name, strides):
    layout, top = read_layout(name, strides, "test"), 8
    lengths = [T for T in range(top) if min(-(-T // s) * s for s in strides) == T]  # what codes alone can say
    paths = {T: (*layout.order(strides, T)[0].tolist(), -2) for T in lengths}
    for least in lengths:
        for most in [T for T in lengths if least <= T]:
            after: dict[tuple[int, ...], set[int]] = {}
            for T in lengths:
                if least <= T <= most:
                    for n, choice in enumerate(paths[T]):
                        after.setdefault(paths[T][:n], set()).add(choice)
            for prefix, wanted in after.items():
                walker = Bounded(layout, strides, least, most)
                for choice in prefix:
                    walker.push(choice)
                assert set(walker.choices()) == wanted, (least, most, prefix)


@pytest.mark.parametrize(("name", "strides"), LAYOUT_CASES)
def test_a_segment_closes_at_the_last_moment_that_is_left(name, strides):
    """Scores that never want to stop: sound goes on until its end marker is the last id that fits, or nearly."""
    spec = spec_of("audio", len(strides), strides)
    vocab = Vocab(4, audio=spec, layout=name)
    block = vocab.blocks["audio"]
    for limit in (8, 31, 44):
        processor = DocumentLogits(vocab, max_length=limit, num_codebooks={"audio": len(strides)}, modality="audio")
        ids = torch.tensor([[2]])
        scores = torch.zeros(1, vocab.size)
        scores[0, [block.begin, block.end]], scores[0, :4], scores[0, block.pad] = -9, -8, -7
        while ids.shape[1] < limit:
            ids = torch.cat([ids, processor(ids, scores).argmax(1, keepdim=True)], 1)
        parts = vocab.unpack(ids[0].tolist())
        (tokens,) = [p for p in parts if isinstance(p, Tokens)]
        T = int(tokens.lengths[0])
        longer = next(t for t in range(T + 1, T + 9) if min(-(-t // s) * s for s in strides) == t)
        assert len(vocab.pack([[2], tokens_of(spec, longer)], header=False)) > limit
        assert tokens.spec.num_codebooks == len(strides)


def test_a_document_that_does_not_fit_is_not_begun_and_one_that_must_be_is_refused():
    vocab = Vocab(4, audio=spec_of("audio"), image=spec_of("image"))
    begin = {m: b.begin for m, b in vocab.blocks.items()}
    needed = 6 * 3 + 2  # a picture of six positions
    assert allowed_mask(vocab, [1], num_codebooks={"image": 3}, max_length=1 + needed)[begin["image"]]
    assert not allowed_mask(vocab, [1], num_codebooks={"image": 3}, max_length=needed)[begin["image"]]
    assert allowed_mask(vocab, [1], max_length=needed)[begin["image"]]  # of fewer levels
    tight = allowed_mask(vocab, [1], max_length=2)
    assert tight[:4].all() and int(tight.sum()) == 4
    with pytest.raises(ValueError, match=r"max_length, lengths: expected room for a segment \(image\)"):
        allowed_mask(vocab, [1], modality="image", num_codebooks={"image": 3}, max_length=needed)
    with pytest.raises(ValueError, match="expected room to close the segment that the prompt leaves open"):
        allowed_mask(vocab, [begin["audio"], vocab.ranges["audio_0"][0]], num_codebooks={"audio": 3}, max_length=4)
    with pytest.raises(ValueError, match="max_length: expected more than the 1 ids so far, got 1"):
        allowed_mask(vocab, [1], max_length=1)


@QUICK
@given(st.integers(0, 2**32), st.sampled_from(LAYOUT_CASES), st.integers(0, 9))
def test_a_prompt_may_end_anywhere_in_a_document(seed, case, T):
    rng, (name, strides) = random.Random(seed), case
    spec = spec_of("audio", len(strides), strides)
    vocab = Vocab(4, audio=spec, layout=name)
    side = {"num_samples": torch.tensor([rng.randrange(10**6)]), "note": torch.ones(1, 2)}
    tokens = tokens_of(spec, T)
    tokens.side.update(side if rng.random() < 0.5 else {})
    ids = vocab.pack([[1, 2], tokens, [3], tokens], header=rng.random() < 0.5)
    prompt = ids[: rng.randrange(1, len(ids))]
    limit = len(ids) + 60
    processor = DocumentLogits(vocab, max_length=limit, eos_id=0)
    (row,) = say(processor, [prompt], limit - len(prompt), seed, 0, vocab.size)
    new = row[len(prompt) :]
    vocab.unpack(prompt + (new[: new.index(0)] if 0 in new else new))
    follow = vocab.grammar()
    for i in prompt:
        follow.push(i)
    own = allowed_mask(vocab, prompt)
    assert not (own & ~follow.mask()).any()
    if T and not follow.complete and len(prompt) > 1 and prompt[-1] not in vocab.ranges["byte"]:
        in_text = prompt[-1] < 4 or prompt[-1] == vocab.blocks["audio"].begin
        assert in_text or torch.equal(own, follow.mask())


# -------------------------------------------------------------------------------------------------------- the rows


def small() -> Vocab:
    return Vocab(4, image=spec_of("image"), audio=spec_of("audio"), layout={"audio": "delay"})


@QUICK
@given(st.integers(0, 2**32), st.sampled_from([False, True]))
def test_rows_may_change_places_double_and_be_read_again(seed, header):
    """As beam search does: the masks are those of a processor that sees each row for the first time."""
    rng, vocab = random.Random(seed), small()
    options = {"header": header, "lengths": {"audio": (1, 4), "image": (1, 3)}, "max_length": 44, "eos_id": 0}
    shared = DocumentLogits(vocab, prompt_length=2, **options)
    ids = torch.tensor([[1, 2]] * 4)
    for _ in range(41):
        masks = shared(ids, torch.zeros(4, vocab.size)) > -1
        for b in range(4):
            if rng.random() < 0.1:
                fresh = DocumentLogits(vocab, prompt_length=2, **options)
                assert torch.equal(fresh(ids[b : b + 1], torch.zeros(1, vocab.size))[0] > -1, masks[b])
        picked = torch.multinomial(masks.float(), 1, generator=torch.Generator().manual_seed(rng.randrange(99)))
        ids = torch.cat([ids, picked], 1)
        kind = rng.random()
        if kind < 0.3:
            ids = ids[[rng.randrange(4) for _ in range(4)]]
        elif kind < 0.4 and ids.shape[1] > 6:
            ids = ids[:, : ids.shape[1] - rng.randrange(3)]  # assisted decoding takes ids back


def test_each_step_reads_only_the_new_ids(monkeypatch):
    vocab, taken = small(), []
    take = Row._take
    monkeypatch.setattr(Row, "_take", lambda self, i: (taken.append(i), take(self, i))[1])
    processor = DocumentLogits(vocab, modality="audio", lengths={"audio": (200, 200)})
    ids = torch.full((2, 50), 1)
    for _ in range(300):
        scores = processor(ids, torch.zeros(2, vocab.size))
        ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
    assert len(taken) == 2 * 299


def test_masks_are_shared_between_steps_and_the_dtype_stays():
    vocab = small()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        processor = DocumentLogits(vocab, modality="audio", num_codebooks={"audio": 3})
        ids = torch.tensor([[1]])
        for _ in range(90):
            wish = torch.zeros(1, vocab.size, dtype=dtype)
            wish[0, vocab.blocks["audio"].end] = -1
            scores = processor(ids, wish)
            assert scores.dtype == dtype
            ids = torch.cat([ids, scores.argmax(1, keepdim=True)], 1)
        assert 5 <= len(processor._masks) <= 12


def test_scores_of_nothing_that_is_allowed_are_as_good_as_any():
    vocab = small()
    begin = vocab.blocks["audio"].begin
    bad = torch.full((2, vocab.size), float("-inf"))
    bad[1] = float("nan")
    scores = DocumentLogits(vocab, modality="audio")(torch.tensor([[1], [2]]), bad)
    assert scores.softmax(1)[:, begin].tolist() == [1, 1]


def test_rows_end_with_eos_and_are_left_alone_then():
    vocab = small()
    processor = DocumentLogits(vocab, eos_id=[3, vocab.size + 1], lengths={"audio": (1, 2)}, modality="audio")
    begin, end = vocab.blocks["audio"].begin, vocab.blocks["audio"].end
    zeros = torch.zeros(2, vocab.size + 2)
    processor(torch.tensor([[3], [3]]), zeros)  # in the prompt it ends nothing
    ids = [[3, begin], [3, begin]]
    assert not (processor(torch.tensor(ids), zeros)[:, [3, vocab.size, vocab.size + 1]] > -1).any()
    cells = vocab.pack([tokens_of(spec_of("audio", 1), 1)], header=False)[1:]
    for i in cells:
        ids = [[*row, i] for row in ids]
        scores = processor(torch.tensor(ids), zeros)
    assert ids[0][-1] == end and (scores[:, [3, vocab.size + 1]] == 0).all() and scores[0, vocab.size] < -1
    ids = [[*ids[0], 3], [*ids[1], vocab.size + 1]]
    assert (processor(torch.tensor(ids), zeros) == 0).all()
    ids = [[*row, 999] for row in ids]  # padding of any kind
    assert (processor(torch.tensor(ids), zeros) == 0).all()


def test_left_padding_is_skipped():
    vocab = small()
    pad = vocab.size + 7
    begin = vocab.blocks["image"].begin
    processor = DocumentLogits(vocab, pad_id=pad, max_length=30, num_codebooks={"image": 3})
    masks = processor(torch.tensor([[pad, pad, 1], [2, 1, begin], [pad, 2, begin]]), torch.zeros(3, vocab.size)) > -1
    assert torch.equal(masks[0], allowed_mask(vocab, [1], num_codebooks={"image": 3}, max_length=28))
    assert masks[1:, list(vocab.ranges["image_0"])].all() and int(masks[1].sum()) == int(masks[2].sum()) == 3
    with pytest.raises(TokensError, match=r"row 0 of the prompts: .*got 37"):
        DocumentLogits(vocab, max_length=30)(torch.tensor([[37, 1]]), torch.zeros(1, vocab.size))


def test_arguments_that_do_not_fit_are_refused():
    vocab, plain = small(), Vocab(0, audio=spec_of("audio", 2, (2, 3)))
    for kwargs, want in [
        ({"modality": "video"}, "modality: expected one of .*'audio', 'image'.*, got 'video'"),
        ({"lengths": {"video": (1, 2)}}, "lengths: expected only"),
        ({"lengths": {"audio": (3, 2)}}, "0 <= least <= most"),
        ({"lengths": {"audio": 3}}, "0 <= least <= most"),
        ({"lengths": {"image": (1, 7)}}, "expected at most 6 positions of 'image-x', got 7"),
        ({"num_codebooks": {"audio": 4}}, "num_codebooks: expected at most"),
        ({"eos_id": vocab.blocks["audio"].begin}, "eos_id: expected ids of text"),
        ({"eos_id": -1}, "eos_id: expected ids of text"),
        ({"prompt_length": -1}, "prompt_length: expected an integer >= 0"),
    ]:
        with pytest.raises(ValueError, match=want):
            DocumentLogits(vocab, **kwargs)
    with pytest.raises(ValueError, match="without text ids"):
        DocumentLogits(plain, max_length=9)
    with pytest.raises(ValueError, match=r"strides \(2, 3\) allow, got \(5, 5\)"):
        DocumentLogits(plain, lengths={"audio": (5, 5)})
    DocumentLogits(plain, max_length=9, eos_id=plain.blocks["audio"].end)
    with pytest.raises(ValueError, match=r"scores: expected at least \d+ ids, got 4; resize"):
        DocumentLogits(vocab)(torch.tensor([[1]]), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="prompt_length: expected at most the 1 ids"):
        DocumentLogits(vocab, prompt_length=2)(torch.tensor([[1]]), torch.zeros(1, vocab.size))
    with pytest.raises(
        ValueError, match=r"ends between segments or in one of audio, got one that ends in one of image"
    ):
        allowed_mask(vocab, [vocab.blocks["image"].begin], modality="audio")
    with pytest.raises(TokensError, match="row 0 of the prompts: position 0"):
        allowed_mask(vocab, [vocab.blocks["image"].end])
    assert Rules(vocab, None, None, None, None, None, None).eos == ()


# ------------------------------------------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=small().size + 5, **sizes, bos_token_id=None, eos_token_id=0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
        {"num_beams": 3},
        {"num_beams": 3, "do_sample": True},
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "negative_prompt_ids": [1, 1], "do_sample": True},
        {"header": True, "do_sample": True},
        {"header": True, "num_beams": 3},
        {"one_segment": True, "modality": "audio", "lengths": {"audio": (3, 4)}},
    ],
    ids=str,
)
def test_generate_gives_the_parts_of_a_document_for_each_prompt(model, options):
    vocab = small()
    prompts = [[1, 2, 3], [3], vocab.pack([[2], tokens_of(spec_of("audio"), 2)])[:-3]]
    prompts = prompts[:2] if options.get("modality") else prompts
    torch.manual_seed(1)
    got = generate(model, vocab, prompts, 40, **({"lengths": {"image": (1, 4)}} | options))
    assert len(got) == len(prompts)
    for generation in got:
        assert generation.report.ok and len(generation.ids) <= 40
        if options.get("modality"):
            (tokens,) = generation.parts
            assert isinstance(tokens, Tokens) and 3 <= int(tokens.lengths[0]) <= 4
    if len(prompts) == 3:
        first = got[2].parts[0]
        assert isinstance(first, Tokens)
        assert torch.equal(first.codes[0, 0, :1], tokens_of(spec_of("audio"), 2).codes[0, 0, :1])


def test_left_padding_changes_no_generation(model):
    vocab = small()
    together = generate(model, vocab, [[1, 2, 3], [3]], 20, lengths={"image": (1, 4)})
    for prompt, got in zip([[1, 2, 3], [3]], together, strict=True):
        (alone,) = generate(model, vocab, [prompt], 20, lengths={"image": (1, 4)})
        assert alone.ids[:10] == got.ids[:10]


def test_without_the_constraint_what_can_be_read_is_read_and_the_rest_reported(model):
    torch.manual_seed(3)
    (free,) = generate(model, small(), [[1, small().blocks["audio"].begin]], 40, constrained=False, do_sample=True)
    assert not free.report.ok and len(free.ids) <= 40


def test_prompts_of_another_shape_are_refused(model):
    for prompts in ([1, 2], [[1], []], [], ["ab"]):
        with pytest.raises(ValueError, match="prompt_ids: expected a list of prompts"):
            generate(model, small(), prompts, 4)
    with pytest.raises(ValueError, match="one_segment: expected a modality"):
        generate(model, small(), [[1]], 4, one_segment=True)


def test_the_processor_is_one_of_transformers_list(model):
    """With ``model.generate`` itself, several sequences of each prompt, and a score for each step."""
    vocab = small()
    processor = DocumentLogits(vocab, eos_id=0, max_length=42, lengths={"image": (1, 2)})
    out = model.generate(
        torch.tensor([[1, 2]]),
        attention_mask=torch.ones(1, 2, dtype=torch.int64),
        logits_processor=[processor],
        max_new_tokens=40,
        do_sample=True,
        num_return_sequences=4,
        pad_token_id=0,
    )
    assert out.shape[0] == 4
    for row in out.tolist():
        new: list[int] = row[2:]
        vocab.unpack(new[: new.index(0)] if 0 in new else new)


def test_allowed_gives_masks_of_the_vocab_for_a_loop_of_ones_own():
    vocab = small()
    processor = DocumentLogits(vocab, modality="audio", num_codebooks={"audio": 2})
    ids: Tensor = torch.tensor([[1]])
    for _ in range(9):
        mask = processor.allowed(ids)
        assert mask.shape == (1, vocab.size) and mask.any()
        ids = torch.cat([ids, mask.int().argmax(1, keepdim=True)], 1)
    assert ids[0, 1] == vocab.blocks["audio"].begin
