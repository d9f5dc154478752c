"""Background writing of files while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """One thread that runs jobs in the order given; once a job has failed, the rest are dropped.

    torch.save, fsync and checksums release the GIL, so training continues. Each queued copy costs host memory: wait
    for a kind before adding to it again, so that at most one of each kind is queued.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "fastflower-writer")
        self._jobs: list[tuple[str, Future[None]]] = []
        self._failed = False

    def add(self, kind: str, work: Callable[[], object]) -> None:
        """Queue `work` behind all earlier jobs."""
        self._jobs.append((kind, self._thread.submit(self._run, work)))

    def wait(self, kind: str | None = None) -> None:
        """Wait for the jobs of a kind (None: all) and those before them; re-raises the first error."""
        ends = [end for end, (name, _) in enumerate(self._jobs, 1) if kind in (None, name)]
        for _, job in self._jobs[: max(ends, default=0)]:
            job.result()
        del self._jobs[: max(ends, default=0)]

    def close(self) -> None:
        """Run the queued jobs, ignore their errors, and end the thread."""
        self._thread.shutdown()

    def _run(self, work: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            work()
        except BaseException:
            self._failed = True
            raise
