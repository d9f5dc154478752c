"""Checks the programs of a bundle and compiles them: plain text in, a function (images, *weights) -> logits out.

A program is the text of one function, which calls nothing but operators that compute tensors from tensors. The text
is checked before torch sees it, and the TorchScript archive that torch loads is made here, around the text. A bundle
therefore cannot run code of its own at load, nor reach operators that read or write files, whoever wrote it.
"""

from __future__ import annotations

import ast
import io
import re
import textwrap
import warnings
import zipfile
from typing import Any, NoReturn

import torch

MOST_BYTES = 1 << 23  # of a program; a network of a thousand layers takes a tenth
# functions of tensors that neither read nor write anything else, as the networks of timm use them
OPERATORS = """
_convolution _convolution_mode abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d add add_
addcmul addmm amax amin arange avg_pool1d avg_pool2d baddbmm batch_norm bitwise_not bmm cat ceil celu chunk
clamp clamp_ clamp_min clone col2im constant_pad_nd contiguous conv1d conv2d copy_ cos cumsum detach div div_
dropout dropout_ einsum elu elu_ eq erf exp expand expand_as flatten flip floor floor_divide full gather ge
gelu gelu_ glu grid_sampler group_norm gt hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_
im2col index index_select instance_norm layer_norm le leaky_relu leaky_relu_ linalg_vector_norm linear log
log_sigmoid log_softmax logical_and logical_not logical_or lstm lt masked_fill masked_fill_ matmul max
max_pool2d maximum mean meshgrid min minimum mish mish_ movedim mul mul_ narrow ne neg norm one_hot ones pad
permute pixel_shuffle pixel_unshuffle pow prelu reciprocal reflection_pad2d relu relu6 relu6_ relu_ remainder repeat
repeat_interleave replication_pad2d reshape reshape_as rms_norm roll rsqrt rsub scaled_dot_product_attention
select selu selu_ sigmoid sigmoid_ silu silu_ sin size slice softmax softplus split split_with_sizes sqrt
square squeeze stack std sub sub_ sum t tanh tanh_ tile to topk transpose tril triu type_as unbind unfold unsqueeze
unsqueeze_ upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa upsample_linear1d
upsample_nearest2d var view where zeros
"""
CONVERSIONS = frozenset({"int", "float", "bool"})
PRIMITIVES = frozenset({"ops.prim.NumToTensor", "ops.prim.device"})  # a number as tensor, a tensor's device
TYPES = frozenset(
    {"List[Tensor]", "List[Optional[Tensor]]", "List[int]", "Optional[Tensor]", "Optional[int]"}
)
WORDS = (
    "none tanh constant reflect replicate circular floor trunc same valid ij"  # that choose an operator's way
)
# einsum's equations are the only other text
EQUATION = re.compile(r"[a-zA-Z]{1,6}(,[a-zA-Z]{1,6})*->[a-zA-Z]{1,6}")
# a smaller alphabet than either language has, so that Python's parser and torch's read the same
ALPHABET = re.compile(r"[A-Za-z0-9_.,()\[\]:=>+\" \n-]*")
NAME = re.compile(
    r"(?!(?:torch|ops|self|annotate|int|float|bool|CONSTANTS|Tensor|List|Optional|inf|nan)$)[A-Za-z_]\w*"
)
START = "def forward("
CLASS = """class Program(Module):
  __parameters__ = []
  __buffers__ = []
  training : bool
"""
# what torch 2.7 pickles for an object of this class without state: {"training": False}, and no constants
OBJECT = b"\x80\x02c__torch__\nProgram\nq\0)\x81}(X\x08\0\0\0trainingq\1\x89ubq\2."
CONSTANTS = b"\x80\x02)."


class Refused(ValueError):
    """A program that does what no exported program does; the text is the line to show."""


def compile_program(text: str) -> Any:
    """Check the text of a program and compile it with torch; raises Refused.

    New torch calls this deprecated, but files of torch.export run on one version only.
    """
    check(text)
    method = text.replace(START, f"{START}self: __torch__.Program, ", 1)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in {
            "data.pkl": OBJECT,
            "code/__torch__.py": CLASS + textwrap.indent(method, "  "),
            "constants.pkl": CONSTANTS,
            ".data/version": "10\n",
            "byteorder": "little",
        }.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    buffer.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.")
            return torch.jit.load(buffer)
    except Exception as error:  # an operator that this version lacks, or one with other arguments
        reason = " ".join(str(error).split("\n\n")[0].split())[:200]
        raise Refused(f"torch {torch.__version__} cannot compile it ({reason})") from None


def check(text: str) -> None:
    """Raise Refused unless the text is one function of straight-line code that calls only OPERATORS."""
    if len(text) > MOST_BYTES:
        raise Refused(f"is longer than {MOST_BYTES >> 20} MiB")
    end = ALPHABET.match(text).end()  # type: ignore[union-attr]
    if end < len(text):
        raise Refused(f"holds the character {text[end]!a} in line {text.count(chr(10), 0, end) + 1}")
    try:
        body = ast.parse(text).body
        if len(body) != 1 or not isinstance(body[0], ast.FunctionDef) or not text.startswith(START):
            _refuse(body[-1] if body else None, "other than one function, forward")
        _Check(body[0]).run()
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise Refused(f"cannot be parsed ({type(error).__name__})") from None


class _Check:
    """The check of a function, with the names that are defined so far."""

    def __init__(self, function: ast.FunctionDef) -> None:
        self.function = function
        self.names: set[str] = set()

    def run(self) -> None:
        arguments = self.function.args
        plain = ast.arguments(posonlyargs=[], args=arguments.args, kwonlyargs=[], kw_defaults=[], defaults=[])
        if ast.dump(arguments) != ast.dump(plain) or self.function.decorator_list:
            _refuse(self.function, "arguments other than tensors")
        for argument in arguments.args:
            _require_tensor(argument.annotation, self.function)
            self._define(argument.arg, self.function)
        _require_tensor(self.function.returns, self.function)
        *statements, last = self.function.body
        for statement in statements:
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                _refuse(statement, f"a statement of the kind {type(statement).__name__}")
            self._expression(statement.value)
            (target,) = statement.targets
            for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                if not isinstance(name, ast.Name):
                    _refuse(statement, "an assignment to other than names")
                self._define(name.id, statement)
        if not isinstance(last, ast.Return) or last.value is None:
            _refuse(last, "no return at its end")
        self._expression(last.value)

    def _define(self, name: str, node: ast.AST) -> None:
        if not NAME.fullmatch(name):
            _refuse(node, f"the name {name!r}")
        self.names.add(name)

    def _expression(self, node: ast.expr) -> None:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and _is_number(node.operand):
            return
        if isinstance(node, ast.Name) and (node.id in self.names or _is_number(node)):
            return
        if isinstance(node, ast.Constant):
            word = isinstance(node.value, str) and (
                node.value in WORDS.split() or EQUATION.fullmatch(node.value)
            )
            if word or type(node.value) in (int, float, bool, type(None)):
                return
        if isinstance(node, (ast.List, ast.Tuple)):
            for item in node.elts:
                self._expression(item)
            return
        if isinstance(node, ast.Call):
            self._call(node)
            return
        _refuse(node, ast.unparse(node)[:60])

    def _call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        if called == "annotate" and len(values) == 2 and ast.unparse(values[0]) in TYPES:
            values = values[1:]
        elif called not in CONVERSIONS and called not in PRIMITIVES:
            module, _, operator = called.partition(".")
            if module != "torch" or operator not in OPERATORS.split():
                _refuse(node, f"a call of {called[:60]}")
        if any(keyword.arg is None for keyword in node.keywords):
            _refuse(node, "arguments that are not written out")
        for value in values:
            self._expression(value)


def _is_number(node: ast.expr) -> bool:
    """True for a number written out, also `inf` and `nan`, which TorchScript has as names."""
    if isinstance(node, ast.Name):
        return node.id in ("inf", "nan")
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _require_tensor(annotation: ast.expr | None, function: ast.FunctionDef) -> None:
    if not isinstance(annotation, ast.Name) or annotation.id != "Tensor":
        _refuse(function, "arguments or results other than tensors")


def _refuse(node: ast.AST | None, found: str) -> NoReturn:
    raise Refused(f"holds {found} in line {getattr(node, 'lineno', 1)}")
