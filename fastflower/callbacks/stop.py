"""Stop on SIGTERM and SIGINT: training saves its state before the process exits."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import torch
from composer.core import State
from composer.utils import dist

from fastflower.core.errors import PREEMPTED
from fastflower.core.host_copies import HostCopies


class Stop:
    """Handlers for SIGTERM and SIGINT. While training they request a checkpoint at the next step; before it there is
    nothing to save, so they exit with PREEMPTED. A second SIGINT exits at once.

    A second SIGTERM does not: a signal to the process group reaches a rank twice, the second time from Composer's
    launcher, which then waits 30 s. The handlers that Composer installs at import would save nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self.training = False
        self._interrupts = 0
        self._answer: tuple[HostCopies, torch.Tensor] | None = None  # of all ranks, to the last question
        self._previous = {
            number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Context manager around training: signals only set `requested`, which training polls every step.

        After an error signals stay deferred: the launcher sends SIGTERM when a rank is lost, and that must not
        replace the error's message.
        """
        self.training = True
        yield
        self.training = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(128 + number)
        self.requested = True
        if not self.training:
            raise SystemExit(PREEMPTED)

    def requested_on_any_rank(self, state: State) -> bool:
        """True once any rank got a signal; a collective, so every rank must call it at the same step.

        Several ranks give the answer to the call before: it is on the host by now, and no step waits for the device.
        """
        if dist.get_world_size() == 1:
            return self.requested
        flag = state.device.tensor_to_device(torch.tensor([int(self.requested)], dtype=torch.uint8))
        dist.all_reduce(flag, reduce_operation="MAX")
        copies, before = HostCopies(), self._answer
        self._answer = copies, copies.add(flag)
        if before is None:
            return False
        before[0].wait()
        return bool(before[1].item())
