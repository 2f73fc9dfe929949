"""Every form of a row, every row that cannot be used, and where its message points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_study.data.conversation import Conversation
from peft_study.data.formats import (
    Format,
    detect_format,
    parse_mapping,
    to_conversation,
)
from peft_study.data.sources import open_sources
from peft_study.data.stream import parsed_rows, read_conversations
from peft_study.errors import ConfigError, DataError

ASK, ANSWER = {"role": "user", "content": " Why?\n"}, {"role": "assistant", "content": "So. "}
CALL = [{"type": "function", "function": {"name": "f", "arguments": {"x": None}}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def convert(values: dict[str, Any], mapping: str | None = None) -> Conversation:
    return to_conversation(
        values, row_id="file-3", default_source="file", where="f.jsonl row 3", mapping=parse_mapping(mapping)
    )


def turns(values: dict[str, Any], mapping: str | None = None) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in convert(values, mapping).messages]


def test_a_tulu_row_is_kept_exactly() -> None:
    row = {"id": "a", "messages": [{"content": "", "role": "system"}, ASK, ANSWER, ASK], "source": "s"}
    assert convert(row).to_dict() == {
        "id": "a",
        "messages": [{"role": "system", "content": ""}, ASK, ANSWER, ASK],
        "source": "s",
    }


@pytest.mark.parametrize(
    ("values", "form", "expected"),
    [
        ({"messages": [ASK, ANSWER]}, Format.MESSAGES, [("user", " Why?\n"), ("assistant", "So. ")]),
        (
            {"instruction": "Add", "input": "1 2", "output": "3"},
            Format.ALPACA,
            [("user", "Add\n\n1 2"), ("assistant", "3")],
        ),
        ({"instruction": "Add", "input": "", "output": "3"}, Format.ALPACA, [("user", "Add"), ("assistant", "3")]),
        ({"instruction": "Add", "input": None, "output": "3"}, Format.ALPACA, [("user", "Add"), ("assistant", "3")]),
        (
            {"instruction": "Who?", "context": "It was Ann.", "response": "Ann", "category": "qa"},
            Format.ALPACA,
            [("user", "Who?\n\nIt was Ann."), ("assistant", "Ann")],
        ),
        ({"prompt": "p", "completion": " c"}, Format.PROMPT, [("user", "p"), ("assistant", " c")]),
        ({"prompt": "p", "response": "c"}, Format.PROMPT, [("user", "p"), ("assistant", "c")]),
        ({"prompt": [ASK], "completion": [ANSWER]}, Format.PROMPT, [("user", " Why?\n"), ("assistant", "So. ")]),
        ({"question": "q", "answer": "a"}, Format.QUESTION, [("user", "q"), ("assistant", "a")]),
        (
            {"system_prompt": "Be kind", "question": "q", "response": "a"},
            Format.QUESTION,
            [("system", "Be kind"), ("user", "q"), ("assistant", "a")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "h"},
                    {"from": "function_call", "value": "{}"},
                    {"from": "observation", "value": "o"},
                    {"from": "gpt", "value": "g"},
                    {"from": "user", "value": "u"},
                    {"from": "tool", "value": ""},
                    {"from": "assistant", "value": "a"},
                ]
            },
            Format.SHAREGPT,
            [
                ("system", "s"),
                ("user", "h"),
                ("assistant", "{}"),
                ("tool", "o"),
                ("assistant", "g"),
                ("user", "u"),
                ("tool", ""),
                ("assistant", "a"),
            ],
        ),
        ({"conversations": [ASK, ANSWER]}, Format.SHAREGPT, [("user", " Why?\n"), ("assistant", "So. ")]),
        ({"messages": None, "prompt": "p", "completion": "c"}, Format.PROMPT, [("user", "p"), ("assistant", "c")]),
    ],
)
def test_forms(values: dict[str, Any], form: Format, expected: list[tuple[str, str]]) -> None:
    assert detect_format(values) is form
    assert turns(values) == expected


def test_mapping_names_any_columns() -> None:
    row = {"turns": [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}], "key": 7, "set": "mine"}
    row |= {"rules": "Be brief", "functions": json.dumps([TOOL])}
    converted = convert(row, "messages=turns,id=key,source=set,system=rules,tools=functions")
    assert converted.to_dict() == {
        "id": "7",
        "messages": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": "h"},
            {"role": "assistant", "content": "g"},
        ],
        "source": "mine",
        "tools": [TOOL],
    }
    assert turns({"q": "x", "gold": "y", "messages": "no"}, "prompt=q,response=gold") == [
        ("user", "x"),
        ("assistant", "y"),
    ]


def test_system_column_gives_way_to_a_system_turn() -> None:
    row = {"messages": [{"role": "system", "content": "own"}, ASK, ANSWER], "system": "column"}
    assert turns(row)[0] == ("system", "own")
    assert len(turns(row)) == 3


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image": None}, "c"]
    assert turns({"messages": [{"role": "user", "content": parts}, ANSWER]})[0] == ("user", "a bc")


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_and_tool_turns_are_kept(tools: Any) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": CALL, "name": None}
    result = {"role": "tool", "content": "42", "tool_call_id": "c1", "name": "f"}
    converted = convert({"messages": [ASK, call, result, ANSWER], "tools": tools})
    assert converted.tools == [TOOL]
    assert converted.messages[1].to_dict() == {"role": "assistant", "content": "", "tool_calls": CALL}
    assert converted.messages[2].to_dict() == result
    assert converted.messages[3].extra is None


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools(tools: Any) -> None:
    assert "tools" not in convert({"messages": [ASK, ANSWER], "tools": tools}).to_dict()


def test_missing_id_and_source() -> None:
    converted = convert({"messages": [ASK, ANSWER], "id": None, "source": ""})
    assert (converted.id, converted.source) == ("file-3", "file")


def changed(**changes: Any) -> dict[str, Any]:
    return {"messages": [{**ASK, **changes}, ANSWER]}


@pytest.mark.parametrize(
    ("values", "what", "remedy"),
    [
        ({"messages": []}, "the row has no messages", "--on-error skip"),
        ({"messages": None, "source": "s"}, "the row has no messages", "--on-error skip"),
        ({"messages": "hello"}, "messages is not a list of turns but str", "--map messages=COL"),
        ({"messages": ["hello"]}, "turn 1 is not an object with role and content but str", "--on-error skip"),
        (changed(role="asistant"), "turn 1 has the unknown role 'asistant'", "did you mean 'assistant'"),
        (changed(role="human"), "turn 1 has the unknown role 'human'", "did you mean 'user'"),
        (changed(role=None), "turn 1 has no role", "one of: assistant, system, tool, user"),
        ({"conversations": [{"from": "humann", "value": "x"}]}, "unknown role 'humann'", "did you mean 'human'"),
        ({"messages": [ASK]}, "the conversation has no assistant turn", "--on-error skip"),
        (changed(content=""), "turn 1 .user. has empty content", "--on-error skip"),
        (changed(content=None), "turn 1 .user. has empty content", "--on-error skip"),
        ({"messages": [ASK, {"role": "assistant", "content": " \n"}]}, "turn 2 .assistant. has empty", "skip"),
        ({"messages": [ASK, {**ANSWER, "content": "", "tool_calls": []}]}, "turn 2 .assistant. has empty", "skip"),
        ({"prompt": "p", "completion": ""}, "turn 2 .assistant. has empty content", "--on-error skip"),
        (changed(content=42), "content of turn 1 .user. is not a text but int '42'", "write it as a text"),
        ({"question": "q", "answer": 42}, "answer is not a text but int '42'", "write it as a text"),
        (changed(content=[{"type": "image_url", "url": "u"}]), "part 1 is not a text but 'image_url'", "only text"),
        (changed(content=[{"type": "image", "text": "a"}]), "part 1 is not a text but 'image'", "only text"),
        (changed(content=[{"type": "text", "text": 3}]), "part 1 is not a text", "only text"),
        (changed(content="x\ud800"), r"is not valid Unicode: half a surrogate pair .\\ud800 at character 2", "skip"),
        ({"text": "x", "label": "y"}, "no known columns: found text, label", "--map messages=COL or --map prompt=COL"),
        ({}, "no known columns: found none", "--map"),
        ({"messages": [ASK, ANSWER], "tools": "f(x)"}, "tools is neither a list of objects", "correct the row"),
        ({"messages": [ASK, ANSWER], "tools": [{"name": "\ud83d"}]}, "tools or a turn's further fields", "skip"),
        (changed(name="x\ud800"), "tools or a turn's further fields are not valid Unicode", "skip"),
        ({"messages": [ASK, ANSWER], "tools": [3]}, "tools is neither a list of objects", "correct the row"),
        ({"messages": [ASK, ANSWER], "source": {"a": 1}}, "source is neither a text nor a number", "--map source=COL"),
    ],
)
def test_rows_that_cannot_be_used(values: dict[str, Any], what: str, remedy: str) -> None:
    with pytest.raises(DataError, match=f"^f.jsonl row 3: .*{what}.*; .*{remedy}") as caught:
        convert(values)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed


def test_mapped_column_that_is_absent() -> None:
    with pytest.raises(DataError, match=r"no column 'turn' .--map messages=turn.; found turns; did you mean 'turns'"):
        convert({"turns": [ASK, ANSWER]}, "messages=turn")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("messages", "--map: 'messages' is not KEY=COLUMN"),
        ("mesages=a", "--map: unknown key 'mesages'; did you mean 'messages'"),
        ("prompt=a", "--map: prompt and response go together"),
        ("messages=a,prompt=b,response=c", "--map: messages goes without"),
        ("id=a,id=b", "--map: 'id' is given twice"),
    ],
)
def test_mappings_that_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_mapping(text)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_mixed_formats_name_both_rows(tmp_path: Path) -> None:
    tulu, pair = {"messages": [ASK, ANSWER]}, {"prompt": "p", "completion": "c"}
    path = write(tmp_path / "a.jsonl", {"messages": []}, tulu, tulu, pair, tulu)
    errors = [row.parsed if isinstance(row.parsed, DataError) else None for row in parsed_rows(open_sources([path]))]
    assert [error is None for error in errors] == [False, True, True, False, True]
    assert str(errors[3]) == (
        f"{path} row 4: this row is prompt/completion, but {path} row 2 is Tulu (messages): one source mixes formats; "
        "keep one format in a file and give the files as several sources"
    )
    other = write(tmp_path / "b.jsonl", pair)
    assert len(list(read_conversations([write(tmp_path / "c.jsonl", tulu), other]))) == 2


def test_read_conversations_stops_at_the_bad_row_and_numbers_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""})
    rows = read_conversations([path])
    assert next(rows).id == "a-1"
    with pytest.raises(DataError, match=r"a\.jsonl row 2: turn 2 .assistant. has empty content"):
        next(rows)


def test_progress_ends_at_all_rows_and_one(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c"}
    calls: list[tuple[int, float]] = []
    paths = [write(tmp_path / name, *[row] * 300) for name in ("a.jsonl", "b.jsonl")]
    list(parsed_rows(open_sources(paths), on_progress=lambda rows, share: calls.append((rows, share))))
    assert calls == sorted(calls)
    assert calls[-1] == (600, 1.0)


_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: bool(text.strip()))


@given(st.lists(st.tuples(_texts, _texts), min_size=1, max_size=3), _texts)
def test_what_was_converted_converts_to_itself(pairs: list[tuple[str, str]], source: str) -> None:
    turn_list = [
        turn for ask, answer in pairs for turn in ({"from": "human", "value": ask}, {"from": "gpt", "value": answer})
    ]
    once = convert({"conversations": turn_list, "source": source})
    assert [message.content for message in once.messages] == [text for pair in pairs for text in pair]
    assert convert(json.loads(json.dumps(once.to_dict()))) == once
