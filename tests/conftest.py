"""What all tests share."""

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent
LONGEST_FIRST = (
    "cusim",
    "test_cuda_static.py",
    "test_gpu_run.py",
    "train/core",
    "test_distributed.py",
    "test_infonce.py",
    "test_positive.py",
    "test_features.py",
    "train/paper",
    "test_benchmarks.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, long files first: none of them is left with a long file at the end."""
    if not hasattr(config, "workerinput"):  # set in the processes of pytest-xdist
        return

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(ROOT) if item.path.is_relative_to(ROOT) else item.path
        names = {str(path), *map(str, path.parents)}
        return next((i for i, name in enumerate(LONGEST_FIRST) if name in names), len(LONGEST_FIRST))

    items.sort(key=place)  # stable: the order within a file stays


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)
