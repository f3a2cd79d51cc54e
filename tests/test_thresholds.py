"""Every ``constexpr`` size of ``csrc`` stands here with a test that goes beyond it, or with why there is none.

A new size needs a line here, and a case beyond it where another way of computing begins.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYOUT = "-: shape of threads, registers or shared memory, the same for every input"
MEANING = "-: not a size"
CUSIM = "tests/cusim/test_{}_cuda.py::"

# room of csrc and name, in the order of the sources
BEYOND = {
    "class_mean": {
        "kBlock": "tests/test_positive.py::test_many_pieces_agree_with_the_reference",
        "kAtOnce": "tests/test_positive.py::test_many_pieces_agree_with_the_reference",
        "kPieceRows": CUSIM.format("class_mean") + "test_agrees_with_the_formula",
        "kThreads kWarps kRows kColumns": LAYOUT,
    },
    "class_order": {
        "kTileClasses": CUSIM.format("class_order") + "test_every_build_and_order",
        "kLeastRows kMostCounts kMostBlocks": CUSIM.format("class_order")
        + "test_workspace_stays_small_for_many_classes",
        "kMostChunks kScanThreads": CUSIM.format("class_order")
        + "test_so_many_classes_that_a_block_scans_several_times",
        "kAtOnce": CUSIM.format("class_order") + "test_splits_of_more_rows_than_the_least",
        "kThreads kWarps": LAYOUT,
    },
    "common": {
        "kMostRows kFactors kColumnStep": "tests/test_infonce.py::test_many_tiles_agree_with_the_reference",
        "kLeastBytes kPage": "tests/test_kept_memory.py::test_no_more_is_kept_than_was_once_in_use",
        "kChannels": "tests/test_positive.py::test_planes_give_the_bits_of_rows",
        "kColumns kLaneElements kRows": CUSIM.format("positive") + "test_rows",
        "kPack kSlots kWidth": LAYOUT,
        "kAllLanes kLeastKey": MEANING,
        "kNormFloor": "tests/test_positive.py::test_zero_rows_count_as_zero_and_get_no_gradient",
    },
    "gather_pixels": {
        "kTilePixels kTileChannels": "tests/test_gather_pixels.py::test_same_bits_with_any_number_of_threads",
        "kTile": CUSIM.format("gather_pixels") + "test_widths",
        "kWarps": LAYOUT,
    },
    "grouped_linear": {
        "kBlockRows kSliceOutputs kDepth": "tests/test_grouped_linear.py::"
        + "test_many_rows_give_the_same_bits_with_any_number_of_threads",
        "kPieceRows": CUSIM.format("grouped_linear") + "test_outer",
        "kTile": CUSIM.format("grouped_linear") + "test_linear",
        "kPacks kHalf kBlocks kBuffer kElements kSharedBytes kStride kThreads kWarpM kWarpN": LAYOUT,
        "kPairs kPrefetch": MEANING,
    },
    "infonce": {
        "kMaxKeys kPanelAnchors kBlockAnchors": "tests/test_infonce.py::test_many_tiles_agree_with_the_reference",
        "kMaxSplits": "tests/test_infonce.py::test_many_tiles_agree_with_the_reference",
        "kPanelElements": "tests/test_infonce.py::test_self_contrast_in_several_panels",
        "kTileElements kSumElements": "tests/test_infonce.py::test_rows_so_long_that_keys_are_not_split",
        "kMaxQueues": "tests/test_infonce.py::test_more_queues_than_the_kernels_take_are_named",
        "kWorkspaceBytes": CUSIM.format("infonce") + "test_workspace_of_a_large_memory",
        "kTileKeys kRows kKeys": CUSIM.format("infonce") + "test_any_number_of_parts",
        "kChunk kMaxDim kDim kChunks": CUSIM.format("infonce") + "test_long_rows",
        "kMergeWarps kBlocksPerSm kSharedBytes kStride kStep kThreads kWarps": LAYOUT,
        "kPairScale kPrefetch": MEANING,
    },
    "memory_push": {
        "kSelectThreads kKeysAtOnce": CUSIM.format("memory_push") + "test_topk_of_long_segments",
        "kWriteThreads": CUSIM.format("memory_push") + "test_write_of_all_sizes",
        "kDigit kSelectWarps kWriteWarps": LAYOUT,
        "kNone kNotFinite": MEANING,
        "kMostRows": "-: more scores are an error; they would take 17 GB",
    },
    "norm_linear": {
        "kBlockRows": "tests/test_norm_linear.py::test_a_dense_layer",
        "kPieceRows kRowsAtOnce": CUSIM.format("norm_linear") + "test_more_pieces_than_warps_and_no_order",
        "kSums kWarps": LAYOUT,
    },
    "positive": {
        "kMostPieces kLeastPixels": "tests/test_positive.py::test_many_pieces_agree_with_the_reference",
        "kStreamedBytes": "tests/test_positive.py::test_streamed_stores_agree_with_the_reference",
        "kMostSharedSums kClassTile": CUSIM.format("positive") + "test_more_classes_than_sums_fit_in_shared_memory",
        "kFinishThreads": CUSIM.format("positive") + "test_more_pixels_than_one_grid_of_the_last_kernel",
        "kSharedRoom": CUSIM.format("positive") + "test_maps_of_more_channels_than_fit_in_shared_memory",
        "kMapsWidth": CUSIM.format("positive") + "test_maps",
        "kRows kColumns": CUSIM.format("positive") + "test_rows",
        "kMinRows": "tests/test_positive.py::test_the_random_cases_reach_every_special_case",
        "kRowsTileBytes kThreads kWarps": LAYOUT,
        "kScoreBits kSimilarityBits kIgnored kUnknown": MEANING,
        "kMostChunk": "-: more than 2^20 pixels a block, so 2^27 on a device; the emulation would take hours",
    },
    "scale": {
        "kRowWarps": CUSIM.format("scale") + "test_unit_rows",
        "kScaleThreads": CUSIM.format("scale") + "test_scales_both_tensors_and_nothing_around_them",
        "kMostScaled": "-: the operators give as many gradients at most",
    },
}


def sizes() -> set[tuple[str, str]]:
    """Room and name of every ``constexpr`` value ``k...`` of ``csrc``."""
    found = set()
    for path in (ROOT / "csrc").rglob("*.*"):
        for line in path.read_text().splitlines():
            code = line.split("//")[0]
            if "constexpr" in code and "if constexpr" not in code and "(" not in code.split("=")[0]:
                room = path.relative_to(ROOT / "csrc").parts[0]
                found |= {(room, name) for name in re.findall(r"\b(k[A-Z]\w*)(?:<\w+>)? = ", code)}
    return found


def test_every_size_stands_in_the_table() -> None:
    listed = {(room, name) for room, lines in BEYOND.items() for names in lines for name in names.split()}
    assert sizes() - listed == set(), "sizes without a line in BEYOND"
    assert listed - sizes() == set(), "lines of BEYOND without a size in csrc"
    assert len(listed) > 80


@pytest.mark.parametrize(
    "test", sorted({test for lines in BEYOND.values() for test in lines.values()} - {LAYOUT, MEANING})
)
def test_the_tests_of_the_table_are_there(test: str) -> None:
    if not test.startswith("-: "):
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text()
