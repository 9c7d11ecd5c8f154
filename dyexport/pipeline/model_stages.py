"""The stages that make the model: from a checkpoint to the calibrated reference, each recorded in the ledger."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from dyexport.backbones.recipe import Schedule
from dyexport.bundle.manifest import ModelSpec
from dyexport.bundle.tables import TokenStats, WidthTable
from dyexport.calibration.precision import headroom
from dyexport.checkpoints.locate import CONFIG
from dyexport.digests import sha256_of
from dyexport.files import remove
from dyexport.lora import LoraFile, lora_sources
from dyexport.models.inputs import NoisedInputs
from dyexport.pipeline import reference, stages
from dyexport.pipeline.ledger import BuildListener, Ledger, Outcome, Stage, describe, digest_of, settings_key
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.stage_settings import (
    calibrated_settings,
    control_settings,
    data_settings,
    dynamic_settings,
    static_settings,
)
from dyexport.training.data import LatentSource
from dyexport.training.processes import ProcessGroup
from dyexport.training.prompts import read_prompts


class ModelStages:
    """The stages of one build. Each method runs what it needs first; what is up to date is only checked."""

    def __init__(
        self,
        settings: BuildSettings,
        listener: BuildListener,
        *,
        without: frozenset[str] = frozenset(),
        team: ProcessGroup | None = None,
    ) -> None:
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # says of every weight that it has no value yet
        self.settings = settings
        self.listener = listener
        self.ledger = Ledger(settings.work, listener, without=without, team=team)

    @cached_property
    def static(self) -> Outcome:
        """The static model, as a diffusers directory."""
        self.ledger.check_allowed("static")
        self._check_given()  # before a download
        chosen = static_settings(self.settings)
        source = stages.checkpoint_source(self.settings)
        inputs: dict[str, Any] = {"model": self.settings.model, "seed": self.settings.seed}
        if source is not None:
            inputs = {"model": self.settings.model, "checkpoint": _contents(source)}
            if self.settings.loras:  # left out otherwise: without them, all is as before
                inputs["loras"] = sorted(_lora_key(lora) for lora in self.settings.loras)
        elif self.settings.from_scratch:
            inputs |= self._training(self.settings.static_schedule)
        scratch = self._scratch("static", chosen)
        data = self.data if self.settings.from_scratch else None
        make = partial(stages.make_static, self.settings, source, data, scratch, self._trained("static"))
        return self._run("static", "static", inputs, make, chosen, scratch, shared=True)

    def _check_given(self) -> None:
        """Raise ``DataError`` for data and prompts that cannot be used."""
        if self.settings.data_source not in (None, "synthetic"):
            self.data  # noqa: B018
        if self.settings.prompts is not None:
            read_prompts(self.settings.prompts)

    @cached_property
    def dynamic(self) -> Outcome:
        """The dynamic checkpoint, before it is moved onto the budget."""
        routers, chosen = self.settings.routers, dynamic_settings(self.settings)
        inputs: dict[str, Any] = {"static": self.static.digest, "routers": routers, "seed": self.settings.seed}
        if self.settings.router != "free":  # left out otherwise: work of before there was a choice stays valid
            inputs["router"] = self.settings.router
        if self.settings.lora is not None:
            inputs["td_lora"] = self.settings.lora.model_dump()
        if routers == "given":
            inputs["checkpoint"] = _contents(Path(str(self.settings.checkpoint)))
        elif routers != "random":
            inputs["data"] = self._data_digest
        if routers == "trained":
            inputs |= {"budget": self.settings.budget, "distill": self.settings.recipe.distill}
            inputs |= self._training(self.settings.finetune_schedule)
        scratch = self._scratch("dynamic", chosen)
        source = self.data if routers in ("trained", "none") and self.settings.data_source else None
        make = partial(stages.make_dynamic, self.settings, self.static.path, source, scratch, self._trained("dynamic"))
        return self._run("dynamic", "dynamic", inputs, make, chosen, scratch, shared=True)

    @cached_property
    def calibrated(self) -> Outcome:
        """The reference model on budget, with its width table and token statistics."""
        inputs: dict[str, Any] = {
            "static": self.static.digest,
            "dynamic": self.dynamic.digest,
            "data": self._data_digest,
        }
        inputs |= {"budget": self.settings.budget, "routers": self.settings.routers, "seed": self.settings.seed}
        if self.settings.calibrates_in_bf16:  # left out otherwise: work of before there was a choice stays valid
            inputs["products"] = "bf16"

        def make(out: Path) -> None:
            inputs = self.calibration_inputs("calibrate")
            reference.make_calibrated(self.settings, self.static.path, self.dynamic.path, inputs, out)

        return self._run("calibrate", "calibrated", inputs, make, calibrated_settings(self.settings))

    @cached_property
    def control(self) -> Outcome:
        """The static model trained on for as long as the dynamic one was: what fine-tuning alone would have given."""
        pace, chosen = self.settings.finetune_schedule, control_settings(self.settings)
        inputs = {"static": self.static.digest, "seed": self.settings.seed, **self._training(pace)}
        scratch = self._scratch("control", chosen)

        def make(out: Path) -> None:
            stages.make_control(self.settings, self.static.path, self.data, scratch, self._trained("control"), out)

        return self._run("control", "control", inputs, make, chosen, scratch, shared=True)

    @cached_property
    def headroom(self) -> dict[str, float]:
        """How far from overflow the model stays in fp16, if that is asked for. Raises ``UsageError`` where it fails."""
        if self.settings.stored_precision != "fp16":
            return {}
        inputs = {"calibrated": self.calibrated.digest, "data": self._data_digest, "seed": self.settings.seed}

        def make(out: Path) -> None:
            inputs = self.calibration_inputs("precision")
            reference.make_magnitudes(self.settings, self.calibrated.path, inputs, out)

        outcome = self._run("precision", "magnitudes.json", inputs, make)
        return {"fp16_headroom": headroom(reference.read_metrics(outcome.path))}

    @cached_property
    def tables(self) -> tuple[ModelSpec, WidthTable, TokenStats | None]:
        settings = self.settings
        path, precision = self.calibrated.path, settings.stored_precision
        return reference.read_calibrated(path, settings.preset, precision, settings.quantize)

    @property
    def metrics(self) -> dict[str, float]:
        """What calibration measured."""
        return {**reference.read_metrics(self.calibrated.path / reference.METRICS), **self.headroom}

    @property
    def stage_report(self) -> dict[str, dict[str, Any]]:
        """What was done and what was not, stage by stage; seconds now, and when it was made."""
        return {
            name: {
                "status": "reused" if outcome.reused else "done",
                "seconds": round(outcome.seconds, 3),
                "made_in": outcome.made_in,
            }
            for name, outcome in self.ledger.outcomes.items()
        }

    @cached_property
    def data(self) -> LatentSource:
        """Training and calibration data; call only where ``settings.data_source`` says there is some."""
        return stages.open_data(self.settings, self._synthetic)

    def calibration_inputs(self, stage: str) -> NoisedInputs:
        """For a stage, whose progress they tell."""
        inputs = stages.calibration_inputs(self.settings, self.data if self.settings.data_source else None)
        return replace(inputs, advance=partial(self.listener.advanced, stage))

    @property
    def _data_digest(self) -> str:
        return digest_of([self.data.name, len(self.data)] if self.settings.data_source else None)

    @cached_property
    def _synthetic(self) -> Path:
        """Where synthetic data lies; it is made only if the settings ask for it."""
        if self.settings.data_source != "synthetic":
            return self.settings.work / "synthetic"
        chosen = {**static_settings(self.settings), **data_settings(self.settings)}
        source, scratch = stages.checkpoint_source(self.settings), self._scratch("synthetic", chosen)
        prompts = self._prompts_digest(source)
        sampling = asdict(self.settings.sampling)
        inputs = {"static": self.static.digest, "sampling": sampling, "prompts": prompts}
        progress = partial(self.listener.advanced, "synthetic")
        make = partial(stages.make_synthetic, self.settings, self.static.path, source, prompts, scratch, progress)
        return self._run("synthetic", "synthetic", inputs, make, chosen, scratch).path

    def _prompts_digest(self, source: Path | None) -> str:
        """Identifies embedded prompts: by their texts and what embeds them."""
        encoders = stages.text_encoders(self.settings, source)
        if encoders is None:
            return ""
        kinds = ("text_encoder*", "tokenizer*", "model_index.json")
        parts = sorted(path for kind in kinds for path in Path(encoders).glob(kind))
        return digest_of([[_contents(part) for part in parts] or encoders, read_prompts(self.settings.prompts)])

    def _training(self, pace: Schedule) -> dict[str, Any]:
        return {"schedule": asdict(pace), "data": self._data_digest}

    def _trained(self, stage: str) -> Any:
        def progress(done: int, total: int, metrics: Mapping[str, float]) -> None:
            detail = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            self.listener.advanced(stage, done, total, detail)

        return progress

    def _scratch(self, stage: str, chosen: Mapping[str, Any]) -> Path:
        """Return the folder in which a stage keeps what it needs to resume."""
        return self.settings.work / "training" / f"{stage}-{settings_key(chosen)}"

    def _run(
        self,
        name: str,
        output: str,
        inputs: Mapping[str, Any],
        make: Any,
        chosen: Mapping[str, Any] | None = None,
        scratch: Path | None = None,
        *,
        shared: bool = False,
    ) -> Outcome:
        """With settings ``chosen``, what others made is kept next to this.

        ``scratch``, where there is one, is what a stopped run resumes from: of no use once it is done.
        """
        stage = Stage(name=name, output=output, inputs=inputs, make=make, settings=chosen, shared=shared)
        outcome = self.ledger.run(stage)
        if scratch is not None and self.ledger.team.leads:
            remove(scratch)
            with suppress(OSError):  # the folder of another run's scratch stays
                scratch.parent.rmdir()
        return outcome


def _lora_key(lora: LoraFile) -> tuple[list[str], float]:
    """Identifies a LoRA by contents and scale; their order makes no difference."""
    return [sha256_of(file) for file in lora_sources(lora.file)], lora.scale


def _contents(source: Path) -> str:
    """Identify a checkpoint by what is read of it, not by its path; the config of a file may lie next to it."""
    found = {name: record.sha256 for name, record in describe(source).items()}
    if source.is_file() and (config := source.with_name(CONFIG)).is_file():
        found[CONFIG] = sha256_of(config)
    return digest_of(found)
