"""Reads pointwise arithmetic as a function of one tensor, and says which activation that is."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from pwopt.graph import Constant, Facts, Node, Tensor
from pwopt.numerics.scalar_form import Form, Function, NoFormError, ScalarAlgebra

__all__ = [
    "GELU_CUBIC",
    "GELU_SLOPE",
    "Activation",
    "NearMiss",
    "Reader",
    "Region",
    "identify",
    "tolerance",
]


class Activation(StrEnum):
    """What an expression in x turns out to be; a, b and l, h are its parameters."""

    CLIP = "clip"
    """``min(max(x, l), h)``."""
    GATED_HARD_SIGMOID = "gated-hard-sigmoid"
    """``x * min(max(a x + b, 0), 1)``, other than hard-swish."""
    GELU = "gelu"
    GELU_TANH = "gelu-tanh"
    HARD_SIGMOID = "hard-sigmoid"
    """``min(max(a x + b, 0), 1)``."""
    HARD_SWISH = "hard-swish"
    LEAKY_RELU = "leaky-relu"
    """``x`` where positive, else ``a x``."""
    MISH = "mish"
    RELU = "relu"
    SIGMOID = "sigmoid"
    """``sigmoid(a x)``."""
    SOFTPLUS = "softplus"
    SWISH = "swish"
    """``x * sigmoid(a x)``; SiLU for a = 1."""


@dataclass(frozen=True)
class NearMiss:
    """An activation but for a constant."""

    activation: Activation
    found: dict[str, float]


# -- reading the graph -----------------------------------------------------------------------------

_RATIONAL = frozenset({"Add", "Div", "Mul", "Neg", "Pow", "Reciprocal", "Sub"})
_TELLING = frozenset(
    {
        "Clip",
        "Erf",
        "Exp",
        "HardSigmoid",
        "Log",
        "Max",
        "Min",
        "Relu",
        "Sigmoid",
        "Softplus",
        "Tanh",
    }
)
"""Operators without which an expression is no activation."""
_READABLE = _RATIONAL | _TELLING
_MAX_NODES = 16
"""The longest form known, GELU by tanh, has ten."""
_LARGEST_FLOAT = 3.4028234e38
"""Clip's default bounds stand for none at all."""


@dataclass(frozen=True, eq=False)
class Region:
    """The few pointwise nodes that end in a node.

    Attributes:
        tensors: what all of the region's result depends on, taken alone: the nearest first.
        is_promising: whether it holds more than a polynomial.
        has_overridable: whether a scalar in it is an initializer that a caller may override.
    """

    tensors: list[Tensor]
    is_promising: bool
    has_overridable: bool

    @classmethod
    def behind(cls, root: Node, facts: Facts) -> Region:
        """The region of *root*, itself included."""
        nodes = _collect(root, facts)
        operands = [t for n in nodes.values() for t in n.inputs]
        return cls(
            tensors=list(_bottlenecks(root, nodes)),
            is_promising=any(n.op in _TELLING for n in nodes.values()),
            has_overridable=any(
                isinstance(t, Constant) and not facts.is_constant(t) and math.prod(t.shape) == 1
                for t in operands
            ),
        )


def _collect(root: Node, facts: Facts) -> dict[int, Node]:
    """The nearest readable nodes that *root* depends on, by id."""
    nodes = {id(root): root}
    queue = deque([root])
    while queue:
        for tensor in queue.popleft().inputs:
            producer = None if isinstance(tensor, Constant) else facts.producer(tensor)
            if (
                producer is not None
                and id(producer) not in nodes
                and len(nodes) < _MAX_NODES
                and facts.is_op(producer, *_READABLE)
            ):
                nodes[id(producer)] = producer
                queue.append(producer)
    return nodes


def _bottlenecks(root: Node, nodes: dict[int, Node]) -> Iterator[Tensor]:
    """The tensors that every path into *root* goes through, from *root* backwards.

    Walks the nodes against the data flow with the cut of tensors between those seen and the rest.
    """
    cut: dict[int, Tensor] = {}
    for node in _against_flow(root, nodes):
        if len(cut) == 1 and node is not root:
            yield from cut.values()
        for tensor in node.outputs:
            cut.pop(id(tensor), None)
        for tensor in node.inputs:
            if not tensor.is_empty() and not isinstance(tensor, Constant):
                cut[id(tensor)] = tensor
    if len(cut) == 1:
        yield from cut.values()


def _against_flow(root: Node, nodes: dict[int, Node]) -> list[Node]:
    """*nodes* so that each one comes before the producers of its inputs."""
    order: list[Node] = []
    seen: set[int] = set()

    def visit(node: Node) -> None:
        seen.add(id(node))
        for tensor in node.inputs:
            for producer in tensor.inputs:
                if id(producer) in nodes and id(producer) not in seen:
                    visit(producer)
        order.append(node)

    visit(root)
    return order[::-1]


class Reader:
    """Reads a tensor as a function of another one.

    Attributes:
        nodes: the nodes read, by id, the root first.
        constant_rank: the most dimensions that a scalar operand has.
    """

    def __init__(self, facts: Facts, x: Tensor, algebra: ScalarAlgebra) -> None:
        self.nodes: dict[int, Node] = {}
        self.constant_rank = 0
        self._facts = facts
        self._x = x
        self._algebra = algebra
        self._forms: dict[int, Form] = {}

    def read_node(self, node: Node) -> Form:
        """The value of *node*.

        Raises:
            NoFormError: it is no function of x alone, or not of a known kind.
        """
        if id(node) not in self.nodes and len(self.nodes) == _MAX_NODES:
            raise NoFormError
        self.nodes[id(node)] = node
        return self._value(node)

    def shared_value(self, root: Node) -> Tensor | None:
        """A value inside the expression that something outside of it sees."""
        for node in self.nodes.values():
            for tensor in node.outputs:
                if node is root:
                    continue
                if self._facts.is_output(tensor) or any(
                    id(reader) not in self.nodes for reader in tensor.outputs
                ):
                    return tensor
        return None

    def _tensor(self, tensor: Tensor) -> Form:
        if tensor is self._x:
            return Form.linear(1.0)
        if isinstance(tensor, Constant):
            return Form.constant(self._scalar(tensor, broadcast=True))
        known = self._forms.get(id(tensor))
        if known is not None:
            return known
        producer = self._facts.producer(tensor)
        if producer is None or not self._facts.is_op(producer, *_READABLE):
            raise NoFormError
        form = self._forms[id(tensor)] = self.read_node(producer)
        return form

    def _scalar(self, tensor: Tensor | None, *, broadcast: bool) -> float:
        value = self._facts.scalar(tensor)
        if value is None or math.isnan(value):
            raise NoFormError
        if broadcast:
            self.constant_rank = max(self.constant_rank, self._facts.rank(tensor) or 0)
        return value

    def _value(self, node: Node) -> Form:
        algebra = self._algebra
        first = self._tensor(node.inputs[0])
        if node.op in _SMOOTH:
            return algebra.apply(_SMOOTH[node.op], first)
        match node.op:
            case "Clip":
                return algebra.clip(first, *self._bounds(node))
            case "HardSigmoid":
                slope = self._facts.attr_float(node, "alpha", 0.2)
                offset = self._facts.attr_float(node, "beta", 0.5)
                shifted = algebra.add(algebra.scale(first, slope), Form.constant(offset))
                return algebra.step(shifted)
            case "Log":
                return algebra.log(first)
            case "Neg":
                return algebra.scale(first, -1.0)
            case "Pow":
                return algebra.power(first, self._scalar(node.inputs[1], broadcast=True))
            case "Reciprocal":
                return algebra.divide(Form.constant(1.0), first)
            case "Relu":
                return algebra.clip(first, 0.0, math.inf)
        operation = {
            "Add": algebra.add,
            "Div": algebra.divide,
            "Max": algebra.maximum,
            "Min": algebra.minimum,
            "Mul": algebra.multiply,
            "Sub": algebra.subtract,
        }[node.op]
        for tensor in node.inputs[1:]:
            first = operation(first, self._tensor(tensor))
        return first

    def _bounds(self, node: Node) -> tuple[float, float]:
        facts = self._facts
        if facts.opset < 11:
            low = facts.attr_float(node, "min", -_LARGEST_FLOAT)
            high = facts.attr_float(node, "max", _LARGEST_FLOAT)
        else:
            low, high = (
                default
                if (tensor := facts.input(node, index)) is None
                else self._scalar(tensor, broadcast=False)
                for index, default in ((1, -math.inf), (2, math.inf))
            )
        return (
            -math.inf if low <= -_LARGEST_FLOAT else low,
            math.inf if high >= _LARGEST_FLOAT else high,
        )


_SMOOTH = {
    "Erf": Function.ERF,
    "Exp": Function.EXP,
    "Sigmoid": Function.SIGMOID,
    "Softplus": Function.SOFTPLUS,
    "Tanh": Function.TANH,
}


def tolerance(dtype: np.dtype[Any] | None) -> float:
    """Relative error of a constant, or of a product of few, that was rounded to *dtype*."""
    if dtype is None or dtype.kind != "f":
        return 0.0
    return 2.0 * float(np.finfo(dtype).eps)


# -- naming the function ---------------------------------------------------------------------------

_Found = tuple[Activation, tuple[float, ...]]

_SQRT_HALF = math.sqrt(0.5)
GELU_SLOPE = math.sqrt(2.0 / math.pi)
GELU_CUBIC = 0.044715


def identify(form: Form, algebra: ScalarAlgebra) -> _Found | NearMiss | None:
    """The activation that *form* is, or is but for a constant."""
    if len(form.atoms) != 1:
        return None
    term = form.atoms[0]
    assert term.atom is not None
    shape = _Shape(term.coefficient, term.power, term.atom.argument, form.polynomial, algebra)
    match term.atom.function, term.power:
        case Function.RELU, 0:
            return _hinge(shape)
        case Function.STEP, 0:
            return _step(shape)
        case Function.STEP, 1:
            return _hard_gate(shape)
        case Function.SIGMOID, 0 | 1:
            return _sigmoid(shape)
        case Function.TANH, 1:
            return _tanh_gate(shape)
        case Function.ERF, 1:
            return _gelu(shape)
        case Function.SOFTPLUS, 0:
            return _softplus(shape)
    return None


def readings(
    region: Region, node: Node, facts: Facts
) -> Iterator[tuple[Tensor, Reader, _Found | NearMiss | None]]:
    """*node* as a function of each tensor that its *region* depends on, the nearest first.

    With what read it, and the activation that it is, if any; tensors of which it is no function
    of a known kind are left out.
    """
    for x in region.tensors:
        algebra = ScalarAlgebra(tolerance(facts.dtype(x)))
        reader = Reader(facts, x, algebra)
        try:
            found = identify(reader.read_node(node), algebra)
        except NoFormError as error:
            if error.is_final:
                return
            continue
        yield x, reader, found


def named_at(node: Node, facts: Facts) -> Activation | None:
    """The activation that *node* ends, written out; whether it could be raised or not."""
    region = Region.behind(node, facts)
    if region.is_promising:
        for _, _, found in readings(region, node, facts):
            if found is not None and not isinstance(found, NearMiss):
                return found[0]
    return None


@dataclass(frozen=True)
class _Shape:
    """``rest(x) + coefficient x^power f(argument(x))``."""

    coefficient: float
    power: int
    argument: Form
    rest: dict[int, float]
    algebra: ScalarAlgebra

    def is_plain(self, coefficient: float = 1.0) -> bool:
        """Whether there is nothing but the function, times *coefficient*."""
        return not self.rest and self.algebra.near(self.coefficient, coefficient)


def _hinge(shape: _Shape) -> _Found | None:
    """``rest + c relu(x + b)``."""
    near = shape.algebra.near
    slope, offset = shape.rest.get(1, 0.0), shape.rest.get(0, 0.0)
    bend = shape.argument.polynomial.get(0, 0.0)
    if set(shape.rest) - {0, 1}:
        return None
    if not slope and near(shape.coefficient, 1.0) and near(offset, -bend):
        if not offset:
            return Activation.RELU, ()
        return Activation.CLIP, (offset, math.inf)
    if near(slope, 1.0) and near(shape.coefficient, -1.0) and not offset:
        return Activation.CLIP, (-math.inf, -bend)
    if slope and not offset and not bend and near(slope + shape.coefficient, 1.0):
        return Activation.LEAKY_RELU, (slope,)
    return None


def _step(shape: _Shape) -> _Found | None:
    """``d + c step(a x + b)``."""
    linear = shape.argument.as_linear()
    if linear is None or set(shape.rest) - {0}:
        return None
    near = shape.algebra.near
    bottom = shape.rest.get(0, 0.0)
    slope, offset = linear
    if near(shape.coefficient * slope, 1.0) and near(shape.coefficient * offset, -bottom):
        return Activation.CLIP, (bottom, bottom + shape.coefficient)
    if shape.is_plain():
        return Activation.HARD_SIGMOID, linear
    return None


def _hard_gate(shape: _Shape) -> _Found | NearMiss | None:
    """``c x step(a x + b)``."""
    linear = shape.argument.as_linear()
    if linear is None or shape.rest:
        return None
    near = shape.algebra.near
    if not shape.is_plain():
        found = {"factor": shape.coefficient, "alpha": linear[0], "beta": linear[1]}
        return NearMiss(Activation.HARD_SWISH, found)
    if near(linear[0], 1.0 / 6.0) and near(linear[1], 0.5):
        return Activation.HARD_SWISH, (1.0 / 6.0, 0.5)
    return Activation.GATED_HARD_SIGMOID, linear


def _sigmoid(shape: _Shape) -> _Found | NearMiss | None:
    """``c x^p sigmoid(u)``."""
    linear = shape.argument.as_linear()
    if linear is None:
        return _gelu_by_sigmoid(shape)
    if shape.rest or linear[1]:
        return None
    if shape.is_plain():
        slope = 1.0 if shape.algebra.near(linear[0], 1.0) else linear[0]
        return (Activation.SWISH if shape.power else Activation.SIGMOID), (slope,)
    if shape.power:
        return NearMiss(Activation.SWISH, {"factor": shape.coefficient})
    return None


def _gelu_by_sigmoid(shape: _Shape) -> _Found | None:
    """``x sigmoid(2 z) = x (1 + tanh z) / 2``."""
    cubic = shape.argument.polynomial
    if shape.power != 1 or not shape.is_plain() or set(cubic) != {1, 3}:
        return None
    near = shape.algebra.near
    if near(cubic[1], 2.0 * GELU_SLOPE) and near(cubic[3], 2.0 * GELU_SLOPE * GELU_CUBIC):
        return Activation.GELU_TANH, ()
    return None


def _tanh_gate(shape: _Shape) -> _Found | NearMiss | None:
    """``p x + c x tanh(u)``: Mish, and GELU by its approximation."""
    near = shape.algebra.near
    inner = shape.argument
    if shape.algebra.same(inner, shape.algebra.apply(Function.SOFTPLUS, Form.linear(1.0))):
        if shape.is_plain():
            return Activation.MISH, ()
        return None if shape.rest else NearMiss(Activation.MISH, {"factor": shape.coefficient})
    cubic = inner.polynomial
    if inner.atoms or set(cubic) != {1, 3} or set(shape.rest) != {1}:
        return None
    if (
        near(shape.coefficient, 0.5)
        and near(shape.rest[1], 0.5)
        and near(cubic[1], GELU_SLOPE)
        and near(cubic[3], GELU_SLOPE * GELU_CUBIC)
    ):
        return Activation.GELU_TANH, ()
    found = {
        "factor": shape.coefficient,
        "linear": shape.rest[1],
        "slope": cubic[1],
        "cubic": cubic[3],
    }
    return NearMiss(Activation.GELU_TANH, found)


def _gelu(shape: _Shape) -> _Found | NearMiss | None:
    """``p x + c x erf(a x)``."""
    linear = shape.argument.as_linear()
    if linear is None or linear[1] or set(shape.rest) != {1}:
        return None
    near = shape.algebra.near
    if near(shape.coefficient, 0.5) and near(shape.rest[1], 0.5) and near(linear[0], _SQRT_HALF):
        return Activation.GELU, ()
    found = {"factor": shape.coefficient, "linear": shape.rest[1], "slope": linear[0]}
    return NearMiss(Activation.GELU, found)


def _softplus(shape: _Shape) -> _Found | None:
    linear = shape.argument.as_linear()
    if linear is None or linear[1] or not shape.algebra.near(linear[0], 1.0):
        return None
    return (Activation.SOFTPLUS, ()) if shape.is_plain() else None
