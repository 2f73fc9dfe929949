"""What counts as right, on hand-made answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_study.display.evaluation import _judged
from peft_study.evaluation.scores import EvaluationResult, scores_of
from peft_study.evaluation.scoring import METRICS, last_number


def judged(metric: str, output: str, gold: str, pattern: str | None = None) -> bool | None:
    return METRICS[metric](output, gold, pattern)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She makes $18 a day.", 18),
        ("9 * 2 = 18\n#### 18", 18),
        ("#### 7 apples, not 8", 7),
        ("#### Step 1: eggs\n16-3-4=9\n#### Step 2: money\n9*2=18\nThe answer is **18**.", 18),
        ("####$5", 5),
        ("1,234.50 dollars", 1234.5),
        ("-3", -3),
        ("costs $1,000", 1000),
        (".5 of it", 0.5),
        ("16 - 3", 3),
        ("no number", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, value: float | None) -> None:
    assert last_number(text) == (None if value is None else pytest.approx(value))


@pytest.mark.parametrize(
    ("metric", "output", "gold", "right"),
    [
        ("number", "the answer is 15", "15.0", True),
        ("number", "1.8333", "1.8333333333333335", True),
        ("number", "1.84", "1.8333333333333335", False),
        ("number", "I do not know", "15", False),
        ("number", "15", "", None),
        ("number", "15", "A", None),
        ("exact", " Paris.\n", "paris", True),
        ("exact", "Paris, France", "Paris", False),
        ("exact", "", "Paris", False),
        ("exact", "Paris", "", None),
        ("exact", "5", ".5", False),
        ("contains", "It is true, I think", "true", True),
        ("contains", "untrue", "true", False),
        ("contains", "C++ is it", "C++", True),
        ("contains", "x", "", None),
    ],
)
def test_right_wrong_and_not_judged(metric: str, output: str, gold: str, right: bool | None) -> None:
    assert judged(metric, output, gold) is right


def test_a_pattern_takes_what_it_finds_last() -> None:
    pattern = r"answer is (\w+)"
    assert judged("regex", "the answer is A; no, the answer is B", "b", pattern=pattern) is True
    assert judged("regex", "the answer is A", "b", pattern=pattern) is False
    assert judged("regex", "nothing", "b", pattern=pattern) is False
    assert judged("regex", "the answer is A", "", pattern=pattern) is None


def test_a_long_output_is_judged() -> None:
    assert judged("number", "1 " * 5000 + "42", "42") is True
    assert judged("contains", "no " * 5000 + "yes", "yes") is True


ANSWERS = [
    "She makes $18 a day.",
    "9 * 2 = 18\n#### 18",
    "It is 1,018 in all.\n#### 1,018",
    "So 18.",
    "The answer is 19, no, 18",
    "-18",
    "I do not know",
    "",
    "18 apples and 2 pears",
    "#### 17",
    "costs $1,000",
    "It is 18.5",
    "#### 18\n\nQuestion: what else?\n#### 17",
]


@pytest.mark.parametrize("gold", ["She has 18.\n#### 18", "Much.\n#### 1,018", "#### -18", "#### 1000", "#### 17"])
@pytest.mark.parametrize("output", ANSWERS)
def test_numbers_are_judged_as_lm_eval_judges_gsm8k(output: str, gold: str) -> None:
    """Its `strict-match` where an answer has the mark, its `flexible-extract` elsewhere."""
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    if "####" in output:
        found = extraction.RegexFilter(regex_pattern=r"#### (\-?[0-9\.\,]+)")
    else:
        found = extraction.RegexFilter(regex_pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
    ((extracted,),) = found.apply([[output]], [{}])
    theirs = metrics.exact_match_hf_evaluate(
        predictions=[extracted],
        references=[gold],
        regexes_to_ignore=[",", r"\$", "(?s).*#### ", r"\.$"],
        ignore_case=True,
        ignore_punctuation=False,
    )
    assert judged("number", output, gold) is bool(theirs["exact_match"])


def test_one_answer_given_every_time_is_told_where_there_are_few() -> None:
    golds = ["true"] * 13 + ["false"] * 7
    rows = [
        {"system": "base", "id": str(n), "score": n % 2 == 0, "gold": gold, "source": "a", "normalised": None}
        for n, gold in enumerate(golds)
    ]
    (score,) = scores_of("boolq", rows, has_answers=True)
    assert score.constant == 13 / 20
    assert "the most frequent answer every time: 65.0 %" in _judged([score])
    for all_the_same_or_all_different in (["true"] * 20, [str(n) for n in range(20)]):
        other = [{**row, "gold": gold} for row, gold in zip(rows, all_the_same_or_all_different, strict=True)]
        (score,) = scores_of("sums", other, has_answers=True)
        assert score.constant is None
        assert "every time" not in _judged([score])


def test_a_system_that_had_no_room_for_any_answer_leaves_the_groups_of_the_others() -> None:
    def rows(system: str, score: bool | None) -> list[dict[str, object]]:
        return [
            {"system": system, "id": str(n), "score": score, "gold": str(n), "source": "a", "normalised": None}
            for n in range(40)
        ]

    found = scores_of("t", [*rows("base", False), *rows("lora", True), *rows("prompt", None)], has_answers=True)
    assert {score.system: score.group for score in found} == {"lora": 1, "base": 2, "prompt": None}
    (task,) = EvaluationResult(Path(), tuple(found), {}).tables
    assert [score.system for score in task] == ["lora", "base", "prompt"]
