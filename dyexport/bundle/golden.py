"""Golden data of a bundle: inputs, and what the masked torch model computed for them (``golden.safetensors``).

With it, a bundle is verified on a machine that has nothing else. Arrays only (numpy and safetensors), as in ``tables``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dyexport.bundle.plan import Segment
from dyexport.bundle.records import REPLACE, Frozen, first_problem
from dyexport.bundle.spec import ModelSpec
from dyexport.errors import BundleError

GOLDEN = "golden.safetensors"
INFO = "golden"  # one entry of metadata, since safetensors writes several in random order
INPUTS = "inputs/"
ARRAYS = ("sample", "heads", "groups", "kept_tokens")
OPTIONAL = ("quantized", "dense", "quantized_dense")

InputSource = Literal["noise", "digits", "synthetic"]
"""Latents of golden inputs: noise, noised pictures of scikit-learn's digits, or noised samples of the model itself."""


@dataclass(frozen=True, kw_only=True)
class GoldenSample:
    """One batch at one timestep, and the outputs of the reference in fp32.

    inputs           arguments of the stock module, by name
    sample           (B, ...) output of the masked model
    heads, groups    (L, H), (L, G) bool: units that are on
    kept_tokens      (B, L) int64: tokens that each block's MLP keeps
    quantized        (B, ...) output with linear layers fake-quantized; None for a bundle without quantization
    dense            (B, ...) output of the static model; None at most timesteps, or without a baseline
    quantized_dense  (B, ...) output of the static model, fake-quantized
    """

    inputs: Mapping[str, np.ndarray]
    sample: np.ndarray
    heads: np.ndarray
    groups: np.ndarray
    kept_tokens: np.ndarray
    quantized: np.ndarray | None = None
    dense: np.ndarray | None = None
    quantized_dense: np.ndarray | None = None

    @property
    def timestep(self) -> float:
        """The value that the transformer is called with, the same for the whole batch."""
        return float(self.inputs["timestep"][0])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by their names in the file."""
        stored = {name: getattr(self, name) for name in (*ARRAYS, *OPTIONAL)}
        named = {name: array for name, array in stored.items() if array is not None}
        return {**{f"{INPUTS}{name}": array for name, array in self.inputs.items()}, **named}

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> GoldenSample:
        """Make a sample of the arrays of a file. Raises ``KeyError`` for a missing one."""
        inputs = {name.removeprefix(INPUTS): array for name, array in arrays.items() if name.startswith(INPUTS)}
        if not len(inputs["timestep"]):
            raise KeyError("timestep")
        required = {name: arrays[name] for name in ARRAYS}
        optional = {name: arrays[name] for name in OPTIONAL if name in arrays}
        return cls(inputs=inputs, **required, **optional)


class GoldenInfo(Frozen):
    """Origin of golden data.

    ``identity`` is that of the reference, ``tokens`` and ``text_tokens`` are of one sample: fewer than the model's
    where a pass at its size takes minutes. ``resampled`` counts inputs that were replaced, since a token or a unit was
    so near its threshold that rounding decides, or more tokens were kept than a capacity holds.
    """

    identity: str
    dyexport_version: str
    source: InputSource
    seed: NonNegativeInt
    timesteps: PositiveInt
    batch: PositiveInt
    tokens: PositiveInt
    text_tokens: NonNegativeInt
    resampled: NonNegativeInt
    precision: Literal["fp32"] = "fp32"


@dataclass(frozen=True, kw_only=True)
class GoldenData:
    """Contents of ``golden.safetensors``."""

    info: GoldenInfo
    samples: tuple[GoldenSample, ...]

    def save(self, path: Path) -> None:
        arrays = {
            f"{index}/{name}": np.ascontiguousarray(array)
            for index, sample in enumerate(self.samples)
            for name, array in sample.arrays().items()
        }
        save_file(arrays, path, {INFO: self.info.model_dump_json()})

    @classmethod
    def load(cls, path: Path) -> GoldenData:
        """Read golden data. Raises ``BundleError`` for an invalid file."""
        try:
            with safe_open(path, "numpy") as file:
                info = GoldenInfo.model_validate_json((file.metadata() or {}).get(INFO, ""))
                names = file.keys()
                arrays = {name: file.get_tensor(name) for name in names}
            samples = tuple(GoldenSample.of(_below(f"{index}/", arrays)) for index in range(info.timesteps))
        except ValidationError as error:
            raise BundleError(f"cannot read {path}: {first_problem(error)}; {REPLACE}") from error
        except KeyError as error:
            raise BundleError(f"{path} lacks {error}; {REPLACE}") from error
        except (OSError, SafetensorError, TypeError) as error:
            raise BundleError(f"cannot read {path}: {error}; {REPLACE}") from error
        return cls(info=info, samples=samples)


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def reference_identity(reference: str | None, spec: ModelSpec, segments: Sequence[Segment]) -> str:
    """Identify what golden outputs are of, by the hash of the reference and what its outputs depend on.

    These are the linear layers that are quantized, and the segments in which TD-LoRA is merged.
    """
    spans = [(segment.start, segment.end, segment.merged) for segment in segments]
    return hashlib.sha256(json.dumps([reference, spec.quantization, spans]).encode()).hexdigest()
