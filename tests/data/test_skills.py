"""The embedded data set: determinism, form, and answers proven by hand and by re-derivation."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import skills_answers
from peft_study.data import skills
from peft_study.data.conversation import Conversation, Message
from peft_study.errors import ConfigError, OutputError

# sha256 of `skills.write(path)` as first made; a change here changes every number that was measured on the data.
FROZEN_SHA256 = "1349913060239232d337b2272f8f7e21134723a1e402a0580c9b62c831a24137"


def ask(skill: str, question: str) -> Conversation:
    return Conversation("x", (Message("user", question), Message("assistant", "?")), f"skills/{skill}")


# Worked out by hand (or read off a wall calendar), never by the code under test.
BY_HAND = [
    ("days-between", "How many days are there from 3 March 2021 to 17 April 2021?", "45 days"),
    ("days-between", "Count the days from 28 February 2024 until 1 March 2024.", "2 days"),
    ("add-days", "Which date is 2 days after 27 February 2023?", "1 March 2023"),
    ("add-days", "Add 31 days to 31 December 1999.", "31 January 2000"),
    ("weekday", "20 July 1969 is a Sunday. What day of the week is 24 July 1969?", "Thursday"),
    ("units", "How many kilograms are 6800 grams?", "6.8 kilograms"),
    ("units", "Convert 12 feet to inches.", "144 inches"),
    ("units", "How many feet are 12 inches?", "1 feet"),
    ("units", "Express 4 yards in feet.", "12 feet"),
    ("arithmetic", "Maya has 12 apples, buys 7 more and gives away 5. How many apples are left?", "14 apples"),
    ("arithmetic", "Tom fills 3 boxes with 4 books each and keeps 2 loose. How many books is that in all?", "14 books"),
    ("arithmetic", "56 coins are split evenly by Leo into 8 piles. How many coins are in a pile?", "7 coins"),
    ("arithmetic", "5 cards cost 9 euros apiece. Nina hands over 70 euros. How many euros is the change?", "25 euros"),
    ("compare", "Which number is largest: 9.11, 9.9, 9.25?", "9.9"),
    ("compare", "Find the smallest of these numbers: 9.11, 9.9, 9.25.", "9.11"),
    ("sort-numbers", "Put 48, 193, 9 into ascending order.", "9, 48, 193"),
    ("sort-numbers", "Sort these numbers in descending order: 48, 193, 9.", "193, 48, 9"),
    ("sort-words", "Sort these words alphabetically: tomato, winter, butter", "butter, tomato, winter"),
    ("reverse-words", "Say the words from last to first: red kite blue", "blue kite red"),
    ("count-letter", "How many times does the letter t occur in the word letter?", "2"),
    ("json", "Extract name, age and city as JSON: Anna is 34 years old and lives in Oslo.",
     '{"city": "Oslo", "name": "Anna", "age": 34}'),
    ("json", "12 lamps were ordered under number 4711. Give order, item and count as JSON.",
     '{"order": 4711, "item": "lamps", "count": 12}'),
    ("table", "item | price | stock\nrugs | 31 | 175\nmugs | 21 | 345\nLook up the price of mugs.", "21"),
    ("table", "item | price | stock\nrugs | 31 | 175\nmugs | 21 | 345\nWhich item has the highest price?", "rugs"),
]  # fmt: skip


@pytest.mark.parametrize(("skill", "question", "result"), BY_HAND)
def test_results_worked_out_by_hand_pass_and_others_fail(skill: str, question: str, result: str) -> None:
    row = ask(skill, question)
    assert skills_answers.check(row, f"Some reason.\nAnswer: {result}")
    assert skills_answers.check(row, f"Answer: wrong\nAnswer:  {result}.\n")
    assert not skills_answers.check(row, result), "the house format is part of the answer"
    assert not skills_answers.check(row, f"Answer: {result} 7")
    assert not skills_answers.check(row, "Answer: nothing")
    assert not skills_answers.check(row, f"Answer: {result}\nAnswer: nothing")


def test_a_wrong_unit_is_wrong_and_a_left_out_one_is_not() -> None:
    row = ask("units", "Convert 2 kilometres to metres.")
    assert skills_answers.check(row, "Answer: 2000")
    assert skills_answers.check(row, "Answer: 2,000 metres")
    assert not skills_answers.check(row, "Answer: 2000 kilometres")


def test_json_numbers_are_not_strings() -> None:
    row = ask("json", "Extract order, item and count as JSON: Order 4711: 12 lamps.")
    assert not skills_answers.check(row, 'Answer: {"order": "4711", "item": "lamps", "count": 12}')


def test_result_of_takes_the_last_answer_line() -> None:
    assert skills_answers.result_of("Answer: 1\nAnswer: 2 metres.") == "2 metres"
    assert skills_answers.result_of("Answer:\n5") is None
    assert skills_answers.result_of("The Answer: 5") is None


def test_the_data_of_seed_0_is_frozen(tmp_path: Path) -> None:
    path = skills.write(tmp_path / "new" / "skills.jsonl")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == FROZEN_SHA256
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [row.to_dict() for row in skills.generate()]
    assert len(rows) == 2000
    assert set(rows[0]) == {"id", "messages", "source"}
    assert [entry.name for entry in path.parent.iterdir()] == ["skills.jsonl"]


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        skills.write(tmp_path / "file" / "skills.jsonl", count=5)
    folder = tmp_path / "skills.jsonl"
    folder.mkdir()
    with pytest.raises(OutputError, match="is a folder, not a file"):
        skills.write(folder, count=5)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "skills.jsonl"]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**9), count=st.integers(1, 200))
def test_every_seed_gives_checked_unrepeated_balanced_rows(seed: int, count: int) -> None:
    rows = skills.generate(count, seed)
    questions = [row.messages[0].content for row in rows]
    assert len(set(questions)) == len({row.id for row in rows}) == count
    per_skill = [sum(row.source == f"skills/{name}" for row in rows) for name in skills.SKILLS]
    assert max(per_skill) - min(per_skill) <= 1
    assert skills.generate(max(1, count // 2), seed) == rows[: max(1, count // 2)]
    assert all(re.fullmatch(r"[^\n]+\nAnswer: [^\n]+", row.messages[1].content) for row in rows)
    assert all(map(skills_answers.check, rows))


def test_fewer_rows_are_the_beginning_of_more() -> None:
    assert skills.generate(30, seed=3) == skills.generate(90, seed=3)[:30]
    assert skills.generate(30, seed=3) != skills.generate(30, seed=4)


def test_the_answer_of_another_row_of_the_same_skill_fails() -> None:
    rows = skills.generate(240, seed=5)
    tried = 0
    for row in rows:
        other = next(r for r in rows if r.source == row.source and r is not row)
        if skills_answers.result_of(row.messages[1].content) != skills_answers.result_of(other.messages[1].content):
            tried += 1
            assert not skills_answers.check(row, other.messages[1].content)
    assert tried > 200


def test_the_check_reads_the_question_not_the_stored_answer() -> None:
    row = skills.generate(1)[0]
    wrong = replace(row, messages=(row.messages[0], Message("assistant", "Because.\nAnswer: nonsense")))
    assert not skills_answers.check(wrong)
    assert skills_answers.check(wrong, row.messages[1].content)


def test_errors_name_the_count() -> None:
    with pytest.raises(ConfigError, match="count is 0"):
        skills.generate(0)
    with pytest.raises(ConfigError, match="ask for at most"):
        skills.generate(10**6)


@pytest.mark.slow
def test_examples_are_30_to_110_tokens_of_the_embedded_model() -> None:
    from peft_study.model.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    rows = skills.generate()
    lengths = [sum(len(tokenizer(turn.content)["input_ids"]) for turn in row.messages) for row in rows]
    assert min(lengths) >= 30
    assert max(lengths) <= 110
