"""The GPU benchmark on a CPU at small sizes: all of its code but the capture of CUDA graphs.

`make rehearse` runs what builds or times.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.__main__ import Watch, main
from benchmarks.gpu.cases import CaseName, fill, make_case, random_inputs
from benchmarks.gpu.report import Results
from benchmarks.gpu.sections import COMPILED as COMPILED_CASES
from benchmarks.gpu.sections import SECTIONS, SLIM
from benchmarks.gpu.summary import summarize
from benchmarks.gpu.timing import require_finite
from benchmarks.gpu.with_torch import fitting, network_inputs, stock_inputs, stock_module
from dyexport.errors import DyexportError, UsageError

TINY = ("sit-digits:all:2:2", "dit-digits:capacity:2:2", "flux-tiny:capacity:1:2", "latte-tiny:all:1:2")
COMPILED = "torch"  # the section that takes minutes to compile on a CPU
PLANS = ("tensorrt", "tensorrt-rtx")
QUICK = "finetune"
FULL_SIZE = ("dit-xl-2:capacity:2", "flux/4+8:all:1:2")


def run(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Run the benchmark; records by section and case."""
    where = ("--device", "cpu", "--out", str(folder), "--work", str(folder / "work"))
    main([*where, "--rounds", "1", "--repeats", "1", "--steps", "4", *arguments])
    records: dict[str, dict[str, Any]] = json.loads((folder / "gpu.json").read_text())
    return records


@pytest.mark.parametrize("text", sorted({*SLIM, *COMPILED_CASES}))
def test_default_cases_are_planned_at_full_size(text: str) -> None:
    """Widths, segments, networks without memory: all that comes before a GPU is touched."""
    case = make_case(CaseName.parse(text))
    assert case.plan.flops_ratio == pytest.approx(0.3 if text.endswith("@0.3") else 0.5, abs=0.005)
    assert case.plan.flops_ratio < case.plan.network_flops_ratio <= case.plan.executed_flops_ratio < 1
    ratios = [case.executed_ratio(segment) for segment in case.segments]
    assert len(ratios) == case.name.engines
    assert all(0 < ratio < 1 for ratio in ratios)
    sizes = {name: piece.nbytes for name, piece in case.networks.items()}
    assert list(sizes) == ["conditioning", *(f"segment {i}" for i in range(case.name.engines)), "dense"]
    assert all(size < sizes["dense"] for name, size in sizes.items() if name.startswith("segment"))
    assert next(stock_module(case).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("text", TINY)
def test_every_backbone_is_timed(text: str, tmp_path: Path) -> None:
    (record,) = run(tmp_path, "--sections", "graphs", "--cases", text).values()
    assert "failure" not in record, record
    assert "diffusers_failure" not in record
    assert record["left_out"] == []
    assert sum(engine["share"] for engine in record["engines"]) == pytest.approx(1)
    assert {"command", "date", "device", "torch", "commit", "took"} <= record.keys()


@pytest.mark.parametrize(
    "section",
    [
        name if name == QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in SECTIONS
        if name not in (COMPILED, *PLANS)
    ],
)
@pytest.mark.build
def test_every_section_is_rehearsed(section: str, tmp_path: Path) -> None:
    records = run(tmp_path, "--rehearse", "--sections", section)
    assert [record["case"] for record in records.values()] == list(SECTIONS[section].rehearsal)
    for record in records.values():
        assert "failure" not in record, record
        for name, step in record.get("steps", {}).items():
            assert "failure" not in step, (name, step)
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert sum(line.startswith(f"| {section} |") for line in lines) == len(records)


@pytest.mark.slow
def test_networks_are_compiled(tmp_path: Path) -> None:
    (record,) = run(tmp_path, "--rehearse", "--sections", COMPILED).values()
    assert "failure" not in record, record


@pytest.mark.gpu
@pytest.mark.parametrize("section", ["graphs", COMPILED])
@pytest.mark.parametrize("text", TINY)
def test_networks_are_captured(text: str, section: str, tmp_path: Path) -> None:
    main(["--device", "cuda", "--out", str(tmp_path), "--sections", section, "--cases", text])
    (record,) = json.loads((tmp_path / "gpu.json").read_text()).values()
    assert "failure" not in record, record


class HostTensors(TorchDispatchMode):
    """Records operators that read or write tensors elsewhere than on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, outputs)) if isinstance(each, torch.Tensor)]
        if any(tensor.device.type != "meta" for tensor in tensors):
            self.operators.add(str(func))
        return outputs


def host_operators(module: nn.Module, inputs: dict[str, torch.Tensor]) -> set[str]:
    """Run a module on the meta device; return the operators that touch the host."""
    module = module.to_empty(device="meta").eval()
    inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    with torch.no_grad(), HostTensors() as seen:
        module(**inputs)
    return seen.operators


@pytest.mark.parametrize("text", [*(pytest.param(text, marks=pytest.mark.slow) for text in FULL_SIZE), *TINY])
def test_no_network_touches_the_host(text: str) -> None:
    """A CUDA graph cannot be captured of a copy from the host, nor of reading a value on the device."""
    case = make_case(CaseName.parse(text))
    for name, piece in case.networks.items():
        inputs = random_inputs(piece.inputs, {**case.sizes, "rows": 4 * case.name.batch}, "cpu")
        assert host_operators(piece.module, inputs) == set(), name
    assert host_operators(stock_module(case), stock_inputs(case, "cpu")) == set()


def test_a_copy_from_the_host_is_seen() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.tensor([2.0]).to(x.device)

    assert "aten._to_copy.default" in host_operators(Scaled(), {"x": torch.ones(3)})


@pytest.mark.slow
@pytest.mark.build
@pytest.mark.skipif(torch.cuda.is_available(), reason="TensorRT may run there")
def test_a_section_that_fails_is_a_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    case = "sit-digits:all:2:1"
    records = run(tmp_path, "--sections", "tensorrt,onnxruntime-fused", "--cases", case)
    assert "failure" in records[f"tensorrt {case}"]
    assert records[f"onnxruntime-fused {case}"]["seconds"]["dense"] > 0
    assert (tmp_path / "gpu.md").read_text().count(f"| {case} |") == 2


@pytest.mark.slow
@pytest.mark.build
def test_a_step_of_a_bundle_that_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    """The target does not run here, so that sampling, verifying and timing fail one by one."""
    (record,) = run(tmp_path, "--sections", "bundle", "--cases", "sit-tiny:fp32:torch-tensorrt").values()
    assert "failure" not in record["steps"]["build"]
    for name in ("compile", "sample", "verify", "bench"):
        assert record["steps"][name]["failure"]
    assert "torch-tensorrt" in record["steps"]["sample"]["failure"]


@pytest.mark.slow
@pytest.mark.build
def test_a_command_that_takes_too_long_is_a_failed_step(tmp_path: Path) -> None:
    case = "sit-tiny:fp32:onnx"
    (record,) = run(tmp_path, "--sections", "bundle", "--cases", case, "--patience", "0.01").values()
    assert "dyexport verify took more than 0 s" in record["steps"]["verify"]["failure"]
    assert record["steps"]["sample"]["warm"] > 0


@pytest.mark.slow
@pytest.mark.tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="TensorRT may run there")
def test_plans_are_built_and_refused_without_a_driver(tmp_path: Path) -> None:
    (record,) = run(tmp_path, "--sections", "tensorrt-rtx", "--cases", "flux-tiny:capacity:1:1").values()
    assert "TensorRT cannot load" in record["failure"]
    assert "CUDA driver" in record["failure"]


def test_unknown_cases_and_those_out_of_time_are_lines_too(tmp_path: Path) -> None:
    records = run(tmp_path, "--sections", "graphs", "--cases", "dit-nano:all:2")
    assert "dit-nano" in records["graphs dit-nano:all:2"]["failure"]
    for section in ("build", "bundle", "finetune"):
        records = run(tmp_path, "--sections", section, "--cases", "typo")
        assert "is not MODEL:" in records[f"{section} typo"]["failure"]
    records = run(tmp_path, "--sections", "graphs", "--cases", "dit-digits:all:2", "--limit", "0")
    assert records["graphs dit-digits:all:2"]["failure"].startswith("not begun: 0 of 0 s are left")
    assert len(records) == 5, "records of an earlier run stay"


def test_an_unknown_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unknown section 'tensorflow'; known: graphs, "):
        run(tmp_path, "--sections", "tensorflow")


def test_a_case_that_would_not_fit_is_not_begun() -> None:
    watch = Watch(100)
    assert watch.refusal() is None
    watch.took(30)
    assert watch.refusal() is None
    watch.took(1000)
    watch.took(5)
    assert "a case took 1000" in str(watch.refusal())


def test_a_cut_run_keeps_its_records_and_a_failure_replaces_no_measurement(tmp_path: Path) -> None:
    made = {"device": "cpu", "torch": "2", "commit": "c", "date": "2026-11-28"}
    results = Results(tmp_path)
    results.add("finetune", "a", {**made, "failure": "out | of memory"})
    assert "out / of memory" in (tmp_path / "gpu.md").read_text()
    measured = {"seconds_dynamic": 1.0, "seconds_complete": 2.0, "peak_bytes": None, "estimated_bytes": 1e9}
    results.add("finetune", "a", {**made, **measured, "trainable_parameters": 1e6})
    results.add("finetune", "a", {**made, "failure": "not begun"})
    with (tmp_path / "gpu.jsonl").open("a") as file:
        file.write('{"section": "finetune", "ca')
    main(["--tables", "--out", str(tmp_path)])
    assert "| finetune | a | 1.00 |" in (tmp_path / "gpu.md").read_text()
    results.add("finetune", "b", {**made, "failure": "none"})
    assert list(results.records) == ["finetune a", "finetune b"], "what follows a cut line is kept"
    assert results.records["finetune a"]["seconds_complete"] == 2.0
    assert "| finetune | a | 1.00 | 2.00 |  | 1.0 | 1 M |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize(
    "text",
    ["dit-xl-2", "dit-xl-2:some:2", "dit-xl-2:all:two", "dit-xl-2:all:0", "dit-xl-2:all:2:3:4", "dit-xl-2:all:2@1.5"],
)
def test_case_names(text: str) -> None:
    with pytest.raises(UsageError, match="such as dit-xl-2:all:2"):
        CaseName.parse(text)


@pytest.mark.parametrize("model", ["dit-xl-2/4+8", "flux/4", "flux/4+x"])
def test_blocks_are_flux_s(model: str) -> None:
    with pytest.raises(UsageError, match="such as flux/4"):
        _ = CaseName.parse(f"{model}:all:1").preset


def test_blocks_of_flux() -> None:
    name = CaseName.parse("flux/4+8:all:1:2")
    assert (name.preset.depth, name.engines, name.batch, name.budget) == (12, 2, 1, 0.5)
    assert CaseName.parse("flux/4+8:all:1@0.3").budget == 0.3


def test_realised_is_one_where_every_flop_saved_is_time_saved() -> None:
    case = make_case(CaseName.parse("dit-digits:all:2:2"))
    shares = [case.executed_ratio(segment) for segment in case.segments]
    seconds = {"dense": 1.0, "diffusers": 1.5, "eager": 3.0, "conditioning": 0.0}
    record = summarize(case, {**seconds, **{f"segment {i}": share for i, share in enumerate(shares)}}, steps=50)
    assert record["measure"] == "dense", "the faster of the compiled static models"
    assert [engine["realised"] for engine in record["engines"]] == pytest.approx([1.0, 1.0])
    assert record["realised_of_executed"] == pytest.approx(1.0)
    assert record["speedups"]["eager"] == pytest.approx(3 * record["speedup"])
    assert record["realised"] < 1, "unions of units are FLOPs that a gate would have saved"


def test_what_fits_beside_diffusers_module() -> None:
    sizes = {"conditioning": 5, "segment 0": 20, "dense": 40}
    assert fitting(sizes, stock=40, free=None) == list(sizes)
    assert fitting(sizes, stock=40, free=132) == list(sizes)
    assert fitting(sizes, stock=40, free=131) == ["conditioning", "segment 0"]
    with pytest.raises(DyexportError, match="name fewer blocks"):
        fitting(sizes, stock=40, free=80)


@torch.no_grad()
def test_noise_keeps_its_size_through_a_network() -> None:
    case = make_case(CaseName.parse("dit-digits:all:2:1"), "fp32")
    module = fill(case.networks["dense"].module, "cpu")
    (sample,) = module(**network_inputs(case, "dense", "cpu", 1))
    require_finite(sample)
    assert 1e-3 < float(sample.abs().mean()) < 1e3
    with pytest.raises(DyexportError, match="not finite"):
        require_finite((sample, sample / 0))
