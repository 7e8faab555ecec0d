"""Cancel Transposes against each other, across everything that does not mind the layout."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import ClassVar

import numpy as np

from pwopt.graph import Facts, Node, Rewriter, Shape, Tensor
from pwopt.passes._movable import Axes, movable
from pwopt.passes._transpose_region import Plan, find_plan, perm_of
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["EliminateTranspose", "EliminateTransposeMatch"]


@dataclass(frozen=True, eq=False)
class _Bypass:
    """A Transpose that changes nothing."""

    node: Node

    def apply(self, rewriter: Rewriter) -> None:
        rewriter.bypass(self.node, self.node.inputs[0])


@dataclass(frozen=True, eq=False)
class _Flattened:
    """A Transpose that moves axes of size 1 only, and whose readers flatten what they read."""

    node: Node

    def apply(self, rewriter: Rewriter) -> None:
        source, result = self.node.inputs[0], self.node.outputs[0]
        rewriter.remove(self.node)
        rewriter.redirect(result, source)


@dataclass(frozen=True, eq=False)
class _AsReshape:
    """A Transpose that moves axes of size 1 only: a Reshape of *source* to *target*.

    Attributes:
        before: a Reshape that is no longer needed.
    """

    node: Node
    source: Tensor
    target: tuple[int, ...]
    before: Node | None

    def apply(self, rewriter: Rewriter) -> None:
        result = self.node.outputs[0]
        rewriter.remove(self.node)
        if self.before is not None:
            rewriter.remove(self.before)
        shape = rewriter.constant(f"{result.name}/shape", np.array(self.target, np.int64))
        rewriter.add("Reshape", [self.source, shape], [result], near=self.node)


@dataclass(frozen=True, eq=False)
class EliminateTransposeMatch(Match):
    """A Transpose and the change that saves at least one."""

    change: Plan | _Bypass | _Flattened | _AsReshape


@dataclass(frozen=True)
class EliminateTranspose(Pass[EliminateTransposeMatch]):
    """Cancel Transposes, moving them through layout-indifferent operators to meet each other.

    Rewrites:
        A Transpose that permutes nothing goes. Around any other, all operators that could work in
        the layout before it as well as in the one behind it are collected: elementwise operators
        (constants are transposed, scalars stay), Concat, Split, Slice, Pad, reductions, and
        Softmax, LogSoftmax and Hardmax from opset 13 on, whose axes are renamed. Each of them gets
        the layout that leaves the fewest Transposes in all, wherever that is fewer than before:
        ``Transpose(0,3,1,2) -> Relu -> Transpose(0,2,3,1)`` becomes ``Relu``, a residual Add of
        two transposed values takes its Transposes off both, and what is read in both layouts is
        transposed once. Two Transposes in a row become one. A Transpose that only moves axes of
        size 1 and does not cancel becomes a Reshape, merges into the Reshape before it, or
        vanishes into the Reshape or Flatten behind it.

    Algebra:
        Write ``P x`` for ``Transpose(x, perm=p)``. ``Q P x = (P ; Q) x`` with the perm composed as
        ``p[q[i]]``; ``f(P x) = P f(x)`` for elementwise f; ``f_a(P x) = P f_p[a](x)`` for f along
        axis a; ``P x + P y = P (x + y)``; a constant c is ``P (P^-1 c)``. Two layouts with one
        label per operator, and a price per value that is needed in both, make a minimum s-t cut
        (Picard and Ratliff 1975), so the choice is the best for its region, not a greedy one.

        Every rewrite takes away more Transposes than it adds, and their number is finite, so the
        pass comes to an end whatever the order of its sites.

    Declines when:
        the rank is not known although the perm is left at its default; the Transpose permutes
        nothing but stands between two tensors whose names must stay (a graph input and a graph
        output); no choice of layouts in its region (up to 400 operators) saves a Transpose. The
        remark then names the operators around the region that fix their layout.

    Exactness:
        ROUNDING. Values are only moved, but sums of a reduction or a Softmax may be taken in
        another order, and vectorised kernels may treat other elements as the remainder.

    When it pays:
        Always where it applies: a Transpose moves every byte of a tensor through memory and
        computes nothing. Networks exported from frameworks with channels last, and networks with
        lowered pointwise convolutions, are full of pairs that cancel.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        UNKNOWN_RANK = "unknown-rank"
        NAMES_ON_BOTH_SIDES = "names-on-both-sides"
        NOTHING_CANCELS = "nothing-cancels"

    name: ClassVar[str] = "eliminate-transpose"
    roots: ClassVar[tuple[str, ...]] = ("Transpose",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> EliminateTransposeMatch | Decline:
        """See the class."""
        perm = perm_of(node, facts)
        if perm is None:
            return Decline(self.Why.UNKNOWN_RANK)
        if perm == tuple(range(len(perm))):
            if not _can_bypass(node, facts):
                return Decline(self.Why.NAMES_ON_BOTH_SIDES)
            return EliminateTransposeMatch(node, (node,), _Bypass(node))
        plan = find_plan(facts, node.inputs[0], 1, perm, partial(movable, facts=facts))
        if isinstance(plan, Plan):
            return EliminateTransposeMatch(
                node,
                (node, *(n for n in plan.nodes if n is not node)),
                plan,
                facts={
                    "transposes": (plan.before, plan.after),
                    "moved": tuple(sorted({n.op for moved in plan.moved for n in moved.nodes})),
                },
            )
        reshape = _as_reshape(node, perm, facts)
        if reshape is not None:
            return EliminateTransposeMatch(node, (node,), reshape)
        return Decline(self.Why.NOTHING_CANCELS, {"perm": perm, "blocked_by": plan})

    def rewrite(self, match: EliminateTransposeMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        del variant
        match.change.apply(rewriter)
        # The region may have gained without its root, which then has its own turn.
        rewriter.revisit(match.root)


def _can_bypass(node: Node, facts: Facts) -> bool:
    source, result = node.inputs[0], node.outputs[0]
    if facts.is_captured(result):
        return False
    if not facts.is_output(result):
        return True
    is_named = facts.is_output(source) or facts.is_captured(source)
    return facts.producer(source) is not None and not is_named


def _as_reshape(node: Node, perm: Axes, facts: Facts) -> _AsReshape | _Flattened | None:
    """How *node* is a Reshape, if the axes that are not of size 1 keep their order."""
    source, result = node.inputs[0], node.outputs[0]
    shape = facts.shape(source)
    if shape is None or 0 in shape or not facts.has_op("Reshape", since=5):
        return None
    order = [axis for axis in perm if shape[axis] != 1]
    if order != sorted(order):
        return None
    readers = facts.consumers(result)
    has_name = facts.is_output(result) or facts.is_captured(result)
    if readers and not has_name and all(_flattens(n, result, shape, perm, facts) for n in readers):
        return _Flattened(node)
    target = _target(shape, perm)
    if target is None:
        return None
    before = facts.producer(source)
    if facts.is_op(before, "Reshape") and facts.is_private(source) and 0 not in target:
        assert before is not None
        return _AsReshape(node, before.inputs[0], target, before)
    return _AsReshape(node, source, target, None)


def _flattens(node: Node, tensor: Tensor, shape: Shape, perm: Axes, facts: Facts) -> bool:
    """Whether *node* reads the elements of *tensor* in their order, whatever its axes of size 1."""
    if node.inputs[0] is not tensor:
        return False
    if facts.is_op(node, "Reshape"):
        target = facts.constant(facts.input(node, 1))
        return target is not None and 0 not in target
    if not facts.is_op(node, "Flatten"):
        return False
    axis = facts.attr_int(node, "axis", 1)
    axis += len(perm) if axis < 0 else 0
    before = [i for i in range(axis) if shape[i] != 1]
    return before == [i for i in perm[:axis] if shape[i] != 1]


def _target(shape: Shape, perm: Axes) -> tuple[int, ...] | None:
    """What a Reshape to the transposed *shape* reads; at most one size can be inferred."""
    dims = [shape[axis] for axis in perm]
    unknown = [i for i, d in enumerate(dims) if not isinstance(d, int)]
    copied = [i for i in unknown if perm[i] == i] if len(unknown) > 1 else []
    if len(unknown) - len(copied) > 1:
        return None
    return tuple(_size(d, i in copied) for i, d in enumerate(dims))


def _size(dim: int | str | None, is_copied: bool) -> int:
    if isinstance(dim, int):
        return dim
    return 0 if is_copied else -1
