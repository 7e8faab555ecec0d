"""pwopt: graph-rewriting optimizer for ONNX CNNs; verified, measured, never slower.

The public names load what they need when they are first used, so that importing pwopt (and
``pwopt --help``) stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pwopt import models, passes
    from pwopt.calibration import Preprocess
    from pwopt.checks import bench, explain, judge, verify
    from pwopt.errors import PwoptError
    from pwopt.line import Options, optimize
    from pwopt.result import Report
    from pwopt.target import Target
    from pwopt.tuning.pipeline import Pipeline

__version__: str

__all__ = [
    "Options",
    "Pipeline",
    "Preprocess",
    "PwoptError",
    "Report",
    "Target",
    "bench",
    "explain",
    "judge",
    "models",
    "optimize",
    "passes",
    "verify",
]

_HOMES = {
    "Options": "pwopt.line",
    "Pipeline": "pwopt.tuning.pipeline",
    "Preprocess": "pwopt.calibration",
    "PwoptError": "pwopt.errors",
    "Report": "pwopt.result",
    "Target": "pwopt.target",
    "bench": "pwopt.checks",
    "explain": "pwopt.checks",
    "judge": "pwopt.checks",
    "optimize": "pwopt.line",
    "verify": "pwopt.checks",
}
_MODULES = ("models", "passes")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("pwopt")
    if name in _MODULES:
        return import_module(f"pwopt.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'pwopt' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
