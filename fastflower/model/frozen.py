"""The recipe of a training on frozen features: settings for images are switched off, with a line for each."""

from __future__ import annotations

from dataclasses import replace

from fastflower.recipe import Recipe, derived


def features_are_fixed(recipe: Recipe) -> bool:
    """True if a recipe trains on features of fixed views, which are computed once."""
    return recipe.model.freeze == "backbone" and recipe.model.frozen_views > 0


def frozen_recipe(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe as a training on features that are computed once follows it, and lines on what changed.

    Fixed views have one size and are not mixed. A k-NN head has no training steps: one epoch without any, of the
    evaluation view, and no averages of weights. Any other recipe is returned as it is.
    """
    if not features_are_fixed(recipe):
        return recipe, []
    lines, sizes = [], derived.image_sizes(recipe)
    if len(sizes) > 1:
        height, width = sizes[-1]
        size = height if height == width else [height, width]
        batches = recipe.train.stage_batch
        data = replace(recipe.data, img_size=[size], size_epochs="auto")
        train = replace(recipe.train, stage_batch=[batches[-1]] if isinstance(batches, list) else batches)
        recipe = replace(recipe, data=data, train=train)
        lines.append(f"data.img_size = {[size]}: the features of fixed views have one size")
    if recipe.model.head == "knn":
        return _without_steps(recipe), [*lines, "model.head = knn: one epoch without training steps"]
    if recipe.reg.mix_prob or recipe.reg.mix_prob_final:
        recipe = replace(recipe, reg=replace(recipe.reg, mix_prob=0.0, mix_prob_final=0.0))
        lines.append("reg.mix_prob = 0: fixed views are not mixed (model.frozen_views=0 mixes new ones)")
    return recipe, lines


def _without_steps(recipe: Recipe) -> Recipe:
    return replace(
        recipe,
        model=replace(recipe.model, frozen_views=1),
        reg=replace(recipe.reg, mix_prob=0.0, mix_prob_final=0.0),
        sched=replace(recipe.sched, cosine_epochs=1, warmup_epochs=0),
        data=replace(recipe.data, size_epochs="auto"),
        ema=replace(recipe.ema, enabled=False),
        swa=replace(recipe.swa, enabled=False),
    )
