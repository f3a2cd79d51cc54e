"""Matrix products of rows in segments, both backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixcontrast import reference
from pixcontrast.ops.grouped_linear import grouped_linear

START, COUNT = torch.tensor([0, 5, 5, 14]), torch.tensor([5, 0, 7, 6])  # the second is empty; gaps behind two of them


def exact(rows: Tensor, weight: Tensor) -> Tensor:
    out = torch.zeros(len(rows), weight.shape[1], dtype=rows.dtype)
    for c in range(4):
        for i in range(int(START[c]), int(START[c] + COUNT[c])):
            out[i] = weight[c] @ rows[i]
    return out


@pytest.mark.parametrize("backend", ["extension", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [16, 15])
def test_product_and_gradients(backend: str, dtype: torch.dtype, dim: int) -> None:
    valid = reference.members(23, START, COUNT).any(1)
    rows = torch.randn(23, dim, dtype=torch.float64).to(dtype)
    weight, grad = torch.randn(4, 8, dim).to(dtype), torch.randn(23, 8).to(dtype)
    grad[~valid] = 0  # what reaches rows outside of segments
    results = []
    for kind in (dtype, torch.float64):
        leaves = [t.to(kind, copy=True).requires_grad_() for t in (rows, weight)]
        out = exact(*leaves) if kind != dtype else grouped_linear(*leaves, START, COUNT, backend)
        out = torch.where(valid[:, None], out, 0)
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(kind))])
        if kind == dtype == torch.float64:
            leaves = [t.clone().requires_grad_() for t in (rows, weight)]
            out = exact(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, grad)])
            break
    eps = torch.finfo(dtype).eps
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=4 * eps, atol=16 * eps)


def test_the_reference_compiles_without_reading_sizes() -> None:
    rows, weight = torch.randn(23, 6), torch.randn(4, 5, 6)
    compiled = torch.compile(reference.grouped_linear, fullgraph=True, backend="eager")
    valid = reference.members(23, START, COUNT).any(1)
    torch.testing.assert_close(compiled(rows, weight, START, COUNT)[valid], exact(rows, weight)[valid])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(20, 16, dtype=dtype), torch.randn(4, 24, 16, dtype=dtype)
    count = torch.tensor([5, 5, 5, 5])
    torch.library.opcheck(torch.ops.pixcontrast.grouped_linear.default, (rows, None, count, weight))
    left = torch.randn(20, 24, dtype=dtype)
    torch.library.opcheck(torch.ops.pixcontrast.grouped_outer.default, (left, rows, None, count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "outputs"), [(48, 144), (144, 48), (34, 130)])
def test_many_rows_give_the_same_bits_with_any_number_of_threads(dtype: torch.dtype, dim: int, outputs: int) -> None:
    """Several blocks and slices, an odd count, a segment without rows; widths of whole vectors and others."""
    start, count = torch.tensor([2, 703, 703, 704]), torch.tensor([701, 0, 1, 385])
    rows, weight = torch.randn(1100, dim).to(dtype), torch.randn(4, outputs, dim).to(dtype)
    left = torch.randn(1100, outputs).to(dtype)
    ops, before, results = torch.ops.pixcontrast, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            product = ops.grouped_linear(rows, start, count, weight)
            valid = torch.cat([product[s : s + n] for s, n in zip(start.tolist(), count.tolist(), strict=True)])
            results.append((valid, ops.grouped_outer(left, rows, start, count)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    parts = [slice(s, s + n) for s, n in zip(start.tolist(), count.tolist(), strict=True)]
    exact_product = torch.cat([rows[p].double() @ w.double().T for p, w in zip(parts, weight, strict=True)])
    exact_outer = torch.stack([left[p].double().T @ rows[p].double() for p in parts])
    eps = torch.finfo(dtype).eps
    for mine, theirs in zip(results[0], (exact_product, exact_outer), strict=True):
        noise = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * 32 * theirs.abs().max()
        torch.testing.assert_close(mine.double(), theirs, rtol=eps, atol=float(noise))
