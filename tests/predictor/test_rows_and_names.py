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

from support.predictor_runs import CODE, jpeg, read_rows, write_classes, write_photographs
from support.sample_images import ODD_NAMES


def test_a_row_for_every_name(run, capsys):
    names = [*ODD_NAMES, 'quote".JPG', "花.jpeg", "=1.png", "trail .jpg", "\ufeffmark.jpg"]
    names += ["a.JPG", "a.jpg", "a.jpeg", "sub/deep/a.jpg", ".hidden.jpg"]
    for name in names:
        path = os.path.join(b"test_dataset", os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes(jpeg(1))
    os.makedirs("test_dataset/folder.jpg")
    os.makedirs("test_dataset/__MACOSX")
    os.mkfifo("test_dataset/pipe.jpg")
    for junk in ("Thumbs.db", "__MACOSX/a.jpg", "._a.jpg", "notes.txt"):
        Path("test_dataset", junk).write_bytes(b"junk")
    Path("test_dataset/linked.jpg").symlink_to("a.jpg")
    Path("test_dataset/dangling.jpg").symlink_to("nothing")
    Path("test_dataset/circle").symlink_to(".")
    exit_code, rows = run()
    assert exit_code == 0
    ignored = ["._a.jpg", "Thumbs.db", "circle", "dangling.jpg", "notes.txt", "pipe.jpg"]
    assert (
        f"{len(ignored)} other entries below test_dataset get no row, the first is '._a.jpg'"
        in capsys.readouterr().out
    )
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


def test_columns_and_order_are_the_samples(run, code, monkeypatch):
    write_photographs(3)
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    Path("ref").mkdir()
    sample = Path("ref/predictions_sample.csv")
    sample.write_text("\ufeffImage,Label\r\n002.jpg,1\r\n000.jpg,1\r\n001.jpg,1\r\n", encoding="utf-8")
    _, rows = run()
    assert rows[0] == ["Image", "Label"] and [row[0] for row in rows[1:]] == ["002.jpg", "000.jpg", "001.jpg"]
    sample.write_text("ImageId,Label\n001,0\n000,0\n002,0\n")  # ids are file names without their ending
    classes = {row[0].removesuffix(".jpg"): row[1] for row in rows[1:]}
    _, rows = run()
    assert [row[0] for row in rows] == ["ImageId", "001", "000", "002"] and dict(rows[1:]) == classes
    sample.write_text("filename,category_id,confidence\nother.jpg,1,1\n")
    _, rows = run()
    assert len(rows[0]) == 3 and [row[0] for row in rows[1:]] == ["000.jpg", "001.jpg", "002.jpg"]
    _, rows = run("--two-columns")
    assert rows[0] == ["filename", "category_id"] and all(len(row) == 2 for row in rows)


@pytest.mark.parametrize("path", ["absent", "test_dataset", "a.jpg"])
def test_a_folder_without_photographs_gives_a_header(code, exported, path):
    Path("test_dataset").mkdir()
    Path("a.jpg").write_bytes(jpeg(1))
    with pytest.raises(
        code.bundles.Problem, match=f"no photographs below {path}; give a folder with"
    ) as problem:
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
    assert read_rows(root / "results/results/submission.csv")[1] == ["a.jpg", "007", "0.600000"]
    assert not (root / "code/__pycache__").exists()


def test_help_is_one_screen():
    done = subprocess.run(
        [sys.executable, str(CODE / "predict.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) <= 24
