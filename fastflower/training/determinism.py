"""cuDNN's and torch's determinism, and the names of the operations that have no deterministic kernel."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from fastflower.recipe.schema import Cudnn

# of torch's warnings, the part that names the operation
NAMES = (
    re.compile(r"^(?P<name>\S+) does not have a deterministic implementation"),
    re.compile(r"^(?P<name>.+?) defaults to a non-deterministic algorithm"),
    re.compile(r"because it uses (?P<name>\w+)"),
)


def configure(cudnn: Cudnn) -> list[str]:
    """Set cuDNN and determinism; returns the list that collects the nondeterministic operations torch warns about."""
    nondeterministic: list[str] = []
    torch.backends.cudnn.benchmark = cudnn.benchmark
    torch.backends.cudnn.deterministic = cudnn.deterministic
    if cudnn.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(cudnn.deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a pass over memory
    show = warnings.showwarning

    def collect(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if "deterministic" in str(message):
            nondeterministic.append(operation(str(message)))
        else:
            show(message, *args, **kwargs)

    warnings.showwarning = collect
    # Composer's warnings after a resume before an evaluation, and at the start of a stage
    for text in ("No batches were trained", "DataloaderNumBatches"):
        warnings.filterwarnings("ignore", message=f".*{text}")
    return nondeterministic


def operation(warning: str) -> str:
    """The operation that a warning of torch is about; the whole first sentence where it names none."""
    for pattern in NAMES:
        if found := pattern.search(warning):
            return found["name"]
    return warning.partition(". ")[0]


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """Context manager in which torch refuses operations without a deterministic kernel, where determinism is asked for.

    Only so does it take the deterministic backward pass of attention; elsewhere it warns and takes the faster one.
    """
    asked = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(asked)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(asked, warn_only=True)


def is_refusal(error: BaseException) -> bool:
    """True if torch has refused an operation that has no deterministic kernel."""
    return isinstance(error, RuntimeError) and "torch.use_deterministic_algorithms(True)" in str(error)
