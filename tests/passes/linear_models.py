"""Random linear operators for the tests of the passes that fold into them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from tests.passes import harness

Array = np.ndarray[Any, Any]

OPSETS = harness.OPSETS
DTYPES = (np.float16, np.float32, np.float64)
BATCH: st.SearchStrategy[int | str] = st.one_of(st.sampled_from([1, 2]), st.just("batch"))


@dataclass(frozen=True)
class Geometry:
    """A Conv or ConvTranspose, without its channels."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"

    @classmethod
    def plain(cls, size: int, rank: int = 2, *, pad: int = 0, stride: int = 1) -> Geometry:
        return cls((size,) * rank, (stride,) * rank, (1,) * rank, (pad,) * (2 * rank))

    def attributes(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "dilations": list(self.dilations),
        }
        if self.auto_pad == "NOTSET":
            found["pads"] = list(self.pads)
        else:
            found["auto_pad"] = self.auto_pad
        return found


@dataclass
class Draft:
    """A model under construction: one input ``x``, one output ``y``.

    Attributes:
        shares: whether weights of one kind and shape are one initializer.
    """

    rng: np.random.Generator
    shape: Sequence[int | str]
    dtype: Any = np.float32
    opset: int = 17
    shares: bool = False
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, Array] = field(default_factory=dict)

    def weight(self, hint: str, values: Array) -> str:
        for name, other in self.weights.items():
            if self.shares and name.rstrip("0123456789") == hint and other.shape == values.shape:
                return name
        name = f"{hint}{len(self.weights)}"
        self.weights[name] = np.asarray(values).astype(self.dtype)
        return name

    def noise(self, *shape: int, scale: float = 1.0) -> Array:
        return np.asarray(self.rng.standard_normal(shape)) * scale

    def signed(self, *shape: int) -> Array:
        """Values well away from zero, of either sign."""
        values: Array = self.rng.uniform(0.5, 1.5, shape) * self.rng.choice([-1.0, 1.0], shape)
        return values

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(harness.node(op, inputs, [name], **attributes))
        return name

    def conv(
        self,
        x: str,
        cin: int,
        cout: int,
        geometry: Geometry,
        *,
        group: int = 1,
        bias: bool = True,
        transposed: bool = False,
        **attributes: Any,
    ) -> str:
        shape = (cin, cout // group) if transposed else (cout, cin // group)
        fan_in = math.prod(geometry.kernel) * cin // group
        values = self.noise(*shape, *geometry.kernel, scale=fan_in**-0.5)
        inputs = [x, self.weight("w", values)]
        if bias:
            inputs.append(self.weight("b", self.noise(cout)))
        return self.add(
            "ConvTranspose" if transposed else "Conv",
            inputs,
            **geometry.attributes(),
            group=group,
            **attributes,
        )

    def gemm(self, x: str, cin: int, cout: int, *, bias: bool = True, **attributes: Any) -> str:
        shape = (cout, cin) if attributes.get("transB") else (cin, cout)
        inputs = [x, self.weight("w", self.noise(*shape, scale=cin**-0.5))]
        if bias:
            inputs.append(self.weight("b", self.noise(cout)))
        return self.add("Gemm", inputs, **attributes)

    def matmul(self, x: str, cin: int, cout: int) -> str:
        return self.add("MatMul", [x, self.weight("w", self.noise(cin, cout, scale=cin**-0.5))])

    def batch_normalization(self, x: str, channels: int, **attributes: Any) -> str:
        inputs = [
            x,
            self.weight("scale", self.signed(channels)),
            self.weight("shift", self.noise(channels)),
            self.weight("mean", self.noise(channels)),
            self.weight("var", self.rng.uniform(0.5, 2.0, channels)),
        ]
        return self.add("BatchNormalization", inputs, **attributes)

    def finish(self, y: str, *extra: str, **settings: Any) -> onnx.ModelProto:
        """The model with output *y*, renamed, and further outputs *extra* under their names."""
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == y:
                        names[index] = "y"
        outputs: Mapping[str, Sequence[int | str | None]] = {
            name: self._unknown(name) for name in ("y", *extra)
        }
        settings.setdefault("ir", 10 if self.opset > 21 else 8)
        return harness.model(
            self.nodes,
            {"x": self.shape},
            outputs,
            self.weights,
            opset=self.opset,
            dtype=self.dtype,
            **settings,
        )

    def _unknown(self, _: str) -> list[None]:
        return [None] * len(self.shape)


@st.composite
def geometries(draw: st.DrawFn, rank: int, *, transposed: bool = False) -> Geometry:
    """A kernel of up to 3 with strides, dilations and (asymmetric or automatic) pads."""

    def per_axis(low: int, high: int, times: int = 1) -> tuple[int, ...]:
        values = st.integers(low, high)
        return tuple(draw(st.lists(values, min_size=rank * times, max_size=rank * times)))

    kernel = draw(st.one_of(st.just((1,) * rank), st.just(per_axis(1, 3))))
    modes = ("NOTSET", "VALID") if transposed else ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    auto_pad = draw(st.sampled_from(modes))
    # Runtimes disagree about automatic pads of dilated kernels; ONNX leaves them open.
    dilations = per_axis(1, 2) if auto_pad == "NOTSET" else (1,) * rank
    pads = per_axis(0, 1, 2) if auto_pad == "NOTSET" and draw(st.booleans()) else (0,) * rank * 2
    return Geometry(kernel, per_axis(1, 2), dilations, pads, auto_pad)


@st.composite
def channels(draw: st.DrawFn, *, transposed: bool = False) -> tuple[int, int, int]:
    """Input channels, output channels, and a number of groups that divides both."""
    group = draw(st.integers(1, 3))
    per_group = st.integers(1, 3)
    if draw(st.booleans()):
        return group, group * draw(per_group), group  # depthwise, any multiplier
    return group * draw(per_group), group * draw(per_group), group


@st.composite
def seen_inside(draw: st.DrawFn, proto: onnx.ModelProto) -> onnx.ModelProto:
    """*proto*; in one of four cases with an intermediate value as a further output, in another
    with its weights read by others too, so that they must stay as they are.
    """
    kind = draw(st.sampled_from(["plain", "plain", "output", "weights"]))
    result = onnx.ModelProto.FromString(proto.SerializeToString())
    graph = result.graph
    taken = {value.name for value in graph.output}
    elem = proto.graph.input[0].type.tensor_type.elem_type
    if kind == "output":
        values = [v for v in onnx.shape_inference.infer_shapes(proto).graph.value_info if v.name]
        inner = [v for v in values if v.name not in taken and v.type.tensor_type.elem_type == elem]
        graph.output.extend(draw(st.lists(st.sampled_from(inner), max_size=1)) if inner else [])
    elif kind == "weights":
        for weight in graph.initializer:
            if weight.data_type == elem:
                name = f"{weight.name}/read"
                graph.node.append(harness.node("Abs", [weight.name], [name]))
                graph.output.append(onnx.helper.make_tensor_value_info(name, elem, weight.dims))
    return result


def assert_agree(
    original: onnx.ModelProto,
    rewritten: onnx.ModelProto,
    rng: np.random.Generator,
    *,
    factor: float = 8.0,
    **dims: int,
) -> None:
    """As :func:`harness.assert_same_outputs`; in float64, which ONNX Runtime's convolutions lack
    on CPU, by ONNX's reference implementation.
    """
    elem_type = original.graph.input[0].type.tensor_type.elem_type
    if elem_type != onnx.TensorProto.DOUBLE:
        harness.assert_same_outputs(original, rewritten, rng, factor=factor, **dims)
        return
    feeds = harness.random_feeds(original, rng, **dims)
    for expected, actual in zip(_refer(original, feeds), _refer(rewritten, feeds), strict=True):
        assert actual.dtype == expected.dtype
        scale = max(float(np.abs(expected).max(initial=0.0)), 1e-3)
        limit = factor * harness.TOLERANCE[expected.dtype] * scale
        np.testing.assert_allclose(actual, expected, rtol=0, atol=limit)


def _refer(proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    outputs = ReferenceEvaluator(proto).run(None, dict(feeds))
    assert isinstance(outputs, list)
    return outputs
