"""What the stock module takes gives its result; everything else is refused by the name that the caller knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dyexport.backbones.flux.stand_in import FluxBundle
from dyexport.errors import EngineMismatchError
from dyexport.runtime.loading import load
from dyexport.runtime.transformer import BundleTransformer
from tests.engines.tiny import CLASSES
from tests.runtime.bundles import TinyBundle, make_inputs
from tests.runtime.conftest import Saved
from tests.runtime.masked import Masked

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def labels(ddpm: TinyBundle) -> BundleTransformer:
    """A bundle that draws from class labels."""
    return load(ddpm.root)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([-1, 3]),
        torch.tensor([3, -11]),
        torch.tensor([-(CLASSES + 1), 3]),
        torch.tensor([3, CLASSES + 1]),
        torch.tensor([999, 3]),
        torch.tensor([1001, 3]),
        torch.tensor([3.7, 3.0]),
        torch.tensor([3.0, 3.0]),
        torch.tensor([NAN, 3.0]),
        torch.tensor([True, False]),
        torch.tensor([3, 4], dtype=torch.uint8),
        torch.tensor([3 + 0j, 4]),
        torch.tensor([[3], [4]]),
        torch.tensor([3, 4, 5]),
        torch.tensor([], dtype=torch.int64),
        [3, 4],
        3,
        "cat",
    ],
    ids=str,
)
def test_labels_that_no_class_has_are_refused(labels: BundleTransformer, wrong: Any) -> None:
    with pytest.raises(EngineMismatchError, match="class_labels"):
        labels(**{**make_inputs(2), "class_labels": wrong})


@pytest.mark.parametrize(
    "form",
    [
        {"class_labels": torch.tensor([3, 3], dtype=torch.int32)},
        {"class_labels": torch.tensor([3])},
        {"class_labels": torch.tensor(3)},
        {"timestep": torch.tensor([300.0])},
        {"timestep": torch.tensor(300)},
        {"timestep": 300},
        {"timestep": torch.tensor([300.0, 300.0], dtype=torch.float64)},
        {"cross_attention_kwargs": {}},
        {"cross_attention_kwargs": {"scale": 1.0}},
        {"cross_attention_kwargs": {"scale": torch.tensor([1.0, 1.0])}},
        {"cross_attention_kwargs": {"scale": None}},
    ],
    ids=str,
)
def test_labels_and_timesteps_in_other_forms(ddpm: TinyBundle, labels: BundleTransformer, form: dict[str, Any]) -> None:
    inputs = {**make_inputs(2), "class_labels": torch.tensor([3, 3])}
    torch.testing.assert_close(labels(**{**inputs, **form}).sample, ddpm(**inputs).sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "one", [("hidden_states",), ("class_labels", "timestep"), ("hidden_states", "timestep"), ("class_labels",)]
)
def test_one_sample_stands_for_all(dit: Saved, one: tuple[str, ...]) -> None:
    inputs = {
        "hidden_states": torch.randn(2, 2, 8, 8),
        "timestep": torch.full((2,), 400.0),
        "class_labels": torch.tensor([3, 7]),
    }
    given = {name: value[:1] if name in one else value for name, value in inputs.items()}
    drawn, truth = load(dit.bundle)(**given).sample, Masked(dit.bundle)(**given).sample
    assert drawn.shape == (2, 4, 8, 8)
    torch.testing.assert_close(drawn, truth, atol=1e-4, rtol=0)


WRONG_TIMESTEPS = [NAN, INF, -INF, torch.tensor([300.0, NAN]), torch.tensor([True, True]), torch.tensor([]), "now", 1j]


@pytest.mark.parametrize("wrong", WRONG_TIMESTEPS, ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_timesteps_that_are_no_number_are_refused(ddpm: TinyBundle, dense: bool, wrong: Any) -> None:
    with pytest.raises(EngineMismatchError, match="timestep"):
        load(ddpm.root, dense=dense)(**{**make_inputs(2), "timestep": wrong})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_states": None}, "hidden_states must be .* is None"),
        ({"hidden_states": torch.zeros(2, 2, 2)}, r"hidden_states must be .* \[2, 2, 2\]"),
        ({"hidden_states": torch.zeros(2, 2, 2, 2, dtype=torch.int64)}, "hidden_states must be .* int64"),
        ({"hidden_states": torch.zeros(0, 2, 2, 2)}, "hidden_states is empty"),
        ({"hidden_states": torch.zeros(3, 2, 2, 2)}, "class_labels is for 2 samples, hidden_states for 3"),
        ({"hidden_states": torch.zeros(2, 3, 2, 2)}, "hidden_states must have shape"),
        ({"timestep": torch.full((3,), 5.0)}, "timestep is for 3 samples, hidden_states for 2"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs"),
        ({"cross_attention_kwargs": {"ip_hidden_states": []}}, "cross_attention_kwargs .*ip_hidden_states"),
    ],
)
def test_inputs_of_another_shape_are_named(labels: BundleTransformer, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(EngineMismatchError, match=named):
        labels(**{**make_inputs(2), **changes})


@pytest.mark.parametrize("name", ["hidden_states", "encoder_hidden_states", "pooled_projections"])
def test_gradients_are_refused_where_they_would_be_lost(loaded: FluxBundle, name: str) -> None:
    inputs = flux_inputs()
    wanted = loaded(**inputs).sample
    inputs[name].requires_grad_()
    with pytest.raises(EngineMismatchError, match=f"{name} requires a gradient"):
        loaded(**inputs)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, wanted)


# FLUX


@pytest.fixture(scope="module")
def loaded(flux: Saved) -> FluxBundle:
    transformer = load(flux.bundle)
    assert isinstance(transformer, FluxBundle)
    return transformer


def flux_inputs() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 9, 16, generator=draw),
        "encoder_hidden_states": torch.randn(2, 4, 64, generator=draw),
        "pooled_projections": torch.randn(2, 32, generator=draw),
        "timestep": torch.full((2,), 0.5),
        "img_ids": torch.arange(27.0).reshape(9, 3) % 5,
        "txt_ids": torch.zeros(4, 3),
        "guidance": torch.full((2,), 3.5),
    }


BATCHED = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
FORMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **{f"one {name}": lambda given, name=name: {name: given[name][:1]} for name in BATCHED},
    "one of all but latents and text": lambda given: {name: given[name][:1] for name in BATCHED[2:]},
    "one of all but pooled": lambda given: {name: given[name][:1] for name in BATCHED if name != BATCHED[2]},
    "whole positions": lambda given: {name: given[name].long() for name in ("img_ids", "txt_ids")},
    "half positions": lambda given: {"img_ids": given["img_ids"].half()},
    "large whole positions with half ones": lambda given: {
        "img_ids": given["img_ids"].long() * 1001,
        "txt_ids": given["txt_ids"].half(),
    },
    "strides": lambda given: {"hidden_states": given["hidden_states"].transpose(0, 1).contiguous().transpose(0, 1)},
    "whole guidance": lambda given: {"guidance": torch.tensor([3, 3])},
    "double": lambda given: {"pooled_projections": given["pooled_projections"].double()},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_the_stock_module_takes_gives_its_result(
    flux: Saved, loaded: FluxBundle, form: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    given = {**flux_inputs(), **form(flux_inputs())}
    floats = {name: value.float() if value.dtype == torch.float64 else value for name, value in given.items()}
    with torch.no_grad():
        truth = Masked(flux.bundle).model(floats).sample
    torch.testing.assert_close(loaded(**given).sample, truth, atol=1e-4, rtol=0)


def test_a_number_is_a_guidance_for_all(loaded: FluxBundle) -> None:
    given = flux_inputs()
    for guidance in (3.5, torch.tensor(3.5), torch.tensor([3.5], dtype=torch.bfloat16)):
        assert torch.equal(loaded(**{**given, "guidance": guidance}).sample, loaded(**given).sample)
    assert not torch.equal(loaded(**{**given, "guidance": 1.0}).sample, loaded(**given).sample)


def test_arguments_without_content_are_taken(loaded: FluxBundle) -> None:
    nothing = {
        "joint_attention_kwargs": {"scale": 1.0, "ip_adapter_image_embeds": None, "ip_hidden_states": None},
        "controlnet_block_samples": None,
        "controlnet_single_block_samples": [],
        "controlnet_blocks_repeat": False,
    }
    assert torch.equal(loaded(**flux_inputs(), **nothing).sample, loaded(**flux_inputs()).sample)


ZEROS = torch.zeros


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"guidance": NAN}, "guidance is nan"),
        ({"guidance": torch.tensor([3.5, INF])}, "guidance is inf"),
        ({"guidance": 1e38}, "guidance is 1e\\+38"),
        ({"guidance": torch.full((3,), 3.5)}, "guidance is for 3 samples, hidden_states for 2"),
        ({"guidance": "strong"}, "guidance must be a number or a tensor of them, is 'strong'$"),
        ({"guidance": None}, "guidance"),
        ({"timestep": None}, "timestep"),
        ({"timestep": NAN}, "timestep is nan"),
        ({"timestep": torch.tensor([0.5, 0.6])}, "same timestep"),
        ({"hidden_states": ZEROS(0, 9, 16)}, "hidden_states is empty"),
        ({"hidden_states": ZEROS(2, 0, 16)}, "hidden_states is empty"),
        ({"hidden_states": ZEROS(9, 16)}, "hidden_states must be"),
        ({"hidden_states": ZEROS(2, 9, 15)}, "hidden_states must have shape"),
        ({"encoder_hidden_states": ZEROS(2, 0, 64)}, "encoder_hidden_states is empty"),
        ({"encoder_hidden_states": ZEROS(3, 4, 64)}, "encoder_hidden_states is for 3 samples"),
        ({"encoder_hidden_states": ZEROS(2, 4, 63)}, "encoder_hidden_states must have shape"),
        ({"encoder_hidden_states": None}, "encoder_hidden_states must be"),
        ({"pooled_projections": ZEROS(3, 32)}, "pooled_projections is for 3 samples"),
        ({"pooled_projections": ZEROS(2, 31)}, "pooled_projections must have shape"),
        ({"pooled_projections": ZEROS(2, 4, 32)}, "pooled_projections must be"),
        ({"img_ids": ZEROS(8, 3)}, "img_ids must have shape"),
        ({"img_ids": ZEROS(9, 2)}, "img_ids must have shape"),
        ({"img_ids": None}, "img_ids must be"),
        ({"txt_ids": ZEROS(5, 3)}, "txt_ids must have shape"),
        ({"txt_ids": ZEROS(0, 4, 3)}, "txt_ids must be"),
        ({"joint_attention_kwargs": {"scale": 0.5}}, "scale"),
        ({"joint_attention_kwargs": {"scale": torch.tensor([1.0, 0.5])}}, "joint_attention_kwargs .*scale"),
        ({"joint_attention_kwargs": {"scale": "half"}}, r"joint_attention_kwargs\['scale'\] must be .* is 'half'"),
        ({"joint_attention_kwargs": {"scale": None, 3: 4, "mask": 5}}, r"joint_attention_kwargs \['3', 'mask'\]"),
        ({"joint_attention_kwargs": 5}, "joint_attention_kwargs must be a dict or None, is 5"),
        ({"joint_attention_kwargs": torch.ones(2)}, r"joint_attention_kwargs must be .* float32 of shape \[2\]"),
        ({"joint_attention_kwargs": {"ip_adapter_image_embeds": []}}, "ip_adapter_image_embeds"),
        ({"controlnet_block_samples": [ZEROS(2, 9, 32)]}, "controlnet_block_samples"),
        ({"controlnet_single_block_samples": (ZEROS(2, 9, 32),)}, "controlnet_single_block_samples"),
        ({"controlnet_blocks_repeat": True}, "controlnet_blocks_repeat"),
    ],
)
def test_what_no_engine_was_built_for_is_refused_by_name(
    loaded: FluxBundle, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(EngineMismatchError, match=named) as error:
        loaded(**{**flux_inputs(), **changes})
    assert "modulation" not in str(error.value)


# Latte


def latte_inputs() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 4, 4, 4, 4, generator=draw),
        "timestep": torch.full((2,), 400.0),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=draw),
    }


@pytest.mark.parametrize("one", ["hidden_states", "timestep", "encoder_hidden_states"])
def test_one_video_or_text_stands_for_all(latte: Saved, one: str) -> None:
    inputs = latte_inputs()
    repeated = {**inputs, one: inputs[one][:1].repeat(2, *[1] * (inputs[one].ndim - 1))}
    drawn = load(latte.bundle)(**{**inputs, one: inputs[one][:1]}).sample
    torch.testing.assert_close(drawn, Masked(latte.bundle)(**repeated).sample, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"encoder_attention_mask": torch.ones(2, 5)}, "encoder_attention_mask"),
        ({"enable_temporal_attentions": False}, "enable_temporal_attentions"),
        ({"encoder_hidden_states": torch.zeros(3, 5, 32)}, "encoder_hidden_states is for 3 samples"),
        ({"encoder_hidden_states": torch.zeros(2, 0, 32)}, "encoder_hidden_states is empty"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 31)}, "encoder_hidden_states must have shape"),
        ({"hidden_states": torch.zeros(2, 4, 0, 4, 4)}, "hidden_states is empty"),
        ({"hidden_states": torch.zeros(2, 4, 4, 4)}, "hidden_states must be"),
        ({"hidden_states": torch.zeros(2, 3, 4, 4, 4)}, "hidden_states must have shape"),
        ({"timestep": NAN}, "timestep is nan"),
    ],
)
def test_what_latte_was_not_built_for_is_refused_by_name(latte: Saved, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(EngineMismatchError, match=named):
        load(latte.bundle)(**{**latte_inputs(), **changes})
