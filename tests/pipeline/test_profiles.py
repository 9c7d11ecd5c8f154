"""Sizes that TensorRT is asked to build for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dyexport.bundle.plan import TokenPath
from dyexport.bundle.plan_info import Profile
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.compilation.settings import CompileSettings
from dyexport.errors import UsageError
from dyexport.exporters.tensorrt_profiles import (
    TensorrtSettings,
    check_profiles,
    largest_topk,
    parse_profiles,
    plan_request,
    profiles_for,
)
from dyexport.pipeline.golden import BATCH, golden_preset
from dyexport.presets import get_preset
from dyexport.slicing.slicer import slice_conditioning, slice_segment, spec_of
from tests.exporters.networks import ONE_BLOCK_EACH, half_width, slice_context
from tests.pipeline.tiny import TINY


def test_profiles_are_the_models_own_sizes_unless_given() -> None:
    flux = get_preset("flux")
    spec = spec_of(flux, flux.transformer_config())
    usual = profiles_for(spec, half_width(flux, "masked"), ())[0]
    assert usual["image_tokens"] == Profile(min=16, opt=4096, max=4096)
    assert usual["text_tokens"].max == 512
    assert usual["batch"] == Profile(min=1, opt=2, max=8)
    limited = profiles_for(spec, half_width(flux, "capacity"), parse_profiles(("batch=1:1:1",)))[0]
    assert limited["image_tokens"].min == 3072
    assert limited["batch"].max == 1
    with pytest.raises(UsageError, match="'pixels'; flux has batch"):
        check_profiles(spec, [half_width(flux, "masked")], TensorrtSettings(profiles=("pixels=1:2:3",)))


def test_a_dimension_of_some_networks_is_taken() -> None:
    """Slots are those of segments with the dynamic path alone; conditioning has none, and is built without."""
    preset = get_preset("sit-digits")
    spec = spec_of(preset, preset.transformer_config())
    segments = [half_width(preset, "masked"), half_width(preset, "dynamic")]
    settings = TensorrtSettings(profiles=("slots=4:4:16,rows=1:2:2",))
    check_profiles(spec, segments, settings)
    given = parse_profiles(settings.profiles)
    masked, dynamic, conditioning = (profiles_for(spec, segment, given)[0] for segment in (*segments, None))
    assert dynamic["slots"] == Profile(min=4, opt=4, max=16)
    assert "slots" not in masked.keys() | conditioning.keys()
    with pytest.raises(UsageError, match="'slots'; sit-digits has batch"):
        check_profiles(spec, segments[:1], settings)


def test_a_dimension_of_one_budget_is_taken(sit_tiny: Bundle) -> None:
    plan = sit_tiny.manifest.plan
    settings = CompileSettings(targets=("tensorrt-rtx",), tensorrt=TensorrtSettings(profiles=("slots=4:4:16",)))
    masked, dynamic = (
        sit_tiny.manifest.model_copy(update={"plan": plan.model_copy(update={"segments": (half_width(TINY, path),)})})
        for path in ("masked", "dynamic")
    )
    settings.check_for([masked, dynamic])
    with pytest.raises(UsageError, match="'slots'; sit-tiny has batch"):
        settings.check_for([masked])


@pytest.mark.parametrize("name", ["flux", "qwen-image", "latte"])
@pytest.mark.parametrize("path", ["masked", "capacity"])
def test_a_plan_takes_golden_inputs(name: str, path: TokenPath) -> None:
    preset = get_preset(name)
    segment = half_width(preset, path)
    profiles = profiles_for(spec_of(preset, preset.transformer_config()), segment, ())[0]
    golden = golden_preset(preset, [segment])
    sizes = {"text_tokens": golden.text_tokens, "image_tokens": golden.tokens, "batch": BATCH}
    sizes |= {"height": golden.latent_shape[-2] // 2, "width": golden.latent_shape[-1] // 2}
    assert all(profiles[size].min <= sizes[size] <= profiles[size].max for size in profiles.keys() & sizes.keys())


@pytest.mark.parametrize("text", ["batch", "batch=", "batch=2:1:3", "batch=0:1:2", "batch=1:2", "=1"])
def test_what_is_not_a_profile(text: str) -> None:
    with pytest.raises(UsageError, match="MIN:OPT:MAX"):
        parse_profiles((text,))


def test_video_sizes() -> None:
    latte = get_preset("latte-tiny")
    spec: ModelSpec = spec_of(latte, latte.transformer_config())
    profiles = profiles_for(spec, half_width(latte, "masked"), ())[0]
    assert {"frames", "height", "width", "text_tokens", "batch"} <= profiles.keys()
    assert profiles["frames"].max == spec.frames


def test_flux_counts_text_among_the_tokens_of_single_blocks() -> None:
    flux = replace(ONE_BLOCK_EACH, name="flux")
    context = slice_context(flux)
    segment = half_width(flux, "capacity").model_copy(update={"capacities": (3500, 3500)})
    blocks = slice_segment(context, segment).module.blocks
    assert [block.sizes.tokens.use_topk for block in blocks] == [True, False]
    profiles = profiles_for(context.spec, segment, ())
    assert largest_topk(context.spec, segment, profiles) == 3500
    fewer = segment.model_copy(update={"capacities": (3000, 3000)})
    assert largest_topk(context.spec, fewer, profiles) == 3512
    more_text = profiles_for(context.spec, segment, parse_profiles(("text_tokens=1:512:1024",)))
    assert largest_topk(context.spec, fewer, more_text) == 4024, "which the gate refuses"


def test_a_plan_is_asked_for_as_the_build_was() -> None:
    context = slice_context(get_preset("sit-digits"))
    piece = slice_conditioning(context)
    settings = TensorrtSettings(stream_weights=True, compute_capabilities=("8.9",))
    request = plan_request(settings, "tensorrt-rtx", context.spec, None, piece.inputs)
    assert (request.flavour, request.stream_weights, request.compute_capabilities) == ("tensorrt-rtx", True, ("8.9",))
    assert request.inputs == piece.inputs
