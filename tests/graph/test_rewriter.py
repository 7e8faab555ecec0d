"""Every change of a graph, and taking it back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from pwopt.errors import InvalidModelError
from pwopt.graph import Constant, Facts, Model, Node, Rewriter, Variable, parse
from tests.graph import samples


def _diamond() -> onnx.ModelProto:
    """``y = (a + c) * b``, ``z = -b`` with ``a = relu(x)``, ``b = abs(a)``, ``c`` constant."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="relu"),
        helper.make_node("Abs", ["a"], ["b"], name="abs"),
        helper.make_node("Add", ["a", "c"], ["s"], name="add"),
        helper.make_node("Mul", ["s", "b"], ["y"], name="mul"),
        helper.make_node("Neg", ["b"], ["z"], name="neg"),
    ]
    graph = helper.make_graph(
        nodes,
        "diamond",
        [samples.value("x")],
        [samples.value("y"), samples.value("z")],
        [samples.weight("c", 3)],
    )
    return samples.model(graph)


def _model() -> Model:
    model = parse(_diamond())
    model.infer_shapes()
    return model


def _node(model: Model, name: str) -> Node:
    return next(n for n in model.nodes.values() if n.name == name)


def _state(model: Model) -> tuple[bytes, object]:
    """What the file would be, and the order of all links."""
    links = [
        (
            node.name,
            [(t.name, [n.name for n in t.outputs], [n.name for n in t.inputs])],
        )
        for node in model.nodes.values()
        for t in (*node.inputs, *node.outputs)
    ]
    return model.to_proto().SerializeToString(deterministic=True), sorted(links)


def _replace(model: Model, rewriter: Rewriter) -> None:
    node = _node(model, "abs")
    output = node.outputs[0]
    rewriter.remove(node)
    rewriter.add("Softplus", [node.inputs[0]], [output], near=node)


def _set_input(model: Model, rewriter: Rewriter) -> None:
    rewriter.set_input(_node(model, "mul"), 0, _node(model, "abs").outputs[0])


def _set_inputs(model: Model, rewriter: Rewriter) -> None:
    add = _node(model, "add")
    rewriter.set_inputs(add, [add.inputs[1], add.inputs[0], None])


def _square(model: Model, rewriter: Rewriter) -> None:
    mul = _node(model, "mul")
    rewriter.set_inputs(mul, [mul.inputs[1], mul.inputs[1]])


def _set_weight(model: Model, rewriter: Rewriter) -> None:
    rewriter.set_weight(_node(model, "add"), 1, np.ones(3, np.float32))


def _append_weight(model: Model, rewriter: Rewriter) -> None:
    rewriter.set_weight(_node(model, "relu"), 2, np.ones(3, np.float32))


def _set_attribute(model: Model, rewriter: Rewriter) -> None:
    rewriter.set_attribute(_node(model, "neg"), "count", 1)
    rewriter.set_attribute(_node(model, "neg"), "count", 2)
    rewriter.set_attribute(_node(model, "neg"), "count", None)
    rewriter.set_attribute(_node(model, "neg"), "other", [1.0])


def _redirect(model: Model, rewriter: Rewriter) -> None:
    rewriter.redirect(_node(model, "abs").outputs[0], _node(model, "relu").outputs[0])


def _bypass(model: Model, rewriter: Rewriter) -> None:
    node = _node(model, "abs")
    assert rewriter.bypass(node, node.inputs[0])


def _bypass_output(model: Model, rewriter: Rewriter) -> None:
    node = _node(model, "neg")
    assert rewriter.bypass(node, node.inputs[0])


def _freeze(model: Model, rewriter: Rewriter) -> None:
    rewriter.freeze(_node(model, "relu"), [np.ones((2, 3), np.float32)])


def _set_output(model: Model, rewriter: Rewriter) -> None:
    rewriter.set_output(_node(model, "abs"), 0, rewriter.variable("fresh"))


def _types(model: Model, rewriter: Rewriter) -> None:
    _replace(model, rewriter)
    rewriter.infer_shapes()


def _drop(model: Model, rewriter: Rewriter) -> None:
    del model
    rewriter.drop_idle_initializers()


CHANGES: dict[str, Callable[[Model, Rewriter], None]] = {
    "replace": _replace,
    "set_input": _set_input,
    "set_inputs": _set_inputs,
    "square": _square,
    "set_weight": _set_weight,
    "append_weight": _append_weight,
    "set_attribute": _set_attribute,
    "redirect": _redirect,
    "bypass": _bypass,
    "bypass_output": _bypass_output,
    "freeze": _freeze,
    "set_output": _set_output,
    "types": _types,
    "drop": _drop,
}


@pytest.mark.parametrize("change", CHANGES)
def test_undo_restores_every_byte_and_link(change: str) -> None:
    model = _model()
    before = _state(model)
    rewriter = Rewriter(model)
    mark = rewriter.mark()
    CHANGES[change](model, rewriter)
    rewriter.rollback(mark)
    assert _state(model) == before
    assert not rewriter.take_touched()


@settings(max_examples=100, deadline=None)
@given(names=st.permutations(sorted(set(CHANGES) - {"set_output"})), keep=st.integers(0, 4))
def test_undo_restores_any_sequence(names: list[str], keep: int) -> None:
    """Changes that no longer apply after others are skipped."""
    model = _model()
    rewriter = Rewriter(model)
    states = []
    for name in names[:6]:
        mark = rewriter.mark()
        before = _state(model)
        try:
            CHANGES[name](model, rewriter)
        except (StopIteration, AssertionError, InvalidModelError):
            rewriter.rollback(mark)
            assert _state(model) == before
        else:
            states.append((mark, before))
    for mark, before in reversed(states[keep:]):
        rewriter.rollback(mark)
        assert _state(model) == before


def test_changes_lists_what_went_and_came() -> None:
    model = _model()
    rewriter = Rewriter(model)
    mark = rewriter.mark()
    node = _node(model, "abs")
    output = node.outputs[0]
    rewriter.remove(node)
    passing = rewriter.add("Sqrt", [node.inputs[0]], [output], near=node)
    rewriter.remove(passing)
    lasting = rewriter.add("Exp", [node.inputs[0]], [output], near=node)
    removed, added = rewriter.changes(mark)
    assert removed == [node]
    assert [n.op for n in added] == ["Exp"]
    assert added[0] is lasting


def test_weights_are_replaced_not_changed() -> None:
    proto = _diamond()
    proto.graph.node.append(helper.make_node("Sub", ["x", "c"], ["other"], name="sub"))
    model = parse(proto)
    Rewriter(model).set_weight(_node(model, "add"), 1, np.ones(3, np.float32))
    facts = Facts(model)
    kept = facts.constant(_node(model, "sub").inputs[1])
    assert kept is not None
    np.testing.assert_array_equal(kept, [0, 1, 2])


# -- bypass ----------------------------------------------------------------------------------------


def _identity(*, source: str = "relu", captured: str = "", extra_output: str = "") -> Model:
    """``y = Identity(t)``, where *source* says what t is."""
    nodes = []
    if source == "relu":
        nodes.append(helper.make_node("Relu", ["x"], ["t"], name="source"))
    nodes.append(helper.make_node("Identity", ["t"], ["y"], name="identity"))
    outputs = [samples.value("y")]
    if captured:
        body = helper.make_graph(
            [helper.make_node("Neg", [captured], ["n"])], "body", [], [samples.value("n")]
        )
        nodes.append(helper.make_node("If", ["f"], ["q"], then_branch=body, else_branch=body))
        outputs.append(samples.value("q"))
    if extra_output:
        outputs.append(samples.value(extra_output))
    inputs = [samples.value("x"), samples.value("f", (), onnx.TensorProto.BOOL)]
    weights = [samples.weight("t", 2, 3)] if source == "constant" else []
    if source == "input":
        inputs.append(samples.value("t"))
    return parse(samples.model(helper.make_graph(nodes, "identity", inputs, outputs, weights)))


def test_a_graph_output_passes_its_name_on() -> None:
    model = _identity()
    node = _node(model, "identity")
    assert Facts(model).can_bypass(node, node.inputs[0])
    assert Rewriter(model).bypass(node, node.inputs[0])
    proto = model.to_proto()
    assert [(n.op_type, list(n.output)) for n in proto.graph.node] == [("Relu", ["y"])]


@pytest.mark.parametrize(
    "why",
    [
        {"source": "input"},
        {"source": "constant"},
        {"captured": "y"},
        {"captured": "t"},
        {"extra_output": "t"},
    ],
    ids=str,
)
def test_a_name_that_must_stay_stops_a_bypass(why: dict[str, str]) -> None:
    model = _identity(**why)
    node = _node(model, "identity")
    before = _state(model)
    assert not Facts(model).can_bypass(node, node.inputs[0])
    assert not Rewriter(model).bypass(node, node.inputs[0])
    assert _state(model) == before


def test_bypass_serves_every_reader() -> None:
    model = _model()
    node = _node(model, "abs")
    assert Rewriter(model).bypass(node, node.inputs[0])
    assert _node(model, "mul").inputs[1] is _node(model, "relu").outputs[0]
    assert _node(model, "neg").inputs[0] is _node(model, "relu").outputs[0]


# -- freeze ----------------------------------------------------------------------------------------


def test_a_frozen_output_keeps_its_name() -> None:
    model = _model()
    Rewriter(model).freeze(_node(model, "relu"), [np.full((2, 3), 2, np.float32)])
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert {t.name for t in proto.graph.initializer} == {"a", "c"}
    assert "relu" not in {n.name for n in proto.graph.node}


def test_a_constant_nodes_data_is_shared_not_copied() -> None:
    values = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "inside")
    values.doc_string = "kept"
    nodes = [
        helper.make_node("Constant", [], ["c"], name="constant", value=values),
        helper.make_node("Add", ["x", "c"], ["y"], name="add"),
    ]
    graph = helper.make_graph(nodes, "constant", [samples.value("x")], [samples.value("y")])
    model = parse(samples.model(graph))
    node = _node(model, "constant")
    held = node.attrs["value"]._values
    Rewriter(model).freeze(node, [node.attrs["value"]])
    frozen = _node(model, "add").inputs[1]
    assert isinstance(frozen, Constant)
    assert frozen._values is held
    written = model.to_proto().graph.initializer[0]
    assert (written.name, written.doc_string) == ("c", "kept")


def test_unread_outputs_of_a_frozen_node_are_dropped() -> None:
    nodes = [
        helper.make_node("Split", ["w"], ["a", "b"], name="split", axis=1),
        helper.make_node("Add", ["x", "a"], ["y"], name="add"),
    ]
    graph = helper.make_graph(
        nodes,
        "split",
        [samples.value("x", (2, 1))],
        [samples.value("y", (2, 1))],
        [samples.weight("w", 2, 2)],
    )
    model = parse(samples.model(graph, opset=13))
    Rewriter(model).freeze(_node(model, "split"), [np.ones((2, 1), np.float32), None])
    assert [t.name for t in model.to_proto().graph.initializer] == ["a"]


# -- what to look at again -------------------------------------------------------------------------


def _touched(model: Model, change: Callable[[Rewriter], object]) -> set[str]:
    rewriter = Rewriter(model)
    change(rewriter)
    names = {n.name for n in rewriter.take_touched()}
    assert not rewriter.take_touched()
    return names


def test_neighbours_of_a_change_are_looked_at_again() -> None:
    model = _model()
    add, mul = _node(model, "add"), _node(model, "mul")
    assert _touched(model, lambda r: r.set_attribute(add, "k", 1)) == {"relu", "add", "mul"}
    relu = _node(model, "relu").outputs[0]
    assert _touched(model, lambda r: r.set_input(mul, 0, relu)) == {"mul", "relu", "abs", "add"}


def test_the_producer_a_removed_node_read_is_looked_at_again() -> None:
    """It may be dead now."""
    model = _model()
    assert _touched(model, lambda r: r.remove(_node(model, "neg"))) == {"abs"}


def test_the_first_reader_stands_for_a_graph_input() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Abs", ["x"], ["b"], name="second"),
        helper.make_node("Neg", ["x"], ["c"], name="third"),
    ]
    outputs = [samples.value(name) for name in "abc"]
    graph = helper.make_graph(nodes, "readers", [samples.value("x")], outputs)
    model = parse(samples.model(graph))
    third = _node(model, "third")
    assert _touched(model, lambda r: r.set_attribute(third, "k", 1)) == {"first", "third"}
    assert _touched(model, lambda r: r.remove(_node(model, "first"))) == {"second"}


def test_keeping_an_input_keeps_its_place_among_the_readers() -> None:
    model = _model()
    add = _node(model, "add")
    relu = _node(model, "relu").outputs[0]
    before = [n.name for n in relu.outputs]
    Rewriter(model).set_inputs(add, list(reversed(add.inputs)))
    assert [n.name for n in relu.outputs] == before


def test_new_variables_take_after_others() -> None:
    model = _model()
    like = _node(model, "relu").outputs[0]
    rewriter = Rewriter(model)
    same = rewriter.variable("v", like=like)
    other = rewriter.variable("v", like=like, shape=(1, "N"))
    assert isinstance(same, Variable)
    assert (same.dtype, tuple(same.shape)) == (np.float32, (2, 3))
    assert (other.dtype, tuple(other.shape)) == (np.float32, (1, "N"))


def test_values_that_were_taken_back_are_freed_at_once() -> None:
    model = _model()
    rewriter = Rewriter(model)
    mark = rewriter.mark()
    values = [np.zeros(3, np.float32), np.zeros((1, 3), np.float32)]
    alive = [weakref.ref(array) for array in values]
    rewriter.set_weight(_node(model, "add"), 1, values.pop())
    rewriter.freeze(_node(model, "abs"), [values.pop()])
    gc.disable()
    try:
        rewriter.rollback(mark)
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()
