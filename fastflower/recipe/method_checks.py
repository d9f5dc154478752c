"""Checks of training methods: frozen backbones, auxiliary columns, unlabelled images, trainings on all images."""

from __future__ import annotations

from pathlib import Path

from fastflower.core.errors import InputError
from fastflower.recipe.derived import aux_weights, validates
from fastflower.recipe.schema import Recipe
from fastflower.recipe.starting_point import from_scratch


def is_nested(first: str, second: str) -> bool:
    """True if two paths are equal or one is inside the other."""
    a, b = Path(first).resolve(), Path(second).resolve()
    return a == b or a in b.parents or b in a.parents


def check_start(recipe: Recipe) -> None:
    """Refuse weights to start from that contradict checks.from_scratch, or are the experiment's own."""
    start = f"model.init = {recipe.model.init}" if recipe.model.init else "model.pretrained = true"
    if recipe.checks.from_scratch and (recipe.model.pretrained or recipe.model.init):
        raise InputError(
            f"{start}: this recipe trains from scratch (checks.from_scratch=true), as its contest demands; set "
            "model.pretrained=false and no model.init, or checks.from_scratch=false"
        )
    if recipe.model.init and recipe.model.init == recipe.exp.name:
        raise InputError(
            f"model.init = {recipe.model.init}: an experiment cannot start from itself; set another exp.name, or "
            "train.extend=true to train it longer"
        )


def check_frozen(recipe: Recipe) -> None:
    """Refuse settings that contradict a backbone, or weights of a backbone, that stay as they are."""
    model, lora = recipe.model, recipe.model.lora
    if model.head == "knn" and (model.freeze == "none" or not model.frozen_views):
        raise InputError(
            "model.head = knn finds neighbours by features that stay as they are; set model.freeze=backbone and "
            "model.frozen_views to 1 or more"
        )
    if lora.targets != "auto" and not (
        isinstance(lora.targets, list)
        and lora.targets
        and all(isinstance(part, str) for part in lora.targets)
    ):
        raise InputError(
            f"model.lora.targets = {lora.targets}: must be auto or a list of layer names, such as [qkv, proj]"
        )
    setting = "model.freeze = backbone" if model.freeze == "backbone" else f"model.lora.rank = {lora.rank}"
    if model.freeze == "none" and not lora.rank:
        return
    if from_scratch(recipe) and ":" not in model.backbone:  # an own network's function may load weights
        raise InputError(
            f"{setting} keeps weights that are random here; set model.pretrained=true or model.init, or train them"
        )
    if model.freeze == "none":
        return
    idle = {
        "model.lora.rank=0": lora.rank > 0,
        "model.drop_path=0": model.drop_path > 0,
        "model.grad_checkpointing=false": model.grad_checkpointing,
        "llrd.enabled=auto": recipe.llrd.enabled is True,
        "llrd.unfreeze_schedule=null": recipe.llrd.unfreeze_schedule is not None,
        "model.frozen_views=0": recipe.semi.enabled and model.frozen_views > 0,
        "distill.teacher=[]": bool(recipe.distill.teacher) and model.head == "knn",
        "opt.sam_rho=0": recipe.opt.sam_rho > 0 and model.head == "knn",
    }
    wrong = [remedy for remedy, asked in idle.items() if asked]
    if wrong:
        keys = ", ".join(remedy.partition("=")[0] for remedy in wrong)
        raise InputError(
            f"{setting}, with head {model.head}, contradicts {keys}; set {' '.join(wrong)}, or model.freeze=none"
        )


def check_auxiliary(recipe: Recipe, advice: list[str]) -> None:
    """Refuse auxiliary columns that are none, or that nothing would learn."""
    data = recipe.data
    if not data.aux_cols:
        return
    aux_weights(recipe)
    taken = [name for name in data.aux_cols if name in (data.image_col, data.label_col)]
    repeated = [name for name in data.aux_cols if data.aux_cols.count(name) > 1]
    if taken or repeated:
        fault = (
            f"{taken[0]} is the column of the images or labels" if taken else f"{repeated[0]} is there twice"
        )
        raise InputError(f"data.aux_cols = {data.aux_cols}: {fault}; name further columns, each once")
    if recipe.model.head == "knn":
        raise InputError(
            f"data.aux_cols = {data.aux_cols}: with model.head=knn nothing trains; choose another head, or leave "
            "data.aux_cols empty"
        )
    if recipe.model.freeze == "backbone":
        advice.append(
            "data.aux_cols with model.freeze=backbone: the auxiliary heads share features that stay as they are, so "
            "they are scored and cannot help the main head"
        )


def check_unscored(recipe: Recipe, advice: list[str]) -> None:
    """Refuse settings that training on every image contradicts; advice on those that it makes idle."""
    if validates(recipe):
        return
    monitor = (
        f"; the plateau schedule follows the training loss instead of sched.monitor={recipe.sched.monitor}"
        if recipe.sched.name == "plateau"
        else ""
    )
    if recipe.data.split != "none":
        if recipe.distill.teacher:
            raise InputError(
                "data.fold = none: distill.teacher is known out of fold only, and a training on all images has no "
                "fold; leave out one of them"
            )
        advice.append(
            f"data.fold=none: no image is held out, so nothing scores this training, which follows its folds{monitor}"
        )
        return
    if recipe.data.val:
        raise InputError(
            f"data.val = {recipe.data.val} and data.split = none: the first names validation images, the second trains "
            "on every image; leave one of them out"
        )
    advice.append(
        f"data.split=none: no image is held out, so all {recipe.sched.cosine_epochs} epochs are trained and none is "
        f"the best: robust, es and select have no effect{monitor}"
    )
    if not (recipe.ema.enabled or recipe.swa.enabled):
        advice.append(
            "data.split=none without ema.enabled and swa.enabled keeps the weights of the last step alone, as last; an "
            "average of the last epochs' is usually better"
        )


def check_semi(recipe: Recipe, advice: list[str]) -> None:
    """Refuse semi-supervised trainings that have nothing to learn from, or contradict the rest of the recipe."""
    semi = recipe.semi
    if not semi.enabled and not semi.rounds:
        return
    if semi.enabled and semi.method == "soft" and not semi.soft_teacher:
        raise InputError(
            "semi.method=soft needs semi.soft_teacher, the experiment that labels the unlabelled images; with "
            "semi.rounds, python -m fastflower.campaign sets it"
        )
    if bool(recipe.data.unlabelled) == (recipe.data.labels_per_class is not None):
        raise InputError(
            f"{'semi.enabled=true' if semi.enabled else f'semi.rounds = {semi.rounds}'} learns from data.unlabelled or "
            "from the images that data.labels_per_class leaves unlabelled; "
            f"got {'both, give one' if recipe.data.unlabelled else 'neither, give one or set semi.enabled=false'}"
        )
    nested = recipe.data.unlabelled and is_nested(recipe.data.unlabelled, recipe.data.test)
    if nested and not recipe.checks.allow_unlabelled_test:
        raise InputError(
            f"data.unlabelled = {recipe.data.unlabelled} and data.test = {recipe.data.test} are one inside the other; "
            "keep them apart, or set checks.allow_unlabelled_test=true if the contest's rules allow it"
        )
    if semi.enabled and recipe.opt.sam_rho:
        raise InputError(
            f"opt.sam_rho = {recipe.opt.sam_rho:g}: a step's second pass would label unlabelled images by other "
            "weights than the first; set opt.sam_rho=0, or semi.enabled=false"
        )
    if recipe.loss.name == "bce":
        raise InputError(
            "semi.enabled=true needs a softmax over the classes, which loss.name = bce does not train; use lsce or ce"
        )
    if semi.teacher == "ema" and not recipe.ema.enabled:
        raise InputError("semi.teacher = ema needs ema.enabled=true; enable it or use semi.teacher=raw")
    if semi.ramp_epochs >= recipe.sched.cosine_epochs:
        advice.append(
            f"semi.ramp_epochs = {semi.ramp_epochs}: the weight of unlabelled images never reaches semi.lambda_u in "
            f"{recipe.sched.cosine_epochs} epochs"
        )
