"""Atomic replacement of files and folders, locks, abandoned temporary files, JSON and digests."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest

from fastflower.core import files
from fastflower.core.errors import EnvironmentFault, InputError


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def broken(temporary, path):
        raise OSError("disk full")

    monkeypatch.setattr(files, "replace_atomic", broken)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    dead, alive = 2**22 + 1, os.getpid()  # no process has the first: too large
    abandoned, abandoned_beside, active, nested = (
        files.temporary_path(tmp_path / name, pid)
        for name, pid in (("a", dead), ("b", dead), ("a", alive), ("deep/er/a", dead))
    )
    foreign = tmp_path / "a.5.tmp"
    for path in (abandoned, abandoned_beside, active, nested, foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (files.temporary_path(tmp_path / "c", dead) / "full").mkdir(parents=True)
    files.temporary_path(tmp_path / "d", dead).symlink_to(tmp_path / "deep")

    def remaining() -> set[Path]:
        return set(tmp_path.rglob("*.tmp"))

    files.remove_abandoned(tmp_path, "a")
    assert abandoned not in remaining() and len(remaining()) == 6
    files.remove_abandoned(tmp_path)
    assert remaining() == {active, foreign, nested}
    files.remove_abandoned(tmp_path, below=True)
    assert remaining() == {active, foreign}
    files.remove_abandoned(tmp_path / "none", below=True)


@pytest.mark.parametrize("elsewhere", ["machine", "container", "no /proc"])
def test_files_that_another_machine_writes_to_a_shared_disk_are_kept(tmp_path, monkeypatch, elsewhere):
    """Their PIDs are not in our /proc; only a file without a write for a day counts as abandoned."""
    local = files.temporary_path(tmp_path / "a")
    files.process_namespace.cache_clear()
    with monkeypatch.context() as patch:
        if elsewhere == "machine":
            patch.setattr(files.Path, "read_text", lambda *_, **__: "another\n")
        else:
            patch.setattr(
                files.os, "readlink", lambda _: "pid:[5]" if elsewhere == "container" else os.stat("/absent")
            )
        remote = files.temporary_path(tmp_path / "a")
        abandoned = files.temporary_path(tmp_path / "b", 2**22 + 1)
    files.process_namespace.cache_clear()
    assert local == files.temporary_path(tmp_path / "a") != remote
    for path in (remote, abandoned):
        path.touch()
    files.remove_abandoned(tmp_path)
    assert remote.exists() and abandoned.exists()
    os.utime(abandoned, (0, time.time() - files.ABANDONED_AFTER - 5))
    os.utime(remote, (0, time.time() - files.ABANDONED_AFTER + 60))
    files.remove_abandoned(tmp_path)
    assert remote.exists() and not abandoned.exists()


def replace_folder(target: Path, text: str) -> None:
    with files.temporary_folder(target.with_name(".a.new"), target, contents=["text"]) as folder:
        (folder / "text").write_text(text)
        files.swap_in(folder, target, contents=["text"])


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_replaced_by_a_process_that_is_killed_is_the_old_or_the_new(tmp_path, monkeypatch, exchange):
    """Killed before each rename; where the disk cannot exchange folders, the next process restores the old one."""
    target, missing = tmp_path / "a", 0
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for step in itertools.count():
        replace_folder(target, "old")
        child = os.fork()
        if not child:
            turns = iter(range(step, -1, -1))

            def counted(real, turns=turns):
                return lambda *arguments, **keywords: (
                    real(*arguments, **keywords) if next(turns) else os._exit(9)
                )

            for module, name in (
                (os, "rename"),
                (files, "_exchange"),
                (files, "fsync_folder"),
                (files, "remove"),
            ):
                setattr(module, name, counted(getattr(module, name)))
            try:
                replace_folder(target, "new")
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        missing += not target.exists()
        with files.temporary_folder(tmp_path / ".a.new", target, contents=["text"]) as folder:
            assert (target / "text").read_text() in ("old", "new") and not list(folder.iterdir())
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        if not killed:
            break
    assert (target / "text").read_text() == "new" and missing == (not exchange)


@pytest.mark.parametrize("kept", ["best__x.pth", "folder", ".notes", "sub/weights"])
def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path, kept):
    """Refused before the work, and again after it for what was put there meanwhile."""
    target = tmp_path / "a"
    replace_folder(target, "old")
    (target / kept).parent.mkdir(exist_ok=True)
    (target / kept).touch()
    with pytest.raises(InputError, match=rf"{target} holds '{kept.split('/')[0]}', .*; move it away"):
        replace_folder(target, "new")
    saved = (target / kept).rename(tmp_path / "saved")
    for folder in (path for path in target.iterdir() if path.is_dir()):
        folder.rmdir()
    (target / files.temporary_path(Path("text")).name).touch()  # of an interrupted write
    with (
        pytest.raises(InputError, match="holds"),
        files.temporary_folder(tmp_path / ".a.new", target, contents=["text"]) as new,
    ):
        saved.rename(target / "foreign")
        files.swap_in(new, target, contents=["text"])
    assert (target / "text").read_text() == "old" and (target / "foreign").exists()
    (target / "foreign").unlink()
    replace_folder(target, "new")
    assert [path.name for path in target.iterdir()] == ["text"]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a folder"):
        replace_folder(tmp_path / "file", "new")


def test_a_living_writer_keeps_its_file_without_proc(tmp_path, monkeypatch):
    ours = files.temporary_path(tmp_path / "a")
    files.process_namespace.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "exists", lambda path: not str(path).startswith("/proc"))
        patch.setattr(files.Path, "read_text", lambda *_, **__: os.stat("/absent"))
        without = files.temporary_path(tmp_path / "a")
        child = os.fork()
        if not child:
            time.sleep(60)
        of_child = files.temporary_path(tmp_path / "b", child)
        hidden = files.temporary_path(tmp_path / "c", 1)  # of another user
        for path in (ours, without, of_child, hidden):
            path.touch()
        files.remove_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == {ours, without, of_child, hidden}
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        files.remove_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == {ours, without, hidden}
        files.process_namespace.cache_clear()  # as another process
        files.remove_abandoned(tmp_path)
        assert set(tmp_path.iterdir()) == {ours, without, hidden}
    files.process_namespace.cache_clear()


def test_an_interrupted_swap_restores_the_old_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    target, rename, turns = tmp_path / "a", os.rename, itertools.count(1)

    def interrupted(*paths):
        if next(turns) == 2:
            raise KeyboardInterrupt
        rename(*paths)

    replace_folder(target, "old")
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(target, "new")
    assert (target / "text").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_lock_names_its_holder_and_is_free_when_that_is_killed(tmp_path):
    path, message = tmp_path / "deep" / ".lock", "process {pid} is writing to {this}"
    ready, write_end = os.pipe()
    holder = os.fork()
    if not holder:
        with files.locked(path, message):
            os.write(write_end, b".")
            time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    for _ in range(2):
        with pytest.raises(EnvironmentFault, match=rf"^process {holder} is writing to {{this}}$"):
            files.locked(path, message).__enter__()
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    with files.locked(path, message), pytest.raises(EnvironmentFault, match=f"process {os.getpid()} "):
        files.locked(path, message).__enter__()
    with files.locked(path, message):
        assert path.read_text() == str(os.getpid())
    assert not path.exists()


def test_a_lock_leaves_neither_its_file_nor_the_folders_that_it_made(tmp_path):
    path = tmp_path / "a" / "b" / ".lock"
    with pytest.raises(ZeroDivisionError), files.locked(path, ""):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    with files.locked(path, ""):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "a"] and not list((tmp_path / "a").iterdir())
    with files.locked(path, ""):
        (path.parent / "work").touch()
    assert list(path.parent.iterdir()) == [path.parent / "work"]


def test_one_of_many_processes_holds_a_lock_that_each_removes(tmp_path):
    path, holders = tmp_path / "deep" / ".lock", []
    for _ in range(6):
        child = os.fork()
        if not child:
            for _ in range(60):
                try:
                    with files.locked(path, "busy"):
                        os.close(os.open(tmp_path / "held", os.O_CREAT | os.O_EXCL))
                        os.unlink(tmp_path / "held")
                except EnvironmentFault:
                    pass
                except BaseException:
                    os._exit(1)
            os._exit(0)
        holders.append(child)
    assert [os.waitpid(child, 0)[1] for child in holders] == [0] * 6
    assert not path.exists()


def test_a_lock_in_a_file_of_another_kind_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), files.locked(tmp_path / "file" / ".lock", ""):
        pass


def test_json_holds_no_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, float("inf")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [1.5, None]}


def test_digest_separates_its_parts():
    assert files.digest("ab", "c") != files.digest("a", "bc") and len(files.digest("x")) == 16


@pytest.mark.parametrize("present", [False, True], ids=["absent", "empty"])
def test_a_folder_is_filled_in_full_or_not_at_all(tmp_path: Path, present: bool) -> None:
    target = tmp_path / "drawn"
    if present:
        target.mkdir()
    with pytest.raises(ZeroDivisionError), files.filling(target) as folder:
        (folder / "a").write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"] * present
    abandoned = files.temporary_path(target, pid=2**22 + 1)  # of a killed process: above the largest pid
    abandoned.mkdir()
    (abandoned / "b").write_text("half")
    with files.filling(target) as folder:
        (folder / "a").write_text("whole")
        assert not abandoned.exists() and not any(target.glob("*"))
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"]
    with (
        pytest.raises(InputError, match=r"drawn is not empty; remove it, or give another folder"),
        files.filling(target),
    ):
        pass
    assert (target / "a").read_text() == "whole"
