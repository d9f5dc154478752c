"""Corruptions: kinds, strengths and reproducibility."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from fastflower.core.errors import InputError
from fastflower.data.transforms import corruptions
from fastflower.data.transforms.corruptions import STRENGTHS, corrupt
from fastflower.recipe import derived

KINDS = list(STRENGTHS)


@pytest.fixture
def photo() -> np.ndarray:
    coarse = np.random.default_rng(0).integers(20, 236, (12, 16, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_functions_and_strengths_cover_exactly_the_kinds_of_the_recipe() -> None:
    assert tuple(KINDS) == derived.CORRUPTIONS
    assert set(corruptions.FUNCTIONS) == set(derived.CORRUPTIONS)
    assert all(set(strengths) == {"low", "medium"} for strengths in STRENGTHS.values())
    assert derived.combos(["blur", "jpeg"], "low_medium") == [
        ("blur", "low"),
        ("blur", "medium"),
        ("jpeg", "low"),
        ("jpeg", "medium"),
    ]
    with pytest.raises(InputError, match=r"robust.kinds = \['fog'\]: choose from gaussian_noise, blur"):
        derived.combos(["fog"], "low")


@pytest.mark.parametrize("kind", KINDS)
def test_shape_range_and_strength(photo: np.ndarray, kind: str) -> None:
    low, medium = (
        np.mean([psnr(corrupt(photo, kind, level=level, key=k), photo) for k in range(8)])
        for level in ("low", "medium")
    )
    assert medium < low
    corrupted = corrupt(photo, kind, level="low", key=5)
    assert (corrupted.shape, corrupted.dtype) == (photo.shape, np.uint8)
    assert np.mean(np.any(corrupted != photo, axis=2)) > 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2)])
def test_tiny_pictures_work(kind: str, size: tuple[int, int]) -> None:
    assert corrupt(np.full((*size, 3), 90, np.uint8), kind, level="medium", key=1).shape == (*size, 3)


def test_strengths_are_those_of_the_table(photo: np.ndarray) -> None:
    flat = np.full((400, 400, 3), 128, np.uint8)
    assert corrupt(flat, "gaussian_noise", level="low", key=1).std() == pytest.approx(0.06 * 255, rel=0.01)
    assert corrupt(flat, "gaussian_noise", level="low", key=1).mean() == pytest.approx(128, abs=0.1)
    assert {int(corrupt(flat, "brightness", level="low", key=key)[0, 0, 0]) for key in range(20)} == {96, 160}
    covered = np.any(corrupt(photo, "occlusion", level="medium", key=3) != photo, axis=2)
    assert covered.sum() == pytest.approx(0.2 * 120 * 120, rel=0.05)
    columns = np.flatnonzero(covered.any(0))
    assert 20 <= columns.min() <= columns.max() < 140
    for level, fraction in (("low", 0.006), ("medium", 0.012)):
        sigma = fraction * 120
        want = gaussian_filter(photo.astype(float), (sigma, sigma, 0), mode="nearest", truncate=4)
        assert np.abs(corrupt(photo, "blur", level=level, key=1) - want).max() < 1
    with Image.open(io.BytesIO(corruptions.jpeg_bytes(photo, "low"))) as image:
        assert np.array_equal(corrupt(photo, "jpeg", level="low", key=1), np.asarray(image))
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=30, subsampling="4:2:0")
    assert buffer.getvalue() == corruptions.jpeg_bytes(photo, "low")


def test_corruptions_depend_on_the_key_and_repeat_for_the_same_key(photo: np.ndarray) -> None:
    keys = [corruptions.image_key(name) for name in ("a.jpg", "b.jpg")]
    for kind in ("gaussian_noise", "occlusion"):
        first, second = (corrupt(photo, kind, level="low", key=key) for key in keys)
        assert not np.array_equal(first, second)
        assert np.array_equal(first, corrupt(photo, kind, level="low", key=keys[0]))


def test_another_process_gives_the_same_pixels(photo: np.ndarray) -> None:
    program = (
        "import sys, hashlib, numpy as np; from fastflower.data.transforms.corruptions import *;"
        "p = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(120, 160, 3);"
        "copies = [corrupt(p, k, level='low', key=image_key('x')).tobytes() for k in STRENGTHS];"
        "print(hashlib.sha256(b''.join(copies)).hexdigest())"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], input=photo.tobytes(), capture_output=True, check=True
    ).stdout
    corrupted = b"".join(
        corrupt(photo, kind, level="low", key=corruptions.image_key("x")).tobytes() for kind in KINDS
    )
    assert output.decode().strip() == hashlib.sha256(corrupted).hexdigest()
