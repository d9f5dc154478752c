"""Every number on an experiment's page, computed again from its saved logits and events.

`pytest tests/report/test_numbers.py --page results/results/<exp>` does the same to a page of one's own.
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightgbm import LGBMClassifier
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from fastflower.core import files, runs
from fastflower.core.tables import read_csv
from fastflower.data.readers import image_files
from fastflower.evaluation import ensembles, summary
from fastflower.evaluation.logits import assemble, common
from fastflower.recipe import load
from fastflower.report.__main__ import main
from support.fake_members import BACKBONES, COMBOS, experiment, folds, member, trained
from support.reference_scores import (
    ALPHA,
    Evaluated,
    Set,
    check_words,
    ece,
    kind,
    logged,
    nll,
    p,
    probabilities,
    span,
    wilson,
)
from support.report_parser import Drawing, drawings, tables, words

SEEDS, FOLDS = (42, 7), (0, 1, 2)
LEVELS = np.concatenate([COMBOS, [["blur", "medium"]]])
WEIGHTS = {BACKBONES[0]: 3.0, BACKBONES[1]: 1.0}
DERIVED = {
    "world_size": 2, "batch_global": 32, "lr": 0.00123456789, "lr_note": "scaled", "parameters": 4930183,
    "stages": [{"first": 1, "last": 3, "height": 32, "width": 48, "batch_per_gpu": 16}], "steps": [22],
    "groups": [{"name": "head", "lr": 0.00123456, "weight_decay": 0.05, "tensors": 14}], "notes": ["3 things"],
}  # fmt: skip


def make(folder: Path) -> None:
    """An experiment of two backbones, two seeds and three folds, in two corruptions, one of them at two levels."""
    members = [member(f, b, s, skill=1.2) for b in BACKBONES for s in SEEDS for f in FOLDS]
    noise = np.random.default_rng(0)
    for at, own in enumerate(members):
        more = (own.corrupt[:1] + noise.normal(0, 2, own.corrupt[:1].shape)).astype(np.float32)
        members[at] = replace(own, combos=LEVELS, corrupt=np.concatenate([own.corrupt, more]))
    events = [row for b in BACKBONES for s in SEEDS for f in FOLDS for row in trained(b, s, f)]
    accept = ["accept.clean_min=0.5", "accept.corrupted_min=0.99", "accept.macro_drop_max=0.5"]
    experiment(folder, members, events, accept)
    files.write_json(folder / "meta" / "derived_made.json", DERIVED)
    sets = common([assemble(own, folds()) for own in summary.by_run(members).values()])
    budget = ensembles.Budget.of(sets, load().bundle)
    files.write_json(folder / "ensemble.json", ensembles.compare(sets, budget, WEIGHTS))
    border = {"right": {"n": 48, "mean": 0.2512}, "wrong": {"n": 9, "mean": 0.41}}
    picture = {"index": 9, "filename": "image_9.jpg", "label": 0, "guess": 1, "target": 0, "border": 0.375}
    picture |= {"backbone": BACKBONES[0], "right": False, "file": "a.jpg"}
    files.write_atomic(folder / "gradcam" / "a.jpg", image_files.jpeg(np.zeros((8, 8, 3), np.uint8)))
    cams = {"even": 0.4375, "images": [picture], "border": [{"backbone": BACKBONES[0], **border}]}
    files.write_json(folder / "gradcam" / "gradcam.json", cams)


@dataclass
class Page:
    """A page, taken apart, and the files it should agree with."""

    html: str
    tables: dict[str, list[list[str]]]
    charts: dict[str, Drawing]
    data: Evaluated
    whole: Set  # the fused set

    def section(self, name: str) -> str:
        found = re.search(rf'<section id="{name}".*?</section>', self.html, flags=re.S)
        return found[0] if found else ""


@pytest.fixture(scope="module")
def page_of(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page that the command made of a folder that was given, or of made-up members."""
    given = request.config.getoption("--page")
    if given:
        folder = Path(request.config.invocation_params.dir, given[0])
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("numbers"))
            folder = (runs.RESULTS / "made").absolute()
            make(folder)
            main(["made"])
    html = (folder / "report.html").read_text(encoding="utf-8")
    data = Evaluated(folder, read_csv(folder / "meta" / "classes.csv", ("class_idx", "category_id", "n")))
    return Page(html, tables(html), drawings(html), data, data.fused)


def close(shown: str, expected: float, within: float = 0.0501) -> bool:
    """Whether a cell in percent is a share, to its last digit."""
    return abs(float(shown) - 100 * expected) <= within


def test_every_table_is_checked(page_of: Page) -> None:
    checked = {
        "acceptance", "overview", "members", "folds", "stages", "methods", "weights", "corruptions", "kinds", "robust",
        "parts", "per-class", "confusions", "border",
    }  # fmt: skip
    shown = {
        name for name in page_of.tables if "." not in name
    }  # a dot: keys of the recipe, no numbers of ours
    assert shown <= checked if page_of.data.name != "made" else shown == checked


def numbers(own: Set) -> list[str]:
    """The cells of the members table from n on."""
    t, hits = own.t, own.top1(own.views)
    return [
        str(own.n), p(own.top1(own.single)), p(hits), span(hits * own.n, own.n), p(own.corrupted), p(own.s),
        p(own.macro("f1")), p(own.top5), f"{own.nll():.3f}", p(own.ece()), f"{t:.3f}", p(own.ece(t)),
    ]  # fmt: skip


def test_lead_and_basis(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    lead = words(re.search(r'<p class="lead">(.*?)</p>', page_of.html)[1])
    found = [int(number) for number in re.findall(r"(\d+) (?:members?|classes|images)", lead)]
    assert found == [len(data.members), len(data.ids), whole.n]
    basis = words(re.search(r'<h2 id="h-scores">.*?<p class="why">(.*?)</p>', page_of.html, flags=re.S)[1])
    absent = [fold for fold in data.all_folds if fold not in data.folds]
    several = [len(data.runs)] if len(data.runs) > 1 else []
    expected = [len(data.folds), whole.n, *several] if len(data.all_folds) > 1 else [whole.n, *several]
    if absent:
        expected = [*data.folds, len(data.all_folds), whole.n, *several, *absent]
    assert [int(number) for number in re.findall(r"\d+", basis)] == expected


def test_members_runs_and_fused(page_of: Page) -> None:
    data, rows = page_of.data, page_of.tables["members"]
    expected = [numbers(data.of(own["backbone"], own["seed"], own["fold_of"])) for own in data.members]
    if len(data.folds) > 1:
        expected += [numbers(data.of(*run)) for run in data.runs]
    if len(data.runs) > 1:
        expected += [numbers(page_of.whole)]
    count = len(data.members)
    order = sorted(rows[:count], key=lambda row: (row[0].rsplit(" ", 1)[0], int(row[2]), int(row[1])))
    assert [row[4:] for row in [*order, *rows[count:]]] == expected
    assert [int(row[3]) for row in order] == [own["about"]["epoch"] for own in data.members]


def test_means_over_folds(page_of: Page) -> None:
    data = page_of.data
    for row in page_of.tables.get("folds", []):
        backbone, seed = row[0].split(" seed ")
        parts = [data.of(backbone, int(seed), fold) for fold in data.folds]
        columns = [
            [part.top1(part.single) for part in parts], [part.top1(part.views) for part in parts],
            [part.corrupted for part in parts], [part.s for part in parts], [part.macro("recall") for part in parts],
            [part.macro("f1") for part in parts], [part.nll() for part in parts], [part.ece() for part in parts],
        ]  # fmt: skip
        for at, (cell, values) in enumerate(zip(row[1:], columns, strict=True)):
            mean, std = np.mean(values), np.std(values, ddof=1)
            assert cell == (f"{mean:.3f} ± {std:.3f}" if at == 6 else f"{p(mean)} ± {p(std)}")


def test_overview(page_of: Page) -> None:
    whole, rows = page_of.whole, page_of.tables["overview"]
    t, n = whole.t, whole.n
    assert [row[1] for row in rows] == [
        p(whole.top1(whole.views)), p(whole.top1(whole.single)), p(whole.corrupted), p(whole.s), p(whole.top5),
        p(whole.macro("recall")), p(whole.macro("f1")), f"{whole.nll():.3f}", p(whole.ece()),
        f"{whole.nll(t):.3f}", p(whole.ece(t)),
    ]  # fmt: skip
    shares = [whole.top1(whole.views), whole.top1(whole.single), whole.corrupted, whole.s, whole.top5]
    assert [row[2] for row in rows[:5]] == [span(share * n, n) for share in shares]
    assert (rows[7][2], rows[9][2]) == (whole.nll_span(), whole.nll_span(t))
    drawn = whole.bootstrap(t)
    for at, name in ((5, "recall"), (6, "f1"), (8, "ece"), (10, "ece_after")):
        ends = [float(end) / 100 for end in rows[at][2].split("–")]
        np.testing.assert_allclose(ends, drawn[name], atol=0.02)
    assert {row[3] for row in rows} == {str(n)}
    assert rows[9][0].endswith(f"T = {t:.3f}") and rows[2][0].endswith(f"mean of {len(whole.dark)}")


def test_cards(page_of: Page) -> None:
    whole, overview = page_of.whole, page_of.tables["overview"]
    t = whole.t
    cards = re.findall(r'<div class="card">(.*?)</div>', page_of.html, flags=re.S)
    values = [whole.top1(whole.views), whole.corrupted, whole.s, whole.macro("f1"), whole.ece(t)]
    assert len(cards) == len(values)
    for card, value, at in zip(cards, values, (0, 2, 3, 6, 10), strict=True):
        assert re.search(r"<b>([\d.]+)%</b>", card)[1] == p(value)
        assert re.search(r"95%: ([\d.–]+)<", card)[1] == overview[at][2]
        low, wide, mark = re.findall(r'<rect x="([\d.-]+)" width="([\d.]+)"', card)[0] + tuple(
            re.findall(r'<rect x="([\d.-]+)" width="0.8"', card)
        )
        ends = [float(end) / 100 for end in overview[at][2].split("–")]
        assert close(low, ends[0], 0.06) and close(wide, ends[1] - ends[0], 0.11)
        assert float(mark) == pytest.approx(100 * value - 0.4, abs=0.006)
    notes = [words(re.search(r'<span class="note">(.*?)</span>', card)[1]) for card in cards]
    views = len(page_of.data.members[0]["about"]["views"])
    assert notes == [
        f"mean of {views} views; single view {p(whole.top1(whole.single))}%",
        f"mean of {len(whole.dark)} corruptions, single view",
        f"{ALPHA:.2f} clean + {1 - ALPHA:.2f} corrupted, single view",
        f"mean recall of classes {p(whole.macro('recall'))}%",
        f"T = {t:.3f}; before {p(whole.ece())}%",
    ]


def test_corruptions_their_kinds_and_levels(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    clean, base, n = whole.top1(whole.single), whole.single.argmax(1), whole.n
    hits = {pair: whole.top1(logits) for pair, logits in zip(data.combos, whole.dark, strict=True)}
    kept = {
        pair: np.mean(logits.argmax(1) == base) for pair, logits in zip(data.combos, whole.dark, strict=True)
    }
    f1 = [whole.macro("f1", logits) for logits in whole.dark]
    rows = page_of.tables["corruptions"]
    for row, pair, own in zip(rows, data.combos, f1, strict=False):
        share = hits[pair]
        numbers = [p(share), span(share * n, n), p(clean - share), p(kept[pair]), p(own)]
        assert row == [kind(pair[0]), pair[1], *numbers]
    mean = float(np.mean(list(hits.values())))
    numbers = [p(mean), span(mean * n, n), p(clean - mean), p(np.mean(list(kept.values()))), p(np.mean(f1))]
    assert rows[-1] == ["mean", "", *numbers]
    groups = list(dict.fromkeys(pair[0] for pair in hits)) + list(dict.fromkeys(pair[1] for pair in hits))
    if len({pair[1] for pair in hits}) == 1:
        assert "kinds" not in page_of.tables
        return
    for row, name in zip(page_of.tables["kinds"], groups, strict=True):
        own = [pair for pair in hits if name in pair]
        share = float(np.mean([hits[pair] for pair in own]))
        numbers = [p(share), span(share * n, n), p(clean - share), p(np.mean([kept[pair] for pair in own]))]
        assert row == [kind(name), str(n), *numbers]


def test_classes_under_corruptions_and_their_colours(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    classes = range(len(data.ids))
    recall = np.array(
        [metrics.recall_score(whole.y, z.argmax(1), average=None, labels=classes) for z in whole.dark]
    )
    rows = page_of.tables["robust"]
    present = [c for c in classes if (whole.y == c).any()]
    expected = {
        data.names[c]: [str((whole.y == c).sum()), *(p(own[c], 0) for own in recall)] for c in present
    }
    assert {row[0]: row[1:] for row in rows} == expected
    means = [recall[:, data.names.index(row[0])].mean() for row in rows]
    assert means == sorted(means)
    colours = re.findall(r'style="--miss:(\d+)%">(\d+)<', page_of.section("robustness"))
    assert len(colours) == recall[:, present].size
    assert all(abs(int(miss) - 0.7 * (100 - int(shown))) <= 1 for miss, shown in colours)


def test_parts_classes_and_confusions(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    guess, counts, classes = whole.guess, data.counts, range(len(data.ids))
    precision, recall, f1, n = metrics.precision_recall_fscore_support(
        whole.y, guess, labels=classes, zero_division=0
    )
    parts = ["head" if count > 100 else "tail" if count < 20 else "middle" for count in counts]
    for c, row in enumerate(page_of.tables["per-class"]):
        own = whole.y == c
        dark, light = (whole.dark[:, own].argmax(2) == c).mean(), (whole.single[own].argmax(1) == c).mean()
        assert row == [
            data.names[c], parts[c], str(counts[c]), str(n[c]), p(precision[c]), p(recall[c]), p(f1[c]),
            span(recall[c] * n[c], n[c]), p(dark), p(light - dark),
        ]  # fmt: skip
    for row in page_of.tables.get("parts", []):
        chosen = [c for c in classes if parts[c] == row[0]]
        own = np.isin(whole.y, chosen)
        hits = metrics.accuracy_score(whole.y[own], guess[own])
        sizes = [counts[c] for c in chosen]
        assert row[1:] == [
            str(len(chosen)), f"{min(sizes)}–{max(sizes)}", str(own.sum()), p(hits), span(hits * own.sum(), own.sum()),
            p(recall[[c for c in chosen if n[c]]].mean()),
        ]  # fmt: skip
    matrix = metrics.confusion_matrix(whole.y, guess, labels=classes)
    seen = {(row[0], row[1]): row[2:] for row in page_of.tables.get("confusions", [])}
    missed = {
        (data.names[i], data.names[j]): [str(matrix[i, j]), str(n[i]), p(matrix[i, j] / n[i])]
        for i, j in zip(*np.nonzero(matrix), strict=True) if i != j
    }  # fmt: skip
    assert seen.items() <= missed.items() and len(seen) == min(100, len(missed))
    assert len(missed) <= 100 or f"true class first, 100 of {len(missed)}." in page_of.html
    shares = [float(row[-1]) for row in page_of.tables.get("confusions", [])]
    assert shares == sorted(shares, reverse=True)


def test_the_drawn_confusion_matrix(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    matrix = metrics.confusion_matrix(whole.y, whole.guess, labels=range(len(data.ids)))
    drawn = re.search(r'<svg class="matrix".*?</svg>', page_of.html, flags=re.S)[0]
    left, top = (
        float(side) for side in re.search(r'class="frame" x="([\d.]+)" y="([\d.]+)"', drawn).groups()
    )
    again, n = np.zeros_like(matrix), matrix.sum(1)
    cell = (
        r'<rect class="(hit|miss)" x="([\d.]+)" y="([\d.]+)".*?fill-opacity="([\d.]+)"><title>(.*?)</title>'
    )
    for ink, x, y, depth, title in re.findall(cell, drawn):
        j, i = round((float(x) - left) / 10), round((float(y) - top) / 10)
        again[i, j] = int(re.search(r": (\d+) of \d+$", title)[1])
        assert words(title) == f"{data.plain[i]} as {data.plain[j]}: {matrix[i, j]} of {n[i]}"
        assert (ink == "hit") == (i == j)
        assert float(depth) == pytest.approx(0.12 + 0.88 * matrix[i, j] / n[i], abs=0.006)
    np.testing.assert_array_equal(again, matrix)
    counts = [int(text) for text in re.findall(r'class="count[^>]*>(\d+)<', drawn)]
    assert sorted(counts) == (sorted(matrix[matrix > 0].tolist()) if len(data.ids) <= 30 else [])


def test_the_most_confused_pairs_and_the_probabilities_beside_them(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    matrix = metrics.confusion_matrix(whole.y, whole.guess, labels=range(len(data.ids)))
    probs = probabilities(whole.views, whole.t)
    pattern = r"<summary>(.*?)</summary>\s*<div class=\"pair\">(.*?)</div>"
    blocks = re.findall(pattern, page_of.section("confusion"), flags=re.S)
    both = sorted(
        (int(matrix[a, b] + matrix[b, a]) for a in range(len(matrix)) for b in range(a)), reverse=True
    )
    assert len(blocks) == min(10, sum(total > 0 for total in both))
    totals = []
    for said, shown in blocks:
        text = words(said)
        one, other = (
            int(n) for n in re.search(r"(\d+) of the first as the second, (\d+) the other", text).groups()
        )
        a, b = next(
            (a, b) for a in range(len(matrix)) for b in range(len(matrix))
            if text.startswith(f"{data.names[a]} and {data.names[b]} ")
        )  # fmt: skip
        assert (one, other) == (matrix[a, b], matrix[b, a])
        totals.append(one + other)
        captions = [
            words(caption) for caption in re.findall(r"<figcaption>(.*?)</figcaption>", shown, flags=re.S)
        ]
        expected = []
        for c in (a, b):
            right = probs[(whole.y == c) & (whole.guess == c), c]
            expected += [f"{data.names[c]} typical, {p(right.max(), 0)}%"] if len(right) else []
        wrong = [
            (-probs[i].max(), f"{data.names[y]} as {data.plain[guess]}, {p(probs[i].max(), 0)}%")
            for i, (y, guess) in enumerate(zip(whole.y, whole.guess, strict=True)) if {y, guess} == {a, b}
        ]  # fmt: skip
        assert captions == expected + [text for _, text in sorted(wrong)[:3]]
    assert totals == both[: len(blocks)]


def odds_of(page_of: Page, items: list[str], probs: np.ndarray) -> list[int]:
    """The places of the images shown, after their probabilities: the first three classes, and the label's."""
    data, whole = page_of.data, page_of.whole
    names, places = whole.filename.tolist(), []
    for item in items:
        at = names.index(words(re.search(r"<small>([^<]*)</small></figcaption>", item)[1]))
        shown = [words(line).rsplit(" ", 1) for line in re.findall(r"<li>.*?</li>", item, flags=re.S)]
        expected = np.argsort(-probs[at], kind="stable")[:3].tolist()
        expected += [] if whole.y[at] in expected else [int(whole.y[at])]
        assert [name for name, _ in shown] == [data.plain[c] for c in expected]
        assert all(
            close(share[:-1], probs[at, c], 0.06) for (_, share), c in zip(shown, expected, strict=True)
        )
        places.append(at)
    return places


def test_the_worst_mistakes(page_of: Page) -> None:
    whole = page_of.whole
    probs = probabilities(whole.views, whole.t)
    shown = page_of.html.partition('id="mistakes-list"')[2].partition("</section>")[0].partition("<h3>")[0]
    places = odds_of(page_of, re.findall(r"<figure>.*?</figure>", shown, flags=re.S), probs)
    wrong = np.flatnonzero(whole.guess != whole.y)
    own = probs[wrong, whole.y[wrong]]
    assert len(places) == min(36, len(wrong))
    np.testing.assert_allclose(probs[places, whole.y[places]], np.sort(own)[: len(places)], rtol=1e-5)
    if len(wrong):
        said = words(page_of.section("mistakes"))
        assert f"{len(places)} of {len(wrong)}. Probabilities at T = {whole.t:.3f}." in said


def test_labels_to_look_at_again_are_those_of_confident_learning(page_of: Page) -> None:
    whole = page_of.whole
    probs = probabilities(whole.views, whole.t)
    present = sorted(set(whole.y.tolist()))
    usual = {c: np.mean([row[c] for row, y in zip(probs, whole.y, strict=True) if y == c]) for c in present}
    margins = {}
    for at, (row, y) in enumerate(zip(probs, whole.y, strict=True)):
        sure = [c for c in present if row[c] >= usual[c]]
        best = max(sure, key=lambda c: row[c], default=y)
        if best != y:
            margins[at] = row[best] - row[y]
    expected = sorted(margins, key=lambda at: -margins[at])[:18]
    shown = page_of.section("mistakes").partition("Labels to look at again")[2]
    assert odds_of(page_of, re.findall(r"<figure>.*?</figure>", shown, flags=re.S), probs) == expected


def test_stages_are_those_of_the_events(page_of: Page) -> None:
    data, expected = page_of.data, []
    for backbone, fold, seed in data.trainings:
        rows = data.epochs(backbone, seed, fold)
        sizes = [row["size"] for row in rows]
        n = next(len(own["class_idx"]) for own in data.members if own["fold_of"] == fold)
        for size in (size for at, size in enumerate(sizes) if at == 0 or size != sizes[at - 1]):
            own = [row for row in rows if row["size"] == size]
            best = max(own, key=lambda row: (max(row["s_raw"], row["s_ema"]), -row["epoch"]))
            weights = "ema" if best["s_ema"] >= best["s_raw"] else "raw"
            scores = [best[f"{name}_{weights}"] for name in ("clean", "corrupt", "s")]
            cells = [cell for value in scores for cell in (p(value), span(value * n, n))]
            epochs = f"{own[0]['epoch']}–{own[-1]['epoch']}"
            name = f"{backbone} fold {fold} seed {seed}"
            expected.append(
                [name, str(np.ravel(size)[0]), epochs, str(best["epoch"]), weights, str(n), *cells]
            )
    assert page_of.tables["stages"] == expected


def test_curves_pass_through_the_events(page_of: Page) -> None:
    data, checked = page_of.data, set()
    for at, (backbone, fold, seed) in enumerate(data.trainings):
        rows = data.epochs(backbone, seed, fold)
        for name, drawn in page_of.charts.items():
            if not name.startswith(f"run{at}-"):
                continue
            chart = name.partition("-")[2]
            for label, (xs, ys) in drawn.lines.items():
                course = {row["epoch"]: logged(row, chart, label) for row in rows}
                course = {epoch: value for epoch, value in course.items() if value is not None}
                order = np.argsort(xs, kind="stable")
                again = np.interp(list(course), xs[order], ys[order])
                wide = max(course.values()) - min(course.values())
                np.testing.assert_allclose(again, list(course.values()), atol=2e-3 * wide + 1e-9, rtol=2e-3)
                checked.add(chart)
                check_words(drawn.said, label, course)
                if label in drawn.points:
                    best = max(course.values())
                    assert drawn.points[label][1][0] == pytest.approx(best, rel=2e-3)
                    assert round(drawn.points[label][0][0]) == min(e for e in course if course[e] == best)
    assert {"loss", "clean", "corrupt", "s", "macro", "lr", "size", "speed", "norm"} <= checked


def test_curves_of_all_runs(page_of: Page) -> None:
    data = page_of.data
    for chart, stem in (("s", "s"), ("clean", "clean"), ("corrupt", "corrupt")):
        drawn = page_of.charts.get(f"together-{chart}")
        if drawn is None:
            assert not 1 < len(data.trainings) <= 12
            continue
        assert len(drawn.lines) == len(data.trainings)
        for (backbone, fold, seed), (label, (xs, ys)) in zip(
            data.trainings, drawn.lines.items(), strict=True
        ):
            assert (
                not {f"fold {fold}", f"seed {seed}", backbone}.isdisjoint([label]) or f"fold {fold}" in label
            )
            rows = data.epochs(backbone, seed, fold)
            better = [max(row[f"{stem}_raw"], row[f"{stem}_ema"]) for row in rows]
            np.testing.assert_allclose(np.interp([row["epoch"] for row in rows], xs, ys), better, atol=2e-3)


def test_what_is_said_of_each_training(page_of: Page) -> None:
    data = page_of.data
    notes = re.findall(r"<summary>([^<]*fold \d+ seed \d+) <small>(.*?)</small>", page_of.section("training"))
    assert [name for name, _ in notes] == [f"{b} fold {f} seed {s}" for b, f, s in data.trainings]
    for (_, note), (backbone, fold, seed) in zip(notes, data.trainings, strict=True):
        rows = data.epochs(backbone, seed, fold)
        last = [
            row for row in rows if row["size"] == rows[-1]["size"]
        ]  # best starts anew when the size grows
        best = max(last, key=lambda row: (max(row["s_raw"], row["s_ema"]), -row["epoch"]))
        weights = "ema" if best["s_ema"] >= best["s_raw"] else "raw"
        said = f"{rows[-1]['epoch']} epochs, best {best[f's_{weights}']:.4f} in epoch {best['epoch']} ({weights})"
        assert note.startswith(said)


def test_reliability_is_top1_over_confidence_bin_by_bin(page_of: Page) -> None:
    whole, drawn = page_of.whole, page_of.charts["reliability"]
    t = whole.t
    for label, divisor in (("T = 1", 1.0), (f"T = {t:.3f}", t)):
        probs = probabilities(whole.views, divisor)
        confidence, hit = probs.max(1), whole.guess == whole.y
        # bins of one fifteenth, closed above, as torchmetrics has them
        place = np.clip(np.ceil(confidence * 15).astype(int), 1, 15)
        bins = [(confidence[place == b].mean(), hit[place == b].mean()) for b in sorted(set(place))]
        for x, y in (drawn.points[label], drawn.lines[label]):
            np.testing.assert_allclose(np.stack([x, y], 1), bins, atol=0.003)


def test_points_of_classes_and_corruptions(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    classes = [c for c in range(len(data.ids)) if (whole.y == c).any()]
    recall = {c: (whole.guess[whole.y == c] == c).mean() for c in classes}
    dark = {c: (whole.dark[:, whole.y == c].argmax(2) == c).mean() for c in classes}
    order = sorted(classes, key=lambda c: recall[c])
    alike = len({data.counts[c] for c in classes}) == 1
    tail = page_of.charts["tail"]
    for label, values in (("clean", recall), ("corrupted", dark)):
        x, y = tail.points[label]
        expected = range(1, len(order) + 1) if alike else [data.counts[c] for c in order]
        np.testing.assert_allclose(x, list(expected), rtol=0.005)
        np.testing.assert_allclose(y, [values[c] for c in order], atol=0.005)
    assert f"Recall of {len(order)} classes, lowest {p(recall[order[0]])}%." == tail.said

    robust = page_of.charts["robustness"]
    levels = list(dict.fromkeys(level for _, level in data.combos))
    for level in levels:
        label = level if len(levels) > 1 else ""
        own = [whole.top1(z) for (_, at), z in zip(data.combos, whole.dark, strict=True) if at == level]
        np.testing.assert_allclose(robust.points[label][0], own, atol=0.002)
        ends = [wilson(share * whole.n, whole.n) for share in own]
        np.testing.assert_allclose([bar[0] for bar in robust.bars[label]], ends, atol=0.002)
    said = [f"{k} {level} {p(whole.top1(z))}%" for (k, level), z in zip(data.combos, whole.dark, strict=True)]
    assert robust.said == f"Top-1 by corruption, clean {p(whole.top1(whole.single))}%: {'; '.join(said)}."


def test_derived_numbers_are_those_of_training(page_of: Page) -> None:
    facts = {
        words(name): words(value)
        for name, value in re.findall(r"<div><dt>(.*?)</dt><dd>(.*?)</dd></div>", page_of.html)
    }
    assert facts
    if page_of.data.name != "made":
        return
    assert facts == {
        "world size": "2", "batch global": "32", "lr": "0.00123457", "lr note": "scaled", "parameters": "4,930,183",
        "stage 1": "epochs 1 to 3, 32 × 48, batch 16 a device, 22 steps an epoch",
        "group head": "lr 0.00123, weight decay 0.05, 14 tensors", "note": "3 things",
    }  # fmt: skip


def fitted(name: str, stack: np.ndarray, y: np.ndarray) -> Any:
    """A method of combining runs, fitted on log-probabilities or logits (M, N, C) in another way than ours."""
    runs_, _, classes = stack.shape

    def flat(z: np.ndarray) -> np.ndarray:
        return np.concatenate(list(log_softmax(z, axis=2)), axis=1)

    def on_simplex(mixed: Any) -> np.ndarray:
        """Weights by SLSQP, and T beside them; ours come from a softmax by L-BFGS, or from EM."""
        whole = {"type": "eq", "fun": lambda v: v[:-1].sum() - 1}
        start, bounds = np.append(np.full(runs_, 1 / runs_), 0.0), [(0, 1)] * runs_ + [(-3, 3)]
        found = minimize(
            lambda v: nll(mixed(v[:-1], np.exp(v[-1]), stack), y), start, bounds=bounds, constraints=whole,
            method="SLSQP", options={"maxiter": 300, "ftol": 1e-10},
        )  # fmt: skip
        return found.x[:-1]

    def logits(w: np.ndarray, t: float, z: np.ndarray) -> np.ndarray:
        return softmax(np.tensordot(w, z, axes=1) / t, axis=1)

    def mixture(w: np.ndarray, t: float, z: np.ndarray) -> np.ndarray:
        return np.tensordot(w / w.sum(), softmax(z, axis=2), axes=1)

    if name in ("learned weights", "learned mixture"):
        how = logits if name == "learned weights" else mixture
        w = on_simplex(how)
        return w, lambda z: how(w, 1.0, z)
    if name == "greedy in budget":  # each round the run that lowers the mean's log loss most
        bag: list[int] = []
        best = np.inf
        while len(bag) < 20:
            losses = [nll(softmax(stack[[*bag, m]].mean(0), axis=1), y) for m in range(runs_)]
            if min(losses) >= best - 1e-9:
                break
            best = min(losses)
            bag.append(int(np.argmin(losses)))
        w = np.bincount(bag, minlength=runs_) / len(bag)
        return w, lambda z: logits(w, 1.0, z)
    model: Any = LogisticRegression(C=0.01, max_iter=100)
    if name == "LightGBM stacking":
        model = LGBMClassifier(
            n_estimators=50, learning_rate=0.1, num_leaves=7, min_child_samples=5, max_bin=63, random_state=0,
            colsample_bytree=min(1.0, 64 / (runs_ * classes)), deterministic=True, force_col_wise=True, verbose=-1,
        )  # fmt: skip
    model.fit(flat(stack), y)

    def predicted(z: np.ndarray) -> np.ndarray:
        probs = np.full((z.shape[1], classes), 1e-12)
        probs[:, model.classes_] = np.maximum(model.predict_proba(flat(z)), 1e-12)
        return probs / probs.sum(1, keepdims=True)

    return None, predicted


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")  # 100 steps are enough
def test_methods_and_weights(page_of: Page) -> None:
    data = page_of.data
    if "methods" not in page_of.tables:
        pytest.skip("not combined")
    sets = [data.of(*run) for run in data.runs]
    y, fold, stack = sets[0].y, sets[0].fold, np.stack([own.views.astype(float) for own in sets])
    shown = {row[0]: row[1:] for row in page_of.tables["methods"]}
    single = [own.top1(own.views) for own in sets]
    base = np.empty(len(y), bool)
    for part in data.folds:  # the best run by the other folds
        rest = [(own.guess == y)[fold != part].mean() for own in sets]
        base[fold == part] = (sets[int(np.argmax(rest))].guess == y)[fold == part]
    found: dict[str, np.ndarray | None] = {"best single": None}
    fits, stackings = [], ["logistic stacking", "LightGBM stacking"]
    if len(sets) > 1:
        found["mean of logits"] = softmax(stack.mean(0), axis=1)
        found["mean of probabilities"] = softmax(stack, axis=2).mean(0)
        fits = ["learned weights", "learned mixture", "greedy in budget"]
    if data.name == "made":
        found["mean by backbone"] = found["mean of logits"]  # two of each
        found["hand-set weights"] = softmax(np.tensordot([0.375, 0.375, 0.125, 0.125], stack, axes=1), axis=1)
    all_runs = sorted(set(found) - {"best single"})
    for name in [*fits, *stackings]:
        found[name] = np.empty(stack.shape[1:])
        for part in data.folds:
            own = fold == part
            found[name][own] = fitted(name, stack[:, ~own], y[~own])[1](stack[:, own])
    assert set(shown) == set(found)
    for name, probs in found.items():
        hit = base if probs is None else probs.argmax(1) == y
        gains = [hit[fold == part].mean() - base[fold == part].mean() for part in data.folds]
        gain = hit.mean() - base.mean()
        assert shown[name][:2] == [p(hit.mean()), span(hit.sum(), len(y))], name
        assert shown[name][5:8] == [f"{100 * v:+.2f}" for v in (gain, min(gains), max(gains))], name
        if probs is not None:
            assert close(shown[name][2], metrics.f1_score(y, probs.argmax(1), average="macro")), name
            assert float(shown[name][3]) == pytest.approx(nll(probs, y), abs=0.0012), name
            assert close(shown[name][4], ece(probs, y), 0.15), name
    best = data.runs[int(np.argmax(single))]
    for name, members in (
        ("best single", [own for own in data.members if (own["backbone"], own["seed"]) == best]),
        *((name, data.members) for name in all_runs),
    ):
        cost = [f"{sum(own['about'][key] for own in members):.1f}" for key in ("mb", "ms")]
        assert shown[name][8:] == [*cost, "fits"], name
    assert all(shown[name][8:] == ["–", "–", "no predictor"] for name in stackings)
    said = words(page_of.section("ensemble"))
    assert f"{len(y)} images in {len(data.folds)} parts" in said
    assert f"{p(min(single))} to {p(max(single))}%" in said

    drawn = {row[0]: row[1:] for row in page_of.tables.get("weights", [])}
    assert set(drawn) == ({f"{b} seed {s}" for b, s in data.runs} if fits else set())
    if data.name == "made":
        hand = [drawn[f"{b} seed {s}"].pop(0) for b, s in data.runs]
        assert hand == ["0.375", "0.375", "0.125", "0.125"]
    for column, name in enumerate(fits):
        own = np.array([float(drawn[f"{b} seed {s}"][column]) for b, s in data.runs])
        np.testing.assert_allclose(own, fitted(name, stack, y)[0], atol=0.01, err_msg=name)


def test_acceptance(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    wanted = data.recipe.get("accept") or {}
    expected = []
    for name, key, share in (
        ("clean top-1", "clean_min", whole.top1(whole.views)),
        ("corrupted top-1", "corrupted_min", whole.corrupted),
    ):
        if wanted.get(key) is not None:
            verdict = "✓ accepted" if share >= wanted[key] else "✗ not reached"
            asked, n = f"at least {p(wanted[key])}", whole.n
            expected.append([name, verdict, p(share), asked, span(share * n, n), str(n)])
    if wanted.get("macro_drop_max") is not None:
        falls = []
        for own in data.members:
            rows = {row["epoch"]: row for row in data.epochs(own["backbone"], own["seed"], own["fold_of"])}
            chosen = rows[own["about"]["epoch"]]
            same = [row for row in rows.values() if row["size"] == chosen["size"]]
            most = max(max(row["macro_f1_raw"], row["macro_f1_ema"]) for row in same)
            falls.append(most - chosen[f"macro_f1_{own['about']['weights']}"])
        verdict = "✓ accepted" if max(falls) <= wanted["macro_drop_max"] else "✗ not reached"
        asked = f"at most {p(wanted['macro_drop_max'])}"
        expected.append(["fall of macro F1, worst member", verdict, p(max(falls)), asked, "–", "–"])
    assert page_of.tables.get("acceptance", []) == expected
    assert len(expected) == 3 or data.name != "made"


def test_shares_at_the_border(page_of: Page) -> None:
    """The page says what was measured; the measure itself is held to its formula elsewhere."""
    cams = json.loads((page_of.data.folder / "gradcam" / "gradcam.json").read_text(encoding="utf-8"))
    expected = []
    for row in cams["border"]:
        right, wrong = ([p(row[kind]["mean"]), str(row[kind]["n"])] for kind in ("right", "wrong"))
        expected.append([row["backbone"], *right, *wrong])
    assert page_of.tables["border"] == expected
    section = page_of.section("gradcam")
    assert "spread evenly, 44% lies in the outer eighth" in words(section)  # 1 - (3 / 4)^2
    shown = re.findall(r"<small>(?:border (\d+)%|nothing speaks for it)</small>", section)
    measured = ["" if row["border"] is None else p(row["border"], 0) for row in cams["images"]]
    assert sorted(shown) == sorted(measured) and measured


def rows_of(data: Evaluated, name: str) -> list[dict[str, str]]:
    path = data.folder / "reports" / f"{name}.csv"
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_confusion_matrices_over_all_folds_and_of_each(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    parts = {"confusion": np.ones(whole.n, bool)}
    if len(data.folds) > 1:
        parts |= {f"confusion_fold{fold}": whole.fold == fold for fold in data.folds}
    for name, own in parts.items():
        rows = rows_of(data, name)
        assert [row["category_id"] for row in rows] == data.ids
        matrix = [[int(row[guess]) for guess in data.ids] for row in rows]
        labels = range(len(data.ids))
        np.testing.assert_array_equal(
            matrix, metrics.confusion_matrix(whole.y[own], whole.guess[own], labels=labels)
        )
        assert (data.folder / "reports" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {path.stem for path in (data.folder / "reports").glob("confusion*.csv")} == set(parts)


def test_tables_of_classes_and_corruptions(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    labels, base = range(len(data.ids)), whole.single.argmax(1)
    expected = metrics.precision_recall_fscore_support(whole.y, whole.guess, labels=labels, zero_division=0)
    shown = [
        [float(row[key]) for row in rows_of(data, "per_class")] for key in ("precision", "recall", "f1", "n")
    ]
    np.testing.assert_allclose(shown, expected)
    for row, logits in zip(rows_of(data, "corruption"), whole.dark, strict=True):
        kept, share = (logits.argmax(1) == base).mean(), whole.top1(logits)
        np.testing.assert_allclose(
            [float(row[key]) for key in ("top1", "drop", "consistency")],
            [share, whole.top1(whole.single) - share, kept],
        )
    for row in rows_of(data, "corruption_classes"):
        own, at = whole.y == int(row["class_idx"]), data.combos.index((row["kind"], row["level"]))
        assert row["category_id"] == data.ids[int(row["class_idx"])] and int(row["n"]) == own.sum()
        recall = (whole.dark[at, own].argmax(1) == int(row["class_idx"])).mean()
        assert float(row["recall"]) == pytest.approx(recall)
    members = rows_of(data, "corruption_members")
    assert len(members) == len(data.members) * len(data.combos)
    for row in members:
        own = data.of(row["backbone"], int(row["seed"]), int(row["fold"]))
        logits = own.dark[data.combos.index((row["kind"], row["level"]))]
        assert float(row["top1"]) == pytest.approx(own.top1(logits)) and int(row["n"]) == own.n


def test_tables_of_mistakes_and_suspects(page_of: Page) -> None:
    data, whole = page_of.data, page_of.whole
    probs, names = probabilities(whole.views, whole.t), whole.filename.tolist()
    mistakes = rows_of(data, "mistakes")
    assert len(mistakes) == min(100, int((whole.guess != whole.y).sum()))
    losses = [float(row["loss"]) for row in mistakes]
    assert losses == sorted(losses, reverse=True)
    for row in mistakes + (rows_of(data, "suspects") if "Labels to look at again" in page_of.html else []):
        at = names.index(row["filename"])
        order = np.argsort(-probs[at], kind="stable")[:5]
        own = probs[at, whole.y[at]]
        assert row["category_id"] == data.ids[whole.y[at]] and int(row["fold"]) == whole.fold[at]
        assert row["top_ids"].split() == " ".join(data.ids[c] for c in order).split()
        assert row["predicted"] == data.ids[order[0]]
        shown = [float(row[key]) for key in ("p_predicted", "p_label", "loss")]
        np.testing.assert_allclose(
            shown, [probs[at, order[0]], own, -np.log(max(own, 1e-12))], rtol=1e-4, atol=1e-9
        )
        np.testing.assert_allclose(
            [float(v) for v in row["top_probabilities"].split()], probs[at, order], atol=1e-5
        )
