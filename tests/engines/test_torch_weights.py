"""Ranges of the weight store that engines of AOTInductor map."""

from __future__ import annotations

from pathlib import Path

from dyexport.engines.base import WeightSpan
from dyexport.engines.torch_weights import merged


def test_overlapping_weights_are_one_range() -> None:
    def span(offset: int, length: int, name: str = "a") -> WeightSpan:
        return WeightSpan(path=Path(name), offset=offset, length=length)

    whole, prefix, apart, inner = span(0, 100), span(0, 40), span(100, 50), span(120, 10)
    other = span(0, 10, "b")
    assert merged([prefix, whole, inner, apart, other]) == {
        whole: whole,
        prefix: whole,
        apart: apart,
        inner: apart,
        other: other,
    }
    assert merged([span(0, 60), span(50, 50)])[span(50, 50)] == span(0, 100)
