"""Writes activations: as operators, or as the arithmetic that runs faster than one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pwopt.graph import Node, Rewriter, Tensor
from pwopt.passes._activations import GELU_CUBIC, GELU_SLOPE

__all__ = ["write"]


def write(
    form: str, rewriter: Rewriter, root: Node, x: Tensor, parameters: tuple[float, ...] = ()
) -> None:
    """Let *form* of *x* compute the output of *root*, which has been removed.

    Args:
        form: an activation of :class:`pwopt.passes._activations.Activation`, or a way to compute
            one.
        rewriter: adds the nodes.
        root: says where, and how to name them.
        x: the activation's input, whose element type constants take.
        parameters: the activation's, in the order of their names.
    """
    _FORMS[form](_Writer(rewriter, root, x, parameters))


class _Writer:
    """Adds nodes in the place of *root*; the last one writes its output."""

    def __init__(
        self, rewriter: Rewriter, root: Node, x: Tensor, parameters: tuple[float, ...]
    ) -> None:
        self.x = x
        self.parameters = parameters
        self.dtype: np.dtype[Any] = np.dtype(x.dtype)
        self._rewriter = rewriter
        self._root = root
        self._output = root.outputs[0]
        self._constants: dict[float, Tensor] = {}

    def constant(self, value: float) -> Tensor:
        """A scalar of the element type of x."""
        if value not in self._constants:
            name = f"{self._root.name or self._output.name}/constant"
            array = np.asarray(value, self.dtype)
            self._constants[value] = self._rewriter.constant(name, array)
        return self._constants[value]

    def add(
        self, op: str, *inputs: Tensor | float | None, last: bool = False, **attrs: float | str
    ) -> Tensor:
        """Add a node and return its output."""
        tensors = [self.constant(i) if isinstance(i, float) else i for i in inputs]
        output = self._output
        if not last:
            output = self._rewriter.variable(f"{self._output.name}/{op}", like=self.x)
        self._rewriter.add(op, tensors, [output], attrs, near=self._root)
        return output

    def clip(self, value: Tensor, low: float, high: float, *, last: bool = False) -> Tensor:
        """Add a Clip; an infinite bound is left out."""
        bounds = {k: v for k, v in (("min", low), ("max", high)) if not math.isinf(v)}
        if self._rewriter.model.opset < 11:
            return self.add("Clip", value, last=last, **bounds)
        tensors = [bounds.get("min"), bounds.get("max")]
        while tensors and tensors[-1] is None:
            tensors.pop()
        return self.add("Clip", value, *tensors, last=last)


def _write_gate(writer: _Writer) -> None:
    alpha, beta = writer.parameters
    gate = writer.add("HardSigmoid", writer.x, alpha=alpha, beta=beta)
    writer.add("Mul", writer.x, gate, last=True)


def _write_hard_sigmoid(writer: _Writer) -> None:
    alpha, beta = writer.parameters
    writer.add("HardSigmoid", writer.x, last=True, alpha=alpha, beta=beta)


def _scaled(writer: _Writer) -> Tensor:
    (slope,) = writer.parameters
    return writer.x if slope == 1.0 else writer.add("Mul", writer.x, slope)


def _write_swish(writer: _Writer) -> None:
    gate = writer.add("Sigmoid", _scaled(writer))
    writer.add("Mul", writer.x, gate, last=True)


def _write_gelu_by_erf(writer: _Writer) -> None:
    scaled = writer.add("Div", writer.x, math.sqrt(2.0))
    gate = writer.add("Add", writer.add("Erf", scaled), 1.0)
    writer.add("Mul", writer.add("Mul", writer.x, gate), 0.5, last=True)


def _write_gelu_by_tanh(writer: _Writer) -> None:
    x = writer.x
    square = writer.add("Mul", writer.add("Mul", x, GELU_CUBIC), x)
    bend = writer.add("Add", square, 1.0)
    inner = writer.add("Mul", writer.add("Mul", x, GELU_SLOPE), bend)
    gate = writer.add("Add", writer.add("Tanh", inner), 1.0)
    writer.add("Mul", writer.add("Mul", x, 0.5), gate, last=True)


def _write_mish_by_exp(writer: _Writer) -> None:
    # Past the cap 2 / n is below the last bit of 1, and n overflows neither here nor in float16.
    cap = 5.0 if writer.dtype == np.float16 else 20.0
    exp = writer.add("Exp", writer.clip(writer.x, -math.inf, cap))
    n = writer.add("Mul", exp, writer.add("Add", exp, 2.0))
    gate = writer.add("Div", n, writer.add("Add", n, 2.0))
    writer.add("Mul", writer.x, gate, last=True)


def _write_softplus_by_exp(writer: _Writer) -> None:
    decay = writer.add("Exp", writer.add("Neg", writer.add("Abs", writer.x)))
    bend = writer.add("Log", writer.add("Add", decay, 1.0))
    writer.add("Add", writer.add("Relu", writer.x), bend, last=True)


_Form = Callable[[_Writer], object]


def _plain(op: str, **attrs: float | str) -> _Form:
    return lambda writer: writer.add(op, writer.x, last=True, **attrs)


_FORMS: Mapping[str, _Form] = {
    "clip": lambda w: w.clip(w.x, *w.parameters, last=True),
    "gated-hard-sigmoid": _write_gate,
    "gelu": _plain("Gelu"),
    "gelu-by-erf": _write_gelu_by_erf,
    "gelu-by-tanh": _write_gelu_by_tanh,
    "gelu-tanh": _plain("Gelu", approximate="tanh"),
    "hard-sigmoid": _write_hard_sigmoid,
    "hard-swish": _plain("HardSwish"),
    "leaky-relu": lambda w: w.add("LeakyRelu", w.x, last=True, alpha=w.parameters[0]),
    "mish": _plain("Mish"),
    "mish-by-exp": _write_mish_by_exp,
    "relu": _plain("Relu"),
    "sigmoid": lambda w: w.add("Sigmoid", _scaled(w), last=True),
    "softplus": _plain("Softplus"),
    "softplus-by-exp": _write_softplus_by_exp,
    "swish": _write_swish,
}
