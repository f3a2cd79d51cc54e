"""The authors' training loop beside ours: with a checkout of their code, both repeat each other, and changes show.

The checkout's folder is in PIXCONTRAST_SEMISEG. Without one, what does not need it is tested.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from train_helpers import error_of, their_heads

import train.augment
from pixcontrast import ContrastBranch
from train.paper import compare as module
from train.paper.compare import LIMIT, CompareConfig, Comparison, compare, compare_row, our_tensor
from train.paper.rows import find_row
from train.paper.small_problem import Problem
from train.paper.their_loop import TheirCode, settings_of
from train.session import Training

CHECKOUT = os.environ.get("PIXCONTRAST_SEMISEG", "")
needs_checkout = pytest.mark.skipif(
    not CHECKOUT, reason="set PIXCONTRAST_SEMISEG to a checkout of github.com/Shathe/SemiSeg-Contrastive"
)
CITYSCAPES, VOC, GTA5 = CompareConfig(Path()).rows


@needs_checkout
@pytest.mark.parametrize("name", [CITYSCAPES, VOC, GTA5])
def test_the_authors_loop_and_ours_agree(name: str):
    comparison = compare_row(Path(CHECKOUT), find_row(name))
    assert comparison.beyond == ""
    assert {"gradients", "memory", "loss contrast_labelled", "BatchNorm of teacher"} <= comparison.largest.keys()
    # and every part of the method took part in it
    t, problem = comparison.training, comparison.problem
    assert t.learner.branch is not None and t.teacher.branch is not None
    memory = t.learner.branch.memory
    assert memory.counts.max() == problem.memory_rows and memory.counts.min() > 0 and memory.cursors.any()
    assert t.teacher.branch.select_features.running_mean.any()  # more rows than the quota
    assert name == VOC or t.class_weights.weights().std() > 0.01
    assert any(problem.coin(step, 0) < 0.2 for step in module.STEPS)
    assert name != GTA5 or sum(map(t.from_source, module.LAST_STEPS)) == 2


@needs_checkout
def test_decoder_and_dropout_agree():
    # every class is remembered first: selectors of the others would decay in ours alone (docs/variants.md)
    comparison = compare_row(Path(CHECKOUT), find_row("voc/dv3plus-imagenet/1-50"), (1001, 1002, 1003, 2001))
    assert comparison.beyond == "" and comparison.training.learner.branch.memory.counts.min() > 1


def with_method(**changes: Any) -> Callable[[Training], None]:
    def change(t: Training) -> None:
        t.config = replace(t.config, method=replace(t.config.method, **changes))

    return change


def with_optim(**changes: Any) -> Callable[[Training], None]:
    def change(t: Training) -> None:
        t.config = replace(t.config, optim=replace(t.config.optim, **changes))

    return change


def of_branch(name: str, value: Any) -> Callable[[Training], None]:
    return lambda t: setattr(t.learner.branch, name, value)


@needs_checkout
@pytest.mark.parametrize(
    ("name", "steps", "change", "quantity"),
    [
        (CITYSCAPES, (0, 2001), with_optim(ema=0.9951), "teacher"),
        (CITYSCAPES, (0, 1), with_optim(ema_warmup=9.0), "teacher"),
        (CITYSCAPES, (2001,), lambda t: setattr(t.learner.branch.criterion.loss, "loss_weight", 0.11), "gradients"),
        (CITYSCAPES, (0,), with_method(entropy_weight=0.011), "loss entropy"),
        (CITYSCAPES, (0,), with_method(confidence_power=5.0), "loss pseudo"),
        (CITYSCAPES, (1001,), of_branch("quota", 1), "memory"),
        (CITYSCAPES, (1001,), of_branch("threshold", 0.9), "memory"),
        (CITYSCAPES, (1,), lambda t: setattr(t.schedule, "power", 1.0), "learning rate"),
        (VOC, (0,), lambda t: setattr(t, "weak", replace(t.weak, classmix=0.1)), "loss supervised"),
        (VOC, (2001,), with_method(mix_background=None), "gradients"),
        (GTA5, (1001, 149_900, 149_901), with_method(source_steps="alternate"), "loss supervised"),
    ],
)
def test_a_changed_constant_is_found(name: str, steps: tuple[int, ...], change: Any, quantity: str):
    comparison = compare_row(Path(CHECKOUT), find_row(name), steps, change)
    assert comparison.largest[quantity][0] > LIMIT, comparison.largest


@needs_checkout
def test_another_number_of_mixed_classes_is_found(monkeypatch: pytest.MonkeyPatch):
    source = inspect.getsource(train.augment.class_mix)
    assert "// 2 + 1" in source
    scope = dict(vars(train.augment))
    exec(source.replace("// 2 + 1", "// 2").replace("def class_mix", "def fewer"), scope)
    monkeypatch.setattr(train.augment, "class_mix", scope["fewer"])
    assert compare_row(Path(CHECKOUT), find_row(CITYSCAPES), (2001,)).largest["gradients"][0] > LIMIT


def without_counters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "num_batches" not in name}


def test_every_tensor_of_the_branch_has_one_of_theirs():
    branch = ContrastBranch(6, 3, dim=4)
    tensors = {f"branch.{name}": value for name, value in branch.state_dict().items() if not name.startswith("memory")}
    marks = {name: torch.zeros_like(value, dtype=torch.int64) for name, value in tensors.items()}
    for name, value in without_counters(their_heads(6, 3, 4)).items():
        own = our_tensor(marks, name)
        assert own is not None and own.shape == value.shape, name
        own += 1
    assert all(bool((mark == 1).all()) for name, mark in marks.items() if "num_batches" not in name)
    assert our_tensor(tensors, "layer9.weight") is None
    assert our_tensor({}, "contrastive_class_selector_0.0.weight") is None


def test_their_names_reach_the_same_function():
    torch.manual_seed(0)
    branch, model = ContrastBranch(6, 3, dim=4).eval(), their_heads(6, 3, 4).eval()
    tensors = {f"branch.{name}": value for name, value in branch.state_dict().items()}
    for name, value in without_counters(model).items():
        value.copy_(our_tensor(tensors, name))
    rows = torch.randn(5, 6)
    predicted = model.prediction_head(model.projection_head(rows))
    torch.testing.assert_close(branch.predict(branch.project(rows)), predicted)
    expected = model.contrastive_class_selector_1(predicted)[:, 0]
    start, count = torch.tensor([0, 0, 5]), torch.tensor([0, 5, 0])
    torch.testing.assert_close(branch.select_features(predicted, start, count), expected)


def empty_comparison() -> Comparison:
    return Comparison(None, Problem((), {}))  # type: ignore[arg-type]


def test_the_largest_difference_of_a_quantity_is_kept():
    comparison = empty_comparison()
    for step, difference in enumerate((0.0, -2e-6, 1e-6)):
        comparison.note("loss", step, difference, 2.0)
    assert comparison.largest == {"loss": (1e-6, 1)} and comparison.beyond == "loss 1e-06 (step 1)"
    comparison.note("loss", 3, math.nan, 1.0)
    comparison.note("loss", 4, 9.0, 1.0)
    assert math.isnan(comparison.largest["loss"][0]) and comparison.beyond == "loss nan (step 3)"
    comparison.note("other", 0, 1.0, 0.0)
    assert comparison.largest["other"][0] == math.inf


def test_tensors_are_compared_relative_to_their_size_and_none_is_zero():
    comparison = empty_comparison()
    theirs = {"conv1.weight": torch.tensor([4.0, 2.0]), "bn1.weight": torch.tensor([1e-9]), "layer1.x": None}
    ours = {"network.backbone.conv1.weight": torch.tensor([4.0, 2.5]), "network.backbone.bn1.weight": None}
    comparison.note_tensors("student", 7, ours, theirs)
    assert comparison.largest == {"student": (0.125, 7)}  # 1e-9 of 4e-3 is less
    missing = {"conv1.weight": None}
    comparison.note_tensors("gradients", 8, ours, missing)
    assert comparison.largest["gradients"] == (math.inf, 8)
    comparison.note_tensors("student", 9, {}, {"contrastive_class_selector_memory0.0.weight": torch.ones(1)})
    assert comparison.largest["student"] == (0.125, 7)


def test_table_and_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    found = {CITYSCAPES: empty_comparison(), VOC: empty_comparison()}
    found[CITYSCAPES].largest = {"gradients": (2e-13, 3), "memory": (0.0, 0)}
    found[VOC].largest = {"gradients": (1e-15, 4)}
    monkeypatch.setattr(module, "compare_row", lambda folder, row: found[row.name])
    config = CompareConfig(Path("there"), (CITYSCAPES, VOC))
    table = compare(config)
    assert "| gradients | 2e-13 | 1e-15 |" in table and "| memory | 0e+00 | 0e+00 |" in table
    found[VOC].largest = {"gradients": (1e-3, 4)}
    assert error_of(lambda: compare(config)).endswith(f"more than rounding: {VOC}: gradients 1e-03 (step 4)")
    assert "| gradients | 2e-13 | 1e-03 |" in capsys.readouterr().out
    assert "unknown row" in error_of(lambda: compare(replace(config, rows=("nothing",))))


def test_a_wrong_folder_is_named(tmp_path: Path):
    row = find_row(GTA5)
    message = error_of(lambda: TheirCode(tmp_path, row))
    assert str(tmp_path) in message and "no trainSSL_domain_adaptation_targetCity.py" in message
    (tmp_path / "trainSSL_domain_adaptation_targetCity.py").write_text("from data import nothing_of_that_name\n")
    assert "no configs/configSSL_city_1_30_split0_imagenet.json" in error_of(lambda: TheirCode(tmp_path, row))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "configSSL_city_1_30_split0_imagenet.json").write_text(json.dumps({}))
    before, path = set(sys.modules), copy.copy(sys.path)
    assert "cannot be imported" in error_of(TheirCode(tmp_path, row).__enter__)
    assert sys.path == path and not {"data", "kornia", "cv2", "scipy.misc"} & (sys.modules.keys() - before)


def test_settings_are_made_without_calling_main():
    script = """
        if True:
            elsewhere = 1
        if __name__ == "__main__":
            size = 3
            main()
    """
    scope: dict[str, Any] = {}
    exec(settings_of(textwrap.dedent(script)), scope)
    assert scope["size"] == 3 and "elsewhere" not in scope
