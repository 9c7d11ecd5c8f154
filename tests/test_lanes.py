"""The quick lane leaves out what builds, and nothing else."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

import dyexport
from dyexport.pipeline.build import opened
from tests.built import built_once
from tests.lanes import COLLECTED, builds
from tests.manifests import forge
from tests.pipeline.tiny import build, hashes, tiny_settings


def calls_it() -> object:
    return opened


def calls_a_helper() -> object:
    return build


def calls_in_a_lambda() -> object:
    return lambda: build


def calls_the_library() -> object:
    return dyexport.build


def opens_a_shared_bundle() -> object:
    return built_once


def calls_itself() -> object:
    return calls_itself, calls_a_helper


def only_prepares() -> object:
    return dyexport.verify, tiny_settings, hashes, forge, pytest


@pytest.mark.parametrize(
    "function",
    [
        opened,
        build,
        calls_it,
        calls_a_helper,
        calls_in_a_lambda,
        calls_the_library,
        opens_a_shared_bundle,
        calls_itself,
    ],
)
def test_what_can_reach_a_builder_builds(function: object) -> None:
    assert builds(function)


def test_what_names_none_does_not() -> None:
    assert not builds(only_prepares)


@pytest.mark.parametrize("name", ["sit_tiny"])
def test_a_bundle_that_is_asked_for_by_name_counts(name: str, request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("build") is not None


@pytest.mark.parametrize("name", ["shared_folder"])
def test_other_fixtures_that_are_asked_for_by_name_do_not(name: str, request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("build") is None


def test_only_the_lane_of_builds_has_the_shared_bundles(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        if {"sit_tiny", "flux_tiny", "latte_tiny", "qwen_image_tiny", "tensorrt", "triton"} & {
            *getattr(item, "fixturenames", ()),
            *(m.name for m in item.iter_markers()),
        }:
            assert item.get_closest_marker("build") is not None, item.nodeid


def lanes() -> list[tuple[str, list[str]]]:
    """Marker expressions of the lanes that run slow tests, and the folders that they are run in."""
    text = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    found = re.findall(r'^\t.*-m "(slow[^"]*)"(?: --ignore \S+)? (.+)$', text, re.MULTILINE)
    return [(markers, folders.split()) for markers, folders in found]


def test_every_slow_test_that_needs_no_gpu_has_a_lane(request: pytest.FixtureRequest) -> None:
    assert len(lanes()) == 4
    for item in request.config.stash[COLLECTED]:
        marks = defaultdict(bool, {mark.name: True for mark in item.iter_markers()})
        if marks["slow"] and not marks["gpu"]:
            assert any(
                item.nodeid.startswith(tuple(folders)) and eval(markers, {"__builtins__": {}}, marks)
                for markers, folders in lanes()
            ), f"no target of the Makefile runs {item.nodeid}"
