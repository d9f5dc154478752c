"""Best weights, early stopping and the macro alarm over series of scores; gathering ranks; means over corruptions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from fastflower.callbacks import scoring as replicas
from fastflower.callbacks.scoring import EpochScores, Scoring, by_kind, check_replicas, checksum, in_row_order
from fastflower.callbacks.selection import Candidate, Selection, prefer
from fastflower.core.errors import CorruptionError, Diverged
from fastflower.recipe import load
from fastflower.recipe.derived import derive
from fastflower.recipe.schema import Es, Select


def one(clean: float, corrupted: float | None = None, macro: float = 0.5, finite: bool = True) -> Candidate:
    return Candidate(clean, corrupted, macro, val_loss=1 - clean, finite=finite)


def machine(stages: int = 1, metric: str = "combo", **es: object) -> Selection:
    return Selection(Select(metric=metric), Es(**{"patience": 3, **es}), stages)


def run(selection: Selection, series: list[float], stage: int = 0, start: int = 1) -> list[int]:
    """The epochs at which the machine asked to stop."""
    return [
        epoch
        for epoch, value in enumerate(series, start)
        if selection.update(epoch, stage, {"raw": one(value, value)}).stop
    ]


def test_s_is_seven_tenths_clean_and_three_tenths_corrupted():
    verdict = machine().update(1, 0, {"raw": one(0.9, 0.8)})
    assert verdict.s["raw"] == pytest.approx(0.87)
    assert machine().update(1, 0, {"raw": one(0.9)}).s["raw"] == 0.9  # no corrupted set


def test_ties_keep_the_earlier_epoch():
    selection = machine()
    run(selection, [0.9, 0.9])
    assert selection.best.epoch == 1


def test_of_raw_and_ema_the_higher_is_best_and_ema_wins_ties():
    higher = machine().update(1, 0, {"raw": one(0.9), "ema": one(0.8)})
    tie = machine().update(1, 0, {"raw": one(0.9), "ema": one(0.9)})
    assert (higher.chosen, tie.chosen) == ("raw", "ema")
    assert higher.new == {"best_clean": "raw", "best_combo": "raw", "ema_best": "ema"}
    assert prefer({"raw": 0.5, "swa": 0.5, "ema": 0.4}) == "swa"


def test_clean_and_combo_may_choose_different_weights():
    verdict = machine().update(1, 0, {"raw": one(0.90, 0.1), "ema": one(0.89, 0.8)})
    assert verdict.new == {"best_clean": "raw", "best_combo": "ema", "ema_best": "ema"}


def test_weights_that_are_not_finite_are_never_best():
    selection = machine()
    verdict = selection.update(1, 0, {"raw": one(0.4), "ema": one(0.9, finite=False)})
    assert verdict.chosen == "raw" and "ema_best" not in verdict.new
    assert verdict.notes == ["ema weights give non-finite scores and are left out"]
    nothing = machine().update(1, 0, {"raw": one(0.4, finite=False)})
    assert (nothing.chosen, nothing.new, nothing.stop) == ("", {}, False)


@pytest.mark.parametrize(
    "series, stops",
    [
        ([0.5, 0.5, 0.5, 0.5], [4]),
        ([0.5, 0.501, 0.502, 0.503], []),  # exactly min_delta counts
        ([0.5, 0.5005, 0.5, 0.5, 0.9], [4, 5]),  # less does not
        ([0.5, 0.4, 0.4, 0.6, 0.5, 0.5, 0.5], [7]),
    ],
)
def test_patience(series, stops):
    assert run(machine(), series) == stops


def test_small_gains_are_kept_though_they_do_not_count():
    selection = machine()
    assert run(selection, [0.5, 0.5005, 0.5009, 0.4]) == [4]
    assert (selection.best.epoch, selection.best.score) == (3, 0.5009)


def test_no_stage_before_the_last_ends_a_run():
    selection = machine(stages=2, patience=10)
    assert run(selection, [0.5] * 15, stage=0) == []
    assert run(selection, [0.5] * 12, stage=1, start=16) == [26, 27]


def test_a_larger_size_starts_anew():
    selection = machine(stages=2)
    run(selection, [0.9, 0.91], stage=0)
    verdict = selection.update(3, 1, {"raw": one(0.7, 0.7)})
    assert verdict.new == {"best_clean": "raw", "best_combo": "raw"}
    assert (selection.best.epoch, selection.best.score) == (3, 0.7)
    carried = machine(stages=2, reset_on_stage=False)
    run(carried, [0.9, 0.91], stage=0)
    assert carried.update(3, 1, {"raw": one(0.7, 0.7)}).new == {}
    assert run(carried, [0.7, 0.7], stage=1, start=4) == [5]


def test_early_stopping_can_be_off():
    selection = machine(enabled=False)
    assert run(selection, [0.5] * 30) == []
    assert selection.update(31, 0, {"raw": one(0.5, 0.5)}).patience_left is None


def test_the_watched_score_can_be_clean():
    selection = machine(metric="clean")
    selection.update(1, 0, {"raw": one(0.9, 0.1)})
    selection.update(2, 0, {"raw": one(0.8, 0.9)})
    assert selection.best.epoch == 1
    assert selection.bests["best_combo"].epoch == 2


def test_f1_can_choose_stop_and_be_kept():
    selection = Selection(Select(metric="f1"), Es(patience=2, min_delta=0.0), 1)
    course = [(0.9, 0.5), (0.8, 0.7), (0.95, 0.6), (0.99, 0.65)]  # clean top-1 and F1
    verdicts = [
        selection.update(epoch, 0, {"raw": Candidate(clean, None, 0.5, val_loss=1.0, score=f1)})
        for epoch, (clean, f1) in enumerate(course, 1)
    ]
    assert [v.score for v in verdicts] == [0.5, 0.7, 0.6, 0.65] and [v.stop for v in verdicts][-1]
    assert (selection.best.epoch, selection.best.score) == (2, 0.7)
    assert verdicts[1].new == {"best_f1": "raw"} and "best_clean" in verdicts[3].new
    assert "best_f1" not in machine(metric="clean").update(1, 0, {"raw": one(0.5)}).new


@pytest.mark.parametrize(
    ("metric", "kind", "scores", "best"),
    [
        ("macro_f1", "best_macro_f1", [0.5, 0.7, 0.6], 2),
        (
            "log_loss",
            "best_log_loss",
            [-0.9, -0.4, -0.5],
            2,
        ),  # a loss counts negative: the lowest is the best
        ("0.7*clean + 0.3*auc", "best_weighted", [0.8, 0.7, 0.9], 3),
        ("my_metrics:top", "best_own", [-1.0, -3.0, -2.0], 1),
    ],
)
def test_any_metric_chooses_stops_and_names_its_checkpoint(metric, kind, scores, best):
    selection = Selection(Select(metric=metric), Es(patience=9), 1)
    verdicts = [
        selection.update(epoch, 0, {"ema": Candidate(1 / epoch, None, 0.5, val_loss=1.0, score=score)})
        for epoch, score in enumerate(scores, 1)
    ]
    assert (selection.best.epoch, selection.best.score) == (best, scores[best - 1])
    written = [epoch for epoch, verdict in enumerate(verdicts, 1) if kind in verdict.new]
    assert written[-1] == best and selection.bests["ema_best"].epoch == best
    assert [verdict.score for verdict in verdicts] == scores
    stops = Selection(Select(metric=metric), Es(patience=2, min_delta=0.0), 1)
    course = [scores[best - 1], *[scores[best - 1] - 0.1] * 2]
    assert [
        stops.update(epoch, 0, {"raw": Candidate(epoch, None, 0.5, val_loss=1.0, score=score)}).stop
        for epoch, score in enumerate(course, 1)
    ] == [False, False, True]


def test_early_stopping_can_follow_the_validation_loss():
    selection = Selection(Select(metric="clean"), Es(patience=2, min_delta=0.01, monitor="val_loss"), 1)
    course = [(0.5, 1.0), (0.6, 0.9), (0.7, 0.895), (0.8, 0.91)]  # accuracy rises, the loss does not fall
    stops = [
        selection.update(e, 0, {"raw": Candidate(clean, None, 0.5, val_loss=loss)}).stop
        for e, (clean, loss) in enumerate(course, 1)
    ]
    assert stops == [False, False, False, True] and selection.best.epoch == 4
    assert selection.stopped == "no fall of the validation loss by 0.01 in 2 epochs up to epoch 4"


def test_the_alarm_rings_once_when_rare_classes_pay():
    selection = machine(patience=99)
    series = [(0.5, 0.50), (0.6, 0.55), (0.65, 0.545), (0.66, 0.53), (0.67, 0.52), (0.68, 0.56), (0.7, 0.50)]
    alarms = [
        selection.update(e, 0, {"raw": one(s, s, macro)}).alarm for e, (s, macro) in enumerate(series, 1)
    ]
    assert alarms == [False, False, False, True, False, False, True]


def test_equal_classes_that_recover_from_a_dip_ring_no_alarm():
    selection = machine(patience=99)
    assert not any(
        selection.update(epoch, 0, {"raw": one(s, s, s)}).alarm
        for epoch, s in enumerate([0.70, 0.81, 0.78, 0.79, 0.80, 0.82], 1)
    )


def test_state_goes_on_where_it_was():
    series = [0.5, 0.6, 0.55, 0.6, 0.58, 0.57, 0.62]
    whole = machine(patience=4)
    expected = [whole.update(e, 0, {"raw": one(v, v)}) for e, v in enumerate(series, 1)]
    first, second = machine(patience=4), machine(patience=4)
    for epoch, value in enumerate(series[:3], 1):
        first.update(epoch, 0, {"raw": one(value, value)})
    second.load_state_dict(first.state_dict())
    again = [second.update(e, 0, {"raw": one(v, v)}) for e, v in enumerate(series[3:], 4)]
    assert again == expected[3:]
    assert second == whole


def test_rows_of_all_ranks_are_sorted_and_must_be_there_once():
    parts = [(np.array([4, 0, 2]), np.array([40, 0, 20])), (np.array([3, 1]), np.array([30, 10]))]
    rows, values = in_row_order(parts, 5, "clean")
    assert rows.tolist() == [0, 1, 2, 3, 4] and values.tolist() == [0, 10, 20, 30, 40]
    with pytest.raises(RuntimeError, match="clean: 5 rows were scored, 5 of 6 different ones"):
        in_row_order(parts, 6, "clean")
    with pytest.raises(RuntimeError, match="clean: 6 rows were scored, 3 of 3"):
        in_row_order([parts[0], parts[0]], 3, "clean")


def test_kinds_are_means_over_their_levels():
    combos = [["blur", "low"], ["blur", "medium"], ["jpeg", "low"]]
    hits = np.array([1, 1, 0, 0, 1, 0], dtype=bool)
    assert by_kind(hits, combos) == {"blur": 0.5, "jpeg": 0.5}
    assert by_kind(np.array([1, 1, 1, 0, 0, 0], dtype=bool), combos) == {"blur": 0.75, "jpeg": 0.0}


def test_a_run_in_which_nothing_is_finite_ends_with_advice():
    recipe = load(None, [])
    scoring = Scoring(recipe, derive(recipe, 1), networks=list, rows={"clean": 1}, combos=[])
    row = dict.fromkeys(("top1", "top5", "macro_recall", "macro_f1", "ece"), 0.25)
    state = SimpleNamespace(timestamp=SimpleNamespace(epoch=SimpleNamespace(value=3)))
    scoring.latest = EpochScores(
        3,
        {"raw": {**row, "nll": math.nan}, "ema": {**row, "nll": 1.0}},
        {"raw": 0, "ema": 0.5},
        measured={name: {"clean": 0.25} for name in ("raw", "ema")},
    )
    scoring.eval_after_all(state, None)
    assert scoring.latest.verdict.chosen == "ema"
    scoring.latest = EpochScores(
        3,
        {"raw": {**row, "nll": math.nan}, "ema": {**row, "nll": math.inf}},
        measured={name: {"clean": 0.25} for name in ("raw", "ema")},
    )
    with pytest.raises(
        Diverged, match=r"no weights give finite scores after epoch 3; lower opt.lr_ref or opt.lr"
    ):
        scoring.eval_after_all(state, None)


def test_the_checksum_sees_a_single_bit():
    network = nn.Linear(30, 30)
    before = checksum(network)
    assert checksum(network) == before
    network.weight.data.view(-1)[7] *= 1 + 2**-23
    assert checksum(network) != before


def test_ranks_whose_weights_have_drifted_apart_are_refused(monkeypatch):
    network = nn.Linear(3, 3)
    monkeypatch.setattr(replicas.dist, "all_gather_object", lambda mine: [mine, [checksum(network)]])
    check_replicas([network])
    monkeypatch.setattr(replicas.dist, "all_gather_object", lambda mine: [mine, [mine[0] + 1]])
    with pytest.raises(
        CorruptionError, match="the ranks' weights have drifted apart; start the same command again"
    ):
        check_replicas([network])
