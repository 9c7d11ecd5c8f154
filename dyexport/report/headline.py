"""The first lines of a report: what the bundle is, and three figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dyexport.backbones import get_pipeline
from dyexport.bench.rows import BenchReport
from dyexport.bundle.manifest import Manifest
from dyexport.bundle.reader import Bundle
from dyexport.report.contents import Figure, Headline

if TYPE_CHECKING:
    from dyexport.verification.report import VerifyReport


def headline_of(bundle: Bundle, verified: VerifyReport | str, bench: BenchReport | None) -> Headline:
    manifest = bundle.manifest
    budget = "routers of the checkpoint" if manifest.budget is None else f"budget {manifest.budget:g}"
    return Headline(
        model=manifest.model.name,
        budget=budget,
        sentence=_sentence(manifest, routed=bundle.token_stats is not None),
        figures=(_flops(manifest), _speed(bench), _error(verified)),
    )


def _sentence(manifest: Manifest, *, routed: bool) -> str:
    spec, engines = manifest.model, len(manifest.plan.segments)
    source = "class labels" if get_pipeline(spec.backbone).takes == "labels" else "prompts"
    samples = "videos" if spec.frames is not None else "pictures"
    parts = "attention heads, MLP groups and tokens" if routed else "attention heads and MLP groups"
    cut = (
        f"cut into {engines} slim engines that sampling switches between: {parts} are left out where the timestep can "
        "do without them"
        if engines > 1
        else f"cut to one slim engine for all timesteps, without {parts} that it can do without"
    )
    return f"A diffusion transformer that makes {samples} from {source}, {cut}. Weights in {spec.number_formats}."


def _flops(manifest: Manifest) -> Figure:
    plan = manifest.plan
    return Figure(
        name="FLOPs ratio",
        value=f"{plan.flops_ratio:.3f}",
        note=f"of the dense attention and MLP; {plan.network_flops_ratio:.3f} of the whole network, "
        f"{plan.executed_flops_ratio:.3f} as the engines run",
    )


def _speed(bench: BenchReport | None) -> Figure:
    if bench is None:
        return Figure(name="Speed-up", value=None, note="see --bench")
    row = bench.headline
    over = row.over_dense
    where = f"target {row.target}, batch {row.batch}, on {bench.environment.device_name}"
    if over is None:
        return Figure(name="Speed-up", value=None, note=f"the bundle has no dense network; {where}")
    if over.value is None:
        note = f"rounds disagree: {over.low:.2f}x to {over.high:.2f}x over its own dense network; {where}"
        return Figure(name="Speed-up", value=None, note=note, absent="not trusted")
    return Figure(name="Speed-up", value=f"{over.value:.2f}x", note=f"over its own dense network; {where}")


def _error(verified: VerifyReport | str) -> Figure:
    name = "Largest error"
    if isinstance(verified, str):
        return Figure(name=name, value=None, note=verified)
    if verified.error is None:
        return Figure(name=name, value=None, note="nothing could be compared, or an output is not finite")
    kind = "absolute" if verified.precision == "fp32" else "relative"
    kind = kind if verified.quantization is None else "over that of quantization"
    against = "against the masked model" if verified.passed else "against the masked model: FAILED"
    return Figure(
        name=name, value=f"{verified.error:.1e}", note=f"{kind}, {against}; at most {verified.tolerance:g} passes"
    )
