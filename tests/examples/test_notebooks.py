"""The notebooks of examples/ run from top to bottom, warn of nothing, and hold the pictures that a reader sees on the web."""

import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def outputs(notebook: Any, kind: str) -> list[Any]:
    return [out for cell in notebook.cells for out in cell.get("outputs", ()) if out.output_type == kind]


def printed(notebook: Any) -> str:
    return "".join(out.text for out in outputs(notebook, "stream"))


def pictures(notebook: Any) -> int:
    return sum("image/jpeg" in out.get("data", ()) for out in outputs(notebook, "display_data"))


def attention_finds_the_tumour(said: str) -> None:
    ranks = [float(value) for value in re.findall(r"AUROC of attention (\d\.\d+)", said)]
    assert ranks
    assert min(ranks) > 0.9
    assert "tiles matter more than any" in said


def prototypes_are_the_kinds_of_tissue(said: str) -> None:
    (pure,) = re.findall(r"adjusted Rand index (\d\.\d+) over \d+ tiles of one kind", said)
    assert float(pure) >= 0.8
    (tumour,) = re.findall(r"correlation of prototype \d+ with the true share of tumour: (-?\d\.\d+)", said)
    assert float(tumour) > 0.9
    (found,) = re.findall(r"precision@1 +(\d\.\d+)", said)
    assert float(found) > 0.7


def both_stages_are_better_than_patches(said: str) -> None:
    (dice,) = re.findall(r"^cascade: Dice (\d\.\d+) on 4 slides", said, re.MULTILINE)
    assert float(dice) > 0.85
    (more,) = re.findall(r"cascade more than patches: ([+-]\d\.\d+)", said)
    assert float(more) > 0


# What the printed words of each have to show.
PROMISES = {
    "mil.ipynb": attention_finds_the_tumour,
    "prototypes.ipynb": prototypes_are_the_kinds_of_tissue,
    "segmentation.ipynb": both_stages_are_better_than_patches,
}


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.name)
def notebook(request: Any) -> Any:
    """As committed; and as it is after a run in a folder of its own."""
    return nbformat.read(request.param, as_version=4)


def test_what_is_committed_was_run_in_order_and_is_small(notebook: Any) -> None:
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not outputs(notebook, "error")
    assert str(ROOT) not in nbformat.writes(notebook)
    assert all(path.stat().st_size < 1.5e6 for path in NOTEBOOKS)


def test_a_notebook_runs_and_shows_what_is_committed(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    run = nbformat.from_dict(notebook.copy())
    client = nbclient.NotebookClient(run, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert [out.text for out in outputs(run, "stream") if out.name == "stderr"] == []
    assert pictures(run) == pictures(notebook) > 0
    PROMISES[request.node.callspec.params["notebook"].name](printed(run))
