"""The program from Python: what the command line does, with models and data in memory too.

Study(model, data, methods) --run--> StudyResult --best--> TrainedAdapter --load--> PeftModel
open_study(folder) ----------------> StudyResult
finetune(model, data, method) ------------------------------> TrainedAdapter
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from peft_study.config import StudyConfig, TrainConfig, TrialSettings, validate
from peft_study.errors import ConfigError, OutputError, UserError, nearest
from peft_study.report.study_reader import is_study
from peft_study.report.study_result import StudyResult, TrainedAdapter
from peft_study.report.study_result import open_study as open_study
from peft_study.storage.run_dir import RunFolder
from peft_study.storage.yaml_file import SettingsFile, load_yaml
from peft_study.study.inputs import Inputs, merged, methods_section, one_setting

if TYPE_CHECKING:
    from peft_study.model.in_memory import ModelInMemory
    from peft_study.study.callbacks import Callback
    from peft_study.study.dry_run import StudyEstimate
    from peft_study.training.finetune import Finished
    from peft_study.training.fit import Fit
    from peft_study.training.session import Say


class Study:
    """A comparison of methods on one model and one data set.

    Args:
        model: a folder, a hub id, the embedded ``smollm2-135m-instruct``, the section ``model`` of a study file, or a
            ``PreTrainedModel``, which is trained beside and given back as it was.
        data: a path as ``peft-study data convert`` takes it, a ``datasets.Dataset`` or ``DatasetDict``, a
            ``pandas.DataFrame``, a list of rows or of conversations (lists of ``{"role", "content"}``), or a list of
            such sources. Or the section ``data`` of a study file, in which rows may stand in place of paths.
        methods: names of methods, `LoRA(...)`, `PrefixTuning(...)`, `PromptTuning(...)`, or configurations of `peft`;
            or a mapping, as in a study file.
        trials: settings a method (``budget.trials``).
        steps: optimizer steps a trial (``budget.steps``).
        minutes: plan trials and steps for so many minutes in all, from the measured speed.
        tokenizer: of a model in memory; None: the one in the folder it was loaded from.
        output: folder of the study; an unfinished study of the same settings there is resumed.
        settings: any other section of a study file, as ``training={"batch_size": 4}`` or ``finals={"seeds": 5}``.

    Raises:
        ConfigError: naming the setting that cannot be used, its value and the remedy.
        ModelError: when a model in memory cannot be trained here.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        methods: Sequence[Any] | Mapping[str, Any] | str = ("lora", "prefix_tuning", "prompt_tuning"),
        *,
        trials: int | None = None,
        steps: int | None = None,
        minutes: float | None = None,
        tokenizer: Any = None,
        output: str | Path = "runs/study",
        **settings: Any,
    ) -> None:
        for name in settings:
            if name not in StudyConfig.model_fields:
                remedy = nearest(name, {*StudyConfig.model_fields, "trials", "steps", "minutes", "tokenizer"})
                raise ConfigError("is no argument", where=f"Study, {name}", remedy=remedy)
        self._inputs = Inputs(output)
        values = {
            "model": self._inputs.model(model, tokenizer),
            "data": self._inputs.data(data),
            "methods": methods_section(methods, self._inputs.model_type),
            **settings,
            "output": str(output),
        }
        budget = {"trials": trials, "steps": steps}
        values["budget"] = merged("budget", settings.get("budget"), budget)
        self._kept = {section: set(values.get(section) or ()) for section in ("data", "finals")}  # what is not planned
        if minutes is not None:
            from peft_study.study.plan import check_minutes

            given = [name for name in ("trials", "steps", "tokens") if values["budget"].get(name) is not None]
            check_minutes(minutes, given)
        self._start(SettingsFile.of(values, "Study"), minutes)

    @classmethod
    def from_yaml(cls, path: str | Path, settings: Mapping[str, Any] | None = None) -> Self:
        """Returns the study of a file.

        Args:
            path: of the study file.
            settings: instead of the file's, as ``{"budget.trials": 4, "output": "runs/short"}``.

        Raises:
            ConfigError: naming file, line, value and remedy.
        """
        file = load_yaml(Path(path))
        for key, value in (settings or {}).items():
            file.set(key, value, "settings")
        return cls.from_file(file)

    @classmethod
    def from_file(cls, file: SettingsFile) -> Self:
        """Returns the study of settings that were read already."""
        study = cls.__new__(cls)
        study._inputs = Inputs("")
        study._start(file, None)
        return study

    def _start(self, file: SettingsFile, minutes: float | None) -> None:
        self._file, self._minutes = file, minutes
        self._config = validate(StudyConfig, file.values, where=str(file.path), place=file.place)

    @property
    def config(self) -> StudyConfig:
        """Every setting, as validated."""
        return self._config

    def run(
        self,
        *,
        callbacks: Sequence[Callback] = (),
        verbose: bool = True,
        overwrite: bool = False,
        extend: bool = False,
    ) -> StudyResult:
        """Runs the study, or resumes it, and returns its result.

        Args:
            callbacks: hear of each trial, and may stop it or the study.
            verbose: show progress and tables, as on the command line.
            overwrite: replace another study in the output folder.
            extend: the settings changed since the study began: add trials under the new ones.

        Raises:
            UserError: of many kinds, each one line.
            Interrupted: after Ctrl-C (in a notebook: interrupting the cell); ``run()`` again resumes there.
        """
        from peft_study.display.study import StudyDisplay
        from peft_study.study.callbacks import check_callbacks
        from peft_study.study.run import run_study
        from peft_study.study.trackers import TrackerCallback
        from peft_study.training.interrupt import StopRequest

        check_callbacks(callbacks)
        if overwrite and extend:
            where = "--overwrite and --continue (Python: overwrite and extend)"
            raise ConfigError("cannot both be given", where=where, remedy="keep one of them")
        memory = self._inputs.in_memory
        try:
            with (
                _surroundings(memory),
                StopRequest().listening() as stop,
                StudyDisplay(silent=not verbose) as display,
                closing(TrackerCallback(self._config, display.say)) as trackers,
            ):
                self._write_inputs(overwrite=overwrite)
                self._plan(display.say, overwrite=overwrite)
                finished = run_study(
                    self._config,
                    self._file.values,
                    display,
                    stop,
                    overwrite=overwrite,
                    go_on=extend,
                    callbacks=(*callbacks, trackers) if self._config.logging.trackers else callbacks,
                    in_memory=memory,
                )
                trackers.on_study_end(open_study(self._config.output))
        except UserError as error:
            raise self._file.pointed(error) from None
        result = open_study(self._config.output)
        result.in_memory = memory
        display.conclude(finished, result.best)
        for callback in callbacks:
            callback.on_study_end(result)
        return result

    def estimate(self, *, verbose: bool = True) -> StudyEstimate:
        """Returns what the study would take, from a few measured steps; only rows in memory are written.

        Raises:
            UserError: as `run`.
        """
        from peft_study.display.terminal import LiveDisplay
        from peft_study.study.dry_run import estimate
        from peft_study.training.trackers import check_trackers

        memory = self._inputs.in_memory
        try:
            check_trackers(self._config.logging.trackers)
            with (
                _surroundings(memory),
                LiveDisplay(silent=not verbose) as display,
            ):
                self._write_inputs(overwrite=False)
                return estimate(self._config, display.say, in_memory=memory)
        except UserError as error:
            raise self._file.pointed(error) from None

    def memory(self) -> Fit | None:
        """Returns the memory that the study is expected to take, from the model's configuration; nothing is loaded.

        None for a model in memory, and for one whose operations cannot be counted without its weights.

        Raises:
            ModelError: when there is no configuration of the model.
        """
        from peft_study.study.dry_run import study_memory

        return None if self._inputs.in_memory is not None else study_memory(self._config, both=True)

    def _write_inputs(self, *, overwrite: bool) -> None:
        """Writes rows in memory into the output folder, which no other run may hold."""
        if self._inputs.tables:
            folder = RunFolder(self._config.output)
            if not (is_study(folder.path) or folder.status() is None or overwrite):
                raise OutputError("holds a run that is no study", where=str(folder.path), remedy="give another output")
            with folder.locked():
                self._inputs.write(overwrite=overwrite)

    def _plan(self, say: Say, *, overwrite: bool) -> None:
        """Sets trials, steps and finals for the minutes that were asked for; those of a study that is resumed stay."""
        from peft_study.study.plan import plan

        if self._minutes is None:
            return
        before = RunFolder(self._config.output).read_if_there("config.given.json") or {}
        planned = before.get("budget", {}).get("minutes") == self._minutes and "steps" in before["budget"]
        if not overwrite and planned:
            found = {section: before.get(section, {}) for section in ("budget", "finals")}
            data = before.get("data", {})
            found["data"] = {name: data[name] for name in ("held_out", "test") if name in data}
        else:
            found = plan(self._config, self._minutes, say, in_memory=self._inputs.in_memory)
        for section, values in found.items():
            for name, value in values.items():
                if name not in self._kept.get(section, ()):
                    self._file.set(f"{section}.{name}", value, "minutes")
        self._start(self._file, self._minutes)


def finetune(
    model: Any,
    data: Any,
    method: Any,
    *,
    steps: int | None = None,
    tokenizer: Any = None,
    output: str | Path = "runs/finetune",
    verbose: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> TrainedAdapter:
    """Trains one adapter, or resumes its training, and returns it.

    Args:
        model, data, tokenizer: as for `Study`.
        method: `LoRA(rank=16, learning_rate=1e-3)` and its like, a name, or a configuration of `peft`; a learning rate
            that is left out is the method's own.
        steps: optimizer steps (``training.steps``); None: one pass over the data.
        output: folder of the run; an unfinished run of the same settings there is resumed.
        verbose: show progress.
        overwrite: replace the run in the output folder.
        settings: any other section of a run: ``training={"batch_size": 4}``, ``logging={...}``.

    Raises:
        UserError: of many kinds, each one line.
        Interrupted: after Ctrl-C; the same call resumes there.
    """
    inputs = Inputs(output)
    values = {
        "model": inputs.model(model, tokenizer),
        "data": inputs.data(data),
        **one_setting(method, merged("training", settings.pop("training", None), {"steps": steps}), inputs.model_type),
        **settings,
        "output": str(output),
    }
    file = SettingsFile.of(values, "finetune")
    finished = train_file(file, verbose=verbose, overwrite=overwrite, inputs=inputs)
    found = TrialSettings(method=finished.config.method, training=finished.config.training).flat
    kind = found.pop("method")
    adapter, memory = finished.folder / "adapter", inputs.in_memory
    return TrainedAdapter(kind, kind, found, adapter, finished.after, finished.minus_base, None, memory)


def train_file(
    file: SettingsFile, *, verbose: bool = True, overwrite: bool = False, inputs: Inputs | None = None
) -> Finished:
    """Trains the setting of a file, such as a study's ``recommended.yaml``.

    Args:
        file: settings of one run (`TrainConfig`).
        verbose: show progress.
        overwrite: replace the run in the output folder.
        inputs: model and rows in memory.

    Raises:
        UserError: of many kinds, each one line.
        Interrupted: after Ctrl-C; the same call resumes there.
    """
    from peft_study.display.terminal import RunDisplay
    from peft_study.report.writing import try_page
    from peft_study.training.finetune import train
    from peft_study.training.interrupt import StopRequest

    config = validate(TrainConfig, file.values, where=str(file.path), place=file.place)
    memory = None if inputs is None else inputs.in_memory
    try:
        with (
            _surroundings(memory),
            StopRequest().listening() as stop,
            RunDisplay(silent=not verbose) as display,
        ):
            if inputs is not None and inputs.tables:
                with RunFolder(config.output).locked():
                    inputs.write(overwrite=overwrite)
            finished = train(config, file.values, display, stop, overwrite=overwrite, in_memory=memory)
            display.conclude(finished, try_page(finished.folder, display.say))
    except UserError as error:
        raise file.pointed(error) from None
    return finished


@contextmanager
def _surroundings(memory: ModelInMemory | None) -> Iterator[None]:
    """Keeps the bars of transformers out of the display, and records gradients whatever the caller has switched off.

    A model in memory is given back as it was at the end of the block.
    """
    import torch
    from transformers.utils import logging

    from peft_study.model.in_memory import lent

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            nullcontext() if memory is None else lent(memory.model),
        ):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
