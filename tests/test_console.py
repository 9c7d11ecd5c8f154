"""What is shown of stages on stderr."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from dyexport.console import QUIET, ROOM_FOR_BARS, StageLines, progress_bar
from tests.test_progress import Clock


def test_each_stage_under_way_has_a_bar_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with StageLines() as lines:
        for stage in ("one", "two"):
            lines.started(stage, "not done yet")
        lines.advanced("one", 3, 4)
        lines.advanced("two", 1, 4, "slowly")
        assert [(bar.completed, bar.total) for bar in lines._progress.tasks] == [(3, 4), (1, 4)]
        lines.finished("one", 1.25, reused=False)
        assert [bar.description for bar in lines._progress.tasks] == ["two  slowly"]
        lines.finished("two", 2.0, reused=False)
        lines.finished("three", 0.1, reused=True)
    assert not lines._progress.tasks
    assert capsys.readouterr().err.splitlines() == ["one: done in 1.2 s", "two: done in 2.0 s", "three: up to date"]


def test_without_a_terminal_a_stage_says_where_it_is_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with StageLines(clock=clock) as lines:
        lines.started("synthetic", "not done yet")
        for step in range(101):
            lines.advanced("synthetic", step, 100, "[64] samples")
            clock.now += 12
        lines.finished("synthetic", 1212, reused=False)
    out, err = capsys.readouterr()
    said = err.splitlines()
    assert out == ""
    assert said[:2] == [
        "synthetic: 3 %, 3 of 100, 0:36 elapsed, 19:24 left, [64] samples",
        "synthetic: 6 %, 6 of 100, 1:12 elapsed, 18:48 left, [64] samples",
    ]
    assert said[-1] == "synthetic: done in 1212.0 s"
    assert len(said) == 1 + 100 // 3


def test_steps_longer_than_that_are_each_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with StageLines(clock=clock) as lines:
        lines.started("synthetic", "not done yet")
        for step in range(5):
            lines.advanced("synthetic", step, 5)
            clock.now += 10 * QUIET
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "synthetic: 20 %, 1 of 5, 5:00 elapsed, 20:00 left",
        "synthetic: 40 %, 2 of 5, 10:00 elapsed, 15:00 left",
        "synthetic: 60 %, 3 of 5, 15:00 elapsed, 10:00 left",
        "synthetic: 80 %, 4 of 5, 20:00 elapsed, 5:00 left",
    ]


def test_stages_side_by_side_are_quiet_each_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with StageLines(clock=clock) as lines:
        for stage in ("one", "two"):
            lines.started(stage, "not done yet")
        for step in range(1, 4):
            clock.now += 0.7 * QUIET
            for stage in ("one", "two"):
                lines.advanced(stage, step, 4)
    said = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == ["one: 50 %", "two: 50 %"]


def test_on_a_terminal_a_bar_has_the_numbers_of_slow_steps() -> None:
    clock, screen = Clock(), StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with StageLines(console, clock) as lines:
        lines.started("synthetic", "not done yet")
        for step in range(3):
            lines.advanced("synthetic", step, 28, "0 of 4096 samples")
            clock.now += 1680
        lines._progress.refresh()
    assert "7 %, 2 of 28, 1:24:00 elapsed, 11:40:00 left" in screen.getvalue()
    assert "synthetic  0 of 4096 samples" in screen.getvalue()


def frame(lines: StageLines, console: Console) -> list[str]:
    """What a terminal shows of the stages under way, line by line."""
    drawn = console.render_lines(lines._progress.get_renderable())
    return ["".join(segment.text for segment in line).rstrip() for line in drawn]


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_a_bar_is_one_line_with_whole_numbers_on_a_terminal_of_any_width(width: int) -> None:
    clock = Clock()
    console = Console(file=StringIO(), force_terminal=True, width=width)
    details = {
        "dynamic": "diffusion 0.002  complete 0.561  flops_ratio 0.838  temperature 0.731",
        "synthetic": "0 of 4096 samples",
    }
    with StageLines(console, clock) as lines:
        for stage in details:
            lines.started(stage, "the settings of an earlier stage have changed since it was done")
        assert [line.endswith("0:00 elapsed") for line in frame(lines, console)] == [True, True]
        for step in (0, 1200):
            for stage, detail in details.items():
                lines.advanced(stage, step, 5000, detail)
            clock.now += 1680
        shown = frame(lines, console)
    numbers = "24 %, 1200 of 5000, 56:00 elapsed, 1:00:40 left"
    assert [line.endswith(f" {numbers}") for line in shown] == [True, True]
    assert [stage[:4] in line for stage, line in zip(details, shown, strict=True)] == [True, True]
    assert "…" in shown[0]
    assert all(len(line) <= width for line in shown)
    assert ("━" in shown[0]) == (width >= ROOM_FOR_BARS)


def test_a_command_without_a_terminal_says_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("verifying") as advance:
        advance(1, 64)
    assert capsys.readouterr() == ("", "")
