"""A network and its approximation, run side by side from one convolution to the next."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from pwopt.calibration.moments import Gatherer, total_rows
from pwopt.calibration.samples import Samples
from pwopt.errors import UsageError
from pwopt.graph import ConvFacts, Facts, Model, ModelProto, Node, Rewriter, Tensor, parse
from pwopt.graph.extract import extract
from pwopt.runtime import Feeds, open_session
from pwopt.target import Target

__all__ = ["SideBySide", "Station"]

Array: TypeAlias = npt.NDArray[Any]

_IN_MEMORY: Final = 1 << 30
"""Bytes of intermediate values that are kept in memory; what is more goes to files."""
_BATCH_BYTES: Final = 64 << 20
_LEAST_ROWS: Final = 40_000
_ROWS_PER_SIZE: Final = 25


@dataclass(frozen=True, eq=False)
class Station:
    """A convolution that both networks have arrived at.

    Attributes:
        site: its name.
        conv: its facts, in the original.
        weight, bias: of the original.
        addend: the tensor that the result is added to and nothing else is done with, if it is
            known already.
        slope: of the Relu or LeakyRelu that follows at once, for negative values; ``None``: none
            does.
    """

    site: str
    conv: ConvFacts
    weight: Array
    bias: Array
    addend: Tensor | None
    slope: float | Array | None


class SideBySide:
    """Both networks with the values between them, as far as they have come.

    Every convolution among the sites is a station, in an order in which each comes after all that
    it depends on, and after what its result will be added to where that is possible. What lies
    between two stations is run for all samples at once, batch by batch, and only once; values that
    no approximated kernel has touched are shared.
    """

    def __init__(
        self,
        proto: ModelProto,
        sites: Iterable[str],
        samples: Samples,
        target: Target,
        scratch: Path,
        rng: np.random.Generator,
    ) -> None:
        """Set out with *samples*.

        Args:
            proto: the original, with its BatchNormalizations folded.
            sites: names of the convolutions to stop at.
            samples: to run.
            target: threads to run with; always on the CPU.
            scratch: folder for files.
            rng: draws positions.
        """
        self._models = {False: _typed(proto), True: _typed(proto)}
        self._rewriter = Rewriter(self._models[True])
        self._facts = Facts(self._models[False])
        self._sites = set(sites)
        self._samples = samples
        self._target = Target(threads=target.threads)
        self._rng = rng
        self._folder = tempfile.TemporaryDirectory(dir=scratch)
        self._values = _Values(Path(self._folder.name))
        self._twins = _by_output(self._models[True])
        self._changed: set[str] = set()
        """Tensors that the two networks disagree about."""
        self._sizes: list[int] = []

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(self, *_: object) -> None:
        self._values.clear()
        self._folder.cleanup()

    def stations(
        self, on_progress: Callable[[int, int], None] = lambda *_: None
    ) -> Iterator[Station]:
        """Go on to the next site, again and again; ends with the last one."""
        self._feed()
        model = self._models[False]
        left = {id(n): n for n in model.sorted_nodes()}
        known = {t.name for t in model.inputs}
        waiting = [n for n in left.values() if self._is_site(n)]
        total = len(waiting)
        while waiting:
            between = self._runnable(left, known)
            for node in between:
                del left[id(node)]
            self._run(between, left)
            station_node = next(n for n in waiting if self._is_ready(n, known))
            waiting = [n for n in waiting if n is not station_node]
            on_progress(total - len(waiting) - 1, total)
            self._run_site(station_node)
            yield self._station(station_node, known)
            del left[id(station_node)]
            self._arrive(station_node, left)
            known.update(t.name for t in station_node.outputs)
        on_progress(total, total)

    def observe(
        self,
        station: Station,
        *,
        symmetric: bool = False,
        plain: bool = False,
        keeps_rows: bool = False,
    ) -> Gatherer:
        """Moments at a station.

        Args:
            station: the latest one.
            symmetric: patches of the original, not of the approximation.
            plain: targets are the original's results even where the approximation of what they
                are added to could be made up for.
            keeps_rows: whether some positions are kept as they are.
        """
        conv = station.conv
        gatherer = Gatherer(
            conv,
            station.weight,
            sum(self._sizes),
            total_rows(conv, _LEAST_ROWS, _ROWS_PER_SIZE),
            self._rng,
            keeps_rows=keeps_rows,
        )
        for batch, size in enumerate(self._sizes):
            x = self._value(conv.input, batch, approximated=not symmetric)
            target = self._value(conv.output, batch, approximated=False)
            if station.addend is not None and not plain and not symmetric:
                right = self._value(station.addend, batch, approximated=False)
                target = target + right - self._value(station.addend, batch, approximated=True)
            rows = min(size, len(x))
            gatherer.add(x[:rows], target[:rows])
        return gatherer

    def replace(self, station: Station, weight: Array, bias: Array) -> None:
        """From here on the approximation has this kernel at the station."""
        node = self._twins[station.conv.output.name]
        dtype = station.weight.dtype
        values = weight.reshape(station.weight.shape).astype(dtype)
        self._rewriter.set_weight(node, 1, values)
        self._rewriter.set_weight(node, 2, bias.astype(dtype))
        self._changed.add(station.conv.output.name)

    # -- running -------------------------------------------------------------------------------

    def _feed(self) -> None:
        largest = max(_bytes(feeds) for feeds in self._samples.take([0]).batches(1))
        size = max(1, min(64, _BATCH_BYTES // max(1, 40 * largest)))
        for index, batch in enumerate(self._samples.stream(size)):
            self._sizes.append(batch.size)
            for name, value in batch.feeds.items():
                self._values.put((name, False, index), np.asarray(value))

    def _runnable(self, left: Mapping[int, Node], known: set[str]) -> list[Node]:
        """All nodes but sites that can run now, in order; their results become known."""
        found = []
        for node in left.values():
            if not self._is_site(node) and self._is_ready(node, known):
                found.append(node)
                known.update(t.name for t in node.outputs)
        return found

    def _is_site(self, node: Node) -> bool:
        return self._facts.site(node) in self._sites and self._facts.is_op(node, "Conv")

    def _is_ready(self, node: Node, known: set[str]) -> bool:
        reads = self._models[False].reads(node)
        return all(t.is_empty() or t.name in known or self._facts.is_constant(t) for t in reads)

    def _run(self, nodes: Sequence[Node], left: Mapping[int, Node]) -> None:
        """Run *nodes* in both networks, and forget what none of those *left* will read."""
        if nodes:
            read = {t.name for n in nodes for t in self._models[False].reads(n)}
            wanted = {t.name for n in left.values() for t in self._models[False].reads(n)}
            self._execute(nodes, wanted, approximated=False)
            if read & self._changed:
                twins = [self._twins[n.outputs[0].name] for n in nodes]
                made = self._execute(twins, wanted, approximated=True)
                self._changed.update(made)
            self._values.keep_only(wanted)

    def _run_site(self, node: Node) -> None:
        self._execute([node], {node.outputs[0].name}, approximated=False)

    def _arrive(self, node: Node, left: Mapping[int, Node]) -> None:
        """Run the site in the approximation, unless it is the same there."""
        name = node.outputs[0].name
        if name in self._changed or node.inputs[0].name in self._changed:
            self._changed.add(name)
            self._execute([self._twins[name]], {name}, approximated=True)
        wanted = {t.name for n in left.values() for t in self._models[False].reads(n)}
        self._values.keep_only(wanted)

    def _execute(self, nodes: Sequence[Node], wanted: set[str], *, approximated: bool) -> set[str]:
        """Run *nodes* of one network over all batches; returns the names of what is kept."""
        model = self._models[approximated]
        proto = extract(model, nodes)
        made = {value.name for value in proto.graph.output} & wanted
        if not made:
            return made
        path = Path(self._folder.name) / "between.onnx"
        path.write_bytes(proto.SerializeToString())
        with open_session(path, self._target) as session:
            names = [spec.name for spec in session.interface.inputs]
            for batch in range(len(self._sizes)):
                feeds: Feeds = {n: self._named(n, batch, approximated) for n in names}
                for name, value in session.run(feeds).items():
                    if name in made:
                        self._values.put((name, approximated, batch), np.asarray(value))
        return made

    def _value(self, tensor: Tensor, batch: int, *, approximated: bool) -> Array:
        return self._named(tensor.name, batch, approximated)

    def _named(self, name: str, batch: int, approximated: bool) -> Array:
        return self._values.get((name, approximated and name in self._changed, batch))

    # -- looking -------------------------------------------------------------------------------

    def _station(self, node: Node, known: set[str]) -> Station:
        facts = self._facts
        conv = facts.conv(node)
        weight = None if conv is None else facts.constant(conv.weight)
        if conv is None or weight is None or conv.pads is None:
            raise UsageError(f"'{facts.site(node)}' is no convolution with a constant kernel")
        bias = facts.constant(conv.bias)
        if bias is None:
            bias = np.zeros(conv.cout, weight.dtype)
        reader = facts.sole_consumer(conv.output)
        addend = self._addend(conv, reader, known)
        return Station(facts.site(node), conv, weight, bias, addend, self._slope(reader))

    def _addend(self, conv: ConvFacts, reader: Node | None, known: set[str]) -> Tensor | None:
        """What the result is added to, if it is known already."""
        facts = self._facts
        if reader is None or not facts.is_op(reader, "Add", "Sum") or len(reader.inputs) != 2:
            return None
        other = next((t for t in reader.inputs if t is not conv.output), None)
        shapes = facts.shape(conv.output), facts.shape(other)
        if other is None or other.name not in known or None in shapes or shapes[0] != shapes[1]:
            return None
        return other

    def _is_clipped_at_zero(self, node: Node) -> bool:
        """Whether it is a Clip from 0 on; its upper end, as of Relu6, is rarely met."""
        facts = self._facts
        if not facts.is_op(node, "Clip"):
            return False
        if facts.opset < 11:
            return facts.attr_float(node, "min", -1.0) == 0
        return facts.scalar(facts.input(node, 1)) == 0

    def _slope(self, node: Node | None) -> float | Array | None:
        facts = self._facts
        if node is None:
            return None
        if facts.is_op(node, "Relu") or self._is_clipped_at_zero(node):
            return 0.0
        if facts.is_op(node, "LeakyRelu"):
            return facts.attr_float(node, "alpha", 0.01)
        if facts.is_op(node, "PRelu"):
            values = facts.constant(facts.input(node, 1))
            return None if values is None else values.reshape(-1).astype(np.float64)
        return None


class _Values:
    """Arrays by tensor, network and batch; in files when there are too many."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[tuple[str, bool, int], Array | Path] = {}
        self._bytes = 0
        self._serial = 0

    def put(self, key: tuple[str, bool, int], value: Array) -> None:
        if self._bytes + value.nbytes <= _IN_MEMORY:
            self._held[key] = value
            self._bytes += value.nbytes
            return
        self._serial += 1
        path = self._folder / f"{self._serial}.npy"
        np.save(path, value, allow_pickle=False)
        self._held[key] = path

    def get(self, key: tuple[str, bool, int]) -> Array:
        held = self._held[key]
        return np.load(held, allow_pickle=False) if isinstance(held, Path) else held

    def keep_only(self, names: set[str]) -> None:
        for key in [key for key in self._held if key[0] not in names]:
            self._drop(key)

    def clear(self) -> None:
        for key in list(self._held):
            self._drop(key)

    def _drop(self, key: tuple[str, bool, int]) -> None:
        held = self._held.pop(key)
        if isinstance(held, Path):
            held.unlink()
        else:
            self._bytes -= held.nbytes


def _typed(proto: ModelProto) -> Model:
    model = parse(proto)
    model.infer_shapes()
    return model


def _by_output(model: Model) -> dict[str, Node]:
    return {t.name: n for n in model.nodes.values() for t in n.outputs if not t.is_empty()}


def _bytes(feeds: Feeds) -> int:
    return sum(np.asarray(value).nbytes for value in feeds.values())
