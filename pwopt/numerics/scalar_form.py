"""Normal forms of scalar functions of one variable, so that equal activations look equal.

Exporters write the same activation in many ways: operands swapped, constants moved through
products, ``Clip`` as ``Min`` of ``Max``, a sigmoid as ``1 / (1 + exp(-x))``. Here each way ends in
the same sum of terms ``c x^p f(u)``, where ``f`` is one of a few functions and ``u`` is such a sum
itself. The identities used, with ``step(u) = min(max(u, 0), 1)``:

* ``max(v, l) = l + relu(v - l)``, ``min(v, h) = v - relu(v - h)``,
  ``max(v, w) = w + relu(v - w)``;
* ``relu(a x + b) = |a| relu(x + b/a)``, plus ``a x + b`` if ``a < 0``;
* ``min(max(v, l), h) = l + (h - l) step((v - l) / (h - l))``, ``step(u) = 1 - step(1 - u)``;
* ``1 / (a + a exp(u)) = sigmoid(-u) / a``, ``log(1 + exp(u)) = softplus(u)``.

Whatever has no such form raises :class:`NoFormError`; the caller then knows that it is looking at
something else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Atom", "Form", "Function", "NoFormError", "ScalarAlgebra", "Term"]

_MAX_POWER = 3


class NoFormError(Exception):
    """The expression is not a sum of terms ``c x^p f(u)``; never leaves the passes.

    Attributes:
        is_final: whether it cannot become one when x is an expression in something else, either.
    """

    def __init__(self, *, is_final: bool = True) -> None:
        super().__init__()
        self.is_final = is_final


class Function(StrEnum):
    """The functions that stay as they are; ``STEP`` clips to 0..1."""

    ERF = "erf"
    EXP = "exp"
    RELU = "relu"
    SIGMOID = "sigmoid"
    SOFTPLUS = "softplus"
    STEP = "step"
    TANH = "tanh"


@dataclass(frozen=True)
class Atom:
    """A function of a form."""

    function: Function
    argument: Form


@dataclass(frozen=True)
class Term:
    """``coefficient * x ** power``, times *atom* if there is one."""

    coefficient: float
    power: int = 0
    atom: Atom | None = None


@dataclass(frozen=True)
class Form:
    """A sum of terms; no two share power and atom, none is zero."""

    terms: tuple[Term, ...] = ()

    @classmethod
    def constant(cls, value: float) -> Form:
        """The form that is *value* everywhere."""
        return cls((Term(value),)) if value else cls()

    @classmethod
    def linear(cls, slope: float, offset: float = 0.0) -> Form:
        """``slope * x + offset``."""
        terms = (Term(offset), Term(slope, 1))
        return cls(tuple(t for t in terms if t.coefficient))

    @property
    def polynomial(self) -> dict[int, float]:
        """Coefficients by power, of the terms that have no atom."""
        return {t.power: t.coefficient for t in self.terms if t.atom is None}

    @property
    def atoms(self) -> tuple[Term, ...]:
        """The terms that have an atom."""
        return tuple(t for t in self.terms if t.atom is not None)

    def as_constant(self) -> float | None:
        """The value, if it does not depend on x."""
        polynomial = self.polynomial
        if self.atoms or set(polynomial) - {0}:
            return None
        return polynomial.get(0, 0.0)

    def as_linear(self) -> tuple[float, float] | None:
        """(slope, offset), if that is all there is and the slope is not zero."""
        polynomial = self.polynomial
        if self.atoms or set(polynomial) - {0, 1} or 1 not in polynomial:
            return None
        return polynomial[1], polynomial.get(0, 0.0)


@dataclass(frozen=True)
class ScalarAlgebra:
    """Operations on forms.

    Attributes:
        tolerance: relative difference up to which two coefficients are the same number: what
            rounding the constants of a model to its element type leaves of it.
    """

    tolerance: float

    def near(self, a: float, b: float) -> bool:
        """Whether *a* and *b* are the same number."""
        return a == b or abs(a - b) <= self.tolerance * max(abs(a), abs(b))

    def same(self, f: Form, g: Form) -> bool:
        """Whether *f* and *g* are the same form."""
        return len(f.terms) == len(g.terms) and all(
            s.power == t.power
            and self.near(s.coefficient, t.coefficient)
            and self._same_atom(s.atom, t.atom)
            for s, t in zip(f.terms, g.terms, strict=True)
        )

    def _same_atom(self, a: Atom | None, b: Atom | None) -> bool:
        if a is None or b is None:
            return a is b
        return a.function is b.function and self.same(a.argument, b.argument)

    # -- arithmetic ----------------------------------------------------------------------------

    def scale(self, f: Form, factor: float) -> Form:
        """``factor * f``."""
        if not math.isfinite(factor):
            raise NoFormError
        if not factor:
            return Form()
        return Form(tuple(Term(t.coefficient * factor, t.power, t.atom) for t in f.terms))

    def add(self, f: Form, g: Form) -> Form:
        """``f + g``; a term whose parts cancel up to rounding is dropped."""
        terms = list(f.terms)
        for term in g.terms:
            self._add_term(terms, term)
        return Form(tuple(sorted(terms, key=_order)))

    def _add_term(self, terms: list[Term], new: Term) -> None:
        for index, old in enumerate(terms):
            if old.power != new.power or not self._same_atom(old.atom, new.atom):
                continue
            total = old.coefficient + new.coefficient
            if self.near(old.coefficient, -new.coefficient):
                del terms[index]
            else:
                terms[index] = Term(total, old.power, old.atom)
            return
        terms.append(new)

    def subtract(self, f: Form, g: Form) -> Form:
        """``f - g``."""
        return self.add(f, self.scale(g, -1.0))

    def multiply(self, f: Form, g: Form) -> Form:
        """``f * g``; a product of two functions has no form."""
        product = Form()
        for s in f.terms:
            for t in g.terms:
                power = s.power + t.power
                if (s.atom is not None and t.atom is not None) or power > _MAX_POWER:
                    raise NoFormError
                term = Term(s.coefficient * t.coefficient, power, s.atom or t.atom)
                product = self.add(product, Form((term,)))
        return product

    def power(self, f: Form, exponent: float) -> Form:
        """``f ** exponent`` for small whole exponents."""
        if exponent not in (1.0, 2.0, 3.0):
            raise NoFormError
        result = f
        for _ in range(int(exponent) - 1):
            result = self.multiply(result, f)
        return result

    def divide(self, f: Form, g: Form) -> Form:
        """``f / g``, for a constant *g* and for ``g = a + a exp(u)``."""
        value = g.as_constant()
        if value is not None:
            if not value:
                raise NoFormError
            return self.scale(f, 1.0 / value)
        scale, exponent = self._one_plus_exp(g)
        gate = self.apply(Function.SIGMOID, self.scale(exponent, -1.0))
        return self.scale(self.multiply(f, gate), 1.0 / scale)

    def log(self, f: Form) -> Form:
        """``log f``, for ``f = 1 + exp(u)``."""
        scale, exponent = self._one_plus_exp(f)
        if not self.near(scale, 1.0):
            raise NoFormError
        return self.apply(Function.SOFTPLUS, exponent)

    def _one_plus_exp(self, f: Form) -> tuple[float, Form]:
        """(a, u) of ``f = a + a exp(u)``."""
        constant = f.polynomial
        if set(constant) != {0} or len(f.atoms) != 1:
            raise NoFormError(is_final=False)
        term = f.atoms[0]
        assert term.atom is not None
        if term.atom.function is not Function.EXP or term.power:
            raise NoFormError
        if not self.near(term.coefficient, constant[0]):
            raise NoFormError
        return constant[0], term.atom.argument

    def apply(self, function: Function, f: Form) -> Form:
        """``function(f)`` for a smooth function; constants have been folded elsewhere."""
        if f.as_constant() is not None:
            raise NoFormError
        return Form((Term(1.0, 0, Atom(function, f)),))

    # -- piecewise linear ----------------------------------------------------------------------

    def maximum(self, f: Form, g: Form) -> Form:
        """``max(f, g)`` of constants and linear forms, or of a clipped form and a constant."""
        value = g.as_constant()
        if value is not None:
            return self.clip(f, value, math.inf)
        if f.as_constant() is not None:
            return self.maximum(g, f)
        if f.as_linear() is None or g.as_linear() is None:
            raise NoFormError
        return self.add(g, self._relu(self.subtract(f, g)))

    def minimum(self, f: Form, g: Form) -> Form:
        """``min(f, g)``, of what :meth:`maximum` takes."""
        return self.scale(self.maximum(self.scale(f, -1.0), self.scale(g, -1.0)), -1.0)

    def step(self, f: Form) -> Form:
        """``min(max(f, 0), 1)`` of a linear form, with a positive slope inside."""
        linear = f.as_linear()
        if linear is None:
            raise NoFormError
        if linear[0] > 0:
            return self.apply(Function.STEP, f)
        mirrored = self.apply(Function.STEP, self.subtract(Form.constant(1.0), f))
        return self.subtract(Form.constant(1.0), mirrored)

    def clip(self, f: Form, low: float, high: float) -> Form:
        """``min(max(f, low), high)`` of a linear form, or of one that is clipped already."""
        if not low < high:
            raise NoFormError
        value = f.as_constant()
        if value is not None:
            return Form.constant(min(max(value, low), high))
        inner, below, above = self._unclip(f)
        low, high = (min(max(bound, low), high) for bound in (below, above))
        if not low < high:
            raise NoFormError
        if math.isinf(low) and math.isinf(high):
            return inner
        if math.isinf(high):
            return self.add(
                Form.constant(low), self._relu(self.subtract(inner, Form.constant(low)))
            )
        if math.isinf(low):
            return self.subtract(inner, self._relu(self.subtract(inner, Form.constant(high))))
        shifted = self.subtract(inner, Form.constant(low))
        width = high - low
        return self.add(
            Form.constant(low), self.scale(self.step(self.scale(shifted, 1.0 / width)), width)
        )

    def _relu(self, f: Form) -> Form:
        linear = f.as_linear()
        if linear is None:
            raise NoFormError
        slope, offset = linear
        unit = self.apply(Function.RELU, Form.linear(1.0, offset / slope))
        hinge = self.scale(unit, abs(slope))
        return hinge if slope > 0 else self.add(hinge, f)

    def _unclip(self, f: Form) -> tuple[Form, float, float]:
        """(v, l, h) with ``f = min(max(v, l), h)`` and v linear."""
        if f.as_linear() is not None:
            return f, -math.inf, math.inf
        if len(f.atoms) != 1:
            raise NoFormError
        term = f.atoms[0]
        assert term.atom is not None
        rest = Form(tuple(t for t in f.terms if t.atom is None))
        inner = self.scale(term.atom.argument, term.coefficient)
        if term.power or inner.as_linear() is None:
            raise NoFormError
        if term.atom.function is Function.STEP and rest.as_constant() is not None:
            bottom = rest.as_constant() or 0.0
            ends = sorted((bottom, bottom + term.coefficient))
            return self.add(inner, rest), ends[0], ends[1]
        if term.atom.function is Function.RELU:
            return self._unhinge(term, rest, inner)
        raise NoFormError

    def _unhinge(self, term: Term, rest: Form, inner: Form) -> tuple[Form, float, float]:
        """The same for ``rest + c relu(x + b)``, which must be flat on one side of ``-b``."""
        assert term.atom is not None
        flat = rest.as_constant()
        if flat is not None:
            v = self.add(inner, rest)
            return (v, flat, math.inf) if term.coefficient > 0 else (v, -math.inf, flat)
        linear = rest.as_linear()
        if linear is None or not self.near(linear[0], -term.coefficient):
            raise NoFormError
        bend = linear[1] - linear[0] * term.atom.argument.polynomial.get(0, 0.0)
        return (rest, -math.inf, bend) if linear[0] > 0 else (rest, bend, math.inf)


def _order(term: Term) -> tuple[str, int]:
    return (term.atom.function.value if term.atom is not None else "", term.power)
