"""Records of the evaluation: scores.json, temperature.json and ensemble.json.

Scores are fractions in 0..1, NLL in nats. `_low` and `_high` are the ends of 95% intervals. `label` and `guess` are
the class_idx of the label and of the prediction, `index` is a row of folds.csv.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fastflower.evaluation.paired import PairedGain

REMEDY = "run python -m fastflower.evaluate again"


@dataclass(frozen=True, kw_only=True)
class Top1:
    """Top-1, or another mean of n values in 0..1, with its Wilson interval."""

    n: int
    top1: float
    top1_low: float
    top1_high: float


@dataclass(frozen=True, kw_only=True)
class ViewScores(Top1):
    """The scores of `core.scores.scores`; precision, recall and f1 are those of the second of two classes."""

    top5: float
    macro_recall: float
    macro_f1: float
    nll: float
    ece: float
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None


@dataclass(frozen=True, kw_only=True)
class CleanScores(ViewScores):
    """The scores of the mean over the views, with their intervals; those of a single image's NLL are open (null)."""

    top5_low: float
    top5_high: float
    macro_recall_low: float
    macro_recall_high: float
    macro_f1_low: float
    macro_f1_high: float
    nll_low: float
    nll_high: float | None
    ece_low: float
    ece_high: float


@dataclass(frozen=True, kw_only=True)
class CorruptionScores(ViewScores):
    """One corruption; drop: of top-1 against clean; consistency: fraction of predictions that stay the clean ones."""

    kind: str
    level: str
    drop: float
    consistency: float


@dataclass(frozen=True, kw_only=True)
class MeanTop1(Top1):
    """Means over the levels of a kind, or over the kinds of a level."""

    drop: float
    consistency: float


@dataclass(frozen=True, kw_only=True)
class CorruptedScores(MeanTop1):
    """Means over all corruptions, and each of them."""

    top5: float
    macro_recall: float
    macro_f1: float
    nll: float
    ece: float
    kinds: dict[str, MeanTop1]
    levels: dict[str, MeanTop1]
    combos: list[CorruptionScores]


@dataclass(frozen=True, kw_only=True)
class TemperatureFit:
    """The temperature t fitted on a set of logits; NLL and ECE of its n clean images before and after.

    note: why the images did not decide t; empty when they did.
    """

    t: float
    fit_on: str
    n: int
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Temperature(TemperatureFit):
    """A fitted temperature with the intervals after it."""

    nll_after_low: float
    nll_after_high: float | None
    ece_after_low: float
    ece_after_high: float


@dataclass(frozen=True, kw_only=True)
class PartScores(Top1):
    """Head, middle or tail: its number of classes, and the images of its smallest and its largest class."""

    classes: int
    images: tuple[int, int]
    macro_recall: float


@dataclass(frozen=True, kw_only=True)
class MetricScore:
    """The score by select.metric as people read it: a loss alone is positive."""

    metric: str
    n: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class SetScores:
    """All scores of one set of logits. clean: mean over the views; single, corrupted, s: one view, as in training.

    selected: the score by select.metric, None in files of a version without it.
    """

    name: str
    n: int
    folds: list[int]
    clean: CleanScores
    single: ViewScores
    corrupted: CorruptedScores | None
    s: Top1
    temperature: Temperature | None
    parts: dict[str, PartScores]
    selected: MetricScore | None = None


@dataclass(frozen=True, kw_only=True)
class MemberScores(SetScores):
    """A member on its own fold; the other fields are those of MemberInfo."""

    backbone: str
    fold: int
    seed: int
    epoch: int
    checkpoint: str
    weights: str
    head: str
    stored: float | None
    size: tuple[int, int]
    views: list[tuple[int, int, bool]]
    mb: float
    ms: float


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean over folds and sample deviation; None for one fold."""

    mean: float
    std: float | None


@dataclass(frozen=True, kw_only=True)
class RunScores(SetScores):
    """A run over its folds; missing: folds without a member; over_folds: `section.score` -> its spread."""

    backbone: str
    seed: int
    missing: list[int]
    over_folds: dict[str, Spread]


@dataclass(frozen=True, kw_only=True)
class GainOverBest(PairedGain):
    """The gain in top-1 of a fused set over the run that is best on the same images, which favours that run."""

    best: str


@dataclass(frozen=True, kw_only=True)
class FusedScores(SetScores):
    """The weighted mean of the runs; weights: run -> weight, as they are handed in."""

    runs: list[str]
    weights: dict[str, float]
    over_best: GainOverBest | None = None


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One class; images: all of the data set, n: those of the fused set."""

    class_idx: int
    category_id: str
    part: str
    images: int
    n: int
    precision: float
    precision_low: float
    precision_high: float
    recall: float
    recall_low: float
    recall_high: float
    f1: float
    corrupted_recall: float | None
    drop: float | None
    name: str


@dataclass(frozen=True, kw_only=True)
class ClassRecall:
    """Recall of a class under one corruption."""

    kind: str
    level: str
    class_idx: int
    n: int
    recall: float


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """The n images of one bin of confidence, before or after the temperature."""

    when: Literal["before", "after"]
    confidence: float
    top1: float
    n: int


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """One image; top: the most likely classes as (class_idx, probability)."""

    index: int
    fold: int
    filename: str
    label: int
    guess: int
    p_label: float
    p_guess: float
    loss: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Suspect(ImageScores):
    """A likely label error and the class_idx that fits better."""

    suggested: int


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """Two classes, the images of each that are taken for the other, examples, and a typical image of each."""

    a: int
    b: int
    a_as_b: int
    b_as_a: int
    wrong: list[ImageScores]
    typical: list[ImageScores | None]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A score against its threshold; got and its interval are None when it was not measured.

    metric: that of a score by select.metric, empty for a fraction in 0..1.
    """

    name: str
    got: float | None
    n: int | None
    top1_low: float | None
    top1_high: float | None
    bound: Literal["at least", "at most"]
    wanted: float
    passed: bool
    metric: str = ""


@dataclass(frozen=True, kw_only=True)
class ErrorAnalysis:
    """The errors of the fused set: cells of confusion matrices are (label, guess, images), wrong is (index, fold)."""

    wrong: list[tuple[int, int]]
    confusion: list[tuple[int, int, int]]
    confusion_by_fold: dict[int, list[tuple[int, int, int]]]
    pairs: list[ConfusedPair]
    mistakes: list[ImageScores]
    right: list[ImageScores]
    suspects: list[Suspect]


@dataclass(frozen=True, kw_only=True)
class ExperimentScores(ErrorAnalysis):
    """scores.json: an experiment's members, runs and fused set, and the analysis of its errors.

    missing: folds of folds.csv outside the fused set; sizes: (fold, images) of the fused set.
    """

    FORMAT: ClassVar[int] = 3
    REMEDY: ClassVar[str] = REMEDY

    fastflower: str
    exp: str
    alpha: float
    bins: int
    weighting: str
    hand_weights: Any
    space: str = "logits"  # or probabilities: what was averaged over the runs
    class_hash: str
    folds_hash: str
    folds: list[int]
    missing: list[int]
    sizes: list[tuple[int, int]]
    members: list[MemberScores]
    runs: list[RunScores]
    fused: FusedScores
    acceptance: list[Verdict]
    advice: list[str]
    classes: list[ClassScores]
    robust_classes: list[ClassRecall]
    reliability: list[ReliabilityBin]


@dataclass(frozen=True, kw_only=True)
class Temperatures:
    """temperature.json: the temperatures of the fused set, of runs by name and of members by checkpoint.

    weights, folds and missing are those of the fused set; hand_weights is the recipe's ensembling.weights.
    """

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = REMEDY

    fused: Temperature | None
    weighting: str
    hand_weights: Any
    space: str = "logits"  # or probabilities: what was averaged over the runs
    weights: dict[str, float]
    folds: list[int]
    missing: list[int]
    runs: dict[str, Temperature | None]
    members: dict[str, Temperature | None]


@dataclass(frozen=True, kw_only=True)
class MethodScores(ViewScores):
    """A way to combine runs; gain: of top-1 over the best single run, in all and in each part; score: by `metric`.

    mb and ms are the cost of its hand-in, None for one that cannot be handed in. over_best: the gain with its interval
    and test, None for the best single run, which is chosen on other images than scored.
    """

    method: str
    gain: float
    gains: list[float]
    mb: float | None
    ms: float | None
    fits: bool
    score: float | None = None
    over_best: PairedGain | None = None


@dataclass(frozen=True, kw_only=True)
class EnsembleComparison:
    """ensemble.json: the methods, the top-1 of each run, and for methods with weights run -> weight."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = "run python -m fastflower.ensemble again"

    n: int
    parts: int
    runs: list[str]
    single: list[float]
    rows: list[MethodScores]
    metric: str = ""  # select.metric, by which the best single run and the greedy choice are found
    weights: dict[str, dict[str, float]]
