"""The run-side commands, from the command line to files and JSON."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.numpy import load_file

from dyexport.cli import main
from dyexport.commands.sample import parse_labels
from dyexport.demo import DemoReport
from dyexport.errors import UsageError
from tests.runtime.bundles import TinyBundle


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run ``dyexport`` with arguments: exit code, stdout, stderr."""

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dyexport", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return command


def test_labels_are_numbers_and_ranges() -> None:
    assert parse_labels("0-2, 7,4") == [0, 1, 2, 7, 4]


@pytest.mark.parametrize("text", ["", "x", "3-", "-3", "5-2", "1,,2", "1.5"])
def test_other_labels_are_bad_usage(text: str) -> None:
    with pytest.raises(UsageError, match="--labels"):
        parse_labels(text)


def test_sample_draws_a_grid(run: Any, demo: DemoReport, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    code, stdout, _ = run("sample", demo.bundle, "--labels", "0-2", "--steps", 2, "-o", out, "--json")
    assert (code, json.loads(stdout)["path"]) == (0, str(out))
    assert Image.open(out).width > Image.open(out).height


def test_same_seed_same_picture(run: Any, demo: DemoReport, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        assert run("sample", demo.bundle, "--labels", "0-2", "--steps", 2, "--seed", seed, "-o", file)[0] == 0
    first, again, other = (file.read_bytes() for file in files)
    assert first == again
    assert first != other


def test_latents_are_saved_where_no_vae_is_given(run: Any, built: Any, tmp_path: Path) -> None:
    code, stdout, _ = run("sample", built.root, "--labels", "1,2", "--steps", 2, "-o", tmp_path / "a.safetensors")
    assert code == 0
    assert "--vae" in stdout
    assert load_file(tmp_path / "a.safetensors")["latents"].shape == (2, *built.manifest.model.latent_shape)


def test_memory_bounds_the_weights_of_a_run(run: Any, built: Any, tmp_path: Path) -> None:
    sample = ("sample", built.root, "--labels", "1,2", "--steps", 2, "-o", tmp_path / "a.safetensors", "--memory")
    assert run(*sample, "1GB")[0] == 0
    for command in (sample, ("bench", built.root, "--no-compile", "--rounds", 1, "--steps", 2, "--memory")):
        code, _, stderr = run(*command, "3B")
        assert code == 2
        assert "memory of 3 bytes holds no engine of this bundle" in stderr


def test_vae_decodes_latents(run: Any, built: Any, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    channels = built.manifest.model.latent_shape[0]
    AutoencoderKL(latent_channels=channels, block_out_channels=(32,), norm_num_groups=8).save_pretrained(
        tmp_path / "vae"
    )
    out = tmp_path / "a.png"
    assert run("sample", built.root, "--labels", "1,2", "--steps", 2, "--vae", tmp_path / "vae", "-o", out)[0] == 0
    assert len(Image.open(out).convert("RGB").getcolors(1 << 20) or ()) > 10


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--labels", "11"), 2, "labels must be in"),
        (("--steps", "0"), 2, "steps is 0"),
        (("--scheduler", "ddim"), 2, "use euler"),
        (
            ("--target", "tensorrt"),
            2,
            "no 'tensorrt' engines; it was built for onnx; run: dyexport compile",
        ),
    ],
)
def test_bad_arguments_leave_nothing_behind(
    run: Any, flow: TinyBundle, tmp_path: Path, arguments: tuple[str, str], code: int, said: str
) -> None:
    found, stdout, stderr = run("sample", flow.root, "-o", tmp_path / "a.png", *arguments)
    assert (found, stdout) == (code, "")
    assert said in stderr
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "/", "pipe", "link", "folder"])
def test_what_is_no_file_is_not_drawn_into(
    run: Any, flow: TinyBundle, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    Path("folder").mkdir()
    code, stdout, stderr = run("sample", flow.root, "--labels", "1", "--steps", 1, "-o", name)
    assert (code, stdout, stderr.count("\n")) == (2 if name == "" else 1, "", 1)
    assert name == "" or stderr.startswith("dyexport: cannot write ")
    assert Path("pipe").is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]


def test_a_missing_vae_is_named(run: Any, built: Any, tmp_path: Path) -> None:
    code, _, stderr = run("sample", built.root, "--steps", 1, "--vae", tmp_path / "none", "-o", tmp_path / "a.png")
    assert code == 1
    assert f"cannot read an AutoencoderKL from {tmp_path / 'none'}" in stderr


def test_inspect_shows_and_writes_the_heat_map(run: Any, ddpm: TinyBundle, tmp_path: Path) -> None:
    code, stdout, _ = run("inspect", ddpm.root, "--png", tmp_path / "w.png")
    assert code == 0
    assert "attention heads" in stdout
    assert Image.open(tmp_path / "w.png").width > 100


def test_the_heat_map_is_no_jpeg(run: Any, ddpm: TinyBundle, tmp_path: Path) -> None:
    code, stdout, stderr = run("inspect", ddpm.root, "--png", tmp_path / "w.jpg")
    assert (code, stdout) == (2, "")
    assert "a picture goes into .png" in stderr
    assert not (tmp_path / "w.jpg").exists()


def test_the_heat_map_fits_a_narrow_terminal(run: Any, ddpm: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    lines = run("inspect", ddpm.root)[1].splitlines()
    maps = [line for line in lines if line[:7].strip().isdigit()]
    assert len(maps) >= 2 * len(ddpm.plan.segments[0].heads)
    assert {len(line) for line in maps} == {50}


def test_inspect_json_is_complete(run: Any, ddpm: TinyBundle) -> None:
    found = json.loads(run("inspect", ddpm.root, "--json")[1])
    assert [s["gates"] for s in found["segments"]] == [s.gate_size for s in ddpm.plan.segments]
    assert found["segments"][0]["heads"] == [len(kept) for kept in ddpm.plan.segments[0].heads]
    assert len(found["widths"]["heads"]) == len(found["widths"]["t"]) == len(ddpm.widths.grid)


def test_bench_prints_one_json_object(run: Any, built: Any, tmp_path: Path) -> None:
    arguments = ("--rounds", 1, "--steps", 2, "--no-compile", "--no-eager", "--threads", 1, "--json")
    code, stdout, stderr = run("bench", built.root, *arguments, "--device", "cpu", "-o", tmp_path / "report.csv")
    assert code == 0
    phases = ["opening the bundle ...", "first calls ...", "timing ...", "overhead ...", "memory ..."]
    assert [line for line in stderr.splitlines() if line.endswith(" ...")] == phases
    found = json.loads(stdout)
    assert found["p50"] > 0
    assert found["speedup_vs_dense"] is None  # of one round
    assert (tmp_path / "report.csv").read_text().count("\n") == 1 + len(found["rows"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--batch", "2,x"), "--batch has 'x'"),
        (("--size", "64x"), "--size has ''"),
        (("--target", "onnx", "--target", "paper"), "unknown target 'paper'"),
        (("--target", "onnx", "--target", "onnx"), "--target names onnx twice"),
        (("--device", "tpu"), "--device is 'tpu'"),
        (("-o", "report.txt"), "-o is report.txt"),
        (("-o", "gone/report.md"), "-o is gone/report.md, and there is no directory gone"),
        (("--size", "64"), "--size does nothing here"),
        (("--pipeline", "x"), "--pipeline does nothing here"),
        (("--share-weights", "--target", "tensorrt"), "--share-weights does nothing here"),
    ],
)
def test_bench_refuses_what_makes_no_sense(run: Any, flow: TinyBundle, option: tuple[str, ...], message: str) -> None:
    code, out, err = run("bench", flow.root, *option)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"dyexport: {message}")


@pytest.mark.parametrize("command", ["sample", "bench", "eval", "inspect"])
def test_a_directory_that_is_no_bundle_is_one_sentence(run: Any, command: str, tmp_path: Path) -> None:
    code, stdout, stderr = run(command, tmp_path, "--json")
    assert (code, stdout) == (1, "")
    assert stderr == (
        f"dyexport: {tmp_path} is not a bundle: it has no manifest.json; give a directory that `dyexport build` wrote\n"
    )


def test_eval_compares_with_a_control_trained_as_long(run: Any, demo: DemoReport) -> None:
    """The work directory tells how long that was."""
    arguments = ("--samples", 20, "--steps", 2, "--seeds", 2, "--json")
    code, stdout, stderr = run("eval", demo.bundle, *arguments, "--control")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert [scores["model"] for scores in report["models"]] == ["dense", "control", "dynamic"]
    for scores in report["models"]:
        assert [seed["seed"] for seed in scores["seeds"]] == [0, 1]
        assert scores["frechet"] == pytest.approx(sum(seed["frechet"] for seed in scores["seeds"]) / 2)
        assert 0 <= scores["class_accuracy"] <= 1
    assert report["golden"]["passed"]
    assert "control: done" in stderr
    work = Path(demo.bundle).with_name("work")
    assert "control: up to date" in run("eval", demo.bundle, *arguments, "--control", "--work", work)[2]
    again = json.loads(run("eval", demo.bundle, *arguments)[1])
    assert again["models"] == [scores for scores in report["models"] if scores["model"] != "control"]


def test_a_control_of_another_build_is_refused(run: Any, demo: DemoReport, built: Any) -> None:
    code, _, stderr = run("eval", demo.bundle, "--control", "--work", built.root.with_name("work"))
    assert code == 1
    assert "is not the one of" in stderr


def test_a_control_on_another_machine_is_found_in_its_work_directory(
    run: Any, demo: DemoReport, tmp_path: Path
) -> None:
    copy = shutil.copytree(demo.bundle, tmp_path / "copied")
    code, stdout, stderr = run("eval", copy, "--control")
    assert (code, stdout) == (1, "")
    assert stderr.endswith("; give --work DIR, the work directory of its build, or build again\n")
