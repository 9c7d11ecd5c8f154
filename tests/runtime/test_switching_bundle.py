"""The engines of a bundle as one engine, which takes what the stock network takes."""

from __future__ import annotations

import pytest
import torch

from dyexport.errors import EngineMismatchError
from dyexport.runtime.loading import load
from dyexport.runtime.stock import example_inputs
from tests.runtime.bundles import TinyBundle
from tests.runtime.conftest import Saved


@pytest.mark.parametrize("max_resident", [None, 1])
@pytest.mark.parametrize("backbone", ["dit", "flux", "latte"])
def test_it_runs_at_every_t_as_the_stand_in_does(
    backbone: str, max_resident: int | None, request: pytest.FixtureRequest
) -> None:
    saved: Saved = request.getfixturevalue(backbone)
    transformer = load(saved.bundle, max_resident=max_resident)
    start, end = transformer.spec.timestep_range
    served = set()
    for share in (0.9, 0.1, 0.5):
        inputs = example_inputs(transformer.spec, 2, start + share * (end - start))
        found = transformer.engine.run(inputs)["sample"]
        assert torch.equal(found, transformer(**inputs).sample)
        served.add(transformer.engine._current)
    assert len(served) == 2
    assert {spec.name for spec in transformer.engine.io.inputs} == inputs.keys()


def test_its_samples_are_at_one_t(flux: Saved) -> None:
    transformer = load(flux.bundle)
    inputs = example_inputs(transformer.spec, 2, 0.5)
    with pytest.raises(EngineMismatchError, match=r"same timestep, not at 0\.25, 0\.5"):
        transformer.engine.run({**inputs, "timestep": torch.tensor([0.5, 0.25])})
    with pytest.raises(EngineMismatchError, match="guidance must have shape"):
        transformer.engine.run({**inputs, "guidance": torch.full((3,), 3.5)})
    del inputs["timestep"]
    with pytest.raises(EngineMismatchError, match=r"engine takes .*timestep"):
        transformer.engine.run(inputs)


def test_a_stand_in_says_what_it_is(flux: Saved, ddpm: TinyBundle) -> None:
    transformer = load(flux.bundle)
    ratio = transformer._bundle.manifest.plan.flops_ratio
    assert repr(transformer).splitlines() == [
        "FluxBundle('flux-tiny', target 'onnx' on 'cpu',",
        "  2 engines in fp32, 0B of weights resident,",
        f"  FLOPs ratio {ratio:.3f}, built for 0.5)",
    ]
    transformer(**example_inputs(transformer.spec, 1, 0.9))
    resident = transformer.get_memory_footprint()
    assert f"{resident / 1e6:.1f}MB of weights" in repr(transformer)
    assert "1 engine in fp32" in repr(load(ddpm.root, dense=True))
