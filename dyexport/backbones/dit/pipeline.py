"""Sampling from class labels, with the network of DiT and SiT."""

from __future__ import annotations

from dyexport.backbones.sampling import LabelPipeline

PIPELINE = LabelPipeline()
