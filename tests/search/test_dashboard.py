"""optuna-dashboard opens a study's database as it is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from peft_study.search.samplers import export
from simulated import World, study, valley


def get(app: Any, path: str) -> Any:
    """Asks a WSGI application and returns its JSON."""
    from wsgiref.util import setup_testing_defaults

    environ: dict[str, Any] = {"PATH_INFO": path, "wsgi.input": io.BytesIO()}
    setup_testing_defaults(environ)
    status: list[str] = []
    body = b"".join(app(environ, lambda code, _headers, _error=None: status.append(code)))
    assert status[0].startswith("200"), (status, body)
    return json.loads(body)


def test_it_shows_the_trials_of_every_method(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    methods = {"lora": {}, "prompt_tuning": {"tokens": 8}}
    config = study(methods=methods, budget={"trials": 3}, finals={"best": 0})
    scheduler = World(config, tmp_path, {"lora": valley(1e-3), "prompt_tuning": valley(0.1)}).run().scheduler
    export(tmp_path / "optuna.db", scheduler.samplers, scheduler.state)
    app = dashboard.wsgi(f"sqlite:///{tmp_path / 'optuna.db'}")
    studies = get(app, "/api/studies")["study_summaries"]
    assert {s["study_name"] for s in studies} == {"lora", "prompt_tuning"}
    for found in studies:
        trials = get(app, f"/api/studies/{found['study_id']}")["trials"]
        assert len(trials) == 3
        assert {t["state"] for t in trials} <= {"Complete", "Pruned"}
        assert all(t["params"] for t in trials)
