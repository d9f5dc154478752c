"""Every number of scores.json and of the page against an independent computation, and the page in a real browser."""

from __future__ import annotations

import html as entities
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import markdown  # TensorBoard needs it too
import numpy as np
import pytest
import timm
import torch
from sklearn import metrics
from torchmetrics.classification import MulticlassCalibrationError

from fastflower.core import console, errors, files, runs
from fastflower.core.errors import InputError
from fastflower.data.readers import image_files
from fastflower.evaluation import gradcam, mistakes, summary, tables
from fastflower.evaluation.logits import Logits, assemble, fuse
from fastflower.evaluation.metrics import views_advice
from fastflower.recipe import load, to_yaml
from fastflower.report import comparison, curves, page, thumbnails
from fastflower.report.__main__ import main, parse
from fastflower.report.charts import Lines, over_epochs
from fastflower.report.experiment import Experiment, read, wanted
from fastflower.report.markdown_page import write
from support.fake_members import BACKBONES, IDS, classes_csv, event, folds, member
from support.reference_scores import wilson

LARGEST = 10_000_000  # bytes of a page
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def made(
    exp: str = "made", which: tuple[int, ...] = (0, 1, 2), skill: float = 1.2
) -> tuple[dict[str, Any], Logits]:
    """An evaluated experiment in the current directory: its scores.json, and the fused logits they are about."""
    members = [member(fold, backbone, skill=skill) for backbone in BACKBONES for fold in which]
    settings = load(None, [f"exp.name={exp}", "opt.lr_ref=1e-4"])
    found = summary.summarise(members, folds(), classes=classes_csv(), recipe=settings)
    folder = runs.RESULTS / exp
    files.write_json(folder / "scores.json", found)
    files.write_atomic(folder / "meta" / "recipe.yaml", to_yaml(settings))
    files.write_json(folder / "meta" / "versions.json", {"command": ["train.py", "<recipe>"]})
    for epoch in range(1, 6):
        runs.append_event(folder / "events.jsonl", event(epoch, which[0]))
    fused = fuse([assemble(own, folds()) for own in summary.by_run(members).values()])
    return json.loads((folder / "scores.json").read_text()), fused


def test_headline_scores_are_those_of_sklearn_and_torchmetrics() -> None:
    found, data = made()
    fused, labels = found["fused"], data.class_idx
    for name, logits in (("clean", data.logits), ("single", data.single)):
        guess, probs = logits.argmax(1), torch.from_numpy(logits).double().softmax(1)
        row = fused[name]
        assert row["n"] == len(labels) == int((folds() >= 0).sum())
        assert row["top1"] == pytest.approx(metrics.accuracy_score(labels, guess))
        assert (row["top1_low"], row["top1_high"]) == pytest.approx(
            wilson(int((guess == labels).sum()), len(labels))
        )
        assert row["top5"] == pytest.approx(
            np.mean([y in np.argsort(-z)[:5] for z, y in zip(logits, labels, strict=True)])
        )
        assert row["macro_recall"] == pytest.approx(metrics.balanced_accuracy_score(labels, guess))
        assert row["macro_f1"] == pytest.approx(metrics.f1_score(labels, guess, average="macro"))
        assert row["nll"] == pytest.approx(metrics.log_loss(labels, probs.numpy()), rel=1e-5)
        ece = MulticlassCalibrationError(len(IDS), n_bins=15)(probs, torch.from_numpy(labels))
        assert row["ece"] == pytest.approx(float(ece), abs=1e-5)


def test_corrupted_scores_s_and_consistency_are_the_formulas() -> None:
    found, data = made()
    fused, labels, base = found["fused"], data.class_idx, data.single.argmax(1)
    accuracies = [metrics.accuracy_score(labels, logits.argmax(1)) for logits in data.corrupt]
    for row, logits, accuracy in zip(fused["corrupted"]["combos"], data.corrupt, accuracies, strict=True):
        assert row["top1"] == pytest.approx(accuracy)
        assert row["drop"] == pytest.approx(metrics.accuracy_score(labels, base) - accuracy)
        assert row["consistency"] == pytest.approx(np.mean(logits.argmax(1) == base))
    assert [(row["kind"], row["level"]) for row in fused["corrupted"]["combos"]] == [
        ("blur", "low"),
        ("jpeg", "low"),
    ]
    assert fused["corrupted"]["top1"] == pytest.approx(np.mean(accuracies))
    s = 0.7 * metrics.accuracy_score(labels, base) + 0.3 * np.mean(accuracies)
    assert fused["s"]["top1"] == pytest.approx(s)
    assert (fused["s"]["top1_low"], fused["s"]["top1_high"]) == pytest.approx(
        wilson(s * len(labels), len(labels))
    )


def test_classes_parts_and_confusion_are_those_of_sklearn() -> None:
    found, data = made()
    guess, labels = data.logits.argmax(1), data.class_idx
    rows = metrics.classification_report(
        labels, guess, labels=range(len(IDS)), output_dict=True, zero_division=0
    )
    for row in found["classes"]:
        expected = rows[str(row["class_idx"])]
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx(
            (expected["precision"], expected["recall"], expected["f1-score"])
        )
        assert row["n"] == expected["support"] and row["category_id"] == IDS[row["class_idx"]]
        own = labels == row["class_idx"]
        corrupted = np.mean([logits[own].argmax(1) == row["class_idx"] for logits in data.corrupt])
        assert row["corrupted_recall"] == pytest.approx(corrupted)
    assert [row["part"] for row in found["classes"]] == ["head", "middle", "middle", "middle", "tail", "tail"]
    tail = np.isin(labels, [4, 5])
    assert found["fused"]["parts"]["tail"]["top1"] == pytest.approx(
        metrics.accuracy_score(labels[tail], guess[tail])
    )
    matrix = np.zeros((len(IDS), len(IDS)), int)
    for true, predicted, count in found["confusion"]:
        matrix[true, predicted] = count
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(labels, guess, labels=range(len(IDS))))
    pair = found["pairs"][0]
    both = matrix + matrix.T
    assert pair["a_as_b"] + pair["b_as_a"] == np.max(both - np.diag(np.diag(both)))


def test_mistakes_have_their_true_probabilities_worst_first() -> None:
    found, data = made()
    t = found["fused"]["temperature"]["t"]
    probs = torch.from_numpy(data.logits / t).double().softmax(1).numpy()
    wrong = np.flatnonzero(probs.argmax(1) != data.class_idx)
    assert {row["index"] for row in found["mistakes"]} == set(data.index[wrong].tolist())
    assert {index for index, _ in found["wrong"]} == set(data.index[wrong].tolist())
    losses = [row["loss"] for row in found["mistakes"]]
    assert losses == sorted(losses, reverse=True)
    for row in found["mistakes"]:
        at = int(np.flatnonzero(data.index == row["index"])[0])
        assert row["p_label"] == pytest.approx(probs[at, data.class_idx[at]], rel=1e-4)
        assert [c for c, _ in row["top"]] == np.argsort(-probs[at], kind="stable")[:5].tolist()


def test_a_label_that_was_changed_is_suspected() -> None:
    own = member(0, skill=6.0)
    labels = own.class_idx.copy()
    at = int(np.flatnonzero(labels == 0)[0])
    labels[at] = 1
    first = mistakes.suspects(replace(own, class_idx=labels), 1.0)[0]
    assert (first["index"], first["label"], first["other"]) == (own.index[at], 1, 0)


def test_means_over_folds_and_what_is_missing() -> None:
    found, _ = made(which=(0, 2))
    assert found["missing"] == [1] and [row["missing"] for row in found["runs"]] == [[1], [1]]
    assert any("no member of fold 1 of 3" in line for line in summary.incomplete(found))
    own = [row for row in found["members"] if row["backbone"] == BACKBONES[0]]
    values = [row["clean"]["top1"] for row in own]
    over = found["runs"][0]["over_folds"]["clean.top1"]
    assert (over["mean"], over["std"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert "Folds 0, 2 of 3 (79 images), the mean logits of 2 runs; fold 1 has no member" in page.basis(found)
    text = console.aligned(tables.console(found))
    assert len({len(line.split("  ")[0]) for line in text.splitlines()}) and f"{values[0]:.4f}" in text


def test_views_that_cost_accuracy_are_said() -> None:
    found, _ = made()
    found["fused"]["clean"]["top1"] = found["fused"]["single"]["top1"] - 0.01
    assert "cost 0.0100 top-1" in views_advice(found["fused"])[0]


def test_a_member_that_does_not_score_what_its_checkpoint_says_is_named() -> None:
    members = [member(fold, stored=0.1 if fold == 2 else None) for fold in range(3)]
    found = summary.summarise(members, folds(), classes=classes_csv(), recipe=load())
    lines = [line for line in found["advice"] if "training scored" in line]
    assert len(lines) == 1 and "__fold2_" in lines[0] and "training scored 0.1000" in lines[0]


def test_members_with_heads_of_different_kinds_are_not_averaged() -> None:
    members = [member(0), member(0, BACKBONES[1], head="arcface")]
    with pytest.raises(InputError, match="linear and with cosine heads"):
        summary.summarise(members, folds(), classes=classes_csv(), recipe=load())


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Logits, str]:
    """scores.json, the logits it is about, and the page that the command makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("shown"))
        found, data = made()
        main(["made"])
        return found, data, (runs.RESULTS / "made" / "report.html").read_text(encoding="utf-8")


def cells(html: str, table: str) -> list[list[str]]:
    """The text of a table's body rows."""
    body = re.search(rf'<table[^>]*id="{table}".*?<tbody>(.*?)</tbody>', html, flags=re.S)[1]
    rows = re.findall(r"<tr.*?</tr>", body, flags=re.S)
    return [
        [
            entities.unescape(re.sub(r"<[^>]+>", "", cell)).strip()
            for cell in re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.S)
        ]
        for row in rows
    ]


def test_the_page_shows_the_numbers_of_scores_json(shown: tuple[dict[str, Any], Logits, str]) -> None:
    found, data, html = shown
    accuracy = 100 * metrics.accuracy_score(data.class_idx, data.logits.argmax(1))
    assert f"<b>{accuracy:.1f}%</b>" in html
    rows = cells(html, "per-class")
    assert len(rows) == len(IDS)
    for row, own in zip(rows, found["classes"], strict=True):
        assert row[4:7] == [f"{100 * own[key]:.1f}" for key in ("precision", "recall", "f1")]
    for row, own in zip(cells(html, "members"), found["members"], strict=True):
        assert row[5:7] == [f"{100 * own['single']['top1']:.1f}", f"{100 * own['clean']['top1']:.1f}"]
    assert "opt.lr_ref" in html and "0.0001" in html


def test_names_and_files_cannot_inject_into_the_page(shown: tuple[dict[str, Any], Logits, str]) -> None:
    html = shown[2]
    assert "x & <y>" not in html and "x &amp; &lt;y&gt;" in html
    assert "dog <rose>" not in html and "dog &lt;rose&gt;" in html


def test_the_page_needs_nothing_from_outside_and_is_small(shown: tuple[dict[str, Any], Logits, str]) -> None:
    html = shown[2]
    addresses = re.findall(r'(?:src|href|xlink:href)="([^"]*)"', html)
    assert all(a.startswith(("#", "data:")) for a in addresses)
    assert "@import" not in html and "url(http" not in html and len(html) < LARGEST
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def hundred() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """scores.json of 100 classes, 10 corruptions and 2 members, and events of 10 runs."""
    rng, classes, n = np.random.default_rng(0), 100, 1200
    own, ids = np.arange(n) % classes, [str(1000 + c) for c in range(classes)]
    combos = np.array([(kind, level) for kind in "abcde" for level in ("low", "medium")])

    def one(backbone: str, seed: int) -> Logits:
        logits = (1.5 * np.eye(classes)[own] + rng.normal(size=(n, classes))).astype(np.float32)
        return replace(
            member(0, backbone, seed, class_ids=ids), logits=logits, single=logits, corrupt=np.stack([logits] * 10),
            class_idx=own, index=np.arange(n), fold=np.zeros(n, np.int64), combos=combos,
            filename=np.array([f"{i}.jpg" for i in range(n)]),
        )  # fmt: skip

    table = [
        {"class_idx": str(c), "category_id": ids[c], "n": str(5 + 2 * c), "name": f"flower {c}"}
        for c in range(classes)
    ]
    members = [one(backbone, seed) for backbone in BACKBONES for seed in (42,)]
    found = summary.summarise(
        members, np.zeros(n, np.int64), classes=table, recipe=load(None, ["exp.name=made"])
    )
    events = [
        {**event(e, 0), "backbone": backbone, "fold": f}
        for backbone in BACKBONES for f in range(5) for e in (1, 9)
    ]  # fmt: skip
    return found, events


def test_a_hundred_classes_fit_in_ten_megabytes(tmp_path: Path, repo: Path) -> None:
    """With as many photographs as a page ever shows, each of noise; and the draft in ten pages of A4."""
    found, events = hundred()
    rng, shown = np.random.default_rng(0), wanted(found, [])
    noise = thumbnails.data_uri(
        image_files.jpeg(rng.integers(0, 256, (image_files.SIDE, image_files.SIDE, 3), np.uint8))
    )
    photographs = {index: noise for indices in shown.values() for index in indices}
    whole = Experiment("made", found, events, pictures=photographs)
    html = page.experiment(whole)
    assert len(photographs) > 60 and len(html) < LARGEST
    assert len(cells(html, "per-class")) == len(cells(html, "robust")) == 100

    others = [replace(whole, name=f"other{i}", scores={**found, "exp": f"other{i}"}) for i in range(12)]
    settings = load(repo / "recipes/flowers17.yaml")
    text = write(tmp_path / "made", replace(whole, recipe=settings), [whole, *others]).read_text()
    assert "## 7. Ablations" in text
    if CHROMIUM:
        assert pages(text, tmp_path) <= 10


def pages(text: str, folder: Path) -> int:
    """The pages of A4 that Markdown takes in a common setting: 10 point, figures two thirds of a column wide."""
    style = "body { font: 10pt/1.35 serif } table { font-size: 8pt } td, th { padding: 1px 6px } img { width: 9.5cm }"
    body = markdown.markdown(text, extensions=["tables"])
    source = folder / "made" / "report.html"
    source.write_text(f"<!doctype html><meta charset=utf-8><style>{style}</style>{body}", encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    pdf = folder / "draft.pdf"
    subprocess.run(
        [CHROMIUM, *words, f"--print-to-pdf={pdf}", f"file://{source}"], capture_output=True, timeout=120, check=True
    )  # fmt: skip
    return len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))


def test_every_logged_quantity_has_a_curve() -> None:
    made(which=(0,))
    charts = curves.training(runs.read_events(runs.RESULTS / "made" / "events.jsonl"))[0].charts
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
    assert "train: 2 in epoch 1, 0.4 in epoch 5" in loss.words
    svg = loss.svg()
    assert "var(--s1)" in svg and "currentColor" in svg and not re.search(r"#[0-9a-f]{6}", svg)
    assert curves.borders(
        curves.series(curves.by_run([event(e, 0) for e in range(1, 6)])[BACKBONES[0], 0, 42])
    ) == [4]


def test_charts_are_pictures_too() -> None:
    lines = Lines("Loss", series={"train": ([1, 2], [2.0, 1.0])})
    assert over_epochs("x", lines, []).png().startswith(b"\x89PNG")


def test_several_experiments_are_compared_image_by_image() -> None:
    a, first = made("a", skill=1.0)
    b, second = made("b", skill=1.6)
    main(["a", "b"])
    html = (runs.RESULTS / "compare.html").read_text(encoding="utf-8")
    right = [data.logits.argmax(1) == data.class_idx for data in (first, second)]
    change = right[1].astype(float) - right[0]
    row = comparison.pairs([a, b])[0]
    assert row["n"] == len(change) and row["difference"] == pytest.approx(change.mean())
    spread = 1.959964 * change.std() / np.sqrt(len(change))
    assert (row["low"], row["high"]) == pytest.approx(
        (change.mean() - spread, change.mean() + spread), abs=1e-6
    )
    assert f"{100 * change.mean():+.2f}" in html
    other = {**b, "folds_hash": "elsewhere"}
    assert comparison.pairs([a, other])[0]["n"] == 0


def test_the_draft_has_the_same_numbers_and_its_figures() -> None:
    found, _ = made("a")
    made("b", skill=1.6)
    main(["a", "b", "--format", "md"])
    text = (runs.RESULTS / "a" / "report.md").read_text(encoding="utf-8")
    clean = found["fused"]["clean"]
    assert f"{100 * clean['top1']:.1f} ({100 * clean['top1_low']:.1f}–{100 * clean['top1_high']:.1f})" in text
    assert "## 7. Ablations" in text
    figures_named = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(figures_named) >= 6 and all((runs.RESULTS / "a" / name).is_file() for name in figures_named)


def test_what_a_killed_report_left_is_removed() -> None:
    for name in ("a", "b"):
        made(name)
    dead = 2**22 + 1  # no process has this number: too large
    for place in ("compare.html", "a/report.html", "b/figures/loss.png"):
        left = files.aside_of(runs.RESULTS / place, dead)
        left.parent.mkdir(exist_ok=True)
        left.touch()
    main(["a", "b"])
    assert not list(runs.RESULTS.rglob(".*.tmp"))


def test_an_experiment_is_named_by_its_recipe_and_the_changes_to_it() -> None:
    Path("mine.yaml").write_text("seed: 1\n")
    assert parse(["mine.yaml", "results/results/other", "mine.yaml"]) == (["mine", "other"], "html")
    assert parse(["mine.yaml", "exp.name=named", "model.pretrained=false"]) == (["named"], "html")
    with pytest.raises(InputError, match=r"unknown key exp.nam; did you mean exp.name"):
        parse(["mine.yaml", "exp.nam=x"])


def test_bad_words_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made()
    for words, pattern in (
        ([], "got no experiment; report takes experiments and --format html|md"),
        (["made", "--format", "pdf"], "--format pdf: must be one of html, md"),
        (["made", "-x"], "got -x; report takes"),
        (["other"], "other/scores.json; run python -m fastflower.evaluate first .evaluated: made"),
    ):
        with pytest.raises(InputError, match=pattern.replace("|", r"\|")):
            main(words)
    (runs.RESULTS / "made" / "scores.json").write_text("{")
    monkeypatch.setattr("sys.argv", ["report", "made"])
    with pytest.raises(SystemExit) as stop:
        errors.run(main)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_gradcam_finds_the_pixels_that_decide() -> None:
    """A network whose only evidence is the brightness of the left half looks left."""

    class Left(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = torch.nn.AvgPool2d(8)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.features(images)  # (B, 3, 8, 8)
            left = maps[..., :4].mean((1, 2, 3))
            return torch.stack([left, -left], 1)

    images = torch.rand(2, 3, 64, 64) + 1
    images[..., 32:] = 0.01
    maps = gradcam.attribute(Left(), images, torch.tensor([0, 0]))
    assert maps.shape == (2, 64, 64)
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    assert (maps[..., :32].sum((1, 2)) > 0.9).all()
    assert gradcam.border_share(np.ones((1, 64, 64)))[0] == pytest.approx(gradcam.EVEN)
    centre = np.zeros((1, 64, 64))
    centre[0, 30:34, 30:34] = 1
    assert gradcam.border_share(centre)[0] == 0
    assert np.isnan(gradcam.border_share(np.zeros((1, 64, 64)))[0])


def test_gradcam_is_the_formula() -> None:
    """ReLU of the maps' sum, each weighted by the mean of its gradient (Selvaraju et al. 2017, equations 1 and 2)."""
    nn = torch.nn
    maps_of = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 7, 3, 2, 1), nn.ReLU())
    score = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4))
    images, targets = torch.rand(2, 3, 32, 32), torch.tensor([3, 1])
    found = gradcam.attribute(nn.Sequential(maps_of, score), images, targets)
    for image, target, cam in zip(images, targets, found, strict=True):
        maps = maps_of(image[None]).detach().requires_grad_()
        score(maps)[0, target].backward()
        coarse = (maps.grad.mean((2, 3), keepdim=True) * maps.detach()).sum(1, keepdim=True).relu()
        fine = nn.functional.interpolate(coarse, (32, 32), mode="bilinear")[0, 0].numpy()
        np.testing.assert_allclose(cam, fine / fine.sum(), atol=1e-7)
        outside = np.ones((32, 32), bool)
        outside[4:-4, 4:-4] = False
        assert gradcam.border_share(cam[None])[0] == pytest.approx(
            (fine / fine.sum())[outside].sum(), abs=1e-6
        )


@pytest.mark.parametrize("backbone", ["convnextv2_atto", "vit_tiny_patch16_224"])
def test_gradcam_takes_maps_and_tokens(backbone: str) -> None:
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
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A page with pictures and the probe."""
    folder = tmp_path_factory.mktemp("probed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        found, _ = made()
        uri = thumbnails.data_uri(image_files.jpeg(np.full((8, 8, 3), 200, np.uint8)))
        photographs = {index: uri for indices in wanted(found, []).values() for index in indices}
        html = page.experiment(replace(read("made"), pictures=photographs))
    path = folder / "page.html"
    path.write_text(html.replace("<head>", "<head>" + PROBE, 1), encoding="utf-8")
    return found, path


def browse(path: Path, width: int, profile: Path) -> dict[str, Any]:
    """What a page's probe found in a window of this width."""
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={width},900",
        "--virtual-time-budget=8000",
    ]
    dump = subprocess.run(
        [CHROMIUM, *words, f"--user-data-dir={profile}", "--dump-dom", f"file://{path}"],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    return json.loads(entities.unescape(re.search(r"<body>(.*?)</body>", dump, flags=re.S)[1]))


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; on Debian: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(probed: tuple[dict[str, Any], Path], tmp_path: Path, width: int) -> None:
    found, path = probed
    answer = browse(path, width, tmp_path / "profile")
    assert answer["problems"] == [] and answer["broken"] == [] and answer["unnamed"] == 0
    assert answer["images"] > 10
    assert answer["left"] == 1 and answer["counted"] == f"1 of {min(36, len(found['mistakes']))}"
    assert answer["focused"]  # headers are buttons that the keyboard reaches
    recall = [f"{100 * row['recall']:.1f}" for row in found["classes"]]
    assert answer["up"] == sorted(recall, key=float) and answer["down"] == sorted(
        recall, key=float, reverse=True
    )
    assert answer["sorted"] == "ascending"
    assert answer["names"] == ["12", "100", "daisy 7", "dog <rose> rose", "tulip", "x & <y>"]
    assert answer["tail"] == ["tail", "tail"]
    assert answer["wide"] <= max(
        width, 500
    )  # nothing but tables scrolls sideways; headless windows are 500 or wider


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


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium; on Debian: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_comparison_in_a_browser(tmp_path: Path, width: int) -> None:
    shares = [
        made(name, skill=skill)[0]["fused"]["clean"]["top1"] for name, skill in (("a", 1.0), ("b", 1.6))
    ]
    html = page.compare([read(name, with_pictures=False) for name in ("a", "b")])
    path = tmp_path / "page.html"
    path.write_text(html.replace("<head>", "<head>" + COMPARED, 1), encoding="utf-8")
    answer = browse(path, width, tmp_path / "profile")
    assert answer["problems"] == [] and answer["unnamed"] == 0 and answer["charts"] == 5
    assert answer["clean"] == [f"{100 * share:.1f}" for share in sorted(shares, reverse=True)]
    assert answer["wide"] <= max(width, 500)


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_from_their_ground(
    shown: tuple[dict[str, Any], Logits, str], scheme: int
) -> None:
    """4.5 to 1 for text and 3 to 1 for lines of charts, as WCAG's level AA asks."""
    block = re.findall(r":root \{(.*?)\}", shown[2], flags=re.S)[scheme]
    colours = dict(re.findall(r"--(\w+):\s*(#\w+)", block))

    def contrast(one: str, other: str) -> float:
        low, high = sorted(luminance(colours[name]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    for ground in ("bg", "soft"):
        for text in ("ink", "dim", "accent", "good", "bad"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    for line in (f"s{i}" for i in range(1, 7)):
        assert contrast(line, "bg") >= 3, line
