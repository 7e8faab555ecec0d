"""Constant evaluation against ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from pwopt.graph import Facts, parse
from pwopt.graph.fold import EVALUATED, FOLD_LIMIT, Unfoldable, fold

Array = np.ndarray[Any, Any]

OPSETS = (7, 9, 11, 13, 18, 21, 24)

I64 = np.int64


@dataclass(frozen=True, eq=False)
class Case:
    """One node on constants, for the opsets that write it this way."""

    op: str
    inputs: Sequence[Array]
    attrs: dict[str, Any] = field(default_factory=dict)
    since: int = 7
    until: int = 99
    outputs: int = 1


def _rng() -> np.random.Generator:
    return np.random.default_rng(7)


def _floats(*shape: int, dtype: Any = np.float32) -> Array:
    return np.asarray(_rng().standard_normal(shape) * 3).astype(dtype)


def _ints(*shape: int, low: int = -9, high: int = 9, dtype: Any = I64, seed: int = 0) -> Array:
    return np.asarray(np.random.default_rng(seed).integers(low, high, shape)).astype(dtype)


def _bools(*shape: int, seed: int = 0) -> Array:
    return _ints(*shape, low=0, high=2, seed=seed).astype(bool)


def _list(*values: int) -> Array:
    return np.array(values, I64)


_X = _floats(2, 3, 4)
_PAIRS = [
    (_floats(2, 3), _floats(3)),
    (_floats(2, 3, dtype=np.float64), _floats(1, dtype=np.float64)),
    (_ints(2, 3), _ints(2, 1, seed=1)),
    (_ints(2, 3, dtype=np.int32), _ints(dtype=np.int32, seed=1)),
]
_NONZERO = [
    (_floats(2, 3), _floats(3)),
    (_ints(4, 5), _ints(4, 5, low=1, seed=1) * _list(1, -1, 1, -1, 1)),
    (_ints(4, 5, dtype=np.int32), _ints(5, low=1, dtype=np.int32, seed=1)),
]
_HALVES = np.array([-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 7.25], np.float32)
_SPECIAL = np.array([-np.inf, -1.0, -0.0, 0.0, 1.0, np.inf], np.float32)

_BINARY = [Case(op, pair) for op in ("Add", "Sub", "Mul") for pair in _PAIRS] + [
    Case("Add", (_floats(2, 3, dtype=np.float16), _floats(3, dtype=np.float16)), since=13),
    Case("Mul", (_floats(2, 3, dtype=np.float16), _floats(3, dtype=np.float16)), since=13),
]
_DIVISION = [Case("Div", pair) for pair in _NONZERO] + [
    Case("Div", (_SPECIAL, np.array([2, 0, 1, 1, 0, 1], np.float32))),
    *(Case("Mod", pair, since=10) for pair in _NONZERO[1:]),
    *(Case("Mod", pair, {"fmod": 1}, since=10) for pair in _NONZERO[1:]),
]
_LOGIC = [Case(op, (_bools(2, 3), _bools(3, seed=1))) for op in ("And", "Or", "Xor")] + [
    Case("Not", (_bools(5),)),
    *(Case("Equal", (_ints(2, 9), _ints(9, seed=1)), since=s) for s in (7, 11)),
    *(Case(op, pair, since=9) for op in ("Greater", "Less") for pair in _PAIRS),
    *(Case(op, pair, since=12) for op in ("GreaterOrEqual", "LessOrEqual") for pair in _PAIRS),
]
_UNARY = [
    Case("Abs", (_floats(5),)),
    Case("Abs", (_ints(5),)),
    Case("Neg", (_floats(5),)),
    Case("Neg", (_ints(5),)),
    Case("Sign", (_SPECIAL,), since=9),
    Case("Ceil", (_HALVES,)),
    Case("Floor", (_HALVES,)),
    Case("Relu", (_floats(5),)),
    Case("Reciprocal", (_SPECIAL,)),
    Case("Sqrt", (np.abs(_floats(50)),)),
    Case("Sqrt", (np.abs(_floats(50, dtype=np.float64)),)),
    Case("Identity", (_X,)),
    Case("Identity", (_ints(3),)),
]
_POWERS = [
    Case("Pow", (np.abs(_floats(3, 4)), np.array(exponent, np.float32)))
    for exponent in (0.5, 2.0, 3.0, -1.0, 0.0)
]
_EXTREMA = [Case(op, (_floats(2, 3), _floats(3), _floats(1)), since=8) for op in ("Max", "Min")] + [
    Case(op, (_ints(2, 3), _ints(3, seed=1)), since=12) for op in ("Max", "Min")
]
_CLIP = [
    Case("Clip", (_X,), {"min": -1.0, "max": 2.0}, until=10),
    Case("Clip", (_X, np.array(-1, np.float32), np.array(2, np.float32)), since=11),
    Case("Clip", (_ints(9), np.array(-2, I64), np.array(3, I64)), since=12),
]
_REDUCTIONS = (
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
)
_REDUCE = [
    *(Case(op, (_X,), {"axes": [0, -1], "keepdims": 0}, since=11, until=12) for op in _REDUCTIONS),
    *(Case(op, (_X,), {"axes": [1]}, until=12) for op in _REDUCTIONS),
    *(Case(op, (_X,)) for op in _REDUCTIONS),
    *(Case(op, (_X, _list(1, -1)), {"keepdims": 0}, since=18) for op in _REDUCTIONS),
    Case("ReduceSum", (_X, _list(0)), since=13),
    *(Case(op, (_ints(6, low=1),), {"keepdims": 0}) for op in ("ReduceProd", "ReduceSum")),
    *(Case(op, (_ints(6),), since=12) for op in ("ReduceMax", "ReduceMin")),
]
_SHAPES = [
    Case("Shape", (_X,)),
    Case("Shape", (_X,), {"start": 1}, since=15),
    Case("Shape", (_X,), {"start": -2, "end": -1}, since=15),
    Case("Size", (_X,)),
    Case("Reshape", (_X, _list(0, -1))),
    Case("Reshape", (_X, _list(6, 4))),
    Case("Reshape", (np.empty((0, 4), np.float32), _list(4, 0)), {"allowzero": 1}, since=14),
    Case("Flatten", (_X,), {"axis": 2}),
    Case("Squeeze", (_floats(1, 3, 1),), {"axes": [0, 2]}, until=12),
    Case("Squeeze", (_floats(1, 3, 1), _list(-1)), since=13),
    Case("Squeeze", (_floats(1, 3, 1),)),
    Case("Unsqueeze", (_X,), {"axes": [0, 3]}, until=12),
    Case("Unsqueeze", (_X, _list(0, -1)), since=13),
    Case("ConstantOfShape", (_list(2, 3),), since=9),
    Case(
        "ConstantOfShape",
        (_list(2, 3),),
        {"value": numpy_helper.from_array(np.array([7], I64))},
        since=9,
    ),
    Case("Range", (np.array(2, I64), np.array(11, I64), np.array(3, I64)), since=11),
    Case("Range", (np.array(5, I64), np.array(-5, I64), np.array(-4, I64)), since=11),
]
_MOVES = [
    Case("Transpose", (_X,)),
    Case("Transpose", (_X,), {"perm": [1, 2, 0]}),
    Case("Concat", (_X, _X[:, :1]), {"axis": 1}),
    Case("Concat", (_ints(2), _ints(3)), {"axis": 0}),
    Case("Concat", (_X, _X), {"axis": -1}, since=11),
    Case("Slice", (_X,), {"starts": [1, 0], "ends": [9, -1], "axes": [1, 2]}, until=9),
    Case("Slice", (_X, _list(0), _list(-1)), since=10),
    Case("Slice", (_X, _list(1, 0), _list(2**63 - 1, -1), _list(1, 2)), since=10),
    Case("Slice", (_X, _list(-1), _list(-(2**63)), _list(2), _list(-2)), since=10),
    Case("Gather", (_X, _list(1, 0)), {"axis": 2}),
    Case("Gather", (_X, np.array(-1, I64)), {"axis": 1}, since=11),
    Case("GatherElements", (_X, _ints(2, 2, 4, low=-3, high=3)), {"axis": 1}, since=11),
    Case("GatherND", (_X, _list(0, 1, 1, 2).reshape(2, 2)), since=12),
    Case("Split", (_X,), {"axis": 2}, until=17, outputs=2),
    Case("Split", (_X,), {"axis": 2, "split": [1, 3]}, until=12, outputs=2),
    Case("Split", (_X, _list(3, 1)), {"axis": -1}, since=13, outputs=2),
    Case("Split", (_X,), {"axis": 1, "num_outputs": 2}, since=18, outputs=2),
    Case("Expand", (_floats(3, 1), _list(2, 1, 4)), since=8),
    Case("Tile", (_X, _list(1, 2, 2))),
    Case("Pad", (_X,), {"pads": [0, 1, 0, 0, 0, 2], "value": 1.5}, until=10),
    Case("Pad", (_X, _list(0, 1, 0, 0, 0, 2), np.array(1.5, np.float32)), since=11),
    Case("Pad", (_X, _list(1, 2), np.array(0, np.float32), _list(-1)), since=18),
    Case("DepthToSpace", (_floats(1, 8, 2, 3),), {"blocksize": 2}),
    Case("DepthToSpace", (_floats(1, 8, 2, 3),), {"blocksize": 2, "mode": "CRD"}, since=11),
    Case("SpaceToDepth", (_floats(1, 2, 4, 6),), {"blocksize": 2}),
    Case("Where", (_bools(2, 3), _floats(2, 3), _floats(1)), since=9),
    Case("Where", (_bools(3), _ints(2, 3), _ints(1)), since=9),
    Case("NonZero", (_ints(3, 4, low=0, high=2),), since=9),
]
_CASTS = [
    Case("Cast", (values,), {"to": helper.np_dtype_to_tensor_dtype(np.dtype(to))}, since=9)
    for values, to in (
        (_floats(9), np.float64),
        (_floats(9, dtype=np.float64), np.float32),
        (_floats(9), np.float16),
        (_floats(9, dtype=np.float16), np.float32),
        (_floats(9), np.int64),
        (_floats(9), np.int32),
        (_ints(9), np.int32),
        (_ints(9), np.float32),
        (_ints(9, low=0), np.uint8),
        (_ints(9, low=-1, high=2), np.bool_),
        (_bools(9), np.int64),
        (_SPECIAL, np.bool_),
    )
]
CASES = [
    *_BINARY,
    *_DIVISION,
    *_LOGIC,
    *_UNARY,
    *_POWERS,
    *_EXTREMA,
    *_CLIP,
    *_REDUCE,
    *_SHAPES,
    *_MOVES,
    *_CASTS,
]


def _model(case: Case, opset: int, *, constant: bool) -> onnx.ModelProto:
    names = [f"i{k}" for k in range(len(case.inputs))]
    outputs = [f"o{k}" for k in range(case.outputs)]
    arrays = [np.asarray(v) for v in case.inputs]
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in zip(names, arrays, strict=True)
    ]
    weights = [numpy_helper.from_array(a, n) for n, a in zip(names, arrays, strict=True)]
    graph = helper.make_graph(
        [helper.make_node(case.op, names, outputs, **case.attrs)],
        "fold",
        [] if constant else infos,
        [onnx.ValueInfoProto(name=o) for o in outputs],
        weights if constant else [],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8 if opset < 21 else 10
    )


def _fold(case: Case, opset: int, limit: int = FOLD_LIMIT) -> tuple[Array, ...] | Unfoldable:
    model = parse(_model(case, opset, constant=True))
    return fold(Facts(model), next(iter(model.nodes.values())), limit)


def _runtime(case: Case, opset: int) -> list[Array]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    proto = _model(case, opset, constant=False)
    inferred = onnx.shape_inference.infer_shapes(proto)
    session = ort.InferenceSession(
        inferred.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = {f"i{k}": np.asarray(v) for k, v in enumerate(case.inputs)}
    return list(session.run(None, feeds))


@pytest.mark.parametrize(
    ("case", "opset"),
    [
        pytest.param(case, opset, id=f"{case.op}-{number}-opset{opset}")
        for number, case in enumerate(CASES)
        for opset in OPSETS
        if case.since <= opset <= case.until
    ],
)
def test_agrees_with_the_runtime(case: Case, opset: int) -> None:
    results = _fold(case, opset)
    assert not isinstance(results, Unfoldable), results
    expected = _runtime(case, opset)
    assert len(results) == len(expected)
    for actual, reference in zip(results, expected, strict=True):
        assert actual.dtype == reference.dtype
        assert actual.shape == reference.shape
        if case.op in ("Pow", "ReduceL2", "ReduceMean", "ReduceProd", "ReduceSumSquare"):
            np.testing.assert_allclose(actual, reference, rtol=1e-6)
        elif case.op == "ReduceSum" and reference.dtype.kind == "f":
            np.testing.assert_allclose(actual, reference, rtol=1e-5)
        else:
            np.testing.assert_array_equal(actual, reference)


def test_every_evaluated_operator_has_a_case() -> None:
    assert {case.op for case in CASES} == EVALUATED


REFUSED = {
    "division by zero": (Case("Div", (_ints(3), _list(1, 0, 1))), Unfoldable.NOT_DEFINED),
    "modulo zero": (Case("Mod", (_ints(3), _list(1, 0, 1)), since=10), Unfoldable.NOT_DEFINED),
    "division overflow": (Case("Div", (_list(-(2**63)), _list(-1))), Unfoldable.NOT_DEFINED),
    "cast out of range": (
        Case("Cast", (np.array([300], np.float32),), {"to": 2}),
        Unfoldable.NOT_DEFINED,
    ),
    "cast of NaN": (
        Case("Cast", (np.array([np.nan], np.float32),), {"to": 7}),
        Unfoldable.NOT_DEFINED,
    ),
    "cast to text": (Case("Cast", (np.array([1], np.float32),), {"to": 8}), Unfoldable.NOT_DEFINED),
    "integer power": (Case("Pow", (_ints(3, low=1), _list(2)), since=12), Unfoldable.NOT_DEFINED),
    "float range": (
        Case(
            "Range",
            (np.array(0, np.float32), np.array(1, np.float32), np.array(0.1, np.float32)),
            since=11,
        ),
        Unfoldable.NOT_DEFINED,
    ),
    "range without step": (
        Case("Range", (np.array(0, I64), np.array(4, I64), np.array(0, I64))),
        Unfoldable.NOT_DEFINED,
    ),
    "negative pad": (Case("Pad", (_X, _list(0, 0, -1, 0, 0, 0))), Unfoldable.NOT_DEFINED),
    "reflected pad": (
        Case("Pad", (_X, _list(0, 0, 1, 0, 0, 0)), {"mode": "reflect"}),
        Unfoldable.NOT_DEFINED,
    ),
    "bad reshape": (Case("Reshape", (_X, _list(5, 5))), Unfoldable.NOT_DEFINED),
    "half sum": (
        Case("ReduceSum", (_floats(9, dtype=np.float16), _list(0))),
        Unfoldable.NOT_EVALUATED,
    ),
    "random": (Case("RandomNormalLike", (_X,)), Unfoldable.NOT_EVALUATED),
    "convolution": (
        Case("Conv", (_floats(1, 1, 3, 3), _floats(1, 1, 1, 1))),
        Unfoldable.NOT_EVALUATED,
    ),
    "tile": (Case("Tile", (_floats(1000), _list(100))), Unfoldable.TOO_LARGE),
    "expand": (Case("Expand", (_floats(1), _list(100_000_000_000))), Unfoldable.TOO_LARGE),
    "fill": (Case("ConstantOfShape", (_list(1 << 40),)), Unfoldable.TOO_LARGE),
    "range": (
        Case("Range", (np.array(0, I64), np.array(1 << 40, I64), np.array(1, I64))),
        Unfoldable.TOO_LARGE,
    ),
    "outer sum": (Case("Add", (_floats(1000, 1), _floats(1000))), Unfoldable.TOO_LARGE),
    "widening cast": (
        Case("Cast", (_ints(9000, low=0, dtype=np.uint8),), {"to": 7}),
        Unfoldable.TOO_LARGE,
    ),
    "indices": (Case("NonZero", (_floats(40, 40),)), Unfoldable.TOO_LARGE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    case, why = REFUSED[name]
    assert _fold(case, 13) is why


def test_the_limit_is_the_larger_of_option_and_inputs() -> None:
    tile = Case("Tile", (_floats(10), _list(3)))
    assert _fold(tile, 13, limit=29) is Unfoldable.TOO_LARGE
    assert not isinstance(_fold(tile, 13, limit=30), Unfoldable)
    large = Case("Transpose", (_floats(100, 50),))
    assert not isinstance(_fold(large, 13, limit=1), Unfoldable)


def test_an_input_read_twice_counts_once() -> None:
    """Else a chain of Concat(x, x) would double at every step."""
    weights = [numpy_helper.from_array(_floats(2000), "w")]
    graph = helper.make_graph(
        [helper.make_node("Concat", ["w", "w"], ["y"], axis=0)],
        "twice",
        [],
        [helper.make_tensor_value_info("y", 1, [4000])],
        weights,
    )
    model = parse(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]))
    assert fold(Facts(model), next(iter(model.nodes.values()))) is Unfoldable.TOO_LARGE


def test_inputs_that_are_fed_are_not_constant() -> None:
    case = Case("Neg", (_X,))
    model = parse(_model(case, 13, constant=False))
    result = fold(Facts(model), next(iter(model.nodes.values())))
    assert result is Unfoldable.NOT_CONSTANT


def test_old_broadcasting_is_left_alone() -> None:
    case = Case("Add", (_floats(2, 3), _floats(2)), {"broadcast": 1, "axis": 0})
    assert _fold(case, 6) is Unfoldable.NOT_EVALUATED


def test_the_reference_evaluator_is_imported_only_when_needed() -> None:
    code = "import sys, pwopt.graph.fold; sys.exit('onnx.reference' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
