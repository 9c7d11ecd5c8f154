"""The Dockerfiles, as far as a machine without Docker can check them: instructions, sources, extras, ignored files."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILES = sorted((ROOT / "docker").iterdir())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
INSTRUCTIONS = {
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "RUN",
    "SHELL",
    "VOLUME",
} | {"WORKDIR"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile and their arguments, without comments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    logical = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in logical if line.strip())]


def sources(path: Path) -> list[str]:
    """Return what a Dockerfile copies from the checkout."""
    return [source for name, rest in instructions(path) if name == "COPY" for source in shlex.split(rest)[:-1]]


def defaults(path: Path) -> dict[str, str]:
    return dict(rest.split("=", 1) for name, rest in instructions(path) if name == "ARG")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_instructions_are_known_and_images_pinned(path: Path) -> None:
    found = instructions(path)
    assert {name for name, _ in found} <= INSTRUCTIONS
    (image,) = [rest for name, rest in found if name == "FROM"]
    tag = re.sub(r"\$\{(\w+)\}", lambda match: defaults(path)[match[1]], image).partition(":")[2]
    assert re.fullmatch(r"\d+\.\d+(-py3)?", tag), image
    assert "NOT BUILT YET" in path.read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_is_enough_to_build_the_package(path: Path) -> None:
    copied = set(sources(path))
    assert [source for source in copied if not (ROOT / source).exists()] == []
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {folder.partition("/")[0] for folder in setuptools["package-dir"].values()}
    assert copied == folders | {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_context_includes_what_is_copied_and_nothing_else(path: Path) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(sources(path))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_extras_are_those_of_the_package(path: Path) -> None:
    extras = set(defaults(path)["EXTRAS"].split(","))
    assert extras <= set(PROJECT["project"]["optional-dependencies"])
    assert not {"cpu", "gpu"} <= extras, "both install onnxruntime"
    assert any(".[${EXTRAS}]" in rest for name, rest in instructions(path) if name == "RUN")
