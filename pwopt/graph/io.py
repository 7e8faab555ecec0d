"""Reading and writing model files: lossless, atomic, and without a second copy of the weights."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper, version_converter

from pwopt.errors import InvalidModelError, OutputError, UsageError
from pwopt.graph import external
from pwopt.graph.model import DEFAULT_DOMAINS, Model, one_line, standard_opset
from pwopt.graph.wire import (
    GRAPH_INITIALIZER,
    MODEL_GRAPH,
    TENSOR_RAW_DATA,
    prefix,
    read_light,
)

__all__ = [
    "Written",
    "atomic_write",
    "check",
    "file_sha256",
    "find_nan",
    "has_external_data",
    "has_float16",
    "load",
    "parse",
    "raise_opset",
    "save",
    "save_copy",
    "size_on_disk",
]

_PROTOBUF_LIMIT = 2**31 - 2**20
"""Protobuf messages end at 2 GiB; beyond that (with room for the header) data goes beside them."""
_ALIGNMENT = 4096
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Written:
    """A written model: its path, digest of the model file, and bytes including external data."""

    path: Path
    sha256: str
    size_bytes: int


def load(path: Path) -> Model:
    """Read and check a model file; large weights are left on disk until asked for.

    So the file must stay as it is for as long as the model is in use.

    Raises:
        InvalidModelError: the file is missing, unreadable, not ONNX, or breaks the ONNX rules.
    """
    if not path.exists():
        raise InvalidModelError(f"{path}: no such file")
    if path.is_dir():
        raise InvalidModelError(f"{path}: is a folder, not a model file")
    try:
        proto = _read(path)
    except OSError as error:
        raise InvalidModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (DecodeError, ValueError) as error:
        raise InvalidModelError(f"{path}: not an ONNX model (or a truncated one)") from error
    try:
        _load_nested_external_data(proto, path.parent)
        return parse(proto, path.parent)
    except InvalidModelError as error:
        raise InvalidModelError(f"{path}: {error}") from error


def _read(path: Path) -> onnx.ModelProto:
    try:
        return read_light(path)
    except (DecodeError, ValueError):  # in groups, say, which Protobuf knows too
        return onnx.load(str(path), format="protobuf", load_external_data=False)


def parse(proto: onnx.ModelProto, base_dir: Path | None = None) -> Model:
    """Check *proto* and wrap it; its weights are shared, not copied.

    Raises:
        InvalidModelError: the model breaks the ONNX rules.
    """
    if not proto.HasField("graph") or not proto.ir_version:
        raise InvalidModelError("not an ONNX model: it holds no graph")
    if not proto.graph.node and not proto.graph.output:
        raise InvalidModelError("not an ONNX model: its graph is empty")
    try:
        check(proto)
        model = Model(proto, base_dir)
        model.sorted_nodes()
        _check_external_files(model)
    except InvalidModelError as error:  # a damaged name may hold line breaks
        raise InvalidModelError(one_line(error)) from error
    except Exception as error:  # onnx and graphsurgeon raise anything on damaged messages
        raise InvalidModelError(f"the graph cannot be represented: {one_line(error)}") from error
    return model


def check(proto: onnx.ModelProto) -> None:
    """Check structure, opsets and every node that the installed ONNX knows an operator for.

    ``onnx.checker.check_model`` is not used: it refuses models with operators that were since
    removed from ONNX but that runtimes still run, and copies all weights.

    Raises:
        InvalidModelError: the first broken rule.
    """
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in DEFAULT_DOMAINS and not 1 <= entry.version <= newest:
            raise InvalidModelError(
                f"opset {entry.version} is not supported (supported: 1 to {newest});"
                " re-export the model with an older opset or install a newer onnx"
            )
    _check_names(proto.graph)
    for tensor in chain(proto.graph.initializer, _nested_tensors(proto.graph.node)):
        external.check_size(tensor)
    _check_dataflow(proto.graph)
    _check_nodes(proto)


def _check_names(graph: onnx.GraphProto) -> None:
    """Protobuf hands out what is no UTF-8 as bytes, which nothing else here expects."""
    names = chain(
        chain.from_iterable((n.name, n.op_type, n.domain, *n.input, *n.output) for n in graph.node),
        (a.name for n in graph.node for a in n.attribute),
        (t.name for t in graph.initializer),
        chain.from_iterable(
            (v.name, *(d.dim_param for d in v.type.tensor_type.shape.dim))
            for v in chain(graph.input, graph.output, graph.value_info)
        ),
    )
    for name in names:
        if not isinstance(name, str):
            raise InvalidModelError(f"the name {name!r} is not text")


def _check_dataflow(graph: onnx.GraphProto) -> None:
    produced = _fed_names(graph)
    for node in graph.node:
        for name in filter(None, node.output):
            if name in produced:
                raise InvalidModelError(f"tensor '{name}' is produced more than once")
            produced.add(name)
    for node in graph.node:
        site = node.name or node.op_type
        if not node.op_type:
            raise InvalidModelError(f"node '{site}' has no operator type")
        for name in filter(None, node.input):
            if name not in produced:
                raise InvalidModelError(
                    f"node '{site}' reads tensor '{name}', which nothing produces"
                )
    for value in graph.output:
        if value.name not in produced:
            raise InvalidModelError(f"graph output '{value.name}' is not produced by any node")


def _fed_names(graph: onnx.GraphProto) -> set[str]:
    """Names of initializers and inputs."""
    names: set[str] = set()
    for name in (
        *(t.name for t in graph.initializer),
        *(t.values.name for t in graph.sparse_initializer),
    ):
        if name in names:
            raise InvalidModelError(f"initializer '{name}' is given twice")
        names.add(name)
    inputs: set[str] = set()
    for value in graph.input:
        if not value.name:
            raise InvalidModelError("a graph input has no name")
        if value.name in inputs:
            raise InvalidModelError(f"graph input '{value.name}' is given twice")
        if not value.type.WhichOneof("value"):
            raise InvalidModelError(f"graph input '{value.name}' has no type")
        inputs.add(value.name)
    return names | inputs


def _check_nodes(proto: onnx.ModelProto) -> None:
    context = onnx.checker.C.CheckerContext()
    context.ir_version = proto.ir_version
    context.opset_imports = _opsets(proto)
    local = {(f.domain, f.name) for f in proto.functions}
    opsets = context.opset_imports
    for node in proto.graph.node:
        if (node.domain, node.op_type) in local or any(
            a.HasField("g") or a.graphs for a in node.attribute
        ):
            continue
        domain = "" if node.domain in DEFAULT_DOMAINS else node.domain
        if not domain and domain not in opsets:
            raise InvalidModelError(
                f"node '{node.name or node.op_type}' is a standard operator, but the model imports"
                " no standard operator set (opset_import)"
            )
        if domain not in opsets or not onnx.defs.has(
            node.op_type, domain=domain, max_inclusive_version=opsets[domain]
        ):
            continue
        try:
            onnx.checker.check_node(node, context)
        except onnx.checker.ValidationError as error:
            message = one_line(error)
            if "deprecated" in message:
                continue
            raise InvalidModelError(
                f"node '{node.name or node.op_type}' is invalid: {message}"
            ) from error


def _opsets(proto: onnx.ModelProto) -> dict[str, int]:
    opsets = {
        "" if e.domain in DEFAULT_DOMAINS else e.domain: e.version for e in proto.opset_import
    }
    standard = standard_opset(proto)
    return {**opsets, "": standard} if standard else opsets


def _check_external_files(model: Model) -> None:
    for proto in model.dense_initializers(inline=False):
        if external.is_external(proto):
            external.check(proto, model.base_dir)


def _load_nested_external_data(proto: onnx.ModelProto, base_dir: Path) -> None:
    """Read external data of attributes and subgraphs, which :func:`save` would not carry along."""
    for tensor in _nested_tensors(proto.graph.node):
        if external.is_external(tensor):
            external.check(tensor, base_dir)
            external.inline(tensor, base_dir)


def _nested_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from graph.initializer
                yield from _nested_tensors(graph.node)


def find_nan(model: Model) -> str | None:
    """The name of the first floating-point initializer that holds a NaN, or ``None``."""
    for proto in model.dense_initializers(inline=False):
        if proto.data_type not in _NAN_TYPES:
            continue
        values = external.array(proto, model.base_dir)
        if np.isnan(values).any():
            return proto.name
    return None


_NAN_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)


# -- writing -------------------------------------------------------------------------------------


def save(model: Model, path: Path, *, durable: bool = True) -> Written:
    """Write *model* to *path*: to a temporary file beside it first, which is then renamed.

    Initializers are written one by one, so memory does not grow with the size of the model. If
    the model had external data, or would exceed Protobuf's 2 GiB, weights go to ``<name>.data``.

    Args:
        model: what to write.
        path: where to.
        durable: wait until the data has reached the disk; scratch files need not.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
        InvalidModelError: the graph has a cycle.
    """
    head = model.without_dense_initializers()
    inline_bytes = head.ByteSize()
    beside = False
    for proto in model.dense_initializers(inline=False):
        inline_bytes += _inline_bytes(proto) + 16
        beside = beside or external.is_external(proto)
    if beside or inline_bytes > _PROTOBUF_LIMIT:
        return _save_external(model, head, path, durable=durable)
    graph = head.graph.SerializePartialToString()
    head.ClearField("graph")
    rest = head.SerializePartialToString()
    digest = hashlib.sha256()

    def write(file: IO[bytes]) -> None:
        def emit(data: bytes) -> None:
            digest.update(data)
            file.write(data)

        total = len(graph)
        for proto in model.dense_initializers(inline=False):
            size = _inline_bytes(proto)
            total += len(prefix(GRAPH_INITIALIZER, size)) + size
        emit(rest)
        emit(prefix(MODEL_GRAPH, total))
        emit(graph)
        for proto in model.dense_initializers(inline=False):
            emit(prefix(GRAPH_INITIALIZER, _inline_bytes(proto)))
            if not external.is_left(proto):
                emit(proto.SerializeToString())
                continue
            emit(external.bare(proto).SerializeToString())
            emit(prefix(TENSOR_RAW_DATA, external.size_bytes(proto)))
            for data in external.chunks(proto, model.base_dir):
                emit(data)

    atomic_write(path, write, durable=durable)
    return Written(path, digest.hexdigest(), path.stat().st_size)


def _inline_bytes(proto: onnx.TensorProto) -> int:
    """Bytes of the message with data that was left in the model file."""
    if not external.is_left(proto):
        return proto.ByteSize()
    data = external.size_bytes(proto)
    return external.bare(proto).ByteSize() + len(prefix(TENSOR_RAW_DATA, data)) + data


def _save_external(model: Model, head: onnx.ModelProto, path: Path, *, durable: bool) -> Written:
    data_path = path.with_name(path.name + ".data")
    offset = 0
    stubs: list[onnx.TensorProto] = []
    # The model file is put in place while the data file is complete but not renamed yet: whatever
    # fails leaves a former pair of files as it was.
    with _atomic(data_path, durable=durable) as data:
        for proto in model.dense_initializers():
            values = _raw_bytes(proto, model.base_dir)
            if values is None or len(values) < 1024:
                small = onnx.TensorProto()
                small.CopyFrom(proto)
                if external.is_external(small):
                    external.inline(small, model.base_dir)
                stubs.append(small)
                continue
            padding = -offset % _ALIGNMENT
            data.write(b"\0" * padding)
            offset += padding
            data.write(values)
            stubs.append(external.stub(proto, data_path.name, offset, len(values)))
            offset += len(values)
        data.flush()
        os.fsync(data.fileno())
        head.graph.initializer.extend(stubs)
        text = head.SerializeToString()
        atomic_write(path, lambda file: file.write(text), durable=durable)
    return Written(path, hashlib.sha256(text).hexdigest(), len(text) + data_path.stat().st_size)


def save_copy(source: Written, path: Path, *, beside: bool) -> Written:
    """Copy a model file as it is; with external data it is read and written anew.

    Args:
        source: the model file.
        path: where to.
        beside: whether *source* has external data.

    Raises:
        OutputError: the copy cannot be written.
    """
    if beside:
        return save(load(source.path), path)
    if not (path.exists() and path.samefile(source.path)):
        with source.path.open("rb") as original:
            atomic_write(path, lambda file: shutil.copyfileobj(original, file, _CHUNK))
    return replace(source, path=path)


def has_external_data(model: Model) -> bool:
    """Whether any weight of *model* lies in a file beside it."""
    return any(external.is_external(p) for p in model.dense_initializers(inline=False))


def has_float16(model: Model) -> bool:
    """Whether any weight of *model* has half precision, whatever its interface says."""
    halves = (
        p.data_type == onnx.TensorProto.FLOAT16 for p in model.dense_initializers(inline=False)
    )
    return any(halves)


def size_on_disk(path: Path, model: Model) -> int:
    """Bytes of a model file and of the external data it refers to."""
    beside = sum(
        external.size_bytes(proto)
        for proto in model.dense_initializers(inline=False)
        if external.is_external(proto)
    )
    return path.stat().st_size + beside


def raise_opset(model: Model, opset: int) -> Model:
    """*model* converted to a newer standard operator set by ONNX's version converter.

    Raises:
        UsageError: *opset* is older than the model's, or the converter cannot do it.
    """
    if opset < model.opset:
        raise UsageError(f"--opset {opset} is older than the model's opset {model.opset}")
    if opset == model.opset:
        return model
    try:
        converted = version_converter.convert_version(model.to_proto(), opset)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"--opset {opset}: cannot be converted: {one_line(error)}") from error
    return parse(converted)


def _raw_bytes(proto: onnx.TensorProto, base_dir: Path) -> bytes | None:
    if proto.data_type == onnx.TensorProto.STRING:
        return None
    if external.is_external(proto):
        return external.read(proto, base_dir)
    if proto.HasField("raw_data"):
        return proto.raw_data
    return bytes(numpy_helper.from_array(numpy_helper.to_array(proto)).raw_data)


def atomic_write(path: Path, write: Callable[[IO[bytes]], object], *, durable: bool = True) -> None:
    """Let *write* fill a temporary file beside *path*, then rename it to *path*.

    Raises:
        OutputError: the folder or file cannot be written (permissions, no space); the temporary
            file is removed and an existing *path* is left as it was.
    """
    with _atomic(path, durable=durable) as file:
        write(file)


@contextmanager
def _atomic(path: Path, *, durable: bool) -> Iterator[IO[bytes]]:
    try:
        handle = tempfile.NamedTemporaryFile(  # noqa: SIM115 - outlives this block until renamed
            dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
        )
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    temporary = Path(handle.name)
    try:
        with handle:
            yield handle
            handle.flush()
            if durable:
                os.fsync(handle.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
