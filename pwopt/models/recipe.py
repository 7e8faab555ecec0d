"""What a reference model is: its description, its paper and the function that builds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pwopt.graph.builder import MIN_OPSET
from pwopt.models.network import Network

__all__ = ["ModelInfo", "Paper", "Recipe"]


@dataclass(frozen=True)
class Paper:
    """Where a network was published; ``venue`` is the arXiv number where there is one."""

    authors: str
    title: str
    year: int
    venue: str

    def __str__(self) -> str:
        return f"{self.authors}: {self.title} ({self.venue}, {self.year})"


@dataclass(frozen=True)
class ModelInfo:
    """What a reader wants to know about a reference model before building it.

    Attributes:
        name: the name to build it by.
        title: what people call it.
        paper: its source.
        input_shape: N, C, H, W with N = 1; the input is float32.
        notes: the form of it that is built, where several exist.
        opset: the opset it is written in unless another is asked for.
        min_opset: the oldest opset that has every operator it needs.
    """

    name: str
    title: str
    paper: Paper
    input_shape: tuple[int, int, int, int]
    notes: str = ""
    opset: int = 17
    min_opset: int = MIN_OPSET


@dataclass(frozen=True)
class Recipe:
    """A model's description and how to build it.

    Attributes:
        info: the description.
        construct: adds the whole network, input to output, to an empty one.
    """

    info: ModelInfo
    construct: Callable[[Network], None]
