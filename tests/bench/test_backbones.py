"""Backbones of timm: a few families a day go the whole way; the table, limits and bad arguments."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
import timm

from fastflower.bench import backbones
from fastflower.core.errors import InputError

# over five seconds, or over a gigabyte
NAMES = """
deepseek_vit_412m gemma4_vit_167m mobilenetv5_base nasnetalarge pnasnet5large vgg11 naflexvit_base_patch16_gap
maxvit_tiny_tf_224 caformer_s18 convformer_s18 convmixer_768_32 res2net50_14w_8s selecsls42 swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 halonet26t inception_resnet_v2 beit_base_patch16_224 nextvit_small
beitv2_base_patch16_224 samvit_base_patch16_224 vit_base_patch16_siglip_224 hieradet_small qwen3_vit_88m mvitv2_tiny
"""
SLOW = NAMES.split()
QUICK = [name for name in backbones.FAMILIES if name not in SLOW]
TODAY = datetime.date.today().toordinal()


@pytest.mark.slow
@pytest.mark.parametrize("place", range(3))
def test_families_of_the_day_pass(place: int) -> None:
    """Every family has its turn within a month; `bench backbones` runs them all."""
    row = backbones.in_child(QUICK[(3 * TODAY + place) % len(QUICK)], seconds=120, memory=8000)
    assert row.state == "passes", row


def test_every_module_of_timm_has_a_network() -> None:
    modules = {timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in backbones.FAMILIES}
    of_timm = {name for name in timm.list_modules() if hasattr(timm.models, name)}  # not those of other tests
    assert of_timm <= modules
    assert len(set(backbones.FAMILIES)) == len(backbones.FAMILIES) and set(backbones.REDUCED) <= set(
        backbones.FAMILIES
    )


def test_the_table_and_what_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    assert backbones.main(["test_resnet", "--table", "table.md"]) == 0
    assert "1 networks: 1 pass (1 at two sizes, 0 at one)" in capsys.readouterr().out
    table = Path("table.md").read_text()
    assert "| test_resnet | resnet | passes | 64, 96 |" in table and timm.__version__ in table
    finished = json.loads(backbones.RESULTS.read_text())
    finished["test_resnet"]["note"] = "kept"
    backbones.RESULTS.write_text(json.dumps(finished))
    backbones.main(["test_resnet"])
    assert backbones.read_rows(backbones.RESULTS)["test_resnet"].note == "kept"


def test_limits_end_a_network() -> None:
    row = backbones.in_child("test_resnet", seconds=0.01, memory=8000)
    assert (row.state, row.note) == ("fails", "took more than 0.01 s")


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(InputError, match=r"no network of timm .* matches absent\*"):
        backbones.chosen("absent*")
    Path("rows.json").write_text("[]")
    with pytest.raises(InputError, match=r"rows\.json: not written by bench backbones"):
        backbones.main(["test_resnet", "--results", "rows.json"])
