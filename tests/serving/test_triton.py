"""Models in a real Triton server draw what their bundles draw, alone and in batches, and say what is wrong."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from dyexport.bundle.reader import Bundle
from dyexport.runtime.loading import load
from dyexport.runtime.prompts import open_pipeline
from dyexport.runtime.sampling import open_vae, sample
from dyexport.serving.triton_repository import Deployment, deploy
from tests.engines.tiny import CHANNELS, CLASSES, SIZE
from tests.pipeline.tiny_pipeline import save_pipeline
from tests.runtime.bundles import TinyBundle, write_bundle
from tests.serving.server import Server, inputs

pytestmark = pytest.mark.triton
STEPS = 5


class Models(NamedTuple):
    """Pixels of both objectives, latents with and without a VAE, and pictures from prompts."""

    ddpm: TinyBundle
    flow: TinyBundle
    latents: TinyBundle
    flux: Bundle
    vae: Path
    pipeline: Path


@pytest.fixture(scope="module")
def models(flux_tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    vae = AutoencoderKL(latent_channels=CHANNELS, block_out_channels=(32,), norm_num_groups=8)
    vae.save_pretrained(root / "vae")
    return Models(
        ddpm=write_bundle(root / "ddpm"),
        flow=write_bundle(root / "flow", objective="flow"),
        latents=write_bundle(root / "latents", pixels=False),
        flux=flux_tiny,
        vae=root / "vae",
        pipeline=save_pipeline(root / "pipeline"),
    )


@pytest.fixture(scope="module")
def server(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    repository = root / "repository"
    for name, bundle, parts in (
        ("ddpm", models.ddpm.root, {"max_steps": 20}),
        ("flow-0.5", models.flow.root, {"instances": 2}),
        ("decoded", models.latents.root, {"vae": str(models.vae)}),
        ("flux", models.flux.root, {"pipeline": str(models.pipeline), "max_batch": 4}),
        ("damaged", models.ddpm.root, {}),
        ("edited", models.ddpm.root, {"max_steps": 7}),
    ):
        deploy(Deployment(bundle=bundle, repository=repository, name=name, **parts))
    damage(repository / "damaged/1/bundle/graphs/weights.bin")
    config = repository / "edited/config.pbtxt"
    config.write_text(config.read_text().replace('"7"', '"seven"'))
    running = Server(repository, root / "log")
    yield running
    running.close()


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()  # a name of the bundle's own file
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def drawn(server: Server, model: str, output: str = "image", **values: Any) -> np.ndarray:
    found: np.ndarray = server.client.infer(model, inputs(**values)).as_numpy(output)
    return found


def expected(bundle: TinyBundle, labels: list[int], seeds: list[int], **settings: Any) -> np.ndarray:
    """Return the pixels of ``sample`` in 8 bits, colors last."""
    pixels = sample(load(bundle.root), bundle.spec, labels, seed=seeds, **{"steps": STEPS, **settings})
    return eight_bits(pixels)


def eight_bits(pixels: torch.Tensor) -> np.ndarray:
    return np.rint(255 * pixels.numpy()).astype(int).transpose(0, 2, 3, 1)


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Require equality within one level: other samples of a batch change how sums are rounded."""
    assert found.dtype == np.uint8
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("model", ["ddpm", "flow-0.5"])
def test_pictures_are_the_bundles(server: Server, models: Models, model: str) -> None:
    bundle = models.flow if model == "flow-0.5" else models.ddpm
    labels, seeds = [1, 3, 0], [5, 6, 7]
    found = drawn(server, model, label=labels, seed=seeds, steps=[STEPS] * 3, guidance=[3.0] * 3)
    wanted = expected(bundle, labels, seeds, guidance_scale=3.0)
    assert wanted.std() > 5
    assert_same(found, wanted)


def test_a_picture_depends_on_its_seed_and_not_on_its_company(server: Server) -> None:
    alone = drawn(server, "ddpm", label=2, seed=11, steps=STEPS)
    batched = drawn(server, "ddpm", label=[0, 2, 2], seed=[3, 11, 12], steps=[STEPS] * 3)
    assert_same(batched[1:2], alone)
    assert np.abs(batched[2].astype(int) - alone[0]).max() > 10


def test_a_seed_that_was_not_asked_for_is_told(server: Server) -> None:
    answers = [server.client.infer("ddpm", inputs(label=2, steps=STEPS)) for _ in range(2)]
    seeds = [int(answer.as_numpy("seed")[0, 0]) for answer in answers]
    assert seeds[0] != seeds[1]
    again = drawn(server, "ddpm", label=2, seed=seeds[0], steps=STEPS)
    assert_same(again, answers[0].as_numpy("image"))


def test_what_is_left_out_is_the_models_own(server: Server, models: Models) -> None:
    found = drawn(server, "flow-0.5", label=1, seed=4)
    assert_same(found, expected(models.flow, [1], [4], steps=50, guidance_scale=1.5))


def test_a_vae_makes_pictures_of_latents(server: Server, models: Models) -> None:
    found = drawn(server, "decoded", label=[1, 2], seed=[8, 9], steps=[STEPS] * 2)
    latents = sample(
        load(models.latents.root), models.latents.spec, [1, 2], steps=STEPS, seed=[8, 9], guidance_scale=1.5
    )
    vae = open_vae(str(models.vae))
    with torch.no_grad():
        wanted = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert found.shape == (2, SIZE, SIZE, 3)
    assert_same(found, eight_bits(wanted))


def test_prompts_are_drawn_as_the_stock_pipeline_draws_them(server: Server, models: Models) -> None:
    words, seeds = ["a cat", "the moon"], [1, 2]
    settings = {"steps": [2] * 2, "guidance": [2.0] * 2, "height": [64] * 2, "width": [96] * 2}
    found = drawn(server, "flux", prompt=[word.encode() for word in words], seed=seeds, **settings)
    pipe = open_pipeline(load(models.flux.root), str(models.pipeline))
    wanted = pipe(
        words,
        num_inference_steps=2,
        guidance_scale=2.0,
        height=64,
        width=96,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    assert found.shape == (2, 64, 96, 3)
    assert wanted.std() > 0.01
    assert_same(found, np.rint(255 * wanted).astype(int))


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        ("ddpm", {"label": CLASSES}, f"label is {CLASSES}; this model has classes 0 to {CLASSES - 1}"),
        ("ddpm", {"label": 1, "steps": 21}, "steps is 21; this server takes 1 to 20"),
        ("ddpm", {"seed": 1}, "label is missing"),
        ("ddpm", {"steps": 2, "guidance": 1.0}, "label is missing"),
        ("ddpm", {"label": 1, "guidance": float("inf")}, "guidance is inf"),
        ("flux", {"seed": 1}, "prompt is missing"),
        ("flux", {"prompt": b"a" * 10_000_000}, "prompt has 10000000 bytes; this server takes up to 4000"),
        ("flux", {"prompt": [b"a"] * 5}, "batch-size must be <= 4"),
        ("flux", {"prompt": b"a", "height": 100}, "height is 100; give a multiple of 16"),
        ("flux", {"prompt": b"a", "height": 8192}, "8192 x 1024 are 8388608 pixels"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(server: Server, model: str, values: dict[str, Any], message: str) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match=message):
        server.client.infer(model, inputs(**values))
    assert server.ready(model)


def test_requests_at_once_share_batches_and_a_bad_one_spoils_none(server: Server) -> None:
    from tritonclient.utils import InferenceServerException

    labels = [0, 1, 2, CLASSES, 3, 1, 2, 3]
    before = server.statistics("decoded")
    waiting = [server.client.async_infer("decoded", inputs(label=label, seed=7, steps=100)) for label in labels]
    for label, one in zip(labels, waiting, strict=True):
        if label == CLASSES:
            with pytest.raises(InferenceServerException, match=f"label is {CLASSES}"):
                one.get_result()
        else:
            assert_same(one.get_result().as_numpy("image"), drawn(server, "decoded", label=label, seed=7, steps=100))
    after = server.statistics("decoded")
    done, batches = (after[name] - before[name] for name in ("inference_count", "execution_count"))
    assert batches < done


def test_drawing_ends_when_nobody_waits_any_more(server: Server) -> None:
    grpc = pytest.importorskip("tritonclient.grpc")
    client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc}")
    answered, drawn_before = threading.Event(), server.statistics("flux")["inference_stats"]["success"]["count"]
    call = client.async_infer(
        "flux", inputs(grpc, prompt=b"a cat", seed=1, steps=100), callback=lambda result, error: answered.set()
    )
    time.sleep(0.5)  # until it is under way
    call.cancel()
    assert answered.wait(60)
    while "cancelled after step" not in server.said:
        assert not server.statistics("flux")["inference_stats"]["success"]["count"] > drawn_before
        time.sleep(0.1)
    client.close()


def test_drawing_ends_when_the_time_of_a_request_is_over(server: Server) -> None:
    """A server that answers over HTTP cannot tell that a client hung up: this is how a client says when it will."""
    from tritonclient.utils import InferenceServerException

    asked = inputs(prompt=b"a cat", seed=1, steps=100)
    with pytest.raises(InferenceServerException, match=r"out of time (before it was drawn|after step \d+ of 100)"):
        server.client.infer("flux", asked, timeout=300_000)  # microseconds
    assert drawn(server, "flux", prompt=b"a cat", seed=1, steps=1).shape[0] == 1


def test_a_server_that_polls_loads_a_model_once(models: Models, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    deploy(Deployment(bundle=models.ddpm.root, repository=repository, name="ddpm"))
    server = Server(repository, tmp_path / "log", polling=True)
    try:
        assert server.ready("ddpm")
        drawn(server, "ddpm", label=1, steps=1)
        time.sleep(4)  # some polls
        assert server.said.count("loading: ddpm:1") == 1
        deploy(Deployment(bundle=models.ddpm.root, repository=repository, name="ddpm", max_steps=3))
        while server.said.count("successfully loaded 'ddpm'") < 2:
            assert server.process.poll() is None
            time.sleep(0.2)
        assert server.said.count("loading: ddpm:1") == 2
        assert ".partial" not in server.said
    finally:
        server.close()


def test_a_model_that_cannot_draw_is_not_ready(server: Server) -> None:
    assert [server.ready(model) for model in ("ddpm", "damaged", "edited")] == [True, False, False]
    assert "does not match its hash; copy the bundle again, or build it again" in server.said
    assert "parameters of config.pbtxt: max_steps: Input should be a valid integer" in server.said


def test_a_server_that_garbles_tensors_is_found_out(models: Models, tmp_path: Path) -> None:
    """The environment that tests run in has numpy 2, with which this server does not work."""
    assert int(np.__version__.partition(".")[0]) >= 2
    deploy(Deployment(bundle=models.ddpm.root, repository=tmp_path / "models", name="ddpm"))
    server = Server(tmp_path / "models", tmp_path / "log", environment=Path(sys.prefix))
    try:
        assert not server.ready("ddpm")
        assert "garbles tensors with numpy 2" in server.said
    finally:
        server.close()
