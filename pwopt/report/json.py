"""A report as JSON, schema 1: at once the product's record and a script to repeat it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pwopt.errors import UsageError
from pwopt.remark import Kind, Remark, Tally
from pwopt.result import (
    CostChange,
    FactorizationFigures,
    ModelFile,
    Recipe,
    Report,
    Script,
)

__all__ = ["SCHEMA", "dump", "read_script", "remark_json", "to_json"]

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
        "accuracy": None if report.accuracy is None else asdict(report.accuracy),
        "factorization": None if report.factorization is None else asdict(report.factorization),
        "cost": _cost(report.cost),
        "recipe": {**asdict(report.recipe), "passes": list(report.recipe.passes)},
        "passes": [_tally(name, tally) for name, tally in report.passes.items()],
        "remarks": [remark_json(remark) for remark in report.remarks],
        "seconds": {k: round(v, 3) for k, v in report.seconds.items()},
        "stop_reason": report.stop_reason,
        "notes": list(report.notes),
        "placement": None if report.placement is None else asdict(report.placement),
        "options": None if report.options is None else asdict(report.options),
        "fp16": None if report.fp16 is None else asdict(report.fp16),
    }


def dump(value: Any) -> str:
    """One JSON document, human-readable, ending in a newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_script(path: Path) -> Script:
    """What it takes to repeat the optimization that the report at *path* tells of.

    Raises:
        UsageError: it is not a report of this schema.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["schema"] != SCHEMA:
            raise UsageError(f"{path}: schema {report['schema']} is not {SCHEMA}")
        recipe, factorization = report["recipe"], report.get("factorization")
        return Script(
            report["model"]["sha256"],
            report["output"]["sha256"],
            Recipe(
                tuple(recipe["passes"]),
                recipe["opset"],
                recipe["keep_overridable_initializers"],
                None if recipe.get("fp16") is None else tuple(recipe["fp16"]),
            ),
            {name: tuple(dims) for name, dims in report["target"]["input_shapes"].items()},
            tuple(_remark(r) for r in report["remarks"] if r["ordinal"] is not None),
            None if factorization is None else FactorizationFigures.from_json(factorization),
        )
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: is not a report of pwopt: {error!r}") from error


def _remark(found: Mapping[str, Any]) -> Remark:
    return Remark(
        found["ordinal"],
        found["pass"],
        found["site"],
        Kind(found["kind"]),
        found["reason"],
        found["facts"],
    )


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
