"""Training data that the model samples itself: a stopped build goes on after its last shard."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Lock
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dyexport.checkpoints.blockwise import load_frozen
from dyexport.checkpoints.static import WEIGHTS, save_static
from dyexport.errors import UsageError
from dyexport.models.random_weights import random_backbone
from dyexport.pipeline import steps
from dyexport.pipeline.build import build_bundle, finetune_model, make_static_model, opened
from dyexport.pipeline.model_stages import static_model
from dyexport.pipeline.run import Run
from dyexport.pipeline.settings import BuildSettings
from dyexport.stages.ledger import NullListener
from dyexport.training.prompts import kept_prompts
from dyexport.training.synthetic import SHARD_SAMPLES
from dyexport.training.synthetic_config import SyntheticConfig, parse_synthetic
from tests.pipeline.tiny import TINY, tiny_settings

ROOT = Path(__file__).parents[2]
SYNTHETIC: dict[str, Any] = {"data": "synthetic", "finetune_steps": 0}


class StopsAt(NullListener):
    """Presses Ctrl-C where sampling has come so far, and remembers where it began."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.begin: float | None = None

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage != "synthetic":
            return
        self.begin = done / total if self.begin is None else self.begin
        if done / total >= self.share:
            raise KeyboardInterrupt


def test_an_interrupted_build_keeps_the_shards_it_has(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, **SYNTHETIC)
    begins = []
    for shards in (2.5, 3.5):
        listener = StopsAt(shards * SHARD_SAMPLES / 4096)
        with pytest.raises(KeyboardInterrupt), opened(settings, listener) as run:
            finetune_model(run)
        begins.append(listener.begin)
    assert begins[1] == 2 * SHARD_SAMPLES / 4096


def start(root: Path) -> subprocess.Popen[bytes]:
    options = ["-m", "sit-tiny", "-b", "0.5", "--random-weights", "--finetune-steps", "0", "--data", "synthetic"]
    options += ["--synthetic", "samples=250,steps=60", "--work", str(root / "work")]
    command = [sys.executable, "-m", "dyexport", "finetune", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def shards_of(root: Path) -> dict[str, tuple[int, int]]:
    """Finished shards: which file each is, and when it was written."""
    found = {path.name: path.stat() for path in (root / "work").rglob("synthetic-*.safetensors")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


def test_a_killed_build_samples_no_shard_again(tmp_path: Path) -> None:
    process = start(tmp_path)
    while len(shards_of(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = shards_of(tmp_path)
    assert 2 <= len(kept) < 4
    assert start(tmp_path).wait() == 0
    assert {name: written for name, written in shards_of(tmp_path).items() if name in kept} == kept

    sampled = SyntheticConfig(samples=250, steps=60)
    undisturbed = tiny_settings(tmp_path / "undisturbed", **SYNTHETIC, synthetic=sampled)
    with opened(undisturbed, NullListener()) as run:
        finetune_model(run)
    expected = {path.name: path.read_bytes() for path in (undisturbed.work / "synthetic").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "work" / "synthetic").iterdir()} == expected
    assert len(expected) == 4
    assert not (tmp_path / "work" / "training").exists()


def test_what_is_sampled_is_as_many_as_asked_for_and_asking_otherwise_samples_again(tmp_path: Path) -> None:
    few = tiny_settings(tmp_path, **SYNTHETIC, synthetic=SyntheticConfig(samples=6, steps=2))
    digests = []
    for sampling in ("samples=6,steps=2", "samples=6,steps=3", "samples=6,steps=2,guidance=4"):
        with opened(replace(few, synthetic=parse_synthetic(sampling)), NullListener()) as run:
            assert len(finetune_model(run).data.source) == 6
            digests.append(run.ledger.outcomes["synthetic"].digest)
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("many", "'many' is not one of samples, steps and guidance"),
        ("samples=2,samples=3", "once each"),
        ("samples=1.5", "samples is '1.5'; give a number"),
        ("samples=0", "samples of synthetic data is 0"),
        ("steps=1001", "steps of synthetic data is 1001; give 1 to 1000"),
        ("guidance=nan", "guidance of synthetic data is nan"),
        ("guidance=-1", r"guidance of synthetic data is -1\.0"),
    ],
)
def test_bad_values_are_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_synthetic(text)


@pytest.mark.parametrize(
    ("model", "steps", "guidance"), [("flux", 28, 3.5), ("flux-schnell", 4, None), ("latte", 50, 7.5)]
)
def test_a_model_is_sampled_as_usual_unless_told(
    model: str, steps: int, guidance: float | None, tmp_path: Path
) -> None:
    settings = BuildSettings(model=model, budget=0.5, data="synthetic", out=tmp_path / "out", work=tmp_path / "work")
    assert (settings.sampling.samples, settings.sampling.steps, settings.sampling.guidance) == (4096, steps, guidance)
    asked = replace(settings, synthetic=SyntheticConfig(samples=8, steps=2))
    assert (asked.sampling.samples, asked.sampling.steps, asked.sampling.guidance) == (8, 2, guidance)


def test_where_it_does_nothing_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--synthetic says how --data synthetic is sampled"):
        tiny_settings(tmp_path, data="digits", synthetic=SyntheticConfig(samples=6))
    given = {"budget": 0.5, "out": tmp_path / "out", "work": tmp_path / "work", "data": "synthetic"}
    with pytest.raises(UsageError, match="guidance of synthetic data is 2, and flux-schnell is sampled without"):
        BuildSettings(model="flux-schnell", **given, synthetic=SyntheticConfig(guidance=2.0))


def test_embedded_prompts_are_kept(tmp_path: Path) -> None:
    import torch

    calls = []

    def embed() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"encoder_hidden_states": torch.ones(2, 3)}

    file = tmp_path / "prompts.safetensors"
    for _ in range(2):
        assert torch.equal(kept_prompts(file, embed, "these")["encoder_hidden_states"], torch.ones(2, 3))
    assert len(calls) == 1
    kept_prompts(file, embed, "others")
    assert len(calls) == 2
    assert load_file(file).keys() == {"encoder_hidden_states"}


class RecordingListener(NullListener):
    """Keeps what stages report."""

    def __init__(self) -> None:
        self.reports: dict[str, list[tuple[int, int]]] = {}

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None:
        self.reports.setdefault(stage, []).append((done, total))


def test_every_slow_stage_says_how_far_it_is(tmp_path: Path) -> None:
    """In steps that are short against the stage, from its beginning to its end."""
    sampled = SyntheticConfig(samples=6, steps=5)
    steps = {"data": "synthetic", "synthetic": sampled, "finetune_steps": 4}
    listener = RecordingListener()
    with opened(tiny_settings(tmp_path, budget=1.0, engines=2, **steps), listener) as run:
        build_bundle(run)
    assert listener.reports["synthetic"] == [(step, 5) for step in range(6)]
    assert listener.reports["dynamic"][-5:] == [(step, 4) for step in range(5)]
    done, total = zip(*listener.reports["weights"], strict=True)
    assert len(done) > 20
    assert set(total) == {done[-1]}
    graphs = [report for stage, report in listener.reports.items() if stage.startswith("onnx ")]
    assert graphs == [[(place, len(graphs))] for place in range(len(graphs))]


class Member:
    """One thread of a group that works as processes do."""

    def __init__(self, index: int, barrier: Barrier, said: list[str]) -> None:
        self.index, self.count, self.is_main_process = index, barrier.parties, index == 0
        self._barrier, self._said = barrier, said

    def broadcast(self, value: str) -> str:
        if self.is_main_process:
            self._said[:] = [value]
        self._barrier.wait(60)
        (value,) = self._said
        self._barrier.wait(60)
        return value


def test_the_members_of_a_group_share_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_at_a_time = Lock()

    def load_in_turn(*arguments: Any) -> Any:
        with one_at_a_time:
            return load_frozen(*arguments)

    monkeypatch.setattr(steps, "load_frozen", load_in_turn)
    sampled = SyntheticConfig(samples=2 * SHARD_SAMPLES + 2, steps=2)
    settings = tiny_settings(tmp_path / "group", **SYNTHETIC, synthetic=sampled)
    listeners, barrier, said = [RecordingListener(), RecordingListener()], Barrier(2), [""]
    settings.work.mkdir(parents=True)
    static_model(Run(settings, NullListener()), None, None)  # beforehand: threads share torch's random numbers
    with ThreadPoolExecutor(2) as pool:
        runs = [Run(settings, listeners[place], group=Member(place, barrier, said)) for place in range(2)]
        models = list(pool.map(make_static_model, runs))
    assert [listener.reports["synthetic"][-1] for listener in listeners] == [(4, 4), (2, 2)]
    alone = tiny_settings(tmp_path / "alone", **SYNTHETIC, synthetic=sampled)
    with opened(alone, NullListener()) as run:
        make_static_model(run)
    expected = {path.name: path.read_bytes() for path in (alone.work / "synthetic").iterdir()}
    assert {path.name: path.read_bytes() for path in (settings.work / "synthetic").iterdir()} == expected
    assert len(expected) == 3
    assert not (settings.work / "training").exists()
    assert {model.data.digest for model in models} == {models[0].data.digest}


def test_a_checkpoint_is_checked_tensor_by_tensor(tmp_path: Path) -> None:
    save_static(random_backbone(TINY, seed=time.time_ns()), tmp_path / "static")  # seen before, it is not checked again
    listener = RecordingListener()
    given = {"random_weights": False, "checkpoint": str(tmp_path / "static"), "finetune_steps": 0}
    with opened(tiny_settings(tmp_path, **given), listener) as run:
        tensors = len(load_file(make_static_model(run).static.path / WEIGHTS))
    assert listener.reports["static"] == [(done, tensors) for done in range(1, tensors + 1)]
