"""timm's backbones without classifier, built for the image sizes of a recipe.

Nothing is ever downloaded: weights come from a local folder, or are random where the recipe sets pretrained=false.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import timm.data
import torch
from torch import Tensor, nn

from fastflower.core.errors import InputError
from fastflower.model import compare, ocec, own_network
from fastflower.model.pretrained import find_weights, published_name
from fastflower.model.sizes import Size, accepts, create, features, fit, refusal, text
from fastflower.model.weight_files import read_weights


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
    arguments, _ = fit(name, tuple(sizes))
    if own_network.is_own(name):
        _check_own(name, drop_path=drop_path, pretrained=pretrained)
    elif drop_path:
        arguments = {**arguments, "drop_path_rate": drop_path}
    report = None
    try:
        if pretrained is None or own_network.is_own(name):
            backbone = create(name, arguments)
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
    """The profile of a backbone at these sizes, from its configuration and by trying it; allocates no weights."""
    check_sizes(name, sizes)
    _, backbone = fit(name, tuple(sizes))
    if own_network.is_own(name):
        config = own_network.preprocessing(backbone)
    else:
        config = timm.data.resolve_model_data_config(backbone)
    return Profile(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bicubic" if config["interpolation"] == "bicubic" else "bilinear",
        features=features(backbone, sizes[0]),
    )


def check_name(name: str) -> None:
    """Raise InputError for a name that timm does not know; the message lists the nearest ones.

    A name with a colon is an own network, whose function must exist.
    """
    if own_network.is_own(name):
        own_network.find(name)
        return
    compare.register()
    compare.register_trunk(name)
    ocec.register(name)
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(name, [*timm.list_models(), *timm.list_pretrained()], n=3)
        hint = f"; near: {', '.join(near)}" if near else "; see timm.list_models(), or give module:function"
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
    built_for = tuple(built_for or sizes)
    _, backbone = fit(name, built_for)
    for size in sizes:
        if not accepts(backbone, size):
            raise InputError(f"{key} = {text(size)}: {name} {refusal(name, size, built_for)}")


def _check_own(name: str, *, drop_path: float, pretrained: Path | None) -> None:
    """Refuse keys that an own network cannot follow."""
    if drop_path:
        raise InputError(
            f"model.drop_path = {drop_path}: {name} is an own network, whose function decides; set it to 0"
        )
    if pretrained is not None:
        raise InputError(
            f"model.pretrained = true: {name} is an own network without published weights; set it to false (its "
            "function may load weights, and model.init starts from a file)"
        )


def _create_loaded(name: str, arguments: dict[str, Any], path: Path) -> tuple[nn.Module, LoadReport]:
    """Create a backbone with the weights of a file, which are those of its trunk if it compares pairs by one."""
    published, tensors = published_name(name), read_weights(path).tensors
    backbone, weights, report = _create_matched(published, arguments, tensors=tensors, path=path)
    backbone.load_state_dict(weights, strict=False)
    if published != name:
        trunk, backbone = backbone, create(name, arguments)
        backbone.trunk.load_state_dict(trunk.state_dict())  # type: ignore[union-attr]
    return backbone, report


def check_weights(name: str, tensors: dict[str, Tensor], path: Path) -> LoadReport:
    """Match the tensors of a file with a backbone on the meta device, which allocates no weights.

    Raises InputError where the backbone needs others.
    """
    with torch.device("meta"):
        return _create_matched(name, {}, tensors=tensors, path=path)[2]


def match_weights(
    name: str, sizes: Sequence[Size], *, tensors: dict[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors of a file by the names of a backbone built for `sizes`, and the report of what matched.

    Raises InputError where the backbone needs others.
    """
    arguments, _ = fit(name, tuple(sizes))
    with torch.device("meta"):
        if own_network.is_own(name):
            return _match(create(name, arguments), tensors, path=path, classifier=None, convert=None)
        return _create_matched(name, arguments, tensors=tensors, path=path)[1:]


def _create_matched(
    name: str, arguments: dict[str, Any], *, tensors: dict[str, Tensor], path: Path
) -> tuple[nn.Module, dict[str, Tensor], LoadReport]:
    """A new backbone, the tensors of a file by its names, and the report of what matched.

    timm passes each architecture's conversion of published weights (renames, resampled position embeddings) only to
    its own loader, which is therefore patched during this one call.
    """
    matches: list[tuple[dict[str, Tensor], LoadReport]] = []

    def load(
        model: nn.Module, pretrained_cfg: dict[str, Any], filter_fn: Callable | None = None, **_: Any
    ) -> None:
        classifier = pretrained_cfg.get("classifier")
        with torch.device(
            "cpu"
        ):  # where the conversion makes tensors, also for a backbone on the meta device
            matches.append(_match(model, tensors, path=path, classifier=classifier, convert=filter_fn))

    with mock.patch.object(timm.models._builder, "load_pretrained", load):
        backbone = timm.create_model(name, pretrained=True, num_classes=0, **arguments)
    if not matches:  # a network of this project, of which nothing is published: the file has its own names
        matches.append(_match(backbone, tensors, path=path, classifier=None, convert=None))
    return backbone, *matches[0]


def _match(
    model: nn.Module, weights: dict[str, Tensor], *, path: Path, classifier: Any, convert: Callable | None
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors of a file by the backbone's names; InputError when some are missing or have another shape."""
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
    unexpected = tuple(key for key in unmatched if key not in dropped)
    report = LoadReport(path, matched=len(common), missing=missing, unexpected=unexpected, dropped=dropped)
    return {key: weights[key] for key in common}, report


def _checkpoint_gradients(backbone: nn.Module, name: str) -> None:
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError):
        raise InputError(
            f"model.grad_checkpointing: {name} cannot recompute activations; set it to false"
        ) from None


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
