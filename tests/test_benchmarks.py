"""The benchmark times only what computes the right thing, and its figures mean what they say."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import branch, cases, infonce, positive, sampling, selectors
from benchmarks.cases import CASES, Case
from benchmarks.clock import CpuClock
from benchmarks.machine import Ceilings
from benchmarks.measure import Effort, Outcome, interleaved, measure
from benchmarks.memory import peak_mebibytes
from benchmarks.plots import draw
from benchmarks.problem import Contender, Problem, Results, Step, Work, deviation
from benchmarks.released import NAME, Checkouts
from benchmarks.report import Report, comparison, markdown

PROBLEMS: dict[str, tuple[Problem, dict[str, Contender]]] = {
    "positive": (positive.Positive.random(900, 24, 5, 7), positive.CONTENDERS),
    "weighted rows": (positive.Positive.random(900, 24, 5, 7, True), cases.without(positive.CONTENDERS, cases.KEPT)),
    "selectors": (selectors.Selectors.random(900, 32, 5, 20), selectors.CONTENDERS),
    "both selectors": (selectors.Selectors.random(900, 32, 5, 20, "paper"), selectors.CONTENDERS),
    "autocast": (selectors.Selectors.random(900, 32, 5, 20, autocast=True), selectors.CONTENDERS),
    "infonce": (infonce.InfoNCE.random(40, 60, 24, 7), infonce.CONTENDERS),
    "bfloat16": (infonce.InfoNCE.random(40, 60, 24, 7, torch.bfloat16), infonce.CONTENDERS),
    "sampling": (sampling.Sampling.random(2, 64, 96, 8), sampling.contenders(False)),
    "branch": (
        branch.Branch.random(branch.Setting("none", 2, 1, 64, 32, 16, 5, 2), capacity=20, dim=32),
        branch.CONTENDERS,
    ),
    "self-contrast": (sampling.Sampling.random(2, 64, 96, 8, contrast=True), sampling.contenders(True)),
}
PAIRS = [(kind, name) for kind, (_, found) in PROBLEMS.items() for name in found if name != "torch.compile"]
SHORT = Effort(rounds=3, seconds=0.2, memory=False)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_every_contender_computes_the_same(kind: str, name: str) -> None:
    problem, contenders = PROBLEMS[kind]
    step = contenders[name](problem)
    step()
    error = problem.error(step())  # no step may depend on the one before
    assert error < 1e-3 if problem.dtype == torch.float32 else problem.accepts(error)


def run(contenders: dict[str, Contender], effort: Effort = SHORT, **options) -> Outcome:
    case = Case(
        "tiny", "tiny", positive.Positive.random, {"pixels": 500, "dim": 16, "classes": 3, "rows": 5}, contenders
    )
    defaults = {"checkouts": Checkouts(), "skip": frozenset(), "progress": lambda _: None}
    return measure(case, "cpu", effort, **defaults | options)


def wrong_by(name: str, factor: float) -> Contender:
    """One result of the reference, multiplied."""

    def contender(problem: Problem) -> Step:
        step = positive.CONTENDERS["pixcontrast reference"](problem)
        return lambda: {key: value * factor if key == name else value for key, value in step().items()}

    return contender


@pytest.mark.parametrize("name", ["loss", "features", "weight_logits"])
def test_a_wrong_contender_is_reported_and_not_timed(name: str) -> None:
    outcome = run({"pixcontrast": positive.CONTENDERS["pixcontrast"], "wrong": wrong_by(name, 1.01)})
    right, wrong = outcome.rows
    assert right.status == "ok" and right.ms is not None and right.ratio == 1
    assert wrong.status == "wrong" and wrong.ms is None and wrong.error == pytest.approx(0.01, rel=0.1)
    assert "| wrong | wrong, not timed |" in markdown(Report({}, [outcome]))


def test_missing_and_undefined_results_are_wrong() -> None:
    truth = {"loss": torch.ones(()).double(), "features": torch.ones(2, 3).double()}
    assert deviation(truth, truth) == 0
    assert deviation({"loss": truth["loss"]}, truth) == float("inf")
    assert deviation(truth | {"features": torch.ones(3, 2)}, truth) == float("inf")
    assert deviation(truth | {"loss": torch.tensor(float("nan"))}, truth) == float("inf")


def test_a_contender_that_fails_is_named_and_the_others_go_on() -> None:
    def failing(problem: Problem) -> Step:
        raise RuntimeError("no kernel here\nand more")

    outcome = run({"failing": failing, "pixcontrast": positive.CONTENDERS["pixcontrast"]})
    failed, right = outcome.rows
    assert failed.status == "failed" and failed.note == "RuntimeError: no kernel here"
    assert draw(Report({}, [outcome]), Path()) == []  # nothing to show the others in relation to
    assert right.status == "ok" and right.ms is not None and right.ratio is None
    assert "failed, not timed: RuntimeError: no kernel here" in markdown(Report({}, [outcome]))


def test_the_share_of_a_training_step_is_told(monkeypatch, tmp_path: Path) -> None:
    def surroundings(problem: Problem) -> list[tuple[Step, float]]:
        return [(lambda: time.sleep(0.02) or {}, 3), (lambda: time.sleep(0.01) or {}, 2)]

    monkeypatch.setattr(positive.Positive, "surroundings", surroundings)
    outcome = run({"pixcontrast": positive.CONTENDERS["pixcontrast"]})
    assert outcome.rest_ms is not None and outcome.rest_ms >= 80
    outcome = replace(outcome, rest_ms=60.0, rows=[replace(outcome.rows[0], ms=20.0)])
    assert "takes 60 ms. Share of the whole step: 25.0% with pixcontrast." in markdown(Report({}, [outcome]))
    assert draw(Report({}, [outcome]), tmp_path) == [tmp_path / "steps.png"]
    outcome = replace(outcome, rows=[replace(outcome.rows[0], ms=None)])
    assert "takes 60 ms.\n" in markdown(Report({}, [outcome]))


def test_skipped_contenders_do_not_run() -> None:
    outcome = run(dict(positive.CONTENDERS), skip=frozenset(positive.CONTENDERS) - {"pixcontrast reference"})
    assert [row.contender for row in outcome.rows] == ["pixcontrast reference"]


class SlowingClock(CpuClock):
    """A machine on which a unit of work takes a millisecond at first, and 1 % more at every call."""

    def __init__(self) -> None:
        self.units, self.unit = 0, 0.001

    def seconds(self, step: Step) -> float:
        self.units, self.unit = 0, self.unit * 1.01
        step()
        return max(self.units, 1) * self.unit


def working(clock: SlowingClock, times: int) -> Contender:
    """The right result, after so many units of work."""

    def contender(problem: Problem) -> Step:
        results = positive.CONTENDERS["pixcontrast"](problem)()

        def step() -> Results:
            clock.units += times
            return results

        return step

    return contender


def test_three_times_the_work_is_reported_as_three_times_slower(monkeypatch) -> None:
    clock = SlowingClock()
    monkeypatch.setattr("benchmarks.measure.clock_of", lambda device: clock)
    one, three = run({"one": working(clock, 1), "three": working(clock, 3)}, Effort(rounds=7, memory=False)).rows
    assert one.ms is not None and three.ms is not None and three.ms > 3 * one.ms  # it is timed later in every round
    assert three.ratio == pytest.approx(3, rel=0.1)
    assert one.ms_20 < one.ms < one.ms_80


def test_the_clock_goes_on_while_a_step_sleeps() -> None:
    assert 0.02 <= CpuClock().seconds(lambda: time.sleep(0.02) or {}) < 20  # milliseconds would be more


def test_contenders_take_turns_and_slow_ones_stop_early() -> None:
    calls: list[str] = []
    seconds = {"fast": 0.001, "slow": 2.0, "glacial": 2.1}

    class Counting(CpuClock):
        def seconds(self, step: Step) -> float:
            step()
            return seconds[calls[-1]]

    def step_of(name: str) -> Step:
        return lambda: calls.append(name) or {}

    steps = {name: step_of(name) for name in seconds}
    times = interleaved(steps, Counting(), Effort(5, 1.0), before_turn=lambda: calls.append("|"))
    assert {name: len(values) for name, values in times.items()} == {"fast": 5, "slow": 3, "glacial": 2}
    turns = "".join({"fast": "F", "slow": "s", "glacial": "g", "|": "|"}[name] for name in calls)
    trials, fast = "|FF|ss|g", "|" + 7 * "F"
    assert turns == trials + (fast + "|ss|g") * 2 + fast + "|ss" + 2 * fast


def test_the_first_calls_of_a_turn_do_not_count() -> None:
    class Warming(CpuClock):
        """The first three calls after a change of the contender are slow."""

        def __init__(self) -> None:
            self.last, self.number = "", 0

        def seconds(self, step: Step) -> float:
            (name,) = step()
            self.number = self.number + 1 if name == self.last else 0
            self.last = name
            return 0.01 if self.number < 3 else 0.001

    steps = {name: lambda name=name: {name: torch.zeros(())} for name in ("one", "other")}
    times = interleaved(steps, Warming(), Effort(3, 100.0))
    assert times == {"one": [0.001] * 3, "other": [0.001] * 3}


def test_the_floor_is_the_slower_of_moving_and_multiplying() -> None:
    ceilings = Ceilings(Work(bytes=1000, flops=6 * 1024**3, dtype=torch.float32), "cpu")
    assert ceilings.floor(copy=2.0, matmul=0.5) == pytest.approx(2.0)
    assert ceilings.floor(copy=1.0, matmul=0.5) == pytest.approx(1.5)
    assert ceilings.rates(1.0, 0.5)["gflop_per_s"] == pytest.approx(4 * 1.024**3)
    for step in ceilings.steps.values():
        step()


@pytest.mark.parametrize("contrast", [False, True])
def test_anchors_that_break_the_rule_are_noticed(contrast: bool) -> None:
    problem = sampling.Sampling.random(2, 64, 96, 8, contrast=contrast)
    results = sampling.contenders(contrast)["best eager"](problem)()
    assert problem.error(results) < 1e-5
    drawn = (results["features"] != 0).any(1).nonzero()
    for spoil in (0.0, 2.0):  # an anchor without gradient counts as not drawn; one with twice its own is wrong
        gradient = results["features"].clone()
        image, row, column = drawn[5].tolist()
        gradient[image, :, row, column] *= spoil
        assert not problem.accepts(problem.error(results | {"features": gradient}))
    # without a wrongly or without a rightly predicted pixel, the others make up the number
    for predict in (problem.cells, (problem.cells + 1) % 19):
        other = replace(problem, predict=predict)
        drawn_there = sampling.contenders(contrast)["best eager"](other)()
        assert other.error(drawn_there) < 1e-5
        assert not problem.accepts(problem.error(drawn_there))


def test_a_wrong_gradient_of_a_whole_step_is_noticed() -> None:
    problem, contenders = PROBLEMS["branch"]
    results = contenders["pixcontrast"](problem)()
    assert problem.accepts(problem.error(results))
    for name in ("loss", "labelled", "unlabelled", "project.first.weight", "predict.last.weight"):
        assert not problem.accepts(problem.error(results | {name: results[name] * 1.01}))


def test_peak_memory_counts_the_gradient_but_not_the_inputs() -> None:
    gradient = 4096 * 256 * 4 / 2**20
    peak = peak_mebibytes(CASES["small"], "pixcontrast", "cpu", Checkouts(), threads=1)
    assert gradient <= peak < 3 * gradient
    all_pairs = peak_mebibytes(CASES["small"], "formula as it stands", "cpu", Checkouts(), threads=1)
    assert all_pairs > 1.5 * peak


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    outcome = run({"pixcontrast": positive.CONTENDERS["pixcontrast"], "wrong": wrong_by("loss", 2.0)})
    report = Report({"processor": "some", "threads": 2}, [outcome])
    report.save(tmp_path / "results.json")
    assert Report.load(tmp_path / "results.json") == report
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"other\.json is not a result file"):
        Report.load(tmp_path / "other.json")


def test_two_reports_are_compared() -> None:
    now = Report({"commit": "b"}, [run({"pixcontrast": positive.CONTENDERS["pixcontrast"]})])
    row = now.outcomes[0].rows[0]
    before = Report({"commit": "a"}, [replace(now.outcomes[0], rows=[replace(row, ms=row.ms * 2, peak_mib=7.0)])])
    text = comparison(now, before)
    assert "a → b" in text and "(× 0.50)" in text and "7 → –" in text
    assert "no case and contender in common" in comparison(now, Report({}, []))


def test_the_command_writes_a_report(tmp_path: Path, monkeypatch, capsys) -> None:
    tiny = replace(CASES["small"], name="tiny", sizes={"pixels": 500, "dim": 16, "rows": 5})
    sweep = [
        replace(tiny, name=f"tiny-{n}", sizes=tiny.sizes | {"pixels": n}, sweep="tiny: pixels", x=n) for n in (300, 600)
    ]
    for case in (tiny, *sweep):
        monkeypatch.setitem(CASES, case.name, case)
    chosen = ["--quick", "--case", "tiny", "tiny-300", "tiny-600", "--rounds", "2", "--skip", "torch.compile"]
    command_line.main([*chosen, "--out", str(tmp_path / "one")])
    printed = capsys.readouterr().out
    assert "## tiny:" in printed and str(tmp_path / "one" / "report.md") in printed
    for name in ("report.md", "results.json", "ratios.png", "roofline.png", "scaling-tiny.png"):
        assert (tmp_path / "one" / name).stat().st_size > 0
    command_line.main([*chosen, "--out", str(tmp_path / "two"), "--compare", str(tmp_path / "one" / "results.json")])
    assert "## Compared:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--case", "citty"], "no case 'citty'"), (["--compare", "nowhere.json"], "nowhere.json")],
)
def test_the_command_explains_wrong_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        command_line.main(arguments)


def test_the_list_shows_every_case(capsys) -> None:
    command_line.main(["--list"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in CASES)


RELEASED = """
import numpy
import torch
from torch.nn.functional import normalize


def contrastive_class_to_class_learned_memory(model, features, class_labels, num_classes, memory):
    loss = 0
    for c in range(num_classes):
        rows, stored = features[class_labels == c], torch.from_numpy(memory[c]).cuda()
        scores = torch.sigmoid(model.__getattr__('contrastive_class_selector_' + str(c))(rows.detach()))
        assert model.__getattr__('contrastive_class_selector_memory' + str(c))(stored).shape == (len(stored), 1)
        pairs = 1 - normalize(rows, dim=1) @ normalize(stored, dim=1).t()
        loss = loss + (pairs * (len(rows) * scores / scores.sum())).mean()
    return loss / num_classes
"""


def test_released_code_is_called_from_a_checkout(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "contrastive_losses.py").write_text(RELEASED)
    monkeypatch.syspath_prepend(tmp_path)
    cuda = torch.Tensor.cuda
    for kind in ("positive", "selectors"):
        problem, _ = PROBLEMS[kind]
        contender = Checkouts(semiseg=tmp_path).contender(problem)
        assert contender is not None
        assert problem.error(contender(problem)()) < 1e-3
    assert torch.Tensor.cuda is cuda
    outcome = run({"pixcontrast": positive.CONTENDERS["pixcontrast"]}, checkouts=Checkouts(semiseg=tmp_path))
    assert [row.contender for row in outcome.rows] == ["pixcontrast", NAME]
    # the released function weighs all memory rows alike, so it is no contender where they have weights
    for kind in ("weighted rows", "both selectors"):
        assert Checkouts(semiseg=tmp_path).contender(PROBLEMS[kind][0]) is None


def test_a_checkout_that_is_none_is_reported(tmp_path: Path) -> None:
    outcome = run(
        {"pixcontrast": positive.CONTENDERS["pixcontrast"]}, checkouts=Checkouts(semiseg=tmp_path / "nowhere")
    )
    assert outcome.rows[1].status == "failed" and "is not a folder" in outcome.rows[1].note
