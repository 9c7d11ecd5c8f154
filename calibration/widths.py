"""Widths as a function of t: read from trained routers, or chosen without training, to meet a FLOPs budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dyexport.bundle.tables import WidthTable
from dyexport.errors import BudgetError
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.importance import PROBES, unit_importance
from dyexport.models.inputs import NoisedInputs
from dyexport.progress import Progress, no_progress

SAMPLES = 4096  # timesteps at which routers are read before their switching points are refined
TOLERANCE = 0.01  # largest accepted distance between lambda as run and the budget
SHIFTS = 8
IMPORTANCE_POINTS = 32


@torch.no_grad()
def read_widths(model: DynamicTransformer, timestep_range: tuple[float, float]) -> WidthTable:
    """Read the routers' decisions as a step function of t, its steps exact to fp32 resolution by bisection.

    The end of the range is a timestep too: flow matching starts there. A gate that switches on and off again between
    two of the ``SAMPLES`` timesteps is not seen.
    """
    if model.table is not None:
        return model.table.compressed()
    start, end = timestep_range
    coarse = np.linspace(start, end, SAMPLES + 1, dtype=np.float32)
    masks = _gates(model, coarse)  # (S, U)
    cells, units = np.nonzero(masks[1:] != masks[:-1])
    breaks = _bisect(model, coarse, masks, cells, units).astype(np.float64)
    last = (float(np.nextafter(np.float32(end), np.float32(start))) + end) / 2  # between the last two values of fp32
    breaks = np.minimum(breaks, last)  # a gate may switch at the end itself
    grid = np.unique(np.concatenate([[start], breaks]).astype(np.float64))
    middles = (grid + np.append(grid[1:], end)) / 2  # at the steps themselves rounding would decide
    heads, groups = _split(_gates(model, middles.astype(np.float32)), model)
    return WidthTable(grid=grid, end=end, heads=heads, groups=groups).compressed()


def _bisect(
    model: DynamicTransformer, coarse: np.ndarray, masks: np.ndarray, cells: np.ndarray, units: np.ndarray
) -> np.ndarray:
    """Return the first fp32 timestep at which each listed unit has its new value: (n,)."""
    low, high = coarse[cells].copy(), coarse[cells + 1].copy()
    before = masks[cells, units]
    while True:
        middle = ((low.astype(np.float64) + high) / 2).astype(np.float32)
        open_ = (middle > low) & (middle < high)
        if not open_.any():
            return high
        changed = np.zeros(len(cells), bool)
        changed[open_] = _gates(model, middle[open_])[np.arange(int(open_.sum())), units[open_]] != before[open_]
        high = np.where(open_ & changed, middle, high)
        low = np.where(open_ & ~changed, middle, low)


def _gates(model: DynamicTransformer, timesteps: np.ndarray) -> np.ndarray:
    """Return router decisions, heads of all blocks, then groups: (T,) -> (T, L * (H + G)) bool."""
    rows = []
    for chunk in np.array_split(timesteps, max(len(timesteps) // 1024, 1)):
        heads, groups = model.width_logits(torch.from_numpy(chunk).to(model.device))
        rows.append(torch.cat([heads.flatten(1), groups.flatten(1)], dim=1) > 0)
    return torch.cat(rows).cpu().numpy()


def _split(masks: np.ndarray, model: DynamicTransformer) -> tuple[np.ndarray, np.ndarray]:
    heads, groups = np.split(masks, [model.depth * model.heads], axis=1)
    rows = len(masks)
    return heads.reshape(rows, model.depth, model.heads), groups.reshape(rows, model.depth, model.groups)


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """Token router logits on calibration inputs: ``logits`` (P, L, B * N) at ``points`` (P,)."""

    points: np.ndarray
    logits: np.ndarray

    def kept(self, shift: float) -> np.ndarray:
        """Return the mean kept share if ``shift`` is added to every logit: (P, L)."""
        return (self.logits + shift > 0).mean(axis=-1)


def trajectory_points(timestep_range: tuple[float, float], count: int) -> np.ndarray:
    """Return the midpoints of ``count`` equal cells, a model of a sampler's timesteps for any number of steps."""
    start, end = timestep_range
    return start + (np.arange(count) + 0.5) * (end - start) / count


@torch.no_grad()
def sample_tokens(
    model: DynamicTransformer, inputs: NoisedInputs, points: np.ndarray, progress: Progress = no_progress
) -> TokenSample:
    """Run the masked model over the trajectory and return its token logits."""
    chunks = inputs.chunks(points.tolist(), progress)
    logits = torch.cat([model(inputs.over(chunk, device=model.device)).token_logits.cpu() for chunk in chunks])
    sampled = logits.unflatten(0, (len(points), -1))  # (P, B, L, N)
    return TokenSample(points=points, logits=sampled.transpose(1, 2).flatten(2).numpy())


def flops_ratio(table: WidthTable, kept_tokens: np.ndarray, points: np.ndarray, flops: FlopsModel) -> float:
    """Return lambda as run: the mean over ``points`` (P,) with kept token shares (P, L)."""
    rows = [table.row(float(t)) for t in points]
    heads, groups = table.heads[rows].mean(axis=-1), table.groups[rows].mean(axis=-1)
    return float(flops.flops_ratio(heads, groups, kept_tokens).mean())


def meet_budget(
    model: DynamicTransformer,
    inputs: NoisedInputs,
    budget: float,
    flops: FlopsModel,
    progress: Progress = no_progress,
) -> None:
    """Shift every router's logits by one constant, so that lambda as run equals ``budget``.

    The shift goes into the routers' biases. Skipping tokens changes the inputs of later routers, so the
    shift is refined until the masked model itself is within ``TOLERANCE`` / 4. Tokens whose router has a dead
    ReLU share one logit and switch at once. If the ratio jumps over the budget for that reason, the last rounds
    shift the width routers only. Static widths get nearest to the budget in one round. Raises ``BudgetError``.
    """
    if model.router == "static":
        _meet_static(model, budget, flops)
        return
    points = trajectory_points(inputs.preset.timestep_range, 16)
    fine = trajectory_points(inputs.preset.timestep_range, 512).astype(np.float32)
    ratio = float("nan")
    for attempt in range(SHIFTS):
        sample = sample_tokens(model, inputs, points, progress)
        measure = partial(_ratio_at, widths=_width_shares(model, fine), sample=sample, points=fine, flops=flops)
        ratio = measure(0.0, tokens=True)
        if abs(ratio - budget) <= TOLERANCE / 4:
            return
        tokens = attempt < SHIFTS // 2
        amount = _solve(partial(measure, tokens=tokens), budget)
        for router in model.block_routers:
            router.shift(amount, tokens=tokens)
    if abs(ratio - budget) > TOLERANCE:
        raise _not_met(budget, ratio)


def _not_met(budget: float, ratio: float) -> BudgetError:
    error = BudgetError(
        f"budget {budget:g} cannot be met by shifting these routers (nearest {ratio:.3f}); "
        "fine-tune under that budget for longer, or build without --budget"
    )
    error.nearest = ratio
    return error


def _meet_static(model: DynamicTransformer, budget: float, flops: FlopsModel) -> None:
    """Shift the logits of static widths. Raises ``BudgetError``."""
    logits = _width_shares(model, np.zeros(1, np.float32))  # (1, L, U) each
    ratio = partial(_width_ratio, logits, flops)
    amount = _nearest(ratio, logits, budget)
    if abs(ratio(amount) - budget) > _tolerance(model, flops):
        raise _not_met(budget, ratio(amount))
    for router in model.block_routers:
        router.shift(amount, tokens=False)


def _tolerance(model: DynamicTransformer, flops: FlopsModel) -> float:
    """Return the largest accepted distance between lambda and the budget.

    Static widths are a whole number of units, so half of the costliest unit is accepted where that is more.
    """
    if model.router != "static":
        return TOLERANCE
    units = np.concatenate([flops.head_cost / model.heads, flops.group_cost / model.groups])
    return max(TOLERANCE, float(units.max()) / flops.gated / 2)


def _width_ratio(logits: tuple[np.ndarray, np.ndarray], flops: FlopsModel, shift: float) -> float:
    """Return lambda with every token if ``shift`` is added to the width logits, (P, L, U) each."""
    heads, groups = ((units + shift > 0).mean(axis=-1) for units in logits)  # (P, L)
    return float(flops.flops_ratio(heads, groups, np.ones_like(heads)).mean())


def _nearest(ratio: Callable[[float], float], logits: tuple[np.ndarray, np.ndarray], budget: float) -> float:
    """Return the shift with the ratio nearest to ``budget``, midway between two of the logits."""
    edges = np.unique(np.concatenate([units[np.isfinite(units)] for units in logits]))  # ascending
    edges = np.concatenate([edges[:1] - 1, edges, edges[-1:] + 1])
    shifts = -(edges[:-1] + edges[1:]) / 2
    distances = [abs(ratio(float(shift)) - budget) for shift in shifts]
    return float(shifts[np.argmin(distances)])


@torch.no_grad()
def _width_shares(model: DynamicTransformer, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    heads, groups = model.width_logits(torch.from_numpy(points).to(model.device))
    return heads.cpu().numpy(), groups.cpu().numpy()


def _ratio_at(
    shift: float,
    *,
    tokens: bool,
    widths: tuple[np.ndarray, np.ndarray],
    sample: TokenSample,
    points: np.ndarray,
    flops: FlopsModel,
) -> float:
    """Return lambda if ``shift`` is added to the width logits (P, L, U), and with ``tokens`` to the token logits."""
    heads, groups = ((logits + shift > 0).mean(axis=-1) for logits in widths)  # (P, L) each
    kept = sample.kept(shift if tokens else 0.0)
    nearest = np.abs(points[:, None] - sample.points[None]).argmin(axis=1)
    return float(flops.flops_ratio(heads, groups, kept[nearest]).mean())


def _solve(ratio: Callable[[float], float], budget: float) -> float:
    """Solve ``ratio(x) = budget`` for an increasing function by bisection."""
    low, high = -64.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) < budget else (low, middle)
    return (low + high) / 2


def choose_widths(
    model: DynamicTransformer,
    inputs: NoisedInputs,
    budget: float,
    flops: FlopsModel,
    *,
    count: int = IMPORTANCE_POINTS,
    probes: int = PROBES,
    progress: Progress = no_progress,
) -> WidthTable:
    """Choose widths for a model without trained routers: the most important units per FLOP at each t.

    A unit is on where its importance (``unit_importance``) per multiply-add exceeds a threshold. One threshold
    serves the whole trajectory, the one that meets the budget. All tokens run. Importance is measured at ``count``
    timesteps, and averaged over them for static widths. Raises ``BudgetError``.
    """
    points = trajectory_points(inputs.preset.timestep_range, count)
    heads, groups = unit_importance(model, inputs, points.tolist(), probes, progress)  # (T, L, H), (T, L, G)
    if model.router == "static":
        heads, groups = (values.mean(axis=0, keepdims=True) for values in (heads, groups))  # T is 1 from here on
    nested = model.router == "ordered"
    scores = (
        _scores(heads, flops.head_cost / model.heads, nested=nested),
        _scores(groups, flops.group_cost / model.groups, nested=nested),
    )
    ratio = partial(_width_ratio, scores, flops)
    if model.router == "static":
        shift = _nearest(ratio, scores, budget)
    else:
        middle = -float(np.median(np.concatenate([units[np.isfinite(units)] for units in scores])))
        shift = middle + _solve(lambda amount: ratio(middle + amount), budget)
    kept_heads, kept_groups = (units + shift > 0 for units in scores)
    table = WidthTable(
        grid=np.linspace(*inputs.preset.timestep_range, len(kept_heads), endpoint=False),
        end=inputs.preset.timestep_range[1],
        heads=kept_heads,
        groups=kept_groups,
    )
    reached = flops_ratio(table, np.ones((count, model.depth)), points, flops)
    if abs(reached - budget) > _tolerance(model, flops):
        raise BudgetError(
            f"budget {budget:g} cannot be met with whole heads and groups (nearest {reached:.3f}); raise it"
        )
    return table.compressed()


def _scores(importance: np.ndarray, costs: np.ndarray, *, nested: bool) -> np.ndarray:
    """Compute the log of importance (T, L, U) per multiply-add of a unit (L,): (T, L, U).

    The best unit of every block gets +inf: it is never off. With ``nested`` units are on in one order at every t.
    """
    scores: np.ndarray = np.log(importance / costs[:, None] + np.finfo(np.float32).tiny)
    if nested:
        scores = _nested(scores)
    best = scores.mean(axis=0).argmax(axis=-1)  # (L,)
    scores[:, np.arange(len(best)), best] = np.inf
    return scores


def _nested(scores: np.ndarray) -> np.ndarray:
    """Reassign the scores at each t to units in the order of their mean scores, so that masks nest: (T, L, U)."""
    ranks = (-scores.mean(axis=0)).argsort(axis=-1, kind="stable").argsort(axis=-1)  # (L, U)
    descending = -np.sort(-scores, axis=-1)  # (T, L, U)
    return np.take_along_axis(descending, np.broadcast_to(ranks, scores.shape), axis=-1)
