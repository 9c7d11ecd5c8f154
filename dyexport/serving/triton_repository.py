"""Write a bundle as a model of a Triton repository.

REPOSITORY/
  NAME/
    config.pbtxt     inputs, outputs, batching, and parameters, all editable
    1/
      model.py       imports ``dyexport.serving.triton_model``
      __pycache__    a file, which keeps Python from writing bytecode here
      bundle/        the bundle: hard links where the file system allows, else copies
      pipeline/      text encoders and VAE of a model of prompts, likewise; or vae/
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dyexport.arguments import PIXELS, STEPS, shown, whole_number
from dyexport.backbones import get_pipeline, sampling_defaults
from dyexport.backbones.sampling import VAE_SCALE, PromptPipeline
from dyexport.bundle.manifest import Manifest
from dyexport.bundle.manifest_file import MANIFEST
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.engines.networks import check_networks
from dyexport.engines.registry import engine_files
from dyexport.errors import MissingDependencyError, UsageError
from dyexport.files import check_writable, hard_linked, replacing, sync
from dyexport.noise_schedule import check_scheduler
from dyexport.progress import Progress
from dyexport.runtime.locating import check_source
from dyexport.serving.config import BUNDLE, PIPELINE, PROMPT_CHARACTERS, VAE, ServedModelConfig, output_of
from dyexport.serving.limits import Limits
from dyexport.serving.requests import LABEL, PROMPT, SEED

VERSION = "1"
UNFINISHED = "unfinished"
MARK = "Written by `dyexport deploy triton`"
MODEL_PY = f'''\
"""Serves the bundle next to it. {MARK}; needs dyexport in the server's Python."""

from dyexport.serving.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
NO_BYTECODE = "__pycache__"
NO_BYTECODE_TEXT = """\
This is a file, so that Python keeps its bytecode of model.py elsewhere or nowhere: a server that polls its repository
would take a new folder for a new model, and load it again. dyexport writes it; leave it here.
"""
MOST = {"instances": 64, "max_batch": 1024, "max_steps": STEPS, "max_pixels": PIXELS, "max_prompt": PROMPT_CHARACTERS}


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A bundle to serve, and the repository to serve it from.

    pipeline, vae  directories or hub ids
    instances      processes that serve the model at the same time
    max_batch      largest batch; None: the model's default
    """

    bundle: Path
    repository: Path
    name: str
    pipeline: str | None = None
    vae: str | None = None
    scheduler: str | None = None
    target: str = "onnx"
    memory: str | None = None
    instances: int = 1
    max_batch: int | None = None
    max_steps: int = Limits.max_steps
    max_pixels: int = Limits.max_pixels
    max_prompt: int = Limits.max_prompt

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]{,99}", self.name, re.ASCII):
            raise UsageError(f"--name is {shown(self.name)!r}; give up to 100 letters, digits, '.', '_' and '-'")
        for option, most in MOST.items():
            if (value := getattr(self, option)) is not None:
                whole_number(f"--{option.replace('_', '-')}", value, least=1, most=most)


def deploy(deployment: Deployment, progress: Progress | None = None) -> Path:
    """Write the model atomically, replacing one that was deployed there before, and return its directory.

    Raises ``BundleError`` for a damaged bundle, ``EngineMismatchError`` for an unknown target, ``UsageError`` for parts
    that do not belong to the model, ``StorageError`` if the directory cannot be written.
    """
    bundle = Bundle.open(deployment.bundle)
    if bundle.root != bundle.base:
        raise UsageError(f"{bundle.root} is one budget of {bundle.base}; deploy that, where requests choose a budget")
    check_networks(bundle, engine_files(deployment.target))
    spec, model = bundle.manifest.model, deployment.repository / deployment.name
    _check_parts(deployment, spec)
    _check_limits(deployment, spec)
    _check_ours(model)
    check_writable(deployment.repository)
    with replacing(model) as partial:
        unfinished = partial / UNFINISHED  # a polling server loads any folder that has a version in it
        _write(deployment, bundle, unfinished, progress)
        sync(unfinished)
        for part in list(unfinished.iterdir()):
            part.rename(partial / part.name)
        unfinished.rmdir()
    return model


def _write(deployment: Deployment, bundle: Bundle, model: Path, progress: Progress | None) -> None:
    folder = model / VERSION
    files = _files(deployment, bundle)
    for done, (name, source) in enumerate(files.items()):
        if progress is not None:
            progress(done, len(files))
        link_or_copy(source, folder / name)
    served = _served(deployment)
    (model / "config.pbtxt").write_text(config_text(deployment, bundle.manifest, served))
    (folder / "model.py").write_text(MODEL_PY)
    (folder / NO_BYTECODE).write_text(NO_BYTECODE_TEXT)


def _check_parts(deployment: Deployment, spec: ModelSpec) -> None:
    labels = get_pipeline(spec.backbone).takes == "labels"
    if labels and deployment.pipeline is not None:
        raise UsageError(f"{spec.name} samples from labels and has no pipeline; give --vae to decode its latents")
    if not labels and deployment.pipeline is None:
        raise UsageError(f"{spec.name} samples from prompts; give --pipeline with its text encoders and VAE")
    if not labels and deployment.vae is not None:
        raise UsageError("--vae is for models of labels; a pipeline has its own")
    if spec.pixel_space and deployment.vae is not None:
        raise UsageError(f"{spec.name} samples pixels; leave --vae out")
    if deployment.scheduler is not None:
        if not labels:
            raise UsageError(f"--scheduler is for models of labels; {spec.name}'s comes with its pipeline")
        check_scheduler(spec, deployment.scheduler)
    for source, what in ((deployment.vae, "an AutoencoderKL"), (deployment.pipeline, "text encoders and VAE")):
        if source is not None:
            check_source(source, what)


def _check_limits(deployment: Deployment, spec: ModelSpec) -> None:
    """Raise ``UsageError`` for limits under which the model could not sample at all."""
    pipeline = get_pipeline(spec.backbone)
    if isinstance(pipeline, PromptPipeline):
        side = pipeline.side(spec, _vae_scale(deployment.pipeline))
        if side * side > deployment.max_pixels:
            raise UsageError(
                f"--max-pixels is {deployment.max_pixels}, and {spec.name} samples "
                f"{side} x {side} by default; give at least {side * side}"
            )
    if deployment.memory is not None:
        from dyexport.runtime.loading import load

        with suppress(MissingDependencyError):  # the server may have it
            load(
                deployment.bundle,
                target=deployment.target,
                device="cpu",
                memory=deployment.memory,
                share_weights=_shares_weights(deployment),
                check_hashes=False,
                fallback=False,
            )


def _vae_scale(pipeline: str | None) -> int:
    """Return the pixels on a side of a latent, from the configuration in the pipeline's folder if it is local."""
    config = Path(pipeline or "") / "vae" / "config.json"
    try:
        return int(2 ** (len(json.loads(config.read_text(encoding="utf-8"))["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError):
        return VAE_SCALE


def _check_ours(model: Path) -> None:
    written = model / VERSION / "model.py"
    if model.exists() and not (written.is_file() and MARK in written.read_text()):
        raise UsageError(f"{model} is there and was not written by dyexport; choose another --name")


def _files(deployment: Deployment, bundle: Bundle) -> dict[str, Path]:
    """List the files of the version's folder by name, with their sources. A pipeline's own transformer is left out."""
    files = {f"{BUNDLE}/{name}": bundle.base / name for name in (MANIFEST, *bundle.manifest.files)}
    for folder, source in ((PIPELINE, deployment.pipeline), (VAE, deployment.vae)):
        if source is not None and (root := Path(source)).is_dir():
            inner = [path.relative_to(root) for path in sorted(root.rglob("*")) if path.is_file()]
            files |= {f"{folder}/{name}": root / name for name in inner if name.parts[0] != "transformer"}
    return files


def _served(deployment: Deployment) -> ServedModelConfig:
    """Return the configuration; a local directory is now a folder of the model."""
    pipeline, vae = deployment.pipeline, deployment.vae
    return ServedModelConfig(
        target=deployment.target,
        pipeline=PIPELINE if pipeline is not None and Path(pipeline).is_dir() else pipeline,
        vae=VAE if vae is not None and Path(vae).is_dir() else vae,
        scheduler=deployment.scheduler,
        memory=deployment.memory,
        share_weights=_shares_weights(deployment),
        max_steps=deployment.max_steps,
        max_pixels=deployment.max_pixels,
        max_prompt=deployment.max_prompt,
    )


def _shares_weights(deployment: Deployment) -> bool:
    """Return True where several processes can map the same weights."""
    return deployment.instances > 1 and deployment.target == "onnx"


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it across file systems. A link is safe: files of a bundle are replaced, not changed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()
    if not hard_linked(source, target):
        shutil.copyfile(source, target)


def config_text(deployment: Deployment, manifest: Manifest, served: ServedModelConfig) -> str:
    """Write ``config.pbtxt``: inputs, outputs, batching and parameters."""
    spec = manifest.model
    output = output_of(spec, decoded=spec.pixel_space or served.vae is not None or served.pipeline is not None)
    batch = deployment.max_batch or get_pipeline(spec.backbone).max_batch
    lines = [
        f"# {MARK}. Edit what you like: parameters, batching, instances.",
        'backend: "python"',
        f"max_batch_size: {batch}",
        *_inputs(spec, manifest.budgets),
        *_tensor("output", output.name, output.data_type, output.dims),
        *_tensor("output", SEED, "TYPE_INT64", (1,)),
        f"instance_group [ {{ count: {deployment.instances} }} ]",
        "dynamic_batching { }",
        *_parameters(served.parameters()),
    ]
    return "\n".join(lines) + "\n"


def _inputs(spec: ModelSpec, budgets: Sequence[float]) -> Iterable[str]:
    """Write the inputs, one row per sample; optional ones default to the model's."""
    labels = get_pipeline(spec.backbone).takes == "labels"
    required = (LABEL, "TYPE_INT64") if labels else (PROMPT, "TYPE_STRING")
    yield from _tensor("input", *required, (1,))
    optional = {SEED: "TYPE_INT64", "steps": "TYPE_INT32"}
    if sampling_defaults(spec).guidance is not None:
        optional["guidance"] = "TYPE_FP32"
    if not labels:
        optional |= {"height": "TYPE_INT32", "width": "TYPE_INT32"}
    if budgets:
        optional["budget"] = "TYPE_FP32"
    for name, data_type in optional.items():
        yield from _tensor("input", name, data_type, (1,), "optional: true")


def _tensor(kind: str, name: str, data_type: str, dims: Iterable[int], more: str = "") -> Iterable[str]:
    shape = ", ".join(map(str, dims))
    yield f'{kind} [ {{ name: "{name}" data_type: {data_type} dims: [ {shape} ] {more}{" " if more else ""}}} ]'


def _parameters(values: Mapping[str, str]) -> Iterable[str]:
    for name, value in values.items():
        text = value.replace("\\", "\\\\").replace('"', '\\"')
        yield f'parameters {{ key: "{name}" value {{ string_value: "{text}" }} }}'
