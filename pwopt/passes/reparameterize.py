"""Merge a sum of parallel linear branches on one input into one convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pwopt.graph import ConvFacts, Facts, Node, Rewriter, Tensor
from pwopt.numerics import channel_algebra
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["Reparameterize", "ReparameterizeMatch", "Why"]

Array = np.ndarray[Any, Any]
Float64 = npt.NDArray[np.float64]
Ints = tuple[int, ...]

_SUMS = ("Add", "Sum")
_ARITHMETIC = ("Mul", "Add", "Sub", "Div")

_SEARCH_DEPTH = 4
"""How far to look for the common input behind a value that others read, to name the obstacle."""


class Why(StrEnum):
    """Reasons to decline."""

    LEGACY_BROADCAST = "legacy-broadcast"
    ONE_BRANCH = "one-branch"
    NO_CONV = "no-conv"
    DIFFERENT_INPUTS = "different-inputs"
    GRAPH_OUTPUT = "graph-output"
    OTHER_READERS = "other-readers"
    WEIGHT_NOT_CONSTANT = "weight-not-constant"
    NOT_FLOAT = "not-float"
    TRAINING_MODE = "training-mode"
    VARIANCE_NOT_POSITIVE = "variance-not-positive"
    NOT_PER_CHANNEL = "not-per-channel"
    NOT_FINITE = "not-finite"
    PADS_UNKNOWN = "pads-unknown"
    POOL_SKIPS_PADDING = "pool-skips-padding"
    POOL_ROUNDS_UP = "pool-rounds-up"
    BIAS_MEETS_PADDING = "bias-meets-padding"
    PADDING_BETWEEN = "padding-between"
    CHAIN_OF_KERNELS = "chain-of-kernels"
    CHANNELS_DIFFER = "channels-differ"
    STRIDES_DIFFER = "strides-differ"
    DILATIONS_DIFFER = "dilations-differ"
    WINDOWS_DIFFER = "windows-differ"
    MORE_MACS = "more-macs"
    OUT_OF_RANGE = "out-of-range"
    PART_OF_LARGER_SUM = "part-of-larger-sum"


@dataclass(frozen=True, eq=False)
class _Map:
    """A convolution with its parameters, which is what every branch comes to.

    Attributes:
        weight: float64 ``[Cout, Cin/group, *kernel]``.
        bias: float64 ``[Cout]``.
        pads: ``(begin..., end...)`` per spatial axis.
    """

    weight: Float64
    bias: Float64
    group: int
    strides: Ints
    dilations: Ints
    pads: Ints

    @classmethod
    def per_channel(cls, scale: Float64, shift: Float64, rank: int) -> _Map:
        """``scale x + shift``, both ``[C]``, over *rank* spatial axes."""
        ones = (1,) * rank
        weight = scale.reshape(-1, 1, *ones)
        return cls(weight, shift, len(scale), ones, ones, (0,) * (2 * rank))

    @property
    def cout(self) -> int:
        return int(self.weight.shape[0])

    @property
    def cin(self) -> int:
        return int(self.weight.shape[1]) * self.group

    @property
    def kernel(self) -> Ints:
        return self.weight.shape[2:]

    @property
    def is_pointwise(self) -> bool:
        return math.prod(self.kernel) == 1

    @property
    def is_diagonal(self) -> bool:
        return self.is_pointwise and self.group == self.weight.shape[0] == self.weight.size

    def begin(self, axis: int) -> int:
        """Padding before *axis*."""
        return self.pads[axis]

    def reach(self, axis: int) -> int:
        """Distance from the first to the last tap along *axis*."""
        return (self.kernel[axis] - 1) * self.dilations[axis]

    def surplus(self, axis: int) -> int:
        """By how much the windows' first taps range further than the input along *axis*."""
        return self.pads[axis] + self.pads[len(self.kernel) + axis] - self.reach(axis)


@dataclass(frozen=True, eq=False)
class _Branch:
    """One addend: *nodes* lead from *source* to *value*; none of them for the identity."""

    source: Tensor
    nodes: tuple[Node, ...]
    value: Tensor


@dataclass(frozen=True, eq=False)
class _Sum:
    """Nested sums of branches of one input, and of constants.

    Attributes:
        sums: the outermost first.
        first: the first Conv in any branch; before it, none changes the number of channels.
    """

    sums: list[Node]
    branches: list[_Branch]
    constants: list[Tensor]
    first: ConvFacts


@dataclass(frozen=True, eq=False)
class _Window:
    """The geometry of the merged convolution, and where each branch's kernel lies in it."""

    kernel: Ints
    strides: Ints
    dilations: Ints
    pads: Ints
    offsets: tuple[Ints, ...]


@dataclass(frozen=True, eq=False)
class ReparameterizeMatch(Match):
    """A sum of branches, and the convolution that replaces it.

    Attributes:
        source: what all branches read.
        weight: ``[Cout, Cin/group, *kernel]``.
        bias: ``[Cout]``, or ``None`` if it is zero.
    """

    source: Tensor
    window: _Window
    group: int
    weight: Array
    bias: Array | None


@dataclass(frozen=True)
class Reparameterize(Pass[ReparameterizeMatch]):
    """Merge a sum of parallel branches on the same input into one Conv.

    Rewrites:
        ``Add`` or ``Sum`` (nested ones too) of branches that read the same value into one
        ``Conv``: RepVGG's 3x3 + 1x1 + identity, ACNet's 3x3 + 1x3 + 3x1, the diverse branch
        block's 1x1, 1x1 -> KxK and 1x1 -> AveragePool. A branch is a chain of Conv,
        AveragePool, BatchNormalization, and Mul, Add, Sub or Div by a constant per channel; or it
        is empty, which is the identity; a constant per channel may be added as well. At least one
        branch holds a Conv.

    Algebra:
        Convolution is linear in its weights, so branches that see the same window add up:
        ``sum_i (W_i x + b_i) = (sum_i W_i) x + sum_i b_i`` (Ding et al., "ACNet", 2019, eq. 2;
        "RepVGG", 2021, section 3.3). The identity is a 1x1 kernel with the unit matrix, a
        normalisation or a factor per channel one with a diagonal matrix and a bias, AveragePool a
        depthwise kernel of ``1 / K^2``, and a 1x1 before or behind a KxK multiplies into it tap by
        tap (Ding et al., "Diverse Branch Block", 2021, transforms I to VI). Tap j of a kernel with
        padding p and dilation d reads at ``j d - p`` from the window's origin: a smaller kernel
        lies in a larger one at offset ``(P - p) / d``, zeros around it. Fewer groups are
        block-diagonal weights of more.

    Declines when:
        operands broadcast in the style before opset 7; fewer than two operands are computed, or no
        branch holds a Conv; branches read different values (a residual from elsewhere); a value
        inside a branch is a graph output or read elsewhere; parameters are not constant, not of a
        floating-point type that NumPy has, not finite (a division by zero), or vary within
        channels or enlarge the output; a normalisation trains or its variance is not positive; pads
        are not known; a pool leaves padding out of its mean, or rounds its output size up; within
        a branch a bias meets zero padding, a padded 1x1 follows a larger kernel, or two larger
        kernels follow each other; branches differ in channels (one is broadcast), in strides, in
        dilations of kernels larger than 1, or in their windows (one is shifted by no multiple of
        the dilation, or their sizes agree by chance only); MACs would grow (1x3 and 3x1 without a
        3x3 whose zeros they fill); merged weights would leave the range of their type; the sum is
        an operand of one that merges as a whole.

    Exactness:
        ROUNDING. Weights are computed in float64 and rounded once.

    When it pays:
        Nearly always: all branches but the largest cost nothing any more, and with them go their
        additions and passes over memory; two to three times faster for networks in the form that
        they were trained in.
    """

    Why = Why

    name: ClassVar[str] = "reparameterize"
    roots: ClassVar[tuple[str, ...]] = _SUMS
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> ReparameterizeMatch | Decline:
        """See the class."""
        found = _merge(node, facts)
        if isinstance(found, Decline):
            return found
        for outer in _enclosing_sums(node, facts):
            # The whole in one step is rounded once, and is one candidate rather than several.
            if not isinstance(_merge(outer, facts), Decline):
                return Decline(Why.PART_OF_LARGER_SUM, {"sum": facts.site(outer)})
        return found

    def rewrite(
        self,
        match: ReparameterizeMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        root, window = match.root, match.window
        output = root.outputs[0]
        for node in match.nodes:
            rewriter.remove(node)
        inputs = [match.source, rewriter.constant(f"{output.name}/weight", match.weight)]
        if match.bias is not None:
            inputs.append(rewriter.constant(f"{output.name}/bias", match.bias))
        attributes: dict[str, int | list[int]] = {
            "dilations": list(window.dilations),
            "group": match.group,
            "kernel_shape": list(window.kernel),
            "pads": list(window.pads),
            "strides": list(window.strides),
        }
        rewriter.add("Conv", inputs, [output], attributes, near=root)


def _merge(root: Node, facts: Facts) -> ReparameterizeMatch | Decline:
    """The one Conv that the sum *root* is."""
    found = _find(root, facts)
    if isinstance(found, Decline):
        return found
    first, branches = found.first, found.branches
    addends = _read(found, facts)
    if isinstance(addends, Decline):
        return addends
    maps, shift = addends
    window = _align(maps, [facts.shape(b.value) for b in branches])
    if isinstance(window, Why):
        return Decline(window)
    group = math.gcd(*(m.group for m in maps))
    before = sum(_macs(b, facts) for b in branches)
    after = maps[0].cout * first.cin // group * math.prod(window.kernel)
    macs = {"macs_per_position_before": round(before, 1), "macs_per_position_after": after}
    if after > before:
        return Decline(Why.MORE_MACS, macs)
    dtype = facts.dtype(first.weight)
    assert dtype is not None
    weight = channel_algebra.cast(_overlay(maps, window, group), dtype)
    bias = channel_algebra.cast(shift, dtype, may_vanish=True)
    if weight is None or bias is None:
        return Decline(Why.OUT_OF_RANGE)
    return ReparameterizeMatch(
        root,
        (*found.sums, *(n for b in branches for n in reversed(b.nodes))),
        branches[0].source,
        window,
        group,
        weight,
        bias if bias.any() else None,
        facts={"branches": len(branches), "kernel": list(window.kernel), **macs},
    )


def _find(root: Node, facts: Facts) -> _Sum | Decline:
    """The branches that *root* adds up, if they read the same value."""
    if facts.opset < 7:
        return Decline(Why.LEGACY_BROADCAST)
    sums, addends = _flatten(root, facts)
    branches = [_trace(t, facts) for t in addends if not facts.is_constant(t)]
    if len(branches) < 2:
        return Decline(Why.ONE_BRANCH)
    obstacle = _different_inputs(branches, facts)
    if obstacle is not None:
        return obstacle
    convs = [n for b in branches for n in b.nodes if facts.is_op(n, "Conv")]
    if not convs:
        return Decline(Why.NO_CONV)
    first = facts.conv(convs[0])
    if first is None:
        return Decline(Why.WEIGHT_NOT_CONSTANT, {"node": facts.site(convs[0])})
    return _Sum(sums, branches, [t for t in addends if facts.is_constant(t)], first)


def _read(found: _Sum, facts: Facts) -> tuple[list[_Map], Float64] | Decline:
    """Every branch as a convolution, and the sum of all biases."""
    reader = _Reader(facts, found.first.cin, found.first.spatial_rank)
    maps: list[_Map] = []
    for branch in found.branches:
        read = reader.read(branch)
        if isinstance(read, Decline):
            return read
        maps.append(read)
    if len({m.cout for m in maps}) > 1:
        return Decline(Why.CHANNELS_DIFFER, {"channels": [m.cout for m in maps]})
    total = np.sum([m.bias for m in maps], axis=0)
    for constant in found.constants:
        shift = reader.shift(constant, maps[0].cout)
        if isinstance(shift, Why):
            return Decline(shift, {"constant": constant.name})
        total = total + shift
    return maps, total


def _overlay(maps: Sequence[_Map], window: _Window, group: int) -> Float64:
    """The sum of all kernels, each at its place in *window*."""
    cout, width = maps[0].cout, maps[0].cin // group
    total = np.zeros((cout, width, *window.kernel))
    for found, offset in zip(maps, window.offsets, strict=True):
        place = tuple(slice(o, o + k) for o, k in zip(offset, found.kernel, strict=True))
        total[:, :, *place] += channel_algebra.regroup(found.weight, found.group, group)
    return total


# -- the way to the common input -------------------------------------------------------------------


def _flatten(root: Node, facts: Facts) -> tuple[list[Node], list[Tensor]]:
    """All nodes of a nested sum, *root* first, and its addends."""
    sums = [root]
    addends: list[Tensor] = []
    pending = list(reversed(root.inputs))
    while pending:
        tensor = pending.pop()
        producer = facts.producer(tensor)
        if producer is None or not facts.is_op(producer, *_SUMS) or not facts.is_private(tensor):
            addends.append(tensor)
            continue
        sums.append(producer)
        pending.extend(reversed(producer.inputs))
    return sums, addends


def _enclosing_sums(node: Node, facts: Facts) -> Iterator[Node]:
    """The sums that *node* is an operand of, directly or through others, the nearest first."""
    outer = facts.sole_consumer(node.outputs[0])
    while outer is not None and facts.is_op(outer, *_SUMS):
        yield outer
        outer = facts.sole_consumer(outer.outputs[0])


def _trace(value: Tensor, facts: Facts) -> _Branch:
    """The longest chain of linear operators to *value* whose results nobody else reads.

    The common input of several branches has several readers, so no chain goes beyond it.
    """
    nodes: list[Node] = []
    tensor = value
    while facts.is_private(tensor):
        producer = facts.producer(tensor)
        data = _data(producer, facts)
        if producer is None or data is None:
            break
        nodes.insert(0, producer)
        tensor = data
    return _Branch(tensor, tuple(nodes), value)


def _data(node: Node | None, facts: Facts) -> Tensor | None:
    """What *node* computes an affine function of, if it is an operator that branches are of."""
    if node is None:
        return None
    if facts.is_op(node, "Conv", "AveragePool", "BatchNormalization"):
        return node.inputs[0]
    if not facts.is_op(node, *_ARITHMETIC):
        return None
    first, second = node.inputs
    if facts.is_constant(first) == facts.is_constant(second):
        return None
    if facts.is_constant(second):
        return first
    return None if node.op == "Div" else second


def _different_inputs(branches: Sequence[_Branch], facts: Facts) -> Decline | None:
    """Why *branches* do not start from the same value, if they do not."""
    sources = {id(b.source): b.source for b in branches}
    if len(sources) == 1:
        return None
    for source in sources.values():
        others = sources.keys() - {id(source)}
        if not any(id(t) in others for t in _behind(source, facts)):
            continue
        why = Why.GRAPH_OUTPUT if facts.is_output(source) else Why.OTHER_READERS
        return Decline(why, {"value": source.name})
    return Decline(Why.DIFFERENT_INPUTS, {"inputs": [t.name for t in sources.values()]})


def _behind(tensor: Tensor, facts: Facts) -> Iterator[Tensor]:
    """The values that *tensor* is an affine function of, a few operators away at most."""
    level = [tensor]
    for _ in range(_SEARCH_DEPTH):
        further: list[Tensor] = []
        for value in level:
            producer = facts.producer(value)
            data = _data(producer, facts)
            if data is not None:
                further.append(data)
            elif producer is not None and facts.is_op(producer, *_SUMS):
                further.extend(producer.inputs)
        yield from further
        level = further


# -- branches as convolutions ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Reader:
    """Turns branches of an input with *channels* and *rank* spatial axes into convolutions."""

    facts: Facts
    channels: int
    rank: int

    def read(self, branch: _Branch) -> _Map | Decline:
        """The one convolution that *branch* is."""
        ones, zeros = np.ones(self.channels), np.zeros(self.channels)
        whole = _Map.per_channel(ones, zeros, self.rank)
        for node in branch.nodes:
            layer = self._layer(node, whole.cout)
            composed = layer if isinstance(layer, Why) else _compose(whole, layer)
            if isinstance(composed, Why):
                return Decline(composed, {"node": self.facts.site(node)})
            whole = composed
        return whole

    def shift(self, constant: Tensor, channels: int) -> Float64 | Why:
        """The values ``[channels]`` of a constant addend."""
        values = self._vector(constant, channels)
        if isinstance(values, Why):
            return values
        return values if np.isfinite(values).all() else Why.NOT_FINITE

    def _layer(self, node: Node, channels: int) -> _Map | Why:
        if node.op == "Conv":
            return self._conv(node)
        if node.op == "AveragePool":
            return self._pool(node, channels)
        if node.op == "BatchNormalization":
            return self._normalisation(node)
        return self._arithmetic(node, channels)

    def _conv(self, node: Node) -> _Map | Why:
        conv = self.facts.conv(node)
        if conv is None:
            return Why.WEIGHT_NOT_CONSTANT
        if not self.facts.is_float(conv.weight):
            return Why.NOT_FLOAT
        weight, bias = self.facts.constant(conv.weight), self.facts.constant(conv.bias)
        if weight is None or (bias is None and conv.bias is not None):
            return Why.WEIGHT_NOT_CONSTANT
        if conv.pads is None:
            return Why.PADS_UNKNOWN
        shift = np.zeros(conv.cout) if bias is None else bias.astype(np.float64)
        return _Map(
            weight.astype(np.float64), shift, conv.group, conv.strides, conv.dilations, conv.pads
        )

    def _pool(self, node: Node, channels: int) -> _Map | Why:
        facts = self.facts
        ones = (1,) * self.rank
        kernel = facts.attr_ints(node, "kernel_shape", ones)
        strides = facts.attr_ints(node, "strides", ones)
        dilations = facts.attr_ints(node, "dilations", ones)
        if facts.attr_int(node, "ceil_mode", 0) and strides != ones:
            return Why.POOL_ROUNDS_UP
        if facts.attr_str(node, "auto_pad", "NOTSET").startswith("SAME"):
            return Why.PADS_UNKNOWN  # spelled out when the graph is canonicalised, if they are
        pads = facts.window_pads(node, kernel, strides, dilations)
        assert pads is not None
        if any(pads) and not facts.attr_int(node, "count_include_pad", 0):
            return Why.POOL_SKIPS_PADDING
        weight = np.full((channels, 1, *kernel), 1 / math.prod(kernel))
        return _Map(weight, np.zeros(channels), channels, strides, dilations, pads)

    def _normalisation(self, node: Node) -> _Map | Why:
        facts = self.facts
        if facts.attr_int(node, "training_mode", 0) or any(
            not t.is_empty() for t in node.outputs[1:]
        ):
            return Why.TRAINING_MODE
        if facts.opset < 9 and not facts.attr_int(node, "spatial", 1):
            return Why.NOT_PER_CHANNEL
        scale, bias, mean, variance = (facts.constant(t) for t in node.inputs[1:5])
        if scale is None or bias is None or mean is None or variance is None:
            return Why.WEIGHT_NOT_CONSTANT
        if not all(facts.is_float(t) for t in node.inputs[1:5]):
            return Why.NOT_FLOAT
        epsilon = facts.attr_float(node, "epsilon", 1e-5)
        terms = channel_algebra.batch_normalization_affine(scale, bias, mean, variance, epsilon)
        if terms is None:
            return Why.VARIANCE_NOT_POSITIVE
        return _Map.per_channel(*terms, self.rank)

    def _arithmetic(self, node: Node, channels: int) -> _Map | Why:
        constant_first = self.facts.is_constant(node.inputs[0])
        values = self._vector(node.inputs[0 if constant_first else 1], channels)
        if isinstance(values, Why):
            return values
        scale, shift = _terms(node.op, values, constant_first)
        if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
            return Why.NOT_FINITE
        return _Map.per_channel(scale, shift, self.rank)

    def _vector(self, constant: Tensor, channels: int) -> Float64 | Why:
        """The values ``[channels]`` of an operand that varies along axis 1 at most."""
        values = self.facts.constant(constant)
        if values is None or not self.facts.is_float(constant):
            return Why.NOT_FLOAT
        rank = self.rank + 2
        shape = (1,) * (rank - values.ndim) + values.shape
        if len(shape) > rank or values.size != shape[1] or values.size not in (1, channels):
            return Why.NOT_PER_CHANNEL
        return np.broadcast_to(values.reshape(-1).astype(np.float64), (channels,))


def _terms(op: str, constant: Float64, constant_first: bool) -> tuple[Float64, Float64]:
    """Scale and shift of *op* by *constant*."""
    ones, zeros = np.ones_like(constant), np.zeros_like(constant)
    if op == "Mul":
        return constant, zeros
    if op == "Div":
        with np.errstate(divide="ignore", over="ignore"):
            return ones / constant, zeros
    if op == "Add":
        return ones, constant
    return (-ones, constant) if constant_first else (ones, -constant)


def _compose(first: _Map, second: _Map) -> _Map | Why:
    """*first*, then *second*, as one; where one of them is pointwise."""
    if any(second.pads) and first.bias.any():
        return Why.BIAS_MEETS_PADDING
    strides = _times(first.strides, second.strides)
    if first.is_pointwise:
        dilations = _times(first.strides, second.dilations)
        stretched = _times(first.strides * 2, second.pads)
        pads = tuple(p + q for p, q in zip(first.pads, stretched, strict=True))
    elif not second.is_pointwise:
        return Why.CHAIN_OF_KERNELS
    elif any(second.pads):
        return Why.PADDING_BETWEEN
    else:
        dilations, pads = first.dilations, first.pads
    weight, group = _product(first, second)
    response = channel_algebra.constant_response(second.weight, first.bias, group=second.group)
    return _Map(weight, second.bias + response, group, strides, dilations, pads)


def _product(first: _Map, second: _Map) -> tuple[Float64, int]:
    """Weights and groups; diagonal ones, which are the usual ones, without a matrix product."""
    if first.is_diagonal:
        scale = first.weight.reshape(-1)
        return channel_algebra.scale_inputs(second.weight, scale, group=second.group), second.group
    if second.is_diagonal:
        return channel_algebra.scale_outputs(first.weight, second.weight.reshape(-1)), first.group
    return channel_algebra.compose(
        first.weight, second.weight, first_group=first.group, second_group=second.group
    )


def _times(a: Ints, b: Ints) -> Ints:
    return tuple(p * q for p, q in zip(a, b, strict=True))


# -- one window for all ----------------------------------------------------------------------------


def _align(maps: Sequence[_Map], shapes: Sequence[tuple[Any, ...] | None]) -> _Window | Why:
    """The smallest window that holds those of all *maps*, whose results have *shapes*."""
    if len({m.strides for m in maps}) > 1:
        return Why.STRIDES_DIFFER
    kernel, dilations, begins, ends = [], [], [], []
    offsets: list[list[int]] = [[] for _ in maps]
    for axis in range(len(maps[0].kernel)):
        steps = {m.dilations[axis] for m in maps if m.kernel[axis] > 1}
        if len(steps) > 1:
            return Why.DILATIONS_DIFFER
        step = next(iter(steps), 1)
        begin = max(m.begin(axis) for m in maps)
        surpluses = {m.surplus(axis) for m in maps}
        if any((begin - m.begin(axis)) % step for m in maps):
            return Why.WINDOWS_DIFFER
        if len(surpluses) > 1 and not _same_size(shapes, axis):
            return Why.WINDOWS_DIFFER
        for found, places in zip(maps, offsets, strict=True):
            places.append((begin - found.begin(axis)) // step)
        taps = max(o[axis] + m.kernel[axis] for m, o in zip(maps, offsets, strict=True))
        kernel.append(taps)
        dilations.append(step)
        begins.append(begin)
        # Any of the surpluses gives the size that all results have; the smallest pads least.
        ends.append(min(surpluses) + (taps - 1) * step - begin)
    return _Window(
        tuple(kernel),
        maps[0].strides,
        tuple(dilations),
        (*begins, *ends),
        tuple(tuple(o) for o in offsets),
    )


def _same_size(shapes: Sequence[tuple[Any, ...] | None], axis: int) -> bool:
    """Whether all results are known to be as long along spatial *axis*."""
    sizes = {None if s is None else s[axis + 2] for s in shapes}
    return len(sizes) == 1 and all(isinstance(s, int) for s in sizes)


def _macs(branch: _Branch, facts: Facts) -> float:
    """Multiply-accumulates of *branch* per position of its result; at least that many."""
    total, positions = 0.0, 1.0
    for node in reversed(branch.nodes):
        if not facts.is_op(node, "Conv", "AveragePool"):
            continue
        conv = facts.conv(node)
        if conv is not None:
            width = conv.cin // conv.group
            total += positions * conv.cout * width * math.prod(conv.kernel)
        positions *= _input_positions(node, facts)
    return total


def _input_positions(node: Node, facts: Facts) -> float:
    """Input positions of a sliding window per output position; a lower bound where not known."""
    before, behind = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    conv = facts.conv(node)
    kernel = facts.attr_ints(node, "kernel_shape", ()) if conv is None else conv.kernel
    ones = (1,) * len(kernel)
    strides = facts.attr_ints(node, "strides", ones)
    dilations = facts.attr_ints(node, "dilations", ones)
    pads = facts.window_pads(node, kernel, strides, dilations)
    assert pads is not None
    ratios: list[float] = []
    for axis, (taps, step) in enumerate(zip(kernel, dilations, strict=True)):
        sizes = [None if s is None else s[axis + 2] for s in (before, behind)]
        longer, shorter = sizes
        if isinstance(longer, int) and isinstance(shorter, int) and shorter > 0:
            ratios.append(longer / shorter)
            continue
        # Of n input positions come at most n + surplus output ones, and n >= 1.
        surplus = pads[axis] + pads[len(kernel) + axis] - (taps - 1) * step
        ratios.append(1 / (1 + max(surplus, 0)))
    return math.prod(ratios)
