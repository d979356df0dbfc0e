"""A run of the trainer with every library's tracker: their files hold what metrics.jsonl and samples.jsonl hold.

The libraries' own readers read them; wandb has none for its offline files, of which its own message classes are
parsed.  The run stops after two steps and is resumed, with mlflow added, beside a tracker that always fails.
"""

import json
import math
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest
import tiny_steps

from cooper_jax.runtime.metrics import parse_numbers, read_lines
from cooper_jax.runtime.trackers import sample_tables, tracker_choice, tracker_thread
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import train_loop

pytestmark = pytest.mark.slow

LIBRARIES = ("wandb", "trackio", "mlflow")

FAILING = """
class Failing:
    def __init__(self, run):
        pass

    def log(self, step, metrics):
        raise ConnectionError("no network")

    log_samples = log

    def log_phase(self, phase, step, figures):
        raise ConnectionError("no network")

    def close(self):
        raise ConnectionError("no network")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the run of three steps, `run`, and with what the libraries wrote."""
    path = tmp_path_factory.mktemp("trackers")
    (path / "failing.py").write_text(FAILING)
    variables = {
        # Nothing reaches a network.
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(path / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{path}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    installed = [name for name in LIBRARIES if find_spec(name)]
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.chdir(path)  # where MLflow writes artifacts
        patch.setattr(jax, "devices", lambda *_: devices)
        patch.setattr(tracker_thread, "PAUSES", ())
        # A slow machine may take minutes to make the database.
        patch.setattr("cooper_jax.runtime.trackers.run_trackers.CLOSE_SECONDS", 600.0)
        for steps, names in ((2, [n for n in installed if n != "mlflow"]), (3, installed)):
            trackers = ["tensorboard", *names, f"{path}/failing.py:Failing"]
            changes = {
                "run_dir": str(path / "run"),
                "steps": steps,
                "supervised.reward_steps": 2,
                "supervised.reward_batch": 4,
                "eval.every": 2,
                "checkpoint.every": 1,
                "log.samples_every": 1,
                "log.to": ",".join(trackers),
            }
            train_loop.train(tiny_steps.config(**changes))
        yield path


def read_scalars(place: Path) -> dict[tuple[int, str], float]:
    """(step, metric) -> value, of metrics.jsonl."""
    rows = [parse_numbers(row) for row in read_lines(place / "run" / "metrics.jsonl")]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    return {(row["step"], name): x for row in rows for name, x in row.items() if name != "step"}


def read_phases(place: Path) -> list[dict]:
    """The rows of supervised.jsonl."""
    rows = read_lines(place / "run" / "supervised.jsonl")
    assert [(row["phase"], row["step"]) for row in rows] == [("reward", 1), ("reward", 2)]
    assert all("loss" in row for row in rows)
    return rows


def read_phase_scalars(place: Path) -> dict[tuple[int, str], float]:
    """(step of the phase, supervised/PHASE/NAME) -> value."""
    return {
        (row["step"], f"supervised/{row['phase']}/{name}"): x
        for row in read_phases(place)
        for name, x in row.items()
        if name not in ("phase", "step")
    }


def read_tables(place: Path) -> dict[tuple[int, str], list[dict]]:
    """(step, table) -> its rows, of samples.jsonl."""
    samples: dict[int, list[dict]] = {}
    for row in read_lines(place / "run" / "samples.jsonl"):
        samples.setdefault(row.pop("step"), []).append(row)
    assert sorted(samples) == [1, 2, 3]
    tables = {}
    for step, rows in samples.items():
        tables |= {(step, name): t for name, t in sample_tables.make_tables(step, rows).items()}
    assert len(tables[1, "samples/responses"]) == 2 * tiny_steps.G
    return tables


def assert_same_scalars(found: dict[tuple[int, str], float], expected: dict[tuple[int, str], float]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == value or (math.isnan(found[key]) and math.isnan(value)), key


def test_a_failing_tracker_did_not_stop_the_run(place):
    rows = read_lines(place / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 3 and (place / "run" / "checkpoints" / "3").is_dir()
    stored = json.loads((place / "run" / "trackers.json").read_text())
    assert stored["failing.py:Failing"] == {"metrics": -1, "samples": -1, "phases": 0, "state": {}}
    assert stored["tensorboard"] == {"metrics": 3, "samples": 3, "phases": 2, "state": {}}


def read_wandb(path: Path) -> list[dict]:
    """The rows of an offline file: records of a log of blocks, in LevelDB's format, behind seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, message, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:  # the rest of a block, too short for a header
            position += room
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        message += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record.FromString(message)
            message = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def test_wandb(place):
    pytest.importorskip("wandb")
    folders = sorted((place / "run" / "wandb").glob("offline-run-*"))
    identity = json.loads((place / "run" / "trackers.json").read_text())["wandb"]["state"]["id"]
    assert len(folders) == 2 and all(folder.name.endswith(f"-{identity}") for folder in folders)

    scalars, tables, expected = {}, {}, read_tables(place)
    for folder in folders:
        for row in read_wandb(folder / f"run-{identity}.wandb"):
            step = row["_step"]
            for name in ("samples/responses", "samples/pairs", "supervised"):
                if f"{name}/path" in row:
                    table = json.loads((folder / "files" / row[f"{name}/path"]).read_text())
                    tables[step, name] = [dict(zip(table["columns"], x, strict=True)) for x in table["data"]]
            # JSON's extensions NaN and Infinity are what wandb writes.
            scalars |= {
                (step, name): float(x)
                for name, x in row.items()
                if not name.startswith(("_", "samples/", "supervised/")) and isinstance(x, int | float)
            }
    assert_same_scalars(scalars, read_scalars(place))
    assert tables == expected | {(0, "supervised"): read_phases(place)}


def test_wandb_without_a_key_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(SetupError, match="^log.to=wandb: no key is known: set WANDB_API_KEY, or WANDB_MODE"):
        tracker_choice.load_trackers("wandb")


def test_trackio(place):
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = trackio.Api().runs("cooper")
    assert run.config["policy.arch.width"] == 16
    numbers = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    scalars, tables = {}, {}
    for row in SQLiteStorage.get_logs("cooper", run.name, run_id=run.id):
        step = row.pop("step")
        for name, value in row.items():
            if isinstance(value, dict):
                assert (step, name) not in tables
                tables[step, name] = value["_value"]
            elif "/" in name:
                assert (step, name) not in scalars
                scalars[step, name] = numbers.get(value, value)
    assert_same_scalars(scalars, read_scalars(place) | read_phase_scalars(place))
    assert tables == read_tables(place)


def test_mlflow(place):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("cooper")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["policy.arch.width"] == "16"
    identity, expected = run.info.run_id, read_scalars(place) | read_phase_scalars(place)
    scalars = {}
    for name in {name for _, name in expected}:
        for point in client.get_metric_history(identity, name):
            assert (point.step, name) not in scalars
            scalars[point.step, name] = point.value
    assert_same_scalars(scalars, expected)

    tables = {}
    for (step, name), rows in read_tables(place).items():
        file = client.download_artifacts(identity, f"{name}/step_{step:06d}.json")
        table = json.loads(Path(file).read_text())
        columns = [row.keys() for row in rows]
        tables[step, name] = [
            {k: x for k, x in zip(table["columns"], values, strict=True) if k in present}
            for values, present in zip(table["data"], columns, strict=True)
        ]
    assert tables == read_tables(place)
    text = Path(client.download_artifacts(identity, "samples/text/step_000002.md")).read_text()
    assert text.startswith("### Step 2, problem ")


def test_tensorboard(place):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(place / "run" / "tensorboard"), {"scalars": 0, "tensors": 0})
    events.Reload()
    expected = {key: x for key, x in read_scalars(place).items() if math.isfinite(x)}
    scalars = {
        (event.step, name): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)
    }
    assert scalars.keys() == expected.keys()
    # The files have float32.
    assert scalars == pytest.approx(expected, rel=1e-6)

    def read_texts(tag: str) -> dict[int, str]:
        return {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}

    phases = accumulators.EventAccumulator(str(place / "run" / "tensorboard" / "supervised"))
    phases.Reload()
    losses = [(event.step, event.value) for event in phases.Scalars("reward/loss")]
    assert losses == [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in read_phases(place)]

    texts = read_texts("samples/text_summary")
    assert sorted(texts) == [1, 2, 3]
    for (step, name), rows in read_tables(place).items():
        if name == "samples/responses":
            for row in rows:
                assert all(f"    {line}" in texts[step] for line in row["text"].split("\n"))
    assert all("policy.arch.width = 16" in text for text in read_texts("config/text_summary").values())
