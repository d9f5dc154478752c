"""JPEGs without their last bytes, or that make libjpeg warn: predicted from the pixels that are there, with a note."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastflower.core.errors import InputError
from fastflower.data.readers import image_files
from support.predictor_runs import jpeg, write_photographs

WHOLE = jpeg(5, quality=90)
PROGRESSIVE = jpeg(5, progressive=True)
END = b"\xff\xd9"
COMPLETE = {
    "no end": WHOLE[:-2],
    "half an end": WHOLE[:-1],
    "zeros for the end": WHOLE[:-2] + bytes(2),
    "many zeros for the end": WHOLE[:-2] + bytes(500),
    "bytes before the end": WHOLE[:-2] + b"\x12\x34\x56" + END,
    "bytes after the end": WHOLE + b"\0trailer",
    "JFIF 0.00": WHOLE.replace(b"JFIF\0\1\1", b"JFIF\0\0\0"),
    "JFIF 2.01": WHOLE.replace(b"JFIF\0\1\1", b"JFIF\0\2\1"),
    "JFIF 3.00": WHOLE.replace(b"JFIF\0\1\1", b"JFIF\0\3\0"),
    "odd scan": WHOLE.replace(b"\3\x11\0\x3f\0", b"\3\x11\0\x3e\0"),
    "odd scan of zeros": WHOLE.replace(b"\3\x11\0\x3f\0", b"\3\x11\0\0\0"),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_a_complete_picture_has_conversions_pixels(code, name):
    data = COMPLETE[name]
    assert data != WHOLE
    Path("a.jpg").write_bytes(data)
    got = np.asarray(code.pictures.read(b"a.jpg")[0])
    np.testing.assert_array_equal(got, np.asarray(image_files.decode(WHOLE)))
    np.testing.assert_array_equal(got, np.asarray(image_files.decode(data)))


@pytest.mark.parametrize("whole", [WHOLE, PROGRESSIVE], ids=["baseline", "progressive"])
@pytest.mark.parametrize("share", [0.7, 0.9])
def test_a_cut_picture_is_predicted_from_what_is_there(run, code, capsys, whole, share):
    """Conversion refuses it: a picture without all its pixels is no example to learn from."""
    write_photographs(2)
    data = whole[: int(share * len(whole))]
    Path("test_dataset/cut.jpg").write_bytes(data)
    exit_code, rows = run()
    assert exit_code == 0 and rows[3][0] == "cut.jpg"
    about = json.loads(Path("out/submission.json").read_text())
    assert about["predicted"] == 3 and about["unreadable"] == {} and list(about["partial"]) == ["cut.jpg"]
    assert about["partial"]["cut.jpg"].startswith("ends early (image file is truncated")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("predict: 'cut.jpg': ends early (") and line.endswith(
        "from the pixels that are there"
    )
    gap = np.abs(
        np.asarray(code.pictures.read(b"test_dataset/cut.jpg")[0], float)
        - np.asarray(image_files.decode(whole))
    )
    assert gap[:8].mean() < 8 and gap.mean() < 60
    if whole is WHOLE:
        with pytest.raises(InputError):
            image_files.decode(data)


def test_a_picture_without_any_pixels_is_unreadable(run):
    write_photographs(1)
    start = WHOLE.index(b"\xff\xda") + 14
    for size in (start - 20, start, start + 2):
        Path(f"test_dataset/cut{size}.jpg").write_bytes(WHOLE[:size])
    run()
    about = json.loads(Path("out/submission.json").read_text())
    assert len(about["unreadable"]) == 3 and about["partial"] == {}
