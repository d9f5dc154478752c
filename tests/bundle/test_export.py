"""Export: the chosen members, the gates of a bundle, and the old bundle that stays when a gate fails."""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers.grn import GlobalResponseNorm

from fastflower import convert, export
from fastflower.bundle import archive, gates, held_out, program, sandbox, writer
from fastflower.bundle import members as bundle_members
from fastflower.bundle.description import BundleDescription, BundleMember, Program
from fastflower.bundle.members import ChosenMembers, choose, member_weights, temperature_of
from fastflower.bundle.program import QuickResponseNorm, check_program
from fastflower.bundle.submission import submission_fault
from fastflower.core import checkpoint, files, runs
from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.records import read_record, write_record
from fastflower.data.betons import fold_set
from fastflower.data.folds import read_folds
from fastflower.data.labels import read_classes
from fastflower.evaluation import logits, summary
from fastflower.model.member import save_member
from fastflower.model.network import build_network
from fastflower.recipe import load
from support import fake_members
from support.member_metas import member_meta

WORDS = [
    "exp.name=tiny", "data.root=photos", "data.csv=labels.csv", "data.n_splits=2", "data.fold=all", "data.img_size=32",
    "data.group=none", "data.workers=1", "model.backbone=resnet10t", "robust.enabled=false", "tta.scales=[32,48]",
    "bundle.max_ms=60000",
]  # fmt: skip

HALVES = np.array([0.5, 0.5])


def described(weights: tuple[float, ...] = (), **changes: object) -> BundleDescription:
    """A description of members with these weights, for gates that read a few fields only."""
    fields = {
        "fastflower": "0", "class_ids": ["10", "17"], "class_hash": "", "prior": [0.5, 0.5], "columns": "three",
        "half": "gpu", "temperature": 1.0, "hflip": False, "reduce": "mean", "space": "logits", "pairs": None,
        "tolerance": 1e-4, "pixel_tolerance": 0, "labels": ["10", "17"], "top_k": 2, "separator": " ",
        "crops": [], "programs": [Program(file="", inputs=[], norms=[], half_keeps=[])],
        "members": [
            BundleMember(name="", weights="", weight=weight, views=[], expected=[]) for weight in weights
        ],
    }  # fmt: skip
    return BundleDescription(**{**fields, **changes})


@pytest.fixture(scope="session")
def exportable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A folder with converted photographs and a member with random weights for each of two folds; and their paths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("exportable"))
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
        return Path.cwd(), [make_member(fold) for fold in (0, 1)]


@pytest.fixture
def members(exportable) -> list[Path]:
    """The members of `exportable`, in a copy of it that is the current directory."""
    folder, paths = exportable
    shutil.copytree(folder, Path.cwd(), dirs_exist_ok=True)
    return paths


def make_member(fold: int, seed: int = 42, **changes: object) -> Path:
    classes = read_classes(Path("data/classes.csv"))
    hashes = {"class_ids": tuple(classes.ids), "class_hash": classes.hash}
    hashes["folds_hash"] = read_folds(Path("data/folds.csv")).hash
    meta = member_meta(**{**hashes, "fold": fold, "seed": seed, "epoch": 2, **changes})
    torch.manual_seed(fold)
    network = build_network(meta)
    path = runs.Run(exp="tiny", backbone="resnet10t", fold=fold, seed=seed).checkpoint_path(
        "best_combo", 2, 0.5
    )
    save_member(path, network.state_dict(), meta)
    return path


@pytest.mark.slow
def test_export_makes_a_hand_in_that_runs(members, capsys):
    export.main([*WORDS, "--zip", "hand-in.zip"])
    output = capsys.readouterr().out
    assert output.count("passed") == 7 + torch.cuda.is_available() and "FAILED" not in output
    assert "fresh venv, no network" in output and "no logits; run python -m fastflower.evaluate" in output
    assert "T = 1.0000 (no results/results/tiny/temperature.json" in output
    assert "logits move by at most" in output
    modes = {path.stat().st_mode & 0o777 for path in runs.BUNDLE.iterdir()}
    assert modes == {0o644}  # whoever runs the folder may be another user
    Path("again").mkdir()
    writer.write_bundle(
        Path("again"),
        writer.load_members(members, "fp16"),
        weights=HALVES,
        recipe=load(None, WORDS),
        temperature=1.0,
    )
    for path in runs.BUNDLE.iterdir():
        assert path.read_bytes() == Path("again", path.name).read_bytes(), path.name
    described = [(member.path, member.meta) for member in writer.load_members(members, "fp16")]
    records, omitted = archive.training_records(load(None, WORDS), described)
    assert omitted == []
    archive.zip_hand_in(Path("again.zip"), records=records)
    assert Path("again.zip").read_bytes() == Path("hand-in.zip").read_bytes()
    with zipfile.ZipFile("hand-in.zip") as packed:
        names = {"code/predict.py", "results/model/bundle/bundle.json", "training/REPRODUCE.md"}
        assert names <= set(packed.namelist())
        packed.extractall("stranger")
    command = [sys.executable, "stranger/code/predict.py", "photos", "submission.csv", "--threads", "1"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert len(Path("submission.csv").read_text().splitlines()) == 25
    assert [path.name for path in runs.MODELS.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_images_that_came_as_numbers_are_handed_in_too(capsys):
    rng = np.random.default_rng(0)
    images = np.kron(rng.integers(0, 256, (24, 5, 7), dtype=np.uint8), np.ones((1, 8, 8), np.uint8))
    np.savez("digits.npz", x=images, y=np.arange(24) % 3)
    arguments = [*WORDS, "data.root=digits.npz", "tta.scales=[32]"]
    convert.main(arguments)
    members = [make_member(fold) for fold in (0, 1)]
    export.main(arguments)
    output = capsys.readouterr().out
    assert output.count("passed") == 7 + torch.cuda.is_available() and "FAILED" not in output
    assert "0 of 255 on 24 photographs" in output
    held_out = gates.collect(Path("held out"), load(None, arguments), writer.load_members(members, "fp16"))
    for file, row in zip(held_out.files, held_out.index, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), images[row])


def test_photographs_of_data_val_are_handed_in_from_there():
    for number in range(9):
        folder = Path("train" if number < 6 else "val", "ab"[number % 2])
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.jpg")
    arguments = [*WORDS, "data.root=train", "data.val=val"]
    convert.main(arguments)
    member = types.SimpleNamespace(meta=types.SimpleNamespace(fold=0))
    held_out = gates.collect(Path("held out"), load(None, arguments), [member])
    expected = {path.read_bytes() for path in Path("val").rglob("*.jpg")}
    assert {file.read_bytes() for file in held_out.files} == expected and len(expected) == 3


@pytest.mark.slow
def test_an_original_that_is_not_the_converted_one_is_refused(members, monkeypatch):
    """As when a disk beneath the file system changes it: size, times and inode stay, so no short cut shows it."""
    loaded = writer.load_members(members[:1], "fp16")
    monkeypatch.setattr(fold_set, "inputs_hash", lambda home, table: table_hash)
    table_hash = fold_set.open_beton(Path("data/betons/fold0_val.beton")).origin.inputs_hash
    opened = fold_set.open_fold(load(None, WORDS), 0)
    name = opened.folds.filenames[int(opened.val.index[0])]
    Path("photos", name).write_bytes(Path("photos", name).read_bytes() + b"\0")
    with pytest.raises(CorruptionError, match=f"{name} is not the image that was converted: its SHA-256"):
        held_out.collect(Path("held out"), load(None, WORDS), loaded)


def test_the_archive_holds_what_repeats_the_training_as_far_as_it_fits(members):
    results, logs = runs.RESULTS / "tiny", runs.MODELS / "tiny"
    for path, text in {
        results / "meta/recipe.yaml": "seed: 42\n",
        results / "meta/run/2026-01-31_10-00-00/recipe.yaml": "seed: 42\n",
        results / "meta/run/2026-01-31_10-00-00/versions.json": "{}",
        results / "meta/folds.csv": "filename\n",
        results / "scores.json": "{}",
        logs / "train_run.log": "x" * 2000,
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    runs.BUNDLE.mkdir(parents=True)
    Path(runs.BUNDLE, "bundle.json").write_text("{}")
    described = [(path, bundle_members.read_meta(path)) for path in members]
    records, omitted = archive.training_records(load(None, WORDS), described)
    assert omitted == [] and next(iter(records)) == "REPRODUCE.md"
    assert {"tiny/meta/recipe.yaml", "tiny/scores.json", "tiny/train_run.log", "tiny/meta/folds.csv"} <= set(
        records
    )
    assert "tiny/meta/run/2026-01-31_10-00-00/versions.json" in records
    text = records["REPRODUCE.md"].decode()
    assert "python -m fastflower.train training/tiny/meta/recipe.yaml model.backbone=resnet10t" in text
    assert all(path.name in text for path in members) and "python code/predict.py" in text
    both = [*described, (members[0], replace(described[0][1], exp="b"))]
    together = "fastflower.export training/b/meta/recipe.yaml training/tiny/meta/recipe.yaml\n"
    assert archive.reproduce(load(None, WORDS), both).count("fastflower.export") == 1
    assert together in archive.reproduce(load(None, WORDS), both)
    size = sum(path.stat().st_size + 200 for path in archive._hand_in()) + sum(
        len(c) + 200 for c in records.values()
    )
    limit = [*WORDS, f"bundle.max_mb={(size - 100) / 1e6}"]
    fewer, omitted = archive.training_records(load(None, limit), described)
    assert omitted == ["tiny/train_run.log"] and set(fewer) == set(records) - set(omitted)
    archive.zip_hand_in(Path("a.zip"), records=fewer)
    assert Path("a.zip").stat().st_size <= size


@pytest.mark.slow
def test_eight_bits_halve_the_bundle_and_say_what_they_cost(members, capsys):
    export.main([*WORDS, "tta.scales=[32]"])
    half = sum(path.stat().st_size for path in runs.BUNDLE.glob("weights_*"))
    capsys.readouterr()
    export.main([*WORDS, "tta.scales=[32]", "bundle.dtype=int8", "--zip", "a.zip", "--top", "team 7"])
    assert sum(path.stat().st_size for path in runs.BUNDLE.glob("weights_*")) < 0.52 * half
    output = capsys.readouterr().out
    assert re.search(r"int8 +\d+ right of 24, \d+ before +>= \d+ right +passed", output)
    assert len(re.findall(r"int8 best_combo__.*: top-1 0\.\d+ -> 0\.\d+, NLL .* \(n = 24\)", output)) == 2
    with zipfile.ZipFile("a.zip") as packed:
        assert {name.split("/")[0] for name in packed.namelist()} == {"team 7"}


@pytest.mark.slow
def test_half_precision_is_seen_where_a_machine_has_it(members, capsys, code):
    export.main([*WORDS, "bundle.half=all"])
    output = capsys.readouterr().out
    gpu, native = torch.cuda.is_available(), code.networks.multiplies_bf16()
    assert gpu or re.search(r"half, gpu +no GPU here +not seen", output)
    if native:
        assert re.search(r"half, cpu +\d+ right of 24, \d+ before +>= \d+ right +passed", output)
        moved = r"cpu, bf16: logits move by at most \S+, the largest is \S+; another class for \d+ of 24"
        assert re.search(moved, output)
    else:
        assert re.search(r"half, cpu +no bf16 instructions here +not seen", output)
    assert gpu or re.search(rf"\d threads, {'bf16' if native else 'fp32'} ", output)
    assert output.count("passed") == 7 + gpu + native
    assert json.loads((runs.BUNDLE / "bundle.json").read_text())["half"] == "all"


@pytest.mark.slow
def test_what_nothing_measured_is_not_left_beside_members(members):
    for half, expected in (("all", "gpu"), ("gpu", "gpu"), ("none", "none")):
        folder = writer.write_programs(
            members, HALVES, recipe=load(None, [*WORDS, f"bundle.half={half}"]), temperature=1.0
        )
        assert json.loads((folder / "bundle.json").read_text())["half"] == expected


@pytest.fixture
def half(monkeypatch):
    """The gate of half precision for made-up results of the predictor on a device; and its logits in fp32."""
    exact = np.zeros((40, 2, 1, 3))
    exact[:, :, :, 1] = 1.0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gates, "submission_fault", lambda *_, **__: None)

    def gate(
        got: np.ndarray,
        device_and_precision: str = "cuda, fp16",
        *,
        notes: tuple[str, ...] = (),
        fault: str | None = None,
        device: str = "gpu",
        unfit: bool = False,
    ) -> tuple[gates.Gate, list[str]]:
        def run(root: Path, options: list[str], python: Path | None) -> str | None:
            assert options[:2] == ["--device", {"gpu": "cuda", "cpu": "cpu"}[device]]
            np.savez(options[options.index("--logits") + 1], logits=got)
            return fault

        monkeypatch.setattr(sandbox, "run_predictor", run)
        monkeypatch.setattr(
            gates, "run_summary", lambda _: {"device": device_and_precision, "notes": list(notes)}
        )
        program = Program(file="", inputs=[], norms=[], half_keeps=None if unfit else [])
        return gates.half_precision(
            Path(),
            exact,
            bundle=described((0.8, 0.2), programs=[program]),
            labels=np.ones(40, np.int64),
            max_loss=0.05,
            python=None,
            device=device,
        )

    return gate, exact


@pytest.mark.parametrize(("turned", "member", "right"), [(0, 0, 40), (2, 0, 38), (3, 0, 37), (20, 1, 40)])
def test_half_precision_that_costs_answers_is_a_failed_gate(half, turned, member, right):
    """Two members of weights 0.8 and 0.2; one turns from right to wrong on some photographs."""
    gate, got = half
    got = got.copy()
    got[:turned, member, :, 2] = 1.5
    result, notes = gate(got, notes=("a note",))
    assert result == gates.Gate(
        "half, gpu", got=f"{right} right of 40, 40 before", allowed=">= 38 right", passed=right >= 38
    )
    assert notes[0].startswith("cuda, fp16: logits") and notes[1:] == ["a note"]
    assert notes[0].endswith(f"another class for {40 - right} of 40")


def test_half_precision_without_logits_fails_and_that_of_no_device_is_not_seen(half, monkeypatch):
    gate, exact = half
    lost = exact.copy()
    lost[3] = np.nan
    for got in (lost, exact[:, :1], exact[:39]):
        result, lines = gate(got)
        assert (result.passed, lines) == (False, []) and "missing or not finite" in result.got
    result, lines = gate(exact, fault="exit 4: killed")
    assert (result.passed, result.got, lines) == (False, "exit 4: killed", [])
    result, _ = gate(exact, "cuda, fp32", notes=("cuda in fp16: no kernel",))
    assert (result.passed, result.got) == (None, "cuda in fp16: no kernel")
    assert gate(exact, "cpu, fp32")[0].got == "computed by cpu, fp32"  # after the GPU killed a process
    assert gate(exact, "cpu, fp32", device="cpu")[0].got == "no bf16 instructions here"
    assert gate(exact, "cuda, fp32", unfit=True)[0].got == "networks unfit for it"
    monkeypatch.setattr(gates, "submission_fault", lambda *_, **__: "3 photographs unreadable")
    result, _ = gate(exact)
    assert (result.passed, result.got) == (False, "3 photographs unreadable")
    assert gates.half_devices("all") == ["cpu", "gpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gates.half_devices("all") == ["gpu", "cpu"] and gates.half_devices("none") == []
    assert gate(exact)[0] == gates.Gate("half, gpu", got="no GPU here", allowed="", passed=None)


def test_latency_is_that_of_a_run_that_ended_well(monkeypatch):
    description = described()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    summary = {"device": "cpu, bf16", "threads": 2, "ms_per_image": 30.0}
    monkeypatch.setattr(gates, "run_summary", lambda _: summary)
    monkeypatch.setattr(sandbox, "run_predictor", lambda *_, **__: "exit 3: damaged")
    gate = gates.latency(Path(), description, allowed=50.0, python=None)
    assert gate.passed and re.search(r"^30.0 ms an image on .*, 2 threads, bf16$", gate.got)
    gate = gates.latency(Path(), description, allowed=20.0, python=None)  # tried again
    assert gate == gates.Gate("latency", got="exit 3: damaged", allowed="<= 20 ms", passed=False)
    del summary["ms_per_image"]
    monkeypatch.setattr(sandbox, "run_predictor", lambda *_, **__: None)
    assert gates.latency(Path(), description, allowed=50.0, python=None).passed is False


def test_a_loss_of_score_is_a_failed_gate():
    assert gates.loss_gate("int8", 94, before=96, count=200, max_loss=0.01).passed is True
    assert gates.loss_gate("int8", 93, before=96, count=200, max_loss=0.01).passed is False
    assert gates.loss_gate("int8", 7, before=8, count=8, max_loss=0.01).passed is True


def test_accuracy_is_that_of_members_that_did_not_train_on_the_photograph(members):
    """Two members, one for each fold: both are right on their own validation fold and wrong on the other."""
    labels = np.array([0, 1, 2, 0])
    photographs = gates.HeldOut(
        files=[Path("a")] * 4, class_idx=labels, index=np.arange(4), fold=np.array([0, 1, 0, 1])
    )
    loaded = writer.load_members(members, "fp16")
    right = np.eye(3)[labels]
    got = np.stack([right, right], axis=1)[:, :, None]
    wrong = np.eye(3)[(labels + 1) % 3][:, None]
    got[[1, 3], 0], got[[0, 2], 1] = wrong[[1, 3]], wrong[[0, 2]]
    bundle = described((0.5, 0.5))
    out_of_fold = {
        member.path: types.SimpleNamespace(index=np.arange(4), logits=right.astype(np.float32))
        for member in loaded
    }
    gate = gates.out_of_fold_agreement(
        got, bundle, members=loaded, photographs=photographs, out_of_fold=out_of_fold, max_loss=0.01
    )
    assert gate.got == "4 right of 4, 4 before" and gate.passed
    gate = gates.out_of_fold_agreement(
        np.roll(got, 1, axis=3),
        bundle,
        members=loaded,
        photographs=photographs,
        out_of_fold=out_of_fold,
        max_loss=0.01,
    )
    assert gate.got == "0 right of 4, 4 before" and gate.passed is False
    assert (
        gates.out_of_fold_agreement(
            got, bundle, members=loaded, photographs=photographs, out_of_fold={}, max_loss=0.01
        ).passed
        is None
    )


def test_a_bare_environment_has_what_the_predictor_needs_and_no_more(tmp_path):
    python = sandbox.make_environment(tmp_path / "venv")
    code = "import importlib.util as u; print([n for n in %r if u.find_spec(n)])" % [
        "torch", "numpy", "PIL", *sandbox.BLOCKED, "pip", "safetensors",
    ]  # fmt: skip
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['torch', 'numpy', 'PIL']"


@pytest.mark.slow
def test_a_failed_gate_keeps_the_old_bundle(members, capsys):
    runs.BUNDLE.mkdir(parents=True)
    Path(runs.BUNDLE, "bundle.json").write_text("old")
    with pytest.raises(
        InputError, match=r"^size: .* MB, allowed <= 0.01 MB; latency: .* allowed <= 0.0001 ms$"
    ):
        export.main([*WORDS, "bundle.max_mb=0.01", "bundle.max_ms=0.0001"])
    assert "FAILED" in capsys.readouterr().out
    assert [path.read_text() for path in runs.BUNDLE.iterdir()] == ["old"]
    assert {path.name for path in runs.MODELS.iterdir()} == {"bundle", "tiny"}


@pytest.mark.slow
def test_parity_fails_when_the_predictor_says_something_else(members, monkeypatch):
    honest = gates.views_logits
    monkeypatch.setattr(
        gates, "views_logits", lambda *words, **named: honest(*words, **named) + np.float32(0.001)
    )
    with pytest.raises(InputError, match=r"parity: 0.001 on 24 photographs, allowed <= 0.0001$"):
        export.main(WORDS)
    assert not runs.BUNDLE.exists()


@pytest.mark.slow
def test_pixels_that_are_not_the_trainers_fail(members, monkeypatch):
    honest = gates.trainer_view
    monkeypatch.setattr(gates, "trainer_view", lambda *words, **named: honest(*words, **named) ^ 1)
    with pytest.raises(InputError, match=r"^pixels: 1 of 255 on 24 photographs, allowed <= 0"):
        export.main([*WORDS, "tta.scales=[32]"])


def test_what_a_killed_export_left_is_removed():
    dead, alive = 2**22 + 1, os.getppid()  # no process has the first: too large
    for target in (runs.BUNDLE, runs.MODELS / "tiny" / writer.PROGRAMS):
        abandoned, in_use = (files.temporary_path(target, process) for process in (dead, alive))
        for folder in (abandoned, in_use):
            folder.mkdir(parents=True)
            Path(folder, "weights_0.safetensors").touch()
        with writer.temporary_bundle(target) as folder:
            assert set(target.parent.glob(".*")) == {folder, in_use}
    with writer.temporary_bundle() as folder:
        writer.publish(folder)
    files.temporary_path(Path("a.zip"), dead).touch()
    archive.zip_hand_in(Path("a.zip"))
    assert {path.name for path in Path().iterdir()} == {"a.zip", "results"}


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_while_a_bundle_is_put_in_place_loses_none(monkeypatch, exchange):
    def publish(text: str) -> None:
        with writer.temporary_bundle() as folder:
            Path(folder, "bundle.json").write_text(text)
            writer.publish(folder)

    publish("old")
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    child = os.fork()
    if not child:
        rename, turns = os.rename, iter([True])
        os.rename = lambda *arguments, **keywords: (
            rename(*arguments, **keywords) if next(turns, False) else os._exit(9)
        )
        files.fsync_folder = lambda folder: os._exit(9)
        try:
            publish("new")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert runs.BUNDLE.exists() == exchange
    with pytest.raises(InputError), writer.temporary_bundle():  # the next export, whose gates fail
        raise InputError("size")
    assert Path(runs.BUNDLE, "bundle.json").read_text() == ("new" if exchange else "old")
    assert [path.name for path in runs.MODELS.iterdir()] == ["bundle"]


def test_members_of_two_class_maps_are_refused(members):
    other = make_member(1, seed=7, class_hash="0ther")
    with pytest.raises(InputError, match=r"a bundle holds members of one class map, choose with --members"):
        writer.load_members([members[0], other], "fp16")
    with pytest.raises(InputError, match=r"seed7.* was trained with other classes \(0ther\) than data holds"):
        export.main([*WORDS, "--members", str(members[0]), str(other)])


def test_nothing_to_export_is_said():
    with pytest.raises(
        InputError, match=r"no member in results/model/tiny matches best_combo__.*; train first"
    ):
        export.main(WORDS)


def test_temperature_is_that_of_the_members():
    recipe, path = load(None, WORDS), runs.RESULTS / "tiny/temperature.json"
    first, second = Path("a.pth"), Path("b.pth")
    content = fake_members.temperatures(
        fused=fake_members.temperature(1.5),
        members={"a.pth": fake_members.temperature(1.2), "b.pth": fake_members.temperature(1.9)},
    )
    write_record(path, replace(content, weighting="family"))
    assert temperature_of(recipe, [first, second]) == (1.5, f"{path}, fused with the weights of family")
    write_record(path, replace(content, weighting="flat"))
    assert temperature_of(recipe, [first, second]) == (1.5, f"{path}, fused")
    assert temperature_of(recipe, [second])[0] == 1.9
    assert temperature_of(recipe, [first, Path("c.pth")]) == (
        1.5,
        f"{path}, fused from other members (2)",
    )
    assert temperature_of(load(None, [*WORDS, "ts.enabled=false"]), [first]) == (1.0, "ts.enabled=false")
    write_record(path, fake_members.temperatures(fused=None, members={}))
    assert temperature_of(recipe, [first, second]) == (1.0, f"{path} holds none")


def evaluated(count: int = 3, *, exp: str = "tiny", better: float = 0.0, **sizes: float) -> list[Path]:
    """Files of made-up members of two backbones as evaluate writes them; the first backbone is the better one."""
    folder, paths, members = runs.RESULTS / exp, [], []
    fake_members.write_folds(Path("data/folds.csv"), count=count)
    for backbone, skill in zip(fake_members.BACKBONES, (2.0, 1.6), strict=True):
        for fold in range(count):
            member = fake_members.member(
                fold, backbone, skill=skill + better, mb=sizes.get(backbone[:3], 100.0), ms=10.0
            )
            path = runs.MODELS / exp / member.info.checkpoint
            path.parent.mkdir(parents=True, exist_ok=True)
            hashes = {"folds_hash": fake_members.drawn_folds().hash, "exp": exp}
            save_member(path, {}, member_meta(backbone=backbone, seed=42, fold=fold, **hashes))
            member = replace(member, info=replace(member.info, seal=checkpoint.seal(path)))
            logits.save_logits(folder / "oof", member)
            paths.append(path)
            members.append(member)
    classes, column = fake_members.classes_csv(), fake_members.folds(count=count)
    write_record(
        folder / "scores.json", summary.summarise(members, column, classes=classes, recipe=load(None, []))
    )
    return paths


def greedy(*words: str) -> ChosenMembers:
    words = (f"model.backbone={fake_members.BACKBONES[0]}", *words)
    return choose(load(None, [*WORDS, "bundle.members=greedy", *words]), [])


def test_greedy_takes_the_runs_that_help_and_as_many_folds_as_fit():
    paths = evaluated()
    every = greedy("bundle.max_mb=1000")
    assert every.paths == sorted(paths) and every.weights.sum() == pytest.approx(1)
    assert "fitted on 118 out-of-fold images of the chosen runs" in every.source and every.temperature > 0
    four = greedy("bundle.max_mb=410")
    assert len(four.paths) == 4 and {runs.parse_member(path).backbone for path in four.paths} == set(
        fake_members.BACKBONES
    )
    one = greedy("bundle.max_mb=110")
    assert [runs.parse_member(path).backbone for path in one.paths] == [fake_members.BACKBONES[0]]
    assert len(greedy("bundle.max_mb=110", "bundle.dtype=int8").paths) == 2
    assert len(greedy("bundle.max_mb=1000", "bundle.max_ms=35").paths) == 3


def test_members_of_two_experiments_become_one_bundle():
    paths = {exp: evaluated(exp=exp, better=better) for exp, better in (("a", 0.0), ("b", 1.0))}
    words = [*WORDS, f"model.backbone={fake_members.BACKBONES[0]}"]

    def chosen(*changes: str, other: str = "tta.hflip=true") -> ChosenMembers:
        first, second = (
            load(None, [*words, f"exp.name={exp}", *more])
            for exp, more in (("a", changes), ("b", [*changes, other]))
        )
        return choose(first, [], others=[second])

    flat = chosen()
    assert flat.paths == [*sorted(paths["a"]), *sorted(paths["b"])] and flat.weights is None
    assert "fitted on 118 out-of-fold images" in flat.source and flat.temperature != 1.0
    best = chosen("bundle.members=greedy", "bundle.max_mb=110")
    assert [path.parent.name for path in best.paths] == ["b"] and best.weights.sum() == pytest.approx(1)
    with pytest.raises(
        InputError, match=r"tta.hflip is true in a and false in b, and a bundle has one; give it as"
    ):
        chosen(other="tta.hflip=false")
    with pytest.raises(InputError, match=r"the number of tta.scales is 2 in a and 1 in b"):
        chosen(other="tta.scales=[32]")
    with pytest.raises(
        InputError, match=r"ensembling.weighting = learned: evaluate fits these weights for one"
    ):
        chosen("ensembling.weighting=learned")
    with pytest.raises(
        InputError, match=r"bundle.prior = em: evaluate measures it for one experiment; for several"
    ):
        chosen("bundle.prior=em")
    with pytest.raises(InputError, match=r"model.backbone = resnet18, but the members of b are of"):
        chosen(other="model.backbone=resnet18")


def test_greedy_share_of_a_run_is_split_by_its_folds():
    evaluated()
    limited = greedy("bundle.max_mb=410")
    by_run = {}
    for path, weight in zip(limited.paths, limited.weights, strict=True):
        by_run.setdefault(runs.parse_member(path).backbone, []).append(weight)
    assert all(len(set(weights)) == 1 for weights in by_run.values())
    full = greedy("bundle.max_mb=1000")
    for backbone, weights in by_run.items():
        full_weights = [s for p, s in zip(full.paths, full.weights, strict=True) if backbone in p.name]
        assert sum(weights) == pytest.approx(sum(full_weights))


def test_greedy_without_logits_or_room_is_said():
    paths = evaluated(con=300.0, vit=400.0)
    with pytest.raises(
        InputError, match=r"the smallest member takes 300.0 MB and 10.0 ms, allowed are 98.0 MB"
    ):
        greedy("bundle.max_mb=100")
    with pytest.raises(InputError, match=r"1 of 7 members have no out-of-fold logits; run python -m"):
        (paths[0].parent / paths[0].name.replace("fold0", "fold8")).write_bytes(b"")
        greedy()


def test_families_weigh_the_same():
    chosen, names = ChosenMembers(paths=[], weights=None, temperature=1.0, source=""), ["a", "a", "b"]
    np.testing.assert_allclose(member_weights(chosen, names, "family"), [0.25, 0.25, 0.5])
    np.testing.assert_allclose(member_weights(chosen, names, "flat"), [1 / 3] * 3)


def test_members_weigh_what_the_evaluation_found_for_their_run():
    members, recipe = [("a", 1), ("a", 1), ("b", 1)], load(None, [*WORDS, "ensembling.weighting=learned"])
    path = runs.RESULTS / "tiny/temperature.json"
    with pytest.raises(InputError, match=r"has no weight for a seed 1; run python -m fastflower\.evaluate"):
        bundle_members.weights_from_runs(recipe, members)
    weights = {"a seed 1": 0.2, "b seed 1": 0.6, "c seed 1": 0.2}
    files.write_json(path, {"weights": weights})
    with pytest.raises(InputError, match=r"not a complete record; run python -m fastflower\.evaluate again"):
        bundle_members.weights_from_runs(recipe, members)
    write_record(path, fake_members.temperatures(weighting="learned", weights=weights))
    np.testing.assert_allclose(bundle_members.weights_from_runs(recipe, members), [0.125, 0.125, 0.75])
    recipes = {way: load(None, [*WORDS, f"ensembling.weighting={way}"]) for way in ("greedy", "hand")}
    with pytest.raises(
        InputError, match=r"= greedy: .* has the weights of learned; run python -m fastflower"
    ):
        bundle_members.weights_from_runs(recipes["greedy"], members)
    recipes["hand"] = load(None, [*WORDS, "ensembling.weighting=hand", "ensembling.weights={a: 1, b: 2}"])
    write_record(
        path, fake_members.temperatures(weighting="hand", hand_weights={"a": 1, "b": 1}, weights=weights)
    )
    with pytest.raises(
        InputError, match=r"= hand: .* has the weights of hand {'a': 1, 'b': 1}; run python -m"
    ):
        bundle_members.weights_from_runs(recipes["hand"], members)
    recipes["hand"] = load(None, [*WORDS, "ensembling.weighting=hand", "ensembling.weights={a: 1, b: 1}"])
    np.testing.assert_allclose(
        bundle_members.weights_from_runs(recipes["hand"], members), [0.125, 0.125, 0.75]
    )
    none = {"a seed 1": 0.0, "b seed 1": 0.0}
    write_record(path, fake_members.temperatures(weighting="learned", weights=none))
    with pytest.raises(InputError, match="are 0; choose other members"):
        bundle_members.weights_from_runs(recipe, members)


@pytest.mark.parametrize("weighting", ["learned", "greedy"])
def test_a_run_without_a_say_is_not_handed_in(weighting):
    paths = evaluated()
    weights = {f"{fake_members.BACKBONES[0]} seed 42": 1.0, f"{fake_members.BACKBONES[1]} seed 42": 0.0}
    content = fake_members.temperatures(
        weighting=weighting, weights=weights, fused=fake_members.temperature(1.5)
    )
    write_record(runs.RESULTS / "tiny/temperature.json", content)
    kept = [path for path in paths if fake_members.BACKBONES[0] in path.name]
    words = [f"model.backbone={fake_members.BACKBONES[0]}", f"ensembling.weighting={weighting}"]
    chosen = choose(load(None, [*WORDS, *words]), [])
    assert chosen.paths == sorted(kept) and np.allclose(chosen.weights, 1 / 3)


def test_stored_weights_keep_what_half_precision_cannot_hold():
    def stored(tensor, dtype):
        return writer.pack({"a.weight": tensor}, dtype)["a.weight"].dtype

    assert stored(torch.ones(4, 4), "fp16") == torch.float16
    assert stored(torch.ones(4, 4), "fp32") == torch.float32
    assert stored(torch.full((4,), 1e-7), "fp16") == torch.float32
    assert stored(torch.full((2, 2), 1e6), "fp16") == torch.float32
    assert stored(torch.ones(2, 2, dtype=torch.int64), "fp16") == torch.int64
    assert stored(torch.ones(4, 4), "int8") == torch.int8
    assert stored(torch.ones(4), "int8") == torch.float32


def test_eight_bits_keep_half_a_step_of_each_channel():
    tensor = torch.randn(5, 3, 7, 7) * torch.tensor([1e-4, 1, 1e3, 0, 1]).view(-1, 1, 1, 1)
    packed = writer.pack({"a.weight": tensor, "pos_embed": torch.randn(1, 9, 4)}, "int8")
    assert packed["a.weight"].dtype == torch.int8 and packed["pos_embed"].dtype == torch.float16
    unpacked = writer.unpack(packed)
    step = tensor.flatten(1).abs().amax(1) / 127
    gap = (unpacked["a.weight"] - tensor).flatten(1).abs().amax(1)
    assert sorted(unpacked) == ["a.weight", "pos_embed"]
    assert (gap <= 0.5001 * step).all() and (gap > 0.1 * step)[[0, 1, 2, 4]].all()


def test_a_program_that_says_something_else_is_refused(members):
    (member,) = writer.load_members(members[:1], "fp32")
    weights = dict(member.network.named_parameters()) | dict(member.network.named_buffers())

    class Program:
        def __call__(self, images, *_):
            return member.network(images) + 0.01

    with pytest.raises(
        InputError, match=r"at 32x32: traced logits are 0.01 off at batch 1, 0.0001 is allowed"
    ):
        check_program(
            Program(),
            "a.pth at 32x32",
            network=member.network,
            height=32,
            width=32,
            weights=list(weights.values()),
        )


def test_columns_for_two_classes_are_refused_for_three(members):
    Path("made").mkdir()
    recipe, packed = load(None, [*WORDS, "bundle.columns=binary"]), writer.load_members(members, "fp16")
    with pytest.raises(InputError, match=r"bundle.columns = binary: there are 3 classes, not two; use three"):
        writer.write_bundle(Path("made"), packed, weights=HALVES, recipe=recipe, temperature=1.0)


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_quick_response_norm_is_timms(channels_last):
    """Also in half precision for inputs whose squares it cannot hold, and for zeros."""
    rng = np.random.default_rng(0)
    plain = GlobalResponseNorm(12, channels_last=channels_last)
    for weight in (plain.weight, plain.bias):
        weight.data = torch.from_numpy(rng.normal(size=12).astype(np.float32))
    quick = copy.deepcopy(plain)
    quick.__class__ = QuickResponseNorm
    values = rng.normal(size=(3, 12, 12, 12)).astype(np.float32)
    for scale in (1, 1e-3, 0):
        inputs = torch.from_numpy(values * scale)
        np.testing.assert_allclose(quick(inputs).detach(), plain(inputs).detach(), rtol=1e-5, atol=1e-6)
    for side, rms in ((12, 2000), (96, 1000), (96, 4000)):  # float16 holds 65504
        wide = torch.from_numpy(rng.normal(size=(1, side, side, 12)).astype(np.float32).clip(-4, 4) * rms)
        inputs = wide if channels_last else wide.permute(0, 3, 1, 2)
        expected, got = plain(inputs).detach(), copy.deepcopy(quick).half()(inputs.half()).detach().float()
        assert float((got - expected).abs().max()) <= 2e-3 * float(expected.abs().max())
    assert torch.isfinite(quick.half()(torch.zeros(1, 12, 12, 12).half())).all()


def test_the_quick_response_norm_leaves_a_program_its_half_precision():
    """The tracer takes a tensor and its float32 version for one: cast back, the next layer would meet float32."""
    norm = GlobalResponseNorm(6, channels_last=False)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3), norm, torch.nn.Conv2d(6, 2, 3), torch.nn.Flatten()
    )
    traced = program.trace(Path("a.pth"), network, height=8, width=8, tensors={})
    assert traced.half_keeps == []


def test_one_program_serves_all_members_and_convolutions_all_sizes(members):
    Path("made").mkdir()
    bundle = writer.write_bundle(
        Path("made"),
        writer.load_members(members, "fp16"),
        weights=HALVES,
        recipe=load(None, WORDS),
        temperature=1.0,
    )
    assert [program.file for program in bundle.programs] == ["program_0.txt"]
    assert bundle.class_ids == ["10", "17", "24"] and sum(bundle.prior) == pytest.approx(1)
    assert read_record(Path("made/bundle.json"), BundleDescription) == bundle
    assert subprocess.run(["sha256sum", "-c", "SHA256"], cwd="made", capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("columns", "change", "fault"),
    [
        ("three", lambda t: t.replace("confidence", "x,y"), "columns"),
        ("three", lambda t: t.replace("000001.jpg", "other.jpg"), "2 rows for 2 photographs"),
        ("three", lambda t: t.replace(",17,", ",18,"), "classes that are not"),
        ("three", lambda t: t.replace("0.5", "0.0"), r"a confidence outside \(0, 1\]"),
        ("binary", lambda t: t.replace("0.1", "1.1"), r"a probability outside \[0, 1\]"),
        (
            "binary",
            lambda t: t.replace("0.1", "0.9"),
            "a probability on the other side of 0.5 than its class",
        ),
        ("binary", lambda t: t.replace("0.500000000", "0.4"), "a probability on the other side of 0.5"),
    ],
)
def test_a_wrong_submission_is_seen(tmp_path, columns, change, fault):
    (tmp_path / "test_dataset").mkdir()
    (tmp_path / runs.SUBMISSION).parent.mkdir(parents=True)
    (tmp_path / runs.SUBMISSION).with_suffix(".json").write_text('{"unreadable": {}}')
    for number in range(2):
        (tmp_path / f"test_dataset/{number:06d}.jpg").write_bytes(b"")
    text = "filename,category_id,confidence\n000000.jpg,10,0.9\n000001.jpg,17,0.5\n"
    if columns == "binary":
        text = "filename,category_id,probability\n000000.jpg,10,0.1\n000001.jpg,17,0.500000000\n"
    description = described(columns=columns)
    (tmp_path / runs.SUBMISSION).write_text(text)
    assert submission_fault(tmp_path, description, 2) is None
    (tmp_path / runs.SUBMISSION).write_text(change(text))
    fault_found = submission_fault(tmp_path, description, 2)
    assert fault_found is not None and re.search(fault, fault_found)
