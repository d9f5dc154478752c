"""Fingerprint of a checkout's behaviour, to show that a refactor changed none of it.

    python tests/support/fingerprint.py [recipe.yaml ...]

Run it in the root of each of two checkouts, on one machine, after `make demo` and `convert` of each recipe named; the
two outputs must be equal. It prints, as JSON: the SHA-256 of the first ten training batches of each recipe on one
rank and on both of two, before and after augmentation; the demo's events without its times; its scores on held-out
images; and the tables that the predictor wrote.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastflower.core import runs
from fastflower.data.betons.fold_set import open_fold
from fastflower.data.transforms.augment import augment
from fastflower.recipe import load
from fastflower.recipe.derived import derive
from fastflower.training.fold_data import Position, loaders
from fastflower.training.ranks import Machine

BATCHES = 10
CLOCK_FIELDS = {
    *(
        "time",
        "seconds",
        "total_seconds",
        "eval_seconds",
        "saving_seconds",
        "images_per_s",
        "wait_share",
        "wait",
    ),
}


def batch_digest(path: Path, *, rank: int, world: int) -> str:
    """SHA-256 over the first ten batches of a rank, as loaded and as augmented on the CPU."""
    recipe = load(path)
    machine = Machine(device="cpu", world=world, rank=rank, precision="fp32", nondeterministic=[])
    data = loaders(
        recipe,
        derive(recipe, world),
        position=Position(),
        fold=open_fold(recipe, 0),
        interpolation="bicubic",
        machine=machine,
    )
    total = hashlib.sha256()
    for batch in itertools.islice(iter(data.train), BATCHES):
        for name in sorted(batch):
            total.update(name.encode() + batch[name].numpy().tobytes())
        fill = torch.tensor([124.0, 116.0, 104.0])
        images = augment(batch["image"], batch["key"], aug=recipe.aug, erase_p=recipe.reg.erase_p, fill=fill)
        total.update(images.contiguous().numpy().tobytes())
    data.close()
    return total.hexdigest()


def events(exp: str) -> str:
    """SHA-256 of an experiment's events without the fields that a clock decides."""
    rows = runs.read_events(runs.RESULTS / exp / "events.jsonl", [])
    return hashlib.sha256(
        json.dumps([without_times(row) for row in rows], sort_keys=True).encode()
    ).hexdigest()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(item) for name, item in value.items() if name not in CLOCK_FIELDS}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def main(paths: list[str]) -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for path in paths:
        result[path] = [batch_digest(Path(path), rank=k, world=n) for n in (1, 2) for k in range(n)]
    folder = runs.RESULTS / "demo"
    if folder.is_dir():
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        tables = (runs.SUBMISSION, folder / "submission_disturbed.csv")
        result["demo"] = {
            "events": events("demo"),
            "scores": [summary["clean_top1"], summary["corrupted_top1"], summary["held_out"]],
            "tables": [hashlib.sha256(table.read_bytes()).hexdigest() for table in tables],
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:] or ["recipes/demo.yaml"])
