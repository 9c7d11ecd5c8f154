"""What a build is asked to do, checked before anything is written. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from dyexport.arguments import check_memory, check_seed, whole_number
from dyexport.backbones.base import Preset, RouterKind
from dyexport.bundle.manifest import Precision, Quantization
from dyexport.bundle.plan_info import OLDEST_FP8
from dyexport.calibration.segments import PlanSettings
from dyexport.errors import BudgetError, CheckpointError, UsageError
from dyexport.lora import LoraFile, LoraSpec
from dyexport.pipeline.output import check_ours
from dyexport.pipeline.plan_requests import parse_profiles
from dyexport.pipeline.targets import ONNX, TARGETS
from dyexport.presets import get_preset
from dyexport.training.synthetic_config import SyntheticConfig

Routers = Literal["given", "random", "trained", "none"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length and pace of a training run."""

    steps: int
    batch_size: int
    learning_rate: float
    ema_decay: float
    lr_decay: float = 0.0


FROM_SCRATCH = Schedule(steps=2000, batch_size=32, learning_rate=3e-3, ema_decay=0.99, lr_decay=0.5)
FINETUNE_DIGITS = Schedule(steps=2500, batch_size=32, learning_rate=3e-3, ema_decay=0.99, lr_decay=0.5)
FINETUNE = Schedule(steps=150_000, batch_size=256, learning_rate=1e-4, ema_decay=0.9999)  # as published
LORA_DIGITS = replace(FINETUNE_DIGITS, learning_rate=1e-2)
LORA = FINETUNE
FINETUNE_LARGE = Schedule(steps=10_000, batch_size=8, learning_rate=1e-4, ema_decay=0.999)
MOST_STEPS = 10**9
LARGE = 2_000_000_000  # parameters, from which on not all of them are trained: they alone would fill a GPU
SHOWN = 200  # characters of a name in a message
LARGE_LORA = LoraSpec(rank=16, experts=4, alpha=16)


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """One build. ``budget`` is the FLOPs ratio lambda; None keeps the routers of a dynamic checkpoint as they are.

    ``loras`` of users are merged into the static model. ``synthetic`` says how ``data`` 'synthetic' is sampled.
    ``merge_tolerance`` is the relative error up to which TD-LoRA is merged into a segment's weights; None never merges.
    """

    model: str
    out: Path
    work: Path
    budget: float | None = None
    router: RouterKind = "free"
    td_lora: LoraSpec | None = None
    merge_tolerance: float | None = None
    loras: tuple[LoraFile, ...] = ()
    checkpoint: str | None = None
    random_weights: bool = False
    data: str | None = None
    prompts: Path | None = None
    synthetic: SyntheticConfig | None = None
    engines: int = 4
    targets: tuple[str, ...] = ("onnx",)
    token_path: str = "auto"
    compute_capabilities: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    stream_weights: bool = False
    train_steps: int | None = None
    finetune_steps: int | None = None
    seed: int = 0
    baseline: bool = True
    precision: Precision | None = None
    quantize: Quantization | None = None
    memory: int | None = None  # bytes that weights may take; None: what is free

    def __post_init__(self) -> None:
        preset = get_preset(self.model)
        PlanSettings(engines=self.engines, token_path=self.token_path)
        self._check_targets()
        if self.budget is not None and not 0 < self.budget <= 1:
            raise BudgetError(f"budget is {self.budget:g}; give a FLOPs ratio in (0, 1], such as 0.5")
        if self.checkpoint is not None and self.random_weights:
            raise UsageError("--checkpoint and --random-weights exclude each other; give one of them")
        if self.precision not in (None, *get_args(Precision)):
            raise UsageError(f"--precision is {self.precision}; use {', '.join(get_args(Precision))}")
        check_seed(self.seed, "--seed")
        if self.memory is not None:
            check_memory(self.memory)
        self._check_steps(preset)
        self._check_routers(preset)
        self._check_lora()
        self._check_paths()

    def _check_targets(self) -> None:
        for target in self.targets or ("",):
            if target not in TARGETS:
                raise UsageError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
        rigid = [target for target in self.targets if TARGETS[target].static_tokens]
        if rigid and self.token_path == "compact":
            raise UsageError(
                f"--token-path compact allocates by data, which {rigid[0]} cannot; use dynamic, capacity or masked"
            )
        plans = [target for target in self.targets if TARGETS[target].flavour]
        for option, values in (("compute-capability", self.compute_capabilities), ("profile", self.profiles)):
            if values and not plans:
                raise UsageError(f"--{option} is for TensorRT plans; add --target tensorrt-rtx, or leave it out")
        if self.stream_weights and not any(TARGETS[target].build_name is None for target in plans):
            raise UsageError("--stream-weights is for TensorRT plans; add --target tensorrt-rtx, or leave it out")
        for text in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", text):
                raise UsageError(f"--compute-capability {text!r} is not one; write 8.9, or 8.6,8.9,12.0")
        parse_profiles(self.profiles)
        self._check_quantization()

    def _check_quantization(self) -> None:
        if self.quantize not in (None, *get_args(Quantization)):
            raise UsageError(f"--quantize is {self.quantize}; use {' or '.join(get_args(Quantization))}")
        if self.quantize is not None and self.merge_tolerance is not None:
            raise UsageError(f"--merge-tolerance is not measured in {self.quantize}; leave it or --quantize out")
        modules = [target for target in self.targets if TARGETS[target].build_name]
        if self.quantize is not None and modules:
            raise UsageError(
                f"--quantize is for targets made from graphs, and {modules[0]} is not; leave one of them out"
            )
        too_old = [text for text in self.compute_capabilities if float(text) < OLDEST_FP8]
        if self.quantize == "fp8" and too_old:
            raise UsageError(
                f"--compute-capability {too_old[0]} has no fp8, which GPUs have from {OLDEST_FP8} on; "
                "leave it out, or use --quantize int8"
            )

    def _check_steps(self, preset: Preset) -> None:
        if self.data == "synthetic" and self.from_scratch:
            raise UsageError("--data synthetic is sampled from a static model; give its --checkpoint")
        if self.train_steps is not None and not self.from_scratch:
            raise UsageError(
                "--train-steps is for training from scratch, which needs a digits model and no --checkpoint"
            )
        if self.prompts is not None and (self.data_source != "synthetic" or self.preset.classes):
            raise UsageError("--prompts is what a text-to-image model makes --data synthetic from; leave it out")
        if self.synthetic is not None and self.data_source != "synthetic":
            raise UsageError("--synthetic says how --data synthetic is sampled; give that, or leave it out")
        self.sampling  # noqa: B018  # refuses guidance that would do nothing
        for name, steps, least in (("train", self.train_steps, 1), ("finetune", self.finetune_steps, 0)):
            if steps is not None:
                whole_number(f"--{name}-steps", steps, least=least, most=MOST_STEPS)

    def _check_routers(self, preset: Preset) -> None:
        if self.router not in get_args(RouterKind):
            raise UsageError(f"--router is {self.router!r}; use {' or '.join(get_args(RouterKind))}")
        if self.router != "free" and self.routers == "given":
            raise UsageError(f"{self.checkpoint} has routers already and is taken as it is; leave --router out")
        if self.routers == "given" and self.finetune_steps:
            raise UsageError(f"{self.checkpoint} has routers already and is taken as it is; leave --finetune-steps out")
        if self.routers in ("trained", "none") and self.budget is None:
            raise BudgetError(f"{self.model} has no routers yet, so it needs a --budget, such as 0.5")
        if self.routers == "trained" and self.data_source is None:
            raise UsageError(
                f"fine-tuning {self.model} needs --data, such as a directory of latents or 'synthetic'; "
                "to do without, give --finetune-steps 0"
            )

    def _check_lora(self) -> None:
        if self.td_lora is not None and self.routers == "given":
            raise UsageError(f"{self.checkpoint} has routers already and is taken as it is; leave --td-lora out")
        if self.td_lora is not None and self.td_lora.rank > (channels := self.preset.hidden_size):
            raise UsageError(f"--td-lora has rank {self.td_lora.rank} and {self.model} {channels} channels; give fewer")
        if self.td_lora is not None and self.routers == "none":
            raise UsageError("with --finetune-steps 0 nothing is trained; leave --td-lora out")
        for lora in self.loras:
            if not lora.file.is_file():
                raise UsageError(f"--lora {lora.file} is not a file; write FILE or FILE@SCALE, FILE in safetensors")
            if not math.isfinite(lora.scale):
                raise UsageError(f"--lora {lora.file}@{lora.scale}: the scale is not finite; give a number such as 0.8")
        if self.loras and (self.random_weights or self.from_scratch):
            raise UsageError("--lora changes weights that it was made for; give their --checkpoint")
        if self.merge_tolerance is not None and self.td_lora is None and self.routers != "given":
            raise UsageError("--merge-tolerance is for models with TD-LoRA; give --td-lora, or leave it out")
        if self.merge_tolerance is not None and not 0 <= self.merge_tolerance < math.inf:
            raise UsageError(f"--merge-tolerance is {self.merge_tolerance}; give a relative MSE, such as 1e-4")

    def _check_paths(self) -> None:
        for option, path in (("-o", self.out), ("--work", self.work)):
            try:
                path.resolve().exists()
            except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a zero byte
                raise UsageError(f"{option} {str(path)[:SHOWN]!r} can be no directory; give another name") from error
        if self.out.resolve() == self.work.resolve():
            raise UsageError(f"-o and --work are both {self.out}; give two directories")
        if self.work.resolve().is_relative_to(self.out.resolve()):
            raise UsageError(f"--work {self.work} lies in the bundle {self.out}, which is replaced; give another one")
        check_ours(self.out)

    @property
    def formats(self) -> tuple[str, ...]:
        """Targets in the order of work: plans are built from the ONNX graphs, which are in every bundle."""
        return tuple(dict.fromkeys((ONNX, *self.targets)))

    @property
    def planned_token_path(self) -> str:
        """``auto`` is a top-C with C an input where one of the targets cannot allocate by data."""
        rigid = any(TARGETS[target].static_tokens for target in self.targets)
        return "dynamic" if rigid and self.token_path == "auto" else self.token_path

    @property
    def preset(self) -> Preset:
        return get_preset(self.model)

    @property
    def stored_precision(self) -> Precision:
        """Of weights and products in the bundle: asked for, or bf16 for large models, as they are published."""
        return self.precision or ("bf16" if self.large else "fp32")

    @property
    def calibrates_in_bf16(self) -> bool:
        """Whether calibration multiplies in bf16, as the bundle will; CPUs with such products are faster too."""
        return self.large and self.stored_precision == "bf16"

    @property
    def from_scratch(self) -> bool:
        """Whether the static model must first be trained; digits take minutes on a CPU."""
        return self.preset.pixel_space and self.checkpoint is None and not self.random_weights

    @property
    def routers(self) -> Routers:
        """Where the routers come from; with ``none``, widths are chosen by importance and all tokens run."""
        if self.checkpoint is not None and _has_routers(Path(self.checkpoint)):
            return "given"
        if self.finetune_steps == 0:
            return "none"
        return "random" if self.random_weights and self.finetune_steps is None else "trained"

    @property
    def data_source(self) -> str | None:
        """Training and calibration data; None means noise."""
        if self.data is not None:
            return self.data
        if self.preset.pixel_space:
            return None if self.routers == "random" else "digits"
        return "synthetic" if self.large and self.routers == "trained" else None

    @property
    def sampling(self) -> SyntheticConfig:
        """Settings for sampling synthetic data."""
        return replace(self.synthetic or SyntheticConfig(), seed=self.seed).resolved(self.preset)

    @property
    def large(self) -> bool:
        """Whether the model is too large to train as a whole, to have on a disk twice, and few have data for it."""
        return self.preset.parameters >= LARGE

    @property
    def lora(self) -> LoraSpec | None:
        """What is trained instead of all weights; large models get a TD-LoRA unasked."""
        if self.td_lora is None and self.large and self.routers == "trained":
            return LARGE_LORA
        return self.td_lora

    @property
    def slow_stages(self) -> frozenset[str]:
        """Stages that train, or sample what is trained on, or come before one that does."""
        if self.routers == "trained":
            return frozenset({"static", "synthetic", "dynamic"})
        return frozenset({"static", "synthetic"} if self.from_scratch else {"synthetic"})

    @property
    def static_schedule(self) -> Schedule:
        return _lasting(FROM_SCRATCH, self.train_steps)

    @property
    def finetune_schedule(self) -> Schedule:
        full, low_rank = (FINETUNE_DIGITS, LORA_DIGITS) if self.preset.pixel_space else (FINETUNE, LORA)
        usual = FINETUNE_LARGE if self.large else low_rank if self.lora else full
        return _lasting(usual, self.finetune_steps)

    @property
    def distill(self) -> bool:
        """Whether the dynamic path learns from the complete model. Published runs, a hundred times longer, do not."""
        return self.preset.pixel_space


def _has_routers(checkpoint: Path) -> bool:
    """Only a file must be looked into for it, which takes torch."""
    try:
        if not checkpoint.is_file():
            return (checkpoint / "dynamic.json").is_file()
    except OSError as error:
        raise CheckpointError(f"cannot read {str(checkpoint)[:SHOWN]!r}: {error.strerror}; give another") from error
    from dyexport.checkpoints.static import has_routers

    return has_routers(checkpoint)


def _lasting(schedule: Schedule, steps: int | None) -> Schedule:
    return schedule if steps is None else replace(schedule, steps=steps)


def parse_budget(text: str | None) -> float | None:
    """A FLOPs ratio from the command line; raises ``BudgetError`` for what is not a number."""
    if text is None:
        return None
    try:
        budget = float(text)
    except ValueError as error:
        raise BudgetError(f"budget {text!r} is not a number; give a FLOPs ratio in (0, 1], such as 0.5") from error
    if not math.isfinite(budget):
        raise BudgetError(f"budget is {text}; give a FLOPs ratio in (0, 1], such as 0.5")
    return budget


def default_out(model: str, budget: float | None) -> Path:
    return Path(model if budget is None else f"{model}-{budget:g}")
