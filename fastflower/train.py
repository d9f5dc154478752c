"""composer -n 2 fastflower/train.py [recipe.yaml] [key=value ...]: train one fold, several, or all.

Also `python -m fastflower.train`. The same command resumes a killed or preempted run; a finished run is left as it
is. Writes results/model/<exp>/ (checkpoints, log) and results/results/<exp>/ (meta/, events.jsonl,
tensorboard/). Exit codes: 0 done, 1 diverged, 2 bad input, 3 damaged files, 4 the machine lacks something,
75 stopped by a signal with its state saved.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if (
    sys.path and Path(sys.path[0]).resolve() == HERE
):  # run by path: this folder would shadow other libraries' names
    sys.path[0] = str(HERE.parent)

from fastflower.core import errors, launcher  # noqa: E402
from fastflower.data.betons.fold_set import check_converted  # noqa: E402
from fastflower.recipe import checks, parse_command  # noqa: E402
from fastflower.training import exits  # noqa: E402


@exits.rank_zero_reports()
def main(argv: list[str]) -> int:
    """Check the recipe and its data, then train."""
    recipe = parse_command(argv)
    advice = checks.check(recipe)
    checks.check_trackers(recipe)
    check_converted(recipe)
    # here: torch and Composer take ten seconds, which a refusal does not spend
    from fastflower.training import session

    session.train(recipe, advice)
    return 0


if __name__ == "__main__":
    launcher.forget_leftovers()
    launcher.follow()  # before the imports that take seconds
    with exits.quick_exit():
        errors.run_command(main)
