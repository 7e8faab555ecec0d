"""Provider options, tried on a finished model and reported apart from what rewriting it gained.

They are no part of a model file: whoever deploys it has to set them. So no rewrite is judged under
options that were not asked for, and no gain of an option enters the speedup of a rewrite.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pwopt.errors import PwoptError
from pwopt.graph import Written
from pwopt.remark import Verdict
from pwopt.runtime import Comparison
from pwopt.runtime.providers import find_provider
from pwopt.target import Target
from pwopt.tuning.effort import Effort
from pwopt.tuning.verdicts import MARGIN
from pwopt.tuning.workbench import Precision, Workbench

__all__ = ["OptionTrial", "OptionsFound", "seconds_for_options", "try_options"]

_SECONDS = {Effort.NONE: 0.0, Effort.QUICK: 15.0, Effort.FULL: 300.0}
_SHARE = 0.25
"""Part of a time limit of the user's own."""
_TRIAL = Precision(7, 201, 2.0)
_LABEL = "trying provider options"


@dataclass(frozen=True)
class OptionTrial:
    """What came of trying some options.

    Attributes:
        settings: the options, on top of those that had gained before.
        verdict: whether they are kept.
        comparison: the model without them against itself with them; ``None`` if it was not timed.
        reason: why it was not, if so.
    """

    settings: Mapping[str, str]
    verdict: Verdict
    comparison: Comparison | None = None
    reason: str = ""


@dataclass(frozen=True)
class OptionsFound:
    """Options that gain together.

    Attributes:
        settings: on top of those that were asked for; empty if none gains.
        trials: everything that was tried, in order.
        original: the original as asked for, against itself with *settings*.
        optimized: the same of the finished model.
    """

    settings: Mapping[str, str]
    trials: tuple[OptionTrial, ...]
    original: Comparison | None = None
    optimized: Comparison | None = None


def seconds_for_options(effort: Effort, time_limit_s: float | None) -> float:
    """How long to try options, of which none is begun after that."""
    return _SECONDS[effort] if time_limit_s is None else _SHARE * time_limit_s


def try_options(bench: Workbench, finished: Written, seconds: float) -> OptionsFound | None:
    """Try the options that the provider lists, one after the other, and keep what gains.

    Options that the user set are left alone. A model must also compute the same under an option.

    Args:
        bench: the original, and the target.
        finished: what was found to be the fastest model on that target.
        seconds: begin no trial later.

    Returns:
        ``None`` if there is nothing to try.
    """
    target = bench.target
    trials = [
        trial
        for trial in find_provider(target.provider).trials
        if not trial.keys() & target.provider_options.keys()
    ]
    if not trials or seconds <= 0 or bench.reference is None:
        return None
    deadline = time.monotonic() + seconds
    settings: dict[str, str] = {}
    tried: list[OptionTrial] = []
    for trial in trials:
        if time.monotonic() > deadline:
            break
        outcome = _try(bench, finished, _with(target, settings), trial)
        tried.append(outcome)
        if outcome.verdict is Verdict.KEPT:
            settings |= trial
    if not settings:
        return OptionsFound({}, tuple(tried))
    best = _with(target, settings)
    original, optimized = (
        bench.compare_targets(model, target, best, _TRIAL, _LABEL)
        for model in (bench.original, finished)
    )
    return OptionsFound(settings, tuple(tried), original, optimized)


def _try(
    bench: Workbench, finished: Written, target: Target, trial: Mapping[str, str]
) -> OptionTrial:
    changed = _with(target, trial)
    assert bench.reference is not None
    try:
        verification = replace(bench.reference, target=changed).verify(finished.path)
        if not verification.ok:
            return OptionTrial(
                trial, Verdict.REJECTED_WRONG, reason=verification.reason or "it differs"
            )
        comparison = bench.compare_targets(
            finished, target, changed, _TRIAL, _LABEL, decide=1 + MARGIN
        )
    except PwoptError as error:
        return OptionTrial(trial, Verdict.REJECTED_WRONG, reason=str(error))
    gains = comparison.ci95[0] > 1 + MARGIN
    return OptionTrial(trial, Verdict.KEPT if gains else Verdict.REJECTED_SLOWER, comparison)


def _with(target: Target, settings: Mapping[str, str]) -> Target:
    return replace(target, provider_options={**target.provider_options, **settings})
