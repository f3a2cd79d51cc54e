"""One random call of each public function; modules with a state are in :mod:`fuzz.modules`."""

from __future__ import annotations

import torch
from torch import Tensor

from pixcontrast.functional import (
    class_order,
    contrast_with_mean,
    gather_pixels,
    infonce_contrast,
    memory_mean,
    positive_contrast,
    unit_rows,
    valid_labels_at,
)
from pixcontrast.reference import NORM_FLOOR, as_rows
from pixcontrast.select import Anchors

from .draw import IGNORE, Draw
from .judge import Call, Tensors, judge


def pixels_of(features: Tensor) -> tuple[int, ...]:
    return (features.shape[0], *features.shape[2:])


def first_rows(counts: Tensor, capacity: int) -> Tensor:
    return torch.arange(capacity) < counts[:, None]


def least_norm(rows: Tensor, valid: Tensor) -> float:
    norms = torch.linalg.vector_norm(rows, dim=-1)[valid.reshape(-1)]
    norms = norms[norms >= NORM_FLOOR]
    return float(norms.min()) if len(norms) else 1.0


def positive_call(draw: Draw, with_mean: bool) -> Call:
    classes, dim, capacity = draw.number("C", 1), draw.number("D", 1), draw.number("N")
    features = draw.features(dim, draw.magnitude())
    shape = pixels_of(features)
    labels, counts = draw.labels(shape, classes), draw.counts(classes, capacity)
    loss_weight, grad_output = draw.pick(1.0, 0.1), 2.0 ** draw.pick(0, 0, *range(17))
    inputs = {"features": features, "weight_logits": draw.logits(shape)}
    if with_mean:
        inputs["mean"] = torch.nn.functional.normalize(draw.randn(classes, dim), dim=1).to(draw.dtype) * 0.7
    else:
        dtype = draw.pick(draw.dtype, draw.dtype, torch.bfloat16, torch.float32)
        inputs["queue"] = draw.rows(classes, capacity, dim, magnitude=draw.pick(1.0, draw.magnitude()), dtype=dtype)
        inputs["queue_weight_logits"] = draw.logits((classes, capacity))
    options = {"ignore_index": IGNORE, "loss_weight": loss_weight}

    def function(backend: str, t: Tensors) -> Tensors:
        logits = t.get("weight_logits")
        if with_mean:
            output = contrast_with_mean(
                t["features"], labels, t["mean"], counts, weight_logits=logits, backend=backend, **options
            )
        else:
            output = positive_contrast(
                t["features"], labels, t["queue"], queue_counts=counts, weight_logits=logits, backend=backend,
                queue_weight_logits=t.get("queue_weight_logits"), **options,
            )  # fmt: skip
        return {"loss": output.loss, "class_loss": output.class_loss, "counts": output.counts}

    valid = (labels >= 0) & (labels != IGNORE)
    count = torch.bincount(labels[valid], minlength=classes)
    active = (count >= 2) & (counts >= 2)
    if not with_mean:
        active &= capacity >= 2
    own = valid & active[torch.where(valid, labels, 0)]
    masks = {"features": (valid, own), "weight_logits": (valid, own & False)}
    if not with_mean:
        stored = first_rows(counts, capacity)
        masks |= {"queue": (stored, stored & active[:, None]), "queue_weight_logits": (stored, stored & False)}
    inputs = {name: t for name, t in inputs.items() if t is not None}

    def terms(t: Tensors) -> dict[str, float]:
        one = loss_weight / classes
        pull = one * grad_output
        nearest = least_norm(as_rows(t["features"]), own)
        return {"loss": one * 2 * int(active.sum()), "class_loss": 2.0, "grad features": pull / nearest,
                "grad weight_logits": pull, "grad mean": pull, "grad queue_weight_logits": pull}  # fmt: skip

    return Call(
        function, inputs, tuple(name for name in inputs if name != "queue"), terms, labels.numel() + capacity + dim,
        grad_output, {name: masks[name][0] for name in inputs if name in masks},
        {name: masks[name][1] for name in inputs if name in masks}, normalised=("features", "queue"),
    )  # fmt: skip


def memory_mean_call(draw: Draw) -> Call:
    classes, dim, capacity = draw.number("C"), draw.number("D"), draw.number("N")
    counts = draw.counts(classes, capacity)
    queue = draw.rows(classes, capacity, dim, magnitude=draw.magnitude())
    inputs = {"queue": queue, "logits": draw.logits((classes, capacity))}
    inputs = {name: t for name, t in inputs.items() if t is not None}
    stored = first_rows(counts, capacity)

    def function(backend: str, t: Tensors) -> Tensors:
        return {"mean": memory_mean(t["queue"], counts, t.get("logits"), backend)}

    return Call(
        function, inputs, tuple(inputs)[1:], lambda t: {"mean": 1.0, "grad logits": 3.0 * dim**0.5},
        capacity + dim, 1.0, {name: stored for name in inputs}, {"queue": stored} if dim else {},
        normalised=("queue",),
    )  # fmt: skip


def infonce_call(draw: Draw) -> Call:
    classes, dim = draw.number("C", 1), draw.number("D", 1)
    unit = draw.chance(0.6)
    features = draw.features(dim, 1.0 if unit else draw.magnitude(), unit)
    pixels = as_rows(features).shape[0]
    places = draw.number("P")
    indices = torch.where(draw.share(0.85, (places,)), draw.integers(0, pixels, (places,)), -1)
    if pixels == 0:
        indices = torch.full_like(indices, -1)
    labels = torch.where(draw.share(0.9, (places,)), draw.integers(0, classes, (places,)), draw.pick(-1, classes))
    queues, counts = {}, []
    for number in range(draw.pick(0, 1, 1, 2)):
        capacity = draw.number("N")
        dtype = draw.pick(draw.dtype, draw.dtype, torch.bfloat16, torch.float32)
        rows = draw.rows(classes, capacity, dim, dtype=dtype)
        queues[f"queue{number}"] = torch.nn.functional.normalize(rows.double(), dim=2).to(dtype) if unit else rows
        counts.append(draw.counts(classes, capacity))
    excluded = None
    if queues and draw.chance(0.4):
        counts = [count.clamp(0, q.shape[1]) for count, q in zip(counts, queues.values(), strict=True)]
        own = torch.stack(counts).sum(0)[labels.clamp(0, classes - 1)]
        excluded = (torch.rand(places, generator=draw.generator) * (own + 1)).long() - 1
        excluded = torch.where(labels < classes, excluded.minimum(own - 1), -1)
    temperature, base, weight = draw.temperature(), draw.pick(0.07, 1.0), draw.pick(1.0, 0.1)
    grad_output = 2.0 ** draw.pick(0, 0, *range(17))

    def function(backend: str, t: Tensors) -> Tensors:
        output = infonce_contrast(
            t["features"], Anchors(indices, labels), [t[name] for name in queues], queue_counts=counts, backend=backend,
            excluded=excluded, temperature=temperature, base_temperature=base, loss_weight=weight,
        )  # fmt: skip
        return {"loss": output.loss, "anchor_loss": output.anchor_loss, "positives": output.positives}

    used = (indices >= 0) & (labels >= 0) & (labels < classes if queues else True)
    stored = {name: first_rows(count, q.shape[1]) for (name, q), count in zip(queues.items(), counts, strict=True)}
    if queues:
        keys = sum(mask.sum(1) for mask in stored.values())
    else:
        keys = torch.bincount(labels[used], minlength=classes + 1)
    own = torch.where(used, keys[labels.clamp(0, len(keys) - 1)], 0)
    positives = own - (1 if not queues else 0 if excluded is None else (excluded >= 0).long())
    active = used & (positives > 0) & (keys.sum() > own)
    pixel_mask = torch.zeros(pixels, dtype=torch.bool)
    valid, matters = pixel_mask.clone(), pixel_mask.clone()
    valid[indices[used]], matters[indices[active]] = True, True
    shape = pixels_of(features)
    masks = {"features": (valid.view(shape), matters.view(shape))}
    masks |= {name: (mask, mask & bool(active.any()) & (excluded is None)) for name, mask in stored.items()}

    def terms(t: Tensors) -> dict[str, float]:
        anchors = as_rows(t["features"])[indices[used]]
        rows = [t[name][stored[name]] for name in queues] or [anchors]
        longest = [
            float(torch.linalg.vector_norm(r, dim=1).max()) if len(r) else 0.0 for r in (anchors, torch.cat(rows))
        ]
        z = longest[0] * longest[1] / temperature
        pull = weight / base * grad_output * longest[1] * (1 if not queues else 1 / max(int(active.sum()), 1))
        return {"loss": weight * temperature / base * (z + 10), "anchor_loss": z + 10, "grad features": pull * (z + 1)}

    return Call(
        function, {"features": features, **queues}, ("features",), terms, int(keys.sum()) + places + dim, grad_output,
        {name: mask[0] for name, mask in masks.items()}, {name: mask[1] for name, mask in masks.items()},
        any_threads=bool(queues),
        products=torch.bfloat16 if {features.dtype, *(q.dtype for q in queues.values())} == {torch.bfloat16} else None,
    )  # fmt: skip


def gather_call(draw: Draw) -> Call:
    features = draw.features(draw.number("D", 1), draw.magnitude())
    pixels = features.numel() // features.shape[1]
    count = draw.number("P")
    index = draw.integers(-1, pixels, (count,)).clamp(max=pixels - 1)
    used = torch.zeros(pixels, dtype=torch.bool)
    used[index[index >= 0]] = True
    used = used.view(pixels_of(features))
    return Call(
        lambda backend, t: {"rows": gather_pixels(t["features"], index, backend)}, {"features": features},
        ("features",), lambda t: {"grad features": 3.0 * max(count, 1)}, max(count, 1), 1.0, {"features": used},
        {"features": used},
    )  # fmt: skip


def unit_rows_call(draw: Draw) -> Call:
    rows = draw.rows(draw.number("P"), draw.number("D"), magnitude=draw.magnitude())
    rows = rows if draw.chance(0.5) else rows.t().contiguous().t()
    everything = torch.ones(len(rows), dtype=torch.bool)
    return Call(
        lambda backend, t: {"rows": unit_rows(t["rows"], backend)}, {"rows": rows}, (), lambda t: {"rows": 1.0},
        rows.shape[1], 1.0, {"rows": everything}, {"rows": everything} if rows.shape[1] else {}, normalised=("rows",),
    )  # fmt: skip


def sorted_by_class(draw: Draw) -> list[str]:
    """``class_order`` and ``valid_labels_at`` beside Python's lists: exact."""
    classes = draw.number("C", 1)
    labels = torch.where(draw.share(0.9, (shape := draw.map_shape(1))), draw.integers(0, classes + 2, shape), IGNORE)
    odd = torch.tensor([-1, -(2**63), 2**62, 2**31, 2**63 - 1])[draw.integers(0, 5, shape)]
    labels = torch.where(draw.share(draw.pick(0.0, 0.3), shape), odd, labels)
    labels = labels if draw.chance(0.7) else labels.transpose(1, 2).contiguous().transpose(1, 2)
    size = draw.random.randint(0, 8), draw.random.randint(0, 8)
    listed, problems = labels.reshape(-1).tolist(), []
    of_class = [[i for i, label in enumerate(listed) if label == c] for c in range(classes)]
    rest = [i for i, label in enumerate(listed) if not 0 <= label < classes]
    order = [i for members in of_class for i in members] + rest
    start = [sum(map(len, of_class[:c])) for c in range(classes)]
    ignored = draw.pick(IGNORE, 0)
    cells = [
        [y * shape[1] // max(size[0], 1), x * shape[2] // max(size[1], 1)]
        for y in range(size[0])
        for x in range(size[1])
    ]
    picked = [int(m[y, x]) for m in labels for y, x in cells]
    picked = [label if 0 <= label < classes and label != ignored else -1 for label in picked]
    for backend in ("reference", "extension"):
        s = class_order(labels, classes, backend)
        found = [t.tolist() for t in s if t is not None]
        sorted_labels = [c for c, members in enumerate(of_class) for _ in members] + [-1] * len(rest)
        if found != [order, sorted_labels, start, [len(m) for m in of_class], [len(listed) - len(rest)]]:
            problems.append(f"class_order: another order than that of lists ({backend})")
        if valid_labels_at(labels, size, classes, ignored, backend).reshape(-1).tolist() != picked:
            problems.append(f"valid_labels_at: other labels than those of lists ({backend})")
    return problems


CALLS = {
    "positive_contrast": lambda draw: judge(positive_call(draw, False), draw),
    "contrast_with_mean": lambda draw: judge(positive_call(draw, True), draw),
    "memory_mean": lambda draw: judge(memory_mean_call(draw), draw),
    "infonce_contrast": lambda draw: judge(infonce_call(draw), draw),
    "gather_pixels": lambda draw: judge(gather_call(draw), draw),
    "unit_rows": lambda draw: judge(unit_rows_call(draw), draw),
    "class_order, valid_labels_at": sorted_by_class,
}
