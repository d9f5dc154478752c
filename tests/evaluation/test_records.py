from __future__ import annotations

from pathlib import Path

import pytest

from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.records import read_record, to_plain, write_record
from fastflower.evaluation import ensembles, logits, summary
from fastflower.evaluation.records import EnsembleComparison, ExperimentScores, Temperatures
from fastflower.recipe import load
from support.fake_members import BACKBONES, classes_csv, folds, member


def scored() -> ExperimentScores:
    members = [member(fold, backbone, skill=1.2) for backbone in BACKBONES for fold in range(3)]
    return summary.summarise(members, folds(), classes=classes_csv(), recipe=load(None, ["exp.name=example"]))


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    scores, path = scored(), tmp_path / "record.json"
    write_record(path, scores)
    assert read_record(path, ExperimentScores) == scores
    temperatures = summary.temperatures(scores)
    write_record(path, temperatures)
    assert read_record(path, Temperatures) == temperatures
    sets = [logits.assemble([member(fold, backbone) for fold in range(3)], folds()) for backbone in BACKBONES]
    comparison = ensembles.compare(sets, ensembles.Budget.of(sets, load(None, []).bundle))
    write_record(path, comparison)
    assert read_record(path, EnsembleComparison) == comparison


def test_edited_and_older_scores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_record(path, scored())
    text = path.read_text()
    path.write_text(text.replace('"exp": "example"', '"exp": "other"'))
    with pytest.raises(CorruptionError, match=r"checksum differs; run python -m fastflower\.evaluate again"):
        read_record(path, ExperimentScores)
    path.write_text(text.replace('"format": 3', '"format": 2'))
    with pytest.raises(InputError, match=r"format 2, .* reads 3; run python -m fastflower\.evaluate again"):
        read_record(path, ExperimentScores)


def test_runs_that_are_fused_already_are_not_fused_again(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, members = load(None, ["exp.name=example"]), [member(fold) for fold in range(3)]
    expected = summary.summarise(members, folds(), classes=classes_csv(), recipe=recipe)
    together = summary.fused_set(members, folds(), recipe)
    monkeypatch.setattr(summary, "fuse", lambda *_, **__: pytest.fail("fused again"))
    scores = summary.summarise(members, folds(), classes=classes_csv(), recipe=recipe, fused=together)
    assert to_plain(scores) == to_plain(expected)
