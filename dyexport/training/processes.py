"""Several processes on one build, as ``accelerate launch`` starts them: one leads, all train."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Protocol

PATIENCE = timedelta(days=2)  # followers wait while the leader samples or calibrates


class ProcessGroup(Protocol):
    """``leads`` is true in exactly one process, which alone writes to the work directory."""

    leads: bool

    def agree(self, value: str) -> str:
        """The leader's value, in every process; they go on together."""


class SingleProcess:
    leads = True

    def agree(self, value: str) -> str:
        return value


class Processes:
    def __init__(self) -> None:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # Unless told, PartialState does not look where Accelerator does for whether to train on CPUs.
        state: Any = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
        self.leads = bool(state.is_main_process)

    def agree(self, value: str) -> str:
        from accelerate.utils import broadcast_object_list

        values = [value]
        broadcast_object_list(values)
        return values[0]


def find_process_group() -> ProcessGroup:
    return Processes() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else SingleProcess()
