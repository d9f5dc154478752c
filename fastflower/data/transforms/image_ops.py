"""Batched pixel operations: every row of a batch has its own strength, without a loop over rows.

Images are float32 (B, 3, H, W) in 0..255 on any device, of any memory format (planar is fastest on a CPU);
strengths are (B,) on the host, where arithmetic with them costs no kernel launch. Operations may overwrite their
input: use only the result. A row's result does not depend on the other rows. Formulas are those of
`torchvision.transforms.v2.functional` for float images; docstrings mention the differences.

Products and sums are used instead of `lerp`, `addcmul` and `where`: the first two round differently in vector tails
and on GPUs, `where` costs a CPU twenty times an addition.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastflower.core import seeding

RADIUS = 3  # pixels, of the blur


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device; from pinned memory, so that the host does not wait for the GPU's earlier work."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def column(values: Tensor, x: Tensor) -> Tensor:
    """Host values (B,) as (B, 1, 1, 1) on the device of x."""
    return on_device(values, x.device).view(-1, 1, 1, 1)


@functools.lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Float32 numbers on a device, cached because each copy to a GPU waits for all of its work."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def grey(x: Tensor, scale: int = 1) -> Tensor:
    """Luminance (B, 1, H, W), times `scale`, with ITU-R 601 weights as torchvision rounds them."""
    red, green, blue = x.split(1, 1)
    return (red * (0.2989 * scale)).add_(green * (0.587 * scale)).add_(blue * (0.114 * scale))


def blend(x: Tensor, degenerate: Tensor, factor: Tensor) -> Tensor:
    """factor * x + (1 - factor) * degenerate, clamped to 0..255."""
    factor, rest = on_device(torch.stack([factor, 1 - factor]), x.device).view(2, -1, 1, 1, 1)
    return x.mul_(factor).add_(degenerate * rest).clamp_(0, 255)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(column(factor, x)).clamp_(0, 255)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean luminance.

    The mean is taken over sixteenths of a grey level: sums of whole numbers are exact in any order, hence
    the same for every batch and device (sides up to 4096), within 0.03 of the plain mean.
    """
    sixteenths = grey(x, 16).round_().sum(3).sum(2, dtype=torch.float64)
    mean = (sixteenths / (16 * x.shape[2] * x.shape[3])).float()
    return blend(x, mean[:, :, None, None], factor)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    return blend(x, grey(x), factor)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by shift, -0.5..0.5 of the circle; a pixel's maximum and minimum do not change.

    With the hue h in sixths of the circle and R, G, B scaled to 0..1 between a pixel's minimum and maximum,
    |h - 3| = 2 + R - G - B, and h < 3 where G > B: no branches. Back to RGB, a channel at a distance d on the
    circle from its complement (cyan 3, magenta 5, yellow 1) is max - chroma * clamp(2 - d, 0, 1).
    """
    red, green, blue = x.split(1, 1)
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = high - low
    distance = (red - green).sub_(blue).add_(low).div_(chroma.clamp(min=1e-6)).add_(2)
    angle = distance.copysign_(blue - green).add_(column(3 + 6 * shift, x))
    angle.sub_((angle * (1 / 6)).floor_().mul_(6))
    complements = constant((3.0, 5.0, 1.0), x.device).view(1, 3, 1, 1)
    depth = (angle - complements).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)  # 2 - d = ||h - c| - 3| - 1
    return torch.sub(high, depth.mul_(chroma), out=depth)


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the 3 x 3 mean whose centre has weight 5; the border does not change."""
    rows = (x[:, :, :-2] + x[:, :, 1:-1]).add_(x[:, :, 2:])
    smooth = (rows[..., :-2] + rows[..., 1:-1]).add_(rows[..., 2:])
    inner = x[:, :, 1:-1, 1:-1]
    blend(inner, smooth.add_(inner * 4).div_(13), factor)
    return x


def posterize(x: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper `bits` (whole numbers 0..8) of each value."""
    step = column(torch.exp2(8 - bits), x)
    return (x.round() / step).floor_().mul_(step)


def solarize(x: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values from the threshold up."""
    return torch.where(x >= column(threshold, x), 255 - x, x)


def autocontrast(x: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a constant channel does not change."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    flat = high == low
    scale = torch.where(flat, 1, 255 / (high - low).clamp(min=1e-6))
    return x.sub_(torch.where(flat, 0, low)).mul_(scale).clamp_(0, 255)


def _histograms(values: Tensor) -> Tensor:
    """Int64 (N, 256): counts of the levels 0..255 in each row of values, int64 (N, pixels).

    Not `bincount`, for which the host waits until a GPU has found the largest level.
    """
    ones = torch.ones(1, 1, dtype=torch.int64, device=values.device).expand_as(values)
    return torch.zeros(len(values), 256, dtype=torch.int64, device=values.device).scatter_add_(
        1, values, ones
    )


def equalize(x: Tensor) -> Tensor:
    """Flatten the histogram of each channel; values are rounded to whole numbers."""
    planes, pixels = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    values = x.round().long().reshape(planes, pixels)
    counts = _histograms(values)
    last = counts.gather(1, values.amax(1, keepdim=True))
    step = (pixels - last) // 255
    table = ((counts.cumsum(1) - counts + step // 2) // step.clamp(min=1)).clamp(0, 255)
    table = torch.where(step == 0, torch.arange(256, device=x.device), table)
    return table.gather(1, values).to(x.dtype).view(x.shape)


def clahe(x: Tensor, clip: Tensor, tiles: int) -> Tensor:
    """Contrast-limited adaptive histogram equalisation of the luminance; colour differences do not change.

    Each of tiles x tiles tiles of the image has its own look-up table, and a pixel interpolates those of its four
    nearest tiles. Counts above clip (B,) times the mean are spread over all levels, as in OpenCV.
    """
    batch, _, height, width = x.shape
    tall, wide = -(-height // tiles), -(-width // tiles)
    area, device = tall * wide, x.device
    level = grey(x).round_()
    rows = _mirrored(height, tall * tiles, device)
    columns = _mirrored(width, wide * tiles, device)
    padded = level[:, 0].long()[:, rows][:, :, columns].view(batch, tiles, tall, tiles, wide).transpose(2, 3)
    counts = _histograms(padded.reshape(batch * tiles**2, area)).view(batch, tiles**2, 256)
    limit = on_device((clip.double() * area / 256).long().clamp(min=1), device)[:, None, None]
    excess = (counts - limit).clamp(min=0).sum(2, keepdim=True)
    remainder = excess % 256
    bins = torch.arange(256, device=device)
    stride = 256 // remainder.clamp(min=1)
    counts = counts.minimum(limit) + excess // 256 + ((bins % stride == 0) & (bins // stride < remainder))
    tables = (counts.cumsum(2) * (255 / area)).round().clamp(max=255).view(batch, tiles, tiles * 256)

    top, bottom, down = _between_tiles(height, tall, tiles=tiles, device=device)
    before, after, across = _between_tiles(width, wide, tiles=tiles, device=device)
    value = level[:, 0].long()

    def looked_up(tile_rows: Tensor) -> Tensor:
        lines = tables[:, tile_rows]  # (B, H, tiles * 256)
        first, second = lines.gather(2, value + 256 * before), lines.gather(2, value + 256 * after)
        return first * (1 - across) + second * across

    result = looked_up(top) * (1 - down[:, None]) + looked_up(bottom) * down[:, None]
    return x.add_(result[:, None].float() - level).clamp_(0, 255)


def _mirrored(length: int, padded: int, device: torch.device) -> Tensor:
    """Indices (padded,) into a side of `length`, mirrored at its last pixel (which is not repeated)."""
    index = torch.arange(padded, device=device) % max(1, 2 * length - 2)
    return index.minimum(2 * length - 2 - index)


def _between_tiles(
    length: int, side: int, *, tiles: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Per pixel of a side: the tile before, the tile after, and the weight of the latter."""
    position = torch.arange(length, device=device) / side - 0.5
    before = position.floor()
    return before.long().clamp(min=0), (before.long() + 1).clamp(max=tiles - 1), position - before


def shuffle(x: Tensor, draw: Tensor) -> Tensor:
    """Permute the channels in one of six orders, selected by draw (B,) in [0, 1)."""
    first = (draw * 3).long()
    second = (first + 1 + (draw * 6).long() % 2) % 3
    order = torch.stack([first, second, 3 - first - second], 1)
    return x[torch.arange(len(x), device=x.device)[:, None], on_device(order, x.device)]


def warp(x: Tensor, matrix: Tensor) -> Tensor:
    """Sample bilinearly at matrix (B, 2, 3) @ (column, row, 1), in pixels from the centre, mirrored at the border.

    The matrix is on the host. The result is planar whatever the memory format of x.
    """
    height, width = x.shape[2:]
    scaled = matrix * torch.tensor([2 / width, 2 / height])[:, None]
    across = scaled[:, :, :1] * _centred(width)  # (B, 2, W)
    down = (scaled[:, :, 1:2] * _centred(height)).add_(scaled[:, :, 2:])  # (B, 2, H)
    sides = on_device(torch.cat([across, down], 2), x.device)
    grid = sides[:, :, None, :width] + sides[:, :, width:, None]  # (B, 2, H, W)
    return F.grid_sample(x, grid.permute(0, 2, 3, 1), "bilinear", "reflection", align_corners=False)


def _centred(length: int) -> Tensor:
    """Float32 (length,): distances in pixels from the centre of a side."""
    return torch.arange(length, dtype=torch.float32) - (length - 1) / 2


def rotation(degrees: Tensor) -> Tensor:
    """The matrix (B, 2, 3) that turns an image counter-clockwise about its centre."""
    angle = torch.deg2rad(degrees.double())  # float64: its sine rounds to one float32 on every processor
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    return torch.stack([cos, -sin, zero, sin, cos, zero], 1).float().view(-1, 2, 3)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of sigma (B,) pixels, cut at a radius of 3, mirrored at the border."""
    offsets = torch.arange(-RADIUS, RADIUS + 1)
    weights = torch.exp(-0.5 * (offsets / sigma.double()[:, None]) ** 2)
    weights = on_device((weights / weights.sum(1, keepdim=True)).float(), x.device)[:, :, None, None, None]
    x = F.pad(x, [RADIUS] * 4, mode="reflect")
    for dim in (2, 3):
        side = x.shape[dim] - 2 * RADIUS
        taps = [x.narrow(dim, k, side) * weights[:, k] for k in range(2 * RADIUS + 1)]
        x = taps[0]
        for tap in taps[1:]:
            x = x.add_(tap)
    return x.clamp_(0, 255)


def noise(x: Tensor, keys: Tensor, sigma: Tensor) -> Tensor:
    """Add noise of standard deviation sigma (B,), one counter-based draw per value; keys (B,) are on the host.

    A draw is the sum of the four 16-bit words of a hash: nearly normal (excess kurtosis -0.3), and exact on every
    device.
    """
    positions = torch.arange(x[0].numel(), device=x.device)
    bits = seeding.hash64_tensor(on_device(seeding.hash64_tensor(keys), x.device)[:, None] ^ positions)
    total = (bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48 & 0xFFFF)
    normal = (total - 2 * 0xFFFF).float().mul_(3**0.5 / 0x10000)
    return x.add_(normal.view(x.shape).mul_(column(sigma, x))).clamp_(0, 255)


def erase(x: Tensor, box: Tensor, fill: Tensor) -> Tensor:
    """Fill box (B, 4) = top, left, height, width, on the host, with `fill` (3,) on the device of x; height 0 changes
    nothing.
    """
    top, left, height, width = box[:, :, None].unbind(1)
    down, across = spans(top, height, x.shape[2]), spans(left, width, x.shape[3])
    sides = on_device(torch.cat([down, across], 1).float(), x.device)  # (B, H + W)
    inside = sides[:, None, : x.shape[2], None] * sides[:, None, None, x.shape[2] :]
    return x.mul_(1 - inside).add_(inside * fill.view(1, 3, 1, 1))


def spans(start: Tensor, size: Tensor, length: int) -> Tensor:
    """Bool (B, length): the positions of a side from start (B, 1) to start + size."""
    position = torch.arange(length)
    return (position >= start) & (position < start + size)


def flip_rows(images: Tensor, chosen: Tensor) -> Tensor:
    """Turn the chosen (B,) images upside down; any dtype, (B, H, W, C)."""
    batch, height = images.shape[:2]
    down = torch.arange(height)
    order = torch.where(chosen[:, None], height - 1 - down, down)
    lines = on_device((order + height * torch.arange(batch)[:, None]).view(-1), images.device)
    return images.reshape(batch * height, -1).index_select(0, lines).view(images.shape)
