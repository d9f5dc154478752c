"""The command line: `fastflower <command> ...`, the same as `python -m fastflower.<command> ...`.

Without a command, a list of them. `fastflower <command> --help` explains one.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from typing import NoReturn

COMMANDS = {  # in the order in which a person meets them
    "doctor": "what this machine and a recipe lack for training",
    "demo": "the whole job on generated flowers, in minutes",
    "sample_data": "generated data sets: digits, eyes, pairs",
    "explain": "a key, or a recipe with the origin of each value and the numbers that follow",
    "diff": "the keys in which two recipes or experiments differ",
    "weights": "pretrained weights: where they come from, download, conversion",
    "convert": "photographs and labels to folds and betons",
    "lrfind": "a learning rate, by a range test",
    "train": "one fold, several, or all, with one process a GPU",
    "campaign": "many trainings: grids, folds and seeds, searches",
    "evaluate": "out-of-fold scores, calibration, Grad-CAM",
    "ensemble": "ways to combine trained members",
    "export": "the hand-in, after its gates",
    "report": "HTML or Markdown pages of experiments",
    "bench": "speed of this machine beside named peers",
}


def main() -> NoReturn:
    """Run the command that the arguments name, or list all."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.argv[:2] = [f"fastflower {name}"]
        # each command is a module that also runs by itself; only this one is imported
        runpy.run_module(f"fastflower.{name}", run_name="__main__", alter_sys=True)
        sys.exit(0)
    if name in ("", "-h", "--help", "help"):
        print(overview())
        sys.exit(0)
    if name == "predict":
        print("fastflower: the predictor runs alone: python code/predict.py <folder> <csv>", file=sys.stderr)
        sys.exit(2)
    near = difflib.get_close_matches(name, COMMANDS, n=2)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(COMMANDS)}"
    shown = name if name.isprintable() else repr(name)
    print(f"fastflower: no command {shown}; {hint}", file=sys.stderr)
    sys.exit(2)


def overview() -> str:
    """The list of commands, one line each."""
    lines = [f"  {name:<12} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastflower <command> [recipe.yaml or experiment] [key=value ...]",
            "",
            *lines,
            "",
            "fastflower <command> --help explains a command, fastflower explain a recipe's keys.",
        ]
    )


if __name__ == "__main__":
    main()
