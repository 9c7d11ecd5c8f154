"""Packages of AOTInductor: weights in place, and code that is refused where it does not fit; in `make packages`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dyexport.bundle.package_info import PACKAGE_INFO, Machine, PackageInfo, machine_of
from dyexport.engines.torch_rt import TorchEngine, device_of, incompatibility, make_engines, mismatch
from dyexport.errors import EngineBuildError, EngineMismatchError
from tests.engines.tiny import DEPTH, GROUPS, HEADS, make_inputs, make_weights, reference
from tests.engines.tiny_torch import package_of

pytestmark = [pytest.mark.slow, pytest.mark.aot_inductor]  # they share a package, which takes g++ half a minute

ON = np.ones((DEPTH, HEADS), bool), np.ones((DEPTH, GROUPS), bool)


def mappings(root: Path) -> list[range]:
    """Addresses at which this process has mapped the weight store."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if line.endswith(str(root / "graphs/weights.bin"))]
    return [range(int(start, 16), int(end, 16)) for start, end in spans]


def root_of(package: Path) -> Path:
    return package.parents[3]


@pytest.fixture
def copied(tiny_package: Path, tmp_path: Path) -> Path:
    """A copy of the package with its graph and store, to write to."""
    shutil.copytree(root_of(tiny_package), tmp_path / "copy")
    return package_of(tmp_path / "copy")


def change_info(package: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = package.with_name(PACKAGE_INFO)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def pointers(engine: TorchEngine) -> list[int]:
    return [weight.data_ptr() for weight in engine._weights]


def test_engines_use_the_mapped_file_and_share_it(copied: Path) -> None:
    one, other = make_engines([copied, copied], "cpu")
    assert isinstance(one, TorchEngine)
    assert isinstance(other, TorchEngine)
    assert mappings(root_of(copied)) == []
    one.activate()
    other.activate()
    (mapping,) = mappings(root_of(copied))
    assert one.info.weights
    assert all(pointer in mapping for pointer in pointers(one))
    assert pointers(one) == pointers(other)
    one.close()
    inputs = make_inputs(2)
    torch.testing.assert_close(other.run(inputs), reference(make_weights(), inputs, *ON), atol=1e-5, rtol=0)
    other.park()
    assert mappings(root_of(copied)) == [], "the last engine lets go of the file"
    other.run(inputs)
    assert len(mappings(root_of(copied))) == 1


def test_a_changed_weight_changes_the_output(copied: Path) -> None:
    inputs, weights = make_inputs(2), make_weights()
    (engine,) = make_engines([copied], "cpu")
    before = engine.run(inputs)["sample"]
    engine.close()
    store = np.memmap(root_of(copied) / "graphs/weights.bin", np.float32, mode="r+")
    (place,) = np.flatnonzero(store == weights.second[0, 0, 0])
    store[place] = weights.second[0, 0, 0] = 3.0
    store.flush()
    after = engine.run(inputs)
    assert (after["sample"] - before).abs().max() > 1e-3
    torch.testing.assert_close(after, reference(weights, inputs, *ON), atol=1e-5, rtol=0)


def test_weights_are_known_before_activation(copied: Path) -> None:
    copied.unlink()
    (engine,) = make_engines([copied], "cpu")
    assert {span.path for span in engine.weights} == {root_of(copied) / "graphs/weights.bin"}
    assert sum(span.length for span in engine.weights) == (root_of(copied) / "graphs/weights.bin").stat().st_size
    with pytest.raises(EngineBuildError, match="torch cannot load"):
        engine.activate()
    assert not engine.active


def test_code_of_another_torch_is_refused(copied: Path) -> None:
    change_info(copied, lambda info: info.update(version="2.0.0"))
    cure = "dyexport compile BUNDLE --target torch"
    with pytest.raises(EngineMismatchError, match=f"compiled by torch 2.0.0, and .* is installed; .*{cure}"):
        make_engines([copied], "cpu")[0].activate()


def test_code_for_another_processor_is_refused(tiny_package: Path) -> None:
    info, here = PackageInfo.read(tiny_package.with_name(PACKAGE_INFO)), machine_of("cpu")
    assert mismatch(info, torch.__version__, here) is None
    other = info.model_copy(update={"machine": here.model_copy(update={"capability": "riscv64 DEFAULT"})})
    assert "compiled for riscv64 DEFAULT, and this machine has" in str(mismatch(other, torch.__version__, here))
    newer = info.model_copy(update={"machine": here.model_copy(update={"features": (*here.features, "avx4096")})})
    assert "compiled for a CPU with avx4096, which this one lacks" in str(mismatch(newer, torch.__version__, here))
    older = info.model_copy(update={"machine": here.model_copy(update={"features": ()})})
    assert mismatch(older, torch.__version__, here) is None
    gpu = info.model_copy(update={"machine": Machine(device="cuda", capability="8.9")})
    hopper = Machine(device="cuda", capability="9.0")
    assert "compiled for 8.9, and this machine has 9.0" in str(mismatch(gpu, torch.__version__, hopper))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_code_for_a_gpu_is_refused_without_one(copied: Path) -> None:
    change_info(copied, lambda info: info.update(machine={"device": "cuda", "capability": "8.9", "features": []}))
    assert device_of(copied) == "cuda"
    assert "compiled for CUDA, and torch sees no GPU" in str(incompatibility(copied))


def test_a_graph_with_other_weights_is_refused(copied: Path) -> None:
    change_info(copied, lambda info: info.update(weights=info["weights"][1:]))
    with pytest.raises(EngineMismatchError, match="differ in weight first0"):
        _ = make_engines([copied], "cpu")[0].weights


def test_a_description_that_is_none_is_refused(copied: Path) -> None:
    copied.with_name(PACKAGE_INFO).write_text("{}")
    with pytest.raises(EngineMismatchError, match=r"cannot read .*model\.json"):
        _ = make_engines([copied], "cpu")[0].io


def test_sizes_beyond_the_compiled_range_are_refused(tiny_package: Path) -> None:
    (engine,) = make_engines([tiny_package], "cpu")
    with pytest.raises(EngineMismatchError, match="batch is 65, and the engine takes 1 to 64"):
        engine.run(make_inputs(65))
    assert not engine.active


def test_inputs_anywhere_in_memory(tiny_package: Path) -> None:
    (engine,) = make_engines([tiny_package], "cpu")
    inputs = make_inputs(2)
    shifted = {
        name: torch.cat([torch.zeros(1), value.flatten()])[1:].view(value.shape) for name, value in inputs.items()
    }
    assert any(value.data_ptr() % 16 for value in shifted.values())
    assert torch.equal(engine.run(shifted)["sample"], engine.run(inputs)["sample"])


def test_threads_take_turns(tiny_package: Path) -> None:
    (engine,) = make_engines([tiny_package], "cpu")
    engine.activate()
    requests = [make_inputs(1 + seed % 3, seed=seed) for seed in range(400)]  # without a lock, runs wait for each other
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(engine.run, requests))
    for inputs, outputs in zip(requests, answers, strict=True):
        torch.testing.assert_close(outputs, reference(make_weights(), inputs, *ON), atol=1e-5, rtol=0)


FORK = """
import os, signal, sys
from pathlib import Path
import torch
from dyexport.engines.torch_rt import make_engines
from tests.engines.tiny import make_inputs
(engine,) = make_engines([Path(sys.argv[1])], "cpu")
torch.set_num_threads(2)
before = engine.run(make_inputs(64))["sample"]
torch.rand(2000, 2000).relu_()  # starts the threads of OpenMP, which the child does not have
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends a hang
    sys.exit(3 if torch.equal(engine.run(make_inputs(64))["sample"], before) else 4)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


def test_a_forked_process_runs_the_engine(tiny_package: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FORK, str(tiny_package)], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
