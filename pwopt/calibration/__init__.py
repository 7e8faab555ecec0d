"""Real data: preprocessing, samples in streams, and how accurate a model is on them."""

from __future__ import annotations

from pwopt.calibration.preprocess import PRESETS, Preprocess
from pwopt.calibration.samples import Batch, Samples, load_samples

__all__ = ["PRESETS", "Batch", "Preprocess", "Samples", "load_samples"]
