"""The benchmark of rivals: its tables from hand-made scores, the rule of its cache, and the whole command in short."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.rivals.__main__ import main
from benchmarks.rivals.cache_dit_network import (
    CacheSetting,
    Pilot,
    cached_step_cost,
    cost_of,
    fitted_setting,
)
from benchmarks.rivals.chart import save_chart
from benchmarks.rivals.costs import dense_composition, part, slim_composition
from benchmarks.rivals.measure import Point
from benchmarks.rivals.publish import Part, comments, publish
from benchmarks.rivals.report import Report, publish_summary
from benchmarks.rivals.reuse import ReusingNetwork, decisions, relative_change, threshold_for
from benchmarks.rivals.tables import Row, Spread, as_csv, markdown_table, rows_of, spread_text, summary
from benchmarks.rivals.timing import Timings
from benchmarks.rivals.variants import CONTROL, DENSE, DYNAMIC, MODELS, REUSE, WIDTHS, Variant, variants_of
from benchmarks.rivals.variants import equal_flops_steps as equal
from dyexport.bench.statistics import Timing
from dyexport.bundle.reader import Bundle
from dyexport.errors import UsageError
from dyexport.evaluation.settings import SamplingConfig
from dyexport.flops import FlopsModel
from dyexport.report.costs import step_costs
from dyexport.report.trajectory import trajectory_of
from tests.pipeline.tiny import TINY

HALF = Variant(name=DYNAMIC, budget=0.5)
ROUNDS = 5


def timed(seconds: float, *, noise: float = 0.0) -> Timing:
    return Timing.of([[seconds * (1 + noise * (index % 2))] for index in range(ROUNDS)])


def scored(variant: Variant, seed: int | None, steps: int, frechet: tuple[float, ...], cost: float = 1.0) -> Point:
    accuracy = (0.9,) * len(frechet)
    return Point(
        variant=variant,
        seed=seed,
        steps=steps,
        cost=cost,
        parts={"dynamic-0.5-seed0/segment 0": steps / 2, "dynamic-0.5-seed0/segment 1": steps / 2},
        frechet=frechet,
        class_accuracy=accuracy,
        psnr=20.0,
    )


@pytest.fixture
def timings() -> Timings:
    """A dense step takes 10 ms and its conditioning 2 ms for eight steps; engines take 4 and 6 ms."""
    seconds = {"dense/step": 0.01, "dense/conditioning 8": 0.002}
    seconds |= {"dynamic-0.5-seed0/segment 0": 0.004, "dynamic-0.5-seed0/segment 1": 0.006}
    return Timings(batch=1, parts={name: timed(value) for name, value in seconds.items()}, others=0.0)


@pytest.mark.parametrize(
    ("steps", "budget", "expected"), [(8, 0.5, 4), (25, 0.5, 13), (25, 0.3, 8), (2, 0.3, 1), (1, 0.3, 1), (50, 0.3, 15)]
)
def test_equal_flops_are_whole_steps_and_halves_go_to_the_rival(steps: int, budget: float, expected: int) -> None:
    assert equal(steps, budget) == expected


def test_dense_models_are_sampled_at_equal_flops_too() -> None:
    assert Variant(name=CONTROL).steps((2, 8), (0.5, 0.3)) == (1, 2, 4, 8)
    assert HALF.steps((8, 2), (0.5, 0.3)) == (2, 8)


def test_variants_share_models_where_a_cache_is_all_that_differs() -> None:
    variants = list(variants_of(MODELS, (0.5, 0.3), (0.5, 0.3)))
    labels = [each.label for each in variants]
    assert len(set(labels)) == len(labels) == 1 + 1 + 2 + 2 + 2 + 2 + 2 + 1
    assert {each.folder for each in variants if each.budget is not None} == {
        f"{name}-{budget:g}" for name in (WIDTHS, DYNAMIC) for budget in (0.5, 0.3)
    }


def test_scores_are_combined_by_seed_and_missing_seeds_are_named(timings: Timings) -> None:
    points = [scored(HALF, 0, 8, (0.2, 0.4), cost=4.0), scored(HALF, 2, 8, (0.5, 0.7), cost=5.0)]
    (row,) = rows_of(points, (0, 1, 2), dense_gflops=0.01, timings=timings, memory={(HALF.folder, 0): 10**6})
    assert row.frechet is not None
    assert (row.frechet.mean, row.frechet.low, row.frechet.high) == pytest.approx((0.45, 0.3, 0.6))
    assert (row.cost, row.gflops, row.memory) == pytest.approx((4.5, 0.045, 10**6))
    assert (row.seeds, row.missing) == ((0, 2), (1,))
    assert "0 2 (missing: 1)" in markdown_table([row])


def test_a_time_is_in_steps_of_the_dense_engine_with_its_conditioning(timings: Timings) -> None:
    (row,) = rows_of([scored(HALF, 0, 8, (0.2,))], (0,), dense_gflops=1.0, timings=timings)
    assert row.time is not None
    assert row.time.value == pytest.approx((4 * 0.004 + 4 * 0.006) / (0.01 + 0.002 / 8))
    assert f"| {row.time.value:.2f} |" in markdown_table([row])


def test_the_dense_model_takes_as_many_steps_as_it_has(timings: Timings) -> None:
    ratio = timings.over_dense([dense_composition([1.0] * 8).parts], 8)
    assert ratio is not None
    assert ratio.value == pytest.approx(8)


def test_a_time_that_rounds_disagree_about_is_not_printed(timings: Timings) -> None:
    parts = {**timings.parts, "dynamic-0.5-seed0/segment 0": timed(0.004, noise=1.0)}
    noisy = Timings(batch=1, parts=parts, others=0.5)
    (row,) = rows_of([scored(HALF, 0, 8, (0.2,))], (0,), dense_gflops=1.0, timings=noisy)
    assert row.time is not None
    assert row.time.value is None
    assert "| not trusted |" in markdown_table([row])


def test_what_was_not_timed_has_no_time(timings: Timings) -> None:
    assert timings.over_dense([{"diffusers/compiled": 8.0}], 8) is None


def test_of_one_model_the_spread_is_over_repeats() -> None:
    (row,) = rows_of([scored(Variant(name=DENSE), None, 8, (0.2, 0.4))], (0, 1), dense_gflops=1.0)
    assert row.frechet is not None
    assert (row.frechet.low, row.frechet.high) == (0.2, 0.4)
    assert row.missing == ()


@pytest.fixture
def rows() -> list[Row]:
    points = [scored(Variant(name=DENSE), None, 8, (0.14, 0.16), cost=8.0)]
    points += [scored(Variant(name=CONTROL), seed, 4, (0.35 + seed / 100,), cost=4.0) for seed in (0, 1)]
    points += [scored(Variant(name=WIDTHS, budget=0.5), seed, 8, (0.18,), cost=4.1) for seed in (0, 1)]
    points += [scored(Variant(name=REUSE, share=0.5), None, 8, (0.13,), cost=4.0)]
    points += [scored(HALF, seed, 8, (0.15,), cost=4.2) for seed in (0, 1)]
    return rows_of(points, (0, 1), dense_gflops=0.01)


def test_the_summary_has_four_rows_for_each_budget_and_marks_the_best_whoever_it_is(rows: list[Row]) -> None:
    lines = summary(rows, (8,), (0.5,)).splitlines()[2:]
    assert [("**0.130**" in line, "**0." in line) for line in lines] == [(False, False), (True, True)] + [
        (False, False)
    ] * 2
    assert len(summary(rows, (8,), (0.3, 0.5)).splitlines()[2:]) == 8
    assert "| 0.355 (0.350 to 0.360), cost 4.0 |" in lines[0]
    assert "| **0.130**, cost 4.0 |" in lines[1], "one model, one evaluation: no extremes"
    assert spread_text(Spread(mean=60.04, low=58.0, high=62.11)) == "60.0 (58.0 to 62.1)"


def test_csv_and_json_have_every_row(rows: list[Row]) -> None:
    assert len(as_csv(rows).splitlines()) == 1 + len(rows)
    for row in rows:
        assert json.loads(json.dumps(row.as_json()))["label"] == row.variant.label


def test_the_chart_has_a_line_for_each_variant(rows: list[Row], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        save_chart(rows, tmp_path / name, title="rivals", real=0.1)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert 'width="576pt"' in text, "800 pixels"
    assert all(color in text for color in ("#0072b2", "#111111", "#e69f00", "#009e73"))


def test_parts_are_put_into_their_places(tmp_path: Path) -> None:
    page, short, other = (tmp_path / f"{name}.md" for name in ("page", "short", "other"))
    table, pictures = comments("rivals sit-tiny"), comments("pictures sit-tiny")
    other.write_text("of another model")
    short.write_text("\n".join(table))
    page.write_text("\n".join(["before", *table, "between", *pictures, "after\n"]))
    parts = [
        Part("rivals sit-tiny", "a \\1 table\n", tmp_path / "docs" / "chart.svg", "Distances"),
        Part("pictures sit-tiny", "*Rows*", tmp_path / "docs" / "samples.png", "Pictures"),
    ]
    for _ in range(2):
        publish(parts, (other, page, short))
    assert other.read_text() == "of another model"
    summary = f"{table[0]}\na \\1 table\n\n![Distances](docs/chart.svg)\n{table[1]}"
    assert short.read_text() == summary
    sheet = f"{pictures[0]}\n*Rows*\n\n![Pictures](docs/samples.png)\n{pictures[1]}"
    assert page.read_text() == f"before\n{summary}\nbetween\n{sheet}\nafter\n"
    with pytest.raises(UsageError, match="no page has a place for rivals sit-tiny"):
        publish(parts, (other,))


def test_a_summary_that_lacks_seeds_is_not_published(rows: list[Row], tmp_path: Path) -> None:
    chart, page = "rivals_sit-digits.svg", tmp_path / "page.md"
    (tmp_path / chart).write_text("<svg/>")
    page.write_text("\n".join(comments("rivals sit-digits")))
    made = {"command": "python -m benchmarks.rivals --no-train --no-time --publish"}
    settings = {"model": "sit-digits", "made": made, "remarks": (), "timings": None, "sampling": SamplingConfig()}
    places = {"pages": (page,), "docs": tmp_path / "docs"}
    late = [replace(row, missing=(1,)) if row.variant.name == WIDTHS else row for row in rows]
    with pytest.raises(UsageError, match="needs every seed of static"):
        publish_summary(Report(rows=late, **settings), tmp_path, **places)
    assert not (tmp_path / "docs").exists()
    publish_summary(Report(rows=rows, **settings), tmp_path, **places)
    assert "| **dynamic, lambda 0.5** |" in page.read_text()
    assert "mean and extremes over training seeds" in page.read_text()
    assert (
        "Cost of a picture in evaluations of the dense network. Made by `python -m benchmarks.rivals --publish`."
        in page.read_text()
    )
    assert (tmp_path / "docs" / chart).read_text() == "<svg/>"


def test_the_rule_computes_where_changes_since_the_last_output_reach_the_threshold() -> None:
    changes = [9.0, 0.1, 0.2, 0.3, 0.05, 0.3, 0.1, 0.1]
    assert decisions(changes, 0.3) == [True, False, True, True, False, True, False, True]
    assert decisions(changes, 0.0) == [True] * 8
    assert decisions(changes, 100.0) == [True] + [False] * 6 + [True]


@pytest.mark.parametrize(("share", "expected"), [(1.0, 50), (0.5, 25), (0.3, 15), (0.01, 2)])
def test_thresholds_leave_about_the_share_that_is_asked_for(share: float, expected: int) -> None:
    changes = np.random.default_rng(0).uniform(0.5, 1.5, 50).tolist()
    computed = sum(decisions(changes, threshold_for(changes, share)))
    assert 0.8 * expected <= computed <= expected


def test_a_reusing_network_equals_the_direct_computation() -> None:
    """The inputs do not depend on the outputs here, so decisions can be computed from the inputs alone."""
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, generator=random) * (1 + step) for step in range(6)]
    changes = [0.0] + [relative_change(after, before) for before, after in pairwise(inputs)]
    direct = [float((b - a).abs().sum() / a.abs().sum()) for a, b in pairwise(inputs)]
    assert changes[1:] == pytest.approx(direct)
    threshold = threshold_for(changes, 0.5)
    expected, last = [], torch.empty(0)
    for value, computes in zip(inputs, decisions(changes, threshold), strict=True):
        last = 2 * value if computes else last
        expected.append(last)
    network = ReusingNetwork(lambda hidden_states: SimpleNamespace(sample=2 * hidden_states), 6, threshold)
    for _ in range(2):
        for value, output in zip(inputs, expected, strict=True):
            assert torch.equal(network(hidden_states=value).sample, output)
    assert network.shares == [float(each) for each in decisions(changes, threshold)]
    assert 2 <= sum(network.shares) < 6
    composed = dense_composition(network.shares)
    assert composed.cost == sum(network.shares)
    assert composed.parts[part("dense", "reused")] == 6 - composed.cost


def test_a_cached_step_of_cache_dit_costs_its_first_block_and_what_is_outside_blocks() -> None:
    flops = FlopsModel.of_preset(TINY)
    expected = (flops.gated / TINY.depth + flops.static) / flops.dense
    assert cached_step_cost(flops) == pytest.approx(expected)
    assert cost_of([1.0, 0.5, 0.0], 0.2) == pytest.approx(1.0 + 0.6 + 0.2)


def test_cache_dit_is_fitted_to_a_cost_and_then_to_the_smallest_error() -> None:
    """A limit bounds the cost from below; among limits that reach the cost the one with the smallest error is best."""
    errors = {None: 0.9, 1: 0.1, 2: 0.5, 3: 0.3, 4: 0.6, 6: 0.8}

    def pilot(setting: CacheSetting) -> Pilot:
        least = 0.0 if setting.limit is None else 8 / (1 + setting.limit)
        return Pilot(max(8 / (1 + setting.threshold), least), errors[setting.limit])

    assert fitted_setting(pilot, target=4.0) == CacheSetting(1.0, 1)
    assert fitted_setting(pilot, target=8 / 3) == CacheSetting(2.0, 3)
    assert fitted_setting(lambda setting: Pilot(8.0 + (setting.limit or 9), 0.0), target=4.0).limit == 1


def test_every_step_is_served_by_the_engine_of_its_timestep(sit_tiny: Bundle) -> None:
    """With every second step reused, half of the calls remain, and one of the rule for each step that is left out."""
    whole = slim_composition("dynamic", sit_tiny, [1.0] * 8)
    trajectory = trajectory_of(sit_tiny.manifest.model, sit_tiny.manifest.plan, 8)
    for segment in {step.segment for step in trajectory.steps}:
        steps = [step for step in trajectory.steps if step.segment == segment]
        assert whole.parts[part("dynamic", f"segment {segment}")] == len(steps)
    assert whole.cost == pytest.approx(8 * step_costs(sit_tiny, trajectory).executed)
    half = slim_composition("dynamic", sit_tiny, [1.0, 0.0] * 4)
    assert half.parts[part("dense", "reused")] == 4
    assert sum(count for name, count in half.parts.items() if "segment" in name) == 4
    assert 0.4 < half.cost / whole.cost < 0.6


SHORT = "--train-steps 3 --finetune-steps 3 --samples 20 --repeats 2 --steps 2 4 --seeds 0 --budgets 0.5 --shares 0.5"


def run(folder: Path, *arguments: str) -> None:
    places = ("--work", str(folder / "work"), "--results", str(folder))
    main(["--model", TINY.name, *SHORT.split(), *places, "--rounds", "4", "--batch", "2", *arguments])


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    models = ("--models", "control", "static", "dynamic", "reuse", "dynamic-reuse", "cache-dit")
    with pytest.raises(SystemExit, match="nothing to report: the static model is not trained"):
        run(tmp_path, "--no-train")
    run(tmp_path, "--models", "control", "dynamic", "--train-only")
    run(tmp_path, *models, "--no-train")
    part = json.loads((tmp_path / f"rivals_{TINY.name}.json").read_text())
    assert any("static-0.5, seed 0 is not trained" in remark for remark in part["remarks"])
    run(tmp_path, *models)
    capsys.readouterr()
    monkeypatch.setattr("benchmarks.quality.score_model", lambda *_: pytest.fail("scored again"))
    run(tmp_path, *models, "--no-train", "--no-time")
    whole = json.loads((tmp_path / f"rivals_{TINY.name}.json").read_text())
    assert not [remark for remark in whole["remarks"] if "not trained" in remark]
    by_name = {(row["variant"]["name"], row["steps"]): row for row in whole["rows"]}
    assert by_name["dense", 4]["cost"] == 4.0
    assert by_name["control", 1]["cost"] == 1.0, "equal FLOPs of 2 steps"
    assert by_name["reuse", 4]["cost"] == 2.0
    for name in ("static", "dynamic"):
        assert 0.4 < by_name[name, 4]["cost"] / 4 < 0.9
    assert by_name["dynamic-reuse", 4]["cost"] < by_name["dynamic", 4]["cost"]
    assert by_name["dynamic", 4]["memory"] > 0
    assert all(row["frechet"]["mean"] > 0 and row["time"] is not None for row in whole["rows"])
    assert (tmp_path / f"rivals_{TINY.name}.svg").exists()
    width, height = Image.open(tmp_path / f"rivals_{TINY.name}.png").size
    assert round(10 * height / width) == 4, "2 rows of 10 classes for each of two networks"
    bundle = tmp_path / "work" / "dynamic-0.5-seed0"
    main(["--bundles", str(bundle), "--steps", "2", "--results", str(tmp_path), "--rounds", "4", "--models", "dense"])
    timed = json.loads((tmp_path / f"rivals_{TINY.name}_times.json").read_text())
    assert {row["label"] for row in timed["rows"]} == {"dense", "diffusers, eager", bundle.name}
