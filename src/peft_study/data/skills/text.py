"""Skills on text: extraction to JSON, looking up in a table, reversing words, sorting words, counting letters."""

from __future__ import annotations

import json

from peft_study.data.skills.base import Draws, Skill, Task

_WORDS = (
    "apple", "basket", "candle", "dolphin", "engine", "feather", "garden", "harbour", "island", "jacket",
    "kettle", "ladder", "meadow", "needle", "orange", "pepper", "quartz", "rabbit", "silver", "teacher",
    "umbrella", "village", "window", "yellow", "zebra", "banana", "coffee", "dinner", "eleven", "forest",
    "guitar", "hammer", "insect", "jungle", "kitchen", "letter", "mirror", "number", "office", "puzzle",
    "river", "summer", "tomato", "uncle", "velvet", "winter", "butter", "cotton", "parrot", "sleeve",
)  # fmt: skip
PEOPLE = ("Anna", "Boris", "Chen", "Diego", "Elif", "Farah", "George", "Hana", "Igor", "Julia", "Kofi", "Lena")
CITIES = ("Oslo", "Lima", "Cairo", "Turin", "Osaka", "Perth", "Quito", "Riga", "Dakar", "Bergen")
GOODS = ("lamps", "chairs", "mugs", "shelves", "rugs", "clocks", "bowls", "desks")

_EXTRACT = (
    "Extract {fields} as JSON: {text}",
    "Read the sentence and return a JSON object with {fields}. {text}",
    "{text} Give {fields} as JSON.",
)
_PERSON = ("{name} is {age} years old and lives in {city}.", "In {city} lives {name}, aged {age}.")
_ORDER = ("Order {order}: {count} {item}.", "{count} {item} were ordered under number {order}.")

_CELL = ("What is the {column} of {row}?", "Look up the {column} of {row}.")
_MOST = ("Which item has the highest {column}?", "Name the item with the highest {column}.")

_REVERSE = (
    "Write these words in reverse order, last one first: {words}",
    "Reverse the order of the following words: {words}",
    "Say the following words from last to first: {words}",
)
_SORT = ("Sort these words alphabetically: {words}", "Put the words into alphabetical order: {words}")
_COUNT = (
    "How many times does the letter {letter} occur in the word {word}?",
    "Count how often the letter {letter} occurs in the word {word}.",
    "The word {word}: how often does the letter {letter} appear in it?",
)


def _make_extract(draw: Draws) -> Task:
    person = draw.between(0, 1) == 1
    record: dict[str, str | int]
    if person:
        record = {"name": draw.choice(PEOPLE), "age": draw.between(18, 90), "city": draw.choice(CITIES)}
    else:
        record = {"order": draw.between(1000, 9999), "item": draw.choice(GOODS), "count": draw.between(2, 60)}
    sentence = draw.choice(_PERSON if person else _ORDER).format(**record)
    *most, last = record
    question = draw.choice(_EXTRACT).format(fields=f"{', '.join(most)} and {last}", text=sentence)
    reason = ", ".join(f"{key}: {value}" for key, value in record.items())
    return Task(question, f"Found {reason}.", json.dumps(record))


def _make_table(draw: Draws) -> Task:
    rows = draw.sample(GOODS, 3)
    cells = {row: (draw.between(3, 99), draw.between(100, 500)) for row in rows}
    lines = "\n".join(f"{row} | {price} | {stock}" for row, (price, stock) in cells.items())
    column = draw.between(0, 1)
    name = ("price", "stock")[column]
    if draw.between(0, 1):
        row = draw.choice(rows)
        ask, result = draw.choice(_CELL).format(column=name, row=row), str(cells[row][column])
        reason = f"The line is {row} | {cells[row][0]} | {cells[row][1]}, and {name} is number {column + 2}."
    else:
        values = [cells[row][column] for row in rows]
        if values.count(max(values)) > 1:
            return _make_table(draw)
        ask, result = draw.choice(_MOST).format(column=name), rows[values.index(max(values))]
        reason = f"The values of {name} are {', '.join(map(str, values))}; the highest is {max(values)}."
    return Task(f"item | price | stock\n{lines}\n{ask}", reason, result)


def _make_reverse(draw: Draws) -> Task:
    words = draw.sample(_WORDS, draw.between(4, 6))
    question = draw.choice(_REVERSE).format(words=" ".join(words))
    return Task(question, f"The last word is {words[-1]}, the first is {words[0]}.", " ".join(reversed(words)))


def _make_sort(draw: Draws) -> Task:
    words: list[str] = []
    for word in draw.sample(_WORDS, 12):
        if len(words) < 5 and word[0] not in {other[0] for other in words}:
            words.append(word)
    words = words[: draw.between(4, 5)]
    ordered = sorted(words)
    question = draw.choice(_SORT).format(words=", ".join(words))
    return Task(question, f"By first letter: {', '.join(word[0] for word in ordered)}.", ", ".join(ordered))


def _make_count(draw: Draws) -> Task:
    word = draw.choice(_WORDS)
    # The letter is one of the word's own but for one time in seven, when it need not occur at all.
    letter = draw.choice(sorted(set(word))) if draw.between(0, 6) else draw.choice("aeiourst")
    places = [index for index, other in enumerate(word, start=1) if other == letter]
    found = f"{letter} at {', '.join(map(str, places))}" if places else f"no {letter}"
    question = draw.choice(_COUNT).format(letter=letter, word=word)
    return Task(question, f"Spelled {'-'.join(word)}: {found}.", str(len(places)))


SKILLS = (
    Skill("json", _make_extract),
    Skill("table", _make_table),
    Skill("reverse-words", _make_reverse),
    Skill("sort-words", _make_sort),
    Skill("count-letter", _make_count),
)
