"""Drawn eyes: reproducible, two classes that differ only in the gap of the lids; and their recipes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastflower import sample_data
from fastflower.core.errors import InputError
from fastflower.core.tables import read_csv
from fastflower.data.samples import eyes
from fastflower.recipe import derived, load


def test_an_eye_is_a_function_of_seed_and_index():
    images, is_open = eyes.draw(3, np.arange(40))
    single, label = eyes.draw(3, np.array([7]))
    assert images.shape == (40, 32, 64, 3) and images.dtype == np.uint8
    assert np.array_equal(single[0], images[7]) and label[0] == is_open[7]
    assert not np.array_equal(eyes.draw(4, np.array([7]))[0], single)
    assert len(np.unique(images.reshape(40, -1), axis=0)) == 40


def test_class_frequency_is_as_set_and_brightness_does_not_separate_the_classes():
    images, is_open = eyes.draw(0, np.arange(600))
    assert is_open.mean() == pytest.approx(eyes.OPEN, abs=0.06)  # 3 standard deviations
    light = images.mean((1, 2, 3))
    threshold = np.median(light)
    assert max(((light > threshold) == is_open).mean(), ((light < threshold) == is_open).mean()) < 0.62


def test_a_drawn_contest_has_labels_and_a_hidden_truth(tmp_path):
    sample_data.main(["eyes", "rows=70", "held_out=9", "seed=5", f"home={tmp_path}/eyes"])
    columns = ("filename", "category_id")
    rows = read_csv(tmp_path / "eyes/train_labels.csv", columns)
    truth = read_csv(tmp_path / "eyes/truth.csv", columns)
    assert len(rows) == 70 and len(truth) == 9
    assert len(list((tmp_path / "eyes/test").rglob("*.jpg"))) == 9
    images, is_open = eyes.draw(5, np.arange(70, 79))
    assert [row["category_id"] for row in truth] == [str(int(label)) for label in is_open]
    stored = np.asarray(Image.open(tmp_path / "eyes/test" / truth[3]["filename"])).astype(int)
    assert np.abs(stored - images[3]).mean() < 12  # JPEG
    with pytest.raises(InputError, match="not empty; remove it"):
        sample_data.main(["eyes", f"home={tmp_path}/eyes"])


VARIANTS = {  # lr, decay, plateau factor, patience, warm-up, batch per GPU, dropout, loss, smoothing
    "eyes": (1e-4, 1e-4, 0.5, 2, 0, 4096, 0.3, "bce", 0.0),
    "eyes_cautious": (2e-4, 5e-4, 0.7, 5, 0, 4096, 0.25, "bce", 0.0),
    "eyes_bold": (3e-4, 1e-3, 0.7, 10, 5, 2048, 0.2, "focal", 0.05),
    "eyes_balanced": (2e-4, 5e-4, 0.7, 5, 0, 4096, 0.25, "focal", 0.05),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_recipes_have_the_values_of_the_variants(name, repo):
    r = load(repo / f"recipes/{name}.yaml")
    assert VARIANTS[name] == (
        *(r.opt.lr, r.opt.weight_decay, r.sched.factor, r.sched.patience, r.sched.warmup_epochs),
        *(r.train.batch_per_gpu, r.model.drop_rate, r.loss.name, r.reg.ls_eps),
    )
    numbers = derived.derive(r, 2)
    assert numbers.batch_global == 2 * r.train.batch_per_gpu
    assert numbers.lr == r.opt.lr and numbers.epochs == 1000
    assert (
        (numbers.stages[0].height, numbers.stages[0].width) == (32, 64) and r.seed == 42 and not r.train.amp
    )
    assert (r.sched.name, r.sched.monitor, r.ema.decay, r.data.split) == (
        "plateau",
        "val_loss",
        0.999,
        "ratio",
    )
    assert (r.aug.hflip_p, r.aug.photometric_p, r.aug.clahe_p, r.loss.focal_gamma) == (0.5, 0.5, 0.01, 2.0)
    assert (r.aug.vflip_p, r.aug.rotation_deg, sum(r.aug.jitter), r.reg.erase_p) == (0, 0, 0, 0)
