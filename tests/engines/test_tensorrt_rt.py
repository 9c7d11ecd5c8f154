"""TensorRT: what an engine decides without a device, and what only a GPU can show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dyexport.bundle.plan_info import ENGINE, INFO, Flavour, PlanInfo, Profile
from dyexport.bundle.tensors import TensorSpec
from dyexport.engines.base import shape_key
from dyexport.engines.switching import EngineChoice, SwitchingEngine
from dyexport.engines.tensorrt_contexts import ALIGNMENT, Workspace
from dyexport.engines.tensorrt_fit import choose_profile, version_mismatch
from dyexport.engines.tensorrt_rt import TensorRtEngine
from dyexport.engines.tensorrt_session import PlanFile, Session
from dyexport.errors import EngineBuildError, EngineMismatchError
from tests.engines.on_gpu import build_tiny_plan, gpu_engines
from tests.engines.tiny import (
    DEPTH,
    GROUPS,
    HEADS,
    Store,
    Weights,
    make_inputs,
    make_weights,
    reference,
    t_of,
    whole_segment,
    write_onnx,
)

SMALL, LARGE = (
    {"batch": Profile(min=1, opt=1, max=2), "height": Profile(min=8, opt=16, max=16)},
    {"batch": Profile(min=1, opt=8, max=8), "height": Profile(min=8, opt=32, max=64)},
)


def info(**values: object) -> PlanInfo:
    given = {
        "flavour": "tensorrt-rtx",
        "version": "1.7.1.116",
        "compute_capabilities": ("8.9", "12.0"),
        "precision": "bf16",
        "profiles": (SMALL, LARGE),
        "inputs": (TensorSpec(name="hidden_states", dtype="float32", shape=("batch", "2*height")),),
        "outputs": (TensorSpec(name="sample", dtype="float32", shape=("batch", "2*height")),),
        "layers": (),
        "graph_sha256": "",
        "plan_sha256": "",
    }
    return PlanInfo.model_validate({**given, **values})


def test_bindings_are_known_without_a_device(tmp_path: Path) -> None:
    (tmp_path / ENGINE).write_bytes(b"plan")
    (tmp_path / INFO).write_text(info().model_dump_json())
    engine = TensorRtEngine(tmp_path / ENGINE, workspace=Workspace("cuda"))
    assert engine.io.inputs[0].shape == ("batch", "2*height")
    assert (engine.weights[0].length, engine.active, engine.shares_weights) == (4, False, False)
    engine.park()
    engine.close()


@pytest.mark.parametrize(
    ("sizes", "profile"),
    [({"batch": 1, "2*height": 32}, 0), ({"batch": 8, "2*height": 32}, 1), ({"batch": 2, "2*height": 128}, 1)],
)
def test_the_profile_nearest_to_a_shape_is_chosen(sizes: dict[str, int], profile: int) -> None:
    assert choose_profile((SMALL, LARGE), sizes) == profile


def test_a_shape_that_no_profile_holds_is_named() -> None:
    with pytest.raises(EngineMismatchError, match=r"batch = 9, .* fits no profile .*batch 1 to 8.*--profile"):
        choose_profile((SMALL, LARGE), {"batch": 9, "2*height": 32})


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("1.7.1.116", "8.9", None),
        ("1.8.0", "8.9", "built by tensorrt-rtx 1.7.1.116, and 1.8.0 is installed; compile the bundle here"),
        ("1.7.1.116", "8.6", "built for compute capability 8.9, 12.0, and this GPU has 8.6"),
    ],
)
def test_another_gpu_or_version_is_refused_by_name(version: str, capability: str, reason: str | None) -> None:
    found = version_mismatch(info(), version, capability)
    assert found == reason if reason is None else reason in str(found)


def test_no_capabilities_are_all() -> None:
    assert version_mismatch(info(compute_capabilities=()), "1.7.1.116", "7.5") is None


@dataclass
class Sized:
    """A member of a workspace that counts how often it is asked."""

    size: int
    asked: int = 0

    @property
    def activation_bytes(self) -> int:
        self.asked += 1
        return self.size


def test_a_workspace_holds_the_largest_from_the_first_on() -> None:
    """A block that grew would take away the address that captured graphs hold."""
    workspace = Workspace("cpu")
    small, large = Sized(1000), Sized(5000)
    workspace.join(small)
    workspace.join(large)
    workspace.enter(small)
    address, size = workspace.memory
    workspace.enter(large)
    assert workspace.memory == (address, size)
    assert size >= 5000
    assert address % ALIGNMENT == 0
    assert (small.asked, large.asked) == (1, 1)


def test_a_workspace_goes_with_its_last_user() -> None:
    workspace = Workspace("cpu")
    members = [Sized(10), Sized(20)]
    for member in members:
        workspace.join(member)
        workspace.enter(member)
    workspace.leave(members[0])
    assert workspace.memory[1] >= 20
    workspace.leave(members[1])
    with pytest.raises(AssertionError, match="enters before it runs"):
        _ = workspace.memory
    workspace.enter(members[0])
    assert workspace.memory[1] >= 20


def test_contexts_are_told_apart_by_all_shapes() -> None:
    one, two = torch.zeros(1, 4), torch.zeros(2, 4)
    assert shape_key({"a": one, "b": two}) == shape_key({"b": two + 1, "a": one})
    assert len({shape_key({"a": one}), shape_key({"a": two}), shape_key({"b": one})}) == 3


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_graph(tmp_path_factory.mktemp("plans"), make_weights(0), "segment-00")


def write_graph(folder: Path, weights: Weights, name: str) -> Path:
    write_onnx(folder / f"{name}.onnx", weights, whole_segment(gated=False), Store(folder / f"{name}.bin"))
    return folder / f"{name}.onnx"


def test_a_plan_is_read_as_a_stream(tmp_path: Path) -> None:
    path = tmp_path / ENGINE
    path.write_bytes(bytes(range(100)))
    plan = PlanFile(path)
    assert plan.read(3) == bytes([0, 1, 2])
    assert plan.seek(2, "CUR")
    assert plan.read(1) == bytes([5])
    assert plan.seek(10, "END")
    assert plan.read(20) == bytes(range(90, 100))
    assert plan.seek(7, "SET")
    assert plan.read(1) == bytes([7])


@pytest.mark.tensorrt
def test_tensorrt_has_what_engines_ask_of_it(rtx: Any) -> None:
    """Names that only a GPU would miss: those of the real module, whose objects take a driver to make."""
    assert {position.name for position in rtx.SeekPosition.__members__.values()} == {"SET", "CUR", "END"}
    for kind, names in {
        rtx.Runtime: ("defer_weights_loading", "engine_header_size", "get_engine_validity"),
        rtx.ICudaEngine: (
            "load_weights_async",
            "unload_weights",
            "device_memory_size_v2",
            "weight_streaming_budget_v2",
        ),
        rtx.IExecutionContext: ("set_device_memory", "is_stream_capturable", "set_optimization_profile_async"),
        rtx.IRuntimeCache: ("deserialize", "serialize"),
        rtx.IRuntimeConfig: ("set_execution_context_allocation_strategy", "create_runtime_cache", "set_runtime_cache"),
    }.items():
        assert set(names) <= set(dir(kind))
    assert rtx.DynamicShapesKernelSpecializationStrategy.EAGER


@pytest.mark.tensorrt
@pytest.mark.skipif(torch.cuda.is_available(), reason="loads there")
def test_without_a_gpu_a_real_plan_is_refused_in_a_sentence(rtx: Any, graph: Path) -> None:
    """By the engine before TensorRT is asked, and by TensorRT with its own reason."""
    plan = build_tiny_plan(graph, "tensorrt-rtx")
    engine = TensorRtEngine(plan, workspace=Workspace("cuda"))
    with pytest.raises(EngineMismatchError, match="torch sees none; use --target onnx"):
        engine.activate()
    assert not engine.active
    with pytest.raises(EngineBuildError, match=r"cannot load .*engine\.plan: .*CUDA driver"):
        Session(plan, engine.info)


def expected(seed: int, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    on = np.ones((DEPTH, HEADS), bool), np.ones((DEPTH, GROUPS), bool)
    return reference(make_weights(seed), inputs, *on)


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("resident", [1, 2, 3])
def test_switching_engines_share_memory_and_keep_their_weights_apart(
    tmp_path: Path, flavour: Flavour, resident: int
) -> None:
    """Three engines take turns in one block, are parked, prefetched and captured, and never see another's weights."""
    graphs = [write_graph(tmp_path, make_weights(seed), f"segment-{seed:02}") for seed in range(3)]
    plans = [build_tiny_plan(path, flavour, path.stem) for path in graphs]
    engines = gpu_engines(flavour, *plans)
    choose = lambda inputs: EngineChoice(engine=int(t_of(inputs)), inputs={})  # noqa: E731
    with SwitchingEngine(engines, choose, max_resident=resident) as switching:
        for index in (0, 0, 0, 1, 1, 1, 2, 2, 2) * 3:
            inputs = make_inputs(2, t=float(index), seed=index)
            torch.testing.assert_close(
                switching.run(inputs)["sample"], expected(index, inputs)["sample"], atol=1e-4, rtol=0
            )


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_a_captured_graph_replays_and_reads_new_inputs(graph: Path, flavour: Flavour) -> None:
    inner = gpu_engines(flavour, build_tiny_plan(graph, flavour))[0].inner
    for seed in range(4):
        inputs = make_inputs(2, seed=seed)
        sample = inner.run({name: tensor.cuda() for name, tensor in inputs.items()})["sample"]
        torch.testing.assert_close(sample.cpu(), expected(0, inputs)["sample"], atol=1e-4, rtol=0)
    (context,) = inner._contexts.values()
    assert context._graph is not None
    inner.park()
    assert context._graph is None


@pytest.mark.gpu
def test_parking_gives_memory_back(graph: Path) -> None:
    (engine,) = gpu_engines("tensorrt-rtx", build_tiny_plan(graph, "tensorrt-rtx"))
    session = engine.inner._opened()
    engine.activate()
    torch.cuda.synchronize()
    assert session._engine.weights_loaded
    engine.park()
    assert not session._engine.weights_loaded
    assert engine.inner._session is session
