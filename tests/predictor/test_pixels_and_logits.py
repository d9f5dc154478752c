"""The predictor's pixels and logits are those of the trainer, whatever the order, the batch and the processor."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastflower.data.betons.beton_file import open_beton
from fastflower.data.betons.beton_writer import BetonWriter
from fastflower.data.decode.kernel import decode_eval
from fastflower.data.readers import image_files
from support.predictor_runs import (
    CODE,
    IDS,
    photograph,
    read_rows,
    save_random_member,
    write_bundle,
    write_photographs,
)

FAMILIES = [
    ("convnextv2_atto", "linear"),
    ("vit_tiny_patch16_224", "linear"),
    ("tf_efficientnetv2_b0", "linear"),
    ("swin_tiny_patch4_window7_224", "linear"),
    ("mobilenetv3_small_100", "linear"),
    ("resnet10t", "arcface"),
]


def odd_pictures(folder: Path) -> list[Path]:
    """Image files of every mode that users may have."""
    picture = photograph(1, (230, 170))
    grey16 = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 250)
    alpha = picture.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(picture.size))
    images = {
        "rgb.jpg": picture, "grey.jpg": picture.convert("L"), "cmyk.jpg": picture.convert("CMYK"),
        "palette.png": picture.quantize(17), "alpha.png": alpha, "grey_alpha.png": alpha.convert("LA"),
        "sixteen.png": grey16, "one.png": picture.convert("1"), "picture.bmp": picture, "picture.webp": picture,
        "tiny.png": picture.resize((1, 1)), "wide.png": picture.resize((900, 3)), "tall.jpg": picture.resize((40, 800)),
        "large.jpg": picture.resize((640, 480)),
    }  # fmt: skip
    for name, image in images.items():
        image.save(folder / name)
    keyed = picture.quantize(9)
    keyed.save(folder / "keyed.gif", transparency=3)
    picture.save(folder / "frames.gif", save_all=True, append_images=[photograph(2, (230, 170))])
    picture.save(folder / "progressive.jpg", progressive=True, quality=40)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        picture.save(folder / f"turned{turn}.jpg", exif=exif)
    picture.save(folder / "broken_exif.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1\2")
    return sorted(folder.iterdir())


def test_pixels_are_those_of_the_betons(tmp_path, code):
    folder = tmp_path / "odd"
    folder.mkdir()
    files = odd_pictures(folder)
    with BetonWriter(tmp_path / "val.beton", len(files)) as writer:
        for row, file in enumerate(files):
            image = image_files.decode(file.read_bytes())
            writer.append_raw(np.array(image_files.stored(image, 146)), 0, row)
        writer.commit()
    beton = open_beton(tmp_path / "val.beton")
    for row, file in enumerate(files):
        for height, width, factor, interpolation in (
            (128, 128, 1.14, "bicubic"),
            (32, 48, 1.0, "bilinear"),
            (32, 64, 0.0, "bilinear"),  # the whole picture
        ):
            out = np.empty((1, height, width, 3), np.uint8)
            decode_eval(
                beton, np.array([row]), out=out, factor=factor, interpolation=interpolation, threads=1
            )
            crop = {"height": height, "width": width, "factor": factor, "interpolation": interpolation}
            crop["stored_side"] = 146
            ((got,), _) = code.pictures.prepare(os.fsencode(file), [crop])
            np.testing.assert_array_equal(got, out[0], err_msg=file.name)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "head"), FAMILIES)
def test_logits_are_the_networks(tmp_path, code, monkeypatch, backbone, head):
    (member,) = write_bundle(
        tmp_path / "bundle", [save_random_member(tmp_path, backbone, head=head)], "tta.scales=[32,80]"
    )
    description, hashes = code.bundles.read(str(tmp_path / "bundle"))
    networks = code.networks.Networks(str(tmp_path / "bundle"), description, hashes=hashes, device="cpu")
    assert networks.notes == []
    photograph(3, (200, 150)).save(tmp_path / "picture.png")
    crops, _ = code.pictures.prepare(os.fsencode(tmp_path / "picture.png"), description["crops"])
    noise = [[np.roll(array, 11 * turn, axis=1) for array in crops] for turn in range(5)]
    for batch in (1, 2, 5):
        got = networks.logits(noise[:batch])
        assert got.shape == (batch, 1, 4, len(IDS))
        for row in range(batch):
            for view in range(4):
                array = noise[row][view // 2]
                image = torch.from_numpy(array[:, ::-1].copy() if view % 2 else array)
                with torch.inference_mode():
                    expected = member.network(image.permute(2, 0, 1)[None].float())[0].numpy()
                assert np.abs(got[row, 0, view] - expected).max() <= 1e-4
    for dtype, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.05)):
        monkeypatch.setattr(code.networks, "candidates", lambda *_, dtype=dtype, **__: [("cpu", dtype)])
        half = code.networks.Networks(str(tmp_path / "bundle"), description, hashes=hashes, device="cpu")
        assert half.members[0]["inputs"][0][0].dtype == dtype and half.notes == []
        gap = np.abs(half.logits(noise[:1]) - got[:1]).max()
        assert 0 < gap <= tolerance * max(1, np.abs(got[:1]).max())


def test_fused_logits_over_t_give_the_confidence(run, code, exported):
    write_photographs(3)
    exit_code, rows = run("--logits", "logits.npz")
    assert json.loads(Path("out/submission.json").read_text())["logits"] == 3
    assert exit_code == 0
    logits = np.load("logits.npz")["logits"]
    assert logits.shape == (3, 2, 4, len(IDS))
    odds = np.exp(logits.astype(np.float64).mean(axis=(1, 2)) / 1.5)
    odds /= odds.sum(axis=1, keepdims=True)
    assert rows[0] == ["filename", "category_id", "confidence"]
    for row, row_odds in zip(rows[1:], odds, strict=True):
        assert row[1:] == [IDS[row_odds.argmax()], f"{row_odds.max():.6f}"]
    with torch.inference_mode():
        crop = {"height": 32, "width": 32, "factor": 1.14, "interpolation": "bicubic", "stored_side": 73}
        ((array,), _) = code.pictures.prepare(b"test_dataset/000.jpg", [crop])
        expected = (
            exported.members[1].network(torch.from_numpy(array).permute(2, 0, 1)[None].float())[0].numpy()
        )
    np.testing.assert_allclose(logits[0, 1, 0], expected, atol=1e-4)


def test_each_member_sees_pictures_as_it_was_trained(tmp_path, code):
    """Two backbones of different size, mean, crop and resampling."""
    changes = {
        "mean": [0.1, 0.5, 0.9],
        "std": [0.5, 0.4, 0.3],
        "interpolation": "bilinear",
        "resize_factor": 1.0,
    }
    paths = [
        save_random_member(tmp_path),
        save_random_member(tmp_path, "test_resnet", seed=1, stored_side=60, **changes),
    ]
    members = write_bundle(tmp_path / "bundle", paths, "tta.scales=[32]", "tta.hflip=false")
    description, hashes = code.bundles.read(str(tmp_path / "bundle"))
    networks = code.networks.Networks(str(tmp_path / "bundle"), description, hashes=hashes, device="cpu")
    assert networks.notes == []
    photograph(3, (200, 150)).save(tmp_path / "picture.png")
    got = networks.logits(
        [code.pictures.prepare(os.fsencode(tmp_path / "picture.png"), description["crops"])[0]]
    )
    for position, member in enumerate(members):
        crop = {"height": 32, "width": 32, "factor": member.meta.resize_factor}
        crop |= {name: getattr(member.meta, name) for name in ("interpolation", "stored_side")}
        ((array,), _) = code.pictures.prepare(os.fsencode(tmp_path / "picture.png"), [crop])
        with torch.inference_mode():
            expected = member.network(torch.from_numpy(array).permute(2, 0, 1)[None].float())[0].numpy()
        np.testing.assert_allclose(got[0, position, 0], expected, atol=1e-4)
    assert len(description["crops"]) == 2


def test_a_member_without_finite_logits_has_no_say(code, exported):
    description, hashes = code.bundles.read(str(exported.folder))
    networks = code.networks.Networks(str(exported.folder), description, hashes=hashes, device="cpu")
    logits = np.ones((3, 2, 4, 3), np.float32)
    logits[:, 1] = 3
    logits[1, 1, 2, 0] = np.nan
    logits[2] = np.inf
    fused = networks.fuse(logits)
    np.testing.assert_allclose(fused[:2] * 1.5, [[2, 2, 2], [1, 1, 1]])
    table = code.table.Table([b"a", b"b", b"c"], IDS, prior=[0.2, 0.5, 0.3])
    table.fill([0, 1, 2], fused)
    assert table.known.tolist() == [True, True, False] and 2 in table.unreadable


def test_two_runs_and_any_number_of_threads_give_the_same_bytes(run):
    write_photographs(7)
    tables = []
    for threads in ("1", "1", "3"):
        assert run("--threads", threads)[0] == 0
        tables.append(Path("out/submission.csv").read_bytes())
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.slow
def test_neither_order_nor_company_change_a_row(run):
    """All together, in three parts and in reverse order: the same classes, and confidences up to rounding."""
    write_photographs(36)
    files = sorted(Path("test_dataset").iterdir())
    data = [file.read_bytes() for file in files]

    def rows(order: list[int]) -> list[tuple[str, float]]:
        shutil.rmtree("test_dataset")
        Path("test_dataset").mkdir()
        for position, number in enumerate(order):
            Path(f"test_dataset/{position:03d}.jpg").write_bytes(data[number])
        return [(row[1], float(row[2])) for row in run("--threads", "3")[1][1:]]

    together = rows(list(range(36)))
    in_parts = [row for start in (0, 12, 24) for row in rows(list(range(start, start + 12)))]
    for result in (in_parts, rows(list(range(36))[::-1])[::-1]):
        assert [row[0] for row in result] == [row[0] for row in together]
        np.testing.assert_allclose([row[1] for row in result], [row[1] for row in together], atol=1e-5)


@pytest.mark.slow
def test_an_old_processor_gives_the_same_rows(run, exported):
    """Without AVX: torch's plain kernels, and oneDNN's for SSE 4.1."""
    write_photographs(3)
    rows = run()[1]
    command = [
        sys.executable,
        str(CODE / "predict.py"),
        "test_dataset",
        "old.csv",
        "--bundle",
        str(exported.folder),
    ]
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    old = read_rows(Path("old.csv"))
    assert [row[:2] for row in old] == [row[:2] for row in rows]
    np.testing.assert_allclose(
        [float(row[2]) for row in old[1:]], [float(row[2]) for row in rows[1:]], atol=1e-4
    )
