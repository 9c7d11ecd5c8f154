"""Types of the options that several commands share. Help texts, choices and panels stand here once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dyexport.backbones.base import UnitChoice
from dyexport.backbones.recipe import BasePrecision, Checkpointing, Optimizer
from dyexport.bundle.spec import Precision, Quantization, TokenRouterKind, Widths

MODEL, BUDGET, TRAINING, ENGINES = "Model", "Budget", "Training", "Engines"
OUTPUT, TENSORRT, ADVANCED = "Output", "TensorRT", "Advanced"

TokenPathChoice = Literal["auto", "masked", "capacity", "dynamic", "compact"]
SchedulerChoice = Literal["ddim", "dpm++", "euler"]


def model_names() -> list[str]:
    """Return what completion offers for ``--model``."""
    from dyexport.presets import PRESETS

    return [*PRESETS]


def target_names() -> list[str]:
    """Return what completion offers for ``--target`` of ``build``."""
    from dyexport.bundle.targets import TARGETS

    return [*TARGETS]


def compiled_target_names() -> list[str]:
    """Return what completion offers for ``--target`` of ``compile``."""
    return [name for name in target_names() if name != "onnx"]


def tracker_names() -> list[str]:
    """Return what completion offers for ``--tracker``."""
    from dyexport.training.trackers import NONE, TRACKERS

    return [*TRACKERS, NONE]


def split(text: str) -> tuple[str, ...]:
    """Return the parts of a list that is separated by commas."""
    return tuple(part.strip() for part in text.split(",")) if text else ()


def _option(
    panel: str,
    help_text: str,
    *names: str,
    metavar: str | None = None,
    complete: Callable[[], list[str]] | None = None,
) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar, autocompletion=complete)


def _flag(panel: str, help_text: str, *names: str) -> Any:
    return _option(panel, help_text, *names, metavar="")


# Options of build and its stages. None: the work directory or the recipe of the model decides.

ModelOption = Annotated[
    str | None,
    _option(
        MODEL,
        "A model known by name; `dyexport models` lists them. Default: what the checkpoint says it is.",
        "--model",
        "-m",
        metavar="NAME",
        complete=model_names,
    ),
]
CheckpointOption = Annotated[
    str | None,
    _option(
        MODEL,
        "Weights: a diffusers directory, a single file, or a hub id. A checkpoint with trained routers keeps them. "
        "Default: the model's published weights.",
        metavar="PATH|ID",
    ),
]
LoraOption = Annotated[
    list[str] | None,
    _option(MODEL, "A LoRA file to merge into the weights; may be repeated.", "--lora", metavar="FILE@SCALE"),
]
RandomWeightsOption = Annotated[
    bool, _flag(MODEL, "Use random weights instead of a checkpoint, to measure speed.", "--random-weights")
]
BudgetOption = Annotated[
    str | None,
    _option(
        BUDGET,
        "Attention and MLP FLOPs as a share of the dense model's, such as 0.5. Several, such as 0.5,0.3,0.7, train one "
        "model and make one bundle, which runs at any of them, by default at the first. Default: what a checkpoint "
        "with routers was trained for.",
        "--budget",
        "-b",
        metavar="RATIO",
    ),
]
BundleBudgetOption = Annotated[
    float | None,
    typer.Option("--budget", "-b", help="One of a bundle's several budgets. Default: its first.", metavar="RATIO"),
]
WidthsOption = Annotated[
    Widths | None,
    _option(
        BUDGET,
        "Widths that follow the timestep, or one slim network for all timesteps and every token. Default: dynamic.",
    ),
]
DataOption = Annotated[
    str | None,
    _option(
        TRAINING,
        "Training and calibration data: a directory of safetensors latents or of pictures, digits, emoji, synthetic "
        "(sampled from the model itself), or synthetic:FILE with one prompt a line. Default: the recipe's.",
        metavar="SOURCE",
    ),
]
FinetuneStepsOption = Annotated[
    int | None,
    _option(
        TRAINING,
        "Fine-tuning steps; 0 trains nothing and chooses units by importance. Default: the recipe's.",
        metavar="N",
    ),
]
TdLoraOption = Annotated[
    str | None,
    _option(
        TRAINING,
        "Train a timestep-dependent LoRA instead of all weights, such as rank=16,experts=4. Further parts: alpha, "
        "bias (none, all), variant (standard, inverse, symmetric).",
        metavar="SPEC",
    ),
]
EnginesOption = Annotated[
    int | None,
    _option(
        ENGINES,
        "Number of engines that sampling switches between. Default: 4, or 8 for models of size S and B.",
        "--engines",
        "-k",
        metavar="K",
    ),
]
BuildTargetOption = Annotated[
    str | None,
    _option(
        ENGINES,
        "Engine formats, separated by commas; `dyexport targets` lists them. Default: onnx.",
        metavar="NAME,...",
        complete=target_names,
    ),
]
PrecisionOption = Annotated[
    Precision | None,
    _option(ENGINES, "Number format of weights and activations. Default: fp32, or bf16 for models of billions."),
]
QuantizeOption = Annotated[
    Quantization | None, _option(ENGINES, "Quantize the linear layers of attention and MLP. Default: no.")
]
OutOption = Annotated[
    Path | None,
    _option(OUTPUT, "Directory of the bundle. Default: ./MODEL-BUDGET.", "--out", "-o", metavar="DIR"),
]
WorkOption = Annotated[
    Path | None,
    _option(
        OUTPUT,
        "Directory of finished stages, for resuming. It records its settings: without --model and --checkpoint they "
        "are used again. Default: the bundle's name with .work added.",
        metavar="DIR",
    ),
]
RecordedWorkOption = Annotated[
    Path,
    _option(OUTPUT, "Work directory of the earlier stages, which records their settings.", "--work", metavar="DIR"),
]
BasePrecisionOption = Annotated[
    BasePrecision | None,
    _option(
        ADVANCED,
        "Storage of the frozen weights while a TD-LoRA is trained. bf16 is exact for weights published in bf16. "
        "Default: fp32, or bf16 for models of billions.",
    ),
]
OptimizerOption = Annotated[
    Optimizer | None,
    _option(ADVANCED, "AdamW with moments in fp32 or in 8 bits. Default: adamw."),
]
CheckpointingOption = Annotated[
    Checkpointing | None,
    _option(
        ADVANCED,
        "Recompute blocks in the backward pass: a third more time, and a fraction of the memory for activations. "
        "Default: auto, where a batch does not fit.",
        "--gradient-checkpointing",
    ),
]
MicroBatchOption = Annotated[
    int | None,
    _option(
        ADVANCED,
        "Samples of one pass in a process; gradients of a batch are accumulated. Default: as many as fit.",
        metavar="N",
    ),
]
RouterOption = Annotated[
    UnitChoice | None,
    _option(
        ADVANCED,
        "Units that routers may switch on: any of them, or always the first ones, so that engines share more weights. "
        "Default: free.",
    ),
]
TokenRouterOption = Annotated[
    TokenRouterKind | None,
    _option(
        ADVANCED,
        "Kind of new token routers, for models that have both: a small bottleneck, or those of the published code. "
        "Default: compact.",
    ),
]
TrackerOption = Annotated[
    str | None,
    _option(
        ADVANCED,
        "Send the curves of training to a tracker of accelerate, such as tensorboard, trackio or wandb; none stops a "
        "recorded one. Default: curves are files in the work directory alone.",
        metavar="NAME",
        complete=tracker_names,
    ),
]
EvaluateEveryOption = Annotated[
    int | None,
    _option(
        ADVANCED,
        "Evaluate the averaged weights every N steps of training: losses on fixed samples, and a picture of samples. "
        "Default: 0, never.",
        metavar="N",
    ),
]
VaeOption = Annotated[
    str | None,
    _option(
        ADVANCED,
        "VAE for --data of pictures, and for the pictures of --evaluate-every. Default: that of the checkpoint's "
        "pipeline.",
        "--vae",
        metavar="DIR|ID",
    ),
]
SyntheticOption = Annotated[
    str | None,
    _option(ADVANCED, "How --data synthetic is sampled, such as samples=4096,steps=50,guidance=1.5.", metavar="SPEC"),
]
TokenPathOption = Annotated[TokenPathChoice | None, _option(ADVANCED, "How engines skip tokens. Default: auto.")]
BuildMemoryOption = Annotated[
    str | None,
    _option(
        ADVANCED,
        "Memory for weights while calibrating and for TensorRT's builders, such as 8GiB. Default: what is free.",
        metavar="SIZE",
    ),
]
SeedOption = Annotated[
    int | None, _option(ADVANCED, "Seed of initialization, data and noise. Default: 0.", metavar="N")
]
BaselineOption = Annotated[
    bool | None,
    _flag(ADVANCED, "Add the dense graph, which bench compares with. Default: yes.", "--baseline/--no-baseline"),
]
ComputeCapabilityOption = Annotated[
    str | None,
    _option(
        TENSORRT,
        "GPUs that TensorRT-RTX plans are built for, such as 8.9,12.0; from 8.0 on. Default: all that it supports.",
        metavar="LIST",
    ),
]
ProfileOption = Annotated[
    list[str] | None,
    _option(
        TENSORRT,
        "Smallest, typical and largest sizes of a plan, such as batch=1:2:8; may be repeated.",
        metavar="SIZES",
    ),
]
StreamWeightsOption = Annotated[
    bool | None,
    _flag(
        TENSORRT,
        "Keep weights that do not fit on the GPU in host memory. Default: no.",
        "--stream-weights/--no-stream-weights",
    ),
]

# Options of commands that read a bundle.

BundleArgument = Annotated[Path, typer.Argument(help="Bundle directory.", metavar="BUNDLE", show_default=False)]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps. Default: the model's.", metavar="N")]
_SCHEDULERS = "Sampler. Default: ddim, or euler for flow matching."
SchedulerOption = Annotated[SchedulerChoice | None, typer.Option(help=_SCHEDULERS)]
LabelSchedulerOption = Annotated[
    SchedulerChoice | None, typer.Option(help=_SCHEDULERS, rich_help_panel="Class-conditional models")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="Memory for weights, such as 8GiB. Default: all engines stay loaded.", metavar="SIZE"),
]
TargetOption = Annotated[str, typer.Option(help="Engine format to run.", metavar="NAME")]
