"""Kill a training at every point, start the same command again, and compare the end to the bit.

    python tests/support/torture.py [--ranks 1 2] [--points N] [--random N] [--recipes N] [--seed S] [--part K/N]

An uninterrupted run first counts the points it passes: each write, flush, link, rename and removal of a file, each
start and end of a step, an evaluation, an epoch. Then runs are killed (SIGKILL) at these points one by one, and at
random moments, up to five times each, on any rank, sometimes with SIGTERM instead or with the newest checkpoint
damaged; and one rank raises an error, which must end all ranks and be reported. Every rank is a fork of one process
that has imported everything, so a case costs a training of seconds.
Exits with 1 when any case ends differently from the uninterrupted run, or does not end.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads would not survive a fork

import argparse
import collections
import contextlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from composer.core import Engine

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, from any folder

from fastflower.callbacks.checkpoints import FIXED_NAMES
from fastflower.core import checkpoint, errors, runs
from fastflower.core.runs import Run
from support import toy_project
from support.forked import become_rank, fork, free_port, train

BOUND = 60.0  # seconds within which all ranks must exit after the first
PATIENCE = 300.0  # seconds that a training may take
EVENTS = (
    *("fit_start", "epoch_start", "before_dataloader", "batch_start", "after_train_batch", "batch_end"),
    *("batch_checkpoint", "epoch_end", "eval_before_all", "eval_start", "eval_batch_end", "eval_end"),
    *("eval_after_all", "epoch_checkpoint", "fit_end"),
)
COMMON = ("train.save_every=2ba", "log.tensorboard=false")
RECIPES = {
    "ViT, EMA, SWA, cosine": ("swa.enabled=true", "swa.start=0.4"),
    "ResNet, plateau, unfreezing, microbatches": (
        *("model.backbone=test_resnet", "model.drop_path=0", "sched.name=plateau", "sched.patience=0"),
        *("llrd.unfreeze_schedule={1: [head, back], 2: [middle, front]}", "sampler.type=class_balanced"),
    ),
}


@dataclass(frozen=True)
class Cut:
    """A kill of `rank` as it passes `point` for the `count`-th time, or after `seconds`."""

    rank: int = 0
    point: str = ""
    count: int = 0
    seconds: float = 0.0
    signal: int = signal.SIGKILL  # 0: an exception instead
    damage: bool = False  # the newest checkpoint is damaged afterwards


@dataclass(frozen=True)
class Case:
    """A training on a number of ranks that is killed and started again until it ends."""

    recipe: str
    ranks: int
    cuts: tuple[Cut, ...]
    kind: str


@dataclass
class Outcome:
    """The result of a case; `wrong` lists the differences and faults."""

    kills: int = 0
    signals: int = 0
    damaged: int = 0
    slowest: float = 0.0  # seconds from the first end of a rank to the last
    slowest_signal: float = 0.0  # seconds from SIGTERM to the end of all
    wrong: list[str] = field(default_factory=list)


class Points:
    """Counts the points that a forked rank passes, and kills it at one."""

    def __init__(self, cut: Cut | None, rank: int) -> None:
        self.cut = cut if cut is not None and cut.rank == rank and cut.point else None
        self.seen: collections.Counter[str] = collections.Counter()

    def reach(self, point: str, before_death: Callable[[], Any] = lambda: None) -> None:
        self.seen[point] += 1
        if self.cut is not None and (point, self.seen[point]) == (self.cut.point, self.cut.count):
            before_death()
            if not self.cut.signal:
                raise RuntimeError("made to fail")
            os.kill(os.getpid(), self.cut.signal)

    def install(self) -> None:
        """Wrap every function that changes a file of the run, and Composer's events."""
        self._before(os, "replace", lambda source, target: f"rename to {kind_of(target)}")
        self._before(os, "link", lambda source, target: f"link {kind_of(target)}")
        self._before(os, "fsync", lambda handle: f"flush {kind_of(os.readlink(f'/proc/self/fd/{handle}'))}")
        self._before(os, "unlink", lambda path, **_: f"remove {kind_of(path)}")
        self._before(checkpoint, "_crc", lambda path, size: f"sum {kind_of(path)}")
        self._before(Engine, "run_event", lambda engine, event: str(getattr(event, "value", event)), EVENTS)
        self._save()
        self._append()

    def _before(self, owner: Any, name: str, point: Callable[..., str], only: tuple[str, ...] = ()) -> None:
        original = getattr(owner, name)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            name_of_point = point(*args, **kwargs)
            if not only or name_of_point in only:
                self.reach(name_of_point)
            return original(*args, **kwargs)

        setattr(owner, name, stand_in)

    def _save(self) -> None:
        original = torch.save

        def save(content: Any, file: Any) -> None:
            path = Path(file.name)
            kind = kind_of(path)
            self.reach(f"write {kind}")
            original(content, file)
            file.flush()
            self.reach(f"write half of {kind}", lambda: os.truncate(path, path.stat().st_size // 2))
            self.reach(f"written, not summed {kind}")

        torch.save = save

    def _append(self) -> None:
        original = runs.append_event

        def append(path: Path, row: dict[str, Any]) -> None:
            self.reach("append a row")
            size = path.stat().st_size if path.exists() else 0
            original(path, row)
            self.reach("append half a row", lambda: os.truncate(path, (size + path.stat().st_size) // 2))

        runs.append_event = append


def kind_of(path: Any) -> str:
    """The kind of a file, without the parts that differ from run to run: `last`, `best_combo.pth`, `recipe.yaml`."""
    name = re.sub(r"\.\d+-\w+\.tmp$", "", Path(path).name.lstrip("."))
    return re.sub(r"__.*(?=\.previous)|__.*", "", name)


def one_rank(
    folder: Path, words: tuple[str, ...], rank: int, world: int, port: int, cut: Cut | None
) -> NoReturn:
    """The body of a forked rank: the train command, which `cut` may kill."""
    os.chdir(folder)
    become_rank(rank, world, port)
    points = Points(cut, rank)
    points.install()
    try:
        train(*words)
    finally:
        Path(f"points_{rank}.json").write_text(json.dumps(points.seen))


@dataclass
class Attempt:
    """The exit codes and times of one start of the command."""

    codes: list[int]
    cut: bool
    gone_after: float  # seconds from the first end of a rank to the last
    after_signal: float  # seconds from the kill at a moment to the last end
    seconds: float


def attempt(folder: Path, words: tuple[str, ...], world: int, cut: Cut | None = None) -> Attempt:
    """Start the command once, kill it as `cut` says, and wait for every rank, as Composer's launcher does."""
    port, start = free_port(), time.monotonic()
    ranks = {
        fork(
            lambda rank=rank: one_rank(folder, words, rank, world, port, cut), folder / f"said_{rank}.txt"
        ): rank
        for rank in range(world)
    }
    codes: dict[int, int] = {}
    fired, first_end, told = 0.0, 0.0, False
    while len(codes) < world:
        now = time.monotonic()
        for child in [child for child, rank in ranks.items() if rank not in codes]:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[ranks[child]] = os.waitstatus_to_exitcode(status)
                first_end = first_end or now
        alive = [child for child, rank in ranks.items() if rank not in codes]
        if cut is not None and cut.seconds and not fired and now - start > cut.seconds:
            fired = now
            for child in alive:
                if ranks[child] == cut.rank:
                    os.kill(child, cut.signal)
        if any(codes.values()) and not told:
            told = True
            for child in alive:
                os.kill(child, signal.SIGTERM)
        if now - start > PATIENCE or (first_end and now - first_end > BOUND):
            for child in alive:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    end = time.monotonic()
    listed = [codes[rank] for rank in range(world)]
    return Attempt(listed, any(listed), end - first_end, end - fired if fired else 0.0, end - start)


def content(folder: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """The content of all files of a finished run, except what depends on the clock."""
    backbone = next((w.split("=")[1] for w in words if w.startswith("model.backbone=")), toy_project.BACKBONE)
    run = Run(exp="tiny", backbone=backbone, fold=0, seed=42)
    with contextlib.chdir(folder):
        files = {}
        for kind in FIXED_NAMES:
            for path in [*run.checkpoints(kind), run.model_dir / FIXED_NAMES[kind]]:
                if path.exists():
                    kept = checkpoint.load(path)
                    files[path.name] = {
                        "tensors": kept.tensors,
                        "meta": kept.meta,
                        "more": kept.training_state,
                    }
        rows = [row for row in runs.read_events(run.events_path, []) if row["event"] in ("epoch", "end")]
        return {
            "files": files,
            "history": rows,
            "end": toy_project.end(run) if run.end_path.exists() else None,
            "left over": [path.name for path in Path().rglob(".*.tmp")],
        }


def damage(folder: Path) -> bool:
    """Flip a bit of the newest `last`; False when there is no older one to fall back to."""
    with contextlib.chdir(folder):
        newest = sorted(
            Path("results/model/tiny").glob("last__*_epoch*.pth"), key=lambda p: p.stat().st_mtime_ns
        )
        older = list(Path("results/model/tiny").glob("last__*.previous.pth"))
        if not newest or not older or newest[-1].samefile(older[0]):
            return False
        data = bytearray(newest[-1].read_bytes())
        data[len(data) // 3] ^= 4
        newest[-1].unlink()  # the fixed name is the same file
        newest[-1].write_bytes(data)
        return True


class Torture:
    """Runs the cases and compares them with uninterrupted runs."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.base = home / "base"
        self.expected: dict[tuple[str, int], dict[str, Any]] = {}
        self.points: dict[tuple[str, int], list[dict[str, int]]] = {}
        self.seconds: dict[tuple[str, int], float] = {}
        self.base.mkdir()
        child = fork(lambda: toy_project.project(self.base) and 0, home / "said.txt")
        if os.waitpid(child, 0)[1]:
            raise SystemExit((home / "said.txt").read_text())

    def uncut(self, recipe: str, world: int) -> None:
        """Train once without a kill; does nothing the second time."""
        if (recipe, world) in self.expected:
            return
        folder, words = self._folder(), words_of(recipe, world)
        ended = attempt(folder, words, world)
        if any(ended.codes):
            raise SystemExit(f"the uncut run failed: {ended.codes}\n" + self._said(folder))
        self.expected[recipe, world] = content(folder, words)
        self.seconds[recipe, world] = ended.seconds
        self.points[recipe, world] = [
            json.loads((folder / f"points_{rank}.json").read_text()) for rank in range(world)
        ]
        shutil.rmtree(folder)

    def run(self, case: Case) -> Outcome:
        self.uncut(case.recipe, case.ranks)
        folder, words, outcome = self._folder(), words_of(case.recipe, case.ranks), Outcome()
        for cut in (*case.cuts, None):
            ended = attempt(folder, words, case.ranks, cut)
            outcome.slowest = max(outcome.slowest, ended.gone_after)
            if ended.gone_after > BOUND:
                outcome.wrong.append(f"ranks lived on for {ended.gone_after:.0f} s")
            if not ended.cut:
                break
            if cut is None:
                outcome.wrong.append(f"started again, it ended with {ended.codes}\n{self._said(folder)}")
            elif cut.signal == 0:
                outcome.wrong += self._blame(folder, case.ranks, cut)
            elif cut.signal == signal.SIGTERM:
                outcome.signals += 1
                outcome.slowest_signal = max(outcome.slowest_signal, ended.after_signal)
                if ended.codes[cut.rank] not in (errors.PREEMPTED, -signal.SIGTERM, 128 + signal.SIGTERM):
                    outcome.wrong.append(f"after SIGTERM it ended with {ended.codes}\n{self._said(folder)}")
            else:
                outcome.kills += 1
            if cut is not None and cut.damage:
                outcome.damaged += damage(folder)
        if not outcome.wrong:
            outcome.wrong = toy_project.different(
                self.expected[case.recipe, case.ranks], content(folder, words)
            )
        shutil.rmtree(folder)
        return outcome

    def _folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self.home))
        shutil.copytree(self.base, folder, dirs_exist_ok=True)
        return folder

    def _blame(self, folder: Path, world: int, cut: Cut) -> list[str]:
        """Faults in the ranks' messages after one of them failed."""
        wanted = dict.fromkeys(range(world), "its own message says why")
        wanted[cut.rank] = "RuntimeError: made to fail"
        said = {rank: (folder / f"said_{rank}.txt").read_text() for rank in wanted}
        return [f"rank {rank} did not say: {text}" for rank, text in wanted.items() if text not in said[rank]]

    def _said(self, folder: Path) -> str:
        return "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("said_*.txt")))


def words_of(recipe: str, world: int) -> tuple[str, ...]:
    batch = 8 // world
    accum = ("train.batch_per_gpu=2", f"train.grad_accum={batch // 2}") if "microbatches" in recipe else ()
    return (f"train.batch_per_gpu={batch}", f"train.world_size={world}", *COMMON, *RECIPES[recipe], *accum)


def enumerated(points: list[dict[str, int]], recipe: str, world: int) -> Iterator[Case]:
    """One case for every point that any rank passed."""
    for rank, seen in enumerate(points):
        for point, times in seen.items():
            for count in range(1, times + 1):
                yield Case(recipe, world, (Cut(rank, point, count),), point)


def at_random(draw: random.Random, recipe: str, world: int, seconds: float) -> Case:
    """Up to five kills at random moments of a training that takes `seconds`."""

    def cut() -> Cut:
        return Cut(
            rank=draw.randrange(world),
            seconds=draw.uniform(0.05, 1.0) * seconds,
            signal=signal.SIGTERM if draw.random() < 0.2 else signal.SIGKILL,
            damage=draw.random() < 0.2,
        )

    return Case(recipe, world, tuple(cut() for _ in range(draw.randint(1, 5))), "at a random moment")


def cases(torture: Torture, options: argparse.Namespace) -> list[Case]:
    draw, chosen = random.Random(options.seed), []
    for world in options.ranks:
        places: list[Case] = []
        recipes = list(RECIPES)[: options.recipes]
        for recipe in recipes:
            torture.uncut(recipe, world)
            places += enumerated(torture.points[recipe, world], recipe, world)
        limit = len(places) if options.points is None else min(options.points, len(places))
        chosen += draw.sample(places, limit)
        fails = Cut(world - 1, "after_train_batch", 7, signal=0)
        chosen.append(Case(recipes[0], world, (fails,), "one rank fails"))
        for _ in range(options.random):
            recipe = draw.choice(recipes)
            chosen.append(at_random(draw, recipe, world, torture.seconds[recipe, world]))
    part, parts = (int(number) for number in options.part.split("/"))
    return chosen[part - 1 :: parts]


def table(done: list[tuple[Case, Outcome]]) -> list[str]:
    """Kills, signals, damaged checkpoints and differences by number of ranks and point."""
    groups: dict[tuple[int, str], list[Outcome]] = {}
    for case, outcome in done:
        groups.setdefault((case.ranks, case.kind), []).append(outcome)

    def row(ranks: str, kind: str, them: list[Outcome]) -> str:
        sums = [sum(getattr(o, name) for o in them) for name in ("kills", "signals", "damaged")]
        wrong = sum(bool(o.wrong) for o in them)
        return f"{ranks:<6}{kind:<32}{len(them):>6}{sums[0]:>7}{sums[1]:>9}{sums[2]:>9}{wrong:>13}"

    head = (
        f"{'ranks':<6}{'killed':<32}{'cases':>6}{'kills':>7}{'SIGTERM':>9}{'damaged':>9}{'differences':>13}"
    )
    rows = [row(str(ranks), kind, them) for (ranks, kind), them in sorted(groups.items())]
    return [head, *rows, row("all", "", [outcome for _, outcome in done])]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--points", type=int, help="number of enumerated points for each number of ranks; default: all"
    )
    parser.add_argument(
        "--random", type=int, default=30, help="cases at random moments for each number of ranks"
    )
    parser.add_argument("--recipes", type=int, help="use only the first N recipes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="K/N: every N-th case, starting with the K-th")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Composer put its own there
    start, done = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="fastflower-torture-", ignore_cleanup_errors=True) as home:
        torture = Torture(Path(home))
        todo = cases(torture, options)
        print(f"{len(todo)} cases", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # the table of what was done until then
            for number, case in enumerate(todo, 1):
                outcome = torture.run(case)
                done.append((case, outcome))
                if outcome.wrong:
                    print(f"DIFFERENT {case}", *outcome.wrong[:8], sep="\n    ", flush=True)
                if number % 10 == 0:
                    print(f"{number} of {len(todo)}, {time.monotonic() - start:.0f} s", flush=True)
    print(*table(done), sep="\n")
    slowest, signalled = (
        max((getattr(outcome, name) for _, outcome in done), default=0.0)
        for name in ("slowest", "slowest_signal")
    )
    print(
        f"{time.monotonic() - start:.0f} s; all ranks were gone at most {slowest:.1f} s after the first, and "
        f"{signalled:.1f} s after SIGTERM"
    )
    return int(len(done) < len(todo) or any(outcome.wrong for _, outcome in done))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
