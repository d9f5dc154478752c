"""The predictor: the trainer's pixels and logits, and one right row for every photograph whatever happens."""

from __future__ import annotations

import csv
import errno
import hashlib
import importlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastflower.bench.fuzz import mutated
from fastflower.bundle import sandbox
from fastflower.bundle.writer import Member, leave_programs, load_members, write
from fastflower.core import checkpoint
from fastflower.data.betons.beton_file import BetonWriter, open_beton
from fastflower.data.decode.kernel import decode_eval
from fastflower.data.readers import image_files
from fastflower.model.network import NetworkSpec, build_network
from fastflower.recipe import load
from support.sample_images import ODD_NAMES

CODE = Path(__file__).resolve().parents[2] / "code"
IDS = ["7", "012", "rose, red"]
FAMILIES = [
    ("convnextv2_atto", "linear"),
    ("vit_tiny_patch16_224", "linear"),
    ("tf_efficientnetv2_b0", "linear"),
    ("swin_tiny_patch4_window7_224", "linear"),
    ("resnet10t", "arcface"),
]


def member(
    path: Path,
    backbone: str = "resnet10t",
    head: str = "linear",
    seed: int = 0,
    size: int = 32,
    name: str = "",
    **changes: object,
) -> Path:
    """A checkpoint with random weights, named as train names it."""
    torch.manual_seed(seed)
    meta = {
        "backbone": backbone, "head": head, "head_scale": 30.0, "margin": 0.3, "num_classes": len(IDS),
        "size": [size, size], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic", "resize_factor": 1.14, "stored_side": 73, "class_ids": IDS, "class_hash": "c1a55",
        "class_counts": [3, 9, 4], "fold": seed, "seed": 42, "epoch": 1, "weights": "ema",
        **changes,
    }  # fmt: skip
    network = build_network(NetworkSpec.from_meta(meta))
    for own, buffer in network.named_buffers():
        if own.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    file = path / (name or f"best_combo__{backbone}__fold{seed}_seed42_epoch1_score0.5000.pth")
    checkpoint.save(file, network.state_dict(), meta)
    return file


def write_bundle(folder: Path, paths: list[Path], *words: str) -> list[Member]:
    """Export without gates."""
    folder.mkdir(parents=True)
    made = load(None, ["tta.scales=[32,64]", *words])
    members = load_members(paths, made.bundle.dtype)
    write(folder, members, shares=np.full(len(members), 1 / len(members)), recipe=made, temperature=1.5)
    return members


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A bundle of two members."""
    place = tmp_path_factory.mktemp("exported")
    members = write_bundle(place / "bundle", [member(place, seed=seed) for seed in (0, 1)])
    return place / "bundle", members


@pytest.fixture
def run(code, exported):
    """Run the predictor on test_dataset/ in this process: exit code and rows."""

    def call(*words: str, csv_path: str = "out/submission.csv") -> tuple[int, list[list[str]]]:
        try:
            own = ["test_dataset", csv_path, "--bundle", str(exported[0]), "--threads", "1"]
            number = code.predict.main([*own, *words])
        except code.bundles.Problem as problem:
            number = problem.code
        return number, rows_of(Path(csv_path)) if Path(csv_path).exists() else []

    Path("test_dataset").mkdir()
    return call


@pytest.fixture
def guessed(code, monkeypatch):
    """Run the predictor where there are classes and photographs but no networks: exit code 4 and rows."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    know_classes(Path.cwd())

    def call(csv_path: str) -> None:
        with pytest.raises(code.bundles.Problem, match="no bundle in nowhere") as problem:
            code.predict.main(["test_dataset", csv_path, "--bundle", "nowhere"])
        assert problem.value.code == 4

    Path("test_dataset").mkdir()
    return call


def know_classes(root: Path) -> None:
    (root / "data").mkdir()
    (root / "data/classes.csv").write_text("class_idx,category_id,n\n0,7,3\n1,007,6\n2,x,1\n")


def rows_of(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.reader(file))


def flower(seed: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    """A smooth picture with some detail."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def jpeg(seed: int, **words: object) -> bytes:
    buffer = io.BytesIO()
    flower(seed).save(buffer, "JPEG", **words)
    return buffer.getvalue()


def fill(count: int) -> None:
    for number in range(count):
        Path(f"test_dataset/{number:03d}.jpg").write_bytes(jpeg(number))


def odd_pictures(folder: Path) -> list[Path]:
    """Files of every mode that a person may have."""
    picture = flower(1, (230, 170))
    grey16 = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 250)
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))
    made = {
        "rgb.jpg": picture, "grey.jpg": picture.convert("L"), "cmyk.jpg": picture.convert("CMYK"),
        "palette.png": picture.quantize(17), "alpha.png": alpha, "grey_alpha.png": alpha.convert("LA"),
        "sixteen.png": grey16, "one.png": picture.convert("1"), "picture.bmp": picture, "picture.webp": picture,
        "tiny.png": picture.resize((1, 1)), "wide.png": picture.resize((900, 3)), "tall.jpg": picture.resize((40, 800)),
        "large.jpg": picture.resize((640, 480)),
    }  # fmt: skip
    for name, image in made.items():
        image.save(folder / name)
    keyed = picture.quantize(9)
    keyed.save(folder / "keyed.gif", transparency=3)
    picture.save(folder / "frames.gif", save_all=True, append_images=[flower(2, (230, 170))])
    picture.save(folder / "progressive.jpg", progressive=True, quality=40)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        picture.save(folder / f"turned{turn}.jpg", exif=exif)
    picture.save(folder / "broken_exif.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1\2")
    return sorted(folder.iterdir())


def test_pixels_are_those_of_the_betons(tmp_path, code):
    folder = tmp_path / "odd"
    folder.mkdir()
    files = odd_pictures(folder)
    with BetonWriter(tmp_path / "val.beton", len(files)) as writer:
        for row, file in enumerate(files):
            image = image_files.decode(file.read_bytes())
            writer.raw(np.array(image_files.stored(image, 146)), 0, row)
        writer.commit({})
    beton = open_beton(tmp_path / "val.beton")
    for row, file in enumerate(files):
        for height, width, factor, interpolation in ((128, 128, 1.14, "bicubic"), (32, 48, 1.0, "bilinear")):
            out = np.empty((1, height, width, 3), np.uint8)
            decode_eval(
                beton, np.array([row]), out=out, factor=factor, interpolation=interpolation, threads=1
            )
            crop = {"height": height, "width": width, "factor": factor, "interpolation": interpolation}
            crop["stored_side"] = 146
            (got,) = code.pictures.prepare(os.fsencode(file), [crop])
            np.testing.assert_array_equal(got, out[0], err_msg=file.name)


@pytest.mark.parametrize(("backbone", "head"), FAMILIES)
def test_logits_are_the_networks(tmp_path, code, monkeypatch, backbone, head):
    (made,) = write_bundle(tmp_path / "bundle", [member(tmp_path, backbone, head)], "tta.scales=[32,80]")
    description, hashes = code.bundles.read(str(tmp_path / "bundle"))
    networks = code.networks.Networks(str(tmp_path / "bundle"), description, hashes=hashes, device="cpu")
    assert networks.notes == []
    flower(3, (200, 150)).save(tmp_path / "picture.png")
    crops = code.pictures.prepare(os.fsencode(tmp_path / "picture.png"), description["crops"])
    noise = [[np.roll(array, 11 * turn, axis=1) for array in crops] for turn in range(5)]
    for batch in (1, 2, 5):
        got = networks.logits(noise[:batch])
        assert got.shape == (batch, 1, 4, len(IDS))
        for row in range(batch):
            for view in range(4):
                array = noise[row][view // 2]
                image = torch.from_numpy(array[:, ::-1].copy() if view % 2 else array)
                with torch.inference_mode():
                    want = made.network(image.permute(2, 0, 1)[None].float())[0].numpy()
                assert np.abs(got[row, 0, view] - want).max() <= 1e-4
    for dtype, share in ((torch.float16, 0.02), (torch.bfloat16, 0.05)):
        monkeypatch.setattr(code.networks, "choices", lambda *_, dtype=dtype, **__: [("cpu", dtype)])
        half = code.networks.Networks(str(tmp_path / "bundle"), description, hashes=hashes, device="cpu")
        assert half.members[0]["inputs"][0][0].dtype == dtype and half.notes == []
        gap = np.abs(half.logits(noise[:1]) - got[:1]).max()
        assert 0 < gap <= share * max(1, np.abs(got[:1]).max())


def test_fused_logits_over_t_give_the_confidence(run, code, exported):
    fill(3)
    number, rows = run("--logits", "logits.npz")
    assert json.loads(Path("out/submission.json").read_text())["logits"] == 3
    assert number == 0
    logits = np.load("logits.npz")["logits"]
    assert logits.shape == (3, 2, 4, len(IDS))
    odds = np.exp(logits.astype(np.float64).mean(axis=(1, 2)) / 1.5)
    odds /= odds.sum(axis=1, keepdims=True)
    assert rows[0] == ["filename", "category_id", "confidence"]
    for row, own in zip(rows[1:], odds, strict=True):
        assert row[1:] == [IDS[own.argmax()], f"{own.max():.6f}"]
    with torch.inference_mode():
        crop = {"height": 32, "width": 32, "factor": 1.14, "interpolation": "bicubic", "stored_side": 73}
        (array,) = code.pictures.prepare(b"test_dataset/000.jpg", [crop])
        want = exported[1][1].network(torch.from_numpy(array).permute(2, 0, 1)[None].float())[0].numpy()
    np.testing.assert_allclose(logits[0, 1, 0], want, atol=1e-4)


def test_each_member_sees_pictures_as_it_was_trained(tmp_path, code):
    """Two backbones with sizes, mean, cut and resampling of their own."""
    other = {
        "mean": [0.1, 0.5, 0.9],
        "std": [0.5, 0.4, 0.3],
        "interpolation": "bilinear",
        "resize_factor": 1.0,
    }
    paths = [member(tmp_path), member(tmp_path, "test_resnet", seed=1, stored_side=60, **other)]
    made = write_bundle(tmp_path / "bundle", paths, "tta.scales=[32]", "tta.hflip=false")
    description, hashes = code.bundles.read(str(tmp_path / "bundle"))
    networks = code.networks.Networks(str(tmp_path / "bundle"), description, hashes=hashes, device="cpu")
    assert networks.notes == []
    flower(3, (200, 150)).save(tmp_path / "picture.png")
    got = networks.logits(
        [code.pictures.prepare(os.fsencode(tmp_path / "picture.png"), description["crops"])]
    )
    for row, own in enumerate(made):
        crop = {"height": 32, "width": 32, "factor": own.meta["resize_factor"]}
        crop |= {name: own.meta[name] for name in ("interpolation", "stored_side")}
        (array,) = code.pictures.prepare(os.fsencode(tmp_path / "picture.png"), [crop])
        with torch.inference_mode():
            want = own.network(torch.from_numpy(array).permute(2, 0, 1)[None].float())[0].numpy()
        np.testing.assert_allclose(got[0, row, 0], want, atol=1e-4)
    assert len(description["crops"]) == 2


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
    number, rows = run()
    assert number == 0
    others = ["._a.jpg", "Thumbs.db", "circle", "dangling.jpg", "notes.txt", "pipe.jpg"]
    assert f"{len(others)} others below test_dataset get no row, first '._a.jpg'" in capsys.readouterr().out
    assert [row[0] for row in rows[1:]] == sorted([*names, "linked.jpg"], key=os.fsencode)
    data = Path("out/submission.csv").read_bytes()
    assert b"\r" not in data and data.endswith(b"\n") and not data.startswith(b"\xef\xbb\xbf")
    assert json.loads(Path("out/submission.json").read_text())["unreadable"] == {}


def png_bomb() -> bytes:
    """65536 x 65536 pixels by its header, which is whole; its data inflates to a gigabyte."""
    sides, data = (1 << 16).to_bytes(4, "big") * 2, zlib.compress(bytes(1 << 24)) * 64
    chunks = [(b"IHDR", sides + b"\x08\x02\0\0\0"), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(own).to_bytes(4, "big") + name + own + zlib.crc32(name + own).to_bytes(4, "big")
        for name, own in chunks
    )


LOCALES = [
    {"LC_ALL": "C.UTF-8"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    {"LC_ALL": "POSIX", "PYTHONIOENCODING": "gbk"},
    {"LANG": "zh_CN.GBK", "PYTHONIOENCODING": "utf-16"},
]


def test_names_are_those_of_the_disk_under_any_locale(tmp_path):
    know_classes(tmp_path)
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
    words = [sys.executable, str(CODE / "predict.py"), "test_dataset", "out.csv", "--bundle", "nowhere"]
    for number, locale in enumerate(LOCALES):
        environment = {"PATH": os.environ["PATH"], **locale}
        assert subprocess.run(words, env=environment, capture_output=True).returncode == 4
        found = [os.fsencode(row[0]) for row in rows_of(Path("out.csv"))]
        assert found == [b"filename", *sorted(names)], locale
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
    found, others = code.pictures.find(b"photos")
    assert found == sorted(name for name in files if name.lower().endswith(endings)) and len(found) > 40
    assert sorted([*found, *others]) == sorted(files)


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


def test_unreadable_pictures_get_the_prior(run, capsys):
    fill(2)
    bad = {
        "empty.jpg": b"",
        "page.jpg": b"<html>",
        "cut.jpg": jpeg(5)[:300],
        "tiff.png": b"II*\0" + bytes(90),
    }
    bad["scans.jpg"] = b"\xff\xd8" + b"\xff\xda\0\0" * 501
    bad["bomb.png"] = png_bomb()
    for name, data in bad.items():
        Path("test_dataset", name).write_bytes(data)
    number, rows = run()
    assert number == 0
    found = {row[0]: row[1:] for row in rows[1:]}
    assert len(found) == 8
    assert all(found[name] == ["012", f"{9 / 16:.6f}"] for name in bad)
    about = json.loads(Path("out/submission.json").read_text())
    assert set(about["unreadable"]) == set(bad) and about["predicted"] == 2
    said = capsys.readouterr().err
    assert all(f"'{name}': " in said for name in bad)


MEASURED = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import pictures
crop = {"height": 32, "width": 32, "factor": 1.0, "interpolation": "bicubic", "stored_side": 73}
pictures.prepare(b"plain.jpg", [crop])
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for name in sys.argv[2:]:
    try:
        print(name, pictures.prepare(name.encode(), [crop])[0].shape)
    except Exception as error:
        print(name, type(error).__name__)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, time.process_time() - start)
"""


def test_bombs_cost_neither_memory_nor_time():
    """65536 pixels a side by their headers, 501 scans, a file of a tebibyte; and pictures of one pixel's width."""
    Path("plain.jpg").write_bytes(jpeg(1))
    side = (65535).to_bytes(2, "little")
    bombs = {
        "bomb.png": png_bomb(),
        "bomb.gif": b"GIF89a"
        + 2 * side
        + b"\x80\0\0"
        + bytes(6)
        + b","
        + bytes(4)
        + 2 * side
        + b"\0\2\2D\1\0;",
        "bomb.bmp": b"BM" + bytes(8) + b"6\0\0\0(\0\0\0" + 2 * (side + bytes(2)) + b"\1\0\x18\0" + bytes(24),
        "bomb.jpg": jpeg(1).replace(b"\0\x46\0\x5a", b"\xff\xff\xff\xff"),
        "scans.jpg": b"\xff\xd8" + b"\xff\xda\0\0" * 501,
        "sparse.jpg": b"\xff\xd8",
    }
    for name, data in bombs.items():
        Path(name).write_bytes(data)
    os.truncate("sparse.jpg", 1 << 40)
    thin = {"1x5000.png": (1, 5000), "5000x1.jpg": (5000, 1), "1x1.png": (1, 1)}
    for name, size in thin.items():
        flower(1, size).save(name)
    words = [sys.executable, "-c", MEASURED, str(CODE), *bombs, *thin]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    *said, last = done.stdout.splitlines()
    refused = [line.split() for line in said[: len(bombs)]]
    assert [name for name, _ in refused] == list(bombs), done.stderr
    assert {kind for _, kind in refused} <= {"ValueError", "DecompressionBombError"}, said
    assert said[len(bombs) :] == [f"{name} (32, 32, 3)" for name in thin]
    assert float(last.split()[0]) < 40 and float(last.split()[1]) < 2  # MiB, seconds of processor


def test_hostile_files_cost_one_row_each(run, code):
    rng = random.Random(0)
    webp, png = io.BytesIO(), io.BytesIO()
    flower(1).save(webp, "WEBP")
    flower(1).quantize(30).save(png, "PNG")
    seeds = [jpeg(1), jpeg(2, progressive=True), webp.getvalue(), png.getvalue()]
    for number in range(240):
        Path(f"test_dataset/{number:04d}.jpg").write_bytes(mutated(seeds[number % 4], rng))
    number, rows = run()
    assert number == 0
    assert [row[0] for row in rows[1:]] == [f"{n:04d}.jpg" for n in range(240)]
    assert all(row[1] in IDS and 0 < float(row[2]) <= 1 for row in rows[1:])
    about = json.loads(Path("out/submission.json").read_text())
    assert about["predicted"] + len(about["unreadable"]) == 240 and about["unreadable"]


def test_two_runs_and_any_number_of_threads_give_the_same_bytes(run):
    fill(7)
    tables = []
    for threads in ("1", "1", "3"):
        assert run("--threads", threads)[0] == 0
        tables.append(Path("out/submission.csv").read_bytes())
    assert tables[0] == tables[1] == tables[2]


def test_neither_order_nor_company_change_a_row(run):
    """All at once, in three parts, and in the opposite order: the same classes, and confidences to rounding."""
    fill(36)
    files = sorted(Path("test_dataset").iterdir())
    data = [file.read_bytes() for file in files]

    def rows(chosen: list[int]) -> list[tuple[str, float]]:
        shutil.rmtree("test_dataset")
        Path("test_dataset").mkdir()
        for place, number in enumerate(chosen):
            Path(f"test_dataset/{place:03d}.jpg").write_bytes(data[number])
        return [(row[1], float(row[2])) for row in run("--threads", "3")[1][1:]]

    whole = rows(list(range(36)))
    parts = [row for start in (0, 12, 24) for row in rows(list(range(start, start + 12)))]
    for other in (parts, rows(list(range(36))[::-1])[::-1]):
        assert [row[0] for row in other] == [row[0] for row in whole]
        np.testing.assert_allclose([row[1] for row in other], [row[1] for row in whole], atol=1e-5)


def test_a_clock_that_stands_still_stops_nothing(run, code, monkeypatch):
    """As Windows' does for 16 ms at a time."""
    fill(2)
    monkeypatch.setattr(code.predict, "time", types.SimpleNamespace(monotonic=lambda: 1.0))
    assert run()[0] == 0


class Sums:
    """In place of the networks on a GPU: the sum of a picture's pixels."""

    def __init__(self, crops):
        self.device, self.bundle, self.sizes = torch.device("cuda"), {"crops": crops}, []

    def logits(self, pictures):
        self.sizes.append(len(pictures))
        return np.array([[[[array.sum()]]] for (array,) in pictures], dtype=np.float32)


def test_a_picture_that_found_no_room_is_read_again(code, monkeypatch):
    """Too little memory or too few handles for all threads at once is no fault of the picture."""
    faults = {b"0": MemoryError(), b"2": OSError(errno.EMFILE, "Too many open files")}

    def prepare(path, crops):
        if fault := faults.pop(os.path.basename(path), None):
            raise fault
        return [np.full((2, 2, 3), 1, np.uint8)]

    monkeypatch.setattr(code.pictures, "prepare", prepare)
    table = code.table.Table(
        [b"%d" % n for n in range(4)], IDS, prior=[1, 0, 0], header=["filename", "category_id"]
    )
    found = [
        row
        for rows, _ in code.predict.predicted(
            Sums([]), code.inputs.Folder(b"."), table=table, threads=2, batch=2
        )
        for row in rows
    ]
    assert found == [0, 1, 2, 3] and not table.unreadable and not faults


def test_words_on_unreadable_pictures_fit_into_a_pipe(code, monkeypatch, capfd):
    """Who starts it and reads what it says only at the end would else wait for ever: a pipe holds 64 KiB."""
    names = [b"%0200d.jpg" % n for n in range(2000)]
    table = code.table.Table(names, IDS, prior=[1, 0, 0], header=["filename", "category_id"])
    assert all(
        rows == []
        for rows, _ in code.predict.predicted(
            Sums([]), code.inputs.Folder(b"nowhere"), table=table, threads=2, batch=16
        )
    )
    assert len(table.unreadable) == 2000
    said = capfd.readouterr().err
    assert len(said.splitlines()) > 20 and len(said) < 1 << 15


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batches_for_a_gpu_keep_rows_together(code, batch):
    """The path of a GPU with a stand-in that gives the sum of a picture's pixels."""
    crop = [{"height": 8, "width": 8, "factor": 1.0, "interpolation": "bicubic", "stored_side": None}]
    Path("some").mkdir()
    for number in range(8):
        flower(number).save(f"some/{number}.png")
    Path("some/4.png").write_bytes(b"")
    table = code.table.Table(
        [b"%d.png" % n for n in range(8)], IDS, prior=[0.2, 0.5, 0.3], header=["filename", "category_id"]
    )
    members = Sums(crop)
    found = {}
    for rows, logits in code.predict.predicted(
        members, code.inputs.Folder(b"some"), table=table, threads=2, batch=batch
    ):
        found.update(zip(rows, logits.ravel().tolist(), strict=True))
    want = {n: float(code.pictures.prepare(b"some/%d.png" % n, crop)[0].sum()) for n in range(8) if n != 4}
    assert found == want and list(table.unreadable) == [4]
    assert members.sizes[0] == 1 and max(members.sizes) <= batch


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_a_torch_that_calls_torchscript_deprecated_says_nothing(kind, code, exported, monkeypatch):
    """As torch 2.13 and 2.15 word it; warnings are errors here."""
    load = torch.jit.load

    def deprecated(*args, **kwargs):
        warnings.warn("`torch.jit.load` is deprecated. Please switch to `torch.export`.", kind, stacklevel=2)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch.jit, "load", deprecated)
    description, hashes = code.bundles.read(str(exported[0]))
    assert code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu").notes == []


def test_a_torch_that_does_not_know_this_numpy_is_enough(code, exported, monkeypatch):
    """As torch before 2.3 beside NumPy 2: `RuntimeError: Numpy is not available`."""

    def missing(*_):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch, "from_numpy", missing)
    monkeypatch.setattr(torch.Tensor, "numpy", missing)
    description, hashes = code.bundles.read(str(exported[0]))
    assert code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu").notes == []


def test_short_memory_halves_the_batch(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported[0]))
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu")
    crops = [
        [np.full((c["height"], c["width"], 3), 9 * n, np.uint8) for c in description["crops"]]
        for n in range(5)
    ]
    want, whole = networks.logits(crops), networks._run

    def short(pictures):
        if len(pictures) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(pictures)

    monkeypatch.setattr(networks, "_run", short)
    np.testing.assert_allclose(networks.logits(crops), want, atol=1e-5)

    def full(pictures):
        if networks.device.type == "cuda":
            sizes.append(len(pictures))
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(pictures)

    sizes, networks.device = [], torch.device("cuda")
    monkeypatch.setattr(networks, "_run", full)
    np.testing.assert_allclose(networks.logits(crops), want, atol=1e-5)
    assert sizes == [5, 2, 1] and networks.notes == [
        "cuda in fp32: CUDA out of memory. Tried to allocate 2.00 GiB; going on with cpu in fp32"
    ]


def test_a_member_without_finite_logits_has_no_say(code, exported):
    description, hashes = code.bundles.read(str(exported[0]))
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu")
    logits = np.ones((3, 2, 4, 3), np.float32)
    logits[:, 1] = 3
    logits[1, 1, 2, 0] = np.nan
    logits[2] = np.inf
    fused = networks.fuse(logits)
    np.testing.assert_allclose(fused[:2] * 1.5, [[2, 2, 2], [1, 1, 1]])
    table = code.table.Table(
        [b"a", b"b", b"c"], IDS, prior=[0.2, 0.5, 0.3], header=["filename", "category_id"]
    )
    table.fill([0, 1, 2], fused)
    assert table.known.tolist() == [True, True, False] and 2 in table.unreadable


def test_columns_and_order_are_the_samples(run, code, monkeypatch):
    fill(3)
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    Path("ref").mkdir()
    sample = Path("ref/predictions_sample.csv")
    sample.write_text("\ufeffImage,Label\r\n002.jpg,1\r\n000.jpg,1\r\n001.jpg,1\r\n", encoding="utf-8")
    _, rows = run()
    assert rows[0] == ["Image", "Label"] and [row[0] for row in rows[1:]] == ["002.jpg", "000.jpg", "001.jpg"]
    sample.write_text("ImageId,Label\n001,0\n000,0\n002,0\n")  # ids are file names without their ending
    found = {row[0].removesuffix(".jpg"): row[1] for row in rows[1:]}
    _, rows = run()
    assert [row[0] for row in rows] == ["ImageId", "001", "000", "002"] and dict(rows[1:]) == found
    sample.write_text("filename,category_id,confidence\nother.jpg,1,1\n")
    _, rows = run()
    assert len(rows[0]) == 3 and [row[0] for row in rows[1:]] == ["000.jpg", "001.jpg", "002.jpg"]
    _, rows = run("--two-columns")
    assert rows[0] == ["filename", "category_id"] and all(len(row) == 2 for row in rows)


@pytest.mark.parametrize("place", ["absent", "test_dataset", "a.jpg"])
def test_a_folder_without_photographs_gives_a_header(code, exported, place):
    Path("test_dataset").mkdir()
    Path("a.jpg").write_bytes(jpeg(1))
    with pytest.raises(
        code.bundles.Problem, match=f"no photographs below {place}; give a folder with"
    ) as problem:
        code.predict.main([place, "out.csv", "--bundle", str(exported[0])])
    assert problem.value.code == 2
    assert Path("out.csv").read_bytes() == b"filename,category_id,confidence\n"


def test_no_photographs_is_said_and_never_replaces_a_table(run, capsys):
    number, rows = run()
    assert (number, rows) == (2, [["filename", "category_id", "confidence"]])
    Path("out/submission.csv").write_text("filename\nmine\n")
    assert run()[0] == 2 and rows_of(Path("out/submission.csv"))[1] == ["mine"]


def test_without_a_bundle_one_line_says_what_to_do(code, monkeypatch):
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    folder = Path("model/exp")
    folder.mkdir(parents=True)
    for name in (
        "best_combo__vit__fold0_seed42_epoch3_score0.9000",
        "last__vit__fold0_seed42_epoch3_score0.9000",
    ):
        (folder / f"{name}.pth").write_bytes(b"")
    with pytest.raises(
        code.bundles.Problem, match=r"no bundle in model/bundle \(1 members beside it\); run python -m"
    ) as problem:
        code.predict.main(["a", "b.csv", "--bundle", "model/bundle"])
    assert problem.value.code == 4 and not Path("b.csv").exists()


def test_without_a_bundle_every_row_is_the_training_datas_commonest_class(guessed):
    fill(2)
    guessed("out.csv")
    assert [row[1:] for row in rows_of(Path("out.csv"))[1:]] == [["007", "0.600000"]] * 2


def test_without_any_classes_every_row_is_the_samples_commonest(guessed):
    fill(2)
    shutil.rmtree("data")
    Path("ref").mkdir()
    Path("ref/predictions_sample.csv").write_text("filename,category_id\nx.jpg,7\ny.jpg,007\nz.jpg,007\n")
    guessed("out.csv")
    assert rows_of(Path("out.csv")) == [["filename", "category_id"], ["000.jpg", "007"], ["001.jpg", "007"]]


@pytest.fixture
def evaluated(run, code, monkeypatch):
    """Two members and the programs that evaluate leaves beside them; one is a backbone whose views have weights."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    folder, made = Path("results/model/exp"), load(None, ["exp.name=exp", "tta.scales=[32,64]"])
    paths = [member(folder, name, seed=seed) for seed, name in enumerate(("resnet10t", "test_vit"))]
    leave_programs(paths, np.array([0.25, 0.75]), recipe=made, temperature=1.5)
    fill(5)
    return paths


def unbundled(code, *words: str) -> tuple[int, bytes, dict[str, object]]:
    """Exit code, table and description of a run that is not told of any bundle."""
    try:
        number = code.predict.main(["test_dataset", "own.csv", "--threads", "1", *words])
    except code.bundles.Problem as problem:
        number = problem.code
    return number, Path("own.csv").read_bytes(), json.loads(Path("own.json").read_text())


def test_without_a_bundle_the_members_are_run_as_evaluate_left_them(run, code, evaluated, capsys):
    number, table, about = unbundled(code)
    assert number == 0 and about["members"] == [path.stem for path in evaluated]
    assert "no bundle; taking the members above" in capsys.readouterr().out
    whole = Path("whole")
    whole.mkdir()
    words = ["exp.name=exp", "tta.scales=[32,64]", "bundle.dtype=fp32"]
    members = load_members(evaluated, "fp32")
    write(whole, members, shares=np.array([0.25, 0.75]), recipe=load(None, words), temperature=1.5)
    assert run("--bundle", "whole")[0] == 0
    assert Path("out/submission.csv").read_bytes() == table
    left = sum(path.stat().st_size for path in Path("results/model/exp/programs").glob("*.safetensors"))
    assert left < 0.1 * sum(path.stat().st_size for path in evaluated)


def test_a_bundle_goes_before_members(run, code, evaluated, exported):
    shutil.copytree(exported[0], "results/model/bundle")
    assert unbundled(code)[2]["members"] == [member.path.stem for member in exported[1]]


def test_a_member_that_is_not_the_evaluated_one_is_left_out(run, code, evaluated, capsys):
    member(evaluated[0].parent, seed=7, name=evaluated[0].name)
    number, _, about = unbundled(code)
    assert number == 0 and about["members"] == [evaluated[1].stem]
    assert f"{evaluated[0].name} is damaged or another one" in capsys.readouterr().err
    evaluated[1].unlink()
    assert unbundled(code)[0] == 3


class Payload:
    """What runs a command when it is unpickled."""

    def __init__(self, call: object = os.mkdir, *words: object) -> None:
        self.call, self.words = call, words or ("executed",)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.words


PAYLOADS = {
    "mkdir": Payload(),
    "exec": Payload(exec, "import os; os.mkdir('executed')"),
    "eval": Payload(eval, "__import__('os').mkdir('executed')"),
    "process": Payload(subprocess.call, ["mkdir", "executed"]),
    "import": Payload(importlib.import_module, "executed"),
    "pickle": Payload(pickle.loads, pickle.dumps(Payload())),
    "load": Payload(torch.load, "executed.pt"),
}


@pytest.mark.parametrize("place", ["alone", "tensors", "meta", "key", "raw"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_in_a_checkpoint_is_run(code, name, place):
    Path("executed.py").write_text("import os; os.mkdir('executed')")
    own, buffer = PAYLOADS[name], io.BytesIO()
    whole = {"alone": own, "tensors": {"tensors": {"a": own}}, "meta": {"tensors": {}, "meta": own}}
    whole["key"] = {"tensors": {}, "more": [{"x": (own, torch.zeros(1))}]}
    if place == "raw":
        pickle.dump(own, buffer)
    else:
        torch.save(whole[place], buffer)
    with pytest.raises(
        ValueError, match=r"no plain checkpoint; nothing in it was run|is no checkpoint of training"
    ):
        code.networks.read_checkpoint(bytearray(buffer.getvalue()))
    assert not Path("executed").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_member_is_never_run(run, code, evaluated, capsys, legacy):
    """Even where whoever placed it also wrote its hash down."""
    torch.save({"tensors": Payload()}, evaluated[0], _use_new_zipfile_serialization=not legacy)
    own = Path("results/model/exp/programs/SHA256")
    lines = [line for line in own.read_text().splitlines() if evaluated[0].name not in line]
    lines.append(f"{hashlib.sha256(evaluated[0].read_bytes()).hexdigest()}  ../{evaluated[0].name}")
    own.write_text("\n".join(lines) + "\n")
    number, _, about = unbundled(code)
    assert number == 0 and about["members"] == [evaluated[1].stem] and not Path("executed").exists()
    fault = "is no checkpoint of training" if legacy else "nothing in it was run"
    assert fault in capsys.readouterr().err
    torch.load(evaluated[0], weights_only=False)  # the payload is one
    assert Path("executed").exists()


@pytest.mark.parametrize("name", ["bundle.json", "SHA256"])
def test_a_damaged_description_is_refused(code, exported, name):
    shutil.copytree(exported[0], "copy")
    path = Path("copy", name)
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(jpeg(1))
    with pytest.raises(
        code.bundles.Problem, match=r"damaged .* every row of .* is the class prior"
    ) as problem:
        code.predict.main(["photos", "b.csv", "--bundle", "copy"])
    assert problem.value.code == 3
    assert rows_of(Path("b.csv"))[1] == ["a.jpg", "012", f"{9 / 16:.6f}"]


@pytest.mark.parametrize(
    ("name", "text", "number"),
    [
        ("bundle.json", None, 4),
        ("SHA256", None, 3),
        ("SHA256", "caf\u00e9", 3),
        ("bundle.json", "{", 3),
        ("bundle.json", "[]", 3),
        ("bundle.json", "{}", 2),
    ],
)
def test_a_description_that_is_missing_or_none_is_one_line_and_a_table(code, exported, name, text, number):
    """Also where whoever wrote it also wrote its hash down."""
    shutil.copytree(exported[0], "copy")
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(jpeg(1))
    path, sums = Path("copy", name), Path("copy/SHA256")
    if text is None:
        path.unlink()
    else:
        path.write_text(text, encoding="utf-8")
    if text and path != sums:
        sums.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  bundle.json\n")
    with pytest.raises(code.bundles.Problem, match=r"^\S.*every row of .* is the class prior$") as problem:
        code.predict.main(["photos", "b.csv", "--bundle", "copy"])
    assert problem.value.code == number
    assert rows_of(Path("b.csv"))[1] == ["a.jpg", "012", f"{9 / 16:.6f}"]


def header(**words: object) -> bytes:
    """Weights with one tensor, described wrongly."""
    own = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **words}}).encode()
    return len(own).to_bytes(8, "little") + own + bytes(4)


WEIGHTS = {
    "empty": b"",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "long header": (1 << 62).to_bytes(8, "little") + b"{}",
    "no header": (2).to_bytes(8, "little") + b"[]",
    "beyond": header(data_offsets=[0, 1 << 40]),
    "before": header(data_offsets=[-4, 0]),
    "shape": header(shape=[7]),
    "kind": header(dtype="F33"),
    "words": header(shape="1"),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", ["absent", "cut", "flipped", *WEIGHTS])
def test_weights_that_are_none_leave_their_member_out(code, exported, monkeypatch, name, known):
    """Even where whoever wrote them also wrote their hash down."""
    shutil.copytree(exported[0], "copy")
    path = Path("copy/weights_0.safetensors")
    path.write_bytes(WEIGHTS.get(name, path.read_bytes()[:-1]))
    if name == "flipped":
        shutil.copy(exported[0] / path.name, path)
        flip(path)
    description, hashes = code.bundles.read("copy")
    if known and name in WEIGHTS:
        hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    if name == "absent":
        path.unlink()
    monkeypatch.setattr(code.networks.Networks, "_place", lambda *_, **__: None)
    networks = code.networks.Networks("copy", description, hashes=hashes, device="cpu")
    assert [own["name"] for own in networks.members] == [exported[1][1].path.stem]
    assert len(networks.notes) == 1 and networks.notes[0].startswith(
        f"member {exported[1][0].path.stem} left out: "
    )


def test_a_bundle_of_another_format_is_refused(code, exported, monkeypatch):
    monkeypatch.setattr(code.bundles, "FORMAT", 99)
    with pytest.raises(code.bundles.Problem, match="has format 2, this predictor reads 99"):
        code.predict.main(["a", "b.csv", "--bundle", str(exported[0])])


def test_damaged_members_are_left_out(run, code, exported, capsys):
    fill(2)
    shutil.copytree(exported[0], "copy")
    flip(Path("copy/weights_0.safetensors"))
    number, rows = run("--bundle", "copy")
    assert number == 0 and len(rows) == 3
    assert "weights_0.safetensors is damaged" in capsys.readouterr().err
    assert len(json.loads(Path("out/submission.json").read_text())["members"]) == 1
    flip(Path("copy/weights_1.safetensors"))
    number, rows = run("--bundle", "copy")
    assert number == 3 and [row[1] for row in rows[1:]] == ["012", "012"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def guarded(code, monkeypatch):
    """Run work in place of the networks: it gets the table and the numbers of deaths. Exit code and rows follow."""
    monkeypatch.setattr(code.guard, "sys", types.SimpleNamespace(modules={}, platform="linux"))

    def call(work: object, rows: int = 6) -> tuple[int, object, list[str]]:
        said: list[str] = []
        names = [b"%d.jpg" % number for number in range(rows)]
        table = code.table.Table(names, IDS, prior=[0.2, 0.5, 0.3], header=["filename", "category_id"])
        table.open("guarded.csv")
        return code.guard.run(lambda *numbers: work(table, *numbers), table, said.append), table, said

    return call


def know(table: object, rows: list[int]) -> int:
    for row in rows:
        table.fill([row], np.eye(3)[:1])
    return 0


def test_an_error_nobody_foresaw_is_tried_again_with_less(guarded):
    """No more threads, say: no picture is blamed for it, not even one that was being read."""

    def work(table, deaths, unexplained):
        table.reading[3] = time.monotonic()
        know(table, [deaths])
        if deaths < 2:
            raise RuntimeError("can't start new thread")
        return know(table, table.waiting()) if unexplained == 2 else 9

    number, table, said = guarded(work)
    assert (
        number == 0
        and table.known.all()
        and all("died (an error)" in line for line in said)
        and len(said) == 2
    )


def test_what_dies_over_and_over_is_given_up(guarded):
    def work(table, deaths, unexplained):
        if (deaths, unexplained) != (2, 2):
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(70)

    number, table, said = guarded(work)
    assert number == 4 and table.done() == 0
    assert [line.split("(")[-1].split(")")[0] for line in said[:3]] == ["SIGKILL", "SIGKILL", "an error"]
    assert said[3].startswith("giving up after 3 deaths; the other rows of")


def test_the_last_row_may_be_the_one_that_kills(guarded):
    def work(table, *_):
        for row in table.waiting():
            table.reading[row] = time.monotonic()
            if row == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            table.reading[row] = know(table, [row])

    number, table, said = guarded(work)
    assert (
        number == 0 and table.unreadable == {5: "reading it killed the process (SIGKILL)"} and len(said) == 1
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
    number, table, said = guarded(lambda table, *_: know(table, table.waiting()))
    assert number == 0 and table.known.all() and not said
    number, _, said = guarded(lambda *_, **__: {}["absent"])
    assert number == 4 and said == ["KeyError: 'absent'"]


def test_after_a_death_that_no_picture_explains_the_cpu_does_it(run, code, monkeypatch):
    """A driver that crashes or stands still would do so again."""
    fill(1)
    seen = []
    monkeypatch.setattr(
        code.predict, "predict", lambda options, *_: seen.append((options.device, options.threads))
    )
    for deaths, unexplained in ((0, 0), (1, 0), (2, 1)):
        monkeypatch.setattr(code.guard, "run", lambda work, *_, told=(deaths, unexplained): work(*told))
        run("--device", "cuda", "--threads", "8")
    assert seen == [("cuda", 8), ("cuda", 4), ("cpu", 2)]


def test_a_machine_that_was_paused_has_no_slow_pictures(code, monkeypatch):
    """A container that is frozen for an hour: the clock goes on, and a picture that was being read is not at fault."""
    table = code.table.Table([b"a.jpg"], IDS, prior=[0.2, 0.5, 0.3], header=["filename", "category_id"])
    begin, end = os.pipe()
    child = os.posix_spawn(
        "/bin/cat", ["cat"], {}, file_actions=[(os.POSIX_SPAWN_DUP2, begin, 0), (os.POSIX_SPAWN_CLOSE, end)]
    )
    clock, naps = [time.monotonic()], iter([0.1, 3600.0, 30.0])

    def sleep(_):
        clock[0] += next(naps, 0.0)
        if clock[0] - table.reading[0] > 3620:
            os.close(end)  # cat ends
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

    table.reading[0] = clock[0]
    monkeypatch.setattr(code.guard, "time", types.SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    assert code.guard._watch(child, table) == (0, False)
    os.close(begin)


@pytest.mark.parametrize("place", ["file/table.csv", "/dev/full", "/proc/table.csv", "folder.csv/table.csv/"])
def test_another_place_is_found_for_the_table(guessed, capsys, place):
    fill(1)
    Path("file").write_text("")
    Path("folder.csv").mkdir()
    Path("folder.csv/table.csv").write_text("")
    guessed(place)
    found = Path(Path(place).name if not place.endswith("/") else "submission.csv")
    assert len(rows_of(found)) == 2
    assert f"cannot be written; the table goes to {found.absolute()}" in capsys.readouterr().err


def test_places_that_there_are_not_are_no_hindrance(code, monkeypatch):
    """A container that is read-only but for the folder of the table, started from a folder that is gone."""

    def gone():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    place = Path.cwd()
    know_classes(place)
    (place / "data").rename(place / "nowhere")
    Path("test_dataset").mkdir()
    fill(1)
    monkeypatch.setattr(os, "getcwd", gone)
    monkeypatch.setattr(code.table.tempfile, "gettempdir", gone)
    words = [str(place / name) for name in ("test_dataset", "out.csv", "nowhere")]
    with pytest.raises(code.bundles.Problem, match=r"every row of .*out.csv is the class prior"):
        code.predict.main([*words[:2], "--bundle", words[2]])
    assert len(rows_of(place / "out.csv")) == 2
    with pytest.raises(FileNotFoundError, match="No usable temporary"):
        code.predict.main([words[0], "/proc/out.csv", "--bundle", words[2]])


@pytest.mark.parametrize(
    ("place", "found"), [("folder", "folder/submission.csv"), ("new/", "new/submission.csv")]
)
def test_a_table_may_be_asked_for_by_its_folder(guessed, place, found):
    fill(1)
    Path("folder").mkdir()
    guessed(place)
    assert len(rows_of(Path(found))) == 2


def test_words_about_a_table_never_take_its_place(guessed):
    fill(1)
    guessed("out.JSON")
    assert len(rows_of(Path("out.JSON"))) == 2 and json.loads(Path("out.JSON.json").read_text())["rows"] == 1


def test_a_place_that_is_lost_on_the_way_costs_nothing(run, code, monkeypatch, capsys):
    """The first table is written, later ones cannot be: all rows are in another place at the end."""
    fill(3)

    def work(_, table, say):
        os.rename("out", "gone")
        Path("out").write_text("")
        table.update()
        return know(table, table.waiting())

    monkeypatch.setattr(code.guard, "run", work)
    number, _ = run()
    assert number == 4 and [row[1] for row in rows_of(Path("submission.csv"))[1:]] == ["7", "7", "7"]
    assert [row[1] for row in rows_of(Path("gone/submission.csv"))[1:]] == ["012", "012", "012"]
    assert f"the table goes to {Path('submission.csv').absolute()}" in capsys.readouterr().err


def test_a_limit_on_the_size_of_files_keeps_the_old_table(tmp_path):
    know_classes(tmp_path)
    os.mkdir("test_dataset")
    for number in range(300):
        Path(f"test_dataset/{number}.jpg").write_bytes(b"")
    Path("out.csv").write_text("old")
    words = f"ulimit -f 1; exec {sys.executable} {CODE / 'predict.py'} test_dataset out.csv --bundle nowhere"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(["sh", "-c", words], env=environment, capture_output=True, text=True)
    assert done.returncode == 4 and "File too large" in done.stderr and done.stderr.count("\n") == 1
    assert Path("out.csv").read_text() == "old"
    assert sorted(os.listdir()) == ["data", "out.csv", "test_dataset"]


def test_what_is_no_regular_file_is_never_replaced(code):
    os.mkfifo("pipe")
    with pytest.raises(FileExistsError, match="not a regular file"):
        importlib.import_module("table").replace("pipe", b"")


def hand_in(root: Path, exported: Path, count: int) -> Path:
    """The folder that an evaluator gets."""
    root.mkdir()
    for number in range(count):
        (root / f"{number:03d}.jpg").write_bytes(jpeg(number))
    return sandbox.copy_hand_in(root, exported, sorted(root.glob("*.jpg")))


def test_a_bare_machine_is_enough(tmp_path, exported):
    root = hand_in(tmp_path / "root", exported[0], 3)
    for path in [*root.rglob("*"), root]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder = b"caf\xe9"
    os.mkdir(folder)
    Path(os.fsdecode(folder), os.fsdecode(b"\xe9.jpg")).write_bytes(b"")
    shutil.copy(root / "test_dataset/000000.jpg", os.path.join(folder, b"ok.jpg"))
    script = sandbox.BARE.replace("{blocked!r}", repr(set(sandbox.BLOCKED)))
    words = [
        sys.executable,
        "-I",
        "-c",
        script,
        str(root / "code/predict.py"),
        folder,
        "out.csv",
        "--threads",
        "1",
    ]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert Path("out.csv").read_bytes().splitlines()[1].startswith(b"ok.jpg,")
    assert Path("out.csv").read_bytes().splitlines()[2].startswith(b"\xe9.jpg,012,")
    assert not list(root.rglob("*.pyc"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_a_whole_table(tmp_path, exported, number):
    root = hand_in(tmp_path / "root", exported[0], 60)
    words = [sys.executable, str(root / "code/predict.py"), "--threads", "1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    path = root / "results/results/submission.csv"
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.Random(number).random())
    process.send_signal(number)
    told = time.monotonic()
    process.wait(timeout=60)
    assert time.monotonic() - told < 2
    process.communicate(timeout=60)
    rows = rows_of(path)
    assert len(rows) == 61 and all(row[1] in IDS and 0 < float(row[2]) <= 1 for row in rows[1:])
    assert process.returncode == (-9 if number == signal.SIGKILL else 143) or process.returncode == 0
    if number == signal.SIGTERM:
        assert not [name for name in os.listdir(path.parent) if name.endswith(".tmp")]


KILLED = """
import itertools, json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from table import Table
table = Table([b"a.jpg", b"b.jpg"], ["7", "x"], [0.4, 0.6], ["filename", "category_id"])
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
    table.sweep(child)
    assert open("out.csv", "rb").read() in (old, table.text()), points
    assert json.load(open("out.json"))["rows"] == 2
    assert sorted(os.listdir()) == ["out.csv", "out.json"]
    if status == 0:
        break
assert open("out.csv", "rb").read() == table.text() != old
print(points)
"""


def test_a_kill_at_any_point_of_writing_leaves_the_old_table_or_the_new():
    """Killed before each call into Python or C that writing makes and after it, one after the other."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(CODE)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


STOPPED = """
import os, signal, sys, time
sys.path.insert(0, {code!r})
import predict
def half(options, bundle, hashes, given, table):
    for row in range(int(options.batch)):
        table.fill([row], predict.np.eye(3)[:1])
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(600)
predict.predict = half
sys.exit(predict.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("share", [5, 50, 95])
def test_a_time_limit_keeps_what_is_known(exported, share):
    """SIGTERM after so many of a hundred rows, of which no table was yet written."""
    os.mkdir("test_dataset")
    for number in range(100):
        Path(f"test_dataset/{number:02d}.jpg").write_bytes(b"")
    code = STOPPED.replace("{code!r}", repr(str(CODE)))
    words = ["test_dataset", "out.csv", "--bundle", str(exported[0]), "--batch", str(share)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert [row[1] for row in rows_of(Path("out.csv"))[1:]] == ["7"] * share + ["012"] * (100 - share)
    assert json.loads(Path("out.json").read_text())["predicted"] == share
    assert sorted(os.listdir()) == ["out.csv", "out.json", "test_dataset"]


BENT = """
import os, sys, time
sys.path.insert(0, {code!r})
import guard, pictures, predict
guard.SLOW = 2.0
honest = pictures.read
def read(path):
    if b"crash" in path: os.abort()
    if b"slow" in path: time.sleep(600)
    return honest(path)
pictures.read = read
sys.exit(predict.main(sys.argv[1:]))
"""


def test_a_decoder_that_crashes_or_never_ends_costs_one_row(exported):
    """The decoder aborts on one file while a second thread reads what is beside it, and sleeps on the last.

    What died takes its logits with it, and that is said.
    """
    Path("test_dataset").mkdir()
    fill(5)
    for name in ("001crash.jpg", "zslow.jpg"):
        Path("test_dataset", name).write_bytes(jpeg(1))
    words = ["test_dataset", "out.csv", "--bundle", str(exported[0]), "--threads", "2", "--logits", "l.npz"]
    code = BENT.replace("{code!r}", repr(str(CODE)))
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    about = json.loads(Path("out.json").read_text())
    assert about["rows"] == 7 and about["predicted"] == 5 and len(about["unreadable"]) == 2
    assert about["unreadable"]["zslow.jpg"] == "not read within 2 s"
    assert "killed the process (SIGABRT)" in about["unreadable"]["001crash.jpg"]
    assert [row[1] for row in rows_of(Path("out.csv"))[1:] if "crash" in row[0]] == ["012"]
    assert "l.npz lacks 5 rows that a process which died had predicted" in done.stderr


def test_a_picture_that_ends_while_it_is_watched_is_not_slow(code):
    """Whenever it is asked which rows are being read, they end before the answer can be used."""

    class Ending(np.ndarray):
        def __gt__(self, other):
            answer = np.asarray(self) > other
            self[...] = 0
            return answer

    table = code.table.Table(
        [b"a.jpg", b"b.jpg"], IDS, prior=[0.2, 0.5, 0.3], header=["filename", "category_id"]
    )
    table.reading[:] = time.monotonic()
    table.reading = table.reading.view(Ending)
    child = os.posix_spawn("/bin/true", ["true"], {})
    assert code.guard._watch(child, table) == (0, False)


def test_a_full_disk_keeps_the_old_table(code, monkeypatch):
    Path("a.csv").write_text("old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        code.table.replace("a.csv", b"new")
    assert Path("a.csv").read_text() == "old" and os.listdir() == ["a.csv"]


def test_a_link_to_the_table_stays_a_link(run):
    fill(1)
    Path("real").mkdir()
    Path("link.csv").symlink_to("real/table.csv")
    assert run(csv_path="link.csv")[0] == 0
    assert Path("link.csv").is_symlink() and len(rows_of(Path("real/table.csv"))) == 2


def test_the_evaluator_may_read_the_table_whatever_the_umask(run):
    fill(1)
    before = os.umask(0o077)
    try:
        run()
    finally:
        os.umask(before)
    assert Path("out/submission.csv").stat().st_mode & 0o777 == 0o644


def test_the_bytes_of_a_table(code):
    table = code.table.Table(
        [b"a,b.jpg", b"\xe9.jpg"],
        ["7", "012"],
        prior=[0.25, 0.75],
        header=["filename", "category_id", "confidence"],
    )
    table.fill([0], np.array([[2.0, 0.0]]))
    assert table.text() == (b'filename,category_id,confidence\n"a,b.jpg",7,0.880797\n\xe9.jpg,012,0.750000\n')


def test_a_gpu_that_does_not_work_leaves_the_work_to_the_cpu(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported[0]))
    monkeypatch.setattr(
        code.networks, "choices", lambda *_, **__: [("cuda:9", torch.float16), ("cpu", torch.float32)]
    )
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="auto")
    assert str(networks.device) == "cpu" and networks.dtype == torch.float32
    assert len(networks.notes) == 1 and networks.notes[0].startswith("cuda:9 in fp16: ")


@pytest.mark.parametrize(
    ("off", "device", "dtype"),
    [
        ((0.2, 0.0, 0.0), "cuda", torch.float32),
        ((np.inf, 0.1, 0.0), "cpu", torch.float32),
        ((0.01, 1, 1), "cuda", torch.float16),
    ],
)
def test_a_device_that_computes_wrongly_is_passed_over(code, exported, monkeypatch, off, device, dtype):
    """By how much the test picture's logits are off in half precision, in fp32, on the CPU."""
    description, hashes = code.bundles.read(str(exported[0]))
    errors = iter(off)
    monkeypatch.setattr(code.networks, "program", lambda *_, **__: None)
    monkeypatch.setattr(code.networks.Networks, "_inputs", lambda *_, **__: [])
    monkeypatch.setattr(code.networks.Networks, "_self_test", lambda _: next(errors))
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cuda")
    assert (str(networks.device), networks.dtype) == (device, dtype)
    passed = [f"logits of the test picture are {error:.2g} off" for error in off[: len(networks.notes)]]
    assert [note.split(": ")[1] for note in networks.notes] == passed


def test_what_half_precision_cannot_hold_is_computed_in_fp32(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported[0]))
    white = [np.full((crop["height"], crop["width"], 3), 255, np.uint8) for crop in description["crops"]]
    plain = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu").logits([white])
    honest = code.networks.Networks._forward

    def forward(self, images, view, inputs):
        found = honest(self, images, view, inputs)
        return found * np.inf if self.dtype == torch.float16 and images.min() == 255 else found

    monkeypatch.setattr(code.networks.Networks, "_forward", forward)
    monkeypatch.setattr(
        code.networks, "choices", lambda *_, **__: [("cpu", torch.float16), ("cpu", torch.float32)]
    )
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="auto")
    assert networks.dtype == torch.float16 and networks.notes == []
    np.testing.assert_array_equal(networks.logits([white]), plain)
    assert networks.notes == ["cpu in fp16: logits that are not finite; going on with cpu in fp32"]


@pytest.mark.parametrize(
    ("device", "half", "native", "names"),
    [
        ("cpu", "gpu", True, ["cpu fp32"]),
        ("cpu", "none", True, ["cpu fp32"]),
        ("cpu", "all", True, ["cpu bf16", "cpu fp32"]),
        ("cpu", "all", False, ["cpu fp32"]),
        ("cuda:1", "all", True, ["cuda:1 fp16", "cuda:1 fp32", "cpu fp32"]),
        ("cuda:1", "gpu", True, ["cuda:1 fp16", "cuda:1 fp32", "cpu fp32"]),
        ("cuda:1", "none", True, ["cuda:1 fp32", "cpu fp32"]),
        ("cpu:0", "gpu", True, ["cpu fp32"]),
    ],
)
def test_where_half_precision_is_tried(code, monkeypatch, device, half, native, names):
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: native)
    found = code.networks.choices(device, half)
    assert [f"{name} {code.networks.NAMES[dtype]}" for name, dtype in found] == names


def test_a_processor_is_asked_for_its_instructions(code, monkeypatch):
    for flags, native in (
        ("avx512f avx512_bf16 sse", True),
        ("amx_bf16", True),
        ("avx512f bf16_fake", False),
    ):
        text = f"model name\t: any\nflags\t\t: {flags}\n\n"
        monkeypatch.setattr(
            code.networks, "open", lambda *_, text=text, **__: io.StringIO(text), raising=False
        )
        assert code.networks.multiplies_bf16() == native

    def absent(*_, **__):
        raise FileNotFoundError("no /proc here")

    monkeypatch.setattr(code.networks, "open", absent)
    assert code.networks.multiplies_bf16() is False


def test_bf16_that_is_wrong_leaves_the_work_to_fp32(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported[0]))
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: True)
    honest = code.networks.Networks._self_test
    monkeypatch.setattr(
        code.networks.Networks,
        "_self_test",
        lambda self: 0.2 if self.dtype == torch.bfloat16 else honest(self),
    )
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu", half="all")
    assert networks.dtype == torch.float32
    assert networks.notes == ["cpu in bf16: logits of the test picture are 0.2 off"]


def test_bf16_that_is_wrong_at_one_size_is_seen_before_the_work(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported[0]))
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: True)
    honest = code.networks.Networks._forward

    def forward(self, images, view, inputs):
        found = honest(self, images, view, inputs)
        return found + (self.dtype == torch.bfloat16 and images.shape[1] == 64)

    monkeypatch.setattr(code.networks.Networks, "_forward", forward)
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu", half="all")
    assert networks.dtype == torch.float32 and len(networks.notes) == 1
    assert networks.notes[0].startswith("cpu in bf16: logits of the test picture are ")


@pytest.mark.parametrize("fault", ["error", "not finite"])
def test_bf16_that_fails_at_work_is_replaced_by_fp32(code, exported, monkeypatch, fault):
    """While threads share the networks; every picture gets the logits of fp32 or of bf16, none is lost."""
    description, hashes = code.bundles.read(str(exported[0]))
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: True)
    rng = np.random.default_rng(0)
    shapes = [(crop["height"], crop["width"], 3) for crop in description["crops"]]
    parts = [
        [[rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes] for _ in range(3)]
        for _ in range(8)
    ]
    exact = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu")
    want = [exact.logits(part) for part in parts]
    honest = code.networks.Networks._forward

    def forward(self, images, view, inputs):
        found = honest(self, images, view, inputs)
        if self.dtype == torch.bfloat16 and len(images) > 1:
            if fault == "error":
                raise RuntimeError("could not create a primitive")
            return found * np.nan
        return found

    monkeypatch.setattr(code.networks.Networks, "_forward", forward)
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu", half="all")
    assert networks.dtype == torch.bfloat16
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(networks.logits, parts))
    assert networks.where() == "cpu, fp32" and len(networks.notes) == 1
    assert networks.notes[0].endswith("; going on with cpu in fp32")
    for mine, theirs in zip(got, want, strict=True):
        assert np.abs(mine - theirs).max() <= 1e-5 * max(1.0, np.abs(theirs).max())


def test_networks_that_half_precision_does_not_fit_are_said_to_run_in_fp32(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported[0]))
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: True)
    for program in description["programs"]:
        program["half_keeps"] = None
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu", half="all")
    assert networks.where() == "cpu, fp32" and networks.notes == []


def test_after_a_death_no_cpu_computes_in_bf16(tmp_path, run, code, monkeypatch):
    """A processor that only claims to have the instructions would kill the next process too."""
    write_bundle(tmp_path / "quick", [member(tmp_path)], "bundle.half=all")
    fill(1)
    seen = []
    monkeypatch.setattr(code.predict, "predict", lambda options, *_: seen.append(options.half))
    for deaths, unexplained in ((0, 0), (1, 0), (1, 1)):
        monkeypatch.setattr(code.guard, "run", lambda work, *_, told=(deaths, unexplained): work(*told))
        run("--bundle", str(tmp_path / "quick"))
    assert seen == ["all", "gpu", "gpu"]


def test_the_bundle_decides_on_half_precision_and_an_option_refuses_it(tmp_path, run, code, monkeypatch):
    write_bundle(tmp_path / "quick", [member(tmp_path)], "bundle.half=all")
    fill(9)
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: True)
    found = {}
    for name, words in (("bf16", []), ("fp32", ["--fp32"])):
        own = ["--device", "cpu", "--bundle", str(tmp_path / "quick"), "--logits", f"{name}.npz"]
        number, rows = run(*words, *own)
        about = json.loads(Path("out/submission.json").read_text())
        assert number == 0 and len(rows) == 10 and about["device"] == f"cpu, {name}"
        found[name] = np.load(f"{name}.npz")["logits"]
    gap = np.abs(found["bf16"] - found["fp32"]).max()
    assert 1e-4 < gap <= 0.05 * max(1.0, np.abs(found["fp32"]).max())


def test_a_gpu_without_half_precision_goes_on_in_fp32(code, exported, monkeypatch):
    """The logits are those of fp32; bf16 and TF32 are never used."""
    description, hashes = code.bundles.read(str(exported[0]))
    views = [np.zeros((crop["height"], crop["width"], 3), np.uint8) for crop in description["crops"]]
    plain = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu").logits([views])
    honest, seen = code.networks.Networks._forward, set()

    def forward(self, images, view, inputs):
        seen.update(value.dtype for value in inputs if value.is_floating_point())
        if self.dtype == torch.float16:
            raise RuntimeError("no kernel for Half")
        return honest(self, images, view, inputs)

    monkeypatch.setattr(code.networks.Networks, "_forward", forward)
    monkeypatch.setattr(
        code.networks, "choices", lambda *_, **__: [("cpu", torch.float16), ("cpu", torch.float32)]
    )
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="auto")
    assert networks.dtype == torch.float32 and len(networks.notes) == 1
    assert "no kernel for Half" in networks.notes[0]
    np.testing.assert_array_equal(networks.logits([views]), plain)
    assert seen == {torch.float16, torch.float32}
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_a_network_that_says_something_else_than_at_export_is_noticed(code, exported):
    description, hashes = code.bundles.read(str(exported[0]))
    description["members"][0]["expected"][0][1] += 0.5
    networks = code.networks.Networks(str(exported[0]), description, hashes=hashes, device="cpu")
    assert any("another version of torch than at export?" in note for note in networks.notes)


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


def test_a_picture_that_vanishes_keeps_its_row(run, code, monkeypatch):
    fill(3)
    found = code.pictures.find

    def find(folder):
        names = found(folder)
        Path("test_dataset/001.jpg").unlink(missing_ok=True)
        return names

    monkeypatch.setattr(code.pictures, "find", find)
    number, rows = run()
    assert number == 0 and [row[0] for row in rows[1:]] == ["000.jpg", "001.jpg", "002.jpg"]
    assert rows[2][1] == "012"


def test_a_picture_that_comes_later_is_told(run, code, monkeypatch, capsys):
    fill(2)
    monkeypatch.setattr(
        code.guard, "run", lambda *_, **__: bool(os.link("test_dataset/000.jpg", "test_dataset/late.jpg"))
    )
    number, rows = run()
    assert number == 0 and [row[0] for row in rows[1:]] == ["000.jpg", "001.jpg"]
    assert "1 photographs came while it ran; run it again for their rows" in capsys.readouterr().err


def test_memory_does_not_grow_with_the_number_of_pictures(code, monkeypatch):
    """However slow the networks, only a few batches are read ahead."""
    waiting, most = 0, 0

    def prepare(path, crops):
        nonlocal waiting
        waiting += 1
        return [np.zeros((2, 2, 3), np.uint8)]

    monkeypatch.setattr(code.pictures, "prepare", prepare)
    table = code.table.Table(
        [b"%d" % n for n in range(5000)], IDS, prior=[1, 0, 0], header=["filename", "category_id"]
    )
    for rows, _ in code.predict.predicted(
        Sums([]), code.inputs.Folder(b"."), table=table, threads=2, batch=16
    ):
        waiting -= len(rows)
        most = max(most, waiting)
        table.known[rows] = True
    assert table.done() == 5000 and most <= 3 * 16


def test_two_runs_at_once_and_nobody_listening_leave_whole_tables(tmp_path, exported):
    root = hand_in(tmp_path / "root", exported[0], 4)
    words = f"{sys.executable} {root / 'code/predict.py'} --threads 1 >&- 2>&-"
    runs = [subprocess.Popen(["sh", "-c", words]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in runs] == [0, 0]
    path = root / "results/results/submission.csv"
    assert len(rows_of(path)) == 5 and len(os.listdir(path.parent)) == 2


@pytest.mark.parametrize(
    "words", [["code/predict.py"], ["-I", "{root}/code/predict.py"], ["link.py"], ["linked/code/predict.py"]]
)
def test_its_own_folder_is_found_however_it_is_started(tmp_path, words):
    root = tmp_path / "some where"
    know_classes((root / "test_dataset").mkdir(parents=True) or root)
    shutil.copytree(CODE, root / "code", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "test_dataset/a.jpg").write_bytes(b"")
    Path("link.py").symlink_to("some where/code/predict.py")
    Path("linked").symlink_to(root)
    place = root if words == ["code/predict.py"] else tmp_path
    done = subprocess.run(
        [sys.executable, *(word.format(root=root) for word in words)], cwd=place, capture_output=True
    )
    assert done.returncode == 4, done.stderr
    assert rows_of(root / "results/results/submission.csv")[1] == ["a.jpg", "007", "0.600000"]
    assert not (root / "code/__pycache__").exists()


PACKAGES = {
    "numpy/__init__.py": ("raise ImportError('\\n\\nIMPORTANT:\\n\\nREAD THIS')", "IMPORTANT: READ THIS"),
    "numpy.py": ("raise ModuleNotFoundError(\"No module named 'numpy'\")", "No module named 'numpy'"),
    "PIL/Image.py": ("", "module 'PIL.Image' has no attribute 'Transpose'"),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_or_too_old_is_one_line(tmp_path, name):
    text, fault = PACKAGES[name]
    shutil.copytree(CODE, tmp_path / "code")
    path = tmp_path / "code" / name
    path.parent.mkdir(exist_ok=True)
    if path.parent.name != "code":
        (path.parent / "__init__.py").touch()
    path.write_text(text)
    done = subprocess.run([sys.executable, str(tmp_path / "code/predict.py")], capture_output=True, text=True)
    assert done.stderr == (
        f"predict: {fault}; needed are torch, numpy and pillow: pip install -U torch numpy pillow\n"
    )


@pytest.mark.parametrize(
    "error", ["ModuleNotFoundError('No module named \"torch\"')", "OSError('c10.dll')", "MemoryError()"]
)
def test_without_torch_every_row_is_the_prior(tmp_path, exported, error):
    shutil.copytree(CODE, tmp_path / "code")
    (tmp_path / "code/torch.py").write_text(f"raise {error}")
    os.mkdir("test_dataset")
    fill(2)
    words = [sys.executable, "code/predict.py", "test_dataset", "out.csv", "--bundle", str(exported[0])]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert ("torch cannot be loaded (" in done.stderr) == ("Memory" not in error)
    assert [row[1] for row in rows_of(Path("out.csv"))[1:]] == ["012", "012"]


def test_little_memory_leaves_a_whole_table(exported):
    """An address space into which torch does not fit."""
    os.mkdir("test_dataset")
    fill(2)
    words = f"ulimit -v 700000; exec {sys.executable} {CODE / 'predict.py'} test_dataset out.csv --bundle {exported[0]}"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(["sh", "-c", words], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 4, done.stderr
    assert [row[1] for row in rows_of(Path("out.csv"))[1:]] == ["012", "012"]


def test_an_old_processor_gives_the_same_rows(run, exported):
    """Without AVX: torch's plain kernels, and those of oneDNN for SSE 4.1."""
    fill(3)
    rows = run()[1]
    words = [
        sys.executable,
        str(CODE / "predict.py"),
        "test_dataset",
        "old.csv",
        "--bundle",
        str(exported[0]),
    ]
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    old = rows_of(Path("old.csv"))
    assert [row[:2] for row in old] == [row[:2] for row in rows]
    np.testing.assert_allclose(
        [float(row[2]) for row in old[1:]], [float(row[2]) for row in rows[1:]], atol=1e-4
    )


def test_help_is_one_screen():
    done = subprocess.run(
        [sys.executable, str(CODE / "predict.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) <= 24


def test_a_stream_that_cannot_be_reconfigured_is_enough():
    """A notebook's."""
    script = (
        "import io, runpy, sys; sys.stdout = io.StringIO(); path = sys.argv.pop(1); "
        "runpy.run_path(path, run_name='__main__')"
    )
    words = [sys.executable, "-c", script, str(CODE / "predict.py"), "--help"]
    assert subprocess.run(words, capture_output=True).returncode == 0
