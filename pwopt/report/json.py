"""A report as JSON, schema 1: at once the product's record and a script to repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pwopt.remark import Remark, Tally
from pwopt.result import CostChange, ModelFile, Report

__all__ = ["SCHEMA", "dump", "remark_json", "to_json"]

SCHEMA = 1


def to_json(report: Report) -> dict[str, Any]:
    """The report as JSON-compatible values; the keys of schema 1 stay as they are."""
    latency = report.latency
    return {
        "schema": SCHEMA,
        "pwopt": report.pwopt,
        "model": _file(report.model),
        "output": _file(report.output),
        "target": {
            "provider": report.target.provider,
            "device": report.target.device,
            "threads": report.target.threads,
            "ort": report.target.ort,
            "options": dict(report.target.provider_options),
            "input_shapes": {k: list(v) for k, v in report.target.input_shapes.items()},
        },
        "latency": None if latency is None else {**asdict(latency), "ci95": list(latency.ci95)},
        "error": {**asdict(report.error), "untested": list(report.error.untested)},
        "accuracy": None,
        "cost": _cost(report.cost),
        "passes": [_tally(name, tally) for name, tally in report.passes.items()],
        "remarks": [remark_json(remark) for remark in report.remarks],
        "seconds": {k: round(v, 3) for k, v in report.seconds.items()},
        "stop_reason": report.stop_reason,
        "notes": list(report.notes),
    }


def dump(value: Any) -> str:
    """One JSON document, human-readable, ending in a newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _file(file: ModelFile) -> dict[str, Any]:
    return {
        "path": None if file.path is None else str(file.path),
        "sha256": file.sha256,
        "opset": file.opset,
        "size_bytes": file.size_bytes,
    }


def _cost(change: CostChange) -> dict[str, Mapping[str, int | None]]:
    before, after = asdict(change.before), asdict(change.after)
    return {key: {"before": before[key], "after": after[key]} for key in before}


def _tally(name: str, tally: Tally) -> dict[str, Any]:
    return {"name": name, **asdict(tally)}


def remark_json(remark: Remark) -> dict[str, Any]:
    """One remark, with the keys that reports and ``explain`` share."""
    return {
        "ordinal": remark.ordinal,
        "pass": remark.pass_name,
        "site": remark.site,
        "kind": remark.kind.value,
        "reason": remark.reason,
        "facts": dict(remark.facts),
    }
