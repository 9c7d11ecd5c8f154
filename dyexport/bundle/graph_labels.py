"""Metadata of a bundle's ONNX graphs, by which no graph can be mistaken for another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from dyexport.bundle.plan import SegmentPlan, segment_name
from dyexport.bundle.spec import ModelSpec

NETWORK = "dyexport/network"
IDENTITY = "dyexport/sha256"
MODULE = "module"  # key of a node's metadata: the torch module that it came from


def labels_for(network: str, model: ModelSpec, plan: SegmentPlan) -> Mapping[str, str]:
    """Return the metadata of a network's graph: its name, and the hash of the model and of its segment, if any.

    The hash leaves out where the model came from, which older bundles do not say.
    """
    segments = {segment_name(index): segment for index, segment in enumerate(plan.segments)}
    served = segments.get(network)
    said = (model.model_dump_json(exclude={"hub_id"}), "" if served is None else served.model_dump_json())
    return {NETWORK: network, IDENTITY: hashlib.sha256("\n".join(said).encode()).hexdigest()}
