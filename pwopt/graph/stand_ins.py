"""Operators that ONNX cannot infer shapes through, and standard ones with the same shapes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx

__all__ = ["put_stand_ins"]

_STAND_INS: Mapping[tuple[str, str], tuple[str, int]] = MappingProxyType(
    {
        # Fused kernels of ONNX Runtime.
        ("com.microsoft", "BiasGelu"): ("Identity", 1),
        ("com.microsoft", "FastGelu"): ("Identity", 1),
        ("com.microsoft", "FusedConv"): ("Conv", 3),
        ("com.microsoft", "FusedGemm"): ("Gemm", 3),
        ("com.microsoft", "Gelu"): ("Identity", 1),
        ("com.microsoft", "QuickGelu"): ("Identity", 1),
        # Without inference in some of their versions.
        ("", "GroupNormalization"): ("Identity", 1),
        ("", "MeanVarianceNormalization"): ("Identity", 1),
        # Experimental operators that were removed from ONNX; runtimes still have some of them.
        ("", "Affine"): ("Identity", 1),
        ("", "ImageScaler"): ("Identity", 1),
        ("", "ParametricSoftplus"): ("Identity", 1),
        ("", "Scale"): ("Identity", 1),
        ("", "ScaledTanh"): ("Identity", 1),
    }
)
"""(domain, operator) to the standard operator, and how many of the inputs that one takes."""


def put_stand_ins(skeleton: onnx.ModelProto) -> None:
    """Replace, in a model that only serves to infer shapes, what cannot be inferred."""
    opsets = [e.version for e in skeleton.opset_import if e.domain in ("", "ai.onnx")]
    if not opsets:
        return
    opset = opsets[0]
    for node in skeleton.graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (domain, node.op_type) == ("", "Crop") and opset <= _LAST_OPSET_OF_PLAIN_SLICE:
            _crop_as_slice(node)
        elif (domain, node.op_type) in _STAND_INS:
            _replace(node, *_STAND_INS[domain, node.op_type], opset)


_LAST_OPSET_OF_PLAIN_SLICE = 9
"""From opset 10 on the bounds of a Slice are inputs; Crop went out of use before that."""


def _replace(node: onnx.NodeProto, op: str, arity: int, opset: int) -> None:
    known = onnx.defs.get_schema(op, opset).attributes
    kept = [attribute for attribute in node.attribute if attribute.name in known]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.op_type, node.domain = op, ""
    del node.input[arity:]


def _crop_as_slice(node: onnx.NodeProto) -> None:
    """Crop takes (left, top, right, bottom) off H and W, or keeps ``scale`` from (top, left)."""
    values = {a.name: [int(v) for v in a.ints] for a in node.attribute}
    left, top, right, bottom = values.get("border", [0, 0, 0, 0])
    far = 2**31 - 1
    if "scale" in values:
        ends = [top + values["scale"][0], left + values["scale"][1]]
    else:
        ends = [-bottom or far, -right or far]
    del node.attribute[:]
    for key, bounds in (("axes", [2, 3]), ("starts", [top, left]), ("ends", ends)):
        node.attribute.append(onnx.helper.make_attribute(key, bounds))
    node.op_type, node.domain = "Slice", ""
