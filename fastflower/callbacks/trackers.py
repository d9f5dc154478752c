"""Composer's loggers to Weights & Biases and MLflow, optional packages that a recipe may ask for."""

from __future__ import annotations

from composer.loggers import LoggerDestination, MLFlowLogger, WandBLogger

from fastflower.core.runs import Run
from fastflower.recipe import Recipe


def trackers(recipe: Recipe, run: Run) -> list[LoggerDestination]:
    """Loggers to the services that the recipe names; the experiment is their project."""
    loggers: list[LoggerDestination] = []
    if recipe.log.wandb:
        folder = {"dir": str(run.results_dir)}
        loggers.append(WandBLogger(project=run.exp, name=run.stem, group=run.backbone, init_kwargs=folder))
    if recipe.log.mlflow:
        loggers.append(MLFlowLogger(experiment_name=run.exp, run_name=run.stem, log_system_metrics=False))
    return loggers
