"""What a server draws from a version's folder, without a server: latents, and an end that comes early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dyexport.bundle.reader import Bundle
from dyexport.errors import DyexportError
from dyexport.runtime.loading import load
from dyexport.runtime.sampling import sample
from dyexport.serving.config import ServedModelConfig
from dyexport.serving.requests import Request, Settings
from dyexport.serving.samplers import Sampler, open_sampler
from dyexport.serving.triton_repository import Deployment, deploy
from tests.pipeline.tiny_pipeline import save_latte_pipeline
from tests.runtime.bundles import TinyBundle, write_bundle

SETTINGS = Settings(steps=5, guidance=1.5)
REQUESTS = [
    Request(labels_or_prompts=(1, 2), seeds=(8, 9), settings=SETTINGS),
    Request(labels_or_prompts=(3,), seeds=(4,), settings=SETTINGS),
]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return write_bundle(tmp_path_factory.mktemp("latents") / "bundle", pixels=False)


@pytest.fixture
def sampler(latents: TinyBundle, tmp_path: Path) -> Sampler:
    deployment = Deployment(bundle=latents.root, repository=tmp_path, name="latents", scheduler="dpm++")
    return open_sampler(deploy(deployment) / "1", ServedModelConfig(scheduler="dpm++"), "cpu")


def test_without_a_vae_latents_come_back(sampler: Sampler, latents: TinyBundle) -> None:
    found = sampler.sample(REQUESTS, lambda: None)
    settings = {"steps": 5, "seed": [8, 9, 4], "scheduler": "dpm++", "guidance_scale": 1.5}
    wanted = sample(load(latents.root), latents.spec, [1, 2, 3], **settings)
    assert sampler.output.name == "latents"
    assert sampler.output.dims == wanted.shape[1:]
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


def test_it_may_end_after_any_step(sampler: Sampler) -> None:
    steps = []

    def after_step() -> None:
        steps.append(len(steps))
        if len(steps) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        sampler.sample(REQUESTS, after_step)
    assert len(steps) == 3
    assert sampler.sample(REQUESTS, lambda: None).shape == (3, *sampler.output.dims)


def test_a_server_draws_no_more_steps_than_it_may(latents: TinyBundle, tmp_path: Path) -> None:
    folder = deploy(Deployment(bundle=latents.root, repository=tmp_path, name="latents", max_steps=7)) / "1"
    assert open_sampler(folder, ServedModelConfig(max_steps=7), "cpu").parser.defaults.steps == 7
    assert open_sampler(folder, ServedModelConfig(), "cpu").parser.defaults.steps == 50


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU that the target may run on")
def test_a_server_runs_its_target_or_nothing(latents: TinyBundle, tmp_path: Path) -> None:
    folder = deploy(Deployment(bundle=latents.root, repository=tmp_path, name="latents")) / "1"
    with pytest.raises(DyexportError, match="TensorRT-RTX"):
        open_sampler(folder, ServedModelConfig(target="onnx-rtx"), "cpu").sample(REQUESTS, lambda: None)


def test_a_video_for_each_prompt(latte_tiny: Bundle, tmp_path: Path) -> None:
    pipeline = str(save_latte_pipeline(tmp_path / "pipeline"))
    deployment = Deployment(
        bundle=latte_tiny.root, repository=tmp_path / "models", name="latte", pipeline=pipeline, max_batch=2
    )
    model = deploy(deployment)
    assert not (model / "1/pipeline/transformer").exists()
    assert (
        'output [ { name: "video" data_type: TYPE_UINT8 dims: [ -1, -1, -1, -1 ] } ]'
        in (model / "config.pbtxt").read_text()
    )
    sampler = open_sampler(model / "1", ServedModelConfig(pipeline="pipeline"), "cpu")
    usual = sampler.parser.defaults
    assert (usual.height, usual.width) == (64, 64)
    settings = replace(usual, steps=2)
    requests = [
        Request(labels_or_prompts=(word,), seeds=(seed,), settings=settings)
        for word, seed in (("a cat", 3), ("moon", 4))
    ]
    both = sampler.sample(requests, lambda: None)
    alone = sampler.sample(requests[1:], lambda: None)
    assert both.shape == (2, 4, 64, 64, 3)
    assert both.dtype == np.uint8
    assert np.abs(both[1:].astype(int) - alone).max() <= 1
    assert np.abs(both[0].astype(int) - both[1]).max() > 10
