"""Sizes as people write them."""

from __future__ import annotations

import re
from typing import Any

from dyexport.arguments import shown, whole_number
from dyexport.errors import UsageError

MOST = 2**63 - 1


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 8GiB or 500MB; raises ``UsageError`` for what is none."""
    found = re.fullmatch(r"(\d{1,19}(?:\.\d{1,19})?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"memory {shown(text)!r} is not a size; give one such as 8GiB")
    number, prefix, binary = found.groups()
    size = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    if size > MOST:
        raise UsageError(f"memory is {shown(text)}, more than any machine has; give a size such as 8GiB")
    return size


def check_memory(memory: Any) -> int:
    """Bytes, given as such or in a text such as 8GiB. Raises ``UsageError``."""
    if isinstance(memory, str):
        return parse_bytes(memory)
    return whole_number("memory", memory, least=0, most=MOST, cure="give bytes, or a size such as '8GiB'")
