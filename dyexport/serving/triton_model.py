"""The model that Triton's Python backend runs: the whole sampling loop, so that no latents travel between steps.

A repository's ``model.py`` imports ``TritonPythonModel`` from here. Only inside the server can this be imported.
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
from dyexport.serving.requests import SEED, Request, RequestParser, together
from dyexport.serving.requests import split as split_rows

FIRST_STEPS = 8


class Abandoned(Exception):
    """Nobody waits for what is being drawn."""


class TritonPythonModel:
    """Answers label or prompt with picture, video or latents, and with the seed, so that it can be drawn again."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle and draws once: a model that cannot draw is never ready."""
        check_tensors()
        config = json.loads(args["model_config"])
        served = ServedModelConfig.of_config(config)
        from dyexport.serving.samplers import open_sampler  # torch and diffusers: seconds

        folder = Path(args["model_repository"]) / args["model_version"]
        self._sampler = open_sampler(folder, served, _device(args, served.target))
        self._inputs = [entry["name"] for entry in config["input"]]
        self._draw([self._sampler.book.read(_first(self._sampler.book))], [])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """One response for each request, in order; a bad one does not spoil the others of its batch."""
        waiting = [Waiting(request) for request in requests]
        responses: dict[int, Any] = {}
        orders: dict[int, Request] = {}
        for index, request in enumerate(requests):
            try:
                orders[index] = self._sampler.book.read(self._arrays(request))
            except Exception as error:
                responses[index] = _failure(error)
        for group in together(orders):
            drawn = self._answered([orders[index] for index in group], [waiting[index] for index in group])
            responses.update(zip(group, drawn, strict=True))
        return [responses[index] for index in range(len(requests))]

    def _arrays(self, request: Any) -> dict[str, np.ndarray]:
        found = {name: pb.get_input_tensor_by_name(request, name) for name in self._inputs}
        return {name: tensor.as_numpy() for name, tensor in found.items() if tensor is not None}

    def _answered(self, orders: Sequence[Request], waiting: Sequence[Waiting]) -> list[Any]:
        try:
            batches = self._draw(orders, waiting)
        except Exception as error:  # out of memory, say: the server goes on
            return [_failure(error) for _ in orders]
        return [self._response(order, values) for order, values in zip(orders, batches, strict=True)]

    def _draw(self, orders: Sequence[Request], waiting: Sequence[Waiting]) -> list[np.ndarray]:
        """Samples of each order, drawn together until no request is waited for any more."""
        steps = 0

        def after_step() -> None:
            nonlocal steps
            steps += 1
            check_waiting(waiting, f"after step {steps} of {orders[0].settings.steps}")

        check_waiting(waiting, "before it was drawn")
        return split_rows(self._sampler.draw(orders, after_step), [len(order) for order in orders])

    def _response(self, order: Request, values: np.ndarray) -> Any:
        seeds = np.array(order.seeds, np.int64)[:, None]  # (B, 1)
        tensors = [pb.Tensor(self._sampler.output.name, np.ascontiguousarray(values)), pb.Tensor(SEED, seeds)]
        return pb.InferenceResponse(output_tensors=tensors)


class Waiting:
    """A request, and until when its client waits: its ``timeout`` is in microseconds, and 0 for ever."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._end = monotonic() + request.timeout() / 1e6 if request.timeout() else math.inf

    @property
    def given_up(self) -> str | None:
        """Why nobody waits any more; None where somebody does. A client that hangs up over HTTP cannot be told."""
        if self._request.is_cancelled():
            return "cancelled"
        return "out of time" if monotonic() > self._end else None


def check_waiting(waiting: Sequence[Waiting], when: str) -> None:
    """Raises ``Abandoned`` where there are requests, and none that is waited for."""
    reasons = [one.given_up for one in waiting]
    if reasons and all(reasons):
        raise Abandoned(f"{reasons[0]} {when}")


def _failure(error: Exception) -> Any:
    """The response to one request, and a line in the server's log for what is not the client's fault."""
    if isinstance(error, UsageError):
        code, message = pb.TritonError.INVALID_ARG, str(error)
    elif isinstance(error, Abandoned):
        code, message = pb.TritonError.CANCELLED, str(error)
        pb.Logger.log_info(f"dyexport: {message}")
    else:
        message = str(error) if isinstance(error, DyexportError) else f"{type(error).__name__}: {error}"
        code = pb.TritonError.INTERNAL
        pb.Logger.log_error(f"dyexport: {message}")
    return pb.InferenceResponse(output_tensors=[], error=pb.TritonError(message, code))


def _first(book: RequestParser) -> dict[str, np.ndarray]:
    """A sample of the usual size, in a few steps, so that engines are loaded before anyone waits for them."""
    subject = np.zeros((1, 1), np.int64) if book.classes else np.array([[b"a"]], np.object_)
    return {book.subject: subject, "steps": np.array([[min(FIRST_STEPS, book.limits.max_steps)]])}


def _device(args: dict[str, str], target: str) -> str | None:
    """The instance's GPU, where torch and the engines can use one; on a CPU instance the CPU."""
    import torch

    if args["model_instance_kind"] != "GPU":
        return "cpu"
    usable = torch.cuda.is_available() and get_backend(target).has_cuda()
    return f"cuda:{args['model_instance_device_id']}" if usable else None


def check_tensors() -> None:
    """Raises ``EngineMismatchError`` where tensors arrive garbled, as in server 2.51 beside numpy 2."""
    sent = np.arange(1, 4, dtype=np.float32)
    received = pb.Tensor.from_dlpack("probe", pb.Tensor("probe", sent).to_dlpack()).as_numpy()
    if not np.array_equal(received, sent):
        raise EngineMismatchError(
            f"this Triton server garbles tensors beside numpy {np.__version__}: it reads {received} where {sent} was "
            "sent; install numpy<2 where the server finds dyexport, or use a newer server"
        )
