"""Copies of tensors to the host for which the host waits once, and not for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class HostCopies:
    """Starts copies with `add`; their values are there after `wait`.

    From a GPU they go into page-locked memory, or each copy would wait. A tensor of the host is copied at once.
    """

    def __init__(self) -> None:
        self._events: dict[Any, Any] = {}  # device -> the end of the last copy from it

    def add(self, tensor: Tensor) -> Tensor:
        """Start a copy, whose values must not be read before `wait`."""
        import torch

        tensor = tensor.detach()
        if not tensor.is_cuda:
            return tensor.to("cpu", copy=True)
        copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
        event = self._events.setdefault(tensor.device, torch.cuda.Event())
        event.record(torch.cuda.current_stream(tensor.device))
        return copy

    def wait(self) -> None:
        """Wait for all copies so far."""
        for event in self._events.values():
            event.synchronize()
