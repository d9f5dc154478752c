"""A member in the formats of other programs: a folder of timm's, a .safetensors file, an ONNX file.

Each is written to a temporary path, read back, and compared with the member before it takes its place.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from warnings import catch_warnings, simplefilter

import numpy as np
import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch.nn import functional as F

from fastflower.bundle.program import fixed_size
from fastflower.core import files
from fastflower.core.errors import InputError
from fastflower.core.records import to_plain
from fastflower.evaluation.inference import load_network
from fastflower.model.member import MemberCheckpoint, MemberMeta, load_member
from fastflower.model.sizes import fit

TOLERANCE = 1e-4  # largest difference of logits from the member's
OPSET = 17
BATCHES = (1, 3)  # at which an ONNX file is compared
ONNXRUNTIME = "onnxruntime"
UNCHECKED = (
    "not checked: OpenCV's engine cannot run it, and onnxruntime is not installed (pip install onnxruntime)"
)
ONNX_PROTO = (  # the module of torch that adds own operators to a file, in torch 2.7 and in 2.11
    "torch.onnx._internal.onnx_proto_utils",
    "torch.onnx._internal.torchscript_exporter.onnx_proto_utils",
)
ADAPTIVE_POOL = F.adaptive_avg_pool2d
TIMM_FILES = ("config.json", "model.safetensors")


@dataclass(frozen=True)
class SavedMember:
    """A checkpoint to write in another format, and its network on the CPU."""

    path: Path
    file: MemberCheckpoint
    network: nn.Module

    @property
    def meta(self) -> MemberMeta:
        return self.file.meta


def read_member(path: Path) -> SavedMember:
    """Read a checkpoint that train wrote; InputError for another file."""
    file = load_member(path)
    return SavedMember(path, file, load_network(file, path, torch.device("cpu")))


def write_safetensors(member: SavedMember, path: Path) -> str:
    """Write the tensors under the member's names, with its description as metadata; returns a line on the file."""
    description = {"format": "pt", "fastflower": json.dumps(to_plain(member.meta), ensure_ascii=False)}
    tensors = {name: tensor.clone().contiguous() for name, tensor in member.file.tensors.items()}
    with files.replacing(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors, description))
        back = safetensors.torch.load_file(temporary)
        if back.keys() != tensors.keys() or not all(
            torch.equal(back[name], tensors[name]) for name in tensors
        ):
            raise InputError(f"{path}: the disk did not keep what was written; write to another")
    return f"{path}: {len(tensors)} tensors, {path.stat().st_size / 1e6:.1f} MB"


@torch.inference_mode()
def write_timm(member: SavedMember, folder: Path) -> str:
    """Write a folder that `timm.create_model` loads: model.safetensors and config.json; returns a line on it.

    Raises InputError with the reason for a network that is not timm's, or not the same without this project's parts.
    """
    meta, name = member.meta, member.meta.backbone
    twin = _timm_twin(member)
    images = _pictures(2, meta)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (meta.mean, meta.std))
    wanted = member.network(images)
    gap = float((twin((images / 255 - mean) / std) - wanted).abs().max())
    if not gap <= TOLERANCE:
        raise InputError(
            f"{member.path}: timm's {name} gives other logits with its weights ({gap:.2g} off): its head is not "
            "linear on the pooled features; use --safetensors or --onnx"
        )
    config = {
        "input_size": (3, *meta.size), "mean": meta.mean, "std": meta.std, "interpolation": meta.interpolation,
        "crop_pct": 1 / meta.resize_factor if meta.resize_factor else 1.0,
        "crop_mode": "center" if meta.resize_factor else "squash",
        "num_classes": len(meta.class_ids), "license": None, "url": "", "hf_hub_id": None, "origin_url": None,
    }  # fmt: skip
    config = {**dict(getattr(twin, "pretrained_cfg", {})), **config}
    arguments, _ = fit(name, (meta.size,))
    files.remove_abandoned(folder.parent, folder.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with files.temporary_folder(files.temporary_path(folder), folder, contents=TIMM_FILES) as temporary:
        twin.pretrained_cfg = config  # type: ignore[assignment]  # timm's attribute
        (temporary / TIMM_FILES[1]).write_bytes(safetensors.torch.save(_contiguous(twin.state_dict())))
        described = {"num_classes": len(meta.class_ids), "label_names": list(meta.class_ids)}
        save_config_for_hf(
            twin, str(temporary / TIMM_FILES[0]), model_config=described, model_args=arguments or None
        )
        path = temporary / TIMM_FILES[1]
        again = timm.create_model(
            name, num_classes=len(meta.class_ids), checkpoint_path=str(path), **arguments
        )
        gap = float((again.eval()((images / 255 - mean) / std) - wanted).abs().max())
        if not gap <= TOLERANCE:
            raise InputError(f"{folder}: read back, its logits are {gap:.2g} off; {TOLERANCE:g} is allowed")
        size = path.stat().st_size / 1e6
        files.swap_in(temporary, folder, contents=TIMM_FILES)
    words = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return (
        f"{folder}: {size:.1f} MB, logits {gap:.1g} off; timm.create_model({name!r}, "
        f"num_classes={len(meta.class_ids)}, checkpoint_path='{folder / TIMM_FILES[1]}'{words})"
    )


def _timm_twin(member: SavedMember) -> nn.Module:
    """timm's own classifier with the member's weights under timm's names."""
    meta, name = member.meta, member.meta.backbone
    if meta.head != "linear":
        raise InputError(
            f"{member.path}: its head is {meta.head}, which timm has not; use --safetensors or --onnx"
        )
    arguments, _ = fit(name, (meta.size,))
    twin = timm.create_model(name, num_classes=len(meta.class_ids), **arguments) if _is_timms(name) else None
    classifier = getattr(twin, "pretrained_cfg", {}).get("classifier") if twin is not None else None
    if twin is None or not isinstance(classifier, str):
        fault = f"{name} is not a network of timm" if twin is None else f"timm's {name} has several heads"
        raise InputError(f"{member.path}: {fault}; use --safetensors or --onnx")
    renamed = {
        name.removeprefix("backbone.") if name.startswith("backbone.") else f"{classifier}.{name[5:]}": tensor
        for name, tensor in member.file.tensors.items()
    }
    expected = twin.state_dict()
    differing = sorted(renamed.keys() ^ expected.keys())
    if differing:
        raise InputError(
            f"{member.path}: timm's classifier {name} has other tensors than its pooled features and a linear head "
            f"({', '.join(differing[:3])}); use --safetensors or --onnx"
        )
    twin.load_state_dict({key: tensor.reshape(expected[key].shape) for key, tensor in renamed.items()})
    return twin.eval()


def _is_timms(name: str) -> bool:
    architecture = name.partition(".")[0]
    return timm.is_model(architecture) and timm.model_entrypoint(architecture).__module__.startswith("timm.")


class UnitPixels(nn.Module):
    """A network on pixels in 0..1 instead of 0..255."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) float 0..1 -> logits (B, C)."""
        return self.network(pixels * 255)


def write_onnx(member: SavedMember, path: Path) -> list[str]:
    """Write an ONNX file: `pixels` float32 (B, 3, H, W) in 0..1 -> `logits` (B, C), for any B; returns lines on it.

    The normalisation is inside. The file is run by onnxruntime, or by OpenCV's engine where that is not installed,
    and compared with the member; InputError for an operator without a counterpart, or other logits.
    """
    height, width = member.meta.size[0], member.meta.size[1] * (2 if _is_pairs(member.meta) else 1)
    network = UnitPixels(fixed_size(member.network, height, width)).eval()
    with files.replacing(path) as temporary:
        _export(network, temporary, height=height, width=width, title=str(member.path))
        return _compare(member, temporary, path)


def _export(network: nn.Module, path: Path, *, height: int, width: int, title: str) -> None:
    example = torch.rand(2, 3, height, width)
    with ExitStack() as stack:
        stack.enter_context(catch_warnings())
        simplefilter("ignore")  # the tracer warns of every Python branch; the result is compared below
        # else a refusal prints the whole network
        stack.enter_context(mock.patch("torch._C._jit_onnx_log", lambda *_: None))
        stack.enter_context(mock.patch.object(F, "adaptive_avg_pool2d", _pool))
        if importlib.util.find_spec("onnx") is None:  # it adds functions of own operators: there are none
            home = next(name for name in ONNX_PROTO if importlib.util.find_spec(name) is not None)
            stack.enter_context(mock.patch(f"{home}._add_onnxscript_fn", lambda model, _: model))
        try:
            torch.onnx.export(
                network, (example,), str(path), input_names=["pixels"], output_names=["logits"], dynamo=False,
                dynamic_axes={"pixels": {0: "batch"}, "logits": {0: "batch"}}, opset_version=OPSET,
            )  # fmt: skip
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{title}: ONNX opset {OPSET} cannot express this network ({reason})") from None


def _pool(x: Tensor, output_size: int | tuple[int | None, int | None]) -> Tensor:
    """F.adaptive_avg_pool2d by means of slices, as ONNX has no pooling to a size that does not divide the map's."""
    height, width = (int(side) for side in x.shape[-2:])
    asked = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    rows, columns = asked[0] or height, asked[1] or width
    if height % rows == width % columns == 0:
        return ADAPTIVE_POOL(x, output_size)

    def cells(size: int, count: int) -> list[slice]:
        return [slice(k * size // count, -(-(k + 1) * size // count)) for k in range(count)]

    rows_of_means = [
        torch.stack([x[..., row, column].mean((-2, -1)) for column in cells(width, columns)], -1)
        for row in cells(height, rows)
    ]
    return torch.stack(rows_of_means, -2)


def _compare(member: SavedMember, path: Path, target: Path) -> list[str]:
    """Compare the file's logits with the member's at several batch sizes; returns lines on its size and speed."""
    engine, run = _engine(path)
    gaps, seconds = [], 0.0
    for batch in BATCHES:
        images = _pictures(batch, member.meta)
        with torch.inference_mode():
            wanted = member.network(images).numpy()
        try:
            got = run((images / 255).numpy())
            start = time.perf_counter()
            run((images / 255).numpy())
            seconds = (time.perf_counter() - start) / batch
        except Exception as error:  # each engine has errors of its own
            if engine != ONNXRUNTIME:
                return [f"{target}: opset {OPSET}, {path.stat().st_size / 1e6:.1f} MB", f"  {UNCHECKED}"]
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{target}: {engine} cannot run it at batch {batch} ({reason})") from None
        gaps.append(
            float(np.abs(got.reshape(wanted.shape) - wanted).max()) if got.size == wanted.size else np.inf
        )
    if not max(gaps) <= TOLERANCE:
        raise InputError(f"{target}: logits of {engine} are {max(gaps):.2g} off, {TOLERANCE:g} is allowed")
    size = path.stat().st_size / 1e6
    lines = [
        f"{target}: opset {OPSET}, {size:.1f} MB, {1000 * seconds:.2g} ms an image by {engine}, logits "
        f"{max(gaps):.1g} off at batches of {' and '.join(map(str, BATCHES))}"
    ]
    if engine != ONNXRUNTIME:
        lines.append(f"  checked with {engine}, not with onnxruntime, which is not installed")
    return lines


def _engine(path: Path) -> tuple[str, Any]:
    """The name of an engine that runs ONNX files, and a function from pixels (B, 3, H, W) to logits (B, C)."""
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        return ONNXRUNTIME, lambda pixels: session.run(None, {"pixels": pixels})[0]
    import cv2

    @functools.cache
    def network(batch: int) -> Any:  # its engine is made for one shape
        return cv2.dnn.readNetFromONNX(np.frombuffer(path.read_bytes(), np.uint8))

    def run(pixels: np.ndarray) -> np.ndarray:
        network(len(pixels)).setInput(pixels)
        return np.asarray(network(len(pixels)).forward())

    return "OpenCV's engine", run


def _pictures(batch: int, meta: MemberMeta) -> Tensor:
    """Smooth random pictures (B, 3, H, W) in whole numbers 0..255, of the member's size."""
    generator = torch.Generator().manual_seed(0)
    height, width = meta.size[0], meta.size[1] * (2 if _is_pairs(meta) else 1)
    coarse = torch.rand(batch, 3, 8, 8, generator=generator) * 255
    return nn.functional.interpolate(coarse, (height, width), mode="bilinear").round()


def _is_pairs(meta: MemberMeta) -> bool:
    return meta.backbone.startswith("compare_")


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
