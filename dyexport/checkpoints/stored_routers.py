"""Routers that come with a checkpoint. Imports no torch for directories."""

from __future__ import annotations

from pathlib import Path

from dyexport.bundle.spec import Widths
from dyexport.checkpoints.locate import SHOWN, read_json
from dyexport.checkpoints.structure import DYNAMIC
from dyexport.errors import CheckpointError


def stored_widths(checkpoint: str | None) -> Widths | None:
    """Return the widths of a checkpoint that has routers; None for any other. For a single file this imports torch.

    Raises ``CheckpointError``.
    """
    if checkpoint is None or not _has_routers(Path(checkpoint)):
        return None
    stored = Path(checkpoint) / DYNAMIC
    return "static" if stored.is_file() and read_json(stored).get("router") == "static" else "dynamic"


def stored_budgets(checkpoint: str | None) -> tuple[float, ...]:
    """Return the budgets of a dynamic checkpoint that was trained for several; () for any other."""
    stored = Path(checkpoint) / DYNAMIC if checkpoint is not None else None
    return tuple(read_json(stored).get("budgets") or ()) if stored is not None and stored.is_file() else ()


def _has_routers(checkpoint: Path) -> bool:
    try:
        if not checkpoint.is_file():
            return (checkpoint / DYNAMIC).is_file()
    except OSError as error:
        raise CheckpointError(f"cannot read {str(checkpoint)[:SHOWN]!r}: {error.strerror}; give another") from error
    from dyexport.checkpoints.dialects import has_routers

    return has_routers(checkpoint)
