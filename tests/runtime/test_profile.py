from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pwopt.errors import UsageError
from pwopt.runtime import ExecutionError, profile
from pwopt.runtime.profile import summarize_events
from pwopt.target import Target
from tests.runtime.textual import write

CPU = Target(threads=1)


def event(name: str, ts: int, dur: int, **args: Any) -> dict[str, Any]:
    return {
        "cat": "Node",
        "ph": "X",
        "name": f"{name}_kernel_time",
        "ts": ts,
        "dur": dur,
        "args": args,
    }


def run(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "ph": "X", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


def test_medians_shares_and_order() -> None:
    events = [
        run(0, 1000),
        event("a", 10, 500, op_name="Conv"),
        event("b", 600, 100, op_name="Relu"),
    ]
    for n, (a, b) in enumerate([(10, 30), (50, 10), (30, 20)], start=1):
        start = 1000 * n
        events += [
            event("a", start + 1, a, op_name="Conv", provider="CPU"),
            event("b", start + 100, b, op_name="Relu", provider="CPU"),
            run(start, 200 + n),
        ]
    result = summarize_events(events, skip=1)
    assert [(n.name, n.op, n.median_us, n.share) for n in result.nodes] == [
        ("a", "Conv", 30.0, 0.6),
        ("b", "Relu", 20.0, 0.4),
    ]
    assert (result.total_us, result.run_us, result.runs) == (50.0, 202.0, 3)
    assert result.providers == {"CPU": 2}


def test_nodes_of_a_subgraph_are_not_counted_twice_and_summed_over_iterations() -> None:
    events = [
        run(0, 200),
        event("body", 10, 30, op_name="Conv"),
        event("body", 50, 40, op_name="Conv"),
        event("loop", 10, 100, op_name="Loop"),  # is written when it ends
        event("after", 110, 5, op_name="Relu"),
    ]
    result = summarize_events(events)
    assert {n.name: n.median_us for n in result.nodes} == {"loop": 30.0, "body": 70.0, "after": 5.0}
    assert result.total_us == 105.0
    assert sum(n.share for n in result.nodes) == pytest.approx(1.0)


def test_a_node_that_some_runs_skip_counts_as_zero_there() -> None:
    events = [run(0, 10), run(100, 10), run(200, 10), event("rare", 101, 4, op_name="Add")]
    (node,) = summarize_events(events).nodes
    assert node.median_us == 0.0


def test_foreign_events_are_passed_over() -> None:
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "metadata"},
        {"cat": "Kernel", "ph": "X", "name": "gemm", "ts": 1, "dur": 5},
        {"cat": "Node", "ph": "X", "name": "a_fence_before", "ts": 1, "dur": 5, "args": {}},
        run(0, 10),
        event("a", 2, 3, output_type_shape=[{"float": [1, 2]}, {"int64": []}]),
    ]
    (node,) = summarize_events(events).nodes
    assert (node.name, node.op, node.output_shapes) == ("a", "", ((1, 2), ()))


def test_no_complete_run_gives_an_empty_profile() -> None:
    assert summarize_events([event("a", 2, 3)]).nodes == ()


def conv_model(folder: Path) -> Path:
    graph = """g (float[1,8,6,6] x, float[8,8,1,1] w) => (float[1,8,6,6] y) {
        [twice] d = Add(x, x)
        [conv] c = Conv(d, w)
        [act] y = Relu(c)
    }"""
    return write(folder, graph)


def feeds() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.random((1, 8, 6, 6), dtype=np.float32),
        "w": rng.random((8, 8, 1, 1), dtype=np.float32),
    }


def test_unoptimized_profiles_name_the_models_own_nodes(tmp_path: Path) -> None:
    result = profile(conv_model(tmp_path), CPU, feeds(), runs=3, optimized=False)
    assert [(node.name, node.op) for node in result.nodes] == [
        ("twice", "Add"),
        ("conv", "Conv"),
        ("act", "Relu"),
    ]
    assert {node.provider for node in result.nodes} == {"CPUExecutionProvider"}
    assert result.nodes[1].output_shapes == ((1, 8, 6, 6),)
    assert result.runs == 3
    assert result.total_us == pytest.approx(sum(node.median_us for node in result.nodes))


def test_optimized_profiles_show_what_ran(tmp_path: Path) -> None:
    result = profile(conv_model(tmp_path), CPU, feeds(), runs=2)
    assert "Relu" not in {node.op for node in result.nodes}  # fused into the convolution


def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(scratch)
    path = conv_model(tmp_path)
    profile(path, CPU, feeds(), runs=1)
    with pytest.raises(ExecutionError):
        profile(path, CPU, {**feeds(), "w": np.zeros((8, 8, 9, 9), np.float32)}, runs=1)
    with pytest.raises(UsageError):
        profile(path, CPU, {}, runs=1)
    assert list(scratch.iterdir()) == []


def test_impossible_numbers_of_runs_are_usage_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 runs"):
        profile(conv_model(tmp_path), CPU, feeds(), runs=0)
