"""Pointwise expressions in x as ONNX graphs, in any operand order and with any kind of scalar."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from tests.passes import harness

Shape = tuple[int | str | None, ...]
SHAPE = (1, 3, 8, 8)


@dataclass(frozen=True)
class Expression:
    """An operator applied to expressions, numbers (scalar constants) and ``None`` (left out)."""

    op: str
    args: tuple[Expression | float | None, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __add__(self, other: Expression | float) -> Expression:
        return Expression("Add", (self, other))

    def __sub__(self, other: Expression | float) -> Expression:
        return Expression("Sub", (self, other))

    def __mul__(self, other: Expression | float) -> Expression:
        return Expression("Mul", (self, other))

    def __truediv__(self, other: Expression | float) -> Expression:
        return Expression("Div", (self, other))

    def __rtruediv__(self, other: float) -> Expression:
        return Expression("Div", (other, self))

    def __neg__(self) -> Expression:
        return Expression("Neg", (self,))

    def __pow__(self, exponent: float) -> Expression:
        return Expression("Pow", (self, exponent))


X = Expression("x", ())


def apply(op: str, *args: Expression | float, **attrs: Any) -> Expression:
    """``op(*args)``."""
    return Expression(op, args, attrs)


def clip(value: Expression, low: float | None, high: float | None) -> Expression:
    """``Clip``, with attributes or inputs as the opset wants it."""
    return Expression("Clip", (value, low, high))


@dataclass
class Style:
    """How to write an expression down."""

    opset: int = 17
    dtype: Any = np.float32
    constant_shape: tuple[int, ...] = ()
    swaps: random.Random | None = None
    shape: Shape = SHAPE
    ir: int = 8

    def swap(self) -> bool:
        return self.swaps is not None and self.swaps.random() < 0.5


def write(
    expression: Expression, style: Style, *, outputs: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """A model ``y = expression(4 input)``; an expression that occurs twice is computed once.

    The factor reaches the flat parts of the functions; it is a ``Sum``, so no part of them.
    Further *outputs* name operators whose (first) result is a graph output too.
    """
    nodes = [harness.node("Sum", ["input"] * 4, ["x"])]
    weights: dict[str, Any] = {}
    names: dict[str, str] = {}
    serial = itertools.count(1)
    done: dict[int, str] = {}

    def constant(value: float, *, scalar: bool) -> str:
        name = f"c{len(weights)}"
        shape = () if scalar else style.constant_shape
        weights[name] = np.full(shape, value, style.dtype)
        return name

    def emit(item: Expression, result: str | None = None) -> str:
        if item.op == "x":
            return "x"
        if id(item) in done:
            return done[id(item)]
        output = done[id(item)] = result or f"t{next(serial)}"
        attrs = dict(item.attrs)
        if item.op == "Clip":
            value = item.args[0]
            assert isinstance(value, Expression)
            inputs = [emit(value)]
            bounds = item.args[1:]
            if style.opset < 11:
                attrs = {k: v for k, v in zip(("min", "max"), bounds, strict=True) if v is not None}
            else:
                inputs += [
                    "" if b is None else constant(b, scalar=True)
                    for b in bounds
                    if not isinstance(b, Expression)
                ]
        else:
            inputs = [
                emit(a) if isinstance(a, Expression) else constant(a or 0.0, scalar=False)
                for a in item.args
            ]
            if item.op in ("Add", "Mul", "Max", "Min") and style.swap():
                inputs.reverse()
        while inputs and not inputs[-1]:
            inputs.pop()
        names.setdefault(item.op, output)
        nodes.append(harness.node(item.op, inputs, [output], **attrs))
        return output

    emit(expression, "y")
    results = {"y": style.shape, **{names[op]: style.shape for op in outputs}}
    return harness.model(
        nodes,
        {"input": style.shape},
        results,
        weights,
        opset=style.opset,
        dtype=style.dtype,
        ir=style.ir,
    )
