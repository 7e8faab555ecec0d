"""Convolutions as products of thinner ones: placed right, and exact where the kernel allows it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import pwopt
from pwopt.graph import Facts, parse
from pwopt.numerics import lowrank
from pwopt.numerics.lowrank import Method
from pwopt.passes.factorize_conv import (
    FactorizeConv,
    Form,
    SiteFactors,
    form_cost,
    forms,
)
from pwopt.remark import Exactness
from tests.passes import harness
from tests.passes.linear_models import (
    BATCH,
    DTYPES,
    OPSETS,
    Draft,
    Geometry,
    assert_agree,
    channels,
    geometries,
)

Why = FactorizeConv.Why


def conv_model(
    cin: int,
    cout: int,
    geometry: Geometry,
    *,
    group: int = 1,
    size: int = 7,
    batch: int | str = 2,
    opset: int = 17,
    dtype: Any = np.float32,
    **settings: Any,
) -> onnx.ModelProto:
    rank = len(geometry.kernel)
    draft = Draft(np.random.default_rng(0), (batch, cin, *(size,) * rank), dtype, opset)
    return draft.finish(draft.conv("x", cin, cout, geometry, group=group, **settings))


def planned(proto: onnx.ModelProto, form: Form) -> tuple[onnx.ModelProto, FactorizeConv]:
    """*proto* with the composed kernel of random factors in its Conv, and a plan with these."""
    model = parse(proto)
    facts = Facts(model)
    (node,) = model.by_op["Conv"].values()
    conv = facts.conv(node)
    assert conv is not None
    kernel = (
        conv.cout // conv.group,
        conv.cin // conv.group,
        conv.kernel[0],
        math.prod(conv.kernel[1:]),
    )
    rng = np.random.default_rng(1)
    shapes = lowrank.factor_shapes(form.method, kernel, form.ranks)
    groups = [
        tuple(rng.standard_normal(s) / math.sqrt(math.prod(s[1:])) for s in shapes)
        for _ in range(conv.group)
    ]
    composed = np.concatenate([lowrank.compose(form.method, list(g)) for g in groups])
    bias = rng.standard_normal(conv.cout)
    exact = onnx.ModelProto()
    exact.CopyFrom(proto)
    for tensor in exact.graph.initializer:
        old = numpy_helper.to_array(tensor)
        values = composed.reshape(old.shape) if tensor.name == conv.weight.name else bias
        tensor.CopyFrom(numpy_helper.from_array(values.astype(old.dtype), tensor.name))
    plan = {facts.site(node): SiteFactors(form, tuple(groups), bias)}
    return exact, FactorizeConv(plan=plan)


def convs(proto: onnx.ModelProto) -> list[dict[str, Any]]:
    nodes = [n for n in proto.graph.node if n.op_type == "Conv"]
    return [{a.name: onnx.helper.get_attribute_value(a) for a in n.attribute} for n in nodes]


def check(before: onnx.ModelProto, after: onnx.ModelProto, **dims: int) -> None:
    assert_agree(before, after, np.random.default_rng(0), **dims)


# -- golden ----------------------------------------------------------------------------------------

UNEVEN = Geometry((3, 5), (2, 1), (1, 2), (0, 3, 1, 4))


def test_spatial_factors_share_out_strides_dilations_and_pads() -> None:
    before, pass_ = planned(conv_model(6, 8, UNEVEN, size=12), Form(Method.SPATIAL, (4,)))
    after = harness.run_pass(pass_, before)
    first, second = convs(after.model)
    assert (first["kernel_shape"], first["pads"]) == ([3, 1], [0, 0, 1, 0])
    assert (first["strides"], first["dilations"]) == ([2, 1], [1, 1])
    assert (second["kernel_shape"], second["pads"]) == ([1, 5], [0, 3, 0, 4])
    assert (second["strides"], second["dilations"]) == ([1, 1], [1, 2])
    check(before, after.model)


@pytest.mark.parametrize(
    ("form", "kernels"),
    [
        (Form(Method.SPATIAL_REVERSED, (4,)), [[1, 5], [3, 1]]),
        (Form(Method.CHANNEL_OUT, (4,)), [[3, 5], [1, 1]]),
        (Form(Method.CHANNEL_IN, (4,)), [[1, 1], [3, 5]]),
        (Form(Method.BOTTLENECK, (4, 3)), [[1, 1], [3, 5], [1, 1]]),
        (Form(Method.SEPARABLE, (2,)), [[3, 5], [1, 1], [3, 5], [1, 1]]),
    ],
)
def test_each_method(form: Form, kernels: list[list[int]]) -> None:
    before, pass_ = planned(conv_model(6, 8, UNEVEN, size=12), form)
    after = harness.run_pass(pass_, before)
    assert [c["kernel_shape"] for c in convs(after.model)] == kernels
    biases = [len(n.input) == 3 for n in after.model.graph.node if n.op_type == "Conv"]
    assert sum(biases) == 1
    check(before, after.model)


def test_a_pointwise_one_moves_in_its_first_factor() -> None:
    geometry = Geometry.plain(1, pad=1, stride=2)
    before, pass_ = planned(conv_model(6, 8, geometry), Form(Method.POINTWISE, (2,)))
    after = harness.run_pass(pass_, before)
    assert [c["strides"] for c in convs(after.model)] == [[2, 2], [1, 1]]
    check(before, after.model)


@pytest.mark.parametrize("method", [m for m in Method if m is not Method.POINTWISE])
def test_groups_are_factorised_one_by_one(method: Method) -> None:
    ranks = {Method.BOTTLENECK: (2, 3)}.get(method, (2,))
    before, pass_ = planned(conv_model(8, 12, UNEVEN, group=2, size=12), Form(method, ranks))
    after = harness.run_pass(pass_, before)
    assert after.applied == 1
    check(before, after.model)


def test_a_depthwise_one_can_be_spatial() -> None:
    before, pass_ = planned(
        conv_model(6, 6, Geometry.plain(5, pad=2), group=6), Form(Method.SPATIAL, (1,))
    )
    after = harness.run_pass(pass_, before)
    assert [c["group"] for c in convs(after.model)] == [6, 6]
    check(before, after.model)


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_of_kernels(rank: int) -> None:
    geometry = Geometry.plain(3, rank, pad=1, stride=2)
    for form in (Form(Method.CHANNEL_IN, (3,)), Form(Method.SEPARABLE, (2,))):
        before, pass_ = planned(conv_model(6, 8, geometry, size=5), form)
        after = harness.run_pass(pass_, before)
        assert after.applied == 1
        check(before, after.model)


# -- without data ----------------------------------------------------------------------------------


def test_by_name_half_of_the_multiplications_go() -> None:
    before = conv_model(32, 32, Geometry.plain(3, pad=1))
    outcome = harness.run_pass(FactorizeConv(), before)
    assert [c["kernel_shape"] for c in convs(outcome.model)] == [[3, 1], [1, 3]]
    (node, _) = (n for n in outcome.model.graph.node if n.op_type == "Conv")
    weight = next(t for t in outcome.model.graph.initializer if t.name == node.input[1])
    assert list(weight.dims) == [16, 32, 3, 1]


def test_the_best_factors_of_the_weights_without_data() -> None:
    before = conv_model(32, 32, Geometry.plain(3, pad=1))
    outcome = harness.run_pass(FactorizeConv(), before, "channel-out-8")
    first, second = (
        numpy_helper.to_array(t).reshape(t.dims[0], -1).astype(np.float64)
        for t in outcome.model.graph.initializer
        if t.dims[2:] and t.name.startswith("y/")
    )
    (whole,) = (numpy_helper.to_array(t) for t in before.graph.initializer if len(t.dims) == 4)
    values = np.linalg.svd(whole.reshape(32, -1), compute_uv=False)
    error = np.sum((second @ first - whole.reshape(32, -1)) ** 2)
    assert error == pytest.approx(np.sum(values[8:] ** 2), rel=1e-4)


def test_a_method_can_be_asked_for() -> None:
    pass_ = pwopt.passes.parse_spec("factorize-conv:method=separable:keep=0.4")
    names = harness.offered(pass_, conv_model(32, 32, Geometry.plain(3, pad=1)))
    assert names[0] == "separable-2"
    assert all(name.startswith("separable-") for name in names)


def test_forms_have_names_that_can_be_read() -> None:
    model = parse(conv_model(64, 64, Geometry.plain(3, pad=1)))
    (node,) = model.by_op["Conv"].values()
    conv = Facts(model).conv(node)
    assert conv is not None
    found = forms(conv)
    assert {form.method for form in found} == set(Method) - {Method.POINTWISE}
    for form in found:
        assert Form.parse(form.name) == form
        assert form_cost(conv, form) < 64 * 64 * 9


def test_it_never_runs_unless_it_is_asked_for() -> None:
    assert FactorizeConv.exactness is Exactness.APPROXIMATE
    assert not FactorizeConv.by_default


def test_a_pipeline_does_what_it_is_asked_for() -> None:
    pipeline = pwopt.Pipeline([FactorizeConv()])
    after = pipeline.run(conv_model(32, 32, Geometry.plain(3, pad=1)))
    assert [n.op_type for n in after.graph.node] == ["Conv", "Conv"]


# -- reasons to decline ----------------------------------------------------------------------------


def reasons(proto: onnx.ModelProto, pass_: FactorizeConv | None = None, **options: Any) -> set[str]:
    outcome = harness.run_pass(pass_ or FactorizeConv(), proto, **options)
    assert outcome.applied == 0
    return outcome.reasons


def test_weights_that_are_computed() -> None:
    draft = Draft(np.random.default_rng(0), (1, 4, 5, 5))
    weight = draft.add("Identity", [draft.weight("w", draft.noise(4, 4, 3, 3))])
    before = draft.finish(draft.add("Conv", ["x", weight], kernel_shape=[3, 3]))
    assert reasons(before) == {Why.WEIGHT_NOT_CONSTANT.value}


def test_weights_that_may_be_overridden() -> None:
    before = conv_model(16, 16, Geometry.plain(3), opset=8)
    before.graph.input.extend(
        onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims)
        for t in before.graph.initializer
    )
    before.ir_version = 3
    assert harness.run_pass(FactorizeConv(), before).applied == 1
    assert reasons(before, overridable=True) == {Why.WEIGHT_NOT_CONSTANT.value}


def test_pads_that_depend_on_the_size() -> None:
    geometry = replace(Geometry.plain(3, stride=2), auto_pad="SAME_UPPER")
    draft = Draft(np.random.default_rng(0), (1, 16, "h", "w"))
    assert reasons(draft.finish(draft.conv("x", 16, 16, geometry))) == {Why.PADS_UNKNOWN.value}


def test_nothing_is_cheaper_than_what_is_thin_already() -> None:
    assert reasons(conv_model(1, 1, Geometry.plain(1))) == {Why.NOTHING_CHEAPER.value}


def test_a_plan_is_all_that_is_done() -> None:
    before = conv_model(16, 16, Geometry.plain(3))
    assert reasons(before, FactorizeConv(plan={})) == {Why.NOT_PLANNED.value}
    _, pass_ = planned(before, Form(Method.SPATIAL, (4,)))
    other = conv_model(8, 16, Geometry.plain(3))
    assert reasons(other, pass_) == {Why.PLAN_DOES_NOT_FIT.value}


def test_bfloat16_is_left_alone() -> None:
    before = conv_model(16, 16, Geometry.plain(3), opset=22)
    before.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    before.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    for tensor in before.graph.initializer:
        values = numpy_helper.to_array(tensor).ravel()
        tensor.CopyFrom(
            onnx.helper.make_tensor(
                tensor.name, onnx.TensorProto.BFLOAT16, tensor.dims, values.tolist()
            )
        )
    assert reasons(before) == {Why.ELEMENT_TYPE.value}


# -- traps -----------------------------------------------------------------------------------------


def test_shared_weights_stay_for_the_other() -> None:
    draft = Draft(np.random.default_rng(0), (1, 16, 6, 6))
    a = draft.conv("x", 16, 16, Geometry.plain(3, pad=1))
    y = draft.add("Conv", [draft.add("Relu", [a]), *draft.nodes[0].input[1:]], kernel_shape=[3, 3])
    outcome = harness.run_pass(FactorizeConv(), draft.finish(y))
    assert outcome.applied == 2


def test_the_result_may_be_read_by_many_and_be_an_output() -> None:
    draft = Draft(np.random.default_rng(0), (1, 16, 6, 6))
    a = draft.conv("x", 16, 16, Geometry.plain(3, pad=1))
    y = draft.add("Add", [draft.add("Relu", [a]), draft.add("Neg", [a])])
    outcome = harness.run_pass(FactorizeConv(), draft.finish(y, a))
    assert outcome.applied == 1
    assert {o.name for o in outcome.model.graph.output} == {"y", a}


# -- properties ------------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn) -> tuple[onnx.ModelProto, FactorizeConv]:
    rank = draw(st.integers(1, 3))
    geometry = draw(geometries(rank))
    cin, cout, group = draw(channels())
    proto = conv_model(
        cin,
        cout,
        geometry,
        group=group,
        batch=draw(BATCH),
        opset=draw(st.sampled_from(OPSETS)),
        dtype=draw(st.sampled_from(DTYPES)),
        bias=True,
    )
    methods = [Method.CHANNEL_IN, Method.CHANNEL_OUT, Method.BOTTLENECK, Method.SEPARABLE]
    if rank == 2:
        methods += [Method.SPATIAL, Method.SPATIAL_REVERSED]
    if math.prod(geometry.kernel) == 1:
        methods = [Method.POINTWISE]
    method = draw(st.sampled_from(methods))
    ranks = tuple(draw(st.integers(1, 3)) for _ in range(1 + (method is Method.BOTTLENECK)))
    return planned(proto, Form(method, ranks))


def check_case(case: tuple[onnx.ModelProto, FactorizeConv]) -> None:
    before, pass_ = case
    outcome = harness.run_pass(pass_, before)
    if outcome.applied:
        check(before, outcome.model)
    else:
        assert outcome.reasons == {Why.PADS_UNKNOWN.value}


@settings(max_examples=50, deadline=None)
@given(cases())
def test_planned_factors_compute_what_their_product_does(
    case: tuple[onnx.ModelProto, FactorizeConv],
) -> None:
    check_case(case)


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(cases())
def test_planned_factors_compute_what_their_product_does_thoroughly(
    case: tuple[onnx.ModelProto, FactorizeConv],
) -> None:
    check_case(case)
