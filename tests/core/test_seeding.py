"""The hash against published values, NumPy against torch, and statistical tests of the draws."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import stats

from fastflower.core import seeding

SEEDS = (0, 1, 42, 2**31, 2**63 + 5, 2**64 - 1)


def as_tensor(keys: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.atleast_1d(keys).view(np.int64).copy())


def keys_of(count: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return seeding.row_keys(seed, epoch, positions=np.arange(count), rows=np.arange(count))


@pytest.mark.parametrize(
    ("seed", "outputs"),
    [
        (
            1234567,  # the sequence that implementations of SplitMix64 are commonly checked with
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423,
                4593380528125082431,
                16408922859458223821,
            ],
        ),
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]),
    ],
)
def test_published_splitmix64(seed: int, outputs: list[int]) -> None:
    states = [(seed + k * seeding.GOLDEN) & seeding.MASK for k in range(len(outputs))]
    assert seeding.hash64(np.array(states, np.uint64)).tolist() == outputs
    signed = torch.tensor([seeding._signed(state) for state in states])
    assert [value & seeding.MASK for value in seeding.hash64_tensor(signed).tolist()] == outputs


def test_numpy_and_torch_are_equal_to_the_bit() -> None:
    keys = np.concatenate([keys_of(5000, seed) for seed in SEEDS])
    edges = np.array([0, 1, 2**63 - 1, 2**63, 2**64 - 1], np.uint64)
    keys = np.concatenate([keys, edges])
    assert np.array_equal(
        seeding.hash64_tensor(as_tensor(keys)).numpy().view(np.uint64), seeding.hash64(keys)
    )
    for stream in (0, 1, 100, 2**31):
        single = seeding.uniform_tensor(as_tensor(keys), stream).numpy()
        double = seeding.uniform(keys, stream)
        assert single.dtype == np.float32
        assert np.array_equal(single, np.floor(double * 2**24) / 2**24)
        assert double.min() >= 0 and double.max() < 1 and single.max() < 1


def test_python_formula() -> None:
    """The same arithmetic with Python integers."""

    def hash64(x: int) -> int:
        z = (x + seeding.GOLDEN) & seeding.MASK
        z = ((z ^ z >> 30) * seeding.M1) & seeding.MASK
        z = ((z ^ z >> 27) * seeding.M2) & seeding.MASK
        return z ^ z >> 31

    for seed, epoch, position, row in [(0, 0, 0, 0), (42, 3, 17, 5), (2**64 - 1, 99, 2**40, 2**33)]:
        key = hash64(hash64(hash64(hash64(seed) ^ epoch) ^ position) ^ row)
        assert int(seeding.row_keys(seed, epoch, positions=np.array(position), rows=np.array(row))) == key
        assert float(seeding.uniform(np.array(key, np.uint64), 9)) == (hash64(key ^ hash64(9)) >> 11) / 2**53


def test_keys_are_a_pure_function_of_each_position() -> None:
    positions, rows = np.arange(1000), np.arange(1000)[::-1].copy()
    keys = seeding.row_keys(7, 2, positions=positions, rows=rows)
    assert np.array_equal(keys[1::2], seeding.row_keys(7, 2, positions=positions[1::2], rows=rows[1::2]))
    assert keys.dtype == np.uint64


def test_keys_differ_between_rows_positions_epochs_and_seeds() -> None:
    count = 20000
    row_twice = seeding.row_keys(0, 0, positions=np.arange(count), rows=np.zeros(count, np.int64))
    families = [keys_of(count, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    all_keys = np.concatenate([row_twice[1:], *families])
    assert len(np.unique(all_keys)) == len(all_keys)


@pytest.mark.parametrize("stream", [0, 100, 2000])
def test_uniform(stream: int) -> None:
    draws = seeding.uniform(keys_of(100_000, seed=3), stream)
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    counts = np.bincount((draws * 1000).astype(int), minlength=1000)
    assert 1e-3 < stats.chisquare(counts).pvalue < 1 - 1e-3
    fine = np.bincount((draws * 2**20).astype(int) % 256, minlength=256)  # and in the lower bits
    assert 1e-3 < stats.chisquare(fine).pvalue < 1 - 1e-3


def test_every_bit_of_a_key_is_fair() -> None:
    keys = keys_of(50_000, seed=11)
    ones = ((keys[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).sum(0)
    assert stats.binomtest(int(ones.min()), 50_000).pvalue > 1e-4
    assert stats.binomtest(int(ones.max()), 50_000).pvalue > 1e-4


def neighbours() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    count = 100_000
    draws = seeding.uniform(keys_of(count + 1), 5)
    return {
        "rows": (draws[:-1], draws[1:]),
        "epochs": (draws[:-1], seeding.uniform(keys_of(count, epoch=1), 5)),
        "seeds": (draws[:-1], seeding.uniform(keys_of(count, seed=1), 5)),
        "streams": (draws[:-1], seeding.uniform(keys_of(count), 6)),
    }


@pytest.mark.parametrize("pair", ["rows", "epochs", "seeds", "streams"])
def test_independent(pair: str) -> None:
    first, second = neighbours()[pair]
    table = np.histogram2d(first, second, bins=20, range=[[0, 1], [0, 1]])[0]
    assert 1e-3 < stats.chisquare(table.ravel()).pvalue < 1 - 1e-3
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(len(first))


def test_generator_depends_on_every_value_and_their_order() -> None:
    draws = [seeding.generator(*values).random() for values in [(1, 2), (1, 2), (2, 1), (1, 2, 3), (1, 3)]]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


def test_seed_all_seeds_three_libraries() -> None:
    def draw(*values: int) -> tuple[float, float, float]:
        seeding.seed_all(*values)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert all(a != b for a, b in zip(draw(1, 2, 3), draw(1, 2, 4), strict=True))


@pytest.mark.gpu
def test_gpu_hashes_the_same() -> None:
    keys = as_tensor(keys_of(10_000))
    assert torch.equal(seeding.hash64_tensor(keys.cuda()).cpu(), seeding.hash64_tensor(keys))
