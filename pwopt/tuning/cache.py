"""What was measured and decided before, in one SQLite file that several processes may share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pwopt.errors import OutputError

__all__ = ["Cache", "CacheInfo", "default_folder"]

_FILE = "measurements.sqlite"
_MOST_ENTRIES = 50_000
_SPARE = 1_000
"""So many more may gather before the oldest are dropped."""
_MOST_BYTES = 200 * 2**20
"""What the entries may take; the ends of searches of large models are long."""
_DROPPED = 0.25
"""The part of the entries that goes, oldest first, where they take more."""
_WAIT_S = 10.0
"""How long to wait for another process that is writing."""


def default_folder() -> Path:
    """The folder that the platform keeps for caches of this user."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("pwopt", appauthor=False))


@dataclass(frozen=True)
class CacheInfo:
    """A cache in figures; *entries* is ``None`` if the file is no database."""

    path: Path
    entries: int | None
    size_bytes: int


class Cache:
    """JSON values by key; the ones that were not asked for longest go first.

    A file that is no database is set aside under another name; the caller is told by *warn*. If
    the folder cannot be written to, or another process holds the file for long, values are simply
    not kept: a cache never makes a run fail.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        self.path = folder / _FILE
        self._warn = warn
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            warn(f"no cache: {folder} cannot be made: {error.strerror or error}")
            return
        self._open()

    def get(self, *key: object) -> Any:
        """The value that was put under *key*, or ``None``."""
        found = self._run(
            "UPDATE entries SET used = ? WHERE key = ? RETURNING value", (time.time(), _digest(key))
        )
        return json.loads(found[0][0]) if found else None

    def put(self, value: Any, *key: object) -> None:
        """Keep a JSON-compatible *value* under *key*."""
        row = (_digest(key), json.dumps(value), time.time())
        self._run("INSERT OR REPLACE INTO entries (key, value, used) VALUES (?, ?, ?)", row)
        sizes = self._run(
            "SELECT (SELECT count(*) FROM entries), (page_count - freelist_count) * page_size"
            " FROM pragma_page_count, pragma_freelist_count, pragma_page_size"
        )
        for entries, size in sizes:
            surplus = entries - _MOST_ENTRIES if entries > _MOST_ENTRIES + _SPARE else 0
            if size > _MOST_BYTES:
                surplus = max(surplus, math.ceil(_DROPPED * entries))
            if surplus:
                self._run(
                    "DELETE FROM entries WHERE key IN"
                    " (SELECT key FROM entries ORDER BY used LIMIT ?)",
                    (surplus,),
                )

    def close(self) -> None:
        """Let go of the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @staticmethod
    def info(folder: Path) -> CacheInfo:
        """What the cache in *folder* holds; makes none."""
        path = folder / _FILE
        if not path.exists():
            return CacheInfo(path, 0, 0)
        size = sum(p.stat().st_size for p in _files(path))
        with contextlib.closing(sqlite3.connect(path, timeout=_WAIT_S)) as connection:
            try:
                entries = int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])
            except sqlite3.Error:
                return CacheInfo(path, None, size)
        return CacheInfo(path, entries, size)

    @staticmethod
    def clear(folder: Path) -> int:
        """Delete the cache in *folder*; returns the bytes that were freed.

        Raises:
            OutputError: a file cannot be deleted.
        """
        freed = 0
        for path in _files(folder / _FILE):
            try:
                size = path.stat().st_size
                path.unlink()
            except OSError as error:
                raise OutputError(f"{path}: cannot be deleted: {error.strerror}") from error
            freed += size
        return freed

    def _open(self) -> None:
        try:
            self._connect()
        except sqlite3.OperationalError as error:
            self._give_up(error)
        except sqlite3.DatabaseError:
            self._set_aside()

    def _connect(self) -> None:
        self._connection = sqlite3.connect(self.path, timeout=_WAIT_S, isolation_level=None)
        self._identity = self._file_identity()
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute(
            "CREATE TABLE IF NOT EXISTS entries"
            " (key TEXT PRIMARY KEY, value TEXT NOT NULL, used REAL NOT NULL)"
        )
        self._connection.execute("CREATE INDEX IF NOT EXISTS by_use ON entries (used)")
        self._identity = self._file_identity()  # it may have been made just now

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        if self._connection is None:
            return []
        try:
            return self._connection.execute(statement, values).fetchall()
        except sqlite3.OperationalError as error:
            self._give_up(error)
        except sqlite3.DatabaseError:
            self._set_aside()
        return []

    def _give_up(self, error: sqlite3.Error) -> None:
        """Another process holds the file, the disk is full or read-only: go on without."""
        self.close()
        self._warn(f"no cache: {self.path}: {error}")

    def _file_identity(self) -> tuple[int, int] | None:
        """Which file bears the name now."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _set_aside(self) -> None:
        """Start a new file, unless another process has done so since this one was opened."""
        self.close()
        if self._file_identity() != self._identity:
            self._reconnect()
            return
        aside = self.path.with_suffix(f".corrupt-{time.time_ns()}")
        self._warn(f"the cache {self.path} was damaged; it was set aside as {aside.name}")
        try:
            self.path.rename(aside)
            for beside in _files(self.path):
                beside.unlink()
        except OSError as error:
            self._warn(f"no cache: {self.path}: {error}")
            return
        self._reconnect()

    def _reconnect(self) -> None:
        try:
            self._connect()
        except sqlite3.Error as error:
            self._give_up(error)


def _digest(key: tuple[object, ...]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """The database and what SQLite keeps beside it, as far as they exist."""
    for suffix in ("", "-wal", "-shm"):
        candidate = path.with_name(path.name + suffix)
        if candidate.exists():
            yield candidate
