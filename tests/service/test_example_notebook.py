"""The example notebook runs from its first cell to its last, in a kernel of its own, and shows what it says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nbformat
import pytest
from gateway_harness import serving
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "explain.ipynb"


@pytest.mark.timeout(300)
async def test_the_example_notebook_shows_maps_in_every_cell_that_ends_with_some(monkeypatch, tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are made by those who run it"
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    async with serving() as server:
        monkeypatch.setenv("CAMSERVE_EXAMPLE_SERVER", server.gateway.address)
        await asyncio.to_thread(NotebookClient(notebook, timeout=240, kernel_name="python3").execute)
    shown = ["".join(map(str, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"]
    whole, one, overlay, plotted, streamed, signed = shown
    for text in (whole, one, streamed, signed):
        assert "<figure" in text
        assert "data:image/png;base64," in text
    assert "image/png" in overlay
    assert plotted.count("image/png") == 1, "the figure is shown once"
    assert "tiger cat" in whole
    assert "tabby" in streamed, "the server's own labels"
    assert "(224, 224) True" in signed
