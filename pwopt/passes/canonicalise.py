"""Bring a graph into the one form that the other passes look for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import Constant, Facts, Node, Rewriter
from pwopt.graph.fold import FOLD_LIMIT, Unfoldable, fold
from pwopt.passes._explicit import EXPLICIT
from pwopt.passes._merge_equal import merge_equal
from pwopt.passes._no_ops import NO_OPS
from pwopt.passes._shape_values import elements, is_shape_arithmetic
from pwopt.passes._steps import Rule, Step, Why
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["Canonicalise", "CanonicaliseMatch"]


@dataclass(frozen=True, eq=False)
class CanonicaliseMatch(Match):
    """A node that is not in canonical form, and the step towards it."""

    step: Step


@dataclass(frozen=True)
class Canonicalise(Pass[CanonicaliseMatch]):
    """Bring the graph into canonical form.

    Rewrites:
        Nodes with constant inputs, and ``Constant`` nodes, into initializers. Shape arithmetic on
        known dimensions (Shape, Size, Gather, Slice, Concat, Squeeze, Unsqueeze and integer
        arithmetic on them) into initializers, even where other dimensions are dynamic; a Reshape
        target that holds dynamic dimensions into one of constants, 0 and -1. Nodes that compute
        nothing into nothing: Identity, Dropout at inference, Cast to the same type, Transpose in
        order, Reshape, Flatten and Expand to the same shape, Slice of everything, Pad by nothing,
        Tile by ones, Concat, Sum, Mean, Max and Min of one, Squeeze after Unsqueeze and the
        reverse, multiplication and division by 1, addition and subtraction of 0. Equal nodes on
        equal inputs into one. ``auto_pad`` into ``pads``; defaults of Conv and ConvTranspose into
        attributes; constant operands of commutative operators to the last place; a Sum of two into
        an Add. Nodes that nobody reads are removed.

    Algebra:
        ``f(c)`` is a constant. ``x * 1 = x / 1 = x - 0 = x``, and ``x + 0 = x`` for integers and
        for the zero of negative sign, which alone leaves ``-0.0`` as it is. ``x + c = c + x``. A
        Reshape keeps the number of elements, so one unknown dimension is what -1 infers, and a
        dimension copied from the same place of the input is a 0. SAME pads a window of reach
        ``r = (k - 1) d + 1`` by ``max((ceil(n / s) - 1) s + r - n, 0)``, the transposed one by
        ``output_padding + r - s``, the odd one at the end for SAME_UPPER (the ONNX operator
        specification).

    Declines when:
        the node is canonical already; its operator is not known, or holds a graph of its own
        (control flow is left alone); its output goes by a name that must stay (a graph output, or
        read by a subgraph); a Dropout trains or its mask is read; a constant result would be larger
        than its inputs and than the limit (option ``fold_limit``, in elements), is not defined
        the same way everywhere, or its operator is not evaluated; a constant is sparse; the size
        that pads or a target depend on is unknown; ``auto_pad`` asks for what is defined in more
        than one way (a stride that passes over more than one element behind the window, a pool
        that rounds up or is dilated, an enlarging convolution whose declared size is not the
        input times the stride); adding zero would turn ``-0.0`` into ``0.0``.

    Exactness:
        ROUNDING. All but folded powers and sums is the same bit for bit.

    When it pays:
        Always: the runtime does most of it by itself at its full optimization level, but the other
        passes see only this form. Initializers that old models list among their inputs are taken
        off that list before (by the caller), without which the runtime folds nothing.
    """

    fold_limit: int = FOLD_LIMIT

    Why = Why

    name: ClassVar[str] = "canonicalise"
    roots: ClassVar[tuple[str, ...]] = ("*",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING
    required: ClassVar[bool] = True

    def match(self, node: Node, facts: Facts) -> CanonicaliseMatch | Decline:
        """See the class."""
        first: Decline | None = None
        for rule in self._rules(node, facts):
            answer = rule(node, facts)
            if isinstance(answer, Step):
                return CanonicaliseMatch(node, (node,), answer, facts={"step": answer.name})
            first = first or answer
        return first or Decline(Why.CANONICAL)

    def rewrite(
        self,
        match: CanonicaliseMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        match.step.apply(rewriter)

    def _rules(self, node: Node, facts: Facts) -> Iterator[Rule]:
        if facts.has_subgraph(node):
            yield _refuse(Why.CONTROL_FLOW)
        elif not facts.is_op(node, node.op) or not facts.has_op(node.op):
            yield _refuse(Why.UNKNOWN_OPERATOR)
        else:
            yield from self._standard_rules(node, facts)
        yield merge_equal

    def _standard_rules(self, node: Node, facts: Facts) -> Iterator[Rule]:
        yield _remove_dead
        if node.op in NO_OPS:
            yield NO_OPS[node.op]
        if node.op == "Constant":
            yield _constant
            return
        if is_shape_arithmetic(node, facts):
            yield _fold_shape
        yield self._fold
        if node.op in EXPLICIT:
            yield EXPLICIT[node.op]

    def _fold(self, node: Node, facts: Facts) -> Step | Decline | None:
        result = fold(facts, node, self.fold_limit)
        if result is Unfoldable.NOT_CONSTANT:
            return None
        if isinstance(result, Unfoldable):
            return Decline(Why(result.value))
        return _freeze(node, facts, result, "fold-constant")


def _refuse(why: Why) -> Rule:
    return lambda node, facts: Decline(why)  # noqa: ARG005 - a rule takes both


def _remove_dead(node: Node, facts: Facts) -> Step | None:
    if not node.outputs or any(facts.is_read(t) for t in node.outputs):
        return None
    return Step("remove-dead", lambda rewriter: rewriter.remove(node))


def _constant(node: Node, facts: Facts) -> Step | Decline | None:
    for key, convert in _CONSTANT_FORMS.items():
        if key in node.attrs:
            return _freeze(node, facts, [convert(node.attrs[key])], "constant-to-initializer")
    return Decline(Why.SPARSE)


_CONSTANT_FORMS: dict[str, Callable[[Any], np.ndarray[Any, Any] | Constant]] = {
    "value": lambda tensor: tensor,
    "value_float": lambda number: np.array(number, np.float32),
    "value_floats": lambda numbers: np.array(numbers, np.float32),
    "value_int": lambda number: np.array(number, np.int64),
    "value_ints": lambda numbers: np.array(numbers, np.int64),
    "value_string": lambda text: np.array(text, object),
    "value_strings": lambda texts: np.array(texts, object),
}


def _freeze(node: Node, facts: Facts, values: Any, name: str) -> Step | Decline:
    for tensor in node.outputs:
        if facts.is_seen_outside(tensor):
            return Decline(Why.KEEPS_NAME, {"output": tensor.name})
    return Step(name, lambda rewriter: rewriter.freeze(node, values))


def _fold_shape(node: Node, facts: Facts) -> Step | Decline | None:
    output = node.outputs[0]
    found = elements(output, facts)
    dtype = facts.dtype(output)
    if found is None or found.known is None or dtype is None:
        return None
    limits = np.iinfo(dtype)
    if not all(limits.min <= value <= limits.max for value in found.known):
        return Decline(Why.NOT_DEFINED)
    values = np.array(found.known, dtype).reshape((-1,) if found.rank else ())
    return _freeze(node, facts, [values], "fold-shape")
