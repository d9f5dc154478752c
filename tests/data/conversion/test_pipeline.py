"""Conversion: contents, reuse, refusals, and what remains after faults and kills."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.sparse.csgraph import connected_components

from fastflower import convert
from fastflower.core import files as core_files
from fastflower.core import runs
from fastflower.core import workers as core_workers
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.records import read_record, write_record
from fastflower.core.tables import read_csv
from fastflower.core.workers import Progress
from fastflower.data import folds
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import open_beton
from fastflower.data.betons.manifest import Manifest, manifest_path
from fastflower.data.conversion import encode, grouping, storage
from fastflower.data.decode.kernel import decode_eval, decode_file
from fastflower.data.readers import image_files, image_folders
from fastflower.data.transforms import corruptions
from fastflower.recipe import load
from support.sample_images import jpeg, picture

ARGUMENTS = ["data.img_size=32", "tta.scales=[32]", "data.n_splits=3", "data.workers=1"]  # stored side 36
SIDE = 36


@pytest.fixture
def photographs() -> dict[str, bytes]:
    """Eighteen JPEGs of three classes in data/train, one of them small; class ids are not contiguous."""
    files = {f"{k:02d}.jpg": jpeg(picture(k, (40, 30) if k == 4 else (60, 48))) for k in range(18)}
    Path("data/train").mkdir(parents=True)
    for name, data in files.items():
        Path("data/train", name).write_bytes(data)
    label([(name, [164, 9, 10][k % 3]) for k, name in enumerate(files)])
    return files


def label(rows: list[tuple[str, int]]) -> None:
    Path("data/train_labels.csv").write_text(
        "filename,category_id\n" + "".join(f"{n},{c}\n" for n, c in rows)
    )


def run(*arguments: str) -> None:
    assert convert.main([*ARGUMENTS, *arguments]) == 0


def snapshot(home: str = "data") -> dict[str, str]:
    """SHA-256 of the files that convert has written below `home`, by name."""
    paths = {*Path(home).glob("*.csv"), *Path(home, "betons").glob("fold*")} - {Path("data/train_labels.csv")}
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def pixels_of(path: Path, row: int) -> np.ndarray:
    beton = open_beton(path)
    height, width = (int(beton.descriptors[name][row]) for name in ("height", "width"))
    out = np.empty((1, height, width, 3), np.uint8)
    decode_eval(beton, np.array([row]), out=out, factor=1.0, interpolation="bilinear", threads=1)
    return out[0]


def test_a_conversion_holds_what_the_contract_says(photographs: dict[str, bytes]) -> None:
    run("data.store=raw")
    table = folds.read_folds(Path("data/folds.csv"))
    rows = [line.rsplit(",", 1) for line in Path("data/classes.csv").read_text().splitlines()]
    assert [row for row, _ in rows] == ["class_idx,category_id,n", "0,9,6", "1,10,6", "2,164,6"]
    assert [len(check) for _, check in rows] == [5, 8, 8, 8]
    assert table.sha256 == [hashlib.sha256(data).hexdigest() for data in photographs.values()]
    for fold in range(3):
        train, val, bad = (
            open_beton(Path(f"data/betons/fold{fold}_{s}.beton")) for s in ("train", "val", "val_corrupt")
        )
        assert train.index.tolist() == table.train_rows(fold).tolist()
        assert val.index.tolist() == table.val_rows(fold).tolist()
        assert np.array_equal(train.labels, table.class_idx[train.index])
        assert bad.index.tolist() == val.index.tolist() * 5
        assert bad.origin.combos == tuple((kind, "low") for kind in corruptions.STRENGTHS)
        assert train.origin.stored_side == SIDE
        for beton in (train, val, bad):
            beton.verify()
            assert min(beton.descriptors[name].min() for name in ("height", "width")) == (
                30 if 4 in beton.index else SIDE
            )


@pytest.mark.parametrize("store", ["raw", "jpeg"])
def test_rows_are_the_pictures(photographs: dict[str, bytes], store: str) -> None:
    run(f"data.store={store}")
    names = list(photographs)
    for split in ("val", "val_corrupt"):
        path = Path(f"data/betons/fold0_{split}.beton")
        beton = open_beton(path)
        combos = beton.origin.combos or (None,)
        for row, index in enumerate(beton.index):
            expected = np.asarray(image_files.stored(image_files.decode(photographs[names[index]]), SIDE))
            combo = combos[row * len(combos) // beton.rows]
            if combo:
                expected = corruptions.corrupt(
                    expected, combo[0], level=combo[1], key=corruptions.image_key(names[index])
                )
            exact = store == "raw" or split == "val" or combo[0] == "jpeg"
            actual = pixels_of(path, row)
            assert (
                np.array_equal(actual, expected)
                if exact
                else np.abs(actual.astype(int) - expected).mean() < 4
            )


def test_small_jpegs_keep_their_bytes_and_validation_is_never_lossy(photographs: dict[str, bytes]) -> None:
    run("data.store=jpeg")
    for fold in range(3):
        for split in ("train", "val"):
            beton = open_beton(Path(f"data/betons/fold{fold}_{split}.beton"))
            for row, index in enumerate(beton.index):
                kept = beton.row(row).tobytes() == photographs[f"{index:02d}.jpg"]
                assert kept == (index == 4)
                assert int(beton.descriptors["mode"][row]) == (
                    encode.RAW if split == "val" and not kept else encode.JPEG
                )


def test_each_file_is_read_once_and_encoded_once(
    photographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for module, name in ((image_folders, "read_bytes"), (encode, "decode_file"), (encode, "encode_jpeg")):
        real: Callable[..., object] = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, name=name, real=real, **k: (seen.append(name), real(*a, **k))[1]
        )
    run("data.store=jpeg", "data.n_splits=5", "robust.enabled=false")
    assert {name: seen.count(name) for name in set(seen)} == {
        "read_bytes": 18,
        "decode_file": 18,
        "encode_jpeg": 17,
    }
    assert not list(Path("data/betons").glob("*val_corrupt*"))


def test_convert_starts_without_what_takes_long_to_import(environment: dict[str, str]) -> None:
    heavy = "{'torch', 'timm', 'composer', 'ffcv', 'numba', 'matplotlib', 'sklearn', 'pandas'}"
    code = f"import sys, fastflower.convert; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=60)
    assert done.stdout == b"set()\n"


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_bytes_do_not_depend_on_workers_or_on_the_order_of_labels(
    photographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    run("data.store=jpeg")
    monkeypatch.setattr(encode, "CHUNK", 2)  # enough tasks for all
    expected = snapshot()
    rows = [(name, [164, 9, 10][k % 3]) for k, name in enumerate(photographs)]
    label(rows[::-1])
    run("data.store=jpeg", "data.home=again", f"data.workers={workers}")
    assert snapshot("again") == expected


def test_a_second_run_has_nothing_to_do(
    photographs: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    run("data.store=raw")
    before, times = snapshot(), {p: p.stat().st_mtime_ns for p in Path("data/betons").glob("fold*")}
    run("data.store=auto", "seed=7")
    assert "up to date: 18 images, 3 classes, 3 folds, raw" in capsys.readouterr().out
    assert times == {p: p.stat().st_mtime_ns for p in Path("data/betons").glob("fold*")}
    run("data.store=raw", "data.img_size=48")
    assert snapshot()["folds.csv"] == before["folds.csv"]
    assert open_beton(Path("data/betons/fold0_train.beton")).origin.stored_side == 55
    run("robust.enabled=false")
    assert not list(Path("data/betons").glob("*val_corrupt*"))


def test_only_what_is_missing_is_written_again(photographs: dict[str, bytes]) -> None:
    run()
    expected = snapshot()
    kept = Path("data/betons/fold2_val.beton")
    inode = kept.stat().st_ino
    Path("data/betons/fold0_train.beton.json").unlink()
    run()
    assert snapshot() == expected
    assert kept.stat().st_ino == inode


def test_copies_share_a_fold_and_conflicts_are_said(
    photographs: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data/train/copy.jpg").write_bytes(photographs["05.jpg"])
    Path("data/train/small.jpg").write_bytes(jpeg(picture(7, (90, 72))))
    label(
        [
            *((name, [164, 9, 10][k % 3]) for k, name in enumerate(photographs)),
            ("copy.jpg", 9),
            ("small.jpg", 9),
        ]
    )
    run()
    table = folds.read_folds(Path("data/folds.csv"))
    fold = dict(zip(table.filenames, table.fold, strict=True))
    assert fold["copy.jpg"] == fold["05.jpg"]
    assert fold["small.jpg"] == fold["07.jpg"]
    output = capsys.readouterr().out
    assert "2 images are copies or near-copies of another and share its fold" in output
    assert (
        "warning: 1 images have the bytes of another but a different label, such as copy.jpg and 05.jpg"
        in output
    )
    assert "copy.jpg,9,05.jpg,10,0,yes" in Path("data/duplicates.csv").read_text()


def test_equal_bytes_are_grouped_even_without_hashing(photographs: dict[str, bytes]) -> None:
    Path("data/train/copy.jpg").write_bytes(photographs["05.jpg"])
    label([*((name, [164, 9, 10][k % 3]) for k, name in enumerate(photographs)), ("copy.jpg", 10)])
    run("data.group=none", "data.split=stratified")
    table = folds.read_folds(Path("data/folds.csv"))
    assert table.group[table.filenames.index("copy.jpg")] == table.group[5]


def damage(photographs: dict[str, bytes]) -> None:
    Path("data/train/03.jpg").write_bytes(photographs["03.jpg"][:500])
    Path("data/train/08.jpg").write_bytes(b"")
    Path("data/train/11.jpg").write_bytes(b"<html>")
    Path("data/train/14.jpg").write_bytes(rotten(photographs["14.jpg"]))


def rotten(data: bytes) -> bytes:
    """The JPEG with one byte of its scan changed, such that Pillow decodes it silently and libjpeg warns."""
    for offset in range(data.index(b"\xff\xda") + 14, len(data)):
        changed = data[:offset] + bytes([data[offset] ^ 0x55]) + data[offset + 1 :]
        try:
            image_files.decode(changed)
        except InputError:
            continue
        try:
            decode_file(changed, (48, 60), (48, 60))
        except InputError:
            return changed
    pytest.fail("no change of one byte makes libjpeg warn")


def test_columns_for_two_classes_are_refused_for_three(photographs: dict[str, bytes]) -> None:
    with pytest.raises(InputError, match=r"bundle.columns = binary: there are 3 classes, not two; use three"):
        run("bundle.columns=binary")
    assert not Path("data/betons").exists()


def test_all_bad_images_are_named_at_once(photographs: dict[str, bytes]) -> None:
    damage(photographs)
    assert image_files.decode(image_files.read_bytes("data/train/14.jpg")).size == (60, 48)
    with pytest.raises(InputError) as error:
        run()
    message = str(error.value)
    assert message.startswith("4 of 18 images cannot be used: 03.jpg cannot be decoded: ")
    assert (
        "08.jpg is empty; 11.jpg is not an image of type JPEG, PNG, BMP, GIF, WEBP, but a web page" in message
    )
    assert "14.jpg cannot be decoded (Corrupt JPEG data" in message
    assert message.endswith("; replace them, or use data.on_bad=skip")
    assert "\n" not in message
    assert not snapshot()
    assert not Path("data/.betons.new").exists()


def test_bad_images_can_be_skipped(photographs: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    damage(photographs)
    run("data.on_bad=skip")
    skipped = Path("data/skipped.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in skipped] == ["filename", "03.jpg", "08.jpg", "11.jpg", "14.jpg"]
    table = folds.read_folds(Path("data/folds.csv"))
    assert len(table) == 14
    assert (
        sum(int(line.split(",")[2]) for line in Path("data/classes.csv").read_text().splitlines()[1:]) == 14
    )
    run("data.on_bad=skip")
    assert "up to date: 14 images" in capsys.readouterr().out
    fold_set.open_fold(load(None, ARGUMENTS), 0)


def test_many_bad_images_go_to_a_file(photographs: dict[str, bytes]) -> None:
    for name in list(photographs)[:12]:
        Path("data/train", name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"12 of 18 images .*; and 2 more, all in data/bad.csv; replace"):
        run()
    assert len(Path("data/bad.csv").read_text().splitlines()) == 13


def test_an_image_of_the_folds_that_broke_or_changed_is_refused(photographs: dict[str, bytes]) -> None:
    run()
    before = snapshot()
    Path("data/train/03.jpg").write_bytes(photographs["03.jpg"][:500])
    with pytest.raises(InputError, match=r"folds.csv counts on them: restore them"):
        run("data.on_bad=skip")
    Path("data/train/03.jpg").write_bytes(photographs["04.jpg"])
    with pytest.raises(InputError, match=r"1 images changed since data/folds.csv was made, such as 03.jpg"):
        run()
    assert snapshot() == before


def test_odd_pictures_are_stored_upright_and_undistorted(photographs: dict[str, bytes]) -> None:
    exif, turned = Image.Exif(), {}
    for turn in range(10):  # 0 and 9 mean nothing
        exif[image_files.ORIENTATION] = turn
        turned[f"turned{turn}.jpg"] = jpeg(picture(60 + turn, (35, 30)), exif=exif)
    odd = turned | {
        "broken_note.jpg": jpeg(picture(50, (35, 30)), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "grey.jpg": jpeg(picture(51, (35, 30)).convert("L")),
        "cmyk.jpg": jpeg(picture(52, (35, 30)).convert("CMYK")),
        "dot.jpg": jpeg(picture(53, (1, 1))),
        "strip.jpg": jpeg(picture(54, (900, 1))),
        "名 ,字.jpg": jpeg(picture(55, (35, 30)), progressive=True),
    }
    for name, data in odd.items():
        Path("data/train", name).write_bytes(data)
    rows = [*photographs, *odd]
    text = "".join(f'"{name}",{k % 3}\n' for k, name in enumerate(rows))
    Path("data/train_labels.csv").write_text("filename,category_id\n" + text)
    run("data.store=jpeg")
    table = folds.read_folds(Path("data/folds.csv"))
    sizes = {}
    for fold in range(3):
        beton = open_beton(Path(f"data/betons/fold{fold}_val.beton"))
        for row, index in enumerate(beton.index):
            sizes[table.filenames[index]] = (
                int(beton.descriptors["height"][row]),
                int(beton.descriptors["width"][row]),
            )
            name = table.filenames[index]
            if name in odd:
                expected = image_files.stored(image_files.decode(odd[name]), SIDE)
                assert np.array_equal(
                    pixels_of(Path(f"data/betons/fold{fold}_val.beton"), row), np.asarray(expected)
                )
    assert [sizes[name] == (35, 30) for name in turned] == [turn in (5, 6, 7, 8) for turn in range(10)]
    assert sizes["strip.jpg"] == (1, 4 * SIDE)
    assert sizes["dot.jpg"] == (1, 1)


def test_a_ratio_split_has_one_fold(photographs: dict[str, bytes]) -> None:
    run("data.split=ratio", "data.n_splits=4")
    assert {p.name for p in Path("data/betons").glob("*.beton")} == {
        f"fold0_{s}.beton" for s in ("train", "val", "val_corrupt")
    }
    held_out = open_beton(Path("data/betons/fold0_val.beton"))
    assert 0 < held_out.rows <= 5
    fold_set.open_fold(load(None, [*ARGUMENTS, "data.split=ratio"]), 0)


def test_open_fold_refuses_what_does_not_belong_together(photographs: dict[str, bytes]) -> None:
    run()
    settings = load(None, ARGUMENTS)
    opened = fold_set.open_fold(settings, 1)
    assert opened.val_corrupt is not None
    assert (opened.train.rows, opened.val.rows, opened.val_corrupt.rows) == (12, 6, 30)
    assert opened.classes.ids == ("9", "10", "164")
    assert fold_set.open_fold(load(None, [*ARGUMENTS, "robust.enabled=false"]), 1).val_corrupt is None
    with pytest.raises(InputError, match=r"short side 36, the recipe's sizes and views need 73"):
        fold_set.open_fold(load(None, [*ARGUMENTS, "data.img_size=64"]), 1)
    with pytest.raises(InputError, match=r"robust.kinds or robust.level differ"):
        fold_set.open_fold(load(None, [*ARGUMENTS, "robust.level=medium"]), 1)
    with pytest.raises(InputError, match=r"data.fold = 4: data/folds.csv has the folds \[0, 1, 2\]"):
        fold_set.open_fold(settings, 4)
    manifest = opened.val.manifest
    origin = replace(opened.val.origin, settings=replace(opened.val.origin.settings, store="jpeg"))
    write_record(manifest_path(opened.val.path), replace(manifest, origin=origin))
    with pytest.raises(
        InputError, match=r"fold1_val.beton is stale: other settings than .*; run convert again"
    ):
        fold_set.open_fold(settings, 1)
    for suffix in ("", ".json"):
        shutil.copy(f"data/betons/fold0_train.beton{suffix}", f"data/betons/fold1_train.beton{suffix}")
    with pytest.raises(InputError, match=r"fold1_train.beton is stale: other fold than"):
        fold_set.open_fold(settings, 1)
    label([(name, [164, 9, 10][k % 3 if k else 1]) for k, name in enumerate(photographs)])
    with pytest.raises(InputError, match=r"does not match the labels: 1 relabelled, such as 00.jpg"):
        fold_set.open_fold(settings, 1)
    Path("data/train_labels.csv").unlink()  # training does not need the images
    fold_set.open_fold(settings, 0)


def test_two_conversions_at_once(photographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    run()
    before, started, go = snapshot(), os.pipe(), os.pipe()
    real = encode.inspect
    first = os.fork()
    if not first:
        monkeypatch.setattr(
            encode, "inspect", lambda data: (os.write(started[1], b"."), os.read(go[0], 1), real(data))[2]
        )
        try:
            run("data.img_size=48")
            os._exit(0)
        finally:
            os._exit(1)
    os.read(started[0], 1)
    with pytest.raises(EnvironmentFault, match=rf"another convert \(process {first}\) is writing there"):
        run("data.img_size=48")
    assert snapshot() == before
    os.write(go[1], b"." * len(photographs))
    assert os.waitpid(first, 0)[1] == 0
    run("data.img_size=48", "data.home=expected")
    assert snapshot() == snapshot("expected") != before


def test_a_training_keeps_the_set_that_it_opened(photographs: dict[str, bytes]) -> None:
    run()
    opened, old = fold_set.open_fold(load(None, ARGUMENTS), 0), snapshot()
    content = opened.train.data.tobytes()
    run("data.img_size=48", "robust.level=medium")
    assert snapshot() != old
    assert opened.train.data.tobytes() == content
    for beton in (opened.train, opened.val, opened.val_corrupt):
        assert beton is not None
        beton.verify()


def test_the_disk_is_asked_first(photographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        storage.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000)
    )
    with pytest.raises(
        EnvironmentFault, match=r"needs about .* MB, 0.0 MB are free; free the disk, move data.home, or"
    ):
        run()
    assert not snapshot()


@pytest.mark.parametrize(("memory", "store"), [(1 << 40, "raw"), (100_000, "jpeg")])
def test_the_store_follows_memory(
    photographs: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    memory: int,
    store: str,
) -> None:
    monkeypatch.setattr(storage, "memory", lambda: memory)
    run()
    assert re.search(
        rf"store: {store}, short side 36; .* of raw pixels a fold .*fit", capsys.readouterr().out
    )
    assert open_beton(Path("data/betons/fold0_val.beton")).origin.settings.store == store


def test_hashing_is_left_out_when_it_takes_long(
    photographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grouping.duplicates, "hashing_seconds", lambda *a, **k: 600.0)
    monkeypatch.setattr(encode, "phash", lambda image: pytest.fail("an image was hashed"))
    run()
    assert "hashing takes about 600 s: left out; data.group=phash looks for them" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_said_before_an_image_is_read(
    photographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_folders, "read_bytes", lambda path: pytest.fail("read an image"))
    Path("file").write_text("")
    for home in ("file", "file/below"):
        with pytest.raises(
            EnvironmentFault, match=rf"data.home = {home}: cannot write there \(.*\); choose another"
        ):
            run(f"data.home={home}")
    Path("data/betons").write_text("")
    with pytest.raises(EnvironmentFault, match=r"data/betons is not a folder; move it away"):
        run()
    Path("data/betons").unlink()
    Path("data/betons").symlink_to("/nowhere/flowers")
    with pytest.raises(
        EnvironmentFault, match=r"data.home = data: No such file .*; make room there, or choose"
    ):
        run()
    real: Callable[..., int] = os.open

    def read_only(path: Any, flags: int, *args: int, **options: Any) -> int:
        if flags & os.O_CREAT and "data/" in os.fspath(path):
            raise OSError(errno.EROFS, "Read-only file system", path)
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(
        EnvironmentFault, match=r"data.home = data: cannot write there \(Read-only file system\)"
    ):
        run()


def test_a_home_that_is_missing_is_made(photographs: dict[str, bytes]) -> None:
    run("data.home=some/where/new", "robust.enabled=false")
    assert len(snapshot("some/where/new")) > 6


def limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastflower.convert", *ARGUMENTS, *arguments]


@pytest.fixture
def environment(repo: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(repo)}


def test_a_full_disk_stops_cleanly(photographs: dict[str, bytes], environment: dict[str, str]) -> None:
    arguments = ("data.workers=2", "data.store=raw", "robust.enabled=false")
    done = subprocess.run(
        command(*arguments), env=environment, preexec_fn=limited(20_000), capture_output=True, timeout=60
    )
    assert done.returncode == 4
    assert re.search(rb"fastflower: .*cannot write \(File too large\); free the disk", done.stderr)
    assert done.stderr.count(b"\n") == 1
    assert not list(Path("data/betons").glob("fold*"))
    assert not list(Path("data").rglob("*spool*"))


def test_a_killed_worker_ends_the_conversion(
    photographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, started = os.getpid(), os.pipe()

    def die(data: bytes) -> None:
        assert os.getpid() != parent
        os.write(started[1], b"%f " % time.monotonic())
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(encode, "CHUNK", 4)
    monkeypatch.setattr(encode, "inspect", die)
    with pytest.raises(
        EnvironmentFault, match=r"a worker process was killed, most likely for memory; lower data.workers"
    ):
        run("data.workers=2")
    assert time.monotonic() - float(os.read(started[0], 64).split()[0]) < 5
    assert not snapshot()


def test_a_silent_worker_is_given_up(photographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK", 4)
    monkeypatch.setattr(core_workers, "PATIENCE", 0.3)
    monkeypatch.setattr(encode, "inspect", lambda data: time.sleep(600))
    with pytest.raises(EnvironmentFault, match=r"nothing finished within 0 s; check the disks"):
        run("data.workers=2")


STEPS = ("replace", "rename", "link", "unlink")  # functions of os that change names on the disk


def killed_at(step: int, *arguments: str, steps: tuple[str, ...] = STEPS) -> bool:
    """Convert in a child process that is killed just before its `step`-th call of `steps`; return whether it was."""
    child = os.fork()
    if not child:
        count = iter(range(step + 1, -1, -1))

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            return lambda *a, **k: real(*a, **k) if next(count) else os._exit(9)

        try:
            for name in steps:
                setattr(os, name, counted(getattr(os, name)))
            core_files._exchange = counted(core_files._exchange)  # type: ignore[assignment]
            with open(os.devnull, "w") as sys.stdout:
                run(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


SMALLER = ["data.group=none", "data.img_size=16", "tta.scales=[16]", "data.n_splits=2", "robust.kinds=[blur]"]


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_the_old_set_or_the_new_one(photographs: dict[str, bytes]) -> None:
    label([(name, k % 2) for k, name in enumerate(list(photographs)[:8])])
    run(*SMALLER)
    old, kept = snapshot(), load(None, [*ARGUMENTS, *SMALLER])
    run(*SMALLER, "robust.level=medium", "data.home=expected")
    changed, step, seen = ["robust.level=medium"], 0, set()
    while killed_at(step, *SMALLER, *changed):
        now = snapshot()
        seen.add(now == old)
        if now == old:
            for fold in (0, 1):
                opened = fold_set.open_fold(kept, fold)
                assert opened.val_corrupt is not None
                for beton in (opened.train, opened.val, opened.val_corrupt):
                    beton.verify()
        else:
            assert now == snapshot("expected")
            break
        step += 1
    assert step > 15 and seen == {True, False}
    run(*SMALLER, *changed)
    assert snapshot() == snapshot("expected")
    assert list(Path("data").rglob(".*")) == []


@pytest.mark.slow
def test_a_kill_at_any_moment_of_the_first_conversion_is_made_good(photographs: dict[str, bytes]) -> None:
    label([(name, k % 2) for k, name in enumerate(list(photographs)[:8])])
    arguments = [*SMALLER, "data.split=ratio", "robust.enabled=false"]
    run(*arguments, "data.home=expected")
    step = 0
    while killed_at(step, *arguments):
        assert not list(Path("data/betons").glob("*")) or snapshot() == snapshot("expected")
        if step % 4 == 0:
            run(*arguments)
            assert snapshot() == snapshot("expected")
            assert list(Path("data").rglob(".*")) == []
        shutil.rmtree("data/betons", ignore_errors=True)
        for path in {*Path("data").glob("*.csv")} - {Path("data/train_labels.csv")}:
            path.unlink()
        step += 1
    assert step > 12


def test_where_folders_cannot_be_exchanged_the_old_set_comes_back(
    photographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(*SMALLER)
    old = snapshot()
    monkeypatch.setattr(core_files, "_exchange", lambda first, second: False)
    step = 0
    while killed_at(step, *SMALLER, "robust.level=medium", steps=("rename",)):
        if not Path("data/betons").exists():
            run(*SMALLER)  # the next conversion restores the old set and finds it up to date
            assert snapshot() == old
            break
        step += 1
    else:
        pytest.fail("was never killed between the two renames")
    run(*SMALLER, "robust.level=medium")
    assert snapshot() != old


def test_betons_may_be_a_link_to_another_disk(photographs: dict[str, bytes]) -> None:
    Path("fast").mkdir()
    Path("data/betons").symlink_to("../fast/flowers")
    for level in ("low", "medium"):
        run(*SMALLER, f"robust.level={level}")
        assert Path("data/betons").is_symlink()
        assert Path("fast/flowers/fold0_train.beton").is_file()
    assert [path.name for path in Path("fast").iterdir()] == ["flowers"]


def runs_still(process: int) -> bool:
    """True unless a process has ended; init may take its time to collect an orphan's exit code."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_the_old_set_and_no_workers(
    photographs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, sent: signal.Signals
) -> None:
    run(*SMALLER)
    old, changed = snapshot(), [*SMALLER, "robust.level=medium", "data.workers=2"]
    started, real = os.pipe(), encode.inspect
    monkeypatch.setattr(encode, "CHUNK", 4)
    child = os.fork()
    if not child:
        # as in a command that has not imported Composer, which installs its own handlers
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        monkeypatch.setattr(
            encode,
            "inspect",
            lambda data: (os.write(started[1], b"%d " % os.getpid()), time.sleep(0.3), real(data))[2],
        )
        try:
            run(*changed)
        except KeyboardInterrupt:
            os._exit(130)
        finally:
            os._exit(1)
    os.read(started[0], 64)  # a worker is at work
    workers = [int(process) for process in Path(f"/proc/{child}/task/{child}/children").read_text().split()]
    assert workers
    os.kill(child, sent)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (130 if sent == signal.SIGINT else -sent)
    deadline = time.monotonic() + 10
    while any(map(runs_still, workers)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(runs_still, workers))
    assert snapshot() == old
    run(*changed)
    run(*changed, "data.home=expected")
    assert snapshot() == snapshot("expected") != old
    assert not list(Path("data").glob(".betons.*"))


@pytest.mark.slow
def test_sigkill_while_encoding_leaves_nothing_behind(
    photographs: dict[str, bytes], environment: dict[str, str]
) -> None:
    for k in range(18, 900):
        Path(f"data/train/{k}.jpg").write_bytes(photographs["00.jpg"])
    label([(p.name, k % 3) for k, p in enumerate(sorted(Path("data/train").iterdir()))])
    with subprocess.Popen(command("data.workers=2"), env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not list(Path("data").glob(".betons.new/.spool/spool-*")) and time.monotonic() < deadline:
            time.sleep(0.005)
        pids = [int(p.name.split("-")[1]) for p in Path("data/.betons.new/.spool").iterdir()]
        process.kill()
    assert pids
    deadline = time.monotonic() + 10
    while any(runs_still(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(runs_still(pid) for pid in pids)
    assert not list(Path("data/betons").glob("fold*"))
    label([(name, [164, 9, 10][k % 3]) for k, name in enumerate(photographs)])
    run()
    assert not Path("data/.betons.new").exists()


def test_progress_says_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(core_workers.time, "monotonic", lambda: now[0])
    progress = Progress("images", 100)
    for done in (10, 20, 50):
        now[0] += 3
        progress(done)
    assert capsys.readouterr().out == "images: 20/100 (20 %), 3 images/s, 24 s left\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress("images", 100)
    for done in (50, 100):
        now[0] += 1
        progress(done)
    assert capsys.readouterr().out.count("\r") == 2


def test_photographs_of_flowers(flowers17: Path) -> None:
    rows = (flowers17 / "train_labels.csv").read_text().splitlines()[1::20]
    Path("some.csv").write_text("filename,category_id\n" + "\n".join(rows) + "\n")
    run(f"data.root={flowers17 / 'train'}", "data.csv=some.csv", "data.store=jpeg")
    opened = fold_set.open_fold(
        load(None, [*ARGUMENTS, f"data.root={flowers17 / 'train'}", "data.csv=some.csv"]), 0
    )
    manifest = read_record(Path("data/betons/fold0_train.beton.json"), Manifest)
    assert opened.train.rows + opened.val.rows == len(rows) == manifest.rows + opened.val.rows
    opened.train.verify()


def test_groups_by_embeddings_of_a_local_backbone(photographs: dict[str, bytes]) -> None:
    arguments = ["data.store=raw", "data.group=embedding", "data.group_backbone=test_resnet"]
    with pytest.raises(InputError) as caught:
        run(*arguments)
    refused = str(caught.value)
    assert refused.startswith(
        "data.group = embedding: no weights of test_resnet in results/model/pretrained_model"
    )
    assert "\n" not in refused and not Path("data/folds.csv").exists()

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=0).eval()
    runs.PRETRAINED.mkdir(parents=True)
    torch.save(network.state_dict(), runs.PRETRAINED / "test_resnet.pth")
    run("data.store=raw", "data.group=none", "data.home=plain")
    views = np.empty((len(photographs), 32, 32, 3), np.uint8)
    for fold in range(3):
        beton = open_beton(Path(f"plain/betons/fold{fold}_val.beton"))
        fold_views = np.empty((beton.rows, 32, 32, 3), np.uint8)
        decode_eval(
            beton, np.arange(beton.rows), out=fold_views, factor=1.14, interpolation="bicubic", threads=1
        )
        views[beton.index] = fold_views
    mean, std = np.array(network.pretrained_cfg["mean"]), np.array(network.pretrained_cfg["std"])
    with torch.no_grad():
        images = torch.from_numpy((views / 255 - mean) / std).float().permute(0, 3, 1, 2)
        features = network(images).numpy().astype(float)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cosines = features @ features.T
    above = np.sort(cosines[np.triu_indices(len(cosines), 1)])[-4:]  # at least three pairs
    expected = connected_components(cosines >= above[:2].mean(), directed=False)[1]

    run(*arguments, f"data.group_cosine={above[:2].mean()}")
    actual = folds.read_folds(Path("data/folds.csv")).group
    assert np.array_equal(actual[:, None] == actual[None, :], expected[:, None] == expected[None, :])
    listed = read_csv(Path("data/duplicates.csv"), grouping.DUPLICATE_COLUMNS)
    assert 2 <= len(listed) <= 3
    for pair in listed:
        first, second = (int(pair[name][:2]) for name in ("filename", "other"))
        assert (
            float(pair["cosine"]) == pytest.approx(cosines[first, second], abs=1e-3) and not pair["distance"]
        )
