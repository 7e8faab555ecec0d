"""What there is to know of each execution provider, one file each, behind :class:`Target`.

Options and their values, what makes a run exact, what to do about its errors, which rewrites and
options to try for it. Nothing else in pwopt asks which provider a target names.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from pwopt.errors import UsageError
from pwopt.runtime.providers.contract import Provider, Remedy, Trouble
from pwopt.runtime.providers.cpu import CPU
from pwopt.runtime.providers.cuda import CUDA

__all__ = ["CPU", "CUDA", "PROVIDERS", "Provider", "Remedy", "Trouble", "find_provider"]

PROVIDERS: Final[Mapping[str, Provider]] = MappingProxyType({p.name: p for p in (CPU, CUDA)})


def find_provider(name: str) -> Provider:
    """The provider that targets call *name*.

    Raises:
        UsageError: there is none.
    """
    if name not in PROVIDERS:
        raise UsageError(f"Provider '{name}' is unknown; choose {' or '.join(PROVIDERS)}.")
    return PROVIDERS[name]
