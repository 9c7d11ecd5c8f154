from __future__ import annotations

import pytest

from dyexport.arguments import parse_bytes
from dyexport.errors import UsageError


def test_sizes() -> None:
    given = {"0": 0, "8GiB": 8 * 2**30, "1.5 MB": 1_500_000, "512k": 512_000, "3ki": 3072}
    assert {text: parse_bytes(text) for text in given} == given
    for text in ("", "8 apples", "-1", "GiB", "1XB"):
        with pytest.raises(UsageError, match="give one such as 8GiB"):
            parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 400, "9999999999TiB", "9" * 19 + "." + "9" * 19 + "TB"])
def test_sizes_that_no_machine_has(text: str) -> None:
    with pytest.raises(UsageError, match="such as 8GiB"):
        parse_bytes(text)
