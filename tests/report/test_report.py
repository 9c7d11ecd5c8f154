"""The page says what the bundle's manifest and the files of measurements say, and needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyexport.bundle.reader import Bundle
from dyexport.errors import DataError, UsageError
from dyexport.evaluation.report import SeedScores
from dyexport.report.figures.drift import drift_chart
from dyexport.report.figures.quality import quality_chart
from dyexport.report.measurements import read_bench, read_eval
from dyexport.report.trajectory import trajectory_of
from dyexport.runtime.loading import load
from dyexport.samples import sample
from tests.report.conftest import STEPS, Page, command, parsed
from tests.report.measured import eval_of, write_bench, write_eval
from tests.runtime.bundles import write_bundle
from tests.test_runtime_only import without

SECTIONS = (
    "Pictures",
    "Widths over t and depth",
    "Tokens",
    "Engines of a trajectory",
    "Cost, speed and quality",
    "Layers and bytes",
    "Verification and environment",
)


def test_sections_are_in_order(page: Page) -> None:
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", page.html) == list(SECTIONS)


def test_figures_at_the_top_are_those_of_the_bundle(page: Page) -> None:
    plan = page.bundle.manifest.plan
    assert f"FLOPs ratio {plan.flops_ratio:.3f} of the dense attention" in page.text
    assert f"{plan.network_flops_ratio:.3f} of the whole network" in page.text
    assert f"{plan.executed_flops_ratio:.3f} as the engines run" in page.text
    assert "Speed-up 3.25x over its own dense network; target onnx, batch 2, on CPU X" in page.text
    error = float(page.printed["figures"]["Largest error"])
    assert 0 < error <= 1e-4
    assert page.printed["figures"]["FLOPs ratio"] == f"{plan.flops_ratio:.3f}"
    assert page.printed["verified"] is True
    assert page.printed["missing"] == {}
    assert page.printed["bytes"] == page.path.stat().st_size


def test_tables_are_those_of_the_manifest(page: Page) -> None:
    manifest = page.bundle.manifest
    heads = page.bundle.widths.heads.shape[-1]
    for index, segment in enumerate(manifest.plan.segments):
        share = sum(map(len, segment.heads)) / page.bundle.widths.heads[0].size
        span = segment.end - segment.start
        assert f"{index} {segment.start:.4g} to {segment.end:.4g} {span:.0%} {share:.0%}" in page.text
    for block in range(manifest.plan.segments[0].depth):
        counts = [len(segment.heads[block]) for segment in manifest.plan.segments]
        shown = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(min(counts))
        assert re.search(rf"\b{block} \d+% {shown} of {heads} ", page.text)
    total = sum(record.bytes for record in manifest.files.values())
    assert f"all files {len(manifest.files)} {total / 1000:.3g} kB" in page.text


def test_steps_are_counted_by_engine(page: Page) -> None:
    manifest = page.bundle.manifest
    served = [step.segment for step in trajectory_of(manifest.model, manifest.plan, STEPS).steps]
    for index in range(len(manifest.plan.segments)):
        first, last = served.index(index) + 1, STEPS - served[::-1].index(index)
        assert f"{index} {first} to {last} {served.count(index)} of {STEPS} " in page.text


def test_measurements_are_those_of_the_files(page: Page) -> None:
    assert "the dense network 8 ms" in page.html
    assert "dynamic: 30 MB; dense: 20 MB" in page.html
    assert "dense: Frechet distance 0.150; dynamic: Frechet distance 0.400" in page.html
    assert "1800 samples of each network, 2 seeds" in page.text
    assert "the distance is 20.0% in the mean, 30.0% at most" in page.html
    assert "Finished pixels: PSNR 31.5 dB, SSIM 0.970." in page.text
    assert "the fan was loud" in page.text
    assert "few samples" in page.text
    assert "Measured on device CPU X (cpu)" in page.text


def pictures_of(html: str, network: str) -> np.ndarray:
    """Return the pictures of one network: (B, H, W) or (B, H, W, C)."""
    uris = re.findall(rf"<img src=\"data:image/png;base64,([^\"]+)\" alt=\"[^\"]*, {network} network", html)
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(uri)))) for uri in uris])


@pytest.mark.parametrize(("network", "dense"), [("dynamic", False), ("dense", True)])
def test_pictures_are_those_of_sample(page: Page, network: str, dense: bool) -> None:
    assert page.printed["samples"] == 3
    assert [f"class {index}, seed {4 + index}" in page.text for index in range(3)] == [True] * 3
    transformer = load(page.bundle.root, dense=dense)
    expected = sample(transformer, labels=[0, 1, 2], steps=STEPS, seed=[4, 5, 6]).values.numpy()  # (B, 1, H, W)
    assert (pictures_of(page.html, network) == np.rint(expected[:, 0] * 255)).all()
    assert "false color" not in page.text


@pytest.fixture(scope="module")
def latent_page(dit_tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report of a bundle of latents, without dense network, measurements and verification."""
    out = tmp_path_factory.mktemp("latents") / "page.html"
    code, _, err = command("report", dit_tiny.root, "--samples", 2, "--steps", 2, "--no-verify", "-o", out)
    assert code == 0, err
    return out.read_text(encoding="utf-8")


def test_latents_are_shown_in_false_color_and_the_caption_says_so(latent_page: str, dit_tiny: Bundle) -> None:
    pictures = pictures_of(latent_page, "dynamic")
    assert pictures.shape == (2, *dit_tiny.manifest.model.latent_shape[1:], 3)
    assert len(np.unique(pictures)) > 16
    assert "latents in false color" in latent_page
    assert "The bundle has no dense network" in latent_page


def test_what_is_missing_is_named(latent_page: str) -> None:
    assert "Latency and memory: not measured." in latent_page
    assert "Quality: not measured." in latent_page
    assert "Not compared: skipped by --no-verify." in latent_page


def test_without_samples_the_statistics_of_tokens_are_shown(sit_tiny: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "a.html"
    code, printed, err = command("report", sit_tiny.root, "--no-samples", "--no-verify", "-o", out, "--json")
    assert code == 0, err
    assert json.loads(printed)["samples"] == 0
    html = out.read_text(encoding="utf-8")
    assert "Nothing was sampled" in html
    assert "Tokens kept" in html
    assert 'id="token-picture"' not in html


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    found = parsed(page.html)
    assert {link.partition(":")[0] if ":" in link else link[0] for link in found.links} == {"data", "#"}
    assert "<script" not in page.html
    assert not re.search(r"url\((?!#)|@import", page.html)


def test_identifiers_are_unique_and_references_lead_somewhere(page: Page) -> None:
    found = parsed(page.html)
    assert len(found.ids) == len(set(found.ids))
    references = {link[1:] for link in found.links if link.startswith("#")}
    assert references | set(re.findall(r"url\(#([^)]+)\)", page.html)) <= set(found.ids)
    assert references


def test_every_picture_is_described(page: Page) -> None:
    assert all('alt="' in tag for tag in re.findall(r"<img [^>]*>", page.html))
    for tag in re.findall(r"<svg [^>]*>", page.html):
        assert 'aria-label="' in tag or 'aria-hidden="true"' in tag


def test_measurements_are_read_as_they_were_written(sit_tiny: Bundle, tmp_path: Path) -> None:
    written = write_bench(sit_tiny, tmp_path / "bench.json")
    assert read_bench(tmp_path / "bench.json", sit_tiny.manifest) == written
    scored = write_eval(sit_tiny, tmp_path / "eval.json")
    assert read_eval(tmp_path / "eval.json", sit_tiny.manifest) == scored


def test_without_distances_there_is_no_chart_of_them(sit_tiny: Bundle) -> None:
    report = eval_of(sit_tiny)
    unscored = tuple(replace(scores, seeds=(SeedScores(seed=0, clip=0.3),)) for scores in report.models)
    assert quality_chart(replace(report, models=unscored), None, 0.5) is None
    assert drift_chart(replace(report, drift=None)) is None


def test_measurements_of_another_bundle_are_refused(sit_tiny: Bundle, dit_tiny: Bundle, tmp_path: Path) -> None:
    write_bench(sit_tiny, tmp_path / "bench.json")
    write_eval(sit_tiny, tmp_path / "eval.json")
    with pytest.raises(UsageError, match=r"--bench .* measures sit-tiny at a FLOPs ratio of .*; measure this one"):
        read_bench(tmp_path / "bench.json", dit_tiny.manifest)
    with pytest.raises(UsageError, match=r"--eval .* measures sit-tiny"):
        read_eval(tmp_path / "eval.json", dit_tiny.manifest)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": 1}', '{"model": "sit-tiny", "rows": [{}]}'])
def test_other_files_are_refused_with_the_command_that_makes_one(
    sit_tiny: Bundle, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "m.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"by: dyexport bench BUNDLE -o m\.json"):
        read_bench(path, sit_tiny.manifest)
    with pytest.raises(DataError, match=r"by: dyexport eval BUNDLE -o m\.json"):
        read_eval(path, sit_tiny.manifest)


def test_the_command_is_that_which_was_run(page: Page) -> None:
    assert f"<code>dyexport report {page.bundle.root} --samples 3 --steps {STEPS} --seed 4 --bench " in page.html


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", objective="flow")
    done = without(("matplotlib",), "report", str(bundle.root), "-o", str(tmp_path / "a.html"))
    assert done.returncode == 1
    assert "matplotlib is not installed; run: pip install 'dyexport[report]'" in done.stderr
    assert not (tmp_path / "a.html").exists()
