"""The truth of the tests: formulas as loops over single pairs in float64, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(row: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(row)
    return row / norm if norm >= 1e-12 else row * 0


def shares(logits: list[Tensor]) -> list[Tensor]:
    """sigma(a_i) / sum_k sigma(a_k); a softmax of log sigma, so that logits of any size have one."""
    log_sigma = torch.nn.functional.logsigmoid(torch.stack(logits))
    return list(torch.softmax(log_sigma, 0))


def positive_pairs(
    rows: Tensor,
    labels: Tensor,
    queue: Tensor,
    counts: Tensor,
    weight_logits: Tensor | None,
    queue_weight_logits: Tensor | None,
    loss_weight: float = 1.0,
) -> Tensor:
    """``loss_weight / C * sum_c sum_ij w_i v_j (1 - cos(f_i, z_j))`` pair by pair.

    ``rows [P, D]``, ``labels [P]`` (anything outside 0..C-1 is left out), ``queue [C, N, D]``, ``counts [C]``, logits
    ``weight_logits [P]`` and ``queue_weight_logits [C, N]``.
    """
    classes = queue.shape[0]
    total = rows.new_zeros(())
    for c in range(classes):
        members = [i for i in range(len(labels)) if labels[i] == c]
        stored = range(int(counts[c]))
        if len(members) < 2 or len(stored) < 2:
            continue
        w = shares([rows.new_zeros(()) if weight_logits is None else weight_logits[i] for i in members])
        v = shares([rows.new_zeros(()) if queue_weight_logits is None else queue_weight_logits[c, j] for j in stored])
        for w_i, i in zip(w, members, strict=True):
            for v_j, j in zip(v, stored, strict=True):
                total = total + w_i * v_j * (1 - torch.dot(unit(rows[i]), unit(queue[c, j])))
    return total * loss_weight / classes


def infonce_pairs(
    anchors: Tensor,
    labels: Tensor,
    keys: Tensor,
    key_labels: Tensor,
    excluded: list[int],
    temperature: float,
    base_temperature: float,
) -> Tensor:
    """``T / T_base * mean_i 1/P_i sum_pos -(z_ij - log(e^z_ij + sum_neg e^z_in))``, anchor by anchor and pair by pair.

    ``anchors [R, D]``, ``labels [R]``, ``keys [K, D]``, ``key_labels [K]``; key ``excluded[i]`` is no positive of
    anchor i. Anchors without positives are left out of the mean.
    """
    losses = []
    for i in range(len(anchors)):
        z = [torch.dot(anchors[i], keys[k]) / temperature for k in range(len(keys))]
        negatives = [z[k] for k in range(len(keys)) if key_labels[k] != labels[i]]
        terms = []
        for k in range(len(keys)):
            if key_labels[k] == labels[i] and k != excluded[i]:
                terms.append(torch.logsumexp(torch.stack([z[k], *negatives]), 0) - z[k])
        if terms:
            losses.append(torch.stack(terms).mean())
    if not losses:
        return anchors.sum() * 0
    return torch.stack(losses).mean() * temperature / base_temperature
