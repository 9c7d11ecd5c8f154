"""Weights by other names and in other formats than diffusers': original single files, and fp8.

Names are translated by diffusers' own converters. What a converter does to rows is recorded on row numbers instead of
weights, so that one tensor at a time is read, as from any other checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dyexport.errors import CheckpointError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE = ".scale_weight"  # of a tensor in fp8, by which it is multiplied
UNUSED = (SCALE, ".scale_input", "scaled_fp8")
CONVERTED_WIDTH = 3072  # diffusers' converters split fused layers at the published width
GGUF = ".gguf"


class Dequantized(Mapping[str, Tensor]):
    """Stored weights with tensors in fp8 as bf16, multiplied by their scales; each is converted when it is read."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self._stored = stored
        self._names = dict.fromkeys(name for name in stored if not name.endswith(UNUSED))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor, scale = self._stored[name], f"{name.removesuffix('.weight')}{SCALE}"
        if tensor.dtype not in FP8:
            return tensor
        wide = tensor.to(torch.float32)
        if scale in self._stored:
            wide = wide * self._stored[scale].to(torch.float32)
        return wide.to(torch.bfloat16)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def dequantized(stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the weights without fp8; themselves where none are in fp8."""
    return Dequantized(stored) if any(stored[name].dtype in FP8 for name in stored) else stored


class Rows(NamedTuple):
    """Consecutive rows of a stored tensor."""

    name: str
    start: int
    stop: int


class Converted(Mapping[str, Tensor]):
    """Weights by diffusers' names, each put together from rows of stored tensors when it is read."""

    def __init__(self, stored: Mapping[str, Tensor], rows: Mapping[str, tuple[Rows, ...]]) -> None:
        self._stored, self._rows = stored, rows

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._stored[rows.name][rows.start : rows.stop] for rows in self._rows[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def converted(
    stored: Mapping[str, Tensor], target: Collection[str], stock: str, hidden_size: int
) -> Mapping[str, Tensor]:
    """Return a single file's weights by the names of ``target``; themselves where diffusers does not convert them.

    ``stock`` is the diffusers class, ``hidden_size`` the model's width.
    """
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    entry: Mapping[str, Any] | None = SINGLE_FILE_LOADABLE_CLASSES.get(stock)
    if entry is None or any(name in target for name in stored):
        return stored
    numbers, counts = _row_numbers(stored, hidden_size)
    try:
        found: Mapping[str, Tensor] = entry["checkpoint_mapping_fn"](dict(numbers))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):  # of another model
        return stored
    starts = torch.tensor([0, *counts.values()]).cumsum(0)  # (S + 1,)
    names = [*counts]
    return Converted(stored, {name: tuple(_runs(ids, starts, names)) for name, ids in found.items()})


def _row_numbers(stored: Mapping[str, Tensor], hidden_size: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Number the rows of all tensors through: as many numbers as a model of the published width has rows."""
    numbers: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    start = 0
    for name in stored:
        count = stored[name].shape[0] if stored[name].ndim else 1
        size = count // hidden_size * CONVERTED_WIDTH if count % hidden_size == 0 else count
        numbers[name] = start + torch.arange(size, dtype=torch.float64) * (count / size)
        counts[name] = count
        start += count
    return numbers, counts


def _runs(ids: Tensor, starts: Tensor, names: list[str]) -> Iterator[Rows]:
    """Group row numbers (R,) into consecutive rows of one tensor each."""
    steps = ids.diff()  # (R - 1,)
    step = float(steps.median()) if len(steps) else 1.0
    breaks = ((steps <= 0) | (steps > 1.5 * step)).nonzero().flatten() + 1
    for run in ids.tensor_split(breaks.tolist()):
        index = int(torch.bucketize(run[0].floor(), starts, right=True)) - 1
        first = int(starts[index])
        yield Rows(names[index], round(float(run[0])) - first, round(float(run[-1]) + step) - first)


def check_format(path: Path, config: Mapping[str, Any] | None) -> None:
    """Raise ``CheckpointError`` for formats that must be converted first, naming the conversion."""
    if path.suffix.lower() == GGUF:
        raise CheckpointError(
            f"{path} is in GGUF; load it with diffusers' from_single_file(..., "
            "quantization_config=GGUFQuantizationConfig(...)), dequantize() and save_pretrained, and pass what it saved"
        )
    if config is not None and config.get("quantization_config"):
        quantized = config["quantization_config"]
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else "unknown"
        raise CheckpointError(
            f"{path} is quantized ({str(method)[:40]}); load it with diffusers' from_pretrained, dequantize() and "
            "save_pretrained, or pass the checkpoint that it was made from"
        )
