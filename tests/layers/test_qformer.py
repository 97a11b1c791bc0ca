"""The Q-Former against transformers' BLIP-2 and BERT, and what its causal mask and its text mask promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtok.layers.qformer import QFormer, attend_dropped

DIM, DEPTH, HEADS, FEATURES = 16, 3, 4, 10


def qformer(causal: bool, text_vocab: int = 0, dropout: float = 0.0, **options: Any) -> QFormer:
    torch.manual_seed(0)
    model = QFormer(DIM, DEPTH, HEADS, FEATURES, causal, text_vocab=text_vocab, dropout=dropout, max_text=9, **options)
    with torch.no_grad():
        for p in model.parameters():  # biases and norms too must count
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def rand(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def copy_layer(ours: nn.Module, theirs: nn.Module, ours_name: str, theirs_names: list[str]) -> None:
    """Copy a Linear or LayerNorm, or several of ours' joined parts."""
    target = ours.get_submodule(ours_name)
    for part in ("weight", "bias"):
        for source, piece in zip(theirs_names, getattr(target, part).detach().chunk(len(theirs_names)), strict=True):
            getattr(theirs.get_submodule(source), part).data.copy_(piece)


def copy_attention(ours: nn.Module, theirs: nn.Module, a: str, inner: str, output: str) -> None:
    copy_layer(ours, theirs, f"{a}.q", [f"{inner}.query"])
    copy_layer(ours, theirs, f"{a}.kv", [f"{inner}.key", f"{inner}.value"])
    copy_layer(ours, theirs, f"{a}.out", [f"{output}.dense"])
    copy_layer(ours, theirs, f"{a}.norm", [f"{output}.LayerNorm"])


def blip2(model: QFormer) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.Blip2QFormerConfig(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        encoder_hidden_size=FEATURES,
        cross_attention_frequency=2,
        layer_norm_eps=1e-12,
    )
    theirs = transformers.Blip2QFormerModel(config).eval()
    copy_layer(model, theirs, "norm", ["layernorm"])
    for i, layer in enumerate(model.layers):
        block = theirs.encoder.layer[i]
        copy_attention(layer, block, "attention", "attention.attention", "attention.output")
        if i % 2 == 0:
            copy_attention(layer, block, "cross", "crossattention.attention", "crossattention.output")
        copy_layer(layer, block, "query_mlp.up", ["intermediate_query.dense"])
        copy_layer(layer, block, "query_mlp.out", ["output_query.dense"])
        copy_layer(layer, block, "query_mlp.norm", ["output_query.LayerNorm"])
    return theirs


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_it_computes_what_blip2_computes(causal: bool, grad: bool):
    model = qformer(causal)
    theirs = blip2(model)
    queries, features = rand(2, 7, DIM), rand(2, 5, FEATURES, seed=2)
    later = torch.full((7, 7), -torch.inf).triu(1) if causal else torch.zeros(7, 7)
    with torch.no_grad():
        expected = theirs(query_embeds=queries, attention_mask=later.expand(2, 1, 7, 7), encoder_hidden_states=features)
    with torch.set_grad_enabled(grad):  # training on CPU takes another path
        torch.testing.assert_close(model(queries, features), expected.last_hidden_state, atol=2e-5, rtol=1e-4)


def test_the_text_branch_computes_what_bert_computes():
    transformers = pytest.importorskip("transformers")
    model = qformer(causal=True, text_vocab=30)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        max_position_embeddings=9,
        layer_norm_eps=1e-12,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        assert model.words is not None and model.word_positions is not None
        bert.embeddings.word_embeddings.weight.copy_(model.words.weight)
        bert.embeddings.position_embeddings.weight.copy_(model.word_positions)
        bert.embeddings.token_type_embeddings.weight.zero_()
    copy_layer(model, bert, "norm", ["embeddings.LayerNorm"])
    for layer, block in zip(model.layers, bert.encoder.layer, strict=True):
        copy_attention(layer, block, "attention", "attention.self", "attention.output")
        copy_layer(layer, block, "text_mlp.up", ["intermediate.dense"])
        copy_layer(layer, block, "text_mlp.out", ["output.dense"])
        copy_layer(layer, block, "text_mlp.norm", ["output.LayerNorm"])
    ids = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    with torch.no_grad():
        expected = bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(model.text(ids, mask)[mask], expected[mask], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("num_queries", [3, 31, 32, 33])
def test_causal_holds_for_any_number_of_queries(num_queries: int):
    queries, features = rand(1, num_queries, DIM), rand(1, 5, FEATURES, seed=2)
    changed = queries.clone()
    changed[:, 2:] = rand(1, num_queries - 2, DIM, seed=7)
    for causal in (True, False):
        model = qformer(causal)
        with torch.no_grad():
            first, second = model(queries, features)[:, :2], model(changed, features)[:, :2]
            fewer = model(queries[:, :2], features)
        assert torch.equal(first, second) == causal
        assert torch.allclose(first, fewer, atol=1e-5) == causal


def test_the_last_query_hears_the_first():
    model, features = qformer(causal=True), rand(1, 5, FEATURES, seed=2)
    queries = rand(1, 4, DIM)
    changed = queries.clone()
    changed[:, 0] = rand(DIM, seed=7)
    assert not torch.allclose(model(queries, features)[:, -1], model(changed, features)[:, -1], atol=1e-3)


def test_padding_of_a_text_changes_nothing():
    model = qformer(causal=True, text_vocab=30)
    ids, mask = torch.tensor([[4, 9, 2]]), torch.ones(1, 3, dtype=torch.bool)
    padded, padded_mask = torch.tensor([[4, 9, 2, 17, 29]]), torch.tensor([[True, True, True, False, False]])
    with torch.no_grad():
        torch.testing.assert_close(model.text(padded, padded_mask)[:, :3], model.text(ids, mask), atol=1e-5, rtol=1e-5)


def test_dropout_works_in_training_only():
    model, queries, features = qformer(causal=True, dropout=0.3), rand(1, 4, DIM), rand(1, 5, FEATURES, seed=2)
    assert torch.equal(model(queries, features), model(queries, features))
    model.train()
    assert not torch.equal(model(queries, features), model(queries, features))
    attended = [attend_dropped(*[queries[:, None]] * 3, causal=True, dropout=0.5) for _ in range(2)]
    assert not torch.equal(*attended)  # in the attention weights too, not in the branches alone


def test_gradient_reaches_every_weight():
    model = qformer(causal=True, text_vocab=30)
    ids = torch.arange(9)[None]
    out = model(rand(1, 4, DIM), rand(1, 5, FEATURES, seed=2)).square().sum()
    (out + model.text(ids, torch.ones_like(ids, dtype=torch.bool)).pow(3).sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert silent == []


def test_cross_attention_stands_in_every_nth_layer():
    counts = {n: [layer.cross is not None for layer in qformer(True, cross_attention_freq=n).layers] for n in (1, 2, 3)}
    assert counts == {1: [True] * 3, 2: [True, False, True], 3: [True, False, False]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(rand(1, 3, DIM + 1), rand(1, 5, FEATURES)), "queries: expected"),
        (lambda m: m(rand(1, 3, DIM), rand(1, 5, DIM)), "features: expected"),
        (lambda m: m.text(torch.zeros(1, 10, dtype=torch.int64), torch.ones(1, 10, dtype=torch.bool)), "1..9"),
        (lambda m: m.text(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)), "bool mask"),
        (lambda m: m.text(torch.full((1, 2), 30), torch.ones(1, 2, dtype=torch.bool)), "0..29"),
        (lambda m: m.text(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool)), "one real word"),
    ],
)
def test_wrong_input_is_named(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call(qformer(True, text_vocab=30))


def test_wrong_sizes_are_named():
    with pytest.raises(ValueError, match="multiple of num_heads 3"):
        QFormer(16, 1, 3, 8, True)
    with pytest.raises(ValueError, match="at least 1"):
        QFormer(16, 0, 4, 8, True)
    with pytest.raises(ValueError, match="no text branch"):
        qformer(True).text(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
