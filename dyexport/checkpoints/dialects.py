"""Recognition of the names in a file of weights: diffusers', or those of the code a backbone was published with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dyexport.backbones import BACKBONES, part
from dyexport.backbones.dialect import Dialect
from dyexport.checkpoints.quantized import dequantized
from dyexport.checkpoints.stored_weights import StoredWeights, without_prefix

ROUTERS = (".attn_rate.", ".mlp_rate.", ".token_selection.")


def plain_weights(files: StoredWeights) -> Mapping[str, Tensor]:
    """Return the tensors of files without common prefixes of their names; fp8 is dequantized when it is read."""
    return without_prefix(dequantized(files))


def find_dialect(names: Collection[str]) -> Dialect | None:
    """Return the dialect of names; None for diffusers'."""
    dialects = (dialect for backbone in BACKBONES for dialect in part(backbone, "published").DIALECTS)
    return next((dialect for dialect in dialects if dialect.matches(names)), None)


def has_router_names(names: Collection[str]) -> bool:
    """Return whether a published file has the routers of a dynamic model."""
    return any(infix in name for name in names for infix in ROUTERS)


def has_routers(file: Path) -> bool:
    """Return whether a single file has routers, as published DyDiT does. Reads names only."""
    return has_router_names(without_prefix(StoredWeights(file)))


def structure_of(file: Path) -> dict[str, Any] | None:
    """Return the diffusers configuration that follows from the shapes in a single file; None where none does."""
    weights = plain_weights(StoredWeights(file))
    dialect = find_dialect(weights)
    return None if dialect is None else dialect.structure(weights)
