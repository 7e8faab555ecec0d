"""Model files read without their weights, which stay where they are until somebody asks for them.

Protobuf would hold the whole message in memory for as long as any part of it is in use. Here its
wire format is walked, the raw data of large initializers passed over, and the small rest parsed.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx

from pwopt.graph import external

__all__ = ["GRAPH_INITIALIZER", "MODEL_GRAPH", "TENSOR_RAW_DATA", "prefix", "read_light"]

MODEL_GRAPH = 7
GRAPH_INITIALIZER = 5
TENSOR_RAW_DATA = 9
_TENSOR_PLAIN = frozenset({1, 2, 8, TENSOR_RAW_DATA})
"""Dims, data type, name, raw data: tensors with more in them are read as they are."""
_LEAST_BYTES = 1 << 16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_light(path: Path) -> onnx.ModelProto:
    """The model at *path*; large initializers refer to the file instead of holding their data.

    Raises:
        ValueError: the file is not in Protobuf's wire format.
        DecodeError: it holds no model.
    """
    if not path.stat().st_size:
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        light = bytearray()
        for field, start, body, end in _fields(data, 0, len(data)):
            if field != MODEL_GRAPH:
                light += data[start:end]
                continue
            graph = _light_graph(data, body, end, path.name)
            light += prefix(MODEL_GRAPH, len(graph)) + graph
    return onnx.ModelProto.FromString(bytes(light))


def _light_graph(data: mmap.mmap, begin: int, stop: int, location: str) -> bytes:
    light = bytearray()
    for field, start, body, end in _fields(data, begin, stop):
        is_large = field == GRAPH_INITIALIZER and end - body >= _LEAST_BYTES
        tensor = _light_tensor(data, body, end, location) if is_large else None
        light += data[start:end] if tensor is None else prefix(field, len(tensor)) + tensor
    return bytes(light)


def _light_tensor(data: mmap.mmap, begin: int, stop: int, location: str) -> bytes | None:
    """The initializer without its data; ``None`` if it is to be read as it is."""
    rest = bytearray()
    raw: list[tuple[int, int]] = []
    for field, start, body, end in _fields(data, begin, stop):
        if field not in _TENSOR_PLAIN:
            return None
        if field == TENSOR_RAW_DATA:
            raw.append((body, end - body))
        else:
            rest += data[start:end]
    if len(raw) != 1 or raw[0][1] < _LEAST_BYTES:
        return None
    return external.leave(bytes(rest), location, *raw[0])


def _fields(data: mmap.mmap, begin: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, start of the tag, start of the content, end) of each field of a message."""
    position = begin
    while position < stop:
        start = position
        tag, position = _read_varint(data, position, stop)
        field, kind = tag >> 3, tag & 7
        body = position
        if kind == _BYTES:
            length, body = _read_varint(data, position, stop)
            position = body + length
        elif kind == _VARINT:
            _, position = _read_varint(data, position, stop)
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if position > stop:
            raise ValueError("a field reaches beyond its message")
        yield field, start, body, position


def _read_varint(data: mmap.mmap, position: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while position < stop and shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number is cut off")


def prefix(field: int, length: int) -> bytes:
    """Protobuf's tag of a length-delimited *field*, and its *length*, as varints."""
    return _varint(field << 3 | _BYTES) + _varint(length)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
