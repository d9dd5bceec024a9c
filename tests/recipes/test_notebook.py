"""`recipes/notebooks`: ten cells whose outputs are stored, and which run without network."""

import importlib.util
import json
import os
import re
import time

import pytest
from helpers.space import CLONE

from vpns_hf import PromptedSparseModel

NOTEBOOK = CLONE / "recipes/notebooks/prune_your_images.ipynb"
MISSING = [name for name in ("nbclient", "nbformat", "ipykernel") if importlib.util.find_spec(name) is None]


@pytest.fixture
def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def text_of(cells):
    """All that the cells have printed and shown as text."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    parts += [output.get("data", {}).get("text/markdown", "") for output in outputs]
    return "\n".join("".join(part) for part in parts)


def rows_of(cells):
    """The rows of the table of results: model, sparsity, accuracy, ... without the header."""
    rows = [line.strip("| ").split(" | ") for line in text_of(cells).splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[1:]}


def check_results(cells):
    rows = rows_of(cells)
    assert (rows["dense"][0], rows["pruned"][0]) == ("0.00%", "90.00%")
    accuracy = {name: float(rows[name][1].rstrip("%")) for name in ("dense", "pruned")}
    assert accuracy["dense"] > 60
    assert accuracy["pruned"] > 50  # chance is 10
    assert (rows["dense"][5], rows["pruned"][5][-2:]) == ("7.3 MB", "kB")


def test_ten_cells_in_order_with_stored_outputs_and_no_path_of_a_machine(cells):
    assert len(cells) == 10
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    check_results(cells)
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"]) >= 4
    assert not re.search(r"/(home|work|tmp|Users|root)/", NOTEBOOK.read_text(encoding="utf-8"))
    assert NOTEBOOK.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs `pip install -e '.[test-recipes]'`: {', '.join(MISSING)} missing")
def test_the_notebook_runs_in_a_new_folder(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(CLONE), os.environ.get("PYTHONPATH")))))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    print(f"{time.perf_counter() - start:.0f} seconds")
    check_results(notebook.cells)
    model = PromptedSparseModel.from_pretrained(tmp_path / "runs/vpns_joint")
    assert model.sparsity == pytest.approx(0.9, abs=1e-5)
    assert len(list((tmp_path / "my_images/train").rglob("*.png"))) == 2000
