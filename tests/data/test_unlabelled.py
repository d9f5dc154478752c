"""Semi-supervised learning: the loss against its formula, batches as pure functions, one forward pass, full runs."""

from __future__ import annotations

import json
import os
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from composer.core import Event, Precision, Timestamp
from torch import nn

from fastflower.algorithms.fixmatch import FixMatch, unlabelled_weight
from fastflower.callbacks.checkpoints import CheckpointSaver
from fastflower.core import errors, runs, seeding
from fastflower.core.runs import Run
from fastflower.data import unlabelled
from fastflower.data.betons.fold_set import open_fold
from fastflower.data.decode.kernel import Crop, decode_train
from fastflower.data.loaders import TrainLoader
from fastflower.data.transforms.augment import augment
from fastflower.model.losses import consistency
from fastflower.recipe import checks, load, schema
from support import forked, toy_project

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


def test_the_loss_equals_the_formula_of_the_paper():
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
        unlabelled_weight(0, 0, steps=4, lambda_u=2.0, ramp_epochs=0),
        unlabelled_weight(0, 0, steps=4, lambda_u=2.0, ramp_epochs=5),
    ] == [2.0, 0.0]
    assert unlabelled_weight(2, 2, steps=4, lambda_u=2.0, ramp_epochs=5) == pytest.approx(1.0)
    assert (
        unlabelled_weight(5, 0, steps=4, lambda_u=2.0, ramp_epochs=5)
        == unlabelled_weight(9, 3, steps=4, lambda_u=2.0, ramp_epochs=5)
        == 2.0
    )


# --- the data -------------------------------------------------------------------------------------------------------


def test_labelled_rows_are_drawn_by_class_seed_and_fold():
    labels = np.repeat([0, 1, 3], [20, 3, 10])
    rows = unlabelled.draw_labelled(labels, 5, seed=1, fold=0)
    assert np.bincount(labels[rows]).tolist() == [5, 3, 0, 5] and (np.diff(rows) > 0).all()
    assert rows.tolist() == unlabelled.draw_labelled(labels, 5, seed=1, fold=0).tolist()
    assert rows.tolist() != unlabelled.draw_labelled(labels, 5, seed=2, fold=0).tolist()
    assert unlabelled.draw_labelled(labels, None, seed=1, fold=0).tolist() == list(range(33))


def test_the_endless_sequence_goes_through_all_rows_again_and_again():
    rows = np.arange(100, 107)
    sequence = unlabelled.endless_rows(rows, 0, count=30, seed=5, fold=0)
    for start in range(0, 28, 7):
        assert sorted(sequence[start : start + 7]) == rows.tolist()
    assert sequence[:7].tolist() != sequence[7:14].tolist()
    for start, count in ((0, 0), (3, 5), (6, 1), (7, 7), (5, 25)):
        assert (
            unlabelled.endless_rows(rows, start, count=count, seed=5, fold=0).tolist()
            == sequence[start : start + count].tolist()
        )


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[schema.Recipe, unlabelled.FoldSet]:
    home = toy_project.project(tmp_path_factory.mktemp("opened"))
    recipe = load(home / "tiny.yaml", [*SEMI, f"data.home={home}/data"])
    return recipe, open_fold(recipe, 0)


def views(opened, rank: int = 0, world: int = 1, **options) -> unlabelled.UnlabelledBatches:
    recipe, fold = opened
    beton, rows = unlabelled.unlabelled_rows(recipe, fold)
    sizes = [3, 4]  # the second epoch's batch is another
    given = {"strong": Crop((0.3, 0.5)), **options}
    return unlabelled.UnlabelledBatches(
        beton=beton,
        rows=rows,
        seed=7,
        fold=0,
        mu=3,
        batch=lambda e: sizes[min(e, 1)] * 2 // world,
        steps=lambda e: 5,
        size=lambda e: (16, 24),
        weak=Crop(),
        rank=rank,
        world=world,
        threads=1,
        **given,
    )


def test_views_are_two_crops_of_the_same_images_and_none_is_labelled(opened):
    recipe, fold = opened
    source = views(opened)
    used = unlabelled.labelled_rows(recipe, fold)
    order = source.order(1)
    assert len(order) == 5 * 8 * 3 and not set(order) & set(used)
    assert sorted({*order, *used}) == list(range(fold.train.rows))
    step = list(source(1, 0))[2]
    rows = order[2 * 24 : 3 * 24]
    assert step["weak"].shape == step["strong"].shape == (8, 3, 16, 24, 3)
    assert step["truth"].flatten().tolist() == fold.train.labels[rows].tolist()
    for name, tag, crop in (
        ("weak", unlabelled.WEAK_SEED, source.weak),
        ("strong", unlabelled.STRONG_SEED, source.strong),
    ):
        keys = seeding.row_keys(7 + tag, 1, positions=np.arange(48, 72), rows=rows)
        out = np.empty((24, 16, 24, 3), np.uint8)
        decode_train(fold.train, rows, keys=keys, out=out, crop=crop, threads=1)
        assert np.array_equal(step[name].flatten(0, 1).numpy(), out)
    assert (step["strong_key"].flatten().numpy().view(np.uint64) == keys).all()


def test_epochs_continue_the_sequence_at_any_batch_size(opened):
    source = views(opened)
    drawn = np.concatenate([source.order(0), source.order(1), source.order(2)])
    assert (
        drawn.tolist() == unlabelled.endless_rows(source.rows, 0, count=len(drawn), seed=7, fold=0).tolist()
    )


def test_batches_are_the_same_after_a_resume_and_ranks_interleave(opened):
    batches = list(views(opened)(1, 0))
    for name, tensor in next(views(opened)(1, 3)).items():
        assert torch.equal(tensor, batches[3][name])
    ranks = [list(views(opened, rank, 2)(1, 0)) for rank in range(2)]
    for step, batch in enumerate(batches):
        for name, tensor in batch.items():
            both = torch.stack([ranks[rank][step][name].flatten(0, 1) for rank in range(2)], 1)
            assert torch.equal(both.flatten(0, 1), tensor.flatten(0, 1)), name


def test_a_loader_adds_them_to_its_batches_from_any_start(opened):
    _, fold = opened
    loader = TrainLoader(
        fold.train,
        lambda e: np.arange(40),
        seed=7,
        batch=lambda e: 8,
        size=lambda e: (16, 24),
        crop=Crop(),
        extras=views(opened),
    )
    loader.cursor = lambda: (1, 3)
    got = list(loader)
    assert len(got) == 2 and torch.equal(got[0]["weak"], next(views(opened)(1, 3))["weak"])
    assert {len(tensor) for tensor in got[0].values()} == {8}


# --- the algorithm --------------------------------------------------------------------------------------------------


CLASS_COUNTS = [1, 2, 3, 4]  # labelled images


class Small(nn.Module):
    """A network with BatchNorm that records its last input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return self.head(self.norm(images).square().mean((2, 3)))


def one_step(overrides: list[str], teacher: nn.Module | None = None):
    """Run the algorithm on one microbatch: the algorithm, network, state, batch and supervised loss."""
    recipe = load(None, ["semi.enabled=true", "data.labels_per_class=1", "semi.mu=2", *overrides])
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
    algorithm = FixMatch(recipe, CLASS_COUNTS, fill=(1.0, 2.0, 3.0), teacher=teacher)
    state = types.SimpleNamespace(
        batch=batch, timestamp=Timestamp(epoch=1, batch_in_epoch=2), dataloader_len=4,
        precision=Precision.FP32, precision_config=None, outputs=None, loss=None,
    )  # fmt: skip

    def event(name: Event) -> None:
        if algorithm.match(name, state):
            algorithm.apply(name, state, None)

    event(Event.EPOCH_START)
    event(Event.BATCH_START)
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
    assert row["unlabelled_loss"] == pytest.approx((expected - supervised).item() / 0.5, rel=1e-5)
    assert row["lambda_u"] == 0.5


def test_a_teacher_makes_the_labels_and_the_network_sees_strong_views_only():
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
    expected = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
    torch.testing.assert_close(state.loss - supervised, expected)


def test_nothing_above_the_threshold_leaves_the_supervised_loss():
    algorithm, _, state, _, supervised = one_step(["semi.threshold=1"])
    assert torch.equal(state.loss, supervised)
    row = algorithm.row()
    assert (row["mask_rate"], row["pseudo_accuracy"]) == (0.0, None)


def test_aligned_labels_follow_the_class_fractions():
    """ReMixMatch's formula by hand: step one's mean is the class fractions, step two divides by the mean."""
    algorithm, network, state, _, _ = one_step(["semi.threshold=0", "semi.align=true"])
    fractions = np.array(CLASS_COUNTS) / 10
    logits = Small()
    logits.load_state_dict(network.state_dict())
    p = logits.train()(network.seen)[3:9].detach().double().softmax(1).numpy()
    plain = torch.from_numpy(p.argmax(1)).bincount(minlength=4).tolist()
    assert algorithm.row()["pseudo_counts"] == plain
    mean = 0.99 * fractions + 0.01 * p.mean(0)
    np.testing.assert_allclose(algorithm.mean_prediction.numpy(), mean, rtol=1e-6)

    before = np.array([0.9, 0.08, 0.01, 0.01])
    algorithm.mean_prediction = torch.from_numpy(before)
    algorithm._reset(state)
    state.loss = torch.zeros(())
    algorithm.apply(Event.AFTER_LOSS, state, None)
    algorithm.apply(Event.BATCH_END, state, None)
    aligned = p * fractions / before
    aligned /= aligned.sum(1, keepdims=True)
    expected = torch.from_numpy(aligned.argmax(1)).bincount(minlength=4).tolist()
    assert algorithm.row()["pseudo_counts"] == expected != plain

    kept = algorithm.mean_prediction
    algorithm._label_logits = torch.full_like(algorithm._label_logits, torch.nan)
    algorithm.apply(Event.AFTER_LOSS, state, None)
    algorithm.apply(Event.BATCH_END, state, None)
    assert torch.equal(algorithm.mean_prediction, kept), "a step that is not finite is forgotten"


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("", "data.labels_per_class leaves unlabelled; got neither, give one"),
        (
            "data.labels_per_class=5 data.unlabelled=more",
            "data.labels_per_class leaves unlabelled; got both, give one",
        ),
        (
            "data.unlabelled=test_dataset/more",
            "data.unlabelled = test_dataset/more and data.test = test_dataset are one inside the other",
        ),
        ("data.labels_per_class=5 loss.name=bce", "loss.name = bce does not train; use lsce or ce"),
        ("data.labels_per_class=5 semi.teacher=ema ema.enabled=false", "needs ema.enabled=true"),
        ("data.labels_per_class=5 semi.weak_scale=[0.9,0.5]", r"semi.weak_scale = \[0.9, 0.5\]"),
        ("data.labels_per_class=0", "data.labels_per_class = 0: must be >= 1"),
    ],
)
def test_contradictions_are_refused(overrides, message):
    with pytest.raises(errors.InputError, match=message):
        checks.check(load(None, ["semi.enabled=true", *overrides.split()]))


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


# --- full runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """An uninterrupted run with the weight average as teacher."""
    home = Path.cwd()
    os.chdir(toy_project.project(tmp_path_factory.mktemp("whole")))
    try:
        assert toy_project.fit(*SEMI, *ALIGNED, "train.save_every=1ba") == 0
        return {"last": toy_project.last(), "epochs": toy_project.epochs(), "folder": Path.cwd()}
    finally:
        os.chdir(home)


@pytest.mark.slow
def test_an_epoch_records_its_pseudo_labels(full_run):
    for row in full_run["epochs"]:
        assert 0 < row["mask_rate"] <= 1 and 0 <= row["pseudo_accuracy"] <= 1
        assert sum(row["pseudo_counts"]) == round(row["mask_rate"] * 8 * 4 * 2)
    derived_numbers = next(full_run["folder"].glob("results/results/tiny/meta/derived_*.json")).read_text()
    assert '"unlabelled": 24' in derived_numbers


@pytest.mark.slow
def test_a_run_killed_inside_an_epoch_ends_in_the_same_bits(full_run, tmp_path, monkeypatch):
    toy_project.project(tmp_path)

    class Killed(BaseException):
        pass

    def killed(self: CheckpointSaver, state, logger) -> None:
        original(self, state, logger)
        if state.timestamp.batch.value == 11:
            raise Killed

    original = CheckpointSaver.batch_checkpoint
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(CheckpointSaver, "batch_checkpoint", killed)
        toy_project.fit(*SEMI, *ALIGNED, "train.save_every=1ba")
    assert toy_project.fit(*SEMI, *ALIGNED, "train.save_every=1ba") == 0
    assert toy_project.different(full_run["last"].tensors, toy_project.last().tensors) == []
    assert toy_project.different(full_run["last"].training_state, toy_project.last().training_state) == []
    assert full_run["epochs"] == toy_project.epochs()


@pytest.mark.slow
def test_microbatches_give_the_gradient_of_the_whole_batch(tmp_path):
    toy_project.project(tmp_path)
    toy_project.fit("exp.name=whole", *SEMI, *toy_project.ONE)
    toy_project.fit("exp.name=parts", *SEMI, *toy_project.ONE, "train.batch_per_gpu=2", "train.grad_accum=2")
    for name, tensor in toy_project.last("whole").tensors.items():
        torch.testing.assert_close(toy_project.last("parts").tensors[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
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
            row
            for row in runs.read_events(
                Run(exp=name, backbone="test_resnet", fold=0, seed=42).events_path, []
            )
            if row["event"] == "epoch"
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
    words = (*SEMI, *toy_project.ONE, "semi.align=true")
    two = forked.training(*words, "exp.name=two", "train.batch_per_gpu=2", "train.world_size=2")
    assert two.wait() == [0, 0], two.text()
    assert toy_project.fit(*words, "exp.name=one") == 0
    for name, tensor in toy_project.last("one").tensors.items():
        torch.testing.assert_close(toy_project.last("two").tensors[name], tensor, rtol=0, atol=1e-4)
    (single,), (double,) = toy_project.epochs("one"), toy_project.epochs("two")
    assert single["pseudo_counts"] == double["pseudo_counts"] and single["mask_rate"] == double["mask_rate"]
