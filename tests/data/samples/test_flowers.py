"""Drawn flowers: reproducible, all different, and a contest with hidden labels for the test images."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflower.core import seeding
from fastflower.data.samples import flower_shapes, flowers
from fastflower.data.transforms import corruptions


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def contest(tmp_path_factory) -> flowers.DrawnContest:
    return flowers.write(tmp_path_factory.mktemp("drawn"), seed=3, head=4, tail=2, held_out=2)


def test_an_image_is_a_function_of_species_seed_and_index():
    first = np.asarray(flowers.draw(0, 0, 0))
    assert first.shape == (600, 600, 3)
    assert np.array_equal(first, np.asarray(flowers.draw(0, 0, 0)))
    for arguments in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert np.abs(first.astype(int) - np.asarray(flowers.draw(*arguments))).mean() > 5


@pytest.mark.parametrize("species", range(len(flowers.SPECIES)), ids=[kind.name for kind in flowers.SPECIES])
def test_every_species_shows_its_flower(species):
    """The plants change a visible part of the background."""
    bare = flowers._backdrop(seeding.generator(5, species, 0), species).resize((300, 300))
    planted = bare.copy()
    flowers._plants(planted, flowers.SPECIES[species], seeding.generator(6, species))
    changed = (np.asarray(bare) != np.asarray(planted)).any(axis=2)
    assert 0.01 < changed.mean() < 0.9


@pytest.mark.parametrize(("broad", "point"), [(0.5, 1.0), (0.7, 0.45), (0.86, 0.16)])
def test_a_petal_is_widest_where_it_says(broad, point):
    shape = flower_shapes.outline(flower_shapes.Petal(0.4, broad, point))
    upper = shape[:15]
    assert upper[np.argmax(upper[:, 1]), 0] == pytest.approx(broad, abs=0.12)
    assert shape[:, 1].max() == pytest.approx(0.2)
    assert np.allclose(shape[1:14, 1], -shape[-1:-14:-1, 1])  # mirrored about the rib


def test_a_notch_cuts_the_tip():
    assert flower_shapes.outline(flower_shapes.Petal(0.4, notch=0.2))[14, 0] == pytest.approx(0.8)


def test_colours_meet_the_short_way_around():
    red, violet = (0.98, 0.8, 0.8), (0.78, 0.6, 0.6)
    assert flower_shapes.blend(red, violet, 0.5) == pytest.approx((0.88, 0.7, 0.7))
    assert flower_shapes.blend((0.95, 1, 1), (0.05, 1, 1), 0.5)[0] % 1 == pytest.approx(0, abs=1e-9)
    assert flower_shapes.blend((0.15, 0.03, 1), (0.6, 0.8, 1), 0.5)[0] == 0.6  # white has no hue


def test_sizes_have_a_long_tail():
    sizes = flowers.class_sizes(120, 12)
    assert len(sizes) == len(flowers.SPECIES) >= 12
    assert (max(sizes), min(sizes)) == (120, 12)
    ordered = np.log(sorted(sizes))
    assert np.allclose(np.diff(ordered), np.log(10) / (len(sizes) - 1), atol=0.05)


def test_ids_are_distinct_and_not_contiguous():
    ids = sorted(flowers.CATEGORY_IDS)
    assert len(set(ids)) == len(flowers.SPECIES) == len(flowers.CHINESE) == len(set(flowers.CHINESE))
    assert ids != list(range(ids[0], ids[0] + len(ids)))


@pytest.mark.slow
def test_a_contest_is_complete_and_its_truth_hidden(contest):
    known, hidden = rows(contest.labels), rows(contest.truth)
    assert len(known) == sum(flowers.class_sizes(4, 2))
    assert len(hidden) == 2 * len(flowers.SPECIES)
    assert {row["filename"] for row in known} == {path.name for path in contest.train.iterdir()}
    assert {row["filename"] for row in hidden} == {path.name for path in contest.test.iterdir()}
    assert {row["filename"] for row in hidden} == {path.name for path in contest.disturbed.iterdir()}
    assert not {row["filename"] for row in known} & {row["filename"] for row in hidden}
    assert {row["category_id"] for row in known} == {row["category_id"] for row in hidden}
    assert not list(contest.test.glob("*.csv"))
    assert list(known[0]) == ["filename", "category_id", "chinese_name", "english_name"]


def test_file_names_are_not_ordered_by_class(contest):
    ids = [row["category_id"] for row in rows(contest.labels)]
    runs = sum(a == b for a, b in zip(ids, ids[1:], strict=False))
    assert runs < len(ids) / 3


def test_photographs_are_600_by_600_jpegs(contest):
    for folder in (contest.train, contest.test, contest.disturbed):
        with Image.open(next(folder.iterdir())) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (600, 600))


def test_each_held_out_photograph_is_disturbed_once(contest):
    """The nearest corruption is the expected one; the file is not equal to it because it is saved as JPEG again."""
    got: Counter[tuple[str, str]] = Counter()
    for row in rows(contest.truth):
        with Image.open(contest.test / row["filename"]) as image:
            clean = np.array(image)
        with Image.open(contest.disturbed / row["filename"]) as image:
            disturbed = np.array(image).astype(int)
        key = corruptions.image_key(row["filename"])
        distances = {
            kind: np.abs(corruptions.corrupt(clean, kind, level="low", key=key) - disturbed).mean()
            for kind in corruptions.STRENGTHS
        }
        nearest = min(distances, key=distances.__getitem__)
        assert distances[nearest] < 0.5 * np.abs(clean - disturbed).mean()
        got[row["english_name"], nearest] += 1
    kinds = list(corruptions.STRENGTHS)
    sizes = zip(flowers.SPECIES, flowers.class_sizes(4, 2), strict=True)
    assert got == Counter(
        (kind.name, kinds[(size + j) % len(kinds)]) for kind, size in sizes for j in range(2)
    )


@pytest.mark.slow
def test_a_contest_is_the_same_every_time(contest, tmp_path):
    repeated = flowers.write(tmp_path / "repeated", seed=3, head=4, tail=2, held_out=2)
    for path in sorted(contest.home.rglob("*.*")):
        assert path.read_bytes() == (repeated.home / path.relative_to(contest.home)).read_bytes(), path.name


@pytest.mark.slow
def test_shuffled_labels_keep_the_pictures_and_the_counts(contest, tmp_path):
    shuffled = flowers.write(tmp_path / "shuffled", seed=3, head=4, tail=2, held_out=2, shuffle_labels=True)
    true_ids, shuffled_ids = (
        [row["category_id"] for row in rows(drawn.labels)] for drawn in (contest, shuffled)
    )
    assert sorted(true_ids) == sorted(shuffled_ids)
    assert sum(a == b for a, b in zip(true_ids, shuffled_ids, strict=True)) < len(true_ids) / 3
    assert contest.truth.read_bytes() == shuffled.truth.read_bytes()
