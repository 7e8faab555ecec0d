from typing import Any

import numpy as np
import onnx

class LazyValues:
    tensor: onnx.TensorProto
    shape: list[int]
    dtype: Any
    nbytes: int
    def __init__(self, tensor: onnx.TensorProto) -> None: ...
    def load(self) -> np.ndarray[Any, Any]: ...

class SparseValues(LazyValues):
    tensor: onnx.SparseTensorProto  # type: ignore[assignment]
