"""Export: the members that are chosen, the gates that a bundle passes, and the old one that stays when it does not."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastflower import checkpoint, convert, export, runs
from fastflower.data.labels import read_classes
from fastflower.errors import InputError
from fastflower.evaluation import bundle, gates
from fastflower.model.network import NetworkSpec, build_network
from fastflower.recipe import load

WORDS = [
    "exp.name=tiny", "data.root=photos", "data.csv=labels.csv", "data.n_splits=2", "data.fold=all", "data.img_size=32",
    "data.group=none", "data.workers=1", "model.backbone=resnet10t", "robust.enabled=false", "tta.scales=[32,48]",
    "bundle.max_ms=60000",
]  # fmt: skip


@pytest.fixture
def members():
    """Converted photographs and a member with random weights for each of two folds."""
    Path("photos").mkdir()
    rows = []
    for number in range(24):
        rng = np.random.default_rng(number)
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        name = f"{number:02d}.{'png' if number % 5 == 0 else 'jpg'}"
        small.resize((40 + 9 * (number % 4), 64), Image.Resampling.BICUBIC).save(Path("photos", name))
        rows.append([name, str(10 + 7 * (number % 3))])
    with open("labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["filename", "category_id"], *rows])
    convert.main(WORDS)
    return [make_member(fold) for fold in (0, 1)]


def make_member(fold: int, seed: int = 42, **changes: object) -> Path:
    classes = read_classes(Path("data/classes.csv"))
    meta = {
        "backbone": "resnet10t", "head": "linear", "head_scale": 30.0, "margin": 0.3, "num_classes": len(classes.ids),
        "size": [32, 32], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "interpolation": "bicubic",
        "resize_factor": 1.14, "stored_side": 55, "class_ids": list(classes.ids), "class_hash": classes.hash,
        "class_counts": [4, 4, 4], "fold": fold, "seed": seed, "epoch": 2, "weights": "raw", **changes,
    }  # fmt: skip
    torch.manual_seed(fold)
    network = build_network(NetworkSpec.from_meta(meta))
    path = runs.Run("tiny", "resnet10t", fold, seed).file("best_combo", 2, 0.5)
    checkpoint.save(path, network.state_dict(), meta)
    return path


def test_export_makes_a_hand_in_that_runs(members, capsys):
    export.main([*WORDS, "--zip", "hand-in.zip"])
    said = capsys.readouterr().out
    assert said.count("passed") == 5 and "FAILED" not in said
    assert "T = 1.0000 (no results/results/tiny/temperature.json" in said
    assert "logits move by at most" in said
    Path("again").mkdir()
    bundle.write(Path("again"), bundle.load_members(members, "fp16"), load(None, WORDS), 1.0)
    for path in runs.BUNDLE.iterdir():
        assert path.read_bytes() == Path("again", path.name).read_bytes(), path.name
    bundle.zip_hand_in(Path("again.zip"))
    assert Path("again.zip").read_bytes() == Path("hand-in.zip").read_bytes()
    with zipfile.ZipFile("hand-in.zip") as archive:
        assert {"code/predict.py", "results/model/bundle/bundle.json"} <= set(archive.namelist())
        archive.extractall("stranger")
    words = [sys.executable, "stranger/code/predict.py", "photos", "submission.csv", "--threads", "1"]
    assert subprocess.run(words, capture_output=True).returncode == 0
    assert len(Path("submission.csv").read_text().splitlines()) == 25
    assert [path.name for path in runs.MODELS.iterdir() if path.name.startswith(".")] == []


def test_a_failed_gate_keeps_the_old_bundle(members, capsys):
    runs.BUNDLE.mkdir(parents=True)
    Path(runs.BUNDLE, "old").write_text("old")
    with pytest.raises(
        InputError, match=r"^size: .* MB, allowed <= 0.01 MB; latency: .* allowed <= 0.0001 ms$"
    ):
        export.main([*WORDS, "bundle.max_mb=0.01", "bundle.max_ms=0.0001"])
    assert "FAILED" in capsys.readouterr().out
    assert [path.name for path in runs.BUNDLE.iterdir()] == ["old"]
    assert {path.name for path in runs.MODELS.iterdir()} == {"bundle", "tiny"}


def test_parity_fails_when_the_predictor_says_something_else(members, monkeypatch):
    honest = gates.views_logits
    monkeypatch.setattr(gates, "views_logits", lambda *words: honest(*words) + np.float32(0.001))
    with pytest.raises(InputError, match=r"parity: 0.001 on 24 photographs, allowed <= 0.0001$"):
        export.main(WORDS)
    assert not runs.BUNDLE.exists()


def test_members_of_two_class_maps_are_refused(members):
    other = make_member(1, seed=7, class_hash="0ther")
    with pytest.raises(InputError, match=r"a bundle holds members of one class map, choose with --members"):
        export.main([*WORDS, "--members", str(members[0]), str(other)])


def test_nothing_to_export_is_said():
    with pytest.raises(
        InputError, match=r"no member in results/model/tiny matches best_combo__.*; train first"
    ):
        export.main(WORDS)


def test_temperature_is_that_of_the_members():
    recipe, path = load(None, WORDS), runs.RESULTS / "tiny/temperature.json"
    one, two = Path("a.pth"), Path("b.pth")
    runs.write_json(path, {"fused": {"t": 1.5}, "members": {"a.pth": {"t": 1.2}, "b.pth": {"t": 1.9}}})
    assert bundle.temperature_of(recipe, [one, two]) == (1.5, f"{path}, fused")
    assert bundle.temperature_of(recipe, [two])[0] == 1.9
    assert bundle.temperature_of(recipe, [one, Path("c.pth")]) == (
        1.5,
        f"{path}, fused from other members (2)",
    )
    assert bundle.temperature_of(load(None, [*WORDS, "ts.enabled=false"]), [one]) == (1.0, "ts.enabled=false")
    runs.write_json(path, {"fused": None, "members": {}})
    assert bundle.temperature_of(recipe, [one, two]) == (1.0, f"{path} holds none")


def test_families_weigh_the_same():
    np.testing.assert_allclose(bundle.weights_of(["a", "a", "b"], "family"), [0.25, 0.25, 0.5])
    np.testing.assert_allclose(bundle.weights_of(["a", "a", "b"], "flat"), [1 / 3] * 3)


def test_stored_weights_keep_what_half_precision_cannot_hold():
    assert bundle.stored(torch.ones(4, 4), "fp16").dtype == torch.float16
    assert bundle.stored(torch.ones(4, 4), "fp32").dtype == torch.float32
    assert bundle.stored(torch.full((4,), 1e-7), "fp16").dtype == torch.float32
    assert bundle.stored(torch.full((2, 2), 1e6), "fp16").dtype == torch.float32
    assert bundle.stored(torch.ones(2, 2, dtype=torch.int64), "fp16").dtype == torch.int64


def test_a_program_that_says_something_else_is_refused(members):
    (member,) = bundle.load_members(members[:1], "fp32")
    weights = dict(member.network.named_parameters()) | dict(member.network.named_buffers())

    class Program:
        inlined_graph = ""

        def __call__(self, images, *_):
            return member.network(images) + 0.01

    with pytest.raises(
        InputError, match=r"at 32x32: traced logits are 0.01 off at batch 1, 0.0001 is allowed"
    ):
        bundle.check_program(Program(), member, 32, 32, list(weights.values()))
    Program.inlined_graph = 'prim::Constant[value="cpu"]()'
    with pytest.raises(InputError, match="its program is bound to the CPU"):
        bundle.check_program(Program(), member, 32, 32, list(weights.values()))


def test_one_program_serves_all_members_and_convolutions_all_sizes(members):
    Path("made").mkdir()
    made = bundle.write(Path("made"), bundle.load_members(members, "fp16"), load(None, WORDS), 1.0)
    assert [program["file"] for program in made["programs"]] == ["program_0.pt"]
    assert made["class_ids"] == ["10", "17", "24"] and sum(made["prior"]) == pytest.approx(1)
    assert json.loads(Path("made/bundle.json").read_text()) == made
    assert subprocess.run(["sha256sum", "-c", "SHA256"], cwd="made", capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.replace("confidence", "x,y"), "columns"),
        (lambda t: t.replace("000001.jpg", "other.jpg"), "2 rows for 2 photographs"),
        (lambda t: t.replace(",17,", ",18,"), "category ids that are not"),
        (lambda t: t.replace("0.5", "0.0"), r"a confidence outside \(0, 1\]"),
    ],
)
def test_a_wrong_submission_is_seen(tmp_path, change, fault):
    (tmp_path / "test_dataset").mkdir()
    (tmp_path / runs.SUBMISSION).parent.mkdir(parents=True)
    (tmp_path / runs.SUBMISSION).with_suffix(".json").write_text('{"unreadable": {}}')
    for number in range(2):
        (tmp_path / f"test_dataset/{number:06d}.jpg").write_bytes(b"")
    text = "filename,category_id,confidence\n000000.jpg,10,0.9\n000001.jpg,17,0.5\n"
    description = {"columns": "three", "class_ids": ["10", "17"]}
    (tmp_path / runs.SUBMISSION).write_text(text)
    assert gates.submission_fault(tmp_path, description, 2) is None
    (tmp_path / runs.SUBMISSION).write_text(change(text))
    found = gates.submission_fault(tmp_path, description, 2)
    assert found is not None and re.search(fault, found)
