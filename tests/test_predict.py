"""The predictor: the trainer's pixels and logits, and one right row for every photograph whatever happens."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastflower import checkpoint, recipe
from fastflower.bench.fuzz import mutated
from fastflower.data import pixels
from fastflower.data.betons import BetonWriter, open_beton
from fastflower.data.decode import decode_eval
from fastflower.evaluation import bare, bundle
from fastflower.model.network import NetworkSpec, build_network

CODE = Path(__file__).resolve().parents[1] / "code"
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
) -> Path:
    """A checkpoint with random weights, named as train names it."""
    torch.manual_seed(seed)
    meta = {
        "backbone": backbone, "head": head, "head_scale": 30.0, "margin": 0.3, "num_classes": len(IDS),
        "size": [size, size], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic", "resize_factor": 1.14, "stored_side": 73, "class_ids": IDS, "class_hash": "c1a55",
        "class_counts": [3, 9, 4], "fold": seed, "seed": 42, "epoch": 1, "weights": "ema",
    }  # fmt: skip
    network = build_network(NetworkSpec.from_meta(meta))
    for own, buffer in network.named_buffers():
        if own.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    file = path / (name or f"best_combo__{backbone}__fold{seed}_seed42_epoch1_score0.5000.pth")
    checkpoint.save(file, network.state_dict(), meta)
    return file


def write_bundle(folder: Path, paths: list[Path], *words: str) -> list[bundle.Member]:
    """Export without gates."""
    folder.mkdir(parents=True)
    made = recipe.load(None, ["tta.scales=[32,64]", *words])
    members = bundle.load_members(paths, made.bundle.dtype)
    bundle.write(folder, members, np.full(len(members), 1 / len(members)), made, temperature=1.5)
    return members


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A bundle of two members."""
    place = tmp_path_factory.mktemp("exported")
    members = write_bundle(place / "bundle", [member(place, seed=seed) for seed in (0, 1)])
    return place / "bundle", members


@pytest.fixture
def code(monkeypatch):
    """The predictor's modules, as `python code/predict.py` sees them."""
    monkeypatch.syspath_prepend(str(CODE))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    names = ("predict", "guard", "pictures", "networks", "table")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield type("code", (), {name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def run(code, exported):
    """Run the predictor on test_dataset/ in this process: exit code and rows."""

    def call(*words: str, csv_path: str = "out/submission.csv") -> tuple[int, list[list[str]]]:
        try:
            own = ["test_dataset", csv_path, "--bundle", str(exported[0]), "--threads", "1"]
            number = code.predict.main([*own, *words])
        except code.predict.Problem as problem:
            number = problem.code
        return number, rows_of(Path(csv_path)) if Path(csv_path).exists() else []

    Path("test_dataset").mkdir()
    return call


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
            image = pixels.decode(file.read_bytes())
            writer.raw(np.array(pixels.stored(image, 146)), 0, row)
        writer.commit({})
    beton = open_beton(tmp_path / "val.beton")
    for row, file in enumerate(files):
        for height, width, factor, interpolation in ((128, 128, 1.14, "bicubic"), (32, 48, 1.0, "bilinear")):
            out = np.empty((1, height, width, 3), np.uint8)
            decode_eval(beton, np.array([row]), out, factor, interpolation, 1)
            crop = {"height": height, "width": width, "factor": factor, "interpolation": interpolation}
            crop["stored_side"] = 146
            (got,) = code.pictures.prepare(os.fsencode(file), [crop])
            np.testing.assert_array_equal(got, out[0], err_msg=file.name)


@pytest.mark.parametrize(("backbone", "head"), FAMILIES)
def test_logits_are_the_networks(tmp_path, code, monkeypatch, backbone, head):
    (made,) = write_bundle(tmp_path / "bundle", [member(tmp_path, backbone, head)], "tta.scales=[32,80]")
    description, hashes = code.predict.read_bundle(str(tmp_path / "bundle"))
    networks = code.networks.Networks(str(tmp_path / "bundle"), description, hashes, "cpu")
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
    monkeypatch.setattr(code.networks, "choices", lambda _: [("cpu", True)])
    half = code.networks.Networks(str(tmp_path / "bundle"), description, hashes, "cpu")
    assert half.members[0]["inputs"][0][0].dtype == torch.float16
    assert np.abs(half.logits(noise[:1]) - got[:1]).max() <= 0.02 * max(1, np.abs(got[:1]).max())


def test_fused_logits_over_t_give_the_confidence(run, code, exported):
    fill(3)
    number, rows = run("--logits", "logits.npz")
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


def test_a_row_for_every_name(run):
    names = [
        "a b.jpg",
        "comma,.jpg",
        'quote".JPG',
        "new\nline.jpg",
        "花.jpeg",
        "=1.png",
        "e\u0301.jpg",
        "é.jpg",
    ]
    names += ["a.JPG", "a.jpg", "sub/deep/a.jpg", ".hidden.jpg", "bad\udcff\udc80.jpg", "x" * 200 + ".jpg"]
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
    number, rows = run()
    assert number == 0
    assert [row[0] for row in rows[1:]] == sorted([*names, "linked.jpg"], key=os.fsencode)
    data = Path("out/submission.csv").read_bytes()
    assert b"\r" not in data and data.endswith(b"\n") and not data.startswith(b"\xef\xbb\xbf")
    assert json.loads(Path("out/submission.json").read_text())["unreadable"] == {}


def test_unreadable_pictures_get_the_prior(run, capsys):
    fill(2)
    bad = {
        "empty.jpg": b"",
        "page.jpg": b"<html>",
        "cut.jpg": jpeg(5)[:300],
        "tiff.png": b"II*\0" + bytes(90),
    }
    bad["scans.jpg"] = b"\xff\xd8" + b"\xff\xda\0\0" * 501
    bad["bomb.png"] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1\0\0\0\1\0\0\x08\x02\0\0\0" + bytes(80)
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


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batches_for_a_gpu_keep_rows_together(code, batch):
    """The path of a GPU with a stand-in that gives the sum of a picture's pixels."""

    crop = [{"height": 8, "width": 8, "factor": 1.0, "interpolation": "bicubic", "stored_side": None}]

    class Members:
        def __init__(self):
            self.device, self.bundle, self.sizes = torch.device("cuda"), {"crops": crop}, []

        def logits(self, pictures):
            self.sizes.append(len(pictures))
            return np.array([[[[array.sum()]]] for (array,) in pictures], dtype=np.float32)

    Path("some").mkdir()
    for number in range(8):
        flower(number).save(f"some/{number}.png")
    Path("some/4.png").write_bytes(b"")
    table = code.table.Table(
        [b"%d.png" % n for n in range(8)], IDS, [0.2, 0.5, 0.3], ["filename", "category_id"]
    )
    members = Members()
    found = {}
    for rows, logits in code.predict.predicted(members, b"some", table, 2, batch):
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
    description, hashes = code.predict.read_bundle(str(exported[0]))
    assert code.networks.Networks(str(exported[0]), description, hashes, "cpu").notes == []


def test_short_memory_halves_the_batch(code, exported, monkeypatch):
    description, hashes = code.predict.read_bundle(str(exported[0]))
    networks = code.networks.Networks(str(exported[0]), description, hashes, "cpu")
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


def test_a_member_without_finite_logits_has_no_say(code, exported):
    description, hashes = code.predict.read_bundle(str(exported[0]))
    networks = code.networks.Networks(str(exported[0]), description, hashes, "cpu")
    logits = np.ones((3, 2, 4, 3), np.float32)
    logits[:, 1] = 3
    logits[1, 1, 2, 0] = np.nan
    logits[2] = np.inf
    fused = networks.fuse(logits)
    np.testing.assert_allclose(fused[:2] * 1.5, [[2, 2, 2], [1, 1, 1]])
    table = code.table.Table([b"a", b"b", b"c"], IDS, [0.2, 0.5, 0.3], ["filename", "category_id"])
    table.fill([0, 1, 2], fused)
    assert table.known.tolist() == [True, True, False] and 2 in table.unreadable


def test_columns_and_order_are_the_samples(run, code, monkeypatch):
    fill(3)
    monkeypatch.setattr(code.predict, "ROOT", str(Path.cwd()))
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


def test_no_photographs_is_said_and_never_replaces_a_table(run, capsys):
    number, rows = run()
    assert (number, rows) == (2, [["filename", "category_id", "confidence"]])
    Path("out/submission.csv").write_text("filename\nmine\n")
    assert run()[0] == 2 and rows_of(Path("out/submission.csv"))[1] == ["mine"]


def test_without_a_bundle_one_line_says_what_to_do(code, monkeypatch):
    monkeypatch.setattr(code.predict, "ROOT", str(Path.cwd()))
    folder = Path("model/exp")
    folder.mkdir(parents=True)
    for name in (
        "best_combo__vit__fold0_seed42_epoch3_score0.9000",
        "last__vit__fold0_seed42_epoch3_score0.9000",
    ):
        (folder / f"{name}.pth").write_bytes(b"")
    with pytest.raises(
        code.predict.Problem, match=r"no bundle in model/bundle \(1 members beside it\); run python -m"
    ) as problem:
        code.predict.main(["a", "b.csv", "--bundle", "model/bundle"])
    assert problem.value.code == 4 and not Path("b.csv").exists()


def test_without_a_bundle_every_row_is_the_training_datas_commonest_class(run, code, monkeypatch):
    monkeypatch.setattr(code.predict, "ROOT", str(Path.cwd()))
    fill(2)
    Path("data").mkdir()
    Path("data/classes.csv").write_text("class_idx,category_id,n\n0,7,3\n1,007,6\n2,x,1\n")
    number, rows = run("--bundle", "nowhere")
    assert number == 4 and [row[1:] for row in rows[1:]] == [["007", "0.600000"]] * 2


@pytest.fixture
def evaluated(run, code, monkeypatch):
    """Two members and the programs that evaluate leaves beside them; one is a backbone whose views have weights."""
    monkeypatch.setattr(code.predict, "ROOT", str(Path.cwd()))
    folder, made = Path("results/model/exp"), recipe.load(None, ["exp.name=exp", "tta.scales=[32,64]"])
    paths = [member(folder, name, seed=seed) for seed, name in enumerate(("resnet10t", "test_vit"))]
    bundle.leave_programs(paths, np.array([0.25, 0.75]), made, temperature=1.5)
    fill(5)
    return paths


def unbundled(code, *words: str) -> tuple[int, bytes, dict[str, object]]:
    """Exit code, table and description of a run that is not told of any bundle."""
    try:
        number = code.predict.main(["test_dataset", "own.csv", "--threads", "1", *words])
    except code.predict.Problem as problem:
        number = problem.code
    return number, Path("own.csv").read_bytes(), json.loads(Path("own.json").read_text())


def test_without_a_bundle_the_members_are_run_as_evaluate_left_them(run, code, evaluated, capsys):
    number, table, about = unbundled(code)
    assert number == 0 and about["members"] == [path.stem for path in evaluated]
    assert "no bundle; taking the members above" in capsys.readouterr().out
    whole = Path("whole")
    whole.mkdir()
    words = ["exp.name=exp", "tta.scales=[32,64]", "bundle.dtype=fp32"]
    members = bundle.load_members(evaluated, "fp32")
    bundle.write(whole, members, np.array([0.25, 0.75]), recipe.load(None, words), temperature=1.5)
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

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("executed",)


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
        code.predict.Problem, match=r"damaged .* every row of .* is the class prior"
    ) as problem:
        code.predict.main(["photos", "b.csv", "--bundle", "copy"])
    assert problem.value.code == 3
    assert rows_of(Path("b.csv"))[1] == ["a.jpg", "012", f"{9 / 16:.6f}"]


def test_a_bundle_of_another_format_is_refused(code, exported, monkeypatch):
    monkeypatch.setattr(code.predict, "FORMAT", 99)
    with pytest.raises(code.predict.Problem, match="has format 2, this predictor reads 99"):
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


def test_another_place_is_found_for_the_table(run, capsys):
    fill(1)
    Path("file").write_text("")
    number, _ = run(csv_path="file/table.csv")
    assert number == 4 and len(rows_of(Path("table.csv"))) == 2
    assert "cannot be written; the table goes to" in capsys.readouterr().err
    os.mkfifo("pipe")
    with pytest.raises(FileExistsError, match="not a regular file"):
        importlib.import_module("table").replace("pipe", b"")


def hand_in(root: Path, exported: Path, count: int) -> Path:
    """The folder that an evaluator gets."""
    root.mkdir()
    for number in range(count):
        (root / f"{number:03d}.jpg").write_bytes(jpeg(number))
    return bare.copy_hand_in(root, exported, sorted(root.glob("*.jpg")))


def test_a_bare_machine_is_enough(tmp_path, exported):
    root = hand_in(tmp_path / "root", exported[0], 3)
    for path in [*root.rglob("*"), root]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder = b"caf\xe9"
    os.mkdir(folder)
    Path(os.fsdecode(folder), os.fsdecode(b"\xe9.jpg")).write_bytes(b"")
    shutil.copy(root / "test_dataset/000000.jpg", os.path.join(folder, b"ok.jpg"))
    script = bare.BARE.replace("{blocked!r}", repr(set(bare.BLOCKED)))
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
    """The decoder aborts on one file and sleeps on another while a second thread reads what is beside them."""
    Path("test_dataset").mkdir()
    fill(5)
    for name in ("001crash.jpg", "003slow.jpg"):
        Path("test_dataset", name).write_bytes(jpeg(1))
    words = ["test_dataset", "out.csv", "--bundle", str(exported[0]), "--threads", "2"]
    code = BENT.replace("{code!r}", repr(str(CODE)))
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    about = json.loads(Path("out.json").read_text())
    assert about["rows"] == 7 and about["predicted"] == 5 and len(about["unreadable"]) == 2
    assert about["unreadable"]["003slow.jpg"] == "not read within 2 s"
    assert "killed the process (SIGABRT)" in about["unreadable"]["001crash.jpg"]
    assert [row[1] for row in rows_of(Path("out.csv"))[1:] if "crash" in row[0]] == ["012"]


def test_a_picture_that_ends_while_it_is_watched_is_not_slow(code):
    """Whenever it is asked which rows are being read, they end before the answer can be used."""

    class Ending(np.ndarray):
        def __gt__(self, other):
            answer = np.asarray(self) > other
            self[...] = 0
            return answer

    table = code.table.Table([b"a.jpg", b"b.jpg"], IDS, [0.2, 0.5, 0.3], ["filename", "category_id"])
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
        [b"a,b.jpg", b"\xe9.jpg"], ["7", "012"], [0.25, 0.75], ["filename", "category_id", "confidence"]
    )
    table.fill([0], np.array([[2.0, 0.0]]))
    assert table.text() == (b'filename,category_id,confidence\n"a,b.jpg",7,0.880797\n\xe9.jpg,012,0.750000\n')


def test_a_gpu_that_does_not_work_leaves_the_work_to_the_cpu(code, exported, monkeypatch):
    description, hashes = code.predict.read_bundle(str(exported[0]))
    monkeypatch.setattr(code.networks, "choices", lambda _: [("cuda:9", True), ("cpu", False)])
    networks = code.networks.Networks(str(exported[0]), description, hashes, "auto")
    assert str(networks.device) == "cpu" and not networks.half
    assert len(networks.notes) == 1 and networks.notes[0].startswith("cuda:9 in half precision: ")


def test_a_gpu_without_half_precision_goes_on_in_fp32(code, exported, monkeypatch):
    """The logits are those of fp32; bf16 and TF32 are never used."""
    description, hashes = code.predict.read_bundle(str(exported[0]))
    views = [np.zeros((crop["height"], crop["width"], 3), np.uint8) for crop in description["crops"]]
    plain = code.networks.Networks(str(exported[0]), description, hashes, "cpu").logits([views])
    honest, seen = code.networks.Networks._forward, set()

    def forward(self, images, view, inputs):
        seen.update(value.dtype for value in inputs if value.is_floating_point())
        if self.half:
            raise RuntimeError("no kernel for Half")
        return honest(self, images, view, inputs)

    monkeypatch.setattr(code.networks.Networks, "_forward", forward)
    monkeypatch.setattr(code.networks, "choices", lambda _: [("cpu", True), ("cpu", False)])
    networks = code.networks.Networks(str(exported[0]), description, hashes, "auto")
    assert not networks.half and len(networks.notes) == 1
    assert "no kernel for Half" in networks.notes[0]
    np.testing.assert_array_equal(networks.logits([views]), plain)
    assert seen == {torch.float16, torch.float32}
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_a_network_that_says_something_else_than_at_export_is_noticed(code, exported):
    description, hashes = code.predict.read_bundle(str(exported[0]))
    description["members"][0]["expected"][0][1] += 0.5
    networks = code.networks.Networks(str(exported[0]), description, hashes, "cpu")
    assert any("another version of torch than at export?" in note for note in networks.notes)


def test_threads_keep_to_the_cores_and_the_share_of_them(code, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(48)))
    Path("cpu.max").write_text("250000 100000\n")
    assert code.predict.usable_cores("cpu.max") == 2
    Path("cpu.max").write_text("max 100000\n")
    assert code.predict.usable_cores("cpu.max") == 48 == code.predict.usable_cores("absent")


def test_a_picture_that_vanishes_keeps_its_row(run, code, monkeypatch):
    fill(3)
    found = code.pictures.find

    def find(folder):
        names = found(folder)
        os.unlink("test_dataset/001.jpg")
        return names

    monkeypatch.setattr(code.pictures, "find", find)
    number, rows = run()
    assert number == 0 and [row[0] for row in rows[1:]] == ["000.jpg", "001.jpg", "002.jpg"]
    assert rows[2][1] == "012"


def test_memory_does_not_grow_with_the_number_of_pictures(code, monkeypatch):
    """However slow the networks, only a few batches are read ahead."""
    waiting, most = 0, 0

    def prepare(path, crops):
        nonlocal waiting
        waiting += 1
        return [np.zeros((2, 2, 3), np.uint8)]

    class Members:
        device, bundle = torch.device("cuda"), {"crops": []}

        def logits(self, pictures):
            return np.zeros((len(pictures), 1, 1, 1), np.float32)

    monkeypatch.setattr(code.pictures, "prepare", prepare)
    table = code.table.Table([b"%d" % n for n in range(5000)], IDS, [1, 0, 0], ["filename", "category_id"])
    for rows, _ in code.predict.predicted(Members(), b"", table, 2, 16):
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


def test_a_missing_package_is_one_line(tmp_path):
    shutil.copytree(CODE, tmp_path / "code")
    (tmp_path / "code/numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")")
    done = subprocess.run([sys.executable, str(tmp_path / "code/predict.py")], capture_output=True, text=True)
    assert done.stderr == (
        "predict: No module named 'numpy'; needed are torch, numpy and pillow: pip install torch numpy pillow\n"
    )


def test_help_is_one_screen():
    done = subprocess.run(
        [sys.executable, str(CODE / "predict.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) <= 24
