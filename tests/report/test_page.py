"""Numbers of scores.json and report.html against independent computations, and the pages in a real browser."""

from __future__ import annotations

import html as entities
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import markdown  # a dependency of TensorBoard
import numpy as np
import pytest
import timm
import torch
from sklearn import metrics
from torchmetrics.classification import MulticlassCalibrationError

from fastflower.core import console, errors, files, runs
from fastflower.core.errors import InputError
from fastflower.core.records import read_record, write_record
from fastflower.data.readers import image_files
from fastflower.evaluation import gradcam, mistakes, summary, tables
from fastflower.evaluation.logits import Logits, assemble, fuse
from fastflower.evaluation.metrics import views_advice
from fastflower.evaluation.paired import paired_gain
from fastflower.evaluation.records import ExperimentScores
from fastflower.recipe import load
from fastflower.recipe.run_record import Environment, write_recipe
from fastflower.report import comparison, curves, experiment, page, scores_section, thumbnails
from fastflower.report.__main__ import main, parse
from fastflower.report.charts import Lines, over_epochs
from fastflower.report.experiment import Experiment, read_experiment, rows_by_fold
from fastflower.report.markdown_page import write
from support.fake_members import BACKBONES, IDS, classes_csv, event, folds, member, write_folds
from support.reference_scores import wilson

LARGEST = 10_000_000  # bytes of a page
ENVIRONMENT = Environment(
    fastflower="0", python="3.11", packages={}, git=None, platform="Linux", devices=["cpu"], cuda=None, threads=1,
    command=["train.py", "<recipe>"],
)  # fmt: skip
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_experiment(
    exp: str = "example", fold_numbers: tuple[int, ...] = (0, 1, 2), skill: float = 1.2
) -> tuple[ExperimentScores, Logits]:
    """Write an evaluated experiment to the current directory; returns its scores.json and the fused logits."""
    members = [member(fold, backbone, skill=skill) for backbone in BACKBONES for fold in fold_numbers]
    settings = load(None, [f"exp.name={exp}", "opt.lr_ref=1e-4"])
    scores = summary.summarise(members, folds(), classes=classes_csv(), recipe=settings)
    folder = runs.RESULTS / exp
    write_record(folder / "scores.json", scores)
    write_recipe(folder / "meta" / "recipe.yaml", settings)
    write_record(folder / "meta" / "versions.json", ENVIRONMENT)
    for epoch in range(1, 6):
        runs.append_event(folder / "events.jsonl", event(epoch, fold_numbers[0]))
    fused = fuse([assemble(group, folds()) for group in summary.members_by_run(members).values()])
    return read_record(folder / "scores.json", ExperimentScores), fused


def test_headline_scores_are_those_of_sklearn_and_torchmetrics() -> None:
    scores, data = write_experiment()
    fused, labels = scores.fused, data.class_idx
    for name, logits in (("clean", data.logits), ("single", data.single)):
        guess, probs = logits.argmax(1), torch.from_numpy(logits).double().softmax(1)
        row = getattr(fused, name)
        assert row.n == len(labels) == int((folds() >= 0).sum())
        assert row.top1 == pytest.approx(metrics.accuracy_score(labels, guess))
        assert (row.top1_low, row.top1_high) == pytest.approx(
            wilson(int((guess == labels).sum()), len(labels))
        )
        assert row.top5 == pytest.approx(
            np.mean([y in np.argsort(-z)[:5] for z, y in zip(logits, labels, strict=True)])
        )
        assert row.macro_recall == pytest.approx(metrics.balanced_accuracy_score(labels, guess))
        assert row.macro_f1 == pytest.approx(metrics.f1_score(labels, guess, average="macro"))
        assert row.nll == pytest.approx(metrics.log_loss(labels, probs.numpy()), rel=1e-5)
        ece = MulticlassCalibrationError(len(IDS), n_bins=15)(probs, torch.from_numpy(labels))
        assert row.ece == pytest.approx(float(ece), abs=1e-5)


def test_corrupted_scores_s_and_consistency_are_the_formulas() -> None:
    scores, data = write_experiment()
    fused, labels, base = scores.fused, data.class_idx, data.single.argmax(1)
    accuracies = [metrics.accuracy_score(labels, logits.argmax(1)) for logits in data.corrupt]
    for row, logits, accuracy in zip(fused.corrupted.combos, data.corrupt, accuracies, strict=True):
        assert row.top1 == pytest.approx(accuracy)
        assert row.drop == pytest.approx(metrics.accuracy_score(labels, base) - accuracy)
        assert row.consistency == pytest.approx(np.mean(logits.argmax(1) == base))
    assert [(row.kind, row.level) for row in fused.corrupted.combos] == [
        ("blur", "low"),
        ("jpeg", "low"),
    ]
    assert fused.corrupted.top1 == pytest.approx(np.mean(accuracies))
    s = 0.7 * metrics.accuracy_score(labels, base) + 0.3 * np.mean(accuracies)
    assert fused.s.top1 == pytest.approx(s)
    assert (fused.s.top1_low, fused.s.top1_high) == pytest.approx(wilson(s * len(labels), len(labels)))


def test_classes_parts_and_confusion_are_those_of_sklearn() -> None:
    scores, data = write_experiment()
    guess, labels = data.logits.argmax(1), data.class_idx
    rows = metrics.classification_report(
        labels, guess, labels=range(len(IDS)), output_dict=True, zero_division=0
    )
    for row in scores.classes:
        expected = rows[str(row.class_idx)]
        assert (row.precision, row.recall, row.f1) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1-score"])
        )
        assert row.n == expected["support"] and row.category_id == IDS[row.class_idx]
        in_class = labels == row.class_idx
        corrupted = np.mean([logits[in_class].argmax(1) == row.class_idx for logits in data.corrupt])
        assert row.corrupted_recall == pytest.approx(corrupted)
    assert [row.part for row in scores.classes] == [
        "head",
        "middle",
        "middle",
        "middle",
        "tail",
        "tail",
    ]
    tail = np.isin(labels, [4, 5])
    assert scores.fused.parts["tail"].top1 == pytest.approx(metrics.accuracy_score(labels[tail], guess[tail]))
    matrix = np.zeros((len(IDS), len(IDS)), int)
    for true, predicted, count in scores.confusion:
        matrix[true, predicted] = count
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(labels, guess, labels=range(len(IDS))))
    pair = scores.pairs[0]
    symmetric = matrix + matrix.T
    assert pair.a_as_b + pair.b_as_a == np.max(symmetric - np.diag(np.diag(symmetric)))


def test_mistakes_have_their_true_probabilities_worst_first() -> None:
    scores, data = write_experiment()
    t = scores.fused.temperature.t
    probs = torch.from_numpy(data.logits / t).double().softmax(1).numpy()
    wrong = np.flatnonzero(probs.argmax(1) != data.class_idx)
    assert {row.index for row in scores.mistakes} == set(data.index[wrong].tolist())
    assert {index for index, _ in scores.wrong} == set(data.index[wrong].tolist())
    losses = [row.loss for row in scores.mistakes]
    assert losses == sorted(losses, reverse=True)
    for row in scores.mistakes:
        position = int(np.flatnonzero(data.index == row.index)[0])
        assert row.p_label == pytest.approx(probs[position, data.class_idx[position]], rel=1e-4)
        assert [c for c, _ in row.top] == np.argsort(-probs[position], kind="stable")[:5].tolist()


def test_a_label_that_was_changed_is_suspected() -> None:
    data = member(0, skill=6.0)
    labels = data.class_idx.copy()
    position = int(np.flatnonzero(labels == 0)[0])
    labels[position] = 1
    first = mistakes.suspects(replace(data, class_idx=labels), 1.0)[0]
    assert (first.index, first.label, first.suggested) == (data.index[position], 1, 0)


def test_means_over_folds_and_missing_folds() -> None:
    scores, _ = write_experiment(fold_numbers=(0, 2))
    assert scores.missing == [1] and [row.missing for row in scores.runs] == [[1], [1]]
    assert any("no member of fold 1 of 3" in line for line in summary.missing_fold_notes(scores))
    rows = [row for row in scores.members if row.backbone == BACKBONES[0]]
    values = [row.clean.top1 for row in rows]
    over = scores.runs[0].over_folds["clean.top1"]
    assert (over.mean, over.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert (
        "Folds 0, 2 of 3 (79 images), the mean logits of 2 runs; fold 1 has no member"
        in scores_section.basis(scores)
    )
    text = console.aligned(tables.score_table(scores))
    assert len({len(line.split("  ")[0]) for line in text.splitlines()}) and f"{values[0]:.4f}" in text


def test_views_that_cost_accuracy_are_reported() -> None:
    scores, _ = write_experiment()
    clean = replace(scores.fused.clean, top1=scores.fused.single.top1 - 0.01)
    assert "cost 0.0100 top-1" in views_advice(replace(scores.fused, clean=clean))[0]


def test_a_member_whose_score_differs_from_its_checkpoint_is_named() -> None:
    members = [member(fold, stored=0.1 if fold == 2 else None) for fold in range(3)]
    scores = summary.summarise(members, folds(), classes=classes_csv(), recipe=load())
    lines = [line for line in scores.advice if "training scored" in line]
    assert len(lines) == 1 and "__fold2_" in lines[0] and "training scored 0.1000" in lines[0]


def test_members_with_heads_of_different_kinds_are_not_averaged() -> None:
    members = [member(0), member(0, BACKBONES[1], head="arcface")]
    with pytest.raises(InputError, match="linear and with cosine heads"):
        summary.summarise(members, folds(), classes=classes_csv(), recipe=load())


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentScores, Logits, str]:
    """scores.json, the fused logits, and the page that the report command writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("shown"))
        scores, data = write_experiment()
        main(["example"])
        return scores, data, (runs.RESULTS / "example" / "report.html").read_text(encoding="utf-8")


def cells(html: str, table: str) -> list[list[str]]:
    """Text of the cells in the body of a table."""
    body = re.search(rf'<table[^>]*id="{table}".*?<tbody>(.*?)</tbody>', html, flags=re.S)[1]
    rows = re.findall(r"<tr.*?</tr>", body, flags=re.S)
    return [
        [
            entities.unescape(re.sub(r"<[^>]+>", "", cell)).strip()
            for cell in re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.S)
        ]
        for row in rows
    ]


@pytest.mark.slow
def test_the_page_shows_the_numbers_of_scores_json(shown: tuple[ExperimentScores, Logits, str]) -> None:
    scores, data, html = shown
    accuracy = 100 * metrics.accuracy_score(data.class_idx, data.logits.argmax(1))
    assert f"<b>{accuracy:.1f}%</b>" in html
    rows = cells(html, "per-class")
    assert len(rows) == len(IDS)
    for row, expected in zip(rows, scores.classes, strict=True):
        assert row[4:7] == [f"{100 * getattr(expected, key):.1f}" for key in ("precision", "recall", "f1")]
    for row, expected in zip(cells(html, "members"), scores.members, strict=True):
        assert row[5:7] == [f"{100 * expected.single.top1:.1f}", f"{100 * expected.clean.top1:.1f}"]
    assert "opt.lr_ref" in html and "0.0001" in html


def test_names_and_files_cannot_inject_into_the_page(shown: tuple[ExperimentScores, Logits, str]) -> None:
    html = shown[2]
    assert "x & <y>" not in html and "x &amp; &lt;y&gt;" in html
    assert "dog <rose>" not in html and "dog &lt;rose&gt;" in html


def test_the_page_needs_nothing_from_outside_and_is_small(
    shown: tuple[ExperimentScores, Logits, str],
) -> None:
    html = shown[2]
    addresses = re.findall(r'(?:src|href|xlink:href)="([^"]*)"', html)
    assert all(a.startswith(("#", "data:")) for a in addresses)
    assert "@import" not in html and "url(http" not in html and len(html) < LARGEST
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def hundred_classes() -> tuple[ExperimentScores, list[dict[str, Any]]]:
    """scores.json of 100 classes, 10 corruptions and 2 members, and the events of 10 runs."""
    rng, classes, n = np.random.default_rng(0), 100, 1200
    labels, ids = np.arange(n) % classes, [str(1000 + c) for c in range(classes)]
    combos = np.array([(kind, level) for kind in "abcde" for level in ("low", "medium")])

    def logits_of(backbone: str, seed: int) -> Logits:
        logits = (1.5 * np.eye(classes)[labels] + rng.normal(size=(n, classes))).astype(np.float32)
        return replace(
            member(0, backbone, seed, class_ids=ids), logits=logits, single=logits, corrupt=np.stack([logits] * 10),
            class_idx=labels, index=np.arange(n), fold=np.zeros(n, np.int64), combos=combos,
            filename=np.array([f"{i}.jpg" for i in range(n)]),
        )  # fmt: skip

    table = [
        {"class_idx": str(c), "category_id": ids[c], "n": str(5 + 2 * c), "name": f"flower {c}"}
        for c in range(classes)
    ]
    members = [logits_of(backbone, seed) for backbone in BACKBONES for seed in (42,)]
    scores = summary.summarise(
        members, np.zeros(n, np.int64), classes=table, recipe=load(None, ["exp.name=example"])
    )
    events = [
        {**event(e, 0), "backbone": backbone, "fold": f}
        for backbone in BACKBONES for f in range(5) for e in (1, 9)
    ]  # fmt: skip
    return scores, events


@pytest.mark.slow
def test_a_hundred_classes_fit_in_ten_megabytes(tmp_path: Path, repo: Path) -> None:
    """The page has the largest number of images, all noise; the Markdown report fits ten A4 pages."""
    scores, events = hundred_classes()
    rng, rows = np.random.default_rng(0), rows_by_fold(scores, [])
    noise = thumbnails.data_uri(
        image_files.thumbnail_jpeg(
            rng.integers(0, 256, (image_files.THUMBNAIL_SIDE, image_files.THUMBNAIL_SIDE, 3), np.uint8)
        )
    )
    images = {index: noise for indices in rows.values() for index in indices}
    experiment = Experiment("example", scores, events, thumbnails=images)
    html = page.experiment_page(experiment)
    assert len(images) > 60 and len(html) < LARGEST
    assert len(cells(html, "per-class")) == len(cells(html, "robust")) == 100

    others = [
        replace(experiment, name=f"other{i}", scores=replace(scores, exp=f"other{i}")) for i in range(12)
    ]
    settings = load(repo / "recipes/flowers17.yaml")
    text = write(
        tmp_path / "example", replace(experiment, recipe=settings), [experiment, *others]
    ).read_text()
    assert "## 7. Ablations" in text
    if CHROMIUM:
        assert a4_pages(text, tmp_path) <= 10


def a4_pages(text: str, folder: Path) -> int:
    """Number of A4 pages of Markdown in a common layout: 10 point, figures two thirds of the text width."""
    style = "body { font: 10pt/1.35 serif } table { font-size: 8pt } td, th { padding: 1px 6px } img { width: 9.5cm }"
    body = markdown.markdown(text, extensions=["tables"])
    source = folder / "example" / "report.html"
    source.write_text(f"<!doctype html><meta charset=utf-8><style>{style}</style>{body}", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    pdf = folder / "report.pdf"
    subprocess.run(
        [CHROMIUM, *options, f"--print-to-pdf={pdf}", f"file://{source}"], capture_output=True, timeout=120, check=True
    )  # fmt: skip
    return len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))


def test_every_logged_quantity_has_a_curve() -> None:
    write_experiment(fold_numbers=(0,))
    charts = curves.run_curves(runs.read_events(runs.RESULTS / "example" / "events.jsonl", []))[0].charts
    names = {chart.name.removeprefix("run0-") for chart in charts}
    assert names == {
        "loss",
        "clean",
        "corrupt",
        "s",
        "macro",
        "kind-raw",
        "kind-ema",
        "lr",
        "size",
        "speed",
        "norm",
        "new_quantity",
    }
    loss = next(chart for chart in charts if chart.name == "run0-loss")
    assert "train: 2 in epoch 1, 0.4 in epoch 5" in loss.description
    svg = loss.svg()
    assert "var(--s1)" in svg and "currentColor" in svg and not re.search(r"#[0-9a-f]{6}", svg)
    assert curves.size_changes(
        curves.series(curves.by_run([event(e, 0) for e in range(1, 6)])[BACKBONES[0], 0, 42])
    ) == [4]


def test_charts_are_written_as_png() -> None:
    lines = Lines("Loss", series={"train": ([1, 2], [2.0, 1.0])})
    assert over_epochs("x", lines, []).png().startswith(b"\x89PNG")


@pytest.mark.slow
def test_paired_differences_are_those_of_the_images() -> None:
    a, first = write_experiment("a", skill=1.0)
    b, second = write_experiment("b", skill=1.6)
    main(["a", "b"])
    html = (runs.RESULTS / "compare.html").read_text(encoding="utf-8")
    right = [data.logits.argmax(1) == data.class_idx for data in (first, second)]
    change = right[1].astype(float) - right[0]
    row = comparison.paired_differences([a, b])[0]
    assert row.n == len(change) and row.difference.gain == pytest.approx(change.mean())
    assert row.difference == paired_gain(*right)
    assert f"{100 * change.mean():+.2f}" in html
    other = replace(b, folds_hash="elsewhere")
    assert comparison.paired_differences([a, other])[0].difference is None


@pytest.mark.slow
def test_the_markdown_report_has_the_same_numbers_and_its_figures() -> None:
    scores, _ = write_experiment("a")
    write_experiment("b", skill=1.6)
    main(["a", "b", "--format", "md"])
    text = (runs.RESULTS / "a" / "report.md").read_text(encoding="utf-8")
    clean = scores.fused.clean
    assert f"{100 * clean.top1:.1f} ({100 * clean.top1_low:.1f}–{100 * clean.top1_high:.1f})" in text
    assert "## 7. Ablations" in text
    figures_named = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(figures_named) >= 6 and all((runs.RESULTS / "a" / name).is_file() for name in figures_named)


@pytest.mark.slow
def test_temporary_files_of_a_killed_report_are_removed() -> None:
    for name in ("a", "b"):
        write_experiment(name)
    dead = 2**22 + 1  # no process has this number: too large
    for path in ("compare.html", "a/report.html", "b/figures/loss.png"):
        temporary = files.temporary_path(runs.RESULTS / path, dead)
        temporary.parent.mkdir(exist_ok=True)
        temporary.touch()
    main(["a", "b"])
    assert not list(runs.RESULTS.rglob(".*.tmp"))


def test_an_experiment_is_named_by_its_recipe_and_the_changes_to_it() -> None:
    Path("mine.yaml").write_text("seed: 1\n")

    def names(*words: str) -> list[str]:
        return [asked.name for asked in parse(list(words))[0]]

    assert names("mine.yaml", "results/results/other", "mine.yaml") == ["mine", "other"]
    assert names("mine.yaml", "exp.name=named", "model.pretrained=false") == ["named"]
    assert parse(["other", "--format", "md"])[1] == "md"
    with pytest.raises(InputError, match=r"unknown key exp.nam; did you mean exp.name"):
        parse(["mine.yaml", "exp.nam=x"])


@pytest.mark.slow
def test_a_recipe_that_contradicts_the_scored_members_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_experiment()
    fitting = ["example", f"model.backbone={BACKBONES[0]}", "data.img_size=32"]
    for change, pattern in (
        ("model.backbone=resnet18", "model.backbone = resnet18, but the members of example are of"),
        ("model.head=arcface", "model.head = arcface, but best_combo__.* was trained with linear"),
        ("data.img_size=64", r"data.img_size = 64, but .* was trained with \[32, 32\]"),
    ):
        with pytest.raises(InputError, match=pattern):
            main([*fitting, change])
    write_folds(Path("data/folds.csv"), count=2)
    with pytest.raises(
        InputError, match=r"was trained with other folds \(\w+\) than data holds \(\w+\); point"
    ):
        main(fitting)
    monkeypatch.delenv(console.NEXT, raising=False)
    main([*fitting, "data.home=elsewhere"])
    assert not (runs.RESULTS / "compare.html").exists()
    assert capsys.readouterr().out.splitlines()[-1].endswith("export example")


def test_invalid_arguments_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_experiment()
    for arguments, pattern in (
        ([], "got no experiment; report takes experiments and --format html|md"),
        (["example", "--format", "pdf"], "--format pdf: must be one of html, md"),
        (["example", "-x"], "got -x; report takes"),
        (["other"], "other/scores.json; run python -m fastflower.evaluate first .evaluated: example"),
    ):
        with pytest.raises(InputError, match=pattern.replace("|", r"\|")):
            main(arguments)
    (runs.RESULTS / "example" / "scores.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["report", "example"])
    with pytest.raises(SystemExit) as stop:
        errors.run_command(main)
    assert stop.value.code == 3 and capsys.readouterr().err.count("\n") == 1


def test_gradcam_finds_the_pixels_that_decide() -> None:
    """A network whose only evidence is the brightness of the left half looks left."""

    class LeftBrightness(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = torch.nn.AvgPool2d(8)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.features(images)  # (B, 3, 8, 8)
            left = maps[..., :4].mean((1, 2, 3))
            return torch.stack([left, -left], 1)

    images = torch.rand(2, 3, 64, 64) + 1
    images[..., 32:] = 0.01
    maps = gradcam.attribute(LeftBrightness(), images, torch.tensor([0, 0]))
    assert maps.shape == (2, 64, 64)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    assert (maps[..., :32].sum((1, 2)) > 0.9).all()
    assert gradcam.border_fraction(np.ones((1, 64, 64)))[0] == pytest.approx(gradcam.EVEN)
    centre = np.zeros((1, 64, 64))
    centre[0, 30:34, 30:34] = 1
    assert gradcam.border_fraction(centre)[0] == 0
    assert np.isnan(gradcam.border_fraction(np.zeros((1, 64, 64)))[0])


def test_gradcam_matches_its_formula() -> None:
    """ReLU of the sum of the maps, each weighted by its mean gradient (Selvaraju et al. 2017, equations 1 and 2)."""
    nn = torch.nn
    maps_of = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 7, 3, 2, 1), nn.ReLU())
    score = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4))
    images, targets = torch.rand(2, 3, 32, 32), torch.tensor([3, 1])
    maps_by_image = gradcam.attribute(nn.Sequential(maps_of, score), images, targets)
    for image, target, cam in zip(images, targets, maps_by_image, strict=True):
        maps = maps_of(image[None]).detach().requires_grad_()
        score(maps)[0, target].backward()
        coarse = (maps.grad.mean((2, 3), keepdim=True) * maps.detach()).sum(1, keepdim=True).relu()
        fine = nn.functional.interpolate(coarse, (32, 32), mode="bilinear")[0, 0].numpy()
        np.testing.assert_allclose(cam, fine / fine.sum(), atol=1e-7)
        outside = np.ones((32, 32), bool)
        outside[4:-4, 4:-4] = False
        assert gradcam.border_fraction(cam[None])[0] == pytest.approx(
            (fine / fine.sum())[outside].sum(), abs=1e-6
        )


@pytest.mark.parametrize("backbone", ["convnextv2_atto", "vit_tiny_patch16_224"])
def test_gradcam_accepts_feature_maps_and_tokens(backbone: str) -> None:
    network = (
        timm.create_model(backbone, num_classes=4, img_size=64)
        if "vit" in backbone
        else timm.create_model(backbone, num_classes=4)
    )
    maps = gradcam.attribute(network.eval(), torch.rand(2, 3, 64, 64), torch.tensor([1, 2]))
    assert maps.shape == (2, 64, 64) and np.isfinite(maps).all() and (maps >= 0).all()
    assert not network._forward_hooks and all(not m._forward_pre_hooks for m in network.modules())


PROBE = """<script>
const problems = [];
addEventListener("error", e => problems.push(String(e.message || e.target.src).slice(0, 200)), true);
console.error = (...words) => problems.push(words.join(" "));
addEventListener("load", () => {
  const images = [...document.images];
  const table = document.getElementById("per-class"), body = table.tBodies[0];
  const column = at => [...body.rows].filter(r => !r.hidden).map(r => r.children[at].textContent.trim());
  const button = at => table.querySelectorAll("thead th")[at].querySelector("button");
  button(5).click(); const down = column(5);
  button(5).click(); const up = column(5), sorted = table.querySelectorAll("thead th")[5].ariaSort;
  button(0).click(); const names = column(0);
  const search = (id, text) => {
    const box = document.getElementById(id);
    box.value = text; box.dispatchEvent(new Event("input"));
    return box.parentNode.querySelector("output").textContent;
  };
  search("find", "tail");
  const wrong = [...document.querySelectorAll("#mistakes-list > li")];
  const file = wrong[1].querySelector("figcaption > small").textContent;
  const counted = search("find-mistake", file), left = wrong.filter(li => li.offsetParent).length;
  button(3).focus(); const focused = document.activeElement === button(3);
  const answer = {problems, counted, left, focused, tables: document.querySelectorAll("table.sort").length,
    down, up, sorted, names, tail: column(1), wide: document.documentElement.scrollWidth,
    images: images.length, broken: images.filter(i => !i.complete || !i.naturalWidth).map(i => i.alt),
    unnamed: document.querySelectorAll("img:not([alt]), svg[role=img]:not([aria-label]), th:not([scope])").length};
  document.body.innerHTML = ""; document.body.append(JSON.stringify(answer));
});
</script>"""


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentScores, Path]:
    """A page with thumbnails and the probe script."""
    folder = tmp_path_factory.mktemp("probed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        scores, _ = write_experiment()
        uri = thumbnails.data_uri(image_files.thumbnail_jpeg(np.full((8, 8, 3), 200, np.uint8)))
        images = {index: uri for indices in rows_by_fold(scores, []).values() for index in indices}
        html = page.experiment_page(replace(read_experiment("example"), thumbnails=images))
    path = folder / "page.html"
    path.write_text(html.replace("<head>", "<head>" + PROBE, 1), encoding="utf-8")
    return scores, path


def browse(path: Path, width: int, profile: Path) -> dict[str, Any]:
    """Result of the page's probe script in a browser window of this width."""
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        "--virtual-time-budget=8000",
    ]
    dump = subprocess.run(
        [CHROMIUM, *options, f"--user-data-dir={profile}", "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    return json.loads(entities.unescape(re.search(r"<body>(.*?)</body>", dump, flags=re.S)[1]))


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; on Debian: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(probed: tuple[ExperimentScores, Path], tmp_path: Path, width: int) -> None:
    scores, path = probed
    answer = browse(path, width, tmp_path / "profile")
    assert answer["problems"] == [] and answer["broken"] == [] and answer["unnamed"] == 0
    assert answer["images"] > 10
    assert answer["left"] == 1 and answer["counted"] == f"1 of {min(36, len(scores.mistakes))}"
    assert answer["focused"]  # headers are buttons that the keyboard reaches
    recall = [f"{100 * row.recall:.1f}" for row in scores.classes]
    assert answer["up"] == sorted(recall, key=float) and answer["down"] == sorted(
        recall, key=float, reverse=True
    )
    assert answer["sorted"] == "ascending"
    assert answer["names"] == ["12", "100", "daisy 7", "dog <rose> rose", "tulip", "x & <y>"]
    assert answer["tail"] == ["tail", "tail"]
    assert answer["wide"] <= max(
        width, 500
    )  # only tables scroll sideways; headless windows are at least 500 wide


COMPARED = """<script>
const problems = [];
addEventListener("error", e => problems.push(String(e.message || e.target.src).slice(0, 200)), true);
console.error = (...words) => problems.push(words.join(" "));
addEventListener("load", () => {
  const table = document.getElementById("experiments");
  table.querySelectorAll("thead th")[4].querySelector("button").click();
  const answer = {problems, clean: [...table.tBodies[0].rows].map(row => row.children[4].textContent),
    wide: document.documentElement.scrollWidth, charts: document.querySelectorAll("svg[role=img][aria-label]").length,
    unnamed: document.querySelectorAll("svg[role=img]:not([aria-label]), th:not([scope])").length};
  document.body.innerHTML = ""; document.body.append(JSON.stringify(answer));
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; on Debian: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_comparison_in_a_browser(tmp_path: Path, width: int) -> None:
    accuracies = [
        write_experiment(name, skill=skill)[0].fused.clean.top1 for name, skill in (("a", 1.0), ("b", 1.6))
    ]
    html = page.comparison_page([read_experiment(name, with_images=False) for name in ("a", "b")])
    path = tmp_path / "page.html"
    path.write_text(html.replace("<head>", "<head>" + COMPARED, 1), encoding="utf-8")
    answer = browse(path, width, tmp_path / "profile")
    assert answer["problems"] == [] and answer["unnamed"] == 0 and answer["charts"] == 5
    assert answer["clean"] == [f"{100 * accuracy:.1f}" for accuracy in sorted(accuracies, reverse=True)]
    assert answer["wide"] <= max(width, 500)


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_have_the_contrast_of_wcag_aa(
    shown: tuple[ExperimentScores, Logits, str], scheme: int
) -> None:
    """WCAG level AA: 4.5 to 1 for text, 3 to 1 for lines of charts."""
    block = re.findall(r":root \{(.*?)\}", shown[2], flags=re.S)[scheme]
    colours = dict(re.findall(r"--(\w+):\s*(#\w+)", block))

    def contrast(foreground: str, background: str) -> float:
        low, high = sorted(luminance(colours[name]) for name in (foreground, background))
        return (high + 0.05) / (low + 0.05)

    for background in ("bg", "soft"):
        for text in ("ink", "dim", "accent", "good", "bad"):
            assert contrast(text, background) >= 4.5, (text, background)
    for line in (f"s{i}" for i in range(1, 7)):
        assert contrast(line, "bg") >= 3, line


def test_a_bundle_older_than_the_evaluated_members_is_noted():
    bundle, programs = runs.BUNDLE / "bundle.json", runs.MODELS / "exp/programs/bundle.json"
    assert experiment.stale_bundle("exp") == []
    for second, path in enumerate((bundle, programs), 1):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        os.utime(path, (second, second))
    (note,) = experiment.stale_bundle("exp")
    assert (
        "results/model/bundle is older than the members evaluated since; run python -m fastflower.export"
        in note
    )
    os.utime(bundle, (9, 9))
    assert experiment.stale_bundle("exp") == []
