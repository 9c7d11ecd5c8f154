"""The main job from nothing: ``dyexport build --model sit-digits --budget 0.5``, and a look at what came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from dyexport.bench.compare import compare
from dyexport.bench.pictures import grid, save_png, side_by_side, zoom_for
from dyexport.bench.rows import BenchReport, trusted
from dyexport.bench.settings import BenchSettings
from dyexport.bundle.reader import Bundle
from dyexport.errors import DyexportError
from dyexport.evaluation.evaluate import evaluate
from dyexport.evaluation.report import DENSE, DYNAMIC, EvalReport
from dyexport.evaluation.settings import EvalSettings, SamplingConfig
from dyexport.pipeline.build import build_bundle, opened
from dyexport.pipeline.settings import BuildSettings
from dyexport.progress import Progress
from dyexport.report.width_map import WidthMap
from dyexport.report.width_map_image import POINTS, render_image
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import Denoiser, sample
from dyexport.stages.ledger import BuildListener
from dyexport.verification.report import VerifyReport
from dyexport.verification.settings import VerifySettings
from dyexport.verification.verify import verify_bundle

SAMPLING = SamplingConfig()
BENCH = BenchSettings(
    batches=(64,), compiled=False, eager=False
)  # small batches of so small a model time the calls, not the network
PICTURE_ROWS = 6


def demo_settings(out: Path) -> BuildSettings:
    """Return the settings of ``dyexport build`` with its defaults."""
    return BuildSettings(model="sit-digits", budget=0.5, out=out / "bundle", work=out / "work")


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Paths and measurements; ``max_abs_error`` is the difference from the masked torch model in fp32."""

    bundle: str
    pictures: str
    widths: str
    flops_ratio: float
    network_flops_ratio: float
    speedup_vs_dense: float | None  # None: rounds disagreed too much
    max_abs_error: float
    frechet_dense: float
    frechet_dynamic: float
    frechet_real: float
    class_accuracy: float
    seconds: float


def run_demo(
    settings: BuildSettings,
    listener: BuildListener,
    *,
    sampling: SamplingConfig = SAMPLING,
    bench: BenchSettings = BENCH,
) -> DemoReport:
    """Build, verify, time, score and sample. The build resumes; the rest is measured each time."""
    begin = perf_counter()
    with opened(settings, listener) as run:
        build_bundle(run)
    bundle = Bundle.open(settings.out)
    with _stage(listener, "verify") as advance:
        verified = verify_bundle(settings.out, VerifySettings(), progress=advance)
    with _stage(listener, "bench") as advance:
        timed = compare(bundle, bench, lambda name: nullcontext(advance))
    with _stage(listener, "eval") as advance:
        scored = evaluate(bundle, EvalSettings(sampling=sampling, seeds=(settings.seed,)), advance)
    with _stage(listener, "pictures"):
        pictures, widths = save_pictures(bundle, settings.out.parent, sampling.steps)
    return _report(bundle, pictures, widths, verified, timed, scored, perf_counter() - begin)


@contextmanager
def _stage(listener: BuildListener, name: str) -> Iterator[Progress]:
    begin = perf_counter()
    listener.started(name, "always")
    yield lambda done, total: listener.advanced(name, done, total)
    listener.finished(name, perf_counter() - begin, reused=False)


def save_pictures(bundle: Bundle, folder: Path, steps: int | None) -> tuple[Path, Path]:
    """Save samples of the dense and the dynamic model from the same noise, and the heat map of widths."""
    loaded = load(bundle.root, check_hashes=False)
    models: dict[str, Denoiser] = {
        "dense": load(bundle.root, check_hashes=False, dense=True),
        "dynamic": loaded,
    }
    spec = bundle.manifest.model
    labels = [*range(spec.classes)] * PICTURE_ROWS
    images = {}
    for name, model in models.items():
        samples = sample(model, spec, labels, steps=steps)  # (B, 1, 8, 8)
        images[name] = grid(samples.numpy(), spec.classes, zoom=zoom_for(spec.latent_shape[1]) // 2)
    loaded.close()
    pictures, widths = folder / "digits.png", folder / "widths.png"
    save_png(side_by_side(images), pictures)
    save_png(render_image(WidthMap.of(bundle, POINTS)), widths)
    return pictures, widths


def _report(
    bundle: Bundle,
    pictures: Path,
    widths: Path,
    verified: VerifyReport,
    timed: BenchReport,
    scored: EvalReport,
    seconds: float,
) -> DemoReport:
    if not verified.passed or verified.max_abs_error is None:
        raise DyexportError(
            f"{bundle.root} differs from masked torch by {verified.max_abs_error}, "
            f"with {verified.wrong_gates} gates wrong; see `dyexport verify {bundle.root}`"
        )
    dense, dynamic = scored.scores(DENSE), scored.scores(DYNAMIC)
    assert dense is not None, "a build with its defaults has the dense network"
    assert dynamic is not None
    return DemoReport(
        bundle=str(bundle.root),
        pictures=str(pictures),
        widths=str(widths),
        flops_ratio=timed.flops_ratio,
        network_flops_ratio=timed.network_flops_ratio,
        speedup_vs_dense=trusted(timed.headline.over_dense),
        max_abs_error=verified.max_abs_error,
        frechet_dense=_known(dense.frechet),
        frechet_dynamic=_known(dynamic.frechet),
        frechet_real=_known(scored.frechet_real),
        class_accuracy=_known(dynamic.class_accuracy),
        seconds=seconds,
    )


def _known(score: float | None) -> float:
    assert score is not None, "digits are scored by default"
    return score


def demo_rows(report: DemoReport) -> list[tuple[str, ...]]:
    return [
        ("lambda as run (attention + MLP)", f"{report.flops_ratio:.3f}"),
        ("whole-network FLOPs ratio", f"{report.network_flops_ratio:.3f}"),
        (
            "speed-up over dense",
            "not trusted" if report.speedup_vs_dense is None else f"{report.speedup_vs_dense:.2f}x",
        ),
        ("error against masked torch", f"{report.max_abs_error:.1e}"),
        ("Frechet distance, dense", f"{report.frechet_dense:.3f}"),
        ("Frechet distance, dynamic", f"{report.frechet_dynamic:.3f}"),
        ("Frechet distance, unseen real digits", f"{report.frechet_real:.3f}"),
        ("class accuracy, dynamic", f"{report.class_accuracy:.1%}"),
        ("minutes", f"{report.seconds / 60:.1f}"),
    ]
