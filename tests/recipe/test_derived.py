"""Derived numbers against the written-out formulas, and every contradiction that `check` refuses."""

from __future__ import annotations

import pytest

from fastflower.core.errors import InputError
from fastflower.recipe import checks, derived, load, schema, starting_point


def recipe_with(*changes: str) -> schema.Recipe:
    return load(None, list(changes))


def refused(*changes: str) -> str:
    with pytest.raises(InputError) as caught:
        checks.check(recipe_with(*changes))
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("per_gpu", "world", "accum", "batch", "lr"),
    [
        (64, 2, 1, 128, 1e-4),
        (64, 1, 1, 64, 5e-5),
        (64, 2, 2, 256, 2e-4),
        (64, 4, 2, 512, 4e-4),
        (64, 5, 2, 640, 5e-4),
        (4, 1, 1, 4, 5e-6),  # 3.125e-6 by the rule, held at the lower bound
        (128, 8, 1, 1024, 5e-4),  # 8e-4 by the rule, held at the upper bound
    ],
)
def test_lr_follows_the_global_batch(per_gpu, world, accum, batch, lr):
    got = derived.derive(recipe_with(f"train.batch_per_gpu={per_gpu}", f"train.grad_accum={accum}"), world)
    assert got.batch_global == batch
    assert got.lr == pytest.approx(lr, rel=1e-12)


def test_the_learning_rate_of_large_batches_may_scale_less():
    changes = ["opt.large_batch_factor=0.8", "train.batch_per_gpu=96"]
    assert derived.derive(recipe_with(*changes), 8).lr == pytest.approx(4.8e-4)
    assert derived.derive(recipe_with(*changes), 4).lr == pytest.approx(2e-4 * 384 / 256)  # not above 512
    assert (
        "held in"
        in derived.derive(recipe_with("opt.large_batch_factor=0.8", "train.batch_per_gpu=128"), 8).lr_note
    )


@pytest.mark.parametrize(
    ("changes", "lr", "layerwise", "warmup"),
    [
        ([], 1e-4, True, 5),
        (["sched.cosine_epochs=6"], 1e-4, True, 0.75),
        (["model.pretrained=false", "train.batch_per_gpu=8", "sched.cosine_epochs=6"], 5e-4, False, 0.75),
        (["model.pretrained=false", "model.init=other"], 1e-4, True, 5),
        (["model.pretrained=false", "opt.name=sgd"], 0.05, False, 5),
        (["model.pretrained=false", "opt.lr_ref=2e-4"], 1e-4, False, 5),
    ],
)
def test_auto_follows_what_the_training_starts_from(changes, lr, layerwise, warmup):
    recipe = recipe_with(*changes)
    assert derived.derive(recipe, 2).lr == pytest.approx(lr)
    assert starting_point.layerwise(recipe) == layerwise
    assert starting_point.warmup_epochs(recipe) == warmup
    assert [starting_point.origin(recipe)] == [
        line.split(":")[0].removeprefix("auto, ") for line in starting_point.reasons(recipe)
    ]
    assert not [line for line in checks.check(recipe) if " lr " in line]


def test_an_explicit_lr_is_taken_as_it_is():
    assert derived.derive(recipe_with("opt.lr=0.9"), 2).lr == 0.9
    assert derived.derive(recipe_with("opt.lr=1"), 2).lr == 1.0


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ([], [15, 40]),
        (["data.img_size=[224,320,448]", "sched.cosine_epochs=48"], [15, 40, 48]),
        (["data.img_size=224"], [40]),
        (["data.img_size=[32,64]", "sched.cosine_epochs=6", "sched.warmup_epochs=1"], [2, 6]),
        (["data.size_epochs=[20,40]"], [20, 40]),
        (["data.img_size=[8,16,24]", "sched.cosine_epochs=3", "sched.warmup_epochs=0"], [1, 2, 3]),
    ],
)
def test_stages_end_in_the_specified_proportion(changes, ends):
    got = derived.derive(recipe_with(*changes), 2)
    assert [stage.last for stage in got.stages] == ends
    assert [stage.first for stage in got.stages] == [1, *[end + 1 for end in ends[:-1]]]
    by_epoch = [got.stage(epoch) for epoch in range(ends[-1])]
    assert all(stage.first <= epoch + 1 <= stage.last for epoch, stage in enumerate(by_epoch))
    assert got.stage(ends[-1] + 5) == got.stages[-1]


def test_stage_batches_and_rectangles():
    got = derived.derive(recipe_with("data.img_size=[[32,64],[48,96]]", "train.stage_batch=[8,4]"), 2)
    assert [(s.height, s.width, s.batch_per_gpu) for s in got.stages] == [(32, 64, 8), (48, 96, 4)]
    assert got.batch_global == 16
    assert derived.largest_size(recipe_with("data.img_size=[[32,64],[48,96]]")) == 96
    assert got.as_dict()["stages"][1]["height"] == 48


@pytest.mark.parametrize(("size", "side"), [(224, 255), (320, 365), (384, 438), (448, 511)])
def test_resize_side(size, side):
    assert derived.resize_side(size, 1.14) == side


def test_largest_size_covers_the_views():
    assert derived.largest_size(recipe_with()) == 384
    assert derived.largest_size(recipe_with("tta.scales=[64]")) == 320


def test_mixing_ends_with_a_third_stage():
    assert derived.mix_final_epoch(recipe_with()) is None
    assert derived.mix_final_epoch(recipe_with("data.img_size=[224,320,448]", "sched.cosine_epochs=48")) == 41
    assert derived.mix_final_epoch(recipe_with("reg.mix_final_epoch=30")) == 30


REFUSALS = [
    (["data.root=a/b", "data.test=a/b"], "are one inside the other"),
    (["data.root=a/b", "data.test=a/b/test"], "are one inside the other"),
    (["data.root=a/b/train", "data.test=./a"], "keep them apart"),
    (["data.img_size=[]"], "the sizes of the stages must grow"),
    (["data.img_size=[320,224]"], "the sizes of the stages must grow"),
    (["data.img_size=abc"], "whole numbers from 8"),
    (["data.img_size=4"], "whole numbers from 8 to 4096"),
    (["data.img_size=1000000"], "whole numbers from 8 to 4096"),
    (["data.img_size=[[1,2,3]]"], "[[height, width]]"),
    (["data.size_epochs=[5]"], "one last epoch for each of the 2 sizes"),
    (["data.size_epochs=[0,40]"], "must grow and end at the last epoch"),
    (["data.size_epochs=[15,50]"], "sched.cosine_epochs = 40"),
    (["data.size_epochs=auto", "data.img_size=[8,16,24,32]"], "give the last epoch of each of the 4 sizes"),
    (["train.stage_batch=[64]"], "one batch for each of the 2 sizes"),
    (
        ["sched.warmup_epochs=5", "sched.cosine_epochs=6"],
        "5 of 6 epochs: the learning rate would hardly have risen when it must fall; use auto or at most 3",
    ),
    (["reg.mix_final_epoch=99"], "an epoch in 1..40"),
    (["llrd.unfreeze_schedule={1: head}"], "a map of epoch -> list of parts"),
    (["llrd.unfreeze_schedule={90: [head]}"], "epoch 90 is outside 1..40"),
    (["llrd.unfreeze_schedule={x: [head]}"], "epoch x is outside 1..40"),
    (["llrd.unfreeze_schedule={1: [head]}", "llrd.enabled=false"], "needs llrd.enabled=true"),
    (["loss.name=bsce"], "both correct the class prior"),
    (["robust.kinds=[fog]"], "choose from gaussian_noise, blur"),
    (["robust.kinds=[]"], "choose from gaussian_noise, blur"),
    (["llrd.multipliers=[1]"], "at least two"),
    (["aug.rrc_scale=[1]"], "must have 2 numbers"),
    (["aug.rrc_ratio=[1,1,1]"], "must have 2 numbers"),
    (["aug.jitter=[0.1]"], "must have 4 numbers"),
    (["aug.rrc_scale=[1,0.5]"], "the first must not exceed the second"),
    (["aug.rrc_ratio=[2,1]"], "the first must not exceed the second"),
    (["opt.lr_min_bound=1e-3"], "above opt.lr_max_bound = 0.0005; lower the first"),
    (["lrfind.low=2"], "not below lrfind.high"),
    (["opt.lr=0"], "must be auto or > 0"),
    (["data.mean=[0.5,0.5]"], "three numbers in 0..1"),
    (["data.std=[0.5,0.5,2]"], "three numbers in 0..1"),
    (["data.mean=grey"], "three numbers in 0..1"),
    (["data.fold=5"], "a number (or list) in 0..4"),
    (["data.fold=[]"], "a number (or list) in 0..4"),
    (["data.fold=[0,1,0]"], "data.fold = [0, 1, 0]: names a fold twice; give each once"),
    (["data.fold=true"], "a number (or list) in 0..4"),
    (["data.fold=1", "data.split=ratio"], "0..0"),
    (["tta.scales=[]"], "at least one image size"),
]


@pytest.mark.parametrize(("changes", "text"), REFUSALS, ids=[" ".join(changes) for changes, _ in REFUSALS])
def test_contradictions_are_refused_in_one_line(changes, text):
    message = refused(*changes)
    assert text in message
    assert changes[0].partition("=")[0].split(".")[-1] in message  # names the key


def test_double_correction_can_be_asked_for():
    checks.check(recipe_with("loss.name=bsce", "checks.allow_double_correction=true"))
    checks.check(recipe_with("loss.name=bsce", "sampler.type=none"))


ADVICE = [
    (["opt.lr=1e-6"], "lr 1e-06 from pretrained weights barely learns"),
    (["opt.lr=0.1"], "use opt.lr=0.0001, or the rate that"),
    (["model.pretrained=false", "opt.lr=1.25e-5", "train.batch_per_gpu=8"], "use opt.lr=0.0005, or"),
    (["model.pretrained=false", "llrd.enabled=true"], "use llrd.enabled=auto"),
    (["model.pretrained=false", "train.batch_per_gpu=2"], "a global batch of 4 from scratch"),
    (["model.pretrained=false", "sched.cosine_epochs=9"], "start from recipes/scratch_short.yaml"),
    (["sampler.type=none", "sampler.undersample_frac=0.1"], "sampler.undersample_frac"),
    (["reg.mix_prob=0"], "limits overfitting"),
    (["sampler.oversample_cap=4"], "sampler.oversample_cap"),
    (["sampler.beta=0.5"], "sampler.beta"),
    (["loss.name=focal"], "focal loss with MixUp/CutMix"),
    (["loss.name=focal", "loss.focal_gamma=5", "reg.mix_prob=0"], "loss.focal_gamma"),
    (["model.head=arcface", "model.margin=0.5"], "model.margin"),
    (["aug.corrupt_p=0.1"], "no longer unseen"),
    (["ema.warmup=false"], "after 6931 steps"),  # ln 0.5 / ln 0.9999
    (["loss.name=bce", "loss.pos_weight=auto"], "both correct the class prior"),
    (["loss.name=bce", "loss.pos_weight=3"], "loss.pos_weight=3 both correct"),
    (["loss.name=focal", "reg.mix_prob=0"], "focal loss both favour rare classes; compare macro F1"),
    (["loss.name=focal", "reg.mix_prob=0", "aug.randaugment_n=2"], "focal loss with RandAugment"),
    (["sched.name=plateau"], "try 5 to 10"),
    (["sched.name=plateau"], "0.7 or 0.8 is gentler"),
    (["sched.name=plateau", "sched.warmup_epochs=0"], "plateau without warm-up"),
    (["sched.name=plateau", "opt.lr=1e-4", "train.batch_per_gpu=4096"], "may be small"),
    (["robust.enabled=false"], "best is chosen by clean top-1"),
]


@pytest.mark.parametrize(("changes", "text"), ADVICE, ids=[" ".join(changes) for changes, _ in ADVICE])
def test_doubtful_choices_get_advice(changes, text):
    assert not [line for line in checks.check(recipe_with()) if text in line]
    assert [line for line in checks.check(recipe_with(*changes)) if text in line]


@pytest.mark.parametrize(
    "change", ["sched.cosine_epochs=40", "model.pretrained=true", "aug.strength=0", "aug.jitter=[0,0,0,0]"]
)
def test_only_short_recolouring_trainings_from_scratch_are_warned(change):
    short = ["model.pretrained=false", "sched.cosine_epochs=9", "aug.rotation_deg=0", change]
    assert not [line for line in checks.check(recipe_with(*short)) if "scratch_short" in line]


@pytest.mark.parametrize("text, expected", [("1ep", (1, "ep")), ("200ba", (200, "ba")), ("3ep", (3, "ep"))])
def test_intervals(text, expected):
    assert derived.parse_interval(text) == expected


@pytest.mark.parametrize("text", ["", "5", "0ep", "-1ep", "1.5ep", "1dur", "10sp", "often"])
def test_strange_intervals_are_refused(text):
    with pytest.raises(
        InputError, match=r"train.save_every = .*: must be epochs such as 1ep or steps such as 200ba"
    ):
        derived.parse_interval(text)
    assert refused("train.save_every=often").startswith("train.save_every = often: must be epochs")
