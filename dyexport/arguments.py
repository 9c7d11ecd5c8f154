"""Numbers that callers pass, checked alike for Python, the command line and the server. Imports no torch."""

from __future__ import annotations

import math
import operator
import re
from typing import Any

from dyexport.errors import UsageError

STEPS = 1000  # that the noise of training is spread over
GUIDANCE = 1000.0  # far beyond what any model draws anything with, and far below what overflows
SEEDS = 2**63  # as many as an INT64 holds
SIDE_MULTIPLE = 16  # pixels; a VAE makes one latent of 8 x 8, a patch is 2 x 2 latents
PIXELS = 4096 * 4096
SAMPLES = 10_000  # drawn in one batch
SHOWN = 40  # characters of a value in a message


def whole_number(name: str, value: Any, *, least: int, most: int, cure: str | None = None) -> int:
    """``value`` as an int. Raises ``UsageError`` for a fraction, a truth value, a text, or a number out of range."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        raise UsageError(f"{name} is {shown(value)}; {cure or f'give a whole number from {least} to {most}'}")
    return number


def real_number(name: str, value: Any, *, least: float, most: float, cure: str | None = None) -> float:
    """``value`` as a float. Raises ``UsageError`` for what is not a number, not finite, or out of range."""
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of torch, for several numbers
        number = math.nan
    if not least <= number <= most:
        raise UsageError(f"{name} is {shown(value)}; {cure or f'give a number from {least:g} to {most:g}'}")
    return number


def check_steps(value: Any, name: str = "steps", most: int = STEPS) -> int:
    """Denoising steps."""
    return whole_number(name, value, least=1, most=most)


def check_guidance(value: Any, name: str = "guidance") -> float:
    """Scale of classifier-free guidance."""
    cure = f"give a number from {-GUIDANCE:g} to {GUIDANCE:g}, 1 being none"
    return real_number(name, value, least=-GUIDANCE, most=GUIDANCE, cure=cure)


def check_seed(value: Any, name: str = "seed") -> int:
    """Check a seed of random numbers: an INT64 at most, on every surface."""
    return whole_number(name, value, least=0, most=SEEDS - 1, cure="give 0 or more, below 2**63")


def check_side(value: Any, name: str) -> int:
    """Height or width of a picture, in pixels."""
    cure = f"give a multiple of {SIDE_MULTIPLE}"
    side = whole_number(name, value, least=SIDE_MULTIPLE, most=PIXELS // SIDE_MULTIPLE, cure=cure)
    if side % SIDE_MULTIPLE:
        raise UsageError(f"{name} is {side}; {cure}")
    return side


def check_pixels(height: int, width: int, most: int, who: str) -> None:
    """The area of a picture; ``who`` draws up to ``most``."""
    if height * width > most:
        raise UsageError(f"{height} x {width} are {height * width} pixels; {who} draws up to {most}")


def shown(value: Any) -> str:
    """A value in a message, cut where it is long."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except ValueError:  # an int of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


MOST_BYTES = 2**63 - 1


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 8GiB or 500MB; raises ``UsageError`` for what is none."""
    found = re.fullmatch(r"(\d{1,19}(?:\.\d{1,19})?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"memory {shown(text)!r} is not a size; give one such as 8GiB")
    number, prefix, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if size > MOST_BYTES:
        raise UsageError(f"memory is {shown(text)}, more than any machine has; give a size such as 8GiB")
    return size


def check_memory(memory: Any) -> int:
    """Bytes, given as such or in a text such as 8GiB. Raises ``UsageError``."""
    if isinstance(memory, str):
        return parse_bytes(memory)
    return whole_number("memory", memory, least=0, most=MOST_BYTES, cure="give bytes, or a size such as '8GiB'")
