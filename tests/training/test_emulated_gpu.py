"""The trainer on an emulated CUDA runtime, which allocates and runs no kernel; skipped without the emulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastflower.core import checkpoint, runs
from fastflower.core.runs import Run
from support import toy_project

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="has a real GPU")]
# the emulation turns each 0 into 1 on its way to Python, so a comparison of exported logits cannot pass
WITHOUT_TRIAL = """
from fastflower.training import build
build.try_export = lambda *_: None
"""
TRAIN = f"""
from emu import *
{WITHOUT_TRIAL}
from fastflower import train
from fastflower.core import errors
from fastflower.training import session
sys.argv[0] = "train.py"
try:
    errors.run_command(train.main)
finally:
    print("tf32", torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
"""


@pytest.fixture(scope="session")
def emulation(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process with the emulated runtime, built here from the folder beside the repository."""
    folder = repo.parent / "shared/tools/gpu_emulation"
    if not (folder / "build.sh").is_file():
        pytest.skip(f"no emulation at {folder}")
    place = tmp_path_factory.mktemp("emulation")
    built = subprocess.run(
        [folder / "build.sh", sys.executable],
        env={**os.environ, "OUT": str(place)},
        capture_output=True,
        text=True,
    )
    if built.returncode:
        pytest.skip(f"the emulation does not build: {built.stderr[-200:]}")
    return {
        **os.environ,
        "LD_PRELOAD": str(place / "libfakecuda.so"),
        "LD_LIBRARY_PATH": str(place),
        "TORCH_CUDNN_V8_API_DISABLED": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",  # needs a driver
        "PYTHONPATH": f"{folder}:{repo}",
        "FAKE_GPUS": "1",
        "EMU_NOINIT": "1",
    }


def fit(environment: dict[str, str], megabytes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Train the toy project on an emulated GPU of this memory."""
    Path("emulated.py").write_text(TRAIN)
    command = [sys.executable, "emulated.py", "tiny.yaml", "model.backbone=convnextv2_atto", *words]
    return subprocess.run(
        command,
        env={**environment, "FAKE_MB": str(megabytes)},
        capture_output=True,
        text=True,
        timeout=300,
    )


WORDS = ("model.drop_path=0", "train.batch_per_gpu=40", *toy_project.ONE)


def test_a_run_knows_its_memory_before_it_starts(emulation, tmp_path: Path):
    toy_project.project(tmp_path)
    done = fit(emulation, 1000, "exp.name=fits", *WORDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GB a GPU: at size 32 40 images in 1 x 40 need 0." in done.stdout
    assert "tf32 False False" in done.stdout
    run = Run(exp="fits", backbone="convnextv2_atto", fold=0, seed=42)
    assert checkpoint.load(run.checkpoints("last")[-1]).training_state["scaler"] == {}  # of bfloat16
    (row,) = (row for row in runs.read_events(run.events_path, []) if row["event"] == "epoch")
    assert 0 < row["gpu_peak_mb"] < 1000


def test_a_gpu_that_holds_no_image_is_refused_in_one_line(emulation, tmp_path: Path):
    toy_project.project(tmp_path)
    done = fit(emulation, 100, "exp.name=none", *WORDS)
    assert done.returncode == 4
    assert "a microbatch of 1 image does not fit" in done.stderr and "grad_checkpointing=true" in done.stderr
    assert "Traceback" not in done.stderr


WAITS = f"""
from emu import *
{WITHOUT_TRIAL}
from fastflower import train
from fastflower.callbacks.progress import Progress
from fastflower.core import errors
batch_end, seen = Progress.batch_end, []
def counted(self, state, logger):
    batch_end(self, state, logger)
    seen.append(count("streamsync") + count("devsync"))
    print("waits", *(b - a for a, b in zip(seen, seen[1:])), flush=True)
Progress.batch_end = counted
sys.argv[0] = "train.py"
errors.run_command(train.main)
"""


def test_a_step_waits_for_the_gpu_four_times(emulation, tmp_path: Path):
    """Composer reads the loss twice and the size of the batch, and the gradient guard the norm."""
    toy_project.project(tmp_path)
    Path("waits.py").write_text(WAITS)
    words = ("model.drop_path=0", "train.batch_per_gpu=10", *toy_project.ONE, "exp.name=waits")
    command = [sys.executable, "waits.py", "tiny.yaml", "model.backbone=convnextv2_atto", *words]
    done = subprocess.run(
        command, env={**emulation, "FAKE_MB": "1000"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("waits")]
    assert steps[-1][-2:] == ["4", "4"], steps[-1]
