"""One suite that every engine passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dyexport.bundle.plan_info import ENGINE, Flavour
from dyexport.engines.base import Engine, Tensors
from dyexport.engines.fake import FakeEngine
from dyexport.engines.ort import OrtEngine
from dyexport.engines.ort_cuda import OrtCudaEngine
from dyexport.engines.switching import EngineChoice, SwitchingEngine
from dyexport.engines.torch_rt import make_engines as torch_engines
from dyexport.errors import EngineMismatchError
from tests.engines.on_gpu import build_tiny_plan, gpu_engines
from tests.engines.tiny import (
    DEPTH,
    GROUPS,
    HEADS,
    MODULATION,
    Store,
    make_inputs,
    make_weights,
    reference,
    t_of,
    tiny_io,
    whole_segment,
    write_onnx,
)

WEIGHTS = make_weights()
SEGMENT = whole_segment(gated=False)
ON = np.ones((DEPTH, HEADS), bool), np.ones((DEPTH, GROUPS), bool)


def expected(inputs: Tensors) -> dict[str, torch.Tensor]:
    return reference(WEIGHTS, dict(inputs), *ON)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    store = Store(folder / "weights.bin")
    write_onnx(folder / "segment-00.onnx", WEIGHTS, SEGMENT, store)
    return folder


def switching(folder: Path) -> Engine:
    engines = [OrtEngine(folder / "segment-00.onnx") for _ in range(2)]
    return SwitchingEngine(engines, lambda inputs: EngineChoice(engine=int(t_of(inputs) > 500), inputs={}))


MAKERS: dict[str, Callable[[Path], Engine]] = {
    "ort": lambda folder: OrtEngine(folder / "segment-00.onnx"),
    "ort-shared": lambda folder: OrtEngine(folder / "segment-00.onnx", share_weights=True),
    "ort-fixed-addresses": lambda folder: OrtCudaEngine(folder / "segment-00.onnx", device="cpu", cuda_graphs=True),
    "fake": lambda folder: FakeEngine(tiny_io(SEGMENT), expected),
    "switching": switching,
}


ON_GPU: dict[str, Callable[[Path], Engine]] = {
    "ort-cuda": lambda folder: gpu_engines("onnx", folder / "segment-00.onnx")[0],
    "ort-cuda-graphs": lambda folder: gpu_engines("onnx", folder / "segment-00.onnx", cuda_graphs=True)[0],
    "ort-rtx": lambda folder: gpu_engines("onnx-rtx", folder / "segment-00.onnx")[0],
    "tensorrt": lambda folder: tensorrt(folder, "tensorrt"),
    "tensorrt-rtx": lambda folder: tensorrt(folder, "tensorrt-rtx"),
}


def tensorrt(folder: Path, flavour: Flavour) -> Engine:
    return gpu_engines(flavour, build_tiny_plan(folder / "segment-00.onnx", flavour))[0]


@pytest.fixture(
    params=[
        *MAKERS,
        pytest.param("torch", marks=[pytest.mark.build, pytest.mark.slow, pytest.mark.aot_inductor]),
        *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPU),
    ]
)
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    if request.param == "torch":
        return torch_engines([request.getfixturevalue("tiny_package")], "cpu")[0]
    return (MAKERS | ON_GPU)[request.param](folder)


def assert_close(outputs: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert outputs.keys() == wanted.keys()
    torch.testing.assert_close(outputs["sample"], wanted["sample"], atol=1e-5, rtol=0)
    assert torch.equal(outputs["kept_tokens"], wanted["kept_tokens"])


def test_io_is_known_before_activation(engine: Engine) -> None:
    assert engine.io == tiny_io(SEGMENT)
    assert all(span.path.name in ("weights.bin", ENGINE) for span in engine.weights)
    assert not engine.active


def test_activate_is_idempotent(engine: Engine) -> None:
    engine.activate()
    engine.activate()
    assert engine.active
    engine.close()
    assert not engine.active
    engine.close()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_run_activates_and_computes(engine: Engine, batch: int) -> None:
    inputs = make_inputs(batch)
    assert_close(engine.run(inputs), expected(inputs))
    assert engine.active


def test_runs_again_after_close(engine: Engine) -> None:
    inputs = make_inputs(2)
    with engine:
        first = engine.run(inputs)
    assert not engine.active
    assert_close(engine.run(inputs), first)


def test_parked_engines_run_again(engine: Engine) -> None:
    """More often than it takes to capture a graph, on either side of being parked."""
    inputs = make_inputs(2)
    for _ in range(2):
        for seed in range(3):
            inputs = make_inputs(2, seed=seed)
            assert_close(engine.run(inputs), expected(inputs))
        engine.park()
        assert not engine.active
        engine.park()
    engine.activate()
    assert engine.active
    engine.park()
    engine.close()
    assert not engine.active


def test_shapes_take_turns(engine: Engine) -> None:
    for batch in (1, 2, 1, 2, 1, 2, 3):
        inputs = make_inputs(batch, seed=batch)
        assert_close(engine.run(inputs), expected(inputs))


def test_outputs_outlive_the_next_run(engine: Engine) -> None:
    inputs = make_inputs(2)
    first = engine.run(inputs)
    engine.run(make_inputs(2, seed=1))
    engine.close()
    assert_close(first, expected(inputs))


def test_takes_views_and_tensors_that_want_gradients(engine: Engine) -> None:
    inputs = make_inputs(3)
    inputs["modulation"] = inputs["modulation"][:1].expand(3, -1)
    inputs["hidden_states"] = inputs["hidden_states"].mT.contiguous().mT.requires_grad_()
    outputs = engine.run(inputs)
    assert_close(
        {name: value.detach() for name, value in outputs.items()}, {k: v.detach() for k, v in expected(inputs).items()}
    )


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    inputs = {**make_inputs(2), **tensors}
    return {name: tensor for name, tensor in inputs.items() if tensor is not None}


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (changed(modulation=None), "modulation"),
        (changed(width_gate=torch.ones(3)), "width_gate"),
        (changed(modulation=torch.zeros(2, MODULATION, dtype=torch.float64)), "modulation must be float32, is float64"),
        (changed(hidden_states=torch.zeros(2, 2, 2, 2, dtype=torch.int32)), "hidden_states must be float32, is int32"),
        (changed(hidden_states=torch.zeros(2, 2, 2, 3)), r"\[2, 2, 2, 3\]"),
        (changed(hidden_states=torch.zeros(2, 2, 2)), r"\[2, 2, 2\]"),
        (changed(modulation=torch.zeros(3, MODULATION)), "modulation"),
        (changed(modulation=torch.zeros(2, MODULATION, 1)), "modulation"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(engine: Engine, inputs: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(EngineMismatchError, match=named):
        engine.run(inputs)
    assert not engine.active, "inputs are looked at before anything is loaded"
