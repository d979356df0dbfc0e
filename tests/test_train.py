"""The whole loop, as a user starts it: `python launch/train.py` in a process of its own."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import report_runs
from tiny_models import one_device
from tiny_runs import ROOT, assert_refused, command, environment, metrics, run, timeless

from cooper_jax.data import seen_questions
from cooper_jax.model import transformer
from cooper_jax.model.config import ModelConfig

# Runs of minutes.  tests/test_runs.py has a run of seconds.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One uninterrupted run, which several tests look at."""
    path = tmp_path_factory.mktemp("run") / "whole"
    done = run(path)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def test_run_directory(finished):
    start, *rows = metrics(finished)
    assert start["step"] == 0 and all(name == "step" or name.startswith(("eval/", "time/")) for name in start)
    assert {"eval/oracle/accuracy", "eval/oracle/accuracy_words", "eval/rm_balanced/accuracy"} <= start.keys()
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in (
        "policy/loss policy/kl policy/entropy policy/clip_low policy/grad_norm policy/lr policy/ratio_mean "
        "reward/mean reward/std reward/zero_variance_groups rule/accuracy rule/unrecognised rm/pair_loss "
        "rm/margin rm/accuracy rm/common_push rm/updates rm/false_positive_rate rm/false_negative_rate "
        "rm/grad_norm pairs/valid_share "
        "response/tokens_mean response/truncated time/rollout time/policy time/tokens_per_second "
        "oracle/accuracy"
    ).split():
        assert all(name in row for row in rows), name
    assert "eval/rule/accuracy" in rows[1] and "eval/rule/accuracy" not in rows[0]
    assert all(row["policy/ratio_mean"] == 1.0 and row["policy/clip_low"] == 0.0 for row in rows)
    assert rows[1]["policy/kl"] > 0, "the reference moves with the policy"
    assert sum(row["pairs/valid"] for row in rows) > 0, "no pair ever updated the reward model"
    phases = [json.loads(line) for line in (finished / "supervised.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in phases} == {"policy", "reward"}
    losses = [row["loss"] for row in phases if row["phase"] == "policy"]
    assert len(losses) > 100 and losses[-1] < losses[0]
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert {"question", "reference", "responses", "pairs"} <= samples[0].keys()
    assert {"text", "verdict", "reward", "advantage"} <= samples[0]["responses"][0].keys()
    config = json.loads((finished / "config.json").read_text())
    assert config["rollout"]["group_size"] == 4
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["0", "2", "4"]
    assert list((finished / "tensorboard").glob("events.*"))


def test_a_report_shows_the_run(finished):
    (shown,) = report_runs.encode(finished)["runs"]
    assert shown["truth"] == "eval/oracle/accuracy" and shown["summary"]["done"] == 4
    assert {"reward/mean", "eval/oracle/accuracy", "confusion/undecided"} <= shown["series"]["curves"].keys()
    assert {"rollout", "policy", "reward"} <= dict(shown["phases"]["phases"]).keys()
    samples = shown["samples"]["samples"]
    assert [sample["step"] for sample in samples] == [1, 1, 2, 2, 3, 3, 4, 4]
    for response in samples[0]["responses"]:
        assert response["score"] == response["reward"] and isinstance(response["truth"], bool)


def test_stopped_and_resumed_run_equals_the_whole(finished, tmp_path):
    """k steps, a restart and n - k steps: every metric is equal, bit for bit."""
    path = tmp_path / "parts"
    first = run(path, steps=2, supervised__start_from=finished)
    assert first.returncode == 0, first.stderr
    second = run(path, supervised__start_from=finished)
    assert second.returncode == 0, second.stderr
    assert "resumed from step 2" in second.stdout + second.stderr
    assert timeless(metrics(path)) == timeless(metrics(finished))
    whole, parts = ((p / "samples.jsonl").read_text() for p in (finished, path))
    assert whole == parts


@pytest.mark.parametrize("moment", ["between", "during"])
def test_killed_run_resumes_and_equals_the_whole(finished, tmp_path, moment):
    """SIGKILL between two checkpoints, and while one is being written."""
    path = tmp_path / moment
    process = subprocess.Popen(
        command(path, supervised__start_from=finished),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder, log = path / "checkpoints", path / "metrics.jsonl"

    def reached() -> bool:
        if moment == "between":
            return log.exists() and log.read_text().count("\n") >= 3
        # Orbax writes into a temporary sibling and renames it.
        return folder.exists() and any(p.name.startswith("2") and p.name != "2" for p in folder.iterdir())

    deadline = time.monotonic() + 300
    while not (seen := reached()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert seen and process.poll() is None, f"the run ended before the moment {moment!r} was seen"
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run(path, supervised__start_from=finished)
    assert done.returncode == 0, done.stderr
    assert timeless(metrics(path)) == timeless(metrics(finished))


def weights_of(path: Path, step: int, item: str) -> list[np.ndarray]:
    """A model's parameters at a step, read without any of the run's code."""
    tree = ocp.StandardCheckpointer().restore(path / "checkpoints" / str(step) / item)
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> list[bool]:
    return [x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)]


def test_who_moves(finished):
    """The policy and the reward model move, every parameter of them; the reference is the policy of step 0."""
    reference = [
        np.asarray(x) for x in jax.tree.leaves(ocp.StandardCheckpointer().restore(finished / "reference"))
    ]
    assert all(equal(reference, weights_of(finished, 0, "policy")))
    assert not any(equal(reference, weights_of(finished, 4, "policy")))
    assert not any(equal(*(weights_of(finished, step, "reward") for step in (0, 4))))


def our_outputs(run_dir: Path, out: Path, model: str, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Logits f32[N, S, V] or scores f32[N] of a checkpoint's parameters, in the shape that an export declares."""
    config = ModelConfig.from_hf(json.loads((out / "config.json").read_text()))
    params = ocp.StandardCheckpointer().restore(run_dir / "checkpoints/4" / model)
    hidden = transformer.hidden_states(
        params, config, jnp.asarray(tokens), jnp.asarray(valid), dtype=jnp.float32, layout=one_device()
    )
    if model == "policy":
        return np.asarray(transformer.compute_logits(params, config, hidden))[..., : config.vocab_size]
    return np.asarray(transformer.score_last_token(params, config, hidden, jnp.asarray(valid)))


def test_export_loads_in_transformers(finished, tmp_path):
    """What transformers computes from an exported directory is what the run's own parameters give."""
    torch = pytest.importorskip("torch")
    import transformers

    tokens = np.random.default_rng(0).integers(5, 600, (3, 9))
    valid = np.arange(9)[None, :] < np.array([9, 4, 7])[:, None]

    for model, kind in (
        ("policy", transformers.AutoModelForCausalLM),
        ("reward", transformers.AutoModelForSequenceClassification),
    ):
        out = tmp_path / model
        done = subprocess.run(
            [sys.executable, str(ROOT / "launch/export.py")]
            + [f"--run_dir={finished}", f"--model={model}", f"--out={out}"],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        # What a reward model was trained on goes with it; its pairs are of the training problems.
        assert (out / seen_questions.SEEN).exists() == (model == "reward")
        assert seen_questions.read_record(out) == (
            seen_questions.read_record(finished) if model == "reward" else None
        )
        loaded, report = kind.from_pretrained(out, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        ids = np.where(valid, tokens, loaded.config.pad_token_id)
        with torch.no_grad():
            theirs = loaded(torch.tensor(ids), attention_mask=torch.tensor(valid)).logits.numpy()
        ours = our_outputs(finished, out, model, ids, valid)
        theirs, ours = (theirs[valid], ours[valid]) if model == "policy" else (theirs[:, 0], ours)
        np.testing.assert_allclose(theirs, ours, atol=1e-4)


def test_arms(finished, tmp_path):
    """Rule: no reward model at all.  Model: it scores and never moves."""
    rule, model = tmp_path / "rule", tmp_path / "model"
    for path, arm in ((rule, "rule"), (model, "model")):
        done = run(path, reward__arm=arm, steps=2, supervised__start_from=finished)
        assert done.returncode == 0, done.stderr
    rows = {path: metrics(path)[1:] for path in (rule, model)}  # step 0 is an evaluation alone
    assert all("rm/mean" not in row for row in rows[rule])
    assert not (rule / "checkpoints/2/reward").exists()
    assert all(row["reward/mean"] == pytest.approx(row["rule/accuracy"]) for row in rows[rule])
    assert all("rm/pair_loss" not in row and row["pairs/valid"] == 0 for row in rows[model])
    assert all(equal(*(weights_of(model, step, "reward") for step in (0, 2))))
    # Until the first update of the reward model the arms are the same run.
    assert rows[model][0]["rm/mean"] == metrics(finished)[1]["rm/mean"]


def test_mesh_of_four_devices_learns_the_same(tmp_path):
    """data 2 x tensor 2: the first step's figures, before rounding can grow."""
    short = dict(steps=1, supervised__policy_steps=3, supervised__reward_steps=2, eval__every=0)
    for name, devices, mesh in (
        ("one", 1, {}),
        ("four", 4, dict(mesh__data=2, mesh__fsdp=1, mesh__tensor=2)),
    ):
        done = run(tmp_path / name, devices=devices, **short, **mesh)
        assert done.returncode == 0, done.stderr
    one, four = (metrics(tmp_path / name)[0] for name in ("one", "four"))
    for name in ("policy/grad_norm", "policy/entropy", "rm/mean", "reward/mean"):
        assert four[name] == pytest.approx(one[name], rel=0.05), name


# --- what is refused, and loses nothing ------------------------------------------------------------------------


def test_weights_that_do_not_fit_the_config(finished, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (tokenizer,) = finished.glob("tokenizer_*.model")
    words = ("error:", "policy.weights", "gpt2")
    assert_refused(tmp_path / "r", *words, policy__weights=folder, policy__tokenizer=tokenizer)


def test_changed_config_is_refused_and_loses_nothing(finished):
    before = (finished / "metrics.jsonl").read_bytes()
    assert_refused(finished, "error:", "clip_low", policy__clip_low=0.3)
    assert_refused(finished, "error:", "resume", resume=False)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_assistant_that_is_down_masks_its_pairs(finished, tmp_path):
    """A closed port: the run goes on, no pair is made, and the log says why."""
    path = tmp_path / "down"
    done = run(
        path,
        steps=6,  # the policy solves few problems, and a prompt without a correct response asks for no rewrite
        supervised__start_from=finished,
        assistant__kind="openai",
        assistant__url="http://127.0.0.1:9/v1",
        assistant__model="nobody",
        assistant__probe=False,
        assistant__retries=0,
        pairs__tries=1,
        eval__every=0,
    )
    assert done.returncode == 0, done.stderr
    rows = metrics(path)
    assert all(row["pairs/valid"] == 0 and row["rm/grad_norm"] == 0 for row in rows)
    assert any("assistant_" in name and value > 0 for row in rows for name, value in row.items())
