"""Settings with values that nobody can mean are refused before anything is loaded, by their names."""

import collections
import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CASES, FAMILY_CASES

from cooper_jax.annotation.items import BALANCES
from cooper_jax.configs import tiny
from cooper_jax.evaluation.benchmark_sets import JUDGED_BY
from cooper_jax.model.families import FAMILIES
from cooper_jax.model.lora import LoraConfig
from cooper_jax.model.model_source import DTYPES
from cooper_jax.model.transformer import param_specs
from cooper_jax.reward.pairs.giveaway_probe import MIN_MEASURED
from cooper_jax.reward_training.rm_config import SELECTION_METRICS
from cooper_jax.rule.verifier import SHORT_LIMIT
from cooper_jax.runtime.mesh import AXES, is_spec
from cooper_jax.runtime.optim import DECAYS, MOMENT_TYPES
from cooper_jax.serving.serve_config import MODELS
from cooper_jax.settings import bounds
from cooper_jax.settings.config_fields import flatten_config
from cooper_jax.settings.config_files import list_shipped_configs, load_config
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import recipes
from cooper_jax.trainer.setup import read_settings

ROOT = Path(__file__).resolve().parents[1]
FIELDS = flatten_config(tiny.get_config())
BAD: dict[type, list[Any]] = {
    bool: [],
    int: [0, -1, 10**9],
    float: [0.0, -1.0, math.nan, math.inf, -math.inf, 1e30],
    str: ["", "no such word", "a\nb", "\0", "x" * 30_000],
    tuple: [(), ("x",), (math.nan, math.nan), (-1, -1), (10**9, 10**9), ((),), (1, 2, 3)],
}

# What a user may mean all the same.
ZERO = {
    "resume_step", "faults_in_a_row", "rule.memory_mb", "serve.port", "serve.max_waiting",
    "train_rm.max_characters",
    "reward.rollout_rows", "log.samples", "steps", "supervised.policy_steps", "supervised.reward_steps",
}  # fmt: skip
ZERO_ENDS = (
    "every", "keep", "retries", "warmup_steps", "reward_rows", "samples_every", "giveaway_every", "show_samples",
    "idle_steps",
)  # fmt: skip
REAL_ZERO_ENDS = (
    "temperature", "clip_high", "clip_low", "dual_clip", "kl_clamp", "kl_coef", "b1", "b2", "lr", "weight_decay",
    "std_eps", "step_budget", "shutdown_timeout", "policy_corrupt",
)  # fmt: skip
EMPTY_ENDS = ("key_env", "weights", "lora.targets", "log.to")
# Names, texts, paths and addresses; those that a run reads are looked for later.
WORD_ENDS = (
    "model", "tokenizer", "url", "weights", "fields", "format", "split", "instruction", "question_key",
    "reference_key", "solution_key", "system", "tfds_dir", "name", "lora.targets", "run_dir", "host", "key_env",
    "policy_name", "reward_name", "reward_data", "reward_from", "start_from", "train_rm.data", "train_rm.eval_data",
)  # fmt: skip
TEXTS = ("data.instruction", "data.system")


def is_meant(name: str, value: Any) -> bool:
    """True if a user may mean this value of a field."""
    if isinstance(value, str):
        if name in TEXTS:
            return True
        return name.endswith({"": EMPTY_ENDS, "no such word": WORD_ENDS}.get(value, ()))
    if isinstance(value, float):
        return value == 0 and name.endswith(REAL_ZERO_ENDS)
    if value == 0:
        return name in ZERO or name.endswith(ZERO_ENDS)
    if value == ():
        return name in ("mesh.rules", "mesh.rollout_rules")  # everything is replicated
    return value == 10**9 and name in ("seed", "train_rm.max_characters")


def list_cases() -> list[tuple[str, Any]]:
    """Every field with every bad value of its type, but for those that it has."""
    return [(name, bad) for name, value in FIELDS.items() for bad in BAD[type(value)] if bad != value]


def read(changes: dict[str, Any]) -> None:
    """Do what launch/train.py does before it loads anything."""
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict(changes)
    bounds.check_bounds(cfg)
    recipes.apply_presets(cfg, changes)
    read_settings(cfg)


def try_case(name: str, value: Any) -> bool:
    """Read a config with a bad value: True if it was refused, in lines that name the field."""
    try:
        read({name: value})
    except SetupError as error:
        lines = "\n".join(error.messages)
        assert len(lines.splitlines()) == len(error.messages) and len(lines) < 2000, (name, value, lines)
        section, _, leaf = name.rpartition(".")
        # `data.format` decides which other settings are needed.
        named = name in lines or (section in lines and leaf in lines) or name == "data.format"
        assert named, (name, value, lines)
        return True
    assert is_meant(name, value), f"{name}={value!r:.50} passes in silence"
    return False


def test_every_field_has_a_bound_and_every_shipped_config_keeps_it():
    assert bounds.BOUNDS.keys() == FIELDS.keys()
    for name in list_shipped_configs():
        bounds.check_bounds(load_config(name))


def test_numbers_that_nobody_means_are_out_of_bounds():
    """Of every field, by the table alone; the slow test below asks all that launch/train.py asks."""
    missed = [
        (name, value)
        for name, value in list_cases()
        if not isinstance(value, str) and not is_meant(name, value) and bounds.BOUNDS[name].accepts(value)
    ]
    # Wrong beside other settings alone: the table knows no relations.
    assert {name for name, _ in missed} <= {
        "mesh.data", "mesh.fsdp", "mesh.tensor", "pairs.negatives", "reward.pair_weight", "rollout.temperature",
    }  # fmt: skip


@pytest.mark.slow
def test_no_bad_value_passes_in_silence():
    count: collections.Counter[bool] = collections.Counter()
    for name, value in list_cases():
        count[try_case(name, value)] += 1
    print(f"{count.total()} cases: {count[True]} refused, {count[False]} that a user may mean")
    assert count[True] > 1000


def test_a_name_may_group_runs():
    for name in ("tiny", "exp/one", "a..b", "exp/.hidden"):
        assert bounds.BOUNDS["name"].accepts(name), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.kv_dtype": "int3"}, "rollout.kv_dtype='int3': it is one of float32, bfloat16, int8"),
        ({"eval.top_p": 0.0}, "eval.top_p=0.0: it must be above 0 and at most 1"),
        ({"rollout.group_size": 1}, "rollout.group_size=1: .*set it to 2 or more"),
        ({"policy.optimiser.lr": math.inf}, "policy.optimiser.lr=inf: it must be at least 0 and at most 10"),
        ({"reward.optimiser.lr": math.nan}, "reward.optimiser.lr=nan"),
        ({"policy.optimiser.lr": -1e-6}, "policy.optimiser.lr=-1e-06"),
        ({"rule.workers": 10**6}, "rule.workers=1000000: it must be at least 1 and at most 1024"),
        ({"steps": -1}, "steps=-1: it must be at least 0"),
        ({"rollout.temperature": 0.0}, "rollout.temperature=0.0: training samples"),
        ({"rollout.temperature": -1.0}, "rollout.temperature=-1.0: it must be at least 0"),
        ({"data.prompts_per_step": 0}, "data.prompts_per_step=0: it must be at least 1"),
        ({"policy.weights": ""}, "policy.weights is empty: give --config.policy.weights"),
        (
            {"policy.arch.layers": 10**9},
            "policy.arch.layers=1000000000: it must be at least 1 and at most 1024",
        ),
        ({"name": ""}, "name='': it must be text of 1 to 200 characters"),
        ({"name": "/tmp/run"}, "name='/tmp/run': it must be text of 1 to 200 characters, a path without"),
        ({"name": "exp/../run"}, "name='exp/../run': it must be text of 1 to 200 characters, a path without"),
        ({"mesh.rules": (("embd", "fsdp"),)}, "mesh.rules=.*it must be pairs of one of batch"),
        (
            {"assistant.kind": "openai", "assistant.model": "m", "assistant.url": "htp:/nonsense"},
            "assistant.url='htp:/nonsense': it must begin with http",
        ),
    ],
)
def test_slips_of_the_finger_are_refused(changes, message):
    with pytest.raises(SetupError, match=message) as error:
        read(changes)
    assert all("\n" not in line for line in error.value.messages)


def test_a_bad_address_is_not_repeated():
    """It may hold a password."""
    with pytest.raises(SetupError) as error:
        read({"judge.url": "http://me:secret@host\n/v1"})
    assert "secret" not in str(error.value) and "judge.url" in str(error.value)


def test_the_command_line_lists_all_errors_and_ends_with_2(tmp_path):
    """In a process of its own: nothing is loaded, no run directory is made."""
    flags = [
        "--config.rollout.kv_dtype=int3", "--config.eval.top_p=0", "--config.rollout.group_size=1",
        "--config.policy.optimiser.lr=inf", "--config.rule.workers=1000000", "--config.steps=-1",
        "--config.benchmark.temperature=nan",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "launch/train.py", "--config=tiny", f"--config.run_dir={tmp_path / 'run'}", *flags],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    for flag in flags:
        name = flag.removeprefix("--config.").partition("=")[0]
        if name not in (
            "rollout.kv_dtype",
            "rollout.group_size",
        ):  # found in a second look, at the other settings
            assert any(name in line for line in lines), (name, done.stderr)
    assert not (tmp_path / "run").exists()


def test_words_and_limits_are_those_of_the_code():
    rules = bounds.BOUNDS
    choices = {
        "policy.optimiser.decay": DECAYS,
        "policy.optimiser.first_moment": MOMENT_TYPES,
        "policy.dtype": DTYPES,
        "policy.arch.family": FAMILIES,
        "annotate.balance": BALANCES,
        "benchmark.judged_by": JUDGED_BY,
        "train_rm.keep_best": SELECTION_METRICS,
        "serve.models": MODELS,
    }
    for name, words in choices.items():
        assert set(rules[name].choices) == set(words), name
    assert rules["rule.timeout"].low == SHORT_LIMIT and rules["log.giveaway_pairs"].low == MIN_MEASURED


def test_sharding_rules_name_the_axes_that_there_are():
    import jax

    lora = LoraConfig(2, 1.0, ("q_proj",), False, "float32")
    configs = [*CASES.values(), *FAMILY_CASES.values(), dataclasses.replace(CASES["llama_tied"], lora=lora)]
    used = {"batch"}
    for config in configs:
        for head in ("logits", "score"):
            for spec in jax.tree.leaves(param_specs(config, head), is_leaf=is_spec):
                used |= {axis for axis in spec.axes if axis is not None}
    assert used == set(bounds._LOGICAL_AXES) and set(AXES) == set(bounds._MESH_AXES)
