"""The HTML report: self-contained, escaped, and true to the arrays it is given."""

from __future__ import annotations

import base64
import io
import wave
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmtok.bench import report

RNG = np.random.default_rng(0)
PHOTO = RNG.random((3, 20, 30))
SOUND = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(8000) / 16000)[None]
NASTY = '<script>alert("x")</script> & http'


class Page(HTMLParser):
    """Start tags with their attributes, and the text outside of the style sheet."""

    VOID = frozenset(("meta", "img", "input", "br"))

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def sources(self, tag: str) -> list[bytes]:
        urls = [attributes["src"] or "" for name, attributes in self.tags if name == tag]
        return [base64.b64decode(url.split(",", 1)[1], validate=True) for url in urls]


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_page_of_every_section_is_well_formed_escaped_and_loads_nothing(tmp_path: Path):
    sections = [
        report.TableSection(NASTY, [(NASTY, "2")], header=("a", NASTY), note=NASTY),
        report.ImageSection(NASTY, PHOTO, PHOTO * 0.5, note=NASTY),
        report.AudioSection(NASTY, SOUND, SOUND * 0.5, 16000, note=NASTY),
        report.CodesSection(NASTY, RNG.integers(0, 16, (2, 12)), (16, 16), note=NASTY),
        report.IdsSection(
            NASTY, [report.IdSegment("text", NASTY, [1, 2]), report.IdSegment("?", "m", [3])], note=NASTY
        ),
    ]
    path = tmp_path / "report.html"
    report.write_report(path, NASTY, sections)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    names = [name for name, _ in page.tags]
    assert (names.count("img"), names.count("audio"), names.count("section")) == (6, 2, 5)
    assert "script" not in names and "link" not in names
    for _, attributes in page.tags:
        assert not attributes.keys() & {"href", "srcset", "onclick", "onload", "action"}
        assert attributes.get("src", "data:").startswith("data:")
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert page.text.count(NASTY) >= 11
    assert "prefers-color-scheme:dark" in text
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_pictures_are_the_pixels_and_the_difference_is_amplified():
    reconstruction = np.clip(PHOTO - 0.1, 0, 1)
    page = Page(report.render("t", [report.ImageSection("i", PHOTO, reconstruction, gain=4)]))
    original, decoded, difference = (picture(data) for data in page.sources("img"))
    np.testing.assert_array_equal(original, report.pixels(PHOTO))
    np.testing.assert_array_equal(decoded, report.pixels(reconstruction))
    expected = 4 * np.abs(original.astype(int) - decoded.astype(int))
    np.testing.assert_array_equal(difference, np.minimum(expected, 255))
    sizes = [(a["width"], a["height"]) for name, a in page.tags if name == "img"]
    assert sizes == [("30", "20")] * 3


@pytest.mark.parametrize(("channels", "shown"), [(1, 3), (3, 3), (4, 4)])
def test_grey_rgb_and_rgba_are_shown(channels: int, shown: int):
    x = RNG.random((channels, 5, 7))
    assert report.pixels(x).shape == (5, 7, shown)
    assert len(Page(report.render("t", [report.ImageSection("i", x, x)])).sources("img")) == 3


def test_a_large_picture_is_shown_smaller_and_says_so():
    x = np.zeros((1, 8, 2048))
    page = Page(report.render("t", [report.ImageSection("i", x, x)]))
    assert picture(page.sources("img")[0]).shape == (4, 1024, 3)
    assert "50%" in page.text and "2048 x 8 px" in page.text


def test_a_long_sound_is_cut_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "MAX_SECONDS", 0.25)
    page = Page(report.render("t", [report.AudioSection("a", SOUND, SOUND, 16000)]))
    with wave.open(io.BytesIO(page.sources("audio")[0])) as f:
        assert f.getnframes() == 4000
    assert "The first 0.25 of 0.5 s" in page.text


def test_players_hold_the_samples_of_every_channel():
    stereo = np.concatenate([SOUND, -2 * SOUND])
    page = Page(report.render("t", [report.AudioSection("a", stereo, stereo, 16000)]))
    with wave.open(io.BytesIO(page.sources("audio")[1])) as f:
        assert (f.getnchannels(), f.getframerate(), f.getsampwidth(), f.getnframes()) == (2, 16000, 2, 8000)
        samples = np.frombuffer(f.readframes(8000), "<i2").reshape(-1, 2)
    np.testing.assert_allclose(samples[:, 0] / 32767, SOUND[0], atol=1e-4)
    np.testing.assert_allclose(samples[:, 1] / 32767, -np.clip(2 * SOUND[0], -1, 1), atol=1e-4)


def test_versions_of_a_sound_have_a_player_and_a_name_each():
    sounds = [("original", SOUND), ("<b>4 kbit/s", 0.5 * SOUND), ("2 kbit/s", 0.1 * SOUND)]
    page = Page(report.render("t", [report.SoundsSection("s", sounds, 16000)]))
    labels = [attributes["aria-label"] for name, attributes in page.tags if name == "audio"]
    assert labels == [name for name, _ in sounds] and page.open == []
    for data, (_, x) in zip(page.sources("audio"), sounds, strict=True):
        with wave.open(io.BytesIO(data)) as f:
            samples = np.frombuffer(f.readframes(8000), "<i2") / 32767
        np.testing.assert_allclose(samples, x[0], atol=1e-4)


def test_the_spectrogram_of_a_tone_peaks_at_its_frequency():
    spectrum = report.log_spectrogram(SOUND)
    middle = spectrum[:, spectrum.shape[1] // 2]
    assert middle.argmax() == 1000 * 512 // 16000
    assert middle.max() - np.median(middle) > 60
    bottom_up = report.heat(np.linspace(0, 1, 5)[:, None])
    assert tuple(bottom_up[-1, 0]) == report.HEAT[0] and tuple(bottom_up[0, 0]) == report.HEAT[-1]


@pytest.mark.parametrize("samples", [1, 100, 512])
def test_the_shortest_sounds_have_a_spectrogram(samples: int):
    assert report.log_spectrogram(np.ones((1, samples))).shape[1] >= 1


def test_the_token_map_has_a_colour_per_code():
    codes = np.array([[0, 1, 2, 1], [5, 5, 0, 7]])
    page = Page(report.render("t", [report.CodesSection("c", codes, (8, 8))]))
    rows = picture(page.sources("img")[0])
    cell = rows.shape[0] // 2
    colours = rows[::cell]
    assert colours.shape == (2, 4, 3)
    for a in np.ndindex(2, 4):
        for b in np.ndindex(2, 4):
            assert (codes[a] == codes[b]) == bool((colours[a] == colours[b]).all())
    assert len({tuple(c) for c in report.code_colours(np.arange(256)[None])[0]}) > 240


def test_usage_counts_codes_and_perplexity_is_that_of_their_frequencies():
    assert report.usage(np.arange(16)) == (16, pytest.approx(16))
    assert report.usage(np.zeros(9, int)) == (1, pytest.approx(1))
    page = Page(report.render("t", [report.CodesSection("c", np.array([[0, 1, 0, 1]]), (1024,))]))
    assert "2 of 1024 codes (at most 4 in 4 positions), perplexity 2.0" in page.text
    assert any("width:50.0%" in (a.get("style") or "") for _, a in page.tags)


def test_the_ids_are_headed_and_the_rest_is_counted():
    section = report.IdsSection("i", [report.IdSegment("image", "codes", range(100, 150))], head=3)
    page = Page(report.render("t", [section]))
    assert "codes 100 101 102 and 47 more" in page.text
    assert any(a.get("class") == "ids image" for _, a in page.tags)


@pytest.mark.parametrize(
    "section",
    [
        report.TableSection("wrong", [("a",), ("a", "b")]),
        report.ImageSection("wrong", PHOTO, PHOTO[:, 1:]),
        report.ImageSection("wrong", PHOTO[0], PHOTO[0]),
        report.AudioSection("wrong", SOUND, SOUND[:, 1:], 16000),
        report.AudioSection("wrong", SOUND[0], SOUND[0], 16000),
        report.SoundsSection("wrong", [("a", SOUND), ("b", SOUND[:, 1:])], 16000),
        report.CodesSection("wrong", np.zeros((2, 3), int), (4,)),
    ],
)
def test_wrong_shapes_say_what_was_expected(section: report.Section):
    with pytest.raises(ValueError, match="expected"):
        report.render("t", [section])


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report.write_report(tmp_path / "no" / "r.html", "t", [])
