"""A bundle stands in for the transformer: same output at every t, in stock pipelines and from many threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

import dyexport
from dyexport.bundle.manifest import CONDITIONING, DENSE, DENSE_CONDITIONING, EngineRecord
from dyexport.bundle.manifest_file import MANIFEST, read_manifest
from dyexport.bundle.tables import WidthTable
from dyexport.compilation.api import compile_engines
from dyexport.engines.fake import FakeEngine
from dyexport.errors import BundleError, EngineBuildError, EngineMismatchError, UsageError
from dyexport.runtime.loading import BundleTransformer, load
from tests.engines.tiny import CLASSES, Store, modulate, reference, write_conditioning_onnx
from tests.manifests import forge
from tests.runtime.bundles import TinyBundle, make_inputs, write_bundle, write_manifest


def predict(transformer: object, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return transformer(**inputs).sample  # type: ignore[operator]


def random_times(bundle: TinyBundle, count: int) -> list[float]:
    low, high = bundle.spec.timestep_range
    return [*np.random.uniform(low, high, count), low, high, *bundle.widths.grid]


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_equals_the_masked_network_at_every_t(objective: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(objective)
    transformer = load(bundle.root)
    for t in random_times(bundle, 32):
        inputs = make_inputs(2, t=t, seed=int(t))
        torch.testing.assert_close(predict(transformer, inputs), predict(bundle, inputs), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("segments", "path", "capacity"), [(1, "all", 8), (6, "masked", 8), (3, "dynamic", 1)])
def test_every_kind_of_bundle(own: Path, segments: int, path: str, capacity: int) -> None:
    bundle = write_bundle(own, segments=segments, path=path, capacity=capacity)
    transformer = load(own, share_weights=True, max_resident=2)
    for t in random_times(bundle, 4):
        inputs = make_inputs(2, t=t)
        torch.testing.assert_close(predict(transformer, inputs), predict(bundle, inputs), atol=1e-4, rtol=0)


def test_a_target_that_cannot_allocate_by_data_is_refused(own: Path) -> None:
    write_bundle(own, segments=2, path="compact", capacity=8)
    refused = "skips tokens on the path 'compact', .* onnx-rtx cannot; .*--token-path dynamic, or use target 'onnx'"
    with pytest.raises(EngineMismatchError, match=refused):
        load(own, target="onnx-rtx")
    with pytest.raises(EngineBuildError, match="onnx-rtx cannot"):
        compile_engines(own, "onnx-rtx")


def test_a_flipped_gate_changes_the_output(own: Path) -> None:
    bundle = write_bundle(own, segments=1)
    inputs = make_inputs(2, t=10.0)
    before = predict(load(own), inputs)
    heads = bundle.widths.heads.copy()
    unit = int(np.flatnonzero(heads[0, 0])[-1])
    heads[0, 0, unit] = False
    WidthTable(grid=bundle.widths.grid, end=1000.0, heads=heads, groups=bundle.widths.groups).save(
        own / "calibration/widths.safetensors"
    )
    write_manifest(own, bundle.spec, bundle.plan, list(read_manifest(own / MANIFEST).engines))
    assert (predict(load(own), inputs) - before).abs().max() > 1e-3


def test_dense_is_the_network_with_every_unit(ddpm: TinyBundle) -> None:
    on = np.ones_like(ddpm.widths.heads[0]), np.ones_like(ddpm.widths.groups[0])
    transformer = load(ddpm.root, dense=True)
    for t in (0.0, 700.0):
        inputs = make_inputs(3, t=t)
        modulation = modulate(ddpm.weights, inputs["timestep"], inputs["class_labels"])
        wanted = reference(ddpm.weights, {**inputs, "modulation": modulation}, *on)["sample"]
        torch.testing.assert_close(predict(transformer, inputs), wanted, atol=1e-4, rtol=0)


def test_dense_has_a_conditioning_of_its_own_where_it_is_built_with_one(own: Path) -> None:
    bundle = write_bundle(own)
    inputs = make_inputs(2)
    before = {dense: predict(load(own, dense=dense), inputs) for dense in (False, True)}
    other = replace(bundle.weights, classes=bundle.weights.classes + 1)
    write_conditioning_onnx(own / "graphs/own.onnx", other, Store(own / "graphs/own.bin"))
    engines = read_manifest(own / MANIFEST).engines
    record = EngineRecord(target="onnx", network=DENSE_CONDITIONING, path="graphs/own.onnx")
    write_manifest(own, bundle.spec, bundle.plan, [*engines, record])
    assert torch.equal(predict(load(own), inputs), before[False])
    on = np.ones_like(bundle.widths.heads[0]), np.ones_like(bundle.widths.groups[0])
    modulation = modulate(other, inputs["timestep"], inputs["class_labels"])
    wanted = reference(other, {**inputs, "modulation": modulation}, *on)["sample"]
    dense = predict(load(own, dense=True), inputs)
    torch.testing.assert_close(dense, wanted, atol=1e-4, rtol=0)
    assert (dense - before[True]).abs().max() > 0.1


def test_a_trajectory_is_conditioned_at_once(ddpm: TinyBundle) -> None:
    """The second picture's steps are known from the first one's."""
    transformer = load(ddpm.root)
    inner = transformer.conditioner.engine
    transformer.conditioner.engine = engine = FakeEngine(inner.io, inner.run)
    for label, runs in ((3, 4), (5, 5)):
        for t in (900.0, 600.0, 300.0, 0.0):
            inputs = {**make_inputs(2, t=t), "class_labels": torch.tensor([label, CLASSES])}
            torch.testing.assert_close(predict(transformer, inputs), predict(ddpm, inputs), atol=1e-4, rtol=0)
        assert engine.runs == runs


def test_signature_is_that_of_the_diffusers_transformer(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root)
    latents, labels = torch.randn(2, 2, 2, 2), torch.tensor([1, 2])
    output = transformer(latents, timestep=torch.tensor(5), class_labels=labels, cross_attention_kwargs=None)
    assert isinstance(output, Transformer2DModelOutput)
    (sample,) = transformer(latents, torch.tensor([5, 5]), labels, return_dict=False)
    assert torch.equal(output.sample, sample)
    assert transformer.config.sample_size == 2
    assert transformer.config.num_embeds_ada_norm == CLASSES
    assert (transformer.dtype, transformer.device) == (torch.float32, torch.device("cpu"))
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 0
    assert transformer(latents.half(), 5, labels).sample.dtype == torch.float16


def test_classes_that_the_configuration_contradicts_are_refused(own: Path) -> None:
    written = write_bundle(own)
    engines = list(read_manifest(own / MANIFEST).engines)
    write_manifest(own, written.spec.model_copy(update={"classes": 3}), written.plan, engines)
    with pytest.raises(BundleError, match=f"tiny has 3 classes and {CLASSES} in its configuration"):
        load(own)


def test_loading_touches_no_weights(ddpm: TinyBundle) -> None:
    transformer = dyexport.load(ddpm.root)
    engines = (transformer.engine, transformer.conditioner.engine)
    assert not any(engine.active for engine in engines)
    predict(transformer, make_inputs(1))
    assert all(engine.active for engine in engines)
    transformer.close()
    assert not any(engine.active for engine in engines)
    predict(transformer, make_inputs(1))


def test_stock_null_class_is_the_models_own(ddpm: TinyBundle) -> None:
    inputs = make_inputs(2)
    stock = {**inputs, "class_labels": torch.tensor([1000, 3])}
    ours = {**inputs, "class_labels": torch.tensor([CLASSES, 3])}
    transformer = load(ddpm.root)
    assert torch.equal(predict(transformer, stock), predict(transformer, ours))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"timestep": torch.tensor([3, 500])}, "3, 500"),
        ({"timestep": torch.tensor(1001)}, "1001"),
        ({"timestep": None}, "timestep"),
        ({"class_labels": None}, "class_labels"),
        ({"class_labels": torch.tensor([1, CLASSES + 1])}, "conditioning"),
        ({"hidden_states": torch.zeros(2, 2, 4, 4)}, "hidden_states"),
    ],
)
def test_inputs_that_do_not_fit(ddpm: TinyBundle, changes: dict[str, torch.Tensor], named: str) -> None:
    transformer = load(ddpm.root)
    with pytest.raises(EngineMismatchError, match=named):
        predict(transformer, {**make_inputs(2), **changes})
    predict(transformer, make_inputs(2))


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"target": "nonsense"}, UsageError, "known: onnx"),
        ({"max_resident": 0}, UsageError, "max_resident"),
        ({"max_resident": -1}, UsageError, "max_resident is -1"),
        ({"max_resident": 1.5}, UsageError, r"max_resident is 1\.5"),
        ({"max_resident": True}, UsageError, "max_resident is True"),
        ({"max_resident": "2"}, UsageError, "max_resident is 2"),
        ({"memory": float("nan")}, UsageError, "memory is nan"),
        ({"memory": 1e12}, UsageError, "memory is 1000000000000.0"),
        ({"memory": -1}, UsageError, "memory is -1"),
        ({"memory": 10**30}, UsageError, "memory is 1000"),
        ({"memory": "9" * 400}, UsageError, "not a size"),
        ({"device": "tpu"}, UsageError, "tpu"),
        ({"device": 0}, UsageError, "unknown device '0'"),
        ({"device": "cuda:9999"}, UsageError, "torch sees"),
        ({"device": "cuda:99999999999999999999"}, UsageError, "unknown device"),
        ({"target": "tensorrt"}, EngineMismatchError, "built for onnx"),
    ],
)
def test_arguments_that_do_not_fit(ddpm: TinyBundle, arguments: dict[str, object], error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        load(ddpm.root, **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to run on")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_a_device_that_is_not_there_is_refused_by_name(ddpm: TinyBundle, device: str | torch.device) -> None:
    with pytest.raises(UsageError, match=rf"device is '{device}' and torch sees 0 CUDA devices"):
        load(ddpm.root, device=device)


def test_a_device_of_torch_counts(ddpm: TinyBundle) -> None:
    assert load(ddpm.root, device=torch.device("cpu")).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("network", "kinds"), [("segment-00", [False]), (DENSE, [True]), (CONDITIONING, [False, True])]
)
def test_a_missing_engine_is_named(own: Path, network: str, kinds: list[bool]) -> None:
    """Only by those who need it: ``kinds`` of bundle, dense or not."""
    bundle = write_bundle(own)
    engines = read_manifest(own / MANIFEST).engines
    write_manifest(own, bundle.spec, bundle.plan, [engine for engine in engines if engine.network != network])
    for dense in (False, True):
        with pytest.raises(BundleError, match=f"'{network}'") if dense in kinds else nullcontext():
            load(own, dense=dense)


def test_code_is_never_loaded_unhashed(own: Path) -> None:
    bundle = write_bundle(own)
    program = own / "engines/program.pt2"
    program.parent.mkdir()
    program.write_bytes(b"code")
    engines = read_manifest(own / MANIFEST).engines
    compiled = EngineRecord(target="torch-tensorrt", network="segment-00", path="engines/program.pt2")
    write_manifest(own, bundle.spec, bundle.plan, [*engines, compiled])
    program.write_bytes(b"c0de")
    load(own, check_hashes=False)
    with pytest.raises(BundleError, match=r"program\.pt2"):
        load(own, target="torch-tensorrt", check_hashes=False)


def test_residency_counts_bytes_and_switches(own: Path) -> None:
    write_bundle(own, segments=3)
    transformer = load(own, max_resident=1)
    for t in (900.0, 800.0, 500.0, 100.0, 900.0):
        predict(transformer, make_inputs(1, t=t))
    residency = transformer.residency
    assert [(switch.source, switch.target, switch.count) for switch in residency.switches] == [
        (None, 2, 1),
        (2, 1, 1),
        (1, 0, 1),
        (0, 2, 1),
    ]
    assert [engine.active for engine in residency.engines] == [False, False, True]
    assert [engine.activations for engine in residency.engines] == [1, 1, 2]
    assert residency.weight_bytes == residency.engines[2].weight_bytes > 0
    assert 0 < residency.switch_overhead < 1
    assert residency.run_seconds > 0
    assert all(engine.activation_seconds > 0 for engine in residency.engines)
    assert not transformer.conditioner.engine.active, "where engines may not all stay, it leaves as soon as it has run"
    transformer.close()
    assert transformer.residency.weight_bytes == 0


def test_residency_counts_the_conditioning(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root)
    predict(transformer, make_inputs(1))
    transformer.engine.close()
    spans = transformer.conditioner.engine.weights
    assert transformer.residency.weight_bytes == sum(span.length for span in spans) == ddpm.weights.classes.nbytes


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_the_next_engine_is_ready_when_sampling_reaches_it(objective: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(objective)
    transformer = load(bundle.root, max_resident=2)
    end = bundle.spec.timestep_range[1]
    walk = (0.9, 0.5, 0.1) if objective == "ddpm" else (0.1, 0.5, 0.9)
    for share in walk:
        predict(transformer, make_inputs(1, t=end * share))
        transformer.engine._settle()
        assert sum(engine.active for engine in transformer.engine.engines) == 2
    assert [engine.activations for engine in transformer.residency.engines] == [1, 1, 1]


def test_overflow_is_counted_where_capacity_is_less_than_wanted(own: Path) -> None:
    bundle = write_bundle(own, path="capacity", capacity=3)
    transformer = load(own)
    inputs = make_inputs(4, t=100.0)
    kept = bundle(**inputs).kept_tokens
    predict(transformer, inputs)
    predict(transformer, inputs)
    overflow = transformer.overflow
    assert overflow.routed == 2 * kept.numel()
    assert overflow.over == 2 * int((kept > 3).sum()) > 0
    assert overflow.dropped == 2 * int((kept - 3).clamp(min=0).sum())
    assert overflow.rate == overflow.over / overflow.routed


def test_no_capacity_no_overflow(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root)
    predict(transformer, make_inputs(4))
    assert (transformer.overflow.routed, transformer.overflow.rate) == (0, 0.0)


def test_calls_from_many_threads(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root, max_resident=1)
    cases = [make_inputs(1 + seed % 3, t=float(150 * (seed % 7)), seed=seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as threads:
        outputs = list(threads.map(lambda inputs: predict(transformer, inputs), cases))
    for inputs, output in zip(cases, outputs, strict=True):
        torch.testing.assert_close(output, predict(ddpm, inputs), atol=1e-4, rtol=0)
    assert sum(engine.active for engine in transformer.engine.engines) == 1


@pytest.mark.parametrize("offload", [accelerate.cpu_offload_with_hook, accelerate.cpu_offload])
def test_offloading_passes_over_it(ddpm: TinyBundle, offload: object) -> None:
    transformer = load(ddpm.root)
    inputs = make_inputs(2)
    before = predict(transformer, inputs)
    offload(transformer, "cpu")  # type: ignore[operator]
    assert torch.equal(predict(transformer, inputs), before)


def test_moving_and_casting_pass_over_it(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root)
    moved = transformer.to("cpu", torch.float16).eval().requires_grad_(False)
    assert moved is transformer
    assert isinstance(moved, BundleTransformer)
    assert predict(moved, make_inputs(1)).dtype == torch.float32


def test_a_damaged_bundle_does_not_load(own: Path) -> None:
    write_bundle(own)
    forge(own, lambda manifest: manifest.update(schema_version=99))
    with pytest.raises(BundleError, match="schema 99"):
        load(own)
