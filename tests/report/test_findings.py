"""What a study says, from hand-made losses: one method's search, the finals, the winner, the pruning."""

from __future__ import annotations

from pathlib import Path

import pytest

from hand_made import RATE, HandMade


@pytest.fixture
def lora(tmp_path: Path) -> HandMade:
    return HandMade(tmp_path / "study", {"lora": RATE})


@pytest.fixture
def both(tmp_path: Path) -> HandMade:
    return HandMade(tmp_path / "study", {"lora": RATE, "prompt_tuning": RATE}, finals={"best": 1, "seeds": 3})


def test_the_best_in_the_middle_needs_no_warning(lora: HandMade) -> None:
    for rate, gain in ((1e-4, 0.1), (1e-3, 0.5), (1e-2, 0.3)):
        lora.trial("lora", rate, gain)
    text = lora.about("lora")
    assert text.startswith("lora: learning_rate 0.001 is best of 3 settings: dev loss 1.500 (95 % 1.4")
    assert text.endswith(", over 64 examples, one seed)")


@pytest.mark.parametrize(
    ("learning_rate", "gains", "expected"),
    [
        ([0.1, 0.3], (0.1, 0.5), "the best learning_rate, 0.3, lies at the edge of its range: try higher"),
        ([0.1, 0.3], (0.5, 0.1), "the best learning_rate, 0.1, lies at the edge of its range: try lower"),
        (
            {"low": 0.1, "high": 1.0, "log": True},
            (0.5, 0.1),
            "the best learning_rate, 0.1, lies at the edge of its range: try lower",
        ),
    ],
)
def test_edges_of_the_range_are_said(
    tmp_path: Path, learning_rate: object, gains: tuple[float, float], expected: str
) -> None:
    study = HandMade(tmp_path / "s", {"lora": {"learning_rate": learning_rate}})
    for rate, gain in zip((0.1, 0.3), gains, strict=True):
        study.trial("lora", rate, gain)
    assert study.said("edge") == [f"lora: {expected}"]


def test_a_range_that_was_widened_has_its_edge_further_out(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": {"learning_rate": {"low": 1e-3, "high": 0.1, "log": True}}})
    study.trial("lora", 0.01, 0.1)
    study.trial("lora", 0.1, 0.5)
    assert study.said("edge")[0].endswith("try higher")
    event = {"event": "widened", "method": "lora", "dimension": "learning_rate", "note": "widened to 1"}
    study.events.append({**event, "bounds": [1e-3, 1.0], "fresh": [0.1, 1.0]})
    assert study.said("edge") == []
    moved = "lora: learning_rate was searched from 0.001 to 1, and not only from 0.001 to 0.1 as given"
    assert moved in study.said("search")
    study.events[-1]["bounds"] = [1e-2, 0.1]
    ruled_out = "its range test ruled out the rest of 0.001 to 0.1"
    assert f"lora: learning_rate was searched from 0.01 to 0.1; {ruled_out}" in study.said("search")


def test_the_only_one_tried_is_no_best(lora: HandMade) -> None:
    lora.trial("lora", 0.1, 0.5)
    assert "learning_rate 0.1 is the only setting tried: dev loss 1.500 (" in lora.about("lora")
    assert lora.said("edge", "range", "sensitivity") == []


def test_what_is_no_different_from_the_base_or_from_the_best(lora: HandMade) -> None:
    lora.trial("lora", 1e-4, 0.0)
    lora.trial("lora", 0.03, 0.5, noise=0.3)
    lora.trial("lora", 0.1, 0.48, noise=0.3)
    lora.trial("lora", 3.0, -1.0)
    lora.trial("lora", 9.0, None)
    lora.trial("lora", 5.0, -0.5, status="pruned", reason="at step 11 worse")
    lora.trial("lora", 6.0, -0.5, status="pruned", reason="at step 11 worse")
    lora.trial("lora", 7.0, None, status="failed", reason="does not fit")
    text = lora.about("lora")
    assert text.startswith("lora: learning_rate 0.03 is best of 8 settings: ")
    assert text.split("one seed)")[1] == "; 5 and 6 were stopped early; 7 failed"
    assert lora.said("range") == [
        "lora, as good as its best within noise (4 trials ran to the end, one seed each): learning_rate 0.03 to 0.1 "
        "(2 trials)"
    ]
    assert lora.said("never_learned", "diverged") == [
        "lora: 2 of 4 settings that ran to the end are no better than the untouched base: learning_rate 0.0001 and 3; "
        "1 of these is worse than it",
        "lora: 1 of 8 settings diverged: learning_rate 9",
    ]


def test_settings_of_several_dimensions_are_counted(tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": {"rank": [4, 8, 16]}})
    study.trial("lora", 1e-3, 0.5, rank=8)
    study.trial("lora", 1e-3, -0.5, rank=16)
    study.trial("lora", 1e-3, None, rank=4)
    study.trial("lora", 1e-2, None, rank=4)
    text = study.about("lora")
    assert text.startswith("lora: rank 8, learning_rate 0.001 is best of 4 settings")
    assert study.said("never_learned", "diverged") == [
        "lora: 1 of 2 settings that ran to the end is no better than the untouched base: rank 16, learning_rate 0.001; "
        "1 of these is worse than it",
        "lora: 2 of 4 settings diverged: rank 4, learning_rate 0.001 and 0.01",
    ]


def test_a_best_that_is_no_good_is_said_to_be_none(tmp_path: Path) -> None:
    for number, (gain, expected) in enumerate(
        [
            (0.0, "; even so it cannot be told from the untouched base"),
            (-0.5, "; even so it is worse than the untouched base"),
        ]
    ):
        study = HandMade(tmp_path / str(number), {"lora": RATE})
        study.trial("lora", 1e-3, gain)
        assert study.about("lora").endswith(expected)


def test_a_method_of_which_nothing_finished(tmp_path: Path, lora: HandMade) -> None:
    assert lora.about("lora") == "lora: no trial began in the time allowed"
    lora.trial("lora", 1.0, None)
    assert lora.about("lora") == "lora: its only setting did not finish (the loss became nan at step 3)"
    lora.trial("lora", 2.0, None)
    assert lora.about("lora") == "lora: none of its 2 settings finished (the loss became nan at step 3)"


def test_the_finals_have_their_interval_and_their_seeds(both: HandMade) -> None:
    for method in ("lora", "prompt_tuning"):
        both.trial(method, 1e-2, 0.5)
    both.chosen(lora=[0], prompt_tuning=[0])
    both.finals("lora", 0, [0.50, 0.52, 0.54])
    both.finals("prompt_tuning", 0, [0.4, None, 0.4])
    text = next(line for line in both.said() if line.startswith("lora, "))
    assert text.startswith("lora, its best setting retrained with 3 new seeds: dev loss 1.480 (95 % 1.")
    assert text.endswith(", by seed 1.460 to 1.500")
    lost = next(line for line in both.said() if "did not finish" in line)
    assert lost == "prompt tuning: 1 of 3 seeds of its best setting did not finish, so it is not ranked"
    both.concluded("lora")
    both.opened(**{f"lora-000-seed-{s}": 0.5 for s in (1, 2, 3)})
    text = next(line for line in both.said() if line.startswith("lora, "))
    assert "; test loss 1.500 (95 % 1." in text
    assert "), 0.500 (95 % 0.4" in text
    assert text.endswith(") below the untouched base's")


def test_the_winner_and_who_cannot_be_told_from_it(both: HandMade) -> None:
    for method in ("lora", "prompt_tuning"):
        both.trial(method, 1e-2, 0.5)
    both.chosen(lora=[0], prompt_tuning=[0])
    names = {
        m: both.finals(m, 0, [gain, gain + 0.01, gain - 0.01]) for m, gain in (("lora", 0.6), ("prompt_tuning", 0.5))
    }
    both.concluded("lora")
    both.opened(**{name: 0.6 if method == "lora" else 0.5 for method, own in names.items() for name in own})
    won = "winner by mean dev loss over 3 new seeds: lora with learning_rate 0.01"
    assert won in both.said()
    both.events.pop()
    both.opened(**{name: 0.6 for own in names.values() for name in own})
    assert f"{won}; on the test part prompt tuning cannot be told from it" in both.said()


def test_the_ranking_is_in_groups_and_says_what_its_examples_can_show(both: HandMade) -> None:
    """Holm's correction by the number of pairs is checked by hand in tests/test_coverage.py."""
    for method, gain in (("lora", 0.9), ("prompt_tuning", 0.5)):
        both.trial(method, 1e-2, gain)
    both.chosen(lora=[0], prompt_tuning=[0])
    both.finals("lora", 0, [0.90, 0.91, 0.89])
    both.finals("prompt_tuning", 0, [0.50, 0.51, 0.49])
    both.concluded("lora")
    apart = "ranking on the dev part, corrected for all pairs (Holm): lora; then prompt tuning; with 64 examples, "
    said = next(line for line in both.said() if line.startswith("ranking"))
    assert said.startswith(apart)
    assert said.endswith("nats a token are easily missed (80 % power, seeds apart); 256 would show 0.0026")
    names = [f"{method}-000-seed-{seed}" for method in ("lora", "prompt_tuning") for seed in (1, 2, 3)]
    both.opened(**dict.fromkeys(names, 0.6))
    said = next(line for line in both.said() if line.startswith("ranking"))
    assert ": lora and prompt tuning, which cannot be told apart; " in said


def test_fewer_than_three_seeds_are_a_lead(lora: HandMade) -> None:
    lora.trial("lora", 1e-2, 0.5)
    lora.chosen(lora=[0])
    lora.finals("lora", 0, [0.5, 0.5])
    lora.concluded("lora")
    assert lora.said("winner")[-1].endswith("; fewer than 3 seeds: take it as a lead")


def test_a_winner_that_is_worse_than_the_base_is_said_to_be(lora: HandMade) -> None:
    lora.trial("lora", 1e-2, -0.5)
    lora.chosen(lora=[0])
    names = lora.finals("lora", 0, [-0.5, -0.5, -0.5])
    lora.concluded("lora")
    lora.opened(**dict.fromkeys(names, -0.5))
    assert lora.said("winner")[-1].endswith("; it is worse than the untouched base")
    assert any(line.endswith(") above the untouched base's") for line in lora.said())


def test_no_finalist_finished(lora: HandMade) -> None:
    lora.trial("lora", 1e-2, 0.5)
    lora.chosen(lora=[0])
    lora.finals("lora", 0, [None])
    lora.concluded(None)
    assert lora.said("winner", "ranking")[-1] == "no setting finished with all its new seeds, so there is no winner"


@pytest.mark.parametrize(
    ("pruned", "audited", "expected"),
    [
        (1, [], "1 trial was stopped early; none was run on to check that"),
        (
            2,
            [0.1],
            "2 trials were stopped early; 1 more met the rule but was kept as a control: none would have been a "
            "finalist",
        ),
        (
            1,
            [0.9, 0.1],
            "1 trial was stopped early; 2 more met the rule but were kept as controls: 1 of 2 would have been a "
            "finalist",
        ),
    ],
)
def test_pruning_says_how_often_it_was_wrong(tmp_path: Path, pruned: int, audited: list[float], expected: str) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE}, finals={"best": 1, "seeds": 1})
    study.trial("lora", 1e-2, 0.5)
    for number in range(pruned):
        study.trial("lora", 1e-3 * (number + 1), 0.1, status="pruned", reason="at step 11 worse")
    for gain in audited:
        name = study.trial("lora", 1e-2 + gain, gain)
        ended = study.events.pop()
        study.events += [{"event": "audited", "name": name, "reason": "at step 11 worse"}, ended]
    assert study.said("pruning") == [expected]


def test_limits_and_changes_are_said(both: HandMade) -> None:
    both.trial("lora", 1e-2, 0.5)
    both.trial("lora", 1e-3, 0.5)
    both.trial("lora", 1e-4, 0.5)
    both.trial("prompt_tuning", 1e-2, 0.5)
    assert both.about("prompt tuning").endswith("; untuned: it had fewer trials than the others, so it is not ranked")
    both.events.append({"event": "deadline"})
    assert both.said()[-1] == "the time limit ended the search before all its settings were tried"
    both.trial("prompt_tuning", 1e-3, 0.5)
    assert "untuned" not in both.about("prompt tuning"), "a time limit may cost one trial"
    both.events.append({"event": "continued", "changes": ["budget.trials: 1 -> 2"], "methods": []})
    assert both.said()[-1] == "the study file was changed during the study, and the test part opened more than once"
