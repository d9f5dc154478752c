"""doctor: each check on a machine that passes it and on one that fails it."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastflower import doctor
from fastflower.core.errors import InputError
from support import toy_project


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """A machine with no programs on PATH and a repository that was never set up."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor, "LOCK", "requirements.lock")  # also where the tests run in .venv-next
    monkeypatch.setattr(doctor, "SETUP", "make setup")
    (tmp_path / "fastflower/data/decode").mkdir(parents=True)
    (tmp_path / "fastflower/data/decode/decode.c").write_text("int answer(void) { return 42; }\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project.optional-dependencies]\nstack = ["lightgbm>=4.7"] # trees\ndev = [\n  "ruff>=0.17",\n]\n'
    )
    return tmp_path


def test_a_bare_machine_lacks_tools_packages_and_kernel(bare, capsys):
    (bare / "requirements.lock").write_text("numpy==0.0.1 \\\n    --hash=sha256:00\nnothing-such==1.0\n")
    assert doctor.main([]) == 4
    output = capsys.readouterr().out
    assert "lacks  compiler         not found; apt-get install g++" in output
    assert "lacks  packages         2 of 2 differ: numpy" in output
    assert "nothing-such missing (lock: 1.0)" in output
    assert "lacks  decode kernel    not built; make setup" in output
    assert "-      GPU              none" in output
    verdict, then = output.splitlines()[-2:]
    assert verdict.startswith(
        "this machine cannot train yet: compiler, pkg-config, libjpeg, OpenCV, packages"
    )
    assert then == "next: make setup"
    assert len(output.splitlines()) <= 24


def test_this_environment_matches_the_lock(repo):
    """The tests must run in the locked environment; a development tool of another version is reported only."""
    assert doctor.packages().ok is not False


def test_the_environment_of_a_newer_torch_is_held_to_its_own_lock(bare, monkeypatch):
    (bare / "requirements.lock").write_text("nothing-such==1.0\n")
    (bare / "requirements-next.lock").write_text("other-such==2.0\n")
    assert "nothing-such" in str(doctor.packages())
    monkeypatch.setattr(sys, "prefix", str(bare / ".venv-next"))
    newer = runpy.run_path(doctor.__file__)
    assert newer["LOCK"] == "requirements-next.lock" and newer["PYTHONS"] == ((3, 11), (3, 12))
    monkeypatch.setattr(doctor, "LOCK", newer["LOCK"])
    monkeypatch.setattr(doctor, "SETUP", newer["SETUP"])
    assert str(doctor.packages()).endswith("other-such missing (lock: 2.0); make setup NEXT=1")


def test_a_missing_lock_is_reported(bare):
    finding = doctor.packages()
    assert finding.ok is False
    assert "use a complete copy of the repository" in str(finding)


def test_tools_and_extras_do_not_stop_training(bare):
    (bare / "requirements.lock").write_text("ruff==0.0.0\nlightgbm==0.0.0\n")
    assert doctor.packages().ok is None
    assert "2 of 2 differ: ruff" in str(doctor.packages())


def test_a_built_kernel_makes_the_compiler_unneeded(bare):
    assert [finding.ok for finding in doctor.build_tools(built=True)] == [None] * 4
    assert [finding.ok for finding in doctor.build_tools(built=False)] == [False] * 4


def test_the_kernel_is_loaded_and_compared_with_its_source(bare, monkeypatch):
    built = bare / "fastflower/data/decode/_decode.so"
    built.write_bytes(b"not a library")
    assert "remove it and run make setup" in str(doctor.kernel())
    if compiler := shutil.which("g++", path="/usr/bin:/bin:/usr/local/bin"):
        source = bare / "fastflower/data/decode/decode.c"
        monkeypatch.setenv("PATH", "/usr/bin:/bin:/usr/local/bin")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
        assert doctor.kernel() == doctor.Finding("decode kernel", True, "_decode.so")
        newer = built.stat().st_mtime + 10
        source.touch()
        os.utime(source, (newer, newer))
        assert "older than decode.c" in str(doctor.kernel())


def test_gpus_are_listed_with_their_driver(monkeypatch):
    output = {
        "nvidia-smi": "NVIDIA RTX 4090, 24564 MiB, 550.54\nNVIDIA RTX 4090, 24564 MiB, 550.54",
        sys.executable: "2",
    }
    monkeypatch.setattr(doctor, "stdout_of", lambda command: output[command[0]])
    monkeypatch.setattr(doctor, "_without_kernels", list)
    assert [str(finding) for finding in doctor.gpus()] == [
        "ok     GPU              NVIDIA RTX 4090, 24564 MiB, 550.54"
    ] * 2
    output[sys.executable] = "0"
    assert "0 of 2; torch needs CUDA 0; update the driver" in str(doctor.gpus()[-1])
    assert doctor.gpus()[-1].ok is False


def test_a_card_that_this_torch_does_not_know_is_lacking(monkeypatch):
    output = {
        "nvidia-smi": "NVIDIA GeForce RTX 5090, 12.0\nNVIDIA GeForce RTX 4090, 8.9\nOld, [Not Supported]",
        sys.executable: "sm_80 sm_86 sm_90",
    }
    monkeypatch.setattr(doctor, "stdout_of", lambda command: output[command[0]])
    (finding,) = doctor._without_kernels()
    assert str(finding) == (
        "lacks  GPU in torch     NVIDIA GeForce RTX 5090 has compute capability 12.0, this torch knows sm_80 sm_86 "
        "sm_90; use make setup NEXT=1, which has a newer torch"
    )
    output[sys.executable] = ""  # torch is not installed
    assert doctor._without_kernels() == []


def test_missing_libraries_of_opencv_are_named(monkeypatch):
    monkeypatch.setattr(doctor, "load_error", lambda name: "no such file" if "GL" in name else "")
    assert "no libGL.so.1; apt-get install libgl1" in str(doctor.opencv_runtime())


def test_another_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 1))
    assert "3.13.1; mosaicml and torch resolve on 3.11 only" in str(doctor.python())
    assert doctor.python().ok is False


def test_a_full_disk_is_reported(monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    assert doctor.disk().ok is False
    assert "need 2 GB" in str(doctor.disk())
    assert "GB free" in str(doctor.memory())


def test_weights_and_photographs_are_found_where_training_looks(repo):
    assert "model.pretrained=false" in str(doctor.weights())
    assert "make demo needs neither" in str(doctor.photographs())
    folder = Path("results/model/pretrained_model")
    folder.mkdir(parents=True)
    (folder / "convnextv2_base.fcmae_ft_in22k_in1k.safetensors").touch()
    (folder / "vit_base_patch16_224.augreg2_in21k_ft_in1k").mkdir()
    (folder / "tf_efficientnet_lite0.in1k.safetensors").touch()
    assert doctor.weights().ok is True
    Path("data/train").mkdir(parents=True)
    Path("data/train/a.jpg").touch()
    Path("data/train_labels.csv").touch()
    assert "1 files in data/train" in str(doctor.photographs())


def test_the_command_needs_no_installation(repo):
    """The first command after a clone: no site-packages, no setup."""
    command = [sys.executable, "-S", "-E", "-m", "fastflower.doctor"]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "missing (lock:" in done.stdout
    assert done.stderr == ""


def test_a_recipes_training_is_looked_at(tmp_path, monkeypatch, capsys):
    toy_project.project(tmp_path)
    monkeypatch.setattr(doctor, "machine", list)
    assert doctor.main(["tiny.yaml"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"tiny: test_vit, \d epochs at 32 x 32, 48 x 48", output), output
    assert "60 images of 4 classes, 9 to 22 each" in output and "complete in data/betons" in output
    assert "random (model.pretrained=false)" in output
    assert "this machine can train tiny.yaml" in output.splitlines()[-2:]


@pytest.mark.parametrize(
    "words, lacks",
    [
        (["data.csv=data/none.csv"], "labels: .*none.csv"),
        (["data.fold=all"], "betons: .*fold2_val"),
        (["model.pretrained=true", "model.backbone=resnet18"], "weights: .*resnet18"),
    ],
)
def test_what_a_training_lacks_is_named(words, lacks, tmp_path, monkeypatch, capsys):
    toy_project.project(tmp_path)
    Path("data/betons/fold2_val.beton").unlink()
    monkeypatch.setattr(doctor, "machine", list)
    assert doctor.main(["tiny.yaml", *words]) == 4
    output = capsys.readouterr().out
    assert re.search(lacks.replace(": ", " +", 1), output)
    name = lacks.partition(":")[0]
    assert output.splitlines()[-1].endswith(f"yet: {name}")


def test_a_machine_that_lacks_something_is_named_before_a_recipe_is_read(bare, capsys):
    assert doctor.main(["no.yaml"]) == 4
    assert (
        capsys.readouterr().out.splitlines()[-2].startswith("this machine cannot train no.yaml yet: compiler")
    )


def test_a_recipe_that_cannot_be_read_is_refused(monkeypatch):
    monkeypatch.setattr(doctor, "machine", list)
    with pytest.raises(InputError, match=r"no\.yaml"):
        doctor.main(["no.yaml"])


def test_photographs_that_are_not_converted_yet_are_no_lack(tmp_path, monkeypatch, capsys):
    toy_project.project(tmp_path)
    monkeypatch.setattr(doctor, "machine", list)
    assert doctor.main(["tiny.yaml", "data.home=elsewhere"]) == 0
    output = capsys.readouterr().out
    assert re.search(
        r"- +betons +not converted yet; .*fastflower convert tiny\.yaml data\.home=elsewhere", output
    )


def test_an_empty_folder_of_photographs_is_no_folder_of_photographs() -> None:
    Path("data/train").mkdir(parents=True)
    Path("data/train_labels.csv").write_text("filename,category_id\n")
    found = doctor.photographs()
    assert (found.ok, found.text, found.advice) == (
        None,
        "no file in data/train",
        "put the training images there",
    )
    Path("data/train/a.jpg").touch()
    assert doctor.photographs().text == "1 files in data/train"
