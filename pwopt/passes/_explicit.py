"""One spelling for what can be written in several ways: pads, defaults, operand order, shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pwopt.graph import ConvFacts, Dim, Facts, Node, Rewriter
from pwopt.passes._dimensions import is_reliable
from pwopt.passes._shape_values import elements
from pwopt.passes._steps import Rule, Step, Why
from pwopt.remark import Decline

__all__ = ["EXPLICIT"]

_COMMUTATIVE = ("Add", "And", "Equal", "Max", "Min", "Mul", "Or", "Xor")


def _constants_last(node: Node, facts: Facts) -> Step | Decline | None:
    """``c + x`` into ``x + c``, which is what rewrites and runtimes look for."""
    inputs = list(node.inputs)
    # Before opset 7 only the second operand is broadcast.
    if facts.opset < 7:
        return None
    ordered = sorted(inputs, key=facts.is_constant)
    if all(a is b for a, b in zip(inputs, ordered, strict=True)):
        return None
    return Step("put-constant-last", lambda rewriter: rewriter.set_inputs(node, ordered))


def _sum(node: Node, facts: Facts) -> Step | None:
    """A Sum of two into an Add, which is what runtimes fuse into a convolution.

    A longer Sum stays: a chain of Adds may be rounded otherwise.
    """
    # Before opset 7 an Add does not broadcast of itself.
    if facts.opset < 7 or len(node.inputs) != 2:
        return None
    inputs, output = list(node.inputs), node.outputs[0]

    def apply(rewriter: Rewriter) -> None:
        rewriter.remove(node)
        rewriter.add("Add", inputs, [output], near=node)

    return Step("sum-of-two-to-add", apply)


# -- sliding windows -------------------------------------------------------------------------------


def _conv(node: Node, facts: Facts) -> Step | Decline | None:
    conv = facts.conv(node)
    if conv is None:
        return None
    return _spell_out(node, {**_pads(node, facts, conv), **_defaults(node, conv)}, facts)


def _defaults(node: Node, conv: ConvFacts) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "dilations": list(conv.dilations),
        "group": conv.group,
        "kernel_shape": list(conv.kernel),
        "strides": list(conv.strides),
    }
    return {key: value for key, value in defaults.items() if key not in node.attrs}


def _pads(node: Node, facts: Facts, conv: ConvFacts) -> dict[str, Any]:
    if node.op == "Conv":
        return _explicit_pads(node, facts, conv.pads)
    if "output_shape" in node.attrs:  # the pads follow from it
        return {}
    return _explicit_pads(node, facts, _transposed_pads(node, facts, conv))


def _transposed_pads(node: Node, facts: Facts, conv: ConvFacts) -> tuple[int, ...] | None:
    """Pads of a ConvTranspose, whose SAME output is the input times the stride.

    So the padding is ``output_padding + (kernel - 1) * dilation + 1 - stride``, whatever the size
    of the input. Early versions of the specification confuse the ends; the odd one goes to the
    end for SAME_UPPER, as its name says and as ONNX Runtime has it for all of them.
    """
    auto_pad = facts.attr_str(node, "auto_pad", "NOTSET")
    zeros = (0,) * (2 * conv.spatial_rank)
    if auto_pad == "NOTSET":
        return facts.attr_ints(node, "pads", zeros)
    if auto_pad == "VALID":
        return zeros
    extra = facts.attr_ints(node, "output_padding", (0,) * conv.spatial_rank)
    totals = [
        e + (k - 1) * d + 1 - s
        for e, k, d, s in zip(extra, conv.kernel, conv.dilations, conv.strides, strict=True)
    ]
    if any(total < 0 for total in totals) or not _is_enlarged_by_strides(conv, facts):
        return None
    less = [total // 2 for total in totals]
    more = [total - total // 2 for total in totals]
    return (*less, *more) if auto_pad == "SAME_UPPER" else (*more, *less)


def _is_enlarged_by_strides(conv: ConvFacts, facts: Facts) -> bool:
    """Whether known sizes agree with that; ONNX's shape inference has another formula."""
    before = (facts.shape(conv.input) or ())[2:]
    after = (facts.shape(conv.output) or ())[2:]
    known = zip(before, after, conv.strides, strict=False)
    return all(b * s == a for b, a, s in known if isinstance(a, int) and isinstance(b, int))


def _pool(node: Node, facts: Facts) -> Step | Decline | None:
    if "kernel_shape" not in node.attrs:
        return None
    kernel = facts.attr_ints(node, "kernel_shape", ())
    ones = (1,) * len(kernel)
    strides = facts.attr_ints(node, "strides", ones)
    dilations = facts.attr_ints(node, "dilations", ones)
    if not len(strides) == len(dilations) == len(kernel):
        return None
    same = facts.attr_str(node, "auto_pad", "NOTSET").startswith("SAME")
    if same and (facts.attr_int(node, "ceil_mode", 0) or dilations != ones):
        return Decline(Why.PADS_AMBIGUOUS)
    if same and any(s > k for s, k in zip(strides, kernel, strict=True)):
        return Decline(Why.PADS_AMBIGUOUS)  # the padding would be negative
    pads = facts.window_pads(node, kernel, strides, dilations)
    return _spell_out(node, _explicit_pads(node, facts, pads), facts)


def _explicit_pads(node: Node, facts: Facts, pads: tuple[int, ...] | None) -> dict[str, Any]:
    """Attributes to set so that *pads* are explicit; nothing if they are not known."""
    if pads is None:
        return {}
    changes: dict[str, Any] = {}
    if facts.attr_ints(node, "pads", ()) != pads:
        changes["pads"] = list(pads)
    if "auto_pad" in node.attrs:
        changes["auto_pad"] = None
    return changes


def _spell_out(node: Node, changes: Mapping[str, Any], facts: Facts) -> Step | Decline | None:
    if changes:
        return Step("spell-out-attributes", partial(_set_attributes, node, changes))
    if facts.attr_str(node, "auto_pad", "NOTSET") == "NOTSET":
        return None
    unknown = facts.static_shape(node.inputs[0]) is None
    return Decline(Why.SHAPE_UNKNOWN if unknown else Why.PADS_AMBIGUOUS)


def _set_attributes(node: Node, changes: Mapping[str, Any], rewriter: Rewriter) -> None:
    for key, value in changes.items():
        rewriter.set_attribute(node, key, value)


# -- shapes ----------------------------------------------------------------------------------------


def _reshape(node: Node, facts: Facts) -> Step | Decline | None:
    """A target computed from dynamic dimensions into a constant one with 0 and -1."""
    if facts.opset < 5 or facts.is_constant(node.inputs[1]):
        return None
    found = elements(node.inputs[1], facts)
    if found is None:
        return None
    target = _constant_target(found.values, node, facts)
    if target is None:
        return Decline(Why.SHAPE_UNKNOWN, {"target": [_text(v) for v in found.values]})
    hint = f"{node.name or node.outputs[0].name}/shape"

    def apply(rewriter: Rewriter) -> None:
        rewriter.set_input(node, 1, rewriter.constant(hint, np.array(target, np.int64)))

    return Step("fix-reshape-target", apply)


def _text(value: Dim) -> int | str:
    return "?" if value is None else value


def _constant_target(values: Sequence[Dim], node: Node, facts: Facts) -> list[int] | None:
    """A target of ints that always equals *values*, which hold dynamic dimensions.

    One unknown element is what -1 stands for, as long as the others do not multiply to zero. More
    than one: those that copy the input's dimension at their own place are a 0.
    """
    unknown = [i for i, v in enumerate(values) if not isinstance(v, int)]
    if len(unknown) > 1 or -1 in values:
        if facts.attr_int(node, "allowzero", 0):
            return None
        unknown = [i for i in unknown if not _copies(i, values[i], node, facts)]
    if len(unknown) > 1 or (unknown and (-1 in values or not _positive(values, node, facts))):
        return None
    fixed = [v if isinstance(v, int) else 0 for v in values]
    for index in unknown:
        fixed[index] = -1
    return fixed


def _copies(index: int, value: Dim, node: Node, facts: Facts) -> bool:
    shape = facts.shape(node.inputs[0])
    if shape is None or index >= len(shape) or not isinstance(value, str):
        return False
    return shape[index] == value and is_reliable(value, facts)


def _positive(values: Sequence[Dim], node: Node, facts: Facts) -> bool:
    """Whether no known element is zero, nor copies a dimension that may be."""
    shape = facts.shape(node.inputs[0]) or ()
    copies = not facts.attr_int(node, "allowzero", 0)
    for index, value in enumerate(values):
        size = shape[index] if value == 0 and copies and index < len(shape) else value
        if value == 0 and not (isinstance(size, int) and size > 0):
            return False
    return True


EXPLICIT: Mapping[str, Rule] = {
    **dict.fromkeys(_COMMUTATIVE, _constants_last),
    "AveragePool": _pool,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "LpPool": _pool,
    "MaxPool": _pool,
    "Reshape": _reshape,
    "Sum": _sum,
}
