"""Weights in the files that others write: state dicts, checkpoints of training programs, folders of a hub or contest.

Nothing in a file is ever run: torch's restricted unpickler builds tensors and plain values, and everything else that
a file names (the options of timm's train.py, NumPy numbers, settings of other libraries) becomes an empty `Inert`.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from warnings import catch_warnings, simplefilter

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastflower.core.errors import CorruptionError, InputError
from fastflower.model.handed_in import handed_in
from fastflower.model.pretrained import FOLDER_FILES

Kind = Literal["raw", "ema"]
WRAPPERS: dict[Kind, tuple[str, ...]] = {  # keys under which training programs keep the weights
    "raw": ("state_dict", "model_state_dict", "model", "module"),
    "ema": ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model_state_dict", "ema"),
}
PREFIXES = ("module.", "_orig_mod.", "model.", "timm_model.", "backbone.")  # of DDP, compile, Lightning, ...
CHECKPOINTS = (".pth", ".pt", ".pth.tar", ".safetensors")  # endings in the folder of a training program
BEST = "best"  # in the name of a file that is preferred to others of its folder
OLD_FORMAT = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
)  # what a file before 2020 names


@dataclass(frozen=True)
class WeightFile:
    """Tensors by name as their network has them, the key they were under, and the architecture the file names."""

    path: Path
    tensors: dict[str, Tensor]
    key: str = ""
    architecture: str = ""


class Inert(dict):
    """The stand-in of an object that is not rebuilt: it takes any arguments and state, and does nothing with them."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # it may be the key of a map

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        """Keep the attributes of a plain object, such as a Namespace, as entries."""
        if isinstance(state, dict):
            self.update(state)


def read_weights(path: Path, kind: Kind | None = None) -> WeightFile:
    """Read a file of weights, a folder as the Hugging Face hub has it, or one with a checkpoint such as best_model.pth.

    Of a checkpoint with the raw and the averaged weights, `kind` says which. Raises InputError when it has to be said,
    or when there are none; CorruptionError for a damaged file.
    """
    if path.is_dir():
        return _read_folder(path, kind)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; give a .safetensors, .pth, .pt, .bin or .pth.tar, or a folder"
        )
    _check_beginning(path)
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CorruptionError(f"{path}: cut short or damaged ({error}); copy it again") from None
    else:
        content = unpickle(path)
    return _unwrap(path, content, kind)


def unpickle(path: Path) -> Any:
    """The content of a file of torch.save, with `Inert` in the place of all but tensors and plain values."""
    try:
        names = {*OLD_FORMAT, *torch.serialization.get_unsafe_globals_in_checkpoint(path)}
    except (ValueError, RuntimeError, OSError, pickle.UnpicklingError, LookupError, EOFError):
        names = set(OLD_FORMAT)  # not of the zip format, or damaged, which the next step finds
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in sorted(names)]), catch_warnings():
            simplefilter("ignore")  # of other pickle protocols and TorchScript, which an error says better
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split("WeightsUnpickler error: ")[-1].split())[:100]
        raise InputError(
            f"{path}: not plain tensors, and nothing in it was run ({reason}); give .safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0][:100]
        if "TorchScript" in reason:
            raise InputError(
                f"{path}: a program of TorchScript, which is not run; save network.state_dict()"
            ) from None
        raise CorruptionError(f"{path}: cut short or damaged ({reason}); copy it again") from None


def _check_beginning(path: Path) -> None:
    """Refuse web pages and git pointers that were saved in place of weights."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip().lower()
    for mark, what in ((b"<", "a web page"), (b"version https://git-lfs", "a pointer of Git LFS")):
        if start.startswith(mark):
            raise InputError(f"{path}: {what}, not weights; download the file itself")


def _read_folder(folder: Path, kind: Kind | None) -> WeightFile:
    """The weights of a folder, in a file named as hubs or training programs do, and the network in its config.json."""
    path = next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)
    path = path or _checkpoint_in(folder)
    file = read_weights(path, kind)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = str(config.get("architecture") or config.get("model_type") or "")
    except (OSError, ValueError, AttributeError):  # the config only names the network; its tensors decide
        architecture = ""
    return WeightFile(path, file.tensors, file.key, architecture or file.architecture)


def _checkpoint_in(folder: Path) -> Path:
    """The only checkpoint of a folder, or its only one that is called best; InputError for none or several."""
    found = sorted(path for path in folder.iterdir() if path.name.endswith(CHECKPOINTS) and path.is_file())
    found = [path for path in found if BEST in path.name] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{folder}: has {', '.join(path.name for path in found)}; give one of these files")
    parts = sorted(folder.glob("*-00001-of-*"))
    what = f"its weights are in parts ({parts[0].name}, ...)" if parts else "no weights in it"
    raise InputError(f"{folder}: {what}; give a folder with {' or '.join(FOLDER_FILES)} or a .pth, or a file")


def _unwrap(path: Path, content: Any, kind: Kind | None) -> WeightFile:
    """The tensors within the dictionaries that training programs put around them."""
    key, architecture = "", ""
    if isinstance(content, dict) and "fastflower" in content and isinstance(content.get("tensors"), dict):
        tensors = handed_in(content["tensors"])  # a member: its head is of its own classes
        content = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    while isinstance(content, dict) and (inner := _choose(path, content, None if key else kind)):
        architecture = architecture or _architecture(content)
        key = f"{key}.{inner}" if key else inner
        content = content[inner]
    plain = isinstance(content, dict) and not isinstance(content, Inert)
    if not (plain and content and all(isinstance(tensor, Tensor) for tensor in content.values())):
        raise InputError(f"{path}: holds no dictionary of tensors; save network.state_dict() and give that")
    if kind and not key:
        raise InputError(f"{path}: holds one set of weights; leave out --{kind}")
    content.pop("n_averaged", None)  # the counter of torch's AveragedModel
    return WeightFile(
        path, {_strip(str(name)): tensor for name, tensor in content.items()}, key, architecture
    )


def _choose(path: Path, content: Mapping[Any, Any], kind: Kind | None) -> str | None:
    """The key of the weights in a checkpoint; None where the content is the weights."""
    found: dict[Kind, str] = {
        name: key
        for name, keys in WRAPPERS.items()
        if (key := next((k for k in keys if isinstance(content.get(k), dict) and content[k]), None))
    }
    if kind is None and len(found) > 1:
        raise InputError(
            f"{path}: holds {found['raw']} (raw weights) and {found['ema']} (their moving average, mostly the better "
            "ones); choose by --raw or --ema of python -m fastflower.weights"
        )
    if found and kind and kind not in found:
        raise InputError(
            f"{path}: has no {kind} weights, only {', '.join(found.values())}; leave out --{kind}"
        )
    return found.get(kind) if kind else next(iter(found.values()), None)


def _architecture(content: Mapping[Any, Any]) -> str:
    """The name of the network in a checkpoint of timm's train.py."""
    options = content.get("args")
    named = content.get("arch") or (options.get("model") if isinstance(options, Inert) else None)
    return named if isinstance(named, str) else ""


def _strip(name: str) -> str:
    """A tensor's name as the network itself has it, without those of the modules around it."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
    return name
