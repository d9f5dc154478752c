from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastflower.core.errors import CorruptionError, InputError
from fastflower.evaluation import logits, summary
from fastflower.evaluation.logits import MemberInfo
from support.fake_members import BACKBONES, IDS, experiment, folds, labels, member


def members_of_run(
    backbone: str = BACKBONES[0], seed: int = 42, fold_numbers: tuple[int, ...] = (2, 0, 1)
) -> list[logits.MemberLogits]:
    return [member(fold, backbone, seed) for fold in fold_numbers]


def test_a_saved_member_comes_back_to_the_bit(tmp_path: Path) -> None:
    saved = member(1)
    path = logits.save_logits(tmp_path, saved)
    assert path.name == "convnextv2_atto__fold1_seed42.npz"
    loaded = logits.load_logits(path)
    for name in logits.ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))
        assert getattr(loaded, name).dtype == getattr(saved, name).dtype
    assert loaded.info == saved.info


def test_damaged_missing_and_foreign_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"no logits .* run python -m fastflower\.evaluate first"):
        logits.load_logits(tmp_path / "m.npz")
    path = logits.save_logits(tmp_path, member(0))
    logits.save_logits(tmp_path, member(0, kind="probabilities"))
    with pytest.raises(InputError, match=r"holds probabilities, not logits; run python -m"):
        logits.load_logits(path)
    monkeypatch.setattr(MemberInfo, "FORMAT", 1)
    logits.save_logits(tmp_path, member(0))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"has format 1, this version reads 3; run python -m"):
        logits.load_logits(path)
    logits.save_logits(tmp_path, member(0, head=3))
    with pytest.raises(CorruptionError, match=r"head is 3, must be text"):
        logits.load_logits(path)
    with np.load(logits.save_logits(tmp_path / "b", member(0))) as file:
        content = dict(file)
    for foreign in ({"logits": np.zeros(3)}, content):
        np.savez(path, **foreign)  # without a checksum
        with pytest.raises(CorruptionError, match=r"not readable|checksum is missing.*evaluate again"):
            logits.load_logits(path)


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = logits.save_logits(tmp_path, member(0))
    content, rng = path.read_bytes(), np.random.default_rng(0)
    ends = {
        *range(60),
        *range(len(content) - 120, len(content)),
    }  # the headers of the first entry and of the zip
    for position in [*ends, *rng.integers(0, len(content), 600).tolist()]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match=r"m.*npz: (not readable|cut short).*evaluate again"):
            logits.load_logits(path)
    for size in [*range(0, len(content), 97), *range(len(content) - 40, len(content))]:
        path.write_bytes(content[:size])
        with pytest.raises(CorruptionError, match="evaluate again"):
            logits.load_logits(path)


def test_logits_of_another_member_under_its_name_are_refused(tmp_path: Path) -> None:
    members = [member(fold) for fold in range(3)]
    experiment(tmp_path / "a", members, [], [])
    oof = tmp_path / "a" / "oof"
    (oof / "convnextv2_atto__fold1_seed42.npz").rename(oof / "convnextv2_atto__fold0_seed42.npz")
    with pytest.raises(
        InputError, match=r"fold0_seed42.npz holds the logits of best_combo__convnextv2_atto__fold1"
    ):
        summary.load_member_logits(tmp_path / "a")


@pytest.mark.parametrize("name", ["logits", "single", "corrupt"])
def test_logits_that_are_not_finite_are_refused(tmp_path: Path, name: str) -> None:
    data = member(0)
    values = getattr(data, name).copy()
    values[..., 3, 1] = np.nan
    with pytest.raises(
        CorruptionError, match=rf"1 images have logits that are not finite, first {data.filename[3]}"
    ):
        logits.save_logits(tmp_path, replace(data, **{name: values}))
    assert not list(tmp_path.iterdir())


def test_folds_become_one_set_in_which_each_image_occurs_once() -> None:
    assembled = logits.assemble(members_of_run(), folds())
    np.testing.assert_array_equal(assembled.index, np.flatnonzero(folds() >= 0))
    np.testing.assert_array_equal(assembled.class_idx, labels()[assembled.index])
    for data in members_of_run():
        rows = np.isin(assembled.index, data.index)
        np.testing.assert_array_equal(assembled.logits[rows], data.logits)
        np.testing.assert_array_equal(assembled.corrupt[:, rows], data.corrupt)
        assert (assembled.fold[rows] == data.info.fold).all()
    assert (assembled.info.mb, assembled.info.ms) == (30.0, 6.0)


def test_missing_folds_are_named() -> None:
    assert logits.missing_folds(members_of_run(fold_numbers=(0, 2)), folds()) == [1]
    assert logits.missing_folds(members_of_run(), folds()) == []


def test_sets_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(InputError, match="occurs 2 times; give one member for each fold"):
        logits.assemble([member(0), member(0)], folds())
    with pytest.raises(InputError, match="different class maps"):
        logits.assemble([member(0), member(1, class_hash="other")], folds())
    for ids, how in (
        (IDS[:3], "without rose, tulip, x & <y>"),
        (IDS[1:] + IDS[:1], "in another order"),
        ([*IDS[1:], "8"], "without 7 and also with 8"),
    ):
        with pytest.raises(
            InputError, match=rf"different class maps \(c0ffee, other, {how}\); evaluate only"
        ):
            logits.assemble([member(0), member(1, class_hash="other", class_ids=ids)], folds())
    with pytest.raises(InputError, match=r"different folds \(\w+, other\)"):
        logits.assemble([member(0), member(1, folds_hash="other")], folds())
    second = member(1)
    with pytest.raises(InputError, match=r"has 6 classes, .* has 5"):
        logits.assemble([member(0), replace(second, logits=second.logits[:, :5])], folds())
    with pytest.raises(InputError, match="saw different corruptions"):
        logits.assemble(
            [member(0), replace(second, combos=second.combos[:1], corrupt=second.corrupt[:1])], folds()
        )


def test_an_image_of_the_members_own_training_part_is_refused() -> None:
    moved = folds()
    moved[member(0).index[4]] = 1
    with pytest.raises(InputError, match=r"1 images were not held out of fold 0, first image_\d+.jpg"):
        logits.assemble([member(0)], moved)
    data = member(0)
    with pytest.raises(InputError, match=r"1 images of folds \[0\] are missing"):
        logits.assemble([data.take(np.arange(1, len(data)))], folds())
    with pytest.raises(InputError, match="not held out"):
        logits.assemble([replace(data, index=data.index + 10_000)], folds())


def test_fusion_is_the_mean_flat_or_by_family() -> None:
    sets = [
        logits.assemble(members_of_run(b, s), folds())
        for b, s in ((BACKBONES[0], 1), (BACKBONES[0], 2), (BACKBONES[1], 1))
    ]
    a, b, c = (s.logits.astype(np.float64) for s in sets)
    np.testing.assert_allclose(logits.fuse(sets).logits, (a + b + c) / 3, rtol=1e-6)
    np.testing.assert_allclose(
        logits.fuse(sets, logits.family_weights([s.run[0] for s in sets])).logits,
        a / 4 + b / 4 + c / 2,
        rtol=1e-6,
    )
    corrupt = sum(s.corrupt.astype(np.float64) for s in sets) / 3
    np.testing.assert_allclose(logits.fuse(sets).corrupt, corrupt, rtol=1e-6, atol=1e-6)


def test_runs_over_other_folds_are_fused_where_they_overlap() -> None:
    first, second = (
        logits.assemble(members_of_run(fold_numbers=(0, 1)), folds()),
        logits.assemble(members_of_run(BACKBONES[1], fold_numbers=(1, 2)), folds()),
    )
    fused = logits.fuse([first, second])
    np.testing.assert_array_equal(fused.index, np.flatnonzero(folds() == 1))
    np.testing.assert_allclose(
        fused.logits, (member(1).logits + member(1, BACKBONES[1]).logits) / 2, rtol=1e-6, atol=1e-6
    )
    with pytest.raises(InputError, match="no fold in common"):
        logits.fuse(
            [logits.assemble([member(0)], folds()), logits.assemble([member(1, BACKBONES[1])], folds())]
        )
