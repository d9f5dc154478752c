"""The archive to hand in: code/ and the bundle, and the records that explain and repeat the training.

training/ holds REPRODUCE.md and, for each experiment of the members, recipe, environment, folds, classes, logs and
scores, as far as bundle.max_mb allows.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastflower import __version__
from fastflower.bundle.tracing import CODE
from fastflower.core import runs
from fastflower.core.files import remove_abandoned, replacing
from fastflower.model.member import MemberMeta
from fastflower.recipe import Recipe

FOLDER = "training"
README = "REPRODUCE.md"
MEMBER_BYTES = 200  # of an entry's headers, at most


def training_records(
    recipe: Recipe, members: Sequence[tuple[Path, MemberMeta]]
) -> tuple[dict[str, bytes], list[str]]:
    """The files of training/ by name, and the names of those that bundle.max_mb has no room for.

    The most needed come first: the explanation, recipes, scores, environments, folds, then logs.
    """
    found: list[tuple[int, str, Path]] = []
    for exp in sorted({meta.exp for _, meta in members}):
        results = runs.RESULTS / exp
        patterns: tuple[str, ...] = (
            "meta/recipe.yaml",
            "meta/**/recipe.yaml",
            "scores.json",
            "temperature.json",
            "ensemble.json",
        )
        patterns += ("meta/**/*.json", "meta/*.csv", "reports/*.csv", "events.jsonl")
        files = [
            (rank, path) for rank, pattern in enumerate(patterns) for path in sorted(results.glob(pattern))
        ]
        files += [(len(patterns), path) for path in sorted((runs.MODELS / exp).glob("train_*.log"))]
        seen: set[Path] = set()
        for rank, path in files:
            if path not in seen and path.is_file():
                seen.add(path)
                found.append((rank, Path(*path.parts[2:]).as_posix(), path))  # from the experiment's name on
    budget = recipe.bundle.max_mb * 1e6 - sum(path.stat().st_size + MEMBER_BYTES for path in _hand_in())
    records, omitted = {README: reproduce(recipe, members).encode()}, []
    budget -= len(records[README]) + MEMBER_BYTES
    for _, name, path in sorted(found, key=lambda entry: entry[:2]):
        content = path.read_bytes()
        budget -= (cost := len(content) + MEMBER_BYTES)
        if budget < 0:
            budget += cost
            omitted.append(name)
        else:
            records[name] = content
    return records, omitted


def reproduce(recipe: Recipe, members: Sequence[tuple[Path, MemberMeta]]) -> str:
    """The text of REPRODUCE.md: what the hand-in holds, and the commands that make it again."""
    text = io.StringIO()
    exps = sorted({meta.exp for _, meta in members})
    text.write(
        f"# How this hand-in was made\n\nBy fastflower {__version__}. `code/predict.py` needs torch, NumPy and Pillow; "
        "it opens no network connection:\n\n"
        "```\npython code/predict.py test_dataset results/results/submission.csv\n```\n\n"
        "The members, whose predictions are averaged over views and members and divided by the temperature in "
        "bundle.json:\n\n"
        "| member | backbone | fold | seed | epoch | weights | clean top-1 of its fold |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
    )
    for path, meta in members:
        score = meta.scores.get(f"clean_{meta.weights}")
        shown = "-" if score is None else f"{score:.4f}"
        text.write(
            f"| {path.name} | {meta.backbone} | {meta.fold} | {meta.seed} | {meta.epoch} | {meta.weights} | {shown} |\n"
        )
    text.write(
        "\nTo train them again, install fastflower (`make setup`), put the images where the recipe says, and run, "
        "with the recipe of each run in `<experiment>/meta/<run>/<time>/`:\n\n```\n"
    )
    for exp in exps:
        used = [meta for _, meta in members if meta.exp == exp]
        folds, seeds = (sorted({getattr(meta, name) for meta in used}) for name in ("fold", "seed"))
        text.write(f"python -m fastflower.convert {FOLDER}/{exp}/meta/recipe.yaml\n")
        for backbone in sorted({meta.backbone for meta in used}):
            for seed in seeds:
                changes = f"model.backbone={backbone} seed={seed} data.fold={folds}".replace(", ", ",")
                text.write(f"python -m fastflower.train {FOLDER}/{exp}/meta/recipe.yaml {changes}\n")
        text.write(f"python -m fastflower.evaluate {FOLDER}/{exp}/meta/recipe.yaml\n")
    recipes = " ".join(f"{FOLDER}/{exp}/meta/recipe.yaml" for exp in exps)
    text.write(f"python -m fastflower.export {recipes}\n```\n\n")
    hashes = sorted({(meta.exp, meta.folds_hash, meta.class_hash) for _, meta in members})
    for exp, folds_hash, class_hash in hashes:
        text.write(
            f"- {exp}: folds {folds_hash}, classes {class_hash}; convert makes the same folds from the same images and "
            "seed, and `meta/folds.csv` has them with the SHA-256 of each image.\n"
        )
    pretrained = "pretrained weights of timm" if recipe.model.pretrained else "no pretrained weights"
    unlabelled = f", unlabelled images of {recipe.data.unlabelled}" if recipe.data.unlabelled else ""
    text.write(
        f"- Aids: {pretrained}, augmentation, views, ensemble of {len(members)} member(s){unlabelled}; "
        f"labelled images of {recipe.data.root} only.\n"
        "- Versions, devices, threads and the command line are in `versions.json` of each run. With another number of "
        "devices the last digits of scores differ.\n"
    )
    return text.getvalue()


def zip_hand_in(path: Path, top: str = "", records: Mapping[str, bytes] | None = None) -> None:
    """Write the archive, all inside a folder `top` when given; `records` are the files of training/.

    Equal content gives equal bytes. Nothing is compressed: weights do not get smaller.
    """
    remove_abandoned(path.parent, path.name)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for file in _hand_in():
            folder = Path("code") if file.parent == CODE else runs.BUNDLE
            with archive.open(_entry(top, folder / file.name), "w") as target, open(file, "rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)
        for name, content in (records or {}).items():
            archive.writestr(_entry(top, Path(FOLDER, name)), content)


def _hand_in() -> list[Path]:
    return [*sorted(CODE.glob("*.py")), *sorted(runs.BUNDLE.iterdir())]


def _entry(top: str, path: Path) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo((Path(top) / path).as_posix())
    entry.external_attr = 0o100644 << 16
    return entry
