"""Whether an answer is right: plain functions of (output, gold, pattern); only `regex` looks at the pattern.

None says that it cannot be judged, because the row names no right answer: such rows are counted apart.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable

TOLERANCE = 1e-3
"""By which numbers may differ, as in LLM-Adapters' evaluation: gold answers there are rounded."""
_NUMBER = r"-?\$?(?:\d[\d,]*\.?\d*|\.\d+)"
_MARKED = re.compile(rf"####\s*({_NUMBER})")
"""GSM8K's final answer; a heading in Markdown may have the same mark, and no number behind it."""


def last_number(text: str) -> float | None:
    """Returns the number right after ``####`` where there is one, else the last of a text; None: it has none.

    lm-eval's `flexible-extract` takes the last number of GSM8K's answers, its `strict-match` only that after the mark.
    """
    marked = _MARKED.search(text)
    found = [marked[1]] if marked else re.findall(_NUMBER, text)
    if not found:
        return None
    return float(found[-1].replace(",", "").replace("$", ""))


def exact(output: str, gold: str, _pattern: str | None) -> bool | None:
    """Right where both are the same text but for case, spaces around and a full stop at the end."""
    return _plain(output) == _plain(gold) if gold else None


def number(output: str, gold: str, _pattern: str | None) -> bool | None:
    """Right where the final number of the output is the gold answer's."""
    expected = last_number(gold)
    if expected is None:
        return None
    found = last_number(output)
    return found is not None and abs(found - expected) <= TOLERANCE


def contains(output: str, gold: str, _pattern: str | None) -> bool | None:
    """Right where the gold answer stands in the output, as words of its own, in any case."""
    if not gold:
        return None
    return re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", output, re.IGNORECASE) is not None


def regex(output: str, gold: str, pattern: str | None) -> bool | None:
    """Right where what the pattern's first group finds last in the output is the gold answer."""
    if not gold:
        return None
    assert pattern is not None
    found = [match[1] or "" for match in re.finditer(pattern, output)]
    return bool(found) and _plain(found[-1]) == _plain(gold)


METRICS: dict[str, Callable[[str, str, str | None], bool | None]] = {
    "exact": exact,
    "number": number,
    "contains": contains,
    "regex": regex,
}


def _plain(text: str) -> str:
    return text.strip().rstrip(string.whitespace + ".").casefold()
