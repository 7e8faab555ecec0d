"""What else kept the machine busy meanwhile, as far as the operating system tells."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Strain", "Ticks", "read_ticks"]

_STAT: Final = Path("/proc/stat")
_STEAL: Final = 7
"""Position among the figures of a ``cpu`` line of ``/proc/stat`` (proc(5), since Linux 2.6.11)."""


@dataclass(frozen=True)
class Ticks:
    """Processor time since the machine started, over all processors, in ticks.

    Attributes:
        total: of all kinds.
        stolen: that the hypervisor gave to other machines.
    """

    total: int
    stolen: int


@dataclass(frozen=True)
class Strain:
    """How busy the machine was.

    Attributes:
        load: processes that ran or wanted to, over the last minute; ``None`` if unknown.
        stolen: share of the processors' time that other virtual machines got; ``None`` if unknown.
        processors: how many there are.
    """

    load: float | None
    stolen: float | None
    processors: int

    @classmethod
    def since(cls, start: Ticks | None) -> Strain:
        """From *start* until now."""
        end = read_ticks()
        stolen = None
        if start is not None and end is not None and end.total > start.total:
            stolen = (end.stolen - start.stolen) / (end.total - start.total)
        try:
            load = os.getloadavg()[0]
        except (AttributeError, OSError):
            load = None
        return cls(load, stolen, os.cpu_count() or 1)

    def __str__(self) -> str:
        """In words; empty if nothing is known."""
        parts = []
        if self.load is not None:
            parts.append(f"load {self.load:.1f} on {self.processors} processors")
        if self.stolen is not None:
            parts.append(f"{self.stolen:.1%} of their time given to other machines")
        return ", ".join(parts)


def read_ticks(path: Path = _STAT) -> Ticks | None:
    """The ticks so far; ``None`` where there is no such file (not on Linux)."""
    try:
        name, *figures = path.read_text().partition("\n")[0].split()
        ticks = [int(figure) for figure in figures]
    except (OSError, ValueError):
        return None
    if name != "cpu" or len(ticks) <= _STEAL:
        return None
    return Ticks(sum(ticks[: _STEAL + 1]), ticks[_STEAL])  # guests are counted as users already
