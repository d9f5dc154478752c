"""Hyperparameter search by Optuna, stored in a journal file so that a killed search can continue."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.campaign.launch import Result
from fastflower.campaign.plan import Overrides, Task, combinations, fold_tasks, format_value
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.files import digest
from fastflower.recipe import load, to_yaml


class Search:
    """An Optuna study of `trials` proposals, each trained on all folds and seeds; the objective is the mean score.

    Every trial trains all seeds; values are sampled from the other lists and the ranges. A journal belongs to one
    recipe and search space: InputError when it was started with others.
    """

    def __init__(self, files: list[str], overrides: Overrides, *, trials: int, journal: Path) -> None:
        if len(files) > 1:
            raise InputError(f"got {len(files)} recipes ({', '.join(files)}); a search takes one")
        self.seeds = [axis for axis in overrides.axes if axis.key == "seed"]
        self.choices = [axis for axis in overrides.axes if axis.key != "seed"]
        self.ranges = overrides.ranges
        if not (self.choices or self.ranges):
            raise InputError(
                "--trials has nothing to search; give ranges such as opt.lr=log:1e-4..1e-2, or lists"
            )
        try:
            import optuna
        except ImportError:
            raise EnvironmentFault(
                "--trials needs Optuna, which is not installed; pip install 'fastflower[sweep]'"
            ) from None
        self.optuna, self.file, self.fixed, self.trials = optuna, files[0], overrides.fixed, trials
        self.exp = load(self.file, self.fixed).exp.name
        self.pending: dict[int, dict[Task, Result | None]] = {}  # by trial number
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal.parent.mkdir(parents=True, exist_ok=True)
        self.study = self._load(journal)

    def tasks(self) -> Iterator[Task]:
        """Yield the trainings of complete trials (already finished), of unfinished trials, then of new trials.

        A new trial is proposed only when its trainings are requested, so the sampler knows all earlier results.
        """
        state = self.optuna.trial.TrialState
        searched = {*(choice.key for choice in self.choices), *(interval.key for interval in self.ranges)}
        for trial in self.study.get_trials(states=[state.COMPLETE]):
            yield from self._trainings(trial.number, trial.params)
        for trial in self.study.get_trials(states=[state.RUNNING]):
            if set(trial.params) == searched:
                yield from self._trainings(trial.number, trial.params)
            else:  # killed while its values were sampled
                self.study.tell(trial.number, state=state.FAIL)
        while len(self.study.get_trials(states=[state.COMPLETE, state.RUNNING])) < self.trials:
            trial = self.study.ask()
            for choice in self.choices:
                trial.suggest_categorical(choice.key, choice.values)
            for interval in self.ranges:
                key, low, high = interval.key, interval.low, interval.high
                if interval.integer:
                    trial.suggest_int(key, int(low), int(high), log=interval.log)
                else:
                    trial.suggest_float(key, low, high, log=interval.log)
            yield from self._trainings(trial.number, trial.params)

    def record(self, result: Result) -> None:
        """Store a result; the last result of a trial completes it with the mean score.

        A trial with a failed training stays unfinished: the next command retries that training.
        """
        number = next(n for n, results in self.pending.items() if result.task in results)
        results = self.pending[number]
        results[result.task] = result
        if any(item is None for item in results.values()):
            return
        del self.pending[number]
        if self.study.trials[number].state.is_finished():  # completed by an earlier command
            return
        scores = [end.best.score for item in results.values() if item and (end := item.end)]
        if len(scores) == len(results):
            self.study.tell(number, float(np.mean(scores)))

    def summary(self) -> list[str]:
        """One line: the best trial, its score and its values as key=value arguments."""
        complete = self.study.get_trials(states=[self.optuna.trial.TrialState.COMPLETE])
        if not complete:
            return [f"search: none of {len(self.study.trials)} trials has a score"]
        best = self.study.best_trial
        values = " ".join(f"{key}={format_value(value)}" for key, value in best.params.items())
        return [
            f"search: best of {len(complete)} trials is trial {best.number} with {best.value:.4f}: {values}"
        ]

    def _trainings(self, number: int, params: dict[str, Any]) -> list[Task]:
        exp = f"{self.exp}-trial_{number:04}"
        tasks = [
            task
            for settings in combinations(self.seeds)
            for task in fold_tasks(self.file, self.fixed, settings={**settings, **params}, exp=exp)
        ]
        self.pending[number] = dict.fromkeys(tasks)
        return tasks

    def _load(self, journal: Path) -> Any:
        optuna = self.optuna
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            backend = optuna.storages.journal.JournalFileBackend(str(journal))
            storage = optuna.storages.JournalStorage(backend)
        loaded = load(self.file, self.fixed)
        space = digest(to_yaml(loaded), repr((self.seeds, self.choices, self.ranges)))
        study = optuna.create_study(
            storage=storage, study_name=self.exp, direction="maximize", load_if_exists=True
        )
        if study.user_attrs.setdefault("space", space) != space:
            raise InputError(
                f"{journal} holds a search of another recipe or other ranges; repeat its command, "
                "or set another exp.name"
            )
        study.set_user_attr("space", space)
        # another seed, so that a resumed sampler does not repeat its proposals
        study.sampler = optuna.samplers.TPESampler(seed=loaded.seed + len(study.trials))
        return study
