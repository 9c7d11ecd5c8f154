"""cache-dit around diffusers' module, eager: its DBCache, which always runs the first block and caches the rest.

The threshold is fitted to the share of the cost that is to remain. Warm-up is an eighth of the steps, at most the
default of 8. It caches residuals of blocks of diffusers' module, so it cannot be applied to engines.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiTTransformer2DModel

from dyexport.bundle.spec import ModelSpec
from dyexport.flops import FlopsModel
from dyexport.runtime.stock import stock_class

PACKAGE = "cache_dit"
FIRST_BLOCKS = 1  # always computed
MOST_WARMUP = 8
SEARCH = tuple(2.0**power for power in range(-10, 5))  # thresholds


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

    def __init__(self, module: Any, steps: int, threshold: float, warmup: int | None = None) -> None:
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
            residual_diff_threshold=threshold,
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


def fitted_threshold(costs: Callable[[float], float], target: float) -> float:
    """Return the threshold whose cost on a pilot comes closest to a target; of equals the lowest."""
    return min(SEARCH, key=lambda threshold: (abs(costs(threshold) - target), threshold))
