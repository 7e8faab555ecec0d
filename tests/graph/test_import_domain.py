"""Importing an operator domain, and taking it back."""

from __future__ import annotations

import numpy as np
import pytest

from pwopt.graph import Model, Rewriter, parse
from tests.passes import harness


def model(domains: dict[str, int]) -> Model:
    nodes = [harness.node("Relu", ["x"], ["y"])]
    return parse(harness.model(nodes, {"x": (2,)}, {"y": (2,)}, domains=domains))


def imports(model: Model) -> dict[str, int]:
    return {e.domain: e.version for e in model.to_proto().opset_import}


def test_a_domain_is_imported_once_and_taken_back() -> None:
    wrapped = model({})
    rewriter = Rewriter(wrapped)
    mark = rewriter.mark()
    rewriter.import_domain("com.microsoft", 1)
    rewriter.import_domain("com.microsoft", 1)
    assert imports(wrapped) == {"": 17, "com.microsoft": 1}
    rewriter.import_domain("org.example", 3)
    (node,) = wrapped.nodes.values()
    rewriter.set_attribute(node, "note", np.float32(1).item())
    assert imports(wrapped) == {"": 17, "com.microsoft": 1, "org.example": 3}
    rewriter.rollback(mark)
    assert imports(wrapped) == {"": 17}


@pytest.mark.parametrize("version", [1, 2])
def test_the_version_that_a_model_imports_stays(version: int) -> None:
    wrapped = model({"com.microsoft": version})
    rewriter = Rewriter(wrapped)
    mark = rewriter.mark()
    rewriter.import_domain("com.microsoft", 1)
    assert imports(wrapped) == {"": 17, "com.microsoft": version}
    assert rewriter.mark() == mark
