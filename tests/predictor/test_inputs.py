"""Pairs of images for the predictor: the trainer's pixels, one line for a wrong file, one row for a wrong pair."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflower import convert, sample_data
from fastflower.bundle import writer
from fastflower.data.betons.fold_set import open_fold
from fastflower.data.loaders import EvalLoader
from fastflower.data.readers import arrays
from fastflower.model.member import save_member
from fastflower.model.network import build_network
from fastflower.recipe import load, parse_command
from support.member_metas import member_meta

BACKBONE = "compare_resnet222_adaptive_cbam_w25"
NAMES = ["xa", "xb"]
NOISE = np.random.default_rng(0).integers(0, 256, (40, 9, 7, 3), dtype=np.uint8)
GREY = NOISE[..., 0]


@pytest.fixture
def exported() -> Path:
    """A bundle of one network for pairs, with random weights."""
    return export("bundle")


def export(folder: str, *changes: str) -> Path:
    torch.manual_seed(0)
    meta = member_meta(
        backbone=BACKBONE, num_classes=2, size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear",
        resize_factor=1.0, stored_side=16, class_ids=("same", "not"), class_counts=(3, 5),
    )  # fmt: skip
    file = Path(f"best_combo__{BACKBONE}__fold0_seed42_epoch1_score0.5000.pth")
    save_member(file, build_network(meta).state_dict(), meta)
    settings = load(None, ["tta.scales=[16]", "tta.hflip=false", *changes])
    Path(folder).mkdir()
    writer.write_bundle(
        Path(folder),
        writer.load_members([file], "fp32"),
        weights=np.ones(1),
        recipe=settings,
        temperature=1.0,
        arrays=NAMES,
    )
    return Path(folder)


@pytest.fixture
def run(code, exported):
    """Run the predictor in this process: exit code or the line that stops it, and the lines of the table."""

    def call(path: str, folder: Path = exported) -> tuple[int | str, list[str]]:
        try:
            exit_code = code.predict.main([path, "out.csv", "--bundle", str(folder), "--threads", "1"])
        except code.bundles.Problem as problem:
            exit_code = str(problem)
        return exit_code, Path("out.csv").read_text().splitlines()[1:] if Path("out.csv").exists() else []

    return call


@pytest.mark.parametrize(
    ("values", "shape"),
    [
        (GREY, "auto"),
        (NOISE, "auto"),
        (np.moveaxis(NOISE, 3, 1), "auto"),
        (GREY[..., None], "auto"),
        (GREY[:, None].astype(np.int64), "auto"),
        (np.asfortranarray(GREY).astype(">i2"), "auto"),
        (GREY > 99, "auto"),
        ((GREY > 99).astype(np.float32), "auto"),
        (NOISE.astype(np.float64), "auto"),
        (np.random.default_rng(1).random((40, 3, 9, 7), dtype=np.float32), "auto"),
        ((GREY / 255).astype(np.float16), "auto"),
        (GREY[:, :7, :7].reshape(40, 49) / 255, "auto"),
        (NOISE.reshape(40, 189), [9, 7, 3]),
        (GREY.reshape(40, 63), [9, 7]),
    ],
    ids=lambda value: f"{value.dtype}-{value.shape}" if isinstance(value, np.ndarray) else "",
)
def test_numbers_become_the_trainers_pixels(code, values, shape):
    np.savez("pairs.npz", xa=values, xb=values[::-1])
    expected = arrays.open_npz(Path("pairs.npz"), [*NAMES, "y"], shape=shape, labelled=False).images
    pairs = code.inputs.Pairs("pairs.npz", NAMES, shape)
    pairs.load()
    for side in (0, 1):
        got = np.stack([pairs.pixels(side, row) for row in range(40)])
        np.testing.assert_array_equal(got, expected[side])
        assert got.dtype == np.uint8


@pytest.mark.parametrize(("size", "factor"), [((16, 16), 1.0), ((32, 20), 1.3)])
def test_views_are_those_of_the_trainers_loader(code, repo, size, factor):
    """Both for images reduced to the stored size and for smaller ones."""
    sample_data.main(["pairs", "rows=16", "held_out=12"])
    arguments = [str(repo / "recipes/pairs_small.yaml"), "data.workers=1"]
    convert.main(arguments)
    val = open_fold(parse_command(arguments), 0).val
    side = val.origin.stored_side
    (batch,) = EvalLoader(val, 12, size=lambda: size, factor=factor, interpolation="bilinear", threads=1)
    pairs = code.inputs.open_input("data/pairs/val.npz", {"arrays": NAMES, "shape": "auto"})
    pairs.load()
    assert pairs.names == [b"val/%02d" % row for row in range(12)]
    crop = {"height": size[0], "width": size[1], "factor": factor, "interpolation": "bilinear"}
    for name, expected in zip(pairs.names, batch["image"].numpy(), strict=True):
        (got,) = pairs.views(name, [{**crop, "stored_side": side}])
        np.testing.assert_array_equal(got, expected)


def test_a_row_for_every_pair_whatever_its_labels(run):
    """Labels are not read: neither damaged ones nor objects that would run code."""
    pairs = {"xa": GREY, "xb": GREY[::-1]}
    np.savez("a,b.npz", **pairs, y=np.array([print] * 40, dtype=object), note=np.array("a word"))
    data = Path("a,b.npz").read_bytes()
    Path("a,b.npz").write_bytes(data.replace("a word".encode("utf-32-le"), "a lord".encode("utf-32-le")))
    exit_code, lines = run("a,b.npz")
    assert exit_code == 0 and [line.rpartition('"')[0] for line in lines] == [
        f'"a,b/{n:02d}' for n in range(40)
    ]
    assert all(
        line.split(",")[2] in ("same", "not") and 0.5 <= float(line.split(",")[3]) <= 1 for line in lines
    )
    np.savez_compressed("a,b.npz", **pairs)
    assert run("a,b.npz") == (0, lines)


def test_a_pair_that_is_no_image_gets_the_prior(run, capsys):
    """Also the first pair, and in a file whose other rows hold 0..1."""
    unit, levels = (GREY / 255).astype(np.float32), GREY.astype(np.float64)
    np.savez("given.npz", xa=unit, xb=levels)
    _, right = run("given.npz")
    unit[0, 1, 1], unit[3, 0, 0], levels[5, 2, 2], levels[7, 0, 1] = np.nan, 7, 0.5, -1
    np.savez("given.npz", xa=unit, xb=levels)
    exit_code, lines = run("given.npz")
    assert exit_code == 0
    for row, (line, expected) in enumerate(zip(lines, right, strict=True)):
        wrong = row in (0, 3, 5, 7)
        assert line == (f"given/{row:02d},not,{5 / 8:.6f}" if wrong else expected)
    errors = capsys.readouterr().err
    assert (
        "'given/03': ValueError: xa: float32 from 0 to 7; images are whole numbers 0..255, or floats"
        in errors
    )
    assert set(json.loads(Path("out.json").read_text())["unreadable"]) == {
        f"given/0{n}" for n in (0, 3, 5, 7)
    }


def test_binary_columns_hold_the_second_classs_probability(run):
    """A pair that is no image gets the prior's probability."""
    binary = export("binary", "bundle.columns=binary")
    unit = (GREY / 255).astype(np.float32)
    unit[3] = np.nan
    np.savez("given.npz", xa=unit, xb=GREY[::-1] / 255)
    _, three = run("given.npz")
    assert run("given.npz", binary)[0] == 0
    header, *lines = Path("out.csv").read_text().splitlines()
    assert header == "filename,category_id,probability" and lines[3] == "given/03,not,0.625000000"
    for line, three_columns in zip(lines, three, strict=True):
        (name, label, probability), (*name_and_label, confidence) = line.split(","), three_columns.split(",")
        assert [name, label] == name_and_label
        want = float(confidence) if label == "not" else 1 - float(confidence)
        assert float(probability) == pytest.approx(want, abs=1e-6) and (want > 0.5) == (label == "not")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            {"xa": GREY},
            r"no complete array xb; it has xa uint8 \(40, 9, 7\); this bundle compares the arrays xa and xb",
        ),
        ({}, "no complete array xa, xb; it has none; this bundle"),
        (
            {"xa": GREY, "xb": GREY[:5]},
            r"xa \(40, 9, 7\) and xb \(5, 9, 7\); both arrays must have the same rows, height and width",
        ),
        (
            {"xa": GREY, "xb": GREY[:, :5]},
            r"xb \(40, 5, 7\); both arrays must have the same rows, height and width",
        ),
        ({"xa": GREY[:, 0, 0], "xb": GREY}, r"xa: has the shape \(40,\); images are \(N, H, W\)"),
        ({"xa": GREY[:0], "xb": GREY[:0]}, r"xa: has the shape \(0, 9, 7\)"),
        (
            {"xa": GREY.reshape(40, 63), "xb": GREY},
            "xa: rows of 63 numbers are not square images",
        ),
        ({"xa": GREY.astype(complex), "xb": GREY}, "xa: holds complex128; images must be numbers"),
        ({"xa": GREY.astype(str), "xb": GREY}, "xa: holds <U3; images must be numbers"),
        ({"xa": GREY.astype(object), "xb": GREY}, "xa: holds object; images must be numbers"),
    ],
)
def test_a_wrong_file_is_one_line_and_no_table(run, content, line):
    np.savez("given.npz", **content)
    message, lines = run("given.npz")
    assert re.match(f"given.npz: .*{line}", message) and "\n" not in message and lines == []


def test_what_is_no_npz_or_says_more_than_it_holds_is_one_line(run):
    np.savez("given.npz", xa=GREY, xb=GREY)
    data = Path("given.npz").read_bytes()
    for broken in (b"", data[:900], b"\x93NUMPY"):
        Path("given.npz").write_bytes(broken)
        assert run("given.npz") == (
            "given.npz: cannot be read as .npz (File is not a zip file); save it with numpy.savez",
            [],
        )
    with zipfile.ZipFile("given.npz", "w") as archive, zipfile.ZipFile(io.BytesIO(data)) as original:
        archive.writestr("xa.npy", original.read("xa.npy").replace(b"(40, 9, 7)", b"(99, 9, 7)"))
        archive.writestr("xb.npy", original.read("xb.npy"))
    assert run("given.npz")[0].startswith("given.npz: no complete array xa; it has xb uint8 (40, 9, 7); this")


def test_pairs_are_no_folder_and_photographs_no_file(run, code):
    Path("folder").mkdir()
    assert run("folder") == ("folder is a folder; give a .npz with the arrays xa and xb", [])
    assert run("lost.npz") == ("lost.npz does not exist; give a .npz with the arrays xa and xb", [])
    np.savez("given.npz", xa=GREY, xb=GREY)
    photographs = json.loads(Path("bundle/bundle.json").read_text()) | {"pairs": None}
    Path("bundle/bundle.json").write_text(json.dumps(photographs))
    digest = hashlib.sha256(Path("bundle/bundle.json").read_bytes()).hexdigest()
    lines = Path("bundle/SHA256").read_text().splitlines()
    Path("bundle/SHA256").write_text(
        "\n".join(f"{digest}  bundle.json" if line.endswith(" bundle.json") else line for line in lines)
    )
    message, lines = run("given.npz")
    assert message.startswith("no photographs below given.npz; give a folder with .jpg") and lines == []


def test_numbers_that_are_damaged_leave_the_prior(run, capsys):
    """Damage that shows only when all numbers are read is reported after the first table."""
    np.savez("given.npz", xa=NOISE, xb=NOISE)
    data = bytearray(Path("given.npz").read_bytes())
    data[6000] ^= 1
    Path("given.npz").write_bytes(data)
    exit_code, lines = run("given.npz")
    assert exit_code == 3 and lines == [f"given/{row:02d},not,{5 / 8:.6f}" for row in range(40)]
    errors = capsys.readouterr().err
    assert "given.npz: cannot be read (Bad CRC-32 for file 'xa.npy'); copy it again; every row of" in errors


def test_a_damaged_bundle_leaves_the_prior(run):
    """The arrays of the pairs are unknown then, but the number of rows is not."""
    np.savez("given.npz", xa=GREY, xb=GREY, y=np.zeros(40), about=np.zeros(3), one=np.float32(1))
    Path("bundle/bundle.json").write_text("{}")
    message, lines = run("given.npz")
    assert "bundle is damaged" in message and lines == [
        f"given/{row:02d},not,{5 / 8:.6f}" for row in range(40)
    ]


def test_a_sample_names_the_columns_of_two_classes(run, code, monkeypatch):
    """Only a sample of three columns: one of two has none for the probability."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    binary = export("binary", "bundle.columns=binary")
    np.savez("given.npz", xa=GREY, xb=GREY[::-1])
    _, lines = run("given.npz", binary)
    Path("ref").mkdir()
    for header in ("id,label,p", "id,label"):
        rows = "".join(f"{row},same{',0.5' * (header.count(',') - 1)}\n" for row in range(40))
        Path("ref/predictions_sample.csv").write_text(f"{header}\n{rows}")
        exit_code, followed = run("given.npz", binary)
        assert exit_code == 0 and [line.split(",")[1:] for line in followed] == [
            line.split(",")[1:] for line in lines
        ]
        want = header if header.count(",") == 2 else "filename,category_id,probability"
        assert Path("out.csv").read_text().splitlines()[0] == want


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_sample_may_number_the_rows(run, code, monkeypatch, first):
    """From 0 or from 1, in any order; a sample with other numbers is refused."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    np.savez("given.npz", xa=GREY, xb=GREY[::-1])
    _, lines = run("given.npz")
    order = np.random.default_rng(0).permutation(40)
    Path("ref").mkdir()
    Path("ref/predictions_sample.csv").write_text(
        "id,label\n" + "".join(f"{row + first},0\n" for row in order)
    )
    exit_code, numbered = run("given.npz")
    if first < 2:
        lines = [",".join([str(row + first), lines[row].split(",")[1]]) for row in order]
    assert (exit_code, numbered) == (0 if first < 2 else 2, lines)


def test_without_words_test_dataset_npz_is_taken(run, code, monkeypatch):
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    np.savez("test_dataset.npz", xa=GREY, xb=GREY)
    assert code.predict.main(["--bundle", "bundle", "--threads", "1"]) == 0
    table = Path("results/results/submission.csv").read_text().splitlines()
    assert len(table) == 41 and table[1].startswith("test_dataset/00,")
