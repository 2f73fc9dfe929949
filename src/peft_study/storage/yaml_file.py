"""A file of settings: its values, the line of each of them, and what the command line sets instead.

STUDY.yaml ── nodes ──┬── values ────────── changed by --set, --steps, ...
                      └── lines                       │
                            └────────── place ────────┘   where a setting was written, for errors
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peft_study.config import DataConfig, Location
from peft_study.errors import ConfigError, UserError
from peft_study.storage.files import read_text

_Path = tuple[str, ...]
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but 1e-4 is a number, as in YAML 1.2, and a value that cannot be made is a YAML error.

    Such a value is a 32nd of January, or ``!!int x``; PyYAML lets through whatever Python raises for it.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Returns the value of a node."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:
            problem = f"{node.value!r} cannot be read as {node.tag.rpartition(':')[2]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


@dataclass
class SettingsFile:
    """What a YAML file and the command line say together.

    Attributes:
        path: the file.
        values: the settings, those of the command line among them.
    """

    path: Path
    values: dict[str, Any]
    _root: yaml.Node
    _options: dict[_Path, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any], name: str) -> SettingsFile:
        """Returns settings that stand in no file, under the name of what gave them."""
        return cls(Path(name), values, yaml.MappingNode("tag:yaml.org,2002:map", []))

    def set(self, key: str, value: Any, option: str) -> None:
        """Sets ``a.b`` to the value of a command-line option; missing sections are made.

        Raises:
            ConfigError: when a part of the path is a value and no section.
        """
        path = tuple(key.split("."))
        # sections are copied: one that the file names twice (&a, *a) is changed in one place only
        section = self.values = dict(self.values)
        for depth, name in enumerate(path[:-1], start=1):
            inner = section.get(name)
            if inner is not None and not isinstance(inner, dict):
                parent = ".".join(path[:depth])
                what = f"{parent} is {inner!r}, which holds no {path[depth]!r} to set"
                raise ConfigError(what, where=f"{option} {key}", remedy=f"give {parent} as a whole")
            section[name] = dict(inner or {})
            section = section[name]
        section[path[-1]] = value
        self._options[path] = option

    def drop(self, key: str) -> None:
        """Forgets ``a.b``, where it is given."""
        *parents, last = key.split(".")
        section: Any = self.values
        for name in parents:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(last, None)

    def assign(self, assignment: str) -> None:
        """Sets ``a.b=VALUE``, with the value written as in YAML.

        Raises:
            ConfigError: when this is no assignment, or no YAML.
        """
        key, equals, text = assignment.partition("=")
        where = f"--set {assignment}"
        if not equals or not all(key.strip().split(".")):
            raise ConfigError("is no assignment", where=where, remedy="write --set section.key=value")
        self.set(key.strip(), parse_value(text, where), "--set")

    def place(self, location: Location) -> str | None:
        """Returns where a setting was written: an option of the command line, or a line of the file.

        One that is missing is placed where its section begins; None for a missing section.
        """
        path = tuple(str(part) for part in location)
        for length in range(len(path), 0, -1):
            if path[:length] in self._options:
                return self._options[path[:length]]
        line, depth = self._line(path)
        made = [option for set_path, option in self._options.items() if set_path[: len(path)] == path]
        if made and depth < len(path):
            return made[0]
        return None if line is None else f"{self.path}, line {line}"

    def pointed(self, error: UserError) -> UserError:
        """Returns an error about a setting (``data.held_out``, ``methods.lora``) with the place it was written at."""
        section, _, name = (error.where or "").partition(",")[0].partition(".")
        state = {"data": DataConfig.model_fields, "methods": self.values.get("methods", ())}
        place = self.place((section, name)) if name in state.get(section, ()) else None
        return error if place is None else error.within(place)

    def _line(self, path: _Path) -> tuple[int | None, int]:
        """Returns the line of a setting or of the innermost section around it, and how many parts lead there."""
        node, line = self._root, None
        for depth, part in enumerate(path):
            found = _child(node, part)
            if found is None:
                return line, depth
            key, node = found
            line = key.start_mark.line + 1
        return line, len(path)


def load_yaml(path: Path) -> SettingsFile:
    """Reads the settings in a YAML file.

    Raises:
        ConfigError: when it cannot be read, is no YAML, says a key twice (each with its line), or is not a mapping.
    """
    return parse_yaml(read_text(path), path)


def parse_yaml(text: str, path: Path) -> SettingsFile:
    """Returns the settings in a text, which is or will be in a file; errors as of `load_yaml`."""
    root = _compose(text, str(path))
    values = None if root is None else _construct(root, str(path))
    if root is None or not isinstance(values, dict):
        raise ConfigError("is not a mapping of settings", where=str(path), remedy="write `key: value` lines")
    return SettingsFile(path, values, root)


def parse_value(text: str, where: str) -> Any:
    """Returns the value of a line of YAML, which `where` names; errors as of `load_yaml`."""
    node = _compose(text, where, lines=False)
    return None if node is None else _construct(node, where, lines=False)


def _compose(text: str, where: str, *, lines: bool = True) -> yaml.Node | None:
    """Returns the nodes of a YAML text, in which no key is given twice; None for an empty text."""
    try:
        root: yaml.Node | None = yaml.compose(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise _no_yaml(error, where, lines=lines) from error
    for first, again, name in _repeated(root):
        at = f", line {again.start_mark.line + 1}" if lines else ""
        before = f"it is also in line {first.start_mark.line + 1}: " if lines else ""
        raise ConfigError(f"{name} is given twice", where=f"{where}{at}", remedy=f"{before}keep one of them")
    return root


def _construct(root: yaml.Node, where: str, *, lines: bool = True) -> Any:
    """Returns the value of a tree of nodes."""
    loader = _Loader("")
    try:
        return loader.construct_document(root)
    except (yaml.YAMLError, RecursionError) as error:
        raise _no_yaml(error, where, lines=lines) from error
    finally:
        loader.dispose()


def _no_yaml(error: Exception, where: str, *, lines: bool) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "nested too deeply"
    line = f", line {mark.line + 1}" if mark is not None and lines else ""
    return ConfigError(f"is not valid YAML ({problem})", where=f"{where}{line}", remedy="fix it")


def _repeated(root: yaml.Node | None) -> Iterator[tuple[yaml.Node, yaml.Node, str]]:
    """Yields each key that is given again in the same section: the first node, the second, and its path."""
    waiting: list[tuple[yaml.Node, _Path]] = [] if root is None else [(root, ())]
    seen: set[int] = set()
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        keys: dict[str, yaml.Node] = {}
        for name, key, value in _children(node):
            if key is not value and name in keys:
                yield keys[name], key, ".".join((*path, name))
            keys[name] = key
            waiting.append((value, (*path, name)))


def _children(node: yaml.Node) -> list[tuple[str, yaml.Node, yaml.Node]]:
    """Returns name, the node to point at, and the value's node, of each entry of a mapping or a list."""
    if isinstance(node, yaml.MappingNode):
        return [(str(key.value), key, value) for key, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [(str(number), item, item) for number, item in enumerate(node.value)]
    return []


def _child(node: yaml.Node, part: str) -> tuple[yaml.Node, yaml.Node] | None:
    """Returns the node to point at and the value's node of one entry; of merged sections (<<) the last one counts."""
    found = [(key, value) for name, key, value in _children(node) if name == part]
    return found[-1] if found else None
