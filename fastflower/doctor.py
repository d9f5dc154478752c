"""What this machine has and lacks for training: `python -m fastflower.doctor`, on any Python, installed or not.

Exit code 0: it can train. 4: it cannot yet, and the lines marked `lacks` say what to do.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fastflower.core import errors

ROOT = Path(__file__).resolve().parents[1]
SETUP = "make setup"
GB = 1 << 30


@dataclass(frozen=True)
class Line:
    """One finding. `ok` None: good to know, but training does not hang on it."""

    name: str
    ok: bool | None
    text: str
    advice: str = ""

    def __str__(self) -> str:
        mark = {True: "ok", False: "lacks", None: "-"}[self.ok]
        return f"{mark:<6} {self.name:<16} {self.text}" + (f"; {self.advice}" if self.advice else "")


def main(argv: list[str]) -> int:
    """Print one screen; 0 when this machine can train."""
    lines = examine()
    print("\n".join(map(str, lines)))
    lacking = [line.name for line in lines if line.ok is False]
    print("this machine cannot train yet: " + ", ".join(lacking) if lacking else "this machine can train")
    return 4 if lacking else 0


def examine() -> list[Line]:
    """Every finding, in the order in which one would mend them."""
    built = kernel()
    return [python(), *build_tools(built=built.ok is True), packages(), opencv_runtime(), built,
            *gpus(), cores(), memory(), disk(), weights(), photographs()]  # fmt: skip


def python() -> Line:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        return Line("Python", True, version)
    return Line(
        "Python", False, version, f"mosaicml, ffcv and torch resolve on 3.11 only; {SETUP} uses python3.11"
    )


def build_tools(*, built: bool) -> list[Line]:
    """What ffcv and the decode kernel are built with; no longer needed once they are."""
    wanted = None if built else False
    tools = (
        ("compiler", "g++", ["g++", "--version"], "compilers"),
        ("pkg-config", "pkg-config", ["pkg-config", "--version"], "pkg-config"),
        ("libjpeg", "libturbojpeg0-dev libjpeg-dev", ["pkg-config", "--modversion", "libturbojpeg"], "libjpeg-turbo"),
        ("OpenCV", "libopencv-dev", ["pkg-config", "--modversion", "opencv4"], "libopencv"),
    )  # fmt: skip
    lines = []
    for name, debian, command, conda in tools:
        said = output(command)
        advice = f"apt-get install {debian}, or conda's {conda}; {SETUP} does it"
        lines.append(
            Line(name, True, said.splitlines()[0]) if said else Line(name, wanted, "not found", advice)
        )
    return lines


def packages() -> Line:
    """The installed versions against the lock."""
    lock = ROOT / "requirements.lock"
    if not lock.is_file():
        return Line("packages", False, f"no {lock}", "take the repository whole")
    pinned = re.findall(r"^([\w.-]+)==([^\s\\]+)", lock.read_text(), flags=re.M)
    found = {name: (version(name), want) for name, want in pinned}
    wrong = {
        name: f"{name} {have or 'missing'} (lock: {want})"
        for name, (have, want) in found.items()
        if have != want
    }
    if not wrong:
        return Line("packages", True, f"{len(pinned)} as in requirements.lock")
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    tools = re.findall(r'"([\w-]+)[\[>=]', extras.partition("[tool.")[0])
    ok = None if set(wrong) <= set(tools) else False  # tests, lint and extras need those, training does not
    return Line(
        "packages", ok, f"{len(wrong)} of {len(pinned)} differ: {', '.join(list(wrong.values())[:2])}", SETUP
    )


def opencv_runtime() -> Line:
    """What OpenCV's wheel, which ffcv imports, loads from the system."""
    for name, debian in (("libGL.so.1", "libgl1"), ("libgthread-2.0.so.0", "libglib2.0-0")):
        if loading(name):
            return Line("OpenCV runtime", False, f"no {name}", f"apt-get install {debian}; {SETUP} does it")
    return Line("OpenCV runtime", True, "found")


def kernel() -> Line:
    built = sorted((ROOT / "fastflower/data").glob("_decode*.so"))
    source = ROOT / "fastflower/data/decode/decode.c"
    if not built:
        return Line("decode kernel", False, "not built", SETUP)
    if built[0].stat().st_mtime < source.stat().st_mtime:
        return Line("decode kernel", False, "older than decode.c", SETUP)
    if complaint := loading(str(built[0])):
        return Line("decode kernel", False, complaint, f"remove it and run {SETUP}")
    return Line("decode kernel", True, built[0].name)


def gpus() -> list[Line]:
    """Each GPU with its memory and driver, and whether torch can use them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    said = output(query)
    if not said:
        advice = "the CPU trains small networks; large ones need NVIDIA GPUs and their driver"
        return [Line("GPU", None, "none", advice)]
    lines = [Line("GPU", True, " ".join(row.split())) for row in said.splitlines()]
    usable = output([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"])
    if usable and int(usable) < len(lines):
        advice = (
            f"torch wants CUDA {output([sys.executable, '-c', 'import torch; print(torch.version.cuda)'])}"
        )
        lines.append(
            Line("GPUs in torch", False, f"{usable} of {len(lines)}", f"{advice}; update the driver")
        )
    return lines


def cores() -> Line:
    count = len(os.sched_getaffinity(0))
    return Line(
        "cores", True if count >= 2 else None, str(count), "" if count >= 2 else "two decode and train better"
    )


def memory() -> Line:
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.M))
    free, total = (int(fields[name]) * 1024 / GB for name in ("MemAvailable", "MemTotal"))
    return Line(
        "memory", free >= 2, f"{free:.1f} of {total:.1f} GB free", "" if free >= 2 else "training wants 2 GB"
    )


def disk() -> Line:
    free = shutil.disk_usage(Path.cwd()).free / GB
    return Line(
        "disk", free >= 2, f"{free:.0f} GB free here", "" if free >= 2 else "betons and checkpoints want 2 GB"
    )


def weights() -> Line:
    """Pretrained weights of the backbones that the recipes name."""
    folder = Path("results/model/pretrained_model")
    texts = [_with_bases(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    wanted = [name for text in texts if "pretrained: false" not in text
              for name in re.findall(r"^ *backbone: *(\S+)", text, flags=re.M)[:1]]  # fmt: skip
    absent = [name for name in wanted if not any(folder.glob(f"{name}*"))]
    if not absent:
        return Line("weights", True, f"{len(wanted)} in {folder}")
    return Line(
        "weights", None, f"{absent[0]} is not in {folder}", "put it there, or say model.pretrained=false"
    )


def _with_bases(recipe: Path) -> str:
    """A recipe's text before those of its bases; without a YAML library, which may not be installed."""
    text = recipe.read_text()
    base = re.search(r"^base: *(\S+)", text, flags=re.M)
    return text + _with_bases(recipe.parent / base[1]) if base else text


def photographs() -> Line:
    root, table = Path("data/train"), Path("data/train_labels.csv")
    if not (root.is_dir() and table.is_file()):
        advice = "or say data.root= and data.csv=; make demo needs neither"
        return Line("photographs", None, f"no {root} with {table}", advice)
    return Line("photographs", True, f"{sum(1 for _ in root.iterdir())} files in {root}")


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def loading(library: str) -> str:
    """Why a shared library does not load, or nothing."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""


def output(command: list[str]) -> str:
    """What a command prints, or nothing when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    errors.run(main)
