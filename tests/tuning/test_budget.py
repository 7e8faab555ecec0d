"""What was chosen on some samples is taken only if it keeps the budget on others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pwopt.calibration import Judge
from pwopt.graph import Written
from pwopt.result import AccuracyFigures
from pwopt.tuning import budget as budget_module
from pwopt.tuning.allocation import Step
from pwopt.tuning.budget import Budget, Judged, Outcome, confirmed


def lost(drop: float) -> AccuracyFigures:
    return AccuracyFigures("top1", "%", 80, 80 - drop, 100, drop, (drop - 1, drop + 1), {})


def point(name: str, drop: float, macs: int) -> Judged:
    made = Written(Path(name), name, 0)
    return Judged(Step({}, 0.0, 0.0), made, lost(drop), None, macs, 100)


class Final:
    """Says what models lose, and remembers which ones it was asked about."""

    def __init__(self, **drops: float) -> None:
        self.drops = drops
        self.asked: list[str] = []

    def figures(self, path: Path, _: Any) -> AccuracyFigures:
        self.asked.append(path.name)
        return lost(self.drops[path.name])


POINTS = (point("a", 0.2, 90), point("b", 0.9, 70), point("c", 0.8, 60), point("d", 3.0, 40))


def chosen(final: Final, budget: Budget, *more: Judged) -> Outcome:
    def silent(*_: Any) -> None:
        pass

    left = list(more)
    best = POINTS[2] if budget.target_speedup is None else POINTS[1]
    return confirmed(
        Outcome(POINTS, best),
        budget,
        cast("Judge", final),
        silent,
        lambda _: left.pop(0) if left else None,
    )


def test_one_that_keeps_the_budget_is_looked_at_once() -> None:
    final = Final(c=0.95)
    outcome = chosen(final, Budget(1.0, None))
    assert final.asked == ["c"]
    assert outcome.best is outcome.points[2]
    assert outcome.best.final == lost(0.95)
    assert [p.final is None for p in outcome.points] == [True, True, False, True]


def test_one_that_was_lucky_gives_way_to_the_next_slower_one() -> None:
    final = Final(a=0.4, b=1.1, c=1.3)
    outcome = chosen(final, Budget(1.0, None))
    assert final.asked == ["c", "b", "a"]
    assert outcome.best is outcome.points[0]
    assert [p.final and p.final.drop for p in outcome.points] == [0.4, 1.1, 1.3, None]


def test_slower_ones_are_made_where_none_that_was_made_is_left() -> None:
    final = Final(a=1.4, b=1.1, c=1.3, e=1.2, f=0.7)
    outcome = chosen(final, Budget(1.0, None), point("e", 0.3, 93), point("f", 0.2, 96))
    assert final.asked == ["c", "b", "a", "e", "f"]
    assert outcome.best is outcome.points[0]
    assert [p.written.path.name for p in outcome.points] == ["f", "e", "a", "b", "c", "d"]


def test_slower_ones_are_predicted_to_lose_as_much_less_as_was_lost_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = [Step({}, loss, 10 * loss) for loss in (0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0)]
    drops = {0.2: 0.3, 0.4: 0.9, 0.6: 1.25, 0.8: 1.1, 1.0: 1.3}
    asked = []

    def judged(self: Any, steps: Any, index: int) -> Judged:
        loss = steps[index].loss
        asked.append(loss)
        made = Written(Path(str(loss)), str(loss), 0)
        self.made[index] = Judged(steps[index], made, lost(drops[loss]), None, 90, 100)
        found: Judged = self.made[index]
        return found

    search = budget_module._Search(*(cast("Any", None),) * 4, Budget(1.0, None), *(None,) * 3)  # type: ignore[arg-type]
    monkeypatch.setattr(budget_module._Search, "_judged", judged)
    found = search.slower(steps, judged(search, steps, 6))
    assert found is not None
    assert asked == [1.0, 0.6, 0.4]
    wrong_in_the_end = replace(found, final=lost(9.0))
    assert search.slower(steps, wrong_in_the_end) is search.made[1]
    assert search.slower([], found) is None


def test_none_may_be_left() -> None:
    outcome = chosen(Final(a=1.4, b=1.1, c=1.3), Budget(1.0, None))
    assert outcome.best is None


def test_nothing_slower_has_the_speedup_that_is_asked_for() -> None:
    final = Final(b=1.1)
    assert chosen(final, Budget(1.0, 1.4)).best is None
    assert final.asked == ["b"]
