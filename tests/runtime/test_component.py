"""A bundle is a component of pipelines: its class, configuration and dtype, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, LatteTransformer3DModel, ModelMixin

import dyexport
from dyexport.backbones.dit.stand_in import DiTBundle
from dyexport.backbones.flux.stand_in import FluxBundle
from dyexport.backbones.latte.stand_in import LatteBundle
from dyexport.errors import EngineMismatchError, UsageError
from dyexport.runtime.loading import load
from tests.runtime.bundles import TinyBundle, make_inputs, predict, write_bundle
from tests.runtime.conftest import Saved

STANDS_IN = {DiTBundle: DiTTransformer2DModel, FluxBundle: FluxTransformer2DModel, LatteBundle: LatteTransformer3DModel}


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
    "compile": lambda transformer: transformer.compile(backend="eager"),
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
    with pytest.raises(EngineMismatchError, match=rf"^\w*{name} cannot reach .* inside engines; \w+") as error:
        call(load(ddpm.root))
    assert "\n" not in str(error.value)


def test_layers_that_it_does_not_have_are_said_to_be_in_engines(ddpm: TinyBundle) -> None:
    transformer = load(ddpm.root)
    assert not hasattr(transformer, "pos_embed")
    with pytest.raises(AttributeError, match=r"DiTBundle has no 'transformer_blocks', since .* inside engines"):
        transformer.transformer_blocks  # noqa: B018


def test_compiling_it_passes_it_by(ddpm: TinyBundle) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    transformer = load(ddpm.root)
    compiled = torch.compile(transformer, backend=keep)
    for t in (900.0, 500.0, 100.0):
        assert torch.equal(predict(compiled, t), predict(transformer, t))
    assert not graphs
    inputs = make_inputs(2)
    doubled = torch.compile(lambda: transformer(**inputs).sample * 2, backend=keep)
    assert torch.equal(doubled(), transformer(**inputs).sample * 2)
    assert len(graphs) == 1, "what is around it is compiled"


def test_it_is_no_part_of_one_graph(ddpm: TinyBundle) -> None:
    compiled = torch.compile(load(ddpm.root), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the layers of a bundle are inside engines"):
        predict(compiled)


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
