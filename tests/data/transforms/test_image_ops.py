"""Batched operations against torchvision, SciPy or OpenCV on single images."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from fastflower.data.transforms import image_ops

ROWS, HEIGHT, WIDTH = 12, 40, 56


@pytest.fixture
def pictures() -> Tensor:
    """Uint8 (12, 3, 40, 56): noise, smooth colours, and the corner cases grey, black, white and red."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (5, 3, HEIGHT, WIDTH), generator=generator)
    waves = torch.rand(3, 3, 4, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(waves, (HEIGHT, WIDTH), mode="bicubic").mul(255).clamp(0, 255)
    grey = noise[:1, :1].expand(-1, 3, -1, -1)
    flat = torch.stack([torch.zeros(3), torch.full((3,), 255.0), torch.tensor([255.0, 0, 0])])
    flat = flat.view(3, 3, 1, 1).expand(-1, -1, HEIGHT, WIDTH)
    return torch.cat([noise.float(), smooth, grey.float(), flat]).to(torch.uint8)


def factors(low: float, high: float) -> Tensor:
    return torch.linspace(low, high, ROWS)


def one_by_one(pictures: Tensor, strengths: Tensor, reference: Callable[[Tensor, float], Tensor]) -> Tensor:
    """torchvision on float images 0..1, row by row, in 0..255."""
    rows = [reference(p, float(s)) for p, s in zip(pictures.float() / 255, strengths, strict=True)]
    return torch.stack(rows) * 255


@pytest.mark.parametrize(
    ("operation", "reference", "low", "high", "tolerance"),
    [
        (image_ops.brightness, tv.adjust_brightness, 0, 2, 1e-3),
        (image_ops.contrast, tv.adjust_contrast, 0, 2, 0.04),  # the mean is taken over sixteenths of a level
        (image_ops.saturation, tv.adjust_saturation, 0, 2, 1e-3),
        (image_ops.hue, tv.adjust_hue, -0.5, 0.5, 1e-2),
        (image_ops.sharpness, tv.adjust_sharpness, 0, 2, 1e-3),
    ],
)
def test_blends_and_hue(
    pictures: Tensor, operation: Callable, reference: Callable, low: float, high: float, tolerance: float
) -> None:
    strengths = factors(low, high)
    expected = one_by_one(pictures, strengths, reference)
    torch.testing.assert_close(operation(pictures.float(), strengths), expected, atol=tolerance, rtol=0)


def test_hue_turns_the_colour_wheel() -> None:
    red = torch.tensor([200.0, 20.0, 20.0]).view(1, 3, 1, 1).expand(3, 3, 1, 1).contiguous()
    turned = image_ops.hue(red, torch.tensor([1 / 3, -1 / 3, 0.5]))[:, :, 0, 0]
    expected = torch.tensor([[20.0, 200, 20], [20, 20, 200], [20, 200, 200]])
    torch.testing.assert_close(turned, expected, atol=1e-3, rtol=0)


def test_posterize(pictures: Tensor) -> None:
    bits = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6])
    expected = torch.stack([tv.posterize(p, int(b)) for p, b in zip(pictures, bits, strict=True)])
    assert torch.equal(image_ops.posterize(pictures.float(), bits.float()), expected.float())


def test_solarize(pictures: Tensor) -> None:
    thresholds = factors(0, 255).round()
    expected = torch.stack([tv.solarize(p, float(t)) for p, t in zip(pictures, thresholds, strict=True)])
    assert torch.equal(image_ops.solarize(pictures.float(), thresholds), expected.float())


def test_autocontrast(pictures: Tensor) -> None:
    pictures = (pictures.float() * 0.6 + 20).round().to(torch.uint8)
    expected = one_by_one(pictures, factors(0, 1), lambda p, _: tv.autocontrast(p))
    torch.testing.assert_close(image_ops.autocontrast(pictures.float()), expected, atol=1e-3, rtol=0)


def test_equalize(pictures: Tensor) -> None:
    pictures = (pictures.float() * 0.6 + 20).round().to(torch.uint8)
    expected = torch.stack([tv.equalize(p) for p in pictures])
    assert torch.equal(image_ops.equalize(pictures.float()), expected.float())


def test_rotation_against_torchvision_inside(pictures: Tensor) -> None:
    degrees = factors(-180, 180)
    turned = image_ops.warp(pictures.float(), image_ops.rotation(degrees))
    for row, angle in enumerate(degrees.tolist()):
        expected = tv.rotate(pictures[row].float(), angle, tv.InterpolationMode.BILINEAR)
        inside = tv.rotate(torch.ones(1, HEIGHT, WIDTH), angle, tv.InterpolationMode.BILINEAR)[0] > 0.999
        assert inside.float().mean() > 0.5
        torch.testing.assert_close(turned[row][:, inside], expected[:, inside], atol=0.3, rtol=0)


def test_warp_against_scipy_with_mirrored_border(pictures: Tensor) -> None:
    """Whole images, corners included; SciPy's mode "reflect" repeats the border pixel."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.eye(2, 3) + 0.3 * torch.randn(ROWS, 2, 3, generator=generator)
    matrix[:, :, 2] *= 20
    warped = image_ops.warp(pictures.float(), matrix)
    centre = np.array([(HEIGHT - 1) / 2, (WIDTH - 1) / 2])
    for row in range(ROWS):
        (a, b, shift_x), (c, d, shift_y) = matrix[row].double().numpy()
        turn = np.array([[d, c], [b, a]])  # rows first
        offset = centre + np.array([shift_y, shift_x]) - turn @ centre
        for channel in range(3):
            plane = pictures[row, channel].double().numpy()
            expected = ndimage.affine_transform(plane, turn, offset, order=1, mode="reflect")
            np.testing.assert_allclose(warped[row, channel].numpy(), expected, atol=0.05)


def test_whole_pixels_move_exactly(pictures: Tensor) -> None:
    matrix = torch.eye(2, 3).repeat(ROWS, 1, 1)
    torch.testing.assert_close(image_ops.warp(pictures.float(), matrix), pictures.float(), atol=2e-3, rtol=0)
    matrix[:, 0, 2] = 5
    moved = image_ops.warp(pictures.float(), matrix)
    torch.testing.assert_close(moved[..., :-5], pictures[..., 5:].float(), atol=5e-3, rtol=0)
    torch.testing.assert_close(moved[..., -5:], pictures[..., -5:].flip(-1).float(), atol=5e-3, rtol=0)


def test_blur(pictures: Tensor) -> None:
    sigmas = factors(0.3, 1.2)
    blurred = image_ops.blur(pictures.float(), sigmas)
    for row, sigma in enumerate(sigmas.tolist()):
        expected = tv.gaussian_blur(pictures[row].float(), [7, 7], [sigma, sigma])
        torch.testing.assert_close(blurred[row], expected, atol=2e-3, rtol=0)


def test_noise_is_nearly_normal_and_independent() -> None:
    keys = torch.arange(4) * 7919
    sigmas = torch.tensor([2.0, 5.0, 10.0, 5.0])
    noisy = image_ops.noise(torch.full((4, 3, 100, 100), 128.0), keys, sigmas) - 128
    np.testing.assert_allclose(noisy.std((1, 2, 3)), sigmas, rtol=0.02)
    assert (noisy.mean((1, 2, 3)).abs() < 4 * sigmas / math.sqrt(30_000)).all()
    scaled = noisy.view(4, -1) / sigmas[:, None]
    assert abs(float((scaled.abs() < 1).float().mean()) - 0.6827) < 0.02
    assert np.abs(np.corrcoef(scaled.numpy()) - np.eye(4)).max() < 0.03
    neighbours = np.corrcoef(scaled[0, :-1].numpy(), scaled[0, 1:].numpy())[0, 1]
    assert abs(neighbours) < 0.03
    limits = image_ops.noise(torch.zeros(1, 3, 50, 50), keys[:1], sigmas[:1])
    assert limits.min() == 0 and limits.max() > 0


def test_erase_paints_its_box_only(pictures: Tensor) -> None:
    box = torch.tensor([[3.0, 5, 10, 20], [0, 0, 40, 56], [7, 7, 0, 9]]).repeat(4, 1)
    fill = torch.tensor([123.675, 116.28, 103.53])
    erased = image_ops.erase(pictures.float(), box, fill)
    for row in range(ROWS):
        top, left, height, width = box[row].int().tolist()
        expected = tv.erase(pictures[row].float(), top, left, height, width, fill.view(3, 1, 1))
        assert torch.equal(erased[row], expected)


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (16, 16)])
def test_clahe_equals_opencv_on_the_luminance(size: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    noise = generator.integers(60, 120, (3, *size)) + 40 * np.sin(np.arange(size[1]) / 9)
    levels = noise.clip(0, 255).round()
    clips = [1.0, 2.5, 4.0]
    images = torch.from_numpy(levels).float()[:, None].expand(-1, 3, -1, -1).contiguous()
    result = image_ops.clahe(images, torch.tensor(clips), 8)
    for row, clip in enumerate(clips):
        level = (
            image_ops.grey(torch.from_numpy(levels).float()[row].expand(1, 3, *size))
            .round()[0, 0]
            .byte()
            .numpy()
        )
        expected = cv2.createCLAHE(clip, (8, 8)).apply(level)
        change = expected.astype(float) - level
        clamped = (expected == 0) | (expected == 255)
        assert (
            np.abs(result[row, 0].numpy() - levels[row] - change)[~clamped].max() <= 1
        )  # OpenCV rounds the result


def test_clahe_raises_local_contrast_and_keeps_colour_differences() -> None:
    ramp = torch.linspace(100, 130, 64).expand(1, 1, 64, 64)
    image = torch.cat([ramp + 20, ramp, ramp - 20], 1)
    result = image_ops.clahe(image.clone(), torch.tensor([4.0]), 8)
    local = result[0, 1, 32].diff().mean() / ramp[0, 0, 32].diff().mean()
    assert local > 1.3
    torch.testing.assert_close(result[:, 0] - result[:, 1], torch.full((1, 64, 64), 20.0))


def test_flip_rows(pictures: Tensor) -> None:
    images = pictures.permute(0, 2, 3, 1).contiguous()
    chosen = torch.arange(ROWS) % 3 == 0
    flipped = image_ops.flip_rows(images, chosen)
    for row in range(ROWS):
        expected = tv.vertical_flip(pictures[row]) if chosen[row] else pictures[row]
        assert torch.equal(flipped[row].permute(2, 0, 1), expected)


def test_shuffle_draws_all_orders_alike() -> None:
    draws = (torch.arange(600) + 0.5) / 600
    channels = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).expand(600, 3, 1, 1)
    orders, counts = image_ops.shuffle(channels, draws)[:, :, 0, 0].unique(dim=0, return_counts=True)
    assert len(orders) == 6 and counts.tolist() == [100] * 6
    assert image_ops.shuffle(channels[:1], torch.zeros(1))[0, :, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "name", ["brightness", "contrast", "saturation", "hue", "sharpness", "autocontrast", "equalize"]
)
def test_any_memory_format(pictures: Tensor, name: str) -> None:
    strengths = {"hue": (factors(-0.1, 0.1),), "autocontrast": (), "equalize": ()}.get(
        name, (factors(0.5, 1.5),)
    )
    planar = getattr(image_ops, name)(pictures.float(), *strengths)
    channels_last = getattr(image_ops, name)(
        pictures.float().contiguous(memory_format=torch.channels_last), *strengths
    )
    assert torch.equal(planar, channels_last)
