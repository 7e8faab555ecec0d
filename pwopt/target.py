"""The machine and runtime a model is optimized for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Target"]


@dataclass(frozen=True)
class Target:
    """An execution provider on a device, with its options.

    Attributes:
        provider: ``"cpu"`` or ``"cuda"``.
        threads: intra-op threads; 0 means the runtime's default (all physical cores).
        provider_options: passed to the execution provider as they are.
        input_shapes: concrete shapes, by input name, that fix dynamic dimensions for measuring
            and verifying; the written model keeps them dynamic.
        device: processor or GPU model; filled in by :func:`pwopt.runtime.resolve`.
        ort: ONNX Runtime version; filled in by :func:`pwopt.runtime.resolve`.
        allow_fallback: accept that the CPU runs what the provider does not, or all of it if the
            provider does not start; otherwise that is an error.
    """

    provider: str = "cpu"
    threads: int = 0
    provider_options: Mapping[str, str] = field(default_factory=dict, hash=False)
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    device: str = ""
    ort: str = ""
    allow_fallback: bool = False

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that a measurement on this target depends on."""
        identity = {
            "provider": self.provider,
            "threads": self.threads,
            "provider_options": dict(sorted(self.provider_options.items())),
            "input_shapes": {k: list(v) for k, v in sorted(self.input_shapes.items())},
            "device": self.device,
            "ort": self.ort,
            "allow_fallback": self.allow_fallback,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
