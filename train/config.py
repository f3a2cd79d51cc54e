"""Everything that can be set, as dataclasses; defaults are the paper's values where the paper has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from train.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Which images, how many of them labelled, and what a batch is."""

    dataset: Literal["landcover", "folder", "cityscapes", "voc", "gta5", "camvid", "features"] = "landcover"
    """landcover: the built-in tiles. folder: your own images. features: what python -m train features has written, for
    --network head. The others: published data sets, unpacked in --root."""
    root: Path | None = None
    """Folder of the data; for folder with images/, masks/, classes.txt, train.txt and val.txt; not for landcover."""
    evaluate: Literal["val", "test"] = "val"
    """Images that are evaluated during the training. For settings that were chosen on val, take test."""
    scale: float = 1.0
    """Factor of the size at which images of published data sets are read; validation labels keep their size."""
    labelled: int | float = 0.1
    """Labelled training images: a count (40) or a fraction (0.1); 1.0 is all, then nothing is left unlabelled."""
    split_file: Path | None = None
    """Training images in an order, the labelled ones first: ids, one a line, or a released pickle (.pkl)."""
    split_seed: int | None = None
    """Without a split file: seed of the draw of the labelled images; --seed unless given."""
    source_root: Path | None = None
    """Folder of GTA5, all of it labelled: takes turns with the labelled images of cityscapes (domain adaptation)."""
    crop: int = 96
    """Height and width of the training crops, in pixels."""
    labelled_batch: int = 8
    """Labelled images a step, over all processes."""
    unlabelled_batch: int = 4
    """Unlabelled images a step, over all processes; each is augmented twice."""
    workers: int = 0
    """Loader processes of each training process, also for evaluations; 0: the training process reads the images."""
    pin_memory: bool = False
    """With CUDA: loaders put batches into page-locked memory, from which the GPU copies while it computes."""


@dataclass(frozen=True)
class ModelConfig:
    """The network. The options from --encoder on are for --network timm."""

    network: Literal["timm", "deeplab_v2", "deeplab_v2_coco", "deeplab_v3plus", "head"] = "timm"
    """timm: DeepLabV3+ on any encoder. head: two convolutions on --dataset features. deeplab_*: the paper's, on
    ResNet-101, on ResNet-101 of COCO, on ResNet-50."""
    branches: int = 2
    """How many of DeepLabV2's four classifiers are summed; the authors' code sums 2."""
    weights: str = "imagenet"
    """Weights a network of the paper starts from: imagenet (torchvision downloads them), or the path of a file."""
    pretrained: bool = True
    """Start from pretrained weights: --weights, or for timm those of ImageNet."""
    init: Path | None = None
    """Start from a checkpoint instead, ours or best_model.pth of the authors' code: its network, heads and selectors
    (the student's); optimiser, schedule and memory begin anew. Classifier and selectors are left out where the number
    of classes differs."""
    encoder: str = "tf_efficientnet_lite0"
    """Name of a timm encoder; the ImageNet weights of the default come from an installed package."""
    output_stride: Literal[8, 16, 32] = 16
    """Stride of the deepest encoder map."""
    encoder_maps: tuple[int, int] = (1, 4)
    """Which of the encoder's five maps go to the decoder (1: stride 4, 2: stride 8) and to ASPP."""
    atrous_rates: tuple[int, int, int] = (6, 12, 18)
    """Dilations of the ASPP branches."""
    aspp_channels: int = 256
    """Width of ASPP."""
    skip_channels: int = 48
    """Width to which the decoder reduces the early map."""
    decoder_channels: int = 256
    """Width of the decoder, which is that of the contrastive feature."""
    aspp_dropout: float = 0.5
    """Dropout after ASPP."""
    decoder_dropout: float = 0.1
    """Dropout before the classifier."""
    encoder_statistics: Literal["batch", "imagenet"] = "batch"
    """Statistics in the encoder's BatchNorm. batch: as in the paper. imagenet: fixed, for short trainings."""
    train_encoder_norm: bool = False
    """Train scale and shift of the encoder's BatchNorm layers too; the paper freezes them."""
    in_channels: int = 152
    """Channels of the features that --network head is on."""
    sync_batchnorm: bool = False
    """With several GPUs: BatchNorm statistics of the network over all of them; the branch keeps those of each."""


@dataclass(frozen=True)
class MethodConfig:
    """Losses, their weights, and the steps in which they begin."""

    method: Literal["supervised", "supervised_contrast", "pseudo", "contrast"] = "contrast"
    """supervised: labels only. pseudo: also pseudo-labels of the teacher. contrast: also the contrast.
    supervised_contrast: labels and the contrast of labelled pixels, as Wang et al. train with infonce."""
    objective: Literal["positive", "infonce"] = "positive"
    """positive: pixels are drawn to the memory of their class (Alonso et al.). infonce: and pushed from others (Wang et
    al.)."""
    ramp: int = 2000
    """Steps in which the weight of the pseudo-labels rises to 1."""
    ramp_shape: Literal["smooth", "step"] = "smooth"
    """smooth: it rises as exp(-5 (1 - step/ramp)^2). step: it is 0 until then."""
    memory_start: int = 1000
    """The memory is filled in steps after this one."""
    contrast_start: int = 2000
    """Contrast, ClassMix of unlabelled images and class weights begin after this step."""
    supervised_weight: float = 1.0
    """Factor of the cross-entropy on labels."""
    pseudo_weight: float = 1.0
    """Factor of the cross-entropy on pseudo-labels."""
    confidence_power: float = 6.0
    """Each pseudo-label weighs the teacher's probability to this power."""
    entropy_weight: float = 0.01
    """Factor of the entropy of the student on unlabelled images."""
    contrast_weight: float = 0.1
    """Factor of the contrast, for labelled and for unlabelled images alike."""
    class_weights: bool = True
    """Weigh classes by the square root of the median frequency over theirs."""
    teacher_mode: Literal["train", "eval"] = "train"
    """BatchNorm and dropout of the teacher while it labels; the paper leaves it in train mode. In eval mode, its
    BatchNorm has the statistics of the student."""
    memory: Literal["teacher", "queues"] = "teacher"
    """teacher: pixels of which the teacher is sure. queues: the region and pixel queues of Wang et al. (infonce)."""
    memory_rows: int = 256
    """Capacity of the memory, in rows of each class; for infonce, 0 contrasts the pixels of a batch with each other."""
    memory_sync: Literal["local", "gather", "reduce"] = "gather"
    """Several processes. gather: each stores all rows. reduce: each its own, class means of all. local: no exchange."""
    contrast_dim: int = 256
    """Width of projection, prediction and memory."""
    confidence: float = 0.95
    """A labelled pixel is stored in the memory if the teacher gives its class a probability above this."""
    remember: Literal["fixed", "adaptive"] = "fixed"
    """fixed: --confidence for all classes. adaptive: where the teacher is less sure of a class, the mean probability of
    its correctly classified pixels in the batch."""
    temperature: float = 0.1
    """Divides the similarities (infonce)."""
    base_temperature: float = 0.07
    """The contrast is multiplied by --temperature over this (infonce)."""
    anchors: int = 1024
    """Anchors of a batch, at most (infonce)."""
    views: int = 100
    """Anchors of a class of an image, at most; smaller classes are left out (infonce)."""
    variant: Literal["paper", "released"] = "paper"
    """paper: as described. released: the contrast as the authors' published code computes it."""
    voc_quota: bool = False
    """Let an image add C/3 times as many rows to the memory (C classes), as the authors' code does for VOC."""
    mix_background: int | None = None
    """Class that ClassMix pastes only where there is no other (0 for VOC)."""
    labelled_classmix: float = 0.2
    """Probability of ClassMix for a batch of labelled images."""
    unlabelled_classmix: float = 0.75
    """Probability of ClassMix for a batch of unlabelled images."""
    labelled_jitter: float = 0.125
    """Strength of the colour jitter of labelled images."""
    unlabelled_jitter: float = 0.25
    """Strength of the colour jitter of unlabelled images."""
    blur: Literal["random", "horizontal"] = "random"
    """random: sigma of 0.1 to 1.5 pixels. horizontal: 1.5 across and 0.1 down, as the authors' library reads it."""
    source_steps: Literal["alternate", "last"] = "alternate"
    """With --source-root, alternate: its images in every second step. last: in every second of the last steps only."""
    last_steps: int = 100
    """Number of last steps that have no source images (alternate), or that alone have them (last)."""

    @property
    def contrasts(self) -> bool:
        return self.method in ("contrast", "supervised_contrast")

    @property
    def uses_unlabelled(self) -> bool:
        return self.method in ("contrast", "pseudo")

    @property
    def uses_teacher(self) -> bool:
        return self.method != "supervised"


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, learning rate and length."""

    steps: int = 20000
    """Length of the training; the learning rate falls to zero over it."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd: with momentum, as in the paper. adamw: for short fine-tuning."""
    lr: float = 0.01
    """Learning rate at the start; it falls as (1 - step/steps)^0.9."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 5e-4
    """Weight decay of every trained tensor."""
    ema: float = 0.995
    """Share of the teacher kept in each step at the start."""
    ema_schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: that share rises to 1 by a half cosine, made for long trainings. constant: it stays, for short ones."""
    ema_warmup: float = 10.0
    """The share kept is at most 1 - 1/(ema_warmup step + 1)."""
    repeated_updates: bool = False
    """Multiply the learning rate of each tensor by how often the authors' optimiser listed it until October 2021 (1 to
    4 times: once for each module around it; SGD updates a tensor as often as it is listed)."""
    restart_after: float = 0.0
    """Share of the steps without a better evaluation after which to go back to the best student; 0: never."""
    renewal: int = 0
    """Batches of unlabelled images that renew the BatchNorm statistics of the best student at the end; 0: none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of convolutions and matrix products (bfloat16: autocast); weights and losses are float32 in any case."""
    accumulate: int = 1
    """Compute the student in this many parts of its batches, one after the other, for small GPUs: activations of one
    part are in memory at a time, for one more forward. Losses are those of the whole batch; BatchNorm of the network
    takes the statistics of each part."""
    tf32: Literal["convolutions", "everything", "nothing"] = "convolutions"
    """With CUDA: what may round its float32 inputs to 10 bits, which is faster. convolutions: PyTorch's default."""
    cudnn_benchmark: bool = False
    """With CUDA: let cuDNN time its algorithms for each size and take the fastest. Their sums round differently, so two
    runs of one seed may differ."""
    compile: bool = False
    """Compile the networks by torch.compile: minutes at the start, then faster steps. Results differ by rounding and by
    the draws of dropout."""
    seed: int = 0
    """Seed of the split, the batches, the augmentation and the initial weights."""


@dataclass(frozen=True)
class RunConfig:
    """Where it runs and what it writes; nothing here but --change-lr changes the trained weights."""

    out: Path = Path("runs/fit")
    """Folder of the run: checkpoints, metrics.jsonl, tensorboard events. A run found there is continued."""
    device: str = "auto"
    """auto takes CUDA, then Apple's MPS, then the CPU; or a torch device such as cuda:1."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    evaluate_every: int = 1000
    """Steps between two evaluations on the validation set; one always follows the last step."""
    evaluate_from: int = 0
    """No evaluation before this step."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; a killed run loses at most these."""
    watch: bool = False
    """Log also the similarity of features within and between classes, the gradient of the contrast relative to that of
    the cross-entropies, and how often student and teacher agree."""
    change_lr: bool = False
    """Go on from a checkpoint of another --lr, with this one from now on."""


@dataclass(frozen=True)
class FitConfig:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check(self, processes: int = 1) -> None:
        """Refuse values that cannot work.

        Args:
            processes: how many processes share each batch.

        Raises:
            UserError: naming the first such option, what was given and what is expected.
        """
        data, method, optim, run = self.data, self.method, self.optim, self.run
        positive = (
            *((data, name) for name in ("crop", "labelled_batch")),
            *((method, name) for name in ("contrast_dim", "temperature", "base_temperature", "anchors", "views")),
            *((optim, name) for name in ("steps", "lr", "accumulate")),
            *((run, name) for name in ("log_every", "evaluate_every", "checkpoint_every")),
        )
        for part, name in positive:
            if getattr(part, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(part, name)}: give a number above 0")
        if data.workers < 0:
            raise UserError(f"--workers is {data.workers}: give 0 or more")
        for option, size in (("--labelled-batch", data.labelled_batch), ("--unlabelled-batch", data.unlabelled_batch)):
            if option == "--unlabelled-batch" and not method.uses_unlabelled:
                continue
            if size % processes:
                raise UserError(
                    f"{option} is {size}, which {processes} processes cannot share equally: give a multiple of "
                    f"{processes}, or another --nproc-per-node"
                )
            # BatchNorm of the image-pooling branch sees one value per image and channel
            if size < 2 or (size // processes < 2 and not self.model.sync_batchnorm):
                shared = f" for {processes} processes" if processes > 1 else ""
                raise UserError(
                    f"{option} is {size}{shared}: BatchNorm needs at least 2 images in a batch"
                    + (" of a process, or --sync-batchnorm" if shared else "")
                )
            images = size // processes * (2 if option == "--unlabelled-batch" else 1)  # each is seen twice
            if optim.accumulate > 1 and images // optim.accumulate < 2:
                raise UserError(
                    f"--accumulate {optim.accumulate} parts of {images} images ({option}): BatchNorm needs at least 2 "
                    f"images in a part, give at most {images // 2}"
                )
        queues, infonce = method.memory == "queues", method.objective == "infonce"
        if method.memory_rows < (0 if infonce and not queues else 1):
            raise UserError(f"--memory-rows is {method.memory_rows}: give a number above 0, or 0 for infonce alone")
        if queues and not (infonce and method.variant == "paper" and method.memory_sync == "gather"):
            raise UserError("--memory queues needs --objective infonce, --variant paper and --memory-sync gather")
        if infonce and method.memory_sync == "reduce":
            raise UserError("--memory-sync reduce is for --objective positive: infonce needs the rows, give gather")
        if not 0 <= method.confidence < 1:
            raise UserError(f"--confidence is {method.confidence}: give a probability, at least 0 and below 1")
        if not 0 <= optim.ema <= 1:
            raise UserError(f"--ema is {optim.ema}: give a share between 0 and 1")
        if data.dataset == "folder" and data.root is None:
            raise UserError("--dataset folder needs --root, the folder with images/, masks/ and classes.txt")
        if data.source_root is not None and data.dataset != "cityscapes":
            raise UserError(f"--source-root has the classes of cityscapes, not of {data.dataset}: leave it out")
        if optim.repeated_updates and self.model.network == "timm":
            raise UserError("--repeated-updates counts tensors of the paper's networks: choose one with --network")


def parse_fit(arguments: list[str], default: FitConfig | None = None, description: str | None = None) -> FitConfig:
    """The configuration ``default`` (all defaults unless given), changed by options of the command ``fit``.

    Raises:
        SystemExit: arguments that cannot be parsed, or ``--help``.
    """
    style = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)  # --lr, not --optim.lr
    default = FitConfig() if default is None else default
    return tyro.cli(
        FitConfig, prog="python -m train fit", args=arguments, default=default, description=description, config=style
    )
