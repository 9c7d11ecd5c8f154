"""Estimates of the device memory of fine-tuning, and the way to divide a batch that fits.

What blocks keep was counted with ``torch.autograd.graph.saved_tensors_hooks`` for all backbones, gates and TD-LoRA
included: 73 to 120 bytes per token and channel in fp32, 47 to 75 in bf16.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch

from dyexport.backbones import get_adapter
from dyexport.backbones.base import Preset, RouterKind
from dyexport.backbones.recipe import BasePrecision, Checkpointing, Optimizer, Schedule
from dyexport.bundle.spec import TokenRouterKind
from dyexport.lora import LoraSpec
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.frozen_base import BITS, frozen_linears
from dyexport.training.synthetic_config import SyntheticConfig

VALUE = 4  # bytes of an fp32 number
KEPT = {"fp32": 120, "bf16": 75}  # bytes per token and channel that a block keeps for its backward pass
INPUTS = {"fp32": 4, "bf16": 2}  # those that it keeps if it is recomputed
GRAPHS = 2  # the dynamic path and the dense model, which are trained together
TRANSIENT = 1  # gradients of a block's activations, in units of what it keeps
MOMENTS: dict[Optimizer, float] = {"adamw": 8, "adamw-8bit": 2.1}  # bytes per trained parameter
SLACK = 1.1  # for fragments, and for kernels' workspaces
CARDS = (24, 48, 80, 141)  # GB


@dataclass(frozen=True, kw_only=True)
class FinetuningRun:
    """Settings of a fine-tuning run that its cost depends on.

    ``token_router`` is the kind of its token routers; None: that of new models. ``synthetic`` says how its data are
    sampled first; None: the data exist. ``micro_batch`` None: as many samples as fit.
    """

    preset: Preset
    schedule: Schedule
    router: RouterKind = "free"
    token_router: TokenRouterKind | None = None
    td_lora: LoraSpec | None = None
    distill: bool = False
    synthetic: SyntheticConfig | None = None
    base_precision: BasePrecision = "fp32"
    optimizer: Optimizer = "adamw"
    checkpointing: Checkpointing = "auto"
    micro_batch: int | None = None

    @property
    def size(self) -> str:
        return f"{self.preset.parameters / 1e9:.1f} billion parameters"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Choices of ``accelerate launch``: processes that share a batch, one device each, and mixed precision."""

    processes: int = 1
    precision: str = "no"

    @classmethod
    def current(cls) -> Launch:
        """Read the variables that ``accelerate launch`` sets."""
        environment = os.environ
        return cls(
            processes=int(environment.get("WORLD_SIZE", "1")),
            precision=environment.get("ACCELERATE_MIXED_PRECISION", "no"),
        )


@dataclass(frozen=True, kw_only=True)
class Division:
    """Division of a process's share of a batch: samples of one pass, and whether blocks are recomputed."""

    micro_batch: int
    checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of one device. ``optimizer`` has moments and averages, and a teacher's weights."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations

    def fits(self, free: float) -> bool:
        return self.total * SLACK <= free


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of parameters of a dynamic model."""

    trained: int
    full: int  # of full fine-tuning
    frozen: int  # in linear layers that a lower precision applies to
    frozen_rows: int  # of these layers, each with a scale in int8
    largest: int  # of these layers
    other: int  # frozen in fp32 at every precision


@cache
def _sizes(preset: Preset, router: RouterKind, token_router: TokenRouterKind | None, td_lora: LoraSpec | None) -> Sizes:
    adapter = get_adapter(preset.backbone)
    with torch.device("meta"):
        backbone = adapter.build(preset.transformer_config())
        model = DynamicTransformer(
            backbone, adapter, heads=preset.heads, router=router, td_lora=td_lora, token_router=token_router
        )
    routers = sum(value.numel() for value in model.routers.parameters())
    linears = list(frozen_linears(model))
    frozen = sum(linear.weight.numel() for linear in linears)
    fixed = sum(value.numel() for value in backbone.parameters() if not value.requires_grad)
    return Sizes(
        trained=routers + sum(value.numel() for value in model.trainable),
        full=routers + sum(value.numel() for value in backbone.parameters()),
        frozen=frozen,
        frozen_rows=sum(linear.out_features for linear in linears),
        largest=max((linear.weight.numel() for linear in linears), default=0),
        other=fixed - frozen,
    )


def sizes_of(run: FinetuningRun) -> Sizes:
    """Count the parameters of a run's model."""
    return _sizes(run.preset, run.router, run.token_router, run.td_lora)


def memory_of(run: FinetuningRun, division: Division, launch: Launch | None = None) -> TrainingMemory:
    """Estimate the memory of one device. Masks save nothing in training, so every pass is dense."""
    launch = launch or Launch()
    sizes, preset = sizes_of(run), run.preset
    products = "bf16" if run.base_precision != "fp32" or launch.precision != "no" else "fp32"
    channels = division.micro_batch * (preset.tokens + preset.text_tokens) * preset.hidden_size
    kept, inputs = channels * KEPT[products], channels * INPUTS[products]
    blocks = inputs * preset.depth * GRAPHS + kept if division.checkpointing else kept * preset.depth * GRAPHS
    buckets = VALUE if launch.processes > 1 else 0  # in which processes exchange gradients
    teacher = VALUE if run.distill else 0
    return TrainingMemory(
        weights=_frozen_bytes(sizes, run.base_precision) + sizes.trained * VALUE,
        gradients=sizes.trained * (VALUE + buckets),
        optimizer=sizes.trained * (MOMENTS[run.optimizer] + VALUE + teacher),
        activations=blocks + kept * TRANSIENT,
    )


def _frozen_bytes(sizes: Sizes, precision: BasePrecision) -> float:
    scales = sizes.frozen_rows * VALUE if precision == "int8" else 0
    products = 0 if precision == "fp32" else 2 * sizes.largest  # of one layer, in bf16
    return sizes.frozen * BITS[precision] / 8 + scales + products + sizes.other * VALUE


def divisions(run: FinetuningRun, processes: int = 1) -> Iterator[Division]:
    """Yield the ways to divide a batch, the fastest first: a smaller micro-batch costs a forward pass of the batch."""
    share = max(run.schedule.batch_size // processes, 1)
    recomputed = {"auto": (False, True), "on": (True,), "off": (False,)}[run.checkpointing]
    if run.micro_batch is not None:
        yield from (Division(micro_batch=run.micro_batch, checkpointing=on) for on in recomputed)
        return
    yield from (Division(micro_batch=share, checkpointing=on) for on in recomputed)
    for samples in range(share - 1, 0, -1):
        if share % samples == 0:
            yield Division(micro_batch=samples, checkpointing=recomputed[-1])


def choose_division(run: FinetuningRun, free: float, launch: Launch | None = None) -> Division:
    """Return the fastest division of a batch whose estimate fits in ``free`` bytes; the smallest if none does."""
    launch = launch or Launch()
    chosen = None
    for chosen in divisions(run, launch.processes):
        if memory_of(run, chosen, launch).fits(free):
            break
    assert chosen is not None
    return chosen


def free_memory() -> float:
    """Return the bytes that training may take: of this process's GPU, or its part of the host's memory."""
    release_memory()
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    import psutil

    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def release_memory() -> None:
    """Free modules that only cycles refer to, and blocks that torch's allocator caches on a GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def alternatives(run: FinetuningRun) -> list[FinetuningRun]:
    """Return a run with every storage of its base, and with moments of 32 and of 8 bits, the largest first."""
    bases: tuple[BasePrecision, ...] = ("fp32",) if run.td_lora is None else ("fp32", "bf16", "int8", "nf4")
    optimizers: tuple[Optimizer, ...] = ("adamw", "adamw-8bit")
    return [replace(run, base_precision=base, optimizer=optimizer) for base in bases for optimizer in optimizers]


def run_of_recipe(preset: Preset) -> FinetuningRun:
    """Return the fine-tuning that a model's recipe describes."""
    recipe = preset.recipe
    return FinetuningRun(
        preset=preset,
        schedule=recipe.finetune if recipe.td_lora is None else recipe.finetune_lora,
        td_lora=recipe.td_lora,
        distill=recipe.distill,
        base_precision=recipe.base_precision,
    )


def memory_table(run: FinetuningRun) -> list[dict[str, Any]]:
    """Return estimates by storage and optimizer, for one sample with recomputed blocks, and what fits on each card.

    ``cards`` has how a batch is divided on a card of so many GB; None where one sample does not fit.
    """
    rows = []
    for other in alternatives(run):
        one = memory_of(other, Division(micro_batch=1, checkpointing=True))
        kept = memory_of(other, Division(micro_batch=1, checkpointing=False))
        sizes = {f"{name}_bytes": round(value) for name, value in asdict(one).items()}
        rows.append(
            {
                "base_precision": other.base_precision,
                "optimizer": other.optimizer,
                **sizes,
                "activations_kept_bytes": round(kept.activations),
                "total_bytes": round(one.total),
                "cards": {str(card): _on_card(other, card) for card in CARDS},
            }
        )
    return rows


def _on_card(run: FinetuningRun, gigabytes: float) -> dict[str, Any] | None:
    division = choose_division(run, gigabytes * 1e9)
    return asdict(division) if memory_of(run, division).fits(gigabytes * 1e9) else None
