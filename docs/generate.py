"""Writes docs/passes/ from the passes' docstrings: ``python docs/generate.py``."""

from __future__ import annotations

from pathlib import Path

from pwopt import passes
from pwopt.passes.catalogue import documentation
from pwopt.report.catalogue import pass_page

FOLDER = Path(__file__).parent / "passes"


def pages() -> dict[str, str]:
    """File names and contents."""
    lines = [
        "# Passes",
        "",
        "Generated from the passes' docstrings by `python docs/generate.py`.",
        "",
    ]
    lines += ["| pass | exactness | what it does |", "|---|---|---|"]
    for pass_ in passes.ALL:
        summary = documentation(pass_)["Summary"].splitlines()[0]
        lines.append(f"| [{pass_.name}]({pass_.name}.md) | {pass_.exactness.value} | {summary} |")
    contents = {f"{pass_.name}.md": pass_page(pass_) for pass_ in passes.ALL}
    return {"README.md": "\n".join(lines) + "\n", **contents}


def main() -> None:
    """Write every page."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
