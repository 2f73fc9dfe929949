"""``peft-study evaluate``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft_study.evaluation.evaluate import Score


def evaluate(
    tasks: Annotated[
        list[str],
        typer.Option(
            "--tasks", metavar="NAME=FILE", help="A task and its file of rows, or a task file (.yaml); may be repeated."
        ),
    ],
    adapters: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="ADAPTER", help="Folders of trained adapters of one base, or of the runs that left them."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for every output.")] = Path("evaluation"),
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task, evenly over its file.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="Base model, where it is not the one they name.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the base: auto, bfloat16, float16 or float32.")] = "auto",
    rescore: Annotated[bool, typer.Option(help="Judge the outputs that are there again; loads no model.")] = False,
) -> None:
    """Measure what adapters can do on tasks, side by side on their base and beside it.

    The same command goes on where it was killed. Every output stands in FOLDER/TASK.parquet with its score.
    """
    from peft_study.display.terminal import LiveDisplay, echo, quiet_libraries
    from peft_study.errors import ConfigError
    from peft_study.evaluation.evaluate import Evaluation, load_systems
    from peft_study.evaluation.tasks import find_task
    from peft_study.model.precision import choose
    from peft_study.storage.files import refuse_unwritable
    from peft_study.training.merge import find_adapter

    quiet_libraries()
    chosen = [find_task(spec) for spec in tasks]
    if not adapters and not rescore:
        raise ConfigError("no adapter is given", remedy="write `peft-study evaluate ADAPTER --tasks NAME=FILE`")
    refuse_unwritable(output, folder=True)
    evaluation = Evaluation(output, chosen, limit)
    if rescore:
        evaluation.rescore()
    else:
        folders = [find_adapter(path) for path in adapters or ()]
        with LiveDisplay() as display:
            display.working("loading the base", 0.0)
            loaded, systems = load_systems(folders, base, choose(device, dtype))
            evaluation.run(loaded, systems, display.say)
    _print(evaluation.scores())
    echo(f"every output with its score: {output}")


def _print(scores: Sequence[Score]) -> None:
    from peft_study.display.terminal import console, table

    columns = ("task", "system", "right", "accuracy", "95 %", "against the base", "p", "by length")
    shown = table(columns, left=("task", "system"))
    for score in scores:
        found, by_length = score.accuracy, score.normalised
        shown.add_row(
            score.task,
            score.system,
            f"{score.right} of {score.judged}" + (f" ({score.unjudged} without an answer)" if score.unjudged else ""),
            "" if found is None else f"{found.value:.1%}",
            "" if found is None else f"{found.low:.1%} - {found.high:.1%}",
            "" if score.minus_base is None else f"{score.minus_base:+.1%}",
            "" if score.p_value is None else f"{score.p_value:.2g}",
            "" if by_length is None else f"{by_length.value:.1%}",
        )
    console().print(shown)
