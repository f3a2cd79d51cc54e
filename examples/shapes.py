"""Small generated images for the examples: coloured discs and squares on grey, with noise."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = ("background", "red disc", "green square", "blue disc")
COLOURS = torch.tensor([[0.5, 0.5, 0.5], [0.8, 0.3, 0.3], [0.3, 0.7, 0.3], [0.3, 0.4, 0.8]])


class Shapes(Dataset[tuple[Tensor, Tensor]]):
    """``count`` images ``[3, side, side]`` float32 with labels ``[side, side]`` int64; a 255 edge is not labelled."""

    def __init__(self, count: int, side: int = 64, seed: int = 0) -> None:
        self.count, self.side, self.seed = count, side, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        y, x = torch.meshgrid(torch.arange(self.side), torch.arange(self.side), indexing="ij")
        label = torch.zeros(self.side, self.side, dtype=torch.int64)
        for c in (1, 2, 3):
            row, column = torch.randint(self.side, (2,), generator=draw)
            radius = torch.randint(self.side // 8, self.side // 3, (1,), generator=draw)
            across, down = (y - row).abs(), (x - column).abs()
            inside = torch.maximum(across, down) < radius if c == 2 else across**2 + down**2 < radius**2
            label[inside] = c
        image = COLOURS[label].permute(2, 0, 1) + 0.25 * torch.randn(3, self.side, self.side, generator=draw)
        label[:2] = 255
        return image, label


def steps_from_command_line(doc: str | None) -> int:
    """``--steps N`` of an example; it makes the random numbers repeatable too."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--steps", type=int, default=100, help="training steps of 8 images")
    torch.manual_seed(0)
    return parser.parse_args().steps
