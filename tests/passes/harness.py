"""What the tests of all passes share: small graphs in, a pass over them, outputs compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from pwopt.graph import Facts, parse
from pwopt.passes.contract import Pass, Variant
from pwopt.remark import Decline, Kind, Remark
from pwopt.tuning.candidate import Candidate
from pwopt.tuning.driver import Driver

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]

NEWEST_OPSET = 26
OPSETS = (7, 9, 11, 13, 17, 21, NEWEST_OPSET)


@dataclass(frozen=True)
class Outcome:
    """The model after a pass, and the pass's remarks."""

    model: onnx.ModelProto
    remarks: list[Remark]

    @property
    def ops(self) -> list[str]:
        return [node.op_type for node in self.model.graph.node]

    @property
    def applied(self) -> int:
        return sum(r.kind is Kind.APPLIED for r in self.remarks)

    @property
    def reasons(self) -> set[str]:
        return {r.reason for r in self.remarks if r.kind is Kind.DECLINED}


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str | None]],
    outputs: Mapping[str, Sequence[int | str | None] | None],
    weights: Mapping[str, Array] | None = None,
    *,
    opset: int = 17,
    ir: int = 8,
    dtype: Any = np.float32,
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A checked model whose inputs and outputs are of *dtype*; ``None`` is an inferred type."""
    elem = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    initializers = [numpy_helper.from_array(v, k) for k, v in (weights or {}).items()]
    listed = [
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in initializers if ir < 4
    ]
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(k, elem, list(v)) for k, v in inputs.items()] + listed,
        [
            helper.make_tensor_value_info(k, elem, list(v)) if v is not None else _untyped(k)
            for k, v in outputs.items()
        ],
        initializers,
    )
    imports = [helper.make_opsetid("", opset)]
    imports += [helper.make_opsetid(d, v) for d, v in (domains or {}).items()]
    proto = helper.make_model(graph, opset_imports=imports, ir_version=ir)
    if None in outputs.values():
        inferred = onnx.shape_inference.infer_shapes(proto)
        for value, known in zip(proto.graph.output, inferred.graph.output, strict=True):
            value.CopyFrom(known)
    onnx.checker.check_model(proto)
    return proto


def _untyped(name: str) -> onnx.ValueInfoProto:
    return onnx.ValueInfoProto(name=name)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attrs: Any) -> onnx.NodeProto:
    """A node named after its first output."""
    return helper.make_node(op, list(inputs), list(outputs), name=f"n_{outputs[0]}", **attrs)


def run_pass(
    pass_: Pass[Any],
    proto: onnx.ModelProto,
    variant: str | None = None,
    *,
    overridable: bool = False,
) -> Outcome:
    """Run *pass_* over *proto* until nothing is left to do.

    Along the way: ``match`` leaves the graph untouched, the written model passes ONNX's checker
    and comes back from serialisation, and running the pass again changes nothing.
    """
    original = proto.SerializeToString(deterministic=True)
    wrapped = parse(proto)
    if overridable:
        wrapped.overridable = True
    else:
        wrapped.unlist_initializers()
    wrapped.infer_shapes()
    facts = Facts(wrapped)
    before = wrapped.to_proto().SerializeToString(deterministic=True)
    for candidate in list(wrapped.nodes.values()):
        if "*" in pass_.roots or facts.op(candidate) in pass_.roots:
            result = pass_.match(candidate, facts)
            if isinstance(result, Decline):
                assert isinstance(result.why, pass_.Why)
    assert wrapped.to_proto().SerializeToString(deterministic=True) == before, "match wrote"
    driver = Driver(wrapped)
    mark = driver.rewriter.mark()

    def choose(candidate: Candidate) -> Variant:
        if variant is None:
            return candidate.variants[0]
        return next(v for v in candidate.variants if v.name == variant)

    driver.run(pass_, choose)
    remarks = driver.ledger.remarks()
    after = wrapped.to_proto()
    driver.rewriter.rollback(mark)
    assert wrapped.to_proto().SerializeToString(deterministic=True) == before, "undo is incomplete"
    assert proto.SerializeToString(deterministic=True) == original, "the input model was changed"
    again = onnx.load_from_string(after.SerializeToString())
    onnx.checker.check_model(again, full_check=True)
    second = parse(again)
    second.overridable = overridable
    second.infer_shapes()
    repeat = Driver(second)
    assert repeat.run(pass_, choose)[0] == 0, "the pass is not idempotent"
    return Outcome(again, remarks)


def offered(pass_: Pass[Any], proto: onnx.ModelProto) -> list[str]:
    """The variants of *pass_* at the first of its roots where it applies, which there must be."""
    wrapped = parse(proto)
    wrapped.unlist_initializers()
    wrapped.infer_shapes()
    facts = Facts(wrapped)
    roots = (n for n in wrapped.sorted_nodes() if facts.op(n) in pass_.roots)
    matches = [m for m in (pass_.match(n, facts) for n in roots) if not isinstance(m, Decline)]
    assert matches
    return [variant.name for variant in pass_.variants(matches[0])]


def assert_every_variant_agrees(
    pass_: Pass[Any], proto: onnx.ModelProto, *, factor: float = 1.0, **dims: int
) -> list[str]:
    """Each variant of *pass_* applies at its one site and computes the same."""
    names = offered(pass_, proto)
    for name in names:
        outcome = run_pass(pass_, proto, name)
        assert outcome.applied == 1
        rng = np.random.default_rng(0)
        assert_same_outputs(proto, outcome.model, rng, factor=factor, **dims)
    return names


def random_feeds(proto: onnx.ModelProto, rng: np.random.Generator, **dims: int) -> dict[str, Array]:
    """Standard normal inputs; symbolic dims from *dims*, else 2."""
    constants = {t.name for t in proto.graph.initializer}
    feeds: dict[str, Array] = {}
    for value in proto.graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        shape = [
            d.dim_value if d.HasField("dim_value") else dims.get(d.dim_param, 2)
            for d in tensor.shape.dim
        ]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        feeds[value.name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
    return feeds


def run_unoptimized(proto: onnx.ModelProto, feeds: Feeds) -> dict[str, Array]:
    """Outputs by ONNX Runtime on CPU with all graph optimizations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    values = session.run(None, dict(feeds))
    return dict(zip((o.name for o in session.get_outputs()), values, strict=True))


TOLERANCE = {
    np.dtype(np.float16): 4e-3,
    np.dtype(np.float32): 4e-6,
    np.dtype(np.float64): 1e-13,
}


def assert_same_outputs(
    original: onnx.ModelProto,
    rewritten: onnx.ModelProto,
    rng: np.random.Generator,
    *,
    factor: float = 1.0,
    **dims: int,
) -> None:
    """Both models agree on random inputs, up to rounding relative to each output's scale."""
    feeds = random_feeds(original, rng, **dims)
    expected = run_unoptimized(original, feeds)
    actual = run_unoptimized(rewritten, feeds)
    assert list(expected) == list(actual)
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape
        assert actual[name].dtype == reference.dtype
        if reference.dtype.kind != "f":
            np.testing.assert_array_equal(actual[name], reference)
            continue
        scale = max(float(np.abs(reference.astype(np.float64)).max(initial=0.0)), 1e-3)
        error = np.abs(actual[name].astype(np.float64) - reference.astype(np.float64))
        limit = factor * TOLERANCE[reference.dtype] * scale
        assert float(error.max(initial=0.0)) <= limit, f"{name}: {error.max()} > {limit}"


FLOAT = TensorProto.FLOAT
