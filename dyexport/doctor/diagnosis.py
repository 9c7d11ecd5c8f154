"""The whole diagnosis, as ``dyexport doctor`` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dyexport.bundle.reader import Bundle
from dyexport.doctor.bundles import EngineFit, fit_bundle
from dyexport.doctor.machine import Host, find_accelerators
from dyexport.doctor.probing import Findings
from dyexport.doctor.targets import Machine, Verdict, judge_all


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """``bundle`` has one entry for each target; None without a bundle. ``problems`` are failures by probe.

    ``hashed`` tells whether the files of the bundle were compared with their hashes; None without a bundle.
    """

    machine: Machine
    targets: tuple[Verdict, ...]
    bundle: tuple[EngineFit, ...] | None
    hashed: bool | None
    problems: Mapping[str, str]

    @property
    def passed(self) -> bool:
        """True if a target runs here, and with a bundle one of its engines."""
        if self.bundle is None:
            return any(verdict.device is not None for verdict in self.targets)
        return any(fit.fitting for fit in self.bundle)

    def as_json(self) -> dict[str, Any]:
        fits = (
            None
            if self.bundle is None
            else [{**asdict(fit), "fits_in_memory": fit.fits_in_memory} for fit in self.bundle]
        )
        return {
            "passed": self.passed,
            "host": asdict(self.machine.host),
            "accelerators": asdict(self.machine.accelerators),
            "targets": [asdict(verdict) for verdict in self.targets],
            "bundle": fits,
            "hashed": self.hashed,
            "problems": dict(self.problems),
        }


def diagnose(
    host: Host,
    findings: Findings,
    bundle: Bundle | None = None,
    path: Path | None = None,
    hashed: bool | None = None,
) -> Diagnosis:
    """Import torch and judge every target, and the engines of ``bundle``, which was opened at ``path``."""
    machine = Machine(host=host, accelerators=find_accelerators(findings))
    verdicts = judge_all(machine)
    fits = None if bundle is None else fit_bundle(bundle, path or bundle.root, verdicts, machine, findings)
    return Diagnosis(machine=machine, targets=verdicts, bundle=fits, hashed=hashed, problems=findings.problems)
