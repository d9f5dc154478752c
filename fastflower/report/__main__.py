"""Show what an experiment's model does: `python -m fastflower.report <exp ...> [key=value ...] [--format html|md]`.

Writes results/results/<exp>/report.html (or report.md with figures/), and results/results/compare.html for several.
"""

from __future__ import annotations

from pathlib import Path

from fastflower.core import errors, files, runs
from fastflower.core.errors import InputError
from fastflower.recipe import load
from fastflower.report import markdown_page, page
from fastflower.report.experiment import read

FORMATS = ("html", "md")


def main(argv: list[str]) -> None:
    names, form = parse(argv)
    experiments = [read(name, with_pictures=form == "html") for name in names]
    for found in experiments:
        for note in found.notes:
            print(f"note: {found.name}: {note}")
        folder = runs.RESULTS / found.name
        files.sweep(folder, below=True)
        if form == "md":
            say(markdown_page.write(folder, found, experiments))
            continue
        say(save(folder / "report.html", page.experiment(found)))
    if len(experiments) > 1 and form == "html":
        files.sweep(runs.RESULTS, "compare.html")
        say(save(runs.RESULTS / "compare.html", page.compare(experiments)))


def parse(argv: list[str]) -> tuple[list[str], str]:
    """The experiments and the format; an experiment is named, or given by folder or recipe and changes."""
    words, form = list(argv), "html"
    if "--format" in words:
        at = words.index("--format")
        form = words[at + 1] if at + 1 < len(words) else ""
        del words[at : at + 2]
    if form not in FORMATS:
        raise InputError(f"--format {form}: must be one of {', '.join(FORMATS)}")
    strange = [word for word in words if word.startswith("-")]
    changes = [word for word in words if "=" in word]
    given = [word for word in words if "=" not in word]
    if strange or not given:
        raise InputError(
            f"got {strange[0] if strange else 'no experiment'}; report takes experiments and --format html|md"
        )
    return list(dict.fromkeys(_name(word, changes) for word in given)), form


def _name(word: str, changes: list[str]) -> str:
    return load(word, changes).exp.name if word.endswith(".yaml") else Path(word).name


def save(path: Path, html: str) -> Path:
    files.write_atomic(path, html)
    return path


def say(path: Path) -> None:
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    errors.run(main)
