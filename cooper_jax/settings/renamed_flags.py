"""Configuration fields that had another name in earlier versions, or that were removed.

A flag with an old name fails with a message that gives the new name; no flag is translated silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Prefix of the table's entries for fields without a successor, and of their messages.
REMOVED = "was removed: "

# Old dotted name -> new dotted name, or REMOVED and the reason.  A name that ends in a dot is a whole
# section: {"old_section.": "new_section."}.
RENAMED_FLAGS: dict[str, str] = {
    "warmup.start": "supervised.start_from",
    "warmup.": "supervised.",
    "reward.warm_start": "reward.warmup_updates",
    "reward.guard": "reward.answer_required",
    "reward.either": "reward.rule_or_model",
    "rollout.weights": "rollout.weight_placement",
    "policy.std_normalise": "policy.std",
    "train_rm.decay": "train_rm.optimiser.decay",
    "log.tensorboard": "log.to",
    "reward.common_mode": REMOVED + "a penalty on what a pair's two logits share changed no result",
    "reward.updates_most": REMOVED + "more updates while the reward model is fooled changed no result; see "
    "--config.reward.updates for a fixed number",
    "reward.fp_target": REMOVED + "it belonged to reward.updates_most, which changed no result",
    "rule.retry_timeout": REMOVED
    + "rule.timeout limits the CPU time of a verdict, which needs no second try",
    "reward.binary": REMOVED + "rewards of 0 or 1 in place of the reward model's score changed no result",
}

# Old dotted name -> {old value: present value}, for fields whose type changed, some with their name.
CHANGED_VALUES: dict[str, dict[Any, Any]] = {
    "log.tensorboard": {True: "tensorboard", False: ""},
    "policy.packing": {True: "on", False: "off"},
    "reward.packing": {True: "on", False: "off"},
    "policy.std_normalise": {True: "group", False: "none"},
}

# (field, old value) -> the reason for which a field no longer takes the value.
REMOVED_VALUES: dict[tuple[str, str], str] = {
    ("pairs.negatives", "mined"): (
        "negatives taken from wrong rollouts changed no result; own_answer sets a wrong rollout beside its "
        "own answer"
    ),
}


def describe_removed_values(field: str, values: Iterable[str]) -> list[str]:
    """Write a message for each value that the field accepted in earlier versions only."""
    reasons = {value: REMOVED_VALUES[field, value] for value in values if (field, value) in REMOVED_VALUES}
    return [f"{field}: {value!r} {REMOVED}{reason}" for value, reason in reasons.items()]


def describe_rename(name: str, table: Mapping[str, str] = RENAMED_FLAGS) -> str | None:
    """Describe a field's change: "is now ..." or "was removed: ..."; None for a name outside the table.

    name: the dotted name, without `config.`.
    """
    old = _find_entry(name, table)
    if old is None:
        return None
    new = table[old]
    return new if new.startswith(REMOVED) else f"is now --config.{new}{name.removeprefix(old)}"


def translate_name(name: str) -> str:
    """The present name of a field of an earlier version; a field that was removed keeps its old name.

    For the config files in run directories of earlier versions, which can still be read.
    """
    old = _find_entry(name, RENAMED_FLAGS)
    if old is None or RENAMED_FLAGS[old].startswith(REMOVED):
        return name
    return RENAMED_FLAGS[old] + name.removeprefix(old)


def translate_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an earlier version under the present names, with the present values: dotted name -> value."""
    return {translate_name(name): _translate_value(name, value) for name, value in settings.items()}


def _translate_value(name: str, value: Any) -> Any:
    """The present value of a field of an earlier version; name: its name then."""
    changed = CHANGED_VALUES.get(name, {})
    # Only old values are of the old type: 1 is none, although it equals True.
    return changed[value] if isinstance(value, bool) and value in changed else value


def _find_entry(name: str, table: Mapping[str, str]) -> str | None:
    """The longest entry of the table that is the name or the name's section; None if there is none."""
    covering = [old for old in table if name == old or (old.endswith(".") and name.startswith(old))]
    # A field that moved out of its section has an entry longer than the section's.
    return max(covering, key=len, default=None)
