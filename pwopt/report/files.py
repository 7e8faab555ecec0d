"""Writing reports."""

from __future__ import annotations

from pathlib import Path

from pwopt.graph import atomic_write
from pwopt.report.html import to_html
from pwopt.report.json import dump, to_json
from pwopt.result import Report

__all__ = ["write_report"]


def write_report(report: Report, path: Path) -> None:
    """Write *report* as HTML or JSON, by the ending of *path*.

    Raises:
        OutputError: the file cannot be written.
    """
    text = to_html(report) if path.suffix == ".html" else dump(to_json(report))
    data = text.encode()
    atomic_write(path, lambda file: file.write(data))
