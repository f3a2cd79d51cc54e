"""The operator `positive` in its three forms: pair loops, readable PyTorch, compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from positive_cases import IGNORE, Case, full_case, random_case, relative_errors

from pixcontrast.functional import memory_mean, positive_contrast
from pixcontrast.ops.unit_rows import unit_rows
from pixcontrast.reference import accumulation_dtype

BACKENDS = ("reference", "extension")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(80))
def test_agrees_with_pair_loops_in_float64(seed: int, backend: str) -> None:
    case = random_case(seed)
    truth = case.truth()
    _, results = case.run(backend)
    assert results.keys() == truth.keys()
    assert max(relative_errors(results, truth).values()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_channel(backend: str) -> None:
    """Every cosine is 1 or -1: the loss is that of the signs, and scaling a row changes nothing."""
    case = Case(
        torch.tensor([[2.0], [0.5], [-3.0], [1.0]]).double(),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([[[1.0], [4.0]], [[1.0], [-2.0]]]).double(),
        torch.tensor([2, 2]),
        torch.tensor([0.3, -1.0, 2.0, 0.7]).double(),
        torch.tensor([[0.1, 0.2], [1.5, -0.5]]).double(),
    )
    _, results = case.run(backend)
    truth = case.truth()
    for name in ("loss", "weight_logits", "queue_weight_logits"):
        torch.testing.assert_close(results[name], truth[name], rtol=1e-12, atol=1e-16)
    assert results["features"].abs().max() < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(24))
def test_rounding_errors_are_no_larger_than_those_of_the_reference(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed).to(dtype)
    truth = case.truth()
    _, expected = case.run("reference")
    _, results = case.run("extension")
    allowed = relative_errors(expected, truth)
    for name, error in relative_errors(results, truth).items():
        assert results[name].dtype == expected[name].dtype
        # one rounding of the result is never an error; beyond it, sums in another order may differ a little
        assert error <= 3 * allowed[name] + torch.finfo(results[name].dtype).eps, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_random_cases_reach_every_special_case(backend: str) -> None:
    seen, with_loss = set(), 0
    for seed in range(80):
        case = random_case(seed)
        output, _ = case.run(backend)
        with_loss += bool(output.loss > 0)
        pixels, counts = output.counts, case.counts
        expected = [int((case.labels == c).sum()) for c in range(len(counts))]
        assert pixels.tolist() == expected
        seen |= {"absent class"} if (pixels == 0).any() else set()
        seen |= {"one-row class"} if (pixels == 1).any() else set()
        seen |= {"empty memory"} if (counts == 0).any() else set()
        seen |= {"one memory row"} if (counts == 1).any() else set()
        seen |= {"ignored"} if (case.labels == IGNORE).any() else set()
        seen |= {f"{case.features.dim()}-d", f"C={len(counts)}"}
        if case.features.dim() == 4 and not case.features.is_contiguous():
            seen |= {"channels_last"}
        unused = (pixels < 2) | (counts < 2)
        assert (output.class_loss[unused] == 0).all()
    assert with_loss >= 70
    assert {"absent class", "one-row class", "empty memory", "one memory row", "ignored"} <= seen
    assert {"2-d", "4-d", "channels_last", "C=1", "C=150"} <= seen


def large_case(seed: int = 0, shape: tuple[int, ...] = (3000,), classes: int = 19, dim: int = 65) -> Case:
    g = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(shape[0], dim, *shape[1:], generator=g),
        torch.randint(0, classes, shape, generator=g),
        torch.randn(classes, 300, dim, generator=g),
        torch.full((classes,), 300),
        torch.randn(shape, generator=g),
        torch.randn(classes, 300, generator=g),
    )


@pytest.mark.parametrize("shape", [(3000,), (2, 37, 29)])
def test_many_pieces_agree_with_the_reference(shape: tuple[int, ...]) -> None:
    case = large_case(shape=shape).to(torch.float64)
    _, expected = case.run("reference")
    _, results = case.run("extension")
    assert max(relative_errors(results, expected).values()) < 1e-12


@pytest.mark.parametrize("dim", [1, 7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_planes_give_the_bits_of_rows(dtype: torch.dtype, dim: int) -> None:
    """Images of 207 pixels: three tiles of 64, and 15 that are less than a vector."""
    torch.manual_seed(0)
    planes, queue = torch.randn(2, dim, 9, 23).to(dtype), torch.randn(3, 4, dim).to(dtype)
    labels = torch.randint(-1, 3, (2, 9, 23))
    rows = planes.permute(0, 2, 3, 1).flatten(0, 2).requires_grad_()
    planes.requires_grad_()
    for features, classes in ((planes, labels), (rows, labels.flatten())):
        positive_contrast(features, classes, queue, ignore_index=-1).loss.backward()
    assert planes.grad is not None and rows.grad is not None
    assert torch.equal(planes.grad.permute(0, 2, 3, 1).flatten(0, 2), rows.grad)


@pytest.mark.parametrize("dim", [256, 250])  # rows of 1000 bytes begin at any multiple of 8
def test_streamed_stores_agree_with_the_reference(dim: int) -> None:
    case = large_case(shape=(17000,), dim=dim)  # 17 MB of gradient: past the caches
    _, expected = case.run("reference")
    _, results = case.run("extension")
    assert max(relative_errors(results, expected).values()) < 2e-5


@pytest.mark.parametrize("shape", [(3000,), (2, 37, 29)])
def test_same_bits_with_any_number_of_threads(shape: tuple[int, ...]) -> None:
    case = large_case(shape=shape)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(case.run("extension")[1])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set_agrees(capability: str) -> None:
    code = (
        "from pixcontrast import _C; import positive_cases as p\n"
        "print(_C.build_info()['cpu_capability'])\n"
        "print(max(max(p.relative_errors(c.run('extension')[1], c.truth()).values())"
        " for c in map(p.random_case, range(20))))"
    )
    environment = os.environ | {"PIXCONTRAST_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    used, error = done.stdout.split()
    assert used in (capability, "baseline")  # a machine without AVX2 stays at the baseline
    assert float(error) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("incoming", [0.0, 0.25, -3.0])
def test_incoming_gradient_scales_everything(backend: str, incoming: float) -> None:
    case = full_case()
    _, ones = case.run(backend)
    _, scaled = case.run(backend, incoming)
    for name in ("features", "weight_logits", "queue_weight_logits"):
        torch.testing.assert_close(scaled[name], ones[name] * incoming, rtol=1e-12, atol=0)


def test_backward_twice_gives_the_same_gradient_twice() -> None:
    case = full_case()
    features, weight_logits, _ = case.leaves()
    loss = positive_contrast(features, case.labels, case.queue, weight_logits=weight_logits, ignore_index=IGNORE).loss
    (first,) = torch.autograd.grad(loss, features, grad_outputs=torch.tensor(0.5).double(), retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, features, grad_outputs=torch.tensor(0.5).double())
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_extreme_logits(logit: float, backend: str, dtype: torch.dtype) -> None:
    base = full_case()
    spread = torch.linspace(-1, 1, base.labels.numel(), dtype=torch.float64).reshape(base.labels.shape)
    queue_spread = torch.linspace(-1, 1, base.queue_weight_logits.numel(), dtype=torch.float64).view_as(
        base.queue_weight_logits
    )
    case = replace(base, weight_logits=logit + spread, queue_weight_logits=logit + queue_spread).to(dtype)
    _, results = case.run(backend)
    assert all(value.isfinite().all() for value in results.values())
    errors = relative_errors(results, case.truth())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert errors["loss"] < tolerance and errors["features"] < tolerance
    if logit < 0:  # for large positive logits the true gradient of the weights underflows to zero
        assert max(errors.values()) < (1e-11 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("backend", ["extension", "reference"])
def test_logits_of_minus_infinity_weigh_nothing_and_a_class_of_them_alone_is_nan(backend: str, maps: bool) -> None:
    features, labels = torch.randn(40, 8, dtype=torch.float64), torch.arange(40) % 4
    labels[labels == 3] = torch.tensor([3] + [IGNORE] * 9)  # class 3 has one pixel and takes no part
    logits = torch.randn(40, dtype=torch.float64)
    logits[(labels == 0) & (torch.arange(40) > 8)] = -torch.inf  # class 0 keeps three
    logits[(labels == 1) | (labels == 3)] = -torch.inf
    queue, counts = torch.randn(4, 6, 8, dtype=torch.float64), torch.tensor([6, 6, 4, 3])
    queue_logits = torch.randn(4, 6, dtype=torch.float64)
    queue_logits[2, 1:] = -torch.inf  # one row is left
    queue_logits[3] = -torch.inf
    mean = memory_mean(queue, counts, queue_logits, backend)
    assert mean.isnan().all(1).tolist() == [False, False, False, True]
    torch.testing.assert_close(mean[2], queue[2, 0] / queue[2, 0].norm())

    x = features.T.reshape(1, 8, 5, 8) if maps else features
    shape = (1, 5, 8) if maps else (40,)
    x, a = x.clone().requires_grad_(), logits.view(shape).clone().requires_grad_()
    output = positive_contrast(
        x, labels.view(shape), queue, queue_counts=counts, weight_logits=a, ignore_index=IGNORE, backend=backend
    )
    assert output.class_loss.isnan().tolist() == [False, True, False, False]
    kept = torch.tensor([0, 4, 8])
    w = torch.softmax(torch.nn.functional.logsigmoid(logits[kept]), 0)
    unit, memory = (torch.nn.functional.normalize(rows, dim=1) for rows in (features[kept], queue[0]))
    torch.testing.assert_close(output.class_loss[0], (w @ (1 - unit @ memory.T)).mean())
    output.loss.backward()
    assert x.grad is not None and a.grad is not None
    grad = x.grad.flatten(2)[0].T if maps else x.grad
    undefined = labels == 1
    assert grad[undefined].isnan().all() and a.grad.flatten()[undefined].isnan().all()
    assert grad[~undefined].isfinite().all() and a.grad.flatten()[~undefined].isfinite().all()
    assert not a.grad.flatten()[(labels == 0) & (logits == -torch.inf)].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_ignored_pixels_may_be_anything(backend: str, memory_format: torch.memory_format) -> None:
    case = next(c for c in map(random_case, range(80)) if c.features.dim() == 4 and (c.labels == IGNORE).any())
    _, expected = case.run(backend)
    ignored = case.labels == IGNORE
    features = torch.where(ignored[:, None], float("nan"), case.features).contiguous(memory_format=memory_format)
    weight_logits = torch.where(ignored, float("inf"), torch.zeros_like(case.labels, dtype=torch.float64))
    _, expected = replace(case, weight_logits=torch.zeros_like(weight_logits)).run(backend)
    _, results = replace(case, features=features, weight_logits=weight_logits).run(backend)
    for name, value in expected.items():
        assert results[name].isfinite().all()
        torch.testing.assert_close(results[name], value, rtol=1e-12, atol=1e-300)
    gradient = results["features"].movedim(1, -1)[ignored]
    assert (gradient == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ignored_label_may_be_one_of_the_classes(backend: str) -> None:
    case = full_case()
    keep = case.labels == 1
    expected = positive_contrast(case.features[keep], case.labels[keep], case.queue, queue_counts=case.counts).loss
    loss = positive_contrast(
        case.features,
        torch.where(keep, 1, 0),
        case.queue,
        queue_counts=case.counts,
        ignore_index=0,
        backend=backend,
    ).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert loss > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_rows_count_as_zero_and_get_no_gradient(backend: str) -> None:
    rows = torch.randn(6, 4, dtype=torch.float64)
    rows[2] = 0
    rows[3] = 1e-20
    queue = torch.randn(1, 3, 4, dtype=torch.float64)
    queue[0, 1] = 0
    counts = torch.tensor([3])
    zeros = torch.zeros(6, dtype=torch.int64)
    case = Case(rows, zeros, queue, counts, torch.randn(6).double(), torch.randn(1, 3).double())
    _, results = case.run(backend)
    assert max(relative_errors(results, case.truth()).values()) < 1e-12
    assert (results["features"][2:4] == 0).all() and results["features"].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["all ignored", "empty memory", "memory without room", "no pixels", "one row"])
def test_nothing_to_contrast_gives_a_connected_zero(backend: str, what: str) -> None:
    count = 0 if what == "no pixels" else 1 if what == "one row" else 5
    features = torch.randn(count, 8, requires_grad=True)
    labels = torch.full((count,), IGNORE if what == "all ignored" else 0)
    weight_logits = torch.randn(count, requires_grad=True)
    room = 0 if what == "memory without room" else 4
    queue_weight_logits = torch.randn(2, room, requires_grad=True)
    counts = torch.zeros(2, dtype=torch.int64) if what == "empty memory" else torch.full((2,), room)
    output = positive_contrast(
        features, labels, torch.randn(2, room, 8), queue_counts=counts, weight_logits=weight_logits,
        queue_weight_logits=queue_weight_logits,
        backend=backend,
    )  # fmt: skip
    assert output.loss.item() == 0 and output.loss.requires_grad
    output.loss.backward()
    for leaf in (features, weight_logits, queue_weight_logits):
        assert leaf.grad is not None and (leaf.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(12,), (1, 3, 4)])
def test_gradcheck(shape: tuple[int, ...], backend: str) -> None:
    case = large_case(shape=shape, classes=3, dim=5).to(torch.float64)
    features, weight_logits, queue_weight_logits = case.leaves()

    def loss(features, weight_logits, queue_weight_logits):
        return positive_contrast(
            features, case.labels, case.queue, queue_counts=case.counts, weight_logits=weight_logits,
            queue_weight_logits=queue_weight_logits,
            ignore_index=IGNORE, backend=backend,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (features, weight_logits, queue_weight_logits), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", [1, 3, 4, 8])
def test_opcheck(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed).to(dtype)
    library = torch.ops.pixcontrast
    sums = accumulation_dtype(dtype)
    queue_weight_logits = torch.randn(case.queue.shape[:2], dtype=sums)
    mean = library.class_mean(case.queue, case.counts, queue_weight_logits)
    torch.library.opcheck(library.class_mean.default, (case.queue, case.counts, queue_weight_logits))
    torch.library.opcheck(
        library.class_mean_backward.default, (torch.randn_like(mean), case.queue, case.counts, queue_weight_logits)
    )
    weight_logits = torch.randn(case.labels.shape, dtype=sums)
    for needs in ((True, True, True), (False, False, False), (True, False, True)):
        torch.library.opcheck(
            library.positive.default,
            (case.features, case.labels, weight_logits, mean, case.counts, 0.5, IGNORE, *needs),
        )


def test_gradients_keep_dtype_and_memory_format() -> None:
    base = large_case(shape=(2, 9, 7))
    for dtype in (torch.float32, torch.bfloat16):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            case = base.to(dtype)
            case = replace(case, features=case.features.contiguous(memory_format=memory_format))
            gradient = case.run("extension")[1]["features"]
            assert gradient.dtype == dtype and gradient.is_contiguous(memory_format=memory_format)


def test_features_and_queue_may_differ_in_dtype() -> None:
    base = large_case()
    expected = base.run("reference")[1]["loss"]
    for features, queue in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        case = replace(base, features=base.features.to(features), queue=base.queue.to(queue))
        torch.testing.assert_close(case.run("extension")[1]["loss"], expected, rtol=2e-3, atol=0)
        torch.testing.assert_close(case.run("extension")[1]["loss"], case.run("reference")[1]["loss"])


def test_non_contiguous_inputs() -> None:
    case = large_case(shape=(400,))
    expected = case.run("extension")[1]
    strided = replace(
        case,
        features=case.features.t().contiguous().t(),
        labels=torch.stack([case.labels, case.labels], 1)[:, 0],
        queue=case.queue.transpose(0, 1).contiguous().transpose(0, 1),
        queue_weight_logits=case.queue_weight_logits.t().contiguous().t(),
    )
    results = strided.run("extension")[1]
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_memory_mean_ignores_rows_beyond_the_count() -> None:
    queue = torch.randn(3, 5, 4)
    counts = torch.tensor([0, 2, 5])
    spoilt = queue.clone()
    spoilt[0], spoilt[1, 2:] = float("nan"), float("nan")
    for backend in BACKENDS:
        mean = memory_mean(spoilt, counts, backend=backend)
        torch.testing.assert_close(mean[1], torch.nn.functional.normalize(queue[1, :2], dim=1).mean(0))
        assert (mean[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_row_of_the_memory_with_trained_weights_keeps_gradients_finite(backend: str) -> None:
    queue = torch.randn(2, 5, 4, dtype=torch.float64)
    queue[0, 1], queue[1, 4] = 0, 1e-13
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(2, 4, dtype=torch.float64)
    mean = memory_mean(queue, torch.tensor([5, 5]), logits, backend)
    (grad,) = torch.autograd.grad((mean * pull).sum(), logits)
    sigma = torch.sigmoid(logits.detach())
    for c in range(2):
        v = sigma[c] / sigma[c].sum()
        norms = [float(row.norm()) for row in queue[c]]
        g = torch.stack(
            [row @ pull[c] / n if n >= 1e-12 else row.sum() * 0 for row, n in zip(queue[c], norms, strict=True)]
        )
        expected = v * (1 - sigma[c]) * (g - (v * g).sum())
        torch.testing.assert_close(grad[c], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_beyond_float32_reach_the_loss(backend: str, dtype: torch.dtype) -> None:
    features, labels = torch.randn(6, 40).to(dtype), torch.tensor([0, 0, 0, 1, 1, 1])
    queue, logits = torch.randn(2, 3, 40).to(dtype), torch.randn(2, 3)
    for where in ("features", "queue"):
        f, q, b = (t.clone() for t in (features, queue, logits))
        (f if where == "features" else q[0])[1] = 1e19  # a square of 4e39, and every element is finite
        f.requires_grad_(), b.requires_grad_()
        output = positive_contrast(f, labels, q, queue_weight_logits=b, backend=backend)
        output.loss.backward()
        assert output.loss.isnan() and output.class_loss.isnan().tolist() == [True, False], where
        assert f.grad[1].isnan().all() and f.grad[3:].isfinite().all() and b.grad[1].isfinite().all()
        f = features * 1e15
        assert positive_contrast(f, labels, queue, backend=backend).loss.isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_unit_row_of_a_norm_beyond_its_dtype_is_nan(backend: str) -> None:
    for dtype, value in ((torch.float32, 1e19), (torch.bfloat16, 1e19), (torch.float64, 1e154)):
        rows = torch.ones(3, 300, dtype=dtype)
        rows[1] = value
        unit = unit_rows(rows, backend)
        assert unit[1].isnan().all() and unit[[0, 2]].isfinite().all()
