"""One process writes to a folder at a time, whichever command it runs; what cannot be written is refused at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine, listing
from peft_study.errors import OutputError
from peft_study.storage.run_dir import RunFolder


@pytest.fixture
def flags(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> tuple[Any, ...]:
    """Returns a run of three steps."""
    return (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--max_train_steps", 3),
        *("--use_lora", "--dtype", "float32", "--output_dir", tmp_path / "out"),
    )


def in_use(line: str, folder: Path) -> None:
    assert f"{folder}: process {os.getpid()} on " in line
    assert "is writing to it; wait for it, stop it" in line


@pytest.mark.parametrize("overwrite", [(), ("--overwrite_output_dir",)], ids=["new", "overwritten"])
def test_finetune_is_refused_where_another_process_writes(
    cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, overwrite: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    if overwrite:
        cli(*flags).ok()
    with RunFolder(out).locked():
        before = listing(out)
        ran = cli(*flags, *overwrite)
        in_use(ran.error(), out)
        assert "loading" not in ran.out, "it is said before the model is loaded"
        assert listing(out) == before
    cli(*flags, *overwrite).ok()
    assert not (out / "owner.json").exists()


def test_of_two_processes_at_once_one_is_refused(flags: tuple[Any, ...], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peft_study", *map(str, flags), "--max_train_steps", "40"]
    started = [
        subprocess.Popen([*command, "--seed", seed], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in ("1", "2")
    ]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2], said
    lost = next(index for index, process in enumerate(started) if process.returncode == 2)
    (line,) = said[lost].splitlines()
    # the one that came later by more than a whole run finds the other's run
    assert f"process {started[1 - lost].pid} on " in line or "holds another run" in line
    assert RunFolder(tmp_path / "out").status() == ("finished", None)


def test_two_processes_of_one_launch_are_refused_together(flags: tuple[Any, ...], tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, "-m", "peft_study", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with RunFolder(tmp_path / "out").locked():
        ran = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode != 0
    lines = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert any(f"process {os.getpid()} on " in line for line in lines), ran.stderr
    assert all("is writing to it" in line or "the first process may not write to it" in line for line in lines)
    assert "peft_study/study" not in ran.stderr, "a traceback of ours"


def test_a_killed_run_leaves_no_lock_behind_in_the_processes_it_forked(tmp_path: Path) -> None:
    """Tokenising forks: a worker that outlives its parent must not keep the folder."""
    program = (
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from peft_study.storage.run_dir import RunFolder\n"
        "read, write = os.pipe()\n"
        "with RunFolder(Path(sys.argv[1])).locked():\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.write(write, b'.')\n"
        "        time.sleep(30)\n"
        "        os._exit(0)\n"
        "    os.read(read, 1)\n"  # what a new process does first is done
        "    print(child, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.wait(timeout=60)
    try:
        os.kill(child, 0)  # it is there
        with RunFolder(tmp_path / "out").locked():
            assert (tmp_path / "out" / "owner.json").exists()
    finally:
        os.kill(child, 9)


def test_overwriting_a_run_deletes_all_but_the_lock(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    cli(*flags, "--checkpointing_steps", 1).ok()
    (out / "checkpoints" / "old").mkdir()
    inode = (out / "lock").stat().st_ino
    cli(*flags, "--overwrite_output_dir").ok()
    assert not (out / "checkpoints" / "old").exists()
    assert (out / "lock").stat().st_ino == inode, "a new file would be a second lock"


def test_a_rerun_under_way_keeps_its_study(tmp_path: Path, cli: CommandLine, flags: tuple[Any, ...]) -> None:
    """A run inside a folder that is to be replaced, as STUDY/reruns/NAME."""
    cli(*flags).ok()
    inner = tmp_path / "out" / "reruns" / "lora-000"
    with RunFolder(inner).locked():
        in_use(cli(*flags, "--overwrite_output_dir").error(), inner)
        assert (tmp_path / "out" / "adapter").is_dir()
    cli(*flags, "--overwrite_output_dir").ok()
    assert not inner.exists()


def test_a_mistake_leaves_no_lock_and_no_folder(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    cli(*flags, "--train_file", tmp_path / "no.jsonl").error()
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "kept"
    kept.mkdir()
    with pytest.raises(OutputError, match="no such"), RunFolder(kept).locked():
        raise OutputError("no such thing")
    assert list(kept.iterdir()) == []
    shutil.rmtree(kept)


def test_the_lock_is_free_when_the_block_ends(tmp_path: Path) -> None:
    started = time.monotonic()
    for _ in range(3):
        with RunFolder(tmp_path / "a").locked():
            (tmp_path / "a" / "result").write_text("x")
    assert time.monotonic() - started < 10
    assert set(listing(tmp_path / "a")) == {"lock", "result"}
