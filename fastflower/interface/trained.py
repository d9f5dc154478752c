"""Trained models in Python: `fastflower.load(path)` gives an object that predicts as `python code/predict.py` does."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastflower.bundle.writer import PROGRAMS, crop_of
from fastflower.core import runs
from fastflower.core.errors import CorruptionError, InputError
from fastflower.evaluation.inference import load_network
from fastflower.interface.predictor_code import predictor_code
from fastflower.model.member import load_member

BATCH = 32
Picture = str | os.PathLike[str] | np.ndarray | Image.Image  # a file, or pixels uint8 (H, W, 3) or (H, W)


@dataclass(frozen=True)
class Predictions:
    """The most probable class of each of N pictures, its probability (N,), and those of all classes (N, C)."""

    class_ids: list[str]
    class_names: list[str]
    confidence: np.ndarray
    probabilities: np.ndarray


class TrainedModel:
    """A bundle, the members of an experiment, or one member.

    `classes` are the organiser's ids in the order of the logits, `class_names` their names where classes.csv has some.
    A model of pairs takes a pair (first, second) where others take a picture.
    """

    classes: list[str]
    class_names: list[str]
    network: nn.Module

    def __init__(
        self, classes: list[str], names: list[str], *, crops: list[dict[str, Any]], pairs: bool
    ) -> None:
        self.classes, self.class_names = classes, names
        self._crops, self._pairs = crops, pairs

    def predict(self, pictures: Iterable[Picture] | Iterable[tuple[Picture, Picture]]) -> Predictions:
        """The classes of pictures with their probabilities; InputError for a picture that cannot be read."""
        logits = self.logits(pictures)
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        best = logits.argmax(axis=1)
        return Predictions(
            class_ids=[self.classes[index] for index in best],
            class_names=[self.class_names[index] for index in best],
            confidence=probabilities[np.arange(len(best)), best],
            probabilities=probabilities,
        )

    def logits(self, pictures: Iterable[Picture] | Iterable[tuple[Picture, Picture]]) -> np.ndarray:
        """Logits (N, C) float64: the mean over views and members, divided by the temperature."""
        single = isinstance(pictures, (str, os.PathLike, Image.Image))
        if single or (isinstance(pictures, np.ndarray) and pictures.ndim < 4):
            raise InputError("got one picture; give a list of pictures")
        waiting, results = [], [np.empty((0, len(self.classes)))]
        for picture in pictures:
            waiting.append(self._views(picture))
            if len(waiting) == BATCH:
                results.append(self._fused(waiting))
                waiting = []
        if waiting:
            results.append(self._fused(waiting))
        return np.concatenate(results)

    def transform(self, picture: Any) -> Tensor:
        """A picture as `network` takes it: the first view, float32 (3, H, W) in 0..255."""
        return torch.from_numpy(self._views(picture)[0]).permute(2, 0, 1).float()

    def _views(self, picture: Any) -> list[np.ndarray]:
        """The picture, or pair, cut for each crop: uint8 (h, w, 3), of pairs (h, 2w, 3)."""
        if not self._pairs:
            return self._cut(picture)
        if not isinstance(picture, Sequence) or isinstance(picture, str) or len(picture) != 2:
            raise InputError("this model compares two pictures; give pairs (first, second)")
        return [np.concatenate(both, axis=1) for both in zip(*map(self._cut, picture), strict=True)]

    def _cut(self, picture: Picture) -> list[np.ndarray]:
        code = predictor_code().pictures
        if isinstance(picture, (str, os.PathLike)):
            try:
                views: list[np.ndarray] = code.prepare(os.fsencode(picture), self._crops)[0]
            except Exception as error:  # a hostile file may make Pillow raise anything
                raise InputError(f"{os.fspath(picture)}: cannot be read ({str(error)[:100]})") from None
            return views
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or not (picture.ndim == 2 or picture.shape[2:] == (3,)):
                raise InputError(
                    f"got an array of {picture.dtype} {picture.shape}; give pixels as uint8 (height, width, 3)"
                )
            picture = Image.fromarray(picture)
        cut: list[np.ndarray] = code.cut_views(picture.convert("RGB"), self._crops)
        return cut

    def _fused(self, views: list[list[np.ndarray]]) -> np.ndarray:
        raise NotImplementedError


class Member(TrainedModel):
    """One checkpoint: one view of the size of its last training stage, temperature 1; `network` can be trained on."""

    def __init__(self, path: Path, device: torch.device) -> None:
        file = load_member(path)
        meta, names = file.meta, list(file.meta.class_ids)
        crops = [asdict(crop_of(meta, *meta.size))]
        super().__init__(list(meta.class_ids), names, crops=crops, pairs=meta.backbone.startswith("compare_"))
        self.network, self.meta, self._device = load_network(file, path, device), meta, device

    @torch.inference_mode()
    def _fused(self, views: list[list[np.ndarray]]) -> np.ndarray:
        images = torch.from_numpy(np.stack([cut[0] for cut in views])).to(self._device)
        training = self.network.training
        logits = self.network.eval()(images.permute(0, 3, 1, 2).float())
        self.network.train(training)
        return logits.double().cpu().numpy()


class Bundle(TrainedModel):
    """A hand-in, or the programs that evaluate wrote beside an experiment's members, run by the predictor itself."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        code = predictor_code()
        try:
            description, hashes = code.bundles.read(str(folder))
            self._ensemble = code.networks.Networks(
                str(folder), description, hashes=hashes, device=str(device), half="none"
            )
        except (code.bundles.Problem, code.bundles.Unusable) as error:
            raise CorruptionError(str(error)) from None
        ids = list(description["class_ids"])
        names = [ids, *code.bundles.labelings(str(folder), ids, [])[1:]][-1]
        super().__init__(ids, names, crops=description["crops"], pairs=description["pairs"] is not None)
        self.notes: list[str] = self._ensemble.notes
        self._crops = description["crops"]

    @functools.cached_property
    def network(self) -> nn.Module:  # type: ignore[override]
        """The members as one module; InputError where their pictures are cut differently, which predict can do."""
        return BundleNetwork(self._ensemble)

    def transform(self, picture: Any) -> Tensor:
        """A picture as `network` takes it: the view of its programs, float32 (3, H, W) in 0..255."""
        first = self._ensemble.members[0]["views"][0]["crop"]
        return torch.from_numpy(self._views(picture)[first]).permute(2, 0, 1).float()

    def _fused(self, views: list[list[np.ndarray]]) -> np.ndarray:
        fused: np.ndarray = self._ensemble.fuse(self._ensemble.logits(views))
        return fused


class BundleNetwork(nn.Module):
    """The members' programs at the first view, and the weighted mean of their logits: (B, 3, H, W) 0..255 -> (B, C)."""

    def __init__(self, ensemble: Any) -> None:
        super().__init__()
        self.programs, self.weights = [], []
        crop = ensemble.members[0]["views"][0]["crop"]
        for number, member in enumerate(ensemble.members):
            position = next((i for i, view in enumerate(member["views"]) if view["crop"] == crop), None)
            if position is None:
                raise InputError(
                    f"{member['name']} takes pictures cut differently than the first member, so no one network takes "
                    "both; use predict and logits, or load one member's checkpoint"
                )
            for index, tensor in enumerate(member["inputs"][position]):
                self.register_buffer(f"member{number}_{index}", tensor)
            program = ensemble.bundle["programs"][member["views"][position]["program"]]["file"]
            self.programs.append((ensemble.programs[program], len(member["inputs"][position])))
            self.weights.append(member["weight"])

    def forward(self, images: Tensor) -> Tensor:
        total, logits = sum(self.weights), []
        for number, (program, count) in enumerate(self.programs):
            inputs = [getattr(self, f"member{number}_{index}") for index in range(count)]
            with torch.jit.optimized_execution(False):
                logits.append(program(images, *inputs) * (self.weights[number] / total))
        return torch.stack(logits).sum(0)


def load(path: str | os.PathLike[str], device: str = "cpu") -> TrainedModel:
    """The model at a path: an experiment's folder, its name, a bundle's folder, or one member's checkpoint.

    An experiment is what `evaluate` chose, weighed and calibrated. Raises InputError for anything else.
    """
    place, where = Path(path), torch.device(device)
    if not place.exists() and (runs.MODELS / place).is_dir():
        place = runs.MODELS / place
    if place.is_file():
        return Member(place, where)
    for folder in (place, place / PROGRAMS):
        if (folder / "bundle.json").is_file():
            return Bundle(folder, where)
    members = sorted(file for file in place.glob("*.pth") if runs.parse_member(file))
    if members:
        raise InputError(
            f"{place} was not evaluated; run python -m fastflower.evaluate, or load one member, such as {members[0]}"
        )
    raise InputError(
        f"{place}: no model; give an experiment's folder such as results/model/convnext, a bundle or a member's .pth"
    )
