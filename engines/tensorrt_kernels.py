"""Kernels that TensorRT-RTX compiles when a plan runs, kept on disk for the next process.

They are in the user's cache folder and not next to the plan: compiled kernels are code, and a bundle has no hash of
what was made after it was built.
"""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

from dyexport.errors import DyexportWarning, StorageError
from dyexport.files import user_cache, write_atomically


class KernelCache:
    """The runtime cache of one plan and the file that it is kept in.

    TensorRT-RTX rejects a file of another version, GPU or older driver; its kernels are then compiled again.
    """

    def __init__(self, cache: Any, path: Path) -> None:
        self._cache = cache
        self.path = path
        self._stored = self._load()

    def _load(self) -> bytes:
        try:
            content = self.path.read_bytes()
        except OSError:  # none yet, or none that can be read
            return b""
        return content if self._cache.deserialize(content) else b""

    def save(self) -> None:
        """Write what was compiled since the last time; warn if the file cannot be written."""
        content = bytes(self._cache.serialize())
        if content == self._stored:
            return
        self._stored = content
        try:
            write_atomically(self.path, content)
        except StorageError as error:
            notice = f"compiled kernels are not kept for the next start: {error}"
            warnings.warn(notice, DyexportWarning, stacklevel=2)


def kernel_file(plan_sha256: str, version: str, gpu: str) -> Path:
    """Return the file for the kernels of one plan, by TensorRT-RTX's version and the name of the GPU."""
    circumstances = hashlib.sha256("\n".join((plan_sha256, version, gpu)).encode())
    return user_cache() / "tensorrt-rtx-kernels" / circumstances.hexdigest()[:32]
