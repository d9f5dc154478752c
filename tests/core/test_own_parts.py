"""Parts of the user's own: found and checked once, and again when their module has changed."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest

from fastflower.core import own_parts
from fastflower.core.errors import InputError


def test_a_part_is_checked_once_and_again_after_its_module_is_imported_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_part_of_images.py").write_text("def brighter(images, keys):\n    return images + 1\n")
    checked, original = [], inspect.signature
    monkeypatch.setattr(own_parts.inspect, "signature", lambda part: checked.append(part) or original(part))
    name = "my_part_of_images:brighter"
    assert [own_parts.call("aug.extra", name, value, None) for value in range(3)] == [1, 2, 3]
    assert len(checked) == 1
    with pytest.raises(InputError, match=r"takes \(images, keys\), and is called with \(groups\)"):
        own_parts.find("opt.name", name)  # known under another key only
    Path("my_part_of_images.py").write_text("def brighter(images):\n    return images + 2\n")
    del sys.modules["my_part_of_images"]
    sys.path_importer_cache.clear()
    with pytest.raises(InputError, match=r"takes \(images\), and is called with \(images, keys\)"):
        own_parts.find("aug.extra", name)
    del sys.modules["my_part_of_images"]
