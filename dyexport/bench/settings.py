"""Settings of ``bench``, checked when they are made. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyexport.arguments import STEPS, check_memory, check_side, shown, whole_number
from dyexport.backbones import sampling_defaults
from dyexport.bench.sizes import check_sizes
from dyexport.engines.registry import engine_files
from dyexport.errors import StorageError, UsageError
from dyexport.files import check_file
from dyexport.runtime.locating import check_source
from dyexport.runtime.prompt_settings import prompt_pipeline

if TYPE_CHECKING:
    from dyexport.bundle.reader import Bundle
    from dyexport.bundle.spec import ModelSpec

MOST = {"steps": STEPS, "threads": 1024, "rounds": 100_000}
MOST_BATCH = 4096
MOST_DIGITS = 4000  # Python converts no more
DEVICE = re.compile(r"cpu|cuda(:\d{1,4})?")
FORMATS = (".json", ".md", ".csv")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of a benchmark.

    targets        engine formats, timed in alternating blocks of one run
    device         ``cpu``, ``cuda`` or ``cuda:N``; None: as ``dyexport.load`` chooses for the first target
    batches        batch sizes, one case each; 2 is one picture under classifier-free guidance
    sizes          height and width in pixels, one case each; none: the size that the bundle was built for
    memory         most bytes of the bundle's weights; the dense network is not bounded
    steps          denoising steps of a trajectory; None: the model's default
    share_weights  let all engines map one copy of the weights
    compiled       also time ``torch.compile``, which compiles for a minute or more
    eager          also time the diffusers module, whose weights must fit into memory
    trajectory     also time whole sampling loops
    pipeline       directory or hub repository with text encoders and VAE: also time whole pictures from a prompt
    """

    targets: tuple[str, ...] = ("onnx",)
    device: str | None = None
    batches: tuple[int, ...] = (2,)
    sizes: tuple[tuple[int, int], ...] = ()
    memory: int | None = None
    steps: int | None = None
    threads: int | None = None
    share_weights: bool = False
    compiled: bool = True
    eager: bool = True
    trajectory: bool = False
    pipeline: str | None = None
    rounds: int = 10

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if (value := getattr(self, name)) is not None:
                whole_number(f"--{name}", value, least=1, most=most)
        for batch in self.batches:
            whole_number("--batch", batch, least=1, most=MOST_BATCH)
        for target in self.targets:
            engine_files(target)
        for height, width in self.sizes:
            check_side(height, "--size")
            check_side(width, "--size")
        for name, values in (("target", self.targets), ("batch", self.batches), ("size", self.sizes)):
            if len(set(values)) != len(values):
                raise UsageError(f"--{name} names {shown(_repeated(values))} twice; name it once")
        if self.device is not None and not DEVICE.fullmatch(self.device):
            raise UsageError(f"--device is {shown(self.device)!r}; use cpu, cuda or cuda:N")
        if self.memory is not None:
            check_memory(self.memory)

    def check_for(self, bundle: Bundle) -> None:
        """Raise ``UsageError`` for a size or a pipeline that a bundle does not take, or one that does not exist."""
        check_sizes(bundle, self.sizes)
        if self.pipeline is not None:
            prompt_pipeline(bundle.manifest.model)
            check_source(self.pipeline, "text encoders and VAE")

    def steps_for(self, spec: ModelSpec) -> int:
        """Return the denoising steps of a trajectory of a model."""
        return self.steps or sampling_defaults(spec).steps

    @property
    def cases(self) -> tuple[tuple[int, tuple[int, int] | None], ...]:
        """Every batch at every size; None is the size that the bundle was built for."""
        return tuple((batch, size) for size in self.sizes or (None,) for batch in self.batches)


def _repeated(values: Sequence[Any]) -> str:
    return str(next(value for value in values if values.count(value) > 1))


def parse_batches(text: str) -> tuple[int, ...]:
    """Parse ``1,2,8``. Raises ``UsageError``."""
    return tuple(_whole("--batch", part, "1,2,8") for part in text.split(","))


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Parse ``512,768x1024``, height before width, into pairs. Raises ``UsageError``."""
    sizes = []
    for part in text.split(","):
        height, _, width = part.partition("x")
        pair = (height, width) if "x" in part else (part, part)
        sizes.append((_whole("--size", pair[0], "512,768x1024"), _whole("--size", pair[1], "512,768x1024")))
    return tuple(sizes)


def _whole(name: str, text: str, example: str) -> int:
    if not (text.strip().isascii() and text.strip().isdecimal() and len(text) < MOST_DIGITS):
        raise UsageError(f"{name} has {shown(text)!r}, which is not a whole number; write such as {example}")
    return int(text)


def check_output(path: Path) -> None:
    """Raise ``UsageError`` for another format than JSON, Markdown or CSV, and for a file that cannot be written."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"-o is {shown(str(path))}; the suffix decides the format, so use {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(
            f"-o is {shown(str(path))}, and there is no directory {shown(str(path.parent))}; make it first"
        )
    try:
        check_file(path)
    except StorageError as error:
        raise UsageError(str(error)) from error
