"""The trainer on an emulated CUDA runtime, which allocates and runs no kernel; skipped without the emulation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from fastflower.core import checkpoint, runs
from fastflower.core.runs import Run
from fastflower.recipe import load
from fastflower.training import estimate
from support import toy_project

pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="has a real GPU")]
# the emulation turns each 0 into 1 on its way to Python, so a comparison of exported logits cannot pass
WITHOUT_TRIAL = """
from fastflower.training import prepared
prepared.try_export = lambda *_: None
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
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",  # the usual 32 MiB would hide the networks of these tests
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


EMULATED = (  # tests of test_cuda_trainings.py that need no values
    "test_the_last_stage_of_the_default_recipe_needs_what_is_estimated",
    "test_a_gpu_without_room_is_refused_before_the_first_step",
    "test_batches_on_the_gpu_are_not_overwritten_while_they_are_copied",
    "test_a_signal_saves_a_whole_state_within_thirty_seconds",
)
CASES = f"""
from emu import *
{WITHOUT_TRIAL}
import pytest
torch.cuda._sleep = lambda cycles: None
words = ["-o", "filterwarnings=", "-p", "no:cacheprovider", "-q", "-s", sys.argv[1], "-k", sys.argv[2]]
sys.exit(pytest.main(words))
"""


@pytest.mark.parametrize("name", EMULATED)
def test_a_case_of_the_gpus_holds_on_the_emulation(name: str, emulation, repo: Path, tmp_path: Path):
    Path("cases.py").write_text(CASES)
    done = subprocess.run(
        [sys.executable, "cases.py", str(repo / "tests/training/test_cuda_trainings.py"), name],
        env={**emulation, "FAKE_MB": "24564", "FASTFLOWER_TEST_PRELUDE": f"from emu import *\n{WITHOUT_TRIAL}"},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


WORDS = ("model.drop_path=0", "train.batch_per_gpu=40", "train.amp=true", *toy_project.ONE)


def test_a_run_knows_its_memory_before_it_starts(emulation, tmp_path: Path):
    toy_project.project(tmp_path)
    done = fit(emulation, 1000, "exp.name=fits", *WORDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GB a GPU: at size 32 40 images in 1 x 40 need 0." in done.stdout
    assert "tf32 False False" in done.stdout
    run = Run(exp="fits", backbone="convnextv2_atto", fold=0, seed=42)
    assert checkpoint.load(run.checkpoints("last")[-1]).training_state["scaler"] == {}  # of bfloat16
    (row,) = (row for row in runs.read_events(run.events_path, []) if row["event"] == "epoch")
    recipe = load(Path("tiny.yaml"), ["model.backbone=convnextv2_atto", *WORDS])
    assert row["gpu_peak_mb"] == pytest.approx(estimate.estimate(recipe).allocated / 2**20, rel=0.15)


PARTS = {
    "frozen": ("model.freeze=backbone", "model.frozen_views=0"),
    "features": ("model.freeze=backbone", "model.frozen_views=2"),
    "sharpness": ("opt.sam_rho=0.05",),
    "lora": ("model.backbone=vit_tiny_patch16_224", "model.lora.rank=8"),
}


@pytest.mark.parametrize("name", PARTS)
def test_the_estimate_holds_where_parts_are_frozen_and_with_two_passes_a_step(
    name: str, emulation, tmp_path: Path
):
    toy_project.project(tmp_path)
    runs.PRETRAINED.mkdir(parents=True)
    words = ["model.backbone=convnextv2_atto", *WORDS, *PARTS[name]]
    recipe = load(Path("tiny.yaml"), words)
    backbone = recipe.model.backbone
    torch.save(timm.create_model(backbone).state_dict(), runs.PRETRAINED / f"{backbone}.pth")
    if name != "sharpness":
        words += ["model.pretrained=true", "llrd.enabled=auto"]
    done = fit(emulation, 1000, "exp.name=parts", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run(exp="parts", backbone=backbone, fold=0, seed=42)
    (row,) = (row for row in runs.read_events(run.events_path, []) if row["event"] == "epoch")
    recipe = load(Path("tiny.yaml"), words)
    share = row["gpu_peak_mb"] / (estimate.estimate(recipe).allocated / 2**20)
    # features of fixed views are computed before the first epoch, whose peak the row does not have
    assert (0.7 if name == "features" else 0.85) < share < 1.15


def test_a_gpu_that_holds_no_image_is_refused_in_one_line(emulation, tmp_path: Path):
    toy_project.project(tmp_path)
    done = fit(emulation, 60, "exp.name=none", *WORDS)
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


def test_a_step_waits_for_the_gpu_once(emulation, tmp_path: Path):
    """The gradient guard reads the norm, before a step that might not be finite; the loss has arrived by then."""
    toy_project.project(tmp_path)
    Path("waits.py").write_text(WAITS)
    words = ("model.drop_path=0", "train.batch_per_gpu=10", "train.amp=true", *toy_project.ONE)
    words += ("exp.name=waits",)
    command = [sys.executable, "waits.py", "tiny.yaml", "model.backbone=convnextv2_atto", *words]
    done = subprocess.run(
        command, env={**emulation, "FAKE_MB": "1000"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("waits")]
    assert steps[-1][-2:] == ["1", "1"], steps[-1]


COPIES = """
from emu import *
from fastflower.data import loaders
from fastflower.data.device_copies import DeviceCopies
device = torch.device("cuda", torch.cuda.current_device())
def batches():
    for i in range(8):
        images = torch.empty((64, 32, 32, 3), dtype=torch.uint8, pin_memory=True)
        images.numpy()[:] = i
        yield {"image": images, "label": torch.full((64,), i), "key": torch.full((64,), i)}
loader = loaders.EvalLoader.__new__(loaders.EvalLoader)
loader.prefetch, loader.copies, loader._running = 2, DeviceCopies(device), set()
before = count("streamsync") + count("devsync")
held, seen = [], 0
for i, batch in enumerate(loaders._run(loader, batches())):
    assert batch["image"].device == device and batch["key"].device.type == "cpu"
    held.append(batch)
    seen += 1
print("waits", count("streamsync") + count("devsync") - before)
for i, batch in enumerate(held):
    assert bool((batch["image"].cpu() == i).all()) and bool((batch["label"].cpu() == i).all())
print("whole", seen, "pinned", count("h2d_pinned"))
"""


def test_batches_are_copied_ahead_and_stay_whole(emulation, tmp_path: Path):
    Path("copies.py").write_text(COPIES)
    done = subprocess.run(
        [sys.executable, "copies.py"],
        env={**emulation, "FAKE_MB": "500"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "whole 8 pinned 8" in done.stdout and "waits 0" in done.stdout, done.stdout
