"""Background jobs: their order, waiting for a kind, and the effect of a failure."""

from __future__ import annotations

import threading

import pytest

from fastflower.callbacks.writer import BackgroundWriter


def test_jobs_run_in_order_behind_the_caller():
    writer, go, done = BackgroundWriter(), threading.Event(), []
    writer.add("last", lambda: go.wait(10))
    for number in range(5):
        writer.add("best", lambda number=number: done.append(number))
    assert done == []  # the caller did not wait
    go.set()
    writer.wait()
    assert done == [0, 1, 2, 3, 4]
    writer.wait()
    writer.close()


def test_waiting_for_a_kind_does_not_wait_for_what_came_after():
    writer, go, done = BackgroundWriter(), threading.Event(), []
    writer.add("last", lambda: done.append("last"))
    writer.add("best", lambda: go.wait(10))
    writer.wait("last")
    assert done == ["last"]
    writer.wait("last")  # none is queued
    go.set()
    writer.close()


def test_a_failure_is_raised_at_the_next_wait_and_nothing_is_written_after_it():
    writer, done = BackgroundWriter(), []

    def fail() -> None:
        raise OSError("the disk is full")

    writer.add("best", fail)
    writer.add("last", lambda: done.append("last"))
    with pytest.raises(OSError, match="the disk is full"):
        writer.wait("last")
    writer.close()
    assert done == []
