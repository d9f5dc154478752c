"""Copies of batches to a GPU on a stream of their own, started by the loader's thread while the GPU computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

KEYS = ("key", "strong_key")  # entries from which random numbers are drawn, on the host
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Started:
    """A batch whose copies to the GPU are under way, until `event`."""

    batch: Batch
    event: torch.cuda.Event


class DeviceCopies:
    """Starts a batch's copies in one thread and hands the batch to the stream of another, without waiting in either.

    The memory of the host's images is page-locked, and torch reuses it after the copy. The memory of a copy belongs to
    this object's stream: `record_stream` keeps it until the stream that reads it has come so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, batch: Batch) -> Started:
        """Start to copy all entries but KEYS."""
        with torch.cuda.stream(self.stream):  # also makes its device this thread's
            copies = {
                name: tensor if name in KEYS else tensor.to(self.device, non_blocking=True)
                for name, tensor in batch.items()
            }
            event = torch.cuda.Event()
            event.record(self.stream)
        return Started(copies, event)

    def finish(self, started: Started) -> Batch:
        """The batch, which the current stream may use: its work waits for the copies, the host does not."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(started.event)
        for tensor in started.batch.values():
            if tensor.device == self.device:
                tensor.record_stream(current)
        return started.batch
