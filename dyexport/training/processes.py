"""Several processes on one build, as ``accelerate launch`` starts them: all train and sample, one does the rest."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta
from typing import Any, TypeVar

from dyexport.stages.ledger import ProcessGroup, SingleProcess

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # the others wait while the main process encodes data


class AccelerateProcesses:
    """The processes that ``accelerate launch`` started."""

    def __init__(self) -> None:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env

        # By default PartialState ignores the variable by which Accelerator decides to train on CPUs.
        state: Any = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
        self.is_main_process = bool(state.is_main_process)
        self.index, self.count = int(state.process_index), int(state.num_processes)
        atexit.register(state.destroy_process_group)  # a process that exits with gloo's threads running may abort

    def broadcast(self, value: str) -> str:
        return agreed(value)


def agreed(value: T) -> T:
    """Return the main process's value in every process, of those that ``accelerate launch`` started."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    from accelerate.utils import broadcast_object_list

    values = [value]
    broadcast_object_list(values)
    return values[0]


def is_first_process() -> bool:
    """Return whether this process is the first of its group, before the group is formed."""
    return os.environ.get("RANK", "0") == "0"


def find_process_group() -> ProcessGroup:
    """Return the processes that this one was started with."""
    return AccelerateProcesses() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else SingleProcess()
