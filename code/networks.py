"""Runs the members of a bundle: pictures in, logits out.

A network travels as a program that takes its weights as arguments (see `programs.py`), so one small program serves
every member of a backbone, and weights are stored once for all views. This needs no timm, no class definitions and no
pickle.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import threading
from typing import Any

import numpy as np
import torch

import priors
from bundles import Unusable
from programs import Refused, compile_program

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class Networks:
    """All members of a bundle on one device.

    Members with damaged files are left out, and devices that compute wrongly are skipped; `notes` lists both.
    """

    def __init__(
        self, folder: str, bundle: dict[str, Any], *, hashes: dict[str, str], device: str, half: str = "gpu"
    ) -> None:
        self.bundle = bundle
        self.notes: list[str] = []
        self.members: list[dict[str, Any]] = []
        self.programs: dict[str, Any] = {}
        self.fallback_lock = threading.Lock()
        self._read(folder, hashes)
        if not self.members:
            raise Unusable("; ".join(self.notes))
        torch.backends.cudnn.allow_tf32 = False  # the trainer's logits are in full fp32
        torch.backends.cuda.matmul.allow_tf32 = False
        if all(program["half_keeps"] is None for program in bundle["programs"]):
            half = "none"
        for name, dtype in candidates(device, half):
            fault = self._move_to(name, dtype)
            if fault is None:
                return
            self.notes.append(f"{name} in {DTYPE_NAMES[dtype]}: {fault}")
        raise Unusable("; ".join(self.notes))

    def logits(self, pictures: list[list[np.ndarray]]) -> np.ndarray:
        """Logits of N pictures: float32 (N, members, views, C).

        A picture is one uint8 array (h, w, 3) for each crop of the bundle, (h, 2w, 3) for pairs. Views are in the
        member's order, plain then mirrored. Safe to call from several threads. When memory is short the pictures are
        split in halves down to single ones; when a GPU fails, the CPU takes over.
        """
        dtype, next_device = self.dtype, "cpu"
        try:
            logits = self._run(pictures)
        except (RuntimeError, MemoryError) as error:
            full = isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)
            reason = str(error).strip().split("\n")[-1]
        else:
            if dtype == torch.float32 or np.isfinite(logits).all():
                return logits
            full, reason, next_device = False, "logits that are not finite", str(self.device)
        # outside of the except block, whose traceback keeps the tensors alive
        if full and self.device.type == "cuda":
            torch.cuda.empty_cache()
        if full and len(pictures) > 1:
            middle = len(pictures) // 2
            return np.concatenate([self.logits(pictures[:middle]), self.logits(pictures[middle:])])
        # other threads that compute in bf16 fail as well, and find that fp32 is already set
        with self.fallback_lock:
            if self.device.type == "cpu" and (full or self.dtype == torch.float32):
                return self._run(pictures)
            self.notes.append(
                f"{self.device} in {DTYPE_NAMES[dtype]}: {reason}; continuing with {next_device} in fp32"
            )
            self._move_to(next_device, torch.float32)
        return self.logits(pictures)

    def fuse(self, logits: np.ndarray) -> np.ndarray:
        """Logits divided by T, float64 (N, C): the mean or votes of the views, then the weighted mean over members.

        Where the bundle knows the class distribution of the pictures, they are corrected for it.

        It is the mean of the members' logits, or the log of that of their probabilities. A member whose logits of a
        picture are not finite has weight 0 there; NaN where no member is finite.
        """
        # twin of reduce_views and combine in fastflower/evaluation/logits.py
        means = logits.astype(np.float64).mean(axis=2)  # (N, members, C)
        if self.bundle["reduce"] == "vote":
            votes = (logits.argmax(axis=3)[..., None] == np.arange(logits.shape[3])).sum(axis=2)
            means = np.log((votes + softmax(means)) / (logits.shape[2] + 1))
        weights = np.isfinite(means).all(axis=2) * np.array([member["weight"] for member in self.members])
        with np.errstate(invalid="ignore"):
            weights = weights / weights.sum(axis=1, keepdims=True)
        if self.bundle["space"] == "probabilities":
            total = (np.nan_to_num(softmax(means)) * weights[:, :, None]).sum(axis=1)
            total = np.log(np.maximum(total, 1e-30))
        else:
            total = (np.nan_to_num(means) * weights[:, :, None]).sum(axis=1)
        ratio = priors.known_ratio(self.bundle)
        return total / self.bundle["temperature"] + (0.0 if ratio is None else np.log(ratio))

    def device_and_precision(self) -> str:
        """The device and the precision in use, such as `cuda, fp16`."""
        return f"{self.device}, {DTYPE_NAMES[self.dtype]}"

    def _read(self, folder: str, hashes: dict[str, str]) -> None:
        for member in self.bundle["members"]:
            try:
                for view in member["views"]:
                    name = self.bundle["programs"][view["program"]]["file"]
                    if name not in self.programs:
                        self.programs[name] = load_program(read_checked(folder, name, hashes))
                tensors = read_tensors(read_checked(folder, member["weights"], hashes))
                if member["checkpoint"] is not None:
                    tensors.update(read_checkpoint(read_checked(folder, member["checkpoint"], hashes)))
            except Refused as error:  # no accident: nothing else in such a bundle is trusted
                raise Unusable(f"{os.path.join(folder, name)} {error}; nothing in it was run") from None
            except (OSError, ValueError, MemoryError, LookupError, RuntimeError, TypeError) as error:
                self.notes.append(f"member {member['name']} left out: {error}")
            else:
                self.members.append({**member, "tensors": tensors})

    def _move_to(self, name: str, dtype: torch.dtype) -> str | None:
        """Move the weights to a device and run the self-test; returns the fault, or None."""
        try:
            self.device, self.dtype = torch.device(name), dtype
            for member in self.members:
                member["inputs"] = [
                    self._inputs(member["tensors"], view["program"]) for view in member["views"]
                ]
            worst = self._self_test()
        # torch reports "not compiled with CUDA" by an assertion
        except (RuntimeError, MemoryError, AssertionError) as error:
            return str(error).strip().split("\n")[-1]
        exact = dtype == torch.float32
        if worst <= (1e-3 if exact else 0.05):
            return None
        fault = f"logits of the test picture are {worst:.2g} off"
        if self.device.type != "cpu" or not exact:
            return fault
        self.notes.append(f"{fault}; another version of torch than at export?")
        return None

    def _inputs(self, tensors: dict[str, torch.Tensor], position: int) -> list[torch.Tensor]:
        """The weights of a member as arguments of the program at a position of the bundle's list."""
        program = self.bundle["programs"][position]
        fused = fuse_norms(tensors, program["norms"])
        inputs = []
        for name in program["inputs"]:
            tensor = fused[name] if name in fused else dequantized(tensors, name)
            dtype = self._float_dtype(program)
            if not tensor.is_floating_point():
                dtype = tensor.dtype
            elif name in (program["half_keeps"] or ()):
                dtype = torch.float32
            tensor = tensor.to(self.device, dtype)
            if tensor.ndim == 4 and tensor.shape[1] > 1:
                # in the memory order of the images, which would else be reordered at each run
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            inputs.append(tensor)
        return inputs

    def _float_dtype(self, program: dict[str, Any]) -> torch.dtype:
        """The precision in use, but fp32 for a program that export found wrong in half precision."""
        return self.dtype if program["half_keeps"] is not None else torch.float32

    def _self_test(self) -> float:
        """Largest difference to the logits that the trainer's networks gave at export, relative to the largest logit.

        On a CPU in fp32 one view of each member suffices, so that the first row comes sooner.
        """
        worst, images = 0.0, 2 if self.bundle["pairs"] else 1
        for member in self.members:
            count = 1 if (self.device.type, self.dtype) == ("cpu", torch.float32) else len(member["views"])
            for view, inputs, expected in list(zip(member["views"], member["inputs"], member["expected"]))[
                :count
            ]:
                crop = self.bundle["crops"][view["crop"]]
                picture = test_picture(crop["height"], images * crop["width"])
                image = to_tensor(picture[None]).to(self.device)
                error = np.abs(
                    self._forward(image, view, inputs)[0] - np.array(expected, dtype=np.float32)
                ).max()
                worst = max(worst, float(np.nan_to_num(error / max(1.0, np.abs(expected).max()), nan=np.inf)))
        return worst

    def _run(self, pictures: list[list[np.ndarray]]) -> np.ndarray:
        crops = [to_tensor(np.stack(arrays)).to(self.device) for arrays in zip(*pictures)]
        count = len(pictures)
        flips = (False, True) if self.bundle["hflip"] else (False,)
        by_member = []
        for member in self.members:
            views: list[np.ndarray] = []
            for view, inputs in zip(member["views"], member["inputs"]):
                images = torch.cat(
                    [crops[view["crop"]].flip(2) if flip else crops[view["crop"]] for flip in flips]
                )
                logits = self._forward(images, view, inputs)
                views += [logits[start : start + count] for start in range(0, len(logits), count)]
            by_member.append(np.stack(views, axis=1))
        return np.stack(by_member, axis=1)

    @torch.inference_mode()
    def _forward(self, images: torch.Tensor, view: dict[str, Any], inputs: list[torch.Tensor]) -> np.ndarray:
        """Float32 logits (B, C) of uint8 images (B, h, w, 3), whose memory is channels-last already."""
        program = self.bundle["programs"][view["program"]]
        floats = images.permute(0, 3, 1, 2).to(self._float_dtype(program))
        with torch.jit.optimized_execution(False):  # saves the profiling of the first two runs
            logits = self.programs[program["file"]](floats, *inputs)
        return np.array(logits.tolist(), dtype=np.float32)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis; NaN where a logit is not finite."""
    with np.errstate(invalid="ignore"):
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return odds / odds.sum(axis=-1, keepdims=True)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A uint8 array's memory as a tensor; torch.from_numpy fails for torch before 2.3 beside NumPy 2."""
    return torch.frombuffer(array, dtype=torch.uint8).reshape(array.shape)


def candidates(device: str, half: str) -> list[tuple[str, torch.dtype]]:
    """Devices and precisions to try in turn; `half` allows half precision on a "gpu", on "all" devices or on "none".

    On a CPU it is bf16, in which some multiply twice as many numbers at a time and sum them in fp32.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    order = [("cpu", torch.float32)]
    if device.partition(":")[0] != "cpu":
        order = [*([] if half == "none" else [(device, torch.float16)]), (device, torch.float32), *order]
    elif half == "all" and multiplies_bf16():
        order = [("cpu", torch.bfloat16), *order]
    return order


def multiplies_bf16() -> bool:
    """True when this processor has bf16 instructions; without them bf16 is slower than fp32."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return not {"avx512_bf16", "amx_bf16"}.isdisjoint(file.read().split())
    except OSError:
        return False


def load_program(data: bytearray) -> Any:
    """Compile the text of a program; raises Refused for one that the predictor does not run."""
    return compile_program(data.decode("utf-8", "backslashreplace"))


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensors(data: bytearray) -> dict[str, torch.Tensor]:
    """Read a safetensors file: the header's length in eight bytes, the header as JSON, the tensors' memory.

    Raises ValueError unless the tensors, each as long as its shape and dtype say, fill the memory without overlap.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError("its weights end within their header")
    header = json.loads(bytes(data[8:start]), object_pairs_hook=_distinct)
    header.pop("__metadata__", None)
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (first, last), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
        if not 0 <= first <= last <= len(data) - start:
            raise ValueError(f"the tensor {name} lies outside of its weights")
        if first != end:
            raise ValueError(f"the tensor {name} begins at byte {first} of its weights, not at {end}")
        flat, end = torch.empty(0, dtype=dtype), last
        if last - first != math.prod(entry["shape"]) * flat.element_size():
            raise ValueError(f"the tensor {name} has {last - first} bytes for the shape {entry['shape']}")
        if last > first:
            count = (last - first) // flat.element_size()
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + first)
        tensors[name] = flat.reshape(entry["shape"])
    if end != len(data) - start:
        raise ValueError(f"its weights have {len(data) - start} bytes, their header describes {end}")
    return tensors


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a map; ValueError for a name that it has twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the header of its weights has {max(names, key=names.count)} twice")
    return fields


def read_checkpoint(data: bytearray) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint that training wrote; a file with other than plain values is refused, not run.

    Only torch's zip format: before torch 2.6 the older one allowed to bypass `weights_only` (CVE-2025-32434).
    """
    if data[:4] != b"PK\3\4":
        raise ValueError("it is not a checkpoint of training")
    try:
        return dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["tensors"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"it is not a plain checkpoint; nothing in it was run ({reason})") from None


def dequantized(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor as stored, multiplied by its scales where it was stored in eight bits."""
    tensor, scale = tensors[name], tensors.get(name + ":scale")
    return tensor if scale is None else tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))


def fuse_norms(tensors: dict[str, torch.Tensor], norms: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Convolutions with the BatchNorm after them multiplied in: W * s and (b - mean) * s + beta, s = gamma / std."""
    fused = {}
    for entry in norms:
        conv, norm = entry["conv"], entry["norm"]
        gamma, beta, mean, variance = (
            tensors[f"{norm}.{leaf}"].double() for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / (variance + entry["eps"]).sqrt()
        kernel = dequantized(tensors, f"{conv}.weight").double()
        bias = tensors.get(f"{conv}.bias", torch.zeros(1)).double()
        fused[f"{conv}.weight"] = (kernel * scale.view(-1, 1, 1, 1)).float()
        fused[f"{conv}.bias"] = ((bias - mean) * scale + beta).float()
    return fused


def read_checked(folder: str, name: str, hashes: dict[str, str]) -> bytearray:
    """Read a file of the bundle; ValueError when its SHA-256 is not the exported file's."""
    path = os.path.join(folder, name)
    size = os.path.getsize(path)
    try:
        data = bytearray(size)
    except MemoryError:
        raise ValueError(f"{name} claims {size} bytes, more than there is memory") from None
    with open(path, "rb") as file:
        file.readinto(data)
    if hashlib.sha256(data).hexdigest() != hashes.get(name):
        raise ValueError(f"{name} is damaged or was replaced: its SHA-256 is not the bundle's")
    return data


# twin of logits_of_test_picture in fastflower/bundle/program.py
def test_picture(height: int, width: int) -> np.ndarray:
    """The picture of the self-test, uint8 (h, w, 3): smooth, coloured, with an edge."""
    y, x, c = np.ogrid[:height, :width, :3]
    waves = 127.5 + 90 * np.sin(x * 6.0 / width + 2.0 * c) * np.cos(y * (4.0 + c) / height)
    return (waves + 35 * (x > y)).astype(np.uint8)
