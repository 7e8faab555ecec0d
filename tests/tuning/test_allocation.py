"""The front of factorised models: least loss for each millisecond first."""

from __future__ import annotations

import pytest

from pwopt.numerics.lowrank import Method
from pwopt.passes.factorize_conv import Form
from pwopt.tuning.allocation import Layer, Option, front


def form(rank: int) -> Form:
    return Form(Method.SPATIAL, (rank,))


def layer(site: str, weight: float, *options: tuple[int, float, float]) -> Layer:
    return Layer(
        site, weight, (Option(None, 0.0, 0.0), *(Option(form(r), e, s) for r, e, s in options))
    )


def test_the_layer_that_loses_least_for_a_millisecond_goes_first() -> None:
    steps = front([layer("a", 1.0, (8, 0.2, 1.0)), layer("b", 0.1, (8, 0.3, 0.5))])
    assert [set(s.plan) for s in steps] == [{"b"}, {"a", "b"}]
    assert steps[-1].loss == pytest.approx(0.23)
    assert steps[-1].saved == pytest.approx(1.5)


def test_losses_grow_faster_and_faster() -> None:
    layers = [
        layer("a", 1.0, (16, 0.01, 0.3), (8, 0.05, 0.9), (4, 0.4, 1.2), (2, 0.5, 1.1)),
        layer("b", 0.5, (16, 0.02, 0.1), (8, 0.1, 0.6)),
    ]
    steps = front(layers)
    losses = [0.0, *(s.loss for s in steps)]
    saved = [0.0, *(s.saved for s in steps)]
    slopes = [(losses[k + 1] - losses[k]) / (saved[k + 1] - saved[k]) for k in range(len(steps))]
    assert slopes == sorted(slopes)
    assert saved == sorted(saved)


def test_forms_that_another_one_beats_are_never_taken() -> None:
    steps = front([layer("a", 1.0, (8, 0.2, 0.5), (16, 0.1, 0.7))])
    assert [s.plan["a"] for s in steps] == [form(16)]


def test_the_best_exact_form_is_what_is_saved_against() -> None:
    exact = Layer("a", 1.0, (Option(None, 0.0, 0.4), Option(form(8), 0.2, 0.5)))
    other = layer("b", 1.0, (8, 0.2, 0.3))
    assert [set(s.plan) for s in front([exact, other])] == [{"b"}, {"a", "b"}]
