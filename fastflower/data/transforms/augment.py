"""Device augmentation: uint8 batches to float batches, each row with its own key.

Every random draw is a function of (key, stream), so a row looks the same in any batch, on any rank, after a resume
and on any device (up to float rounding). All decisions are taken on the host, which therefore never waits for the
device: the default recipe takes about 60 kernel launches a batch where draws on the device took 350.

The order: vertical flip, rotation and shift, colour jitter (brightness, contrast, saturation, hue, in this order, where
torchvision shuffles), photometric distortion, CLAHE, RandAugment, TrivialAugment, AugMix, blur or noise, aug.extra,
erasing. Geometric operations sample bilinearly and mirror at the border. The decoder does crop and horizontal flip.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastflower.core import own_parts, seeding
from fastflower.data.transforms import image_ops
from fastflower.recipe.schema import Aug

CHUNK = 1 << 18  # pixels per step on a CPU: 3 MiB of floats stay in its cache, four times faster
LEVELS = 30  # RandAugment's magnitudes
ERASE_TRIES = 10
ERASE_AREA = (0.02, 0.33)
ERASE_LOG_RATIO = (math.log(0.3), math.log(3.3))
AUGMIX_WIDTH, AUGMIX_DEPTH, AUGMIX_STRENGTH = 3, 3, 0.3
BLUR_SIGMA = (0.3, 1.2)  # pixels
NOISE_SIGMA = (2.0, 10.0)  # of 255


class Stream(enum.IntEnum):
    """One stream of random numbers per decision; changing a value changes every augmented image."""

    VFLIP = 100
    ANGLE = 101
    BRIGHTNESS = 102
    CONTRAST = 103
    SATURATION = 104
    HUE = 105
    ERASE = 106
    ERASE_SIZE = 107
    ERASE_SHAPE = 108
    ERASE_TOP = 109
    ERASE_LEFT = 110
    CORRUPT = 111
    CORRUPT_KIND = 112
    CORRUPT_LEVEL = 113
    AUGMIX = 114
    AUGMIX_BLEND = 115
    AUGMIX_WEIGHT = 116
    AUGMIX_LENGTH = 117
    CLAHE = 118
    CLAHE_CLIP = 119
    SHIFT_ACROSS = 120
    SHIFT_DOWN = 121
    DISTORT = 150  # and the next ten: probability and strength of each step
    OPERATION = 2000  # + 4 * step; the next three: sign, probability, strength


def augment(
    images: Tensor,
    keys: Tensor,
    *,
    aug: Aug,
    erase_p: float,
    fill: Sequence[float] | Tensor,
    pairs: bool = False,
) -> Tensor:
    """Uint8 images (B, H, W, 3) and int64 keys (B,) on the host to float32 (B, 3, H, W), channels last, 0..255.

    `fill` (3,), in 0..255 and if a tensor on the same device, is the colour of erased boxes: the network's mean, 0
    after normalisation. `aug.strength` multiplies strengths and probabilities; at 0 only the dtype changes. With
    `pairs`, two images lie side by side (B, H, 2W, 3) and are augmented with different keys.
    """
    if pairs:
        halves = images.unflatten(2, (2, images.shape[2] // 2)).transpose(1, 2).flatten(0, 1)  # (2B, H, W, 3)
        half_keys = torch.stack([keys, seeding.hash64_tensor(keys)], 1).flatten()
        return torch.cat(
            augment(halves, half_keys, aug=aug, erase_p=erase_p, fill=fill)
            .unflatten(0, (len(keys), 2))
            .unbind(1),
            3,
        )
    batch, height, width, _ = images.shape
    if aug.strength == 0:
        return images.permute(0, 3, 1, 2).to(torch.float32)
    if not isinstance(fill, Tensor):
        fill = image_ops.constant(tuple(fill), images.device)
    out = torch.empty(images.shape, dtype=torch.float32, device=images.device).permute(0, 3, 1, 2)
    rows = max(1, CHUNK // (height * width)) if images.device.type == "cpu" else batch
    for chunk in (slice(start, start + rows) for start in range(0, batch, rows)):
        out[chunk] = _augment(images[chunk], keys[chunk], aug=aug, erase_p=erase_p, fill=fill)
    return out


def _augment(images: Tensor, keys: Tensor, *, aug: Aug, erase_p: float, fill: Tensor) -> Tensor:
    x = _flip_and_move(images, keys, aug)
    x = _jitter(x, keys, aug)
    if aug.photometric_p:
        x = _distort(x, keys, aug)
    if aug.clahe_p:
        x = _for_some(
            x, keys, chosen=happens(keys, Stream.CLAHE, aug.clahe_p * aug.strength), change=_clahe, aug=aug
        )
    for step in range(aug.randaugment_n):
        chosen, sign = draw_operation(keys, step, count=len(OPERATIONS), probability=aug.strength)
        level = min(1.0, aug.randaugment_m / LEVELS * aug.strength)
        x = _apply(x, chosen, strength=torch.full_like(sign, level), sign=sign, names=tuple(OPERATIONS))
    if aug.trivial_p:
        x = _trivial(x, keys, aug)
    if aug.augmix_p:
        x = _for_some(
            x, keys, chosen=happens(keys, Stream.AUGMIX, aug.augmix_p * aug.strength), change=_augmix, aug=aug
        )
    if aug.corrupt_p:
        x = _for_some(
            x,
            keys,
            chosen=happens(keys, Stream.CORRUPT, aug.corrupt_p * aug.strength),
            change=_corrupt,
            aug=aug,
        )
    for name in aug.extra:
        x = _own(x, keys, name)
    if erase_p:
        x = image_ops.erase(x, erase_boxes(keys, erase_p * aug.strength, x.shape[2:]), fill)
    return x


def _own(x: Tensor, keys: Tensor, name: str) -> Tensor:
    """The images after a transform of the user's own; InputError unless it keeps their shape and type."""
    changed = own_parts.call("aug.extra", name, x, keys)
    if not isinstance(changed, Tensor) or (changed.shape, changed.dtype) != (x.shape, x.dtype):
        got = (
            f"{changed.dtype} {tuple(changed.shape)}"
            if isinstance(changed, Tensor)
            else type(changed).__name__
        )
        raise own_parts.fault(
            "aug.extra", name, f"gives {got} for {x.dtype} {tuple(x.shape)}, must keep both"
        )
    return changed


def happens(keys: Tensor, stream: int, probability: float) -> Tensor:
    """Bool (B,), true with this probability; above 1 it counts as 1."""
    return seeding.uniform_tensor(keys, stream) < probability


def uniform_in(keys: Tensor, stream: int, interval: tuple[float, float]) -> Tensor:
    """Float32 (B,), uniform in the interval [low, high]."""
    low, high = interval
    return low + (high - low) * seeding.uniform_tensor(keys, stream)


def subkeys(keys: Tensor, count: int) -> Tensor:
    """Independent keys (B, count), `count` for each key."""
    return seeding.hash64_tensor(keys)[:, None] ^ torch.arange(count)


def _flip_and_move(images: Tensor, keys: Tensor, aug: Aug) -> Tensor:
    """Uint8 (B, H, W, 3) to flipped, rotated and shifted planar float32 (B, 3, H, W)."""
    if aug.vflip_p:
        images = image_ops.flip_rows(images, happens(keys, Stream.VFLIP, aug.vflip_p * aug.strength))
    x = images.permute(0, 3, 1, 2)
    limit = min(180.0, aug.rotation_deg * aug.strength)
    reach = [
        round(share * aug.strength * side)
        for share, side in zip(aug.translate, (x.shape[3], x.shape[2]), strict=True)
    ]
    if limit or any(reach):
        matrix = image_ops.rotation(uniform_in(keys, Stream.ANGLE, (-limit, limit)))
        for axis, stream in enumerate((Stream.SHIFT_ACROSS, Stream.SHIFT_DOWN)):
            if reach[axis]:  # whole pixels, each as likely
                matrix[:, axis, 2] = (seeding.uniform_tensor(keys, stream) * (2 * reach[axis] + 1)).floor()
                matrix[:, axis, 2] -= reach[axis]
        return image_ops.warp(x.float(), matrix)
    return x.to(torch.float32, memory_format=torch.contiguous_format)


def _jitter(x: Tensor, keys: Tensor, aug: Aug) -> Tensor:
    """ColorJitter: factors in [max(0, 1 - s), 1 + s], hue shifts in [-s, s] of the circle; always applied."""
    strengths = [strength * aug.strength for strength in aug.jitter]
    blends = (
        (image_ops.brightness, Stream.BRIGHTNESS),
        (image_ops.contrast, Stream.CONTRAST),
        (image_ops.saturation, Stream.SATURATION),
    )
    for (operation, stream), strength in zip(blends, strengths[:3], strict=True):
        if strength:
            x = operation(x, uniform_in(keys, stream, (max(0.0, 1 - strength), 1 + strength)))
    shift = min(0.5, strengths[3])
    return image_ops.hue(x, uniform_in(keys, Stream.HUE, (-shift, shift))) if shift else x


def _distort(x: Tensor, keys: Tensor, aug: Aug) -> Tensor:
    """SSD's RandomPhotometricDistort, as in torchvision: each step with probability photometric_p."""
    streams = iter(range(Stream.DISTORT, Stream.DISTORT + 11))

    def factor_or_neutral(neutral: float, reach: float) -> Tensor:
        applied = happens(keys, next(streams), aug.photometric_p * aug.strength)
        reach = min(reach * aug.strength, 1.0 if neutral else 0.5)
        return torch.where(
            applied, uniform_in(keys, next(streams), (neutral - reach, neutral + reach)), neutral
        )

    early = happens(keys, next(streams), 0.5)  # contrast before or after the colour changes
    contrast = factor_or_neutral(1, 0.5)
    x = image_ops.brightness(x, factor_or_neutral(1, 0.125))
    x = image_ops.contrast(x, torch.where(early, contrast, 1))
    x = image_ops.saturation(x, factor_or_neutral(1, 0.5))
    x = image_ops.hue(x, factor_or_neutral(0, 0.05))
    x = image_ops.contrast(x, torch.where(early, 1, contrast))
    swapped = happens(keys, next(streams), aug.photometric_p * aug.strength)
    return image_ops.shuffle(x, seeding.uniform_tensor(keys, next(streams)) * swapped)


def _clahe(x: Tensor, keys: Tensor, aug: Aug) -> Tensor:
    return image_ops.clahe(x, uniform_in(keys, Stream.CLAHE_CLIP, (1.0, aug.clahe_clip)), aug.clahe_tiles)


def _matrix(entry: int, values: Tensor) -> Tensor:
    """(B, 2, 3): the identity with values (B,) as entry 0..5, in row-major order."""
    entries = [torch.full_like(values, float(k in (0, 4))) for k in range(6)]
    entries[entry] = values
    return torch.stack(entries, 1).view(-1, 2, 3)


Change = Callable[[Tensor, Tensor, Aug], Tensor]
Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
# torchvision's RandAugment: (images, strength 0..1, sign -1 or 1) -> images. Shears are about the centre.
OPERATIONS: dict[str, Operation] = {
    "identity": lambda x, t, s: x,
    "shear_x": lambda x, t, s: image_ops.warp(x, _matrix(1, 0.3 * t * s)),
    "shear_y": lambda x, t, s: image_ops.warp(x, _matrix(3, 0.3 * t * s)),
    "translate_x": lambda x, t, s: image_ops.warp(x, _matrix(2, (150 / 331 * x.shape[3] * t).trunc() * -s)),
    "translate_y": lambda x, t, s: image_ops.warp(x, _matrix(5, (150 / 331 * x.shape[2] * t).trunc() * -s)),
    "rotate": lambda x, t, s: image_ops.warp(x, image_ops.rotation(30 * t * s)),
    "brightness": lambda x, t, s: image_ops.brightness(x, 1 + 0.9 * t * s),
    "color": lambda x, t, s: image_ops.saturation(x, 1 + 0.9 * t * s),
    "contrast": lambda x, t, s: image_ops.contrast(x, 1 + 0.9 * t * s),
    "sharpness": lambda x, t, s: image_ops.sharpness(x, 1 + 0.9 * t * s),
    "posterize": lambda x, t, s: image_ops.posterize(x, 8 - (4 * t).round()),
    "solarize": lambda x, t, s: image_ops.solarize(x, 255 * (1 - t)),
    "autocontrast": lambda x, t, s: image_ops.autocontrast(x),
    "equalize": lambda x, t, s: image_ops.equalize(x),
}
# TrivialAugment (Mueller & Hutter 2021, the wide space) goes further than RandAugment by these factors; its shifts are
# 32 pixels at a size of 224
WIDE = {
    "shear_x": 3.3, "shear_y": 3.3, "translate_x": 32 / 224 / (150 / 331), "translate_y": 32 / 224 / (150 / 331),
    "rotate": 4.5, "brightness": 1.1, "color": 1.1, "contrast": 1.1, "sharpness": 1.1, "posterize": 1.5,
}  # fmt: skip
TRIVIAL_STEP = 100  # of its streams, beyond those of RandAugment
# AugMix leaves out the operations that resemble the corrupted validation set.
COLOURS = ("brightness", "color", "contrast", "sharpness")
AUGMIX_OPERATIONS = tuple(name for name in OPERATIONS if name not in COLOURS)


def draw_operation(keys: Tensor, step: int, *, count: int, probability: float) -> tuple[Tensor, Tensor]:
    """The operation of each row at a step, int64 (B,) in 0..count-1, and its sign, float32 (B,).

    The operation is uniform over `count` with `probability`, else 0 (identity).
    """
    stream = Stream.OPERATION + 4 * step
    chosen = (seeding.uniform_tensor(keys, stream) * count).long()
    sign = happens(keys, stream + 1, 0.5) * 2.0 - 1.0
    return chosen * happens(keys, stream + 2, probability), sign


def _trivial(x: Tensor, keys: Tensor, aug: Aug) -> Tensor:
    """TrivialAugment: one operation, uniform over all, with a strength uniform over 31 levels of a wide range."""
    chosen, sign = draw_operation(
        keys, TRIVIAL_STEP, count=len(OPERATIONS), probability=aug.trivial_p * aug.strength
    )
    level = (
        seeding.uniform_tensor(keys, Stream.OPERATION + 4 * TRIVIAL_STEP + 3) * (LEVELS + 1)
    ).floor() / LEVELS
    wide = torch.tensor([WIDE.get(name, 1.0) for name in OPERATIONS])[chosen]
    strength = (level * aug.strength).clamp(max=1.0) * wide
    return _apply(x, chosen, strength=strength, sign=sign, names=tuple(OPERATIONS))


def _apply(x: Tensor, chosen: Tensor, *, strength: Tensor, sign: Tensor, names: Sequence[str]) -> Tensor:
    """Apply each operation once, to its rows; `chosen` (B,) indexes `names`, 0 is identity."""
    out = x.clone()
    for index in range(1, len(names)):
        rows = (chosen == index).nonzero().view(-1)
        if len(rows):
            on_device = image_ops.on_device(rows, x.device)
            changed = OPERATIONS[names[index]](x[on_device], strength[rows], sign[rows])
            out.index_copy_(0, on_device, changed)
    return out


def _augmix(x: Tensor, keys: Tensor, aug: Aug) -> Tensor:
    """AugMix (Hendrycks et al.), alpha 1: the image blended with three chains of one to three light operations."""
    chains = subkeys(keys, AUGMIX_WIDTH)
    weights = -torch.log1p(-seeding.uniform_tensor(chains, Stream.AUGMIX_WEIGHT).double()).clamp(min=1e-9)
    blend = seeding.uniform_tensor(keys, Stream.AUGMIX_BLEND)
    weights = (weights / weights.sum(1, keepdim=True)).float() * blend[:, None]
    out = x * image_ops.column(1 - blend, x)
    for chain, weight in zip(chains.unbind(1), weights.unbind(1), strict=True):
        length = (seeding.uniform_tensor(chain, Stream.AUGMIX_LENGTH) * AUGMIX_DEPTH).long()
        y = x
        for step in range(AUGMIX_DEPTH):
            chosen, sign = draw_operation(chain, step, count=len(AUGMIX_OPERATIONS), probability=1.0)
            limit = min(1.0, AUGMIX_STRENGTH * aug.strength)
            level = uniform_in(chain, Stream.OPERATION + 4 * step + 3, (0.0, limit))
            y = _apply(y, chosen * (step <= length), strength=level, sign=sign, names=AUGMIX_OPERATIONS)
        out.add_(y * image_ops.column(weight, x))
    return out


def _corrupt(x: Tensor, keys: Tensor, aug: Aug) -> Tensor:
    """Light blur for half of the rows, light noise for the other half."""

    def blur(x: Tensor, keys: Tensor, aug: Aug) -> Tensor:
        return image_ops.blur(x, uniform_in(keys, Stream.CORRUPT_LEVEL, BLUR_SIGMA) * aug.strength)

    def noise(x: Tensor, keys: Tensor, aug: Aug) -> Tensor:
        return image_ops.noise(x, keys, uniform_in(keys, Stream.CORRUPT_LEVEL, NOISE_SIGMA) * aug.strength)

    blurred = happens(keys, Stream.CORRUPT_KIND, 0.5)
    return _for_some(
        _for_some(x, keys, chosen=blurred, change=blur, aug=aug), keys, chosen=~blurred, change=noise, aug=aug
    )


def _for_some(x: Tensor, keys: Tensor, *, chosen: Tensor, change: Change, aug: Aug) -> Tensor:
    rows = chosen.nonzero().view(-1)
    if not len(rows):
        return x
    on_device = image_ops.on_device(rows, x.device)
    return x.index_copy(0, on_device, change(x[on_device], keys[rows], aug))


def erase_boxes(keys: Tensor, probability: float, size: Sequence[int]) -> Tensor:
    """RandomErasing's boxes in images of `size` (height, width), float64 (B, 4) = top, left, height, width.

    Height is 0 where nothing is erased. As in torchvision, area and log-ratio are uniform and the first of ten
    tries that fits is taken.
    """
    height, width = size
    tries = subkeys(keys, ERASE_TRIES)
    area = uniform_in(tries, Stream.ERASE_SIZE, ERASE_AREA).double() * (height * width)
    ratio = uniform_in(tries, Stream.ERASE_SHAPE, ERASE_LOG_RATIO).double().exp()
    tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.byte().argmax(1, keepdim=True)
    tall, wide = tall.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
    top = (seeding.uniform_tensor(keys, Stream.ERASE_TOP) * (height - tall + 1)).floor()
    left = (seeding.uniform_tensor(keys, Stream.ERASE_LEFT) * (width - wide + 1)).floor()
    tall = tall * (fits.any(1) & happens(keys, Stream.ERASE, probability))
    return torch.stack([top, left, tall, wide], 1)
