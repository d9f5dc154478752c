"""Contenders of `bench step`: trainers that run one epoch whenever they are told to.

`python -m fastflower.bench.trainers NAME SETTINGS.json` builds a contender, prints "ready", and for each line on
standard input trains one epoch and prints its figures as JSON. The clock starts after the first step. Validation,
checkpoints and logs come after the figures and before the next "ready", so that the clock holds training steps and
the wait for batches only.

All contenders train with AdamW from random weights, one process, the same threads for computing and for loading, and
random resized crop and flip. All but the plain loop also mix (MixUp 0.2) and smooth labels (0.1), and all but that and
fastai average weights. timm's loop and the plain one run as they are usually started and in channels_last format.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastflower.bench import timm_networks
from fastflower.bench.step import SPLIT, Settings

SMOOTHING, MIXUP, EMA, LR = 0.1, 0.2, 0.999, 1e-3
SAME_AUGMENTATION = (  # as the other trainers: crop and flip by the loader, MixUp, smoothing, EMA
    *("aug.rotation_deg=0", "aug.jitter=[0,0,0,0]", "reg.erase_p=0", f"reg.mixup={MIXUP}", "reg.cutmix=0"),
    *("reg.mix_prob=1", f"reg.ls_eps={SMOOTHING}", "llrd.enabled=false"),
    *("sampler.type=none", f"ema.decay={EMA}"),
)


class Pace:
    """Starts epochs on command and prints their figures."""

    def __init__(self, settings: Settings) -> None:
        self.device = settings.device
        self.images = -1  # of the steps that count; -1: none has ended yet
        self.start = (0.0, 0.0)

    def wait(self) -> None:
        """Print "ready" and block until a line comes; the end of the input ends the process."""
        print("ready", flush=True)
        if not sys.stdin.readline():
            raise SystemExit(0)
        self.images = -1

    def step(self, images: int) -> None:
        """Count the images of a step that has ended; the first of an epoch fills the queues and starts the clock."""
        if self.images >= 0:
            self.images += images
            return
        self._synchronise()
        self.images, self.start = 0, (time.perf_counter(), _processor_seconds())

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def report(self) -> None:
        """Print the epoch's figures: images, wall and processor seconds, peak memory in MB."""
        self._synchronise()
        wall, processor = time.perf_counter() - self.start[0], _processor_seconds() - self.start[1]
        figures = {
            "images": self.images,
            "wall": wall,
            "processor": processor,
            "peak_mb": _peak_mb(self.device),
        }
        print(json.dumps(figures), flush=True)


def _processor_seconds() -> float:
    """Seconds that this process and its workers have computed, those that have ended included."""
    import psutil

    process = psutil.Process()
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def _peak_mb(device: str) -> float:
    """Peak GPU memory, or on a CPU the peak resident memory of this process and its workers."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    import psutil

    workers = sum(p.memory_info().rss for p in psutil.Process().children(recursive=True))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3 + workers / 1e6


def fastflower(
    settings: Settings, pace: Pace, *, words: tuple[str, ...] = (), resident: bool = False
) -> None:
    """The project's own training; `resident` feeds it the same batch from memory, without a loader."""
    import os

    from fastflower.callbacks.stop import Stop
    from fastflower.recipe import checks, parse_command
    from fastflower.recipe.derived import derive
    from fastflower.recipe.identity import identity
    from fastflower.training import build, fold_data, ranks

    os.chdir(settings.project)
    name = "_".join(["bench", settings.backbone, "resident" if resident else "fed", str(len(words))])
    recipe = parse_command([*recipe_words(settings), *words, f"exp.name={name}"])
    checks.check(recipe)
    machine = ranks.prepare(recipe)
    with ranks.lock_run(recipe, 0) as run, ranks.console(run) as console:
        console.write = lambda *_, **__: None  # type: ignore[method-assign]
        fold = fold_data.open_data(recipe, 0)
        fold_data.verify(fold)
        training = build.training(
            recipe, run, fold=fold, machine=machine, stop=Stop(), console=console,
            identity=identity(recipe, derive(recipe, 1), fold.data_identity()),
        )  # fmt: skip
        if resident:
            keep_resident(training.data.train)
        training.trainer.state.callbacks.insert(0, paced_callback(pace))
        training.trainer.fit()
        pace.wait()
        training.close()


def recipe_words(settings: Settings) -> list[str]:
    """The changes to the default recipe that make it the benchmark's configuration."""
    return [
        *(
            "data.root=data/train",
            "data.fold=0",
            *SPLIT,
            f"data.img_size={settings.size}",
            "data.size_epochs=auto",
        ),
        *(f"tta.scales=[{settings.size}]", f"data.workers={settings.threads}"),
        *(f"model.backbone={settings.backbone}", "model.pretrained=false", "opt.name=adamw", f"opt.lr={LR}"),
        *(f"train.batch_per_gpu={settings.batch}", "sched.warmup_epochs=0"),
        *(f"sched.cosine_epochs={settings.epochs}", "es.enabled=false", "log.tensorboard=false"),
    ]


def keep_resident(loader: Any) -> None:
    """Make a loader yield its first batch for ever, which costs neither decoding nor waiting."""
    first = {name: column.clone() for name, column in next(iter(loader)).items()}
    loader.batches = lambda epoch, start: iter([first] * (loader.steps(epoch) - start))


def paced_callback(pace: Pace) -> Any:
    """A Composer callback that waits before each epoch and reports after its last step."""
    from composer.core import Callback

    class Paced(Callback):
        def epoch_start(self, state: Any, logger: Any) -> None:
            pace.wait()

        def batch_end(self, state: Any, logger: Any) -> None:
            pace.step(len(state.batch["image"] if isinstance(state.batch, dict) else state.batch[0]))

        def epoch_end(self, state: Any, logger: Any) -> None:
            pace.report()

    return Paced()


def stock(settings: Settings, pace: Pace) -> None:
    """Composer's Trainer and algorithms, fed by FFCV's loader on its own beton of at most 512 pixels."""
    import numpy as np
    from composer import Trainer
    from composer.algorithms import EMA as ComposerEma
    from composer.algorithms import LabelSmoothing, MixUp
    from composer.models import ComposerClassifier
    from ffcv.fields.decoders import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, Squeeze, ToTensor, ToTorchImage

    network, mean, std = timm_network(settings)
    loader = Loader(
        settings.ffcv, batch_size=settings.batch, num_workers=settings.threads, order=OrderOption.RANDOM,
        os_cache=True, drop_last=True,
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((settings.size, settings.size), (0.8, 1.0)),
                RandomHorizontalFlip(),
                NormalizeImage(255 * np.array(mean), 255 * np.array(std), np.dtype(np.float32)),
                ToTensor(),
                ToTorchImage(),
            ],
            "label": [IntDecoder(), ToTensor(), Squeeze()],
        },
    )  # fmt: skip
    Trainer(
        model=ComposerClassifier(network, num_classes=settings.classes),
        train_dataloader=loader,
        max_duration=f"{settings.epochs}ep",
        optimizers=torch.optim.AdamW(network.parameters(), LR),
        algorithms=[
            MixUp(alpha=MIXUP),
            LabelSmoothing(SMOOTHING),
            ComposerEma(half_life=None, smoothing=EMA, update_interval="1ba"),
        ],
        callbacks=[paced_callback(pace)],
        progress_bar=False,
        device="gpu" if settings.device == "cuda" else "cpu",
        precision="amp_bf16" if settings.device == "cuda" else "fp32",
    ).fit()
    pace.wait()


def timm_script(settings: Settings, pace: Pace, *, channels_last: bool = False, half: bool = False) -> None:
    """The parts and the order of timm's train script: its loader, Mixup, loss, optimizer and weight average."""
    from timm.data import Mixup, create_dataset, create_loader
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    network, mean, std = timm_network(settings, channels_last=channels_last)
    loader = create_loader(
        create_dataset("", root=f"{settings.project}/data/train", is_training=True),
        input_size=(3, settings.size, settings.size), batch_size=settings.batch, is_training=True, scale=(0.8, 1.0),
        color_jitter=None,  # type: ignore[arg-type]
        num_workers=settings.threads, mean=mean, std=std, device=torch.device(settings.device),
        use_prefetcher=settings.device == "cuda", persistent_workers=True,
    )  # fmt: skip
    mixup = Mixup(mixup_alpha=MIXUP, label_smoothing=SMOOTHING, num_classes=settings.classes)
    average = ModelEmaV3(network, decay=EMA)
    train_plainly(
        settings,
        pace,
        network=network,
        batches=loader,
        optimizer=create_optimizer_v2(network, opt="adamw", lr=LR),
        loss=SoftTargetCrossEntropy(),
        mix=mixup,
        channels_last=channels_last,
        half=half,
        after_step=lambda step: average.update(network, step=step),
    )


def plain(settings: Settings, pace: Pace, *, channels_last: bool = False) -> None:
    """Forty lines as in many contest entries: DataLoader, Pillow, torchvision's crop and flip, AdamW."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    network, mean, std = timm_network(settings, channels_last=channels_last)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(settings.size, (0.8, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    loader = DataLoader(
        datasets.ImageFolder(f"{settings.project}/data/train", transform),
        settings.batch, shuffle=True, drop_last=True, num_workers=settings.threads, persistent_workers=True,
        pin_memory=settings.device == "cuda",
    )  # fmt: skip
    train_plainly(
        settings,
        pace,
        network=network,
        batches=loader,
        optimizer=torch.optim.AdamW(network.parameters(), LR),
        loss=nn.CrossEntropyLoss(label_smoothing=SMOOTHING),
        channels_last=channels_last,
    )


def fastai(settings: Settings, pace: Pace) -> None:
    """fastai's Learner with its loader, Adam with decoupled decay, MixUp and gradient clipping; no weight average."""
    from fastai.callback.channelslast import ChannelsLast
    from fastai.callback.core import Callback
    from fastai.callback.mixup import MixUp
    from fastai.callback.training import GradientClip
    from fastai.data.transforms import Normalize
    from fastai.learner import Learner
    from fastai.losses import LabelSmoothingCrossEntropy
    from fastai.vision.augment import Flip, RandomResizedCrop
    from fastai.vision.data import ImageDataLoaders

    class Paced(Callback):
        def before_train(self) -> None:
            pace.wait()

        def after_batch(self) -> None:
            if self.training:
                pace.step(settings.batch)

        def after_train(self) -> None:
            pace.report()

    network, mean, std = timm_network(settings)
    batches = ImageDataLoaders.from_folder(
        f"{settings.project}/data/train", valid_pct=0.2, seed=0, bs=settings.batch, num_workers=settings.threads,
        device=torch.device(settings.device), item_tfms=RandomResizedCrop(settings.size, min_scale=0.8),
        batch_tfms=[Flip(), Normalize.from_stats(mean, std)],
    )  # fmt: skip
    learner = Learner(
        batches,
        network,
        loss_func=LabelSmoothingCrossEntropy(SMOOTHING),
        cbs=[MixUp(MIXUP), GradientClip(1.0), ChannelsLast(), Paced()],
    )
    if settings.device == "cuda":
        learner = learner.to_bf16()
    with learner.no_bar(), learner.no_logging():
        learner.fit(settings.epochs, LR)
    pace.wait()


def timm_network(
    settings: Settings, *, channels_last: bool = True
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """A network of timm on the device, and its mean and deviation."""
    torch.manual_seed(0)
    network: Any = timm_networks.create(settings.backbone, settings.size, num_classes=settings.classes)
    network = network.to(settings.device).to(memory_format=layout(channels_last=channels_last))
    return network, network.pretrained_cfg["mean"], network.pretrained_cfg["std"]


def layout(*, channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def train_plainly(
    settings: Settings,
    pace: Pace,
    *,
    network: nn.Module,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    loss: Callable[..., torch.Tensor],
    mix: Callable[..., Any] | None = None,
    after_step: Callable[[int], None] | None = None,
    channels_last: bool = False,
    half: bool = False,
) -> None:
    """The usual loop: forward (bf16 autocast on a GPU, and where `half` asks for it), backward, clip, step."""
    step, device, form = 0, settings.device, layout(channels_last=channels_last)
    for _ in range(settings.epochs):
        pace.wait()
        network.train()
        for images, labels in batches:
            images = images.to(device, non_blocking=True, memory_format=form)
            labels = labels.to(device, non_blocking=True)
            if mix is not None:
                images, labels = mix(images, labels)
            with torch.autocast(device, torch.bfloat16, enabled=half or device == "cuda"):
                value = loss(network(images), labels)
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            step += 1
            if after_step is not None:
                after_step(step)
            pace.step(len(images))
        pace.report()
    pace.wait()


def _ours(**options: Any) -> Callable[[Settings, Pace], None]:
    return lambda settings, pace: fastflower(settings, pace, **options)


TRAINERS: dict[str, Callable[[Settings, Pace], None]] = {
    "fastflower": _ours(),
    "resident": _ours(resident=True),
    "float32": _ours(words=("train.amp=false",)),
    "same": _ours(words=SAME_AUGMENTATION),
    "stock": stock,
    "timm": timm_script,
    "timm_channels_last": partial(timm_script, channels_last=True),
    "timm_bf16": partial(timm_script, channels_last=True, half=True),
    "fastai": fastai,
    "plain": plain,
    "plain_channels_last": partial(plain, channels_last=True),
}


if __name__ == "__main__":
    chosen = Settings(**json.loads(Path(sys.argv[2]).read_text()))
    torch.set_num_threads(chosen.threads)
    TRAINERS[sys.argv[1]](chosen, Pace(chosen))
