"""The source of a backbone's published weights, by timm's records, and their download."""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import timm

from fastflower.core import files
from fastflower.core.errors import EnvironmentFault, InputError
from fastflower.model.backbones import check_name

MIRROR = "https://hf-mirror.com"  # of the hub, for users in China
TIMEOUT = 15.0  # seconds without a byte
WEIGHTS = "model.safetensors"  # the file of timm's repositories


@dataclass(frozen=True)
class Published:
    """The weights that timm names for a backbone: on the hub in `repository`, else at `address` alone."""

    name: str  # with the tag
    repository: str
    file: str
    address: str
    licence: str
    parameters: int

    @property
    def page(self) -> str:
        """The page with the description and the licence."""
        return f"{hub()}/{self.repository}" if self.repository else self.address

    @property
    def addresses(self) -> list[str]:
        """The addresses of the file: of HF_ENDPOINT or the hub, then of the mirror."""
        if not self.repository:
            return [self.address]
        path = f"{self.repository}/resolve/main/{self.file}"
        return [f"{host}/{path}" for host in dict.fromkeys((hub(), MIRROR))]


def published(name: str) -> Published:
    """The published weights of a backbone; InputError when timm knows none."""
    check_name(name)
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if config is None or not (config.hf_hub_id or config.url):
        raise InputError(
            f"{name}: timm names no published weights for it; give a file of your own "
            f"(python -m fastflower.weights {name} FILE), or set model.pretrained=false"
        )
    import torch

    with torch.device("meta"):
        parameters = sum(tensor.numel() for tensor in timm.create_model(name).parameters())
    architecture = name.partition(".")[0]
    return Published(
        name=f"{architecture}.{config.tag}" if config.tag else architecture,
        repository=config.hf_hub_id or "",
        file=config.hf_hub_filename or WEIGHTS if config.hf_hub_id else "",
        address=config.url if isinstance(config.url, str) else "",
        licence=config.license or "",
        parameters=parameters,
    )


def download(source: Published, folder: Path) -> Path:
    """Download the weights into a folder, in which an interrupted download goes on; returns the file.

    Raises EnvironmentFault with the cause where that is impossible.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not source.repository:
        return _fetch(source.address, folder)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    _knock(source.addresses[0])
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                source.repository, source.file, local_dir=folder, endpoint=hub(), etag_timeout=TIMEOUT
            )
        )
    except HfHubHTTPError as error:
        code = getattr(error.response, "status_code", 0)
        remedy = {401: "; log in by hf auth login", 403: f"; accept the licence on {source.page}"}.get(
            code, ""
        )
        raise EnvironmentFault(f"{hub()} answers {code}{remedy}") from None
    except OfflineModeIsEnabled:
        raise EnvironmentFault("HF_HUB_OFFLINE forbids the network") from None
    except OSError as error:
        if error.filename:  # of the disk
            raise
        raise EnvironmentFault(_cause(error)) from None
    except Exception as error:  # each version of the hub's library has another HTTP library and its errors
        raise EnvironmentFault(_cause(error)) from None


def _knock(address: str) -> None:
    """Raise EnvironmentFault when a server cannot be reached, in seconds: the hub's library tries for half a minute."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:  # it answers; the hub's library says what it means
        pass
    except OSError as error:
        raise EnvironmentFault(_cause(error)) from None


def _fetch(address: str, folder: Path) -> Path:
    """Download a file that is not on the hub."""
    path = folder / address.rpartition("/")[2]
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer, files.replacing(path) as temporary:
            with open(temporary, "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
            if int(answer.headers.get("Content-Length") or 0) not in (0, temporary.stat().st_size):
                raise EnvironmentFault("the connection ended early")
    except urllib.error.URLError as error:
        raise EnvironmentFault(_cause(error)) from None
    return path


def _cause(error: BaseException) -> str:
    """The innermost cause of a failed connection, in a few words."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return " ".join(str(error).split())[:100] or type(error).__name__


def hub() -> str:
    """The address of the hub: HF_ENDPOINT, or the hub's own."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
