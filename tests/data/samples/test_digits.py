"""Digits as a contest: written files and rejected arguments."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from fastflower import convert, evaluate, export, sample_data
from fastflower.core.errors import InputError
from fastflower.data.samples.digits import HELD_OUT
from fastflower.recipe import checks, load


def test_digits_are_scikit_learns(capsys):
    sample_data.main(["digits"])
    home, truth = Path("data/digits"), load_digits()
    rows = np.loadtxt(home / "train.csv", delimiter=",", skiprows=1)
    training = len(truth.images) - HELD_OUT
    assert (rows[:, 0] == truth.target[:training]).all()
    levels = rows[:, 1:].reshape(-1, 8, 8) * 16 / 255
    assert np.abs(levels - truth.images[:training]).max() < 0.04
    files = sorted((home / "test").iterdir(), key=lambda path: int(path.stem))
    assert [path.stem for path in files] == [str(number) for number in range(1, HELD_OUT + 1)]
    last = np.asarray(Image.open(files[-1]), float) * 16 / 255
    assert np.abs(last - truth.images[-1]).max() < 0.04
    with open(home / "truth.csv", newline="") as file:
        assert [int(row["Label"]) for row in csv.DictReader(file)] == truth.target[training:].tolist()


def test_all_digits_may_train(capsys):
    sample_data.main(["digits", "held_out=0"])
    rows = np.loadtxt("data/digits/train.csv", delimiter=",", skiprows=1)
    assert rows[:, 0].tolist() == load_digits().target.tolist()
    assert Path("data/digits/truth.csv").read_text() == "ImageId,Label\n"
    with pytest.raises(InputError, match="held_out=1797: there are 1797 digits; leave some to train on"):
        sample_data.main(["digits", "held_out=1797", "home=none"])


def test_a_table_of_pixels_becomes_files(capsys):
    header = ",".join(f"pixel{i}" for i in range(25))
    Path("test.csv").write_text(f"{header}\n{','.join(['7'] * 25)}\n{','.join(map(str, range(25)))}\n")
    sample_data.main(["images", "test.csv", "out"])
    assert (np.asarray(Image.open("out/2.png")) == np.arange(25).reshape(5, 5)).all()
    assert "2 images of 5x5" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "got nothing; sample_data takes one of digits"),
        (["letters"], "got letters; sample_data takes one of digits"),
        (["images", "none.csv", "out"], "no none.csv"),
        (["images", "none.csv"], "got images none.csv; sample_data takes one of digits"),
        (["eyes", "row=3"], "got row=3; the keys of eyes are home, rows, held_out, seed"),
        (["digits", "rows=3"], "got rows=3; the keys of digits are home, held_out"),
        (["eyes", "rows=-3"], "rows=-3: must be a whole number from 0"),
    ],
)
def test_bad_arguments_are_refused(argv, message):
    with pytest.raises(InputError) as caught:
        sample_data.main(argv)
    assert message in str(caught.value)


@pytest.mark.parametrize("override", ["aug.hflip_p=0.5", "aug.vflip_p=0.1", "tta.hflip=true"])
def test_digits_are_not_flipped_unless_forced(repo, override):
    path = repo / "recipes/digits.yaml"
    for command in (convert.main, evaluate.main, export.main):
        with pytest.raises(InputError) as caught:
            command([str(path), override])
    key, _, value = override.partition("=")
    assert f"{key} = {value}: flips change the class of these images" in str(caught.value)
    for permission in ("checks.allow_flips=true", "data.flips_keep_class=true"):
        checks.check(load(path, [override, permission]))
