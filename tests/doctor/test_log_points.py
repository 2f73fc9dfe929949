"""Points of a log: order, steps that come again, several runs, and logs of any length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from peft_study.doctor.observations import LossCurve
from peft_study.doctor.readers.log_curve import curve_of_points
from peft_study.doctor.readers.points import MOST_POINTS, Points


def curve_of(*lives: tuple[list[float], float]) -> LossCurve:
    """Returns the curve of a log of pieces: steps, and the loss at all of them."""
    points = Points()
    for steps, loss in lives:
        for step in steps:
            points.add(step, {"loss": loss, "rate": loss / 10})
    found = curve_of_points(points)
    assert found is not None
    return found


def test_a_resumed_run() -> None:
    found = curve_of((list(range(1, 31)), 3.0), (list(range(21, 41)), 2.0))
    assert found.steps.tolist() == list(range(1, 41))
    assert found.loss.tolist() == [3.0] * 20 + [2.0] * 20
    assert found.rate is not None
    assert found.rate.tolist() == [3.0 / 10] * 20 + [2.0 / 10] * 20
    assert found.resumed == (20,)
    assert found.notes == ("taken up again at step 20: of steps that were done twice the later values are read",)


def test_a_resumed_run_that_has_not_come_as_far_yet() -> None:
    points = Points()
    for step in range(1, 31):
        points.add(step, {"loss": 3.0})
        if step % 10 == 0:
            points.add(step, {"held_out_loss": 3.5})
    for step in range(16, 20):
        points.add(step, {"loss": 2.0})
    found = curve_of_points(points)
    assert found is not None
    assert found.held_out_steps is not None
    assert (found.steps[-1], found.resumed) == (19, (15,))
    assert found.held_out_steps.tolist() == [10]  # those of 20 and 30 belong to the life that was given up


def test_several_resumes() -> None:
    found = curve_of((list(range(1, 51)), 4.0), (list(range(41, 61)), 3.0), (list(range(51, 91)), 2.0))
    assert found.resumed == (40, 50)
    assert found.loss.tolist() == [4.0] * 40 + [3.0] * 10 + [2.0] * 40


def test_two_runs_in_one_log() -> None:
    points = Points()
    for loss, last in ((3.0, 30), (2.0, 12)):
        points.add(0, {"held_out_loss": loss + 1})
        for step in range(1, last + 1):
            points.add(step, {"loss": loss})
        points.add(last, {"held_out_loss": loss})
    found = curve_of_points(points)
    assert found is not None
    assert found.held_out_loss is not None
    assert (len(found.steps), set(found.loss), found.resumed) == (12, {2.0}, ())
    assert found.held_out_loss.tolist() == [3.0, 2.0]
    assert found.notes == ("the log holds 2 runs, one after the other: the last one is read",)


@pytest.mark.parametrize("order", [[3, 1, 2, 6, 5, 4, 8, 7], [8, 7, 6, 5, 4, 3, 2, 1], [1, 3, 2, 4, 5, 6, 7, 8]])
def test_steps_in_no_order(order: list[float]) -> None:
    points = Points()
    for step in order:
        points.add(step, {"loss": step / 10})
    found = curve_of_points(points)
    assert found is not None
    assert found.loss.tolist() == [n / 10 for n in range(1, 9)]
    assert found.resumed == ()
    assert found.notes == ("the steps are in no order: they were sorted",)


def test_steps_that_come_again() -> None:
    found = curve_of(([1, 2, 3], 1.0), ([3, 4, 5], 2.0))
    assert found.loss.tolist() == [1, 1, 2, 2, 2]
    assert found.notes == ("1 steps are logged more than once: the later values are read",)
    points = Points()
    for step in range(1, 9):  # two micro-batches a step
        points.add(step, {"loss": 1.0})
        points.add(step, {"loss": 2.0})
    found_means = curve_of_points(points)
    assert found_means is not None
    assert found_means.loss.tolist() == [1.5] * 8
    assert "their mean is read" in found_means.notes[0]


def test_holes_and_single_points() -> None:
    found = curve_of((list(range(1, 20)), 2.0), (list(range(400, 420)), 1.0))
    assert found.window == 1
    assert found.notes == ("no loss is logged between the steps 19 and 400",)
    assert curve_of(([7], 2.0)).notes == ("the log holds the loss of one step only",)
    assert curve_of_points(Points()) is None


def test_series_logged_one_after_the_other() -> None:
    points = Points()
    for step in range(1, 11):
        points.add(step, {"loss": 2.0})
    for step in range(2, 11, 2):
        points.add(step, {"rate": step / 10})
    found = curve_of_points(points)
    assert found is not None
    assert found.rate is not None
    assert (len(found.steps), found.resumed) == (10, ())
    assert np.isnan(found.rate[0])
    assert found.rate[1:] == pytest.approx(np.arange(2, 11) / 10)  # between two points as their mixture


def test_long_logs_are_averaged() -> None:
    points, count = Points(), 5 * MOST_POINTS + 8000
    for step in range(1, count + 1):
        points.add(step, {"loss": step / 1000, **({"held_out_loss": 1.0} if step % 1000 == 0 else {})})
    found = curve_of_points(points)
    assert found is not None
    assert found.held_out_steps is not None
    assert MOST_POINTS / 2 < len(found.steps) <= MOST_POINTS
    assert found.window == 8
    assert found.steps[0] == 8
    assert found.loss[0] == pytest.approx(np.arange(1, 9).mean() / 1000)
    assert found.loss == pytest.approx((found.steps - 3.5) / 1000)
    assert set(np.diff(found.steps)) == {8}
    assert len(found.held_out_steps) == count // 1000


def test_a_long_log_that_becomes_nan() -> None:
    points, count = Points(), 3 * MOST_POINTS
    for step in range(1, count + 1):
        points.add(step, {"loss": 1.0 if step <= count // 2 else float("nan")})
    found = curve_of_points(points)
    assert found is not None
    assert np.isfinite(found.loss).mean() == pytest.approx(0.5, abs=0.01)
    assert any("the loss is not a number" in note for note in found.notes)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process alone is read on Linux")
@pytest.mark.parametrize("form", ["csv", "jsonl", "state"])
def test_ten_million_lines_take_little_memory(tmp_path: Path, form: str) -> None:
    count, path = 10_000_000, tmp_path / f"log.{form}"
    with path.open("w") as file:
        if form == "state":
            file.write('{"global_step": 1, "log_history": [')
        file.write("step,loss,lr\n" if form == "csv" else "")
        for first in range(1, count, 100_000):
            rows = range(first, first + 100_000)
            if form == "csv":
                file.write("".join(f"{n},{2 + n % 7},1e-4\n" for n in rows))
            else:
                end = "\n" if form == "jsonl" else ",\n"
                text = "".join(f'{{"step": {n}, "loss": {2 + n % 7}}}{end}' for n in rows)
                file.write(text if form == "jsonl" or first + 100_000 <= count else text.rstrip(",\n"))
        file.write('],\n"logging_steps": 1, "max_steps": 10000000}' if form == "state" else "")
    program = (
        "import sys, json\nfrom pathlib import Path\nfrom peft_study.doctor.readers.logs import read_log\n"
        "curve = read_log(Path(sys.argv[1])).curve\n"
        # what getrusage says begins with the parent's memory
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM:')).split()[1]\n"
        "print(json.dumps([len(curve.steps), curve.window, float(curve.loss.mean()), int(peak) * 1024]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, env={**os.environ}
    )
    points, window, mean, peak = json.loads(run.stdout)
    assert (points, window) == (19532, 512)
    assert mean == pytest.approx(5.0, abs=0.01)
    assert peak < 500 * 2**20
