"""The table is complete or the old one, wherever it is written and whatever the disk does."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support.predictor_runs import CODE, fill_rows, make_hand_in, read_rows, write_classes, write_photographs


@pytest.mark.parametrize("path", ["file/table.csv", "/dev/full", "/proc/table.csv", "folder.csv/table.csv/"])
def test_another_place_is_found_for_the_table(run_without_networks, capsys, path):
    write_photographs(1)
    Path("file").write_text("")
    Path("folder.csv").mkdir()
    Path("folder.csv/table.csv").write_text("")
    run_without_networks(path)
    written = Path(Path(path).name if not path.endswith("/") else "submission.csv")
    assert len(read_rows(written)) == 2
    assert f"cannot be written; the table goes to {written.absolute()}" in capsys.readouterr().err


def test_places_that_there_are_not_are_no_hindrance(code, monkeypatch):
    """In a container that is read-only but for the table's folder, started from a folder that was deleted."""

    def gone():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    folder = Path.cwd()
    write_classes(folder)
    (folder / "data").rename(folder / "nowhere")
    Path("test_dataset").mkdir()
    write_photographs(1)
    monkeypatch.setattr(os, "getcwd", gone)
    monkeypatch.setattr(code.table.tempfile, "gettempdir", gone)
    paths = [str(folder / name) for name in ("test_dataset", "out.csv", "nowhere")]
    with pytest.raises(code.bundles.Problem, match=r"every row of .*out.csv holds the most frequent class"):
        code.predict.main([*paths[:2], "--bundle", paths[2]])
    assert len(read_rows(folder / "out.csv")) == 2
    with pytest.raises(FileNotFoundError, match="No usable temporary"):
        code.predict.main([paths[0], "/proc/out.csv", "--bundle", paths[2]])


@pytest.mark.parametrize(
    ("requested", "written"), [("folder", "folder/submission.csv"), ("new/", "new/submission.csv")]
)
def test_a_table_may_be_asked_for_by_its_folder(run_without_networks, requested, written):
    write_photographs(1)
    Path("folder").mkdir()
    run_without_networks(requested)
    assert len(read_rows(Path(written))) == 2


def test_words_about_a_table_never_take_its_place(run_without_networks):
    write_photographs(1)
    run_without_networks("out.JSON")
    assert (
        len(read_rows(Path("out.JSON"))) == 2 and json.loads(Path("out.JSON.json").read_text())["rows"] == 1
    )


def test_a_place_that_is_lost_on_the_way_costs_nothing(run, code, monkeypatch, capsys):
    """The first table is written, later ones cannot be: the final table is in another folder."""
    write_photographs(3)

    def work(_, table, log):
        os.rename("out", "gone")
        Path("out").write_text("")
        table.update()
        return fill_rows(table, table.waiting())

    monkeypatch.setattr(code.guard, "run", work)
    exit_code, _ = run()
    assert exit_code == 4 and [row[1] for row in read_rows(Path("submission.csv"))[1:]] == ["7", "7", "7"]
    assert [row[1] for row in read_rows(Path("gone/submission.csv"))[1:]] == ["012", "012", "012"]
    assert f"the table goes to {Path('submission.csv').absolute()}" in capsys.readouterr().err


def test_a_limit_on_the_size_of_files_keeps_the_old_table(tmp_path):
    write_classes(tmp_path)
    os.mkdir("test_dataset")
    for number in range(300):
        Path(f"test_dataset/{number}.jpg").write_bytes(b"")
    Path("out.csv").write_text("old")
    command = (
        f"ulimit -f 1; exec {sys.executable} {CODE / 'predict.py'} test_dataset out.csv --bundle nowhere"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 4 and "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert Path("out.csv").read_text() == "old"
    assert sorted(os.listdir()) == ["data", "out.csv", "test_dataset"]


def test_what_is_no_regular_file_is_never_replaced(code):
    os.mkfifo("pipe")
    with pytest.raises(FileExistsError, match="not a regular file"):
        importlib.import_module("table").replace_atomic("pipe", b"")


KILLED = """
import itertools, json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from table import Table
table = Table([b"a.jpg", b"b.jpg"], ["7", "x"], prior=[0.4, 0.6])
table.open("out.csv")
old = table.text()
table.fill([1], np.eye(2)[:1])
for points in itertools.count(1):
    with open("out.csv", "wb") as file:
        file.write(old)
    child = os.fork()
    if child == 0:
        left = iter(range(points))
        sys.setprofile(lambda *_: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL))
        table.write()
        sys.setprofile(None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    table.remove_temporary(child)
    assert open("out.csv", "rb").read() in (old, table.text()), points
    assert json.load(open("out.json"))["rows"] == 2
    assert sorted(os.listdir()) == ["out.csv", "out.json"]
    if status == 0:
        break
assert open("out.csv", "rb").read() == table.text() != old
print(points)
"""


@pytest.mark.slow
def test_a_kill_at_any_point_of_writing_leaves_the_old_table_or_the_new():
    """Killed before and after each Python or C call that writing makes, one process for each."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(CODE)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_a_full_disk_keeps_the_old_table(code, monkeypatch):
    Path("a.csv").write_text("old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        code.table.replace_atomic("a.csv", b"new")
    assert Path("a.csv").read_text() == "old" and os.listdir() == ["a.csv"]


def test_a_link_to_the_table_stays_a_link(run):
    write_photographs(1)
    Path("real").mkdir()
    Path("link.csv").symlink_to("real/table.csv")
    assert run(csv_path="link.csv")[0] == 0
    assert Path("link.csv").is_symlink() and len(read_rows(Path("real/table.csv"))) == 2


def test_the_evaluator_may_read_the_table_whatever_the_umask(run):
    write_photographs(1)
    before = os.umask(0o077)
    try:
        run()
    finally:
        os.umask(before)
    assert Path("out/submission.csv").stat().st_mode & 0o777 == 0o644


def test_the_bytes_of_a_table(code):
    table = code.table.Table([b"a,b.jpg", b"\xe9.jpg"], ["7", "012"], prior=[0.25, 0.75])
    table.fill([0], np.array([[2.0, 0.0]]))
    assert table.text() == (b'filename,category_id,confidence\n"a,b.jpg",7,0.880797\n\xe9.jpg,012,0.750000\n')


@pytest.mark.slow
def test_two_runs_at_once_and_nobody_listening_leave_whole_tables(tmp_path, exported):
    root = make_hand_in(tmp_path / "root", exported.folder, 4)
    command = f"{sys.executable} {root / 'code/predict.py'} --threads 1 >&- 2>&-"
    runs = [subprocess.Popen(["sh", "-c", command]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in runs] == [0, 0]
    path = root / "results/results/submission.csv"
    assert len(read_rows(path)) == 5 and len(os.listdir(path.parent)) == 2


def test_control_characters_reach_neither_the_table_nor_the_console(code, capsys):
    ids = ["\x1b[31mred", "a\u202eb\x9b", "plain"]
    table = code.table.Table([b"a.jpg", b"b.jpg", b"c.jpg"], ids, prior=[1, 0, 0])
    table.fill([0, 1, 2], np.eye(3) * 20)
    rows = table.text().decode().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == [r"\x1b[31mred", r"a\u202eb\x9b", "plain"]
    code.messages.log("a \x1b[31m\r\n\x07 b")
    assert capsys.readouterr().out == "predict: a \\x1b[31m\\r\\n\\x07 b\n"
