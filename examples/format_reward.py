"""Two rewards of your own beside the rule's: the form of a response, and its length.

    F=examples/format_reward.py
    python launch/train.py --config=configs/tiny.py --config.reward.arm=rule \\
        --config.reward.functions=rule,$F:format_reward,$F:brevity --config.reward.function_weights=1,0.2,0.1
"""

import re


def format_reward(completions, **kwargs):
    """1 for a response that shows its work and ends with one marked answer, else 0."""
    form = re.compile(r"\S[^#]*#### \S+( \S+)?")
    return [float(form.fullmatch(text.strip()) is not None) for text in completions]


def brevity(completion_lengths, truncated, **kwargs):
    """From 0 (32 tokens and more) to 1; no reward, neither good nor bad, for a response that was cut."""
    rewards = []
    for length, was_cut in zip(completion_lengths, truncated, strict=True):
        rewards.append(None if was_cut else max(0.0, 1 - length / 32))
    return rewards
