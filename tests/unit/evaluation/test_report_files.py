from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_worlds import UGLY, interval, png, report, results, verdict

from evaluation.report import Column, Figure, Section, Table, write_report
from evaluation.report.content import slug
from evaluation.report.display import MINUS, MISSING, asked, fact, number, observed, sentence
from evaluation.verdict import Criterion, Decision

VOID = {"meta", "img", "line", "circle", "br", "wbr"}
ATTACK = '"><script>alert(1)</script><img src=x onerror=alert(1)>|`*](http://evil)&amp;'


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and the stored values and texts of each table by its id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[str]] = {}
        self.text = ""
        self._open: list[str] = []
        self._table = ""
        self.feed(text)
        self.close()
        assert self._open == [], "a tag is not closed"

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self.tags.append((tag, values))
        if tag == "figure":
            self._table = values["id"]
        if tag == "data":
            self.tables.setdefault(self._table, []).append(values["value"])
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data

    def find(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_page_json_and_csv_hold_the_same_values_to_the_last_digit(tmp_path):
    files = write_report(report(), tmp_path)
    stored = json.loads(files.json.read_text())["results"]
    with files.csv["Results"].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert stored["rows"][0] == {
        "policy": "b + planner",
        "Sharpe (annualised)": 0.30000000000000004,
        "Sharpe low (annualised)": -0.05,
        "Sharpe high (annualised)": 1.25,
        "drawdown (share)": 0.0712345,
        "seeds": 5,
        "safe": True,
    }
    as_text = [
        {
            name: "" if value is None else value if isinstance(value, str) else json.dumps(value)
            for name, value in row.items()
        }
        for row in stored["rows"]
    ]
    assert rows == as_text
    in_page = [value for row in as_text for name, value in row.items() if name not in ("policy", "safe") and value]
    assert [value for value in page(tmp_path).tables["table-results"] if value] == in_page
    assert stored["columns"][1] == {
        "label": "Sharpe",
        "unit": "annualised",
        "fields": ["Sharpe (annualised)", "Sharpe low (annualised)", "Sharpe high (annualised)"],
    }


def test_the_page_shows_the_values_rounded_and_the_missing_as_a_dash(tmp_path):
    write_report(report(), tmp_path)
    text = re.sub(r"\s+", " ", page(tmp_path).text)
    assert f"b + planner +0.30 {MINUS}0.05 to +1.25 7.1% 5 yes" in text
    assert f"a +0.00 {MINUS}0.20 to {MISSING} {MISSING} 1,234,567 no" in text
    assert f"flat {MISSING} {MISSING} ∞ yes" in text


def test_nan_and_none_are_null_and_infinity_is_text(tmp_path):
    files = write_report(report(), tmp_path)
    _, a, flat = json.loads(files.json.read_text())["results"]["rows"]
    assert (a["Sharpe high (annualised)"], a["drawdown (share)"]) == (None, None)
    assert [flat[name] for name in list(flat)[1:]] == [None, None, None, None, "Infinity", True]
    assert files.csv["Results"].read_text().splitlines()[3] == "flat,,,,,Infinity,true"


@pytest.mark.parametrize(
    ("value", "spec", "shown"),
    [
        (0.12345, "", "0.123"),
        (3.0, "", "3"),
        (25_200_000, "", "25,200,000"),
        (5000, ",", "5,000"),
        (5, ".1f", "5.0"),
        (-0.5, "+.2f", MINUS + "0.50"),
        (-0.001, ".2f", "0.00"),
        (-0.001, "+.2f", "+0.00"),
        (-0.0, "", "0"),
        (0.0712, ".1%", "7.1%"),
        (math.nan, ".2f", MISSING),
        (None, "", MISSING),
        (-math.inf, ".2f", MINUS + "∞"),
    ],
)
def test_numbers_are_shown_as_people_write_them(value, spec, shown):
    assert number(value, spec) == shown


def test_facts_keep_seeds_in_one_piece():
    assert fact((20260001, 20260002)) == "20260001, 20260002"
    assert fact({"numpy": "2.0", "gpu": False, "share": 0.25}) == "numpy 2.0, gpu no, share 0.25"
    assert fact(()) == MISSING


def test_an_empty_table_has_a_header_and_says_so(tmp_path):
    empty = Table("Nothing", (Column("policy"), Column("Sharpe", interval=True)), ())
    files = write_report(report(results=empty), tmp_path)
    assert files.csv["Nothing"].read_text() == "policy,Sharpe,Sharpe low,Sharpe high\n"
    assert json.loads(files.json.read_text())["results"]["rows"] == []
    assert "No rows." in page(tmp_path).text
    assert "No rows." in files.summary.read_text()


def test_markup_in_any_text_is_shown_and_not_obeyed(tmp_path):
    criteria = [
        dataclasses.replace(criterion, reason=ATTACK, settled_by="x" + ATTACK) for criterion in verdict().criteria
    ]
    attacked = report(
        title=ATTACK,
        subtitle=ATTACK,
        verdict=dataclasses.replace(
            verdict(headline=ATTACK),
            next_step=ATTACK,
            criteria=tuple(criteria),
        ),
        results=dataclasses.replace(results(policy=ATTACK), note=ATTACK),
        sections=(
            Section(
                ATTACK,
                (ATTACK,),
                (Table("t" + ATTACK, (Column(ATTACK, ATTACK),), ((ATTACK,),), ATTACK),),
                (Figure("f" + ATTACK, png(), ATTACK, ATTACK),),
            ),
        ),
        not_shown=(ATTACK,),
        reproduce=(ATTACK,),
        facts={ATTACK: ATTACK},
        caveats=(ATTACK,),
        glossary={ATTACK: ATTACK},
    )
    files = write_report(attacked, tmp_path)
    seen = page(tmp_path)
    assert not seen.find("script")
    assert [image["alt"] for image in seen.find("img")] == [ATTACK]
    assert not [name for _, attributes in seen.tags for name in attributes if name.startswith("on")]
    assert seen.text.count("<script>alert(1)</script>") >= 20
    summary = files.summary.read_text()
    assert "<script" not in re.sub(r"(?m)^    .*$", "", summary)
    assert "](http" not in re.sub(r"(?m)^    .*$", "", summary)
    # What machines read is what was said.
    assert json.loads(files.json.read_text())["results"]["rows"][0]["policy"] == ATTACK
    with files.csv["Results"].open(newline="") as file:
        assert next(csv.DictReader(file))["policy"] == ATTACK


def test_every_row_of_a_markdown_table_has_the_same_cells(tmp_path):
    text = write_report(report(results=results(policy="a|b\nc`d")), tmp_path).summary.read_text()
    grids = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert [len(grid) for grid in grids] == [5, 5]
    for grid in grids:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in grid}) == 1
    assert rf"| a\|b c\`d | +0.30 ({MINUS}0.05 to +1.25) | 7.1% | 5 | yes |" in text


def test_the_page_needs_nothing_but_itself(tmp_path):
    write_report(report(), tmp_path)
    seen = page(tmp_path)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in seen.tags}
    assert all(image["src"].startswith("data:image/png;base64,") for image in seen.find("img"))
    identities = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    targets = [link["href"] for link in seen.find("a")]
    assert len(targets) == 7
    assert {target.removeprefix("#") for target in targets} <= set(identities)
    style = re.search(r"<style>(.*)</style>", (tmp_path / "report.html").read_text(), re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    (policy,) = (meta["content"] for meta in seen.find("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_images_have_words_and_a_size(tmp_path):
    write_report(report(), tmp_path)
    (image,) = page(tmp_path).find("img")
    assert (image["alt"], image["width"], image["height"]) == ("Two lines that rise.", "400", "300")


@pytest.mark.parametrize("decision", list(Decision))
def test_the_verdict_comes_first_with_words_for_every_answer(tmp_path, decision):
    write_report(report(verdict=verdict(decision), caveats=("Smoke run.",)), tmp_path)
    text = re.sub(r"\s+", " ", page(tmp_path).text)
    order = [
        f"{decision} ⚠ Smoke run. b replaces a; Sharpe higher by 0.12.",
        "Next step. Keep a for now.",
        "✓ Sharpe gain, point estimate met estimate +0.300 per year, asked for at least +0.100 per year "
        "Gain 0.30 of 0.10.",
        "✗ Full gain established (reported, decides nothing) not met lower end of the gain +0.030 per year, "
        "at least +0.020 per year "
        f"Not established, short by {MINUS}3\N{NO-BREAK SPACE}%.",
        f"? Decides in time cannot be decided upper bound on p99 {MISSING}, allowed up to 50 ms "
        "Decision time was not measured. To settle it: Measure the decision time.",
        "Main result",
        "Per fold",
        "What was not shown",
        "How to reproduce",
        "Facts",
    ]
    # The contents name the headings once before; the criteria must not be hidden behind them.
    places = [text.rindex(re.sub(r"\s+", " ", part)) for part in order]
    assert places == sorted(places)
    assert f'class="verdict {slug(decision)}"' in (tmp_path / "report.html").read_text()


def test_the_summary_starts_with_the_recommendation_and_names_every_part(tmp_path):
    said = report(caveats=("Smoke run: its numbers mean nothing.",))
    lines = write_report(said, tmp_path).summary.read_text().splitlines()
    assert lines[4] == "**Smoke run: its numbers mean nothing.**"
    assert lines[6] == "**Recommendation: CONDITIONAL.** b replaces a; Sharpe higher by 0.12."
    assert [line for line in lines if line.startswith("#")] == [
        "# A against B",
        "## Criteria",
        "## Results",
        "## What was not shown",
        "## How to reproduce",
    ]
    assert (
        "| Full gain established (reported, decides nothing) | lower end of the gain +0.030 per year "
        "| at least +0.020 per year | ✗ not met |"
    ) in lines
    assert "- Decides in time: Decision time was not measured. To settle it: Measure the decision time." in lines
    assert "    detent evaluate --suite" in lines


def test_the_summary_shows_the_columns_and_rows_that_were_chosen(tmp_path):
    chosen = report(
        summary_columns=("policy", "drawdown"),
        summary_rows=("a", "flat"),
        glossary={"a": "the old one", "b + planner": "the new one"},
    )
    text = write_report(chosen, tmp_path).summary.read_text()
    assert "| policy | drawdown, share |\n| --- | --: |" in text
    assert f"| a | {MISSING} |\n| flat | {MISSING} |\n\n1 more row and 3 more columns in tables/results.csv." in text
    assert "a: the old one.\n" in text
    assert "the new one" not in text
    # The page shows everything.
    assert "b + planner: the new one" in re.sub(r"\s+", " ", page(tmp_path).text.replace("b + planner", "b + planner:"))
    with pytest.raises(ValueError, match="summary_columns: expected names of"):
        report(summary_columns=("nothing",))
    with pytest.raises(ValueError, match="summary_rows: expected names of"):
        report(summary_rows=("nobody",))


def test_code_in_text_is_code_and_nothing_else_becomes_markup(tmp_path):
    said = "Timed by `detent bench latency --set a=-1`, not `<b>`, at -3 %."
    write_report(report(results=dataclasses.replace(results(), note=said)), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert (
        f"Timed by <code>detent bench latency --set a=-1</code>, not `&lt;b&gt;`, at {MINUS}3\N{NO-BREAK SPACE}%."
        in text
    )
    summary = (tmp_path / "summary.md").read_text()
    assert r"Timed by `detent bench latency --set a=-1`, not \`&lt;b>\`, at" in summary


def test_names_break_after_underscores_only_and_minus_signs_are_alike(tmp_path):
    rows = (("random_valid - a_b", -0.5, "2001-01-01 to 2001-12-31", "x" * 50),)
    columns = (Column("pair"), Column("gain", format=".1f"), Column("test"), Column("next_step"))
    write_report(report(results=Table("Pairs", columns, rows), sections=()), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert f"random_<wbr>valid\N{NO-BREAK SPACE}{MINUS} a_<wbr>b" in text
    assert "next_<wbr>step" in text
    assert '<td class="short">2001-01-01 to 2001-12-31' in text
    assert '<td class="prose">xxx' in text
    assert f"random_valid\N{NO-BREAK SPACE}{MINUS} a_b" in (tmp_path / "summary.md").read_text()
    # What machines read is what was said.
    assert "random_valid - a_b" in (tmp_path / "report.json").read_text()


def test_a_column_without_any_value_is_one_of_numbers(tmp_path):
    columns = (Column("policy"), Column("hit rate", format=".1%"))
    write_report(report(results=Table("Rates", columns, (("a", None), ("b", math.nan))), sections=()), tmp_path)
    assert [cell.get("class") for cell in page(tmp_path).find("td")] == ["number", "number"]


@pytest.mark.parametrize(
    ("name", "value", "threshold", "shown"),
    [
        ("drawdown", 0.666, 0.02, "upper end of the difference +66.6 %, allowed below +2.0 %"),
        (
            "sharpe_above_zero",
            -0.354,
            0.0,
            f"lower end of the gain {MINUS}0.354 per year, asked for more than 0 per year",
        ),
        ("exposure", 0.578, 0.131, "mean exposure 0.578 of equity, asked for at least 0.131 of equity"),
        ("latency", 1.649, 50.0, "upper bound on p99 1.65 ms, allowed up to 50 ms"),
        ("valid_actions", 0, 0, "chosen 0, allowed 0"),
    ],
)
def test_a_criterion_reads_as_a_measure_and_what_is_asked(name, value, threshold, shown):
    one = Criterion(name=name, passed=True, observed=value, threshold=threshold, reason="")
    assert f"{' '.join(observed(one))}, {' '.join(asked(one))}" == shown


def test_a_sentence_has_a_capital_and_one_stop():
    assert sentence("saccades") == "Saccades."
    assert sentence("drawdown -3 %.") == "Drawdown -3 %."


def test_the_summary_of_a_huge_report_stays_within_two_pages(tmp_path):
    rows = tuple((f"policy {index}", interval(0.1, 0.0, 0.2), 0.05, 5, True) for index in range(400))
    huge = report(
        results=dataclasses.replace(results(), rows=rows),
        not_shown=tuple(f"Limit {index} of what these numbers say about other markets." for index in range(80)),
    )
    text = write_report(huge, tmp_path).summary.read_text()
    assert len(text.splitlines()) <= 100
    assert len(text.split()) <= 1000
    assert "385 more rows in tables/results.csv." in text
    assert "- 72 more in report.html." in text


def test_the_same_report_gives_the_same_bytes(tmp_path):
    write_report(report(), tmp_path / "one")
    write_report(report(), tmp_path / "two")
    write_report(report(), tmp_path / "two")
    first = all_bytes(tmp_path / "one")
    assert first == all_bytes(tmp_path / "two")
    assert sorted(first) == ["report.html", "report.json", "summary.md", "tables/folds.csv", "tables/results.csv"]


def test_an_existing_report_survives_a_write_that_fails(tmp_path):
    write_report(report(), tmp_path)
    before = all_bytes(tmp_path)
    # One table is fine and comes first; the name of the other is longer than a file system takes.
    sections = (Section("Long", tables=(Table("x" * 300, (Column("a"),), ()),)),)
    with pytest.raises(OSError, match="too long"):
        write_report(report(results=results(policy="new"), sections=sections), tmp_path)
    assert all_bytes(tmp_path) == before
    with pytest.raises(TypeError, match="object"):
        write_report(report(results=results(policy="new"), facts={"machine": object()}), tmp_path)
    assert all_bytes(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "summary.md", "tables"]


def test_tables_that_are_gone_leave_no_file_behind(tmp_path):
    write_report(report(), tmp_path)
    (tmp_path / "tables" / "mine.txt").write_text("kept")
    (tmp_path / "other.csv").write_text("kept")
    write_report(report(results=results("Other results"), sections=()), tmp_path)
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["mine.txt", "other-results.csv"]
    assert (tmp_path / "other.csv").read_text() == "kept"


def test_a_table_takes_numpy_scalars_and_refuses_what_it_cannot_store():
    columns = (Column("name"), Column("value"))
    table = Table("t", columns, ((np.str_("a"), np.float32(0.5)), (np.bool_(True), np.int64(3))))
    assert table.rows == (("a", 0.5), (True, 3))
    assert [type(cell) for row in table.rows for cell in row] == [str, float, bool, int]
    for cell in (np.datetime64("2020-01-01"), [1.0], interval(0.0, 0.0, 0.0)):
        with pytest.raises(ValueError, match="column 'value': expected a number, text or bool or None"):
            Table("t", columns, (("a", cell),))
    with pytest.raises(ValueError, match=r"column 'value': expected an Interval or None, was 0\.5"):
        Table("t", (Column("name"), Column("value", interval=True)), (("a", 0.5),))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Column("a", format=".2q"), "column 'a': format '.2q' does not fit a float"),
        (lambda: Table("t", (), ()), "at least one column"),
        (lambda: Table("t", (Column("a"), Column("b")), ((1,),)), "row 0: expected 2 cells, was 1"),
        (lambda: Table("t", (Column("a low"), Column("a", interval=True)), ()), "found a low more than once"),
        (lambda: Figure("f", b"GIF89a", "words"), "figure 'f': expected PNG bytes"),
        (lambda: Figure("f", png(), " "), "figure 'f': expected an alt text"),
        (lambda: slug("…"), "expected at least one ASCII letter or digit"),
        (lambda: report(results=results("Folds!")), "tables: expected distinct names, found folds more than once"),
        (lambda: report(sections=(Section("A b"), Section("a-B"))), "sections: expected distinct names, found a-b"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_an_interval_is_drawn_on_the_scale_of_its_column(tmp_path):
    columns = (Column("policy"), Column("gain", interval=True))
    rows = (("a", interval(0.0, -1.0, 1.0)), ("b", interval(2.0, 1.0, 3.0)), ("c", interval(1.0, math.nan, 2.0)))
    write_report(report(results=Table("Gains", columns, rows), sections=()), tmp_path)
    seen = page(tmp_path)
    # -1 to 3: zero is at a quarter of the axis, and the interval with an unknown end is not drawn.
    assert [(line["x1"], line["x2"]) for line in seen.find("line") if line["class"] == "whisker"] == [
        ("0.0", "50.0"),
        ("50.0", "100.0"),
    ]
    assert [dot["cx"] for dot in seen.find("circle")] == ["25.0", "75.0"]
    assert {line["x1"] for line in seen.find("line") if line["class"] == "zero"} == {"25.0"}


def test_stored_values_are_those_of_the_table():
    assert results().records[0] == ("b + planner", UGLY, -0.05, 1.25, 0.0712345, 5, True)
    assert results().records[1] == ("a", -0.001, -0.2, None, None, 1234567, False)
    assert results().records[2] == ("flat", None, None, None, None, math.inf, True)
