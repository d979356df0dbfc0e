"""Configs: sections as typed settings; files change declared fields alone; a misspelt flag is an error."""

import ast
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cooper_jax.configs import base, tiny
from cooper_jax.data.data_config import DataConfig
from cooper_jax.llm.chat import ChatConfig
from cooper_jax.model.lora import LoraConfig
from cooper_jax.model.model_source import ArchConfig, ModelSource
from cooper_jax.policy.losses import PolicyConfig
from cooper_jax.reward.assistants import RewriteConfig
from cooper_jax.reward.pairs.pair_task import PairsConfig
from cooper_jax.reward.reward_losses import RewardUpdateConfig
from cooper_jax.rollout.rollout_config import RolloutConfig
from cooper_jax.rule.verifier import RuleConfig
from cooper_jax.runtime.device_layouts import MeshConfig
from cooper_jax.runtime.optim import OptimiserConfig
from cooper_jax.serving.serve_config import ServeConfig
from cooper_jax.settings import typed_config
from cooper_jax.settings.config_fields import flatten_config
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.loop_config import (
    CheckpointConfig,
    EvalConfig,
    FaultConfig,
    GuardConfig,
    LogConfig,
    SupervisedConfig,
)
from cooper_jax.trainer.rewards import RewardConfig
from cooper_jax.trainer.run_settings import RunSettings

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")
FieldPath = tuple[str, ...]


def sections_and_leaves(config: ConfigDict, prefix: FieldPath = ()) -> tuple[set[FieldPath], set[FieldPath]]:
    """The paths of a config's sections (the whole one is ()) and of its leaves."""
    sections, leaves = {prefix}, set()
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            below = sections_and_leaves(value, (*prefix, name))
            sections, leaves = sections | below[0], leaves | below[1]
        else:
            leaves.add((*prefix, name))
    return sections, leaves


# Section -> the typed configs that read it; "" is the part outside all sections.
MODEL = (ModelSource,)
TYPED = {
    "": (
        RunSettings,
        FaultConfig,
        GuardConfig,
    ),
    "data": (DataConfig,),
    "rollout": (RolloutConfig,),
    "policy": (PolicyConfig, *MODEL),
    "policy.arch": (ArchConfig,),
    "policy.lora": (LoraConfig,),
    "policy.optimiser": (OptimiserConfig,),
    "reward": (RewardConfig, RewardUpdateConfig, *MODEL),
    "reward.arch": (ArchConfig,),
    "reward.lora": (LoraConfig,),
    "reward.optimiser": (OptimiserConfig,),
    "pairs": (PairsConfig,),
    "rule": (RuleConfig,),
    "assistant": (ChatConfig, RewriteConfig, *MODEL),
    "assistant.arch": (ArchConfig,),
    "judge": (ChatConfig, *MODEL),
    "judge.arch": (ArchConfig,),
    "source": (ChatConfig, *MODEL),
    "source.arch": (ArchConfig,),
    "supervised": (SupervisedConfig,),
    "supervised.policy_optimiser": (OptimiserConfig,),
    "supervised.reward_optimiser": (OptimiserConfig,),
    "train_rm.optimiser": (OptimiserConfig,),
    "mesh": (MeshConfig,),
    "eval": (EvalConfig,),
    "checkpoint": (CheckpointConfig,),
    "log": (LogConfig,),
    "serve": (ServeConfig,),
}
# Section -> the reason for which it has no typed config.
UNTYPED = {
    "annotate": "read by launch/annotate.py alone, in annotation/pipeline.py",
    "train_rm": "read by launch/train_rm.py alone, in reward_training/rm_setup.py",
    "benchmark": "read by launch/evaluate.py alone, in evaluation/benchmark_jobs.py",
}


def find_untyped_fields(config: ConfigDict) -> list[str]:
    """The fields that are no field of a typed config, but for those of the sections in UNTYPED."""
    found = []
    for path in sections_and_leaves(config)[1]:
        section, field = ".".join(path[:-1]), path[-1]
        typed = {f.name for cls in TYPED.get(section, ()) for f in dataclasses.fields(cls)}
        if section not in UNTYPED and field not in typed:
            found.append(".".join(path))
    return sorted(found)


def test_every_field_is_typed():
    config = base.get_config()
    assert find_untyped_fields(config) == []
    config.eval.evry, config.extra = 3, ConfigDict({"field": 1})
    assert find_untyped_fields(config) == ["eval.evry", "extra.field"]
    sections = {".".join(path) for path in sections_and_leaves(base.get_config())[0]}
    assert {*TYPED, *UNTYPED} == sections


def test_every_field_is_read():
    """As an attribute or a key, somewhere in the code; a name that several sections share counts for all."""
    files = [p for folder in ("cooper_jax", "launch") for p in (ROOT / folder).rglob("*.py")]
    named = set(re.findall(r"""[."'](\w+)\b""", "\n".join(p.read_text() for p in files)))
    assert [
        ".".join(path) for path in sections_and_leaves(base.get_config())[1] if path[-1] not in named
    ] == []


@dataclasses.dataclass(frozen=True)
class Some:
    lr: float
    b1: float
    name: str = ""


def test_a_typed_config_is_read_from_its_section():
    section = base.optimiser(lr=0.5, warmup_steps=0)
    assert typed_config.read_section(Some, section, "policy.optimiser", name="x") == Some(0.5, 0.9, "x")
    assert hash(RunSettings.from_config(tiny.get_config())) == hash(
        RunSettings.from_config(tiny.get_config())
    )
    del section["b1"]
    with pytest.raises(SetupError, match=r"policy\.optimiser\.b1 is missing: configs/base\.py declares it"):
        typed_config.read_section(Some, section, "policy.optimiser", name="x")


def test_all_problems_of_all_sections_are_reported_at_once():
    cfg = tiny.get_config()
    cfg.reward.arm, cfg.pairs.tries, cfg.pairs.negatives = "copper", 0, ("swop",)
    cfg.policy.clip_low, cfg.policy.optimiser.lr, cfg.supervised.reward_optimiser.eps = (
        float("nan"),
        -1.0,
        0.0,
    )
    with pytest.raises(SetupError) as caught:
        RunSettings.from_config(cfg)
    begun = (
        "policy.clip_low=nan: it must be at least 0", "reward.arm is 'copper'", "pairs.tries=0: it must be",
        "pairs.negatives=('swop',)", "policy.optimiser.lr=-1.0", "supervised.reward_optimiser.eps=0.0",
    )  # fmt: skip
    problems = caught.value.messages
    assert len(problems) == len(begun)
    assert all(any(problem.startswith(words) for problem in problems) for words in begun)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("data.bucket", 0, "data.bucket=0: it must be at least 1"),
        ("data.train", "some.jsonl", "data.format=synthetic reads no file"),
        ("data.format", "auto", "data.train is empty: give --config.data.train=FILE"),
        ("rollout.group_size", 0, "rollout.group_size=0: it must be at least 1"),
        ("rollout.kernels", "triton", "rollout.kernels='triton': it is one of auto, xla"),
        ("rollout.weight_placement", "cut", "rollout.weight_placement='cut': it is one of auto, gathered"),
        ("rollout.kv_dtype", "int4", "rollout.kv_dtype='int4': it is one of float32, bfloat16, int8"),
        ("policy.dtype", "float16", "policy.dtype='float16': it is one of float32, bfloat16"),
        ("assistant.vocab_multiple", 0, "assistant.vocab_multiple=0: it must be at least 1"),
        ("reward.max_tokens", 0, "reward.max_tokens=0: it must be at least 1"),
        ("supervised.reward_batch", 3, "supervised.reward_batch=3: it must be even"),
        ("eval.top_p", 0.0, "eval.top_p=0.0: it must be above 0"),
        ("checkpoint.every", 0, "checkpoint.every=0: it must be at least 1"),
        ("log.samples", -1, "log.samples=-1: it must be at least 0"),
        ("steps", -1, "steps=-1: it must be at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused(field, value, message):
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict({field: value})
    with pytest.raises(SetupError, match=re.escape(message)) as caught:
        RunSettings.from_config(cfg)
    assert len(caught.value.messages) == 1


def test_an_assistant_that_nobody_asks_need_not_be_complete():
    cfg = tiny.get_config()
    cfg.assistant.kind = "openai"
    with pytest.raises(SetupError, match="set --config.assistant.url\n"):
        RunSettings.from_config(cfg)
    assert RunSettings.from_config(cfg, with_assistant=False).assistant is None
    cfg.reward.arm = "rule"
    assert RunSettings.from_config(cfg).assistant is None


@pytest.mark.parametrize("name", FILES)
def test_files_change_declared_fields_alone(name):
    """base.py declares; the others may not add a field, nor change a field's type (the lock does not see that)."""
    ours, declared = importlib.import_module(f"cooper_jax.configs.{name}").get_config(), base.get_config()
    assert sections_and_leaves(ours) == sections_and_leaves(declared)
    for path in sections_and_leaves(declared)[1]:
        value, default = ours, declared
        for part in path:
            value, default = value[part], default[part]
        assert default is not None and type(value) is type(default), path
    assert name == ours.name, "a run directory is named after its config"
    assert importlib.import_module(f"cooper_jax.configs.{name}").__doc__


def find_repeated_values(name: str) -> list[str]:
    """The fields that a config file sets to the value that they have already."""
    tree = ast.parse((ROOT / "configs" / f"{name}.py").read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assignments = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    # The first line is `c = PARENT.get_config()`.
    parent = ast.unparse(assignments[0].value).partition(".")[0]
    values = flatten_config(importlib.import_module(f"cooper_jax.configs.{parent}").get_config())

    found = []
    for node in assignments[1:]:
        fields = [ast.unparse(target).removeprefix("c.") for target in node.targets]
        if isinstance(node.value, ast.Constant | ast.Tuple):
            value = ast.literal_eval(node.value)
            found += [f"{field} = {value!r}" for field in fields if values.get(field, ...) == value]
    return found


@pytest.mark.parametrize("name", [name for name in FILES if name != "base"])
def test_files_set_only_what_differs(name):
    assert find_repeated_values(name) == []


def test_sections_are_not_shared():
    """A section that stands in two places must not be one object: a change would reach both."""
    seen = {}

    def walk(section, path):
        for name, value in section.items():
            if isinstance(value, ConfigDict):
                assert id(value) not in seen, (seen[id(value)], f"{path}{name}")
                seen[id(value)] = f"{path}{name}"
                walk(value, f"{path}{name}.")

    config = base.get_config()
    walk(config, "")
    assert len(seen) > 15


def test_an_unknown_field_is_refused():
    config = base.get_config().lock()
    with pytest.raises(AttributeError, match="kl_coeff"):
        config.policy.kl_coeff = 0.1
    with pytest.raises(AttributeError, match="kl_coeff"):
        _ = config.policy.kl_coeff


FLAGS = """
import sys
from absl import app
from ml_collections import config_flags
CONFIG = config_flags.DEFINE_config_file("config", None, "", lock_config=True)
app.run(lambda argv: print(CONFIG.value.policy.kl_coef, CONFIG.value.mesh.data))
"""


@pytest.mark.parametrize(
    "flag, code, words",
    [
        ("--config.policy.kl_coef=0.25", 0, "0.25 1"),
        ("--config.policy.kl_coeff=0.25", 1, "Did you mean"),
        ("--config.polcy.kl_coef=0.25", 1, "polcy"),
        ("--config.mesh.data=two", 1, "two"),
        ("--confg.mesh.data=2", 1, "Unknown command line flag"),
    ],
)
def test_flags(flag, code, words):
    """A misspelt flag ends the program before anything is begun."""
    command = [sys.executable, "-c", FLAGS, f"--config={ROOT}/configs/base.py", flag]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == code and words in done.stdout + done.stderr, done.stdout + done.stderr
