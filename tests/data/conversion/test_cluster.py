"""Conversion on a cluster: shards that run in any order, twice or half, give the bytes that one process gives."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from PIL import Image

from fastflower import convert
from fastflower.core import ray_cluster, workers
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.data.conversion import encode
from fastflower.data.conversion.encode import CHUNK, Machine

ROWS = 8 * CHUNK
ARGUMENTS = [
    *("data.root=photos", "data.csv=labels.csv", "data.img_size=32", "tta.scales=[32]", "data.n_splits=2"),
    *("data.store=jpeg", "robust.kinds=[occlusion]"),
]


@pytest.fixture
def photographs() -> None:
    """JPEGs, which are stored unchanged, and PNGs, which are encoded."""
    Path("photos").mkdir()
    lines = ["filename,category_id"]
    for k in range(ROWS):
        name = f"{k:03d}.{'png' if k % 3 else 'jpg'}"
        small = np.random.default_rng(k).integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(small).resize((50, 40), Image.Resampling.BICUBIC).save(f"photos/{name}")
        lines.append(f"{name},{k % 4}")
    Path("labels.csv").write_text("\n".join(lines))


def converted(home: str) -> dict[str, str]:
    """The hash of each file that a conversion leaves."""
    return {
        str(path.relative_to(home)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(home).rglob("*"))
        if path.is_file() and path.name not in ("contents.json", ".convert.lock")
    }


class Lost(Exception):
    """The node of a task is gone."""


class FakeRay:
    """Ray in this process: everything crosses as bytes, and the first attempt of some tasks dies half way."""

    exceptions = types.SimpleNamespace(RayTaskError=type("RayTaskError", (Exception,), {}), RayError=Lost)

    def __init__(self, lost: tuple[int, ...] = (), attempts: int = 2) -> None:
        self.lost, self.attempts, self.started, self.deaths = lost, attempts, 0, 0
        self.results: dict[int, Callable[[], Any]] = {}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def remote(self, function: Callable[..., Any]) -> Any:
        def start(*arguments: Any) -> int:
            number, self.started = self.started, self.started + 1
            content = cloudpickle.dumps((function, arguments))

            def run() -> Any:
                for attempt in range(self.attempts):
                    again, (work, folder, task) = cloudpickle.loads(content)
                    if number in self.lost and (attempt == 0 or self.attempts == 1):
                        left = [len(task[0]) // 2] if isinstance(task[0], list) else [3]
                        try:
                            self.run_until(left, again, work, folder, task)
                        except Lost:
                            self.deaths += 1
                        continue
                    return again(work, folder, task)
                raise Lost("the node died")

            self.results[number] = run
            return number

        return types.SimpleNamespace(options=lambda **_: types.SimpleNamespace(remote=start))

    def run_until(self, left: list[int], again: Callable[..., Any], *arguments: Any) -> None:
        """Run a task until it has counted some items."""
        count = workers.count_done

        def dying(items: int = 1) -> None:
            count(items)
            left[0] -= 1
            if not left[0]:
                raise Lost

        workers.count_done = dying
        try:
            again(*arguments)
        finally:
            workers.count_done = count

    def put(self, value: Any) -> Any:
        return cloudpickle.loads(cloudpickle.dumps(value))

    def wait(self, tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return tasks, []

    def get(self, task: int) -> Any:
        try:
            return self.results[task]()
        except (InputError, EnvironmentFault) as error:
            wrapped = self.exceptions.RayTaskError(str(error))
            wrapped.cause = error
            raise wrapped from None

    def cancel(self, task: int, force: bool) -> None:
        self.results.pop(task, None)


def on(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def joined(otherwise: str) -> Iterator[FakeRay]:
        assert otherwise == "leave out --ray"
        yield ray

    monkeypatch.setattr(ray_cluster, "joined", joined)


def test_eight_shards_give_the_bytes_of_one_process(photographs, monkeypatch, capsys) -> None:
    convert.main([*ARGUMENTS, "data.home=one", "data.workers=1"])
    ray = FakeRay(lost=(1, 4, 9))  # two shards, and a beton of a fold
    on(ray, monkeypatch)
    assert convert.main([*ARGUMENTS, "data.home=two", "--ray"]) == 0
    assert (ray.started, ray.deaths) == (8 + 6, 3)  # shards; betons of two folds
    assert converted("two") == converted("one")
    text = capsys.readouterr().out
    assert "on Ray: 2 tasks at once; nodes: 1" in text and "--ray" not in text.splitlines()[-1]
    assert convert.main([*ARGUMENTS, "data.home=two", "--ray"]) == 0
    assert ray.started == 14 and "up to date" in capsys.readouterr().out


def test_a_task_that_always_loses_its_node_is_one_line_and_leaves_nothing(photographs, monkeypatch) -> None:
    on(FakeRay(lost=(2,), attempts=1), monkeypatch)
    with pytest.raises(EnvironmentFault, match=r"--ray: a task lost its node 4 times \(the node died\)"):
        convert.main([*ARGUMENTS, "data.home=two", "--ray"])
    assert not Path("two/betons").exists() and not Path("two/folds.csv").exists()


def test_errors_of_the_work_reach_the_user(photographs, monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    ray = FakeRay()
    on(ray, monkeypatch)
    monkeypatch.setattr(encode, "_append", refuse)
    with pytest.raises(EnvironmentFault, match=r"cannot write \(No space left on device\)"):
        convert.main([*ARGUMENTS, "data.home=two", "--ray"])


def test_a_cluster_without_cores_is_refused() -> None:
    with pytest.raises(EnvironmentFault, match="no node of the cluster has a CPU core left"):
        ray_cluster.cores(types.SimpleNamespace(nodes=lambda: [{"Alive": False, "Resources": {"CPU": 4.0}}]))


def test_shards_are_seconds_of_work_and_more_than_cores() -> None:
    machine = Machine(2, shards=True)
    assert [machine.rows_a_task(rows) for rows in (10, ROWS, 1600, 10**6)] == [16, 16, 200, 1024]
    assert Machine(2).rows_a_task(10**6) == CHUNK


def test_ray_that_does_not_start_is_one_line(photographs, monkeypatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # nobody listens there
    with pytest.raises(
        EnvironmentFault, match=r"no Ray cluster at RAY_ADDRESS=127.0.0.1:9 .*or leave out --ray"
    ):
        convert.main([*ARGUMENTS, "--ray"])
    assert not Path("data/betons").exists()


def test_a_cluster_that_asks_for_a_token_says_where_it_is(monkeypatch) -> None:
    def init(address: str, **_: Any) -> None:
        raise type("AuthenticationError", (Exception,), {})("RPC error: InvalidAuthToken: token is missing")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=init))
    with (
        pytest.raises(
            EnvironmentFault, match=r"token is missing\); set RAY_AUTH_MODE=token with ~/.ray/auth_token"
        ),
        ray_cluster.joined("leave out --ray"),
    ):
        pass
