"""What holds for every pass: names, docs, enums; no pass escapes."""

from __future__ import annotations

import importlib.util
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from pwopt import passes
from pwopt.errors import UsageError
from pwopt.passes import catalogue
from pwopt.passes.contract import Pass

ROOT = Path(__file__).parents[2]
HEADINGS = ("Rewrites", "Algebra", "Declines when", "Exactness", "When it pays")


@pytest.fixture(params=passes.ALL, ids=lambda p: p.name)
def each(request: pytest.FixtureRequest) -> Pass[Any]:
    pass_: Pass[Any] = request.param
    return pass_


def test_the_three_spellings_are_the_same_words(each: Pass[Any]) -> None:
    module = type(each).__module__.rpartition(".")[2]
    camel = "".join(word.capitalize() for word in each.name.split("-"))
    assert module == each.name.replace("-", "_")
    assert type(each).__name__ == camel
    assert camel in passes.__all__


def test_the_docstring_has_every_section(each: Pass[Any]) -> None:
    sections = catalogue.documentation(each)
    assert all(sections.get(heading) for heading in HEADINGS)
    assert sections["Summary"]


def test_reasons_are_named_and_none_is_a_catch_all(each: Pass[Any]) -> None:
    assert issubclass(each.Why, Enum)
    values = [str(why.value) for why in each.Why]
    assert len(values) == len(set(values)) > 0
    assert not {"other", "unknown", "none"} & set(values)


def test_every_pass_file_is_in_the_catalogue() -> None:
    files = (ROOT / "pwopt" / "passes").glob("*.py")
    listed = {type(p).__module__.rpartition(".")[2] for p in passes.ALL}
    defined = {path.stem for path in files if "(Pass[" in path.read_text()}
    assert defined == listed


def test_the_generated_pages_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = {p.name: p.read_text() for p in (ROOT / "docs" / "passes").glob("*.md")}
    assert written == generate.pages(), "run: python docs/generate.py"


def test_specs_name_a_pass_and_its_options() -> None:
    pass_ = passes.parse_spec("lower-pointwise-conv:layout=nhwc:op=gemm")
    assert pass_ == passes.LowerPointwiseConv(layout="nhwc", op="gemm")
    assert passes.parse_spec(pass_.spec()) == pass_


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("fold-afine", "did you mean fold-affine"),
        ("nothing-like-it", "there is no pass"),
        ("lower-pointwise-conv:shape=round", "has no option 'shape'"),
        ("lower-pointwise-conv:layout=chwn", "takes one of"),
        ("fold-affine:layout", "has no option"),
    ],
)
def test_wrong_specs_say_what_would_be_right(spec: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        passes.parse_spec(spec)
