"""The passes, one file each; :data:`ALL` is their explicit order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pwopt.passes import catalogue
from pwopt.passes.absorb_channel_permutation import AbsorbChannelPermutation
from pwopt.passes.align_channels import AlignChannels
from pwopt.passes.assign_layout import AssignLayout
from pwopt.passes.canonicalise import Canonicalise
from pwopt.passes.commute_pointwise import CommutePointwise
from pwopt.passes.compose_pointwise import ComposePointwise
from pwopt.passes.compose_space_to_depth import ComposeSpaceToDepth
from pwopt.passes.contract import Match, Pass, Variant
from pwopt.passes.eliminate_dead_pixels import EliminateDeadPixels
from pwopt.passes.eliminate_transpose import EliminateTranspose
from pwopt.passes.factorize_conv import FactorizeConv
from pwopt.passes.fold_affine import FoldAffine
from pwopt.passes.fold_batch_normalization import FoldBatchNormalization
from pwopt.passes.fold_gate import FoldGate
from pwopt.passes.fuse_pointwise_activation import FusePointwiseActivation
from pwopt.passes.lower_activation import LowerActivation
from pwopt.passes.lower_conv_transpose import LowerConvTranspose
from pwopt.passes.lower_conv_winograd import LowerConvWinograd
from pwopt.passes.lower_gate import LowerGate
from pwopt.passes.lower_lrn import LowerLrn
from pwopt.passes.lower_narrow_conv import LowerNarrowConv
from pwopt.passes.lower_patchify import LowerPatchify
from pwopt.passes.lower_pointwise_conv import LowerPointwiseConv
from pwopt.passes.lower_prelu import LowerPrelu
from pwopt.passes.lower_resize import LowerResize
from pwopt.passes.merge_groups import MergeGroups
from pwopt.passes.merge_parallel_conv import MergeParallelConv
from pwopt.passes.raise_activation import RaiseActivation
from pwopt.passes.raise_global_pool import RaiseGlobalPool
from pwopt.passes.raise_pointwise_matmul import RaisePointwiseMatmul
from pwopt.passes.raise_shortcut import RaiseShortcut
from pwopt.passes.reparameterize import Reparameterize
from pwopt.passes.split_concat_conv import SplitConcatConv

__all__ = [
    "ALL",
    "LOWER",
    "SIMPLIFY",
    "AssignLayout",
    "EliminateDeadPixels",
    "LowerConvTranspose",
    "LowerNarrowConv",
    "LowerResize",
    "MergeParallelConv",
    "SplitConcatConv",
    "AbsorbChannelPermutation",
    "AlignChannels",
    "MergeGroups",
    "Canonicalise",
    "CommutePointwise",
    "ComposePointwise",
    "ComposeSpaceToDepth",
    "EliminateTranspose",
    "FactorizeConv",
    "FoldAffine",
    "FoldBatchNormalization",
    "FoldGate",
    "FusePointwiseActivation",
    "LowerActivation",
    "LowerConvWinograd",
    "LowerGate",
    "LowerLrn",
    "LowerPatchify",
    "LowerPointwiseConv",
    "LowerPrelu",
    "Match",
    "Pass",
    "RaiseActivation",
    "RaiseGlobalPool",
    "RaisePointwiseMatmul",
    "RaiseShortcut",
    "Reparameterize",
    "Variant",
    "find",
    "parse_spec",
    "split",
]

SIMPLIFY: tuple[Pass[Any], ...] = (
    RaisePointwiseMatmul(),
    EliminateTranspose(),
    RaiseActivation(),
    RaiseGlobalPool(),
    FoldBatchNormalization(),
    FoldAffine(),
    Reparameterize(),
    CommutePointwise(),
    ComposePointwise(),
    ComposeSpaceToDepth(),
    EliminateDeadPixels(),
    RaiseShortcut(),
)
"""Passes whose result is smaller or simpler; run in rounds until none has anything to do."""

LOWER: tuple[Pass[Any], ...] = (
    LowerLrn(),
    LowerPrelu(),
    LowerResize(),
    LowerConvTranspose(),
    FactorizeConv(),
    LowerNarrowConv(),
    LowerPatchify(),
    MergeGroups(),
    MergeParallelConv(),
    AlignChannels(),
    AbsorbChannelPermutation(),
    LowerActivation(),
    FoldGate(),
    LowerGate(),
    LowerConvWinograd(),
    SplitConcatConv(),
    AssignLayout(),
    LowerPointwiseConv(),
    FusePointwiseActivation(),
)
"""Passes that put other operators in place; run once, after the simplifying ones."""

ALL: tuple[Pass[Any], ...] = (Canonicalise(), *SIMPLIFY, *LOWER)


def split(chosen: Iterable[Pass[Any]]) -> tuple[tuple[Pass[Any], ...], tuple[Pass[Any], ...]]:
    """The passes of *chosen* that simplify, and those that lower; required ones run anyway."""
    lowering = {p.name for p in LOWER}
    optional = [p for p in chosen if not p.required]
    return (
        tuple(p for p in optional if p.name not in lowering),
        tuple(p for p in optional if p.name in lowering),
    )


def find(name: str) -> Pass[Any]:
    """The pass called *name*, with default options.

    Raises:
        UsageError: there is none.
    """
    return catalogue.find(name, ALL)


def parse_spec(spec: str) -> Pass[Any]:
    """The pass that ``name:option=value`` describes.

    Raises:
        UsageError: unknown pass, option or value.
    """
    return catalogue.parse_spec(spec, ALL)
