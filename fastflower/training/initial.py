"""The weights that model.init names: another experiment's member, or a file of weights.

A member that was trained on an image that now validates has seen its label, and every score would be too high. So an
experiment with the same folds gives the member of the same fold, and one with other folds is refused where any of its
training images validate here.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastflower.core import checkpoint, runs
from fastflower.core.errors import InputError
from fastflower.core.runs import MemberName, find_members, parse_member
from fastflower.data.betons.fold_set import FoldSet
from fastflower.data.folds import read_folds
from fastflower.model.backbones import match_weights
from fastflower.model.handed_in import handed_in
from fastflower.model.member import MemberMeta, parse_meta
from fastflower.model.network import Network, NetworkSpec
from fastflower.model.weight_files import read_weights
from fastflower.recipe import Recipe, derived


def load_initial(network: Network, spec: NetworkSpec, *, recipe: Recipe, fold: FoldSet) -> list[str]:
    """Load the weights of model.init into a new network; lines on what was taken, for people and meta/.

    Raises InputError for weights of another network or normalisation, and for those that have seen validation images.
    """
    path, score = _find(recipe, fold)
    meta, tensors = _read(path)
    lines = [f"model.init: {path}{f', {score}' if score else ''}"]
    if meta is not None:
        _check_network(meta, spec, path)
        lines += _check_leak(meta, fold, path)
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
    weights = {name.removeprefix("backbone."): tensor for name, tensor in tensors.items() if name not in head}
    matched, _ = match_weights(spec.backbone, derived.image_sizes(recipe), tensors=weights, path=path)
    network.backbone.load_state_dict(matched, strict=False)
    lines[0] += f": {len(matched)} tensors, " + _load_head(network, head, meta=meta, spec=spec, fold=fold)
    return lines


def _find(recipe: Recipe, fold: FoldSet) -> tuple[Path, str]:
    """The file that model.init names, and the score of a member of an experiment."""
    init, number = recipe.model.init, fold.train.origin.fold
    if not (runs.MODELS / init).is_dir() or init.endswith(".pth"):
        path = Path(init)
        if path.exists():
            return path, ""
        raise InputError(
            f"model.init = {init}: neither an experiment in {runs.MODELS} nor a file; give one of them or none"
        )
    paths = find_members(init, "auto", metric=recipe.select.metric)
    members = [(path, name) for path in paths if (name := parse_member(path)) and name.kind != "soup"]
    same = [member for member in members if member[1].backbone == recipe.model.backbone]
    if not same:
        others = ", ".join(sorted({name.backbone for _, name in members})) or "none"
        raise InputError(
            f"model.init = {init}: it has no finished epoch of {recipe.model.backbone} (it has {others}); train it, or "
            "choose another model.backbone"
        )
    path, name = max(same, key=lambda member: (member[1].fold == number, _score(member[1])))
    return path, f"the best member of {init} by score, {name.score:.4f} on its fold {name.fold}"


def _score(name: MemberName) -> tuple[float, int]:
    return name.score, -name.seed


def _read(path: Path) -> tuple[MemberMeta | None, dict[str, Tensor]]:
    """The tensors of a file, and the description that only this project's checkpoints have."""
    if path.is_file() and checkpoint.seal(path) is not None:
        content = checkpoint.load(path)
        return parse_meta(content.meta, path), handed_in(content.tensors)
    return None, read_weights(path).tensors


def _check_network(meta: MemberMeta, spec: NetworkSpec, path: Path) -> None:
    if meta.backbone != spec.backbone:
        raise InputError(
            f"model.init = {path}: holds {meta.backbone}, not model.backbone = {spec.backbone}; set that to "
            f"{meta.backbone}"
        )
    for key, theirs, ours in (("mean", meta.mean, spec.mean), ("std", meta.std, spec.std)):
        if max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) > 1e-3:
            raise InputError(
                f"data.{key} = {list(ours)}: the weights of {path} need {list(theirs)}; set data.{key} to that"
            )


def _check_leak(meta: MemberMeta, fold: FoldSet, path: Path) -> list[str]:
    """Refuse weights that were trained on images which validate now; a line where that cannot be known."""
    number = fold.train.origin.fold
    if meta.folds_hash == fold.folds.hash and meta.fold == number and meta.kind != "soup":
        return []
    remedy = f"give weights of fold {number} of the same folds.csv, or weights of other images"
    validating = fold.folds.val_rows(number)
    seen = len(validating)
    if meta.folds_hash != fold.folds.hash:
        folds_path = runs.RESULTS / meta.exp / "meta/folds.csv"
        if not folds_path.exists() or read_folds(folds_path).hash != meta.folds_hash:
            return [
                f"{path} comes from other folds, which are not here: where it has seen validation images, scores are "
                "too high"
            ]
        theirs = read_folds(folds_path)
        trained = {
            theirs.sha256[row]
            for row in range(len(theirs))
            if meta.kind == "soup" or theirs.fold[row] != meta.fold
        }
        seen = sum(fold.folds.sha256[row] in trained for row in validating)
    if seen:
        raise InputError(
            f"model.init = {path}: leak: it was trained on {seen} of the {len(validating)} images that validate fold "
            f"{number}, whose scores would be too high; {remedy}"
        )
    return []


def _load_head(
    network: Network, head: dict[str, Tensor], *, meta: MemberMeta | None, spec: NetworkSpec, fold: FoldSet
) -> str:
    """Load the head where it is of the same kind and classes, else leave it random; returns words for either."""
    if meta is None:
        return "new head (the file does not say whose classes its head has)"
    if meta.class_ids != tuple(fold.classes.ids) or meta.num_classes != spec.num_classes:
        return f"new head ({meta.num_classes} classes there, {spec.num_classes} others here)"
    if meta.head != spec.head:
        return f"new head ({meta.head} there, {spec.head} here)"
    if spec.head == "knn":
        return "the k-NN head holds this fold's images"
    theirs = {name.removeprefix("head."): tensor for name, tensor in head.items()}
    ours = network.head.state_dict()
    if any(name not in theirs or theirs[name].shape != tensor.shape for name, tensor in ours.items()):
        return f"new head (the {meta.head} head there has another width)"
    network.head.load_state_dict(theirs)
    return "head kept, as the classes are equal"
