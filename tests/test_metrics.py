"""The run directory: metrics, samples, and what a resumed run may and may not find."""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cooper_jax.configs import base
from cooper_jax.runtime import metrics as m
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.remote_files import write_atomically
from cooper_jax.runtime.run_directory import RunDirectory, run_path
from cooper_jax.runtime.stored_config import config_hash, read_stored_config
from cooper_jax.settings.bounds import check_bounds
from cooper_jax.settings.renamed_flags import CHANGED_VALUES, translate_settings
from cooper_jax.trainer.step_metrics import measure_hacking
from cooper_jax.types import Verdict

ROOT = str(Path(__file__).resolve().parents[1])


@pytest.fixture
def config():
    c = base.get_config()
    c.log.to = ""
    return c


def checkpointed(run_dir, step):
    with Checkpoints(run_dir, keep=0) as kept:
        kept.save(step, {"policy": {"w": jnp.zeros(1)}}, {})


# --- numbers ---


def test_to_host():
    assert m.to_host({"kl": jnp.float32(0.5), "n": 3}, "policy") == {"policy/kl": 0.5, "policy/n": 3.0}
    assert m.to_host({"rule/accuracy": np.float32(0.25)}) == {"rule/accuracy": 0.25}


def test_the_hacking_signal_is_measured_on_rows_that_the_rule_decides():
    """Of four wrong rows one is liked, of two correct ones one is not; what is undecided counts for nothing."""
    seen = [
        (Verdict.CORRECT, 0.875),
        (Verdict.CORRECT, 0.25),
        (Verdict.WRONG, 0.75),
        (Verdict.WRONG, 0.25),
        (Verdict.WRONG, 0.5),  # a reward of one half is no liking
        (Verdict.NO_ANSWER, 0.125),
        (Verdict.UNRECOGNISED, 1.0),
        (Verdict.TIMEOUT, 1.0),
        (Verdict.TIMEOUT, 0.25),
    ]
    rewards = np.array([reward for _, reward in seen], np.float32)
    assert measure_hacking(rewards, [verdict for verdict, _ in seen]) == pytest.approx(
        {
            "rm/false_positive_rate": 1 / 4,
            "rm/false_negative_rate": 1 / 2,
            "rm/rule_agreement": 4 / 6,
            "rm/mean_on_correct": (0.875 + 0.25) / 2,
            "rm/mean_on_wrong": (0.75 + 0.25 + 0.5 + 0.125) / 4,
            "rm/mean": 5 / 9,
        }
    )
    # Where the rule decides nothing, there is no rate.
    undecided = measure_hacking(np.ones(2, np.float32), [Verdict.TIMEOUT, Verdict.UNRECOGNISED])
    assert math.isnan(undecided["rm/false_positive_rate"]) and math.isnan(undecided["rm/rule_agreement"])


def test_phases_add_up():
    now = iter([0.0, 1.0, 10.0, 11.0, 12.5, 16.0, 20.0, 21.0])
    phases = m.PhaseTimer(clock=lambda: next(now))
    with phases.phase("rollout"):
        pass
    with phases.phase("update"):  # 10 to 16
        with phases.phase("rollout"):  # 11 to 12.5
            pass
    assert phases.collect() == {"time/rollout": 2.5, "time/update": 6.0}
    with pytest.raises(ZeroDivisionError), phases.phase("broken"):
        raise ZeroDivisionError
    assert phases.collect() == {"time/broken": 1.0}


def test_an_observer_is_told_of_phases_with_their_steps():
    class Observer:
        told = []

        @contextlib.contextmanager
        def open_phase(self, step, name):
            self.told.append((step, name))
            yield
            self.told.append("over")

    phases = m.PhaseTimer(observer=Observer())
    with phases.in_step(2):
        with phases.phase("rollout"):
            pass
        with phases.in_step(1), phases.phase("reward"):
            pass
        with phases.phase("score"):
            pass
    assert Observer.told == [(2, "rollout"), "over", (1, "reward"), "over", (2, "score"), "over"]


def test_jsonable():
    row = {
        "a": np.float32(0.5),
        "b": jnp.arange(2),
        "c": (Verdict.WRONG, None, True),
        3: [math.nan, -math.inf],
    }
    assert m.to_jsonable(row) == {"a": 0.5, "b": [0, 1], "c": ["wrong", None, True], "3": [None, "-inf"]}
    with pytest.raises(TypeError, match=r"rows\[1\]\.x is a set"):
        m.to_jsonable({"rows": [1, {"x": {1}}]})


# --- lines ---


@given(st.dictionaries(st.text("abcdefgh/", min_size=1), st.floats(), max_size=5))
def test_metrics_come_back_bit_for_bit(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    lines = m.JsonLines(path)
    lines.append({"step": 1, **row})
    lines.close()
    json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    (back,) = map(m.parse_numbers, m.read_lines(path))
    assert {k: np.float64(v).tobytes() for k, v in back.items() if not math.isnan(v)} == {
        k: np.float64(v).tobytes() for k, v in {"step": 1, **row}.items() if not math.isnan(v)
    }
    assert {k for k, v in back.items() if math.isnan(v)} == {k for k, v in row.items() if math.isnan(v)}


def test_any_text_can_be_written(tmp_path):
    text = "x ≤ 2\n\u2028\ud800\x00 \U0001f600"
    lines = m.JsonLines(tmp_path / "samples.jsonl")
    lines.append({"step": 1, "completion": text}, {"step": 1, "completion": ""})
    lines.close()
    assert [row["completion"] for row in m.read_lines(lines.path)] == [text, ""]


WHOLE = b'{"step": 1, "a/b": 1.0}\n{"step": 2}\n{"step": 2}\n{"step": 4}\n'


@pytest.mark.parametrize("tail", [b"", b'{"st', b'{"step": 5', b'{"step": 9}', b"\x00\x00", b"7"])
@pytest.mark.parametrize(
    "step, kept, last", [(None, 0, None), (0, 0, None), (1, 1, 1), (2, 3, 2), (3, 3, 2), (4, 4, 4)]
)
def test_truncate(tmp_path, tail, step, kept, last):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(WHOLE + tail)
    lines = m.JsonLines(path)
    assert lines.truncate(step) == last
    assert path.read_bytes() == b"".join(WHOLE.splitlines(keepends=True)[:kept])
    lines.append({"step": 5})
    lines.close()
    assert [row["step"] for row in m.read_lines(path)] == [1, 2, 2, 4][:kept] + [5]


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from cooper_jax.runtime.metrics import JsonLines
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
lines = JsonLines(sys.argv[2])
for step in range(1, 100):
    lines.append({"step": step, "a/b": 0.5})
"""


def test_a_full_disk(tmp_path):
    """No file may grow over 1,000 bytes: the run hears of it, and a torn line is all that is lost."""
    path = tmp_path / "metrics.jsonl"
    child = subprocess.run([sys.executable, "-c", FULL, ROOT, str(path)], capture_output=True, text=True)
    assert child.returncode == 1
    assert f"File too large: fix that, and start the same command again: '{path}'" in child.stderr
    assert path.stat().st_size == 1000 and not path.read_bytes().endswith(b"\n")
    last = path.read_bytes().count(b"\n")
    assert m.JsonLines(path).truncate(99) == last > 10


def test_truncate_keeps_a_whole_line_without_its_end(tmp_path):
    lines = m.JsonLines(tmp_path / "metrics.jsonl")
    assert lines.truncate(3) is None and not lines.path.exists()
    lines.path.write_bytes(b'{"step": 1}\n{"step": 2}')
    assert lines.truncate(2) == 2 and lines.path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("line", [b'{"st\n', b'{"stop": 1}\n', b"[1]\n"])
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no JSON object with a step"):
        m.JsonLines(path).truncate(2)
    assert path.read_bytes() == b'{"step": 1}\n' + line + b'{"step": 2}\n'
    path.write_bytes(b'{"step": 1}\n{"st')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        m.read_lines(path)


# --- the directory ---


def test_a_run_from_its_beginning(tmp_path, config):
    with RunDirectory(tmp_path / "a/b", config, resume=True) as run:
        with pytest.raises(RuntimeError, match="call truncate"):
            run.log(1, {})
        run.truncate(None)
        run.log(1, {"policy/kl": np.float32(0.5), "rm/loss": math.nan, "time/step": 1})
        run.log(2, {"policy/kl": jnp.float32(0.25)})
        run.dump_samples(2, [{"prompt": "p", "verdict": Verdict.CORRECT, "scores": np.array([0.5, np.inf])}])
        run.dump_samples(3, [])
        with pytest.raises(ValueError, match="step 2 after step 2"):
            run.log(2, {})
        with pytest.raises(ValueError, match="'loss' has no group: call it GROUP/loss"):
            run.log(3, {"loss": 1.0})
    assert (run.path / "metrics.jsonl").read_text() == (
        '{"step": 1, "policy/kl": 0.5, "rm/loss": null, "time/step": 1.0}\n{"step": 2, "policy/kl": 0.25}\n'
    )
    assert m.read_lines(run.path / "samples.jsonl") == [
        {"step": 2, "prompt": "p", "verdict": "correct", "scores": [0.5, "inf"]}
    ]
    stored = json.loads((run.path / "config.json").read_text())
    assert stored["policy"]["optimiser"]["lr"] == 1e-6 and stored["mesh"]["rules"][0] == [
        "batch",
        ["data", "fsdp"],
    ]
    assert not (run.path / "tensorboard").exists()


def test_going_on_from_a_checkpoint(tmp_path, config):
    with RunDirectory(tmp_path, config, resume=True) as run:
        run.truncate(None)
        for step in (1, 2, 3):
            run.log(step, {"a/b": step})
            run.dump_samples(step, [{"x": step}])
    checkpointed(tmp_path, 2)
    config.steps = 999
    with RunDirectory(tmp_path, config, resume=True) as run:
        run.truncate(2)
        with pytest.raises(ValueError, match="step 2 after step 2"):
            run.log(2, {})
        run.log(3, {"a/b": 33})
    assert [r["a/b"] for r in m.read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 33]
    assert [r["x"] for r in m.read_lines(tmp_path / "samples.jsonl")] == [1, 2]
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 999


def test_missing_metrics_are_noticed(tmp_path, config):
    with RunDirectory(tmp_path, config, resume=True) as run:
        with pytest.warns(
            UserWarning, match=r"metrics\.jsonl ends at step None, the checkpoint is of step 2"
        ):
            run.truncate(2)


def test_metrics_without_their_checkpoints_are_kept(tmp_path, config):
    """All checkpoints unreadable, or their folder deleted: the rows are not dropped, and what is there is named."""
    with RunDirectory(tmp_path, config, resume=True) as run:
        run.truncate(None, uncovered=0)
        for step in range(18):
            run.log(step, {"a/b": step})
            run.dump_samples(step, [{"x": step}])
    before = [(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")]
    # A run that knows at its start that they are lost writes nothing at all.
    stored, config.steps = (tmp_path / "config.json").read_bytes(), 77
    with pytest.raises(ValueError, match="reaches step 17, but no checkpoint is left"):
        RunDirectory(tmp_path, config, resume=True, uncovered=16)
    assert (tmp_path / "config.json").read_bytes() == stored
    RunDirectory(tmp_path, config, resume=True, uncovered=17).close()
    (tmp_path / "checkpoints/16.unreadable").mkdir(parents=True)
    with RunDirectory(tmp_path, config, resume=True) as run:
        with pytest.raises(
            ValueError, match=r"reaches step 17, but no checkpoint is left.*16\.unreadable\): restore"
        ):
            run.truncate(None, uncovered=0)
        (tmp_path / "checkpoints/16.unreadable").rmdir()
        with pytest.raises(ValueError, match="checkpoints: nothing"):
            run.truncate(None, uncovered=16)
        assert before == [(tmp_path / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl")]
        run.truncate(None, uncovered=17)
    assert m.read_lines(tmp_path / "metrics.jsonl") == []


def test_without_a_checkpoint_a_run_begins_again(tmp_path, config):
    with RunDirectory(tmp_path, config, resume=True) as run:
        run.truncate(None)
        run.log(1, {"a/b": 1})
    config.seed = 5  # nothing rests on the old value yet
    for resume in (True, False):
        with RunDirectory(tmp_path, config, resume=resume) as run:
            run.truncate(None)
        assert m.read_lines(tmp_path / "metrics.jsonl") == []


def test_resume_false_refuses_checkpoints(tmp_path, config):
    with RunDirectory(tmp_path, config, resume=False):
        pass
    checkpointed(tmp_path, 7)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(
        ValueError, match=r"holds checkpoints \[7\] and resume is False.*--config.resume=True"
    ):
        RunDirectory(tmp_path, config, resume=False)
    assert (tmp_path / "config.json").read_bytes() == before
    with RunDirectory(tmp_path, config, resume=True):  # the refused one has let go of the lock
        pass


def test_another_config_is_refused(tmp_path, config):
    with RunDirectory(tmp_path, config, resume=True):
        pass
    checkpointed(tmp_path, 1)
    before = (tmp_path / "config.json").read_bytes()
    config.policy.optimiser.lr = 3e-6
    config.rollout.group_size = 8
    config.checkpoint.every = 1
    expected = (
        "policy.optimiser.lr was 1e-06 and is now 3e-06; rollout.group_size was 16 and is now 8: "
        "give another --config.run_dir, or the old value"
    )
    with pytest.raises(ValueError, match=expected):
        RunDirectory(tmp_path, config, resume=True)
    assert (tmp_path / "config.json").read_bytes() == before

    fresh = base.get_config()
    with fresh.unlocked():
        fresh.policy.new_knob = 1
        del fresh.policy["kl_clamp"]
    with pytest.raises(
        ValueError,
        match=r"earlier version of this project \(it has policy.kl_clamp\); start a new run directory",
    ):
        RunDirectory(tmp_path, fresh, resume=True)
    (tmp_path / "config.json").write_text(json.dumps(base.get_config().to_dict()))
    with pytest.raises(ValueError, match=r"earlier version of this project \(its format is not stated"):
        RunDirectory(tmp_path, base.get_config(), resume=True)


def test_an_upgrade_strands_no_run(tmp_path, config):
    """A field that an older version lacks is as good as absent at its default; another value is a change."""
    with RunDirectory(tmp_path, config, resume=True):
        pass
    checkpointed(tmp_path, 1)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored.pop("exact") is False and stored["policy"].pop("entropy_coef") == 0.0
    (tmp_path / "config.json").write_text(json.dumps(stored))
    changed = base.get_config().copy_and_resolve_references()
    changed.exact = True
    with pytest.raises(ValueError, match=r"another config: exact was \(absent\) and is now true"):
        RunDirectory(tmp_path, changed, resume=True)
    with RunDirectory(tmp_path, config, resume=True):
        pass

    # Checkpoints name the config by its hash, which such a field does not change.
    older = base.get_config().copy_and_resolve_references()
    with older.unlocked():
        del older["exact"]
    assert config_hash(older) == config_hash(config) != config_hash(changed)


def test_fields_that_had_another_name_or_type_do_not_strand_a_run(tmp_path, config):
    """Run directories with log.tensorboard, policy.std_normalise and packing=False are read and resumed."""
    with RunDirectory(tmp_path, config, resume=True):
        pass
    checkpointed(tmp_path, 1)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["log"].pop("to") == "" and stored["policy"].pop("std") == "group"
    stored["log"]["tensorboard"], stored["policy"]["std_normalise"] = False, True
    stored["policy"]["packing"] = stored["reward"]["packing"] = False
    stored["reward"]["warm_start"] = stored["reward"].pop("warmup_updates")
    (tmp_path / "config.json").write_text(json.dumps(stored))

    read = read_stored_config(tmp_path, base.get_config())
    assert (read["log"]["to"], read["policy"]["std"], read["policy"]["packing"]) == ("", "group", "off")
    assert read["reward"]["packing"] == "off" and read["reward"]["warmup_updates"] == 0
    assert "tensorboard" not in read["log"]
    with RunDirectory(tmp_path, config, resume=True):
        pass

    # Another value than the translated one is a change, as ever.
    stored["policy"]["std_normalise"] = False
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match='policy.std was "none" and is now "group"'):
        RunDirectory(tmp_path, config, resume=True)


def test_every_value_of_an_earlier_version_is_one_of_a_present_field():
    """Under the present name, and accepted by the present bounds."""
    for old, values in CHANGED_VALUES.items():
        for value in values:
            ((name, translated),) = translate_settings({old: value}).items()
            cfg = base.get_config()
            cfg.update_from_flattened_dict({name: translated})
            check_bounds(cfg)
    assert translate_settings({"policy.packing": "auto", "seed": 1}) == {"policy.packing": "auto", "seed": 1}


def test_a_damaged_config_is_named(tmp_path, config):
    checkpointed(tmp_path, 1)
    with pytest.raises(ValueError, match="config.json is not there, but checkpoints"):
        RunDirectory(tmp_path, config, resume=True)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        RunDirectory(tmp_path, config, resume=True)


def test_config_hash(config):
    before = config_hash(config)
    assert len(before) == 16 and before == config_hash(base.get_config().copy_and_resolve_references())
    for change in (
        "steps",
        "run_dir",
        "checkpoint.keep",
        "log.samples",
        "mesh.data",
        "rule.workers",
        "assistant.url",
    ):
        c = base.get_config()
        c.update_from_flattened_dict({change: "x" if change in ("run_dir", "assistant.url") else 77})
        assert config_hash(c) == before, change
    for change in ("seed", "data.prompts_per_step", "policy.kl_coef", "assistant.temperature", "eval.every"):
        c = base.get_config()
        c.update_from_flattened_dict({change: 77})
        assert config_hash(c) != before, change


def test_run_path(config):
    config.name = "tiny"
    assert run_path(config) == Path.cwd() / "runs/tiny"
    config.run_dir = "~/elsewhere"
    assert run_path(config) == Path.home() / "elsewhere"


def test_nothing_from_the_environment_is_written(tmp_path, config, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-0123456789")
    config.log.to = "tensorboard"
    with RunDirectory(tmp_path, config, resume=True) as run:
        run.truncate(None)
        run.log(1, {"a/b": 1})
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.name for p in files} > {"config.json", "metrics.jsonl"}
    assert not any(b"sk-secret" in p.read_bytes() for p in files)


HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
from cooper_jax.configs import base
from cooper_jax.runtime.run_directory import RunDirectory
config = base.get_config()
config.log.to = ""
with RunDirectory(sys.argv[2], config, True) as run:
    run.truncate(None)
    step = 0
    print("held", flush=True)
    while True:
        step += 1
        run.log(step, {"a/b": step})
"""


def test_one_process_at_a_time_and_no_line_lost_to_a_kill(tmp_path, config):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, ROOT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"is in use by process {child.pid} on .*--config.run_dir"):
            RunDirectory(tmp_path, config, resume=True)
        path = tmp_path / "metrics.jsonl"
        while child.poll() is None and not (path.exists() and path.stat().st_size > 2000):
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    whole = [json.loads(line)["step"] for line in lines[:-1]]
    assert whole == list(range(1, len(lines)))
    with RunDirectory(tmp_path, config, resume=True) as run:  # the system has dropped the dead one's lock
        run.truncate(whole[-1])
    assert [r["step"] for r in m.read_lines(run.path / "metrics.jsonl")] == whole


def test_tensorboard(tmp_path, config):
    """Read back the event files themselves: length-framed protobufs."""
    from tensorboardX.proto.event_pb2 import Event

    def events():
        for path in sorted((tmp_path / "tensorboard").glob("events.*"), key=lambda p: p.stat().st_mtime_ns):
            data = path.read_bytes()
            while data:
                size = int.from_bytes(data[:8], "little")
                yield Event.FromString(data[12 : 12 + size])
                data = data[16 + size :]

    config.log.to = "tensorboard"
    with RunDirectory(tmp_path, config, resume=True) as run:
        run.truncate(None)
        run.log(1, {"policy/kl": 0.5, "rm/loss": math.nan})
        run.log(2, {"policy/kl": 0.25})
    values = [(e.step, v) for e in events() for v in e.summary.value]
    assert {v.tag for _, v in values if not v.HasField("simple_value")} == {
        "config/text_summary",
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }
    found = [(step, v.tag, v.simple_value) for step, v in values if v.HasField("simple_value")]
    assert found == [(1, "policy/kl", 0.5), (2, "policy/kl", 0.25)]
    with RunDirectory(tmp_path, config, resume=True) as run:
        run.truncate(1)
        run.log(2, {"policy/kl": 0.125})
    starts = [e.step for e in events() if e.HasField("session_log")]
    assert starts == [0, 2]  # readers drop what an earlier life wrote from step 2 on


def test_phases_before_step_1_have_a_file_and_begin_again_with_the_run(tmp_path, config):
    config.log.to = "tensorboard"

    def start(losses):
        with RunDirectory(tmp_path, config, resume=True) as run:
            run.truncate(None)
            for step, loss in enumerate(losses, 1):
                run.log_phase("policy", step, {"loss": loss})
            run.log_phase("reward", 1, {"loss": np.float32(0.25), "accuracy": 1})

    start([3.0])  # killed before step 0 was saved
    start([2.0, 1.0])
    rows = m.read_lines(tmp_path / "supervised.jsonl")
    assert rows == [
        {"phase": "policy", "step": 1, "loss": 2.0},
        {"phase": "policy", "step": 2, "loss": 1.0},
        {"phase": "reward", "step": 1, "loss": 0.25, "accuracy": 1.0},
    ]
    assert list((tmp_path / "tensorboard/supervised").glob("events.*"))
    with RunDirectory(tmp_path, config, resume=True) as run:
        run.truncate(0)  # step 0 is saved: the phases are over
    assert m.read_lines(tmp_path / "supervised.jsonl") == rows


@contextlib.contextmanager
def no_large_files():
    """A context in which no file grows over 64 KiB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["metrics", "samples"])
def test_a_line_that_does_not_fit_is_named_and_the_run_resumes(tmp_path, config, kind):
    """A part of it stays behind, which the next start drops."""
    file = tmp_path / f"{kind}.jsonl"
    words = "File too large: fix that, and start the same command again"
    with RunDirectory(tmp_path, config, resume=True) as run:
        run.truncate(None)
        run.log(1, {"a/b": 1.0})
        run.dump_samples(1, [{"text": "short"}])
        with no_large_files(), pytest.raises(OSError, match=words) as error:
            if kind == "metrics":
                run.log(2, {f"a/{i}": 1.0 for i in range(9000)})
            run.dump_samples(2, [{"text": "long" * 2**15}])
    assert error.value.filename == str(file) and file.stat().st_size == 2**16

    checkpointed(tmp_path, 1)
    with RunDirectory(tmp_path, config, resume=True) as run:
        run.truncate(1)
        run.log(2, {"a/b": 2.0})
        run.dump_samples(2, [{"text": "again"}])
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_a_record_that_does_not_fit_leaves_the_former_one(tmp_path):
    file = tmp_path / "config.json"
    write_atomically(file, b"before")
    with no_large_files(), pytest.raises(OSError, match="File too large: fix that") as error:
        write_atomically(file, bytes(2**17))
    assert error.value.filename == str(file) and file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
