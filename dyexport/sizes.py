"""Sizes as people write them."""

from __future__ import annotations

import re

from dyexport.errors import UsageError


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 8GiB or 500MB; raises ``UsageError`` for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"memory {text!r} is not a size; give one such as 8GiB")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
