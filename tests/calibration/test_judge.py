from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pwopt.calibration import (
    Judge,
    Metric,
    Preprocess,
    Samples,
    choose_metric,
    hold_out,
    load_samples,
    parse_metric,
)
from pwopt.calibration.metrics import Agreement, Cosine, Psnr, RelativeError, Top1, Top5
from pwopt.errors import UsageError, VerificationError
from pwopt.runtime import TensorSpec
from pwopt.target import Target
from tests.calibration.data import image_spec, spec, write_classes

Array = npt.NDArray[Any]
TARGET = Target(threads=1)


def scaling(path: Path, factors: Array, shape: tuple[int | str, ...] = ("N", 4)) -> Path:
    """A model whose output is its input times *factors*."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["input", "factors"], ["logits"])],
        "scaling",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(factors.astype(np.float32), "factors")],
    )
    opsets = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opsets), str(path))
    return path


def samples_of(**arrays: Any) -> Samples:
    width = np.asarray(arrays["input"]).shape[1:]
    return load_samples([arrays], [spec("input", "N", *width)])


def one_hot(labels: Array, classes: int = 4) -> Array:
    return np.eye(classes, dtype=np.float32)[labels]


@pytest.fixture
def same(tmp_path: Path) -> Path:
    return scaling(tmp_path / "same.onnx", np.ones(4))


@pytest.fixture
def blind(tmp_path: Path) -> Path:
    """Never finds class 3."""
    return scaling(tmp_path / "blind.onnx", np.array([1, 1, 1, -1]))


# -- the judgement ---------------------------------------------------------------------------------


def test_the_drop_is_paired_and_has_an_interval(same: Path, blind: Path) -> None:
    labels = np.arange(80) % 4
    seen = one_hot(np.where(np.arange(80) < 8, (labels + 1) % 4, labels))
    judge = Judge.of(same, samples_of(input=seen, labels=labels), TARGET)
    figures = judge.figures(blind)
    assert (figures.metric, figures.unit, figures.samples) == ("top1", "%", 80)
    assert figures.baseline == 90
    # Of the 72 that are found, the 18 of class 3 are lost; a sample wrong before stays wrong.
    assert figures.optimized == 67.5
    assert figures.drop == 22.5
    low, high = figures.ci95
    assert 10 < low < 22.5 < high < 35
    assert figures.also["agreement"][0] == 100
    assert figures.also["agreement"][1] == 75
    assert figures.exceeds(22)
    assert not figures.exceeds(22.5)


def test_the_original_loses_nothing(same: Path) -> None:
    labels = np.arange(12) % 4
    figures = Judge.of(same, samples_of(input=one_hot(labels), labels=labels), TARGET).figures(same)
    assert [figures.baseline, figures.optimized, figures.drop] == [100, 100, 0]
    assert figures.ci95 == (0.0, 0.0)
    assert figures.also == {"agreement": (100, 100), "relative-error": (0, 0), "cosine": (1, 1)}


def test_the_interval_follows_the_seed(same: Path, blind: Path) -> None:
    labels = np.arange(40) % 4
    samples = samples_of(input=one_hot(labels), labels=labels)
    first, again, other = (
        Judge.of(same, samples, TARGET, seed=seed).figures(blind).ci95 for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_fixed_batch_does_not_count_what_fills_it_up(tmp_path: Path) -> None:
    model = scaling(tmp_path / "fixed.onnx", np.ones(4), (4, 4))
    labels = np.array([0, 1, 2, 3, 1])
    seen = one_hot(np.array([0, 1, 2, 3, 0]))
    samples = load_samples([{"input": seen, "labels": labels}], [spec("input", 4, 4)])
    figures = Judge.of(model, samples, TARGET).figures(model)
    assert (figures.samples, figures.baseline) == (5, 80)


def test_without_labels_what_counts_is_agreement(same: Path, blind: Path) -> None:
    samples = samples_of(input=one_hot(np.arange(8) % 4))
    figures = Judge.of(same, samples, TARGET).figures(blind)
    assert figures.metric == "agreement"
    assert [figures.baseline, figures.optimized] == [100, 75]
    assert figures.drop == 25
    assert figures.also["relative-error"] == (0.0, 50.0)
    assert figures.also["cosine"] == (1.0, 0.5)


def test_progress_counts_samples(same: Path) -> None:
    told: list[tuple[int, int]] = []
    samples = samples_of(input=one_hot(np.arange(40) % 4))
    Judge.of(same, samples, TARGET, progress=lambda done, of: told.append((done, of)))
    assert told == [(16, 40), (32, 40), (40, 40)]


def test_a_candidate_that_gives_nan_is_refused(same: Path, tmp_path: Path) -> None:
    broken = scaling(tmp_path / "broken.onnx", np.array([1, np.nan, 1, 1]))
    judge = Judge.of(same, samples_of(input=one_hot(np.arange(8) % 4)), TARGET)
    with pytest.raises(VerificationError, match=r"broken.onnx gives NaN or infinity"):
        judge.figures(broken)


def test_a_candidate_with_other_outputs_is_refused(same: Path, tmp_path: Path) -> None:
    other = scaling(tmp_path / "other.onnx", np.ones((2, 1, 4)), ("N", 4))
    judge = Judge.of(same, samples_of(input=one_hot(np.arange(8) % 4)), TARGET)
    with pytest.raises((VerificationError, UsageError), match="logits"):
        judge.figures(other)


# -- data that do not fit --------------------------------------------------------------------------


def test_one_sample_is_too_few(same: Path) -> None:
    with pytest.raises(UsageError, match="One sample says nothing"):
        Judge.of(same, samples_of(input=one_hot(np.array([1]))), TARGET)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1, 2, 7], "go from 0 to 7, but output 'logits' has 4 classes .0 to 3.; check which"),
        ([1, 2, 3, 4], "go from 1 to 4, .* counted from 1, set label_offset=-1"),
        ([-1, 0, 1, 2], "go from -1 to 2, .* counted from -1, set label_offset=1"),
    ],
)
def test_labels_out_of_range(same: Path, labels: list[int], says: str) -> None:
    seen = one_hot(np.array(labels) % 4)
    with pytest.raises(UsageError, match=says):
        Judge.of(same, samples_of(input=seen, labels=np.array(labels)), TARGET)


def test_labels_of_another_count_are_noticed(same: Path) -> None:
    labels = np.arange(30) % 3
    samples = samples_of(input=one_hot(labels + 1), labels=labels)
    with pytest.raises(UsageError, match=r"finds 0% of the labels, and 100% of them moved by \+1"):
        Judge.of(same, samples, TARGET)


def classes(tmp_path: Path, count: int, preprocess: Preprocess) -> Samples:
    write_classes(tmp_path / "images", {f"class{i}": 1 for i in range(count)})
    return load_samples(tmp_path / "images", [image_spec()], preprocess)


@pytest.mark.parametrize(
    ("folders", "offset", "says"),
    [
        (4, 0, None),
        (3, 1, None),
        (3, 0, "There are 3 class folders, but 'logits' has 4 classes; .*set label_offset=1"),
        (2, 0, "There are 2 class folders.*name the folders by the numbers of their classes"),
    ],
)
def test_class_folders_must_be_all_classes(
    tmp_path: Path, folders: int, offset: int, says: str | None
) -> None:
    samples = classes(tmp_path, folders, Preprocess(label_offset=offset))
    if says is None:
        Top1().check(samples, [spec("logits", "N", 4)])
        return
    with pytest.raises(UsageError, match=says):
        Top1().check(samples, [spec("logits", "N", 4)])


def test_too_few_samples_for_a_budget(same: Path) -> None:
    labels = np.arange(40) % 4
    judge = Judge.of(same, samples_of(input=one_hot(labels), labels=labels), TARGET)
    judge.assert_resolves(2.5)
    with pytest.raises(UsageError, match=r"one of them is 2.5 points of top1, .* at least 100"):
        judge.assert_resolves(1.0)


# -- metrics ---------------------------------------------------------------------------------------


def judged(metric: Metric, found: Array, original: Array | None = None, **truth: Any) -> Array:
    """Scores of some outputs."""
    samples = samples_of(input=np.zeros((len(found), 1)), **truth)
    (batch,) = samples.stream(len(found))
    reference = found if original is None else original
    return metric.scores({"out": found}, batch, {"out": reference})


def test_the_k_highest_scores() -> None:
    scores = np.array([[9, 8, 7, 6, 5, 4, 3.0]] * 7)
    labels = np.arange(7)
    assert judged(Top1(), scores, labels=labels).tolist() == [100] + [0] * 6
    assert judged(Top5(), scores, labels=labels).tolist() == [100] * 5 + [0] * 2


def test_equal_scores_do_not_count_for_every_class() -> None:
    flat = np.ones((7, 7))
    assert judged(Top1(), flat, labels=np.arange(7)).sum() == 100
    assert judged(Top5(), flat, labels=np.arange(7)).sum() == 500
    nothing = np.full((1, 7), np.nan)
    assert judged(Top1(), nothing, labels=np.array([0])).tolist() == [0]


def test_class_scores_may_have_axes_of_one() -> None:
    scores = one_hot(np.array([2, 1]))[:, :, None, None]
    assert judged(Top1(), scores, labels=np.array([2, 2])).tolist() == [100, 0]


def images(value: float, side: int = 6) -> Array:
    return np.full((2, 1, side, side), value, np.float32)


def test_psnr_against_targets_is_the_mean_over_images() -> None:
    found = images(0.5)
    found[1] = 0.6
    scores = judged(Psnr(), found, targets=images(0.5))
    np.testing.assert_allclose(scores, [100, 20], atol=1e-4)


def test_psnr_has_a_peak_and_clips() -> None:
    np.testing.assert_allclose(
        judged(Psnr(peak=255), images(300), targets=images(255)), [100, 100], atol=1e-6
    )
    with pytest.raises(UsageError, match="reach 255, so their peak is not 1; say"):
        judged(Psnr(), images(254), targets=images(255))


def test_psnr_leaves_a_border_out() -> None:
    found = images(0.5)
    found[:, :, 0] = 0
    found[:, :, :, -1] = 1
    assert judged(Psnr(), found, targets=images(0.5)).max() < 20
    assert judged(Psnr(border=1), found, targets=images(0.5)).min() == 100
    with pytest.raises(UsageError, match="border of 3 leaves nothing"):
        judged(Psnr(border=3), found, targets=images(0.5))


def test_psnr_against_the_originals_own_output_has_no_baseline(tmp_path: Path) -> None:
    shape = ("N", 1, 6, 6)
    original = scaling(tmp_path / "a.onnx", np.ones(1), shape)
    candidate = scaling(tmp_path / "b.onnx", np.full(1, 0.9), shape)
    samples = samples_of(input=images(1.0))
    figures = Judge.of(original, samples, TARGET, metric=Psnr()).figures(candidate)
    assert (figures.baseline, figures.drop) == (None, None)
    assert figures.optimized == pytest.approx(20, abs=1e-4)
    assert figures.ci95 == pytest.approx((20, 20), abs=1e-4)
    with pytest.raises(UsageError, match="no baseline to drop from; give targets"):
        figures.exceeds(1)


def test_psnr_needs_targets_of_the_same_size() -> None:
    with pytest.raises(UsageError, match=r"targets have shape 2x1x5x5, but output 'out' has 2x1x6"):
        judged(Psnr(), images(0.5), targets=images(0.5, side=5))


def test_the_output_that_deviates_most_counts() -> None:
    (batch,) = samples_of(input=np.zeros((1, 1))).stream(1)
    original = {"a": np.array([[3.0, 4.0]]), "b": np.array([[1.0]]), "n": np.array([[1]])}
    found = {"a": np.array([[3.0, 4.5]]), "b": np.array([[1.5]]), "n": np.array([[9]])}
    assert RelativeError().scores(found, batch, original).tolist() == [50]


def test_infinities_of_the_original_are_no_deviation() -> None:
    (batch,) = samples_of(input=np.zeros((1, 1))).stream(1)
    original = {"a": np.array([[3.0, 4.0, -np.inf, np.nan]])}
    found = {"a": np.array([[3.0, 4.5, -np.inf, np.nan]])}
    assert RelativeError().scores(found, batch, original).tolist() == [10]
    assert np.isfinite(Cosine().scores(found, batch, original)).all()
    with np.errstate(invalid="ignore"):
        other = RelativeError().scores({"a": np.array([[3.0, 4.5, 1.0, 1.0]])}, batch, original)
    assert not np.isfinite(other).any()


@pytest.mark.parametrize(
    ("known", "outputs", "wanted"),
    [
        ({"labels": np.array([1, 2])}, [spec("y", "N", 10)], Top1),
        ({}, [spec("y", "N", 10, 1, 1)], Agreement),
        ({}, [spec("y", "N", "C")], Agreement),
        ({}, [spec("y", "N", 3, 8, 8)], RelativeError),
        ({"targets": np.zeros((2, 3, 8, 8))}, [spec("y", "N", 3, 8, 8)], Psnr),
        ({"labels": np.array([1, 2])}, [spec("y", "N", 3, 8, 8)], RelativeError),
        ({}, [spec("y", "N", 1)], RelativeError),
    ],
)
def test_the_metric_follows_data_and_model(
    known: dict[str, Array], outputs: list[TensorSpec], wanted: type
) -> None:
    assert isinstance(choose_metric(samples_of(input=np.zeros((2, 1)), **known), outputs), wanted)


@pytest.mark.parametrize(
    ("metric", "outputs", "says"),
    [
        ("top1", [spec("y", "N", 4)], "top1 needs labels"),
        ("agreement", [spec("y", "N", 4, 4, 4)], "agreement needs an output of shape NxCLASSES"),
        ("psnr", [spec("y", "N", 4)], "psnr needs one output with four axes"),
        ("relative-error", [spec("y", "N", 4, dtype="int64")], "no float output"),
    ],
)
def test_a_metric_says_what_it_needs(metric: str, outputs: list[TensorSpec], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_metric(metric).check(samples_of(input=np.zeros((2, 1))), outputs)


def test_metrics_are_parsed() -> None:
    assert parse_metric("top5") == Top5()
    assert parse_metric("psnr:border=2,peak=255") == Psnr(border=2, peak=255)
    assert parse_metric("top1:output=logits") == Top1(output="logits")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("map50", "choose from top1, top5, psnr, agreement, relative-error, cosine, or name a mod"),
        ("psnr:edge=2", r"there is no option 'edge' \(known: border, peak, output\)"),
        ("psnr:border=two", "border cannot be 'two'"),
        ("psnr:border=-1", "border cannot be below 0"),
        ("cosine:output=x", r"no option 'output' \(known: none\)"),
        ("no_such_module_here:score", "cannot be imported: No module named"),
        ("no_such_file.py:score", "cannot be imported: .*No such file"),
        ("json:no_such_function", "cannot be imported: .*no attribute"),
        ("json:__name__", "is no function"),
    ],
)
def test_metrics_that_cannot_be_parsed(given: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_metric(given)


def test_a_function_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: Path, blind: Path
) -> None:
    (tmp_path / "my_scores.py").write_text(
        "import numpy as np\n"
        "def miss(outputs, batch):\n"
        "    return (outputs['logits'].argmax(1) != batch.labels).astype(float)\n"
        "miss.higher_is_better = False\n"
        "miss.unit = 'misses'\n"
        "def scalar(outputs, batch):\n"
        "    return 1.0\n"
        "def broken(outputs, batch):\n"
        "    return outputs['nothing']\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    labels = np.arange(8) % 4
    samples = samples_of(input=one_hot(labels), labels=labels)
    metric = parse_metric("my_scores:miss")
    assert sys.path == path
    assert callable(parse_metric(f"{tmp_path}/my_scores.py:miss").function)  # type: ignore[attr-defined]
    figures = Judge.of(same, samples, TARGET, metric=metric).figures(blind)
    assert (figures.metric, figures.unit) == ("my_scores:miss", "misses")
    assert [figures.baseline, figures.optimized, figures.drop] == [0, 0.25, 0.25]
    assert figures.also["top1"] == (100.0, 75.0)
    for name, says in (
        ("scalar", r"must return 8 finite scores, one per sample; it returned shape of a scalar"),
        ("broken", "failed: KeyError: 'nothing'"),
    ):
        with pytest.raises(UsageError, match=says):
            Judge.of(same, samples, TARGET, metric=parse_metric(f"my_scores:{name}"))


# -- holding out -----------------------------------------------------------------------------------


def test_a_half_is_held_out() -> None:
    samples = samples_of(input=np.zeros((10, 1)), labels=np.repeat([0, 1], 5))
    parts = hold_out(samples, None, np.random.default_rng(0))
    assert parts.calibration is not None
    assert parts.drawn
    assert (len(parts.calibration), len(parts.validation)) == (5, 5)
    assert not set(parts.calibration.indices) & set(parts.validation.indices)


def test_samples_to_judge_on_are_taken_as_given() -> None:
    first, second = samples_of(input=np.zeros((4, 1))), samples_of(input=np.ones((4, 1)))
    parts = hold_out(first, second, np.random.default_rng(0))
    assert (parts.calibration, parts.validation, parts.drawn) == (first, second, False)
    assert hold_out(None, second, np.random.default_rng(0)).validation is second


def test_samples_to_judge_on_must_not_be_calibrated_with() -> None:
    first = samples_of(input=np.arange(4.0)[:, None])
    second = samples_of(input=np.arange(2, 6.0)[:, None])
    with pytest.raises(UsageError, match="2 of the 4 samples to judge on are calibrated with"):
        hold_out(first, second, np.random.default_rng(0))


def test_there_must_be_enough_to_hold_out() -> None:
    with pytest.raises(UsageError, match="nothing to judge accuracy on"):
        hold_out(None, None, np.random.default_rng(0))
    with pytest.raises(UsageError, match="3 samples are too few to hold some out"):
        hold_out(samples_of(input=np.zeros((3, 1))), None, np.random.default_rng(0))


def test_where_something_is_chosen_the_samples_to_judge_on_are_two_parts() -> None:
    x, labels = np.arange(40.0)[:, None], np.repeat([0, 1], 20)
    samples = samples_of(input=x, labels=labels)
    parts = hold_out(samples, None, np.random.default_rng(0), chooses=True)
    assert parts.calibration is not None
    assert parts.selection is not None
    three = [parts.calibration, parts.selection, parts.validation]
    assert [len(part) for part in three] == [20, 10, 10]
    assert sorted(np.concatenate([part.indices for part in three])) == list(range(40))
    for part in three:
        assert part.labels is not None
        assert abs(int((part.labels == 0).sum()) - len(part) // 2) <= 1
    # What is fitted to does not depend on it.
    alone = hold_out(samples, None, np.random.default_rng(0))
    assert alone.selection is None
    assert alone.calibration is not None
    assert list(alone.calibration.indices) == list(parts.calibration.indices)


def test_there_must_be_enough_to_choose_on() -> None:
    first, second = samples_of(input=np.zeros((4, 1))), samples_of(input=np.ones((3, 1)))
    with pytest.raises(UsageError, match=r"3 samples to judge on are too few.*--validation"):
        hold_out(first, second, np.random.default_rng(0), chooses=True)
    with pytest.raises(UsageError, match=r"2 samples to judge on are too few.*--calibration"):
        hold_out(first, None, np.random.default_rng(0), chooses=True)
