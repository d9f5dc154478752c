"""Model soups: one network whose weights are the mean of several (Wortsman et al. 2022, arXiv:2203.05482).

checkpoints: in each fold the mean of its own checkpoints, of every kind and seed. None of them saw the fold's
images, so the soup has an out-of-fold score, and is kept only when that reaches the best single checkpoint's.
folds: the mean of a run's members of all folds, one network of a K-th of their size and time. All but one of them
were trained on each image, so its score is too high: below the members' out-of-fold score the soup is refused, above
it nothing is proven but that the folds lie in one basin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from fastflower.core import metric, runs
from fastflower.core.errors import InputError
from fastflower.core.files import remove_abandoned, scratch_folder
from fastflower.data.betons import fold_set
from fastflower.data.loaders import eval_images
from fastflower.evaluation import inference
from fastflower.evaluation.logits import Logits, MemberInfo, MemberLogits
from fastflower.evaluation.selected import single_view_score
from fastflower.model.member import MemberCheckpoint, load_member, save_member
from fastflower.model.network import batch_norms
from fastflower.recipe import Recipe

NORM_IMAGES = 2048  # for new statistics of BatchNorm
KindSeed = tuple[str, int]
FoldLogits = dict[int, Logits[MemberInfo]]
T = TypeVar("T")


@dataclass(frozen=True)
class Soup:
    """The result for one backbone or run: a line for the console, and the files written (none: refused)."""

    line: str
    files: list[Path]


def average_tensors(networks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every floating-point tensor, summed in float64; whole numbers are the first network's.

    Raises InputError for networks whose tensors differ in name or shape.
    """
    shapes = [{name: tensor.shape for name, tensor in network.items()} for network in networks]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(
            "a soup needs networks of one kind, these differ in their tensors; narrow find_pattern"
        )
    return {
        name: torch.stack([network[name].double() for network in networks]).mean(0).to(first.dtype)
        if first.is_floating_point()
        else first
        for name, first in networks[0].items()
    }


def nested_score(candidates: list[dict[int, T]], score: Callable[[list[T]], float]) -> float:
    """The score of choosing the best candidate, fold -> its logits, without the bias of the choice.

    Each fold is predicted by the candidate that is best on the other folds, the first of equal ones. With one fold
    there is nothing to choose by, and it is the first's.
    """
    folds = list(candidates[0])
    chosen = []
    for fold in folds:
        elsewhere = [
            score([part for other, part in candidate.items() if other != fold]) if len(folds) > 1 else 0.0
            for candidate in candidates
        ]
        chosen.append(candidates[int(np.argmax(elsewhere))][fold])
    return score(chosen)


def make_soups(recipe: Recipe, members: list[MemberLogits], device: torch.device) -> list[Soup]:
    """Soups of every backbone (checkpoints) or run (folds) of the evaluated members; files only where accepted."""
    remove_abandoned(runs.MODELS / recipe.exp.name, "*soup__*")
    of_checkpoints = recipe.ensembling.soup == "checkpoints"
    groups: dict[tuple[str, ...] | tuple[str, int], list[MemberLogits]] = {}
    for member in members:
        groups.setdefault((member.info.backbone,) if of_checkpoints else member.run, []).append(member)
    make = checkpoint_soup if of_checkpoints else fold_soup
    return [make(recipe, group, device) for group in groups.values()]


def checkpoint_soup(recipe: Recipe, members: list[MemberLogits], device: torch.device) -> Soup:
    """A greedy soup of the checkpoints that every fold has, best first; one is kept when S does not fall."""
    backbone = members[0].info.backbone
    folds = sorted({member.info.fold for member in members})
    files = {fold: newest_checkpoints(recipe.exp.name, backbone, fold) for fold in folds}
    shared = [key for key in files[folds[0]] if all(key in files[fold] for fold in folds)]
    if len(shared) < 2:
        return Soup(f"{backbone}: no soup, its folds share {len(shared)} kinds of checkpoints", [])
    with scratch_folder("soup") as folder:

        def evaluate(chosen: list[KindSeed]) -> FoldLogits:
            predicted = {}
            for fold in folds:
                path = folder / f"{fold}_{len(chosen)}.pth"
                average_checkpoints(
                    path, [files[fold][key] for key in chosen], recipe=recipe, fold=fold, device=device
                )
                predicted[fold] = inference.predict(path, recipe, device)
            return predicted

        def score(parts: Sequence[MemberLogits]) -> float:
            return soup_score(recipe, parts)

        alone = {key: evaluate([key]) for key in shared}
        shared.sort(key=lambda key: -score(list(alone[key].values())))
        chosen, candidates = [shared[0]], [alone[shared[0]]]
        for key in shared[1:]:
            extended = evaluate([*chosen, key])
            if score(list(extended.values())) >= score(list(candidates[-1].values())):
                chosen, candidates = [*chosen, key], [*candidates, extended]
    nested, single = nested_score(candidates, score), score(list(candidates[0].values()))
    averaged = ", ".join(f"{kind} seed {seed}" for kind, seed in chosen)
    line = f"{backbone}: soup of {averaged}: {in_words(recipe, nested)}"
    reference = f"{chosen[0][0]} alone has {shown(recipe, single)} out of fold"
    if len(chosen) == 1 or nested < single:
        return Soup(f"{line}, refused: {reference}", [])
    written = []
    for fold in folds:
        sources = [files[fold][key] for key in chosen]
        run = runs.Run(exp=recipe.exp.name, backbone=backbone, fold=fold, seed=chosen[0][1])
        epoch = max(load_member(path).meta.epoch for path in sources)
        target = run.checkpoint_path("soup", epoch, score([candidates[-1][fold]]))
        average_checkpoints(target, sources, recipe=recipe, fold=fold, device=device)
        written.append(target)
    return Soup(
        f"{line}, accepted: {reference}; evaluate with ensembling.find_pattern=soup__*",
        written,
    )


def fold_soup(recipe: Recipe, members: list[MemberLogits], device: torch.device) -> Soup:
    """One network of all folds of a run, kept when its S is not below the members' out-of-fold S."""
    backbone, seed = members[0].run
    models = runs.MODELS / recipe.exp.name
    sources = [models / member.info.checkpoint for member in members]
    if len(sources) < 2:
        return Soup(f"{backbone} seed {seed}: no soup of one fold", [])
    if members[0].info.head == "knn":
        return Soup(f"{backbone} seed {seed}: no soup, the k-NN head of each fold holds other images", [])
    single = soup_score(recipe, members)
    with scratch_folder("soup") as folder:
        averaged = folder / "folds.pth"
        average_checkpoints(averaged, sources, recipe=recipe, fold=members[0].info.fold, device=device)
        soup, predicted = load_member(averaged), []
        for member in members:
            path = folder / f"fold{member.info.fold}.pth"
            save_member(path, soup.tensors, replace(soup.meta, fold=member.info.fold))
            predicted.append(inference.predict(path, recipe, device))
    score = soup_score(recipe, predicted)
    line = f"{backbone} seed {seed}: one network of {len(sources)} folds: {in_words(recipe, score)}"
    reference = f"its members have {shown(recipe, single)} out of fold"
    if score < single:
        return Soup(f"{line}, refused: {reference}", [])
    folds = "-".join(str(member.info.fold) for member in members)
    target = models / f"soup__{backbone}__folds{folds}_seed{seed}.pth"
    save_member(target, soup.tensors, soup.meta)
    warning = "Most of it was trained on these images, so the score is no forecast"
    return Soup(
        f"{line}, accepted: {reference}. {warning}; hand it in with export --members {target}", [target]
    )


def newest_checkpoints(exp: str, backbone: str, fold: int) -> dict[KindSeed, Path]:
    """(kind, seed) -> the newest checkpoint of a backbone and fold, in the order of runs.SOUP_CANDIDATES and seeds."""
    newest: dict[KindSeed, tuple[int, Path]] = {}
    for path in sorted((runs.MODELS / exp).glob(f"*__{backbone}__fold{fold}_seed*.pth")):
        name = runs.parse_member(path)
        if (
            name
            and name.kind in runs.SOUP_CANDIDATES
            and name.epoch >= newest.get((name.kind, name.seed), (0, path))[0]
        ):
            newest[name.kind, name.seed] = (name.epoch, path)
    order = sorted(newest, key=lambda key: (runs.SOUP_CANDIDATES.index(key[0]), key[1]))
    return {key: newest[key][1] for key in order}


def average_checkpoints(
    target: Path, sources: list[Path], *, recipe: Recipe, fold: int, device: torch.device
) -> None:
    """Write the mean of checkpoints as one with the first's description and new statistics of BatchNorm."""
    members = [load_member(path) for path in sources]
    names = tuple(path.name for path in sources)
    meta = replace(members[0].meta, kind="soup", soup=names, scores={}, fold=fold)
    soup = MemberCheckpoint(meta, average_tensors([member.tensors for member in members]))
    if _statistics_differ(members):  # those of a frozen backbone are right as they are
        soup = refresh_norms(soup, target, recipe=recipe, device=device)
    save_member(target, soup.tensors, soup.meta)


def _statistics_differ(members: list[MemberCheckpoint]) -> bool:
    """True if the running statistics of BatchNorm are not those of the first member in all of them."""
    first, *others = (member.tensors for member in members)
    names = [name for name in first if name.endswith(("running_mean", "running_var"))]
    return any(not torch.equal(first[name], other[name]) for other in others for name in names)


def refresh_norms(
    soup: MemberCheckpoint, path: Path, *, recipe: Recipe, device: torch.device
) -> MemberCheckpoint:
    """The soup with statistics of BatchNorm from its fold's training images; unchanged without BatchNorm."""
    network = inference.load_network(soup, path, device)
    if not batch_norms(network):
        return soup
    beton = fold_set.open_fold(recipe, soup.meta.fold).train
    rows = np.random.default_rng(0).permutation(beton.rows)[:NORM_IMAGES]
    batch = max(2, recipe.train.batch_per_gpu)
    batches = [part for part in np.array_split(rows, max(1, len(rows) // batch)) if len(part) > 1]

    def images(batch_rows: np.ndarray) -> Tensor:
        pixels = eval_images(
            beton,
            batch_rows,
            size=soup.meta.size,
            factor=soup.meta.resize_factor,
            interpolation=soup.meta.interpolation,
            threads=recipe.data.workers,
        )
        return pixels.permute(0, 3, 1, 2).float()

    update_bn((images(batch_rows) for batch_rows in batches), network, device)
    return MemberCheckpoint(soup.meta, {name: tensor.cpu() for name, tensor in network.state_dict().items()})


def soup_score(recipe: Recipe, predicted: Sequence[MemberLogits]) -> float:
    """The score by select.metric of the images of all folds together, at the single view of training."""
    return single_view_score(predicted, recipe.select.metric, recipe.select.alpha)


def in_words(recipe: Recipe, score: float) -> str:
    """A score with the name of its metric, such as S 0.8123."""
    return f"{metric.parse(recipe.select.metric).title} {shown(recipe, score)}"


def shown(recipe: Recipe, score: float) -> str:
    """A score as people read it."""
    return f"{metric.parse(recipe.select.metric).shown(score):.4f}"
