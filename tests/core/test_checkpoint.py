"""Checkpoints are read back bit by bit; damaged, foreign and hostile files are refused."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from fastflower.core import checkpoint
from fastflower.core.errors import CorruptionError, InputError


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "a.pth"
    tensors = {"w": torch.arange(64.0).reshape(8, 8)[:2], "n": torch.tensor(3)}
    checkpoint.save(path, tensors, {"class_ids": ["007", "花"]}, state={"step": 4, "m": [torch.ones(2)]})
    return path


def test_round_trip(saved):
    loaded = checkpoint.load(saved)
    assert (
        torch.equal(loaded.tensors["w"], torch.arange(16.0).reshape(2, 8)) and loaded.tensors["n"].item() == 3
    )
    assert loaded.meta == {"class_ids": ["007", "花"]} and loaded.training_state["state"]["step"] == 4
    assert [p.name for p in saved.parent.iterdir()] == ["a.pth"]
    assert torch.load(saved, weights_only=True)["tensors"]["w"].shape == (2, 8)


def test_a_snapshot_does_not_change_while_training_continues():
    weight, moments = torch.zeros(3), {0: {"step": torch.tensor(1.0), "lr": 0.1}}
    copy = checkpoint.snapshot({"w": weight, "optimizer": (moments, ["name"])})
    weight += 1
    moments[0]["step"] += 1
    assert copy["w"].tolist() == [0, 0, 0] and copy["optimizer"][0][0]["step"] == 1
    assert copy["optimizer"][0][0]["lr"] == 0.1 and copy["optimizer"][1] == ["name"]


@pytest.mark.slow
def test_every_flipped_byte_is_detected(saved):
    data = saved.read_bytes()
    for position in range(len(data)):
        flipped = data[position] ^ 1 << position % 8
        saved.write_bytes(data[:position] + bytes([flipped]) + data[position + 1 :])
        with pytest.raises(InputError):
            checkpoint.load(saved)


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_truncated_files_are_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CorruptionError, match="cut short or damaged"):
        checkpoint.load(saved)


def test_a_hostile_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"fastflower": 1, "x": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(InputError, match="nothing in it was run"):
        checkpoint.load(tmp_path / "bomb.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CorruptionError, match="damaged"):
        checkpoint.load(tmp_path / "plain.pkl")
    assert not (tmp_path / "ran").exists()


def test_missing_foreign_and_newer_files(tmp_path, saved):
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.load(tmp_path / "none.pth")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pth")
    with pytest.raises(InputError, match="not a checkpoint of fastflower"):
        checkpoint.load(tmp_path / "foreign.pth")
    torch.save({"fastflower": 99}, tmp_path / "newer.pth")
    with pytest.raises(InputError, match="written in format 99, this version reads format 1"):
        checkpoint.load(tmp_path / "newer.pth")
