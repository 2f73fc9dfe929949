"""A study's result for a caller from Python: the best setting, what cannot be told from it, every trial as a row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_study.config import EvaluationConfig, validate
from peft_study.errors import ConfigError, ModelError, OutputError
from peft_study.evaluation.scores import EVALUATION
from peft_study.report.costs import costs
from peft_study.report.findings import LANGUAGES, Finding, find, texts
from peft_study.report.results import Finalist, Results, collect, columns, flat
from peft_study.report.status import study_status
from peft_study.report.study_reader import StudyRecord, read_study
from peft_study.report.wording import say
from peft_study.search.trials import best_of_search, setting_name, value_of
from peft_study.statistics import Estimate, short

if TYPE_CHECKING:
    import pandas

    from peft_study.config import StudyConfig
    from peft_study.evaluation.scores import EvaluationResult
    from peft_study.model.in_memory import ModelInMemory


@dataclass(frozen=True, repr=False)
class TrainedAdapter:
    """A trained setting: what it is, how good, and where its adapter lies.

    Attributes:
        name, method: ``lora-003``, ``lora``; of a single run both are the method.
        settings: every setting of its method, and the optimizer's searched ones.
        adapter_path: folder in PEFT's format; of a setting with several seeds, that of the least dev loss.
        dev: held-out loss in nats a supervised token with its 95 % interval; of several seeds the mean.
        minus_base: the same minus the untouched base's: on the test part where it was opened, else on the held-out one.
        test: loss on the test part; None where it was not opened.
    """

    name: str
    method: str
    settings: dict[str, Any]
    adapter_path: Path
    dev: Estimate | None
    minus_base: Estimate | None
    test: Estimate | None
    in_memory: ModelInMemory | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={short(value)}" for name, value in self.settings.items() if value is not None)
        return f"TrainedAdapter({self.name}: {values}; dev loss {self.dev}; {str(self.adapter_path)!r})"

    def load(self, model: Any = None, *, device: str = "auto") -> Any:
        """Returns a ``PeftModel``: the adapter on its base, in evaluation mode, ready to generate.

        Of method ``full``, whose whole model was trained, it is that model.

        Args:
            model: a base in memory, into which PEFT puts the adapter; None: the one that the study was given, else the
                one that the adapter names, loaded.
            device: of a base that is loaded.

        Raises:
            ModelError: when the adapter is not there, or does not fit, or the base in memory carries another one.
        """
        from peft_study.evaluation.generation import (
            AdapterBase,
            is_whole_model,
            load_adapter_base,
            load_whole_model,
            put_on,
        )
        from peft_study.model.in_memory import refuse_adapter
        from peft_study.model.precision import choose

        if not self.adapter_path.is_dir():
            what = "holds no adapter (it was cleaned up, or the run kept none)"
            raise ModelError(what, where=str(self.adapter_path), remedy="train the setting again: peft-study rerun")
        if is_whole_model(self.adapter_path):
            return load_whole_model(self.adapter_path, choose(device)).eval()
        given = model if model is not None or self.in_memory is None else self.in_memory.model
        if given is None:
            base = load_adapter_base(self.adapter_path, None, choose(device))
        else:
            refuse_adapter(given)
            base = AdapterBase(given, None, str(given.name_or_path), None)
        return put_on(self.adapter_path, base).eval()

    def load_tokenizer(self) -> Any:
        """Returns the tokenizer of the training, with the chat template that the examples were written in."""
        from peft_study.evaluation.generation import find_base, is_whole_model
        from peft_study.methods.peft_files import encoding, read_note
        from peft_study.model.load import load_tokenizer

        if is_whole_model(self.adapter_path):
            return load_tokenizer(str(self.adapter_path))
        if self.in_memory is not None:
            tokenizer = self.in_memory.tokenizer
        else:
            own = read_note(self.adapter_path).get("base_tokenizer")
            tokenizer = load_tokenizer(own or find_base(self.adapter_path))
        template = encoding(self.adapter_path)["template"]
        if template is not None:
            tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
        return tokenizer


@dataclass(frozen=True, slots=True)
class WrittenReport:
    """A report that was written.

    Attributes:
        path: of the page.
    """

    path: Path

    def _repr_html_(self) -> str:
        """Returns the page in a frame of its own, in which only its script may run."""
        page = escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" sandbox="allow-scripts" width="100%" height="800" title="report"></iframe>'


class StudyResult:
    """What a study has found so far, read from its folder; nothing is written or locked.

    Attributes:
        folder: of the study.
        in_memory: the base that was given as an object, for `TrainedAdapter.load`.
    """

    def __init__(self, record: StudyRecord, in_memory: ModelInMemory | None = None) -> None:
        self._record, self.in_memory = record, in_memory
        self.folder = record.folder.path

    @property
    def config(self) -> StudyConfig:
        """Every setting of the study, with all rules applied."""
        return self._record.config

    @property
    def state(self) -> str:
        """``running``, ``finished``, ``interrupted``, ``failed``, ``killed``, or ``unclear`` (on another machine)."""
        return study_status(self._record).state

    @cached_property
    def finals(self) -> tuple[TrainedAdapter, ...]:
        """The settings that were retrained with new seeds, least mean dev loss first; those not ranked come last."""
        return () if self._results is None else tuple(self._final(f) for f in self._results.finalists)

    @cached_property
    def best(self) -> TrainedAdapter | None:
        """The ranked final with the least mean dev loss, or best on the task `finals.task`; None: nothing is ranked."""
        found = () if self._results is None else self._results.finalists
        return next((self._final(f) for f in found if f.winner), None)

    @cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The ranked finals by name, best first, in groups that cannot be told apart.

        A setting begins a new group where it is told from the first of the group before: by their difference over
        seeds, paired by example, corrected for all pairs (Holm), on the test part where it was opened, else on dev.
        """
        found = () if self._results is None else self._results.groups
        return tuple(tuple(final.name for final in group) for group in found)

    @property
    def findings(self) -> str:
        """The main findings so far in English, a line each; all of them, with their numbers, are `evidence`."""
        return self.findings_in("en")

    def findings_in(self, language: str) -> str:
        """Returns the main findings so far, a line each, every number with its interval and its seeds.

        Args:
            language: ``en`` or ``zh``.

        Raises:
            ConfigError: when it is another.
        """
        if language not in LANGUAGES:
            raise ConfigError(f"unknown language {language!r}", remedy=f"give one of {', '.join(LANGUAGES)}")
        if not self.evidence:
            return say("nothing_begun")[language]
        return "\n".join(f"- {sentence}" for sentence in texts(self.evidence, language))

    @cached_property
    def evidence(self) -> tuple[Finding, ...]:
        """All findings so far, each with its text, its numbers and the trials behind it; none before a trial began."""
        record = self._record
        if self._results is None or record.examples is None:
            return ()
        return find(record.config, record.state, record.examples, self._results, costs(self.folder))

    def trials_dataframe(self) -> pandas.DataFrame:
        """Returns a row a trial, in the columns of ``results.csv``; losses in nats a supervised token."""
        import pandas

        rows = () if self._results is None else self._results.rows
        return pandas.DataFrame([flat(row) for row in rows], columns=list(columns()))

    def report(self, path: str | Path | None = None, lang: str = "en") -> WrittenReport:
        """Writes the study's page and returns it: a notebook shows it, elsewhere its `path` is what to open.

        Args:
            path: of the file; None: ``report.html`` in the study's folder (of Chinese ``report.zh.html``).
            lang: ``en`` or ``zh``.

        Raises:
            ConfigError: when the language is another.
            OutputError: when the file cannot be written.
        """
        from peft_study.report.view import study_view
        from peft_study.report.writing import write_page

        return WrittenReport(
            write_page([study_view(self._record, self._results)], lang, None if path is None else Path(path))
        )

    def adapters(self) -> dict[str, Path]:
        """Returns the folders of the finals' adapters by the names of their settings, best first.

        Without finals they are those of the best trial of each method. One that is not there is left out, with a
        warning.

        Raises:
            OutputError: when there is none.
        """
        wanted = {final.name: final.adapter_path for final in self.finals} or self._best_trials()
        found = {name: folder for name, folder in wanted.items() if folder.is_dir()}
        for name in wanted.keys() - found.keys():
            warnings.warn(f"{name} is left out: it has no adapter, or none yet", stacklevel=2)
        if not found:
            remedy = "let the study finish, or keep its adapters"
            raise OutputError("holds no adapter of a finished trial", where=str(self.folder), remedy=remedy)
        return found

    def evaluate(
        self,
        tasks: str | Sequence[str],
        *,
        output: str | Path | None = None,
        verbose: bool = True,
        device: str = "auto",
        **settings: Any,
    ) -> EvaluationResult:
        """Asks the study's finals and their base tasks, side by side, or goes on where an earlier call was stopped.

        Args:
            tasks: ``NAME=FILE`` of rows, or a task file (docs/evaluation.md).
            output: folder of every output; None: ``evaluation`` in the study's folder.
            verbose: print lines of progress.
            device: of a base that is loaded.
            settings: of `EvaluationConfig`: ``limit``, ``examples``, ``shots``, ``system_prompt``.

        Raises:
            UserError: of many kinds, each one line.
        """
        from peft_study.evaluation.evaluate import evaluate
        from peft_study.training.session import unheard

        config = validate(EvaluationConfig, {"tasks": tasks, **settings}, where="evaluate")
        folder = self.folder / EVALUATION if output is None else Path(output)
        return evaluate(
            self.adapters(),
            config,
            folder,
            _printed if verbose else unheard,
            device=device,
            dtype=self.config.model.dtype,
            in_memory=self.in_memory,
        )

    def _best_trials(self) -> dict[str, Path]:
        """Returns the adapters of the best finished trial of each method."""
        best = best_of_search(self._record.state, self.config.searched).values()
        return {setting_name(t.method, t.number): self._record.folder.trial(t.name).adapter for t in best}

    def __repr__(self) -> str:
        best = "nothing is ranked" if self.best is None else f"best: {self.best.name}, dev loss {self.best.dev}"
        return f"StudyResult({str(self.folder)!r}, {self.state}, {len(self._record.state.trials)} trials, {best})"

    @cached_property
    def _results(self) -> Results | None:
        record = self._record
        if record.examples is None:
            return None
        return collect(record.config, record.state, record.examples, record.folder)

    def _final(self, final: Finalist) -> TrainedAdapter:
        trials = self._record.state.finals_of(final.method, final.number)
        seeds = sorted((trial for trial in trials if trial.last is not None), key=value_of) or trials
        name = seeds[0].name if seeds else final.name
        return TrainedAdapter(
            final.name,
            final.method,
            final.settings,
            self._record.folder.trial(name).adapter,
            final.dev,
            final.test_minus_base,
            final.test,
            self.in_memory,
        )


def _printed(line: str, share: float | None = None) -> None:
    """Prints a line of progress, and of work that takes time its beginning."""
    if not share:
        print(line)


def open_study(path: str | Path | None = None) -> StudyResult:
    """Returns the result of a study, finished or not, also while another process runs it.

    Args:
        path: its folder; None: the current folder where it is a study, else the only one under ``runs/``.

    Raises:
        OutputError: when there is none, or its files are damaged.
    """
    return StudyResult(read_study(None if path is None else Path(path)))
