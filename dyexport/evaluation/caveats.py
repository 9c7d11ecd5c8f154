"""Sentences about scores that are biased by too few samples, or left out."""

from __future__ import annotations

from collections.abc import Iterator

from dyexport.evaluation.judges import Judges
from dyexport.evaluation.samplers import Sampler
from dyexport.evaluation.settings import EvalSettings

PUBLISHED = "50,000"  # samples of a published FID
PAIRED_AS_USUAL = 8  # fewer pairs say little


def caveats(settings: EvalSettings, sampler: Sampler, judges: Judges, *, dense: bool) -> tuple[str, ...]:
    """Return the warnings of an evaluation, without the full stop; ``dense``: the dense network was sampled."""
    return tuple(_caveats(settings, sampler, judges, dense=dense))


def _caveats(settings: EvalSettings, sampler: Sampler, judges: Judges, *, dense: bool) -> Iterator[str]:
    if not dense:
        yield (
            "the bundle has no dense network to compare with, so PSNR, SSIM and drift are left out; build it with "
            "--baseline"
        )
    if sampler.conditions == "random embeddings":
        yield (
            "samples are latents from random embeddings, since no text encoders were given; they compare the two "
            "networks and say nothing about pictures: give --pipeline"
        )
    if judges.reference is not None:
        yield from _of_distances(settings, sampler, judges, judges.reference.shape[1])


def _of_distances(settings: EvalSettings, sampler: Sampler, judges: Judges, size: int) -> Iterator[str]:
    assert judges.reference is not None, "there are distances"
    real, pictures = len(judges.reference), sampler.pictures
    fewest, whose = min((pictures, "samples"), (real, "reference pictures"))
    if fewest <= size:
        yield (
            f"the Frechet distance is biased: {fewest} {whose} for {size} features, and it needs more than {size}; "
            f"published ones are of {PUBLISHED}. Compare it only between models of this report"
        )
    if judges.subset is None:
        yield (
            f"the kernel distance is left out: {fewest} {whose} are fewer than its subsets of {settings.subset}; "
            f"take more samples, or --subset {max(fewest // 2, 2)}"
        )
    if judges.resized:
        yield f"{judges.resized} of {real} reference pictures were resized and cropped to the size of the samples"
