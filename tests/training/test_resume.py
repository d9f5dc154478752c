"""A run that is killed anywhere and started again ends in the same bits as an uninterrupted run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastflower.algorithms import averaging
from fastflower.callbacks import checkpoints
from fastflower.callbacks.checkpoints import CheckpointSaver, previous_last
from fastflower.core import checkpoint, errors
from fastflower.core.records import read_record
from fastflower.core.runs import Run
from fastflower.core.workers import die_with_parent
from fastflower.recipe.run_record import RunNumbers, numbers_path
from fastflower.training import fold_data, ranks
from support import forked, toy_project


class Killed(BaseException):
    """A stand-in for SIGKILL: leaves catches it, leaves is saved on the way out."""


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The checkpoint, epochs, end and files of the uninterrupted run."""
    home = Path.cwd()
    os.chdir(toy_project.project(tmp_path_factory.mktemp("uncut")))
    try:
        assert toy_project.fit("train.save_every=2ba") == 0
        return {
            "last": toy_project.last(),
            "epochs": toy_project.epochs(),
            "end": toy_project.end(),
            "files": sorted(p.name for p in toy_project.run_of().model_dir.glob("*.pth")),
        }
    finally:
        os.chdir(home)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return toy_project.project(tmp_path)


def cut(monkeypatch: pytest.MonkeyPatch, event: str, when: Callable) -> None:
    """Kill the run once, before CheckpointSaver sees an event for which `when(state)` holds."""
    kills, original = [], getattr(CheckpointSaver, event)

    def killed(self: CheckpointSaver, state, logger) -> None:
        if not kills and when(state):
            kills.append(True)
            raise Killed
        original(self, state, logger)

    monkeypatch.setattr(CheckpointSaver, event, killed)


def assert_ends_like(uncut: dict) -> None:
    last = toy_project.last()
    assert toy_project.different(uncut["last"].tensors, last.tensors) == []
    assert toy_project.different(uncut["last"].training_state, last.training_state) == []
    assert toy_project.different(uncut["last"].meta, last.meta) == []
    assert toy_project.epochs() == uncut["epochs"]
    assert toy_project.different(uncut["end"], toy_project.end()) == []
    assert sorted(p.name for p in toy_project.run_of().model_dir.glob("*.pth")) == uncut["files"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "event, step",
    [
        ("batch_end", 1),
        ("batch_end", 3),
        ("batch_checkpoint", 4),
        ("eval_batch_end", 4),
        ("eval_after_all", 8),
        ("epoch_checkpoint", 8),
        ("fit_end", 12),
    ],
)
def test_a_cut_run_ends_in_the_same_bits(project, uncut, monkeypatch, event, step):
    cut(monkeypatch, event, lambda state: state.timestamp.batch.value == step)
    with pytest.raises(Killed):
        toy_project.fit("train.save_every=2ba")
    assert toy_project.fit("train.save_every=2ba") == 0
    assert_ends_like(uncut)


@pytest.mark.slow
def test_a_run_is_repeated_from_its_own_record(project, uncut):
    assert toy_project.fit("exp.name=first") == 0
    assert toy_project.train.main(["results/results/first/meta/recipe.yaml", "exp.name=second"]) == 0
    for exp in ("first", "second"):
        assert toy_project.different(uncut["last"].tensors, toy_project.last(exp).tensors) == []
        assert toy_project.epochs(exp) == uncut["epochs"]


@pytest.mark.slow
def test_a_signal_saves_at_the_next_step_and_leaves_with_75(project, uncut, monkeypatch, capsys):
    def interrupted(self: CheckpointSaver, state, logger) -> None:
        if state.timestamp.batch.value == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, state, logger)

    original = CheckpointSaver.batch_end
    monkeypatch.setattr(CheckpointSaver, "batch_end", interrupted)
    with pytest.raises(SystemExit) as left:
        toy_project.fit()
    assert left.value.code == 75
    assert "the state is saved" in capsys.readouterr().err
    assert toy_project.last().training_state["time"]["batch"] == 5
    monkeypatch.undo()
    os.chdir(project)
    assert toy_project.fit() == 0
    assert toy_project.different(uncut["last"].tensors, toy_project.last().tensors) == []
    assert toy_project.epochs() == uncut["epochs"]


@pytest.mark.slow
def test_a_signal_during_evaluation_evaluates_again(project, uncut, monkeypatch):
    cut_at = [4]

    def interrupted(self: CheckpointSaver, state, logger) -> None:
        if cut_at and state.timestamp.batch.value == cut_at[0]:
            cut_at.clear()
            self.stop.requested = True
        original(self, state, logger)

    original = CheckpointSaver.eval_batch_end
    monkeypatch.setattr(CheckpointSaver, "eval_batch_end", interrupted)
    with pytest.raises(SystemExit):
        toy_project.fit()
    assert toy_project.last().training_state["time"]["epoch"] == 0  # an epoch ends with its evaluation
    assert toy_project.fit() == 0
    assert toy_project.different(uncut["last"].training_state, toy_project.last().training_state) == []
    assert toy_project.epochs() == uncut["epochs"]


def shape(tree: Any) -> Any:
    """The keys of a state, without those below entries that differ between networks and epochs."""
    if not isinstance(tree, dict):
        return None
    return {
        k: None if k in ("shadow", "bests", "lr", "flat", "best_flat") else shape(v) for k, v in tree.items()
    }


def test_the_layout_of_last_is_the_one_that_its_number_stands_for(uncut):
    """When this test needs other keys, raise checkpoints.LAYOUT, so that an older `last` is refused and not misread."""
    assert checkpoints.LAYOUT == uncut["last"].meta["layout"] == 4
    more = uncut["last"].training_state
    assert set(more) == {"time", "optimizer", "scaler", "parts"} and set(more["optimizer"]) == {
        "state",
        "param_groups",
    }
    leaves = dict.fromkeys
    assert shape(more["parts"]) == {
        "ema": leaves(("updates", "shadow")),
        "guard": leaves(("total", "in_a_row")),
        "schedule": leaves(("factor", "best", "bad_epochs")),
        "scoring": {
            "selection": leaves(
                ("reference", "idle", "stage", "macro_best", "s_before", "alarmed", "scored", "stopped", "bests")
            ),
            **leaves(("epoch", "flat", "best_flat", "score", "val_loss")),
        },
        "recorder": {
            "sums": leaves(("loss", "norm", "steps", "images", "wait", "seconds", "skipped", "hits", "seen")),
            **leaves(("lr", "total_seconds")),
        },
        "machine": {"loose": None},
        "trends": leaves(
            ("size", "val_loss", "val_epoch", "train_loss", "overfit", "lr", "falls", "f1", "f1_epoch", "still",
             "norms", "longest", "first_loss", "odd")
        ),
    }  # fmt: skip


def test_a_last_of_an_older_layout_is_refused(project, monkeypatch):
    train_half(monkeypatch)
    path = toy_project.run_of().checkpoints("last")[-1]
    old = checkpoint.load(path)
    del old.meta["layout"], old.training_state["parts"]["scoring"]["val_loss"]
    checkpoint.save(path, old.tensors, old.meta, **old.training_state)
    with pytest.raises(
        errors.InputError, match=r"has layout None, this version resumes layout 4; .* exp.name$"
    ):
        toy_project.fit()


@pytest.mark.slow
def test_kept_epochs_are_those_of_the_uncut_run(project, uncut, monkeypatch):
    train_half(monkeypatch, "train.keep_every=1")
    assert toy_project.fit("train.keep_every=1") == 0
    kept = sorted(toy_project.run_of().model_dir.glob("epoch__*.pth"))
    assert [checkpoint.load(path).meta["epoch"] for path in kept] == [1, 2, 3]
    assert kept[2].samefile(toy_project.run_of().checkpoints("last")[0])
    assert toy_project.different(uncut["last"].tensors, toy_project.last().tensors) == []
    assert toy_project.different(uncut["last"].training_state, checkpoint.load(kept[2]).training_state) == []


def test_a_signal_while_checksums_are_read_leaves_with_75(project, monkeypatch):
    monkeypatch.setattr(fold_data, "verify", lambda fold: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        toy_project.fit()
    assert left.value.code == 75 and not toy_project.run_of().checkpoints("last")


@pytest.mark.slow
def test_a_signal_while_swa_is_estimated_exits_and_resumes_in_the_same_bits(project, monkeypatch):
    words = (
        "model.backbone=test_resnet",
        "model.drop_path=0",
        "swa.enabled=true",
        "swa.start=0.4",
        "log.tensorboard=false",
    )

    def files(exp: str) -> list[checkpoint.Checkpoint]:
        run = Run(exp=exp, backbone="test_resnet", fold=0, seed=42)
        return [checkpoint.load(run.checkpoints(kind)[-1]) for kind in ("swa", "last")]

    def signalled(module, images):
        original(module, (os.kill(os.getpid(), signal.SIGTERM) or image for image in images))

    assert toy_project.fit("exp.name=uncut", *words) == 0
    original = averaging.reestimate_batch_norms
    with monkeypatch.context() as patch:
        patch.setattr(averaging, "reestimate_batch_norms", signalled)
        with pytest.raises(SystemExit) as left:
            toy_project.fit(*words)
    assert left.value.code == 75
    cut = checkpoint.load(Run(exp="tiny", backbone="test_resnet", fold=0, seed=42).checkpoints("last")[-1])
    assert cut.training_state["parts"]["swa"]["averaged"] == 0 and cut.training_state["time"]["epoch"] == 1
    assert toy_project.fit(*words) == 0
    for one, other in zip(files("uncut"), files("tiny"), strict=True):
        assert (
            toy_project.different(one.tensors, other.tensors) == []
            and toy_project.different(one.training_state, other.training_state) == []
        )


@pytest.mark.slow
def test_a_finished_run_says_so(project, capsys):
    toy_project.fit("sched.cosine_epochs=2", "data.size_epochs=[1,2]")
    before = {path: path.stat().st_mtime_ns for path in toy_project.run_of().model_dir.glob("*.pth")}
    capsys.readouterr()
    assert toy_project.fit("sched.cosine_epochs=2", "data.size_epochs=[1,2]") == 0
    assert "is finished (all 2 epochs are done)" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in toy_project.run_of().model_dir.glob("*.pth")}


def train_half(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Kill a run in its third epoch; leaves two generations of `last`."""
    with monkeypatch.context() as patch:
        cut(patch, "batch_end", lambda state: state.timestamp.batch.value == 10)
        with pytest.raises(Killed):
            toy_project.fit(*words)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(project, uncut, monkeypatch, capsys):
    train_half(monkeypatch)
    path = toy_project.run_of().checkpoints("last")[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.unlink()  # the fixed name is the same file
    path.write_bytes(data)
    assert toy_project.fit() == 0
    said = capsys.readouterr().out
    assert "WARNING" in said and "damaged" in said and "the previous checkpoint" in said
    assert path.with_name(path.name + ".damaged").exists()
    assert toy_project.different(uncut["last"].tensors, toy_project.last().tensors) == []
    assert toy_project.epochs() == uncut["epochs"]


def test_when_every_checkpoint_is_damaged_nothing_starts_from_scratch(project, monkeypatch):
    train_half(monkeypatch)
    for path in (*toy_project.run_of().checkpoints("last"), previous_last(toy_project.run_of())):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(errors.CorruptionError, match="every checkpoint of fold 0, seed 42 is damaged"):
        toy_project.fit()


def test_another_recipe_is_refused_by_the_keys_that_differ(project, monkeypatch):
    train_half(monkeypatch)
    with pytest.raises(
        errors.InputError, match=r"opt.lr: 0.001 -> 0.002; reg.ls_eps: 0.05 -> 0.1\); undo that"
    ):
        toy_project.fit("opt.lr=2e-3", "reg.ls_eps=0.1")
    with pytest.raises(errors.InputError, match=r"global batch by stage: \[10, 10\] -> \[5, 5\]"):
        toy_project.fit("train.batch_per_gpu=5")


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_that_goes_on_in_another_precision_says_so(project, monkeypatch, capsys, damaged):
    with monkeypatch.context() as patch:
        patch.setattr(ranks.processor, "multiplies_bf16", lambda: True)
        train_half(monkeypatch, "train.amp=true")
    assert "goes on in" not in capsys.readouterr().out
    if damaged:  # the record alone, which is about to be written anew
        numbers_path(toy_project.run_of()).write_text("{")
    monkeypatch.setattr(ranks.processor, "multiplies_bf16", lambda: False)
    assert toy_project.fit("train.amp=true") == 0
    said = capsys.readouterr().out
    line = "trained in amp_bf16 on CPU until now, goes on in fp32 on CPU: its scores are close to those of one machine"
    assert said.count(line) == (0 if damaged else 1)
    assert read_record(numbers_path(toy_project.run_of()), RunNumbers).precision == "fp32"


@pytest.mark.slow
def test_the_same_global_batch_may_be_split_differently(project, monkeypatch):
    train_half(monkeypatch)
    assert toy_project.fit("train.batch_per_gpu=5", "train.grad_accum=2", "train.save_every=1ba") == 0
    assert [row["epoch"] for row in toy_project.epochs()] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("step", ["save", "link", "unlink"])
def test_a_kill_inside_a_save_loses_no_generation(project, uncut, monkeypatch, step):
    """Cut between writing aside, linking and removing the superseded, at the third saving of `last`."""
    saves = [0]

    def counted(original: Callable) -> Callable:
        def stand_in(*args, **kwargs):
            kind = str(args[0]) if args else ""
            saves[0] += "last__" in kind
            if saves[0] == 3:
                raise Killed
            return original(*args, **kwargs)

        return stand_in

    with monkeypatch.context() as patch:
        target = {"save": (checkpoint, "save"), "link": (checkpoints, "_link"), "unlink": (Path, "unlink")}[
            step
        ]
        patch.setattr(*target, counted(getattr(*target)))
        with pytest.raises(Killed):
            toy_project.fit("train.save_every=2ba")
    assert toy_project.fit("train.save_every=2ba") == 0
    assert_ends_like(uncut)


def test_a_rank_does_not_outlive_its_launcher():
    """SIGKILL of the launcher reaches a rank as SIGTERM, on which it saves."""
    ours, theirs = os.pipe()
    launcher = os.fork()
    if not launcher:
        if not os.fork():
            signal.signal(signal.SIGTERM, lambda *_: (os.write(theirs, b"signalled"), os._exit(0)))
            die_with_parent(signal.SIGTERM)
            os.write(theirs, b"up ")
        os.close(ours)
        while True:
            time.sleep(60)
    os.close(theirs)
    assert os.read(ours, 3) == b"up "
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert os.read(ours, 9) == b"signalled"
    os.close(ours)


STILL = ("model.drop_rate=0", "model.drop_path=0", "train.save_every=1ba")


def launch(*words: str, **options: Any) -> subprocess.Popen[str]:
    """Start two ranks with four images each, in their own processes."""
    launcher = [
        sys.executable,
        "-m",
        "composer.cli.launcher",
        "-n",
        "2",
        str(Path(toy_project.train.__file__)),
    ]
    command = [*launcher, "tiny.yaml", "train.batch_per_gpu=4", "train.world_size=2", *STILL, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def wait_for_epoch(run: Run, epoch: int, *, running: Callable[[], bool]) -> None:
    """Wait until a run has a `last` of this epoch."""
    deadline = time.monotonic() + 200
    while not any(f"_epoch{epoch}_" in path.name for path in run.checkpoints("last")):
        assert running() and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.dist
@pytest.mark.slow
def test_a_signal_to_the_launcher_or_to_its_group_saves_and_ends_all_within_30_seconds(project):
    """First `kill` of the launcher alone, as Kubernetes does; then Ctrl-C, which reaches the whole process group."""
    epochs = 0
    for send, number in ((os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)):
        running = launch("sched.cosine_epochs=500", "data.size_epochs=[1,500]", start_new_session=True)
        wait_for_epoch(toy_project.run_of(), epochs + 1, running=lambda: running.poll() is None)  # noqa: B023
        start = time.monotonic()
        send(running.pid, number)
        said = running.communicate(timeout=60)[0]
        seconds = time.monotonic() - start
        assert running.returncode == 75 and seconds < 30, (running.returncode, seconds, said)
        assert said.count("the state is saved, run the same command to resume") == 1
        assert toy_project.last().training_state["time"]["epoch"] > epochs
        epochs = toy_project.last().training_state["time"]["epoch"]


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_lose_one_and_end_in_the_same_bits_as_two_or_nearly_as_one(project):
    """SIGKILL of rank 1 ends all ranks; then two ranks resume, and from the same state a single rank."""
    words = ("train.batch_per_gpu=4", "train.world_size=2", *STILL)
    uncut = forked.training("exp.name=uncut", *words)
    assert uncut.wait() == [0, 0], uncut.text()
    cut, run = forked.training("exp.name=cut", *words), toy_project.run_of("cut")
    wait_for_epoch(run, 1, running=lambda: cut.poll() is None)
    cut.kill(1)
    assert cut.wait(60)[0] != 0 and "another rank has ended" in cut.text()
    shutil.copytree(run.model_dir, toy_project.run_of("alone").model_dir)
    again = forked.training("exp.name=cut", *words)
    assert again.wait() == [0, 0], again.text()
    uncut, resumed = toy_project.last("uncut"), toy_project.last("cut")
    assert toy_project.different(uncut.tensors, resumed.tensors) == []
    assert toy_project.different(uncut.training_state, resumed.training_state) == []
    assert toy_project.epochs("uncut") == toy_project.epochs("cut")
    assert toy_project.fit("exp.name=alone", "train.batch_per_gpu=8", *STILL) == 0
    for name, tensor in toy_project.last("alone").tensors.items():
        torch.testing.assert_close(tensor, uncut.tensors[name], rtol=0, atol=1e-4)
