"""Leftovers of killed commands are removed by the next command of the same kind; files being written stay."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fastflower.core import errors, files
from fastflower.core.files import check_writable, process_namespace, scratch_folder, temporary_path


@pytest.fixture(scope="module")
def gone() -> int:
    """The id of a process that has ended."""
    with subprocess.Popen(["true"]) as child:
        child.wait()
    return child.pid


@pytest.fixture
def system_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A temporary folder of the system for this test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "system"))
    (tmp_path / "system").mkdir()
    return tmp_path / "system"


def test_scratch_folders_of_killed_processes_are_removed_by_the_next_one(
    system_folder: Path, gone: int
) -> None:
    def left(process: int, namespace: str = process_namespace()) -> Path:
        folder = system_folder / f".fastflower-soup-x.{process}-{namespace}.tmp"
        (folder / "members").mkdir(parents=True)
        (folder / "members/large.pth").write_bytes(bytes(9))
        return folder

    abandoned, of_living, of_container = left(gone), left(os.getppid()), left(gone, "0123abcd")
    with scratch_folder("soup") as own, scratch_folder("hand-in") as other:
        assert not abandoned.exists() and own.is_dir() and other.is_dir()
        assert own.stat().st_mode & 0o777 == 0o700
    assert sorted(system_folder.iterdir()) == sorted([of_living, of_container])
    with scratch_folder("soup"):
        late = left(gone)  # by a process that the killed one had started
    assert not late.exists()


def test_a_scratch_folder_of_a_killed_process_is_recognised(system_folder: Path) -> None:
    program = "import os; from fastflower.core.files import scratch_folder as s\nwith s('a'): os.kill(os.getpid(), 9)"
    environment = {
        **os.environ,
        "TMPDIR": str(system_folder),
        "PYTHONPATH": str(Path(files.__file__).parents[2]),
    }
    subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert len(list(system_folder.iterdir())) == 1
    with scratch_folder("b"):
        pass
    assert list(system_folder.iterdir()) == []


def test_the_predictor_removes_the_tables_of_its_killed_runs(code: type, gone: int) -> None:
    names = {
        f"a.csv.{gone}.tmp": True,  # left by a kill
        f"a.csv.{os.getppid()}.tmp": False,  # of a living process
        f"b.csv.{gone}.tmp": False,  # of another table
        "a.csv.notes.tmp": False,  # of a user
        f"a.csv.{gone}.tmp.bak": False,
    }
    for name in names:
        Path(name).write_text("half a row")
        os.utime(name, (0, 0))
    young = Path(f"a.csv.{gone}1.tmp")  # may be written in another container
    young.write_text("")
    code.table.replace_atomic("a.csv", b"whole")
    assert {name: not Path(name).exists() for name in names} == names and young.exists()
    assert Path("a.csv").read_bytes() == b"whole"


def test_writers_remove_what_killed_writers_of_the_same_file_left(gone: int) -> None:
    left = temporary_path(Path("scores.json"), gone)
    left.write_text("{")
    files.write_atomic(Path("scores.json"), "{}")
    assert [path.name for path in Path().iterdir()] == ["scores.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_of_another_user_is_refused_before_the_work() -> None:
    Path("mine").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="mine"):
        check_writable(Path("mine"))


def test_another_users_folder_is_refused_for_a_user_who_is_not_root() -> None:
    """Run as root, by a child process that gives its rights away."""
    if os.geteuid():
        pytest.skip("only root can become another user")
    Path("mine").mkdir(mode=0o755)
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            check_writable(Path("mine"))
        except PermissionError as error:
            os._exit(0 if "mine: Permission denied; give yourself" in str(errors.of_machine(error)) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
