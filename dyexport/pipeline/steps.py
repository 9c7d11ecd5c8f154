"""The work of stages up to the dynamic model, as functions from settings and files to files; no ledger."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dyexport.backbones import get_adapter
from dyexport.backbones.recipe import Schedule
from dyexport.checkpoints.blockwise import BlockLoader, load_frozen
from dyexport.checkpoints.dynamic import load_with_routers, save_dynamic
from dyexport.checkpoints.locate import find_checkpoint
from dyexport.checkpoints.static import adopt_static, load_static, save_static
from dyexport.encoding.encode import Encoding, EncodingProgress
from dyexport.encoding.samples import Sample
from dyexport.errors import CheckpointError
from dyexport.files import hard_linked
from dyexport.models.devices import best_device, bf16_products
from dyexport.models.dynamic import DynamicTransformer
from dyexport.models.frozen_base import BaseWeights
from dyexport.models.random_weights import random_backbone, random_dynamic
from dyexport.pipeline.monitoring import monitoring_of
from dyexport.pipeline.ranking import UnitRanking
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.training_cost import finetuning_run
from dyexport.progress import Progress
from dyexport.stages.ledger import ProcessGroup
from dyexport.training.config import FinetuneConfig, TrainConfig
from dyexport.training.data import LatentSource
from dyexport.training.data_files import read_prompts
from dyexport.training.finetuning import finetune
from dyexport.training.memory import Launch, choose_division, free_memory, release_memory
from dyexport.training.processes import agreed
from dyexport.training.prompts import embed_prompts, kept_prompts
from dyexport.training.synthetic import generate
from dyexport.training.trainer import TrainingProgress, train_static

SHARDS, PROMPTS = "shards", "prompts.safetensors"  # of data under way


def checkpoint_source(settings: BuildSettings) -> Path | None:
    """Return the directory of the static weights, downloading them if need be; None if they are made here."""
    if settings.random_weights or settings.from_scratch:
        return None
    source = settings.checkpoint or settings.preset.hub_id
    if source is None:
        raise CheckpointError(
            f"no published weights are known for {settings.preset.name}; "
            "pass --checkpoint with a diffusers directory or a hub id, or --random-weights"
        )
    return find_checkpoint(source)


def make_static(
    settings: BuildSettings,
    source: Path | None,
    data: LatentSource | None,
    scratch: Path,
    progress: TrainingProgress,
    out: Path,
) -> None:
    """Write the static model as a diffusers directory: links to ``source``, or trained on ``data``, or random."""
    preset = settings.preset
    if source is not None:
        adopt_static(str(source), preset, out, settings.loras, lambda done, total: progress(done, total, {}))
        return
    backbone = random_backbone(preset, settings.seed)
    if data is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            get_adapter(preset.backbone).initialize(backbone)
        train_on(backbone, settings, settings.static_schedule, data, scratch, progress)
    save_static(backbone, out)


def train_on(
    backbone: nn.Module,
    settings: BuildSettings,
    schedule: Schedule,
    source: LatentSource,
    scratch: Path,
    progress: TrainingProgress,
) -> None:
    """Train a static model in place."""
    config = TrainConfig(**asdict(schedule), seed=settings.seed)
    monitoring = monitoring_of(settings, scratch)
    train_static(backbone, settings.preset, source, config, work_dir=scratch, progress=progress, monitoring=monitoring)


def make_control(
    settings: BuildSettings, static: Path, source: LatentSource, scratch: Path, progress: TrainingProgress, out: Path
) -> None:
    """Write the static model, trained for as long as the dynamic one is fine-tuned."""
    backbone = load_static(str(static), settings.preset)
    train_on(backbone, settings, settings.finetune_schedule, source, scratch, progress)
    save_static(backbone, out)


def make_synthetic(
    settings: BuildSettings,
    static: Path,
    source: Path | None,
    prompts: str,
    scratch: Path,
    progress: Callable[..., None],
    group: ProcessGroup,
    out: Path,
) -> None:
    """Sample latents from the static model, for prompts that the pipeline of its checkpoint embeds.

    ``prompts`` identifies the embeddings, which the main process makes. Finished shards are kept in ``scratch``, where
    a stopped run resumes; there the processes of a group share the work.
    """
    preset, shards, embedded = settings.preset, scratch / SHARDS, None
    shards.mkdir(parents=True, exist_ok=True)
    if (encoders := text_encoders(settings, source)) is not None:
        texts = read_prompts(settings.prompts)
        embed = partial(embed_prompts, encoders, texts, preset, device=best_device())
        if group.is_main_process:
            kept_prompts(scratch / PROMPTS, embed, prompts)
        group.broadcast("embedded")
        embedded = kept_prompts(scratch / PROMPTS, embed, prompts)
        release_memory()  # of the text encoders
    precision, device = settings.frozen_precision, torch.device(best_device())
    backbone = load_frozen(str(static), preset, precision, device)
    with bf16_products(device, enabled=precision != "fp32"):
        generate(backbone, preset, settings.sampling, shards, progress, prompts=embedded, group=group)
    if group.is_main_process:
        _link(shards, out)


def make_encoded(
    encoding: Encoding,
    samples: Sequence[Sample],
    earlier: Iterable[Path],
    scratch: Path,
    progress: EncodingProgress,
    out: Path,
) -> None:
    """Encode pictures but for those that shards of ``earlier`` encodings hold.

    Finished shards are kept in ``scratch``, where a stopped run resumes.
    """
    encoding.write(samples, scratch / SHARDS, progress, earlier)
    _link(scratch / SHARDS, out)


def _link(shards: Path, out: Path) -> None:
    """Make a directory of links to finished files, so that a kill before the stage is recorded loses none."""
    out.mkdir()
    for file in sorted(shards.iterdir()):
        if not hard_linked(file, out / file.name):
            shutil.copyfile(file, out / file.name)


def text_encoders(settings: BuildSettings, source: Path | None) -> str | None:
    """Return where the text encoders are: next to the transformer ``source``, or a hub id; None if there are none.

    Models of classes have no prompts, and those with random weights get random embeddings.
    """
    preset = settings.preset
    if preset.classes or settings.random_weights:
        return None
    if source is not None and (source.parent / "model_index.json").is_file():
        return str(source.parent)
    if preset.hub_id is None and settings.prompts is not None:
        raise CheckpointError(
            f"no text encoders for the prompts of --data lie next to {source}; "
            "give --checkpoint a whole pipeline's directory"
        )
    return preset.hub_id


def make_dynamic(
    settings: BuildSettings,
    static: Path,
    source: LatentSource | None,
    ranking: UnitRanking,
    scratch: Path,
    loading: Progress,
    progress: TrainingProgress,
    out: Path,
) -> None:
    """Write the dynamic checkpoint: that of the user, a random one, or the static model with new routers.

    ``ranking`` is for a model that is trained; ``loading`` reports how much of its weights is read.
    """
    preset = settings.preset
    if settings.routers == "given":
        model = load_with_routers(Path(str(settings.checkpoint)), preset, stream=True)
        save_dynamic(model, out, preset, backbone=static)
    elif settings.routers == "random":
        model = random_dynamic(
            preset,
            seed=settings.seed,
            router=settings.router_kind,
            td_lora=settings.lora,
            token_router=settings.token_router_kind,
        )
        save_dynamic(model, out, preset, backbone=static)
    elif settings.routers == "none":
        backbone = load_static(str(static), preset, stream=True)
        save_dynamic(attach_routers(backbone, settings), out, preset, backbone=static)
    else:
        assert source is not None
        model = _finetuned(settings, static, source, ranking.order(), scratch, loading, progress)
        save_dynamic(model, out, preset, weights=trained_weights(model))


def _finetuned(
    settings: BuildSettings,
    static: Path,
    source: LatentSource,
    order: Mapping[str, Tensor],
    scratch: Path,
    loading: Progress,
    progress: TrainingProgress,
) -> DynamicTransformer:
    """Return the static model with its units in a new order, trained under the budget."""
    assert settings.budget is not None
    preset, device, run = settings.preset, best_device(), finetuning_run(settings)
    assert run is not None
    division = agreed(choose_division(run, free_memory(), Launch.current()))
    loader = BlockLoader(str(static), preset)
    model = attach_routers(loader.backbone, settings)
    for part in model.parts().values():
        part.to(device)
    loader.load(settings.frozen_precision, device, order, loading)
    model.order = order
    config = FinetuneConfig(
        **asdict(settings.finetune_schedule),
        seed=settings.seed,
        budget=settings.budget,
        budgets=tuple(sorted(settings.budgets)),
        distill=settings.recipe.distill,
        base_precision=settings.frozen_precision,
        optimizer=settings.optimizer,
        **asdict(division),
    )
    monitoring = monitoring_of(settings, scratch)
    finetune(model, preset, source, config, work_dir=scratch, progress=progress, monitoring=monitoring)
    return model


def trained_weights(model: DynamicTransformer) -> Mapping[str, Tensor] | None:
    """Return the weights of a base in lower precision, dequantized; None for one in fp32."""
    weights = BaseWeights(model.backbone)
    return weights if weights.frozen else None


def attach_routers(backbone: nn.Module, settings: BuildSettings) -> DynamicTransformer:
    """Attach new routers, with every gate open. There are token routers only if they will be trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = _untrained(settings, backbone)
    return model.eval()


def _untrained(settings: BuildSettings, backbone: nn.Module) -> DynamicTransformer:
    return DynamicTransformer(
        backbone,
        get_adapter(settings.preset.backbone),
        heads=settings.preset.heads,
        tokens=settings.routers == "trained",
        router=settings.router_kind,
        td_lora=settings.lora,
        token_router=settings.token_router_kind,
        budgets=sorted(settings.budgets),
    )
