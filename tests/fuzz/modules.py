"""Random use of the modules: the memory, the queues, the loss and the branch."""

from __future__ import annotations

import copy

import torch

from pixcontrast import ClassMemory, ContrastBranch, PixelContrastLoss
from pixcontrast.queues import PixelQueues
from pixcontrast.reference import as_rows

from .draw import IGNORE, Draw
from .functions import CALLS, pixels_of
from .judge import Call, Tensors, disagreements, judge, same_bits
from .refusals import refusals


def broken(memory: ClassMemory) -> list[str]:
    """What no memory may be, whatever was pushed."""
    problems = []
    if not memory.rows.isfinite().all():
        problems.append("the memory holds rows that are not finite")
    if not bool(((memory.counts >= 0) & (memory.counts <= memory.capacity)).all()):
        problems.append(f"the memory counts {memory.counts.tolist()} rows")
    return problems


def states_differ(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() != second.keys() or not all(same_bits(first[name], second[name]) for name in first)


def memory(draw: Draw) -> list[str]:
    """Pushes by both backends, in float64, and by a memory that goes on from a ``state_dict``."""
    classes, dim, capacity = draw.number("C", 1), draw.number("D", 1), draw.number("N", 1)
    stored = draw.pick(draw.dtype, torch.float32)
    exact = ClassMemory(classes, capacity, dim, dtype=torch.float64)
    kept = {backend: ClassMemory(classes, capacity, dim, dtype=stored) for backend in ("reference", "extension")}
    problems = []
    for _ in range(draw.pick(1, 2, 3)):
        magnitude = draw.magnitude()
        magnitude = min(magnitude, 1e15)  # beyond, squares of float32 overflow and the row is rejected
        rows = draw.features(dim, magnitude)
        shape = pixels_of(rows)
        labels = draw.labels(shape, classes)
        spoilt = draw.share(0.15, shape) if draw.chance(0.3) else torch.zeros(shape, dtype=torch.bool)
        spoilt |= draw.share(0.5, shape) & ~((labels >= 0) & (labels < classes))
        (rows.movedim(1, -1) if rows.dim() == 4 else rows)[spoilt] = draw.bad()
        scores = draw.integers(-3, 4, shape).to(draw.dtype) if draw.chance(0.6) else None
        if scores is not None and draw.chance(0.3):
            scores[draw.share(0.2, shape)] = draw.bad()
        options = {"quota": draw.pick(None, 1, 3)}
        if draw.chance(0.5):
            options |= {"images": draw.integers(0, 3, shape), "num_images": 3}
        resumed = ClassMemory(classes, capacity, dim, dtype=stored)
        resumed.load_state_dict(copy.deepcopy(kept["extension"].state_dict()))
        exact.push(rows.double(), labels, scores, backend="reference", **options)
        for backend, one in kept.items():
            one.push(rows, labels, scores, backend=backend, **options)
            problems += broken(one)
        resumed.push(rows, labels, scores, backend="extension", **options)
        if states_differ(resumed, kept["extension"]):
            problems.append("a memory that goes on from a state_dict holds other bits")
    reference, extension = kept["reference"], kept["extension"]
    for name in ("counts", "cursors", "rejected"):
        if not torch.equal(getattr(reference, name), getattr(extension, name)):
            problems.append(
                f"{name}: {getattr(extension, name).tolist()}, expected {getattr(reference, name).tolist()}"
            )
    call = Call(lambda backend, t: t, {"rows": extension.rows}, length=dim)
    logits = draw.logits((classes, capacity))
    rows = [{"rows": m.rows, "mean": m.mean(logits, backend)[0]} for m, backend in
            ((exact, "reference"), (reference, "reference"), (extension, "extension"))]  # fmt: skip
    return problems + disagreements(call, *rows, terms={"rows": 1.0, "mean": 1.0})


def queues(draw: Draw) -> list[str]:
    """Both queues: what they hold is finite and repeats, and ignored pixels may be anything."""
    classes, dim, size = draw.number("C", 1), draw.number("D", 1), draw.number("N", 1)
    variant, seed = draw.pick("paper", "released"), draw.random.randrange(2**31)
    options = {
        "pixels_per_class": draw.pick(1, 3, 10),
        "variant": variant,
        "stride": draw.pick(1, 2),
        "dtype": draw.dtype,
    }
    batch, height, width = draw.map_shape(1)
    maps = draw.rows(batch, dim, height, width, magnitude=min(draw.magnitude(), 1e15))
    labels = draw.labels((batch, height, width), classes)
    spoilt = ~((labels >= 0) & (labels < classes))
    if draw.chance(0.5):
        spoilt = spoilt | draw.share(0.2, spoilt.shape)
    maps.movedim(1, -1)[spoilt & draw.chance(0.5)] = draw.bad()
    torch.manual_seed(seed)
    first = PixelQueues(classes, size, dim, **options)
    second = copy.deepcopy(first)
    for queue in (first, second):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(2):
            queue.update(maps, labels, generator)
    problems = [problem for part in first.parts() for problem in broken(part)]
    return problems + ["other bits the second time"] * states_differ(first, second)


def loss_call(draw: Draw) -> Call:
    classes, dim, capacity = draw.number("C", 1), draw.number("D", 1), draw.number("N", 1)
    objective, variant, seed = (
        draw.pick("positive", "infonce"),
        draw.pick("paper", "released"),
        draw.random.randrange(2**31),
    )
    features = draw.features(
        dim, 1.0 if objective == "infonce" else min(draw.magnitude(), 1e15), objective == "infonce"
    )
    shape = pixels_of(features)
    scaled = shape if len(shape) == 1 else (shape[0], shape[1] * draw.pick(1, 2), shape[2] * draw.pick(1, 3))
    labels, predict = draw.labels(scaled, classes), draw.integers(0, classes, scaled)
    options = {"objective": objective, "variant": variant, "temperature": draw.pick(0.07, 0.5, draw.temperature())}
    many = draw.chance(0.3)
    options |= {"max_samples": None, "max_views": None} if many else {"max_samples": 16, "max_views": draw.pick(1, 4)}
    kept = [ClassMemory(classes, capacity, dim, dtype=draw.dtype) for _ in range(draw.pick(1, 2))]
    for part in kept:
        part.rows.copy_(torch.nn.functional.normalize(draw.rows(classes, capacity, dim).double(), dim=2))
        part.counts.copy_(draw.integers(0, capacity + 1, (classes,)))
    use_queue = objective == "positive" or draw.chance(0.7)
    grad_output = 2.0 ** draw.pick(0, 0, *range(17))

    def function(backend: str, t: Tensors) -> Tensors:
        criterion = PixelContrastLoss(**options, backend=backend, ignore_index=IGNORE)
        parts = [copy.deepcopy(part).to(t["features"].dtype) for part in kept]
        queue = None if not use_queue else parts[0] if objective == "positive" else parts
        generator = torch.Generator().manual_seed(seed)
        return {"loss": criterion(t["features"], labels, predict, queue, generator=generator)}

    def terms(t: Tensors) -> dict[str, float]:
        rows = as_rows(t["features"])
        norms = torch.linalg.vector_norm(rows, dim=1)
        norms = norms[norms > 1e-12]
        if objective == "positive":
            return {"loss": 2.0, "grad features": grad_output / float(norms.min()) if len(norms) else 1.0}
        z = 1.01 / options["temperature"]
        return {"loss": options["temperature"] / 0.07 * (z + 10), "grad features": grad_output / 0.07 * (z + 1)}

    length = labels.numel() + capacity + dim
    products = torch.bfloat16 if draw.dtype == torch.bfloat16 and objective == "infonce" else None
    return Call(
        function, {"features": features}, ("features",), terms, length, grad_output,
        products=products, any_threads=use_queue,
    )  # fmt: skip


def branch(draw: Draw) -> list[str]:
    """Two steps of a branch: the same memory by both backends in float64, gradients beside those in float64."""
    objective, variant, seed = (
        draw.pick("positive", "infonce"),
        draw.pick("paper", "released"),
        draw.random.randrange(2**31),
    )
    # rows of one channel are 1 or -1, their scores tie, and which of them is remembered depends on rounding
    channels, classes, dim = draw.random.randint(1, 12), draw.random.randint(1, 4), draw.random.randint(2, 9)
    options = {"objective": objective, "variant": variant, "quota": draw.pick(None, 2), "capacity": draw.pick(3, 8)}
    if objective == "infonce":
        options |= {"max_samples": 24, "max_views": draw.pick(1, 4), "dense": draw.pick(True, False)}
        options["capacity"] = draw.pick(0, 3, 8)
    torch.manual_seed(seed)
    first = ContrastBranch(channels, classes, dim=dim, threshold=0.3, **options)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.copy_(draw.randn(*parameter.shape) * 0.5)
    batch, height, width = draw.map_shape()
    features, logits = draw.randn(batch, channels, height, width), draw.randn(batch, classes, height, width) * 4
    labels, predict = draw.labels((batch, height, width), classes), draw.integers(0, classes, (batch, height, width))
    features, logits = features.float(), logits.float()
    results, problems = {}, []
    for name, backend, dtype in (("truth", "reference", torch.float64), ("exact", "extension", torch.float64),
                                 ("expected", "reference", torch.float32), ("again", "extension", torch.float32),
                                 ("result", "extension", torch.float32)):  # fmt: skip
        one = copy.deepcopy(first).to(dtype)
        for module in one.modules():
            if hasattr(module, "backend"):
                module.backend = backend
        generator = torch.Generator().manual_seed(seed)
        if one.capacity:
            one.remember(features.to(dtype), logits.to(dtype), labels, generator=generator)
            problems += broken(one.memory)
            resumed = copy.deepcopy(first).to(dtype)
            resumed.load_state_dict(one.state_dict())
            problems += ["state_dict brings other bits back"] * states_differ(one, resumed)
            if dtype == torch.float32:  # the choice may depend on rounding: contrast with that of float64
                one.memory.load_state_dict(results["truth"][1])
        leaf = features.to(dtype).requires_grad_()
        loss = one(leaf, labels, predict, generator=generator)
        if not loss.requires_grad:
            return [*problems, "the loss is not connected to the graph"]
        loss.backward()
        state = one.memory.state_dict() if one.capacity else {}
        found = {"loss": loss.detach(), "grad features": leaf.grad}
        results[name] = ({key: torch.zeros(0) if t is None else t for key, t in found.items()}, state)
    exact_call = Call(lambda backend, t: t, {"": features.double()}, length=labels.numel() + channels + dim)
    call = Call(lambda backend, t: t, {"": features}, length=exact_call.length)
    truth, exact, expected, again, result = (
        results[name][0] for name in ("truth", "exact", "expected", "again", "result")
    )
    problems += [f"{name}: other bits the second time" for name in result if not same_bits(result[name], again[name])]
    size = {name: float(t.abs().max()) if t.numel() else 0.0 for name, t in truth.items()}
    amplified = {name: 1 + 100 * most for name, most in size.items()}  # by BatchNorm
    problems += [f"float64 {p}" for p in disagreements(exact_call, truth, truth, exact, amplified)]
    problems += disagreements(call, truth, expected, result, amplified)
    if not draw.chance(0.5) and one.capacity:
        for name in ("counts", "cursors"):
            if not torch.equal(results["truth"][1][name], results["exact"][1][name]):
                problems.append(f"{name} of the memory differ between backends")
    return problems


CALLS |= {
    "ClassMemory": memory,
    "PixelQueues": queues,
    "PixelContrastLoss": lambda draw: judge(loss_call(draw), draw),
    "ContrastBranch": branch,
    "refused arguments": refusals,
}
