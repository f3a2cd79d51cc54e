"""What arguments must be. Each check raises a ``ValueError`` or ``TypeError`` that names the argument, what was given
and what is expected."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def readable(tensor: Tensor) -> bool:
    """Whether values can be read without waiting: a CPU tensor that is not traced, fake or inside ``torch.func``."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)


def check_tensor(name: str, tensor: object) -> None:
    """A tensor, not what could be made into one."""
    if not isinstance(tensor, Tensor):
        given = type(tensor)
        make = "torch.from_numpy" if given.__module__ == "numpy" else "torch.as_tensor"
        convertible = given.__module__ == "numpy" or isinstance(tensor, list | tuple)
        hint = f"; use {make}({_variable(name)})" if convertible else ""
        raise TypeError(f"{name} must be a tensor, got {given.__module__}.{given.__qualname__}{hint}")


def _variable(name: str) -> str:
    """The argument alone, of a name like ``ClassMemory.push: labels``."""
    return name.rpartition(" ")[2]


def check_features(features: Tensor) -> None:
    """``features [P, D]`` or ``[B, D, H, W]`` with at least one channel."""
    check_float("features", features)
    if features.dim() not in (2, 4):
        raise ValueError(f"features must be [P, D] or [B, D, H, W], got {tuple(features.shape)}")
    if features.shape[1] == 0:
        raise ValueError(f"features must have at least one channel, got {tuple(features.shape)}")


def check_label_map(name: str, labels: Tensor, features: Tensor) -> None:
    """A tensor without the channel that masks are often stored with; the other checks see it at feature resolution."""
    check_tensor(name, labels)
    if features.dim() == 4 and labels.dim() == 4:
        hint = f"; use {_variable(name)}.squeeze(1)" if labels.shape[1] == 1 else ""
        raise ValueError(f"{name} must be [B, H, W], got {tuple(labels.shape)}{hint}")


def check_maps(where: str, name: str, features: Tensor, labels: Tensor, channels: int) -> None:
    """``features [B, channels, h, w]``, called ``name``, and ``labels [B, H, W]`` int64 of the same images."""
    check_float(f"{where}: {name}", features)
    check_label_map(f"{where}: labels", labels, features)
    if features.dim() != 4 or features.shape[1] != channels:
        raise ValueError(f"{where}: {name} must be [B, {channels}, h, w], got {tuple(features.shape)}")
    if labels.dim() != 3 or labels.shape[0] != features.shape[0]:
        raise ValueError(f"{where}: labels must be [B={features.shape[0]}, H, W], got {tuple(labels.shape)}")
    check_int64(f"{where}: labels", labels)
    if labels.device != features.device:
        raise ValueError(f"{where}: labels are on {labels.device}, {name} on {features.device}; move one")


def check_predict(predict: object) -> None:
    """``predict`` holds classes; a queue that was given in its place is named as such."""
    if predict is None or (isinstance(predict, Tensor) and not predict.is_floating_point()):
        return
    given = f"a tensor of {predict.dtype}" if isinstance(predict, Tensor) else f"{type(predict).__name__}"
    raise TypeError(
        f"predict, the third argument, must hold predicted classes as integers, got {given}; give a queue as "
        "queue=..., and of logits [B, C, h, w] their .argmax(1)"
    )


def check_pixels_and_labels(features: Tensor, labels: Tensor) -> tuple[int, ...]:
    """``features [P, D]`` or ``[B, D, H, W]`` and the ``labels`` that go with them, whose shape is returned."""
    check_features(features)
    shape = (features.shape[0], *features.shape[2:])
    check_like("labels", labels, shape, features.device)
    check_int64("labels", labels)
    return shape


def check_queue(queue: Tensor, features: Tensor) -> None:
    """``queue [C, N, D]`` that goes with ``features``."""
    check_float("queue", queue)
    if queue.dim() != 3 or queue.shape[2] != features.shape[1]:
        raise ValueError(f"queue must be [C, N, D={features.shape[1]}], got {tuple(queue.shape)}")
    if queue.device != features.device:
        raise ValueError(f"queue is on {queue.device}, features on {features.device}; move one of them")


def check_key_count(queues: Sequence[Tensor], device: torch.device) -> None:
    """As many keys as the CUDA kernels can count in 32 bits, a tile of each class and queue included."""
    most = 2**30 - 2**21  # the rest is for the anchors
    keys = sum(queue.shape[0] * (queue.shape[1] + 64) for queue in queues)
    if device.type == "cuda" and keys > most:
        raise ValueError(
            f"queues hold {keys} keys (each class and queue counts 64 more), and on CUDA there may be {most}; "
            "contrast with a part of them"
        )


def check_label_values(labels: Tensor, num_classes: int, ignore_index: int, where: str) -> None:
    """CPU ``labels`` below ``num_classes`` or ignored, as negative ones always are; a GPU would have to wait."""
    if not readable(labels):
        return
    wrong = (labels >= num_classes) & (labels != ignore_index)
    if wrong.any():
        values = torch.unique(labels[wrong]).tolist()
        listed = ", ".join(map(str, values[:8])) + (", …" if len(values) > 8 else "")
        raise ValueError(
            f"{where}: {int(wrong.sum())} of {labels.numel()} labels are outside 0..{num_classes - 1} and are not "
            f"ignore_index={ignore_index}: {listed}. Set num_classes or ignore_index, or map the labels"
        )


def check_excluded(excluded: Tensor, anchors: tuple[Tensor, Tensor], counts: Sequence[Tensor]) -> None:
    """CPU ``excluded`` below the number of keys of the anchor's class; a GPU would have to wait."""
    indices, labels = anchors
    check_like("excluded", excluded, tuple(labels.shape), labels.device)
    check_int64("excluded", excluded)
    if not readable(labels) or not counts:
        return
    keys = torch.stack(list(counts)).sum(0)
    valid = (indices >= 0) & (labels >= 0) & (labels < len(keys))
    own = torch.where(valid, keys[labels.clamp(0, len(keys) - 1)], 0)
    wrong = valid & (excluded >= own)
    if wrong.any():
        listed = ", ".join(
            f"key {int(e)} of {int(n)}" for e, n in zip(excluded[wrong][:8], own[wrong][:8], strict=True)
        )
        raise ValueError(f"excluded: {int(wrong.sum())} of {len(labels)} are beyond the keys of the class: {listed}")


def check_range(name: str, values: Tensor, least: int, most: int) -> None:
    """CPU ``values`` within ``least..most``; a GPU would have to wait."""
    if not readable(values):
        return
    wrong = (values < least) | (values > most)
    if wrong.any():
        listed = ", ".join(map(str, torch.unique(values[wrong])[:8].tolist()))
        raise ValueError(f"{name}: {int(wrong.sum())} of {values.numel()} are outside {least}..{most}: {listed}")


def check_float(name: str, tensor: Tensor) -> None:
    """A dtype that the operators know."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_int64(name: str, tensor: Tensor) -> None:
    """int64."""
    check_tensor(name, tensor)
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {tensor.dtype}; use {_variable(name)}.long()")


def check_like(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """That shape, on that device."""
    check_tensor(name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}; move it there")
