"""Losses, memory and queues of two processes against those of one that has all their pixels and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from pixcontrast import ClassMemory, ContrastBranch, PixelContrastLoss, PixelQueues
from pixcontrast.functional import infonce_contrast
from pixcontrast.select import Anchors

WORLD, CLASSES, DIM, ROWS, PIXELS, IGNORE = 2, 5, 8, 6, 24, 255
LEARNED = (True, False)
# its processes skip the end of the interpreter, where a thread of gloo that asks for it may end in std::terminate
START = "forkserver"
Results = dict[str, Any]


class Parts:
    """Pixels and memory rows, of one rank or (``rank=None``) of all.

    Rank 1 has a single pixel of class 1, which one process must leave out to have the same loss, and none of class 0.
    Only rank 0 has rows of class 2, and class 3 is nowhere.
    """

    def __init__(self, rank: int | None, ignored_rank: int | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(WORLD, PIXELS, DIM, dtype=torch.float64, generator=generator)
        labels = torch.randint(CLASSES, (WORLD, PIXELS), generator=generator)
        labels[labels == 3] = IGNORE
        labels[1, labels[1] == 0] = 4
        labels[1, labels[1] == 1] = 4
        labels[1, 7] = IGNORE if rank is None else 1
        if ignored_rank is not None:
            labels[ignored_rank] = IGNORE
        weight_logits = 3 * torch.randn(WORLD, PIXELS, dtype=torch.float64, generator=generator)
        rows = torch.randn(WORLD, CLASSES, ROWS, DIM, dtype=torch.float64, generator=generator)
        counts = torch.randint(1, ROWS + 1, (WORLD, CLASSES), generator=generator)
        counts[1, 2] = 0
        row_weights = 3 * torch.randn(WORLD, CLASSES, ROWS, dtype=torch.float64, generator=generator)
        mine = slice(None) if rank is None else slice(rank, rank + 1)
        self.features = features[mine].flatten(0, 1).requires_grad_()
        self.labels = labels[mine].flatten()
        self.weight_logits = weight_logits[mine].flatten().requires_grad_()
        self.rows, self.counts, self.row_weights = rows[mine], counts[mine], row_weights[mine].requires_grad_()

    def memory(self, sync: str) -> tuple[ClassMemory, Tensor]:
        """A memory of these rows, and the logits of their weights ``[C, N]``; the valid ones come first."""
        valid = (torch.arange(ROWS) < self.counts[..., None]).transpose(0, 1).flatten(1)
        order = valid.int().argsort(dim=1, descending=True, stable=True)
        memory = ClassMemory(CLASSES, valid.shape[1], DIM, sync=sync, dtype=torch.float64)
        rows = self.rows.transpose(0, 1).flatten(1, 2)
        memory.rows.copy_(rows.gather(1, order[..., None].expand(-1, -1, DIM)))
        memory.counts.copy_(self.counts.sum(0))
        return memory, self.row_weights.transpose(0, 1).flatten(1).gather(1, order)


def positive(
    rank: int | None, sync: str, learned: bool, backend: str = "auto", ignored_rank: int | None = None
) -> Results:
    """Loss, statistics and gradients of a rank, or of one process with everything."""
    parts = Parts(rank, ignored_rank)
    stored = parts if sync == "reduce" else Parts(None)  # gather: every rank has all rows
    memory, row_weights = stored.memory(sync)
    criterion = PixelContrastLoss(
        objective="positive", ignore_index=IGNORE, loss_weight=0.3, across_ranks=sync != "local", backend=backend
    )
    weight_logits = (parts.weight_logits, row_weights) if learned else (None, None)
    loss, stats = criterion(
        parts.features,
        parts.labels,
        queue=memory,
        weight_logits=weight_logits[0],
        queue_weight_logits=weight_logits[1],
        return_stats=True,
    )
    loss.backward()
    gradients = [parts.features.grad, parts.weight_logits.grad, stored.row_weights.grad]
    return {"loss": loss.detach(), "stats": list(stats), "gradients": gradients}


def branch_step(rank: int | None, sync: str, variant: str, wrapper: str | None = None) -> Results:
    """Fill the memory and contrast, with maps of two images a rank; gradients of all parameters.

    ``wrapper``: ``"ddp"`` or ``"fsdp"``, which average the gradients themselves.
    """
    torch.manual_seed(3)
    branch = ContrastBranch(6, 3, dim=DIM, capacity=40, variant=variant, threshold=0.0, sync=sync).double().eval()
    images = WORLD * 2
    features, logits = torch.randn(images, 6, 5, 5).double(), torch.randn(images, 3, 5, 5).double()
    labels = torch.randint(3, (images, 10, 10))
    mine = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    model = branch
    if wrapper == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(branch, broadcast_buffers=False)
    elif wrapper == "fsdp":
        for head in (branch.project, branch.predict, branch.select_features, branch.select_memory):
            fully_shard(head, mesh=init_device_mesh("cpu", (WORLD,)))
    branch.remember(features[mine], logits[mine], labels[mine])
    loss = model(features[mine], labels[mine])
    loss.backward()
    gradients = {n: p.grad for n, p in branch.named_parameters() if p.grad is not None}
    if wrapper == "fsdp":
        assert all(isinstance(grad, DTensor) and grad.to_local().numel() < grad.numel() for grad in gradients.values())
        gradients = {n: grad.full_tensor() for n, grad in gradients.items()}
    return {"loss": loss.detach(), "gradients": gradients}


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank hands to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func.name().split("::")[1] in ("allreduce_", "allgather_"):
            given = args[0] if "reduce" in func.name() else args[1]
            self.bytes += sum(tensor.nbytes for tensor in given)
        return func(*args, **(kwargs or {}))


def sent_bytes(rank: int, sync: str, capacity: int) -> int:
    """Bytes of one step of a branch: two images a rank, one row of each class and image, one loss and backward."""
    torch.manual_seed(3)
    branch = ContrastBranch(6, 3, dim=DIM, capacity=capacity, quota=1, threshold=0.0, sync=sync)
    features, labels = torch.randn(2, 6, 5, 5), torch.randint(3, (2, 10, 10))
    with Sent() as sent:
        branch.remember(features, None, labels)
        branch(features, labels).backward()
    return sent.bytes


def fill_queues(rank: int | None) -> Results:
    """State of queues that two updates filled; without a rank, as if one process were each of the ranks in turn."""
    queues = PixelQueues(3, 7, DIM, pixels_per_class=4, sync="local" if rank is None else "gather")
    for step in range(2):
        for turn in range(WORLD) if rank is None else (rank,):
            generator = torch.Generator().manual_seed(10 * step + turn)
            embedding = torch.randn(2, DIM, 4, 4, generator=generator)
            labels = torch.randint(3 if turn == 0 else 2, (2, 8, 8), generator=generator)
            queues.update(embedding, labels, generator)
    return dict(queues.state_dict())


CASES = {
    **{f"{sync} {learned}": (positive, sync, learned) for sync in ("gather", "reduce") for learned in LEARNED},
    "reference": (positive, "reduce", True, "reference"),
    "ignored": (positive, "reduce", True, "auto", 1),
    "nothing": (positive, "reduce", False, "auto", slice(None)),
    **{f"branch {s} {v}": (branch_step, s, v) for s in ("gather", "reduce") for v in ("paper", "released")},
    **{wrapper: (branch_step, "gather", "paper", wrapper) for wrapper in ("ddp", "fsdp")},
    **{f"sent {sync} {rows}": (sent_bytes, sync, rows) for sync in ("local", "gather", "reduce") for rows in (10, 80)},
    "queues": (fill_queues,),
}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    torch.save({name: work(rank, *rest) for name, (work, *rest) in CASES.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Results]]:
    """Results of all cases on each rank."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(_rank, (str(folder),), nprocs=WORLD, start_method=START)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def assert_as_one_process(ranks: list[Results], one: Results, spread_memory: bool) -> None:
    """Every rank has the loss and statistics of one process, and averaged gradients are those of one process."""
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], one["loss"], rtol=1e-12, atol=0)
        torch.testing.assert_close(rank["stats"], one["stats"], rtol=1e-12, atol=1e-15, equal_nan=True)
    for place, expected in enumerate(one["gradients"]):
        of_ranks = [rank["gradients"][place] for rank in ranks]
        if expected is None:
            assert of_ranks == [None] * WORLD
            continue
        own = place < 2 or spread_memory  # each rank has pixels, and perhaps rows, of its own
        mean = (torch.cat(of_ranks) if own else sum(of_ranks)) / WORLD
        torch.testing.assert_close(mean, expected, rtol=1e-11, atol=1e-16)
        assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("sync", ["gather", "reduce"])
def test_contrast_of_two_processes_is_that_of_one(ranks: list, sync: str, learned: bool) -> None:
    one = positive(None, "local", learned)
    assert_as_one_process([rank[f"{sync} {learned}"] for rank in ranks], one, sync == "reduce")
    if sync == "reduce" and learned:
        assert_as_one_process([rank["reference"] for rank in ranks], one, True)


def test_a_rank_without_valid_pixel_takes_part_with_nothing(ranks: list) -> None:
    one = positive(None, "local", True, ignored_rank=1)
    first, second = (rank["ignored"] for rank in ranks)
    torch.testing.assert_close((first["loss"], second["loss"]), (one["loss"], one["loss"]), rtol=1e-12, atol=0)
    torch.testing.assert_close(first["gradients"][0] / WORLD, one["gradients"][0][:PIXELS], rtol=1e-11, atol=1e-16)
    assert (second["gradients"][0] == 0).all() and (second["gradients"][1] == 0).all()
    assert second["gradients"][2].abs().max() > 1e-4  # its memory rows are contrasted with the pixels of rank 0


def test_without_any_valid_pixel_the_loss_is_a_connected_zero(ranks: list) -> None:
    for rank in ranks:
        assert rank["nothing"]["loss"] == 0 and (rank["nothing"]["gradients"][0] == 0).all()


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("sync", ["gather", "reduce"])
def test_branch_of_two_processes_is_that_of_one(ranks: list, sync: str, variant: str) -> None:
    one = branch_step(None, "local", variant)
    results = [rank[f"branch {sync} {variant}"] for rank in ranks]
    for name, expected in one["gradients"].items():
        mean = sum(result["gradients"][name] for result in results) / WORLD
        torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-13, msg=lambda text, name=name: name + text)
    assert ("select_memory.weight1" in one["gradients"]) == (variant == "paper")
    for result in results:
        torch.testing.assert_close(result["loss"], one["loss"], rtol=1e-11, atol=0)
        assert result["gradients"].keys() == one["gradients"].keys()


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_heads_sharded_by_fsdp_train_alike(ranks: list, wrapper: str) -> None:
    """So do those in ``DistributedDataParallel``: every rank ends with the gradients of one process."""
    one = branch_step(None, "local", "paper")
    for rank in ranks:
        assert rank[wrapper]["gradients"].keys() == one["gradients"].keys()
        for name, expected in one["gradients"].items():
            torch.testing.assert_close(rank[wrapper]["gradients"][name], expected, rtol=1e-9, atol=1e-13)


def test_bytes_of_a_step_are_those_of_the_page(ranks: list) -> None:
    """docs/distributed.md: `gather` sends the new rows, `reduce` class means, and neither depends on the memory."""
    classes, images = 3, 2
    means = 4 * classes * DIM
    for rank in ranks:
        sent = {sync: rank[f"sent {sync} 10"] for sync in ("local", "gather", "reduce")}
        assert sent == {sync: rank[f"sent {sync} 80"] for sync in sent}
        assert sent["local"] == 0
        rows = classes * images * (4 * DIM + 8)
        small = sent["gather"] - rows  # shares, losses and counts of the classes
        assert 0 < small <= 10 * 8 * classes
        assert 2 * means <= sent["reduce"] <= 2 * means + 16 * 8 * classes  # means forward and their gradient


def test_queues_are_the_same_on_every_rank_in_rank_order(ranks: list) -> None:
    expected = fill_queues(None)
    assert expected["regions.counts"].tolist() == [7, 7, 4] and expected["pixels.counts"][2] == 7
    for rank in ranks:
        assert rank["queues"].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(rank["queues"][name], value), name


def infonce(rank: int, world: int, kind: str) -> Results:
    """Loss and gradient of a rank's anchors with a memory whose rows are spread over the ranks, and as one process."""
    draw = torch.Generator().manual_seed(7)
    features = normalize(torch.randn(world, 12, DIM, dtype=torch.float64, generator=draw), dim=2)
    labels = torch.randint(CLASSES, (world, 12), generator=draw)
    rows = normalize(torch.randn(world, CLASSES, ROWS, DIM, dtype=torch.float64, generator=draw), dim=3)
    counts = torch.randint(0, ROWS + 1, (world, CLASSES), generator=draw)
    counts[:, 4] = 0  # nobody has rows of this class
    labels[0, :3] = IGNORE
    if kind == "no negatives":
        counts[:, 1:] = 0
        counts[0, 0] = ROWS
    if kind == "nan":
        rows[world - 1, 0, 0], counts[world - 1, 0] = float("nan"), 1
    criterion = PixelContrastLoss(max_samples=None, max_views=None, temperature=0.2, loss_weight=0.3)
    memory = ClassMemory(CLASSES, ROWS, DIM, sync="reduce", dtype=torch.float64)
    memory.rows.copy_(rows[rank])
    memory.counts.copy_(counts[rank])
    results = {}
    if kind == "empty rank" and rank == 0:
        features, labels = features[:, :0], labels[:, :0]
    mine = features[rank].clone().requires_grad_()
    anchors = criterion.loss.anchors(labels[rank])
    if kind == "empty rank" and rank == 0:  # all ranks call with as many anchors
        anchors = Anchors(torch.full((12,), -1), torch.full((12,), -1))
    with Sent() as sent:
        loss = criterion.loss.contrast(mine, anchors, memory)
    assert sent.bytes == 8 * len(anchors.indices) * (world * (2 * DIM + 5) + DIM + 1)  # of docs/distributed.md
    results["sharded"] = [loss.detach(), torch.autograd.grad(loss * 2, mine)[0]]
    options = {"queue_counts": list(counts), "temperature": 0.2, "loss_weight": 0.3, "backend": "reference"}
    whole = infonce_contrast(mine, anchors, list(rows), **options).loss
    results["one"] = [whole.detach(), torch.autograd.grad(whole * 2, mine)[0]]
    return results


INFONCE = ("random", "no negatives", "nan", "empty rank")


def _infonce_rank(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    torch.save({kind: infonce(rank, world, kind) for kind in INFONCE}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_infonce_with_a_memory_spread_over_ranks_is_that_of_one(world: int, tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_infonce_rank, (str(tmp_path), world), nprocs=world, start_method=START)
    for rank in range(world):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for kind, result in results.items():
            torch.testing.assert_close(
                result["sharded"], result["one"], rtol=1e-11, atol=1e-14, equal_nan=True, msg=kind
            )
        assert results["random"]["one"][0] > 0 and results["random"]["one"][1].any()
        assert results["no negatives"]["one"][0] == 0
    assert results["nan"]["one"][0].isnan()


def test_what_a_memory_of_one_rank_cannot_do() -> None:
    with pytest.raises(ValueError, match='across_ranks is for objective="positive" alone'):
        PixelContrastLoss(across_ranks=True)
    with pytest.raises(ValueError, match=r"sync must be one of \('local', 'gather', 'reduce'\), got 'all'"):
        ClassMemory(2, 3, 2, sync="all")
