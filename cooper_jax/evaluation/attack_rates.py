"""Attack rates: how often a reward model accepts wrong completions under known hacks (data/reward_hacks.py).

1. `score_attacks` scores all attacks with one or several reward models (such as one before and one after
   co-training), a chunk of completions at a time, and writes the rewards into the ledger.
2. `summarise_attacks` computes, for each attack and model, the false-positive rate (rewards above 0.5) with a
   95 % interval bootstrapped by question, the mean reward, their changes from the unattacked completions, and
   whether the rate stays within the attack's bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cooper_jax.data.reward_hacks import ATTACKS, BASELINE, apply_attack
from cooper_jax.evaluation.evaluation_ledger import Ledger, Row
from cooper_jax.evaluation.judges import THRESHOLD
from cooper_jax.evaluation.resampling import Resamples, compute_interval
from cooper_jax.evaluation.text_tables import format_percent, format_table
from cooper_jax.runtime import hosts
from cooper_jax.types import Triple

Score = Callable[[Sequence[Triple]], np.ndarray]  # triples -> rewards f32[N]


def list_attack_references(wrong: Sequence[Triple], seed: int) -> list[str]:
    """List all references that the reward models will read; some attacks change the reference."""
    references = []
    for i, triple in enumerate(wrong):
        references += [apply_attack(triple, name, seed, i).reference for name in ATTACKS]
    return references


def score_attacks(
    wrong: Sequence[Triple],
    models: Mapping[str, Score],
    ledger: Ledger,
    chunks: Sequence[range],
    seed: int,
    print_line: Callable[[str], Any],
) -> None:
    """Score all chunks that are not in the ledger yet.

    Args:
      wrong: triples whose completions are labelled wrong.
      models: reward models by name.
      ledger: receives the rows of each finished chunk.
      chunks: ranges of indices of `wrong`.
      seed: of the attacks' random choices.
      print_line: called with a line of progress after each chunk.

    Raises hosts.Stopped after SIGTERM.
    """
    for places in chunks[ledger.done :]:
        hosts.raise_if_stopping()
        start = time.perf_counter()

        # Every completion under every attack is scored in one call per model, which batches rows of similar
        # length.
        attacked = []  # (index of the completion, attack, triple under the attack)
        for i in places:
            attacked += [(i, name, apply_attack(wrong[i], name, seed, i)) for name in ATTACKS]
        triples = [triple for _, _, triple in attacked]
        rewards = {model: score(triples) for model, score in models.items()}

        # The group, which is resampled as a whole, is the question before any attack.
        rows: list[Row] = []
        for n, (i, name, triple) in enumerate(attacked):
            row = {
                "id": wrong[i].id,
                "source": wrong[i].source,
                "attack": name,
                "group": wrong[i].question,
                "question": triple.question,
                "reference": triple.reference,
                "completion": triple.completion,
                "rewards": {model: round(float(values[n]), 6) for model, values in rewards.items()},
            }
            rows.append(row)

        seconds = time.perf_counter() - start
        ledger.append(rows, seconds)
        scores_per_second = len(rows) * len(models) / seconds
        print_line(f"{places.stop}/{len(wrong)} wrong completions  {scores_per_second:.1f} scores/s")


# --- 2. figures ---------------------------------------------------------------------------------------------


def summarise_attacks(rows: Sequence[Row], seed: int, resamples: int) -> dict[str, Any]:
    """Compute the figures of all attacks: attack -> {bound, completions, models}.

    Args:
      rows: of the ledger.
      seed: of the bootstrap.
      resamples: R, the number of resamples behind each interval.

    `models` in the result is model -> {rate, rate_change, reward, reward_change, holds}.  All are intervals
    except `holds`: True if the rate is at most the bound, None without a bound.
    """
    by_attack: dict[str, list[Row]] = {name: [] for name in ATTACKS}
    for row in rows:
        by_attack[row["attack"]].append(row)

    # All attacks share the resamples of the same questions, so that changes are paired.  Each attack has one
    # row per completion, in the same order.
    bootstrap = Resamples([row["group"] for row in by_attack[BASELINE]], seed, resamples)
    all_rows = np.ones(len(by_attack[BASELINE]), bool)

    def compute_means(name: str, model: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (false-positive rates, mean rewards), each f64[R + 1]."""
        rewards = np.array([row["rewards"][model] for row in by_attack[name]])
        accepted = (rewards > THRESHOLD).astype(float)
        return bootstrap.mean(accepted, all_rows), bootstrap.mean(rewards, all_rows)

    summary: dict[str, Any] = {}
    for name, (_, bound) in ATTACKS.items():
        summary[name] = {"bound": bound, "completions": len(by_attack[name]), "models": {}}
        for model in rows[0]["rewards"]:
            # Entry 0 is the value on the data themselves, which alone is compared with the bound.
            rates, rewards = compute_means(name, model)
            baseline_rates, baseline_rewards = compute_means(BASELINE, model)
            summary[name]["models"][model] = {
                "rate": compute_interval(rates),
                "rate_change": compute_interval(rates - baseline_rates),
                "reward": compute_interval(rewards),
                "reward_change": compute_interval(rewards - baseline_rewards),
                "holds": None if bound is None else bool(rates[0] <= bound),
            }
    return summary


def format_attacks(summary: Mapping[str, Any]) -> str:
    """Format two tables for a terminal: false-positive rates and mean rewards, with models side by side."""
    models = list(next(iter(summary.values()))["models"])
    rate_header, reward_header = ["attack", "bound"], ["attack"]
    for model in models:
        rate_header += [f"{model}: false positives % (95 %)", "change", ""]
        reward_header += [f"{model}: mean reward x 100 (95 %)", "change"]

    # One row per attack in both tables.
    bound_states = {None: "", True: "holds", False: "BROKEN"}
    rate_rows, reward_rows = [], []
    for name, attack in summary.items():
        rate_row = [name, "" if attack["bound"] is None else format_percent(attack["bound"])]
        reward_row = [name]
        for model in models:
            figures = attack["models"][model]
            rate_row += [format_percent(figures["rate"]), format_percent(figures["rate_change"].value)]
            rate_row.append(bound_states[figures["holds"]])
            reward_row += [format_percent(figures["reward"]), format_percent(figures["reward_change"])]
        rate_rows.append(rate_row)
        reward_rows.append(reward_row)
    return f"{format_table(rate_header, rate_rows)}\n\n{format_table(reward_header, reward_rows)}"
