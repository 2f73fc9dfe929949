"""``peft-study evaluate``: parse, call, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from peft_study.report.study_result import StudyResult

_Tasks = Annotated[
    list[str],
    typer.Option("--tasks", metavar="NAME=FILE", help="A task and its rows, a task file (.yaml), or lm_eval:TASK."),
]
_What = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="ADAPTER|STUDY",
        help="Adapters of one base, runs that left them, models trained as a whole; or a study: all its finals.",
    ),
]
_Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Folder for every output.", show_default="evaluation, or STUDY/evaluation"),
]
_Limit = Annotated[int | None, typer.Option(min=1, help="Questions of each task, evenly over its file.")]
_Examples = Annotated[
    list[str] | None,
    typer.Option("--examples", metavar="NAME=FILE", help="Worked examples of a task, for a baseline of the base."),
]
_Shots = Annotated[int, typer.Option(min=0, help="How many of them.")]
_SystemPrompt = Annotated[
    str | None, typer.Option("--system-prompt", help="Another baseline: the base with this system prompt.")
]
_Chat = Annotated[bool, typer.Option("--lm-eval-chat", help="Put questions of lm_eval:TASK into the chat template.")]
_Base = Annotated[str | None, typer.Option("--base", help="Base model, where it is not the one they name.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
_Dtype = Annotated[
    str | None,
    typer.Option(help="Of the base: auto, bfloat16, float16 or float32.", show_default="auto, or the study's"),
]
_Rescore = Annotated[bool, typer.Option(help="Judge the outputs that are there again; loads no model.")]


def evaluate(
    tasks: _Tasks,
    what: _What = None,
    output: _Output = None,
    limit: _Limit = None,
    examples: _Examples = None,
    shots: _Shots = 5,
    system_prompt: _SystemPrompt = None,
    lm_eval_chat: _Chat = False,
    base: _Base = None,
    device: _Device = "auto",
    dtype: _Dtype = None,
    rescore: _Rescore = False,
) -> None:
    """Measure what adapters can do on tasks, side by side on their base and beside it.

    The same command goes on where it was killed. Every output stands in FOLDER/TASK.parquet with its score.
    """
    from peft_study.config import EvaluationConfig, validate
    from peft_study.display.evaluation import print_evaluation
    from peft_study.display.terminal import LiveDisplay, echo, quiet_libraries
    from peft_study.errors import ConfigError
    from peft_study.evaluation.evaluate import Evaluation, evaluate
    from peft_study.storage.run_dir import RunFolder

    quiet_libraries()
    values = {"tasks": tasks, "examples": examples or [], "shots": shots, "system_prompt": system_prompt}
    config = validate(EvaluationConfig, {**values, "limit": limit, "lm_eval_chat": lm_eval_chat}, where="evaluate")
    if rescore:
        folder = output or _folder(what or [])
        with RunFolder(folder).locked():
            found = Evaluation(folder, config).result()
    else:
        if not what:
            raise ConfigError("no adapter is given", remedy="write `peft-study evaluate ADAPTER --tasks NAME=FILE`")
        folders, studies = _folders(what)
        dtype = dtype or (studies[0].config.model.dtype if studies else "auto")
        with LiveDisplay() as display:
            found = evaluate(
                folders, config, output or _folder(what), display.say, base=base, device=device, dtype=dtype
            )
    print_evaluation(found)
    echo(f"every output with its score: {found.folder}")


def _folder(what: Sequence[Path]) -> Path:
    """Returns where outputs go: into a study, else to ``evaluation``."""
    from peft_study.evaluation.scores import EVALUATION
    from peft_study.report.study_reader import is_study

    return what[0] / EVALUATION if len(what) == 1 and is_study(what[0]) else Path(EVALUATION)


def _folders(what: Sequence[Path]) -> tuple[dict[str, Path], list[StudyResult]]:
    """Returns adapters and whole models by name, of a study those of its finals by their settings; and the studies."""
    from peft_study.evaluation.generation import find_adapter
    from peft_study.evaluation.systems import short_names
    from peft_study.report.study_reader import is_study
    from peft_study.report.study_result import open_study

    alone = [find_adapter(path) for path in what if not is_study(path)]
    found = dict(zip(short_names(alone), alone, strict=True)) if alone else {}
    studies = [open_study(path) for path in what if is_study(path)]
    for study, title in zip(studies, short_names([study.folder for study in studies]) if studies else (), strict=True):
        finals = study.adapters()
        qualified = len(studies) > 1 or bool(finals.keys() & found.keys())
        found |= {f"{title}/{name}" if qualified else name: folder for name, folder in finals.items()}
    return found, studies
