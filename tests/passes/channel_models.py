"""Networks in which channels are split, shuffled and joined, for the passes that rearrange them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st

from tests.passes.linear_models import BATCH, OPSETS, Draft, Geometry

__all__ = ["Net", "networks"]

POINTWISE = Geometry.plain(1)
SPATIAL = Geometry.plain(3, pad=1)
STRIDED = Geometry.plain(3, pad=1, stride=2)


class Net(Draft):
    """A draft with operators that move channels, in the opset's own spelling."""

    def __init__(
        self,
        channels: int = 8,
        *,
        size: int = 4,
        batch: int | str = 2,
        seed: int = 0,
        opset: int = 17,
        dtype: Any = np.float32,
    ) -> None:
        shape = (batch, channels, size, size)
        super().__init__(np.random.default_rng(seed), shape, dtype, opset)
        self.channels = {"x": channels}
        self.sizes = {"x": size}

    # -- plumbing ------------------------------------------------------------------------------

    def integers(self, *values: int) -> str:
        name = f"i{len(self.weights)}"
        self.weights[name] = np.array(values, np.int64)
        return name

    def made(self, name: str, channels: int, size: int) -> str:
        self.channels[name], self.sizes[name] = channels, size
        return name

    def same(self, x: str, op: str, *more: str, **attributes: Any) -> str:
        """An operator whose output has the shape of *x*."""
        return self.made(self.add(op, [x, *more], **attributes), self.channels[x], self.sizes[x])

    # -- layers --------------------------------------------------------------------------------

    def layer(
        self,
        x: str,
        cout: int,
        geometry: Geometry = POINTWISE,
        *,
        group: int = 1,
        bias: bool = True,
        transposed: bool = False,
    ) -> str:
        size = -(-self.sizes[x] // geometry.strides[0])
        y = self.conv(
            x, self.channels[x], cout, geometry, group=group, bias=bias, transposed=transposed
        )
        return self.made(y, cout, size)

    def depthwise(self, x: str, geometry: Geometry = SPATIAL) -> str:
        return self.layer(x, self.channels[x], geometry, group=self.channels[x])

    def relu(self, x: str) -> str:
        return self.same(x, "Relu")

    def pool(self, x: str, *, op: str = "MaxPool", stride: int = 2) -> str:
        attributes = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [stride, stride]}
        size = -(-self.sizes[x] // stride)
        return self.made(self.add(op, [x], **attributes), self.channels[x], size)

    def scaled(self, x: str, op: str = "Mul") -> str:
        values = self.signed(self.channels[x], 1, 1)
        return self.same(x, op, self.weight("s", values))

    # -- what moves channels -------------------------------------------------------------------

    def concat(self, *parts: str) -> str:
        channels = sum(self.channels[p] for p in parts)
        return self.made(self.add("Concat", parts, axis=1), channels, self.sizes[parts[0]])

    def gather(self, x: str, indices: Sequence[int]) -> str:
        y = self.add("Gather", [x, self.integers(*indices)], axis=1)
        return self.made(y, len(indices), self.sizes[x])

    def slice(self, x: str, start: int, end: int) -> str:
        if self.opset < 10:
            y = self.add("Slice", [x], starts=[start], ends=[end], axes=[1])
        else:
            y = self.add("Slice", [x, *(self.integers(v) for v in (start, end, 1))])
        return self.made(y, end - start, self.sizes[x])

    def split(self, x: str, *sizes: int) -> tuple[str, ...]:
        self.add("Split", [x, self.integers(*sizes)] if self.opset >= 13 else [x], axis=1)
        if self.opset < 13:
            self.nodes[-1].attribute.append(onnx.helper.make_attribute("split", list(sizes)))
        names = [f"{self.nodes[-1].output[0]}_{i}" for i in range(len(sizes))]
        self.nodes[-1].output[:] = names
        return tuple(self.made(n, s, self.sizes[x]) for n, s in zip(names, sizes, strict=True))

    def reshape(self, x: str, *target: int) -> str:
        return self.add("Reshape", [x, self.integers(*target)])

    def shuffle(self, x: str, group: int) -> str:
        """As PyTorch exports it."""
        channels, size = self.channels[x], self.sizes[x]
        y = self.reshape(x, 0, group, channels // group, size, size)
        y = self.add("Transpose", [y], perm=[0, 2, 1, 3, 4])
        return self.made(self.reshape(y, -1, channels, size, size), channels, size)

    def halves(self, x: str) -> tuple[str, str]:
        """Every second channel, as the authors of ShuffleNet v2 write it; for a batch of one."""
        half, size = self.channels[x] // 2, self.sizes[x]
        y = self.reshape(x, half, 2, size * size)
        y = self.add("Transpose", [y], perm=[1, 0, 2])
        y = self.reshape(y, 2, -1, half, size, size)
        parts = []
        for index in range(2):
            name = f"i{len(self.weights)}"
            self.weights[name] = np.array(index, np.int64)
            parts.append(self.made(self.add("Gather", [y, name], axis=0), half, size))
        return parts[0], parts[1]


# ONNX's reference implementation, needed for float64, trains before opset 14.
_DTYPES = (np.float32, np.float32, np.float16, np.float64)


@st.composite
def networks(draw: st.DrawFn, *, wide: bool = False) -> onnx.ModelProto:
    """Up to a dozen operators, most of which move channels; every loose end is an output.

    Among them in *wide* networks are those that the lowering passes are for.
    """
    opset = draw(st.sampled_from(OPSETS))
    steps = _STEPS if not wide else (*_STEPS, *_WIDE_STEPS)
    net = Net(
        draw(st.sampled_from([4, 6, 8])),
        batch=draw(BATCH),
        seed=draw(st.integers(0, 99)),
        opset=opset,
        dtype=draw(st.sampled_from(_DTYPES if opset >= 14 and not wide else _DTYPES[:3])),
    )
    net.shares = draw(st.booleans())
    values = ["x"]
    if draw(st.integers(0, 3)):
        values.append(net.layer("x", draw(st.sampled_from([4, 8, 12, 16]))))
    for _ in range(draw(st.integers(1, 10))):
        x = draw(st.sampled_from(values[-3:]))
        made = draw(st.sampled_from(steps))(draw, net, x, values)
        values += [made] if isinstance(made, str) else made
    read = {name for node in net.nodes for name in node.input}
    loose = [name for name in values[1:] if name not in read]
    if draw(st.booleans()):
        loose += draw(st.lists(st.sampled_from(values[1:]), max_size=1))
    last = loose[0]
    extra = list(dict.fromkeys(n for n in loose[1:] if n != last))
    return net.finish(last, *extra, ir=3 if opset < 9 and draw(st.booleans()) else 8)


Step = Callable[[st.DrawFn, Net, str, list[str]], "str | tuple[str, ...]"]


def _dense(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del values
    geometry = draw(st.sampled_from([POINTWISE, SPATIAL, STRIDED]))
    return net.layer(
        x, draw(st.sampled_from([6, 7, 8, 12, 14, 16, 18])), geometry, bias=draw(st.booleans())
    )


def _grouped(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del draw, values
    group = 2 if net.channels[x] % 2 == 0 else 1
    return net.layer(x, net.channels[x], group=group)


def _transposed(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del draw, values
    return net.layer(x, 6, POINTWISE, transposed=True)


def _depthwise(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del values
    return net.depthwise(x, draw(st.sampled_from([SPATIAL, STRIDED])))


def _activation(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del values
    return net.same(x, draw(st.sampled_from(["Relu", "Sigmoid", "LeakyRelu", "Tanh"])))


def _per_channel(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del values
    return net.scaled(x, draw(st.sampled_from(["Mul", "Add", "Div", "PRelu"])))


def _normalised(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del draw, values
    return net.made(net.batch_normalization(x, net.channels[x]), net.channels[x], net.sizes[x])


def _pooled(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del values
    op = draw(st.sampled_from(["MaxPool", "AveragePool"]))
    return net.pool(x, op=op, stride=draw(st.integers(1, 2)))


def _binary(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    alike = [v for v in values if _likeness(net, v) == _likeness(net, x)]
    other = draw(st.sampled_from(alike))
    return net.same(x, draw(st.sampled_from(["Add", "Mul"])), other)


def _likeness(net: Net, x: str) -> tuple[int, int]:
    return net.channels[x], net.sizes[x]


def _shuffled(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str | tuple[str, ...]:
    del values
    if net.channels[x] % 2:
        return net.relu(x)
    if net.shape[0] == 1 and draw(st.booleans()):
        return net.halves(x)
    return net.shuffle(x, 2)


def _gathered(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del values
    channels = net.channels[x]
    if draw(st.integers(0, 3)):
        return net.gather(x, draw(st.permutations(range(channels))))
    indices = st.integers(-channels, channels - 1)
    return net.gather(x, draw(st.lists(indices, min_size=1, max_size=channels)))


def _sliced(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del values
    start = draw(st.integers(0, net.channels[x] - 1))
    return net.slice(x, start, draw(st.integers(start + 1, net.channels[x])))


def _cut(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str | tuple[str, ...]:
    del values
    channels = net.channels[x]
    if channels < 2:
        return net.relu(x)
    first = draw(st.integers(1, channels - 1))
    return net.split(x, first, channels - first)


def _joined(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    fitting = [v for v in values if net.sizes[v] == net.sizes[x]]
    others = draw(st.lists(st.sampled_from(fitting), min_size=1, max_size=2))
    return net.concat(x, *others)


_STEPS: tuple[Step, ...] = (
    _dense,
    _dense,
    _activation,
    _depthwise,
    _shuffled,
    _shuffled,
    _cut,
    _joined,
    _joined,
    _gathered,
    _sliced,
    _per_channel,
    _normalised,
    _pooled,
    _binary,
    _grouped,
    _transposed,
)


def _gated(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del draw, values
    pool = net.made(net.add("GlobalAveragePool", [x]), net.channels[x], 1)
    gate = net.same(net.layer(net.relu(net.layer(pool, 2)), net.channels[x]), "Sigmoid")
    gated = net.same(x, "Mul", gate)
    return net.layer(gated, 8)


def _averaged(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del draw, values
    if net.opset >= 18:
        mean = net.add("ReduceMean", [x, net.integers(2, 3)], keepdims=1)
    else:
        mean = net.add("ReduceMean", [x], axes=[2, 3], keepdims=1)
    return net.same(x, "Mul", mean)


def _swish(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    """Hard-swish as arithmetic."""
    del draw, values
    three, six = (net.weight("c", np.array(v)) for v in (3.0, 6.0))
    inner = net.same(x, "Add", three)
    if net.opset >= 11:
        inner = net.same(inner, "Clip", net.weight("low", np.array(0.0)), six)
    else:
        inner = net.same(inner, "Clip", min=0.0, max=6.0)
    return net.same(net.same(x, "Mul", inner), "Div", six)


def _across(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del draw, values
    return net.same(x, "LRN", size=3, alpha=0.5, beta=0.75, bias=1.0)


def _enlarged(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del values
    if net.sizes[x] > 4:
        return net.relu(x)
    if draw(st.booleans()):
        square = Geometry.plain(2, stride=2)
        y = net.conv(x, net.channels[x], 6, square, transposed=True)
        return net.made(y, 6, 2 * net.sizes[x])
    factors = (1.0, 1.0, 2.0, 2.0)
    if net.opset < 9:
        y = net.add("Upsample", [x], scales=factors, mode="nearest")
    else:
        scales = f"i{len(net.weights)}"
        net.weights[scales] = np.array(factors, np.float32)
        region = f"i{len(net.weights)}"
        net.weights[region] = np.zeros(0, np.float32)
        inputs = [x, region, scales] if net.opset >= 11 else [x, scales]
        y = net.add("Upsample" if net.opset == 9 else "Resize", inputs, mode="nearest")
    return net.layer(net.made(y, net.channels[x], 2 * net.sizes[x]), 6)


def _patched(draw: st.DrawFn, net: Net, x: str, values: list[str]) -> str:
    del draw, values
    if net.sizes[x] % 2:
        return net.relu(x)
    y = net.conv(x, net.channels[x], 5, Geometry.plain(2, stride=2))
    return net.made(y, 5, net.sizes[x] // 2)


_WIDE_STEPS: tuple[Step, ...] = (
    _gated,
    _averaged,
    _swish,
    _across,
    _enlarged,
    _patched,
)
