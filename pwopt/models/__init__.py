"""Reference CNNs, built from their papers with seeded weights: no download, no training.

>>> from pwopt import models
>>> model = models.build("resnet50", seed=0)
"""

from __future__ import annotations

import difflib
import re

import numpy as np

from pwopt.errors import UsageError
from pwopt.graph.builder import MAX_OPSET, Model
from pwopt.models import (
    convnext,
    densenet,
    efficientnet,
    googlenet,
    inception_v3,
    logic,
    mobilenet_v1,
    mobilenet_v2,
    mobilenet_v3,
    nin,
    repvgg,
    resnet,
    resnet_v2,
    resnext,
    shufflenet_v1,
    shufflenet_v2,
    squeezenet,
    super_resolution,
    unet,
    vgg,
)
from pwopt.models.network import Network
from pwopt.models.recipe import ModelInfo, Paper, Recipe

__all__ = ["Model", "ModelInfo", "Paper", "build", "describe", "names"]

_RECIPES: tuple[Recipe, ...] = (
    *logic.RECIPES,
    *nin.RECIPES,
    *vgg.RECIPES,
    *googlenet.RECIPES,
    *inception_v3.RECIPES,
    *resnet.RECIPES,
    *resnet_v2.RECIPES,
    *resnext.RECIPES,
    *densenet.RECIPES,
    *squeezenet.RECIPES,
    *mobilenet_v1.RECIPES,
    *mobilenet_v2.RECIPES,
    *mobilenet_v3.RECIPES,
    *efficientnet.RECIPES,
    *shufflenet_v1.RECIPES,
    *shufflenet_v2.RECIPES,
    *repvgg.RECIPES,
    *convnext.RECIPES,
    *unet.RECIPES,
    *super_resolution.RECIPES,
)


def names() -> tuple[str, ...]:
    """The names of all reference models, families together."""
    return tuple(recipe.info.name for recipe in _RECIPES)


def describe(name: str) -> ModelInfo:
    """What the reference model *name* is and which paper it is from.

    Raises:
        UsageError: there is no such model; the message names similar ones.
    """
    return _find(name).info


def build(name: str, *, seed: int = 0, batch: int | str = 1, opset: int | None = None) -> Model:
    """Build the reference model *name*.

    The model is float32, full size, in evaluation mode, with one input ``input`` of the shape that
    :func:`describe` gives and one output. The same arguments give the same bytes on the same
    machine; on another one, BatchNormalization statistics may differ in the last bits.

    Args:
        name: one of :func:`names`.
        seed: of every weight; at least 0.
        batch: the batch size, or a name (such as ``"N"``) for a dynamic one.
        opset: the opset to write; by default the one that suits the model's form.

    Raises:
        UsageError: an argument names something that does not exist or is out of range.
    """
    recipe = _find(name)
    info = recipe.info
    if seed < 0:
        raise UsageError(f"seed {seed} is negative; give a seed of at least 0")
    if isinstance(batch, int) and batch < 1:
        raise UsageError(f"batch {batch} is not positive; give a size of at least 1 or a name")
    if isinstance(batch, str) and not re.fullmatch(r"[A-Za-z_]\w*", batch):
        raise UsageError(f"batch {batch!r} is no name for a dimension; give one like 'N'")
    opset = info.opset if opset is None else opset
    if not info.min_opset <= opset <= MAX_OPSET:
        raise UsageError(
            f"{name} cannot be written in opset {opset}; give {info.min_opset} to {MAX_OPSET}"
        )
    network = Network(
        name,
        rng=np.random.default_rng(seed),
        input_shape=(batch, *info.input_shape[1:]),
        opset=opset,
    )
    recipe.construct(network)
    return network.finish()


def _find(name: str) -> Recipe:
    for recipe in _RECIPES:
        if recipe.info.name == name:
            return recipe
    close = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names())}"
    raise UsageError(f"there is no reference model {name!r}; {hint}")
