"""IFEval (Zhou et al. 2023, arXiv 2311.07911): does an answer do what its prompt demands? By lm-eval's rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_study.errors import ConfigError


def follows(output: str, _gold: str, row: Mapping[str, Any]) -> bool | None:
    """Returns whether an answer follows all instructions of its row: strict accuracy, a prompt at a time.

    None where a rule cannot be checked: some count sentences or capital words with nltk's table ``punkt_tab``.

    Args:
        output: the answer.
        row: with ``prompt``, ``instruction_id_list`` and ``kwargs``, as in google-research's ``input_data.jsonl``.

    Raises:
        ConfigError: when lm-eval is not installed.
    """
    try:
        from lm_eval.tasks.ifeval.utils import InputExample, test_instruction_following_strict
    except ImportError:
        remedy = "run: pip install 'peft-study[lm-eval]'"
        raise ConfigError("IFEval needs the rules of lm-eval, which is not installed", remedy=remedy) from None
    asked = InputExample(row.get("key", 0), row["instruction_id_list"], row["prompt"], row["kwargs"])
    try:
        return bool(test_instruction_following_strict(asked, output).follow_all_instructions)
    except LookupError:  # nltk's, of a table that is not there
        return None
