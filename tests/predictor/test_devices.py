"""Devices, half precision, and the packages of the evaluator's machine."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflower.bundle import sandbox
from support.predictor_runs import (
    CODE,
    make_hand_in,
    read_rows,
    save_random_member,
    write_bundle,
    write_photographs,
)


@pytest.mark.slow
def test_a_bare_machine_is_enough(tmp_path, exported):
    root = make_hand_in(tmp_path / "root", exported.folder, 3)
    for path in [*root.rglob("*"), root]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    folder = b"caf\xe9"
    os.mkdir(folder)
    Path(os.fsdecode(folder), os.fsdecode(b"\xe9.jpg")).write_bytes(b"")
    shutil.copy(root / "test_dataset/000000.jpg", os.path.join(folder, b"ok.jpg"))
    script = sandbox.ISOLATED.replace("{blocked!r}", repr(set(sandbox.BLOCKED)))
    command = [
        sys.executable,
        "-I",
        "-c",
        script,
        str(root / "code/predict.py"),
        folder,
        "out.csv",
        "--threads",
        "1",
    ]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert Path("out.csv").read_bytes().splitlines()[1].startswith(b"ok.jpg,")
    assert Path("out.csv").read_bytes().splitlines()[2].startswith(b"\xe9.jpg,012,")
    assert not list(root.rglob("*.pyc"))


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_a_torch_that_calls_torchscript_deprecated_says_nothing(kind, code, exported, monkeypatch):
    """With the messages of torch 2.13 and 2.15; warnings are errors here."""
    load = torch.jit.load

    def deprecated(*args, **kwargs):
        warnings.warn("`torch.jit.load` is deprecated. Please switch to `torch.export`.", kind, stacklevel=2)
        return load(*args, **kwargs)

    monkeypatch.setattr(torch.jit, "load", deprecated)
    description, hashes = code.bundles.read(str(exported.folder))
    assert code.networks.Networks(str(exported.folder), description, hashes=hashes, device="cpu").notes == []


def test_a_torch_that_does_not_know_this_numpy_is_enough(code, exported, monkeypatch):
    """Torch before 2.3 beside NumPy 2 raises `RuntimeError: Numpy is not available`."""

    def missing(*_):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch, "from_numpy", missing)
    monkeypatch.setattr(torch.Tensor, "numpy", missing)
    description, hashes = code.bundles.read(str(exported.folder))
    assert code.networks.Networks(str(exported.folder), description, hashes=hashes, device="cpu").notes == []


def test_a_gpu_that_does_not_work_leaves_the_work_to_the_cpu(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported.folder))
    monkeypatch.setattr(
        code.networks, "candidates", lambda *_, **__: [("cuda:9", torch.float16), ("cpu", torch.float32)]
    )
    networks = code.networks.Networks(str(exported.folder), description, hashes=hashes, device="auto")
    assert str(networks.device) == "cpu" and networks.dtype == torch.float32
    assert len(networks.notes) == 1 and networks.notes[0].startswith("cuda:9 in fp16: ")


@pytest.mark.parametrize(
    ("off", "device", "dtype"),
    [
        ((0.2, 0.0, 0.0), "cuda", torch.float32),
        ((np.inf, 0.1, 0.0), "cpu", torch.float32),
        ((0.01, 1, 1), "cuda", torch.float16),
    ],
)
def test_a_device_that_computes_wrongly_is_passed_over(code, exported, monkeypatch, off, device, dtype):
    """`off` are the errors of the test picture's logits in half precision, in fp32 and on the CPU."""
    description, hashes = code.bundles.read(str(exported.folder))
    errors = iter(off)
    monkeypatch.setattr(code.networks, "load_program", lambda *_, **__: None)
    monkeypatch.setattr(code.networks.Networks, "_inputs", lambda *_, **__: [])
    monkeypatch.setattr(code.networks.Networks, "_self_test", lambda _: next(errors))
    networks = code.networks.Networks(str(exported.folder), description, hashes=hashes, device="cuda")
    assert (str(networks.device), networks.dtype) == (device, dtype)
    passed = [f"logits of the test picture are {error:.2g} off" for error in off[: len(networks.notes)]]
    assert [note.split(": ")[1] for note in networks.notes] == passed


def test_what_half_precision_cannot_hold_is_computed_in_fp32(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported.folder))
    white = [np.full((crop["height"], crop["width"], 3), 255, np.uint8) for crop in description["crops"]]
    plain = code.networks.Networks(str(exported.folder), description, hashes=hashes, device="cpu").logits(
        [white]
    )
    honest = code.networks.Networks._forward

    def forward(self, images, view, inputs):
        logits = honest(self, images, view, inputs)
        return logits * np.inf if self.dtype == torch.float16 and images.min() == 255 else logits

    monkeypatch.setattr(code.networks.Networks, "_forward", forward)
    monkeypatch.setattr(
        code.networks, "candidates", lambda *_, **__: [("cpu", torch.float16), ("cpu", torch.float32)]
    )
    networks = code.networks.Networks(str(exported.folder), description, hashes=hashes, device="auto")
    assert networks.dtype == torch.float16 and networks.notes == []
    np.testing.assert_array_equal(networks.logits([white]), plain)
    assert networks.notes == ["cpu in fp16: logits that are not finite; continuing with cpu in fp32"]


@pytest.mark.parametrize(
    ("device", "half", "native", "names"),
    [
        ("cpu", "gpu", True, ["cpu fp32"]),
        ("cpu", "none", True, ["cpu fp32"]),
        ("cpu", "all", True, ["cpu bf16", "cpu fp32"]),
        ("cpu", "all", False, ["cpu fp32"]),
        ("cuda:1", "all", True, ["cuda:1 fp16", "cuda:1 fp32", "cpu fp32"]),
        ("cuda:1", "gpu", True, ["cuda:1 fp16", "cuda:1 fp32", "cpu fp32"]),
        ("cuda:1", "none", True, ["cuda:1 fp32", "cpu fp32"]),
        ("cpu:0", "gpu", True, ["cpu fp32"]),
    ],
)
def test_where_half_precision_is_tried(code, monkeypatch, device, half, native, names):
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: native)
    order = code.networks.candidates(device, half)
    assert [f"{name} {code.networks.DTYPE_NAMES[dtype]}" for name, dtype in order] == names


def test_a_processor_is_asked_for_its_instructions(code, monkeypatch):
    for flags, native in (
        ("avx512f avx512_bf16 sse", True),
        ("amx_bf16", True),
        ("avx512f bf16_fake", False),
    ):
        text = f"model name\t: any\nflags\t\t: {flags}\n\n"
        monkeypatch.setattr(
            code.networks, "open", lambda *_, text=text, **__: io.StringIO(text), raising=False
        )
        assert code.networks.multiplies_bf16() == native

    def absent(*_, **__):
        raise FileNotFoundError("no /proc here")

    monkeypatch.setattr(code.networks, "open", absent)
    assert code.networks.multiplies_bf16() is False


def test_bf16_that_is_wrong_leaves_the_work_to_fp32(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported.folder))
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: True)
    honest = code.networks.Networks._self_test
    monkeypatch.setattr(
        code.networks.Networks,
        "_self_test",
        lambda self: 0.2 if self.dtype == torch.bfloat16 else honest(self),
    )
    networks = code.networks.Networks(
        str(exported.folder), description, hashes=hashes, device="cpu", half="all"
    )
    assert networks.dtype == torch.float32
    assert networks.notes == ["cpu in bf16: logits of the test picture are 0.2 off"]


def test_bf16_that_is_wrong_at_one_size_is_seen_before_the_work(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported.folder))
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: True)
    honest = code.networks.Networks._forward

    def forward(self, images, view, inputs):
        logits = honest(self, images, view, inputs)
        return logits + (self.dtype == torch.bfloat16 and images.shape[1] == 64)

    monkeypatch.setattr(code.networks.Networks, "_forward", forward)
    networks = code.networks.Networks(
        str(exported.folder), description, hashes=hashes, device="cpu", half="all"
    )
    assert networks.dtype == torch.float32 and len(networks.notes) == 1
    assert networks.notes[0].startswith("cpu in bf16: logits of the test picture are ")


@pytest.mark.parametrize("fault", ["error", "not finite"])
def test_bf16_that_fails_at_work_is_replaced_by_fp32(code, exported, monkeypatch, fault):
    """Threads share the networks; every picture gets the logits of fp32 or of bf16, none is lost."""
    description, hashes = code.bundles.read(str(exported.folder))
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: True)
    rng = np.random.default_rng(0)
    shapes = [(crop["height"], crop["width"], 3) for crop in description["crops"]]
    batches = [
        [[rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes] for _ in range(3)]
        for _ in range(8)
    ]
    exact = code.networks.Networks(str(exported.folder), description, hashes=hashes, device="cpu")
    expected = [exact.logits(batch) for batch in batches]
    honest = code.networks.Networks._forward

    def forward(self, images, view, inputs):
        logits = honest(self, images, view, inputs)
        if self.dtype == torch.bfloat16 and len(images) > 1:
            if fault == "error":
                raise RuntimeError("could not create a primitive")
            return logits * np.nan
        return logits

    monkeypatch.setattr(code.networks.Networks, "_forward", forward)
    networks = code.networks.Networks(
        str(exported.folder), description, hashes=hashes, device="cpu", half="all"
    )
    assert networks.dtype == torch.bfloat16
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(networks.logits, batches))
    assert networks.device_and_precision() == "cpu, fp32" and len(networks.notes) == 1
    assert networks.notes[0].endswith("; continuing with cpu in fp32")
    for logits, exact_logits in zip(got, expected, strict=True):
        assert np.abs(logits - exact_logits).max() <= 1e-5 * max(1.0, np.abs(exact_logits).max())


def test_networks_that_half_precision_does_not_fit_are_said_to_run_in_fp32(code, exported, monkeypatch):
    description, hashes = code.bundles.read(str(exported.folder))
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: True)
    for program in description["programs"]:
        program["half_keeps"] = None
    networks = code.networks.Networks(
        str(exported.folder), description, hashes=hashes, device="cpu", half="all"
    )
    assert networks.device_and_precision() == "cpu, fp32" and networks.notes == []


def test_after_a_death_no_cpu_computes_in_bf16(tmp_path, run, code, monkeypatch):
    """A processor that only claims to have the instructions would kill the next process as well."""
    write_bundle(tmp_path / "quick", [save_random_member(tmp_path)], "bundle.half=all")
    write_photographs(1)
    halves = []
    monkeypatch.setattr(code.predict, "predict", lambda options, *_, **__: halves.append(options.half))
    for deaths, unexplained in ((0, 0), (1, 0), (1, 1)):
        monkeypatch.setattr(code.guard, "run", lambda work, *_, counts=(deaths, unexplained): work(*counts))
        run("--bundle", str(tmp_path / "quick"))
    assert halves == ["all", "gpu", "gpu"]


def test_the_bundle_decides_on_half_precision_and_an_option_refuses_it(tmp_path, run, code, monkeypatch):
    write_bundle(tmp_path / "quick", [save_random_member(tmp_path)], "bundle.half=all")
    write_photographs(9)
    monkeypatch.setattr(code.networks, "multiplies_bf16", lambda: True)
    logits = {}
    for name, options in (("bf16", []), ("fp32", ["--fp32"])):
        arguments = ["--device", "cpu", "--bundle", str(tmp_path / "quick"), "--logits", f"{name}.npz"]
        exit_code, rows = run(*options, *arguments)
        about = json.loads(Path("out/submission.json").read_text())
        assert exit_code == 0 and len(rows) == 10 and about["device"] == f"cpu, {name}"
        logits[name] = np.load(f"{name}.npz")["logits"]
    gap = np.abs(logits["bf16"] - logits["fp32"]).max()
    assert 1e-4 < gap <= 0.05 * max(1.0, np.abs(logits["fp32"]).max())


def test_a_gpu_without_half_precision_goes_on_in_fp32(code, exported, monkeypatch):
    """The logits are those of fp32; bf16 and TF32 are never used."""
    description, hashes = code.bundles.read(str(exported.folder))
    views = [np.zeros((crop["height"], crop["width"], 3), np.uint8) for crop in description["crops"]]
    plain = code.networks.Networks(str(exported.folder), description, hashes=hashes, device="cpu").logits(
        [views]
    )
    honest, dtypes = code.networks.Networks._forward, set()

    def forward(self, images, view, inputs):
        dtypes.update(value.dtype for value in inputs if value.is_floating_point())
        if self.dtype == torch.float16:
            raise RuntimeError("no kernel for Half")
        return honest(self, images, view, inputs)

    monkeypatch.setattr(code.networks.Networks, "_forward", forward)
    monkeypatch.setattr(
        code.networks, "candidates", lambda *_, **__: [("cpu", torch.float16), ("cpu", torch.float32)]
    )
    networks = code.networks.Networks(str(exported.folder), description, hashes=hashes, device="auto")
    assert networks.dtype == torch.float32 and len(networks.notes) == 1
    assert "no kernel for Half" in networks.notes[0]
    np.testing.assert_array_equal(networks.logits([views]), plain)
    assert dtypes == {torch.float16, torch.float32}
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32


def test_a_network_that_says_something_else_than_at_export_is_noticed(code, exported):
    description, hashes = code.bundles.read(str(exported.folder))
    description["members"][0]["expected"][0][1] += 0.5
    networks = code.networks.Networks(str(exported.folder), description, hashes=hashes, device="cpu")
    assert any("another version of torch than at export?" in note for note in networks.notes)


PACKAGES = {
    "numpy/__init__.py": ("raise ImportError('\\n\\nIMPORTANT:\\n\\nREAD THIS')", "IMPORTANT: READ THIS"),
    "numpy.py": ("raise ModuleNotFoundError(\"No module named 'numpy'\")", "No module named 'numpy'"),
    "PIL/Image.py": ("", "module 'PIL.Image' has no attribute 'Transpose'"),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_missing_or_too_old_is_one_line(tmp_path, name):
    text, fault = PACKAGES[name]
    shutil.copytree(CODE, tmp_path / "code")
    path = tmp_path / "code" / name
    path.parent.mkdir(exist_ok=True)
    if path.parent.name != "code":
        (path.parent / "__init__.py").touch()
    path.write_text(text)
    done = subprocess.run([sys.executable, str(tmp_path / "code/predict.py")], capture_output=True, text=True)
    assert done.stderr == (
        f"predict: {fault}; install torch, numpy and pillow: pip install -U torch numpy pillow\n"
    )


@pytest.mark.parametrize(
    "error", ["ModuleNotFoundError('No module named \"torch\"')", "OSError('c10.dll')", "MemoryError()"]
)
def test_without_torch_every_row_is_the_prior(tmp_path, exported, error):
    shutil.copytree(CODE, tmp_path / "code")
    (tmp_path / "code/torch.py").write_text(f"raise {error}")
    os.mkdir("test_dataset")
    write_photographs(2)
    command = [sys.executable, "code/predict.py", "test_dataset", "out.csv", "--bundle", str(exported.folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4 and "Traceback" not in done.stderr
    assert ("torch cannot be loaded (" in done.stderr) == ("Memory" not in error)
    assert [row[1] for row in read_rows(Path("out.csv"))[1:]] == ["012", "012"]


def test_a_stream_that_cannot_be_reconfigured_is_enough():
    """For example a notebook's."""
    script = (
        "import io, runpy, sys; sys.stdout = io.StringIO(); path = sys.argv.pop(1); "
        "runpy.run_path(path, run_name='__main__')"
    )
    command = [sys.executable, "-c", script, str(CODE / "predict.py"), "--help"]
    assert subprocess.run(command, capture_output=True).returncode == 0
