"""What fits in a given amount of memory, decided without a device."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dyexport
from dyexport.bundle.reader import Bundle
from dyexport.errors import UsageError
from dyexport.runtime.memory import Placement, WeightBytes, place
from tests.runtime.calls import midpoints, predict

GIB = 2**30


def weights(*engines: int, conditioning: int = 1, together: int | None = None, streamable: bool = False) -> WeightBytes:
    together = sum(engines) + conditioning if together is None else together
    return WeightBytes(engines=engines, conditioning=conditioning, together=together, streamable=streamable)


@pytest.mark.parametrize(
    ("given", "memory", "wanted"),
    [
        (weights(4, 3, 2), 10, Placement()),
        (weights(4, 3, 2), 9, Placement(max_resident=2)),
        (weights(4, 3, 2), 7, Placement(max_resident=1)),
        (weights(4, 3, 2), 5, Placement(max_resident=1)),
        (weights(4, 3, 2, together=5), 5, Placement()),
        (weights(4, 3, 2, streamable=True), 10, Placement()),
        (weights(4, 3, 2, streamable=True), 5, Placement(max_resident=1)),
        (weights(4, 3, 2, streamable=True), 4, Placement(max_resident=1, streaming_budget=3)),
    ],
)
def test_everything_then_fewer_engines_then_streaming(given: WeightBytes, memory: int, wanted: Placement) -> None:
    assert place(given, memory) == wanted


@pytest.mark.parametrize(("streamable", "needed"), [(False, 5), (True, 2)])
def test_too_little_is_named_with_what_is_needed(streamable: bool, needed: int) -> None:
    with pytest.raises(UsageError, match=f"memory of {needed - 1} bytes .* take {needed}"):
        place(weights(4, 3, streamable=streamable), needed - 1)
    place(weights(4, 3, streamable=streamable), needed)


@given(
    engines=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    conditioning=st.integers(0, 20),
    memory=st.integers(0, 200),
    streamable=st.booleans(),
)
def test_never_more_than_allowed(engines: list[int], conditioning: int, memory: int, streamable: bool) -> None:
    bundle = weights(*engines, conditioning=conditioning, streamable=streamable)
    try:
        found = place(bundle, memory)
    except UsageError:
        assert conditioning + (1 if streamable else max(engines)) > memory
        return
    if found.max_resident is None:
        assert bundle.together <= memory
        return
    held = [min(size, found.streaming_budget or size) for size in engines]
    assert all(sum(some) + conditioning <= memory for some in combinations(held, found.max_resident))


def test_a_bundle_runs_within_its_memory(sit_tiny: Bundle) -> None:
    """Two of three engines at a time, and the same output as with all of them."""
    whole = dyexport.load(sit_tiny.root)
    wanted = {t: predict(whole, t) for t in midpoints(sit_tiny)}
    sizes = sorted(engine.weight_bytes for engine in whole.residency.engines)
    limit = whole.residency.weight_bytes - sizes[0]
    tight = dyexport.load(sit_tiny.root, memory=limit)
    for t, sample in wanted.items():
        torch.testing.assert_close(predict(tight, t), sample)
        tight.engine._settle()
        assert tight.residency.weight_bytes <= limit
    assert sum(engine.active for engine in tight.residency.engines) == 2
    assert dyexport.load(sit_tiny.root, memory="1GiB").engine.max_resident == 3


def test_memory_and_max_resident_exclude_each_other(sit_tiny: Bundle) -> None:
    with pytest.raises(UsageError, match="max_resident is 2 and memory '1GiB'"):
        dyexport.load(sit_tiny.root, memory="1GiB", max_resident=2)
    with pytest.raises(UsageError, match="'a lot'"):
        dyexport.load(sit_tiny.root, memory="a lot")
