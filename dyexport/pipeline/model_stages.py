"""The stages that make a model: from a checkpoint to the calibrated reference, each recorded in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from dyexport.backbones.recipe import Schedule
from dyexport.calibration.precision import headroom
from dyexport.checkpoints.locate import CONFIG
from dyexport.digests import sha256_of
from dyexport.encoding.encode import INDEX, READING, SHARDS, Encoding
from dyexport.lora import LoraFile, lora_sources
from dyexport.pipeline import calibrate, steps
from dyexport.pipeline.calibration_inputs import calibration_inputs
from dyexport.pipeline.pictures import picture_folder, picture_settings
from dyexport.pipeline.ranking import RANKING, UnitRanking
from dyexport.pipeline.run import Run
from dyexport.pipeline.settings import SYNTHETIC
from dyexport.pipeline.stage_settings import (
    calibrated_settings,
    control_settings,
    data_settings,
    dynamic_settings,
    memory_settings,
    model_key,
    sampling_precision,
    static_settings,
    token_router_settings,
    trained_budget,
)
from dyexport.stages.file_records import describe, digest_of
from dyexport.stages.ledger import Outcome
from dyexport.training.data import LatentSource, ShardDirectory, open_source
from dyexport.training.data_files import read_prompts


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training and calibration data; without a ``source``, calibration uses noise."""

    source: LatentSource | None

    @property
    def digest(self) -> str:
        return digest_of(None if self.source is None else [self.source.name, len(self.source)])


def open_given_data(run: Run) -> Data | None:
    """Open data that exists, and encode pictures; None if it is sampled later.

    Raises ``DataError`` for data that does not fit the model.
    """
    settings = run.settings
    if picture_folder(settings) is not None:
        return encoded_data(run)
    if settings.data_source == SYNTHETIC:
        return None
    return Data(source=None if settings.data_source is None else open_source(settings.data_source, settings.preset))


def static_model(run: Run, source: Path | None, data: Data | None) -> Outcome:
    """Make the static model, a diffusers directory, from the checkpoint ``source``, on ``data``, or at random."""
    settings, chosen = run.settings, static_settings(run.settings)
    inputs: dict[str, Any] = {**model_key(settings), "seed": settings.seed}
    training_data: LatentSource | None = None
    if source is not None:
        inputs = {**model_key(settings), "checkpoint": _contents(source)}
        if settings.loras:  # omitted without them, so that older ledgers stay valid
            inputs["loras"] = sorted(_lora_key(lora) for lora in settings.loras)
    elif settings.from_scratch:
        assert data is not None
        training_data = data.source
        inputs |= _training(settings.static_schedule, data)
    scratch = run.scratch("static", chosen)
    make = partial(steps.make_static, settings, source, training_data, scratch, run.training_progress("static"))
    return run.stage("static", "static", inputs, make, chosen=chosen, scratch=scratch, shared=True)


def encoded_data(run: Run) -> Data:
    """Encode pictures, but for those that an earlier build in this work directory encoded."""
    settings, group = run.settings, run.ledger.group
    chosen = {**model_key(settings), **data_settings(settings)}
    scratch, digest = run.scratch("encoded", chosen), ""
    make: Callable[[Path], None] = _not_here
    if group.is_main_process:
        run.listener.started(READING, "")
        begin = perf_counter()
        encoding = Encoding(picture_settings(settings))
        samples = encoding.samples(settings.work / INDEX, run.listener.advanced)
        run.listener.finished(READING, perf_counter() - begin, reused=False)
        digest = encoding.digest_of(samples)
        progress = partial(_encoding_progress, run)
        make = partial(steps.make_encoded, encoding, samples, _encoded_before(run), scratch, progress)
    inputs = {"samples": group.broadcast(digest)}
    outcome = run.stage("encoded", "encoded", inputs, make, chosen=chosen, scratch=scratch)
    return Data(source=open_source(str(outcome.path), settings.preset))


def _encoded_before(run: Run) -> Iterator[Path]:
    """Yield the shards of earlier encodings, of any settings, that are not damaged."""
    stages = [record for name, record in run.ledger.records.items() if name.partition(" ")[0] == "encoded"]
    known = {file.sha256 for record in stages for file in record.files.values()}
    return (file for file in sorted(run.settings.work.glob(f"encoded*/{SHARDS}")) if sha256_of(file) in known)


def _not_here(out: Path) -> None:
    raise AssertionError("the main process encodes")


def _encoding_progress(run: Run, phase: str, done: int, total: int, detail: str) -> None:
    run.listener.advanced("encoded", done, total, detail)


def synthetic_data(run: Run, source: Path | None, static: Outcome) -> Data:
    """Sample data from the static model."""
    settings = run.settings
    chosen = {**static_settings(settings), **data_settings(settings), **sampling_precision(settings)}
    scratch, prompts = run.scratch("synthetic", chosen), _prompts_digest(run, source)
    inputs = {"static": static.digest, "sampling": asdict(settings.sampling), "prompts": prompts}
    inputs |= sampling_precision(settings)
    progress = partial(run.listener.advanced, "synthetic")
    make = partial(steps.make_synthetic, settings, static.path, source, prompts, scratch, progress, run.ledger.group)
    outcome = run.stage("synthetic", "synthetic", inputs, make, chosen=chosen, scratch=scratch, shared=True)
    return Data(source=ShardDirectory(outcome.path, settings.preset))


def _prompts_digest(run: Run, source: Path | None) -> str:
    """Identify embedded prompts by their texts and by what embeds them."""
    encoders = steps.text_encoders(run.settings, source)
    if encoders is None:
        return ""
    kinds = ("text_encoder*", "tokenizer*", "model_index.json")
    parts = sorted(path for kind in kinds for path in Path(encoders).glob(kind))
    return digest_of([[_contents(part) for part in parts] or encoders, read_prompts(run.settings.prompts)])


def dynamic_model(run: Run, static: Outcome, data: Data) -> Outcome:
    """Make the dynamic checkpoint, before it is moved onto the budget."""
    settings, chosen = run.settings, dynamic_settings(run.settings)
    routers = settings.routers
    inputs: dict[str, Any] = {"static": static.digest, "routers": routers, "seed": settings.seed}
    if settings.router_kind != "free":  # omitted at the default, so that older ledgers stay valid
        inputs["router"] = settings.router_kind
    inputs |= token_router_settings(settings)
    if settings.lora is not None:
        inputs["td_lora"] = settings.lora.model_dump()
    if routers == "given":
        inputs["checkpoint"] = _contents(Path(str(settings.checkpoint)))
    elif routers != "random":
        inputs["data"] = data.digest
    if routers == "trained":
        inputs |= {**trained_budget(settings), "distill": settings.recipe.distill, **memory_settings(settings)}
        inputs |= _training(settings.finetune_schedule, data)
    scratch = run.scratch("dynamic", chosen)
    ranking = UnitRanking(
        settings=settings,
        static=static.path,
        source=data.source,
        file=scratch / RANKING,
        origin=digest_of(inputs),
        group=run.ledger.group,
        progress=run.progress("dynamic", "ranking of units"),
    )
    loading, progress = run.progress("dynamic", "loading of weights"), run.training_progress("dynamic")
    make = partial(steps.make_dynamic, settings, static.path, data.source, ranking, scratch, loading, progress)
    return run.stage("dynamic", "dynamic", inputs, make, chosen=chosen, scratch=scratch, shared=True)


def control_model(run: Run, static: Outcome, data: Data) -> Outcome:
    """Train the static model for as long as the dynamic one: the effect of training alone."""
    settings, chosen = run.settings, control_settings(run.settings)
    inputs = {"static": static.digest, "seed": settings.seed, **_training(settings.finetune_schedule, data)}
    scratch, progress = run.scratch("control", chosen), run.training_progress("control")
    assert data.source is not None
    make = partial(steps.make_control, settings, static.path, data.source, scratch, progress)
    return run.stage("control", "control", inputs, make, chosen=chosen, scratch=scratch, shared=True)


def calibrated_model(run: Run, static: Outcome, dynamic: Outcome, data: Data) -> Outcome:
    """Make the reference model, on budget, with its width table and token statistics."""
    settings = run.settings
    inputs: dict[str, Any] = {"static": static.digest, "dynamic": dynamic.digest, "data": data.digest}
    inputs |= {"budget": settings.budget, "routers": settings.routers, "seed": settings.seed}
    inputs["widths"] = "up to the end"  # older tables may lack a switch there
    if settings.calibrates_in_bf16:  # omitted at the default, so that older ledgers stay valid
        inputs["products"] = "bf16"
    if settings.repairs:
        inputs["repair"] = "projections"

    def make(out: Path) -> None:
        noised = calibration_inputs(settings, data.source)
        phases = partial(run.progress, "calibrate")
        calibrate.make_calibrated(settings, static.path, dynamic.path, noised, phases, out)

    return run.stage("calibrate", "calibrated", inputs, make, chosen=calibrated_settings(settings))


def fp16_headroom(run: Run, calibrated: Outcome, data: Data) -> dict[str, float]:
    """Measure how far from overflow the model stays in fp16; {} for a bundle of another precision.

    Raises ``UsageError`` if it overflows.
    """
    settings = run.settings
    if settings.stored_precision != "fp16":
        return {}
    inputs = {"calibrated": calibrated.digest, "data": data.digest, "seed": settings.seed}

    def make(out: Path) -> None:
        noised = calibration_inputs(settings, data.source)
        calibrate.make_magnitudes(settings, calibrated.path, noised, run.progress("precision"), out)

    outcome = run.stage("precision", "magnitudes.json", inputs, make)
    return {"fp16_headroom": headroom(calibrate.read_metrics(outcome.path))}


def _training(schedule: Schedule, data: Data) -> dict[str, Any]:
    return {"schedule": asdict(schedule), "data": data.digest}


def _lora_key(lora: LoraFile) -> tuple[list[str], float]:
    """Identify a LoRA by contents and scale; the order of several makes no difference."""
    return [sha256_of(file) for file in lora_sources(lora.file)], lora.scale


def _contents(source: Path) -> str:
    """Return a digest of the files of a checkpoint, with the configuration next to a single file. Ignores the path."""
    records: Mapping[str, Any] = describe(source)
    digests = {name: record.sha256 for name, record in records.items()}
    if source.is_file() and (config := source.with_name(CONFIG)).is_file():
        digests[CONFIG] = sha256_of(config)
    return digest_of(digests)
