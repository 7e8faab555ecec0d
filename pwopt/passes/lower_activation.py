"""Lower activations whose operators run element by element to vectorised arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar

from pwopt.graph import Facts, Node, Rewriter
from pwopt.passes._activation_forms import write
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["LowerActivation"]

_FORMS: Mapping[str, str] = MappingProxyType(
    {"Mish": "mish-by-exp", "Softplus": "softplus-by-exp", "Swish": "swish"}
)


@dataclass(frozen=True)
class LowerActivation(Pass[Match]):
    """Lower Mish, Softplus and Swish to arithmetic that runs faster than the operators.

    Rewrites:
        ``Mish(x)`` into ``x * n / (n + 2)`` with ``n = e (e + 2)``, ``e = Exp(Min(x, cap))``;
        ``Softplus(x)`` into ``Relu(x) + Log(1 + Exp(-Abs(x)))``; ``Swish(x)`` into
        ``x * Sigmoid(alpha x)``.

    Algebra:
        ``mish(x) = x tanh(log(1 + e^x))`` (Misra 2019) and
        ``tanh(log(1 + e)) = ((1 + e)^2 - 1) / ((1 + e)^2 + 1)``;
        ``log(1 + e^x) = max(x, 0) + log(1 + e^-|x|)``, in which nothing overflows.

    Declines when:
        the element type is not a float; the opset is older than 7, whose Add does not broadcast.

    Exactness:
        ROUNDING. Softplus loses the relative precision of values below the last bit of 1, far in
        the negative; the absolute error stays that of the type.

    When it pays:
        On CPU: ONNX Runtime computes Softplus, also within Mish, one element at a time, and takes
        Swish apart without keeping the blocked layout, which it does for ``x * Sigmoid(x)``.
        Mish 3 to 4 times, Softplus 2 times, Swish 1.2 times on a convolution with its activation.
        Not on CUDA.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        ELEMENT_TYPE = "element-type"
        OP_NOT_IN_OPSET = "op-not-in-opset"

    name: ClassVar[str] = "lower-activation"
    roots: ClassVar[tuple[str, ...]] = tuple(_FORMS)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> Match | Decline:
        """See the class."""
        if facts.opset < 7:
            return Decline(
                self.Why.OP_NOT_IN_OPSET, {"op": "Add", "since": 7, "opset": facts.opset}
            )
        x = node.inputs[0]
        if not facts.is_float(x):
            return Decline(self.Why.ELEMENT_TYPE, {"dtype": str(facts.dtype(x))})
        return Match(node, (node,), facts={"activation": node.op.lower()})

    def variants(self, match: Match) -> tuple[Variant, ...]:
        """One per operator."""
        return (Variant(_FORMS[match.root.op]),)

    def rewrite(self, match: Match, variant: Variant, rewriter: Rewriter) -> None:
        """See the class."""
        node = match.root
        parameters = (float(node.attrs.get("alpha", 1.0)),) if node.op == "Swish" else ()
        rewriter.remove(node)
        write(variant.name, rewriter, node, node.inputs[0], parameters)
