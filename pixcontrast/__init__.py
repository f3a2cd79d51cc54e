"""Pixel-level contrastive learning against a class-wise memory bank, as fused operators for PyTorch.

Data goes one way through it: features and labels, the valid pixels, projection and prediction heads, the fused
contrast with the memory, the loss.
"""

from . import functional
from .branch import ContrastBranch
from .graphed import GraphedBranch
from .heads import ClassSelectors, MLPHead
from .loss import PixelContrastLoss
from .memory import ClassMemory
from .queues import PixelQueues
from .stats import ContrastStats, InfoNCEStats

__all__ = [
    "ClassMemory",
    "ClassSelectors",
    "ContrastBranch",
    "ContrastStats",
    "GraphedBranch",
    "InfoNCEStats",
    "MLPHead",
    "PixelContrastLoss",
    "PixelQueues",
    "functional",
]
__version__ = "0.1.0"
