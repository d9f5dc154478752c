"""Pairs for the predictor: the trainer's numbers and pixels, one line for a wrong file, one row for a wrong pair."""

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
from fastflower.core import checkpoint
from fastflower.data.betons.fold_set import open_fold
from fastflower.data.loaders import EvalLoader
from fastflower.data.readers import arrays
from fastflower.model.network import NetworkSpec, build_network
from fastflower.recipe import load, parse_command

BACKBONE = "compare_resnet222_adaptive_cbam_w25"
NAMES = ["xa", "xb"]
NOISE = np.random.default_rng(0).integers(0, 256, (40, 9, 7, 3), dtype=np.uint8)
GREY = NOISE[..., 0]


@pytest.fixture
def exported() -> Path:
    """A bundle of one network for pairs, with random weights."""
    return export("bundle")


def export(folder: str, *words: str) -> Path:
    torch.manual_seed(0)
    meta = {
        "backbone": BACKBONE, "head": "linear", "head_scale": 30.0, "margin": 0.3, "num_classes": 2, "size": [16, 16],
        "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_factor": 1.0, "stored_side": 16,
        "class_ids": ["same", "not"], "class_hash": "c1a55", "class_counts": [3, 5], "fold": 0, "seed": 42, "epoch": 1,
        "weights": "raw",
    }  # fmt: skip
    file = Path(f"best_combo__{BACKBONE}__fold0_seed42_epoch1_score0.5000.pth")
    checkpoint.save(file, build_network(NetworkSpec.from_meta(meta)).state_dict(), meta)
    settings = load(None, ["tta.scales=[16]", "tta.hflip=false", *words])
    Path(folder).mkdir()
    writer.write(
        Path(folder),
        writer.load_members([file], "fp32"),
        shares=np.ones(1),
        recipe=settings,
        temperature=1.0,
        arrays=NAMES,
    )
    return Path(folder)


@pytest.fixture
def run(code, exported):
    """Run the predictor in this process: exit code or the line that stops it, and the lines of the table."""

    def call(given: str, folder: Path = exported) -> tuple[int | str, list[str]]:
        try:
            ended = code.predict.main([given, "out.csv", "--bundle", str(folder), "--threads", "1"])
        except code.bundles.Problem as problem:
            ended = str(problem)
        return ended, Path("out.csv").read_text().splitlines()[1:] if Path("out.csv").exists() else []

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
    np.savez("given.npz", xa=values, xb=values[::-1])
    want = arrays.open_npz(Path("given.npz"), [*NAMES, "y"], shape=shape, labelled=False).images
    given = code.inputs.Pairs("given.npz", NAMES, shape)
    given.load()
    for place in (0, 1):
        got = np.stack([given.pixels(place, row) for row in range(40)])
        np.testing.assert_array_equal(got, want[place])
        assert got.dtype == np.uint8


@pytest.mark.parametrize(("size", "factor"), [((16, 16), 1.0), ((32, 20), 1.3)])
def test_views_are_those_of_the_trainers_loader(code, repo, size, factor):
    """Of images brought to the stored size, and of smaller ones."""
    sample_data.main(["pairs", "rows=16", "held_out=12"])
    words = [str(repo / "recipes/pairs_small.yaml"), "data.workers=1"]
    convert.main(words)
    val = open_fold(parse_command(words), 0).val
    side = val.manifest["stored_side"]
    (batch,) = EvalLoader(val, 12, size=lambda: size, factor=factor, interpolation="bilinear", threads=1)
    given = code.inputs.find("data/pairs/val.npz", {"arrays": NAMES, "shape": "auto"})
    given.load()
    assert given.names == [b"val/%02d" % row for row in range(12)]
    crop = {"height": size[0], "width": size[1], "factor": factor, "interpolation": "bilinear"}
    for name, want in zip(given.names, batch["image"].numpy(), strict=True):
        (got,) = given.views(name, [{**crop, "stored_side": side}])
        np.testing.assert_array_equal(got, want)


def test_a_row_for_every_pair_whatever_its_labels(run):
    """Labels that would run code when they are read are not read, nor are damaged ones."""
    pairs = {"xa": GREY, "xb": GREY[::-1]}
    np.savez("a,b.npz", **pairs, y=np.array([print] * 40, dtype=object), note=np.array("a word"))
    data = Path("a,b.npz").read_bytes()
    Path("a,b.npz").write_bytes(data.replace("a word".encode("utf-32-le"), "a lord".encode("utf-32-le")))
    ended, lines = run("a,b.npz")
    assert ended == 0 and [line.rpartition('"')[0] for line in lines] == [f'"a,b/{n:02d}' for n in range(40)]
    assert all(
        line.split(",")[2] in ("same", "not") and 0.5 <= float(line.split(",")[3]) <= 1 for line in lines
    )
    np.savez_compressed("a,b.npz", **pairs)
    assert run("a,b.npz") == (0, lines)


def test_a_pair_that_is_no_image_gets_the_prior(run, capsys):
    """Also the first one, and in a file whose other rows are shares of 1."""
    shares, levels = (GREY / 255).astype(np.float32), GREY.astype(np.float64)
    np.savez("given.npz", xa=shares, xb=levels)
    _, right = run("given.npz")
    shares[0, 1, 1], shares[3, 0, 0], levels[5, 2, 2], levels[7, 0, 1] = np.nan, 7, 0.5, -1
    np.savez("given.npz", xa=shares, xb=levels)
    ended, lines = run("given.npz")
    assert ended == 0
    for row, (line, other) in enumerate(zip(lines, right, strict=True)):
        wrong = row in (0, 3, 5, 7)
        assert line == (f"given/{row:02d},not,{5 / 8:.6f}" if wrong else other)
    said = capsys.readouterr().err
    assert (
        "'given/03': ValueError: xa: float32 from 0 to 7; images are whole numbers 0..255, or floats" in said
    )
    assert set(json.loads(Path("out.json").read_text())["unreadable"]) == {
        f"given/0{n}" for n in (0, 3, 5, 7)
    }


def test_binary_columns_hold_the_second_classs_probability(run):
    """A pair that is no image has that of the prior."""
    binary = export("binary", "bundle.columns=binary")
    shares = (GREY / 255).astype(np.float32)
    shares[3] = np.nan
    np.savez("given.npz", xa=shares, xb=GREY[::-1] / 255)
    _, three = run("given.npz")
    assert run("given.npz", binary)[0] == 0
    header, *lines = Path("out.csv").read_text().splitlines()
    assert header == "filename,category_id,probability" and lines[3] == "given/03,not,0.625000000"
    for line, other in zip(lines, three, strict=True):
        (name, label, probability), (*same, confidence) = line.split(","), other.split(",")
        assert [name, label] == same
        want = float(confidence) if label == "not" else 1 - float(confidence)
        assert float(probability) == pytest.approx(want, abs=1e-6) and (want > 0.5) == (label == "not")


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (
            {"xa": GREY},
            r"no whole array xb; it has xa uint8 \(40, 9, 7\); this bundle compares the arrays xa and xb",
        ),
        ({}, "no whole array xa, xb; it has none; this bundle"),
        (
            {"xa": GREY, "xb": GREY[:5]},
            r"xa \(40, 9, 7\) and xb \(5, 9, 7\): the two images of a pair have one size",
        ),
        ({"xa": GREY, "xb": GREY[:, :5]}, r"xb \(40, 5, 7\): the two images of a pair have one size"),
        ({"xa": GREY[:, 0, 0], "xb": GREY}, r"xa: has the shape \(40,\); images are \(N, H, W\)"),
        ({"xa": GREY[:0], "xb": GREY[:0]}, r"xa: has the shape \(0, 9, 7\)"),
        (
            {"xa": GREY.reshape(40, 63), "xb": GREY},
            "xa: rows of 63 pixels are no images of data.shape = auto",
        ),
        ({"xa": GREY.astype(complex), "xb": GREY}, "xa: holds complex128; images are numbers"),
        ({"xa": GREY.astype(str), "xb": GREY}, "xa: holds <U3; images are numbers"),
        ({"xa": GREY.astype(object), "xb": GREY}, "xa: holds object; images are numbers"),
    ],
)
def test_a_wrong_file_is_one_line_and_no_table(run, made, line):
    np.savez("given.npz", **made)
    ended, lines = run("given.npz")
    assert re.match(f"given.npz: .*{line}", ended) and "\n" not in ended and lines == []


def test_what_is_no_npz_or_says_more_than_it_holds_is_one_line(run):
    np.savez("given.npz", xa=GREY, xb=GREY)
    data = Path("given.npz").read_bytes()
    for broken in (b"", data[:900], b"\x93NUMPY"):
        Path("given.npz").write_bytes(broken)
        assert run("given.npz") == (
            "given.npz: cannot be read as .npz (File is not a zip file); save it by numpy.savez",
            [],
        )
    with zipfile.ZipFile("given.npz", "w") as archive, zipfile.ZipFile(io.BytesIO(data)) as whole:
        archive.writestr("xa.npy", whole.read("xa.npy").replace(b"(40, 9, 7)", b"(99, 9, 7)"))
        archive.writestr("xb.npy", whole.read("xb.npy"))
    assert run("given.npz")[0].startswith("given.npz: no whole array xa; it has xb uint8 (40, 9, 7); this")


def test_pairs_are_no_folder_and_photographs_no_file(run, code):
    Path("folder").mkdir()
    assert run("folder") == ("folder is a folder; give a .npz with the arrays xa and xb", [])
    assert run("lost.npz") == ("lost.npz is not there; give a .npz with the arrays xa and xb", [])
    np.savez("given.npz", xa=GREY, xb=GREY)
    photographs = json.loads(Path("bundle/bundle.json").read_text()) | {"pairs": None}
    Path("bundle/bundle.json").write_text(json.dumps(photographs))
    digest = hashlib.sha256(Path("bundle/bundle.json").read_bytes()).hexdigest()
    lines = Path("bundle/SHA256").read_text().splitlines()
    Path("bundle/SHA256").write_text(
        "\n".join(f"{digest}  bundle.json" if line.endswith(" bundle.json") else line for line in lines)
    )
    ended, lines = run("given.npz")
    assert ended.startswith("no photographs below given.npz; give a folder with .jpg") and lines == []


def test_numbers_that_are_damaged_leave_the_prior(run, capsys):
    """What only reading all of them shows comes after the first table."""
    np.savez("given.npz", xa=NOISE, xb=NOISE)
    data = bytearray(Path("given.npz").read_bytes())
    data[6000] ^= 1
    Path("given.npz").write_bytes(data)
    ended, lines = run("given.npz")
    assert ended == 3 and lines == [f"given/{row:02d},not,{5 / 8:.6f}" for row in range(40)]
    said = capsys.readouterr().err
    assert "given.npz: cannot be read (Bad CRC-32 for file 'xa.npy'); copy it again; every row of" in said


def test_a_damaged_bundle_leaves_the_prior(run):
    """Nothing says then which arrays are pairs, but how many there are can be seen."""
    np.savez("given.npz", xa=GREY, xb=GREY, y=np.zeros(40), about=np.zeros(3), one=np.float32(1))
    Path("bundle/bundle.json").write_text("{}")
    ended, lines = run("given.npz")
    assert "bundle is damaged" in ended and lines == [f"given/{row:02d},not,{5 / 8:.6f}" for row in range(40)]


def test_a_sample_names_the_columns_of_two_classes(run, code, monkeypatch):
    """Three of them; one of two columns has no place for a probability."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    binary = export("binary", "bundle.columns=binary")
    np.savez("given.npz", xa=GREY, xb=GREY[::-1])
    _, lines = run("given.npz", binary)
    Path("ref").mkdir()
    for header in ("id,label,p", "id,label"):
        Path("ref/predictions_sample.csv").write_text(header + "\n0,0,0\n")
        assert run("given.npz", binary) == (0, lines)
        want = header if header.count(",") == 2 else "filename,category_id,probability"
        assert Path("out.csv").read_text().splitlines()[0] == want


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_sample_may_number_the_rows(run, code, monkeypatch, first):
    """From 0 or from 1, in any order; other numbers are none of theirs."""
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    np.savez("given.npz", xa=GREY, xb=GREY[::-1])
    _, lines = run("given.npz")
    order = np.random.default_rng(0).permutation(40)
    Path("ref").mkdir()
    Path("ref/predictions_sample.csv").write_text(
        "id,label\n" + "".join(f"{row + first},0\n" for row in order)
    )
    _, numbered = run("given.npz")
    if first < 2:
        lines = [",".join([str(row + first), *lines[row].split(",")[1:]]) for row in order]
    assert numbered == [line.rpartition(",")[0] for line in lines]


def test_without_words_test_dataset_npz_is_taken(run, code, monkeypatch):
    monkeypatch.setattr(code.bundles, "ROOT", str(Path.cwd()))
    np.savez("test_dataset.npz", xa=GREY, xb=GREY)
    assert code.predict.main(["--bundle", "bundle", "--threads", "1"]) == 0
    table = Path("results/results/submission.csv").read_text().splitlines()
    assert len(table) == 41 and table[1].startswith("test_dataset/00,")
