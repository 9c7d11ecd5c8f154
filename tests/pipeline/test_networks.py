"""The networks of a bundle: one per segment, one conditioning, and the dense ones to compare with."""

from __future__ import annotations

from typing import Any

import pytest

from dyexport.bundle.manifest import CONDITIONING, DENSE, DENSE_CONDITIONING
from dyexport.calibration.segments import PlanSettings
from dyexport.calibration.widths import read_widths
from dyexport.pipeline.networks import STATIC_PREFIX, Network, OwnDense, cut_networks, plan_for
from dyexport.slicing.slicer import SliceContext
from dyexport.slicing.store_layout import lay_out
from tests.factories import shared_tiny_model, spec_of, tiny_preset

PRESET = tiny_preset()
SPEC = spec_of(PRESET)
WIDTHS = read_widths(shared_tiny_model(tokens=False), PRESET.timestep_range)
PLAN = plan_for(SPEC, WIDTHS, None, PlanSettings(engines=2))


def cut(*, baseline: bool = False, own_dense: OwnDense = "nothing") -> dict[str, Network]:
    context = SliceContext.of(SPEC, WIDTHS, None)
    networks = cut_networks(context, WIDTHS, PLAN.segments, baseline=baseline, own_dense=own_dense)
    return {network.name: network for network in networks}


def store_bytes(networks: dict[str, Network]) -> int:
    return lay_out(recipe for each in networks.values() for recipe in each.slice.recipes.values()).nbytes


def sources(network: Network) -> set[str]:
    return {source for recipe in network.slice.recipes.values() for source in recipe.sources}


@pytest.mark.parametrize(
    ("settings", "dense"),
    [
        ({"own_dense": "everything"}, []),
        ({"baseline": True}, [DENSE]),
        ({"baseline": True, "own_dense": "biases"}, [DENSE, DENSE_CONDITIONING]),
        ({"baseline": True, "own_dense": "everything"}, [DENSE, DENSE_CONDITIONING]),
    ],
)
def test_networks_by_name(settings: dict[str, Any], dense: list[str]) -> None:
    networks = cut(**settings)
    assert list(networks) == ["segment-00", "segment-01", CONDITIONING, *dense]
    served = [network.segment for network in networks.values()]
    assert served[:2] == list(PLAN.segments)
    assert [name for name, network in networks.items() if network.segment is None] == [
        name for name in networks if name in (CONDITIONING, DENSE_CONDITIONING)
    ]


def test_a_dense_network_of_its_own_shares_nothing() -> None:
    networks = cut(baseline=True, own_dense="everything")
    for name, network in networks.items():
        static = {source.startswith(STATIC_PREFIX) for source in sources(network)}
        assert static == {name in (DENSE, DENSE_CONDITIONING)}
    own = store_bytes({name: networks[name] for name in (DENSE, DENSE_CONDITIONING)})
    assert store_bytes(networks) == store_bytes(cut()) + own


def test_a_dense_network_with_biases_of_its_own_shares_the_rest() -> None:
    networks, same = cut(baseline=True, own_dense="biases"), cut(baseline=True)
    for name, network in networks.items():
        dense = name in (DENSE, DENSE_CONDITIONING)
        assert all(source.startswith(STATIC_PREFIX) == (dense and "bias" in source) for source in sources(network))
    biases = {
        recipe
        for name in (DENSE, DENSE_CONDITIONING)
        for recipe in networks[name].slice.recipes.values()
        if any(source.startswith(STATIC_PREFIX) for source in recipe.sources)
    }
    assert store_bytes(networks) == store_bytes(same) + lay_out(biases).nbytes


def test_a_dense_network_of_the_same_weights_shares_the_conditioning_and_its_longest_units() -> None:
    dense = cut(baseline=True)[DENSE]
    assert store_bytes(cut(baseline=True)) < store_bytes(cut()) + dense.slice.nbytes
    assert not sources(dense) & sources(cut()[CONDITIONING])


def test_a_plan_counts_the_conditioning_once() -> None:
    networks = cut()
    assert PLAN.disk_bytes == store_bytes(networks)
    assert PLAN.resident_bytes == sum(network.slice.nbytes for network in networks.values())
    assert networks[CONDITIONING].slice.nbytes > 0
