"""Near-duplicate images: perceptual hashes or embeddings, and groups of rows that must never straddle folds.

The hash is the 64-bit DCT hash of the imagehash library. Grouping is exact for a Hamming threshold t: two
hashes at most t bits apart agree in at least k of t + k bands of bits, so only hashes that share k bands are compared.
"""

from __future__ import annotations

import itertools
import math
import time

import imagehash
import numba
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

BITS = 64
SMALLEST = 32  # the hash's own side: below it, a picture is enlarged and few of its bits mean anything
FLAT = 4.0  # grey-value deviation below which an image has no structure to compare
SHARED = (1, 2, 3, 4)  # bands that two hashes must have in common to be compared
SORT = 100  # comparisons that take as long as sorting a hash
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
    content: list[str], hashes: np.ndarray, hashed: np.ndarray, threshold: int, largest: int
) -> np.ndarray:
    """The groups of rows by their hashes, uint64 (N,), where `hashed` (bool (N,)) is true; see `join`."""
    rows = np.flatnonzero(hashed)
    if not len(rows):
        return join(content, rows, rows, largest)
    distinct, which = np.unique(hashes[rows], return_inverse=True)
    return join(content, rows, components(distinct, threshold)[which], largest)


def join(content: list[str], rows: np.ndarray, families: np.ndarray, largest: int) -> np.ndarray:
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
    parent = np.arange(len(hashes))
    for mask in _masks(threshold, len(hashes)):
        order = np.argsort(hashes & mask, kind="stable")
        _unite(parent, order, hashes[order], mask, threshold)
    while (parent[parent] != parent).any():
        parent = parent[parent]
    return np.unique(parent, return_inverse=True)[1]


def _masks(threshold: int, n: int) -> list[np.uint64]:
    """Every choice of k among threshold + k bands, as bits; k is what costs n spread-out hashes least."""

    def cost(
        k: int,
    ) -> float:  # a hash is sorted in, which is as long as SORT comparisons, and compared with its like
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
    families = np.arange(n)
    for top in range(0, n, BLOCK):
        for left in range(top, n, BLOCK):
            close = vectors[top : top + BLOCK] @ vectors[left : left + BLOCK].T >= cosine
            one, other = families[top + close.nonzero()[0]], families[left + close.nonzero()[1]]
            if (one != other).any():
                graph = coo_array((np.ones(len(one), np.bool_), (one, other)), shape=(n, n))
                families = connected_components(graph, directed=False)[1][families]
    return families.astype(np.int64)


def distance(a: int, b: int) -> int:
    """Bits in which two hashes differ."""
    return (int(a) ^ int(b)).bit_count()


@numba.njit(cache=True)
def _unite(parent, order, hashes, mask, threshold):  # type: ignore[no-untyped-def]
    """Join the close ones among hashes that agree under the mask and so lie side by side."""
    for i in range(len(hashes)):
        j = i + 1
        while j < len(hashes) and (hashes[i] ^ hashes[j]) & mask == 0:
            if _ones(hashes[i] ^ hashes[j]) <= threshold:
                one, other = _root(parent, order[i]), _root(parent, order[j])
                parent[max(one, other)] = min(one, other)
            j += 1


@numba.njit(cache=True)
def _root(parent, row):  # type: ignore[no-untyped-def]
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row


@numba.njit(cache=True)
def _ones(x):  # type: ignore[no-untyped-def]
    """The number of bits set, in the form that LLVM knows for one instruction."""
    x -= (x >> np.uint64(1)) & np.uint64(0x5555555555555555)
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


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
