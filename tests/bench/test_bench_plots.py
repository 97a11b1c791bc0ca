"""Rate-distortion plots: what is drawn where, and that it can be read on white and on dark."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from synthetic_runs import psnr_run, result, spread, write_run

from mmtok.bench.plots import COLOURS, INK, curves, family, file_bytes, plottable, rate_distortion, write_plots
from mmtok.bench.records import Result

pytest.importorskip("matplotlib")


def pair(contender: str, bits: float, value: float | None, metric: str = "bpp", **more) -> list[Result]:
    unit = {"bpp": "bit/pixel", "bitrate_bps": "bit/s"}[metric]
    rate = result(contender, metric, bits, unit=unit, direction="lower", test_set=more.get("test_set", "photos"))
    ends = {} if value is None else {"low": value - 1, "high": value + 2}
    return [rate, result(contender, value=value, **ends, **more)]


@pytest.fixture
def results() -> list[Result]:
    found = [*pair("a#levels=4", 1.0, 25.0), *pair("a#levels=2", 0.5, 22.0), *pair("a", 2.0, 27.0)]
    return [*found, *pair("jpeg#bytes=512", 1.5, 24.0), *pair("jpeg#bytes=128", 0.4, 19.0), *pair("_x$y", 1.0, 21.0)]


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("a#levels=2", "a"),
        ("a", "a"),
        ("a#levels=2&text", "a#text"),
        ("a#text&tokens=8", "a#text"),
        ("jpeg#bytes=512", "jpeg"),
        ("opus:6000", "opus"),
        ("mp3:32k", "mp3"),
        ("dac:/models/16khz#raw", "dac:/models/16khz#raw"),
        ("runs/x/tokenizer#levels=3", "runs/x/tokenizer"),
    ],
)
def test_a_family_is_a_label_without_its_rate(label, name):
    assert family(label) == name


def test_curves_join_the_rates_of_a_family_in_order(results):
    axis, lines = curves(results, "psnr", "photos")
    assert axis == "bpp" and list(lines) == ["_x$y", "a", "jpeg"]
    assert [(p.rate, p.value, p.low, p.high) for p in lines["a"]] == [
        (0.5, 22, 21, 24),
        (1.0, 25, 24, 27),
        (2.0, 27, 26, 29),
    ]
    sound = [*pair("a", 4000.0, 1.0, "bitrate_bps"), *pair("b", 1000.0, None, "bitrate_bps", not_run="no package")]
    axis, lines = curves(sound, "psnr", "photos")
    assert axis == "bitrate_bps" and lines["a"][0].rate == 4.0 and "b" not in lines  # kbit/s
    with pytest.raises(ValueError, match="no contender has it and a rate"):
        curves(results, "psnr", "elsewhere")


def test_the_figure_shows_points_bands_and_names(results):
    figure = rate_distortion(results, "psnr", "photos")
    (axes,) = figure.axes
    single, line, jpeg = axes.get_lines()
    assert np.array_equal(line.get_xydata(), [[0.5, 22], [1, 25], [2, 27]])
    assert len(single.get_xydata()) == 1 and len(jpeg.get_xydata()) == 2
    band = axes.collections[1].get_paths()[0].vertices  # of the second family; the first has a bar
    assert {(1.0, 24.0), (1.0, 27.0), (2.0, 29.0)} <= {tuple(v) for v in band.tolist()}
    bar = axes.collections[0].get_paths()[0].vertices
    assert bar.tolist() == [[1.0, 20.0], [1.0, 23.0]]
    assert [t.get_text().strip("\u200b") for t in axes.get_legend().get_texts()] == ["_x$y", "a", "jpeg"]
    assert axes.get_xlabel() == "bits per pixel" and axes.get_ylabel() == "PSNR (dB), higher is better"
    assert len({(x.get_color(), x.get_marker()) for x in axes.get_lines()}) == 3


def test_rates_far_apart_stand_on_a_logarithmic_axis(results):
    assert rate_distortion(results, "psnr", "photos").axes[0].get_xscale() == "linear"
    wide = [*results, *pair("wide", 24.0, 40.0)]
    assert rate_distortion(wide, "psnr", "photos").axes[0].get_xscale() == "log"


def test_the_originals_are_a_line_to_compare_with(results):
    figure = rate_distortion([*results, result("original", value=30.0)], "psnr", "photos")
    last = figure.axes[0].get_lines()[-1]
    assert set(last.get_ydata()) == {30.0} and last.get_label() == "the originals"


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_every_colour_can_be_seen_on_white_and_on_dark(page):
    assert contrast(INK, page) >= 4
    assert min(contrast(colour, page) for colour in COLOURS) >= 3
    assert len(set(COLOURS)) == len(COLOURS)


def test_files_are_the_same_each_time_and_need_no_pyplot(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would raise
    figures = [rate_distortion(results, "psnr", "photos") for _ in range(2)]
    svg = [file_bytes(f, "svg") for f in figures]
    assert svg[0] == svg[1] and file_bytes(figures[0], "png")[:8] == b"\x89PNG\r\n\x1a\n"
    tree = ElementTree.fromstring(svg[0])
    texts = ["".join(t.itertext()).strip("\u200b") for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"_x$y", "a", "jpeg", "bits per pixel"} <= set(texts)  # text stays text
    assert figures[0].get_facecolor()[3] == 0 == figures[0].axes[0].get_facecolor()[3]  # transparent


def test_write_plots_writes_each_measure_of_sets_with_two_rates(tmp_path):
    bits = {"a#levels=2": 512.0, "a#levels=4": 1024.0}
    run = psnr_run(tmp_path / "run", {name: spread(20 + b / 512) for name, b in bits.items()}, bits=bits)
    assert [p.relative_to(run).as_posix() for p in write_plots(run)] == [
        "plots/photos-psnr.svg",
        "plots/photos-psnr.png",
    ]
    assert all(p.stat().st_size > 1000 for p in write_plots(run))


def test_one_rate_is_nothing_to_plot(tmp_path):
    run = write_run(tmp_path / "run", [*pair("a", 1.0, 20.0), *pair("b", 1.0, 21.0)])
    assert write_plots(run) == [] and not (run / "plots").exists()
    assert plottable([*pair("a", 1.0, 20.0), *pair("b", 2.0, 21.0)]) == {"photos": ["psnr"]}
    with pytest.raises(FileNotFoundError, match="no results there"):
        write_plots(tmp_path)


def test_without_matplotlib_the_extra_is_named(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'mmtok\[bench\]'"):
        rate_distortion(results, "psnr", "photos")
