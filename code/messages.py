"""Lines of the predictor on the console."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from table import visible


def log(text: str, stream: Any = None) -> None:
    """Print one line, control characters as escapes; a closed stream is ignored."""
    with contextlib.suppress(OSError, ValueError):
        print(f"predict: {visible(text)}", file=stream or sys.stdout, flush=True)


def log_error(text: str) -> None:
    log(text, sys.stderr)
