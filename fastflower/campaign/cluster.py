"""Trainings side by side on Ray: on this machine's GPUs or cores, or on the nodes of a cluster that runs already."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastflower.campaign import launch
from fastflower.campaign.launch import Finished, Result
from fastflower.campaign.plan import Task
from fastflower.core.errors import EnvironmentFault

RETRIES = 2  # of a training whose node was lost; it goes on from its last checkpoint


def on_ray(tasks: Iterable[Task], ranks: int, *, finished: Finished, logs: Path) -> Iterator[Result]:
    """As many trainings at once as there is room for, each with `ranks` GPUs (cores where no node has a GPU).

    Results come as trainings end. Output goes to a file each in `logs`. All nodes see this folder under this path.
    A running cluster is found as Ray finds it (RAY_ADDRESS); else one lives in this process as long as it does.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # tasks without GPUs leave them alone
    try:
        import ray
    except ImportError:
        raise EnvironmentFault(
            "--ray needs Ray, which is not installed; pip install 'fastflower[cluster]'"
        ) from None
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        wanted, slots, threads = share([node["Resources"] for node in ray.nodes() if node["Alive"]], ranks)
        print(f"on Ray: {slots} trainings at once, {ranks} {_kind(wanted)} each; logs in {logs}", flush=True)
        train = ray.remote(_train).options(max_retries=RETRIES, **wanted)
        waiting: dict[Any, Task] = {}
        for task in tasks:
            if finished(task):
                yield Result(task, "kept")
                continue
            log = logs / f"{task.run.exp}__{task.run.stem}.log"
            words = launch.command(task, ranks)
            waiting[train.remote(words, launch.environment(threads), str(log), os.getcwd())] = task
            print(f"  queued {task.name}", flush=True)
            if len(waiting) >= slots:
                yield _first(ray, waiting)
        while waiting:
            yield _first(ray, waiting)
    finally:
        ray.shutdown()


def share(nodes: list[dict[str, float]], ranks: int) -> tuple[dict[str, float], int, int]:
    """What one training asks Ray for, how many fit at once, and the threads of each of its ranks.

    `nodes` are the resources of each node. A training stays on one node.
    Raises EnvironmentFault when no node has room for one.
    """
    kind = "GPU" if any(node.get("GPU") for node in nodes) else "CPU"
    slots = [int(node.get(kind, 0) // ranks) for node in nodes]
    if not sum(slots):
        largest = max((int(node.get(kind, 0)) for node in nodes), default=0)
        raise EnvironmentFault(
            f"a training of {ranks} ranks wants {ranks} {kind}s on one node, the largest has {largest}; "
            f"use -n {max(largest, 1)}"
        )
    if kind == "CPU":
        return {"num_cpus": ranks, "num_gpus": 0}, sum(slots), 1
    threads = min(
        int(node.get("CPU", 1) // (count * ranks)) for node, count in zip(nodes, slots, strict=True) if count
    )
    return {"num_cpus": 0, "num_gpus": ranks}, sum(slots), max(1, threads)


def _kind(wanted: dict[str, float]) -> str:
    return "GPUs" if wanted["num_gpus"] else "cores"


def _train(words: list[str], environment: dict[str, str], log: str, folder: str) -> tuple[int, str]:
    """Runs on a node: the training as a process, with the GPUs that Ray has set aside for it."""
    os.chdir(folder)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = environment | ({"CUDA_VISIBLE_DEVICES": visible} if visible is not None else {})
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    return launch.run(words, own, Path(log))


def _first(ray: Any, waiting: dict[Any, Task]) -> Result:
    """The next training that ends."""
    (ready,), _ = ray.wait(list(waiting), num_returns=1)
    task = waiting.pop(ready)
    try:
        code, reason = ray.get(ready)
    except ray.exceptions.RayError as error:
        return Result(task, "failed", f"its node was lost: {' '.join(str(error).split())[:200]}")
    return Result(task, "failed" if code else "done", reason)
