"""explain and diff: meaning and origin of values, numbers that follow, and the keys in which recipes differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastflower import diff, explain
from fastflower.core.errors import InputError
from fastflower.recipe import fields_of, load
from fastflower.recipe.schema import Recipe


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFLOWER_NEXT", "0")
    Path("base.yaml").write_text("opt: {lr: 1.0e-3}\nsched: {cosine_epochs: 16}\n")
    Path("mine.yaml").write_text(
        "base: base.yaml\nmodel: {backbone: resnet18, pretrained: false}\ntrain: {batch_per_gpu: 32, world_size: 2}\n"
        "data: {img_size: 96}\ntta: {scales: [96]}\n"
    )


def test_a_key_is_explained_with_its_value_and_origin(capsys: pytest.CaptureFixture[str]) -> None:
    explain.main(["opt.lr", "mine.yaml"])
    text = capsys.readouterr().out
    assert text.startswith("opt.lr\n") and "0.001 (base base.yaml)" in " ".join(text.split())
    explain.main(["opt.lr", "mine.yaml", "opt.lr=2e-3"])
    assert "0.002 (command line)" in " ".join(capsys.readouterr().out.split())


def test_auto_is_explained_with_the_value_that_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    explain.main(["sched.warmup_epochs", "mine.yaml"])
    assert "auto is 2 here" in capsys.readouterr().out  # an eighth of 16 epochs


def test_a_recipe_is_explained_with_origins_and_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    explain.main(["mine.yaml", "seed=7"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "opt.lr 0.001 (base base.yaml)" in lines
    assert "model.backbone resnet18 (mine.yaml)" in lines
    assert "seed 7 (command line)" in lines
    assert "batch 64 images in an optimizer step" in lines
    assert not any("(default)" in line for line in lines)


def test_sections_and_lines_fit_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    explain.main([])
    overview = capsys.readouterr().out
    for section in {name.partition(".")[0] for name, _, _ in fields_of(Recipe()) if "." in name}:
        assert section in overview
        explain.main([section])
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80 or max(map(len, text.split())) > 60, section


def test_the_reference_of_all_keys_has_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    explain.main(["--format", "md"])
    text = capsys.readouterr().out
    for name, _, _ in fields_of(Recipe()):
        assert text.count(f"| `{name}` |") == 1, name


@pytest.mark.parametrize(
    "words, message",
    [
        (["opt.lrr"], r"no key or section opt\.lrr; did you mean opt\.lr"),
        (["mine.yaml", "base.yaml"], "takes one key or section, and one recipe"),
        (["--format", "html"], "--format md stands alone"),
        (["--all"], "got --all, which is no option"),
        (["--batch-size", "32"], r"settings are written key=value, here train\.batch_per_gpu=\.\.\."),
    ],
)
def test_bad_arguments_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        explain.main(words)


def test_diff_shows_the_keys_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    diff.main(["base.yaml", "mine.yaml"])
    text = capsys.readouterr().out
    first, second = load("base.yaml"), load("mine.yaml")
    values = {name: value for name, value, _ in fields_of(second)}
    changed = [name for name, value, _ in fields_of(first) if value != values[name]]
    assert all(f"{name}:" in text for name in changed) and f"{len(changed)} keys differ" in text
    diff.main(["base.yaml", "base.yaml"])
    assert capsys.readouterr().out == "no key differs\n"
    with pytest.raises(InputError, match=r"got 1 recipes \(base\.yaml\); diff takes two"):
        diff.main(["base.yaml"])
