"""The study of `peft-study run --model M --data D`: the file that `init` would write, with the budget asked for.

model + data ── look ──┐
--minutes ── plan ─────┴── study_text ──► OUTPUT/study.yaml ──► Study
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_study.config import SPACES, StudyConfig, validate
from peft_study.errors import ConfigError, OutputError, nearest
from peft_study.storage.files import atomic_writer, made_folder, read_text
from peft_study.storage.run_dir import RunFolder
from peft_study.storage.yaml_file import SettingsFile, load_yaml, parse_yaml
from peft_study.study.plan import check_minutes, plan
from peft_study.study.template import GENERATED, look, study_text
from peft_study.training.session import Say, timed

FILE = "study.yaml"


@dataclass(frozen=True)
class Request:
    """What was asked for instead of a study file.

    Attributes:
        model, data, split: as for `peft-study init`.
        methods: their names; none: lora, prefix_tuning and prompt_tuning, and the untouched base.
        trials, steps: settings a method, and optimizer steps of each; None: as `init` has them.
        minutes: of the whole study, instead of these two.
        options: words that change a setting otherwise, as ``("--set", "data.max_length=128")``.
        output: folder of the study; None: under ``runs/``, with the name of the data.
    """

    model: str
    data: tuple[str, ...]
    split: str | None = None
    methods: tuple[str, ...] = ()
    trials: int | None = None
    steps: int | None = None
    minutes: float | None = None
    options: tuple[str, ...] = ()
    output: Path | None = None

    @property
    def folder(self) -> Path:
        """Of the study."""
        return self.output or Path("runs") / (Path(self.data[0]).name.split(".")[0] or "study")

    @property
    def command(self) -> str:
        """The command that asks for it, which the file names in its first line."""
        words = ["peft-study", "run", "--model", self.model]
        for source in self.data:
            words += ["--data", source]
        words += ["--split", self.split] if self.split else []
        words += ["--methods", *self.methods] if self.methods else []
        for name, value in (("trials", self.trials), ("steps", self.steps), ("minutes", self.minutes)):
            words += [f"--{name}", f"{value:g}"] if value is not None else []
        return shlex.join([*words, *self.options, "-o", str(self.folder)])

    def check(self) -> None:
        """Refuses what does not go together.

        Raises:
            ConfigError: naming the option.
        """
        for method in self.methods:
            if method not in SPACES:
                raise ConfigError(f"unknown method {method!r}", where="--methods", remedy=nearest(method, SPACES))
        if self.minutes is not None:
            given = [name for name, value in (("trials", self.trials), ("steps", self.steps)) if value is not None]
            check_minutes(self.minutes, given, option="--")


def study_file(
    request: Request, change: Callable[[SettingsFile], None], say: Say, *, overwrite: bool, write: bool
) -> SettingsFile:
    """Returns the settings of the study that was asked for; the same request finds the file of its first start.

    Args:
        request: what was asked for.
        change: sets what the command line says instead of the file.
        say: receives each step that takes time, and the plan.
        overwrite: the study of another request in the folder may be replaced.
        write: put the file into the study's folder.

    Raises:
        UserError: as `look` and the study itself.
        OutputError: when the folder holds the study of another request.
    """
    request.check()
    path = request.folder / FILE
    if (file := _file_of_before(request, path, overwrite=overwrite)) is not None:
        change(file)
        return file
    with timed(say, "reading the data"):
        start = look(request.model, request.data, split=request.split)
    given: dict[str, Any] = {"budget.trials": request.trials, "budget.steps": request.steps}
    given = {key: value for key, value in given.items() if value is not None}

    def text() -> str:
        return study_text(
            start,
            output=str(request.folder),
            name=shlex.join([str(path), *request.options]),
            methods=request.methods,
            instead=given,
            command=request.command,
        )

    def changed() -> SettingsFile:
        file = parse_yaml(text(), path)
        change(file)
        return file

    # what cannot be run leaves no file behind
    file = changed()
    config = validate(StudyConfig, file.values, where=str(path), place=file.place)
    if request.minutes is not None:
        planned = plan(config, request.minutes, say)
        given |= {f"{section}.{name}": value for section, values in planned.items() for name, value in values.items()}
    if write:
        with made_folder(path.parent), atomic_writer(path) as written:
            written.write(text())
    return changed()


def _file_of_before(request: Request, path: Path, *, overwrite: bool) -> SettingsFile | None:
    """Returns the file of the first start of a request, which may have been changed by hand since.

    None where there is none, or that of another request, whose study never began or may be overwritten.

    Raises:
        OutputError: when the folder holds something else.
    """
    begun = RunFolder(request.folder).status() is not None
    if path.exists() and f"# {request.command}\n" in read_text(path):
        return load_yaml(path)
    if begun and path.exists() and not overwrite:
        raise OutputError(
            "was written for another command, which its first lines name",
            where=str(path),
            remedy="give that command to resume it, add --overwrite, or give another -o",
        )
    if path.exists() and GENERATED not in read_text(path):
        remedy = f"run it (peft-study run {shlex.quote(str(path))}), or give another -o"
        raise OutputError("is a study file that this command did not write", where=str(path), remedy=remedy)
    if begun and not overwrite:
        raise OutputError("holds another run", where=str(request.folder), remedy="add --overwrite, or give another -o")
    return None
