"""What a record was measured on: machine, versions and the commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from pwopt.runtime import resolve
from pwopt.target import Target

__all__ = ["conditions", "sentence"]


def conditions() -> dict[str, str | None]:
    """Facts for a record; ``commit`` is ``None`` outside a checkout."""
    return {
        "device": resolve(Target()).device,
        "python": platform.python_version(),
        "onnxruntime": resolve(Target()).ort,
        "onnx": version("onnx"),
        "commit": _commit(),
    }


def sentence(found: dict[str, str | None]) -> str:
    """One line for below a table."""
    where = f"{found['device']}; Python {found['python']}"
    what = f"ONNX Runtime {found['onnxruntime']}, onnx {found['onnx']}"
    return f"*{where}, {what}; pwopt at {found['commit'] or 'an unknown commit'}.*"


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
