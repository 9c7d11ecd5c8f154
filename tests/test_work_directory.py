"""Commands that build read the settings of an earlier command from its work directory."""

from __future__ import annotations

import json
import re
import shlex
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
from tests.pipeline.tiny_pipeline import save_pipeline

Run = Callable[..., tuple[int, str, str]]
QUICK = {"bench": ("--rounds", "1", "--steps", "2", "--no-compile", "--no-eager")}  # appended to what is suggested


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


def test_a_file_is_no_work_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    code, stdout, stderr = run(
        "build", "--model", "sit-tiny", "--budget", "0.5", "--random-weights", "--work", "file", "-o", "bundle"
    )
    assert (code, stdout) == (2, "")
    assert "--work file is a file; give a directory" in stderr
    assert (tmp_path / "file").read_text() == "mine"


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


def test_other_widths_have_their_number_of_engines(tmp_path: Path) -> None:
    dynamic = BuildSettings(model="sit-digits", out=tmp_path / "bundle", work=tmp_path / "work", budget=0.6, engines=3)
    dynamic.save()
    work = ("--work", str(dynamic.work))
    static = parsed("build", *work, "--widths", "static")
    assert static == replace(dynamic, widths="static", engines=1)
    static.save()
    assert parsed("build", *work) == static
    assert parsed("build", *work, "--widths", "dynamic").engines == dynamic.preset.engines
    with pytest.raises(UsageError, match="--engines is 4; use -k 1"):
        parsed("build", *work, "--widths", "static", "-k", "4")


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
    stages = ("--model", "sit-tiny", "--budget", "0.5", "--random-weights", "--work", "w")
    code, out, err = run("calibrate", *stages, "--json")
    assert code == 0, err
    assert json.loads(out)["work"] == "w"
    code, out, err = run("export", "--work", "w", "--engines", "2", "--no-baseline", "--out", "b")
    assert code == 0, err
    assert "calibrate: up to date" in err
    plan = Bundle.open("b").manifest.plan
    assert len(plan.segments) == 2
    for line in ("dyexport verify b", "dyexport sample b", "rm -r w"):
        assert line in out
    assert "dyexport bench" not in out, "there is no dense network to compare with"


def commands_in(out: str) -> list[list[str]]:
    """The commands that a build suggests."""
    return [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("  dyexport ")]


@pytest.mark.build
def test_a_replaced_bundle_is_reported_and_what_is_suggested_runs(run: Run) -> None:
    model = ("build", "--model", "sit-tiny", "--budget", "0.5", "--random-weights", "--work", "w", "--out", "b")
    for engines, notice in (("1", None), ("1", None), ("2", "replaced the bundle in b, which had engines 1; ")):
        code, out, err = run(*model, "--engines", engines)
        assert code == 0, err
        assert ("replaced the bundle" in err) == (notice is not None)
        assert (notice or "") in err
    suggested = commands_in(out)
    assert [words[0] for words in suggested] == ["verify", "sample", "bench"]
    for words in suggested:
        code, _, err = run(*words, *QUICK.get(words[0], ()))
        assert code == 0, err
    code, out, err = run(*model, "--engines", "2", "--precision", "bf16", "--json")
    assert (code, json.loads(out)["replaced"]["precision"]) == (0, "fp32")
    assert "replaced the bundle in b, which had precision fp32; " in err


@pytest.mark.build
def test_prompts_are_suggested_where_text_encoders_are_known(run: Run, tmp_path: Path) -> None:
    build = ("build", "--model", "flux-tiny", "--budget", "0.5", "--no-baseline", "--engines", "1", "--out", "b")
    code, out, err = run(*build, "--random-weights")
    assert code == 0, err
    assert [words[0] for words in commands_in(out)] == ["verify"]
    save_pipeline(tmp_path / "my pipe")
    code, out, err = run(*build, "--checkpoint", "my pipe", "--finetune-steps", "0")
    assert code == 0, err
    assert "other weights or routers" in err
    verify, sample = commands_in(out)
    assert (verify[0], sample[0], sample[-2:]) == ("verify", "sample", ["--pipeline", "my pipe"])
    code, _, err = run(*sample, "--steps", "1", "--height", "32", "--width", "32")
    assert code == 0, err


@pytest.mark.parametrize("command", ["plan", "calibrate"])
def test_without_a_budget_the_share_is_printed(run: Run, command: str) -> None:
    code, out, err = run(command, "--model", "sit-digits", "--random-weights", "--work", "w")
    assert code == 0, err
    sentence = r"No --budget was given: the random routers stay as they are, at 0\.\d+ of the dense model's FLOPs\."
    assert re.search(sentence, out)


@pytest.mark.parametrize("model", ["sit-digits", "sit-tiny"])
def test_the_table_of_a_plan_fits(run: Run, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    code, out, err = run("plan", "--model", model, "--budget", "0.5", "--random-weights", "--work", "w")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 60
    assert "…" not in out
    rows = [line.split()[0] for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert rows[:4] == ["1", "2", "4", "8"]
    assert rows[4:] == ["16"] or model == "sit-tiny", "whose widths change at fewer timesteps"
