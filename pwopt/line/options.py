"""How to optimize, and what to look for when something went wrong."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from pwopt.calibration import Given, Metric, Preprocess
from pwopt.result import Script
from pwopt.tuning.candidate import AnyPass
from pwopt.tuning.effort import Effort

__all__ = ["Check", "Options"]


class Check(StrEnum):
    """What may be wrong with a rewritten model."""

    VERIFY = "verify"
    LATENCY = "latency"


@dataclass(frozen=True)
class Options:
    """How to optimize; the fields are the command line's options of the same names.

    Attributes:
        effort: ``none`` decides by an analytic cost model, without a clock; ``quick`` takes about
            a minute; ``full`` goes on until nothing improves.
        passes: run only these (with their options); ``None`` runs the default ones. With effort
            ``none``, passes asked for by name are applied wherever they are correct.
        skip_passes: names of passes to leave out.
        opset: raise the standard operator set to this version first; ``None`` keeps it.
        keep_overridable_initializers: do not treat initializers that are listed among the inputs
            (as IR version 3 required) as constants.
        fp16: convert to half precision first, inputs and outputs excepted; what deviates too far
            on the inputs stays in single precision. The result is verified like any other, with
            a tolerance that suits half precision.
        max_error: tolerance for exact rewrites, relative to each output's scale; ``None`` takes a
            small multiple of what the original itself shows between optimization levels. A large
            one also lets passes offer forms that amplify rounding errors more.
        max_size_growth: largest allowed ratio of file sizes.
        calibration: real data to verify, time and fit approximations with: a folder of images, an
            ``.npz``/``.npy`` file, or feeds; see :func:`pwopt.calibration.load_samples`.
        validation: real data to judge accuracy on; by default a half of *calibration* is held out
            where accuracy is asked for.
        preprocess: what is done to images.
        metric: what counts as accuracy (``top1``, ..., ``module:function``, or a
            :class:`~pwopt.calibration.Metric`); by default what suits data and model.
        max_accuracy_drop: how much of it may be lost, in the metric's unit (for ``%``: points).
            What loses more is not written.
        target_speedup: how much faster approximations should make the model.
        rewrite_limit: apply only the first so many candidates.
        skip_rewrites: ordinals of candidates to leave alone.
        only_rewrites: leave all candidates but these alone; ``None`` for no such restriction.
        time_limit_s: seconds to spend on trials; ``None`` takes the effort's.
        cache: folder for measurements and what they led to; ``None`` measures everything anew.
        tune_options: also try provider options, on what was found, and report them apart.
        front_point: of a replayed report: the factorised model with this number instead of the one
            that was chosen, without exact passes.
        replay: repeat these decisions, on the very model they were made for, and measure nothing;
            effort, passes, opset and treatment of listed initializers are those of the script.
        overwrite: allow the output to replace the input.
        dry_run: write nothing.
        seed: for generated inputs and bootstrap intervals.
    """

    effort: Effort = Effort.QUICK
    passes: tuple[AnyPass, ...] | None = None
    skip_passes: tuple[str, ...] = ()
    opset: int | None = None
    keep_overridable_initializers: bool = False
    fp16: bool = False
    max_error: float | None = None
    max_size_growth: float = 2.0
    calibration: Given | None = None
    validation: Given | None = None
    preprocess: Preprocess | None = None
    metric: str | Metric | None = None
    max_accuracy_drop: float | None = None
    target_speedup: float | None = None
    rewrite_limit: int | None = None
    skip_rewrites: frozenset[int] = frozenset()
    only_rewrites: frozenset[int] | None = None
    time_limit_s: float | None = None
    cache: Path | None = None
    tune_options: bool = True
    replay: Script | None = None
    front_point: int | None = None
    overwrite: bool = False
    dry_run: bool = False
    seed: int = 0

    @property
    def judges(self) -> bool:
        """Whether accuracy is asked for."""
        asked = (self.validation, self.metric, self.max_accuracy_drop, self.target_speedup)
        return any(option is not None for option in asked)

    @property
    def approximates(self) -> bool:
        """Whether a budget for approximations is given."""
        return self.max_accuracy_drop is not None or self.target_speedup is not None

    @property
    def chooses(self) -> bool:
        """Whether one of several approximations is taken because of its accuracy."""
        return self.max_accuracy_drop is not None and self.calibration is not None
