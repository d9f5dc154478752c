from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from fastflower import ensemble, evaluate
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.scores import softmax
from fastflower.data.betons import fold_set
from fastflower.data.decode.kernel import decode_eval
from fastflower.evaluation import inference, soups, summary
from fastflower.model.member import load_member, save_member
from fastflower.recipe import load
from support.evaluated_members import WORDS
from support.evaluated_members import member as checkpoint_of
from support.fake_members import member

CPU = torch.device("cpu")
ATTO = "convnextv2_atto"
ATTO_WORDS = [*WORDS, f"model.backbone={ATTO}", "tta.scales=[32]", "tta.hflip=false"]


def test_weights_are_averaged_and_counters_stay_whole_numbers() -> None:
    a = {"w": torch.tensor([1.0, 2.0]), "steps": torch.tensor(7)}
    b = {"w": torch.tensor([3.0, 6.0]), "steps": torch.tensor(9)}
    mean = soups.average_tensors([a, b])
    assert mean["w"].tolist() == [2.0, 4.0] and mean["w"].dtype == torch.float32 and mean["steps"] == 7
    with pytest.raises(InputError, match="networks of one kind"):
        soups.average_tensors([a, {**b, "w": torch.zeros(3)}])


def test_the_score_of_a_soup_is_that_of_all_its_images() -> None:
    data = member(0)
    clean = (data.single.argmax(1) == data.class_idx).mean()
    corrupted = np.mean([(logits.argmax(1) == data.class_idx).mean() for logits in data.corrupt])
    settings, half = load(None, []), np.arange(len(data)) < len(data) // 2
    parts = [data.take(np.flatnonzero(half)), data.take(np.flatnonzero(~half))]
    assert soups.soup_score(settings, parts) == pytest.approx(0.7 * clean + 0.3 * corrupted)
    without = replace(data, combos=data.combos[:0], corrupt=data.corrupt[:0])
    assert soups.soup_score(settings, [without]) == pytest.approx(clean)
    loss = log_loss(data.class_idx, softmax(data.single), labels=range(data.single.shape[1]))
    by_loss = load(None, ["select.metric=log_loss"])
    assert soups.soup_score(by_loss, parts) == pytest.approx(-loss)
    assert soups.in_words(by_loss, -loss) == f"log loss {loss:.4f}"


def test_a_soup_that_is_better_in_only_one_fold_does_not_raise_the_nested_score() -> None:
    def scored(*values: float) -> dict[int, np.ndarray]:
        return {fold: np.full(10, value) for fold, value in enumerate(values)}

    base, lucky, good = scored(0.5, 0.5, 0.5), scored(0.95, 0.4, 0.4), scored(0.6, 0.6, 0.6)
    assert sum(v.mean() for v in lucky.values()) / 3 > 0.5  # its mean over the folds looks better

    def mean(parts: list[np.ndarray]) -> float:
        return float(np.concatenate(parts).mean())

    assert soups.nested_score([base, lucky], mean) == pytest.approx((0.5 + 0.4 + 0.4) / 3)
    assert soups.nested_score([base, good], mean) == pytest.approx(0.6)
    assert soups.nested_score([scored(0.5), scored(0.9)], mean) == pytest.approx(0.5)


def write_nearby(fold: int, kind: str, noise: float) -> None:
    """Write a checkpoint of this kind: the member of fold 0 plus noise, in standard deviations of each tensor."""
    source = checkpoint_of(0, ATTO)  # both folds from one network, as from pretrained weights
    base = load_member(source)
    torch.manual_seed(len(kind) + fold)
    tensors = {
        name: t + noise * t.std(correction=0) * torch.randn_like(t) for name, t in base.tensors.items()
    }
    path = runs.Run(exp="tiny", backbone=ATTO, fold=fold, seed=42).checkpoint_path(kind, 4, 0.5)
    save_member(path, tensors, replace(base.meta, fold=fold, kind=kind))


@pytest.mark.slow
def test_checkpoints_of_each_fold_become_members_that_evaluate_like_others(project, capsys) -> None:
    for fold in (0, 1):
        write_nearby(fold, "best_combo", 0.0)
        write_nearby(fold, "ema_best", 1e-4)
    evaluate.main(ATTO_WORDS)
    ensemble.main([*ATTO_WORDS, "ensembling.soup=checkpoints"])
    out = capsys.readouterr().out
    assert "accepted: " in out and "evaluate with ensembling.find_pattern=soup__*" in out
    paths = runs.find_members("tiny", "soup__*", metric="combo")
    assert [runs.parse_member(path).fold for path in paths] == [0, 1]
    soup = load_member(paths[0])
    parts = [load_member(runs.MODELS / "tiny" / name) for name in soup.meta.soup]
    assert len(parts) == 2 and soup.meta.kind == "soup"
    for name, tensor in soup.tensors.items():
        torch.testing.assert_close(tensor, (parts[0].tensors[name] + parts[1].tensors[name]) / 2)
    assert evaluate.main([*ATTO_WORDS, "ensembling.find_pattern=soup__*"]) == 0


@pytest.mark.slow
def test_one_network_of_all_folds_is_no_member_and_its_score_comes_with_a_warning(project, capsys) -> None:
    for fold in (0, 1):
        write_nearby(fold, "best_combo", 0.0)
    evaluate.main(ATTO_WORDS)
    ensemble.main([*ATTO_WORDS, "ensembling.soup=folds"])
    out = capsys.readouterr().out
    assert "one network of 2 folds" in out and "accepted" in out and "is no forecast; hand it in with" in out
    path = runs.MODELS / "tiny" / f"soup__{ATTO}__folds0-1_seed42.pth"
    assert path.is_file() and runs.parse_member(path) is None  # its score would count as out of fold


@pytest.mark.slow
def test_a_worse_soup_is_refused_and_leaves_nothing(project, monkeypatch) -> None:
    write_nearby(0, "best_combo", 0.0)
    write_nearby(1, "best_combo", 0.0)
    evaluate.main(ATTO_WORDS)
    monkeypatch.setattr(
        soups, "soup_score", lambda recipe, parts: np.mean([float("best" in part.name) for part in parts])
    )
    (soup,) = soups.make_soups(
        load(None, [*ATTO_WORDS, "ensembling.soup=folds"]),
        summary.load_member_logits(runs.RESULTS / "tiny"),
        CPU,
    )
    assert "refused: its members have 1.0000 out of fold" in soup.line and soup.files == []
    assert not list((runs.MODELS / "tiny").glob("soup*"))


def test_statistics_of_a_frozen_backbone_stay(project) -> None:
    path = checkpoint_of(0)
    target = path.with_name("averaged.pth")
    soups.average_checkpoints(target, [path, path], recipe=load(None, WORDS), fold=0, device=CPU)
    averaged, member = load_member(target).tensors, load_member(path).tensors
    assert all(torch.equal(averaged[name], tensor) for name, tensor in member.items())


def test_statistics_of_batchnorm_are_those_of_the_training_images(project) -> None:
    path = checkpoint_of(0)
    other, member = path.with_name("other.pth"), load_member(path)
    save_member(other, {n: t + n.endswith("running_mean") for n, t in member.tensors.items()}, member.meta)
    settings = load(None, WORDS)
    soups.average_checkpoints(
        path.with_name("averaged.pth"), [path, other], recipe=settings, fold=0, device=CPU
    )
    averaged = load_member(path.with_name("averaged.pth"))
    network = inference.load_network(averaged, path, CPU)
    inputs: list[torch.Tensor] = []
    norm = next(m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    beton = fold_set.open_fold(settings, 0).train
    rows = np.arange(beton.rows)
    pixels = np.empty((len(rows), 32, 32, 3), np.uint8)
    decode_eval(beton, rows, out=pixels, factor=1.14, interpolation=averaged.meta.interpolation, threads=1)
    with torch.no_grad():
        network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())
    torch.testing.assert_close(norm.running_mean, inputs[0].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
