"""The doctor on whatever there is: a model, a study file, a command, a run, a study, a log, an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_study.doctor.rule import examine
from peft_study.errors import ConfigError
from peft_study.storage.run_dir import RunFolder

if TYPE_CHECKING:
    from peft_study.doctor.diagnosis import Diagnosis


def diagnose(
    what: Any,
    *,
    base: str | None = None,
    training_args: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    batches: Sequence[Any] | None = None,
    arguments: Any = None,
    tokenizer: Any = None,
) -> Diagnosis:
    """Says what is wrong with a run: before it starts, while it runs, after its end.

    Args:
        what: a model (`PreTrainedModel`, `PeftModel`) before a training loop of one's own; or a path: of a study file,
            of the folder of a study, a run or an adapter, of another tool's log or its folder; or the words of a
            command, as ``["finetune", "--use_lora", ...]``.
        base: folder of an adapter's base model.
        training_args: JSON or YAML file with the settings behind a log.
        columns: of a log, as ``{"loss": "train/ce"}``; what is left out is guessed.
        batches: of a model: some batches of the loop, as mappings with ``input_ids`` and ``labels`` (batch, length).
        arguments: of a model: `TrainingArguments`, or a mapping such as ``{"learning_rate": 1e-4}``.
        tokenizer: of a model, for the checks of BOS and end tokens.

    Raises:
        UserError: when it is none of these, or cannot be read.
    """
    of_model = {"batches": batches, "arguments": arguments, "tokenizer": tokenizer}
    of_log = {"training_args": training_args, "columns": columns}
    if hasattr(what, "named_parameters"):
        _refuse_unused("a model", base=base, **of_log)
        from peft_study.doctor.live import observe_model

        seen = observe_model(what, batches=batches, arguments=arguments, tokenizer=tokenizer)
        return examine(seen, about=type(what).__name__)
    if isinstance(what, (list, tuple)):
        _refuse_unused("a command", base=base, **of_log, **of_model)
        from peft_study.study.checkup import diagnose_words

        return diagnose_words([str(word) for word in what])
    if not isinstance(what, (str, os.PathLike)):
        remedy = "give a model, the path of a study file, run, log or adapter, or the words of a command"
        raise ConfigError(f"{type(what).__name__} is nothing to diagnose", remedy=remedy)
    path = Path(what)
    _refuse_unused("what lies in a file or folder", **of_model)
    if path.suffix in (".yaml", ".yml"):
        _refuse_unused("a file of settings", base=base, **of_log)
        from peft_study.study.checkup import diagnose_file

        return diagnose_file(path)
    return _diagnose_written(path, base, training_args, columns)


def _diagnose_written(
    path: Path, base: str | None, training_args: str | Path | None, columns: Mapping[str, str] | None
) -> Diagnosis:
    """Diagnoses what a run has written; arguments as of `diagnose`."""
    from peft_study.doctor.readers.adapter_files import read_adapter
    from peft_study.doctor.readers.logs import holds_log, read_log
    from peft_study.report.checks import diagnose_folder
    from peft_study.report.study_reader import is_study

    of_log = {"training_args": training_args, "columns": columns}
    if is_study(path):
        _refuse_unused("a study", base=base, **of_log)
        return diagnose_folder(path, study=True)
    if RunFolder(path).read_if_there("config.resolved.json") is not None:
        _refuse_unused("a run of this program", base=base, **of_log)
        return diagnose_folder(path, study=False, weights=True)
    logged = not path.is_dir() or holds_log(path)  # `read_log` tells where nothing is there
    # a log's folder may hold an adapter's configuration alone
    weights = "adapter_model.safetensors" if logged else "adapter_config.json"
    adapter = read_adapter(path, base=base) if (path / weights).exists() else None
    if adapter is not None and not logged:
        _refuse_unused("an adapter without a log", **of_log)
        return examine(adapter, about=str(path))
    if adapter is None:
        _refuse_unused("a log without an adapter", base=base)
    args = None if training_args is None else Path(training_args)
    seen = read_log(path, columns=columns, training_args=args)
    if adapter is not None:
        seen = replace(seen, adapter=adapter.adapter)
    return examine(seen, about=str(path))


def _refuse_unused(about: str, **given: Any) -> None:
    """Refuses what was given and says nothing of the matter."""
    for name, value in given.items():
        if value is not None and value != {}:
            raise ConfigError(f"says nothing of {about}", where=_NAMES.get(name, name), remedy="leave it out")


_NAMES = {"base": "base (--base)", "training_args": "training_args (--training-args)", "columns": "columns (--map)"}
"""As they are called here and on the command line."""
