"""What the steps of a search share: building and timing, and the rulings that came of it so far."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from pwopt.remark import Fact, Verdict
from pwopt.tuning.clock import Clock
from pwopt.tuning.pipeline import Ruling, Rulings
from pwopt.tuning.settling import settle
from pwopt.tuning.timing import Timing
from pwopt.tuning.verdicts import OBJECTIONS, groups_of, is_close, is_gain, with_group, with_pass
from pwopt.tuning.workbench import Build, Group, Workbench

__all__ = ["BESIDE", "Decision", "Trials"]

Decision: TypeAlias = tuple[str, Group | None, Ruling]
"""Pass, group of equal sites (or all of the pass), and what to do with it."""

BESIDE: dict[str, Fact] = {"measured": "beside all other rewrites"}
"""What the ruling on a decision that was changed late says of its figures."""


@dataclass
class Trials:
    """One search under way. Its steps take the best build so far and return a better one, or it.

    Attributes:
        bench: the model and the target.
        clock: the time that is left.
        timing: how builds are compared.
        rulings: the last word on every candidate so far; the best build comes of them.
        thorough: whether to spend time on what rarely gains.
    """

    bench: Workbench
    clock: Clock
    timing: Timing
    rulings: Rulings
    thorough: bool

    def build(self, rulings: Rulings) -> Build:
        """Build and verify; groups that made it wrong are ruled out from here on."""
        self.bench.check_interrupted()
        self.bench.progress("rewriting", None)
        build = settle(self.bench, self.bench.build(rulings))
        refused = {k: v for k, v in build.rulings.by_group.items() if v.verdict in OBJECTIONS}
        self.rulings = replace(self.rulings, by_group={**self.rulings.by_group, **refused})
        return build

    def rule_pass(self, name: str, ruling: Ruling) -> None:
        """Rule on all sites of a pass."""
        self.rulings = with_pass(self.rulings, name, ruling)

    def rule_group(self, group: Group, ruling: Ruling) -> None:
        """Rule on a group of equal sites."""
        self.rulings = with_group(self.rulings, group, ruling)

    def attempt(self, step: Callable[[], Build | None]) -> Build | None:
        """What *step* makes; if it makes nothing, or is interrupted, the rulings stay.

        What was found to be wrong or too large meanwhile is remembered all the same.
        """
        before = self.rulings
        better = None
        try:
            better = step()
        finally:
            if better is None:
                self.rulings = self._with_objections(before)
        return better

    def _with_objections(self, rulings: Rulings) -> Rulings:
        """*rulings*, with what was found to be wrong or too large since."""
        refused = {
            key: ruling
            for key, ruling in self.rulings.by_group.items()
            if ruling.verdict in OBJECTIONS
            # Another form of what stays may have been wrong.
            and rulings.find(*key).verdict is not Verdict.KEPT
        }
        return replace(rulings, by_group={**rulings.by_group, **refused})

    def changed(self, best: Build, change: Iterable[Decision]) -> Build | None:
        """The model after *change* if that gains; else the rulings stay."""
        rulings = self.rulings
        for name, group, ruling in change:
            if group is None:
                rulings = with_pass(rulings, name, ruling)
            else:
                rulings = with_group(rulings, group, ruling)

        def step() -> Build | None:
            trial = self.build(rulings)
            if trial.written.sha256 == best.written.sha256:
                return None
            comparison = self.timing.compare(best, trial, "changes to the best so far")
            if not is_gain(comparison):
                return None
            self.rulings = trial.rulings
            return trial

        return self.attempt(step)

    def close(self, best: Build, name: str, limit: float) -> list[Decision]:
        """Taking back in what groups of a lowering pass lost by less than *limit*."""
        return [
            (name, g, Ruling(variant=self.rulings.find(*g).variant, facts=BESIDE))
            for g in groups_of(best, name)
            if is_close(self.rulings.find(*g), limit)
        ]
