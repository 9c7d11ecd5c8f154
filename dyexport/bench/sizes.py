"""The specification of a model at another size in pixels than the one that a bundle was built for. Imports no torch."""

from __future__ import annotations

from dyexport.backbones import get_engine_sizes
from dyexport.backbones.sampling import VAE_SCALE
from dyexport.bundle.reader import Bundle
from dyexport.bundle.spec import ModelSpec
from dyexport.errors import UsageError

PATCH = 2  # latents on a side of a token of packed latents
Size = tuple[int, int]


def spec_at(spec: ModelSpec, size: Size | None) -> ModelSpec:
    """Return the specification for pictures of (height, width) pixels; itself for None.

    Raises ``UsageError`` for a model whose size is fixed.
    """
    if size is None:
        return spec
    free = get_engine_sizes(spec.backbone).free_sizes(spec, None)
    height, width = (side // VAE_SCALE for side in size)
    if "image_tokens" in free:  # packed latents (N, C)
        tokens = (height // PATCH) * (width // PATCH)
        return spec.model_copy(update={"tokens": tokens, "latent_shape": (tokens, *spec.latent_shape[1:])})
    if {"height", "width"} <= free.keys():  # (C, F, H, W)
        tokens = spec.tokens * height * width // (spec.latent_shape[-2] * spec.latent_shape[-1])
        return spec.model_copy(update={"tokens": tokens, "latent_shape": (*spec.latent_shape[:-2], height, width)})
    raise UsageError(f"--size does nothing here: {spec.name} has one size; leave it out")


def check_sizes(bundle: Bundle, sizes: tuple[Size, ...]) -> None:
    """Raise ``UsageError`` for a size that the bundle's engines do not take."""
    spec, segments = bundle.manifest.model, bundle.manifest.plan.segments
    kept = max(segment.largest_capacity for segment in segments)
    for size in sizes:
        tokens = spec_at(spec, size).tokens
        if tokens < kept:
            raise UsageError(
                f"--size {size[0]}x{size[1]} makes {tokens} tokens, and engines of this bundle keep up to {kept}; "
                "give a larger size, or build with --token-path masked"
            )
