"""npm packages that hold the pictures of the emoji data set: download, check, and read."""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from dyexport.errors import DataError, reason

REGISTRY = "https://registry.npmjs.org"
REGISTRY_VARIABLE = "NPM_CONFIG_REGISTRY"  # as npm names it
FOLDER_VARIABLE = "DYEXPORT_EMOJI"
CHUNK = 1 << 20  # bytes
TIMEOUT = 60  # seconds without a byte


@dataclass(frozen=True, kw_only=True)
class Package:
    """A pinned npm package. ``pictures`` is the path of a picture in it, with the emoji's code points to fill in."""

    name: str
    version: str
    integrity: str  # SHA-512 of the tarball in base64, as the registry states it
    megabytes: int
    license: str
    pictures: str
    flags: bool = True  # False where the flags repeat those of another package

    @property
    def label(self) -> str:
        return f"{self.name}@{self.version}"

    def url(self) -> str:
        registry = os.environ.get(REGISTRY_VARIABLE) or REGISTRY
        return f"{registry.rstrip('/')}/{self.name}/-/{self.name.rpartition('/')[2]}-{self.version}.tgz"

    def holds(self, path: str) -> bool:
        """Return whether a file is the list of emoji or one of the pictures."""
        folder, _, ending = self.pictures.partition("{}")
        return path == INDEX or (path.startswith(folder) and path.endswith(ending))


INDEX = "emoji.json"
TWITTER = Package(
    name="emoji-datasource-twitter",
    version="16.0.0",
    integrity="7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
    megabytes=62,
    license="CC-BY-4.0",
    pictures="img/twitter/64/{}.png",
)
GOOGLE = Package(
    name="emoji-datasource-google",
    version="16.0.0",
    integrity="ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
    megabytes=74,
    license="Apache-2.0",
    pictures="img/google/64/{}.png",
)
MICROSOFT = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    integrity="Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    megabytes=16,
    license="MIT",
    pictures="assets/{}.webp",
    flags=False,
)
PACKAGES = (TWITTER, GOOGLE, MICROSOFT)
INSTALL = f"npm install --prefix DIR {' '.join(package.label for package in PACKAGES)}"


def read_packages() -> Iterator[tuple[Package, dict[str, bytes]]]:
    """Yield each package with its files by path.

    ``DYEXPORT_EMOJI`` names a ``node_modules`` folder to read instead of downloading. Raises ``DataError``.
    """
    folder = os.environ.get(FOLDER_VARIABLE)
    for package in PACKAGES:
        yield package, _unpacked(package, Path(folder)) if folder else _downloaded(package)


def _unpacked(package: Package, folder: Path) -> dict[str, bytes]:
    root = folder / package.name
    try:
        paths = [path for path in root.rglob("*") if package.holds(path.relative_to(root).as_posix())]
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
    except OSError as error:
        raise DataError(f"cannot read {root}: {reason(error)}; run `{INSTALL}` again") from error
    if not files:
        raise DataError(
            f"{FOLDER_VARIABLE} is {str(folder)!r}, which does not hold {package.name}; run `{INSTALL}` and name "
            "DIR/node_modules"
        )
    return files


def _downloaded(package: Package) -> dict[str, bytes]:
    url = package.url()
    print(
        f"Downloading {package.label}: {package.megabytes} MB of pictures, licensed {package.license}, from {url}",
        file=sys.stderr,
    )
    with TemporaryFile() as file:
        try:
            digest = _fetch(url, file)
        except (OSError, ValueError) as error:  # urllib raises ValueError for what is no URL
            raise DataError(
                f"cannot download {url}: {reason(error)}; connect to it, or run `{INSTALL}` elsewhere and set "
                f"{FOLDER_VARIABLE} to its DIR/node_modules"
            ) from error
        if digest != package.integrity:
            raise DataError(
                f"{url} has SHA-512 {digest}, expected {package.integrity}; try again, or check {REGISTRY_VARIABLE}"
            )
        file.seek(0)
        return _members(package, file)


def _fetch(url: str, file: IO[bytes]) -> str:
    """Download to a file and return the SHA-512 in base64."""
    import urllib.request

    digest = hashlib.sha512()
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        while chunk := response.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
    return base64.b64encode(digest.digest()).decode()


def _members(package: Package, file: IO[bytes]) -> dict[str, bytes]:
    files = {}
    with tarfile.open(fileobj=file, mode="r:gz") as archive:
        for member in archive:
            path = member.name.removeprefix("package/")
            if package.holds(path) and (content := archive.extractfile(member)) is not None:
                files[path] = content.read()
    return files
