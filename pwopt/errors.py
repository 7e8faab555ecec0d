"""The errors pwopt raises: broken promises, never mere inapplicability.

A pass that does not apply *declines* (see :mod:`pwopt.remark`); an error means that something the
caller asked for cannot be done. Every message is one line that names what, where and the remedy.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "InvalidModelError",
    "OutputError",
    "PwoptError",
    "ReplayError",
    "RuntimeUnavailableError",
    "UsageError",
    "VerificationError",
]


class PwoptError(Exception):
    """Base of every error pwopt raises on purpose; the CLI prints it and exits with code 1."""


class UsageError(PwoptError):
    """An option or argument names something that does not exist or cannot be combined."""


class InvalidModelError(PwoptError):
    """The model file cannot be read, is not ONNX, or breaks the ONNX rules."""


class OutputError(PwoptError):
    """The output cannot be written; nothing was left half-written."""


class RuntimeUnavailableError(PwoptError):
    """ONNX Runtime, or the execution provider asked for, is not installed or does not start."""


class ReplayError(PwoptError):
    """A report cannot be replayed on this model: another file, site or result."""


class VerificationError(PwoptError):
    """Two models that must agree do not, or cannot be compared."""


class BudgetError(PwoptError):
    """No model keeps the accuracy and has the speed that was asked for."""
