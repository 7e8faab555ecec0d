"""Tensor data, which may lie in a file beside the model.

``onnx``'s own reader refuses links, which model caches are made of; here a file must merely lie in
or below the model's folder by its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from pwopt.errors import InvalidModelError

__all__ = [
    "array",
    "bare",
    "check",
    "check_size",
    "chunks",
    "inline",
    "is_external",
    "is_left",
    "leave",
    "load",
    "read",
    "size_bytes",
    "stub",
]

_CHUNK = 1 << 24

_DATA_FIELDS = frozenset(
    {
        "data_location",
        "double_data",
        "external_data",
        "float_data",
        "int32_data",
        "int64_data",
        "raw_data",
        "segment",
        "string_data",
        "uint64_data",
    }
)


_IN_MODEL_FILE = "left in the model file"
"""Stands in for a checksum, one of the few entries that onnx does not complain about."""


def is_external(proto: onnx.TensorProto) -> bool:
    """Whether the data of *proto* lies in another file than the model."""
    return bool(uses_external_data(proto)) and not is_left(proto)


def is_left(proto: onnx.TensorProto) -> bool:
    """Whether the data of *proto* was left in the model file."""
    return any(entry.value == _IN_MODEL_FILE for entry in proto.external_data)


def leave(rest: bytes, location: str, offset: int, length: int) -> bytes | None:
    """The message of a tensor whose data was left in the model file.

    Args:
        rest: the message without its raw data.
        location: name of the model file.
        offset: of the raw data, in bytes.
        length: of the raw data.

    Returns:
        ``None`` if that is not as much data as its shape needs.
    """
    proto = onnx.TensorProto.FromString(rest)
    if proto.data_type not in _LEFT_TYPES or any(d < 0 for d in proto.dims):
        return None
    dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    if math.prod(proto.dims) * dtype.itemsize != length:
        return None
    left = stub(proto, location, offset, length)
    left.external_data.add(key="checksum", value=_IN_MODEL_FILE)
    return left.SerializeToString()


def bare(proto: onnx.TensorProto) -> onnx.TensorProto:
    """*proto*, whose data was left in the model file, without it."""
    return _without(proto, _DATA_FIELDS)


def chunks(proto: onnx.TensorProto, base_dir: Path) -> Iterator[bytes]:
    """The data of *proto*, which lies in a file, piece by piece."""
    info: Any = ExternalDataInfo(proto)
    left = size_bytes(proto)
    with (base_dir / info.location).open("rb") as file:
        file.seek(info.offset or 0)
        while left:
            data = file.read(min(left, _CHUNK))
            if not data:
                raise InvalidModelError(f"{base_dir / info.location} has become shorter")
            left -= len(data)
            yield data


def check(proto: onnx.TensorProto, base_dir: Path) -> None:
    """Check that the data of an external tensor is there.

    Raises:
        InvalidModelError: the file is missing, too short, or lies outside of the model's folder.
    """
    try:
        info: Any = ExternalDataInfo(proto)
        needed = (info.offset or 0) + size_bytes(proto)
    except ValueError as error:
        raise InvalidModelError(f"the external data of tensor '{proto.name}': {error}") from error
    subject = f"the external data file '{info.location}' of tensor '{proto.name}'"
    location = Path(info.location)
    if location.is_absolute() or ".." in location.parts:
        raise InvalidModelError(f"{subject} does not lie beside the model")
    path = base_dir / location
    if not path.is_file():
        raise InvalidModelError(f"{subject} is missing")
    if path.stat().st_size < needed:
        raise InvalidModelError(f"{subject} is too short")


def check_size(proto: onnx.TensorProto) -> None:
    """Check that a tensor with its data in the message holds as many elements as its shape says.

    The data is not touched: reading raw bytes from a message copies them.

    Raises:
        InvalidModelError: it holds more or fewer.
    """
    if uses_external_data(proto) or proto.data_type in _PACKED:
        return
    elements = math.prod(proto.dims)
    if proto.data_type != onnx.TensorProto.STRING and proto.HasField("raw_data"):
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize
        fits = elements >= 0 and proto.ByteSize() == _size_with(proto, elements * itemsize)
    else:
        stored = len(getattr(proto, onnx.helper.tensor_dtype_to_field(proto.data_type)))
        fits = stored == elements * (2 if proto.data_type in _COMPLEX else 1)
    if not fits:
        raise InvalidModelError(
            f"tensor '{proto.name}' does not hold the {elements} elements of its shape"
        )


def _size_with(proto: onnx.TensorProto, raw_bytes: int) -> int:
    """Bytes of a message that is *proto* with *raw_bytes* of raw data."""
    length = max(1, (raw_bytes.bit_length() + 6) // 7)
    return _without(proto, {"raw_data"}).ByteSize() + 1 + length + raw_bytes


_LEFT_TYPES = frozenset(
    {
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.INT8,
        onnx.TensorProto.UINT8,
    }
)
"""Types of weights that are left in the model file: those that NumPy reads as they are."""
_PACKED = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
    if hasattr(onnx.TensorProto, name)
)
"""Types with several elements in a byte, which older releases of onnx do not have."""
_COMPLEX = (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)


def size_bytes(proto: onnx.TensorProto) -> int:
    """Bytes of the data of an external tensor, whose length need not be given."""
    info: Any = ExternalDataInfo(proto)
    if info.length is not None:
        return int(info.length)
    itemsize = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize
    return int(math.prod(proto.dims)) * itemsize


def read(proto: onnx.TensorProto, base_dir: Path) -> bytes:
    """The data of an external tensor."""
    info: Any = ExternalDataInfo(proto)
    with (base_dir / info.location).open("rb") as file:
        file.seek(info.offset or 0)
        data: bytes = file.read(size_bytes(proto))
    return data


def load(proto: onnx.TensorProto, base_dir: Path) -> None:
    """:func:`inline` the data of *proto* wherever it lies, unless it is inline already."""
    if uses_external_data(proto):
        inline(proto, base_dir)


def inline(proto: onnx.TensorProto, base_dir: Path) -> None:
    """Put the data of an external tensor into the message itself."""
    proto.raw_data = read(proto, base_dir)
    proto.ClearField("data_location")
    proto.ClearField("external_data")


def stub(proto: onnx.TensorProto, location: str, offset: int, length: int) -> onnx.TensorProto:
    """*proto* with its data in file *location*, at *offset* for *length* bytes."""
    copy = _without(proto, _DATA_FIELDS)
    copy.data_location = onnx.TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", offset), ("length", length)):
        copy.external_data.add(key=key, value=str(text))
    return copy


def _without(proto: onnx.TensorProto, fields: Set[str]) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name in fields:
            continue
        if hasattr(value, "extend"):
            getattr(copy, descriptor.name).extend(value)
        else:
            setattr(copy, descriptor.name, value)
    return copy


def array(proto: onnx.TensorProto, base_dir: Path) -> np.ndarray[Any, Any]:
    """The values of a tensor, external or not; the message is left as it is."""
    if is_left(proto):
        info: Any = ExternalDataInfo(proto)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
        values = np.fromfile(
            base_dir / info.location, dtype, math.prod(proto.dims), offset=info.offset
        )
        return values.reshape(tuple(proto.dims))
    if is_external(proto):
        copy = onnx.TensorProto()
        copy.CopyFrom(proto)
        inline(copy, base_dir)
        proto = copy
    return numpy_helper.to_array(proto)
