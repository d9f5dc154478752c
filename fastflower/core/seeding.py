"""Counter-based random numbers: every draw is a pure function of (seed, epoch, position, row, stream).

No state is kept, so workers, ranks and resumed runs meet the same numbers. The mixing function is
SplitMix64's finalizer (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014).
The same arithmetic exists three times, for NumPy, for torch (any device) and in data/decode.c;
tests hold them equal to the bit.
"""

from __future__ import annotations

import random

import numpy as np
import torch

GOLDEN = 0x9E3779B97F4A7C15
M1 = 0xBF58476D1CE4E5B9
M2 = 0x94D049BB133111EB
MASK = (1 << 64) - 1


def mix(x: np.ndarray | np.uint64 | int) -> np.ndarray:
    """SplitMix64 of uint64 values, elementwise."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, dtype=np.uint64) + np.uint64(GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(M1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(M2)
        return z ^ (z >> np.uint64(31))


def row_keys(seed: int, epoch: int, *, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One uint64 key per draw of an epoch; a row drawn twice sits at two positions and gets two keys."""
    base = mix(mix(np.uint64(seed & MASK)) ^ np.uint64(epoch))
    return mix(mix(base ^ np.asarray(positions, dtype=np.uint64)) ^ np.asarray(rows, dtype=np.uint64))


def uniform(keys: np.ndarray, stream: int) -> np.ndarray:
    """Float64 in [0, 1) per key; streams are independent of each other."""
    return (mix(keys ^ mix(np.uint64(stream))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(*words: int) -> np.random.Generator:
    """A NumPy generator for whole-epoch draws (orders, samplers), seeded by all the words together.

    The count of words goes first: SeedSequence drops zero words at the end.
    """
    return np.random.default_rng([len(words), *(word & 0xFFFFFFFF for word in words)])


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """`mix` for int64 tensors that hold uint64 bits, on any device."""
    z = x + _signed(GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(M1)
    z = (z ^ _shift(z, 27)) * _signed(M2)
    return z ^ _shift(z, 31)


def uniform_tensor(keys: torch.Tensor, stream: int) -> torch.Tensor:
    """`uniform` for int64 keys on any device, rounded to float32 below 1: shape (B,)."""
    salt = _signed(int(mix(np.uint64(stream))))
    return _shift(mix_tensor(keys ^ salt), 40).to(torch.float32) * 2.0**-24


def seed_all(*words: int) -> None:
    """Seed Python, NumPy and torch (all devices) from the words; used at start and before every step."""
    word = int(np.random.SeedSequence([w & 0xFFFFFFFF for w in words]).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)
    torch.manual_seed(word)
