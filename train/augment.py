"""Weak and strong augmentation of whole batches, on any device.

Order: ClassMix, random scale and crop, horizontal flip, colour jitter, Gaussian blur. Whether a step happens, the
scale, the crop and the blur are drawn once per batch; colour factors once per image. Everything is drawn from the
global torch generator of the CPU, so its seed repeats the augmentation, without synchronising with a GPU. How much is
drawn depends on the steps that happen, and not on what is in the images and labels.

The authors' code calls kornia 0.4.1; torchvision differs from it as follows:

- brightness multiplies the image (kornia adds ``factor - 1``);
- contrast blends with the mean grey of the image (kornia multiplies, so it acts like a brightness);
- saturation blends with the grey image (kornia scales S of HSV); hue is shifted in HSV in both;
- blur has one random sigma of the given range for both axes (kornia takes the range as a pair of sigmas: a fixed blur
  of 1.5 pixels horizontally and almost none vertically, which ``blur_horizontally`` repeats);
- with the COCO weights theirs jitters BGR images as if they were RGB: that turns the hue the other way, and both ways
  are equally likely;
- resizing aligns pixel areas and smooths when it shrinks (kornia aligns the corner pixels), with labels to match.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from train.config import MethodConfig

Batch = tuple[Tensor, Tensor, Tensor | None]  # images, labels, confidence


@dataclass(frozen=True)
class AugmentConfig:
    """Probabilities (per batch) and ranges of the augmentation.

    Attributes:
        classmix: probability of ClassMix.
        flip: probability of a horizontal flip.
        scale: probability of a change of scale, by a factor uniform in ``scale_range``.
        jitter: probability of colour jitter of strength ``jitter_strength`` for brightness and contrast, half of it
            for saturation, a third of it (in turns) for hue.
        blur: probability of a Gaussian blur with sigma uniform in ``blur_sigma`` pixels, kernel ``blur_kernel`` pixels
            wide (smaller for smaller images).
        blur_horizontally: blur by the larger sigma across and the smaller one down instead.
    """

    classmix: float = 0.0
    flip: float = 0.5
    scale: float = 0.0
    scale_range: tuple[float, float] = (0.75, 1.75)
    jitter: float = 0.0
    jitter_strength: float = 0.25
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 1.5)
    blur_kernel: int = 23
    blur_horizontally: bool = False


WEAK = AugmentConfig(classmix=0.2, scale=0.5, jitter=0.2, jitter_strength=0.125)
"""Augmentation of labelled images in the authors' code."""

STRONG = AugmentConfig(classmix=0.75, scale=0.8, jitter=0.8, jitter_strength=0.25, blur=0.2)
"""Augmentation of unlabelled images in the authors' code."""


def build_augmentation(method: MethodConfig) -> tuple[AugmentConfig, AugmentConfig]:
    """Augmentation of the labelled and of the unlabelled images."""
    weak = replace(WEAK, classmix=method.labelled_classmix, jitter_strength=method.labelled_jitter)
    strong = replace(
        STRONG,
        classmix=method.unlabelled_classmix,
        jitter_strength=method.unlabelled_jitter,
        blur_horizontally=method.blur == "horizontal",
    )
    return weak, strong


@torch.no_grad()
def augment(
    images: Tensor,
    labels: Tensor,
    confidence: Tensor | None,
    config: AugmentConfig,
    *,
    ignore_index: int,
    num_classes: int,
    classmix: bool = True,
    background: int | None = None,
) -> Batch:
    """Augment a batch; the size stays the same. Inputs are not changed in place.

    Args:
        images: float ``[B, 3, H, W]``, RGB in 0 to 1, not normalised.
        labels: int64 ``[B, H, W]``, true or pseudo-labels.
        confidence: float ``[B, H, W]`` that goes with the labels, or None.
        config: probabilities and ranges, such as `WEAK` or `STRONG`.
        ignore_index: label of pixels without class; fills the border when the image shrinks.
        num_classes: number of classes C.
        classmix: False switches ClassMix off (early in the training, pseudo-labels are too poor to mix).
        background: class that ClassMix does not paste unless it is the only one (0 for PASCAL VOC).

    Returns:
        Images, labels and confidence (None if none was given); the given tensors themselves if no step was drawn.
    """
    batch: Batch = (images, labels, confidence)
    if classmix and _coin(config.classmix):
        batch = class_mix(*batch, ignore_index=ignore_index, num_classes=num_classes, background=background)
    if _coin(config.scale):
        factor = torch.empty(()).uniform_(*config.scale_range).item()
        batch = scale_and_crop(*batch, factor=factor, ignore_index=ignore_index)
    if _coin(config.flip):
        images, labels, confidence = batch
        batch = (images.flip(-1), labels.flip(-1), None if confidence is None else confidence.flip(-1))
    images, labels, confidence = batch
    picture = images.shape[1] == 3  # cached features have no colours
    if _coin(config.jitter) and picture:
        s = config.jitter_strength
        jitter = v2.ColorJitter(brightness=s, contrast=s, saturation=s / 2, hue=s / 3)
        images = torch.stack([jitter(image) for image in images])
    if _coin(config.blur) and picture:
        widest = 2 * min(images.shape[-2:]) - 1  # reflection at the border needs half a kernel inside the image
        kernel, (down, across) = min(config.blur_kernel, widest), config.blur_sigma
        if config.blur_horizontally:
            images = F.gaussian_blur(images, [kernel, kernel], [across, down])
        else:
            images = v2.GaussianBlur(kernel, (down, across))(images)
    return images, labels, confidence


def class_mix(
    images: Tensor,
    labels: Tensor,
    confidence: Tensor | None,
    *,
    ignore_index: int,
    num_classes: int,
    background: int | None = None,
) -> Batch:
    """Paste into each image the pixels of some classes of the next image (the last one takes from the first).

    Of the n classes in the labels of the next image, ``n // 2 + 1`` (but at most n) are chosen at random. Ignored
    pixels and ``background`` are candidates only where there is no other class. Shapes as in `augment`.
    """
    batch_size = len(labels)
    has_class = (labels >= 0) & (labels < num_classes) & (labels != ignore_index)
    bins = torch.where(has_class, labels, num_classes).flatten(1)  # pixels without a class go to the last bin
    present = torch.zeros(batch_size, num_classes + 1, dtype=torch.bool, device=labels.device)
    present.scatter_(1, bins, True)
    for dropped in (num_classes, background):
        if dropped is not None:
            others = present.clone()
            others[:, dropped] = False
            present = torch.where(others.any(1, keepdim=True), others, present)
    # rank the present classes by random keys, absent ones last, and take the first
    keys = torch.rand(batch_size, num_classes + 1).to(labels.device)
    rank = keys.masked_fill(~present, 2.0).argsort(1).argsort(1)
    chosen = present & (rank < present.sum(1, keepdim=True) // 2 + 1)
    paste = chosen.gather(1, bins).view_as(labels).roll(-1, 0)

    def mix(own: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, own.roll(-1, 0), own)

    mixed_confidence = None if confidence is None else mix(confidence, paste)
    return mix(images, paste.unsqueeze(1)), mix(labels, paste), mixed_confidence


def scale_and_crop(
    images: Tensor, labels: Tensor, confidence: Tensor | None, *, factor: float, ignore_index: int
) -> Batch:
    """Resize by ``factor``, then pad (images and confidence 0, labels ``ignore_index``) or crop to the old size.

    Padding is centred, an odd pixel goes to the right and the top; the crop is random, the same for the whole batch.
    Images and confidence are resized bilinearly, labels to the nearest pixel. Shapes as in `augment`.
    """
    height, width = labels.shape[-2:]
    size = [max(1, int(height * factor)), max(1, int(width * factor))]
    if size == [height, width]:
        return images, labels, confidence
    excess_y, excess_x = size[0] - height, size[1] - width
    top = int(torch.randint(max(0, excess_y) + 1, ()))
    left = int(torch.randint(max(0, excess_x) + 1, ()))
    bottom_pad, left_pad = max(0, -excess_y) // 2, max(0, -excess_x) // 2
    border = (left_pad, max(0, -excess_x) - left_pad, max(0, -excess_y) - bottom_pad, bottom_pad)

    def fit(maps: Tensor, mode: v2.InterpolationMode, fill: float) -> Tensor:
        resized = F.resize(maps, size, interpolation=mode, antialias=mode is v2.InterpolationMode.BILINEAR)
        return pad(resized[..., top : top + height, left : left + width], border, value=fill)

    smooth, nearest = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.NEAREST_EXACT
    return (
        fit(images, smooth, 0.0),
        fit(labels.unsqueeze(1), nearest, ignore_index).squeeze(1),
        None if confidence is None else fit(confidence.unsqueeze(1), smooth, 0.0).squeeze(1),
    )


def _coin(probability: float) -> bool:
    """True with the given probability; always draws, so that later draws do not depend on the probabilities."""
    return bool(torch.rand(()) < probability)
