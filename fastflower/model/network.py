"""The network from pixels to logits, and the specification from which train, evaluate and export build it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from fastflower.core import runs
from fastflower.core.errors import InputError
from fastflower.model import backbones
from fastflower.model.frozen import frozen_recipe
from fastflower.model.heads import NeighboursHead, build_aux_heads, build_head
from fastflower.model.lora import adapt
from fastflower.model.positions import use_matrices_for_positions
from fastflower.model.response_norm import use_lean_response_norms
from fastflower.model.sizes import fitting, view_scales
from fastflower.recipe import Recipe, derived


@dataclass(frozen=True)
class NetworkSpec:
    """The part of a checkpoint's description from which its network is rebuilt.

    Size is (height, width) of the last stage; mean and std are in 0..1 units.
    """

    backbone: str
    head: str
    head_scale: float
    margin: float
    num_classes: int
    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str
    mlp_width: int = 0  # of head mlp
    knn_k: int = 0  # of head knn, as the next two
    knn_temperature: float = 0.0
    knn_images: int = 0  # whose features the head holds

    @classmethod
    def from_recipe(cls, recipe: Recipe, num_classes: int, *, images: int = 0) -> NetworkSpec:
        """The specification of a recipe's network; mean and std are the backbone's unless the recipe sets them.

        `images` is the number of labelled training images, which a k-NN head holds.
        Raises InputError for a mean or std that contradicts pretrained weights, and for unusable names and sizes.
        """
        model, sizes = recipe.model, derived.image_sizes(recipe)
        profile = backbones.profile(model.backbone, sizes)
        for key, asked, trained in (
            ("mean", recipe.data.mean, profile.mean),
            ("std", recipe.data.std, profile.std),
        ):
            if (
                model.pretrained
                and asked != "auto"
                and max(abs(a - b) for a, b in zip(asked, trained, strict=True)) > 1e-3
            ):
                raise InputError(
                    f"data.{key} = {list(asked)}: the pretrained weights of {model.backbone} "
                    f"need {list(trained)}; set data.{key}=auto or model.pretrained=false"
                )
        return cls(
            backbone=model.backbone,
            head=model.head,
            head_scale=model.head_scale,
            margin=model.margin,
            num_classes=num_classes,
            size=sizes[-1],
            mean=profile.mean if recipe.data.mean == "auto" else tuple(recipe.data.mean),
            std=profile.std if recipe.data.std == "auto" else tuple(recipe.data.std),
            interpolation=profile.interpolation,
            **_head_numbers(recipe, images),
        )

    def scales(self, asked: list[int]) -> list[int]:
        """The sides of square views nearest to those asked that this network takes."""
        return view_scales(self.backbone, self.size, asked) if self.size[0] == self.size[1] else asked

    @property
    def fill(self) -> tuple[float, ...]:
        """The colour of erased boxes, (3,) in 0..255: 0 after normalisation."""
        return tuple(255 * value for value in self.mean)


class Network(nn.Module):
    """Pixels 0..255 -> logits. Normalisation is part of the network, so that no caller can get it wrong.

    The state dict holds `backbone.*` and `head.*` only, in training `aux_heads.*` too; mean and std come from the spec.
    `kept` is what training leaves as it is: nothing, the backbone, or the weights of a backbone that learns through
    adapters alone.
    """

    mean: Tensor
    std: Tensor
    kept: Literal["nothing", "backbone", "weights"] = "nothing"

    def __init__(
        self, backbone: nn.Module, head: nn.Module, *, spec: NetworkSpec, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.backbone = backbone
        self.dropout = nn.Dropout(drop_rate)
        self.head = head
        self.aux_heads = nn.ModuleList()  # see `add_aux_heads`

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float 0..255, or features (B, F) computed before -> logits (B, C).

        The logits of auxiliary heads, where training has added some, are further columns.
        """
        features = self.dropout(self.features(images) if images.ndim == 4 else images)
        logits: Tensor = self.head(features)
        return (
            torch.cat([logits, *(head(features) for head in self.aux_heads)], 1) if self.aux_heads else logits
        )

    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float 0..255 -> features (B, F) of the backbone."""
        return self.backbone((images - self.mean) / self.std)

    def train(self, mode: bool = True) -> Network:
        """Set the mode of all layers, but for those that training leaves as they are: they stay in eval mode."""
        super().train(mode)
        if self.kept == "backbone":
            self.backbone.eval()
        if self.kept == "weights":
            for module in self.backbone.modules():
                if isinstance(module, BatchNorm):
                    module.eval()
        return self


def fitted(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with the nearest sizes that its backbone takes, and a line for each key that changed.

    One with a frozen backbone first becomes `frozen_recipe`.

    A network that takes one size only is trained at one size. No side exceeds those of the recipe, for which images
    were stored. Raises InputError for a backbone without such a size.
    """
    recipe, lines = frozen_recipe(recipe)
    name, asked = recipe.model.backbone, derived.image_sizes(recipe)
    backbones.check_name(name)
    sizes = fitting(name, asked, largest=derived.largest_size(recipe))
    square = all(height == width for height, width in sizes)
    scales = view_scales(name, sizes[-1], recipe.tta.scales) if square else recipe.tta.scales
    data, train = recipe.data, recipe.train
    if sizes != asked:
        kept = [place for place, size in enumerate(sizes) if size not in sizes[place + 1 :]]
        data = replace(data, img_size=[_plain(sizes[place]) for place in kept])
        if isinstance(data.size_epochs, list) and len(data.size_epochs) == len(asked):
            data = replace(data, size_epochs=[data.size_epochs[place] for place in kept])
        if isinstance(train.stage_batch, list) and len(train.stage_batch) == len(asked):
            train = replace(train, stage_batch=[train.stage_batch[place] for place in kept])
        lines.append(
            f"data.img_size = {data.img_size}, the nearest to {[_plain(size) for size in asked]} that {name} takes"
            + (" in one training" if len(kept) < len(asked) else "")
        )
    if scales != recipe.tta.scales:
        lines.append(f"tta.scales = {scales}, the nearest to {recipe.tta.scales} that {name} takes")
    tta = replace(recipe.tta, scales=scales)
    return replace(recipe, data=data, train=train, tta=tta), lines


def _plain(size: tuple[int, int]) -> int | list[int]:
    """A size as recipes write it."""
    return size[0] if size[0] == size[1] else list(size)


def build_network(spec: NetworkSpec) -> Network:
    """The network of a checkpoint's spec with random weights, ready for `load_state_dict`."""
    backbone, _ = backbones.build_backbone(spec.backbone, [spec.size])
    use_lean_response_norms(backbone)
    return Network(backbone, _head(spec, [spec.size]), spec=spec)


def training_network(
    recipe: Recipe, num_classes: int, pretrained: Path = runs.PRETRAINED, *, images: int = 0
) -> tuple[Network, NetworkSpec, list[str]]:
    """The network that a recipe trains, its spec, and lines on the origin of its weights.

    `images` is the number of labelled training images. Random weights come from torch's global generator: seed it
    first. Pretrained ones come from folder `pretrained`.
    """
    model, sizes = recipe.model, derived.image_sizes(recipe)
    spec = NetworkSpec.from_recipe(recipe, num_classes, images=images)
    backbone, report = backbones.build_backbone(
        spec.backbone,
        sizes,
        drop_path=model.drop_path,
        grad_checkpointing=model.grad_checkpointing,
        pretrained=pretrained if model.pretrained and not model.init else None,
    )
    use_lean_response_norms(backbone)
    use_matrices_for_positions(backbone)
    constant = drop_path_note(backbone, spec.backbone)
    network = Network(backbone, _head(spec, sizes), spec=spec, drop_rate=model.drop_rate)
    if recipe.train.channels_last:
        use_channels_last(network)
    notes = constant + _keep(network, recipe)
    if model.init:  # its caller loads the weights
        return network, spec, notes
    return (
        network,
        spec,
        [*notes, str(report or f"{spec.backbone}: random initial weights (model.pretrained=false)")],
    )


def drop_path_note(backbone: nn.Module, name: str) -> list[str]:
    """A line for people where the rate of stochastic depth does not grow with depth; else none."""
    rates = [m.drop_prob for m in backbone.modules() if isinstance(m, timm.layers.DropPath)]
    if len(rates) < 2 or not rates[0] or len(set(rates)) > 1:
        return []
    return [
        f"model.drop_path = {rates[0]:g} in each of {len(rates)} places, as {name} was published; it does not grow"
    ]


def add_aux_heads(network: Network, spec: NetworkSpec, sizes: Sequence[int]) -> None:
    """Add a head for each auxiliary column, of `sizes` values, whose random weights come from torch's generator."""
    device = network.mean.device
    features = backbones.profile(spec.backbone, [spec.size]).features
    network.aux_heads = build_aux_heads(sizes, features).to(device)


def _keep(network: Network, recipe: Recipe) -> list[str]:
    """Freeze the layers that model.freeze and model.lora keep; returns a line for people on those that train."""
    lora = recipe.model.lora
    if recipe.model.freeze == "backbone":
        network.kept = "backbone"
        network.backbone.requires_grad_(False)
        what = "the head alone trains"
        if isinstance(network.head, NeighboursHead):
            count, width = network.head.images.shape
            megabytes = 4 * count * width / 1e6
            return [
                f"nothing trains: the head holds the features of {count} images, {width} numbers each, "
                f"{megabytes:.1f} MB ({megabytes / 2:.1f} MB of a bundle in fp16)"
            ]
    elif lora.rank:
        layers = adapt(network.backbone, lora, recipe.model.backbone)
        network.kept = "weights"
        what = f"adapters of rank {lora.rank} in {layers} linear layers and the head train"
    else:
        return []
    network.train(network.training)
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    whole = sum(parameter.numel() for parameter in network.parameters())
    return [f"{what}: {trained / 1e6:.3g} M of {whole / 1e6:.3g} M parameters"]


def use_channels_last(network: nn.Module) -> None:
    """Store kernels and other tensors of four axes channels-last; `network.to` fails for those of five.

    By `to`, not `contiguous`: only so do the strides of 1 x 1 kernels equal their gradients', or DDP warns and copies.
    """
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def batch_norms(network: nn.Module) -> dict[str, BatchNorm]:
    """The BatchNorm layers whose running statistics follow the training, by name."""
    if isinstance(network, Network) and network.kept != "nothing":
        return {}
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    }


def synchronise_norms(
    network: Network, recipe: Recipe, *, device: torch.device, world_size: int
) -> tuple[Network, int]:
    """The network with SyncBatchNorm on several GPUs, and the number of converted layers; else the network and 0."""
    norms = len(batch_norms(network))
    if not (recipe.train.sync_bn and device.type == "cuda" and world_size > 1 and norms):
        return network, 0
    return timm.layers.convert_sync_batchnorm(network), norms


def _head(spec: NetworkSpec, sizes: list[tuple[int, int]]) -> nn.Module:
    return build_head(spec, backbones.profile(spec.backbone, sizes).features)


def _head_numbers(recipe: Recipe, images: int) -> dict[str, Any]:
    """The fields of a spec that only some heads have, where the recipe's head is one of them."""
    model = recipe.model
    if model.head == "mlp":
        return {"mlp_width": model.mlp_width}
    if model.head != "knn":
        return {}
    if 0 < images <= model.knn_k:
        raise InputError(
            f"model.knn_k = {model.knn_k}: the fold has {images} training images; set it to {images - 1} or less"
        )
    return {"knn_k": model.knn_k, "knn_temperature": model.knn_temperature, "knn_images": images}
