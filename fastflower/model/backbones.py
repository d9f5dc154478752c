"""timm's backbones without classifier, built for the image sizes of a recipe.

Nothing is ever downloaded: weights come from a local folder, or are random where the recipe sets pretrained=false.
"""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import timm.data
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastflower.core import runs
from fastflower.core.errors import CorruptionError, InputError
from fastflower.model import compare

Size = tuple[int, int]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Profile:
    """A backbone's preprocessing (mean and std in 0..1 units) and the number of features per image."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    features: int


@dataclass(frozen=True)
class LoadReport:
    """Names of the backbone's and the weight file's tensors that did not match; `dropped` are the classifier's."""

    path: Path
    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        text = f"pretrained {self.path}: {self.matched} tensors loaded, {len(self.dropped)} of a head dropped"
        if self.unexpected:
            text += f", {len(self.unexpected)} unexpected ({_first(self.unexpected)})"
        return text


def build_backbone(
    name: str,
    sizes: Sequence[Size],
    *,
    drop_path: float = 0.0,
    grad_checkpointing: bool = False,
    pretrained: Path | None = None,
) -> tuple[nn.Module, LoadReport | None]:
    """A backbone (B, 3, H, W) -> (B, F) for all `sizes`, with weights from the folder `pretrained` or random ones.

    Raises InputError for an unknown name, an unsupported size, or weights that are missing or do not fit.
    """
    check_sizes(name, sizes)
    arguments, _ = _fit(name, tuple(sizes))
    if drop_path:
        arguments = {**arguments, "drop_path_rate": drop_path}
    report = None
    try:
        if pretrained is None:
            backbone = _create(name, arguments)
        else:
            backbone, report = _create_loaded(name, arguments, find_weights(name, pretrained))
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise InputError(
            f"model.drop_path = {drop_path}: {name} has no stochastic depth; set it to 0"
        ) from None
    if grad_checkpointing:
        _checkpoint_gradients(backbone, name)
    return backbone, report


def profile(name: str, sizes: Sequence[Size]) -> Profile:
    """The profile of a backbone at these sizes, from timm's configuration; allocates no weights."""
    check_sizes(name, sizes)
    _, backbone = _fit(name, tuple(sizes))
    config = timm.data.resolve_model_data_config(backbone)
    return Profile(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bicubic" if config["interpolation"] == "bicubic" else "bilinear",
        features=_features(backbone, sizes[0]),
    )


def check_name(name: str) -> None:
    """Raise InputError for a name that timm does not know; the message lists the nearest ones."""
    compare.register()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3)
        hint = f"; near: {', '.join(near)}" if near else "; see timm.list_models()"
        raise InputError(f"model.backbone = {name}: timm {timm.__version__} has no such model{hint}")
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in known:
        choices = ", ".join(difflib.get_close_matches(tag, known, n=3, cutoff=0) or ["none"])
        raise InputError(
            f"model.backbone = {name}: {architecture} has no pretrained tag {tag}; it has {choices}"
        )


def check_sizes(
    name: str, sizes: Sequence[Size], *, key: str = "data.img_size", built_for: Sequence[Size] | None = None
) -> None:
    """Raise InputError for (height, width) pairs that a backbone built for `built_for` (default: `sizes`) cannot take.

    `key` is the recipe's key that holds the sizes.
    """
    check_name(name)
    _, backbone = _fit(name, tuple(built_for or sizes))
    for size in sizes:
        if not _accepts(backbone, size):
            near = " or ".join(_format(s) for s in _nearest(backbone, size))
            hint = f"the nearest that it takes: {near}" if near else "choose another backbone"
            raise InputError(f"{key} = {_format(size)}: {name} cannot take images of this size; {hint}")


def find_weights(name: str, folder: Path = runs.PRETRAINED) -> Path:
    """The file with a backbone's published weights; InputError lists every path that was tried."""
    stems = dict.fromkeys((name, name.partition(".")[0]))
    for stem in stems:
        snapshots = folder / f"models--timm--{stem}" / "snapshots"  # of a Hugging Face cache
        tried = [folder / (stem + suffix) for suffix in SUFFIXES]
        tried += [folder / stem / file for file in FOLDER_FILES]
        tried += [path for file in FOLDER_FILES for path in sorted(snapshots.glob(f"*/{file}"))]
        for path in tried:
            if path.is_file():
                return path
    files, suffixes = (f"{{{','.join(ends)}}}" for ends in (FOLDER_FILES, SUFFIXES))
    paths = ", ".join(
        f"{stem}{suffixes}, {stem}/{files}, models--timm--{stem}/snapshots/*/{files}" for stem in stems
    )
    raise InputError(
        f"no pretrained weights of {name} in {folder}; looked for {paths}; put one there or set model.pretrained=false"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a weight file, without wrapping dictionaries and `module.`; no code in it is executed."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CorruptionError(f"{path}: cut short or damaged ({error}); copy it again") from None
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{path}: not plain tensors, and nothing in it was run ({reason}); give .safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise CorruptionError(f"{path}: cut short or damaged ({reason}); copy it again") from None
    while isinstance(content, dict) and (
        wrapper := next((k for k in ("state_dict", "model") if k in content), None)
    ):
        content = content[wrapper]
    if not (isinstance(content, dict) and content and all(isinstance(t, Tensor) for t in content.values())):
        raise InputError(f"{path}: holds no dictionary of tensors; give a state dict of the backbone")
    return {key.removeprefix("module."): tensor for key, tensor in content.items()}


def _create(name: str, arguments: dict[str, Any]) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=0, **arguments)


@lru_cache(maxsize=32)
def _fit(name: str, sizes: tuple[Size, ...]) -> tuple[dict[str, Any], nn.Module]:
    """timm's arguments for a backbone that takes these sizes, and that backbone on the meta device (shapes only).

    Position embeddings are resampled per batch where timm supports it; else the default size is used if it fits;
    else the backbone is built for the one size.
    """
    with torch.device("meta"):
        try:
            return {"dynamic_img_size": True}, _create(name, {"dynamic_img_size": True}).eval()
        except TypeError:
            plain = _create(name, {}).eval()
        patch = _patch(plain)
        if len(set(sizes)) > 1 or _accepts(plain, sizes[0]) or any(side % patch for side in sizes[0]):
            return {}, plain
        arguments = {"img_size": sizes[0]}
        try:
            return arguments, _create(name, arguments).eval()
        except (TypeError, AssertionError, ValueError, RuntimeError):  # unknown argument, impossible size
            return {}, plain


def _create_loaded(name: str, arguments: dict[str, Any], path: Path) -> tuple[nn.Module, LoadReport]:
    """Create a backbone with the weights of a file.

    timm passes each architecture's conversion of published weights (renames, resampled position embeddings) only to
    its own loader, which is therefore patched during this one call.
    """
    weights, reports = read_weights(path), []

    def load(
        model: nn.Module, pretrained_cfg: dict[str, Any], filter_fn: Callable | None = None, **_: Any
    ) -> None:
        reports.append(
            _load(model, weights, path=path, classifier=pretrained_cfg.get("classifier"), convert=filter_fn)
        )

    with mock.patch.object(timm.models._builder, "load_pretrained", load):
        backbone = timm.create_model(name, pretrained=True, num_classes=0, **arguments)
    return backbone, reports[0]


def _load(
    model: nn.Module, weights: dict[str, Tensor], *, path: Path, classifier: Any, convert: Callable | None
) -> LoadReport:
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    if convert is not None:
        try:
            weights = convert(weights, model)
        except TypeError:  # the older conversions take the tensors alone
            weights = convert(weights)
    expected = model.state_dict()
    unmatched = [key for key in weights if key not in expected]
    dropped = tuple(key for key in unmatched if key.startswith(tuple(f"{c}." for c in classifiers)))
    # the oldest files lack the counters of BatchNorm, which nothing reads
    missing = tuple(key for key in expected if key not in weights and not key.endswith("num_batches_tracked"))
    if missing:
        raise InputError(
            f"{path}: lacks {len(missing)} of the backbone's {len(expected)} tensors ({_first(missing)}); "
            "give this backbone's own weights or set model.pretrained=false"
        )
    common = [key for key in expected if key in weights]
    wrong = [key for key in common if weights[key].shape != expected[key].shape]
    if wrong:
        got, want = tuple(weights[wrong[0]].shape), tuple(expected[wrong[0]].shape)
        raise InputError(
            f"{path}: {len(wrong)} tensors have another shape ({wrong[0]}: {got}, the backbone has {want}); "
            "give this backbone's own weights or set model.pretrained=false"
        )
    model.load_state_dict({key: weights[key] for key in common}, strict=False)
    return LoadReport(
        path,
        matched=len(common),
        missing=missing,
        unexpected=tuple(key for key in unmatched if key not in dropped),
        dropped=dropped,
    )


def _accepts(backbone: nn.Module, size: Size) -> bool:
    try:
        _features(backbone, size)
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


@lru_cache(maxsize=256)
def _features(backbone: nn.Module, size: Size) -> int:
    with torch.no_grad(), torch.device("meta"):
        return backbone(torch.empty(2, 3, *size)).shape[1]


def _nearest(backbone: nn.Module, size: Size) -> list[Size]:
    """The nearest smaller and larger sizes that a backbone takes, in steps of its patch size or of 32."""
    step = _patch(backbone)
    height, width = (side // step * step for side in size)
    up = (height < size[0] or width < size[1]) * step
    below = [(height - k * step, width - k * step) for k in range(8)]
    above = [(height + up + k * step, width + up + k * step) for k in range(8)]
    nearest = [
        next((s for s in side if min(s) > 0 and _accepts(backbone, s)), None) for side in (below, above)
    ]
    return [size for size in nearest if size is not None]


def _patch(backbone: nn.Module) -> int:
    patch = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    return patch[0] if patch else 32


def _checkpoint_gradients(backbone: nn.Module, name: str) -> None:
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise InputError(
            f"model.grad_checkpointing: {name} cannot recompute activations; set it to false"
        ) from None


def _format(size: Size) -> str:
    return str(size[0]) if size[0] == size[1] else f"[{size[0]}, {size[1]}]"


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
