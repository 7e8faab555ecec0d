"""Every change of a model goes through here: one name allocator, one undo log.

An operation costs time proportional to what it touches, and so does taking it back, so a pass
stays linear in the size of the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from onnx_graphsurgeon.ir.tensor import LazyValues

from pwopt.graph.model import Constant, Model, Node, Shape, Tensor, Variable

__all__ = ["Rewriter"]

_NOTHING = np.empty(0, np.uint8)

Attribute = int | float | str | Sequence[int] | Sequence[float] | np.ndarray[Any, Any]


class Rewriter:
    """Changes a :class:`Model`, and can take every change back.

    Tensors keep their names: to replace what computes a tensor, :meth:`remove` its producer and
    :meth:`add` a node that writes to the same tensor. Weights are shared between nodes, so they
    are replaced (:meth:`set_weight`) and never changed in place.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._undo: list[Callable[[], None]] = []
        self._touched: dict[int, Node] = {}
        self._loosened: dict[int, Tensor] = {}
        self._events: list[tuple[int, bool, Node]] = []

    # -- transactions --------------------------------------------------------------------------

    def mark(self) -> int:
        """A point to roll back to."""
        return len(self._undo)

    def rollback(self, mark: int) -> None:
        """Take back everything since *mark*, in time proportional to it."""
        while len(self._undo) > mark:
            self._undo.pop()()
        while self._events and self._events[-1][0] >= mark:
            self._events.pop()
        self._touched.clear()
        self._loosened.clear()

    def changes(self, mark: int) -> tuple[list[Node], list[Node]]:
        """Nodes (removed, added) since *mark*; one that was added and removed again is neither."""
        removed: dict[int, Node] = {}
        added: dict[int, Node] = {}
        first = len(self._events)
        while first and self._events[first - 1][0] >= mark:
            first -= 1
        for _, is_new, node in self._events[first:]:
            if is_new:
                added[id(node)] = node
            elif added.pop(id(node), None) is None:
                removed[id(node)] = node
        return list(removed.values()), list(added.values())

    def take_touched(self) -> list[Node]:
        """Live nodes that were added, rewired or changed, or stand next to such a change.

        Each call starts a new list. The driver looks at these again, since a rewrite may expose
        another. A tensor that no node computes is represented by the first node that reads it.
        """
        found: dict[int, Node] = {}
        for node in self._touched.values():
            found[id(node)] = node
            for tensor in node.inputs:
                found.update((id(n), n) for n in _representatives(tensor))
            for tensor in node.outputs:
                found.update((id(n), n) for n in tensor.outputs)
        for tensor in self._loosened.values():
            found.update((id(n), n) for n in _representatives(tensor))
        self._touched.clear()
        self._loosened.clear()
        return [n for n in found.values() if id(n) in self.model.nodes]

    def revisit(self, node: Node) -> None:
        """Have the driver look at *node* again, though it stands further off than next door."""
        self._touched[id(node)] = node

    # -- new things ----------------------------------------------------------------------------

    def name(self, hint: str) -> str:
        """A name that no tensor or node bears, made from *hint*."""
        names = self.model.names
        serial = names.get(hint, 0)
        candidate = hint
        while candidate in names:
            serial += 1
            candidate = f"{hint}_{serial}"
        if candidate != hint:
            before = names[hint]
            names[hint] = serial
            self._undo.append(lambda: names.__setitem__(hint, before))
        names[candidate] = 0
        self._undo.append(lambda: names.__delitem__(candidate))
        return candidate

    def variable(self, hint: str, like: Tensor | None = None, shape: Shape | None = None) -> Tensor:
        """A new tensor.

        Args:
            hint: the base of its name.
            like: take dtype (and, without *shape*, the shape) from this tensor.
            shape: its shape, where known.
        """
        dtype = like.dtype if like is not None else None
        if shape is None and like is not None and like.shape is not None:
            shape = tuple(like.shape)
        return Variable(self.name(hint), dtype=dtype, shape=shape)

    def constant(self, hint: str, values: np.ndarray[Any, Any]) -> Tensor:
        """A new initializer holding *values* (not copied: hand over an array of your own)."""
        return self._constant(self.name(hint), values)

    def _constant(self, name: str, values: np.ndarray[Any, Any] | LazyValues) -> Constant:
        """A new constant, which lets go of *values* when it is taken back.

        Graphsurgeon's tensors refer to themselves, so that those taken back would hold their
        values until the garbage collector looks at everything.
        """
        tensor = Constant(name, values)
        self._undo.append(lambda: setattr(tensor, "_values", _NOTHING))
        return tensor

    def add(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        attrs: Mapping[str, Attribute] | None = None,
        *,
        near: Node,
        domain: str | None = None,
    ) -> Node:
        """Add a node.

        Args:
            op: operator type.
            inputs: input tensors; ``None`` stands for an omitted optional one.
            outputs: tensors without a producer.
            attrs: attributes, spelled as in ONNX.
            near: the node whose place it takes in the file and whose name it borrows.
            domain: operator domain; ``None`` is the standard one.
        """
        model = self.model
        node = Node(
            op,
            self.name(f"{near.name or near.outputs[0].name}/{op}"),
            dict(attrs or {}),
            [t if t is not None else Variable.empty() for t in inputs],
            list(outputs),
            domain,
        )
        serial = model.serial
        model.place(node, near)
        model.enlist(node)

        def undo() -> None:
            _unlink(node)
            model.delist(node)
            model.serial = serial

        self._events.append((len(self._undo), True, node))
        self._undo.append(undo)
        self._touch(node)
        return node

    # -- changes -------------------------------------------------------------------------------

    def remove(self, node: Node) -> None:
        """Take *node* out; its outputs are left without a producer."""
        for tensor in node.outputs:
            self._touched.update((id(n), n) for n in tensor.outputs)
        self._loosen(node.inputs)
        places = _unlink(node)
        self.model.delist(node)

        def undo() -> None:
            self.model.enlist(node)
            _relink(node, places)

        self._events.append((len(self._undo), False, node))
        self._undo.append(undo)

    def set_input(self, node: Node, index: int, tensor: Tensor) -> None:
        """Let input *index* of *node* read *tensor*."""
        old = node.inputs[index]
        place = _drop(old.outputs, node)
        list.__setitem__(node.inputs, index, tensor)
        list.append(tensor.outputs, node)

        def undo() -> None:
            _drop(tensor.outputs, node)
            list.__setitem__(node.inputs, index, old)
            list.insert(old.outputs, place, node)

        self._undo.append(undo)
        self._loosen([old])
        self._touch(node)

    def set_inputs(self, node: Node, tensors: Sequence[Tensor | None]) -> None:
        """Replace all inputs of *node*, whose number may change."""
        before = list(node.inputs)
        after = [t if t is not None else Variable.empty() for t in tensors]
        gone, new = _surplus(before, after), _surplus(after, before)
        places = [_drop(t.outputs, node) for t in gone]
        list.__setitem__(node.inputs, slice(None), after)
        for tensor in new:
            list.append(tensor.outputs, node)

        def undo() -> None:
            for tensor in reversed(new):
                _drop(tensor.outputs, node)
            list.__setitem__(node.inputs, slice(None), before)
            for tensor, place in zip(reversed(gone), reversed(places), strict=True):
                list.insert(tensor.outputs, place, node)

        self._undo.append(undo)
        self._loosen(gone)
        self._touch(node)

    def set_weight(self, node: Node, index: int, values: np.ndarray[Any, Any]) -> None:
        """Let input *index* of *node* be a new initializer with *values*; others keep the old one.

        An input that is absent so far (a Conv without bias) is added.
        """
        old = node.inputs[index] if index < len(node.inputs) else None
        hint = old.name if old is not None and old.name else f"{node.name or node.op}/{index}"
        tensor = self.constant(hint, values)
        if old is not None:
            self.set_input(node, index, tensor)
            return
        self.set_inputs(node, [*node.inputs, *[None] * (index - len(node.inputs)), tensor])

    def set_attribute(self, node: Node, key: str, value: Attribute | None) -> None:
        """Set attribute *key* of *node*, or remove it with ``None``."""
        before = node.attrs
        changed = self.model.changed_attributes
        keys = changed.get(id(node), frozenset())
        after = {k: v for k, v in before.items() if k != key}
        if value is not None:
            after[key] = value
        node.attrs = after
        changed[id(node)] = keys | {key}

        def undo() -> None:
            node.attrs = before
            changed[id(node)] = keys

        self._undo.append(undo)
        self._touch(node)

    def redirect(self, old: Tensor, new: Tensor) -> None:
        """Let every live consumer of *old* read *new* instead.

        *old* must be neither a graph output nor read by a subgraph: those go by its name.
        """
        for node in {id(n): n for n in old.outputs}.values():
            for index, tensor in enumerate(list(node.inputs)):
                if tensor is old:
                    self.set_input(node, index, new)

    def bypass(self, node: Node, source: Tensor) -> bool:
        """Remove *node*, whose first output equals *source*; return whether that was possible.

        Consumers read *source*. A graph output keeps its name: then the producer of *source* takes
        the name over, if nothing else stands in the way (*source* is a graph input, an output
        itself, or captured by a subgraph).
        """
        model = self.model
        target = node.outputs[0]
        if not model.can_bypass(target, source):
            return False
        self.remove(node)
        if not model.is_output(target):
            self.redirect(target, source)
            return True
        producer = next(p for p in source.inputs if id(p) in model.nodes)
        self.set_output(
            producer, next(i for i, t in enumerate(producer.outputs) if t is source), target
        )
        self.redirect(source, target)
        return True

    def freeze(self, node: Node, values: Sequence[np.ndarray[Any, Any] | Constant | None]) -> None:
        """Replace *node* by initializers that bear the names of its outputs.

        Args:
            node: none of its outputs is a graph output or captured by a subgraph.
            values: per output an array (not copied), a constant whose data is shared, or ``None``
                where nothing reads the output.
        """
        self.remove(node)
        for tensor, value in zip(list(node.outputs), values, strict=True):
            if value is not None:
                data = value._values if isinstance(value, Constant) else value
                self.redirect(tensor, self._constant(tensor.name, data))

    def set_output(self, node: Node, index: int, tensor: Tensor) -> None:
        """Let output *index* of *node* write *tensor*, which has no producer."""
        old = node.outputs[index]
        _swap_output(node, index, tensor)
        self._undo.append(lambda: _swap_output(node, index, old))
        self._touch(node)

    def infer_shapes(self) -> None:
        """Refine dtypes and shapes by ONNX shape inference; undone like any other change."""
        for tensor, dtype, shape in self.model.inferred_types():
            self._undo.append(partial(_set_type, tensor, tensor.dtype, tensor.shape))
            _set_type(tensor, dtype, shape)

    def import_domain(self, domain: str, version: int) -> None:
        """Let the model use the operators of *domain*, in *version* unless it imports another."""
        imports = self.model.header.opset_import
        if any(entry.domain == domain for entry in imports):
            return
        imports.add(domain=domain, version=version)
        self._undo.append(lambda: imports.__delitem__(-1))

    def drop_idle_initializers(self) -> int:
        """Forget initializers that nothing reads; return how many there were."""
        model = self.model
        idle = model.idle_initializers
        if idle:
            model.idle_initializers = []
            self._undo.append(lambda: setattr(model, "idle_initializers", idle))
        return len(idle)

    def _touch(self, node: Node) -> None:
        self._touched[id(node)] = node

    def _loosen(self, tensors: Iterable[Tensor]) -> None:
        self._loosened.update((id(t), t) for t in tensors)


def _representatives(tensor: Tensor) -> list[Node]:
    """The nodes that are to look at *tensor*: its producers, or else its first reader."""
    if isinstance(tensor, Constant):
        return []
    return tensor.inputs or tensor.outputs[:1]


def _surplus(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Those of *tensors* that *others* lacks, counting repeated ones."""
    left = Counter(id(t) for t in others)
    surplus: list[Tensor] = []
    for tensor in tensors:
        left[id(tensor)] -= 1
        if left[id(tensor)] < 0:
            surplus.append(tensor)
    return surplus


# Graphsurgeon's own list operations compare nodes by value, which is slow and can hit an equal
# sibling; these work by identity. They look at the end, where an undo finds what was appended, and
# then from the start, where passes that go forward find early consumers. Undoing puts a node back
# into its place, so a list is as it was.


def _set_type(tensor: Variable, dtype: Any, shape: Any) -> None:
    tensor.dtype = dtype
    tensor.shape = shape


def _drop(items: list[Node], node: Node) -> int:
    """Take *node* out, and return where it was."""
    if items and items[-1] is node:
        list.pop(items)
        return len(items)
    for index, item in enumerate(items):
        if item is node:
            list.__delitem__(items, index)
            return index
    raise AssertionError(f"'{node.name}' is not linked where it should be")


def _swap_output(node: Node, index: int, tensor: Tensor) -> None:
    _drop(node.outputs[index].inputs, node)
    list.__setitem__(node.outputs, index, tensor)
    list.append(tensor.inputs, node)


def _unlink(node: Node) -> list[int]:
    """Cut all edges of *node*; return its places in the lists of the tensors around it."""
    places = [_drop(tensor.outputs, node) for tensor in node.inputs]
    places += [_drop(tensor.inputs, node) for tensor in node.outputs]
    return places


def _relink(node: Node, places: Sequence[int]) -> None:
    ends = [t.outputs for t in node.inputs] + [t.inputs for t in node.outputs]
    for items, place in zip(reversed(ends), reversed(places), strict=True):
        list.insert(items, place, node)
