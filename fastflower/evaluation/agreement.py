"""Agreement of a recipe with the members that were trained: evaluate, ensemble, export and report refuse another one.

An experiment may hold several backbones: the recipe's must be one of them, and its members must have the recipe's
head, one of its image sizes, its normalisation and its crop. All members must be of the classes and folds in data.home.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.core.errors import InputError
from fastflower.data.folds import Folds, read_folds
from fastflower.data.labels import ClassMap, class_differences, read_classes
from fastflower.recipe import Recipe, derived


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The training of a member, as far as a file describes it: a checkpoint all of it, logits and scores a part."""

    name: str
    backbone: str
    head: str
    size: tuple[int, int]
    class_hash: str
    folds_hash: str
    class_ids: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    resize_factor: float | None = None

    @classmethod
    def of(cls, name: str, *sources: object) -> Trained:
        """The description of a member in these objects, of which the first that has a field gives it."""
        known: dict[str, Any] = {"name": name}
        for source in sources:
            for field in fields(cls):
                if hasattr(source, field.name):
                    known.setdefault(field.name, getattr(source, field.name))
        return cls(**known)


def check_recipe(recipe: Recipe, members: Sequence[Trained]) -> None:
    """Refuse a recipe that contradicts the trained members; InputError names the key, both values and the member."""
    backbone = recipe.model.backbone
    trained = sorted({member.backbone for member in members})
    if backbone not in trained:
        raise InputError(
            f"model.backbone = {backbone}, but the members of {recipe.exp.name} are of {', '.join(trained)}; give the "
            f"recipe they were trained with, or model.backbone={trained[0]}"
        )
    for member in members:
        if member.backbone == backbone:
            _check_network(recipe, member)
    home = Path(recipe.data.home)
    classes, folds = home / "classes.csv", home / "folds.csv"
    check_data(
        members,
        home,
        classes=read_classes(classes) if classes.is_file() else None,
        folds=read_folds(folds) if folds.is_file() else None,
    )


def check_data(
    members: Sequence[Trained], home: Path, *, classes: ClassMap | None, folds: Folds | None
) -> None:
    """Refuse members of other classes or folds than those of data.home; fields that are None are not compared."""
    for member in members:
        difference = class_differences(classes.ids, member.class_ids) if classes and member.class_ids else ""
        for noun, trained, present, detail in (
            ("classes", member.class_hash, classes and classes.hash, difference and f", {difference}"),
            ("folds", member.folds_hash, folds and folds.hash, ""),
        ):
            if present is not None and trained != present:
                raise InputError(
                    f"{member.name} was trained with other {noun} ({trained}{detail}) than {home} holds ({present}); "
                    "point data.home at its conversion, or train again"
                )


def _check_network(recipe: Recipe, member: Trained) -> None:
    """Refuse another head, size, normalisation or crop than that of a member."""
    data, factor = recipe.data, derived.eval_factor(recipe)
    compared: list[tuple[str, object, object, bool]] = [
        ("model.head", recipe.model.head, member.head, recipe.model.head == member.head),
        ("data.img_size", data.img_size, list(member.size), _has_size(recipe, member.size)),
    ]
    for name, wanted, trained in (("mean", data.mean, member.mean), ("std", data.std, member.std)):
        if trained is not None:
            fits = wanted == "auto" or np.allclose(np.asarray(wanted, float), trained)
            compared.append((f"data.{name}", wanted, list(trained), fits))
    if member.resize_factor is not None:
        resize = "crop" if member.resize_factor else "whole"
        compared += [
            ("data.resize", data.resize, resize, data.resize == resize),
            ("eval.resize_factor", factor, member.resize_factor, factor == member.resize_factor),
        ]
    for key, wanted, got, fits in compared:
        if not fits:
            raise InputError(
                f"{key} = {wanted}, but {member.name} was trained with {got}; give the recipe it was trained with, "
                "or change exp.name"
            )


def _has_size(recipe: Recipe, size: tuple[int, int]) -> bool:
    """True if a stage of the recipe trains at this (height, width), or at the nearest that its backbone takes."""
    if tuple(size) in derived.image_sizes(recipe):
        return True
    from fastflower.model.network import fitted  # here: torch and timm take seconds

    return tuple(size) in derived.image_sizes(fitted(recipe)[0])
