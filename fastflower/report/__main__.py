"""Report of one or several experiments: `python -m fastflower.report <exp ...> [key=value ...] [--format html|md]`.

Writes results/results/<exp>/report.html (or report.md with figures/), and results/results/compare.html for several.
Where data.home holds truth.csv, the labels of the test images in the columns of data.csv, submission.csv is scored too.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from fastflower.core import errors, files, runs
from fastflower.core.errors import InputError
from fastflower.recipe import load
from fastflower.report.experiment import read_experiment

FORMATS = ("html", "md")


def main(argv: list[str]) -> None:
    names, page_format = parse(argv)
    experiments = [read_experiment(name, with_images=page_format == "html") for name in names]
    from fastflower.report import markdown_page, page  # here: matplotlib takes a second

    command = shlex.join(["python", "-m", "fastflower.report", *argv])

    for experiment in experiments:
        for note in experiment.notes:
            print(f"note: {experiment.name}: {note}")
        folder = runs.RESULTS / experiment.name
        files.remove_abandoned(folder, below=True)
        if page_format == "md":
            print_written(markdown_page.write(folder, experiment, experiments))
            continue
        print_written(write_page(folder / "report.html", page.experiment_page(experiment, command)))
    if len(experiments) > 1 and page_format == "html":
        files.remove_abandoned(runs.RESULTS, runs.COMPARISON.name)
        print_written(write_page(runs.COMPARISON, page.comparison_page(experiments, command)))


def parse(argv: list[str]) -> tuple[list[str], str]:
    """Names of the experiments, without repeats, and the format.

    An experiment is given by its name, its folder, or its recipe; key=value arguments change the recipes.
    """
    arguments, page_format = list(argv), "html"
    if "--format" in arguments:
        position = arguments.index("--format")
        page_format = arguments[position + 1] if position + 1 < len(arguments) else ""
        del arguments[position : position + 2]
    if page_format not in FORMATS:
        raise InputError(f"--format {page_format}: must be one of {', '.join(FORMATS)}")
    unknown = [argument for argument in arguments if argument.startswith("-")]
    overrides = [argument for argument in arguments if "=" in argument]
    experiments = [argument for argument in arguments if "=" not in argument]
    if unknown or not experiments:
        raise InputError(
            f"got {unknown[0] if unknown else 'no experiment'}; report takes experiments and --format html|md"
        )
    return list(dict.fromkeys(_name(experiment, overrides) for experiment in experiments)), page_format


def _name(experiment: str, overrides: list[str]) -> str:
    if experiment.endswith(".yaml"):
        return load(experiment, overrides).exp.name
    return Path(experiment).name


def write_page(path: Path, html: str) -> Path:
    files.write_atomic(path, html)
    return path


def print_written(path: Path) -> None:
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    errors.run_command(main)
