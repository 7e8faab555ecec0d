from collections.abc import Iterable

import onnx

from onnx_graphsurgeon import Graph, Variable

class OnnxImporter:
    @staticmethod
    def import_graph(
        onnx_graph: onnx.GraphProto,
        *,
        opset: int | None = ...,
        import_domains: Iterable[onnx.OperatorSetIdProto] | None = ...,
    ) -> Graph: ...
    @staticmethod
    def import_tensor(onnx_tensor: onnx.ValueInfoProto) -> Variable: ...
