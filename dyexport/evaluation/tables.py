"""The report of ``dyexport eval`` as tables in a terminal, and as JSON, Markdown or CSV in a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dyexport.bench.report import Rows, as_markdown, as_table
from dyexport.bench.tables import pairs_table
from dyexport.evaluation.report import Drift, EvalReport, GoldenCheck, ModelScores, PairedScores
from dyexport.files import write_atomically

SHOWN_STEPS = 6  # of the drift, in a terminal
PAIRED = "Dynamic against dense, from equal noise"
PAIRED_NOTE = (
    "Informative, not a test: the dynamic model is fine-tuned, so its samples differ from the dense model's, and need "
    "not be worse."
)
GOLDEN = "Engines against the masked model that they were cut from"
GOLDEN_NOTE = "A test: both are the same function and must agree. `dyexport verify` compares them at more timesteps."

Column = tuple[str, Callable[[ModelScores], str]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _by_seed(scores: ModelScores) -> str:
    if len(scores.seeds) < 2:
        return ""
    return " ".join(_number(seed.frechet) for seed in scores.seeds)


def _kernel(scores: ModelScores) -> str:
    return "" if scores.kernel is None else f"{scores.kernel:.4f} ± {scores.seeds[0].kernel_deviation:.4f}"


COLUMNS: tuple[Column, ...] = (
    ("model", lambda scores: scores.model),
    ("Frechet distance", lambda scores: _number(scores.frechet)),
    ("by seed", _by_seed),
    ("kernel distance", _kernel),
    ("class accuracy", lambda scores: "" if scores.class_accuracy is None else f"{scores.class_accuracy:.2%}"),
    ("CLIP score", lambda scores: "" if scores.clip is None else f"{scores.clip:.2f}"),
)


def title(report: EvalReport) -> str:
    """Return one line on what was sampled."""
    guidance = "no guidance" if report.guidance in (None, 1.0) else f"guidance {report.guidance:g}"
    size = "" if report.size is None else ", {}x{} pixels".format(*report.size)
    seeds = "" if len(report.seeds) == 1 else f" for each of {len(report.seeds)} seeds"
    unit = "" if report.unit == "pixels" else ", scored as latents"
    return (
        f"{report.model}: {report.samples} samples of each model{seeds} from {report.conditions}{unit}{size}, "
        f"{report.steps} steps, {guidance}, lambda as run {report.flops_ratio:.3f}"
    )


def score_rows(report: EvalReport) -> tuple[tuple[str, ...], Rows]:
    """Return the header and one row per model, of the scores that were computed; the score of real data comes last."""
    cells = [(name, [text(scores) for scores in report.models]) for name, text in COLUMNS]
    kept = [(name, values) for name, values in cells if any(values)]
    rows: Rows = list(zip(*(values for _, values in kept), strict=True))
    if report.frechet_real is not None:
        real = {"model": f"held-out real {report.reference}", "Frechet distance": _number(report.frechet_real)}
        rows.append(tuple(real.get(name, "") for name, _ in kept))
    return tuple(name for name, _ in kept), rows


def score_notes(report: EvalReport) -> list[str]:
    """Return a sentence on each score: what it is of, and which values are good."""
    notes = []
    if report.reference is not None:
        notes.append(
            f"Frechet (FID) and kernel (KID) distances: lower is better, to {report.reference_samples} real samples "
            f"({report.reference}), by features of {report.features}."
        )
    if report.classifier is not None:
        notes.append(f"Class accuracy: share of samples in their class, by {report.classifier}; higher is better.")
    if report.clip is not None:
        notes.append(f"CLIP score: agreement with the prompt, by {report.clip}, 0 to 100; higher is better.")
    return notes


def paired_rows(paired: PairedScores, drift: Drift) -> Rows:
    """Return the comparisons of pairs, one in a row; the drift at a few steps."""
    what = "pictures" if paired.unit == "pixels" else "latents"
    equal = f", {paired.equal} more are equal" if paired.equal else ""
    pairs = f"over {paired.pairs - paired.equal} pairs of {what}{equal}"
    rows: Rows = []
    if paired.psnr is not None:
        rows.append(("PSNR", f"{paired.psnr:.1f} dB, lowest {paired.psnr_lowest:.1f} ({pairs})"))
    if paired.ssim is not None:
        window = "" if paired.ssim_window == 11 else f", window of {paired.ssim_window} for small pictures"
        rows.append(("SSIM", f"{paired.ssim:.3f}, lowest {paired.ssim_lowest:.3f}{window}"))
    if not rows:
        rows.append(("samples", f"all {paired.pairs} pairs of {what} are equal"))
    chosen = ", ".join(f"step {step + 1}: {drift.mean[step]:.2%}" for step in shown_steps(len(drift.mean)))
    last = f"{drift.largest[-1]:.2%}"
    return [*rows, ("drift of latents, relative L2", chosen), ("largest after the last step", last)]


def shown_steps(steps: int) -> list[int]:
    """Return a few evenly spaced steps, with the first and the last."""
    few = min(steps, SHOWN_STEPS)
    return [round(index * (steps - 1) / max(few - 1, 1)) for index in range(few)]


def golden_text(golden: GoldenCheck | None) -> str:
    """Return the result of the golden check in one line."""
    if golden is None:
        return "not compared: the bundle has no golden data"
    error = "no finite error" if golden.error is None else f"error {golden.error:.1e}"
    result = "passed" if golden.passed else "FAILED"
    return f"{result}: {error}, at most {golden.tolerance:g}, at {golden.timesteps} timesteps of golden data"


def eval_view(report: EvalReport) -> Group:
    """Return what a terminal shows."""
    header, rows = score_rows(report)
    parts: list[Table | Text] = [Text(title(report))]
    if len(header) > 1:
        parts += [Text(), as_table("Samples of each model", header, rows), *map(Text, score_notes(report))]
    if report.paired is not None and report.drift is not None:
        parts += [Text(), pairs_table(PAIRED, paired_rows(report.paired, report.drift)), Text(PAIRED_NOTE)]
    parts += [Text(), pairs_table(GOLDEN, [("golden check", golden_text(report.golden))]), Text(GOLDEN_NOTE)]
    return Group(*parts)


def eval_markdown(report: EvalReport) -> str:
    """Return the tables, with warnings above them and the drift after every step."""
    header, rows = score_rows(report)
    parts = [f"# {report.model}", title(report), *(f"> Warning: {warning}." for warning in report.warnings)]
    if len(header) > 1:
        parts += [as_markdown(header, rows).rstrip(), *score_notes(report)]
    if report.paired is not None and report.drift is not None:
        paired = as_markdown(("pairs", "value"), paired_rows(report.paired, report.drift))
        parts += [f"## {PAIRED}", PAIRED_NOTE, paired.rstrip(), _drift_markdown(report.drift)]
    parts += [f"## {GOLDEN}", f"{golden_text(report.golden)}. {GOLDEN_NOTE}"]
    return "\n\n".join(parts) + "\n"


def _drift_markdown(drift: Drift) -> str:
    values = zip(drift.mean, drift.largest, strict=True)
    rows: Rows = [(str(step), f"{mean:.4f}", f"{largest:.4f}") for step, (mean, largest) in enumerate(values, start=1)]
    return as_markdown(("after step", "mean drift", "largest"), rows).rstrip()


def eval_csv(report: EvalReport) -> str:
    """Return one line per model and seed. What was not scored is empty."""
    fields = ("frechet", "kernel", "kernel_deviation", "class_accuracy", "clip")
    records = [
        {
            "bundle": report.model,
            "model": scores.model,
            "unit": report.unit,
            "samples": report.samples,
            "steps": report.steps,
            "guidance": report.guidance,
            "seed": seed.seed,
            **{name: getattr(seed, name) for name in fields},
        }
        for scores in report.models
        for seed in scores.seeds
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def save_report(report: EvalReport, path: Path) -> None:
    """Write a report as JSON, Markdown or CSV, by the suffix of the file. Raises ``StorageError``."""
    texts: dict[str, Callable[[], str]] = {
        ".json": lambda: json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n",
        ".md": lambda: eval_markdown(report),
        ".csv": lambda: eval_csv(report),
    }
    write_atomically(path, texts[path.suffix.lower()]().encode())
