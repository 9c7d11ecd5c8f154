"""Scores of heads and MLP groups: importance per multiply-add, relative to the threshold that meets a budget."""

from __future__ import annotations

from functools import partial

import numpy as np

from dyexport.calibration.shifts import nearest_shift, solve_shift, width_ratio
from dyexport.flops import FlopsModel
from dyexport.models.dynamic import DynamicTransformer


def budget_logits(
    model: DynamicTransformer,
    importance: tuple[np.ndarray, np.ndarray],
    budget: float,
    flops: FlopsModel,
    *,
    ranked: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Compute logits that are positive for the most important units per multiply-add: (T, L, H), (T, L, G).

    ``importance`` is that of ``unit_importance``, of the same shapes. One threshold for all units and timesteps meets
    the budget. The best unit of a block has +inf: it is never off. If units are ``ranked`` that is unit 0. For static
    widths importance is averaged over t first, and T is 1.
    """
    if model.router == "static":
        importance = (importance[0].mean(axis=0, keepdims=True), importance[1].mean(axis=0, keepdims=True))
    costs = (flops.head_cost / model.heads, flops.group_cost / model.groups)  # (L,) each
    heads, groups = (
        _scores(values, cost, nested=model.router == "ordered", ranked=ranked)
        for values, cost in zip(importance, costs, strict=True)
    )
    ratio = partial(width_ratio, (heads, groups), flops)
    if model.router == "static":
        shift = nearest_shift(ratio, (heads, groups), budget)
    else:
        middle = -float(np.median(np.concatenate([units[np.isfinite(units)] for units in (heads, groups)])))
        shift = middle + solve_shift(lambda amount: ratio(middle + amount), budget)
    return heads + shift, groups + shift


def _scores(importance: np.ndarray, costs: np.ndarray, *, nested: bool, ranked: bool) -> np.ndarray:
    """Compute the log of importance (T, L, U) per multiply-add of a unit (L,): (T, L, U).

    The best unit of every block gets +inf. With ``nested`` units are on in one order at every t, the first ones of the
    block first if they are ``ranked``.
    """
    scores: np.ndarray = np.log(importance / costs[:, None] + np.finfo(np.float32).tiny)
    if nested:
        ranks = np.arange(scores.shape[-1]) if ranked else (-scores.mean(axis=0)).argsort(-1, kind="stable").argsort(-1)
        scores = _nested(scores, np.broadcast_to(ranks, scores.shape))
    best = np.zeros(scores.shape[1], np.int64) if ranked else scores.mean(axis=0).argmax(axis=-1)  # (L,)
    scores[:, np.arange(len(best)), best] = np.inf
    return scores


def _nested(scores: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Reassign the scores at each t to units in the order of their ranks, so that masks nest: (T, L, U)."""
    return np.take_along_axis(-np.sort(-scores, axis=-1), ranks, axis=-1)
