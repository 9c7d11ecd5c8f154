"""cache-dit around diffusers' module, eager: its DBCache, which always runs the first block and caches the rest.

The threshold is fitted to the share of the cost that is to remain, for several limits on the steps that are cached in
a row; the limit with the smallest error on a pilot is taken. Warm-up is an eighth of the steps, at most the default
of 8. It caches residuals of blocks of diffusers' module, so it cannot be applied to engines.
"""

from __future__ import annotations

import importlib.util
import logging
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DiTTransformer2DModel

from dyexport.bundle.spec import ModelSpec
from dyexport.flops import FlopsModel
from dyexport.runtime.stock import stock_class

PACKAGE = "cache_dit"
FIRST_BLOCKS = 1  # always computed
MOST_WARMUP = 8
THRESHOLDS = tuple(2.0**power for power in range(-10, 5))
LIMITS = (None, 1, 2, 3, 4, 6)  # on cached steps in a row
NEAR = 0.05  # of the cost that is to remain: what a fit may miss


class CacheSetting(NamedTuple):
    """Threshold on the relative change of a residual, and limit on the steps that are cached in a row."""

    threshold: float
    limit: int | None = None


class Pilot(NamedTuple):
    """Cost of a few samples over that of one dense evaluation, and their error."""

    cost: float
    error: float


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def supports(spec: ModelSpec) -> bool:
    """Return whether the adapter below is of a model's diffusers class."""
    return bool(issubclass(stock_class(spec), DiTTransformer2DModel))


def cached_step_cost(flops: FlopsModel) -> float:
    """Return the cost of a step that runs the first blocks only, over that of a whole one; counts all modulation."""
    first = flops.head_cost[:FIRST_BLOCKS].sum() + flops.group_cost[:FIRST_BLOCKS].sum()
    return float((first + flops.static) / flops.dense)


class CacheDitNetwork:
    """A diffusers DiT under cache-dit; counts the calls that compute all blocks at each step.

    ``warmup`` None is an eighth of the steps.
    """

    def __init__(self, module: Any, steps: int, setting: CacheSetting, warmup: int | None = None) -> None:
        import cache_dit
        from cache_dit.caching.patch_functors import DiTPatchFunctor

        logging.getLogger("cache_dit").setLevel(logging.ERROR)
        self.module = module
        self.device = torch.device("cpu")
        self.computed = np.zeros(steps)
        self.loops = 0
        self._steps = steps
        self._calls = 0
        self._config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=FIRST_BLOCKS,
            Bn_compute_blocks=0,
            residual_diff_threshold=setting.threshold,
            max_continuous_cached_steps=-1 if setting.limit is None else setting.limit,
            max_warmup_steps=min(MOST_WARMUP, steps // 8) if warmup is None else warmup,
            num_inference_steps=steps,
        )
        if not getattr(module, "_context_names", None):
            adapter = cache_dit.BlockAdapter(
                transformer=module,
                blocks=module.transformer_blocks,
                forward_pattern=cache_dit.ForwardPattern.Pattern_3,
                patch_functor=DiTPatchFunctor(),
            )
            cache_dit.enable_cache(adapter, cache_config=self._config)
        self._refresh()

    @property
    def shares(self) -> list[float]:
        """Share of trajectories that computed each step."""
        return (self.computed / max(self.loops, 1)).tolist()

    def __call__(self, **inputs: Any) -> Any:
        output = self.module(**inputs)
        self._calls += 1
        if self._calls == self._steps:
            cached = np.zeros(self._steps)
            cached[self._context().cached_steps] = 1
            self.computed += 1 - cached
            self.loops += 1
            self._refresh()
        return output

    def _context(self) -> Any:
        (name,) = self.module._context_names
        return self.module._context_manager.get_context(name)

    def _refresh(self) -> None:
        import cache_dit

        cache_dit.refresh_context(self.module, cache_config=self._config)
        self._calls = 0


def cost_of(shares: list[float], cached: float) -> float:
    """Return the cost of a trajectory over that of one dense evaluation, from the shares of computed steps."""
    return float(sum(share + (1 - share) * cached for share in shares))


def fitted_setting(pilot: Callable[[CacheSetting], Pilot], target: float) -> CacheSetting:
    """Return the setting with the smallest error among those whose cost is near a target, or the nearest one.

    The cost falls as the threshold rises.
    """
    known = {setting: pilot(setting) for setting in (_nearest(pilot, limit, target) for limit in LIMITS)}
    near = [setting for setting, found in known.items() if abs(found.cost - target) <= NEAR * target]
    if near:
        return min(near, key=lambda setting: known[setting].error)
    return min(known, key=lambda setting: abs(known[setting].cost - target))


def _nearest(pilot: Callable[[CacheSetting], Pilot], limit: int | None, target: float) -> CacheSetting:
    """Return the setting of a limit whose cost is nearest to a target; of equals the lowest threshold."""
    settings = [CacheSetting(threshold, limit) for threshold in THRESHOLDS]
    first = bisect_left(settings, -target, key=lambda setting: -pilot(setting).cost)  # that costs no more
    candidates = settings[max(first - 1, 0) : first + 1]
    return min(candidates, key=lambda setting: (abs(pilot(setting).cost - target), setting.threshold))
