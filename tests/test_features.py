"""What a part of PyTorch is expected to do. docs/features.md has the table, each row with its test."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pixcontrast import ClassMemory, ContrastBranch, PixelContrastLoss, PixelQueues

ROOT = Path(__file__).parent.parent
CLASSES, CHANNELS = 3, 8
OBJECTIVES = ["positive", "infonce"]
NO_CHANCE = {"max_samples": None, "max_views": None}


def make_batch(height: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(2, CHANNELS, height, 5, generator=draw, requires_grad=True)
    return features, torch.randint(0, CLASSES, (2, height, 5), generator=draw)


def make_memory() -> ClassMemory:
    memory = ClassMemory(CLASSES, 6, CHANNELS)
    memory.push(torch.randn(18, CHANNELS, generator=torch.Generator().manual_seed(1)), torch.arange(18) % CLASSES)
    return memory


def make_criterion(objective: str) -> PixelContrastLoss:
    return PixelContrastLoss(objective=objective, **(NO_CHANCE if objective == "infonce" else {}))


def make_branch(objective: str) -> ContrastBranch:
    torch.manual_seed(2)
    sizes = {"max_samples": 12, "max_views": 2} if objective == "infonce" else {"threshold": 0.0}
    return ContrastBranch(CHANNELS, CLASSES, objective=objective, dim=CHANNELS, capacity=6, quota=2, **sizes)


def step(branch: ContrastBranch, features: Tensor, labels: Tensor) -> Tensor:
    """One step of a branch: its memory filled, and the loss."""
    branch.remember(features.detach(), None, labels)
    return branch(features, labels)


def loss_and_grad(objective: str, criterion: Callable[..., Tensor], memory: ClassMemory) -> tuple[Tensor, Tensor]:
    features, labels = make_batch()
    unit = normalize(features, dim=1) if objective == "infonce" else features
    loss = criterion(unit, labels, queue=memory)
    return loss.detach(), torch.autograd.grad(loss, features)[0]


def compiled_graphs() -> int:
    """Graphs that torch.compile has made since the last reset; one that is traced twice for one call counts once."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dynamic", [False, None, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_branch_compiles_with_equal_gradients_and_counted_graphs(objective: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    branch = make_branch(objective)
    if objective == "infonce":  # no chance in the choice of anchors
        branch.criterion.loss.max_samples = branch.criterion.loss.max_views = None
    compiled_branch = copy.deepcopy(branch)
    compiled = torch.compile(
        lambda features, labels: compiled_branch(features, labels), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for module in (branch, compiled_branch):
        module.memory.load_state_dict(make_memory().state_dict())
    for height in (4, 6, 7):
        results = []
        for module, function in ((branch, branch), (compiled_branch, compiled)):
            features, labels = make_batch(height)
            module.zero_grad()
            function(features, labels).backward()
            results.append([features.grad, *(p.grad for p in module.parameters())])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert compiled_graphs() == {False: 3, None: 2, True: 1}[dynamic]


@pytest.mark.parametrize("dynamic", [False, True])
def test_push_compiles_into_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, memory = make_memory(), make_memory()
    push = torch.compile(memory.push, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for height in (4, 6, 7):
        features, labels = make_batch(height)
        plain.push(features.detach(), labels, quota=2)
        push(features.detach(), labels, quota=2)
    assert torch.equal(memory.rows, plain.rows) and compiled_graphs() == (1 if dynamic else 3)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_export_of_the_loss(objective: str, strict: bool) -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion, self.memory = make_criterion(objective), make_memory()

        def forward(self, features: Tensor, labels: Tensor) -> Tensor:
            return self.criterion(features, labels, queue=self.memory)

    features, labels = make_batch()
    features = normalize(features.detach(), dim=1)
    program = torch.export.export(Loss(), (features, labels), strict=strict)
    torch.testing.assert_close(program.module()(features, labels), Loss()(features, labels))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_copies_are_equal_and_independent(objective: str, copied: Callable[[object], object]) -> None:
    branch, queues = make_branch(objective), PixelQueues(CLASSES, 4, CHANNELS)
    features, labels = make_batch()
    step(branch, features, labels)
    twin = copied(branch)
    torch.manual_seed(5)
    expected = branch(features, labels)
    torch.manual_seed(5)
    assert torch.equal(twin(features, labels), expected) and expected > 0
    twin.memory.clear()
    assert branch.memory.counts.any()
    assert copied(queues).state_dict().keys() == queues.state_dict().keys()
    result = loss_and_grad(objective, copied(make_criterion(objective)), make_memory())
    assert torch.equal(result[1], loss_and_grad(objective, make_criterion(objective), make_memory())[1])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_state_dict_through_a_file_without_code(objective: str, tmp_path: Path) -> None:
    branch = make_branch(objective)
    features, labels = make_batch()
    step(branch, features, labels)
    torch.save(branch.state_dict(), tmp_path / "branch.pt")
    other = make_branch(objective)
    other.load_state_dict(torch.load(tmp_path / "branch.pt", weights_only=True))
    for name, value in branch.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_autocast_with_a_grad_scaler_trains(objective: str, dtype: torch.dtype) -> None:
    branch, network = make_branch(objective), nn.Conv2d(3, CHANNELS, 1)
    optimizer = torch.optim.SGD([*branch.parameters(), *network.parameters()], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256, enabled=dtype == torch.float16)
    before = network.weight.detach().clone()
    images, (_, labels) = torch.randn(2, 3, 4, 5), make_batch()
    for _ in range(3):
        with torch.autocast("cpu", dtype):
            loss = step(branch, network(images), labels)
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert loss.isfinite() and not torch.equal(network.weight, before)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_layouts_give_the_same(objective: str) -> None:
    features, labels = make_batch()
    unit = normalize(features.detach(), dim=1)
    layouts = [
        unit,
        unit.contiguous(memory_format=torch.channels_last),
        torch.cat([unit, unit], dim=1)[:, :CHANNELS],
        unit.flip(3).flip(3),
        unit.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    results = []
    for layout in layouts:
        leaf = layout.clone(memory_format=torch.preserve_format).requires_grad_()
        loss = make_criterion(objective)(leaf, labels, queue=make_memory())
        (grad,) = torch.autograd.grad(loss, leaf)
        results.append(grad)
        torch.testing.assert_close(grad, results[0])
    assert results[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:PixelContrastLoss. the loss is 0")  # there are no pixels
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_sizes_give_a_connected_zero(objective: str) -> None:
    for shape in ((0, CHANNELS, 4, 5), (2, CHANNELS, 0, 5)):
        features = torch.zeros(shape, requires_grad=True)
        labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
        loss = make_criterion(objective)(features, labels, queue=make_memory())
        loss.backward()
        assert loss == 0 and features.grad.shape == shape


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_several_losses_before_one_backward(objective: str) -> None:
    """Gradients are kept by each call: a second call does not overwrite those of the first."""
    criterion, memory = make_criterion(objective), make_memory()
    batches = [make_batch(seed=seed) for seed in range(3)]

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        return criterion(normalize(features, dim=1), labels, queue=memory)

    torch.stack([loss(*batch) for batch in batches]).sum().backward()
    for features, labels in batches:
        alone = features.detach().clone().requires_grad_()
        loss(alone, labels).backward()
        assert torch.equal(features.grad, alone.grad)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_python_threads_give_what_one_gives(objective: str) -> None:
    expected = loss_and_grad(objective, make_criterion(objective), make_memory())
    wrong: list[int] = []

    def work(number: int) -> None:
        criterion, memory = make_criterion(objective), make_memory()
        for _ in range(20):
            result = loss_and_grad(objective, criterion, memory)
            if not all(map(torch.equal, result, expected)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class LossInWorker(torch.utils.data.Dataset):
    """Uses the operators in the worker process of a loader, which is forked."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return loss_and_grad("positive", make_criterion("positive"), make_memory())[1]


def test_a_forked_worker_uses_the_operators() -> None:
    expected = loss_and_grad("positive", make_criterion("positive"), make_memory())[1]
    loader = torch.utils.data.DataLoader(LossInWorker(), batch_size=1, num_workers=1, multiprocessing_context="fork")
    for grad in loader:
        torch.testing.assert_close(grad[0], expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_deterministic_algorithms_change_nothing(objective: str) -> None:
    def train() -> list[Tensor]:
        branch = make_branch(objective)
        features, labels = make_batch()
        torch.manual_seed(4)
        for _ in range(3):
            step(branch, features, labels).backward()
        return [features.grad, *branch.state_dict().values()]

    plain = train()
    torch.use_deterministic_algorithms(True)
    try:
        strict = train()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, plain, strict))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_inference_mode(objective: str) -> None:
    branch = make_branch(objective).eval()
    features, labels = make_batch()
    with torch.inference_mode():
        branch.remember(features, None, labels)
        torch.manual_seed(3)
        inferred = branch(features, labels)
    torch.manual_seed(3)
    torch.testing.assert_close(inferred, branch(features, labels).detach())
    assert inferred > 0 and not inferred.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["extension", "reference"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_memory_that_changes_before_backward(objective: str, backend: str, dtype: torch.dtype) -> None:
    """The gradient is that of the memory as it was, or, where backward needs the rows, there is one clear error."""
    branch = make_branch(objective)
    branch.backend = branch.criterion.loss.backend = backend
    features, labels = make_batch()
    weight = branch.select_memory.weight1 if objective == "positive" else branch.project.first.weight

    def grads(change: bool) -> Sequence[Tensor]:
        torch.manual_seed(6)
        branch.memory.load_state_dict(make_memory().state_dict())
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = branch(features, labels)
        if change:
            branch.remember(features, None, labels)
        return torch.autograd.grad(loss, [features, weight])

    expected = grads(change=False)
    assert all(grad.any() for grad in expected)
    if objective == "infonce":
        assert all(map(torch.equal, grads(change=True), expected))
    else:
        message = r"changed between the loss and backward\(\).*after backward\(\)|modified by an inplace operation"
        with pytest.raises(RuntimeError, match=message):
            grads(change=True)


def test_the_table_names_tests_that_exist() -> None:
    rows = [line for line in (ROOT / "docs/features.md").read_text().splitlines() if "`test" in line]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(tests?[\w/]*\.py)::(\w+)`", row)
        assert named, row
        for path, test in named:
            assert f"def {test}(" in (ROOT / path).read_text(), row
