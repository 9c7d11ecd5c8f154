"""What a TensorRT engine decides without a device: bindings, fit, and which profile holds a shape."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyexport.engines.tensorrt_rt import TensorRtEngine, choose_profile, misfit
from dyexport.errors import EngineMismatch
from dyexport.plans import ENGINE, INFO, PlanInfo, Profile
from dyexport.tensors import TensorSpec

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
    engine = TensorRtEngine(tmp_path / ENGINE)
    assert engine.io.inputs[0].shape == ("batch", "2*height")
    assert (engine.weights[0].length, engine.active, engine.shares_weights) == (4, False, False)
    engine.close()


@pytest.mark.parametrize(
    ("sizes", "profile"),
    [({"batch": 1, "2*height": 32}, 0), ({"batch": 8, "2*height": 32}, 1), ({"batch": 2, "2*height": 128}, 1)],
)
def test_the_profile_nearest_to_a_shape_is_chosen(sizes: dict[str, int], profile: int) -> None:
    assert choose_profile((SMALL, LARGE), sizes) == profile


def test_a_shape_that_no_profile_holds_is_named() -> None:
    with pytest.raises(EngineMismatch, match=r"batch = 9, .* fits no profile .*batch 1 to 8.*--profile"):
        choose_profile((SMALL, LARGE), {"batch": 9, "2*height": 32})


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("1.7.1.116", "8.9", None),
        ("1.8.0", "8.9", "built by tensorrt-rtx 1.7.1.116, and 1.8.0 is installed; build the bundle again"),
        ("1.7.1.116", "8.6", "built for compute capability 8.9, 12.0, and this GPU has 8.6"),
    ],
)
def test_another_gpu_or_version_is_refused_by_name(version: str, capability: str, reason: str | None) -> None:
    found = misfit(info(), version, capability)
    assert found == reason if reason is None else reason in str(found)


def test_no_capabilities_are_all() -> None:
    assert misfit(info(compute_capabilities=()), "1.7.1.116", "7.5") is None
