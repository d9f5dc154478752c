"""Parallel trainings on Ray: on the GPUs or cores of this machine, or on the nodes of a running cluster."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastflower.campaign import launch
from fastflower.campaign.launch import Finished, Result
from fastflower.campaign.plan import Task
from fastflower.core import ray_cluster
from fastflower.core.errors import EnvironmentFault
from fastflower.core.runs import Run

RETRIES = 2  # of a training whose node was lost; it resumes from its last checkpoint


def run_on_ray(tasks: Iterable[Task], ranks: int, *, finished: Finished, logs: Path) -> Iterator[Result]:
    """Run as many trainings at once as fit, each with `ranks` GPUs (cores where no node has a GPU).

    Yields results as trainings end; each training writes its output to a file in `logs`. Every node must see the
    working directory under the same path. Uses the cluster of RAY_ADDRESS, else starts a local one until the end.
    """
    with ray_cluster.joined("use --no-ray") as ray:
        request, slots, threads = resources(ray_cluster.nodes(ray), ranks)
        print(f"on Ray: {slots} trainings at once, {ranks} {_unit(request)} each; logs in {logs}", flush=True)
        train = ray.remote(_train).options(max_retries=RETRIES, **request)
        waiting: dict[Any, Task] = {}
        for task in tasks:
            if finished(task):
                yield Result(task, "kept")
                continue
            launch.await_end(task.run)
            log = logs / f"{task.run.exp}__{task.run.stem}.log"
            command = launch.training_command(task, ranks)
            environment = launch.child_environment(threads)
            task_id = train.remote(
                task.run, command, environment=environment, log=str(log), folder=os.getcwd()
            )
            waiting[task_id] = task
            print(f"  queued {task.name}", flush=True)
            if len(waiting) >= slots:
                yield _first(ray, waiting)
        while waiting:
            yield _first(ray, waiting)


def resources(nodes: list[dict[str, float]], ranks: int) -> tuple[dict[str, float], int, int]:
    """Resource request of one training, number of trainings that fit at once, and threads of each rank.

    `nodes` are the resources of each node. A training stays on one node.
    Raises EnvironmentFault when no node has room for one.
    """
    kind = "GPU" if any(node.get("GPU") for node in nodes) else "CPU"
    slots = [int(node.get(kind, 0) // ranks) for node in nodes]
    if not sum(slots):
        largest = max((int(node.get(kind, 0)) for node in nodes), default=0)
        raise EnvironmentFault(
            f"a training of {ranks} ranks needs {ranks} {kind}s on one node, the largest has {largest}; "
            f"use -n {max(largest, 1)}"
        )
    if kind == "CPU":
        return {"num_cpus": ranks, "num_gpus": 0}, sum(slots), 1
    threads = min(
        int(node.get("CPU", 1) // (count * ranks)) for node, count in zip(nodes, slots, strict=True) if count
    )
    return {"num_cpus": 0, "num_gpus": ranks}, sum(slots), max(1, threads)


def _unit(request: dict[str, float]) -> str:
    return "GPUs" if request["num_gpus"] else "cores"


def _train(
    run: Run, command: list[str], *, environment: dict[str, str], log: str, folder: str
) -> tuple[int, str]:
    """Run the training as a process on a node, with the GPUs that Ray assigned to it.

    After the loss of a node that still saves, the training waits for its end.
    """
    ray_cluster.end_with_node()
    os.chdir(folder)
    launch.await_end(run)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        environment = environment | {"CUDA_VISIBLE_DEVICES": visible}
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    return launch.run_process(command, environment, Path(log))


def _first(ray: Any, waiting: dict[Any, Task]) -> Result:
    """Result of the next training that ends."""
    (ready,), _ = ray.wait(list(waiting), num_returns=1)
    task = waiting.pop(ready)
    try:
        code, reason = ray.get(ready)
    except ray.exceptions.RayError as error:
        return Result(task, "failed", f"node lost: {' '.join(str(error).split())[:200]}")
    return Result(task, "failed" if code else "done", reason)
