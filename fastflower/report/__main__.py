"""Report of one or several experiments: `python -m fastflower.report <exp ...> [key=value ...] [--format html|md]`.

Writes results/results/<exp>/report.html (or report.md with figures/), and for several results/results/compare.html (or
compare.md), which also has what `ensemble` found for all of them together. An experiment is given by its name, its
folder or its recipe; changes of data.* say where its images are now. Where data.home holds truth.csv, the labels of the
test images in the columns of data.csv, submission.csv is scored too.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from fastflower.core import console, errors, files, runs
from fastflower.core.errors import InputError
from fastflower.recipe import Recipe, arguments, load
from fastflower.report.experiment import Experiment, read_experiment

FORMATS = ("html", "md")


@dataclass(frozen=True)
class Asked:
    """An experiment to report, and the recipe that was given for it: None for its name alone."""

    name: str
    recipe: Recipe | None = None


def main(argv: list[str]) -> None:
    asked, page_format = parse(argv)
    experiments = [read_experiment(one.name, one.recipe, with_images=page_format == "html") for one in asked]
    from fastflower.report import markdown_page, page  # here: matplotlib takes a second

    command = shlex.join(["python", "-m", "fastflower.report", *argv])

    for experiment in experiments:
        for note in experiment.notes:
            print(f"note: {experiment.name}: {note}")
        folder = runs.RESULTS / experiment.name
        files.remove_abandoned(folder, below=True)
        if page_format == "md":
            print_written(markdown_page.write(folder, experiment, experiments))
        else:
            print_written(write_page(folder / "report.html", page.experiment_page(experiment, command)))
    if len(experiments) > 1:
        files.remove_abandoned(runs.RESULTS, runs.COMPARISON.stem)
        if page_format == "md":
            print_written(markdown_page.write_comparison(experiments))
        else:
            print_written(write_page(runs.COMPARISON, page.comparison_page(experiments, command)))
    print_next(experiments)


def print_next(experiments: list[Experiment]) -> None:
    """Print the next command: an export, or once there is a bundle of these experiments, a prediction."""
    names, recipe = [experiment.name for experiment in experiments], experiments[0].recipe
    if recipe is not None and all(experiment.bundle for experiment in experiments):
        console.print_next_line(f"python code/predict.py {shlex.quote(recipe.data.test)} {runs.SUBMISSION}")
    else:
        console.print_next("export", names)


def parse(argv: list[str]) -> tuple[list[Asked], str]:
    """The experiments, without repeats, and the format; InputError for invalid arguments."""
    words, page_format = list(argv), "html"
    if "--format" in words:
        position = words.index("--format")
        page_format = words[position + 1] if position + 1 < len(words) else ""
        del words[position : position + 2]
    if page_format not in FORMATS:
        raise InputError(f"--format {page_format}: must be one of {', '.join(FORMATS)}")
    unknown = [word for word in words if word.startswith("-")]
    changes = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    if unknown or not names:
        raise InputError(
            f"got {unknown[0] if unknown else 'no experiment'}; report takes experiments and --format html|md"
        )
    asked = {one.name: one for one in (_asked(name, changes) for name in names)}
    return list(asked.values()), page_format


def _asked(name: str, changes: list[str]) -> Asked:
    if changes or name.endswith((".yaml", ".yml")):
        recipe = load(arguments.locate(name), changes)
        return Asked(recipe.exp.name, recipe)
    return Asked(Path(name).name)


def write_page(path: Path, html: str) -> Path:
    files.write_atomic(path, console.visible(html))
    return path


def print_written(path: Path) -> None:
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    errors.run_command(main)
