"""FoldDataset: the betons of a fold in a torch DataLoader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fastflower
from fastflower.core.errors import InputError
from fastflower.data.loaders import EvalLoader
from support import toy_project


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A converted project, as the current directory."""
    return toy_project.project(tmp_path)


def test_validation_images_are_those_of_the_trainer(toy: Path) -> None:
    dataset = fastflower.FoldDataset("tiny.yaml", fold=1, split="val")
    assert dataset.classes == ["3", "7", "12", "40"] and len(dataset) == len(dataset.labels) == 20
    loader = EvalLoader(
        dataset.beton, 20, size=lambda: (48, 48), factor=dataset.recipe.eval.resize_factor, interpolation="bicubic"
    )  # fmt: skip
    (wanted,) = loader
    loader.close()
    images, labels = next(iter(DataLoader(dataset, batch_size=20)))
    if dataset._interpolation == "bicubic":
        assert torch.equal(images, wanted["image"].permute(0, 3, 1, 2))
    assert images.dtype == torch.uint8 and labels.tolist() == wanted["label"].tolist()
    image, label = dataset[-1]
    assert torch.equal(image, images[-1]) and label == labels[-1]
    with pytest.raises(IndexError, match=r"rows are 0\.\.19"):
        _ = dataset[20]


def test_training_crops_follow_the_epoch_alone(toy: Path) -> None:
    dataset = fastflower.FoldDataset("tiny.yaml", "seed=7", size=(24, 40))
    first = torch.stack([dataset[row][0] for row in range(8)])
    assert first.shape == (8, 3, 24, 40)
    in_processes = next(iter(DataLoader(dataset, batch_size=8, num_workers=1)))[0]
    assert torch.equal(in_processes, first)
    dataset.set_epoch(1)
    assert not torch.equal(torch.stack([dataset[row][0] for row in range(8)]), first)
    plain = fastflower.FoldDataset("tiny.yaml", augment=False, transform=lambda image: image.float() / 255)
    assert plain[0][0].dtype == torch.float32 and torch.equal(plain[0][0], plain[0][0])
    assert np.bincount(plain.labels).sum() == len(plain)


def test_other_splits_and_folds_are_refused(toy: Path) -> None:
    with pytest.raises(InputError, match="split = test: must be train or val"):
        fastflower.FoldDataset("tiny.yaml", split="test")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fold"):
        fastflower.FoldDataset("tiny.yaml", fold=9)
