"""What a provider has to say about itself."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

from pwopt.errors import UsageError
from pwopt.target import Target

__all__ = ["OneOf", "Provider", "Read", "Remedy", "Trouble", "flag", "number", "one_of"]

Read = Callable[[str], str | None]
"""Reads the value of an option and returns it as the runtime takes it; ``None`` if it is none."""


def flag(text: str) -> str | None:
    """``"0"`` or ``"1"``, also spelled as words."""
    return {"0": "0", "false": "0", "1": "1", "true": "1"}.get(text.lower())


def number(text: str) -> str | None:
    """A whole number from 0."""
    return str(int(text)) if re.fullmatch(r"\d+", text) else None


@dataclass(frozen=True)
class OneOf:
    """One of *names*, in any case."""

    names: tuple[str, ...]

    def __call__(self, text: str) -> str | None:
        """See :data:`Read`."""
        return next((name for name in self.names if name.lower() == text.lower()), None)


def one_of(*names: str) -> OneOf:
    """A reader of names."""
    return OneOf(names)


class Trouble(Enum):
    """What an error of the runtime concerns."""

    SETUP = "setup"
    """The machine: nothing runs there before it is mended."""
    MEMORY = "memory"
    """A model that is too large."""
    OPTIONS = "options"
    """A model and options that do not go together."""


@dataclass(frozen=True)
class Remedy:
    """What to do about an error of the runtime.

    Attributes:
        pattern: a regular expression; what it matches in the runtime's text is quoted.
        advice: a sentence.
        trouble: what it concerns.
    """

    pattern: str
    advice: str
    trouble: Trouble = Trouble.SETUP


def _nothing(_: ModuleType) -> None:
    return None


@dataclass(frozen=True)
class Provider:
    """An execution provider.

    Attributes:
        name: what targets call it.
        runtime_name: what ONNX Runtime calls it.
        extra: the extra of pwopt that brings it.
        describe: the device that a target names, in words: all that its speed depends on.
        options: provider options by name, with what reads their values.
        is_device: whether it is a device beside the CPU: values are copied to its memory and
            back, and the CPU runs what it does not.
        device_type: where its tensors live, in ONNX Runtime's words.
        exact_options: options that make it compute as precisely as it can.
        exact_environment: variables that do the same for a whole process, where the options
            leave gaps.
        coarse: what *exact_options* turn off, in words; ``""`` if there is no such thing.
        capture_option: the option that replays a recorded run; ``None`` if there is none.
        roofline: what differs from a typical x86 core in estimates without a clock, by the names
            of :class:`pwopt.cost.Machine`.
        passes: specs of passes that run by default, or otherwise than by default.
        trials: options worth trying, one choice each, the likeliest first.
        remedies: what to do about its errors, the most specific first.
        prepare: what to do before a session is opened.
        diagnose: why it does not start, in the words of whatever fails; ``None`` if unknown.
    """

    name: str
    runtime_name: str
    extra: str
    describe: Callable[[Target], str]
    options: Mapping[str, Read] = field(default_factory=dict)
    is_device: bool = False
    device_type: str = "cpu"
    exact_options: Mapping[str, str] = field(default_factory=dict)
    exact_environment: Mapping[str, str] = field(default_factory=dict)
    coarse: str = ""
    capture_option: str | None = None
    roofline: Mapping[str, Any] = field(default_factory=dict)
    passes: tuple[str, ...] = ()
    trials: tuple[Mapping[str, str], ...] = ()
    remedies: tuple[Remedy, ...] = ()
    prepare: Callable[[ModuleType], None] = _nothing
    diagnose: Callable[[ModuleType], str | None] = _nothing

    def checked_options(self, given: Mapping[str, str]) -> dict[str, str]:
        """*given* with every value as the runtime takes it.

        Raises:
            UsageError: an option does not exist or does not take its value.
        """
        checked = {}
        for key, text in given.items():
            read = self.options.get(key)
            if read is None:
                raise UsageError(self._unknown(key))
            value = read(str(text))
            if value is None:
                raise UsageError(
                    f"Provider option {key} of {self.runtime_name} does not take '{text}';"
                    f" it takes {_takes(read)}."
                )
            checked[key] = value
        return checked

    def captures(self, options: Mapping[str, str]) -> bool:
        """Whether a session with *options* records its run and replays it."""
        return self.capture_option is not None and options.get(self.capture_option) == "1"

    def is_coarse(self, options: Mapping[str, str]) -> bool:
        """Whether a session with *options* may compute less precisely than it could."""
        return any(options.get(key) != value for key, value in self.exact_options.items())

    def remedy(self, text: str) -> tuple[str, Remedy] | None:
        """What *text*, an error of the runtime, complains about, and what to do."""
        for remedy in self.remedies:
            match = re.search(remedy.pattern, text)
            if match:
                return match[0], remedy
        return None

    def _unknown(self, key: str) -> str:
        if not self.options:
            return f"{self.runtime_name} takes no provider options, so not '{key}'."
        near = difflib.get_close_matches(key, self.options, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(self.options)}."
        return f"{self.runtime_name} has no provider option '{key}'; {hint}"


def _takes(read: Read) -> str:
    """What *read* takes, in words."""
    if read is flag:
        return "0 or 1"
    if read is number:
        return "a whole number"
    assert isinstance(read, OneOf)
    return ", ".join(read.names)
