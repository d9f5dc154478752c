"""Counter-based random numbers: every draw is a pure function of (seed, epoch, position, row, stream).

There is no state, so workers, ranks and resumed runs draw the same numbers. The hash is SplitMix64 (Steele, Lea,
Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014). It is implemented for NumPy, for torch on any
device, and in data/decode/decode.c; tests require equal bits. Numbers per row are drawn on the host: a GPU would
launch ten kernels for each; only noise, a number per pixel, is drawn on the device.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

GOLDEN = 0x9E3779B97F4A7C15
M1 = 0xBF58476D1CE4E5B9
M2 = 0x94D049BB133111EB
MASK = (1 << 64) - 1


def hash64(x: np.ndarray | np.uint64 | int) -> np.ndarray:
    """The SplitMix64 hash of uint64 values, elementwise."""
    with np.errstate(over="ignore"):
        z = np.asarray(x, dtype=np.uint64) + np.uint64(GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(M1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(M2)
        return z ^ (z >> np.uint64(31))


def row_keys(seed: int, epoch: int, *, positions: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """One uint64 key per draw of an epoch; a row drawn at two positions gets two keys."""
    base = hash64(hash64(np.uint64(seed & MASK)) ^ np.uint64(epoch))
    return hash64(hash64(base ^ np.asarray(positions, dtype=np.uint64)) ^ np.asarray(rows, dtype=np.uint64))


def uniform(keys: np.ndarray, stream: int) -> np.ndarray:
    """One float64 in [0, 1) per key; different streams are independent."""
    return (hash64(keys ^ hash64(np.uint64(stream))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(*values: int) -> np.random.Generator:
    """A NumPy generator for draws of a whole epoch (orders, samplers), seeded by the values and their number.

    The number is included because SeedSequence ignores zeros at the end.
    """
    return np.random.default_rng([len(values), *(value & 0xFFFFFFFF for value in values)])


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64; torch's `>>` keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of a uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


def hash64_tensor(x: torch.Tensor) -> torch.Tensor:
    """`hash64` for int64 tensors that hold uint64 bits, on any device."""
    z = x + _signed(GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(M1)
    z = (z ^ _shift(z, 27)) * _signed(M2)
    return z ^ _shift(z, 31)


def uniform_tensor(keys: torch.Tensor, stream: int) -> torch.Tensor:
    """`uniform` for int64 keys on the host, of any shape: float32, rounded down so that it stays below 1."""
    import torch  # see seed_all

    bits = hash64(keys.numpy().view(np.uint64) ^ hash64(np.uint64(stream))) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(2.0**-24))


def seed_all(*values: int) -> None:
    """Seed Python, NumPy and torch (all devices) from the values; called at the start and before every step."""
    import torch  # two seconds, which commands that draw or check without tensors do not spend

    seed = int(np.random.SeedSequence([value & 0xFFFFFFFF for value in values]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
