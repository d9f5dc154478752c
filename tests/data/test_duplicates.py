from __future__ import annotations

import imagehash
import numpy as np
import pytest
from PIL import Image
from scipy.sparse.csgraph import connected_components

from fastflower.data import duplicates


def photograph(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """A smooth random image, as a perceptual hash expects."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def clustered(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distinct hashes, many of which differ from another in a few bits."""
    seeds = rng.integers(0, 2**64, n // 4, dtype=np.uint64)
    hashes = np.repeat(seeds, 4)
    for _ in range(5):
        flips = np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64)
        hashes = np.where(rng.random(len(hashes)) < 0.6, hashes ^ flips, hashes)
    return np.unique(hashes)


@pytest.mark.parametrize("threshold", [0, 1, 4, 8])
def test_components_equal_brute_force(threshold: int) -> None:
    hashes = clustered(np.random.default_rng(threshold), 600)
    close = np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= threshold
    want = connected_components(close, directed=False)[1]
    got = duplicates.hash_components(hashes, threshold)
    assert same_partition(got, want)
    assert threshold < 4 or len(np.unique(got)) < len(hashes)


@pytest.mark.parametrize("threshold", [2, 4, 7, 8])
def test_planted_neighbours_are_found_among_many(threshold: int) -> None:
    """Compare with brute force over 6000 hashes, for every number of shared bands."""
    rng = np.random.default_rng(threshold)
    hashes = rng.integers(0, 2**64, 6000, dtype=np.uint64)
    for row in range(500):  # each differs from another in a random number of bits, up to one too many
        bits = rng.choice(64, rng.integers(1, threshold + 2), replace=False).astype(np.uint64)
        hashes[row] = hashes[1000 + row] ^ np.bitwise_or.reduce(np.uint64(1) << bits)
    hashes = rng.permutation(np.unique(hashes))
    differing_bits = (
        np.bitwise_count(hashes[start : start + 1000, None] ^ hashes) for start in range(0, len(hashes), 1000)
    )
    close = np.concatenate([block <= threshold for block in differing_bits])
    want = connected_components(close, directed=False)[1]
    for k in (1, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(duplicates, "SHARED_BANDS", (k,))
            assert same_partition(duplicates.hash_components(hashes, threshold), want)
    assert 300 < len(hashes) - want.max() - 1 < 500


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = len(np.unique(np.stack([first, second]), axis=1).T)
    return pairs == len(np.unique(first)) == len(np.unique(second))


def test_phash_is_imagehash_and_survives_resizing_and_encoding() -> None:
    image = photograph(1)
    bits = imagehash.phash(image).hash.ravel()
    assert duplicates.phash(image) == int("".join("01"[int(bit)] for bit in bits), 2)
    copies = [
        image.resize((120, 90), Image.Resampling.BICUBIC),
        image.resize((640, 480), Image.Resampling.BICUBIC),
    ]
    first = duplicates.phash(image)
    assert first is not None
    for copy in copies:
        hashed = duplicates.phash(copy)
        assert hashed is not None
        assert duplicates.hamming_distance(first, hashed) <= 4
    stranger = duplicates.phash(photograph(2))
    assert stranger is not None
    assert duplicates.hamming_distance(first, stranger) > 12


def test_flat_pictures_have_no_hash() -> None:
    assert duplicates.phash(Image.new("RGB", (50, 50), "red")) is None


def test_groups_join_equal_bytes_and_near_hashes() -> None:
    content = ["a", "b", "a", "c", "d", "e"]
    hashes = np.array([0, 0xFFFF, 0xFF << 40, 0xFFFE, 0x3FF << 50, 0x3FF << 50], np.uint64)
    hashed = np.array([True, True, True, True, False, True])
    groups = duplicates.group_by_hash(content, hashes, hashed=hashed, threshold=4, largest=4)
    assert groups.tolist() == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "largest", "groups"), [("abc", 3, [0, 0, 0]), ("abc", 2, [0, 1, 2]), ("aba", 2, [0, 1, 0])]
)
def test_a_chain_is_one_group_unless_it_is_implausibly_large(
    content: str, largest: int, groups: list[int]
) -> None:
    hashes = np.array([0b0, 0b1111, 0b11111111], np.uint64)  # 4 bits from the next, 8 from end to end
    hashed = np.ones(3, bool)
    grouped = duplicates.group_by_hash(list(content), hashes, hashed=hashed, threshold=4, largest=largest)
    assert grouped.tolist() == groups


def test_unhashed_rows_are_grouped_by_bytes_alone() -> None:
    groups = duplicates.group_by_hash(
        list("abab"), np.zeros(4, np.uint64), hashed=np.zeros(4, bool), threshold=4, largest=2
    )
    assert groups.tolist() == [0, 1, 0, 1]


def test_the_cost_of_hashing_grows_with_rows() -> None:
    assert 0 < duplicates.hashing_seconds(64, 1, 1) < duplicates.hashing_seconds(64, 100_000, 1)


@pytest.mark.parametrize("block", [7, 64])
def test_similar_embeddings_equal_brute_force(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    rng = np.random.default_rng(2)
    vectors = np.repeat(rng.normal(size=(40, 16)), 3, 0) + rng.normal(0, 0.12, (120, 16))
    vectors = rng.permutation(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    want = connected_components(vectors.astype(float) @ vectors.T >= 0.98, directed=False)[1]
    got = duplicates.cosine_components(vectors, 0.98)
    assert np.array_equal(got[:, None] == got[None, :], want[:, None] == want[None, :])
    assert 20 < len(np.unique(got)) < 119
