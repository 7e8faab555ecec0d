"""Finding passes by name, and reading their options and documentation."""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from typing import Any

from pwopt.errors import UsageError
from pwopt.passes.contract import Pass

__all__ = ["documentation", "find", "parse_spec"]

AnyPass = Pass[Any]


def find(name: str, among: Sequence[AnyPass]) -> AnyPass:
    """The pass called *name*, with default options.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    by_name = {p.name: p for p in among}
    if name in by_name:
        return by_name[name]
    near = difflib.get_close_matches(name, by_name, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(by_name)}"
    raise UsageError(f"there is no pass '{name}'; {hint}")


def parse_spec(spec: str, among: Sequence[AnyPass]) -> AnyPass:
    """The pass that ``name:option=value:option=value`` describes.

    Raises:
        UsageError: unknown pass or option, or a value that the option does not take.
    """
    name, *settings = spec.split(":")
    pass_ = find(name.strip(), among)
    kinds = typing.get_type_hints(type(pass_))
    options = {f.name for f in fields(pass_)}
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or key not in options:
            known = ", ".join(sorted(options)) or "none"
            raise UsageError(f"pass '{pass_.name}' has no option '{key}' (options: {known})")
        values[key] = _convert(pass_.name, key, text, kinds[key])
    return type(pass_)(**values)


def _convert(name: str, key: str, text: str, kind: Any) -> Any:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in kinds:
        if isinstance(option, type) and issubclass(option, Enum):
            allowed = [str(member.value) for member in option]
            if text in allowed:
                return option(text)
            raise UsageError(f"{name}:{key} takes one of {', '.join(allowed)}, not '{text}'")
        if option is bool and text in ("true", "false"):
            return text == "true"
        try:
            if option in (int, float, str):
                return option(text)
        except ValueError:
            continue
    raise UsageError(f"{name}:{key} does not take '{text}'")


def documentation(pass_: AnyPass) -> Mapping[str, str]:
    """The paragraphs of the pass's docstring by heading: Rewrites, Algebra, Declines when, ..."""
    text = inspect.getdoc(type(pass_)) or ""
    parts = re.split(r"(?m)^(Rewrites|Algebra|Declines when|Exactness|When it pays):\s*", text)
    sections = {"Summary": parts[0].strip()}
    sections.update(zip(parts[1::2], (p.strip() for p in parts[2::2]), strict=True))
    return sections
