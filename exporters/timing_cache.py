"""TensorRT's timing cache of kernels, kept across plans and builds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dyexport.files import write_atomically
from dyexport.tensorrt_api import Api

DIGEST = hashlib.sha256().digest_size  # bytes before the cache itself


@contextmanager
def kept_timings(api: Api, config: Any, path: Path | None) -> Iterator[None]:
    """Load the timing cache of ``config`` from ``path``, and write it back after a build inside the context.

    A cache that is damaged, or is of another GPU or version, is ignored; kernels are then measured again. Does
    nothing without a ``path``, or for a flavour that measures nothing.
    """
    if path is None or not api.measures:
        yield
        return
    if not config.set_timing_cache(config.create_timing_cache(read_timings(path)), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    yield
    write_timings(path, bytes(config.get_timing_cache().serialize()))


def read_timings(path: Path) -> bytes:
    """Read a cache; return no bytes if the file is missing or damaged."""
    stored = path.read_bytes() if path.is_file() else b""
    content = stored[DIGEST:]
    return content if hashlib.sha256(content).digest() == stored[:DIGEST] else b""


def write_timings(path: Path, content: bytes) -> None:
    write_atomically(path, hashlib.sha256(content).digest() + content)
