"""Installing: a wheel has the kernel, the predictor and the recipes; a machine without FFCV does all but compare."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

# imports every module but the peer itself, as a machine without FFCV would
BLOCKED = """
import importlib, pathlib, sys
sys.modules["ffcv"] = None
root = pathlib.Path(sys.argv[1])
for path in sorted((root / "fastflower").rglob("*.py")):
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    if not name.endswith(("__main__", "bench.stock_ffcv", "fastflower.train")) and "/bench/" not in str(path):
        importlib.import_module(name.removesuffix(".__init__"))
from fastflower.core.errors import run_command
from fastflower.bench import loader
sys.argv = ["loader", "--data", str(root / "photographs")]
run_command(loader.main)
"""


@pytest.mark.slow
def test_without_ffcv_all_rooms_import_and_the_comparison_says_what_is_missing(
    repo: Path, tmp_path: Path
) -> None:
    (tmp_path / "fastflower").symlink_to(repo / "fastflower")
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs/a.jpg").write_bytes(b"\xff\xd8\xff\xd9")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BLOCKED, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(repo)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert (
        "this compares with FFCV, which is not installed; pip install -e '.[ffcv]'"
        in done.stderr.splitlines()[-1]
    )


def test_ffcv_is_an_extra_of_the_lock(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    assert not [name for name in project["dependencies"] if name.startswith(("ffcv", "onnx"))]
    (pinned,) = project["optional-dependencies"]["ffcv"]
    assert f"\n{pinned} \\" in (repo / "requirements.lock").read_text()
    assert "onnx" not in (repo / "requirements.lock").read_text()


def test_the_citation_is_of_this_project(repo: Path) -> None:
    citation = yaml.safe_load((repo / "CITATION.cff").read_text())
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"] and citation["title"].startswith(project["name"])
    assert "version" not in citation  # the package has it


@pytest.mark.slow
def test_a_wheel_of_the_sdist_runs_elsewhere(repo: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        repo, source,
        ignore=shutil.ignore_patterns(
            ".venv", ".venv-next", ".git", "data", "results", "build", "*.so", "*.egg-info", "__pycache__"
        ),
    )  # fmt: skip
    shutil.copytree(repo / "fastflower/data", source / "fastflower/data", dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("*.so", "__pycache__"))  # fmt: skip
    build = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"

    def built(kind: str, folder: Path) -> Path:
        command = [sys.executable, "-c", build, kind, str(tmp_path)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=True)
        return tmp_path / done.stdout.splitlines()[-1]

    archive = built("sdist", source)
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    wheel = built("wheel", tmp_path / "unpacked" / archive.name.removesuffix(".tar.gz"))
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "fastflower/data/decode/_decode",
        "fastflower/shipped/code/predict.py",
        "fastflower/shipped/recipes/convnext.yaml",
    ):
        assert [name for name in names if part in name], part
    assert "fastflower/py.typed" in names and not [
        name for name in names if name.startswith(("tests", "code"))
    ]
    site = tmp_path / "site"
    install = ["install", "-q", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, timeout=120)
    text = (
        "import fastflower.data.decode.kernel as kernel; kernel.library();"
        "from fastflower.core import runs; from fastflower.bundle.tracing import CODE;"
        "print(kernel.__file__, CODE, runs.shipped('recipes'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    module, code, recipes = done.stdout.split()
    assert module.startswith(str(site)) and code.startswith(str(site)) and recipes.startswith(str(site))
    assert (Path(code) / "predict.py").is_file() and (Path(recipes) / "convnext.yaml").is_file()
