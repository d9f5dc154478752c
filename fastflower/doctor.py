"""Check this machine for training: `python -m fastflower.doctor`, on any Python, before or after installation.

With a recipe or an experiment, and changes as key=value, it also looks for that training's photographs, labels,
betons and weights, and the verdict is about it. Exit code 0: the machine can train. 4: it cannot yet; the lines marked
`lacks` name the fix.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastflower.core import cards, console, errors, processor

if TYPE_CHECKING:  # before installation doctor must import nothing that needs a package
    from fastflower.data.labels import LabelTable
    from fastflower.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
NEWER = Path(sys.prefix).name == ".venv-next"  # the environment with a newer torch
SETUP = "make setup NEXT=1" if NEWER else "make setup"
LOCK = "requirements-next.lock" if NEWER else "requirements.lock"
PYTHONS = ((3, 11), (3, 12)) if NEWER else ((3, 11),)
GB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """Result of one check; `ok` is None for information that training does not depend on."""

    name: str
    ok: bool | None
    text: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {True: "ok", False: "lacks", None: "-"}[self.ok]
        return f"{mark:<6} {self.name:<16} {self.text}" + (f"; {self.advice}" if self.advice else "")


def main(argv: list[str]) -> int:
    """Print the findings; returns 0 when this machine can train, else 4."""
    findings = machine()
    if not argv:
        findings += [weights(), photographs()]
    elif not any(finding.ok is False for finding in findings):
        findings += training(argv)
    print("\n".join(map(str, findings)))
    missing = [finding.name for finding in findings if finding.ok is False]
    what = f"train {' '.join(argv)}" if argv else "train"
    print(f"this machine cannot {what} yet: {', '.join(missing)}" if missing else f"this machine can {what}")
    print_next(argv, findings)
    return 4 if missing else 0


def print_next(argv: list[str], findings: list[Finding]) -> None:
    """Print the next command: the setup where it is the fix, convert before a training, else the training.

    Without a recipe, doctor again with one where there are photographs, else the demo. Nothing while something else is
    missing: its line has the advice.
    """
    missing = [finding for finding in findings if finding.ok is False]
    found = {finding.name: finding.ok for finding in findings}
    if any(SETUP in finding.advice for finding in missing):
        console.print_next_line(SETUP)
    elif missing:
        return
    elif not argv:
        photographs = found.get("photographs") is True
        console.print_next(*(("doctor", ["recipes/finetune.yaml"]) if photographs else ("demo", [])))
    else:
        console.print_next("train" if found.get("betons") else "convert", argv)


def machine() -> list[Finding]:
    """The findings about the machine, in the order in which to fix them."""
    decoder = kernel()
    return [python(), *build_tools(built=decoder.ok is True), packages(), opencv_runtime(), decoder,
            *gpus(), cores(), memory(), disk()]  # fmt: skip


def training(argv: list[str]) -> list[Finding]:
    """The findings about one training; raises InputError when its recipe cannot be read or contradicts itself."""
    from fastflower.core.console import spelled
    from fastflower.data.betons.fold_set import check_converted
    from fastflower.data.labels import read_labels
    from fastflower.model.pretrained import check_architecture, check_present
    from fastflower.recipe import checks, derived, parse_command

    recipe = parse_command(argv)
    advice = checks.check(recipe)
    numbers = derived.derive(recipe, recipe.train.world_size)
    stages = ", ".join(f"{stage.height} x {stage.width}" for stage in numbers.stages)
    text = f"{recipe.exp.name}: {recipe.model.backbone}, {numbers.epochs} epochs at {stages}"
    findings = [Finding("recipe", True, text), *(Finding("advice", None, line) for line in advice)]

    def labels() -> str:
        return _counts(read_labels(recipe))

    def betons() -> str:
        check_converted(recipe)
        return f"complete in {recipe.data.home}/betons"

    def weights() -> str:
        check_architecture(recipe.model.backbone)
        check_present(recipe)
        return _start(recipe)

    findings += [_asked(labels), _asked(weights), gpu_memory(recipe)]
    if (Path(recipe.data.home) / "folds.csv").exists():
        return [*findings, _asked(betons)]
    return [*findings, Finding("betons", None, "not converted yet", advice=spelled("convert", argv))]


def _asked(question: Callable[[], str]) -> Finding:
    """The answer of a function, or the reason with which it refuses, under the function's name."""
    try:
        return Finding(question.__name__, True, question())
    except errors.InputError as error:
        return Finding(question.__name__, False, str(error))


def gpu_memory(recipe: Recipe) -> Finding:
    """The estimated memory of a training against this machine's GPUs; information where there are none."""
    from fastflower.training import estimate

    try:
        need = estimate.estimate(recipe, total=estimate.card())
    except errors.InputError as error:
        return Finding("GPU memory", None, str(error))
    return Finding("GPU memory", need.fits if need.total else None, str(need), advice=need.advice)


def _counts(table: LabelTable) -> str:
    counts = Counter(table.category_ids)
    each = f"{min(counts.values())} to {max(counts.values())} each"
    return f"{len(table.filenames)} images of {len(counts)} classes, {each}"


def _start(recipe: Recipe) -> str:
    if recipe.model.init:
        return f"from {recipe.model.init}"
    return f"of {recipe.model.backbone}" if recipe.model.pretrained else "random (model.pretrained=false)"


def python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] in PYTHONS:
        return Finding("Python", True, version)
    return Finding(
        "Python",
        False,
        text=version,
        advice="mosaicml and torch resolve on 3.11 only; make setup uses python3.11, make setup NEXT=1 also python3.12",
    )


def build_tools(*, built: bool) -> list[Finding]:
    """Tools that build ffcv and the decode kernel; optional once these are built."""
    ok_if_missing = None if built else False
    tools = (
        ("compiler", "g++", ["g++", "--version"], "compilers"),
        ("pkg-config", "pkg-config", ["pkg-config", "--version"], "pkg-config"),
        ("libjpeg", "libturbojpeg0-dev libjpeg-dev", ["pkg-config", "--modversion", "libturbojpeg"], "libjpeg-turbo"),
        ("OpenCV", "libopencv-dev", ["pkg-config", "--modversion", "opencv4"], "libopencv"),
    )  # fmt: skip
    findings = []
    for name, debian, command, conda in tools:
        version_text = stdout_of(command)
        advice = f"apt-get install {debian}, or conda's {conda}; {SETUP} does it"
        if version_text:
            findings.append(Finding(name, True, version_text.splitlines()[0]))
        else:
            findings.append(Finding(name, ok_if_missing, text="not found", advice=advice))
    return findings


def packages() -> Finding:
    """Installed versions against the lock of this environment."""
    lock = ROOT / LOCK
    if not lock.is_file():
        return Finding("packages", False, text=f"no {lock}", advice="use a complete copy of the repository")
    pinned = re.findall(r"^([\w.-]+)==([^\s\\]+)", lock.read_text(), flags=re.M)
    differences = {
        name: f"{name} {installed or 'missing'} (lock: {locked})"
        for name, locked in pinned
        if (installed := version(name)) != locked
    }
    if not differences:
        return Finding("packages", True, f"{len(pinned)} as in {lock.name}")
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    tools = re.findall(r'"([\w-]+)[\[>=]', extras.partition("[tool.")[0])
    ok = None if set(differences) <= set(tools) else False  # training does not need tools and extras
    return Finding(
        "packages",
        ok,
        text=f"{len(differences)} of {len(pinned)} differ: {', '.join(list(differences.values())[:2])}",
        advice=SETUP,
    )


def opencv_runtime() -> Finding:
    """System libraries that OpenCV's wheel loads, which ffcv imports."""
    for name, debian in (("libGL.so.1", "libgl1"), ("libgthread-2.0.so.0", "libglib2.0-0")):
        if load_error(name):
            return Finding(
                "OpenCV runtime",
                False,
                text=f"no {name}",
                advice=f"apt-get install {debian}; {SETUP} does it",
            )
    return Finding("OpenCV runtime", True, "found")


def kernel() -> Finding:
    built = sorted((ROOT / "fastflower/data/decode").glob("_decode*.so"))
    source = ROOT / "fastflower/data/decode/decode.c"
    if not built:
        return Finding("decode kernel", False, text="not built", advice=SETUP)
    if built[0].stat().st_mtime < source.stat().st_mtime:
        return Finding("decode kernel", False, text="older than decode.c", advice=SETUP)
    if error := load_error(str(built[0])):
        return Finding("decode kernel", False, text=error, advice=f"remove it and run {SETUP}")
    return Finding("decode kernel", True, built[0].name)


def gpus() -> list[Finding]:
    """Each GPU with its memory and driver, and a finding when torch cannot use all of them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    table = stdout_of(query)
    if not table:
        advice = "the CPU trains small networks; large ones need NVIDIA GPUs and their driver"
        return [Finding("GPU", None, text="none", advice=advice)]
    findings = [Finding("GPU", True, " ".join(row.split())) for row in table.splitlines()]
    findings += _without_kernels()
    usable = stdout_of([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"])
    if usable and int(usable) < len(table.splitlines()):
        cuda = stdout_of([sys.executable, "-c", "import torch; print(torch.version.cuda)"])
        findings.append(
            Finding(
                "GPUs in torch",
                False,
                text=f"{usable} of {len(table.splitlines())}",
                advice=f"torch needs CUDA {cuda}; update the driver",
            )
        )
    return findings


def _without_kernels() -> list[Finding]:
    """A finding for each kind of GPU that the installed torch was not compiled for."""
    cards_here = stdout_of(["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"])
    built_for = stdout_of(
        [sys.executable, "-c", "import torch; print(torch._C._cuda_getArchFlags() or '')"]
    ).split()
    findings = []
    for row in dict.fromkeys(cards_here.splitlines()):
        name, _, number = row.rpartition(",")
        found = re.fullmatch(r"(\d+)\.(\d+)", number.strip())
        card = (int(found[1]), int(found[2])) if found else None  # old drivers do not know the question
        if card and not cards.has_kernels(card, built_for):
            findings.append(
                Finding("GPU in torch", False, text=f"{name.strip()} {cards.lack(card, built_for)}")
            )
    return findings


def cores() -> Finding:
    count = len(os.sched_getaffinity(0))
    bf16 = ", with bf16 instructions (train.amp)" if processor.multiplies_bf16() else ""
    return Finding(
        "cores",
        True if count >= 2 else None,
        text=f"{count}{bf16}",
        advice="" if count >= 2 else "decoding and training are faster on two or more",
    )


def memory() -> Finding:
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.M))
    free, total = (int(fields[name]) * 1024 / GB for name in ("MemAvailable", "MemTotal"))
    return Finding(
        "memory",
        free >= 2,
        text=f"{free:.1f} of {total:.1f} GB free",
        advice="" if free >= 2 else "training needs 2 GB",
    )


def disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / GB
    return Finding(
        "disk",
        free >= 2,
        text=f"{free:.0f} GB free in {Path.cwd()}",
        advice="" if free >= 2 else "betons and checkpoints need 2 GB",
    )


def weights() -> Finding:
    """Pretrained weights of the backbones in the recipes."""
    folder = Path("results/model/pretrained_model")
    texts = [_with_bases(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    backbones = [name for text in texts if "pretrained: false" not in text
                 for name in re.findall(r"^ *backbone: *(\S+)", text, flags=re.M)[:1]]  # fmt: skip
    absent = [name for name in backbones if not any(folder.glob(f"{name}*"))]
    if not absent:
        return Finding("weights", True, f"{len(backbones)} in {folder}")
    return Finding(
        "weights",
        None,
        text=f"{absent[0]} is not in {folder}",
        advice=f"python -m fastflower.weights {absent[0]} fetches it; or set model.pretrained=false",
    )


def _with_bases(recipe: Path) -> str:
    """Text of a recipe followed by its bases; read without a YAML library, which may not be installed."""
    text = recipe.read_text()
    base = re.search(r"^base: *(\S+)", text, flags=re.M)
    return text + _with_bases(recipe.parent / base[1]) if base else text


def photographs() -> Finding:
    root, labels = Path("data/train"), Path("data/train_labels.csv")
    if not (root.is_dir() and labels.is_file()):
        advice = "add them, or set data.root= and data.csv=; make demo needs neither"
        return Finding("photographs", None, text=f"no {root} with {labels}", advice=advice)
    count = sum(1 for _ in root.iterdir())
    if not count:
        return Finding("photographs", None, f"no file in {root}", advice="put the training images there")
    return Finding("photographs", True, f"{count} files in {root}")


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def load_error(library: str) -> str:
    """Error message of loading a shared library, or "" when it loads."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""


def stdout_of(command: list[str]) -> str:
    """Standard output of a command, or "" when it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


if __name__ == "__main__":
    errors.run_command(main)
