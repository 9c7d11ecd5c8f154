"""The options of every command that builds, in one place. A command refuses those that do nothing in it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

if TYPE_CHECKING:
    from dyexport.backbones.base import RouterKind
    from dyexport.bundle.manifest import Precision, Quantization
    from dyexport.pipeline.settings import BuildSettings


BundleArgument = Annotated[Path, typer.Argument(help="A bundle directory.")]
StepsOption = Annotated[int, typer.Option(help="Denoising steps.")]
SchedulerOption = Annotated[
    str | None, typer.Option(help="ddim or dpm++ for DiT, euler for SiT; by default the first that fits.")
]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="What weights may take while running, such as 8GiB; fewer engines stay in memory then."),
]
TargetOption = Annotated[str, typer.Option(help="Which of the bundle's engine formats to run.")]


def _option(help_text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help_text, metavar=metavar)


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """As given on the command line; ``settings`` checks them."""

    model: Annotated[str, _option("A preset; `dyexport models` lists them.", "--model", "-m")]
    budget: Annotated[
        str | None,
        _option(
            "FLOPs of attention and MLP against dense, such as 0.5. Without it routers stay as they are.",
            "--budget",
            "-b",
        ),
    ] = None
    router: Annotated[
        str,
        _option("Which units are on at a timestep: free, any of them; ordered, the first ones, so engines share more."),
    ] = "free"
    td_lora: Annotated[
        str | None,
        _option(
            "Train low-rank updates that follow the timestep, and routers, instead of all weights.",
            metavar="rank=R[,experts=E][,variant=standard|inverse|symmetric][,alpha=A][,bias=none|all]",
        ),
    ] = None
    merge_tolerance: Annotated[
        float | None,
        _option(
            "Merge TD-LoRA into the weights of engines where that changes the output by at most this relative MSE, "
            "such as 1e-4; by default it has a path of its own, which is exact."
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        _option(
            "A LoRA to merge into the static model, such as style.safetensors@0.8; may be repeated.",
            "--lora",
            metavar="FILE[@SCALE]",
        ),
    ] = None
    checkpoint: Annotated[
        str | None,
        _option(
            "A diffusers directory or file, a hub id, a published DiT or SiT .pt, or one with routers, which are kept: "
            "a dynamic checkpoint or a published DyDiT .pt."
        ),
    ] = None
    random_weights: Annotated[
        bool, _option("Random weights instead of a checkpoint, for timing.", "--random-weights")
    ] = False
    data: Annotated[
        str | None,
        _option(
            "What to train and calibrate on: digits, synthetic, synthetic:FILE with one prompt a line, or a directory "
            "of safetensors latents."
        ),
    ] = None
    synthetic: Annotated[
        str | None,
        _option(
            "How --data synthetic is sampled; by default 4096 samples, in as many steps and with such guidance as is "
            "usual for the model.",
            metavar="samples=N[,steps=S][,guidance=G]",
        ),
    ] = None
    engines: Annotated[
        int | None,
        _option(
            "K, how many engines sampling switches between; by default 4, or 8 for small models.", "--engines", "-k"
        ),
    ] = None
    target: Annotated[str, _option("Engine formats to write, separated by commas.")] = "onnx"
    token_path: Annotated[
        str, _option("How skipped tokens are left out: auto, masked, capacity, dynamic or compact.")
    ] = "auto"
    compute_capability: Annotated[
        str | None, _option("GPUs that TensorRT-RTX plans are for, such as 8.6,8.9,12.0; by default all it knows.")
    ] = None
    profile: Annotated[
        list[str] | None,
        _option("Sizes of TensorRT plans, such as batch=1:2:8,image_tokens=1024:4096:4096; again for another profile."),
    ] = None
    stream_weights: Annotated[
        bool,
        _option(
            "TensorRT plans whose weights may stay in host memory where they do not fit on the GPU.", "--stream-weights"
        ),
    ] = False
    train_steps: Annotated[
        int | None, _option("Steps of training from scratch, for a digits model without a checkpoint.")
    ] = None
    finetune_steps: Annotated[
        int | None, _option("Steps of dynamic fine-tuning; 0 only calibrates, choosing units by importance.")
    ] = None
    precision: Annotated[
        str | None,
        _option("Of weights and products: fp32, fp16 or bf16; by default fp32, and bf16 for models of billions."),
    ] = None
    quantize: Annotated[
        str | None,
        _option("int8 or fp8 for weights and inputs of the linear layers of attention and MLP; by default neither."),
    ] = None
    memory: Annotated[
        str | None,
        _option(
            "What weights may take while calibrating, such as 8GiB (larger models are read from disk as they run), and "
            "what TensorRT-RTX's builders may take together (one always runs)."
        ),
    ] = None
    seed: Annotated[int, _option("Seed of all that is random.")] = 0
    no_baseline: Annotated[bool, _option("Leave out the dense graph that bench compares with.", "--no-baseline")] = (
        False
    )
    out: Annotated[Path | None, _option("The bundle; by default ./MODEL-BUDGET.", "--out", "-o")] = None
    work: Annotated[
        Path | None, _option("Finished stages, for resuming; by default beside the bundle, with .work added.")
    ] = None

    def settings(self) -> BuildSettings:
        """Raises ``UsageError`` for what cannot be built."""
        from dyexport.arguments import parse_bytes
        from dyexport.exporters.tensorrt_profiles import TensorrtSettings
        from dyexport.lora import parse_lora, parse_lora_file
        from dyexport.pipeline.settings import BuildSettings, default_out, default_work, parse_budget
        from dyexport.presets import get_preset
        from dyexport.training.synthetic_config import parse_synthetic

        budget = parse_budget(self.budget)
        out = self.out or default_out(self.model, budget)
        return BuildSettings(
            model=self.model,
            budget=budget,
            router=cast("RouterKind", self.router),  # BuildSettings refuses any other
            td_lora=parse_lora(self.td_lora),
            merge_tolerance=self.merge_tolerance,
            loras=tuple(parse_lora_file(text) for text in self.lora or ()),
            out=out,
            work=self.work or default_work(out),
            checkpoint=self.checkpoint,
            random_weights=self.random_weights,
            data=self.data,
            synthetic=parse_synthetic(self.synthetic),
            engines=get_preset(self.model).engines if self.engines is None else self.engines,
            targets=tuple(self.target.split(",")),
            token_path=self.token_path,
            tensorrt=TensorrtSettings(
                compute_capabilities=tuple(self.compute_capability.split(",")) if self.compute_capability else (),
                profiles=tuple(self.profile or ()),
                stream_weights=self.stream_weights,
            ),
            train_steps=self.train_steps,
            finetune_steps=self.finetune_steps,
            seed=self.seed,
            baseline=not self.no_baseline,
            precision=cast("Precision | None", self.precision),  # as router
            quantize=cast("Quantization | None", self.quantize),
            memory=None if self.memory is None else parse_bytes(self.memory),
        )


def takes_build_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let typer see the fields of the command's first argument, ``options``, as options of their own."""
    parameters = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field.default), annotation=hint)
        for field, hint in zip(fields(BuildOptions), _hints(BuildOptions).values(), strict=True)
    ]
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in list(inspect.signature(command).parameters.values())[1:]
    ]
    hints = _hints(command)

    @functools.wraps(command)
    def flattened(**values: Any) -> None:
        options = BuildOptions(**{field.name: values.pop(field.name) for field in fields(BuildOptions)})
        command(options, **values)

    del flattened.__wrapped__  # its signature is not the one to show
    signature = inspect.Signature([*parameters, *(p.replace(annotation=hints[p.name]) for p in own)])
    flattened.__signature__ = signature  # type: ignore[attr-defined]
    flattened.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return flattened


def _hints(described: Any) -> dict[str, Any]:
    return get_type_hints(described, include_extras=True)


def _default(value: Any) -> Any:
    return inspect.Parameter.empty if value is MISSING else value
