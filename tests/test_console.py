"""What is shown of stages on stderr."""

from __future__ import annotations

import pytest

from dyexport.console import StageLines


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
