"""Settings of ``bench`` and ``eval``, checked when they are made. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dyexport.arguments import STEPS, check_guidance, check_memory, check_steps, whole_number
from dyexport.digits import samples_digits
from dyexport.errors import UsageError

if TYPE_CHECKING:
    from dyexport.bundle.manifest import ModelSpec

MOST = {"batch": 4096, "steps": STEPS, "threads": 1024, "rounds": 100_000}
MOST_SAMPLES = 100_000


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """``batch`` 2 is one picture under classifier-free guidance. ``memory`` bounds the bundle's weights, not dense's.

    ``compiled`` also times ``torch.compile``, whose compilation takes a minute or more; ``trajectory``
    whole sampling loops of ``steps``.
    """

    target: str = "onnx"
    memory: int | None = None
    batch: int = 2
    steps: int = 50
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


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How samples are drawn: ``samples`` pictures, every class equally often."""

    samples: int = 1800
    steps: int = 50
    guidance: float = 1.0
    scheduler: str | None = None

    def __post_init__(self) -> None:
        cure = f"a distance needs at least 2, and is of up to {MOST_SAMPLES}"
        whole_number("--samples", self.samples, least=2, most=MOST_SAMPLES, cure=cure)
        check_steps(self.steps, "--steps")
        check_guidance(self.guidance, "--guidance")


def check_digits(spec: ModelSpec) -> None:
    """Raises ``UsageError`` for a model of anything but digits."""
    if not samples_digits(spec):
        raise UsageError(f"{spec.name} does not draw digits, and there is nothing here to score its pictures by")
