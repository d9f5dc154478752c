from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastflower import ensemble, evaluate
from fastflower.core import checkpoint, runs
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.data.decode.kernel import decode_eval
from fastflower.evaluation import inference, soups, summary
from fastflower.recipe import load
from support.evaluated_members import WORDS
from support.evaluated_members import member as checkpoint_of
from support.fake_members import member

CPU = torch.device("cpu")
ATTO = "convnextv2_atto"
OWN = [*WORDS, f"model.backbone={ATTO}", "tta.scales=[32]", "tta.hflip=false"]


def test_the_mean_is_the_mean_and_counters_stay_whole() -> None:
    a = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}
    b = {"w": torch.tensor([3.0, 6.0]), "steps": torch.tensor(9)}
    found = soups.mean([a, b])
    assert found["w"].tolist() == [2.0, 4.0] and found["w"].dtype == torch.float32 and found["steps"] == 7
    with pytest.raises(InputError, match="networks of one kind"):
        soups.mean([a, {**b, "w": torch.zeros(3)}])


def test_what_an_image_adds_averages_to_s() -> None:
    own = member(0)
    clean = (own.single.argmax(1) == own.class_idx).mean()
    dark = np.mean([(logits.argmax(1) == own.class_idx).mean() for logits in own.corrupt])
    shuffled = own.take(np.random.default_rng(0).permutation(len(own)))
    np.testing.assert_array_equal(soups.by_image(own, 0.7), soups.by_image(shuffled, 0.7))
    assert soups.by_image(own, 0.7).mean() == pytest.approx(0.7 * clean + 0.3 * dark)
    bare = replace(own, combos=own.combos[:0], corrupt=own.corrupt[:0])
    assert soups.by_image(bare, 0.7).mean() == pytest.approx(clean)


def test_a_soup_that_is_better_in_one_fold_only_is_not_believed() -> None:
    def told(*values: float) -> dict[int, np.ndarray]:
        return {fold: np.full(10, value) for fold, value in enumerate(values)}

    base, lucky, good = told(0.5, 0.5, 0.5), told(0.95, 0.4, 0.4), told(0.6, 0.6, 0.6)
    assert sum(v.mean() for v in lucky.values()) / 3 > 0.5  # in all it looks better
    assert soups.nested([base, lucky]) == pytest.approx((0.5 + 0.4 + 0.4) / 3)
    assert soups.nested([base, good]) == pytest.approx(0.6)
    assert soups.nested([told(0.5), told(0.9)]) == pytest.approx(0.5)


def near(fold: int, kind: str, noise: float) -> None:
    """A checkpoint of another kind close to the member's best_combo."""
    source = checkpoint_of(0, ATTO)  # both folds from one network, as from pretrained weights
    found = checkpoint.load(source)
    torch.manual_seed(len(kind) + fold)
    tensors = {
        name: t + noise * t.std(correction=0) * torch.randn_like(t) for name, t in found.tensors.items()
    }
    path = runs.Run("tiny", ATTO, fold, 42).file(kind, 4, 0.5)
    checkpoint.save(path, tensors, found.meta | {"fold": fold, "kind": kind})


def test_checkpoints_of_each_fold_become_members_that_evaluate_like_others(place, capsys) -> None:
    for fold in (0, 1):
        near(fold, "best_combo", 0.0)
        near(fold, "ema_best", 1e-4)
    evaluate.main(OWN)
    ensemble.main([*OWN, "ensembling.soup=checkpoints"])
    out = capsys.readouterr().out
    assert "accepted: " in out and "evaluate with ensembling.find_pattern=soup__*" in out
    paths = runs.find_members("tiny", "soup__*")
    assert [runs.parse_member(path).fold for path in paths] == [0, 1]
    soup = checkpoint.load(paths[0])
    parts = [checkpoint.load(runs.MODELS / "tiny" / name) for name in soup.meta["soup"]]
    assert len(parts) == 2 and soup.meta["kind"] == "soup"
    for name, tensor in soup.tensors.items():
        torch.testing.assert_close(tensor, (parts[0].tensors[name] + parts[1].tensors[name]) / 2)
    assert evaluate.main([*OWN, "ensembling.find_pattern=soup__*"]) == 0


def test_one_network_of_all_folds_is_no_member_and_says_what_its_score_is_worth(place, capsys) -> None:
    for fold in (0, 1):
        near(fold, "best_combo", 0.0)
    evaluate.main(OWN)
    ensemble.main([*OWN, "ensembling.soup=folds"])
    out = capsys.readouterr().out
    assert "one network of 2 folds" in out and "accepted" in out and "is no forecast; hand it in with" in out
    path = runs.MODELS / "tiny" / f"soup__{ATTO}__folds0-1_seed42.pth"
    assert path.is_file() and runs.parse_member(path) is None  # its score would count as out of fold


def test_a_worse_soup_is_refused_and_leaves_nothing(place, monkeypatch) -> None:
    near(0, "best_combo", 0.0)
    near(1, "best_combo", 0.0)
    evaluate.main(OWN)
    monkeypatch.setattr(soups, "by_image", lambda data, alpha: np.full(len(data), float("best" in data.name)))
    (line,) = soups.make(
        load(None, [*OWN, "ensembling.soup=folds"]), summary.evaluated(runs.RESULTS / "tiny"), CPU
    )
    assert "refused: its members have 1.0000 out of fold" in line.line and line.files == []
    assert not list((runs.MODELS / "tiny").glob("soup*"))


def test_statistics_of_batchnorm_are_those_of_the_training_images(place) -> None:
    path = checkpoint_of(0)
    settings = load(None, WORDS)
    soups.mix(path.with_name("mixed.pth"), [path, path], recipe=settings, fold=0, device=CPU)
    found = checkpoint.load(path.with_name("mixed.pth"))
    network = inference.load_network(found, path, CPU)
    seen: list[torch.Tensor] = []
    norm = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    beton = fold_set.open_fold(settings, 0).train
    rows = np.arange(beton.rows)
    pixels = np.empty((len(rows), 32, 32, 3), np.uint8)
    decode_eval(
        beton, rows, out=pixels, factor=1.14, interpolation=str(found.meta["interpolation"]), threads=1
    )
    with torch.no_grad():
        network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
