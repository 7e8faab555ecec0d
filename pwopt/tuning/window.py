"""A rewrite in a window of its graph: the site with its neighbours, before and after.

A convolution alone would pay for changes of layout at its edges that it does not pay for in its
region, so a window reaches to the next convolution or matrix product on each side. A site that
takes long goes without the one before it: there every form pays for the same change of layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pwopt.cost import window_seconds
from pwopt.errors import InvalidModelError
from pwopt.graph import Node, Tensor, parse
from pwopt.graph.extract import extract
from pwopt.passes.contract import Match
from pwopt.remark import Decline, Remark
from pwopt.tuning.candidate import AnyPass, describe
from pwopt.tuning.driver import Driver
from pwopt.tuning.pipeline import run_passes

if TYPE_CHECKING:
    from pwopt.graph import Model, ModelProto

__all__ = ["Form", "Window", "cut_window", "find_match"]

_ANCHORS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Operators that a window ends with: their kernels decide the layout around them."""
_LONG_S = 0.02
"""Sites that are expected to take longer; there are few pairs in the time for timing them."""
_MOST_NODES = 48
_MOST_ADDED = 400
"""A rewritten window may hold so many nodes more; the taps of a lowered convolution are many."""


@dataclass(frozen=True)
class Form:
    """A window as a model file.

    Attributes:
        path: the file.
        seconds: what the analytic model expects it to take; ``None`` if it cannot tell.
    """

    path: Path
    seconds: float | None


@dataclass(frozen=True, eq=False)
class Window:
    """One site of a group of equal ones, cut out of the model.

    Attributes:
        digest: equal for windows whose nodes, attributes and shapes are equal.
        before: the window as it is.
        after: the window with the site rewritten, by variant.
    """

    digest: str
    before: Form
    after: Mapping[str, Form]


def cut_window(
    driver: Driver,
    pass_: AnyPass,
    remark: Remark,
    variants: Sequence[str],
    dims: Mapping[str, int],
    keep: Callable[[Model], Form],
) -> Window | None:
    """Cut the site of *remark* out of the driver's model, which stays as it is.

    Args:
        driver: holds the model in which the site has not been rewritten.
        pass_: whose candidate it is.
        remark: names the site.
        variants: the forms to rewrite it in.
        dims: sizes of dynamic dimensions.
        keep: puts a form away before the next one is made, for together they may be many times
            as large as the model.

    Returns:
        ``None`` if the site is not there any more, or lies between tensors whose types are not
        known or that the rewritten site does not lie between.
    """
    match = find_match(driver, pass_, remark)
    if match is None:
        return None
    facts, rewriter = driver.facts, driver.rewriter
    expected_s = window_seconds(match.nodes, facts, dims)
    nodes = _grown(driver, match, behind_anchors=(expected_s or 0.0) > _LONG_S)
    if nodes is None:
        return None
    try:
        before = extract(driver.model, nodes, dims)
        sources = {value.name for value in before.graph.input}
        results = [value.name for value in before.graph.output]
        tensors = {t.name: t for node in nodes for t in node.outputs}
        offered = {v.name: v for v in pass_.variants(match)}
        after: dict[str, Form] = {}
        for name in variants:
            if name not in offered:
                continue
            mark = rewriter.mark()
            try:
                pass_.rewrite(match, offered[name], rewriter)
                inside = _between(driver, [tensors[r] for r in results], sources, len(nodes))
                rewritten = None if inside is None else extract(driver.model, inside, dims)
            finally:
                rewriter.rollback(mark)
            if rewritten is None or not _has_ends(rewritten, sources, results):
                return None
            after[name] = keep(_tidied(rewritten))
        return Window(describe(nodes, facts), keep(_tidied(before)), after)
    except InvalidModelError:
        return None


def find_match(driver: Driver, pass_: AnyPass, remark: Remark) -> Match | None:
    """The match of *pass_* at the site of *remark* in the driver's model, if it is still there."""
    facts = driver.facts
    for node in driver.model.sorted_nodes():
        if facts.site(node) == remark.site and (
            "*" in pass_.roots or facts.op(node) in pass_.roots
        ):
            match = pass_.match(node, facts)
            if not isinstance(match, Decline):
                found: Match = match
                return found
    return None


def _grown(driver: Driver, match: Match, *, behind_anchors: bool) -> list[Node] | None:
    """The nodes of *match*, and around them all up to the next anchor on each path.

    With *behind_anchors* those in front of them stay outside.
    """
    facts = driver.facts
    chosen = {id(node): node for node in match.nodes}

    def grow(frontier: list[Node], step: bool) -> bool:
        while frontier:
            node = frontier.pop()
            for near in _producers(driver, node) if step else _readers(driver, node):
                is_anchor = facts.is_op(near, *_ANCHORS)
                if id(near) in chosen or (is_anchor and step and behind_anchors):
                    continue
                chosen[id(near)] = near
                if len(chosen) > _MOST_NODES:
                    return False
                if not is_anchor:
                    frontier.append(near)
        return True

    core = list(chosen.values())
    fits = grow(list(core), step=True) and grow(list(core), step=False)
    return list(chosen.values()) if fits else None


def _producers(driver: Driver, node: Node) -> Iterator[Node]:
    for tensor in driver.model.reads(node):
        producer = driver.facts.producer(tensor)
        if producer is not None:
            yield producer


def _readers(driver: Driver, node: Node) -> Iterator[Node]:
    for tensor in node.outputs:
        yield from driver.facts.consumers(tensor)


def _between(
    driver: Driver, results: Iterable[Tensor], sources: set[str], before: int
) -> list[Node] | None:
    """What computes *results* from *sources*; ``None`` if that reaches beyond."""
    found: dict[int, Node] = {}
    pending = list(results)
    while pending:
        tensor = pending.pop()
        if tensor.name in sources or tensor.is_empty() or driver.facts.is_constant(tensor):
            continue
        producer = driver.facts.producer(tensor)
        if producer is None or len(found) > before + _MOST_ADDED:
            return None
        if id(producer) not in found:
            found[id(producer)] = producer
            pending += driver.model.reads(producer)
    return list(found.values())


def _has_ends(proto: ModelProto, sources: set[str], results: Sequence[str]) -> bool:
    """Whether the rewritten window has the same inputs and outputs."""
    found = {value.name for value in proto.graph.output}
    return {value.name for value in proto.graph.input} == sources and found == set(results)


def _tidied(proto: ModelProto) -> Model:
    """As the pipeline leaves it: canonicalised after the rewrite."""
    driver = Driver(parse(proto))
    driver.rewriter.infer_shapes()
    run_passes(driver, ())
    return driver.model
