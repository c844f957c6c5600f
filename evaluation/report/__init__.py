"""Reports that people open: one self-contained page, its numbers as JSON and CSV, a summary in Markdown.

Its figures come from `evaluation.report.figures`.
"""

from evaluation.report.content import Column, Figure, Report, Section, Table
from evaluation.report.writer import ReportFiles, write_report

__all__ = ["Column", "Figure", "Report", "ReportFiles", "Section", "Table", "write_report"]
