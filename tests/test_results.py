"""Lines that build commands print about quality."""

from __future__ import annotations

from pathlib import Path

import pytest

from dyexport.commands.results import error_line, untrained_line
from dyexport.commands.stages import recipe_line
from dyexport.pipeline.settings import BuildSettings
from dyexport.pipeline.training_cost import trainable


@pytest.mark.parametrize(
    ("routers", "error", "warned"), [("none", 0.02, True), ("none", 0.001, False), ("trained", 0.02, False)]
)
def test_a_network_that_was_cut_too_far_without_training_is_reported(routers: str, error: float, warned: bool) -> None:
    line = untrained_line({"recipe": {"routers": routers}, "output_relative_mse": error})
    assert (line is not None) == warned
    if line is not None:
        assert "0.0200" in line
        assert "raise --budget" in line


def test_the_error_before_repair_is_shown() -> None:
    assert error_line({"output_relative_mse": 0.02})[1] == "0.0200 (relative MSE)"
    assert "0.1500 before" in error_line({"output_relative_mse": 0.02, "unrepaired_relative_mse": 0.15})[1]


def test_the_recipe_tells_what_is_trained_before_it_starts(tmp_path: Path) -> None:
    places = {"out": tmp_path / "b", "work": tmp_path / "w", "budget": 0.5, "model": "flux-tiny"}
    settings = BuildSettings(**places, data="synthetic")
    line = recipe_line(settings.effective_recipe(), counted := trainable(settings))
    share = 100 * counted["trainable_share"]
    assert f"trained {counted['trainable_parameters']:,.0f} parameters ({share:.2f} % of full" in line
    assert "compact token routers" in line
    untrained = BuildSettings(**places, finetune_steps=0)
    assert "token routers" not in recipe_line(untrained.effective_recipe(), trainable(untrained))
