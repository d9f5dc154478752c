"""Names, atomic replacement and the event log."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path

import pytest

from fastflower.core import files, runs


def test_member_names_round_trip():
    run = runs.Run("flower", "convnextv2_base.fcmae_ft_in22k_in1k", 3, 42)
    path = run.file("best_combo", 17, 0.91236)
    assert path.as_posix() == (
        "results/model/flower/best_combo__convnextv2_base.fcmae_ft_in22k_in1k__fold3_seed42_epoch17_score0.9124.pth"
    )
    name = runs.parse_member(path)
    assert (name.kind, name.backbone, name.fold, name.seed, name.epoch, name.score) == (
        "best_combo", "convnextv2_base.fcmae_ft_in22k_in1k", 3, 42, 17, 0.9124
    )  # fmt: skip
    assert runs.parse_member(path.with_name("best_combo.pth")) is None
    assert runs.parse_member(path.with_name("other" + path.name)) is None


def test_find_members_takes_the_newest_epoch_once(tmp_path):
    names = [
        ("best_combo", 0, 3, 0.5), ("best_combo", 0, 12, 0.6), ("last", 0, 14, 0.7), ("best_combo", 1, 9, 0.4)
    ]  # fmt: skip
    for kind, fold, epoch, score in names:
        path = runs.Run("e", "net", fold, 1).file(kind, epoch, score)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = runs.find_members("e", "results/model/best_combo__*fold*_seed*_epoch*_score*.pth")
    assert [(runs.parse_member(p).fold, runs.parse_member(p).epoch) for p in found] == [(0, 12), (1, 9)]
    assert [p.name for p in runs.Run("e", "net", 0, 1).files("best_combo")] == [
        "best_combo__net__fold0_seed1_epoch3_score0.5000.pth", "best_combo__net__fold0_seed1_epoch12_score0.6000.pth"
    ]  # fmt: skip


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")

    def broken(aside, target):
        raise OSError("disk full")

    monkeypatch.setattr(files, "replace_atomic", broken)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_killed_processes_left_is_swept(tmp_path):
    dead, alive = 2**22 + 1, os.getpid()  # no process has the first: too large
    gone, beside, mine, deep = (
        files.aside_of(tmp_path / name, pid)
        for name, pid in (("a", dead), ("b", dead), ("a", alive), ("deep/er/a", dead))
    )
    foreign = tmp_path / "a.5.tmp"
    for path in (gone, beside, mine, deep, foreign):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (files.aside_of(tmp_path / "c", dead) / "full").mkdir(parents=True)
    files.aside_of(tmp_path / "d", dead).symlink_to(tmp_path / "deep")

    def left() -> set[Path]:
        return set(tmp_path.rglob("*.tmp"))

    files.sweep(tmp_path, "a")
    assert gone not in left() and len(left()) == 6
    files.sweep(tmp_path)
    assert left() == {mine, foreign, deep}
    files.sweep(tmp_path, below=True)
    assert left() == {mine, foreign}
    files.sweep(tmp_path / "none", below=True)


@pytest.mark.parametrize("elsewhere", ["machine", "container", "no /proc"])
def test_what_another_machine_is_writing_on_a_shared_disk_is_not_swept(tmp_path, monkeypatch, elsewhere):
    """Its processes are not in our /proc; a file that nothing has changed for a day is nobody's."""
    own = files.aside_of(tmp_path / "a")
    files.neighbourhood.cache_clear()
    with monkeypatch.context() as patch:
        if elsewhere == "machine":
            patch.setattr(runs.Path, "read_text", lambda *_, **__: "another\n")
        else:
            patch.setattr(
                runs.os, "readlink", lambda _: "pid:[5]" if elsewhere == "container" else os.stat("/absent")
            )
        theirs = files.aside_of(tmp_path / "a")
        dead = files.aside_of(tmp_path / "b", 2**22 + 1)
    files.neighbourhood.cache_clear()
    assert own == files.aside_of(tmp_path / "a") != theirs
    for path in (theirs, dead):
        path.touch()
    files.sweep(tmp_path)
    assert theirs.exists() and dead.exists()
    os.utime(dead, (0, time.time() - files.ABANDONED_AFTER - 5))
    os.utime(theirs, (0, time.time() - files.ABANDONED_AFTER + 60))
    files.sweep(tmp_path)
    assert theirs.exists() and not dead.exists()


def replace_folder(place: Path, text: str) -> None:
    with files.growing(place.with_name(".a.new"), place) as folder:
        (folder / "text").write_text(text)
        files.put_in_place(folder, place)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_replaced_by_a_process_that_is_killed_is_the_old_or_the_new(tmp_path, monkeypatch, exchange):
    """Killed before each change of a name; where the disk cannot exchange, the next process puts the old one back."""
    place, missing = tmp_path / "a", 0
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for step in itertools.count():
        replace_folder(place, "old")
        child = os.fork()
        if not child:
            turns = iter(range(step, -1, -1))

            def counted(real, turns=turns):
                return lambda *words, **named: real(*words, **named) if next(turns) else os._exit(9)

            for module, name in (
                (os, "rename"),
                (files, "_exchange"),
                (files, "fsync_folder"),
                (files, "remove"),
            ):
                setattr(module, name, counted(getattr(module, name)))
            try:
                replace_folder(place, "new")
            finally:
                os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        missing += not place.exists()
        with files.growing(tmp_path / ".a.new", place) as folder:
            assert (place / "text").read_text() in ("old", "new") and not list(folder.iterdir())
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        if not killed:
            break
    assert (place / "text").read_text() == "new" and missing == (not exchange)


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    place, rename, turns = tmp_path / "a", os.rename, itertools.count(1)

    def interrupted(*words):
        if next(turns) == 2:
            raise KeyboardInterrupt
        rename(*words)

    replace_folder(place, "old")
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(place, "new")
    assert (place / "text").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_events_last_row_wins_and_cut_lines_are_dropped(tmp_path):
    path = tmp_path / "deep" / "events.jsonl"
    for epoch, loss in ((1, 2.0), (2, 1.5), (2, 1.25)):
        runs.append_event(path, {"event": "epoch", "fold": 0, "seed": 1, "epoch": epoch, "loss": loss})
    with open(path, "a") as file:
        file.write('{"event": "epoch", "fo')
    assert [(row["epoch"], row["loss"]) for row in runs.read_events(path)] == [(1, 2.0), (2, 1.25)]
    assert runs.read_events(tmp_path / "none") == []


def test_json_holds_no_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, float("inf")]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [1.5, None]}


def test_digest_separates_its_parts():
    assert files.digest("ab", "c") != files.digest("a", "bc") and len(files.digest("x")) == 16
