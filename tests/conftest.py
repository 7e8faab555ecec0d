"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import settings

# Main must not turn red by a draw of the day: the same examples every time. The slow suites are
# where new ones are drawn: pytest -m slow --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


_CACHE_VARIABLES = ("XDG_CACHE_HOME", "LOCALAPPDATA")


@pytest.fixture(scope="session", autouse=True)
def _shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Measurements of tests stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for name in _CACHE_VARIABLES:
            patch.setenv(name, str(folder))
        yield folder


@pytest.fixture(autouse=True)
def _own_cache(_shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And out of other tests': what one has measured must not decide what the next one sees."""
    for name in _CACHE_VARIABLES:
        monkeypatch.setenv(name, str(_shared_cache / uuid4().hex))
