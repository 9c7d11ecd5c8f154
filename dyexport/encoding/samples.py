"""Samples of an encoding, in an order that depends on their contents alone: names of files make no difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dyexport.encoding.buckets import Size
from dyexport.encoding.layout import Picture

WITH_CAPTION = 9  # samples with their caption to one without, for classifier-free guidance


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of the data: a picture, perhaps mirrored, with the digest of its file and the size it is cropped to.

    ``profiled`` is True for a picture that is converted by its color profile.
    """

    picture: Picture
    sha256: str
    size: Size
    profiled: bool = False
    mirrored: bool = False
    caption: str | None = None

    @property
    def pixels(self) -> tuple[Any, ...]:
        """Inputs that the pixels depend on."""
        return self.sha256, *self.size, self.mirrored, self.profiled

    @property
    def key(self) -> tuple[Any, ...]:
        """Inputs that the row depends on."""
        return *self.pixels, self.picture.label, self.caption

    @property
    def place(self) -> tuple[Any, ...]:
        """Place among the samples of one size."""
        return self.picture.label or 0, self.sha256, self.caption or "", self.mirrored


def in_order(samples: Sequence[Sample], sizes: Sequence[Size], unconditional: str | None) -> list[Sample]:
    """Sort samples by size, in the order of ``sizes``, by label and by contents.

    With an ``unconditional`` prompt, one sample in nine is repeated with it.
    """
    ranks = {size: rank for rank, size in enumerate(sizes)}
    ordered = sorted(samples, key=lambda sample: (ranks[sample.size], *sample.place))
    return ordered if unconditional is None else list(_with_unconditional(ordered, unconditional))


def _with_unconditional(samples: Sequence[Sample], prompt: str) -> Iterator[Sample]:
    for place, sample in enumerate(samples):
        yield sample
        if place % WITH_CAPTION == 0:
            yield replace(sample, caption=prompt)
