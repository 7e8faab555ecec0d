"""Reports for people: what happened in ten seconds of reading."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pwopt.cost import ModelCost, NodeCost
from pwopt.remark import Kind, Remark, Tally
from pwopt.result import (
    AccuracyFigures,
    FactorizationFigures,
    HalfFigures,
    LatencyFigures,
    OptionsFigures,
    PlacementFigures,
    Report,
)
from pwopt.runtime import Comparison, Latency, Verification

__all__ = [
    "accuracy_text",
    "bench_table",
    "comparison_table",
    "explain_table",
    "figure",
    "inspect_table",
    "overview_table",
    "report_table",
    "verification_table",
]

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def figure(value: float | None, unit: str = "") -> str:
    """A number with three significant digits and a metric prefix: ``4.09 GMACs``."""
    if value is None:
        return "unknown"
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def report_table(report: Report) -> RenderableType:
    """The summary that ``optimize`` ends with."""
    front = [] if report.factorization is None else [_front_table(report.factorization)]
    return Group(
        _summary(report), *front, _pass_table(report), *(Text(f"- {n}") for n in report.notes)
    )


def overview_table(reports: Sequence[Report]) -> Table:
    """One line per model."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("model", no_wrap=True)
    for title in ("latency", "error", "kept", "output"):
        table.add_column(title, overflow="fold")
    for report in reports:
        kept = [n for n, tally in report.passes.items() if tally.applied]
        table.add_row(
            "" if report.model.path is None else report.model.path.name,
            _latency_text(report.latency),
            _error_text(report),
            ", ".join(kept) or "the original",
            "not written" if report.output.path is None else str(report.output.path),
        )
    return table


def _summary(report: Report) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    target = report.target
    table.add_row("model", f"{report.model.path} (opset {report.model.opset})")
    threads = f"threads {target.threads}" if target.threads else "all cores"
    place = f"{target.provider}, {threads}, {target.device}"
    table.add_row("target", f"{place}, ONNX Runtime {target.ort}")
    table.add_row("latency", _latency_text(report.latency))
    if report.fp16 is not None:
        table.add_row("fp16", _half_text(report.fp16))
    if report.options is not None:
        table.add_row("options", _options_text(report.options))
    table.add_row("error", _error_text(report))
    if report.accuracy is not None:
        table.add_row("accuracy", accuracy_text(report.accuracy))
    if report.placement is not None:
        table.add_row("ran on", _placement_text(report.placement))
    before, after = report.cost.before, report.cost.after
    table.add_row("parameters", _change(before.params, after.params, ""))
    table.add_row("MACs", _change(before.macs, after.macs, ""))
    table.add_row("file", _change(before.size_bytes, after.size_bytes, "B"))
    written = report.output.path
    table.add_row("output", "nothing was written (dry run)" if written is None else str(written))
    table.add_row("ended", f"{report.stop_reason} ({report.seconds['total']:.1f} s)")
    return table


def _latency_text(latency: LatencyFigures | None) -> str:
    if latency is None:
        return "not timed"
    low, high = latency.ci95
    return (
        f"{latency.baseline_ms:.3g} ms -> {latency.optimized_ms:.3g} ms:"
        f" {latency.speedup:.3f}x [{low:.3f}, {high:.3f}], {latency.pairs} pairs"
        + _copies_text(latency.copies_ms)
    )


def _copies_text(copies_ms: tuple[float, float] | None) -> str:
    if copies_ms is None:
        return ""
    to_device, to_host = copies_ms
    return f"; copies not counted: {to_device:.2g} ms to the device, {to_host:.2g} ms back"


def _half_text(half: HalfFigures) -> str:
    kept = f"{len(half.kept)} of {half.nodes} nodes stay in fp32"
    parts = [
        f"{title} {figures.speedup:.3f}x [{figures.ci95[0]:.3f}, {figures.ci95[1]:.3f}]"
        for title, figures in (
            ("the conversion alone", half.conversion),
            ("rewriting on top", half.rewriting),
        )
        if figures is not None
    ]
    return "; ".join([kept, *parts])


def _options_text(options: OptionsFigures) -> str:
    """What options gain on top; the latency above them is without."""
    if options.original is None or options.optimized is None:
        tried = ", ".join(_settings_text(trial.settings) for trial in options.trials)
        return f"none of {tried} gains"
    low, high = options.optimized.ci95
    return (
        f"{_settings_text(options.settings)}: {options.optimized.speedup:.3f}x"
        f" [{low:.3f}, {high:.3f}] on top, of the original {options.original.speedup:.3f}x;"
        " not counted above, set them where the model is deployed"
    )


def _settings_text(settings: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _placement_text(placement: PlacementFigures) -> str:
    counts = (f"{provider}: {count} nodes" for provider, count in placement.nodes.items())
    text = ", ".join(counts)
    if placement.copies:
        text += f", of which {placement.copies} copy between memories"
    if placement.fallback:
        text += f"; not on the device: {', '.join(placement.fallback)}"
    return text


def _error_text(report: Report) -> str:
    error = report.error
    if error.max_relative is None:
        return "not compared"
    text = f"{error.max_relative:.2g} of scale (tolerance {error.tolerance:.2g})"
    text += f", {error.inputs} inputs"
    if error.coarse is not None:
        coarse = error.coarse
        text += f"; {coarse.optimized:.2g} with {coarse.name} (the original: {coarse.original:.2g})"
    if error.untested:
        text += f"; proves nothing for {', '.join(error.untested)}"
    return text


def accuracy_text(accuracy: AccuracyFigures) -> str:
    """Before and after, what was lost and how sure that is, and the further figures."""
    unit = accuracy.unit and f" {accuracy.unit}"
    low, high = accuracy.ci95
    interval = f"[{low:.3g}, {high:.3g}], {accuracy.samples} samples"
    if accuracy.baseline is None:
        text = f"{accuracy.metric} {accuracy.optimized:.4g}{unit} {interval}"
    else:
        text = f"{accuracy.metric} {accuracy.baseline:.4g} -> {accuracy.optimized:.4g}{unit}"
        text += f": {accuracy.drop:.3g} lost {interval}"
    others = (
        f"{name} {after:.4g}" if before == after else f"{name} {before:.4g} -> {after:.4g}"
        for name, (before, after) in accuracy.also.items()
    )
    return "; ".join([text, *others])


def _change(before: float | None, after: float | None, unit: str) -> str:
    if before == after:
        return f"{figure(before, unit)} (unchanged)"
    return f"{figure(before, unit)} -> {figure(after, unit)}"


def _front_table(figures: FactorizationFigures) -> Table:
    """Accuracy against latency: what was fitted and judged."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for title in ("factorised", "speedup", "MACs", "accuracy", "layers"):
        table.add_column(title, overflow="fold")
    for number, point in enumerate(figures.points, start=1):
        speedup = "not timed"
        if point.speedup is not None and point.ci95 is not None:
            speedup = f"{point.speedup:.3f}x [{point.ci95[0]:.3f}, {point.ci95[1]:.3f}]"
        accuracy = accuracy_text(replace(point.accuracy, also={}))
        if point.final is not None:
            accuracy += f"; in the end {accuracy_text(replace(point.final, also={}))}"
        methods = Counter(name.rpartition("-")[0] for name in point.plan.values())
        table.add_row(
            f"{number}{' (taken)' if number == figures.chosen else ''}",
            speedup,
            figure(point.macs),
            accuracy,
            ", ".join(f"{count} {method}" for method, count in methods.most_common()),
        )
    return table


def _pass_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("pass", no_wrap=True)
    for kind in Kind:
        table.add_column(kind.value, justify="right")
    table.add_column("mostly because", overflow="fold")
    for name, tally in report.passes.items():
        remarks = [r for r in report.remarks if r.pass_name == name]
        table.add_row(name, *_counts(tally), _commonest(remarks))
    return table


def _counts(tally: Tally) -> list[str]:
    return [str(n) for n in (tally.applied, tally.declined, tally.rejected, tally.held)]


def _commonest(remarks: Sequence[Remark]) -> str:
    """The commonest reason why a site was left alone, candidates before declines."""
    for kinds in ((Kind.REJECTED, Kind.HELD), (Kind.DECLINED,)):
        chosen = [r for r in remarks if r.kind in kinds]
        if chosen:
            reason = Counter(r.reason for r in chosen).most_common(1)[0][0]
            example = next(r for r in chosen if r.reason == reason)
            speedup = example.facts.get("speedup")
            return f"{reason} ({speedup}x)" if speedup is not None else reason
    return ""


def explain_table(remarks: Iterable[Remark], ops: Mapping[str, str]) -> Table:
    """One line per site and pass: applies, or declines and why."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for title in ("site", "op", "pass", "says", "facts"):
        table.add_column(title, overflow="fold")
    for remark in remarks:
        says = "applies" if remark.ordinal is not None else f"declines: {remark.reason}"
        facts = ", ".join(f"{k}={v}" for k, v in remark.facts.items() if k != "signature")
        table.add_row(remark.site, ops.get(remark.site, ""), remark.pass_name, says, facts)
    return table


def inspect_table(cost: ModelCost, times_us: Mapping[str, float] | None = None) -> Table:
    """Per node and in total: shapes, parameters, MACs, bytes, arithmetic intensity, time."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("node", overflow="fold")
    table.add_column("op", no_wrap=True)
    table.add_column("output", overflow="fold")
    columns = ["params", "MACs", "bytes", "FLOP/byte", *(["µs"] if times_us is not None else [])]
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for node in cost.nodes:
        table.add_row(node.site, node.op, _shapes(node), *_figures(node, times_us))
    total = [figure(cost.params), figure(cost.macs), figure(cost.bytes), f"{cost.intensity:.3g}"]
    table.add_section()
    if times_us is not None:
        total.append(f"{sum(times_us.values()):.0f}")
        own = sum(times_us.values()) - sum(times_us.get(n.site, 0.0) for n in cost.nodes)
        table.add_row("added by the runtime", *[""] * 6, f"{own:.0f}")
    table.add_row("total", "", "", *total, style="bold")
    return table


def _shapes(node: NodeCost) -> str:
    shapes = ("?" if s is None else "x".join(map(str, s)) for s in node.output_shapes)
    return " ".join(shapes)


def _figures(node: NodeCost, times_us: Mapping[str, float] | None) -> list[str]:
    time: list[str] = []
    if times_us is not None:
        time = [f"{times_us[node.site]:.0f}" if node.site in times_us else ""]
    if not node.known:
        return [figure(node.params), "?", "?", "?", *time]
    moved = node.bytes_read + node.bytes_written
    intensity = f"{node.arithmetic_intensity:.3g}"
    return [figure(node.params), figure(node.macs), figure(moved), intensity, *time]


def verification_table(verification: Verification) -> RenderableType:
    """Per output: deviation, and what tolerance would have passed."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for title in ("output", "max abs", "relative", "tested"):
        table.add_column(title, justify="left" if title == "output" else "right")
    for output in verification.outputs:
        tested = "yes" if output.tested else f"no: {output.why}"
        table.add_row(output.name, f"{output.max_abs:.3g}", f"{output.max_relative:.3g}", tested)
    says = "the models agree" if verification.ok else f"the models differ: {verification.reason}"
    line = (
        f"{says} (relative error {verification.max_relative:.3g}, tolerance"
        f" {verification.tolerance:.3g}, would pass at {verification.required_tolerance:.3g},"
        f" {verification.inputs} inputs)"
    )
    return Group(table, Text(line))


def comparison_table(comparison: Comparison) -> RenderableType:
    """A paired comparison of a candidate with its baseline."""
    low, high = comparison.ci95
    return Group(
        bench_table({"baseline": comparison.baseline, "model": comparison.candidate}),
        Text(
            f"{comparison.speedup:.3f}x [{low:.3f}, {high:.3f}] in {comparison.pairs} pairs"
            + ("" if comparison.stable else "; the spread was too wide to be sure")
        ),
    )


def bench_table(latencies: Mapping[str, Latency]) -> Table:
    """Median latency with its interval."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for title in ("", "median ms", "95% interval", "runs"):
        table.add_column(title, justify="right")
    for name, latency in latencies.items():
        low, high = latency.ci95_ms
        interval = f"[{low:.4g}, {high:.4g}]"
        table.add_row(name, f"{latency.median_ms:.4g}", interval, str(latency.runs))
    return table
