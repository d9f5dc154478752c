"""`bench kills`: kills every command at random moments, repeats it, and compares all files with an undisturbed run.

Commands and the trainings of campaigns are forked from a process that has imported everything, so that an attempt costs
the work alone; the predictor and what Ray starts are fresh processes. Each is killed with SIGKILL, alone and not with
its children, at moments drawn over its undisturbed duration, and the forked ones also at random changes of a file (a
file opened for writing, a rename, a removal, a folder), which a moment rarely meets. The command is repeated at once.
Its exit code and the final bytes of all files, times aside, must be those of the undisturbed run; a temporary file, a
lock or a process that remains is a fault. The exit code is 1 when there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from fastflower.bench import final_content, forked, tiny_project
from fastflower.core import errors
from fastflower.core.errors import InputError

COLUMNS = ("seconds", "changes", "killed", "ended first", "differs", "left over", "orphans", "fails", "hangs")
FAULTS = COLUMNS[4:]
BOUND, SLOWER = 180.0, 5  # seconds that a command may take, or as many times what it takes undisturbed
ORPHAN_BOUND = 60.0  # seconds after which a child of a killed command must have ended
PR_SET_CHILD_SUBREAPER = 36  # of prctl(2): orphans become children of this process, which can then see them
CODE = Path(__file__).resolve().parents[2] / "code"
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
WARM = (  # libraries that commands import inside their functions
    *("composer", "lightgbm", "matplotlib.pyplot", "optuna", "safetensors.torch", "scipy.stats", "timm"),
    *("sklearn.linear_model", "sklearn.isotonic", "torch.utils.tensorboard", "PIL.JpegImagePlugin"),
)
WEIGHTS = "downloaded.pth"


class Victim(NamedTuple):
    """A command to kill: its module and arguments, the state of the project before it, and whether it starts cold.

    A command `after` another one starts from the project that this one left. Those of an `extra` package are killed
    where that is installed.
    """

    name: str
    command: str
    arguments: tuple[str, ...]
    after: str = ""
    cold: bool = False
    extra: str = ""


_RECIPE = tiny_project.RECIPE_FILE
_SHORT = "robust.enabled=false"
_FOLDS = ("exp.name=grid", "data.fold=all", _SHORT)
_SEARCH = (
    "exp.name=search",
    "data.fold=0",
    _SHORT,
    "opt.lr=log:1e-4..1e-2",
    "aug.hflip_p=0..0.5",
    "--trials",
    "2",
)
VICTIMS = (
    Victim("sample_data", "sample_data", ("food", "rows=22", "unlabelled=22", "held_out=22")),
    Victim("convert", "convert", (_RECIPE, "data.workers=2")),
    Victim("lrfind", "lrfind", (_RECIPE,), "convert"),
    Victim("train", "train", (_RECIPE,), "convert"),
    Victim("evaluate", "evaluate", (_RECIPE,), "train"),
    Victim("ensemble", "ensemble", (_RECIPE, "--save"), "evaluate"),
    Victim("soup", "ensemble", (_RECIPE, "ensembling.soup=folds"), "evaluate"),
    Victim("export", "export", (_RECIPE, "--zip", "hand_in.zip"), "ensemble"),
    Victim("report", "report.__main__", (tiny_project.EXP,), "export"),
    Victim("weights", "weights", (tiny_project.BACKBONE, WEIGHTS, "--replace")),
    Victim("predict", "", ("test_dataset", "out/submission.csv"), "export", cold=True),
    *(
        Victim(name + ending, "campaign.__main__", (_RECIPE, *words, *option), "convert", extra=extra)
        for ending, option, extra in (("", (), ""), (" --ray", ("--ray",), "ray"))
        for name, words in (("campaign", _FOLDS), ("search", _SEARCH))
    ),
)  # fmt: skip


class Kill(NamedTuple):
    """The time of a kill: seconds after the start, or before a change of a file."""

    seconds: float = 0.0
    change: int = 0


class Ended(NamedTuple):
    """The end of a process: exit code (minus a signal's number), seconds, and the changes of files that it made."""

    code: int
    seconds: float
    changes: int


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m fastflower.bench kills", description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=20, help="kills of each command at a random moment")
    parser.add_argument("--changes", type=int, default=20, help="kills of each at a random change of a file")
    parser.add_argument("--cold-moments", type=int, help="the same for commands that start cold (--moments)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="names of commands", metavar="NAME")
    parser.add_argument("--out", type=Path, help="also write the table to a Markdown file")
    args = parser.parse_args(argv)
    names = [victim.name for victim in VICTIMS]
    if unknown := [name for name in args.only if name not in names]:
        raise InputError(f"--only {unknown[0]}: no such command; choose from {', '.join(names)}")
    if min(args.moments, args.changes, args.cold_moments or 0) < 0:
        raise InputError("--moments, --changes and --cold-moments must be 0 or more")
    out = args.out.absolute() if args.out else None
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    with tempfile.TemporaryDirectory(prefix="fastflower-kills-") as home:
        bench = Kills(Path(home), seed=args.seed)
        say(f"| command | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
        total: Counter[str] = Counter()
        for victim in VICTIMS:
            if victim.name in args.only or (not args.only and _installed(victim.extra)):
                cold = args.moments if args.cold_moments is None else args.cold_moments
                counts = bench.attack(
                    victim, cold if victim.cold else args.moments, 0 if victim.cold else args.changes
                )
                say(f"| {victim.name} | {' | '.join(_cell(name, counts) for name in COLUMNS)} |")
                total.update({name: counts[name] for name in COLUMNS[2:]})
    faults = sum(total[name] for name in FAULTS)
    say(
        f"\n{total['killed'] + total['ended first']} attempts, seed {args.seed}: {total['killed']} kills before the "
        f"command's end, {total['ended first']} after it; {faults} faults"
    )
    if out:
        from fastflower.core.files import write_atomic

        write_atomic(out, "\n".join(lines) + "\n")
    return int(faults > 0)


def _installed(package: str) -> bool:
    return not package or importlib.util.find_spec(package) is not None


def _cell(name: str, counts: dict[str, Any]) -> str:
    return f"{counts[name]:.1f}" if name == "seconds" else str(counts[name])


class Kills:
    """Kills commands in a copy of a tiny project below `home`.

    All attempts have the same path, because some files hold it. `states` are the projects that undisturbed commands
    left, by the command's name. Without `warm`, a forked command imports what is missing by itself.
    """

    def __init__(self, home: Path, *, seed: int, warm: bool = True) -> None:
        self.home, self.seed = home, seed
        self.work, self.temporary, self.said = home / "project", home / "tmp", home / "said.txt"
        self.states: dict[str, Path] = {"": home / "state-drawn"}
        self.undisturbed: dict[str, Ended] = {}
        self.own_children = set(forked.children())
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        tiny_project.draw(self.states[""])
        if warm:
            _import_everything()
            _draw_weights(self.states[""] / WEIGHTS)

    def attack(self, victim: Victim, moments: int, changes: int) -> dict[str, Any]:
        """Kill and repeat a command; the number of each outcome."""
        self.state(victim)
        ended = self.undisturbed[victim.name]
        expected = _contents(victim, self.states[victim.name])
        self._run_undisturbed(victim)
        counts: Counter[str] = Counter(dict.fromkeys(COLUMNS[2:], 0))
        if unstable := final_content.differences(expected, _contents(victim, self.work)):
            self._blame(
                victim,
                "two undisturbed runs",
                text=f"differ in {', '.join(unstable[:5])}",
                counts=counts,
                kind="differs",
            )
        draw = random.Random(f"{self.seed}/{victim.name}")
        kills = [Kill(seconds=draw.uniform(0, ended.seconds)) for _ in range(moments)]
        kills += [Kill(change=draw.randint(1, max(ended.changes, 1))) for _ in range(changes)]
        for kill in kills:
            self._attempt(victim, kill, expected=expected, counts=counts)
        return {"seconds": ended.seconds, "changes": ended.changes, **counts}

    def state(self, victim: Victim) -> Path:
        """The project that an undisturbed run of a command left, which is run the first time."""
        if victim.name not in self.states:
            self.undisturbed[victim.name] = self._run_undisturbed(victim)
            self.states[victim.name] = Path(shutil.copytree(self.work, self.home / f"state-{victim.name}"))
        return self.states[victim.name]

    def _run_undisturbed(self, victim: Victim) -> Ended:
        self._lay_out(victim)
        ended = self._run(victim)
        if ended.code:
            raise InputError(f"the undisturbed {victim.name} exits with {ended.code}: {self._last_words()}")
        return ended

    def _lay_out(self, victim: Victim) -> None:
        """Put the project before a command in place, with an empty folder of temporary files."""
        before = next((other for other in VICTIMS if other.name == victim.after), None)
        source = self.state(before) if before else self.states[""]
        for folder in (self.work, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, self.work)
        self.temporary.mkdir()
        self.said.unlink(missing_ok=True)

    def _attempt(self, victim: Victim, kill: Kill, *, expected: dict[str, str], counts: Counter[str]) -> None:
        self._lay_out(victim)
        killed = self._run(victim, kill)
        counts["killed" if killed.code == -signal.SIGKILL else "ended first"] += 1
        repeated = self._run(victim)
        when = f"{kill.seconds:.2f} s" if not kill.change else f"change {kill.change}"
        if orphans := forked.end_children(self.own_children, ORPHAN_BOUND):
            self._blame(victim, when, text=f"{orphans} processes outlive it", counts=counts, kind="orphans")
        if repeated.code:
            kind = "hangs" if repeated.seconds > self._bound(victim) else "fails"
            self._blame(
                victim,
                when,
                text=f"repeated, exits with {repeated.code}: {self._last_words()}",
                counts=counts,
                kind=kind,
            )
            return
        left = final_content.leftovers(self.work) + [
            f"$TMPDIR/{path.name}" for path in self.temporary.iterdir() if not _of_a_library(path)
        ]
        if left:
            self._blame(
                victim, when, text=f"left over: {', '.join(left[:5])}", counts=counts, kind="left over"
            )
        different = [
            name
            for name in final_content.differences(expected, _contents(victim, self.work))
            if not any(name.startswith(path) for path in left)
        ]
        if different:
            self._blame(
                victim, when, text=f"differs in {', '.join(different[:5])}", counts=counts, kind="differs"
            )

    def _blame(self, victim: Victim, when: str, *, text: str, counts: Counter[str], kind: str) -> None:
        counts[kind] += 1
        print(f"{victim.name}, {when}: {text}", file=sys.stderr, flush=True)

    def _last_words(self) -> str:
        text = self.said.read_text(encoding="utf-8", errors="replace") if self.said.exists() else ""
        return errors.one_line(" / ".join(text.strip().splitlines()[-3:]))[-600:]

    def _run(self, victim: Victim, kill: Kill | None = None) -> Ended:
        """Run a command to its end or its kill."""
        note = self.home / "changes"
        note.unlink(missing_ok=True)
        start = time.monotonic()
        process = self._spawn(victim) if victim.cold else self._fork(victim, kill.change if kill else 0, note)
        deadline = start + (kill.seconds if kill and kill.seconds else self._bound(victim))
        code = None
        while (code := forked.exit_code(process)) is None and time.monotonic() < deadline:
            time.sleep(0.002)
        seconds = time.monotonic() - start
        if code is None:
            os.kill(process, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        counted = note.read_text() if note.exists() else ""
        return Ended(code, seconds, int(counted or 0))  # empty where the kill met the writing of it

    def _bound(self, victim: Victim) -> float:
        undisturbed = self.undisturbed.get(victim.name)
        return max(BOUND, SLOWER * undisturbed.seconds if undisturbed else 0.0)

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(CODE.parent),
            "RAY_TMPDIR": str(self.home),
        }

    def _spawn(self, victim: Victim) -> int:
        """Start a command as a fresh process; returns its id."""
        words = ["-m", f"fastflower.{victim.command}"] if victim.command else [str(CODE / "predict.py")]
        with open(self.said, "a") as said:
            process = subprocess.Popen(
                [sys.executable, *words, *victim.arguments],
                cwd=self.work,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )
        process.returncode = 0  # it is waited for by its id
        return process.pid

    def _fork(self, victim: Victim, change: int, note: Path) -> int:
        """Fork a command from this process, which dies before the `change`-th change of a file; returns its id."""

        def work() -> None:
            os.chdir(self.work)
            os.environ.update(self._environment())
            tempfile.tempdir = None
            if victim.command.startswith("campaign"):
                launch: Any = importlib.import_module("fastflower.campaign.launch")
                launch.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": forked.ForkedPopen})
            changes = _count_changes(change)
            try:
                forked.run_command(f"fastflower.{victim.command}", list(victim.arguments))
            except SystemExit:
                note.write_text(str(changes[0]))
                raise

        return forked.fork(work, self.said)


def _contents(victim: Victim, folder: Path) -> dict[str, str]:
    return final_content.contents(folder, but=final_content.BY_ORDER if victim.extra == "ray" else ())


def _of_a_library(path: Path) -> bool:
    """True for the file of a moment with which Python's tempfile tests the folder for temporary files, and for the
    empty folder that torch makes when it is imported and removes at an exit.
    """
    if path.is_dir():
        return path.name.startswith("tmp") and not any(path.iterdir())
    return len(path.name) == 8 and path.read_bytes() in (b"", b"blat")


def _count_changes(limit: int) -> list[int]:
    """Count the changes of files by this process in a list of one number, and die before the `limit`-th; 0: never."""
    count, own = [0], os.getpid()

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (writes or event in CHANGES) and os.getpid() == own:
            count[0] += 1
            if count[0] == limit:
                os.kill(own, signal.SIGKILL)

    sys.addaudithook(audit)
    return count


def _import_everything() -> None:
    """Import the modules of all commands, on one thread: a fork keeps no other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import fastflower

    for module in pkgutil.walk_packages(fastflower.__path__, "fastflower."):
        if not module.name.startswith("fastflower.bench") and "._" not in module.name:
            importlib.import_module(module.name)
    for name in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)


def _draw_weights(path: Path) -> None:
    """A state dict of the backbone as another program saves it."""
    import timm
    import torch

    torch.manual_seed(0)
    torch.save(timm.create_model(tiny_project.BACKBONE).state_dict(), path)
