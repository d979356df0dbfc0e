"""The text of docs/one_step.md, made of a step that step_page.py has noted.

B prompts, G samples per prompt, N = B * G rows (prompt-major), T response tokens
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from step_noting import KINDS, NotedStep

from cooper_jax.trainer.samples import StepRecord
from cooper_jax.types import Metrics, Pair

COMMAND = "python tests/step_page.py --write"
EXPLAINED = {
    "assistant": "the assistant rewrites a right response into a wrong one (in the miniature, it changes a number)",
    "swap": "a right response, and the same text beside the reference answer of another problem",
    "own_answer": "a wrong response beside the answer that it states itself, and beside the reference",
}


def render_page(step: NotedStep) -> str:
    """The page as Markdown."""
    parts = [
        render_introduction(step),
        render_rollout(step),
        render_rewards(step),
        render_policy_update(step),
        render_pairs(step),
        render_reward_update(step),
        render_end(),
    ]
    return "\n\n".join(parts) + "\n"


def render_introduction(step: NotedStep) -> str:
    """The heading, and where the numbers are from."""
    return f"""<!-- written by: {COMMAND} -->
# One Cooper step, with its tensors

Read this page to see what each part of a step gets and returns. Every text and number on it comes from one real
step of the miniature (`configs/tiny.py`): both models were trained to step 0 as configured, then one step of
{len(step.record.problems)} prompts with {step.group_size} responses each was taken. The equations, and the reasons
for them, are in [method.md](method.md); the code is `cooper_step` in `cooper_jax/trainer/step.py`.

```bash
{COMMAND}
```

This command writes the page anew: some minutes on a CPU, most of them for step 0. Another machine rounds
differently, and its texts may differ. Rows are not packed here (`policy.packing=off`), so that one row is one
response. Letters: B prompts, G responses to each, N = B x G rows, T response tokens."""


def render_rollout(step: NotedStep) -> str:
    """Part 1: prompt and responses, and one response token by token."""
    record, first = step.record, step.rows[0]
    problem = record.problems[step.shown]
    mask, logprobs = step.policy_batch["response_mask"], step.policy_batch["rollout_logprobs"]
    responses = make_table(
        ("row", "response", "tokens"),
        [(row, as_code(record.completions[row].text), record.completions[row].tokens) for row in step.rows],
    )
    # The response follows the prompt, which is padded on the left.
    ids = step.policy_batch["tokens"][first][-mask.shape[1] :][mask[first]].tolist()
    pieces = make_table(
        ("token", "id", "log-probability when sampled"),
        [
            (as_code(piece) if piece else "end of text", token, f"{value:.3f}")
            for piece, token, value in zip(
                split_pieces(step.decode, ids), ids, logprobs[first][mask[first]], strict=True
            )
        ],
    )
    shapes = {"mask of the sampled tokens": mask, "their log-probabilities": logprobs}
    return f"""## 1. Sample

The policy writes G responses to each prompt. One of the problems, with the token ids of its prompt:

```text
{problem.question}
reference answer: {problem.reference}
{step.prompts[step.shown]}
```

{responses}

For each token the rollout keeps its id, and its log-probability under the distribution that it was drawn from. Row
{first}, token by token:

{pieces}

{render_shapes(shapes)}"""


def render_rewards(step: NotedStep) -> str:
    """Part 2: verdicts, scores, rewards and advantages of the shown group."""
    record, first = step.record, step.rows[0]
    assert record.scores is not None
    rewards = record.rewards[step.rows]
    mean, deviation = float(rewards.mean()), float(rewards.std(ddof=1))
    table = make_table(
        ("row", "rule verifier", "logit z", "reward p = sigmoid(z)", "advantage"),
        [
            (
                row,
                record.verdicts[row].value,
                f"{to_logit(record.scores[row]):+.3f}",
                f"{record.rewards[row]:.4f}",
                f"{record.advantages[row]:+.3f}",
            )
            for row in step.rows
        ],
    )
    worked = (rewards[0] - mean) / (deviation + 1e-6)
    total = format_zero(float(record.advantages[step.rows].sum()))
    shapes = {"scores": record.scores, "rewards": record.rewards, "advantages": record.advantages}
    return f"""## 2. Reward

The reward model reads question, reference answer and response, and returns a logit z; the reward is p = sigmoid(z).
The rule verifier reads the same text. In the arm `cooper` its verdict is not the reward: it decides which responses
may become members of pairs in part 4.

{table}

An advantage compares a reward with those of the other responses to the same prompt: A = (p - mean) / (std + 1e-6).
Here the mean is {mean:.4f} and the standard deviation (with G - 1) {deviation:.4f}, so row {first} has
({rewards[0]:.4f} - {mean:.4f}) / {deviation:.4f} = {worked:+.3f}. The advantages of a group add up to
{total}: a response is reinforced only for being better than its neighbours.

{render_shapes(shapes)}"""


def render_policy_update(step: NotedStep) -> str:
    """Part 3: the arrays of the update, and its metrics."""
    names = ("loss", "pg_loss", "kl", "ratio_mean", "entropy", "grad_norm", "lr")
    return f"""## 3. Update the policy

One GRPO update on all rows. Each response token is weighted by its row's advantage; a KL term holds the policy
near that of step 0. The arrays of the update, a row for each response:

{render_shapes(step.policy_batch)}

{render_metrics(step.metrics, [f"policy/{name}" for name in names])}

This is the first step, so the policy still is that of step 0: the KL divergence is 0, and the ratio of new to old
probabilities is 1 up to rounding."""


def render_pairs(step: NotedStep) -> str:
    """Part 4: the texts of one pair of each kind."""
    pairs, counts = step.record.pairs, sorted(step.record.refused.items())
    refused = ", ".join(f"{count} `{reason}`" for reason, count in counts) or "none"
    made = sum(pair is not None for pair in pairs)
    shown = "\n\n".join(render_pair(step.record, kind) for kind in KINDS)
    return f"""## 4. Make pairs

The reward model learns from pairs of a right and a wrong input. `recipe=robust` asks for three pairs per prompt, of
three kinds ([reward_updates.md](reward_updates.md#the-pairs)); {made} of {len(pairs)} were made. Not made, by
reason ([metrics.md](metrics.md#reasons-for-refused-pairs)): {refused}.

{shown}"""


def render_pair(record: StepRecord, kind: str) -> str:
    """The first pair of a kind, as a heading and a block of text."""
    found = [pair for i, pair in enumerate(record.pairs) if pair and KINDS[i % len(KINDS)] == kind]
    lines = ["no pair of this kind was made in this step"] if not found else describe_pair(found[0])
    return f"**`{kind}`**: {EXPLAINED[kind]}.\n\n```text\n" + "\n".join(lines) + "\n```"


def describe_pair(pair: Pair) -> list[str]:
    """The inputs of a pair's two members."""
    reference = pair.problem.reference
    return [
        f"question    {pair.problem.question}",
        f"positive    {pair.positive}    [reference {pair.positive_reference or reference}]",
        f"negative    {pair.negative}    [reference {pair.negative_reference or reference}]",
    ]


def render_reward_update(step: NotedStep) -> str:
    """Part 5: logits of the pairs' members before and after, and the loss of one pair by hand."""
    before, after = step.logits
    valid = [slot for slot in np.flatnonzero(step.pair_batch["mask"]) if slot < len(step.record.pairs)]
    table = make_table(
        ("kind", "z+ before", "z- before", "z+ after", "z- after"),
        [
            (KINDS[slot % len(KINDS)], *(f"{z:+.3f}" for z in (*before[:, slot], *after[:, slot])))
            for slot in valid
        ],
    )
    positive, negative = (to_probability(float(z)) for z in before[:, valid[0]])
    contrast = -float(np.log(to_probability(positive - negative)))
    cross_entropy = -float(np.log(positive) + np.log(1 - negative)) / 2
    names = (
        "pair_loss",
        "pair_bce",
        "accuracy",
        "positive_mean",
        "negative_mean",
        "valid",
        "updates",
        "grad_norm",
    )
    return f"""## 5. Update the reward model

`recipe=robust` minimises -log sigmoid(p+ - p-) over the pairs, plus twice the cross-entropy of their members. Of
the first pair in this table p+ is {positive:.4f} and p- is {negative:.4f}, so the first term is {contrast:.4f} and
the cross-entropy {cross_entropy:.4f}. Logits before and after the step's {step.metrics["rm/updates"]:.0f} updates:

{table}

{render_metrics(step.metrics, [f"rm/{name}" for name in names])}

{render_shapes(step.pair_batch)}

Slots without a pair are masked, so the shapes are the same at every step and nothing is compiled again."""


def render_end() -> str:
    """Where to look next."""
    return """## Where this is in a run

Each step is one line of `metrics.jsonl` ([metrics.md](metrics.md) explains every name); texts like these are in
`samples.jsonl` ([training.md](training.md#the-run-directory)), and [report.md](report.md) shows both in a browser.

| part | code |
| --- | --- |
| 1 | `cooper_jax/trainer/dynamic_sampling.py` (`sample_batch`), `cooper_jax/rollout/engine.py` |
| 2 | `cooper_jax/trainer/grading.py`, `cooper_jax/rule/verifier.py`, `cooper_jax/policy/advantages.py` |
| 3 | `cooper_jax/trainer/policy_stages.py` (`update_policy`), `cooper_jax/policy/grpo.py` |
| 4 | `cooper_jax/reward/pairs/build_pairs.py` |
| 5 | `cooper_jax/trainer/reward_stages.py` (`update_reward_model`), `cooper_jax/reward/reward_losses.py` |"""


# --- parts of Markdown -------------------------------------------------------------------------------


def make_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def as_code(text: str) -> str:
    """Inline code that may stand in a table."""
    shown = text.replace("|", "\\|").replace("`", "'").replace("\n", "↵")
    return f"`{shown}`"


def render_shapes(arrays: Mapping[str, np.ndarray]) -> str:
    """A table of arrays with their types and shapes."""
    rows = [(name, f"`{x.dtype}[{', '.join(map(str, x.shape))}]`") for name, x in arrays.items()]
    return make_table(("array", "type and shape"), rows)


def render_metrics(metrics: Metrics, names: Sequence[str]) -> str:
    """A table of metrics."""
    return make_table(("metric", "value"), [(f"`{name}`", format_value(metrics[name])) for name in names])


def format_value(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def format_zero(value: float) -> str:
    """0 for what is 0 up to the rounding of float32."""
    return "0" if abs(value) < 1e-4 else format_value(value)


def to_probability(logit: float) -> float:
    """The sigmoid."""
    return float(1 / (1 + np.exp(-logit)))


def to_logit(probability: float) -> float:
    """The inverse of the sigmoid."""
    return float(np.log(probability) - np.log1p(-probability))


def split_pieces(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it."""
    texts = [decode(ids[:n]) for n in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in zip(texts, texts[1:], strict=False)]
