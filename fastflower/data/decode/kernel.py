"""Decodes rows of a beton to a uint8 batch: ctypes calls into decode.c, which runs its own threads without the GIL."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass

import numpy as np

from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.workers import cores
from fastflower.data.betons.beton_file import DESCRIPTOR, JPEG, Beton
from fastflower.recipe.schema import Recipe

INTERPOLATIONS = ("bilinear", "bicubic")
WHOLE_FILE = -1.0  # in place of a factor: not a row of a beton, read to its end


@dataclass(frozen=True)
class Crop:
    """RandomResizedCrop and horizontal flip.

    scale: fraction of the image's area. ratio: aspect of the crop over the target's, with `whole` over the image's,
    so that scale and ratio 1 resize the whole image. hflip_p: probability. swap: exchange the images of half of the
    pairs, at random.
    """

    scale: tuple[float, float] = (0.8, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip_p: float = 0.5
    whole: bool = False
    swap: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Crop:
        """The training crop that a recipe asks for; aug.strength scales the flips."""
        aug = recipe.aug
        return cls(
            scale=(aug.rrc_scale[0], aug.rrc_scale[1]),
            ratio=(aug.rrc_ratio[0], aug.rrc_ratio[1]),
            hflip_p=min(1.0, aug.hflip_p * aug.strength),
            whole=recipe.data.resize == "whole",
            swap=recipe.data.symmetric,
        )

    def pack(self) -> np.ndarray:
        """The `Crop` struct of decode.c: float64 (6,)."""
        return np.array([*self.scale, *self.ratio, self.hflip_p, self.whole], np.float64)


class _Fault(ctypes.Structure):
    _fields_ = [("position", ctypes.c_int64), ("code", ctypes.c_int32), ("text", ctypes.c_char * 200)]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel. Raises EnvironmentFault when it was not built."""
    spec = importlib.util.find_spec("fastflower.data.decode._decode")
    if spec is None or spec.origin is None:
        raise EnvironmentFault("fastflower/data/decode/decode.c is not compiled; run make setup")
    kernel = ctypes.CDLL(spec.origin)
    pointer, i32, i64, f64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
    fault = ctypes.POINTER(_Fault)
    kernel.ff_train.argtypes = [pointer] * 4 + [i64, pointer, i32, i32, pointer, i32, fault]
    kernel.ff_eval.argtypes = [pointer] * 3 + [i64, pointer, i32, i32, f64, i32, i32, fault]
    kernel.ff_crop_box.argtypes = [ctypes.c_uint64, i32, i32, i32, i32, pointer, pointer]
    kernel.ff_eval_box.argtypes = [i32, i32, i32, i32, f64, pointer]
    kernel.ff_limit.argtypes, kernel.ff_limit.restype = [pointer, ctypes.c_uint64, i64], i64
    for name in ("ff_train", "ff_eval", "ff_crop_box", "ff_eval_box"):
        getattr(kernel, name).restype = None
    return kernel


def decode_train(
    beton: Beton, rows: np.ndarray, *, keys: np.ndarray, out: np.ndarray, crop: Crop, threads: int
) -> None:
    """Decode, crop, flip and resize rows (B,) into out, uint8 (B, h, w, 3); keys uint64 (B,) draw crop and flip.

    The pixels are a pure function of the row, its key, the crop and the size. A JPEG is decoded at the DCT
    scale (1, 1/2, 1/4, 1/8) that still covers the target, and resized with an antialiased triangle filter.
    PSNR on photographs of about 500 x 650 (109 of flowers17), median and lowest:

        to                                              224               320
        full decode, Pillow's antialiased bilinear      45 dB, 37 dB      51 dB, 45 dB
        full decode, area averaging                     41 dB, 32 dB      47 dB, 39 dB
        (one full decode to the other                   45 dB, 37 dB      48 dB, 39 dB)

    Small networks trained on these pixels and on the exact bilinear ones (`bench decoder`, 6 seeds each) differ in
    top-1 by +0.0005 [-0.0029, +0.0039] on digits (n = 360) and +0.0008 [-0.017, +0.018] on flowers17 (n = 218).
    Raises CorruptionError naming the beton and the row that cannot be decoded.
    """
    rows = _rows(beton, rows, out)
    keys = np.ascontiguousarray(keys).view(np.uint64)
    if keys.shape != rows.shape:
        raise InputError(f"decode_train: {keys.size} keys for {rows.size} rows")
    fault, packed = _Fault(), crop.pack()
    library().ff_train(
        *_pointers(beton.data, beton.descriptors, rows, keys), rows.size, out.ctypes.data,
        *out.shape[1:3], packed.ctypes.data, cores(threads), ctypes.byref(fault),
    )  # fmt: skip
    _raise(beton, rows, fault)


def decode_eval(
    beton: Beton, rows: np.ndarray, *, out: np.ndarray, factor: float, interpolation: str, threads: int
) -> None:
    """Decode the centred view of rows (B,) into out, uint8 (B, h, w, 3), bit-identical to Pillow.

    The view is `eval_box`, resampled "bicubic" or "bilinear". Raises CorruptionError as decode_train does.
    """
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"interpolation = {interpolation}: must be one of {', '.join(INTERPOLATIONS)}")
    rows, fault = _rows(beton, rows, out), _Fault()
    library().ff_eval(
        *_pointers(beton.data, beton.descriptors, rows), rows.size, out.ctypes.data,
        *out.shape[1:3], factor, interpolation == "bicubic", cores(threads), ctypes.byref(fault),
    )  # fmt: skip
    _raise(beton, rows, fault)


def decode_file(data: bytes, stored: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Decode a JPEG file of `stored` (height, width) and resize it to `size`, bicubic as Pillow does: uint8 (h, w, 3).

    Raises InputError for every libjpeg warning; Pillow ignores them, and most such pictures show garbage.
    """
    descriptors, out = (
        np.array([(0, len(data), *stored, JPEG, 0)], DESCRIPTOR),
        np.empty((1, *size, 3), np.uint8),
    )
    fault, rows = _Fault(), np.zeros(1, np.int64)
    library().ff_eval(
        *_pointers(np.frombuffer(data, np.uint8), descriptors, rows), 1, out.ctypes.data, *size, WHOLE_FILE, True, 1,
        ctypes.byref(fault),
    )  # fmt: skip
    if fault.position >= 0:
        raise InputError(f"cannot be decoded ({fault.text.decode('utf-8', 'replace')})")
    pixels: np.ndarray = out[0]
    return pixels


def eval_box(
    height: int, width: int, *, size: tuple[int, int], factor: float
) -> tuple[float, float, float, float]:
    """The largest centred box of the aspect of size (h, w), shrunk by `factor`: left, top, right, bottom in pixels.

    With factor 0 it is the whole image.
    """
    box = np.zeros(4, np.float32)
    library().ff_eval_box(height, width, *size, factor, box.ctypes.data)
    left, top, right, bottom = map(float, box)
    return left, top, right, bottom


def crop_box(
    key: int, height: int, *, width: int, size: tuple[int, int], crop: Crop
) -> tuple[int, int, int, int, bool]:
    """The crop that a key draws from an image for a target of size (h, w): top, left, height, width, flip."""
    box, packed = np.zeros(5, np.int32), crop.pack()
    library().ff_crop_box(key, height, width, *size, packed.ctypes.data, box.ctypes.data)
    top, left, h, w, flip = map(int, box)
    return top, left, h, w, bool(flip)


def _rows(beton: Beton, rows: np.ndarray, out: np.ndarray) -> np.ndarray:
    rows = np.ascontiguousarray(rows, np.int64)
    shape = (rows.size, *out.shape[1:3], 3)
    if out.dtype != np.uint8 or out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise InputError(f"decode: out must be contiguous uint8 {shape}, got {out.dtype} {out.shape}")
    if rows.size and (rows.min() < 0 or rows.max() >= beton.rows):
        raise InputError(f"{beton.path}: rows are 0..{beton.rows - 1}, got {rows.min()}..{rows.max()}")
    return rows


def _pointers(*arrays: np.ndarray) -> list[int]:
    return [array.ctypes.data for array in arrays]


def _raise(beton: Beton, rows: np.ndarray, fault: _Fault) -> None:
    if fault.position >= 0:
        reason = fault.text.decode("utf-8", "replace")
        raise beton.damage(int(rows[fault.position]), f"cannot be decoded ({reason})")
