"""Sentences where several things hold at once: ties within noise, a diverged neighbour, several methods."""

from __future__ import annotations

from pathlib import Path

from hand_made import RATE, HandMade


def test_a_neighbour_that_diverged_makes_no_edge(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": {"learning_rate": [1e-3, 1e-2, 0.1]}})
    for rate, gain in ((1e-3, 0.1), (1e-2, 0.5), (0.1, None)):
        study.trial("lora", rate, gain)
    assert study.about("lora").endswith("one seed)")
    assert study.said("edge", "diverged") == ["lora: 1 of 3 settings diverged: learning_rate 0.1"]


def test_ties_with_the_best_are_listed_and_not_called_idle(tmp_path: Path) -> None:
    """A wide spread of gains: two rates within noise of the best, all three clearly better than the base."""
    study = HandMade(tmp_path / "s", {"lora": RATE})
    for rate, gain in ((1e-4, 0.48), (1e-3, 0.5), (3e-3, 0.47)):
        study.trial("lora", rate, gain, noise=0.3)
    study.trial("lora", 1e-2, 0.1)
    line = study.about("lora")
    assert line.startswith("lora: learning_rate 0.001 is best of 4 settings: dev loss 1.500 (95 % 1.")
    assert line.endswith("one seed)")
    assert study.said("range", "never_learned") == [
        "lora, as good as its best within noise (4 trials ran to the end, one seed each): learning_rate 0.0001 to "
        "0.003 (3 trials)"
    ]


def test_a_worse_rate_that_is_still_better_than_the_base_is_not_blamed(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    for rate, gain in ((1e-4, 0.1), (1e-3, 0.5), (1e-2, 0.2)):
        study.trial("lora", rate, gain)
    assert study.about("lora").endswith("over 64 examples, one seed)")


def test_methods_are_judged_alone_and_in_the_order_of_the_file(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"prompt_tuning": RATE, "lora": RATE})
    study.trial("lora", 1e-3, 0.9)
    study.trial("prompt_tuning", 0.1, 0.1)
    lines = study.said("base", "search")
    assert [line.split(":")[0] for line in lines] == ["untouched base", "prompt tuning", "lora"]
    assert lines[0].startswith("untouched base: dev loss 2.000 (95 % 1.9")


def test_many_rates_are_counted(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.trial("lora", 1e-3, 0.5)
    for number in range(7):
        study.trial("lora", 0.1 + number, None)
    assert study.said("diverged") == ["lora: 7 of 8 settings diverged: learning_rate 0.1 to 6.1"]
