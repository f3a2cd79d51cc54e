"""The operator `infonce` in its three forms: pair loops, readable PyTorch, compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from oracle import infonce_pairs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pixcontrast.functional import infonce_contrast
from pixcontrast.reference import as_rows
from pixcontrast.select import Anchors

BACKENDS = ("reference", "extension")


@dataclass
class Case:
    features: Tensor
    anchors: Anchors
    queues: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    excluded: Tensor | None = None
    temperature: float = 0.1

    def run(self, backend: str):
        leaf = self.features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        output = infonce_contrast(
            leaf, self.anchors, self.queues, queue_counts=self.counts, excluded=self.excluded,
            temperature=self.temperature, backend=backend,
        )  # fmt: skip
        output.loss.backward()
        return output, leaf.grad

    def truth(self) -> tuple[Tensor, Tensor]:
        leaf = self.features.detach().double().requires_grad_()
        classes = len(self.counts[0]) if self.queues else 1 << 20
        pixels, labels = self.anchors
        used = [i for i in range(len(pixels)) if pixels[i] >= 0 and 0 <= labels[i] < classes]
        anchors, label = as_rows(leaf)[pixels[used]], labels[used]
        excluded = [-1] * len(used)
        if not self.queues:
            keys, key_labels, excluded = anchors, label, list(range(len(used)))
        else:
            rows, key_labels = [], []
            start = {}
            for c in range(classes):
                start[c] = len(rows)
                for queue, count in zip(self.queues, self.counts, strict=True):
                    rows += list(queue[c, : int(count[c])].double())
                key_labels += [c] * (len(rows) - start[c])
            keys = torch.stack(rows) if rows else leaf.new_zeros(0, leaf.shape[1])
            if self.excluded is not None:
                excluded = [
                    start[int(label[n])] + int(self.excluded[i]) if self.excluded[i] >= 0 else -1
                    for n, i in enumerate(used)
                ]
        loss = infonce_pairs(anchors, label, keys, key_labels, excluded, self.temperature, 0.07)
        loss.backward()
        return loss.detach(), leaf.grad


def random_case(seed: int) -> Case:
    """Few or many classes, unused places, anchors of unknown class, queues in one or two parts, any norm."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=g))]

    classes, dim = pick(1, 2, 3, 7), pick(1, 3, 8, 19)
    shape = pick((19,), (2, 3, 4), (1, 5, 3))
    features = torch.randn(shape[0], dim, *shape[1:], generator=g, dtype=torch.float64) * pick(0.3, 1.0, 20.0)
    if features.dim() == 4 and pick(True, False):
        features = features.contiguous(memory_format=torch.channels_last)
    total = features.numel() // dim
    places = pick(1, 6, total)
    pixels = torch.randperm(total, generator=g)[:places]
    pixels[torch.rand(places, generator=g) < 0.2] = -1
    labels = torch.randint(0, classes + 1, (places,), generator=g)  # with queues, `classes` is an unknown class
    labels = torch.where(pixels < 0, -1, labels)
    case = Case(features, Anchors(pixels, labels), temperature=pick(0.07, 0.5, 1.0))
    if pick(True, True, False):
        for _ in range(pick(1, 2)):
            rows = pick(1, 3, 6)
            case.queues.append(torch.randn(classes, rows, dim, generator=g, dtype=torch.float64))
            case.counts.append(torch.randint(0, rows + 1, (classes,), generator=g))
        if pick(True, False):
            own = sum(count[labels.clamp(0, classes - 1)] for count in case.counts)
            drawn = (torch.rand(places, generator=g) * (own + 1)).long() - 1
            case.excluded = torch.where(labels < classes, drawn, -1)
    return case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(120))
def test_agrees_with_pair_loops_in_float64(seed: int, backend: str) -> None:
    case = random_case(seed)
    loss, grad = case.truth()
    output, result = case.run(backend)
    assert abs(output.loss - loss) <= 1e-12 * loss.abs()
    # a gradient that cancels (one channel, one class) is compared with the size of its terms
    scale = max(float(grad.abs().max()), 1e-3 * float(loss) / case.temperature)
    assert float((result - grad).abs().max()) <= 1e-12 * scale


def test_the_random_cases_reach_every_special_case() -> None:
    seen = {"loss": 0, "no positives": 0, "no negatives": 0, "excluded": 0, "two queues": 0, "each other": 0}
    for seed in range(120):
        case = random_case(seed)
        output, _ = case.run("extension")
        seen["loss"] += bool(output.loss > 0)
        used = case.anchors.indices >= 0
        seen["no positives"] += bool((used & (output.positives == 0)).any())
        seen["no negatives"] += bool(((output.positives > 0) & (output.anchor_loss == 0)).any())
        seen["excluded"] += case.excluded is not None
        seen["two queues"] += len(case.queues) == 2
        seen["each other"] += not case.queues
    assert seen["loss"] >= 60 and min(seen.values()) >= 5, seen


def large_case(dtype: torch.dtype = torch.float32, queue: bool = True, backend: str = "extension") -> Case:
    """Many tiles of anchors and keys; for the reference, which has no tiles and is slow, fewer keys."""
    g = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(700, 64, generator=g), dim=1).to(dtype)
    anchors = Anchors(torch.randperm(700, generator=g)[:600], torch.randint(0, 5, (600,), generator=g))
    if not queue:
        return Case(features, anchors)
    counts = torch.tensor([5000, 4096, 2049, 1, 3000] if backend == "extension" else [50, 40, 20, 1, 30])
    rows = torch.nn.functional.normalize(torch.randn(5, int(counts[0]), 64, generator=g), dim=2).to(dtype)
    return Case(features, anchors, [rows], [counts])


@pytest.mark.parametrize("queue", [True, False])
def test_many_tiles_agree_with_the_reference(queue: bool) -> None:
    case = large_case(torch.float64, queue)
    expected, expected_grad = case.run("reference")
    output, grad = case.run("extension")
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.anchor_loss, expected.anchor_loss, rtol=1e-11, atol=1e-13)
    assert torch.equal(output.positives, expected.positives)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12 * float(expected_grad.abs().max()))


def assert_rounds_like_the_reference(case: Case) -> None:
    """Loss and gradient are no further from those in float64 than three times those of the reference."""
    exact = replace(case, features=case.features.double(), queues=[q.double() for q in case.queues])
    truth, true_grad = exact.run("reference")
    dtype, errors = case.features.dtype, []
    for backend in BACKENDS:
        output, grad = case.run(backend)
        assert grad.dtype == dtype and output.loss.dtype == torch.float32
        errors.append(
            (abs(output.loss - truth.loss) / truth.loss, (grad - true_grad).abs().max() / true_grad.abs().max())
        )
    (loss_allowed, grad_allowed), (loss_error, grad_error) = errors
    assert loss_error <= 3 * loss_allowed + torch.finfo(torch.float32).eps
    assert grad_error <= 3 * grad_allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queue", [True, False])
def test_rounding_errors_are_no_larger_than_those_of_the_reference(queue: bool, dtype: torch.dtype) -> None:
    assert_rounds_like_the_reference(large_case(dtype, queue))


def bfloat16_case(dim: int, alike: bool = False) -> Case:
    """Channels, anchors and keys of two queues that fill no tile; ``alike``: keys that differ by a hundredth."""
    g = torch.Generator().manual_seed(dim)
    features = torch.nn.functional.normalize(torch.randn(101, dim, generator=g), dim=1)
    labels = torch.randint(0, 3, (101,), generator=g)
    queues = [torch.nn.functional.normalize(torch.randn(3, rows, dim, generator=g), dim=2) for rows in (601, 34)]
    counts = [torch.tensor([601, 290, 1]), torch.tensor([33, 0, 34])]
    excluded = torch.where(labels == 0, torch.randint(0, 634, (101,), generator=g), -1)
    if alike:
        queues, counts = [queues[0][:1, :1] + 0.01 * queues[0]], [torch.tensor([300, 3, 2])]
        excluded = torch.full_like(excluded, -1)
    queues = [queue.bfloat16() for queue in queues]
    return Case(
        features.bfloat16(), Anchors(torch.arange(101), labels), queues, counts, excluded, 1.0 if alike else 0.1
    )


@pytest.mark.parametrize("dim", [1, 31, 33, 64, 97])
def test_bfloat16_of_any_size_rounds_like_the_reference(dim: int) -> None:
    assert_rounds_like_the_reference(bfloat16_case(dim))


def test_bfloat16_weights_of_positives_and_negatives_balance() -> None:
    # The gradient is a small difference between two mean keys: both must be means, whatever the weights are rounded to.
    assert_rounds_like_the_reference(bfloat16_case(64, alike=True))


@pytest.mark.parametrize("features", [torch.bfloat16, torch.float32])
def test_bfloat16_is_multiplied_as_such_only_if_all_is(features: torch.dtype) -> None:
    # 1 + 2^-12 is no bfloat16; one of two dtypes is not bfloat16 either way
    case = bfloat16_case(33)
    case.features = (case.features * (1 + 2**-12)).to(features)
    if features == torch.bfloat16:
        case.queues[1] = case.queues[1].float() * (1 + 2**-12)
    assert_rounds_like_the_reference(case)


@pytest.mark.parametrize("capability", ["avx512", "baseline"])
def test_bfloat16_without_its_instruction(capability: str) -> None:
    code = (
        "from pixcontrast import _C; import test_infonce as t\n"
        "t.assert_rounds_like_the_reference(t.bfloat16_case(33))\n"
        "print(_C.build_info()['cpu_capability'])"
    )
    environment = os.environ | {"PIXCONTRAST_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in (capability, "avx2", "baseline")  # or what the machine has


def test_same_bits_with_any_number_of_threads() -> None:
    case, threads, results = large_case(), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            output, grad = case.run("extension")
            results.append((output.loss, output.anchor_loss, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for other in results[1:] for one, other in zip(results[0], other, strict=True))


def worst_error() -> float:
    """Largest deviation of loss and gradient from the reference in float64, over few and many keys."""
    worst = 0.0
    for case in (*map(random_case, range(40)), large_case(torch.float64), large_case(torch.float64, queue=False)):
        (expected, expected_grad), (output, grad) = (case.run(backend) for backend in BACKENDS)
        scale = max(float(expected_grad.abs().max()), 1e-3 * float(expected.loss) / case.temperature)
        worst = max(worst, float((output.loss - expected.loss).abs() / expected.loss.clamp_min(1e-300)))
        worst = max(worst, float((grad - expected_grad).abs().max() / max(scale, 1e-300)))
    return worst


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set_agrees(capability: str) -> None:
    environment = os.environ | {"PIXCONTRAST_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parent)}
    code = "import test_infonce; print(test_infonce.worst_error())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue", [True, False])
def test_large_norms_and_small_temperatures_stay_finite(queue: bool, backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = large_case(dtype, queue, backend)
        for scale, temperature in ((1.0, 0.001), (300.0, 0.07), (0.0, 0.07)):
            case.features, case.temperature = large_case(dtype, queue, backend).features * scale, temperature
            output, grad = case.run(backend)
            assert output.loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_contrast_gives_a_connected_zero(backend: str) -> None:
    features = torch.randn(6, 4, requires_grad=True)
    none = Anchors(torch.full((3,), -1), torch.full((3,), -1))
    single = Anchors(torch.tensor([0, 2, 4]), torch.tensor([1, 1, 1]))  # one class: no negatives
    lonely = Anchors(torch.tensor([0, 2, 4]), torch.tensor([0, 1, 2]))  # no positives
    empty_queue = ([torch.randn(3, 2, 4)], [torch.zeros(3, dtype=torch.int64)])
    for anchors, (queues, counts) in (
        (none, ([], [])), (single, ([], [])), (lonely, ([], [])), (single, empty_queue),
        (Anchors(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)), ([], [])),
    ):  # fmt: skip
        features.grad = None
        loss = infonce_contrast(features, anchors, queues, queue_counts=counts, backend=backend).loss
        assert loss.item() == 0
        loss.backward()
        assert (features.grad == 0).all()


@pytest.mark.parametrize("queue", [True, False])
def test_gradcheck(queue: bool) -> None:
    case = next(c for c in map(random_case, range(120)) if bool(c.queues) == queue and c.run("extension")[0].loss > 0)

    def loss(features: Tensor) -> Tensor:
        return infonce_contrast(features, case.anchors, case.queues, queue_counts=case.counts, temperature=1.0).loss

    assert torch.autograd.gradcheck(loss, case.features.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    for case in (large_case(dtype), large_case(dtype, queue=False)):
        for needs in (True, False):
            torch.library.opcheck(
                torch.ops.pixcontrast.infonce.default,
                (case.features, *case.anchors, case.queues, case.counts, None, 0.1, 0.07, 1.0, needs),
            )


def test_a_pixel_may_be_an_anchor_twice() -> None:
    features = torch.randn(6, 4, dtype=torch.float64)
    case = Case(features, Anchors(torch.tensor([0, 0, 2, 4]), torch.tensor([0, 0, 1, 1])))
    assert torch.allclose(case.run("extension")[1], case.run("reference")[1], rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"queues": [torch.randn(2, 3, 5)]}, r"queue must be \[C, N, D=4\], got \(2, 3, 5\)"),
        ({"features": torch.randn(4)}, r"features must be \[P, D\] or \[B, D, H, W\], got \(4,\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"features": torch.randn(6, 4), "anchors": Anchors(torch.arange(3), torch.arange(3)), "queues": ()}
    with pytest.raises(ValueError, match=message):
        infonce_contrast(**arguments | change)


def test_too_many_keys_for_the_cuda_kernels_is_one_clear_error() -> None:
    with FakeTensorMode():
        features = torch.empty(100, 16, device="cuda")
        anchors = Anchors(torch.empty(9, dtype=torch.int64, device="cuda"), torch.zeros(9, dtype=torch.int64))
        queue = torch.empty(1000, 1 << 20, 16, device="cuda")
        with pytest.raises(ValueError, match=r"queues hold 1088704000 keys .* on CUDA there may be 1071644672"):
            infonce_contrast(features, anchors, [queue, queue[:, :40000]], backend="reference")


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("where", ["anchor of a queue", "key", "anchor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_reaches_the_loss(
    backend: str, where: str, dtype: torch.dtype, value: float, gradient: bool
) -> None:
    case = large_case(dtype, where != "anchor", backend)
    if where == "key":
        case.queues[0][1, 7, 3] = value
    else:
        case.features[case.anchors.indices[5], 3] = value
    with torch.set_grad_enabled(gradient):
        if not gradient:
            assert infonce_contrast(
                case.features, case.anchors, case.queues, queue_counts=case.counts, backend=backend
            ).loss.isnan()
            return
        output, grad = case.run(backend)
    assert output.loss.isnan() and grad[case.anchors.indices[5]].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue", [True, False])
def test_similarities_that_overflow_reach_the_loss(queue: bool, backend: str) -> None:
    case = large_case(torch.float32, queue, backend)
    case.features = case.features * 1e38
    case.temperature = 1e-3
    assert case.run(backend)[0].loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queue", [True, False])
def test_what_is_not_valid_may_hold_anything(queue: bool, backend: str) -> None:
    case = large_case(torch.float32, queue, backend)
    case.anchors.indices[::9] = -1
    case.anchors.labels[4::9] = -1
    used = (case.anchors.indices >= 0) & (case.anchors.labels >= 0)
    expected, expected_grad = case.run(backend)
    unused = torch.ones(len(case.features), dtype=torch.bool)
    unused[case.anchors.indices[used]] = False
    for value in (torch.nan, torch.inf):
        case.features[unused] = value
        for rows, counts in zip(case.queues, case.counts, strict=True):
            rows[torch.arange(rows.shape[1]) >= counts[:, None]] = value
        output, grad = case.run(backend)
        assert torch.equal(output.loss, expected.loss) and output.loss > 0
        assert torch.equal(grad[~unused], expected_grad[~unused]) and not grad[unused].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_anchor_without_negatives_has_no_loss_whatever_its_keys_are(backend: str) -> None:
    features = torch.randn(6, 4)
    features[2] = torch.nan
    anchors = Anchors(torch.tensor([0, 2, 4]), torch.tensor([1, 1, 1]))
    queue = torch.full((3, 2, 4), torch.nan)
    for case in (Case(features, anchors), Case(features, anchors, [queue], [torch.tensor([0, 2, 0])])):
        output, grad = case.run(backend)
        assert output.loss == 0 and not output.anchor_loss.any() and output.positives.any()
        assert backend == "reference" or not grad.any()  # autograd multiplies its zeros by the NaN


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_excluded_key_that_does_not_exist_is_named(backend: str) -> None:
    case = large_case()
    case.excluded = torch.full((600,), -1)
    case.excluded[3], case.excluded[4] = 1 << 20, 4096
    case.anchors.labels[3], case.anchors.labels[4] = -1, 1  # the first one is no anchor
    with pytest.raises(ValueError, match="excluded: 1 of 600 are beyond the keys of the class: key 4096 of 4096"):
        case.run(backend)
    case.excluded[4] = 4095
    assert case.run(backend)[0].positives[4] == 4095


def test_self_contrast_in_several_panels() -> None:
    # 2^22 products at a time: more than 2048 anchors need several panels, and each pair pulls at both of its anchors
    g = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2100, 5, generator=g, dtype=torch.float64), dim=1)
    case = Case(features, Anchors(torch.arange(2100), torch.randint(0, 3, (2100,), generator=g)))
    (expected, expected_grad), (output, grad) = (case.run(backend) for backend in BACKENDS)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12 * float(expected_grad.abs().max()))


def test_rows_so_long_that_keys_are_not_split() -> None:
    # 600 x 3600 elements of the gradient are more than the sums of one split hold, and a tile has 13 keys, not 192
    g = torch.Generator().manual_seed(0)
    features = torch.randn(600, 3600, generator=g, dtype=torch.float64)
    queue, counts = torch.randn(2, 40, 3600, generator=g, dtype=torch.float64), torch.tensor([40, 33])
    anchors = Anchors(torch.randperm(600, generator=g), torch.randint(0, 2, (600,), generator=g))
    case = Case(features / 60, anchors, [queue / 60], [counts])
    (expected, expected_grad), (output, grad) = (case.run(backend) for backend in BACKENDS)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=1e-12 * float(expected_grad.abs().max()))


def test_more_queues_than_the_kernels_take_are_named() -> None:
    anchors, queues = Anchors(torch.tensor([0, 1]), torch.tensor([0, 1])), [torch.randn(2, 3, 4)] * 9
    assert infonce_contrast(torch.randn(2, 4), anchors, queues[:8]).loss.isfinite()
    with pytest.raises(ValueError, match="queues"):
        infonce_contrast(torch.randn(2, 4), anchors, queues)
