"""The page's tables of further measurements by evaluate: views, other class distributions, a plain split's leak."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastflower.core import runs
from fastflower.core.records import write_record
from fastflower.evaluation import priors
from fastflower.evaluation.logits import assemble, fuse
from fastflower.evaluation.measured import Leak, ViewGain, ViewTable
from fastflower.evaluation.paired import PairedGain
from fastflower.recipe import load
from fastflower.report.__main__ import main
from fastflower.report.data_section import inflation
from support import fake_members
from support.report_parser import markdown_tables, tables, text_of


def gain(value: float, p: float | None = 0.031) -> PairedGain:
    return PairedGain(n=118, gain=value, low=value - 0.01, high=value + 0.01, gained=5, lost=1, p=p)


def test_page_and_report_show_the_score_that_chose_and_auxiliary_columns() -> None:
    folder = runs.RESULTS / "example"
    members = [fake_members.member(fold, skill=1.0) for fold in (0, 1, 2)]
    events = [row for fold in (0, 1, 2) for row in fake_members.trained(*members[0].run, fold)]
    for row in events:
        if row["event"] == "epoch":
            row |= {
                "chosen": "ema" if row["fold"] else "raw",
                "best": {"epoch": 2, "score": 0.5, "weights": "ema"},
            }
            row["aux"] = {"genus": {"raw": 0.5, "ema": 0.5 + row["epoch"] / 100}, "a|b": {"raw": 0.25}}
    scores = fake_members.experiment(folder, members, events, ["select.metric=0.5*auc + 0.5*kappa"])
    assert scores.fused.selected is not None
    main(["example"])
    main(["example", "--format", "md"])
    html, report = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    rows, best = tables(html)["auxiliary"], {}
    for event in events:
        if event["event"] == "epoch":
            best[event["fold"]] = event["best"]["epoch"]
    assert len(rows) == 6
    for fold, (genus, other) in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        epoch = best[fold]
        chosen = next(e for e in events if e["event"] == "epoch" and (e["fold"], e["epoch"]) == (fold, epoch))
        value = chosen["aux"]["genus"][chosen["chosen"]]
        assert genus[1:] == ["genus", str(epoch), chosen["chosen"], f"{100 * value:.1f}"]
        assert other[1] == "a|b" and other[4] == ("25.0" if chosen["chosen"] == "raw" else "–")
    assert "a\\|b" in report and "Auxiliary columns: accuracy of their heads" in report
    value = scores.fused.selected
    assert f"(select.metric; of 1, not percent) | {value.n} | {value.value:.4f}" in report


@pytest.mark.slow
def test_the_page_shows_views_priors_and_the_leak(capsys) -> None:
    folder = runs.RESULTS / "example"
    members = [fake_members.member(fold, skill=1.0) for fold in (0, 1, 2)]
    fake_members.experiment(folder, members, [], [])
    main(["example"])
    assert 'id="test-time"' not in (folder / "report.html").read_text(encoding="utf-8")
    tta = load(None, []).tta
    rows = [
        ViewGain(name="mirrored", views=2, ms=3.25, gain=gain(0.012), nll=0.034, kept=True),
        ViewGain(name="384 pixels", views=2, ms=9.75, gain=gain(-0.004), nll=0.001, kept=False),
    ]
    table = ViewTable(
        tta=tta, kept=tta, plain=0.81, all=0.83, over_plain=gain(0.02), pruned=gain(0.003), ms=13.0, pruned_ms=3.25,
        rows=rows,
    )  # fmt: skip
    measured = priors.measure(fuse([assemble(members, fake_members.folds())]), 1.0, load(None, []))
    leak = Leak(n=118, splits=3, copies=12, leaked=7.6, top1=0.8, inflation=gain(0.021, None))
    for record in (table, measured, leak):
        write_record(folder / record.FILE, record)
    main(["example"])
    html = (folder / "report.html").read_text(encoding="utf-8")
    shown = tables(html)
    assert shown["views"] == [
        ["mirrored", "2", "3.2", "+1.20", "+0.20 to +2.20", "0.031", "+0.0340", "yes"],
        ["384 pixels", "2", "9.8", "-0.40", "-1.40 to +0.60", "0.031", "+0.0010", "no"],
    ]
    assert [row[:2] for row in shown["priors"]] == [[row.images, row.target] for row in measured.rows]
    assert shown["priors"][1][3] == f"{100 * measured.rows[1].gain.gain:+.2f}"
    text = text_of(html)
    assert (
        "The plain view alone reaches 81.0%, all views together 83.0% (+2.00, 95% +1.00 to +3.00, p = 0.031)"
        in text
    )
    assert inflation(leak).startswith(
        "up to +2.10 (+1.10 to +3.10) percent of top-1: a plain split in 3 trains on copies"
    )
    main(["example", "--format", "md"])
    report = (folder / "report.md").read_text(encoding="utf-8")
    *_, views, distributions = (
        rows for name, rows in markdown_tables(report).items() if name.startswith("Members")
    )
    assert views == [
        ["mirrored", "2", "3.2", "+1.20 (+0.20 to +2.20)", "0.031", "+0.0340", "yes"],
        ["384 pixels", "2", "9.8", "-0.40 (-1.40 to +0.60)", "0.031", "+0.0010", "no"],
    ]
    for row, cells in zip(distributions, shown["priors"], strict=True):
        assert row == [*cells[:3], f"{cells[3]} ({cells[4]})", *cells[5:]]
    assert "a gain of +2.00 (+1.00 to +3.00), in 13.0 ms an image" in report
    assert leak.line in report
    data = bytearray((folder / ViewTable.FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / ViewTable.FILE).write_bytes(data)
    main(["example"])
    assert "views.json is damaged" in capsys.readouterr().out
    assert Path(folder / "report.html").is_file()
