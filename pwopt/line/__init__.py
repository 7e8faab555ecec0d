"""The straight line from a model file to a verified, measured, faster one, and its report."""

from pwopt.line.options import Check, Options
from pwopt.line.run import bisect, default_passes, optimize

__all__ = ["Check", "Options", "bisect", "default_passes", "optimize"]
