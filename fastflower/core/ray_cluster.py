"""Ray: functions run on the nodes of a cluster, or side by side on this machine where there is none."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from fastflower.core import workers
from fastflower.core.errors import EnvironmentFault

T = TypeVar("T")
ANSWER = 5.0  # seconds that a cluster has to accept a connection
RETRIES = 3  # of a task whose node was lost
POLL = 1.0  # seconds between two looks at a task and its cluster


@contextmanager
def joined(otherwise: str) -> Iterator[Any]:
    """Context manager: the module ray, joined to the cluster of RAY_ADDRESS, else to one that lives until the exit.

    Raises EnvironmentFault when Ray is missing or does not start; `otherwise` says how to do without it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # tasks without GPUs keep CUDA_VISIBLE_DEVICES
    # a worker that ends would kill its training, which the kernel tells to save (see workers.die_with_parent)
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")  # its warnings surround our own line
    check_address(os.environ.get("RAY_ADDRESS", ""), otherwise)
    try:
        import ray
    except ImportError:
        raise EnvironmentFault(
            "--ray needs Ray, which is not installed; pip install 'fastflower[cluster]'"
        ) from None
    try:
        # without an address Ray would join the latest cluster of this machine, anybody's
        ray.init(
            os.environ.get("RAY_ADDRESS") or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises many kinds: no cluster at the address, no ports, no shared memory
        address = os.environ.get("RAY_ADDRESS")
        remedy = f"unset RAY_ADDRESS={address} to start one here" if address else otherwise
        if type(error).__name__ == "AuthenticationError":
            remedy = "set RAY_AUTH_MODE=token with ~/.ray/auth_token of the cluster's first node here"
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise EnvironmentFault(f"--ray: Ray does not start ({cause}); {remedy}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str, otherwise: str) -> None:
    """Raise EnvironmentFault when nothing listens at the address of a cluster: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER).close()
    except (OSError, OverflowError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise EnvironmentFault(
            f"--ray: no Ray cluster at RAY_ADDRESS={address} ({cause}); start it there (ray start --head), unset "
            f"RAY_ADDRESS to start one here, or {otherwise}"
        ) from None


def nodes(ray: Any) -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def cores(ray: Any) -> int:
    """The CPU cores of all nodes that are alive; EnvironmentFault when there are none."""
    total = sum(int(node.get("CPU", 0)) for node in nodes(ray))
    if not total:
        raise EnvironmentFault("--ray: no node of the cluster has a CPU core left; start one (ray start)")
    return total


@functools.cache
def end_with_node() -> None:
    """Let this process, Ray's worker, end within POLL seconds of its node, so that its training is told to save.

    Ray itself asks only whether process 1 has adopted its worker; on desktops it is systemd's process of the user.
    """
    node = os.getppid()

    def watch() -> None:
        while os.getppid() == node:
            time.sleep(POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class RayTasks:
    """Tasks on the nodes of a cluster, with the interface of `workers.map_ordered`.

    Every node must see the working directory under the same path. A task whose node is lost runs again on another one,
    up to RETRIES times, so it must leave the same files when it runs twice.
    """

    def __init__(self, ray: Any) -> None:
        self.ray = ray

    def map_ordered(
        self,
        work: Callable[..., T],
        tasks: Iterator[tuple[Any, ...]],
        *,
        count: int,
        on_progress: Callable[[int], None],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Iterator[T]:
        """Yield `work(*task)` for every task in order, `count` at once; few are queued.

        Items that `work` counts by `workers.count_done` reach `on_progress` when their task has ended. Exceptions of
        `work` are raised here. Raises EnvironmentFault when a task has lost its node too often.
        """
        ray, done = self.ray, 0
        remote = ray.remote(_run).options(num_cpus=1, max_retries=RETRIES)
        shared, folder = ray.put(work), os.getcwd()
        waiting: deque[Any] = deque()
        try:
            waiting.extend(remote.remote(shared, folder, task) for task in itertools.islice(tasks, 2 * count))
            meanwhile()
            while waiting:
                result, items = self._result(waiting.popleft())
                done += items
                on_progress(done)
                waiting.extend(remote.remote(shared, folder, task) for task in itertools.islice(tasks, 1))
                yield result
        finally:
            for task in waiting:
                ray.cancel(task, force=True)

    def _result(self, task: Any) -> tuple[Any, int]:
        """The result of a task and the items that it counted; waits while the cluster has a node."""
        ray = self.ray
        while not ray.wait([task], timeout=POLL)[0]:
            cores(ray)
        try:
            result, items = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayError as error:
            cause = " ".join(str(error).split())[:200]
            raise EnvironmentFault(
                f"--ray: a task lost its node {RETRIES + 1} times ({cause}); look at the nodes' memory, then run again"
            ) from None
        return result, items


def _run(work: Callable[..., T], folder: str, task: tuple[Any, ...]) -> tuple[T, int]:
    """The result of a task on a node, and the items that it counted."""
    end_with_node()
    os.chdir(folder)
    with workers.counting() as counted:
        result = work(*task)
        return result, counted()
