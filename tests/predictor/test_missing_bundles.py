"""Bundles that are missing, damaged, or of another format: one line, and the best table that is still possible."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from fastflower.bundle import writer
from fastflower.bundle.description import BundleDescription
from fastflower.recipe import load
from support.predictor_runs import jpeg, read_rows, run_without_bundle, save_random_member, write_photographs


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


def test_without_a_bundle_every_row_is_the_training_datas_commonest_class(run_without_networks):
    write_photographs(2)
    run_without_networks("out.csv")
    assert [row[1:] for row in read_rows(Path("out.csv"))[1:]] == [["007", "0.600000"]] * 2


def test_before_any_training_no_table_is_called_a_submission(run_without_networks, code):
    write_photographs(2)
    with pytest.raises(
        code.bundles.Problem, match=r"every row of \S*out_priors.csv holds the most frequent class"
    ):
        code.predict.main(["test_dataset", "out.csv"])
    assert len(read_rows(Path("out_priors.csv"))) == 3 and not Path("out.csv").exists()
    Path("results/model/bundle").mkdir(
        parents=True
    )  # a hand-in that lost a file gets its table where it was asked for
    with pytest.raises(code.bundles.Problem, match=r"every row of \S*/out.csv holds the most frequent class"):
        code.predict.main(["test_dataset", "out.csv"])


def test_the_first_estimate_of_time_is_not_that_of_warming_up(code, monkeypatch):
    clock = iter((0.0, 40.0, 41.0, 43.0, 44.0))  # loaded, the first row, and three more
    monkeypatch.setattr(code.rows.time, "monotonic", lambda: next(clock))
    speed = code.rows.Speed(0.0, 0)
    assert [speed.update(done) for done in (1, 2, 4, 5)] == [
        (True, False), (False, False), (False, True), (False, False)
    ]  # fmt: skip
    assert speed.seconds_per_row == 1.0 and speed.summary()["first_row_s"] == 40.0


def test_without_any_classes_every_row_is_the_samples_commonest(run_without_networks):
    write_photographs(2)
    shutil.rmtree("data")
    Path("ref").mkdir()
    Path("ref/predictions_sample.csv").write_text("filename,category_id\nx.jpg,7\ny.jpg,007\nz.jpg,007\n")
    run_without_networks("out.csv")
    rows = read_rows(Path("out.csv"))
    assert [row[:2] for row in rows] == [["filename", "category_id"], ["000.jpg", "007"], ["001.jpg", "007"]]


@pytest.mark.slow
def test_without_a_bundle_the_members_are_run_as_evaluate_left_them(run, code, evaluated, capsys):
    exit_code, table, about = run_without_bundle(code)
    assert exit_code == 0 and about["members"] == [path.stem for path in evaluated]
    assert "no exported bundle; using the members above" in capsys.readouterr().out
    folder = Path("folder")
    folder.mkdir()
    changes = ["exp.name=exp", "tta.scales=[32,64]", "bundle.dtype=fp32"]
    members = writer.load_members(evaluated, "fp32")
    writer.write_bundle(
        folder, members, weights=np.array([0.25, 0.75]), recipe=load(None, changes), temperature=1.5
    )
    assert run("--bundle", "folder")[0] == 0
    assert Path("out/submission.csv").read_bytes() == table
    size = sum(path.stat().st_size for path in Path("results/model/exp/programs").glob("*.safetensors"))
    assert size < 0.1 * sum(path.stat().st_size for path in evaluated)


def test_a_bundle_goes_before_members(run, code, evaluated, exported):
    shutil.copytree(exported.folder, "results/model/bundle")
    assert run_without_bundle(code)[2]["members"] == [member.path.stem for member in exported.members]


def test_a_member_that_is_not_the_evaluated_one_is_left_out(run, code, evaluated, capsys):
    save_random_member(evaluated[0].parent, seed=7, name=evaluated[0].name)
    number, _, about = run_without_bundle(code)
    assert number == 0 and about["members"] == [evaluated[1].stem]
    assert f"{evaluated[0].name} is damaged or was replaced" in capsys.readouterr().err
    evaluated[1].unlink()
    assert run_without_bundle(code)[0] == 3


@pytest.mark.parametrize("name", ["bundle.json", "SHA256"])
def test_a_damaged_description_is_refused(code, exported, name):
    shutil.copytree(exported.folder, "copy")
    path = Path("copy", name)
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(jpeg(1))
    with pytest.raises(
        code.bundles.Problem, match=r"damaged .* every row of .* holds the most frequent class"
    ) as problem:
        code.predict.main(["photos", "b.csv", "--bundle", "copy"])
    assert problem.value.code == 3
    assert read_rows(Path("b.csv"))[1] == ["a.jpg", "012", f"{9 / 16:.6f}"]


@pytest.mark.parametrize(
    ("name", "text", "exit_code"),
    [
        ("bundle.json", None, 4),
        ("SHA256", None, 3),
        ("SHA256", "caf\u00e9", 3),
        ("bundle.json", "{", 3),
        ("bundle.json", "[]", 3),
        ("bundle.json", "{}", 2),
    ],
)
def test_a_description_that_is_missing_or_none_is_one_line_and_a_table(code, exported, name, text, exit_code):
    """Also when its hash was changed with it."""
    shutil.copytree(exported.folder, "copy")
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(jpeg(1))
    path, sums = Path("copy", name), Path("copy/SHA256")
    if text is None:
        path.unlink()
    else:
        path.write_text(text, encoding="utf-8")
    if text and path != sums:
        sums.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  bundle.json\n")
    with pytest.raises(
        code.bundles.Problem, match=r"^\S.*every row of .* holds the most frequent class$"
    ) as problem:
        code.predict.main(["photos", "b.csv", "--bundle", "copy"])
    assert problem.value.code == exit_code
    assert read_rows(Path("b.csv"))[1] == ["a.jpg", "012", f"{9 / 16:.6f}"]


# fields of bundle.json that only export's gates and people read
UNREAD = {"fastflower", "class_hash", "tolerance", "pixel_tolerance"}


def change_bundle(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the fields of bundle.json, and its hash with them."""
    path, hashes = folder / "bundle.json", folder / "SHA256"
    bundle = json.loads(path.read_text())
    change(bundle)
    path.write_text(json.dumps(bundle))
    lines = [line for line in hashes.read_text().splitlines() if not line.endswith(" bundle.json")]
    lines.append(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  bundle.json")
    hashes.write_text("\n".join(lines) + "\n")


FIELD_FAULTS = {
    "members is missing": lambda bundle: bundle.pop("members"),
    "members[1].weight is missing": lambda bundle: bundle["members"][1].pop("weight"),
    "temperature is null, must be a number": lambda bundle: bundle.update(temperature=None),
    "hflip is 1, must be true or false": lambda bundle: bundle.update(hflip=1),
    'half is "some", must be all or gpu or none': lambda bundle: bundle.update(half="some"),
    "crops[0].width is 32.5, must be a whole number": lambda bundle: bundle["crops"][0].update(width=32.5),
    "programs is {}, must be a list": lambda bundle: bundle.update(programs={}),
    "pairs.arrays is missing": lambda bundle: bundle.update(pairs={}),
    "pairs is [], must be null or a map": lambda bundle: bundle.update(pairs=[]),
    "programs[0].half_keeps[0] is 1, must be text": lambda bundle: bundle["programs"][0].update(
        half_keeps=[1]
    ),
    "prior has 2 values for 3 class_ids": lambda bundle: bundle["prior"].pop(),
    "columns is binary for 3 class_ids, must be for 2": lambda bundle: bundle.update(columns="binary"),
    "members[0] uses crop 9 of 2": lambda bundle: bundle["members"][0]["views"][0].update(crop=9),
    "members[0] has 1 expected for 2 views": lambda bundle: bundle["members"][0]["expected"].pop(),
    "members[0].expected must have 3 logits for each view": lambda bundle: bundle["members"][0]["expected"][
        0
    ].pop(),
}


@pytest.mark.parametrize("fault", FIELD_FAULTS)
def test_each_field_of_a_description_is_checked(code, exported, fault):
    shutil.copytree(exported.folder, "copy")
    change_bundle(Path("copy"), FIELD_FAULTS[fault])
    with pytest.raises(code.bundles.Problem) as problem:
        code.bundles.read("copy")
    assert str(problem.value) == f"copy is damaged (bundle.json: {fault}); copy it again"
    assert problem.value.code == 3


def test_the_predictor_checks_the_fields_that_export_writes(code):
    """Names of the fields in code/ and in the record, which share no code."""

    def compare(kinds: dict[str, Any], record: type) -> None:
        hints = get_type_hints(record)
        assert set(kinds) == {field.name for field in dataclasses.fields(record)} - UNREAD
        for name, kind in kinds.items():
            nested = [item for item in walk(kind) if isinstance(item, dict)]
            records = [item for item in walk_types(hints[name]) if dataclasses.is_dataclass(item)]
            assert len(nested) == len(records)
            for inner, inner_record in zip(nested, records, strict=True):
                compare(inner, inner_record)

    def walk(kind: Any) -> list[Any]:
        items = list(kind) if isinstance(kind, (list, tuple)) else []
        return [*items, *(inner for item in items for inner in walk(item))]

    def walk_types(hint: Any) -> list[Any]:
        return [inner for item in get_args(hint) for inner in (item, *walk_types(item))]

    compare(code.bundles.FIELDS, BundleDescription)


def header(**changes: object) -> bytes:
    """A safetensors file of one tensor with a wrong header."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


def tensors_at(*offsets: list[int]) -> bytes:
    """A safetensors file of tensors a, b, ... of one number each at these bytes."""
    fields = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": span}
        for name, span in zip("ab", offsets, strict=True)
    }
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + bytes(offsets[-1][1])


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
    "odd bytes": header(data_offsets=[0, 3]),
    "too long": header(data_offsets=[0, 4]) + bytes(4),
    "hole": header(data_offsets=[1, 4], dtype="I8", shape=[3]),
    "endless": header(shape=[1 << 62, 4]),
    "negative": header(shape=[-1]),
    "overlap": tensors_at([0, 4], [0, 4]),
    "half overlap": tensors_at([0, 4], [2, 6]),
    "gap": tensors_at([0, 4], [6, 10]),
    "twice": tensors_at([0, 4], [4, 8]).replace(b'"b"', b'"a"'),
}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", ["absent", "cut", "flipped", *WEIGHTS])
def test_weights_that_are_none_leave_their_member_out(code, exported, monkeypatch, name, known):
    """Also when their hash was changed with them."""
    shutil.copytree(exported.folder, "copy")
    path = Path("copy/weights_0.safetensors")
    path.write_bytes(WEIGHTS.get(name, path.read_bytes()[:-1]))
    if name == "flipped":
        shutil.copy(exported.folder / path.name, path)
        flip(path)
    description, hashes = code.bundles.read("copy")
    if known and name in WEIGHTS:
        hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    if name == "absent":
        path.unlink()
    monkeypatch.setattr(code.networks.Networks, "_move_to", lambda *_, **__: None)
    networks = code.networks.Networks("copy", description, hashes=hashes, device="cpu")
    assert [member["name"] for member in networks.members] == [exported.members[1].path.stem]
    (note,) = networks.notes
    start = f"member {exported.members[0].path.stem} left out: "
    assert note.startswith(start) and len(note) > len(start) and "\n" not in note


def test_weights_that_fill_their_memory_are_read(code):
    tensors = code.networks.read_tensors(bytearray(tensors_at([0, 4], [4, 8])))
    assert sorted(tensors) == ["a", "b"] and all(tensor.shape == (1,) for tensor in tensors.values())
    for name, fault in (
        ("overlap", "b begins at byte 0 of its weights, not at 4"),
        ("odd bytes", r"a has 3 bytes for the shape \[1\]"),
        ("too long", "have 8 bytes, their header describes 4"),
        ("twice", "has a twice"),
    ):
        with pytest.raises(ValueError, match=fault):
            code.networks.read_tensors(bytearray(WEIGHTS[name]))


def test_a_bundle_older_than_the_evaluated_members_is_told(run, code, evaluated, exported, capsys):
    shutil.copytree(exported.folder, "results/model/bundle")
    bundle, programs = (Path("results/model", name, "bundle.json") for name in ("bundle", "exp/programs"))
    os.utime(bundle, (1000, 1000))
    for time, told in ((2000, True), (500, False)):
        os.utime(programs, (time, time))
        assert run_without_bundle(code)[0] == 0
        err = capsys.readouterr().err
        assert ("is older than the members that evaluate wrote to" in err) == told
        assert err.count("\n") == told


def test_a_bundle_of_another_format_is_refused(code, exported, monkeypatch):
    written = code.bundles.FORMAT
    monkeypatch.setattr(code.bundles, "FORMAT", 99)
    with pytest.raises(code.bundles.Problem, match=f"has format {written}, this predictor reads 99"):
        code.predict.main(["a", "b.csv", "--bundle", str(exported.folder)])


def test_damaged_members_are_left_out(run, code, exported, capsys):
    write_photographs(2)
    shutil.copytree(exported.folder, "copy")
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


def test_an_export_while_the_predictor_loads_makes_it_start_again_with_the_new_bundle(
    code, exported, monkeypatch, capsys
):
    Path("test_dataset").mkdir()
    write_photographs(2)
    shutil.copytree(exported.folder, "bundle")
    load, loaded = code.networks.Networks, []

    def replaced_meanwhile(folder: str, bundle: dict, **options):
        loaded.append(bundle["temperature"])
        if len(loaded) > 1:
            return load(folder, bundle, **options)
        text = Path("bundle/bundle.json").read_text()
        Path("bundle/bundle.json").write_text(json.dumps({**json.loads(text), "temperature": 2.5}))
        lines = [line.split() for line in Path("bundle/SHA256").read_text().splitlines()]
        new = hashlib.sha256(Path("bundle/bundle.json").read_bytes()).hexdigest()
        Path("bundle/SHA256").write_text(
            "".join(f"{new if name == 'bundle.json' else old}  {name}\n" for old, name in lines)
        )
        raise code.bundles.Unusable("no member of the bundle can be run")

    monkeypatch.setattr(code.networks, "Networks", replaced_meanwhile)
    arguments = ["test_dataset", "out.csv", "--bundle", "bundle", "--threads", "1"]
    assert code.predict.main(arguments) == 0
    said = capsys.readouterr()
    assert "bundle was replaced while it was loaded" in said.err and "T = 2.500" in said.out
    assert json.loads(Path("out.json").read_text())["predicted"] == 2
    assert len(loaded) == 2 and loaded[1] == 2.5


def test_a_damaged_bundle_is_no_replaced_one(code, exported):
    assert (
        code.bundles.is_replaced(str(exported.folder), code.bundles.read_hashes(str(exported.folder)))
        is False
    )
    assert code.bundles.is_replaced("gone", {}) is True
