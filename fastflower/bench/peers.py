"""Loaders of other libraries, configured as in their documentation: RandomResizedCrop and flip to uint8 batches."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastflower.bench.pictures import RATIO, SCALE, Epoch, Pictures, pooled


def random_crop(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop."""
    area = random.uniform(*SCALE)
    ratio = random.uniform(max(RATIO[0], area), min(RATIO[1], 1 / area))
    h = max(1, min(height, round((height * width * area / ratio) ** 0.5)))
    w = max(1, min(width, round((height * width * area * ratio) ** 0.5)))
    return random.randint(0, height - h), random.randint(0, width - w), h, w


class _Folder:
    """A map-style dataset with torchvision's usual training transforms."""

    def __init__(self, files: tuple[Path, ...], size: int) -> None:
        from torchvision import transforms

        self.files = files
        self.transform = transforms.Compose(
            [transforms.RandomResizedCrop(size, SCALE, RATIO), transforms.RandomHorizontalFlip(), np.array]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> np.ndarray:
        pixels: np.ndarray = self.transform(Image.open(self.files[i]).convert("RGB"))
        return pixels


def torchvision(pictures: Pictures, size: int, threads: int) -> Epoch:
    from torch.utils.data import DataLoader

    dataset: Any = _Folder(pictures.files, size)
    loader = DataLoader(dataset, pictures.batch, num_workers=threads, persistent_workers=True)
    return lambda: iter(loader)


def opencv(pictures: Pictures, size: int, threads: int, *, decoder: str) -> Epoch:
    """OpenCV in a thread pool: decode, crop, bilinear resize, flip."""
    import cv2

    cv2.setNumThreads(0)
    if decoder == "simplejpeg":
        from simplejpeg import decode_jpeg as decode
    else:

        def decode(data: bytes) -> np.ndarray:
            pixels: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)

    def load(files: list[bytes]) -> np.ndarray:
        batch = np.empty((len(files), size, size, 3), np.uint8)
        for i, data in enumerate(files):
            pixels = decode(data)
            top, left, h, w = random_crop(*pixels.shape[:2])
            view = cv2.resize(
                pixels[top : top + h, left : left + w], (size, size), interpolation=cv2.INTER_LINEAR
            )
            batch[i] = view[:, ::-1] if random.random() < 0.5 else view
        return batch

    return pooled(pictures.data, pictures.batch, threads=threads, process=load)


def dali(pictures: Pictures, size: int, threads: int, *, quick: bool) -> Epoch:
    """NVIDIA DALI on the CPU; quick: fast inverse DCT, plain upsampling, no antialiasing. The last batch wraps."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=pictures.batch, num_threads=threads, device_id=None, seed=0)
    def pipeline() -> Any:
        data, _ = fn.readers.file(files=[str(file) for file in pictures.files])
        pixels = fn.decoders.image_random_crop(
            data, random_area=SCALE, random_aspect_ratio=RATIO, use_fast_idct=quick,
            jpeg_fancy_upsampling=not quick,
        )  # fmt: skip
        pixels = fn.resize(pixels, size=(size, size), antialias=not quick)
        return fn.flip(pixels, horizontal=fn.random.coin_flip())

    built = pipeline()
    built.build()

    def epoch() -> Iterator[np.ndarray]:
        for _ in range(-(-len(pictures.files) // pictures.batch)):
            (batch,) = built.run()
            yield batch.as_array()

    return epoch


def spdl(pictures: Pictures, size: int, threads: int) -> Epoch:
    """SPDL: FFmpeg's decoder and filters in a thread pool."""
    from spdl import io
    from spdl.pipeline import PipelineBuilder

    def decode(file: Path) -> Any:
        with Image.open(file) as image:
            width, height = image.size
        top, left, h, w = random_crop(height, width)
        flip = "hflip," if random.random() < 0.5 else ""
        filters = f"crop={w}:{h}:{left}:{top}:exact=1,{flip}scale={size}:{size},format=pix_fmts=rgb24"
        return io.decode_packets(io.demux_image(str(file)), filter_desc=filters)

    def batch(frames: list[Any]) -> np.ndarray:
        return io.to_numpy(io.convert_frames(frames))

    def epoch() -> Iterator[np.ndarray]:
        builder = PipelineBuilder().add_source(pictures.files).pipe(decode, concurrency=threads)
        builder = builder.aggregate(pictures.batch).pipe(batch).add_sink(2)
        with (pipeline := builder.build(num_threads=threads)).auto_stop():
            yield from pipeline

    return epoch


def tensorflow(pictures: Pictures, size: int, threads: int, *, quick: bool) -> Epoch:
    """tf.data: decode and crop, bilinear resize without antialiasing; quick: fast inverse DCT, plain upsampling."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    options = {"dct_method": "INTEGER_FAST", "fancy_upscaling": False} if quick else {}

    def decode(file: Any) -> Any:
        data = tf.io.read_file(file)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data), tf.zeros([1, 0, 4]), area_range=SCALE, aspect_ratio_range=RATIO,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        window = tf.concat([begin[:2], extent[:2]], 0)
        pixels = tf.image.decode_and_crop_jpeg(data, window, channels=3, **options)
        pixels = tf.image.resize(tf.image.random_flip_left_right(pixels), (size, size))
        return tf.cast(pixels + 0.5, tf.uint8)

    files = tf.data.Dataset.from_tensor_slices([str(file) for file in pictures.files])
    batches = files.map(decode, num_parallel_calls=threads).batch(pictures.batch).prefetch(2)
    pipeline_options = tf.data.Options()
    pipeline_options.threading.private_threadpool_size = threads
    return lambda: iter(batches.with_options(pipeline_options).as_numpy_iterator())
