"""``dyexport eval`` on the command line: what it prints and writes, what it refuses, and its exit codes."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dyexport.bundle.golden import GOLDEN, GoldenData
from dyexport.bundle.reader import Bundle
from dyexport.cli import main
from tests.pipeline.tiny import tamper
from tests.runtime.bundles import write_bundle
from tests.test_runtime_only import without

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``dyexport eval``: exit code, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dyexport", "eval", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return command


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of latents, written by hand."""
    return write_bundle(tmp_path_factory.mktemp("eval") / "bundle", segments=2, pixels=False).root


@pytest.mark.build
def test_every_form_of_the_report_has_the_same_numbers(run: Run, latents: Path, tmp_path: Path) -> None:
    reports = {}
    for suffix in ("json", "md", "csv"):
        code, out, err = run(latents, "--samples", 3, "--steps", 4, "--json", "-o", tmp_path / f"report.{suffix}")
        assert code == 0, err
        reports[suffix] = json.loads(out)
    report = reports["json"]
    assert report == reports["md"] == reports["csv"] == json.loads((tmp_path / "report.json").read_text())
    markdown = (tmp_path / "report.md").read_text()
    assert f"{report['paired']['psnr']:.1f} dB" in markdown
    for step, mean in enumerate(report["drift"]["mean"], start=1):
        assert f"| {step} | {mean:.4f} |" in markdown
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert [(row["model"], row["seed"], row["frechet"]) for row in rows] == [("dense", "0", ""), ("dynamic", "0", "")]
    assert (report["golden"], report["unit"], len(report["drift"]["mean"])) == (None, "latents", 4)


@pytest.mark.build
def test_quality_and_exactness_stand_apart(run: Run, latents: Path) -> None:
    code, out, _ = run(latents, "--samples", 3, "--steps", 2)
    text = " ".join(out.split())
    assert code == 0
    assert "3 samples of each model from labels, scored as latents, 2 steps, no guidance" in text
    assert "Informative, not a test" in text
    assert text.index("PSNR") < text.index("Engines against the masked model") < text.index("golden check")
    assert "not compared: the bundle has no golden data" in text


@pytest.mark.build
def test_engines_that_are_wrong_fail_whatever_their_samples_score(run: Run, sit_tiny: Bundle, tmp_path: Path) -> None:
    root = shutil.copytree(sit_tiny.root, tmp_path / "copy")
    golden = GoldenData.load(root / GOLDEN)
    np.asarray(golden.samples[0].sample)[0] += 1e-3
    golden.save(root / GOLDEN)
    tamper(root, GOLDEN, lambda content: content)
    code, out, _ = run(root, "--samples", 3, "--steps", 1, "--json")
    report = json.loads(out)
    assert code == 1
    assert not report["golden"]["passed"]
    assert report["golden"]["error"] == pytest.approx(1e-3, rel=0.1)
    assert [scores["model"] for scores in report["models"]] == ["dense", "dynamic"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--features", "x"), "--features does nothing here: samples of tiny are latents (give --vae"),
        (("--classifier", "x"), "--classifier does nothing here: samples of tiny are latents (give --vae"),
        (("--subset", "9"), "--subset does nothing here: it is for the kernel distance to --real"),
        (("--real", "digits"), "--real is digits, and tiny samples none"),
        (("--real", "."), "--real is ., a folder of pictures, and samples of tiny are latents; give --vae"),
        (("--scheduler", "euler"), "scheduler 'euler' does not sample tiny"),
        (("--target", "tensorrt"), "has no 'tensorrt' engines"),
        (("--subset", "1"), "--subset is 1"),
        (("-o", "report.txt"), "-o is report.txt"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Run, latents: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(latents, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--real", "nowhere"), "--real is nowhere, which does not exist"),
        (("--vae", "nowhere"), "cannot read an AutoencoderKL from nowhere"),
        (("--prompts", "nowhere"), "cannot read --prompts nowhere: No such file or directory; give a text file"),
    ],
)
def test_what_is_not_there_is_named(run: Run, latents: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = run(latents, *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert message in err


@pytest.mark.build
def test_without_torchmetrics_the_extra_is_named(latents: Path) -> None:
    done = without(("torchmetrics",), "eval", str(latents), "--samples", "2", "--steps", "1")
    assert done.returncode == 1
    assert "torchmetrics is not installed; run: pip install 'dyexport[eval]'" in done.stderr
