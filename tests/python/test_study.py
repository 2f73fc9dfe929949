"""`Study` and `finetune` from Python: the same as the command line, with models, rows and callbacks in memory."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import peft_study
from command_line import CommandLine, conversation
from peft_study import Callback, Interrupted, LiveTrial, LoRA, PrefixTuning, PromptTuning, Study
from peft_study.errors import ConfigError, ModelError, OutputError
from tiny_tokenizer import tiny_tokenizer

SECTIONS: dict[str, Any] = {
    "trials": 2, "steps": 4, "search": {"pruner": "none"}, "finals": {"best": 1, "seeds": 2},
}  # fmt: skip
ROWS = [conversation(i) for i in range(60)]


@pytest.fixture
def model(tiny_model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


def quick(model: Any, data: Any, output: Path, **changed: Any) -> Study:
    """Returns a study of LoRA that takes a second."""
    rows = {"train": data, "held_out": 10, "test": 10}
    methods = changed.pop("methods", [LoRA(rank=2)])
    return Study(model, rows, methods, output=output, **{**SECTIONS, **changed})


def losses(result: peft_study.StudyResult) -> dict[str, float]:
    """Returns each trial's dev loss."""
    found: dict[str, float] = result.trials_dataframe().set_index("name").dev.to_dict()
    return found


def test_a_model_in_memory_gives_the_numbers_of_its_folder_and_comes_back_as_it_was(
    tiny_model_folder: Path, tiny_data: Path, model: Any, tmp_path: Path
) -> None:
    model.train()
    next(model.parameters()).requires_grad_(False)
    ids = torch.arange(1, 9)[None]
    before = model(ids).logits.detach()
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    forwards = [module.forward.__qualname__ for module in model.modules()]
    named = {"name": str(tiny_model_folder), "dtype": "float32"}
    methods = [LoRA(rank=2), PromptTuning(tokens=3), PrefixTuning(tokens=3)]
    ours = quick(model, str(tiny_data), tmp_path / "memory", methods=methods).run(verbose=False)
    theirs = quick(named, str(tiny_data), tmp_path / "folder", methods=methods).run(verbose=False)
    assert losses(ours) == losses(theirs)
    assert torch.equal(model(ids).logits, before)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [module.forward.__qualname__ for module in model.modules()] == forwards
    assert all(module.training for module in model.modules())
    assert not hasattr(model, "peft_config")
    assert ours.best is not None
    adapted = ours.best.load()
    assert isinstance(adapted, peft.PeftModel)
    assert not adapted.training


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_hooks_recomputation_and_dropout_of_a_model_in_memory_are_those_of_before(kind: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = (
        LlamaConfig(**size, intermediate_size=16, num_key_value_heads=1, attention_dropout=0.2)
        if kind == "llama"
        else GPT2Config(**size, bos_token_id=1, eos_token_id=2, resid_pdrop=0.3)
    )
    model = AutoModelForCausalLM.from_config(config).train()
    model.gradient_checkpointing_enable()

    def attributes() -> list[dict[str, Any]]:
        return [{**vars(module), "_forward_hooks": list(module._forward_hooks)} for module in model.modules()]

    before = attributes()
    quick(model, ROWS, tmp_path, tokenizer=tokenizer).run(verbose=False)
    assert attributes() == before


def test_gradients_that_the_caller_switched_off_are_recorded(model: Any, tmp_path: Path) -> None:
    with torch.inference_mode():
        inside = quick(model, ROWS, tmp_path / "inside").run(verbose=False)
    assert losses(inside) == losses(quick(model, ROWS, tmp_path / "outside").run(verbose=False))


def test_an_adapter_is_not_put_on_a_base_that_carries_another(model: Any, tmp_path: Path) -> None:
    study = quick(model, ROWS, tmp_path)
    best = study.run(verbose=False).best
    assert best is not None
    adapted = best.load()
    for again in (best.load, lambda: study.run(verbose=False)):
        with pytest.raises(ModelError, match=r"carries an adapter; take it off \(unload"):
            again()
    assert adapted.unload() is model
    best.load()


def test_the_whole_model_of_full_is_loaded(tiny_model_folder: Path, tmp_path: Path) -> None:
    best = quick(str(tiny_model_folder), ROWS, tmp_path, methods=["full"]).run(verbose=False).best
    assert best is not None
    trained, base = best.load(), AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert not torch.equal(trained.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert best.load_tokenizer().chat_template


def test_rows_in_memory_give_the_numbers_of_a_file(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    forms = {
        "file": str(tiny_data),
        "rows": ROWS,
        "dataset": datasets.Dataset.from_list(ROWS),
        "frame": pandas.DataFrame(ROWS),
        "conversations": [row["messages"] for row in ROWS],
    }
    found = {}
    for name, data in forms.items():
        # rows without a source are of one stratum: drawn alike only where no source counts
        study = Study(
            {"name": str(tiny_model_folder), "dtype": "float32"},
            {"train": data, "held_out": 10, "test": 10, "stratify": False},
            [LoRA(rank=2)],
            output=tmp_path / name,
            **SECTIONS,
        )
        found[name] = losses(study.run(verbose=False))
    assert all(result == found["file"] for result in found.values())
    kept = (tmp_path / "conversations/data/train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == [{"messages": row["messages"]} for row in ROWS]


def test_rows_in_memory_replace_no_file_of_the_users(tiny_model_folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "out/data/train.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text("my rows\n")
    for overwrite in (False, True):
        study = Study(str(tiny_model_folder), ROWS, [LoRA(rank=2)], output=tmp_path / "out", **SECTIONS)
        with pytest.raises(OutputError, match=r"train\.jsonl"):
            study.run(verbose=False, overwrite=overwrite)
        assert own.read_text() == "my rows\n"


def test_held_out_rows_and_the_splits_of_a_datasetdict_are_taken(tiny_model_folder: Path, tmp_path: Path) -> None:
    parts = {"train": ROWS[:40], "validation": ROWS[40:50], "test": ROWS[50:]}
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    result = Study(str(tiny_model_folder), splits, [LoRA(rank=2)], output=tmp_path / "splits", **SECTIONS).run(
        verbose=False
    )
    data = json.loads((result.folder / "record.json").read_text())["data"]
    assert (data["train_rows"], data["held_out_rows"], data["test_rows"]) == (40, 10, 10)
    with pytest.raises(ConfigError, match="has splits train, dev; give some of train, validation, test"):
        Study("m", datasets.DatasetDict({"train": splits["train"], "dev": splits["test"]}))


def test_a_resume_refuses_other_rows_and_other_weights(model: Any, tmp_path: Path) -> None:
    out = tmp_path / "study"
    first = quick(model, ROWS, out).run(verbose=False)
    assert losses(quick(model, ROWS, out).run(verbose=False)) == losses(first)
    with pytest.raises(OutputError, match="the rows in memory are not those that this study began with"):
        quick(model, ROWS[:-1], out).run(verbose=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.01)
    with pytest.raises(OutputError, match="the base model's weights changed"):
        quick(model, ROWS, out).run(verbose=False)
    quick(model, ROWS[:-1], out).run(verbose=False, overwrite=True)
    assert len((out / "data/train.jsonl").read_text().splitlines()) == len(ROWS) - 1


@pytest.mark.parametrize("section", [{"workers": 2}, {"ray": "auto"}])
def test_a_model_in_memory_works_in_one_process(model: Any, tmp_path: Path, section: dict[str, Any]) -> None:
    (where,) = section
    with pytest.raises(ConfigError) as error:
        quick(model, ROWS, tmp_path / "study", **section).run(verbose=False)
    said = f"{where}: a model in memory is trained in one process; leave it out, or save the model and give its folder"
    assert str(error.value) == said


class Heard(Callback):
    """Notes what it hears, and does what it is told at a trial's step."""

    def __init__(self, **acts: Callable[[LiveTrial], None]) -> None:
        self.events: list[tuple[str, str, int]] = []
        self.results: list[peft_study.StudyResult] = []
        self._acts = acts

    def on_trial_begin(self, trial: LiveTrial) -> None:
        self.events.append(("begin", trial.name, trial.step))

    def on_step(self, trial: LiveTrial) -> None:
        self.events.append(("step", trial.name, trial.step))
        if trial.step == 2 and (act := self._acts.get(trial.name.replace("-", "_"))) is not None:
            act(trial)

    def on_evaluate(self, trial: LiveTrial) -> None:
        assert trial.dev is not None
        self.events.append(("evaluate", trial.name, trial.step))

    def on_trial_end(self, trial: LiveTrial) -> None:
        self.events.append(("end", trial.name, trial.step))

    def on_study_end(self, result: peft_study.StudyResult) -> None:
        self.results.append(result)


def test_a_callback_hears_every_trial_in_order(model: Any, tmp_path: Path) -> None:
    heard = Heard()
    result = quick(model, ROWS, tmp_path / "study").run(callbacks=[heard], verbose=False)
    names = {name for _, name, _ in heard.events}
    assert names == set(result.trials_dataframe()["name"])
    own = [(what, step) for what, name, step in heard.events if name == "lora-000"]
    assert own == [
        ("begin", 0), ("evaluate", 0), ("step", 1), ("step", 2), ("step", 3), ("step", 4), ("evaluate", 4), ("end", 4),
    ]  # fmt: skip
    assert [r.folder for r in heard.results] == [result.folder]


def test_a_callback_stops_a_trial_and_the_journal_says_why(model: Any, tmp_path: Path) -> None:
    heard = Heard(lora_000=lambda trial: trial.stop("seen enough"))
    result = quick(model, ROWS, tmp_path / "study").run(callbacks=[heard], verbose=False)
    rows = result.trials_dataframe().set_index("name")
    assert (rows.status["lora-000"], rows.reason["lora-000"]) == ("pruned", "stopped by a callback: seen enough")
    assert rows.steps["lora-000"] == 2
    assert result.state == "finished"
    assert result.best is not None
    assert result.best.name == "lora-001"
    journal = [json.loads(line) for line in (result.folder / "journal.jsonl").read_text().splitlines()]
    ended = next(event for event in journal if event["event"] == "ended" and event["name"] == "lora-000")
    assert ended["reason"] == "stopped by a callback: seen enough"


def test_a_callback_ends_the_study_with_what_there_is(model: Any, tmp_path: Path) -> None:
    heard = Heard(lora_001=lambda trial: trial.stop_study("lunch"))
    study = quick(model, ROWS, tmp_path / "study", slots=1)
    result = study.run(callbacks=[heard], verbose=False)
    rows = result.trials_dataframe().set_index("name")
    assert rows.status.to_dict() == {"none": "finished", "lora-000": "finished", "lora-001": "pruned"}
    assert (result.state, result.best, result.groups) == ("finished", None, ())
    assert "the study was ended before its plan was done: lunch" in result.findings
    assert losses(study.run(verbose=False)) == losses(result), "a study that was ended stays so"


def test_a_study_ended_between_its_finals_has_no_winner_of_fewer_seeds(model: Any, tmp_path: Path) -> None:
    acts = {"lora_000_seed_2": lambda trial: trial.stop_study(), "lora_001_seed_2": lambda trial: trial.stop_study()}
    result = quick(model, ROWS, tmp_path / "study", slots=1).run(callbacks=[Heard(**acts)], verbose=False)
    assert result.best is None
    assert len(result.finals) == 1
    assert result.groups == ()


def test_interrupting_is_a_ctrl_c_and_running_again_gives_the_same_numbers(model: Any, tmp_path: Path) -> None:
    whole = quick(model, ROWS, tmp_path / "whole").run(verbose=False)
    heard = Heard(lora_001=lambda _trial: signal.raise_signal(signal.SIGINT))
    study = quick(model, ROWS, tmp_path / "cut", slots=1)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="with a checkpoint"):
        study.run(callbacks=[heard], verbose=False)
    assert signal.getsignal(signal.SIGINT) is handler
    assert peft_study.open_study(tmp_path / "cut").state == "interrupted"
    assert losses(study.run(verbose=False)) == pytest.approx(losses(whole), rel=1e-5)


def test_finetune_is_the_command(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, model: Any
) -> None:
    words = ["--use_lora", "--lora_rank", 4, "--learning_rate", 1e-3, "--max_train_steps", 4, "--dtype", "float32"]
    words += ["--per_device_train_batch_size", 4, "--lr_scheduler_type", "linear", "--chat_template", "own"]
    where = ["--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--output_dir", tmp_path / "theirs"]
    cli("finetune", *where, *words, "--warmup_ratio", 0.03, "--weight_decay", 0.0, "--gradient_accumulation_steps", 1)
    ours = peft_study.finetune(
        model,
        {"train": str(tiny_data), "max_length": 512},
        LoRA(rank=4, alpha=16, dropout=0.1, learning_rate=1e-3),
        steps=4,
        training={"batch_size": 4, "clip_norm": None},
        output=tmp_path / "ours",
        verbose=False,
    )
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("theirs", "ours")]
    held_out = [[json.loads(line)["loss"] for line in run if '"held_out"' in line] for run in lines]
    assert len(held_out[0]) == len(held_out[1]) > 1
    assert ours.dev is not None
    assert held_out[1][-1] == ours.dev.value
    given = [json.loads((tmp_path / name / "config.resolved.json").read_text()) for name in ("theirs", "ours")]
    differ = {key for key in given[0]["training"] if given[0]["training"][key] != given[1]["training"][key]}
    assert differ <= {"seed", "data_seed", "epochs"}, differ


def test_a_recommended_file_is_a_run(
    cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    named = {"name": str(tiny_model_folder), "dtype": "float32"}
    spaces = [LoRA(rank=2), PromptTuning(tokens=3)]
    study = Study(
        named,
        {"train": str(tiny_data), "held_out": 10, "test": 10, "limit": 50},
        spaces,
        output=tmp_path / "study",
        training={"batch_size": 4},
        **SECTIONS,
    )
    result = study.run(verbose=False)
    assert result.best is not None
    files = {path.name for path in result.folder.glob("*.yaml")}
    other = {"lora": "prompt_tuning", "prompt_tuning": "lora"}[result.best.method]
    assert files == {"recommended.yaml", f"recommended-{other}.yaml"}
    text = (result.folder / "recommended.yaml").read_text()
    assert f"The best of 2 settings of {result.best.method.replace('_', ' ')}" in text
    assert "which found them at 4 steps. At 10 times the steps another rate may be better, by 0.04 nats" in text
    said = {finding.topic: finding.text["en"] for finding in result.evidence if finding.method == result.best.method}
    assert f"# - {said['final']}\n" in text
    assert f"# - {said['cost']}\n" in text
    assert "# - untouched base: dev loss " in text
    assert "# Steps: one pass over 50 rows is 13." in text
    assert "held_out: 10\n" in text
    ran = cli("finetune", result.folder / "recommended.yaml", "-o", tmp_path / "long").ok()
    assert "13" in ran.out
    resolved = json.loads((tmp_path / "long/config.resolved.json").read_text())
    assert resolved["training"]["steps"] == 13, "60 rows less 10 held out, in batches of 4; there is no test part"
    assert json.loads((tmp_path / "long/record.json").read_text())["data"]["train_rows"] == 50
    assert resolved["training"]["learning_rate"] == result.best.settings["learning_rate"]
    assert resolved["data"]["limit"] is None
    assert (
        cli("finetune", result.folder / "recommended.yaml", "--set", "method.rank=x", "-o", tmp_path / "bad").code == 2
    )
