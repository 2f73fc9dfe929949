"""The answers of the embedded data set, worked out again from the text of the questions alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import date, timedelta
from decimal import Decimal, InvalidOperation

from peft_study.data.conversation import Conversation
from peft_study.data.skills.dates import MONTHS, WEEKDAYS
from peft_study.data.skills.numbers import THINGS, UNITS
from peft_study.data.skills.text import CITIES, GOODS, PEOPLE

_ANSWER_LINE = re.compile(r"^\s*Answer:[ \t]*(\S.*?)\s*$", re.MULTILINE)
_DATE = re.compile(rf"(\d{{1,2}}) ({'|'.join(MONTHS)}) (\d{{4}})")
_DAYS = re.compile(r"(\d+) days")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_UNIT_NAMES = "|".join(sorted({name for pair in UNITS for name in pair[:2]}))


def _words(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _decimal(number: Decimal) -> str:
    return f"{number.normalize():f}"


def _dates(text: str) -> list[date]:
    return [date(int(year), MONTHS.index(month) + 1, int(day)) for day, month, year in _DATE.findall(text)]


def _truth_between(question: str) -> str:
    first, second = _dates(question)
    return f"{(second - first).days} days"


def _truth_later(question: str) -> str:
    count = _DAYS.search(question)
    if count is None:
        raise ValueError(f"no number of days in {question!r}")
    return _words(_dates(question)[0] + timedelta(days=int(count[1])))


def _truth_weekday(question: str) -> str:
    return WEEKDAYS[_dates(question)[-1].weekday()]


def _same_days(truth: str, given: str) -> bool:
    """The unit may be left out."""
    return same_words(truth, given) or same_words(truth.removesuffix(" days"), given)


def _same_number(truth: str, given: str) -> bool:
    """Compares the first word of each as a number; a unit behind it may be left out but must not differ."""
    left, right = truth.split(), given.replace(",", "").split()
    try:
        equal = Decimal(left[0]) == Decimal(right[0])
    except (InvalidOperation, IndexError):
        return False
    return equal and (len(right) == 1 or [word.casefold() for word in right[1:]] == left[1:])


def _truth_units(question: str) -> str:
    number = _NUMBER.search(question)
    units = re.findall(rf"\b(?:{_UNIT_NAMES})\b", question)
    if number is None or len(units) != 2:
        raise ValueError(f"no conversion in {question!r}")
    source = re.search(rf"{re.escape(number[0])} ({_UNIT_NAMES})\b", question)
    start = source[1] if source else units[0]
    target = units[1] if units[0] == start else units[0]
    for large, small, factor in UNITS:
        if (start, target) == (large, small):
            return f"{_decimal(Decimal(number[0]) * factor)} {target}"
        if (start, target) == (small, large):
            return f"{_decimal(Decimal(number[0]) / factor)} {target}"
    raise ValueError(f"no conversion from {start} to {target}")


def _truth_arithmetic(question: str) -> str:
    numbers = [int(number) for number in _NUMBER.findall(question)]
    words = set(re.findall(r"[a-z]+", question))
    unit = next(thing for thing in THINGS if thing in words)
    if words & {"buys", "finds"} and words & {"gives", "loses"}:
        return f"{numbers[0] + numbers[1] - numbers[2]} {unit}"
    if words & {"boxes", "bags"}:
        return f"{numbers[0] * numbers[1] + numbers[2]} {unit}"
    if words & {"equally", "evenly"}:
        return f"{numbers[0] // numbers[1]} {unit}"
    return f"{numbers[2] - numbers[0] * numbers[1]} euros"


def _truth_compare(question: str) -> str:
    pick = max if "largest" in question else min
    return pick(_NUMBER.findall(question), key=Decimal)


def _truth_sort(question: str) -> str:
    ordered = sorted(_NUMBER.findall(question), key=int)
    return ", ".join(reversed(ordered) if "descending" in question else ordered)


def _truth_extract(question: str) -> str:
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    city = re.search("|".join(CITIES), question)
    name = re.search("|".join(PEOPLE), question)
    if city and name:
        return json.dumps({"name": name[0], "age": numbers[0], "city": city[0]})
    item = next(item for item in GOODS if item in question)
    return json.dumps({"order": max(numbers), "item": item, "count": min(numbers)})


def _same_object(truth: str, given: str) -> bool:
    """Compares as JSON: the order of the keys does not matter, the types do."""
    try:
        found = json.loads(given)
    except ValueError:
        return False
    return json.dumps(found, sort_keys=True) == json.dumps(json.loads(truth), sort_keys=True)


def _truth_table(question: str) -> str:
    header, *lines, ask = question.splitlines()
    table = [[cell.strip() for cell in line.split("|")] for line in lines]
    names = [cell.strip() for cell in header.split("|")]
    column = next(index for index, name in enumerate(names) if f"the {name} of" in ask or f"highest {name}" in ask)
    if "highest" in ask:
        return max(table, key=lambda cells: int(cells[column]))[0]
    return next(cells[column] for cells in table if re.search(rf"\bof {cells[0]}[?.]", ask))


def _truth_reverse(question: str) -> str:
    return " ".join(reversed(question.split(": ")[-1].split()))


def _truth_sort_words(question: str) -> str:
    return ", ".join(sorted(question.split(": ")[-1].split(", ")))


def _truth_count(question: str) -> str:
    letter, word = re.search(r"letter (\w)\b", question), re.search(r"word (\w+)", question)
    if letter is None or word is None:
        raise ValueError(f"no letter to count in {question!r}")
    return str(word[1].count(letter[1]))


def result_of(text: str) -> str | None:
    """Returns what stands behind the last ``Answer:`` of ``text`` without a closing full stop; None without one."""
    found = _ANSWER_LINE.findall(text)
    return found[-1].removesuffix(".").rstrip() if found else None


def same_words(truth: str, given: str) -> bool:
    """Compares two results as words: the case and the amount of white space do not matter."""
    return truth.casefold().split() == given.casefold().split()


def same_list(truth: str, given: str) -> bool:
    """Compares two results as comma-separated lists, in order."""
    return [item.strip().casefold() for item in truth.split(",")] == [
        item.strip().casefold() for item in given.split(",")
    ]


ANSWERS: dict[str, tuple[Callable[[str], str], Callable[[str, str], bool]]] = {
    "days-between": (_truth_between, _same_days),
    "add-days": (_truth_later, same_words),
    "weekday": (_truth_weekday, same_words),
    "units": (_truth_units, _same_number),
    "arithmetic": (_truth_arithmetic, _same_number),
    "compare": (_truth_compare, _same_number),
    "sort-numbers": (_truth_sort, same_list),
    "json": (_truth_extract, _same_object),
    "table": (_truth_table, same_words),
    "reverse-words": (_truth_reverse, same_words),
    "sort-words": (_truth_sort_words, same_list),
    "count-letter": (_truth_count, same_words),
}


def check(conversation: Conversation, answer: str | None = None) -> bool:
    """Returns whether ``answer`` (default: the conversation's own) ends in the right result.

    The right result is worked out again from the text of the user's turn; the stored answer is not looked at.
    """
    name = conversation.source.removeprefix("skills/")
    question = next(message.content for message in conversation.messages if message.role == "user")
    given = result_of(conversation.messages[-1].content if answer is None else answer)
    truth, agrees = ANSWERS[name]
    return given is not None and agrees(truth(question), given)
