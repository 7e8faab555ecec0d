from collections.abc import Iterable
from typing import overload

import onnx
from onnx_graphsurgeon import Constant, Graph, Variable

class OnnxImporter:
    @staticmethod
    def import_graph(
        onnx_graph: onnx.GraphProto,
        *,
        opset: int | None = ...,
        import_domains: Iterable[onnx.OperatorSetIdProto] | None = ...,
    ) -> Graph: ...
    @staticmethod
    @overload
    def import_tensor(onnx_tensor: onnx.ValueInfoProto) -> Variable: ...
    @staticmethod
    @overload
    def import_tensor(onnx_tensor: onnx.TensorProto | onnx.SparseTensorProto) -> Constant: ...
