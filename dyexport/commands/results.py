"""Lines that several build commands print."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyexport.bundle.manifest import DENSE
from dyexport.bundle.manifest_file import MANIFEST, read_manifest
from dyexport.bundle.plan import ALLOCATES
from dyexport.bundle.targets import TARGETS
from dyexport.console import format_bytes

if TYPE_CHECKING:
    from dyexport.bundle.manifest import Manifest
    from dyexport.bundle.plan import SegmentPlan

NARROW = 4.0  # times below the limit of fp16
NOTICED = 0.004  # relative MSE that raised the Frechet distance of digits by half (benchmarks/without_training.py)


def plan_costs(plan: SegmentPlan) -> dict[str, Any]:
    """Return the number of engines, FLOPs ratios and sizes of a plan."""
    return {"engines": len(plan.segments), **plan.model_dump(exclude={"segments"})}


def other_budgets(out: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Return FLOPs ratios and metrics of a bundle's budgets other than its default one."""
    folders = [folder for budget in manifest.budgets if (folder := manifest.folder_of(budget)) is not None]
    others = [read_manifest(out / folder / MANIFEST) for folder in folders]
    return [{"budget": other.budget, **plan_costs(other.plan), **other.metrics} for other in others]


def other_budget_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Return a line for each budget other than the default one."""
    return [
        (
            f"at budget {other['budget']:g}",
            f"lambda {other['flops_ratio']:.3f}, output error {other['output_relative_mse']:.4f}"
            + (f", {other['executed_flops_ratio']:.3f} as executed" if "executed_flops_ratio" in other else ""),
        )
        for other in payload["budgets"]
    ]


def error_line(payload: Mapping[str, Any]) -> tuple[str, str]:
    """Return the distance to the static model's outputs, also before projections were repaired if they were."""
    before = payload.get("unrepaired_relative_mse")
    repaired = "" if before is None else f"; {before:.4f} before its projections were repaired"
    return ("output error against dense", f"{payload['output_relative_mse']:.4f} (relative MSE{repaired})")


def untrained_line(payload: Mapping[str, Any]) -> str | None:
    """Return a warning if nothing was trained and the output error is one that samples are known to suffer from."""
    error = payload["output_relative_mse"]
    if payload["recipe"]["routers"] != "none" or error < NOTICED:
        return None
    return (
        f"nothing was trained, and an output error of {error:.4f} shows in samples: on digits {NOTICED} raised the "
        "Frechet distance by half; fine-tune, or raise --budget"
    )


def missed_line(payload: Mapping[str, Any]) -> str | None:
    """Return a warning if trained routers could not meet the budget, so that the bundle meets it without them."""
    if "missed_flops_ratio" not in payload:
        return None
    return (
        f"the trained routers are not used: the nearest to the budget of {payload['budget']:g} that they reach is "
        f"{payload['missed_flops_ratio']:.3f}; widths were chosen by importance, and every token runs; "
        "fine-tune for longer"
    )


def headroom_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Return the margin to the limit of fp16, with a warning if it is narrow: calibration does not see every input."""
    if "fp16_headroom" not in payload:
        return ()
    warning = "; other inputs may overflow, use bf16 to be safe" if payload["fp16_headroom"] < NARROW else ""
    return (("largest value in fp16", f"{payload['fp16_headroom']:.1f} x below the limit{warning}"),)


def trainable_lines(payload: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Return how many parameters are trained, if any."""
    if "trainable_parameters" not in payload:
        return ()
    count, share = payload["trainable_parameters"], payload["trainable_share"]
    return (("trained", f"{count:,.0f} parameters ({100 * share:.2f} % of full fine-tuning's)"),)


def unbudgeted_line(routers: str, share: float) -> str:
    """Return a sentence on the FLOPs of a model whose routers were kept as they are."""
    kind = "routers of the checkpoint" if routers == "given" else f"{routers} routers"
    return f"No --budget was given: the {kind} stay as they are, at {share:.3f} of the dense model's FLOPs."


def next_commands(manifest: Manifest, checkpoint: str | None) -> Sequence[str]:
    """Return commands that run on a bundle as they are: sampling from prompts needs text encoders that are known."""
    from dyexport.backbones import get_pipeline
    from dyexport.backbones.sampling import PromptPipeline

    spec, pipeline = manifest.model, get_pipeline(manifest.model.backbone)
    commands = ["verify {}"]
    if not isinstance(pipeline, PromptPipeline):
        commands.append("sample {}")
    elif checkpoint is not None and (Path(checkpoint) / "model_index.json").is_file():
        commands.append(f"sample {{}} --prompt 'a lighthouse at dusk' --pipeline {shlex.quote(checkpoint)}")
    elif pipeline.home(spec) is not None:
        commands.append("sample {} --prompt 'a lighthouse at dusk'")
    return [*commands, *(["bench {}"] if any(engine.network == DENSE for engine in manifest.engines) else [])]


def next_lines(payload: Mapping[str, Any], commands: Sequence[str]) -> str:
    """Return the commands to run after a build, and the size of its work directory with how to remove it."""
    bundle, work = shlex.quote(payload["bundle"]), os.path.relpath(payload["work"])
    lines = "".join(f"\n  dyexport {command.replace('{}', bundle, 1)}" for command in commands)
    return (
        f"\nNext:{lines}\n\n"
        f"{work} ({format_bytes(payload['work_bytes'])}) holds the finished stages, for other builds of this model.\n"
        f"To remove it: rm -r {shlex.quote(work)}"
    )


def token_path_line(plan: SegmentPlan) -> str | None:
    """Return a sentence on the targets that cannot run a plan, with the option that lets them; None if all can."""
    if not plan.allocates:
        return None
    targets = " or ".join(name for name, target in TARGETS.items() if target.static_tokens and target.compiled)
    return f"To compile this model for {targets}, build with --token-path dynamic instead of {ALLOCATES}."
