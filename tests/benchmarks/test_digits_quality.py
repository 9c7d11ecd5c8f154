"""The digits benchmark in short: every kind of model is trained, judged, and read back by the command as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.digits_quality import loss_of, main
from dyexport.slicing.slicer import spec_of
from dyexport.training.data import digits
from tests.pipeline.tiny import TINY

MODELS = ("static", "control", "rank=1,experts=2,bias=all")
SHORT = "--train-steps 3 --finetune-steps 3 --samples 20 --repeats 2 --steps 2 --seeds 0 --engines 1"


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    main(["--model", TINY.name, "--work", str(folder / "work"), "--results", str(folder), *SHORT.split(), *arguments])
    whole: dict[str, Any] = json.loads((folder / f"{TINY.name}_quality_3_3.json").read_text())
    return whole


@pytest.mark.slow
@pytest.mark.build
def test_models_trained_one_by_one_are_read_back_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [run(tmp_path, "--models", name)["runs"] for name in MODELS]
    monkeypatch.setattr("benchmarks.digits_quality.scores_of", lambda *_: pytest.fail("judged again"))
    capsys.readouterr()
    whole = run(tmp_path, "--models", *MODELS)
    assert whole["runs"] == [each for part in parts for each in part]
    assert [each["run"] for each in whole["runs"]] == list(MODELS)
    for value in ("frechet", "loss_train", "loss_held_out"):
        assert len({each[value] for each in whole["runs"]}) == len(MODELS)
        assert all(each[value] > 0 for each in whole["runs"])
    _, control, lora = whole["mean"].values()
    assert 0 < lora["trainable_share"] < 0.2
    assert f"| {lora['frechet'] / control['frechet']:.2f} |" in capsys.readouterr().out


def test_losses_are_of_the_network_over_all_digits() -> None:
    """A network that says nothing is off by the target: the mean square of data minus noise."""
    spec = spec_of(TINY, TINY.transformer_config())
    clean = digits("train").latents
    silent = lambda **inputs: SimpleNamespace(sample=torch.zeros_like(inputs["hidden_states"]))  # noqa: E731
    expected = float(clean.square().mean()) + 1.0
    assert loss_of(silent, spec, "train") == pytest.approx(expected, rel=0.01)
