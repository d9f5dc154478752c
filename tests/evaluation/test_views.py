"""Views at test time: their gains and costs against numbers by hand, the choice of those worth their time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from fastflower import ensemble, evaluate, export
from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.core.records import read_record
from fastflower.evaluation import inference, views
from fastflower.evaluation.logits import load_logits
from fastflower.evaluation.moves import Move, moved, moves_of
from fastflower.evaluation.paired import gain_of_hits, paired_gain
from fastflower.model.network import NetworkSpec, build_network
from fastflower.recipe import checks, load
from support import fake_members
from support.evaluated_members import WORDS, member


def test_the_interval_and_test_of_a_paired_gain() -> None:
    """Agresti and Min (2005), section 3: 794 voters asked twice, 150 changed one way and 86 the other."""
    before = np.array([1] * 794 + [1] * 150 + [0] * 86 + [0] * 570)
    after = np.array([1] * 794 + [0] * 150 + [1] * 86 + [0] * 570)
    got = paired_gain(after, before)
    assert got.gain == pytest.approx(64 / 1600) and (got.gained, got.lost) == (150, 86)
    assert (got.low, got.high) == (pytest.approx(0.021, abs=5e-4), pytest.approx(0.059, abs=5e-4))
    assert got.p == binomtest(86, 236, 0.5).pvalue
    few = paired_gain(np.ones(10), np.ones(10))  # no difference among ten is not proof of none
    assert few.gain == 0 and few.low < -0.1 and few.high > 0.1 and few.p == 1


@torch.no_grad()
def test_flips_turns_and_crops_are_those_of_the_pixels() -> None:
    words = [
        "model.backbone=test_resnet",
        "model.pretrained=false",
        "data.img_size=32",
        "data.size_epochs=auto",
    ]
    recipe = load(None, [*words, "tta.vflip=true", "tta.quarter_turns=true", "tta.crops=0.5"])
    torch.manual_seed(0)
    network = build_network(NetworkSpec.from_recipe(recipe, 3)).eval()
    images = 255 * torch.rand(2, 3, 32, 32)
    seen: list[torch.Tensor] = []
    network.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    moves = moves_of(recipe.tta)
    for move in moves:
        moved(network, move, (32, 32))(images)
    pixels = [image * network.std + network.mean for image in seen]
    assert len(moves) == 10 and moves[0] == Move()
    by_hand = [images, images.flip(2), *(images.rot90(turns, (2, 3)) for turns in (1, 2, 3))]
    for got, wanted in zip(pixels, by_hand, strict=False):
        torch.testing.assert_close(got, wanted, atol=2e-2, rtol=0)
    corners = [
        images[:, :, 8:24, 8:24],
        *(images[:, :, down : down + 16, across : across + 16] for down in (0, 16) for across in (0, 16)),
    ]
    for got, part in zip(pixels[5:], corners, strict=True):
        wanted = torch.nn.functional.interpolate(part, size=(32, 32), mode="bilinear")
        # its inner pixels: at the edge of a part, its neighbours outside count too
        torch.testing.assert_close(got[:, :, 1:-1, 1:-1], wanted[:, :, 1:-1, 1:-1], atol=2e-2, rtol=0)


def test_views_of_oblong_images_are_not_turned() -> None:
    words = ["data.img_size=[[32,64]]", "data.size_epochs=auto", "tta.quarter_turns=true"]
    with pytest.raises(InputError, match=r"tta.quarter_turns=true turns square images, .* has 32 x 64"):
        checks.check(load(None, words))
    for command in (evaluate, export):
        with pytest.raises(InputError, match=r"tta.quarter_turns=true turns square images, .* has 32 x 64"):
            command.main(words)
    for command in (evaluate, ensemble):
        with pytest.raises(InputError, match=r"needs corrupted images; set robust.enabled=true"):
            command.main(["select.metric=0.5*clean + 0.5*corrupted", "robust.enabled=false"])
    with pytest.raises(InputError, match=r"tta.vflip = true: flips change the class"):
        checks.check_flips(
            load(
                None,
                [
                    "tta.vflip=true",
                    "tta.hflip=false",
                    "aug.hflip_p=0",
                    "aug.vflip_p=0",
                    "data.flips_keep_class=false",
                ],
            )
        )


TTA = load(None, ["tta.scales=[32,48]", "tta.rotations=[20]"]).tta


def seen_by_views(fold: int, harm: float = 4.0) -> views.MemberViews:
    """A member whose mirrored views help, whose second size changes nothing and whose rotated views harm."""
    made, rng = fake_members.member(fold), np.random.default_rng(fold)
    answer = np.eye(made.logits.shape[1])[made.class_idx]
    noise = 1.1 * rng.normal(size=answer.shape)
    by_view = {}
    for height, width, move, flip in views.views_of((32, 32), TTA.scales, TTA):
        logits = answer + (-noise if flip else noise)
        logits = logits + harm * rng.normal(size=answer.shape) * (move != Move())
        by_view[height, width, move, flip] = logits.astype(np.float32)
    for move in moves_of(TTA):
        for flip in (False, True):
            by_view[48, 48, move, flip] = by_view[32, 32, move, flip]
    logits = np.mean(list(by_view.values()), axis=0).astype(np.float32)
    single = by_view[32, 32, Move(), False]
    made = replace(made, logits=logits, single=single)
    return views.MemberViews(made, lambda asked: asked, by_view, {view: view[0] / 10 for view in by_view})


def test_gains_and_costs_are_those_by_hand_and_the_harmful_views_go() -> None:
    members = [seen_by_views(fold) for fold in (0, 1, 2)]
    table = views.measure(members, replace(TTA, prune=True))
    rows = {row.name: row for row in table.rows}
    assert list(rows) == ["32 pixels", "48 pixels", "mirrored", "rotated by 20 degrees"]
    labels = np.concatenate([of.member.class_idx for of in members])

    def top1(keep) -> float:
        means = [np.mean([z for view, z in of.logits.items() if keep(*view)], axis=0) for of in members]
        return float((np.concatenate(means).argmax(1) == labels).mean())

    everything = top1(lambda *view: True)
    assert table.all == pytest.approx(everything)
    plain = top1(lambda height, width, move, flip: (height, move, flip) == (32, Move(), False))
    assert (table.plain, table.over_plain.gain) == (pytest.approx(plain), pytest.approx(everything - plain))
    unturned = top1(lambda height, width, move, flip: move == Move())
    assert rows["rotated by 20 degrees"].gain.gain == pytest.approx(everything - unturned)
    assert rows["mirrored"].gain.gain == pytest.approx(everything - top1(lambda h, w, m, flip: not flip))
    assert rows["48 pixels"].ms == pytest.approx(4 * 4.8) and rows["mirrored"].views == 4
    assert table.ms == pytest.approx(4 * 3.2 + 4 * 4.8)
    assert [name for name, row in rows.items() if row.kept and "pixels" not in name] == ["mirrored"]
    assert table.kept.rotations == [] and table.kept.hflip and len(table.kept.scales) == 1
    assert table.kept == replace(table.kept, prune=True) and table.pruned.gain > 0.05
    reduced = members[0].reduced(table.kept)
    assert len(reduced.info.views) == 2 and reduced.info.ms == pytest.approx(table.kept.scales[0] / 5)
    assert "tta.prune=true leaves the others out" in views.conclusion(views.measure(members, TTA))


def test_the_kept_views_are_chosen_on_other_folds_than_they_are_scored_on() -> None:
    """Fold 0 alone would drop the mirror images; the other folds, which decide for it, keep them."""
    members = [seen_by_views(fold) for fold in (0, 1, 2)]
    effects = views.Effects(members, "clean")
    table = views.measure(members, TTA)
    expected = []
    for part in (0, 1, 2):
        inside = effects.parts == part
        expected.append(effects.of(effects.worthwhile(TTA, ~inside))[0, inside] - effects.of(TTA)[0, inside])
    assert table.pruned.gain == pytest.approx(np.concatenate(expected).mean())


@pytest.mark.slow
def test_evaluate_keeps_the_views_that_export_then_takes(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    member(0), member(1)
    words = [*WORDS, "robust.enabled=false", "tta.prune=true"]
    recipe = load(None, words)
    with pytest.raises(InputError, match=r"tta.prune=true needs .*views.json; run .*evaluate"):
        views.kept_views(recipe)
    evaluate.main(words)
    table = read_record(runs.RESULTS / "tiny" / views.ViewTable.FILE, views.ViewTable)
    out = capsys.readouterr().out
    assert "worth it" in out and ("left out" in out) == (table.kept != table.tta)
    kept = views.kept_views(recipe)
    assert kept.tta == table.kept and kept.tta.prune
    saved = load_logits(next((runs.RESULTS / "tiny" / "oof").glob("*fold0*")))
    path = next((runs.MODELS / "tiny").glob("*fold0*.pth"))
    again = inference.predict(path, kept, torch.device("cpu"))
    np.testing.assert_allclose(saved.logits, again.logits, atol=1e-5)
    assert saved.info.views == again.info.views
    with pytest.raises(InputError, match="was measured with other values of tta"):
        views.kept_views(load(None, [*words, "tta.shift=0.1"]))


def test_another_metric_asks_for_each_choice_of_views_once(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [seen_by_views(fold) for fold in range(3)]
    reduced, original = [], views.MemberViews.reduced

    def counted(self: views.MemberViews, tta: object) -> object:
        reduced.append((self.member.info.fold, repr(tta)))
        return original(self, tta)

    monkeypatch.setattr(views.MemberViews, "reduced", counted)
    views.measure(members, TTA, "macro_f1")
    assert reduced and len(reduced) == len(set(reduced))


def test_the_gain_of_hits_is_that_of_their_images() -> None:
    before, after = np.repeat([1, 1, 0, 0], [20, 3, 9, 8]), np.repeat([1, 0, 1, 0], [20, 3, 9, 8])
    assert gain_of_hits(40, gained=9, lost=3) == paired_gain(before, after)
