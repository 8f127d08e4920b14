"""The notebook runs from top to bottom in a kernel of its own, and its cells show the audit and the losses."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


def texts(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") or str(output.get("data", "")) for output in cell.outputs)


@pytest.mark.slow
def test_notebook_shows_what_it_does(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()  # raises what a cell raises
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    training = next(cell for cell in code if "finetune(" in cell.source)
    assert "training data: 48 samples of 48 rows" in texts(training)
    assert "step 1/30  loss" in texts(training) and "step 30/30  loss" in texts(training)
    assert "srun" not in texts(training)
    assert (tmp_path / "runs" / "notebook_merged" / "model.safetensors").is_file()
