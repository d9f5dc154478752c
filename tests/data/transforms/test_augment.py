"""Augmented batches: a function of (key, pixels) only, with the documented rates and ranges, on any device."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import (
    AugMix,
    InterpolationMode,
    RandAugment,
    RandomErasing,
    TrivialAugmentWide,
)
from torchvision.transforms.autoaugment import _apply_op
from torchvision.transforms.v2 import functional as tv

from fastflower.core import seeding
from fastflower.data.transforms import augment as augment_module
from fastflower.data.transforms import image_ops
from fastflower.data.transforms.augment import (
    AUGMIX_OPERATIONS,
    OPERATIONS,
    Stream,
    augment,
    draw_operation,
    erase_boxes,
    happens,
    uniform_in,
)
from fastflower.recipe.schema import Aug

FILL = (123.675, 116.28, 103.53)
OFF = Aug(vflip_p=0, rotation_deg=0, jitter=[0, 0, 0, 0])
EVERYTHING = Aug(photometric_p=0.5, clahe_p=0.5, randaugment_n=2, augmix_p=0.5, corrupt_p=0.5)


def keys_of(count: int, epoch: int = 0) -> Tensor:
    rows = np.arange(count)
    return torch.from_numpy(seeding.row_keys(5, epoch, positions=rows, rows=rows).view(np.int64))


def pictures(count: int, height: int = 40, width: int = 48) -> Tensor:
    """Uint8 (count, height, width, 3), smooth with some noise."""
    generator = torch.Generator().manual_seed(2)
    waves = torch.rand(count, 3, 5, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(waves, (height, width), mode="bilinear") * 220
    smooth += 30 * torch.rand(smooth.shape, generator=generator)
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def changed(**keys: object) -> Aug:
    return dataclasses.replace(OFF, **keys)


def floats(images: Tensor) -> Tensor:
    """Float (B, 3, H, W) of uint8 images."""
    return images.permute(0, 3, 1, 2).float()


@pytest.mark.parametrize(
    "aug", [Aug(), EVERYTHING, OFF, Aug(strength=0)], ids=["default", "everything", "off", "zero"]
)
def test_shape_type_format_and_range(aug: Aug) -> None:
    images = pictures(9)
    before = images.clone()
    out = augment(images, keys_of(9), aug=aug, erase_p=0.5, fill=FILL)
    assert out.shape == (9, 3, 40, 48) and out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert out.min() >= 0 and out.max() <= 255
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "aug", [dataclasses.replace(EVERYTHING, strength=0), OFF], ids=["strength 0", "all off"]
)
def test_without_augmentation_only_the_dtype_changes(aug: Aug) -> None:
    images = pictures(6)
    erase_p = 1.0 if aug.strength == 0 else 0.0
    assert torch.equal(augment(images, keys_of(6), aug=aug, erase_p=erase_p, fill=FILL), floats(images))


def test_a_shift_is_a_random_crop_of_the_padded_image() -> None:
    images, keys = pictures(400, 20, 40), keys_of(400)
    out = augment(images, keys, aug=changed(translate=[0.1, 0.1]), erase_p=0, fill=FILL)
    padded = np.pad(images.numpy(), ((0, 0), (2, 2), (4, 4), (0, 0)), mode="symmetric")
    offsets = set()
    for got, image in zip(out.permute(0, 2, 3, 1).numpy(), padded, strict=True):
        crops = {
            (y, x): np.abs(image[y : y + 20, x : x + 40] - got).max() for y in range(5) for x in range(9)
        }
        nearest = min(crops, key=lambda offset: crops[offset])
        assert crops[nearest] < 0.01
        offsets.add(nearest)
    assert len(offsets) == 45  # every shift of whole pixels


@pytest.mark.parametrize("aug", [Aug(), EVERYTHING], ids=["default", "everything"])
def test_a_row_does_not_depend_on_its_batch(aug: Aug, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: in one batch, row by row, permuted, every other row, and in chunks of another size."""
    images, keys = pictures(24), keys_of(24)
    batch = augment(images, keys, aug=aug, erase_p=0.3, fill=FILL)
    singles = [
        augment(images[i : i + 1], keys[i : i + 1], aug=aug, erase_p=0.3, fill=FILL) for i in range(24)
    ]
    assert torch.equal(torch.cat(singles), batch)
    order = torch.randperm(24)
    assert torch.equal(augment(images[order], keys[order], aug=aug, erase_p=0.3, fill=FILL), batch[order])
    assert torch.equal(augment(images[1::2], keys[1::2], aug=aug, erase_p=0.3, fill=FILL), batch[1::2])
    monkeypatch.setattr(augment_module, "CHUNK", 5 * 40 * 48)
    assert torch.equal(augment(images, keys, aug=aug, erase_p=0.3, fill=FILL), batch)


def test_epochs_differ_and_repeat() -> None:
    images = pictures(4)
    first, repeated = (augment(images, keys_of(4), aug=EVERYTHING, erase_p=0.1, fill=FILL) for _ in range(2))
    assert torch.equal(first, repeated)
    second = augment(images, keys_of(4, epoch=1), aug=EVERYTHING, erase_p=0.1, fill=FILL)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_global_random_state_is_neither_read_nor_moved() -> None:
    images, keys = pictures(4), keys_of(4)
    state = torch.get_rng_state()
    first = augment(images, keys, aug=EVERYTHING, erase_p=0.5, fill=FILL)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(augment(images, keys, aug=EVERYTHING, erase_p=0.5, fill=FILL), first)


@pytest.mark.parametrize(("strength", "rate"), [(1.0, 0.1), (2.0, 0.2), (0.5, 0.05)])
def test_vertical_flip_rate(strength: float, rate: float) -> None:
    images = torch.zeros(10_000, 2, 1, 3, dtype=torch.uint8)
    images[:, 0] = 200
    flipped = (
        augment(images, keys_of(10_000), aug=changed(vflip_p=0.1, strength=strength), erase_p=0, fill=FILL)[
            :, 0, 0, 0
        ]
        == 0
    )
    assert abs(float(flipped.float().mean()) - rate) < 0.01


@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_a_probability_above_one_counts_as_one(strength: float) -> None:
    assert happens(keys_of(1000), Stream.VFLIP, 0.8 * 2).all()
    out = augment(pictures(50), keys_of(50), aug=changed(vflip_p=1, strength=strength), erase_p=0, fill=FILL)
    assert torch.equal(out, floats(pictures(50)).flip(2))


def test_angles_are_uniform() -> None:
    angles = uniform_in(keys_of(10_000), Stream.ANGLE, (-10, 10)).numpy()
    assert stats.kstest(angles, stats.uniform(-10, 20).cdf).pvalue > 1e-3
    assert angles.min() >= -10 and angles.max() <= 10


def test_rotation_turns_each_row_by_its_own_angle() -> None:
    images, keys = pictures(8, 64, 64), keys_of(8)
    out = augment(images, keys, aug=changed(rotation_deg=10.0), erase_p=0, fill=FILL)
    for row, angle in enumerate(uniform_in(keys, Stream.ANGLE, (-10, 10)).tolist()):
        expected = tv.rotate(floats(images)[row], angle, InterpolationMode.BILINEAR)
        torch.testing.assert_close(out[row, :, 12:-12, 12:-12], expected[:, 12:-12, 12:-12], atol=0.1, rtol=0)
    constant = torch.full((8, 64, 64, 3), 77, dtype=torch.uint8)
    filled = augment(constant, keys, aug=changed(rotation_deg=10.0), erase_p=0, fill=FILL)
    torch.testing.assert_close(filled, torch.full_like(filled, 77), atol=1e-3, rtol=0)  # corners included


def test_jitter_equals_torchvision_in_the_fixed_order() -> None:
    images, keys = pictures(8), keys_of(8)
    out = augment(images, keys, aug=changed(jitter=[0.2, 0.3, 0.4, 0.1]), erase_p=0, fill=FILL)
    draws = [
        uniform_in(keys, stream, (1 - strength, 1 + strength)).tolist()
        for stream, strength in [(Stream.BRIGHTNESS, 0.2), (Stream.CONTRAST, 0.3), (Stream.SATURATION, 0.4)]
    ]
    shifts = uniform_in(keys, Stream.HUE, (-0.1, 0.1)).tolist()
    for row, (b, c, s, h) in enumerate(zip(*draws, shifts, strict=True)):
        picture = floats(images)[row] / 255
        picture = tv.adjust_contrast(tv.adjust_brightness(picture, b), c)
        picture = tv.adjust_hue(tv.adjust_saturation(picture, s), h)
        torch.testing.assert_close(out[row], picture * 255, atol=0.1, rtol=0)


def test_jitter_factors_span_their_range() -> None:
    grey = torch.full((10_000, 1, 1, 3), 100, dtype=torch.uint8)
    levels = augment(grey, keys_of(10_000), aug=changed(jitter=[0.2, 0, 0, 0]), erase_p=0, fill=FILL)[
        :, 0, 0, 0
    ].numpy()
    assert stats.kstest(levels, stats.uniform(80, 40).cdf).pvalue > 1e-3
    strong = augment(
        grey, keys_of(10_000), aug=changed(jitter=[0.8, 0, 0, 0], strength=2), erase_p=0, fill=FILL
    )[:, 0, 0, 0]
    assert 0 <= strong.min() < 1 and strong.max() > 254  # a factor is never below 0


def test_hue_shifts_a_saturated_patch() -> None:
    red = torch.tensor([220, 30, 30], dtype=torch.uint8).expand(100, 4, 4, 3).contiguous()
    out = augment(red, keys_of(100), aug=changed(jitter=[0, 0, 0, 0.1]), erase_p=0, fill=FILL)[:, :, 0, 0]
    assert torch.allclose(out.amax(1), torch.full((100,), 220.0), atol=1e-3)
    assert (out[:, 1:] - 30).abs().amax(1).gt(5).float().mean() > 0.8


def test_draws_of_different_streams_are_independent() -> None:
    keys = keys_of(10_000)
    draws = np.stack([seeding.uniform_tensor(keys, stream).numpy() for stream in Stream])
    assert np.abs(np.corrcoef(draws) - np.eye(len(Stream))).max() < 0.05


def test_erasing_rate_shape_and_colour() -> None:
    keys = keys_of(10_000)
    boxes = erase_boxes(keys, 0.1, (100, 120))
    assert abs(float((boxes[:, 2] > 0).float().mean()) - 0.1) < 0.01
    top, left, height, width = erase_boxes(keys, 1.0, (100, 120)).unbind(1)
    assert (height > 0).all() and (height < 100).all() and (width < 120).all()
    assert (
        (top >= 0).all() and (left >= 0).all() and (top + height <= 100).all() and (left + width <= 120).all()
    )
    images = torch.zeros(200, 30, 30, 3, dtype=torch.uint8)
    mean, std = torch.tensor(FILL) / 255, torch.tensor([0.229, 0.224, 0.225])
    out = augment(images, keys[:200], aug=OFF, erase_p=1.0, fill=FILL)
    normalised = (out / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert normalised[out > 0].abs().max() < 1e-6
    assert torch.equal((out > 0).all(1), (out > 0).any(1))


def test_erasing_draws_as_torchvision_does() -> None:
    """Area, aspect and position of the boxes against 3000 of RandomErasing, on a square and a wide image."""
    for height, width in [(96, 96), (48, 96)]:
        torch.manual_seed(1)
        image = torch.empty(3, height, width)
        want = np.array(
            [RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(3000)], float
        )
        got = erase_boxes(keys_of(3000), 1.0, (height, width)).numpy()
        for value in (
            lambda b: b[:, 2] * b[:, 3],
            lambda b: b[:, 2] / b[:, 3],
            lambda b: b[:, 0],
            lambda b: b[:, 1],
        ):
            assert stats.ks_2samp(value(want), value(got)).pvalue > 1e-3


def test_randaugment_draws_every_operation_alike() -> None:
    keys = keys_of(14_000)
    chosen, sign = draw_operation(keys, 0, count=14, probability=1.0)
    assert stats.chisquare(np.bincount(chosen, minlength=14)).pvalue > 1e-3
    assert set(sign.tolist()) == {-1.0, 1.0} and abs(float(sign.mean())) < 0.03
    second, _ = draw_operation(keys, 1, count=14, probability=1.0)
    table = np.histogram2d(chosen, second, bins=14)[0]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    halved, _ = draw_operation(keys, 0, count=14, probability=0.5)
    assert abs(float((halved == 0).float().mean()) - (0.5 + 0.5 / 14)) < 0.02


def test_randaugment_has_torchvisions_operations() -> None:
    def names(space: dict) -> set[str]:
        return {name.lower() for name in space}

    got = {name.replace("_", "") for name in OPERATIONS}
    assert got == names(RandAugment()._augmentation_space(31, (40, 48)))
    assert {name.replace("_", "") for name in AUGMIX_OPERATIONS[1:]} == names(
        AugMix(all_ops=False)._augmentation_space(10, (40, 48))
    )


def torchvisions(title: str, picture: Tensor, size: float) -> Tensor:
    """One of RandAugment's operations on a float image (3, H, W), 0..255; black beyond the border."""
    if title.startswith("Shear"):  # torchvision's RandAugment shears about the corner
        shear = math.degrees(math.atan(size))
        angles = [shear, 0.0] if title == "ShearX" else [0.0, shear]
        return tv.affine(picture, 0.0, [0, 0], 1.0, angles, InterpolationMode.BILINEAR)
    if title in ("Posterize", "Equalize", "Solarize"):
        return _apply_op(picture.byte(), title, size, InterpolationMode.BILINEAR, None).float()
    return 255 * _apply_op(picture / 255, title, size, InterpolationMode.BILINEAR, None)


@pytest.mark.parametrize("magnitude", [9, 30])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "identity"])
def test_randaugment_magnitudes_are_torchvisions(name: str, magnitude: int) -> None:
    title = "AutoContrast" if name == "autocontrast" else name.title().replace("_", "")
    magnitudes, signed = RandAugment()._augmentation_space(31, (40, 48))[title]
    size = float(magnitudes[magnitude]) if magnitudes.ndim else 0.0
    picture = floats(pictures(1))
    for sign in (-1.0, 1.0) if signed else (1.0,):
        got = OPERATIONS[name](picture.clone(), torch.tensor([magnitude / 30]), torch.tensor([sign]))[0]
        want = torchvisions(title, picture[0], size * sign)
        inside = torch.ones(40, 48, dtype=torch.bool)
        if title.startswith(("Shear", "Translate", "Rotate")):
            inside = torchvisions(title, torch.full((3, 40, 48), 255.0), size * sign)[0] > 254.9
        assert inside.float().mean() > 0.5
        torch.testing.assert_close(got[:, inside], want[:, inside], atol=0.1, rtol=0)


@pytest.mark.parametrize("level", [7, 30])
def test_trivialaugments_magnitudes_are_torchvisions(level: int) -> None:
    """The strength of each operation on torchvision's wide scale; its shifts are 32 pixels at any size."""
    space = TrivialAugmentWide()._augmentation_space(31)
    reach = {
        "shear_x": 0.3, "shear_y": 0.3, "translate_x": 150 / 331 * 224, "translate_y": 150 / 331 * 224,
        "rotate": 30, "brightness": 0.9, "color": 0.9, "contrast": 0.9, "sharpness": 0.9,
    }  # fmt: skip
    for name, largest in reach.items():
        magnitudes, _ = space[name.title().replace("_", "")]
        assert level / 30 * augment_module.WIDE[name] * largest == pytest.approx(
            float(magnitudes[level]), rel=1e-5
        )
    bits = torch.tensor(level / 30 * augment_module.WIDE["posterize"])
    assert int(8 - (4 * bits).round()) == int(space["Posterize"][0][level])


def test_trivialaugment_draws_one_operation_of_any_strength() -> None:
    images, keys = pictures(400), keys_of(400)
    seen: dict[str, list[Tensor]] = {}

    def spy(name: str) -> augment_module.Operation:
        def operation(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            seen.setdefault(name, []).append(t)
            return x

        return operation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment_module, "OPERATIONS", {name: spy(name) for name in augment_module.OPERATIONS})
        augment(images, keys, aug=changed(trivial_p=1.0), erase_p=0, fill=FILL)
    assert set(seen) == set(augment_module.OPERATIONS) - {"identity"}
    drawn = {name: torch.cat(values) / augment_module.WIDE.get(name, 1.0) for name, values in seen.items()}
    assert 330 < sum(map(len, drawn.values())) < 400  # one of 14 is the identity
    levels = torch.cat(list(drawn.values())) * 30
    assert torch.allclose(levels, levels.round(), atol=1e-3) and (levels.min(), levels.max()) == (0, 30)
    assert 13 < levels.mean() < 17
    out = augment(images, keys, aug=changed(trivial_p=1.0), erase_p=0, fill=FILL)
    plain = augment(images, keys, aug=changed(), erase_p=0, fill=FILL)
    assert out.min() >= 0 and out.max() <= 255
    assert 300 < int((out != plain).flatten(1).any(1).sum()) < 400
    half = augment(images, keys, aug=changed(trivial_p=0.5), erase_p=0, fill=FILL)
    assert 130 < int((half != plain).flatten(1).any(1).sum()) < 230


def test_randaugment_applies_n_operations() -> None:
    """n = 1 on a batch equals the operation of each row, applied to that row alone."""
    images, keys = pictures(40), keys_of(40)
    out = augment(images, keys, aug=changed(randaugment_n=1, randaugment_m=9), erase_p=0, fill=FILL)
    chosen, sign = draw_operation(keys, 0, count=14, probability=1.0)
    for row in range(40):
        operation = list(OPERATIONS.values())[int(chosen[row])]
        expected = operation(floats(images[row : row + 1]), torch.tensor([9 / 30]), sign[row : row + 1])
        assert torch.equal(out[row], expected[0])
    assert len(chosen.unique()) > 10


@pytest.mark.parametrize("key", ["augmix_p", "corrupt_p", "clahe_p"])
def test_fraction_of_changed_rows(key: str) -> None:
    images = pictures(1, 8, 8).expand(3000, -1, -1, -1)
    out = augment(images, keys_of(3000), aug=changed(**{key: 0.3}, clahe_tiles=2), erase_p=0, fill=FILL)
    touched = (out != floats(images)).flatten(1).any(1).float().mean()
    assert abs(float(touched) - 0.3) < 0.03


def test_augmix_and_corruption_are_light() -> None:
    images = pictures(100)
    for aug in (changed(augmix_p=1.0), changed(corrupt_p=1.0)):
        out = augment(images, keys_of(100), aug=aug, erase_p=0, fill=FILL)
        difference = (out - floats(images)).abs().mean((1, 2, 3))
        assert 0.3 < float(difference.median()) < 25


def test_photometric_distortion() -> None:
    count = 5000
    images = torch.tensor([200, 120, 60], dtype=torch.uint8).expand(count, 2, 2, 3).contiguous()
    out = augment(images, keys_of(count), aug=changed(photometric_p=0.5), erase_p=0, fill=FILL)[:, :, 0, 0]
    untouched = ((out - torch.tensor([200.0, 120, 60])).abs() < 1e-2).all(1).float().mean()
    # contrast changes a constant image a little; a permutation keeps the order in one of six cases
    assert abs(float(untouched) - 0.5**4 * (0.5 + 0.5 / 6)) < 0.01
    swapped = (out.argmax(1) != 0).float().mean()
    assert abs(float(swapped) - 0.5 * 2 / 3) < 0.03
    everything = augment(pictures(20), keys_of(20), aug=changed(photometric_p=1.0), erase_p=0, fill=FILL)
    assert everything.min() >= 0 and everything.max() <= 255


def test_strength_scales_linearly() -> None:
    images, keys = pictures(6, 64, 64), keys_of(6)
    doubled = augment(images, keys, aug=changed(rotation_deg=5, strength=2.0), erase_p=0, fill=FILL)
    assert torch.equal(doubled, augment(images, keys, aug=changed(rotation_deg=10), erase_p=0, fill=FILL))
    halved = augment(
        images, keys, aug=changed(jitter=[0.4, 0.4, 0.4, 0.2], strength=0.5), erase_p=0, fill=FILL
    )
    torch.testing.assert_close(
        halved, augment(images, keys, aug=changed(jitter=[0.2, 0.2, 0.2, 0.1]), erase_p=0, fill=FILL)
    )


class Launches(TorchDispatchMode):
    """Counts operations on meta tensors that would launch a kernel, and copies from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.copies = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (list, tuple)) else [result]
        on_device = any(isinstance(output, Tensor) and output.is_meta for output in outputs)
        if on_device and not (function.is_view or "split" in str(function) or "empty" in str(function)):
            from_host = "_to_copy" in str(function) and not args[0].is_meta
            self.copies += from_host
            self.kernels += not from_host
        return result


def test_the_default_augmentation_launches_few_kernels() -> None:
    images, fill = (
        torch.empty(64, 224, 224, 3, dtype=torch.uint8, device="meta"),
        torch.empty(3, device="meta"),
    )
    with Launches() as count:
        augment(images, keys_of(64), aug=Aug(), erase_p=0.1, fill=fill)
    assert count.kernels < 60 and count.copies < 10


def test_no_operation_waits_for_the_device() -> None:
    """Meta tensors have no values: reading one on the host, as `item` and `nonzero` do, raises."""
    images = torch.empty(64, 32, 32, 3, dtype=torch.uint8, device="meta")
    out = augment(images, keys_of(64), aug=EVERYTHING, erase_p=0.5, fill=FILL)
    assert out.is_meta and out.shape == (64, 3, 32, 32)


def test_constants_are_made_once() -> None:
    assert image_ops.constant(FILL, torch.device("cpu")) is image_ops.constant(FILL, torch.device("cpu"))


@pytest.mark.gpu
def test_gpu_equals_cpu_within_rounding() -> None:
    images, keys = pictures(64), keys_of(64)
    default = augment(images.cuda(), keys, aug=Aug(), erase_p=0.3, fill=FILL)
    assert default.is_cuda and default.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        default.cpu(), augment(images, keys, aug=Aug(), erase_p=0.3, fill=FILL), atol=0.02, rtol=0
    )
    everything = augment(images.cuda(), keys, aug=EVERYTHING, erase_p=0.3, fill=FILL).cpu()
    difference = (everything - augment(images, keys, aug=EVERYTHING, erase_p=0.3, fill=FILL)).abs()
    assert (
        difference > 0.5
    ).float().mean() < 0.01  # a rounding may cross a threshold of posterize or solarize
