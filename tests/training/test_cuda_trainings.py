"""Whole trainings on a GPU: memory, two ranks, skipped steps, equal bits, other devices, signals, evaluation.

Those in test_emulated_gpu.EMULATED ask for memory, devices and exit codes alone; they also run without a GPU where an
emulated runtime is at hand.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from composer.trainer._scaler import ClosureGradScaler

from fastflower import evaluate
from fastflower.algorithms.averaging import Ema, shadow_copy
from fastflower.core import seeding
from fastflower.core.errors import EnvironmentFault
from fastflower.data.device_copies import DeviceCopies
from fastflower.data.loaders import EvalLoader, _run
from fastflower.data.transforms.augment import augment
from fastflower.model.losses import build_loss
from fastflower.model.network import training_network
from fastflower.optim.groups import param_groups
from fastflower.optim.optimizers import build_optimizer
from fastflower.recipe import load
from fastflower.recipe.schema import Aug
from fastflower.training import estimate
from support import toy_project

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
GIB = 2**30
STILL = ("model.drop_rate=0", "model.drop_path=0")
RESNET = ("model.backbone=test_resnet", *STILL)


def start(*words: str, prelude: str = "", launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start a training of the toy project in processes of its own, after lines of Python."""
    emulation = os.environ.get("FASTFLOWER_TEST_PRELUDE", "")  # see test_emulated_gpu.py
    main = "from fastflower import train\nfrom fastflower.core import errors\nerrors.run_command(train.main)"
    Path("run.py").write_text("\n".join((emulation, prelude, main, "")))
    return subprocess.Popen(
        [sys.executable, *launcher, "run.py", "tiny.yaml", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def weights(exp: str, backbone: str) -> dict[str, torch.Tensor]:
    """The tensors of an experiment's newest `last`."""
    path = sorted(Path("results/model", exp).glob(f"last__{backbone}__*.pth"), key=os.path.getmtime)[-1]
    return dict(toy_project.checkpoint.load(path).tensors)


def test_the_last_stage_of_the_default_recipe_needs_what_is_estimated():
    """One step of ConvNeXtV2-Base at 320 with 64 images a GPU, beside averages, moments and DDP's buckets."""
    if torch.cuda.get_device_properties(0).total_memory < 23 * GIB:
        pytest.skip("the GPU has less than 24 GB")
    recipe = load(None, ["model.pretrained=false"])
    need = estimate.estimate(recipe)
    network = training_network(recipe, 100)[0].to(CUDA).train()
    optimizer = build_optimizer(param_groups(network, 1e-3, recipe), recipe, CUDA)
    held = [shadow_copy(network), torch.empty(sum(p.numel() for p in network.parameters()), device=CUDA)]
    loss, shape = build_loss(recipe, [1] * 100), (64, 3, 320, 320)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        images = torch.zeros(shape, device=CUDA).to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):  # as many bytes as bfloat16
            loss(network(images), torch.zeros(64, 100, device=CUDA)).backward()
        optimizer.step()
    peak = torch.cuda.max_memory_allocated()
    assert len(held) == 2 and peak < 22.5 * GIB
    assert peak == pytest.approx(need.allocated, rel=0.15)


@pytest.mark.parametrize(
    "mebibytes, said",
    [
        (64, "the weights of resnet18 and their averages do not fit into memory"),
        (320, r"\(stage 1 of 2\): a microbatch of 1 image does not fit into memory"),
    ],
)
def test_a_gpu_without_room_is_refused_before_the_first_step(mebibytes: int, said: str, tmp_path: Path):
    toy_project.project(tmp_path)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + mebibytes * 2**20) / total)
    try:
        with pytest.raises(EnvironmentFault, match=said) as refused:
            toy_project.fit("model.backbone=resnet18", *STILL, "train.batch_per_gpu=20")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert refused.value.exit_code == 4


def test_batches_on_the_gpu_are_not_overwritten_while_they_are_copied():
    """The loader's thread is done with all page-locked memory while the GPU is still busy with a long kernel."""

    def batches() -> Any:
        for number in range(12):
            images = torch.empty((64, 64, 64, 3), dtype=torch.uint8, pin_memory=True)
            images.numpy()[:] = number
            yield {"image": images, "key": torch.full((64,), number)}

    loader = EvalLoader.__new__(EvalLoader)
    copies = DeviceCopies(torch.device("cuda", torch.cuda.current_device()))
    loader.prefetch, loader.copies, loader._running = 2, copies, set()  # type: ignore[assignment]
    with torch.cuda.stream(copies.stream):
        torch.cuda._sleep(10**8)
    held = [batch["image"] for batch in _run(loader, batches())]
    for number, images in enumerate(held):
        assert bool((images.cpu() == number).all()), number


def test_a_signal_saves_a_whole_state_within_thirty_seconds(tmp_path: Path):
    toy_project.project(tmp_path)
    backbone = "convnextv2_atto"
    running = start(
        f"model.backbone={backbone}", *STILL, "sched.cosine_epochs=500", "data.size_epochs=[1,500]"
    )
    deadline = time.monotonic() + 300
    while not any(Path("results/model/tiny").glob("last__*.pth")):
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[0]
        time.sleep(0.1)
    begun = time.monotonic()
    running.send_signal(signal.SIGTERM)
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 75 and time.monotonic() - begun < 30, said
    assert weights("tiny", backbone)


def test_two_ranks_train_with_all_that_speaks_between_them(tmp_path: Path):
    """FixMatch with its EMA teacher, synchronised norms, SWA: on two GPUs, or both ranks on one over gloo."""
    toy_project.project(tmp_path)
    alone = torch.cuda.device_count() == 1
    prelude = (
        "import os\nos.environ['LOCAL_RANK'] = '0'\nos.environ['LOCAL_WORLD_SIZE'] = '1'\n"
        "import composer.devices.device_gpu as gpu\ngpu.DeviceGPU.dist_backend = 'gloo'"
    )
    semi = ("semi.enabled=true", "semi.teacher=ema", "semi.mu=2", "data.labels_per_class=4")
    words = (
        *RESNET,
        *semi,
        "train.world_size=2",
        "train.batch_per_gpu=4",
        "swa.enabled=true",
        "swa.start=0.1",
    )
    launcher = ("-m", "composer.cli", "-n", "2")
    done = start(*words, prelude=prelude if alone else "", launcher=launcher)
    said = done.communicate(timeout=500)[0]
    assert done.returncode == 0, said
    tensors = weights("tiny", "test_resnet")  # the ranks compare their weights after each epoch
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    (row, *_) = toy_project.runs.read_events(Path("results/results/tiny/events.jsonl"), [])[-2:]
    assert "clean_swa" in row and row["gpu_peak_mb"] > 0


@pytest.mark.parametrize("words", [(), ("opt.sam_rho=0.05",)])
def test_a_step_that_the_scaler_skips_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
):
    """fp16 from a scale that overflows, with parts that do not train yet: neither EMA nor counts take such a step."""
    toy_project.project(tmp_path)
    made = ClosureGradScaler.__init__
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(
        ClosureGradScaler, "__init__", lambda self, *a, **k: made(self, *a, **{**k, "init_scale": 2.0**30})
    )
    updates: list[bool] = []
    match = Ema.match

    def watched(self: Ema, event: Any, state: Any) -> bool:
        moves = match(self, event, state)
        if event.value == "batch_end":
            updates.append(moves)
        return moves

    monkeypatch.setattr(Ema, "match", watched)
    assert toy_project.fit("llrd.unfreeze_schedule={1: [head], 2: [front, middle, back, head]}", *words) == 0
    rows = toy_project.epochs()
    assert not updates[0] and updates[-1]
    assert sum(row["nonfinite"] for row in rows) == updates.count(False)
    assert toy_project.last().training_state["parts"]["ema"]["updates"] == updates.count(True)


@pytest.mark.parametrize("backbone", ["convnextv2_atto", "test_resnet"])
def test_equal_seeds_and_a_cut_training_end_in_equal_bits(backbone: str, tmp_path: Path):
    toy_project.project(tmp_path)
    words = (f"model.backbone={backbone}", "model.drop_path=0", "train.save_every=2ba")
    kill = (
        "import os\nfrom fastflower.callbacks.recorder import Recorder\nend = Recorder.batch_end\n"
        "def batch_end(self, state, logger):\n"
        "    end(self, state, logger)\n"
        "    if state.timestamp.batch.value == 7: os.kill(os.getpid(), 9)\n"
        "Recorder.batch_end = batch_end"
    )
    for exp in ("one", "two"):
        assert toy_project.fit(*words, f"exp.name={exp}") == 0
    killed = start(*words, "exp.name=cut", prelude=kill)
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    assert toy_project.fit(*words, "exp.name=cut") == 0
    first = weights("one", backbone)
    for exp in ("two", "cut"):
        assert toy_project.different(first, weights(exp, backbone)) == [], exp


@pytest.mark.parametrize("begins", ["cpu", "gpu"])
def test_a_training_goes_on_on_another_device(begins: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toy_project.project(tmp_path)
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    script = (
        "from fastflower import train; from fastflower.core import errors; errors.run_command(train.main)"
    )
    stop = (
        "import os, signal\nfrom fastflower.callbacks.recorder import Recorder\nend = Recorder.batch_end\n"
        "def batch_end(self, state, logger):\n"
        "    end(self, state, logger)\n"
        "    if state.timestamp.batch.value == 5: os.kill(os.getpid(), signal.SIGTERM)\n"
        "Recorder.batch_end = batch_end\n"
    )
    codes = []
    for device in (begins, {"cpu": "gpu", "gpu": "cpu"}[begins]):
        Path("either.py").write_text(stop * (not codes) + script)
        environment = hidden if device == "cpu" else dict(os.environ)
        command = [sys.executable, "either.py", "tiny.yaml", "train.amp=false"]
        codes.append(subprocess.run(command, env=environment, timeout=300).returncode)
    assert codes == [75, 0]
    assert [row["epoch"] for row in toy_project.epochs()] == [1, 2, 3]


def test_a_compiled_network_trains_at_both_sizes(tmp_path: Path):
    toy_project.project(tmp_path)
    plain, compiled = start(*RESNET, "exp.name=plain"), None
    plain.communicate(timeout=300)
    compiled = start(*RESNET, "exp.name=compiled", "train.compile=true")
    said = compiled.communicate(timeout=500)[0]
    assert plain.returncode == compiled.returncode == 0, said
    losses = [[row["train_loss"] for row in toy_project.epochs(exp)] for exp in ("plain", "compiled")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_evaluate_gives_the_logits_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toy_project.project(tmp_path)
    assert toy_project.fit() == 0
    seen = {}
    for device in ("gpu", "cpu"):
        if device == "cpu":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        evaluate.main(["tiny"])
        (path,) = sorted(Path("results/results/tiny/oof").glob("*.npz"))[:1]
        with np.load(path) as arrays:
            seen[device] = {name: arrays[name] for name in arrays.files if arrays[name].dtype.kind == "f"}
        path.unlink()
    for name, values in seen["gpu"].items():
        np.testing.assert_allclose(values, seen["cpu"][name], rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("pairs", [False, True])
def test_augmentation_is_the_cpus_and_never_waits(pairs: bool):
    rows = np.arange(32)
    keys = torch.from_numpy(seeding.row_keys(1, 0, positions=rows, rows=rows).view(np.int64))
    images = torch.randint(0, 256, (32, 64, 128 if pairs else 64, 3), dtype=torch.uint8)
    options: dict[str, Any] = {"aug": Aug(), "erase_p": 0.3, "fill": (1.0, 2.0, 3.0), "pairs": pairs}
    want, there = augment(images, keys, **options), images.to(CUDA)
    augment(there, keys, **options)  # constants are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = augment(there, keys, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (got.cpu() - want).abs()
    assert float(difference.median()) < 0.01 and float((difference > 1).float().mean()) < 1e-3
