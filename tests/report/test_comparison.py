"""Every number in compare.html and report.md against an independent computation.

`pytest tests/report/test_comparison.py --page results/results/<a> --page results/results/<b>` checks the
compare.html and report.md of existing experiments, given in the order in which they were compared.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from fastflower.core import runs
from fastflower.core.records import write_record
from fastflower.core.tables import read_csv
from fastflower.evaluation import ensembles, summary
from fastflower.evaluation.logits import align, assemble
from fastflower.recipe import load
from fastflower.report.__main__ import main
from fastflower.report.experiment import read_experiment
from fastflower.report.markdown_page import cell
from fastflower.report.paired_metrics import metric_differences
from support.fake_members import BACKBONES, experiment, folds, member, trained
from support.reference_scores import Evaluated, Set, check_words, kind, logged, p, probabilities, span, wilson
from support.report_parser import drawings, markdown_tables, tables

pytestmark = pytest.mark.slow  # three experiments, compared in both formats, are written first
Compared = tuple[list[Evaluated], str, str]


def make() -> list[Path]:
    """Three experiments: all folds; two backbones on two of the folds; one on different folds, with thresholds."""
    content = {
        "a": ([member(f, skill=1.0) for f in (0, 1, 2)], ["ts.enabled=true"]),
        "b": (
            [member(f, b, skill=1.6) for b in BACKBONES for f in (0, 2)],
            ["opt.lr=0.003", "reg.mix_prob=0", "select.metric=auc"],
        ),
        "c": ([member(f, folds_hash="other") for f in (0, 1, 2)], ["accept.clean_min=0.999"]),
    }
    for name, (members, overrides) in content.items():
        rows = [row for member_ in members for row in trained(*member_.run, member_.info.fold)]
        for row in rows if name == "b" else []:
            row |= {
                key: value - 0.1 for key, value in row.items() if key.startswith(("clean_", "corrupt_", "s_"))
            }
        experiment(runs.RESULTS / name, members, rows, overrides)
        if name == "a":  # whose report.md is read
            sets = align([assemble(member_, folds()) for member_ in summary.members_by_run(members).values()])
            comparison = ensembles.compare(sets, ensembles.Budget.of(sets, load().bundle))
            write_record(runs.RESULTS / name / "ensemble.json", comparison)
    main(list(content))
    main([*content, "--format", "md"])
    return [(runs.RESULTS / name).absolute() for name in content]


@pytest.fixture(scope="module")
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """The experiments, compare.html, and report.md of the first."""
    pages = request.config.getoption("--page") or []
    if pages:
        folders = [Path(request.config.invocation_params.dir, name) for name in pages]
        if len(folders) < 2:
            pytest.skip("a comparison needs two pages")
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("compared"))
            folders = make()
    columns = ("class_idx", "category_id", "n")
    experiments = [
        Evaluated(folder, read_csv(folder / "meta" / "classes.csv", columns)) for folder in folders
    ]
    html = (folders[0].parent / "compare.html").read_text(encoding="utf-8")
    return experiments, html, (folders[0] / "report.md").read_text(encoding="utf-8")


def test_every_table_is_checked(compared: Compared) -> None:
    assert set(tables(compared[1])) == {"experiments", "differences", "metrics", "folds", "keys"}


def test_scores_of_experiments(compared: Compared) -> None:
    experiments, html, _ = compared
    expected = []
    for data in experiments:
        fused = data.fused
        clean, n = fused.top1(fused.views), fused.n
        expected.append([
            data.name, str(len(data.members)), f"{len(data.folds)} of {len(data.all_folds)}", str(n), p(clean),
            span(clean * n, n), p(fused.corrupted), span(fused.corrupted * n, n), p(fused.s), p(fused.macro("f1")),
            f"{fused.nll():.3f}", p(fused.ece(fused.t)),
        ])  # fmt: skip
    assert tables(html)["experiments"] == expected
    folds_differ = len({tuple(data.folds) for data in experiments}) > 1
    assert ("cover different folds" in html) == folds_differ
    chart, sets = drawings(html)["compare-scores"], [data.fused for data in experiments]
    for name, values in (
        ("clean", [fused.top1(fused.views) for fused in sets]),
        ("corrupted", [fused.corrupted for fused in sets]),
        ("S", [fused.s for fused in sets]),
    ):
        np.testing.assert_allclose(chart.points[name][0], values, atol=2e-3)
        ends = [wilson(value * fused.n, fused.n) for value, fused in zip(values, sets, strict=True)]
        np.testing.assert_allclose([bar[0] for bar in chart.bars[name]], ends, atol=2e-3)
        assert all(
            f"{data.name} {name} {p(value)}%" in chart.description
            for data, value in zip(experiments, values, strict=True)
        )


def test_scores_by_fold(compared: Compared) -> None:
    experiments, html, _ = compared
    expected = []
    for data in experiments:
        for member_ in data.members:
            run = member_["backbone"], member_["seed"], member_["fold_of"]
            scored = data.of(*run)
            values = [scored.top1(scored.single), scored.top1(scored.views), scored.corrupted, scored.s]
            expected.append([data.name, run[0], str(run[2]), str(run[1]), *map(p, values)])
    assert tables(html)["folds"] == expected


def paired(baseline: Set, experiment: Set) -> tuple[int, int, int, float, tuple[float, float]]:
    """n, newly right, newly wrong, the mean difference and the interval of Agresti and Min, on the shared images."""
    first = dict(zip(baseline.index.tolist(), (baseline.guess == baseline.y).tolist(), strict=True))
    second = dict(zip(experiment.index.tolist(), (experiment.guess == experiment.y).tolist(), strict=True))
    change = np.array([second[i] - first[i] for i in sorted(first.keys() & second.keys())], dtype=float)
    gained, lost, n = int((change > 0).sum()), int((change < 0).sum()), len(change) + 2
    middle = (gained - lost) / n
    half = 1.959964 * np.sqrt((gained + lost + 1) / n - middle**2) / np.sqrt(n)
    return len(change), gained, lost, float(change.mean()), (middle - half, middle + half)


def comparable(first: Evaluated, second: Evaluated) -> bool:
    return first.members[0]["info"]["folds_hash"] == second.members[0]["info"]["folds_hash"]


def test_paired_differences_are_those_of_shared_images(compared: Compared) -> None:
    (first, *others), html, _ = compared
    expected = []
    for data in others:
        if not comparable(first, data):
            expected.append([data.name, "no shared images or different folds"])
            continue
        n, gained, lost, mean, (low, high) = paired(first.fused, data.fused)
        ends = f"{100 * low:+.2f} to {100 * high:+.2f}"
        verdict = "better" if low > 0 else "worse" if high < 0 else "not significant"
        expected.append([data.name, str(n), str(gained), str(lost), f"{100 * mean:+.2f}", ends, verdict])
    assert tables(html)["differences"] == expected
    known, chart = [row for row in expected if len(row) > 2], drawings(html).get("compare-differences")
    assert (chart is None) == (not known)
    if chart:
        np.testing.assert_allclose(chart.points[""][0], [float(row[4]) / 100 for row in known], atol=2e-3)
        ends = [[float(end) / 100 for end in row[5].split(" to ")] for row in known]
        np.testing.assert_allclose([bar[0] for bar in chart.bars[""]], ends, atol=2e-3)
        assert all(f"{row[0]} {row[4]} points" in chart.description for row in known)


def shared(first: Set, second: Set) -> tuple[Set, Set]:
    """The images that both predicted."""
    both = np.intersect1d(first.index, second.index)
    pair = []
    for one in (first, second):
        rows = np.flatnonzero(np.isin(one.index, both))
        part = copy.copy(one)
        part.y, part.index, part.views, part.single = (
            one.y[rows],
            one.index[rows],
            one.views[rows],
            one.single[rows],
        )
        part.dark = one.dark[:, rows]
        pair.append(part)
    return pair[0], pair[1]


MEASURES: dict[str, Callable[[Set], float]] = {
    "Corrupted top-1": lambda data: data.corrupted,
    "S": lambda data: data.s,
    "Macro recall": lambda data: data.macro("recall"),
    "Macro F1": lambda data: data.macro("f1"),
    "Log loss": lambda data: data.nll(),
    "AUC": lambda data: metrics.roc_auc_score(data.y, probabilities(data.views), multi_class="ovr"),
}


def drawn(pair: tuple[Set, Set], measure: Callable[[Set], float]) -> np.ndarray:
    """The ends of the interval of a difference, over draws of the images within each class, with another seed."""
    rng, y, values = np.random.default_rng(5), pair[0].y, []
    for _ in range(200):
        rows = np.concatenate([rng.choice(np.flatnonzero(y == c), (y == c).sum()) for c in np.unique(y)])
        parts = []
        for one in pair:
            part = copy.copy(one)
            part.y, part.views, part.single, part.dark = (
                y[rows],
                one.views[rows],
                one.single[rows],
                one.dark[:, rows],
            )
            parts.append(measure(part))
        values.append(parts[1] - parts[0])
    return np.percentile(values, [2.5, 97.5])


def test_paired_differences_by_every_metric(compared: Compared) -> None:
    (first, *others), html, _ = compared
    rows = tables(html).get("metrics", [])
    for data in others:
        own = {row[1]: row for row in rows if row[0] == data.name}
        if not comparable(first, data):
            assert not own
            continue
        pair = shared(first.fused, data.fused)
        assert {"Corrupted top-1", "S", "Macro recall", "Macro F1", "Log loss"} <= own.keys()
        assert "AUC" in own or data.recipe["select"]["metric"] != "auc"
        for name in own.keys() & MEASURES.keys():
            before, after = map(MEASURES[name], pair)
            _, _, n, *values, ends, verdict = own[name]
            assert (n, *values) == (
                str(pair[0].n),
                f"{before:.4f}",
                f"{after:.4f}",
                f"{after - before:+.4f}",
            ), name
            low, high = map(float, ends.split(" to "))
            tolerance = 0.25 * (high - low) + 1e-3
            if name in ("S", "Macro F1"):
                np.testing.assert_allclose(
                    [low, high], drawn(pair, MEASURES[name]), atol=tolerance, err_msg=name
                )
            better = "better" if (low > 0) != (name == "Log loss") else "worse"
            assert verdict == (better if low > 0 or high < 0 else "not significant"), name


def test_experiments_without_their_logits_are_named(tmp_path: Path) -> None:
    for name, skill in (("a", 1.0), ("b", 1.6)):
        members = [member(fold, skill=skill) for fold in (0, 1, 2)]
        experiment(runs.RESULTS / name, members, trained(*members[0].run, 0), [])
    for path in (runs.RESULTS / "b" / "oof").glob("*fold0*"):
        path.unlink()
    rows, notes = metric_differences([read_experiment(name, with_images=False) for name in ("a", "b")])
    assert not rows and len(notes) == 1 and notes[0].startswith("b: ") and "fold0" in notes[0]


def test_curves_are_means_over_the_runs(compared: Compared) -> None:
    experiments, html, _ = compared
    charts = drawings(html)
    names = {"compare-s", "compare-clean", "compare-corrupt"}
    assert set(charts) - {"compare-differences"} == {*names, "compare-scores"}
    for name in names:
        chart = charts[name]
        stem = name.removeprefix("compare-")
        for data in experiments:
            by_epoch: dict[int, list[float]] = {}
            for backbone, fold, seed in data.trainings:
                for row in data.epochs(backbone, seed, fold):
                    better = max(row[f"{stem}_raw"], row[f"{stem}_ema"])
                    by_epoch.setdefault(row["epoch"], []).append(better)
            means = {epoch: float(np.mean(values)) for epoch, values in by_epoch.items()}
            xs, ys = chart.lines[data.name]
            np.testing.assert_allclose(np.interp(list(means), xs, ys), list(means.values()), atol=2e-3)
            check_words(chart.description, data.name, means)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or prefix == "ensembling.weights":
        return {prefix: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in flat(child, f"{prefix}.{name}".strip(".")).items()
    }


def differing(experiments: list[Evaluated]) -> dict[str, list[Any]]:
    recipes = [flat(data.recipe) for data in experiments]
    return {
        key: [recipe[key] for recipe in recipes]
        for key in recipes[0]
        if key != "exp.name" and any(recipe[key] != recipes[0][key] for recipe in recipes)
    }


def texts_equal(texts: list[str], values: list[Any]) -> bool:
    return all(
        text == str(value) or (isinstance(value, (int, float)) and float(text) == value)
        for text, value in zip(texts, values, strict=True)
    )


def test_keys_are_those_that_differ(compared: Compared) -> None:
    experiments, html, _ = compared
    shown = {key: values for key, *values in tables(html)["keys"]}
    expected = differing(experiments)
    assert shown.keys() == expected.keys() and all(texts_equal(shown[key], expected[key]) for key in expected)


def top1(hits: float, n: int) -> str:
    return f"{p(hits)} ({span(hits * n, n)})"


def test_results_of_the_markdown_report(compared: Compared) -> None:
    (data, *_), _, text = compared
    fused = data.fused
    n, t = fused.n, fused.t
    rows = markdown_tables(text)["Result 1"]
    values = [fused.top1(fused.views), fused.top1(fused.single), fused.corrupted, fused.s]
    assert [row[1:] for row in rows] == [[str(n), top1(value, n)] for value in values]
    assert rows[2][0] == f"corrupted, mean of {len(data.combos)} corruptions"
    assert rows[3][0] == "S = 0.7 clean + 0.3 corrupted"
    line = next(line for line in text.splitlines() if line.startswith("Macro F1"))
    scores = re.findall(r"([\d.]+) \(([\d.]+)–([\d.]+)\)", line)
    expected = [fused.macro("f1"), fused.macro("recall"), fused.top5, fused.nll()]
    assert [row[0] for row in scores] == [*map(p, expected[:3]), f"{expected[3]:.3f}"]
    bootstrap = fused.bootstrap(t)
    for row, name in zip(scores, ("f1", "recall"), strict=False):
        np.testing.assert_allclose([float(end) / 100 for end in row[1:]], bootstrap[name], atol=0.02)
    assert "–".join(scores[2][1:]) == span(expected[2] * n, n) and "–".join(scores[3][1:]) == fused.nll_span()
    sentence = re.search(
        r"T = ([\d.]+) changes .*? from ([\d.]+) to ([\d.]+) .*? from ([\d.]+) to ([\d.]+)\.", text
    )
    after = [f"{t:.3f}", f"{fused.nll():.3f}", f"{fused.nll(t):.3f}", p(fused.ece()), p(fused.ece(t))]
    assert list(sentence.groups()) == after


def test_method_of_the_markdown_report(compared: Compared) -> None:
    (data, *_), _, text = compared
    chosen, rows = flat(data.recipe), markdown_tables(text).get("Method 1", [])
    for name, value, default in rows:
        assert texts_equal([value], [chosen[name.strip("`")]]) and value != default
    body = text.partition("## 2. Method")[2].partition("## 3.")[0]
    sentences = {
        "draws of an image": r"at most ([\d.]+) draws", "reg.ls_eps": r"label smoothing ([\d.]+)",
        "reg.mixup": r"MixUp \(Beta ([\d.]+)\)", "reg.cutmix": r"CutMix \(Beta ([\d.]+)\)",
        "reg.mix_prob": r"fraction of ([\d.]+) of", "opt.weight_decay": r"weight decay ([\d.e-]+),",
        "sched.cosine_epochs": r"over (\d+) epochs", "sched.warmup_epochs": r"including (\d+) of warm",
        "ema.decay": r"decay ([\d.]+)\)",
    }  # fmt: skip
    chosen["draws of an image"] = chosen["sampler.oversample_cap"]
    if chosen["sched.warmup_epochs"] == "auto":
        chosen["sched.warmup_epochs"] = min(5, chosen["sched.cosine_epochs"] / 8)
    for key, pattern in sentences.items():
        assert float(re.search(pattern, body)[1]) == chosen[key], key


def test_members_of_the_markdown_report(compared: Compared) -> None:
    (data, *_), _, text = compared
    rows_by_table = markdown_tables(text)
    for row, listed in zip(rows_by_table["Members 1"], data.members, strict=False):
        block = data.of(listed["backbone"], listed["seed"], listed["fold_of"])
        clean = block.top1(block.views)
        assert row[1:] == [
            str(listed["fold_of"]), str(listed["seed"]), str(block.n), p(block.top1(block.single)),
            top1(clean, block.n), p(block.corrupted), p(block.s), f"{block.t:.3f}",
        ]  # fmt: skip
    for row, run in zip(rows_by_table.get("Members 2", []), data.runs, strict=False):
        block = data.of(*run)
        clean = block.top1(block.views)
        f1 = [data.of(*run, fold).macro("f1") for fold in data.folds]
        assert row[1:] == [
            str(len(data.folds)), str(block.n), p(block.top1(block.single)), top1(clean, block.n), p(block.corrupted),
            p(block.s), f"{p(np.mean(f1))} ± {p(np.std(f1, ddof=1))}",
        ]  # fmt: skip


def test_the_markdown_report_has_the_ensembling_methods_of_the_page(compared: Compared) -> None:
    """test_numbers.py checks the numbers of the page."""
    (data, *_), _, text = compared
    rows = markdown_tables(text).get("Members 3")
    if rows is None:
        pytest.skip("the experiment has no ensemble.json")
    html = tables((data.folder / "report.html").read_text(encoding="utf-8"))["methods"]
    for row, cells in zip(rows, html, strict=True):
        megabytes = cells[11] if cells[11] == "–" else f"{float(cells[11]):.0f}"
        assert row == [
            cells[0],
            f"{cells[1]} ({cells[2]})",
            cells[3],
            cells[4],
            cells[5],
            cells[6] if cells[7] == "–" else f"{cells[6]} ({cells[7]})",
            cells[8],
            megabytes,
            cells[12],
        ]


def test_robustness_and_errors_of_the_markdown_report(compared: Compared) -> None:
    (data, *_), _, text = compared
    fused, rows_by_table = data.fused, markdown_tables(text)
    n, base, clean = fused.n, fused.single.argmax(1), fused.top1(fused.single)
    for row, (name, level), logits in zip(
        rows_by_table["Robustness 1"], data.combos, fused.dark, strict=True
    ):
        hits = fused.top1(logits)
        kept = p(np.mean(logits.argmax(1) == base))
        assert row == [kind(name), level, top1(hits, n), p(clean - hits), kept]
    wrong = int((fused.guess != fused.y).sum())
    assert f"{wrong} of {n} images are misclassified." in text
    matrix = metrics.confusion_matrix(fused.y, fused.guess, labels=range(len(data.ids)))
    parts = ["head" if count > 100 else "tail" if count < 20 else "middle" for count in data.counts]
    blocks = [name for name in rows_by_table if name.startswith("Errors")]
    for row in rows_by_table["Errors 1"] if len(blocks) == 2 else []:
        chosen = [c for c, part in enumerate(parts) if part == row[0]]
        in_part = np.isin(fused.y, chosen)
        recall = [(fused.guess[fused.y == c] == c).mean() for c in chosen if (fused.y == c).any()]
        images, hits = [data.counts[c] for c in chosen], (fused.guess == fused.y)[in_part].mean()
        assert row[1:] == [
            str(len(chosen)), f"{min(images)}–{max(images)}", str(in_part.sum()), top1(hits, in_part.sum()),
            p(np.mean(recall)),
        ]  # fmt: skip
    names = {name: c for c, name in enumerate(data.plain)}
    totals = []
    for pair, *counts in rows_by_table[blocks[-1]]:
        a, b = (names[name.replace("&lt;", "<").replace("&amp;", "&")] for name in pair.split(", "))
        assert counts == [str(matrix[a, b]), str(matrix[b, a])]
        totals.append(matrix[a, b] + matrix[b, a])
    both = np.triu(matrix + matrix.T, 1)
    assert totals == sorted(both[both > 0], reverse=True)[:10]


def test_ablations_of_the_markdown_report(compared: Compared) -> None:
    (data, *others), _, text = compared
    rows, keys = (markdown_tables(text)[f"Ablations {number}"] for number in (1, 2))
    for row, other in zip(rows, others, strict=True):
        scored = other.fused
        difference = "no shared images"
        if comparable(data, other):
            n, _, _, mean, (low, high) = paired(data.fused, scored)
            ends = f"{100 * low:+.2f} to {100 * high:+.2f}"
            difference = f"{100 * mean:+.2f} ({ends}), n = {n}"
        clean = top1(scored.top1(scored.views), scored.n)
        assert row == [other.name, str(scored.n), clean, p(scored.corrupted), p(scored.s), difference]
    shown, expected = {key.strip("`"): values for key, *values in keys}, differing([data, *others])
    assert shown.keys() == expected.keys() and all(texts_equal(shown[key], expected[key]) for key in expected)


def test_figures_of_the_markdown_report_show_the_events(compared: Compared) -> None:
    (data, *_), _, text = compared
    rows = data.epochs(*(data.trainings[0][i] for i in (0, 2, 1)))
    figures = dict(re.findall(r"!\[(.*?)\]\(figures/run0-(\w+)\.png\)", text))
    assert set(figures.values()) == {"loss", "clean", "corrupt", "s", "lr"}
    for description, chart in figures.items():
        for label in re.findall(r"[.;] ([^:;]+): ", description):
            check_words(description, label, {row["epoch"]: logged(row, chart, label) for row in rows})
    together = dict(re.findall(r"!\[(.*?)\]\(figures/together-(\w+)\.png\)", text))
    assert len(together) == (3 if 1 < len(data.trainings) <= 12 else 0)
    for description, stem in together.items():
        labels = re.findall(r"[.;] ([^:;]+): ", description)
        for label, (backbone, fold, seed) in zip(labels, data.trainings, strict=True):
            better = {
                row["epoch"]: max(row[f"{stem}_raw"], row[f"{stem}_ema"])
                for row in data.epochs(backbone, seed, fold)
            }
            check_words(description, label, better)
    named = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert all((data.folder / name).read_bytes().startswith(b"\x89PNG") for name in named)
    assert len(named) >= 9


def test_markdown_cells_escape_their_text() -> None:
    assert cell("dog <rose> | x & y") == "dog &lt;rose> \\| x &amp; y"
