"""Placement of models during calibration: on the GPU of this process if passes fit there, else on the CPU."""

from __future__ import annotations

from dataclasses import replace

from dyexport.checkpoints.placement import Placement, on_cpu, on_gpu
from dyexport.models.devices import best_device
from dyexport.models.inputs import NoisedInputs
from dyexport.pipeline.settings import BuildSettings
from dyexport.training.memory import free_memory

STREAMED_ROWS = 16_384  # tokens per pass of a model that is read for every pass, on a GPU


def place(
    settings: BuildSettings, inputs: NoisedInputs, *, bf16: bool = False, whole: bool = False
) -> tuple[Placement, NoisedInputs]:
    """Return where the model of a build is calibrated, and ``inputs`` in passes for that.

    With ``bf16`` products are in bf16. With ``whole`` weights will be changed, and must be in memory, in fp32.
    """
    preset, room = settings.preset, free_memory()
    larger = replace(inputs, rows_per_pass=STREAMED_ROWS)
    gpu = None
    if best_device() != "cpu":
        gpu = on_gpu(preset, inputs.per_pass * inputs.rows, room, bf16=bf16 and not whole)
    if gpu is None or (whole and gpu["stream"]):
        cpu = on_cpu(preset, settings.memory)
        return (Placement(device="cpu", stream=False, base="fp32") if whole else cpu), inputs
    if gpu["stream"] and on_gpu(preset, larger.per_pass * larger.rows, room, bf16=bf16) is not None:
        return gpu, larger
    return gpu, inputs
