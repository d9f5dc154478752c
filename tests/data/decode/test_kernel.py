"""The kernel: evaluation is bit-identical to Pillow; training is torchvision's crop, near Pillow's pixels, and pure."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from fastflower.core import seeding
from fastflower.core.errors import CorruptionError, EnvironmentFault, InputError
from fastflower.data.betons.beton_file import Beton, open_beton
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.decode import kernel
from fastflower.data.decode.kernel import (
    Crop,
    crop_box,
    decode_eval,
    decode_file,
    decode_train,
    eval_box,
    library,
)

FULL_CROP = Crop((1.0, 1.0), (1.0, 1.0), 0.0)
SHAPES = [(60, 80), (81, 57), (33, 200), (7, 5), (1, 1), (2, 90), (224, 224), (300, 451), (640, 427)]


def picture(height: int, width: int, seed: int) -> Image.Image:
    """A smooth picture with edges and some noise: suited to JPEG, and demanding for a resampler."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8))
    pixels = np.array(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int64)
    pixels[height // 3 : height // 2] //= 2
    return Image.fromarray((pixels + rng.integers(-6, 7, pixels.shape)).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def sampled(image: Image.Image, factor: str) -> bytes:
    """A JPEG of a chroma sampling that Pillow does not write."""
    import cv2

    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{factor}")]
    return bytes(cv2.imencode(".jpg", np.array(image)[:, :, ::-1], options)[1])


def write(path: Path, images: list[bytes | np.ndarray]) -> Beton:
    with BetonWriter(path, len(images)) as writer:
        for i, image in enumerate(images):
            if isinstance(image, bytes):
                width, height = Image.open(io.BytesIO(image)).size
                writer.append_jpeg(image, height=height, width=width, label=0, index=i)
            else:
                writer.append_raw(image, 0, i)
        writer.commit()
    return open_beton(path)


def pixels(beton: Beton, row: int) -> Image.Image:
    """A row, decoded by Pillow."""
    if beton.descriptors["mode"][row] == 0:
        return Image.open(io.BytesIO(beton.row(row).tobytes())).convert("RGB")
    return Image.fromarray(
        beton.row(row).reshape(beton.descriptors["height"][row], beton.descriptors["width"][row], 3)
    )


def train(beton: Beton, keys: np.ndarray, size: tuple[int, int], crop: Crop, threads: int = 1) -> np.ndarray:
    out = np.empty((beton.rows, *size, 3), np.uint8)
    decode_train(beton, np.arange(beton.rows), keys=keys, out=out, crop=crop, threads=threads)
    return out


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    """Rows of every JPEG subsampling, progressive, restart markers, optimised, grey, Adobe RGB, and raw; all shapes."""
    images: list[bytes | np.ndarray] = []
    kinds: list[dict[str, object]] = [
        {"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"progressive": True},
        {"restart_marker_blocks": 3}, {"optimize": True, "quality": 40}, {"keep_rgb": True},
    ]  # fmt: skip
    for i, (height, width) in enumerate(SHAPES):
        for k, kind in enumerate(kinds):
            images.append(jpeg(picture(height, width, 10 * i + k), **kind))
        images += [sampled(picture(height, width, 300 + i), factor) for factor in ("411", "440")]
        images.append(jpeg(picture(height, width, 500 + i).convert("L")))
        images.append(np.array(picture(height, width, 900 + i)))
    return write(tmp_path_factory.mktemp("betons") / "a.beton", images)


@pytest.fixture
def portable() -> Iterator[None]:
    library().ff_portable(1)
    yield
    library().ff_portable(0)


def assert_as_pillow(beton: Beton, size: tuple[int, int], factor: float, interpolation: str) -> None:
    out = np.zeros((beton.rows, *size, 3), np.uint8)
    decode_eval(beton, np.arange(beton.rows), out=out, factor=factor, interpolation=interpolation, threads=2)
    method = Image.Resampling[interpolation.upper()]
    for row in range(beton.rows):
        image = pixels(beton, row)
        box = eval_box(image.height, image.width, size=size, factor=factor)
        assert np.array_equal(out[row], np.array(image.resize(size[::-1], method, box=box))), (
            row,
            image.size,
        )


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("size", "factor"),
    [((64, 64), 1.14), ((32, 64), 1.14), ((90, 50), 1.0), ((224, 224), 1.0), ((32, 64), 0.0)],
)
def test_evaluation_is_pillow_to_the_bit(
    beton: Beton, size: tuple[int, int], factor: float, interpolation: str
) -> None:
    assert_as_pillow(beton, size, factor, interpolation)


def test_portable_evaluation_is_pillow_too(beton: Beton, portable: None) -> None:
    assert_as_pillow(beton, (61, 83), 1.14, "bicubic")


def test_factor_0_resizes_the_whole_image(beton: Beton) -> None:
    assert eval_box(48, 48, size=(32, 64), factor=0.0) == (0.0, 0.0, 48.0, 48.0)
    whole = Crop((1.0, 1.0), (1.0, 1.0), 0.0, whole=True)
    for shape in (*SHAPES, (48, 48), (30, 90), (601, 7)):
        box = crop_box(5, shape[0], width=shape[1], size=(32, 64), crop=whole)
        assert box == (0, 0, *shape, False)
    cut = crop_box(5, 48, width=48, size=(32, 64), crop=FULL_CROP)
    assert cut == (12, 0, 24, 48, False)  # half of the image
    half = crop_box(9, 100, width=400, size=(50, 50), crop=Crop((0.25, 0.25), (1, 1), 0.0, whole=True))
    assert half[2:4] == (50, 200)  # of the image's aspect, not of the target's


def test_a_whole_image_of_another_aspect_is_resized_in_training_as_in_evaluation(beton: Beton) -> None:
    size, rows = (32, 64), np.arange(beton.rows)
    keys, expected = rows.astype(np.uint64), np.zeros((beton.rows, 32, 64, 3), np.uint8)
    got = train(beton, keys, size, Crop((1.0, 1.0), (1.0, 1.0), 0.0, whole=True))
    decode_eval(beton, rows, out=expected, factor=0.0, interpolation="bilinear", threads=1)
    smooth = (beton.descriptors["height"] > 64) & (beton.descriptors["width"] > 64)
    assert np.abs(got[smooth].astype(int) - expected[smooth]).mean() < 4
    assert beton.rows > 20 and smooth.sum() > 20


def test_eval_box_is_the_largest_centred_one() -> None:
    assert eval_box(300, 400, size=(224, 224), factor=1.0) == (50.0, 0.0, 350.0, 300.0)
    left, top, right, bottom = eval_box(300, 400, size=(32, 64), factor=1.25)
    assert (left, top, right, bottom) == pytest.approx((40, 70, 360, 230))
    for size in ((3, 7), (224, 224), (333, 1)):  # never outside, whatever the rounding
        for shape in ((1, 1), (7, 1000), (667, 500)):
            left, top, right, bottom = eval_box(*shape, size=size, factor=1.0)
            assert 0 <= left < right <= shape[1] and 0 <= top < bottom <= shape[0]


def reference_box(
    key: int, height: int, width: int, size: tuple[int, int], crop: Crop
) -> tuple[int, int, int, int, bool]:
    """torchvision's RandomResizedCrop.get_params with the key's numbers; ratios times the target's aspect."""

    def draw(stream: int) -> float:
        return float(seeding.uniform(np.uint64(key), stream))

    flip, aspect = draw(1000) < crop.hflip_p, size[1] / size[0]
    low, high = crop.ratio[0] * aspect, crop.ratio[1] * aspect
    for t in range(10):
        area = height * width * (crop.scale[0] + draw(1010 + t) * (crop.scale[1] - crop.scale[0]))
        ratio = math.exp(math.log(low) + draw(1030 + t) * (math.log(high) - math.log(low)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw(1050 + t) * (height - h + 1)), int(draw(1070 + t) * (width - w + 1)), h, w, flip
    h, w = height, width
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    return (height - h) // 2, (width - w) // 2, h, w, flip


@pytest.mark.parametrize("size", [(224, 224), (32, 64)])
@pytest.mark.parametrize(
    "crop", [Crop(), Crop((0.08, 1.0), (0.5, 2.0), 0.2), Crop((0.9, 1.0), (1.0, 1.0), 1.0)]
)
def test_crops_are_torchvisions(size: tuple[int, int], crop: Crop) -> None:
    keys = seeding.row_keys(3, 1, positions=np.arange(60), rows=np.arange(60))
    for height, width in ((500, 666), (40, 300), (300, 40), (9, 9)):
        for key in keys:
            box = crop_box(int(key), height, width=width, size=size, crop=crop)
            assert box == reference_box(int(key), height, width, size, crop)
            assert box[0] >= 0 <= box[1] and box[0] + box[2] <= height and box[1] + box[3] <= width


def test_crops_are_uniform_and_independent() -> None:
    keys = seeding.row_keys(0, np.uint64(0), positions=np.arange(4000), rows=np.arange(4000))
    quarter = Crop((0.25, 0.25), (1.0, 1.0))
    boxes = np.array([crop_box(int(key), 1000, width=1000, size=(64, 64), crop=quarter) for key in keys])
    top, left, flip = boxes[:, 0], boxes[:, 1], boxes[:, 4]
    assert (boxes[:, 2] == 500).all()
    for offset in (top, left):
        assert stats.kstest((offset + 0.5) / 501, "uniform").pvalue > 1e-3
    assert stats.binomtest(int(flip.sum()), 4000, 0.5).pvalue > 1e-3
    for a, b in ((top, left), (top[1:], top[:-1]), (left, flip)):
        assert abs(stats.pearsonr(a, b).statistic) < 0.06
    keys = seeding.row_keys(0, 1, positions=np.arange(4000), rows=np.arange(4000))
    later = np.array([crop_box(int(key), 1000, width=1000, size=(64, 64), crop=quarter)[0] for key in keys])
    assert abs(stats.pearsonr(top, later).statistic) < 0.06


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(float(((a.astype(float) - b) ** 2).mean()), 1e-9))


@pytest.mark.parametrize("size", [(64, 64), (32, 64), (100, 180), (250, 160)])
def test_training_is_near_pillow(beton: Beton, size: tuple[int, int]) -> None:
    keys = seeding.row_keys(1, 2, positions=np.arange(beton.rows), rows=np.arange(beton.rows))
    crop = Crop((0.3, 1.0), (3 / 4, 4 / 3), 0.5)
    out = train(beton, keys, size, crop)
    for row in range(beton.rows):
        image = pixels(beton, row)
        top, left, height, width, flip = crop_box(
            int(keys[row]), image.height, width=image.width, size=size, crop=crop
        )
        view = image.crop((left, top, left + width, top + height)).resize(
            size[::-1], Image.Resampling.BILINEAR
        )
        expected = np.array(view)[:, ::-1] if flip else np.array(view)
        raw = beton.descriptors["mode"][row] == 1
        assert psnr(out[row], expected) > (50 if raw else 27), (row, image.size)
        if raw:
            assert np.abs(out[row].astype(int) - expected).max() <= 2


def test_training_quality_on_photographs(flowers17: Path, tmp_path: Path) -> None:
    """Lowest and median PSNR to full decodes: Pillow's antialiased bilinear resize, and OpenCV's area averaging."""
    import cv2

    files = sorted((flowers17 / "train").iterdir())[::60]
    beton = write(tmp_path / "a.beton", [file.read_bytes() for file in files])
    keys, crop = (
        seeding.row_keys(1, 2, positions=np.arange(beton.rows), rows=np.arange(beton.rows)),
        Crop(hflip_p=0.0),
    )
    for size, bilinear, area in ((224, (38, 44), (32, 40)), (320, (44, 48), (38, 45))):
        out, psnrs = train(beton, keys, (size, size), crop), []
        for row in range(beton.rows):
            image = pixels(beton, row)
            top, left, h, w, _ = crop_box(
                int(keys[row]), image.height, width=image.width, size=(size, size), crop=crop
            )
            view = image.crop((left, top, left + w, top + h))
            smooth = np.array(view.resize((size, size), Image.Resampling.BILINEAR))
            mean = cv2.resize(np.array(view), (size, size), interpolation=cv2.INTER_AREA)
            psnrs.append((psnr(out[row], smooth), psnr(out[row], mean)))
        for values, (least, median) in zip(np.transpose(psnrs), (bilinear, area), strict=True):
            assert values.min() > least and np.median(values) > median


def test_a_constant_image_stays_constant(tmp_path: Path) -> None:
    values = [0, 1, 127, 128, 200, 254, 255]
    beton = write(tmp_path / "a.beton", [np.full((77, 91, 3), v, np.uint8) for v in values])
    keys = seeding.row_keys(5, 0, positions=np.arange(len(values)), rows=np.arange(len(values)))
    for size in ((32, 32), (224, 224), (13, 100), (76, 90)):
        out = train(beton, keys, size, Crop())
        for row, value in enumerate(values):
            assert (out[row] == value).all()


def test_flip_is_a_mirror(beton: Beton) -> None:
    keys = np.arange(beton.rows).astype(np.uint64)
    plain = train(beton, keys, (50, 70), Crop(hflip_p=0.0))
    assert np.array_equal(train(beton, keys, (50, 70), Crop(hflip_p=1.0)), plain[:, :, ::-1])


@pytest.mark.parametrize("size", [(64, 64), (3, 5), (31, 97), (200, 333)])
def test_fast_code_equals_portable_code(beton: Beton, size: tuple[int, int]) -> None:
    keys = seeding.row_keys(1, 2, positions=np.arange(beton.rows), rows=np.arange(beton.rows))
    crop, outs = Crop((0.1, 1.0)), []
    for on in (0, 1, 0):
        library().ff_portable(on)
        outs.append(train(beton, keys, size, crop))
    assert np.array_equal(outs[0], outs[1]) and np.array_equal(outs[0], outs[2])


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A JPEG with one to three bytes of its scan flipped, replaced by markers, removed or inserted, or cut short."""
    start = data.index(b"\xff\xda") + 10
    for _ in range(rng.integers(1, 4)):
        offset = int(rng.integers(start, len(data)))
        replacements = [
            bytes([data[offset] ^ 1 << rng.integers(8)]), b"\xff", bytes([255, rng.integers(0xD0, 0xDA)]), b"",
            rng.bytes(2) + data[offset : offset + 1],
        ]  # fmt: skip
        method = int(rng.integers(len(replacements) + 1))
        data = (
            data[:offset] + replacements[method] + data[offset + 1 :]
            if method < len(replacements)
            else data[: offset + 1]
        )
    return data


@pytest.mark.parametrize("as_file", [False, True])
def test_libjpeg_judges_what_looks_like_damage(tmp_path: Path, portable: None, as_file: bool) -> None:
    """entropy.h is in use, and accepts and refuses the same files as libjpeg, with the same pixels and messages.

    Checked on crops of rows, and on whole files, where bytes after the last block count too.
    """
    rng = np.random.default_rng(0)
    kinds = [
        jpeg(picture(40, 50, 1)),
        jpeg(picture(40, 50, 2), restart_marker_blocks=2),
        jpeg(picture(40, 50, 3), optimize=True, quality=100),
        jpeg(picture(40, 50, 4).convert("L")),
    ]
    files = [damaged(kinds[i % 4], rng) for i in range(400)]
    for kind in kinds:
        markers = (b"\xff\0", b"\xff\xd0", b"\xff\xd8", b"\xff\xda", b"\xff\xfe\0\4ab")
        tails = (b"", b"\0", b"\xff", bytes(99), *markers)
        files += [kind[:-2] + tail + b"\xff\xd9" + behind for tail in tails for behind in (b"", b"behind")]
    with BetonWriter(tmp_path / "a.beton", len(files)) as writer:
        for i, data in enumerate(files):
            writer.append_jpeg(data, height=40, width=50, label=0, index=i)
        writer.commit()
    beton, refused = open_beton(tmp_path / "a.beton"), 0
    for row, data in enumerate(files):
        outcomes = []
        for on in (1, 0):
            assert library().ff_portable(on) == 1 - on
            out = np.zeros((1, 30, 30, 3), np.uint8)
            try:
                if as_file:
                    out = decode_file(data, (40, 50), (40, 50))
                else:
                    decode_train(
                        beton,
                        np.array([row]),
                        keys=np.array([row], np.uint64),
                        out=out,
                        crop=Crop((0.5, 1)),
                        threads=1,
                    )
                outcomes.append((out.tobytes(), ""))
            except (CorruptionError, InputError) as error:
                outcomes.append((b"", str(error)))
        assert outcomes[0] == outcomes[1]
        refused += bool(outcomes[0][1])
    assert 100 < refused < 390


def test_threads_order_and_batch_do_not_matter(beton: Beton) -> None:
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(beton.rows), 2))
    keys = seeding.row_keys(1, 2, positions=np.arange(rows.size), rows=rows)
    expected, actual = np.empty((2, rows.size, 48, 64, 3), np.uint8)
    decode_train(beton, rows, keys=keys, out=expected, crop=Crop(), threads=1)
    decode_train(beton, rows, keys=keys, out=actual, crop=Crop(), threads=3)
    assert np.array_equal(expected, actual)
    reverse, single = rows.size - 1 - np.arange(rows.size), np.empty((1, 48, 64, 3), np.uint8)
    decode_train(beton, rows[reverse], keys=keys[reverse], out=actual, crop=Crop(), threads=2)
    assert np.array_equal(expected, actual[reverse])
    for i in range(0, rows.size, 17):
        decode_train(beton, rows[i : i + 1], keys=keys[i : i + 1], out=single, crop=Crop(), threads=4)
        assert np.array_equal(single[0], expected[i])
    first, second = expected[rows == beton.rows - 1]
    assert not np.array_equal(first, second)  # another key, another crop


def broken(data: bytes, fault: str) -> bytes:
    """A JPEG of 90 x 120 pixels with this fault."""
    start = data.index(b"\xff\xda") + 14
    if fault == "cut":
        return data[: start + (len(data) - start) // 3]
    if fault == "zeros":
        return data[: start + 50] + bytes(len(data) - start - 50)
    if fault == "header":
        return b"\x00" * 20 + data[20:]
    if fault == "cmyk":
        return jpeg(picture(90, 120, 0).convert("CMYK"))
    return jpeg(picture(91, 120, 0))  # "shape"


@pytest.mark.parametrize("fault", ["cut", "zeros", "header", "cmyk", "shape"])
@pytest.mark.parametrize("threads", [1, 3])
def test_an_undecodable_row_is_named(tmp_path: Path, fault: str, threads: int) -> None:
    good, size = [jpeg(picture(90, 120, i)) for i in range(8)], (40, 40)
    with BetonWriter(tmp_path / "a.beton", 8) as writer:
        for i, data in enumerate(good):
            writer.append_jpeg(
                broken(data, fault) if i in (3, 6) else data, height=90, width=120, label=0, index=70 + i
            )
        writer.commit()
    beton, out = open_beton(tmp_path / "a.beton"), np.empty((8, *size, 3), np.uint8)
    keys, rows = np.arange(8, dtype=np.uint64), np.arange(8)
    message = r"row 3 \(row 73 of folds.csv\): cannot be decoded \(.+\)"
    with pytest.raises(CorruptionError, match=message):
        decode_train(beton, rows, keys=keys, out=out, crop=FULL_CROP, threads=threads)
    with pytest.raises(CorruptionError, match=message):
        decode_eval(beton, rows, out=out, factor=1.0, interpolation="bicubic", threads=threads)
    fine = np.array([0, 1, 2, 4, 5, 7])  # the kernel still works after the errors
    decode_train(beton, fine, keys=keys[fine], out=out[:6], crop=FULL_CROP, threads=threads)
    middle = pixels(beton, 4).crop((15, 0, 105, 90))
    assert psnr(out[3], np.array(middle.resize((40, 40), Image.Resampling.BILINEAR))) > 27


def test_wrong_arguments_are_refused(beton: Beton) -> None:
    keys, out = np.zeros(2, np.uint64), np.empty((2, 8, 8, 3), np.uint8)
    with pytest.raises(InputError, match=r"rows are 0\.\.98, got 0\.\.99"):
        decode_train(beton, np.array([0, 99]), keys=keys, out=out, crop=Crop(), threads=1)
    with pytest.raises(InputError, match="out must be contiguous"):
        decode_eval(
            beton, np.array([0, 1]), out=out[:, :, ::2], factor=1.0, interpolation="bicubic", threads=1
        )
    with pytest.raises(InputError, match="3 keys for 2 rows"):
        decode_train(beton, np.array([0, 1]), keys=np.zeros(3, np.uint64), out=out, crop=Crop(), threads=1)
    with pytest.raises(InputError, match="interpolation = nearest: must be one of bilinear, bicubic"):
        decode_eval(beton, np.array([0, 1]), out=out, factor=1.0, interpolation="nearest", threads=1)


def test_a_missing_kernel_says_make_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match="not compiled; run make setup"):
        kernel.library.__wrapped__()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of numba and ffcv
def test_stock_ffcv_trains_on_our_betons(tmp_path: Path) -> None:
    from fastflower.bench.stock_ffcv import stock_loader

    images = [picture(64, 64, i) for i in range(10)]
    with BetonWriter(tmp_path / "a.beton", 10) as writer:
        for i, image in enumerate(images):
            if i % 2:
                writer.append_raw(np.array(image), i % 3, i)
            else:
                writer.append_jpeg(jpeg(image, quality=98), height=64, width=64, label=i % 3, index=i)
        writer.commit()
    batches = [
        (batch[0].numpy().copy(), batch[1].numpy().copy())
        for batch in stock_loader(tmp_path / "a.beton", (64, 64), crop=FULL_CROP, batch=4, threads=1)
    ]
    assert [len(batch[0]) for batch in batches] == [4, 4, 2]
    assert np.concatenate([batch[1] for batch in batches])[:, 0].tolist() == [i % 3 for i in range(10)]
    for decoded, image in zip(np.concatenate([batch[0] for batch in batches]), images, strict=True):
        assert psnr(decoded, np.array(image)) > 28
