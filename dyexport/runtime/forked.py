"""Exit of a forked process."""

from __future__ import annotations

import ctypes
import sys


def skip_exit_handlers_of_parent() -> None:
    """Let this forked process exit before the exit handlers of the parent's libraries run, with its own status.

    The handler of ONNX Runtime 1.32 waits for a thread that only the parent has. By then Python has run its own
    handlers and flushed its streams. Does nothing in a C library without ``on_exit`` (glibc has it).
    """
    libc = ctypes.CDLL(None)
    if "onnxruntime" in sys.modules and hasattr(libc, "on_exit"):
        libc.on_exit(libc._exit, None)  # handlers run in reverse order of registration
