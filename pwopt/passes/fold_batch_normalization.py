"""Fold BatchNormalization into the weights of the linear operators around it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from pwopt.graph import Facts, Node, Rewriter, Tensor
from pwopt.numerics import channel_algebra
from pwopt.passes._channel_affine import (
    Affine,
    Fold,
    Obstacle,
    apply_fold,
    fold_backward,
    fold_forward,
    trains,
)
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.remark import Decline, Exactness

__all__ = ["FoldBatchNormalization", "FoldBatchNormalizationMatch"]


@dataclass(frozen=True, eq=False)
class FoldBatchNormalizationMatch(Match):
    """A BatchNormalization and the operators that take it in."""

    fold: Fold
    backward: bool


@dataclass(frozen=True)
class FoldBatchNormalization(Pass[FoldBatchNormalizationMatch]):
    """Fold BatchNormalization into neighbouring weights.

    Rewrites:
        ``Conv -> BatchNormalization`` into ``Conv``; likewise behind ConvTranspose, Gemm and
        MatMul (which becomes a Gemm), and ``BatchNormalization -> Conv`` (ConvTranspose, Gemm,
        MatMul) into the latter, into every one of them if it feeds several. The operator before
        goes first. MaxPool, GlobalMaxPool, AveragePool, GlobalAveragePool, Relu, LeakyRelu, PRelu
        and Concat may stand between where they commute with the normalisation. Another
        BatchNormalization takes it in as well.

    Algebra:
        In inference mode the normalisation is a map per channel, ``y = s x + t`` with
        ``s = scale / sqrt(var + epsilon)`` and ``t = bias - s mean`` (Ioffe and Szegedy 2015,
        algorithm 2). Behind an operator: ``s (W x + b) + t = (diag(s) W) x + (s b + t)``. Before
        one: ``W (s x + t) + b = (W diag(s)) x + (W t + b)``, where every tap must read ``t``.
        Groups and the layouts of ConvTranspose and Gemm only decide which axis s scales.

    Declines when:
        the node trains (``training_mode``, or running statistics as outputs), normalises per
        activation (``spatial=0``), has parameters that are not constant, or a variance that is not
        positive with epsilon; no linear operator stands next to it (pre-activation networks: the
        runtime runs the normalisation inside its blocked layout, nothing is gained by splitting it
        into Mul and Add); the value between is read elsewhere or is a graph output; the weights are
        not constant or of a type without NumPy arithmetic (bfloat16); a shift would meet zero
        padding, which the normalisation itself never touches (folding the scale alone would leave
        an Add in its place); folded weights would leave the range of their type.

    Exactness:
        ROUNDING. Weights are computed in float64 and rounded once. Shared weights get a copy.

    When it pays:
        By one operator and one pass over memory. ONNX Runtime does the plain ``Conv ->
        BatchNormalization`` by itself when it loads a model, unless old-style overridable
        initializers stop it; a normalisation before a convolution it leaves.
    """

    class Why(StrEnum):
        """Reasons to decline."""

        TRAINING_MODE = "training-mode"
        NOT_SPATIAL = "not-spatial"
        SHAPE_UNKNOWN = "shape-unknown"
        PARAMETERS_NOT_CONSTANT = "parameters-not-constant"
        VARIANCE_NOT_POSITIVE = "variance-not-positive"
        NO_LINEAR_NEIGHBOUR = Obstacle.NO_LINEAR_NEIGHBOUR.value
        OTHER_READERS = Obstacle.OTHER_READERS.value
        GRAPH_OUTPUT = Obstacle.GRAPH_OUTPUT.value
        NON_LINEAR_BETWEEN = Obstacle.NON_LINEAR_BETWEEN.value
        NOT_FLOAT = Obstacle.NOT_FLOAT.value
        WEIGHT_NOT_CONSTANT = Obstacle.WEIGHT_NOT_CONSTANT.value
        BIAS_NOT_PER_CHANNEL = Obstacle.BIAS_NOT_PER_CHANNEL.value
        NOT_PER_CHANNEL = Obstacle.NOT_PER_CHANNEL.value
        SHIFT_MEETS_PADDING = Obstacle.SHIFT_MEETS_PADDING.value
        NO_BIAS_INPUT = Obstacle.NO_BIAS_INPUT.value
        OUT_OF_RANGE = Obstacle.OUT_OF_RANGE.value

    name: ClassVar[str] = "fold-batch-normalization"
    roots: ClassVar[tuple[str, ...]] = ("BatchNormalization",)
    exactness: ClassVar[Exactness] = Exactness.ROUNDING

    def match(self, node: Node, facts: Facts) -> FoldBatchNormalizationMatch | Decline:
        """See the class."""
        if trains(facts, node):
            return Decline(self.Why.TRAINING_MODE)
        if facts.opset < 9 and not facts.attr_int(node, "spatial", 1):
            return Decline(self.Why.NOT_SPATIAL)
        data = node.inputs[0]
        rank = facts.rank(data)
        if rank is None or rank < 2:
            return Decline(self.Why.SHAPE_UNKNOWN)
        parameters = [facts.constant(t) for t in node.inputs[1:5]]
        scale, bias, mean, variance = parameters
        if scale is None or bias is None or mean is None or variance is None:
            return Decline(self.Why.PARAMETERS_NOT_CONSTANT)
        epsilon = facts.attr_float(node, "epsilon", 1e-5)
        terms = channel_algebra.batch_normalization_affine(scale, bias, mean, variance, epsilon)
        if terms is None:
            return Decline(self.Why.VARIANCE_NOT_POSITIVE, {"smallest": float(variance.min())})
        aligned = (1, -1, *(1,) * (rank - 2))
        affine = Affine(terms[0].reshape(aligned), terms[1].reshape(aligned))
        return self._place(node, data, facts, affine)

    def _place(
        self, node: Node, data: Tensor, facts: Facts, affine: Affine
    ) -> FoldBatchNormalizationMatch | Decline:
        before = fold_backward(facts, data, affine)
        if isinstance(before, Fold):
            return _match(node, before, facts, backward=True)
        behind = fold_forward(facts, node.outputs[0], affine)
        if isinstance(behind, Fold):
            return _match(node, behind, facts, backward=False)
        why = behind if before is Obstacle.NO_LINEAR_NEIGHBOUR else before
        return Decline(self.Why(why.value), {"before": before.value, "behind": behind.value})

    def rewrite(
        self,
        match: FoldBatchNormalizationMatch,
        variant: Variant,  # noqa: ARG002 - there is one
        rewriter: Rewriter,
    ) -> None:
        """See the class."""
        apply_fold(rewriter, match.root, match.root.inputs[0], match.fold, backward=match.backward)


def _match(node: Node, fold: Fold, facts: Facts, *, backward: bool) -> FoldBatchNormalizationMatch:
    return FoldBatchNormalizationMatch(
        node, (node, *fold.nodes), fold, backward, facts={"into": fold.describe(facts)}
    )
