"""The section on the comparison with the masked model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dyexport.report.contents import Table, Verified

if TYPE_CHECKING:
    from dyexport.verification.report import SegmentErrors, VerifyReport


def verified_of(report: VerifyReport | str) -> Verified:
    """Describe a verification, or repeat the reason why there is none."""
    if isinstance(report, str):
        return Verified(passed=None, sentence=f"Not compared: {report}.")
    result = "equals" if report.passed else "DIFFERS FROM"
    sentence = (
        f"Target {report.target} on {report.device} {result} the masked model at {report.timesteps} timesteps: largest "
        f"error {_error(report.error)}, at most {report.tolerance:g} passes; {report.wrong_gates} of {report.gates} "
        f"gates are wrong."
    )
    if report.golden is not None and report.golden.dense_compared:
        sentence += f" The dense network differs by {_error(report.golden.dense_error)}."
    rows = tuple(_row(segment) for segment in report.segments)
    table = Table(title="By engine", header=("engine", "t", "timesteps", "largest error"), rows=rows)
    return Verified(passed=report.passed, sentence=sentence, table=table)


def _row(segment: SegmentErrors) -> tuple[str, ...]:
    error = _error(segment.error) if segment.compared else "not compared"
    return str(segment.segment), f"{segment.start:.4g} to {segment.end:.4g}", str(segment.compared), error


def _error(error: float | None) -> str:
    return "not a number" if error is None else f"{error:.2e}"
