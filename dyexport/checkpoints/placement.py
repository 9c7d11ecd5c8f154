"""Device on which a model is calibrated, and whether its weights fit there."""

from __future__ import annotations

from typing import TypedDict

from torch import nn

from dyexport.backbones.base import Preset
from dyexport.backbones.recipe import BasePrecision
from dyexport.checkpoints.blockwise import load_frozen
from dyexport.checkpoints.static import load_static
from dyexport.checkpoints.streaming import must_stream
from dyexport.models.frozen_base import BITS
from dyexport.models.importance import memory_of_pass

SLACK = 1.1  # of weights, for fragments
MODELS = 2  # the dynamic one and the dense one that it is compared with


class Placement(TypedDict):
    """Loading of a model for calibration.

    device  of the computation
    stream  whether weights stay on disk, and each is read when its layer runs
    base    storage of the weights of the blocks' linear layers; streamed ones are in fp32 while they run
    """

    device: str
    stream: bool
    base: BasePrecision


def on_cpu(preset: Preset, memory: int | None) -> Placement:
    """Place a model on the CPU, streamed if its weights do not fit in ``memory`` bytes, by default in those free."""
    return Placement(device="cpu", stream=must_stream(preset.parameters, memory), base="fp32")


def on_gpu(preset: Preset, rows: int, room: float, *, bf16: bool) -> Placement | None:
    """Place a model on a GPU with ``room`` bytes free; None where passes of ``rows`` tokens do not fit.

    With ``bf16`` products are in bf16, and weights may be stored so. Weights that do not fit in any way are streamed.
    """
    left = room - memory_of_pass(preset, rows)
    bases: tuple[BasePrecision, ...] = ("fp32", "bf16") if bf16 else ("fp32",)
    for base in bases:
        if SLACK * MODELS * preset.parameters * BITS[base] / 8 <= left:
            return Placement(device="cuda", stream=False, base=base)
    return Placement(device="cuda", stream=True, base="fp32") if left > 0 else None


def load_placed(source: str, preset: Preset, *, device: str, stream: bool, base: BasePrecision) -> nn.Module:
    """Load a stock backbone that is not trained, in a placement. Raises ``CheckpointError``."""
    if stream or (device, base) == ("cpu", "fp32"):
        return load_static(source, preset, stream=stream, device=device)
    return load_frozen(source, preset, base, device)
