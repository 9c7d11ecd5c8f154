"""Bundles that earlier versions built still load, and sample what they sampled then."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import dyexport

FOLDER = Path(__file__).parent


def test_a_bundle_of_schema_3_gives_the_outputs_of_the_version_that_built_it() -> None:
    """``schema-3`` was built by commit 0785b3f from random weights, and run by it."""
    recorded = load_file(FOLDER / "schema-3-outputs.safetensors")
    transformer = dyexport.load(FOLDER / "schema-3")
    latents, labels = recorded["hidden_states"], torch.tensor([3, 10])  # (B, C, H, W), (B,)
    for t, expected in zip(recorded["timesteps"].tolist(), recorded["samples"], strict=True):
        output = transformer(hidden_states=latents, timestep=t, class_labels=labels).sample  # (B, C, H, W)
        assert (output - expected).abs().max() <= 1e-6
