"""A run that is cut anywhere and started again ends in the same bits as one that was not."""

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
from fastflower.callbacks.checkpoints import Saving, previous_last
from fastflower.core import checkpoint, errors
from fastflower.core.runs import Run
from fastflower.training import fold_data
from fastflower.training.ranks import _outlive_no_launcher
from support import toy_project


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it, nothing is saved on the way out."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the uninterrupted run leaves."""
    home = Path.cwd()
    os.chdir(toy_project.project(tmp_path_factory.mktemp("whole")))
    try:
        assert toy_project.fit("train.save_every=2ba") == 0
        found = toy_project.last()
        return {
            "last": found,
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
    """Kill the run before Saving sees an event for which `when(state)` holds, once."""
    done, original = [], getattr(Saving, event)

    def killed(self: Saving, state, logger) -> None:
        if not done and when(state):
            done.append(True)
            raise Killed
        original(self, state, logger)

    monkeypatch.setattr(Saving, event, killed)


def same_as(whole: dict) -> None:
    found = toy_project.last()
    assert toy_project.different(whole["last"].tensors, found.tensors) == []
    assert toy_project.different(whole["last"].more, found.more) == []
    assert toy_project.different(whole["last"].meta, found.meta) == []
    assert toy_project.epochs() == whole["epochs"]
    assert toy_project.different(whole["end"], toy_project.end()) == []
    assert sorted(p.name for p in toy_project.run_of().model_dir.glob("*.pth")) == whole["files"]


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
def test_a_cut_run_ends_in_the_same_bits(project, whole, monkeypatch, event, step):
    cut(monkeypatch, event, lambda state: state.timestamp.batch.value == step)
    with pytest.raises(Killed):
        toy_project.fit("train.save_every=2ba")
    assert toy_project.fit("train.save_every=2ba") == 0
    same_as(whole)


def test_a_run_is_repeated_from_its_own_record(project, whole):
    assert toy_project.fit("exp.name=first") == 0
    assert toy_project.train.main(["results/results/first/meta/recipe.yaml", "exp.name=second"]) == 0
    for exp in ("first", "second"):
        assert toy_project.different(whole["last"].tensors, toy_project.last(exp).tensors) == []
        assert toy_project.epochs(exp) == whole["epochs"]


def test_a_signal_saves_at_the_next_step_and_leaves_with_75(project, whole, monkeypatch, capsys):
    def asked(self: Saving, state, logger) -> None:
        if state.timestamp.batch.value == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, state, logger)

    original = Saving.batch_end
    monkeypatch.setattr(Saving, "batch_end", asked)
    with pytest.raises(SystemExit) as left:
        toy_project.fit()
    assert left.value.code == 75
    assert "the state is saved" in capsys.readouterr().err
    assert toy_project.last().more["time"]["batch"] == 5
    monkeypatch.undo()
    os.chdir(project)
    assert toy_project.fit() == 0
    assert toy_project.different(whole["last"].tensors, toy_project.last().tensors) == []
    assert toy_project.epochs() == whole["epochs"]


def test_a_signal_during_evaluation_evaluates_again(project, whole, monkeypatch):
    cut_at = [4]

    def asked(self: Saving, state, logger) -> None:
        if cut_at and state.timestamp.batch.value == cut_at[0]:
            cut_at.clear()
            self.stop.asked = True
        original(self, state, logger)

    original = Saving.eval_batch_end
    monkeypatch.setattr(Saving, "eval_batch_end", asked)
    with pytest.raises(SystemExit):
        toy_project.fit()
    assert toy_project.last().more["time"]["epoch"] == 0  # the epoch is not over before it is scored
    assert toy_project.fit() == 0
    assert toy_project.different(whole["last"].more, toy_project.last().more) == []
    assert toy_project.epochs() == whole["epochs"]


def shape(tree: Any) -> Any:
    """The names in a state, without what differs between networks and moments."""
    if not isinstance(tree, dict):
        return None
    return {
        k: None if k in ("shadow", "bests", "lr", "flat", "best_flat") else shape(v) for k, v in tree.items()
    }


def test_the_layout_of_last_is_the_one_that_its_number_stands_for(whole):
    """Other keys here: raise saving.LAYOUT, so that a `last` of before is refused and not misread."""
    assert checkpoints.LAYOUT == whole["last"].meta["layout"] == 1
    more = whole["last"].more
    assert set(more) == {"time", "optimizer", "scaler", "parts"} and set(more["optimizer"]) == {
        "state",
        "param_groups",
    }
    nothing = dict.fromkeys
    assert shape(more["parts"]) == {
        "ema": nothing(("updates", "shadow")),
        "guard": nothing(("total", "in_a_row")),
        "schedule": nothing(("factor", "best", "bad_epochs")),
        "scoring": {
            "selection": nothing(
                ("reference", "idle", "stage", "macro_best", "s_before", "alarmed", "stopped", "bests")
            ),
            **nothing(("epoch", "flat", "best_flat", "score", "val_loss")),
        },
        "recorder": {
            "sums": nothing(("loss", "norm", "steps", "images", "wait", "seconds", "skipped")),
            **nothing(("lr", "total_seconds")),
        },
        "machine": {"loose": None},
    }  # fmt: skip


def test_a_last_of_an_older_layout_is_refused(project, monkeypatch):
    half_done(monkeypatch)
    path = toy_project.run_of().files("last")[-1]
    old = checkpoint.load(path)
    del old.meta["layout"], old.more["parts"]["scoring"]["val_loss"]
    checkpoint.save(path, old.tensors, old.meta, **old.more)
    with pytest.raises(
        errors.InputError, match=r"has layout None, this version goes on from 1; .* exp.name$"
    ):
        toy_project.fit()


def test_kept_epochs_are_those_of_the_uncut_run(project, whole, monkeypatch):
    half_done(monkeypatch, "train.keep_every=1")
    assert toy_project.fit("train.keep_every=1") == 0
    kept = sorted(toy_project.run_of().model_dir.glob("epoch__*.pth"))
    assert [checkpoint.load(path).meta["epoch"] for path in kept] == [1, 2, 3]
    assert kept[2].samefile(toy_project.run_of().files("last")[0])
    assert toy_project.different(whole["last"].tensors, toy_project.last().tensors) == []
    assert toy_project.different(whole["last"].more, checkpoint.load(kept[2]).more) == []


def test_a_signal_while_checksums_are_read_leaves_with_75(project, monkeypatch):
    monkeypatch.setattr(fold_data, "verify", lambda fold: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        toy_project.fit()
    assert left.value.code == 75 and not toy_project.run_of().files("last")


def test_a_signal_while_swa_is_estimated_leaves_and_goes_on_in_the_same_bits(project, monkeypatch):
    words = (
        "model.backbone=test_resnet",
        "model.drop_path=0",
        "swa.enabled=true",
        "swa.start=0.4",
        "log.tensorboard=false",
    )

    def files(exp: str) -> list[checkpoint.Checkpoint]:
        run = Run(exp, "test_resnet", 0, 42)
        return [checkpoint.load(run.files(kind)[-1]) for kind in ("swa", "last")]

    def told(module, images):
        original(module, (os.kill(os.getpid(), signal.SIGTERM) or image for image in images))

    assert toy_project.fit("exp.name=uncut", *words) == 0
    original = averaging.recalibrate
    with monkeypatch.context() as patch:
        patch.setattr(averaging, "recalibrate", told)
        with pytest.raises(SystemExit) as left:
            toy_project.fit(*words)
    assert left.value.code == 75
    cut = checkpoint.load(Run("tiny", "test_resnet", 0, 42).files("last")[-1])
    assert cut.more["parts"]["swa"]["averaged"] == 0 and cut.more["time"]["epoch"] == 1
    assert toy_project.fit(*words) == 0
    for one, other in zip(files("uncut"), files("tiny"), strict=True):
        assert (
            toy_project.different(one.tensors, other.tensors) == []
            and toy_project.different(one.more, other.more) == []
        )


def test_a_finished_run_says_so(project, capsys):
    toy_project.fit("sched.cosine_epochs=2", "data.size_epochs=[1,2]")
    before = {path: path.stat().st_mtime_ns for path in toy_project.run_of().model_dir.glob("*.pth")}
    capsys.readouterr()
    assert toy_project.fit("sched.cosine_epochs=2", "data.size_epochs=[1,2]") == 0
    assert "is finished (all 2 epochs are done)" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in toy_project.run_of().model_dir.glob("*.pth")}


def half_done(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A run that was killed in its third epoch; two generations of `last` are there."""
    with monkeypatch.context() as patch:
        cut(patch, "batch_end", lambda state: state.timestamp.batch.value == 10)
        with pytest.raises(Killed):
            toy_project.fit(*words)


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(project, whole, monkeypatch, capsys):
    half_done(monkeypatch)
    path = toy_project.run_of().files("last")[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.unlink()  # the fixed name is the same file
    path.write_bytes(data)
    assert toy_project.fit() == 0
    said = capsys.readouterr().out
    assert "WARNING" in said and "damaged" in said and "the checkpoint before" in said
    assert path.with_name(path.name + ".damaged").exists()
    assert toy_project.different(whole["last"].tensors, toy_project.last().tensors) == []
    assert toy_project.epochs() == whole["epochs"]


def test_when_every_checkpoint_is_damaged_nothing_starts_from_scratch(project, monkeypatch):
    half_done(monkeypatch)
    for path in (*toy_project.run_of().files("last"), previous_last(toy_project.run_of())):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(errors.CorruptionError, match="no checkpoint of fold 0, seed 42 is whole"):
        toy_project.fit()


def test_another_recipe_is_refused_by_the_keys_that_differ(project, monkeypatch):
    half_done(monkeypatch)
    with pytest.raises(
        errors.InputError, match=r"opt.lr: 0.001 -> 0.002; reg.ls_eps: 0.05 -> 0.1\); undo that"
    ):
        toy_project.fit("opt.lr=2e-3", "reg.ls_eps=0.1")
    with pytest.raises(errors.InputError, match=r"global batch by stage: \[10, 10\] -> \[5, 5\]"):
        toy_project.fit("train.batch_per_gpu=5")


def test_the_same_global_batch_may_be_cut_otherwise(project, monkeypatch):
    half_done(monkeypatch)
    assert toy_project.fit("train.batch_per_gpu=5", "train.grad_accum=2", "train.save_every=1ba") == 0
    assert [row["epoch"] for row in toy_project.epochs()] == [1, 2, 3]


@pytest.mark.parametrize("step", ["save", "link", "unlink"])
def test_a_kill_inside_a_saving_loses_no_generation(project, whole, monkeypatch, step):
    """Cut between writing aside, linking and removing the superseded, at the third saving of `last`."""
    half_done_at = [0]

    def counted(original: Callable) -> Callable:
        def stand_in(*args, **kwargs):
            kind = str(args[0]) if args else ""
            half_done_at[0] += "last__" in kind
            if half_done_at[0] == 3:
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
    same_as(whole)


def test_a_rank_does_not_outlive_its_launcher():
    """SIGKILL of a parent reaches the child as SIGTERM, for which it would save."""
    ours, theirs = os.pipe()
    launcher = os.fork()
    if not launcher:
        if not os.fork():
            signal.signal(signal.SIGTERM, lambda *_: (os.write(theirs, b"told"), os._exit(0)))
            _outlive_no_launcher()
            os.write(theirs, b"up ")
        os.close(ours)
        while True:
            time.sleep(60)
    os.close(theirs)
    assert os.read(ours, 3) == b"up "
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    assert os.read(ours, 4) == b"told"
    os.close(ours)


STILL = ("model.drop_rate=0", "model.drop_path=0", "train.save_every=1ba")


def launch(*words: str, **how: Any) -> subprocess.Popen[str]:
    """Two ranks with four images each, in a process of their own."""
    launcher = [
        sys.executable,
        "-m",
        "composer.cli.launcher",
        "-n",
        "2",
        str(Path(toy_project.train.__file__)),
    ]
    command = [*launcher, "tiny.yaml", "train.batch_per_gpu=4", "train.world_size=2", *STILL, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


def wait_for_epoch(running: subprocess.Popen[str], run: Run, epoch: int) -> None:
    """Until a run has a `last` of this epoch."""
    deadline = time.monotonic() + 200
    while not any(f"_epoch{epoch}_" in path.name for path in run.files("last")):
        if running.poll() is not None or time.monotonic() > deadline:
            running.kill()  # its ranks follow
            pytest.fail(running.communicate(timeout=60)[0])
        time.sleep(0.02)


@pytest.mark.dist
@pytest.mark.slow
def test_a_signal_to_the_launcher_or_to_its_group_saves_and_ends_all_within_30_seconds(project):
    """`kill` of the launcher alone, as Kubernetes does; then Ctrl-C, which every process of the group hears."""
    epochs = 0
    for send, number in ((os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)):
        running = launch("sched.cosine_epochs=500", "data.size_epochs=[1,500]", start_new_session=True)
        wait_for_epoch(running, toy_project.run_of(), epochs + 1)
        told = time.monotonic()
        send(running.pid, number)
        said = running.communicate(timeout=60)[0]
        seconds = time.monotonic() - told
        assert running.returncode == 75 and seconds < 30, (running.returncode, seconds, said)
        assert said.count("the state is saved, the same command goes on") == 1
        assert toy_project.last().more["time"]["epoch"] > epochs
        epochs = toy_project.last().more["time"]["epoch"]


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_lose_one_and_end_in_the_same_bits_as_two_or_nearly_as_one(project):
    """SIGKILL of rank 1 takes all down within a bound; then two ranks go on, and from the same state one rank alone."""
    uncut = launch("exp.name=uncut")
    said = uncut.communicate(timeout=300)[0]
    assert uncut.returncode == 0, said
    cut, run = launch("exp.name=cut"), toy_project.run_of("cut")
    wait_for_epoch(cut, run, 1)
    ranks = subprocess.run(["pgrep", "-P", str(cut.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    said = cut.communicate(timeout=60)[0]
    assert cut.returncode != 0 and "another rank has ended" in said
    shutil.copytree(run.model_dir, toy_project.run_of("alone").model_dir)
    again = launch("exp.name=cut")
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    whole, resumed = toy_project.last("uncut"), toy_project.last("cut")
    assert toy_project.different(whole.tensors, resumed.tensors) == []
    assert toy_project.different(whole.more, resumed.more) == []
    assert toy_project.epochs("uncut") == toy_project.epochs("cut")
    assert toy_project.fit("exp.name=alone", "train.batch_per_gpu=8", *STILL) == 0
    for name, tensor in toy_project.last("alone").tensors.items():
        torch.testing.assert_close(tensor, whole.tensors[name], rtol=0, atol=1e-4)
