from __future__ import annotations

from pathlib import Path

import pytest

from pwopt.runtime import strain
from pwopt.runtime.strain import Strain, Ticks, read_ticks


def test_ticks_are_read_without_counting_guests_twice(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    path.write_text("cpu  10 1 5 80 2 0 1 7 3 1\ncpu0 1 2 3\n")
    assert read_ticks(path) == Ticks(106, 7)


@pytest.mark.parametrize("text", ["", "cpu 1 2 3\n", "intr 1 2 3 4 5 6 7 8\n", "cpu a b\n"])
def test_what_is_no_account_is_unknown(text: str, tmp_path: Path) -> None:
    path = tmp_path / "stat"
    path.write_text(text)
    assert read_ticks(path) is None
    assert read_ticks(tmp_path / "none") is None


def test_strain_is_the_share_that_was_stolen_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strain, "read_ticks", lambda: Ticks(1200, 60))
    monkeypatch.setattr("os.getloadavg", lambda: (2.5, 1.0, 1.0), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    found = Strain.since(Ticks(1000, 50))
    assert found == Strain(2.5, 0.05, 2)
    assert str(found) == "load 2.5 on 2 processors, 5.0% of their time given to other machines"


def test_unknown_strain_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> tuple[float, float, float]:
        raise OSError

    monkeypatch.setattr(strain, "read_ticks", lambda: None)
    monkeypatch.setattr("os.getloadavg", unknown, raising=False)
    assert str(Strain.since(None)) == ""
