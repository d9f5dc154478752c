"""Hyperparameter search by Optuna, kept in a journal file, so that a killed search continues as if it never stopped."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fastflower.campaign.launch import Result
from fastflower.campaign.plan import Overrides, Task, combinations, fold_tasks, format_value
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.files import digest
from fastflower.core.records import read_record, write_record
from fastflower.recipe import load, to_yaml
from fastflower.recipe.checks import check_scored


@dataclass(frozen=True)
class JournalRecord:
    """The entries of Optuna's journal: studies, trials, values and scores, in the order they were made."""

    FORMAT: ClassVar[int] = 1
    REMEDY: ClassVar[str] = (
        "move it away; the same command then proposes the same trials and keeps their trainings"
    )

    entries: list[dict[str, Any]] = field(default_factory=list)


class Journal:
    """A journal for optuna.storages.JournalStorage, as a record that each addition replaces atomically.

    Optuna's own file has no checksums, and a killed process leaves half a line and a lock in it. Only one process may
    write: see `files.locked`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = read_record(path, JournalRecord).entries if path.exists() else []

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        yield from self.entries[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        entries = [*self.entries, *logs]
        write_record(self.path, JournalRecord(entries))
        self.entries = entries


class Search:
    """An Optuna study of `trials` proposals, each trained on all folds and seeds; the objective is the mean score.

    Every trial trains all seeds; values are sampled from the other lists and the ranges. A value depends on the
    recipe's seed, the trial's number, the key and the earlier scores, and so not on interruptions. A journal belongs to
    one recipe and search space: InputError when it was started with others.
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
        recipe = load(self.file, self.fixed)
        check_scored(recipe, "a search")
        self.exp = recipe.exp.name
        self.pending: dict[int, dict[Task, Result | None]] = {}  # by trial number
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.study = self._load(journal)

    def tasks(self) -> Iterator[Task]:
        """Yield the trainings of complete trials (already finished), of unfinished trials, then of new trials.

        A new trial is proposed only when its trainings are requested, so the sampler knows all earlier results.
        """
        state = self.optuna.trial.TrialState
        for trial in self.study.get_trials(states=[state.COMPLETE]):
            yield from self._trainings(trial.number, trial.params)
        for trial in self.study.get_trials(states=[state.RUNNING]):
            yield from self._proposed(self.optuna.trial.Trial(self.study, trial._trial_id))
        while len(self.study.get_trials(states=[state.COMPLETE, state.RUNNING])) < self.trials:
            yield from self._proposed(self.study.ask())

    def _proposed(self, trial: Any) -> list[Task]:
        """The trainings of a trial, whose values are sampled as far as it has none."""
        for choice in self.choices:
            self._seed_sampler(trial.number, choice.key)
            trial.suggest_categorical(choice.key, choice.values)
        for interval in self.ranges:
            key, low, high = interval.key, interval.low, interval.high
            self._seed_sampler(trial.number, key)
            if interval.integer:
                trial.suggest_int(key, int(low), int(high), log=interval.log)
            else:
                trial.suggest_float(key, low, high, log=interval.log)
        return self._trainings(trial.number, trial.params)

    def _seed_sampler(self, number: int, key: str) -> None:
        seed = int(digest(str(self.seed), str(number), key), 16) % 2**32
        self.study.sampler = self.optuna.samplers.TPESampler(seed=seed)

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
        optuna, loaded = self.optuna, load(self.file, self.fixed)
        self.seed = loaded.seed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = optuna.storages.JournalStorage(Journal(journal))
        space = digest(to_yaml(loaded), repr((self.seeds, self.choices, self.ranges)))
        if not storage.get_all_studies():
            optuna.create_study(storage=storage, study_name=self.exp, direction="maximize")
        study = optuna.load_study(storage=storage, study_name=None)
        if study.user_attrs.get("space", space) != space:
            raise InputError(
                f"{journal} holds a search of another recipe or other ranges; repeat its command, "
                "or set another exp.name"
            )
        if "space" not in study.user_attrs:
            study.set_user_attr("space", space)
        return study
