"""Food photographs: few labelled and many unlabelled images, a network from scratch, views that vote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from systems.conftest import HandIn, epochs

from fastflower import convert, evaluate, train
from fastflower.campaign import launch, plan
from fastflower.core import runs
from fastflower.core.runs import Run
from fastflower.recipe import checks, parse_command
from fastflower.report.data_section import bundle_facts
from fastflower.report.experiment import read_experiment
from fastflower.report.scores_section import view_names
from support import toy_project

SMALL = [
    *(
        "data.img_size=32",
        "tta.scales=[32]",
        "data.workers=1",
        "model.backbone=resnet10t",
        "train.world_size=1",
    ),
    *(
        "train.batch_per_gpu=5",
        "semi.mu=2",
        "semi.threshold=0.3",
        "sched.cosine_epochs=1",
        "sched.warmup_epochs=0",
    ),
]
SUBSETS = ("training/labeled", "training/unlabeled", "training/unlabeled", "validation")


def write_folders() -> None:
    """The toy project's photographs in the folders of the contest; one photograph is in two of them."""
    toy_project.project(Path.cwd())
    for number, path in enumerate(sorted(Path("data/train").glob("*.jpg"))):
        subset = SUBSETS[number % len(SUBSETS)]
        folder = Path("data/food", subset, "" if "unlabeled" in subset else path.name.split("_")[0])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    held_out = next(Path("data/food/validation").rglob("*.jpg"))
    shutil.copy(held_out, "data/food/training/unlabeled/copy.jpg")


@pytest.mark.slow
def test_unlabelled_photographs_train_and_views_vote(
    repo: Path, hand_in: HandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folders()
    Path("food.yaml").write_text(f"base: {repo}/recipes/food_fixmatch.yaml\n")
    words = ["food.yaml", *SMALL]
    convert.main(words)
    assert train.main(words) == 0
    output = capsys.readouterr().out
    assert "30 images, 2 beside each labelled one, fixmatch from 0.3" in output
    assert "1 images of data.unlabelled validate this fold and are left out" in output
    (epoch,) = epochs("food")
    assert epoch["mask_rate"] > 0 and epoch["pseudo_accuracy"] is None and 0 <= epoch["train_acc"] <= 1
    run = Run(exp="food", backbone="resnet10t", fold=0, seed=42)
    assert list((run.results_dir / "tensorboard").rglob("events.out.tfevents*"))
    with Image.open(run.results_dir / f"samples_{run.stem}.png") as picture:
        assert picture.height > 5 * 32  # two further rows: the views
    voting = [*words, "tta.reduce=vote"]
    assert evaluate.main(voting) == 0
    (task,) = plan.tasks(["food.yaml"], plan.parse_overrides(words[1:]))
    assert launch.Finished(1)(task), "a campaign keeps it"
    table = hand_in(voting, "data/food/validation")
    assert len(table) == 15 and list(table[0]) == ["filename", "category_id", "confidence"]
    bundle = json.loads((runs.BUNDLE / "bundle.json").read_text(encoding="utf-8"))
    assert bundle["reduce"] == "vote" and len(bundle["members"][0]["views"]) == 3  # plain and two turned
    experiment = read_experiment("food", with_images=False)
    six = "plain and mirrored; 6 views with those that are turned, shifted or cut"
    assert view_names(experiment.scores.members[0].views) == f"32 pixels, {six}"
    assert dict(bundle_facts(experiment))["views"] == f"32 × 32, {six}"


def test_the_baseline_that_the_header_names_can_be_trained(repo: Path) -> None:
    path = repo / "recipes/food_fixmatch.yaml"
    header = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    words = header.partition("A plain baseline: ")[2].partition(". ")[0].split()
    baseline = parse_command([str(path), *words])
    checks.check(baseline)
    assert (baseline.exp.name, baseline.opt.name, baseline.data.img_size) == ("food_baseline", "adam", 128)
    assert not baseline.semi.enabled and baseline.aug.rrc_scale == [1, 1] and baseline.aug.randaugment_n == 0
