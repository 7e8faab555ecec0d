"""A model run on several inputs, here or in a process of its own."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pwopt.errors import PwoptError
from pwopt.runtime.placement import Placement, placement_of
from pwopt.runtime.profile import profile_events
from pwopt.runtime.providers import find_provider
from pwopt.runtime.session import (
    ExecutionError,
    Interface,
    Outputs,
    Session,
    Value,
    open_session,
)
from pwopt.target import Target

__all__ = ["Runs", "place", "run_all", "run_apart"]

_ASKED: Final = "asked"
_ANSWER: Final = "answer"


@dataclass(frozen=True, eq=False)
class Runs:
    """What came of running a model.

    Attributes:
        interface: its inputs and outputs.
        outputs: by input set.
        failures: by input set, why there are no outputs.
        placement: which provider ran which node, on a device; ``None`` on the CPU.
    """

    interface: Interface
    outputs: Mapping[int, Outputs]
    failures: Mapping[int, str]
    placement: Placement | None


def run_all(path: Path, target: Target, feeds: Mapping[int, Mapping[str, Value]]) -> Runs:
    """Run the optimized model at *path* on all *feeds*.

    Raises:
        UsageError: the feeds are not the model's.
        InvalidModelError, RuntimeUnavailableError: as :func:`pwopt.runtime.open_session`.
    """
    outputs: dict[int, Outputs] = {}
    failures: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="pwopt-runs-") as folder:
        prefix = Path(folder) / "profile" if find_provider(target.provider).is_device else None
        with open_session(path, target, profile_to=prefix) as session:
            for index, feed in feeds.items():
                try:
                    outputs[index] = session.run(feed)
                except ExecutionError as error:
                    failures[index] = str(error)
            placement = None if prefix is None else place(session)
            return Runs(session.interface, outputs, failures, placement)


def place(session: Session) -> Placement:
    """Which provider ran which node of a *session* with a profile, which ends with that.

    Raises:
        ExecutionError: the runtime wrote no usable profile.
    """
    provider = find_provider(session.target.provider)
    return placement_of(profile_events(session), provider.runtime_name)


def run_apart(
    path: Path,
    target: Target,
    feeds: Mapping[int, Mapping[str, Value]],
    environment: Mapping[str, str],
) -> Runs:
    """The same in a new process, with *environment* on top of this one's.

    Raises:
        ExecutionError: the process ends before its time.
        PwoptError: whatever :func:`run_all` raises there.
    """
    plain = replace(
        target,
        provider_options=dict(target.provider_options),
        input_shapes=dict(target.input_shapes),
    )
    with tempfile.TemporaryDirectory(prefix="pwopt-apart-") as folder:
        asked, answer = Path(folder) / _ASKED, Path(folder) / _ANSWER
        asked.write_bytes(pickle.dumps((path, plain, {i: dict(f) for i, f in feeds.items()})))
        done = subprocess.run(
            [sys.executable, "-m", "pwopt.runtime.runs", folder],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ExecutionError(
                f"{path.name}: the process that ran it ended with {done.returncode}: {last}"
            )
        # Written by this very module a moment ago.
        found = pickle.loads(answer.read_bytes())
    if isinstance(found, PwoptError):
        raise found
    assert isinstance(found, Runs)
    return found


def _answer(folder: Path) -> None:
    answer: Runs | PwoptError
    try:
        answer = run_all(*pickle.loads((folder / _ASKED).read_bytes()))
    except PwoptError as error:
        answer = error
    (folder / _ANSWER).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    # By its real name, for what is pickled here is unpickled there.
    from pwopt.runtime import runs

    runs._answer(Path(sys.argv[1]))
