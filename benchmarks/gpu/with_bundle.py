"""The shipped path: a bundle of random weights is built, compiled, sampled from, verified and timed.

Compiling, verifying and timing are commands in separate processes, with ``--json``, as on a user's machine. One
that fails is recorded and the others go on.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import dyexport
from benchmarks.gpu.settings import Settings
from dyexport.bundle.manifest_file import MANIFEST
from dyexport.errors import DyexportError, UsageError, reason

CASE = re.compile(r"(?P<model>[^:@]+):(?P<precision>fp32|fp16|bf16)(:(?P<target>[a-z-]+))?")
BUDGET, ENGINES, SAMPLE_STEPS, TIMESTEPS = 0.5, 2, 10, 8
ROOT = Path(__file__).parents[2]


def build_case(text: str, settings: Settings) -> dict[str, Any]:
    """Build a bundle, or find it built. Raises ``UsageError`` for a case that is not MODEL:PRECISION."""
    if (found := CASE.fullmatch(text)) is None:
        raise UsageError(f"case {text!r} is not MODEL:PRECISION[:TARGET], such as dit-xl-2:fp16:onnx")
    return {"steps": {"build": attempt(lambda: describe(build(found["model"], found["precision"], settings)))}}


def measure_bundle(text: str, settings: Settings) -> dict[str, Any]:
    """Build a bundle, and run it on the device. Raises what the build raises, and ``UsageError`` for another case."""
    found = CASE.fullmatch(text)
    if found is None or found["target"] is None:
        raise UsageError(f"case {text!r} is not MODEL:PRECISION:TARGET, such as dit-xl-2:fp16:onnx")
    begin = perf_counter()
    root, target = build(found["model"], found["precision"], settings).root, found["target"]
    steps: dict[str, Any] = {"build": {"seconds": perf_counter() - begin}}
    if target != "onnx":
        steps["compile"] = attempt(lambda: command(settings, "compile", str(root), "--target", target))
    steps["sample"] = attempt(lambda: sample(root, target, settings))
    flags = ("--target", target)
    steps["verify"] = attempt(lambda: command(settings, "verify", str(root), *flags, "--timesteps", str(TIMESTEPS)))
    steps["bench"] = attempt(
        lambda: command(settings, "bench", str(root), *flags, "--no-compile", "--rounds", str(settings.rounds))
    )
    return {"target": target, "steps": steps}


def build(model: str, precision: str, settings: Settings) -> dyexport.Bundle:
    """Build a bundle of random weights, with the dense graph to compare with.

    A finished one is used as it is: it may have engines that were compiled since.
    """
    out = settings.work / f"{model}-{precision}"
    if (out / MANIFEST).exists():
        return dyexport.Bundle.open(out)
    return dyexport.build(
        model,
        budget=BUDGET,
        random_weights=True,
        engines=ENGINES,
        precision=precision,
        out=out,
        baseline=True,
    )


def describe(bundle: dyexport.Bundle) -> dict[str, Any]:
    plan = bundle.manifest.plan
    return {"network_flops_ratio": plan.network_flops_ratio, "executed_flops_ratio": plan.executed_flops_ratio}


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the seconds and the results of a step, or the sentence of its failure."""
    begin = perf_counter()
    try:
        result = measure()
    except Exception as error:
        result = {"failure": f"{type(error).__name__}: {reason(error)}"}
    return {"seconds": perf_counter() - begin, **result}


def sample(root: Path, target: str, settings: Settings) -> dict[str, Any]:
    """Sample twice on the device: the first time engines are loaded, the second they are there."""
    transformer = dyexport.load(root, target=target, device=settings.device, fallback=False)
    try:
        cold, warm = (_timed_sample(transformer) for _ in range(2))
        return {"device": str(transformer.device), "cold": cold, "warm": warm, "seconds_per_step": warm / SAMPLE_STEPS}
    finally:
        transformer.close()


def _timed_sample(transformer: Any) -> float:
    begin = perf_counter()
    samples = dyexport.sample(transformer, labels=[0], steps=SAMPLE_STEPS)
    if not bool(torch.isfinite(samples.values).all()):
        raise DyexportError("the samples hold values that are not finite")
    return perf_counter() - begin


def command(settings: Settings, *arguments: str) -> dict[str, Any]:
    """Run ``dyexport`` with ``--json``, and return its output. Raises ``DyexportError`` with its last line.

    A command that takes too long is ended with the processes that it started.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the commands take a GPU where there is one
    line = [sys.executable, "-m", "dyexport", *arguments, "--json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=settings.patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise DyexportError(f"dyexport {arguments[0]} took more than {settings.patience:.0f} s") from None
    if not out.strip():
        last = (err.strip().splitlines() or ["no message"])[-1]
        raise DyexportError(f"dyexport {arguments[0]} exits with {process.returncode}: {last}")
    return {"exit_code": process.returncode, "output": json.loads(out)}
