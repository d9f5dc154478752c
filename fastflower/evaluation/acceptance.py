"""The acceptance of an experiment: its scores against the thresholds that its recipe sets beforehand."""

from __future__ import annotations

from typing import Any

from fastflower.core import metric
from fastflower.evaluation.records import ExperimentScores, MemberScores, MetricScore, Top1, Verdict
from fastflower.recipe.schema import Accept


def check(scores: ExperimentScores, events: list[dict[str, Any]], accept: Accept) -> list[Verdict]:
    """A verdict for each threshold that is set; a score that was not measured does not pass.

    A verdict compares the value alone; the interval shows how certain it is.
    """
    verdicts: list[Verdict] = []
    if accept.clean_min is not None:
        verdicts.append(_at_least("clean top-1", scores.fused.clean, accept.clean_min))
    if accept.corrupted_min is not None:
        verdicts.append(_at_least("corrupted top-1", scores.fused.corrupted, accept.corrupted_min))
    if accept.score is not None:
        verdicts.append(_by_metric(scores.fused.selected, accept.score))
    if accept.gain_min is not None:
        verdicts.append(_gain(scores, accept.gain_min))
    if accept.macro_drop_max is not None:
        falls = [macro_f1_fall(member, events) for member in scores.members]
        measured = [fall for fall in falls if fall is not None]
        worst = max(measured) if measured and len(measured) == len(falls) else None
        verdicts.append(
            Verdict(
                name="fall of macro F1, worst member",
                got=worst,
                n=None,
                top1_low=None,
                top1_high=None,
                bound="at most",
                wanted=accept.macro_drop_max,
                passed=worst is not None and worst <= accept.macro_drop_max,
            )
        )
    return verdicts


def _at_least(name: str, score: Top1 | None, wanted: float) -> Verdict:
    return Verdict(
        name=name,
        got=score.top1 if score else None,
        n=score.n if score else None,
        top1_low=score.top1_low if score else None,
        top1_high=score.top1_high if score else None,
        bound="at least",
        wanted=wanted,
        passed=score is not None and score.top1 >= wanted,
    )


def _gain(scores: ExperimentScores, wanted: float) -> Verdict:
    """The verdict on the ensemble's gain over its best run; a single run has none."""
    gain = scores.fused.over_best
    return Verdict(
        name=f"gain over {gain.best}" if gain else "gain over the best run",
        got=gain.gain if gain else None,
        n=gain.n if gain else None,
        top1_low=gain.low if gain else None,
        top1_high=gain.high if gain else None,
        bound="at least",
        wanted=wanted,
        passed=gain is not None and gain.gain >= wanted,
    )


def _by_metric(selected: MetricScore | None, wanted: float) -> Verdict:
    """The verdict on the score by select.metric; a loss must not exceed its threshold."""
    parsed = metric.parse(selected.metric) if selected else None
    falls = parsed is not None and parsed.shown(1.0) < 0
    got = selected.value if selected else None
    passed = got is not None and (got <= wanted if falls else got >= wanted)
    return Verdict(
        name=parsed.title if parsed else "score",
        got=got,
        n=selected.n if selected else None,
        top1_low=selected.low if selected else None,
        top1_high=selected.high if selected else None,
        bound="at most" if falls else "at least",
        wanted=wanted,
        passed=passed,
        metric=selected.metric if selected else "",
    )


def macro_f1_fall(member: MemberScores, events: list[dict[str, Any]]) -> float | None:
    """A member's macro F1 below the best of its run at the same image size; None when the events lack its epoch."""
    identity = {"event": "epoch", "backbone": member.backbone, "fold": member.fold, "seed": member.seed}
    epochs = [row for row in events if all(row.get(key) == value for key, value in identity.items())]
    chosen = next((row for row in epochs if row["epoch"] == member.epoch), None)
    name = f"macro_f1_{member.weights}"
    if chosen is None or chosen.get(name) is None:
        return None
    course = [
        value
        for row in epochs
        if row["size"] == chosen["size"]
        for key, value in row.items()
        if key.startswith("macro_f1_") and value is not None
    ]
    return max(course) - float(chosen[name])


def console_lines(verdicts: list[Verdict]) -> list[str]:
    """A line for each verdict."""
    return [
        f"{'accepted' if row.passed else 'REFUSED '}  {row.name}: "
        f"{'not measured' if row.got is None else format(row.got, '.4f')}, {row.bound} {row.wanted:g}"
        + (f" (95%: {row.top1_low:.3f}-{row.top1_high:.3f}, n = {row.n})" if row.n else "")
        for row in verdicts
    ]
