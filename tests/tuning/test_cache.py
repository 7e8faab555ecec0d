"""The cache of measurements: shared, bounded, and never the reason for a failure."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from pwopt.tuning import cache as module
from pwopt.tuning.cache import Cache


def test_values_come_back_in_another_process_of_thought(tmp_path: Path) -> None:
    first = Cache(tmp_path)
    assert first.get("k", 1) is None
    first.put({"a": [1, 2.5, None]}, "k", 1)
    first.close()
    second = Cache(tmp_path)
    assert second.get("k", 1) == {"a": [1, 2.5, None]}
    assert second.get("k", 2) is None
    info = Cache.info(tmp_path)
    assert info.entries == 1
    assert info.size_bytes > 0


def test_nothing_is_made_by_asking(tmp_path: Path) -> None:
    assert Cache.info(tmp_path / "none").entries == 0
    assert Cache.clear(tmp_path / "none") == 0
    assert not (tmp_path / "none").exists()


def test_clearing_forgets(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(1, "k")
    cache.close()
    assert Cache.clear(tmp_path) > 0
    assert Cache(tmp_path).get("k") is None


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "measurements.sqlite"
    path.write_bytes(b"no database at all" * 100)
    assert Cache.info(tmp_path).entries is None
    warnings: list[str] = []
    cache = Cache(tmp_path, warnings.append)
    cache.put(1, "k")
    assert cache.get("k") == 1
    (warning,) = warnings
    assert "set aside" in warning
    assert len(list(tmp_path.glob("*.corrupt-*"))) == 1


def test_damage_found_later_is_set_aside_too(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for index in range(500):
        cache.put("x" * 200, index)
    cache.close()
    path = tmp_path / "measurements.sqlite"
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    warnings: list[str] = []
    cache = Cache(tmp_path, warnings.append)
    assert cache.get(3) is None
    cache.put(1, "k")
    assert cache.get("k") == 1
    assert len(warnings) == 1


def test_a_folder_that_cannot_be_made_means_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    cache = Cache(tmp_path / "file" / "cache", warnings.append)
    cache.put(1, "k")
    assert cache.get("k") is None
    assert len(warnings) == 1


def test_the_oldest_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_ENTRIES", 10)
    monkeypatch.setattr(module, "_SPARE", 2)
    clock = iter(range(1000))
    monkeypatch.setattr("pwopt.tuning.cache.time.time", lambda: next(clock))
    cache = Cache(tmp_path)
    for index in range(12):
        cache.put(index, index)
    assert cache.get(0) == 0  # asked for, so it stays
    cache.put(12, 12)
    assert Cache.info(tmp_path).entries == 10
    assert cache.get(0) == 0
    assert cache.get(1) is None
    assert cache.get(12) == 12


def test_it_is_bounded_in_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_BYTES", 1_000_000)
    cache = Cache(tmp_path, _fail)
    for index in range(100):
        cache.put("x" * 50_000, index)
    cache.close()
    info = Cache.info(tmp_path)
    assert info.entries is not None
    assert 10 <= info.entries <= 20
    assert Cache(tmp_path).get(99) is not None
    # The file and the log beside it, which is reset once it is long.
    assert info.size_bytes < 6_000_000


def test_a_file_that_another_process_has_renewed_is_not_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "measurements.sqlite"
    first = Cache(tmp_path)
    for index in range(500):
        first.put("x" * 200, index)
    first.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    one, other = Cache(tmp_path), Cache(tmp_path)
    assert one.get(3) is None  # finds the damage, and starts anew
    one.put("kept", "k")
    assert other.get(3) is None  # still reads the damaged file
    assert other.get("k") == "kept"
    assert one.get("k") == "kept"
    assert len(list(tmp_path.glob("*.corrupt-*"))) == 1


def _fill(folder: Path, start: int) -> None:
    cache = Cache(folder, _fail)
    for index in range(start, start + 50):
        cache.put(index, index)
    cache.close()


def _fail(warning: str) -> None:
    raise AssertionError(warning)


def test_several_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill, args=(tmp_path, 50 * i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert Cache.info(tmp_path).entries == 150
