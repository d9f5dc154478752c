from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from fastflower.core.errors import CorruptionError, InputError
from fastflower.data import class_ids, folds
from fastflower.data.labels import ClassMap, LabelTable
from fastflower.recipe import load, schema


def table_of(ids: list[str]) -> LabelTable:
    classes = ClassMap(class_ids.order_ids(set(ids)))
    names = [f"{k:06d}.jpg" for k in range(len(ids))]
    class_idx = np.array([classes.index(i) for i in ids], np.int64)
    return LabelTable(names, ids, class_idx, np.ones(len(ids), np.int64), classes)


def settings(*overrides: str) -> schema.Recipe:
    return load(None, list(overrides))


def split(ids: list[str], *overrides: str, groups: np.ndarray | None = None) -> folds.Folds:
    table = table_of(ids)
    groups = np.arange(len(ids)) if groups is None else groups
    fold = folds.make_folds(table, groups, settings(*overrides))
    content = [f"{k:x}" for k in range(len(ids))]
    return folds.Folds(table.filenames, table.category_ids, table.class_idx, fold, groups, content)


def test_stratified_folds_equal_those_of_scikit_learn() -> None:
    ids = [str(k % 7) for k in range(200)]
    got = split(ids, "data.split=stratified")
    want = np.zeros(200, int)
    for k, (_, held_out) in enumerate(
        StratifiedKFold(5, shuffle=True, random_state=42).split(ids, got.class_idx)
    ):
        want[held_out] = k
    assert np.array_equal(got.fold, want)
    counts = np.array([[np.sum((got.fold == k) & (got.class_idx == c)) for k in range(5)] for c in range(7)])
    assert (np.ptp(counts, axis=1) <= 1).all()
    assert got.numbers == [0, 1, 2, 3, 4]


def filmed(count: int, films: np.ndarray) -> LabelTable:
    return dataclasses.replace(table_of([str(k % 3) for k in range(count)]), given_groups=films)


def test_a_column_of_groups_gives_the_folds_of_stratified_group_kfold() -> None:
    films = np.random.default_rng(3).integers(0, 25, 300) ** 2 % 25  # of different sizes
    films = np.array(
        [list(dict.fromkeys(films.tolist())).index(film) for film in films]
    )  # by first appearance
    table = filmed(300, films)
    got = folds.make_folds(table, np.arange(300), settings("data.group_col=film", "data.n_splits=4"))
    want = np.zeros(300, int)
    splitter = StratifiedGroupKFold(4, shuffle=True, random_state=42)
    for k, (_, held_out) in enumerate(splitter.split(films, table.class_idx, films)):
        want[held_out] = k
    assert np.array_equal(got, want)


@pytest.mark.parametrize("kind", ["stratified", "stratified_group", "kfold", "ratio"])
def test_near_duplicates_join_the_groups_of_a_column(kind: str) -> None:
    films = np.arange(120) // 4
    near = np.arange(120)
    near[8] = near[3]  # the first and the third film share an image
    near = np.unique(near, return_inverse=True)[1]
    got = folds.make_folds(filmed(120, films), near, settings("data.group_col=film", f"data.split={kind}"))
    assert all(len(set(got[films == film])) == 1 for film in range(30))
    assert got[3] == got[8]


def test_groups_that_no_folds_can_keep_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"data.group_col = film has 2 groups, and a group is in one fold; lower it to 2"
    ):
        folds.make_folds(filmed(20, np.arange(20) % 2), np.arange(20), settings("data.group_col=film"))
    made = split([str(k % 3) for k in range(60)])
    folds.save_folds(tmp_path / "folds.csv", made)
    table = filmed(60, np.arange(60) // 10)
    with pytest.raises(
        InputError, match=r"divides 6 groups of data.group_col = film between folds, such as that of 0000"
    ):
        folds.load_folds(tmp_path, table, settings("data.group_col=film"))
    folds.load_folds(
        tmp_path, dataclasses.replace(table, given_groups=np.arange(60)), settings("data.group_col=x")
    )


@pytest.mark.parametrize("kind", ["stratified", "stratified_group", "kfold", "ratio"])
def test_groups_are_never_split_between_folds(kind: str) -> None:
    rng = np.random.default_rng(0)
    groups = np.unique(rng.integers(0, 150, 300), return_inverse=True)[1]
    got = split([str(k % 4) for k in range(300)], f"data.split={kind}", groups=groups)
    for number in got.numbers:
        folds.check_leaks(got, number)
        assert not set(groups[got.val_rows(number)]) & set(groups[got.train_rows(number)])
    if kind != "ratio":
        sizes = [len(got.val_rows(k)) for k in range(5)]
        assert sum(sizes) == 300
        assert max(sizes) - min(sizes) < 20


@pytest.mark.parametrize(("n", "train"), [(470_811, 376_648), (11, 8), (100, 80)])
def test_ratio_holds_out_a_fifth(n: int, train: int) -> None:
    got = split([str(k % 2) for k in range(n)], "data.split=ratio")
    assert (len(got.train_rows(0)), len(got.val_rows(0))) == (train, n - train)
    table = table_of([str(k % 2) for k in range(n)])
    mask = folds.may_validate(table, settings("data.split=ratio"))
    assert not np.any((got.fold == 0) & ~mask)


def test_kfold_ignores_labels_and_seeds_matter() -> None:
    ids = [str(k % 4) for k in range(60)]
    first, second = (split(ids, "data.split=kfold", f"seed={seed}") for seed in (1, 2))
    assert not np.array_equal(first.fold, second.fold)
    assert np.bincount(first.fold).tolist() == [12] * 5
    assert np.array_equal(first.fold, split(ids, "data.split=kfold", "seed=1").fold)


@pytest.mark.parametrize("kind", ["stratified", "stratified_group", "kfold", "ratio"])
@pytest.mark.parametrize("seed", range(5))
def test_rare_classes_always_train(kind: str, seed: int) -> None:
    ids = ["a", "b"] + ["c"] * 2 + ["d"] * 3 + ["e"] * 500
    got = split(ids, f"data.split={kind}", f"seed={seed}")
    for number in got.numbers:
        assert set(got.class_idx[got.train_rows(number)]) == {0, 1, 2, 3, 4}
    assert (got.fold[:2] == -1).all()
    if not kind.startswith("stratified"):
        return  # chance may put more of them together
    assert folds.rare_classes(got, table_of(ids)) == [
        "classes with fewer images than the 5 folds: a (1), b (1), c (2), d (3); some folds do not score them",
        "classes with images that train in every fold and are never scored: a (1), b (1)",
    ]


def test_a_class_of_one_group_trains_with_its_whole_group() -> None:
    groups = np.r_[0, 0, 0, np.arange(1, 41)]
    got = split(["a", "a", "b"] + ["b"] * 20 + ["c"] * 20, groups=groups)
    assert got.fold[:3].tolist() == [-1, -1, -1]
    assert (got.fold[3:] >= 0).all()


def test_too_few_images_for_the_folds() -> None:
    with pytest.raises(
        InputError, match=r"data.n_splits = 5: the largest class of the 6 images has 3 .*lower it to 3"
    ):
        split(["a"] * 3 + ["b"] * 3)


def test_saved_folds_come_back_and_are_never_replaced() -> None:
    got = split(["0", "1"] * 20, "data.split=stratified")
    folds.save_folds(Path("folds.csv"), got)
    back = folds.read_folds(Path("folds.csv"))
    assert back.hash == got.hash
    assert (back.filenames, back.sha256, back.group.tolist()) == (
        got.filenames,
        got.sha256,
        got.group.tolist(),
    )
    with pytest.raises(InputError, match=r"exists and is never replaced"):
        folds.save_folds(Path("folds.csv"), got)
    path, content, rng = Path("folds.csv"), Path("folds.csv").read_bytes(), random.Random(0)
    for position in [*range(100), *(rng.randrange(len(content) - 1) for _ in range(600))]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError, match=r"folds.csv.* damaged.*; restore the file"):
            folds.read_folds(path)
    for size in range(len(content) - 1):  # without its last line end the table is whole
        path.write_bytes(content[:size])
        with pytest.raises(CorruptionError, match=r"folds.csv.* damaged"):
            folds.read_folds(path)
    header, *lines = content.decode().splitlines(keepends=True)
    for edited in ([*lines, lines[0]], lines[1:], [lines[1], lines[0], *lines[2:]]):
        path.write_text(header + "".join(edited))
        with pytest.raises(CorruptionError, match="row 0 is damaged or was edited, or rows are missing"):
            folds.read_folds(path)


def test_labels_that_no_longer_match_are_refused() -> None:
    ids = ["0", "1"] * 20
    folds.save_folds(Path("folds.csv"), split(ids, "data.split=stratified"))
    unchanged, _ = folds.load_folds(Path(), table_of(ids), settings("seed=7"))
    assert unchanged.hash == folds.read_folds(Path("folds.csv")).hash
    with pytest.raises(InputError, match=r"1 gone, such as 000039.jpg"):
        folds.load_folds(Path(), table_of(ids[:-1]), settings())
    with pytest.raises(InputError, match=r"1 new, such as 000040.jpg"):
        folds.load_folds(Path(), table_of([*ids, "0"]), settings())
    with pytest.raises(InputError, match=r"1 relabelled, such as 000000.jpg"):
        folds.load_folds(Path(), table_of(["1", *ids[1:]]), settings())
    with pytest.raises(InputError, match=r"has 5 folds, the recipe asks for 3"):
        folds.load_folds(Path(), table_of(ids), settings("data.n_splits=3"))
    folds.write_skipped(Path("skipped.csv"), [("000040.jpg", "0", "is empty")])
    _, table = folds.load_folds(Path(), table_of([*ids, "0"]), settings())
    assert len(table) == 40


@pytest.mark.parametrize(
    ("column", "kind"), [("sha256", "file contents"), ("group", "groups"), ("filenames", "files")]
)
def test_leaks_are_refused(column: str, kind: str) -> None:
    got = split(["0", "1"] * 20, "data.split=stratified")
    val_row, train_row = int(got.val_rows(0)[0]), int(got.train_rows(0)[0])
    getattr(got, column)[train_row] = getattr(got, column)[val_row]
    with pytest.raises(InputError, match=rf"leak in fold 0: 1 {kind} are in training and validation"):
        folds.check_leaks(got, 0)
    with pytest.raises(InputError, match=r"fold 9 has 40 training and 0 validation images"):
        folds.check_leaks(got, 9)
