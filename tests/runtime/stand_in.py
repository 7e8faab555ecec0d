"""A device that is none: ONNX Runtime's CPU provider, treated like one with its own memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest

from pwopt.runtime import Session, providers, runs
from pwopt.runtime.profile import profile_events
from pwopt.runtime.providers import Provider
from pwopt.runtime.providers.contract import flag, one_of

__all__ = ["DEVICE", "place_elsewhere", "use_stand_in"]

DEVICE = Provider(
    "device",
    "CPUExecutionProvider",
    "pwopt[device]",
    lambda target: "a stand-in",
    options={"exact": flag, "replay": flag, "mode": one_of("quick", "slow")},
    is_device=True,
    exact_options={"exact": "1"},
    coarse="rough arithmetic",
    capture_option="replay",
    trials=({"mode": "slow"}, {"replay": "1"}),
)


def use_stand_in(monkeypatch: pytest.MonkeyPatch, provider: Provider = DEVICE) -> None:
    """Let targets name *provider* while a test runs."""
    known = MappingProxyType({**providers.PROVIDERS, provider.name: provider})
    monkeypatch.setattr(providers, "PROVIDERS", known)


def place_elsewhere(
    monkeypatch: pytest.MonkeyPatch, falls: Callable[[Mapping[str, Any]], bool]
) -> None:
    """Let real profiles say that nodes of which *falls* is true ran on another provider."""

    def events(session: Session) -> list[Mapping[str, Any]]:
        return [elsewhere(e) if falls(e) else e for e in profile_events(session)]

    monkeypatch.setattr(runs, "profile_events", events)


def elsewhere(event: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**event, "args": {**event["args"], "provider": "OtherExecutionProvider"}}
