"""What the paper printed (Alonso et al., ICCV 2021), to compare with what we measure."""

from train.paper.targets import Target, targets

__all__ = ["Target", "targets"]
