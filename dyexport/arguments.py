"""Checks of numbers that callers pass, the same in Python, on the command line and in the server. Imports no torch."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence, Sized
from typing import Any

from dyexport.errors import UsageError

STEPS = 1000  # noise levels of training
GUIDANCE = 1000.0  # far beyond any useful scale, and far below overflow
SEEDS = 2**63  # non-negative values of an INT64
SIDE_MULTIPLE = 16  # pixels: a VAE maps 8 x 8 of them to one latent, and a patch is 2 x 2 latents
PIXELS = 4096 * 4096
SAMPLES = 10_000  # in one batch, at most
MOST_BYTES = 2**63 - 1
SHOWN = 40  # characters of a value in a message


def whole_number(name: str, value: Any, *, least: int, most: int, cure: str | None = None) -> int:
    """Return ``value`` as an int. Raises ``UsageError`` for a fraction, a bool, a string, or a number out of range."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise UsageError(f"{name} is {shown(value)}; {cure or f'give a whole number from {least} to {most}'}")
    return number


def real_number(name: str, value: Any, *, least: float, most: float, cure: str | None = None) -> float:
    """Return ``value`` as a float. Raises ``UsageError`` if it is not a number, not finite, or out of range."""
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (
        TypeError,
        ValueError,
        OverflowError,
        RuntimeError,
    ):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if not least <= number <= most:
        raise UsageError(f"{name} is {shown(value)}; {cure or f'give a number from {least:g} to {most:g}'}")
    return number


def check_steps(value: Any, name: str = "steps", most: int = STEPS) -> int:
    """Check a number of denoising steps."""
    return whole_number(name, value, least=1, most=most)


def check_guidance(value: Any, name: str = "guidance") -> float:
    """Check a guidance scale. A negative one would sample away from the label or the prompt."""
    return real_number(name, value, least=0, most=GUIDANCE, cure=f"give a number from 0 to {GUIDANCE:g}, 1 being none")


def check_budget(value: Any, name: str = "budget") -> float:
    """Check a FLOPs ratio."""
    return real_number(name, value, least=1e-6, most=1, cure="give a FLOPs ratio in (0, 1], such as 0.5")


def check_seed(value: Any, name: str = "seed") -> int:
    """Check a seed of random numbers, a non-negative INT64."""
    return whole_number(name, value, least=0, most=SEEDS - 1, cure="give 0 or more, below 2**63")


def check_batch(labels: Sequence[int]) -> None:
    """Check that class labels are a list, and their number."""
    if not isinstance(labels, Sized):
        raise UsageError(f"labels are {shown(labels)}; give a list of classes, such as [3, 7]")
    if len(labels) > SAMPLES:
        raise UsageError(f"there are {len(labels)} labels; give up to {SAMPLES} at a time")


def check_labels(labels: Sequence[int], classes: int) -> None:
    """Check the class labels of a batch."""
    check_batch(labels)
    for label in labels:
        try:
            known = 0 <= operator.index(label) <= classes
        except TypeError:  # text or a fraction
            known = False
        if not known:
            raise UsageError(f"labels must be in [0, {classes}], {classes} being no class: {shown(label)}")


def check_side(value: Any, name: str) -> int:
    """Check the height or width of a picture, in pixels."""
    cure = f"give a multiple of {SIDE_MULTIPLE}"
    side = whole_number(name, value, least=SIDE_MULTIPLE, most=PIXELS // SIDE_MULTIPLE, cure=cure)
    if side % SIDE_MULTIPLE:
        raise UsageError(f"{name} is {side}; {cure}")
    return side


def check_pixels(height: int, width: int, most: int, who: str) -> None:
    """Check the area of a picture. ``who`` is the subject of the message, and accepts up to ``most`` pixels."""
    if height * width > most:
        raise UsageError(f"{height} x {width} are {height * width} pixels; {who} accepts up to {most}")


def check_device(value: Any) -> str:
    """Return the name of a device: ``cpu``, ``cuda`` or ``cuda:N``. Raises ``UsageError`` for any other."""
    name = str(value)
    if re.fullmatch(r"cpu|cuda(?::\d{1,4})?", name) is None:
        raise UsageError(f"unknown device {shown(name)!r}; use cpu, cuda or cuda:N")
    return name


def shown(value: Any) -> str:
    """Return a value for a message, cut if it is long."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # an int of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def parse_bytes(text: str) -> int:
    """Parse a size such as 8GiB or 500MB into bytes. Raises ``UsageError``.

    ``pydantic.ByteSize`` is not used: it reads 8.GiB as 8 bytes and 8bit as one byte.
    """
    size = re.fullmatch(r"(\d{1,19}(?:\.\d{1,19})?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if size is None:
        raise UsageError(f"memory {shown(text)!r} is not a size; give one such as 8GiB")
    number, prefix, binary = size.groups()
    count = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if count > MOST_BYTES:
        raise UsageError(f"memory is {shown(text)}, more than any machine has; give a size such as 8GiB")
    return count


def check_memory(memory: Any) -> int:
    """Return bytes, from a number or a string such as 8GiB. Raises ``UsageError``."""
    if isinstance(memory, str):
        return parse_bytes(memory)
    return whole_number("memory", memory, least=0, most=MOST_BYTES, cure="give bytes, or a size such as '8GiB'")
