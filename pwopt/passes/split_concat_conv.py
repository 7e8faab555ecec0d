"""Split a convolution over a Concat into a sum of convolutions, or the reverse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import ConvFacts, Facts, Node, Rewriter, Tensor
from pwopt.numerics import channel_algebra
from pwopt.passes._dimensions import same_but_channels
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["Direction", "SplitConcatConv", "SplitConcatConvMatch"]

Array = np.ndarray[Any, Any]


class Direction(StrEnum):
    """Which of the two forms to write."""

    SPLIT = "split"
    CONCAT = "concat"


@dataclass(frozen=True, eq=False)
class SplitConcatConvMatch(Match):
    """A Conv over pieces of its input's channels, in one of the two forms.

    Attributes:
        pieces: what each part of the weights reads.
        weights: ``[Cout, Ci, *kernel]`` each; a single one ``[Cout, C, *kernel]`` to concatenate.
        bias: of the whole; a new one only where biases were added up.
        removed: the nodes that go.
        addends: operands of the sum that stay, apart from the convolutions.
        output: what the result is known by.
    """

    pieces: tuple[Tensor, ...]
    weights: tuple[Array, ...]
    bias: Tensor | Array | None
    removed: tuple[Node, ...]
    addends: tuple[Tensor, ...]
    output: Tensor


@dataclass(frozen=True)
class SplitConcatConv(Pass[SplitConcatConvMatch]):
    """Split a Conv over a Concat of channels into a sum of Convs, or the reverse.

    Rewrites:
        With ``direction=split``, ``Concat -> Conv`` into one ``Conv`` per piece and a chain of
        ``Add``; the first keeps the bias. With ``direction=concat``, ``Add`` or ``Sum`` of Convs
        of one geometry on different inputs into ``Concat -> Conv``; other operands of the sum
        stay. One instance works in one direction, so it does not undo itself.

    Algebra:
        A convolution sums over its input channels: ``W [a; b] = Wa a + Wb b``, where ``Wa`` and
        ``Wb`` are the columns of W for the channels of a and of b (at every tap of a larger
        kernel alike, padding included: zeros beside the concatenation are zeros beside its
        pieces).

    Declines when:
        no Concat stands before, or one along another axis; its result is a graph output or read
        elsewhere, so it would be made anyway; channels of a piece are not known. In the other
        direction: no sum follows, or no second Conv is an operand of it; the result of the Conv
        is a graph output or read elsewhere; the Convs differ in geometry, in output channels, or
        may differ in the size of their outputs (one is broadcast); they read the same tensor (then
        they are one Conv, see reparameterize). In both: the Conv is grouped; weights (or biases to
        be added up) are not constant or not of a floating-point type that NumPy has, or biases
        leave its range; another Conv, an earlier operand, leads the group.

    Exactness:
        ROUNDING: the order of a sum.

    When it pays:
        ONNX Runtime's CPU provider adds the sum within the second convolution, in place, so the
        copy that is the Concat goes; and a Concat of pieces that do not fill the blocks of its
        layout takes its neighbours out of it. Every further addend is another pass over the
        output, so splitting pays where pieces are larger than the output: 1.2 times on Concat and
        pointwise Conv of 64 + 64 to 16 channels or of 8 x 64 to 64, nothing where outputs are
        more than inputs, or under larger kernels. On whole models no gain has been told from the
        noise of the clock yet (SqueezeNet: 1.00). Concatenating gained nothing on CPU; it spares
        launches where every operator is one.

    Attributes:
        direction: ``split`` or ``concat``.
    """

    direction: Direction = Direction.SPLIT

    class Why(StrEnum):
        """Reasons to decline."""

        NO_CONCAT_BEFORE = "no-concat-before"
        NOT_ON_CHANNELS = "not-on-channels"
        GRAPH_OUTPUT = "graph-output"
        OTHER_READERS = "other-readers"
        GROUPED = "grouped"
        CHANNELS_UNKNOWN = "channels-unknown"
        WEIGHT_NOT_CONSTANT = "weight-not-constant"
        NOT_FLOAT = "not-float"
        NO_SUM_BEHIND = "no-sum-behind"
        NO_CONV_BESIDE = "no-conv-beside"
        SAME_INPUT = "same-input"
        GEOMETRY_DIFFERS = "geometry-differs"
        CHANNELS_DIFFER = "channels-differ"
        SIZE_UNKNOWN = "size-unknown"
        OUT_OF_RANGE = "out-of-range"
        PART_OF_GROUP = "part-of-group"

    name: ClassVar[str] = "split-concat-conv"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> SplitConcatConvMatch | Decline:
        """See the class."""
        if self.direction is Direction.SPLIT:
            return self._match_concat(node, facts)
        return self._match_sum(node, facts)

    # -- Conv over Concat --------------------------------------------------------------------------

    def _match_concat(self, node: Node, facts: Facts) -> SplitConcatConvMatch | Decline:
        conv = facts.conv(node)
        if conv is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        concat = facts.producer(conv.input)
        if concat is None or not facts.is_op(concat, "Concat") or len(concat.inputs) < 2:
            return Decline(self.Why.NO_CONCAT_BEFORE)
        if not _is_on_channels(concat, conv, facts):
            return Decline(self.Why.NOT_ON_CHANNELS)
        if conv.group != 1:
            return Decline(self.Why.GROUPED, {"group": conv.group})
        seen = self._seen(conv.input, facts)
        if seen is not None:
            return Decline(seen)
        sizes = [facts.channels(t) for t in concat.inputs]
        if any(size is None for size in sizes) or 0 in sizes:
            return Decline(self.Why.CHANNELS_UNKNOWN)
        weight = facts.constant(conv.weight)
        if weight is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if not facts.is_float(conv.weight):
            return Decline(self.Why.NOT_FLOAT)
        bounds = np.cumsum([size or 0 for size in sizes])[:-1]
        return SplitConcatConvMatch(
            node,
            (concat, node),
            tuple(concat.inputs),
            tuple(np.split(weight, bounds, axis=1)),
            conv.bias,
            (node, concat),
            (),
            conv.output,
            facts={"channels": [size or 0 for size in sizes]},
        )

    def _seen(self, tensor: Tensor, facts: Facts) -> Why | None:
        """Who but one node sees *tensor*, if anybody does."""
        if facts.is_output(tensor):
            return self.Why.GRAPH_OUTPUT
        return None if facts.is_private(tensor) else self.Why.OTHER_READERS

    # -- sum of Convs ------------------------------------------------------------------------------

    def _match_sum(self, node: Node, facts: Facts) -> SplitConcatConvMatch | Decline:
        conv = facts.conv(node)
        if conv is None:
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        consumers = facts.consumers(conv.output)
        total = next((n for n in consumers if facts.is_op(n, "Add", "Sum")), None)
        if total is None:
            return Decline(self.Why.NO_SUM_BEHIND)
        beside = [facts.conv(facts.producer(t)) for t in total.inputs if t is not conv.output]
        others = [c for c in beside if c is not None and facts.is_op(c.node, "Conv")]
        if not others:
            return Decline(self.Why.NO_CONV_BESIDE)
        seen = self._seen(conv.output, facts)
        if seen is not None:
            return Decline(seen)
        reasons = [self._apart(conv, other, facts) for other in others]
        partners = [c for c, why in zip(others, reasons, strict=True) if why is None]
        if not partners:
            return Decline(reasons[0] or self.Why.NO_CONV_BESIDE)
        members = sorted([conv, *partners], key=lambda c: _place(total.inputs, c.output))
        if members[0] is not conv:
            return Decline(self.Why.PART_OF_GROUP, {"of": facts.site(members[0].node)})
        return self._join(members, node, total, facts)

    def _apart(self, conv: ConvFacts, other: ConvFacts, facts: Facts) -> Why | None:
        """What keeps *other* from being one with *conv*."""
        if conv.group != 1 or other.group != 1:
            return self.Why.GROUPED
        if other.input is conv.input:
            return self.Why.SAME_INPUT
        if _geometry(conv) != _geometry(other):
            return self.Why.GEOMETRY_DIFFERS
        if conv.cout != other.cout:
            return self.Why.CHANNELS_DIFFER
        if not same_but_channels(conv.input, other.input, facts):
            return self.Why.SIZE_UNKNOWN
        return self._seen(other.output, facts)

    def _join(
        self, members: Sequence[ConvFacts], root: Node, total: Node, facts: Facts
    ) -> SplitConcatConvMatch | Decline:
        weights = [facts.constant(c.weight) for c in members]
        given = [w for w in weights if w is not None]
        if len(given) < len(weights):
            return Decline(self.Why.WEIGHT_NOT_CONSTANT)
        if not all(facts.is_float(c.weight) for c in members):
            return Decline(self.Why.NOT_FLOAT)
        biases = [c.bias for c in members if c.bias is not None]
        bias: Tensor | Array | None = biases[0] if biases else None
        if len(biases) > 1:
            values = [facts.constant(b) for b in biases]
            found = [v.astype(np.float64) for v in values if v is not None]
            if len(found) < len(biases):
                return Decline(self.Why.WEIGHT_NOT_CONSTANT)
            bias = channel_algebra.cast(np.sum(found, axis=0), given[0].dtype, may_vanish=True)
            if bias is None:
                return Decline(self.Why.OUT_OF_RANGE)
        outputs = {id(c.output) for c in members}
        return SplitConcatConvMatch(
            root,
            (*(c.node for c in members), total),
            tuple(c.input for c in members),
            (np.concatenate(given, axis=1),),
            bias,
            (total, *(c.node for c in members)),
            tuple(t for t in total.inputs if id(t) not in outputs),
            total.outputs[0],
            facts={"channels": [c.cin for c in members]},
        )

    # -- writing -----------------------------------------------------------------------------------

    def rewrite(
        self,
        match: SplitConcatConvMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        for node in match.removed:
            rewriter.remove(node)
        if self.direction is Direction.SPLIT:
            _write_split(match, rewriter)
        else:
            _write_concat(match, rewriter)


def _write_split(match: SplitConcatConvMatch, rewriter: Rewriter) -> None:
    node, output = match.root, match.output
    total: Tensor | None = None
    for index, (piece, weight) in enumerate(zip(match.pieces, match.weights, strict=True)):
        part = rewriter.variable(f"{output.name}/part", like=output)
        inputs = [piece, rewriter.constant(f"{output.name}/weight", weight.copy())]
        if total is None and isinstance(match.bias, Tensor):
            inputs.append(match.bias)
        rewriter.add("Conv", inputs, [part], dict(node.attrs), near=node)
        if total is None:
            total = part
            continue
        is_last = index == len(match.pieces) - 1
        target = output if is_last else rewriter.variable(f"{output.name}/sum", like=output)
        rewriter.add("Add", [total, part], [target], near=node)
        total = target


def _write_concat(match: SplitConcatConvMatch, rewriter: Rewriter) -> None:
    node, output = match.root, match.output
    (weight,) = match.weights
    first = match.pieces[0]
    shape = Facts(rewriter.model).shape(first)
    assert shape is not None
    whole = rewriter.variable(
        f"{output.name}/pieces", like=first, shape=(shape[0], weight.shape[1], *shape[2:])
    )
    rewriter.add("Concat", match.pieces, [whole], {"axis": 1}, near=node)
    inputs = [whole, rewriter.constant(f"{output.name}/weight", weight)]
    if isinstance(match.bias, Tensor):
        inputs.append(match.bias)
    elif match.bias is not None:
        inputs.append(rewriter.constant(f"{output.name}/bias", match.bias))
    target = output
    if match.addends:
        target = rewriter.variable(f"{output.name}/part", like=output)
        rewriter.add("Sum", [target, *match.addends], [output], near=node)
    rewriter.add("Conv", inputs, [target], dict(node.attrs), near=node)


def _is_on_channels(concat: Node, conv: ConvFacts, facts: Facts) -> bool:
    return facts.attr_int(concat, "axis", 1) in (1, 1 - (conv.spatial_rank + 2))


def _geometry(conv: ConvFacts) -> tuple[object, ...]:
    # Inputs are as large, so automatic pads that depend on their size are equal.
    pads = conv.pads if conv.pads is not None else conv.node.attrs.get("auto_pad")
    return conv.kernel, conv.strides, conv.dilations, pads


def _place(tensors: Sequence[Tensor], tensor: Tensor) -> int:
    return next(i for i, t in enumerate(tensors) if t is tensor)
