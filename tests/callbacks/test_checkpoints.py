"""Checkpoint files: names, generations, fixed names, full disks, signals and intervals."""

from __future__ import annotations

import errno
import os
import signal
import types
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastflower.callbacks import checkpoints
from fastflower.callbacks.checkpoints import (
    LAYOUT,
    previous_last,
    publish,
    remove_leftovers,
    write_permanent,
)
from fastflower.callbacks.stop import Stop
from fastflower.core import checkpoint
from fastflower.core.errors import CorruptionError, EnvironmentFault, InputError
from fastflower.core.files import temporary_path
from fastflower.core.runs import Run, find_members
from fastflower.recipe.identity import differences
from fastflower.training import samples
from fastflower.training.resume import check_layout, check_names, load_last

RUN = Run(exp="exp", backbone="convnextv2_atto", fold=0, seed=42)


def killed(path: Path, name: Path) -> None:
    raise KeyboardInterrupt


def save(kind: str, epoch: int, score: float) -> Path:
    write = partial(checkpoint.save, tensors={"w": torch.full((3,), float(epoch))}, meta={"epoch": epoch})
    return publish(RUN, kind, epoch=epoch, score=score, write=write)


def names() -> list[str]:
    return sorted(path.name for path in RUN.model_dir.iterdir())


def test_one_file_of_a_kind_and_its_fixed_name():
    save("best_combo", 1, 0.5)
    path = save("best_combo", 3, 0.75)
    assert names() == ["best_combo.pth", "best_combo__convnextv2_atto__fold0_seed42_epoch3_score0.7500.pth"]
    assert path.samefile(RUN.model_dir / "best_combo.pth")
    assert checkpoint.load(RUN.model_dir / "best_combo.pth").meta["epoch"] == 3


def test_other_runs_of_the_experiment_are_left_alone():
    other = Run(exp="exp", backbone="convnextv2_atto", fold=1, seed=42)
    publish(other, "best_combo", epoch=9, score=0.9, write=partial(checkpoint.save, tensors={}, meta={}))
    save("best_combo", 1, 0.5)
    save("best_combo", 2, 0.6)
    assert other.checkpoints("best_combo") and len(RUN.checkpoints("best_combo")) == 1


def test_fixed_names_belong_to_the_best_of_all_runs_and_last_to_the_latest(monkeypatch):
    fixed = RUN.model_dir / "best_combo.pth"
    other = Run(exp="exp", backbone="vit", fold=1, seed=7)

    def save_other(kind: str, score: float) -> Path:
        return publish(other, kind, epoch=9, score=score, write=partial(checkpoint.save, tensors={}, meta={}))

    first = save("best_combo", 1, 0.7)
    second = save_other("best_combo", 0.6)
    assert fixed.samefile(first) and second.exists()
    assert fixed.samefile(save_other("best_combo", 0.8))
    assert fixed.samefile(other.checkpoints("best_combo")[0])
    own = save("best_combo", 2, 0.5)  # of a larger size, say: lower, and it replaces the run's own 0.7
    assert not first.exists() and own.exists() and fixed.samefile(other.checkpoints("best_combo")[0])
    save("last", 1, 0.9)
    assert (RUN.model_dir / "last.pth").samefile(save_other("last", 0.1))
    original = checkpoints._link

    def slow(path: Path, name: Path, **options: object) -> None:
        monkeypatch.setattr(checkpoints, "_link", original)
        save_other("best_combo", 0.9)  # while this run links its own
        original(path, name, **options)

    monkeypatch.setattr(checkpoints, "_link", slow)
    save("best_combo", 3, 0.85)
    assert fixed.samefile(other.checkpoints("best_combo")[0])
    assert not list(RUN.model_dir.glob(".*"))


def test_two_generations_of_last():
    for epoch in (1, 2, 3):
        save("last", epoch, 0.5)
    assert [path.name for path in RUN.checkpoints("last")] == [
        "last__convnextv2_atto__fold0_seed42_epoch3_score0.5000.pth"
    ]
    assert checkpoint.load(previous_last(RUN)).meta["epoch"] == 2
    save("last", 3, 0.5)  # twice in an epoch: the same name
    assert checkpoint.load(previous_last(RUN)).meta["epoch"] == 3


def test_a_disk_without_hard_links_gets_copies(monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = save("best_clean", 1, 0.5)
    assert (RUN.model_dir / "best_clean.pth").read_bytes() == path.read_bytes()


def test_a_full_disk_keeps_the_last_good_checkpoint_and_says_so():
    save("last", 1, 0.5)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        EnvironmentFault, match="the disk is full; the last good checkpoint is kept, make room"
    ):
        publish(RUN, "last", epoch=2, score=0.5, write=full)
    assert load_last(RUN, print)[1].meta["epoch"] == 1


def test_the_newest_intact_state_is_loaded():
    said: list[str] = []
    assert load_last(RUN, said.append) is None
    save("last", 1, 0.5)
    newest = save("last", 2, 0.5)
    assert load_last(RUN, said.append)[1].meta["epoch"] == 2 and said == []
    newest.unlink()
    newest.write_bytes(b"")
    assert load_last(RUN, said.append)[1].meta["epoch"] == 1
    assert len(said) == 2 and said[0].startswith("WARNING") and "the previous checkpoint" in said[1]
    previous_last(RUN).write_bytes(b"PK")
    with pytest.raises(CorruptionError, match="every checkpoint of fold 0, seed 42 is damaged"):
        load_last(RUN, said.append)


def test_linking_again_leaves_one_file_and_no_temporary_one():
    path = save("last", 1, 0.5)
    checkpoints._link(path, RUN.model_dir / "last.pth")
    assert path.samefile(RUN.model_dir / "last.pth")
    assert sorted(file.name for file in RUN.model_dir.iterdir()) == sorted({path.name, "last.pth"})


def test_half_written_files_of_killed_saves_are_removed(monkeypatch):
    dead, alive, name = (
        2**22 + 1,
        os.getpid(),
        "convnextv2_atto__fold0_seed42",
    )  # no process has the first: too large
    save("last", 1, 0.5)
    RUN.meta_dir.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)  # before the fixed name is in place
        with pytest.raises(KeyboardInterrupt):
            checkpoints._link(RUN.checkpoints("last")[0], RUN.model_dir / "last.pth")
    leftovers = [
        *RUN.model_dir.glob(".*.tmp"),
        temporary_path(RUN.model_dir / f"last__{name}_epoch2_score0.5000.pth", dead),
        temporary_path(RUN.meta_dir / f"early_stop_{name}.json", dead),
        temporary_path(RUN.meta_dir / "recipe.yaml", dead),
        temporary_path(RUN.results_dir / f"samples_{name}.png", dead),
    ]
    others = [
        temporary_path(
            RUN.model_dir / f"last__{name.replace('fold0', 'fold1')}_epoch2_score0.5000.pth", dead
        ),
        temporary_path(RUN.model_dir / f"last__{name}0_epoch2_score0.5000.pth", dead),  # seed 420
        temporary_path(RUN.meta_dir / "recipe.yaml", alive),
    ]
    assert len(leftovers) == 5
    for path in (*leftovers, *others):
        path.write_bytes(b"half")
    remove_leftovers(RUN)
    assert not any(path.exists() for path in leftovers) and all(path.exists() for path in others)


def test_a_kill_leaves_the_previous_samples(tmp_path, monkeypatch):
    path = tmp_path / "samples.png"
    path.write_bytes(b"old")
    monkeypatch.setattr(samples, "sample_rows", lambda *_, **__: {"stored": np.zeros((8, 4, 4, 3), np.uint8)})
    loader = types.SimpleNamespace(close=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            samples.save_samples(
                path, None, loader=loader, num_classes=2, interpolation="bilinear", fill=(0.0, 0.0, 0.0)
            )
    assert path.read_bytes() == b"old"
    samples.save_samples(
        path, None, loader=loader, num_classes=2, interpolation="bilinear", fill=(0.0, 0.0, 0.0)
    )
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"


def test_another_network_is_refused():
    current = {"a": torch.zeros(2), "b": torch.zeros(3)}
    check_names({"a": torch.ones(2), "b": torch.ones(3)}, current)
    for saved in (
        {"a": torch.zeros(2)},
        {**current, "c": torch.zeros(1)},
        {"a": torch.zeros(2), "b": torch.zeros(4)},
    ):
        with pytest.raises(InputError, match="holds another network: 1 tensors differ"):
            check_names(saved, current)


def test_identities_differ_by_key_and_survive_json():
    then = {"recipe": {"opt.lr": 0.1, "sched.x": {"1": ["head"]}}, "data": {"folds": "a"}}
    now = {"recipe": {"opt.lr": 0.2, "sched.x": {1: ("head",)}, "new.key": 3}, "data": {"folds": "b"}}
    assert differences(then, now) == ["new.key: None -> 3", "opt.lr: 0.1 -> 0.2", "data folds: a -> b"]
    assert differences(then, then) == []


@pytest.fixture
def stop() -> Iterator[Stop]:
    before = signal.getsignal(signal.SIGTERM)
    stop = Stop()
    yield stop
    stop.restore()
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_ask_while_there_is_something_to_save(stop):
    """SIGINT to the process group, then the launcher's SIGTERM: one request."""
    with stop.deferred():
        assert not stop.requested_on_any_rank(None)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested_on_any_rank(None)


def test_a_signal_before_the_first_step_ends_the_process(stop):
    with pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGTERM)
    assert left.value.code == 75


def test_a_signal_that_follows_an_error_leaves_its_words(stop):
    with pytest.raises(InputError, match="another rank has ended"):
        try:
            with stop.deferred():
                raise InputError("another rank has ended")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_interrupt_ends_at_once(stop, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"left with {code}"))
    with stop.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(pytest.fail.Exception, match="left with 130"):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_state_of_another_version_is_refused_in_one_line():
    path = Path("last.pth")
    check_layout(path, {"layout": LAYOUT})
    for meta, said in (
        ({}, "fastflower of unknown version has layout None"),
        ({"layout": 0, "version": "0.1"}, "0.1 has"),
    ):
        with pytest.raises(
            InputError, match=rf"^last.pth: .*{said}.* resumes layout {LAYOUT}; finish it .* exp.name$"
        ):
            check_layout(path, meta)


def test_a_permanent_epoch_is_the_last_of_its_epoch_and_nothing_removes_it():
    permanent = RUN.model_dir / "epoch__convnextv2_atto__fold0_seed42_epoch1_score0.5000.pth"
    write = partial(checkpoint.save, tensors={}, meta={"epoch": 1})
    assert publish(RUN, "last", epoch=1, score=0.5, write=partial(write_permanent, write)).samefile(permanent)
    for epoch in (2, 3, 4):
        save("last", epoch, 0.5)
    assert checkpoint.load(permanent).meta["epoch"] == 1
    assert find_members("exp", "last__*.pth", metric="combo") == RUN.checkpoints("last")


def test_a_run_killed_between_the_permanent_epoch_and_last_writes_both_again(monkeypatch):
    save("last", 1, 0.5)
    write = partial(checkpoint.save, tensors={}, meta={"epoch": 2})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_link", killed)
        with pytest.raises(KeyboardInterrupt):
            write_permanent(write, RUN.checkpoint_path("last", 2, 0.5))
    assert load_last(RUN, print)[1].meta["epoch"] == 1
    publish(RUN, "last", epoch=2, score=0.5, write=partial(write_permanent, write))
    assert load_last(RUN, print)[1].meta["epoch"] == 2 and len(list(RUN.model_dir.glob("epoch__*"))) == 1
