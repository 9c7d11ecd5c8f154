"""A real Triton server over a model repository, on free ports; `make setup` installs it next to .venv."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest

CHECKOUT = Path(__file__).parents[2]
HOME = CHECKOUT / ".triton"
SECONDS = 180  # to open every model, on a busy machine
TYPES = {"label": "INT64", "seed": "INT64", "steps": "INT32", "guidance": "FP32", "prompt": "BYTES"}
DTYPES = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32, "BYTES": np.object_}


class Server:
    """Started when made, and all its models ready or refused; ``close`` ends it.

    ``environment`` is the one that models run in; with ``polling`` the repository is looked at every second.
    """

    def __init__(self, repository: Path, log: Path, *, environment: Path = HOME, polling: bool = False) -> None:
        if not (HOME / "bin/tritonserver").exists():
            pytest.skip("no Triton server here; run: make setup")
        self.name = f"dyexport-{os.getpid()}-{time.monotonic_ns()}"
        self.http, self.grpc = _free_port(), _free_port()
        self.log = log
        command = [
            str(HOME / "bin/tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={HOME / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={self.name}",
            f"--id={self.name}",
            "--http-address=127.0.0.1",
            f"--http-port={self.http}",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.grpc}",
            "--allow-metrics=false",
            "--pinned-memory-pool-byte-size=0",
            "--exit-timeout-secs=2",
            "--exit-on-error=false",
            *(["--model-control-mode=poll", "--repository-poll-secs=1"] if polling else []),
        ]
        variables = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": str(sysconfig.get_config_var("LIBDIR")),
            "HF_HUB_OFFLINE": "1",
        }
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                command, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        """Until it answers by its own name, which it does once all models are ready or refused."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"tritonserver ended with {self.process.returncode}:\n{self.said[-4000:]}")
            if self._says("") is not None:
                return
            time.sleep(0.1)
        raise TimeoutError(self.said[-4000:])

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def _says(self, path: str) -> bytes | None:
        try:
            with urlopen(f"http://127.0.0.1:{self.http}/v2{path}", timeout=5) as answer:
                content: bytes = answer.read()
        except (URLError, OSError):
            return None
        return content if path or json.loads(content)["name"] == self.name else None

    def ready(self, model: str) -> bool:
        return self._says(f"/models/{model}/ready") is not None

    def statistics(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._says(f"/models/{model}/stats") or b"")["model_stats"][0]
        return found

    @cached_property
    def client(self) -> Any:
        http = pytest.importorskip("tritonclient.http")
        return http.InferenceServerClient(f"127.0.0.1:{self.http}", concurrency=8, network_timeout=120)

    def close(self) -> None:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for left in Path("/dev/shm").glob(f"{self.name}*"):
            left.unlink()


def inputs(library: Any = None, /, **values: Any) -> list[Any]:
    """Tensors of a request, one row for each value given, of tritonclient's HTTP or gRPC library."""
    library = library or pytest.importorskip("tritonclient.http")
    made = []
    for name, rows in values.items():
        data_type = TYPES.get(name, "INT32")
        array = np.array(rows if isinstance(rows, list) else [rows], DTYPES[data_type])[:, None]  # (B, 1)
        tensor = library.InferInput(name, list(array.shape), data_type)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
