"""accelerate's launch arguments: which tokens are whose, and what they do to the numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_study.compat.arguments import ExtraArguments, FinetuneArguments
from peft_study.compat.command_line import LaunchArguments, parse
from peft_study.engine.processes import refuse_several_processes
from peft_study.errors import ConfigError

USERS = [
    *("--mixed_precision", "bf16", "--num_machines", "1", "--num_processes", "2", "--main_process_port", "0"),
    *("--use_deepspeed", "--deepspeed_config_file", "nowhere.conf", "--deepspeed_multinode_launcher", "standard"),
    "open_instruct/finetune_peft.py",
    *("--use_lora", "--model_name_or_path", "m", "--train_file", "t.json"),
]


def test_the_users_command_line_is_taken_apart() -> None:
    command = parse(USERS)
    assert command.given == {"use_lora", "model_name_or_path", "train_file"}
    assert command.launch.script == "open_instruct/finetune_peft.py"
    assert command.launch.values == {
        "mixed_precision": "bf16",
        "num_machines": 1,
        "num_processes": 2,
        "main_process_port": 0,
        "use_deepspeed": True,
        "deepspeed_config_file": "nowhere.conf",
        "deepspeed_multinode_launcher": "standard",
    }


def test_what_is_ignored_is_named_in_one_line_and_what_counts_is_not() -> None:
    (line,) = parse(USERS).launch.notes()
    for name in ("--num_machines", "--main_process_port", "--deepspeed_multinode_launcher", "finetune_peft.py"):
        assert name in line
    assert "--num_processes" not in line
    assert "--mixed_precision" not in line
    assert "\n" not in line
    assert LaunchArguments({"num_processes": 2, "mixed_precision": "bf16"}).notes() == []
    assert "--mixed_precision fp8" in LaunchArguments({"mixed_precision": "fp8"}).notes()[0]


def test_secrets_of_the_launch_arguments_are_not_printed() -> None:
    (line,) = parse(["--aws_secret_access_key", "hush"]).launch.notes()
    assert "hush" not in line


ACTIONS = [
    action for action in launch_command_parser()._actions if action.option_strings and action.dest not in ("help",)
]


def test_the_only_shared_name_is_known_and_is_ours() -> None:
    """A new accelerate that brings another clash fails here, so that somebody decides whose it is."""
    ours = {item.name for kind in (FinetuneArguments, ExtraArguments) for item in dataclasses.fields(kind)}
    theirs = {name.lstrip("-").replace("-", "_") for action in ACTIONS for name in action.option_strings}
    assert ours & theirs == {"gradient_accumulation_steps"}
    command = parse(["--gradient_accumulation_steps", "4", "--num_processes=3"])
    assert command.arguments.gradient_accumulation_steps == 4
    assert command.launch.values == {"num_processes": 3}
    assert command.launch.effective_batch_size(2, 4) == 24


def test_every_launch_option_is_accepted_with_its_number_of_values() -> None:
    for action in ACTIONS:
        if action.dest in ("gradient_accumulation_steps", "config_file"):
            continue
        kind = getattr(action.type, "__name__", "")
        value = str(action.choices[0]) if action.choices else {"int": "3", "float": "0.5"}.get(kind, "true")
        for name in action.option_strings:
            words = [name] if action.nargs == 0 else [name, value]
            command = parse([*words, "--seed", "5", "--use_lora"])
            assert command.arguments.seed == 5, name
            assert command.given == {"seed", "use_lora"}, name
            assert action.dest in command.launch.values, name


LAUNCH: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("--num_processes", "2"), {"num_processes": 2}),
    (("--multi_gpu",), {"multi_gpu": True}),
    (("--mixed-precision=bf16",), {"mixed_precision": "bf16"}),
    (("--main_process_ip", "a.py"), {"main_process_ip": "a.py"}),
]
OURS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("--use_lora",), {"use_lora": True}),
    (("--use_qlora", "False"), {"use_qlora": False}),
    (("--no_fused_optimizer",), {"fused_optimizer": False}),
    (("--clip_grad_norm", "-1"), {"clip_grad_norm": -1}),
    (("--weight_decay=0.",), {"weight_decay": 0}),
    (("--dataset_mixer_list", "a.py", "1.0"), {"dataset_mixer_list": ["a.py", "1.0"]}),
    (("--report_to", "wandb", "tensorboard"), {"report_to": ["wandb", "tensorboard"]}),
    (("--train-file", "x.yaml"), {"train_file": "x.yaml"}),
]
ITEMS = st.lists(st.sampled_from([*LAUNCH, *OURS]), max_size=8)


@settings(max_examples=60, deadline=None)
@given(items=ITEMS)
def test_every_word_goes_to_exactly_one_side_in_any_order(items: list[tuple[tuple[str, ...], dict[str, Any]]]) -> None:
    command = parse([word for words, _ in items for word in words])
    assert command.launch.script is None
    assert command.launch.values == {name: v for item in items if item in LAUNCH for name, v in item[1].items()}
    ours = {name: value for item in items if item in OURS for name, value in item[1].items()}
    assert command.given == set(ours)
    assert {name: getattr(command.arguments, name) for name in ours} == ours


@settings(max_examples=20, deadline=None)
@given(items=ITEMS, place=st.integers(0, 8))
def test_the_script_may_stand_between_any_two_arguments(
    items: list[tuple[tuple[str, ...], dict[str, Any]]], place: int
) -> None:
    groups = [list(words) for words, _ in items]
    before = groups[:place]
    if before and before[-1][0] in ("--dataset_mixer_list", "--report_to"):
        before.append(["--multi_gpu"])  # an option with any number of values would take the path for one
    argv = [word for words in [*before, ["finetune.py"], *groups[place:]] for word in words]
    assert parse(argv).launch.script == "finetune.py"


@pytest.mark.parametrize(
    ("said", "dtype"),
    [("bf16", "auto"), ("fp16", "float16"), ("no", "auto"), ("fp8", None)],
)
def test_mixed_precision_is_a_dtype(said: str, dtype: str | None) -> None:
    assert parse(["--mixed_precision", said]).launch.dtype == dtype


def test_without_mixed_precision_nothing_is_asked() -> None:
    assert parse([]).launch.dtype is None


@pytest.mark.parametrize(
    ("content", "clip"),
    [('{"gradient_clipping": 0.5}', 0.5), ('{"gradient_clipping": "auto"}', 1.0), ("{}", 1.0), ("no json", 1.0),
     ('{"gradient_clipping": 0}', None), ("[1]", 1.0)],
)  # fmt: skip
def test_deepspeed_clips_as_its_file_says(tmp_path: Path, content: str, clip: float | None) -> None:
    file = tmp_path / "ds.json"
    file.write_text(content)
    assert parse(["--use_deepspeed", "--deepspeed_config_file", str(file)]).launch.clip_norm == clip


def test_clipping_without_deepspeed_and_with_its_flag() -> None:
    assert parse(["--gradient_clipping", "0.3"]).launch.clip_norm is None, "only DeepSpeed reads it"
    assert parse(["--use_deepspeed", "--gradient_clipping", "0.3"]).launch.clip_norm == 0.3
    assert parse(["--use_deepspeed"]).launch.clip_norm == 1.0
    assert parse(["--deepspeed_config_file", "nowhere"]).launch.clip_norm == 1.0


def test_accelerates_own_configuration_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    values: dict[str, Any] = {
        "distributed_type": "DEEPSPEED",
        "mixed_precision": "fp16",
        "num_processes": 4,
        "deepspeed_config": {"gradient_clipping": 0.7},
    }
    file.write_text(json.dumps(values))
    launch = parse(["--config_file", str(file)]).launch
    assert (launch.processes, launch.dtype, launch.clip_norm) == (4, "float16", 0.7)
    launch = parse(["--config_file", str(file), "--num_processes", "2", "--mixed_precision", "bf16"]).launch
    assert (launch.processes, launch.dtype) == (2, "auto")
    file.write_text(json.dumps({"num_processes": "many"}))
    with pytest.raises(ConfigError, match="--num_processes: 'many' is not a whole number above 0"):
        parse(["--config_file", str(file)])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--num_processes 0", "--num_processes: 0 is not a whole number above 0"),
        ("--num_processes two", "--num_processes: 'two' is not a whole number"),
        ("--num_processes", "--num_processes: needs a value"),
        ("--main_process_ip --use_lora", "--main_process_ip: needs a value"),
        ("--mixed_precision bf61", "--mixed_precision: unknown value 'bf61'; did you mean 'bf16'?"),
        ("--num_proceses 2", "unknown argument '--num_proceses'; did you mean '--num_processes'?"),
        ("--num_proc 2", "unknown argument '--num_proc'"),
        ("--xyzzy 2", "unknown argument '--xyzzy'; `peft-study finetune --help` lists them"),
        ("stray", "unexpected value 'stray'"),
        ("a.py b.py", "unexpected value 'b.py'"),
        ("--config_file nowhere.yaml", "--config_file, nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_give_one_line(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(argv.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_module_name_is_a_script() -> None:
    assert parse(["-m", "open_instruct.finetune", "--seed", "1"]).launch.script == "open_instruct.finetune"


def test_started_processes_count_and_those_asked_for_otherwise() -> None:
    asked = parse(["--num_processes", "4"], {"WORLD_SIZE": "1"}).launch
    assert (asked.processes, asked.started, asked.effective_batch_size(2, 3)) == (4, 1, 24)
    started = parse([], {"WORLD_SIZE": "2"}).launch
    assert (started.processes, started.started, started.effective_batch_size(2, 3)) == (2, 2, 12)
    assert parse([], {"WORLD_SIZE": ""}).launch.processes == 1
    with pytest.raises(ConfigError, match="4 are asked for, but the launcher started 2 processes"):
        parse(["--num_processes", "4"], {"WORLD_SIZE": "2"})


def test_what_a_real_launcher_was_told_counts_and_the_command_line_wins() -> None:
    told = {
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "ACCELERATE_USE_CPU": "True",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": "none",
    }
    launch = parse([], told).launch
    assert (launch.dtype, launch.values["cpu"], launch.clip_norm) == ("float16", True, 0.5)
    assert parse(["--mixed_precision", "bf16"], told).launch.dtype == "auto"
    assert parse([], {"ACCELERATE_MIXED_PRECISION": "no"}).launch.dtype is None


def test_a_study_is_one_process() -> None:
    for fine in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}):
        refuse_several_processes(fine)
    with pytest.raises(ConfigError, match="started as one of 4 processes"):
        refuse_several_processes({"WORLD_SIZE": "4"})
