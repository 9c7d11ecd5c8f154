"""A dynamic DiT small enough to train in a test, and its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset, RouterKind
from dyexport.lora import LoraSpec
from dyexport.models.dynamic import DynamicTransformer
from dyexport.presets import get_preset
from dyexport.training.config import FinetuneConfig
from dyexport.training.data import MemorySource
from dyexport.training.finetuning import DynamicTrainer
from dyexport.training.trainer import Trainer

SIT = replace(get_preset("sit-digits"), name="tiny-sit", hidden_size=16, heads=4, layers=2, patch_size=2)
DIT = replace(SIT, name="tiny-dit", backbone="dit", learn_sigma=True)
DYNAMIC = FinetuneConfig(steps=20, batch_size=8, checkpoint_every=5, seed=3, lr_decay=0.5)


def backbone(preset: Preset, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    adapter = get_adapter(preset.backbone)
    module = adapter.build(preset.transformer_config())
    adapter.initialize(module)
    return module.eval()


def dynamic(
    preset: Preset,
    seed: int = 0,
    router: RouterKind = "free",
    td_lora: LoraSpec | None = None,
    budgets: tuple[float, ...] = (),
) -> DynamicTransformer:
    """Every gate matters: the layers that adaLN-Zero starts at zero are random."""
    module = backbone(preset, seed)
    for value in module.parameters():
        if not value.any():
            torch.nn.init.normal_(value, std=0.1)
    adapter = get_adapter(preset.backbone)
    return DynamicTransformer(module, adapter, heads=preset.heads, router=router, td_lora=td_lora, budgets=budgets)


def blobs(preset: Preset, count: int = 64) -> MemorySource:
    """Latents that are constant per class, so that there is something to learn quickly."""
    labels = torch.arange(count) % preset.classes
    shape = (count, preset.in_channels, preset.sample_size, preset.sample_size)
    levels = labels.float().div(preset.classes / 2).sub(1)
    return MemorySource("blobs", levels[:, None, None, None].expand(shape).clone(), labels)


def trainer(work_dir: Path, config: FinetuneConfig = DYNAMIC) -> DynamicTrainer:
    return DynamicTrainer(dynamic(SIT), SIT, blobs(SIT), config, work_dir=work_dir)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Pixels:
    """Decodes latents that are pixels."""

    def open(self) -> None: ...

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.clamp(-1, 1)


class Stopped(Exception):
    """A run that ended early."""


def stop(run: Trainer[Any], step: int, method: str = "advance") -> None:
    """Let a trainer raise ``Stopped`` in place of a call of ``method`` after ``step`` steps."""
    call = getattr(run, method)

    def call_or_stop() -> None:
        if run.step == step:
            raise Stopped
        call()

    setattr(run, method, call_or_stop)


def listening_tracker(monkeypatch: pytest.MonkeyPatch, fails_at: object = None) -> list[tuple[Any, Any]]:
    """Register a tracker with accelerate, as applications register theirs, under the name of one not installed.

    Returns what it gets: "started" with the hyperparameters, each step with its values, and "finished".
    """
    from accelerate import tracking

    got: list[tuple[Any, Any]] = []

    def get(what: Any, values: Any) -> None:
        if what == fails_at:
            raise ConnectionError("the service is down")
        got.append((what, values))

    class Listening(tracking.GeneralTracker):
        name = "aim"
        requires_logging_directory = False
        tracker = None

        def __init__(self, run_name: str, logging_dir: Path) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            get("started", values)

        def log(self, values: dict[str, float], step: int | None = None, **kwargs: Any) -> None:
            get(step, values)

        def finish(self) -> None:
            get("finished", None)

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "aim", Listening)
    return got
