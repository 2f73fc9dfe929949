"""The study file that ``peft-study init`` writes: every setting with its meaning, fitted to a model and to data.

    model + data ── look ──► Start ── study_text ──► study.yaml

Keys, values and comments come from the settings' classes, and `methods` holds each method's default space. So a study
file that only names `lora:`, `prefix_tuning:`, ... does the same.
"""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from peft_study.config import METHODS, SPACES, TRAINING_DIMENSIONS, Choices, Range, Strict, StudyConfig, TrainingConfig
from peft_study.config.schema import SCHEMA_FILE
from peft_study.data.chat import ChatEncoder
from peft_study.data.checkup import encoder_counts
from peft_study.data.stream import Survey, check_heads, survey
from peft_study.doctor.observations import Observations
from peft_study.doctor.rule import examine
from peft_study.errors import DataError
from peft_study.model.load import load_tokenizer
from peft_study.storage.files import atomic_writer, made_folder

HELD_OUT_MOST = 128
"""Held-out rows at most: evaluations then cost a few percent of a trial."""
STEPS_MOST = 300
"""Optimizer steps a trial at most: a pass over a large data set, times the trials, would take weeks."""
_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
_WHOLE_SHARE = 0.99
_DEFAULT_TEMPLATE = "tulu"
_COMMENT_COLUMN, _WIDTH = 60, 120


@dataclass(frozen=True, slots=True)
class Start:
    """What a study file depends on.

    Attributes:
        model: folder, hub id or embedded name.
        data: sources.
        split: of the sources.
        chat_template: where the tokenizer has none of its own.
        why_bos: why BOS is put first; None: it is not.
        positions: tokens the tokenizer was made for, or None where it does not say.
        found: numbers of the data.
    """

    model: str
    data: tuple[str, ...]
    split: str | None
    chat_template: str | None
    why_bos: str | None
    positions: int | None
    found: Survey

    @property
    def rows(self) -> str:
        """How many rows there are, in words."""
        return f"{self.found.rows:,} rows" if self.found.whole else f"more than {self.found.rows:,} rows"

    @property
    def max_length(self) -> int:
        """The least usual length that leaves nearly all rows whole, where the model can take it."""
        fitting = [length for length in _LENGTHS if self.found.within(length) >= _WHOLE_SHARE]
        return min(fitting[0] if fitting else _LENGTHS[-1], self.positions or _LENGTHS[-1])

    @property
    def held_out(self) -> int:
        """A tenth of the rows, but no more than make a difference."""
        return max(1, min(HELD_OUT_MOST, self.found.rows // 10))

    @property
    def steps_a_pass(self) -> int:
        """Optimizer steps over all rows once."""
        return math.ceil((self.found.rows - self.held_out) / TrainingConfig().batch_size)


GENERATED = "# It was written by"
"""Begins the line before the command that wrote a study file."""


def look(
    model: str, data: Sequence[str], *, split: str | None = None, on_progress: Callable[[int], None] | None = None
) -> Start:
    """Reads what a study file depends on.

    Raises:
        ModelError: the model has no tokenizer.
        DataError: the data cannot be used.
        TemplateError: the chat template refuses it.
    """
    tokenizer = load_tokenizer(model)
    template = None if tokenizer.chat_template else _DEFAULT_TEMPLATE
    encoder = ChatEncoder(tokenizer, template=template)
    bos = examine(Observations(data=encoder_counts(encoder)), checks=("missing_bos",)).problems
    if bos:
        encoder = ChatEncoder(tokenizer, template=template, add_bos=True)
    check_heads(data, encoder, split=split)
    found = survey(data, encoder, split=split, on_progress=on_progress)
    if found.rows < 2:
        remedy = "give more data: a comparison needs rows that are held out"
        raise DataError("there is one row", where=", ".join(data), remedy=remedy)
    positions = int(tokenizer.model_max_length)
    # transformers has a number of thirty digits for "unknown"
    return Start(
        model,
        tuple(data),
        split,
        template,
        bos[0].evidence.en if bos else None,
        positions if positions < 10**9 else None,
        found,
    )


def write_study_file(path: Path, start: Start) -> None:
    """Writes the study file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with made_folder(path.parent), atomic_writer(path) as file:
        file.write(study_text(start, output=f"runs/{path.stem}", name=shlex.quote(str(path))))


class _Setting(NamedTuple):
    """One line: a key, its value, its meaning, and the reason for this value."""

    key: str
    value: Any
    meaning: str
    why: str | None = None


def study_text(
    start: Start,
    *,
    output: str,
    name: str = "study.yaml",
    methods: Sequence[str] = (),
    instead: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> str:
    """Returns the text of a study file.

    Args:
        start: model and data.
        output: folder of the study.
        name: of the file, for the commands in its first lines.
        methods: what is compared; none: all but full fine-tuning, which stands there as a comment.
        instead: values instead of those fitted to the data, as ``{"budget.steps": 40}``.
        command: that asked for this study.
    """
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE.resolve().as_uri()}",
        "# A study: each method below is searched over its own space, all with the same budget, and compared.",
        f"#   peft-study run {name}",
        "# A run may differ from the file:",
        f"#   peft-study run {name} --set methods.lora.rank='[8, 16]' --set budget.trials=20",
        *([GENERATED, f"# {command}"] if command else []),
    ]
    values, reasons = _fitted(start)
    values |= instead or {}
    top: list[_Setting] = []
    for section, field in StudyConfig.model_fields.items():
        kind = field.annotation
        if section == "methods":
            lines += ["", *_methods(methods)]
        elif isinstance(kind, type) and issubclass(kind, Strict):
            elsewhere = {*TRAINING_DIMENSIONS, "steps"} if kind is TrainingConfig else set()
            settings = [
                _Setting(name, values.get(key, own.default), own.description or "", reasons.get(key))
                for name, own in kind.model_fields.items()
                if name not in elsewhere and (key := f"{section}.{name}")
            ]
            lines += ["", *_comment(kind.__doc__ or "")]
            if section == "training":
                lines += _comment(f"{', '.join(TRAINING_DIMENSIONS)}: under each method. steps: under budget.")
            lines += [f"{section}:", *_block(settings, 2)]
        else:
            top.append(_Setting(section, output if section == "output" else field.default, field.description or ""))
    return "\n".join([*lines, "", *_block(top, 0)]) + "\n"


def _fitted(start: Start) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the settings that model and data decide, and the reasons for their values."""
    found, length = start.found, start.max_length
    half, most, longest = (f"{found.quantile(share):,}" for share in (0.5, 0.95, 1.0))
    uncut = found.within(length)
    values = {
        "model.name": start.model,
        "data.train": start.data[0] if len(start.data) == 1 else list(start.data),
        "data.held_out": start.held_out,
        "data.split": start.split,
        "data.max_length": length,
        "data.chat_template": start.chat_template,
        "data.add_bos": start.why_bos is not None,
        "budget.steps": min(STEPS_MOST, start.steps_a_pass),
    }
    reasons = {
        "data.train": f"{start.rows}; half have at most {half} tokens, 95% at most {most}, the longest seen {longest}",
        "data.held_out": "the more rows, the narrower the intervals of the comparison",
        "data.max_length": f"{uncut:.1%} of the rows are no longer" if uncut < 1 else "no longer row was seen",
        "budget.steps": f"one pass over the data is {'' if found.whole else 'more than '}{start.steps_a_pass:,} steps",
    }
    if start.chat_template:
        reasons["data.chat_template"] = "the tokenizer has none of its own"
    if start.why_bos:
        reasons["data.add_bos"] = start.why_bos
    return values, reasons


def _methods(chosen: Sequence[str]) -> Iterator[str]:
    """Yields the section of the methods: the default space of each that is chosen, or of all."""
    yield from _comment(f"What is searched: {StudyConfig.model_fields['methods'].description}.")
    yield from _comment("A setting is one value, a list of values to try, or a range: {low: 1, high: 64, log: true}.")
    yield "methods:"
    for method, space_class in SPACES.items():
        if chosen and method not in chosen:
            continue
        yield from _comment(METHODS[method].__doc__ or "", 2)
        space = space_class().filled(TrainingConfig())
        given = [n for n in type(space).model_fields if n not in ("method", "space")]
        if not space.dimensions():
            yield f"  {method}: {{}}"
            continue
        settings = [_Setting(n, getattr(space, n), type(space).model_fields[n].description or "") for n in given]
        block = [f"  {method}:", *_block(settings, 4)]
        # full fine-tuning costs more than all other methods together, so it is off by default
        yield from ([f"  # {line[2:]}" for line in block] if method == "full" and not chosen else block)


def _block(settings: Iterable[_Setting], indent: int) -> Iterator[str]:
    """Yields the lines of some settings: reasons above, meanings in a column beside where they fit, else above."""
    lines = [(setting, f"{' ' * indent}{setting.key}: {_yaml(setting.value)}") for setting in settings]
    column = max(len(line) for _, line in lines if len(line) <= _COMMENT_COLUMN)
    for setting, line in lines:
        beside = f"{line:<{column}}  # {_as_yaml_says(setting.meaning)}"
        if setting.why:
            yield from _comment(setting.why, indent)
        if not setting.meaning or len(beside) > _WIDTH:
            yield from _comment(setting.meaning, indent)
            yield line
        else:
            yield beside


def _comment(text: str, indent: int = 0) -> list[str]:
    before = f"{' ' * indent}# "
    return textwrap.wrap(_as_yaml_says(text), _WIDTH, initial_indent=before, subsequent_indent=before)


def _as_yaml_says(text: str) -> str:
    return text.replace("None:", "null:")


def _yaml(value: Any) -> str:
    """Returns a value on one line, such that every version of YAML reads the same (1e-05 would be a text in 1.1)."""
    if isinstance(value, Range):
        value = value.model_dump()
    elif isinstance(value, Choices):
        value = list(value.choices)
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
