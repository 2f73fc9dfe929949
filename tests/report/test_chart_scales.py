"""Axes, ticks, which of many are drawn, and colours that can be told apart."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_study.report.chart_scales import log_ticks, loss_axis, spread, thinned
from peft_study.report.chart_style import BACKGROUND, PALETTE, SHAPES, colours, shapes, theme

LOSSES = st.floats(0, 1e12) | st.just(math.nan) | st.just(math.inf)


def test_an_axis_shows_the_base_and_the_good_ones() -> None:
    axis = loss_axis([0.8, 1.2, 2.3, 1e7, math.nan], 2.2)
    assert axis.low < 0.8
    assert 2.3 < axis.high < 3.3
    assert axis.place(1.2) == 1.2
    assert axis.place(1e7) == axis.place(math.nan) == axis.edge < axis.high
    assert (axis.beyond(2.3), axis.beyond(1e7), axis.beyond(math.nan)) == (False, True, True)


def test_small_differences_are_not_blown_up() -> None:
    axis = loss_axis([2.0, 2.0001], 2.0)
    assert axis.high - axis.low > 0.005


@given(st.lists(LOSSES, max_size=20), LOSSES | st.none(), st.lists(LOSSES, max_size=5))
def test_an_axis_is_always_finite_and_holds_the_best(
    losses: list[float], base: float | None, ends: list[float]
) -> None:
    axis = loss_axis(losses, base, ends)
    assert -1 <= axis.low < axis.edge < axis.high < math.inf
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite:
        assert axis.place(min(finite)) == min(finite)
    if base is not None and math.isfinite(base):
        assert axis.place(base) == base


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (8e-5, 0.4, [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3]),
        (0.9, 12, [1, 2, 5, 10]),
        (1e-6, 1.5, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
        (1e-12, 1e8, [1e-12, 1e-9, 1e-6, 1e-3, 1, 1e3, 1e6]),
        (0.6, 0.9, [0.6, 0.9]),
    ],
)
def test_ticks_of_a_log_axis_are_few_and_round(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


@given(st.lists(LOSSES, max_size=60), st.integers(2, 20))
def test_a_spread_holds_the_best_half_and_no_more_than_asked(losses: list[float], most: int) -> None:
    found = spread(losses, most)
    assert found == sorted(set(found))
    assert len(found) == min(len(losses), most)
    left_out = [losses[i] for i in range(len(losses)) if i not in found]
    drawn = sorted(losses[i] for i in found if math.isfinite(losses[i]))
    best = drawn[: most - most // 2]
    assert all(not math.isfinite(loss) or loss >= max(best, default=0) for loss in left_out)


def test_a_thinned_curve_keeps_its_ends() -> None:
    assert thinned(range(5), 9) == [0, 1, 2, 3, 4]
    found = thinned(range(1000), 40)
    assert (len(found), found[0], found[-1]) == (40, 0, 999)


def linear(colour: str) -> npt.NDArray[np.float64]:
    """Returns a colour's linear red, green and blue, as sRGB and WCAG 2 define them."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    light = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other))
    return (light[1] + 0.05) / (light[0] + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_their_background(dark: bool) -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01), "a value that is known"
    assert all(contrast(colour, BACKGROUND[dark]) >= 3 for colour in PALETTE)
    config = theme(dark=dark)
    texts = [config["axis"]["labelColor"], config["axis"]["titleColor"], config["title"]["subtitleColor"]]
    texts += [config["style"]["base"]["color"], config["style"]["label"]["color"], config["legend"]["labelColor"]]
    assert all(contrast(text, BACKGROUND[dark]) >= 4.5 for text in texts)


SEEN = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
"""How linear colours look, by Machado, Oliveira & Fernandes (2009), severity 1."""


def oklab(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Returns a colour in Ottosson's OKLab (2020), where 0.02 is a difference that is just seen."""
    cones = np.array(
        [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.68069955, 0.10739696], [0.08830246, 0.28171884, 0.6299787]]
    )
    axes = np.array(
        [
            [0.21045426, 0.79361779, -0.00407205],
            [1.9779985, -2.42859221, 0.45059371],
            [0.02590404, 0.78277177, -0.80867577],
        ]
    )
    return np.asarray(axes @ np.cbrt(cones @ np.clip(rgb, 0, 1)))


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_differ_for_every_eye(eyes: str) -> None:
    matrix = np.array(SEEN[eyes])
    for one, other in itertools.combinations(PALETTE, 2):
        apart = float(np.linalg.norm(oklab(matrix @ linear(one)) - oklab(matrix @ linear(other))))
        assert apart > 0.06, (one, other)


def test_methods_differ_in_colour_or_shape() -> None:
    names = [f"method-{i}" for i in range(len(PALETTE) * len(SHAPES))]
    colour, shape = colours(names), shapes(names)
    assert len({(colour[name], shape[name]) for name in names}) == len(names) == 56
    assert list(colours(["b", "a"]).values()) == list(PALETTE[:2]), "by the order of the file, not of the alphabet"
