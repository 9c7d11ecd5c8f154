"""The ledger: what is done is not done again, what is damaged is, and a failure leaves things as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dyexport.errors import StorageError, UsageError
from dyexport.files import check_writable
from dyexport.pipeline.settings_file import SETTINGS
from dyexport.pipeline.work_directory import LOCK, locked
from dyexport.stages.file_records import digest_of
from dyexport.stages.ledger import LEDGER, Ledger, Outcome, Stage


class Log:
    """A listener that records its calls."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def started(self, stage: str, why: str) -> None:
        self.reasons.append(why)

    def advanced(self, stage: str, done: int, total: int, detail: str = "") -> None: ...

    def finished(self, stage: str, seconds: float, *, reused: bool) -> None: ...


def two_files(directory: Path, content: str = "one") -> None:
    (directory / "deep").mkdir(parents=True)
    (directory / "a.txt").write_text(content)
    (directory / "deep" / "b.txt").write_text("two")


def run(work: Path, *, setting: int = 1, content: str = "one", output: str = "made") -> tuple[str, str]:
    """Why the stage was run, if it was, and the digest of what it made."""
    log = Log()
    stage = Stage(name="make", output=output, inputs={"setting": setting}, make=lambda out: two_files(out, content))
    outcome = Ledger(work, log).run(stage)
    assert outcome.reused == (log.reasons == [])
    return "".join(log.reasons), outcome.digest


def test_a_stage_runs_once(tmp_path: Path) -> None:
    first = run(tmp_path)
    assert first[0] == "not done yet"
    assert run(tmp_path) == ("", first[1])


def test_changed_inputs_run_it_again(tmp_path: Path) -> None:
    _, before = run(tmp_path)
    why, after = run(tmp_path, setting=2, content="other")
    assert why == "its inputs changed"
    assert after != before


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda made: (made / "a.txt").unlink(), "a.txt is missing"),
        (lambda made: (made / "a.txt").write_text("onE"), "a.txt is damaged"),
        (lambda made: (made / "deep" / "b.txt").write_text("two, and more"), "b.txt is damaged"),
        (lambda made: (made / "deep" / "c.txt").write_text("?"), "c.txt is not of this build"),
    ],
)
def test_damaged_output_is_made_again_and_said_so(tmp_path: Path, harm, why: str) -> None:
    _, digest = run(tmp_path)
    harm(tmp_path / "made")
    reason, again = run(tmp_path)
    assert reason.endswith(why)
    assert again == digest
    assert run(tmp_path)[0] == ""


@pytest.mark.parametrize("content", ["", "{", '{"stages": {"make": 1}}'])
def test_an_unreadable_ledger_knows_nothing(tmp_path: Path, content: str) -> None:
    run(tmp_path)
    (tmp_path / LEDGER).write_text(content)
    assert run(tmp_path)[0] == "not done yet"


def test_what_a_kill_left_half_made_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / ".partial-made").mkdir()
    (tmp_path / ".partial-made" / "stray.txt").write_text("?")
    run(tmp_path)
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["a.txt", "deep"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [LEDGER, "made"]


def test_a_failure_leaves_the_output_of_before(tmp_path: Path) -> None:
    _, digest = run(tmp_path)

    def fail(out: Path) -> None:
        two_files(out, "half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Ledger(tmp_path, Log()).run(Stage(name="make", output="made", inputs={"setting": 2}, make=fail))
    assert run(tmp_path) == ("", digest)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    def fill(out: Path) -> None:
        with Path("/dev/full").open("w") as file:
            file.write("x" * 100_000)

    with pytest.raises(StorageError, match="No space left on device; make room"):
        Ledger(tmp_path, Log()).run(Stage(name="make", output="made", inputs={}, make=fill))
    assert list(tmp_path.iterdir()) == []


def chosen(work: Path, settings: dict[str, Any], *, data: int = 1, without: frozenset[str] = frozenset()) -> Outcome:
    """Run a stage that keeps what other settings made."""

    def make(out: Path) -> None:
        two_files(out, f"{settings} {data}")

    stage = Stage(name="make", output="made", inputs={**settings, "data": data}, make=make, settings=settings)
    return Ledger(work, Log(), without=without).run(stage)


def test_what_other_settings_made_is_kept(tmp_path: Path) -> None:
    first, second = chosen(tmp_path, {"budget": 0.5}), chosen(tmp_path, {"budget": 0.6})
    assert first.path != second.path
    assert not second.reused
    for settings, made in (({"budget": 0.5}, first), ({"budget": 0.6}, second)):
        again = chosen(tmp_path, settings)
        assert again.reused
        assert (again.path, again.digest) == (made.path, made.digest)


def test_other_data_of_the_same_settings_is_not_kept(tmp_path: Path) -> None:
    for budget in (0.5, 0.6):
        before = chosen(tmp_path, {"budget": budget})
        after = chosen(tmp_path, {"budget": budget}, data=2)
        assert not after.reused
        assert after.path == before.path
    assert chosen(tmp_path, {"budget": 0.5}, data=2).reused
    assert len(list(tmp_path.glob("made*"))) == 2


def test_the_same_inputs_by_another_name_are_found(tmp_path: Path) -> None:
    def run(checkpoint: str) -> Outcome:
        settings = {"checkpoint": checkpoint}
        return Ledger(tmp_path, Log()).run(
            Stage(name="make", output="made", inputs={"contents": 1}, make=two_files, settings=settings)
        )

    assert not run("here").reused
    assert run("there").reused


def test_both_settings_are_named(tmp_path: Path) -> None:
    chosen(tmp_path, {"model": "m", "budget": 0.5})
    with pytest.raises(UsageError, match=r"not done yet with budget 0\.6; what budget 0\.5 made is kept"):
        chosen(tmp_path, {"model": "m", "budget": 0.6}, without=frozenset({"make"}))


def test_a_stage_that_may_not_run_must_be_done(tmp_path: Path) -> None:
    stage = Stage(name="make", output="made", inputs={"setting": 1}, make=two_files)
    barred = frozenset({"make"})
    with pytest.raises(UsageError, match="stage 'make' must run first"):
        Ledger(tmp_path, Log(), without=barred).run(stage)
    run(tmp_path)
    assert Ledger(tmp_path, Log(), without=barred).run(stage).reused


class Follower:
    """A process that is not the main one, which gets the main process's decision."""

    is_main_process = False

    def __init__(self, why: str) -> None:
        self.why = why

    def broadcast(self, value: str) -> str:
        return self.why


def test_followers_make_shared_stages_and_keep_nothing(tmp_path: Path) -> None:
    _, digest = run(tmp_path)
    made: list[Path] = []

    def make(out: Path) -> None:
        two_files(out)
        made.append(out)

    stage = Stage(name="make", output="made", inputs={"setting": 1}, make=make, shared=True)
    assert Ledger(tmp_path, Log(), group=Follower("not done yet")).run(stage).digest == digest
    assert len(made) == 1
    assert not made[0].exists()
    Ledger(tmp_path, Log(), group=Follower("")).run(stage)
    assert len(made) == 1


def test_one_build_at_a_time(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with locked(work):
        with pytest.raises(StorageError, match="another build is using"), locked(work):
            pass
        run(work)
    with locked(work):
        assert run(work)[0] == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("static", None),
        ("thesis.tex", ""),
        (".lock", ""),
        (LEDGER, "{}"),
        (LEDGER, '{"app": "mine"}'),
        (LEDGER, '{"stages": {}}'),
    ],
)
def test_a_directory_of_something_else_is_no_work_directory(tmp_path: Path, name: str, content: str | None) -> None:
    place = tmp_path / name
    place.mkdir() if content is None else place.write_text(content)
    with pytest.raises(UsageError, match="is not empty and not of a build"), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == [place]
    assert content is None or place.read_text() == content


def test_a_work_directory_is_known_without_its_ledger(tmp_path: Path) -> None:
    work = tmp_path / "work"
    with locked(work):
        run(work)
    (work / LEDGER).write_text("{")
    with locked(work):
        assert run(work)[0] == "not done yet"


def test_a_build_that_does_nothing_leaves_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bad"), locked(tmp_path / "work"):
        raise ValueError("bad")
    assert list(tmp_path.iterdir()) == []


def test_unwritable_places_are_found_before_the_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match="cannot write"):
        check_writable(Path("/proc/bundle"))
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        check_writable(tmp_path / "file" / "bundle")


def test_digests_do_not_depend_on_order() -> None:
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})


def test_settings_of_a_build_that_was_killed_in_its_first_stage_are_kept(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / LOCK).touch()
    (work / SETTINGS).write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="bad"), locked(work):
        raise ValueError("bad")
    assert (work / SETTINGS).is_file()
