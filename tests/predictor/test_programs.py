"""Programs of a bundle are read before torch sees them: only operators that compute tensors, in straight-line code."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastflower.bundle import program
from fastflower.core.errors import InputError
from support.predictor_runs import write_photographs

WRITE = '  _0 = torch.save(images, "executed")\n'


def text(*statements: str, result: str = "images") -> str:
    """A program of these statements."""
    lines = "".join(f"  {statement}\n" for statement in statements)
    return f"def forward(images: Tensor,\n    weight: Tensor) -> Tensor:\n{lines}  return {result}\n"


HOSTILE = {
    'a = torch.save(images, "executed")': "a call of torch.save in line 3",
    'a = torch.from_file("executed", True, 4)': "a call of torch.from_file in line 3",
    'a = torch.load("executed")': "a call of torch.load",
    'a = ops.aten.save(images, "executed")': "a call of ops.aten.save",
    'a = ops.prim.PythonOp("os.mkdir", "executed")': "a call of ops.prim.PythonOp",
    'a = torch.add(images, torch.mul(weight, torch.save(images, "x")))': "a call of torch.save",
    'a = annotate(Tensor, torch.save(images, "executed"))': "a call of annotate",
    "a = images.save": "images.save",
    'a = images.save("executed")': "a call of images.save",
    "a = self.member.forward(images)": "a call of self.member.forward",
    "a = __torch__.Interface.forward(images)": "a call of __torch__.Interface.forward",
    'a = print("executed")': "a call of print",
    'a = getattr(images, "save")': "a call of getattr",
    "a = CONSTANTS.c0": "CONSTANTS.c0",
    'torch.save(images, "executed")': "a statement of the kind Expr",
    "import os": "a statement of the kind Import",
    "torch = images": "the name 'torch'",
    "a = torch = images": "a statement of the kind Assign",
    "images.data = weight": "an assignment to other than names",
    "while True: images = weight": "a statement of the kind While",
    "a = [torch.from_file(x) for x in images]": "[torch.from_file(x) for x in images]",
    'a = (lambda: torch.save(images, "executed"))()': "a call of",
    "a = torch.add(*images)": "*images",
    "a = torch.add(images, **weight)": "the character '*' in line 3",
    'a = "executed"': "'executed'",
    "a = torch.add(images, missing)": "missing",
    "a = images # os": "the character '#' in line 3",
    "a = 'none'": 'the character "\'" in line 3',
    "a = " + "-" * 5000 + "1": "cannot be parsed",
    "a = images" + ".a" * 5000: "cannot be parsed",
    "a = " + "(" * 300 + "1" + ")" * 300: "cannot be parsed",
}


@pytest.mark.parametrize("statement", HOSTILE, ids=range(len(HOSTILE)))
def test_a_statement_that_no_network_needs_is_refused(code, statement):
    """Also with an asterisk, which is outside of the alphabet before it is outside of the grammar."""
    expected = "the character '*'" if "*" in statement else HOSTILE[statement]
    with pytest.raises(code.programs.Refused) as refused:
        code.programs.compile_program(text(statement))
    assert expected in str(refused.value) and "\n" not in str(refused.value)
    assert not Path("executed").exists()


WHOLE = {
    text() + "def __setstate__(images: Tensor) -> Tensor:\n" + WRITE: "other than one function",
    "def __setstate__(images: Tensor) -> Tensor:\n" + WRITE + "  return images\n": "other than one function",
    "class Program(Module):\n  a : int\n": "other than one function",
    "": "other than one function",
    "import os\n" + text(): "other than one function",
    "def  forward(images: Tensor) -> Tensor:\n  return images\n": "other than one function",
    "def forward(self, images: Tensor) -> Tensor:\n  return images\n": "arguments or results other than tensors",
    "def forward(images: str) -> Tensor:\n  return images\n": "arguments or results other than tensors",
    'def forward(images: Tensor=torch.save(1, "a")) -> Tensor:\n  return images\n': "arguments other than tensors",
    "def forward(images: Tensor) -> Tensor:\n  a = images\n": "no return at its end",
    "def forward(images: Tensor) -> Tensor:\n\treturn images\n": "the character '\\t' in line 2",
    "def forward(images: Tensor) -> Tensor:\n  return (images\n": "cannot be parsed (SyntaxError)",
    "a" * ((1 << 23) + 1): "is longer than 8 MiB",
}


@pytest.mark.parametrize("whole", WHOLE, ids=range(len(WHOLE)))
def test_a_text_that_is_not_one_function_is_refused(code, whole):
    with pytest.raises(code.programs.Refused) as refused:
        code.programs.compile_program(whole)
    assert WHOLE[whole] in str(refused.value) and not Path("executed").exists()


class Writer(nn.Module):
    """A module that writes a file when TorchScript loads it."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return torch.zeros(1), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        torch.save(state[0], "executed")
        self.training = state[1]


def archive_that_writes() -> bytes:
    """A TorchScript archive of Writer."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Writer()), buffer)
    return buffer.getvalue()


def archive_that_imports() -> bytes:
    """A zip like TorchScript's whose data.pkl imports os."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nmkdir\n(S'executed'\ntR.")
    return buffer.getvalue()


PROGRAMS = {
    "archive": (archive_that_writes, "holds the character "),
    "imports": (archive_that_imports, "holds the character "),
    "pickle": (lambda: pickle.dumps([1]), "holds the character "),
    "save": (lambda: text('a = torch.save(images, "executed")').encode(), "holds a call of torch.save in line 3"),
    "wrong": (lambda: text("a = torch.relu(images, 7)").encode(), "cannot compile it (Arguments for call"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_hostile_program_ends_the_run_in_one_line_before_it_is_run(run, exported, kind):
    """Even when the attacker also changed its hash; the table is whole."""
    make, fault = PROGRAMS[kind]
    shutil.copytree(exported.folder, "copy")
    Path("copy/program_0.txt").write_bytes(make())
    Path("executed").unlink(missing_ok=True)  # by torch.jit.script, which may have run the payload
    hashes = Path("copy/SHA256")
    lines = [line for line in hashes.read_text().splitlines() if "program_0" not in line]
    lines.append(f"{hashlib.sha256(Path('copy/program_0.txt').read_bytes()).hexdigest()}  program_0.txt")
    hashes.write_text("\n".join(lines) + "\n")
    write_photographs(2)
    exit_code, rows = run("--bundle", "copy")
    assert exit_code == 3 and [row[1] for row in rows[1:]] == ["012", "012"]
    (note,) = json.loads(Path("out/submission.json").read_text())["notes"]
    assert note.startswith("copy/program_0.txt ") and fault in note and note.endswith("nothing in it was run")
    assert "\n" not in note and not Path("executed").exists()


def test_the_archive_of_the_test_above_is_dangerous():
    torch.jit.load(io.BytesIO(archive_that_writes()))
    assert Path("executed").exists()


class Odd(nn.Module):
    """A network whose operators, constants and results are chosen by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.table = kind, torch.tensor([0.5, 2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))
        if self.kind == "fourier":
            return torch.fft.fft(means).abs()
        if self.kind == "table":
            return means * self.table
        if self.kind == "infinite":
            return means.masked_fill(means > 127, float("-inf")).softmax(1)
        if self.kind == "positions":  # as rotary embeddings: from the size of the input
            return means + torch.arange(x.shape[3], device=x.device).float().cos()[:3]
        if self.kind == "batch":  # as Fourier embeddings: zeros of the batch's shape
            return means + torch.zeros(x.shape[0], 3, device=x.device).cumsum(1)
        if self.kind == "follows":
            return means * (2 if len(x) == 2 else 1)
        (first,) = (means / x.shape[2]).chunk(1)
        return torch.nn.functional.gelu(first * 0.25, approximate="tanh")


@pytest.mark.parametrize("kind", ["table", "infinite", "numbers"])
def test_constants_are_written_out_or_become_arguments(kind):
    tensors: dict[str, Tensor] = {}
    traced = program.trace(Path("a.pth"), Odd(kind), height=32, width=48, tensors=tensors)
    assert traced.inputs == list(tensors) == (["constant_c0@32x48"] if kind == "table" else [])
    assert "CONSTANTS" not in traced.text


@pytest.mark.parametrize(
    ("kind", "fault"),
    [("fourier", r"holds a call of torch.fft_fft in line \d+, which the predictor does not")],
)
def test_export_refuses_a_network_that_the_predictor_would(kind, fault):
    with pytest.raises(InputError, match=f"^a.pth at 32x48: its program .*{fault}"):
        program.trace(Path("a.pth"), Odd(kind), height=32, width=48, tensors={})


@pytest.mark.parametrize("kind", ["positions", "batch"])
def test_positions_computed_from_the_size_run_on_any_device(code, kind):
    """What follows the size alone becomes an argument; what follows the batch is made where the images are."""
    tensors: dict[str, Tensor] = {}
    traced = program.trace(Path("a.pth"), Odd(kind), height=32, width=48, tensors=tensors)
    assert "cpu" not in traced.text and "torch.device(" not in traced.text
    assert ("torch.arange" in traced.text) is False
    assert (len(traced.inputs) == 1) is (kind == "positions") and ("ops.prim.device" in traced.text) is (
        kind == "batch"
    )
    compiled = code.programs.compile_program(traced.text)
    for batch in (1, 4):
        images = torch.rand(batch, 3, 32, 48) * 255
        torch.testing.assert_close(
            compiled(images, *(tensors[name] for name in traced.inputs)), Odd(kind)(images)
        )


class Spec(types.SimpleNamespace):
    """The fields of a network's specification that a trial reads."""

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("fourier", r"holds a call of torch.fft_fft in line \d+, which the predictor does not run"),
        ("follows", "its program follows the batch or the values of the images"),
        ("narrow", r"it cannot be exported for the predictor \(.*\); choose another backbone"),
    ],
)
def test_a_network_that_could_not_be_handed_in_is_refused_before_training(kind, fault):
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Odd(kind) if kind != "narrow" else nn.Linear(5, 2))
    works = nn.Sequential(nn.Conv2d(3, 3, 1), Odd("positions"))
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=f"^model.backbone = odd at 32x32: .*{fault}"):
        program.try_export(Spec(backbone="odd"), network, [(32, 32)])
    program.try_export(Spec(backbone="odd"), works, [(32, 32), (48, 32)])
    assert torch.equal(torch.get_rng_state(), before) and network.training


def test_a_trial_without_memory_is_not_taken_for_a_fault_of_the_network():
    class Full(nn.Module):
        def forward(self, images):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        program.try_export(Spec(backbone="full"), nn.Sequential(nn.Conv2d(3, 3, 1), Full()), [(32, 32)])


def test_sizes_fixed_in_a_program_leave_the_batch_free():
    """A graph with zeros of the batch's shape behind a position table keeps its first axis."""
    network = nn.Sequential(Odd("batch"))
    traced = program.trace(Path("a.pth"), network, height=16, width=16, tensors={})
    assert "torch.size" in traced.text


def test_every_operator_exists_and_none_takes_a_path(code):
    def takes_a_path(name: str) -> bool:
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        assert schemas, name
        arguments = [argument for schema in schemas for argument in schema.arguments]
        return any("file" in argument.name and str(argument.type) == "str" for argument in arguments)

    assert takes_a_path("save") and takes_a_path("from_file")
    assert not [name for name in code.programs.OPERATORS.split() if takes_a_path(name)]
