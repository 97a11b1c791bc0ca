"""Bits of binary tokenizers: the order is the quantizer's, regrouping is exact, and a Vocab takes any size of id."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vocab_cases import QUICK, assert_same, spec_of, tokens_of

from mmtok.quantizers.binary import BinaryQuantizer
from mmtok.tokens import Tokens, TokensError
from mmtok.vocab import LAYOUTS, BitSplit, Vocab, from_bits, to_bits


@pytest.mark.parametrize("bits_per_code", [1, 3, 8])
def test_the_bit_order_is_the_quantizers(bits_per_code):
    torch.manual_seed(0)
    quantizer = BinaryQuantizer(5, 24, "sign", bits_per_code).eval()
    codes = quantizer.encode(torch.randn(3, 7, 5))
    tokens = Tokens(codes, torch.full((3,), 7), spec_of("image", quantizer.codebook_sizes))
    assert torch.equal(to_bits(tokens), quantizer.bits(codes))
    assert torch.equal(from_bits(quantizer.bits(codes), tokens.spec).codes, codes)
    for m in (1, 2, 6, 8, 12, 20):
        split = BitSplit(tokens.spec, m)
        other = BinaryQuantizer(5, 24, "sign", m) if 24 % m == 0 else None
        if other is not None:  # the ids are the codes of the same network with bits_per_code = m
            other.load_state_dict(quantizer.state_dict())
            assert torch.equal(split.split(tokens).codes, other.codes_from_bits(quantizer.bits(codes)))
        assert torch.equal(split.join(split.split(tokens)).codes, codes)


def test_bits_by_hand():
    spec = spec_of("image", (8, 4))
    tokens = Tokens(torch.tensor([[[1, 6], [2, 3]]]), torch.tensor([2]), spec)
    assert to_bits(tokens).int().tolist() == [[[1, 0, 0, 0, 1], [0, 1, 1, 1, 1]]]  # low bits first, level 0 first
    assert BitSplit(spec, 2).split(tokens).codes.tolist() == [[[1, 2], [0, 3], [1, 1]]]
    assert BitSplit(spec, 4).split(tokens).codes.tolist() == [[[1, 14], [1, 1]]]
    assert BitSplit(spec, 5).split(tokens).codes.tolist() == [[[1 + 2 * 8, 6 + 3 * 8]]]


@QUICK
@given(st.lists(st.integers(1, 14), min_size=1, max_size=6), st.integers(1, 20), st.sampled_from([1, 3]), st.data())
def test_regrouping_and_bits_are_exact_for_any_widths(widths, bits_per_id, stride, data):
    spec = spec_of("audio", tuple(2**b for b in widths), (stride,) * len(widths))
    items = [tokens_of(spec, T, T, {"num_samples": torch.tensor([T])}) for T in (0, 5, 9)]
    tokens = Tokens.concat(items)
    tokens = Tokens(tokens.codes.masked_fill(~tokens.mask[:, None], -9), tokens.lengths, spec, tokens.side)
    bits = to_bits(tokens)
    assert bits.dtype == torch.bool and bits.shape == (3, 9, sum(widths)) and not bits[0].any()
    back = from_bits(bits.int() if data.draw(st.booleans()) else bits, spec, tokens.lengths, tokens.side)
    assert_same(back, Tokens.concat(items))
    split = BitSplit(spec, min(bits_per_id, sum(widths)))
    ids = split.split(tokens)
    ids.check(split.spec)
    assert torch.equal(ids.bits, tokens.bits)
    assert_same(split.join(ids), Tokens.concat(items))
    total = sum(widths[: (k := data.draw(st.integers(1, len(widths))))])
    prefix = Tokens.concat(items).keep(num_codebooks=k)
    if total % split.bits_per_id and total != sum(widths):
        with pytest.raises(TokensError, match=rf"first {k} levels .* {total} bits"):
            split.split(prefix)
    else:
        assert_same(split.join(split.split(prefix)), prefix)


@pytest.mark.parametrize("bits_per_id", [1, 2, 4, 6, 8, 10, 16, 20])
def test_a_vocab_over_ids_of_any_size_carries_a_binary_tokenizer(bits_per_id):
    spec = spec_of("image", (2**10,) * 4)
    tokens = tokens_of(spec, 16, 2, {"height": torch.tensor([64]), "width": torch.tensor([48])})
    split = BitSplit(spec, bits_per_id)
    for layout in LAYOUTS:
        vocab = Vocab(100, image=split.spec, layout=layout)
        assert vocab.size == 100 + 256 + 3 + sum(split.spec.codebook_sizes)
        ids = vocab.pack([[1], split.split(tokens), [2]])
        assert vocab.unpack(ids)[0] == [1]
        assert_same(split.join(vocab.unpack(ids)[1]), tokens)
        with pytest.raises(TokensError, match="fingerprint"):
            vocab.pack([tokens])
    with pytest.raises(TokensError, match="fingerprint"):
        split.split(split.split(tokens))
    with pytest.raises(TokensError, match="fingerprint"):
        split.join(tokens)


def test_the_fingerprint_follows_the_tokenizer_and_the_size_of_the_ids():
    spec, other = spec_of("image", (16, 16)), spec_of("image", (16, 16), name="y")
    prints = [BitSplit(s, m).spec.fingerprint for s in (spec, other) for m in (2, 4, 8)]
    assert len({*prints, spec.fingerprint, other.fingerprint}) == 8
    assert BitSplit(spec, 4).spec == BitSplit(dataclasses.replace(spec), 4).spec
    assert BitSplit(spec, 4).spec.keep(1) == BitSplit(spec.keep(1), 4).spec  # room for a prefix of the levels
    assert BitSplit(spec, 2).spec.num_tokens == spec.num_tokens and "8 bits as 4 x 2" in repr(BitSplit(spec, 2))


def test_what_has_no_bits_is_refused():
    spec = spec_of("image", (16, 16))
    with pytest.raises(ValueError, match=r"levels of 2\^b codes.*got a level of 6 in 'image-x'"):
        to_bits(tokens_of(spec_of("image", (4, 6)), 3))
    for m in (0, 9):
        with pytest.raises(ValueError, match=rf"bits_per_id: expected 1..8 \(8 bits a position\), got {m}"):
            BitSplit(spec, m)
    with pytest.raises(ValueError, match=r"levels of one stride, got the strides \(2, 1\)"):
        BitSplit(spec_of("audio", (16, 16), (2, 1)), 4)
    with pytest.raises(ValueError, match=r"D one of \[4, 8\].*, got \(1, 2, 5\)"):
        from_bits(torch.zeros(1, 2, 5), spec)
    with pytest.raises(ValueError, match=r"0 and 1, got other torch.float32 values"):
        from_bits(torch.full((1, 2, 8), 0.3), spec)
    with pytest.raises(TokensError, match=r"expected 0\.\.15, got 16"):
        to_bits(Tokens(torch.full((1, 2, 3), 16), torch.tensor([3]), spec))
    with pytest.raises(TokensError, match=r"first 3 levels .*6 bits, which end within a level.*one of \[2, 4\]"):
        BitSplit(spec, 2).join(BitSplit(spec, 2).split(tokens_of(spec, 3)).keep(num_codebooks=3))
