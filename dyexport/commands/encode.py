"""``dyexport encode``: a folder of pictures to the latents that ``--data`` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dyexport.commands import options
from dyexport.commands.stages import stage_lines
from dyexport.console import (
    DebugOption,
    JsonOption,
    emit,
    format_bytes,
    pairs,
)
from dyexport.files import check_writable

if TYPE_CHECKING:
    from dyexport.encoding.encode import Encoded, Encoding, EncodingProgress

EXAMPLES = (
    "dyexport encode pictures/ --vae stabilityai/sd-vae-ft-ema -o latents",
    "dyexport encode pictures/ --model dit-xl-2 --flip -o latents",
    "dyexport encode captioned/ --pipeline black-forest-labs/FLUX.1-dev -o latents",
)


def encode(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Pictures in a subfolder for each class, or with captions: metadata.jsonl, .csv or .parquet, or a "
            ".txt file next to each picture.",
            metavar="FOLDER",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the latents.", metavar="DIR")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Model that the latents are for. Default: that of --pipeline, or any model of classes.",
            metavar="NAME",
            autocompletion=options.model_names,
        ),
    ] = None,
    vae: Annotated[
        str | None, typer.Option(help="VAE. Default: that of --pipeline.", metavar="DIR|ID", show_default=False)
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(
            help="diffusers pipeline with the VAE and the text encoders for captions. Default: the model's published "
            "one.",
            metavar="DIR|ID",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="Height and width: pictures are resized and their center is cropped. Default: the model's, or the "
            "VAE's.",
            metavar="PIXELS",
        ),
    ] = None,
    buckets: Annotated[
        bool,
        typer.Option(
            "--buckets",
            help="Crop each picture to the nearest of several aspect ratios from 1:2 to 2:1, for models of prompts.",
            metavar="",
        ),
    ] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Add the latents of mirrored pictures.", metavar="")] = False,
    split: Annotated[
        str | None,
        typer.Option(help="Split, where these are the top-level folders. Default: train.", metavar="NAME"),
    ] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="File with the names of all classes, one a line, in the order of the labels. Default: the names of "
            "the subfolders, sorted.",
            metavar="FILE",
        ),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Encode a folder of pictures to the latents that --data takes.

    The same command continues after the last shard that is finished, and encodes only what is new.
    """
    from dyexport.encoding.settings import EncodeSettings

    settings = EncodeSettings.complete(
        folder,
        model=model,
        vae=vae,
        pipeline=pipeline,
        size=size,
        buckets=buckets,
        flip=flip,
        split=split,
        classes=classes,
    )
    folder_of_pictures = settings.read_folder()  # before torch is imported
    check_writable(out)
    with _phases() as progress:
        from dyexport.encoding.encode import INDEX, Encoding, check_output
        from dyexport.stages.locking import locked_output
        from dyexport.training.data_record import warn_of_scale

        encoding = Encoding(settings, folder_of_pictures)
        check_output(out, encoding)
        with locked_output(out):
            out.mkdir(parents=True, exist_ok=True)
            encoded = encoding.write(encoding.samples(out / INDEX, progress), out, progress)
    warn_of_scale(encoded.record, out)
    payload = _payload(encoding, encoded)
    emit(payload, as_json=json, human=lambda console: console.print(pairs([*_lines(payload)])))


def _payload(encoding: Encoding, encoded: Encoded) -> Mapping[str, Any]:
    preset, record = encoding.settings.preset, encoded.record
    return {
        "latents": str(encoded.directory),
        "model": None if preset is None else preset.name,
        "vae": None if (source := encoding.pictures.source) is None else source.place,
        "pictures": len(encoding.folder.pictures),
        "samples": record.samples,
        "classes": None if record.classes is None else list(record.classes),
        "size": record.options["size"],
        "shape": list(encoding.pictures.shape()),
        "sizes": encoded.sizes,
        "flip": encoding.settings.flip,
        **{"scaling": record.scaling, "mean": record.mean, "std": record.std},
        "shards": encoded.shards,
        "reused": encoded.reused,
        "bytes": sum(file.stat().st_size for file in encoded.directory.iterdir()),
    }


def _lines(payload: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "latents", payload["latents"]
    yield "pictures", f"{payload['pictures']}{_cropped(payload)}"
    kept = f" ({payload['reused']} were there)" if payload["reused"] else ""
    yield "samples", f"{payload['samples']} of shape {tuple(payload['shape'])}{kept}"
    if payload["classes"] is not None:
        yield "classes", str(len(payload["classes"]))
    if payload["vae"] is not None:
        yield "VAE", payload["vae"]
    yield "mean, standard deviation", f"{payload['mean']:.3f}, {payload['std']:.3f}"
    yield "on disk", format_bytes(payload["bytes"])


def _cropped(payload: Mapping[str, Any]) -> str:
    side = f"{payload['size']} x {payload['size']} px"
    return f", cropped to {side}" if payload["sizes"] == 1 else f", cropped to {payload['sizes']} sizes of about {side}"


@contextmanager
def _phases() -> Iterator[EncodingProgress]:
    """Show the progress of each phase on stderr. Ctrl-C becomes ``Interrupted``."""
    with stage_lines("shard") as lines:
        started: set[str] = set()

        def progress(phase: str, done: int, total: int, detail: str) -> None:
            if phase not in started:
                started.add(phase)
                lines.started(phase, "")
            lines.advanced(phase, done, total, detail)

        yield progress
