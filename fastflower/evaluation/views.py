"""Views at test time, each with its gain and cost on out-of-fold images, and the choice of those worth their time.

A kind of view is what one value of the recipe's tta section adds: a size, the mirror images, a rotation. Its gain is
the top-1 that a member loses without it, averaged over the members of each image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import log_softmax

from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.evaluation.ensembles import scoring_parts
from fastflower.evaluation.logits import MemberLogits, reduce_views
from fastflower.evaluation.measured import ViewGain, ViewTable
from fastflower.evaluation.moves import Move, moves_of
from fastflower.evaluation.paired import paired_gain
from fastflower.evaluation.selected import clean_score
from fastflower.recipe import Recipe
from fastflower.recipe.schema import Tta

TOP1 = ("clean", "corrupted", "combo")  # metrics that clean images rate by top-1
View = tuple[int, int, Move, bool]  # height, width, move, mirrored


@dataclass(frozen=True)
class MemberViews:
    """A member's logits, with those of each view, float32 (N, C), and the milliseconds of each view of an image.

    scales: the sides nearest to those asked that its network takes.
    """

    member: MemberLogits
    scales: Callable[[list[int]], list[int]]
    logits: dict[View, np.ndarray]
    ms: dict[View, float]

    def of(self, tta: Tta) -> list[View]:
        """The views that a recipe asks for."""
        return views_of(self.member.info.size, self.scales(tta.scales), tta)

    def reduced(self, tta: Tta) -> MemberLogits:
        """The member as it would be with fewer views."""
        views = self.of(tta)
        info = replace(
            self.member.info,
            views=[(height, width, mirrored) for height, width, _, mirrored in views],
            ms=sum(self.ms[view] for view in views),
        )
        return replace(
            self.member, logits=reduce_views([self.logits[view] for view in views], tta.reduce), info=info
        )


def sizes_of(size: tuple[int, int], scales: list[int]) -> list[tuple[int, int]]:
    """The (height, width) of the views: of every scale, but of a member trained on oblong images only its own."""
    sizes = [(scale, scale) for scale in scales] if size[0] == size[1] else [size]
    return list(dict.fromkeys(sizes))


def views_of(size: tuple[int, int], scales: list[int], tta: Tta) -> list[View]:
    """Every size, each of its moves, plain and mirrored."""
    flips = (False, True) if tta.hflip else (False,)
    return [
        (height, width, move, flip)
        for height, width in sizes_of(size, scales)
        for move in moves_of(tta)
        for flip in flips
    ]


def without_one(tta: Tta) -> dict[str, Tta]:
    """The name of each kind of view, with a recipe that lacks it."""
    options = {}
    if len(tta.scales) > 1:
        for scale in tta.scales:
            options[f"{scale} pixels"] = replace(
                tta, scales=[other for other in tta.scales if other != scale]
            )
    if tta.hflip:
        options["mirrored"] = replace(tta, hflip=False)
    for degrees in tta.rotations:
        others = [other for other in tta.rotations if other != degrees]
        options[f"rotated by {degrees:g} degrees"] = replace(tta, rotations=others)
    if tta.shift:
        options[f"shifted by {tta.shift:g}"] = replace(tta, shift=0.0)
    if tta.vflip:
        options["upside down"] = replace(tta, vflip=False)
    if tta.quarter_turns:
        options["quarter turns"] = replace(tta, quarter_turns=False)
    if tta.crops < 1:
        options[f"crops of {tta.crops:g}"] = replace(tta, crops=1.0)
    return options


class Effects:
    """The scores of each image under any choice of views, averaged over its members; computed once for each choice.

    Logits are kept only where select.metric asks for them again: of other images, when a part is held out.
    """

    def __init__(self, members: Sequence[MemberViews], metric: str) -> None:
        self.members, self.metric = members, metric
        index, folds, self.labels = (
            np.concatenate([getattr(views.member, name) for views in members])
            for name in ("index", "fold", "class_idx")
        )
        _, first, self.rows, self.counts = np.unique(
            index, return_index=True, return_inverse=True, return_counts=True
        )
        self.parts = scoring_parts(folds[first], self.labels[first])
        self.known: dict[str, np.ndarray] = {}
        self.kept_logits: dict[str, np.ndarray] = {}

    def of(self, tta: Tta) -> np.ndarray:
        """Hits and NLL of each image under these views: float64 (2, N)."""
        key = _key(tta)
        if key not in self.known:
            self.known[key] = self._by_image(self.logits(tta))
        return self.known[key]

    def logits(self, tta: Tta) -> np.ndarray:
        """The logits (rows, C) of all members, one after another, under these views."""
        key = _key(tta)
        if key in self.kept_logits:
            return self.kept_logits[key]
        logits = np.concatenate([views.reduced(tta).logits for views in self.members])
        if self.metric not in TOP1:
            self.kept_logits[key] = logits
        return logits

    def plain(self) -> np.ndarray:
        """Hits and NLL of each image under the plain view at the trained size alone: float64 (2, N)."""
        return self._by_image(np.concatenate([views.member.single for views in self.members]))

    def ms(self, tta: Tta) -> float:
        """Milliseconds of these views of an image, the mean over the members."""
        return float(np.mean([sum(views.ms[view] for view in views.of(tta)) for views in self.members]))

    def worthwhile(self, tta: Tta, images: np.ndarray) -> Tta:
        """The views left when kinds without which the score is as high are left out, one by one, the worst first.

        images: bool (N,), those that decide; of equal scores the lower NLL decides.
        """
        while True:
            score, options = self.score(tta, images), list(without_one(tta).values())
            rated = [
                (self.score(option, images), -float(self.of(option)[1, images].mean())) for option in options
            ]
            best = max(range(len(options)), key=lambda number: rated[number], default=None)
            if best is None or rated[best][0] < score - 1e-12:
                return tta
            tta = options[best]

    def score(self, tta: Tta, images: np.ndarray) -> float:
        """The score of select.metric of the members' predictions of these images together."""
        if self.metric in TOP1:
            return float(self.of(tta)[0, images].mean())
        rows = images[self.rows]
        return clean_score(self.logits(tta)[rows], self.labels[rows], self.metric)

    def _by_image(self, logits: np.ndarray) -> np.ndarray:
        """The means of hits and NLL over the members of each image, of logits (rows, C)."""
        hits = logits.argmax(1) == self.labels
        losses = -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(self.labels)), self.labels]
        return np.stack([np.bincount(self.rows, of) / self.counts for of in (hits, losses)])


def _key(tta: Tta) -> str:
    """The text of the views alone, by which they are known."""
    return repr(replace(tta, prune=False))


def measure(members: Sequence[MemberViews], tta: Tta, metric: str = "clean") -> ViewTable:
    """The gain and cost of every kind of view, and the views kept by the score of select.metric."""
    effects = Effects(members, metric)
    plain, every = effects.plain(), effects.of(tta)
    images = np.ones(every.shape[1], dtype=bool)
    worthwhile = effects.worthwhile(tta, images)
    chosen_elsewhere = every[0].copy()
    for part in np.unique(effects.parts):
        inside = effects.parts == part
        if not inside.all():
            chosen_elsewhere[inside] = effects.of(effects.worthwhile(tta, ~inside))[0, inside]
    left = {name for name, option in without_one(tta).items() if _lacks(worthwhile, option, tta)}
    rows = []
    for name, option in without_one(tta).items():
        without = effects.of(option)
        rows.append(
            ViewGain(
                name=name,
                views=max(len(views.of(tta)) - len(views.of(option)) for views in members),
                ms=effects.ms(tta) - effects.ms(option),
                gain=paired_gain(without[0], every[0]),
                nll=float(without[1].mean() - every[1].mean()),
                kept=name not in left,
            )
        )
    return ViewTable(
        tta=tta,
        kept=worthwhile if tta.prune else tta,
        plain=float(plain[0].mean()),
        all=float(every[0].mean()),
        over_plain=paired_gain(plain[0], every[0]),
        pruned=paired_gain(every[0], chosen_elsewhere),
        ms=effects.ms(tta),
        pruned_ms=effects.ms(worthwhile),
        rows=rows,
    )


def _lacks(chosen: Tta, option: Tta, tta: Tta) -> bool:
    """True when the chosen views lack the kind that an option of all views lacks."""
    changed = [name for name in vars(tta) if getattr(option, name) != getattr(tta, name)]
    for name in changed:
        got, all_of, less = getattr(chosen, name), getattr(tta, name), getattr(option, name)
        if isinstance(all_of, list):
            return not set(all_of) - set(less) <= set(got)
        return bool(got == less)
    return False


def kept_views(recipe: Recipe) -> Recipe:
    """The recipe with the views that evaluate kept of it under tta.prune; InputError when it has not measured them."""
    if not recipe.tta.prune:
        return recipe
    path = runs.RESULTS / recipe.exp.name / ViewTable.FILE
    if not path.is_file():
        raise InputError(f"tta.prune=true needs {path}; run python -m fastflower.evaluate with it first")
    table = read_record(path, ViewTable)
    if table.tta != recipe.tta:
        raise InputError(
            f"tta.prune=true: {path} was measured with other values of tta; run python -m fastflower.evaluate with "
            "this recipe"
        )
    return replace(recipe, tta=table.kept)


def lines(table: ViewTable) -> list[list[str]]:
    """The console's table of views: a header, and a row for each kind."""
    rows = [["views", "number", "ms", "top-1 gain", "95%", "p", "NLL gain", "worth it"]]
    for row in table.rows:
        gain = row.gain
        interval = f"{gain.low:+.4f} to {gain.high:+.4f}"
        verdict = "yes" if row.kept else "no"
        numbers = [str(row.views), f"{row.ms:.1f}", f"{gain.gain:+.4f}", interval, gain.p_text]
        rows.append([row.name, *numbers, f"{row.nll:+.4f}", verdict])
    return rows


def conclusion(table: ViewTable) -> str:
    """A sentence on the views worth their time."""
    if all(row.kept for row in table.rows):
        return "each kind of view is worth its time: without it, the score is lower"
    done = "left out" if table.tta.prune else "tta.prune=true leaves the others out"
    return (
        f"the views worth their time take {table.pruned_ms:.1f} of {table.ms:.1f} ms; top-1 changes by "
        f"{table.pruned.text}, chosen on other images than scored; {done}"
    )
