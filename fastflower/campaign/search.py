"""Searches by Optuna: it proposes values, trainings score them, a journal file remembers; killed searches go on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastflower.campaign.launch import Result
from fastflower.campaign.plan import Task, Words, combinations, trainings, written
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.files import digest
from fastflower.recipe import load, to_yaml


class Search:
    """A study of `trials` proposals; each is trained on all folds and seeds, and its value is their mean score.

    Seeds are trained in every trial, other lists and the ranges are drawn from. The journal belongs to one recipe and
    one space: InputError when it was begun with others.
    """

    def __init__(self, files: list[str], words: Words, *, trials: int, journal: Path) -> None:
        if len(files) > 1:
            raise InputError(f"got {len(files)} recipes ({', '.join(files)}); a search is of one")
        self.fixed = [axis for axis in words.axes if axis.key == "seed"]
        self.choices = [axis for axis in words.axes if axis.key != "seed"]
        self.ranges = words.ranges
        if not (self.choices or self.ranges):
            raise InputError(
                "--trials without anything to draw; give ranges such as opt.lr=log:1e-4..1e-2, or lists"
            )
        try:
            import optuna
        except ImportError:
            raise EnvironmentFault(
                "--trials needs Optuna, which is not installed; pip install 'fastflower[sweep]'"
            ) from None
        self.optuna, self.file, self.plain, self.trials = optuna, files[0], words.plain, trials
        self.exp = load(self.file, self.plain).exp.name
        self.open: dict[int, dict[Task, Result | None]] = {}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal.parent.mkdir(parents=True, exist_ok=True)
        self.study = self._load(journal)

    def tasks(self) -> Iterator[Task]:
        """The trainings of trial after trial: those with a value, which are kept, then those cut short or failed.

        Each new trial is proposed only when it is asked for, so that it knows of those that ended before.
        """
        state = self.optuna.trial.TrialState
        drawn = {*(choice.key for choice in self.choices), *(own.key for own in self.ranges)}
        for trial in self.study.get_trials(states=[state.COMPLETE]):
            yield from self._trainings(trial.number, trial.params)
        for trial in self.study.get_trials(states=[state.RUNNING]):
            if set(trial.params) == drawn:
                yield from self._trainings(trial.number, trial.params)
            else:  # killed while it was drawn
                self.study.tell(trial.number, state=state.FAIL)
        while len(self.study.get_trials(states=[state.COMPLETE, state.RUNNING])) < self.trials:
            trial = self.study.ask()
            for choice in self.choices:
                trial.suggest_categorical(choice.key, choice.values)
            for own in self.ranges:
                if own.whole:
                    trial.suggest_int(own.key, int(own.low), int(own.high), log=own.log)
                else:
                    trial.suggest_float(own.key, own.low, own.high, log=own.log)
            yield from self._trainings(trial.number, trial.params)

    def tell(self, result: Result) -> None:
        """Hand in a result; the last one of a trial closes it with the mean score.

        A trial of which a training failed stays open: the next command tries that training again.
        """
        number = next(n for n, own in self.open.items() if result.task in own)
        own = self.open[number]
        own[result.task] = result
        if any(one is None for one in own.values()):
            return
        del self.open[number]
        if self.study.trials[number].state.is_finished():  # an earlier command has handed in its value
            return
        scores = [one.end["best"]["score"] for one in own.values() if one and one.end]
        if len(scores) == len(own):
            self.study.tell(number, float(np.mean(scores)))

    def summary(self) -> list[str]:
        """The best trial, as words for a recipe."""
        done = self.study.get_trials(states=[self.optuna.trial.TrialState.COMPLETE])
        if not done:
            return [f"search: none of {len(self.study.trials)} trials has a score"]
        best = self.study.best_trial
        words = " ".join(f"{key}={written(value)}" for key, value in best.params.items())
        return [f"search: best of {len(done)} trials is trial {best.number} with {best.value:.4f}: {words}"]

    def _trainings(self, number: int, params: dict[str, Any]) -> list[Task]:
        exp = f"{self.exp}-trial_{number:04}"
        found = []
        for settings in combinations(self.fixed):
            found += trainings(self.file, self.plain, settings={**settings, **params}, exp=exp)
        self.open[number] = dict.fromkeys(found)
        return found

    def _load(self, journal: Path) -> Any:
        optuna = self.optuna
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            backend = optuna.storages.journal.JournalFileBackend(str(journal))
            storage = optuna.storages.JournalStorage(backend)
        loaded = load(self.file, self.plain)
        space = digest(to_yaml(loaded), repr((self.fixed, self.choices, self.ranges)))
        study = optuna.create_study(
            storage=storage, study_name=self.exp, direction="maximize", load_if_exists=True
        )
        if study.user_attrs.setdefault("space", space) != space:
            raise InputError(
                f"{journal} holds a search of another recipe or other ranges; repeat its command, "
                "or choose another exp.name"
            )
        study.set_user_attr("space", space)
        # a resumed sampler must not draw again what it drew before
        study.sampler = optuna.samplers.TPESampler(seed=loaded.seed + len(study.trials))
        return study
