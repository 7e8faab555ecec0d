"""The command line: parses, calls, renders, exits.

Results go to standard output, progress and errors to standard error. Exit codes: 0 done, 1 a clear
error, 2 wrong usage, 3 a check that was asked for says no.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import click

from pwopt.errors import OutputError, PwoptError, UsageError
from pwopt.target import Target

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pwopt.calibration import Preprocess
    from pwopt.graph import Model
    from pwopt.line import Options
    from pwopt.result import Report
    from pwopt.tuning.workbench import Progress

__all__ = ["main"]

EXIT_ERROR = 1
EXIT_REFUSED = 3
EXIT_INTERRUPTED = 130

P = ParamSpec("P")


class ShapeParam(click.ParamType):  # type: ignore[type-arg] # older click is not generic
    """``NAME:1x3x224x224``; names may contain colons."""

    name = "NAME:DIMS"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        name, _, dims = value.rpartition(":")
        try:
            shape = tuple(int(d) for d in dims.split("x"))
        except ValueError:
            shape = ()
        if not name or not shape or any(d < 1 for d in shape):
            self.fail(f"'{value}' is not of the form NAME:1x3x224x224", param, ctx)
        return name, shape


class PreprocessParam(click.ParamType):  # type: ignore[type-arg]
    """A preset with keys, or a file; see :meth:`pwopt.Preprocess.parse`."""

    name = "SPEC"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> Preprocess:
        from pwopt.calibration import Preprocess

        try:
            return Preprocess.parse(value)
        except UsageError as error:
            self.fail(str(error).removeprefix("--preprocess "), param, ctx)


class OptionParam(click.ParamType):  # type: ignore[type-arg]
    """``KEY=VALUE``."""

    name = "K=V"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        key, separator, text = value.partition("=")
        if not key or not separator:
            self.fail(f"'{value}' is not of the form KEY=VALUE", param, ctx)
        return key, text


def target_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that describe a target; *command* takes it as ``target``."""

    @wraps(command)
    def wrapper(
        *args: Any,
        provider: str,
        provider_options: tuple[tuple[str, str], ...],
        threads: int,
        input_shapes: tuple[tuple[str, tuple[int, ...]], ...],
        allow_fallback: bool,
        **others: Any,
    ) -> None:
        target = Target(
            provider,
            threads,
            dict(provider_options),
            dict(input_shapes),
            allow_fallback=allow_fallback,
        )
        command(*args, target=target, **others)

    described: Callable[..., None] = wrapper
    for option in (
        click.option(
            "--input-shape",
            "input_shapes",
            type=ShapeParam(),
            multiple=True,
            help="Fix dynamic dimensions for measuring; a written model keeps them.",
        ),
        click.option(
            "--allow-fallback",
            is_flag=True,
            help="Accept that the CPU runs what the provider does not; it is listed.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=0),
            default=0,
            show_default="all cores",
            help="Intra-op threads.",
        ),
        click.option(
            "--provider-option",
            "provider_options",
            type=OptionParam(),
            multiple=True,
            help="Passed to the execution provider.",
        ),
        click.option("--provider", default="cpu", show_default=True, help="cpu or cuda."),
    ):
        described = option(described)
    return described


def accuracy_options(command: Callable[P, None]) -> Callable[P, None]:
    """The options on what accuracy is judged with."""
    described = command
    for option in (
        click.option(
            "--max-accuracy-drop",
            type=click.FloatRange(min=0),
            metavar="POINTS",
            help="Refuse to lose more, in the metric's unit.",
        ),
        click.option(
            "--metric",
            metavar="NAME",
            help="top1, top5, psnr, agreement, relative-error, cosine, or module:function.",
        ),
    ):
        described = option(described)
    return validation_options(described)


def validation_options(command: Callable[P, None]) -> Callable[P, None]:
    """The options on data to judge on, and how images are read."""
    described = command
    for option in (
        click.option(
            "--preprocess",
            type=PreprocessParam(),
            help="For images: torch, tf, caffe or raw, then keys (torch,resize=256,crop=224), or"
            " a .json file.",
        ),
        click.option(
            "--validation",
            type=click.Path(path_type=Path),
            help="Real data to judge accuracy on: images in class folders or with a labels.csv, or"
            " .npz with 'labels' or 'targets'.",
        ),
    ):
        described = option(described)
    return described


def json_option(command: Callable[P, None]) -> Callable[P, None]:
    """``--json``: one JSON object on standard output and nothing else."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def reports_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn pwopt's errors into one line on standard error and an exit code."""

    @wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except PwoptError as error:
            _fail(str(error), EXIT_ERROR)
        except KeyboardInterrupt:
            _fail("interrupted; nothing was written", EXIT_INTERRUPTED)
        except MemoryError:
            _fail("out of memory", EXIT_ERROR)

    return wrapper


def _fail(message: str, code: int) -> None:
    _complain(message)
    sys.exit(code)


def _complain(message: str) -> None:
    click.echo(f"pwopt: {' '.join(message.split())}", err=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pwopt")
def main() -> None:
    """Make ONNX convolutional networks faster on ONNX Runtime; never slower, never wrong.

    MODEL is a path, or example:NAME for a reference model that pwopt builds itself.

    \b
    Example:
        pwopt optimize example:mobilenet_v3_large_decomposed --threads 1
    """


@main.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: MODEL.opt.onnx.")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write there, under the default names; made if it does not exist.",
)
@target_options
@click.option(
    "--effort",
    type=click.Choice(["none", "quick", "full"]),
    default="quick",
    show_default=True,
    help="none: cost model, no clock; quick: about a minute; full: until nothing improves.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="For trials; the effort's by default. Ctrl-C ends them early, too.",
)
@click.option("--passes", metavar="A,B", help="Run only these; options as NAME:key=value.")
@click.option("--skip-passes", metavar="A,B", help="Leave these out.")
@click.option("--opset", type=int, help="Raise the opset first (default: keep it).")
@click.option("--keep-opset", is_flag=True, help="Keep the opset; this is the default.")
@click.option(
    "--keep-overridable-initializers",
    is_flag=True,
    help="Do not treat initializers that are listed as inputs as constants.",
)
@click.option(
    "--fp16",
    is_flag=True,
    help="Convert to half precision first; inputs and outputs stay as they are.",
)
@click.option("--max-error", type=float, help="Tolerance relative to each output's scale.")
@click.option("--max-size-growth", type=float, default=2.0, show_default=True, metavar="X")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Real data to verify and time with: a folder of images, or an .npz (.npy) of arrays named"
    " like the inputs.",
)
@accuracy_options
@click.option(
    "--target-speedup",
    type=click.FloatRange(min=1),
    metavar="X",
    help="Speedup that approximate rewrites aim for.",
)
@click.option(
    "--report", "reports", type=click.Path(path_type=Path), multiple=True, help=".json or .html"
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Where measurements are kept (default: the user's cache folder).",
)
@click.option("--no-cache", is_flag=True, help="Measure everything anew.")
@click.option(
    "--tune-options/--no-tune-options",
    default=True,
    help="Also try provider options, if the provider has some; they are reported apart.",
)
@click.option("--dry-run", is_flag=True, help="Do everything but write the model.")
@click.option("--overwrite", is_flag=True, help="Allow the output to replace the input.")
@click.option(
    "--replay",
    type=click.Path(path_type=Path),
    metavar="REPORT.json",
    help="Repeat the decisions of a report; measures nothing.",
)
@click.option(
    "--front-point",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --replay: the report's factorised model N, as it is.",
)
@click.option(
    "--rewrite-limit",
    type=click.IntRange(min=0),
    metavar="N",
    help="Hold rewrites with a higher ordinal.",
)
@click.option(
    "--skip-rewrite",
    "skip_rewrites",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Hold the rewrite with this ordinal.",
)
@click.option(
    "--only-rewrite",
    "only_rewrites",
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Hold all rewrites but those with these ordinals.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
@reports_errors
def optimize(
    models: tuple[str, ...],
    output: Path | None,
    output_dir: Path | None,
    target: Target,
    effort: str,
    time_limit: float | None,
    passes: str | None,
    skip_passes: str | None,
    opset: int | None,
    keep_opset: bool,
    keep_overridable_initializers: bool,
    fp16: bool,
    max_error: float | None,
    max_size_growth: float,
    calibration: Path | None,
    validation: Path | None,
    preprocess: Preprocess | None,
    metric: str | None,
    max_accuracy_drop: float | None,
    target_speedup: float | None,
    reports: tuple[Path, ...],
    cache: Path | None,
    no_cache: bool,
    tune_options: bool,
    dry_run: bool,
    overwrite: bool,
    replay: Path | None,
    front_point: int | None,
    rewrite_limit: int | None,
    skip_rewrites: tuple[int, ...],
    only_rewrites: tuple[int, ...],
    seed: int,
    as_json: bool,
) -> None:
    """Rewrite MODEL, keep what is verified and measured faster, and say what was done.

    Several models share measurements and end in a summary; what fails among them does not keep
    the others from being done.

    \b
    Example:
        pwopt optimize model.onnx -o fast.onnx --threads 1 --report report.json
    """
    if front_point is not None and replay is None:
        raise click.UsageError("--front-point needs --replay")
    if keep_opset and opset is not None:
        raise click.UsageError("--keep-opset and --opset exclude each other")
    _check_outputs(models, output, output_dir, reports, replay)
    from pwopt import line
    from pwopt import passes as catalogue
    from pwopt.report.json import read_script
    from pwopt.tuning.cache import default_folder
    from pwopt.tuning.effort import Effort

    options = line.Options(
        effort=Effort(effort),
        passes=tuple(catalogue.parse_spec(s) for s in passes.split(",")) if passes else None,
        skip_passes=tuple(s.strip() for s in skip_passes.split(",")) if skip_passes else (),
        opset=opset,
        keep_overridable_initializers=keep_overridable_initializers,
        fp16=fp16,
        max_error=max_error,
        max_size_growth=max_size_growth,
        calibration=calibration,
        validation=validation,
        preprocess=preprocess,
        metric=metric,
        max_accuracy_drop=max_accuracy_drop,
        target_speedup=target_speedup,
        time_limit_s=time_limit,
        cache=None if no_cache else cache or default_folder(),
        tune_options=tune_options,
        rewrite_limit=rewrite_limit,
        skip_rewrites=frozenset(skip_rewrites),
        only_rewrites=frozenset(only_rewrites) or None,
        replay=None if replay is None else read_script(replay),
        front_point=front_point,
        overwrite=overwrite,
        dry_run=dry_run,
        seed=seed,
    )
    if len(models) > 1:
        _optimize_all(models, output_dir, target, options, as_json=as_json)
        return
    report = _optimized(models[0], output, output_dir, target, options)
    _emit_report(report, reports, as_json=as_json)


def _check_outputs(
    models: tuple[str, ...],
    output: Path | None,
    output_dir: Path | None,
    reports: tuple[Path, ...],
    replay: Path | None,
) -> None:
    if output is not None and output_dir is not None:
        raise click.UsageError("--output and --output-dir exclude each other")
    for path in reports:
        if path.suffix not in (".json", ".html"):
            raise click.UsageError(f"--report {path}: the name must end in .json or .html")
        if not path.parent.is_dir():
            raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if len(models) == 1:
        return
    if output is not None or reports or replay is not None:
        raise click.UsageError(
            "--output, --report and --replay take one model; several take --output-dir and --json"
        )
    stems = [_stem(model) for model in models]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if output_dir is not None and twice is not None:
        raise click.UsageError(f"--output-dir: two models would become {twice}.opt.onnx")


def _stem(model: str) -> str:
    return Path(model.removeprefix("example:")).stem


def _optimized(
    model: str, output: Path | None, output_dir: Path | None, target: Target, options: Options
) -> Report:
    from dataclasses import replace

    from pwopt import line

    with _model_file(model) as path, _progress() as progress:
        if output_dir is not None:
            output_dir.mkdir(exist_ok=True)
        if output is None and (output_dir is not None or path != Path(model)):
            output = (output_dir or Path()) / f"{_stem(model)}.opt.onnx"
        report = line.optimize(path, output, target, options, progress)
    return replace(report, model=replace(report.model, path=Path(model)))


def _optimize_all(
    models: tuple[str, ...],
    output_dir: Path | None,
    target: Target,
    options: Options,
    *,
    as_json: bool,
) -> None:
    from pwopt.report.json import dump, to_json
    from pwopt.report.terminal import overview_table

    reports = []
    for model in models:
        try:
            reports.append(_optimized(model, None, output_dir, target, options))
        except PwoptError as error:
            _complain(str(error))
    if as_json:
        click.echo(dump({"reports": [to_json(report) for report in reports]}), nl=False)
    else:
        _emit(overview_table(reports))
    if len(reports) < len(models):
        sys.exit(EXIT_ERROR)


@main.command()
@click.argument("reference")
@click.argument("candidate")
@click.option(
    "--inputs",
    "--calibration",
    "inputs",
    type=click.Path(path_type=Path),
    help="Real inputs (a folder of images, .npz or .npy); seeded ones by default.",
)
@accuracy_options
@target_options
@click.option("--max-error", type=float, help="Tolerance relative to each output's scale.")
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
@reports_errors
def verify(
    reference: str,
    candidate: str,
    inputs: Path | None,
    validation: Path | None,
    preprocess: Preprocess | None,
    metric: str | None,
    max_accuracy_drop: float | None,
    target: Target,
    max_error: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Compare what CANDIDATE computes with REFERENCE; exit code 3 if they differ.

    With --validation, compare how accurate they are instead; exit code 3 if CANDIDATE loses more
    than --max-accuracy-drop.

    \b
    Example:
        pwopt verify model.onnx model.opt.onnx
        pwopt verify model.onnx small.onnx --validation images --preprocess torch,crop=224
            --max-accuracy-drop 1.0
    """
    from dataclasses import asdict

    from pwopt import checks

    if validation is None and (metric is not None or max_accuracy_drop is not None):
        raise click.UsageError("--metric and --max-accuracy-drop need --validation")
    if validation is not None and (inputs is not None or max_error is not None):
        raise click.UsageError("--validation excludes --inputs and --max-error: outputs may differ")
    with (
        _model_file(reference) as first,
        _model_file(candidate) as second,
        _progress() as progress,
    ):
        if validation is not None:
            accuracy = checks.judge(
                first,
                second,
                validation,
                preprocess=preprocess,
                metric=metric,
                target=target,
                seed=seed,
                progress=progress,
            )
        else:
            result = checks.verify(
                first,
                second,
                inputs,
                preprocess=preprocess,
                target=target,
                max_error=max_error,
                seed=seed,
            )
    from pwopt.report import terminal

    if validation is not None:
        _emit_json(asdict(accuracy)) if as_json else _emit(terminal.accuracy_text(accuracy))
        is_ok = max_accuracy_drop is None or not accuracy.exceeds(max_accuracy_drop)
    else:
        _emit_json(asdict(result)) if as_json else _emit(terminal.verification_table(result))
        is_ok = result.ok
    if not is_ok:
        sys.exit(EXIT_REFUSED)


@main.command()
@click.argument("model")
@click.argument("baseline", required=False)
@target_options
@click.option("--pairs", type=click.IntRange(min=3), help="Exactly so many pairs (or runs).")
@click.option("--fail-below", type=float, metavar="X", help="Exit with 3 below this speedup.")
@click.option("--seed", type=int, default=0, show_default=True)
@json_option
@reports_errors
def bench(
    model: str,
    baseline: str | None,
    target: Target,
    pairs: int | None,
    fail_below: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Time MODEL, in pairs with BASELINE if one is given.

    \b
    Example:
        pwopt bench model.opt.onnx model.onnx --threads 1 --fail-below 1.0
    """
    from dataclasses import asdict

    from pwopt import checks

    if fail_below is not None and baseline is None:
        raise click.UsageError("--fail-below needs a BASELINE to compare with")
    with _model_file(model) as path, _progress() as progress:
        if baseline is None:
            latency = checks.time(path, target=target, runs=pairs, seed=seed, progress=progress)
        else:
            with _model_file(baseline) as other:
                comparison = checks.bench(
                    path, other, target=target, pairs=pairs, seed=seed, progress=progress
                )
    from pwopt.report import terminal

    if baseline is None:
        _emit_json(asdict(latency)) if as_json else _emit(terminal.bench_table({model: latency}))
        return
    _emit_json(asdict(comparison)) if as_json else _emit(terminal.comparison_table(comparison))
    if fail_below is not None and comparison.speedup < fail_below:
        sys.exit(EXIT_REFUSED)


@main.command()
@click.argument("model")
@target_options
@click.option("--profile", is_flag=True, help="Add measured time per node.")
@json_option
@reports_errors
def inspect(
    model: str,
    target: Target,
    profile: bool,
    as_json: bool,
) -> None:
    """Per layer and in total: shapes, params, MACs, bytes moved, arithmetic intensity.

    \b
    Example:
        pwopt inspect example:resnet50 --profile --threads 1
    """
    from dataclasses import asdict

    from pwopt import checks
    from pwopt.cost import model_cost
    from pwopt.report.terminal import inspect_table

    with _model_file(model) as path:
        cost = model_cost(_loaded(path), target.input_shapes)
        times = checks.node_times_us(path, target=target) if profile else None
    if as_json:
        _emit_json(
            {
                "total": {k: getattr(cost, k) for k in ("params", "macs", "flops", "bytes")},
                "unknown": list(cost.unknown),
                "nodes": [asdict(n) for n in cost.nodes],
                "time_us": times,
            }
        )
        return
    _emit(inspect_table(cost, times))


@main.command()
@click.argument("model")
@click.option("--node", metavar="NAME", help="Only sites whose name contains NAME.")
@click.option("--passes", metavar="A,B", help="Ask only these passes.")
@json_option
@reports_errors
def explain(model: str, node: str | None, passes: str | None, as_json: bool) -> None:
    """What each pass says about each site: applies, or declines and why; measures nothing.

    \b
    Example:
        pwopt explain example:resnet50 --node layer1
    """
    from pwopt import checks
    from pwopt import passes as catalogue
    from pwopt.report.json import remark_json
    from pwopt.report.terminal import explain_table

    chosen = tuple(catalogue.parse_spec(s) for s in passes.split(",")) if passes else None
    with _model_file(model) as path:
        loaded = _loaded(path)
        ops = {n.name: n.op for n in loaded.nodes.values()}
        remarks = checks.explain(loaded, chosen)
    if node is not None:
        remarks = [r for r in remarks if node in r.site]
        if not remarks:
            raise UsageError(f"no site's name contains '{node}'")
    if as_json:
        _emit_json({"remarks": [remark_json(r) for r in remarks]})
        return
    _emit(explain_table(remarks, ops))


@main.command("passes")
@click.argument("name", required=False)
@json_option
@reports_errors
def show_passes(name: str | None, as_json: bool) -> None:
    """List the passes, or show the documentation of one.

    \b
    Example:
        pwopt passes lower-pointwise-conv
    """
    from pwopt import passes as catalogue
    from pwopt.report.catalogue import pass_json, pass_page, pass_table

    chosen = catalogue.ALL if name is None else (catalogue.find(name),)
    if as_json:
        _emit_json({"passes": [pass_json(p) for p in chosen]})
    elif name is None:
        _emit(pass_table(chosen))
    else:
        click.echo(pass_page(chosen[0]))


@main.group()
def models() -> None:
    """The reference models that pwopt builds itself, with seeded weights."""


@models.command("list")
@json_option
@reports_errors
def list_models(as_json: bool) -> None:
    """List the reference models.

    \b
    Example:
        pwopt models list
    """
    from dataclasses import asdict

    from pwopt import models as zoo
    from pwopt.report.catalogue import model_table

    infos = [zoo.describe(name) for name in zoo.names()]
    _emit_json({"models": [asdict(i) for i in infos]}) if as_json else _emit(model_table(infos))


@models.command("export")
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: NAME.onnx.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--batch", default="1", show_default=True, help="A number, or a name for dynamic.")
@reports_errors
def export_model(name: str, output: Path | None, seed: int, batch: str) -> None:
    """Write a reference model.

    \b
    Example:
        pwopt models export resnet50 -o resnet50.onnx
    """
    from pwopt import models as zoo
    from pwopt.graph import parse, save

    size: int | str = int(batch) if batch.isdecimal() else batch
    written = save(parse(zoo.build(name, seed=seed, batch=size)), output or Path(f"{name}.onnx"))
    click.echo(f"{written.path} ({written.size_bytes} bytes)")


@main.command()
@click.argument("model")
@click.option(
    "--replay",
    type=click.Path(path_type=Path),
    metavar="REPORT.json",
    required=True,
    help="The report of the optimization in which something went wrong.",
)
@click.option("--check", type=click.Choice(["verify", "latency"]), required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the guilty site as a model of its own.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="What the factors were fitted to, if the report's model was factorised.",
)
@validation_options
@target_options
@json_option
@reports_errors
def bisect(
    model: str,
    replay: Path,
    check: str,
    output: Path | None,
    calibration: Path | None,
    validation: Path | None,
    preprocess: Preprocess | None,
    target: Target,
    as_json: bool,
) -> None:
    """Find the rewrite that breaks MODEL or makes it slower, in log2 of their number of steps.

    \b
    Example:
        pwopt bisect model.onnx --replay report.json --check latency -o guilty.onnx
    """
    from pwopt import line
    from pwopt.graph import parse, save
    from pwopt.report.json import read_script, remark_json

    with _model_file(model) as path, _progress() as progress:
        culprit = line.bisect(
            path,
            read_script(replay),
            line.Check(check),
            target,
            progress,
            calibration=calibration,
            validation=validation,
            preprocess=preprocess,
        )
    if culprit is not None and culprit.window is not None and output is not None:
        save(parse(culprit.window), output)
    if as_json:
        found = None if culprit is None else remark_json(culprit.remark)
        _emit_json({"culprit": found, "looks": 0 if culprit is None else culprit.looks})
    elif culprit is None:
        click.echo(f"no rewrite of {replay} fails the check '{check}'")
    else:
        remark = culprit.remark
        click.echo(f"rewrite {remark.ordinal}: {remark.pass_name} at {remark.site}")
        for key, value in remark.facts.items():
            click.echo(f"  {key}: {value}")
        click.echo(
            f"found in {culprit.looks} builds; --skip-rewrite {remark.ordinal} leaves it out"
        )


@main.group("cache")
def cache_group() -> None:
    """What earlier searches measured, kept so that later ones need not."""


@cache_group.command("info")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@json_option
@reports_errors
def cache_info(cache: Path | None, as_json: bool) -> None:
    """Where the cache lies, and what it holds.

    \b
    Example:
        pwopt cache info
    """
    from pwopt.tuning.cache import Cache, default_folder

    found = Cache.info(cache or default_folder())
    if as_json:
        _emit_json(
            {"path": str(found.path), "entries": found.entries, "size_bytes": found.size_bytes}
        )
        return
    entries = "damaged" if found.entries is None else f"{found.entries} entries"
    click.echo(f"{found.path}: {entries}, {found.size_bytes} bytes")


@cache_group.command("clear")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), metavar="DIR")
@reports_errors
def cache_clear(cache: Path | None) -> None:
    """Forget all measurements.

    \b
    Example:
        pwopt cache clear
    """
    from pwopt.tuning.cache import Cache, default_folder

    click.echo(f"freed {Cache.clear(cache or default_folder())} bytes")


# -- helpers -------------------------------------------------------------------------------------


def _loaded(path: Path) -> Model:
    from pwopt.graph import load

    model = load(path)
    model.unlist_initializers()
    model.infer_shapes()
    return model


@contextmanager
def _model_file(model: str) -> Iterator[Path]:
    """The path of *model*; a reference model is built in a temporary folder."""
    if not model.startswith("example:"):
        yield Path(model)
        return
    from pwopt import models as zoo
    from pwopt.graph import parse, save

    name = model.removeprefix("example:")
    with tempfile.TemporaryDirectory(prefix="pwopt-example-") as folder:
        path = Path(folder) / f"{name}.onnx"
        save(parse(zoo.build(name)), path)
        yield path


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on standard error, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("starting", total=None)

        def update(label: str, fraction: float | None) -> None:
            if fraction is None:
                bar.update(task, description=label, total=None)
            else:
                bar.update(task, description=label, total=1.0, completed=fraction)

        yield update


def _emit(renderable: RenderableType) -> None:
    from rich.console import Console

    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=160)
    console.print(renderable, highlight=False)


def _emit_json(value: Mapping[str, Any]) -> None:
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    click.echo(text)


def _finite(value: Any) -> Any:
    """*value* with ``None`` for infinities and NaNs, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _emit_report(report: Report, paths: tuple[Path, ...], *, as_json: bool) -> None:
    from pwopt.report.files import write_report
    from pwopt.report.json import dump, to_json
    from pwopt.report.terminal import report_table

    for path in paths:
        write_report(report, path)
    if as_json:
        click.echo(dump(to_json(report)), nl=False)
        return
    _emit(report_table(report))
    for path in paths:
        click.echo(f"report: {path}")
