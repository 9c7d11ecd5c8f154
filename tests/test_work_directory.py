"""Commands that build read the settings of an earlier command from its work directory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dyexport.bundle.reader import Bundle
from dyexport.cli import load_command, main
from dyexport.commands.stages import settings_of
from dyexport.errors import UsageError
from dyexport.exporters.tensorrt_profiles import TensorrtSettings
from dyexport.lora import LoraSpec
from dyexport.pipeline.settings import BuildSettings

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``dyexport`` in an empty directory: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dyexport", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return command


@pytest.fixture
def recorded(tmp_path: Path) -> BuildSettings:
    """Settings that no default agrees with, in a work directory."""
    settings = BuildSettings(
        model="dit-digits",
        out=tmp_path / "bundle",
        work=tmp_path / "work",
        budget=0.6,
        router="ordered",
        td_lora=LoraSpec(rank=2, alpha=2.0),
        engines=3,
        targets=("onnx", "tensorrt-rtx"),
        token_path="capacity",
        tensorrt=TensorrtSettings(compute_capabilities=("8.9",), profiles=("batch=1:2:4",)),
        finetune_steps=7,
        seed=5,
        baseline=False,
        precision="fp16",
        memory=10**9,
    )
    settings.save()
    return settings


def parsed(*line: str) -> BuildSettings:
    """The settings that a command line describes."""
    command, *words = line
    with load_command(command).make_context(command, words) as context:
        return settings_of(context)


@pytest.mark.parametrize("command", ["build", "finetune", "calibrate", "export", "plan"])
def test_a_work_directory_is_enough(recorded: BuildSettings, command: str) -> None:
    assert parsed(command, "--work", str(recorded.work)) == recorded


def test_options_replace_what_is_recorded(recorded: BuildSettings) -> None:
    work = ("--work", str(recorded.work))
    found = parsed("export", *work, "--engines", "8", "--baseline", "--compute-capability", "12.0", "-o", "other")
    tensorrt = TensorrtSettings(compute_capabilities=("12.0",), profiles=("batch=1:2:4",))
    assert found == replace(recorded, engines=8, baseline=True, tensorrt=tensorrt, out=Path("other"))
    assert parsed("calibrate", *work, "-b", "0.4", "--seed", "0") == replace(recorded, budget=0.4, seed=0)


def test_a_model_begins_with_the_defaults(recorded: BuildSettings) -> None:
    found = parsed("plan", "--work", str(recorded.work), "--model", "sit-digits", "--budget", "0.5")
    out = Path("sit-digits-0.5")
    assert found == BuildSettings(model="sit-digits", budget=0.5, out=out, work=recorded.work, engines=found.engines)


@pytest.mark.parametrize("command", ["build", "finetune", "calibrate", "export", "plan"])
def test_a_directory_without_settings_is_refused(run: Run, command: str, tmp_path: Path) -> None:
    code, out, err = run(command, "--work", "nowhere")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "nowhere records no settings" in err
    assert list(tmp_path.iterdir()) == []


def test_without_a_model_the_ways_to_name_it_are_listed(run: Run) -> None:
    code, _, err = run("build", "--budget", "0.5")
    assert (code, err) == (
        2,
        "dyexport: no model is named; give --model, --checkpoint, or the --work directory of an earlier build\n",
    )


def test_recorded_settings_are_checked_with_the_options(recorded: BuildSettings) -> None:
    with pytest.raises(UsageError, match="--token-path compact allocates by data"):
        parsed("export", "--work", str(recorded.work), "--token-path", "compact")


@pytest.mark.build
def test_stages_one_at_a_time_make_the_bundle_and_say_what_is_next(run: Run) -> None:
    stages = ("--model", "sit-digits", "--budget", "0.5", "--random-weights", "--work", "w")
    code, out, err = run("calibrate", *stages, "--json")
    assert code == 0, err
    assert json.loads(out)["work"] == "w"
    code, out, err = run("export", "--work", "w", "--engines", "2", "--no-baseline", "--out", "b")
    assert code == 0, err
    assert "calibrate: up to date" in err
    plan = Bundle.open("b").manifest.plan
    assert len(plan.segments) == 2
    for line in ("dyexport verify b", "dyexport sample b", "dyexport bench b", "rm -r w"):
        assert line in out


def test_the_table_of_a_plan_fits(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    model = ("--model", "sit-digits", "--budget", "0.5", "--random-weights")
    code, out, err = run("plan", *model, "--work", "w")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 60
    assert "…" not in out
    assert [line.split()[0] for line in out.splitlines() if line.strip()[:1].isdigit()] == ["1", "2", "4", "8", "16"]
