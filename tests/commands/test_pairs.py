"""Pairs of images: sample data, batches, comparing networks, recipes, and every command on them."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from composer.core import Event
from PIL import Image
from timm.layers.cbam import CbamModule
from timm.models._manipulate import group_parameters

from fastflower import convert, evaluate, export, sample_data, train
from fastflower.algorithms.augmentation import DeviceAugment
from fastflower.bundle import gates, held_out, program
from fastflower.bundle.description import PairArrays
from fastflower.core import runs, scores, seeding
from fastflower.core.errors import InputError
from fastflower.core.runs import Run
from fastflower.data.betons.fold_set import open_fold
from fastflower.data.decode import kernel
from fastflower.data.decode.kernel import Crop, decode_eval, decode_train
from fastflower.data.folds import read_folds
from fastflower.data.loaders import EvalLoader, TrainLoader, train_images
from fastflower.data.readers import image_files, sources
from fastflower.data.transforms import preview
from fastflower.data.transforms.augment import augment
from fastflower.evaluation import gradcam, inference, logits, mistakes, soups
from fastflower.model.backbones import build_backbone, profile
from fastflower.model.compare import FEATURES, FUSIONS, CompareNet
from fastflower.model.member import load_member, save_member
from fastflower.model.network import Network, NetworkSpec, build_network
from fastflower.model.pretrained import published_name
from fastflower.recipe import checks, derived, load, parse_command, schema
from fastflower.report import thumbnails
from fastflower.training import samples
from support.member_metas import member_meta

FILL = (127.5,) * 3  # colour of erased boxes for a mean of 0.5
SMALL = ["exp.name=pairs", "data.workers=1", "sched.cosine_epochs=1", "train.batch_per_gpu=16"]


@pytest.fixture
def recipe(repo: Path) -> schema.Recipe:
    """The recipe pairs_small.yaml with 64 converted training pairs."""
    sample_data.main(["pairs", "rows=64", "held_out=24"])
    arguments = [str(repo / "recipes/pairs_small.yaml"), *SMALL]
    convert.main(arguments)
    return parse_command(arguments)


def test_half_of_the_pairs_agree_and_no_image_is_in_two_splits():
    sample_data.main(["pairs", "rows=300", "held_out=100", "seed=3", "home=first"])
    sample_data.main(["pairs", "rows=300", "held_out=100", "seed=3", "home=second"])
    images_of = {}
    for split, rows in (("train", 300), ("val", 100), ("test", 100)):
        pairs, repeated = np.load(f"first/{split}.npz"), np.load(f"second/{split}.npz")
        assert pairs["xa"].shape == pairs["xb"].shape == (rows, 32, 32) and pairs["xa"].dtype == np.uint8
        assert pairs["y"].sum() == rows / 2
        assert all(np.array_equal(pairs[name], repeated[name]) for name in ("xa", "xb", "y"))
        assert not (pairs["xa"] == pairs["xb"]).all((1, 2)).any()
        images_of[split] = {image.tobytes() for name in ("xa", "xb") for image in pairs[name]}
    assert not images_of["train"] & images_of["val"] and not images_of["val"] & images_of["test"]
    with pytest.raises(InputError, match="not empty"):
        sample_data.main(["pairs", "home=first"])


def test_batches_hold_both_images_side_by_side(recipe):
    fold = open_fold(recipe, 0)
    assert (fold.train.rows, fold.val.rows, fold.train.images_per_row) == (64, 24, 2)
    rows, out = np.arange(8), np.empty((8, 16, 16, 3), np.uint8)
    (batch, *_) = EvalLoader(
        fold.val, 8, size=lambda: (16, 16), factor=1.0, interpolation="bilinear", threads=1
    )
    for beton, half in zip((fold.val, fold.val.second), batch["image"].chunk(2, 2), strict=True):
        decode_eval(beton, rows, out=out, factor=1.0, interpolation="bilinear", threads=1)
        assert np.array_equal(half.numpy(), out)
    crop = Crop((0.5, 1.0), (1, 1), 0.5)
    (batch, *_) = TrainLoader(
        fold.train,
        lambda epoch: np.arange(64),
        seed=1,
        batch=lambda epoch: 8,
        size=lambda epoch: (16, 16),
        crop=crop,
        threads=1,
    )
    keys = batch["key"].numpy().view(np.uint64)
    halves = zip(
        (fold.train, fold.train.second), (keys, seeding.hash64(keys)), batch["image"].chunk(2, 2), strict=True
    )
    for beton, half_keys, half in halves:
        decode_train(beton, rows, keys=half_keys, out=out, crop=crop, threads=1)
        assert np.array_equal(half.numpy(), out)


def test_the_halves_are_augmented_as_separate_images():
    images = torch.randint(0, 256, (5, 12, 20, 3), dtype=torch.uint8)
    keys, aug = torch.arange(5) * 977, load(None, ["aug.photometric_p=0.5"]).aug
    got = augment(images, keys, aug=aug, erase_p=0.3, fill=(1.0, 2.0, 3.0), pairs=True)
    first = augment(images[:, :, :10].contiguous(), keys, aug=aug, erase_p=0.3, fill=(1.0, 2.0, 3.0))
    second = augment(
        images[:, :, 10:].contiguous(),
        seeding.hash64_tensor(keys),
        aug=aug,
        erase_p=0.3,
        fill=(1.0, 2.0, 3.0),
    )
    assert torch.equal(got, torch.cat([first, second], 3))


@pytest.mark.parametrize("fusion", FUSIONS)
def test_fusions_are_their_formulas(fusion):
    network = CompareNet([1, 1, 1], fusion, cbam=False, width=0.25).eval()
    pairs = torch.randn(3, 3, 16, 32)
    with torch.no_grad():
        got = network(pairs)
        a, b = network.embed(pairs[..., :16]), network.embed(pairs[..., 16:])
    want = {
        "concat": torch.cat([a, b], 1), "difference": a - b, "distance": (a - b).abs(), "product": a * b,
        "square": (a - b) ** 2, "adaptive": torch.cat([a, b, a - b, (a - b).abs(), a * b, (a - b) ** 2], 1),
    }[fusion]  # fmt: skip
    torch.testing.assert_close(got, want)
    if network.shares is not None:
        network.shares.data = torch.tensor([5.0, 0, 0, 0, 0, 0])
        with torch.no_grad():
            terms = network(pairs).unflatten(1, (6, FEATURES))
        assert (terms[:, 0] / a).mean() == pytest.approx(6 * torch.softmax(network.shares, 0)[0].item())


def test_norms_of_the_trunk_are_fused_once_although_it_runs_twice():
    network = CompareNet([1, 1, 1], "adaptive", cbam=True, width=0.25)
    network(torch.randn(8, 3, 16, 32))  # statistics unlike those of a new network
    pairs = torch.randn(3, 3, 16, 32)
    fused, norms = program.fuse_norms(network.eval(), pairs)
    assert not [norm for norm in fused.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    assert len({norm.norm for norm in norms}) == len(norms) == 12  # stem, blocks, shortcuts, attention
    torch.testing.assert_close(fused(pairs), network(pairs), atol=1e-4, rtol=0)


def test_recipes_name_layers_fusion_attention_and_width():
    sizes = {}
    for variant in ("222", "333", "222_cbam", "222_w75", "222_w112", "222_w125"):
        name = variant.replace("222", "compare_resnet222_concat").replace("333", "compare_resnet333_concat")
        network, _ = build_backbone(name, [(28, 28)])
        assert profile(name, [(28, 28)]).features == 2 * FEATURES
        assert sum(isinstance(module, CbamModule) for module in network.modules()) == 3 * ("cbam" in name)
        sizes[variant] = sum(p.numel() for p in network.parameters())
    assert sizes["222_w75"] < sizes["222"] < sizes["222_w112"] < sizes["222_w125"]
    assert sizes["222"] < sizes["222_cbam"] < sizes["333"]
    assert timm.is_model("compare_resnet333_adaptive_cbam_w112")


def test_any_network_of_timm_compares_pairs():
    name = "compare_test_efficientnet_distance"
    network, _ = build_backbone(name, [(32, 32)])
    pairs = torch.randn(2, 3, 32, 64)
    a, b = (network.eval().features(network.trunk(half)) for half in pairs.chunk(2, 3))
    torch.testing.assert_close(network(pairs), (a - b).abs())
    torch.testing.assert_close(network(pairs), network(torch.cat(pairs.chunk(2, 3)[::-1], 3)))
    assert profile(name, [(32, 32)]).features == FEATURES
    layers = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    parts = set(layers.values())
    assert len(parts) > 3 and sum(p.numel() for p in network.trunk.parameters()) > 90_000
    with pytest.raises(InputError, match=r"timm .* has no such model"):
        build_backbone("compare_no_such_network_distance", [(32, 32)])


def test_a_trunk_starts_from_its_published_weights(tmp_path):
    published = timm.create_model("test_efficientnet", num_classes=7)
    torch.save(published.state_dict(), tmp_path / "test_efficientnet.pth")
    name = "compare_test_efficientnet_distance"
    network, report = build_backbone(name, [(32, 32)], pretrained=tmp_path)
    expected = published.state_dict()
    assert report.matched == len(network.trunk.state_dict()) and report.dropped
    assert all(torch.equal(tensor, expected[key]) for key, tensor in network.trunk.state_dict().items())
    with pytest.raises(
        InputError, match=r"no pretrained weights of test_vit in .* fastflower.weights test_vit,"
    ):
        build_backbone("compare_test_vit_distance", [(32, 32)], pretrained=tmp_path)
    assert published_name("compare_resnet222_adaptive") == "compare_resnet222_adaptive"


def test_activations_of_both_images_can_be_recomputed():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network, _ = build_backbone("compare_resnet222_concat_w25", [(32, 32)], grad_checkpointing=recompute)
        network.eval()(torch.ones(2, 3, 32, 64)).sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_symmetric_questions_exchange_half_of_the_pairs(coloured):
    fold = open_fold(coloured, 0)
    rows, keys = np.arange(24), seeding.hash64(np.arange(24, dtype=np.uint64))
    assert (
        Crop.of(coloured).swap
        and not Crop.of(replace(coloured, data=replace(coloured.data, symmetric=False))).swap
    )
    crop = replace(Crop.of(coloured), hflip_p=0.0)
    images = train_images(fold.train, rows, keys=keys, size=(16, 16), crop=crop)
    plain = train_images(fold.train, rows, keys=keys, size=(16, 16), crop=replace(crop, swap=False))
    assert red_and_blue(plain)
    swapped = np.array([not red_and_blue(image[None]) for image in images.numpy()])
    assert 5 < swapped.sum() < 19
    exchanged = torch.cat(plain.chunk(2, 2)[::-1], 2)
    assert torch.equal(images, torch.where(torch.from_numpy(swapped).view(-1, 1, 1, 1), exchanged, plain))


@pytest.mark.parametrize("flip", ["aug.hflip_p=0.5", "tta.hflip=true"])
def test_flips_of_digits_in_pairs_are_refused(repo, flip):
    with pytest.raises(InputError, match=r"flips change the class of these images"):
        checks.check(load(repo / "recipes/pairs.yaml", [flip]))


def test_the_recipe_has_the_published_hyperparameters(repo):
    r = load(repo / "recipes/pairs.yaml")
    assert (r.opt.lr, r.opt.weight_decay, r.opt.name, r.train.batch_per_gpu) == (1e-3, 5e-4, "adamw", 64)
    assert (r.sched.name, r.sched.monitor, r.sched.factor, r.sched.patience) == ("plateau", "score", 0.5, 3)
    assert (r.loss.name, r.loss.focal_gamma, r.reg.ls_eps, r.es.patience) == ("focal", 2.0, 0.0, 5)
    assert derived.derive(r, 1).epochs == 100 and r.aug.hflip_p == 0 and not r.tta.hflip


@pytest.fixture
def trained(recipe, repo) -> list[str]:
    """The command-line arguments of the recipe, after a short training."""
    arguments = [
        str(repo / "recipes/pairs_small.yaml"),
        *SMALL,
        "opt.lr=0.01",
        "bundle.dtype=fp32",
        "bundle.max_ms=60000",
    ]
    assert train.main(arguments) == 0
    return arguments


@pytest.mark.slow
def test_the_programs_of_evaluate_predict_pairs(recipe, trained):
    evaluate.main(trained)
    folder = runs.MODELS / "pairs/programs"
    code = runs.shipped("code") / "predict.py"
    arguments = [sys.executable, str(code), "data/pairs/val.npz", "out.csv", "--bundle", str(folder)]
    done = subprocess.run([*arguments, "--logits", "logits.npz"], check=True, capture_output=True, text=True)
    assert (
        "no exported bundle; using the members above" in done.stdout and "24 pairs, 1 members" in done.stdout
    )
    known = logits.load_logits(runs.RESULTS / f"pairs/oof/{recipe.model.backbone}__fold0_seed42.npz")
    np.testing.assert_allclose(np.load("logits.npz")["logits"][:, 0].mean(1), known.logits, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("side", [0, 1])
def test_the_pixel_gate_detects_swapped_and_repeated_images(trained, monkeypatch, side):
    """Both images swapped (side 0), and the second image twice (side 1)."""
    original = gates.trainer_view

    def rearranged(*arguments):
        halves = np.split(original(*arguments), 2, axis=2)
        return np.concatenate([halves[1], halves[side]], axis=2)

    monkeypatch.setattr(gates, "trainer_view", rearranged)
    with pytest.raises(InputError, match=r"^pixels: \d+ of 255 on 24 pairs, allowed <= 0"):
        export.main(trained)
    assert not runs.BUNDLE.exists()


def test_the_gates_read_float_arrays_under_the_training_files_names(recipe, repo):
    """Channels first, in 0..1; the validation file has other array names."""
    for split in ("train", "val"):
        arrays = dict(np.load(f"data/pairs/{split}.npz"))
        names = ("xa", "xb", "y") if split == "train" else ("left", "right", "same")
        floats = [np.repeat(arrays[name][:, None], 3, 1) / np.float32(255) for name in ("xa", "xb")]
        np.savez(f"data/pairs/{split}.npz", **dict(zip(names, [*floats, arrays["y"]], strict=True)))
    arguments = [str(repo / "recipes/pairs_small.yaml"), *SMALL]
    Path("data/pairs/folds.csv").unlink()  # other images need new folds
    convert.main(arguments)
    member = types.SimpleNamespace(meta=types.SimpleNamespace(fold=0))
    collected = held_out.collect(Path("held out"), parse_command(arguments), [member])
    val = np.load("data/pairs/val.npz")
    names = read_folds(Path("data/pairs/folds.csv")).filenames
    for file, index in zip(collected.files, collected.index, strict=True):
        pair, row = np.load(file), int(names[index].removeprefix("val/"))
        assert pair.files == ["xa", "xb"] and pair["xa"].dtype == np.float32
        assert np.array_equal(pair["xa"], val["left"][[row]])
        assert np.array_equal(pair["xb"], val["right"][[row]])
    bundle = types.SimpleNamespace(
        crops=[types.SimpleNamespace(stored_side=16)], pairs=PairArrays(["xa", "xb"], "auto")
    )
    betons = held_out.write_betons(Path("."), bundle, collected)
    opened = open_fold(parse_command(arguments), 0).val
    order = np.argsort(opened.index)[np.searchsorted(np.sort(opened.index), collected.index)]
    for written, converted in ((betons[16], opened), (betons[16].second, opened.second)):
        assert all(np.array_equal(written.row(k), converted.row(int(row))) for k, row in enumerate(order))


def test_arrays_of_pairs_are_those_of_the_training_file():
    numbers = np.zeros((6, 8, 8), np.uint8)
    np.savez("pairs.npz", b=numbers, a=numbers, y=np.arange(6) % 2)
    np.savez("single.npz", a=numbers, y=np.arange(6) % 2)

    def arrays(*arguments: str) -> list[str]:
        return sources.pair_arrays(load(None, list(arguments)))

    assert arrays("data.root=pairs.npz") == ["a", "b"]
    assert arrays("data.root=pairs.npz", "data.arrays=[b,a,y]") == ["b", "a"]
    assert arrays("data.root=single.npz") == arrays("data.root=photos") == []
    assert arrays("data.root=lost.npz", "data.form=arrays") == []
    with pytest.raises(
        InputError, match=r"lost.npz: no such file; it is needed to tell pairs from single images"
    ):
        arrays("data.root=lost.npz")


@pytest.fixture
def coloured(repo: Path) -> schema.Recipe:
    """Pairs whose first images are shades of red and second ones of blue, converted; data.workers=0."""
    Path("data/pairs").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, rows in (("train", 24), ("val", 12)):
        red, blue = np.zeros((2, rows, 16, 16, 3), np.uint8)
        red[..., 0], blue[..., 2] = rng.integers(150, 256, (2, rows, 16, 16))
        np.savez(f"data/pairs/{split}.npz", xa=red, xb=blue, y=np.arange(rows) % 2)
    arguments = [str(repo / "recipes/pairs_small.yaml"), *SMALL, "data.store=raw", "data.workers=0"]
    convert.main(arguments)
    return parse_command(arguments)


def red_and_blue(images: np.ndarray) -> bool:
    """True if all images (B, h, 2w, 3) are red in the left half and blue in the right half."""
    red, blue = np.split(np.asarray(images, int), 2, axis=2)
    return bool(
        (red[..., 0] > 100).all() and (blue[..., 2] > 100).all()
        and (red[..., 1:] < 50).all() and (blue[..., :2] < 50).all()
    )  # fmt: skip


def random_checkpoint(recipe: schema.Recipe, kind: str, seed: int = 0) -> Path:
    """Save a checkpoint of the recipe's network with random weights."""
    fold = open_fold(recipe, 0)
    spec = NetworkSpec.from_recipe(recipe, 2)
    seeding.seed_all(seed)
    meta = member_meta(
        spec, kind=kind, resize_factor=1.0, stored_side=16, class_ids=tuple(fold.classes.ids),
        class_hash=fold.classes.hash, class_counts=(12, 12), folds_hash=fold.folds.hash,
    )  # fmt: skip
    path = Run(exp="pairs", backbone=recipe.model.backbone, fold=0, seed=42).checkpoint_path(kind, 1, 0.5)
    save_member(path, dict(build_network(spec).state_dict()), meta)
    return path


@pytest.fixture
def inputs(monkeypatch) -> list[np.ndarray]:
    """A list that collects the inputs of all networks from now on, each (B, h, 2w, 3) in 0..255."""
    collected: list[np.ndarray] = []
    original = Network.forward

    def forward(self, images):
        collected.append(images.detach().permute(0, 2, 3, 1).numpy().copy())
        return original(self, images)

    monkeypatch.setattr(Network, "forward", forward)
    return collected


@pytest.fixture
def threads(monkeypatch) -> set[int]:
    """A set that collects the thread counts requested for decoding; 0 means all cores."""
    requested: set[int] = set()
    monkeypatch.setattr(kernel, "cores", lambda threads, processes=1: requested.add(threads) or 2)
    return requested


def test_batch_norm_of_a_soup_is_estimated_from_both_images(coloured, inputs, threads):
    first = random_checkpoint(coloured, "best_clean")
    member, other = load_member(first), first.with_name("other.pth")
    save_member(other, {name: tensor + 1 for name, tensor in member.tensors.items()}, member.meta)
    soups.average_checkpoints(
        first.with_name("averaged.pth"), [first, other], recipe=coloured, fold=0, device=torch.device("cpu")
    )
    assert sum(map(len, inputs)) == 24 and threads == {0}
    assert all(images.shape[1:] == (16, 32, 3) and red_and_blue(images) for images in inputs)


def test_grad_cam_reads_both_images_and_has_a_map_of_each(coloured, inputs, threads):
    path = random_checkpoint(coloured, "best_clean")
    member = inference.predict(path, coloured, torch.device("cpu"))
    rows = [mistakes.image_scores(member, scores.softmax(member.logits), row=row) for row in range(4)]
    inputs.clear(), threads.clear()
    analysis = replace(mistakes.error_analysis(member, 1.0), mistakes=rows[:2], right=rows[2:])
    gradcam.write_gradcam(
        Path("gradcam"), [member], analysis=analysis, settings=coloured, device=torch.device("cpu")
    )
    assert inputs and all(images.shape[1:] == (16, 32, 3) and red_and_blue(images) for images in inputs)
    assert threads == {0}
    files = list(Path("gradcam").glob("*.jpg"))
    assert len(files) >= 4
    for file in files:
        with Image.open(file) as picture:
            side = (
                image_files.THUMBNAIL_SIDE
            )  # the pair, and below it its map; of a second target the map alone
            assert picture.size in ((2 * side, 2 * side), (2 * side, side))


@pytest.mark.parametrize("side", [0, 1])
def test_the_maps_of_a_pair_follow_the_formula_for_each_image(side):
    """If the score depends on one image only, its half is Grad-CAM of the trunk and the other half is 0."""
    network = CompareNet([1, 1, 1], "concat", cbam=False, width=0.25).eval()
    pairs = torch.rand(2, 3, 32, 64)
    weight = torch.randn(FEATURES)
    score = torch.nn.Linear(2 * FEATURES, 1, bias=False)
    score.weight.data = torch.cat([weight * (side == 0), weight * (side == 1)])[None]
    classifier = torch.nn.Sequential()
    classifier.backbone, classifier.head = network, score
    got = np.split(gradcam.attribute(classifier, pairs, torch.zeros(2, dtype=torch.int64)), 2, axis=2)
    maps = network.stages(network.stem(pairs.chunk(2, 3)[side])).detach().requires_grad_()
    (network.features(maps.mean((2, 3))) @ weight).sum().backward()
    coarse = (maps.grad.mean((2, 3), keepdim=True) * maps.detach()).sum(1, keepdim=True).relu()
    fine = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear")[:, 0].numpy()
    assert (fine.sum((1, 2)) > 0).any()
    np.testing.assert_allclose(
        got[side], fine / np.maximum(fine.sum((1, 2), keepdims=True), 1e-12), atol=1e-6
    )
    assert not got[1 - side].any()


def test_each_image_of_a_pair_has_a_border():
    inside = np.zeros((1, 64, 128))
    inside[:, 30:34, 30:34] = 1
    seam = np.zeros((1, 64, 128))
    seam[:, 30:34, 62:66] = 1
    assert gradcam.border_fraction(np.concatenate([inside, seam]), 2).tolist() == [0, 1]
    assert gradcam.border_fraction(np.ones((1, 64, 128)), 2)[0] == pytest.approx(gradcam.EVEN)


def test_the_report_shows_both_images(coloured):
    fold = open_fold(coloured, 0)
    squares = thumbnails.centre_squares(fold.val, np.arange(12))
    assert squares.shape == (
        12,
        image_files.THUMBNAIL_SIDE,
        2 * image_files.THUMBNAIL_SIDE,
        3,
    ) and red_and_blue(squares)
    home = Path(coloured.data.home)
    (uri,) = thumbnails.thumbnails(home, fold.folds.hash, {0: {int(fold.val.index[0])}}).values()
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        assert picture.size == (2 * image_files.THUMBNAIL_SIDE, image_files.THUMBNAIL_SIDE)


@pytest.fixture
def first_rows(coloured) -> tuple[schema.Recipe, TrainLoader]:
    """A recipe with rotation and erasing, and a loader of the first eight training pairs."""
    strong = replace(coloured.aug, rotation_deg=30.0)
    recipe = replace(coloured, aug=strong, reg=replace(coloured.reg, erase_p=0.7))
    beton, crop = (
        open_fold(recipe, 0).train,
        Crop((0.9, 1.0), (strong.rrc_ratio[0], strong.rrc_ratio[1]), 0.0, swap=recipe.data.symmetric),
    )
    size, order = (lambda epoch: (16, 16)), (lambda epoch: np.arange(8))
    return recipe, TrainLoader(beton, order, seed=recipe.seed, batch=lambda epoch: 8, size=size, crop=crop)


def training_input(recipe: schema.Recipe, loader: TrainLoader) -> torch.Tensor:
    """The network's input for the loader's only batch, (B, 3, h, 2w)."""
    (batch,) = loader
    algorithm = DeviceAugment(recipe.aug, recipe.reg.erase_p, fill=FILL, pairs=True)
    device = types.SimpleNamespace(batch_to_device=lambda batch: batch)
    state = types.SimpleNamespace(batch=batch, device=device)
    algorithm.apply(Event.AFTER_DATALOADER, state, None)
    return state.batch["image"]


def test_the_augmented_pairs_of_the_report_equal_those_of_training(first_rows):
    recipe, loader = first_rows
    drawn = thumbnails.augmented_batch(loader.beton, np.arange(8), recipe=recipe, epoch=0, size=(16, 16))
    assert torch.equal(drawn, training_input(recipe, loader))
    panels = thumbnails.augmented(recipe, open_fold(recipe, 0).folds.hash, 0)
    for group in panels.groups:
        for image in group.images:
            with Image.open(io.BytesIO(base64.b64decode(image.uri.partition(",")[2]))) as picture:
                assert picture.size == (2 * image_files.THUMBNAIL_SIDE, image_files.THUMBNAIL_SIDE), (
                    group.title
                )


def test_samples_of_pairs_are_what_evaluation_and_training_make_of_them(first_rows):
    recipe, loader = first_rows
    rows = samples.sample_rows(recipe, loader, num_classes=2, interpolation="bilinear", fill=FILL)
    evaluated = rows["as evaluated"]
    assert evaluated.shape == (8, 16, 32, 3) and red_and_blue(evaluated)
    (batch,) = EvalLoader(loader.beton, 24, size=lambda: (16, 16), factor=1.0, interpolation="bilinear")
    assert np.array_equal(evaluated, batch["image"][:8].numpy())
    assert np.array_equal(rows["as trained"], preview.to_uint8(training_input(recipe, loader)))
