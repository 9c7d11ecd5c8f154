from __future__ import annotations

import pytest

from dyexport.errors import UsageError
from dyexport.sizes import parse_bytes


def test_sizes() -> None:
    given = {"0": 0, "8GiB": 8 * 2**30, "1.5 MB": 1_500_000, "512k": 512_000, "3ki": 3072}
    assert {text: parse_bytes(text) for text in given} == given
    for text in ("", "8 apples", "-1", "GiB", "1XB"):
        with pytest.raises(UsageError, match="give one such as 8GiB"):
            parse_bytes(text)
