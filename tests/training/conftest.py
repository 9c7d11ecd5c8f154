"""Fixtures of training tests."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def _event_files_in_order() -> None:
    """Let TensorBoard read the files of one process in the order in which they were made.

    It sorts by name, which is the second and a number; without this, number 10 comes before number 9.
    """
    from tensorboard.summary.writer import event_file_writer

    event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)
