"""Pretrained weights of the paper's networks: from torchvision, or from a file under any of three namings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from train.checkpoint import load_tensors
from train.errors import UserError, reason
from train.networks.base import DeepLab

BACKBONE = {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
# Modules of the head in the paper's released checkpoints, and of the COCO weights for DeepLabV2, under our names.
HEAD = {
    **{f"layer5.conv2d_list.{i}": f"classifier.convs.{i}" for i in range(4)},
    **{f"aspp.aspp{i + 1}.atrous_conv": f"aspp.convs.{i}.0" for i in range(4)},
    **{f"aspp.aspp{i + 1}.bn": f"aspp.convs.{i}.1" for i in range(4)},
    "aspp.global_avg_pool.1": "aspp.convs.4.1",
    "aspp.global_avg_pool.2": "aspp.convs.4.2",
    "aspp.conv1": "aspp.project.0",
    "aspp.bn1": "aspp.project.1",
    "decoder.conv1": "skip.0",
    "decoder.bn1": "skip.1",
    "decoder.pre_last_conv.0": "decoder.0.0",
    "decoder.pre_last_conv.1": "decoder.0.1",
    "decoder.pre_last_conv.3": "decoder.1.0",
    "decoder.pre_last_conv.4": "decoder.1.1",
    "decoder.last_conv": "classifier",
}


@dataclass(frozen=True)
class LoadReport:
    """Which tensors were loaded, by our names, without BatchNorm's counters of batches."""

    source: str
    """``imagenet`` or a path."""
    loaded: list[str]
    """Tensors of the network that were replaced."""
    missing: list[str]
    """Tensors of the network that were not given; they keep their values."""
    unknown: list[str]
    """Tensors that were given and that the network does not have."""
    mismatched: list[str]
    """Tensors given at another size, with both sizes; they keep their values."""

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        parts = [f"{self.source}: {len(self.loaded)} of {total} tensors loaded"]
        rest = {"not given": self.missing, "not in the network": self.unknown, "of another size": self.mismatched}
        parts += [f"{len(names)} {what} ({_some(names)})" for what, names in rest.items() if names]
        return "; ".join(parts)


def load_weights(network: DeepLab, source: str | Path) -> LoadReport:
    """Copy weights into ``network`` where name and size agree.

    Args:
        network: changed in place. All tensors of its backbone must be given; those of its head may be missing.
        source: ``imagenet``, which torchvision downloads once; or the path of a file: torchvision's ResNet, the COCO
            weights for DeepLabV2, a checkpoint of the paper's released code, or the ``state_dict`` of such a network.

    Raises:
        UserError: nothing to download, no network, an unreadable file, or one that lacks tensors of the backbone.
    """
    given = download_imagenet(network) if str(source) == "imagenet" else read_tensors(Path(source))
    given = {our_name(name): value for name, value in given.items()}
    return copy_where_it_fits(network, given, str(source), "backbone", lambda name: name.startswith("backbone."))


def copy_where_it_fits(
    module: nn.Module, given: dict[str, Tensor], source: str, what: str, needed: Callable[[str], bool]
) -> LoadReport:
    """Copy tensors into ``module`` where name and size agree.

    Args:
        module: changed in place.
        given: by the names of ``module``; others are left out.
        source: of them, for messages.
        what, needed: the part of ``module`` that must be given as a whole, and whether a tensor belongs to it.

    Raises:
        UserError: one of them is not; ``module`` is as before.
    """
    given = {name: value for name, value in given.items() if not _is_counter(name)}
    expected = {name: value for name, value in module.state_dict().items() if not _is_counter(name)}
    fits = {name: given[name].shape == value.shape for name, value in expected.items() if name in given}

    wanted = [name for name in expected if needed(name)]
    lacking = [name for name in wanted if not fits.get(name)]
    if lacking:
        raise UserError(
            f"weights {source}: {len(wanted) - len(lacking)} of {len(wanted)} tensors of the {what} are there at their "
            f"size, not {_some(lacking)}; given are {_some(list(given))}: choose weights of the same network"
        )
    loaded = [name for name, fit in fits.items() if fit]
    module.load_state_dict({name: given[name] for name in loaded}, strict=False)
    return LoadReport(
        source,
        loaded,
        missing=[name for name in expected if name not in given],
        unknown=[name for name in given if name not in expected],
        mismatched=[
            f"{name} {list(given[name].shape)} instead of {list(expected[name].shape)}"
            for name, fit in fits.items()
            if not fit
        ],
    )


def download_imagenet(network: DeepLab) -> dict[str, Tensor]:
    """ImageNet weights of the backbone of ``network``, from torchvision or its cache of earlier downloads.

    Raises:
        UserError: there are none for this form of the backbone, or they cannot be had.
    """
    weights = network.imagenet_weights
    if weights is None:
        raise UserError("deeplab_v2_coco has no weights to download: give --weights the path of the COCO weights")
    try:
        return weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, no space, a damaged file: torch's hub raises many kinds
        raise UserError(
            f"ImageNet weights {weights.url} cannot be downloaded ({reason(error)}): "
            f"fetch that file where there is a network, and give its path: --weights PATH"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the file at ``path``, on the CPU, under the names they have there; nothing else in it is run.

    Raises:
        UserError: there is no file, or none that holds tensors by name.
    """
    if not path.is_file():
        raise UserError(f"weights {path} do not exist: give --weights the path of a file, or imagenet")
    try:
        content = load_tensors(path)
    except Exception as error:  # truncated and foreign files make torch raise many kinds
        raise UserError(
            f"weights {path} are damaged or not a file of PyTorch tensors ({reason(error)}): fetch them again"
        ) from error
    tensors = named_tensors(content)
    if not tensors:
        raise UserError(
            f"weights {path} hold no tensors by name: give a state_dict, or a checkpoint that has it as 'model'"
        )
    return tensors


def named_tensors(content: Any) -> dict[str, Tensor]:
    """Tensors by name in a state_dict, or in a checkpoint that has it as ``model``; without DataParallel's prefix."""
    if isinstance(content, dict):
        content = content.get("model", content)
    items = content.items() if isinstance(content, dict) else ()
    tensors = {name: value for name, value in items if isinstance(name, str) and isinstance(value, Tensor)}
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def our_name(name: str) -> str:
    """Translate the name of a tensor in any file that :func:`load_weights` reads; ours and unknown names stay."""
    if name.split(".")[0] in BACKBONE:
        return f"backbone.{name}"
    module, _, field = name.rpartition(".")
    return f"{HEAD.get(module, module)}.{field}"


def _is_counter(name: str) -> bool:
    """Whether ``name`` is a batch counter of BatchNorm: older files have none, and our layers do not read it."""
    return name.endswith("num_batches_tracked")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
