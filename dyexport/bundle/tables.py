"""Tables that calibration measures and the runtime reads: widths and token counts as functions of t.

Arrays only (numpy and safetensors), so both sides of a bundle can read them without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dyexport.bundle.records import REPLACE
from dyexport.errors import BundleError, EngineMismatchError

BoolArray = np.ndarray
FloatArray = np.ndarray


@dataclass(frozen=True, kw_only=True)
class WidthTable:
    """Heads and MLP groups that are on, as a step function of t (TDW, arXiv 2410.03456 section 3.2).

    Row i holds on the half-open interval [grid[i], grid[i + 1]); the last row holds up to ``end``.
    Rows are split exactly where a router's decision changes, so the table equals the router at every
    t, not only on a grid. No block is ever without a head or without a group.

    grid    (T,) float64, ascending, in units of the value the transformer is called with
    heads   (T, L, H) bool
    groups  (T, L, G) bool
    """

    grid: FloatArray
    end: float
    heads: BoolArray
    groups: BoolArray

    def __post_init__(self) -> None:
        _check_arrays("width table", 1, np.float64, grid=self.grid)
        _check_arrays("width table", 3, np.bool_, heads=self.heads, groups=self.groups)
        rows = len(self.grid)
        if rows == 0 or self.heads.shape[0] != rows or self.groups.shape[0] != rows:
            raise BundleError(
                f"width table: {rows} timesteps, {len(self.heads)} head rows, {len(self.groups)} group rows"
            )
        if self.heads.shape[1] != self.groups.shape[1]:
            raise BundleError(f"width table: {self.heads.shape[1]} blocks of heads, {self.groups.shape[1]} of groups")
        if not (np.diff(self.grid) > 0).all() or not self.grid[-1] < self.end:
            raise BundleError("width table: timesteps must ascend and stay below its end")
        if not (self.heads.any(axis=-1).all() and self.groups.any(axis=-1).all()):
            raise BundleError("width table: every block must have a head and a group on at every t")

    @property
    def start(self) -> float:
        return float(self.grid[0])

    def rows(self, start: float, end: float) -> slice:
        """Return the rows that hold anywhere in [start, end)."""
        return slice(self.row(start), int(np.searchsorted(self.grid, end)))

    def row(self, t: float) -> int:
        """Return the index of the row that holds at ``t``; ``t == end`` belongs to the last row."""
        if not self.start <= t <= self.end:
            raise EngineMismatchError(
                f"timestep {t:g} is outside [{self.start:g}, {self.end:g}], the range this model was built for"
            )
        return int(np.searchsorted(self.grid, t, side="right")) - 1

    def measure(self) -> FloatArray:
        """Return the share of the range of t that each row holds for: (T,), summing to 1."""
        widths = np.diff(np.append(self.grid, self.end))
        return widths / widths.sum()

    def compressed(self) -> WidthTable:
        """Return the same function of t without repeated rows."""
        changes = [True]
        for i in range(1, len(self.grid)):
            same = np.array_equal(self.heads[i], self.heads[i - 1]) and np.array_equal(
                self.groups[i], self.groups[i - 1]
            )
            changes.append(not same)
        keep = np.array(changes)
        return WidthTable(grid=self.grid[keep], end=self.end, heads=self.heads[keep], groups=self.groups[keep])

    def save(self, path: Path) -> None:
        save_file({"grid": self.grid, "end": np.array([self.end]), "heads": self.heads, "groups": self.groups}, path)

    @classmethod
    def load(cls, path: Path) -> WidthTable:
        arrays = _load(path, ("grid", "end", "heads", "groups"))
        end = _number(path, "end", arrays.pop("end"))
        return cls(**arrays, end=end)


@dataclass(frozen=True, kw_only=True)
class UnitOrder:
    """Storage order of units per block: dense indices, those that are on longest first."""

    heads: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, *tables: WidthTable) -> UnitOrder:
        """Order units by how long they are on in all tables, so that the unions of segments tend to be prefixes."""
        heads = np.sum([_time_on(widths, widths.heads) for widths in tables], axis=0)
        groups = np.sum([_time_on(widths, widths.groups) for widths in tables], axis=0)
        return cls(heads=_largest_first(heads), groups=_largest_first(groups))


def _time_on(widths: WidthTable, masks: np.ndarray) -> np.ndarray:
    """Return the measure of t at which each unit is on: (L, U)."""
    return np.tensordot(widths.measure(), masks, axes=1)


def _largest_first(time_on: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(unit) for unit in np.argsort(-row, kind="stable")) for row in time_on)


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """Numbers of tokens that each block's MLP keeps, measured on calibration inputs (SDT, section 3.3).

    grid    (T,) float64: timesteps that were measured
    levels  (Q,) float64: quantile levels over samples, ascending; the last is 1.0 (the maximum)
    counts  (T, L, Q) float64: kept tokens of one sample
    mean    (T, L) float64
    tokens  N, the tokens of a static model
    """

    grid: FloatArray
    levels: FloatArray
    counts: FloatArray
    mean: FloatArray
    tokens: int

    def __post_init__(self) -> None:
        _check_arrays("token counts", 1, np.float64, grid=self.grid, levels=self.levels)
        _check_arrays("token counts", 3, np.float64, counts=self.counts)
        _check_arrays("token counts", 2, np.float64, mean=self.mean)
        shape = (len(self.grid), self.depth, len(self.levels))
        if 0 in shape or self.counts.shape != shape or self.mean.shape != shape[:2]:
            raise BundleError(f"token counts: {self.counts.shape} counts, {self.mean.shape} means, not {shape}")
        if not (np.diff(self.grid) > 0).all() or not (np.diff(self.levels) > 0).all():
            raise BundleError("token counts: timesteps and levels must ascend")
        if not (self._within(self.counts) and self._within(self.mean)):
            raise BundleError(f"token counts: a block keeps between 0 and {self.tokens} tokens")

    @property
    def depth(self) -> int:
        return self.mean.shape[1]

    def _within(self, counts: FloatArray) -> bool:
        return bool(((counts >= 0) & (counts <= self.tokens * (1 + 1e-9))).all())  # counts may have been scaled

    def bracket(self, start: float, end: float) -> slice:
        """Return the grid rows inside [start, end] and the neighbor on each side."""
        low = max(int(np.searchsorted(self.grid, start, side="right")) - 1, 0)
        high = min(int(np.searchsorted(self.grid, end, side="left")), len(self.grid) - 1)
        return slice(low, high + 1)

    def highest(self, start: float, end: float) -> FloatArray:
        """Return the largest kept count of each block over [start, end]: (L,)."""
        return self.counts[self.bracket(start, end), :, -1].max(axis=0)

    def mean_fraction(self, points: Sequence[float] | FloatArray) -> FloatArray:
        """Return the interpolated mean kept share of each block at ``points``: (P, L)."""
        columns = [np.interp(points, self.grid, self.mean[:, block]) for block in range(self.mean.shape[1])]
        return np.stack(columns, axis=1) / self.tokens

    def save(self, path: Path) -> None:
        arrays = {"grid": self.grid, "levels": self.levels, "counts": self.counts, "mean": self.mean}
        save_file({**arrays, "tokens": np.array([self.tokens])}, path)

    @classmethod
    def load(cls, path: Path) -> TokenStats:
        arrays = _load(path, ("grid", "levels", "counts", "mean", "tokens"))
        tokens = int(_number(path, "tokens", arrays.pop("tokens")))
        return cls(**arrays, tokens=tokens)


def _check_arrays(table: str, dimensions: int, dtype: type[np.generic], **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if array.ndim != dimensions or array.dtype != dtype:
            expected = f"{dimensions} dimensions of {dtype.__name__}"
            raise BundleError(f"{table}: {name} must have {expected}, has {array.ndim} of {array.dtype}")
        if not np.isfinite(array).all():
            raise BundleError(f"{table}: {name} has a value that is not finite")


def _number(path: Path, name: str, array: np.ndarray) -> float:
    if array.shape != (1,) or not np.isfinite(array[0]):
        raise BundleError(f"{path}: {name} must be one number")
    return float(array[0])


def _load(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError, KeyError, TypeError) as error:  # the last two for dtypes that numpy lacks
        raise BundleError(f"cannot read {path}: {error}; {REPLACE}") from error
    missing = [name for name in names if name not in arrays]
    if missing:
        raise BundleError(f"{path} lacks {', '.join(missing)}")
    return {name: arrays[name] for name in names}
