"""fastflower.load: what it predicts is what code/predict.py writes, and its networks give the trainer's logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastflower
from fastflower.bundle import writer
from fastflower.core.errors import CorruptionError, InputError
from fastflower.recipe import load as load_recipe
from support import predictor_runs
from support.predictor_runs import CODE, IDS, read_rows, save_random_member


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an evaluated experiment of two members, a bundle of them, and photographs."""
    root = tmp_path_factory.mktemp("exported")
    models = root / "results/model/s2"
    models.mkdir(parents=True)
    paths = [save_random_member(models, seed=0), save_random_member(models, "test_vit", seed=1, size=64)]
    predictor_runs.write_bundle(root / "bundle", paths, "tta.hflip=true")
    recipe = load_recipe(None, ["exp.name=s2", "tta.scales=[32,64]"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        relative = [path.relative_to(root) for path in paths]
        writer.write_programs(relative, np.array([0.25, 0.75]), recipe=recipe, temperature=0.7)
    (root / "photographs").mkdir()
    for number in range(5):
        (root / f"photographs/{number}.jpg").write_bytes(predictor_runs.jpeg(number))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["bundle", "results/model/s2"])
def test_predictions_are_the_predictors(
    folder: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = exported / folder / ("" if folder == "bundle" else writer.PROGRAMS)
    command = [sys.executable, CODE / "predict.py", exported / "photographs", tmp_path / "out.csv"]
    subprocess.run([*command, "--bundle", bundle], check=True, capture_output=True, timeout=120)
    _, *rows = read_rows(tmp_path / "out.csv")
    monkeypatch.chdir(exported)
    model = fastflower.load(folder if folder == "bundle" else "s2")  # an experiment by its name
    assert model.classes == IDS
    predicted = model.predict([f"photographs/{name}" for name, *_ in rows])
    assert predicted.class_ids == [row[1] for row in rows]
    np.testing.assert_allclose(predicted.confidence, [float(row[2]) for row in rows], atol=1e-4)
    np.testing.assert_allclose(predicted.probabilities.sum(axis=1), 1)


def test_files_arrays_and_pictures_give_the_same(exported: Path) -> None:
    model = fastflower.load(exported / "bundle")
    path = exported / "photographs/0.jpg"
    picture = Image.open(path).convert("RGB")
    logits = model.logits([path, picture, np.asarray(picture)])
    assert logits.shape == (3, 3) and logits.dtype == np.float64
    np.testing.assert_array_equal(logits, logits[[0, 0, 0]])
    assert model.logits([]).shape == (0, 3)
    np.testing.assert_allclose(model.logits([picture] * 40), np.repeat(logits[:1], 40, axis=0), atol=1e-5)


def test_a_members_network_is_the_trainers_and_can_be_trained_on(exported: Path) -> None:
    path = next((exported / "results/model/s2").glob("*resnet10t*.pth"))
    model = fastflower.load(path)
    image = model.transform(exported / "photographs/1.jpg")
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32 and image.max() > 1
    assert isinstance(model.network, nn.Module) and next(model.network.parameters()).requires_grad
    with torch.inference_mode():
        logits = model.network(image[None])[0].numpy()
    np.testing.assert_allclose(model.logits([exported / "photographs/1.jpg"])[0], logits, atol=1e-5)
    model.network.train()
    model.logits([exported / "photographs/1.jpg"])
    assert model.network.training


def test_a_bundles_network_is_the_weighted_mean_of_its_first_view(exported: Path) -> None:
    model = fastflower.load(exported / "results/model/s2")
    members = [fastflower.load(path) for path in sorted((exported / "results/model/s2").glob("*.pth"))]
    image = model.transform(exported / "photographs/2.jpg")[None]
    with torch.inference_mode():
        wanted = sum(w * m.network(image) for w, m in zip((0.25, 0.75), members, strict=True))
        got = model.network(image)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_members_that_cut_pictures_differently_predict_and_are_no_one_network(tmp_path: Path) -> None:
    paths = [
        save_random_member(tmp_path, seed=seed, interpolation=name)
        for seed, name in enumerate(("bilinear", "bicubic"))
    ]
    predictor_runs.write_bundle(tmp_path / "bundle", paths)
    model = fastflower.load(tmp_path / "bundle")
    picture = predictor_runs.photograph(0)
    assert model.predict([picture]).probabilities.shape == (1, 3)
    assert model.transform(picture).shape == (3, 32, 32)
    with pytest.raises(InputError, match="takes pictures cut differently than the first member"):
        _ = model.network


@pytest.mark.parametrize("backbone", ["compare_resnet222_concat_w25"])
def test_pairs_are_compared(backbone: str, tmp_path: Path) -> None:
    model = fastflower.load(save_random_member(tmp_path, backbone))
    first, second = predictor_runs.photograph(0), np.asarray(predictor_runs.photograph(1))
    assert model.transform((first, second)).shape == (3, 32, 64)
    assert model.predict([(first, second), (second, first)]).probabilities.shape == (2, 3)
    with pytest.raises(InputError, match=r"compares two pictures; give pairs"):
        model.predict([first])


def test_what_is_no_model_or_picture_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: no model; give an experiment's folder"):
        fastflower.load("absent")
    save_random_member(tmp_path)
    with pytest.raises(
        InputError, match=r"was not evaluated; run .* or load one member, such as .*best_combo"
    ):
        fastflower.load(tmp_path)
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/bundle.json").write_text("{}")
    with pytest.raises(CorruptionError, match="is damaged"):
        fastflower.load(tmp_path / "bundle")
    model = fastflower.load(exported / "bundle")
    with pytest.raises(InputError, match="got one picture; give a list"):
        model.predict("a.jpg")
    with pytest.raises(InputError, match=r"absent.jpg: cannot be read"):
        model.predict(["absent.jpg"])
    with pytest.raises(InputError, match=r"got an array of float64 \(4, 4, 3\); give pixels as uint8"):
        model.predict([np.zeros((4, 4, 3))])


def test_importing_the_package_is_instant() -> None:
    text = (
        "import sys, fastflower; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)), dir(fastflower))"
    )
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("[] ")
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = fastflower.absent
