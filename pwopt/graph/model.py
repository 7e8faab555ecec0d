"""An ONNX model as the passes see it: a graphsurgeon graph, and all that graphsurgeon drops.

Graphsurgeon's nodes and tensors compare by value and are unhashable, so everything here is keyed
by ``id()``; :class:`Model` holds the strong references that keep those ids valid.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from pwopt.errors import InvalidModelError
from pwopt.graph import external
from pwopt.graph.kept_sizes import name_kept_sizes
from pwopt.graph.stand_ins import put_stand_ins

__all__ = [
    "DEFAULT_DOMAINS",
    "Constant",
    "Dim",
    "Model",
    "ModelProto",
    "Node",
    "Shape",
    "Tensor",
    "Variable",
    "op_name",
]

Node = gs.Node
Tensor = gs.Tensor
Variable = gs.Variable
Constant = gs.Constant
ModelProto = onnx.ModelProto

Dim = int | str | None
"""A dimension: known, symbolic, or unknown."""
Shape = tuple[Dim, ...]

DEFAULT_DOMAINS = (None, "", "ai.onnx")

_SMALL_ELEMENTS = 1024
"""Constants up to this many elements may be shapes or indices, which shape inference reads."""


_LONG_VECTOR = 1 << 20


def op_name(node: Node) -> str:
    """The operator's name, prefixed by its domain unless that is the ONNX standard one."""
    return node.op if node.domain in DEFAULT_DOMAINS else f"{node.domain}.{node.op}"


class _ExternalValues(LazyValues):
    """Constant values that lie in the model file or one beside it, and are read when asked for."""

    def __init__(self, tensor: onnx.TensorProto, base_dir: Path) -> None:
        super().__init__(tensor)
        self._base_dir = base_dir

    def load(self) -> np.ndarray[Any, Any]:
        return external.array(self.tensor, self._base_dir)


@dataclass(frozen=True)
class _Position:
    """Where a node stands in the file: imported nodes by index, new ones beside their anchor."""

    index: int
    serial: int

    def key(self) -> tuple[int, int]:
        return self.index, self.serial


class Model:
    """A mutable ONNX model with linear-time indices. Only :class:`Rewriter` changes it.

    Attributes:
        header: the model without nodes and initializers: metadata, opset imports, functions,
            inputs, outputs and value infos, exactly as they were loaded.
        nodes: live nodes of the main graph by ``id``.
        inputs: the tensors a caller must feed.
        outputs: the tensors a caller gets.
        opset: version of the standard operator set; 0 if the model imports none.
        listed: names of initializers that are also listed among the graph inputs.
        overridable: whether those may be overridden by a caller and so are not constants.
    """

    def __init__(self, proto: onnx.ModelProto, base_dir: Path | None = None) -> None:
        """Wrap *proto*, whose weights are shared, not copied.

        Args:
            proto: the model; its graph's repeated fields must not be changed afterwards.
            base_dir: the folder that external data is relative to.

        """
        # It would print to standard output what it also raises.
        G_LOGGER.severity = G_LOGGER.CRITICAL + 1
        self._proto = proto
        self.base_dir = base_dir or Path()
        self.opset = standard_opset(proto)
        self.overridable = False
        initializers = {t.name: t for t in proto.graph.initializer}
        sparse = {t.values.name: t for t in proto.graph.sparse_initializer}
        self.listed = {
            v.name for v in proto.graph.input if v.name in initializers or v.name in sparse
        }
        graph = OnnxImporter.import_graph(
            proto.graph, opset=self.opset, import_domains=proto.opset_import
        )
        self.inputs: list[Tensor] = list(graph.inputs)
        self.outputs: list[Tensor] = list(graph.outputs)
        self.nodes: dict[int, Node] = {}
        self.by_op: dict[str, dict[int, Node]] = {}
        self._positions: dict[int, _Position] = {}
        self._origin: dict[int, onnx.NodeProto] = {}
        self.changed_attributes: dict[int, frozenset[str]] = {}
        self.serial = 0
        for index, (node, node_proto) in enumerate(zip(graph.nodes, proto.graph.node, strict=True)):
            self._origin[id(node)] = node_proto
            self._positions[id(node)] = _Position(index, 0)
            self.enlist(node)
        # Removed nodes must not be freed: a new node could be given the same id.
        self._imported = list(graph.nodes)
        self._captures: dict[int, list[Tensor]] = {}
        self._capturers: dict[int, list[int]] = {}
        self._find_captures({**initializers, **sparse})
        self._output_ids = {id(t) for t in self.outputs}
        self._input_ids = {id(t) for t in self.inputs}
        self.names: dict[str, int] = dict.fromkeys(_all_names(proto), 0)
        self.header = _header_of(proto)
        used = {t.name for t in self._reachable_constants()}
        self.idle_initializers = [n for n in (*initializers, *sparse) if n not in used]
        self._initializers = initializers
        self._sparse = sparse
        self._externalise()

    # -- structure -----------------------------------------------------------------------------

    def enlist(self, node: Node) -> None:
        """Count *node* among the live nodes."""
        self.nodes[id(node)] = node
        self.by_op.setdefault(op_name(node), {})[id(node)] = node

    def delist(self, node: Node) -> None:
        """Count *node* among the live nodes no longer."""
        del self.nodes[id(node)]
        del self.by_op[op_name(node)][id(node)]

    def place(self, node: Node, anchor: Node | None) -> None:
        """Let *node* stand beside *anchor* in the written file."""
        self.serial += 1
        index = self._positions[id(anchor)].index if anchor is not None else -1
        self._positions[id(node)] = _Position(index, self.serial)

    def position(self, node: Node) -> tuple[int, int]:
        """A key that orders nodes as they stand in the file."""
        return self._positions[id(node)].key()

    @property
    def depth(self) -> int:
        """Layers that sum products and so round, at least 1; as if all stood in a row."""
        return max(1, sum(len(self.by_op.get(op, {})) for op in ("Conv", "Gemm", "MatMul")))

    def is_input(self, tensor: Tensor) -> bool:
        """Whether a caller feeds *tensor*."""
        return id(tensor) in self._input_ids

    def is_output(self, tensor: Tensor) -> bool:
        """Whether *tensor* is a graph output."""
        return id(tensor) in self._output_ids

    def is_captured(self, tensor: Tensor) -> bool:
        """Whether a subgraph (an If branch, a Loop body) reads *tensor* by name."""
        return bool(self.capturers(tensor))

    def capturers(self, tensor: Tensor) -> list[int]:
        """Ids of the live nodes whose subgraphs read *tensor*."""
        return [key for key in self._capturers.get(id(tensor), ()) if key in self.nodes]

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether *tensor* is an initializer that no caller may override."""
        if not isinstance(tensor, Constant):
            return False
        return not (self.overridable and tensor.name in self.listed)

    def can_bypass(self, target: Tensor, source: Tensor) -> bool:
        """Whether *source* can stand for *target*, an equal tensor that a node computes.

        A subgraph reads *target* by name. A graph output keeps its name, so the producer of
        *source* must be free to take it over: *source* is no graph input, initializer, graph
        output or captured tensor itself.
        """
        if self.is_captured(target):
            return False
        if not self.is_output(target):
            return True
        producers = sum(id(p) in self.nodes for p in source.inputs)
        return producers == 1 and not self.is_output(source) and not self.is_captured(source)

    def sorted_nodes(self, among: Iterable[Node] | None = None) -> list[Node]:
        """Live nodes in topological order, otherwise as they stood in the file.

        Args:
            among: sort only these, in time proportional to their number.

        Raises:
            InvalidModelError: the graph has a cycle.
        """
        nodes = self.nodes if among is None else {id(n): n for n in among if id(n) in self.nodes}
        waiting: dict[int, int] = {}
        ready: list[tuple[tuple[int, int], int]] = []
        for key, node in nodes.items():
            needed = sum(1 for t in self.reads(node) for p in t.inputs if id(p) in nodes)
            waiting[key] = needed
            if not needed:
                ready.append((self.position(node), key))
        heapq.heapify(ready)
        ordered: list[Node] = []
        while ready:
            _, key = heapq.heappop(ready)
            node = nodes[key]
            ordered.append(node)
            for tensor in node.outputs:
                consumers = [id(n) for n in tensor.outputs]
                for consumer in consumers + self._capturers.get(id(tensor), []):
                    if consumer not in waiting:
                        continue
                    waiting[consumer] -= 1
                    if not waiting[consumer]:
                        heapq.heappush(ready, (self.position(nodes[consumer]), consumer))
        if len(ordered) != len(nodes):
            done = {id(n) for n in ordered}
            stuck = next(n for k, n in nodes.items() if k not in done)
            raise InvalidModelError(
                f"the graph has a cycle through node '{stuck.name or stuck.op}'"
            )
        return ordered

    def constants(self) -> list[Constant]:
        """Constants that a live node, a subgraph or a graph output reads, by first use."""
        return list(self._reachable_constants())

    def _reachable_constants(self) -> Iterator[Constant]:
        seen: set[int] = set()
        for tensor in self._read_tensors():
            if isinstance(tensor, Constant) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor

    def _read_tensors(self) -> Iterator[Tensor]:
        for node in sorted(self.nodes.values(), key=self.position):
            yield from self.reads(node)
        yield from self.outputs

    def reads(self, node: Node) -> list[Tensor]:
        """Tensors *node* reads, by its inputs or by capture in its subgraphs."""
        captured = self._captures.get(id(node))
        return [*node.inputs, *captured] if captured else node.inputs

    def _find_captures(
        self, initializers: Mapping[str, onnx.TensorProto | onnx.SparseTensorProto]
    ) -> None:
        """Note what subgraphs read from the main graph.

        By name: graphsurgeon misses tensors that a subgraph hands straight to its outputs, and
        hangs a subgraph's own initializers on its nodes just like captured ones.
        """
        tensors: dict[str, Tensor] | None = None
        for key, proto in self._origin.items():
            names = _captured_names(proto)
            if not names:
                continue
            if tensors is None:
                tensors = {t.name: t for n in self._imported for t in (*n.inputs, *n.outputs)}
                tensors.update((t.name, t) for t in (*self.inputs, *self.outputs))
            for name in names:
                if name not in tensors and name in initializers:
                    tensors[name] = OnnxImporter.import_tensor(initializers[name])
            self._captures[key] = [tensors[name] for name in names if name in tensors]
            for tensor in self._captures[key]:
                self._capturers.setdefault(id(tensor), []).append(key)

    # -- shapes --------------------------------------------------------------------------------

    def inferred_types(self) -> list[tuple[Variable, Any, Any]]:
        """Run ONNX shape inference with data propagation.

        Large constants take part by type only, so time and memory do not grow with the weights.

        Returns:
            (tensor, dtype, shape) for every tensor about which more is known than it says.

        Raises:
            InvalidModelError: operators contradict each other's types.
        """
        skeleton = self.skeleton()
        put_stand_ins(skeleton)
        # Until opset 9 Constant was declared for floats alone; exporters wrote integers too.
        try:
            inferred = onnx.shape_inference.infer_shapes(
                skeleton, check_type=self.opset >= 9, data_prop=not _has_long_vector(skeleton)
            )
        except Exception as error:  # onnx raises many kinds on messages that contradict themselves
            raise InvalidModelError(f"shape inference failed: {one_line(error)}") from error
        name_kept_sizes(inferred)
        infos = {v.name: v for v in inferred.graph.value_info}
        infos.update({v.name: v for v in inferred.graph.output})
        news: list[tuple[Variable, Any, Any]] = []
        for node in self.nodes.values():
            for tensor in node.outputs:
                info = infos.get(tensor.name)
                if info is None or not isinstance(tensor, Variable):
                    continue
                known = OnnxImporter.import_tensor(info)
                if known.type != "tensor_type":
                    continue
                dtype = tensor.dtype if known.dtype is None else known.dtype
                shape = tensor.shape if known.shape is None else known.shape
                if dtype != tensor.dtype or shape != tensor.shape:
                    news.append((tensor, dtype, shape))
        return news

    def infer_shapes(self) -> None:
        """Let the tensors say what shape inference knows about their dtypes and shapes."""
        for tensor, dtype, shape in self.inferred_types():
            tensor.dtype = dtype
            tensor.shape = shape

    def skeleton(self) -> onnx.ModelProto:
        """The model with its large constants reduced to typed graph inputs."""
        model = self._frame()
        graph = model.graph
        listed = {v.name for v in graph.input}
        for tensor in self.constants():
            stub = self._stub(tensor)
            if isinstance(stub, onnx.TensorProto):
                graph.initializer.append(stub)
            elif stub.name not in listed:
                graph.input.append(stub)
        return model

    def _frame(self) -> onnx.ModelProto:
        """Header, nodes and the value infos of what still exists; no initializers."""
        model = onnx.ModelProto()
        model.CopyFrom(self.header)
        graph = model.graph
        ordered = self.sorted_nodes()
        graph.node.extend(self.node_proto(node) for node in ordered)
        alive = {t.name for n in ordered for t in n.outputs}
        alive.update(t.name for t in self.constants())
        alive.update(self.idle_initializers)
        kept = [v for v in graph.value_info if v.name in alive]
        del graph.value_info[:]
        graph.value_info.extend(kept)
        return model

    def _stub(self, tensor: Constant) -> onnx.TensorProto | onnx.ValueInfoProto:
        if tensor.name in self._sparse:
            sparse = self._sparse[tensor.name]
            return onnx.helper.make_tensor_value_info(
                tensor.name, sparse.values.data_type, list(sparse.dims)
            )
        elements = int(np.prod(tensor.shape, dtype=np.int64))
        if elements <= _SMALL_ELEMENTS:
            return self.tensor_proto(tensor)
        values = tensor._values
        data_type = (
            values.tensor.data_type
            if isinstance(values, LazyValues)
            else onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        )
        return onnx.helper.make_tensor_value_info(tensor.name, data_type, list(tensor.shape))

    # -- export --------------------------------------------------------------------------------

    def without_dense_initializers(self) -> onnx.ModelProto:
        """Everything that is written but the dense initializers, in file order."""
        model = self._frame()
        graph = model.graph
        used = {t.name for t in self.constants()}.union(self.idle_initializers)
        graph.sparse_initializer.extend(t for n, t in self._sparse.items() if n in used)
        if model.ir_version < 4:
            listed = {v.name for v in graph.input}
            graph.input.extend(
                onnx.helper.make_tensor_value_info(proto.name, proto.data_type, list(proto.dims))
                for proto in self.dense_initializers(inline=False)
                if proto.name not in listed
            )
        return model

    def dense_initializers(self, *, inline: bool = True) -> Iterator[onnx.TensorProto]:
        """The dense initializers to write, one at a time; external data stays a stub.

        Loaded ones come first, in file order, then new ones in the order of their first use.

        Args:
            inline: read what was left in the model file; else that is a stub as well.
        """
        for proto in self._dense_initializers():
            yield self._inlined(proto) if inline and external.is_left(proto) else proto

    def _inlined(self, proto: onnx.TensorProto) -> onnx.TensorProto:
        whole = onnx.TensorProto()
        whole.CopyFrom(proto)
        external.inline(whole, self.base_dir)
        return whole

    def _dense_initializers(self) -> Iterator[onnx.TensorProto]:
        used = {t.name: t for t in self.constants() if t.name not in self._sparse}
        idle = set(self.idle_initializers)
        for name, proto in self._initializers.items():
            tensor = used.pop(name, None)
            if tensor is not None:
                yield self.tensor_proto(tensor)
            elif name in idle:
                yield proto
        for tensor in used.values():
            yield self.tensor_proto(tensor)

    def tensor_proto(self, tensor: Constant) -> onnx.TensorProto:
        """The message for *tensor*: the loaded one if untouched (not a copy), else a new one.

        What was left in the model file stays there.
        """
        values = tensor._values
        if isinstance(values, LazyValues):
            if values.tensor.name == tensor.name:
                return values.tensor
            renamed = onnx.TensorProto()
            renamed.CopyFrom(values.tensor)
            renamed.name = tensor.name
            return renamed
        return numpy_helper.from_array(
            np.ascontiguousarray(values).reshape(values.shape), tensor.name
        )

    def to_proto(self) -> onnx.ModelProto:
        """The whole model as one message in memory, with external data loaded."""
        model = self.without_dense_initializers()
        for proto in self.dense_initializers(inline=False):
            self._append(model.graph, proto)
        return model

    def append_constant(self, graph: onnx.GraphProto, tensor: Constant) -> None:
        """Give *graph* an initializer for *tensor*, with external data loaded."""
        if tensor.name in self._sparse:
            graph.sparse_initializer.append(self._sparse[tensor.name])
        else:
            self._append(graph, self.tensor_proto(tensor))

    def _append(self, graph: onnx.GraphProto, proto: onnx.TensorProto) -> None:
        slot = graph.initializer.add()
        slot.CopyFrom(proto)
        external.load(slot, self.base_dir)

    def node_proto(self, node: Node) -> onnx.NodeProto:
        """The message for a live *node*: the loaded one, rewired, with its changed attributes."""
        origin = self._origin.get(id(node))
        if origin is None:
            return OnnxExporter.export_node(node)
        proto = onnx.NodeProto()
        proto.CopyFrom(origin)
        del proto.input[:]
        proto.input.extend(t.name for t in node.inputs)
        del proto.output[:]
        proto.output.extend(t.name for t in node.outputs)
        changed = self.changed_attributes.get(id(node))
        if changed:
            kept = [a for a in proto.attribute if a.name not in changed]
            new = {k: v for k, v in node.attrs.items() if k in changed}
            del proto.attribute[:]
            proto.attribute.extend([*kept, *OnnxExporter.export_attributes(new)])
        return proto

    # -- whole-model facts ---------------------------------------------------------------------

    def unlist_initializers(self) -> int:
        """Treat initializers that are listed as inputs as constants; return how many there were.

        Until IR version 3 every initializer had to be listed, which made all weights formally
        overridable and keeps a runtime from folding them.
        """
        count = len(self.listed)
        if not count:
            return 0
        kept = [v for v in self.header.graph.input if v.name not in self.listed]
        del self.header.graph.input[:]
        self.header.graph.input.extend(kept)
        self.header.ir_version = max(self.header.ir_version, 4)
        self.listed = set()
        return count

    def _externalise(self) -> None:
        for tensor in self._reachable_constants():
            values = tensor._values
            if not isinstance(values, LazyValues) or tensor.name in self._sparse:
                continue
            if external.is_external(values.tensor) or external.is_left(values.tensor):
                tensor._values = _ExternalValues(values.tensor, self.base_dir)


def one_line(error: BaseException) -> str:
    """The message of *error* in one line, without the checker's context dump."""
    text = str(error).split("==> Context")[0]
    return " ".join(text.split()) or type(error).__name__


def _has_long_vector(skeleton: onnx.ModelProto) -> bool:
    """Whether an input has one dimension and millions of elements.

    ONNX's data propagation takes every vector for a shape and spends some 200 bytes per element.
    """
    for value in skeleton.graph.input:
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 1 and dims[0].dim_value > _LONG_VECTOR:
            return True
    return False


def standard_opset(proto: onnx.ModelProto) -> int:
    """Version of the standard operator set *proto* imports, or 0."""
    for entry in proto.opset_import:
        if entry.domain in DEFAULT_DOMAINS:
            return entry.version
    # Before IR version 3 there were no imports, and one operator set.
    return 1 if proto.ir_version < 3 and not proto.opset_import else 0


def _header_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    header = onnx.ModelProto()
    for descriptor, value in proto.ListFields():
        if descriptor.name == "graph":
            continue
        if hasattr(value, "extend"):
            getattr(header, descriptor.name).extend(value)
        else:
            setattr(header, descriptor.name, value)
    skipped = {"node", "initializer", "sparse_initializer"}
    for descriptor, value in proto.graph.ListFields():
        if descriptor.name in skipped:
            continue
        if hasattr(value, "extend"):
            getattr(header.graph, descriptor.name).extend(value)
        else:
            setattr(header.graph, descriptor.name, value)
    return header


def _all_names(proto: onnx.ModelProto) -> Iterator[str]:
    stack: list[onnx.GraphProto] = [proto.graph]
    while stack:
        graph = stack.pop()
        yield from (t.name for t in graph.initializer)
        yield from (t.values.name for t in graph.sparse_initializer)
        yield from (v.name for v in graph.input)
        for node in graph.node:
            yield from (n for n in (node.name, *node.output) if n)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def _captured_names(node: onnx.NodeProto) -> list[str]:
    """Names that the subgraphs of *node* read but do not define, each once."""
    names: dict[str, None] = {}
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
        for graph in graphs:
            names.update(dict.fromkeys(_free_names(graph)))
    return list(names)


def _free_names(graph: onnx.GraphProto) -> Iterator[str]:
    defined = {t.name for t in graph.initializer}
    defined.update(t.values.name for t in graph.sparse_initializer)
    defined.update(v.name for v in graph.input)
    defined.update(name for node in graph.node for name in node.output)
    for node in graph.node:
        for name in (*node.input, *_captured_names(node)):
            if name and name not in defined:
                yield name
    yield from (v.name for v in graph.output if v.name and v.name not in defined)
