"""Faults of inputs, disks and clocks during a conversion: each is refused in one line, or changes nothing."""

from __future__ import annotations

import base64
import builtins
import errno
import io
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastflower import convert
from fastflower.bench.fuzz import mutated
from fastflower.core import workers
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.files import temporary_path
from fastflower.data import folds, labels
from fastflower.data.betons import fold_set
from fastflower.data.decode import kernel
from fastflower.data.decode.kernel import Crop, decode_file
from fastflower.data.loaders import EvalLoader, TrainLoader
from fastflower.data.readers import image_files, image_folders
from fastflower.data.readers.jpeg_endings import completed
from fastflower.recipe import load
from support.sample_images import ODD_NAMES, jpeg, picture, predictor_pictures

ARGUMENTS = [
    "data.img_size=16",
    "tta.scales=[16]",
    "data.n_splits=2",
    "data.workers=1",
    "robust.kinds=[occlusion]",
]


def project(
    extra: dict[str, bytes] | None = None, ids: Callable[[int], str] = lambda k: str(k % 2)
) -> list[str]:
    """Write eight JPEGs of two classes and the `extra` files, all labelled; return their names."""
    files = {f"{k}.jpg": jpeg(picture(k)) for k in range(8)} | (extra or {})
    Path("data/train").mkdir(parents=True)
    rows = ["filename,category_id"]
    for k, (name, data) in enumerate(files.items()):
        Path("data/train", name).write_bytes(data)
        quoted = name.replace('"', '""')
        rows.append(f'"{quoted}",{ids(k)}')
    Path("data/train_labels.csv").write_bytes(os.fsencode("\n".join(rows) + "\n"))
    return list(files)


def run(*arguments: str) -> None:
    assert convert.main([*ARGUMENTS, *arguments]) == 0


def test_files_without_a_label_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    project()
    Path("data/train/loose.jpg").write_bytes(b"1")
    run()
    assert "note: 1 images below data.root have no label, such as loose.jpg" in capsys.readouterr().out


def test_files_of_another_format_than_their_names_say_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    forms = {"a.jpg": "PNG", "b.JPEG": "GIF", "c.png": "WEBP", "d.png": "PNG", "e.jpeg": "JPEG", "f": "BMP"}
    for name, form in forms.items():
        picture(len(name) + ord(name[0])).save(name, form)
    project({name: Path(name).read_bytes() for name in forms})
    run()
    output = capsys.readouterr().out
    assert "note: 3 images are of another format than their names say, such as a.jpg (PNG)" in output


def test_classes_of_one_name_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    names = project()
    rows = [f"{n},{k % 4},{['rose', 'lily', 'rose', ''][k % 4]}" for k, n in enumerate(names)]
    Path("data/train_labels.csv").write_text("filename,category_id,english_name\n" + "\n".join(rows) + "\n")
    run()
    output = capsys.readouterr().out
    assert "english_name: 1 names stand for several classes, such as 'rose' for 0, 2" in output
    assert "english_name: 1 classes have no name, such as 3" in output


def test_a_header_that_promises_more_than_the_file_holds_is_refused() -> None:
    data = bytearray(jpeg(picture(1)))
    marker = data.index(b"\xff\xc0") + 5
    data[marker : marker + 2] = (96).to_bytes(2, "big")  # 48 lines become 96
    project({"bad.jpg": bytes(data)})
    with pytest.raises(InputError, match=r"1 of 9 images cannot be used: bad.jpg cannot be decoded"):
        run()


# 16 x 16 pixels in arithmetic coding, by libjpeg-turbo
ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABALDA4MChAODQ4SERATGCgaGBYWGDEjJR0oOjM9PDkzODdASFxOQERXRTc4UG1RV19iZ2hnPk1xeXBk"
    "eFxlZ2P/2wBDARESEhgVGC8aGi9jQjhCY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2NjY2P/yQARCAAQABAD"
    "ASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD/AGYIOabr4brQ6LoZdLuq8yJ2VJyijndA/9k="
)


def test_every_kind_of_jpeg_that_libjpeg_reads_is_stored() -> None:
    files = {
        "progressive.jpg": jpeg(picture(20, (16, 14)), progressive=True),
        "cmyk.jpg": jpeg(picture(21, (16, 14)).convert("CMYK"), progressive=True),
        "arithmetic.jpg": ARITHMETIC,
    }
    project(files)
    run("data.store=raw", "data.group=none")
    seen = set()
    for fold in (0, 1):
        opened = fold_set.open_fold(load(None, ARGUMENTS), fold)
        for row, index in enumerate(opened.val.index):
            name = opened.folds.filenames[index]
            if name in files:
                seen.add(name)
                expected = np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))
                assert np.array_equal(opened.val.row(row).reshape(expected.shape), expected)
    assert seen == set(files)


@pytest.mark.parametrize(
    ("start", "bits", "message"),
    [
        (
            0xC1,
            12,
            "is not an image of type JPEG, .*, but a JPEG with a broken header or other than 8 bits a colour",
        ),
        (0xC3, 8, r"cannot be decoded \(Unsupported JPEG process: SOF type 0xc3\)"),  # lossless
        (0xC5, 8, r"cannot be decoded \(Unsupported JPEG process: SOF type 0xc5\)"),  # hierarchical
    ],
)
def test_other_kinds_of_jpeg_are_named(start: int, bits: int, message: str) -> None:
    data = bytearray(jpeg(picture(1)))
    marker = data.index(b"\xff\xc0")
    data[marker + 1], data[marker + 4] = start, bits
    project({"odd.jpg": bytes(data)})
    with pytest.raises(InputError, match=rf"1 of 9 images cannot be used: odd.jpg {message}"):
        run()


@pytest.mark.slow
def test_consoles_that_show_little_change_nothing(repo: Path) -> None:
    project({"花.jpg": jpeg(picture(30)), "🌸.jpg": jpeg(picture(30))})
    plain = {**os.environ, "PYTHONPATH": str(repo), "LC_ALL": "C", "COLUMNS": "20"}

    def converted(home: str, encoding: str, redirect: str = "") -> bytes:
        arguments = [sys.executable, "-m", "fastflower.convert", *ARGUMENTS, f"data.home={home}"]
        done = subprocess.run(
            ["sh", "-c", shlex.join(arguments) + redirect],
            env={**plain, "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=120,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout

    spellings = {"ascii": "\\u82b1", "gbk": "花"}
    for encoding, flower in spellings.items():
        line = f"have the bytes of another but a different label, such as \\U0001f338.jpg and {flower}.jpg"
        assert line.encode(encoding) in converted(encoding, encoding)
    assert converted("closed", "ascii", " >&-") == b""
    for path in (*Path("gbk/betons").iterdir(), Path("gbk/folds.csv"), Path("gbk/duplicates.csv")):
        for home in ("ascii", "closed"):
            assert path.read_bytes() == Path(home, path.relative_to("gbk")).read_bytes()


def test_every_cut_of_a_jpeg_is_refused_by_the_decoder() -> None:
    data = jpeg(picture(2, (64, 48)))
    decode_file(data, (48, 64), (48, 64))
    for cut in range(data.index(b"\xff\xda") + 20, len(data)):
        with pytest.raises(InputError, match="cannot be decoded"):
            decode_file(data[:cut], (48, 64), (48, 64))


def test_a_conversion_refuses_every_cut_jpeg() -> None:
    data = jpeg(picture(2, (64, 48)))
    cuts = np.random.default_rng(0).choice(np.arange(1, len(data) - 2), 300, replace=False)
    project({f"cut{length}.jpg": data[:length] for length in cuts})
    with pytest.raises(InputError, match=r"^300 of 308 images cannot be used: cut"):
        run()
    run("data.on_bad=skip")
    assert folds.read_folds(Path("data/folds.csv")).filenames == [f"{k}.jpg" for k in range(8)]


@pytest.mark.slow
def test_most_damage_that_shows_is_noticed() -> None:
    """Counts files that Pillow decodes silently but far from the picture; the others are valid JPEGs of another one."""
    rng, shows, noticed = random.Random(0), 0, 0
    for k in range(900):
        smooth = np.asarray(picture(k % 6, (160, 120)))
        grain = np.random.default_rng(k % 6).normal(0, 12 * (k % 2), smooth.shape)
        original = jpeg(Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)), subsampling=k % 3)
        data, expected = mutated(original, rng), np.asarray(image_files.decode(original), int)
        try:
            decoded = np.asarray(image_files.decode(data))
        except InputError:
            continue
        if decoded.shape != expected.shape or np.abs(decoded - expected).mean() > 2:
            shows += 1
            try:
                decode_file(data, decoded.shape[:2], decoded.shape[:2])
            except InputError:
                noticed += completed(data, decoded.shape[:2]) is None
    assert shows > 300 and noticed / shows > 0.85, f"{noticed} of {shows}"


SIZES = [(width, height) for width in (1, 2, 7, 63) for height in (1, 2, 7, 63)] + [(1, 5000), (5000, 1)]


@pytest.mark.parametrize("store", ["raw", "jpeg"])
def test_images_of_any_size_go_through_conversion_loaders_and_predictor(store: str) -> None:
    files = {}
    for width, height in [*SIZES, (70_000, 2)]:
        for form in ("PNG", "JPEG")[: 1 + (width < 1 << 16)]:
            buffer = io.BytesIO()
            picture(width + height, (width, height)).save(buffer, form)
            files[f"{width}x{height}.{form.lower()}"] = buffer.getvalue()
    project(files)
    run("data.group=none", f"data.store={store}")
    crop = {"height": 16, "width": 16, "factor": 1.14, "interpolation": "bicubic", "stored_side": 18}
    prepare, seen = predictor_pictures().prepare, set()
    for fold in (0, 1):
        opened = fold_set.open_fold(load(None, ARGUMENTS), fold)
        rows = np.arange(opened.train.rows)
        train = TrainLoader(
            opened.train,
            lambda epoch, rows=rows: rows,
            seed=3,
            batch=lambda epoch: 1,
            size=lambda epoch: (16, 16),
            crop=Crop(),
            threads=1,
        )
        train.cursor = lambda: (0, 0)
        assert sum(len(batch["image"]) for batch in train) == opened.train.rows
        assert opened.val_corrupt is not None
        for beton in (opened.val, opened.val_corrupt):
            assert max(beton.descriptors[name].max() for name in ("height", "width")) <= 4 * 18
            images = np.concatenate(
                [batch["image"][batch["valid"]] for batch in EvalLoader(
                    beton, 8, size=lambda: (16, 16), factor=1.14, interpolation="bicubic", threads=1
                )]
            )  # fmt: skip
            assert len(images) == beton.rows
            for image, index in zip(images, beton.index, strict=True):
                name = opened.folds.filenames[index]
                if beton is opened.val:
                    seen.add(name)
                    assert np.array_equal(image, prepare(os.fsencode(f"data/train/{name}"), [crop])[0][0])
    assert seen > set(files)


def test_odd_names_go_through_a_conversion_byte_by_byte() -> None:
    project({name: jpeg(picture(20 + k)) for k, name in enumerate(ODD_NAMES)})
    run()
    saved = folds.read_folds(Path("data/folds.csv"))
    assert set(ODD_NAMES) < set(saved.filenames)
    fold_set.open_fold(load(None, ARGUMENTS), 0)


def test_words_and_odd_numbers_are_ordinary_labels() -> None:
    tokens = ["nano", "NA", "null", "None", "-3", "9" * 40, "1e5", "１２", "007", "7"]
    project({name: jpeg(picture(ord(name[0]))) for name in ("8.jpg", "9.jpg")}, ids=lambda k: tokens[k])
    run("data.split=ratio")
    saved = folds.read_folds(Path("data/folds.csv"))
    assert (saved.filenames, saved.category_ids) == ([f"{k}.jpg" for k in range(10)], tokens)
    assert set(labels.read_classes(Path("data/classes.csv")).ids) == set(tokens)


@pytest.mark.parametrize(
    ("number", "message"), [(errno.EACCES, "Permission denied"), (errno.EIO, "Input/output error")]
)
def test_a_read_error_is_listed_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    """When opening, as for a file of another user, and when reading, as for a broken disk."""
    project()

    class Broken(io.FileIO):
        def readall(self) -> bytes:
            raise OSError(number, message)

    def refuse(path: Any, *args: Any, **options: Any) -> int:
        if number == errno.EACCES and str(path).endswith("/3.jpg"):
            raise OSError(number, message, path)
        return opened(path, *args, **options)

    def broken(handle: int, *args: Any, **options: Any) -> Any:
        wrong = number == errno.EIO and os.readlink(f"/proc/self/fd/{handle}").endswith("/3.jpg")
        return io.BufferedReader(Broken(handle)) if wrong else file_of(handle, *args, **options)

    opened, file_of = os.open, os.fdopen
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "fdopen", broken)
    for count in (1, 2):
        with pytest.raises(
            InputError,
            match=rf"^1 of 8 images cannot be used: 3.jpg cannot be read: {message}; replace them, or",
        ):
            run(f"data.workers={count}")


def test_a_fault_of_the_machine_is_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EnvironmentFault("decode.c is not compiled; run make setup")

    project()
    monkeypatch.setattr(kernel, "library", missing)
    for count in (1, 2):
        with pytest.raises(EnvironmentFault, match=r"^decode.c is not compiled; run make setup$"):
            run(f"data.workers={count}")
    assert not Path("data/bad.csv").exists()


def test_a_file_that_changes_after_it_was_read_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    project()
    run("data.home=expected")
    real = image_folders.read_bytes

    def read_then_swap(path: str) -> bytes:
        data = real(path)
        if "/data/train/" in str(path):
            Path(path).write_bytes(jpeg(picture(99)))
        return data

    monkeypatch.setattr(image_folders, "read_bytes", read_then_swap)
    run()
    assert snapshot() == snapshot("expected")


def snapshot(home: str = "data") -> dict[str, bytes]:
    """The bytes of the betons and of folds.csv below `home`, by file name."""
    return {
        path.name: path.read_bytes() for path in (*Path(home, "betons").iterdir(), Path(home, "folds.csv"))
    }


def write_by(kind: type[io.FileIO], patch: pytest.MonkeyPatch) -> None:
    """Make open() return files of this class for writing."""
    real = io.open

    def opened(path: Any, mode: str = "r", buffering: int = -1, *args: Any, **options: Any) -> Any:
        if not set(mode) & set("wax"):
            return real(path, mode, buffering, *args, **options)
        file = io.BufferedWriter(kind(path, mode.strip("bt")), 1 << 12)
        return file if "b" in mode else io.TextIOWrapper(file, *args, **options)

    patch.setattr(io, "open", opened)
    patch.setattr(builtins, "open", opened)


ONE_SPLIT = ["data.split=ratio", "robust.enabled=false", "data.group=none"]


@pytest.mark.slow
def test_a_full_disk_at_any_write_leaves_the_old_set_or_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    project()
    run(*ONE_SPLIT)
    run(*ONE_SPLIT, "data.img_size=24", "data.home=expected")
    old, new, number, count = snapshot(), snapshot("expected"), 0, iter("")

    def room() -> None:
        if next(count, None) is None:  # the disk is full from the number-th write on
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            room()
            return super().write(data)

    while True:
        count = iter(range(number))
        with monkeypatch.context() as patch:
            write_by(Full, patch)
            for name in ("fsync", "mkdir", "replace"):
                real = getattr(os, name)
                patch.setattr(os, name, lambda *a, real=real, **k: (room(), real(*a, **k))[1])
            try:
                run(*ONE_SPLIT, "data.img_size=24")
                break
            except EnvironmentFault as error:
                assert "No space left on device" in str(error) and "\n" not in str(error)
        assert snapshot() in (old, new)
        assert list(Path("data").rglob(".*")) == []
        number += 1
    assert number > 20
    assert snapshot() == new


def test_short_writes_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data).cast("B")[:499])

    project()
    run("data.home=expected")
    write_by(Short, monkeypatch)
    run()
    assert snapshot() == snapshot("expected")


def test_what_killed_conversions_left_is_removed() -> None:
    project()
    gone = subprocess.Popen(["true"])
    gone.wait()
    abandoned = temporary_path(Path("data/folds.csv"), gone.pid)
    kept = [
        temporary_path(Path("data/folds.csv"), os.getppid()),
        Path("data/.my.notes.tmp"),
        Path(f"data/{gone.pid}.tmp"),
    ]
    for path in (abandoned, *kept):
        path.write_text("")
    run()
    assert not abandoned.exists() and all(path.exists() for path in kept)


def test_inputs_are_never_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    project()
    for path in (*Path("data/train").iterdir(), Path("data/train")):
        path.chmod(path.stat().st_mode & 0o555)
    real = builtins.open

    def watched(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        assert not (set(mode) & set("wax+") and "data/train/" in str(path))
        return real(path, mode, *args, **options)

    monkeypatch.setattr(builtins, "open", watched)
    before = sorted(os.listdir("data/train"))
    run()
    assert sorted(os.listdir("data/train")) == before


def test_clocks_decide_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = project()
    run()
    for name in names:
        os.utime(Path("data/train", name), (4e9, 4e9))
    run()
    assert "up to date" in capsys.readouterr().out
    jumps = iter(range(2**40, 0, -(10**6)))
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Pacific/Kiritimati")
        time.tzset()
        patch.setattr(time, "time", lambda: float(next(jumps)))
        patch.setattr(time, "time_ns", lambda: next(jumps) * 10**9)
        run("data.home=again")
    time.tzset()
    assert snapshot() == snapshot("again")


def test_an_error_of_the_work_itself_reaches_the_caller() -> None:
    def work(k: int) -> int:
        if k == 3:
            raise InputError("row 3 is wrong")
        workers.count_done()
        return k

    for count in (1, 2):
        with pytest.raises(InputError, match="row 3 is wrong"):
            list(
                workers.map_ordered(
                    work, ((k,) for k in range(8)), count=count, on_progress=lambda done: None
                )
            )
    reported: list[int] = []
    assert list(
        workers.map_ordered(
            lambda k: (workers.count_done(), k)[1],
            ((k,) for k in range(8)),
            count=2,
            on_progress=reported.append,
        )
    ) == list(range(8))
    assert reported[-1] == 8


def test_the_distribution_is_drawn() -> None:
    project()
    run()
    with Image.open("data/class_stats.png") as image:
        assert image.size == (990, 440)
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
