"""Terminal output: a console with a log file, aligned text columns, and durations."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TextIO


def clock(seconds: float) -> str:
    """A duration as 0:07, 12:30 or 1:02:03."""
    rounded = max(0, round(seconds))
    hours, minutes = divmod(rounded // 60, 60)
    return f"{hours}:{minutes:02}:{rounded % 60:02}" if hours else f"{minutes}:{rounded % 60:02}"


class Console:
    """Writes to a terminal or pipe and to a log file; a failure of either does not stop the training."""

    def __init__(self, log: Path | None, *, silent: bool = False) -> None:
        self.stream: TextIO | None = None if silent else sys.stdout
        self.interactive = (
            self.stream is not None and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        )
        self.colour = self.interactive and "NO_COLOR" not in os.environ
        self._dirty = False
        self._log: TextIO | None = None
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._log = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def write(self, text: str = "", style: str = "") -> None:
        """Write lines to terminal and log; `style` is bold, green, yellow or dim, on a terminal."""
        codes = {"bold": "1", "green": "32", "yellow": "33", "dim": "2"}
        styled = f"\x1b[{codes[style]}m{text}\x1b[0m" if self.colour and style and text else text
        self._put(("\r\x1b[K" if self._dirty else "") + styled + "\n")
        self._dirty = False
        self._write_log(text)

    def update(self, text: str) -> None:
        """Replace the progress line of a terminal, cut to its width; does nothing elsewhere."""
        if self.interactive:
            width = os.get_terminal_size(self.stream.fileno()).columns if self.stream else 80
            self._put(f"\r\x1b[K{text[: max(width - 1, 20)]}")
            self._dirty = True

    def close(self) -> None:
        if self._dirty:
            self._put("\r\x1b[K")
            self._dirty = False
        if self._log is not None:
            self._log.close()
            self._log = None

    def _put(self, text: str) -> None:
        try:
            if self.stream is not None:
                self.stream.write(text)
                self.stream.flush()
        except (OSError, ValueError):  # the reader of the pipe has exited
            self.stream = None

    def _write_log(self, text: str) -> None:
        try:
            if self._log is not None:
                self._log.write(text + "\n")
        except OSError:  # a full disk is reported where checkpoints are written
            self._log = None


def aligned(rows: list[list[str]]) -> str:
    """Rows of text as aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
