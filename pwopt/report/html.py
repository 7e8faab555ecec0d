"""A report as one self-contained HTML page."""

from __future__ import annotations

import io

from rich.console import Console, Group
from rich.table import Table
from rich.terminal_theme import DEFAULT_TERMINAL_THEME

from pwopt.report.terminal import report_table
from pwopt.result import Report

__all__ = ["to_html"]


def to_html(report: Report) -> str:
    """The summary and every remark, as rich renders them."""
    console = Console(record=True, width=180, file=io.StringIO(), force_terminal=True)
    remarks = Table(title="remarks", header_style="bold")
    for title in ("no.", "pass", "site", "kind", "reason", "facts"):
        remarks.add_column(title, overflow="fold")
    for remark in report.remarks:
        facts = ", ".join(f"{k}={v}" for k, v in remark.facts.items())
        number = "" if remark.ordinal is None else str(remark.ordinal)
        remarks.add_row(number, remark.pass_name, remark.site, remark.kind, remark.reason, facts)
    console.print(Group(report_table(report), remarks))
    return console.export_html(theme=DEFAULT_TERMINAL_THEME)
