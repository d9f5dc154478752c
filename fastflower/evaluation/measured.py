"""Records of measurements of evaluate beside the scores: views.json, priors.json and leak.json of an experiment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastflower.evaluation.paired import PairedGain
from fastflower.evaluation.records import REMEDY
from fastflower.recipe.schema import Tta


@dataclass(frozen=True, kw_only=True)
class ViewGain:
    """A kind of view: its number of views of an image, their ms, and the top-1 and NLL that they gain."""

    name: str
    views: int
    ms: float
    gain: PairedGain
    nll: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class ViewTable:
    """views.json: every kind of view of the recipe's `tta`, and the views `kept`, which are all without tta.prune.

    plain: top-1 of the plain view at the trained size; all: that of all views; over_plain: the gain. pruned: the gain
    of the views worth keeping over all views, chosen on other images than scored. ms: of all, pruned_ms: of these.
    """

    FILE: ClassVar[str] = "views.json"
    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = REMEDY

    tta: Tta
    kept: Tta
    plain: float
    all: float
    over_plain: PairedGain
    pruned: PairedGain
    ms: float
    pruned_ms: float
    rows: list[ViewGain]


@dataclass(frozen=True, kw_only=True)
class PriorEffect:
    """The effect of one correction on out-of-fold images, weighted as if their classes were distributed as `images`.

    target: the correction's distribution, or em. top1 and nll before and after it; distance: half the sum of absolute
    differences between the correction's distribution and that of the images.
    """

    images: str
    target: str
    before: float
    gain: PairedGain
    nll_before: float
    nll_after: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class Priors:
    """priors.json: the class distributions of an experiment's fused set, and the effects of correcting them.

    source: for which its calibrated probabilities hold; given: of the file that bundle.prior names.
    """

    FILE: ClassVar[str] = "priors.json"
    FORMAT: ClassVar[int] = 2
    REMEDY: ClassVar[str] = REMEDY

    n: int
    class_ids: list[str]
    given: list[float] | None
    source: list[float]
    rows: list[PriorEffect]


@dataclass(frozen=True, kw_only=True)
class Leak:
    """leak.json: the top-1 of a fused set, and with the leak of a plain stratified split left in.

    copies: of the n scored images, those with a near-duplicate. leaked: of these, so many on average that the plain
    split validates while a near-duplicate trains. inflation: the gain of the score with the leak.
    """

    FILE: ClassVar[str] = "leak.json"
    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = REMEDY

    n: int
    splits: int
    copies: int
    leaked: float
    top1: float
    inflation: PairedGain

    @property
    def line(self) -> str:
        """A sentence on the inflation; empty without near-duplicates."""
        if not self.copies:
            return ""
        return (
            f"near-duplicates: {self.copies} of {self.n} images have one; a plain split in {self.splits} would train "
            f"on copies of {self.leaked:.0f} that it validates, and top-1 would have been inflated by up to "
            f"{self.inflation.gain:+.4f} ({self.inflation.low:+.4f} to {self.inflation.high:+.4f}), had the network "
            "remembered their labels"
        )
