"""A working process that crashes, hangs or is stopped: the table stays complete, and the run goes on."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from support.predictor_runs import CODE, IDS, fill_rows, jpeg, make_hand_in, read_rows, write_photographs


@pytest.fixture
def guarded(code, monkeypatch):
    """Run `work(table, deaths, unexplained)` in place of the networks; returns exit code, table and messages."""
    monkeypatch.setattr(code.guard, "sys", types.SimpleNamespace(modules={}, platform="linux"))

    def call(work: object, rows: int = 6) -> tuple[int, object, list[str]]:
        messages: list[str] = []
        names = [b"%d.jpg" % number for number in range(rows)]
        table = code.table.Table(names, IDS, prior=[0.2, 0.5, 0.3])
        table.open("guarded.csv")
        return code.guard.run(lambda *numbers: work(table, *numbers), table, messages.append), table, messages

    return call


def test_an_error_nobody_foresaw_is_tried_again_with_less(guarded):
    """For example no more threads: no picture is blamed, not even one that was being read."""

    def work(table, deaths, unexplained):
        table.reading_since[3] = time.monotonic()
        fill_rows(table, [deaths])
        if deaths < 2:
            raise RuntimeError("can't start new thread")
        return fill_rows(table, table.waiting()) if unexplained == 2 else 9

    exit_code, table, messages = guarded(work)
    assert (
        exit_code == 0
        and table.known.all()
        and all("died (an error)" in line for line in messages)
        and len(messages) == 2
    )


def test_what_dies_over_and_over_is_given_up(guarded):
    def work(table, deaths, unexplained):
        if (deaths, unexplained) != (2, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(70)

    exit_code, table, messages = guarded(work)
    assert exit_code == 4 and table.done() == 0
    assert [line.split("(")[-1].split(")")[0] for line in messages[:3]] == ["SIGKILL", "SIGKILL", "an error"]
    assert messages[3].startswith("giving up after 3 deaths; the other rows of")


def test_the_last_row_may_be_the_one_that_kills(guarded):
    def work(table, *_):
        for row in table.waiting():
            table.reading_since[row] = time.monotonic()
            if row == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            table.reading_since[row] = fill_rows(table, [row])

    exit_code, table, messages = guarded(work)
    assert (
        exit_code == 0
        and table.unreadable == {5: "reading it killed the process (SIGKILL)"}
        and len(messages) == 1
    )


@pytest.mark.parametrize("kind", ["refused", "apple", "windows"])
def test_where_nothing_can_be_forked_the_work_is_done_all_the_same(guarded, code, monkeypatch, kind):
    def fork():
        assert kind == "refused"
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    if kind == "windows":
        monkeypatch.delattr(os, "fork")
    if kind == "apple":
        code.guard.sys.platform = "darwin"
    exit_code, table, messages = guarded(lambda table, *_: fill_rows(table, table.waiting()))
    assert exit_code == 0 and table.known.all() and not messages
    exit_code, _, messages = guarded(lambda *_, **__: {}["absent"])
    assert exit_code == 4 and messages == ["KeyError: 'absent'"]


def test_after_a_death_that_no_picture_explains_the_cpu_does_it(run, code, monkeypatch):
    """A driver that crashed or hung would do so again."""
    write_photographs(1)
    settings = []
    monkeypatch.setattr(
        code.predict, "predict", lambda options, *_, **__: settings.append((options.device, options.threads))
    )
    for deaths, unexplained in ((0, 0), (1, 0), (2, 1)):
        monkeypatch.setattr(code.guard, "run", lambda work, *_, counts=(deaths, unexplained): work(*counts))
        run("--device", "cuda", "--threads", "8")
    assert settings == [("cuda", 8), ("cuda", 4), ("cpu", 2)]


def test_a_machine_that_was_paused_has_no_slow_pictures(code, monkeypatch):
    """While a container is frozen for an hour the clock runs on; a picture being read then is not slow."""
    table = code.table.Table([b"a.jpg"], IDS, prior=[0.2, 0.5, 0.3])
    begin, end = os.pipe()
    child = os.posix_spawn(
        "/bin/cat", ["cat"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, begin, 0), (os.POSIX_SPAWN_CLOSE, end)]
    )
    clock, naps = [time.monotonic()], iter([0.1, 3600.0, 30.0])

    def sleep(_):
        clock[0] += next(naps, 0.0)
        if clock[0] - table.reading_since[0] > 3620:
            os.close(end)  # cat ends
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

    table.reading_since[0] = clock[0]
    monkeypatch.setattr(code.guard, "time", types.SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    assert code.guard._watch(child, table) == (0, False)
    os.close(begin)


def test_a_picture_that_ends_while_it_is_watched_is_not_slow(code):
    """Rows end between the check that they are being read and the use of their start times."""

    class Ending(np.ndarray):
        def __gt__(self, limit):
            answer = np.asarray(self) > limit
            self[...] = 0
            return answer

    table = code.table.Table([b"a.jpg", b"b.jpg"], IDS, prior=[0.2, 0.5, 0.3])
    table.reading_since[:] = time.monotonic()
    table.reading_since = table.reading_since.view(Ending)
    child = os.posix_spawn("/bin/true", ["true"], {})
    assert code.guard._watch(child, table) == (0, False)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_a_whole_table(tmp_path, exported, number):
    root = make_hand_in(tmp_path / "root", exported.folder, 60)
    command = [sys.executable, str(root / "code/predict.py"), "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    path = root / "results/results/submission.csv"
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random(number).random())
    process.send_signal(number)
    sent = time.monotonic()
    process.wait(timeout=60)
    assert time.monotonic() - sent < 2
    process.communicate(timeout=60)
    rows = read_rows(path)
    assert len(rows) == 61 and all(row[1] in IDS and 0 < float(row[2]) <= 1 for row in rows[1:])
    assert process.returncode == (-9 if number == signal.SIGKILL else 143) or process.returncode == 0
    if number == signal.SIGTERM:
        assert not [name for name in os.listdir(path.parent) if name.endswith(".tmp")]


STOPPED = """
import os, signal, sys, time
sys.path.insert(0, {code!r})
import predict
def half(options, bundle, *, hashes, source, table):
    for row in range(int(options.batch)):
        table.fill([row], predict.np.eye(3)[:1])
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(600)
predict.predict = half
sys.exit(predict.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("rows", [1, 5, 50, 95])
def test_a_time_limit_keeps_what_is_known(exported, rows):
    """SIGTERM after some of a hundred rows, before any was written; no process stays, however early it comes."""
    os.mkdir("test_dataset")
    for number in range(100):
        Path(f"test_dataset/{number:02d}.jpg").write_bytes(b"")
    code = STOPPED.replace("{code!r}", repr(str(CODE)))
    arguments = ["test_dataset", "out.csv", "--bundle", str(exported.folder), "--batch", str(rows)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 143, done.stderr
    assert [row[1] for row in read_rows(Path("out.csv"))[1:]] == ["7"] * rows + ["012"] * (100 - rows)
    assert json.loads(Path("out.json").read_text())["predicted"] == rows
    assert sorted(os.listdir()) == ["out.csv", "out.json", "test_dataset"]


BENT = """
import os, sys, time
sys.path.insert(0, {code!r})
import guard, pictures, predict
guard.READ_TIMEOUT = 2.0
honest = pictures.read
def read(path):
    if b"crash" in path: os.abort()
    if b"slow" in path: time.sleep(600)
    return honest(path)
pictures.read = read
sys.exit(predict.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_decoder_that_crashes_or_never_ends_costs_one_row(exported):
    """The decoder aborts on one file while another thread reads the next one, and hangs on the last.

    The logits of the process that died are lost, and a message says so.
    """
    Path("test_dataset").mkdir()
    write_photographs(5)
    for name in ("001crash.jpg", "zslow.jpg"):
        Path("test_dataset", name).write_bytes(jpeg(1))
    arguments = [
        "test_dataset",
        "out.csv",
        "--bundle",
        str(exported.folder),
        "--threads",
        "2",
        "--logits",
        "l.npz",
    ]
    code = BENT.replace("{code!r}", repr(str(CODE)))
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    about = json.loads(Path("out.json").read_text())
    assert about["rows"] == 7 and about["predicted"] == 5 and len(about["unreadable"]) == 2
    assert about["unreadable"]["zslow.jpg"] == "not read within 2 s"
    assert "killed the process (SIGABRT)" in about["unreadable"]["001crash.jpg"]
    assert [row[1] for row in read_rows(Path("out.csv"))[1:] if "crash" in row[0]] == ["012"]
    assert "l.npz lacks 5 rows that were predicted by a process that died" in done.stderr


def test_threads_keep_to_the_cores_and_the_share_of_them(code, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(48)))
    Path("cpu.max").write_text("250000 100000\n")
    assert code.guard.usable_cores(".") == 2
    Path("cpu.max").write_text("max 100000\n")
    assert code.guard.usable_cores(".") == 48 == code.guard.usable_cores("absent")
    Path("cpu").mkdir()
    for quota, cores in (("400000", 4), ("-1", 48), ("1000", 1)):
        Path("cpu/cpu.cfs_quota_us").write_text(f"{quota}\n")
        Path("cpu/cpu.cfs_period_us").write_text("100000\n")
        assert code.guard.usable_cores(".") == cores
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert code.guard.usable_cores("absent") == 1
