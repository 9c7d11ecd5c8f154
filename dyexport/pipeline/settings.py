"""Settings of a build, checked when they are made. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dyexport.backbones.base import Preset, RouterKind, UnitChoice
from dyexport.backbones.recipe import BasePrecision, Checkpointing, Optimizer, Recipe, Schedule
from dyexport.bundle.spec import Precision, Quantization, TokenRouterKind, Widths
from dyexport.bundle.targets import ONNX, TARGETS
from dyexport.checkpoints.stored_routers import stored_widths
from dyexport.checkpoints.structure import resolve_preset
from dyexport.errors import UsageError
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from dyexport.lora import LoraFile, LoraSpec
from dyexport.pipeline.effective_recipe import recipe_values
from dyexport.pipeline.output import default_out, default_work
from dyexport.pipeline.settings_checks import check, check_names, check_values
from dyexport.pipeline.settings_file import load_settings, save_settings
from dyexport.presets import Model
from dyexport.training.synthetic_config import SyntheticConfig

Routers = Literal["given", "random", "trained", "none"]

SYNTHETIC = "synthetic"


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Settings of one build. The model's ``Recipe`` has the defaults that depend on the model.

    model            a preset or its name; None: the model of the checkpoint
    out, work        directories of the bundle and of finished stages
    budget           FLOPs ratio lambda in (0, 1]; None keeps the routers of a dynamic checkpoint as they are
    budgets          several, of a bundle that has engines for each; ``budget`` is the one that runs by default
    widths           'dynamic' or 'static'; None: those of a dynamic checkpoint, otherwise dynamic
    router           which units may be on at a timestep: 'free' or 'ordered'
    token_router     kind of new token routers, 'compact' or 'published'; None: that of new models
    td_lora          low-rank updates that are trained instead of all weights
    base_precision   storage of the frozen base under TD-LoRA; None: the recipe's
    optimizer        'adamw' or 'adamw-8bit'
    checkpointing    'on', 'off' or 'auto': whether fine-tuning recomputes blocks in the backward pass
    micro_batch      samples of one pass of fine-tuning in a process; None: as many as fit
    merge_tolerance  relative error up to which TD-LoRA is merged into a segment's weights; None never merges
    loras            LoRA files that are merged into the static model
    checkpoint       diffusers directory, file or hub id; None: published weights, or training from scratch
    random_weights   True to make the weights at random, to measure speed
    data             'digits', 'emoji', 'synthetic', 'synthetic:FILE' of prompts, or a directory of latents or pictures
    vae              VAE of pictures, a directory or hub id; None: that of the checkpoint's pipeline
    synthetic        how synthetic data is sampled
    engines          K, the number of engines
    targets          engine formats
    tensorrt         settings of TensorRT plans
    train_steps      steps of training from scratch, and
    finetune_steps   of fine-tuning, which 0 leaves out; None: the recipe's
    tracker          tracker of accelerate that gets the curves of training; None: they are kept as files alone
    evaluate_every   steps of training between evaluations; 0: none
    seed             of initialization, data and noise
    precision        number format of the bundle; None: the recipe's
    quantize         format of the linear layers of attention and MLP; None: that of ``precision``
    token_path       'auto', 'masked', 'capacity', 'dynamic' or 'compact'
    baseline         True if the bundle also has the dense network
    memory           bytes that weights may take; None: free memory

    Raises ``UsageError`` for values and combinations that cannot be built, ``CheckpointError`` and ``DataError`` for a
    checkpoint and data that do not exist.
    """

    model: Model = None
    out: Path
    work: Path
    budget: float | None = None
    budgets: tuple[float, ...] = ()
    widths: Widths | None = None
    router: UnitChoice = "free"
    token_router: TokenRouterKind | None = None
    td_lora: LoraSpec | None = None
    base_precision: BasePrecision | None = None
    optimizer: Optimizer = "adamw"
    checkpointing: Checkpointing = "auto"
    micro_batch: int | None = None
    merge_tolerance: float | None = None
    loras: tuple[LoraFile, ...] = ()
    checkpoint: str | None = None
    random_weights: bool = False
    data: str | None = None
    vae: str | None = None
    synthetic: SyntheticConfig | None = None
    engines: int = 4
    targets: tuple[str, ...] = (ONNX,)
    token_path: str = "auto"
    tensorrt: TensorrtSettings = field(default_factory=TensorrtSettings)
    train_steps: int | None = None
    finetune_steps: int | None = None
    tracker: str | None = None
    evaluate_every: int = 0
    seed: int = 0
    baseline: bool = True
    precision: Precision | None = None
    quantize: Quantization | None = None
    memory: int | None = None

    def __post_init__(self) -> None:
        check(self)

    def at(self, budget: float) -> BuildSettings:
        """Return the settings of one of ``budgets``. The dense network is that of the default budget."""
        return replace(self, budget=budget, baseline=self.baseline and budget == self.budget)

    @cached_property
    def preset(self) -> Preset:
        """The model, with the structure of its checkpoint."""
        return resolve_preset(self.model, None if self.random_weights else self.checkpoint)

    @property
    def recipe(self) -> Recipe:
        """Recipe of the model."""
        return self.preset.recipe

    @property
    def formats(self) -> tuple[str, ...]:
        """Targets in build order: the ONNX graphs first, since plans are built from them."""
        return tuple(dict.fromkeys((ONNX, *self.targets)))

    @property
    def planned_token_path(self) -> str:
        """Token path, with 'auto' replaced by 'dynamic' if a target cannot allocate sizes that depend on data."""
        static_tokens = any(TARGETS[target].static_tokens for target in self.targets)
        return "dynamic" if static_tokens and self.token_path == "auto" else self.token_path

    @property
    def stored_precision(self) -> Precision:
        """Precision of weights and products in the bundle."""
        return self.precision or self.recipe.precision

    @property
    def calibrates_in_bf16(self) -> bool:
        """True if calibration multiplies in bf16, as the bundle does; many CPUs are also faster in bf16."""
        return self.recipe.calibration_precision == self.stored_precision == "bf16"

    @property
    def from_scratch(self) -> bool:
        """True if the static model must be trained first."""
        return self.recipe.from_scratch is not None and self.checkpoint is None and not self.random_weights

    @property
    def routers(self) -> Routers:
        """Origin of the routers; with 'none', widths are chosen by importance and all tokens run."""
        if self._given_widths is not None:
            return "given"
        if self.finetune_steps == 0:
            return "none"
        return "random" if self.random_weights and self.finetune_steps is None else "trained"

    @property
    def repairs(self) -> bool:
        """True if output projections are repaired, since nothing is trained."""
        return self.routers == "none" and bool(self.budget and self.recipe.calibration.repair) and self.lora is None

    @cached_property
    def _given_widths(self) -> Widths | None:
        """Widths of a checkpoint that has routers."""
        return stored_widths(self.checkpoint)

    @property
    def planned_widths(self) -> Widths:
        """Widths of the bundle."""
        return self._given_widths or self.widths or "dynamic"

    @property
    def router_kind(self) -> RouterKind:
        """Kind of new width routers."""
        return "static" if self.planned_widths == "static" else self.router

    @property
    def token_router_kind(self) -> TokenRouterKind | None:
        """Kind of new token routers; None for a build that makes none."""
        if self.routers not in ("trained", "random") or self.planned_widths == "static":
            return None
        return self.token_router or self.preset.token_routers[-1]

    @property
    def data_source(self) -> str | None:
        """Training and calibration data: 'digits', 'emoji', 'synthetic' or a directory; None: noise."""
        if self.data is not None:
            return SYNTHETIC if self.data.startswith(f"{SYNTHETIC}:") else self.data
        if self.routers == "random" or (self.recipe.data == SYNTHETIC and self.routers != "trained"):
            return None
        return self.recipe.data

    @property
    def prompts(self) -> Path | None:
        """File of prompts for synthetic data; None: built-in prompts."""
        kind, colon, file = (self.data or "").partition(":")
        return Path(file) if kind == SYNTHETIC and colon else None

    @property
    def sampling(self) -> SyntheticConfig:
        """Settings for sampling synthetic data."""
        return replace(self.synthetic or SyntheticConfig(), seed=self.seed).resolved(self.preset)

    @property
    def lora(self) -> LoraSpec | None:
        """TD-LoRA trained in place of all weights. With static widths the recipe's has one expert: a plain LoRA."""
        if self.td_lora is not None or self.routers != "trained" or (recipe := self.recipe.td_lora) is None:
            return self.td_lora
        return recipe.model_copy(update={"experts": 1}) if self.planned_widths == "static" else recipe

    @property
    def frozen_precision(self) -> BasePrecision:
        """Storage of the frozen base in fine-tuning; fp32 where all weights are trained."""
        if self.lora is None or self.routers != "trained":
            return "fp32"
        return self.base_precision or self.recipe.base_precision

    @property
    def trains(self) -> bool:
        """True if a stage of the build trains."""
        return self.routers == "trained" or self.from_scratch

    @property
    def slow_stages(self) -> frozenset[str]:
        """Stages that train, that make training data, or that come before one that does."""
        trained = {"static", "dynamic"} if self.routers == "trained" else {"static"} if self.from_scratch else set()
        return frozenset({"encoded", "synthetic"} | trained)

    @property
    def static_schedule(self) -> Schedule:
        """Schedule for training the static model from scratch."""
        assert self.recipe.from_scratch is not None
        return _with_steps(self.recipe.from_scratch, self.train_steps)

    @property
    def finetune_schedule(self) -> Schedule:
        """Schedule for fine-tuning the dynamic model."""
        schedule = self.recipe.finetune if self.lora is None else self.recipe.finetune_lora
        return _with_steps(schedule, self.finetune_steps)

    @classmethod
    def complete(cls, **values: Any) -> BuildSettings:
        """Make settings, with the model's defaults for ``out``, ``work`` and ``engines``.

        ``budget`` may be several numbers, of which the first is the default one.
        Raises ``UsageError`` for an unknown name.
        """
        check_names(values, [setting.name for setting in fields(cls)])
        if not values.get("budgets"):
            values |= budget_settings(values.get("budget"))
        check_values(values)
        model, checkpoint = values.get("model"), None if values.get("random_weights") else values.get("checkpoint")
        if model is None and values.get("random_weights") and values.get("checkpoint"):
            raise UsageError("--random-weights reads no checkpoint; give --model instead of --checkpoint")
        if model is None and checkpoint is None:
            raise UsageError(
                "no model is named; give --model, --checkpoint, or the --work directory of an earlier build"
            )
        preset = resolve_preset(model, checkpoint)
        widths = stored_widths(checkpoint) or values.get("widths")
        budgets = values["budgets"] or (values["budget"],)
        out = Path(values.get("out") or default_out(preset.name, budgets, widths))
        work = Path(values.get("work") or default_work(out))
        engines = default_engines(preset, widths)
        return cls(**{"engines": engines, **values, "out": out, "work": work})

    def effective_recipe(self) -> dict[str, Any]:
        """Return what this build does, by its settings and the model's recipe, as JSON values."""
        return recipe_values(self)

    def save(self) -> None:
        """Write the settings to the work directory, with absolute paths."""
        save_settings(self)

    @classmethod
    def load(cls, work: Path) -> BuildSettings:
        """Read the settings of a work directory. Raises ``UsageError`` if it has none, or those of a newer version."""
        return load_settings(cls, work)


def budget_settings(budget: float | Sequence[float] | None) -> dict[str, Any]:
    """Return the fields of one budget, or of several, of which the first is the default one."""
    if isinstance(budget, str) or not isinstance(budget, Iterable):
        return {"budget": budget, "budgets": ()}
    budgets = tuple(budget)
    return {"budget": budgets[0] if budgets else None, "budgets": budgets if len(budgets) > 1 else ()}


def default_engines(preset: Preset, widths: Widths | None) -> int:
    """Return the default number of engines."""
    return 1 if widths == "static" else preset.engines


def _with_steps(schedule: Schedule, steps: int | None) -> Schedule:
    return schedule if steps is None else replace(schedule, steps=steps)
