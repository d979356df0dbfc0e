"""notebooks/cooper_in_ten_minutes.ipynb: small, without outputs, current, and what it claims is so."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny_runs

from cooper_jax.configs import tiny
from cooper_jax.runtime import metric_glossary
from cooper_jax.settings.config_fields import flatten_config

ROOT = Path(__file__).resolve().parents[1]
PATH = ROOT / "notebooks" / "cooper_in_ten_minutes.ipynb"
CELLS = json.loads(PATH.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
TEXT = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")


def test_it_has_small_cells_and_no_outputs():
    """Outputs are pictures and times of one machine, which a reader makes anew in minutes."""
    assert PATH.stat().st_size < 100_000
    assert all(cell.get("outputs", []) == [] for cell in CELLS)
    assert all(cell["execution_count"] is None for cell in CELLS if cell["cell_type"] == "code")
    assert max(len(source.splitlines()) for source in CODE) <= 40
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)


def test_its_settings_and_metrics_exist():
    fields = flatten_config(tiny.get_config())
    texts = [
        node.value
        for source in CODE
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    named = [text for text in texts if re.fullmatch(r"[a-z]+(\.[a-z_]+)+", text)]
    named = [name for name in named if not name.endswith(".jsonl")]
    assert len(named) >= 12 and [name for name in named if name not in fields] == []
    metrics = [
        text for text in texts if re.fullmatch(r"[a-z]+(/[a-z_]+)+", text) and not text.startswith("runs/")
    ]
    metrics += re.findall(r"`((?:eval|reward|rule|policy|rm|pairs)/[a-z_/]+)`", TEXT)
    # The reader's own reward has a metric of its own name.
    metrics = [name for name in metrics if name not in ("reward/shows_steps", "cooper_jax/api")]
    assert len(metrics) >= 3
    assert all(metric_glossary.find_entry(name, metric_glossary.RUN_METRICS) for name in metrics), metrics


def test_its_links_lead_to_pages():
    targets = re.findall(r"\]\((\.\./[^)#]+)", TEXT)
    assert len(targets) >= 5
    assert [target for target in targets if not (PATH.parent / target).is_file()] == []


def test_the_documentation_leads_to_it():
    for page in ("README.md", "docs/notebook.md"):
        assert PATH.name in (ROOT / page).read_text()
    assert "notebook.md" in (ROOT / "docs/index.md").read_text()


def test_without_a_package_and_an_address_the_first_cell_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="set REPOSITORY in this cell"):
        exec(compile(CODE[0], "the first cell", "exec"), {})


def test_on_a_new_machine_the_first_cell_installs_the_package(tmp_path, monkeypatch):
    """From the repository's address, with the figures' library; pip is not run here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, check: commands.append(command))
    source = CODE[0].replace('REPOSITORY = ""', 'REPOSITORY = "https://host.example/cooper.git"')
    exec(compile(source, "the first cell", "exec"), {})
    ((_, *words),) = commands
    assert words[:2] == ["-m", "pip"]
    assert words[-1] == "cooper-jax[figures] @ git+https://host.example/cooper.git"


@pytest.mark.slow
def test_it_runs_and_what_it_claims_is_so(tmp_path):
    """As it stands, top to bottom, in a kernel of its own: five minutes of CPU time."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient and ipykernel are in requirements-test.txt")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell("print(json.dumps(mean_scores))"))
    # Virtual devices and unoptimised programs are for tests that compute little.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    client = nbclient.NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment | {"PYTHONPATH": str(ROOT)})
    if keep := os.environ.get("COOPER_KEEP_NOTEBOOK"):
        nbformat.write(notebook, keep)

    runs = {
        name: tiny_runs.metrics(tmp_path / "runs/notebook" / name) for name in ("frozen", "cooper", "own")
    }
    curves = {name: read_accuracy(rows) for name, rows in runs.items()}
    rewards = [row["reward/mean"] for row in runs["frozen"] if "reward/mean" in row]
    # 1. The reward rises while the accuracy falls.
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    assert curves["frozen"][-1] < curves["frozen"][0] - 0.1
    # 3. With Cooper the accuracy rises.  The frozen reward model scores a wrong answer with the habit above a right
    # one with its steps, and Cooper's does not.
    assert curves["cooper"][-1] > curves["cooper"][0] + 0.03
    scores = json.loads(notebook.cells[-1].outputs[0].text)
    right, _, _, wrong_habit = scores["frozen reward model"]
    assert wrong_habit > right + 0.05
    right, _, _, wrong_habit = scores["Cooper"]
    assert right > wrong_habit + 0.05
    # 4. With the reader's reward the policy shows its steps, and the accuracy does not collapse as without it.
    assert runs["own"][-1]["reward/shows_steps"] > 0.9
    assert [row["step"] for row in runs["own"] if "eval/oracle/accuracy" in row] == [0, 8, 16]
    assert curves["own"][2] > curves["frozen"][2] + 0.03
    # 2. Pairs are shown, and what differs is highlighted.
    tables = [text for text in list_outputs(notebook, "text/html") if text.startswith("<table>")]
    assert len(tables) == 1 and tables[0].count("<tr>") > 3 and "<mark" in tables[0]
    assert len(list_outputs(notebook, "image/png")) == 4
    shutil.rmtree(tmp_path / "runs")


def read_accuracy(rows: list[dict]) -> list[float]:
    """Held-out accuracy by exact truth, at each evaluation."""
    return [row["eval/oracle/accuracy"] for row in rows if "eval/oracle/accuracy" in row]


def list_outputs(notebook, kind: str) -> list[str]:
    """The outputs of a kind of all cells."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]
