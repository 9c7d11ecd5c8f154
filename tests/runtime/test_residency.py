from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dyexport.bundle.reader import Bundle
from dyexport.engines.base import WeightSpan
from dyexport.engines.registry import EngineOptions, make_engines
from dyexport.engines.switching import EngineChoice, SwitchingEngine
from dyexport.runtime.conditioning import Conditioner
from dyexport.runtime.residency import Residency, device_bytes, distinct_bytes, measure, process_bytes

spans = st.builds(
    WeightSpan,
    path=st.sampled_from([Path("a"), Path("b")]),
    offset=st.integers(0, 40),
    length=st.integers(0, 20),
)


@given(st.lists(spans, max_size=8))
def test_overlapping_bytes_count_once(listed: list[WeightSpan]) -> None:
    covered = {(span.path, byte) for span in listed for byte in range(span.offset, span.offset + span.length)}
    assert distinct_bytes(listed) == len(covered)


def test_process_bytes(tmp_path: Path) -> None:
    rollup = tmp_path / "smaps_rollup"
    rollup.write_text("00400000-7fff ---p 00000000 00:00 0  [rollup]\nRss:  999 kB\nPss:  123 kB\n")
    assert process_bytes(rollup) == 123 * 1024
    assert process_bytes(tmp_path / "absent") is None


@pytest.mark.gpu
def test_device_bytes_see_what_torch_allocates() -> None:
    before = device_bytes("cuda")
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    after = device_bytes("cuda")
    assert before is not None
    assert after is not None
    assert after - before >= len(held) // 2, "the allocator may have had some of it already"


@pytest.mark.parametrize("shared", [True, False])
def test_shared_weights_count_once(sit_tiny: Bundle, shared: bool) -> None:
    """Two engines over one graph: the same bytes, mapped once or copied twice."""
    first, second = (sit_tiny.root / f"graphs/segment-{index:02}.onnx" for index in range(2))
    options = EngineOptions(share_weights=shared)
    *engines, conditioning = make_engines(
        "onnx", [first, first, second, sit_tiny.root / "graphs/conditioning.onnx"], options
    )
    switching = SwitchingEngine(engines, lambda inputs: EngineChoice(engine=0, inputs={}))
    for engine in engines[:2]:
        engine.activate()
    conditioner = Conditioner(conditioning)
    residency = measure(switching, conditioner, step_seconds=0.0)
    once = residency.engines[0].weight_bytes
    assert residency.weight_bytes == (once if shared else 2 * once) > 0
    assert residency.device_bytes is None
    assert not residency.engines[2].active
    conditioner.engine.activate()
    conditioned = measure(switching, conditioner, step_seconds=0.0)
    assert conditioned.weight_bytes == residency.weight_bytes + distinct_bytes(conditioner.engine.weights)


def test_conditioning_runs_inside_an_engine(sit_tiny: Bundle) -> None:
    paths = [sit_tiny.root / f"graphs/{name}.onnx" for name in ("segment-00", "conditioning")]
    engine, conditioning = make_engines("onnx", paths)
    conditioner = Conditioner(conditioning)
    conditioner.at(0.5, {"class_labels": torch.tensor([1])})
    residency = measure(
        SwitchingEngine([engine], lambda _: EngineChoice(engine=0, inputs={})), conditioner, step_seconds=9.0
    )
    assert 0 < residency.run_seconds == conditioner.seconds
    assert residency.outside_seconds == 9.0 - conditioner.seconds


def test_overhead_is_what_engines_do_not_account_for() -> None:
    residency = Residency(
        engines=(),
        switches=(),
        weight_bytes=0,
        process_bytes=None,
        device_bytes=None,
        run_seconds=3.0,
        outside_seconds=1.0,
    )
    assert residency.switch_overhead == 0.25
    assert replace(residency, run_seconds=0.0, outside_seconds=0.0).switch_overhead == 0.0
