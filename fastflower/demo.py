"""Demo of the whole pipeline on generated flowers: `python -m fastflower.demo [--shuffle-labels] [key=value ...]`.

Generates a contest with hidden test labels, runs every command on it, and scores the submission with those labels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fastflower.core import console, errors, files, runs
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.records import to_plain
from fastflower.data.samples import flowers
from fastflower.evaluation import submissions
from fastflower.evaluation.records import Top1
from fastflower.recipe import Recipe, load

RECIPE = Path("recipes/demo.yaml")
# keys of the folders that the demo removes when it starts
MARK = ".made_by_demo"  # the file in each of them that says so
FIXED_KEYS = ("data.root", "data.csv", "data.home", "data.test", "exp.name")


@dataclass(frozen=True)
class Summary:
    """Content of summary.json: top-1 on the held-out images, clean and corrupted, and the seconds of each stage."""

    clean_top1: float
    corrupted_top1: float
    held_out: int
    submission: str
    report: str
    seconds: dict[str, float]


def main(argv: list[str]) -> None:
    """Generate, convert, train, evaluate, export, predict, report; print the scores on the hidden labels."""
    shuffle = "--shuffle-labels" in argv
    overrides = [argument for argument in argv if argument != "--shuffle-labels"]
    recipe = check(overrides)
    seconds: dict[str, float] = {}
    remove_outputs(recipe)
    started = time.monotonic()
    contest = flowers.write(Path(recipe.data.home), recipe.seed, shuffle_labels=shuffle)
    seconds["draw"] = round(time.monotonic() - started, 1)
    print(f"[draw] generated flowers in {contest.home}: {seconds['draw']:.0f} s", flush=True)
    folder = runs.RESULTS / recipe.exp.name
    disturbed = folder / "submission_disturbed.csv"
    for stage, command in commands(recipe, contest, disturbed=disturbed, overrides=overrides):
        seconds[stage] = run_stage(stage, command)
    truth = submissions.read_labels(contest.truth)
    clean, corrupted = (submissions.score(truth, path).score for path in (runs.SUBMISSION, disturbed))
    summary = Summary(
        clean_top1=clean.top1,
        corrupted_top1=corrupted.top1,
        held_out=len(truth),
        submission=str(runs.SUBMISSION),
        report=str(folder / "report.html"),
        seconds=seconds,
    )
    files.write_json(folder / "summary.json", to_plain(summary))
    print_summary(summary, [clean, corrupted])
    console.print_next("doctor", ["recipes/finetune.yaml"])


def check(overrides: list[str]) -> Recipe:
    """The demo's recipe with the user's overrides; InputError for invalid ones and outside of the repository."""
    if not (RECIPE.is_file() and Path("code/predict.py").is_file()):
        raise InputError(f"no {RECIPE} in {Path.cwd()}; run from the root of the repository")
    unknown = [override for override in overrides if "=" not in override]
    if unknown:
        raise InputError(f"got {unknown[0]}; the demo takes --shuffle-labels and key=value")
    fixed = [override for override in overrides if override.partition("=")[0] in FIXED_KEYS]
    if fixed:
        raise InputError(
            f"got {fixed[0]}; this key is fixed in the demo, which removes its folders when it starts"
        )
    return load(RECIPE, overrides)


def remove_outputs(recipe: Recipe) -> None:
    """Remove the folders of an earlier demo and mark the new ones; InputError for folders that no demo made."""
    folders = (Path(recipe.data.home), runs.MODELS / recipe.exp.name, runs.RESULTS / recipe.exp.name)
    foreign = [folder for folder in folders if os.path.lexists(folder) and not (folder / MARK).is_file()]
    if foreign:
        raise InputError(
            f"{foreign[0]} was not made by the demo, which would remove it; move it away, or remove it if an earlier "
            "version's demo made it"
        )
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / MARK).touch()


def commands(
    recipe: Recipe, contest: flowers.DrawnContest, *, disturbed: Path, overrides: list[str]
) -> list[tuple[str, list[str]]]:
    """(stage, command) for each command of the pipeline."""
    python = (
        os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    )
    arguments = [str(RECIPE), *overrides]
    composer = str(Path(python).with_name("composer"))
    ranks = str(recipe.train.world_size)
    return [
        ("convert", [python, "-m", "fastflower.convert", *arguments]),
        ("train", [composer, "-n", ranks, "fastflower/train.py", *arguments]),
        ("evaluate", [python, "-m", "fastflower.evaluate", *arguments]),
        ("export", [python, "-m", "fastflower.export", *arguments]),
        ("predict", [python, "code/predict.py", str(contest.test), str(runs.SUBMISSION)]),
        ("predict disturbed", [python, "code/predict.py", str(contest.disturbed), str(disturbed)]),
        ("report", [python, "-m", "fastflower.report", recipe.exp.name]),
    ]


def run_stage(stage: str, command: list[str]) -> float:
    """Run a command with its output on the console and return its seconds; EnvironmentFault when it fails."""
    print(f"\n[{stage}] {' '.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(
        command, env=os.environ | {"PYTHONUNBUFFERED": "1", console.NEXT: "0"}, check=False
    ).returncode
    seconds = round(time.monotonic() - started, 1)
    if code:
        raise EnvironmentFault(
            f"{stage} failed with exit code {code} after {seconds:.0f} s; see its output above"
        )
    print(f"[{stage}] {seconds:.0f} s", flush=True)
    return seconds


def print_summary(summary: Summary, found: list[Top1]) -> None:
    """Print the scores on the clean and on the disturbed images, and where the files are."""
    print(f"\nScores on {summary.held_out} held-out images, whose labels no command has read:")
    for name, score in zip(("clean", "disturbed"), found, strict=True):
        interval = f"95 % interval {score.top1_low:.3f} to {score.top1_high:.3f}"
        print(f"  {name:<10} top-1 {score.top1:.4f}   ({interval})")
    print(f"  submission  {summary.submission}")
    print(f"  report      {summary.report}", flush=True)


if __name__ == "__main__":
    errors.run_command(main)
