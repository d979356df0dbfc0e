"""The training loop apart from its steps: what is logged and saved, and how it ends after a SIGTERM."""

import contextlib
import dataclasses
import types

import jax
import numpy as np
import pytest

from cooper_jax.configs import tiny
from cooper_jax.reward.pairs.giveaway_probe import RecentRewrites, Rewrite
from cooper_jax.runtime import hosts
from cooper_jax.runtime.profiler import read_profile_steps
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import train_loop
from cooper_jax.trainer.samples import StepRecord
from cooper_jax.trainer.setup import read_settings
from cooper_jax.trainer.state import State
from cooper_jax.trainer.step import finish_step
from cooper_jax.types import Completion, Problem, Verdict


class Run:
    """A run directory that remembers what is logged."""

    def __init__(self):
        self.rows, self.sampled, self.samples = {}, [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def log(self, step, metrics):
        self.rows[step] = metrics

    def read_metrics(self):
        return [{"step": step, **metrics} for step, metrics in self.rows.items()]

    def dump_samples(self, step, samples):
        self.sampled.append(step)
        self.samples += samples


class Checkpoints(Run):
    def __init__(self):
        self.saved, self.counts = [], {}

    def steps(self):
        return self.saved

    def loop(self, step):
        return self.counts

    def wait(self):
        pass


def record():
    one = np.ones(1, np.float32)
    return StepRecord(
        [Problem("q", "1")],
        [Completion("1", tokens=4)],
        [Verdict.CORRECT],
        one,
        one,
        [],
        {},
        sampled_tokens=4,
        prompt_tokens=[[1, 2]],
    )


def make_step(made, stop, new_state):
    """A step that does nothing but complete the one before it, and later itself."""

    def finish(state, phases):
        made.finished.append(state.step)
        return state, dict(made.metrics), record()

    def step(components, state, phases, on_finished):
        stop("rollout", state.step + 1)
        if state.finish is not None:
            state, *finished = finish_step(state, phases)
            on_finished(state, *finished)
        stop("step", state.step + 1)
        made.begun.append(state.step + 1)
        return dataclasses.replace(new_state(state.step + 1), finish=finish)

    return step


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """The loop with steps that count, and all that surrounds them replaced."""
    made = types.SimpleNamespace(run=Run(), checkpoints=Checkpoints(), evaluated=[], said=[], stops=set())
    made.rewrites, made.begun, made.finished = RecentRewrites(), [], []
    made.metrics = {"reward/mean": 0.5}
    made.start = 0
    made.run.path = tmp_path

    def stop(*place):
        if place in made.stops:
            raise hosts.Stopped

    def start(components, state, run, checkpoints):
        stop("start", 0)
        checkpoints.saved.append(made.start)
        return new_state(made.start)

    def new_state(step):
        return State(None, None, None, step=step, position=0, recent_rewrites=made.rewrites)

    def evaluate(components, state):
        stop("evaluation", state.step)
        made.evaluated.append(state.step)
        return {"eval/rule/accuracy": 1.0}

    @contextlib.contextmanager
    def build(cfg, path):
        settings = read_settings(cfg)
        tokenizer = types.SimpleNamespace(decode=lambda ids: f"prompt {ids}")
        policy = types.SimpleNamespace(model=types.SimpleNamespace(tokenizer=tokenizer))
        parts = {"rollout_thread": None, "reward": None, "assistant": None, "oracle": None, "policy": policy}
        yield types.SimpleNamespace(settings=settings, **parts), new_state(0)

    replaced = {
        "run_path": lambda cfg: tmp_path,
        "check_shared": lambda path: None,
        "RunDirectory": lambda *_, **__: made.run,
        "Checkpoints": lambda *_, **__: made.checkpoints,
        "build_components": build,
        "describe_run": lambda components: "a run",
        "start_or_resume": start,
        "cooper_step": make_step(made, stop, new_state),
        "evaluate_held_out": evaluate,
        "save_checkpoint": lambda components, state, *_: made.checkpoints.saved.append(state.step),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(train_loop, name, value)
    monkeypatch.setattr(hosts, "print_once", lambda text, always=False: made.said.append(text))
    return made


def config():
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict(
        {"steps": 5, "eval.every": 2, "checkpoint.every": 3, "log.samples_every": 2}
    )
    return cfg


@pytest.mark.parametrize("overlap", [True, False])
def test_a_run_logs_evaluates_and_saves_when_each_is_due(parts, overlap):
    cfg = config()
    cfg.overlap = overlap
    train_loop.train(cfg)
    assert parts.begun == parts.finished == [1, 2, 3, 4, 5]
    assert list(parts.run.rows) == [1, 2, 3, 4, 5] and parts.evaluated == [2, 4, 5]
    # The last step is always evaluated.
    assert [step for step, row in parts.run.rows.items() if "eval/rule/accuracy" in row] == [2, 4, 5]
    assert parts.checkpoints.saved == [0, 3, 5]  # the last step is always saved
    assert parts.run.sampled == [1, 2, 4]  # the first step is always sampled
    assert [sample["prompt"] for sample in parts.run.samples] == ["prompt [1, 2]"] * 3
    row = parts.run.rows[2]
    assert row["time/tokens_per_second"] == pytest.approx(4 / row["time/step"]) and "time/eval" in row


def test_giveaways_are_measured_when_due_and_reported_once(parts):
    parts.rewrites = RecentRewrites(
        tuple(Rewrite(f"q {i}", f"So {i} is it.", f"Well, so {i} is it.") for i in range(200))
    )
    cfg = config()
    cfg.log.giveaway_every = 2
    train_loop.train(cfg)
    measured = {step: row["pairs/giveaway_auroc"] for step, row in parts.run.rows.items() if step % 2 == 0}
    assert measured == {2: 1.0, 4: 1.0}
    assert not any("pairs/giveaway_auroc" in parts.run.rows[step] for step in (1, 3, 5))
    assert sum("pairs/giveaway_auroc=1.00" in text for text in parts.said) == 1
    cfg.reward.arm = "model"  # which makes no pairs
    parts.run.rows.clear()
    train_loop.train(cfg)
    assert not any("pairs/giveaway_auroc" in row for row in parts.run.rows.values())


@pytest.mark.parametrize(
    "place, logged, saved, said",
    [
        (("start", 0), [], [], "before step 0 was saved"),
        (("step", 1), [], [0], "step 0 is saved"),
        # Behind the rollout of step 2, step 1 is completed; a stop before that completes it, too.
        (("rollout", 2), [1], [0, 1], "step 1 is saved"),
        (("step", 2), [1], [0, 1], "step 1 is saved"),
        (("step", 3), [1, 2], [0, 2], "step 2 is saved"),
        (("step", 4), [1, 2, 3], [0, 3], "step 3 is saved"),  # saved already: not a second time
        # The step is whole, its evaluation not.
        (("evaluation", 4), [1, 2, 3, 4], [0, 3, 4], "step 4 is saved"),
    ],
)
def test_a_sigterm_saves_the_last_whole_step(parts, place, logged, saved, said):
    parts.stops.add(place)
    with pytest.raises(hosts.Stopped):
        train_loop.train(config())
    assert list(parts.run.rows) == logged and parts.checkpoints.saved == saved
    assert said in parts.said[-1]
    assert "eval/rule/accuracy" not in parts.run.rows.get(4, {})
    assert parts.finished == logged, "a step is completed once"


@pytest.mark.parametrize("place, step", [(("rollout", 2), 1), (("step", 3), 2), (("evaluation", 4), 4)])
def test_a_fault_of_the_step_that_a_sigterm_ends_is_found(parts, place, step):
    """A machine that is preempted in every step would never reach a limit otherwise."""
    cfg = config()
    cfg.idle_steps = step
    parts.metrics |= {"rm/updates": 0.0, "pairs/refused_http_401": 1.0}
    parts.stops.add(place)
    with pytest.raises(hosts.RunFault, match=f"step {step}: .* no update for {step} steps"):
        train_loop.train(cfg)
    assert parts.checkpoints.saved[-1] == step and list(parts.run.rows)[-1] == step


def test_a_resumed_run_counts_faults_from_those_of_its_checkpoint(parts, monkeypatch):
    saved = []
    monkeypatch.setattr(
        train_loop, "save_checkpoint", lambda _, state, *rest: saved.append((state.step, rest[-1]))
    )
    cfg = config()
    cfg.idle_steps = 4
    parts.metrics |= {"rm/updates": 0.0, "pairs/refused_http_401": 1.0}
    parts.stops.add(("step", 4))
    with pytest.raises(hosts.Stopped):
        train_loop.train(cfg)
    step, counts = saved[-1]
    assert (step, counts["idle"], counts["refused"]) == (3, 3, {"http_401": 3})

    parts.start, parts.checkpoints.counts = 3, {"faults": counts}
    parts.stops.clear()
    with pytest.raises(hosts.RunFault, match="step 4: .* no update for 4 steps.*http_401 4"):
        train_loop.train(cfg)
    assert saved[-1][1]["idle"] == 0, "who mends the cause has all the steps again"


@pytest.mark.parametrize("steps, begun, ended", [((2, 3), 2, 3), ((5, 9), 5, 5)])
def test_a_profile_covers_its_steps(parts, monkeypatch, steps, begun, ended):
    calls = []
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda folder: calls.append((folder, len(parts.begun) + 1))
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(len(parts.begun)))
    cfg = config()
    cfg.profile = steps
    train_loop.train(cfg)
    assert calls == [(str(parts.run.path / "profile"), begun), ended]


@pytest.mark.parametrize("steps", [(3, 2), (0, 4), (1,), (1.5, 2)])
def test_a_profile_of_no_steps_is_refused(steps):
    with pytest.raises(SetupError, match="profile"):
        read_profile_steps(types.SimpleNamespace(profile=steps))
