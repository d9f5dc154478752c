"""Files that are written behind the training, in the order in which they were given."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Writer:
    """One thread that does jobs in the order given; once one has failed, the rest are dropped.

    torch.save, flushing and checksums let go of Python's lock, so training goes on. Copies that wait to be written
    cost memory of the host: settle a kind before adding to it again, and no more than one of each waits.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "fastflower-writer")
        self._jobs: list[tuple[str, Future[None]]] = []
        self._failed = False

    def add(self, kind: str, work: Callable[[], object]) -> None:
        """Do `work` after everything that was added before."""
        self._jobs.append((kind, self._thread.submit(self._do, work)))

    def settle(self, kind: str | None = None) -> None:
        """Wait for the jobs of a kind (None: all) and those before them; raises what the first that failed raised."""
        ends = [end for end, (name, _) in enumerate(self._jobs, 1) if kind in (None, name)]
        for _, job in self._jobs[: max(ends, default=0)]:
            job.result()
        del self._jobs[: max(ends, default=0)]

    def close(self) -> None:
        """Finish what was added, whatever becomes of it, and end the thread."""
        self._thread.shutdown()

    def _do(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise
