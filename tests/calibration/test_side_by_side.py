"""A network and its approximation side by side: the right values, at the right places."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pwopt.calibration import Samples, load_samples
from pwopt.calibration import side_by_side as module
from pwopt.calibration.moments import patches_at
from pwopt.calibration.side_by_side import SideBySide, Station
from pwopt.graph import Facts, parse
from pwopt.runtime import TensorSpec
from pwopt.target import Target
from tests.passes import harness
from tests.passes.linear_models import Array, Draft, Geometry

SPEC = TensorSpec("x", "tensor(float)", ("batch", 4, 6, 6))


def residual_model() -> onnx.ModelProto:
    """Two branches that meet: a projection, and two convolutions."""
    draft = Draft(np.random.default_rng(0), ("batch", 4, 6, 6))
    inner = draft.add("Relu", [draft.conv("x", 4, 6, Geometry.plain(3, pad=1))])
    body = draft.conv(inner, 6, 8, Geometry.plain(3, pad=1))
    side = draft.conv("x", 4, 8, Geometry.plain(1))
    both = draft.add("Relu", [draft.add("Add", [side, body])])
    return draft.finish(draft.conv(both, 8, 5, Geometry.plain(3), group=1))


def samples(count: int = 10) -> Samples:
    rng = np.random.default_rng(1)
    return load_samples([{"x": rng.random((count, 4, 6, 6), dtype=np.float32)}], [SPEC])


def together(tmp_path: Path, proto: onnx.ModelProto, count: int = 10) -> SideBySide:
    model = parse(proto)
    sites = [Facts(model).site(n) for n in model.by_op["Conv"].values()]
    rng = np.random.default_rng(2)
    return SideBySide(proto, sites, samples(count), Target(threads=1), tmp_path, rng)


def tensors(proto: onnx.ModelProto, *names: str) -> list[Array]:
    """What the whole model computes, by the runtime, for all samples at once."""
    seen = onnx.ModelProto()
    seen.CopyFrom(proto)
    for name in names:
        if name not in [o.name for o in seen.graph.output]:
            seen.graph.output.append(onnx.ValueInfoProto(name=name))
    found = harness.run_unoptimized(seen, {"x": np.asarray(next(samples().batches(10))["x"])})
    return [found[name] for name in names]


def moments_by_hand(station: Station, x: Array, y: Array) -> tuple[Array, Array]:
    positions = np.arange(len(y) * y.shape[2] * y.shape[3])
    patches = patches_at(x, station.conv, positions).reshape(len(positions), -1)
    targets = y.transpose(0, 2, 3, 1).reshape(len(positions), -1)
    centred = patches - patches.mean(0)
    return centred.T @ centred / len(centred), (targets - targets.mean(0)).T @ centred / len(
        centred
    )


def test_moments_are_those_of_the_whole_network(tmp_path: Path) -> None:
    proto = residual_model()
    with together(tmp_path, proto) as networks:
        for station in networks.stations():
            seen = networks.observe(station, symmetric=True)
            (moments,) = seen.moments()
            read, made = station.conv.input.name, station.conv.output.name
            x = next(samples().batches(10))["x"] if read == "x" else tensors(proto, read)[0]
            (y,) = tensors(proto, made)
            inputs, cross = moments_by_hand(station, np.asarray(x), y)
            np.testing.assert_allclose(moments.inputs, inputs, atol=1e-5)
            np.testing.assert_allclose(moments.cross, cross, atol=1e-5)
            assert moments.error(station.weight) == pytest.approx(0, abs=1e-5)


def test_what_an_addition_waits_for_comes_last(tmp_path: Path) -> None:
    with together(tmp_path, residual_model()) as networks:
        found = {s.site: s for s in networks.stations()}
    addends = [s.addend for s in found.values()]
    assert sum(a is not None for a in addends) == 1
    assert [s.slope for s in found.values()] == [0.0, None, None, None]  # the sum is rectified
    assert len(found) == 4


def test_errors_of_one_branch_are_targets_of_the_other(tmp_path: Path) -> None:
    """The regression of the last addend makes up for what the first one lost."""
    proto = residual_model()
    with together(tmp_path, proto) as networks:
        for station in networks.stations():
            plain = networks.observe(station, plain=True).moments()[0]
            (moments,) = networks.observe(station).moments()
            if station.addend is not None:
                assert moments.power != pytest.approx(plain.power)
                assert plain.error(station.weight) == pytest.approx(0, abs=1e-5)
                free = moments.regression()
                assert moments.error(free) < 0.98 * moments.error(station.weight)
            networks.replace(station, 0.8 * station.weight, station.bias)


def test_the_approximation_goes_on_from_its_own_values(tmp_path: Path) -> None:
    proto = residual_model()
    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    with together(tmp_path, proto) as networks:
        for number, station in enumerate(networks.stations()):
            inputs = networks.observe(station).moments()[0].inputs
            read = station.conv.input.name
            x = next(samples().batches(10))["x"] if read == "x" else tensors(changed, read)[0]
            (y,) = tensors(proto, station.conv.output.name)
            np.testing.assert_allclose(
                inputs, moments_by_hand(station, np.asarray(x), y)[0], atol=1e-4
            )
            weight = station.weight * (1 + 0.1 * number)
            networks.replace(station, weight, station.bias + 1)
            _set(changed, station, weight, station.bias + 1)


def _set(proto: onnx.ModelProto, station: Station, weight: Array, bias: Array) -> None:
    (node,) = (n for n in proto.graph.node if station.conv.output.name in n.output)
    for name, values in zip(node.input[1:], (weight, bias), strict=True):
        (tensor,) = (t for t in proto.graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values, np.float32), name))


def test_memory_is_bounded_by_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def errors() -> Iterator[Any]:
        with together(tmp_path, residual_model()) as networks:
            for station in networks.stations():
                yield networks.observe(station).moments()[0].inputs

    in_memory = list(errors())
    monkeypatch.setattr(module, "_IN_MEMORY", 0)
    for expected, found in zip(in_memory, errors(), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not list(tmp_path.iterdir())


def test_few_positions_tell_almost_as_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAST_ROWS", 60)
    monkeypatch.setattr(module, "_ROWS_PER_SIZE", 1)
    with together(tmp_path, residual_model(), 10) as networks:
        for station in networks.stations():
            seen = networks.observe(station, symmetric=True)
            assert 50 <= seen.count <= 80
            assert seen.moments()[0].error(station.weight) == pytest.approx(0, abs=1e-5)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with together(tmp_path, residual_model()) as networks:
        list(networks.stations(lambda done, total: told.append((done, total))))
    assert told[0] == (0, 4)
    assert told[-1] == (4, 4)
