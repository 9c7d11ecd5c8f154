"""``dyexport.sample``: pictures or videos from a bundle, for class labels or for prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyexport.arguments import check_guidance, check_labels, check_seed, check_steps
from dyexport.backbones import get_pipeline, sampling_defaults
from dyexport.errors import UsageError
from dyexport.noise_schedule import check_scheduler
from dyexport.progress import Progress, no_progress
from dyexport.runtime.locating import check_source
from dyexport.runtime.prompt_settings import Prompts, prompt_pipeline

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from dyexport.bundle.reader import Bundle
    from dyexport.bundle.spec import ModelSpec
    from dyexport.runtime.transformer import BundleTransformer

DEFAULT_CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples of one call, in the order of their labels or prompts.

    ``values`` are pixels in [0, 1], (B, C, H, W), or (B, F, C, H, W) for videos. Without a VAE they are latents, and
    ``pixels`` is False. ``settings`` are those that were used, with defaults filled in.
    """

    values: torch.Tensor
    pixels: bool
    settings: Mapping[str, Any]

    def __repr__(self) -> str:
        unit = "pixels" if self.pixels else "latents"
        return f"Samples({unit} {tuple(self.values.shape)}, {dict(self.settings)})"

    def images(self) -> list[Image]:
        """Return PIL images: one for each sample, or one for each frame of all videos.

        Raises ``UsageError`` for latents.
        """
        from PIL import Image

        if not self.pixels:
            raise UsageError("these samples are latents; pass the vae of the model to sample() to get images")
        frames = self.values.flatten(0, -4).movedim(-3, -1).cpu().numpy()  # (N, H, W, C)
        return [Image.fromarray(_bytes(frame.squeeze(-1) if frame.shape[-1] == 1 else frame)) for frame in frames]

    def save(self, path: str | Path) -> None:
        """Write one file: a grid as PNG, videos as GIF or MP4 by the suffix, latents as safetensors."""
        from dyexport.bench.pictures import save_sample
        from dyexport.bench.videos import save_video

        path, values = Path(path), self.values
        if not self.pixels and path.suffix != ".safetensors":
            raise UsageError(f"these samples are latents, and {path} is no .safetensors; pass the vae of the model")
        if self.pixels and values.ndim == 5 and values.shape[1] > 1:
            save_video(values.cpu().numpy(), path)
        else:
            save_sample(values.squeeze(1) if values.ndim == 5 else values, path, pixels=self.pixels)


def sample(
    transformer: BundleTransformer | Bundle | str | Path,
    *,
    labels: Sequence[int] | torch.Tensor | None = None,
    prompts: str | Sequence[str] | None = None,
    prompt_embeds: str | Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | Sequence[int] = 0,
    scheduler: str | None = None,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    pipeline: str | Path | None = None,
    vae: str | Path | None = None,
    progress: Progress | None = None,
) -> Samples:
    """Sample one picture, or one video, for each label or prompt.

    ``transformer`` is what ``dyexport.load`` returns, or a bundle, which is loaded for this call: its path, its hub
    id, or a ``Bundle``. Class-conditional models take ``labels`` (default: the first ten classes) and ``scheduler``;
    text-to-image and text-to-video models take ``prompts``, or ``prompt_embeds``, a safetensors file of embedded
    prompts. ``steps`` and the ``guidance`` scale default to the model's; 1 is no guidance. The same ``seed`` gives the
    same noise on every device; with one seed for each sample, a sample does not depend on the others of its batch.

    ``height`` and ``width`` are pixels, ``frames`` the length of videos. ``pipeline``, a directory or hub id, has text
    encoders and VAE; the default is the model's published one. ``vae``, a directory or hub id of an ``AutoencoderKL``,
    decodes latents of class-conditional models and of embedded prompts.

    >>> samples = dyexport.sample("sit-digits-0.5", labels=[3, 7], steps=10)
    >>> samples.values.shape
    torch.Size([2, 1, 8, 8])
    >>> samples.save("digits.png")

    Raises ``UsageError`` for a value out of range or an argument that the model does not take, ``SamplingError`` if
    the result is not finite, ``CheckpointError`` if a pipeline or VAE cannot be read, and what ``load`` raises.
    """
    if steps is not None:
        check_steps(steps)
    if guidance is not None:
        check_guidance(guidance)
    for one in seed if isinstance(seed, Sequence) else [seed]:
        check_seed(one)
    arguments = {
        "labels": labels,
        "prompts": [prompts] if isinstance(prompts, str) else prompts,
        "prompt_embeds": prompt_embeds,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "scheduler": scheduler,
        "height": height,
        "width": width,
        "frames": frames,
        "pipeline": pipeline,
        "vae": vae,
    }
    from dyexport.bundle.reader import Bundle
    from dyexport.runtime.loading import load

    source = transformer.root if isinstance(transformer, Bundle) else transformer
    opened = load(source) if isinstance(source, (str, Path)) else source
    with closing(opened) if opened is not transformer else nullcontext():
        for name, because in useless_arguments(opened.spec).items():
            if arguments[name] is not None:
                raise UsageError(f"{name} does nothing here: {because}; leave it out")
        check_arguments(opened.spec, arguments)
        if get_pipeline(opened.spec.backbone).takes == "labels":
            return _sample_labels(opened, arguments, progress)
        return _sample_prompts(opened, prompts_of(opened.spec, arguments), progress)


def useless_arguments(spec: ModelSpec) -> dict[str, str]:
    """Return the arguments of ``sample`` that a model does not take, each with the reason."""
    useless: dict[str, str] = {}
    if get_pipeline(spec.backbone).takes == "labels":
        for_prompts = ("prompts", "prompt_embeds", "pipeline", "height", "width", "frames")
        useless |= dict.fromkeys(for_prompts, f"{spec.name} samples from class labels")
    else:
        useless |= {"labels": f"{spec.name} samples from prompts"}
        useless |= {"scheduler": f"the scheduler of {spec.name} comes with its pipeline"}
    if spec.pixel_space:
        useless |= {"vae": f"{spec.name} samples pixels, not latents"}
    if sampling_defaults(spec).guidance is None:
        useless |= {"guidance": f"{spec.name} takes no guidance"}
    return useless


def check_arguments(spec: ModelSpec, arguments: Mapping[str, Any]) -> None:
    """Check arguments of ``sample`` against a model as far as its manifest tells. Imports no torch.

    Raises ``UsageError``, and ``CheckpointError`` or ``DataError`` for a directory or a file that does not exist.
    """
    if get_pipeline(spec.backbone).takes == "prompts":
        prompts_of(spec, arguments)
        return
    if isinstance(arguments["labels"], list):
        check_labels(arguments["labels"], spec.classes)
    check_scheduler(spec, arguments["scheduler"])
    if arguments["vae"] is not None:
        check_source(str(arguments["vae"]), "an AutoencoderKL")


def _sample_labels(transformer: BundleTransformer, arguments: Mapping[str, Any], progress: Progress | None) -> Samples:
    from dyexport.runtime.sampling import decode, open_vae
    from dyexport.runtime.sampling import sample as sample_labels

    spec, labels, vae = transformer.spec, arguments["labels"], arguments["vae"]
    labels = range(min(spec.classes, DEFAULT_CLASSES)) if labels is None else labels
    defaults = sampling_defaults(spec)
    steps = defaults.steps if arguments["steps"] is None else arguments["steps"]
    guidance = defaults.guidance if arguments["guidance"] is None else arguments["guidance"]
    values = sample_labels(
        transformer,
        spec,
        labels,
        steps=steps,
        scheduler=arguments["scheduler"],
        guidance_scale=guidance,
        seed=arguments["seed"],
        progress=progress or no_progress,
    )  # (B, C, H, W)
    if vae is not None:
        values = decode(open_vae(str(vae)), values)
    settings = {
        "labels": [int(label) for label in labels],
        "steps": steps,
        "guidance": guidance,
        "seed": arguments["seed"],
        "scheduler": check_scheduler(spec, arguments["scheduler"]),
    }
    return Samples(values=values, pixels=vae is not None or spec.pixel_space, settings=settings)


def prompts_of(spec: ModelSpec, arguments: Mapping[str, Any]) -> Prompts:
    """Return the prompts that arguments of ``sample`` describe, with the model's own text encoders by default.

    Imports no torch. Raises ``UsageError`` for arguments that the model cannot be sampled with.
    """
    texts, pipeline, seed = arguments["prompts"], arguments["pipeline"], arguments["seed"]
    if pipeline is None and texts:
        pipeline = prompt_pipeline(spec).home(spec)
    shared = ("steps", "guidance", "height", "width", "frames")
    prompts = Prompts(
        texts=tuple(texts or ()),
        embedded=None if arguments["prompt_embeds"] is None else Path(arguments["prompt_embeds"]),
        pipeline=None if pipeline is None else str(pipeline),
        vae=None if arguments["vae"] is None else str(arguments["vae"]),
        seed=tuple(seed) if isinstance(seed, Sequence) else seed,
        **{name: arguments[name] for name in shared},
    )
    prompts.check_sources(spec)
    prompts.arguments_for(spec)
    return prompts


def _sample_prompts(transformer: BundleTransformer, prompts: Prompts, progress: Progress | None) -> Samples:
    from dyexport.runtime.prompts import sample_prompts

    result = sample_prompts(transformer, prompts, progress)
    used = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(prompts).items() if v is not None}
    used |= {name: value for name, value in result.settings.items() if value is not None}
    return Samples(values=result.values, pixels=result.pixels, settings=used)


def _bytes(values: Any) -> Any:
    return (values * 255).round().astype("uint8")
