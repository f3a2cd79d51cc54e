"""The paper's numbers: all rows, their classes, and the means that reveal misprints."""

from __future__ import annotations

from collections import Counter

import pytest

from train.data.classes import CITYSCAPES, VOC
from train.paper.rows import Row, rows

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


def printed() -> list[Row]:
    return list(rows().values())


def mean_of_classes(row: Row) -> float:
    """Should be ``row.miou`` but for rounding, and is not always."""
    return sum(row.iou.values()) / len(row.iou)


def test_all_rows_with_the_mean_of_their_classes():
    assert [(row.table, row.ratio, row.pretraining, row.printed_architecture) for row in printed()] == list(MEANS)
    assert Counter(row.table for row in printed()) == {1: 12, 2: 9, 3: 4}
    for row, mean in zip(printed(), MEANS.values(), strict=True):
        assert mean_of_classes(row) == pytest.approx(mean, abs=0.0051)
        assert row.dataset == ("voc" if row.table == 2 else "cityscapes")
        assert tuple(row.iou) == (VOC if row.table == 2 else CITYSCAPES)
        assert all(0 < value < 100 for value in row.iou.values())


@pytest.mark.parametrize(
    ("row", "name", "value"),
    [(0, "wall", 37.6), (0, "bicycle", 63.0), (10, "pole", 57.2), (12, "bicycle", 37.8), (19, "bus", 82.3),
     (19, "tvmonitor", 53.7), (20, "chair", 30.1), (24, "sky", 91.0), (24, "train", 57.9)],
)  # fmt: skip
def test_single_values(row: int, name: str, value: float):
    assert printed()[row].iou[name] == value


def test_labelled_images_follow_from_the_ratio():
    for row in printed():
        images = 10582 if row.table == 2 else 2975
        numerator, denominator = map(int, row.ratio.split("/"))
        assert row.labelled == pytest.approx(images * numerator / denominator, rel=0.02)
        assert ("inferred" in row.note) == (row.ratio in ("1/15", "1/6", "1/3"))


def test_every_row_that_contradicts_itself_has_a_note():
    """Class IoUs are rounded to 0.1, so their mean may differ from the printed one by 0.1."""
    for row in printed():
        if abs(mean_of_classes(row) - row.miou) > 0.1:
            assert "average" in row.note, row
    notes = {(row.ratio, row.table, row.printed_architecture): row for row in printed() if "printed as" in row.note}
    assert len(notes) == 2
    for key, name, misprint, likely in (
        (("1/15", 1, "DeepLabV2"), "train", 62.8, 32.8),
        (("1/6", 1, "DeepLabV2"), "road", 87.2, 97.2),
    ):
        row = notes[key]
        assert row.iou[name] == misprint and f"{name} printed as {misprint}" in row.note and str(likely) in row.note
        corrected = mean_of_classes(row) + (likely - misprint) / len(row.iou)
        assert f"average {corrected:.1f}" in row.note and abs(corrected - row.miou) < abs(
            mean_of_classes(row) - row.miou
        )
