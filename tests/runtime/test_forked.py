"""A forked worker leaves as any other process does: with its status, and with all that it wrote."""

from __future__ import annotations

import subprocess
import sys

from dyexport.bundle.reader import Bundle

LEAVE = """
import os, signal, sys
from dyexport import load
from tests.runtime.calls import predict

transformer = load(sys.argv[1])

def fork(child_draws):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a hang
        if child_draws:
            predict(transformer)
        sys.stdout.write(f"all that {child_draws} wrote\\n")
        sys.exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

predict(transformer)
codes = [fork(False), fork(True)]
transformer.close()
codes += [fork(False), fork(True)]
sys.exit(0 if codes == [3] * 4 else str(codes))
"""


def test_forks_of_a_process_that_has_drawn_leave_with_their_status(sit_tiny: Bundle) -> None:
    """Whether the child draws or not, and whether the parent has closed its engines or not."""
    command = [sys.executable, "-c", LEAVE, str(sit_tiny.root)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "all that False wrote\nall that True wrote\n" * 2
