"""Reader of a diffusers ``config.json``. Imports no torch."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

from dyexport.errors import CheckpointError

MOST_LAYERS = 1000
MOST_CHANNELS = 1_000_000  # of anything that is counted


class StoredConfig:
    """Arguments of a stock class in a checkpoint's configuration. Missing ones have the class's defaults.

    All methods raise ``CheckpointError`` naming the key, its value and what is supported.
    """

    def __init__(self, stored: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.stored, self.defaults = stored, defaults

    def value(self, name: str) -> Any:
        """Return the stored value, or the default."""
        return self.stored.get(name, self.defaults.get(name))

    def shown(self, name: str) -> str:
        """Describe the value for a message."""
        return reprlib.repr(self.value(name)) + ("" if name in self.stored else " where it is not given")

    def refuse(self, name: str, supported: str) -> NoReturn:
        """Raise the error for a value."""
        raise CheckpointError(f"{name} is {self.shown(name)}; supported: {supported}")

    def expect(self, name: str, *supported: Any) -> None:
        """Refuse any value but the supported ones."""
        if not any(_same(self.value(name), value) for value in supported):
            self.refuse(name, " or ".join(map(repr, supported)))

    def count(self, name: str, most: int = MOST_CHANNELS) -> int:
        """Return a whole number of 1 or more."""
        value = self.value(name)
        if type(value) is not int or not 1 <= value <= most:
            self.refuse(name, f"a whole number from 1 to {most}")
        return value

    def counts(self, name: str) -> tuple[int, ...]:
        """Return a list of whole numbers of 1 or more."""
        values = self.value(name)
        if not isinstance(values, list | tuple) or not all(type(v) is int and 1 <= v <= MOST_CHANNELS for v in values):
            self.refuse(name, "a list of whole numbers")
        return tuple(values)

    def flag(self, name: str) -> bool:
        """Return true or false."""
        value = self.value(name)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def number(self, name: str, least: float, most: float) -> float:
        """Return a finite number in [least, most]."""
        value = self.value(name)
        valid = type(value) in (int, float) and least <= value <= most
        if not valid:
            self.refuse(name, f"a number from {least:g} to {most:g}")
        return float(value) if isinstance(value, float) else value

    def out_channels(self, in_channels: int) -> int:
        """Return the output channels; stock classes put out as many as they take in where nothing else is said."""
        return in_channels if self.value("out_channels") is None else self.count("out_channels")

    def hidden_size(self, multiple: int) -> int:
        """Return channels of all heads together."""
        size = self.count("num_attention_heads", MOST_LAYERS) * self.count("attention_head_dim")
        if size % multiple:
            self.refuse("attention_head_dim", f"one that makes the hidden size, {size}, a multiple of {multiple}")
        return size


def _same(value: Any, supported: Any) -> bool:
    return type(value) is type(supported) and value == supported
