"""Estimate of the GPU memory of a training, from its recipe alone and on any machine.

A step and an evaluation of the recipe's network run on tensors without content, in the precisions of mixed precision
on GPUs, and every allocation is counted. Nothing is taken from a table of networks. The estimate takes about two
seconds; a training measures its memory before its first step (`memory.py`).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastflower.core.errors import InputError, one_line
from fastflower.model.frozen import features_are_fixed, frozen_recipe
from fastflower.model.losses import build_loss
from fastflower.model.network import Network, training_network
from fastflower.model.own_network import is_own
from fastflower.optim.groups import param_groups
from fastflower.optim.optimizers import build_optimizer
from fastflower.recipe import Recipe
from fastflower.recipe.derived import Derived, Stage, derive

GIB = 2**30
# Part of a GPU that stays free: for blocks that do not join up (fragmentation), for buffers that NCCL adds after its
# first collective, and for cuDNN where a later batch makes it choose an algorithm with a larger workspace.
MARGIN = 0.03
# Outside torch's allocator, or in it but unseen here: CUDA's context, NCCL's buffers, cuBLAS's and cuDNN's workspaces.
OUTSIDE = 1200 * 2**20
BLOCK = 512  # bytes; the allocator rounds up to multiples
WAYS_OUT = "set model.grad_checkpointing=true, a smaller data.img_size or a smaller model.backbone"
CLASSES = 100  # where the recipe leaves data.num_classes to the labels
ATEN = torch.ops.aten
# Operations that autocast runs in float32 on GPUs and not on CPUs.
WIDE = (
    *(ATEN.layer_norm.default, ATEN.group_norm.default, ATEN.softmax.int, ATEN.log_softmax.int),
    *(ATEN.pow.Tensor_Scalar, ATEN.linalg_vector_norm.default),
    *(ATEN.norm.Scalar, ATEN.norm.ScalarOpt_dim, ATEN.norm.ScalarOpt_dim_dtype),
)


@dataclass(frozen=True, kw_only=True)
class Need:
    """The memory of a training's largest stage on one GPU, in bytes.

    `allocated` is the peak of torch's allocator for `microbatch` images at once, `whole` for all images of a step.
    """

    stage: Stage
    microbatch: int
    allocated: int
    whole: int
    total: int | None  # of the GPU; None where there is none

    @property
    def fits(self) -> bool:
        return self.total is None or self.allocated <= room(self.total)

    @property
    def advice(self) -> str:
        """The remedy where the whole batch does not fit; empty where it does."""
        if not self.fits:
            return f"does not fit; {WAYS_OUT}"
        return (
            "training halves the microbatch by itself" if self.microbatch < self.stage.batch_per_gpu else ""
        )

    def __str__(self) -> str:
        """One line for people: the memory needed and present, the size, and the images at once."""
        stage = self.stage
        size = stage.height if stage.height == stage.width else f"{stage.height} x {stage.width}"
        of = "a GPU" if self.total is None else f"of {self.total / GIB:.1f} GB a GPU"
        images = "1 image" if self.microbatch == 1 else f"{self.microbatch} images"
        text = f"about {_gigabytes(self.allocated)} {of} at {size} with a microbatch of {images}"
        if self.microbatch < stage.batch_per_gpu:
            text += f" ({stage.batch_per_gpu} need {_gigabytes(self.whole)})"
        return text


def room(total: int) -> int:
    """Bytes that torch may allocate on a GPU of `total` bytes."""
    return int(total * (1 - MARGIN)) - OUTSIDE


def card() -> int | None:
    """The memory in bytes of the smallest GPU of this machine that torch sees; None without one."""
    if not torch.cuda.is_available():
        return None
    devices = range(torch.cuda.device_count())
    return min(torch.cuda.get_device_properties(device).total_memory for device in devices)


def estimate(recipe: Recipe, *, total: int | None = None) -> Need:
    """The need of a recipe's largest stage, with the microbatch halved until it fits a GPU of `total` bytes.

    Raises InputError where the network cannot run on tensors without content; training itself may well run it.
    """
    recipe, _ = frozen_recipe(recipe)
    derived = derive(recipe, recipe.train.world_size)
    stage = max(derived.stages, key=lambda stage: stage.height * stage.width * stage.batch_per_gpu)
    microbatch = stage.batch_per_gpu
    whole = needed = _attempt(recipe, derived, stage=stage, microbatch=microbatch)
    while total is not None and needed > room(total) and microbatch > 1:
        microbatch = (microbatch + 1) // 2
        needed = _attempt(recipe, derived, stage=stage, microbatch=microbatch)
    return Need(stage=stage, microbatch=microbatch, allocated=needed, whole=whole, total=total)


def missing_state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the optimizer's first step allocates for all parameters that have no state yet."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = sum(p.numel() * p.element_size() for p in parameters if p not in optimizer.state)
    return int(missing * _state_share(optimizer)) if missing else 0


def _state_share(optimizer: torch.optim.Optimizer) -> float:
    """Bytes of state for a byte of parameters, by a step of the optimizer's twin on one small matrix."""
    probe = nn.Parameter(torch.zeros(16, 16, device="cpu"))
    probe.grad = torch.ones_like(probe)
    twin = copy.copy(optimizer)  # without the attributes that a class of the user's may add
    twin.__dict__.update({name: value for name, value in vars(optimizer).items() if name not in vars(twin)})
    twin.__dict__.pop("step", None)  # Composer's scheduler wraps the step of the original
    twin.state, twin.param_groups = defaultdict(dict), [{**optimizer.param_groups[0], "params": [probe]}]
    twin.step()
    tensors = [value for value in twin.state[probe].values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.numel() > 1) / probe.nbytes


def _attempt(recipe: Recipe, derived: Derived, *, stage: Stage, microbatch: int) -> int:
    try:
        return _peak(recipe, derived, stage=stage, microbatch=microbatch)
    except InputError:
        raise
    except Exception as error:  # each network that asks for the values of a tensor fails in its own way
        raise InputError(
            f"model.backbone = {recipe.model.backbone}: its memory cannot be estimated "
            f"({one_line(str(error)) or type(error).__name__}); training measures it before its first step"
        ) from None


def _peak(recipe: Recipe, derived: Derived, *, stage: Stage, microbatch: int) -> int:
    """The most bytes allocated at once in a training step and an evaluation batch of a stage."""
    classes = CLASSES if recipe.data.num_classes == "auto" else int(recipe.data.num_classes)
    with torch.device("cpu" if is_own(recipe.model.backbone) else "meta"):
        # a k-NN head holds the images of the fold; their number is unknown here, and this is the smallest
        network = training_network(_from_scratch(recipe), classes, images=recipe.model.knn_k + 1)[0]
    loss = build_loss(recipe, [1] * classes)
    optimizer = build_optimizer(param_groups(network, derived.lr, recipe), recipe, torch.device("cpu"))
    moments = missing_state(optimizer)
    height, width = stage.height, stage.width * (2 if recipe.data.form == "pairs" else 1)
    with FakeTensorMode(allow_non_fake_inputs=True), _Allocations() as allocations:
        held = [_bytes(moments), _bytes(_copies(recipe, network, ranks=derived.world_size))]
        _remove_content(network)
        evaluated = recipe.eval.batch or recipe.train.batch_per_gpu
        if features_are_fixed(recipe):  # which steps take; computing them takes parts where memory is short
            evaluated = min(evaluated, microbatch)
        else:
            held += _batches(
                recipe, stage.batch_per_gpu * recipe.train.grad_accum, height=height, width=width
            )
            images = torch.empty(microbatch * _views(recipe), 3, height, width)
            images = images.to(memory_format=torch.channels_last) if recipe.train.channels_last else images
            target = torch.empty(microbatch, classes * (2 if recipe.distill.teacher else 1))
            with _precision(half=recipe.train.amp):
                loss(network.train()(images)[:microbatch], target).backward()
            del images, held[2:]
        images = _bytes(evaluated, height, width, 3)
        with (
            torch.no_grad(),
            _precision(half=recipe.train.amp),
        ):  # beside the gradients, which the next step frees
            network.eval()(images.permute(0, 3, 1, 2).float())
        del held
    return allocations.peak


def _copies(recipe: Recipe, network: Network, *, ranks: int) -> int:
    """Bytes of the averages of weights, of DDP's gradient buckets, and of the weights to which a step of SAM returns.

    Averages share a frozen backbone (`shadow_copy`); gradients and SAM's weights are of what trains alone.
    """
    kept = network.backbone if network.kept == "backbone" else nn.Module()
    averaged = _size(network.parameters(), network.buffers()) - _size(kept.parameters(), kept.buffers())
    trained = _size(parameter for parameter in network.parameters() if parameter.requires_grad)
    averages = int(recipe.ema.enabled) + int(recipe.swa.enabled)
    return averages * averaged + trained * (int(ranks > 1) + int(recipe.opt.sam_rho > 0))


def _size(*tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in itertools.chain(*tensors))


def _from_scratch(recipe: Recipe) -> Recipe:
    """The recipe without its starting point: the weights need not be here."""
    return replace(recipe, model=replace(recipe.model, pretrained=False, init=""))


def _batches(recipe: Recipe, rows: int, *, height: int, width: int) -> list[Tensor]:
    """Tensors on the GPU beside a microbatch: the step's images, Composer's copy of them, bytes of it and the next.

    The loader is ahead by two batches and the one that it copies.
    """
    views = 1 + 2 * recipe.semi.mu * recipe.semi.enabled  # weak and strong ones of each unlabelled image
    step = [torch.empty(rows, 3, height, width) for _ in range(2)]
    return [*step, *(_bytes(rows * views, height, width, 3) for _ in range(4))]


def _views(recipe: Recipe) -> int:
    """Images that a forward pass of training takes for each labelled one."""
    semi = recipe.semi
    if not semi.enabled:
        return 1
    return 1 + semi.mu * (2 if semi.method == "fixmatch" and semi.teacher == "raw" else 1)


def _bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def _remove_content(network: nn.Module) -> None:
    """Replace parameters and buffers by ones without content, in place; call it in a FakeTensorMode."""
    replaced: dict[int, Any] = {}  # shared ones stay shared

    def without(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            parameter = isinstance(tensor, nn.Parameter)
            new = nn.Parameter(fake, requires_grad=tensor.requires_grad) if parameter else fake
            replaced[id(tensor)] = new, tensor
        return replaced[id(tensor)][0]

    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = without(tensor)  # type: ignore[assignment]


class _Allocations(TorchDispatchMode):
    """Counts the bytes of all storages that live, `now`, and the most that lived at once, `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@contextlib.contextmanager
def _precision(*, half: bool) -> Iterator[None]:
    """Context manager of mixed precision as on a GPU: autocast of CPUs, with WIDE in float32; or of plain float32."""
    if not half:
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    for operation in WIDE:
        library.impl(operation, _in_float32(operation), "AutocastCPU")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        library._destroy()


def _in_float32(operation: Any) -> Callable[..., Any]:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            floats = (isinstance(a, Tensor) and a.is_floating_point() for a in args)
            return operation(*(a.float() if f else a for a, f in zip(args, floats, strict=True)), **kwargs)

    return run


def _gigabytes(size: int) -> str:
    """Bytes outside and inside torch's allocator as text."""
    return f"{(size + OUTSIDE) / GIB:.1f} GB"
