"""Models in half precision, by the converter that ONNX Runtime brings along."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection
from typing import Any

from pwopt.errors import InvalidModelError, RuntimeUnavailableError
from pwopt.runtime.session import load_onnxruntime, readable_error

__all__ = ["LARGEST_HALF", "converted_to_half"]

LARGEST_HALF = 65504.0
"""The largest finite number of fp16."""


def converted_to_half(proto: Any, keep: Collection[str]) -> Any:
    """A copy of a model (an ``onnx.ModelProto``) that computes in fp16.

    Inputs and outputs keep their types; a Cast comes behind and before them. So it is with
    operators that have no fp16 kernel by the converter's list.

    Args:
        proto: the model, in fp32, with its weights and with names for its nodes.
        keep: names of nodes that go on computing in fp32.

    Raises:
        RuntimeUnavailableError: this ONNX Runtime comes without the converter.
        InvalidModelError: the converter fails on the model.
    """
    converter = _converter()
    try:
        return converter.convert_float_to_float16(
            proto, keep_io_types=True, node_block_list=list(keep)
        )
    except Exception as error:  # it raises whatever onnx and numpy do
        raise InvalidModelError(
            f"the conversion to fp16 failed: {readable_error(error)}"
        ) from error


def _converter() -> Any:
    load_onnxruntime()
    before = list(sys.path)
    try:
        return importlib.import_module("onnxruntime.transformers.float16")
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"ONNX Runtime's converter to fp16 does not load: {error}. Reinstall onnxruntime."
        ) from error
    finally:
        sys.path[:] = before  # the package adds its own folder, full of common names
