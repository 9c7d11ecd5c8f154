"""Records of what was measured, on what, and when; as JSON to keep and as a table to read."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dyexport.bench.report import as_markdown

HEADER = ("section", "case", "FLOPs left", "executed", "ms dense", "ms slim", "speed-up", "realised", "per engine")
LIBRARIES = ("torch", "diffusers", "onnxruntime", "tensorrt", "tensorrt_rtx_bindings", "dyexport")


def circumstances(device: str, command: str) -> dict[str, str]:
    """What every record carries."""
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
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


class Results:
    """``gpu.json`` and ``gpu.md`` in a folder. Each record is written at once; measuring again replaces it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / "gpu.json"
        self.records: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def add(self, section: str, case: str, record: dict[str, Any]) -> str:
        """Its line of the table."""
        record = {"section": section, "case": case, **record}
        self.records[f"{section} {case}"] = record
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self.records, indent=1) + "\n", encoding="utf-8")
        (self._folder / "gpu.md").write_text(self.table(), encoding="utf-8")
        return " | ".join(_row(record))

    def table(self) -> str:
        """One line for each record, and where and when they were made."""
        made = {(r["device"], r["torch"], r["commit"], r["date"][:10]) for r in self.records.values()}
        notes = (
            f"\n{device}, torch {torch_}, commit {commit}, {day}.\n" for device, torch_, commit, day in sorted(made)
        )
        return as_markdown(HEADER, [_row(record) for record in self.records.values()]) + "".join(notes)


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    if "failure" in record:
        return (record["section"], record["case"], record["failure"].replace("|", "/"), *[""] * (len(HEADER) - 3))
    seconds = record["seconds"]
    return (
        record["section"],
        record["case"],
        f"{record['network_flops_ratio']:.3f}",
        f"{record['executed_flops_ratio']:.3f}",
        f"{seconds[record['measure']] * 1e3:.2f} ({record['measure']})",
        f"{seconds['dynamic'] * 1e3:.2f}",
        f"{record['speedup']:.2f}",
        f"{record['realised']:.2f}",
        ", ".join(f"{engine['realised']:.2f}" for engine in record["engines"]),
    )
