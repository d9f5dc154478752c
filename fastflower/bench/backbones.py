"""`bench backbones`: takes one network of every family of timm through training and hand-in, at tiny size.

Each is built for two image sizes, or for the one that it takes, grouped for layer-wise learning rates, trained for a
step at each size, rebuilt from its description, exported, and its program is run and compared with it. A network
passes, is refused before its first step with the line that a user would see, or fails. Finished networks are kept in
a file, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fnmatch
import json
import os
import resource
import select
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from unittest import mock

from fastflower.core.errors import InputError
from fastflower.core.files import write_atomic

if TYPE_CHECKING:
    from torch import nn

    from fastflower.recipe import Recipe

# a small network of each module of timm, and of each family in them that contests use
NETWORKS = """
beit_base_patch16_224 beitv2_base_patch16_224 eca_botnext26ts_256 lambda_resnet26t halonet26t regnetz_b16 repvgg_a0
cait_xxs24_224 coat_tiny coat_lite_tiny convit_tiny convmixer_768_32 convnext_zepto_rms convnextv2_atto cpubone_nano
crossvit_9_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deepseek_vit_412m deit3_small_patch16_224
deit_tiny_distilled_patch16_224 densenet121 dla46_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0
efficientnet_b0 tf_efficientnet_lite0 tf_efficientnetv2_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0
eva02_tiny_patch14_224 vit_small_patch16_dinov3 vit_small_patch16_rope_mixed_224 fasternet_t0 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_a hgnetv2_b0 hiera_tiny_224 hieradet_small
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s
lowformer_b0 mambaout_femto maxvit_pico_rw_256 maxvit_tiny_tf_224 coatnet_nano_rw_224 coatnet_rmlp_nano_rw_224
caformer_s18 convformer_s18 poolformer_s12 mixer_s32_224 gmlp_ti16_224 resmlp_12_224 mobilenetv3_small_050
mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium_075 mobilenetv5_base mobilevit_xxs mobilevitv2_050 mvitv2_tiny
naflexvit_base_patch16_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 eca_nfnet_l0 pit_ti_224
pit_ti_distilled_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9
res2net50_14w_8s resnest14d resnet10t resnext50_32x4d resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18
sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
swinv2_cr_tiny_ns_224 tiny_vit_5m_224 tnt_s_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small vgg11
visformer_tiny vit_tiny_patch16_224 vit_base_patch16_siglip_224 vit_small_patch14_dinov2 vit_tiny_r_s16_p8_224
vit_relpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
legacy_xception xception41 xcit_nano_12_p16_224
"""
FAMILIES = tuple(NETWORKS.split())
# builder arguments of those that are large at their smallest
REDUCED: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"depth": 4},
    "beitv2_base_patch16_224": {"depth": 4},
    "naflexvit_base_patch16_gap": {"depth": 4},
    "samvit_base_patch16_224": {"depth": 4, "global_attn_indexes": (1, 3)},
    "vit_base_patch16_siglip_224": {"depth": 4},
    "gemma4_vit_167m": {"depth": 4},
    "qwen3_vit_88m": {"depth": 4},
    "deepseek_vit_412m": {"depth": 4},
    "sequencer2d_s": {"layers": (1, 1, 2, 1)},
}
SIZES = ([64, 96], [128, 160], [224, 256])  # the first that a network takes, or can be built for
CLASSES, BATCH = 4, 2
RESULTS = Path("results/benchmarks/backbones.json")


@dataclass(frozen=True)
class Row:
    """The outcome of one network: `state` is passes, refused or fails; sizes are those of the two steps."""

    name: str
    module: str
    state: str
    sizes: list[int]
    millions: float
    parts: list[float]  # shares of the parameters in front, middle and back
    half: bool
    seconds: float
    note: str


def main(argv: list[str]) -> int | None:
    parser = argparse.ArgumentParser(
        "python -m fastflower.bench backbones", description=__doc__.split("\n")[0]
    )
    parser.add_argument("pattern", nargs="?", default="", help="glob of timm's names, such as '*vit*'")
    parser.add_argument("--results", type=Path, default=RESULTS, help="finished networks, read and written")
    parser.add_argument("--table", type=Path, help="write the table of all finished networks to this file")
    parser.add_argument("--seconds", type=float, default=300.0, help="limit of one network")
    parser.add_argument("--memory", type=int, default=8000, help="limit of one network in MB")
    parser.add_argument("--again", action="store_true", help="also those that are finished, and match")
    args = parser.parse_args(argv)
    names = chosen(args.pattern)
    rows = read_rows(args.results)
    for name in names:
        if name in rows and not args.again:
            continue
        rows[name] = in_child(name, seconds=args.seconds, memory=args.memory)
        args.results.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(
            args.results, json.dumps({key: asdict(row) for key, row in rows.items()}, indent=1) + "\n"
        )
        row = rows[name]
        print(f"{row.state:<8}{name:<36}{row.sizes!s:<12}{row.seconds:5.1f} s  {row.note}", flush=True)
    shown = [rows[name] for name in names]
    print(summary(shown))
    if args.table:
        write_atomic(args.table, table(list(rows.values())))
        print(f"wrote {args.table}")
    return int(any(row.state == "fails" for row in shown))


def chosen(pattern: str) -> list[str]:
    """The families that match a pattern, else timm's networks that do; InputError without any."""
    import timm

    if not pattern:
        return list(FAMILIES)
    names = fnmatch.filter(FAMILIES, pattern) or timm.list_models(pattern)
    if not names:
        raise InputError(
            f"bench backbones: no network of timm {timm.__version__} matches {pattern}; see timm.list_models()"
        )
    return list(names)


def read_rows(path: Path) -> dict[str, Row]:
    """The finished networks of an earlier run of the same version of timm."""
    if not path.is_file():
        return {}
    try:
        return {name: Row(**row) for name, row in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError):
        raise InputError(
            f"--results {path}: not written by bench backbones; delete it or give another file"
        ) from None


def in_child(name: str, *, seconds: float, memory: int) -> Row:
    """The outcome of a network, found in a forked process that a limit of time and memory ends."""
    import timm
    import torch

    import fastflower.bundle.program
    import fastflower.optim.optimizers  # noqa: F401  # imported once, before the fork

    torch.set_num_threads(1)
    module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    empty = Row(name, module, "fails", [], 0.0, [], False, 0.0, "")
    start = time.monotonic()
    with tempfile.TemporaryFile() as messages:
        text, status, in_time = _fork(empty, messages, seconds=seconds, memory=memory)
        messages.seek(0)
        last = (messages.read().decode(errors="replace").strip().splitlines() or [""])[-1]
    if text:
        row = Row(**json.loads(text))
    else:
        ended = (
            f"its process ended with {status}: {last[:160]}" if in_time else f"took more than {seconds:g} s"
        )
        row = replace(empty, note=ended)
    return replace(row, seconds=round(time.monotonic() - start, 1))


def _fork(empty: Row, messages: IO[bytes], *, seconds: float, memory: int) -> tuple[str, int, bool]:
    """Run a network in a child process: the text of its row, its exit status, and True if it ended in time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            resource.setrlimit(resource.RLIMIT_DATA, (memory << 20, memory << 20))
            with silence(messages):
                row = outcome(empty)
            os.write(writer, json.dumps(asdict(row)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], seconds)
    if not ready:
        os.kill(child, signal.SIGKILL)
    with open(reader, "rb") as pipe:
        text = pipe.read().decode()
    return text, os.waitpid(child, 0)[1], bool(ready)


@contextlib.contextmanager
def silence(messages: IO[bytes]) -> Iterator[None]:
    """Context manager: output and warnings of networks go to a file."""
    for descriptor in (1, 2):
        os.dup2(messages.fileno(), descriptor)
    yield


def outcome(empty: Row) -> Row:
    """Take a network from training to hand-in; the row has the step at which it ended."""
    import timm

    found, create = asdict(empty), timm.create_model

    def reduced(name: str, **arguments: Any) -> nn.Module:
        return create(name, **{**REDUCED.get(name, {}), **arguments})

    try:
        with mock.patch.object(timm, "create_model", reduced):
            for part in (prepare, train, hand_in):
                found = part(found)
    except InputError as error:
        found |= {"state": "refused" if "trained" not in found else "fails", "note": str(error)}
    except MemoryError:
        found |= {"state": "fails", "note": "out of memory"}
    except Exception as error:  # a traceback that a user would see
        found |= {"state": "fails", "note": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    else:
        found |= {"state": "passes"}
    return Row(**{key: value for key, value in found.items() if key in asdict(empty)})


def prepare(found: dict[str, Any]) -> dict[str, Any]:
    """Build the network at the first sizes that it takes, group its parameters, try its program."""
    import torch

    from fastflower.bundle.program import try_export
    from fastflower.model.network import fitted, training_network
    from fastflower.optim.groups import param_groups
    from fastflower.recipe.derived import image_sizes

    torch.manual_seed(0)
    for number, sizes in enumerate(SIZES):
        recipe = small_recipe(found["name"], sizes)
        try:
            recipe, lines = fitted(recipe)
        except InputError:
            if number == len(SIZES) - 1:
                raise
            continue
        break
    network, spec, _ = training_network(recipe, CLASSES)
    groups = param_groups(network, 1e-3, recipe)
    try_export(spec, network, [(side, side) for side in recipe.tta.scales])
    numbers = dict.fromkeys(("front", "middle", "back", "head"), 0)
    for group in groups:
        numbers[group["part"]] += sum(parameter.numel() for parameter in group["params"])
    backbone = sum(numbers.values()) - numbers["head"]
    return found | {
        "sizes": [height for height, _ in image_sizes(recipe)],
        "millions": round(backbone / 1e6, 1),
        "parts": [round(numbers[part] / backbone, 3) for part in ("front", "middle", "back")],
        "note": "; ".join(lines),
        "objects": (recipe, network, spec, groups),
    }


def small_recipe(name: str, sizes: list[int]) -> Recipe:
    """A recipe of layer-wise learning rates at small sizes, viewed at the last."""
    from fastflower.recipe import load

    words = [
        f"model.backbone={name}",
        f"data.img_size={sizes}",
        f"tta.scales=[{sizes[-1]}]",
        "llrd.enabled=true",
    ]
    return load(None, [*words, "model.pretrained=false", "opt.name=sgd"])


def train(found: dict[str, Any]) -> dict[str, Any]:
    """Take a step at each size, and two where there is one size only."""
    import torch
    from torch.nn import functional as F

    from fastflower.optim.optimizers import build_optimizer

    recipe, network, _, groups = found["objects"]
    optimizer = build_optimizer(groups, recipe, torch.device("cpu"))
    network.train()
    for size in (found["sizes"] * 2)[:2]:
        images = 255 * torch.rand(BATCH, 3, size, size)
        loss = F.cross_entropy(network(images), torch.arange(BATCH) % CLASSES)
        loss.backward()
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"the loss is {float(loss)}")
        unused = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if unused:
        found["note"] = "; ".join(
            filter(None, [found["note"], f"no gradient for {len(unused)} tensors ({unused[0]})"])
        )
    return found | {"trained": True}


def hand_in(found: dict[str, Any]) -> dict[str, Any]:
    """Rebuild the trained network from its description, export it, and compare its program with it."""
    import torch

    from fastflower.bundle.program import TOLERANCE, trace
    from fastflower.model.network import build_network

    recipe, network, spec, _ = found["objects"]
    rebuilt = build_network(spec)
    rebuilt.load_state_dict(network.state_dict())
    side = recipe.tta.scales[-1]
    images = 255 * torch.rand(1, 3, side, side)
    with torch.inference_mode():
        want = network.eval()(images)
        gap = float((rebuilt.eval()(images) - want).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(want.abs().max())):
        raise ValueError(f"rebuilt from its description it gives logits {gap:.2g} off")
    del network, found["objects"]
    tensors = dict(rebuilt.state_dict())
    program = trace(Path(found["name"]), rebuilt, height=side, width=side, tensors=tensors)
    return found | {"half": program.half_keeps is not None}


def summary(rows: list[Row]) -> str:
    """The number of networks in each state."""
    counts = {state: sum(row.state == state for row in rows) for state in ("passes", "refused", "fails")}
    two = sum(row.state == "passes" and len(row.sizes) > 1 for row in rows)
    return (
        f"{len(rows)} networks: {counts['passes']} pass ({two} at two sizes, {counts['passes'] - two} at one), "
        f"{counts['refused']} are refused before training, {counts['fails']} fail"
    )


def table(rows: list[Row]) -> str:
    """The table of all networks as Markdown, with versions, date and command."""
    import timm
    import torch

    order = {"fails": 0, "refused": 1, "passes": 2}
    lines = [
        "# Backbones",
        "",
        f"One small network of every family of timm {timm.__version__} (torch {torch.__version__.partition('+')[0]}), "
        f"{datetime.date.today()}, by",
        "`python -m fastflower.bench backbones --table docs/backbones.md` on one CPU thread: built, grouped for "
        "layer-wise learning rates,",
        "trained for a step at each size, rebuilt from its description, exported, and its program compared with it.",
        "",
        f"**{summary(rows)}.**",
        "",
        "*Sizes*: those trained at, of two asked for. *Parts*: percent of the parameters in front, middle and back.",
        "*Half*: the program also runs in half precision. Networks with a star were built with fewer blocks.",
        "",
        "| network | module | result | sizes | M | parts | half | note |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (order[row.state], row.module, row.name)):
        parts = " ".join(f"{100 * share:.0f}" for share in row.parts)
        sizes, star = ", ".join(map(str, row.sizes)), "*" if row.name in REDUCED else ""
        note = row.note.replace("|", "\\|")
        half = "yes" if row.half else "no" if row.state == "passes" else ""
        cells = (row.name + star, row.module, row.state, sizes, f"{row.millions:g}", parts, half, note)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
