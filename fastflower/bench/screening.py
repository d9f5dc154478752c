"""`bench screening`: which parts of a recipe matter, from eight trainings for up to five parts, or twelve for nine.

Each training changes about half of the parts, by a design of Plackett and Burman (1946): half of the trainings have a
part and half lack it, with every other part equally often on either side. A gain is the mean over the one half less
that over the other, image by image, so all trainings count for every part, where `bench ablation` compares two. The
price: parts that matter more, or less, together than apart blur the gains of others. What stands out deserves a
training beside the recipe itself, on another fold. Corrupted images are scored with robust.enabled=true.

Columns of the design without a part show what chance alone does, so at least two stay empty. Trainings are scored at
their last epoch as in `bench ablation`; a stopped screening continues with the same command.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from fastflower.bench.ablation import PARTS, Hits, Row, hits_over, opposite, table, train
from fastflower.core import files, runs
from fastflower.core.errors import InputError
from fastflower.evaluation.paired import PairedGain, paired_gain
from fastflower.recipe import Recipe, arguments, checks, load

FIRST_ROWS = ("+++-+--", "++-+++---+-")  # of the designs, + where a training changes the part of a column
EMPTY = 2  # columns at least
MOST = len(FIRST_ROWS[-1]) - EMPTY  # parts


@dataclass(frozen=True)
class Factor:
    """A part and the changes that leave it out or add it; or changes of the user's, which the recipe lacks."""

    title: str
    in_recipe: bool
    changes: tuple[str, ...]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m fastflower.bench screening",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=[], help="parts of bench ablation")
    parser.add_argument(
        "--changes",
        nargs="+",
        default=[],
        metavar="key=value",
        help="other values to try; several in quotes are one part",
    )
    args = parser.parse_intermixed_args(argv)
    base = load(arguments.locate(args.recipe), args.overrides)
    factors = chosen(base, args.parts, args.changes)
    words = [str(arguments.locate(args.recipe)), *args.overrides]
    words += [f"eval.every={base.sched.cosine_epochs}", "es.enabled=false"]
    trainings = [words]  # the first is the recipe itself
    for number, changed in enumerate(design(len(factors))[1:], 1):
        trainings.append([*words, *changes_of(factors, changed), f"exp.name={base.exp.name}-screen{number}"])
    for training in trainings:  # all before the first training
        checks.check(load(training[0], training[1:]))
    ledger = runs.RESULTS / base.exp.name / "ablation.json"
    files.check_writable(ledger.parent)
    hits = [
        hits_over(train(training, ledger, [base.seed]), corrupted=base.robust.enabled)
        for training in trainings
    ]
    print("\n" + "\n".join(report(hits, factors)))
    return 0


def chosen(base: Recipe, parts: list[str], changes: list[str]) -> list[Factor]:
    """The factors in the order of the columns; InputError for none, and for too many."""
    factors = [
        Factor(part.title, part.present(base), opposite(part, base))
        for part in (PARTS[name] for name in parts)
    ]
    factors += [Factor("-", False, tuple(change.split())) for change in changes]
    if not 0 < len(factors) <= MOST:
        raise InputError(
            f"--parts and --changes: got {len(factors)} together; give 1 to {MOST}, so that two columns of the design "
            "stay empty and show the noise"
        )
    return factors


def design(factors: int) -> np.ndarray:
    """The columns that each training changes, boolean (8, 7) or (12, 11); the first training changes none."""
    row = next(row for row in FIRST_ROWS if factors + EMPTY <= len(row))
    first = np.array([sign == "+" for sign in row])
    return np.stack([np.zeros(len(row), bool), *(np.roll(first, shift) for shift in range(len(row)))])


def changes_of(factors: list[Factor], changed: np.ndarray) -> list[str]:
    """The changes of one training: those of each factor whose column it changes."""
    return [
        word for factor, change in zip(factors, changed, strict=False) if change for word in factor.changes
    ]


def effect(scores: np.ndarray, changed: np.ndarray, *, in_recipe: bool) -> PairedGain:
    """The gain on N images of having a part, from the hits of all T trainings (T, N) and which of them changed it."""
    without, having = scores[~changed].mean(0), scores[changed].mean(0)
    return paired_gain(having, without) if in_recipe else paired_gain(without, having)


def report(hits: list[Hits], factors: list[Factor]) -> list[str]:
    """The table of the gains, and what the empty columns say of the noise; hits as in the rows of the design."""
    columns = design(len(factors)).T
    scores = {kind: np.stack([getattr(h, kind) for h in hits]) for kind in ("clean", "corrupted")}
    scores = {kind: shares for kind, shares in scores.items() if not np.isnan(shares).any()}
    rows = []
    for changed, factor in zip(columns, factors, strict=False):
        gains = {kind: effect(shares, changed, in_recipe=factor.in_recipe) for kind, shares in scores.items()}
        change = f"`{' '.join(factor.changes)}`"
        rows.append(Row(factor.title, factor.in_recipe, change, gains["clean"], gains.get("corrupted")))
    lines = [
        line.rstrip("|").rpartition("|")[0] + "|" for line in table(rows, hits[0])[2:]
    ]  # without the minutes
    noise = []
    for kind, shares in scores.items():
        chance = [100 * effect(shares, column, in_recipe=False).gain for column in columns[len(factors) :]]
        error = np.sqrt(np.mean(np.square(chance)))
        noise.append(f"{kind} {', '.join(f'{gain:+.1f}' for gain in chance)} (standard error {error:.1f})")
    return [
        table([], hits[0])[0],
        f"The {len(hits)} trainings, clean: {', '.join(f'{score:.3f}' for score in scores['clean'].mean(1))}.",
        "",
        *lines,
        "",
        f"Columns without a part, in points: {'; '.join(noise)}.",
    ]
