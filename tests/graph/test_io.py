"""Reading and writing model files."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from pwopt.errors import InvalidModelError, OutputError
from pwopt.graph import (
    Facts,
    Written,
    file_sha256,
    find_nan,
    has_external_data,
    load,
    parse,
    save,
    save_copy,
    size_on_disk,
)
from pwopt.graph.io import atomic_write
from tests.graph import samples


def _bytes(proto: onnx.ModelProto) -> bytes:
    return proto.SerializeToString(deterministic=True)


def _loaded(path: Path) -> bytes:
    """The model with its external data, which onnx marks as loaded."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        tensor.ClearField("data_location")
    return _bytes(proto)


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- nothing is lost -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", samples.ALL)
def test_a_model_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    proto = samples.ALL[name]
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(proto, source)
    model = load(source)
    model.infer_shapes()
    written = save(model, target)
    assert _loaded(target) == _bytes(proto)
    assert written.sha256 == file_sha256(target)
    assert written.size_bytes == target.stat().st_size
    assert _bytes(model.to_proto()) == _bytes(proto)


@pytest.mark.parametrize("name", samples.ALL)
def test_parsing_leaves_the_message_alone(name: str) -> None:
    proto = samples.ALL[name]
    before = _bytes(proto)
    model = parse(proto)
    model.infer_shapes()
    model.to_proto()
    assert _bytes(proto) == before


def test_unlisting_keeps_the_inputs_a_caller_sees() -> None:
    model = parse(samples.listed())
    assert model.unlist_initializers() == 1
    proto = model.to_proto()
    assert [v.name for v in proto.graph.input] == ["x"]
    assert [t.name for t in proto.graph.initializer] == ["w"]
    assert proto.ir_version == 4
    assert model.unlist_initializers() == 0


def test_new_constants_of_an_old_model_are_listed() -> None:
    """IR 3 knows no initializer that is not an input."""
    from pwopt.graph import Rewriter

    model = parse(samples.listed())
    model.overridable = True
    node = next(iter(model.nodes.values()))
    Rewriter(model).set_weight(node, 1, np.ones(3, np.float32))
    proto = model.to_proto()
    onnx.checker.check_model(proto)
    assert {t.name for t in proto.graph.initializer} < {v.name for v in proto.graph.input}


# -- external data ---------------------------------------------------------------------------------


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    """A model whose weight lies in a folder below its own."""
    folder = tmp_path / "source"
    (folder / "weights").mkdir(parents=True)
    proto = samples.plain()
    proto.graph.initializer[0].CopyFrom(samples.weight("w", 2000, 3))
    del proto.graph.value_info[:]
    path = folder / "model.onnx"
    onnx.save_model(
        proto,
        path,
        save_as_external_data=True,
        location="weights/data.bin",
        size_threshold=0,
    )
    return path


def _weight_of(path: Path) -> np.ndarray[Any, Any]:
    model = load(path)
    values = Facts(model).constant(model.constants()[0])
    assert values is not None
    return values


def test_external_data_is_read_when_asked_for(beside: Path) -> None:
    expected = np.arange(6000, dtype=np.float32).reshape(2000, 3)
    np.testing.assert_array_equal(_weight_of(beside), expected)
    assert size_on_disk(beside, load(beside)) == beside.stat().st_size + expected.nbytes


def test_external_data_is_written_beside_the_output(beside: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "out.onnx"
    target.parent.mkdir()
    written = save(load(beside), target)
    assert _files(target.parent) == {"out.onnx", "out.onnx.data"}
    assert written.size_bytes == sum(p.stat().st_size for p in target.parent.iterdir())
    np.testing.assert_array_equal(_weight_of(target), _weight_of(beside))
    assert _loaded(target) == _loaded(beside)


def test_a_copy_takes_external_data_along(beside: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.onnx"
    source = Written(beside, file_sha256(beside), size_on_disk(beside, load(beside)))
    assert save_copy(source, target, beside=True).path == target
    np.testing.assert_array_equal(_weight_of(target), _weight_of(beside))


def test_a_model_with_external_data_may_replace_itself(tmp_path: Path, beside: Path) -> None:
    target = tmp_path / "same.onnx"
    save(load(beside), target)
    expected = _loaded(target)
    save(load(target), target)
    assert _loaded(target) == expected
    assert "same.onnx.data" in _files(tmp_path)


def test_external_data_is_loaded_into_messages(beside: Path) -> None:
    assert _bytes(load(beside).to_proto()) == _loaded(beside)


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_linked_external_data_is_followed(beside: Path, tmp_path: Path, link: Any) -> None:
    """Caches of downloaded models are made of links."""
    data = beside.parent / "weights" / "data.bin"
    blob = tmp_path / "blob"
    data.rename(blob)
    link(blob, data)
    assert _weight_of(beside)[1999, 2] == 5999


def test_external_data_of_attributes_and_subgraphs_is_kept(tmp_path: Path) -> None:
    proto = samples.branches(inner_initializer=True)
    constant = helper.make_node("Constant", [], ["w2"], value=samples.weight("inside", 3))
    proto.graph.node.insert(0, constant)
    tensors = [
        proto.graph.node[0].attribute[0].t,
        next(a for a in proto.graph.node[2].attribute if a.name == "then_branch").g.initializer[0],
    ]
    expected = _bytes(proto)
    with (tmp_path / "inner.bin").open("wb") as file:
        for number, tensor in enumerate(tensors):
            file.write(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, text in (("location", "inner.bin"), ("offset", 12 * number), ("length", 12)):
                tensor.external_data.add(key=key, value=str(text))
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "away").mkdir()
    save(load(tmp_path / "model.onnx"), tmp_path / "away" / "out.onnx")
    assert _files(tmp_path / "away") == {"out.onnx"}
    assert _bytes(onnx.load(tmp_path / "away" / "out.onnx")) == expected


def _spoil(beside: Path, how: str) -> None:
    data = beside.parent / "weights" / "data.bin"
    if how == "missing":
        data.unlink()
        return
    if how == "short":
        data.write_bytes(data.read_bytes()[:-1])
        return
    proto = onnx.load(beside, load_external_data=False)
    entries = proto.graph.initializer[0].external_data
    keys, text = how.split("=")
    if keys == "length" and not text:
        kept = [(e.key, e.value) for e in entries if e.key != "length"]
        del entries[:]
        for key, kept_value in kept:
            entries.add(key=key, value=kept_value)
        data.write_bytes(data.read_bytes()[:-1])
    else:
        next(e for e in entries if e.key == keys).value = text
    beside.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "is missing"),
        ("short", "is too short"),
        ("length=", "is too short"),
        ("length=-4", "must be non-negative"),
        ("offset=some", "invalid literal"),
        ("location=../escaped.bin", "does not lie beside the model"),
        ("location=/etc/hostname", "does not lie beside the model"),
        ("location=weights", "is missing"),
    ],
)
def test_bad_external_data_is_said_at_once(beside: Path, how: str, words: str) -> None:
    _spoil(beside, how)
    with pytest.raises(InvalidModelError, match=words) as caught:
        load(beside)
    assert "'w'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_more_than_two_gibibytes(tmp_path: Path) -> None:
    """Three weights of 0.8 GiB, of which only the last elements are not zero."""
    shape = (200 * 2**10, 2**10)
    elements = shape[0] * shape[1]
    names = ["a", "b", "c"]
    nodes = [
        helper.make_node("Add", [x, w], [y])
        for x, w, y in (("x", "a", "t"), ("t", "b", "u"), ("u", "c", "y"))
    ]
    graph = helper.make_graph(
        nodes, "large", [samples.value("x", shape)], [samples.value("y", shape)]
    )
    proto = samples.model(graph)
    with (tmp_path / "weights.bin").open("wb") as file:
        for number, name in enumerate(names):
            tensor = proto.graph.initializer.add(
                name=name,
                data_type=TensorProto.FLOAT,
                dims=shape,
                data_location=TensorProto.EXTERNAL,
            )
            for key, text in (
                ("location", "weights.bin"),
                ("offset", 4 * elements * number),
                ("length", 4 * elements),
            ):
                tensor.external_data.add(key=key, value=str(text))
            file.seek(4 * elements * (number + 1) - 4)
            file.write(np.float32(number + 1).tobytes())
    (tmp_path / "large.onnx").write_bytes(proto.SerializeToString())
    model = load(tmp_path / "large.onnx")
    model.infer_shapes()
    written = save(model, tmp_path / "out.onnx")
    assert written.size_bytes > 2**31
    again = load(tmp_path / "out.onnx")
    for number, weight in enumerate(again.constants()):
        values = Facts(again).constant(weight)
        assert values is not None
        assert values.shape == shape
        assert values[-1, -1] == number + 1
        assert np.count_nonzero(values) == 1
        del values


def test_inline_data_past_protobufs_limit_moves_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pwopt.graph.io._PROTOBUF_LIMIT", 4000)
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "large"], ["t"]),
            helper.make_node("Add", ["t", "w"], ["y"]),
        ],
        "grown",
        [samples.value("x")],
        [samples.value("y", None)],
        [samples.weight("large", 1000, 2, 3), samples.weight("w", 3)],
    )
    proto = samples.model(graph)
    save(parse(proto), tmp_path / "out.onnx")
    stubs = onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer
    assert [t.data_location == TensorProto.EXTERNAL for t in stubs] == [True, False]
    assert _loaded(tmp_path / "out.onnx") == _bytes(proto)


# -- atomic writing --------------------------------------------------------------------------------


def _fail(file: IO[bytes]) -> None:
    file.write(b"half")
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match=r"model\.onnx: cannot be written: No space left"):
        atomic_write(target, _fail)
    assert target.read_bytes() == b"old"
    assert _files(tmp_path) == {"model.onnx"}


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "model.onnx", interrupt)
    assert not _files(tmp_path)


@pytest.mark.parametrize("failing", ["model", "data"])
def test_a_failed_pair_leaves_the_old_pair(
    tmp_path: Path, beside: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    target = tmp_path / "pair" / "out.onnx"
    target.parent.mkdir()
    save(load(beside), target)
    before = {p.name: p.read_bytes() for p in target.parent.iterdir()}
    model = load(beside)
    calls: Iterator[int] = iter(range(9))

    def full(descriptor: int) -> None:
        if next(calls) == {"data": 0, "model": 1}[failing]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("pwopt.graph.io.os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save(model, target)
    assert {p.name: p.read_bytes() for p in target.parent.iterdir()} == before


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file") as caught:
        save(parse(samples.plain()), tmp_path / "no" / "out.onnx")
    assert "\n" not in str(caught.value)


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    """Temporary files are private; what is left must not be."""
    save(parse(samples.plain()), tmp_path / "out.onnx")
    (tmp_path / "other").write_bytes(b"")
    mode = stat.S_IMODE((tmp_path / "out.onnx").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "other").stat().st_mode)


# -- broken input ----------------------------------------------------------------------------------


def _broken(change: Any) -> onnx.ModelProto:
    proto = samples.plain()
    change(proto)
    return proto


def _cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[1] = "y"


BROKEN = {
    "reads tensor 'nowhere', which nothing produces": lambda p: p.graph.node[1].input.__setitem__(
        0, "nowhere"
    ),
    "graph output 'nowhere' is not produced": lambda p: setattr(
        p.graph.output[0], "name", "nowhere"
    ),
    "tensor 't' is produced more than once": lambda p: p.graph.node.append(
        helper.make_node("Neg", ["x"], ["t"])
    ),
    "tensor 'w' is produced more than once": lambda p: p.graph.node.append(
        helper.make_node("Neg", ["x"], ["w"])
    ),
    "initializer 'w' is given twice": lambda p: p.graph.initializer.append(samples.weight("w", 3)),
    "graph input 'x' is given twice": lambda p: p.graph.input.append(samples.value("x")),
    "a graph input has no name": lambda p: p.graph.input.append(samples.value("")),
    "graph input 'x' has no type": lambda p: p.graph.input[0].ClearField("type"),
    "the graph has a cycle through node": _cycle,
    "has no operator type": lambda p: p.graph.node[0].ClearField("op_type"),
    "node 'add' is invalid": lambda p: p.graph.node[0].input.append("x"),
    "is not supported": lambda p: setattr(p.opset_import[0], "version", 1000),
    "the model imports no standard operator set": lambda p: p.ClearField("opset_import"),
    "it holds no graph": lambda p: p.ClearField("graph"),
    "its graph is empty": lambda p: (p.graph.ClearField("node"), p.graph.ClearField("output")),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_model_is_one_line(words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(_broken(BROKEN[words]).SerializePartialToString())
    with pytest.raises(InvalidModelError) as caught:
        load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_contradicting_types_are_one_line() -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "i"], ["y"], name="mixed")],
        "types",
        [samples.value("x"), samples.value("i", (2, 3), TensorProto.INT64)],
        [samples.value("y")],
    )
    model = parse(samples.model(graph))
    with pytest.raises(InvalidModelError, match="shape inference failed") as caught:
        model.infer_shapes()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_bytes(b""), "not an ONNX model"),
        (lambda path: path.write_text("hello, world"), "not an ONNX model"),
        (lambda path: path.write_bytes(bytes(range(256)) * 9), "not an ONNX model"),
    ],
)
def test_what_is_no_model_is_one_line(make: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    make(path)
    with pytest.raises(InvalidModelError, match=words) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def _load_or_refuse(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    message = ""
    try:
        model = load(path)
        model.infer_shapes()
    except InvalidModelError as error:
        message = str(error)
    assert "\n" not in message


def test_every_truncation_is_refused_or_valid(tmp_path: Path) -> None:
    data = samples.plain().SerializeToString()
    for length in range(len(data)):
        _load_or_refuse(data[:length], tmp_path / "model.onnx")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_refused_or_valid(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from(sorted(samples.ALL)))
    content = bytearray(samples.ALL[name].SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    _load_or_refuse(bytes(content), tmp_path_factory.getbasetemp() / "damaged.onnx")


def test_opset_zero_stands_for_no_standard_operators() -> None:
    model = parse(samples.foreign())
    assert model.opset == 0
    assert not Facts(model).has_op("Relu")


def test_models_older_than_opset_imports_have_opset_one() -> None:
    proto = samples.listed(ir=2)
    proto.ClearField("opset_import")
    proto.graph.node[0].attribute.append(helper.make_attribute("broadcast", 1))
    assert parse(proto).opset == 1


def test_nothing_is_printed_about_damaged_types(capsys: pytest.CaptureFixture[str]) -> None:
    proto = samples.plain()
    proto.graph.initializer[0].data_type = 0
    with pytest.raises(InvalidModelError):
        parse(proto)
    assert capsys.readouterr() == ("", "")


def test_long_vectors_are_not_taken_for_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX's data propagation would spend gigabytes on them."""
    seen: list[bool] = []

    def infer(proto: onnx.ModelProto, **options: bool) -> onnx.ModelProto:
        seen.append(options["data_prop"])
        return proto

    monkeypatch.setattr("onnx.shape_inference.infer_shapes", infer)
    for length in (1000, 10**9):
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "x"], ["y"])],
            "vector",
            [samples.value("x", (length,))],
            [samples.value("y", (length,))],
        )
        parse(samples.model(graph)).infer_shapes()
    assert seen == [True, False]


def _raw(name: str, data_type: int, dims: list[int], raw: bytes) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=data_type, dims=dims, raw_data=raw)


@pytest.mark.parametrize(
    "tensor",
    [
        _raw("w", TensorProto.FLOAT, [3], b"\0" * 8),
        _raw("w", TensorProto.FLOAT, [3], b"\0" * 13),
        _raw("w", TensorProto.FLOAT16, [0], b"\0" * 2),
        _raw("w", TensorProto.FLOAT, [-3], b"\0" * 12),
        onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3]),
        onnx.TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3], float_data=[1, 2]),
        onnx.TensorProto(name="w", data_type=TensorProto.STRING, dims=[2], string_data=[b"a"]),
    ],
    ids=["short", "long", "not empty", "negative", "nothing", "few values", "few strings"],
)
def test_data_that_does_not_fill_its_shape_is_refused(tensor: onnx.TensorProto) -> None:
    proto = samples.plain()
    proto.graph.initializer[0].CopyFrom(tensor)
    with pytest.raises(InvalidModelError, match="tensor 'w' does not hold the"):
        parse(proto)
    inside = samples.plain()
    inside.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    with pytest.raises(InvalidModelError, match="tensor 'w' does not hold the"):
        parse(inside)


@pytest.mark.parametrize(
    "tensor",
    [
        numpy_helper.from_array(np.zeros((2, 0, 3), np.float32), "w"),
        numpy_helper.from_array(np.zeros(300, np.float64), "w"),
        numpy_helper.from_array(np.zeros(3, np.complex64), "w"),
        numpy_helper.from_array(np.array(["a", "b"], object), "w"),
        onnx.TensorProto(data_type=TensorProto.COMPLEX64, dims=[1], float_data=[1, 2]),
        helper.make_tensor("w", TensorProto.BFLOAT16, [2], [1, 2]),
        helper.make_tensor("w", TensorProto.INT4, [3], [1, 2, 3]),
        helper.make_tensor("w", TensorProto.UINT32, [2], [1, 2]),
        _raw("w", TensorProto.FLOAT, [], b"\0" * 4),
        onnx.TensorProto(
            name="w",
            data_type=TensorProto.FLOAT,
            dims=[1],
            raw_data=b"\0" * 4,
            data_location=TensorProto.DEFAULT,
            doc_string="text",
        ),
    ],
    ids=lambda t: f"{t.data_type}{list(t.dims)}",
)
def test_data_that_fills_its_shape_is_taken(tensor: onnx.TensorProto) -> None:
    proto = samples.idle()
    proto.graph.initializer[0].CopyFrom(tensor)
    proto.graph.initializer[0].name = "before"
    assert _bytes(parse(proto).to_proto()) == _bytes(proto)


def test_find_nan_names_the_initializer() -> None:
    proto = samples.plain()
    assert find_nan(parse(proto)) is None
    proto.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(np.array([1, np.nan, 2], np.float32), "w")
    )
    assert find_nan(parse(proto)) == "w"


# -- weights that stay in the file -----------------------------------------------------------------


def _large(**fields: str) -> onnx.ModelProto:
    """``y = x @ w`` with 256 KiB of weights."""
    values = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    tensor = numpy_helper.from_array(values, "w")
    for key, text in fields.items():
        setattr(tensor, key, text)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    ends = samples.value("x", (1, 256)), samples.value("y", (1, 256))
    graph = helper.make_graph([node], "large", ends[:1], ends[1:], [tensor, samples.weight("s", 3)])
    return samples.model(graph)


def test_large_weights_stay_in_the_file_and_come_back_when_asked_for(tmp_path: Path) -> None:
    proto = _large()
    source = tmp_path / "in.onnx"
    onnx.save(proto, source)
    model = load(source)
    left, small = model.dense_initializers(inline=False)
    assert left.ByteSize() < 1024
    assert small.raw_data
    assert [t.SerializeToString() for t in model.dense_initializers()] == [
        t.SerializeToString() for t in proto.graph.initializer
    ]
    (product,) = model.nodes.values()
    values = Facts(model).constant(product.inputs[1])
    assert np.array_equal(values, numpy_helper.to_array(proto.graph.initializer[0]))  # type: ignore[arg-type]
    assert _bytes(model.to_proto()) == _bytes(proto)
    written = save(model, tmp_path / "out.onnx")
    assert _bytes(onnx.load(written.path)) == _bytes(proto)
    assert written.sha256 == save(parse(proto), tmp_path / "other.onnx").sha256
    assert size_on_disk(source, model) == source.stat().st_size
    assert not has_external_data(model)
    assert _files(tmp_path) == {"in.onnx", "out.onnx", "other.onnx"}


def test_a_large_weight_that_says_more_is_read_as_it_is(tmp_path: Path) -> None:
    proto = _large(doc_string="trained with care")
    source = tmp_path / "in.onnx"
    onnx.save(proto, source)
    model = load(source)
    assert next(model.dense_initializers(inline=False)).raw_data
    assert _loaded(save(model, tmp_path / "out.onnx").path) == _bytes(proto)


def test_a_nan_in_a_weight_that_stays_in_the_file_is_found(tmp_path: Path) -> None:
    proto = _large()
    values = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    values[200, 200] = np.nan
    proto.graph.initializer[0].raw_data = values.tobytes()
    onnx.save(proto, tmp_path / "in.onnx")
    assert find_nan(load(tmp_path / "in.onnx")) == "w"


def test_a_large_weight_of_another_size_than_its_shape_is_refused(tmp_path: Path) -> None:
    proto = _large()
    proto.graph.initializer[0].raw_data += b"1234"
    onnx.save(proto, tmp_path / "in.onnx")
    with pytest.raises(InvalidModelError, match="does not hold the 65536 elements"):
        load(tmp_path / "in.onnx")


def test_a_file_that_becomes_shorter_while_its_model_is_in_use_is_told_of(tmp_path: Path) -> None:
    source = tmp_path / "in.onnx"
    onnx.save(_large(), source)
    model = load(source)
    os.truncate(source, 1 << 17)
    with pytest.raises(InvalidModelError, match="shorter"):
        save(model, tmp_path / "out.onnx")
    assert _files(tmp_path) == {"in.onnx"}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=3), st.integers(0))
def test_a_damaged_file_with_large_weights_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], end: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "in.onnx"
    text = bytearray(_large().SerializeToString())
    for place, byte in flips:
        text[place] = byte
    path.write_bytes(text[: end % (len(text) + 1)])
    with contextlib.suppress(InvalidModelError):
        load(path)
