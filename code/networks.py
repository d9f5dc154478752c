"""The members of a bundle as one function: pictures in, logits out.

A network travels as a TorchScript program that takes its weights as arguments, so one small program serves
every member of a backbone, and weights are stored once for all views. No timm, no class definitions, no pickle.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import threading
import warnings
from typing import Any

import numpy as np
import torch

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class Unusable(Exception):
    """No member can be run; the text is the one line to show."""


class Networks:
    """All members of a bundle on one device.

    Members whose files are damaged are left out and devices that compute wrongly are passed over; `notes` says so.
    """

    def __init__(
        self, folder: str, bundle: dict[str, Any], *, hashes: dict[str, str], device: str, half: str = "gpu"
    ) -> None:
        self.bundle = bundle
        self.notes: list[str] = []
        self.members: list[dict[str, Any]] = []
        self.files: dict[str, bytearray] = {}
        self.alone = threading.Lock()
        self._read(folder, hashes)
        if not self.members:
            raise Unusable("; ".join(self.notes))
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: logits must be those of the trainer
        torch.backends.cuda.matmul.allow_tf32 = False
        if all(spec["half_keeps"] is None for spec in bundle["programs"]):
            half = "none"
        for name, dtype in choices(device, half):
            fault = self._place(name, dtype)
            if fault is None:
                return
            self.notes.append(f"{name} in {NAMES[dtype]}: {fault}")
        raise Unusable("; ".join(self.notes))

    def logits(self, pictures: list[list[np.ndarray]]) -> np.ndarray:
        """Float32 (N, members, views, C) of N pictures, each one uint8 array (h, w, 3) for each crop of the bundle.

        Those of pairs are (h, 2w, 3). Views are in the member's own order, plain then mirrored. Threads may call it at
        once. Where memory is short the pictures are run in halves, a single one alone; where a GPU fails the CPU goes
        on.
        """
        dtype, goal = self.dtype, "cpu"
        try:
            found = self._run(pictures)
        except (RuntimeError, MemoryError) as error:
            full = isinstance(error, MemoryError) or any(text in str(error) for text in MEMORY)
            reason = str(error).strip().split("\n")[-1]
        else:
            if dtype == torch.float32 or np.isfinite(found).all():
                return found
            full, reason, goal = False, "logits that are not finite", str(self.device)
        # outside the except block, whose traceback keeps the tensors alive
        if full and self.device.type == "cuda":
            torch.cuda.empty_cache()
        if full and len(pictures) > 1:
            middle = len(pictures) // 2
            return np.concatenate([self.logits(pictures[:middle]), self.logits(pictures[middle:])])
        # other threads of a CPU that are in the midst of bf16 fail as well, and find fp32 in place
        with self.alone:
            if self.device.type == "cpu" and (full or self.dtype == torch.float32):
                return self._run(pictures)
            self.notes.append(f"{self.device} in {NAMES[dtype]}: {reason}; going on with {goal} in fp32")
            self._place(goal, torch.float32)
        return self.logits(pictures)

    def fuse(self, logits: np.ndarray) -> np.ndarray:
        """Fused logits over T, float64 (N, C): the mean over views, then the weighted mean over members.

        A member that is not finite on a picture has no say there; NaN where none is.
        """
        own = logits.astype(np.float64).mean(axis=2)  # (N, members, C)
        say = np.isfinite(own).all(axis=2) * np.array([member["weight"] for member in self.members])
        with np.errstate(invalid="ignore"):
            say = say / say.sum(axis=1, keepdims=True)
        return (np.nan_to_num(own) * say[:, :, None]).sum(axis=1) / self.bundle["temperature"]

    def where(self) -> str:
        """The device and the precision that compute now."""
        return f"{self.device}, {NAMES[self.dtype]}"

    def _read(self, folder: str, hashes: dict[str, str]) -> None:
        for member in self.bundle["members"]:
            try:
                for view in member["views"]:
                    name = self.bundle["programs"][view["program"]]["file"]
                    if name not in self.files:
                        self.files[name] = checked(folder, name, hashes)
                tensors = read_tensors(checked(folder, member["weights"], hashes))
                if "checkpoint" in member:
                    tensors.update(read_checkpoint(checked(folder, member["checkpoint"], hashes)))
            except (OSError, ValueError, MemoryError, LookupError, RuntimeError, TypeError) as error:
                self.notes.append(f"member {member['name']} left out: {error}")
            else:
                self.members.append({**member, "tensors": tensors})

    def _place(self, name: str, dtype: torch.dtype) -> str | None:
        """Bring everything to a device and run the self-test: what is wrong there, or None."""
        try:
            self.device, self.dtype = torch.device(name), dtype
            self.programs = {file: program(data, self.device) for file, data in self.files.items()}
            for member in self.members:
                member["inputs"] = [
                    self._inputs(member["tensors"], view["program"]) for view in member["views"]
                ]
            worst = self._self_test()
        except (
            RuntimeError,
            MemoryError,
            AssertionError,
        ) as error:  # torch says "not compiled with CUDA" by assert
            return str(error).strip().split("\n")[-1]
        exact = dtype == torch.float32
        if worst <= (1e-3 if exact else 0.05):
            return None
        fault = f"logits of the test picture are {worst:.2g} off"
        if self.device.type != "cpu" or not exact:
            return fault
        self.notes.append(f"{fault}; another version of torch than at export?")
        return None

    def _inputs(self, tensors: dict[str, torch.Tensor], program: int) -> list[torch.Tensor]:
        spec = self.bundle["programs"][program]
        computed = without_norms(tensors, spec["norms"])
        found = []
        for name in spec["inputs"]:
            tensor, own = computed[name] if name in computed else weight(tensors, name), self._floats(spec)
            if not tensor.is_floating_point():
                own = tensor.dtype
            elif name in (spec["half_keeps"] or ()):
                own = torch.float32
            tensor = tensor.to(self.device, own)
            if (
                tensor.ndim == 4 and tensor.shape[1] > 1
            ):  # dense kernels lie as the images do, not reordered each time
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            found.append(tensor)
        return found

    def _floats(self, spec: dict[str, Any]) -> torch.dtype:
        """Half precision where asked for, unless export found the program wrong in it."""
        return self.dtype if spec["half_keeps"] is not None else torch.float32

    def _self_test(self) -> float:
        """Largest difference, as a share of the largest logit, to what the trainer's own networks said at export.

        On a CPU in fp32 one view a member is enough to know the arithmetic, and the first row comes sooner.
        """
        worst, beside = 0.0, 2 if self.bundle.get("pairs") else 1
        for member in self.members:
            count = 1 if (self.device.type, self.dtype) == ("cpu", torch.float32) else len(member["views"])
            for view, inputs, expected in list(zip(member["views"], member["inputs"], member["expected"]))[
                :count
            ]:
                crop = self.bundle["crops"][view["crop"]]
                picture = test_picture(crop["height"], beside * crop["width"])
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
        found = []
        for member in self.members:
            own: list[np.ndarray] = []
            for view, inputs in zip(member["views"], member["inputs"]):
                images = torch.cat(
                    [crops[view["crop"]].flip(2) if flip else crops[view["crop"]] for flip in flips]
                )
                logits = self._forward(images, view, inputs)
                own += [logits[start : start + count] for start in range(0, len(logits), count)]
            found.append(np.stack(own, axis=1))
        return np.stack(found, axis=1)

    @torch.inference_mode()
    def _forward(self, images: torch.Tensor, view: dict[str, Any], inputs: list[torch.Tensor]) -> np.ndarray:
        """Float32 logits (B, C) of uint8 images (B, h, w, 3), which are channels-last in memory as they are."""
        spec = self.bundle["programs"][view["program"]]
        with torch.jit.optimized_execution(False):  # else the first two runs are spent on profiling
            logits = self.programs[spec["file"]](images.permute(0, 3, 1, 2).to(self._floats(spec)), *inputs)
        return np.array(logits.tolist(), dtype=np.float32)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A uint8 array's memory as a tensor, without torch's own bridge to NumPy: torch before 2.3 has none to NumPy 2."""
    return torch.frombuffer(array, dtype=torch.uint8).reshape(array.shape)


def choices(device: str, half: str) -> list[tuple[str, torch.dtype]]:
    """Devices to try in turn and the precision to try there; half precision on a "gpu", on "all" devices or on "none".

    A CPU's is bf16: the one in which some multiply twice as many numbers at a time, and sum them up in fp32.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    found = [("cpu", torch.float32)]
    if device.partition(":")[0] != "cpu":
        found = [*([] if half == "none" else [(device, torch.float16)]), (device, torch.float32), *found]
    elif half == "all" and multiplies_bf16():
        found = [("cpu", torch.bfloat16), *found]
    return found


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for bf16; those that have not are slower in it than in fp32."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return not {"avx512_bf16", "amx_bf16"}.isdisjoint(file.read().split())
    except OSError:
        return False


def program(data: bytearray, device: torch.device) -> Any:
    """A TorchScript program. New torch calls it deprecated, but what is to replace it runs on the same torch only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.")
        return torch.jit.load(io.BytesIO(data), map_location=device)


DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_tensors(data: bytearray) -> dict[str, torch.Tensor]:
    """A safetensors file: eight bytes that hold the header's length, the header as JSON, the tensors' memory."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise ValueError("weights that end within their header")
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    found = {}
    for name, spec in header.items():
        (first, last), dtype = spec["data_offsets"], DTYPES[spec["dtype"]]
        if not 0 <= first <= last <= len(data) - start:
            raise ValueError(f"weights whose {name} lies outside of them")
        flat = torch.empty(0, dtype=dtype)
        if last > first:
            count = (last - first) // flat.element_size()
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + first)
        found[name] = flat.reshape(spec["shape"])
    return found


def read_checkpoint(data: bytearray) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that training wrote; a file that holds more than plain values is refused, not run.

    Only torch's zip format: `weights_only` could be got round in the older one before torch 2.6 (CVE-2025-32434).
    """
    if data[:4] != b"PK\3\4":
        raise ValueError("a member that is no checkpoint of training")
    try:
        return dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["tensors"])
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"a member that is no plain checkpoint; nothing in it was run ({reason})") from None


def weight(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor as it was stored, or multiplied out where it was in eight bits with a scale for each channel."""
    tensor, scale = tensors[name], tensors.get(name + ":scale")
    return tensor if scale is None else tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))


def without_norms(tensors: dict[str, torch.Tensor], norms: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Convolutions that do the work of the BatchNorm after them: W * s and (b - mean) * s + beta, s = gamma / std."""
    made = {}
    for pair in norms:
        conv, norm = pair["conv"], pair["norm"]
        gamma, beta, mean, variance = (
            tensors[f"{norm}.{leaf}"].double() for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gamma / (variance + pair["eps"]).sqrt()
        kernel = weight(tensors, f"{conv}.weight").double()
        bias = tensors.get(f"{conv}.bias", torch.zeros(1)).double()
        made[f"{conv}.weight"] = (kernel * scale.view(-1, 1, 1, 1)).float()
        made[f"{conv}.bias"] = ((bias - mean) * scale + beta).float()
    return made


def checked(folder: str, name: str, hashes: dict[str, str]) -> bytearray:
    """A file of the bundle; ValueError when it is not the one that was exported."""
    path = os.path.join(folder, name)
    data = bytearray(os.path.getsize(path))
    with open(path, "rb") as file:
        file.readinto(data)
    if hashlib.sha256(data).hexdigest() != hashes.get(name):
        raise ValueError(f"{name} is damaged or another one (its SHA-256 is not the bundle's)")
    return data


def test_picture(height: int, width: int) -> np.ndarray:
    """The picture of the self-test, uint8 (h, w, 3): smooth, coloured, with an edge."""
    y, x, c = np.ogrid[:height, :width, :3]
    waves = 127.5 + 90 * np.sin(x * 6.0 / width + 2.0 * c) * np.cos(y * (4.0 + c) / height)
    return (waves + 35 * (x > y)).astype(np.uint8)
