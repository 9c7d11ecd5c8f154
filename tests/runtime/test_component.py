"""A bundle behaves as other components of pipelines do: forked, copied, pickled, moved, saved and opened again."""

from __future__ import annotations

import copy
import inspect
import json
import os
import pickle
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, LatteTransformer3DModel, ModelMixin
from huggingface_hub import ModelCard

import dyexport
from dyexport.engines.fake import FakeEngine
from dyexport.errors import BundleError, EngineMismatch, StorageError, UsageError
from dyexport.runtime.pipeline import load
from dyexport.runtime.transformers import DiTBundle, FluxBundle, LatteBundle
from tests.runtime.bundles import TinyBundle, make_inputs, write_bundle
from tests.runtime.conftest import Saved

STANDS_IN = {DiTBundle: DiTTransformer2DModel, FluxBundle: FluxTransformer2DModel, LatteBundle: LatteTransformer3DModel}


def predict(transformer: Any, t: float = 300.0) -> torch.Tensor:
    sample: torch.Tensor = transformer(**make_inputs(2, t=t)).sample
    return sample


# Forked processes


def exit_code_of_fork(work: Callable[[], object], seconds: float = 60.0) -> int | None:
    """What a forked process that does ``work`` ends with: 0, 1 for an exception, None where it hangs."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Stuck(FakeEngine):
    """An engine that waits in ``activate`` until it is let go."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.io, inner.run)
        self.reached, self.go = Event(), Event()

    def activate(self) -> None:
        self.reached.set()
        self.go.wait()
        super().activate()


@contextmanager
def caught_in(engine: Stuck, thread: Thread | None = None) -> Iterator[None]:
    """While another thread is inside ``engine``."""
    if thread is not None:
        thread.start()
    assert engine.reached.wait(60)
    try:
        yield
    finally:
        engine.go.set()
        if thread is not None:
            thread.join()


def assert_draws(transformer: Any, wanted: dict[float, torch.Tensor]) -> None:
    for t, sample in wanted.items():
        torch.testing.assert_close(predict(transformer, t), sample, atol=1e-6, rtol=0)


TIMES = (900.0, 500.0, 100.0)


@pytest.fixture
def wanted(ddpm: TinyBundle) -> dict[float, torch.Tensor]:
    transformer = load(ddpm.root)
    return {t: predict(transformer, t) for t in TIMES}


def test_a_fork_of_a_process_that_has_drawn_draws(ddpm: TinyBundle, wanted: dict[float, torch.Tensor]) -> None:
    transformer = load(ddpm.root)
    assert_draws(transformer, wanted)
    assert exit_code_of_fork(lambda: assert_draws(transformer, wanted)) == 0
    assert_draws(transformer, wanted)


def test_a_fork_while_an_engine_is_made_ready_draws(ddpm: TinyBundle, wanted: dict[float, torch.Tensor]) -> None:
    transformer = load(ddpm.root)
    first, second, third = transformer.engine.engines
    transformer.engine.engines = (first, stuck := Stuck(second), third)
    predict(transformer, 900.0)
    with caught_in(stuck):
        assert exit_code_of_fork(lambda: assert_draws(transformer, wanted)) == 0
    assert_draws(transformer, wanted)


def test_a_fork_while_another_thread_draws_draws(ddpm: TinyBundle, wanted: dict[float, torch.Tensor]) -> None:
    transformer = load(ddpm.root)
    transformer.conditioner.engine = stuck = Stuck(transformer.conditioner.engine)
    with caught_in(stuck, Thread(target=predict, args=(transformer,))):
        assert exit_code_of_fork(lambda: assert_draws(transformer, wanted)) == 0
        assert exit_code_of_fork(lambda: transformer.residency) == 0
        assert exit_code_of_fork(transformer.close) == 0
    assert_draws(transformer, wanted)


def test_a_fork_of_a_fork_draws(ddpm: TinyBundle, wanted: dict[float, torch.Tensor]) -> None:
    transformer = load(ddpm.root)

    def draw_and_fork() -> None:
        assert_draws(transformer, wanted)
        assert exit_code_of_fork(lambda: assert_draws(transformer, wanted)) == 0

    assert exit_code_of_fork(draw_and_fork) == 0


# Copies and pickles


def through_torch_save(transformer: Any) -> Any:
    file = BytesIO()
    torch.save(transformer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda transformer: pickle.loads(pickle.dumps(transformer)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_has_engines_of_its_own(ddpm: TinyBundle, duplicate: Callable[[Any], Any]) -> None:
    transformer = load(ddpm.root, max_resident=2)
    before = predict(transformer)
    again = duplicate(transformer.to(torch.bfloat16))
    assert type(again) is type(transformer)
    assert (again.dtype, again.config, again.engine.max_resident) == (torch.bfloat16, transformer.config, 2)
    assert torch.equal(predict(again), before)
    transformer.close()
    assert again.engine.active
    assert not again.training


def test_a_copy_is_opened_as_the_original_was(ddpm: TinyBundle) -> None:
    dense = load(ddpm.root, dense=True, share_weights=True)
    again = copy.deepcopy(dense)
    assert torch.equal(predict(again), predict(dense))
    assert again.engine.shares_weights
    assert not torch.equal(predict(again), predict(load(ddpm.root)))


def test_a_copy_is_never_of_another_bundle(own: Path) -> None:
    write_bundle(own)
    transformer = load(own)
    pickled = pickle.dumps(transformer)
    shutil.rmtree(own)
    write_bundle(own, segments=2)
    for duplicate in (lambda: copy.deepcopy(transformer), lambda: pickle.loads(pickled)):
        with pytest.raises(BundleError, match="has changed since"):
            duplicate()


def test_another_process_takes_it_as_an_argument(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = pool.submit(predict, transformer).result()
    torch.testing.assert_close(there, predict(transformer), atol=1e-6, rtol=0)


# Where and in what it works


def test_a_relative_path_is_resolved_when_it_is_loaded(
    own: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(own)
    monkeypatch.chdir(own.parent)
    transformer = load(own.name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert predict(transformer).isfinite().all()
    assert predict(copy.deepcopy(transformer)).isfinite().all()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "defaults",
    [
        partial(default_dtype, torch.bfloat16),
        partial(default_dtype, torch.float16),
        partial(default_dtype, torch.float64),
        partial(torch.device, "meta"),
    ],
    ids=["bfloat16", "float16", "float64", "meta"],
)
def test_defaults_of_torch_change_nothing(own: Path, defaults: Callable[[], Any]) -> None:
    write_bundle(own, path="dynamic", capacity=1)
    inputs, transformer = make_inputs(2), load(own)
    wanted = transformer(**inputs).sample
    with defaults():
        for each in (load(own), copy.deepcopy(transformer)):
            assert each.dtype == torch.float32
            assert torch.equal(each(**inputs).sample, wanted)
            assert torch.equal(each(**{**inputs, "timestep": 300.0}).sample, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_its_dtype_is_the_pipelines(ddpm: TinyBundle, dtype: torch.dtype) -> None:
    inputs = make_inputs(2)
    wanted = load(ddpm.root)(**inputs).sample
    for transformer in (load(ddpm.root, dtype=dtype), load(ddpm.root).to(dtype), load(ddpm.root).to("cpu", dtype)):
        assert transformer.dtype == dtype
        assert torch.equal(transformer(**inputs).sample, wanted), "engines compute as before"
        sample = transformer(**{**inputs, "hidden_states": inputs["hidden_states"].to(dtype)}).sample
        assert sample.dtype == dtype
    assert load(ddpm.root).half().dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, "float16", None])
def test_other_dtypes_are_refused(ddpm: TinyBundle, dtype: Any) -> None:
    with pytest.raises(UsageError, match="dtype is"):
        load(ddpm.root, dtype=dtype)


# As diffusers sees it


@pytest.mark.parametrize("name", ["dit", "flux", "latte"])
def test_its_configuration_is_the_stock_modules(name: str, request: pytest.FixtureRequest) -> None:
    saved: Saved = request.getfixturevalue(name)
    transformer = load(saved.bundle)
    stock = STANDS_IN[type(transformer)]
    assert isinstance(transformer, stock)
    wanted = stock.from_pretrained(saved.pipeline / "transformer").config
    public = {key: value for key, value in wanted.items() if not key.startswith("_")}
    assert {key: getattr(transformer.config, key) for key in public} == public
    assert not transformer.training
    assert list(inspect.signature(transformer.forward).parameters) == [
        name for name in inspect.signature(stock.forward).parameters if name != "self"
    ]


@pytest.mark.parametrize(("ours", "stock"), STANDS_IN.items())
def test_its_class_is_equal_to_the_stock_class_and_not_to_others(ours: type, stock: type) -> None:
    assert ours == stock
    assert stock == ours
    assert ours in (stock,)
    assert [each for each in STANDS_IN if each == stock] == [ours]
    assert ours != ModelMixin
    assert {ours: 1, stock: 2}[ours] == 1, "tables keyed by class keep both apart"
    assert getattr(dyexport, ours.__name__) is ours
    assert pickle.loads(pickle.dumps(ours)) is ours


ACTS_ON_NO_LAYER = {
    "attn_processors",
    "cuda",
    "disable_cache",
    "disable_gradient_checkpointing",
    "disable_npu_flash_attention",
    "disable_xformers_memory_efficient_attention",
    "disable_xla_flash_attention",
    "enable_npu_flash_attention",  # these three ask set_use_...
    "enable_xformers_memory_efficient_attention",
    "enable_xla_flash_attention",
    "enable_gradient_checkpointing",  # this _set_gradient_checkpointing
    "float",
    "half",
    "is_cache_enabled",
    "is_gradient_checkpointing",
    "num_parameters",
    "reset_attention_backend",
    "to",
    "unfuse_qkv_projections",
    "push_to_hub",
    "register_for_auto_class",
    "register_to_config",
    "save_config",
    "get_config_dict",
    "load_config",
    "extract_init_dict",
    "config",
    "to_json_string",
    "to_json_file",
}


@pytest.mark.parametrize("ours", STANDS_IN)
def test_every_method_of_the_stock_class_is_ours_or_acts_on_no_layer(ours: type) -> None:
    """What is new in diffusers is looked at here before it meets a module without layers."""
    stock = [base for base in ours.__mro__ if base.__module__.startswith("diffusers.")]
    methods = {
        name
        for base in stock
        for name, value in vars(base).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
    }
    mine = {name for base in ours.__mro__ if base.__module__.startswith("dyexport") for name in vars(base)}
    assert methods - mine - ACTS_ON_NO_LAYER == set()


REFUSED: dict[str, Callable[[Any], object]] = {
    "load_lora_adapter": lambda transformer: transformer.load_lora_adapter("lora.safetensors"),
    "add_adapter": lambda transformer: transformer.add_adapter(None),
    "set_adapters": lambda transformer: transformer.set_adapters(["style"], weights=[0.5]),
    "fuse_lora": lambda transformer: transformer.fuse_lora(lora_scale=0.5),
    "unload_lora": lambda transformer: transformer.unload_lora(),
    "set_attn_processor": lambda transformer: transformer.set_attn_processor(None),
    "fuse_qkv_projections": lambda transformer: transformer.fuse_qkv_projections(),
    "set_attention_backend": lambda transformer: transformer.set_attention_backend("flash"),
    "enable_cache": lambda transformer: transformer.enable_cache(None),
    "enable_layerwise_casting": lambda transformer: transformer.enable_layerwise_casting(torch.float16),
    "enable_group_offload": lambda transformer: transformer.enable_group_offload(torch.device("cpu")),
    "compile_repeated_blocks": lambda transformer: transformer.compile_repeated_blocks(fullgraph=True),
    "load_state_dict": lambda transformer: transformer.load_state_dict({}),
    "from_config": lambda transformer: type(transformer).from_config(transformer.config),
    "from_single_file": lambda transformer: type(transformer).from_single_file("model.safetensors"),
    "train": lambda transformer: transformer.train(),
    "requires_grad_": lambda transformer: transformer.requires_grad_(),
    "gradient_checkpointing": lambda transformer: transformer.enable_gradient_checkpointing(),
    "npu_flash_attention": lambda transformer: transformer.enable_npu_flash_attention(),
    "memory_efficient_attention_xformers": lambda t: t.set_use_memory_efficient_attention_xformers(True),
}


@pytest.mark.parametrize(("name", "call"), REFUSED.items(), ids=REFUSED)
def test_what_needs_layers_is_refused_in_one_sentence(
    ddpm: TinyBundle, name: str, call: Callable[[Any], object]
) -> None:
    with pytest.raises(EngineMismatch, match=rf"^\w*{name} cannot reach .* inside engines; \w+") as error:
        call(load(ddpm.root))
    assert "\n" not in str(error.value)


def test_layers_that_it_does_not_have_are_said_to_be_in_engines(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root)
    assert not hasattr(transformer, "pos_embed")
    with pytest.raises(AttributeError, match=r"DiTBundle has no 'transformer_blocks', since .* inside engines"):
        transformer.transformer_blocks  # noqa: B018


def test_turning_off_what_is_off_does_nothing(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root)
    transformer.disable_gradient_checkpointing()
    transformer.disable_xformers_memory_efficient_attention()
    transformer.reset_attention_backend()
    assert transformer.train(False) is transformer.eval() is transformer.requires_grad_(False)
    assert not transformer.is_gradient_checkpointing


def test_its_footprint_is_what_is_resident(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root)
    assert transformer.get_memory_footprint() == 0
    predict(transformer)
    assert transformer.get_memory_footprint() == transformer.residency.weight_bytes > 0


# Saved and opened again


def test_a_saved_bundle_is_a_bundle_with_a_card(ddpm: TinyBundle, tmp_path: Path) -> None:
    transformer = load(ddpm.root)
    transformer.save_pretrained(tmp_path / "saved", safe_serialization=True, max_shard_size="1GB")
    for again in (load(tmp_path / "saved"), DiTBundle.from_pretrained(tmp_path / "saved")):
        assert torch.equal(predict(again), predict(transformer))
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.library_name == "dyexport"
    assert {"diffusers", "onnx"} <= set(card.data.tags)
    assert "dyexport.load" in card.text
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["_class_name"] == "DiTBundle"
    assert dict(DiTBundle.load_config(tmp_path / "saved"))["sample_size"] == transformer.config.sample_size


def test_saving_again_replaces_the_bundle(ddpm: TinyBundle, flow: TinyBundle, tmp_path: Path) -> None:
    load(flow.root).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "graphs" / "left-over.onnx").touch()
    transformer = load(ddpm.root)
    transformer.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(predict(again), predict(transformer))
    assert not (tmp_path / "saved" / "graphs" / "left-over.onnx").exists()
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(predict(load(tmp_path / "saved")), predict(transformer))


def test_saving_spares_what_is_not_a_bundle(ddpm: TinyBundle, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StorageError, match="not empty and not a bundle"):
        load(ddpm.root).save_pretrained(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_bundle_that_was_built_again_is_not_saved(own: Path, tmp_path: Path) -> None:
    write_bundle(own)
    transformer = load(own)
    other = write_bundle(tmp_path / "other", segments=1)
    for file in sorted(other.root.rglob("*")):
        if file.is_file():
            (own / file.relative_to(other.root)).write_bytes(file.read_bytes())
    with pytest.raises(BundleError, match="changed"):
        transformer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("options", "named"), [({"push_to_hub": True}, "push_to_hub"), ({"half_of_it": True}, "half_of_it")]
)
def test_options_that_would_do_nothing_are_refused(
    ddpm: TinyBundle, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        load(ddpm.root).save_pretrained(tmp_path / "saved", **options)


def test_from_pretrained_takes_what_pipelines_and_load_take(ddpm: TinyBundle, tmp_path: Path) -> None:
    load(ddpm.root).save_pretrained(tmp_path / "pipeline" / "transformer")
    transformer = DiTBundle.from_pretrained(
        tmp_path / "pipeline",
        subfolder="transformer",
        torch_dtype=torch.bfloat16,
        device_map={"": "cpu"},
        low_cpu_mem_usage=True,
        use_safetensors=None,
        max_resident=2,
        dense=True,
    )
    assert (transformer.dtype, transformer.engine.max_resident) == (torch.bfloat16, 2)
    assert torch.equal(predict(transformer), predict(load(ddpm.root, dense=True)))


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"quantization_config": None}, UsageError, "quantization_config"),
        ({"device_map": {"first": "cpu", "second": "cuda"}}, UsageError, "device_map"),
        ({"device_map": "auto"}, UsageError, "'auto'"),
        ({"torch_dtype": torch.int8}, UsageError, "dtype"),
    ],
)
def test_what_from_pretrained_cannot_do(
    ddpm: TinyBundle, arguments: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        DiTBundle.from_pretrained(ddpm.root, **arguments)


def test_a_bundle_of_another_backbone_is_refused(ddpm: TinyBundle) -> None:
    with pytest.raises(BundleError, match="a bundle of dit"):
        FluxBundle.from_pretrained(ddpm.root)


@pytest.fixture
def hub(ddpm: TinyBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub in which ``someone/tiny`` is a bundle; files are links, as the hub's client lays them out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--tiny"
    for number, file in enumerate(sorted(path for path in ddpm.root.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:064x}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(file.read_bytes())
        entry = repository / "snapshots" / commit / file.relative_to(ddpm.root)
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.symlink_to(os.path.relpath(blob, entry.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_a_bundle(hub: Path, ddpm: TinyBundle) -> None:
    wanted = predict(load(ddpm.root))
    assert torch.equal(predict(load("someone/tiny")), wanted)
    assert torch.equal(predict(DiTBundle.from_pretrained("someone/tiny", revision="main", cache_dir=hub)), wanted)


def test_a_saved_hub_bundle_has_its_files(hub: Path, ddpm: TinyBundle, tmp_path: Path) -> None:
    load("someone/tiny").save_pretrained(tmp_path / "saved")
    assert not any(path.is_symlink() for path in (tmp_path / "saved").rglob("*"))
    assert torch.equal(predict(load(tmp_path / "saved")), predict(load(ddpm.root)))


@pytest.mark.parametrize("source", ["someone/nothing", "some--one/..", "no/such/directory", "nothing"])
def test_what_is_neither_directory_nor_repository_is_named(source: str) -> None:
    with pytest.raises(BundleError, match=source):
        load(source)
