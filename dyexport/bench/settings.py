"""Settings of ``bench`` and ``eval``, checked when they are made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyexport.arguments import STEPS, check_guidance, check_memory, check_steps, whole_number
from dyexport.backbones import sampling_defaults
from dyexport.bundle.manifest import DENSE
from dyexport.digits import samples_digits
from dyexport.engines.registry import engine_files
from dyexport.errors import UsageError

if TYPE_CHECKING:
    from dyexport.bundle.reader import Bundle
    from dyexport.bundle.spec import ModelSpec

MOST = {"batch": 4096, "steps": STEPS, "threads": 1024, "rounds": 100_000}
MOST_SAMPLES = 100_000


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of a benchmark.

    memory      most bytes of the bundle's weights; the dense network is not bounded
    batch       2 is one picture under classifier-free guidance
    steps       denoising steps of a trajectory; None: the model's default
    compiled    also time ``torch.compile``, which compiles for a minute or more
    trajectory  also time whole sampling loops
    """

    target: str = "onnx"
    memory: int | None = None
    batch: int = 2
    steps: int | None = None
    threads: int | None = None
    share_weights: bool = False
    compiled: bool = True
    trajectory: bool = False
    rounds: int = 10

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if (value := getattr(self, name)) is not None:
                whole_number(f"--{name}", value, least=1, most=most)
        if self.memory is not None:
            check_memory(self.memory)

    def check_for(self, bundle: Bundle) -> None:
        """Raise ``UsageError`` for a bundle without the dense graph that it is compared with."""
        if DENSE not in bundle.engine_paths(engine_files(self.target)):
            raise UsageError(f"{bundle.root} has no dense graph to compare with; build it again without --no-baseline")

    def steps_for(self, spec: ModelSpec) -> int:
        """Return the denoising steps of a trajectory of a model."""
        return self.steps or sampling_defaults(spec).steps


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling of an evaluation: ``samples`` pictures, with the same number of each class.

    ``steps`` None is the model's default. Guidance is off by default, as Frechet distances are published.
    """

    samples: int = 1800
    steps: int | None = None
    guidance: float = 1.0
    scheduler: str | None = None

    def __post_init__(self) -> None:
        cure = f"a distance needs at least 2, and is of up to {MOST_SAMPLES}"
        whole_number("--samples", self.samples, least=2, most=MOST_SAMPLES, cure=cure)
        if self.steps is not None:
            check_steps(self.steps, "--steps")
        check_guidance(self.guidance, "--guidance")

    def steps_for(self, spec: ModelSpec) -> int:
        """Return the denoising steps of a model."""
        return self.steps or sampling_defaults(spec).steps


def check_digits(spec: ModelSpec) -> None:
    """Raise ``UsageError`` for any other model than digits."""
    if not samples_digits(spec):
        raise UsageError(f"{spec.name} is not a digits model; eval can score digits only")
