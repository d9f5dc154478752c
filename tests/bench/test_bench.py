"""Benchmarks: every contender iterates over all photographs, tables have a row for each, bad arguments are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastflower.bench import contenders, decoder, startup, step, timm_networks, trainers
from fastflower.bench.__main__ import main
from fastflower.bench.contenders import CONTENDERS, STOCK
from fastflower.bench.pictures import Pictures, photographs
from fastflower.core.errors import EnvironmentFault, InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for i in range(9):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
        coarse.resize((80 + i, 70)).save(tmp_path / "photographs" / f"{i}.jpg")
    (tmp_path / "photographs" / "notes.txt").write_text("not a picture")
    return tmp_path / "photographs"


@pytest.mark.parametrize(
    "name",
    [n for n in CONTENDERS if not n.startswith(("ffcv", "libjpeg"))],
)
def test_contenders_load_every_photograph(folder: Path, tmp_path: Path, name: str) -> None:
    if module := contenders.missing(name):
        pytest.skip(f"{module} is not installed")
    epoch = CONTENDERS[name](Pictures(photographs(folder, 0), tmp_path, batch=3), 24, 1)
    for _ in range(2):
        batches = [batch["image"] if isinstance(batch, dict) else batch for batch in epoch()]
        assert [tuple(batch.shape) for batch in batches] == [(3, 24, 24, 3)] * 3
        assert all(str(batch.dtype).endswith("uint8") for batch in batches)


def test_decoding_alone_reads_every_photograph(folder: Path, tmp_path: Path) -> None:
    pictures = Pictures(photographs(folder, 5), tmp_path)
    for name in CONTENDERS:
        if name.startswith("libjpeg"):
            assert list(CONTENDERS[name](pictures, 24, 2)()) == [None]


def test_invalid_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bench: got speed, choose from loader, "):
        main(["speed"])
    with pytest.raises(InputError, match="bench: got nothing"):
        main([])
    with pytest.raises(InputError, match="no folder with JPEG files"):
        main(["loader", "--data", str(tmp_path)])


def test_decoders_are_compared_on_the_same_crops(tmp_path: Path) -> None:
    row = decoder.compare(decoder.digits()[:200], tmp_path, size=24, epochs=3, seeds=2)
    assert (row["train"], row["n"], row["seeds"]) == (160, 40, 2)
    assert row["psnr_min"] > 40 and row["low"] <= row["difference"] <= row["high"]
    assert min(row["fast"], row["exact"]) > 0.2  # above chance, 0.1
    with pytest.raises(InputError, match="an interval needs at least 2"):
        decoder.main(["--seeds", "1"])
    with pytest.raises(InputError, match=r"no train_labels.csv"):
        decoder.main(["--data", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_and_its_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "REFUSING", ("train", "export"))
    arguments = ["--size", "24", "--threads", "1", "--rounds", "1", "--only", "pre-scaled raw"]
    main(["loader", "--data", str(folder), *arguments, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["contender"] for row in rows[:-1]] == [STOCK, "fastflower pre-scaled raw"]
    start = rows.pop()
    assert 0 < start["torch_s"] < start["warm_s"] < start["cold_s"] < 60
    assert set(start["refusal_s"]) == {"train", "export"}
    assert all(seconds > 0 for seconds in start["refusal_s"].values())
    assert rows[0]["ratio_to_stock_ffcv"] == 1.0 and all(row["images_per_s"] > 0 for row in rows)
    assert all(row["size"] == 24 and row["threads"] == 1 and row["first_batch_s"] > 0 for row in rows)
    assert "fastflower pre-scaled raw" in capsys.readouterr().out
    stock_raw = CONTENDERS["ffcv raw 512"](Pictures(photographs(folder, 0), tmp_path, batch=3), 24, 1)
    assert sum(1 for _ in stock_raw()) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_convert_is_compared_with_the_stock_writer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--size", "24", "--workers", "1", "--rounds", "1", "--json", str(tmp_path / "rows.json")]
    for k in range(9, 40):  # enough for five folds
        coarse = np.random.default_rng(k).integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(coarse).resize((60, 50)).save(folder / f"{k}.jpg")
    main(["convert", "--data", str(folder), *arguments])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 5 and all(row["seconds"] > 0 and row["ratio_to_stock_ffcv"] > 0 for row in rows)
    assert rows[0]["ratio_to_stock_ffcv"] == 1.0 and "fastflower, one split" in capsys.readouterr().out


@pytest.mark.slow
def test_the_predictor_is_compared_with_the_plain_loop(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: type
) -> None:
    """Both predict the same classes, and the measured precision is that of --half."""
    arguments = ["predict", "--data", str(folder), "--images", "6", "--scales", "32", "48", "--rounds", "1"]
    for half, precision in (("none", "fp32"), ("all", "bf16" if code.networks.multiplies_bf16() else "fp32")):
        main([*arguments, "--half", half, "--json", str(tmp_path / "rows.json")])
        (row,) = json.loads((tmp_path / "rows.json").read_text())
        assert (row["images"], row["scales"], row["precision"]) == (6, [32, 48], precision)
        assert row["ratio"] == pytest.approx(row["ours_per_s"] / row["plain_per_s"], rel=0.02)
        assert row["same_class"] == 1 or precision != "fp32"
        assert (
            f"images/s, predict.py {row['ours_per_s']:.2f} in {precision}, ratio" in capsys.readouterr().out
        )
    with pytest.raises(InputError, match=r"--data .*: no folder with JPEG files; give one"):
        main(["predict", "--data", str(tmp_path / "absent")])
    with pytest.raises(InputError, match=r"bundle.half.*gpu"):
        main([*arguments, "--half", "some"])


@pytest.mark.slow
def test_trainers_take_turns_and_the_table_has_their_ratio(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(9, 25):
        (folder / f"{i}.jpg").write_bytes((folder / f"{i % 9}.jpg").read_bytes())
    words = [
        "--data",
        str(folder),
        "--backbone",
        "test_resnet",
        "--size",
        "32",
        "--batch",
        "8",
        "--rounds",
        "1",
    ]
    names = ["fastflower", "plain_channels_last"]
    main(["step", *words, "--trainers", *names, "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["trainer"] for row in rows] == [step.TITLES[name] for name in names]
    assert rows[0]["faster"] == {"fastflower": 1.0}
    assert all(row["images_per_s"] > 0 and row["peak_mb"] > 100 for row in rows)
    printed = capsys.readouterr().out
    assert "| trainer | images/s | fastflower is faster by |" in printed
    assert "| test_resnet, 32, 8 | the same in channels_last format |" in printed


def test_ratios_are_medians_of_each_rounds_own_ratio() -> None:
    assert step.ratio([10.0, 30.0, 8.0], [5.0, 10.0, 8.0]) == 2.0
    assert step.references(["resident", "float32", "timm", "fastflower"]) == ["fastflower", "float32"]
    assert step.references(["timm", "plain"]) == ["timm"]
    row = {
        "backbone": "net", "size": 96, "batch": 32, "trainer": "peer", "images_per_s": 70.2,
        "processor_ms_per_image": 14.1, "peak_mb": 900, "faster": {"fastflower": 1.234, "float32": 1.5},
    }  # fmt: skip
    assert step.table([row]).splitlines() == [
        "| network, size, batch | trainer | images/s | fastflower is faster by | train.amp=false is faster by "
        "| processor ms/image | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| net, 96, 32 | peer | 70.2 | 1.23 | 1.50 | 14.1 | 900 |",
    ]
    assert "| timm's train loop is faster by |" in step.table([row | {"faster": {"timm": 2.0}}])


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_the_peers_networks_take_images_of_the_size_that_is_compared(name: str) -> None:
    network = timm_networks.create(name, 64, num_classes=3)
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.slow
def test_the_peers_of_timm_and_the_loop_compute_as_they_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = step.Settings(
        project="", ffcv="", classes=3, backbone="test_resnet", size=32, batch=2, epochs=1, threads=1, device="cpu"
    )  # fmt: skip
    for channels_last, half in ((False, False), (True, False), (True, True)):
        network, _, _ = trainers.timm_network(settings, channels_last=channels_last)
        convolution = network.conv1[0].weight
        assert convolution.is_contiguous(memory_format=torch.channels_last) is channels_last
        seen = []
        network.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs[0], output)))
        monkeypatch.setattr(trainers.Pace, "wait", lambda pace: None)
        trainers.train_plainly(
            settings,
            trainers.Pace(settings),
            network=network,
            batches=[(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))],
            optimizer=torch.optim.SGD(network.parameters(), 0.1),
            loss=torch.nn.CrossEntropyLoss(),
            channels_last=channels_last,
            half=half,
        )
        ((images, logits),) = seen
        assert images.is_contiguous(memory_format=torch.channels_last) is channels_last
        assert logits.dtype == (torch.bfloat16 if half else torch.float32)


def test_too_few_photographs_for_two_steps_are_refused(folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"9 photographs: an epoch needs two batches of 32 .* give 85 or more"
    ):
        main(["step", "--data", str(folder)])


def test_optional_trainers_are_compared_where_they_are_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"^--trainers fastai: not installed; pip install fastai, or"):
        main(["step", "--trainers", "plain", "fastai"])
    monkeypatch.setattr(step.processor, "multiplies_bf16", lambda: False)
    monkeypatch.setattr(step.processor, "name", lambda: "Old Chip")
    with pytest.raises(
        EnvironmentFault, match=r"^--trainers timm_bf16: Old Chip has no bf16 instructions, or"
    ):
        main(["step", "--trainers", "timm_bf16"])
    assert {"fastai", "float32"}.isdisjoint(step.runnable(None, "cpu"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [
        "not compared: fastai (not installed; pip install fastai)",
        "not compared: float32 (Old Chip has no bf16 instructions)",
    ]
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(step.processor, "multiplies_bf16", lambda: True)
    assert step.runnable(None, "cpu") == list(step.TITLES)
    assert set(step.TITLES) - set(step.runnable(None, "cuda")) == {"timm_bf16"}
    with pytest.raises(EnvironmentFault) as refused:
        main(["step", "--trainers", "timm_bf16", "--device", "cuda"])
    assert str(refused.value) == (
        "--trainers timm_bf16: the others compute in bf16 on a GPU, too: give timm_channels_last, or leave it out"
    )


@pytest.mark.slow
def test_a_trainer_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    settings = step.Settings(
        project=str(tmp_path), ffcv="", classes=2, backbone="no_such_network", size=32, batch=2, epochs=1,
        threads=1, device="cpu",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"(?s)plain has ended: .*no_such_network"):
        step.Contender.start("plain", settings, tmp_path)
