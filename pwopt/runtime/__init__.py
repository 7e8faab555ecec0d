"""The runtime floor: sessions, inputs, verification, paired latency and profiles.

The only importer of ``onnxruntime``, which is loaded on first use and not on import.
"""

from __future__ import annotations

from pwopt.runtime.deviation import OutputDeviation, compare_outputs
from pwopt.runtime.inputs import (
    UnsupportedInputError,
    concrete_shapes,
    input_sets,
    load_inputs,
    make_inputs,
)
from pwopt.runtime.measure import (
    Comparison,
    Copies,
    Latency,
    compare,
    mean_interval,
    measure,
    measure_copies,
    median_interval,
)
from pwopt.runtime.placement import PlacedNode, Placement
from pwopt.runtime.profile import NodeTime, Profile, profile
from pwopt.runtime.session import (
    ExecutionError,
    Feeds,
    Interface,
    MissingKernelError,
    OutOfMemoryError,
    Outputs,
    Session,
    TensorSpec,
    UntestableError,
    Value,
    load_onnxruntime,
    open_session,
    reference_target,
    resolve,
    verification_target,
)
from pwopt.runtime.verify import (
    Reference,
    Verification,
    interface_difference,
    rounding_floor,
)

__all__ = [
    "Comparison",
    "Copies",
    "ExecutionError",
    "Feeds",
    "Interface",
    "Latency",
    "MissingKernelError",
    "NodeTime",
    "OutOfMemoryError",
    "OutputDeviation",
    "Outputs",
    "PlacedNode",
    "Placement",
    "Profile",
    "Reference",
    "Session",
    "TensorSpec",
    "UnsupportedInputError",
    "UntestableError",
    "Value",
    "Verification",
    "compare",
    "compare_outputs",
    "concrete_shapes",
    "input_sets",
    "interface_difference",
    "load_inputs",
    "load_onnxruntime",
    "make_inputs",
    "mean_interval",
    "measure",
    "measure_copies",
    "median_interval",
    "open_session",
    "profile",
    "reference_target",
    "resolve",
    "rounding_floor",
    "verification_target",
]
