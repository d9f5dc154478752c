"""Batches for CPU and GPU, little memory, few file handles, and pipes that nobody reads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from support.predictor_runs import CODE, IDS, photograph, read_rows, write_photographs


class Sums:
    """A stand-in for the networks on a GPU: the logit is the sum of a picture's pixels."""

    def __init__(self, crops):
        self.device, self.bundle, self.sizes = torch.device("cuda"), {"crops": crops}, []

    def logits(self, pictures):
        self.sizes.append(len(pictures))
        return np.array([[[[array.sum()]]] for (array,) in pictures], dtype=np.float32)


def test_a_picture_that_found_no_room_is_read_again(code, monkeypatch):
    """Memory or file handles may be too few for all threads together."""
    faults = {b"0": MemoryError(), b"2": OSError(errno.EMFILE, "Too many open files")}

    def prepare(path, crops):
        if fault := faults.pop(os.path.basename(path), None):
            raise fault
        return [np.full((2, 2, 3), 1, np.uint8)], ""

    monkeypatch.setattr(code.pictures, "prepare", prepare)
    table = code.table.Table([b"%d" % n for n in range(4)], IDS, prior=[1, 0, 0])
    predicted = [
        row
        for rows, _ in code.rows.predict_rows(
            Sums([]), code.inputs.Folder(b"."), table=table, threads=2, batch=2
        )
        for row in rows
    ]
    assert predicted == [0, 1, 2, 3] and not table.unreadable and not faults


def test_words_on_unreadable_pictures_fit_into_a_pipe(code, monkeypatch, capfd):
    """A caller that reads the output only at the end would wait for ever: a pipe holds 64 KiB."""
    names = [b"%0200d.jpg" % n for n in range(2000)]
    table = code.table.Table(names, IDS, prior=[1, 0, 0])
    assert all(
        rows == []
        for rows, _ in code.rows.predict_rows(
            Sums([]), code.inputs.Folder(b"nowhere"), table=table, threads=2, batch=16
        )
    )
    assert len(table.unreadable) == 2000
    errors = capfd.readouterr().err
    assert len(errors.splitlines()) > 20 and len(errors) < 1 << 15


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batches_for_a_gpu_keep_rows_together(code, batch):
    crop = [{"height": 8, "width": 8, "factor": 1.0, "interpolation": "bicubic", "stored_side": None}]
    Path("some").mkdir()
    for number in range(8):
        photograph(number).save(f"some/{number}.png")
    Path("some/4.png").write_bytes(b"")
    table = code.table.Table([b"%d.png" % n for n in range(8)], IDS, prior=[0.2, 0.5, 0.3])
    ensemble = Sums(crop)
    sums = {}
    for rows, logits in code.rows.predict_rows(
        ensemble, code.inputs.Folder(b"some"), table=table, threads=2, batch=batch
    ):
        sums.update(zip(rows, logits.ravel().tolist(), strict=True))
    expected = {
        n: float(code.pictures.prepare(b"some/%d.png" % n, crop)[0][0].sum()) for n in range(8) if n != 4
    }
    assert sums == expected and list(table.unreadable) == [4]
    assert ensemble.sizes[0] == 1 and max(ensemble.sizes) <= batch


def test_short_memory_halves_the_batch(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported.folder))
    networks = code.networks.Networks(str(exported.folder), description, hashes=hashes, device="cpu")
    crops = [
        [np.full((c["height"], c["width"], 3), 9 * n, np.uint8) for c in description["crops"]]
        for n in range(5)
    ]
    expected, honest = networks.logits(crops), networks._run

    def short(pictures):
        if len(pictures) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(pictures)

    monkeypatch.setattr(networks, "_run", short)
    np.testing.assert_allclose(networks.logits(crops), expected, atol=1e-5)

    def full(pictures):
        if networks.device.type == "cuda":
            sizes.append(len(pictures))
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(pictures)

    sizes, networks.device = [], torch.device("cuda")
    monkeypatch.setattr(networks, "_run", full)
    np.testing.assert_allclose(networks.logits(crops), expected, atol=1e-5)
    assert sizes == [5, 2, 1] and networks.notes == [
        "cuda in fp32: CUDA out of memory. Tried to allocate 2.00 GiB; continuing with cpu in fp32"
    ]


def test_memory_does_not_grow_with_the_number_of_pictures(code, monkeypatch):
    """Only a few batches are read ahead, however slow the networks are."""
    waiting, most = 0, 0

    def prepare(path, crops):
        nonlocal waiting
        waiting += 1
        return [np.zeros((2, 2, 3), np.uint8)], ""

    monkeypatch.setattr(code.pictures, "prepare", prepare)
    table = code.table.Table([b"%d" % n for n in range(5000)], IDS, prior=[1, 0, 0])
    for rows, _ in code.rows.predict_rows(
        Sums([]), code.inputs.Folder(b"."), table=table, threads=2, batch=16
    ):
        waiting -= len(rows)
        most = max(most, waiting)
        table.known[rows] = True
    assert table.done() == 5000 and most <= 3 * 16


def test_little_memory_leaves_a_whole_table(exported):
    """An address space into which torch does not fit."""
    os.mkdir("test_dataset")
    write_photographs(2)
    predict = f"{sys.executable} {CODE / 'predict.py'} test_dataset out.csv --bundle {exported.folder}"
    command = f"ulimit -v 700000; exec {predict}"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 4, done.stderr
    assert [row[1] for row in read_rows(Path("out.csv"))[1:]] == ["012", "012"]


def test_a_clock_that_stands_still_stops_nothing(run, code, monkeypatch):
    """On Windows it does so for 16 ms at a time."""
    write_photographs(2)
    monkeypatch.setattr(code.rows, "time", types.SimpleNamespace(monotonic=lambda: 1.0))
    assert run()[0] == 0
