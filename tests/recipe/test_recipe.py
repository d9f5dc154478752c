"""The recipe schema against the flower contest's specification, and every way in which a recipe is refused."""

from __future__ import annotations

import ast
import difflib
import json
import os
import random
import re
from pathlib import Path

import pytest

from fastflower.core.errors import InputError
from fastflower.recipe import checks, derived, load, parse_command, schema, starting_point, to_yaml

# the keys that the specification names, with its defaults; None: it gives no default
SPECIFIED = {
    "seed": 42,
    "data.root": "data/train",
    "data.csv": "data/train_labels.csv",
    "data.image_col": "filename",
    "data.label_col": "category_id",
    "data.num_classes": "auto",
    "data.fold": None,
    "data.n_splits": 5,
    "data.img_size": [224, 320],
    "sampler.type": "weighted_en",
    "sampler.beta": 0.999,
    "sampler.oversample_cap": 3,
    "model.backbone": "convnextv2_base.fcmae_ft_in22k_in1k",
    "model.pretrained": True,
    "model.head": "linear",
    "model.margin": 0.3,
    "opt.name": "adamw",
    "opt.lr_ref": 2e-4,
    "opt.weight_decay": 0.05,
    "opt.momentum": None,
    "opt.clip_grad": None,
    "train.batch_per_gpu": 64,
    "train.world_size": 2,
    "train.grad_accum": 1,
    "train.amp": True,
    "train.clip_grad": 1.0,
    "sched.warmup_epochs": 5,
    "sched.cosine_epochs": 40,
    "llrd.enabled": True,
    "llrd.multipliers": [0.25, 0.5, 1.0, 1.5],
    "llrd.unfreeze_schedule": None,
    "reg.ls_eps": 0.05,
    "reg.mixup": 0.2,
    "reg.cutmix": 0.8,
    "reg.erase_p": 0.1,
    "ema.enabled": True,
    "ema.decay": 0.9999,
    "swa.enabled": False,
    "robust.enabled": True,
    "robust.kinds": ["gaussian_noise", "blur", "brightness", "jpeg", "occlusion"],
    "robust.level": "low",
    "es.enabled": True,
    "es.patience": 10,
    "es.min_delta": 0.001,
    "select.metric": "combo",
    "select.alpha": 0.7,
    "tta.scales": [320, 384],
    "tta.hflip": True,
    "ensembling.find_pattern": None,
    "ts.enabled": True,
    "cudnn.deterministic": True,
    "cudnn.benchmark": False,
}

# the recipe printed in the specification, indented with tabs
SPECIFIED_RECIPE = """\
seed: 42
data:
	root: data/train
	csv: data/train_labels.csv
	# 列名适配：
	image_col: filename
	label_col: category_id
	# 类别数自动从 CSV 推断（unique(label_col)）；如需强制指定可设置：
	num_classes: auto
	n_splits: 5
	img_size: [224, 320]   # 渐进分辨率序列
sampler:
	type: weighted_en       # {none, weighted_en, class_balanced}
	beta: 0.999
	oversample_cap: 3
model:
	backbone: convnextv2_base.fcmae_ft_in22k_in1k
	head: linear            # {linear, arcface, cosface}
	margin: 0.3
opt:
	name: adamw
	lr_ref: 2.0e-4
	weight_decay: 0.05
train:
	batch_per_gpu: 64
	world_size: 2
	grad_accum: 1
	amp: true
	clip_grad: 1.0
sched:
	warmup_epochs: 5
	cosine_epochs: 40
llrd:
	enabled: true
	multipliers: [0.25, 0.5, 1.0, 1.5]
reg:
	ls_eps: 0.05
	mixup: 0.2
	cutmix: 0.8
	erase_p: 0.1
ema:
	enabled: true
	decay: 0.9999
robust:
	enabled: true
	kinds: [gaussian_noise, blur, brightness, jpeg, occlusion]
	level: low
es:
	enabled: true
	patience: 10
	min_delta: 0.001
select:
	metric: combo
	alpha: 0.7
tta:
	scales: [320, 384]
	hflip: true
ts:
	enabled: true
"""

KEYS = [dotted for dotted, _, _ in schema.fields_of(schema.Recipe())]


def values(recipe: schema.Recipe) -> dict[str, object]:
    return {dotted: value for dotted, value, _ in schema.fields_of(recipe)}


def written(text: str | bytes, name: str = "mine.yaml") -> Path:
    path = Path(name)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(*changes: str, path: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load(path, list(changes))
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_every_specified_key_has_the_specified_default():
    defaults = values(load()) | starting_point.settled(load())  # `auto` and the value that it takes
    assert len(SPECIFIED) == 52
    assert {name: defaults[name] for name, value in SPECIFIED.items() if value is not None} == {
        name: value for name, value in SPECIFIED.items() if value is not None
    }
    assert set(SPECIFIED) <= set(defaults)


def test_the_specified_recipe_loads_with_spaces_and_changes_nothing():
    specified = load(written(SPECIFIED_RECIPE.replace("\t", "  ")))
    got = values(specified) | starting_point.settled(specified)
    want = values(load()) | starting_point.settled(load())
    assert got.pop("exp.name") == "mine"
    want.pop("exp.name")
    assert got == want


def test_the_specified_recipe_with_tabs_is_refused_by_line():
    assert re.search(
        r"mine\.yaml:3: indented with a tab; .* replace each tab by two",
        refused(path=written(SPECIFIED_RECIPE)),
    )


@pytest.mark.parametrize("name", ["convnext", "vit", "demo", "flowers17"])
def test_shipped_recipes_hold_together(repo, name):
    recipe = load(repo / "recipes" / f"{name}.yaml")
    assert recipe.exp.name == name
    for world in (1, 2):
        derived.derive(recipe, world)
    checks.check(recipe)


def test_convnext_has_the_defaults_and_vit_differs_in_the_backbone(repo):
    convnext, vit = (values(load(repo / "recipes" / f"{name}.yaml")) for name in ("convnext", "vit"))
    defaults = values(load())
    assert {k: v for k, v in convnext.items() if v != defaults[k]} == {"exp.name": "convnext"}
    assert vit["model.backbone"] == "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert {k for k in vit if vit[k] != convnext[k]} <= {"exp.name", "model.backbone", "model.drop_path"}


def test_yaml_of_a_recipe_is_the_recipe():
    recipe = load(None, ["opt.lr=1e-3", "data.img_size=[[32,64]]", "train.clip_grad=null", "exp.name=a"])
    assert values(load(written(to_yaml(recipe)))) == values(recipe)


def test_later_layers_win():
    written("opt: {lr_ref: 1e-3, momentum: 0.5}\nseed: 7\n", "base.yaml")
    path = written("base: base.yaml\nseed: 8\n")
    recipe = load(path, ["opt.momentum=0.1"])
    assert (recipe.opt.lr_ref, recipe.seed, recipe.opt.momentum, recipe.exp.name) == (1e-3, 8, 0.1, "mine")


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("opt.lr_ref=2e-4", 2e-4),  # plain PyYAML reads this as a string
        ("opt.lr_ref=1e-3", 1e-3),
        ("opt.lr=1", 1),
        ("sampler.rf_t=100", 100),
        ("sampler.oversample_cap=2", 2.0),
        ("train.amp=False", False),
        ("ema.enabled=false", False),
        ("data.root=/x/a=b,c", "/x/a=b,c"),
        ("train.clip_grad=null", None),
        ("tta.scales=[64]", [64]),
    ],
)
def test_changes_become_the_type_of_their_key(change, value):
    got = values(load(None, [change]))[change.partition("=")[0]]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("text", ["007", "1e3", "1_000", "on", "no", "false", "0x10", "1.50", "2026-11-30"])
def test_text_is_kept_as_it_is_written_where_yaml_reads_a_number_or_a_truth_value(text, tmp_path):
    words = [f"exp.name={text}", f"data.aux_cols=[{text},b]"]
    by_word = load(None, words)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"exp:\n  name: {text}\ndata: {{aux_cols: [{text}, b]}}\n")
    for recipe in (by_word, load(path), load(path, ["opt.lr=1e-3"])):
        assert recipe.exp.name == text and recipe.data.aux_cols == [text, "b"]
        path.write_text(to_yaml(recipe))
        assert load(path) == recipe
    assert load(None, [f"exp.name='{text}'"]).exp.name == text
    assert load(None, ["exp.name=b", "data.aux_cols=[1]", *words]) == by_word
    assert load(None, [f"exp.name={text}", "exp.name=b"]).exp.name == "b"


def test_a_byte_order_mark_is_no_key():
    assert load(written("\ufeffseed: 3\n")).seed == 3


def test_clip_grad_has_two_names():
    assert load(None, ["opt.clip_grad=2"]).train.clip_grad == 2.0
    assert load(None, ["opt.clip_grad=null"]).train.clip_grad is None
    assert load(None, ["opt.clip_grad=3", "train.clip_grad=3"]).train.clip_grad == 3.0
    assert "are the same key; give one" in refused("opt.clip_grad=3", "train.clip_grad=2")
    assert "are the same key" in refused("opt.clip_grad=null", "train.clip_grad=2")


def test_commands_take_one_file_and_changes():
    path = written("seed: 5\n")
    recipe = parse_command(["opt.momentum=0.2", str(path)])
    assert (recipe.seed, recipe.opt.momentum) == (5, 0.2)
    assert parse_command([]).exp.name == "default"
    with pytest.raises(InputError, match=r"got 2 recipe files \(a.yaml, b.yaml\)"):
        parse_command(["a.yaml", "b.yaml"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        ("- 1\n", "a recipe is a map of keys, got list"),
        (b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("base: mine.yaml\n", "form a circle"),
        ("base: mime.yaml\n", "did you mean"),
        ("lr: 1e-3\n", "unknown key lr; did you mean opt.lr?"),
        ("opt:\n", "opt is a section: it holds keys, as in opt.lr=1e-3"),
        ("seed: 1.5\n", "mine.yaml: seed = 1.5: must be a whole number"),
        ("data:\n  root: ???\n", "mine.yaml: data.root has no value yet; replace the ??? by one"),
    ],
)
def test_bad_files_are_refused_in_one_line(text, message):
    assert message in refused(path=written(text))


@pytest.mark.parametrize(
    "text",
    [
        "data: {arrays: " + 100_000 * "[" + 100_000 * "]" + "}",
        "a: " + 100_000 * "{a: ",
        100_000 * "- ",
        "a: &a [1]\n" + "b: [" + 100 * "*a, " + "]",
    ],
    ids=["lists", "maps", "items", "aliases"],
)
def test_deep_recipes_are_refused_before_they_are_built(text):
    assert "mine.yaml: not a recipe: more than 20" in refused(path=written(text))


def test_the_content_of_other_files_is_never_shown(tmp_path):
    secret = "root:x:0:0:secret:/root\nsecret: [secret\n"
    (tmp_path / "passwd").write_text(secret)
    link = tmp_path / "passwd.yaml"
    for content in (
        secret,
        "root:x:0:0:secret:/root\n",
        "root x secret: 1\n",
        "secret\n",
        "- secret\n",
        "'secret",
    ):
        link.write_text(content)
        for path in (written(f"base: {link}\n"), link):
            assert "secret" not in refused(path=path)
    for path in (written(f"base: {tmp_path / 'passwd'}\n"), tmp_path / "passwd"):
        assert "passwd: a recipe, or its base, is a file that ends in .yaml" in refused(path=path)
    os.mkfifo(tmp_path / "pipe.yaml")  # opening it would wait forever
    (tmp_path / "large.yaml").write_bytes(bytes(1_000_001))
    for name in ("pipe.yaml", "large.yaml"):
        assert f"{name}: a recipe is a file of at most 1000 kB" in refused(path=tmp_path / name)


def test_a_missing_recipe_names_the_nearest():
    written("seed: 1\n", "convnext.yaml")
    assert "did you mean" in refused(path=Path("convnet.yaml"))
    assert "convnext.yaml" in refused(path=Path("convnet.yaml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("=3", "a change is written key=value"),
        ("a b=3", "a change is written key=value"),
        ("data.img_size.0=3", "a change is written key=value"),
        ("opt.lrref=1", "unknown key opt.lrref; did you mean opt.lr_ref?"),
        ("patience=3", "did you mean"),
        ("learning_rate=1e-3", "unknown key learning_rate; did you mean opt.lr?"),
        ("T_max=40", "unknown key T_max; did you mean sched.cosine_epochs?"),
        ("use_semi_supervised=False", "did you mean semi.enabled?"),
        ("--lr=0.001", "got '--lr=0.001'; a change is written key=value, here opt.lr=0.001"),
        ("--wd=0.001", "a change is written key=value, such as opt.lr_ref=1e-4"),
        ("layers=3,3,3", "unknown key layers; did you mean model.backbone?"),
        ("opt=3", "opt=3: opt is a section: it holds keys, as in opt.lr=1e-3"),
        ("dta.root=x", "unknown key dta; did you mean data?"),
        ("optt.lr=1", "unknown key optt; did you mean opt?"),
        ("opt.lr_ref=abc", "opt.lr_ref = abc: must be a number"),
        ("opt.lr=abc", "opt.lr = abc: must be a number or auto"),
        ("sampler.type=balanced", "sampler.type = balanced: must be one of none, weighted_en"),
        ("sampler.type=clas_balanced", "did you mean class_balanced?"),
        ("sched.name=CosineAnnealingLR", "none; did you mean warmup_cosine with sched.warmup_epochs=0?"),
        ("sched.name=CosineAnnealingWithWarmupLR", "none; did you mean warmup_cosine?"),
        ("sched.name=ReduceLROnPlateau", "none; did you mean plateau?"),
        (
            "sched.name=null",
            "sched.name = null: must be one of warmup_cosine, plateau, cyclic, none; did you mean none?",
        ),
        ("loss.name=BCEWithLogitsLoss", "did you mean bce?"),
        ("width_mult=1.25", "unknown key width_mult; did you mean model.backbone?"),
        ("ema.enabled=maybe", "ema.enabled = maybe: must be true or false"),
        ("seed=null", "seed = null: must be a whole number"),
        ("tta.scales=320", "tta.scales: must be a list, each a whole number"),
        ("opt.clip_grad=x", "opt.clip_grad = x: must be a number or null"),
        ("opt.lr_ref=-1", "opt.lr_ref = -1: must be > 0"),
        ("opt.lr_ref=nan", "opt.lr_ref = nan: must be a number or auto"),
        ("opt.lr=.inf", "opt.lr = inf: must be finite"),
        ("sampler.rf_t=.nan", "sampler.rf_t = nan: must be finite"),
        ("data.mean=[0.5,.inf,0.5]", "must be finite"),
        ("ensembling.weights={a: .nan}", "ensembling.weights = {'a': nan}: must be finite"),
        ("train.clip_grad=-.inf", "train.clip_grad = -inf: must be finite"),
        ("seed=4294967296", "seed = 4294967296: must be >= 0 and <= 4294967295"),
        ("data.arrays=" + 100_000 * "[", "[: not a recipe: more than 20 lists and maps in each other"),
        ("model.drop_path=1", "must be >= 0 and < 1"),
        ("tta.scales=[320,1000000]", "must be >= 16 and <= 4096"),
        ("aug.rrc_scale=[0.5,2]", "aug.rrc_scale = [0.5, 2.0]"),
        ("exp.name=../x", "it names folders"),
        ("data.root={a", "data.root={a"),
        ("opt.lr=???", "opt.lr=???: opt.lr has no value yet; replace the ??? by one, or remove the key"),
        ("exp.name=???", "exp.name has no value yet"),
        ("opt=???", "opt has no value yet"),
    ],
)
def test_bad_changes_are_refused_in_one_line(change, message):
    assert message in refused(change)


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            (name, "reserved")
            for name in ("bundle", "Bundle", "pretrained_model", "submission.csv", "compare.html")
        ),
        *(
            (name, "letters, digits")
            for name in (".", "..", "a/b", "../x", "a b", "a\x1b[31m", "a\nb", "-x", ".x")
        ),
        *((name, "200 bytes or less, has 300") for name in (300 * "n", 150 * "\u00e9")),
        ("mine.yaml", "must not end in .yaml"),
    ],
)
def test_names_that_no_folder_can_have_are_refused(name, message):
    text = refused("exp.name=" + json.dumps(name))
    assert text.startswith("exp.name = ") and message in text and text.isprintable() and len(text) < 220


def test_the_name_of_a_recipe_file_obeys_the_same_rule(tmp_path):
    (tmp_path / "bundle.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match=r"^exp.name = bundle: .*reserved.*set exp.name"):
        load(tmp_path / "bundle.yaml")
    assert load(tmp_path / "bundle.yaml", ["exp.name=" + 200 * "n"]).exp.name == 200 * "n"


@pytest.mark.parametrize("dotted", KEYS)
def test_no_typo_passes_and_the_real_key_is_named(dotted):
    rng = random.Random(dotted)
    section, _, name = dotted.rpartition(".")
    for _ in range(2):
        position = rng.randrange(len(name))
        start, end = name[:position], name[position:]
        typo = rng.choice([start + end[1:], start + "x" + end, name + "s"])
        wrong = f"{section}.{typo}" if section else typo
        if wrong in KEYS or not re.fullmatch(r"[A-Za-z_]\w*", typo) or wrong in vars(schema.Recipe()):
            continue
        message = refused(f"{wrong}=1")
        assert f"unknown key {wrong}" in message
        if len(name) > 4:
            hint = re.search(r"did you mean (\S+)\?", message)
            assert hint, message
            assert _similarity(hint[1], wrong) >= _similarity(dotted, wrong)


@pytest.mark.parametrize("dotted", KEYS)
def test_no_value_out_of_its_limits_passes(dotted):
    spec = {name: spec for name, _, spec in schema.fields_of(schema.Recipe())}[dotted]
    default = values(load())[dotted]
    wrap = "{0}={1}" if not isinstance(default, list) else "{0}=[{1}]"
    for name, outside in (("gt", 0), ("ge", -1), ("lt", 0), ("le", 1)):
        if name in spec.metadata:
            message = refused(wrap.format(dotted, spec.metadata[name] + outside))
            assert f"{dotted} = " in message
            assert "must be" in message


def test_every_key_has_a_meaning():
    assert all(spec.metadata["doc"] for _, _, spec in schema.fields_of(schema.Recipe()))


def _dotted_reads(path: Path) -> set[str]:
    """Every `section.name` that a file reads as attributes of any object."""
    reads = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            if isinstance(owner, ast.Attribute):
                reads.add(f"{owner.attr}.{node.attr}")
            elif isinstance(owner, ast.Name):
                reads.add(f"{owner.id}.{node.attr}")
    return reads


def test_every_key_is_read_by_the_program(repo):
    """A key that nothing reads would be an option without effect; opt.clip_grad is an alias that `load` resolves."""
    defining = {repo / "fastflower/recipe" / name for name in ("schema.py", "load.py")}
    files = [path for path in (repo / "fastflower").rglob("*.py") if path not in defining]
    reads = set().union(*(_dotted_reads(path) for path in files))
    names = {".".join(f"recipe.{name}".split(".")[-2:]) for name in KEYS}
    assert sorted(names - reads - {"opt.clip_grad"}) == []


def test_a_recipe_from_scratch_refuses_any_other_start(repo):
    food = repo / "recipes/food_fixmatch.yaml"
    checks.check(load(food))
    with pytest.raises(
        InputError, match=r"model.pretrained = true: this recipe trains from scratch .*; set model"
    ):
        checks.check(load(food, ["model.pretrained=true"]))
    with pytest.raises(InputError, match=r"model.init = other: this recipe trains from scratch"):
        checks.check(load(food, ["model.init=other"]))
    checks.check(load(food, ["model.pretrained=true", "checks.from_scratch=false"]))
