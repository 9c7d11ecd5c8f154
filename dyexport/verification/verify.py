"""Comparison of a bundle with the masked torch model that it was cut from, or with what the bundle keeps of it.

A bundle has golden data: inputs, and the masked model's outputs for them. They need no checkpoint and no libraries
that make bundles. On the machine that built the bundle, the masked model itself is run at random timesteps, too.

In fp32, both must be equal at every timestep, but for rounding. In half precision every activation is rounded, and a
token near its threshold may fall either way; the error is then that of whole outputs, relative to them: root mean
square over root mean square.

A quantized bundle is compared with the masked model, fake-quantized as the engines are. For a value between two codes
the last digit of fp32 decides, and the difference is rounded in all later layers. The error is therefore the distance
to that model relative to the error of quantization: near 0 in a shallow network, up to 0.9 in one of twelve blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dyexport.bundle.golden import GoldenData
from dyexport.bundle.reader import Bundle
from dyexport.engines.registry import engine_files
from dyexport.errors import BundleError, MissingDependencyError, missing_extras
from dyexport.progress import Progress, no_progress
from dyexport.runtime.loading import check_present, load
from dyexport.runtime.transformer import BundleTransformer
from dyexport.stages.file_records import describe, digest_of
from dyexport.verification.comparison import Comparison
from dyexport.verification.golden import check_golden_gates, compare_dense, compare_golden, has_dense, read_golden
from dyexport.verification.report import GoldenReport, VerifyReport, WorstErrors, summarize
from dyexport.verification.settings import (
    GIVE_REFERENCE,
    VerifySettings,
    expected_reference,
    golden_instead,
    reference_of,
)

if TYPE_CHECKING:
    from dyexport.verification.reference import BundleReference


@missing_extras()
def verify(
    bundle: Bundle | str | Path,
    *,
    target: str = "onnx",
    device: str | None = None,
    timesteps: int | None = None,
    tolerance: float | None = None,
    layers: bool = False,
    small: bool = False,
    seed: int | None = None,
    reference: str | Path | None = None,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Compare a bundle with its golden data, and with the masked torch model that it was cut from if that is there.

    Golden data is part of a bundle: a few inputs, and the masked model's outputs and gates. On the machine that built
    the bundle, the masked model is compared too, at ``timesteps`` random timesteps (default 64) of ``seed``.

    ``target`` is the engine format to run, and ``device`` that of ``dyexport.load``. ``tolerance`` bounds the absolute
    error in fp32 (default 1e-4), the relative one in fp16 (1e-2) and bf16 (8e-2), and in int8 and fp8 the error
    relative to that of quantization (2). With ``layers``, every layer of the ONNX graphs is compared too; with
    ``small``, samples are small, which takes seconds instead of minutes for large models. ``reference`` is a dynamic
    checkpoint, by default the one in the bundle's work directory. ``progress(done, total)`` counts timesteps.

    >>> dyexport.verify("sit-digits-0.5", timesteps=4)
    VerifyReport(passed: error ... of at most 0.0001 at ... timesteps)

    Raises ``BundleError`` if there is neither golden data nor a reference, or they are of another bundle, and
    ``UsageError`` for values out of range, or for options of the reference without it.
    """
    settings = VerifySettings(
        timesteps=timesteps, tolerance=tolerance, target=target, device=device, seed=seed, layers=layers, small=small
    )
    root = bundle.root if isinstance(bundle, Bundle) else Path(bundle)
    return verify_bundle(root, settings, reference=None if reference is None else Path(reference), progress=progress)


def verify_bundle(
    path: Path,
    settings: VerifySettings,
    *,
    reference: Path | None = None,
    golden_only: bool = False,
    progress: Progress = no_progress,
) -> VerifyReport:
    """Compare a bundle with its golden data, and with its reference if there is one, by default where it was built.

    With ``golden_only`` no reference is looked for. Raises ``BundleError`` if there is neither, and ``UsageError`` for
    options of the reference without it, for layers of a quantized bundle and for a model without a smaller size.
    """
    if settings.device is not None:
        check_present(settings.device)  # before files are read
    bundle = Bundle.open(path)
    settings.check_for(bundle)
    golden = read_golden(bundle)
    opened, no_reference = (None, None) if golden_only else _open_reference(bundle, settings, reference)
    if golden_only and golden is None:
        raise BundleError(f"{bundle.root} has no golden data, since an older dyexport built it; build it again")
    with _opened(bundle, settings) as transformer:
        comparisons = [] if golden is None else _compare_golden(bundle, golden, transformer, progress)
        result = None if opened is None else opened.compare(transformer, progress)
        device = str(transformer.device)
    of_golden = None if golden is None else _golden_report(bundle, golden, comparisons, settings)
    expected = expected_reference(bundle)
    report = summarize(bundle.manifest, device, settings, result, of_golden, comparisons, no_reference, expected)
    if opened is None or not settings.layers:
        return report
    return replace(report, layers=opened.compare_layers(report.tolerance))


@missing_extras()
def verify_golden(bundle: Bundle, settings: VerifySettings, progress: Progress = no_progress) -> VerifyReport | None:
    """Compare a bundle with its golden data alone; None for a bundle of an earlier version, which has none."""
    golden = read_golden(bundle)
    if golden is None:
        return None
    with _opened(bundle, settings) as transformer:
        comparisons = _compare_golden(bundle, golden, transformer, progress)
        device = str(transformer.device)
    of_golden = _golden_report(bundle, golden, comparisons, settings)
    expected = expected_reference(bundle)
    return summarize(bundle.manifest, device, settings, None, of_golden, comparisons, None, expected)


def _open_reference(
    bundle: Bundle, settings: VerifySettings, given: Path | None
) -> tuple[BundleReference | None, str | None]:
    """Open the reference; or return why it cannot be opened, if golden data takes its place."""
    try:
        path = find_reference(bundle) if given is None else reference_of(bundle, given)
        with missing_extras():
            from dyexport.verification.reference import BundleReference
        return BundleReference(bundle, path, settings), None
    except (BundleError, MissingDependencyError) as error:
        if given is not None:
            raise
        return None, golden_instead(bundle, settings, error)


def _compare_golden(
    bundle: Bundle, golden: GoldenData, transformer: BundleTransformer, progress: Progress
) -> list[Comparison]:
    comparisons = []
    for comparison in compare_golden(bundle, golden, transformer):
        comparisons.append(comparison)
        progress(len(comparisons), len(golden.samples))
    return comparisons


def _golden_report(
    bundle: Bundle, golden: GoldenData, comparisons: Sequence[Comparison], settings: VerifySettings
) -> GoldenReport:
    """Summarize the comparison with golden data, and compare the dense network if there is one."""
    spec, info = bundle.manifest.model, golden.info
    dense: WorstErrors | None = None
    if has_dense(bundle, golden, engine_files(settings.target)):
        with _opened(bundle, settings, dense=True) as transformer:
            dense = WorstErrors.of(compare_dense(golden, transformer))
    gates, wrong_gates = check_golden_gates(bundle, golden)
    return GoldenReport(
        timesteps=info.timesteps,
        source=info.source,
        batch=info.batch,
        tokens=info.tokens,
        text_tokens=info.text_tokens,
        error=WorstErrors.of(comparison.errors for comparison in comparisons).measured(spec),
        gates=gates,
        wrong_gates=wrong_gates,
        dense_compared=dense is not None,
        dense_error=None if dense is None else dense.measured(spec),
    )


def _opened(bundle: Bundle, settings: VerifySettings, *, dense: bool = False) -> closing[BundleTransformer]:
    """Load the bundle, and close it after the context."""
    target, device = settings.target, settings.device
    return closing(load(bundle.root, target=target, device=device, check_hashes=False, fallback=False, dense=dense))


def find_reference(bundle: Bundle, work: Path | None = None, *, cure: str = GIVE_REFERENCE) -> Path:
    """Return the dynamic checkpoint that a bundle was built from, in ``work`` or else where the manifest says.

    Raises ``BundleError`` if it is not there, with a ``cure``, or has changed.
    """
    path, reference = reference_of(bundle, work=work, cure=cure), bundle.manifest.reference
    assert reference is not None
    if digest_of({name: record.sha256 for name, record in describe(path).items()}) != reference.sha256:
        change = "has changed since the bundle was built; build again"
        raise BundleError(f"the reference {path} {change if work is None else f'is not the one of {bundle.root}'}")
    return path
