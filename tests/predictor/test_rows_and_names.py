"""One row for every photograph, under its name on the disk or in the organiser's sample."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastflower.data.readers import image_folders
from support.predictor_runs import CODE, jpeg, read_rows, write_classes, write_photographs
from support.sample_images import ODD_NAMES


def test_a_row_for_every_name(run, capsys):
    names = [*ODD_NAMES, 'quote".JPG', "花.jpeg", "=1.png", "trail .jpg", "\ufeffmark.jpg"]
    names += ["a.JPG", "a.jpg", "a.jpeg", "sub/deep/a.jpg"]
    for name in names:
        path = os.path.join(b"test_dataset", os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(jpeg(1))
    os.makedirs("test_dataset/folder.jpg")
    os.makedirs("test_dataset/__MACOSX")
    os.mkfifo("test_dataset/pipe.jpg")
    junk = [
        "Thumbs.db",
        "__MACOSX/a.jpg",
        "._a.jpg",
        ".hidden.jpg",
        "notes.txt",
        "sub/.DS_Store",
        "$RECYCLE.BIN/$R1.jpg",
    ]
    junk += [
        f"sub/{folder}/a.jpg"
        for folder in (".ipynb_checkpoints", "@eaDir", ".Trash-1000/files", "Lost+Found")
    ]
    for name in junk:
        Path("test_dataset", name).parent.mkdir(parents=True, exist_ok=True)
        Path("test_dataset", name).write_bytes(jpeg(1))
    Path("test_dataset/linked.jpg").symlink_to("a.jpg")
    Path("test_dataset/dangling.jpg").symlink_to("nothing")
    Path("test_dataset/circle").symlink_to(".")
    exit_code, rows = run()
    assert exit_code == 0
    line = "14 other entries below test_dataset get no row, 10 of them hidden or of the system, the first is '$REC"
    assert line in capsys.readouterr().out
    assert [row[0] for row in rows[1:]] == sorted([*names, "linked.jpg"], key=os.fsencode)
    data = Path("out/submission.csv").read_bytes()
    assert b"\r" not in data and data.endswith(b"\n") and not data.startswith(b"\xef\xbb\xbf")
    assert json.loads(Path("out/submission.json").read_text())["unreadable"] == {}


LOCALES = [
    {"LC_ALL": "C.UTF-8"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"LC_ALL": "POSIX", "PYTHONIOENCODING": "gbk"},
    {"LANG": "zh_CN.GBK", "PYTHONIOENCODING": "utf-16"},
]


@pytest.mark.slow
def test_names_are_those_of_the_disk_under_any_locale(tmp_path):
    write_classes(tmp_path)
    names = [
        "花.jpg".encode(),
        "花.jpg".encode("gbk"),
        "\ufeff花.jpg".encode(),
        b"\xff\xfe.jpg",
        b"cr\rlf\n.jpg",
    ]
    names += [b'"=1+1".jpg', b",.JPG", b" .jpg", b"z" * 251 + b".jpg"]
    os.mkdir("test_dataset")
    for name in names:
        Path(os.fsdecode(os.path.join(b"test_dataset", name))).write_bytes(b"")
    command = [sys.executable, str(CODE / "predict.py"), "test_dataset", "out.csv", "--bundle", "nowhere"]
    for number, locale in enumerate(LOCALES):
        environment = {"PATH": os.environ["PATH"], **locale}
        assert subprocess.run(command, env=environment, capture_output=True).returncode == 4
        written = [os.fsencode(row[0]) for row in read_rows(Path("out.csv"))]
        assert written == [b"filename", *sorted(names)], locale
        os.rename("out.csv", f"{number}.csv")
    assert len({Path(f"{number}.csv").read_bytes() for number in range(len(LOCALES))}) == 1


def test_photographs_are_found_once_each_in_the_order_of_their_bytes(code):
    rng = random.Random(0)
    for number in range(120):
        folder = Path("photos", *rng.choices("ab", k=rng.randrange(4)))
        folder.mkdir(parents=True, exist_ok=True)
        name = (
            rng.choice("éaZ_ ")
            + str(number)
            + rng.choice([".jpg", ".JPEG", ".Png", ".gif", ".txt", "", ".jpg.zip"])
        )
        (folder / name).write_bytes(b"")
    files = [
        os.fsencode(path.relative_to("photos").as_posix())
        for path in Path("photos").rglob("*")
        if path.is_file()
    ]
    endings = (b".jpg", b".jpeg", b".png", b".gif")
    photographs, ignored = code.pictures.find(b"photos")
    assert (
        photographs == sorted(name for name in files if name.lower().endswith(endings))
        and len(photographs) > 40
    )
    assert sorted([*photographs, *ignored]) == sorted(files)


def test_a_folder_that_cannot_be_read_is_told(code, monkeypatch):
    honest = os.scandir

    def scandir(path):
        if path.endswith(b"locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return honest(path)

    Path("photos/locked").mkdir(parents=True)
    Path("photos/a.jpg").write_bytes(b"")
    monkeypatch.setattr(os, "scandir", scandir)
    assert code.pictures.find(b"photos") == ([b"a.jpg"], [b"locked"])


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("absent", "absent does not exist"),
        ("test_dataset", "no photographs below test_dataset"),
        ("a.jpg", "no photographs below a.jpg"),
    ],
)
def test_a_folder_without_photographs_gives_a_header(code, exported, path, fault):
    Path("test_dataset").mkdir()
    Path("a.jpg").write_bytes(jpeg(1))
    with pytest.raises(code.bundles.Problem, match=f"{fault}; give a folder with") as problem:
        code.predict.main([path, "out.csv", "--bundle", str(exported.folder)])
    assert problem.value.code == 2
    assert Path("out.csv").read_bytes() == b"filename,category_id,confidence\n"


def test_no_photographs_is_said_and_never_replaces_a_table(run, capsys):
    exit_code, rows = run()
    assert (exit_code, rows) == (2, [["filename", "category_id", "confidence"]])
    Path("out/submission.csv").write_text("filename\nmine\n")
    assert run()[0] == 2 and read_rows(Path("out/submission.csv"))[1] == ["mine"]


def test_a_picture_that_vanishes_keeps_its_row(run, code, monkeypatch):
    write_photographs(3)
    honest = code.pictures.find

    def find(folder):
        names = honest(folder)
        Path("test_dataset/001.jpg").unlink(missing_ok=True)
        return names

    monkeypatch.setattr(code.pictures, "find", find)
    exit_code, rows = run()
    assert exit_code == 0 and [row[0] for row in rows[1:]] == ["000.jpg", "001.jpg", "002.jpg"]
    assert rows[2][1] == "012"


def test_a_picture_that_comes_later_is_told(run, code, monkeypatch, capsys):
    write_photographs(2)
    monkeypatch.setattr(
        code.guard, "run", lambda *_, **__: bool(os.link("test_dataset/000.jpg", "test_dataset/late.jpg"))
    )
    exit_code, rows = run()
    assert exit_code == 0 and [row[0] for row in rows[1:]] == ["000.jpg", "001.jpg"]
    assert "1 photographs were added during the run; run it again for their rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["code/predict.py"], ["-I", "{root}/code/predict.py"], ["link.py"], ["linked/code/predict.py"]],
)
def test_its_own_folder_is_found_however_it_is_started(tmp_path, arguments):
    root = tmp_path / "some where"
    write_classes((root / "test_dataset").mkdir(parents=True) or root)
    shutil.copytree(CODE, root / "code", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "test_dataset/a.jpg").write_bytes(b"")
    Path("link.py").symlink_to("some where/code/predict.py")
    Path("linked").symlink_to(root)
    start_folder = root if arguments == ["code/predict.py"] else tmp_path
    done = subprocess.run(
        [sys.executable, *(argument.format(root=root) for argument in arguments)],
        cwd=start_folder,
        capture_output=True,
    )
    assert done.returncode == 4, done.stderr
    assert read_rows(root / "results/results/submission_priors.csv")[1] == ["a.jpg", "007", "0.600000"]
    assert not (root / "code/__pycache__").exists()


def test_help_is_one_screen():
    done = subprocess.run(
        [sys.executable, str(CODE / "predict.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) <= 24


def test_hidden_and_system_entries_are_those_of_conversion(code):
    assert {name.decode() for name in code.pictures.SYSTEM_NAMES} == image_folders.SYSTEM_NAMES
    for path in (
        "a.jpg",
        "a/.b/c.jpg",
        "Thumbs.DB",
        "@EADIR/a.jpg",
        "a/@eaDirs/b.jpg",
        "._a.jpg",
        "a..jpg",
        "a/RECYCLER",
    ):
        assert code.pictures.is_hidden(path.encode()) == image_folders.is_hidden(path)
