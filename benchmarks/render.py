"""Writes the tables of docs/results.md from the records that the benchmarks left.

    python -m benchmarks.render

Only what stands between the markers ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conditions import sentence

HERE = Path(__file__).parent
_SAME = 1e-3
"""A tool whose output lies further from the original's is left out of the comparison."""

RESULTS = HERE.parent / "docs" / "results.md"
WINOGRAD = HERE.parent / "docs" / "winograd.md"
RESULTS_CUDA = HERE.parent / "docs" / "results-cuda.md"


def collection_table(rows: list[dict[str, Any]]) -> str:
    """One line per model, from the reports' own figures."""
    header = (
        "| model | was ms | speedup | 95% interval | pairs | error | allowed | kept | s | again s"
    )
    lines = [f"{header} | at |", "|---" * 11 + "|"]
    speedups = []
    for row in rows:
        latency = row["latency"]
        kept = [p["name"] for p in row["passes"] if p["applied"] and p["name"] != "canonicalise"]
        seconds = row["seconds"]["total"]
        if latency is None:
            speedups.append(1.0)
            figures = "| | 1 (original kept) | | |"
        else:
            speedups.append(latency["speedup"])
            low, high = latency["ci95"]
            figures = (
                f"| {latency['baseline_ms']:.3g} | {latency['speedup']:.3f} |"
                f" {low:.3f} to {high:.3f} | {latency['pairs']} |"
            )
        error = row["error"]
        names = ", ".join(kept) or ("canonicalised only" if latency else "nothing")
        lines.append(
            f"| {row['name']} {figures} {error['max_relative']:.1e} | {error['tolerance']:.1e} |"
            f" {names} | {seconds:.1f} | {_again(row)} | {row['conditions']['commit']} |"
        )
    mean = float(np.exp(np.mean(np.log(speedups))))
    lines += ["", f"{len(rows)} models; geometric mean of the speedups {mean:.3f};"]
    lines[-1] += f" the least is {min(speedups):.3f}."
    lines += _second_runs(rows)
    lines += _limits(rows)
    return "\n".join([*lines, *_conditions(rows)])


def _second_runs(rows: list[dict[str, Any]]) -> list[str]:
    """What second runs took, relative to the first ones."""
    both = [(r["second_run"]["seconds"], r["seconds"]["total"]) for r in rows if "second_run" in r]
    parts = sorted(second / first for second, first in both)
    if not parts:
        return []
    within = sum(part <= 0.1 for part in parts)
    text = (
        f"A second run took {100 * parts[len(parts) // 2]:.1f}% of the first one's time (median),"
    )
    return [f"{text} at most {100 * parts[-1]:.0f}%; {within} of {len(parts)} took under a tenth."]


def _limits(rows: list[dict[str, Any]]) -> list[str]:
    """Which models had another time than the effort's."""
    limited: dict[float, int] = {}
    for row in rows:
        if "time_limit_s" in row:
            limited[row["time_limit_s"]] = limited.get(row["time_limit_s"], 0) + 1
    return [
        f"{count} of the models had {seconds:g} s for trials instead of the effort's."
        for seconds, count in sorted(limited.items())
    ]


def _again(row: dict[str, Any]) -> str:
    """Seconds of a second run on the same model and target, where that was measured."""
    return f"{row['second_run']['seconds']:.1f}" if "second_run" in row else ""


def peers_table(rows: list[dict[str, Any]]) -> str:
    """Speedups over the original, all in one run per model."""
    tools = ["onnxsim", "onnxslim", "onnxoptimizer", "pwopt"]
    header = [*tools, "pwopt over the best of the others", "95% interval", "rounds"]
    lines = [f"| model | {' | '.join(header)} |", "|---" * (len(header) + 1) + "|"]
    means: dict[str, list[float]] = {tool: [] for tool in tools}
    for row in rows:
        results = {tool: row["tools"].get(tool, {"failed": "did not run"}) for tool in tools}
        for tool, result in results.items():
            means[tool].append(result.get("speedup", 1.0))
        cells = [f"{r['speedup']:.3f}" if "speedup" in r else "failed" for r in results.values()]
        over, (low, high) = row["over"][_best_peer(results)]
        cells += [f"{over:.3f}", f"{low:.3f} to {high:.3f}", str(row["rounds"])]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    geometric = [f"{float(np.exp(np.mean(np.log(v)))):.3f}" for v in means.values()]
    lines.append(f"| geometric mean | {' | '.join(geometric)} | | | |")
    return "\n".join([*lines, *_conditions(rows)])


def _best_peer(results: dict[str, dict[str, Any]]) -> str:
    """The fastest of the other tools that computes the same; the original if it is faster."""
    speedups: dict[str, float] = {"original": 1.0} | {
        tool: result["speedup"]
        for tool, result in results.items()
        if tool != "pwopt" and "speedup" in result and result["error"] < _SAME
    }
    return max(speedups, key=speedups.__getitem__)


def _conditions(rows: list[dict[str, Any]]) -> list[str]:
    """What the rows were measured on; one line if it was the same for all."""
    return ["", *dict.fromkeys(sentence(row["conditions"]) for row in rows)]


def whole_process_table(record: dict[str, Any]) -> str:
    """Seconds of whole processes, and their memory beside the runtime's own."""
    lines = ["| whole process | median s | range | runs | asked |", "|---|---|---|---|---|"]
    for row in record["times"]:
        low, high = row["range"]
        lines.append(
            f"| `{row['what']}` | {row['seconds']:.2f} | {low:.2f} to {high:.2f} | {row['runs']} |"
            f" under {row['asked']:g} |"
        )
    lines += [
        "",
        "| MiB, `--effort none` | file | ONNX Runtime alone | imports | peak | files on top |",
        "|---" * 6 + "|",
    ]
    for row in record["memory"]:
        alone, imports, peak = row["runtime_mib"], row["imports_mib"], row["peak_mib"]
        on_top = (peak - alone - imports) / row["file_mib"]
        lines.append(
            f"| {row['what']} | {row['file_mib']:.0f} | {alone:.0f} | {imports:.0f} | {peak:.0f} |"
            f" {on_top:.1f} |"
        )
    lines += ["", sentence(record["conditions"])]
    if "tuning" in record:
        lines += ["", tuning_memory_table(record["tuning"])]
    return "\n".join(lines)


def tuning_memory_table(rows: list[dict[str, Any]]) -> str:
    """Peak memory while tuning, beside the runtime with two sessions."""
    header = ["MiB, `--effort quick`", "file", "two sessions alone", "imports", "peak"]
    header += ["files on top", "s of trials"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        alone, imports, peak = row["runtime_mib"], row["imports_mib"], row["peak_mib"]
        on_top = (peak - alone - imports) / row["file_mib"]
        lines.append(
            f"| {row['what']} | {row['file_mib']:.0f} | {alone:.0f} | {imports:.0f} | {peak:.0f} |"
            f" {on_top:.1f} | {row['trials_s']} |"
        )
    return "\n".join([*lines, *_conditions(rows)])


def honesty_table(rows: list[dict[str, Any]]) -> str:
    """How often equal models seemed to differ, and a planted slowdown was found."""
    header = ["model", "trials", "looked like a gain", "claimed", "3% slower found"]
    header += ["half width", "5% to 95% of the ratios"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        low, high = row["spread"]
        lines.append(
            f"| {row['model']} | {row['trials']} | {row['looked_like_gains']} | {row['claimed']} |"
            f" {row['found']} | {row['half_width']:.2%} | {low:.3f} to {high:.3f} |"
        )
    return "\n".join([*lines, *_conditions(rows)])


def noisy_table(rows: list[dict[str, Any]]) -> str:
    """What was kept beside a busy core, judged without it."""
    header = ["model", "effort", "claimed beside load", "quiet", "95% interval", "groups kept"]
    header += ["least of them, quiet", "slower by over 1%"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        low, high = row["quiet"]["ci95"]
        least = min(row["kept"], key=lambda k: float(k["speedup"]), default=None)
        named = "" if least is None else f"{least['speedup']:.3f} ({least['pass']})"
        claimed = "original kept" if row["under_load"] is None else f"{row['under_load']:.3f}"
        lines.append(
            f"| {row['model']} | {row['effort']} | {claimed} | {row['quiet']['speedup']:.3f} |"
            f" {low:.3f} to {high:.3f} | {len(row['kept'])} | {named} |"
            f" {sum(k['slower'] for k in row['kept'])} |"
        )
    return "\n".join([*lines, *_conditions(rows)])


def scaling_table(record: dict[str, Any]) -> str:
    """Seconds and memory against length."""
    lines = ["| nodes | after | s | of half the length | MiB on top of imports | file MiB |"]
    lines.append("|---" * 6 + "|")
    for row in record["rows"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} times"
        lines.append(
            f"| {row['nodes']} | {row['after']:.0f} | {row['seconds']:.2f} | {ratio} |"
            f" {row['memory_mib']:.0f} | {row['file_mib']:.1f} |"
        )
    return "\n".join([*lines, "", sentence(record["conditions"])])


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """Accuracy before and after, per model and data set."""
    titles = ["model", "data", "metric", "samples", "before", "after", "lost", "95% interval"]
    titles += ["same class", "relative error", "passes that changed something"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        found = row["accuracy"]
        unit = found["unit"] and f" {found['unit']}"
        before = "itself" if found["baseline"] is None else f"{found['baseline']:.2f}{unit}"
        lost = "" if found["drop"] is None else f"{found['drop']:.2g}"
        low, high = found["ci95"]
        own = {found["metric"]: (found["baseline"], found["optimized"]), **found["also"]}
        same = f"{own['agreement'][1]:.1f} %" if "agreement" in own else ""
        lines.append(
            f"| {row['name']} | {row['data']} | {found['metric']} | {found['samples']} | {before} |"
            f" {found['optimized']:.4g}{unit} | {lost} | {low:.3g} to {high:.3g} | {same} |"
            f" {own['relative-error'][1]:.1e} % | {', '.join(row['applied']) or 'none'} |"
        )
    return "\n".join([*lines, *_conditions(rows)])


def tangled_table(rows: list[dict[str, Any]]) -> str:
    """Times of the clean network over those of its tangled export, before and after."""
    header = "| network | form | clean ms | operators | tangled | 95% interval | brought back |"
    lines = [header + " 95% interval | rounds |", "|---" * 9 + "|"]
    for row in rows:
        count = row["operators"]
        cells = [row["name"], row["form"], f"{row['clean_ms']:.3g}"]
        cells.append(f"{count['tangled']} to {count['optimized']} (clean {count['clean']})")
        for what in ("tangled", "optimized"):
            ratio, (low, high) = row[what]
            cells += [f"{ratio:.3f}", f"{low:.3f} to {high:.3f}"]
        lines.append(f"| {' | '.join([*cells, str(row['rounds'])])} |")
    return "\n".join([*lines, *_conditions(rows)])


def shares_table(rows: list[dict[str, Any]]) -> str:
    """Where the time goes, and the bound on what can be gained outside of convolutions."""
    lines = ["| model | ms | convolutions | layout | rest | bound | GFLOP/s in convolutions |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        if row["ms"] < 0.1:
            continue  # profiles count whole microseconds
        share = row["shares"]
        parts = " | ".join(f"{share[k]:.1%}" for k in ("convolutions", "layout", "rest"))
        bound = 1 / share["convolutions"]
        lines.append(
            f"| {row['name']} | {row['ms']:.3g} | {parts} | {bound:.2f} | {row['gflops']:.0f} |"
        )
    return "\n".join([*lines, *_conditions(rows)])


def trials_table(rows: list[dict[str, Any]]) -> str:
    """What each way gives by itself, against the original."""
    lines = ["| network | was ms | applied everywhere | speedup | 95% interval | pairs |"]
    lines.append("|---" * 6 + "|")
    for row in rows:
        low, high = row["ci95"]
        lines.append(
            f"| {row['name']} | {row['baseline']['median_ms']:.3g} |"
            f" {row['trial'].replace(' ', ', ') or 'simplified only'} | {row['speedup']:.3f} |"
            f" {low:.3f} to {high:.3f} | {row['pairs']} |"
        )
    return "\n".join([*lines, *_conditions(rows)])


def winograd_table(rows: list[dict[str, Any]]) -> str:
    """Variants of the Winograd lowering by shape, with the split of their time."""
    header = "| C x H=W | batch | form | speedup | 95% interval | direct ms | (compute) |"
    header += " lowered ms | input | multiply | (compute) | output | (bytes) |"
    lines = [header, "|---" * 13 + "|"]
    for r in sorted(rows, key=lambda r: (r["batch"], r["channels"] * r["size"], r["size"])):
        low, high = r["ci95"]
        cells = [f"{r['channels']} x {r['size']}", r["batch"], r["variant"]]
        cells += [f"{r['speedup']:.2f}", f"{low:.2f} to {high:.2f}"]
        names = "direct direct_roofline lowered input multiply multiply_roofline output"
        cells += [f"{r[f'{n}_ms']:.2f}" for n in (*names.split(), "bytes_roofline")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    ceilings = dict.fromkeys(
        f"{r['gmacs_per_s']:.0f} GMAC/s and {r['gbytes_per_s']:.0f} GB/s" for r in rows
    )
    lines += ["", f"Ceilings, by run: {'; '.join(ceilings)}."]
    return "\n".join([*lines, *_conditions(rows)])


def openvino_table(rows: list[dict[str, Any]]) -> str:
    """Optimized models on ONNX Runtime against OpenVINO on the originals."""
    header = "| model | original ms | pwopt ms | OpenVINO ms | over ONNX Runtime | over OpenVINO |"
    lines = [header + " 95% interval | rounds | OpenVINO |", "|---" * 9 + "|"]
    for row in rows:
        over, (low, high) = row["over_openvino"]
        times = " | ".join(f"{row[n]:.3g}" for n in ("original_ms", "pwopt_ms", "openvino_ms"))
        lines.append(
            f"| {row['name']} | {times} | {row['over_original'][0]:.3f} | {over:.3f} |"
            f" {low:.3f} to {high:.3f} | {row['rounds']} | {row['openvino']} |"
        )
    return "\n".join([*lines, *_conditions(rows)])


ASKED = {
    "vgg19": 1.8,
    "vgg16": 1.8,
    "resnet18": 1.3,
    "resnet34": 1.3,
    "resnet50": 1.08,
    "realesr_animevideov3_x2": 1.3,
    "dncnn_sigma25_bn": 1.15,
    "waifu2x_cunet_x2": 1.1,
    "inception_v3": 1.05,
}
"""Speedups asked of the Winograd lowering, one thread; on two, 85% of what one thread shows."""


def asked_table(
    one: list[dict[str, Any]], two: list[dict[str, Any]], full: list[dict[str, Any]]
) -> str:
    """What the collection's records say of the models that Winograd is asked about."""
    header = ["model", "asked", "one thread", "two threads", "of one", "one thread, full effort"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    latencies = [
        {r["name"]: r["latency"] for r in rows if r["latency"]} for rows in (one, two, full)
    ]
    for name, asked in ASKED.items():
        first, second, third = (found.get(name) for found in latencies)
        ratio = f"{second['speedup'] / first['speedup']:.0%}" if first and second else ""
        cells = [name, f"{asked:g}", _with_interval(first), _with_interval(second), ratio]
        lines.append(f"| {' | '.join([*cells, _with_interval(third)])} |")
    asked_rows = [r for r in (*one, *two, *full) if r["name"] in ASKED]
    return "\n".join([*lines, *_conditions(asked_rows)])


def _with_interval(latency: dict[str, Any] | None) -> str:
    if latency is None:
        return ""
    low, high = latency["ci95"]
    return f"{latency['speedup']:.3f} ({low:.3f} to {high:.3f})"


SHOWN = (
    "ultraface_rfb_320",
    "googlenet",
    "light_densenet121",
    "shufflenet_v2_1_0x",
    "fns_mosaic",
    "convnext_tiny",
    "vgg16",
    "super_resolution_espcn_x3",
    "repvgg_a0",
    "mobilenet_v3_large_decomposed",
    "resnet18",
    "realesr_animevideov3_x2",
    "yolox_nano_416",
    "resnet50",
    "mobilenet_v2",
    "squeezenet1.1",
)
"""Models that the README shows: large gains, small ones and none."""


def summary_table(rows: list[dict[str, Any]]) -> str:
    """A few lines for the README, and what holds for all of them."""
    speedups = [1.0 if r["latency"] is None else r["latency"]["speedup"] for r in rows]
    by_name = {r["name"]: r for r in rows}
    lines = ["| model | speedup | 95% interval | what was kept |", "|---|---|---|---|"]
    shown = (by_name[name] for name in SHOWN if name in by_name)
    for row in sorted(shown, key=lambda r: -(r["latency"] or {"speedup": 1.0})["speedup"]):
        kept = [p["name"] for p in row["passes"] if p["applied"]]
        latency = row["latency"]
        if latency is None:
            lines.append(f"| {row['name']} | 1 | | nothing: the original was kept |")
            continue
        low, high = latency["ci95"]
        names = ", ".join(kept) or "constants no longer overridable"
        lines.append(
            f"| {row['name']} | {latency['speedup']:.2f} | {low:.2f} to {high:.2f} | {names} |"
        )
    mean = float(np.exp(np.mean(np.log(speedups))))
    lines += [
        "",
        "One thread, quick effort, against ONNX Runtime's full optimization level. Over all",
    ]
    lines.append(
        f"{len(rows)} models the geometric mean is {mean:.2f}x and the least {min(speedups):.3f}x;"
        f" {sum(s < 1.02 for s in speedups)} of them gain less than 2%."
    )
    return "\n".join(lines)


def cuda_table(record: dict[str, Any]) -> str:
    """One line per model, batch and precision; gains of three kinds, apart."""
    header = ["model", "batch", "precision", "was ms", "rewriting", "fp16 alone", "options"]
    header += ["error", "allowed", "kept"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    slower: list[str] = []
    reached = 0
    for row in record["rows"]:
        start = f"| {row['model']} | {row['batch']} | {row['precision']} |"
        if "failed" in row:
            lines.append(f"{start} | | | | | | {row['failed']} |")
            continue
        report = row["report"]
        latency, half, options = (report[key] for key in ("latency", "fp16", "options"))
        rewriting = latency if half is None else half["rewriting"]
        reached += 1
        if latency is not None and latency["speedup"] < _ALLOWED_LOSS:
            slower.append(f"{row['model']} at batch {row['batch']} in {row['precision']}")
        kept = [p["name"] for p in report["passes"] if p["applied"] and p["name"] != "canonicalise"]
        cells = [
            "" if latency is None else f"{latency['baseline_ms']:.3g}",
            _gain(rewriting) or "1 (original kept)",
            "" if half is None else _gain(half["conversion"]),
            "" if options is None else _options_gain(options),
            _figure(report["error"]["max_relative"]),
            f"{report['error']['tolerance']:.1e}",
            ", ".join(kept) or ("canonicalised only" if latency else "nothing"),
        ]
        lines.append(f"{start} {' | '.join(cells)} |")
    verdict = f"slower by more than 1%: {', '.join(slower) or 'none'}"
    lines += ["", f"{reached} of {len(record['rows'])} rows were reached; {verdict}."]
    packages = ", ".join(
        f"{name} {found}"
        for name, found in record["conditions"].items()
        if name.startswith(("nvidia", "onnxruntime-gpu"))
    )
    return "\n".join(
        [*lines, "", sentence(record["conditions"]), *([packages] if packages else [])]
    )


_ALLOWED_LOSS = 0.99


def _figure(error: float | None) -> str:
    return "not compared" if error is None else f"{error:.1e}"


def _gain(latency: dict[str, Any] | None) -> str:
    """A speedup with its interval; nothing if there is none."""
    if latency is None:
        return ""
    low, high = latency["ci95"]
    return f"{latency['speedup']:.3f} ({low:.3f} to {high:.3f})"


def _options_gain(options: dict[str, Any]) -> str:
    settings = " ".join(f"{key}={value}" for key, value in options["settings"].items())
    return f"{_gain(options['optimized'])} {settings}" if settings else "none gains"


def factorize_table(rows: list[dict[str, Any]]) -> str:
    """What was asked, and what came of it; then every model that was fitted and judged."""
    header = ["model", "asked", "MACs", "speedup", "95% interval", "before", "after", "lost"]
    header += ["95% interval", "judged on", "chosen on", "fitted to", "s", "peak MiB"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        found, latency = row["accuracy"], row["latency"]
        fewer = row["macs"][0] / row["macs"][1]
        before = "itself" if found["baseline"] is None else f"{found['baseline']:.2f}"
        lost = "" if found["drop"] is None else f"{found['drop']:.2f}"
        cells = [row["name"], row["asked"], f"{fewer:.2f}x fewer", f"{latency['speedup']:.3f}"]
        cells += [_interval(latency["ci95"], 3), before, f"{found['optimized']:.2f}", lost]
        cells += [_interval(found["ci95"], 2), f"{found['samples']}"]
        cells += [str(row.get("selected_on") or ""), str(row["fitted_to"])]
        cells += [f"{row['seconds']:.0f}", f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    header = ["model", "layers factorised", "MACs, millions", "speedup", "lost", "95% interval"]
    header += ["lost in the end", "95% interval"]
    lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        for point in row["points"]:
            found = point["accuracy"]
            lost = found["optimized"] if found["drop"] is None else found["drop"]
            speedup = "" if point["speedup"] is None else f"{point['speedup']:.3f}"
            cells = [row["name"], str(len(point["forms"])), _millions(point["macs"]), speedup]
            cells += [f"{lost:.2f}", _interval(found["ci95"], 2)]
            last = point.get("final")
            cells += (
                ["", ""] if last is None else [f"{last['drop']:.2f}", _interval(last["ci95"], 2)]
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_conditions(rows)])


def ablation_tables(records: list[dict[str, Any]]) -> str:
    """For each model the same plan fitted in different ways."""
    return "\n\n".join(map(_ablation_table, records))


def _ablation_table(record: dict[str, Any]) -> str:
    unit = record["rows"][0]["accuracy"]["unit"]
    digits = 3 if unit == "dB" else 2
    header = ["fitted", "MACs, millions", f"lost, {'dB' if unit == 'dB' else 'points'}"]
    header += ["95% interval", "same class", "relative error"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in record["rows"]:
        found = row["accuracy"]
        cells = [row["how"], _millions(row["macs"]), f"{found['drop']:.{digits}f}"]
        agreement = found["also"].get("agreement")
        cells += [_interval(found["ci95"], digits), f"{agreement[1]:.1f} %" if agreement else ""]
        cells.append(f"{found['also']['relative-error'][1]:.{digits - 1}f} %")
        lines.append(f"| {' | '.join(cells)} |")
    on = f"On {record['model']}, which has {_millions(record['macs'])} million MACs."
    return "\n".join([*lines, "", on, "", sentence(record["conditions"])])


def _millions(macs: float) -> str:
    """Three digits, or all of them."""
    millions = macs / 1e6
    return f"{millions:.3g}" if millions < 1000 else f"{millions:.0f}"


def _interval(ci95: list[float], digits: int) -> str:
    return f"{ci95[0]:.{digits}f} to {ci95[1]:.{digits}f}"


def fill(path: Path, name: str, table: str) -> None:
    """Replace what stands between the markers of *name*, if *path* has them."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    text = path.read_text()
    path.write_text(pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text))


_TABLES: dict[str, Callable[[Any], str]] = {
    "accuracy-exact": accuracy_table,
    "factorize-1": factorize_table,
    "factorize-ablation": ablation_tables,
    "honesty": honesty_table,
    "noisy": noisy_table,
    "scaling": scaling_table,
    "shares-1": shares_table,
    "tangled-1": tangled_table,
    "trials-1": trials_table,
    "whole-process": whole_process_table,
}
"""By the names of records."""


def main() -> None:
    """Replace every marked table for which there is a record."""
    for path in sorted((HERE / "records").glob("*.json")):
        rows = json.loads(path.read_text())
        if path.stem == "cuda":
            fill(RESULTS_CUDA, path.stem, cuda_table(rows))
            continue
        if path.stem in _TABLES:
            fill(RESULTS, path.stem, _TABLES[path.stem](rows))
            continue
        if path.stem.startswith("winograd"):
            fill(WINOGRAD, path.stem, winograd_table(rows))
            continue
        if path.stem.startswith("openvino"):
            fill(RESULTS, path.stem, openvino_table(rows))
            continue
        if path.stem.startswith("peers"):
            fill(RESULTS, path.stem, peers_table(rows))
            continue
        fill(RESULTS, path.stem, collection_table(rows))
        if path.stem == "collection-quick-1":
            others = [path.with_name(f"collection-{one}.json") for one in ("quick-2", "full-1")]
            two, full = (json.loads(p.read_text()) if p.exists() else [] for p in others)
            fill(RESULTS, "winograd-asked", asked_table(rows, two, full))
            fill(HERE.parent / "README.md", "summary", summary_table(rows))


if __name__ == "__main__":
    main()
