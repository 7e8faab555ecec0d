"""Writing a chain of operators in the place of one node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pwopt.graph import Dim, Facts, Node, Rewriter, Tensor

__all__ = ["Attributes", "Emitter", "times"]

Attributes = Mapping[str, int | float | str | Sequence[int]]


@dataclass(eq=False)
class Emitter:
    """Adds operators near a node, whose data they replace.

    Attributes:
        rewriter: what writes.
        near: the node whose place they take.
        like: a tensor of their element type.
        name: the base of their tensors' names.
    """

    rewriter: Rewriter
    near: Node
    like: Tensor
    name: str
    facts: Facts = field(init=False)
    _last: Node | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.facts = Facts(self.rewriter.model)

    def emit(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        shape: Sequence[Dim],
        attributes: Attributes | None = None,
        *,
        like: Tensor | None = None,
    ) -> Tensor:
        """What *op* makes of *inputs*; of the element type of *like*, if given."""
        hint = f"{self.name}/{op}_output"
        out = self.rewriter.variable(hint, self.like if like is None else like, tuple(shape))
        self._last = self.rewriter.add(op, inputs, [out], attributes, near=self.near)
        return out

    def finish(self, result: Tensor) -> None:
        """Let *result*, which has no producer, be what the last operator computes."""
        assert self._last is not None
        self.rewriter.set_output(self._last, 0, result)

    def again(self, node: Node, x: Tensor) -> Tensor:
        """What the elementwise *node* makes of *x* instead of its first input."""
        operands = [x, *(None if t.is_empty() else t for t in node.inputs[1:])]
        return self.emit(node.op, operands, x.shape, dict(node.attrs))

    def reshape(self, x: Tensor, dims: Sequence[int], shape: Sequence[Dim]) -> Tensor:
        """*x* with *dims* as Reshape takes them (0 and -1), and known as *shape*."""
        return self.emit("Reshape", [x, self.integers("shape", dims)], shape)

    def transpose(self, x: Tensor, *perm: int) -> Tensor:
        """*x* with its axes in another order."""
        shape = self.facts.shape(x) or ()
        return self.emit("Transpose", [x], [shape[axis] for axis in perm], {"perm": list(perm)})

    def drop_ends(self, x: Tensor, surplus: Mapping[int, int], shape: Sequence[Dim]) -> Tensor:
        """*x* without the last *surplus* positions of each axis; as it is if there are none."""
        axes = [axis for axis, count in surplus.items() if count]
        if not axes:
            return x
        starts, ends = [0] * len(axes), [-surplus[axis] for axis in axes]
        if not self.facts.has_op("Slice", since=10):
            return self.emit("Slice", [x], shape, {"starts": starts, "ends": ends, "axes": axes})
        bounds = (("starts", starts), ("ends", ends), ("axes", axes))
        return self.emit("Slice", [x, *(self.integers(*bound) for bound in bounds)], shape)

    def integers(self, hint: str, values: Sequence[int]) -> Tensor:
        """A constant list of integers, such as a shape."""
        return self.rewriter.constant(f"{self.name}/{hint}", np.array(values, np.int64))


def times(dim: Dim, factor: int) -> Dim:
    """A multiple of a dimension, where it is known."""
    if factor == 1:
        return dim
    return dim * factor if isinstance(dim, int) else None
