"""Which provider ran which node: read from real profiles, with nodes placed elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pwopt.errors import RuntimeUnavailableError
from pwopt.runtime import Reference, make_inputs, open_session
from pwopt.runtime.placement import PlacedNode, placement_of
from pwopt.runtime.profile import profile_events
from pwopt.target import Target
from tests.runtime.stand_in import elsewhere, place_elsewhere, use_stand_in
from tests.runtime.textual import write

CPU = "CPUExecutionProvider"
TARGET = Target("device", threads=1)
GRAPH = """g (float[N,3] x) => (float[M,3] y) {
    [act] a = Erf(x)
    [shape] s = Shape(a)
    [same] r = Reshape(a, s)
    [last] y = Neg(r)
}"""


def real_events(path: Path) -> list[Mapping[str, Any]]:
    feeds = {"x": np.ones((2, 3), np.float32)}
    with open_session(
        path, Target(), optimized=False, profile_to=path.with_name("profile")
    ) as session:
        session.run(feeds)
        session.run(feeds)
        return profile_events(session)


def op_of(event: Mapping[str, Any]) -> str:
    return str(event.get("args", {}).get("op_name", ""))


def test_a_profile_tells_where_every_node_ran(tmp_path: Path) -> None:
    placement = placement_of(real_events(write(tmp_path, GRAPH)), CPU)
    assert placement.nodes == {CPU: 4}
    assert placement.fallen == ()
    assert placement.copies == 0
    assert placement.complaint is None


def test_what_ran_elsewhere_is_listed_once_and_in_order(tmp_path: Path) -> None:
    events = [
        elsewhere(e) if op_of(e) in ("Erf", "Neg") else e
        for e in real_events(write(tmp_path, GRAPH))
    ]
    placement = placement_of(events, CPU)
    other = "OtherExecutionProvider"
    assert placement.nodes == {CPU: 2, other: 2}
    assert placement.fallen == (PlacedNode("act", "Erf", other), PlacedNode("last", "Neg", other))
    assert placement.complaint == (f"{CPU} left 2 of 4 nodes to Other: 'act' (Erf), 'last' (Neg)")


def test_arithmetic_on_shapes_may_run_elsewhere(tmp_path: Path) -> None:
    events = [
        elsewhere(e) if op_of(e) == "Shape" else e for e in real_events(write(tmp_path, GRAPH))
    ]
    placement = placement_of(events, CPU)
    assert placement.nodes["OtherExecutionProvider"] == 1
    assert placement.complaint is None
    written = [{"int64": [4]}]
    assert placement_of([bare("Gather", written)], "CUDAExecutionProvider").complaint is None


@pytest.mark.parametrize(
    "written", [[], None, [{"int64": [1, 1000]}], [{"int64": [65]}], [{"float": [2]}], "?"], ids=str
)
def test_other_integers_are_no_shapes(written: object) -> None:
    placement = placement_of([bare("NonZero", written)], "CUDAExecutionProvider")
    assert placement.complaint == ("CUDAExecutionProvider left 1 of 1 nodes to CPU: 'n' (NonZero)")


def bare(op: str, written: object) -> dict[str, Any]:
    args = {"op_name": op, "provider": CPU, "output_type_shape": written}
    return {"ph": "X", "cat": "Node", "name": "n_kernel_time", "ts": 1, "dur": 1, "args": args}


def test_copies_between_memories_are_counted_and_long_lists_cut() -> None:
    events = [
        {**bare("Erf", [{"float": [9]}]), "name": f"n{i}_kernel_time", "ts": i} for i in range(7)
    ]
    copy = bare("MemcpyToHost", [{"float": [9]}])
    copy["args"]["provider"] = "CUDAExecutionProvider"
    placement = placement_of([*events, copy], "CUDAExecutionProvider")
    assert placement.copies == 1
    assert str(placement.complaint).endswith("'n4' (Erf) and 2 more")


# -- in verification -------------------------------------------------------------------------------


def reference(path: Path, target: Target = TARGET) -> Reference:
    with open_session(path, target, optimized=False) as session:
        rng = np.random.default_rng(0)
        feeds = make_inputs(session.interface.inputs, replace(target, input_shapes={}), rng)
    return Reference.of(path, target, feeds)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_stand_in(monkeypatch)
    return write(tmp_path, "g (float[4,3] x) => (float[4,3] y) { [act] a = Erf(x) y = Neg(a) }")


def test_a_reference_proves_where_the_original_ran(path: Path) -> None:
    found = reference(path)
    assert found.placement is not None
    assert found.placement.nodes == {CPU: 2}
    verdict = found.verify(path)
    assert verdict.ok
    assert verdict.placement == found.placement


def test_an_original_that_runs_elsewhere_is_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place_elsewhere(monkeypatch, lambda event: op_of(event) == "Erf")
    with pytest.raises(RuntimeUnavailableError) as caught:
        reference(path)
    assert str(caught.value) == (
        f"model.onnx: {CPU} left 1 of 2 nodes to Other: 'act' (Erf). Pass --allow-fallback to"
        " accept that, or --provider cpu."
    )
    allowed = reference(path, replace(TARGET, allow_fallback=True))
    assert allowed.placement is not None
    assert [str(node) for node in allowed.placement.fallen] == ["'act' (Erf)"]
    assert allowed.verify(path).ok


def test_a_candidate_that_runs_elsewhere_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reference(path)
    place_elsewhere(monkeypatch, lambda event: op_of(event) == "Neg")
    verdict = found.verify(path)
    assert not verdict.ok
    assert str(verdict.reason).startswith(f"{CPU} left 1 of 2 nodes to Other")
