"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# Main must not turn red by a draw of the day: the same examples every time. The slow suites are
# where new ones are drawn: pytest -m slow --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
