"""Whether a rewritten model still computes what the original computes.

The reference is the original on the CPU with graph optimizations off. How far a candidate may
lie from it follows from how far the original itself moves when ONNX Runtime optimizes it, and
never less than floating-point rounding of a model of its depth.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from pwopt.errors import InvalidModelError, RuntimeUnavailableError, UsageError
from pwopt.runtime.deviation import (
    Difference,
    OutputDeviation,
    compare_outputs,
    compare_types,
    compare_values,
    is_finite,
    leaves,
)
from pwopt.runtime.placement import Placement
from pwopt.runtime.providers import find_provider
from pwopt.runtime.runs import Runs, place, run_all, run_apart
from pwopt.runtime.session import (
    ExecutionError,
    Interface,
    Outputs,
    Session,
    TensorSpec,
    UntestableError,
    Value,
    open_session,
    reference_target,
    verification_target,
    without_capture,
)
from pwopt.target import Target

__all__ = [
    "OutputDeviation",
    "Reference",
    "UntestableError",
    "Verification",
    "compare_outputs",
    "interface_difference",
    "rounding_floor",
]

_EPS: Final = MappingProxyType(
    {"double": 2.0**-52, "float": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
)
_WIDE_FLOATS: Final = frozenset({"double", "float"})
_TYPICAL_SUM: Final = 1024
_OWN_DEVIATIONS: Final = 4
_LAYERS_OF_HALF: Final = 4
_ILL_CONDITIONED: Final = 64


@dataclass(frozen=True)
class Verification:
    """The verdict on a candidate.

    Attributes:
        ok: whether the candidate may replace the original.
        max_relative: largest relative deviation of the output that uses most of its tolerance.
        tolerance: tolerance of that same output.
        required_tolerance: the smallest tolerance for all outputs alike that would accept the
            candidate; infinite if none would.
        inputs: number of input sets compared.
        outputs: every output, in the model's order; empty if the candidate did not run.
        reason: the first thing that is wrong, in words; ``None`` if ``ok``.
        placement: which provider ran which node, on a device.
    """

    ok: bool
    max_relative: float
    tolerance: float
    required_tolerance: float
    inputs: int
    outputs: tuple[OutputDeviation, ...]
    reason: str | None
    placement: Placement | None = None

    @property
    def tested(self) -> bool:
        """Whether at least one output was put to a test that means something."""
        return any(output.tested for output in self.outputs)

    def to_json(self) -> dict[str, Any]:
        """As JSON-compatible values; without the placement, which is looked at anew."""
        return asdict(replace(self, placement=None))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Verification:
        """What :meth:`to_json` made, also after a way through JSON."""
        outputs = tuple(OutputDeviation(**output) for output in value["outputs"])
        return cls(**{**value, "outputs": outputs})


@dataclass(frozen=True)
class _Expectation:
    """What may be asked of one output.

    Attributes:
        tolerance: of the relative deviation.
        why: why agreement proves nothing, if so.
        witnesses: indices of the input sets on which the original itself is reproducible.
    """

    tolerance: float
    why: str | None
    witnesses: frozenset[int]

    def compare(self, index: int, expected: Value, found: Value) -> Difference:
        """Compare as much as input set *index* bears."""
        if index in self.witnesses:
            return compare_values(expected, found)
        mismatch = compare_types(expected, found)
        if mismatch is not None:
            return Difference.incomparable(mismatch)
        if is_finite(expected) and not is_finite(found):
            return Difference.incomparable("it has NaN or infinity where the original has none")
        return Difference()


@dataclass(frozen=True, eq=False)
class Reference:
    """Outputs of an original model, and how closely a candidate must meet them.

    Attributes:
        path: the original.
        target: what candidates run on.
        feeds: the input sets in use.
        outputs: reference outputs, one per input set.
        dropped: per input set left out, why.
        interface: inputs and outputs that a candidate must have too.
        placement: which provider ran which node of the original, on a device.
    """

    path: Path
    target: Target
    feeds: tuple[Mapping[str, Value], ...]
    outputs: tuple[Outputs, ...]
    dropped: tuple[str, ...]
    interface: Interface
    placement: Placement | None
    _expectations: Mapping[str, _Expectation]

    @classmethod
    def of(
        cls,
        original: Path,
        target: Target,
        feeds: Sequence[Mapping[str, Value]],
        *,
        depth: int = 1,
        max_error: float | None = None,
        precision: str | None = None,
    ) -> Reference:
        """Run *original* unoptimized on the CPU, then optimized on *target*, on all *feeds*.

        The tolerance of an output is four times its own deviation between the two, at least
        :func:`rounding_floor`. Input sets on which the original fails are left out, and those
        that give a NaN or infinity too as long as others do not. An output is reported as
        untested if it is random (two runs differ), the same for all input sets, empty, or if
        optimizing the original moves it so far that a tolerance would prove nothing.

        Args:
            original: the model file.
            target: provider, threads and options for the optimized run and for candidates.
            feeds: input sets.
            depth: layers that round one after another, for the floor.
            max_error: replaces the tolerance of every float output.
            precision: coarsest float type computed with inside the model (``"float16"``), where
                its outputs are of a finer one.

        Raises:
            UsageError: *max_error* is not positive, *depth* below 1, or the feeds do not fit.
            InvalidModelError: the original does not load.
            RuntimeUnavailableError: the provider leaves nodes to the CPU, which *target* does not
                allow.
            UntestableError: the runtime lacks a kernel for it, or it fails on every input set.
        """
        if max_error is not None and not max_error > 0:
            raise UsageError(f"A largest error of {max_error} is impossible; give one above 0.")
        if depth < 1:
            raise UsageError(f"A depth of {depth} is impossible; give 1 or more.")
        plain = _reference_runs(original, reference_target(target), feeds)
        optimized = _own_deviations(original, verification_target(target), feeds, plain.outputs)
        failures = {**optimized.failures, **plain.failures}
        used = [index for index in range(len(feeds)) if index not in failures]
        if not used:
            reason = failures[0] if failures else "there are no input sets"
            raise UntestableError(f"{original.name} cannot be tested: {reason}")
        finite = [i for i in used if all(map(is_finite, plain.outputs[i].values()))]
        if finite:
            failures |= dict.fromkeys(set(used) - set(finite), "the original gives NaN or infinity")
            used = finite
        expectations = {
            spec.name: _expectation(
                [plain.outputs[index][spec.name] for index in used],
                [optimized.deviations[index][spec.name] for index in used],
                plain.repeatability[spec.name],
                floor=_floor(spec, depth, precision),
                max_error=max_error,
                has_inputs=bool(plain.interface.inputs),
            )
            for spec in plain.interface.outputs
        }
        return cls(
            path=original,
            target=target,
            feeds=tuple(feeds[index] for index in used),
            outputs=tuple(plain.outputs[index] for index in used),
            dropped=tuple(f"input set {i}: {failures[i]}" for i in sorted(failures)),
            interface=plain.interface,
            placement=optimized.placement,
            _expectations=MappingProxyType(expectations),
        )

    @property
    def untested(self) -> dict[str, str]:
        """Why outputs prove nothing, by name, for those that do not."""
        return {n: e.why for n, e in self._expectations.items() if e.why is not None}

    @property
    def tolerances(self) -> dict[str, float]:
        """Tolerance of the relative deviation by output; 0 for types other than floats."""
        return {name: e.tolerance for name, e in self._expectations.items()}

    def verify(self, candidate: Session | Path) -> Verification:
        """Run *candidate* on all input sets and compare interface and outputs.

        A candidate that does not load or run is a verdict, not an error. A session must have been
        opened for ``verification_target(target)``; a path is opened so. Where a provider's options
        leave gaps in what makes it exact, a candidate that deviates too far is run once more in a
        process of its own that closes them.

        Raises:
            RuntimeUnavailableError: the provider does not start.
        """
        if isinstance(candidate, Session):
            return self._verify(candidate)
        provider, target = find_provider(self.target.provider), verification_target(self.target)
        try:
            with tempfile.TemporaryDirectory(prefix="pwopt-verify-") as folder:
                prefix = Path(folder) / "profile" if provider.is_device else None
                with open_session(candidate, target, profile_to=prefix) as session:
                    found = self._verify(session)
                    if prefix is not None:
                        found = self._placed(found, place(session))
            if found.ok or not provider.exact_environment or math.isinf(found.required_tolerance):
                return found
            feeds = dict(enumerate(self.feeds))
            runs = run_apart(candidate, target, feeds, provider.exact_environment)
        except (InvalidModelError, UntestableError, ExecutionError) as error:
            return self._refused(f"it does not load: {error}")
        return self._judge_runs(runs)

    def deviation(self, candidate: Path, target: Target) -> float:
        """How far *candidate* deviates on another *target*, relative to each output's scale.

        The largest deviation of any output that is tested; infinite if one cannot be compared.

        Raises:
            PwoptError: it does not load or run.
        """
        feeds = dict(enumerate(self.feeds))
        found = self._judge_runs(run_all(candidate, without_capture(target), feeds))
        tested = [o.max_relative for o in found.outputs if o.tested]
        return max(tested, default=0.0) if found.outputs else math.inf

    def _verify(self, session: Session) -> Verification:
        difference = interface_difference(self.interface, session.interface)
        if difference is not None:
            return self._refused(difference)
        return self._judge(lambda index: session.run(self.feeds[index]))

    def _judge_runs(self, runs: Runs) -> Verification:
        difference = interface_difference(self.interface, runs.interface)
        if difference is not None:
            return self._refused(difference)

        def outputs(index: int) -> Outputs:
            if index in runs.failures:
                raise ExecutionError(runs.failures[index])
            return runs.outputs[index]

        found = self._judge(outputs)
        return found if runs.placement is None else self._placed(found, runs.placement)

    def _judge(self, run: Callable[[int], Outputs]) -> Verification:
        """Compare the outputs that *run* gives for each input set."""
        joined = {name: Difference() for name in self._expectations}
        for index, expected in enumerate(self.outputs):
            try:
                outputs = run(index)
            except ExecutionError as error:
                return self._refused(f"it fails on input set {index}: {error}")
            for name, expectation in self._expectations.items():
                found = expectation.compare(index, expected[name], outputs[name])
                joined[name] = joined[name].joined(found)
        deviations = tuple(
            OutputDeviation(
                name,
                joined[name].max_abs,
                joined[name].max_relative,
                expectation.tolerance,
                joined[name].equal,
                problem=joined[name].problem,
                why=expectation.why,
            )
            for name, expectation in self._expectations.items()
        )
        return _verdict(deviations, len(self.feeds))

    def _placed(self, found: Verification, placement: Placement) -> Verification:
        """*found*, which a provider that left nodes to another one spoils."""
        found = replace(found, placement=placement)
        if self.target.allow_fallback or not found.ok or placement.complaint is None:
            return found
        return replace(found, ok=False, required_tolerance=math.inf, reason=placement.complaint)

    def _refused(self, reason: str) -> Verification:
        largest = max(self.tolerances.values(), default=0.0)
        return Verification(
            ok=False,
            max_relative=math.inf,
            tolerance=largest,
            required_tolerance=math.inf,
            inputs=len(self.feeds),
            outputs=(),
            reason=reason,
        )


def interface_difference(original: Interface, candidate: Interface) -> str | None:
    """The first way in which *candidate*'s inputs or outputs differ, in words; else ``None``."""
    return _specs_difference("input", original.inputs, candidate.inputs) or _specs_difference(
        "output", original.outputs, candidate.outputs
    )


def rounding_floor(element: str, depth: int) -> float:
    """Relative rounding error to expect of a network's output; 0 for types other than floats.

    Errors of a sum of ``t`` terms grow like ``sqrt(t) * eps`` (Higham and Mary, *A new approach
    to probabilistic rounding error analysis*, 2019); a convolution adds up about a thousand
    terms, and the errors of successive layers add in quadrature: ``32 * eps * sqrt(depth)``, that
    is 4e-6 for one fp32 layer and 3e-5 for fifty. Half types are accumulated in single precision,
    so that a layer rounds only its result and a few values on the way: ``4 * eps * sqrt(depth)``.

    Args:
        element: type in ONNX Runtime's words: ``"float"``, ``"double"``, ``"float16"``, ...
        depth: number of layers that round one after another.
    """
    if element not in _EPS:
        return 0.0
    factor = math.sqrt(_TYPICAL_SUM) if element in _WIDE_FLOATS else _LAYERS_OF_HALF
    return factor * _EPS[element] * math.sqrt(depth)


@dataclass(frozen=True, eq=False)
class _ReferenceRuns:
    """The original without optimizations: outputs or the reason for failing, by input set.

    ``repeatability`` is, by output, the difference between two runs on the same values.
    """

    interface: Interface
    outputs: Mapping[int, Outputs]
    failures: Mapping[int, str]
    repeatability: Mapping[str, Difference]


@dataclass(frozen=True, eq=False)
class _OptimizedRuns:
    """The original with all optimizations: its deviation from the reference, by input set."""

    deviations: Mapping[int, Mapping[str, Difference]]
    failures: Mapping[int, str]
    placement: Placement | None


def _reference_runs(
    path: Path, target: Target, feeds: Sequence[Mapping[str, Value]]
) -> _ReferenceRuns:
    outputs: dict[int, Outputs] = {}
    failures: dict[int, str] = {}
    repeatability: dict[str, Difference] = {}
    with open_session(path, target, optimized=False) as session:
        for index, feed in enumerate(feeds):
            try:
                outputs[index] = session.run(feed)
                # Two sessions would not show randomness: ONNX Runtime seeds them alike.
                if not repeatability:
                    repeatability = _differences(outputs[index], session.run(feed))
            except ExecutionError as error:
                failures[index] = str(error)
        return _ReferenceRuns(session.interface, outputs, failures, repeatability)


def _own_deviations(
    path: Path,
    target: Target,
    feeds: Sequence[Mapping[str, Value]],
    reference: Mapping[int, Outputs],
) -> _OptimizedRuns:
    environment = find_provider(target.provider).exact_environment
    asked = {index: feeds[index] for index in reference}
    if environment:
        runs = run_apart(path, target, asked, environment)
    else:
        runs = run_all(path, target, asked)
    complaint = None if runs.placement is None else runs.placement.complaint
    if complaint is not None and not target.allow_fallback:
        raise RuntimeUnavailableError(
            f"{path.name}: {complaint}. Pass --allow-fallback to accept that, or --provider cpu."
        )
    deviations = {i: _differences(reference[i], outputs) for i, outputs in runs.outputs.items()}
    return _OptimizedRuns(deviations, runs.failures, runs.placement)


def _differences(reference: Outputs, candidate: Outputs) -> dict[str, Difference]:
    return {name: compare_values(value, candidate[name]) for name, value in reference.items()}


def _expectation(
    reference: Sequence[Value],
    own: Sequence[Difference],
    repeatability: Difference,
    *,
    floor: float,
    max_error: float | None,
    has_inputs: bool,
) -> _Expectation:
    """What the original's own behaviour allows to ask of one output.

    *reference* and *own* hold, per input set, its value and the optimized original's deviation.
    """
    limit = _ILL_CONDITIONED * floor
    if repeatability.problem is not None or repeatability.max_relative > limit:
        return _Expectation(0.0, "random output", frozenset())
    if max_error is not None:
        limit = math.inf
    witnesses = frozenset(
        i for i, d in enumerate(own) if d.problem is None and d.max_relative <= limit
    )
    if not witnesses:
        return _Expectation(0.0, _irreproducible(own), witnesses)
    largest = max(repeatability.max_relative, *(own[i].max_relative for i in witnesses))
    tolerance = max(_OWN_DEVIATIONS * largest, floor)
    if max_error is not None and floor > 0:
        tolerance = max_error
    return _Expectation(tolerance, _proves_nothing(reference, has_inputs=has_inputs), witnesses)


def _irreproducible(own: Sequence[Difference]) -> str:
    problem = next((d.problem for d in own if d.problem is not None), None)
    if problem is not None:
        return f"optimizing the original changes it: {problem}"
    least = min(d.max_relative for d in own)
    return f"optimizing the original moves it by {least:.1e}"


def _proves_nothing(reference: Sequence[Value], *, has_inputs: bool) -> str | None:
    """Why agreement with these reference values says nothing about the model, if so."""
    tensors = [leaf for value in reference for leaf in leaves(value)]
    if not any(tensor.size for tensor in tensors):
        return "empty output"
    if not any(tensor.dtype.kind != "f" or np.isfinite(tensor).any() for tensor in tensors):
        return "no finite value"
    if not has_inputs:  # then its one value is all there is to know
        return None
    if len(reference) > 1:
        is_constant = all(compare_values(reference[0], other).equal for other in reference[1:])
    else:
        is_constant = all(t.size > 1 and bool((t == t.flat[0]).all()) for t in tensors)
    return "constant output" if is_constant else None


def _floor(spec: TensorSpec, depth: int, precision: str | None) -> float:
    """Rounding floor of an output; sequences and maps end with their element type."""
    element = re.findall(r"\w+", spec.type)[-1]
    floor = rounding_floor(element, depth)
    return max(floor, rounding_floor(precision, depth)) if floor and precision else floor


def _verdict(deviations: tuple[OutputDeviation, ...], inputs: int) -> Verification:
    worst = max(deviations, key=_share_of_tolerance)
    failing = next((deviation for deviation in deviations if not deviation.ok), None)
    hopeless = any(deviation.problem is not None for deviation in deviations)
    return Verification(
        ok=failing is None,
        max_relative=worst.max_relative,
        tolerance=worst.tolerance,
        required_tolerance=math.inf if hopeless else max(d.max_relative for d in deviations),
        inputs=inputs,
        outputs=deviations,
        reason=None if failing is None else _reason(failing),
    )


def _share_of_tolerance(deviation: OutputDeviation) -> float:
    if deviation.problem is not None:
        return math.inf
    if deviation.max_relative == 0:
        return 0.0
    return deviation.max_relative / deviation.tolerance if deviation.tolerance else math.inf


def _reason(failing: OutputDeviation) -> str:
    if failing.problem is not None:
        return f"output '{failing.name}': {failing.problem}"
    return (
        f"output '{failing.name}' deviates by {failing.max_relative:.1e}, "
        f"more than its tolerance of {failing.tolerance:.1e}"
    )


def _specs_difference(
    kind: str, original: tuple[TensorSpec, ...], candidate: tuple[TensorSpec, ...]
) -> str | None:
    names, found = [spec.name for spec in original], [spec.name for spec in candidate]
    for name in names:
        if name not in found:
            return f"{kind} '{name}' is missing"
    for name in found:
        if name not in names:
            return f"{kind} '{name}' is new"
    if names != found:
        return f"the {kind}s are in another order: {', '.join(found)}"
    for want, have in zip(original, candidate, strict=True):
        if want.type != have.type:
            return f"{kind} '{want.name}' has type {have.type} instead of {want.type}"
        if want.shape != have.shape:
            return f"{kind} '{want.name}' has shape {_shape(have)} instead of {_shape(want)}"
    return None


def _shape(spec: TensorSpec) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in spec.shape) + "]"
