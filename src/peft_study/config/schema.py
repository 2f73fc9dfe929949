"""The JSON schema of a study file, with which editors complete, explain and check one while it is written.

It ships with the package as `SCHEMA_FILE`; ``peft-study schema -o FILE`` writes it again after the settings changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft_study.config.methods import METHODS
from peft_study.config.space import SPACES, Range
from peft_study.config.study import StudyConfig

SCHEMA_FILE = Path(__file__).parents[1] / "study.schema.json"
"""The schema that ships with the package."""


def schema() -> dict[str, Any]:
    """Returns the JSON schema of a study file, in draft 7, which every editor knows."""
    made = StudyConfig.model_json_schema()
    definitions = made.pop("$defs")
    data = definitions["DataConfig"]["properties"]
    data["train"] = _sources(data["train"])
    made["properties"]["methods"] = _methods(made["properties"]["methods"])
    made["properties"]["slots"]["anyOf"][0]["minimum"] = 1
    ranges = Range.model_json_schema()
    shortened = _shortened(made, ranges)
    definitions = {name: _shortened(value, ranges) for name, value in definitions.items()}
    definitions["Range"] = _shortened(ranges, None)
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "A study file of peft-study"}
    return {**head, **shortened, "$defs": dict(sorted(definitions.items()))}


def schema_text() -> str:
    """Returns the schema as it is written into a file."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def _sources(field: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of training sources as they may be written: one or several, a path alone or with a share."""
    one = [{"type": "string"}, field["items"]]
    several = {"type": "array", "items": {"anyOf": one}, "minItems": 1}
    return {"description": field["description"], "anyOf": [*one, several]}


def _methods(field: dict[str, Any]) -> dict[str, Any]:
    """Returns the schema of the spaces: a method's name alone says its method, every other name needs `method:`."""
    spaces = {method: {"$ref": f"#/$defs/{space.__name__}"} for method, space in SPACES.items()}
    return {
        "type": "object",
        "description": field["description"],
        "minProperties": 1,
        "propertyNames": {"pattern": "^[-_]*[A-Za-z0-9][A-Za-z0-9_-]*$"},
        "properties": {
            method: {"description": METHODS[method].__doc__, "anyOf": [space, {"type": "null"}]}
            for method, space in spaces.items()
        },
        "additionalProperties": {
            "type": "object",
            "required": ["method"],
            "properties": {"method": {"enum": list(METHODS), "description": "the method this is a space of"}},
            "anyOf": list(spaces.values()),
        },
    }


def _shortened(schema: Any, ranges: dict[str, Any] | None) -> Any:
    """Returns a schema as a person at an editor wants it.

    Copies of the range's schema are references to it. Titles that repeat the key are gone, and so are the defaults of
    whole sections, which an editor would write out: what `training` gives is not searched any more. YAML says null.
    """
    if ranges is not None and schema == ranges:
        return {"$ref": "#/$defs/Range"}
    if isinstance(schema, list):
        return [_shortened(item, ranges) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    if isinstance(kept.get("default"), dict):
        del kept["default"]
    if isinstance(kept.get("description"), str):
        kept["description"] = kept["description"].replace("None:", "null:")
    return {key: _shortened(value, ranges) for key, value in kept.items()}
