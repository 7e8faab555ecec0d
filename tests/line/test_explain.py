"""`explain` says of every convolution what each pass thought of it."""

from __future__ import annotations

import onnx
import pytest

from pwopt import models, passes
from pwopt.checks import explain
from tests import zoo


def assert_names_every_conv(proto: onnx.ModelProto) -> None:
    convs = {node.name for node in proto.graph.node if node.op_type == "Conv"}
    assert len(convs) > 50
    of_convs = [p for p in passes.ALL if "Conv" in p.roots]
    assert len(of_convs) > 10
    remarks = explain(proto)
    assert all(r.reason for r in remarks)
    for pass_ in of_convs:
        named = {r.site for r in remarks if r.pass_name == pass_.name}
        assert convs <= named, pass_.name


@pytest.mark.parametrize("name", ["resnet50", "shufflenet_v2_1_0x"])
def test_a_reference_network(name: str) -> None:
    assert_names_every_conv(models.build(name))


@pytest.mark.zoo
def test_a_trained_network() -> None:
    assert_names_every_conv(zoo.trained("yolox_nano_416.onnx"))
