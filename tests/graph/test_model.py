"""The model's structure: order, names, captured tensors, constants."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from pwopt.errors import InvalidModelError
from pwopt.graph import Constant, Facts, Model, Node, Rewriter, Tensor, parse
from tests.graph import samples


def _node(model: Model, name: str) -> Node:
    return next(n for n in model.nodes.values() if n.name == name)


def _tensor(model: Model, name: str) -> Tensor:
    tensors = [t for n in model.nodes.values() for t in model.reads(n)]
    return next(t for t in (*tensors, *model.outputs) if t.name == name)


# -- order -----------------------------------------------------------------------------------------


def test_a_long_chain_is_sorted_without_recursion() -> None:
    proto = samples.chain(5000)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    ordered = parse(proto).sorted_nodes()
    assert [n.name for n in ordered] == [f"n{i}" for i in range(5000)]


def test_sorting_keeps_the_order_of_the_file_where_it_may() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["c"], name="c"),
        helper.make_node("Neg", ["late"], ["d"], name="d"),
        helper.make_node("Abs", ["x"], ["a"], name="a"),
        helper.make_node("Relu", ["x"], ["late"], name="late"),
        helper.make_node("Sum", ["a", "c", "d"], ["y"], name="y"),
    ]
    graph = helper.make_graph(nodes, "order", [samples.value("x")], [samples.value("y")])
    model = parse(samples.model(graph))
    assert [n.name for n in model.sorted_nodes()] == ["c", "a", "late", "d", "y"]
    some = [_node(model, "d"), _node(model, "late")]
    assert [n.name for n in model.sorted_nodes(some)] == ["late", "d"]


def test_a_subgraph_orders_its_node_behind_what_it_reads() -> None:
    proto = samples.branches(direct=True)
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    assert [n.name for n in parse(proto).sorted_nodes()] == ["relu", "branch"]


def test_a_cycle_through_a_subgraph_is_found() -> None:
    body = helper.make_graph(
        [helper.make_node("Neg", ["y"], ["inner"])], "body", [], [samples.value("inner")]
    )
    branch = helper.make_node("If", ["flag"], ["t"], name="if", then_branch=body, else_branch=body)
    graph = helper.make_graph(
        [branch, helper.make_node("Relu", ["t"], ["y"])],
        "cycle",
        [samples.value("flag", (), onnx.TensorProto.BOOL)],
        [samples.value("y")],
    )
    with pytest.raises(InvalidModelError, match="cycle through node 'if'"):
        parse(samples.model(graph))


def test_a_new_node_stands_beside_its_anchor() -> None:
    model = parse(samples.chain(3))
    rewriter = Rewriter(model)
    anchor = _node(model, "n1")
    source = anchor.inputs[0]
    middle = rewriter.variable("middle", like=source)
    rewriter.add("Abs", [source], [middle], near=anchor)
    rewriter.set_input(anchor, 0, middle)
    assert [n.op_type for n in model.to_proto().graph.node] == ["Relu", "Abs", "Relu", "Relu"]


# -- captured tensors ------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_what_subgraphs_read_is_captured(direct: bool) -> None:
    model = parse(samples.branches(direct=direct))
    facts = Facts(model)
    branch = _node(model, "branch")
    assert {t.name for t in model.reads(branch)} == {"flag", "t", "w", "spare"}
    for name in ("t", "w", "spare"):
        assert facts.is_captured(_tensor(model, name)), name
    assert not facts.is_captured(_node(model, "relu").inputs[0])
    assert facts.has_subgraph(branch)
    assert not model.idle_initializers


def test_a_subgraphs_own_initializers_are_not_captured() -> None:
    model = parse(samples.branches(inner_initializer=True))
    assert {t.name for t in model.reads(_node(model, "branch"))} == {"flag", "t", "w", "spare"}
    assert [t.name for t in model.to_proto().graph.initializer] == ["w", "spare"]


def test_nothing_is_captured_by_a_removed_node() -> None:
    model = parse(samples.branches())
    tensor = _node(model, "relu").outputs[0]
    assert model.is_captured(tensor)
    rewriter = Rewriter(model)
    mark = rewriter.mark()
    rewriter.remove(_node(model, "branch"))
    assert not model.is_captured(tensor)
    rewriter.rollback(mark)
    assert model.is_captured(tensor)


def test_the_body_of_a_loop_captures() -> None:
    model = parse(samples.loop())
    assert model.is_captured(_tensor(model, "step"))
    assert not model.is_captured(_tensor(model, "trips"))


# -- names -----------------------------------------------------------------------------------------


def test_new_names_avoid_all_that_exist() -> None:
    model = parse(samples.branches())
    rewriter = Rewriter(model)
    taken = ["x", "flag", "w", "t", "y", "relu", "branch", "inner", "then_y", "negated"]
    names = [rewriter.name(hint) for hint in taken]
    assert not set(names) & set(taken)
    assert len({rewriter.name("x") for _ in range(50)}) == 50
    assert rewriter.name("fresh") == "fresh"
    assert rewriter.name("fresh") != "fresh"


def test_rolled_back_names_are_free_again() -> None:
    rewriter = Rewriter(parse(samples.plain()))
    mark = rewriter.mark()
    first = [rewriter.name("t"), rewriter.name("t"), rewriter.name("new")]
    rewriter.rollback(mark)
    assert [rewriter.name("t"), rewriter.name("t"), rewriter.name("new")] == first


def test_names_of_sparse_initializers_are_taken() -> None:
    assert Rewriter(parse(samples.sparse())).name("s") != "s"


# -- constants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.int64])
def test_sparse_constants_are_read_densely(linear: bool, dtype: type) -> None:
    proto = samples.sparse(linear=linear)
    values = numpy_helper.from_array(np.array([5, 7], dtype), "s")
    proto.graph.sparse_initializer[0].values.CopyFrom(values)
    proto.graph.input[0].type.tensor_type.elem_type = values.data_type
    proto.graph.output[0].type.tensor_type.elem_type = values.data_type
    model = parse(proto)
    dense = Facts(model).constant(_tensor(model, "s"))
    assert dense is not None
    np.testing.assert_array_equal(dense, np.array([[0, 0, 5], [7, 0, 0]], dtype))
    assert dense.dtype == dtype


def test_idle_initializers_are_kept_until_they_are_dropped() -> None:
    model = parse(samples.idle())
    assert model.idle_initializers == ["before", "after"]
    rewriter = Rewriter(model)
    mark = rewriter.mark()
    assert rewriter.drop_idle_initializers() == 2
    assert [t.name for t in model.to_proto().graph.initializer] == ["w"]
    assert rewriter.drop_idle_initializers() == 0
    rewriter.rollback(mark)
    assert model.to_proto() == samples.idle()


def test_idle_sparse_initializers_can_be_dropped() -> None:
    model = parse(samples.sparse(read=False))
    assert Rewriter(model).drop_idle_initializers() == 1
    assert not model.to_proto().graph.sparse_initializer


def test_listed_initializers_are_constants_unless_overridable() -> None:
    model = parse(samples.listed())
    weight = _tensor(model, "w")
    assert isinstance(weight, Constant)
    assert model.is_constant(weight)
    model.overridable = True
    assert not model.is_constant(weight)
    assert Facts(model).constant(weight) is None


def test_unread_constants_leave_the_file() -> None:
    model = parse(samples.plain())
    Rewriter(model).set_weight(_node(model, "add"), 1, np.ones(3, np.float32))
    assert [t.name for t in model.to_proto().graph.initializer] == ["w_1"]


# -- attributes ------------------------------------------------------------------------------------


def test_changing_one_attribute_keeps_the_others_as_they_were() -> None:
    """Graphsurgeon drops kinds it does not know, and cannot write an empty list."""
    model = parse(samples.omitted())
    node = next(n for n in model.nodes.values() if n.op == "Anything")
    before = {a.name: a for a in model.node_proto(node).attribute}
    rewriter = Rewriter(model)
    mark = rewriter.mark()
    rewriter.set_attribute(node, "count", 4)
    rewriter.set_attribute(node, "text", None)
    rewriter.set_attribute(node, "new", [1.5])
    after = {a.name: a for a in model.node_proto(node).attribute}
    assert after.pop("count").i == 4
    assert list(after.pop("new").floats) == [1.5]
    assert after == {k: v for k, v in before.items() if k not in ("count", "text")}
    rewriter.rollback(mark)
    assert {a.name: a for a in model.node_proto(node).attribute} == before


def test_doc_strings_and_metadata_survive_a_change() -> None:
    model = parse(samples.plain())
    Rewriter(model).set_attribute(_node(model, "add"), "hint", 1)
    proto = model.to_proto().graph.node[0]
    assert proto.doc_string == "adds"
    assert [(p.key, p.value) for p in proto.metadata_props] == [("source", "line 3")]


# -- types -----------------------------------------------------------------------------------------


def test_shape_inference_reads_small_constants() -> None:
    target = numpy_helper.from_array(np.array([0, -1], np.int64), "target")
    graph = helper.make_graph(
        [
            helper.make_node("Reshape", ["x", "target"], ["t"]),
            helper.make_node("Relu", ["t"], ["y"]),
        ],
        "shapes",
        [samples.value("x", ("N", 3, 4))],
        [samples.value("y", None)],
        [target],
    )
    model = parse(samples.model(graph))
    model.infer_shapes()
    assert Facts(model).shape(_tensor(model, "t")) == ("N", 12)


def test_sequences_have_no_dtype() -> None:
    nodes = [
        helper.make_node("SequenceConstruct", ["x", "x"], ["s"], name="make"),
        helper.make_node("SequenceLength", ["s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "sequence", [samples.value("x")], [samples.value("y", (), onnx.TensorProto.INT64)]
    )
    model = parse(samples.model(graph))
    model.infer_shapes()
    facts = Facts(model)
    assert facts.dtype(_node(model, "make").outputs[0]) is None
    assert facts.dtype(model.outputs[0]) == np.int64
