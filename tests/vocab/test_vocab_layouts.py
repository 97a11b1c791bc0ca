"""Layouts: the walk and the equation agree, prefixes of levels and lengths that are no whole group, clear refusals."""

from __future__ import annotations

import time
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocab_cases import QUICK, assert_same, cells_by_definition, layouts, spec_of, tokens_of

from mmtok.tokens import Tokens, TokensError
from mmtok.vocab import LAYOUTS, Vocab
from mmtok.vocab.layouts import END, PAD, read_layout

SNAC = (4, 2, 1)
ORPHEUS = "frame:0,1,2,2,1,2,2"


@QUICK
@given(layouts(5), st.integers(0, 30), st.data())
def test_the_order_is_the_definition_also_of_a_prefix_of_levels(case, T, data):
    name, strides = case
    layout = read_layout(name, strides, "x")
    kept = strides[: data.draw(st.integers(1, len(strides)))]
    levels, positions = layout.order(kept, T)
    want = cells_by_definition(name, kept, T)
    assert levels.tolist() == [PAD if cell is None else cell[0] for cell in want]
    assert [t for q, t in zip(levels, positions, strict=True) if q != PAD] == [cell[1] for cell in want if cell]
    if "delay" not in name:
        full_levels, full_positions = layout.order(strides, T)
        inside = full_levels < len(kept)
        assert full_levels[inside].tolist() == levels.tolist()
        assert full_positions[inside].tolist() == positions.tolist()


@QUICK
@given(layouts(3), st.data())
def test_the_walk_offers_exactly_what_some_length_has_next(case, data):
    """Against the orders of all lengths: what may follow a beginning is what follows it in one of them."""
    name, strides = case
    layout = read_layout(name, strides, "x")
    kept = strides[: data.draw(st.integers(1, len(strides)))]
    followers = defaultdict(dict)  # of each beginning: what follows, and the largest T where it does
    for T in range(36):  # 5 positions, and then the largest group and delay that are drawn
        cells = layout.order(kept, T)[0].tolist()
        for n in range(len(cells) + 1):
            followers[tuple(cells[:n])][cells[n] if n < len(cells) else END] = T
    for T in range(6):
        cells = layout.order(kept, T)[0].tolist()
        free, told = layout.walk(kept), layout.walk(kept, T)
        for n, cell in enumerate([*cells, END]):
            longest = followers[tuple(cells[:n])]
            assert free.choices() == sorted(longest, key=lambda choice: -longest[choice])
            assert told.choices() == [cell]
            if cell != END:
                free.push(cell)
                told.push(cell)


def test_snacs_frame_is_the_one_of_orpheus_and_lengths_need_not_be_whole_groups():
    spec = spec_of("audio", (64, 64, 64), SNAC)
    c0, c1, c2 = [7, 8], [11, 12, 13], [21, 22, 23, 24, 25]  # T = 5: a second group of one position
    codes = torch.tensor([[c0[t // 4] for t in range(5)], [c1[t // 2] for t in range(5)], c2])
    tokens = Tokens(codes[None], torch.tensor([5]), spec)
    frame, flat = Vocab(10, audio=spec, layout=ORPHEUS), Vocab(10, audio=spec)
    ids = frame.pack([tokens], header=False)
    levels = [frame.ranges[f"audio_{q}"].start for q in range(3)]
    first = [levels[0] + 7, levels[1] + 11, levels[2] + 21, levels[2] + 22, levels[1] + 12, levels[2] + 23]
    second = [levels[2] + 24, levels[0] + 8, levels[1] + 13, levels[2] + 25]
    assert ids[1:-1] == first + second
    assert ids == flat.pack([tokens], header=False)  # position by position is the same order for these strides
    assert_same(frame.unpack(ids)[0], tokens)
    coarse = frame.pack([tokens.keep(num_codebooks=2)], header=False)
    assert coarse[1:-1] == [i for i in first + second if i < levels[2]]
    other = Vocab(10, audio=spec, layout="frame:2,2,1,0,2,2,1")
    assert [other.label(i)[12] for i in other.pack([tokens])[2:-1]] == list("2210221210")  # cells past T are left out
    for vocab in (frame, other):
        for T in range(10):
            for Q in (1, 2, 3):
                part = tokens_of(spec.keep(Q), T, T)
                assert_same(vocab.unpack(vocab.pack([part]))[0], part)


def test_delays_of_a_prefix_count_from_its_smallest():
    spec = spec_of("audio", (8, 8, 8))
    vocab = Vocab(0, audio=spec, layout="delay: 2, 3,0")
    label = {vocab.blocks["audio"].pad: "_"} | {i: str(q) for q in range(3) for i in vocab.ranges[f"audio_{q}"]}
    words = ["".join(label[i] for i in vocab.pack([tokens_of(spec.keep(k), 2)], False)[1:-1]) for k in (1, 2, 3)]
    assert words == ["00", "0_01_1", "__2__20__01__1_"]
    moshi = Vocab(0, audio=spec, layout="partial_delay")
    assert moshi.pack([tokens_of(spec, 3)]) == Vocab(0, audio=spec, layout="delay:0,1,1").pack([tokens_of(spec, 3)])


def test_a_document_is_generated_by_the_grammar_alone_and_read_again():
    """The first code that is legal at each step, the end once there are ten ids: unpack reads it, with all levels."""
    for name, strides in [(ORPHEUS, SNAC), ("frame:2,1,0,1,2,2,2", SNAC), ("delay:1,0,3", (1, 1, 1))]:
        vocab = Vocab(0, audio=spec_of("audio", (4, 4, 4), strides), layout=name)
        grammar, ids, block = vocab.grammar(header=False, num_codebooks={"audio": 3}), [], vocab.blocks["audio"]
        while not ids or not grammar.complete:
            legal = {r.start for r in grammar.allowed()}
            codes, closing = sorted(legal - {block.end, block.pad}), [i for i in (block.end, block.pad) if i in legal]
            ids.append([*closing, *codes][0] if len(ids) >= 10 else [*codes, *closing[::-1]][0])
            grammar.push(ids[-1])
        (tokens,) = vocab.unpack(ids)
        assert isinstance(tokens, Tokens) and tokens.spec.num_codebooks == 3 and int(tokens.lengths) >= 3, name
        assert vocab.pack([tokens], header=False) == ids


def test_layouts_that_do_not_fit_are_refused_with_what_would():
    for strides, name, want in [
        ((1, 1), "frame:0,0,1", r"expected an order of 1 of level 0, 1 of level 1 .*, got 0,0,1"),
        (SNAC, "frame:0,1,2", r"1 of level 0, 2 of level 1, 4 of level 2 \(what 4 positions have .*got 0,1,2$"),
        (SNAC, "frame:0,1,1,2,2,2,2,3", "got 0,1,1,2,2,2,2,3"),
        (SNAC, "delay:0,1,2", r"got the strides \(4, 2, 1\); use flatten or coarse_first"),
        ((1, 1), "delay:0,1,2", "one delay for each of 2 levels, got 3"),
        ((1, 1), "delay:1,2", "the smallest 0 .*, got 1,2"),
        ((1, 1), "delay:0,-1", "expected one of .*got 'delay:0,-1'"),
        ((1, 1), "delay:", "expected one of .*'delay:0,1,3'"),
        ((1, 1), "flatten:0,1", "expected one of"),
        ((1, 1), "frame", "expected one of .*'frame:0,1,1'"),
        ((1, 1), None, "expected one of .*got None"),
    ]:
        with pytest.raises(ValueError, match=want):
            Vocab(5, audio=spec_of("audio", (4,) * len(strides), strides), layout={"audio": name})
    assert Vocab(5, audio=spec_of("audio", (4, 4)), layout="frame:0,0,1,1").layouts == {"audio": "frame:0,0,1,1"}
    assert "audio='audio-x' delay:0,3" in Vocab(5, audio=spec_of("audio", (4, 4)), layout="delay:0,3").describe()


@pytest.mark.parametrize("name", ["frame:0,1,1", "delay:0,2"])
def test_a_vast_length_in_a_header_neither_allocates_nor_stalls(name):
    spec = spec_of("audio", (5, 5), (4, 2) if "frame" in name else (1, 1))
    vocab = Vocab(10, audio=spec, layout=name)
    block, byte = vocab.blocks["audio"], vocab.ranges["byte"].start
    ids = [block.begin, *(byte + b for b in (1, 1, *[0xFF] * 8, 0x7F)), block.levels[0].start, block.end]
    start = time.process_time()
    with pytest.raises(TokensError, match=rf"position {len(ids) - 1}: expected audio"):
        vocab.unpack(ids)
    assert time.process_time() - start < 0.5


# ------------------------------------------------------------------------------- what the tokenizers of mmtok give


def every_layout(strides: tuple[int, ...]) -> list[str]:
    names = [n for n in LAYOUTS if "delay" not in n or set(strides) == {1}]
    Q = len(strides)
    if set(strides) == {1}:
        return [
            *names,
            "delay:" + ",".join(str(q % 3) for q in range(Q)),
            "frame:" + ",".join(map(str, range(Q)[::-1])),
        ]
    return [*names, ORPHEUS]


def test_many_images_of_dynamic_length_and_many_clips_in_one_document():
    """LaVIT's pictures have any number of ids; clips of ragged levels, and prefixes of levels, stand between them."""
    image, audio = spec_of("image", (512,)), spec_of("audio", (128,) * 3, SNAC)
    pictures = [tokens_of(image, T, T) for T in (3, 64, 17, 0, 33)]
    clips = [
        tokens_of(audio.keep(Q), T, T, {"num_samples": torch.tensor([T * 320 - 1])})
        for T, Q in [(8, 3), (13, 2), (1, 1)]
    ]
    parts = [[1, 2], pictures[0], pictures[1], [3], clips[0], pictures[2], clips[1], clips[2], [4, 5], *pictures[3:]]
    for image_layout in every_layout((1,)):
        for audio_layout in every_layout(SNAC):
            vocab = Vocab(10, image=image, audio=audio, layout={"image": image_layout, "audio": audio_layout})
            ids = vocab.pack(parts)
            for got, want in zip(vocab.unpack(ids), parts, strict=True):
                assert_same(got, want)
            for n in (0, 30, len(ids) - 1):
                assert vocab.allowed(ids[:n])[ids[n]]
            salvaged = vocab.salvage(ids)
            assert salvaged.report.ok and len(salvaged.parts) == len(parts)


def test_tokenbridge_has_an_id_a_dimension():
    spec = spec_of("image", (64,) * 16)  # 16 dimensions of 64 steps each, 256 positions
    tokens = tokens_of(spec, 256, side={"height": torch.tensor([256]), "width": torch.tensor([200])})
    for name in every_layout(spec.level_strides):
        vocab = Vocab(32_000, image=spec, layout=name)
        assert vocab.size == 32_000 + 256 + 3 + 16 * 64
        assert_same(vocab.unpack(vocab.pack([tokens, [5], tokens.keep(num_codebooks=6)]))[0], tokens)
        ids = vocab.pack([tokens], header=False)
        pads = sum(i == vocab.blocks["image"].pad for i in ids)
        assert len(ids) - pads == 2 + 16 * 256
        assert (pads > 0) == ("delay" in name)
