from typing import Any

import onnx
from onnx_graphsurgeon import Node

class OnnxExporter:
    @staticmethod
    def export_node(node: Node) -> onnx.NodeProto: ...
    @staticmethod
    def export_attributes(attrs: dict[str, Any]) -> list[onnx.AttributeProto]: ...
