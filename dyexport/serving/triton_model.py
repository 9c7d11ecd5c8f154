"""The model that Triton's Python backend runs: the whole sampling loop, so that no latents travel between steps.

A repository's ``model.py`` imports ``TritonPythonModel`` from here. This module can be imported inside the server only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from dyexport.engines.registry import get_backend
from dyexport.errors import DyexportError, EngineMismatchError, UsageError
from dyexport.serving.config import ServedModelConfig
from dyexport.serving.requests import SEED, Request, RequestParser, group_by_settings, split_rows

FIRST_STEPS = 8  # of the sample that loads the engines


class CancelledError(Exception):
    """Every request of a batch was cancelled or timed out."""


class TritonPythonModel:
    """Answers a label or prompt with a picture, video or latents, and with the seed, which reproduces it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle and sample once: a model that cannot sample never becomes ready."""
        check_tensors()
        config = json.loads(args["model_config"])
        served = ServedModelConfig.of_config(config)
        from dyexport.serving.samplers import open_sampler  # torch and diffusers: seconds

        folder = Path(args["model_repository"]) / args["model_version"]
        self._sampler = open_sampler(folder, served, _device(args, served.target))
        self._inputs = [entry["name"] for entry in config["input"]]
        parser = self._sampler.parser
        self._sample([parser.parse(_first_request(parser))], [])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return one response per request, in order; a bad request does not affect the others of its batch."""
        waiting = [WaitingRequest(request) for request in requests]
        responses: dict[int, Any] = {}
        parsed: dict[int, Request] = {}
        for index, request in enumerate(requests):
            try:
                parsed[index] = self._sampler.parser.parse(self._arrays(request))
            except Exception as error:
                responses[index] = _failure(error)
        for group in group_by_settings(parsed):
            answers = self._answer([parsed[index] for index in group], [waiting[index] for index in group])
            responses.update(zip(group, answers, strict=True))
        return [responses[index] for index in range(len(requests))]

    def _arrays(self, request: Any) -> dict[str, np.ndarray]:
        tensors = {name: pb.get_input_tensor_by_name(request, name) for name in self._inputs}
        return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}

    def _answer(self, requests: Sequence[Request], waiting: Sequence[WaitingRequest]) -> list[Any]:
        try:
            batches = self._sample(requests, waiting)
        except Exception as error:  # such as out of memory: the server goes on
            return [_failure(error) for _ in requests]
        return [self._response(request, values) for request, values in zip(requests, batches, strict=True)]

    def _sample(self, requests: Sequence[Request], waiting: Sequence[WaitingRequest]) -> list[np.ndarray]:
        """Sample one batch, and return the samples of each request. Stops once every request was cancelled."""
        steps = 0

        def after_step() -> None:
            nonlocal steps
            steps += 1
            check_waiting(waiting, f"after step {steps} of {requests[0].settings.steps}")

        check_waiting(waiting, "before sampling")
        values = self._sampler.sample(requests, after_step)
        return split_rows(values, [len(request) for request in requests])

    def _response(self, request: Request, values: np.ndarray) -> Any:
        seeds = np.array(request.seeds, np.int64)[:, None]  # (B, 1)
        tensors = [pb.Tensor(self._sampler.output.name, np.ascontiguousarray(values)), pb.Tensor(SEED, seeds)]
        return pb.InferenceResponse(output_tensors=tensors)


class WaitingRequest:
    """A request and the time until which its client waits: ``timeout`` is in microseconds, and 0 is no timeout."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._end = monotonic() + request.timeout() / 1e6 if request.timeout() else math.inf

    @property
    def cancelled(self) -> str | None:
        """Why the client no longer waits; None while it does. Triton does not report a closed HTTP connection."""
        if self._request.is_cancelled():
            return "cancelled"
        return "out of time" if monotonic() > self._end else None


def check_waiting(waiting: Sequence[WaitingRequest], when: str) -> None:
    """Raise ``CancelledError`` if there are requests, and all of them were cancelled."""
    reasons = [request.cancelled for request in waiting]
    if reasons and all(reasons):
        raise CancelledError(f"{reasons[0]} {when}")


def _failure(error: Exception) -> Any:
    """Return the error response to one request, and log errors that are not the client's."""
    if isinstance(error, UsageError):
        code, message = pb.TritonError.INVALID_ARG, str(error)
    elif isinstance(error, CancelledError):
        code, message = pb.TritonError.CANCELLED, str(error)
        pb.Logger.log_info(f"dyexport: {message}")
    else:
        message = str(error) if isinstance(error, DyexportError) else f"{type(error).__name__}: {error}"
        code = pb.TritonError.INTERNAL
        pb.Logger.log_error(f"dyexport: {message}")
    return pb.InferenceResponse(output_tensors=[], error=pb.TritonError(message, code))


def _first_request(parser: RequestParser) -> dict[str, np.ndarray]:
    """Make a request of the default size and a few steps, which loads the engines before the first client waits."""
    value = np.zeros((1, 1), np.int64) if parser.classes else np.array([[b"a"]], np.object_)
    return {parser.label_or_prompt: value, "steps": np.array([[min(FIRST_STEPS, parser.limits.max_steps)]])}


def _device(args: dict[str, str], target: str) -> str | None:
    """Return the instance's GPU if torch and the engines can use it, else None; ``cpu`` for a CPU instance."""
    import torch

    if args["model_instance_kind"] != "GPU":
        return "cpu"
    usable = torch.cuda.is_available() and get_backend(target).has_cuda()
    return f"cuda:{args['model_instance_device_id']}" if usable else None


def check_tensors() -> None:
    """Raise ``EngineMismatchError`` if tensors arrive garbled, as in server 2.51 with numpy 2."""
    sent = np.arange(1, 4, dtype=np.float32)
    received = pb.Tensor.from_dlpack("probe", pb.Tensor("probe", sent).to_dlpack()).as_numpy()
    if not np.array_equal(received, sent):
        raise EngineMismatchError(
            f"this Triton server garbles tensors with numpy {np.__version__}: it reads {received} where {sent} was "
            "sent; install numpy<2 where the server finds dyexport, or use a newer server"
        )
