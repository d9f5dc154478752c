"""All checks that need a GPU, in one run of under ten minutes: `scripts/gpu_check.sh [names] [--device cpu]`.

Each check is a process with a time limit. The table of results is printed and written to
results/benchmarks/gpu_<name of the card>_<year and month>.md; exit code 1 when a check fails. With `--device cpu` the
checks that a CPU can answer run at small size, to see that the script itself works.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CARD_GIB = 22.5  # of a 24 GB card, less CUDA's context, NCCL and workspaces
RECIPE = (  # a short training of drawn flowers, in data/ of the working folder
    *("data.root=data/train", "data.csv=data/train_labels.csv", "data.split=ratio", "data.group=none"),
    *("model.pretrained=false", "train.world_size=1", "es.enabled=false", "log.tensorboard=false"),
    *("sched.warmup_epochs=0", "sched.cosine_epochs=2", "data.size_epochs=[1,2]", "train.batch_per_gpu=16"),
    *("data.img_size=[64,96]", "tta.scales=[96]", "robust.kinds=[blur]", "sampler.type=none"),
)
NETWORKS = ("convnextv2_atto", "resnet18", "vit_tiny_patch16_224")


@dataclass(frozen=True)
class Check:
    """A check: what it shows, its time limit, and whether a CPU can run it at small size."""

    shows: str
    seconds: int
    run: Callable[[str], str]
    on_cpu: bool = False


def train(*words: str, launcher: tuple[str, ...] = (), prelude: str = "", **environment: str) -> str:
    """Train drawn flowers with the recipe; returns the output. Raises AssertionError with its end if it fails."""
    start = "from fastflower import train\nfrom fastflower.core import errors\nerrors.run_command(train.main)"
    Path("run.py").write_text(f"{prelude}\n{start}\n")
    command = [sys.executable, *launcher, "run.py", *RECIPE, *words]
    environment = {**os.environ, "PYTHONPATH": str(REPO), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}"
    return done.stdout


def draw_and_convert(count: int = 200) -> None:
    """Draw labelled flowers of five species into data/ and convert them."""
    import csv

    from fastflower import convert
    from fastflower.data.samples import flowers

    Path("data/train").mkdir(parents=True, exist_ok=True)
    with open("data/train_labels.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("filename", "category_id"))
        for i in range(count):
            flowers.draw(i % 5, 0, i).save(f"data/train/{i}.jpg", quality=90)
            rows.writerow((f"{i}.jpg", i % 5))
    convert.main([*RECIPE, "data.img_size=[224,320]", "tta.scales=[320]"])


def tensors(exp: str) -> dict:
    """The weights of an experiment's `last` checkpoint."""
    from fastflower.core import checkpoint

    path = max(Path("results/model", exp).glob("last__*.pth"), key=lambda path: path.stat().st_mtime)
    return dict(checkpoint.load(path).tensors)


def largest_difference(first: str, second: str) -> float:
    """The largest difference between the weights of two experiments."""
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def suite(device: str) -> str:
    """The tests marked gpu, without whole trainings, of which the checks below give figures (`make test-gpu`: all)."""
    trainings = "--ignore=tests/training/test_cuda_trainings.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", trainings, "-q", "-p", "no:cacheprovider"],
        cwd=REPO, capture_output=True, text=True,
    )  # fmt: skip
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-1500:]
    return summary


def memory(device: str) -> str:
    """The default recipe from scratch on as much memory as a 24 GB card leaves."""
    prelude = (
        "import torch\n"
        "total = torch.cuda.get_device_properties(0).total_memory\n"
        f"torch.cuda.set_per_process_memory_fraction(min(1.0, {CARD_GIB} * 2**30 / total))"
    )
    words = ["model.backbone=convnextv2_base", "data.img_size=[224,320]", "tta.scales=[320]"]
    output = train(*words, "train.batch_per_gpu=64", "exp.name=memory", prelude=prelude)
    (note,) = re.findall(r"note: (memory of .*)", output)
    return str(note)


def speed(device: str) -> str:
    """Images per second with and without deterministic kernels, and with checkpointing."""
    size = ("data.img_size=320", "data.size_epochs=auto", "tta.scales=[320]", "train.batch_per_gpu=32")
    figures = []
    for name, words in {
        "deterministic": ("cudnn.deterministic=true",),
        "free": ("cudnn.deterministic=false",),
        "checkpointing": ("model.grad_checkpointing=true",),
    }.items():
        backbone = "model.backbone=convnextv2_base"
        train(backbone, *size, *words, f"exp.name={name}")
        figures.append(f"{name} {epoch_row(name)['images_per_s']:.0f}/s")
    return ", ".join(figures)


def epoch_row(exp: str) -> dict:
    """The last epoch's row of an experiment's events."""
    from fastflower.core import runs

    (path,) = Path("results/results", exp).glob("**/events*.jsonl")
    return [row for row in runs.read_events(path, []) if row["event"] == "epoch"][-1]


def repeat(device: str) -> str:
    """Two trainings with one seed end in the same bits."""
    figures = []
    for backbone in NETWORKS[: 1 if device == "cpu" else None]:
        for turn in (1, 2):
            train(f"model.backbone={backbone}", f"exp.name={backbone}{turn}")
        figures.append(f"{backbone} {largest_difference(backbone + '1', backbone + '2'):.1e}")
    assert figures[0].endswith("0.0e+00"), figures
    return "largest difference " + ", ".join(figures)


def resume(device: str) -> str:
    """A training killed between two steps and started again ends in the bits of one that was not."""
    words = (f"model.backbone={NETWORKS[0]}", "train.save_every=2ba")
    kill = (
        "import os\n"
        "from fastflower.callbacks.recorder import Recorder\n"
        "end = Recorder.batch_end\n"
        "def batch_end(self, state, logger):\n"
        "    end(self, state, logger)\n"
        "    if state.timestamp.batch.value == 5: os.kill(os.getpid(), 9)\n"
        "Recorder.batch_end = batch_end"
    )
    train(*words, "exp.name=whole")
    try:
        train(*words, "exp.name=killed", prelude=kill)
    except AssertionError as error:
        assert "exit code -9" in str(error), error
    train(*words, "exp.name=killed")
    difference = largest_difference("whole", "killed")
    assert difference == 0, f"largest difference {difference:.1e}"
    return "equal to the bit"


def two_ranks(device: str) -> str:
    """FixMatch, synchronised norms, SWA and EMA on two ranks that share the device, over gloo."""
    prelude = (
        "import os\nos.environ['LOCAL_RANK'] = '0'\n"
        "import composer.devices.device_gpu as gpu\ngpu.DeviceGPU.dist_backend = 'gloo'"
        if device == "cuda"
        else ""
    )
    launcher = ("-m", "composer.cli", "-n", "2")
    words = ("model.backbone=resnet10t", "swa.enabled=true", "train.world_size=2", "exp.name=two")
    semi = ("semi.enabled=true", "data.labels_per_class=10", "semi.mu=2", "train.batch_per_gpu=8")
    train(*words, *semi, launcher=launcher, prelude=prelude)
    return f"score {epoch_row('two')['score']:.3f} after two epochs"


def nccl(device: str) -> str:
    """The collectives that training uses, over NCCL."""
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    for dtype in (torch.float32, torch.float64, torch.int64, torch.uint8):
        values = torch.ones(4, dtype=dtype, device=device)
        dist.all_reduce(values)
        dist.broadcast(values, 0)
        dist.all_reduce(values, dist.ReduceOp.MAX)
    gathered: list[object] = [None]
    dist.all_gather_object(gathered, {"rank": 0})
    dist.destroy_process_group()
    return f"sums, maxima, broadcasts and objects over {'NCCL' if device == 'cuda' else 'gloo'}"


def half(device: str) -> str:
    """fp16 from a scale that overflows: skipped steps are counted, and training goes on."""
    prelude = (
        "import torch\ntorch.cuda.is_bf16_supported = lambda *a, **k: False\n"
        "import composer.core.state, torch.amp\n"
        "old = torch.amp.GradScaler.__init__\n"
        "def init(self, device='cuda', init_scale=2.0**30, **k): old(self, device, 2.0**30, **k)\n"
        "torch.amp.GradScaler.__init__ = init"
    )
    train("model.backbone=resnet18", "exp.name=half", prelude=prelude)
    return f"loss {epoch_row('half')['train_loss']:.3f}"


def compiled(device: str) -> str:
    """torch.compile with the fused optimizer at two sizes."""
    train("model.backbone=test_resnet", "train.compile=true", "exp.name=compiled")
    return f"{epoch_row('compiled')['images_per_s']:.0f} images/s"


def hand_in(device: str) -> str:
    """Evaluate, export with its gates, and the predictor in half precision."""
    train(f"model.backbone={NETWORKS[0]}", "exp.name=handin")
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    words = [
        *RECIPE,
        f"model.backbone={NETWORKS[0]}",
        "exp.name=handin",
        "bundle.max_ms=1000",
        "data.test=data/train",
    ]
    for command in ("evaluate", "export"):
        done = subprocess.run(
            [sys.executable, "-m", f"fastflower.{command}", *words],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    done = subprocess.run(
        [sys.executable, REPO / "code/predict.py", "data/train", "out.csv", "--bundle", "results/model/bundle"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    (line,) = re.findall(r"predict: (\d+ photographs, .*)", done.stdout + done.stderr)[:1]
    return str(line)


def augmentation(device: str) -> str:
    """Augmentation on the device against the CPU, and no wait for the device."""
    import numpy as np
    import torch

    from fastflower.core import seeding
    from fastflower.data.transforms.augment import augment
    from fastflower.recipe.schema import Aug

    rows = np.arange(64)
    keys = torch.from_numpy(seeding.row_keys(1, 0, positions=rows, rows=rows).view(np.int64))
    images = torch.randint(0, 256, (64, 96, 96, 3), dtype=torch.uint8)
    everything = Aug(photometric_p=0.5, clahe_p=0.5, randaugment_n=2, augmix_p=0.5, corrupt_p=0.5)
    figures = []
    for name, aug in {"default": Aug(), "everything": everything}.items():
        host, fill = augment(images, keys, aug=aug, erase_p=0.3, fill=(1, 2, 3)), torch.ones(3, device=device)
        on_device = images.to(device)
        augment(on_device, keys, aug=aug, erase_p=0.3, fill=(1, 2, 3))  # constants are copied once
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        out = augment(on_device, keys, aug=aug, erase_p=0.3, fill=(1, 2, 3))
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        del fill
        difference = (out.cpu() - host).abs()
        figures.append(
            f"{name} at most {float(difference.max()):.3f}, median {float(difference.median()):.1e}"
        )
    return "difference of grey levels: " + "; ".join(figures)


def stopped(device: str) -> str:
    """SIGTERM during the training of a large network: seconds until its state is saved."""
    backbone = "convnextv2_base" if device == "cuda" else "test_resnet"
    words = [*RECIPE, f"model.backbone={backbone}", "sched.cosine_epochs=200", "data.size_epochs=auto"]
    words += ["data.img_size=64", "tta.scales=[64]", "exp.name=stopped"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastflower.train", *words], env={**os.environ, "PYTHONPATH": str(REPO)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    events = Path("results/results/stopped")
    while not any('"epoch"' in path.read_text() for path in events.glob("**/events*.jsonl")):
        assert process.poll() is None, process.communicate()[0][-1500:]
        time.sleep(0.2)
    start = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    assert process.returncode == 75, f"exit code {process.returncode}: {output[-1500:]}"
    assert tensors("stopped")
    return f"{seconds:.1f} s to a whole checkpoint, exit code 75"


CHECKS = {
    "suite": Check("tests marked gpu", 150, suite),
    "memory": Check(f"the default recipe, 224 then 320, in {CARD_GIB} GiB", 100, memory),
    "speed": Check("ConvNeXtV2-Base at 320, one process", 120, speed),
    "repeat": Check("equal seeds give equal bits", 120, repeat, on_cpu=True),
    "resume": Check("a killed training resumes exactly", 90, resume, on_cpu=True),
    "two_ranks": Check("two ranks: FixMatch, SyncBatchNorm, SWA, EMA", 90, two_ranks, on_cpu=True),
    "nccl": Check("collectives", 40, nccl, on_cpu=True),
    "half": Check("fp16 from an overflowing scale", 60, half),
    "compiled": Check("torch.compile", 90, compiled),
    "hand_in": Check("evaluate, export, predict", 120, hand_in, on_cpu=True),
    "augmentation": Check("augmentation on the device", 40, augmentation, on_cpu=True),
    "stopped": Check("SIGTERM", 60, stopped, on_cpu=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"checks: {', '.join(CHECKS)}; default: all")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # run one check in this process
    args = parser.parse_args()
    if args.inside:
        print(CHECKS[args.inside].run(args.device))
        return 0
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device; --device cpu tries the script itself", file=sys.stderr)
        return 4
    unknown = set(args.names) - set(CHECKS)
    if unknown:
        parser.error(f"unknown checks {', '.join(sorted(unknown))}; choose from {', '.join(CHECKS)}")
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    names = [n for n in args.names or CHECKS if args.device == "cuda" or CHECKS[n].on_cpu]
    lines = [f"# Checks on {card}, torch {torch.__version__}, {datetime.date.today()}", ""]
    lines += ["| check | result | figure | seconds |", "| --- | --- | --- | --- |"]
    failed = False
    with tempfile.TemporaryDirectory(prefix="fastflower-gpu-") as work:
        os.chdir(work)
        sys.path.insert(0, str(REPO))
        draw_and_convert(200 if args.device == "cuda" else 60)
        for name in names:
            passed, figure, seconds = run_one(name, args.device)
            failed |= not passed
            lines.append(
                f"| {CHECKS[name].shows} | {'passed' if passed else 'FAILED'} | {figure} | {seconds:.0f} |"
            )
            print(lines[-1], flush=True)
    path = (
        REPO
        / "results/benchmarks"
        / f"gpu_{re.sub(r'[^A-Za-z0-9]+', '-', card)}_{datetime.date.today():%Y%m}.md"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    print(f"\ntable in {path.relative_to(REPO)}")
    return int(failed)


def run_one(name: str, device: str) -> tuple[bool, str, float]:
    """Run a check in a process of its own: passed, its figure or the reason, seconds."""
    command = [sys.executable, __file__, "--inside", name, "--device", device]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=CHECKS[name].seconds * (1 + 3 * (device == "cpu")),
        )
    except subprocess.TimeoutExpired:
        return False, f"no end within {CHECKS[name].seconds} s", time.perf_counter() - start
    text = done.stdout.strip() if done.returncode == 0 else (done.stderr.strip() or done.stdout.strip())
    last = text.splitlines()[-1] if text else f"exit code {done.returncode}"
    if done.returncode:
        print(text[-3000:], file=sys.stderr)
    return done.returncode == 0, last.replace("|", "/"), time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
