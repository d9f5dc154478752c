"""Copies of batches to a device, with a stand-in for CUDA's streams; on an emulated device see test_emulated_gpu.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from fastflower.data import loaders
from fastflower.data.device_copies import DeviceCopies


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A record of the calls to CUDA, in order, with their threads; its streams are names."""
    calls: list[tuple] = []
    now = threading.local()

    def log(*words: object) -> None:
        calls.append((threading.current_thread().name, *words))

    class Event:
        def record(self, stream: object) -> None:
            log("record", stream)

    class Reader:
        def wait_event(self, event: object) -> None:
            log("wait", type(event).__name__)

    @contextlib.contextmanager
    def use(stream: object) -> Iterator[None]:
        now.stream = stream
        yield
        now.stream = None

    to = torch.Tensor.to

    def watched(tensor: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        if options.get("non_blocking"):
            log("copy", getattr(now, "stream", None))
            return to(tensor, *args, copy=True)
        return to(tensor, *args, **options)

    reader = Reader()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: reader)
    monkeypatch.setattr(torch.Tensor, "to", watched)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: log("kept for", type(stream).__name__)
    )
    return calls


def test_a_batch_is_copied_in_the_loaders_thread_and_read_after_its_event(streams: list[tuple]) -> None:
    batches = [{"image": torch.full((2, 3), i), "key": torch.tensor([i, i])} for i in range(3)]
    loader = loaders.EvalLoader.__new__(loaders.EvalLoader)
    loader.prefetch, loader.copies, loader._running = 2, DeviceCopies(torch.device("cpu")), set()
    seen = list(loaders._run(loader, iter(batches)))
    assert [int(batch["image"][0, 0]) for batch in seen] == [0, 1, 2]
    assert all(
        copy["key"] is batch["key"] for copy, batch in zip(seen, batches, strict=True)
    )  # stays on the host
    assert all(copy["image"] is not batch["image"] for copy, batch in zip(seen, batches, strict=True))
    worker = [call for call in streams if call[0] == "fastflower-loader"]
    assert [call[1:] for call in worker] == [("copy", "side"), ("record", "side")] * 3
    reader = [call[1:] for call in streams if call[0] != "fastflower-loader"]
    assert reader == [("wait", "Event"), ("kept for", "Reader"), ("kept for", "Reader")] * 3


def test_a_copy_that_fails_is_the_readers_error(
    streams: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: DeviceCopies, batch: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(DeviceCopies, "start", start)
    loader = loaders.EvalLoader.__new__(loaders.EvalLoader)
    loader.prefetch, loader.copies, loader._running = 2, DeviceCopies(torch.device("cpu")), set()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        next(loaders._run(loader, iter([{}])))
