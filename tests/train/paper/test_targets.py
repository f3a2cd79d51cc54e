"""The paper's numbers: all rows, their classes, and the means that reveal misprints."""

from __future__ import annotations

from collections import Counter

import pytest

from train.data.classes import CITYSCAPES, VOC
from train.paper.targets import targets

MEANS = {
    (1, "1/30", "ImageNet", "DeepLabV2"): 58.05,
    (1, "1/30", "COCO", "DeepLabV2"): 59.45,
    (1, "1/30", "ImageNet", "DeepLabV3+"): 64.96,
    (1, "1/15", "ImageNet", "DeepLabV2"): 61.46,
    (1, "1/8", "ImageNet", "DeepLabV2"): 62.96,
    (1, "1/8", "COCO", "DeepLabV2"): 64.40,
    (1, "1/8", "ImageNet", "DeepLabV3+"): 70.05,
    (1, "1/6", "ImageNet", "DeepLabV2"): 63.35,
    (1, "1/4", "ImageNet", "DeepLabV2"): 64.75,
    (1, "1/4", "COCO", "DeepLabV2"): 65.89,
    (1, "1/4", "ImageNet", "DeepLabV3+"): 70.16,
    (1, "1/3", "ImageNet", "DeepLabV2"): 65.14,
    (2, "1/50", "ImageNet", "DeepLabV2"): 65.45,
    (2, "1/50", "COCO", "DeepLabV2"): 67.95,
    (2, "1/50", "ImageNet", "DeepLabV3+"): 65.76,
    (2, "1/20", "ImageNet", "DeepLabV2"): 67.77,
    (2, "1/20", "COCO", "DeepLabV2"): 70.04,
    (2, "1/20", "ImageNet", "DeepLabV3+"): 69.06,
    (2, "1/8", "ImageNet", "DeepLabV2"): 69.85,
    (2, "1/8", "COCO", "DeepLabV2"): 70.61,
    (2, "1/8", "ImageNet", "DeepLabV3+"): 71.79,
    (3, "1/30", "ImageNet", "DeepLabV3+"): 59.92,
    (3, "1/15", "ImageNet", "DeepLabV3+"): 62.03,
    (3, "1/6", "ImageNet", "DeepLabV3+"): 64.16,
    (3, "1/3", "ImageNet", "DeepLabV3+"): 65.58,
}


def test_all_rows_with_the_mean_of_their_classes():
    rows = targets()
    assert [(row.table, row.ratio, row.pretraining, row.architecture) for row in rows] == list(MEANS)
    assert Counter(row.table for row in rows) == {1: 12, 2: 9, 3: 4}
    for row, mean in zip(rows, MEANS.values(), strict=True):
        assert row.mean == pytest.approx(mean, abs=0.0051)
        assert row.dataset == ("voc" if row.table == 2 else "cityscapes")
        assert tuple(row.iou) == (VOC if row.table == 2 else CITYSCAPES)
        assert all(0 < value < 100 for value in row.iou.values())


@pytest.mark.parametrize(
    ("row", "name", "printed"),
    [(0, "wall", 37.6), (0, "bicycle", 63.0), (10, "pole", 57.2), (12, "bicycle", 37.8), (19, "bus", 82.3),
     (19, "tvmonitor", 53.7), (20, "chair", 30.1), (24, "sky", 91.0), (24, "train", 57.9)],
)  # fmt: skip
def test_single_values(row: int, name: str, printed: float):
    assert targets()[row].iou[name] == printed


def test_labelled_images_follow_from_the_ratio():
    for row in targets():
        images = 10582 if row.table == 2 else 2975
        numerator, denominator = map(int, row.ratio.split("/"))
        assert row.labelled == pytest.approx(images * numerator / denominator, rel=0.02)
        assert ("inferred" in row.note) == (row.ratio in ("1/15", "1/6", "1/3"))


def test_every_row_that_contradicts_itself_has_a_note():
    """Class IoUs are rounded to 0.1, so their mean may differ from the printed one by 0.1."""
    for row in targets():
        if abs(row.mean - row.miou) > 0.1:
            assert "average" in row.note, row
    notes = {(row.ratio, row.table, row.architecture): row for row in targets() if "printed as" in row.note}
    assert len(notes) == 2
    for key, name, printed, likely in (
        (("1/15", 1, "DeepLabV2"), "train", 62.8, 32.8),
        (("1/6", 1, "DeepLabV2"), "road", 87.2, 97.2),
    ):
        row = notes[key]
        assert row.iou[name] == printed and f"{name} printed as {printed}" in row.note and str(likely) in row.note
        corrected = row.mean + (likely - printed) / len(row.iou)
        assert f"average {corrected:.1f}" in row.note and abs(corrected - row.miou) < abs(row.mean - row.miou)
