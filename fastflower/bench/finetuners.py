"""Contenders of `bench accuracy`: each trains the recipe's backbone on one fold, and is scored at its last epoch.

`python -m fastflower.bench.finetuners TASK` trains the contender of a task and writes its outcome. All but fastflower
see the original photographs at the recipe's size and batch. The plain loop and timm have one learning rate and are
scored by the same centre crop; fastai and ultralytics have their own of both.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastflower.bench import timm_networks
from fastflower.bench.accuracy import Outcome, Task, photograph
from fastflower.core import runs
from fastflower.core.records import write_record
from fastflower.data.folds import Folds, read_folds
from fastflower.model.pretrained import find_weights
from fastflower.recipe import Recipe, derived, load

LR = 1e-3  # of AdamW for batches of 32: the value of recipes/finetune.yaml


class Job:
    """The images, sizes and weights of a task."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.recipe: Recipe = load(task.words[0], task.words[1:])
        self.folds: Folds = read_folds(Path(self.recipe.data.home) / "folds.csv")
        self.train = np.flatnonzero(self.folds.fold != task.fold)
        self.held_out = np.flatnonzero(self.folds.fold == task.fold)
        self.size = derived.image_sizes(self.recipe)[-1][0]
        self.batch = self.recipe.train.batch_per_gpu
        self.pretrained = self.recipe.model.pretrained
        self.weights = find_weights(self.recipe.model.backbone) if self.pretrained else None
        self.classes = int(self.folds.class_idx.max()) + 1
        self.overlay = {"file": str(self.weights)} if self.pretrained else {}  # of timm's configuration

    def path(self, row: int) -> Path:
        """The photograph in a row of folds.csv."""
        return photograph(self.recipe, self.folds, row)

    def network(self) -> nn.Module:
        """The backbone with a new head, as timm makes it."""
        return timm_networks.create(
            self.recipe.model.backbone,
            self.size,
            pretrained=self.pretrained,
            pretrained_cfg_overlay=self.overlay,
            num_classes=self.classes,
        )

    def predict(self, network: nn.Module) -> list[int]:
        """The class of each validation image: the short side to 1.14 times the size, then a centre crop."""
        from torchvision import transforms

        steps = [
            transforms.Resize(round(self.size * 1.14), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(self.size),
        ]
        pictures = Pictures(self, self.held_out, transforms.Compose([*steps, *to_tensor(network)]))
        loader = torch.utils.data.DataLoader(pictures, self.batch)
        network.eval()
        with torch.inference_mode():
            return [int(c) for images, _ in loader for c in network(images).argmax(1)]


class Pictures(torch.utils.data.Dataset):
    """The photographs of some rows, transformed, with their class indices."""

    def __init__(self, job: Job, rows: np.ndarray, transform: Callable[[Any], torch.Tensor]) -> None:
        self.job, self.rows, self.transform = job, rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        with Image.open(self.job.path(self.rows[item])) as image:
            return self.transform(image.convert("RGB")), int(self.job.folds.class_idx[self.rows[item]])


def to_tensor(network: nn.Module) -> list[Any]:
    """The last transforms of an image: to a tensor, and the network's normalisation."""
    from torchvision import transforms

    config: Any = network.pretrained_cfg
    return [transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])]


def fastflower(job: Job) -> list[int]:
    """The project's own training, with its average of the weights where the recipe has one."""
    from fastflower.evaluation import inference

    task = job.task
    name = f"{job.recipe.exp.name}-accuracy-{task.epochs}"
    words = [*task.words, f"exp.name={name}", f"data.fold={task.fold}", f"seed={task.seed}"]
    words += [f"sched.cosine_epochs={task.epochs}", f"eval.every={task.epochs}", "es.enabled=false"]
    importlib.import_module("fastflower.train").main(words)
    recipe = load(words[0], words[1:])
    pattern = "ema_best__*" if recipe.ema.enabled else "auto"
    (path,) = (
        path
        for path in runs.find_members(name, pattern, metric=recipe.select.metric)
        if f"__fold{task.fold}_seed{task.seed}_" in path.name
    )
    member = inference.predict(path, recipe, torch.device("cpu"))
    by_row = dict(zip(member.index.tolist(), member.single.argmax(1).tolist(), strict=True))
    return [by_row[row] for row in job.held_out.tolist()]


def plain(job: Job, layout: torch.memory_format = torch.contiguous_format) -> list[int]:
    """A plain loop: random crop and flip of torchvision, AdamW with a cosine schedule, cross-entropy."""
    from torchvision import transforms

    torch.manual_seed(job.task.seed)
    network = job.network().train().to(memory_format=layout)  # type: ignore[call-overload]
    low, high = job.recipe.aug.rrc_scale
    crop = transforms.RandomResizedCrop(
        job.size, (low, high), interpolation=transforms.InterpolationMode.BICUBIC
    )
    steps = [crop, transforms.RandomHorizontalFlip(), *to_tensor(network)]
    pictures = Pictures(job, job.train, transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(pictures, job.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(network.parameters(), LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, job.task.epochs * len(loader))
    for _ in range(job.task.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            logits = network(images.contiguous(memory_format=layout))
            nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
            schedule.step()
    return job.predict(network)


def link_photographs(job: Job, work: str) -> None:
    """Links in `work` to the photographs, as train/<class>/ and validation/<class>/."""
    for split, rows in (("train", job.train), ("validation", job.held_out)):
        for row in rows:
            folder = Path(work, split, f"{job.folds.class_idx[row]:05d}")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row}{job.path(row).suffix}").symlink_to(job.path(row))


def timm(job: Job) -> list[int]:
    """timm's train.py: the flags of its published fine-tunings, AdamW at the plain loop's rate, else its defaults."""
    with tempfile.TemporaryDirectory(prefix="fastflower-bench-") as work:
        link_photographs(job, work)
        subprocess.run([sys.executable, job.task.script, *timm_flags(job, work)], check=True)
        (saved,) = Path(work, "out").glob("*/last.pth.tar")
        network = job.network()
        network.load_state_dict(torch.load(saved, map_location="cpu", weights_only=False)["state_dict"])
    return job.predict(network)


def timm_flags(job: Job, work: str) -> list[str]:
    """The command line of train.py; from scratch without the rates that spare pretrained layers."""
    start = f"--pretrained --pretrained-path {job.weights} --layer-decay 0.8" if job.pretrained else ""
    text = f"""
        --data-dir {work} --output {work}/out --model {job.recipe.model.backbone} {start}
        --num-classes {job.classes} --img-size {job.size} -b {job.batch}
        --opt adamw --opt-eps 1e-6 --weight-decay 0.01 --lr {LR} --clip-grad 1.0
        --sched cosine --sched-on-updates --warmup-epochs 0 --epochs {job.task.epochs} --seed {job.task.seed}
        --device cpu --channels-last -j 1 --checkpoint-hist 1
    """
    return text.split()


def fastai(job: Job) -> list[int]:
    """fastai's fine_tune, or fit_one_cycle from scratch, with its defaults, cropped twice as its book shows."""
    from fastai.vision import all as vision

    vision.set_seed(job.task.seed)
    rows = [*job.train.tolist(), *job.held_out.tolist()]
    block = vision.DataBlock(
        blocks=(vision.ImageBlock, vision.CategoryBlock(vocab=list(range(job.classes)))),
        get_x=lambda row: job.path(row),  # of a method it would take the name for a transform
        get_y=lambda row: int(job.folds.class_idx[row]),
        splitter=vision.IndexSplitter(range(len(job.train), len(rows))),
        item_tfms=vision.Resize(job.size * 2),
        batch_tfms=vision.aug_transforms(size=job.size, min_scale=0.75),
    )
    loaders = block.dataloaders(rows, bs=job.batch, num_workers=0)
    learner = vision.vision_learner(
        loaders,
        job.recipe.model.backbone,
        metrics=vision.accuracy,
        pretrained=job.pretrained,
        pretrained_cfg_overlay=job.overlay,
    )
    if job.pretrained:
        learner.fine_tune(job.task.epochs - 1)  # after one epoch of the head alone
    else:
        learner.fit_one_cycle(job.task.epochs)
    probabilities, _ = learner.get_preds(dl=loaders.valid)
    return [int(c) for c in probabilities.argmax(1)]


def ultralytics(job: Job) -> list[int]:
    """Ultralytics classify with its defaults, its smallest network from random weights; its own last weights."""
    with tempfile.TemporaryDirectory(prefix="fastflower-bench-") as work:
        os.environ |= {"YOLO_CONFIG_DIR": work, "YOLO_OFFLINE": "true"}  # read when it is imported
        yolo = importlib.import_module("ultralytics").YOLO
        link_photographs(job, work)
        yolo("yolo11n-cls.yaml").train(
            data=work,
            epochs=job.task.epochs,
            imgsz=job.size,
            batch=job.batch,
            seed=job.task.seed,
            project=work,
            name="out",
            pretrained=False,
            device="cpu",
            workers=0,
            val=False,  # of each epoch; the last is scored below
            plots=False,
        )
        trained = yolo(Path(work, "out", "weights", "last.pt"))
        paths = [str(job.path(row)) for row in job.held_out]
        results = trained.predict(paths, imgsz=job.size, device="cpu", stream=True, verbose=False)
        return [int(result.names[result.probs.top1]) for result in results]  # named by link_photographs


CONTENDERS: dict[str, Callable[[Job], list[int]]] = {
    "fastflower": fastflower,
    "plain": plain,
    "channels_last": functools.partial(plain, layout=torch.channels_last),
    "timm": timm,
    "fastai": fastai,
    "ultralytics": ultralytics,
}


def main(argv: Sequence[str]) -> None:
    job = Job(Task(**json.loads(argv[0])))
    predicted = CONTENDERS[job.task.contender](job)
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    seconds = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    outcome = Outcome(job.held_out.tolist(), predicted, round(seconds, 1), job.task.recipe)
    write_record(Path(job.task.out), outcome)


if __name__ == "__main__":
    main(sys.argv[1:])
