"""Near-duplicate images: perceptual hashes or embeddings, and groups of rows that must never straddle folds.

The hash is the 64-bit DCT hash of the imagehash library. Grouping is exact for a Hamming threshold t: two
hashes at most t bits apart agree in at least k of t + k bands of bits, so only hashes that share k bands are compared.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator

import imagehash
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
SMALLEST = 32  # the hash's own side: below it, a picture is enlarged and few of its bits mean anything
FLAT = 4.0  # grey-value deviation below which an image has no structure to compare
SHARED = (1, 2, 3, 4)  # bands that two hashes must have in common to be compared
SORT = 50  # comparisons that take as long as sorting a hash
BLOCK = 1024  # rows of embeddings compared at once with as many
PATIENCE = 60.0  # seconds that hashing may take before data.group=auto leaves it out


def phash(image: Image.Image) -> int | None:
    """The 64-bit perceptual hash of a picture; None when it is flat, as the hashes of flat pictures all agree."""
    small = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    if np.asarray(small).std() < FLAT:
        return None
    bits = imagehash.phash(small).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hashing_seconds(side: int, rows: int, workers: int) -> float:
    """How long hashing `rows` pictures of a short side takes here, from three of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side * 4 // 3, 3), dtype=np.uint8)
    phash(Image.fromarray(noise))  # the first call pays for imports
    start = time.perf_counter()
    for _ in range(3):
        phash(Image.fromarray(noise))
    return (time.perf_counter() - start) / 3 * rows / workers


def group(
    content: list[str], hashes: np.ndarray, *, hashed: np.ndarray, threshold: int, largest: int
) -> np.ndarray:
    """The groups of rows by their hashes, uint64 (N,), where `hashed` (bool (N,)) is true; see `join`."""
    rows = np.flatnonzero(hashed)
    if not len(rows):
        return join(content, rows, families=rows, largest=largest)
    distinct, which = np.unique(hashes[rows], return_inverse=True)
    return join(content, rows, families=components(distinct, threshold)[which], largest=largest)


def join(content: list[str], rows: np.ndarray, *, families: np.ndarray, largest: int) -> np.ndarray:
    """A group id for each row, counted from 0 in order of first appearance: int64 (N,).

    content: a hash of each file's bytes; equal bytes are always one group. families: int64, of near-duplicates among
    `rows`. A near-duplicate group with more than `largest` rows is none (no fold could hold it): it falls back to
    equal bytes.
    """
    ids: dict[str, int] = {}
    same = np.array([ids.setdefault(one, len(ids)) for one in content], np.int64)
    near = same.copy()
    if len(rows):
        near = _join(same, rows, families)
        sizes = np.bincount(near)
        near = np.where(sizes[near] > largest, same + near.max() + 1, near)
    return _first_seen(near)


def components(hashes: np.ndarray, threshold: int) -> np.ndarray:
    """Connected components of distinct hashes, joined where at most `threshold` bits differ: int64 (N,).

    Memory is that of a few columns of the hashes, whatever is found.
    """
    families = np.arange(len(hashes), dtype=np.int64)
    for mask in _masks(threshold, len(hashes)):
        order = np.argsort(hashes & mask)
        for one, other in _close(hashes[order], mask, threshold):
            families = _joined(families, order[one], order[other])
    return families


def _masks(threshold: int, n: int) -> list[np.uint64]:
    """Every choice of k among threshold + k bands, as bits; k is what costs n spread-out hashes least."""

    def cost(k: int) -> float:  # of a hash: to be sorted in, and compared with those that share the bands
        return math.comb(threshold + k, k) * (SORT + n / 2 ** (BITS * k / (threshold + k)))

    k = min(SHARED, key=cost)
    bounds = np.linspace(0, BITS, threshold + k + 1).astype(int).tolist()
    bands = [(1 << high) - (1 << low) for low, high in itertools.pairwise(bounds)]
    return [np.uint64(sum(some)) for some in itertools.combinations(bands, k)]


def similar(vectors: np.ndarray, cosine: float) -> np.ndarray:
    """Connected components of unit vectors, float32 (N, F), joined where their cosine is at least `cosine`: int64 (N,).

    Every pair is compared, in blocks; what a block finds is folded into the families at once, so memory is that of
    one block. The cost is N^2 F / 2 multiplications.
    """
    n = len(vectors)
    families = np.arange(n, dtype=np.int64)
    for top in range(0, n, BLOCK):
        for left in range(top, n, BLOCK):
            one, other = (vectors[top : top + BLOCK] @ vectors[left : left + BLOCK].T >= cosine).nonzero()
            families = _joined(families, top + one, left + other)
    return families


def distance(a: int, b: int) -> int:
    """Bits in which two hashes differ."""
    return (int(a) ^ int(b)).bit_count()


def _close(hashes: np.ndarray, mask: np.uint64, threshold: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of close pairs that agree under the mask, by which the hashes are sorted: neighbours, then next ones."""
    low: np.ndarray = np.arange(len(hashes))
    for step in range(1, len(hashes)):
        low = low[: np.searchsorted(low, len(hashes) - step)]
        apart = hashes[low] ^ hashes[low + step]
        alike = apart & mask == 0
        low, apart = low[alike], apart[alike]
        if not len(low):
            return
        close = low[np.bitwise_count(apart) <= threshold]
        yield close, close + step


def _joined(families: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The families int64 (N,) after those of the rows `one` and `other` were made one, pair by pair."""
    one, other = families[one], families[other]
    if (one == other).all():
        return families
    met, ends = np.unique(np.r_[one, other], return_inverse=True)  # most families have met no other
    graph = coo_array(
        (np.ones(len(one), np.bool_), (ends[: len(one)], ends[len(one) :])), shape=2 * met.shape
    )
    label = connected_components(graph, directed=False)[1]
    names = np.arange(len(families))
    names[met] = met[np.unique(label, return_index=True)[1]][label]
    return names[families]


def _join(same: np.ndarray, rows: np.ndarray, families: np.ndarray) -> np.ndarray:
    """Rows that share a content or a family are one: components of rows beside contents and families."""
    n, contents = len(same), int(same.max()) + 1
    ends = np.r_[n + same, n + contents + families]
    size = n + contents + int(families.max()) + 1
    graph = coo_array((np.ones(len(ends), np.bool_), (np.r_[np.arange(n), rows], ends)), shape=(size, size))
    return connected_components(graph, directed=False)[1][:n].astype(np.int64)


def _first_seen(groups: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
