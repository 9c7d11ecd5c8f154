"""Widths of a bundle over t and depth, prepared for drawing: in a terminal, as a picture, or in a page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dyexport.bundle.reader import Bundle

Array = np.ndarray

RAMP = ((13, 8, 65), (84, 2, 163), (185, 50, 137), (237, 121, 83), (240, 249, 33))
"""Colors from off (dark) to on (yellow). Lightness rises evenly, so the ramp reads without color vision and in gray."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Shares (L, P) in [0, 1] of one kind of unit that are on in each block, at each of P timesteps."""

    title: str
    values: Array

    @property
    def caption(self) -> str:
        return f"{self.title}: {self.values.mean():.0%} on"


@dataclass(frozen=True, kw_only=True)
class WidthMap:
    """Heat maps of heads, groups and, with token routers, kept tokens over equal cells of the range of t.

    ``timesteps`` are the middles of the cells, in the order in which sampling visits them: noise first. ``segments``
    are the indices of the engines that serve them.
    """

    maps: tuple[HeatMap, ...]
    timesteps: tuple[float, ...]
    segments: tuple[int, ...]
    noise: float
    data: float

    @classmethod
    def of(cls, bundle: Bundle, points: int) -> WidthMap:
        timesteps = cells(bundle, points)
        noise, data = bundle.manifest.model.noise_to_data
        return cls(
            maps=tuple(heat_maps(bundle, timesteps)),
            timesteps=tuple(timesteps),
            segments=tuple(bundle.manifest.plan.segment_for(t) for t in timesteps),
            noise=noise,
            data=data,
        )

    @property
    def depth(self) -> int:
        return self.maps[0].values.shape[0]

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Cells that are the first of the next engine."""
        pairs = enumerate(zip(self.segments, self.segments[1:], strict=False), start=1)
        return tuple(place for place, (before, after) in pairs if before != after)

    @property
    def axis(self) -> str:
        return f"t = {self.noise:g} (noise) to t = {self.data:g} (data)"


def cells(bundle: Bundle, points: int) -> list[float]:
    """Return midpoints of ``points`` equal cells, in the order in which sampling visits them: noise first."""
    noise, data = bundle.manifest.model.noise_to_data
    return [float(t) for t in noise + (np.arange(points) + 0.5) * (data - noise) / points]


def heat_maps(bundle: Bundle, timesteps: list[float]) -> list[HeatMap]:
    """Compute the share of heads, groups and, with token routers, kept tokens of each block at some timesteps."""
    widths, stats = bundle.widths, bundle.token_stats
    rows = [widths.row(t) for t in timesteps]
    maps = [
        HeatMap(title="attention heads", values=widths.heads[rows].mean(axis=-1).T),
        HeatMap(title="MLP groups", values=widths.groups[rows].mean(axis=-1).T),
    ]
    if stats is not None:
        maps.append(HeatMap(title="MLP tokens", values=stats.mean_fraction(timesteps).T))
    return maps


def color(value: float) -> tuple[int, int, int]:
    """Interpolate the color ramp at a value in [0, 1]."""
    channels = np.array(RAMP, dtype=float).T  # (3, R)
    red, green, blue = (round(np.interp(value * (len(RAMP) - 1), range(len(RAMP)), channel)) for channel in channels)
    return red, green, blue
