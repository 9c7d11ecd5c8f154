"""Sizes, and whole pictures from a prompt, on a bundle that takes both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dyexport.bench.compare import compare
from dyexport.bench.end_to_end import timed_modules
from dyexport.bench.settings import BenchSettings
from dyexport.bench.sizes import check_sizes, spec_at
from dyexport.bundle.reader import Bundle
from dyexport.errors import UsageError
from dyexport.runtime.stock import example_inputs
from tests.pipeline.tiny_pipeline import save_pipeline


def test_a_size_decides_the_tokens_of_packed_latents(flux_tiny: Bundle) -> None:
    spec = spec_at(flux_tiny.manifest.model, (32, 64))
    assert spec.tokens == 2 * 4
    assert spec.latent_shape == (8, flux_tiny.manifest.model.latent_shape[1])
    assert example_inputs(spec, 3, 0.5)["hidden_states"].shape[:2] == (3, 8)


def test_a_size_decides_the_latents_of_frames(latte_tiny: Bundle) -> None:
    model = latte_tiny.manifest.model
    channels, frames, height, width = model.latent_shape
    spec = spec_at(model, (16 * height, 8 * width))
    assert spec.latent_shape == (channels, frames, 2 * height, width)
    assert spec.tokens == 2 * model.tokens


def test_one_size_is_all_that_some_models_have(sit_tiny: Bundle) -> None:
    assert spec_at(sit_tiny.manifest.model, None) == sit_tiny.manifest.model
    with pytest.raises(UsageError, match="--size does nothing here"):
        check_sizes(sit_tiny, ((64, 64),))


def test_a_size_has_room_for_the_kept_tokens(flux_tiny: Bundle) -> None:
    segments = flux_tiny.manifest.plan.segments
    kept = 10_000
    plan = flux_tiny.manifest.plan.model_copy(
        update={
            "segments": tuple(
                segment.model_copy(
                    update={
                        "token_paths": ("capacity",) * segment.depth,
                        "capacities": (kept,) * segment.depth,
                    }
                )
                for segment in segments
            )
        }
    )
    narrow = Bundle(flux_tiny.root, flux_tiny.manifest.model_copy(update={"plan": plan}))
    with pytest.raises(UsageError, match="--size 32x64 makes 8 tokens, and engines of this bundle keep up to 10000"):
        check_sizes(narrow, ((32, 64),))


def test_pictures_are_timed_from_prompt_to_pixels(flux_tiny: Bundle, tmp_path: Path) -> None:
    settings = BenchSettings(
        rounds=1,
        steps=2,
        batches=(1,),
        sizes=((64, 64), (32, 64)),
        compiled=False,
        eager=False,
        pipeline=str(save_pipeline(tmp_path / "pipeline")),
    )
    report = compare(flux_tiny, settings)
    pictures = [row for row in report.rows if row.unit == "pipeline" and row.variant == "dynamic"]
    assert [row.size for row in pictures] == [(64, 64), (32, 64)]
    for row in pictures:
        assert row.parts is not None
        assert row.parts.keys() == {"text_encoder", "text_encoder_2", "vae"}
        assert all(seconds > 0 for seconds in row.parts.values())


@pytest.mark.slow
@pytest.mark.aot_inductor
def test_several_targets_are_timed_in_one_run(sit_tiny_torch: Bundle) -> None:
    settings = BenchSettings(targets=("onnx", "torch"), rounds=1, steps=2, compiled=False, eager=False)
    report = compare(sit_tiny_torch, settings)
    variants = ["dynamic", "dense", "conditioning", "segment 0", "segment 1", "segment 2"]
    for target in ("onnx", "torch"):
        rows = {row.variant: row for row in report.rows if row.target == target}
        assert list(rows) == variants
        assert rows["dynamic"].over_dense is not None
    memory = next(row.memory for row in report.rows if (row.target, row.variant) == ("torch", "dynamic"))
    assert memory is not None
    assert memory.shared_bytes == memory.resident_bytes  # its engines always share
    assert report.switch_overhead.keys() == {"onnx", "torch"}


def test_forward_passes_are_timed_inside_the_context_alone() -> None:
    module, now = torch.nn.Linear(2, 2), iter(range(100))
    with timed_modules({"part": module}, lambda: float(next(now))) as seconds:
        module(torch.zeros(1, 2))
        module(torch.zeros(1, 2))
    module(torch.zeros(1, 2))
    assert seconds == {"part": 2.0}
    assert next(now) == 4
