"""Train one fold, several, or all: `python -m fastflower.train [recipe.yaml or experiment] [key=value ...] [-n N]`.

Starts one process for each GPU, or N; also `composer -n 2 fastflower/train.py ...`, which takes the same arguments and
can start several machines; that launcher prints lines of its own around an error, which its ranks cannot prevent.
The same command resumes a killed or preempted run; a finished run is left as it is. Writes results/model/<exp>/
(checkpoints, log) and results/results/<exp>/ (meta/, events.jsonl, tensorboard/). Exit codes: 0 done, 1 diverged, 2 bad
input, 3 damaged files, 4 the machine lacks something, 75 stopped by a signal with its state saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if (
    sys.path and Path(sys.path[0]).resolve() == HERE
):  # run by path: this folder would shadow other libraries' names
    sys.path[0] = str(HERE.parent)

from fastflower.core import console, errors, launcher  # noqa: E402
from fastflower.core.errors import InputError  # noqa: E402
from fastflower.data.betons.fold_set import check_converted  # noqa: E402
from fastflower.model.pretrained import check_architecture, check_present  # noqa: E402
from fastflower.recipe import Recipe, checks, own, parse_command  # noqa: E402
from fastflower.recipe.derived import unscored_kind, validates  # noqa: E402
from fastflower.training import exits  # noqa: E402


def start(argv: list[str]) -> int:
    """Train in this process, or in several that it starts; what can be refused is refused before."""
    count, arguments = launcher.split_ranks(argv)
    if launcher.is_rank():
        return main(arguments)
    recipe, _ = check(arguments)
    count = count or max(1, launcher.gpu_count())
    if count == 1:
        code = main(arguments)
    else:
        code = launcher.launch([sys.executable, "-m", "fastflower.train", *arguments], count)
    if code == 0:
        print_next(recipe, arguments)
    return code


def print_next(recipe: Recipe, arguments: list[str]) -> None:
    """Print the next command: without held-out images nothing is scored, and a member is handed in by its name."""
    if validates(recipe):
        console.print_next("evaluate", arguments)
    else:
        console.print_next("export", [*arguments, f"ensembling.find_pattern={unscored_kind(recipe)}__*.pth"])


@exits.rank_zero_reports()
def main(argv: list[str]) -> int:
    """Check the recipe and its data, then train as one rank, or alone."""
    recipe, advice = check(argv)
    exits.exit_on_sigterm()
    # here: torch and Composer take ten seconds, which a refusal does not spend
    from fastflower.training import session

    session.train(recipe, advice)
    return 0


def check(argv: list[str]) -> tuple[Recipe, list[str]]:
    """The recipe of the arguments and the advice on it; raises for all that is known before heavy imports."""
    recipe = parse_command(argv)
    advice = checks.check(recipe)
    checks.check_trackers(recipe)
    check_architecture(recipe.model.backbone)
    if recipe.semi.rounds:
        raise InputError(
            f"semi.rounds = {recipe.semi.rounds}: rounds of students are trained by python -m fastflower.campaign with "
            "the same arguments; use it, or semi.rounds=0 for the recipe alone"
        )
    own.check_own(recipe)
    check_converted(recipe)
    check_present(recipe)
    return recipe, advice


if __name__ == "__main__":
    launcher.forget_leftovers()
    launcher.follow()  # before the imports that take seconds
    with exits.quick_exit():
        errors.run_command(start)
