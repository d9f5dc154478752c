"""Rounds of students: each learns from unlabelled images with the soft labels of the round before (semi.rounds).

Round 0 trains the recipe without unlabelled images. The student of a fold learns the labels of the earlier round's
members of the same fold, which have not seen that fold's validation images, so every round has an honest score.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastflower.campaign import launch, plan
from fastflower.campaign.launch import Result
from fastflower.campaign.plan import Overrides, Task
from fastflower.core import runs, scores
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.data.folds import read_folds
from fastflower.recipe import Recipe, checks, load

FILE = "rounds.csv"  # below results/results/<exp>/
STUDENT = ("semi.rounds=0", "semi.enabled=true", "semi.method=soft")


@dataclass(frozen=True)
class Round:
    """The trainings of a round, its experiment and its recipe; `arguments` are those of evaluate."""

    exp: str
    tasks: list[Task]
    recipe: Recipe
    arguments: list[str]


def plan_rounds(files: list[str], overrides: Overrides) -> list[Round]:
    """Round 0 and the recipe's semi.rounds of students; all are checked before any starts.

    Raises InputError for several recipes, and for lists of values for other keys than seed and backbone.
    """
    others = [axis.key for axis in overrides.axes if axis.key not in plan.RUN_KEYS]
    if len(files) > 1 or others or overrides.ranges:
        what = "several recipes" if len(files) > 1 else (others or [overrides.ranges[0].key])[0]
        raise InputError(
            f"semi.rounds trains one recipe, with lists of seed and model.backbone alone; got {what}; give one value"
        )
    base = load(files[0], overrides.fixed)
    checks.check(base)
    fixed = [item for item in overrides.fixed if not item.startswith(("semi.rounds=", "exp.name="))]
    planned: list[Round] = []
    for number in range(base.semi.rounds + 1):
        exp = f"{base.exp.name}-round{number}" if number else base.exp.name
        teacher = [*STUDENT, f"semi.soft_teacher={planned[-1].exp}"] if number else []
        words = [*fixed, *(teacher or ["semi.rounds=0", "semi.enabled=false"])]
        tasks = [
            task
            for settings in plan.combinations(overrides.axes)
            for task in plan.fold_tasks(files[0], words, settings=settings, exp=exp)
        ]
        words = [*words, f"exp.name={exp}"]
        planned.append(Round(exp, tasks, load(files[0], words), [files[0], *words]))
    return planned


def run(planned: Sequence[Round], train: Callable[[list[Task]], Iterator[Result]]) -> Iterator[Result]:
    """Train and evaluate round after round; the results as they come. A failed training ends the rounds.

    Raises EnvironmentFault when an evaluation fails.
    """
    for number, current in enumerate(planned):
        print(f"\nround {number} of {len(planned) - 1}: {current.exp}", flush=True)
        failed = False
        for result in train(current.tasks):
            failed |= result.state == "failed"
            yield result
        if failed:
            return
        if not evaluated(current):
            command = [sys.executable, "-m", "fastflower.evaluate", *current.arguments]
            code, reason = launch.run_process(command, launch.child_environment(), None)
            if code not in (0, 1):  # 1: a threshold of the recipe's accept section was missed
                raise EnvironmentFault(f"python -m fastflower.evaluate {current.exp} failed: {reason}")


def evaluated(current: Round) -> bool:
    """True when evaluate has saved the logits of all members of a round as they are."""
    from fastflower.bundle.members import read_out_of_fold  # here, as below: torch takes seconds

    metric = current.recipe.select.metric
    paths = runs.find_members(current.exp, current.recipe.ensembling.find_pattern, metric=metric)
    return bool(paths) and len(read_out_of_fold([current.exp], paths)) == len(paths)


def gains(planned: Sequence[Round]) -> list[dict[str, str]]:
    """A row for each round: its out-of-fold top-1 with interval, and the paired gain over round 0 and the round before.

    All are of the same images: those of the folds that were trained.
    """
    from fastflower.evaluation import summary
    from fastflower.evaluation.paired import paired_gain

    hits: list[np.ndarray] = []
    rows = []
    for current in planned:
        column = read_folds(Path(current.recipe.data.home) / "folds.csv").fold
        members = summary.load_member_logits(runs.RESULTS / current.exp)
        _, fused, _ = summary.fused_set(members, column, current.recipe)
        hits.append(fused.logits.argmax(1) == fused.class_idx)
        low, high = scores.wilson(float(hits[-1].sum()), len(fused))
        row = {
            "round": current.exp,
            "n": str(len(fused)),
            "top-1": f"{hits[-1].mean():.4f}",
            "95%": f"{low:.3f}-{high:.3f}",
        }
        for name, base in (
            ("gain over round 0", hits[0]),
            ("over the round before", hits[max(0, len(hits) - 2)]),
        ):
            row[name] = paired_gain(base, hits[-1]).text if len(hits) > 1 else "-"
        rows.append(row)
    return rows
