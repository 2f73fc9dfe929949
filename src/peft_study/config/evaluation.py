"""Which tasks are asked, and what the untouched base is given beside the adapters."""

from __future__ import annotations

from pydantic import Field, field_validator

from peft_study.config.common import SettingError, Strict


class EvaluationConfig(Strict):
    """Tasks on adapters and their base; also a section of a study file."""

    tasks: tuple[str, ...] = Field(min_length=1, description="NAME=FILE of rows, or a task file (.yaml); lm_eval:NAME")
    examples: dict[str, str] = Field({}, description="files of worked examples by task: then the base gets some, too")
    shots: int = Field(5, ge=0, description="how many worked examples the base gets in that baseline")
    system_prompt: str | None = Field(None, description="of another baseline: the base with this system prompt")
    limit: int | None = Field(None, ge=1, description="questions of each task, evenly over its file; None: all")
    lm_eval_chat: bool = Field(False, description="put the questions of lm-eval's tasks into the chat template")

    @field_validator("tasks", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("examples", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        """Reads also ``["NAME=FILE"]``, as the command line gives it."""
        if not isinstance(value, (list, tuple)):
            return value
        found = {}
        for pair in value:
            name, _, file = str(pair).partition("=")
            if not name or not file:
                raise SettingError(f"{pair!r} is not NAME=FILE")
            found[name] = file
        return found
