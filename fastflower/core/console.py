"""Terminal output: a console with a log file, aligned text columns, durations, and the command to run next."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

NEXT = "FASTFLOWER_NEXT"  # environment variable; 0: commands do not name the next one
# characters that steer a terminal or reverse text; not tab and line feed (twin of CONTROLS in code/table.py)
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text whose control characters, except tab and line feed, are written as escapes."""
    return CONTROLS.sub(lambda mark: mark[0].encode("unicode_escape").decode(), text)


class VisibleStream:
    """A text stream that makes control characters `visible`, for text with names and values of users.

    `terminal` is the stream below, for a progress line or colours of our own.
    """

    def __init__(self, terminal: TextIO, *, keep: str = "") -> None:
        self.terminal, self._keep = terminal, keep

    def write(self, text: str) -> int:
        parts = text.split(self._keep) if self._keep else [text]
        return self.terminal.write(self._keep.join(map(visible, parts)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)


@contextmanager
def visible_streams() -> Iterator[None]:
    """Context manager: stdout and stderr of this process as VisibleStream.

    Carriage returns pass to stderr, where libraries draw their progress.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout = cast(TextIO, VisibleStream(sys.stdout))
    sys.stderr = cast(TextIO, VisibleStream(sys.stderr, keep="\r")) if sys.stderr else sys.stderr
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def terminal() -> TextIO:
    """The stream of stdout itself, which takes control characters."""
    return cast(TextIO, getattr(sys.stdout, "terminal", sys.stdout))


def clock(seconds: float) -> str:
    """A duration as 0:07, 12:30 or 1:02:03."""
    rounded = max(0, round(seconds))
    hours, minutes = divmod(rounded // 60, 60)
    return f"{hours}:{minutes:02}:{rounded % 60:02}" if hours else f"{minutes}:{rounded % 60:02}"


def print_next(command: str, arguments: list[str]) -> None:
    """Print the last line of a command, `next: fastflower export s2`, with the recipe or experiment that was given.

    Not where this command is a step of another one, which sets NEXT to 0.
    """
    print_next_line(spelled(command, arguments))


def print_next_line(text: str) -> None:
    """Print the last line of a command where the next one is no command of fastflower."""
    if os.environ.get(NEXT) != "0" and os.environ.get("RANK", "0") == "0":
        print(f"next: {text}", flush=True)


def spelled(command: str, arguments: list[str]) -> str:
    """A command of fastflower as a person types it here: by `fastflower` where that is on PATH, else by Python."""
    script = shutil.which("fastflower")
    by_name = script is not None and Path(script).parent == Path(sys.executable).parent
    return shlex.join([*(["fastflower"] if by_name else ["python", "-m", "fastflower"]), command, *arguments])


def timestamp() -> str:
    """The local time as 2026-01-31 23:59:59."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


class Console:
    """Writes to a terminal or pipe and to a log file; a failure of either does not stop the training.

    Each line of the log begins with the time.
    The log is created with the first line, so that a run that is refused leaves none.
    """

    def __init__(self, log: Path | None, *, silent: bool = False) -> None:
        self.stream: TextIO | None = None if silent else terminal()
        self.interactive = (
            self.stream is not None and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        )
        self.colour = self.interactive and "NO_COLOR" not in os.environ
        self._dirty = False
        self._path = log
        self._log: TextIO | None = None

    def write(self, text: str = "", style: str = "") -> None:
        """Write lines to terminal and log; `style` is bold, green, yellow or dim, on a terminal."""
        text = visible(text)
        codes = {"bold": "1", "green": "32", "yellow": "33", "dim": "2"}
        styled = f"\x1b[{codes[style]}m{text}\x1b[0m" if self.colour and style and text else text
        self._put(("\r\x1b[K" if self._dirty else "") + styled + "\n")
        self._dirty = False
        self._write_log(text)

    def update(self, text: str) -> None:
        """Replace the progress line of a terminal, cut to its width; does nothing elsewhere."""
        if self.interactive:
            width = os.get_terminal_size(self.stream.fileno()).columns if self.stream else 80
            self._put(f"\r\x1b[K{visible(text)[: max(width - 1, 20)]}")
            self._dirty = True

    def close(self) -> None:
        if self._dirty:
            self._put("\r\x1b[K")
            self._dirty = False
        self._path = None
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
            if self._log is None and self._path is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._log = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
            if self._log is not None:
                self._log.write(f"{timestamp()}  {text}".rstrip() + "\n")
        except OSError:  # a full disk is reported where checkpoints are written
            self._log = self._path = None


def aligned(rows: list[list[str]]) -> str:
    """Rows of text as aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(text_width(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        gaps = [" " * (width - text_width(cell)) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0] + gaps[0], *map(str.__add__, gaps[1:], row[1:])]))
    return "\n".join(line.rstrip() for line in lines)


def text_width(text: str) -> int:
    """The columns that a text takes, on a terminal or an axis: Chinese letters take two, accents to combine none."""
    return sum(
        0 if unicodedata.combining(letter) else 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        for letter in text
    )


def shortened(text: str, longest: int) -> str:
    """A text cut to `longest` columns, with an ellipsis where it was longer."""
    if text_width(text) <= longest:
        return text
    while text_width(text) > longest - 1:
        text = text[:-1]
    return f"{text}…"
