"""The last line of a command: the command that a person runs next."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fastflower import doctor, evaluate, sample_data, weights
from fastflower.campaign import __main__ as campaign
from fastflower.core import console
from fastflower.core.errors import InputError
from fastflower.core.runs import Run
from fastflower.recipe import load
from fastflower.recipe.run_record import write_recipe
from fastflower.report.__main__ import print_next


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(console.NEXT, raising=False)
    monkeypatch.setattr(console, "spelled", lambda command, words: " ".join(["fastflower", command, *words]))


def found(**ok: bool | None) -> list[doctor.Finding]:
    return [doctor.Finding(name, value, "") for name, value in ok.items()]


@pytest.mark.parametrize(
    ("argv", "findings", "line"),
    [
        ([], found(photographs=None), "fastflower demo"),
        ([], found(photographs=True), "fastflower doctor recipes/finetune.yaml"),
        (["a.yaml"], found(labels=True, betons=None), "fastflower convert a.yaml"),
        (["a.yaml"], found(labels=True, betons=True), "fastflower train a.yaml"),
        ([], [doctor.Finding("packages", False, "", advice=doctor.SETUP)], doctor.SETUP),
        (["a.yaml"], found(labels=False, betons=None), None),
    ],
)
def test_doctor_names_the_step_that_its_findings_allow(
    argv: list[str], findings: list[doctor.Finding], line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor.print_next(argv, findings)
    assert capsys.readouterr().out == (f"next: {line}\n" if line else "")


def test_weights_name_a_recipe_that_starts_from_them(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text("model: {backbone: resnet18.a1_in1k}")
    weights.print_next("resnet18.a1_in1k", "resnet18.a1_in1k")
    weights.print_next("recipes/mine.yaml", "resnet18.a1_in1k")
    weights.print_next("resnet50", "resnet50")
    Path("recipes/pairs.yaml").write_text("model: {backbone: compare_resnet18_adaptive}")
    weights.print_next("compare_resnet18_adaptive", "compare_resnet18_adaptive")
    weights.print_next("compare_resnet50_adaptive", "compare_resnet50_adaptive")
    assert capsys.readouterr().out.splitlines() == [
        *["next: fastflower doctor recipes/mine.yaml"] * 2,
        "next: fastflower doctor model.backbone=resnet50",
        "next: fastflower doctor recipes/pairs.yaml",
        "next: fastflower doctor model.backbone=compare_resnet50_adaptive",
    ]
    weights.list_recipes()
    assert "resnet18  (pairs.yaml)\n  missing" in capsys.readouterr().out


def test_a_report_leads_to_an_export_and_then_to_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = SimpleNamespace(data=SimpleNamespace(test="my photos"))
    for bundle in (None, "bundle"):
        print_next([SimpleNamespace(name=name, recipe=recipe, bundle=bundle) for name in "ab"])
    assert capsys.readouterr().out.splitlines() == [
        "next: fastflower export a b",
        "next: python code/predict.py 'my photos' results/results/submission.csv",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "evaluate a b"),
        (["data.split=none"], "export a b ensembling.find_pattern=ema_best__*.pth"),
        (["data.fold=none"], "export a b ensembling.find_pattern=refit__*.pth"),
        (["semi.rounds=1", "data.unlabelled=more"], "report a b"),
    ],
)
def test_a_campaign_leads_to_what_can_be_done_with_its_experiments(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.yaml").write_text("model: {pretrained: false}")
    monkeypatch.setattr(campaign.rounds, "gains", lambda planned: [{"round": "a"}])
    results = [
        campaign.Result(SimpleNamespace(run=Run(exp=exp, backbone="b", fold=fold, seed=1)), "done")
        for exp in ("a", "b")
        for fold in (0, 1)
    ]
    monkeypatch.setattr(campaign, "collect", lambda *_, **__: (results, True))
    monkeypatch.setattr(campaign, "print_summary", lambda *_, **__: None)
    assert campaign.main(["a.yaml", "-n", "1", "--no-ray", *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"next: fastflower {line}"


def test_generated_data_lead_to_their_recipe_where_it_looks_for_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sample_data.main(["eyes", "rows=4", "held_out=2"])
    assert capsys.readouterr().out.splitlines()[-1] == "next: fastflower doctor recipes/eyes_small.yaml"
    sample_data.main(["eyes", "rows=4", "held_out=2", "home=elsewhere"])
    assert "next:" not in capsys.readouterr().out


def test_no_line_where_a_command_is_a_step_of_another(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(console.NEXT, "0")
    doctor.print_next([], [])
    assert capsys.readouterr().out == ""


def test_several_experiments_are_refused_together_before_work_on_the_first() -> None:
    Path("a.yaml").write_text("model: {pretrained: false}")
    Path("b.yaml").write_text("data: {flips_keep_class: false}")
    with pytest.raises(InputError, match="flips change the class"):
        evaluate.main(["a.yaml", "b.yaml"])


def test_campaign_and_weights_take_the_name_of_an_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Path("results/results/s2/meta/recipe.yaml")
    write_recipe(recorded, load(None, ["exp.name=s2", "model.backbone=resnet18.a1_in1k"]))
    assert campaign.parse(["s2", "seed=[1,2]"]).recipes == [str(recorded)]
    asked: list[str] = []
    monkeypatch.setattr(weights, "fetch", asked.append)
    weights.main(["s2"])
    assert asked == ["resnet18.a1_in1k"]
    with pytest.raises(InputError, match=r"^s3 is neither a recipe .* trained are s2$"):
        campaign.parse(["s3"])
