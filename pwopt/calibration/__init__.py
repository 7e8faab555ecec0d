"""Real data: preprocessing, samples in streams, and how accurate a model is on them."""

from __future__ import annotations

from pwopt.calibration.data import Data, Given, feeds_digest
from pwopt.calibration.judge import HeldOut, Judge, hold_out
from pwopt.calibration.metrics import Metric, choose_metric, parse_metric
from pwopt.calibration.preprocess import PRESETS, Preprocess
from pwopt.calibration.samples import Batch, Samples, load_samples

__all__ = [
    "PRESETS",
    "Batch",
    "Data",
    "Given",
    "HeldOut",
    "Judge",
    "Metric",
    "Preprocess",
    "Samples",
    "choose_metric",
    "feeds_digest",
    "hold_out",
    "load_samples",
    "parse_metric",
]
