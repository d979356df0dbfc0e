"""Models of runs, read from their checkpoints: configs put together, policies and reward models evaluated."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny_hub
from test_evaluation import SHRUNK, read_rows, write_rows
from tiny_runs import ROOT, environment

from cooper_jax.configs import base, tiny
from cooper_jax.data import seen_questions
from cooper_jax.evaluation import attack_jobs, benchmark_jobs, judge_jobs
from cooper_jax.evaluation.evaluated_models import ChosenModels
from cooper_jax.evaluation.evaluation_ledger import ITEMS, RESULTS
from cooper_jax.reward import calibration
from cooper_jax.runtime import device_layouts, output_folder
from cooper_jax.runtime.checkpoint import Checkpoints
from cooper_jax.runtime.run_directory import RunDirectory
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import run_checkpoint
from cooper_jax.trainer.resume import start_or_resume
from cooper_jax.trainer.run_problems import load_problems
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.setup import build_components


@pytest.fixture(scope="module")
def devices():
    patch = pytest.MonkeyPatch()
    found = jax.devices()[:2]
    patch.setattr(jax, "devices", lambda *_: found)
    yield found
    patch.undo()


@pytest.fixture(scope="module")
def run(tmp_path_factory, devices):
    """(a run's directory with step 0, its policy's embedding)."""
    path = tmp_path_factory.mktemp("run")
    cfg = tiny.get_config()
    more = {"data.synthetic_size": 8, "data.instruction": " Think .", "supervised.policy_steps": 0,
            "supervised.reward_steps": 0, "log.to": "", "policy.microbatch": 4}  # fmt: skip
    cfg.update_from_flattened_dict(SHRUNK | more)
    with (
        build_components(cfg, path) as (components, state),
        RunDirectory(path, cfg, resume=True) as opened,
        Checkpoints(path, keep=0) as checkpoints,
    ):
        state = start_or_resume(components, state, opened, checkpoints)
        checkpoints.wait()
        embed = np.asarray(state.policy.params["embed"])
    return path, embed


def chosen_of(path, **flags) -> ChosenModels:
    flags = {name.replace("__", "."): value for name, value in flags.items()}
    keep = {name: value for name, value in SHRUNK.items() if name.split(".")[0] in ("benchmark", "mesh")}
    return ChosenModels(
        run_checkpoint.overlay_run(base.get_config(), run_checkpoint.read_run_config(path), keep | flags),
        path,
        path,
        0,
    )


def test_a_run_says_what_its_models_are_and_the_command_line_the_rest(run):
    cfg = chosen_of(run[0], policy__dtype="bfloat16", rule__workers=1).cfg
    assert (cfg.name, cfg.policy.arch.width, cfg.data.instruction) == ("tiny", 16, " Think .")
    assert (cfg.policy.dtype, cfg.reward.dtype, cfg.rule.workers) == ("bfloat16", "float32", 1)
    assert cfg.pairs == base.get_config().pairs  # no part of a model
    stored = run_checkpoint.read_run_config(run[0])
    del stored.policy["remat"]
    mixed = run_checkpoint.overlay_run(base.get_config(), stored, {})
    assert mixed.policy.remat is base.get_config().policy.remat


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c["reward"].update(abandoned=1),
            r"earlier version of this project \(it has reward.abandoned\)",
        ),
        (
            lambda c: c.pop("format"),
            r"earlier version of this project \(its format is not stated, this one reads 1\)",
        ),
        (lambda c: c.update(format=0), "earlier version"),
        (lambda c: c.update(format=99), r"later version of this project \(format 99, this one reads 1\)"),
    ],
)
def test_a_run_of_another_version_is_refused(change, message, run, tmp_path):
    stored = json.loads((run[0] / "config.json").read_text())
    change(stored)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=message) as error:
        run_checkpoint.read_run_config(tmp_path)
    assert "new run directory" in str(error.value) and "\n" not in str(error.value)


def test_a_runs_models_are_loaded_at_a_step(run, devices):
    path, embed = run
    cfg = chosen_of(path).cfg
    layout = device_layouts.make_policy_layout(cfg)
    model, params, step = run_checkpoint.load_run_model(path, cfg, "policy", layout)
    assert step == 0 and model.tokenizer.vocab_size <= len(embed)
    np.testing.assert_array_equal(np.asarray(params["embed"]), embed)
    with pytest.raises(FileNotFoundError, match=r"checkpoints are \[0\]"):
        run_checkpoint.load_run_model(path, cfg, "policy", layout, step=3)
    with pytest.raises(FileNotFoundError, match="no run directory of launch/train.py"):
        run_checkpoint.read_run_config(path / "checkpoints")


@pytest.mark.parametrize("calibrated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_runs_calibration_is_read_and_exported(calibrated, run, tmp_path):
    """The one in its directory, and only if its rewards were calibrated."""
    path = tmp_path / "run"
    shutil.copytree(run[0], path)
    stored = json.loads((path / "config.json").read_text())
    stored["reward"]["calibrated"] = calibrated
    (path / "config.json").write_text(json.dumps(stored))
    fitted = calibration.Calibration(0.5, 0.25, 9, 4, 0.1, 0.1, None)
    calibration.write_calibration(path, fitted)
    assert chosen_of(path).read_calibration() == (fitted if calibrated else None)
    assert ("reward.threshold" in chosen_of(path).settings("reward")) == calibrated

    done = subprocess.run(
        [sys.executable, str(ROOT / "launch/export.py")]
        + [f"--run_dir={path}", "--model=reward", f"--out={tmp_path / 'out'}"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / calibration.CALIBRATION).exists() == calibrated
    if calibrated:
        assert calibration.read_calibration(tmp_path / "out") == fitted


def export(path, out, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/export.py"), f"--run_dir={path}", f"--out={out}", *flags],
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.slow
def test_an_export_is_pushed_by_flag_alone(run, tmp_path):
    token, out = "hf_secretsecretsecret", tmp_path / "policy"
    with tiny_hub.UploadServer() as server:
        hub = {"HF_ENDPOINT": server.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        done = export(run[0], out, **hub)
        assert done.returncode == 0 and not server.requests, done.stderr
        assert f"{out}: the policy model of step 0, with a model card (README.md)" in done.stdout

        done = export(run[0], out, "--push=team/solver", "--private", "--license=mit", **hub)
        assert done.returncode == 0, done.stderr
    assert f"pushed to {server.url}/team/solver" in done.stdout
    # The card is checked without a token.
    assert server.tokens == {f"Bearer {token}", ""} and server.created == {"team/solver": True}
    assert server.metadata == [(out / "README.md").read_text()]
    assert server.messages == ["The policy model of step 0 of tiny"]
    assert server.files["team/solver"] == {p.name: p.read_bytes() for p in out.iterdir()}
    card = server.files["team/solver"]["README.md"].decode()
    assert "license: mit" in card and 'from_pretrained("team/solver")' in card
    assert not any(token.encode() in content for content in server.files["team/solver"].values())


@pytest.mark.slow
def test_a_push_that_is_refused_leaves_the_directory(run, tmp_path):
    with tiny_hub.UploadServer(refuses=True) as server:
        hub = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_x", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        done = export(run[0], tmp_path / "policy", "--push=team/solver", **hub)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "--push=team/solver: " in said and "403" in said and "hf upload team/solver" in said
    assert (tmp_path / "policy" / "model.safetensors").exists()

    # What cannot succeed is refused before anything is written.
    done = export(run[0], tmp_path / "other", "--push=solver", HF_TOKEN="", HF_HUB_OFFLINE="0")
    assert done.returncode == 2 and not (tmp_path / "other").exists()
    assert "--push=solver: write NAMESPACE/NAME" in done.stderr and "set HF_TOKEN" in done.stderr


@pytest.mark.slow
def test_a_run_is_evaluated(run, devices, tmp_path):
    """Its policy on its held-out problems, by its own reward model; then the reward model itself."""
    path = run[0]
    chosen = chosen_of(path, benchmark__judged_by="both", reward__max_tokens=200)
    benchmark_jobs.evaluate_benchmarks(chosen.cfg, chosen, ["synthetic"], tmp_path / "policy")
    rows = read_rows(tmp_path / "policy" / ITEMS)
    assert len(rows) == 6 and {r["rule"] for r in rows} <= {"wrong", "no_answer", "unrecognised", "correct"}
    settings = json.loads((tmp_path / "policy" / output_folder.SETTINGS).read_text())
    assert (settings["policy.step"], settings["reward.step"], settings["data.instruction"]) == (
        0,
        0,
        " Think .",
    )
    saw = json.loads((tmp_path / "policy" / RESULTS).read_text())["reward_model_saw"]
    assert saw == {"synthetic": 8}  # in the cooper arm, its training problems

    loaded = load_problems(RunSettings.from_config(chosen.cfg))
    seen, unseen = loaded.train, loaded.held_out
    labelled = [
        {
            "question": p.question,
            "reference_answer": p.reference,
            "completion": f"#### {said}",
            "label": label,
        }
        for p in (seen[0], unseen[0])
        for said, label in ((p.reference, 1), ("5000", 0))
    ]
    file = write_rows(tmp_path / "labelled.jsonl", *labelled)
    judge_jobs.compare_judges(chosen.cfg, chosen, str(file), tmp_path / "judged", names=["model"])
    judged = read_rows(tmp_path / "judged" / ITEMS)
    assert {seen_questions.normalise_question(r["question"]) for r in judged} == {
        seen_questions.normalise_question(unseen[0].question)
    }
    with pytest.raises(SetupError, match="one reward model twice"):
        attack_jobs.measure_attacks(chosen.cfg, chosen, str(file), tmp_path / "attacked", [chosen])
