"""The whole job on drawn flowers: `python -m fastflower.demo [--shuffle-labels] [key=value ...]`.

Draws a contest with a hidden truth, runs the real commands on it, and scores their submission by that truth.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fastflower.core import errors, files, runs, scores
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.data.samples import flowers
from fastflower.recipe import Recipe, load

RECIPE = Path("recipes/demo.yaml")
OWN = ("data.root", "data.csv", "data.home", "data.test", "exp.name")  # the demo removes what lies there


def main(argv: list[str]) -> None:
    """Draw, convert, train, evaluate, export, predict, report; print what a stranger would have scored."""
    shuffle = "--shuffle-labels" in argv
    words = [word for word in argv if word != "--shuffle-labels"]
    recipe = check(words)
    seconds: dict[str, float] = {}
    begin_afresh(recipe)
    started = time.monotonic()
    made = flowers.write(Path(recipe.data.home), recipe.seed, shuffle_labels=shuffle)
    seconds["draw"] = round(time.monotonic() - started, 1)
    print(f"[draw] contest of drawn flowers in {made.home}: {seconds['draw']:.0f} s", flush=True)
    folder = runs.RESULTS / recipe.exp.name
    disturbed = folder / "submission_disturbed.csv"
    for stage, command in commands(recipe, made, disturbed=disturbed, words=words):
        seconds[stage] = run(stage, command)
    summary: dict[str, Any] = {
        "clean_top1": score(made.truth, runs.SUBMISSION),
        "corrupted_top1": score(made.truth, disturbed),
        "held_out": len(answers(made.truth)),
        "submission": str(runs.SUBMISSION),
        "report": str(folder / "report.html"),
        "seconds": seconds,
    }
    files.write_json(folder / "summary.json", summary)
    tell(summary)


def check(words: list[str]) -> Recipe:
    """The demo's recipe with the user's words, or one line why not."""
    if not (RECIPE.is_file() and Path("code/predict.py").is_file()):
        raise InputError(f"no {RECIPE} here ({Path.cwd()}); run from the root of the repository")
    strange = [word for word in words if "=" not in word]
    if strange:
        raise InputError(f"got {strange[0]}; the demo takes --shuffle-labels and key=value words")
    taken = [word for word in words if word.partition("=")[0] in OWN]
    if taken:
        raise InputError(f"got {taken[0]}; the demo keeps to its own folders and removes them when it starts")
    return load(RECIPE, words)


def begin_afresh(recipe: Recipe) -> None:
    """Remove what an earlier demo left, and nothing else."""
    for folder in (Path(recipe.data.home), runs.MODELS / recipe.exp.name, runs.RESULTS / recipe.exp.name):
        shutil.rmtree(folder, ignore_errors=True)


def commands(
    recipe: Recipe, made: flowers.DrawnSet, *, disturbed: Path, words: list[str]
) -> list[tuple[str, list[str]]]:
    """The commands that a contestant would type, by stage."""
    python = (
        os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    )
    own = [str(RECIPE), *words]
    composer = str(Path(python).with_name("composer"))
    ranks = str(recipe.train.world_size)
    return [
        ("convert", [python, "-m", "fastflower.convert", *own]),
        ("train", [composer, "-n", ranks, "fastflower/train.py", *own]),
        ("evaluate", [python, "-m", "fastflower.evaluate", *own]),
        ("export", [python, "-m", "fastflower.export", *own]),
        ("predict", [python, "code/predict.py", str(made.test), str(runs.SUBMISSION)]),
        ("predict disturbed", [python, "code/predict.py", str(made.disturbed), str(disturbed)]),
        ("report", [python, "-m", "fastflower.report", recipe.exp.name]),
    ]


def run(stage: str, command: list[str]) -> float:
    """Run one command in full view and return its seconds; a failure ends the demo with the command's name."""
    print(f"\n[{stage}] {' '.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, check=False).returncode
    took = round(time.monotonic() - started, 1)
    if code:
        raise EnvironmentFault(
            f"{stage} ended with exit code {code} after {took:.0f} s; its last lines say why"
        )
    print(f"[{stage}] {took:.0f} s", flush=True)
    return took


def answers(path: Path) -> dict[str, str]:
    """category_id by file name."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return {row["filename"]: row["category_id"] for row in csv.DictReader(file)}


def score(truth: Path, submission: Path) -> float:
    """Share of the held-out photographs that a submission names rightly; a missing row is wrong."""
    right, said = answers(truth), answers(submission)
    return sum(said.get(name) == category for name, category in right.items()) / len(right)


def tell(summary: dict[str, Any]) -> None:
    """The last lines of the demo."""
    count = summary["held_out"]
    print(f"\nOf {count} held-out photographs, whose truth no command has seen:")
    for name, words in (("clean_top1", "clean"), ("corrupted_top1", "disturbed")):
        low, high = scores.wilson(round(summary[name] * count), count)
        print(f"  {words:<10} top-1 {summary[name]:.4f}   (95 % interval {low:.3f} to {high:.3f})")
    print(f"  submission  {summary['submission']}")
    print(f"  report      {summary['report']}", flush=True)


if __name__ == "__main__":
    errors.run(main)
