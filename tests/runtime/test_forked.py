"""A forked worker leaves as any other process does: with its status, and with all that it wrote."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dyexport.bundle.reader import Bundle

LEAVE = """
import os, signal, sys
from dyexport import load
from tests.runtime.calls import predict

transformer = load(sys.argv[1])
predict(transformer)
if "parent_closes" in sys.argv:
    transformer.close()
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends a hang
    if "child_draws" in sys.argv:
        predict(transformer)
    sys.stdout.write("all that it wrote")
    sys.exit(3)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""


@pytest.mark.parametrize(
    "steps",
    [(), ("child_draws",), ("parent_closes",), ("parent_closes", "child_draws")],
    ids=lambda steps: " ".join(steps) or "neither",
)
def test_a_fork_of_a_process_that_has_drawn_leaves_with_its_status(sit_tiny: Bundle, steps: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", LEAVE, str(sit_tiny.root), *steps]
    process = subprocess.run(command, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (3, "all that it wrote"), process.stderr
