"""Features of a frozen backbone, computed once: of fixed views of the training images, and of the images that score.

Each view is one sealed file, data.home/features/<name>.pth. Its name is a digest of all that decides its content: the
images, the view, the backbone's weights and the versions. So other heads, learning rates and seeds of the same data
find it, and nothing stale is ever read. The folder may be deleted at any time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from composer.utils import dist
from torch import Tensor

from fastflower import __version__
from fastflower.core import checkpoint, files, own_parts, seeding, workers
from fastflower.core.errors import InputError
from fastflower.core.files import digest
from fastflower.data.betons.beton_file import Beton
from fastflower.data.betons.fold_set import FoldSet
from fastflower.data.decode.kernel import Crop
from fastflower.data.loaders import eval_images, train_images
from fastflower.data.transforms.augment import augment
from fastflower.data.unlabelled import labelled_rows
from fastflower.model.classifier import float_images
from fastflower.model.heads import NeighboursHead
from fastflower.model.network import Network, NetworkSpec
from fastflower.recipe import Recipe
from fastflower.recipe.derived import eval_factor, image_sizes
from fastflower.training.fold_data import Loaders, augmentation
from fastflower.training.ranks import Machine

VIEW_STREAM = 1091  # of random numbers, for the view of a draw

Pixels = Callable[[np.ndarray], Tensor]  # rows (B,) -> uint8 (B, H, W, 3) or float (B, 3, H, W)


@dataclass(frozen=True)
class View:
    """The same view of each of `rows` (N,) of a beton: their pixels, and the settings that decide these."""

    beton: Beton
    rows: np.ndarray
    pixels: Pixels
    settings: dict[str, Any]


class FrozenFeatures:
    """Gives a fold's loaders the features of a frozen network in the place of images, and fills a k-NN head.

    State: the digest of the backbone's weights, so that a run resumes on the features that it began with.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        network: Network,
        spec: NetworkSpec,
        machine: Machine,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.network, self.spec, self.machine, self.say = recipe, network, spec, machine, say
        self.weights = weights_digest(network)
        self.folder = Path(recipe.data.home) / "features"
        self.threads = workers.cores(recipe.data.workers, machine.world)

    def use(self, data: Loaders, fold: FoldSet) -> str:
        """Compute or read the features of all images that `data` loads; returns a line for people."""
        start, rows = time.perf_counter(), labelled_rows(self.recipe, fold)
        views = [
            self._features(view, f"training images, view {number} of {self.recipe.model.frozen_views}")
            for number, view in enumerate(self._training_views(fold.train, rows), 1)
        ]
        data.train.features = partial(draw_views, torch.stack(views), positions(rows, fold.train.rows))
        scored = 0
        for label, loader in data.evaluation.items():
            features = self._features(self._evaluation_view(loader.beton, loader.rows), f"{label} images")
            loader.features = partial(of_rows, features, positions(loader.rows, loader.beton.rows))
            scored += len(loader.rows)
        if isinstance(self.network.head, NeighboursHead):
            labels = torch.from_numpy(fold.train.labels[rows])
            self.network.head.remember(views[0], labels)
        count, width = views[0].shape
        bytes_held = 4 * width * (len(views) * count + scored)
        return (
            f"frozen features: {len(views)} x {count} training and {scored} scored images, {width} numbers each, "
            f"{bytes_held / 1e6:.1f} MB in memory, from {self.folder} in {time.perf_counter() - start:.1f} s"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["weights"] != self.weights:
            raise InputError(
                f"model.backbone = {self.spec.backbone}: its weights are no longer those with which this run computed "
                "its features; restore the file of weights, or choose another exp.name"
            )

    def _training_views(self, beton: Beton, rows: np.ndarray) -> Iterator[View]:
        """The evaluation view of the training images, then the augmented ones."""
        yield self._evaluation_view(beton, rows)
        recipe = self.recipe
        (size,), crop = image_sizes(recipe), Crop.of(recipe)
        options = augmentation(recipe, self.spec.fill, beton)
        for number in range(1, recipe.model.frozen_views):

            def pixels(chunk: np.ndarray, number: int = number) -> Tensor:
                keys = seeding.row_keys(recipe.seed, number, positions=chunk, rows=chunk)
                images = train_images(beton, chunk, keys=keys, size=size, crop=crop, threads=self.threads)
                return augment(
                    images.to(self.machine.torch_device), torch.from_numpy(keys.view(np.int64)), **options
                )

            settings = {
                "view": number, "seed": recipe.seed, "size": size, "crop": asdict(crop), "aug": asdict(recipe.aug),
                "erase_p": recipe.reg.erase_p,
                "sources": [own_parts.source_digest("aug.extra", name) for name in recipe.aug.extra],
            }  # fmt: skip
            yield View(beton, rows, pixels, settings)

    def _evaluation_view(self, beton: Beton, rows: np.ndarray) -> View:
        (size,), factor = image_sizes(self.recipe), eval_factor(self.recipe)
        pixels = partial(
            eval_images,
            beton,
            size=size,
            factor=factor,
            interpolation=self.spec.interpolation,
            threads=self.threads,
        )
        settings = {"size": size, "factor": factor, "interpolation": self.spec.interpolation}
        return View(beton, rows, pixels, settings)

    def _features(self, view: View, what: str) -> Tensor:
        """The features (N, F) of a view, float32 on the CPU: read where every rank has them, else computed."""
        meta = self._description(view)
        path = self.folder / f"{digest(json.dumps(meta, sort_keys=True))}.pth"
        kept = self._read(path, meta)
        if all(dist.all_gather_object(kept is not None)) and kept is not None:
            return kept
        start, (world, rank) = time.perf_counter(), (self.machine.world, self.machine.rank)
        rows = view.rows[rank::world]
        # a rank without rows computes one as well, for the shape of a feature
        own = self._compute(view.pixels, rows if len(rows) else view.rows[:1])[: len(rows)]
        features = own.new_empty(len(view.rows), own.shape[1])
        for number, part in enumerate(dist.all_gather_object(own)):
            features[number::world] = part
        if rank == 0:
            self._write(path, features, meta)
        self.say(f"  features of {len(view.rows)} {what}: {time.perf_counter() - start:.1f} s")
        return features

    def _description(self, view: View) -> dict[str, Any]:
        """All that decides the features of a view, as JSON takes it."""
        manifest = view.beton.manifest
        values = {
            "fastflower": __version__,
            "libraries": [torch.__version__, timm.__version__],
            "device": self.machine.device,
            "backbone": self.spec.backbone,
            "source": own_parts.source_digest("model.backbone", self.spec.backbone)
            if own_parts.is_own(self.spec.backbone)
            else "",
            "weights": self.weights,
            "mean": self.spec.mean,
            "std": self.spec.std,
            "images": digest(str(manifest.head_crc), manifest.crc, str(manifest.images_per_row)),
            "rows": digest(np.ascontiguousarray(view.rows, np.int64).tobytes()),
            **view.settings,
        }
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    def _read(self, path: Path, meta: dict[str, Any]) -> Tensor | None:
        """The features in a file; None where there is none, or a damaged one, which is computed again."""
        if not path.is_file():
            return None
        try:
            content = checkpoint.load(path)
        except InputError as error:
            self.say(f"WARNING {error}; its features are computed again")
            return None
        return content.tensors["features"] if content.meta == meta else None

    def _write(self, path: Path, features: Tensor, meta: dict[str, Any]) -> None:
        """Keep features for the next run; without room for them this run goes on."""
        try:
            files.remove_abandoned(self.folder)
            checkpoint.save(path, {"features": features}, meta)
        except OSError as error:
            self.say(
                f"WARNING {path}: not kept for other runs ({error.strerror}); this run has them in memory"
            )

    @torch.no_grad()
    def _compute(self, pixels: Pixels, rows: np.ndarray) -> Tensor:
        """The features (N, F) of rows, in float32, reading each batch while the one before is computed."""
        batch = self.recipe.eval.batch or self.recipe.train.batch_per_gpu
        chunks = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        parts = []
        self.network.eval()
        with ThreadPoolExecutor(1) as reader:
            waiting = [reader.submit(pixels, chunk) for chunk in chunks[:1]]
            for position in range(len(chunks)):
                images = waiting.pop().result()
                waiting = [reader.submit(pixels, chunk) for chunk in chunks[position + 1 : position + 2]]
                parts.append(self._forward(images.to(self.machine.torch_device)).cpu())
        return torch.cat(parts)

    def _forward(self, images: Tensor) -> Tensor:
        """The features of a batch, in halves where the memory of the device is short."""
        try:
            return self.network.features(float_images({"image": images})).float()
        except torch.OutOfMemoryError:
            if len(images) == 1:
                raise
        torch.cuda.empty_cache()
        return torch.cat([self._forward(part) for part in images.chunk(2)])


def draw_views(features: Tensor, position: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> Tensor:
    """The features (B, F) of rows, each in the view of `features` (V, N, F) that its key draws."""
    views = (seeding.uniform(keys, VIEW_STREAM) * len(features)).astype(np.int64)
    return features[torch.from_numpy(views), torch.from_numpy(position[rows])]


def of_rows(features: Tensor, position: np.ndarray, rows: np.ndarray) -> Tensor:
    """The features (B, F) of rows of a beton."""
    return features[torch.from_numpy(position[rows])]


def positions(rows: np.ndarray, count: int) -> np.ndarray:
    """The position of each row of a beton among `rows`, -1 for others: int64 (count,)."""
    position = np.full(count, -1, np.int64)
    position[rows] = np.arange(len(rows))
    return position


def weights_digest(network: Network) -> str:
    """A digest of the backbone's weights and statistics."""
    tensors = network.backbone.state_dict()
    parts = (tensor.detach().cpu().contiguous().view(-1) for tensor in tensors.values())
    return digest(*tensors, *(digest(part.numpy().tobytes()) for part in parts))
