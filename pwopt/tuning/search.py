"""The choice among rewrites: what is verified and measured faster stays, nothing else.

Simplifying passes are applied together and taken away one by one (what is not missed goes). The
forms of a lowering pass are timed in windows, once per group of equal sites; what gains there must
gain in the whole model too. Every comparison is in pairs, in one process.
"""

from __future__ import annotations

from dataclasses import replace

from pwopt.remark import Verdict
from pwopt.tuning.climbing import climb
from pwopt.tuning.clock import DONE, Clock
from pwopt.tuning.confirmation import Found, conclude
from pwopt.tuning.effort import ALLOWANCES, Effort
from pwopt.tuning.lowering import Lowering
from pwopt.tuning.pipeline import Ruling, Rulings
from pwopt.tuning.simplifying import choose_variants, prune
from pwopt.tuning.timing import Timing
from pwopt.tuning.trials import Trials
from pwopt.tuning.workbench import InterruptedSearch, Workbench

__all__ = ["search"]


def search(
    bench: Workbench, effort: Effort, rulings: Rulings, time_limit_s: float | None = None
) -> Found:
    """Find the fastest verified model within the effort's time.

    Args:
        bench: the model and the target.
        effort: quick or full.
        rulings: what the user decided already (limits, ordinals); never overruled.
        time_limit_s: seconds to spend on trials; by default those of the effort.
    """
    allowance = ALLOWANCES[effort]
    clock = Clock(allowance.total_s if time_limit_s is None else time_limit_s)
    timing = Timing(bench, allowance, clock)
    trials = Trials(bench, clock, timing, rulings, thorough=effort is Effort.FULL)
    held = Ruling(Verdict.HELD)
    for pass_ in bench.lower:
        trials.rule_pass(pass_.name, held)
    base = trials.build(replace(trials.rulings, default=held))
    is_pruned = is_partial = False
    try:
        best = trials.build(trials.rulings)
        if best.written.sha256 != base.written.sha256:
            best = prune(trials, base, best)
            is_pruned = True
            best = choose_variants(trials, best)
        lowering = Lowering(trials)
        best = lowering.sweep(best)
        if clock.end != DONE and clock.has_time():  # some pass had too short a share
            clock.end = DONE
            best = lowering.sweep(best)
        best = lowering.from_neutral(best)
        if trials.thorough:
            climb(trials, best)
    except InterruptedSearch:
        is_partial = True
        clock.end = "interrupted"
        if not is_pruned:  # what was not looked at has not shown to help
            trials.rulings = replace(trials.rulings, default=held)
    found = conclude(trials, base, trials.build(trials.rulings))
    return replace(found, is_partial=is_partial)
