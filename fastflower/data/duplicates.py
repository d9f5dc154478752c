"""Near-duplicate images: perceptual hashes or embeddings, and groups of rows that must not be split between folds.

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
MIN_SIDE = (
    32  # side at which the hash is computed: a smaller image is enlarged, and few of its bits mean anything
)
MIN_DEVIATION = 4.0  # grey-value deviation below which an image has no structure to compare
SHARED_BANDS = (1, 2, 3, 4)  # choices of k, the bands that two hashes must have in common to be compared
SORT_COST = 50  # cost of sorting in one hash, in comparisons of two hashes
BLOCK = 1024  # rows of embeddings in a block; blocks are compared pairwise
MAX_HASHING_SECONDS = 60.0  # data.group=auto skips hashing if it would take longer


def phash(image: Image.Image) -> int | None:
    """The 64-bit perceptual hash of an image; None if it is flat, because flat images all have similar hashes."""
    small = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    if np.asarray(small).std() < MIN_DEVIATION:
        return None
    bits = imagehash.phash(small).hash.ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def hashing_seconds(side: int, rows: int, workers: int) -> float:
    """Estimated seconds to hash `rows` images of this short side, measured on three images of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (side, side * 4 // 3, 3), dtype=np.uint8)
    phash(Image.fromarray(noise))  # the first call pays for imports
    start = time.perf_counter()
    for _ in range(3):
        phash(Image.fromarray(noise))
    return (time.perf_counter() - start) / 3 * rows / workers


def group_by_hash(
    content: list[str], hashes: np.ndarray, *, hashed: np.ndarray, threshold: int, largest: int
) -> np.ndarray:
    """Group rows by content and, where `hashed`, bool (N,), is true, by their hashes, uint64 (N,); see `group_rows`."""
    rows = np.flatnonzero(hashed)
    if not len(rows):
        return group_rows(content, rows, families=rows, largest=largest)
    distinct, position = np.unique(hashes[rows], return_inverse=True)
    return group_rows(content, rows, families=hash_components(distinct, threshold)[position], largest=largest)


def group_rows(content: list[str], rows: np.ndarray, *, families: np.ndarray, largest: int) -> np.ndarray:
    """A group id for each row, counted from 0 in order of first appearance: int64 (N,).

    content: a hash of each file's bytes; equal files are always one group. families: the family of near-duplicates
    that each of `rows` belongs to, int64. A group of near-duplicates with more than `largest` rows is implausible (no
    fold could hold it) and is replaced by groups of equal files.
    """
    ids: dict[str, int] = {}
    equal = np.array([ids.setdefault(file_hash, len(ids)) for file_hash in content], np.int64)
    groups = equal.copy()
    if len(rows):
        groups = _merge_content(equal, rows, families)
        sizes = np.bincount(groups)
        groups = np.where(sizes[groups] > largest, equal + groups.max() + 1, groups)
    return _renumber(groups)


def hash_components(hashes: np.ndarray, threshold: int) -> np.ndarray:
    """Connected components of distinct hashes, linked if at most `threshold` bits differ: int64 (N,).

    Memory is that of a few arrays of the hashes' size, however many links there are.
    """
    families = np.arange(len(hashes), dtype=np.int64)
    for mask in _masks(threshold, len(hashes)):
        order = np.argsort(hashes & mask)
        for first, second in _close_pairs(hashes[order], mask, threshold):
            families = _merge_pairs(families, order[first], order[second])
    return families


def _masks(threshold: int, n: int) -> list[np.uint64]:
    """Bit masks of every choice of k among threshold + k bands; k minimises the cost for n uniform hashes."""

    def cost(k: int) -> float:  # per hash: sorting it in, and comparing it with those that share its bands
        return math.comb(threshold + k, k) * (SORT_COST + n / 2 ** (BITS * k / (threshold + k)))

    k = min(SHARED_BANDS, key=cost)
    bounds = np.linspace(0, BITS, threshold + k + 1).astype(int).tolist()
    bands = [(1 << high) - (1 << low) for low, high in itertools.pairwise(bounds)]
    return [np.uint64(sum(chosen)) for chosen in itertools.combinations(bands, k)]


def cosine_components(vectors: np.ndarray, cosine: float) -> np.ndarray:
    """Connected components of unit vectors, float32 (N, F), linked if their cosine is at least `cosine`: int64 (N,).

    Every pair is compared, block by block, and each block's links are merged at once, so memory is that of one block.
    The cost is N^2 F / 2 multiplications.
    """
    n = len(vectors)
    families = np.arange(n, dtype=np.int64)
    for top in range(0, n, BLOCK):
        for left in range(top, n, BLOCK):
            first, second = (vectors[top : top + BLOCK] @ vectors[left : left + BLOCK].T >= cosine).nonzero()
            families = _merge_pairs(families, top + first, left + second)
    return families


def hamming_distance(a: int, b: int) -> int:
    """The number of bits in which two hashes differ."""
    return (int(a) ^ int(b)).bit_count()


def _close_pairs(
    hashes: np.ndarray, mask: np.uint64, threshold: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions of close pairs that agree under the mask, by which the hashes are sorted.

    Each turn yields the pairs that are one position further apart.
    """
    low: np.ndarray = np.arange(len(hashes))
    for step in range(1, len(hashes)):
        low = low[: np.searchsorted(low, len(hashes) - step)]
        difference = hashes[low] ^ hashes[low + step]
        agree = difference & mask == 0
        low, difference = low[agree], difference[agree]
        if not len(low):
            return
        close = low[np.bitwise_count(difference) <= threshold]
        yield close, close + step


def _merge_pairs(families: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The families, int64 (N,), after merging those of the rows first[i] and second[i] for every i."""
    first, second = families[first], families[second]
    if (first == second).all():
        return families
    linked, ends = np.unique(
        np.r_[first, second], return_inverse=True
    )  # the graph leaves out all other families
    edges = len(first)
    graph = coo_array((np.ones(edges, np.bool_), (ends[:edges], ends[edges:])), shape=2 * linked.shape)
    label = connected_components(graph, directed=False)[1]
    merged = np.arange(len(families))
    merged[linked] = linked[np.unique(label, return_index=True)[1]][label]
    return merged[families]


def _merge_content(equal: np.ndarray, rows: np.ndarray, families: np.ndarray) -> np.ndarray:
    """Groups of rows that share a content or a family: components of a graph of rows, contents and families."""
    n, contents = len(equal), int(equal.max()) + 1
    ends = np.r_[n + equal, n + contents + families]
    size = n + contents + int(families.max()) + 1
    graph = coo_array((np.ones(len(ends), np.bool_), (np.r_[np.arange(n), rows], ends)), shape=(size, size))
    return connected_components(graph, directed=False)[1][:n].astype(np.int64)


def _renumber(groups: np.ndarray) -> np.ndarray:
    """The groups numbered from 0 in order of first appearance."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]
