"""``dyexport compile``: engines of a bundle for the machine that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from dyexport.commands import options
from dyexport.console import (
    DebugOption,
    Interrupted,
    JsonOption,
    StageLines,
    chatter_on_stderr,
    emit,
    format_bytes,
    pairs,
)

if TYPE_CHECKING:
    from dyexport.compilation.api import CompiledTarget

EXAMPLES = (
    "dyexport compile flux-0.5 --target tensorrt",
    "dyexport compile flux-0.5 --target tensorrt-rtx --compute-capability 8.9 --profile batch=1:1:4",
    "dyexport compile sit-digits-0.5 --target tensorrt-rtx --json",
)


def compile(
    bundle: options.BundleArgument,
    target: Annotated[
        list[str],
        typer.Option(
            help="Engine format to compile for; may be repeated. `dyexport targets` lists them.",
            metavar="NAME",
            autocompletion=options.compiled_target_names,
        ),
    ],
    profile: options.ProfileOption = None,
    compute_capability: options.ComputeCapabilityOption = None,
    stream_weights: Annotated[
        bool,
        typer.Option(
            "--stream-weights",
            help="Keep weights that do not fit on the GPU in host memory.",
            rich_help_panel=options.TENSORRT,
            metavar="",
        ),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Engines to compile at a time. Default: as many as cores and free memory allow.", metavar="N"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device to compile for: cpu, cuda or cuda:N. Default: CUDA where there is a GPU.", metavar="NAME"
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compile the graphs of a bundle for this machine, and add the engines to the bundle.

    Needs neither the checkpoint nor the work directory of the build. Repeat the command to resume.
    """
    from dyexport.bundle.reader import Bundle
    from dyexport.compilation.settings import CompileSettings
    from dyexport.exporters.tensorrt_profiles import TensorrtSettings

    settings = CompileSettings(
        targets=tuple(name for text in target for name in options.split(text)),
        tensorrt=TensorrtSettings(
            compute_capabilities=options.split(compute_capability or ""),
            profiles=tuple(profile or ()),
            stream_weights=stream_weights,
        ),
        device=device,
        jobs=jobs,
    )
    settings.check_for(Bundle.open(bundle, check_hashes=False).manifests())  # before libraries are loaded
    lines = EngineLines()
    try:
        with chatter_on_stderr(), lines:
            from dyexport.compilation.api import compile_bundle

            results = compile_bundle(bundle, settings, lines, lines.announce)
    except KeyboardInterrupt as error:
        raise Interrupted(lines.stopped()) from error
    payload = {
        "bundle": str(bundle),
        "targets": {
            result.target: {
                "compiled": {name: round(seconds, 3) for name, seconds in result.seconds.items()},
                "elapsed_seconds": round(result.elapsed, 3),
                "up_to_date": list(result.up_to_date),
                "bytes": result.bytes,
            }
            for result in results
        },
    }
    emit(payload, as_json=json, human=lambda console: console.print(pairs(_lines(results))))


class EngineLines(StageLines):
    """Progress of a compilation on stderr: a line for each target, then one for each finished engine."""

    def __init__(self) -> None:
        super().__init__()
        self._engines = self._before = 0

    def announce(self, target: str, engines: int, at_once: int, replaced: tuple[str, ...]) -> None:
        """Print what is about to be compiled."""
        self._engines, self._before = engines, self.finished_stages
        if replaced:
            self._print(
                f"{target}: engines compiled with {' '.join(replaced)} will be replaced by ones with the options of "
                "this command; to keep them, press Ctrl-C and repeat with their options"
            )
        self._print(f"{target}: compiling {counted(engines)}, {at_once} at a time")

    @property
    def _kept(self) -> int:
        return min(self.finished_stages - self._before, self._engines)

    def _remark(self) -> str:
        return f", {self._engines - self._kept} left" if self._kept < self._engines else ""

    def stopped(self) -> str:
        """Return what to say of an interruption."""
        if not self._engines:
            return "stopped; no engine was compiled yet; repeat the command to go on"
        return f"stopped; {self._kept} of {counted(self._engines)} are kept; repeat the command to go on"


def counted(engines: int) -> str:
    """Return ``1 engine`` or ``4 engines``."""
    return f"{engines} engine{'s' if engines != 1 else ''}"


def _lines(results: Sequence[CompiledTarget]) -> list[tuple[str, str]]:
    return [(result.target, result_line(result)) for result in results]


def result_line(result: CompiledTarget) -> str:
    """Return what is printed about a target."""
    size = f", {format_bytes(result.bytes)}" if result.bytes else ""
    if not result.seconds:
        return f"up to date, {counted(len(result.up_to_date))}{size}"
    rest = f", {len(result.up_to_date)} up to date" if result.up_to_date else ""
    return f"{counted(len(result.seconds))} compiled in {result.elapsed:.1f} s{rest}{size}"
