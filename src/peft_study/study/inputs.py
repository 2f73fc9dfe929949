"""What a caller from Python gives, as the settings of a study file: paths and plain values, and rows in files.

model, rows in memory ──► name, OUTPUT/data/train.jsonl
LoRA(...), peft.LoraConfig(...), "lora" ──► a space, or one setting, of a method
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_study.config import SPACES, TRAINING_DIMENSIONS, MethodSpace, TrainingConfig, validate
from peft_study.data.in_memory import is_rows, write_rows
from peft_study.errors import ConfigError, nearest
from peft_study.methods.peft_config import from_peft, is_peft_config
from peft_study.storage.run_dir import RunFolder

if TYPE_CHECKING:
    from peft_study.model.in_memory import ModelInMemory

_PARTS = ("train", "held_out", "test")
"""Settings of the data that name rows."""
_SPLITS = {"train": "train", "validation": "held_out", "test": "test"}
"""What the splits of a ``DatasetDict`` become."""


class Inputs:
    """Model and data as a caller gave them, and what they are in the configuration.

    Args:
        output: folder into which rows in memory are written.
    """

    def __init__(self, output: str | Path) -> None:
        if not isinstance(output, (str, Path)):
            raise ConfigError(f"{_brief(output)} is no folder", where="output", remedy="give a path")
        self._output = Path(output)
        self.tables: dict[str, Any] = {}
        self.in_memory: ModelInMemory | None = None
        self._name = ""

    def model(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """Returns the section ``model``; a mapping is this section itself."""
        if isinstance(model, Mapping):
            self._name = str(model.get("name"))
            return merged("model", model, {"tokenizer": tokenizer})
        if not isinstance(model, (str, Path)):
            from peft_study.model.in_memory import in_memory

            self.in_memory = in_memory(model, tokenizer)
            model = self.in_memory.name
        elif tokenizer is not None and not isinstance(tokenizer, (str, Path)):
            what = "is an object, but the model is not"
            raise ConfigError(what, where="tokenizer", remedy="give its folder, or the model itself")
        self._name = str(model)
        own = {} if tokenizer is None or self.in_memory is not None else {"tokenizer": str(tokenizer)}
        return {"name": self._name, **own}

    def model_type(self) -> str:
        """Returns the kind of model, as `transformers` names it."""
        if self.in_memory is not None:
            return str(self.in_memory.model.config.model_type)
        from transformers import AutoConfig

        from peft_study.model.load import resolve_model

        return str(AutoConfig.from_pretrained(resolve_model(self._name)).model_type)

    def data(self, data: Any) -> dict[str, Any]:
        """Returns the section ``data``: rows in memory become paths below the output folder."""
        if type(data).__name__ == "DatasetDict":
            unknown = sorted(set(data) - set(_SPLITS))
            if unknown or "train" not in data:
                what = f"has splits {', '.join(data)}"
                raise ConfigError(what, where="data", remedy=f"give some of {', '.join(_SPLITS)}, train among them")
            section: dict[str, Any] = {_SPLITS[name]: rows for name, rows in data.items()}
        else:
            section = dict(data) if isinstance(data, Mapping) and "train" in data else {"train": data}
        for part in _PARTS:
            if part in section:
                section[part] = self._part(part, section[part])
        return section

    def _part(self, part: str, value: Any) -> Any:
        if is_rows(value):
            return self._table(part, value)
        if isinstance(value, (list, tuple)):
            return [
                self._table(f"{part}-{number}", item) if is_rows(item) else item
                for number, item in enumerate(value, start=1)
            ]
        named = (str, Path, Mapping) if part == "train" else (str, Path, Mapping, int, float, type(None))
        if not isinstance(value, named):
            remedy = "give a path, a Dataset, a DataFrame, a list of rows, or a list of these"
            raise ConfigError(f"{_brief(value)} cannot be taken as rows", where=f"data.{part}", remedy=remedy)
        return str(value) if isinstance(value, Path) else value

    def _table(self, name: str, rows: Any) -> str:
        path = self._output / "data" / f"{name}.jsonl"
        self.tables[str(path)] = rows
        return str(path)

    def write(self, *, overwrite: bool) -> None:
        """Writes the rows in memory; what is there already must be the same, or that of a run to be overwritten."""
        for path, rows in self.tables.items():
            # in a folder without a run of ours a file of this name is the user's
            write_rows(rows, Path(path), replace=overwrite and RunFolder(self._output).status() is not None)


def methods_section(methods: Any, model_type: Callable[[], str]) -> dict[str, Any]:
    """Returns the section ``methods``, of names, spaces and configurations of `peft`."""
    if isinstance(methods, Mapping):
        return {str(name): _space(body, model_type) for name, body in methods.items()}
    found: dict[str, Any] = {}
    for item in [methods] if isinstance(methods, str) or not isinstance(methods, Sequence) else methods:
        of_a_file = isinstance(item, Mapping) and "method" in item
        if not (isinstance(item, (str, MethodSpace)) or is_peft_config(item) or of_a_file):
            remedy = "give a name, as 'lora', LoRA(...) and its like, or a configuration of peft"
            raise ConfigError(f"{_brief(item)} is no method", where="methods", remedy=remedy)
        space = {} if isinstance(item, str) else _space(item, model_type)
        kind, number = item if isinstance(item, str) else str(space["method"]), 2
        name = kind
        while name in found:
            name, number = f"{kind}-{number}", number + 1
        found[name] = space if name == kind else {**space, "method": kind}
    return found


def _space(body: Any, model_type: Callable[[], str]) -> Any:
    """Returns the plain values of a space; those of a study file stay as they are."""
    if isinstance(body, MethodSpace):
        return body.model_dump(mode="json", exclude_unset=True) | {"method": body.kind}
    return from_peft(body, model_type()) if is_peft_config(body) else body


def _brief(value: Any) -> str:
    """Returns a value as it may stand in one line."""
    if value is None or isinstance(value, (int, float)):
        return repr(value)
    return f"the class {value.__name__}" if isinstance(value, type) else f"a value of type {type(value).__name__}"


def one_setting(method: Any, training: dict[str, Any], model_type: Callable[[], str]) -> dict[str, Any]:
    """Returns the sections ``method`` and ``training`` of one setting.

    Raises:
        ConfigError: when it is a space of several settings, or says what `training` says, too.
    """
    ((kind, values),) = methods_section([method], model_type).items()
    if kind not in SPACES:
        raise ConfigError(f"unknown method {kind!r}", where="method", remedy=nearest(str(kind), SPACES))
    space = validate(SPACES[kind], values, where="method")
    if several := space.dimensions():
        what = f"has several values of {', '.join(several)}, but one setting is trained"
        raise ConfigError(what, where="method", remedy="give one value of each, or compare them with Study")
    fixed = space.at({}, TrainingConfig())
    optimizer = {name: getattr(fixed.training, name) for name in TRAINING_DIMENSIONS if name in space.model_fields_set}
    return {"method": fixed.method.model_dump(mode="json"), "training": merged("training", training, optimizer)}


def merged(section: str, given: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a section with the arguments that stand for some of its settings.

    Raises:
        ConfigError: when one is given twice.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{given!r} is not a mapping of settings", where=section, remedy="give e.g. {'steps': 100}")
    found = dict(given or {})
    for name, value in named.items():
        if value is None:
            continue
        if name in found:
            raise ConfigError("is given twice", where=f"{name} and {section}.{name}", remedy="keep one of them")
        found[name] = value
    return found
