"""The start of every command: help and refusals come before the libraries that take seconds to import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastflower.__main__ import COMMANDS

HEAVY = {
    "torch",
    "composer",
    "timm",
    "torchvision",
    "torchmetrics",
    "sklearn",
    "matplotlib",
    "pandas",
    "captum",
}
RECIPE = (  # arguments of a command that takes a recipe, and a part of the line that refuses them
    (["optt.lr=1"], "unknown key optt; did you mean opt?"),
    (["opt.lr=fast"], "opt.lr = fast: must be a number or auto"),
    (["absent.yaml"], "no recipe"),
    (["a.yaml", "b.yaml"], "got 2 recipe files"),
)
RECIPES = (*RECIPE[:3], (["{demo}", "absent.yaml"], "no recipe"))  # of one that takes several
REFUSED: dict[str, tuple[tuple[list[str], str], ...]] = {
    "convert": (
        *RECIPE,
        ([], "data.root = data/train: no such folder"),
        (["train.save_every=5"], "must be epochs"),
    ),
    "train": (
        *RECIPE,
        ([], "folds.csv: no such file; run convert first"),
        (["train.save_every=5"], "train.save_every = 5: must be epochs such as 1ep"),
        (["tta.hflip=true", "data.flips_keep_class=false"], "flips change the class"),
    ),
    "lrfind": (*RECIPE, ([], "folds.csv: no such file; run convert first")),
    "evaluate": (*RECIPES, ([], "train first, or change ensembling.find_pattern")),
    "ensemble": (
        *RECIPES,
        ([], "no results/results/default/scores.json"),
        (
            ["{demo}", "seed=1", "--save", "{scratch}"],
            "--save and --predict are for the runs of one experiment",
        ),
    ),
    "export": (
        *RECIPES,
        ([], "no member in results/model/default matches"),
        (["{demo}", "{scratch}", "--members", "a.pth"], "--members names the members of all experiments"),
    ),
    "report": (
        (["absent"], "no results/results/absent/scores.json"),
        (["a", "--format", "pdf"], "--format pdf"),
        (["a", "seed=1"], "a is neither a recipe"),
    ),
    "campaign": (
        (["absent.yaml"], "no recipe"),
        (["{demo}", "optt.lr=1"], "unknown key optt"),
        (["{demo}", "opt.lr=[1e-3,fast]"], "must be a number or auto"),
        ([], "got no recipe or experiment"),
    ),
    "demo": ((["words"], "no recipes/demo.yaml"),),
    "doctor": (),
    "sample_data": ((["cats"], "sample_data takes one of"), (["eyes", "rows=few"], "must be a whole number")),
    "explain": (
        (["opt.lr_reff"], "did you mean opt.lr_ref?"),
        (["absent.yaml"], "no recipe"),
        (["a", "b"], "one recipe or experiment"),
        (["--format", "pdf"], "--format md"),
    ),
    "diff": ((["a.yaml"], "diff takes two"), (["absent.yaml", "b.yaml"], "no recipe")),
    "weights": (
        ([], "no recipe in"),
        (["absent.yaml"], "no recipe"),
        (["resnet18", "absent.pth"], "absent.pth: no such file or folder"),
        (["resnet18", "--ema"], "choose the weights of a file"),
        (["resnet18", "absent.pth", "--ema", "--raw"], "exclude each other"),
    ),
    "bench": (
        (["nothing"], "choose from loader"),
        *(
            ([bench, "--data", "absent"], "no folder with JPEG files")
            for bench in ("loader", "convert", "fuzz")
        ),
        (["predict", "--data", "absent"], "no folder with JPEG files"),
        (["decoder", "--seeds", "1"], "an interval needs at least 2"),
    ),
}
# runs one command several times; after each, its exit code and the heavy modules so far
PROGRAM = """
import json, runpy, sys
module, runs, heavy = sys.argv[1], json.loads(sys.argv[2]), set(json.loads(sys.argv[3]))
for arguments in runs:
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(f"fastflower.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print("\\n" + json.dumps([end.code or 0, sorted(heavy & set(sys.modules))]), flush=True)
"""


def ends(command: str, runs: list[list[str]], repo: Path) -> tuple[list[tuple[int, list[str]]], str]:
    """The exit code and the heavy modules after each run of a command, and all of its standard error."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, command, json.dumps(runs), json.dumps(sorted(HEAVY))],
        env=os.environ | {"PYTHONPATH": str(repo), "COLUMNS": "300"}, capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip
    lines = [line for line in process.stdout.splitlines() if line.startswith("[") and line.endswith("]]")]
    return [tuple(json.loads(line)) for line in lines], process.stderr


@pytest.mark.parametrize("command", REFUSED)
def test_help_and_refusals_import_nothing_heavy(command: str, repo: Path) -> None:
    refused = [
        (
            [
                argument.format(**{name: repo / f"recipes/{name}.yaml" for name in ("demo", "scratch")})
                for argument in arguments
            ],
            text,
        )
        for arguments, text in REFUSED[command]
    ]
    helped = [[bench, "--help"] for bench in ("loader", "convert", "predict", "decoder", "fuzz")]
    runs = [["--help"], *(helped if command == "bench" else []), *(arguments for arguments, _ in refused)]
    found, errors = ends(command, runs, repo)
    codes = [0] * (len(runs) - len(refused)) + [2] * len(refused)
    assert found == [(code, []) for code in codes]
    lines = errors.splitlines()
    assert len(lines) == len(refused)
    for line, (_, text) in zip(lines, refused, strict=True):
        assert line.startswith("fastflower: ") and text in line


def test_every_command_is_here(repo: Path) -> None:
    folder = repo / "fastflower"
    commands = {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__main__.py")
    }
    assert commands - {"__init__", "__main__"} == set(REFUSED) == set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rooms", "unused"),
    [
        (
            ("evaluation.inference", "evaluation.gradcam", "bundle.gates", "bundle.writer", "bundle.members"),
            {"composer", "torchmetrics", "sklearn", "matplotlib", "pandas"},
        ),
        (("training.session",), {"sklearn", "pandas", "captum"}),
        (("data.samples.flowers", "data.samples.eyes", "data.conversion.pipeline"), {"torch", "sklearn"}),
    ],
    ids=["evaluate and export", "train", "sample_data and convert"],
)
def test_rooms_import_nothing_that_they_do_not_use(
    rooms: tuple[str, ...], unused: set[str], repo: Path
) -> None:
    imports = ", ".join(f"fastflower.{room}" for room in rooms)
    process = subprocess.run(
        [sys.executable, "-c", f"import sys, {imports}; print(sorted({unused!r} & set(sys.modules)))"],
        env=os.environ | {"PYTHONPATH": str(repo)}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert process.stdout.strip() == "[]"
