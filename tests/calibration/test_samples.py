from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from pwopt.calibration import Preprocess, Samples, load_samples
from pwopt.calibration.folder import Folder
from pwopt.errors import UsageError
from pwopt.runtime import TensorSpec
from tests.calibration.data import image_spec, spec, write_classes, write_image

Array = npt.NDArray[Any]


def gathered(samples: Samples, name: str = "input", size: int = 3) -> Array:
    """All samples in one array."""
    return np.concatenate([np.asarray(b.feeds[name])[: b.size] for b in samples.stream(size)])


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    write_classes(folder, {"cat": 2, "ant": 3, "bee": 4})
    return folder


# -- folders ---------------------------------------------------------------------------------------


def test_sub_folders_are_classes_in_alphabetical_order(classes: Path) -> None:
    samples = load_samples(classes, [image_spec()])
    assert len(samples) == 9
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert samples.classes == ("ant", "bee", "cat")
    images = gathered(samples)
    assert images.shape == (9, 3, 8, 8)
    assert images.dtype == np.float32
    assert images[:, 0, 0, 0].tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0]


def test_sub_folders_named_by_number_are_these_classes(tmp_path: Path) -> None:
    write_classes(tmp_path, {"2": 1, "10": 1, "1": 1})
    samples = load_samples(tmp_path, [image_spec()])
    assert samples.labels is not None
    assert sorted(samples.labels.tolist()) == [1, 2, 10]
    assert gathered(samples)[samples.labels.tolist().index(10), 0, 0, 0] == 1
    assert samples.classes is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "file,class\n0/000.png,7\n1/001.png,3\n"),
        ("labels.csv", "class,file\n7,0/000.png\n3,1/001.png\n"),
        ("labels.csv", "0/000.png,7\n1/001.png,3\n"),
        ("y_labels.csv", "0/000.png,12,7\n1/001.png,12,3\n"),
        ("val.csv", "\ufefffilename,split,label\n0/000.png,val,7\n\n1/001.png,val,3\n"),
    ],
)
def test_tables_of_labels(tmp_path: Path, name: str, text: str) -> None:
    write_classes(tmp_path, {"0": 2, "1": 2})
    (tmp_path / name).write_text(text, encoding="utf-8")
    samples = load_samples(tmp_path, [image_spec()])
    assert samples.labels is not None
    assert samples.labels.tolist() == [7, 3]
    assert gathered(samples)[:, :2, 0, 0].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("file,class\nnone.png,1\n", "names none.png, which does not exist"),
        ("file,class\n0/000.png,dog\n", "is not of the form file,class with a whole number"),
        ("file,class\n0/000.png\n", "is not of the form"),
        ("a,b\n0/000.png,1\n", "its columns are a, b; name them file and class"),
        ("", "holds no images"),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, text: str, says: str) -> None:
    write_classes(tmp_path, {"0": 1})
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UsageError) as error:
        load_samples(tmp_path, [image_spec()])
    assert says in str(error.value)


def test_images_alone_have_no_labels(tmp_path: Path) -> None:
    write_classes(tmp_path, {"": 3})
    samples = load_samples(tmp_path, [image_spec()])
    assert (len(samples), samples.labels, samples.has_targets) == (3, None, False)


def test_a_mixed_folder_is_ambiguous(classes: Path) -> None:
    write_image(classes / "stray.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UsageError, match="both in class folders and beside them, such as stray"):
        load_samples(classes, [image_spec()])


def test_two_tables_are_ambiguous(classes: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (classes / name).write_text("")
    with pytest.raises(UsageError, match=r"holds a.csv, b.csv; rename"):
        load_samples(classes, [image_spec()])


def test_an_image_that_cannot_be_decoded_is_named(classes: Path) -> None:
    (classes / "ant" / "001.png").write_bytes(b"no image")
    samples = load_samples(classes, [image_spec()])
    with pytest.raises(UsageError, match=r"001.png: is no image that can be read; remove it"):
        gathered(samples)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    write_image(tmp_path / "cut.png", noise)
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"cut.png: cannot be decoded"):
        gathered(load_samples(tmp_path, [image_spec("N", 3, 64, 64)]))


def test_deep_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UsageError, match="not of 8 bits"):
        gathered(load_samples(tmp_path, [image_spec()]))


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([spec("a", 1, 3, 8, 8), spec("b", 1, 3, 8, 8)], "images feed a model with one input"),
        ([spec("a", 1, 8)], "images need four axes"),
        ([spec("a", 1, 5, 8, 8)], "5 channels in layout nchw; images have 1 or 3"),
        ([spec("a", 1, 3, 8, 8, dtype="bool")], "no image's"),
        ([spec("a", 1, 3, 9, 7)], "is 8x8, but the input is 9x7; add crop=9x7 or resize=9x7"),
    ],
)
def test_models_that_take_no_such_images(
    classes: Path, inputs: list[TensorSpec], says: str
) -> None:
    with pytest.raises(UsageError) as error:
        gathered(load_samples(classes, inputs), "a")
    assert says in str(error.value)


def test_integers_take_no_scaled_pixels(classes: Path) -> None:
    quantized = [image_spec("N", 3, 8, 8, dtype="uint8")]
    assert gathered(load_samples(classes, quantized)).dtype == np.uint8
    with pytest.raises(UsageError, match="takes uint8; scale, mean and std are for floats"):
        load_samples(classes, quantized, Preprocess.parse("torch"))


def test_resize_then_crop_then_channels_then_values_then_layout(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 20:] = (10, 20, 30)
    write_image(tmp_path / "a.png", pixels)
    steps = Preprocess.parse("resize=10,crop=4x6,colour=bgr,scale=2,mean=1:2:3")
    (image,) = gathered(load_samples(tmp_path, [image_spec("N", 4, 6, 3)], steps))
    assert image.shape == (4, 6, 3)
    assert image[0, 0].tolist() == [-1, -2, -3]
    assert image[0, 5].tolist() == [59, 38, 17]


@pytest.mark.parametrize(
    ("shape", "size", "crop", "wanted"),
    [("10", (20, 41), None, (10, 20)), ("10", (41, 20), None, (20, 10)), ("7x9", (5, 5), 7, None)],
)
def test_sizes(
    tmp_path: Path, shape: str, size: tuple[int, int], crop: int | None, wanted: Any
) -> None:
    write_image(tmp_path / "a.png", np.zeros((*size, 3), np.uint8))
    steps = Preprocess.parse(f"resize={shape}" + ("" if crop is None else f",crop={crop}"))
    found = gathered(load_samples(tmp_path, [image_spec("N", 3, "H", "W")], steps))
    assert found.shape[2:] == (wanted or (7, 7))


def test_a_crop_larger_than_the_image_is_refused(classes: Path) -> None:
    samples = load_samples(classes, [image_spec()], Preprocess.parse("crop=9"))
    with pytest.raises(UsageError, match="is 8x8, smaller than crop=9x9; put resize=9 before it"):
        gathered(samples)


def test_grey_and_colour_follow_the_model(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.full((8, 8), 100, np.uint8))
    assert gathered(load_samples(tmp_path, [image_spec()]))[0, :, 0, 0].tolist() == [100] * 3
    write_image(tmp_path / "a.png", np.full((8, 8, 3), (255, 0, 0), np.uint8))
    grey = load_samples(tmp_path, [image_spec("N", 1, 8, 8)])
    assert gathered(grey)[0, :, 0, 0].tolist() == [76]  # 0.299 of red
    with pytest.raises(UsageError, match="colour=bgr has 3 channels, but the model takes 1"):
        gathered(load_samples(tmp_path, [image_spec("N", 1, 8, 8)], Preprocess.parse("caffe")))
    with pytest.raises(UsageError, match="colour=grey has 1 channel, but the model takes 3"):
        gathered(load_samples(tmp_path, [image_spec()], Preprocess.parse("colour=grey")))


def test_raw_files_take_their_shape_from_the_model_or_the_keys(tmp_path: Path) -> None:
    values = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    (tmp_path / "a.bin").write_bytes(values.tobytes())
    found = gathered(load_samples(tmp_path, [image_spec("N", 3, 4, 6)]))
    np.testing.assert_array_equal(found[0], values.transpose(2, 0, 1))
    steps = Preprocess.parse("shape=4x6x3,crop=2")
    found = gathered(load_samples(tmp_path, [image_spec("N", 3, "H", "W")], steps))
    np.testing.assert_array_equal(found[0], values[1:3, 2:4].transpose(2, 0, 1))
    with pytest.raises(UsageError, match="holds 72 bytes, not 8x8x3; give shape="):
        gathered(load_samples(tmp_path, [image_spec()]))


def test_signed_raw_files(tmp_path: Path) -> None:
    values = np.arange(-10, 10, dtype=np.int8)
    (tmp_path / "a.bin").write_bytes(values.tobytes())
    steps = Preprocess.parse("dtype=int8,mean=83,std=1/0.5847")
    found = gathered(load_samples(tmp_path, [image_spec(1, 1, 5, 4)], steps))
    np.testing.assert_allclose(found.ravel(), (values - 83.0) * 0.5847, rtol=1e-6)


def test_the_offset_of_labels(classes: Path) -> None:
    samples = load_samples(classes, [image_spec()], Preprocess(label_offset=1))
    assert samples.labels is not None
    assert samples.labels.tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_images_are_read_when_they_are_needed(classes: Path) -> None:
    samples = load_samples(classes, [image_spec()])
    first = next(iter(samples.batches(2)))
    assert np.asarray(first["input"]).shape == (2, 3, 8, 8)
    assert isinstance(samples.source, Folder)
    samples.source.files[-1].write_bytes(b"")  # nobody has looked at it yet
    with pytest.raises(UsageError, match="is no image"):
        list(samples.batches(2))


# -- batches ---------------------------------------------------------------------------------------


def test_a_fixed_batch_is_filled_up(classes: Path) -> None:
    samples = load_samples(classes, [image_spec(4, 3, 8, 8)])
    batches = list(samples.stream(100))
    assert [b.size for b in batches] == [4, 4, 1]
    assert all(np.asarray(b.feeds["input"]).shape == (4, 3, 8, 8) for b in batches)
    last = np.asarray(batches[-1].feeds["input"])
    assert all((row == last[0]).all() for row in last)
    assert batches[-1].labels is not None
    assert batches[-1].labels.tolist() == [2]


def test_different_shapes_do_not_meet_in_a_batch(tmp_path: Path) -> None:
    for number, side in enumerate((8, 8, 6, 6, 8)):
        write_image(tmp_path / f"{number}.png", np.full((side, side, 3), number, np.uint8))
    samples = load_samples(tmp_path, [image_spec("N", 3, "H", "W")])
    shapes = [np.asarray(feeds["input"]).shape for feeds in samples.batches(8)]
    assert shapes == [(2, 3, 8, 8), (2, 3, 6, 6), (1, 3, 8, 8)]


# -- arrays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_with_labels_and_targets(tmp_path: Path, save: Any) -> None:
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {
        "input": rng.standard_normal((5, 3, 8, 8)),
        "labels": np.arange(5, dtype=np.uint8)[:, None],
        "targets": rng.standard_normal((5, 2)),
    }
    save(tmp_path / "data.npz", **arrays)
    samples = load_samples(tmp_path / "data.npz", [image_spec(1, 3, 8, 8)])
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 3, 4]
    assert samples.has_targets
    np.testing.assert_array_equal(gathered(samples), arrays["input"].astype(np.float32))
    for batch, index in zip(samples.take([3, 1]).stream(9), (3, 1), strict=True):
        assert batch.targets is not None
        np.testing.assert_array_equal(batch.targets, arrays["targets"][[index]])


def test_archives_are_mapped_and_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", input=np.asfortranarray(np.ones((5, 3, 8, 8), np.float32)))
    samples = load_samples(tmp_path / "data.npz", [image_spec()])
    assert isinstance(samples.source.table.inputs["input"], np.memmap)  # type: ignore[attr-defined]
    np.save(tmp_path / "data.npy", np.ones((5, 3, 8, 8), np.float32))
    samples = load_samples(tmp_path / "data.npy", [image_spec()])
    assert isinstance(samples.source.table.inputs["input"], np.memmap)  # type: ignore[attr-defined]


def test_arrays_are_images_where_a_preprocessing_is_given(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 10, 12, 3)).astype(np.uint8)
    wanted = (
        images[:, 1:9, 2:10, ::-1].transpose(0, 3, 1, 2)
        - np.array([104, 117, 123.0])[:, None, None]
    )
    steps = Preprocess.parse("caffe,crop=8")
    for layout in (images, images.transpose(0, 3, 1, 2), images.transpose(0, 3, 1, 2)[:, None]):
        np.save(tmp_path / "data.npy", layout)
        samples = load_samples(tmp_path / "data.npy", [image_spec()], steps)
        np.testing.assert_array_equal(gathered(samples), wanted)
    np.save(tmp_path / "data.npy", images[..., 0])
    assert gathered(
        load_samples(tmp_path / "data.npy", [image_spec(1, 1, 10, 12)], Preprocess())
    ).shape == (4, 1, 10, 12)


def test_inputs_that_come_once_serve_all_samples(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "data.npz",
        input=np.zeros((5, 3, 8, 8), np.float32),
        scale=np.array([[2.0]], np.float32),
        threshold=np.float32(0.5),
    )
    inputs = [image_spec(), spec("scale", "N", 1), spec("threshold")]
    batches = list(load_samples(tmp_path / "data.npz", inputs).batches(2))
    assert [np.asarray(b["scale"]).shape for b in batches] == [(2, 1), (2, 1), (1, 1)]
    assert [np.asarray(b["threshold"]).shape for b in batches] == [()] * 3


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros((5, 3, 8, 8))}, "holds 'x', but the inputs are 'input'"),
        ({"input": np.zeros((5, 8, 8, 3))}, "has shape 5x8x8x3, which does not fit"),
        ({"input": np.zeros((5, 3, 8, 8), complex)}, "holds complex128, the input takes float32"),
        ({"input": np.zeros((5, 3, 8, 8)), "labels": np.zeros(4, int)}, "'labels' holds 4 for 5"),
        ({"input": np.zeros((5, 3, 8, 8)), "labels": np.zeros(5)}, "one whole number per sample"),
        ({"input": np.zeros((0, 3, 8, 8))}, "no samples"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, Array], says: str
) -> None:
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UsageError) as error:
        load_samples(tmp_path / "data.npz", [image_spec()])
    assert says in str(error.value)


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_bytes(b"nothing of the kind")
    for name in ("data.npz", "missing.npz"):
        with pytest.raises(UsageError, match=r"cannot be read as \.npz or \.npy"):
            load_samples(tmp_path / name, [image_spec()])


# -- feeds of the caller ---------------------------------------------------------------------------


def generated(sizes: tuple[int, ...], **more: Any) -> Iterator[dict[str, Any]]:
    for size in sizes:
        rows = np.arange(size * 192, dtype=np.float32).reshape(size, 3, 8, 8)
        yield {"input": rows, **{name: make(size) for name, make in more.items()}}


def test_a_generator_is_read_once_and_can_be_streamed_again() -> None:
    samples = load_samples(generated((2, 3), labels=np.arange), [image_spec()])
    assert len(samples) == 5
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 0, 1, 2]
    np.testing.assert_array_equal(gathered(samples), gathered(samples))
    np.testing.assert_array_equal(gathered(samples)[2], gathered(samples)[0])


def test_feeds_may_carry_targets_and_differ_in_size() -> None:
    feeds = [
        {"input": np.zeros((1, 3, side, side)), "targets": np.full((1, side), side)}
        for side in (8, 6)
    ]
    samples = load_samples(feeds, [image_spec("N", 3, "H", "W")])
    assert [b.targets.tolist() for b in samples.stream(4) if b.targets is not None] == [
        [[8] * 8],
        [[6] * 6],
    ]


def test_an_input_may_be_called_targets() -> None:
    inputs = [spec("targets", "N", 2)]
    samples = load_samples([{"targets": np.ones((3, 2))}], inputs)
    assert not samples.has_targets
    assert gathered(samples, "targets").tolist() == [[1, 1]] * 3


def test_only_some_labels_are_refused() -> None:
    feeds = [*generated((2,)), *generated((1,), labels=np.arange)]
    with pytest.raises(UsageError, match="Some of the feeds have labels"):
        load_samples(feeds, [image_spec()])


def test_feeds_that_do_not_fit_are_named_by_their_number() -> None:
    feeds = [*generated((2,)), {"x": np.zeros((1, 3, 8, 8))}]
    with pytest.raises(UsageError, match="feed 1 holds 'x', but the inputs are 'input'"):
        load_samples(feeds, [image_spec()])


# -- picking, splitting, digest --------------------------------------------------------------------


def test_a_split_takes_the_same_share_of_every_class() -> None:
    labels = np.repeat([3, 1, 2], [10, 20, 40])
    feeds = [{"input": np.zeros((70, 3, 8, 8)), "labels": labels}]
    samples = load_samples(feeds, [image_spec()])
    drawn, rest = samples.split(21, np.random.default_rng(0))
    assert drawn.labels is not None
    assert rest.labels is not None
    assert np.bincount(drawn.labels).tolist() == [0, 6, 12, 3]
    assert np.bincount(rest.labels).tolist() == [0, 14, 28, 7]
    beginning = drawn.take(range(7)).labels
    assert beginning is not None
    assert set(beginning) == {1, 2, 3}
    assert not set(drawn.indices) & set(rest.indices)
    assert set(drawn.indices) | set(rest.indices) == set(range(70))


def test_a_split_is_seeded() -> None:
    samples = load_samples(generated((30,)), [image_spec()])
    first, _ = samples.split(10, np.random.default_rng(1))
    again, _ = samples.split(10, np.random.default_rng(1))
    other, _ = samples.split(10, np.random.default_rng(2))
    assert first.indices.tolist() == again.indices.tolist() != other.indices.tolist()


@pytest.mark.parametrize("count", [0, 3, 4])
def test_a_split_leaves_something_on_both_sides(count: int) -> None:
    samples = load_samples(generated((3,)), [image_spec()])
    with pytest.raises(UsageError, match=f"{count} of 3 samples cannot be split off"):
        samples.split(count, np.random.default_rng(0))


def test_spread_samples_are_evenly_spaced() -> None:
    samples = load_samples(generated((11,)), [image_spec()])
    assert samples.spread(3).indices.tolist() == [0, 5, 10]
    assert len(samples.spread(99)) == 11
    assert samples.take([4, 8]).spread(1).indices.tolist() == [4]


def test_the_digest_follows_contents_labels_and_preprocessing(classes: Path) -> None:
    def digest(steps: str = "raw") -> str:
        return load_samples(classes, [image_spec()], Preprocess.parse(steps)).digest

    before = digest()
    assert digest() == before != digest("torch")
    assert digest("label_offset=1") != before
    samples = load_samples(classes, [image_spec()])
    assert samples.take([0, 1]).digest != samples.take([1, 0]).digest
    (classes / "ant" / "001.png").write_bytes((classes / "bee" / "001.png").read_bytes())
    assert digest() != before


def test_the_digest_of_arrays_follows_what_they_hold(tmp_path: Path) -> None:
    digests = set()
    rows, targets = np.zeros((3, 3, 8, 8), np.float32), np.zeros((3, 1))
    for arrays in (
        {"input": rows},
        {"input": rows + 1},
        {"input": rows, "targets": targets},
        {"input": rows, "targets": targets + 1},
        {"input": rows, "labels": np.arange(3)},
    ):
        np.savez(tmp_path / "data.npz", **arrays)
        digests.add(load_samples(tmp_path / "data.npz", [image_spec()]).digest)
        digests.add(load_samples([arrays], [image_spec()]).digest)
    assert len(digests) == 5
