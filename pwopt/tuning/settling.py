"""Taking back what makes a model wrong or too large; finding the first rewrite that does harm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pwopt.errors import VerificationError
from pwopt.remark import Remark
from pwopt.tuning.pipeline import Rulings
from pwopt.tuning.replay import first_bad
from pwopt.tuning.verdicts import group_of, with_group
from pwopt.tuning.workbench import Build, Workbench

__all__ = ["first_guilty", "settle"]


def settle(bench: Workbench, build: Build) -> Build:
    """Take back whatever makes *build* wrong or too large.

    The guilty candidate is found by bisecting over ordinals; its group is rejected and the
    model built anew, until nothing is left to object to.

    Raises:
        VerificationError: even the canonicalised model differs from the original.
    """

    def is_objectionable(rulings: Rulings) -> bool:
        return bench.objection(bench.build(rulings)) is not None

    objection = bench.objection(build)
    if objection is not None:
        _assert_base_is_fine(bench, build)
    while objection is not None:
        guilty = first_guilty(build, is_objectionable)
        build = bench.build(with_group(build.rulings, group_of(guilty), objection))
        objection = bench.objection(build)
    return build


def first_guilty(build: Build, is_bad: Callable[[Rulings], bool]) -> Remark:
    """The first candidate of *build* with which it is bad, found by bisecting over ordinals.

    The whole is known to be bad, the model without any candidate to be fine.
    """
    limit = build.rulings.limit
    last = build.proposed if limit is None else min(limit, build.proposed)
    worst = first_bad(last, lambda ordinal: is_bad(replace(build.rulings, limit=ordinal)))
    return next(r for r in build.remarks if r.ordinal == worst)


def _assert_base_is_fine(bench: Workbench, build: Build) -> None:
    base = bench.build(replace(build.rulings, limit=0))
    if bench.objection(base) is not None:
        verification = bench.verify(base)
        why = verification.reason if verification is not None else "it is too large"
        raise VerificationError(f"the canonicalised model differs from the original: {why}")
