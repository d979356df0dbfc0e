"""The arms of a study: named settings that are compared with each other.

All arms share a base config: the config file with its --config flags.  The settings of an arm and of its
recipe take precedence over the file's.  A flag that contradicts them is an error.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.runtime.stored_config import flatten_config
from cooper_jax.settings.config_fields import describe_unknown_field
from cooper_jax.settings.secrets import find_secrets_of_fields
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.recipes import list_preset_fields, list_preset_values

# The folders of the supervised phases, which are run once per seed for all arms.  No arm may have such a name.
# The policy's and the reward model's phase are runs of their own, since neither reads what the other makes.
START, REWARD_START = "start", "start_reward"
STARTS = (START, REWARD_START)
# The folder of a run that is made for the compilation cache alone.
COMPILE = "compile"
RESERVED = (*STARTS, COMPILE)

# Fields that the study sets or that are the same in all arms.  A final dot stands for a whole section.
SHARED_FIELDS = ("name", "seed", "steps", "run_dir", "resume", "supervised.", "eval.")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to reward the policy."""

    name: str
    about: str  # a short description for tables and figures
    settings: Mapping[str, Any]  # dotted field -> value
    # dotted field -> factor by which the base config's value is multiplied
    factors: Mapping[str, float] = dataclasses.field(default_factory=dict)


# Settings that several arms share.  An empty recipe sets no field.
_FROZEN = {"reward.arm": "model", "reward.recipe": "", "reward.warmup_updates": 0}
_ROBUST = {"reward.arm": "cooper", "reward.recipe": "robust"}
# As many pairs per prompt as `robust` has, all of them rewrites by the assistant.
_REWRITES = {"reward.arm": "cooper", "pairs.per_prompt": 3}
# Cross-entropy on rollouts, with the rule's verdicts as labels.
_LABELS = {"reward.rollout_bce": 1.0, "reward.replay": 256, "reward.replay_rows": 32}
ARMS = {
    arm.name: arm
    for arm in (
        # The main comparison: no reward model, a frozen one, and three recipes that update it.
        Arm("rule", "reward: the rule verifier's verdict", {"reward.arm": "rule", "reward.recipe": ""}),
        Arm("frozen", "reward: a frozen reward model", _FROZEN),
        Arm(
            "frozen_warm",
            "frozen after robust's 20 updates before step 1",
            {"reward.arm": "model", "reward.recipe": "robust"},
        ),
        Arm(
            "released",
            "Cooper as the authors released it: contrastive loss on logits",
            _REWRITES | {"reward.recipe": "released"},
        ),
        Arm(
            "sigmoid", "Cooper with the contrastive loss on rewards", _REWRITES | {"reward.recipe": "sigmoid"}
        ),
        Arm("robust", "Cooper with our recipe: cross-entropy on the pairs as well", _ROBUST),
        # Controls: remedies against reward hacking that are simpler than updating the reward model.
        Arm(
            "frozen_guard", "frozen; no reward without an answer", _FROZEN | {"reward.answer_required": True}
        ),
        Arm("frozen_kl10", "frozen; KL coefficient x 10", _FROZEN, {"policy.kl_coef": 10.0}),
        Arm("frozen_kl100", "frozen; KL coefficient x 100", _FROZEN, {"policy.kl_coef": 100.0}),
        Arm(
            "frozen_floor",
            "frozen; group standard deviation at least 0.1",
            _FROZEN | {"policy.std_floor": 0.1},
        ),
        Arm(
            "either", "frozen; reward 1 where the rule says correct", _FROZEN | {"reward.rule_or_model": True}
        ),
        # Ablations of robust: one of its parts replaced, left out or used alone.
        Arm(
            "bce",
            "cross-entropy on the rule's labels of rollouts, no pairs",
            _ROBUST | _LABELS | {"reward.pair_weight": 0.0, "reward.pair_bce": 0.0},
        ),
        Arm("labels", "robust plus cross-entropy on the rule's labels of rollouts", _ROBUST | _LABELS),
        Arm(
            "rewrites",
            "robust with rewrites only, three per prompt",
            _ROBUST | {"pairs.negatives": ("assistant",)},
        ),
        Arm(
            "pointwise",
            "sigmoid plus robust's cross-entropy term",
            _REWRITES | {"reward.recipe": "sigmoid", "reward.pair_bce": 2.0},
        ),
        Arm("no_bce", "robust without its cross-entropy term", _ROBUST | {"reward.pair_bce": 0.0}),
        Arm("no_warm", "robust without its updates before step 1", _ROBUST | {"reward.warmup_updates": 0}),
        Arm(
            "no_swap",
            "robust without reference swaps",
            _ROBUST | {"pairs.per_prompt": 2, "pairs.negatives": ("assistant", "own_answer")},
        ),
        Arm(
            "no_own",
            "robust without own-answer pairs",
            _ROBUST | {"pairs.per_prompt": 2, "pairs.negatives": ("assistant", "swap")},
        ),
        Arm("logit", "robust with the contrastive loss on logits", _ROBUST | {"reward.pair_loss": "logit"}),
        Arm(
            "shuffled",
            "robust; each pair's members exchanged with probability 1/2",
            _ROBUST | {"reward.shuffle_labels": True},
        ),
    )
}
# The arms of a study that names none.
MAIN = ("rule", "frozen", "frozen_warm", "released", "sigmoid", "robust")


def choose_arms(names: Sequence[str], defined: Sequence[str], base: ConfigDict) -> list[Arm]:
    """Choose arms by name, and add the arms that are defined on the command line.

    Args:
      names: names in ARMS; repetitions are dropped.
      defined: definitions in the format of `parse_arm`.
      base: the config that all arms share.

    Raises SetupError for an unknown name, for two arms of the same name, and for an invalid definition.
    """
    if unknown := [name for name in names if name not in ARMS]:
        raise SetupError(
            f"--arms: {', '.join(unknown)}: the arms are {', '.join(ARMS)}; "
            '--arm="NAME: FIELD=VALUE, ..." defines more'
        )
    arms = [*(ARMS[name] for name in dict.fromkeys(names)), *(parse_arm(text, base) for text in defined)]
    # Two arms of one name would share their folders.
    counts = Counter(arm.name for arm in arms)
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise SetupError(f"--arm: {', '.join(repeated)} occurs twice: give one of them another name")
    return arms


def parse_arm(text: str, base: ConfigDict) -> Arm:
    """Parse an arm's definition: `name: reward.pair_loss=logit, pairs.negatives=('assistant','swap')`.

    Each value must have the type of the base config's value.  Raises SetupError, naming the arm and the
    problem.
    """
    name, colon, rest = (part.strip() for part in text.partition(":"))
    if not colon or not re.fullmatch(r"\w+", name) or name in RESERVED:
        raise SetupError(
            f"--arm={text!r}: give a name of letters, digits and _, other than "
            f"{', '.join(RESERVED)}, a colon and "
            'settings: --arm="logit: reward.recipe=robust, reward.pair_loss=logit"'
        )

    # The settings are separated by commas, but a tuple in parentheses contains commas of its own.
    known = flatten_config(base.to_dict())
    settings = {}
    for part in re.split(r",(?![^()]*\))", rest):
        field, equals, value = (x.strip() for x in part.partition("="))
        if not equals:
            raise SetupError(
                f"--arm={name}: {part.strip()!r}: write FIELD=VALUE, with a field of configs/base.py"
            )
        if field not in known:
            # Without the value, which may be a key.
            raise SetupError(f"--arm={name}: {describe_unknown_field(field, known)}")
        if is_shared_field(field):
            raise SetupError(f"--arm={name}: {field} is the same in all arms: give it as --config.{field}")
        settings[field] = _parse_value(value, known[field], f"--arm={name}: {field}")
    # Before any other message about a setting, as those repeat values.
    if secrets := find_secrets_of_fields(settings):
        raise SetupError(*(f"--arm={name}: {message}" for message in secrets))
    return Arm(name, rest, settings)


def is_shared_field(field: str) -> bool:
    """Return True if the study sets the field, or all its arms have the same value of it."""
    return any(field == name or (name.endswith(".") and field.startswith(name)) for name in SHARED_FIELDS)


def _parse_value(text: str, like: Any, where: str) -> Any:
    """Parse text as a value of `like`'s type.  where: the arm and the field, for messages."""
    # Strings need no quotes, as in --config flags.
    if isinstance(like, str):
        return text.strip("'\"")
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        # 1 is accepted for a float; otherwise types must be equal, so that True is no number.
        if type(value) is int and isinstance(like, float):
            value = float(value)
        if type(value) is not type(like):
            raise ValueError(f"it is a {type(value).__name__}")
    except (ValueError, SyntaxError) as error:
        raise SetupError(
            f"{where}={text}: it takes a {type(like).__name__} like {like!r} ({error})"
        ) from None
    return value


def list_settings(arm: Arm, base: ConfigDict) -> dict[str, Any]:
    """List all fields that an arm sets, by dotted name.

    The arm's own settings take precedence over its scaled fields, and these over those of its recipe and its
    algorithm.  base: the config that all arms share.  Raises SetupError for an unknown recipe or algorithm.
    """
    try:
        named = list_preset_values(arm.settings)
    except SetupError as error:
        raise SetupError(*(f"--arm={arm.name}: {message}" for message in error.messages)) from None
    known = flatten_config(base.to_dict())
    scaled = {field: known[field] * factor for field, factor in arm.factors.items()}
    return named | scaled | dict(arm.settings)


def make_flags(cfg: ConfigDict, fields: Collection[str]) -> list[str]:
    """Make command-line flags for these fields and for all fields that a preset may set, with cfg's values.

    A run applies its recipe and its algorithm to every field without a flag.  With flags for all such fields, the
    run has cfg's values whatever they are.
    """
    known = flatten_config(cfg.to_dict())
    given = {*fields, *list_preset_fields()}
    return [f"--config.{field}={known[field]}" for field in sorted(given)]
