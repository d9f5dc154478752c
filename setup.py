"""The part of the build that pyproject.toml cannot say: the predictor and the recipes go into the wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithFolders(build_py):
    """Copies code/ and recipes/ to fastflower/shipped/, where `runs.shipped` finds them without a repository."""

    def run(self) -> None:
        super().run()
        for name in () if self.editable_mode else ("code", "recipes"):
            target = Path(self.build_lib) / "fastflower/shipped" / name
            ignored = shutil.ignore_patterns("__pycache__", "*.toml")
            shutil.copytree(name, target, ignore=ignored, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithFolders})
