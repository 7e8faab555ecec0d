"""Real data: preprocessing, samples in streams, and how accurate a model is on them."""

from __future__ import annotations

from pwopt.calibration.judge import HeldOut, Judge, hold_out
from pwopt.calibration.metrics import Metric, choose_metric, parse_metric
from pwopt.calibration.preprocess import PRESETS, Preprocess
from pwopt.calibration.samples import Batch, Samples, load_samples

__all__ = [
    "PRESETS",
    "Batch",
    "HeldOut",
    "Judge",
    "Metric",
    "Preprocess",
    "Samples",
    "choose_metric",
    "hold_out",
    "load_samples",
    "parse_metric",
]
