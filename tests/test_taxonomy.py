"""The columns of `mmtok list`: filled and legal for all that ships and every family, right where the config decides.

The reference is the table of tokenizers of Discrete Audio Tokens (arXiv 2506.10274).
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mmtok
from mmtok import auto, catalogue
from mmtok.audio.dac import DAC, DAC_24KHZ
from mmtok.audio.encodec import ENCODEC_24KHZ, ENCODEC_32KHZ, EnCodec
from mmtok.audio.mimi import Mimi
from mmtok.audio.xcodec import XCodec
from mmtok.catalogue import Family, Taxonomy
from mmtok.image.bridge import Bridge
from mmtok.image.raster2d import Raster2D
from mmtok.image.titok import TATITOK_BL32, TITOK_L32, TiTok
from mmtok.quantizers import QUANTIZERS, TAXONOMY, BinaryQuantizer, build_quantizer, taxonomy_of
from mmtok.tokenizer import CheckpointError, Tokenizer
from mmtok.tokens import TokenSpec

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "contract"))
tiny = importlib.import_module("tiny_models")  # as the tests beside it import it
TINY: dict[str, Callable[[], Tokenizer]] = tiny.TINY

COLUMNS = ["architecture", "input", "quantization", "bitrate", "objective", "auxiliary", "joint", "domain"]
WORDS = {
    "input": catalogue.INPUTS,
    "quantization": catalogue.QUANTIZERS,
    "bitrate": catalogue.BITRATES,
    "objective": (*catalogue.OBJECTIVES, "-"),
    "auxiliary": (*catalogue.AUXILIARIES, "-"),
    "joint": ("y", "n"),
    "streamable": ("y", "n"),
    "order": catalogue.ORDERS,
}


def check_cells(cells: dict[str, str], modality: str) -> None:
    """Every column of the survey is there, in its order, with words of its set."""
    last = "streamable" if modality == "audio" else "order"
    assert list(cells) == [*COLUMNS, last, "rate"]
    for column, text in cells.items():
        assert text, f"{column} is empty"
        words = text.replace(", ", "+").split("+")
        assert column not in WORDS or set(words) <= set(WORDS[column]), f"{column}: {text}"
    sides = cells["architecture"].split("/")
    assert len(sides) == 2 and {w for side in sides for w in side.split("+")} <= set(catalogue.ARCHITECTURES)
    assert set(cells["domain"]) <= set("SMA" if modality == "audio" else "ND")
    assert any(c.isdigit() for c in cells["rate"]), f"rate: {cells['rate']}"


def cells_of(cls: type[Tokenizer], config: dict[str, Any], **spec: Any) -> dict[str, str]:
    """The columns of a class for a config, without building the network."""
    modality = cls.modality
    counts = {"frame_rate": 50.0} if modality == "audio" else {"num_tokens": 32}
    found = cls.taxonomy(config, TokenSpec("x", modality, (2,), **{**counts, **spec}))
    assert found is not None
    return found.cells()


def row(tokenizer: Tokenizer) -> dict[str, str]:
    found = type(tokenizer).taxonomy(tokenizer.config, tokenizer.spec)
    assert found is not None
    return found.cells()


# ---- what ships ----


@pytest.mark.parametrize("name", mmtok.available())
def test_shipped_checkpoints_fill_every_column(name: str):
    card = mmtok.card(name)
    check_cells(card["taxonomy"], card["modality"])


@pytest.mark.parametrize("name", mmtok.available())
def test_shipped_checkpoints_say_how_they_were_trained(name: str):
    """No shipped run had discriminators or a perceptual network; the published systems had both."""
    card, text = mmtok.card(name), (ROOT / "checkpoints" / name / "README.md").read_text()
    assert {"objective", "auxiliary", "domain"} <= set(card["about"])
    assert not {"GAN", "Feat", "Perc", "Diff"} & set(card["about"]["objective"])
    assert card["taxonomy"]["objective"] == ", ".join(card["about"]["objective"])
    assert card["taxonomy"]["domain"] == card["about"]["domain"]
    if card["modality"] == "audio":
        assert card["about"]["domain"] == "S" and "Speech only" in text and "without discriminators" in text
    assert (card["taxonomy"]["auxiliary"] == "TC") == ("text" in card["conditions"])
    assert (card["taxonomy"].get("streamable") == "y") == ("It streams" in text)


def test_ship_writes_what_the_checkpoints_say():
    """A checkpoint that ships again must not lose its line."""
    tree = ast.parse((ROOT / "recipes" / "ship.py").read_text())
    (about,) = (n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "ABOUT")
    assert about is not None
    assert ast.literal_eval(about) == {name: mmtok.card(name)["about"] for name in mmtok.available()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tokenizer = tiny.tiny_codec(True)
    tokenizer.about = {"objective": ["Rec"], "domain": "M"}
    tokenizer.save(tmp_path / "codec")
    return tmp_path / "codec"


def change_about(folder: Path, about: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"about": about}))


def test_about_overrules_and_travels_with_the_checkpoint(saved: Path, tmp_path: Path):
    card = mmtok.card(str(saved))
    assert card["taxonomy"]["objective"] == "Rec" and card["taxonomy"]["domain"] == "M"
    assert card["taxonomy"]["streamable"] == "y" and card["taxonomy"]["rate"] == "50"
    loaded = mmtok.load(saved)
    loaded.save(tmp_path / "again")
    assert mmtok.card(str(tmp_path / "again"))["about"] == {"objective": ["Rec"], "domain": "M"}
    change_about(saved, {"auxiliary": ["Dis"]})
    assert mmtok.card(str(saved))["taxonomy"]["auxiliary"] == "Dis"
    assert mmtok.card(str(saved))["taxonomy"]["objective"] == "GAN, Feat, Rec, VQ"  # of the published one
    assert mmtok.load(saved).fingerprint == loaded.fingerprint  # it says nothing of what codes mean


@pytest.mark.parametrize(
    "about", [{"objective": "Rec"}, {"objective": ["Love"]}, {"colour": "red"}, {"order": "2D"}, {"domain": ""}, []]
)
def test_an_about_that_does_not_fit_is_refused(saved: Path, about: Any):
    change_about(saved, about)
    with pytest.raises(CheckpointError, match=r"config\.json.* restore the file"):
        mmtok.card(str(saved))


def test_cards_of_types_that_say_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(auto.TOKENIZERS, "codec")
    assert mmtok.card(str(saved))["taxonomy"] is None


# ---- the table of types ----


def test_the_tiny_models_cover_the_table_of_types():
    assert {TINY[name]().type_name for name in TINY} == set(auto.TOKENIZERS)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_type_fills_every_column(name: str):
    tokenizer = TINY[name]()
    cells = row(tokenizer)
    check_cells(cells, tokenizer.modality)
    spec = tokenizer.spec
    assert str(spec.num_tokens if spec.frame_rate is None else f"{spec.frame_rate:g}") in cells["rate"]
    if tokenizer.modality == "audio":
        network: Any = tokenizer  # an EnCodec streams by `encode_stream` even where `streamer` cannot
        streams = (
            network.shape.ends_stay_apart if isinstance(tokenizer, EnCodec) else getattr(network, "streams", False)
        )
        assert (cells["streamable"] == "y") == streams
    quantizer: Any = tokenizer.quantizer
    word, _ = taxonomy_of(quantizer.config() if hasattr(quantizer, "config") else {"type": "rvq"})
    assert cells["quantization"] == word
    assert (cells["auxiliary"] == "TC") == ("text" in spec.conditions)


def changes(one: dict[str, str], other: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {k: (v, other[k]) for k, v in one.items() if v != other[k]}


VQ, FSQ = {"type": "vq", "codebook_size": 32}, {"type": "fsq", "levels": [5, 5, 4]}


CHANGED: dict[str, tuple[Callable[[], Tokenizer], Callable[[], Tokenizer], dict[str, tuple[str, str]]]] = {
    "causal": (TINY["codec-centred"], TINY["codec-causal"], {"streamable": ("n", "y")}),
    "front": (TINY["codec-centred"], TINY["codec-spectral"], {"input": ("T", "T-F")}),
    "xcodec front": (TINY["xcodec"], TINY["xcodec-spectral"], {"input": ("T", "T-F")}),
    "keep all": (TINY["dynamic"], TINY["dynamic-all"], {"bitrate": ("A", "F"), "rate": ("up to 16", "16")}),
    "text": (lambda: tiny.tiny_textok((), VQ), lambda: tiny.tiny_textok(("decoder",), VQ), {"auxiliary": ("-", "TC")}),
    "quantizer": (
        lambda: tiny.tiny_textok((), VQ),
        lambda: tiny.tiny_textok((), FSQ),
        {"quantization": ("SVQ", "FSQ"), "objective": ("GAN, Rec, VQ, Perc", "GAN, Rec, Perc")},
    ),
    "two stages": (TINY["titok"], TINY["titok-two-stage"], {"joint": ("y", "n")}),
    "titok text": (TINY["titok"], TINY["tatitok"], {"auxiliary": ("-", "TC"), "domain": ("N", "ND")}),
    "tail drop": (TINY["titok"], lambda: tiny.tiny_titok(tail_drop="uniform"), {"order": ("1D", "1D causal")}),
}


@pytest.mark.parametrize("change", sorted(CHANGED))
def test_what_the_config_decides(change: str):
    one, other, differ = CHANGED[change]
    assert changes(row(one()), row(other())) == differ


def test_what_the_config_decides_of_causal_queries():
    tokenizer = tiny.tiny_causal({"type": "B", "widths": [8, 4]})
    cells = row(tokenizer)
    assert (cells["architecture"], cells["input"], cells["order"], cells["joint"]) == ("Q/T", "F", "1D causal", "n")
    both_ways = cells_of(type(tokenizer), {**tokenizer.config, "causal": False})
    assert both_ways["order"] == "1D" and "Con" in both_ways["objective"]


def test_what_the_config_decides_of_images():
    assert cells_of(Bridge, {})["quantization"] == "PDQ" and cells_of(Bridge, {})["joint"] == "n"
    objective = cells_of(Raster2D, {"quantizer": {"type": "lfq"}})["objective"]
    assert set(objective.split(", ")) == {"GAN", "Rec", "Perc", "VQ", "Ent"}
    assert cells_of(TiTok, TITOK_L32)["joint"] == "n" and cells_of(TiTok, TATITOK_BL32)["auxiliary"] == "TC"
    after = tiny.tiny_textok((), VQ).config | {"continuous": True}  # quantized after the training, as TokenBridge
    cells = cells_of(type(tiny.tiny_textok((), VQ)), after)
    assert cells["joint"] == "n" and cells["objective"] == "GAN, Rec, Perc"
    assert cells_of(type(TINY["binary1d"]()), {"quantizer": {"type": "per_dimension"}})["quantization"] == "PDQ"


def test_a_codec_without_a_teacher_has_no_semantic_part():
    differ = {"architecture": ("CNN+T/CNN", "CNN/CNN"), "auxiliary": ("SD", "-")}
    assert changes(row(tiny.tiny_xcodec("samples")), cells_of(XCodec, {})) == differ


# ---- the survey's own rows: the columns, then streamable and Hz

SURVEY = {
    "EnCodec": "CNN+RNN/CNN|T|RVQ|F|GAN, Feat, Rec, VQ|-|y|SMA|y|75",
    "DAC": "CNN/CNN|T|RVQ|F|GAN, Feat, Rec, VQ|-|y|SMA|n|75",
    "Mimi": "CNN+T/CNN+T|T|RVQ|F|GAN, Feat, Rec, VQ|SD|y|S|y|12.5",
    "X-Codec": "CNN/CNN|T|RVQ|F|GAN, Rec, VQ|SD|y|SMA|n|50",
}
PUBLISHED: dict[str, tuple[type[Tokenizer], dict[str, Any], float]] = {
    "EnCodec": (EnCodec, ENCODEC_24KHZ, 75.0),
    "DAC": (DAC, DAC_24KHZ, 75.0),
    "Mimi": (Mimi, {}, 12.5),
    "X-Codec": (XCodec, {"semantic": {"type": "hf_config"}}, 50.0),
}
# Where the survey leaves out what the released networks have (ours must load their weights) or their code trains with.
CORRECTED = {
    "EnCodec": {"architecture": ("CNN+RNN/CNN+RNN", "CNN+RNN/CNN")},
    "X-Codec": {
        "architecture": ("CNN+T/CNN", "CNN/CNN"),
        "objective": ("GAN, Feat, Rec, VQ", "GAN, Rec, VQ"),
    },
}


@pytest.mark.parametrize("name", sorted(SURVEY))
def test_rows_of_the_survey(name: str):
    cls, config, rate = PUBLISHED[name]
    ours = cells_of(cls, config, frame_rate=rate)
    survey = dict(zip(ours, SURVEY[name].split("|"), strict=True))
    assert changes(ours, survey) == CORRECTED.get(name, {})


def test_only_the_causal_encodec_streams():
    assert changes(cells_of(EnCodec, ENCODEC_24KHZ), cells_of(EnCodec, ENCODEC_32KHZ)) == {"streamable": ("y", "n")}
    assert cells_of(EnCodec, {"shape": {"lstm_layers": 0}})["architecture"] == "CNN/CNN"


# ---- words ----


def test_every_quantizer_has_its_words():
    assert set(TAXONOMY) == set(QUANTIZERS)
    for word, losses in TAXONOMY.values():
        assert set(word.split("+")) <= set(catalogue.QUANTIZERS) and set(losses) <= set(catalogue.OBJECTIVES)
    with pytest.raises(ValueError, match="type: expected one of vq, rvq"):
        taxonomy_of({"type": "vqq"})


@pytest.mark.parametrize("kind", ["binary", "lfq", "bsq"])
@pytest.mark.parametrize("more", [{}, {"entropy_weight": 0.5}, {"entropy_weight": 0.0}, {"commitment_weight": 0.0}])
def test_binary_quantizers_name_the_losses_that_have_a_weight(kind: str, more: dict[str, float]):
    config = {"type": kind, "num_bits": 8, **more}
    built = build_quantizer({**config, "dim": 4})
    assert isinstance(built, BinaryQuantizer)
    weights = {"VQ": built.commitment_weight, "Ent": built.entropy_weight}
    assert taxonomy_of(config) == ("BQ", tuple(loss for loss, weight in weights.items() if weight > 0))


GOOD = Taxonomy("CNN+T/CNN", "T", "RVQ", "F", ("Rec",), (), True, "S", "50", streamable=True)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "CNN"},
        {"architecture": "CNN/GNN"},
        {"input": "X"},
        {"quantization": "RVQ+"},
        {"bitrate": "V"},
        {"objective": ("rec",)},
        {"auxiliary": ("SD", "X")},
        {"domain": "X"},
        {"domain": ""},
        {"rate": ""},
        {"streamable": None},
        {"order": "1D"},
        {"streamable": None, "order": "3D"},
    ],
    ids=str,
)
def test_words_that_are_in_no_set_are_refused(change: dict[str, Any]):
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(GOOD, **change)


def test_the_legend_explains_every_word():
    sets = (
        catalogue.ARCHITECTURES,
        catalogue.INPUTS,
        catalogue.QUANTIZERS,
        catalogue.OBJECTIVES,
        catalogue.AUXILIARIES,
    )
    words = {w.strip(",;:()") for w in catalogue.LEGEND.split()}
    assert not {w for words_of in sets for w in words_of} - words
    assert [line.split()[0] for line in catalogue.LEGEND.splitlines() if line[0] != " "] == [
        *COLUMNS,
        "streamable",
        "order",
    ]


# ---- families ----


@pytest.mark.parametrize("name", sorted(auto.families()))
def test_families_fill_every_column(name: str):
    entry = auto.family(name)
    assert isinstance(entry, Family) and entry.name == name and entry.modality in ("image", "audio")
    assert entry.example.partition(":")[0] == name and entry.example.partition(":")[2]
    card = mmtok.card(name)
    check_cells(card["taxonomy"], entry.modality)
    for key in ("title", "source", "package", "install"):
        assert card[key].strip()
    assert f"`{name}:" in (ROOT / "README.md").read_text(), "README names every family"
    assert all(text.strip() for text in card["licences"].values()) and set(card["licences"]) == {"code", "weights"}
    json.dumps(card)


def open_tiny(source: str) -> Tokenizer:
    tokenizer = tiny.tiny_codec(True).eval()
    tokenizer.name = f"tiny:{source}"
    if source == "with-a-card":
        tokenizer.licences = {"code": "MIT", "weights": "CC0-1.0 (model card)"}
    return tokenizer


@pytest.fixture
def tiny_family(monkeypatch: pytest.MonkeyPatch) -> Family:
    words = ("tiny", "a codec of these tests", "audio", "any word", "tiny:x", "pytest", "pip install pytest")
    entry = Family(*words, "MIT", "CC-BY-4.0", GOOD, open_tiny)
    module = ModuleType("tiny_family")
    module.FAMILY = entry  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "tiny_family", module)
    monkeypatch.setitem(auto.FAMILIES, "tiny", "tiny_family:FAMILY")
    return entry


def test_the_card_of_a_family(tiny_family: Family):
    card = mmtok.card("tiny")
    assert card["family"] is True and card["installed"] == pytest.__version__ and card["source"] == "any word"
    assert card["licences"] == {"code": "MIT", "weights": "CC-BY-4.0"} and card["taxonomy"] == GOOD.cells()


def test_a_folder_of_a_family_s_name_is_a_folder(tiny_family: Family, saved: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(saved, saved.parent / "tiny")
    monkeypatch.chdir(saved.parent)
    assert mmtok.card("tiny")["type"] == "codec" == mmtok.load("tiny").type_name


def test_the_card_of_a_tokenizer_of_a_family(tiny_family: Family):
    card = mmtok.card("tiny:x")
    assert card["name"] == "tiny:x" and card["of_family"] == "tiny" and card["codebook_sizes"] == [16] * 3
    assert card["frame_rate"] == 50 and card["bitrate_bps"] == 600 and card["installed"] == pytest.__version__
    assert card["licences"] == {"code": "MIT", "weights": "CC-BY-4.0"}  # the family's, where the tokenizer has none
    assert card["timing"]["streams"] and card["taxonomy"] == GOOD.cells()
    assert mmtok.card("tiny:with-a-card")["licences"]["weights"] == "CC0-1.0 (model card)"
    json.dumps(card)


def test_what_is_installed_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert auto.installed_version("pytest") == pytest.__version__
    assert auto.installed_version("PIL") == auto.installed_version("pillow") is not None  # module and distribution
    assert auto.installed_version("colorsys") == "yes"  # a module of Python itself
    assert "colorsys" not in sys.modules
    assert auto.installed_version("sh") == "yes"  # a program
    for absent in ("no-such-package", "no_such_module", "no.such", ""):
        assert auto.installed_version(absent) is None
