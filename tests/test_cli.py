"""The command line: exit codes, one sentence on stderr, one JSON object on stdout."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dyexport.cli import main, warnings_as_lines
from dyexport.errors import DyexportWarning
from dyexport.pipeline.work_directory import locked
from dyexport.presets import PRESETS

ROOT = Path(__file__).parents[1]
TINY = ["-m", "sit-tiny", "-b", "0.5", "--random-weights", "-k", "1", "--no-baseline"]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The last line of stderr, which must be all there is besides stage lines."""
        lines = self.err.strip().splitlines()
        assert not any("Traceback" in line for line in lines), self.err
        return lines[-1]


Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``dyexport`` in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["dyexport", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    return command


def tiny(root: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """``dyexport build`` of the smallest model, in a process of its own."""
    command = [sys.executable, "-m", "dyexport", "build", *TINY, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=root, env=environment, **pipes, **options)


BUILD = ["build", "--model", "dit-s-2", "--random-weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--model", "dit-x", "--budget", "0.5"], "unknown model 'dit-x'"),
        ([*BUILD, "--budget", "0"], "budget is 0; give a FLOPs ratio"),
        ([*BUILD, "--budget", "1.5"], "budget is 1.5; give a FLOPs ratio"),
        ([*BUILD, "--budget", "abc"], "--budget is 'abc'; give a FLOPs ratio"),
        ([*BUILD, "--budget", "0.5", "--router", "fre"], "--router is 'fre'; did you mean 'free'?"),
        ([*BUILD, "--budget", "0.5", "--quantize", "x"], "--quantize is 'x'; use int8 or fp8"),
        ([*BUILD, "--budget", "0.5", "--engines", "0"], "--engines is 0"),
        ([*BUILD, "--budget", "0.5", "--engines", "few"], "--engines is 'few'; give a whole number"),
        ([*BUILD, "--budget", "0.5", "--target", "onnx,paper"], "unknown target 'paper'"),
        ([*BUILD, "--budget", "0.5", "--checkpoint", "x"], "exclude each other"),
        (["build", "--random-weights", "--checkpoint", "x"], "--random-weights reads no checkpoint"),
        (["build", "--budget", "0.5"], "--model"),
        ([*BUILD, "--color", "red"], "--color"),
        ([*BUILD, "--budget", "0.5", "-o", "/"], "-o is /; give the name of a directory"),
        ([*BUILD, "--budget", "0.5", "--seed", str(2**64)], f"--seed is {2**64}"),
        ([*BUILD, "--budget", "0.5", "--seed", "-1"], "--seed is -1"),
        ([*BUILD, "--budget", "0.5", "--engines", str(10**20)], f"--engines is {10**20}"),
        ([*BUILD, "--budget", "0.5", "--finetune-steps", str(10**20)], f"--finetune-steps is {10**20}"),
        ([*BUILD, "--budget", "0.5", "--memory", "9" * 5000], "is not a size"),
        ([*BUILD, "--budget", "0.5", "--td-lora", "rank=99999999999"], "rank is"),
        ([*BUILD, "--budget", "0.5", "--td-lora", "rank=4,experts=99999999999"], "experts is"),
        ([*BUILD, "--budget", "0.5", "--td-lora", "rank=4,alpha=1e38"], "alpha is"),
        (["plan", "--model", "dit-s-2"], "needs a --budget"),
        (["finetune", "--model", "dit-s-2", "--budget", "0.5"], "needs --data"),
        (["nonsense"], "No such command 'nonsense'"),
        (["verify", "nowhere", "--timesteps", "0"], "--timesteps is 0"),
        (["verify", "nowhere", "--timesteps", str(10**20)], f"--timesteps is {10**20}"),
        (["verify", "nowhere", "--device", "gpu"], "unknown device 'gpu'; use cpu, cuda or cuda:N"),
        (["verify", "nowhere", "--tolerance", "inf"], "--tolerance is inf"),
        (["verify", "nowhere", "--tolerance", "1e38"], "--tolerance is 1e"),
        (["verify", "nowhere", "--seed", str(2**64)], f"--seed is {2**64}"),
        (["sample", "nowhere", "--guidance", "nan"], "--guidance is nan"),
        (["sample", "nowhere", "--guidance", "inf"], "--guidance is inf"),
        (["sample", "nowhere", "--guidance", "1e38"], "--guidance is 1e"),
        (["sample", "nowhere", "--steps", str(10**20)], f"--steps is {10**20}"),
        (["sample", "nowhere", "--seed", str(2**64)], f"--seed is {2**64}"),
        (["sample", "nowhere", "--labels", "0-99999999999"], "are more than"),
        (["sample", "nowhere", "--labels", "9" * 5000], "is not a list of classes"),
        (["bench", "nowhere", "--batch", str(10**20)], f"--batch is {10**20}"),
        (["bench", "nowhere", "--threads", str(10**20)], f"--threads is {10**20}"),
        (["bench", "nowhere", "--rounds", str(10**20)], f"--rounds is {10**20}"),
        (["bench", "nowhere", "--steps", str(10**20)], f"--steps is {10**20}"),
        (["eval", "nowhere", "--samples", str(10**20)], f"--samples is {10**20}"),
        (["eval", "nowhere", "--seeds", str(10**20)], f"--seeds is {10**20}"),
        (["eval", "nowhere", "--steps", str(10**20)], f"--steps is {10**20}"),
        (["eval", "nowhere", "--guidance", "nan"], "--guidance is nan"),
        (["eval", "nowhere", "--guidance", "inf"], "--guidance is inf"),
    ],
)
def test_bad_usage_is_one_sentence_and_exit_code_2(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert message in result.sentence
    assert len(result.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--model", "dit-s-2", "--budget", "0.5", "--finetune-steps", "0"], "pass --checkpoint"),
        ([*BUILD, "--budget", "0.5", "-o", "/proc/bundle"], "cannot write /proc/bundle"),
        (["verify", "nowhere"], "nowhere does not exist; give the directory of a bundle"),
        (["compile", "me/b", "--target", "torch"], "if it is on the hub: hf download me/b --local-dir b"),
        (["inspect", "me/b"], "give the directory of a bundle; if it is on the hub: hf download me/b --local-dir b"),
        (
            ["build", "--model", "dit-s-2", "-b", "0.5", "--checkpoint", "./gone", "--finetune-steps", "0"],
            "./gone does not exist",
        ),
        (["build", "-b", "0.5", "--checkpoint", "gone/", "--finetune-steps", "0"], "gone/ does not exist"),
        (["build", "--model", "dit-digits", "-b", "0.5", "--data", "gone"], "gone is no directory"),
    ],
)
def test_failures_are_one_sentence_and_exit_code_1(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(*arguments)
    assert result.code == 1
    assert result.out == ""
    assert message in result.sentence
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(run: Run) -> None:
    result = run("verify", "nowhere", "--debug")
    assert result.code == 1
    assert "Traceback" in result.err
    assert "Traceback" not in run("verify", "nowhere").err


def test_warnings_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of dyexport; other libraries' are shown as Python shows them."""
    with warnings.catch_warnings(record=True) as caught, warnings_as_lines():
        warnings.warn("widths are\n  chosen [red]", DyexportWarning, stacklevel=1)
        warnings.warn("of a library", UserWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: widths are chosen [red]\n"
    assert [str(warning.message) for warning in caught] == ["of a library"]


def test_help_names_every_command(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    for command in ("build", "models", "plan", "finetune", "calibrate", "export", "verify"):
        assert command in result.out


def test_models_as_json(run: Run) -> None:
    models = json.loads(run("models", "--json").out)["models"]
    assert [model["name"] for model in models] == [name for name in PRESETS if name in {m["name"] for m in models}]
    xl = next(model for model in models if model["name"] == "dit-xl-2")
    assert xl["gflops"] == pytest.approx(118.6, abs=0.1)
    assert xl["parameters"] == 674_834_720


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", ["models", "targets"])
def test_tables_fit_and_cut_no_name(run: Run, monkeypatch: pytest.MonkeyPatch, command: str, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    names = [row["name"] for row in json.loads(run(command, "--json").out)[command]]
    lines = run(command).out.splitlines()
    assert max(map(len, lines)) <= columns
    firsts = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert [first for first in firsts if first] == names


@pytest.mark.build
def test_a_build_names_the_targets_that_its_token_path_rules_out(run: Run) -> None:
    targets = "tensorrt-rtx or torch-tensorrt"
    sentence = f"To compile this model for {targets}, build with --token-path dynamic instead of compact."
    for path, printed in (("compact", True), ("dynamic", False)):
        result = run("build", *TINY, "-o", path, "--work", "work", "--token-path", path)
        assert "Next:" in result.out, result.err
        assert (sentence in result.out.splitlines()) is printed


@pytest.mark.build
def test_json_is_one_object_and_a_second_build_reuses_everything(tmp_path: Path) -> None:
    processes = [tiny(tmp_path, "--json", "-o", "bundle")]
    first_out, first_err = processes[0].communicate()
    assert processes[0].returncode == 0, first_err
    first = json.loads(first_out)
    assert "calibrate: done in" in first_err
    second_out, second_err = tiny(tmp_path, "--json", "-o", "bundle").communicate()
    second = json.loads(second_out)
    assert "calibrate: up to date" in second_err
    assert {stage["status"] for stage in first["stages"].values()} == {"done"}
    assert {stage["status"] for stage in second["stages"].values()} == {"reused"}
    names = {"bundle", "flops_ratio", "network_flops_ratio", "executed_flops_ratio", "engines", "disk_bytes", "stages"}
    assert names <= first.keys()
    for name in names - {"stages"}:
        assert first[name] == second[name]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.work"]


def limit_file_size() -> None:
    """What a disk with no room looks like to anyone who is not root: files end at 200 kB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


@pytest.mark.build
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    process = tiny(tmp_path, "-o", "bundle", preexec_fn=limit_file_size)
    out, err = process.communicate()
    assert process.returncode == 1, err
    assert out == ""
    assert "cannot write" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert not (tmp_path / "bundle").exists()
    assert list(tmp_path.rglob(".partial*")) == []


@pytest.mark.build
def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
    try:
        process = tiny(tmp_path, "-o", "bundle")
    finally:
        signal.signal(signal.SIGINT, heard)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("recipe: ")
    assert process.stderr.readline().startswith("static: done")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert (
        err.strip().splitlines()[-1] == "dyexport: interrupted; the same command goes on after the last finished stage"
    )
    assert "Traceback" not in err
    assert not (tmp_path / "bundle").exists()
    assert list(tmp_path.rglob(".partial*")) == []


@pytest.mark.parametrize(
    ("arrives", "cure"),
    [('RuntimeError("KeyboardInterrupt: <no message>")', "go on"), ("KeyboardInterrupt", "start again")],
)
def test_ctrl_c_prints_one_sentence(arrives: str, cure: str) -> None:
    """Where Python runs inside torch, what arrives is a ``RuntimeError`` with a page of C++."""
    script = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from dyexport.cli import app, main

@app.command()
def interrupted():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise {arrives} from None

sys.argv = ["dyexport", "interrupted"]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == f"dyexport: interrupted; repeat the command to {cure}\n"


@pytest.mark.build
def test_one_build_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / "bundle.work"):
        process = tiny(tmp_path, "-o", "bundle")
        _, err = process.communicate()
    assert process.returncode == 1
    recipe, refused = err.splitlines()
    assert recipe.startswith("recipe: ")
    assert refused.startswith("dyexport: another build is using")
    assert list(tmp_path.iterdir()) == []
