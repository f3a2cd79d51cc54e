"""Features of a frozen encoder, computed once for each image, as a data set.

A head with its contrast trains on them in milliseconds a step, so that a study can afford many seeds. It is not the
training of a network: the encoder does not learn, and of the augmentation only ClassMix, scale and flip remain.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from train.config import ModelConfig
from train.data.dataset import SegmentationDataset
from train.errors import UserError, reason

META = "features.json"


@dataclass(frozen=True)
class FeaturesConfig:
    """Write the features of a frozen encoder, as a data set for --dataset features --network head."""

    dataset: tyro.conf.Positional[Literal["landcover", "folder", "cityscapes", "voc", "camvid"]]
    """Data set whose images are encoded."""
    out: tyro.conf.Positional[Path]
    """Folder of the new data set."""
    root: Path | None = None
    """Folder of the images; not for landcover."""
    scale: float = 1.0
    """Factor of the size at which images of published data sets are read; labels are scaled to that size too."""
    encoder: str = "tf_efficientnet_lite0"
    """Name of a timm encoder with ImageNet weights."""
    maps: tuple[int, int] = (2, 3)
    """Which two of its five maps are kept, the second at the size of the first."""


def make_features(config: FeaturesConfig) -> str:
    """Encode every split; channels have mean 0 and deviation 1 over the training images.

    Raises:
        UserError: data, an encoder or a folder that cannot be used.
    """
    from train.data.datasets import open_dataset
    from train.networks.base import resize
    from train.networks.timm_deeplab import TimmDeepLab

    splits = ("train", "val", "test") if config.dataset == "camvid" else ("train", "val")
    data = {split: open_dataset(config.dataset, split, config.root, config.scale) for split in splits}
    network = TimmDeepLab(2, ModelConfig(encoder=config.encoder, encoder_maps=config.maps)).eval()
    moments: tuple[Tensor, Tensor] | None = None
    for split, images in data.items():
        images.scale_labels = True
        maps, labels = [], []
        for index in range(len(images)):
            image, label = images[index]
            with torch.no_grad():
                x = network.normalise(image[None].float() / 255)
                kept = network.encoder.forward_intermediates(x, indices=network.encoder_maps, intermediates_only=True)
            maps.append(torch.cat([kept[0], resize(kept[1], kept[0].shape[-2:])], 1)[0])
            labels.append(label.to(torch.uint8))
        features = torch.stack(maps)
        moments = moments or (features.mean((0, 2, 3), keepdim=True), features.std((0, 2, 3), keepdim=True))
        features = ((features - moments[0]) / moments[1].clamp_min(1e-6)).half()
        try:
            config.out.mkdir(parents=True, exist_ok=True)
            torch.save({"features": features, "labels": torch.stack(labels)}, config.out / f"{split}.pt")
        except OSError as error:
            raise UserError(f"features {config.out} cannot be written ({reason(error)})") from error
    first = data["train"]
    meta = {
        "dataset": config.dataset,
        "channels": features.shape[1],
        "classes": first.classes,
        "palette": first.palette,
        "ids": {split: images.ids for split, images in data.items()},
    }
    (config.out / META).write_text(json.dumps(meta))
    size = "x".join(map(str, features.shape[2:]))
    return f"{features.shape[1]} channels of {size} for {', '.join(f'{len(d)} {s}' for s, d in data.items())} images"


def read_meta(root: Path) -> dict:
    """Names, classes and channels of the features in ``root``.

    Raises:
        UserError: there are none.
    """
    try:
        return json.loads((root / META).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"features {root / META} cannot be read ({reason(error)}): run python -m train features"
        ) from None


class FeatureDataset(SegmentationDataset):
    """Feature maps float16 ``[D, h, w]``; labels have their size for ``train``, else that of the encoded images."""

    def __init__(self, root: Path, split: str) -> None:
        from train.checkpoint import load_tensors

        meta, path = read_meta(root), root / f"{split}.pt"
        try:
            content = load_tensors(path)
        except Exception as error:  # truncated and foreign files make torch raise many kinds
            raise UserError(f"features {path} cannot be read ({reason(error)}): run python -m train features") from None
        self.name, self.source, self.ids = meta["dataset"], path, meta["ids"][split]
        self.classes, self.palette = tuple(meta["classes"]), tuple(map(tuple, meta["palette"]))
        self.pairs = {item: (root / split / item, root / split / item) for item in self.ids}
        self.features, self.labels = content["features"], content["labels"]
        if split == "train":
            rows, columns = (
                torch.arange(small) * large // small + large // small // 2
                for small, large in zip(self.features.shape[2:], self.labels.shape[1:], strict=True)
            )
            self.labels = self.labels[:, rows.clamp_max(self.labels.shape[1] - 1)]
            self.labels = self.labels[:, :, columns.clamp_max(self.labels.shape[2] - 1)]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.features[index].clone(), self.labels[index].long()
