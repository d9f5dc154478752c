"""`bench ablation`: what each part of a recipe is worth, by trainings with and without it on the same images.

One part at a time is left out where the recipe has it, and added where it lacks it. `campaign` trains each of these
recipes on the folds of data.fold, so a stopped ablation continues with the same command. The last epoch is scored, with
averaged weights where there are any: nothing is chosen on the images that score it. Out of fold, the hits of both
trainings are compared image by image: the gain of having the part, its 95% interval, and the p of McNemar's exact test.
With --seeds, an image counts by its share of hits over the seeds, and a corrupted one by that over the corruptions too.
Minutes are of the processor, start-up included, because other work on the machine hardly changes them.

Two parts choose among the same weights: `select` compares the best epoch by S with the best by clean top-1 in one
training, and the last row compares all views of tta with one.

robust.enabled=false saves the trainings the scoring of corrupted images; it is done here afterwards, so convert must
have run with robust.enabled=true.
"""

from __future__ import annotations

import argparse
import importlib
import math
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from fastflower.core import checkpoint, files, runs, scores
from fastflower.core.errors import EnvironmentFault
from fastflower.core.records import read_record, write_record
from fastflower.data.folds import read_folds
from fastflower.evaluation.paired import PairedGain, paired_gain
from fastflower.recipe import Recipe, arguments, checks, derived, load, starting_point

INTERRUPTED = 130  # exit code of a campaign after Ctrl-C


@dataclass(frozen=True)
class Part:
    """A part of a recipe: whether the recipe has it, and the changes that leave it out and that add it."""

    title: str
    present: Callable[[Recipe], bool]
    leave_out: tuple[str, ...]
    add: tuple[str, ...]


PARTS = {  # by the suffix of their experiments; added with the defaults of the schema
    "llrd": Part(
        "layer-wise rates", starting_point.layerwise, ("llrd.enabled=false",), ("llrd.enabled=true",)
    ),
    "ema": Part("EMA", lambda r: r.ema.enabled, ("ema.enabled=false",), ("ema.enabled=true",)),
    "sizes": Part(
        "progressive sizes",
        lambda r: len(derived.image_sizes(r)) > 1,
        ("data.img_size=[{last}]", "data.size_epochs=auto"),
        ("data.img_size=[{smaller},{last}]", "data.size_epochs=auto"),
    ),
    "mixing": Part(
        "MixUp and CutMix", lambda r: r.reg.mix_prob > 0, ("reg.mix_prob=0",), ("reg.mix_prob=0.4",)
    ),
    "smoothing": Part("label smoothing", lambda r: r.reg.ls_eps > 0, ("reg.ls_eps=0",), ("reg.ls_eps=0.05",)),
    "erasing": Part("random erasing", lambda r: r.reg.erase_p > 0, ("reg.erase_p=0",), ("reg.erase_p=0.1",)),
    "jitter": Part(
        "colour jitter",
        lambda r: any(r.aug.jitter),
        ("aug.jitter=[0,0,0,0]",),
        ("aug.jitter=[0.2,0.2,0.2,0.1]",),
    ),
    "sampler": Part(
        "weighted sampler",
        lambda r: r.sampler.type != "none",
        ("sampler.type=none",),
        ("sampler.type=weighted_en",),
    ),
}
SELECT = "select"


@dataclass(frozen=True)
class Spent:
    """Processor seconds that the trainings of each experiment took, all folds together."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "remove it; minutes are then those of the trainings still to come"

    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hits:
    """Hits on N images, in 0..1: with the views of tta (N,), with one view (N,), and over the corruptions (N,).

    corrupted is NaN where corrupted images were not scored.
    """

    clean: np.ndarray
    single: np.ndarray
    corrupted: np.ndarray


@dataclass(frozen=True)
class Row:
    """The gain of having a part, and the processor minutes with and without it; None: nothing was trained."""

    title: str
    in_recipe: bool
    change: str
    clean: PairedGain
    corrupted: PairedGain | None = None
    minutes: tuple[float, float] | None = None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m fastflower.bench ablation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="recipe file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to it")
    names = [*PARTS, SELECT]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="those to try (all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds of each training (the recipe's)")
    args = parser.parse_intermixed_args(argv)
    base = load(arguments.locate(args.recipe), args.overrides)
    words = [
        str(arguments.locate(args.recipe)),
        *args.overrides,
        f"eval.every={base.sched.cosine_epochs}",
        "es.enabled=false",
    ]
    variants = {name: variant(words, base, name) for name in args.parts if name in PARTS}
    by_score = [*words, "eval.every=1", "robust.enabled=true", "select.metric=combo"]
    by_score += [f"exp.name={base.exp.name}-{SELECT}"]
    chosen = [words, *variants.values(), *([by_score] if SELECT in args.parts else [])]
    for changed in chosen:  # all before the first training
        checks.check(load(changed[0], changed[1:]))
    ledger = runs.RESULTS / base.exp.name / "ablation.json"
    files.check_writable(ledger.parent)
    seeds = args.seeds or [base.seed]
    count = len(derived.fold_numbers(base)) * len(seeds)
    reference = hits_over(train(words, ledger, seeds))
    rows: list[Row] = []
    for name, changed in variants.items():
        other = hits_over(train(changed, ledger, seeds))
        minutes = minutes_of(base, name, ledger, trainings=count)
        row = compare(PARTS[name], base, reference=reference, other=other, minutes=minutes)
        rows.append(replace(row, change=f"`{' '.join(changed[len(words) : -1])}`"))
        print("\n" + "\n".join(table(rows, reference)), flush=True)
    if SELECT in args.parts:
        trained = train(by_score, ledger, seeds)
        clean, combo = (hits_over(trained, f"best_{kind}__*.pth") for kind in ("clean", "combo"))
        rows.append(
            Row(
                title="best epoch by S",
                in_recipe=base.select.metric == "combo",
                change="best by clean, of the same training",
                clean=paired_gain(clean.clean, combo.clean),
                corrupted=paired_gain(clean.corrupted, combo.corrupted),
                minutes=minutes_of(base, SELECT, ledger, trainings=count)[::-1],
            )
        )
    views = len(base.tta.scales) * (1 + base.tta.hflip)
    if views > 1:
        gain = paired_gain(reference.single, reference.clean)
        rows.append(Row(f"{views} views at test time", True, "one view of the same members", gain))
    print("\n" + "\n".join(table(rows, reference)))
    return 0


def variant(words: list[str], base: Recipe, name: str) -> list[str]:
    """The arguments of the recipe without a part that it has, or with one that it lacks, as `<exp>-<name>`."""
    return [*words, *opposite(PARTS[name], base), f"exp.name={base.exp.name}-{name}"]


def opposite(part: Part, base: Recipe) -> tuple[str, ...]:
    """The changes that leave a part out where the recipe has it, or add it where it lacks it."""
    height, width = derived.image_sizes(base)[-1]
    smaller = [side * 3 // 4 // 32 * 32 or side for side in (height, width)]
    sizes = {"last": f"[{height},{width}]", "smaller": f"[{smaller[0]},{smaller[1]}]"}
    changes = part.leave_out if part.present(base) else part.add
    return tuple(change.format(**sizes) for change in changes)


def train(words: list[str], ledger: Path, seeds: Sequence[int]) -> list[Recipe]:
    """Train what is not finished of a recipe with each seed; returns the recipes."""
    return [train_seed([*words, f"seed={seed}"], ledger) for seed in seeds]


def train_seed(words: list[str], ledger: Path) -> Recipe:
    """Train what is not finished of a recipe, and add its seconds to the ledger; returns the recipe.

    Raises EnvironmentFault when a training fails, and KeyboardInterrupt when it was interrupted.
    """
    recipe = load(words[0], words[1:])
    spent = read_record(ledger, Spent) if ledger.is_file() else Spent()
    before = children_seconds()
    code = importlib.import_module("fastflower.campaign.__main__").main([*words, "--no-ray"])
    if children_seconds() - before > 1:
        seconds = spent.seconds.get(recipe.exp.name, 0.0) + children_seconds() - before
        write_record(ledger, Spent({**spent.seconds, recipe.exp.name: round(seconds, 1)}))
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise EnvironmentFault(f"a training of {recipe.exp.name} failed; run the same command again")
    return recipe


def minutes_of(base: Recipe, name: str, ledger: Path, *, trainings: int) -> tuple[float, float]:
    """Minutes that a training of the recipe itself took, and one of its counterpart; NaN where it is not known."""
    spent = read_record(ledger, Spent).seconds if ledger.is_file() else {}
    own, theirs = (spent.get(exp, math.nan) for exp in (base.exp.name, f"{base.exp.name}-{name}"))
    return own / 60 / trainings, theirs / 60 / trainings


def children_seconds() -> float:
    """Processor seconds of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def hits_over(recipes: Sequence[Recipe], pattern: str = "", *, corrupted: bool = True) -> Hits:
    """The mean hits of recipes that differ in their seeds."""
    each = [hits_of(recipe, pattern, corrupted=corrupted) for recipe in recipes]
    means = {kind: np.mean([getattr(hits, kind) for hits in each], 0) for kind in vars(each[0])}
    return Hits(**means)


def hits_of(recipe: Recipe, pattern: str, *, corrupted: bool) -> Hits:
    """The hits of an experiment's members out of fold, by default of the last averaged weights; logits are kept."""
    import torch  # here, as below: a refusal does not spend the seconds

    from fastflower.evaluation import inference, logits

    pattern = pattern or ("ema_best__*.pth" if recipe.ema.enabled else "auto")
    recipe = replace(recipe, robust=replace(recipe.robust, enabled=corrupted))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = runs.RESULTS / recipe.exp.name / "ablation" / pattern.partition("__")[0]
    paths = runs.find_members(recipe.exp.name, pattern, metric=recipe.select.metric)
    members = []
    for fold in derived.fold_numbers(recipe):
        stem = runs.Run(recipe.exp.name, recipe.model.backbone, fold, recipe.seed).stem
        (path,) = (path for path in paths if f"__{stem}_" in path.name)
        saved = logits.logits_path(folder, backbone=recipe.model.backbone, fold=fold, seed=recipe.seed)
        member = logits.load_logits(saved) if saved.is_file() else None
        whole = member is not None and (len(member.corrupt) or not corrupted)
        if member is None or not whole or member.info.seal != checkpoint.seal(path):
            member = inference.predict(path, recipe, device)
            logits.save_logits(folder, member)
        members.append(member)
    run = logits.assemble(members, read_folds(Path(recipe.data.home) / "folds.csv").fold)
    truth = run.class_idx
    return Hits(
        clean=run.logits.argmax(1) == truth,
        single=run.single.argmax(1) == truth,
        corrupted=(run.corrupt.argmax(2) == truth).mean(0) if corrupted else np.full(len(truth), np.nan),
    )


def compare(part: Part, base: Recipe, *, reference: Hits, other: Hits, minutes: tuple[float, float]) -> Row:
    """The gain of having a part; `reference` and the first of the minutes are the recipe's own."""
    present = part.present(base)
    having, lacking = (reference, other) if present else (other, reference)
    return Row(
        title=part.title,
        in_recipe=present,
        change="",
        clean=paired_gain(lacking.clean, having.clean),
        corrupted=paired_gain(lacking.corrupted, having.corrupted),
        minutes=minutes if present else minutes[::-1],
    )


def table(rows: list[Row], reference: Hits) -> list[str]:
    """A line on the recipe itself, and a Markdown table of the gains in percentage points."""
    n = len(reference.clean)
    stated = []
    for name, hits in (("clean", reference.clean), ("corrupted", reference.corrupted)):
        if np.isnan(hits).any():
            continue
        low, high = scores.wilson(float(hits.sum()), n)
        stated.append(f"{name} {hits.mean():.4f} (95% {low:.3f} to {high:.3f})")
    lines = [
        f"The recipe itself, out of fold, n = {n}: {', '.join(stated)}.",
        "",
        "| part | in the recipe | without it, or with it | clean top-1 with it, points | p | corrupted, points | p "
        "| CPU-minutes a fold with, without |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        minutes = "-" if row.minutes is None else ", ".join(f"{minutes:.2f}" for minutes in row.minutes)
        cells = [row.title, "yes" if row.in_recipe else "no", row.change, *cell(row.clean)]
        lines.append(f"| {' | '.join([*cells, *cell(row.corrupted), minutes])} |")
    return lines


def cell(gain: PairedGain | None) -> tuple[str, str]:
    """A gain in percentage points with its interval, and p."""
    if gain is None:
        return "-", "-"
    points = [100 * value for value in (gain.gain, gain.low, gain.high)]
    return f"{points[0]:+.1f} ({points[1]:+.1f} to {points[2]:+.1f})", gain.p_text
