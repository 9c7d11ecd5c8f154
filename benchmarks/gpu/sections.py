"""The sections of the GPU benchmark, most valuable figures first."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

from benchmarks.gpu.cases import Case, CaseName, make_case
from benchmarks.gpu.settings import Section, Settings
from benchmarks.gpu.with_bundle import build_case, measure_bundle
from benchmarks.gpu.with_engines import time_onnxruntime, time_tensorrt
from benchmarks.gpu.with_torch import time_case
from benchmarks.gpu.with_training import time_finetuning
from dyexport.bundle.graph_forms import AttentionForm
from dyexport.bundle.plan_info import Flavour
from dyexport.bundle.spec import Precision

SLIM = (
    "dit-xl-2:all:2",
    "flux/4+8:all:1:2",
    "dit-xl-2:all:16",
    "dit-xl-2:capacity:2",
    "dit-xl-2:all:2@0.3",
    "flux/4+8:all:1:2@0.3",
    "dit-xl-2:all:16@0.3",
    "dit-xl-2-512:all:2",
    "flux:all:1:2",
)
COMPILED = ("dit-xl-2:all:2:2", "flux/4+8:all:1:1", "dit-xl-2:capacity:2:1", "dit-xl-2:all:16:1")  # few networks
SMALL = ("sit-digits:all:2:2", "flux-tiny:all:1:2", "dit-digits:capacity:2:2", "sit-digits:all:2:2@0.3")


def case_of(text: str, settings: Settings, precision: Precision) -> Case:
    """Plan a case of networks. Raises ``UsageError`` for one that is not known."""
    return make_case(CaseName.parse(text), settings.precision(precision))


def torch_modules(text: str, settings: Settings, *, compiled: bool) -> dict[str, Any]:
    return time_case(case_of(text, settings, "bf16"), settings.timing(compiled=compiled), settings.steps)


def onnx_graphs(form: AttentionForm, text: str, settings: Settings) -> dict[str, Any]:
    return time_onnxruntime(form, case_of(text, settings, "fp16"), settings.timing(), settings.steps)


def plans(flavour: Flavour, text: str, settings: Settings) -> dict[str, Any]:
    return time_tensorrt(flavour, case_of(text, settings, "fp16"), settings.timing(), settings.steps)


SECTIONS: dict[str, Section] = {
    "graphs": Section(kind="speed", measure=partial(torch_modules, compiled=False), cases=SLIM, rehearsal=SMALL),
    "torch": Section(
        kind="speed", measure=partial(torch_modules, compiled=True), cases=COMPILED, rehearsal=("sit-tiny:all:1:1",)
    ),
    "build": Section(
        kind="bundle", measure=build_case, cases=("sit-digits:fp32", "dit-xl-2:fp16"), rehearsal=("sit-tiny:fp32",)
    ),
    "bundle": Section(
        kind="bundle",
        measure=measure_bundle,
        cases=("sit-digits:fp32:onnx", "dit-xl-2:fp16:onnx", "dit-xl-2:fp16:torch", "sit-digits:fp32:torch"),
        rehearsal=("sit-tiny:fp32:onnx",),
    ),
    **{
        f"onnxruntime-{form}": Section(
            kind="speed",
            measure=partial(onnx_graphs, form),
            cases=("dit-xl-2:all:2", "flux/4+8:all:1:2"),
            rehearsal=("sit-digits:all:2:1",),
        )
        for form in get_args(AttentionForm)[::-1]
    },
    "finetune": Section(
        kind="training", measure=time_finetuning, cases=("flux/4+8:1", "flux/2+4:1"), rehearsal=("flux-tiny:1",)
    ),
    **{
        flavour: Section(
            kind="speed", measure=partial(plans, flavour), cases=("dit-xl-2:all:2",), rehearsal=("sit-digits:all:2:1",)
        )
        for flavour in get_args(Flavour)
        if flavour != "torch-tensorrt"
    },
}
