"""The recipe: every key of a training, its default, its range and its meaning, in one place.

A recipe file says only what differs from these defaults, which are seed 000's (its sections 10 and 11).
`load` merges defaults <- base recipes <- the file <- `key=value` words, and refuses unknown keys, wrong
types, values out of range and contradictions before anything starts, in one line.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Auto = Literal["auto"]


def key(default: Any, doc: str, **limits: Any) -> Any:
    """A recipe key: default, meaning, and any of the limits gt, ge, lt, le (for lists, of every item)."""
    metadata = {"doc": doc, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Exp:
    name: str = key("", "name of the experiment's folders; empty: the recipe file's stem")


@dataclass
class Data:
    root: str = key("data/train", "folder of training images, or the .npz, .npy or .csv that holds them")
    csv: str = key("data/train_labels.csv", "label file, where data.root holds no labels")
    form: Literal["auto", "csv", "folders", "pixels", "arrays", "pairs"] = key(
        "auto", "how images and labels come, see data/sources.py; auto: by what data.root is"
    )
    arrays: Any = key("auto", "names in a .npz: [images, labels], or [first, second, labels] for pairs")
    shape: Any = key("auto", "[height, width] of images that come as flat rows of pixels; auto: square")
    val: str = key("", "images that validate, in the form of data.root; empty: folds of data.root")
    unlabelled: str = key("", "images without labels, a folder or file, for semi-supervised training")
    image_col: str = key("filename", "column with the file name")
    label_col: str = key("category_id", "column with the organiser's class id")
    flips_keep_class: bool = key(
        True, "a mirrored image is of its class; false, as for digits: flips are refused"
    )
    num_classes: int | Auto = key("auto", "number of classes; auto: the unique ids of the label file")
    home: str = key("data", "where convert writes classes.csv, folds.csv and betons/")
    test: str = key("test_dataset", "folder of the images to be predicted; never read in training")
    split: Literal["stratified", "stratified_group", "kfold", "ratio", "given"] = key(
        "stratified_group", "how rows become folds, near-duplicates always together; given: by data.fold_col"
    )
    n_splits: int = key(5, "number of folds; a ratio split holds out 1/n_splits once", ge=1)
    fold_col: str = key("fold", "column of given folds: numbers, -1 to train always, or train and val")
    fold_csv: str = key("", "file with that column and data.image_col; empty: data.csv")
    fold: Any = key(0, "validation fold: a number, a list of numbers, or all")
    labels_per_class: int | None = key(
        None, "training images of each class whose labels are used; null: all. The rest is unlabelled", ge=1
    )
    group: Literal["auto", "none", "phash", "embedding"] = key(
        "auto", "near-duplicate groups by perceptual hash; auto: when hashing takes under a minute"
    )
    group_threshold: int = key(4, "phash: largest Hamming distance (of 64 bits) of a pair", ge=0, le=8)
    group_backbone: str = key("auto", "embedding: pretrained timm backbone; auto: model.backbone")
    group_cosine: float = key(0.95, "embedding: least cosine similarity of a pair", ge=0, le=1)
    img_size: Any = key([224, 320], "square size, list of sizes by stage, or [[height, width]]")
    size_epochs: Any = key("auto", "last epoch of each stage, from 1; auto: in the proportion 15 : 25 : 8")
    store: Literal["auto", "jpeg", "raw"] = key(
        "auto", "how betons hold pixels; auto: raw when they fit in data.raw_share of memory and of the disk"
    )
    raw_share: float = key(0.4, "share of memory that raw betons may take", gt=0, le=0.9)
    jpeg_quality: int = key(95, "quality when an image must be encoded again", ge=50, le=100)
    on_bad: Literal["error", "skip"] = key("error", "what convert does with unreadable images")
    workers: int = key(0, "threads that decode, and processes that convert; 0: the machine's cores", ge=0)
    mean: Any = key("auto", "normalisation mean in 0..1; auto: the backbone's")
    std: Any = key("auto", "normalisation deviation in 0..1; auto: the backbone's")


@dataclass
class Aug:
    strength: float = key(1.0, "multiplies every random strength and probability; 0: crop only", ge=0, le=2)
    rrc_scale: list[float] = key([0.8, 1.0], "area of the random crop", gt=0, le=1)
    rrc_ratio: list[float] = key([0.75, 1.3333], "aspect of the random crop", gt=0)
    hflip_p: float = key(0.5, "horizontal flip", ge=0, le=1)
    vflip_p: float = key(0.1, "vertical flip", ge=0, le=1)
    rotation_deg: float = key(10.0, "rotation in +- degrees, filled by reflection", ge=0, le=180)
    jitter: list[float] = key([0.2, 0.2, 0.2, 0.1], "brightness, contrast, saturation, hue", ge=0, le=1)
    photometric_p: float = key(0.0, "photometric distortion: probability of each of its parts", ge=0, le=1)
    clahe_p: float = key(0.0, "share of images with locally equalised luminance (CLAHE)", ge=0, le=1)
    clahe_clip: float = key(4.0, "CLAHE: largest clip limit", ge=1)
    clahe_tiles: int = key(8, "CLAHE: tiles a side", ge=1, le=32)
    randaugment_n: int = key(0, "RandAugment: operations an image; 0: off", ge=0, le=8)
    randaugment_m: int = key(9, "RandAugment: magnitude of 30", ge=0, le=30)
    augmix_p: float = key(0.0, "share of images that get a light AugMix", ge=0, le=1)
    corrupt_p: float = key(0.0, "share of images that get light blur or noise", ge=0, le=1)


@dataclass
class Sampler:
    type: Literal["none", "weighted_en", "weighted_inv", "class_balanced", "repeat_factor"] = key(
        "weighted_en", "how an epoch's rows are drawn"
    )
    beta: float = key(0.999, "effective number: (1 - beta^n) / (1 - beta)", ge=0, lt=1)
    oversample_cap: float = key(3.0, "most draws of a class in an epoch, as a multiple of its images", ge=1)
    rf_alpha: float = key(0.5, "repeat factor: exponent", ge=0, le=1)
    rf_t: float | int | Literal["median"] = key("median", "repeat factor: threshold class size")
    undersample_frac: float = key(0.0, "share of the largest classes' images left out", ge=0, le=0.2)
    passes: int = key(1, "times that an epoch goes through the training images", ge=1)


@dataclass
class Model:
    backbone: str = key("convnextv2_base.fcmae_ft_in22k_in1k", "timm's name, with its pretrained tag")
    pretrained: bool = key(True, "start from results/model/pretrained_model/; false: from scratch")
    head: Literal["linear", "arcface", "cosface"] = key("linear", "classifier on the pooled features")
    margin: float = key(0.3, "margin of arcface (radians) and cosface", ge=0, lt=1)
    head_scale: float = key(30.0, "scale of the cosine logits", gt=0)
    drop_rate: float = key(0.0, "dropout before the head", ge=0, lt=1)
    drop_path: float = key(0.0, "stochastic depth", ge=0, lt=1)
    grad_checkpointing: bool = key(False, "recompute activations to save memory")


@dataclass
class Loss:
    name: Literal["lsce", "ce", "focal", "bsce", "bce"] = key("lsce", "loss; all but ce smooth by reg.ls_eps")
    focal_gamma: float = key(2.0, "focusing exponent", ge=0)
    pos_weight: float | int | Auto = key(
        1.0, "bce: weight of a class's own images (of two classes, the second's); auto: others / own", gt=0
    )


@dataclass
class Distill:
    teacher: list[str] = key([], "experiments whose out-of-fold logits teach, averaged; none: labels only")
    weight: float = key(0.7, "the teacher's share of the loss; the labels' loss has the rest", ge=0, le=1)
    temperature: float = key(3.0, "softens teacher and student", gt=0)
    t_squared: bool = key(
        True, "multiply the teacher's part by temperature^2, which keeps its gradients' size"
    )


@dataclass
class Opt:
    name: Literal["adamw", "sgd"] = key("adamw", "optimiser")
    lr: float | int | Auto = key("auto", "explicit lr: no scaling, no bounds; auto: from lr_ref")
    lr_ref: float = key(2.0e-4, "lr at a global batch of lr_ref_batch", gt=0)
    lr_ref_batch: int = key(256, "the batch of lr_ref", ge=1)
    lr_min_bound: float = key(5e-6, "smallest derived lr", gt=0)
    lr_max_bound: float = key(5e-4, "largest derived lr", gt=0)
    large_batch_factor: float = key(1.0, "factor on the derived lr above large_batch_threshold", gt=0, le=1)
    large_batch_threshold: int = key(512, "global batch from which large_batch_factor applies", ge=1)
    weight_decay: float = key(0.05, "decoupled weight decay", ge=0)
    no_decay_norm_bias: bool = key(True, "no weight decay on norms, biases and position embeddings")
    momentum: float = key(0.9, "momentum of sgd", ge=0, lt=1)
    clip_grad: float | None = key(None, "another name of train.clip_grad")


@dataclass
class Train:
    batch_per_gpu: int = key(64, "images on one device in one forward pass", ge=1)
    world_size: int = key(2, "devices the recipe is written for; the real number decides the lr", ge=1)
    grad_accum: int = key(1, "forward passes of one optimiser step", ge=1)
    stage_batch: Any = key(None, "batch_per_gpu by stage, when memory asks for less; the lr follows")
    amp: bool = key(True, "bf16 (or fp16) on GPUs; a CPU always computes in fp32")
    clip_grad: float | None = key(1.0, "largest global gradient norm; null: no clipping", gt=0)
    sync_bn: bool = key(True, "synchronised BatchNorm on several GPUs")
    channels_last: bool = key(True, "memory format of the network")
    compile: bool = key(False, "torch.compile; costs minutes at each image size")
    max_nonfinite: int = key(10, "non-finite steps in a row after which the run stops", ge=1)
    save_every: str = key("1ep", "how often last.pth is written: 1ep, 200ba")
    keep_every: int = key(0, "epochs between copies of last.pth that stay as epoch__*.pth; 0: none", ge=0)


@dataclass
class Sched:
    name: Literal["warmup_cosine", "plateau", "none"] = key("warmup_cosine", "course of the lr")
    warmup_epochs: int = key(5, "epochs of linear warm-up, inside the horizon", ge=0)
    cosine_epochs: int = key(40, "the horizon: all epochs, warm-up included", ge=1)
    eta_min: float = key(0.0, "last lr as a share of the first", ge=0, lt=1)
    factor: float = key(0.5, "plateau: factor on the lr", gt=0, lt=1)
    patience: int = key(3, "plateau: epochs without improvement before the lr falls", ge=0)
    monitor: Literal["score", "val_loss"] = key(
        "score", "plateau: what should rise (score) or fall (val_loss)"
    )


@dataclass
class LrFind:
    low: float = key(1e-7, "first lr of a sweep", gt=0)
    high: float = key(1.0, "last lr of a sweep", gt=0)
    steps: int = key(200, "steps of a sweep", ge=10)


@dataclass
class Llrd:
    enabled: bool = key(True, "layer-wise lr")
    multipliers: list[float] = key([0.25, 0.5, 1.0, 1.5], "factors on the lr, first part to head", ge=0)
    unfreeze_schedule: Any = key(None, "map of epoch -> parts that train from then on; null: all, always")


@dataclass
class Reg:
    ls_eps: float = key(0.05, "label smoothing", ge=0, lt=1)
    mixup: float = key(0.2, "MixUp's Beta parameter; 0: off", ge=0)
    cutmix: float = key(0.8, "CutMix's Beta parameter; 0: off", ge=0)
    mix_prob: float = key(
        0.4, "probability that a batch is mixed at all; aug.strength leaves it alone", ge=0, le=1
    )
    mix_switch_prob: float = key(0.5, "of the mixed batches, the share that is CutMix", ge=0, le=1)
    mix_final_epoch: int | Auto = key("auto", "epoch from which mix_prob_final holds; auto: a third stage's")
    mix_prob_final: float = key(0.0, "mix_prob at the end", ge=0, le=1)
    erase_p: float = key(0.1, "RandomErasing", ge=0, le=1)


@dataclass
class Semi:
    enabled: bool = key(False, "learn from unlabelled images too")
    method: Literal["fixmatch", "pseudo"] = key(
        "fixmatch", "what learns a weak view's label: the strong view, or (pseudo) the weak view itself"
    )
    threshold: float = key(0.95, "confidence from which a weak view's prediction is a label", ge=0, le=1)
    align: bool = key(False, "pull the weak views' predictions to the labels' shares of classes")
    mu: int = key(7, "unlabelled images beside each labelled one", ge=1)
    lambda_u: float = key(1.0, "weight of the loss on unlabelled images", ge=0)
    ramp_epochs: int = key(0, "epochs over which lambda_u rises from 0", ge=0)
    teacher: Literal["raw", "ema"] = key("raw", "the weights that label the weak views")
    weak_scale: list[float] = key([0.8, 1.0], "area of a weak view's crop; it is flipped too", gt=0, le=1)
    randaugment_n: int = key(2, "strong view: RandAugment's operations, on top of aug", ge=0, le=8)
    randaugment_m: int = key(10, "strong view: RandAugment's magnitude of 30", ge=0, le=30)
    erase_p: float = key(1.0, "strong view: RandomErasing", ge=0, le=1)


@dataclass
class Ema:
    enabled: bool = key(True, "keep an exponential moving average of the weights")
    decay: float = key(0.9999, "decay a step", gt=0, lt=1)
    warmup: bool = key(True, "ramp the decay as (1 + t) / (10 + t)")


@dataclass
class Swa:
    enabled: bool = key(False, "average the raw weights of the last epochs; scored like the others")
    start: float = key(0.75, "share of the horizon after which averaging starts", ge=0, lt=1)


@dataclass
class Robust:
    enabled: bool = key(True, "score a corrupted copy of the validation images too")
    kinds: list[str] = key(["gaussian_noise", "blur", "brightness", "jpeg", "occlusion"], "corruptions")
    level: Literal["low", "medium", "low_medium"] = key("low", "strength; low_medium: both")


@dataclass
class Es:
    enabled: bool = key(True, "stop early")
    patience: int = key(10, "epochs without improvement", ge=1)
    min_delta: float = key(0.001, "smallest improvement that counts", ge=0)
    reset_on_stage: bool = key(True, "restart the count, and the best, when the image size grows")


@dataclass
class Select:
    metric: Literal["clean", "combo"] = key("combo", "what best means; combo: S")
    alpha: float = key(0.7, "weight of clean in S = alpha * clean + (1 - alpha) * corrupted", ge=0, le=1)


@dataclass
class Eval:
    resize_factor: float = key(1.14, "short side over image size before the centre crop", ge=1, le=2)
    batch: int = key(0, "images in one evaluation pass; 0: batch_per_gpu", ge=0)
    ece_bins: int = key(15, "bins of the calibration error", ge=2)


@dataclass
class Tta:
    scales: list[int] = key([320, 384], "image sizes of the views", ge=16)
    hflip: bool = key(True, "each view mirrored as well")


@dataclass
class Ensembling:
    find_pattern: str = key("best_combo__*fold*_seed*_epoch*_score*.pth", "members below results/model/<exp>")
    weighting: Literal["flat", "family", "hand", "learned", "greedy"] = key(
        "flat",
        "of runs: equal, backbones equal, by ensembling.weights, by NLL, or greedily in bundle's limits",
    )
    weights: Any = key(None, "hand: map of a backbone, or '<backbone> seed <seed>', to its weight")
    soup: Literal["none", "checkpoints", "folds"] = key(
        "none",
        "average weights of each fold's own checkpoints, or of all folds, where out-of-fold scores agree",
    )


@dataclass
class Ts:
    enabled: bool = key(True, "temperature scaling, fitted on out-of-fold logits")
    fit_on: Literal["clean", "combo"] = key("clean", "combo: clean and corrupted, weighted by select.alpha")


@dataclass
class Accept:
    clean_min: float | None = key(None, "least clean top-1 of the fused set; null: none is asked", ge=0, le=1)
    corrupted_min: float | None = key(None, "least corrupted top-1 of the fused set", ge=0, le=1)
    macro_drop_max: float | None = key(
        None, "most that a member's macro F1 may lie below its best epoch at that size", ge=0, le=1
    )


@dataclass
class Bundle:
    max_mb: float = key(500.0, "largest hand-in in megabytes", gt=0)
    max_ms: float = key(100.0, "largest time an image in milliseconds, on this machine", gt=0)
    members: Literal["all", "greedy"] = key(
        "all", "all that ensembling.find_pattern finds; greedy: the best out of fold within max_mb and max_ms"
    )
    dtype: Literal["fp16", "fp32", "int8"] = key("fp16", "stored weights; int8: a scale for each channel")
    half: Literal["gpu", "all", "none"] = key(
        "gpu", "devices that compute in half precision; all: also CPUs with bf16, up to twice as fast"
    )
    max_loss: float = key(
        0.01,
        "share of held-out photographs that storing, packing and half precision may each cost",
        ge=0,
        lt=1,
    )
    columns: Literal["three", "two", "binary", "sample"] = key(
        "sample",
        "of the submission; binary: the second of two classes' probability in the place of the confidence; "
        "sample: as ref/predictions_sample.csv has them, else three",
    )


@dataclass
class Cudnn:
    deterministic: bool = key(True, "deterministic algorithms")
    benchmark: bool = key(False, "let cuDNN search for fast algorithms")


@dataclass
class Log:
    tensorboard: bool = key(True, "write TensorBoard events")
    wandb: bool = key(False, "log to Weights & Biases as well; pip install -e '.[wandb]'")
    mlflow: bool = key(False, "log to MLflow as well; pip install -e '.[mlflow]'")


@dataclass
class Checks:
    allow_double_correction: bool = key(False, "let a balancing sampler and balanced softmax run together")
    allow_flips: bool = key(
        False, "flip images although data.flips_keep_class says that it changes their class"
    )
    allow_unlabelled_test: bool = key(False, "let data.unlabelled be the images to be predicted")


@dataclass
class Recipe:
    """A whole recipe; `recipe.data.root` is the key `data.root`."""

    seed: int = key(42, "seeds the split, the initial weights, order, crops, augmentation and mixing", ge=0)
    exp: Exp = field(default_factory=Exp)
    data: Data = field(default_factory=Data)
    aug: Aug = field(default_factory=Aug)
    sampler: Sampler = field(default_factory=Sampler)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    distill: Distill = field(default_factory=Distill)
    opt: Opt = field(default_factory=Opt)
    train: Train = field(default_factory=Train)
    sched: Sched = field(default_factory=Sched)
    lrfind: LrFind = field(default_factory=LrFind)
    llrd: Llrd = field(default_factory=Llrd)
    reg: Reg = field(default_factory=Reg)
    semi: Semi = field(default_factory=Semi)
    ema: Ema = field(default_factory=Ema)
    swa: Swa = field(default_factory=Swa)
    robust: Robust = field(default_factory=Robust)
    es: Es = field(default_factory=Es)
    select: Select = field(default_factory=Select)
    eval: Eval = field(default_factory=Eval)
    tta: Tta = field(default_factory=Tta)
    ensembling: Ensembling = field(default_factory=Ensembling)
    ts: Ts = field(default_factory=Ts)
    accept: Accept = field(default_factory=Accept)
    bundle: Bundle = field(default_factory=Bundle)
    cudnn: Cudnn = field(default_factory=Cudnn)
    log: Log = field(default_factory=Log)
    checks: Checks = field(default_factory=Checks)


def fields_of(node: Any, prefix: str = "") -> list[tuple[str, Any, dataclasses.Field]]:
    """Every key as (dotted name, value, field), depth first in the order of the schema."""
    rows = []
    for spec in dataclasses.fields(node):
        value = getattr(node, spec.name)
        if dataclasses.is_dataclass(value):
            rows += fields_of(value, f"{prefix}{spec.name}.")
        else:
            rows.append((prefix + spec.name, value, spec))
    return rows
