from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pwopt.calibration import PRESETS, Preprocess
from pwopt.calibration.preprocess import Colour, Interpolation, Layout
from pwopt.errors import UsageError


def test_presets_do_what_the_collections_say() -> None:
    pixels = np.array([[[0, 128, 255]]], dtype=np.uint8)
    torch = PRESETS["torch"].normalise(pixels)[0, 0]
    wanted = (np.array([0, 128, 255]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(torch, wanted, rtol=1e-6)
    tf = PRESETS["tf"].normalise(pixels)[0, 0]
    np.testing.assert_allclose(tf, np.array([0, 128, 255]) / 127.5 - 1, rtol=1e-6)
    caffe = PRESETS["caffe"].normalise(pixels)[0, 0]
    np.testing.assert_allclose(caffe, [-104, 11, 132])
    assert PRESETS["caffe"].colour is Colour.BGR
    assert PRESETS["raw"].keeps_values
    assert not any(PRESETS[name].keeps_values for name in ("torch", "tf", "caffe"))


def test_keys_override_the_preset() -> None:
    found = Preprocess.parse("torch, resize=256, crop=224x160, interpolation=bicubic, std=1/4")
    assert found == Preprocess(
        resize=(256,),
        crop=(224, 160),
        interpolation=Interpolation.BICUBIC,
        scale=1 / 255,
        mean=(0.485, 0.456, 0.406),
        std=(0.25,),
    )


def test_keys_alone_start_from_raw() -> None:
    found = Preprocess.parse("mean=83,scale=1,std=1/0.5847,dtype=int8,shape=49x10,layout=nhwc")
    assert found.mean == (83.0,)
    assert found.std == (1 / 0.5847,)
    assert (found.dtype, found.shape, found.layout) == ("int8", (49, 10), Layout.NHWC)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("pytorch", "no preset 'pytorch'; choose from raw, torch, tf, caffe"),
        ("torch,size=224", "no key 'size'; the keys are resize, crop, "),
        ("torch,224", "'224' is not of the form key=value"),
        ("torch,resize=big", "resize takes the length of the shorter side, or HEIGHTxWIDTH, not"),
        ("torch,resize=1x2x3", "resize takes"),
        ("torch,crop=0", "crop takes"),
        ("torch,std=0", "std takes one number other than 0"),
        ("torch,std=1/0", "std takes one number other than 0"),
        ("torch,mean=0.4:x", "mean takes one number, or one per channel"),
        ("torch,colour=cmyk", "colour takes rgb, bgr or grey"),
        ("torch,dtype=float32", "dtype takes uint8 or int8"),
        ("torch,label_offset=one", "label_offset takes a whole number"),
        ("missing.json", "missing.json: cannot be read"),
    ],
)
def test_what_cannot_be_parsed_is_named_with_what_is_allowed(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        Preprocess.parse(spec)
    assert says in str(error.value)


def test_means_must_fit_the_channels() -> None:
    with pytest.raises(UsageError, match="mean has 3 values, but there are 1 channels"):
        PRESETS["torch"].normalise(np.zeros((2, 2, 1)))


numbers = st.floats(0.01, 1000)
preprocesses = st.builds(
    Preprocess,
    resize=st.none() | st.tuples(st.integers(1, 999)) | st.tuples(*[st.integers(1, 999)] * 2),
    crop=st.none() | st.tuples(*[st.integers(1, 999)] * 2),
    interpolation=st.sampled_from(Interpolation),
    scale=numbers,
    mean=st.tuples(numbers) | st.tuples(*[numbers] * 3),
    std=st.tuples(numbers) | st.tuples(*[numbers] * 3),
    colour=st.none() | st.sampled_from(Colour),
    layout=st.none() | st.sampled_from(Layout),
    dtype=st.sampled_from(["uint8", "int8"]),
    shape=st.none() | st.tuples(*[st.integers(1, 99)] * 3),
    label_offset=st.integers(-2, 2),
)


@given(preprocesses)
def test_a_saved_one_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, preprocess: Preprocess
) -> None:
    path = tmp_path_factory.getbasetemp() / "preprocess.json"
    preprocess.save(path)
    assert Preprocess.parse(str(path)) == preprocess


def test_a_file_may_name_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"preset": "tf", "resize": [256], "label_offset": 1}))
    assert Preprocess.parse(str(path)) == Preprocess.parse("tf,resize=256,label_offset=1")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "holds no object"),
        ("{", "is not JSON"),
        ('{"preset": "x"}', "no preset 'x'"),
        ('{"resize": {}}', "resize takes"),
    ],
)
def test_files_that_are_no_preprocessing_are_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        Preprocess.parse(str(path))
    assert says in str(error.value)
    assert "p.json" in str(error.value)
