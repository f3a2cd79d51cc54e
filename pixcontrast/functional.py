"""The operators as functions."""

from .ops import BACKENDS
from .ops.class_mean import memory_mean
from .ops.class_order import Segments, class_order, valid_labels_at
from .ops.gather_pixels import gather_pixels
from .ops.infonce import InfoNCEOutput, infonce_contrast
from .ops.positive import PositiveOutput, contrast_with_mean, positive_contrast
from .ops.unit_rows import unit_rows
from .select import Anchors

__all__ = [
    "BACKENDS",
    "Anchors",
    "InfoNCEOutput",
    "PositiveOutput",
    "Segments",
    "class_order",
    "contrast_with_mean",
    "gather_pixels",
    "infonce_contrast",
    "memory_mean",
    "positive_contrast",
    "unit_rows",
    "valid_labels_at",
]
