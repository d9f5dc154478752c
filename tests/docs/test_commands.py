"""Every command of the README and of docs/ is known: run, or read by the command's own parser with its recipe."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from fastflower.__main__ import COMMANDS
from fastflower.core.errors import InputError
from fastflower.recipe import Recipe, arguments, checks, load
from support import pages
from support.pages import REPO, Command

RUN = (
    "explain",
    "diff",
    "doctor",
)  # whole, in this test; `test_smoke.py` runs the path from photographs to report
PARSED = {  # commands of fastflower that only their parser sees here, and why
    "convert": "reads photographs that the reader has",
    "train": "takes minutes to hours",
    "lrfind": "trains",
    "campaign": "trains",
    "evaluate": "reads members that a training wrote",
    "ensemble": "reads logits that evaluate wrote",
    "export": "reads members that a training wrote",
    "report": "reads scores that evaluate wrote",
    "weights": "downloads",
    "demo": "trains; tests/commands/test_demo.py runs it",
    "sample_data": "writes data; tests/data/samples runs it",
    "bench": "takes minutes; tests/bench runs each at a tiny size",
}
OTHERS = {  # programs that are not started here, what is checked instead, and why
    "make": "its target exists; it installs, trains or tests",
    "composer": "its own parser and train's; it trains",
    "pytest": "its files exist; it is what runs here",
    "pip": "its options and extras exist; it needs a network",
    "conda": "its file exists; it needs a network",
    "git": "the address is the reader's",
    "cd": "enters the folder of the clone",
    ".": "a file that make setup writes",
    "ray": "its subcommand exists; it starts a cluster",
    "mkdocs": "not installed; the pages are checked by test_links.py",
    "python": "code/predict.py by its parser, scripts by their files",
}


class Parsed(Exception):
    """Raised in place of a command's work, once its arguments are read."""


@pytest.fixture(scope="module")
def found() -> list[Command]:
    return [command for page in pages.PAGES for command in pages.commands(page)]


@pytest.fixture
def place(
    found: list[Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, list[str]]]:
    """A directory with the recipes, the predictor and the modules that pages show; the experiments that pages make.

    An experiment is given by the recipe and the changes of the command that first names it.
    """
    for name in (
        "recipes",
        "code",
        "fastflower",
        "tests",
        "Makefile",
        "environment.yml",
        "requirements.lock",
    ):
        (tmp_path / name).symlink_to(REPO / name)
    modules, experiments = (
        [],
        {path.stem: [f"recipes/{path.name}"] for path in (REPO / "recipes").glob("*.yaml")},
    )
    for page in pages.PAGES:
        for block in pages.blocks(page):
            named = re.match(r"# (\w+)\.(py|yaml)\n", block.text)
            if named:
                Path(f"{named[1]}.{named[2]}").write_text(block.text, encoding="utf-8")
                if named[2] == "py":
                    modules.append(named[1])
                else:
                    experiments[named[1]] = [f"{named[1]}.yaml"]
    for command in found:
        recipe = next((word for word in command.words if word.endswith(".yaml")), "")
        for word in command.words:
            if word.startswith("exp.name=") and recipe:
                changes = [w for w in command.words if "=" in w and not w.startswith(("-", "data.fold"))]
                experiments.setdefault(word.partition("=")[2], [recipe, *changes])

    def locate(name: str) -> Path:
        if name.endswith((".yaml", ".yml")):
            return Path(name)
        assert name in experiments, f"no page makes the experiment {name}"
        return Path(experiments[name][0])

    monkeypatch.setattr(arguments, "locate", locate)
    yield experiments
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]
    for name in modules:
        sys.modules.pop(name, None)


def stop_early(module: Any, patch: pytest.MonkeyPatch) -> None:
    """Make a module raise Parsed once it has read and checked its recipes or, where it reads none, its options."""

    def stop_after(function: Callable[..., Any]) -> Callable[..., NoReturn]:
        def stop(*args: Any, **keywords: Any) -> NoReturn:
            result = function(*args, **keywords)
            for recipe in result if isinstance(result, list) else [result]:
                if isinstance(recipe, Recipe):
                    checks.check(recipe)
            raise Parsed

        return stop

    readers = [name for name in ("parse_command", "parse_several") if hasattr(module, name)]
    for name in readers:
        patch.setattr(module, name, stop_after(getattr(module, name)))
    if not readers:
        parser = argparse.ArgumentParser
        patch.setattr(parser, "parse_intermixed_args", stop_after(parser.parse_intermixed_args))
        patch.setattr(parser, "parse_args", stop_after(parser.parse_args))


def module_of(name: str) -> Any:
    """The module of a command."""
    package = importlib.import_module(f"fastflower.{name}")
    return importlib.import_module(f"fastflower.{name}.__main__") if hasattr(package, "__path__") else package


def check_own(name: str, argv: list[str], patch: pytest.MonkeyPatch, known: dict[str, list[str]]) -> None:
    """Run one of fastflower's commands, or let it read its arguments."""
    module = module_of(name)
    if "--help" in argv:
        return
    if name in RUN:
        module.main(argv)
    elif name == "report":
        asked, _ = module.parse(argv)
        assert {each.name for each in asked} <= set(known), f"no page makes the experiment of {argv}"
    elif name == "campaign":
        if "--trials" in argv:
            options = module.parse(argv)
            load(options.recipes[0], module.plan.parse_overrides(options.overrides).fixed)
        else:
            assert module.main([*argv, "--dry-run"]) == 0
    elif name == "sample_data":
        if argv[:1] != ["images"]:
            module.parse(argv)
    elif name == "demo":
        module.check([word for word in argv if word != "--shuffle-labels"])
    elif name == "weights":
        if argv:
            from fastflower.model.backbones import check_name

            check_name(load(argv[0]).model.backbone if argv[0].endswith(".yaml") else argv[0])
        stop_early(module, patch)
        with pytest.raises(Parsed):
            module.main(argv)
    else:
        stop_early(
            importlib.import_module(f"fastflower.bench.{argv[0]}") if name == "bench" else module, patch
        )
        with pytest.raises(Parsed):
            (module.start if hasattr(module, "start") else module.main)(argv)


def check_other(words: tuple[str, ...], patch: pytest.MonkeyPatch) -> None:
    """Check a command of another program as far as OTHERS says."""
    program, *argv = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), flags=re.M)
        assert argv[0] in targets and all("=" in word for word in argv[1:])
    elif program == "composer":
        from composer.cli import launcher

        patch.setattr(sys, "argv", list(words))
        options = launcher._parse_args()
        assert options.training_script == "fastflower/train.py"
        train = module_of("train")
        stop_early(train, patch)
        with pytest.raises(Parsed):
            train.check(options.training_script_args)
    elif program == "pytest":
        files = [word for word in argv if word.endswith(".py")]
        assert files and all((REPO / file).is_file() for file in files)
    elif program == "pip":
        extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [name for word in argv for name in re.findall(r"\[([\w,]+)\]", word)]
        assert set(",".join(named).split(",")) - {""} <= set(extras)
        assert argv[0] in ("install", "wheel", "download", "config")
    elif program == "conda":
        assert argv[0] == "activate" or (REPO / argv[argv.index("-f") + 1]).is_file()
    elif program == "ray":
        assert argv[0] in ("start", "get-auth-token")
    elif program == "python" and argv[0].endswith("predict.py"):
        assert Path(argv[0]).name in {path.name for path in (REPO / "code").glob("*.py")}
    elif program == "python":
        assert (REPO / argv[0]).is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_command_is_known_and_its_arguments_are_read(
    found: list[Command],
    place: dict[str, list[str]],
    code: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used, failures = set(), []
    monkeypatch.setenv("FASTFLOWER_NEXT", "0")
    for command in {command.words: command for command in reversed(found)}.values():
        program, *argv = command.words
        if program == "python" and argv[:1] == ["-m"]:
            program, argv = "fastflower", [argv[1].removeprefix("fastflower."), *argv[2:]]
        if program in COMMANDS:  # in a table that says once how each command begins
            program, argv = "fastflower", [program, *argv]
        if program == "fastflower" and not argv:
            continue
        used.add(argv[0] if program == "fastflower" else program)
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
            try:
                if program == "fastflower":
                    assert argv[0] in RUN or argv[0] in PARSED, "no command of fastflower"
                    check_own(argv[0], argv[1:], patch, place)
                elif argv and argv[0].endswith("predict.py"):
                    code.predict.parse(argv[1:])
                else:
                    assert program in OTHERS, "an unknown program"
                    check_other(command.words, patch)
            except (Exception, SystemExit) as error:
                failures.append(f"{command.place}: {' '.join(command.words)}: {error}")
    assert not failures, "\n".join(failures)
    unused = {*RUN, *PARSED} - used
    assert not unused, f"no page shows {unused}"


def test_the_backbone_of_the_page_trains(place: dict[str, list[str]]) -> None:
    from fastflower.model.network import fitted, training_network
    from fastflower.optim.groups import param_groups

    recipe, lines = fitted(
        load("recipes/scratch.yaml", ["model.backbone=my_network:build", "llrd.enabled=true"])
    )
    network, spec, _ = training_network(recipe, 4)
    assert lines == [] and spec.std == (0.25, 0.25, 0.25) and spec.interpolation == "bicubic"
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    parts = [group["part"] for group in param_groups(network, 1e-3, recipe)]
    assert list(dict.fromkeys(parts)) == ["front", "middle", "back", "head"]


@pytest.mark.parametrize(
    "words",
    [
        ("convert", "recipes/absent.yaml"),
        ("train", "recipes/demo.yaml", "opt.lrr=1"),
        ("train", "recipes/demo.yaml", "-n", "two"),
        ("evaluate", "never_trained"),
        ("export", "demo", "--zap"),
        ("report", "never_trained"),
        ("explain", "opt.lrr"),
        ("bench", "convert", "--zap"),
        ("sample_data", "cats"),
    ],
)
def test_wrong_commands_are_found(
    words: tuple[str, ...], place: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((InputError, AssertionError, SystemExit)):
        check_own(words[0], list(words[1:]), monkeypatch, place)


def test_every_recipe_of_a_page_is_one(place: dict[str, list[str]]) -> None:
    shown = [block for page in pages.PAGES for block in pages.blocks(page) if block.language == "yaml"]
    assert shown
    for block in shown:
        Path("recipe_of_a_page.yaml").write_text(block.text, encoding="utf-8")
        checks.check(load("recipe_of_a_page.yaml"))


def test_every_block_has_a_language() -> None:
    known = {"bash", "python", "text", "yaml"}
    for page in pages.PAGES:
        for block in pages.blocks(page):
            assert block.language in known, f"{page.name}:{block.line}: {block.language or 'no language'}"
            if block.language == "python":
                compile(block.text, f"{page.name}:{block.line}", "exec")


def test_the_two_commands_of_a_newcomer_are_in_the_readme() -> None:
    lines = {
        line.partition("#")[0].strip() for line in pages.PAGES[0].read_text(encoding="utf-8").splitlines()
    }
    assert {"make demo", "make test"} <= lines
