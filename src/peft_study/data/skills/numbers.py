"""Skills on numbers: units, word arithmetic, comparison, sorting."""

from __future__ import annotations

from decimal import Decimal

from peft_study.data.skills.base import Draws, Skill, Task

# (large unit, small unit, small units in one large)
UNITS = (
    ("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000), ("litres", "millilitres", 1000), ("hours", "minutes", 60),
    ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7), ("years", "months", 12),
    ("feet", "inches", 12), ("yards", "feet", 3), ("pounds", "ounces", 16), ("dozens", "pieces", 12),
)  # fmt: skip
_CONVERT = (
    "Convert {n} {a} to {b}.",
    "How many {b} are {n} {a}?",
    "Express {n} {a} in {b}.",
    "A label says {n} {a}. What is that in {b}?",
)

_NAMES = ("Maya", "Tom", "Aisha", "Leo", "Nina", "Omar", "Ruth", "Ivan", "Mei", "Carlos")
THINGS = ("apples", "books", "stamps", "pencils", "shells", "coins", "marbles", "cards", "buttons", "candles")
_STORIES = {
    "trade": (
        "{w} has {a} {t}, buys {b} more and gives away {c}. How many {t} are left?",
        "Starting with {a} {t}, {w} finds {b} and then loses {c}. How many {t} does {w} have now?",
    ),
    "boxes": (
        "{w} fills {a} boxes with {b} {t} each and keeps {c} loose. How many {t} is that in all?",
        "There are {a} bags of {b} {t} and {c} single ones on the desk of {w}. How many {t} in total?",
    ),
    "share": (
        "{w} shares {a} {t} equally among {b} friends. How many {t} does each friend get?",
        "{a} {t} are split evenly by {w} into {b} piles. How many {t} are in a pile?",
    ),
    "change": (
        "{w} buys {a} {t} at {b} euros each and pays with {c} euros. How many euros does {w} get back?",
        "{a} {t} cost {b} euros apiece. {w} hands over {c} euros. How many euros is the change?",
    ),
}
_COMPARE = (
    "Which number is {w}: {list}?",
    "Find the {w} of these numbers: {list}.",
    "{list}: which of them is the {w}?",
)
_SORT = (
    "Sort these numbers in {w} order: {list}.",
    "Put {list} into {w} order.",
    "Arrange the numbers {list} so that they are in {w} order.",
)


def _plain(number: Decimal) -> str:
    """Writes a number without an exponent or closing zeros."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _make_units(draw: Draws) -> Task:
    large, small, factor = draw.choice(UNITS)
    down = draw.between(0, 1) == 1
    many = Decimal(draw.between(2, 99)) if factor % 10 else Decimal(draw.between(12, 99)) / 10
    less, more = _plain(many), _plain(many * factor)
    fact = f"1 {large.removesuffix('s') if large != 'feet' else 'foot'} is {factor} {small}"
    given, source, target = (less, large, small) if down else (more, small, large)
    question = draw.choice(_CONVERT).format(n=given, a=source, b=target)
    if down:
        return Task(question, f"{fact}, so {less} x {factor} = {more}.", f"{more} {small}")
    return Task(question, f"{fact}, so {more} / {factor} = {less}.", f"{less} {large}")


def _make_arithmetic(draw: Draws) -> Task:
    kind = draw.choice(tuple(_STORIES))
    a, b, c = draw.between(12, 60), draw.between(3, 30), draw.between(2, 12)
    unit = thing = draw.choice(THINGS)
    if kind == "trade":
        reason, result = f"{a} + {b} = {a + b}, then {a + b} - {c} = {a + b - c}.", a + b - c
    elif kind == "boxes":
        a = draw.between(3, 12)
        reason, result = f"{a} x {b} = {a * b}, then {a * b} + {c} = {a * b + c}.", a * b + c
    elif kind == "share":
        a, b = b * c, c
        reason, result = f"{a} / {b} = {a // b}.", a // b
    else:
        a, b = draw.between(3, 9), c
        c = (a * b // 10 + draw.between(1, 3)) * 10
        reason, result, unit = f"{a} x {b} = {a * b}, then {c} - {a * b} = {c - a * b}.", c - a * b, "euros"
    question = draw.choice(_STORIES[kind]).format(w=draw.choice(_NAMES), t=thing, a=a, b=b, c=c)
    return Task(question, reason, f"{result} {unit}")


def _make_compare(draw: Draws) -> Task:
    whole = draw.between(1, 99)
    tails = draw.sample([str(tail) for tail in range(1, 100) if tail % 10], 3)
    if all(len(tail) == len(tails[0]) for tail in tails):
        tails[0] = tails[0][0]  # different lengths are what makes 9.9 and 9.11 hard
    numbers = [f"{whole}.{tail}" for tail in tails]
    if len({Decimal(number) for number in numbers}) < 3:
        return _make_compare(draw)
    word = draw.choice(("largest", "smallest"))
    best = (max if word == "largest" else min)(numbers, key=Decimal)
    reason = f"With two decimals: {', '.join(f'{Decimal(number):.2f}' for number in numbers)}."
    return Task(draw.choice(_COMPARE).format(w=word, list=", ".join(numbers)), reason, best)


def _make_sort(draw: Draws) -> Task:
    numbers = draw.sample(range(1, 200), draw.between(4, 6))
    word = draw.choice(("ascending", "descending"))
    ordered = sorted(numbers, reverse=word == "descending")
    question = draw.choice(_SORT).format(w=word, list=", ".join(map(str, numbers)))
    reason = f"The first is {ordered[0]} and the last is {ordered[-1]}."
    return Task(question, reason, ", ".join(map(str, ordered)))


SKILLS = (
    Skill("units", _make_units),
    Skill("arithmetic", _make_arithmetic),
    Skill("compare", _make_compare),
    Skill("sort-numbers", _make_sort),
)
