"""The notebook: the stored file has clean outputs, and its cells run."""

import os
import re
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "enact_in_ten_minutes.ipynb"
PAGES = re.compile(r"\]\((\.\./[^)#]+)")  # relative links in Markdown
# Starts of absolute paths on Linux, macOS and Windows, but not of URLs.
ABSOLUTE = re.compile(r"(?<![\w./:*-])/(home|root|work|tmp|usr|opt|var|private|Users|content|mnt)/|\b[A-Z]:\\\\")


def read(path: Path = NOTEBOOK):
    """The notebook, checked against its format."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def outputs(notebook) -> list:
    """All outputs of all cells."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_stored_outputs():
    notebook = read()
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code_cells] == list(range(1, len(code_cells) + 1))
    kinds = {output.output_type for output in outputs(notebook)}
    assert {"stream", "display_data"} <= kinds and "error" not in kinds
    assert not [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    texts = [output.get("text", "") for output in outputs(notebook)]
    assert not any("warning" in text.lower() for text in texts)


def test_opens_with_the_installation():
    first = read().cells[0]
    assert first.cell_type == "code" and "%pip install" in first.source
    # Guarded: here the project can be imported, so the cell prints nothing.
    assert 'find_spec("enact_common") is None' in first.source and not first.outputs


def test_no_absolute_paths():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(Path.home()) + os.sep not in text
    assert not ABSOLUTE.search(text)
    assert len(text) < 600_000


def test_links_lead_to_pages():
    sources = [cell.source for cell in read().cells if cell.cell_type == "markdown"]
    links = [link for source in sources for link in PAGES.findall(source)]
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


@pytest.mark.slow
def test_cells_run(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("ENACT_NOTEBOOK_SMALL", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = read()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # A cell that raises is an error of the test. The kernel is a new process.
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert outputs(notebook)
    assert list(tmp_path.iterdir()) == []  # the temporary folder is gone
