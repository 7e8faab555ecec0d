"""Samples that the caller feeds, put down in a temporary file so that they can be read again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pwopt.calibration.source import Array, Truth, digest_of
from pwopt.calibration.store import Place, Store
from pwopt.calibration.table import Table
from pwopt.errors import UsageError
from pwopt.runtime import TensorSpec

__all__ = ["Spool", "spool"]


@dataclass(frozen=True, eq=False)
class Spool:
    """Samples in a temporary file.

    Attributes:
        store: holds the arrays.
        inputs: per sample, where its inputs lie.
        targets: per sample, where its target lies; empty if there are none.
        truth: what is known of all of them.
        constants: inputs that serve all samples.
    """

    store: Store
    inputs: Sequence[Mapping[str, Place]]
    targets: Sequence[Place]
    truth: Truth
    constants: Mapping[str, Array]

    def __len__(self) -> int:
        return len(self.inputs)

    def read(self, index: int) -> dict[str, Array]:
        """The inputs of a sample."""
        return {name: self.store.get(place) for name, place in self.inputs[index].items()}

    def target(self, index: int) -> Array:
        """The target of a sample."""
        return self.store.get(self.targets[index])

    def digest(self, index: int) -> bytes:
        """Digest of everything known of a sample but its label."""
        arrays = [self.store.get(place) for _, place in sorted(self.inputs[index].items())]
        arrays += [array for _, array in sorted(self.constants.items())]
        if self.targets:
            arrays.append(self.target(index))
        return digest_of(arrays)


def spool(feeds: Iterable[Mapping[str, Any]], specs: Sequence[TensorSpec]) -> Spool:
    """Read *feeds* once, sample by sample, into a temporary file.

    Args:
        feeds: each is a :class:`Table` of any number of samples.
        specs: the model's inputs.

    Raises:
        UsageError: a name, shape or type is not the model's, or only some feeds have labels.
    """
    store = Store()
    inputs: list[dict[str, Place]] = []
    targets: list[Place] = []
    labels: list[Array] = []
    constants: dict[str, Array] = {}
    kinds = set()
    for number, feed in enumerate(feeds):
        where = f"feed {number}"
        table = Table.of({name: np.asarray(value) for name, value in feed.items()}, specs, where)
        inputs += [
            {name: store.put(array[index], where) for name, array in table.inputs.items()}
            for index in range(len(table))
        ]
        if table.targets is not None:
            targets += [store.put(target, where) for target in table.targets]
        if table.labels is not None:
            labels.append(table.labels)
        constants |= table.constants
        kinds.add((table.labels is None, table.targets is None))
    if len(kinds) > 1:
        raise UsageError("Some of the feeds have labels or targets and others do not.")
    truth = Truth(np.concatenate(labels) if labels else None, has_targets=bool(targets))
    return Spool(store, inputs, targets, truth, constants)
