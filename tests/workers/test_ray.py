"""A real Ray cluster of two nodes on this machine: the same study, and a node that dies amid it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from peft_study.engine import checkpoint
from worker_cases import SOURCE, resumed, same, start, steps, until, write_study

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

LONG = {
    "training": {"steps": 100, "batch_size": 5, "row_tokens": 130},
    "budget": {"trials": 2},
    "finals": {"best": 1, "seeds": 1},
    "methods": {"lora": {"rank": [2, 4], "dropout": 0.2}, "prompt_tuning": {"tokens": 17}},
}
SOON = {"health_check_period_ms": 500, "health_check_failure_threshold": 4, "health_check_initial_delay_ms": 500}
"""A dead node is noticed in seconds, not in half a minute."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (SOURCE, os.environ.get("PYTHONPATH")))))
    # the head has no processors to give: it survives
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SOON}
    before = signal.getsignal(signal.SIGTERM)  # a node that is made in a process puts its own handler there
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        yield made
    finally:
        made.shutdown()
        signal.signal(signal.SIGTERM, before)


def test_a_cluster_runs_the_same_study_as_one_process(
    cli: CommandLine, cluster: Any, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    study = write_study(tmp_path, tiny_model_folder, tiny_data)
    cli("run", study, "-o", tmp_path / "one").ok()
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    said = cli("run", study, "--ray", cluster.address, "-o", tmp_path / "two").ok().out
    assert "2 workers, each with 1 thread" in said
    same(tmp_path / "two", tmp_path / "one")
    assert not ray.is_initialized()


def test_a_node_killed_amid_a_study(
    cli: CommandLine, cluster: Any, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    study = write_study(tmp_path, tiny_model_folder, tiny_data, **LONG)
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    cli("run", study, "-o", whole).ok()
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    process = start(("run", study, "--ray", cluster.address, "-o", out), log)

    def both_under_way() -> bool:
        cuts = [checkpoint.newest(out / "checkpoints" / name) for name in ("worker-0", "worker-1")]
        return all(cut is not None and max(cut.steps, default=0) > 3 for cut in cuts)

    until(both_under_way, process)
    before = steps(out)
    cluster.remove_node(nodes[1], allow_graceful=False)
    assert process.wait(300) == 0, log.read_text()
    said = log.read_text()
    assert before < 600, "the study was all but over"
    assert "died (" in said
    assert min(resumed(said).values()) > 0, said
    assert "Traceback" not in said
    same(out, whole, rel=0.05)


def test_a_cluster_without_room_is_one_line(
    cli: CommandLine,
    cluster: Any,
    tmp_path: Path,
    tiny_model_folder: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = write_study(tmp_path, tiny_model_folder, tiny_data)
    assert "has no CPU to give" in cli("run", study, "--ray", cluster.address).error()
    cluster.add_node(num_cpus=1, memory=1 << 20)
    monkeypatch.setattr("peft_study.workers.ray_cluster.PLACING_SECONDS", 3.0)
    monkeypatch.setattr("peft_study.workers.ray_cluster.weight_bytes", lambda _model: 1 << 30)
    line = cli("run", study, "--ray", cluster.address).error()
    assert "no node of the Ray cluster has room for a worker (cpus 1, memory" in line
    assert "the same command resumes the study when there is room" in line
