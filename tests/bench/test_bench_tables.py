"""Tables of results: what stands in which cell, in Markdown, LaTeX, CSV and on a terminal."""

from __future__ import annotations

import csv
import io
import math
import re

import pytest
from synthetic_runs import SET, result

from mmtok.bench import tables
from mmtok.bench.records import Result
from mmtok.bench.tables import cell_text, escape_latex, make_tables, number, render, to_latex, to_markdown, to_text


def rate(contender: str, bits: float, **more) -> Result:
    return result(contender, "bpp", bits, unit="bit/pixel", direction="lower", **more)


@pytest.fixture
def results() -> list[Result]:
    lower = {"unit": "1", "direction": "lower"}
    return [
        result("b", value=30.0, low=29.0, high=31.0),
        rate("b", 2.0),
        result("a_1", value=20.0, low=19.5, high=20.25),
        rate("a_1", 0.5),
        result("c", value=25.0, low=24.0, high=26.0),
        rate("c", 1.0),
        result("a_1", "wer", 0.25, low=0.2, high=0.3, **lower),
        result("b", "wer", 0.125, low=0.1, high=0.15, **lower),
        result("c", "wer", None, not_run="no recogniser; pip install it", **lower),
        result("original", "wer", 0.0625, low=0.05, high=0.08, **lower),
        result("a_1", value=1.0, test_set="other"),
        result("a_1", "usage[0]", 0.5, part="tokens", unit="1"),
    ]


def test_rows_by_bits_columns_as_wanted_and_the_originals_last(results):
    (table,) = make_tables(results, sets=["photos"])
    assert list(table.contenders) == ["a_1", "c", "b", "original"]
    assert [c.metric for c in table.columns] == ["bpp", "psnr", "wer"]  # the rate first
    (table,) = make_tables(results, ["wer", "psnr"], ["photos"])
    assert [c.metric for c in table.columns] == ["wer", "psnr"]
    assert [t.test_set for t in make_tables(results)] == ["other", "photos"]
    assert [t.test_set for t in make_tables(results, part="tokens")] == ["photos"]


def test_best_by_direction_never_a_rate_or_the_original(results):
    (table,) = make_tables(results, sets=["photos"])
    assert {(table.contenders[i], table.columns[j].metric) for i, j in table.best} == {("b", "psnr"), ("b", "wer")}
    alone = make_tables([result("a"), rate("a", 1.0)])[0]
    assert not alone.best  # nothing to be better than
    tied = make_tables([result("a"), result("b"), result("c", value=1.0)])[0]
    assert {tied.contenders[i] for i, _ in tied.best} == {"a", "b"}
    assert not make_tables([result("a"), result("b")])[0].best


def test_markdown_as_a_whole(results):
    assert (
        to_markdown(make_tables(results, sets=["photos"])[0])
        == """\
| photos | bpp | PSNR (dB) ↑ | WER ↓ |
| --- | --- | --- | --- |
| a_1 | 0.500 | 20.00 [19.50, 20.25] | 0.250 [0.200, 0.300] |
| c | 1.000 | 25.00 [24.00, 26.00] | not run |
| b | 2.000 | **30.00** [29.00, 31.00] | **0.125** [0.100, 0.150] |
| original | - | - | 0.062 [0.050, 0.080] |

WER of c not run: no recogniser; pip install it"""
    )


def test_markdown_keeps_its_columns_whatever_the_names():
    text = to_markdown(make_tables([result("a|b\nc"), result("d", value=None, not_run="x | y")])[0])
    rows = text.split("\n\n")[0].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {3}
    assert r"a\|b c" in text and r"x \| y" in text


def test_numbers_of_another_protocol_are_marked_and_not_best():
    other = {**SET, "resampler": "soxr"}
    table = make_tables([result("a"), result("b", value=21.0), result("c", value=99.0, protocol=other)])[0]
    assert {table.contenders[i] for i, _ in table.best} == {"b"}
    assert {table.contenders[i] for i, _ in table.odd} == {"c"}
    assert table.notes == ["† PSNR of c, not comparable: resampler soxr instead of none"]
    assert "99†" in to_markdown(table) and r"99$^\dagger$" in to_latex(table) and "99†" in to_text(table)


def test_contenders_differ_in_their_own_fields_and_stay_comparable():
    fields = [{"tokenizer": n, "fingerprint": n, "num_codebooks": i, "codebook_sizes": [i]} for i, n in enumerate("ab")]
    assert not make_tables([result(f["tokenizer"], protocol={**SET, **f}) for f in fields])[0].odd
    tokens = [result(n, "pmi", part="tokens", protocol={**SET, "pairs": n}) for n in "ab"]
    assert not make_tables(tokens, part="tokens")[0].odd


def test_notes_name_left_out_items():
    counted = {**SET, "unscored": {"silent": 3, "too short": 1}, "exact": 2}
    table = make_tables([result("a", protocol=counted), result("b", value=math.inf, protocol={**SET, "exact": 5})])[0]
    assert table.notes == [
        "PSNR of a: items without a value, in no mean: silent (3); too short (1)",
        "PSNR of a: 2 items are exact (infinite), in no mean",
    ]
    assert "| b | **inf** |" in to_markdown(table)


def test_a_reason_that_all_share_is_said_once():
    table = make_tables([result(n, value=None, not_run="no package") for n in "abc"])[0]
    assert table.notes == ["PSNR not run: no package"]
    two = [result(n, m, None, not_run="{no} package") for n in "ab" for m in ("psnr", "ssim")]
    assert make_tables([*two, result("c")])[0].notes == ["PSNR, SSIM of a, b not run: {no} package"]
    assert make_tables(two)[0].notes == ["PSNR, SSIM not run: {no} package"]


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (12.345, 12.0, 12.7, "12.35 [12.00, 12.70]"),
        (0.91234, 0.905, 0.919, "0.912 [0.905, 0.919]"),
        (1234.5, 1100.0, 1300.0, "1234 [1100, 1300]"),
        (-0.001, -0.5, 0.5, "0.0 [-0.5, 0.5]"),
        (5.0, 5.0, 5.0, "5"),
        (math.inf, None, None, "inf"),
    ],
)
def test_digits_follow_the_interval(value, low, high, text):
    unit = "dB" if value == 12.345 else "1"
    (table,) = make_tables([result("a", "m", value, low=low, high=high, unit=unit)])
    assert cell_text(table.cells[0][0], table.columns[0].digits) == text
    assert cell_text(None, 2) == "-" and number(-0.0, 2) == "0.00"


AWKWARD = "a_b#levels=2&text 50 % $x$ {y} ~ ^ \\ <z> | [1] opus:6000"


def unescaped(latex: str) -> str:
    """What LaTeX prints, for the commands that `escape_latex` uses."""
    named = {"backslash": "\\", "asciitilde": "~", "asciicircum": "^", "less": "<", "greater": ">", "bar": "|"}
    text = re.sub(r"\\text(\w+)\{\}", lambda m: "\0" + named[m[1]], latex)
    text = text.replace("{[}", "[").replace("{]}", "]")
    return re.sub(r"\\([{}&%$#_])", r"\1", text).replace("\0", "")


def test_latex_text_is_what_was_written():
    assert unescaped(escape_latex(AWKWARD)) == AWKWARD
    bare = re.sub(r"\\[{}&%$#_]|\\text\w+\{\}|\{[\[\]]\}", "", escape_latex(AWKWARD))
    assert not set(bare) & set("&%$#_{}~^\\<>|[]")


def test_latex_is_whole(results):
    awkward = result(AWKWARD, value=-3.0, low=-4.0, high=-2.0)
    text = to_latex(make_tables([*results, awkward], sets=["photos"])[0])
    stripped = re.sub(r"\\[{}&%$#_\\]", "", text)
    depth = 0
    for c in stripped:
        depth += (c == "{") - (c == "}")
        assert depth >= 0
    assert depth == 0 and stripped.count("$") % 2 == 0
    opened, closed = re.findall(r"\\begin\{(\w+)\}", text), re.findall(r"\\end\{(\w+)\}", text)
    assert opened == ["table", "tabular"] == closed[::-1]
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0].replace(r"\midrule", "")
    rows = [row for row in body.split("\\\\\n") if row.strip()]
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", text)
    assert columns is not None and columns[1] == "lrrr"
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {3} and len(rows) == 6
    assert r"\textbf{30.00} {\scriptsize {[}29.00, 31.00{]}}" in text and "not run" in text
    assert r"$-$3.00" in text and r"PSNR (dB) $\uparrow$" in text and r"WER $\downarrow$" in text
    assert r"\label{tab:reconstruction-photos}" in text


def test_csv_has_one_line_a_number(results):
    rows = list(csv.DictReader(io.StringIO(render(make_tables(results), "csv"))))
    assert len(rows) == 11  # all of the part
    best = next(r for r in rows if (r["contender"], r["metric"]) == ("b", "psnr"))
    assert (best["value"], best["low"], best["unit"], best["direction"]) == ("30.0", "29.0", "dB", "higher")
    gone = next(r for r in rows if r["not_run"])
    assert (gone["value"], gone["low"], gone["not_run"]) == ("", "", "no recogniser; pip install it")


def test_text_turns_round_where_it_is_too_wide(results):
    results = [*results, result("a_1", "gone", value=None, not_run="no package")]
    (table,) = make_tables(results, sets=["photos"])
    across, down = to_text(table, 100), to_text(table, 30)
    assert across.splitlines()[3].split() == ["b", "2.000", "30.00*", "0.125*"]
    assert down.splitlines()[0].split() == ["photos", "a_1", "c", "b", "original"]
    assert down.splitlines()[2].split() == ["PSNR", "(dB)", "↑", "20.00", "25.00", "30.00*", "-"]
    assert len({len(line) for line in across.splitlines()}) == len({len(line) for line in down.splitlines()}) == 1
    assert "gone" not in across + down  # it is among the notes
    assert "gone of a_1 not run: no package" in table.notes


def test_unknown_names_are_refused_with_what_there_is(results):
    with pytest.raises(ValueError, match=r"measure: expected of \[.*'psnr'.*\], got 'pnsr'"):
        make_tables(results, ["pnsr"])
    with pytest.raises(ValueError, match=r"set: expected of \['photos', 'other'\], got 'x'"):
        make_tables(results, sets=["x"])
    with pytest.raises(ValueError, match="no results of the part probes"):
        make_tables(results, part="probes")
    with pytest.raises(ValueError, match="format: expected one of"):
        render([], "html")


def test_the_recipes_find_their_helpers_where_they_were():
    assert tables.markdown_table(["a", "b"], [[1, 2]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert tables.interval_text({"mean": 1.0, "low": 0.5, "high": 1.5}, 2) == "1.00 [0.50, 1.50]"
    assert tables.interval_text({}, 2) == "-"
    assert tables.replace_block("x<!-- n -->old<!-- /n -->y", "n", "new") == "x<!-- n -->\nnew\n<!-- /n -->y"
    with pytest.raises(ValueError, match="expected the marks"):
        tables.replace_block("x", "n", "new")
