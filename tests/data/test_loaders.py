"""Loaders: equal batches for any threads, ranks and starts; every row once; no leaks and no hanging threads."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflower.core import seeding
from fastflower.core.errors import CorruptionError
from fastflower.core.workers import cores
from fastflower.data.betons.beton_file import Beton, open_beton
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.decode.kernel import Crop, decode_eval
from fastflower.data.loaders import Batch, EvalLoader, TrainLoader
from fastflower.recipe import load

ROWS = 23


def write(path: Path, bad: int | None = None) -> Beton:
    rng = np.random.default_rng(0)
    with BetonWriter(path, ROWS) as writer:
        for i in range(ROWS):
            if i == bad:
                writer.append_jpeg(b"not a JPEG", height=20, width=30, label=i % 5, index=i)
            else:
                writer.append_raw(rng.integers(0, 256, (20 + i, 30, 3), np.uint8), i % 5, i)
        writer.commit()
    return open_beton(path)


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    return write(tmp_path_factory.mktemp("betons") / "a.beton")


def order(epoch: int) -> np.ndarray:
    """41 random rows, with repeats."""
    return seeding.generator(7, epoch).integers(0, ROWS, 41)


def loader(beton: Beton, batch: int = 8, **options: object) -> TrainLoader:
    given = {"size": lambda epoch: (12, 16), "crop": Crop(), **options}
    return TrainLoader(beton, given.pop("order", order), seed=3, batch=lambda epoch: batch, **given)  # type: ignore[arg-type]


def epoch(source: TrainLoader, number: int, start: int = 0) -> list[Batch]:
    source.cursor = lambda: (number, start)
    return list(source)


def equal_batch(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def equal(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(map(equal_batch, a, b))


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastflower-loader"]


def test_a_batch_holds_the_rows_keys_and_labels_of_its_step(beton: Beton) -> None:
    source = loader(beton)
    batches = epoch(source, 2)
    assert len(batches) == len(source) == source.steps(2) == 5 and source.batch_size == 8
    for t, batch in enumerate(batches):
        rows = order(2)[8 * t : 8 * t + 8]
        assert batch["image"].shape == (8, 12, 16, 3) and batch["image"].dtype == torch.uint8
        assert batch["row"].tolist() == rows.tolist()
        assert batch["label"].tolist() == (rows % 5).tolist() and batch["label"].dtype == torch.int64
        keys = seeding.row_keys(3, 2, positions=np.arange(8 * t, 8 * t + 8), rows=rows)
        assert batch["key"].numpy().view(np.uint64).tolist() == keys.tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_the_draws_of_each_class_are_those_of_the_batches(beton: Beton, world: int) -> None:
    """The 41st row, which fills no batch, is not counted."""
    labels = torch.cat([batch["label"] for batch in epoch(loader(beton), 2)])
    source = loader(beton, batch=8 // world, world=world)
    assert source.class_draws(2, 7) == labels.bincount(minlength=7).tolist() and len(labels) == 40


@pytest.mark.parametrize("options", [{"threads": 3}, {"prefetch": 1}, {"prefetch": 5, "threads": 2}])
def test_threads_and_lookahead_change_nothing(beton: Beton, options: dict[str, int]) -> None:
    assert equal(epoch(loader(beton, threads=1), 1), epoch(loader(beton, **options), 1))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_interleave_to_the_global_batch(beton: Beton, world: int) -> None:
    global_batches = epoch(loader(beton, 8), 1)
    ranks = [epoch(loader(beton, 8 // world, rank=rank, world=world), 1) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {len(global_batches)}
    for t, batch in enumerate(global_batches):
        for name, value in batch.items():
            interleaved = torch.stack([ranks[rank][t][name] for rank in range(world)], 1)
            assert torch.equal(interleaved.flatten(0, 1), value)


def test_a_resume_continues_at_its_step(beton: Beton) -> None:
    source = loader(beton)
    batches = epoch(source, 4)
    for start in range(6):
        assert equal(batches[start:], epoch(loader(beton), 4, start))
    assert len(source) == 5 and not equal_batch(batches[0], epoch(source, 5)[0])


def test_sizes_and_batches_follow_the_epoch(beton: Beton) -> None:
    source = TrainLoader(
        beton,
        order,
        seed=3,
        batch=lambda e: 8 if e < 2 else 4,
        size=lambda e: (8, 8) if e < 2 else (16, 24),
        crop=Crop(),
        threads=1,
    )
    small, large = epoch(source, 1), epoch(source, 2)
    assert len(small) == 5 and small[0]["image"].shape == (8, 8, 8, 3)
    assert (
        len(large) == len(source) == 10
        and large[0]["image"].shape == (4, 16, 24, 3)
        and source.batch_size == 4
    )


def test_a_kept_batch_is_not_overwritten(beton: Beton) -> None:
    source = loader(beton)
    source.cursor = lambda: (0, 0)
    kept, copies = [], []
    for batch in source:
        kept.append(batch)
        copies.append({name: value.clone() for name, value in batch.items()})
    assert equal(kept, copies)


def test_a_kept_view_keeps_its_memory(beton: Beton) -> None:
    source = loader(beton, prefetch=1)
    tensors, arrays, addresses, expected = [], [], set(), []
    for number in range(12):
        for batch in epoch(source, number):
            addresses.add(batch["image"].data_ptr())
            if len(expected) < 7:
                tensors.append(batch["image"][2, 3:])
                arrays.append(batch["image"].numpy()[5])
                expected.append((tensors[-1].clone(), arrays[-1].copy()))
        del batch
    assert len(addresses) < 30  # of 60 batches: memory is reused
    for tensor, array, (first, second) in zip(tensors, arrays, expected, strict=True):
        assert torch.equal(tensor, first) and np.array_equal(array, second)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_sees_every_row_once(beton: Beton, world: int) -> None:
    expected = np.empty((ROWS, 12, 16, 3), np.uint8)
    decode_eval(beton, np.arange(ROWS), out=expected, factor=1.14, interpolation="bicubic", threads=1)
    seen: list[int] = []
    for rank in range(world):
        source = EvalLoader(
            beton,
            4,
            size=lambda: (12, 16),
            factor=1.14,
            interpolation="bicubic",
            rank=rank,
            world=world,
            threads=1,
        )
        batches = list(source)
        assert len(batches) == len(source) == -(-ROWS // (4 * world))
        for batch in batches:
            assert batch["image"].shape == (4, 12, 16, 3) and batch["valid"].dtype == torch.bool
            rows = batch["row"][batch["valid"]]
            assert np.array_equal(batch["image"][batch["valid"]].numpy(), expected[rows.numpy()])
            assert not batch["image"][~batch["valid"]].any()
            assert torch.equal(batch["label"], batch["row"] % 5)
            seen += rows.tolist()
    assert sorted(seen) == list(range(ROWS))


def test_an_undecodable_row_reaches_next(tmp_path: Path) -> None:
    bad = write(tmp_path / "a.beton", bad=13)
    source = loader(bad, order=lambda epoch: np.arange(ROWS))
    batches = iter(source)
    next(batches)
    with pytest.raises(CorruptionError, match=r"a\.beton: row 13 \(row 13 of folds.csv\)"):
        next(batches)
    assert next(batches, None) is None and not threads()
    with pytest.raises(CorruptionError, match="row 13 "):
        list(EvalLoader(bad, 4, size=lambda: (12, 16), factor=1.14, interpolation="bicubic", threads=1))


def test_any_exception_of_the_thread_reaches_next(beton: Beton) -> None:
    def failing(epoch: int) -> tuple[int, int]:
        raise ZeroDivisionError("of the thread")

    with pytest.raises(ZeroDivisionError, match="of the thread"):
        next(iter(loader(beton, size=failing)))


def test_leaving_early_joins_the_thread(beton: Beton) -> None:
    source = loader(beton)
    for _ in source:
        break
    gc.collect()
    assert not threads()
    batches = iter(source)
    next(batches)
    assert len(threads()) == 1
    source.close()
    assert not threads() and next(batches, None) is None
    source.close()
    batches = iter(source)
    next(batches)
    del batches
    gc.collect()
    assert not threads()


def settle(count: Callable[[], int]) -> int:
    gc.collect()
    return count()


@pytest.mark.slow
def test_nothing_grows_with_epochs(beton: Beton) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])

    source = loader(beton, threads=2)
    for number in range(50):
        epoch(source, number)
    before = settle(open_files), settle(threading.active_count), settle(resident)
    for number in range(1000):
        source.cursor = lambda number=number: (number, 0)  # type: ignore[misc]
        if number % 3:
            for _ in source:
                pass
        else:
            next(iter(source))
    after = settle(open_files), settle(threading.active_count), settle(resident)
    assert after[:2] == before[:2] and not threads()
    assert after[2] - before[2] < 2048  # pages: 8 MB


def test_a_slow_reader_bounds_the_prefetched_batches(beton: Beton) -> None:
    started: list[int] = []

    def sizes(epoch: int) -> tuple[int, int]:
        return 12, 16

    class Watched(TrainLoader):
        def batches(self, epoch: int, start: int) -> Iterator[Batch]:
            for t, batch in enumerate(super().batches(epoch, start)):
                started.append(t)
                yield batch

    source = Watched(
        beton,
        lambda e: np.arange(200) % ROWS,
        seed=3,
        batch=lambda e: 2,
        size=sizes,
        crop=Crop(),
        threads=1,
        prefetch=3,
    )
    batches = iter(source)
    next(batches)
    deadline = time.monotonic() + 5
    while len(started) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(started) == 5  # one taken, three waiting, one held by the thread
    source.close()


def test_the_training_crop_follows_the_recipe() -> None:
    words = ["aug.rrc_scale=[0.5,1]", "aug.rrc_ratio=[1,1.5]", "aug.hflip_p=0.25", "aug.strength=2"]
    assert Crop.of(load(None, words)) == Crop((0.5, 1.0), (1.0, 1.5), 0.5)
    assert Crop.of(load(None, [*words, "aug.hflip_p=0.8"])).hflip_p == 1.0
    assert Crop.of(load(None, ["data.resize=whole"])).whole


def test_cores_are_shared_by_ranks() -> None:
    mine = len(os.sched_getaffinity(0))
    assert cores(3, 2) == 3 and cores(0) == mine and cores(0, 10**6) == 1


@pytest.mark.gpu
def test_batches_are_page_locked_and_arrive_whole(beton: Beton) -> None:
    batches = epoch(loader(beton), 1)
    assert all(batch["image"].is_pinned() for batch in batches)
    on_device = [batch["image"].to("cuda", non_blocking=True) for batch in batches]
    torch.cuda.synchronize()
    assert all(torch.equal(a.cpu(), b["image"]) for a, b in zip(on_device, batches, strict=True))
