"""Help, wrong options and looking into a bundle import no torch, which takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench.test_useless_options import write_as
from tests.runtime.bundles import write_bundle

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "tests/bundle/schema-3/calibration/widths.safetensors"
SERVER = """
import json, os, sys
import dyexport.bench.settings, dyexport.bundle.reader, dyexport.pipeline.settings, typer.main  # once for all commands
from dyexport.cli import main

def run(request):
    sys.argv = ["dyexport", *request["arguments"]]
    os.chdir(request["cwd"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), number)
    try:
        main()
    finally:
        print("torch" in sys.modules, file=sys.stderr)

for line in sys.stdin:
    if (child := os.fork()) == 0:
        run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
Run = Callable[..., tuple[int, str, bool]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run ``dyexport`` in a fork of one process: exit code, what it printed, and whether torch was imported."""
    folder = tmp_path_factory.mktemp("printed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def command(*arguments: str, cwd: Path, stream: str = "out") -> tuple[int, str, bool]:
            printed = {name: folder / name for name in ("out", "err")}
            for file in printed.values():
                file.unlink(missing_ok=True)
            request = {"arguments": arguments, "cwd": cwd, **printed}
            stdin.write(json.dumps(request, default=str) + "\n")
            stdin.flush()
            code = int(stdout.readline())
            last = printed["err"].read_text().splitlines()[-1]
            return code, printed[stream].read_text(), {"True": True, "False": False}[last]

        yield command
        stdin.close()


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("build --help", 0),
        ("verify -h", 0),
        ("models", 0),
        ("targets", 0),
        ("bild", 2),
        ("build", 2),
        ("build --model typo --budget 0.5", 2),
        ("build --model sit-digits --budget 2", 2),
        ("build --model sit-digits --budget half", 2),
        ("build --model sit-digits --budget 0.5 --target paper", 2),
        ("build --model sit-digits --budget 0.5 --precision fp23", 2),
        ("build --model sit-digits --budget 0.5 --td-lora rank=-1", 2),
        ("build --model sit-digits --budget 0.5 --color red", 2),
        ("build --model sit-digits --budget 0.5 --data nowhere/", 1),
        ("finetune --model sit-digits --budget 0.5 --data nowhere/", 1),
        ("finetune --model flux --budget 0.5 --data synthetic:nowhere", 1),
        ("calibrate --model dit-xl-2 --budget 0.5 --data digits", 1),
        ("build --checkpoint nowhere.safetensors --budget 0.5", 1),
        ("build --checkpoint no/where.safetensors --budget 0.5", 1),
        ("build --model sit-digits --checkpoint nowhere.safetensors --budget 0.5", 1),
        (f"build --checkpoint {__file__} --budget 0.5", 1),
        (f"build --model sit-digits --checkpoint {__file__} --budget 0.5", 1),
        (f"build --checkpoint {WEIGHTS} --budget 2", 2),
        ("finetune --work nowhere", 2),
        ("export", 2),
        ("encode nowhere -o out", 2),
        ("encode nowhere --model typo -o out", 2),
        ("encode nowhere --model dit-xl-2 --size 0 -o out", 2),
        ("encode nowhere --model latte -o out", 1),
        ("encode nowhere --model dit-xl-2 -o out", 1),
        ("encode nowhere --pipeline nowhere/ -o out", 1),
        ("compile nowhere --target paper", 2),
        ("compile nowhere --target tensorrt-rtx", 1),
        ("compile nowhere --target torch-tensorrt --jobs 2", 2),
        ("sample nowhere --guidance nan", 2),
        ("sample nowhere", 1),
        ("verify nowhere --timesteps 0", 2),
        ("verify nowhere", 1),
        ("doctor --verbose", 2),
        ("doctor nowhere", 1),
        ("bench nowhere --batch 0", 2),
        ("bench nowhere --batch 2,two", 2),
        ("bench nowhere --size 100", 2),
        ("bench nowhere --target paper", 2),
        ("bench nowhere --device gpu", 2),
        ("bench nowhere -o report.txt", 2),
        ("bench nowhere", 1),
        ("eval nowhere --samples 1", 2),
        ("eval nowhere", 1),
        ("report nowhere --samples 0", 2),
        ("report nowhere --no-samples --seed 1", 2),
        ("report nowhere -o page.pdf", 2),
        ("report nowhere", 1),
    ],
)
def test_torch_is_not_imported(run: Run, line: str, code: int, tmp_path: Path) -> None:
    found, _, torch = run(*line.split(), cwd=tmp_path)
    assert (found, torch) == (code, False)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bundles: ``digits``, ``prompted``, ``compact``, and a work directory."""
    root: Path = tmp_path_factory.mktemp("bundles")
    write_as(root / "digits", pixels=True, name="sit-digits")
    write_as(root / "prompted", pixels=False, name="own", backbone="flux", classes=0, config={"guidance_embeds": True})
    write_bundle(root / "compact", segments=2, path="compact", capacity=8)
    (root / "digits.work").mkdir()
    return root


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("sample prompted", 2, "give --prompt, or --prompt-embeds"),
        ("sample prompted --prompt x", 2, "no text encoders of own are known; give --pipeline"),
        ("sample prompted --prompt x --pipeline gone/", 1, "cannot read text encoders and VAE from gone/: it does not"),
        ("sample prompted --prompt x --pipeline a/b --frames 2", 2, "own makes pictures; leave --frames out"),
        ("sample prompted --prompt x --pipeline a/b --height 17", 2, "--height is 17"),
        ("sample prompted --prompt-embeds gone", 1, "cannot read gone: it does not exist"),
        ("sample digits --labels 99", 2, "labels must be in [0, 10], 10 being no class: 99"),
        ("sample digits --guidance -1", 2, "--guidance is -1.0; give a number from 0"),
        ("sample digits --scheduler ddim", 2, "scheduler 'ddim' does not sample sit-digits; use euler"),
        (
            "sample digits --target tensorrt",
            2,
            "has no 'tensorrt' engines; it was built for onnx; run: dyexport compile ",
        ),
        ("sample digits --target paper", 2, "unknown target 'paper'"),
        ("sample digits.work", 1, "digits.work is the work directory of a build, whose bundle is next to it; give "),
        ("sample digits/manifest.json", 1, "digits/manifest.json is a file; give "),
        ("verify digits --small", 2, "--small does nothing here"),
        ("verify digits --reference gone", 1, "--reference gone does not exist; give --reference DIR"),
        ("verify digits --reference digits", 1, "--reference digits is no dynamic checkpoint; give"),
        ("verify digits --target tensorrt-rtx", 2, " --target tensorrt-rtx"),
        ("verify gone", 1, "gone does not exist; give the directory of a bundle"),
        ("bench digits --target tensorrt-rtx", 2, " --target tensorrt-rtx"),
        ("bench digits -o gone/x.md", 2, "-o is gone/x.md, and there is no directory gone; make it first"),
        ("bench digits -o digits/manifest.json/x.md", 2, "there is no directory digits/manifest.json"),
        ("compile digits --target tensorrt-rtx --profile foo=3", 2, "--profile names 'foo'; sit-digits has batch, "),
        ("bench digits --size 64", 2, "--size does nothing here"),
        ("bench digits --pipeline x", 2, "--pipeline does nothing here"),
        ("bench prompted --pipeline gone/", 1, "cannot read text encoders and VAE from gone/: it does not exist"),
        ("eval digits --clip x", 2, "--clip does nothing here"),
        ("report digits --prompt x", 2, "--prompt does nothing here: sit-digits samples from class labels"),
        ("report digits --vae x", 2, "--vae does nothing here: sit-digits samples pixels, not latents"),
        ("report digits --scheduler ddim", 2, "use euler"),
        ("report digits --target tensorrt", 2, "has no 'tensorrt' engines"),
        ("report prompted --prompt x", 2, "--prompt is for a pipeline that embeds it; give --pipeline too, or leave"),
        ("report prompted --pipeline gone/", 1, "cannot read text encoders and VAE from gone/: it does not exist"),
        ("deploy triton digits models --scheduler ddim", 2, "use euler"),
        ("deploy triton digits models --instances 0", 2, "--instances is 0"),
        ("deploy triton digits models --target tensorrt", 2, " --target tensorrt"),
        *(
            (
                f"{line} --target onnx-rtx",
                2,
                "skips tokens on the path 'compact', which allocates by data, and onnx-rtx",
            )
            for line in ("sample compact", "bench compact", "eval compact", "deploy triton compact models")
        ),
        ("deploy triton prompted models", 2, "own samples from prompts; give --pipeline"),
    ],
)
def test_a_manifest_is_enough_to_refuse(run: Run, line: str, code: int, message: str, bundles: Path) -> None:
    before = sorted(bundles.iterdir())
    found, err, torch = run(*line.split(), cwd=bundles, stream="err")
    assert (found, torch) == (code, False)
    assert message in err
    assert sorted(bundles.iterdir()) == before


def test_inspect_imports_no_torch(run: Run, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", objective="flow", segments=2)
    code, out, torch = run("inspect", str(bundle.root), "--json", cwd=tmp_path)
    assert (code, torch) == (0, False)
    assert len(json.loads(out)["segments"]) == 2
    code, out, torch = run("inspect", str(bundle.root), "--png", "widths.png", cwd=tmp_path)
    assert (code, torch) == (0, False)
    assert "attention heads" in out
