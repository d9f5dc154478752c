"""Auxiliary columns: convert records them, each trains a head of its own, and the main head alone is handed in."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from composer.core import State
from composer.loggers import Logger
from torch.nn import functional as F

from fastflower import convert
from fastflower.algorithms.mixing import MixUpCutMix
from fastflower.algorithms.soft_labels import SoftLabels
from fastflower.callbacks.checkpoints import CheckpointSaver
from fastflower.callbacks.progress import epoch_line, headline
from fastflower.callbacks.recorder import scalars
from fastflower.core import checkpoint, runs
from fastflower.core.errors import CorruptionError, InputError
from fastflower.data import auxiliary
from fastflower.data.auxiliary import AuxColumn, AuxTargets
from fastflower.data.betons import fold_set
from fastflower.data.labels import read_labels
from fastflower.model.losses import auxiliary_loss
from fastflower.model.member import load_member
from fastflower.model.network import build_network
from fastflower.recipe import checks, load
from support import forked, toy_project

AUX = ("data.aux_cols=[genus,shade]", "loss.aux_weight=[0.5,0.2]")
CSV = Path("data/train_labels.csv")
WITHOUT = 7  # every seventh image has no genus


def write_columns(genera: tuple[str, str] = ("Rosa", "Viola")) -> None:
    """Add a genus, which follows from the class, and a shade to the label file."""
    with CSV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row["genus"] = "" if number % WITHOUT == 0 else genera[int(row["category_id"]) > 7]
        row["shade"] = str(number % 3)
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def _project(tmp_path: Path) -> None:
    toy_project.project(tmp_path)
    write_columns()
    convert.main(["tiny.yaml", *AUX])


@pytest.mark.usefixtures("_project")
def test_convert_records_the_columns_and_training_needs_no_label_file(capsys: pytest.CaptureFixture) -> None:
    recipe = load("tiny.yaml", [*AUX])
    fold = fold_set.open_fold(recipe, 0)
    genus, shade = fold.aux
    assert (genus.name, genus.values, shade.values) == ("genus", ("Rosa", "Viola"), ("0", "1", "2"))
    targets = fold.aux_targets
    assert targets is not None and targets.val is not None and fold.val is not None
    with CSV.open(newline="") as file:
        by_name = {row["filename"]: row for row in csv.DictReader(file)}
    for codes, beton in ((targets.train, fold.train), (targets.val, fold.val)):
        for code, row in zip(codes, beton.index, strict=True):
            texts = by_name[fold.folds.filenames[row]]
            assert texts["genus"] == ("" if code[0] < 0 else genus.values[code[0]])
            assert texts["shade"] == shade.values[code[1]]
    CSV.rename("elsewhere.csv")
    assert fold_set.open_fold(recipe, 0).data_identity() == fold.data_identity()
    Path("elsewhere.csv").rename(CSV)
    convert.main(["tiny.yaml", *AUX])
    out = capsys.readouterr().out
    assert "note: auxiliary column genus: 2 values, 9 of 60 images have none" in out and "up to date" in out


@pytest.mark.usefixtures("_project")
def test_a_column_that_changed_is_stale_and_other_recipes_columns_stay(capsys: pytest.CaptureFixture) -> None:
    write_columns(("Rosa", "Tulipa"))
    with pytest.raises(
        InputError, match=r"stale: the label file has other values of genus; run convert again"
    ):
        fold_set.open_fold(load("tiny.yaml", [*AUX]), 0)
    convert.main(["tiny.yaml", "data.aux_cols=[genus]"])
    assert "converted: 60 images" in capsys.readouterr().out
    before = fold_set.open_fold(load("tiny.yaml", ["data.aux_cols=[shade]"]), 0).data_identity()
    fold = fold_set.open_fold(load("tiny.yaml", [*AUX]), 0)
    assert fold.aux[0].values == ("Rosa", "Tulipa") and before != fold.data_identity()
    assert "aux_hash" not in fold_set.open_fold(load("tiny.yaml", []), 0).data_identity()
    with pytest.raises(
        InputError, match=r"aux_labels.json has no column petals of data.aux_cols; run convert"
    ):
        fold_set.check_converted(load("tiny.yaml", ["data.aux_cols=[petals]"]))
    record = Path("data") / auxiliary.FILE
    record.write_text(record.read_text().replace("Tulipa", "Tulips"))
    with pytest.raises(CorruptionError, match="damaged or was edited"):
        fold_set.open_fold(load("tiny.yaml", [*AUX]), 0)
    convert.main(["tiny.yaml", *AUX])
    assert fold_set.open_fold(load("tiny.yaml", [*AUX]), 0).aux == fold.aux


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("data.aux_cols=[petals]", "no column petals; it has filename, category_id, genus, shade"),
        ("data.aux_cols=[one]", r"one has 1 different values, and a head learns two or more; leave it out"),
        ("data.form=folders data.csv=none.csv data.root=folders data.aux_cols=[genus]", r"data.csv = none.csv is no "
         r"label file with further columns; give a table with the columns filename, genus, or leave data.aux_cols"),
        ("data.form=folders data.csv=none.csv data.root=folders data.group_col=film", "no label file with further"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("_project")
def test_columns_that_cannot_be_learned_are_refused_in_one_line(words: str, fault: str) -> None:
    for number in range(2):
        Path(f"folders/{number}").mkdir(parents=True)
        Path(f"folders/{number}/a.jpg").write_bytes(next(Path("data/train").glob("*.jpg")).read_bytes())
    if "one" in words:
        CSV.write_text(
            "\n".join(f"{line},{'one' if not n else 1}" for n, line in enumerate(CSV.read_text().split()))
        )
    with pytest.raises(InputError, match=fault):
        read_labels(load("tiny.yaml", words.split()))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("data.aux_cols=[category_id]", "category_id is the column of the images or labels"),
        ("data.aux_cols=[genus,genus]", "genus is there twice; name further columns, each once"),
        ("data.aux_cols=[genus] loss.aux_weight=[0.1,0.2]", r"or a list of one for each of the 1 columns"),
        ("data.aux_cols=[genus] loss.aux_weight=0", "must be a number above 0"),
        ("data.aux_cols=[genus] loss.aux_weight=high", "must be a number above 0"),
        (
            "data.aux_cols=[genus] model.head=knn model.freeze=backbone model.pretrained=true llrd.enabled=auto",
            "nothing trains",
        ),
    ],
)
def test_recipes_with_contradictory_columns_are_refused(tmp_path: Path, words: str, fault: str) -> None:
    Path("tiny.yaml").write_text(toy_project.RECIPE.replace("drop_path: 0.1", "drop_path: 0"))
    with pytest.raises(InputError, match=fault):
        checks.check(load("tiny.yaml", words.split()))


def test_two_values_for_one_image_are_refused(tmp_path: Path) -> None:
    toy_project.project(tmp_path)
    write_columns()
    rows = CSV.read_text().split()
    CSV.write_text("\n".join([*rows, rows[2].replace("Rosa", "Viola")]))
    with pytest.raises(
        InputError, match=r"line 3 and line 62: .* has two values of genus, 'Rosa' and 'Viola'; leave"
    ):
        read_labels(load("tiny.yaml", [*AUX]))


def test_the_loss_counts_images_with_a_value_and_adds_up_over_microbatches() -> None:
    logits = torch.randn(6, 5, requires_grad=True)
    codes = torch.tensor([[0, 2], [1, -1], [-1, 0], [-1, -1], [1, 1], [0, 0]])
    targets = torch.cat(
        [
            F.one_hot(codes[:, k].clamp_min(0), size) * (codes[:, k] >= 0)[:, None]
            for k, size in ((0, 2), (1, 3))
        ],
        1,
    )
    loss = auxiliary_loss(logits, targets, sizes=(2, 3), weights=(0.5, 0.2))
    wanted = sum(
        weight * F.cross_entropy(own, codes[:, k], ignore_index=-1, reduction="sum") / 6
        for k, (weight, own) in enumerate(zip((0.5, 0.2), logits.split([2, 3], 1), strict=True))
    )
    torch.testing.assert_close(loss, wanted)
    halves = [
        auxiliary_loss(logits[part], targets[part], sizes=(2, 3), weights=(0.5, 0.2))
        for part in (slice(0, 3), slice(3, 6))
    ]
    torch.testing.assert_close((halves[0] + halves[1]) / 2, loss)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[3].any() and not gradient[1, 2:].any() and not gradient[2, :2].any()


def test_mixing_mixes_the_auxiliary_targets_as_the_labels() -> None:
    recipe = load(None, ["reg.mix_prob=1", "reg.cutmix=0", "reg.mixup=1"])
    aux = AuxTargets(("genus",), (3,), train=np.array([[1], [-1], [2], [0]]), val=None)
    rows = torch.tensor([3, 0, 2, 1])
    batch = {
        "image": torch.rand(4, 3, 4, 4),
        "label": torch.tensor([0, 1, 0, 1]),
        "row": rows,
        "key": torch.arange(4),
    }
    time = type(
        "T", (), {"epoch": type("E", (), {"value": 0}), "batch_in_epoch": type("E", (), {"value": 0})}
    )
    state = type("S", (), {"batch": batch, "timestamp": time})()
    MixUpCutMix(recipe, 2, aux=aux).apply(None, state, None)
    own = state.batch["target"][[0, 1, 2, 3], [0, 1, 0, 1]]
    assert state.batch["target"].shape == (4, 2) and "key" not in state.batch
    plain = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])  # of rows 3, 0, 2, 1
    partner = plain[[2, 3, 0, 1]]
    mixed = state.batch["aux"]
    weight = mixed[0, 0]
    assert 0 < weight < 1 and own[0] == 1
    torch.testing.assert_close(mixed[0], weight * plain[0] + (1 - weight) * partner[0])
    torch.testing.assert_close(mixed[1].sum(), mixed[1, 1])  # its partner has no value


def test_unlabelled_images_with_soft_labels_have_the_logits_of_the_main_head() -> None:
    soft = SoftLabels(load(None, []), [1, 1], fill=(0.0, 0.0, 0.0), targets=torch.eye(2))
    state = SimpleNamespace(batch={"label": torch.zeros(2)}, outputs=torch.rand(4, 5))
    logits = state.outputs
    soft._split_logits(state)  # type: ignore[arg-type]
    assert torch.equal(soft._learned_logits, logits[2:, :2]) and torch.equal(state.outputs, logits[:2])


def test_events_console_and_trackers_show_each_column() -> None:
    row = {
        "epoch": 1, "size": [32, 32], "lr_max": 1e-3, "train_loss": 1.0, "train_acc": 0.5, "val_loss": 1.0,
        "clean_raw": 0.5, "score": 0.5, "best": {"epoch": 1, "score": 0.5}, "patience_left": 3, "images_per_s": 10.0,
        "chosen": "ema", "aux": {"genus, wide": {"raw": 0.25, "ema": 0.75}}, "per_kind": {}, "lr_groups": {},
    }  # fmt: skip
    head, line = (
        headline("combo", ["genus, wide", "shade"]),
        epoch_line(row, 3, 0.0, aux=["genus, wide", "shade"]),
    )
    assert head.endswith("  genus, wide   shade") and line.endswith("     0.7500       -")
    assert scalars(row)["aux_ema/genus_ wide"] == 0.75


def test_a_column_of_numbers_is_doubted() -> None:
    column = AuxColumn("weight", tuple("abcd"), (0, 1, 2, 3, -1))
    assert "weight has 4 values for 4 images; its head learns them as classes" in column.describe()[1]


def tensors(exp: str, kind: str) -> dict[str, torch.Tensor]:
    return load_member(toy_project.run_of(exp).checkpoints(kind)[-1]).tensors


_batch_end = CheckpointSaver.batch_end


def _stop_at_step_5(saver: CheckpointSaver, state: State, logger: Logger) -> None:
    if state.timestamp.batch.value == 5:
        os.kill(os.getpid(), signal.SIGTERM)
    _batch_end(saver, state, logger)


@pytest.mark.slow
@pytest.mark.usefixtures("_project")
def test_training_scores_each_head_hands_in_the_main_one_and_resumes_exactly(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*AUX, "swa.enabled=true", "swa.start=0.5"]
    assert toy_project.fit(*words) == 0
    out = capsys.readouterr().out
    assert (
        "auxiliary heads, which are not handed in: genus (2 values, weight 0.5), shade (3 values, weight 0.2)"
        in out
    )
    rows = toy_project.epochs()
    assert set(rows[0]["aux"]) == {"genus", "shade"} and set(rows[-1]["aux"]["genus"]) == {
        "raw",
        "ema",
        "swa",
    }
    assert toy_project.fit("exp.name=plain", "swa.enabled=true", "swa.start=0.5") == 0
    for kind in ("best_combo", "ema_best", "swa", "last"):
        member = load_member(toy_project.run_of().checkpoints(kind)[-1])
        plain = load_member(toy_project.run_of("plain").checkpoints(kind)[-1])
        assert {n: t.shape for n, t in member.tensors.items()} == {
            n: t.shape for n, t in plain.tensors.items()
        }
        build_network(member.meta).load_state_dict(member.tensors)
        names = [
            set(checkpoint.load(toy_project.run_of(e).checkpoints(kind)[-1]).meta) for e in ("tiny", "plain")
        ]
        assert names[0] == names[1]
    assert "aux_heads.1.weight" in toy_project.last().tensors
    fold = fold_set.open_fold(load("tiny.yaml", words), 0)
    assert fold.aux_targets is not None and fold.aux_targets.val is not None
    known = fold.aux_targets.val[:, 0] >= 0
    assert (rows[-1]["aux"]["genus"]["raw"] * known.sum()) % 1 == pytest.approx(0)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(CheckpointSaver, "batch_end", _stop_at_step_5)
        toy_project.fit(*words, "exp.name=stopped")
    assert toy_project.fit(*words, "exp.name=stopped") == 0
    assert not toy_project.different(toy_project.last("stopped").tensors, toy_project.last().tensors)
    first, second = (toy_project.last(e).training_state["parts"]["ema"] for e in ("tiny", "stopped"))
    assert not toy_project.different(first, second)
    assert [row["aux"] for row in toy_project.epochs("stopped")] == [row["aux"] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("semi", ["fixmatch semi.teacher=ema", "fixmatch", "pseudo"])
@pytest.mark.usefixtures("_project")
def test_unlabelled_images_are_learned_beside_auxiliary_columns(semi: str) -> None:
    words = f"semi.enabled=true semi.method={semi} semi.mu=1 semi.threshold=0 data.labels_per_class=4".split()
    assert toy_project.fit(*AUX, *words, *toy_project.ONE, "train.batch_per_gpu=4") == 0
    (row,) = toy_project.epochs()
    assert row["mask_rate"] == 1 and set(row["aux"]) == {"genus", "shade"}
    assert len(row["pseudo_counts"]) == 4  # the classes of the main head alone


@pytest.mark.slow
@pytest.mark.usefixtures("_project")
def test_heads_of_frozen_features_are_scored() -> None:
    runs.PRETRAINED.mkdir(parents=True)
    torch.save(timm.create_model("test_resnet").state_dict(), runs.PRETRAINED / "test_resnet.pth")
    frozen = "model.backbone=test_resnet model.pretrained=true model.freeze=backbone llrd.enabled=auto"
    assert (
        toy_project.fit(*AUX, *frozen.split(), "model.drop_path=0", *toy_project.ONE, "swa.enabled=true") == 0
    )
    (row,) = toy_project.epochs()
    assert set(row["aux"]["shade"]) == {"raw", "ema", "swa"}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.usefixtures("_project")
def test_two_ranks_learn_the_columns_as_one_does() -> None:
    words = [*AUX, *toy_project.ONE, "model.drop_rate=0", "model.drop_path=0", "reg.mix_prob=1"]
    two = forked.training(*words, "exp.name=two", "train.batch_per_gpu=4", "train.world_size=2")
    assert two.wait() == [0, 0], two.text()
    assert toy_project.fit(*words, "exp.name=one", "train.batch_per_gpu=8") == 0
    assert toy_project.epochs("two")[0]["aux"] == toy_project.epochs("one")[0]["aux"]
    one = toy_project.last("one").tensors
    for name, tensor in toy_project.last("two").tensors.items():
        torch.testing.assert_close(tensor, one[name], rtol=0, atol=2e-5, msg=name)
