"""The Python examples of the documentation run page by page, on small models under the names of large ones."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import dyexport
from dyexport.bench.rows import BenchReport
from dyexport.bundle.reader import Bundle
from dyexport.cli import app
from dyexport.evaluation.report import EvalReport
from dyexport.presets import PRESETS
from dyexport.verification.report import VerifyReport
from tests.test_docs import JSON_KEYS, PAGES, ROOT, fenced, page_name, text_of

NOT_RUN = re.compile(r"<!-- not run: .+ -->\n```python\n.*?^```$", re.MULTILINE | re.DOTALL)
FLUX = "black-forest-labs/FLUX.1-dev"
VAE = "stabilityai/sd-vae-ft-ema"

pytestmark = pytest.mark.build


@pytest.fixture(autouse=True)
def _in_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def run(page: str) -> dict[str, Any]:
    """Run the examples of a page in order, in one namespace, and return it."""
    names: dict[str, Any] = {}
    for block in fenced(NOT_RUN.sub("", text_of(ROOT / page)), "python"):
        exec(compile(block, page, "exec"), names)
    return names


def stand_in(name: str, target: Path) -> None:
    """Make a directory of that name."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).symlink_to(target)


@pytest.fixture(scope="module")
def flux_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.pipeline.tiny_pipeline import save_pipeline

    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "flux")


@pytest.fixture(scope="module")
def digits_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Build what the pages call ``sit-digits`` as they do, with a smaller model."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "sit-digits", replace(PRESETS["sit-tiny"], name="sit-digits", engines=2))
        patch.chdir(folder)
        dyexport.build("sit-digits", budget=0.5, random_weights=True)
        yield folder


def save_vae(channels: int) -> None:
    from tests.pipeline.tiny_pipeline import small_vae

    small_vae(latent_channels=channels).save_pretrained(VAE)


def test_every_page_with_examples_is_run() -> None:
    with_examples = {page_name[page] for page in PAGES if fenced(NOT_RUN.sub("", text_of(page)), "python")}
    run_here = {name for name in re.findall(r'run\(\s*"([\w/.]+)"', text_of(Path(__file__)))}
    assert with_examples == run_here


def test_readme(flux_tiny: Bundle, flux_pipeline: Path, digits_build: Path) -> None:
    stand_in("flux-0.5", flux_tiny.root)
    stand_in(FLUX, flux_pipeline)
    shutil.copytree(digits_build, ".", dirs_exist_ok=True)
    names = run("README.md")
    assert type(names["pipe"].transformer).__name__ == "FluxBundle"
    assert names["report"].passed
    assert names["samples"].values.shape == (2, 1, 8, 8)


def test_five_minute_start(sit_tiny: Bundle) -> None:
    stand_in("out/demo/bundle", sit_tiny.root)
    run("docs/start.md")
    assert Path("year.png").stat().st_size > 0


def test_python_page(dit_tiny: Bundle, digits_build: Path) -> None:
    shutil.copytree(digits_build, ".", dirs_exist_ok=True)
    stand_in("dit-xl-2-0.5", dit_tiny.root)
    save_vae(channels=2)
    names = run("docs/howto/python.md")
    assert names["values"].shape == (2, 1, 8, 8)
    assert names["velocity"].shape == (2, 1, 8, 8)
    assert names["image"].size == (64, 64)
    assert {"segment-00", "conditioning", "dense"} <= set(names["paths"])


def test_diffusers_page(flux_tiny: Bundle, flux_pipeline: Path) -> None:
    stand_in("flux-0.5", flux_tiny.root)
    stand_in(FLUX, flux_pipeline)
    stand_in("someone/my-bundle", Path("../my-bundle"))
    names = run("docs/howto/diffusers.md")
    assert names["variations"].transformer is not None
    assert type(names["transformer"]).__name__ == type(names["pipe"].transformer).__name__ == "FluxBundle"


def test_new_engine(sit_tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from dyexport.engines import registry

    monkeypatch.setattr(registry, "BACKENDS", dict(registry.BACKENDS))
    monkeypatch.setattr(registry, "FILES", dict(registry.FILES))
    stand_in("sit-digits-0.5", sit_tiny.root)
    names = run("docs/howto/extend.md")
    assert torch.allclose(names["computed"], names["expected"], atol=1e-5)


def test_bundle_format(sit_tiny: Bundle) -> None:
    stand_in("sit-digits-0.5", sit_tiny.root)
    run("docs/reference/bundle.md")
    page = text_of(ROOT / "docs" / "reference" / "bundle.md")
    manifest = json.loads((sit_tiny.root / "manifest.json").read_text())
    for name in (*manifest, *manifest["plan"]["segments"][0], *manifest["files"]):
        assert f"`{name}`" in page or re.fullmatch(r"graphs/segment-\d\d\.onnx", name), name


def test_figures_are_those_of_the_pages(sit_tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from docs import figures

    monkeypatch.setattr(figures, "OUT", Path("figures"))
    Path("figures").mkdir()
    stand_in("demo/bundle", sit_tiny.root)
    stand_in("demo/work", sit_tiny.root.with_name("work"))
    Image.new("L", (8, 8)).save("demo/digits.png")
    figures.main(Path("demo"))
    shown = {name for page in PAGES for name in re.findall(r"figures/([\w-]+\.png)", text_of(page))}
    assert {path.name for path in Path("figures").iterdir()} == shown


def test_json_keys_of_reports_are_documented() -> None:
    assert {field.name for field in fields(VerifyReport)} | {"passed", "error"} == JSON_KEYS["verify"]
    assert {field.name for field in fields(BenchReport)} < JSON_KEYS["bench"]
    assert {field.name for field in fields(EvalReport)} == JSON_KEYS["eval"]


@pytest.mark.parametrize("line", ["inspect BUNDLE", "doctor BUNDLE", "sample BUNDLE --labels 3 --steps 2"])
def test_json_keys_of_commands_on_a_bundle(line: str, sit_tiny: Bundle) -> None:
    printed = CliRunner().invoke(app, [*line.replace("BUNDLE", str(sit_tiny.root)).split(), "--json"])
    assert set(json.loads(printed.stdout)) == JSON_KEYS[line.split()[0]]


def test_json_keys_of_a_build() -> None:
    line = "build --model sit-tiny --budget 0.5 --random-weights --engines 1 --no-baseline --out b --json"
    printed = CliRunner().invoke(app, line.split())
    assert set(json.loads(printed.stdout)) == JSON_KEYS["build"]
    printed = CliRunner().invoke(app, ["plan", "--work", "b.work", "--json"])
    assert set(json.loads(printed.stdout)) == JSON_KEYS["plan"]
