"""The record bundle.json: members, programs, views, and all that the predictor must know of the recipe.

`writer.py` writes it; code/bundles.py reads it without fastflower and checks each field itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True)
class ViewCrop:
    """The way a picture is cut for one view: size in pixels, margin, resampling, and its short side in betons.

    `factor` is the short side before the crop over the side of the crop; 0 resizes the whole picture.
    """

    height: int
    width: int
    factor: float
    interpolation: str
    stored_side: int


@dataclass(frozen=True)
class FusedNorm:
    """A BatchNorm that the predictor multiplies into the convolution before it, by the names of both."""

    conv: str
    norm: str
    eps: float


@dataclass(frozen=True)
class Program:
    """A text file with a function of (images, *weights); see code/programs.py.

    `inputs` are the names of the weights in order; `half_keeps` those that stay fp32 in half precision, None where
    the program must not run in half precision.
    """

    file: str
    inputs: list[str]
    norms: list[FusedNorm]
    half_keeps: list[str] | None


@dataclass(frozen=True)
class MemberView:
    """Positions in the bundle's crops and programs."""

    crop: int
    program: int


@dataclass(frozen=True)
class BundleMember:
    """A member: its weight in the mean, its views, and for each view the logits (C,) of the test picture.

    `checkpoint` is the path of its own file where `weights` holds only what that file lacks.
    """

    name: str
    weights: str
    weight: float
    views: list[MemberView]
    expected: list[list[float]]
    checkpoint: str | None = None


@dataclass(frozen=True)
class PairArrays:
    """The two arrays of a .npz of pairs, and the shape of images that are stored as flat rows."""

    arrays: list[str]
    shape: Literal["auto"] | list[int]


@dataclass(frozen=True)
class PriorCorrection:
    """The class distribution for which probabilities hold, and that of the pictures to predict; em: to be estimated."""

    source: list[float]
    target: list[float] | Literal["em"]


@dataclass(frozen=True)
class BundleDescription:
    """The content of bundle.json; `prior` are the class frequencies of the training data."""

    FORMAT: ClassVar[int] = 6
    REMEDY: ClassVar[str] = "run python -m fastflower.export"

    fastflower: str
    class_ids: list[str]
    class_hash: str
    prior: list[float]
    columns: Literal["two", "three", "binary", "odds", "top", "sample"]
    labels: list[str]  # the text of each class in the submission
    top_k: int
    separator: str
    half: Literal["all", "gpu", "none"]
    temperature: float
    hflip: bool
    reduce: Literal["mean", "vote"]
    space: Literal["logits", "probabilities"]
    pairs: PairArrays | None
    tolerance: float
    pixel_tolerance: int
    crops: list[ViewCrop]
    programs: list[Program]
    members: list[BundleMember]
    correction: PriorCorrection | None = None

    @property
    def noun(self) -> str:
        """The name of the rows in messages."""
        return "pairs" if self.pairs else "photographs"
