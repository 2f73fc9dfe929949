"""``peft-study merge | generate | chat``: parse, call, print."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from peft_study.cli.data import Overwrite

if TYPE_CHECKING:
    from peft_study.evaluation.generation import Answerer

_Adapter = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER", help="Folder of a trained adapter, or of the run that left it.", show_default=False
    ),
]
_BASE = "Base model, where it is not the one the adapter names."
_Base = Annotated[str | None, typer.Option("--base", help=_BASE)]
_Tokens = Annotated[int, typer.Option(min=1, help="Tokens an answer may have.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]


def merge(
    output: Annotated[Path, typer.Option("-o", "--output", "--output_dir", help="Folder for the merged model.")],
    adapter: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER", help="Folder of a LoRA adapter, or of its run.", show_default=False),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option("--lora_model_name_or_path", help="ADAPTER, as open-instruct's merge_lora.py calls it."),
    ] = None,
    base: Annotated[str | None, typer.Option("--base", "--base_model_name_or_path", help=_BASE)] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Of the weights written; float32 keeps what was learned, the others round part of it away."),
    ] = "float32",
    measure: Annotated[
        bool, typer.Option(help="Measure base, adapter and merged model on the run's held-out rows.")
    ] = True,
    device: Annotated[str, typer.Option(help="That measures: auto, cpu, cuda or mps.")] = "auto",
    qlora: Annotated[bool, typer.Option("--qlora", hidden=True)] = False,
    save_tokenizer: Annotated[bool, typer.Option("--save_tokenizer", hidden=True)] = False,
) -> None:
    """Write the base model with a LoRA adapter merged into its weights.

    Takes the arguments of open-instruct's merge_lora.py too. Of these, --qlora and --save_tokenizer change nothing: a
    base that was 4-bit in training is dequantised, and the tokenizer is written, in any case.
    """
    from peft_study.display.terminal import LiveDisplay, echo, quiet_libraries
    from peft_study.errors import ConfigError
    from peft_study.storage.files import refuse_unwritable
    from peft_study.training.merge import merge as merge_adapter

    if (adapter is None) == (lora is None):
        what = (
            "no adapter is given" if lora is None else "the adapter is given twice: ADAPTER, --lora_model_name_or_path"
        )
        raise ConfigError(what, remedy="write `peft-study merge ADAPTER -o FOLDER`")
    quiet_libraries()
    refuse_unwritable(output, folder=True)
    found = _folder(adapter or [str(lora)])
    with LiveDisplay() as display:
        losses = merge_adapter(found, output, display.say, base=base, dtype=dtype, measure=measure, device=device)
    if losses is not None:
        above = losses.above
        echo(
            f"held-out loss: base {losses.base:.4f}, adapter {losses.adapter:.4f}, merged {losses.merged:.4f}; "
            f"merged minus adapter {above.value:+.4f} [{above.low:+.4f}, {above.high:+.4f}] "
            f"(95 % over {losses.examples} examples)"
        )
        if losses.lost is not None:
            remedy = "use the adapter on its base" if dtype == "float32" else "merge again with --dtype float32"
            echo(f"WARNING: the merge lost {losses.lost:.0%} of what the adapter had learned; {remedy}", err=True)
    echo(f"merged model -> {output}")


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
    overwrite: Overwrite = False,
) -> None:
    """Answer every prompt of a file with a trained adapter, greedily."""
    import json

    from peft_study.display.terminal import echo, progress, quiet_libraries
    from peft_study.evaluation.generation import read_prompts, write_answers
    from peft_study.storage.files import refuse_existing, refuse_unwritable

    quiet_libraries()
    found = _folder(adapter)
    questions = read_prompts(prompts)
    if output is not None:
        refuse_existing(output, overwrite=overwrite, sources=questions.files)
        refuse_unwritable(output)
    answerer = _loaded(found, base, device)
    rows = ({**row, "answer": answerer.answer(row["prompt"], max_new_tokens)} for row in questions.rows)
    if output is not None:
        with progress("answering") as on_progress:
            count = len(questions.rows)
            write_answers(_counted(rows, lambda done: on_progress(done, done / count)), output)
        echo(f"{count} answers -> {output}")
    else:
        for row in rows:
            typer.echo(json.dumps(row, ensure_ascii=False))


def chat(adapter: _Adapter, base: _Base = None, max_new_tokens: _Tokens = 256, device: _Device = "auto") -> None:
    """Talk to a trained adapter; an empty line, Ctrl-D or Ctrl-C ends, and Ctrl-C in an answer ends the answer."""
    from peft_study.display.terminal import quiet_libraries

    quiet_libraries()
    answerer = _loaded(_folder(adapter), base, device)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("you: ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo("")
            return
        if not line:
            return
        messages.append({"role": "user", "content": line})
        answer = _answered(answerer, messages, max_new_tokens)
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:
            messages.pop()  # as if it had not been asked: templates refuse an empty turn


def _answered(answerer: Answerer, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """Prints an answer while it is made, and returns it; Ctrl-C ends it there."""
    said: list[str] = []

    def stream(text: str) -> None:
        said.append(text)
        typer.echo(text, nl=False)

    typer.echo("adapter: ", nl=False)
    try:
        return answerer.answer(messages, max_new_tokens, stream=stream)
    except KeyboardInterrupt:
        typer.echo(" [stopped]", nl=False)
        return "".join(said)
    finally:
        typer.echo("")


def _loaded(adapter: Path, base: str | None, device: str) -> Answerer:
    """Returns an adapter on its base, ready to answer."""
    from peft_study.display.terminal import LiveDisplay
    from peft_study.evaluation.generation import Answerer

    with LiveDisplay(err=True) as display:
        display.working(f"loading {adapter}", 0.0)
        return Answerer.load(adapter, base=base, device=device)


def _counted(rows: Iterable[dict[str, Any]], heard: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Yields rows, and tells how many there were."""
    for number, row in enumerate(rows, start=1):
        yield row
        heard(number)


def _folder(words: list[str]) -> Path:
    """Returns the folder of the adapter that is meant; several words are a path with spaces that was not quoted."""
    import shlex

    from peft_study.errors import ConfigError
    from peft_study.evaluation.generation import find_adapter

    path = Path(" ".join(words))
    if len(words) > 1:
        remedy = f"quote it: {shlex.quote(str(path))}" if path.exists() else "quote a path that has spaces"
        raise ConfigError(f"ADAPTER is one word, but {len(words)} are given: {path}", remedy=remedy)
    return find_adapter(path)
