"""``peft-study merge | generate | chat``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_Adapter = Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a trained adapter.", show_default=False)]
_Base = Annotated[str | None, typer.Option("--base", help="Base model, where it is not the one the adapter names.")]
_Tokens = Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command()(merge)
    app.command()(generate)
    app.command()(chat)


def merge(
    adapter: _Adapter,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the merged model.")],
    base: _Base = None,
) -> None:
    """Write the base model with a LoRA adapter merged into its weights."""
    from peft_study.cli.display import quiet_libraries
    from peft_study.data.atomic import refuse_unwritable
    from peft_study.evaluate.answers import merge as merge_adapter

    quiet_libraries()
    refuse_unwritable(output, folder=True)
    merge_adapter(adapter, output, base=base)
    typer.echo(f"merged model -> {output}")


def generate(
    adapter: _Adapter,
    prompts: Annotated[
        Path, typer.Option(help="File of prompts: any form `data convert` takes, or a line a prompt (.txt).")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="JSON lines to write; left out: printed.")
    ] = None,
    base: _Base = None,
    max_new_tokens: _Tokens = 256,
    device: _Device = "auto",
) -> None:
    """Answer every prompt of a file with a trained adapter, greedily."""
    import json

    from peft_study.cli.display import quiet_libraries
    from peft_study.data.atomic import refuse_unwritable
    from peft_study.evaluate.answers import Answerer, read_prompts, write_answers

    quiet_libraries()
    if output is not None:
        refuse_unwritable(output)
    questions = read_prompts(prompts)
    answerer = Answerer.load(adapter, base=base, device=device)
    rows = ({"prompt": messages, "answer": answerer.answer(messages, max_new_tokens)} for messages in questions)
    if output is not None:
        write_answers(rows, output)
        typer.echo(f"{len(questions)} answers -> {output}")
    else:
        for row in rows:
            typer.echo(json.dumps(row, ensure_ascii=False))


def chat(adapter: _Adapter, base: _Base = None, max_new_tokens: _Tokens = 256, device: _Device = "auto") -> None:
    """Talk to a trained adapter; an empty line or Ctrl-D ends."""
    from peft_study.cli.display import quiet_libraries
    from peft_study.evaluate.answers import Answerer

    quiet_libraries()
    answerer = Answerer.load(adapter, base=base, device=device)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        messages.append({"role": "user", "content": line})
        typer.echo("adapter: ", nl=False)
        answer = answerer.answer(messages, max_new_tokens, stream=lambda text: typer.echo(text, nl=False))
        typer.echo("")
        messages.append({"role": "assistant", "content": answer})
