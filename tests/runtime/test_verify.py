from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from pwopt.errors import InvalidModelError, UsageError
from pwopt.runtime import (
    Feeds,
    MissingKernelError,
    Reference,
    UntestableError,
    Verification,
    make_inputs,
    open_session,
    rounding_floor,
    verification_target,
)
from pwopt.target import Target
from tests.runtime.textual import write

CPU = Target(threads=1)


def inputs(path: Path, target: Target = CPU) -> list[Feeds]:
    with open_session(path, target, optimized=False) as session:
        return make_inputs(session.interface.inputs, target, np.random.default_rng(0))


def verified(
    folder: Path,
    original: str,
    candidate: str,
    feeds: list[Feeds] | None = None,
    *,
    opset: int = 17,
    ir: int = 8,
    **options: Any,
) -> Verification:
    first = write(folder, original, name="original", opset=opset, ir=ir)
    second = write(folder, candidate, name="candidate", opset=opset, ir=ir)
    reference = Reference.of(first, CPU, inputs(first) if feeds is None else feeds, **options)
    return reference.verify(second)


def scaled(factor: float, type_: str = "float") -> str:
    """``Y = factor * X``, in a way that the runtime does not fold."""
    return f"""g ({type_}[N,4] x) => ({type_}[N,4] y) {{
        c = Constant <value = float {{{factor!r}}}> ()
        k = CastLike (c, x)
        y = Mul(x, k)
    }}"""


def conv_model(
    folder: Path,
    name: str,
    *,
    error: float = 0.0,
    rescaled: bool = False,
    head: str = "y = Abs(p)",
    output: str = "float",
) -> Path:
    """Three 3x3 convolutions with Relu and average pooling, then *head*; seeded weights.

    *error* is added to one weight of each; *rescaled* multiplies weights and divides outputs.
    """
    rng = np.random.default_rng(5)
    weights: dict[str, np.ndarray[Any, Any]] = {}
    lines: list[str] = []
    for layer, fed in enumerate(("x", "r0", "r1")):
        weight = rng.standard_normal((16, 16, 3, 3)).astype(np.float32) / np.float32(12)
        weight[0, 0, 0, 0] += error
        scale = np.float32(1.7 if rescaled else 1)
        weights |= {f"w{layer}": weight * scale, f"s{layer}": np.array([scale])}
        lines += [
            f"c{layer} = Conv <pads = [1, 1, 1, 1]> ({fed}, w{layer})",
            f"d{layer} = Div(c{layer}, s{layer})",
            f"r{layer} = Relu(d{layer})",
        ]
    lines += ["p = GlobalAveragePool(r2)", head]
    body = "\n".join(lines)
    graph = f"g (float[N,16,12,12] x) => ({output}[N,16,1,1] y) {{ {body} }}"
    path = write(folder, graph, name=name)
    model = onnx.load(path)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(w, k) for k, w in weights.items())
    onnx.save(model, path)
    return path


def test_a_model_agrees_with_itself(tmp_path: Path) -> None:
    path = conv_model(tmp_path, "original")
    result = Reference.of(path, CPU, inputs(path)).verify(path)
    assert (result.ok, result.inputs, result.reason, result.tested) == (True, 3, None, True)
    assert result.max_relative == result.required_tolerance <= result.tolerance
    assert [output.name for output in result.outputs] == ["y"]


def test_rounding_passes_and_a_small_real_error_does_not(tmp_path: Path) -> None:
    path = conv_model(tmp_path, "original")
    reference = Reference.of(path, CPU, inputs(path), depth=3)
    rounded = reference.verify(conv_model(tmp_path, "rounded", rescaled=True))
    assert rounded.ok
    assert 0 < rounded.max_relative < 1e-5
    wrong = reference.verify(conv_model(tmp_path, "wrong", error=1e-3))
    assert not wrong.ok
    assert wrong.reason is not None
    assert wrong.reason.startswith("output 'y' deviates by")
    assert wrong.required_tolerance == wrong.max_relative > wrong.tolerance
    assert wrong.tolerance < 1e-4


def test_an_open_session_is_verified_like_its_file(tmp_path: Path) -> None:
    path = conv_model(tmp_path, "original")
    reference = Reference.of(path, CPU, inputs(path))
    with open_session(path, verification_target(CPU)) as session:
        assert reference.verify(session) == reference.verify(path)


def test_the_tolerance_is_at_least_the_rounding_floor_of_the_depth(tmp_path: Path) -> None:
    path = write(tmp_path, scaled(1.5))
    shallow = Reference.of(path, CPU, inputs(path))
    deep = Reference.of(path, CPU, inputs(path), depth=100)
    assert shallow.tolerances == {"y": rounding_floor("float", 1)}
    assert deep.tolerances["y"] == pytest.approx(10 * shallow.tolerances["y"])
    assert 1e-6 < shallow.tolerances["y"] < 1e-5


def test_floors_follow_the_type() -> None:
    floors = [rounding_floor(t, 1) for t in ("double", "float", "float16", "bfloat16")]
    assert floors == sorted(floors)
    assert floors[0] < 1e-14
    assert floors[2] < 0.01
    assert rounding_floor("int64", 1) == 0.0


@pytest.mark.parametrize(("factor", "ok"), [(1.5 + 1e-6, True), (1.5 + 1e-4, False)])
def test_the_default_tolerance_is_tight(tmp_path: Path, factor: float, *, ok: bool) -> None:
    assert verified(tmp_path, scaled(1.5), scaled(factor)).ok is ok


@pytest.mark.parametrize(("max_error", "ok"), [(1e-2, True), (1e-7, False)])
def test_max_error_overrides(tmp_path: Path, max_error: float, *, ok: bool) -> None:
    result = verified(tmp_path, scaled(1.5), scaled(1.5 * (1 + 1e-3)), max_error=max_error)
    assert (result.ok, result.tolerance) == (ok, max_error)
    assert result.required_tolerance == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("options", [{"max_error": 0.0}, {"max_error": math.nan}, {"depth": 0}])
def test_impossible_options_are_usage_errors(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="impossible"):
        verified(tmp_path, scaled(1.5), scaled(1.5), **options)


@pytest.mark.parametrize(
    ("type_", "inside", "outside"), [("float16", 1e-3, 0.05), ("double", 1e-16, 1e-9)]
)
def test_other_float_types_have_their_own_tolerance(
    tmp_path: Path, type_: str, inside: float, outside: float
) -> None:
    def model(factor: float) -> str:
        return f"""g ({type_}[N,4] x) => ({type_}[N,4] y) {{
            c = Constant <value = double {{{factor!r}}}> ()
            k = CastLike (c, x)
            y = Mul(x, k)
        }}"""

    assert verified(tmp_path, model(1.5), model(1.5 * (1 + inside))).ok
    assert not verified(tmp_path, model(1.5), model(1.5 * (1 + outside))).ok


def test_bfloat16_outputs_are_compared_at_their_own_precision(tmp_path: Path) -> None:
    def model(factor: float) -> str:
        return f"""g (float[N,4] x) => (bfloat16[N,4] y) {{
            k = Constant <value = float {{{factor!r}}}> ()
            z = Mul(x, k)
            y = Cast <to = 16> (z)
        }}"""

    assert verified(tmp_path, model(1.5), model(1.505)).ok
    assert not verified(tmp_path, model(1.5), model(1.7)).ok


def test_a_coarser_type_inside_widens_the_floor(tmp_path: Path) -> None:
    result = verified(tmp_path, scaled(1.5), scaled(1.502), precision="float16")
    assert result.ok
    assert result.tolerance == rounding_floor("float16", 1)
    whole = "g (int64[2] x) => (int64[2] y) { y = Abs(x) }"
    assert verified(tmp_path, whole, whole, precision="float16").tolerance == 0


def test_a_dynamic_batch_runs_at_the_given_size(tmp_path: Path) -> None:
    path = conv_model(tmp_path, "original")
    target = Target(threads=1, input_shapes={"x": (5, 16, 12, 12)})
    reference = Reference.of(path, target, inputs(path, target))
    assert np.asarray(reference.outputs[0]["y"]).shape == (5, 16, 1, 1)
    assert reference.verify(path).ok


def test_nan_that_only_the_candidate_has_fails(tmp_path: Path) -> None:
    original = "g (float[N,4] x) => (float[N,4] y) { y = Abs(x) }"
    candidate = "g (float[N,4] x) => (float[N,4] y) { s = Sqrt(x) y = Mul(s, s) }"
    result = verified(tmp_path, original, candidate, max_error=10.0)
    assert not result.ok
    assert "NaN or infinite" in str(result.reason)
    assert result.required_tolerance == math.inf


def test_sets_that_give_nan_are_left_out_while_others_do_not(tmp_path: Path) -> None:
    graph = "g (float[N,4] x) => (float[N,4] y) { y = Sqrt(x) }"
    path = write(tmp_path, graph)
    reference = Reference.of(path, CPU, inputs(path))
    assert len(reference.feeds) == len(reference.outputs) == 2
    assert reference.dropped == ("input set 0: the original gives NaN or infinity",)
    assert reference.verify(path).inputs == 2


def test_nan_in_all_sets_must_be_met_at_the_same_places(tmp_path: Path) -> None:
    root = "g (float[N,4] x) => (float[N,4] y) { y = Sqrt(x) }"
    feeds: list[Feeds] = [{"x": np.array([[-1, 4, 9, 16]], np.float32) * n} for n in (1, 2)]
    assert verified(tmp_path, root, root, feeds).ok
    cut = "g (float[N,4] x) => (float[N,4] y) { r = Relu(x) y = Sqrt(r) }"
    assert "lost the reference's NaN" in str(verified(tmp_path, root, cut, feeds).reason)


def test_sets_on_which_the_original_fails_are_left_out(tmp_path: Path) -> None:
    graph = """g (float[5] x, int64[1] i) => (float[1] y) {
        y = Gather(x, i)
    }"""
    path = write(tmp_path, graph)
    x = np.arange(5, dtype=np.float32)
    feeds: list[Feeds] = [{"x": x, "i": np.array([i])} for i in (7, 2, 3)]
    reference = Reference.of(path, CPU, feeds)
    assert [int(np.asarray(feed["i"])[0]) for feed in reference.feeds] == [2, 3]
    assert "input set 0" in reference.dropped[0]
    assert "out of" in reference.dropped[0]
    with pytest.raises(UntestableError, match=r"cannot be tested: .*Gather"):
        Reference.of(path, CPU, feeds[:1])
    with pytest.raises(UntestableError, match="no input sets"):
        Reference.of(path, CPU, [])


def test_a_model_without_kernels_is_untestable(tmp_path: Path) -> None:
    graph = "g (bfloat16[3] x) => (bfloat16[3] y) { y = Add(x, x) }"
    with pytest.raises(MissingKernelError) as caught:
        Reference.of(write(tmp_path, graph), CPU, [{"x": np.zeros(3, np.float32)}])
    assert isinstance(caught.value, UntestableError)


def test_an_invalid_original_is_an_error_and_an_invalid_candidate_a_verdict(tmp_path: Path) -> None:
    good = write(tmp_path, scaled(1.5), name="good")
    bad = write(tmp_path, "g (float[N,4] x) => (float[N,4] y) { [odd] y = Foo(x) }", name="bad")
    unsupported = write(
        tmp_path, "g (float[N,4] x) => (float[N,4] y) { [odd] y = Foo(x) }", name="none", opset=99
    )
    feeds = inputs(good)
    with pytest.raises(InvalidModelError, match="node 'odd'"):
        Reference.of(bad, CPU, feeds)
    for candidate in (bad, unsupported, tmp_path / "missing.onnx"):
        result = Reference.of(good, CPU, feeds).verify(candidate)
        assert (result.ok, result.required_tolerance) == (False, math.inf)
        assert str(result.reason).startswith("it does not load: ")


def test_a_candidate_that_fails_to_run_is_a_verdict(tmp_path: Path) -> None:
    candidate = """g (float[N,4] x) => (float[N,4] y) {
        i = Constant <value_ints = [0, 1, 2, 9]> ()
        y = Gather <axis = 1> (x, i)
    }"""
    result = verified(tmp_path, scaled(1.5), candidate)
    assert not result.ok
    assert "fails on input set 0" in str(result.reason)


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        ("g (float[N,4] z) => (float[N,4] y) { y = Relu(z) }", "input 'x' is missing"),
        ("g (float[N,4] x, float[1] z) => (float[N,4] y) { y = Add(x, z) }", "input 'z' is new"),
        ("g (float[N,4] x) => (float[N,4] q) { q = Relu(x) }", "output 'y' is missing"),
        (
            "g (float[N,4] x) => (float[N,4] y, float[N,4] q) { y = Relu(x) q = Abs(x) }",
            "output 'q' is new",
        ),
        (
            "g (float[N,4] x) => (float16[N,4] y) { y = Cast <to = 10> (x) }",
            "output 'y' has type tensor(float16) instead of tensor(float)",
        ),
        (
            "g (float[M,4] x) => (float[M,4] y) { y = Relu(x) }",
            "input 'x' has shape [M, 4] instead of [N, 4]",
        ),
        (
            "g (float[1,4] x) => (float[1,4] y) { y = Relu(x) }",
            "input 'x' has shape [1, 4] instead of [N, 4]",
        ),
    ],
)
def test_another_interface_is_refused_in_words(tmp_path: Path, candidate: str, reason: str) -> None:
    result = verified(tmp_path, "g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }", candidate)
    assert (result.ok, result.reason) == (False, reason)


def test_outputs_must_keep_their_order(tmp_path: Path) -> None:
    body = "{ a = Relu(x) b = Abs(x) }"
    result = verified(
        tmp_path,
        f"g (float[2] x) => (float[2] a, float[2] b) {body}",
        f"g (float[2] x) => (float[2] b, float[2] a) {body}",
    )
    assert result.reason == "the outputs are in another order: b, a"


def test_integer_outputs_must_be_equal(tmp_path: Path) -> None:
    def model(axis: int) -> str:
        return f"""g (float[N,4] x) => (int64[N,4] y, float[N,4] z) {{
            b = Constant <value_float = {axis}.0> ()
            s = Mul(x, b)
            r = Floor(s)
            y = Cast <to = 7> (r)
            z = Identity(x)
        }}"""

    assert verified(tmp_path, model(10), model(10)).ok
    result = verified(tmp_path, model(10), model(11), max_error=100.0)
    assert not result.ok
    assert "values are unequal" in str(result.reason)
    assert (result.tolerance, result.required_tolerance) == (0.0, math.inf)


def test_the_worst_output_by_its_own_tolerance_is_reported(tmp_path: Path) -> None:
    def model(half: float, single: float) -> str:
        return f"""g (float[N,4] x) => (float16[N,4] b, float[N,4] a) {{
            h = Constant <value_float = {half}> ()
            s = Constant <value_float = {single}> ()
            a = Mul(x, s)
            m = Mul(x, h)
            b = Cast <to = 10> (m)
        }}"""

    result = verified(tmp_path, model(1.0, 1.0), model(1.002, 1.0001))
    assert result.reason is not None
    assert result.reason.startswith("output 'a'")
    assert result.tolerance == rounding_floor("float", 1)
    assert result.max_relative == pytest.approx(1e-4, rel=0.01)
    assert result.required_tolerance == pytest.approx(2e-3, rel=0.3)


def test_a_constant_output_is_untested_but_must_still_agree(tmp_path: Path) -> None:
    def model(value: float) -> str:
        return f"""g (float[N,4] x) => (float[N,4] y, float[N,4] z) {{
            k = Constant <value_float = {value}> ()
            n = Abs(x)
            m = Neg(n)
            o = Relu(m)
            y = Add(o, k)
            z = Relu(x)
        }}"""

    same = verified(tmp_path, model(1.0), model(1.0))
    assert [(o.name, o.tested, o.why) for o in same.outputs] == [
        ("y", False, "constant output"),
        ("z", True, None),
    ]
    assert (same.ok, same.tested) == (True, True)
    other = verified(tmp_path, model(1.0), model(2.0))
    assert str(other.reason).startswith("output 'y' deviates")


def test_one_set_shows_a_constant_output_by_its_values(tmp_path: Path) -> None:
    graph = "g (float[N,4] x) => (float[N,4] y) { a = Abs(x) n = Neg(a) y = Relu(n) }"
    feeds: list[Feeds] = [{"x": np.ones((1, 4), np.float32)}]
    result = verified(tmp_path, graph, graph, feeds)
    assert (result.ok, result.tested, result.outputs[0].why) == (True, False, "constant output")
    varied: list[Feeds] = [{"x": np.arange(4, dtype=np.float32)[None]}]
    assert verified(tmp_path, scaled(1.5), scaled(1.5), varied).tested


def test_a_model_without_inputs_is_tested_by_its_one_value(tmp_path: Path) -> None:
    def model(value: int) -> str:
        return f"g () => (float[2] y) {{ y = Constant <value_floats = [1.0, {value}.0]> () }}"

    assert verified(tmp_path, model(2), model(2)).tested
    assert not verified(tmp_path, model(2), model(3)).ok


def test_an_empty_output_is_untested(tmp_path: Path) -> None:
    graph = """g (float[N,4] x) => (float[M,4] y) {
        i = Constant <value_ints = [0]> ()
        y = Slice(x, i, i)
    }"""
    result = verified(tmp_path, graph, graph)
    assert (result.ok, result.outputs[0].why) == (True, "empty output")


def test_an_output_without_a_finite_value_is_untested(tmp_path: Path) -> None:
    graph = "g (float[N,4] x) => (float[N,4] y) { a = Abs(x) n = Neg(a) y = Log(n) }"
    feeds: list[Feeds] = [{"x": np.ones((n, 4), np.float32)} for n in (1, 2)]
    result = verified(tmp_path, graph, graph, feeds)
    assert (result.ok, result.outputs[0].why) == (True, "no finite value")


@pytest.mark.parametrize("seed", ["", "<shape = [4], seed = 3.0>"])
def test_a_random_output_is_untested(tmp_path: Path, seed: str) -> None:
    attributes = seed or "<shape = [4]>"
    graph = f"""g (float[N,4] x) => (float[N,4] y, float[N,4] z) {{
        r = RandomNormal {attributes} ()
        y = Add(x, r)
        z = Relu(x)
    }}"""
    same = verified(tmp_path, graph, graph)
    assert [(o.name, o.why) for o in same.outputs] == [("y", "random output"), ("z", None)]
    assert same.ok
    nan = graph.replace(
        "y = Add(x, r)", "s = Add(x, r) n = Neg(s) q = Abs(n) m = Neg(q) y = Log(m)"
    )
    assert "'y': it has NaN or infinity" in str(verified(tmp_path, graph, nan).reason)


CHAOS = "b = Constant <value_float = 1e9> () m = Mul(p, b) t = Sin(m) g = Sign(t) "


def test_an_output_that_optimizing_the_original_moves_is_untested(tmp_path: Path) -> None:
    path = conv_model(tmp_path, "original", head=CHAOS + "y = Identity(g)")
    reference = Reference.of(path, CPU, inputs(path))
    same = reference.verify(path)
    assert (same.ok, same.tested) == (True, False)
    assert same.outputs[0].why == "optimizing the original moves it by 2.0e+00"
    nan = conv_model(tmp_path, "nan", head="n = Neg(p) y = Log(n)")
    assert "NaN or infinity where the original has none" in str(reference.verify(nan).reason)


def test_integers_that_optimizing_the_original_changes_are_untested(tmp_path: Path) -> None:
    head = CHAOS + "y = Cast <to = 7> (g)"
    path = conv_model(tmp_path, "original", head=head, output="int64")
    result = Reference.of(path, CPU, inputs(path)).verify(path)
    assert (result.ok, result.tested) == (True, False)
    assert "values are unequal" in str(result.outputs[0].why)


def test_the_tolerance_is_four_times_what_optimizing_the_original_moves(tmp_path: Path) -> None:
    head = "b = Constant <value_float = 300.0> () m = Mul(p, b) y = Sin(m)"
    path = conv_model(tmp_path, "original", head=head)
    result = Reference.of(path, CPU, inputs(path)).verify(path)
    assert result.ok
    assert result.max_relative > rounding_floor("float", 1)
    assert result.tolerance == 4 * result.max_relative


def test_an_ill_conditioned_set_does_not_loosen_the_others(tmp_path: Path) -> None:
    # The sine of a large argument blows its rounding up; that of a small one does not.
    head = "b = Constant <value_float = 1e6> () m = Mul(p, b) y = Sin(m)"
    path = conv_model(tmp_path, "original", head=head)
    x = np.random.default_rng(1).standard_normal((1, 16, 12, 12)).astype(np.float32)
    small: Feeds = {"x": x * np.float32(1e-6)}
    large: Feeds = {"x": x}
    assert not Reference.of(path, CPU, [large]).verify(path).tested
    reference = Reference.of(path, CPU, [large, small])
    assert reference.tolerances["y"] < 1e-4
    assert reference.verify(path).tested


def test_sequences_are_verified(tmp_path: Path) -> None:
    def model(op: str) -> str:
        return f"""g (float[2,4] x) => (seq(float[1,4]) s) {{
            r = {op}(x)
            s = SplitToSequence <axis = 0> (r)
        }}"""

    assert verified(tmp_path, model("Relu"), model("Relu")).ok
    result = verified(tmp_path, model("Relu"), model("Abs"))
    assert not result.ok
    assert result.outputs[0].max_relative > 0.01


def test_maps_are_verified(tmp_path: Path) -> None:
    path = tmp_path / "map.onnx"
    helper, proto = onnx.helper, onnx.TensorProto
    scalar = helper.make_tensor_type_proto(proto.FLOAT, [])
    maps = helper.make_sequence_type_proto(helper.make_map_type_proto(proto.INT64, scalar))
    zip_map = helper.make_node(
        "ZipMap", ["x"], ["z"], domain="ai.onnx.ml", classlabels_int64s=[0, 1, 2]
    )
    graph = helper.make_graph(
        [zip_map],
        "g",
        [helper.make_tensor_value_info("x", proto.FLOAT, ["N", 3])],
        [helper.make_value_info("z", maps)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    reference = Reference.of(path, CPU, inputs(path))
    assert reference.tolerances["z"] == rounding_floor("float", 1)
    assert reference.verify(path).tested


def test_feeds_that_do_not_fit_are_usage_errors(tmp_path: Path) -> None:
    path = write(tmp_path, scaled(1.5))
    with pytest.raises(UsageError, match="lacks 'x'"):
        Reference.of(path, CPU, [{}])


def test_a_verdict_survives_json(tmp_path: Path) -> None:
    for factor in (2.0, 2.5):
        found = verified(tmp_path, scaled(2.0), scaled(factor))
        assert found.ok is (factor == 2.0)
        assert Verification.from_json(json.loads(json.dumps(found.to_json()))) == found
    refused = verified(tmp_path, scaled(2.0), scaled(2.0, "double"))
    assert refused.outputs == ()
    assert Verification.from_json(json.loads(json.dumps(refused.to_json()))) == refused
