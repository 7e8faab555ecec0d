"""Measurements behind every claim of speed; see docs/results.md."""
