"""The ablation: its counterparts, what it counts by hand, and a whole one of tiny trainings that continues."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from fastflower import convert, train
from fastflower.bench import ablation, tiny_project
from fastflower.bench.ablation import PARTS, Hits
from fastflower.campaign import launch
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.recipe import load


def test_every_part_is_left_out_where_it_is_and_added_where_it_is_not() -> None:
    convnext, finetune = (
        str(Path(__file__).parents[2] / "recipes" / f"{name}.yaml") for name in ("convnext", "finetune")
    )
    for recipe in (convnext, finetune):
        base = load(recipe, [])
        for name, part in PARTS.items():
            words = ablation.variant([recipe], base, name)
            changed = load(words[0], words[1:])
            assert part.present(changed) != part.present(base), name
            assert changed.exp.name == f"{base.exp.name}-{name}"
    assert [name for name, part in PARTS.items() if not part.present(load(finetune, []))] == [
        "sizes", "mixing", "erasing", "sampler",
    ]  # fmt: skip
    assert "data.img_size=[[64,64],[112,112]]" in ablation.variant([finetune], load(finetune, []), "sizes")


@pytest.mark.parametrize("present", [True, False])
def test_the_gain_is_that_of_having_the_part(present: bool) -> None:
    """Eight images that only the recipe with the part has right, two that only the other has; counted by hand."""
    having, lacking = np.repeat([1, 0, 1], [8, 2, 90]), np.repeat([0, 1, 1], [8, 2, 90])
    sides = [Hits(clean=h > 0, single=h > 0, corrupted=h * 0.5) for h in (having, lacking)]
    reference, other = sides if present else sides[::-1]
    base = load(None, ["reg.erase_p=0.1" if present else "reg.erase_p=0"])
    minutes = (2.0, 1.0) if present else (1.0, 2.0)
    row = ablation.compare(PARTS["erasing"], base, reference=reference, other=other, minutes=minutes)
    assert row.in_recipe is present and row.minutes == (2.0, 1.0)
    assert row.clean.gain == pytest.approx(0.06) and row.clean.p == binomtest(8, 10).pvalue
    assert row.corrupted is not None and row.corrupted.gain == pytest.approx(0.03)
    line = ablation.table([row], reference)[-1]
    assert "| +6.0 (" in line and "| 0.11 | +3.0 (" in line and line.endswith("| 2.00, 1.00 |")


def test_a_bad_change_is_refused_before_the_first_training() -> None:
    tiny_project.draw(Path())
    with pytest.raises(InputError, match=r"reg.erase_p"):
        ablation.main([tiny_project.RECIPE_FILE, "reg.erase_p=7"])
    assert not Path("results/model").exists()


def test_seeds_are_trained_and_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of three images: the first is right twice, the second never, the third once."""
    monkeypatch.setattr(ablation, "train_seed", lambda words, ledger: load(words[0], words[1:]))
    right = {3: [1.0, 0.0, 1.0], 5: [1.0, 0.0, 0.0]}
    monkeypatch.setattr(
        ablation, "hits_of", lambda recipe, pattern, corrupted: Hits(*[np.array(right[recipe.seed])] * 3)
    )
    tiny_project.draw(Path())
    recipes = ablation.train([tiny_project.RECIPE_FILE], Path("ledger.json"), [3, 5])
    hits = ablation.hits_over(recipes)
    assert hits.clean.tolist() == hits.single.tolist() == hits.corrupted.tolist() == [1, 0, 0.5]


@pytest.mark.slow
def test_a_whole_ablation_continues(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the first counterpart, it trains the rest when called again, and at last prints the same table."""
    tiny_project.draw(Path())
    convert.main([tiny_project.RECIPE_FILE])
    stops = iter([False, True])

    def run_here(command: list[str], environment: dict[str, str], log: Path | None) -> tuple[int, str]:
        return (3, "stopped") if next(stops, False) else (train.main(command[3:]), "")

    monkeypatch.setattr(launch, "run_process", run_here)
    command = [tiny_project.RECIPE_FILE, "data.fold=0", "--parts", "erasing", "select"]
    with pytest.raises(
        EnvironmentFault, match="a training of tiny-erasing failed; run the same command again"
    ):
        ablation.main(command)
    capsys.readouterr()
    tables = []
    for kept in (1, 3):
        assert ablation.main(command) == 0
        out = capsys.readouterr().out
        assert out.count("kept: ") == kept
        tables.append(out[out.rindex("The recipe itself") :])
    assert tables[0] == tables[1]
    rows = [line.split(" | ") for line in tables[0].splitlines()[4:]]
    assert [row[:3] for row in rows] == [
        ["| random erasing", "yes", "`reg.erase_p=0`"],
        ["| best epoch by S", "yes", "best by clean, of the same training"],
        ["| 2 views at test time", "yes", "one view of the same members"],
    ]
