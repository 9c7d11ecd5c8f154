"""Whole pictures from a prompt: text encoders, the sampling loop and the VAE of a diffusers pipeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch

from dyexport.bench.latency import Clock
from dyexport.bench.variants import Variant
from dyexport.runtime.prompt_settings import Prompts
from dyexport.runtime.prompts import open_pipeline, sample_prompts
from dyexport.runtime.transformer import BundleTransformer

PROMPT = "a lighthouse at dusk, waves against the rocks"


class EndToEnd:
    """A diffusers pipeline that makes a batch of pictures with one transformer after another."""

    def __init__(
        self,
        transformer: BundleTransformer,
        source: str,
        *,
        batch: int,
        size: tuple[int, int] | None,
        steps: int,
    ) -> None:
        self._pipe = open_pipeline(transformer, source)
        self._pipe.set_progress_bar_config(disable=True)
        if transformer.device.type != "cpu":
            self._pipe.to(transformer.device)
        height, width = size or (None, None)
        self._prompts = Prompts(texts=(PROMPT,) * batch, height=height, width=width, steps=steps)

    def variant(self, transformer: BundleTransformer) -> Variant:
        """Return a call of the pipeline around a transformer."""
        return partial(self._run, transformer)

    def _run(self, transformer: BundleTransformer) -> None:
        self._pipe.register_modules(transformer=transformer)
        sample_prompts(transformer, self._prompts, pipe=self._pipe)

    def parts(self, transformer: BundleTransformer, clock: Clock, runs: int) -> dict[str, float]:
        """Return the seconds that each component but the transformer takes per call: the median over ``runs``."""
        totals: dict[str, list[float]] = defaultdict(list)
        for _ in range(runs):
            with timed_modules(_parts_of(self._pipe), clock) as seconds:
                self._run(transformer)
            for name, value in seconds.items():
                totals[name].append(value)
        return {name: median(values) for name, values in totals.items()}


def _parts_of(pipe: Any) -> dict[str, torch.nn.Module]:
    """Return the modules of a pipeline; of a VAE, whose ``decode`` is no ``forward``, its decoder."""
    components: Mapping[str, Any] = pipe.components
    modules = {name: part for name, part in components.items() if isinstance(part, torch.nn.Module)}
    modules.pop("transformer", None)
    return {name: module.get_submodule("decoder") if name == "vae" else module for name, module in modules.items()}


@contextmanager
def timed_modules(modules: Mapping[str, torch.nn.Module], clock: Clock) -> Iterator[dict[str, float]]:
    """Yield the seconds that the forward passes of modules take inside the context, by name."""
    seconds = dict.fromkeys(modules, 0.0)
    begins: dict[str, float] = {}

    def hooks(name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def before(*_: Any) -> None:
            begins[name] = clock()

        def after(*_: Any) -> None:
            seconds[name] += clock() - begins[name]

        return before, after

    with ExitStack() as stack:
        for name, module in modules.items():
            before, after = hooks(name)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield seconds
