"""examples/notebook.ipynb runs from top to bottom, quietly."""

from __future__ import annotations

from pathlib import Path

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
