"""Campaigns: planning, launching, skipping finished runs, failures, result tables, searches and Ray."""

from __future__ import annotations

import csv
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastflower import train
from fastflower.bench.kills import PR_SET_CHILD_SUBREAPER
from fastflower.campaign import cluster, launch, plan, results
from fastflower.campaign.__main__ import default_ranks, main
from fastflower.campaign.heatmap import heat_map
from fastflower.campaign.launch import Finished, Result
from fastflower.campaign.search import Search
from fastflower.core import checkpoint, errors, files, runs
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.core.records import write_record
from fastflower.recipe import parse_command
from fastflower.recipe.run_record import BestEpoch, RunEnd
from support import toy_project

SHORT = (
    "sched.cosine_epochs=1",
    "sched.warmup_epochs=0",
    "data.img_size=32",
    "data.size_epochs=auto",
    "tta.scales=[32]",
    "robust.enabled=false",
)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.project(tmp_path)


def planned(*overrides: str, files: tuple[str, ...] = ("tiny.yaml",)) -> list[plan.Task]:
    return plan.tasks(list(files), plan.parse_overrides(list(overrides)))


def ended(task: plan.Task, score: float, seconds: float = 60.0) -> Result:
    """Result of a training that only wrote its end file."""
    scores = {"clean_ema": score, "corrupt_ema": score / 2, "macro_recall_ema": 0.5, "macro_f1_ema": 0.25}
    end = RunEnd(
        reason="all 1 epochs", stopped_early=False, epochs=1, best=BestEpoch(epoch=1, score=score, weights="ema"),
        idle_epochs=0, scores=scores, last_scores=scores, files={}, seconds=seconds, saving_seconds=0.0,
        determinism="full", identity={},
    )  # fmt: skip
    write_record(task.run.end_path, end)
    return Result(task, "done")


# planning


def test_folds_seeds_and_backbones_share_an_experiment(project):
    tasks = planned("data.fold=all", "seed=[1,2]", "model.backbone=[test_vit,test_resnet]")
    assert {task.run.exp for task in tasks} == {"tiny"}
    assert [(t.run.seed, t.run.backbone, t.run.fold) for t in tasks] == [
        (seed, backbone, fold) for seed in (1, 2) for backbone in ("test_vit", "test_resnet") for fold in (0, 1, 2)
    ]  # fmt: skip
    assert tasks[0].recipe.seed == 1 and tasks[0].recipe.data.fold == 0


def test_other_keys_name_their_experiments_and_reach_the_training(project):
    tasks = planned("opt.lr=[1e-3,2e-4]", "train.batch_per_gpu=[4,8]", "reg.ls_eps=0.2")
    assert [task.run.exp for task in tasks] == [
        "tiny-lr_0.001-batch_per_gpu_4",
        "tiny-lr_0.001-batch_per_gpu_8",
        "tiny-lr_0.0002-batch_per_gpu_4",
        "tiny-lr_0.0002-batch_per_gpu_8",
    ]
    for task in tasks:
        parsed = parse_command(list(task.arguments))
        assert parsed == task.recipe
        assert (parsed.opt.lr, parsed.train.batch_per_gpu, parsed.reg.ls_eps, parsed.exp.name) == (
            task.settings["opt.lr"], task.settings["train.batch_per_gpu"], 0.2, task.run.exp,
        )  # fmt: skip


def test_a_list_for_a_key_that_takes_lists_is_its_value(project):
    (task,) = planned("data.img_size=[32,40]", "aug.rrc_scale=[0.5,1]", "data.fold=[1]")
    assert task.recipe.data.img_size == [32, 40] and task.run.fold == 1 and not task.settings


def test_several_recipes_are_an_axis(project):
    Path("other.yaml").write_text("base: tiny.yaml\nexp: {name: other}\nmodel: {backbone: test_resnet}\n")
    tasks = planned("data.fold=[0,2]", files=("tiny.yaml", "other.yaml"))
    assert [(t.run.exp, t.run.backbone, t.run.fold) for t in tasks] == [
        ("tiny", "test_vit", 0), ("tiny", "test_vit", 2), ("other", "test_resnet", 0), ("other", "test_resnet", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("opt.lrr=[1,2]",), "unknown key opt.lrr; did you mean opt.lr?"),
        (("opt.lr=[1e-3,0.001]",), "opt.lr=[1e-3,0.001]: 0.001 is in the list twice; remove one"),
        (("opt.lr=[]",), "a list of one value or more"),
        (("opt.lr=[1",), "opt.lr=[1:"),
        (("opt.lr=[1e-3]", "opt.lr=1e-3"), "opt.lr is given twice"),
        (("opt.lr=[1e-3,-1]",), "opt.lr = -1: must be auto or > 0"),
        (("exp.name=[a,b]",), "exp.name must be one name"),
        (("opt.lr=1e-4..1e-3",), "opt.lr has a range, which needs a search; add --trials N"),
        (("opt.lr=log:0..1e-3",), "log:low..high with both above 0"),
        (("opt.lr=1e-3..1e-4",), "a range is low..high with low below high"),
        (("train.grad_accum=1.5..3",), "both whole numbers"),
        (("model.head=1..2",), "only numbers have ranges; give a list of values for model.head"),
        (("data.fold=[7]",), "data.fold = [7]: must be all, none, or a number (or list) in 0..2"),
    ],
)
def test_invalid_overrides_are_refused_before_anything_starts(project, words, message):
    with pytest.raises(InputError) as caught:
        planned(*words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_trainings_of_one_run_are_refused(project):
    Path("other.yaml").write_text("base: tiny.yaml\nexp: {name: tiny}\n")
    with pytest.raises(
        InputError, match="two trainings would write the same run, tiny test_vit__fold0_seed42"
    ):
        planned(files=("tiny.yaml", "other.yaml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "got no recipe or experiment; a campaign trains recipes"),
        (["tiny.yaml", "-n", "0"], "-n 0: must be 1 or more"),
        (["tiny.yaml", "--trials", "0"], "--trials 0: must be 1 or more"),
        (["tiny.yaml", "--trials", "3"], "--trials has nothing to search"),
        (["tiny.yaml", "seed=[1,2]", "--trials", "3"], "--trials has nothing to search"),
        (["tiny.yaml", "tiny.yaml", "opt.lr=1e-4..1e-3", "--trials", "3"], "got 2 recipes"),
        (["tiny.yaml", "opt.lr=1e-4..1e-3", "--trials", "3", "--dry-run"], "--dry-run cannot list a search"),
    ],
)
def test_invalid_options_are_refused(project, argv, message):
    with pytest.raises(InputError) as caught:
        main(argv)
    assert message in str(caught.value)


# launching


def test_a_training_started_by_a_rank_does_not_inherit_its_rendezvous(project, monkeypatch):
    for name in (*launch.RENDEZVOUS, "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "5")
    environment = launch.child_environment(threads=3)
    assert not {name for name in environment if name in launch.RENDEZVOUS or name.startswith("TORCHELASTIC")}
    assert environment["OMP_NUM_THREADS"] == "3" and environment["PATH"] == os.environ["PATH"]
    (task,) = planned()
    assert launch.training_command(task, 1)[:3] == [sys.executable, "-m", "fastflower.train"]
    composer, *rest = launch.training_command(task, 2)
    assert Path(composer).is_file() and rest[:2] == ["-n", "2"] and Path(rest[2]).samefile(train.__file__)
    assert rest[3:] == list(task.arguments)


def test_a_failure_has_its_reason(tmp_path):
    def failing(code: str) -> str:
        return launch.run_process([sys.executable, "-c", code], launch.child_environment(), tmp_path / "log")[
            1
        ]

    messages = "import sys; print('fastflower: no images', file=sys.stderr); print('Rank 0 crashed', file=sys.stderr); "
    assert failing(messages + "sys.exit(2)").startswith("no images (exit code 2 after ")
    assert failing("raise ValueError('odd')").startswith("ValueError: odd (exit code 1 after ")
    assert failing("import os; os.kill(os.getpid(), 9)").startswith("no error output (signal SIGKILL after ")
    assert (tmp_path / "log").read_text().count("no images") == 1
    assert launch.run_process([sys.executable, "-c", ""], {}, tmp_path / "log") == (0, "")
    with pytest.raises(EnvironmentFault, match=r"cannot start \./nothing"):
        launch.run_process(["./nothing"], {}, None)


TRAINING = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), pathlib.Path("told").touch(), exit(0)))
pathlib.Path("up").touch()
time.sleep(60)
"""
IN_TURN = """
import sys
from fastflower.campaign import launch
launch.run_process([sys.executable, "training.py"], {}, None)
"""
ON_RAY = """
import os, sys
from fastflower.campaign import cluster
from fastflower.core import ray_cluster
from fastflower.core.runs import Run
run = Run(exp="tiny", backbone="test_vit", fold=0, seed=42)
with ray_cluster.joined("") as ray:
    command = [sys.executable, "training.py"]
    ray.get(ray.remote(cluster._train).remote(
        run, command, environment=dict(os.environ), log="log", folder=os.getcwd()
    ))
"""


@pytest.fixture
def adopts(request: pytest.FixtureRequest) -> Iterator[None]:
    """This process adopts the orphans below it, as systemd's process of a user does; else process 1 does."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(request.param), 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("campaign", "adopts"),
    [
        pytest.param(IN_TURN, False, id="in turn"),
        pytest.param(ON_RAY, False, id="on Ray", marks=pytest.mark.slow),
        pytest.param(ON_RAY, True, id="on Ray, below a user's systemd", marks=pytest.mark.slow),
    ],
    indirect=["adopts"],
)
def test_a_training_gets_sigterm_when_its_campaign_dies(tmp_path, monkeypatch, campaign, adopts):
    """kill -9 of the campaign: the training gets SIGTERM, on which it saves."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    Path("training.py").write_text(TRAINING)
    process = subprocess.Popen([sys.executable, "-c", campaign])

    def wait(name: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (
            not Path(name).exists()
            and process.poll() in (None, -signal.SIGKILL)
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        return Path(name).exists()

    assert wait("up", 120)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wait("told", 30)


@pytest.fixture
def ran(monkeypatch) -> list[list[str]]:
    """Run trainings in this process; returns the arguments of each."""
    arguments_of_runs: list[list[str]] = []

    def run(command: list[str], environment: dict[str, str], log: Path | None) -> tuple[int, str]:
        arguments_of_runs.append(command[3:])
        try:
            return train.main(command[3:]), ""
        except InputError as error:
            return error.exit_code, str(error)

    monkeypatch.setattr(launch, "run_process", run)
    return arguments_of_runs


@pytest.mark.slow
def test_a_grid_trains_keeps_what_is_finished_and_tries_failures_again(project, ran, capfd):
    command = ["tiny.yaml", *SHORT, "opt.lr=[1e-4,1e-3]", "train.batch_per_gpu=[20,50]"]
    assert main(command) == 1
    out, err = capfd.readouterr()
    assert len(ran) == 4
    for lr in ("0.0001", "0.001"):  # 40 training images
        name = f"tiny-lr_{lr}-batch_per_gpu_50 test_vit__fold0_seed42"
        assert (
            f"failed: {name}: fold 0 has 40 training images with labels, fewer than the global batch of 50"
            in err
        )
    assert "2 of 4 trainings failed; run the same command again to retry them" in err
    table = Path("results/results/tiny/campaign_lr_batch_per_gpu")
    with open(table.with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["done", "failed"] * 2
    for row in rows:
        if row["state"] == "done":
            member = checkpoint.load(runs.MODELS / row["experiment"] / "best_clean.pth")
            assert float(row["clean"]) == member.meta["scores"][f"clean_{member.meta['weights']}"]
    assert "best opt.lr by train.batch_per_gpu: 20: " in out
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    ran.clear()
    assert main(command) == 1
    assert len(ran) == 2 and all("train.batch_per_gpu=50" in arguments for arguments in ran)
    ran.clear()
    assert main([*command[:-1], "train.batch_per_gpu=[20]", "reg.ls_eps=0.2"]) == 1
    assert len(ran) == 2, "a run finished with another recipe is not kept"
    assert "of another recipe or other data (reg.ls_eps: 0.05 -> 0.2)" in capfd.readouterr().err


def test_an_interrupted_campaign_keeps_its_table(project, monkeypatch, capfd):
    codes = iter([(0, ""), (launch.PREEMPTED, "stopped by a signal")])
    monkeypatch.setattr(launch, "run_process", lambda *_, **__: next(codes))
    assert main(["tiny.yaml", "data.fold=all"]) == 130
    assert "interrupted; run the same command again to continue" in capfd.readouterr().out


def test_file_names_have_the_full_keys_when_they_end_the_same(project, monkeypatch):
    monkeypatch.setattr(
        launch, "run_process", lambda overrides, *_: ended(tasks[overrides[-1]], 0.5) and (0, "")
    )
    overrides = ["reg.erase_p=[0,0.1]", "semi.erase_p=[0.5,1]"]
    tasks = {task.arguments[-1]: task for task in planned(*overrides)}
    assert main(["tiny.yaml", *overrides]) == 0
    names = {path.name for path in Path("results/results/tiny").glob("campaign*")}
    stem = "campaign_reg.erase_p_semi.erase_p"
    assert names == {f"{stem}.csv", f"{stem}.png"}
    monkeypatch.setattr(launch, "run_process", lambda *_, **__: (2, "no images"))
    assert main(["tiny.yaml", *overrides, "--trials", "1"]) == 1
    assert Path(f"results/results/tiny/{stem}.journal").is_file()


def test_dry_run_prints_commands(project, capfd):
    assert main(["tiny.yaml", "data.fold=[0,1]", "seed=[1,2]", "--dry-run", "-n", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 4 and all("-n 2" in line and "data.fold=" in line for line in lines)
    assert not Path("results").exists()


# results


def test_combinations_are_means_over_folds_and_seeds(project):
    tasks = planned("data.fold=[0,1]", "seed=[1,2]", "opt.lr=[1e-3,1e-4]")
    scores = np.random.default_rng(0).random(len(tasks))
    combined = results.combinations([ended(t, s) for t, s in zip(tasks, scores, strict=True)])
    lrs = np.array([task.settings["opt.lr"] for task in tasks])
    assert [item.settings for item in combined] == [{"opt.lr": 1e-3}, {"opt.lr": 1e-4}]
    for item in combined:
        group = scores[lrs == item.settings["opt.lr"]]
        assert item.n == 4 and item.minutes == 4.0
        assert (item.mean, item.deviation) == pytest.approx((group.mean(), np.std(group, ddof=1)))
        assert item.error == pytest.approx(np.std(group, ddof=1) / 2)
    text = results.summary_table(combined)
    assert f"{combined[0].mean:.4f}" in text and "0.0001" in text


def test_the_best_region_is_within_one_standard_error(project):
    tasks = planned("opt.lr=[1e-4,1e-3,1e-2]", "train.batch_per_gpu=[8,4]")
    score = {
        (1e-4, 4): 0.90,
        (1e-3, 4): 0.89,
        (1e-2, 4): 0.5,
        (1e-4, 8): 0.85,
        (1e-3, 8): 0.88,
        (1e-2, 8): 0.86,
    }
    ends = [ended(t, score[t.settings["opt.lr"], t.settings["train.batch_per_gpu"]]) for t in tasks]
    grid = results.grid(results.combinations(ends), validation=200)
    assert grid is not None and grid.xs == [1e-4, 1e-3, 1e-2] and grid.ys == [4, 8] and grid.best == (0, 0)
    assert grid.error == pytest.approx(math.sqrt(180.5 * 20.5 / 201**3))  # 180 of 200
    assert grid.caption == "1 training per cell; framed: within one standard error (0.0213) of the best"
    assert grid.region.tolist() == [[True, True, False], [False, True, False]]
    text = "\n".join(grid.summary())
    assert "best opt.lr=0.0001 train.batch_per_gpu=4: 0.9000 (n = 1 per cell)" in text
    assert "  train.batch_per_gpu=4: opt.lr in 0.0001, 0.001" in text
    assert "best opt.lr by train.batch_per_gpu: 4: 0.0001, 8: 0.001" in text
    assert heat_map(grid, "t").png().startswith(b"\x89PNG")
    assert results.grid(results.combinations(ends[:2]), 200) is None, "one key alone is no grid"


def test_a_perfect_score_has_an_error_too(project):
    tasks = planned("opt.lr=[1e-4,1e-3]", "train.batch_per_gpu=[8,4]")
    combined = results.combinations([ended(task, 1.0) for task in tasks])
    grid = results.grid(combined, validation=300)
    assert grid is not None and grid.error == pytest.approx(math.sqrt(300.5 * 0.5 / 301**3))


@pytest.mark.slow
def test_trainings_of_two_recipes_or_backbones_are_no_grid(project):
    Path("other.yaml").write_text("base: tiny.yaml\nexp: {name: other}\n")
    axes = ["opt.lr=[1e-4,1e-3]", "train.batch_per_gpu=[4,8]"]
    for tasks in (
        planned(*axes, files=("tiny.yaml", "other.yaml")),
        planned(*axes, "model.backbone=[test_vit,test_resnet]"),
    ):
        combined = results.combinations([ended(task, 0.5) for task in tasks])
        assert len(combined) == 8 and results.grid(combined, 100) is None


def test_a_failed_cell_is_left_out_of_the_grid(project):
    tasks = planned("opt.lr=[1e-4,1e-3]", "train.batch_per_gpu=[4,8]")
    ends = [Result(tasks[0], "failed", "why"), *(ended(t, 0.5) for t in tasks[1:])]
    grid = results.grid(results.combinations(ends), 100)
    assert grid is not None and np.isnan(grid.mean[0, 0]) and not grid.region[0, 0]
    assert heat_map(grid, "t").png()
    row = results.row(ends[0])
    assert row["reason"] == "why" and row["score"] is None


# searches


@pytest.mark.slow
def test_a_search_finds_the_peak_goes_on_and_refuses_another_space(project):
    overrides = plan.parse_overrides(["opt.lr=log:1e-4..1e-2", "seed=[1,2]", "train.grad_accum=1..3"])
    journal = Path("study.journal")

    def play(trials: int, cut: int = 0) -> Search:
        search = Search(["tiny.yaml"], overrides, trials=trials, journal=journal)
        for number, task in enumerate(search.tasks()):
            if cut and number == cut:
                return search
            distance = math.log10(task.settings["opt.lr"] / 1e-3)
            search.record(ended(task, 1 - distance**2 - (0.01 if task.run.seed == 1 else 0.0)))
        return search

    play(3, cut=5)  # killed within the third trial
    search = play(10)
    trials = search.study.trials
    assert len(trials) == 10 and all(trial.state.is_finished() for trial in trials)
    assert len({trial.params["opt.lr"] for trial in trials}) == 10, (
        "a resumed search does not repeat its proposals"
    )
    assert all(type(trial.params["train.grad_accum"]) is int for trial in trials)
    best = search.study.best_trial
    assert best.value == pytest.approx(1 - math.log10(best.params["opt.lr"] / 1e-3) ** 2 - 0.005)
    assert best.value > 0.9
    assert f"best of 10 trials is trial {best.number}" in search.summary()[0]
    repeated = play(10)  # every trial is listed once more, for the table, and keeps its value
    assert [trial.value for trial in repeated.study.trials] == [trial.value for trial in trials]
    listed = {task.run.exp for task in Search(["tiny.yaml"], overrides, trials=10, journal=journal).tasks()}
    assert listed == {f"tiny-trial_{number:04}" for number in range(10)}
    with pytest.raises(InputError, match=r"study.journal holds a search of another recipe or other ranges"):
        Search(["tiny.yaml"], plan.parse_overrides(["opt.lr=log:1e-4..1e-1"]), trials=30, journal=journal)


def test_a_trial_with_a_failed_training_is_retried(project):
    overrides = plan.parse_overrides(["opt.lr=[1e-3,1e-4]", "seed=[1,2]"])
    search = Search(["tiny.yaml"], overrides, trials=1, journal=Path("j"))
    first, second = search.tasks()
    search.record(ended(first, 0.9))
    search.record(Result(second, "failed", "why"))
    assert search.summary() == ["search: none of 1 trials has a score"]
    resumed = Search(["tiny.yaml"], overrides, trials=1, journal=Path("j"))
    retried = list(resumed.tasks())
    assert [task.run for task in retried] == [first.run, second.run]
    assert [task.arguments for task in retried] == [first.arguments, second.arguments]
    resumed.record(Result(retried[0], "kept"))
    resumed.record(ended(retried[1], 0.7))
    assert [(trial.state.name, trial.value) for trial in resumed.study.trials] == [
        ("COMPLETE", pytest.approx(0.8))
    ]


def test_failing_trials_are_retried_by_every_command(project, monkeypatch):
    commands: list[list[str]] = []

    def run(command: list[str], environment: dict[str, str], log: Path | None) -> tuple[int, str]:
        commands[-1].append(command[-1])
        if len(commands) < 3:
            return 2, "no images"
        ended(plan.tasks(["tiny.yaml"], plan.parse_overrides(command[4:]))[0], 0.5)
        return 0, ""

    monkeypatch.setattr(launch, "run_process", run)
    for code in (1, 1, 0):
        commands.append([])
        assert main(["tiny.yaml", "opt.lr=log:1e-4..1e-2", "--trials", "2"]) == code
    assert commands == [["exp.name=tiny-trial_0000", "exp.name=tiny-trial_0001"]] * 3


@pytest.mark.parametrize("sampled", [0, 1])
def test_a_search_killed_while_it_samples_proposes_what_it_would_have_proposed(project, sampled):
    overrides = plan.parse_overrides(["opt.lr=log:1e-4..1e-2", "aug.hflip_p=0..0.5"])

    def search(journal: str) -> Search:
        return Search(["tiny.yaml"], overrides, trials=2, journal=Path(journal))

    expected = [(task.run, task.settings) for task in search("whole").tasks()]
    killed = search("cut")
    trial = killed.study.ask()
    if sampled:
        killed._seed_sampler(trial.number, "opt.lr")
        trial.suggest_float("opt.lr", 1e-4, 1e-2, log=True)
    assert [(task.run, task.settings) for task in search("cut").tasks()] == expected


@pytest.mark.parametrize("damage", ["flip", "cut", "half a line", "empty", "of Optuna itself"])
def test_a_damaged_journal_of_a_search_is_refused_in_one_line(project, damage):
    overrides = plan.parse_overrides(["opt.lr=log:1e-4..1e-2"])
    journal = Path("study.journal")
    whole = [task.settings for task in Search(["tiny.yaml"], overrides, trials=1, journal=journal).tasks()]
    data = bytearray(journal.read_bytes())
    data[len(data) // 2] ^= 1
    broken = {
        "flip": bytes(data),
        "cut": journal.read_bytes()[:-40],
        "half a line": journal.read_bytes() + b'{"op',
    }
    journal.write_bytes(broken.get(damage, b"" if damage == "empty" else b'{"op_code":0,"worker_id":"a"}\n'))
    with pytest.raises(InputError, match=r"study.journal .*move it away") as caught:
        Search(["tiny.yaml"], overrides, trials=1, journal=journal)
    assert "\n" not in str(caught.value)
    journal.unlink()  # as the line says: the same trial is proposed again, and its training kept
    assert [
        task.settings for task in Search(["tiny.yaml"], overrides, trials=1, journal=journal).tasks()
    ] == whole


def test_a_full_disk_stops_a_search_and_keeps_its_journal(project, monkeypatch):
    search = Search(["tiny.yaml"], plan.parse_overrides(["opt.lr=1e-4..1e-3"]), trials=1, journal=Path("j"))
    (task,) = search.tasks()
    result, before = ended(task, 0.5), Path("j").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left", "j")))
    with pytest.raises(OSError, match="No space left"):
        search.record(result)
    assert Path("j").read_bytes() == before and not list(Path().glob(".j.*"))


def test_two_campaigns_do_not_write_one_table(project):
    with (
        files.locked(Path("results/results/tiny/.campaign_seed.lock"), "busy"),
        pytest.raises(
            EnvironmentFault, match=f"campaign_seed.csv: another campaign .process {os.getpid()}. writes it"
        ),
    ):
        main(["tiny.yaml", "seed=[1,2]"])


def test_a_campaign_waits_for_the_training_that_a_killed_one_left(project, monkeypatch, capfd):
    (task,) = planned()
    task.run.model_dir.mkdir(parents=True)
    with files.locked(task.run.lock_path, "busy"):
        released = time.monotonic() + 0.3
        monkeypatch.setattr(
            launch, "is_locked", lambda path: time.monotonic() < released and files.is_locked(path)
        )
        launch.await_end(task.run)
        assert time.monotonic() >= released and files.is_locked(task.run.lock_path)
    assert not files.is_locked(task.run.lock_path)
    assert "waiting for another process that trains test_vit__fold0_seed42" in capfd.readouterr().out


# Ray


def test_resources_of_a_training_on_a_cluster():
    gpu = {"CPU": 16.0, "GPU": 2.0}
    assert cluster.resources([gpu], 1) == ({"num_cpus": 0, "num_gpus": 1}, 2, 8)
    assert cluster.resources([gpu, gpu, {"CPU": 4.0}], 2) == ({"num_cpus": 0, "num_gpus": 2}, 2, 8)
    assert cluster.resources([{"CPU": 5.0}], 2) == ({"num_cpus": 2, "num_gpus": 0}, 2, 1)
    with pytest.raises(EnvironmentFault, match="needs 4 GPUs on one node, the largest has 2; use -n 2"):
        cluster.resources([gpu, gpu], 4)


def test_ranks_are_limited_to_the_gpus(monkeypatch):
    assert default_ranks(2) == 2
    monkeypatch.setattr("fastflower.campaign.__main__.gpu_count", lambda: 1)
    assert default_ranks(2) == 1


def on_ray(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """The lines on stderr of a campaign with --ray that cannot start."""
    monkeypatch.setattr("sys.argv", ["campaign", *arguments, "--ray", "-n", "1"])
    with pytest.raises(SystemExit) as end:
        errors.run_command(main)
    assert end.value.code == 4
    return capsys.readouterr().err.splitlines()


def test_ray_that_is_absent_or_does_not_start_is_one_line(monkeypatch, capsys, tmp_path):
    Path("tiny.yaml").write_text("model: {pretrained: false}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    (line,) = on_ray(["tiny.yaml"], monkeypatch, capsys)
    assert line.endswith("--ray needs Ray, which is not installed; pip install 'fastflower[cluster]'")

    def init(address: str, **_: object) -> None:
        assert address == "local"  # never another cluster of this machine
        raise RuntimeError("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(init=init))
    (line,) = on_ray(["tiny.yaml"], monkeypatch, capsys)
    assert "--ray: Ray does not start (The current node timed out during startup. This" in line
    assert line.endswith("use --no-ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    (line,) = on_ray(["tiny.yaml"], monkeypatch, capsys)
    assert f"no Ray cluster at RAY_ADDRESS={address} (Connection refused); start it there" in line


@pytest.mark.slow
def test_trainings_run_side_by_side_on_ray(project):
    arguments = ["tiny.yaml", *SHORT, "data.fold=all"]
    command = [sys.executable, "-m", "fastflower.campaign", *arguments, "--ray", "-n", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "on Ray: " in result.stdout
    assert all(toy_project.run_of(fold=fold).end_path.is_file() for fold in (0, 1, 2))
    assert toy_project.end()["epochs"] == 1
    repeated = subprocess.run(command, capture_output=True, text=True, check=True)
    assert repeated.stdout.count("kept: ") == 3
    assert Finished(1)(planned(*arguments[1:])[0])
