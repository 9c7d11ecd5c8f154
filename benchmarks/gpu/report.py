"""Records of what was measured, on what, and when; as JSON lines, as JSON, and as tables."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.sections import SECTIONS
from dyexport.bench.report import as_markdown
from dyexport.files import write_atomically

LIBRARIES = ("torch", "diffusers", "onnxruntime", "tensorrt", "tensorrt_rtx_bindings", "dyexport")
SPEED = ("section", "case", "FLOPs left", "executed", "ms dense", "ms slim", "speed-up", "realised", "per engine")
BUNDLE = ("section", "case", "build s", "compile s", "first picture s", "ms a step", "verify", "over dense")
TRAINING = ("section", "case", "s a step", "with the complete model", "GB at most", "GB estimated", "trained")

Record = dict[str, Any]


def circumstances(device: str, command: str) -> dict[str, str]:
    """Return what every record carries."""
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": "cpu" if device == "cpu" else torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "commit": _commit(),
        **{name: version for name in LIBRARIES if (version := _version(name)) is not None},
    }


def _version(library: str) -> str | None:
    try:
        return str(import_module(library).__version__)
    except Exception:  # some need a driver to be imported, which is as good as absent
        return None


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


class Results:
    """``gpu.jsonl``, ``gpu.json`` and ``gpu.md`` in a folder.

    A record is appended to the first at once, so that a run that is cut keeps what it measured, and several runs may
    write. The others hold the latest record of each case; a failure does not replace a measurement.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = folder / "gpu.jsonl"

    @property
    def records(self) -> dict[str, Record]:
        """The latest record of each case, by section and case. A line that was cut is passed over."""
        found: dict[str, Record] = {}
        for line in self._lines.read_text(encoding="utf-8").splitlines() if self._lines.exists() else ():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            key = f"{record['section']} {record['case']}"
            if "failure" not in record or "failure" in found.get(key, record):
                found[key] = record
        return found

    def add(self, section: str, case: str, record: Record) -> str:
        """Write a record; return its line of the table."""
        record = {"section": section, "case": case, **record}
        self._folder.mkdir(parents=True, exist_ok=True)
        cut = self._lines.exists() and not self._lines.read_bytes().endswith(b"\n")
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rewrite()
        return " | ".join(_row(record))

    def rewrite(self) -> None:
        """Write ``gpu.json`` and ``gpu.md`` from the lines of ``gpu.jsonl``, which may be those of several machines."""
        write_atomically(self._folder / "gpu.json", f"{json.dumps(self.records, indent=1)}\n".encode())
        write_atomically(self._folder / "gpu.md", self.tables().encode())

    def tables(self) -> str:
        """Return a table for each kind of record, and where and when they were made."""
        records = list(self.records.values())
        parts = []
        for kind, header in HEADERS.items():
            if rows := [_row(record) for record in records if SECTIONS[record["section"]].kind == kind]:
                parts.append(as_markdown(header, rows))
        made = {(r["device"], r["torch"], r["commit"], r["date"][:10]) for r in records}
        notes = (f"{device}, torch {torch_}, commit {commit}, {day}.\n" for device, torch_, commit, day in sorted(made))
        return "\n".join((*parts, *notes))


def _row(record: Record) -> tuple[str, ...]:
    kind = SECTIONS[record["section"]].kind
    if "failure" in record:
        cells: tuple[str, ...] = (_cell(record["failure"]),)
    else:
        cells = ROWS[kind](record)
    blank = [""] * (len(HEADERS[kind]) - 2 - len(cells))
    return (record["section"], record["case"], *cells, *blank)


def _cell(text: str) -> str:
    return text.replace("|", "/")


def _speed(record: Record) -> tuple[str, ...]:
    seconds = record["seconds"]
    return (
        f"{record['network_flops_ratio']:.3f}",
        f"{record['executed_flops_ratio']:.3f}",
        f"{seconds[record['measure']] * 1e3:.2f} ({record['measure']})",
        f"{seconds['dynamic'] * 1e3:.2f}",
        f"{record['speedup']:.2f}",
        f"{record['realised']:.2f}",
        ", ".join(f"{engine['realised']:.2f}" for engine in record["engines"]),
    )


def _bundle(record: Record) -> tuple[str, ...]:
    shown: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "build": lambda step: f"{step['seconds']:.0f}",
        "compile": lambda step: f"{step['seconds']:.0f}",
        "sample": lambda step: f"{step['cold']:.2f}",
        "step": lambda step: f"{step['seconds_per_step'] * 1e3:.1f} ({step['device']})",
        "verify": lambda step: _verdict(step["output"]),
        "bench": lambda step: _speedup(step["output"]),
    }
    steps = {**record["steps"], "step": record["steps"].get("sample")}
    return tuple(_step(steps.get(name), show) for name, show in shown.items())


def _step(step: Mapping[str, Any] | None, show: Callable[[Mapping[str, Any]], str]) -> str:
    if step is None:
        return ""
    return _cell(step["failure"]) if "failure" in step else show(step)


def _verdict(output: Mapping[str, Any]) -> str:
    error = "not a number" if output["error"] is None else f"{output['error']:.1e}"
    return f"{'passed' if output['passed'] else 'FAILED'}: {error} of {output['tolerance']:g}"


def _speedup(output: Mapping[str, Any]) -> str:
    ratio = output["speedup_vs_dense"]
    return "rounds disagree" if ratio is None else f"{ratio:.2f}"


def _training(record: Record) -> tuple[str, ...]:
    peak = record["peak_bytes"]
    return (
        f"{record['seconds_dynamic']:.2f}",
        f"{record['seconds_complete']:.2f}",
        "" if peak is None else f"{peak / 1e9:.1f}",
        f"{record['estimated_bytes'] / 1e9:.1f}",
        f"{record['trainable_parameters'] / 1e6:.0f} M",
    )


HEADERS = {"speed": SPEED, "bundle": BUNDLE, "training": TRAINING}
ROWS = {"speed": _speed, "bundle": _bundle, "training": _training}
