"""Provider options: tried on a finished model, kept apart from rewriting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pwopt.errors import UsageError
from pwopt.remark import Verdict
from pwopt.runtime import Comparison, Interface, Latency, Reference
from pwopt.target import Target
from pwopt.tuning.effort import Effort
from pwopt.tuning.options import OptionsFound, seconds_for_options, try_options
from tests.runtime.stand_in import DEVICE, use_stand_in

TRIALS: tuple[Mapping[str, str], ...] = ({"a": "1"}, {"b": "1"}, {"c": "1"})
MODEL: Any = SimpleNamespace(path=Path("finished.onnx"), sha256="f")
ORIGINAL: Any = SimpleNamespace(path=Path("original.onnx"), sha256="o")


def comparison(speedup: float) -> Comparison:
    latency = Latency(1.0, (1.0, 1.0), 9)
    around = (speedup - 0.001, speedup + 0.001)
    return Comparison(latency, latency, speedup, around, 9, stable=True)


class Bench:
    """A workbench whose options multiply."""

    def __init__(self, gains: Mapping[str, float], wrong: str = "", broken: str = "") -> None:
        self.target = Target("device")
        self.original = ORIGINAL
        self.gains = gains
        self.broken = broken
        self.asked: list[tuple[str, dict[str, str], dict[str, str]]] = []
        bench = self

        class Oracle(Reference):
            def verify(self, candidate: Any) -> Any:
                ok = wrong not in self.target.provider_options
                return SimpleNamespace(ok=ok, reason="output 'y' deviates")

        self.reference: Reference | None = Oracle(
            Path(), bench.target, (), (), (), Interface((), ()), None, {}
        )

    def compare_targets(
        self, model: Any, baseline: Target, candidate: Target, *_: object, **__: object
    ) -> Comparison:
        before, after = dict(baseline.provider_options), dict(candidate.provider_options)
        self.asked.append((model.sha256, before, after))
        if self.broken in after:
            raise UsageError("cannot be combined")
        ratio = 1.0
        for key in after.keys() - before.keys():
            ratio *= self.gains.get(key, 1.0)
        return comparison(ratio)


def tried(bench: Bench, seconds: float = 60.0) -> OptionsFound | None:
    return try_options(bench, MODEL, seconds)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stand_in(monkeypatch, replace(DEVICE, trials=TRIALS))


def test_what_gains_is_kept_and_built_upon() -> None:
    bench = Bench({"a": 1.1, "b": 0.8, "c": 1.2})
    found = tried(bench)
    assert found is not None
    assert found.settings == {"a": "1", "c": "1"}
    verdicts = [trial.verdict for trial in found.trials]
    assert verdicts == [Verdict.KEPT, Verdict.REJECTED_SLOWER, Verdict.KEPT]
    a, ac = {"a": "1"}, {"a": "1", "c": "1"}
    assert bench.asked[:3] == [("f", {}, a), ("f", a, {"a": "1", "b": "1"}), ("f", a, ac)]
    # In the end both models, each with the options against itself without.
    assert bench.asked[3:] == [("o", {}, ac), ("f", {}, ac)]
    assert found.original is not None
    assert found.original.speedup == pytest.approx(1.32)


def test_small_gains_are_none() -> None:
    found = tried(Bench({"a": 1.004}))
    assert found is not None
    assert (found.settings, found.original, found.optimized) == ({}, None, None)
    assert len(found.trials) == 3


def test_what_computes_otherwise_or_does_not_run_is_refused() -> None:
    bench = Bench({"a": 2.0, "b": 2.0, "c": 2.0}, wrong="a", broken="b")
    found = tried(bench)
    assert found is not None
    assert found.settings == {"c": "1"}
    assert [trial.reason for trial in found.trials] == [
        "output 'y' deviates",
        "cannot be combined",
        "",
    ]
    assert [trial.comparison is None for trial in found.trials] == [True, True, False]


def test_what_the_user_set_is_left_alone() -> None:
    bench = Bench({"a": 2.0})
    bench.target = Target("device", provider_options={"a": "0"})
    found = tried(bench)
    assert found is not None
    assert [dict(trial.settings) for trial in found.trials] == [{"b": "1"}, {"c": "1"}]


def test_nothing_is_tried_without_time_a_reference_or_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert tried(Bench({}), seconds=0.0) is None
    bench = Bench({})
    bench.reference = None
    assert tried(bench) is None
    bench = Bench({})
    bench.target = Target("cpu")
    assert tried(bench) is None
    assert not bench.asked


def test_time_for_options() -> None:
    assert seconds_for_options(Effort.NONE, None) == 0.0
    assert seconds_for_options(Effort.QUICK, None) < seconds_for_options(Effort.FULL, None)
    assert seconds_for_options(Effort.QUICK, 8.0) == 2.0
