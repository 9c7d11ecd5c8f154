"""Exported programs: weights are views of the store, and an archive that is more than data is not loaded."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dyexport.engines.pt2 import is_arithmetic, load_program
from dyexport.engines.torch_rt import TorchEngine
from dyexport.errors import EngineBuildError, EngineMismatchError
from tests.engines.tiny import (
    CLASSES,
    FEATURES,
    Store,
    make_inputs,
    make_weights,
    whole_segment,
    write_conditioning_pt2,
    write_pt2,
)

Records = dict[str, bytes]
TRACES: list[str] = []  # what an archive that was wrongly trusted leaves behind


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    write_pt2(folder / "segment-00.pt2", make_weights(), whole_segment(), Store(folder / "weights.bin"))
    return folder


@pytest.fixture
def program(original: Path, tmp_path: Path) -> Path:
    for name in ("segment-00.pt2", "weights.bin"):
        (tmp_path / name).write_bytes((original / name).read_bytes())
    return tmp_path / "segment-00.pt2"


def rewrite(path: Path, change: Callable[[Records], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        records = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            archive.writestr(f"{root}/{name}", data)


def edit_json(name: str, change: Callable[[Any], None]) -> Callable[[Records], None]:
    def apply(records: Records) -> None:
        value = json.loads(records[name])
        change(value)
        records[name] = json.dumps(value).encode()

    return apply


def test_weights_are_views_of_the_mapped_store(program: Path) -> None:
    with TorchEngine(program) as engine:
        assert engine._module is not None
        storages = {tensor.untyped_storage().data_ptr() for tensor in engine._module.state_dict().values()}
    assert len(storages) == 1
    assert program.stat().st_size < 100_000, "the archive holds no weights"


def test_a_changed_store_changes_the_output(program: Path) -> None:
    inputs = make_inputs(2, whole_segment())
    before = TorchEngine(program).run(inputs)["sample"]
    store = program.parent / "weights.bin"
    store.write_bytes(bytes(store.stat().st_size))
    after = TorchEngine(program).run(inputs)["sample"]
    assert not torch.allclose(before, after)
    label = inputs["modulation"][:, :FEATURES].reshape(inputs["hidden_states"].shape)  # (B, C, H, W)
    torch.testing.assert_close(after, inputs["hidden_states"] + label)  # without weights that is all


def test_label_out_of_range_is_a_mismatch(tmp_path: Path) -> None:
    path = tmp_path / "conditioning.pt2"
    write_conditioning_pt2(path, make_weights(), Store(tmp_path / "weights.bin"))
    engine = TorchEngine(path)
    with pytest.raises(EngineMismatchError, match="conditioning"):
        engine.run({"timestep": torch.zeros(2), "class_labels": torch.tensor([CLASSES + 1, 1])})
    assert engine.run({"timestep": torch.zeros(2), "class_labels": torch.tensor([CLASSES, 1])})


def test_programs_load_side_by_side(program: Path) -> None:
    """As they do when one is needed while another is activated in the background."""
    engines = [TorchEngine(program) for _ in range(8)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda engine: engine.activate(), engines))
    assert all(engine.active for engine in engines)


def test_truncated_store_is_a_build_error(program: Path) -> None:
    store = program.parent / "weights.bin"
    store.write_bytes(store.read_bytes()[:-4])
    with pytest.raises(EngineBuildError, match="ends at byte"):
        TorchEngine(program).activate()


def test_missing_store_is_a_build_error(program: Path) -> None:
    (program.parent / "weights.bin").unlink()
    with pytest.raises(EngineBuildError, match=r"weights\.bin is missing"):
        TorchEngine(program).activate()


@pytest.mark.parametrize("data", [b"", b"not a zip file"])
def test_garbage_is_a_build_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "garbage.pt2"
    path.write_bytes(data)
    with pytest.raises(EngineBuildError, match=r"garbage\.pt2"):
        _ = TorchEngine(path).io


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda engine: engine["weights"].pop("first.0"), r"first\.0"),
        (lambda engine: engine["weights"]["first.0"].update(shape=[2, 8]), r"first\.0"),
        (lambda engine: engine["outputs"].pop(), "2 outputs"),
        (lambda engine: engine.update(store="../weights.bin"), "outside the bundle"),
        (lambda engine: engine["weights"]["first.0"].update(offset=-4), "greater than or equal"),
        (lambda engine: engine.update(extra=1), "not permitted"),
    ],
)
def test_description_that_does_not_fit_is_a_build_error(program: Path, change: Any, named: str) -> None:
    rewrite(program, edit_json("extra/engine.json", change))
    with pytest.raises(EngineBuildError, match=named):
        TorchEngine(program).run(make_inputs(2, whole_segment()))


class Trap:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return TRACES.append, ("unpickled",)


def trap() -> bytes:
    return pickle.dumps(Trap())


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def set_target(target: str) -> Callable[[Records], None]:
    return edit_json(
        "models/model.json", lambda model: model["graph_module"]["graph"]["nodes"][0].update(target=target)
    )


def pickled_weight(records: Records) -> None:
    edit_json("data/weights/model_weights_config.json", lambda c: c["config"]["first.0"].update(use_pickle=True))(
        records
    )
    records["data/weights/weight_0"] = saved(Trap())


def custom_object(records: Records) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit_json("data/constants/model_constants_config.json", lambda c: c["config"].update(x=entry))(records)
    records["data/constants/opaque_obj_0"] = trap()


def expression(records: Records) -> None:
    symbols = records["models/model.json"].replace(b"Symbol('", b"print('")
    assert symbols != records["models/model.json"]
    records["models/model.json"] = symbols


@pytest.mark.parametrize(
    "change",
    [
        pickled_weight,
        custom_object,
        expression,
        lambda records: records.update({"data/sample_inputs/model.pt": saved(Trap())}),
        lambda records: records.update({"data/weights/model.pt": trap()}),
        lambda records: records.update({"data/aotinductor/model/model.so": b"\x7fELF"}),
        set_target("torch.load"),
        set_target("torch.ops.aten.from_file.default"),
        set_target("torch.hub.load"),
        set_target("_operator.call"),
        set_target("#somewhere.else"),
    ],
)
def test_an_archive_that_is_code_is_not_loaded(program: Path, change: Callable[[Records], None]) -> None:
    rewrite(program, change)
    TRACES.clear()
    with pytest.raises(EngineBuildError, match="not loaded"):
        load_program(program)
    assert TRACES == []


@pytest.mark.parametrize(
    "expression",
    [
        "Symbol('s47', positive=True, integer=True)",
        "Add(Mul(Integer(2), s0), Integer(-1))",
        "2*s0 + 1",
        "Float('0.5', precision=53)",
        "64",
    ],
)
def test_shapes_are_arithmetic(expression: str) -> None:
    assert is_arithmetic(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "eval(s0)",
        "Float('print(1)')",
        "Add('0.5')",
        "Symbol('s0').__class__",
        "Symbol('s0', eval('1'))",
        "s0.func",
        "[s0]",
        "lambda: 1",
        "exit()",
    ],
)
def test_anything_else_is_not(expression: str) -> None:
    assert not is_arithmetic(expression)
