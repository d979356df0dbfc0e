"""Bounds of the settings: for each field of configs/base.py the values that it may have.

1. `BOUNDS` maps a field's dotted name to its rule (value_rules.py).  Words of which a field takes one are listed
   beside the code that gives them a meaning, and checked there.
2. `check_bounds` checks a whole config, `find_out_of_bounds` a typed config of one section.

A bound above is a few times what anybody has used.  It is there for a slip of the finger (1e6 for a number of
processes), which would otherwise take the machine's memory or its processes before anything is said.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.settings.config_fields import flatten_config
from cooper_jax.settings.secrets import MAY_HOLD_SECRETS
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.settings.value_rules import Flag, ListOf, OneOf, Real, Rule, Text, Whole, show_value

_FLAG = Flag()
_ANY_TEXT = Text(longest=100_000)
_WORD = Text(longest=200, pattern=r"[^\x00-\x1f]*", words="text without control characters")
_PATHS = Text(longest=20_000, pattern=r"[^\x00-\x1f]*", words="text without control characters")
_FILLED = Text(shortest=1, longest=200, pattern=r"[^\x00-\x1f]+", words="text of 1 to 200 characters")

_DTYPE = OneOf(("float32", "bfloat16"))
_THINKING = OneOf(("", "on", "off"))
_MESH_AXES = ("data", "fsdp", "tensor")
_LOGICAL_AXES = ("batch", "vocab", "embed", "heads", "kv_heads", "ffn", "layers", "head_dim")

_UPDATES = Whole(0, 10**7)
_STEPS_BETWEEN = Whole(0, 10**7)  # 0: never
_ROWS = Whole(1, 10**5)
_TOKENS = Whole(1, 2**20)
_TOKENS_OR_NONE = Whole(0, 2**20)
_PROBLEMS = Whole(0, 10**8)
_WEIGHT = Real(0, 1e6)  # of a term of a loss
_SHARE = Real(0, 1)
_SECONDS = Real(0, 1e6, above=True)
_TEMPERATURE = Real(0, 100)
_TOP_P = Real(0, 1, above=True)
_HABIT = ListOf(_SHARE, longest=2, shortest=2)
_TUPLE = ListOf(_WORD, longest=100)


@dataclasses.dataclass(frozen=True)
class _Devices:
    """Devices along an axis of a mesh."""

    allowed = "at least 1 and at most 100000, or -1 for the rest"

    def accepts(self, value: Any) -> bool:
        return value == -1 or Whole(1, 10**5).accepts(value)


@dataclasses.dataclass(frozen=True)
class _ShardingRules:
    """Pairs of a logical axis and what it is divided over: a mesh axis, several, or None."""

    allowed = (
        f"pairs of one of {', '.join(_LOGICAL_AXES)} and one of {', '.join(_MESH_AXES)}, a tuple of these, "
        "or None"
    )

    def accepts(self, value: Any) -> bool:
        if not isinstance(value, list | tuple) or len(value) > 100:
            return False
        for pair in value:
            if not isinstance(pair, list | tuple) or len(pair) != 2 or pair[0] not in _LOGICAL_AXES:
                return False
            targets = pair[1] if isinstance(pair[1], list | tuple) else [pair[1]]
            if any(target is not None and target not in _MESH_AXES for target in targets):
                return False
        return True


def _prefix(section: str, rules: dict[str, Rule]) -> dict[str, Rule]:
    return {f"{section}.{name}": rule for name, rule in rules.items()}


_OPTIMISER: dict[str, Rule] = {
    "lr": Real(0, 10),
    "warmup_steps": _UPDATES,
    "decay": OneOf(("constant", "linear", "cosine")),
    "b1": Real(0, 1, below=True),
    "b2": Real(0, 1, below=True),
    "eps": Real(0, 1, above=True),
    "weight_decay": Real(0, 100),
    "clip_norm": Real(0, 1e12, above=True),
    "first_moment": _DTYPE,
}
_LORA: dict[str, Rule] = {
    "rank": Whole(0, 4096),
    "alpha": Real(0, 1e6, above=True),
    "rslora": _FLAG,
    "base_dtype": _DTYPE,
}
_MODEL: dict[str, Rule] = {
    "weights": _PATHS,
    "tokenizer": _PATHS,
    "num_layers": Whole(0, 1024),
    "vocab_multiple": Whole(1, 2**20),
    "dtype": _DTYPE,
    "arch.family": OneOf(("llama", "qwen2", "qwen3", "mistral", "smollm3", "gemma3_text")),
    "arch.layers": Whole(1, 1024),
    # Bytes and control pieces take 259.
    "arch.vocab_size": Whole(260, 10**6),
    "arch.width": Whole(1, 2**17),
    "arch.heads": Whole(1, 1024),
    "arch.kv_heads": Whole(1, 1024),
    "arch.head_dim": Whole(2, 4096),
    "arch.ffn": Whole(1, 2**20),
    "arch.rope_theta": Real(1, 1e12, above=True),
    "arch.tied": _FLAG,
}
_TRAINED_MODEL = (
    _MODEL
    | _prefix("optimiser", _OPTIMISER)
    | _prefix("lora", _LORA)
    | {
        "remat": _FLAG,
        "microbatch": _ROWS,
        "packing": _WORD,
        "lora.targets": _WORD,
    }
)
_CHAT: dict[str, Rule] = _MODEL | {
    "kind": _PATHS,
    "url": _PATHS,
    "model": _PATHS,
    "key_env": _PATHS,
    "concurrency": Whole(1, 10_000),
    "timeout": _SECONDS,
    "retries": Whole(0, 100),
    "fields": _PATHS,
    "thinking": _THINKING,
    "max_prompt_tokens": _TOKENS_OR_NONE,
    "max_new_tokens": _TOKENS,
    "temperature": _TEMPERATURE,
    "top_p": _TOP_P,
}

# The settings by section, in the order of configs/base.py.
BOUNDS: dict[str, Rule] = {
    "name": Text(
        shortest=1,
        longest=200,
        # The default run directory is runs/NAME; runs/A/B groups runs.
        pattern=r"(?!/)(?!.*(^|/)\.\.(/|$))[^\x00-\x1f]+",
        words="text of 1 to 200 characters, a path without a leading slash and without ..",
    ),
    "seed": Whole(0, 2**32 - 1),
    "steps": _UPDATES,
    "run_dir": _PATHS,
    "exact": _FLAG,
    "overlap": _FLAG,
    "profile": ListOf(_STEPS_BETWEEN, longest=2, shortest=2),
    "faults": _WORD,
    "hacking_guard": _WORD,
    "hacking_anchor": _PROBLEMS,
    "faults_in_a_row": _STEPS_BETWEEN,
    "idle_steps": _STEPS_BETWEEN,
    "resume_step": Whole(-1, 10**7),
    "resume": _FLAG,
    **_prefix(
        "data",
        {
            "train": _PATHS,
            "train_weights": _PATHS,
            "format": _FILLED,
            "eval": _PATHS,
            "eval_weights": _PATHS,
            "eval_from_train": _PROBLEMS,
            "eval_format": _FILLED,
            "exclude_seen": _FLAG,
            "drop_duplicates": _FLAG,
            "question_key": _FILLED,
            "reference_key": _FILLED,
            "solution_key": _WORD,
            "reduce_solutions": _FLAG,
            "tfds_dir": _PATHS,
            "split": _FILLED,
            "eval_split": _FILLED,
            "system": _ANY_TEXT,
            "instruction": _ANY_TEXT,
            "chat": _FLAG,
            "thinking": _WORD,
            "prompts_per_step": _ROWS,
            "refill_prompts": Whole(0, 10**6),
            "max_prompt_tokens": _TOKENS,
            "bucket": Whole(1, 2**16),
            "synthetic_size": Whole(1, 10**6),
        },
    ),
    **_prefix(
        "rollout",
        {
            "group_size": Whole(1, 4096),
            "max_new_tokens": _TOKENS,
            "temperature": _TEMPERATURE,
            "top_k": Whole(0, 2**22),
            "top_p": _TOP_P,
            "min_p": Real(0, 1, below=True),
            "max_rows": Whole(0, 10**6),
            "memory_gib": Real(0, 1e5),
            "segment": Whole(1, 2**16),
            "ahead": Whole(0, 1),
            "dtype": _WORD,
            "kernels": _WORD,
            "weight_placement": _WORD,
            "kv_dtype": _WORD,
        },
    ),
    **_prefix("policy", _TRAINED_MODEL),
    **_prefix(
        "policy",
        {
            "algorithm": _WORD,
            "baseline": _WORD,
            "std": _WORD,
            "std_eps": Real(0, 1e3),
            "std_floor": Real(0, 1e3),
            "flat_std": Real(0, 1e3),
            "loss": _WORD,
            "aggregation": _WORD,
            "mask_truncated": _FLAG,
            "mask_flat_groups": _FLAG,
            "clip_low": Real(0, 1e9),
            "clip_high": Real(0, 1e9),
            "dual_clip": Real(0, 1e9),
            "kl_coef": _WEIGHT,
            "kl_estimator": _WORD,
            "kl_clamp": Real(0, 1e9),
            "entropy_coef": _WEIGHT,
            "correction": _WORD,
            "correction_cap": Real(1, 1e9, above=True),
            "epochs": Whole(1, 1000),
            "minibatches": Whole(1, 10**5),
            "share_prompts": _FLAG,
        },
    ),
    **_prefix("reward", _TRAINED_MODEL),
    **_prefix(
        "reward",
        {
            "arm": _WORD,
            "max_tokens": _TOKENS,
            "recipe": _WORD,
            "pair_loss": _WORD,
            "pair_weight": _WEIGHT,
            "pair_bce": _WEIGHT,
            "rollout_bce": _WEIGHT,
            "rollout_rows": Whole(0, 10**6),
            "updates": Whole(1, 10**4),
            "warmup_updates": _UPDATES,
            "replay": Whole(0, 10**7),
            "replay_rows": Whole(0, 10**6),
            "functions": _PATHS,
            "function_weights": _PATHS,
            "function_normalise": _FLAG,
            "function_messages": _FLAG,
            "function_timeout": _SECONDS,
            "calibrated": _FLAG,
            "overlong_tokens": _TOKENS_OR_NONE,
            "rule_then_model": _FLAG,
            "rule_or_model": _FLAG,
            "answer_required": _FLAG,
            "shuffle_labels": _FLAG,
            "allow_untrained_head": _FLAG,
        },
    ),
    **_prefix(
        "pairs",
        {
            "per_prompt": Whole(1, 1000),
            "negatives": _TUPLE,
            "tries": Whole(1, 1000),
            "length_ratio": Real(1, 1e6),
        },
    ),
    **_prefix(
        "rule",
        {
            "workers": Whole(1, 1024),
            "timeout": Real(0.2, 1e5),
            "step_budget": Real(0, 1e6),
            "memory_mb": Whole(0, 10**8),
            "judge": _PATHS,
        },
    ),
    **_prefix("assistant", _CHAT),
    # 0: by the length of what is rewritten.
    "assistant.max_new_tokens": _TOKENS_OR_NONE,
    "assistant.prompt": _WORD,
    "assistant.probe": _FLAG,
    "assistant.start_timeout": Real(0, 1e6),
    # Only the assistant has kinds without a language model.
    **_prefix("judge", _CHAT | {"kind": OneOf(("openai", "local"))}),
    **_prefix("source", _CHAT | {"kind": OneOf(("openai", "local"))}),
    **_prefix(
        "supervised",
        {
            "start_from": _PATHS,
            "reward_from": _PATHS,
            "policy_steps": _UPDATES,
            "policy_batch": _ROWS,
            "policy_corrupt": _SHARE,
            "policy_habit": _HABIT,
            "reward_habit": _HABIT,
            "reward_steps": _UPDATES,
            "reward_batch": _ROWS,
            "reward_data": _PATHS,
        },
    ),
    **_prefix("supervised.policy_optimiser", _OPTIMISER),
    **_prefix("supervised.reward_optimiser", _OPTIMISER),
    **_prefix(
        "annotate",
        {
            "problems": _PROBLEMS,
            "samples": Whole(1, 10**4),
            "batch": _ROWS,
            "balance": OneOf(("off", "source", "overall")),
            "max_ratio": Real(1, 1e9),
            "ask_again": _FLAG,
        },
    ),
    **_prefix(
        "train_rm",
        {
            "data": _PATHS,
            "eval_data": _PATHS,
            "eval_share": Real(0, 1, above=True, below=True),
            "exclude_overlap": _FLAG,
            "max_characters": Whole(0, 10**9),
            "attacked": _SHARE,
            "other_references": _SHARE,
            "own_references": _SHARE,
            "epochs": Whole(1, 10**4),
            "batch": _ROWS,
            "widths": Whole(1, 1000),
            "eval_every": _STEPS_BETWEEN,
            "keep_best": OneOf(("auroc", "accuracy", "loss")),
            "patience": Whole(0, 10**6),
        },
    ),
    **_prefix("train_rm.optimiser", _OPTIMISER),
    **_prefix(
        "mesh",
        {
            "data": _Devices(),
            "fsdp": _Devices(),
            "tensor": _Devices(),
            "across": _WORD,
            "collective_matmul": _FLAG,
            "reward": _WORD,
            "reference": _WORD,
            "assistant": _WORD,
            "rollout": _WORD,
            "rules": _ShardingRules(),
            "rollout_rules": _ShardingRules(),
        },
    ),
    **_prefix(
        "benchmark",
        {
            "samples": Whole(1, 10**5),
            "temperature": _TEMPERATURE,
            "top_p": _TOP_P,
            "max_new_tokens": _TOKENS,
            "max_prompt_tokens": _TOKENS,
            "problems": _PROBLEMS,
            "judged_by": OneOf(("rule", "model", "both")),
            "chunk": _ROWS,
            "bootstrap": Whole(1, 10**6),
            "exclude_seen": _FLAG,
        },
    ),
    **_prefix(
        "serve",
        {
            "models": OneOf(("all", "policy", "reward")),
            "policy_name": _FILLED,
            "reward_name": _FILLED,
            "host": _FILLED,
            "port": Whole(0, 2**16 - 1),
            "key_env": _PATHS,
            "slots": Whole(1, 10**5),
            "max_prompt_tokens": _TOKENS,
            "max_new_tokens": _TOKENS,
            "segment": Whole(1, 2**16),
            "max_waiting": Whole(0, 10**7),
            "max_waiting_scores": Whole(1, 10**8),
            "max_body_mb": Real(0, 1e5, above=True),
            "body_timeout": _SECONDS,
            "timeout": _SECONDS,
            "shutdown_timeout": Real(0, 1e6),
        },
    ),
    **_prefix(
        "eval",
        {
            "every": _STEPS_BETWEEN,
            "problems": Whole(1, 10**8),
            "samples": Whole(1, 10**5),
            "temperature": _TEMPERATURE,
            "top_p": _TOP_P,
            "greedy": _FLAG,
            "reward_rows": Whole(0, 10**7),
        },
    ),
    **_prefix("checkpoint", {"every": Whole(1, 10**7), "keep": Whole(0, 10**6)}),
    **_prefix(
        "log",
        {
            "samples_every": _STEPS_BETWEEN,
            "samples": Whole(0, 10**5),
            "pair_motion": _FLAG,
            "giveaway_every": _STEPS_BETWEEN,
            # Fewer rewrites say nothing: cooper_jax/reward/pairs/giveaway_probe.py.
            "giveaway_pairs": Whole(50, 10**6),
            "show_samples": _STEPS_BETWEEN,
            "to": _PATHS,
        },
    ),
}
# Rules of sections that a typed config names by their last part alone.
_BY_LAST_PART = _prefix("optimiser", _OPTIMISER) | _prefix("lora", _LORA)


def check_bounds(config: ConfigDict) -> None:
    """Raise SetupError with every field of a config that is outside its bounds."""
    problems = []
    for name, value in flatten_config(config).items():
        problems += _find_problems(name, value, BOUNDS.get(name))
    if problems:
        raise SetupError(*problems)


def find_out_of_bounds(config: Any, section: str) -> list[str]:
    """Write a message for each field of a typed config that is outside its bounds.

    section: the dotted name; "": the fields outside all sections.
    """
    problems = []
    for field in dataclasses.fields(config):
        name = f"{section}.{field.name}" if section else field.name
        rule = BOUNDS.get(name, _BY_LAST_PART.get(name))
        # A typed config holds some texts as what they were parsed to.
        if rule is not None and not isinstance(rule, Text):
            problems += _find_problems(name, getattr(config, field.name), rule)
    return problems


def _find_problems(name: str, value: Any, rule: Rule | None) -> list[str]:
    if rule is None or rule.accepts(value):
        return []
    if name.rpartition(".")[2] in MAY_HOLD_SECRETS:
        return [f"{name}: it must be {_describe(rule)}"]
    if isinstance(rule, OneOf):
        return [f"{name}={show_value(value)}: it is {rule.allowed}"]
    return [f"{name}={show_value(value)}: it must be {_describe(rule)}"]


def _describe(rule: Rule) -> str:
    """Words for numbers that are bounded on one side or on both."""
    if isinstance(rule, Whole):
        return f"at least {rule.low} and at most {rule.high}"
    if isinstance(rule, Real):
        low = f"{'above' if rule.above else 'at least'} {rule.low:g}"
        if math.isinf(rule.high):
            return f"{low} and finite"
        return f"{low} and {'below' if rule.below else 'at most'} {rule.high:g}"
    return rule.allowed
