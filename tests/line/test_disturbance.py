"""What the report says when the times spread widely."""

from __future__ import annotations

from pwopt.line.figures import disturbance
from pwopt.runtime import Comparison, Latency


def compared(low: float, high: float) -> Comparison:
    latency = Latency(1.0, (1.0, 1.0), 9)
    return Comparison(latency, latency, (low + high) / 2, (low, high), 9, stable=False)


def test_narrow_intervals_need_no_note() -> None:
    assert disturbance(compared(1.0, 1.03), "load 9") == []


def test_wide_ones_say_why_and_what_is_not_known() -> None:
    (decided,) = disturbance(compared(1.05, 1.15), "load 9.0 on 2 processors")
    assert decided == (
        "The machine was disturbed while timing (load 9.0 on 2 processors):"
        " the speedup is known to within 5% only."
    )
    (undecided,) = disturbance(compared(0.95, 1.15), "")
    assert undecided.endswith("within 10% only, too little to tell which model is faster.")
