"""Skills on the calendar: days between two dates, a date some days later, the weekday of a date."""

from __future__ import annotations

import calendar
from datetime import date, timedelta

from peft_study.data.skills.base import Draws, Skill, Task

# Not taken from `calendar`, whose names follow the locale of the machine.
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


_BETWEEN = (
    "How many days are there from {a} to {b}?",
    "Count the days from {a} until {b}.",
    "A project starts on {a} and ends on {b}. How many days lie between the two dates?",
    "{a} to {b}: how many days is that?",
)
_LATER = (
    "Which date is {n} days after {a}?",
    "An invoice of {a} is due in {n} days. On which date?",
    "Add {n} days to {a}.",
    "It is {a} today. What date will it be in {n} days?",
)
_WEEKDAY = (
    "{a} is a {w}. What day of the week is {b}?",
    "If {a} falls on a {w}, on which weekday does {b} fall?",
    "Given that {a} was a {w}, name the weekday of {b}.",
)


def _say(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _start(draw: Draws) -> date:
    return date(draw.between(1990, 2035), 1, 1) + timedelta(days=draw.between(0, 364))


def _days_left(day: date) -> int:
    """Days from ``day`` to the end of its month."""
    return calendar.monthrange(day.year, day.month)[1] - day.day


def _make_between(draw: Draws) -> Task:
    first = _start(draw)
    second = first + timedelta(days=draw.between(3, 55))
    question = draw.choice(_BETWEEN).format(a=_say(first), b=_say(second))
    if (first.year, first.month) == (second.year, second.month):
        reason = f"Both dates are in {MONTHS[first.month - 1]}: {second.day} - {first.day} = {second.day - first.day}."
        return Task(question, reason, f"{second.day - first.day} days")
    parts = [f"{_days_left(first)} days left in {MONTHS[first.month - 1]}"]
    month = date(first.year, first.month, 1) + timedelta(days=32)
    while (month.year, month.month) != (second.year, second.month):
        parts.append(f"{calendar.monthrange(month.year, month.month)[1]} in {MONTHS[month.month - 1]}")
        month = month.replace(day=1) + timedelta(days=32)
    parts.append(f"{second.day} in {MONTHS[second.month - 1]}")
    total = sum(int(part.split()[0]) for part in parts)
    return Task(question, f"{', '.join(parts)}: {total} in all.", f"{total} days")


def _make_later(draw: Draws) -> Task:
    day, count = _start(draw), draw.between(3, 60)
    question = draw.choice(_LATER).format(n=count, a=_say(day))
    steps, left = [], count
    while left > _days_left(day):
        used = _days_left(day) + 1
        day, left = day + timedelta(days=used), left - used
        steps.append(f"{used} days to {day.day} {MONTHS[day.month - 1]}")
    day += timedelta(days=left)
    if left or not steps:
        steps.append(f"{left} more" if steps else f"Still in {MONTHS[day.month - 1]}: {day.day - left} + {left}")
    reason = ", ".join(steps) + (f" = {day.day}." if steps[0].startswith("Still") else ".")
    return Task(question, reason, _say(day))


def _make_weekday(draw: Draws) -> Task:
    first, count = _start(draw), draw.between(2, 40)
    second = first + timedelta(days=count)
    name, weeks, rest = WEEKDAYS[first.weekday()], count // 7, count % 7
    question = draw.choice(_WEEKDAY).format(a=_say(first), w=name, b=_say(second))
    reason = f"That is {count} days later; {count} = {weeks} x 7 + {rest}, so {name} plus {rest}."
    return Task(question, reason, WEEKDAYS[second.weekday()])


SKILLS = (
    Skill("days-between", _make_between),
    Skill("add-days", _make_later),
    Skill("weekday", _make_weekday),
)
