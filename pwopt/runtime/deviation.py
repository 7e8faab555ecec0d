"""How far output values lie from reference values: tensors, sequences, maps, optionals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pwopt.errors import UsageError
from pwopt.runtime.session import Value

__all__ = [
    "Difference",
    "OutputDeviation",
    "compare_outputs",
    "compare_types",
    "compare_values",
    "is_finite",
    "leaves",
]

_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class OutputDeviation:
    """How one output of a candidate differs from the reference, over all input sets.

    Attributes:
        name: the output.
        max_abs: largest absolute difference; infinite where values cannot be subtracted.
        max_relative: largest difference divided by the largest magnitude in the reference output
            (``max|a-b| / max|reference|``); infinite where values cannot be subtracted.
        tolerance: what ``max_relative`` may be; 0 for types other than floats.
        equal: whether all values are the same (NaN equals NaN).
        problem: what no tolerance excuses: another type or shape, unequal integers, a NaN or
            infinity that the reference does not have.
        why: why the comparison proves nothing, such as ``"constant output"``; else ``None``.
    """

    name: str
    max_abs: float
    max_relative: float
    tolerance: float
    equal: bool
    problem: str | None = None
    why: str | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against this output."""
        return self.problem is None and self.max_relative <= self.tolerance

    @property
    def tested(self) -> bool:
        """Whether agreement of this output means something."""
        return self.why is None


@dataclass(frozen=True)
class Difference:
    """One value against its reference; the fields mean what :class:`OutputDeviation`'s do."""

    max_abs: float = 0.0
    max_relative: float = 0.0
    equal: bool = True
    problem: str | None = None

    @classmethod
    def incomparable(cls, problem: str) -> Difference:
        """Values that cannot be subtracted."""
        return cls(math.inf, math.inf, equal=False, problem=problem)

    def joined(self, other: Difference) -> Difference:
        """The worse of both."""
        return Difference(
            max(self.max_abs, other.max_abs),
            max(self.max_relative, other.max_relative),
            self.equal and other.equal,
            self.problem or other.problem,
        )


def compare_outputs(
    reference: Mapping[str, Value],
    candidate: Mapping[str, Value],
    tolerances: Mapping[str, float] | float = 0.0,
) -> tuple[OutputDeviation, ...]:
    """Compare all outputs of one run with a reference run.

    Tensors are compared in double precision, chunk by chunk; sequences element by element, each
    against its own scale, and the values of a map together.

    Args:
        reference: outputs of the reference.
        candidate: outputs of the candidate, with the same names.
        tolerances: largest relative deviation of float outputs, by name or for all.

    Raises:
        UsageError: the names differ.
    """
    if set(reference) != set(candidate):
        raise UsageError(
            f"The outputs {sorted(candidate)} are not the reference's {sorted(reference)}."
        )
    limits = tolerances if isinstance(tolerances, Mapping) else dict.fromkeys(reference, tolerances)
    found = {name: compare_values(value, candidate[name]) for name, value in reference.items()}
    return tuple(
        OutputDeviation(
            name, d.max_abs, d.max_relative, limits.get(name, 0.0), d.equal, problem=d.problem
        )
        for name, d in found.items()
    )


def compare_values(reference: Value, candidate: Value) -> Difference:
    """Compare one output value with its reference, of whatever ONNX type."""
    mismatch = compare_types(reference, candidate)
    if mismatch is not None:
        return Difference.incomparable(mismatch)
    if isinstance(reference, list) and isinstance(candidate, list):
        if len(reference) != len(candidate):
            return Difference.incomparable(
                f"it has {len(candidate)} elements instead of {len(reference)}"
            )
        joined = Difference()
        for expected, found in zip(reference, candidate, strict=True):
            joined = joined.joined(compare_values(expected, found))
        return joined
    if isinstance(reference, dict) and isinstance(candidate, dict):
        if reference.keys() != candidate.keys():
            return Difference.incomparable("its map has other keys")
        found_values = [candidate[key] for key in reference]
        return _compare_tensors(np.asarray(list(reference.values())), np.asarray(found_values))
    if reference is None or candidate is None:
        return Difference()
    return _compare_tensors(np.asarray(reference), np.asarray(candidate))


def compare_types(reference: Value, candidate: Value) -> str | None:
    """In words, how *candidate*'s type differs; ``None`` if it does not. Shapes do not count."""
    expected, found = _type_name(reference), _type_name(candidate)
    return None if expected == found else f"it has type {found} instead of {expected}"


def is_finite(value: Value) -> bool:
    """Whether no float anywhere in *value* is NaN or infinite."""
    return all(
        bool(np.isfinite(part).all())
        for leaf in leaves(value)
        if leaf.dtype.kind == "f"
        for (part,) in _chunks(leaf)
    )


def leaves(value: Value) -> Iterator[npt.NDArray[Any]]:
    """The tensors in *value*; the values of a map count as one."""
    if isinstance(value, list):
        for element in value:
            yield from leaves(element)
    elif isinstance(value, dict):
        yield np.asarray(list(value.values()))
    elif value is not None:
        yield np.asarray(value)


def _type_name(value: Value) -> str:
    if value is None:
        return "none"
    if isinstance(value, (list, dict)):
        return "sequence" if isinstance(value, list) else "map"
    return str(np.asarray(value).dtype)


def _compare_tensors(reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> Difference:
    if reference.shape != candidate.shape:
        return Difference.incomparable(
            f"it has shape {list(candidate.shape)} instead of {list(reference.shape)}"
        )
    if reference.dtype.kind == "f":
        return _compare_floats(reference, candidate)
    unequal = sum(int(np.count_nonzero(a != b)) for a, b in _chunks(reference, candidate))
    if not unequal:
        return Difference()
    problem = f"{unequal} of {reference.size} values are unequal"
    if reference.dtype.kind not in "iu":
        return Difference.incomparable(problem)
    max_abs, scale = _extent(reference, candidate)
    return Difference(max_abs, max_abs / scale if scale else math.inf, False, problem)


def _compare_floats(reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> Difference:
    appeared = vanished = 0
    equal = True
    for a, b in _chunks(reference, candidate):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        equal = equal and bool(same.all())
        appeared += int(np.count_nonzero(~same & ~np.isfinite(b)))
        vanished += int(np.count_nonzero(~same & ~np.isfinite(a) & np.isfinite(b)))
    if appeared:
        problem = f"{appeared} of {reference.size} values are NaN or infinite, unlike the reference"
        return Difference.incomparable(problem)
    if vanished:
        problem = f"{vanished} of {reference.size} values lost the reference's NaN or infinity"
        return Difference.incomparable(problem)
    if equal:
        return Difference()
    max_abs, scale = _extent(reference, candidate)
    return Difference(max_abs, max_abs / scale if scale else math.inf, equal=False)


def _extent(reference: npt.NDArray[Any], candidate: npt.NDArray[Any]) -> tuple[float, float]:
    """Largest difference and largest reference magnitude over the finite values, in doubles."""
    max_abs = scale = 0.0
    for a, b in _chunks(reference, candidate):
        finite = np.isfinite(a)
        expected = a.astype(np.float64)
        difference = np.zeros(a.shape)
        np.subtract(expected, b.astype(np.float64), out=difference, where=finite)
        max_abs = max(max_abs, float(np.abs(difference).max(initial=0.0)))
        scale = max(scale, float(np.abs(expected).max(initial=0.0, where=finite)))
    return max_abs, scale


def _chunks(*arrays: npt.NDArray[Any]) -> Iterator[tuple[npt.NDArray[Any], ...]]:
    """Equal-sized flat pieces of all *arrays*, so that no temporary grows with an output."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, _CHUNK):
        yield tuple(array[start : start + _CHUNK] for array in flat)
