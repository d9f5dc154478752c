"""Every number in the tables of the report, recomputed from logits by scikit-learn, torchmetrics or the formula."""

from __future__ import annotations

import html as entities
import re
from typing import Any

import numpy as np
import pytest
import torch
from made_up import BACKBONES, COMBOS, IDS, classes_csv, folds, member
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn import metrics
from test_report import event, wilson
from torchmetrics.classification import MulticlassCalibrationError

from fastflower import recipe, report, runs
from fastflower.evaluation import acceptance, ensembles, oof, summary

SEEDS, FOLDS, ALPHA = (42, 7), (0, 1, 2), 0.7
WEIGHTS = {BACKBONES[0]: 3.0, BACKBONES[1]: 1.0}
NAMES = ["daisy 7", "12", "100", "dog <rose> rose", "tulip", "x & <y>"]


def p(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def span(hits: float, n: int) -> str:
    low, high = wilson(hits, n)
    return f"{p(low)}–{p(high)}"


def ece(logits: np.ndarray, labels: np.ndarray, t: float = 1) -> float:
    probs = torch.from_numpy(softmax(logits.astype(float) / t, axis=1))
    return float(MulticlassCalibrationError(len(IDS), n_bins=15)(probs, torch.from_numpy(labels)))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """T by a coarse grid and Brent's method on scikit-learn's log loss."""

    def loss(log_t: float) -> float:
        return metrics.log_loss(
            labels, softmax(logits.astype(float) / np.exp(log_t), axis=1), labels=range(len(IDS))
        )

    start = min(np.linspace(-4, 4, 33), key=loss)
    return float(np.exp(minimize_scalar(loss, bracket=(start - 0.25, start, start + 0.25), tol=1e-9).x))


class Set:
    """Logits of a member, a run or the fused set, and what is said of them."""

    def __init__(self, parts: list[oof.Logits]) -> None:
        self.y = np.concatenate([own.class_idx for own in parts])
        self.views = np.concatenate([own.logits for own in parts])
        self.single = np.concatenate([own.single for own in parts])
        self.dark = np.concatenate([own.corrupt for own in parts], axis=1)
        self.index = np.concatenate([own.index for own in parts])
        self.fold = np.concatenate([own.fold for own in parts])

    @property
    def n(self) -> int:
        return len(self.y)

    def top1(self, logits: np.ndarray) -> float:
        return metrics.accuracy_score(self.y, logits.argmax(1))

    @property
    def corrupted(self) -> float:
        return float(np.mean([self.top1(logits) for logits in self.dark]))

    @property
    def s(self) -> float:
        return ALPHA * self.top1(self.single) + (1 - ALPHA) * self.corrupted

    @property
    def top5(self) -> float:
        return float(np.mean([y in np.argsort(-z)[:5] for z, y in zip(self.views, self.y, strict=True)]))

    def nll(self, t: float = 1) -> float:
        probs = softmax(self.views.astype(float) / t, axis=1)
        return metrics.log_loss(self.y, probs, labels=range(len(IDS)))

    def macro(self, what: str) -> float:
        guess = self.views.argmax(1)
        score = metrics.recall_score if what == "recall" else metrics.f1_score
        return score(self.y, guess, labels=np.unique(self.y), average="macro", zero_division=0)

    def numbers(self) -> list[str]:
        """The cells of the members table from n on."""
        t = temperature(self.views, self.y)
        hits = self.top1(self.views)
        return [
            str(self.n), p(self.top1(self.single)), p(hits), span(hits * self.n, self.n), p(self.corrupted), p(self.s),
            p(self.macro("f1")), p(self.top5), f"{self.nll():.3f}", p(ece(self.views, self.y)), f"{t:.3f}",
            p(ece(self.views, self.y, t)),
        ]  # fmt: skip


def tables(html: str) -> dict[str, list[list[str]]]:
    """id -> the text of the rows of each table's body and foot."""
    found = {}
    for attributes, content in re.findall(r"<table([^>]*)>(.*?)</table>", html, flags=re.S):
        name = re.search(r'id="([^"]+)"', attributes)
        content = re.sub(r"<thead>.*?</thead>", "", content, flags=re.S)
        rows = [
            [
                " ".join(entities.unescape(re.sub(r"<[^>]+>", " ", cell)).split())
                for cell in re.findall(r"<t[hd][ >].*?</t[hd]>", row, flags=re.S)
            ]
            for row in re.findall(r"<tr.*?</tr>", content, flags=re.S)
        ]
        found[name[1] if name else rows[0][0]] = [row for row in rows if row]
    return found


@pytest.fixture(scope="module")
def page(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, list[list[str]]], list[oof.Logits], str]:
    """An experiment of two backbones, two seeds and three folds, its page's tables, its members, and the page."""
    members = [member(f, b, s, skill=1.2) for b in BACKBONES for s in SEEDS for f in FOLDS]
    words = [
        "exp.name=made",
        "accept.clean_min=0.5",
        "accept.corrupted_min=0.99",
        "accept.macro_drop_max=0.5",
    ]
    settings = recipe.load(None, words)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("numbers"))
        folder = runs.RESULTS / "made"
        events = [
            {
                **event(epoch, fold), "backbone": backbone, "seed": seed,
                "macro_f1_raw": 0.1, "macro_f1_ema": 0.4 + 0.01 * epoch * (6 - epoch),
            }
            for backbone in BACKBONES for seed in SEEDS for fold in FOLDS for epoch in range(1, 6)
        ]  # fmt: skip
        for row in events:
            runs.append_event(folder / "events.jsonl", row)
        found = summary.summarise(members, folds(), classes_csv(), settings)
        found["acceptance"] = acceptance.check(found, events, settings.accept)
        sets = oof.common([oof.assemble(own, folds()) for own in summary.by_run(members).values()])
        budget = ensembles.Budget.of(sets, settings.bundle)
        runs.write_json(folder / "scores.json", found)
        runs.write_json(folder / "ensemble.json", ensembles.compare(sets, budget, WEIGHTS))
        runs.write_json(
            folder / "gradcam" / "gradcam.json",
            {
                "even": 0.4375,
                "images": [],
                "border": [
                    {
                        "backbone": BACKBONES[0],
                        "right": {"n": 48, "mean": 0.2512},
                        "wrong": {"n": 9, "mean": 0.41},
                    }
                ],
            },
        )
        report.main(["made"])
        html = (folder / "report.html").read_text(encoding="utf-8")
    return tables(html), members, html


def of(members: list[oof.Logits], backbone: str, seed: int, which: tuple[int, ...] = FOLDS) -> Set:
    return Set([own for own in members if own.run == (backbone, seed) and own.about["fold"] in which])


def fused(members: list[oof.Logits]) -> Set:
    """The mean over runs, image by image."""
    parts = [of(members, b, s) for b in BACKBONES for s in SEEDS]
    whole = parts[0]
    for name in ("views", "single", "dark"):
        setattr(
            whole,
            name,
            np.mean([getattr(part, name).astype(float) for part in parts], axis=0).astype(np.float32),
        )
    return whole


def test_every_table_is_checked(page: Any) -> None:
    checked = {
        "acceptance", "overview", "members", "folds", "stages", "methods", "weights", "corruptions", "robust", "parts",
        "per-class", "confusions", "border",
    }  # fmt: skip
    assert {
        name for name in page[0] if "." not in name
    } == checked  # a dot: keys of the recipe, no numbers of ours


def test_members_runs_and_fused(page: Any) -> None:
    rows, members, _ = page
    expected = [of(members, b, s, (f,)).numbers() for b in BACKBONES for s in sorted(SEEDS) for f in FOLDS]
    expected += [of(members, b, s).numbers() for b in BACKBONES for s in sorted(SEEDS)] + [
        fused(members).numbers()
    ]
    order = sorted(rows["members"][:12], key=lambda row: (row[0], int(row[2]), int(row[1])))
    assert [row[4:] for row in [*order, *rows["members"][12:]]] == expected


def test_means_over_folds(page: Any) -> None:
    rows, members, _ = page
    for row in rows["folds"]:
        backbone, seed = row[0].split(" seed ")
        parts = [of(members, backbone, int(seed), (f,)) for f in FOLDS]
        columns = [
            [part.top1(part.single) for part in parts], [part.top1(part.views) for part in parts],
            [part.corrupted for part in parts], [part.s for part in parts], [part.macro("recall") for part in parts],
            [part.macro("f1") for part in parts], [part.nll() for part in parts],
            [ece(part.views, part.y) for part in parts],
        ]  # fmt: skip
        for at, (cell, values) in enumerate(zip(row[1:], columns, strict=True)):
            mean, std = np.mean(values), np.std(values, ddof=1)
            assert cell == (f"{mean:.3f} ± {std:.3f}" if at == 6 else f"{p(mean)} ± {p(std)}")


def test_overview(page: Any) -> None:
    rows, members, _ = page
    whole = fused(members)
    t, n = temperature(whole.views, whole.y), whole.n
    losses = -np.log(softmax(whole.views.astype(float), axis=1)[np.arange(n), whole.y])
    values = [row[1] for row in rows["overview"]]
    assert values == [
        p(whole.top1(whole.views)), p(whole.top1(whole.single)), p(whole.corrupted), p(whole.s), p(whole.top5),
        p(whole.macro("recall")), p(whole.macro("f1")), f"{whole.nll():.3f}", p(ece(whole.views, whole.y)),
        f"{whole.nll(t):.3f}", p(ece(whole.views, whole.y, t)),
    ]  # fmt: skip
    shares = [whole.top1(whole.views), whole.top1(whole.single), whole.corrupted, whole.s, whole.top5]
    assert [row[2] for row in rows["overview"][:5]] == [span(share * n, n) for share in shares]
    half = 1.959964 * losses.std(ddof=1) / np.sqrt(n)
    assert rows["overview"][7][2] == f"{losses.mean() - half:.3f}–{losses.mean() + half:.3f}"
    rng = np.random.default_rng(1)  # the bootstrap again, image by image, with other random numbers
    drawn: dict[int, list[float]] = {5: [], 6: [], 8: []}
    for _ in range(400):
        own = np.concatenate(
            [rng.choice(np.flatnonzero(whole.y == c), (whole.y == c).sum()) for c in np.unique(whole.y)]
        )
        guess = whole.views[own].argmax(1)
        drawn[5].append(metrics.balanced_accuracy_score(whole.y[own], guess))
        drawn[6].append(metrics.f1_score(whole.y[own], guess, average="macro"))
        drawn[8].append(ece(whole.views[own], whole.y[own]))
    for at, sample in drawn.items():
        ends = [float(end) / 100 for end in rows["overview"][at][2].split("–")]
        np.testing.assert_allclose(ends, np.percentile(sample, [2.5, 97.5]), atol=0.02)
    assert {row[3] for row in rows["overview"]} == {str(n)}


def test_cards(page: Any) -> None:
    _, members, html = page
    whole = fused(members)
    t = temperature(whole.views, whole.y)
    shown = re.findall(r"<b>([\d.]+)%</b>", html)
    assert shown == [
        p(v)
        for v in (
            whole.top1(whole.views),
            whole.corrupted,
            whole.s,
            whole.macro("f1"),
            ece(whole.views, whole.y, t),
        )
    ]


def test_corruptions_and_their_classes(page: Any) -> None:
    rows, members, _ = page
    whole = fused(members)
    clean, base = whole.top1(whole.single), whole.single.argmax(1)
    for row, logits, (kind, level) in zip(rows["corruptions"], whole.dark, COMBOS, strict=False):
        hits, guess = whole.top1(logits), logits.argmax(1)
        assert row == [
            kind, level, p(hits), span(hits * whole.n, whole.n), p(clean - hits), p(np.mean(guess == base)),
            p(metrics.f1_score(whole.y, guess, average="macro")),
        ]  # fmt: skip
    kept = np.mean([(logits.argmax(1) == base).mean() for logits in whole.dark])
    f1 = np.mean([metrics.f1_score(whole.y, logits.argmax(1), average="macro") for logits in whole.dark])
    mean = [
        p(whole.corrupted),
        span(whole.corrupted * whole.n, whole.n),
        p(clean - whole.corrupted),
        p(kept),
        p(f1),
    ]
    assert rows["corruptions"][-1] == ["mean", "", *mean]
    recall = [metrics.recall_score(whole.y, logits.argmax(1), average=None) for logits in whole.dark]
    expected = {
        NAMES[c]: [str((whole.y == c).sum()), *(p(own[c], 0) for own in recall)] for c in range(len(IDS))
    }
    assert {row[0]: row[1:] for row in rows["robust"]} == expected


def test_parts_classes_and_confusions(page: Any) -> None:
    rows, members, _ = page
    whole = fused(members)
    guess, counts = whole.views.argmax(1), [int(row["n"]) for row in classes_csv()]
    precision, recall, f1, n = metrics.precision_recall_fscore_support(whole.y, guess)
    for c, row in enumerate(rows["per-class"]):
        own = whole.y == c
        dark, light = (whole.dark[:, own].argmax(2) == c).mean(), (whole.single[own].argmax(1) == c).mean()
        part = "head" if counts[c] > 100 else "tail" if counts[c] < 20 else "middle"
        assert row == [
            NAMES[c], part, str(counts[c]), str(n[c]), p(precision[c]), p(recall[c]), p(f1[c]),
            span(recall[c] * n[c], n[c]), p(dark), p(light - dark),
        ]  # fmt: skip
    for row, classes in zip(rows["parts"], ([0], [1, 2, 3], [4, 5]), strict=True):
        own = np.isin(whole.y, classes)
        hits = metrics.accuracy_score(whole.y[own], guess[own])
        sizes = [counts[c] for c in classes]
        assert row[1:] == [
            str(len(classes)), f"{min(sizes)}–{max(sizes)}", str(own.sum()), p(hits), span(hits * own.sum(), own.sum()),
            p(recall[classes].mean()),
        ]  # fmt: skip
    matrix = metrics.confusion_matrix(whole.y, guess)
    seen = {(row[0], row[1]): row[2:] for row in rows["confusions"]}
    assert seen == {
        (NAMES[i], NAMES[j]): [str(matrix[i, j]), str(n[i]), p(matrix[i, j] / n[i])]
        for i, j in zip(*np.nonzero(matrix), strict=True) if i != j
    }  # fmt: skip


def test_stages_are_those_of_the_events(page: Any) -> None:
    rows, members, _ = page
    assert len(rows["stages"]) == 2 * len(members)
    for row, (first, last) in zip(rows["stages"], [(1, 3), (4, 5)] * len(members), strict=True):
        n = int((folds() == int(row[0].split()[2])).sum())
        own = event(last, 0)  # scores rise with each epoch, the averaged weights' more
        clean, dark, s = own["clean_ema"], own["corrupt_ema"], own["s_ema"]
        scores = [cell for value in (clean, dark, s) for cell in (p(value), span(value * n, n))]
        assert row[1:] == [str(own["size"][0]), f"{first}–{last}", str(last), "ema", str(n), *scores]


def test_methods_and_weights(page: Any) -> None:
    rows, members, _ = page
    sets = [of(members, b, s) for b in BACKBONES for s in sorted(SEEDS)]
    y, fold, stack = sets[0].y, sets[0].fold, np.stack([own.views.astype(float) for own in sets])
    shown = {row[0]: row[1:] for row in rows["methods"]}
    single = [own.top1(own.views) for own in sets]
    base = np.empty(len(y), bool)
    for part in FOLDS:  # the best run by the other folds
        rest = [(own.views.argmax(1) == y)[fold != part].mean() for own in sets]
        base[fold == part] = (stack[int(np.argmax(rest))].argmax(1) == y)[fold == part]
    mixes = {
        "mean of logits": softmax(stack.mean(0), axis=1),
        "mean of probabilities": softmax(stack, axis=2).mean(0),
        "hand-set weights": softmax(np.tensordot([0.375, 0.375, 0.125, 0.125], stack, axes=1), axis=1),
    }
    for name, probs in mixes.items():
        hit = probs.argmax(1) == y
        gains = [hit[fold == part].mean() - base[fold == part].mean() for part in FOLDS]
        gain = hit.mean() - base.mean()
        calibration = MulticlassCalibrationError(len(IDS), n_bins=15)(
            torch.from_numpy(probs), torch.from_numpy(y)
        )
        assert shown[name] == [
            p(hit.mean()), span(hit.sum(), len(y)), p(metrics.f1_score(y, probs.argmax(1), average="macro")),
            f"{metrics.log_loss(y, probs):.3f}", p(float(calibration)),
            *(f"{100 * v:+.2f}" for v in (gain, min(gains), max(gains))), "120.0", "24.0", "fits",
        ], name  # fmt: skip
    assert shown["best single"][0] == p(base.mean()) and shown["best single"][8:] == ["30.0", "6.0", "fits"]
    assert {"learned weights", "greedy in budget", "logistic stacking", "LightGBM stacking"} <= set(shown)
    assert f"{p(min(single))} to {p(max(single))}%" in page[2]
    hand = {row[0]: row[1] for row in rows["weights"]}
    assert [hand[f"{b} seed {s}"] for b in BACKBONES for s in sorted(SEEDS)] == [
        "0.375",
        "0.375",
        "0.125",
        "0.125",
    ]
    for column in (2, 3):
        assert sum(float(row[column]) for row in rows["weights"]) == pytest.approx(1, abs=0.002)


def test_acceptance_and_border(page: Any) -> None:
    rows, members, _ = page
    whole = fused(members)
    clean, n = whole.top1(whole.views), str(whole.n)
    fall = 100 * max(max(e * (6 - e) for e in stage) - chosen * (6 - chosen) for stage, chosen in (
        ((1, 2, 3), 3), ((4, 5), 4), ((4, 5), 5))) * 0.01  # fmt: skip
    assert rows["acceptance"] == [
        ["clean top-1", "✓ accepted", p(clean), "at least 50.0", span(clean * whole.n, whole.n), n],
        ["corrupted top-1", "✗ not reached", p(whole.corrupted), "at least 99.0",
         span(whole.corrupted * whole.n, whole.n), n],
        ["fall of macro F1, worst member", "✓ accepted", f"{fall:.1f}", "at most 50.0", "–", "–"],
    ]  # fmt: skip
    assert rows["border"] == [[BACKBONES[0], "25.1", "48", "41.0", "9"]]


def test_probabilities_under_pictures(page: Any) -> None:
    _, members, html = page
    whole = fused(members)
    probs = softmax(whole.views.astype(float) / temperature(whole.views, whole.y), axis=1)
    shown = html.partition('id="mistakes-list"')[2].partition("</section>")[0]
    items = re.findall(r"<figure>.*?</figure>", shown, flags=re.S)
    assert len(items) >= min(36, int((probs.argmax(1) != whole.y).sum()))
    for item in items:
        at = int(
            np.flatnonzero(whole.index == int(re.search(r"<small>image_(\d+)\.jpg</small>", item)[1]))[0]
        )
        odds = [float(value) for value in re.findall(r"<span>([\d.]+)%</span>", item)]
        expected = [100 * probs[at, c] for c in np.argsort(-probs[at], kind="stable")[:3]]
        if len(odds) == 4:
            expected.append(100 * probs[at, whole.y[at]])
        np.testing.assert_allclose(odds, expected, atol=0.06)
