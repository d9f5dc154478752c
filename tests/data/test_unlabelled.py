"""Learning from unlabelled images: the loss as written out, batches as pure functions, one forward pass, whole runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import Event, Precision, Timestamp
from PIL import Image
from torch import nn

from fastflower import evaluate
from fastflower.algorithms.fixmatch import FixMatch, weight
from fastflower.callbacks.checkpoints import Saving
from fastflower.campaign import launch, plan
from fastflower.core import errors, runs, seeding
from fastflower.core.runs import Run
from fastflower.data import unlabelled
from fastflower.data.betons.fold_set import open_fold
from fastflower.data.decode.kernel import Crop, decode_train
from fastflower.data.loaders import TrainLoader
from fastflower.data.transforms.augment import augment
from fastflower.model.losses import consistency
from fastflower.recipe import checks, load, schema
from support import toy_project

SEMI = (
    "semi.enabled=true",
    "semi.mu=2",
    "semi.threshold=0.3",
    "data.labels_per_class=4",
    "sampler.passes=2",
    "train.batch_per_gpu=4",
    "model.drop_rate=0",
    "model.drop_path=0",
    "ema.decay=0.9",
)
ALIGNED = ("semi.teacher=ema", "semi.align=true")


# --- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_papers_written_out():
    weak, strong = 3 * torch.randn(40, 5), torch.randn(40, 5)
    loss, labels, mask = consistency(weak, strong, 0.8)
    total = 0.0
    for row in range(40):
        q = np.exp(weak[row].double().numpy()) / np.exp(weak[row].double().numpy()).sum()
        p = np.exp(strong[row].double().numpy()) / np.exp(strong[row].double().numpy()).sum()
        assert labels[row] == q.argmax() and bool(mask[row]) == (q.max() >= 0.8)
        total += (q.max() >= 0.8) * -np.log(p[q.argmax()])
    assert 5 < mask.sum() < 35
    assert float(loss) == pytest.approx(total / 40, rel=1e-6)


def test_labels_are_made_without_a_gradient_and_unsure_rows_teach_nothing():
    weak = torch.tensor([[9.0, 0.0], [0.1, 0.0]], requires_grad=True)
    strong = torch.zeros(2, 2, requires_grad=True)
    consistency(weak, strong, 0.95)[0].backward()
    assert weak.grad is None
    # d/dz of the mean over both rows: (softmax - one-hot) / 2 for the sure row
    torch.testing.assert_close(strong.grad, torch.tensor([[-0.25, 0.25], [0.0, 0.0]]))


def test_one_bad_row_below_the_threshold_does_not_spoil_the_mean():
    loss, _, mask = consistency(torch.zeros(1, 3), torch.tensor([[-torch.inf, 0.0, 0.0]]), 0.9)
    assert not mask.any() and float(loss) == 0.0


def test_the_weight_rises_linearly():
    assert [
        weight(0, 0, steps=4, lambda_u=2.0, ramp_epochs=0),
        weight(0, 0, steps=4, lambda_u=2.0, ramp_epochs=5),
    ] == [2.0, 0.0]
    assert weight(2, 2, steps=4, lambda_u=2.0, ramp_epochs=5) == pytest.approx(1.0)
    assert (
        weight(5, 0, steps=4, lambda_u=2.0, ramp_epochs=5)
        == weight(9, 3, steps=4, lambda_u=2.0, ramp_epochs=5)
        == 2.0
    )


# --- the data -------------------------------------------------------------------------------------------------------


def test_the_labels_that_count_are_drawn_by_class_seed_and_fold():
    labels = np.repeat([0, 1, 3], [20, 3, 10])
    rows = unlabelled.labelled_rows(labels, 5, seed=1, fold=0)
    assert np.bincount(labels[rows]).tolist() == [5, 3, 0, 5] and (np.diff(rows) > 0).all()
    assert rows.tolist() == unlabelled.labelled_rows(labels, 5, seed=1, fold=0).tolist()
    assert rows.tolist() != unlabelled.labelled_rows(labels, 5, seed=2, fold=0).tolist()
    assert unlabelled.labelled_rows(labels, None, seed=1, fold=0).tolist() == list(range(33))


def test_the_stream_goes_through_all_rows_again_and_again():
    rows = np.arange(100, 107)
    whole = unlabelled.stream(rows, 0, count=30, seed=5, fold=0)
    for start in range(0, 28, 7):
        assert sorted(whole[start : start + 7]) == rows.tolist()
    assert whole[:7].tolist() != whole[7:14].tolist()
    for start, count in ((0, 0), (3, 5), (6, 1), (7, 7), (5, 25)):
        assert (
            unlabelled.stream(rows, start, count=count, seed=5, fold=0).tolist()
            == whole[start : start + count].tolist()
        )


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[schema.Recipe, unlabelled.FoldSet]:
    home = toy_project.project(tmp_path_factory.mktemp("opened"))
    recipe = load(home / "tiny.yaml", [*SEMI, f"data.home={home}/data"])
    return recipe, open_fold(recipe, 0)


def views(opened, rank: int = 0, world: int = 1, **more) -> unlabelled.Unlabelled:
    recipe, fold = opened
    beton, rows = unlabelled.unlabelled_rows(recipe, fold)
    sizes = [3, 4]  # the second epoch's batch is another
    given = {"strong": Crop((0.3, 0.5)), **more}
    return unlabelled.Unlabelled(
        beton, rows, 7, 0, 3, lambda e: sizes[min(e, 1)] * 2 // world, lambda e: 5, lambda e: (16, 24), Crop(),
        rank=rank, world=world, threads=1, **given,
    )  # fmt: skip


def test_views_are_two_crops_of_the_same_images_and_none_is_labelled(opened):
    recipe, fold = opened
    source = views(opened)
    used = unlabelled.used_rows(recipe, fold)
    order = source.order(1)
    assert len(order) == 5 * 8 * 3 and not set(order) & set(used)
    assert sorted({*order, *used}) == list(range(fold.train.rows))
    step = list(source(1, 0))[2]
    rows = order[2 * 24 : 3 * 24]
    assert step["weak"].shape == step["strong"].shape == (8, 3, 16, 24, 3)
    assert step["truth"].flatten().tolist() == fold.train.labels[rows].tolist()
    for name, tag, crop in (
        ("weak", unlabelled.WEAK, source.weak),
        ("strong", unlabelled.STRONG, source.strong),
    ):
        keys = seeding.row_keys(7 + tag, 1, positions=np.arange(48, 72), rows=rows)
        out = np.empty((24, 16, 24, 3), np.uint8)
        decode_train(fold.train, rows, keys=keys, out=out, crop=crop, threads=1)
        assert np.array_equal(step[name].flatten(0, 1).numpy(), out)
    assert (step["strong_key"].flatten().numpy().view(np.uint64) == keys).all()


def test_epochs_follow_one_another_in_the_stream_whatever_their_batch(opened):
    source = views(opened)
    drawn = np.concatenate([source.order(0), source.order(1), source.order(2)])
    assert drawn.tolist() == unlabelled.stream(source.rows, 0, count=len(drawn), seed=7, fold=0).tolist()


def test_batches_are_the_same_after_a_resume_and_ranks_interleave(opened):
    whole = list(views(opened)(1, 0))
    for name, tensor in next(views(opened)(1, 3)).items():
        assert torch.equal(tensor, whole[3][name])
    ranks = [list(views(opened, rank, 2)(1, 0)) for rank in range(2)]
    for step, batch in enumerate(whole):
        for name, tensor in batch.items():
            both = torch.stack([ranks[rank][step][name].flatten(0, 1) for rank in range(2)], 1)
            assert torch.equal(both.flatten(0, 1), tensor.flatten(0, 1)), name


def test_a_loader_carries_them_beside_its_own_and_starts_where_it_is_told(opened):
    _, fold = opened
    loader = TrainLoader(
        fold.train,
        lambda e: np.arange(40),
        seed=7,
        batch=lambda e: 8,
        size=lambda e: (16, 24),
        crop=Crop(),
        beside=views(opened),
    )
    loader.cursor = lambda: (1, 3)
    got = list(loader)
    assert len(got) == 2 and torch.equal(got[0]["weak"], next(views(opened)(1, 3))["weak"])
    assert {len(tensor) for tensor in got[0].values()} == {8}


# --- the algorithm --------------------------------------------------------------------------------------------------


SHARES = [1, 2, 3, 4]  # labelled images of each class


class Small(nn.Module):
    """A network with BatchNorm that remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return self.head(self.norm(images).square().mean((2, 3)))


def one_step(words: list[str], teacher: nn.Module | None = None):
    """The algorithm on one microbatch: itself, the network, the state, and the batch before."""
    recipe = load(None, ["semi.enabled=true", "data.labels_per_class=1", "semi.mu=2", *words])
    uint8 = lambda *shape: torch.randint(0, 256, (*shape, 8, 8, 3), dtype=torch.uint8)  # noqa: E731
    batch = {
        "image": 255 * torch.rand(3, 3, 8, 8),
        "label": torch.tensor([0, 1, 2]),
        "weak": uint8(3, 2),
        "truth": torch.tensor([[0, 1], [2, -1], [3, 0]]),
        "strong": uint8(3, 2),
        "strong_key": torch.arange(6).view(3, 2),
    }
    network = Small().train()
    algorithm = FixMatch(recipe, SHARES, fill=(1.0, 2.0, 3.0), teacher=teacher)
    state = types.SimpleNamespace(
        batch=batch, timestamp=Timestamp(epoch=1, batch_in_epoch=2), dataloader_len=4,
        precision=Precision.FP32, precision_config=None, outputs=None, loss=None,
    )  # fmt: skip

    def event(name: Event) -> None:
        if algorithm.match(name, state):
            algorithm.apply(name, state, None)

    event(Event.EPOCH_START)
    event(Event.BEFORE_FORWARD)
    state.outputs = network(state.batch["image"])
    event(Event.AFTER_FORWARD)
    state.loss = torch.nn.functional.cross_entropy(state.outputs, batch["label"])
    before = state.loss
    for name in (Event.AFTER_LOSS, Event.BATCH_END):
        event(name)
    return algorithm, network, state, batch, before


def test_all_images_pass_the_network_together_and_no_view_is_mixed():
    algorithm, network, state, batch, supervised = one_step(["semi.threshold=0", "semi.lambda_u=0.5"])
    seen = network.seen
    assert len(seen) == 3 + 6 + 6 and torch.equal(seen[:3], batch["image"])
    weak = batch["weak"].flatten(0, 1)
    assert torch.equal(seen[3:9], weak.permute(0, 3, 1, 2).float())
    strong = augment(
        batch["strong"].flatten(0, 1),
        torch.arange(6),
        aug=algorithm.aug,
        erase_p=algorithm.erase_p,
        fill=(1.0, 2.0, 3.0),
    )
    assert torch.equal(seen[9:], strong)
    assert algorithm.aug.randaugment_n == 2 and algorithm.erase_p == 1.0
    # BatchNorm has met them as one batch
    torch.testing.assert_close(network.norm.running_mean, 0.1 * seen.mean((0, 2, 3)))
    fresh = Small()
    fresh.load_state_dict(network.state_dict())
    logits = fresh.train()(seen)
    torch.testing.assert_close(state.outputs, logits[:3])
    expected = supervised + 0.5 * consistency(logits[3:9], logits[9:], 0.0)[0]
    torch.testing.assert_close(state.loss, expected)
    row, labels = algorithm.row(), logits[3:9].argmax(1)
    assert row["mask_rate"] == 1.0 and row["pseudo_counts"] == labels.bincount(minlength=4).tolist()
    truth = batch["truth"].flatten()
    assert row["pseudo_accuracy"] == pytest.approx(float((labels == truth)[truth >= 0].double().mean()))
    assert row["unlabelled_loss"] == pytest.approx(float(expected - supervised) / 0.5, rel=1e-5)
    assert row["lambda_u"] == 0.5


def test_a_teacher_labels_apart_and_the_network_sees_strong_views_only():
    teacher = Small().eval()
    algorithm, network, state, batch, _ = one_step(["semi.threshold=0"], teacher)
    assert len(network.seen) == 3 + 6 and len(teacher.seen) == 6
    assert torch.equal(teacher.seen, batch["weak"].flatten(0, 1).permute(0, 3, 1, 2).float())
    counts = teacher(teacher.seen).argmax(1).bincount(minlength=4)
    assert algorithm.row()["pseudo_counts"] == counts.tolist()
    assert teacher.norm.num_batches_tracked == 0
    state.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_pseudo_labels_are_learned_on_the_view_that_made_them():
    _, network, state, _, supervised = one_step(["semi.method=pseudo", "semi.threshold=0"])
    assert len(network.seen) == 3 + 6
    fresh = Small()
    fresh.load_state_dict(network.state_dict())
    logits = fresh.train()(network.seen)[3:]
    own = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
    torch.testing.assert_close(state.loss - supervised, own)


def test_nothing_above_the_threshold_leaves_the_supervised_loss():
    algorithm, _, state, _, supervised = one_step(["semi.threshold=1"])
    assert torch.equal(state.loss, supervised)
    row = algorithm.row()
    assert (row["mask_rate"], row["pseudo_accuracy"]) == (0.0, None)


def test_aligned_labels_follow_the_labelled_classes_shares():
    """ReMixMatch's formula by hand: the first step's mean is the shares themselves, the second divides by the mean."""
    algorithm, network, state, _, _ = one_step(["semi.threshold=0", "semi.align=true"])
    shares = np.array(SHARES) / 10
    logits = Small()
    logits.load_state_dict(network.state_dict())
    p = logits.train()(network.seen)[3:9].detach().double().softmax(1).numpy()
    plain = torch.from_numpy(p.argmax(1)).bincount(minlength=4).tolist()
    assert algorithm.row()["pseudo_counts"] == plain
    mean = 0.99 * shares + 0.01 * p.mean(0)
    np.testing.assert_allclose(algorithm.mean.numpy(), mean, rtol=1e-6)

    before = np.array([0.9, 0.08, 0.01, 0.01])
    algorithm.mean = torch.from_numpy(before)
    algorithm._forget(state)
    state.loss = torch.zeros(())
    algorithm.apply(Event.AFTER_LOSS, state, None)
    algorithm.apply(Event.BATCH_END, state, None)
    aligned = p * shares / before
    aligned /= aligned.sum(1, keepdims=True)
    expected = torch.from_numpy(aligned.argmax(1)).bincount(minlength=4).tolist()
    assert algorithm.row()["pseudo_counts"] == expected != plain

    kept = algorithm.mean
    algorithm._made = torch.full_like(algorithm._made, torch.nan)
    algorithm.apply(Event.AFTER_LOSS, state, None)
    algorithm.apply(Event.BATCH_END, state, None)
    assert torch.equal(algorithm.mean, kept), "a step that is not finite is forgotten"


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        ("", "data.labels_per_class leaves; got neither, give one"),
        ("data.labels_per_class=5 data.unlabelled=more", "data.labels_per_class leaves; got both, give one"),
        (
            "data.unlabelled=test_dataset/more",
            "data.unlabelled = test_dataset/more and data.test = test_dataset lie",
        ),
        ("data.labels_per_class=5 loss.name=bce", "loss.name = bce trains none; use lsce or ce"),
        ("data.labels_per_class=5 semi.teacher=ema ema.enabled=false", "needs ema.enabled=true"),
        ("data.labels_per_class=5 semi.weak_scale=[0.9,0.5]", r"semi.weak_scale = \[0.9, 0.5\]"),
        ("data.labels_per_class=0", "data.labels_per_class = 0: must be >= 1"),
    ],
)
def test_contradictions_are_refused(words, said):
    with pytest.raises(errors.InputError, match=said):
        checks.check(load(None, ["semi.enabled=true", *words.split()]))


def test_when_no_image_is_left_unlabelled_the_run_says_so(tmp_path):
    toy_project.project(tmp_path)
    with pytest.raises(
        errors.InputError, match=r"data.labels_per_class = 100 leaves no image unlabelled; change it"
    ):
        toy_project.fit(*SEMI, "data.labels_per_class=100")


def test_the_food_recipe_is_the_fair_one(repo):
    recipe = load(repo / "recipes/food_fixmatch.yaml")
    checks.check(recipe)
    assert recipe.model.backbone == "resnet18" and not recipe.model.pretrained
    assert recipe.semi.enabled and recipe.semi.method == "fixmatch" and recipe.semi.threshold == 0.95
    checks.check(load(repo / "recipes/food_fixmatch.yaml", ["semi.enabled=false"]))


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run with the average as teacher, which nothing interrupts."""
    home = Path.cwd()
    os.chdir(toy_project.project(tmp_path_factory.mktemp("whole")))
    try:
        assert toy_project.fit(*SEMI, *ALIGNED, "train.save_every=1ba") == 0
        return {"last": toy_project.last(), "epochs": toy_project.epochs(), "place": Path.cwd()}
    finally:
        os.chdir(home)


def test_an_epoch_says_what_was_labelled(whole):
    for row in whole["epochs"]:
        assert 0 < row["mask_rate"] <= 1 and 0 <= row["pseudo_accuracy"] <= 1
        assert sum(row["pseudo_counts"]) == round(row["mask_rate"] * 8 * 4 * 2)
    derived_numbers = next(whole["place"].glob("results/results/tiny/meta/derived_*.json")).read_text()
    assert '"unlabelled": 24' in derived_numbers


def test_a_run_killed_inside_an_epoch_ends_in_the_same_bits(whole, tmp_path, monkeypatch):
    toy_project.project(tmp_path)

    class Killed(BaseException):
        pass

    def killed(self: Saving, state, logger) -> None:
        original(self, state, logger)
        if state.timestamp.batch.value == 11:
            raise Killed

    original = Saving.batch_checkpoint
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Saving, "batch_checkpoint", killed)
        toy_project.fit(*SEMI, *ALIGNED, "train.save_every=1ba")
    assert toy_project.fit(*SEMI, *ALIGNED, "train.save_every=1ba") == 0
    assert toy_project.different(whole["last"].tensors, toy_project.last().tensors) == []
    assert toy_project.different(whole["last"].more, toy_project.last().more) == []
    assert whole["epochs"] == toy_project.epochs()


def test_microbatches_give_the_gradient_of_the_whole_batch(tmp_path):
    toy_project.project(tmp_path)
    toy_project.fit("exp.name=whole", *SEMI, *toy_project.ONE)
    toy_project.fit("exp.name=parts", *SEMI, *toy_project.ONE, "train.batch_per_gpu=2", "train.grad_accum=2")
    for name, tensor in toy_project.last("whole").tensors.items():
        torch.testing.assert_close(toy_project.last("parts").tensors[name], tensor, rtol=0, atol=1e-5)


def test_the_food_recipe_converts_trains_and_evaluates(repo, tmp_path, capsys):
    """At smoke size and as the recipe stands, on folders of the tiny project's photographs; one is in two of them."""
    toy_project.project(tmp_path)
    photographs = sorted(Path("data/train").glob("*.jpg"))
    for number, path in enumerate(photographs):
        place = ("training/labeled", "training/unlabeled", "training/unlabeled", "validation")[number % 4]
        folder = Path("data/food", place, "" if "unlabeled" in place else path.name.split("_")[0])
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    held_out = next(Path("data/food/validation").rglob("*.jpg"))
    shutil.copy(held_out, "data/food/training/unlabeled/copy.jpg")
    Path("food.yaml").write_text(f"base: {repo}/recipes/food_fixmatch.yaml\n")
    small = [
        "food.yaml", "data.img_size=32", "tta.scales=[32]", "data.workers=1", "model.backbone=resnet10t",
        "train.batch_per_gpu=5", "semi.mu=2", "semi.threshold=0.3", "sched.cosine_epochs=1", "sched.warmup_epochs=0",
    ]  # fmt: skip
    assert not toy_project.convert.main(small)
    assert toy_project.train.main(small) == 0
    said = capsys.readouterr().out
    assert "30 images, 2 beside each labelled one, fixmatch from 0.3" in said
    assert "1 images of data.unlabelled validate this fold and are left out" in said
    run = Run("food", "resnet10t", 0, 42)
    (epoch,) = [row for row in runs.read_events(run.events) if row["event"] == "epoch"]
    assert epoch["mask_rate"] > 0 and epoch["pseudo_accuracy"] is None
    assert list((run.results_dir / "tensorboard").rglob("events.out.tfevents*"))
    with Image.open(run.results_dir / f"samples_{run.stem}.png") as picture:
        assert picture.height > 5 * 32  # two rows more: the views
    assert not evaluate.main(small)
    assert list(Path("results/results/food").glob("oof/*.npz"))
    (task,) = plan.tasks(["food.yaml"], plan.read_words(small[1:]))
    assert launch.Finished(1)(task), "a campaign keeps it"


def test_the_small_recipe_trains_with_and_without_images_that_have_no_label(repo, tmp_path):
    toy_project.project(tmp_path)
    small = [
        f"{repo}/recipes/flowers17_fixmatch.yaml", "exp.name=few", "data.root=data/train",
        "data.csv=data/train_labels.csv", "data.home=few", "data.n_splits=3", "data.group=none", "data.workers=1",
        "data.img_size=32", "tta.scales=[32]", "train.batch_per_gpu=4", "semi.mu=2", "semi.threshold=0.3",
        "sched.cosine_epochs=1", "sched.warmup_epochs=0",
    ]  # fmt: skip
    assert not toy_project.convert.main(small)
    assert toy_project.train.main(small) == 0
    assert toy_project.train.main([*small, "exp.name=alone", "semi.enabled=false"]) == 0
    few, alone = (
        next(
            row for row in runs.read_events(Run(name, "test_resnet", 0, 42).events) if row["event"] == "epoch"
        )
        for name in ("few", "alone")
    )
    assert few["mask_rate"] > 0 and 0 <= few["pseudo_accuracy"] <= 1 and "mask_rate" not in alone
    counts = [
        json.loads(path.read_text())["class_counts"]
        for path in Path("results/results").glob("*/meta/derived_*.json")
    ]
    assert counts == [[5, 5, 5, 5]] * 2


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_learn_what_one_learns(tmp_path):
    toy_project.project(tmp_path)
    launcher = [
        sys.executable,
        "-m",
        "composer.cli.launcher",
        "-n",
        "2",
        str(Path(toy_project.train.__file__)),
    ]
    words = [
        "tiny.yaml",
        *SEMI,
        *toy_project.ONE,
        "semi.align=true",
        "exp.name=two",
        "train.batch_per_gpu=2",
        "train.world_size=2",
    ]
    subprocess.run([*launcher, *words], check=True, timeout=300)
    assert toy_project.fit(*SEMI, *toy_project.ONE, "semi.align=true", "exp.name=one") == 0
    for name, tensor in toy_project.last("one").tensors.items():
        torch.testing.assert_close(toy_project.last("two").tensors[name], tensor, rtol=0, atol=1e-4)
    (one,), (two,) = toy_project.epochs("one"), toy_project.epochs("two")
    assert one["pseudo_counts"] == two["pseudo_counts"] and one["mask_rate"] == two["mask_rate"]
