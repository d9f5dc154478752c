"""Model soups: one network whose weights are the mean of several (Wortsman et al. 2022, arXiv:2203.05482).

checkpoints: in each fold its own checkpoints, of every kind and seed. None of them saw the fold's images, so the
soup has an honest out-of-fold score, and is kept only when that reaches the best single run's.
folds: the members of all folds of a run, in one network of a K-th of their size and time. All but one of them were
trained on each image, so its score is too high: below the members' out-of-fold score it is refused, above it
nothing is proven but that the folds lie in one basin.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from fastflower.core import checkpoint, runs
from fastflower.core.checkpoint import Checkpoint
from fastflower.core.errors import InputError
from fastflower.data.betons import fold_set
from fastflower.data.loaders import eval_images
from fastflower.evaluation import inference
from fastflower.evaluation.logits import Logits
from fastflower.recipe import Recipe

KINDS = ("best_combo", "ema_best", "best_clean", "swa")
NORM_IMAGES = 2048  # from which statistics of BatchNorm are taken anew
Ingredient = tuple[str, int]  # kind, seed


@dataclass(frozen=True)
class Soup:
    """What came of one backbone's soup: a line for people, and the files that were written (none: refused)."""

    line: str
    files: list[Path]


def mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every floating-point tensor, summed in float64; whole numbers are the first's.

    Raises InputError for networks whose tensors differ in name or shape.
    """
    shapes = [{name: tensor.shape for name, tensor in part.items()} for part in parts]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(
            "a soup needs networks of one kind, these differ in their tensors; narrow find_pattern"
        )
    return {
        name: torch.stack([part[name].double() for part in parts]).mean(0).to(first.dtype)
        if first.is_floating_point()
        else first
        for name, first in parts[0].items()
    }


def by_image(data: Logits, alpha: float) -> np.ndarray:
    """What each image adds to S: float64 (N,), in the order of folds.csv; their mean is S."""
    clean = data.single.argmax(1) == data.class_idx
    each = clean.astype(np.float64)
    if len(data.combos):
        each = alpha * clean + (1 - alpha) * (data.corrupt.argmax(2) == data.class_idx).mean(0)
    return each[np.argsort(data.index, kind="stable")]


def nested(tried: list[dict[int, np.ndarray]]) -> float:
    """The honest S of "take the best that was tried": in each fold that which is best by the other folds.

    tried: fold -> what each image adds to S; of equals the first. With one fold there is no other to choose by, and
    it is the first's.
    """
    folds = list(tried[0])
    parts = []
    for fold in folds:
        rest = [
            float(np.concatenate([own[other] for other in folds if other != fold]).mean())
            if len(folds) > 1
            else 0.0
            for own in tried
        ]
        parts.append(tried[int(np.argmax(rest))][fold])
    return float(np.concatenate(parts).mean())


def make(recipe: Recipe, members: list[Logits], device: torch.device) -> list[Soup]:
    """Soups of every backbone (checkpoints) or run (folds) of the evaluated members; files only where accepted."""
    cook = of_checkpoints if recipe.ensembling.soup == "checkpoints" else of_folds
    groups: dict[Any, list[Logits]] = {}
    for member in members:
        key = member.run[0] if recipe.ensembling.soup == "checkpoints" else member.run
        groups.setdefault(key, []).append(member)
    return [cook(recipe, own, device) for own in groups.values()]


def of_checkpoints(recipe: Recipe, members: list[Logits], device: torch.device) -> Soup:
    """A greedy soup of the checkpoints that every fold has, best first; an ingredient stays when S does not fall."""
    backbone, alpha = members[0].run[0], recipe.select.alpha
    folds = sorted({int(member.about["fold"]) for member in members})
    files = {fold: ingredients(recipe.exp.name, backbone, fold) for fold in folds}
    shared = [key for key in files[folds[0]] if all(key in files[fold] for fold in folds)]
    if len(shared) < 2:
        return Soup(f"{backbone}: no soup, its folds share {len(shared)} kinds of checkpoints", [])
    with tempfile.TemporaryDirectory(prefix="fastflower-soup-") as pot:

        def taste(chosen: list[Ingredient]) -> dict[int, np.ndarray]:
            found = {}
            for fold in folds:
                path = Path(pot) / f"{fold}_{len(chosen)}.pth"
                mix(path, [files[fold][key] for key in chosen], recipe=recipe, fold=fold, device=device)
                found[fold] = by_image(inference.predict(path, recipe, device), alpha)
            return found

        alone = {key: taste([key]) for key in shared}
        shared.sort(key=lambda key: -_total(alone[key]))
        chosen, tried = [shared[0]], [alone[shared[0]]]
        for key in shared[1:]:
            more = taste([*chosen, key])
            if _total(more) >= _total(tried[-1]):
                chosen, tried = [*chosen, key], [*tried, more]
        honest, single = nested(tried), _total(tried[0])
        words = (
            f"{backbone}: soup of {', '.join(f'{kind} seed {seed}' for kind, seed in chosen)}: S {honest:.4f}"
        )
        if len(chosen) == 1 or honest < single:
            return Soup(f"{words}, refused: {chosen[0][0]} alone has {single:.4f} out of fold", [])
        written = []
        for fold in folds:
            sources = [files[fold][key] for key in chosen]
            run = runs.Run(recipe.exp.name, backbone, fold, chosen[0][1])
            epoch = max(int(checkpoint.load(path).meta["epoch"]) for path in sources)
            target = run.file("soup", epoch, float(tried[-1][fold].mean()))
            mix(target, sources, recipe=recipe, fold=fold, device=device)
            written.append(target)
        found = f"{words}, accepted: {chosen[0][0]} alone has {single:.4f} out of fold"
        return Soup(f"{found}; evaluate with ensembling.find_pattern=soup__*", written)


def of_folds(recipe: Recipe, members: list[Logits], device: torch.device) -> Soup:
    """One network of all folds of a run, when it is not worse than they are out of fold."""
    (backbone, seed), alpha = members[0].run, recipe.select.alpha
    folder = runs.MODELS / recipe.exp.name
    sources = [folder / str(member.about["checkpoint"]) for member in members]
    if len(sources) < 2:
        return Soup(f"{members[0].run[0]} seed {seed}: no soup of one fold", [])
    single = float(np.concatenate([by_image(member, alpha) for member in members]).mean())
    first = int(members[0].about["fold"])
    with tempfile.TemporaryDirectory(prefix="fastflower-soup-") as pot:
        whole = Path(pot) / "folds.pth"
        mix(whole, sources, recipe=recipe, fold=first, device=device)
        soup, found = checkpoint.load(whole), []
        for member in members:
            path = Path(pot) / f"fold{member.about['fold']}.pth"
            checkpoint.save(path, soup.tensors, soup.meta | {"fold": int(member.about["fold"])})
            found.append(by_image(inference.predict(path, recipe, device), alpha))
        score = float(np.concatenate(found).mean())
        words = f"{backbone} seed {seed}: one network of {len(sources)} folds: S {score:.4f}"
        if score < single:
            return Soup(f"{words}, refused: its members have {single:.4f} out of fold", [])
        names = "-".join(str(int(member.about["fold"])) for member in members)
        target = folder / f"soup__{backbone}__folds{names}_seed{seed}.pth"
        checkpoint.save(target, soup.tensors, soup.meta)
    line = f"{words}, accepted: its members have {single:.4f} out of fold. Most of it was trained on these images"
    return Soup(f"{line}, so the score is no forecast; hand it in with export --members {target}", [target])


def ingredients(exp: str, backbone: str, fold: int) -> dict[Ingredient, Path]:
    """(kind, seed) -> the newest checkpoint of a backbone and fold."""
    found: dict[Ingredient, tuple[int, Path]] = {}
    for path in sorted((runs.MODELS / exp).glob(f"*__{backbone}__fold{fold}_seed*.pth")):
        name = runs.parse_member(path)
        if name and name.kind in KINDS and name.epoch >= found.get((name.kind, name.seed), (0, path))[0]:
            found[name.kind, name.seed] = (name.epoch, path)
    order = sorted(found, key=lambda key: (KINDS.index(key[0]), key[1]))
    return {key: found[key][1] for key in order}


def mix(target: Path, sources: list[Path], *, recipe: Recipe, fold: int, device: torch.device) -> None:
    """Write the mean of checkpoints as one, described as the first; BatchNorm's statistics are taken anew."""
    parts = [checkpoint.load(path) for path in sources]
    meta = parts[0].meta | {
        "kind": "soup",
        "soup": [path.name for path in sources],
        "scores": {},
        "fold": fold,
    }
    soup = Checkpoint(mean([part.tensors for part in parts]), meta)
    if len(sources) > 1:
        soup = refresh_norms(soup, target, recipe=recipe, device=device)
    checkpoint.save(target, soup.tensors, soup.meta)


def refresh_norms(soup: Checkpoint, path: Path, *, recipe: Recipe, device: torch.device) -> Checkpoint:
    """The same with statistics of BatchNorm from training images of its fold; as it is where there is none."""
    network = inference.load_network(soup, path, device)
    if not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        return soup
    beton = fold_set.open_fold(recipe, int(soup.meta["fold"])).train
    rows = np.random.default_rng(0).permutation(beton.rows)[:NORM_IMAGES]
    height, width = soup.meta["size"]
    factor, interpolation = float(soup.meta["resize_factor"]), str(soup.meta["interpolation"])
    batch = max(2, recipe.train.batch_per_gpu)
    parts = [part for part in np.array_split(rows, max(1, len(rows) // batch)) if len(part) > 1]

    def images(part: np.ndarray) -> Tensor:
        pixels = eval_images(
            beton,
            part,
            size=(height, width),
            factor=factor,
            interpolation=interpolation,
            threads=recipe.data.workers,
        )
        return pixels.permute(0, 3, 1, 2).float()

    update_bn((images(part) for part in parts), network, device)
    return Checkpoint({name: tensor.cpu() for name, tensor in network.state_dict().items()}, soup.meta)


def _total(found: dict[int, np.ndarray]) -> float:
    return float(np.concatenate(list(found.values())).mean())
