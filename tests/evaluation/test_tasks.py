"""Task files: the package's own on their real rows, a user's, and what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_study.config import EvaluationConfig
from peft_study.errors import ConfigError, DataError
from peft_study.evaluation.questions import Question
from peft_study.evaluation.tasks import find_task, find_tasks, task_names

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MATH = "AddSub", "MultiArith", "SVAMP", "SingleEq", "mawps"
CHOICES = "boolq", "ARC-Easy", "ARC-Challenge", "openbookqa", "piqa", "social_i_qa", "winogrande"
ROWS = {
    "ifeval": ["ifeval/ifeval.jsonl.gz"],
    "gsm8k": ["gsm8k/test.jsonl.gz"],
    "commonsenseqa": ["commonsenseqa/validation.jsonl.gz"],
    "mmlu": ["mmlu/dev.jsonl.gz"],
    "llm_adapters_math": ["llm-adapters/test/gsm8k.jsonl.gz"],
    "llm_adapters_choice": ["llm-adapters/test/boolq.jsonl.gz"],
    **{name: [f"llm-adapters/test/{name}.jsonl.gz"] for name in (*MATH, *CHOICES)},
}


def test_every_task_of_the_package_is_tried() -> None:
    assert {*ROWS, "loss", "text"} == set(task_names())


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
@pytest.mark.parametrize(("task", "file"), [(task, file) for task, files in ROWS.items() for file in files])
def test_the_packages_tasks_read_their_real_rows(task: str, file: str) -> None:
    questions = find_task(f"{task}={SHARED / file}").questions(limit=50)
    assert len(questions) == 50
    for question in questions:
        assert question.gold or task == "ifeval"
        assert len(question.turns[-1][1]) > 10
        if question.choices:
            assert question.gold_choice is not None
            assert len(set(question.choices)) == len(question.choices) >= 2


def written(folder: Path, rows: list[dict[str, Any]], **task: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "mine.yaml"
    path.write_text(json.dumps({"data": "rows.jsonl", "prompt": "{q}", "metric": "exact", **task}))
    return path


def questions(folder: Path, rows: list[dict[str, Any]], **task: Any) -> list[Question]:
    return find_task(str(written(folder, rows, **task))).questions()


def test_a_users_task_reads_the_rows_beside_it(tmp_path: Path) -> None:
    (found,) = questions(tmp_path, [{"q": "one?", "a": 1}], answer="{a}", system="Be short.")
    assert found == Question("1", (("system", "Be short."), ("user", "one?")), "1")


def test_choices_are_a_list_a_mapping_or_texts(tmp_path: Path) -> None:
    choice = {"metric": "choice", "choice": "({label}) {text}"}
    (found,) = questions(tmp_path, [{"q": "x\n", "c": ["no", "yes"], "answer": "B"}], choices="c", **choice)
    assert (found.choices, found.gold_choice) == (("(A) no", "(B) yes"), 1)
    (found,) = questions(tmp_path, [{"q": "x", "c": {"Y": "yes", "N": "no"}, "answer": "no"}], choices="c", **choice)
    assert (found.choices, found.gold_choice) == (("(Y) yes", "(N) no"), 1)
    (found,) = questions(tmp_path, [{"q": "x", "answer": 0}], choices=["no", "yes"], **choice)
    assert found.gold_choice == 0
    (found,) = questions(tmp_path, [{"q": "x", "answer": "perhaps"}], choices=["no", "yes"], **choice)
    assert found.gold_choice is None
    (found,) = questions(tmp_path, [{"q": "x: no/yes", "answer": "yes"}], choices_pattern="x: (.*)", **choice)
    assert (found.choices, found.gold_choice) == (("(A) no", "(B) yes"), 1)


def test_choices_may_have_the_form_of_the_hub(tmp_path: Path) -> None:
    """Of ARC, OpenBookQA and CommonsenseQA."""
    rows = [{"q": "x", "c": {"text": ["no", "yes"], "label": ["1", "2"]}, "key": "2"}]
    (found,) = questions(tmp_path, rows, prompt="{q}\n{c}", metric="choice", choices="c", answer="{key}")
    assert (found.choices, found.gold_choice) == (("no", "yes"), 1)
    assert found.turns == (("user", "x\n(1) no\n(2) yes"),)


def test_a_right_answer_in_another_case_is_found_where_one_choice_alone_has_it(tmp_path: Path) -> None:
    """Booleans of JSON become True and False."""
    for answer, choices, place in (
        (True, ["false", "true"], 1), ("b", ["no", "yes"], 1), ("YES", ["no", "yes"], 1), ("Ab", ["ab", "AB"], None)
    ):  # fmt: skip
        (found,) = questions(tmp_path, [{"q": "x", "answer": answer}], metric="choice", choices=choices)
        assert found.gold_choice == place


def test_all_texts_of_a_task_have_columns_whatever_their_names(tmp_path: Path) -> None:
    row = {"Question": "one?", "Best Answer": "a", "in-lang": "French", "option1": "one", "option2": "two"}
    texts = {"prompt": "{Question} Reply as {'json': 1}.", "answer": "{Best Answer}", "system": "In {in-lang}."}
    (found,) = questions(tmp_path, [row], **texts)
    assert found.turns == (("system", "In French."), ("user", "one? Reply as {'json': 1}."))
    assert found.gold == "a"
    choices = ["{option1}", "{option2}"]
    (found,) = questions(tmp_path, [row], prompt="{Question}", answer="two", metric="choice", choices=choices)
    assert (found.choices, found.gold_choice) == (("one", "two"), 1)
    with pytest.raises(DataError, match="has no column 'Worst Answer'"):
        questions(tmp_path, [row], prompt="{Worst Answer}")


def test_metrics_of_one_name_beside_two_task_files_are_two(tmp_path: Path) -> None:
    for name, verdict in (("one", True), ("two", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "judging.py").write_text(f"def ok(output, gold):\n    return {verdict}\n")
        path = written(tmp_path / name, [{"q": "x", "answer": "x"}], metric="judging:ok")
        assert find_task(str(path)).judge("x", Question("1", (), "x")) == verdict
    (tmp_path / "two" / "judging.py").write_text("def ok(output, gold):\n    return 0.5\n")
    assert find_task(str(path)).judge("x", Question("1", (), "x")) == 0.5, "it is read again"


def test_a_number_that_is_no_text_counts_among_the_choices(tmp_path: Path) -> None:
    """As MMLU's rows are on the hub: the answer 2 is the third choice, though the second says 2."""
    choices = {"metric": "choice", "choices": "c"}
    (found,) = questions(tmp_path, [{"q": "x", "c": ["8", "2", "24", "120"], "answer": 2}], **choices)
    assert found.gold_choice == 2
    (found,) = questions(tmp_path, [{"q": "x", "c": ["8", "2", "24", "120"], "answer": "2"}], **choices)
    assert found.gold_choice == 1
    (found,) = questions(tmp_path, [{"q": "x", "c": ["8", None, "24", "120"], "answer": 2}], **choices)
    assert (found.choices, found.gold_choice) == (("8", "24", "120"), 1)
    (found,) = questions(tmp_path, [{"q": "x", "c": [2, 4, 8], "answer": 2}], **choices)
    assert found.gold_choice == 0, "the choices are numbers themselves"
    (found,) = questions(tmp_path, [{"q": "x", "c": ["8", "2"], "answer": 7}], **choices)
    assert found.gold_choice is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"q": "x", "c": {}}, "no list of two choices"),
        ({"q": "x", "c": [None, None, "a"]}, "no list of two choices"),
        ({"q": "x", "c": ["a", ""]}, "a choice without text"),
        ({"q": "x", "c": [["a", "b"], ["c"]]}, "choices that are lists themselves"),
        ({"q": "x", "c": None}, "column 'c' is empty"),
        ({"q": None, "c": ["a", "b"]}, "column 'q' is empty"),
    ],
)
def test_a_row_without_choices_or_question_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        questions(tmp_path, [row], metric="choice", choices="c")


def test_a_prompt_may_show_the_choices(tmp_path: Path) -> None:
    row = {"q": "Which?", "c": ["no", "yes"], "answer": "A"}
    (found,) = questions(tmp_path, [row], prompt="{q}\n{c}", metric="choice", choices="c")
    assert found.turns == (("user", "Which?\n(A) no\n(B) yes"),)


def test_a_limit_takes_rows_from_the_whole_file(tmp_path: Path) -> None:
    task = find_task(str(written(tmp_path, [{"q": str(n), "answer": "x"} for n in range(10)])))
    assert [question.turns[0][1] for question in task.questions(5)] == ["0", "2", "4", "6", "8"]
    assert len(task.questions(50)) == 10


def test_rows_of_one_id_are_told_apart(tmp_path: Path) -> None:
    rows = [{"id": "a", "q": "1", "answer": "x"}, {"id": "b", "q": "2", "answer": "x"}, {"id": "a", "q": "3"}]
    assert [question.id for question in questions(tmp_path, rows)] == ["a#0", "b", "a#2"]
    rows = [{"id": name, "q": "x"} for name in ("a", "a", "a#1")]
    assert [question.id for question in questions(tmp_path, rows)] == ["a#0", "a#1#", "a#1"]


def test_a_missing_answer_is_no_error_and_a_missing_question_is(tmp_path: Path) -> None:
    (found,) = questions(tmp_path, [{"q": "one?"}])
    assert found.gold == ""
    with pytest.raises(DataError, match=r"rows.jsonl row 2.*has no column 'q'.*its columns are x"):
        questions(tmp_path, [{"q": "one?"}, {"x": "two?"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "exakt"}, "exact"),
        ({"metric": "regex"}, "needs a pattern"),
        ({"metric": "regex", "pattern": "("}, "is no regular expression"),
        ({"metric": "regex", "pattern": "x"}, "has no group"),
        ({"metric": "choice"}, "needs choices"),
        ({"choices": ["a", "b"]}, "has no choices"),
        ({"promt": "{q}"}, "prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"metric": "loss"}, "takes whole conversations"),
        ({"prompt": None}, "metric exact needs it"),
        ({"metric": "nowhere:f"}, "nowhere"),
        ({"data": "others.jsonl"}, "no such file"),
    ],
)
def test_what_is_wrong_with_a_task_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written(tmp_path, [{"q": "x", "answer": "x"}], **change)
    with pytest.raises((ConfigError, DataError), match=message):
        find_task(str(path)).judge("x", Question("1", (), "x"))


def test_worked_examples_have_an_answer_and_belong_to_a_task(tmp_path: Path) -> None:
    rows = [{"q": "1", "answer": ""}, {"q": "2", "answer": "b"}, {"q": "3", "answer": "c"}]
    path = written(tmp_path, rows, examples="rows.jsonl")
    (task,) = find_tasks(EvaluationConfig(tasks=(str(path),)))
    assert [example.turns[0][1] for example in task.worked_examples(2)] == ["2", "3"]
    with pytest.raises(DataError, match="has 2 rows with an answer"):
        task.worked_examples(3)
    with pytest.raises(ConfigError, match=r"examples of min, .*did you mean 'mine'"):
        find_tasks(EvaluationConfig(tasks=(str(path),), examples={"min": "x"}))
    with pytest.raises(ConfigError, match="given twice"):
        find_tasks(EvaluationConfig(tasks=(str(path), f"{path}={tmp_path / 'rows.jsonl'}")))


def test_worked_examples_may_be_conversations(tmp_path: Path) -> None:
    """Training data has them."""
    turns = [("system", "Be kind."), ("user", "q1"), ("assistant", "(B) no"), ("user", "q2"), ("assistant", "a2")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = written(tmp_path, [{"q": "x", "c": ["yes", "no"], "answer": "A"}], metric="choice", choices="c")
    (task,) = find_tasks(EvaluationConfig(tasks=(str(path),), examples={"mine": str(tmp_path / "train.jsonl")}))
    (example,) = task.worked_examples(1)
    assert (example.turns, example.answered) == ((("user", "q1"),), "(B) no")
    for form in ({"q": "x", "c": ["yes", "no"], "answer": "B", **rows[0]}, {"instruction": "x", "output": " no "}):
        (tmp_path / "train.jsonl").write_text(json.dumps(form) + "\nnot needed")
        (example,) = task.worked_examples(1)
        assert (example.turns[-1][1], example.answered) == ("x", "no"), "the task's own columns go first"
    alpaca = {"instruction": "x", "input": "", "output": "no"}
    (tmp_path / "train.jsonl").write_text(json.dumps(alpaca) + "\n")
    path = written(tmp_path, [{"instruction": "x", "answer": "1"}], prompt="{instruction}", examples="train.jsonl")
    assert [found.answered for found in find_task(str(path)).worked_examples(1)] == ["no"], "it has no column answer"
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": rows[0]["messages"][2:]}) + "\n")
    with pytest.raises(DataError, match="row 1: does not begin with a question and its answer"):
        task.worked_examples(1)


def test_conversations_and_texts_are_tasks_without_answers(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a text", "instruction": "a?", "output": "b"}) + "\n")
    (loss,) = find_task(f"loss={tmp_path / 'rows.jsonl'}").questions()
    assert loss.conversation is not None
    assert [turn.content for turn in loss.conversation.messages] == ["a?", "b"]
    (text,) = find_task(f"text={tmp_path / 'rows.jsonl'}").questions()
    assert text.turns == (("user", "a text"),)


@pytest.mark.parametrize("returned", ["1.5", "float('nan')", "'wrong'", "[1, 2]", "-0.1"])
def test_a_metric_returns_a_share(tmp_path: Path, returned: str) -> None:
    module = f"own_{abs(hash(returned))}"
    (tmp_path / f"{module}.py").write_text(
        f"def f(o, g):\n    return {returned}\ndef half(o, g):\n    return 0.5\ndef none(o, g):\n    return None\n"
    )
    task = find_task(str(written(tmp_path, [{"q": "x"}], metric=f"{module}:half")))
    assert task.judge("x", Question("1", (), "x")) == 0.5
    assert (
        find_task(str(written(tmp_path, [{"q": "x"}], metric=f"{module}:none"))).judge("", Question("1", (), ""))
        is None
    )
    task = find_task(str(written(tmp_path, [{"q": "x"}], metric=f"{module}:f")))
    with pytest.raises(ConfigError, match="for row 1; return True, False, a number from 0 to 1"):
        task.judge("x", Question("1", (), "x"))


def test_a_metric_that_cannot_be_imported_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "broken_metric.py").write_text("def f(:\n")
    for metric in ("broken_metric:f", "nowhere:f", ".x:f", "json:nothing", "json:__name__"):
        with pytest.raises(ConfigError, match="metric"):
            find_task(str(written(tmp_path, [{"q": "x"}], metric=metric)))


def test_a_path_may_hold_an_equals_sign(tmp_path: Path) -> None:
    (folder := tmp_path / "a=b").mkdir()
    assert find_task(str(written(folder, [{"q": "x"}]))).name == "mine"


def test_a_broken_task_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("prompt: x\nmetric: [\n")
    with pytest.raises(ConfigError, match=r"mine.yaml, line 3"):
        find_task(str(path))


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not there")
def test_instructions_are_followed_or_not() -> None:
    task = find_task(f"ifeval={SHARED / 'ifeval' / 'ifeval.jsonl.gz'}")
    by_rule = {tuple(question.row["instruction_id_list"]): question for question in task.questions()}
    no_comma, json_form = by_rule["punctuation:no_comma",], by_rule["detectable_format:json_format",]
    assert task.judge("No comma here.", no_comma) == 1
    assert task.judge("Here, one.", no_comma) == 0
    assert task.judge('{"a": 1}', json_form) == 1
    assert task.judge("a: 1", json_form) == 0
    assert task.judge("", no_comma) == 0


def test_an_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gsm8k"):
        find_task("gsm8=x.jsonl")
    with pytest.raises(ConfigError, match="--tasks gsm8k=FILE"):
        find_task("gsm8k")
    with pytest.raises(ConfigError, match="no such task file"):
        find_task(str(tmp_path / "other.yaml"))
