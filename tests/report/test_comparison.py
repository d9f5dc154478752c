"""Every number on the page that compares experiments, and in the drafts of their reports, computed again.

`pytest tests/report/test_comparison.py --page results/results/<a> --page results/results/<b>` does the same to
compare.html and report.md of one's own, given in the order in which they were compared.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from fastflower.core import files, runs
from fastflower.core.tables import read_csv
from fastflower.evaluation import ensembles, summary
from fastflower.evaluation.logits import assemble, common
from fastflower.recipe import load
from fastflower.report.__main__ import main
from fastflower.report.markdown_page import cell
from support.fake_members import BACKBONES, experiment, folds, member, trained
from support.reference_scores import Evaluated, Set, check_words, kind, logged, p, span, wilson
from support.report_parser import drawings, markdown_tables, tables

Compared = tuple[list[Evaluated], str, str]


def make() -> list[Path]:
    """Three experiments: all folds; two backbones on two of the folds; and one of other folds, with thresholds."""
    made = {
        "a": ([member(f, skill=1.0) for f in (0, 1, 2)], ["ts.enabled=true"]),
        "b": (
            [member(f, b, skill=1.6) for b in BACKBONES for f in (0, 2)],
            ["opt.lr=0.003", "reg.mix_prob=0"],
        ),
        "c": ([member(f, folds_hash="other") for f in (0, 1, 2)], ["accept.clean_min=0.999"]),
    }
    for name, (members, words) in made.items():
        rows = [row for own in members for row in trained(*own.run, int(own.about["fold"]))]
        for row in rows if name == "b" else []:
            row |= {
                key: value - 0.1 for key, value in row.items() if key.startswith(("clean_", "corrupt_", "s_"))
            }
        experiment(runs.RESULTS / name, members, rows, words)
        sets = common([assemble(own, folds()) for own in summary.by_run(members).values()])
        found = ensembles.compare(sets, ensembles.Budget.of(sets, load().bundle))
        files.write_json(runs.RESULTS / name / "ensemble.json", found)
    main(list(made))
    main([*made, "--format", "md"])
    return [(runs.RESULTS / name).absolute() for name in made]


@pytest.fixture(scope="module")
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """The experiments, their page, and the draft of the first."""
    given = request.config.getoption("--page") or []
    if given:
        folders = [Path(request.config.invocation_params.dir, name) for name in given]
        if len(folders) < 2:
            pytest.skip("one page is compared with none")
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("compared"))
            folders = make()
    columns = ("class_idx", "category_id", "n")
    found = [Evaluated(folder, read_csv(folder / "meta" / "classes.csv", columns)) for folder in folders]
    html = (folders[0].parent / "compare.html").read_text(encoding="utf-8")
    return found, html, (folders[0] / "report.md").read_text(encoding="utf-8")


def test_every_table_is_checked(compared: Compared) -> None:
    assert set(tables(compared[1])) == {"experiments", "pairs", "folds", "keys"}


def test_scores_of_experiments(compared: Compared) -> None:
    found, html, _ = compared
    expected = []
    for data in found:
        own = data.fused
        clean, n = own.top1(own.views), own.n
        expected.append([
            data.name, str(len(data.members)), f"{len(data.folds)} of {len(data.all_folds)}", str(n), p(clean),
            span(clean * n, n), p(own.corrupted), span(own.corrupted * n, n), p(own.s), p(own.macro("f1")),
            f"{own.nll():.3f}", p(own.ece(own.t)),
        ])  # fmt: skip
    assert tables(html)["experiments"] == expected
    uneven = len({tuple(data.folds) for data in found}) > 1
    assert ("cover different folds" in html) == uneven
    drawn, sets = drawings(html)["compare-scores"], [data.fused for data in found]
    for name, shares in (
        ("clean", [own.top1(own.views) for own in sets]),
        ("corrupted", [own.corrupted for own in sets]),
        ("S", [own.s for own in sets]),
    ):
        np.testing.assert_allclose(drawn.points[name][0], shares, atol=2e-3)
        ends = [wilson(share * own.n, own.n) for share, own in zip(shares, sets, strict=True)]
        np.testing.assert_allclose([bar[0] for bar in drawn.bars[name]], ends, atol=2e-3)
        assert all(
            f"{data.name} {name} {p(value)}%" in drawn.said for data, value in zip(found, shares, strict=True)
        )


def test_scores_by_fold(compared: Compared) -> None:
    found, html, _ = compared
    expected = []
    for data in found:
        for member_ in data.members:
            run = member_["backbone"], member_["seed"], member_["fold_of"]
            own = data.of(*run)
            shares = [own.top1(own.single), own.top1(own.views), own.corrupted, own.s]
            expected.append([data.name, run[0], str(run[2]), str(run[1]), *map(p, shares)])
    assert tables(html)["folds"] == expected


def paired(one: Set, other: Set) -> tuple[int, int, int, float, float]:
    """n, newly right, newly wrong, their share and half its 95% interval, on the images that both predicted."""
    first = dict(zip(one.index.tolist(), (one.guess == one.y).tolist(), strict=True))
    second = dict(zip(other.index.tolist(), (other.guess == other.y).tolist(), strict=True))
    change = np.array([second[i] - first[i] for i in sorted(first.keys() & second.keys())], dtype=float)
    half = 1.959964 * change.std() / np.sqrt(len(change))
    return len(change), int((change > 0).sum()), int((change < 0).sum()), float(change.mean()), float(half)


def alike(one: Evaluated, other: Evaluated) -> bool:
    return one.members[0]["about"]["folds_hash"] == other.members[0]["about"]["folds_hash"]


def test_differences_image_by_image(compared: Compared) -> None:
    (first, *others), html, _ = compared
    expected = []
    for data in others:
        if not alike(first, data):
            expected.append([data.name, "no shared images, or other folds"])
            continue
        n, gained, lost, mean, half = paired(first.fused, data.fused)
        ends = f"{100 * (mean - half):+.2f} to {100 * (mean + half):+.2f}"
        verdict = "better" if mean > half else "worse" if -mean > half else "within chance"
        expected.append([data.name, str(n), str(gained), str(lost), f"{100 * mean:+.2f}", ends, verdict])
    assert tables(html)["pairs"] == expected
    known, drawn = [row for row in expected if len(row) > 2], drawings(html).get("compare-pairs")
    assert (drawn is None) == (not known)
    if drawn:
        np.testing.assert_allclose(drawn.points[""][0], [float(row[4]) / 100 for row in known], atol=2e-3)
        ends = [[float(end) / 100 for end in row[5].split(" to ")] for row in known]
        np.testing.assert_allclose([bar[0] for bar in drawn.bars[""]], ends, atol=2e-3)
        assert all(f"{row[0]} {row[4]} points" in drawn.said for row in known)


def test_curves_are_means_over_the_runs(compared: Compared) -> None:
    found, html, _ = compared
    charts = drawings(html)
    courses = {"compare-s", "compare-clean", "compare-corrupt"}
    assert set(charts) - {"compare-pairs"} == {*courses, "compare-scores"}
    for name in courses:
        drawn = charts[name]
        stem = name.removeprefix("compare-")
        for data in found:
            course: dict[int, list[float]] = {}
            for backbone, fold, seed in data.trainings:
                for row in data.epochs(backbone, seed, fold):
                    better = max(row[f"{stem}_raw"], row[f"{stem}_ema"])
                    course.setdefault(row["epoch"], []).append(better)
            means = {epoch: float(np.mean(values)) for epoch, values in course.items()}
            xs, ys = drawn.lines[data.name]
            np.testing.assert_allclose(np.interp(list(means), xs, ys), list(means.values()), atol=2e-3)
            check_words(drawn.said, data.name, means)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or prefix == "ensembling.weights":
        return {prefix: node}
    return {
        key: value
        for name, own in node.items()
        for key, value in flat(own, f"{prefix}.{name}".strip(".")).items()
    }


def differing(found: list[Evaluated]) -> dict[str, list[Any]]:
    recipes = [flat(data.recipe) for data in found]
    return {
        key: [own[key] for own in recipes]
        for key in recipes[0]
        if key != "exp.name" and any(own[key] != recipes[0][key] for own in recipes)
    }


def same(shown: list[str], values: list[Any]) -> bool:
    return all(
        text == str(value) or (isinstance(value, (int, float)) and float(text) == value)
        for text, value in zip(shown, values, strict=True)
    )


def test_only_the_keys_that_differ(compared: Compared) -> None:
    found, html, _ = compared
    shown = {key: values for key, *values in tables(html)["keys"]}
    expected = differing(found)
    assert shown.keys() == expected.keys() and all(same(shown[key], expected[key]) for key in expected)


def share(hits: float, n: int) -> str:
    return f"{p(hits)} ({span(hits * n, n)})"


def test_the_draft_s_results(compared: Compared) -> None:
    (data, *_), _, text = compared
    own = data.fused
    n, t = own.n, own.t
    rows = markdown_tables(text)["Result 1"]
    values = [own.top1(own.views), own.top1(own.single), own.corrupted, own.s]
    assert [row[1:] for row in rows] == [[str(n), share(value, n)] for value in values]
    assert rows[2][0] == f"corrupted, mean of {len(data.combos)} corruptions"
    assert rows[3][0] == "S = 0.7 clean + 0.3 corrupted"
    line = next(line for line in text.splitlines() if line.startswith("Macro F1"))
    scores = re.findall(r"([\d.]+) \(([\d.]+)–([\d.]+)\)", line)
    again = [own.macro("f1"), own.macro("recall"), own.top5, own.nll()]
    assert [row[0] for row in scores] == [*map(p, again[:3]), f"{again[3]:.3f}"]
    drawn = own.bootstrap(t)
    for row, name in zip(scores, ("f1", "recall"), strict=False):
        np.testing.assert_allclose([float(end) / 100 for end in row[1:]], drawn[name], atol=0.02)
    assert "–".join(scores[2][1:]) == span(again[2] * n, n) and "–".join(scores[3][1:]) == own.nll_span()
    said = re.search(
        r"Temperature ([\d.]+) takes .*? from ([\d.]+) to ([\d.]+) .*? from ([\d.]+) to ([\d.]+)\.", text
    )
    after = [f"{t:.3f}", f"{own.nll():.3f}", f"{own.nll(t):.3f}", p(own.ece()), p(own.ece(t))]
    assert list(said.groups()) == after


def test_the_draft_s_method(compared: Compared) -> None:
    (data, *_), _, text = compared
    chosen, rows = flat(data.recipe), markdown_tables(text).get("Method 1", [])
    for name, value, default in rows:
        assert same([value], [chosen[name.strip("`")]]) and value != default
    body = text.partition("## 2. Method")[2].partition("## 3.")[0]
    sentences = {
        "draws of an image": r"at most ([\d.]+) draws", "reg.ls_eps": r"label smoothing ([\d.]+)",
        "reg.mixup": r"MixUp \(Beta ([\d.]+)\)", "reg.cutmix": r"CutMix \(Beta ([\d.]+)\)",
        "reg.mix_prob": r"share of ([\d.]+) of", "opt.weight_decay": r"weight decay ([\d.e-]+),",
        "sched.cosine_epochs": r"over (\d+) epochs", "sched.warmup_epochs": r"of which (\d+) warm",
        "ema.decay": r"decay ([\d.]+)\)",
    }  # fmt: skip
    chosen["draws of an image"] = chosen["sampler.oversample_cap"]
    for key, pattern in sentences.items():
        assert float(re.search(pattern, body)[1]) == chosen[key], key


def test_the_draft_s_members(compared: Compared) -> None:
    (data, *_), _, text = compared
    found = markdown_tables(text)
    for row, own in zip(found["Members 1"], data.members, strict=False):
        mine = data.of(own["backbone"], own["seed"], own["fold_of"])
        clean = mine.top1(mine.views)
        assert row[1:] == [
            str(own["fold_of"]), str(own["seed"]), str(mine.n), p(mine.top1(mine.single)), share(clean, mine.n),
            p(mine.corrupted), p(mine.s), f"{mine.t:.3f}",
        ]  # fmt: skip
    for row, run in zip(found.get("Members 2", []), data.runs, strict=False):
        mine = data.of(*run)
        clean = mine.top1(mine.views)
        f1 = [data.of(*run, fold).macro("f1") for fold in data.folds]
        assert row[1:] == [
            str(len(data.folds)), str(mine.n), p(mine.top1(mine.single)), share(clean, mine.n), p(mine.corrupted),
            p(mine.s), f"{p(np.mean(f1))} ± {p(np.std(f1, ddof=1))}",
        ]  # fmt: skip


def test_the_draft_has_the_page_s_ways_to_combine(compared: Compared) -> None:
    """Each of which is fitted again where the page is checked."""
    (data, *_), _, text = compared
    shown = markdown_tables(text).get("Members 3")
    if shown is None:
        pytest.skip("not combined")
    html = tables((data.folder / "report.html").read_text(encoding="utf-8"))["methods"]
    for row, own in zip(shown, html, strict=True):
        megabytes = own[9] if own[9] == "–" else f"{float(own[9]):.0f}"
        assert row == [own[0], f"{own[1]} ({own[2]})", own[3], own[4], own[6], megabytes, own[10]]


def test_the_draft_s_robustness_and_errors(compared: Compared) -> None:
    (data, *_), _, text = compared
    own, found = data.fused, markdown_tables(text)
    n, base, clean = own.n, own.single.argmax(1), own.top1(own.single)
    for row, (name, level), logits in zip(found["Robustness 1"], data.combos, own.dark, strict=True):
        hits = own.top1(logits)
        kept = p(np.mean(logits.argmax(1) == base))
        assert row == [kind(name), level, share(hits, n), p(clean - hits), kept]
    wrong = int((own.guess != own.y).sum())
    assert f"{wrong} of {n} images are predicted wrongly." in text
    matrix = metrics.confusion_matrix(own.y, own.guess, labels=range(len(data.ids)))
    parts = ["head" if count > 100 else "tail" if count < 20 else "middle" for count in data.counts]
    blocks = [name for name in found if name.startswith("Errors")]
    for row in found["Errors 1"] if len(blocks) == 2 else []:
        chosen = [c for c, part in enumerate(parts) if part == row[0]]
        mine = np.isin(own.y, chosen)
        recall = [(own.guess[own.y == c] == c).mean() for c in chosen if (own.y == c).any()]
        images, hits = [data.counts[c] for c in chosen], (own.guess == own.y)[mine].mean()
        assert row[1:] == [
            str(len(chosen)), f"{min(images)}–{max(images)}", str(mine.sum()), share(hits, mine.sum()),
            p(np.mean(recall)),
        ]  # fmt: skip
    names = {name: c for c, name in enumerate(data.plain)}
    totals = []
    for said, *counts in found[blocks[-1]]:
        a, b = (names[name.replace("&lt;", "<").replace("&amp;", "&")] for name in said.split(", "))
        assert counts == [str(matrix[a, b]), str(matrix[b, a])]
        totals.append(matrix[a, b] + matrix[b, a])
    both = np.triu(matrix + matrix.T, 1)
    assert totals == sorted(both[both > 0], reverse=True)[:10]


def test_the_draft_s_ablations(compared: Compared) -> None:
    (data, *others), _, text = compared
    rows, keys = (markdown_tables(text)[f"Ablations {place}"] for place in (1, 2))
    for row, other in zip(rows, others, strict=True):
        own = other.fused
        said = "no shared images"
        if alike(data, other):
            n, _, _, mean, half = paired(data.fused, own)
            ends = f"{100 * (mean - half):+.2f} to {100 * (mean + half):+.2f}"
            said = f"{100 * mean:+.2f} ({ends}), n = {n}"
        clean = share(own.top1(own.views), own.n)
        assert row == [other.name, str(own.n), clean, p(own.corrupted), p(own.s), said]
    shown, expected = {key.strip("`"): values for key, *values in keys}, differing([data, *others])
    assert shown.keys() == expected.keys() and all(same(shown[key], expected[key]) for key in expected)


def test_the_draft_s_figures_say_what_was_logged(compared: Compared) -> None:
    (data, *_), _, text = compared
    rows = data.epochs(*(data.trainings[0][at] for at in (0, 2, 1)))
    figures = dict(re.findall(r"!\[(.*?)\]\(figures/run0-(\w+)\.png\)", text))
    assert set(figures.values()) == {"loss", "clean", "corrupt", "s", "lr"}
    for said, chart in figures.items():
        for label in re.findall(r"[.;] ([^:;]+): ", said):
            check_words(said, label, {row["epoch"]: logged(row, chart, label) for row in rows})
    together = dict(re.findall(r"!\[(.*?)\]\(figures/together-(\w+)\.png\)", text))
    assert len(together) == (3 if 1 < len(data.trainings) <= 12 else 0)
    for said, stem in together.items():
        labels = re.findall(r"[.;] ([^:;]+): ", said)
        for label, (backbone, fold, seed) in zip(labels, data.trainings, strict=True):
            better = {
                row["epoch"]: max(row[f"{stem}_raw"], row[f"{stem}_ema"])
                for row in data.epochs(backbone, seed, fold)
            }
            check_words(said, label, better)
    named = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert all((data.folder / name).read_bytes().startswith(b"\x89PNG") for name in named)
    assert len(named) >= 9


def test_names_stay_in_their_cells() -> None:
    assert cell("dog <rose> | x & y") == "dog &lt;rose> \\| x &amp; y"
