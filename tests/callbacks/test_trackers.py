"""Epochs reach the services that a recipe names, through Composer's loggers; here a stand-in that writes them down."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastflower.core.errors import EnvironmentFault
from fastflower.recipe import checks, load
from support import toy_project

STAND_IN = """
import types
logged, finished, config = [], [], {}
run = None
def init(**words):
    global run
    run = types.SimpleNamespace(entity="me", get_url=lambda: None, **words)
def log(metrics, step=None):
    logged.append((step, dict(metrics)))
def finish(code):
    finished.append(code)
"""


@pytest.mark.slow
def test_epochs_reach_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").mkdir()
    (tmp_path / "services" / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path / "services")
    toy_project.project(tmp_path)
    assert (
        toy_project.fit(
            "log.wandb=true", "sched.cosine_epochs=2", "data.img_size=32", "data.size_epochs=auto"
        )
        == 0
    )
    import wandb

    rows = toy_project.epochs()
    seen = [metrics for _, metrics in wandb.logged if "clean_ema" in metrics]
    assert [metrics["epoch"] for metrics in seen] == [1, 2] and wandb.finished == [0]
    assert (wandb.run.project, wandb.run.name) == ("tiny", toy_project.run_of().stem)
    for metrics, row in zip(seen, rows, strict=True):
        assert metrics["clean_ema"] == row["clean_ema"] and metrics["train_loss"] == row["train_loss"]
        assert metrics["corrupt_ema/blur"] == row["per_kind"]["blur"]["ema"]
        assert metrics["lr/head"] == row["lr_groups"]["head"]
        # MLflow drops an epoch in which a name has any other character
        assert all(re.fullmatch(r"[\w ./:-]+", key) for key in metrics)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_that_is_not_installed_is_refused_before_anything_is_read(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda package: None)
    Path("tiny.yaml").write_text(toy_project.RECIPE)  # no data anywhere
    pattern = (
        rf"log\.{name}=true, but {name} is not installed; "
        rf"pip install -e '\.\[{name}\]', or log\.{name}=false"
    )
    with pytest.raises(EnvironmentFault, match=pattern):
        toy_project.fit(f"log.{name}=true")
    assert not Path("results").exists()
    checks.check_trackers(load())  # neither is asked for
