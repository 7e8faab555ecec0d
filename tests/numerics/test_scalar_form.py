"""Normal forms keep the function, and equal functions get equal forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pwopt.numerics.scalar_form import Atom, Form, Function, NoFormError, ScalarAlgebra, Term

Array = np.ndarray[Any, Any]
ALGEBRA = ScalarAlgebra(1e-9)
X = Form.linear(1.0)
POINTS = np.linspace(-9.0, 9.0, 181)

FUNCTIONS: dict[Function, Callable[[Array], Array]] = {
    Function.ERF: np.vectorize(math.erf),
    Function.EXP: np.exp,
    Function.RELU: lambda v: np.maximum(v, 0.0),
    Function.SIGMOID: lambda v: 1.0 / (1.0 + np.exp(-v)),
    Function.SOFTPLUS: lambda v: np.logaddexp(v, 0.0),
    Function.STEP: lambda v: np.clip(v, 0.0, 1.0),
    Function.TANH: np.tanh,
}


def evaluate(form: Form, x: Array) -> Array:
    total = np.zeros_like(x)
    for term in form.terms:
        value = term.coefficient * x**term.power
        if term.atom is not None:
            value = value * FUNCTIONS[term.atom.function](evaluate(term.atom.argument, x))
        total = total + value
    return total


numbers = st.floats(-4.0, 4.0).map(lambda v: round(v, 3)).filter(lambda v: abs(v) > 0.01)


@st.composite
def clipped(draw: st.DrawFn) -> tuple[Form, Array]:
    """A form built by random piecewise linear operations, and its values by NumPy."""
    slope, offset = draw(numbers), draw(numbers)
    form, value = Form.linear(slope, offset), slope * POINTS + offset
    for _ in range(draw(st.integers(1, 4))):
        number = draw(numbers)
        match draw(st.sampled_from(["max", "min", "clip", "scale", "shift"])):
            case "max":
                form, value = ALGEBRA.clip(form, number, math.inf), np.maximum(value, number)
            case "min":
                form, value = ALGEBRA.clip(form, -math.inf, number), np.minimum(value, number)
            case "clip":
                high = number + abs(draw(numbers))
                form, value = ALGEBRA.clip(form, number, high), np.clip(value, number, high)
            case "scale":
                form, value = ALGEBRA.scale(form, number), value * number
            case "shift":
                form, value = ALGEBRA.add(form, Form.constant(number)), value + number
    return form, value


@st.composite
def maybe_clipped(draw: st.DrawFn) -> tuple[Form, Array] | None:
    try:
        return draw(clipped())
    except NoFormError:
        return None  # the range became a point


@settings(max_examples=200, deadline=None)
@given(maybe_clipped())
def test_piecewise_linear_forms_keep_the_function(case: tuple[Form, Array] | None) -> None:
    if case is None:
        return
    form, value = case
    np.testing.assert_allclose(evaluate(form, POINTS), value, rtol=1e-9, atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(numbers, numbers, numbers, numbers)
def test_maximum_and_minimum_of_lines(a: float, b: float, c: float, d: float) -> None:
    f, g = Form.linear(a, b), Form.linear(c, d)
    if a == c:
        return
    values = a * POINTS + b, c * POINTS + d
    np.testing.assert_allclose(
        evaluate(ALGEBRA.maximum(f, g), POINTS), np.maximum(*values), atol=1e-9
    )
    np.testing.assert_allclose(
        evaluate(ALGEBRA.minimum(f, g), POINTS), np.minimum(*values), atol=1e-9
    )
    assert ALGEBRA.same(ALGEBRA.maximum(f, g), ALGEBRA.maximum(g, f))


def test_hard_swish_has_one_form() -> None:
    clipped = ALGEBRA.clip(ALGEBRA.add(X, Form.constant(3.0)), 0.0, 6.0)
    first = ALGEBRA.scale(ALGEBRA.multiply(X, clipped), 1 / 6)
    low = ALGEBRA.maximum(ALGEBRA.add(X, Form.constant(3.0)), Form.constant(0.0))
    both = ALGEBRA.minimum(Form.constant(6.0), low)
    second = ALGEBRA.multiply(ALGEBRA.scale(both, 1 / 6), X)
    centred = ALGEBRA.add(ALGEBRA.clip(X, -3.0, 3.0), Form.constant(3.0))
    third = ALGEBRA.divide(ALGEBRA.multiply(centred, X), Form.constant(6.0))
    expected = Form((Term(1.0, 1, Atom(Function.STEP, Form.linear(1 / 6, 0.5))),))
    assert all(ALGEBRA.same(form, expected) for form in (first, second, third))


def test_leaky_relu_has_one_form() -> None:
    relu = ALGEBRA.clip(X, 0.0, math.inf)
    mirrored = ALGEBRA.clip(ALGEBRA.scale(X, -1.0), 0.0, math.inf)
    by_two = ALGEBRA.subtract(relu, ALGEBRA.scale(mirrored, 0.1))
    by_maximum = ALGEBRA.maximum(X, Form.linear(0.1))
    assert ALGEBRA.same(by_two, by_maximum)
    assert by_two.polynomial == {1: pytest.approx(0.1)}


def test_sigmoid_and_softplus_arise_from_exp() -> None:
    negative = ALGEBRA.apply(Function.EXP, Form.linear(-1.0))
    gate = ALGEBRA.divide(X, ALGEBRA.add(Form.constant(1.0), negative))
    assert gate == Form((Term(1.0, 1, Atom(Function.SIGMOID, X)),))
    halves = ALGEBRA.add(Form.constant(2.0), ALGEBRA.scale(negative, 2.0))
    assert ALGEBRA.divide(X, halves).terms[0].coefficient == 0.5
    plus = ALGEBRA.log(ALGEBRA.add(ALGEBRA.apply(Function.EXP, X), Form.constant(1.0)))
    assert plus == Form((Term(1.0, 0, Atom(Function.SOFTPLUS, X)),))


def test_cubes() -> None:
    inner = ALGEBRA.add(X, ALGEBRA.scale(ALGEBRA.power(X, 3.0), 0.5))
    assert inner.polynomial == {1: 1.0, 3: 0.5}
    assert ALGEBRA.same(inner, ALGEBRA.multiply(X, Form((Term(1.0), Term(0.5, 2)))))


def test_rounded_constants_are_the_same_and_others_are_not() -> None:
    single = ScalarAlgebra(2.0 * float(np.finfo(np.float32).eps))
    assert single.near(float(np.float32(1 / 6)), 1 / 6)
    assert not single.near(0.1667, 1 / 6)
    assert not single.near(1e-12, 0.0)
    assert single.add(Form.constant(1 / 6), Form.constant(-float(np.float32(1 / 6)))) == Form()


@pytest.mark.parametrize(
    "build",
    [
        lambda a: a.multiply(a.apply(Function.TANH, X), a.apply(Function.TANH, X)),
        lambda a: a.multiply(a.power(X, 3.0), X),
        lambda a: a.power(X, 0.5),
        lambda a: a.divide(X, X),
        lambda a: a.divide(X, Form()),
        lambda a: a.divide(X, a.add(a.apply(Function.EXP, X), Form.constant(2.0))),
        lambda a: a.log(X),
        lambda a: a.log(a.scale(a.add(a.apply(Function.EXP, X), Form.constant(1.0)), 2.0)),
        lambda a: a.clip(X, 1.0, 1.0),
        lambda a: a.clip(a.power(X, 2.0), 0.0, 1.0),
        lambda a: a.clip(a.apply(Function.TANH, X), 0.0, 1.0),
        lambda a: a.clip(a.add(X, a.clip(X, 0.0, math.inf)), 0.0, 1.0),
        lambda a: a.maximum(a.power(X, 2.0), X),
        lambda a: a.scale(X, math.inf),
        lambda a: a.apply(Function.ERF, Form.constant(1.0)),
    ],
)
def test_what_has_no_form(build: Callable[[ScalarAlgebra], Form]) -> None:
    with pytest.raises(NoFormError):
        build(ALGEBRA)
