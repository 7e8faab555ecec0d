"""Merge parallel convolutions on one input into one, and what follows all of them with it."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np

from pwopt.graph import ConvFacts, Facts, Node, Rewriter, Tensor
from pwopt.passes.contract import DEFAULT_VARIANT, Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["MergeParallelConv", "MergeParallelConvMatch", "Why"]

Array = np.ndarray[Any, Any]

_DEEP = Variant("deep")
_SHALLOW = Variant("shallow")

# fmt: off
_ACTIVATIONS = (
    "Celu", "Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu",
    "Selu", "Sigmoid", "Softplus", "Softsign", "Swish", "Tanh", "ThresholdedRelu",
)
# fmt: on
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")


@dataclass(frozen=True, eq=False)
class _Branch:
    """An operator as it stands in one of the branches.

    Attributes:
        nodes: one node; an activation and the product with its own input are two (a gate).
        value: what it reads.
        result: what it computes.
        axis: of *result*, the one that its channels are on.
        channels: of *result*, on that axis.
        likeness: operators of which this is equal do the same to their channels.
        is_fused: whether runtimes make it a part of the convolution before.
    """

    nodes: tuple[Node, ...]
    value: Tensor
    result: Tensor
    axis: int
    channels: int
    likeness: Hashable
    is_fused: bool

    @property
    def node(self) -> Node:
        return self.nodes[0]


_Layer = tuple[_Branch, ...]
"""Equal operators side by side, one of each branch."""


@dataclass(frozen=True, eq=False)
class MergeParallelConvMatch(Match):
    """Convolutions on one input, and the equal operators behind them.

    Attributes:
        layers: the convolutions and what follows; in each, branches stand in the same order.
        shallow: how many of the layers are the convolutions and what runtimes fuse into them.
        concat: a Concat that takes the branches' ends in their order, if there is one.
    """

    layers: tuple[_Layer, ...]
    shallow: int
    concat: Node | None


class Why(StrEnum):
    """Reasons to decline."""

    NO_CONV_BESIDE = "no-conv-beside"
    WEIGHT_NOT_CONSTANT = "weight-not-constant"
    NOT_FLOAT = "not-float"
    GROUPED = "grouped"
    GEOMETRY_DIFFERS = "geometry-differs"
    SUM_FOLLOWS = "sum-follows"
    ACTIVATION_DIFFERS = "activation-differs"
    PART_OF_GROUP = "part-of-group"


@dataclass(frozen=True)
class MergeParallelConv(Pass[MergeParallelConvMatch]):
    """Merge parallel Convs on one input into one, with a Split behind it.

    Rewrites:
        Convs of the same geometry that read the same tensor, each with the same activation
        behind it or none, into one Conv, the activation and a Split into the branches. In the
        variant ``deep`` the Split moves on as far as the branches go on alike: through
        activations (``x f(x)`` too), pools, Transposes, and depthwise Convs of equal geometry,
        which become one; and it vanishes if the branches end side by side in a Concat of
        channels. The variant ``shallow`` splits behind the activation.

    Algebra:
        Rows of a matrix are independent: ``[Wa; Wb] x = [Wa x; Wb x]`` (what Szegedy et al. 2015,
        section 5, compute side by side). What acts on channels one by one acts on the
        concatenation as on its pieces. Dense convolutions further on could become the groups of
        one likewise, but would gain nothing, and no other rewrite could take them any more.

    Declines when:
        no other Conv reads the tensor, or only Convs of other geometries, with other activations
        or as operands of a sum (which runtimes fuse with the convolution); it is grouped, as
        groups are counted from the first channel on; weights and biases are not constant or not
        of a floating-point type that NumPy has; an earlier Conv leads the group.

    Exactness:
        ROUNDING, and nearly bitwise: kernels may sum in another order for other sizes.

    When it pays:
        With few output channels, which ONNX Runtime's CPU provider pads to the block of its
        layout, and where the Split costs nothing: it leaves the blocked layout, and a consumer
        that wants it pays for the way back. 1.1 to 1.3 times on two branches that end in one
        Concat; 1.1 to 1.6 on thin heads that end in Transposes (on a whole face detector a gain
        of 2 to 6 percent or more, measured on a busy machine); 1.2 on branches with depthwise
        convolutions whose channels do not fill blocks. Branches that go on into other
        convolutions gain nothing or lose (0.96 on a detector with cross-stage blocks). Lowered to
        Winograd's form afterwards, two 3x3 convolutions share the transform of their input.
    """

    Why = Why

    name: ClassVar[str] = "merge-parallel-conv"
    roots: ClassVar[tuple[str, ...]] = ("Conv",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> MergeParallelConvMatch | Decline:
        """See the class."""
        conv = facts.conv(node)
        if conv is None:
            return Decline(Why.WEIGHT_NOT_CONSTANT)
        beside = [n for n in facts.consumers(conv.input) if facts.is_op(n, "Conv")]
        if len(beside) < 2:
            return Decline(Why.NO_CONV_BESIDE)
        why = _unfit(conv, facts)
        if why is not None:
            return Decline(why)
        group = _group(conv, beside, facts)
        if isinstance(group, Why):
            return Decline(group)
        if group[0].node is not node:
            return Decline(Why.PART_OF_GROUP, {"of": facts.site(group[0].node)})
        return _found(group, facts)

    def variants(self, match: MergeParallelConvMatch) -> tuple[Variant, ...]:
        """Deep first, as a Split next to convolutions costs the most."""
        is_deeper = match.shallow < len(match.layers) or match.concat is not None
        return (_DEEP, _SHALLOW) if is_deeper else (DEFAULT_VARIANT,)

    def rewrite(self, match: MergeParallelConvMatch, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        is_shallow = variant == _SHALLOW
        layers = match.layers[: match.shallow] if is_shallow else match.layers
        concat = None if is_shallow else match.concat
        for branch in (b for layer in layers for b in layer):
            for node in branch.nodes:
                rewriter.remove(node)
        facts = Facts(rewriter.model)
        whole = layers[0][0].value
        for layer in layers:
            whole = _merge(layer, whole, facts, rewriter)
        if concat is None:
            _split(layers[-1], whole, facts, rewriter)
        else:
            _replace(layers[-1], whole, concat, rewriter)


# -- the convolutions ------------------------------------------------------------------------------


def _unfit(conv: ConvFacts, facts: Facts) -> Why | None:
    """Why *conv* cannot be merged with any other on its input."""
    if conv.group != 1:
        return Why.GROUPED
    if not facts.is_float(conv.weight):
        return Why.NOT_FLOAT
    return None if _has_constants(conv, facts) else Why.WEIGHT_NOT_CONSTANT


def _has_constants(conv: ConvFacts, facts: Facts) -> bool:
    return facts.is_constant(conv.weight) and (conv.bias is None or facts.is_constant(conv.bias))


def _group(conv: ConvFacts, beside: Sequence[Node], facts: Facts) -> list[ConvFacts] | Why:
    """All Convs among *beside* that can be one with *conv*, itself included."""
    likeness = _of_conv(conv, facts).likeness
    fit = [c for c in map(facts.conv, beside) if c is not None and _unfit(c, facts) is None]
    alike = [c for c in fit if c.input is conv.input and _of_conv(c, facts).likeness == likeness]
    if len(alike) < 2:
        return Why.GEOMETRY_DIFFERS
    fused = _fused(conv.output, facts)
    if fused == _SUM:
        return Why.SUM_FOLLOWS
    group = [c for c in alike if _fused(c.output, facts) == fused]
    return group if len(group) > 1 else Why.ACTIVATION_DIFFERS


_SUM = "sum"


def _fused(value: Tensor, facts: Facts) -> Hashable:
    """What runtimes fuse into the convolution that computes *value*."""
    follower = _follower(value, 1, 0, facts)
    if follower is not None and follower.is_fused:
        return follower.likeness
    consumer = facts.sole_consumer(value)
    if consumer is None or not facts.is_op(consumer, "Add", "Sum"):
        return None
    is_residual = not any(facts.is_constant(t) for t in consumer.inputs)
    return _SUM if is_residual else None


# -- what follows ----------------------------------------------------------------------------------


def _found(group: Sequence[ConvFacts], facts: Facts) -> MergeParallelConvMatch:
    layers = [tuple(_of_conv(c, facts) for c in group)]
    layers.extend(_followers(layers[0], facts))
    shallow = 2 if len(layers) > 1 and layers[1][0].is_fused else 1
    order, concat = _concat(layers[-1], facts)
    ordered = tuple(tuple(layer[i] for i in order) for layer in layers)
    nodes = [n for layer in ordered for b in layer for n in b.nodes]
    return MergeParallelConvMatch(
        group[0].node,
        (*nodes, *([concat] if concat is not None else [])),
        ordered,
        shallow,
        concat,
        facts={
            "convs": len(group),
            "channels": [group[i].cout for i in order],
            "through": [layer[0].nodes[-1].op for layer in layers[1:]],
            "concat": concat is not None,
        },
    )


def _followers(first: _Layer, facts: Facts) -> Iterator[_Layer]:
    """The layers behind *first* in which all branches are alike."""
    layer = first
    while True:
        found = [_follower(b.result, b.axis, b.channels, facts) for b in layer]
        layer = tuple(b for b in found if b is not None)
        if len(layer) < len(found) or len({b.likeness for b in layer}) > 1:
            return
        yield layer


def _follower(value: Tensor, axis: int, channels: int, facts: Facts) -> _Branch | None:
    """The one operator that reads *value*, if it treats channels, on *axis*, one by one."""
    consumer = facts.sole_consumer(value)
    if consumer is None:
        return _gate(value, axis, channels, facts)
    if consumer.inputs[0] is not value or len(consumer.outputs) != 1:
        return None
    if facts.is_op(consumer, "Transpose"):
        return _transpose(consumer, axis, channels, facts)
    if facts.is_op(consumer, *_ACTIVATIONS) or (axis == 1 and facts.is_op(consumer, *_POOLS)):
        parameters = _parameters(consumer, facts)
        if parameters is None:
            return None
        is_fused = not facts.is_op(consumer, *_POOLS)
        result = consumer.outputs[0]
        return _Branch((consumer,), value, result, axis, channels, parameters, is_fused)
    conv = facts.conv(consumer) if axis == 1 and facts.is_op(consumer, "Conv") else None
    if conv is None or conv.cin != conv.group or not _has_constants(conv, facts):
        return None
    return _of_conv(conv, facts, multiplier=conv.cout // conv.group)


def _gate(value: Tensor, axis: int, channels: int, facts: Facts) -> _Branch | None:
    """``x f(x)``, as exporters spell SiLU."""
    readers = facts.consumers(value)
    if len(value.outputs) != 2 or facts.is_seen_outside(value):
        return None
    inner = next((n for n in readers if facts.is_op(n, *_ACTIVATIONS)), None)
    product = next((n for n in readers if facts.is_op(n, "Mul")), None)
    if inner is None or product is None or facts.sole_consumer(inner.outputs[0]) is not product:
        return None
    parameters = _parameters(inner, facts)
    if parameters is None or inner.inputs[0] is not value:
        return None
    nodes, result = (inner, product), product.outputs[0]
    return _Branch(nodes, value, result, axis, channels, ("Mul", parameters), is_fused=True)


def _transpose(node: Node, axis: int, channels: int, facts: Facts) -> _Branch | None:
    value, result = node.inputs[0], node.outputs[0]
    rank = facts.rank(value)
    if rank is None:
        return None
    perm = facts.attr_ints(node, "perm", tuple(reversed(range(rank))))
    moved = perm.index(axis)
    return _Branch((node,), value, result, moved, channels, ("Transpose", perm), is_fused=False)


def _of_conv(conv: ConvFacts, facts: Facts, multiplier: int | None = None) -> _Branch:
    """A Conv that may stand beside others; a depthwise one has a channel *multiplier*."""
    # Branches are as large, so automatic pads that depend on their size are equal.
    pads = conv.pads if conv.pads is not None else facts.attr_str(conv.node, "auto_pad", "")
    likeness = ("Conv", conv.kernel, conv.strides, conv.dilations, pads, multiplier)
    return _Branch((conv.node,), conv.input, conv.output, 1, conv.cout, likeness, is_fused=False)


def _parameters(node: Node, facts: Facts) -> Hashable | None:
    """All that *node* depends on besides its first input, if that is the same for all channels."""
    found: list[Hashable] = [node.op, tuple(sorted((k, str(v)) for k, v in node.attrs.items()))]
    for tensor in node.inputs[1:]:
        values = facts.constant(tensor)
        if not tensor.is_empty() and (values is None or values.size != 1):
            return None
        found.append(None if values is None else (values.shape, values.tobytes()))
    return tuple(found)


def _concat(layer: _Layer, facts: Facts) -> tuple[list[int], Node | None]:
    """In which order the branches end side by side in one Concat of channels, and that Concat."""
    places = list(range(len(layer)))
    ends = [b.result for b in layer]
    concat = facts.sole_consumer(ends[0])
    if concat is None or not facts.is_op(concat, "Concat"):
        return places, None
    if any(facts.sole_consumer(t) is not concat for t in ends):
        return places, None
    rank = facts.rank(ends[0])
    axis = facts.attr_int(concat, "axis", 1)
    if rank is None or axis % rank != layer[0].axis:
        return places, None
    index = {id(t): i for i, t in enumerate(concat.inputs)}
    order = sorted(places, key=lambda i: index[id(ends[i])])
    if index[id(ends[order[-1]])] - index[id(ends[order[0]])] != len(ends) - 1:
        return places, None
    return order, concat


# -- writing ---------------------------------------------------------------------------------------


def _merge(layer: _Layer, whole: Tensor, facts: Facts, rewriter: Rewriter) -> Tensor:
    """Write one operator for all of *layer*, which reads *whole*; return what it computes."""
    node, *gate = layer[0].nodes
    attributes = dict(node.attrs)
    result = _whole(layer, facts, rewriter)
    if node.op != "Conv":
        inner = rewriter.variable(f"{node.outputs[0].name}/merged", like=result) if gate else result
        rewriter.add(node.op, [whole, *node.inputs[1:]], [inner], attributes, near=node)
        for product in gate:
            rewriter.add("Mul", [whole, inner], [result], near=product)
        return result
    read_the_same = all(b.value is layer[0].value for b in layer)
    if not read_the_same:
        attributes["group"] = sum(facts.attr_int(b.node, "group", 1) for b in layer)
    parameters = _parameters_of_all(layer, facts, rewriter)
    rewriter.add("Conv", [whole, *parameters], [result], attributes, near=node)
    return result


def _whole(layer: _Layer, facts: Facts, rewriter: Rewriter) -> Tensor:
    """A tensor for the results of *layer* side by side."""
    first = layer[0]
    shape = facts.shape(first.result)
    if shape is not None:
        total = sum(b.channels for b in layer)
        shape = (*shape[: first.axis], total, *shape[first.axis + 1 :])
    return rewriter.variable(f"{first.result.name}/merged", like=first.result, shape=shape)


def _parameters_of_all(layer: _Layer, facts: Facts, rewriter: Rewriter) -> list[Tensor]:
    """Weights and, if any branch has one, the bias of the merged convolution."""
    name = layer[0].result.name
    weights: list[Array] = []
    biases: list[Array] = []
    for branch in layer:
        weight, bias = (facts.constant(facts.input(branch.node, index)) for index in (1, 2))
        assert weight is not None
        weights.append(weight)
        biases.append(np.zeros(len(weight), weight.dtype) if bias is None else bias)
    found = [rewriter.constant(f"{name}/weight", np.concatenate(weights))]
    if any(facts.input(b.node, 2) is not None for b in layer):
        found.append(rewriter.constant(f"{name}/bias", np.concatenate(biases)))
    return found


def _split(layer: _Layer, whole: Tensor, facts: Facts, rewriter: Rewriter) -> None:
    sizes = [b.channels for b in layer]
    near = layer[0].nodes[-1]
    outputs = [b.result for b in layer]
    if facts.has_op("Split", since=13):
        lengths = rewriter.constant(f"{whole.name}/split", np.array(sizes, np.int64))
        rewriter.add("Split", [whole, lengths], outputs, {"axis": layer[0].axis}, near=near)
    else:
        rewriter.add("Split", [whole], outputs, {"axis": layer[0].axis, "split": sizes}, near=near)


def _replace(layer: _Layer, whole: Tensor, concat: Node, rewriter: Rewriter) -> None:
    """Let *concat* read *whole* in place of the results of *layer*, or vanish."""
    ends = {id(b.result) for b in layer}
    inputs = [t for t in concat.inputs if id(t) not in ends or t is layer[0].result]
    inputs = [whole if t is layer[0].result else t for t in inputs]
    if len(inputs) > 1:
        rewriter.set_inputs(concat, inputs)
        return
    producer = next(iter(whole.inputs))
    rewriter.remove(concat)
    rewriter.set_output(producer, 0, concat.outputs[0])
