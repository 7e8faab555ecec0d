"""The catalogue of passes and reference models, from their own documentation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from rich import box
from rich.table import Table

from pwopt.models import ModelInfo
from pwopt.passes.catalogue import documentation
from pwopt.passes.contract import Pass

__all__ = ["model_table", "pass_json", "pass_page", "pass_table"]

_HEADINGS = ("Rewrites", "Algebra", "Declines when", "Exactness", "When it pays")


def pass_table(passes: Iterable[Pass[Any]]) -> Table:
    """One line per pass."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for title in ("pass", "exactness", "runs", "what it does"):
        table.add_column(title, overflow="fold")
    for pass_ in passes:
        summary = documentation(pass_)["Summary"].splitlines()[0]
        table.add_row(pass_.name, pass_.exactness.value, _runs(pass_), summary)
    return table


def pass_page(pass_: Pass[Any]) -> str:
    """The documentation of one pass as Markdown."""
    sections = documentation(pass_)
    lines = [f"# {pass_.name}", "", sections["Summary"], ""]
    lines += [f"- Roots: {', '.join(f'`{root}`' for root in pass_.roots)}"]
    lines += [f"- Exactness class: {pass_.exactness.value}", f"- Runs: {_runs(pass_)}"]
    for option in fields(pass_):
        lines.append(f"- Option `{option.name}` (default `{_text(option.default)}`)")
    lines.append("")
    for heading in _HEADINGS:
        if heading in sections:
            lines += [f"## {heading}", "", sections[heading], ""]
    lines += ["## Reasons to decline", ""]
    lines += [f"- `{why.value}`" for why in pass_.Why]
    return "\n".join(lines) + "\n"


def pass_json(pass_: Pass[Any]) -> dict[str, Any]:
    """The same as JSON-compatible values."""
    return {
        "name": pass_.name,
        "roots": list(pass_.roots),
        "exactness": pass_.exactness.value,
        "required": pass_.required,
        "by_default": pass_.by_default,
        "options": {f.name: _text(f.default) for f in fields(pass_)},
        "reasons": [why.value for why in pass_.Why],
        "documentation": dict(documentation(pass_)),
    }


def model_table(infos: Sequence[ModelInfo]) -> Table:
    """One line per reference model."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for title in ("name", "input", "model", "paper"):
        table.add_column(title, overflow="fold")
    for info in infos:
        shape = "x".join(str(d) for d in info.input_shape)
        table.add_row(info.name, shape, info.title, str(info.paper))
    return table


def _runs(pass_: Pass[Any]) -> str:
    if pass_.required:
        return "always"
    return "by default" if pass_.by_default else "when asked for"


def _text(value: object) -> str:
    return str(getattr(value, "value", value))
