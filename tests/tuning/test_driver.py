from __future__ import annotations

import onnx
import pytest

from pwopt.errors import PwoptError
from pwopt.graph import parse
from pwopt.passes.contract import Match, Variant
from pwopt.remark import Kind, Tally, Verdict
from pwopt.tuning.candidate import Candidate
from pwopt.tuning.driver import Change, Driver
from tests.passes.harness import model, node
from tests.tuning.toys import Swap


def chain(names: list[str]) -> onnx.ModelProto:
    nodes = [
        onnx.helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=name)
        for i, name in enumerate(names)
    ]
    return model(nodes, {"t0": [1, 4]}, {f"t{len(names)}": [1, 4]})


def ops(driver: Driver) -> list[str]:
    return [n.op for n in driver.model.sorted_nodes()]


def test_every_site_ends_in_exactly_one_remark() -> None:
    driver = Driver(parse(chain(["a", "keep", "c", "d"])))

    def choose(candidate: Candidate) -> Variant | Verdict:
        if candidate.site == "c":
            return Verdict.HELD
        return candidate.variants[0 if candidate.site == "a" else 1]

    def review(change: Change) -> Verdict:
        return Verdict.REJECTED_SLOWER if change.variant.name == "Neg" else Verdict.KEPT

    driver.run(Swap(), choose, review)
    remarks = driver.ledger.remarks()
    assert Tally.of([r for r in remarks if r.site in "a keep c d"]) == Tally(1, 1, 1, 1)
    assert ops(driver) == ["Abs", "Relu", "Relu", "Relu"]
    assert [r.ordinal for r in remarks if r.ordinal] == [1, 2, 3]


def test_a_single_form_with_a_name_is_named() -> None:
    """Windows are cut by the names of forms, so a form without one was never timed."""

    class OneWay(Swap):
        def variants(self, match: Match) -> tuple[Variant, ...]:
            return super().variants(match)[:1]

    driver = Driver(parse(chain(["a", "b"])))
    driver.run(OneWay(), lambda c: Verdict.HELD if c.site == "a" else c.variants[0])
    held, applied = (r.facts for r in driver.ledger.remarks() if r.ordinal)
    assert held["variants"] == applied["variants"] == ["Abs"]
    assert applied["variant"] == "Abs"


def test_a_refused_change_leaves_no_trace() -> None:
    original = chain(["a", "b"])
    driver = Driver(parse(original))
    driver.run(Swap(), review=lambda _: Verdict.REJECTED_SLOWER)
    assert driver.model.to_proto().SerializeToString(
        deterministic=True
    ) == original.SerializeToString(deterministic=True)


def test_a_refused_site_is_not_proposed_again_until_restored() -> None:
    driver = Driver(parse(chain(["a"])))
    start = driver.checkpoint()
    driver.run(Swap(), lambda _: Verdict.HELD)
    driver.run(Swap())
    assert ops(driver) == ["Relu"]
    assert driver.proposed == 1
    driver.restore(start)
    driver.run(Swap())
    assert ops(driver) == ["Abs"]
    assert [r.kind for r in driver.ledger.remarks() if r.ordinal] == [Kind.APPLIED]


def test_builds_after_restoring_are_byte_equal() -> None:
    driver = Driver(parse(chain(["a", "b", "c"])))
    start = driver.checkpoint()
    built = []
    for _ in range(3):
        driver.restore(start)
        driver.run(Swap())
        built.append(driver.model.to_proto().SerializeToString(deterministic=True))
    assert built[0] == built[1] == built[2]


def test_equal_sites_share_a_signature_and_others_do_not() -> None:
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Relu", ["x"], ["b"]),
        node("MaxPool", ["x"], ["p"], kernel_shape=[2, 2]),
        node("Relu", ["p"], ["c"]),
    ]
    proto = model(
        nodes, {"x": [1, 2, 4, 4]}, {"a": [1, 2, 4, 4], "b": [1, 2, 4, 4], "c": [1, 2, 3, 3]}
    )
    wrapped = parse(proto)
    wrapped.infer_shapes()
    seen: dict[str, str] = {}

    def choose(candidate: Candidate) -> Verdict:
        seen[candidate.site] = candidate.signature
        return Verdict.HELD

    Driver(wrapped).run(Swap(), choose)
    assert seen["n_a"] == seen["n_b"] != seen["n_c"]


def test_a_pass_without_end_is_stopped_with_its_name() -> None:
    driver = Driver(parse(chain(["a"])))
    with pytest.raises(PwoptError, match="swap does not come to an end"):
        driver.run(Swap(source="Relu", result="Relu"))
