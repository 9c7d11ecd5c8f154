"""A bundle works in forked processes, and its copies and pickles open it again with their own engines."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from dyexport.bundle.reader import Bundle
from dyexport.engines.fake import FakeEngine
from dyexport.errors import BundleError
from dyexport.runtime.loading import load
from tests.runtime.bundles import write_bundle
from tests.runtime.calls import midpoints, predict


def exit_code_of_fork(work: Callable[[], object], seconds: float = 60.0) -> int | None:
    """What a forked process that does ``work`` ends with: 0, 1 for an exception, None where it hangs."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class Stuck(FakeEngine):
    """An engine that waits in ``activate`` until it is let go."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.io, inner.run)
        self.reached, self.go = Event(), Event()

    def activate(self) -> None:
        self.reached.set()
        self.go.wait()
        super().activate()


@contextmanager
def caught_in(engine: Stuck, thread: Thread | None = None) -> Iterator[None]:
    """While another thread is inside ``engine``."""
    if thread is not None:
        thread.start()
    assert engine.reached.wait(60)
    try:
        yield
    finally:
        engine.go.set()
        if thread is not None:
            thread.join()


def assert_draws(transformer: Any, wanted: dict[float, torch.Tensor]) -> None:
    for t, sample in wanted.items():
        torch.testing.assert_close(predict(transformer, t), sample, atol=1e-6, rtol=0)


@pytest.fixture
def wanted(sit_tiny: Bundle) -> dict[float, torch.Tensor]:
    transformer = load(sit_tiny.root)
    return {t: predict(transformer, t) for t in midpoints(sit_tiny)}


def test_a_fork_of_a_process_that_has_drawn_draws(sit_tiny: Bundle, wanted: dict[float, torch.Tensor]) -> None:
    transformer = load(sit_tiny.root)
    assert_draws(transformer, wanted)
    assert exit_code_of_fork(lambda: assert_draws(transformer, wanted)) == 0
    assert_draws(transformer, wanted)


def test_a_fork_while_an_engine_is_made_ready_draws(sit_tiny: Bundle, wanted: dict[float, torch.Tensor]) -> None:
    transformer = load(sit_tiny.root)
    first, second, third = transformer.engine.engines
    transformer.engine.engines = (first, stuck := Stuck(second), third)
    predict(transformer, min(wanted))
    with caught_in(stuck):
        assert exit_code_of_fork(lambda: assert_draws(transformer, wanted)) == 0
    assert_draws(transformer, wanted)


def test_a_fork_while_another_thread_draws_draws(sit_tiny: Bundle, wanted: dict[float, torch.Tensor]) -> None:
    transformer = load(sit_tiny.root)
    transformer.conditioner.engine = stuck = Stuck(transformer.conditioner.engine)
    with caught_in(stuck, Thread(target=predict, args=(transformer,))):
        assert exit_code_of_fork(lambda: assert_draws(transformer, wanted)) == 0
        assert exit_code_of_fork(lambda: transformer.residency) == 0
        assert exit_code_of_fork(transformer.close) == 0
    assert_draws(transformer, wanted)


def test_a_fork_of_a_fork_draws(sit_tiny: Bundle, wanted: dict[float, torch.Tensor]) -> None:
    transformer = load(sit_tiny.root)

    def draw_and_fork() -> None:
        assert_draws(transformer, wanted)
        assert exit_code_of_fork(lambda: assert_draws(transformer, wanted)) == 0

    assert exit_code_of_fork(draw_and_fork) == 0


# Copies and pickles


def through_torch_save(transformer: Any) -> Any:
    file = BytesIO()
    torch.save(transformer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda transformer: pickle.loads(pickle.dumps(transformer)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_has_engines_of_its_own(sit_tiny: Bundle, duplicate: Callable[[Any], Any]) -> None:
    transformer = load(sit_tiny.root, max_resident=2)
    before = predict(transformer)
    again = duplicate(transformer.to(torch.bfloat16))
    assert type(again) is type(transformer)
    assert (again.dtype, again.config, again.engine.max_resident) == (torch.bfloat16, transformer.config, 2)
    assert torch.equal(predict(again), before)
    transformer.close()
    assert again.engine.active
    assert not again.training


def test_a_copy_is_opened_as_the_original_was(sit_tiny: Bundle) -> None:
    dense = load(sit_tiny.root, dense=True, share_weights=True)
    again = copy.deepcopy(dense)
    assert torch.equal(predict(again), predict(dense))
    assert again.engine.shares_weights
    assert not torch.equal(predict(again), predict(load(sit_tiny.root)))


def test_a_copy_is_never_of_another_bundle(sit_tiny: Bundle, own: Path) -> None:
    shutil.copytree(sit_tiny.root, own)
    transformer = load(own)
    pickled = pickle.dumps(transformer)
    shutil.rmtree(own)
    write_bundle(own, segments=2)
    for duplicate in (lambda: copy.deepcopy(transformer), lambda: pickle.loads(pickled)):
        with pytest.raises(BundleError, match="has changed since"):
            duplicate()


def test_another_process_takes_it_as_an_argument(sit_tiny: Bundle) -> None:
    transformer = load(sit_tiny.root)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = pool.submit(predict, transformer).result()
    torch.testing.assert_close(there, predict(transformer), atol=1e-6, rtol=0)


def test_a_relative_path_is_resolved_when_it_is_loaded(
    sit_tiny: Bundle, own: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sit_tiny.root, own)
    monkeypatch.chdir(own.parent)
    transformer = load(own.name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert predict(transformer).isfinite().all()
    assert predict(copy.deepcopy(transformer)).isfinite().all()
