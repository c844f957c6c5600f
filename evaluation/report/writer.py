"""A report as files: a page, the same numbers as JSON and CSV, and a summary."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import TEMP_PREFIX, atomic_write_bytes, sha256_bytes
from evaluation.report.content import Report, Table
from evaluation.report.display import stored
from evaluation.report.page import render_page
from evaluation.report.summary import render_summary

PAGE, NUMBERS, SUMMARY, TABLES = "report.html", "report.json", "summary.md", "tables"


@dataclass(frozen=True)
class ReportFiles:
    """Where a report lies."""

    html: Path
    json: Path
    summary: Path
    csv: dict[str, Path]
    """By name of the table."""


def write_report(report: Report, directory: str | os.PathLike[str]) -> ReportFiles:
    """Write report.html, report.json, summary.md and tables/*.csv; the same report gives the same bytes.

    All of it is rendered and on the disk before the first file of an older report is replaced, each as a whole.
    The folder `tables` belongs to the report: CSV files of tables that are gone are removed.

    Raises: OSError from the file system; up to the first replacement an older report is untouched.
    """
    folder = Path(directory)
    names = {table.name: f"{TABLES}/{table.slug}.csv" for table in report.tables}
    contents = {
        **{names[table.name]: _csv(table) for table in report.tables},
        NUMBERS: json.dumps(_json(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        SUMMARY: render_summary(report),
        PAGE: render_page(report),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=folder) as staged:
        for name, text in contents.items():
            atomic_write_bytes(Path(staged, name), text.encode("utf-8"))
        (folder / TABLES).mkdir(exist_ok=True)
        for name in contents:
            os.replace(Path(staged, name), folder / name)
    for path in (folder / TABLES).glob("*.csv"):
        if f"{TABLES}/{path.name}" not in contents:
            path.unlink()
    return ReportFiles(
        html=folder / PAGE,
        json=folder / NUMBERS,
        summary=folder / SUMMARY,
        csv={table: folder / name for table, name in names.items()},
    )


def _csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.fields)
    for record in table.records:
        writer.writerow(_csv_value(value) for value in record)
    return text.getvalue()


def _csv_value(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else stored(value)


def _json(report: Report) -> dict[str, Any]:
    return {
        "title": report.title,
        "subtitle": report.subtitle,
        "caveats": list(report.caveats),
        "verdict": stored(report.verdict.to_dict()),
        "results": _json_table(report.results),
        "glossary": dict(report.glossary),
        "sections": [
            {
                "title": section.title,
                "text": list(section.text),
                "tables": [_json_table(table) for table in section.tables],
                "figures": [
                    {
                        "name": figure.name,
                        "alt": figure.alt,
                        "caption": figure.caption,
                        "sha256": sha256_bytes(figure.png),
                    }
                    for figure in section.figures
                ],
            }
            for section in report.sections
        ],
        "not_shown": list(report.not_shown),
        "reproduce": list(report.reproduce),
        "facts": stored(report.facts),
    }


def _json_table(table: Table) -> dict[str, Any]:
    return {
        "name": table.name,
        "note": table.note,
        "columns": [{"label": column.label, "unit": column.unit, "fields": column.fields} for column in table.columns],
        "rows": [dict(zip(table.fields, map(stored, record), strict=True)) for record in table.records],
    }
