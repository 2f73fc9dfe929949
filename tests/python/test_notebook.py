"""examples/notebook.ipynb runs from top to bottom, quietly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples/notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": tmp_path}}).execute()
    run = next(cell for cell in notebook.cells if "study.run()" in cell.source)
    said = "".join(output.text for output in run.outputs if output.output_type == "stream")
    moving = [output for output in run.outputs if output.output_type == "display_data"]
    assert "winner by mean dev loss over 3 new seeds" in said
    assert len(moving) <= 1, "one line of progress, kept up to date"
    assert not any("widget" in kind for output in moving for kind in output.data), "no widgets"
    assert (tmp_path / "runs/notebook/recommended.yaml").exists()


STUDY = """
import time
from peft_study import Callback, LoRA, Study

class Slow(Callback):
    def on_step(self, trial):
        time.sleep(0.2)

study = Study({model!r}, {{"train": {data!r}, "held_out": 10, "test": 10}}, [LoRA(rank=2)], trials=2, steps=12,
              finals={{"best": 1, "seeds": 1}}, output="study")
"""


@pytest.mark.slow
def test_interrupting_the_cell_is_a_ctrl_c(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    told: list[dict[str, Any]] = []

    def hook(message: dict[str, Any]) -> None:
        told.append(message)
        if "lora-000 " in str(message["content"]) and not any("interrupted" in str(m) for m in told):
            told.append({"msg_type": "interrupted", "content": "interrupted"})
            manager.interrupt_kernel()

    try:
        client.execute_interactive(STUDY.format(model=str(tiny_model_folder), data=str(tiny_data)), timeout=120)
        first = client.execute_interactive("study.run(callbacks=[Slow()])", timeout=300, output_hook=hook)
        assert (first["content"]["status"], first["content"]["ename"]) == ("error", "Interrupted")
        moving = [message for message in told if message["msg_type"] in ("display_data", "update_display_data")]
        assert [message["msg_type"] for message in moving].count("display_data") == 1
        assert all(list(message["content"]["data"]) == ["text/plain"] for message in moving)
        again = client.execute_interactive("result = study.run(); assert result.best", timeout=300)
        assert again["content"]["status"] == "ok"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
