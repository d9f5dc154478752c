"""The comparison with other tools: its table by hand, what it refuses, and a whole one on drawn photographs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
from safetensors.torch import save_file

from fastflower import convert
from fastflower.bench import accuracy, finetuners, tiny_project
from fastflower.bench.accuracy import Outcome, Task
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.data.folds import read_folds
from fastflower.recipe import load


def task(contender: str, seed: int, fold: int = 0) -> Task:
    return Task(contender, ["r.yaml"], fold=fold, seed=seed, epochs=2, script="train.py", out="", recipe="r")


def test_hits_are_means_over_seeds_and_pairs_of_images() -> None:
    truth = np.arange(10) % 2
    right, wrong = truth[:5].tolist(), (1 - truth[:5]).tolist()
    outcomes = {
        "fastflower": [(task("fastflower", 1), Outcome([0, 1, 2, 3, 4], right, 10.0, "r")),
                       (task("fastflower", 2), Outcome([0, 1, 2, 3, 4], [*right[:4], *wrong[4:]], 12.0, "r"))],
        "plain": [(task("plain", 1), Outcome([0, 1, 2, 3, 4], [*wrong[:3], *right[3:]], 11.0, "r")),
                  (task("plain", 2), Outcome([0, 1, 2, 3, 4], right, 11.0, "r"))],
    }  # fmt: skip
    assert accuracy.mean_hits(outcomes["plain"], truth).tolist() == [0.5, 0.5, 0.5, 1, 1]
    ours, plain = accuracy.table(outcomes, truth)[2:]
    assert "| 2 | 11 | 0.9000 (" in ours and "| 1.000, 0.800 | - | - |" in ours
    assert "| 0.7000 (" in plain and "| 0.400, 1.000 | +20.0 (" in plain and plain.endswith("| 0.62 |")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["keras=3"], "--epochs keras=3: give NAME=N, NAME one of fastflower, plain, channels_last, timm"),
        (["plain=0"], "--epochs plain=0: give NAME=N"),
        (["plain=1", "timm=2"], "--timm-script none.py: no such file"),
    ],
)
def test_other_contenders_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        accuracy.parse_epochs(words, "none.py")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["model.pretrained=true"],
            r"--epochs ultralytics=2: its networks cannot start from the weights of test_resnet",
        ),
        (
            ["model.init=runs/best.pth"],
            r"model.init=runs/best.pth: the other tools start from published weights or",
        ),
    ],
)
def test_all_start_alike(changes: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "find_weights", lambda name: Path(name))
    with pytest.raises(InputError, match=message):
        accuracy.check_start(load(None, ["model.backbone=test_resnet", *changes]), {"ultralytics": 2})
    accuracy.check_start(load(None, ["model.pretrained=false"]), {"ultralytics": 2})


def job_from_scratch() -> finetuners.Job:
    """A task on drawn photographs, without weights."""
    tiny_project.draw(Path())
    words = [tiny_project.RECIPE_FILE, "model.pretrained=false", "data.fold=0"]
    convert.main([*words, "robust.enabled=false"])
    return finetuners.Job(Task("ultralytics", words, 0, seed=7, epochs=3, script="", out="", recipe="r"))


@pytest.mark.slow
def test_from_scratch_no_tool_reads_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a weight file, all start from random weights, and each sees the images of its side alone."""
    for name in ("YOLO_CONFIG_DIR", "YOLO_OFFLINE"):
        monkeypatch.setenv(name, "")  # which the contender changes, so it is restored afterwards
    job = job_from_scratch()
    asked: dict[str, Any] = {}

    class Yolo:
        def __init__(self, source: str | Path) -> None:
            self.source = str(source)

        def train(self, **options: Any) -> None:
            root = Path(options["data"])
            links = {split: list((root / split).glob("*/*")) for split in ("train", "validation")}
            asked.update(
                options, source=self.source, links=links, alive=all(p.is_file() for p in links["train"])
            )

        def predict(self, paths: list[str], **options: Any) -> Iterator[Any]:
            asked.update(scored=paths, last=self.source)
            names = {0: "00001", 1: "00000"}  # the tool's own order
            return (
                SimpleNamespace(names=names, probs=SimpleNamespace(top1=i % 2)) for i in range(len(paths))
            )

    monkeypatch.setitem(sys.modules, "ultralytics", SimpleNamespace(YOLO=Yolo))
    predicted = finetuners.CONTENDERS["ultralytics"](job)
    assert predicted == [1 - i % 2 for i in range(len(job.held_out))]
    assert (
        asked["source"] == "yolo11n-cls.yaml"
        and asked["pretrained"] is False
        and asked["last"].endswith("last.pt")
    )
    assert (asked["epochs"], asked["seed"], asked["imgsz"]) == (3, 7, job.size) and asked["alive"]
    assert asked["scored"] == [str(job.path(row)) for row in job.held_out]
    for split, rows in (("train", job.train), ("validation", job.held_out)):
        assert sorted(int(link.stem) for link in asked["links"][split]) == rows.tolist()
        assert all(
            int(link.parent.name) == job.folds.class_idx[int(link.stem)] for link in asked["links"][split]
        )
    first, second = job.network(), job.network()
    assert any((a != b).any() for a, b in zip(first.parameters(), second.parameters(), strict=True))  # random
    flags = finetuners.timm_flags(job, "work")
    assert not {"--pretrained", "--pretrained-path", "--layer-decay", "None"} & set(flags)


@pytest.mark.slow
def test_a_whole_comparison_continues(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both tools score all images of the fold, and no others; a second call trains nothing."""
    tiny_project.draw(Path())
    weights = Path("results/model/pretrained_model/test_resnet.safetensors")
    weights.parent.mkdir(parents=True)
    save_file(timm.create_model("test_resnet").state_dict(), weights)
    words = [tiny_project.RECIPE_FILE, "model.pretrained=true", "data.fold=0", "opt.lr=0.01"]
    convert.main(words)

    def run_here(task: Task, log: Path) -> int:
        finetuners.main([json.dumps(vars(task))])
        return 0

    monkeypatch.setattr(accuracy, "start", run_here)
    command = [*words, "--epochs", "fastflower=1", "plain=2", "--seeds", "1"]
    assert accuracy.main(command) == 0
    first = capsys.readouterr().out

    def refused(task: Task, log: Path) -> int:
        raise AssertionError(f"{task} is finished")

    monkeypatch.setattr(accuracy, "start", refused)
    assert accuracy.main(command) == 0
    assert capsys.readouterr().out.endswith(first[first.index("| tool") :])
    with pytest.raises(
        InputError, match=r"fastflower_1_0_1.json was trained with another recipe; give another exp.name"
    ):
        accuracy.main([*words, "reg.ls_eps=0.2", *command[len(words) :]])
    table = first[first.index("| tool") :]
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:]] == [
        ["| fastflower", "1"], ["| plain loop: DataLoader, Pillow, torchvision, AdamW", "2"],
    ]  # fmt: skip
    held_out = np.flatnonzero(read_folds(Path("data/folds.csv")).fold == 0).tolist()
    for name in ("fastflower_1", "plain_2"):
        outcome = read_record(Path(f"results/results/tiny/accuracy/{name}_0_1.json"), Outcome)
        assert outcome.rows == held_out and len(outcome.predicted) == len(held_out) and outcome.seconds > 0
