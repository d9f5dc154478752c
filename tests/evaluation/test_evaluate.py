"""The evaluate command on real betons and networks, against Pillow and a plain loop."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score

from fastflower import evaluate, export
from fastflower.bundle.members import choose, read_out_of_fold
from fastflower.core import files, runs
from fastflower.core.errors import CorruptionError, InputError
from fastflower.core.records import read_record
from fastflower.data.betons import fold_set
from fastflower.data.betons.beton_file import open_beton
from fastflower.evaluation import gradcam, inference, mistakes, soups, views
from fastflower.evaluation.logits import load_logits
from fastflower.evaluation.moves import Move
from fastflower.evaluation.records import ExperimentScores, Temperatures
from fastflower.model.member import load_member
from fastflower.model.network import build_network
from fastflower.recipe import load
from fastflower.recipe.run_record import write_recipe
from fastflower.report import thumbnails
from fastflower.report.__main__ import main
from support.evaluated_members import BACKBONES, WORDS, member


def by_pillow(filename: str, size: int, factor: float, interpolation: str) -> torch.Tensor:
    """The centred view of an image file, decoded by Pillow: float (1, 3, size, size)."""
    image = Image.open(Path("train") / filename)
    side = min(image.size) / factor
    left, top = (image.width - side) / 2, (image.height - side) / 2
    resampling = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[interpolation]
    view = image.resize((size, size), resampling, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(view).copy()).permute(2, 0, 1)[None].float()


def test_logits_are_those_of_pillow_and_a_plain_loop(project: Path) -> None:
    path = member(0)
    settings = load(None, WORDS)
    data = inference.predict(path, settings, torch.device("cpu"))
    saved = load_member(path)
    network = build_network(saved.meta).eval()
    network.load_state_dict(saved.tensors)
    with torch.no_grad():
        for row, filename in enumerate(data.filename):
            plain = [by_pillow(filename, size, 1.14, saved.meta.interpolation) for size in (32, 48)]
            logits = [network(view) for image in plain for view in (image, image.flip(3))]
            np.testing.assert_allclose(data.logits[row], torch.stack(logits).mean(0)[0], atol=1e-4)
            np.testing.assert_allclose(data.single[row], network(plain[0])[0], atol=1e-4)
    assert data.corrupt.shape == (2, len(data), 3)
    assert data.combos.tolist() == [["blur", "low"], ["brightness", "low"]]
    assert not np.allclose(data.corrupt[0], data.single)
    assert not np.allclose(data.corrupt[0], data.corrupt[1])
    assert data.info.views == [(32, 32, False), (32, 32, True), (48, 48, False), (48, 48, True)]


def read_scores() -> ExperimentScores:
    return read_record(runs.RESULTS / "tiny" / "scores.json", ExperimentScores)


@pytest.mark.slow
def test_both_folds_and_backbones_become_scores_json(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for backbone in BACKBONES:
        for fold in (0, 1):
            member(fold, backbone)
    evaluate.main(WORDS)
    folder = runs.RESULTS / "tiny"
    scores = read_scores()
    members = [load_logits(path) for path in sorted((folder / "oof").glob("*.npz"))]
    assert len(members) == 4 and scores.missing == [] and scores.fused.n == 30
    with open("data/folds.csv", newline="") as file:
        label = {row["filename"]: int(row["class_idx"]) for row in csv.DictReader(file)}
    for data in members:
        assert [label[name] for name in data.filename] == data.class_idx.tolist()
    total = {name: np.zeros(3) for name in label}
    for data in members:
        for name, logits in zip(data.filename, data.logits, strict=True):
            total[name] += logits / 2
    guess = [int(total[name].argmax()) for name in label]
    assert scores.fused.clean.top1 == pytest.approx(accuracy_score(list(label.values()), guess))
    temperatures = read_record(folder / "temperature.json", Temperatures)
    assert temperatures.fused.t == scores.fused.temperature.t and len(temperatures.members) == 4
    programs = json.loads((runs.MODELS / "tiny/programs/bundle.json").read_text())
    assert [row["checkpoint"][3:] for row in programs["members"]] == sorted(temperatures.members)
    assert programs["temperature"] == temperatures.fused.t and len(programs["programs"]) == 2
    cams = json.loads((folder / "gradcam" / "gradcam.json").read_text())
    assert {row["backbone"] for row in cams["images"]} == set(BACKBONES)
    assert all((folder / "gradcam" / row["file"]).is_file() for row in cams["images"])
    assert {path.stem for path in (folder / "reports").glob("*.csv")} >= {
        "per_class",
        "confusion",
        "mistakes",
        "corruption",
    }
    out = capsys.readouterr().out
    assert "fused, folds 0, 1" in out and "no member of" not in out

    evaluate.main([*WORDS, "eval.batch=7"])
    repeated = read_scores()
    assert repeated.confusion == scores.confusion
    assert repeated.fused.clean.nll == pytest.approx(scores.fused.clean.nll, abs=1e-5)


@pytest.mark.slow
def test_the_page_shows_the_images_of_its_mistakes(project: Path) -> None:
    member(0)
    member(1)
    evaluate.main(WORDS)
    settings = load(None, WORDS)
    write_recipe(runs.RESULTS / "tiny" / "meta" / "recipe.yaml", settings)
    main(["tiny"])
    html = (runs.RESULTS / "tiny" / "report.html").read_text(encoding="utf-8")
    mistakes = html.partition('id="mistakes-list"')[2].partition("</ul></section>")[0]
    pattern = r'<figure><img src="data:image/jpeg;base64,([^"]+)".*?<small>([^<]+)</small></figcaption>'
    images = re.findall(pattern, mistakes, flags=re.S)
    assert len(images) > 10  # an untrained network is wrong about two of three
    gallery = html.partition('class="gallery"')[2].partition("</ul>")[0]
    scores = read_record(runs.RESULTS / "tiny" / "scores.json", ExperimentScores).fused
    shown = re.findall(r'base64,([^"]+)".*?<b>([\d.]+)%</b>', gallery, flags=re.S)
    assert [float(top1) for _, top1 in shown] == [
        round(100 * row.top1, 1) for row in (scores.single, *scores.corrupted.combos)
    ]
    assert (
        shown[-1][0] != shown[0][0]
    )  # an occluded photograph is not the clean one; a blurred one of 32 pixels may be
    for data, name in images:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), dtype=float)
        expected = by_pillow(name, 144, 1.0, "bicubic")[0].permute(1, 2, 0).numpy()
        # of 255; the noise of these images in a JPEG
        assert pixels.shape == expected.shape and np.abs(pixels - expected).mean() < 12, name
    section = re.search(r'<section id="augmentation".*?</section>', html, flags=re.S)[0]
    assert "training images of fold 0: as stored" in section and "at 32 × 32 pixels" in section
    titles = re.findall(r"<h3>(.*?)</h3>", section)
    assert titles == ["Stored", "Epoch 1", "Epoch 2", "MixUp", "CutMix"] and section.count("<img") == 5 * 6
    assert not re.search(r'<span class="noimg">', html)


@pytest.mark.parametrize(
    ("mean", "fill"), [("auto", (123.675, 116.28, 103.53)), ("[0.1,0.2,0.3]", (25.5, 51.0, 76.5))]
)
def test_the_page_erases_as_training_does(project: Path, mean: str, fill: tuple[float, ...]) -> None:
    settings = load(None, [*WORDS, f"data.mean={mean}", "reg.erase_p=1"])
    beton = fold_set.open_fold(settings, 0).train
    augmented = thumbnails.augmented_batch(
        beton, np.arange(beton.rows), recipe=settings, epoch=0, size=(32, 32)
    )
    erased = (augmented - torch.tensor(fill)[:, None, None]).abs().amax(1) < 1e-3
    assert (erased.flatten(1).float().mean(1) > 0.01).all()  # erased boxes take 0.02 of the area or more


def zero_rows(beton: Path, rows: list[int]) -> None:
    """Overwrite the middle of these rows' pixels with zeros, as a disk that lost them would."""
    descriptors = open_beton(beton).descriptors
    with open(beton, "r+b") as file:
        for row in rows:
            file.seek(int(descriptors["offset"][row] + descriptors["size"][row] // 2))
            file.write(bytes(64))


@pytest.mark.parametrize("split", ["val", "val_corrupt"])
def test_damaged_images_are_not_scored(project: Path, split: str) -> None:
    member(0)
    zero_rows(Path(f"data/betons/fold0_{split}.beton"), [3])
    with pytest.raises(CorruptionError, match=f"fold0_{split}.beton: row 3 .*run convert again"):
        evaluate.main(WORDS)
    folder = runs.RESULTS / "tiny"
    assert not list(folder.rglob("*.npz")) and not (folder / "scores.json").exists()


def test_soups_and_gradcam_do_not_read_damaged_images(project: Path) -> None:
    path, settings = member(0), load(None, WORDS)
    data = inference.predict(path, settings, torch.device("cpu"))
    analysis = mistakes.error_analysis(data, 1.0)
    every_row = list(range(15))
    zero_rows(Path("data/betons/fold0_val.beton"), every_row)
    with pytest.raises(CorruptionError, match=r"fold0_val\.beton: row "):
        gradcam.write_gradcam(
            Path("cams"), [data], analysis=analysis, settings=settings, device=torch.device("cpu")
        )
    zero_rows(Path("data/betons/fold0_train.beton"), every_row)
    with pytest.raises(CorruptionError, match=r"fold0_train\.beton: row "):
        soups.refresh_norms(load_member(path), path, recipe=settings, device=torch.device("cpu"))


@pytest.mark.slow
def test_the_page_has_a_line_instead_of_damaged_images(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    member(0), member(1)
    evaluate.main(WORDS)
    write_recipe(runs.RESULTS / "tiny" / "meta" / "recipe.yaml", load(None, WORDS))
    every_row = list(range(15))
    zero_rows(Path("data/betons/fold1_val.beton"), every_row)
    zero_rows(Path("data/betons/fold0_train.beton"), every_row)
    main(["tiny"])
    html = (runs.RESULTS / "tiny" / "report.html").read_text(encoding="utf-8")
    advice = html.partition('class="advice"')[2].partition("</div>")[0]
    out = capsys.readouterr().out
    for name in ("fold1_val", "fold0_train"):
        line = rf"{name}.beton: row \d+ .*; the page lacks its images"
        assert re.search(line, out) and re.search(line, advice)
    assert 'id="augmentation"' not in html and "data:image/jpeg" in html  # those of fold 0 are sound


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batches_change_no_label(project: Path, batch: int) -> None:
    path = member(0)
    words = [*WORDS, "tta.scales=[32]", "robust.enabled=false"]
    expected = inference.predict(path, load(None, words), torch.device("cpu"))
    batched = inference.predict(path, load(None, [*words, f"eval.batch={batch}"]), torch.device("cpu"))
    np.testing.assert_array_equal(batched.logits.argmax(1), expected.logits.argmax(1))
    np.testing.assert_allclose(batched.logits, expected.logits, atol=1e-4)


@pytest.mark.slow
def test_an_interrupted_evaluation_leaves_the_earlier_scores(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between two members, then between two files; a repeated evaluation gives the same scores."""
    member(0), member(1)
    words = [*WORDS, "tta.scales=[32]", "tta.hflip=false", "robust.enabled=false"]
    folder = runs.RESULTS / "tiny"

    def without_times() -> ExperimentScores:
        scores = read_scores()
        return replace(scores, members=[replace(row, ms=0.0) for row in scores.members])

    evaluate.main(words)
    before, first = (folder / "scores.json").read_bytes(), without_times()
    for module, name in ((inference, "predict_views"), (evaluate, "write_record")):
        original, turns = getattr(module, name), iter([True])

        def interrupted(*args: object, original: object = original, turns: object = turns) -> object:
            if not next(turns, False):
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            evaluate.main(words)
        if module is inference:
            assert (folder / "scores.json").read_bytes() == before
        assert not list(folder.rglob(".*.tmp"))
    for name in ("oof", "reports", "gradcam", "meta"):
        (folder / name).mkdir(exist_ok=True)
        # of a killed process; no process has so large a PID
        files.temporary_path(folder / name / "a.png", 2**22 + 1).touch()
    evaluate.main(words)
    assert without_times() == first and not list(folder.rglob(".*.tmp"))


def test_logits_of_a_replaced_member_are_not_used(project: Path) -> None:
    paths = [member(0), member(1)]
    words = [*WORDS, "tta.scales=[32]", "tta.hflip=false", "robust.enabled=false"]
    evaluate.main(words)
    assert set(read_out_of_fold(["tiny"], paths)) == set(paths)
    member(1, epoch=9)
    assert set(read_out_of_fold(["tiny"], paths)) == {paths[0]}


def test_a_missing_fold_is_reported_and_never_filled_in(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    member(1)
    words = [*WORDS, "tta.scales=[32]", "tta.hflip=false"]
    assert evaluate.main([*words, "accept.clean_min=1", "accept.corrupted_min=0"]) == evaluate.REFUSED
    out = capsys.readouterr().out
    assert "REFUSED   clean top-1: " in out and "accepted  corrupted top-1: " in out
    assert evaluate.main(words) == 0
    scores = read_scores()
    assert scores.missing == [0] and scores.fused.folds == [1] and scores.fused.n == 15
    # the only view is the single view
    assert vars(scores.fused.single).items() <= vars(scores.fused.clean).items()
    assert "no member of fold 0 of 2" in capsys.readouterr().out


def test_without_corrupted_images_and_temperature_there_are_none(project: Path) -> None:
    member(0)
    evaluate.main([*WORDS, "robust.enabled=false", "ts.enabled=false", "tta.scales=[32]"])
    fused = read_scores().fused
    assert fused.corrupted is None and fused.temperature is None
    assert fused.s.top1 == fused.single.top1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["model.backbone=convnextv2_atto"],
            r"model.backbone = convnextv2_atto, but the members of tiny are of resnet10t",
        ),
        (
            ["model.head=arcface"],
            "model.head = arcface, but best_combo__resnet10t__fold0.* was trained with linear",
        ),
        (["data.img_size=[48]"], r"data.img_size = \[48\], but .* was trained with \[32, 32\]"),
        (["data.mean=[0.1,0.2,0.3]"], "data.mean = .*, but .* was trained with"),
        (["eval.resize_factor=1.2"], "eval.resize_factor = 1.2, but .* was trained with 1.14"),
    ],
)
def test_a_recipe_that_contradicts_the_members_is_refused(
    project: Path, words: list[str], message: str
) -> None:
    path = member(0)
    with pytest.raises(InputError, match=message):
        evaluate.main([*WORDS, *words])
    assert not (runs.RESULTS / "tiny").exists()
    with pytest.raises(InputError, match=message):
        choose(load(None, [*WORDS, *words]), [])
    with pytest.raises(InputError, match=message):
        export.main([*WORDS, *words, "--members", str(path)])


def test_evaluate_and_export_take_the_best_of_the_metric(project: Path) -> None:
    path = member(0)
    best_clean = path.with_name(path.name.replace("best_combo", "best_clean"))
    last = path.with_name(path.name.replace("best_combo", "last").replace("epoch3", "epoch9"))
    for copy in (best_clean, last):
        copy.write_bytes(path.read_bytes())
    for words, expected in (
        ([], path),
        (["select.metric=clean"], best_clean),
        (["select.metric=clean", "ensembling.find_pattern='*.pth'"], best_clean),
        (["ensembling.find_pattern=last*"], last),
    ):
        settings = load(None, [*WORDS, *words])
        assert evaluate.member_paths(settings) == choose(settings, []).paths == [expected]


@dataclass
class Refusal:
    changes: dict[str, object]
    pattern: str


@pytest.mark.parametrize(
    "case",
    [
        Refusal({"class_hash": "other"}, r"trained with other classes \(other\) than data holds"),
        Refusal({"class_hash": None}, r"in its description class_hash is null, must be text"),
        Refusal(
            {"class_hash": "b", "class_ids": ["rose", "10", "9"]},
            r"other classes \(b, in another order\) than",
        ),
        Refusal(
            {"class_hash": "b", "class_ids": ["10", "rose"]},
            r"other classes \(b, without 9\) than data holds",
        ),
        Refusal({"folds_hash": "other"}, r"trained with other folds \(other\) than data holds"),
        Refusal({"num_classes": 4}, "its tensors are not those of resnet10t"),
    ],
    ids=["classes", "no classes", "order", "fewer", "folds", "tensors"],
)
def test_members_that_do_not_fit_are_refused(project: Path, case: Refusal) -> None:
    member(0, **case.changes)
    with pytest.raises(InputError, match=case.pattern):
        evaluate.main(WORDS)
    assert not (runs.RESULTS / "tiny" / "scores.json").exists()


def test_no_member_and_a_damaged_member_are_refused_before_any_work(project: Path) -> None:
    with pytest.raises(
        InputError, match=r"no member best_combo.*; train first, or change ensembling\.find_pattern"
    ):
        evaluate.main(WORDS)
    member(0)
    path = member(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match="damaged"):
        evaluate.main(WORDS)
    assert not (runs.RESULTS / "tiny" / "oof").exists()


def test_views_of_oblong_members_keep_their_size() -> None:
    mirrored, plain = (load(None, [f"tta.hflip={flip}"]).tta for flip in ("true", "false"))
    assert views.views_of((32, 64), [48, 96], mirrored) == [
        (32, 64, Move(), False),
        (32, 64, Move(), True),
    ]
    assert views.views_of((32, 32), [48], plain) == [(48, 48, Move(), False)]
