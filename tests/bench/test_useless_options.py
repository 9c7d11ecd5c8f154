"""An option that would do nothing is refused, and so is one that would be dropped."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dyexport import cli
from dyexport.bundle.manifest import EngineRecord
from dyexport.checkpoints.dynamic import save_dynamic
from dyexport.cli import main
from dyexport.models.random_weights import random_dynamic
from dyexport.presets import get_preset
from tests.runtime.bundles import TinyBundle, write_bundle, write_manifest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``dyexport`` in an empty directory: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dyexport", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return command


def write_as(root: Path, *, pixels: bool, **changes: Any) -> TinyBundle:
    """A bundle as another model's looks to what reads its manifest alone."""
    bundle = write_bundle(root, objective="flow", pixels=pixels)
    names = sorted(path.stem for path in (root / "graphs").glob("*.onnx"))
    engines = [EngineRecord(target="onnx", network=name, path=f"graphs/{name}.onnx") for name in names]
    write_manifest(root, bundle.spec.model_copy(update=changes), bundle.plan, engines)
    return bundle


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return write_as(tmp_path_factory.mktemp("digits") / "bundle", pixels=True, name="sit-digits")


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    changes = {"name": "flux-schnell", "backbone": "flux", "classes": 0, "config": {"guidance_embeds": False}}
    return write_as(tmp_path_factory.mktemp("prompted") / "bundle", pixels=False, **changes)


@pytest.fixture
def routed(tmp_path: Path) -> Path:
    """A dynamic checkpoint."""
    preset = get_preset("sit-tiny")
    save_dynamic(random_dynamic(preset), tmp_path / "routed", preset)
    return tmp_path / "routed"


FROM_LABELS = [("sample", f"--{name}", value) for name, value in (
    ("prompt", "a cat"), ("prompt-embeds", "x"), ("pipeline", "x"), ("height", "64"), ("width", "64"), ("frames", "1"),
    ("vae", "x"),
)]  # fmt: skip
FROM_PROMPTS = [("sample", "--labels", "1"), ("sample", "--scheduler", "euler"), ("sample", "--guidance", "2")]
WITHOUT_CONTROL = [("eval", "--work", "x")]
EVAL_OF_LABELS = [("eval", f"--{name}", value) for name, value in (
    ("pipeline", "x"), ("clip", "x"), ("size", "64"), ("vae", "x"), ("prompts", __file__),
)]  # fmt: skip
EVAL_OF_PROMPTS = [("eval", f"--{name}", value) for name, value in (
    ("vae", "x"), ("classifier", "x"), ("scheduler", "euler"), ("guidance", "2"), ("clip", "x"), ("features", "x"),
    ("subset", "9"),
)]  # fmt: skip
OTHERS = [
    ("verify", "--small", None),
    ("deploy triton", "--max-pixels", "4194304"),
    ("deploy triton", "--max-prompt", "10"),
]
OF_PLANS = {"engines": "4", "compute-capability": "8.6", "profile": "batch=1:1:1", "stream-weights": None}
OF_ENGINES = {"target": "onnx", "token-path": "auto", "quantize": "int8", "baseline": None}
OF_CALIBRATION = {"precision": "fp32", "memory": "1GiB"}
OF_MODEL = {"model": "dit-digits", "budget": "0.5", "finetune-steps": "2", "precision": "fp32", "seed": "0"}
NOT_READ = {
    "finetune": OF_PLANS | OF_ENGINES | OF_CALIBRATION | {"out": "x"},
    "calibrate": OF_PLANS | OF_ENGINES | {"out": "x"},
    "plan": OF_PLANS | {"out": "x"},
    "export": OF_MODEL,
    "bench": {"model": "dit-digits", "random-weights": None, "engines": "2"},
}
STAGES = [(command, f"--{name}", value) for command, names in NOT_READ.items() for name, value in names.items()]

Option = tuple[str, str, "str | None"]


def refused(run: Run, option: Option, *arguments: object) -> None:
    """In one sentence that names it, and nothing is written."""
    command, name, value = option
    code, out, err = run(*command.split(), *arguments, name, *([] if value is None else [value]))
    assert (code, out) == (2, "")
    assert err.startswith(f"dyexport: {name} does nothing here: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", FROM_LABELS + WITHOUT_CONTROL + EVAL_OF_LABELS, ids=str)
def test_what_a_bundle_of_labels_does_not_read(run: Run, digits: TinyBundle, option: Option, tmp_path: Path) -> None:
    refused(run, option, digits.root)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", FROM_PROMPTS, ids=str)
def test_what_a_bundle_of_prompts_does_not_read(run: Run, prompted: TinyBundle, option: Option) -> None:
    refused(run, option, prompted.root, "--prompt", "a cat")


@pytest.mark.parametrize("option", EVAL_OF_PROMPTS, ids=str)
def test_what_an_evaluation_of_prompts_does_not_read(run: Run, prompted: TinyBundle, option: Option) -> None:
    refused(run, option, prompted.root)


@pytest.mark.parametrize("option", OTHERS, ids=str)
def test_what_the_rest_does_not_read(run: Run, digits: TinyBundle, option: Option) -> None:
    refused(run, option, digits.root, *(["models"] if option[0].startswith("deploy") else []))


def test_what_another_target_does_not_read(run: Run, flow: TinyBundle) -> None:
    refused(run, ("bench", "--share-weights", None), flow.root, "--target", "tensorrt")
    refused(run, ("inspect", "--png", "x.png"), flow.root, "--engine", "tensorrt-rtx/segment-00")


@pytest.mark.parametrize("option", STAGES, ids=str)
def test_a_command_has_no_option_that_it_does_not_read(run: Run, option: Option, tmp_path: Path) -> None:
    command, name, value = option
    code, out, err = run(command, "x", name, *([] if value is None else [value]))
    assert (code, out) == (2, "")
    assert err.startswith(f"dyexport: No such option: {name}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--router free", "--finetune-steps 0"])
def test_routers_that_are_there_are_taken_as_they_are(run: Run, routed: Path, option: str) -> None:
    name, value = option.split()
    refused(run, ("build", name, value), "--checkpoint", routed)


def test_token_paths_are_for_models_that_skip_tokens(run: Run) -> None:
    without = ("-m", "dit-s-2", "-b", "0.5", "--random-weights", "--finetune-steps", "0")
    refused(run, ("build", "--token-path", "capacity"), *without)


@pytest.mark.parametrize("name", ["x.mp4", "x.gif", "x.jpg", "x.safetensors"])
def test_a_picture_goes_into_no_other_kind_of_file(run: Run, flow: TinyBundle, name: str, tmp_path: Path) -> None:
    code, out, err = run("sample", flow.root, "--labels", "1", "--steps", 1, "-o", name)
    assert (code, out, err) == (2, "", f"dyexport: -o is {name}; a picture goes into .png\n")
    assert list(tmp_path.iterdir()) == []


def commands() -> Iterator[tuple[str, Any]]:
    for name in cli.COMMANDS:
        command = cli.load_command(name)
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {sub}", found) for sub, found in inner.items()) if inner else [(name, command)]


COMMANDS = dict(commands())


def valued(command: Any) -> list[Any]:
    options = [each for each in command.params if each.param_type_name == "option" and not each.is_flag]
    return [each for each in options if not each.multiple]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_takes_the_place_of_another(run: Run, command: str) -> None:
    for option in valued(COMMANDS[command]):
        name = max(option.opts, key=len)
        code, out, err = run(*command.split(), name, "1", name, "2")
        assert (code, out) == (2, "")
        assert err == f"dyexport: {name} is given 2 times; give it once\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_value_is_none(run: Run, command: str, tmp_path: Path) -> None:
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name != "option" or parameter.is_flag or parameter.name == "prompt":
            continue
        name = max(parameter.opts, key=len)
        code, out, err = run(*command.split(), name, "")
        assert (code, out) == (2, "")
        assert err == f"dyexport: {name} is empty; give a value, or leave it out\n"
    assert list(tmp_path.iterdir()) == []


def test_debug_is_an_option_and_not_a_word(run: Run, prompted: TinyBundle) -> None:
    code, _, err = run("sample", prompted.root, "--labels", "1", "--prompt", "--debug")
    assert (code, err.count("\n")) == (2, 1)
    assert "Traceback" in run("sample", prompted.root, "--labels", "1", "--debug")[2]


def test_a_terminal_that_knows_ascii_alone_is_written_to(
    monkeypatch: pytest.MonkeyPatch, ddpm: TinyBundle, tmp_path: Path
) -> None:
    for arguments in (("inspect", ddpm.root), ("deploy", "triton", ddpm.root, tmp_path / "größe")):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "argv", ["dyexport", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
        with pytest.raises(SystemExit) as exit_:
            main()
        sys.stdout.flush()
        text = written.getvalue().decode("ascii")
        assert not exit_.value.code, text
        assert "\\u" not in text
    assert str(tmp_path / "gr\\xf6\\xdfe" / ddpm.root.name) in text
