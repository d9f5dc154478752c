"""The recipe: every key of a training with its default, range and meaning.

A recipe file holds only the keys that differ from these defaults. `load` merges the defaults, the base recipes, the
file and the `key=value` changes, in this order, and refuses unknown keys, wrong types, values out of range and
contradictions in one line each. A loaded recipe is never changed; `dataclasses.replace` makes another one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

Auto = Literal["auto"]
Own = str  # beside a Literal: module:function, see core/own_parts.py


def key(default: Any, doc: str, **limits: Any) -> Any:
    """Declare a recipe key by its default, its meaning, and any of the limits gt, ge, lt, le (of every list item)."""
    metadata = {"doc": doc, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


LARGEST_SIDE = 4096  # pixels of an input; beyond it lies a slip of the keyboard


@dataclass(frozen=True)
class Exp:
    name: str = key("", "name of the experiment's folders; empty: the name of the recipe file")


@dataclass(frozen=True)
class Data:
    root: str = key(
        "data/train", "folder of the training images, or the .npz, .npy, .csv or .beton file that holds them"
    )
    csv: str = key("data/train_labels.csv", "label file; unused when data.root holds the labels")
    form: Literal["auto", "csv", "folders", "pixels", "arrays", "pairs", "beton"] = key(
        "auto", "format of the data, see data/readers/sources.py; auto: detected from data.root"
    )
    arrays: Any = key(
        "auto",
        "names of the arrays in a .npz: [images, labels], or [first, second, labels] for pairs; auto: by shape",
    )
    shape: Any = key("auto", "[height, width] of images stored as flat rows of pixels; auto: square")
    val: str = key("", "validation images, in the format of data.root; empty: folds of data.root")
    unlabelled: str = key("", "folder or file of images without labels, for semi-supervised training")
    image_col: str = key("filename", "column of the file names")
    label_col: str = key(
        "category_id", "column of the organiser's class ids; without it, a column of 0 and 1 for each class"
    )
    flips_keep_class: bool = key(
        True, "a mirrored image has the same class; false, as for digits: flips are refused"
    )
    symmetric: bool = key(
        False,
        "pairs: the question does not depend on their order; training exchanges the images of half of them",
    )
    num_classes: int | Auto = key(
        "auto", "number of classes; auto: the number of different ids in the label file"
    )
    home: str = key("data", "folder for classes.csv, folds.csv and betons/, written by convert")
    test: str = key("test_dataset", "folder of the images to predict; never used in training")
    split: Literal["stratified", "stratified_group", "kfold", "ratio", "given", "none"] = key(
        "stratified_group",
        "how images are divided into folds, near-duplicates always together; given: by data.fold_col; none: every "
        "image trains and nothing is scored (after folds, data.fold=none is the training on all images)",
    )
    n_splits: int = key(5, "number of folds; a ratio split holds out 1/n_splits once", ge=1)
    fold_col: str = key(
        "fold", "split=given: column of the folds: numbers from 0, -1 for always training, or train and val"
    )
    fold_csv: str = key(
        "", "split=given: file with the columns data.fold_col and data.image_col; empty: data.csv"
    )
    group_col: str = key(
        "",
        "column of data.csv whose equal values share a fold, such as film, writer or patient; empty: none",
    )
    aux_cols: list[str] = key(
        [],
        "further columns of data.csv, such as [genus, colour]: each trains a head of its own beside the main one, "
        "which alone is handed in; an image may have no value. convert records them",
    )
    fold: Any = key(
        0,
        "validation fold: a number, a list of numbers, or all; none: one more training, on all images, for the epochs "
        "that the folds chose (train.refit_epochs)",
    )
    labels_per_class: int | None = key(
        None,
        "training images of each class that keep their labels, the others become unlabelled; null: all",
        ge=1,
    )
    group: Literal["auto", "none", "phash", "embedding"] = key(
        "auto", "how near-duplicates are found; auto: phash (perceptual hash) if hashing takes under a minute"
    )
    group_threshold: int = key(
        4, "group=phash: largest Hamming distance (of 64 bits) between near-duplicates", ge=0, le=8
    )
    group_backbone: str = key("auto", "group=embedding: pretrained timm backbone; auto: model.backbone")
    group_cosine: float = key(
        0.95, "group=embedding: smallest cosine similarity between near-duplicates", ge=0, le=1
    )
    img_size: Any = key(
        [224, 320], "image size: one square size, a list of sizes by stage, or [[height, width]]"
    )
    resize: Literal["crop", "whole"] = key(
        "crop",
        "images of another aspect than data.img_size are cut (crop), or resized as a whole, without a centre crop",
    )
    size_epochs: Any = key(
        "auto", "last epoch of each stage, counted from 1; auto: stages in the proportion 15 : 25 : 8"
    )
    store: Literal["auto", "jpeg", "raw"] = key(
        "auto",
        "pixel format of betons; auto: raw if they fit in data.raw_share of memory and of the free disk",
    )
    raw_share: float = key(
        0.4, "store=auto: fraction of memory, and of the free disk, that raw betons may take", gt=0, le=0.9
    )
    jpeg_quality: int = key(95, "JPEG quality of images that must be encoded again", ge=50, le=100)
    on_bad: Literal["error", "skip"] = key("error", "what convert does with unreadable images")
    workers: int = key(
        0, "decoding threads in training, processes in convert; 0: the number of CPU cores", ge=0
    )
    mean: Any = key("auto", "normalisation mean of the three channels, in 0..1; auto: the backbone's")
    std: Any = key(
        "auto", "normalisation standard deviation of the three channels, in 0..1; auto: the backbone's"
    )


@dataclass(frozen=True)
class Aug:
    strength: float = key(
        1.0, "factor on the strength and probability of every augmentation; 0: random crop only", ge=0, le=2
    )
    rrc_scale: list[float] = key(
        [0.8, 1.0], "random resized crop: range of the area, as a fraction of the image", gt=0, le=1
    )
    rrc_ratio: list[float] = key([0.75, 1.3333], "random resized crop: range of the aspect ratio", gt=0)
    hflip_p: float = key(0.5, "probability of a horizontal flip", ge=0, le=1)
    vflip_p: float = key(0.1, "probability of a vertical flip", ge=0, le=1)
    rotation_deg: float = key(
        10.0, "largest rotation in degrees, either way; corners are filled by reflection", ge=0, le=180
    )
    translate: list[float] = key(
        [0.0, 0.0],
        "largest shift across and down as fractions of the width and height, in whole pixels; the uncovered margin "
        "is filled by reflection, as in a random crop of a padded image",
        ge=0,
        le=0.5,
    )
    jitter: list[float] = key(
        [0.2, 0.2, 0.2, 0.1], "colour jitter of brightness, contrast, saturation and hue", ge=0, le=1
    )
    photometric_p: float = key(0.0, "photometric distortion: probability of each of its steps", ge=0, le=1)
    clahe_p: float = key(0.0, "CLAHE (local equalisation of luminance): probability", ge=0, le=1)
    clahe_clip: float = key(4.0, "CLAHE: largest clip limit", ge=1)
    clahe_tiles: int = key(8, "CLAHE: number of tiles along each side", ge=1, le=32)
    randaugment_n: int = key(0, "RandAugment: operations per image; 0: off", ge=0, le=8)
    randaugment_m: int = key(9, "RandAugment: magnitude, from 0 to 30", ge=0, le=30)
    trivial_p: float = key(
        0.0,
        "TrivialAugment: probability of one random operation of random, wide strength; 1: as in its paper",
        ge=0,
        le=1,
    )
    augmix_p: float = key(0.0, "AugMix, a light version: probability", ge=0, le=1)
    corrupt_p: float = key(0.0, "light blur or noise: probability", ge=0, le=1)
    extra: list[str] = key(
        [], "transforms of your own, module:function, after those above and before RandomErasing"
    )


@dataclass(frozen=True)
class Sampler:
    type: Literal["none", "weighted_en", "weighted_inv", "class_balanced", "repeat_factor"] | Own = key(
        "weighted_en",
        "how the images of an epoch are drawn; none: each once per pass; or a sampler of your own",
    )
    beta: float = key(
        0.999, "weighted_en: beta of the effective number (1 - beta^n) / (1 - beta)", ge=0, lt=1
    )
    oversample_cap: float = key(
        3.0, "most draws of a class in an epoch, as a multiple of its number of images", ge=1
    )
    rf_alpha: float = key(0.5, "repeat_factor: exponent", ge=0, le=1)
    rf_t: float | int | Literal["median"] = key(
        "median", "repeat_factor: class size below which images are repeated; median: of the class sizes"
    )
    undersample_frac: float = key(
        0.0,
        "fraction of the images of the largest classes (a tenth of them) left out of an epoch",
        ge=0,
        le=0.2,
    )
    passes: int = key(1, "passes over the training images in one epoch", ge=1)


@dataclass(frozen=True)
class Lora:
    rank: int = key(
        0,
        "rank of low-rank adapters in the backbone's linear layers, which train in the place of its weights; 0: none",
        ge=0,
    )
    alpha: float = key(16.0, "scale of the adapters: their output counts alpha / rank times", gt=0)
    targets: Any = key(
        "auto",
        "layers with adapters, by the last part of their names, such as [qkv, proj]; auto: all of attention and MLPs",
    )


@dataclass(frozen=True)
class Model:
    backbone: str = key("convnextv2_base.fcmae_ft_in22k_in1k", "timm name, with its pretrained tag")
    pretrained: bool = key(
        True, "start from the weights in results/model/pretrained_model/; false: from scratch"
    )
    init: str = key(
        "",
        "start from the best member of another experiment, by its name, or from a weight file, by its path, "
        "instead of model.pretrained; empty: do not",
    )
    head: Literal["linear", "arcface", "cosface", "cosine", "mlp", "knn"] = key(
        "linear",
        "classifier on the pooled features; cosine: scaled cosines without a margin; mlp: one hidden layer; knn: votes "
        "of the nearest training images, without training steps (needs freeze=backbone)",
    )
    margin: float = key(0.3, "margin of arcface (in radians) and cosface", ge=0, lt=1)
    head_scale: float = key(30.0, "arcface, cosface, cosine: scale of the cosine logits", ge=1, le=1000)
    mlp_width: int = key(512, "mlp: width of the hidden layer", ge=1)
    knn_k: int = key(20, "knn: number of neighbours that vote", ge=1)
    knn_temperature: float = key(
        0.07, "knn: temperature of the neighbours' weights, by cosine similarity", gt=0
    )
    freeze: Literal["none", "backbone"] = key(
        "none", "backbone: it stays as it is, and the head alone is trained on its features"
    )
    frozen_views: int = key(
        1,
        "freeze=backbone: fixed views of each training image whose features are computed once, the evaluation view and "
        "augmented ones; 0: new views in every epoch, whose features are computed every time",
        ge=0,
    )
    lora: Lora = field(default_factory=Lora)
    drop_rate: float = key(0.0, "dropout probability before the head", ge=0, lt=1)
    drop_path: float = key(
        0.0,
        "stochastic depth: probability of the last block, to which most networks raise it from 0 with depth; those "
        "that were published with one rate, such as CaiT and the MLP mixers, have it in all blocks, and a line says so",
        ge=0,
        lt=1,
    )
    grad_checkpointing: bool = key(False, "recompute activations in the backward pass to save memory")


@dataclass(frozen=True)
class Loss:
    name: Literal["lsce", "ce", "focal", "bsce", "bce"] | Own = key(
        "lsce", "loss function, or one of your own; all but ce use the label smoothing of reg.ls_eps"
    )
    focal_gamma: float = key(2.0, "focal: focusing exponent", ge=0)
    pos_weight: float | int | Auto = key(
        1.0,
        "bce: weight of a class's positives (of two classes, the second's); auto: negatives / positives",
        gt=0,
    )
    aux_weight: Any = key(
        0.3,
        "data.aux_cols: weight of each further column's cross-entropy beside the loss of the main head: one number for "
        "all, or a list in the order of the columns",
    )


@dataclass(frozen=True)
class Distill:
    teacher: list[str] = key(
        [], "experiments whose averaged out-of-fold logits are the teacher; empty: no distillation"
    )
    weight: float = key(0.7, "weight of the teacher in the loss; the labels have 1 - weight", ge=0, le=1)
    temperature: float = key(3.0, "softmax temperature of teacher and student", gt=0)
    t_squared: bool = key(
        True, "multiply the teacher's loss by temperature^2, which keeps the size of its gradients"
    )


@dataclass(frozen=True)
class Opt:
    name: (
        Literal[
            "adamw",
            "adam",
            "sgd",
            "nadamw",
            "radamw",
            "lion",
            "adan",
            "adopt",
            "laprop",
            "mars",
            "muon",
            "adamuon",
        ]
        | Own
    ) = key(
        "adamw",
        "optimizer: torch's adamw, adam (adds the weight decay to the gradients) or sgd, timm's others, or one of your "
        "own; muon turns matrices and kernels, and takes AdamW for the rest",
    )
    lr: float | int | Auto = key(
        "auto", "learning rate, without scaling or bounds; auto: lr_ref scaled to the global batch"
    )
    lr_ref: float | int | Auto = key(
        "auto",
        "learning rate at a global batch of lr_ref_batch; auto: 2e-4 from trained weights; 2e-3 from scratch, scaled "
        "with the root of the batch",
        gt=0,
    )
    lr_ref_batch: int = key(256, "global batch for which lr_ref holds", ge=1)
    lr_min_bound: float = key(5e-6, "smallest scaled learning rate", gt=0)
    lr_max_bound: float | int | Auto = key(
        "auto", "largest scaled learning rate; auto: 5e-4 from trained weights, 4e-3 from scratch", gt=0
    )
    large_batch_factor: float = key(
        1.0, "additional factor on the scaled learning rate above large_batch_threshold", gt=0, le=1
    )
    large_batch_threshold: int = key(512, "global batch above which large_batch_factor applies", ge=1)
    weight_decay: float = key(0.05, "decoupled weight decay", ge=0)
    no_decay_norm_bias: bool = key(True, "no weight decay on norms, biases and position embeddings")
    momentum: float = key(0.9, "sgd: momentum", ge=0, lt=1)
    sam_rho: float = key(
        0.0,
        "sharpness-aware minimisation (SAM): distance, in the norm of all trained weights, to the point whose gradient "
        "a step takes, such as 0.05; two forward and backward passes a step, so about twice the time; 0: off",
        ge=0,
    )
    clip_grad: float | None = key(None, "alias of train.clip_grad")


@dataclass(frozen=True)
class Train:
    batch_per_gpu: int = key(64, "images per device in one forward pass", ge=1)
    world_size: int = key(
        2, "devices the recipe is written for; the learning rate follows the actual number", ge=1
    )
    grad_accum: int = key(1, "forward passes per optimizer step", ge=1)
    stage_batch: Any = key(
        None,
        "list of batch_per_gpu by stage, to fit memory; the learning rate follows; null: the same in all",
    )
    amp: bool = key(
        True,
        "mixed precision: bf16 (else fp16) on GPUs, bf16 on CPUs with instructions for it (`doctor` says so)",
    )
    clip_grad: float | None = key(1.0, "largest global gradient norm; null: no clipping", gt=0)
    sync_bn: bool = key(True, "synchronise BatchNorm over GPUs")
    channels_last: bool = key(True, "channels-last memory format")
    compile: bool = key(False, "use torch.compile; costs minutes at each image size")
    max_nonfinite: int = key(10, "consecutive non-finite steps after which training stops", ge=1)
    save_every: str = key("1ep", "interval of last.pth in epochs or batches: 1ep, 200ba")
    extend: bool = key(
        False,
        "go on with a finished or interrupted run whose recipe had fewer sched.cosine_epochs; the learning rate "
        "continues where a training of the new length is at that epoch",
    )
    refit_epochs: int | Auto = key(
        "auto",
        "data.fold=none: epochs to train, on the schedule of sched.cosine_epochs; auto: the median of the folds' best "
        "epochs",
        ge=1,
    )
    keep_every: int = key(0, "interval in epochs of copies of last.pth kept as epoch__*.pth; 0: none", ge=0)


@dataclass(frozen=True)
class Sched:
    name: Literal["warmup_cosine", "plateau", "cyclic", "none"] = key(
        "warmup_cosine", "learning-rate schedule; cyclic and none have no warm-up"
    )
    warmup_epochs: float | int | Auto = key(
        "auto",
        "epochs of linear warm-up, counted in cosine_epochs, at most half of them; auto: an eighth of them, up to 5",
        ge=0,
    )
    warmup_unit: Literal["step", "epoch"] = key("step", "the warm-up rises at each step, or at each epoch")
    cosine_epochs: int = key(40, "number of epochs, warm-up included", ge=1)
    eta_min: float = key(
        0.0, "warmup_cosine, cyclic: lowest learning rate as a fraction of the peak", ge=0, lt=1
    )
    cycle_steps: int = key(2000, "cyclic: steps from the lowest learning rate to the peak, and back", ge=1)
    factor: float = key(0.5, "plateau: factor on the learning rate", gt=0, lt=1)
    patience: int = key(3, "plateau: epochs without improvement before the learning rate falls", ge=0)
    monitor: Literal["score", "val_loss"] = key(
        "score", "plateau: metric to improve; score, that of select.metric, should rise, val_loss fall"
    )


@dataclass(frozen=True)
class LrFind:
    low: float = key(1e-7, "first learning rate of the range test", gt=0)
    high: float = key(1.0, "last learning rate of the range test", gt=0)
    steps: int = key(200, "steps of the range test", ge=10)


@dataclass(frozen=True)
class Llrd:
    enabled: bool | Auto = key(
        "auto", "layer-wise learning rates; auto: from trained weights, not from scratch"
    )
    multipliers: list[float] = key(
        [0.25, 0.5, 1.0, 1.5], "factors on the learning rate, from the first layers to the head", ge=0
    )
    decay: float | None = key(
        None,
        "factor on the learning rate from each layer to the one before it, such as 0.75, the head having 1; "
        "null: llrd.multipliers",
        gt=0,
        le=1,
    )
    unfreeze_schedule: Any = key(
        None, "map of an epoch to the parts that train from then on; null: all parts, always"
    )


@dataclass(frozen=True)
class Reg:
    ls_eps: float = key(0.05, "label smoothing", ge=0, lt=1)
    mixup: float = key(0.2, "MixUp: parameter of the Beta distribution; 0: off", ge=0)
    cutmix: float = key(0.8, "CutMix: parameter of the Beta distribution; 0: off", ge=0)
    mix_prob: float = key(
        0.4,
        "probability that a batch is mixed by MixUp or CutMix; aug.strength does not change it",
        ge=0,
        le=1,
    )
    mix_switch_prob: float = key(0.5, "probability of CutMix in a mixed batch, else MixUp", ge=0, le=1)
    mix_final_epoch: int | Auto = key(
        "auto", "epoch from which mix_prob_final applies; auto: the first of a third stage"
    )
    mix_prob_final: float = key(0.0, "mix_prob from mix_final_epoch on", ge=0, le=1)
    erase_p: float = key(0.1, "RandomErasing: probability", ge=0, le=1)


@dataclass(frozen=True)
class Semi:
    enabled: bool = key(False, "learn from unlabelled images too")
    method: Literal["fixmatch", "pseudo", "soft"] = key(
        "fixmatch",
        "what learns the label predicted on the weak view: the strong view (fixmatch) or the weak one (pseudo); soft: "
        "the strong view learns the probabilities of semi.soft_teacher",
    )
    soft_teacher: str = key(
        "", "soft: experiment whose members that validated this fold too label the unlabelled images"
    )
    power: float = key(
        1.0, "soft: exponent of the teacher's probabilities; above 1 sharpens them", gt=0, le=10
    )
    floor: float = key(
        0.3, "soft: smallest confidence of the teacher at which an image is learned", ge=0, lt=1
    )
    rounds: int = key(
        0,
        "rounds of students that campaign trains after the recipe itself, each with soft labels of the round before",
        ge=0,
        le=10,
    )
    threshold: float = key(
        0.95, "smallest confidence at which the prediction on a weak view becomes a label", ge=0, le=1
    )
    align: bool = key(False, "adjust predictions on weak views to the class distribution of the labels")
    mu: int = key(7, "unlabelled images per labelled image in a batch", ge=1)
    lambda_u: float = key(1.0, "weight of the loss on unlabelled images", ge=0)
    ramp_epochs: int = key(0, "epochs in which lambda_u rises linearly from 0", ge=0)
    teacher: Literal["raw", "ema"] = key("raw", "weights that label the weak views")
    weak_scale: list[float] = key(
        [0.8, 1.0],
        "weak view: range of the crop's area, as a fraction of the image; it is flipped too",
        gt=0,
        le=1,
    )
    randaugment_n: int = key(2, "strong view: RandAugment operations, after those of aug", ge=0, le=8)
    randaugment_m: int = key(10, "strong view: RandAugment magnitude, from 0 to 30", ge=0, le=30)
    erase_p: float = key(1.0, "strong view: RandomErasing probability", ge=0, le=1)


@dataclass(frozen=True)
class Ema:
    enabled: bool = key(True, "keep an exponential moving average of the weights")
    decay: float = key(0.9999, "decay per step", gt=0, lt=1)
    warmup: bool = key(True, "limit the decay to (1 + t) / (10 + t) at step t")


@dataclass(frozen=True)
class Swa:
    enabled: bool = key(False, "average the raw weights of the last epochs; scored like the other weights")
    start: float = key(0.75, "fraction of the epochs after which averaging starts", ge=0, lt=1)


@dataclass(frozen=True)
class Robust:
    enabled: bool = key(True, "score a corrupted copy of the validation images too")
    kinds: list[str] = key(
        ["gaussian_noise", "blur", "brightness", "jpeg", "occlusion"],
        "kinds of corruption; module:function for one of your own",
    )
    level: Literal["low", "medium", "low_medium"] = key(
        "low", "strength of the corruptions; low_medium: both"
    )
    score: Literal["auto", "all", "one"] = key(
        "auto",
        "corruptions in which training scores an image: all, or one, in turn; auto: above 10,000 corrupted images "
        "every second image in one; evaluate scores all",
    )


@dataclass(frozen=True)
class Es:
    enabled: bool = key(True, "stop early when es.monitor no longer improves")
    monitor: Literal["score", "val_loss"] = key(
        "score", "metric that must improve; score, that of select.metric, should rise, val_loss fall"
    )
    patience: int = key(10, "epochs without improvement before training stops", ge=1)
    min_delta: float = key(0.001, "smallest gain that counts as improvement", ge=0)
    reset_on_stage: bool = key(True, "restart the count and the best score when the image size grows")


@dataclass(frozen=True)
class Select:
    metric: str = key(
        "combo",
        "score that selects the best epoch: clean (top-1), combo (S of clean and corrupted top-1), corrupted, f1 (of "
        "the second of two classes, macro F1 of more), macro_f1, macro_recall (balanced accuracy), log_loss, auc (of "
        "two classes, or the mean over each class against the others), kappa (quadratic), module:function, or a "
        "weighted sum such as 0.7*clean + 0.3*macro_f1",
    )
    alpha: float = key(0.7, "weight of clean in S = alpha * clean + (1 - alpha) * corrupted", ge=0, le=1)


@dataclass(frozen=True)
class Eval:
    resize_factor: float = key(
        1.14,
        "short side before the centre crop of data.resize=crop, as a multiple of the image size",
        ge=1,
        le=2,
    )
    batch: int = key(0, "images per evaluation batch; 0: batch_per_gpu", ge=0)
    every: int | Auto = key(
        "auto",
        "interval in epochs of the scores; the last epoch of each size is scored always; auto: an eighth of the "
        "epochs, from 1 to 5, then each of the last eighth; 1 for sched.name=plateau",
        ge=1,
    )
    ece_bins: int = key(15, "bins of the expected calibration error", ge=2)


@dataclass(frozen=True)
class Tta:
    scales: list[int] = key([320, 384], "image sizes of the views", ge=16, le=LARGEST_SIDE)
    hflip: bool = key(True, "add the mirror image of each view")
    rotations: list[float] = key(
        [], "degrees by which each view is rotated for further ones, such as [-10, 10]", ge=-180, le=180
    )
    shift: float = key(
        0.0,
        "fraction of the side by which each view is shifted, in four directions, for further ones",
        ge=0,
        le=0.5,
    )
    vflip: bool = key(False, "add each view upside down")
    quarter_turns: bool = key(False, "add each view turned by 90, 180 and 270 degrees; of square images")
    crops: float = key(
        1.0,
        "side of five parts of each view, its centre and corners, as a fraction of the view's, for further ones; "
        "1: none",
        ge=0.3,
        le=1,
    )
    prune: bool = key(
        False,
        "leave out the views without which the out-of-fold score of select.metric is as high, in evaluate and export",
    )
    reduce: Literal["mean", "vote"] = key(
        "mean",
        "a member's prediction: the mean of the views' logits, or their votes, ties broken by the mean",
    )


@dataclass(frozen=True)
class Ensembling:
    find_pattern: str = key(
        "auto",
        "glob of the members' file names below results/model/<exp>; auto: the best epochs by select.metric",
    )
    weighting: Literal["flat", "family", "hand", "learned", "greedy"] = key(
        "flat",
        "weights of the runs: equal, equal by backbone, ensembling.weights, by NLL, or greedy within bundle's limits",
    )
    average: Literal["logits", "probabilities"] = key(
        "logits", "what is averaged over the members; learned weights are those of its mean"
    )
    weights: Any = key(None, "hand: map of a backbone, or '<backbone> seed <seed>', to its weight")
    soup: Literal["none", "checkpoints", "folds"] = key(
        "none",
        "average the weights of each fold's checkpoints, or of all folds, where out-of-fold scores agree",
    )


@dataclass(frozen=True)
class Ts:
    enabled: bool = key(True, "temperature scaling, fitted on out-of-fold logits")
    fit_on: Literal["clean", "combo"] = key(
        "clean", "images to fit on; combo: clean and corrupted, weighted by select.alpha"
    )


@dataclass(frozen=True)
class Accept:
    clean_min: float | None = key(
        None, "smallest accepted clean top-1 of the ensemble; null: not checked", ge=0, le=1
    )
    corrupted_min: float | None = key(
        None, "smallest accepted corrupted top-1 of the ensemble; null: not checked", ge=0, le=1
    )
    score: float | int | None = key(
        None,
        "smallest accepted score of the ensemble by select.metric, of log_loss the largest; null: not checked",
    )
    gain_min: float | None = key(
        None,
        "smallest accepted gain in clean top-1 of the ensemble over its best run; null: not checked",
        ge=-1,
        le=1,
    )
    macro_drop_max: float | None = key(
        None,
        "largest accepted drop of a member's macro F1 below its run's best at that size; null: not checked",
        ge=0,
        le=1,
    )


@dataclass(frozen=True)
class Bundle:
    max_mb: float = key(500.0, "largest size of the hand-in in megabytes", gt=0)
    max_ms: float = key(100.0, "longest time per image in milliseconds, measured on this machine", gt=0)
    members: Literal["all", "greedy"] = key(
        "all",
        "all members that ensembling.find_pattern matches, or the greedily best within max_mb and max_ms",
    )
    dtype: Literal["fp16", "fp32", "int8"] = key("fp16", "stored weights; int8: with one scale per channel")
    half: Literal["gpu", "all", "none"] = key(
        "gpu", "devices that compute in half precision; all: also CPUs with bf16, up to twice as fast"
    )
    max_loss: float = key(
        0.01,
        "right answers that storage, packing and half precision may each lose, as a fraction of held-out images",
        ge=0,
        lt=1,
    )
    prior: str = key(
        "train",
        "class distribution of the images to predict: train, as in training; uniform; em, estimated from their "
        "predictions; or a CSV file of shares. The predictor corrects for it, evaluate shows the effect",
    )
    columns: Literal["three", "two", "binary", "odds", "top", "sample"] = key(
        "sample",
        "columns of the submission; binary: the second class's probability; odds: a column of probabilities for each "
        "class; top: the bundle.top_k likeliest classes in one cell; sample: as in ref/predictions_sample.csv",
    )
    top_k: int = key(5, "columns=top: classes in a cell, the likeliest first", ge=1)
    separator: str = key(" ", "columns=top: text between the classes of a cell")
    labels: Literal["ids", "names"] = key(
        "ids",
        "classes in the submission: the organiser's ids, or the names in classes.csv; a sample's own count more",
    )


@dataclass(frozen=True)
class Cudnn:
    deterministic: bool = key(True, "deterministic algorithms")
    benchmark: bool = key(False, "let cuDNN search for fast algorithms")


@dataclass(frozen=True)
class Log:
    tensorboard: bool = key(
        True, "write TensorBoard files: the numbers of each epoch, samples, the recipe as text and as hparams"
    )
    wandb: bool = key(False, "also log to Weights & Biases; needs pip install -e '.[wandb]'")
    mlflow: bool = key(False, "also log to MLflow; needs pip install -e '.[mlflow]'")


@dataclass(frozen=True)
class Checks:
    allow_double_correction: bool = key(False, "allow a balancing sampler together with balanced softmax")
    allow_flips: bool = key(False, "allow flips although data.flips_keep_class is false")
    from_scratch: bool = key(
        False,
        "refuse pretrained weights, other starting points and teachers that had them, as contests from scratch demand",
    )
    allow_unlabelled_test: bool = key(False, "allow data.unlabelled to contain the images to predict")


@dataclass(frozen=True)
class Recipe:
    """A complete recipe; `recipe.data.root` is the key `data.root`."""

    seed: int = key(
        42,
        "random seed of the split, initial weights, order, crops, augmentation and mixing",
        ge=0,
        le=2**32 - 1,
    )
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
    """Every key as (dotted name, value, dataclass field), in the order of the schema."""
    rows = []
    for spec in dataclasses.fields(node):
        value = getattr(node, spec.name)
        if dataclasses.is_dataclass(value):
            rows += fields_of(value, f"{prefix}{spec.name}.")
        else:
            rows.append((prefix + spec.name, value, spec))
    return rows
