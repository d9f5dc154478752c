"""Any backbone: own networks train, are scored and handed in; what cannot be is refused before the first step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fastflower import evaluate
from fastflower.core import runs
from fastflower.core.errors import InputError
from support import toy_project

NETWORKS = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))

    def forward(self, images):
        features = self.body(images)
        if self.kind == "one_size":
            assert images.shape[2] == 32
        if self.kind == "spectrum":
            return torch.fft.fft2(features).abs().mean((2, 3))
        return features.mean((2, 3))


def build(): return Tiny("plain")
def one_size(): return Tiny("one_size")
def spectrum(): return Tiny("spectrum")
"""
WORDS = ("model.drop_path=0", "llrd.enabled=false", "sched.cosine_epochs=2", "sched.warmup_epochs=0")


@pytest.fixture(autouse=True)
def _project(tmp_path: Path) -> Iterator[None]:
    toy_project.project(tmp_path)
    Path("toy_networks.py").write_text(NETWORKS)
    yield
    sys.modules.pop("toy_networks", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


@pytest.mark.slow
def test_an_own_network_is_trained_scored_and_exported() -> None:
    words = ("model.backbone=toy_networks:build", "data.size_epochs=[1,2]", *WORDS)
    assert toy_project.fit(*words) == 0
    evaluate.main(["tiny.yaml", *words])
    member = next(runs.MODELS.glob("tiny/best_combo__toy_networks:build__fold0_*.pth"))
    programs = runs.MODELS / "tiny/programs"
    assert f"../{member.name}" in (programs / "bundle.json").read_text() and list(
        programs.glob("program_*.txt")
    )


@pytest.mark.slow
def test_a_network_of_one_size_is_trained_at_it() -> None:
    words = ("model.backbone=toy_networks:one_size", "data.size_epochs=[1,2]", *WORDS)
    assert toy_project.fit(*words) == 0
    (recipe,) = (runs.RESULTS / "tiny/meta").glob("recipe*.yaml")
    kept = yaml.safe_load(recipe.read_text())
    assert (kept["data"]["img_size"], kept["data"]["size_epochs"], kept["tta"]["scales"]) == ([32], [2], [32])
    evaluate.main(["tiny.yaml", *words])  # the same recipe as for training
    assert toy_project.fit(*words) == 0  # finished already, by the identity of the adapted recipe
    assert (
        len(
            [
                row
                for row in runs.read_events(runs.RESULTS / "tiny/events.jsonl", [])
                if row["event"] == "epoch"
            ]
        )
        == 2
    )


def test_what_cannot_be_handed_in_is_not_trained() -> None:
    with pytest.raises(
        InputError, match=r"toy_networks:spectrum at 48x48: its program holds a call of torch.fft_"
    ):
        toy_project.fit("model.backbone=toy_networks:spectrum", "data.size_epochs=[1,2]", *WORDS)
    assert not list(runs.MODELS.glob("tiny/*.pth"))
