"""The CPU."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Final

from pwopt.runtime.providers.contract import Provider
from pwopt.target import Target

__all__ = ["CPU", "cpu_from_cpuinfo"]


def _describe(_: Target) -> str:
    """Model name, cores this process may use, and widest vector instructions."""
    name, vectors = cpu_from_cpuinfo(_cpuinfo())
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    parts = [name or _name_by_system(), f"{cores} core{'s' if cores > 1 else ''}", vectors]
    return ", ".join(part for part in parts if part)


def _cpuinfo() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return ""


def cpu_from_cpuinfo(text: str) -> tuple[str, str]:
    """Model name and widest vector instructions from Linux' ``/proc/cpuinfo``; ``""`` if absent."""
    fields = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", text, flags=re.MULTILINE))
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    families = {
        "amx_tile": "AMX",
        "avx512f": "AVX-512",
        "avx2": "AVX2",
        "avx": "AVX",
        "sve": "SVE",
        "asimd": "NEON",
    }
    vectors = next((label for flag, label in families.items() if flag in flags), "")
    return fields.get("model name", "").strip(), vectors


def _name_by_system() -> str:
    if platform.system() == "Darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=5
            ).stdout.strip()
    return platform.processor() or platform.machine()


CPU: Final = Provider("cpu", "CPUExecutionProvider", "pwopt[cpu]", _describe)
