"""Hostile pictures cost one row and little memory; nothing in a hostile checkpoint is run."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

from fastflower.bench.fuzz import mutated
from support.predictor_runs import CODE, IDS, jpeg, photograph, run_without_bundle, write_photographs


def png_bomb() -> bytes:
    """A PNG whose valid header claims 65536 x 65536 pixels; its data inflates to a gigabyte."""
    sides, data = (1 << 16).to_bytes(4, "big") * 2, zlib.compress(bytes(1 << 24)) * 64
    chunks = [(b"IHDR", sides + b"\x08\x02\0\0\0"), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")
        for name, content in chunks
    )


def test_unreadable_pictures_get_the_prior(run, capsys):
    write_photographs(2)
    bad = {
        "empty.jpg": b"",
        "page.jpg": b"<html>",
        "cut.jpg": jpeg(5)[:300],
        "tiff.png": b"II*\0" + bytes(90),
    }
    bad["scans.jpg"] = b"\xff\xd8" + b"\xff\xda\0\0" * 501
    bad["bomb.png"] = png_bomb()
    for name, data in bad.items():
        Path("test_dataset", name).write_bytes(data)
    exit_code, rows = run()
    assert exit_code == 0
    predictions = {row[0]: row[1:] for row in rows[1:]}
    assert len(predictions) == 8
    assert all(predictions[name] == ["012", f"{9 / 16:.6f}"] for name in bad)
    about = json.loads(Path("out/submission.json").read_text())
    assert set(about["unreadable"]) == set(bad) and about["predicted"] == 2
    errors = capsys.readouterr().err
    assert all(f"'{name}': " in errors for name in bad)


MEASURED = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
import pictures
crop = {"height": 32, "width": 32, "factor": 1.0, "interpolation": "bicubic", "stored_side": 73}
pictures.prepare(b"plain.jpg", [crop])
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for name in sys.argv[2:]:
    try:
        print(name, pictures.prepare(name.encode(), [crop])[0][0].shape)
    except Exception as error:
        print(name, type(error).__name__)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, time.process_time() - start)
"""


def test_bombs_cost_neither_memory_nor_time():
    """Headers that claim 65536 pixels a side, 501 scans, a file of 1 TiB; and pictures one pixel wide."""
    Path("plain.jpg").write_bytes(jpeg(1))
    side = (65535).to_bytes(2, "little")
    bombs = {
        "bomb.png": png_bomb(),
        "bomb.gif": b"GIF89a"
        + 2 * side
        + b"\x80\0\0"
        + bytes(6)
        + b","
        + bytes(4)
        + 2 * side
        + b"\0\2\2D\1\0;",
        "bomb.bmp": b"BM" + bytes(8) + b"6\0\0\0(\0\0\0" + 2 * (side + bytes(2)) + b"\1\0\x18\0" + bytes(24),
        "bomb.jpg": jpeg(1).replace(b"\0\x46\0\x5a", b"\xff\xff\xff\xff"),
        "scans.jpg": b"\xff\xd8" + b"\xff\xda\0\0" * 501,
        "sparse.jpg": b"\xff\xd8",
    }
    for name, data in bombs.items():
        Path(name).write_bytes(data)
    os.truncate("sparse.jpg", 1 << 40)
    thin = {"1x5000.png": (1, 5000), "5000x1.jpg": (5000, 1), "1x1.png": (1, 1)}
    for name, size in thin.items():
        photograph(1, size).save(name)
    command = [sys.executable, "-c", MEASURED, str(CODE), *bombs, *thin]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *results, last = done.stdout.splitlines()
    refused = [line.split() for line in results[: len(bombs)]]
    assert [name for name, _ in refused] == list(bombs), done.stderr
    assert {kind for _, kind in refused} <= {"ValueError", "DecompressionBombError"}, results
    assert results[len(bombs) :] == [f"{name} (32, 32, 3)" for name in thin]
    assert float(last.split()[0]) < 40 and float(last.split()[1]) < 2  # MiB, seconds of processor


@pytest.mark.slow
def test_hostile_files_cost_one_row_each(run, code):
    rng = random.Random(0)
    webp, png = io.BytesIO(), io.BytesIO()
    photograph(1).save(webp, "WEBP")
    photograph(1).quantize(30).save(png, "PNG")
    seeds = [jpeg(1), jpeg(2, progressive=True), webp.getvalue(), png.getvalue()]
    for number in range(240):
        Path(f"test_dataset/{number:04d}.jpg").write_bytes(mutated(seeds[number % 4], rng))
    number, rows = run()
    assert number == 0
    assert [row[0] for row in rows[1:]] == [f"{n:04d}.jpg" for n in range(240)]
    assert all(row[1] in IDS and 0 < float(row[2]) <= 1 for row in rows[1:])
    about = json.loads(Path("out/submission.json").read_text())
    assert about["predicted"] + len(about["unreadable"]) == 240 and about["unreadable"]


class Payload:
    """An object that runs a command when it is unpickled."""

    def __init__(self, call: object = os.mkdir, *arguments: object) -> None:
        self.call, self.arguments = call, arguments or ("executed",)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call, self.arguments


PAYLOADS = {
    "mkdir": Payload(),
    "exec": Payload(exec, "import os; os.mkdir('executed')"),
    "eval": Payload(eval, "__import__('os').mkdir('executed')"),
    "process": Payload(subprocess.call, ["mkdir", "executed"]),
    "import": Payload(importlib.import_module, "executed"),
    "pickle": Payload(pickle.loads, pickle.dumps(Payload())),
    "load": Payload(torch.load, "executed.pt"),
}


@pytest.mark.parametrize("position", ["alone", "tensors", "meta", "key", "raw"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_in_a_checkpoint_is_run(code, name, position):
    Path("executed.py").write_text("import os; os.mkdir('executed')")
    payload, buffer = PAYLOADS[name], io.BytesIO()
    contents = {
        "alone": payload,
        "tensors": {"tensors": {"a": payload}},
        "meta": {"tensors": {}, "meta": payload},
    }
    contents["key"] = {"tensors": {}, "more": [{"x": (payload, torch.zeros(1))}]}
    if position == "raw":
        pickle.dump(payload, buffer)
    else:
        torch.save(contents[position], buffer)
    with pytest.raises(
        ValueError, match=r"not a plain checkpoint; nothing in it was run|not a checkpoint of training"
    ):
        code.networks.read_checkpoint(bytearray(buffer.getvalue()))
    assert not Path("executed").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_member_is_never_run(run, code, evaluated, capsys, legacy):
    """Even when the attacker also changed its hash."""
    torch.save({"tensors": Payload()}, evaluated[0], _use_new_zipfile_serialization=not legacy)
    hashes = Path("results/model/exp/programs/SHA256")
    lines = [line for line in hashes.read_text().splitlines() if evaluated[0].name not in line]
    lines.append(f"{hashlib.sha256(evaluated[0].read_bytes()).hexdigest()}  ../{evaluated[0].name}")
    hashes.write_text("\n".join(lines) + "\n")
    exit_code, _, about = run_without_bundle(code)
    assert exit_code == 0 and about["members"] == [evaluated[1].stem] and not Path("executed").exists()
    fault = "not a checkpoint of training" if legacy else "nothing in it was run"
    assert fault in capsys.readouterr().err
    torch.load(evaluated[0], weights_only=False)  # the payload is one
    assert Path("executed").exists()
