"""The networks that encode: a VAE for pictures, text encoders for captions. Each is opened when it is first used."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from inspect import Parameter, signature
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dyexport.backbones import get_conditioning
from dyexport.backbones.base import Preset, PromptConditioning
from dyexport.encoding.buckets import Size, bucket_sizes
from dyexport.encoding.pixels import read_pixels
from dyexport.encoding.samples import Sample
from dyexport.encoding.settings import EncodeSettings, VaeSource
from dyexport.errors import CheckpointError, UsageError, reason
from dyexport.models.devices import best_device
from dyexport.stages.file_records import describe, digest_of
from dyexport.training.prompts import embed_texts, open_text_encoders

READ_AHEAD = 16  # pictures
TEXT_PARTS = ("text_encoder*", "tokenizer*", "model_index.json")  # of a pipeline's directory


class PictureEncoder:
    """The VAE of an encoding, or none for a model of pixels.

    Pictures are squares of ``side`` pixels, or of the sizes of ``buckets``, all multiples of ``multiple``.
    """

    def __init__(self, settings: EncodeSettings) -> None:
        self.format = settings.format
        self.source = settings.vae_source
        self.config = {} if self.source is None else _read_config(self.source, self.format.vae)
        self.side = settings.size or self._default_side(settings.preset)
        self.multiple = self.format.multiple(self.config)
        self._check_size(settings)
        self.buckets = bucket_sizes(self.side, self.multiple) if settings.buckets else (Size(self.side, self.side),)

    def shape(self, size: Size | None = None) -> tuple[int, ...]:
        """Return the shape of the latents of one picture, by default of a square one."""
        return self.format.shape(self.config, *(size or (self.side, self.side)))

    def grid(self, size: Size) -> tuple[int, int]:
        """Return the rows and columns of tokens of a picture."""
        return size.height // self.multiple, size.width // self.multiple

    @property
    def grayscale(self) -> bool:
        """True if pictures have one channel."""
        return self.source is None and self.shape()[0] == 1

    @cached_property
    def digest(self) -> str:
        """Digest of the VAE: its files, or the id of its repository."""
        if self.source is None:
            return ""
        folder = Path(self.source.source, self.source.subfolder or "")
        if not folder.is_dir():
            return f"{self.source.source} {self.source.subfolder or ''}"
        return _digest_of_files(sorted(file for file in folder.iterdir() if file.is_file()))

    def digest_of(self, pixels: tuple[Any, ...]) -> bytes:
        """Identify latents by the inputs of their pixels, and by what encodes them."""
        return bytes.fromhex(digest_of([type(self.format).__name__, self.digest, self.grayscale, pixels]))

    def latents(self, samples: Sequence[Sample]) -> Iterator[Tensor]:
        """Encode samples one by one to latents (1, ...), while the pictures of the next ones are read.

        Raises ``DataError`` for a picture that changed, and ``CheckpointError`` for latents that are not finite.
        """
        read, following = partial(_pixels_of, grayscale=self.grayscale), iter(samples)
        coming: deque[Future[Tensor]] = deque()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for sample in samples:
                coming.extend(pool.submit(read, one) for one in islice(following, READ_AHEAD - len(coming)))
                latents = self.encode(coming.popleft().result()[None]).contiguous()
                if not latents.isfinite().all():
                    raise CheckpointError(
                        f"the VAE makes NaN or infinity of {sample.picture.file}; give --vae with whole weights"
                    )
                yield latents

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, C, H, W) to latents (B, ...) in fp32, on the CPU."""
        if self.source is None:
            return self.format.encode(None, pixels)
        return self.format.encode(self._vae, pixels.to(self._vae.device)).float().cpu()

    @cached_property
    def _vae(self) -> Any:
        assert self.source is not None
        return open_vae(self.source, self.format.vae).to(best_device())

    def _default_side(self, preset: Preset | None) -> int:
        if preset is not None:
            return self.format.side(preset, self.config)
        size = self.config.get("sample_size")
        if not isinstance(size, int):
            raise UsageError("the VAE does not say for which size it was trained; give --size, or --model")
        return size

    def _check_size(self, settings: EncodeSettings) -> None:
        """Raise ``UsageError`` for a size that the VAE or the model does not take."""
        preset = settings.preset
        if self.side % self.multiple:
            raise UsageError(
                f"--size is {self.side}, and this VAE takes multiples of {self.multiple}; give one of them"
            )
        if settings.buckets and not self.format.several_sizes:
            name = "a model of classes" if preset is None else preset.name
            raise UsageError(f"--buckets is for models that take several sizes, and {name} takes one; leave it out")
        if preset is None or self.shape() == preset.latent_shape:
            return
        if self.format.several_sizes and self.shape()[1:] == preset.latent_shape[1:]:
            return
        made = f"{self.side} px make latents {self.shape()}, and {preset.name} takes {preset.latent_shape}"
        other_size = settings.size not in (None, self._default_side(preset))
        cure = "leave --size out" if other_size and not self.format.several_sizes else "give --vae with the model's own"
        raise UsageError(f"{made}; {cure}")


class CaptionEncoder:
    """The text encoders of a pipeline."""

    def __init__(self, preset: Preset, pipeline: str) -> None:
        self.preset = preset
        self.pipeline = pipeline
        self._conditioning = cast("PromptConditioning", get_conditioning(preset))

    @property
    def unconditional(self) -> str | None:
        """Prompt of the unconditional prediction of classifier-free guidance; None where there is none."""
        return self._conditioning.unconditional

    @property
    def bytes_of_prompt(self) -> int:
        """Bytes of one embedded caption, at most."""
        shapes = (column.shape for column in self._conditioning.columns)
        return 4 * sum(prod(size or self.preset.text_tokens for size in shape) for shape in shapes)

    @cached_property
    def digest(self) -> str:
        """Digest of text encoders and tokenizers: their files, or the id of their repository."""
        parts = sorted(path for kind in TEXT_PARTS for path in Path(self.pipeline).glob(kind))
        return _digest_of_files(parts) if parts else self.pipeline

    def digest_of(self, caption: str) -> bytes:
        """Identify an embedded caption, by its text and by what embeds it."""
        return bytes.fromhex(digest_of([self.preset.backbone, self.preset.text_tokens, self.digest, caption]))

    @property
    def columns(self) -> list[str]:
        """Names of the columns of a data file that hold embedded captions."""
        return [column.name for column in self._conditioning.columns]

    def embed(self, caption: str) -> Mapping[str, Tensor]:
        """Embed a caption to the columns of a data file (1, ...)."""
        embedded = embed_texts(self._pipe, (caption,), self._conditioning)
        return {column.name: embedded[column.argument] for column in self._conditioning.columns}

    @cached_property
    def _pipe(self) -> Any:
        cure = "give --pipeline with a local copy"
        return open_text_encoders(self.pipeline, self.preset, device=best_device(), cure=cure)


def _pixels_of(sample: Sample, grayscale: bool) -> Tensor:
    return read_pixels(
        sample.picture.file, sample.size, mirrored=sample.mirrored, grayscale=grayscale, sha256=sample.sha256
    )


def _digest_of_files(paths: Sequence[Path]) -> str:
    records = {path.name: {name: record.sha256 for name, record in describe(path).items()} for path in paths}
    return digest_of(records)


def open_vae(source: VaeSource, kind: str) -> Any:
    """Open a VAE of a class in diffusers, on the CPU. Raises ``CheckpointError``."""
    import diffusers

    _read_config(source, kind)  # raises for one of another class, which might load in part
    try:
        vae = getattr(diffusers, kind).from_pretrained(source.source, subfolder=source.subfolder)
    except (OSError, ValueError) as error:
        raise _unreadable(kind, source, error) from error
    return vae.eval()


def _read_config(source: VaeSource, kind: str) -> dict[str, Any]:
    """Read the configuration of a VAE, with the defaults of its class. Raises ``CheckpointError``."""
    import diffusers

    cls = getattr(diffusers, kind)
    try:
        stored: dict[str, Any] = cls.load_config(source.source, subfolder=source.subfolder)
    except (OSError, ValueError) as error:
        raise _unreadable(kind, source, error) from error
    if (name := stored.get("_class_name", kind)) != kind:
        raise CheckpointError(f"{source.source} holds a {name}, and this model takes an {kind}; give another --vae")
    parameters = signature(cls.__init__).parameters.values()
    return {
        parameter.name: parameter.default for parameter in parameters if parameter.default is not Parameter.empty
    } | stored


def _unreadable(kind: str, source: VaeSource, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read an {kind} from {source.place}: {reason(error).removesuffix('.')}; give --vae with a local copy"
    )
