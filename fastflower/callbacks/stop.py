"""Stop on SIGTERM and SIGINT: the training saves its state before the process leaves."""

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


class Stop:
    """SIGTERM and SIGINT ask for a checkpoint at the next step; before the first there is nothing to save, so they
    end the process with PREEMPTED. A second SIGINT ends it at once.

    A second SIGTERM does not: a signal to the whole group reaches a rank twice, the second time from Composer's
    launcher, which leaves it 30 s. Composer's own handlers, installed when it is imported, would save nothing.
    """

    def __init__(self) -> None:
        self.asked = False
        self.training = False
        self._interrupts = 0
        self._before = {
            number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Between these there is something to save, and whoever trains asks `agreed`.

        An error on its way out stays deferred: the launcher's SIGTERM, which follows a lost rank, must not replace
        its words.
        """
        self.training = True
        yield
        self.training = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(128 + number)
        self.asked = True
        if not self.training:
            raise SystemExit(PREEMPTED)

    def agreed(self, state: State) -> bool:
        """Whether any rank was asked; every rank must call this at the same place."""
        if dist.get_world_size() == 1:
            return self.asked
        flag = state.device.tensor_to_device(torch.tensor([int(self.asked)], dtype=torch.uint8))
        dist.all_reduce(flag, reduce_operation="MAX")
        return bool(flag.item())
