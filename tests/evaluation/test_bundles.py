"""Bundles of every kind are evaluated; scores are computed again from samples, independently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dyexport.bundle.reader import Bundle
from dyexport.digits import load_digits
from dyexport.errors import DataError
from dyexport.evaluation.evaluate import evaluate
from dyexport.evaluation.extractors.digits import trained_classifier
from dyexport.evaluation.report import EvalReport, PairedScores
from dyexport.evaluation.samplers import SEED_STRIDE, RandomPromptSampler
from dyexport.evaluation.settings import EvalSettings, SamplingConfig
from dyexport.runtime.loading import load
from dyexport.runtime.prompt_settings import Prompts
from dyexport.runtime.prompts import sample_prompts
from dyexport.runtime.sampling import decode, open_vae, sample
from dyexport.runtime.stock import stock_class
from tests.evaluation import frechet
from tests.evaluation.networks import Means, save_clip, save_script
from tests.factories import tiny_preset
from tests.pipeline.tiny_pipeline import save_dit_pipeline, save_pipeline
from tests.runtime.bundles import write_bundle

pytestmark = pytest.mark.build

STEPS = 3


def settings_of(samples: int, **values: object) -> EvalSettings:
    return EvalSettings(sampling=SamplingConfig(samples=samples, steps=STEPS), **values)  # type: ignore[arg-type]


def both(bundle: Bundle) -> Iterator[object]:
    """The dense network and the dynamic one."""
    for dense in (True, False):
        with closing(load(bundle.root, dense=dense, check_hashes=False)) as transformer:
            yield transformer


def psnr(left: np.ndarray, right: np.ndarray, data_range: float) -> np.ndarray:
    errors = np.square(left.astype(np.float64) - right).reshape(len(left), -1).mean(axis=1)
    values: np.ndarray = 10 * np.log10(data_range**2 / errors)
    return values


def check_pairs(paired: PairedScores | None, dense: np.ndarray, dynamic: np.ndarray, data_range: float) -> None:
    assert paired is not None
    expected = psnr(dynamic, dense, data_range)
    assert (paired.pairs, paired.equal) == (len(dense), 0)
    assert paired.data_range == pytest.approx(data_range)
    assert (paired.psnr, paired.psnr_lowest) == pytest.approx((expected.mean(), expected.min()), rel=1e-4)


def check_drift(report: EvalReport, dense: np.ndarray, dynamic: np.ndarray) -> None:
    """The last step's latents are the samples."""
    dense, dynamic = (values.reshape(len(values), -1).astype(np.float64) for values in (dense, dynamic))
    distances = np.linalg.norm(dynamic - dense, axis=1) / np.linalg.norm(dense, axis=1)
    assert report.drift is not None
    assert len(report.drift.mean) == STEPS
    assert report.drift.mean[-1] == pytest.approx(distances.mean(), rel=1e-3)
    assert report.drift.largest[-1] == pytest.approx(distances.max(), rel=1e-3)


def test_digits_are_scored_against_digits(sit_tiny: Bundle) -> None:
    spec, labels = sit_tiny.manifest.model, [*range(10), 0, 1]
    report = evaluate(sit_tiny, settings_of(12, seeds=(0, 2), subset=12))
    latents = spec.model_copy(update={"pixel_space": False})
    reference = trained_classifier().features(load_digits("train").pictures)
    raw = []
    for model, scores in zip(both(sit_tiny), report.models, strict=True):
        for seed, measured in zip((0, 2), scores.seeds, strict=True):
            values = sample(model, latents, labels, steps=STEPS, guidance_scale=1.0, seed=seed * SEED_STRIDE).numpy()
            pictures = np.clip(values / 2 + 0.5, 0, 1)
            accuracy = (trained_classifier().classes(pictures) == labels).mean()
            expected = frechet.frechet_distance(trained_classifier().features(pictures), reference)
            assert (measured.seed, measured.class_accuracy) == (seed, pytest.approx(accuracy))
            assert measured.frechet == pytest.approx(expected, rel=1e-3)
            assert measured.kernel is not None
            raw.append(values)
    dense, dynamic = raw[0], raw[2]  # of the first seed
    check_drift(report, dense, dynamic)
    check_pairs(report.paired, *(np.clip(values / 2 + 0.5, 0, 1) for values in (dense, dynamic)), 1.0)
    assert (report.unit, report.conditions, report.features, report.reference_samples) == (
        "pixels",
        "labels",
        "digits",
        len(reference),
    )
    assert [warning.partition(":")[0] for warning in report.warnings] == ["the Frechet distance is biased"]


def test_latents_are_decoded_and_scored_against_a_folder(dit_tiny: Bundle, tmp_path: Path) -> None:
    spec = dit_tiny.manifest.model
    vae = str(save_dit_pipeline(tmp_path / "pipeline", tiny_preset("dit")) / "vae")
    means = str(save_script(Means(), tmp_path / "means.pt"))
    real = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "real").mkdir()
    for index, picture in enumerate(real):
        Image.fromarray(picture).save(tmp_path / "real" / f"{index}.png")
    chosen = {"vae": vae, "features": means, "classifier": means, "real": str(tmp_path / "real")}
    report = evaluate(dit_tiny, settings_of(5, **chosen))
    features = Means()(torch.from_numpy(real).movedim(-1, 1) / 255).numpy().astype(np.float64)
    labels = [0, 2, 4, 6, 8]
    with closing(load(dit_tiny.root, check_hashes=False)) as model:
        pictures = decode(open_vae(vae), sample(model, spec, labels, steps=STEPS, guidance_scale=1.0, seed=0))
    own = Means()(pictures)
    (scores,) = report.models
    assert scores.model == "dynamic"
    assert scores.frechet == pytest.approx(frechet.frechet_distance(own.double().numpy(), features), rel=1e-3)
    assert scores.class_accuracy == (own.argmax(dim=1).numpy() == labels).mean()
    assert scores.kernel is None
    assert (report.unit, report.features, report.frechet_real) == ("pixels", "means.pt", None)
    assert any("the kernel distance is left out: 5 samples are fewer" in warning for warning in report.warnings)
    assert not any("resized" in warning for warning in report.warnings)


def test_latents_without_a_vae_are_scored_as_they_are(tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "bundle", segments=2, pixels=False)
    bundle, spec = Bundle.open(written.root), written.spec
    real = torch.randn(9, *spec.latent_shape, generator=torch.Generator().manual_seed(0))
    save_file({"latents": real}, tmp_path / "real.safetensors")
    report = evaluate(bundle, settings_of(4, real=str(tmp_path / "real.safetensors")))
    labels = [row % spec.classes if spec.classes <= 4 else row * spec.classes // 4 for row in range(4)]
    samples = [sample(model, spec, labels, steps=STEPS, guidance_scale=1.0, seed=0).numpy() for model in both(bundle)]
    for values, scores in zip(samples, report.models, strict=True):
        expected = frechet.frechet_distance(values.reshape(4, -1).astype(np.float64), real.flatten(1).double().numpy())
        assert scores.frechet == pytest.approx(expected, rel=1e-3)
        assert scores.class_accuracy is None
    check_drift(report, *samples)
    check_pairs(report.paired, *samples, float(samples[0].max() - samples[0].min()))
    assert (report.unit, report.features) == ("latents", "latents, flattened")
    save_file({"features": torch.randn(9, 5)}, tmp_path / "real.safetensors")
    with pytest.raises(DataError, match=r"has 5 features of each picture, and latents, flattened computes \d+"):
        evaluate(bundle, settings_of(4, real=str(tmp_path / "real.safetensors")))


def test_pictures_are_scored_against_their_prompts(flux_tiny: Bundle, tmp_path: Path) -> None:
    from dyexport.evaluation.clip import ClipScore

    spec = flux_tiny.manifest.model
    pipeline, clip = str(save_pipeline(tmp_path / "pipeline")), str(save_clip(tmp_path / "clip"))
    stock_class(spec)(**spec.config).save_pretrained(tmp_path / "control")
    chosen = {"pipeline": pipeline, "clip": clip, "prompts": ("a cat", "rain"), "size": (32, 64)}
    report = evaluate(flux_tiny, settings_of(3, control=tmp_path / "control", **chosen))
    texts = ("a cat", "rain", "a cat")
    alone = [
        Prompts(texts=(text,), pipeline=pipeline, steps=STEPS, height=32, width=64, seed=(index,))
        for index, text in enumerate(texts)
    ]
    pictures = []
    for model in both(flux_tiny):
        pictures.append(torch.cat([sample_prompts(model, prompts).values for prompts in alone]))  # type: ignore[arg-type]
    assert [scores.model for scores in report.models] == ["dense", "control", "dynamic"]
    for values, scores in zip(pictures, (report.models[0], report.models[2]), strict=True):
        assert values.shape == (3, 3, 32, 64)
        assert scores.clip == pytest.approx(float(ClipScore(clip)(values, texts).mean()), rel=1e-3, abs=1e-3)
    check_pairs(report.paired, *(values.numpy() for values in pictures), 1.0)
    assert (report.unit, report.conditions, report.size) == ("pixels", "prompts", (32, 64))


def test_videos_without_text_encoders_are_compared_as_latents(latte_tiny: Bundle) -> None:
    spec, settings = latte_tiny.manifest.model, settings_of(2)
    report = evaluate(latte_tiny, settings)
    sampler = RandomPromptSampler(spec, settings.complete(spec))
    samples = []
    for model in both(latte_tiny):
        rows = [sampler(model, range(row, row + 1), 0).values for row in range(2)]
        samples.append(torch.cat(rows).numpy())  # (B, C, F, H, W)
    check_drift(report, *samples)
    frames = [values.swapaxes(1, 2).reshape(-1, *values.shape[1:2], *values.shape[3:]) for values in samples]
    check_pairs(report.paired, *frames, float(samples[0].max() - samples[0].min()))
    assert (report.unit, report.conditions) == ("latents", "random embeddings")
    assert any("say nothing about pictures: give --pipeline" in warning for warning in report.warnings)


def test_a_bundle_without_the_dense_network_has_nothing_to_compare_with(qwen_image_tiny: Bundle) -> None:
    report = evaluate(qwen_image_tiny, settings_of(2))
    assert [scores.model for scores in report.models] == ["dynamic"]
    assert (report.paired, report.drift, report.samples) == (None, None, 2)
    assert any("no dense network" in warning for warning in report.warnings)
